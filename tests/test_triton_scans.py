"""The launchers of minGRU and log scan as machine code, executed, against the loops of convrnn.reference."""

import pytest
import torch
from torch import Tensor

from convrnn import reference

triton = pytest.importorskip("triton")

from convrnn.kernels import chunks, log_scan, mingru
from convrnn.kernels.layout import dense_strides, is_channels_last

from .harness.inputs import DTYPES, arrange, assert_close, assert_grads, double, randn
from .harness.ptx.driver import executed

pytestmark = pytest.mark.executed

LAYOUTS = ("contiguous", "chunk", "channels_last", "time_first", "expanded", "odd")
STEPS = (1, 2, 3, 4, 5, 6, 7)  # around the 4 steps that forward loads ahead, and the 2 of backward
FEW_STEPS = (1, 4, 7)  # of a dtype that changes nothing of the loops: behind them, in them, both

# Allowed error in units of the dtype's epsilon. A gate's exponential and its division may each be off by two units in the
# last place, and backward reads what was rounded.
SCAN, SCAN_GRAD = 8, 16


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """T is not cut in chunks, however long it is; test_triton_chunks.py has the tests of those."""
    monkeypatch.setattr(chunks, "chunk_steps", lambda lanes, steps, *_: steps)


def check_mingru(gate_hidden: Tensor, h0: Tensor | None, seed: int = 0, codes: Tensor | None = None) -> None:
    dtype = gate_hidden.dtype
    inputs = double(gate_hidden, h0)
    masks = {} if codes is None else {"reset": codes % 2 == 1, "hold": codes >= 2}
    expected = reference.mingru(*inputs, **masks)
    with executed(seed):
        h, h_n = mingru.mingru_fwd(gate_hidden, h0, codes)
        dh, dh_n = randn(*h.shape, dtype=dtype, seed=3), randn(*h_n.shape, dtype=h_n.dtype, seed=4)
        actual = mingru.mingru_bwd(dh, dh_n, gate_hidden, h0, h, codes)
    assert_close(h, expected[0], SCAN, dtype)
    assert_close(h_n, expected[1], SCAN, dtype)
    assert_grads(actual, expected, (dh, dh_n), inputs, SCAN_GRAD, dtype)
    assert h_n.dtype == (dtype if h0 is None else h0.dtype)
    channels_last = is_channels_last(gate_hidden, 2)
    for x, channel_dim in ((h, 2), (actual[0], 2), (h_n, 1), *([] if h0 is None else [(actual[1], 1)])):
        assert list(x.stride()) == dense_strides(x.shape, channel_dim, channels_last)


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mingru_layouts(layout: str, steps: int, with_h0: bool) -> None:
    gate_hidden = arrange(randn(2, steps, 10, 3, 2, dtype=torch.float32, seed=1), layout)
    check_mingru(gate_hidden, randn(2, 5, 3, 2, dtype=torch.float32, seed=2) if with_h0 else None, seed=steps)


@pytest.mark.slow
@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("steps", FEW_STEPS)
@pytest.mark.parametrize("layout", ("contiguous", "chunk", "channels_last", "time_first"))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_mingru_layouts_of_other_dtypes(dtype: torch.dtype, layout: str, steps: int, with_h0: bool) -> None:
    gate_hidden = arrange(randn(2, steps, 14, 3, 3, dtype=dtype, seed=1), layout)
    h0 = randn(2, 7, 3, 3, dtype=torch.float32 if dtype.itemsize == 2 else dtype, seed=2) if with_h0 else None
    check_mingru(gate_hidden, h0, seed=steps)


