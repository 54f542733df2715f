"""Derivatives in reverse mode, beyond the first ones, and in forward mode; for every op."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck

import convrnn
from convrnn.info import OPS

from .conftest import INTERPRETED
from .differentiable import CASES, loss

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def leaves(case, device, dtype=torch.float64):
    return [x.requires_grad_() for x in case.inputs(device, dtype)]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_no_op_is_left_out():
    assert {name.split("-")[0] for name in CASES} == {*OPS, "parallel_scan_log"}


@pytest.mark.compiled
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, device):
    """Both modes, reverse mode also for a batch of upstream gradients at once (is_grads_batched)."""
    inputs = leaves(CASES[name], device)
    assert gradcheck(CASES[name].ours, inputs, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.compiled
@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name, device):
    """Reverse over reverse, and forward over reverse: the derivatives of the backward op."""
    assert gradgradcheck(CASES[name].ours, leaves(CASES[name], device), check_fwd_over_rev=True)


@pytest.mark.compiled
@pytest.mark.parametrize("name", CASES)
def test_third_derivative(name, device):
    def third(f):
        inputs = leaves(CASES[name], device)
        value = loss(f(*inputs))
        for _ in range(2):
            value = loss(torch.autograd.grad(value, inputs, create_graph=True))
        return torch.autograd.grad(value, inputs)

    for a, b in zip(third(CASES[name].ours), third(CASES[name].reference), strict=True):
        close(a, b, 1e-8 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("name", CASES)
def test_gradient_penalty_in_float32(name, device):
    """The use of a double backward, at the dtype that people train in, against float64."""

    def penalty(f, dtype):
        inputs = leaves(CASES[name], device, dtype)
        (gradient,) = torch.autograd.grad(loss(f(*inputs)), inputs[0], create_graph=True)
        total = loss(f(*inputs)) + (gradient.flatten(1).norm(dim=1) - 1).square().sum()
        return torch.autograd.grad(total, inputs)

    ours, truth = penalty(CASES[name].ours, torch.float32), penalty(CASES[name].reference, torch.float64)
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == torch.float32
        close(a.double(), b, 2e-5 * (1 + b.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tangents_have_the_dtype_of_their_outputs(name, dtype, device):
    inputs, directions = CASES[name].inputs(device, dtype), CASES[name].inputs(device, dtype, 1)
    outputs, tangents = torch.func.jvp(CASES[name].ours, tuple(inputs), tuple(directions))
    _, expected = torch.func.jvp(
        CASES[name].reference, tuple(x.double() for x in inputs), tuple(x.double() for x in directions)
    )
    for y, t, e in zip(outputs, tangents, expected, strict=True):
        assert t.dtype == y.dtype and t.shape == y.shape
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]
        close(t.double(), e, tolerance * (1 + e.abs().max().item()))


@pytest.mark.compiled
@pytest.mark.parametrize("name", CASES)
def test_plain_forward_mode_on_some_inputs(name, device):
    """torch.autograd.forward_ad without torch.func, tangents on one input at a time; the raw ops do it too."""
    case = CASES[name]
    inputs, directions = case.inputs(device), case.inputs(device, seed=1)
    for i in range(len(inputs)):
        tangents = []
        for f in (case.ours, case.reference):
            with forward_ad.dual_level():
                dual = [
                    forward_ad.make_dual(x, t) if i == j else x
                    for j, (x, t) in enumerate(zip(inputs, directions, strict=True))
                ]
                tangents.append([forward_ad.unpack_dual(y).tangent for y in f(*dual)])
        for a, b in zip(*tangents, strict=True):
            if b is not None:  # z of gru_gates does not depend on h: no tangent, or one of zeros
                close(a, b)
            assert b is not None or a is None or not a.any()


@pytest.mark.compiled
@pytest.mark.parametrize("name", CASES)
def test_reverse_over_forward(name, device):
    case = CASES[name]

    def gradient(f):
        inputs, directions = leaves(case, device), [x.requires_grad_() for x in case.inputs(device, seed=1)]
        with forward_ad.dual_level():
            outputs = f(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, directions, strict=True)))
            value = loss([forward_ad.unpack_dual(y).tangent for y in outputs])
            return torch.autograd.grad(value, [*inputs, *directions])

    for a, b in zip(gradient(case.ours), gradient(case.reference), strict=True):
        close(a, b)


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["mingru-h0", "gru_rcn"])
def test_plain_forward_mode_compiled(name, device):
    """One graph, the dual level inside of it."""
    inputs, directions = CASES[name].inputs(device), CASES[name].inputs(device, seed=1)

    def tangent(inputs, directions):
        with forward_ad.dual_level():
            outputs = CASES[name].ours(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, directions, strict=True)))
            return forward_ad.unpack_dual(outputs[0]).tangent

    torch._dynamo.reset()
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    close(compiled(inputs, directions), tangent(inputs, directions))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_coefficients_of_zero_in_second_derivatives(device):
    """-inf in log_a or log_b: finite, and zero where log_scan's gradient is."""
    log_a, log_b = (x.requires_grad_() for x in CASES["log_scan"].inputs(device))
    with torch.no_grad():
        log_a[0, 1, 0] = log_b[0, 0, 0] = log_b[0, 1, 0] = log_b[1, 2, 1] = log_a[1, 0, 0] = -torch.inf
    finite = [log_a.isfinite(), log_b.isfinite()]

    def second(f):
        x = f(log_a, log_b).exp()
        gradients = torch.autograd.grad(loss((x,)), (log_a, log_b), create_graph=True)
        return torch.autograd.grad(
            sum(g[keep].square().sum() for g, keep in zip(gradients, finite, strict=True)), (log_a, log_b)
        )

    for a, keep in zip(second(torch.ops.convrnn.log_scan), finite, strict=True):
        assert a.isfinite().all() and not a[~keep].any()
    # the same without logarithms, for a truth that has no -inf in it
    a, b = (x.detach().exp().requires_grad_() for x in (log_a, log_b))
    x = [b[:, 0]]
    for t in range(a.shape[1]):
        x.append(a[:, t] * x[-1] + b[:, t + 1])
    gradients = torch.autograd.grad(loss((torch.stack(x, 1),)), (a, b), create_graph=True)
    expected = torch.autograd.grad(
        sum((g * y)[keep].square().sum() for g, y, keep in zip(gradients, (a, b), finite, strict=True)), (a, b)
    )
    for got, e, y in zip(second(torch.ops.convrnn.log_scan), expected, (a, b), strict=True):
        close(got, (e * y).detach())


