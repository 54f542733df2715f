"""Long sequences of few lanes, which the CPU's scans cut in chunks of T, and what they must share with all others.

A chunk is 1,024 steps; T is cut where the batch holds fewer than four blocks of 1,024 lanes (kernels/cpu/carry.h).
"""

import math

import pytest
import torch

from convrnn import reference
from convrnn.ops import mingru

from .compare import DTYPES, check_against_reference

pytestmark = pytest.mark.compiled

CHUNK = 1024
LONG = 3 * CHUNK + 5
LENGTHS = [CHUNK - 1, CHUNK, CHUNK + 1, LONG]
SIZES_OF_Z = pytest.mark.parametrize("bias", [0.0, -11.5, 9.0], ids=["z_0.5", "z_1e-5", "z_0.9999"])


def log_scan(log_a, log_b):
    return torch.ops.convrnn.log_scan(log_a, log_b)


def gate_hidden(batch, steps, channels, *size, bias=0.0, dtype=torch.float32):
    x = torch.randn(batch, steps, 2 * channels, *size)
    x[:, :, :channels] += bias
    return x.to(dtype)


def logs(batch, steps, lanes, bias=0.0, dtype=torch.float32):
    """log a = log(1 - z) and log b around log z, as minGRU has them."""
    gate = torch.randn(batch, steps + 1, lanes) + bias
    log_b = torch.nn.functional.logsigmoid(gate) + torch.randn_like(gate)
    return torch.nn.functional.logsigmoid(-gate[:, 1:]).to(dtype), log_b.to(dtype)


@pytest.mark.parametrize("steps", LENGTHS)
def test_lengths_around_a_chunk(steps):
    check_against_reference(mingru, reference.mingru, [gate_hidden(1, steps, 5), torch.randn(1, 5)])
    check_against_reference(log_scan, reference.log_scan, logs(1, steps, 5))


@SIZES_OF_Z
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_and_dtypes(dtype, bias):
    tolerance = 1e-11 if dtype == torch.float64 else None  # the reference's own errors, which it does not carry along
    x = gate_hidden(2, LONG, 3, bias=bias, dtype=dtype)
    check_against_reference(mingru, reference.mingru, [x, torch.randn(2, 3).mul(3).to(dtype)], tolerance)
    check_against_reference(log_scan, reference.log_scan, logs(2, LONG, 3, bias, dtype), tolerance)


@pytest.mark.parametrize("layout", ["channels_last", "time_first", "chunk"])
def test_layouts(layout):
    x = gate_hidden(1, LONG, 3, 2)
    if layout == "channels_last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif layout == "time_first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        x = torch.cat((x, x), 2)[:, :, : x.shape[2]]
    check_against_reference(mingru, reference.mingru, [x, torch.randn(1, 3, 2)])


@SIZES_OF_Z
def test_cut_and_whole_agree(bias):
    x, (log_a, log_b) = gate_hidden(1, LONG, 7, bias=bias), logs(1, LONG, 7, bias)
    for op, inputs in ((lambda x: mingru(x)[0], [x]), (log_scan, [log_a, log_b])):
        results = []
        for batch in (1, 8):  # eight rows are enough to keep T whole
            leaves = [y.expand(batch, *y.shape[1:]).clone().requires_grad_() for y in inputs]
            out = op(*leaves)
            up = torch.randn(out[:1].shape, generator=torch.Generator().manual_seed(7)).expand_as(out)
            results.append([y[0] for y in (out, *torch.autograd.grad(out, leaves, up))])
        for cut, whole in zip(*results, strict=True):
            assert ((cut - whole).abs() / whole.abs().clamp_min(whole.abs().mean())).max() < 5e-6


