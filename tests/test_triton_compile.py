"""Every Triton launch, compiled for GPUs that need not be present, and what the machine code must and must not hold."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from bench.kernels import Eager
from convrnn.kernels import chunks, gru_gates, gru_rcn, gru_step, log_scan, mingru
from convrnn.kernels.math import jit_kernel

from .harness.compiled import ARCHS, Launch, check, compiling

pytestmark = pytest.mark.compiled

MODULES = (chunks, gru_gates, gru_rcn, gru_step, log_scan, mingru)
ARRANGEMENTS = ("contiguous", "chunk", "channels_last", "time_first", "unaligned")


def frames(*shape: int, dtype: torch.dtype, arrangement: str = "contiguous", device: str = "cpu") -> Tensor:
    """A tensor (B, T, C, *S): dense, a view of a tensor with more channels, channels last, or (T, B, C, *S) in memory."""
    if arrangement == "chunk":
        return torch.empty(*shape[:2], 2 * shape[2], *shape[3:], dtype=dtype, device=device)[:, :, : shape[2]]
    if arrangement == "channels_last":
        return torch.empty(*shape[:2], *shape[3:], shape[2], dtype=dtype, device=device).movedim(-1, 2)
    if arrangement == "time_first":
        return torch.empty(shape[1], shape[0], *shape[2:], dtype=dtype, device=device).transpose(0, 1)
    return torch.empty(shape, dtype=dtype, device=device)


def run_mingru(
    dtype: torch.dtype,
    arrangement: str,
    with_h0: bool,
    steps: int = 5,
    h0_dtype: torch.dtype | None = None,
    with_codes: bool = False,
) -> None:
    channels, size = (5, 3) if arrangement == "unaligned" else (32, 4)
    gate_hidden = frames(2, steps, 2 * channels, size, size, dtype=dtype, arrangement=arrangement)
    h0 = None
    if with_h0:
        h0 = frames(1, 2, channels, size, size, dtype=h0_dtype or dtype, arrangement=arrangement)[0]
    codes = gate_hidden.new_empty((2, steps), dtype=torch.uint8) if with_codes else None
    h, h_n = mingru.mingru_fwd(gate_hidden, h0, codes)
    mingru.mingru_bwd(h, h_n, gate_hidden, h0, h, codes)


def run_log_scan(dtype: torch.dtype, arrangement: str, steps: int = 5) -> None:
    features = 33 if arrangement == "unaligned" else 100 if dtype.itemsize >= 4 else 64
    log_a = frames(2, steps, features, dtype=dtype, arrangement=arrangement)
    log_b = frames(2, steps + 1, features, dtype=dtype)
    log_x = log_scan.log_scan_fwd(log_a, log_b)
    log_scan.log_scan_bwd(log_x, log_a, log_b, log_x)


def run_gru_step(dtype: torch.dtype, arrangement: str, state: torch.dtype) -> None:
    channels, size = (5, 3) if arrangement == "unaligned" else (8, 4)
    x, y, h = (
        frames(1, 2, n * channels, size, size, dtype=of, arrangement=arrangement)[0]
        for n, of in ((2, dtype), (1, dtype), (1, state))
    )
    z, r, rh = gru_gates.gru_gates_fwd(x, x, h)
    c, h_next = gru_gates.gru_update_fwd(y, y, z, h)
    gru_gates.gru_gates_bwd(z, r, rh, z, r, h)
    gru_gates.gru_update_bwd(c, h_next, z, c, h)


def run_gru_rcn(
    dtype: torch.dtype, with_h0: bool, space: tuple[int, ...] = (4, 4), codes: Tensor | None = None
) -> None:
    ones, batch = [1] * len(space), 2 if codes is None else len(codes)
    x, h0 = torch.zeros(batch, 3, 2, *space, dtype=dtype), torch.zeros(batch, 8, *space, dtype=dtype)
    W, U, C = (x.new_zeros(shape) for shape in ((24, 2, *ones), (16, 8, *ones), (8, 8, *ones)))
    h0 = h0 if with_h0 else None
    out, h_n, gates = gru_rcn.gru_rcn_fwd(x, h0, W, U, C, None, codes=codes)
    for dout in (out, None):
        gru_rcn.gru_rcn_bwd(dout, h_n, x, h0, W, U, C, out, gates, [True] * 6, codes)


def check_log_scan(launches: list[Launch], dtype: torch.dtype, aligned: bool = True) -> None:
    """log x is float32 at least: 128 bits of it are 64 bits of a 16-bit input."""
    check(launches, aligned=aligned and dtype.itemsize >= 4)
    if aligned:
        assert {width for launch in launches for width in launch.loads + launch.stores} <= {64, 128}


@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("arrangement", ("chunk", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_mingru(arch: int, dtype: torch.dtype, arrangement: str, with_h0: bool) -> None:
    with compiling(arch) as launches:
        run_mingru(dtype, arrangement, with_h0)
    check(launches)


@pytest.mark.parametrize("steps", (5, 1000), ids=("whole", "chunks"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_mingru_codes(dtype: torch.dtype, steps: int) -> None:
    """A byte a step beside the wide accesses, and nothing else."""
    with compiling(90) as launches:
        run_mingru(dtype, "channels_last", with_h0=False, steps=steps, with_codes=True)
    check(launches, aligned=False)
    wide = {128} if steps == 5 or dtype.itemsize >= 4 else {64, 128}
    for launch in launches:
        scan = launch.kernel != "carry_kernel"
        assert not scan or set(launch.loads + launch.stores) <= {8, *wide}
        # codes are loaded for each of the steps ahead, behind the loop, and for backward's first step
        assert launch.loads[8] == (0 if not scan else 5 if "fwd" in launch.kernel else 4), launch.loads


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_log_scan(arch: int, dtype: torch.dtype) -> None:
    with compiling(arch) as launches:
        run_log_scan(dtype, "contiguous")
    check_log_scan(launches, dtype)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_nothing_is_copied(arrangement: str) -> None:
    """Every layout is read where it lies: a call runs its kernels and no op of PyTorch's."""
    with compiling(90) as launches, Eager() as around:
        run_mingru(torch.float32, arrangement, with_h0=True)
        run_gru_step(torch.float32, arrangement, torch.float32)
        if arrangement != "channels_last":
            run_log_scan(torch.float32, arrangement)
    assert len(launches) >= 6 and around.ops == 0


