"""What PyTorch code does with modules and ops around the call: hooks, copies, counting, pruning, refusing."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import convrnn
from convrnn import reference

from .differentiable import CASES, assert_same, gradients_of
from .modules import MODULES
from .samples import forward_samples

# Nothing here asks which kernel computes.
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

OPS = [name for name in CASES if name != "parallel_scan_log"]


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
@pytest.mark.parametrize("name", OPS)
def test_anomaly_mode(name, device):
    case, inputs = CASES[name], CASES[name].inputs(device)
    with torch.autograd.detect_anomaly():
        assert_same(gradients_of(case.ours, inputs), gradients_of(case.reference, inputs))
        outputs = case.ours(*((x * float("nan")).requires_grad_() for x in inputs))
        with pytest.raises(RuntimeError, match=f"'convrnn_{name.split('-')[0]}Backward' returned nan values"):
            outputs[0].sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_deterministic_algorithms(name, device):
    if device == "cuda":
        pytest.skip("a CUDA process must set CUBLAS_WORKSPACE_CONFIG before its first call")
    case, inputs = CASES[name], CASES[name].inputs(device)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills new memory with NaN
    try:
        assert_same(gradients_of(case.ours, inputs), gradients_of(case.reference, inputs))
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", MODULES)
def test_hooks_of_modules_and_tensors(name, device):
    module, x = MODULES[name].make(device, dtype=torch.float64)
    x = x.double().requires_grad_()
    expected = torch.autograd.grad(module(x)[0].square().sum(), [x, *module.parameters()])
    seen = []
    module.register_full_backward_pre_hook(lambda m, grad_output: seen.append("before"))
    module.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append(grad_input[0].shape))
    module.register_forward_hook(lambda m, args, output: seen.append("forward"))
    first = next(module.parameters())
    first.register_hook(lambda g: 2 * g)
    out = module(x)[0]
    out.register_hook(lambda g: 3 * g)
    found = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    assert seen == ["forward", "before", x.shape]
    for parameter, a, b in zip([x, *module.parameters()], found, expected, strict=True):
        torch.testing.assert_close(a, b * (6 if parameter is first else 3))


@pytest.mark.parametrize("name", MODULES)
def test_copies_pickles_and_meta(name, device):
    module, x = MODULES[name].make(device)
    expected = module(x)[0]
    memory = io.BytesIO()
    torch.save(module, memory)
    memory.seek(0)
    loaded = torch.load(memory, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x)[0], expected)
        assert all(a is not b for a, b in zip(other.parameters(), module.parameters(), strict=True))
    empty = MODULES[name].build(device="meta")
    assert empty(x.to("meta"))[0].shape == expected.shape and all(p.is_meta for p in empty.parameters())
    real = empty.to_empty(device=device)
    real.load_state_dict(module.state_dict())
    assert torch.equal(real(x)[0], expected)
    assigned = MODULES[name].build(device="meta")
    assigned.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(assigned(x)[0], expected)


@pytest.mark.parametrize("weight", ["W", "U", "C"])
def test_parametrizations_and_pruning(weight, device):
    module, x = MODULES["GRU_RCN"].make(device)
    expected = module(x)[0]
    rest = [module.W, module.U, module.C, module.bias]

    normed = nn.utils.parametrizations.weight_norm(copy.deepcopy(module), weight)
    torch.testing.assert_close(normed(x)[0], expected)
    normed(x)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in normed.parameters())
    nn.utils.parametrize.remove_parametrizations(normed, weight)
    torch.testing.assert_close(normed(x)[0], expected)

    spectral = nn.utils.parametrizations.spectral_norm(copy.deepcopy(module), weight)
    spectral(x)[0].sum().backward()
    assert all(p.grad is not None for p in spectral.parameters())

    pruned = prune.l1_unstructured(copy.deepcopy(module), weight, amount=0.5)
    index = ["W", "U", "C"].index(weight)
    masked = [w if i != index else w * getattr(pruned, f"{weight}_mask") for i, w in enumerate(rest)]
    torch.testing.assert_close(pruned(x)[0], convrnn.gru_rcn(x, None, *masked)[0])
    pruned(x)[0].sum().backward()
    gradient = getattr(pruned, f"{weight}_orig").grad
    assert not gradient[getattr(pruned, f"{weight}_mask") == 0].any() and gradient.any()


class Halved(nn.Module):
    """A parametrization that can be undone."""

    def forward(self, w):
        return w / 2

    def right_inverse(self, w):
        return 2 * w


def weights_of(module):
    return [(part, name) for part in module.modules() for name, _ in part.named_parameters(recurse=False)]


@pytest.mark.parametrize("name", MODULES)
def test_every_weight_parametrized(name, device):
    module, x = MODULES[name].make(device)
    expected = module(x)[0]
    gradients = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    for part, weight in weights_of(module):
        nn.utils.parametrize.register_parametrization(part, weight, Halved())
    out = module(x)[0]
    assert torch.equal(out, expected)
    with nn.utils.parametrize.cached():  # one computation of a weight for both calls
        assert torch.equal(module(x)[0] + module(x)[0], 2 * expected)
    found = torch.autograd.grad(out.square().sum(), list(module.parameters()))
    assert sorted(g.norm().item() for g in found) == pytest.approx(sorted(g.norm().item() / 2 for g in gradients), 1e-4)


@pytest.mark.parametrize("name", MODULES)
def test_every_weight_pruned(name, device):
    """All at once, by size; masks stay through training steps, and prune.remove writes them into the weights."""
    module, x = MODULES[name].make(device)
    weights = weights_of(module)
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=0.5)
    masks = [getattr(part, f"{weight}_mask") for part, weight in weights]
    assert 0.4 < sum((mask == 0).sum().item() for mask in masks) / sum(mask.numel() for mask in masks) < 0.6
    before = module(x)[0]
    before.square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    out = module(x)[0]
    assert not torch.equal(out, before)
    for (part, weight), mask in zip(weights, masks, strict=True):
        assert not getattr(part, f"{weight}_orig").grad[mask == 0].any()
        prune.remove(part, weight)
        assert not getattr(part, weight)[mask == 0].any()
    assert torch.equal(module(x)[0], out)


@pytest.mark.parametrize("h0", [False, True], ids=["no_h0", "h0"])
def test_flop_counter(h0, device):
    """The convolutions as the loop over frames counts them; a zero state needs none."""
    x, _, W, U, C, bias = CASES["gru_rcn-h0-bias"].inputs(device, torch.float32)
    W, U, C = (w[..., :1, :1].contiguous() for w in (W, U, C))
    state = torch.randn(1, 2, 2, 3, device=device) if h0 else None
    inputs = [x, state, W, U, C, bias]

    def count(f, wanted, **options):
        leaves = [i if i is None else i.detach().requires_grad_(at in wanted) for at, i in enumerate(inputs)]
        with FlopCounterMode(display=False) as forward:
            out = f(*leaves, **options)[0]
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    steps = x.shape[1]
    w, u, c = (2 * x.shape[0] * x[0, 0, 0].numel() * weight.numel() for weight in (W, U, C))
    recurrent = steps if h0 else steps - 1
    forward = steps * w + recurrent * (u + c)
    everything = 2 * forward  # once for the data and once for the weights
    assert count(convrnn.gru_rcn, range(6)) == (forward, everything)
    assert count(convrnn.gru_rcn, range(6), recompute=True) == (forward, everything + forward)
    assert count(convrnn.gru_rcn, [5]) == (forward, (steps - 1) * u + recurrent * c)
    assert count(convrnn.gru_rcn, [4]) == (forward, (steps - 1) * (u + c) + recurrent * c)
    assert count(convrnn.gru_rcn, [0, 3]) == (forward, steps * w + (steps - 1) * u + recurrent * (u + c))
    if h0:
        assert count(reference.gru_rcn, range(6)) == (forward, everything)

    def projected(x, h0, W, U, C, bias):
        projection = torch.nn.functional.conv2d(x.flatten(0, 1), W, bias).unflatten(0, x.shape[:2])
        return convrnn.gru_rcn(projection, h0, None, U, C)

    assert count(projected, range(6)) == (forward, everything)
    module, frames = MODULES["GRU_RCN"].make(device)
    with FlopCounterMode(display=False) as counter:
        module(frames)
    assert list(counter.get_flop_counts()["Global"]) == [torch.ops.convrnn.gru_rcn]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(layout, device):
    rows = [torch.randn(3, 4, device=device), torch.randn(2, 4, device=device)]
    nested = torch.nested.nested_tensor(rows, layout=layout)
    dense = torch.randn(2, 3, 4, device=device)
    with pytest.raises(TypeError, match="gate_hidden must be a dense"):
        convrnn.mingru(nested)
    with pytest.raises(TypeError, match="h0 must be a dense"):
        convrnn.mingru(dense, nested)
    with pytest.raises(TypeError, match="log_a must be a dense"):
        convrnn.parallel_scan_log(nested, dense)
    with pytest.raises(TypeError, match="gate must be a dense"):
        convrnn.mingru_gate_hidden(nested, nested, dense[:, :1])
    with pytest.raises(TypeError, match="x must be a dense"):
        convrnn.gru_rcn(nested, None, dense, dense, dense)
    with pytest.raises(TypeError, match="xp must be a dense"):
        convrnn.ops.gru_gates(nested, dense, dense)
    with pytest.raises(TypeError, match="xc must be a dense"):
        convrnn.ops.gru_update(nested, dense, dense, dense)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_modules_refuse_nested_tensors(name, layout, device):
    """With T of each row its own."""
    module, x = MODULES[name].make(device)
    nested = torch.nested.nested_tensor([x[0], x[1][:-1]], layout=layout)
    given = [nested, nested] if name == "StackedGRU_RCN" else nested
    with pytest.raises(TypeError, match="x must be a dense"):
        (convrnn.StackedGRU_RCN.forward if name == "StackedGRU_RCN" else type(module).forward)(module, given)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_modules_refuse_nested_states(name, device):
    module, x = MODULES[name].make(device)
    state = module(x)[1]
    whole = state if isinstance(state, torch.Tensor) else state[0]
    nested = torch.nested.nested_tensor(list(whole.detach()), layout=torch.jagged)
    with pytest.raises(TypeError, match="must be a dense"):
        module(x, nested if whole is state else [nested, *state[1:]])


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_are_refused(device):
    dense = torch.randn(2, 3, 4, device=device)
    for sparse in (dense.to_sparse(), dense[0].to_sparse_csr()):
        with pytest.raises(TypeError, match="gate_hidden must be a dense"):
            convrnn.mingru(sparse)


class Labelled(torch.Tensor):
    """A subclass without rules of its own."""


class Wrapper(torch.Tensor):
    """A subclass whose data is in a tensor inside, and which knows the operations that ``known`` names alone."""

    @staticmethod
    def __new__(cls, inner, known=()):
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        wrapper.inner, wrapper.known = inner, known
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        known = next(a.known for a in args if isinstance(a, Wrapper))
        if func.namespace == "convrnn" and func not in known:
            return NotImplemented
        given = (a.inner if isinstance(a, Wrapper) else a for a in args)
        result = func(*given, **(kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda y: Wrapper(y, known), result)


def test_plain_subclasses_pass(device):
    """nn.Parameter is one, and so are frameworks' tagged tensors: they work, and stay what they are."""
    x = torch.randn(2, 3, 4, device=device)
    h, _ = convrnn.mingru(x.as_subclass(Labelled))
    assert isinstance(h, Labelled) and torch.equal(h.as_subclass(torch.Tensor), convrnn.mingru(x)[0])
    h, _ = convrnn.mingru(nn.Parameter(x))
    assert type(h) is torch.Tensor