@pytest.mark.parametrize("shape", ((3, 5, 2), (2, 5, 700), (1, 6, 32, 4, 4), (2, 3, 6, 3, 2, 5)), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mingru_shapes(dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    frame = (shape[2] // 2, *shape[3:])
    h0 = randn(shape[0], *frame, dtype=torch.float32 if dtype.itemsize == 2 else dtype, seed=2)
    check_mingru(arrange(randn(*shape, dtype=dtype, seed=1), layout), h0)


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("chunk", (13, 6, 1))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_mingru_codes(layout: str, chunk: int, with_h0: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample's codes are its own, wherever they lie in memory, and chunks have restarts and holds at either end."""
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: chunk)
    gate_hidden = arrange(randn(3, 13, 10, 3, 2, dtype=torch.float32, seed=1), layout)
    rows = "0123012301231", "2000022000010", "1000011300002"
    codes = torch.tensor([int(code) for code in "0" + "".join(rows)], dtype=torch.uint8)[1:].view(3, 13)
    check_mingru(gate_hidden, randn(3, 5, 3, 2, dtype=torch.float32, seed=2) if with_h0 else None, chunk, codes)


@pytest.mark.parametrize(
    "shape", ((0, 3, 4, 2), (2, 3, 0, 2), (2, 0, 4, 2)), ids=("no_batch", "no_channels", "no_time")
)
def test_mingru_empty(shape: tuple[int, ...]) -> None:
    gate_hidden = randn(*shape, dtype=torch.float32, seed=1)
    h0 = randn(shape[0], shape[2] // 2, 2, dtype=torch.float32, seed=2)
    with executed():
        h, h_n = mingru.mingru_fwd(gate_hidden, h0)
        dgate_hidden, dh0 = mingru.mingru_bwd(h, 3 * h0, gate_hidden, h0, h)
        half = mingru.mingru_fwd(gate_hidden)[1]
    assert torch.equal(h_n, h0) and h_n.data_ptr() != h0.data_ptr() or h0.numel() == 0
    assert torch.equal(dh0, 3 * h0)
    assert torch.equal(half, torch.full_like(h0, 0.5))
    assert h.shape == (*shape[:2], shape[2] // 2, 2) and dgate_hidden.shape == shape


@pytest.mark.parametrize("chunk", (5, 4))
def test_mingru_absent_gradients_are_zero(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: chunk)
    gate_hidden, h0 = randn(2, 5, 6, dtype=torch.float32, seed=1), randn(2, 3, dtype=torch.float32, seed=2)
    with executed():
        h, h_n = mingru.mingru_fwd(gate_hidden, h0)
        for dh, dh_n in ((None, h_n), (h, None), (None, None)):
            actual = mingru.mingru_bwd(dh, dh_n, gate_hidden, h0, h)
            zeros = [torch.zeros_like(x) if dx is None else dx for x, dx in ((h, dh), (h_n, dh_n))]
            for x, y in zip(actual, mingru.mingru_bwd(*zeros, gate_hidden, h0, h), strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("chunk", (13, 6, 2))
def test_mingru_extreme_logits(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state near 1e4 is rounded by up to 5e-4, and dgate holds g - h, which tends to 0: it is right for the state that
    was saved, which is all that a backward has; the loop's own, in float32, is off by 2e-3."""
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: chunk)
    gate = torch.tensor([-1e4, -90.0, -17.0, 0.0, 17.0, 90.0, 1e4])
    gate_hidden = torch.stack(torch.meshgrid(gate, gate, indexing="ij"), dim=0).reshape(1, 1, -1).expand(1, 13, -1)
    h0 = torch.full((1, 49), 3.0)
    dh, dh_n = randn(1, 13, 49, dtype=torch.float32, seed=3), randn(1, 49, dtype=torch.float32, seed=4)
    with executed():
        h, h_n = mingru.mingru_fwd(gate_hidden, h0)
        actual = mingru.mingru_bwd(dh, dh_n, gate_hidden, h0, h)
    inputs = double(gate_hidden, h0)
    assert_close(h, reference.mingru(*inputs)[0], SCAN, torch.float32)
    assert torch.equal(h[:, -1], h_n)
    steps, state = [], inputs[1]
    for gate_hidden_t, saved in zip(inputs[0].split(1, 1), h.double().unbind(1), strict=True):
        steps.append(reference.mingru(gate_hidden_t, state)[1])
        state = steps[-1] + (saved - steps[-1]).detach()
    assert_grads(actual, (torch.stack(steps, 1), state), (dh, dh_n), inputs, SCAN_GRAD, torch.float32)


def test_mingru_small_gates_do_not_drift(whole: None) -> None:
    """At z = 1e-5 rounding 1 - z would be off by 138 epsilons within 1,000 steps."""
    gate_hidden = torch.tensor([-11.512915, -1e4]).expand(1, 1000, 2)
    h, _ = mingru.mingru_fwd(gate_hidden, torch.ones(1, 1))
    expected, _ = reference.mingru(gate_hidden.double(), torch.ones(1, 1).double())
    assert_close(h, expected, 40, torch.float32)


def check_log_scan(log_a: Tensor, log_b: Tensor) -> None:
    dtype = log_b.dtype
    inputs = double(log_a, log_b)
    expected = reference.log_scan(*inputs)
    with executed(1):
        log_x = log_scan.log_scan_fwd(log_a, log_b)
        dlog_x = randn(*log_x.shape, dtype=log_x.dtype, seed=3)
        actual = log_scan.log_scan_bwd(dlog_x, log_a, log_b, log_x)
    assert_close(log_x, expected, SCAN, dtype)
    assert_grads(actual, (expected,), (dlog_x,), inputs, SCAN_GRAD, dtype)
    assert all(x.is_contiguous() for x in (log_x, *actual))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "steps"),
    [(dtype, n) for dtype in DTYPES for n in ((0, *STEPS) if dtype == torch.float32 else FEW_STEPS)],
    ids=str,
)
def test_log_scan(dtype: torch.dtype, layout: str, steps: int) -> None:
    log_a = -arrange(randn(2, steps, 7, 5, dtype=dtype, seed=1), layout).abs()
    log_b = arrange(randn(2, steps + 1, 7, 5, dtype=dtype, seed=2), layout)
    check_log_scan(log_a if layout == "contiguous" else arrange(log_a, layout), log_b)


@pytest.mark.parametrize("chunk", (3, 2, 1))
def test_log_scan_of_zeros(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """a and b take every pattern of zeros over three steps; where x is zero, no gradient and no NaN."""
    zero, one = -torch.inf, 0.25
    patterns = torch.tensor([[zero if lane >> bit & 1 else one for lane in range(128)] for bit in range(7)])
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: chunk)
    log_a, log_b = patterns[None, :3].double(), patterns[None, 3:].double()
    with executed():
        log_x = log_scan.log_scan_fwd(log_a, log_b)
        dlog_a, dlog_b = log_scan.log_scan_bwd(torch.ones_like(log_x), log_a, log_b, log_x)
    a, b = (x.exp().requires_grad_() for x in (log_a, log_b))
    x = [b[:, 0]]
    for t in range(3):
        x.append(a[:, t] * x[-1] + b[:, t + 1])
    x = torch.stack(x, dim=1)
    torch.testing.assert_close(log_x, x.log())
    da, db = torch.autograd.grad(x.clamp(min=1e-300).log().sum(), (a, b))
    torch.testing.assert_close(dlog_a, a * da)
    torch.testing.assert_close(dlog_b, b * db)


@pytest.mark.parametrize("steps, chunk", ((1500, 1500), (400, 32)))
def test_log_scan_is_accurate_over_time(steps: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decays that a float32 factor cannot hold, sums whose terms are small, and a logarithm that grows without end."""
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: chunk)
    log_a = torch.tensor([-1e-6, -1e-3, -0.50001, 0.3, 0.0]).expand(1, steps, 5)
    log_b = torch.tensor([0.0, 0.0, -1e4, 0.0, -1.2]).expand(1, steps + 1, 5).clone()
    log_b[:, 0] = 1.0
    log_x = log_scan.log_scan_fwd(log_a, log_b)
    assert_close(log_x, reference.log_scan(log_a.double(), log_b.double()), SCAN, torch.float32)
