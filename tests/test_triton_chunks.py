"""T cut in chunks: the rule, the maps of chunks and how they combine, and results of both scans through chunks."""

import pytest
import torch
from torch import Tensor

from convrnn import reference

triton = pytest.importorskip("triton")
tl = triton.language

from convrnn.kernels import chunks, log_scan, mingru

from .harness.associative import assert_associative
from .harness.inputs import DTYPES, arrange, assert_close, double, randn
from .test_triton_scans import LAYOUTS, SCAN_GRAD, check_log_scan, check_mingru

pytestmark = pytest.mark.executed

CHUNK = 6  # no multiple of the 4 steps that forward loads ahead
STEPS = (2, 5, 6, 7, 12, 13)  # around a chunk and two of them


@pytest.fixture(params=(CHUNK,))
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """T is cut in chunks of so many steps, however short it is."""
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("layout, steps", [(layout, 13) for layout in LAYOUTS] + [("chunk", n) for n in STEPS[:-1]])
def test_mingru(chunk: int, layout: str, steps: int, with_h0: bool) -> None:
    gate_hidden = arrange(randn(2, steps, 10, 3, 2, dtype=torch.float32, seed=1), layout)
    check_mingru(gate_hidden, randn(2, 5, 3, 2, dtype=torch.float32, seed=2) if with_h0 else None, seed=steps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mingru_of_any_dtype(chunk: int, dtype: torch.dtype) -> None:
    """Odd lanes, several blocks of them, a state of another dtype."""
    h0 = randn(2, 165, dtype=torch.float32 if dtype.itemsize == 2 else dtype, seed=2)
    check_mingru(randn(2, 8, 330, dtype=dtype, seed=1), h0)


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "time_first"))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_step_more_than_a_chunk(chunk: int, dtype: torch.dtype, layout: str, with_h0: bool) -> None:
    h0 = randn(2, 5, 3, dtype=dtype, seed=2) if with_h0 else None
    check_mingru(arrange(randn(2, chunk + 1, 10, 3, dtype=dtype, seed=1), layout), h0)
    if layout != "channels_last":
        log_a = arrange(-randn(2, chunk + 1, 7, dtype=dtype, seed=1).abs(), layout)
        check_log_scan(log_a, arrange(randn(2, chunk + 2, 7, dtype=dtype, seed=2), layout))