PUBLIC = {
    "mingru": convrnn.mingru,
    "log_scan": convrnn.parallel_scan_log,
    "gru_gates": convrnn.ops.gru_gates,
    "gru_update": convrnn.ops.gru_update,
    "gru_rcn": convrnn.gru_rcn,
}


@pytest.mark.parametrize("op", PUBLIC)
def test_wrapper_subclasses(op, device):
    """One with a rule for the op is what it computes with; one without is refused, by name, whatever argument it is."""
    arguments = forward_samples(op, device)[1][:6]
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    aten = tuple(o.default for o in (torch.ops.aten.exp, torch.ops.aten._to_copy))
    overload = getattr(torch.ops.convrnn, op).default
    expected = PUBLIC[op](*arguments)
    for i in tensors:
        mixed = [Wrapper(a) if i == j else a for j, a in enumerate(arguments)]
        with pytest.raises(TypeError, match=rf"convrnn\.{op}"):
            PUBLIC[op](*mixed)
        mixed[i].known = (overload, *aten)
        found = PUBLIC[op](*mixed)
        for a, b in zip(torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected), strict=True):
            assert isinstance(a, Wrapper) and torch.equal(a.inner, b)


def test_distributed_tensors_are_refused_by_name(device):
    """DTensor knows how to shard the operations that it has a rule for."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    from torch.distributed.tensor import distribute_tensor

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        with pytest.raises(NotImplementedError, match=r"convrnn\.mingru"):
            convrnn.mingru(distribute_tensor(torch.randn(2, 3, 4), mesh))
    finally:
        torch.distributed.destroy_process_group()
