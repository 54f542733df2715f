"""Activation checkpointing of modules: whole layers, selective policies that name our ops, under torch.compile."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .modules import MODULES, loss, tensors

pytestmark = pytest.mark.compiled


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


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, reentrant, device):
    module, x = MODULES[name].make(device)

    def flat(x):  # the reentrant kind tracks tensors in a flat tuple alone
        return tuple(tensors(module(x)))

    expected = gradients(flat, module, x)
    assert_same(gradients(lambda x: checkpoint(flat, x, use_reentrant=reentrant), module, x), expected)


@pytest.mark.parametrize("op", ["gru_rcn", "mingru"])
@pytest.mark.parametrize("keep", [True, False], ids=["saved", "recomputed"])
def test_selective_policies_name_our_ops(op, keep, device):
    """A policy decides for torch.ops.convrnn's overloads as for aten's: saved once, or run once more in backward."""
    module, x = MODULES["GRU_RCN" if op == "gru_rcn" else "MinConv2dGRUCell"].make(device)
    overload, asked = getattr(torch.ops.convrnn, op).default, []

    def policy(ctx, func, *args, **kwargs):
        asked.append(func)
        return CheckpointPolicy.MUST_SAVE if keep and func is overload else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    expected = gradients(module, module, x)
    with Runs(overload) as counted:
        found = gradients(lambda x: checkpoint(module, x, use_reentrant=False, context_fn=contexts), module, x)
    assert_same(found, expected)
    assert overload in asked
    assert counted.runs == (1 if keep else 2)


@pytest.mark.slow
def test_checkpoints_inside_compiled_graphs(device):
    torch._dynamo.reset()
    module, x = MODULES["GRU_RCN"].make(device)
    compiled = torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, module, x), gradients(module, module, x))