def test_long_second_derivatives_keep_their_precision(device):
    """The tangent of log_scan sums over all of T and takes the sum away again."""
    steps = 64 if INTERPRETED else 4096
    log_a, log_b = (torch.randn(1, steps + i, 2, device=device) for i in (0, 1))
    da, db = torch.randn_like(log_a) + 1, torch.randn_like(log_b)
    _, tangent = torch.func.jvp(torch.ops.convrnn.log_scan, (log_a, log_b), (da, db))
    x = convrnn.reference.log_scan(log_a.double(), log_b.double())
    p = (log_a.double() + x[:, :-1] - x[:, 1:]).exp()
    expected = [db[:, 0].double()]
    for t in range(steps):
        expected.append(p[:, t] * (expected[-1] + da[:, t].double()) + (1 - p[:, t]) * db[:, t + 1].double())
    error = (tangent.double() - torch.stack(expected, 1)).abs().max() / tangent.abs().max()
    assert error < 2e-5


@pytest.mark.parametrize("shape", [(2, 0, 6), (0, 3, 6), (2, 3, 0), (2, 3, 6, 0)], ids=str)
def test_empty(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    h0 = torch.randn(shape[0], shape[2] // 2, *shape[3:], device=device, requires_grad=True)
    gradients = torch.autograd.grad(loss(convrnn.mingru(x, h0)), (x, h0), create_graph=True)
    second = torch.autograd.grad(loss(gradients), (x, h0), allow_unused=True)
    assert second[1].shape == h0.shape
    tangents = torch.func.jvp(convrnn.mingru, (x, h0), (x, h0))[1]
    assert tangents[0].numel() == 0 and tangents[1].shape == h0.shape
    if shape[1] == 0:
        assert torch.equal(tangents[1], h0)


@pytest.mark.compiled
@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="PyTorch: no double backward through a compiled graph")
def test_double_backward_of_a_compiled_graph_is_pytorchs_limit(device):
    x = torch.randn(3, device=device, requires_grad=True)
    y = torch.compile(torch.sin, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    gradient.sum().backward()


class Detaching(torch.autograd.Function):
    """A tangent that is no function of its direction."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.detach()


@pytest.mark.compiled
@pytest.mark.xfail(strict=True, raises=RuntimeError, reason="PyTorch: its older vmap has no rule for detach")
def test_vectorised_forward_mode_of_autograd_functional_is_pytorchs_limit(device):
    """torch.func.jacfwd, of another vmap, is what test_functorch.py tests."""
    x = torch.randn(3, device=device)
    torch.autograd.functional.jacobian(Detaching.apply, x, vectorize=True, strategy="forward-mode")
