"""Gradients that nobody wants: which ops run, and what gru_rcn computes, for any of the inputs alone."""

import pytest
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import convrnn
from convrnn.info import OPS

from .differentiable import CASES, loss
from .modules import MODULES, tensors
from .modules import loss as loss_of_module
from .samples import backward_samples

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Calls(TorchDispatchMode):
    """Counts the calls of convrnn's ops, with their last list of flags."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "convrnn":
            self.made.append((func.overloadpacket.__name__, next((list(a) for a in args if isinstance(a, list)), None)))
        return func(*args, **(kwargs or {}))


class Every(TorchDispatchMode):
    """Counts all operations."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", [[0], [1], [2, 3], [5], [0, 4]], ids=str)
def test_only_gradients_that_are_wanted(wanted, device):
    inputs = CASES["gru_rcn-h0-bias"].inputs(device)
    for i in wanted:
        inputs[i].requires_grad_()
    with Calls() as calls:
        out, h_n = convrnn.gru_rcn(*inputs)
        (out.sum() + h_n.sum()).backward()
    assert calls.made == [("gru_rcn", None), ("gru_rcn_backward", [i in wanted for i in range(6)])]
    assert [x.grad is not None for x in inputs] == [i in wanted for i in range(6)]


@pytest.mark.parametrize("name", CASES)
def test_first_order_calls_two_ops_and_no_gradient_none(name, device):
    """A backward is one op, whatever the second derivatives need, and frozen inputs call none.

    Which of its gradients are wanted changes nothing: they come out of one pass, but for those of gru_rcn above.
    """
    case = CASES[name]
    inputs = case.inputs(device)
    with Calls() as calls:
        case.ours(*inputs)
    assert len(calls.made) == 1
    together = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(loss(case.ours(*together)), together)
    for wanted in range(len(inputs)):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
        with Calls() as calls:
            loss(case.ours(*leaves)).backward()
        assert len(calls.made) == 2
        assert [x.grad is not None for x in leaves] == [i == wanted for i in range(len(inputs))]
        close(leaves[wanted].grad, expected[wanted])


@pytest.mark.compiled
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_compute_what_is_wanted(op, device):
    """A backward op differentiated for one of its inputs takes no operations of the others."""
    backward, arguments = getattr(torch.ops.convrnn, f"{op}_backward"), backward_samples(op, device)[0]

    def operations(wanted):
        given = [a.detach().requires_grad_(i in wanted) if is_tensor(a) else a for i, a in enumerate(arguments)]
        outputs = [y for y in backward(*given) if y.numel()]
        with Every() as every:
            torch.autograd.grad(
                outputs, [given[i] for i in wanted], [torch.ones_like(y) for y in outputs], allow_unused=True
            )
        return every.made

    variables = [i for i, a in enumerate(arguments) if is_tensor(a)]
    alone = [operations([i]) for i in variables]
    assert max(alone) <= operations(variables) and min(alone) < operations(variables)


@pytest.mark.compiled
@pytest.mark.parametrize("name", CASES)
def test_double_backward_for_some_inputs(name, device):
    """The gradient of one input, differentiated for another."""
    case = CASES[name]
    count = len(case.shapes)
    for first, second in {(0, count - 1), (count - 1, 0), (0, 0)}:
        found = []
        for f in (case.ours, case.reference):
            inputs = case.inputs(device)
            inputs[first].requires_grad_()
            inputs[second].requires_grad_()
            (gradient,) = torch.autograd.grad(loss(f(*inputs)), inputs[first], create_graph=True)
            found.append(torch.autograd.grad(loss((gradient,)), inputs[second])[0])
        close(*found)


class Kept(TorchDispatchMode):
    """The number of elements of each gradient that gru_rcn_backward returns."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.convrnn.gru_rcn_backward.default:
            self.sizes = [y.numel() for y in result]
        return result


@pytest.mark.parametrize("wanted", range(6))
def test_gradients_that_are_not_wanted_have_no_memory(wanted, device):
    inputs = [x.requires_grad_(i == wanted) for i, x in enumerate(CASES["gru_rcn-h0-bias"].inputs(device))]
    with Kept() as kept:
        loss(convrnn.gru_rcn(*inputs)).backward()
    assert kept.sizes == [x.numel() if i == wanted else 0 for i, x in enumerate(inputs)]


class Convolutions(TorchDispatchMode):
    """What a launcher asks of PyTorch's convolutions: the number of data gradients by weight, and each call's mask."""

    def __init__(self):
        super().__init__()
        self.through, self.masks = {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            shape = tuple(args[1].shape)
            self.through[shape] = self.through.get(shape, 0) + 1
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.interpreted
@pytest.mark.parametrize("with_h0", [True, False], ids=["h0", "no_h0"])
@pytest.mark.parametrize("wanted", range(6))
def test_convolutions_on_the_gpus_path(wanted, with_h0, device):
    """Through U and C for the steps whose gradient goes somewhere, and of each weight that is asked for, once."""
    from convrnn.kernels.gru_rcn import gru_rcn_bwd, gru_rcn_fwd

    steps = 3
    x, h0, W, U, C = (
        torch.randn(s) for s in ((2, steps, 2, 4, 5), (2, 3, 4, 5), (9, 2, 3, 3), (6, 3, 3, 3), (3, 3, 3, 3))
    )
    h0 = h0 if with_h0 else None
    out, _, gates = gru_rcn_fwd(x, h0, W, U, C, None)
    with Convolutions() as seen:
        found = gru_rcn_bwd(torch.ones_like(out), None, x, h0, W, U, C, out, gates, [i == wanted for i in range(6)])
    assert [y.numel() > 0 for y in found] == [i == wanted and (i != 1 or with_h0) for i in range(6)]
    first = int(with_h0 and wanted != 4)  # a gradient of C needs none of the first step's r
    through = {tuple(C.shape): steps - 1 + first, tuple(U.shape): steps - 1 + int(with_h0 and wanted == 1)}
    assert seen.through == through
    masks = {0: [[True, False, False]], 1: [], 2: [[False, True, False]], 5: [[False, False, True]]}
    assert seen.masks == masks.get(wanted, [[False, True, False]])


@pytest.mark.compiled
@pytest.mark.parametrize("name", MODULES)
def test_frozen_parameters(name, device):
    """Each parameter trained alone, as in fine-tuning: its gradient is the same, and the frozen ones have none."""
    module, x = MODULES[name].make(device, dtype=torch.float64)
    x = x.double()
    parameters = list(module.parameters())
    expected = torch.autograd.grad(loss_of_module(module(x)), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        module.requires_grad_(False)
        parameter.requires_grad_()
        loss_of_module(module(x)).backward()
        close(parameter.grad, gradient)
        assert [p.grad is None for p in parameters] == [p is not parameter for p in parameters]
        parameter.grad = None
    module.requires_grad_(False)
    assert not any(y.requires_grad for y in tensors(module(x)))


@pytest.mark.parametrize("name", CASES)
def test_no_backward_where_nothing_is_wanted(name, device):
    inputs = CASES[name].inputs(device)
    with Calls() as calls:
        assert not any(y.requires_grad for y in CASES[name].ours(*inputs))
        inputs[-1].requires_grad_()
        with torch.no_grad():
            assert not any(y.requires_grad for y in CASES[name].ours(*inputs))
        [y.detach() for y in CASES[name].ours(*inputs)]
    assert len(calls.made) == 3 and not any("backward" in op for op, _ in calls.made)