@pytest.mark.parametrize("bias", [0.0, -11.5], ids=["z_0.5", "z_1e-5"])
def test_a_gradient_from_the_end_alone_reaches_every_chunk(bias):
    def last(x, h0):
        return mingru(x, h0)[1]

    def expected(x, h0):
        return reference.mingru(x, h0)[1]

    check_against_reference(last, expected, [gate_hidden(1, LONG, 4, bias=bias), torch.randn(1, 4)])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_what_is_not_finite_passes_through_chunks(bad):
    x = gate_hidden(1, LONG, 4)
    finite = mingru(x)[0]
    h0 = torch.full((1, 4), 0.5)
    h0[0, 1] = bad
    h = mingru(x, h0)[0]
    assert not h[..., 1].isfinite().any() and torch.equal(h[..., 2:], finite[..., 2:])
    x[0, CHUNK + 3, 4 + 2] = abs(bad)  # a candidate in the second chunk
    h = mingru(x)[0]
    assert torch.equal(h[:, : CHUNK + 3], finite[:, : CHUNK + 3]) and torch.equal(h[..., :2], finite[..., :2])
    assert not h[:, CHUNK + 3 :, 2].isfinite().any()

    x, (log_a, log_b) = gate_hidden(1, LONG, 4), logs(1, LONG, 4)
    for op, inputs in ((lambda x: mingru(x)[0], [x]), (log_scan, [log_a, log_b])):
        leaves = [y.requires_grad_() for y in inputs]
        out = op(*leaves)
        up = torch.zeros_like(out)
        up[0, 2 * CHUNK + 9, 1] = bad
        for gradient in torch.autograd.grad(out, leaves, up):
            assert not gradient[0, : 2 * CHUNK + 9, 1].isfinite().any()
            assert gradient[0, :, 0].isfinite().all() and gradient[0, 2 * CHUNK + 10 :, 1].isfinite().all()


def test_zeros_of_the_log_scan_pass_through_chunks():
    log_a, log_b = logs(1, LONG, 4)
    log_a[0, CHUNK - 1, 0] = log_a[0, 2 * CHUNK + 7, 0] = -math.inf  # forgets at and behind a boundary
    log_a[0, ::3, 1] = -math.inf
    log_b[0, : 2 * CHUNK + 9, 2] = -math.inf  # nothing for two chunks
    log_b[0, 1:, 3] = -math.inf  # decays for all time: log x falls to -10^3 and below
    expected = reference.log_scan(log_a.double(), log_b.double())
    log_x = log_scan(log_a, log_b)
    assert torch.equal(log_x.isinf(), expected.isinf())
    torch.testing.assert_close(log_x.double(), expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(
        log_scan(log_a.requires_grad_(), log_b.requires_grad_()).exp().sum(), [log_a, log_b]
    )
    assert all(g.isfinite().all() for g in gradients)


@SIZES_OF_Z
@pytest.mark.parametrize("batch", [1, 6], ids=["cut", "whole"])
def test_threads_do_not_change_a_bit(batch, bias):
    x, (log_a, log_b) = gate_hidden(batch, LONG, 40, bias=bias), logs(batch, LONG, 40, bias)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found = []
            for op, inputs in ((lambda x: mingru(x)[0], [x]), (log_scan, [log_a, log_b])):
                leaves = [y.detach().requires_grad_() for y in inputs]
                out = op(*leaves)
                found += [out, *torch.autograd.grad(out, leaves, out.detach().sin())]
            results.append(found)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, LONG, 6), (5, 300, 30), (1, 20, 1100)], ids=["cut", "long", "short"])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)], ids=["bf16", "fp16"])
def test_16_bit_states_are_right_to_two_units(dtype, bits, shape):
    x = gate_hidden(*shape, dtype=dtype).mul(3)
    expected = reference.mingru(x.double())[0]
    unit = torch.exp2(expected.abs().clamp_min(2.0**-14).log2().floor() + 1 - bits)
    assert ((mingru(x)[0].double() - expected).abs() / unit).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("bias", [0.0, -3.9, -11.5], ids=["z_0.5", "z_0.02", "z_1e-5"])
def test_gradients_of_long_sequences_stay_exact(bias):
    """T in one piece for four rows, and cut for one of them."""
    rows = gate_hidden(4, 65536, 4, bias=bias)
    truth, up = rows.double().requires_grad_(), torch.randn(4, 65536, 4)
    (expected,) = torch.autograd.grad(reference.mingru(truth)[0], truth, up.double())
    for batch in (4, 1):
        x = rows[:batch].clone().requires_grad_()
        (got,) = torch.autograd.grad(mingru(x)[0], x, up[:batch])
        assert ((got - expected[:batch]).abs().max() / expected[:batch].abs().max()) < 1e-5
