"""The launchers of the GRU step and of GRU-RCN as machine code, executed, against convrnn.reference."""

import pytest
import torch
from torch import Tensor

from convrnn import reference

triton = pytest.importorskip("triton")

from bench.kernels import Eager
from convrnn.kernels import gru_gates, gru_rcn

from .harness.inputs import DTYPES, arrange, assert_close, assert_grads, double, randn
from .harness.live import Live
from .harness.ptx.driver import executed

pytestmark = pytest.mark.executed

# Allowed error in units of the dtype's epsilon. A whole sequence also rounds what its convolutions see.
STEP, STEP_GRAD, SEQUENCE = 4, 16, 64


@pytest.mark.parametrize("state", ("same", "float32"))
@pytest.mark.parametrize("layout", ("contiguous", "chunk", "odd", "channels_last", "time_first"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gru_step(dtype: torch.dtype, layout: str, state: str) -> None:
    """Frames of one step of a sequence: dense where time comes first in memory, else the batch has a stride of its own."""

    def frames(channels: int, seed: int, dtype: torch.dtype = dtype) -> Tensor:
        return arrange(randn(3, 2, channels, 3, 5, dtype=dtype, seed=seed), layout)[:, 1]

    xp, hp, xc, hc = frames(14, 1), frames(14, 2), frames(7, 3), frames(7, 4)
    h = frames(7, 5, dtype if state == "same" or dtype == torch.float64 else torch.float32)
    inputs = double(xp, hp, h)
    with executed():
        z, r, rh = gru_gates.gru_gates_fwd(xp, hp, h)
        c, h_next = gru_gates.gru_update_fwd(xc, hc, z, h)
        dz, dr, drh = (frames(7, seed) for seed in (6, 7, 8))
        da, dh = gru_gates.gru_gates_bwd(dz, dr, drh, z, r, h)
    expected = reference.gru_gates(*inputs)
    for actual, truth in zip((z, r, rh), expected, strict=True):
        assert_close(actual, truth, STEP, dtype)
    assert_grads((da, da, dh), expected, (dz, dr, drh), inputs, STEP_GRAD, dtype)

    inputs = double(xc, hc, z, h)
    expected = reference.gru_update(*inputs)
    with executed():
        dc, dh_next = frames(7, 9), frames(7, 10, h.dtype)
        da, dz, dh = gru_gates.gru_update_bwd(dc, dh_next, z, c, h)
    for actual, truth in zip((c, h_next), expected, strict=True):
        assert_close(actual, truth, STEP, dtype)
    assert_grads((da, da, dz, dh), expected, (dc, dh_next), inputs, STEP_GRAD, dtype)
    assert dh.dtype == h_next.dtype == h.dtype


def test_gru_step_in_place() -> None:
    gates, hp, hc = (randn(2, c, 5, dtype=torch.bfloat16, seed=c) for c in (9, 6, 3))
    h = randn(2, 3, 5, dtype=torch.float32, seed=4)
    state, rounded, rh = h.clone(), torch.empty_like(hc), torch.empty_like(hc)
    with executed():
        z, r, expected_rh = gru_gates.gru_gates_fwd(gates[:, :6], hp, h)
        c, h_next = gru_gates.gru_update_fwd(gates[:, 6:], hc, z, h)
        gru_gates.gru_gates_fwd(gates[:, :6], hp, state, (gates[:, :3], gates[:, 3:6], rh))
        gru_gates.gru_update_fwd(gates[:, 6:], hc, gates[:, :3], state, (gates[:, 6:], state, rounded))
    assert torch.equal(gates, torch.cat((z, r, c), dim=1)) and torch.equal(rh, expected_rh)
    assert torch.equal(state, h_next) and torch.equal(rounded, h_next.bfloat16())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_tanh_keeps_relative_accuracy(dtype: torch.dtype) -> None:
    x = torch.cat((10.0 ** torch.linspace(-12, 2, 300), torch.linspace(0.4, 0.6, 101))).to(dtype)
    x = torch.cat((x, -x))[None]
    zero = torch.zeros_like(x)
    with executed():
        c, _ = gru_gates.gru_update_fwd(x, zero, zero, zero)
    torch.testing.assert_close(c.double(), x.double().tanh(), rtol=4 * torch.finfo(dtype).eps, atol=0)


def sequence(dtype: torch.dtype, steps: int, space: tuple[int, ...], with_h0: bool) -> list[Tensor | None]:
    """x, h0, W, U, C, bias of a small GRU-RCN."""
    kernel = (3, 1, 3)[: len(space)]
    shapes = [(2, steps, 3, *space), (2, 5, *space), (15, 3, *kernel), (10, 5, *kernel), (5, 5, *kernel), (15,)]
    inputs = [randn(*shape, dtype=dtype, seed=seed, scale=0.5) for seed, shape in enumerate(shapes)]
    inputs[1] = inputs[1] if with_h0 else None
    return inputs


def check_gru_rcn(inputs: list[Tensor | None], layout: str = "contiguous", seed: int = 0) -> None:
    """Of everything that enters, the sequences and states have the layout, upstream gradients too."""

    def state(x: Tensor) -> Tensor:
        return arrange(x[:, None], layout)[:, 0]

    x, h0, W, U, C, bias = inputs
    dtype, x, h0 = x.dtype, arrange(x, layout), None if h0 is None else state(h0)
    with executed(seed):
        out, h_n, gates = gru_rcn.gru_rcn_fwd(x, h0, W, U, C, bias)
        dout = arrange(randn(*out.shape, dtype=dtype, seed=7), layout)
        dh_n = state(randn(*h_n.shape, dtype=dtype, seed=8))
        actual = gru_rcn.gru_rcn_bwd(dout, dh_n, x, h0, W, U, C, out, gates, [True] * 6)
    wide = double(x, h0, W, U, C, bias)
    expected = reference.gru_rcn(*wide)
    assert_close(out, expected[0], SEQUENCE, dtype)
    assert_close(h_n, expected[1], SEQUENCE, dtype)
    assert_grads(actual, expected, (dout, dh_n), wide, SEQUENCE, dtype)
    assert all(x.is_contiguous() for x in (out, h_n, gates, *actual))


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("space, steps", (((4, 3), 3), ((4, 3), 1), ((6,), 2), ((3, 2, 2), 2)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gru_rcn(dtype: torch.dtype, space: tuple[int, ...], steps: int, with_h0: bool) -> None:
    check_gru_rcn(sequence(dtype, steps, space, with_h0))


@pytest.mark.slow
@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("steps", (1, 2, 3))
@pytest.mark.parametrize("layout", ("chunk", "channels_last", "time_first"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gru_rcn_layouts(dtype: torch.dtype, layout: str, steps: int, with_h0: bool) -> None:
    check_gru_rcn(sequence(dtype, steps, (4, 3), with_h0), layout, seed=steps)


@pytest.mark.parametrize("layout", ("contiguous", "chunk", "channels_last", "time_first"))
def test_gru_rcn_of_a_projection(layout: str) -> None:
    x, h0, _, U, C, _ = sequence(torch.float32, 3, (4, 3), True)
    check_gru_rcn([torch.cat(5 * (x,), 2), h0, None, U, C, None], layout)


def test_gru_rcn_keeps_a_float32_state() -> None:
    x, h0, W, U, C, _ = sequence(torch.bfloat16, 4, (4, 3), True)
    with executed():
        _, h_n, _ = gru_rcn.gru_rcn_fwd(x, h0.float(), W, U, C, None)
    expected = reference.gru_rcn(*double(x, h0, W, U, C))[1]
    assert h_n.dtype == torch.float32
    assert_close(h_n, expected, SEQUENCE, torch.bfloat16)


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
def test_gru_rcn_partial_gradients(with_h0: bool) -> None:
    """Absent upstream gradients count as zero, and what is not asked for comes back empty."""
    x, h0, W, U, C, _ = sequence(torch.float64, 3, (4, 3), with_h0)
    with executed():
        out, h_n, gates = gru_rcn.gru_rcn_fwd(x, h0, W, U, C, None)
        saved = (x, h0, W, U, C, out, gates)
        full = gru_rcn.gru_rcn_bwd(torch.zeros_like(out), h_n, *saved, [True] * 6)
        for i in range(6):
            mask = [i == j for j in range(6)]
            some = gru_rcn.gru_rcn_bwd(None, h_n, *saved, mask)
            torch.testing.assert_close(some[i], full[i])
            assert all(gradient.shape == (0,) for gradient, wanted in zip(some, mask, strict=True) if not wanted)
        assert not any(gradient.any() for gradient in gru_rcn.gru_rcn_bwd(None, None, *saved, [True] * 6))


def _other_ops_of_a_step(weights_format: torch.memory_format) -> int:
    """PyTorch's own ops of one step, forward and backward, but for convolutions; those that interpret a kernel are among
    them."""
    counts = []
    for steps in (2, 3):
        x, h0, W, U, C, bias = sequence(torch.float32, steps, (4, 3), True)
        U, C = (weight.repeat_interleave(3, -1).contiguous(memory_format=weights_format) for weight in (U, C))
        with Eager() as around:
            out, h_n, gates = gru_rcn.gru_rcn_fwd(x, h0, W, U, C, bias)
            gru_rcn.gru_rcn_bwd(out, h_n, x, h0, W, U, C, out, gates, [True] * 6)
        assert around.convolutions > 4 * steps
        counts.append(around.ops)
    return counts[1] - counts[0]


def test_gru_rcn_copies_nothing_more_in_a_step_for_weights_that_are_channels_last() -> None:
    """As those of a model brought to that memory format, in which a convolution then returns its result."""
    assert _other_ops_of_a_step(torch.channels_last) == _other_ops_of_a_step(torch.contiguous_format)


def test_gru_rcn_reuses_its_buffers() -> None:
    """What a call holds at its peak beside what it returns does not grow with T."""
    held = []
    for steps in (3, 9):
        x, h0, W, U, C, bias = sequence(torch.float32, steps, (4, 3), True)
        with Live() as live:
            out, h_n, gates = gru_rcn.gru_rcn_fwd(x, h0, W, U, C, bias)
            forward = live.peak - sum(y.nbytes for y in (out, h_n, gates))
        with Live() as live:
            grads = gru_rcn.gru_rcn_bwd(
                None, h_n, x, h0, W, U, C, out, gates, [False, True, False, False, False, False]
            )
            # the gradients of all pre-activations are there at once, for the weights' gradients are batched over time
            backward = live.peak - gates.nbytes - grads[1].nbytes
        held.append((forward, backward))
    assert held[0] == held[1]


@pytest.mark.parametrize("batch, steps", ((0, 3), (2, 0)), ids=("no_batch", "no_time"))
def test_gru_rcn_empty(batch: int, steps: int) -> None:
    x, h0, W, U, C, bias = sequence(torch.float32, steps, (4, 3), True)
    x, h0 = x[:batch], h0[:batch]
    with executed():
        out, h_n, gates = gru_rcn.gru_rcn_fwd(x, h0, W, U, C, bias)
        dx, dh0, *weights = gru_rcn.gru_rcn_bwd(out, 2 * h0, x, h0, W, U, C, out, gates, [True] * 6)
    assert torch.equal(h_n, h0) and (h_n.data_ptr() != h0.data_ptr() or batch == 0)
    assert out.shape == (batch, steps, 5, 4, 3) and gates.shape == (batch, steps, 15, 4, 3)
    assert torch.equal(dh0, 2 * h0) and dx.shape == x.shape
    assert [x.shape for x in weights] == [x.shape for x in (W, U, C, bias)] and not any(x.any() for x in weights)
