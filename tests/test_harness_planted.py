"""Faults that a GPU punishes and the interpreter alone does not, each planted in a copy of a shipped kernel: the checks
that the kernel itself passes find every one of them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

triton = pytest.importorskip("triton")

from convrnn.kernels import chunks, gru_gates, math, mingru

from . import test_triton_chunks, test_triton_compile, test_triton_gru, test_triton_scans
from .harness.compiled import check, compiling
from .harness.guarded import KernelFault, guarded
from .harness.inputs import randn, spread_out
from .harness.planted import planted

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


@pytest.mark.interpreted
def test_copies_without_a_fault_pass(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(mingru)
    plant(gru_gates)
    plant(chunks)
    check_mingru()
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: 4)
    check_mingru()
    test_triton_gru.test_gru_step(torch.bfloat16, "contiguous", "same")
    test_triton_chunks.test_combining_linear_maps_is_associative()


@pytest.mark.interpreted
@pytest.mark.parametrize("fault, kind", ((UNMASKED_LOAD, "load"), (UNMASKED_STORE, "store")), ids=("load", "store"))
def test_missing_mask(plant: Plant, fault: tuple[str, str], kind: str) -> None:
    plant(mingru, fault)
    with pytest.raises(KernelFault, match=f"mingru_fwd_kernel, program .: .* lanes {kind} out of bounds"):
        check_mingru()


@pytest.mark.interpreted
def test_overlapping_writes(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state behind every chunk, not the last alone, goes to h_n: right as long as programs run in order."""
    plant(mingru, EVERY_CHUNK_WRITES)
    monkeypatch.setattr(chunks, "chunk_steps", lambda *_: 4)
    with pytest.raises(KernelFault, match="mingru_fwd_kernel: two programs write the same element"):
        check_mingru()


@pytest.mark.interpreted
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_int32_offset(plant: Plant) -> None:
    copy = plant(mingru, NARROW_OFFSET)
    gate_hidden = spread_out(randn(2, 3, 10, dtype=torch.bfloat16, seed=1), 2**31 + 64)
    with guarded():
        mingru.mingru_fwd(gate_hidden)
    with guarded(), pytest.raises(KernelFault, match="mingru_fwd_kernel, program 1: 5 lanes load out of bounds"):
        copy.mingru_fwd(gate_hidden)


@pytest.mark.compiled
def test_int32_offset_in_the_compiled_code(plant: Plant) -> None:
    copy = plant(mingru, NARROW_OFFSET)
    with compiling(90) as launches:
        copy.mingru_fwd(torch.empty(2, 5, 64))
    assert launches[0].narrow_offsets
    with pytest.raises(AssertionError, match="mingru_fwd_kernel"):
        check(launches)


@pytest.mark.interpreted
def test_combine_that_is_not_associative(plant: Plant) -> None:
    plant(chunks, WRONG_SHARE)
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


@pytest.mark.interpreted
def test_stride_that_is_not_aligned(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-byte accesses at strides of 10 and 35 elements, which a GPU would refuse."""
    monkeypatch.setattr(mingru, "launch", plant(math, IGNORED_STRIDES).launch)
    with pytest.raises((KernelFault, AssertionError)):
        check_mingru()


@pytest.mark.interpreted
def test_arithmetic_in_bfloat16(plant: Plant) -> None:
    plant(gru_gates, *NOT_UPCAST)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        test_triton_gru.test_gru_step(torch.bfloat16, "contiguous", "same")
    test_triton_gru.test_gru_step(torch.float32, "contiguous", "same")


@pytest.mark.compiled
def test_arithmetic_in_bfloat16_in_the_compiled_code(plant: Plant) -> None:
    copy = plant(gru_gates, *NOT_UPCAST)
    with compiling(90) as launches:
        copy.gru_gates_fwd(*(torch.empty(2, n, 8, 8, dtype=torch.bfloat16) for n in (16, 16, 8)))
    assert launches[0].low_precision
    with pytest.raises(AssertionError, match="gru_gates_fwd_kernel"):
        check(launches)
