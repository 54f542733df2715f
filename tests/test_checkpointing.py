"""Memory: saved-tensor hooks, checkpoints of ops and layers, policies that name our ops, under torch.compile."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import convrnn
from convrnn.info import OPS

from . import differentiable
from .differentiable import CASES, gradients_of
from .modules import MODULES, loss, tensors

# Nothing here asks which kernel computes.
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

each_case = pytest.mark.parametrize("name", CASES)


class Runs(TorchDispatchMode):
    """Counts how often an op is computed."""

    def __init__(self, op):
        super().__init__()
        self.op, self.runs = op, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs += func is self.op
        return func(*args, **(kwargs or {}))


def gradients(f, module, x):
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    loss(f(leaf)).backward()
    return [leaf.grad, *(p.grad for p in module.parameters())]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@each_case
def test_saved_tensor_hooks(name, device):
    """Hooks see every tensor that is kept, and may move it."""
    case, inputs = CASES[name], CASES[name].inputs(device)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):
        differentiable.assert_same(gradients_of(case.ours, inputs), gradients_of(case.reference, inputs))
    assert seen
    with torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda"):
        differentiable.assert_same(gradients_of(case.ours, inputs), gradients_of(case.reference, inputs))


@each_case
def test_ops(name, device):
    case, inputs = CASES[name], CASES[name].inputs(device)
    expected = gradients_of(case.ours, inputs)
    differentiable.assert_same(
        gradients_of(lambda *a: checkpoint(case.ours, *a, use_reentrant=False), inputs), expected
    )
    # the reentrant kind knows no torch.autograd.grad: .backward(), first order
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    differentiable.loss(checkpoint(case.ours, *leaves, use_reentrant=True)).backward()
    differentiable.assert_same([x.grad for x in leaves], expected[: len(leaves)])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, reentrant, device):
    module, x = MODULES[name].make(device)

    def flat(x):  # the reentrant kind tracks tensors in a flat tuple alone
        return tuple(tensors(module(x)))

    expected = gradients(flat, module, x)
    assert_same(gradients(lambda x: checkpoint(flat, x, use_reentrant=reentrant), module, x), expected)


class LogScan(torch.nn.Module):
    """The op that no module holds."""

    def __init__(self):
        super().__init__()
        self.log_a = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return convrnn.parallel_scan_log(x[:, 1:] + self.log_a, x), x


HOLDERS = {
    "gru_gates": "ConvGRU-walking",
    "gru_rcn": "GRU_RCN",
    "gru_update": "ConvGRU-walking",
    "log_scan": None,
    "mingru": "MinConv2dGRUCell",
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("keep", [True, False], ids=["saved", "recomputed"])
def test_selective_policies_name_our_ops(op, keep, device):
    """A policy decides for torch.ops.convrnn's overloads as for aten's: saved once, or run once more in backward."""
    if HOLDERS[op] is None:
        module, x = LogScan().to(device), torch.randn(2, 4, 3, device=device)
    else:
        module, x = MODULES[HOLDERS[op]].make(device)
    overload, asked = getattr(torch.ops.convrnn, op).default, []

    def policy(ctx, func, *args, **kwargs):
        asked.append(func)
        return CheckpointPolicy.MUST_SAVE if keep and func is overload else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with Runs(overload) as plain:
        expected = gradients(module, module, x)
    with Runs(overload) as counted:
        found = gradients(lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts), module, x)
    assert_same(found, expected)
    assert overload in asked
    assert counted.runs == plain.runs * (1 if keep else 2) > 0


@pytest.mark.slow
def test_checkpoints_inside_compiled_graphs(device):
    torch._dynamo.reset()
    module, x = MODULES["GRU_RCN"].make(device)
    compiled = torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, module, x), gradients(module, module, x))