@pytest.mark.parametrize("layout, steps", [("contiguous", n) for n in (0, *STEPS)] + [("time_first", 13)])
def test_log_scan(chunk: int, layout: str, steps: int) -> None:
    log_a = arrange(-randn(2, steps, 7, 5, dtype=torch.float32, seed=1).abs(), layout)
    check_log_scan(log_a, arrange(randn(2, steps + 1, 7, 5, dtype=torch.float32, seed=2), layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_scan_of_any_dtype(chunk: int, dtype: torch.dtype) -> None:
    check_log_scan(-randn(2, 8, 165, dtype=dtype, seed=1).abs(), randn(2, 9, 165, dtype=dtype, seed=2))


@pytest.mark.parametrize("chunk", (2,), indirect=True)
def test_more_chunks_than_carries_are_loaded_ahead(chunk: int) -> None:
    steps = chunk * chunks.CARRIES_AHEAD + 3
    check_mingru(randn(2, steps, 10, dtype=torch.float32, seed=1), randn(2, 5, dtype=torch.float32, seed=2))
    check_log_scan(*(-randn(2, n, 5, dtype=torch.float32, seed=3).abs() for n in (steps, steps + 1)))


def test_mingru_is_accurate_over_time() -> None:
    """z from 1e-5 to 1 - 1e-5, random and constant, through chunks of the length that the rule takes."""
    steps = 400
    z = torch.tensor([0.5, 0.02, 1e-5, 1 - 1e-5], dtype=torch.float64).repeat(2)
    random = torch.tensor([0.0, 1.0]).repeat_interleave(4)
    gate = z.logit() + random * randn(steps, 8, dtype=torch.float64, seed=1)
    hidden = 0.5 + random * randn(steps, 8, dtype=torch.float64, seed=2)
    gate_hidden = torch.cat((gate, hidden), 1)[None].float()
    h0, dh = torch.full((1, 8), 3.0), randn(1, steps, 8, dtype=torch.float32, seed=3)
    assert chunks.cut(gate_hidden, 8) == (32, 13)
    inputs = double(gate_hidden, h0)
    expected, _ = reference.mingru(*inputs)
    h, _ = mingru.mingru_fwd(gate_hidden, h0)
    grads = mingru.mingru_bwd(dh, None, gate_hidden, h0, h)
    assert ((h - expected).abs() / expected.abs()).max() < 2e-6
    for grad, wanted in zip(grads, torch.autograd.grad(expected, inputs, dh.double()), strict=True):
        assert ((grad - wanted).abs() / wanted.abs().amax(-2, keepdim=True)).max() < 5e-6


@pytest.mark.parametrize("chunk", (256,), indirect=True)
def test_log_scan_keeps_the_rounding_errors_of_a_chunk(chunk: int) -> None:
    """Terms of 1 + 7e-6, of which a plain sum beyond 128 drops the 7e-6 each time: 3.5e-6 in log x."""
    log_b = torch.full((1, chunk + 2, 1), 7e-6)
    log_b[:, :2] = 0  # where m starts, of all of T and of the first chunk
    log_a = torch.zeros(1, chunk + 1, 1)
    log_x = log_scan.log_scan_fwd(log_a, log_b)
    assert_close(log_x, reference.log_scan(log_a.double(), log_b.double()), 1, torch.float32)


def test_chunks_and_whole_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    gate_hidden = randn(2, 30, 12, dtype=torch.float32, seed=1)
    log_a, log_b = -randn(2, 29, 6, dtype=torch.float32, seed=2).abs(), randn(2, 30, 6, dtype=torch.float32, seed=3)
    results = []
    for chunk in (30, 7):
        monkeypatch.setattr(chunks, "chunk_steps", lambda *_, chunk=chunk: chunk)
        h, h_n = mingru.mingru_fwd(gate_hidden)
        log_x = log_scan.log_scan_fwd(log_a, log_b)
        gradients = *mingru.mingru_bwd(h, h_n, gate_hidden, None, h), *log_scan.log_scan_bwd(log_x, log_a, log_b, log_x)
        results.append((h, h_n, log_x, *gradients))
    for x, y in zip(*results, strict=True):
        assert_close(x, y, SCAN_GRAD, torch.float32)


@triton.jit
def linear_combine(kept, lost, moved, next_kept, next_lost, next_moved):
    """A chunk's map and the next one's, from what the kernels do with a step's and with a state."""
    keeps_tail = next_kept < next_lost
    kept, lost = chunks.decay(kept, lost, tl.where(keeps_tail, next_kept, next_lost), keeps_tail)
    return kept, lost, chunks.carry(moved, next_kept, next_lost, next_moved)


@triton.jit
def linear_combine_of_the_wrong_share(kept, lost, moved, next_kept, next_lost, next_moved):
    combined = linear_combine(kept, lost, moved, next_kept, next_lost, next_moved)
    return combined[0], combined[1], chunks.carry(moved, kept, lost, next_moved)


@triton.jit
def log_combine(m, m_low, s, s_low, sum_a, sum_a_low, next_m, next_m_low, next_s, next_s_low, next_sum, next_sum_low):
    next_map = next_m, next_m_low, next_s, next_s_low, next_sum, next_sum_low
    m, m_low, s, s_low = log_scan._carry(m, m_low, s, s_low, next_map)
    sum_a, sum_a_low = log_scan._add(sum_a, sum_a_low, next_sum)
    return m, m_low, s, s_low, sum_a, sum_a_low + next_sum_low


@triton.jit
def log_combine_without_a_sum(
    m, m_low, s, s_low, sum_a, sum_a_low, next_m, next_m_low, next_s, next_s_low, next_sum, next_sum_low
):
    next_map = next_m, next_m_low, next_s, next_s_low, next_sum, next_sum_low
    m, m_low, s, s_low = log_scan._carry(m, m_low, s, s_low, next_map)
    return m, m_low, s, s_low, sum_a, sum_a_low


def test_combining_linear_maps_is_associative() -> None:
    """Shares down to 1e-7 on either side, compared by their logarithms, so that a small one counts as much."""
    tail = 0.5 * (-4 * randn(3, 256, dtype=torch.float32, seed=1).abs()).exp().clamp(min=2e-7)
    keeps = torch.arange(256) % 2 == 0
    shares = torch.where(keeps, tail, 1 - tail), torch.where(keeps, 1 - tail, tail)
    elements = torch.stack((*shares, randn(3, 256, dtype=torch.float32, seed=2)), 1)

    def compared(maps: Tensor) -> Tensor:
        return torch.stack((maps[0].log(), maps[1].log(), maps[2]))

    assert_associative(linear_combine, elements, of=compared)
    with pytest.raises(AssertionError, match="linear_combine_of_the_wrong_share is not associative"):
        assert_associative(linear_combine_of_the_wrong_share, elements, of=compared)


def test_combining_log_maps_is_associative() -> None:
    """By the logarithms that they stand for: where m restarts depends on the grouping, x and the product of a do not."""
    elements = randn(3, 6, 256, dtype=torch.float32, seed=1, scale=8.0)
    elements[:, 2].abs_().add_(0.1)
    elements[:, (1, 3, 5)] *= 1e-7
    elements[:, 0, ::5] = log_scan.ZERO.value  # no b in the chunk
    elements[:, 4, ::7] = log_scan.ZERO.value  # a zero a in it

    def compared(maps: Tensor) -> Tensor:
        log_x, log_a = maps[0] + (maps[1] + (maps[2] + maps[3]).log()), maps[4] + maps[5]
        return torch.stack([x.where(x > log_scan.ZERO.value / 2, -100.0) for x in (log_x, log_a)])

    assert_associative(log_combine, elements, of=compared)
    with pytest.raises(AssertionError, match="log_combine_without_a_sum is not associative"):
        assert_associative(log_combine_without_a_sum, elements, of=compared)


@pytest.mark.parametrize(
    "lanes, steps, itemsize, processors, chunk",
    (
        (64, 65536, 4, 132, 128),  # (1, 65536, 64)
        (64, 65536, 2, 108, 128),
        (64, 2**20, 4, 132, 256),
        (16 * 512, 256, 4, 132, 32),  # (16, 256, 512)
        (4 * 256, 4096, 4, 132, 32),  # (4, 4096, 256)
        (1, 128, 4, 132, 32),
        (1, 127, 4, 132, 127),  # three chunks gain too little
        (16 * 256 * 14 * 14, 10, 4, 132, 10),  # video
        (4 * 64 * 56 * 56, 4096, 2, 132, 4096),
        (36_093, 4096, 4, 132, 32),  # half of the bytes in flight, and not quite
        (36_094, 4096, 4, 132, 4096),
        (0, 0, 4, 132, 0),
    ),
)
def test_chunk_rule(lanes: int, steps: int, itemsize: int, processors: int, chunk: int) -> None:
    assert chunks.chunk_steps(lanes, steps, itemsize, processors) == chunk
