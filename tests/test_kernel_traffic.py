"""What bench/kernels.py declares of the Triton kernels is what they do, exactly: bytes as their machine code moves them when
it is executed, FLOP as Triton's interpreter counts them, which sees the operations of the source."""

import math
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from bench.kernels import OPS, Eager, Op, Shape, eager, phases
from convrnn.kernels import chunks

from .conftest import BACKEND

DTYPES = (torch.float32, torch.bfloat16, torch.float64)  # float16 is as large as bfloat16

# Whole programs in every dtype, because FLOP of masked lanes count, and steps that no number loaded ahead divides.
EXTENTS = {3: (2, 9, 1024), 4: (2, 64, 4, 8), 6: (2, 3, 2, 32, 4, 8)}


def both(test):
    return pytest.mark.interpreted(pytest.mark.executed(test))


def launches_of(op: Op, shape: Shape, dtype: torch.dtype) -> list:
    """Each launch, with its bytes where machine code is executed, with its FLOP where the source is interpreted."""
    if BACKEND == "ptx":
        from .harness.ptx.driver import executed as context
    else:
        from .harness.flop import counted as context
    with context() as launches:
        op.run(shape, dtype, "cpu")
    return launches


SCANS = [name for name, op in OPS.items() if op.chunked]


def small(name: str, steps: int | None = None) -> Shape:
    batch, second, *rest = EXTENTS[6 if name.startswith("gru_rcn") else 4 if name.startswith("gru") else 3]
    return (batch, second if steps is None else steps, *rest)


def check_traffic(op: Op, shape: Shape, dtype: torch.dtype, declared: Iterable[str]) -> None:
    launches = launches_of(op, shape, dtype)
    found = phases([launch.kernel for launch in launches])
    assert not set(found) - op.declared.keys(), "bench/kernels.py does not say what is moved in these kernels"
    assert set(found) == set(declared)
    executed = BACKEND == "ptx"

    def work(kernels: Iterable[str]) -> tuple[int, ...]:
        """What is declared of what was counted: bytes read and written, or FLOP."""
        read, written, flop = op.work(shape, dtype, Counter(kernels))
        return (read, written) if executed else (flop,)

    for kernel, launch in zip(found, launches, strict=True) if op.chunked else ():
        assert ((launch.loaded, launch.stored) if executed else (launch.flop,)) == work([kernel]), kernel
    if not executed:
        assert (sum(launch.flop for launch in launches),) == work(found)
        return
    assert (sum(x.distinct_loaded for x in launches), sum(x.stored for x in launches)) == work(found)
    # No element is moved twice by one launch, but for the neighbours and the weights of a convolution, and a sample's code,
    # which every thread of a program reads.
    assert all(x.stored == x.distinct_stored for x in launches)
    readers = math.prod(shape) if op.codes else 0
    assert op.convolves or all(x.loaded - x.distinct_loaded <= readers for x in launches)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN everywhere
@pytest.mark.parametrize(
    "name, dtype", [(name, dtype) for name in OPS for dtype in DTYPES if dtype.itemsize < 8 or not OPS[name].convolves]
)
def test_declared_traffic_is_what_is_counted(name: str, dtype: torch.dtype) -> None:
    check_traffic(OPS[name], small(name), dtype, OPS[name].kernels)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCANS)