def test_no_kernel_is_tuned_when_it_runs() -> None:
    """Tuning would run a kernel many times, also while a CUDA graph is captured."""
    found = [x for module in MODULES for name, x in vars(module).items() if name.endswith("_kernel")]
    assert len(found) >= 14 and all(type(x) is triton.JITFunction or x is jit_kernel for x in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, dtype",
    [(arch, dtype) for dtype in (torch.float32, torch.bfloat16) for arch in ARCHS]
    + [(90, torch.float16), (90, torch.float64)],
    ids=str,
)
def test_chunks(arch: int, dtype: torch.dtype) -> None:
    """T in chunks, because lanes are few: reduce, carries, replay, forward and backward. Scans are as wide as float32 maps
    allow beside their tensors; carries go lane by lane, as many as they can at a time."""
    with compiling(arch) as launches:
        run_mingru(dtype, "channels_last", with_h0=True, steps=1000)
        if arch == 90:
            run_mingru(dtype, "channels_last", with_h0=False, steps=1000)
        run_log_scan(dtype, "contiguous", steps=1000)
    scan, carries = ["mingru_fwd_kernel", "mingru_bwd_kernel"], "carry_kernel"
    assert [launch.kernel for launch in launches[:6]] == [scan[0], carries, scan[0], scan[1], carries, scan[1]]
    # backward, a reduction needs gate and dh alone: 2 loads for each of 2 steps ahead, one behind the loop, the first
    assert all(launches[i].loads.total() == 8 for i in (3, 9) if launches[i].kernel == scan[1])
    check(launches, aligned=False)
    for launch in launches:
        if launch.kernel.endswith("carry_kernel"):
            assert launch.loads.total() >= 48
        else:
            assert set(launch.loads + launch.stores) <= ({128} if dtype.itemsize >= 4 else {64, 128})


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_gru(arch: int, dtype: torch.dtype) -> None:
    with compiling(arch) as launches:
        run_gru_rcn(dtype, with_h0=True)
        run_gru_step(dtype, "chunk", dtype)
        run_gru_step(dtype, "channels_last", dtype)
    # A float32 state beside bfloat16 gates changes the number of lanes a thread holds, once, before it is stored.
    check(launches, barriers=0 if dtype == torch.float32 else 1)


@pytest.mark.parametrize(("arch", "dtype"), [(90, torch.float32), *((arch, torch.bfloat16) for arch in ARCHS)], ids=str)
def test_gru_codes(arch: int, dtype: torch.dtype) -> None:
    """A byte beside the wide accesses of each kernel of a step, and nothing else."""
    with compiling(arch) as launches:
        run_gru_rcn(dtype, with_h0=False, codes=torch.zeros(2, 3, dtype=torch.uint8))
    assert len({launch.kernel for launch in launches}) == 4
    check(launches, aligned=False, barriers=0 if dtype == torch.float32 else 1)
    for launch in launches:
        assert set(launch.loads + launch.stores) == {8, 128} and launch.loads[8] == 1, launch.kernel


def test_mingru_without_upstream_gradients() -> None:
    gate_hidden, h = (frames(2, 5, channels, 16, dtype=torch.bfloat16) for channels in (64, 32))
    with compiling(90) as launches:
        for dh, dh_n in ((h, None), (None, h[:, 0]), (None, None)):
            mingru.mingru_bwd(dh, dh_n, gate_hidden, None, h)
    check(launches)


