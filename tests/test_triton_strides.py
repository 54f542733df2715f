"""Tensors whose elements lie more than 2^31 elements apart, executed: every offset takes 64 bits.

An offset that wrapped would leave the tensor, which the guard reports, as the first test shows.
"""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = triton.language

from convrnn.kernels import chunks, gru_gates, gru_rcn, log_scan, mingru

from .harness.inputs import randn, spread_out
from .harness.ptx import Fault
from .harness.ptx.driver import executed

pytestmark = pytest.mark.executed

FAR = 2**31 + 64
DTYPE = torch.bfloat16


def scan(channels: int, steps: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A tensor (2, steps, channels), and its values at strides of more than 2^31."""
    x = randn(2, steps, channels, dtype=DTYPE, seed=seed)
    return x, spread_out(x, FAR, 2 * FAR)


def frame(seed: int, channels: int = 7) -> tuple[Tensor, Tensor]:
    """A tensor (3, channels, 5), and its values with samples 2^31 elements apart."""
    x = randn(3, channels, 5, dtype=DTYPE, seed=seed)
    return x, spread_out(x, FAR)


@triton.jit
def copy_kernel(x, y, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    else:
        stride = stride.to(tl.int32)  # as Triton passes what fits
    i = tl.arange(0, BLOCK)
    tl.store(y + program * BLOCK + i, tl.load(x + program * stride + i))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_guard_finds_an_offset_that_wraps() -> None:
    x = randn(5, 8, dtype=DTYPE, seed=1)
    near, far = torch.empty_like(x), spread_out(x, 2**29 + 64)
    with executed():
        copy_kernel[(5,)](far, near, far.stride(0), True, 8)
    assert torch.equal(near, x)
    with (
        executed(),
        pytest.raises(
            Fault, match="copy_kernel, program 4, .* outside of the tensors of the launch: .* of x, which has"
        ),
    ):
        copy_kernel[(5,)](far, near, far.stride(0), False, 8)


def assert_same(near: tuple[Tensor, ...], far: tuple[Tensor, ...]) -> None:
    for x, y in zip(near, far, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.fixture(params=(3, 2))
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps of a chunk: all of T, and fewer."""
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: request.param)
    return request.param


def test_mingru(chunk: int) -> None:
    near, far = zip(scan(10), frame(2, 1), frame(3, 1), scan(5, seed=4), scan(5, seed=5), strict=True)
    results = []
    for gate_hidden, h0, dh_n, h, dh in (near, far):
        h0, dh_n = h0[:2, 0], dh_n[:2, 0]
        with executed():
            results.append((*mingru.mingru_fwd(gate_hidden, h0), *mingru.mingru_bwd(dh, dh_n, gate_hidden, h0, h)))
    assert_same(*results)


def test_log_scan(chunk: int) -> None:
    near, far = zip(scan(7), scan(7, 4, seed=2), scan(7, 4, seed=3), scan(7, 4, seed=4), strict=True)
    results = []
    for log_a, log_b, log_x, dlog_x in (near, far):
        with executed():
            results.append((log_scan.log_scan_fwd(log_a, log_b), *log_scan.log_scan_bwd(dlog_x, log_a, log_b, log_x)))
    assert_same(*results)


def test_gru_step() -> None:
    near, far = zip(frame(1, 14), frame(2, 14), *(frame(seed) for seed in range(3, 9)), strict=True)
    results = []
    for xp, hp, xc, hc, h, z, c, rounded in (near, far):
        with executed():
            gates = gru_gates.gru_gates_fwd(xp, hp, h, (xp[:, :7], xp[:, 7:], rounded))
            update = gru_gates.gru_update_fwd(xc, hc, z, h, (c, h, rounded))
            gates_bwd = gru_gates.gru_gates_bwd(xc, hc, c, z, z, h)
            results.append((*gates, *update, rounded, *gates_bwd, *gru_gates.gru_update_bwd(c, xc, z, hc, h)))
    assert_same(*results)


def test_gru_rcn_backward() -> None:
    near, far = zip(*(frame(seed) for seed in range(1, 11)), strict=True)
    for dh, *others in (near, far):
        with executed():
            gru_gates.launch_step(gru_rcn.gru_rcn_bwd_candidate_kernel, dh, dh, *others, codes=(None,))
            gru_gates.launch_step(gru_rcn.gru_rcn_bwd_reset_kernel, dh, dh, *others[:5], codes=(None,))
    assert_same(near, far)
