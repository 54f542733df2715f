"""Faults, each planted in the source of a copy of a shipped kernel: the checks that the kernel itself passes find every
one of them. test_harness_ptx_planted.py has those of the machine code."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton")

from convrnn.kernels import chunks, gru_gates, math, mingru

from . import test_triton_chunks, test_triton_compile, test_triton_gru, test_triton_scans
from .harness.compiled import check, compiling
from .harness.inputs import randn, spread_out
from .harness.planted import planted
from .harness.ptx import Fault
from .harness.ptx.driver import executed

Plant = Callable[..., ModuleType]

UNMASKED_LOAD = ("tl.load(hidden_ptr + u * gh_stride_t, mask)", "tl.load(hidden_ptr + u * gh_stride_t)")
UNMASKED_STORE = ("tl.store(h_ptr + u * lanes, state, mask)", "tl.store(h_ptr + u * lanes, state)")
EVERY_CHUNK_WRITES = ("state, mask & (first + steps == T))", "state, mask)")
NARROW_OFFSET = ("sample * (gh_stride_b * VEC)", "sample.to(tl.int32) * (gh_stride_b * VEC).to(tl.int32)")
WRONG_SHARE = ("state + (moved - lost * state)", "state + (moved - kept * state)")
SPECIALISED = ("    T: tl.int32,\n", "    T,\n")
UNKNOWN_STRIDE = ("gh_stride_t *= VEC", "gh_stride_t += 0")  # as if the launcher passed it in elements
IGNORED_STRIDES = (
    "return math.gcd(VECTOR_BYTES // like.element_size(), *extents)",
    "return VECTOR_BYTES // like.element_size()",
)
NOT_UPCAST = (
    (
        "xz, xr = tl.load(xp, mask).to(ACC), tl.load(xp + half, mask).to(ACC)",
        "xz, xr = tl.load(xp, mask), tl.load(xp + half, mask)",
    ),
    (
        "hz, hr = tl.load(hp, mask).to(ACC), tl.load(hp + half, mask).to(ACC)",
        "hz, hr = tl.load(hp, mask), tl.load(hp + half, mask)",
    ),
    ("reset = sigmoid(xr + hr)", "reset = sigmoid((xr + hr).to(ACC))"),
    ("update = sigmoid(xz + hz)", "update = sigmoid((xz + hz).to(ACC))"),
)


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """``plant(module, *faults)``: the copy, in the module's place in the tests of it."""

    def copied(module: ModuleType, *faults: tuple[str, str]) -> ModuleType:
        copy, name = planted(module, tmp_path, monkeypatch, *faults), module.__name__.rpartition(".")[2]
        for tests in (test_triton_chunks, test_triton_compile, test_triton_gru, test_triton_scans):
            if hasattr(tests, name):
                monkeypatch.setattr(tests, name, copy)
        return copy

    return copied


def check_mingru(dtype: torch.dtype = torch.float32) -> None:
    """Odd lanes, two times the steps that forward loads ahead, a state that enters."""
    test_triton_scans.check_mingru(randn(2, 8, 10, 7, dtype=dtype, seed=1), randn(2, 5, 7, dtype=dtype, seed=2))


@pytest.mark.executed
def test_copies_without_a_fault_pass(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mingru)
    plant(gru_gates)
    plant(chunks)
    check_mingru()
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: 4)
    check_mingru()
    test_triton_gru.test_gru_step(torch.bfloat16, "contiguous", "same")
    test_triton_chunks.test_combining_linear_maps_is_associative()


@pytest.mark.executed
@pytest.mark.parametrize("fault, kind", ((UNMASKED_LOAD, "ld"), (UNMASKED_STORE, "st")), ids=("load", "store"))
def test_missing_mask(plant: Plant, fault: tuple[str, str], kind: str) -> None:
    plant(mingru, fault)
    place = rf"mingru_fwd_kernel, program ., thread \d+: {kind}.global.b32 .* \(planted_mingru.py:\d+\)"
    # lanes behind a sample's last belong to the next sample, which another thread writes
    what = (
        "outside of the tensors of the launch: 4 bytes at byte"
        if kind == "ld"
        else "written here and written by thread"
    )
    with pytest.raises(Fault, match=f"{place}: {what}"):
        check_mingru()


@pytest.mark.executed
def test_overlapping_writes(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state behind every chunk, not the last alone, goes to h_n: right as long as programs run in order."""
    plant(mingru, EVERY_CHUNK_WRITES)
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: 4)
    with pytest.raises(
        Fault, match=r"mingru_fwd_kernel, program \d, .* written here and by program \d, thread \d+ at once"
    ):
        check_mingru()


@pytest.mark.executed
def test_int32_offset(plant: Plant) -> None:
    copy = plant(mingru, NARROW_OFFSET)
    gate_hidden = spread_out(randn(2, 3, 10, dtype=torch.bfloat16, seed=1), 2**31 + 64)
    with executed():
        mingru.mingru_fwd(gate_hidden)
    with (
        executed(),
        pytest.raises(Fault, match="mingru_fwd_kernel, program 1, .* outside of the tensors of the launch"),
    ):
        copy.mingru_fwd(gate_hidden)


@pytest.mark.compiled
def test_int32_offset_in_the_compiled_code(plant: Plant) -> None:
    copy = plant(mingru, NARROW_OFFSET)
    with compiling(90) as launches:
        copy.mingru_fwd(torch.empty(2, 5, 64))
    assert launches[0].narrow_offsets
    with pytest.raises(AssertionError, match="mingru_fwd_kernel"):
        check(launches)


@pytest.mark.executed
def test_combine_that_is_not_associative(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(chunks, WRONG_SHARE)
    combine = triton.jit(test_triton_chunks.linear_combine.fn)  # anew: Triton keeps what a function was compiled with
    monkeypatch.setattr(test_triton_chunks, "linear_combine", combine)
    with pytest.raises(AssertionError, match="linear_combine is not associative"):
        test_triton_chunks.test_combining_linear_maps_is_associative()


@pytest.mark.compiled
def test_specialisation_on_a_single_step(plant: Plant) -> None:
    plant(mingru, SPECIALISED)
    with pytest.raises((AssertionError, triton.compiler.errors.CompilationError)):
        test_triton_compile.test_neither_steps_nor_sizes_are_specialised()


@pytest.mark.compiled
def test_stride_whose_alignment_is_unknown(plant: Plant) -> None:
    copy = plant(mingru, UNKNOWN_STRIDE)
    with compiling(90) as launches:
        copy.mingru_fwd(torch.empty(2, 5, 64))
    assert launches[0].wide_share < 1
    with pytest.raises(AssertionError, match="mingru_fwd_kernel"):
        check(launches)


@pytest.mark.executed
def test_stride_that_is_not_aligned(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-byte accesses at strides of 10 and 35 elements, which a GPU would refuse."""
    monkeypatch.setattr(mingru, "launch", plant(math, IGNORED_STRIDES).launch)
    with pytest.raises((Fault, AssertionError)):
        check_mingru()


@pytest.mark.compiled
def test_arithmetic_in_bfloat16(plant: Plant) -> None:
    """Which a GPU does, with errors that comparisons with float64 allow: only the code tells."""
    copy = plant(gru_gates, *NOT_UPCAST)
    with compiling(90) as launches:
        copy.gru_gates_fwd(*(torch.empty(2, n, 8, 8, dtype=torch.bfloat16) for n in (16, 16, 8)))
    assert launches[0].low_precision
    with pytest.raises(AssertionError, match="gru_gates_fwd_kernel"):
        check(launches)