# Every pair of architecture, dtype and arrangement: all of them on one architecture, and on the others the dtypes in turn.
# float16 differs from bfloat16 in the instructions that convert it alone: it is among those of the one.
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
COMBINATIONS = [
    *((90, dtype, arrangement) for dtype in (*DTYPES, torch.float16) for arrangement in ARRANGEMENTS),
    *(
        (arch, DTYPES[(i + turn) % 3], arrangement)
        for turn, arch in enumerate((80, 100))
        for i, arrangement in enumerate(ARRANGEMENTS)
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "dtype", "arrangement"), COMBINATIONS, ids=str)
def test_every_dtype_and_arrangement(arch: int, dtype: torch.dtype, arrangement: str) -> None:
    state = torch.float64 if dtype == torch.float64 else torch.float32
    with compiling(arch) as launches:
        run_mingru(dtype, arrangement, with_h0=True, h0_dtype=state)
        if arrangement == "unaligned":
            run_mingru(dtype, arrangement, with_h0=False)
        run_gru_step(dtype, arrangement, state)
        if arrangement == "contiguous":
            for space in ((16,), (4, 4), (2, 2, 4)):
                run_gru_rcn(dtype, with_h0=False, space=space)
    check(launches, aligned=arrangement != "unaligned", barriers=0 if dtype.itemsize >= 4 else 1)
    if arrangement != "channels_last":
        with compiling(arch) as launches:
            run_log_scan(dtype, arrangement)
        check_log_scan(launches, dtype, aligned=arrangement != "unaligned")


def test_neither_steps_nor_sizes_are_specialised() -> None:
    """One machine code for every T, T = 1 among them, and for every batch size."""
    codes = []
    for steps in (1, 2, 3, 4, 5, 16):
        with compiling(90) as launches:
            run_mingru(torch.float32, "contiguous", with_h0=True, steps=steps)
            run_log_scan(torch.float32, "contiguous", steps)
        codes.append([launch.asm["sass"] for launch in launches])
    assert all(code == codes[0] for code in codes)


def test_codes_begin_anywhere() -> None:
    """One machine code of each kernel, whether its codes begin at a multiple of 16 bytes or, as in a batch of 3 all but the
    first step's do, elsewhere."""
    found = []
    for batch in (16, 3):
        gate_hidden, codes = frames(2, 5, 64, dtype=torch.float32), torch.empty(26, dtype=torch.uint8)[batch:][:10]
        with compiling(90) as launches:
            run_gru_rcn(torch.float32, with_h0=True, codes=torch.zeros(batch, 3, dtype=torch.uint8))
            h, h_n = mingru.mingru_fwd(gate_hidden, codes=codes.view(2, 5))
            mingru.mingru_bwd(h, h_n, gate_hidden, None, h, codes.view(2, 5))
        found.append({(launch.kernel, launch.asm["ttir"]) for launch in launches})
    assert len({kernel for kernel, _ in found[0]}) == 6 and found[0] == found[1]


def test_unaligned_sizes_use_the_widest_access_that_divides_them() -> None:
    """100 bfloat16 features are no multiple of 16 bytes, but of 8."""
    with compiling(90) as launches:
        gate_hidden = frames(2, 5, 200, dtype=torch.bfloat16)
        h, h_n = mingru.mingru_fwd(gate_hidden)
        mingru.mingru_bwd(h, h_n, gate_hidden, None, h)
        run_mingru(torch.float32, "unaligned", with_h0=True)
    check(launches, aligned=False, registers=64)
    assert all(set(launch.loads + launch.stores) == {64} for launch in launches[:2])
    assert all(set(launch.loads + launch.stores) == {32} for launch in launches[2:])


@pytest.mark.parametrize("offset, width", ((1, 16), (4, 16), (8, 128)))
def test_views_at_odd_addresses_use_what_their_address_allows(offset: int, width: int) -> None:
    """A view that starts ``offset`` bfloat16 elements into its storage: lane by lane unless it is a multiple of 16
    bytes, with no exchange between threads and no spills."""
    gate_hidden = torch.empty(2 * 5 * 64 + offset, dtype=torch.bfloat16)[offset:].view(2, 5, 64)
    with compiling(90) as launches:
        h, h_n = mingru.mingru_fwd(gate_hidden)
        mingru.mingru_bwd(h, h_n, gate_hidden, None, h)
    check(launches, aligned=False)
    assert {w for launch in launches for w in launch.loads + launch.stores} == {width}


def test_tensors_beyond_2_to_the_31_elements() -> None:
    """A batch of 8e10 elements, which no memory holds: the grid stays on its first axis, strides pass in 64 bits."""
    with compiling(90) as launches:
        gate_hidden = frames(3, 50, 2 * 4096, 256, 256, dtype=torch.bfloat16, device="meta")
        h, h_n = mingru.mingru_fwd(gate_hidden)
        mingru.mingru_bwd(h, h_n, gate_hidden, None, h)
    check(launches)
    assert {launch.grid for launch in launches} == {(3 * 4096 * 256 * 256 // 1024,)}
