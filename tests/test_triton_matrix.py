"""What the other tests of the launchers vary one by one, together: dtype, layout, steps around those loaded ahead, h0."""

import pytest
import torch
from torch import Tensor

from convrnn import reference

triton = pytest.importorskip("triton")

from convrnn.kernels import gru_gates, gru_rcn, mingru

from .harness.guarded import guarded
from .harness.inputs import arrange, assert_close, assert_grads, double, randn
from .test_triton_gru import SEQUENCE, STEP, STEP_GRAD, sequence
from .test_triton_scans import check_mingru

pytestmark = [pytest.mark.interpreted, pytest.mark.slow]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "chunk", "channels_last", "time_first")
AHEAD = (mingru.FORWARD_STEPS, mingru.BACKWARD_STEPS)
# Backward walks over T - 1 steps and ends with the first.
STEPS = sorted({1, 2, *(u + d for u in AHEAD for d in (-1, 0, 1, 2) if u + d > 0)})


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)  # float32: test_mingru_layouts
def test_mingru(dtype: torch.dtype, layout: str, steps: int, with_h0: bool) -> None:
    gate_hidden = arrange(randn(2, steps, 14, 3, 3, dtype=dtype, seed=1), layout)
    check_mingru(gate_hidden, randn(2, 7, 3, 3, dtype=torch.float32, seed=2) if with_h0 else None, seed=steps)


@pytest.mark.parametrize("layout", ("channels_last", "time_first"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gru_step(dtype: torch.dtype, layout: str) -> None:
    """The frames of one step of a sequence, which is (B, T, C, *S) in every layout."""

    def frames(channels: int, seed: int) -> Tensor:
        return arrange(randn(3, 2, channels, 3, 5, dtype=dtype, seed=seed), layout)[:, 1]

    xp, hp, xc, hc, h = frames(14, 1), frames(14, 2), frames(7, 3), frames(7, 4), frames(7, 5)
    inputs = double(xp, hp, h)
    with guarded():
        z, r, rh = gru_gates.gru_gates_fwd(xp, hp, h)
        upstream = tuple(frames(7, seed) for seed in (6, 7, 8))
        da, dh = gru_gates.gru_gates_bwd(*upstream, z, r, h)
    expected = reference.gru_gates(*inputs)
    for actual, truth in zip((z, r, rh), expected, strict=True):
        assert_close(actual, truth, STEP, dtype)
    assert_grads((da, da, dh), expected, upstream, inputs, STEP_GRAD, dtype)

    inputs = double(xc, hc, z, h)
    with guarded():
        c, h_next = gru_gates.gru_update_fwd(xc, hc, z, h)
        upstream = (frames(7, 9), frames(7, 10))
        da, dz, dh = gru_gates.gru_update_bwd(*upstream, z, c, h)
    expected = reference.gru_update(*inputs)
    for actual, truth in zip((c, h_next), expected, strict=True):
        assert_close(actual, truth, STEP, dtype)
    assert_grads((da, da, dz, dh), expected, upstream, inputs, STEP_GRAD, dtype)


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("steps", (1, 2, 3))
@pytest.mark.parametrize("layout", LAYOUTS[1:])  # contiguous: test_triton_gru
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gru_rcn(dtype: torch.dtype, layout: str, steps: int, with_h0: bool) -> None:
    """Every tensor that enters, upstream gradients too, in another layout."""
    x, h0, W, U, C, bias = sequence(dtype, steps, (4, 3), with_h0)
    x = arrange(x, layout)
    h0 = None if h0 is None else arrange(h0[:, None], layout)[:, 0]
    with guarded(steps):
        out, h_n, gates = gru_rcn.gru_rcn_fwd(x, h0, W, U, C, bias)
        dout = arrange(randn(*out.shape, dtype=dtype, seed=7), layout)
        dh_n = arrange(randn(h_n.shape[0], 1, *h_n.shape[1:], dtype=dtype, seed=8), layout)[:, 0]
        actual = gru_rcn.gru_rcn_bwd(dout, dh_n, x, h0, W, U, C, out, gates, [True] * 6)
    inputs = double(x, h0, W, U, C, bias)
    expected = reference.gru_rcn(*inputs)
    assert_close(out, expected[0], SEQUENCE, dtype)
    assert_close(h_n, expected[1], SEQUENCE, dtype)
    assert_grads(actual, expected, (dout, dh_n), inputs, SEQUENCE, dtype)
    assert all(tensor.is_contiguous() for tensor in (out, h_n, gates, *actual))