def test_declared_traffic_of_chunks_is_what_is_counted(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three chunks, the last of one step."""
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: 4)
    assert OPS[name].chunks(small(name), dtype) == 3
    check_traffic(OPS[name], small(name), dtype, OPS[name].chunked)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("chunk", (1, 7))
@pytest.mark.parametrize("name", SCANS)
def test_traffic_of_a_chunk_does_not_depend_on_how_many_carries_are_loaded_ahead(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: chunk)
    check_traffic(OPS[name], (1, 18, 512), torch.float32, OPS[name].chunked)


@both
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("steps", (1, 2, 4, 5))
@pytest.mark.parametrize(
    "name", [name for name, op in OPS.items() if not (op.codes or name.startswith(("gru_gates", "gru_update")))]
)
def test_traffic_of_a_step_does_not_depend_on_how_many_are_loaded_ahead(name: str, steps: int) -> None:
    check_traffic(OPS[name], small(name, steps), torch.float32, OPS[name].kernels)


@pytest.mark.parametrize(
    "name, reads, writes", (("mingru_fwd", 4, 1), ("mingru_bwd", 6, 2), ("log_scan_fwd", 4, 1), ("log_scan_bwd", 8, 2))
)
def test_chunks_move_what_their_documentation_says(name: str, reads: int, writes: int) -> None:
    """In elements of a lane and step; what maps and carries move besides is at most a tenth at the shortest chunk."""
    lane = [kernel.step(1, 1) for kernel in OPS[name].chunked.values()]
    assert [sum(side) for side in zip(*lane, strict=True)] == [reads, writes]
    maps = sum(sum(kernel.chunk(4, 4)) for kernel in OPS[name].chunked.values())
    assert maps / chunks.MIN_CHUNK <= (8 if name != "log_scan_fwd" else 20) * 4 / 32


def test_phases_tell_the_launches_of_one_kernel_apart() -> None:
    assert phases(["a_kernel", "a_kernel"]) == ["a_kernel", "a_kernel"]
    found = ["a_kernel, reduce", "carry_kernel", "a_kernel, replay"]
    assert phases(["a_kernel", "carry_kernel", "a_kernel"]) == found


@pytest.mark.parametrize(
    "op, steps, step", (("mingru_fwd", 9, 12), ("mingru_bwd", 9, 24), ("log_scan_fwd", 9, 12), ("log_scan_bwd", 9, 24))
)
def test_scans_move_no_more_than_their_inputs_and_outputs(op: str, steps: int, step: int) -> None:
    """12 and 24 bytes of a float32 lane and step; what each lane needs once, h0 and its like, fades with T."""
    shape = small(op, steps)
    lanes, _ = OPS[op].extent(shape)
    kernel = next(iter(OPS[op].kernels))
    read, written, _ = OPS[op].work(shape, torch.float32, Counter([kernel]))
    once = sum(OPS[op].kernels[kernel].once(4, 4))
    assert read + written == lanes * (steps * step + once) and once <= 12


@pytest.mark.parametrize(
    "name, float32, bfloat16", (("gru_rcn_fwd", 15, 16), ("gru_rcn_fwd, gemm", 13, 15), ("gru_rcn_bwd", 18, 18))
)
def test_gru_rcn_moves_what_its_documentation_says(name: str, float32: int, bfloat16: int) -> None:
    """In elements of a lane and step, be they of the state or not; a rounded copy of the state is the difference."""
    assert len(OPS[name].kernels) == 2
    e, s = 1_000, 1_001
    for expected, sizes in ((float32, (e, e)), (bfloat16, (e, s))):
        assert sum(sum(kernel.step(*sizes)) for kernel in OPS[name].kernels.values()) // e == expected


@pytest.mark.executed
def test_gemm_rereads_neighbours_and_weights_as_its_documentation_says() -> None:
    """(3H - 2)(3W - 2) neighbours of a sample's pixels for each of two blocks of channels, weights for each of two blocks
    of pixels: what comes from the cache, and nothing more."""
    batch, channels, height, width, e = 3, 40, 5, 8, 2
    launches = launches_of(OPS["gru_rcn_fwd, gemm"], (batch, 1, 2, channels, height, width), torch.bfloat16)
    lanes = batch * channels * height * width
    neighbours = batch * channels * (3 * height - 2) * (3 * width - 2) * e
    for launch, products, others in zip(launches, (2, 1), (2 * e + 4, 2 * e + 4), strict=True):
        weights = products * 9 * channels**2 * e
        assert launch.loaded == 2 * neighbours + 2 * weights + others * lanes


def test_eager_counts_reads_and_writes_without_views() -> None:
    x, y = torch.empty(3, 5), torch.empty(1, 5)
    with Eager() as found:
        z = x.transpose(0, 1)[1:] + y.expand(3, 5).mT[1:]  # 12 + 4 + 12 elements
        torch.empty(7).zero_()  # 7
        z.copy_(x[:, 1:].mT)  # 12 + 12
    assert (found.bytes, found.ops, found.convolutions) == (4 * (28 + 7 + 24), 3, 0)
    with Eager() as found:
        F.conv2d(torch.empty(1, 2, 4, 4), torch.empty(3, 2, 3, 3))
    assert (found.bytes, found.ops, found.convolutions) == (0, 0, 1)


@pytest.mark.parametrize(
    "name", [name for name in OPS if OPS[name].plain and not OPS[name].convolves]
)  # plain convolutions are not counted
def test_kernels_move_less_than_plain_pytorch(name: str) -> None:
    op, shape = OPS[name], small(name)
    steps = op.extent(shape)[1]
    launches = Counter({kernel: steps if name.startswith("gru_rcn") else 1 for kernel in op.kernels})
    read, written, _ = op.work(shape, torch.float32, launches)
    for plain in op.plain.values():
        assert eager(op, shape, torch.float32, plain).bytes > 1.4 * (read + written)
