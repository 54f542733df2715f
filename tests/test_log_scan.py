"""convrnn.parallel_scan_log and its op against the float64 loop."""

import math

import pytest
import torch

from convrnn import reference
from convrnn.ops import parallel_scan_log

from .compare import DTYPES, check_against_reference
from .conftest import INTERPRETED


def log_scan(log_a, log_b):
    return torch.ops.convrnn.log_scan(log_a, log_b)


def inputs(*shape, device="cpu", dtype=torch.float32):
    batch, steps, *rest = shape
    log_a = torch.randn(batch, steps, *rest, device=device).mul(2).to(dtype)
    return [log_a, torch.randn(batch, steps + 1, *rest, device=device).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 7, 5), (1, 1, 1), (3, 4), (1, 5, 301), (1, 3, 1029), (2, 3, 2, 3, 5)),
        # slow in the interpreter; of the Triton kernels, test_triton_scans has longer ones
        pytest.param((2, 300, 3), marks=pytest.mark.compiled),
    ],
    ids=str,
)
def test_matches_reference(shape, dtype, device):
    check_against_reference(log_scan, reference.log_scan, inputs(*shape, device=device, dtype=dtype))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
        lambda x: torch.stack((x, x), -1)[..., 0],
    ],
    ids=["time_first", "chunk", "every_other"],
)
def test_strides(view, device):
    check_against_reference(log_scan, reference.log_scan, [view(x) for x in inputs(2, 6, 3, 4, device=device)])


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 3, 3), (2, 3, 0)], ids=str)
def test_empty(shape, device):
    log_a, log_b = (x.requires_grad_() for x in inputs(*shape, device=device))
    x = parallel_scan_log(log_a, log_b)
    assert x.shape == log_b.shape
    x.sum().backward()
    assert log_a.grad.shape == log_a.shape and torch.equal(log_b.grad, log_b.exp())


def test_linear_output(device):
    log_a, log_b = inputs(2, 6, 5, device=device)
    x = [log_b[:, 0].exp()]
    for t in range(6):
        x.append(log_a[:, t].exp() * x[-1] + log_b[:, t + 1].exp())
    torch.testing.assert_close(parallel_scan_log(log_a, log_b), torch.stack(x, 1), rtol=1e-5, atol=0)


def test_zeros_are_minus_infinity(device):
    inf = math.inf
    log_a = torch.tensor([[[0.0, -inf, -inf, 0.0]], [[-inf, 1.0, 0.0, 2.0]]], device=device).requires_grad_()
    log_b = torch.tensor([[[1.0, 1.0, 1.0, -inf]] * 2, [[-inf, -inf, 0.0, -inf]] * 2], device=device).requires_grad_()
    log_x = log_scan(log_a, log_b)
    expected = torch.logaddexp(log_a[:, 0] + log_b[:, 0], log_b[:, 1])
    torch.testing.assert_close(log_x[:, 1], expected)
    log_x[:, 1].masked_fill(log_x[:, 1].isinf(), 0).sum().backward()
    assert log_a.grad.isfinite().all() and log_b.grad.isfinite().all()
    # where a x_0 and b are both zero there is no gradient to give; elsewhere the shares sum to one
    total = log_a.grad[:, 0] + log_b.grad[:, 1]
    torch.testing.assert_close(total, (log_x[:, 1] > -inf).to(total.dtype))


def test_values_beyond_the_range_of_floats(device):
    log_a, log_b = inputs(1, 50, 4, device=device)
    for shift in (500.0, -500.0):  # e^500 is no float: the logarithm is
        # and its gradients know log x to half a unit in the last place of 500
        check_against_reference(log_scan, reference.log_scan, [log_a, log_b + shift], tolerance=2e-5)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("z", [0.5, 0.02, 1e-5])
def test_long_sequences_stay_exact(z, device):
    gate = torch.randn(1, 65537, 8, device=device) + math.log(z / (1 - z))
    log_a = torch.nn.functional.logsigmoid(-gate[:, 1:])
    log_b = torch.nn.functional.logsigmoid(gate) + torch.randn_like(gate)
    expected = reference.log_scan(log_a.cpu().double(), log_b.cpu().double())
    error = (log_scan(log_a, log_b).cpu() - expected).abs().max().item()  # of log x: relative in x
    assert error < 1e-5


def test_gradcheck(device):
    pair = [x.double().requires_grad_() for x in inputs(2, 4, 3, device=device)]
    assert torch.autograd.gradcheck(log_scan, pair, fast_mode=INTERPRETED)
    assert torch.autograd.gradcheck(parallel_scan_log, pair, fast_mode=INTERPRETED)


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (TypeError, "log_a", lambda a, b: parallel_scan_log(a.int(), b)),
        (TypeError, "log_b", lambda a, b: parallel_scan_log(a, b.double())),
        (ValueError, "log_a", lambda a, b: parallel_scan_log(a[0, :, 0], b)),
        (ValueError, "log_b", lambda a, b: parallel_scan_log(a, b[:, 1:])),
        (ValueError, "log_b", lambda a, b: parallel_scan_log(a, b.to("meta"))),
    ],
)
def test_bad_input_is_named(error, named, call):
    with pytest.raises(error, match=named):
        call(*inputs(2, 3, 4))
