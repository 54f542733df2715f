"""The compile harness finds what it is there to find: planted faults, each caught; and it leaves no trace."""

from collections.abc import Callable

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from .harness.compiled import AMD, ARCHS, Launch, check, compiling

pytestmark = pytest.mark.compiled


@triton.jit
def flawed_kernel(x, y, n, FLAW: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if FLAW == "narrow":
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if FLAW == "spill" or FLAW == "registers":
        held: tl.constexpr = 96 if FLAW == "spill" else 40  # vectors of 4 in each thread
        values = ()
        for k in tl.static_range(held):
            values += (tl.load(x + i + k * BLOCK),)
        tl.debug_barrier()
        for k in tl.static_range(held):
            total += values[held - 1 - k] * values[k]
    else:
        total += tl.load(x + i, i < n)
    if FLAW == "barrier":
        total += tl.sum(total, 0)
    if FLAW == "half":
        half = total.to(x.dtype.element_ty)
        total = (half * half).to(tl.float32)
    tl.store(y + i, total, i < n)


@pytest.mark.parametrize(
    "flaw, found",
    (
        ("none", lambda launch: False),
        ("narrow", lambda launch: launch.narrow_offsets),
        ("spill", lambda launch: launch.spills and launch.stack),
        ("barrier", lambda launch: launch.barriers and launch.shared),
        ("half", lambda launch: launch.low_precision),
        ("registers", lambda launch: launch.registers > 128 and not launch.spills),
    ),
    ids=("none", "narrow", "spill", "barrier", "half", "registers"),
)
def test_harness_finds(flaw: str, found: Callable[[Launch], object]) -> None:
    x = torch.empty(8192, dtype=torch.float16 if flaw == "half" else torch.float32)
    with compiling(90) as launches:
        flawed_kernel[(2,)](x, torch.empty_like(x), x.numel(), flaw, 512)
    if flaw == "none":
        check(launches)
    else:
        assert found(launches[0])
        with pytest.raises(AssertionError):
            check(launches)


@triton.jit
def strided_kernel(x, y, stride: tl.int64, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of x, ``stride`` VECs apart, which is all that the compiler knows of their alignment."""
    i = tl.program_id(0).to(tl.int64) * (stride * VEC) + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


def test_harness_finds_a_stride_that_costs_the_vector_width() -> None:
    x = torch.empty(8, 512, dtype=torch.bfloat16)
    widths = {}
    for vec in (8, 4, 1):
        with compiling(90) as launches:
            strided_kernel[(8,)](x, torch.empty_like(x), 100 // vec if vec < 8 else 104 // vec, vec, 1024)
        widths[vec] = set(launches[0].loads + launches[0].stores)
        if vec == 8:
            check(launches)
        else:
            with pytest.raises(AssertionError, match="strided_kernel: Counter"):
                check(launches)
    assert widths == {8: {128}, 4: {64}, 1: {16}}


def walk_kernel(x, y, T, BLOCK: tl.constexpr):
    """The last frame of x (T, BLOCK); T is specialised unless the decorator says otherwise."""
    i = tl.arange(0, BLOCK)
    last = (T - 1).to(tl.int64)
    tl.store(y + i, tl.load(x + last * BLOCK + i))


def test_harness_finds_a_specialised_number_of_steps() -> None:
    """T = 1 becomes a constant, which has no ``to``; T = 16 another machine code. The interpreter runs all of them."""
    codes = {}
    for specialised in (True, False):
        kernel = triton.jit(walk_kernel, do_not_specialize=None if specialised else ["T"])
        for steps in (1, 3, 16):
            with compiling(90) as launches:
                arguments = torch.empty(steps, 512), torch.empty(512), steps, 512
                if specialised and steps == 1:
                    with pytest.raises(triton.compiler.errors.CompilationError):
                        kernel[(1,)](*arguments)
                    continue
                kernel[(1,)](*arguments)
            codes[specialised, steps] = launches[0].asm["ttir"]
    assert codes[False, 1] == codes[False, 3] == codes[False, 16]
    assert codes[True, 3] != codes[True, 16]


def test_harness_compiles_for_amd() -> None:
    x = torch.empty(8192)
    flaws = {}
    for flaw in ("none", "spill", "half"):
        with compiling(AMD) as launches:
            flawed_kernel[(2,)](x.half() if flaw == "half" else x, torch.empty_like(x), x.numel(), flaw, 512)
        flaws[flaw] = launches[0]
    assert "amdgcn-amd-amdhsa--gfx942" in flaws["none"].asm["amdgcn"]
    assert set(flaws["none"].loads + flaws["none"].stores) == {64}  # 256 threads share 512 floats
    assert flaws["none"].registers > 0 and flaws["none"].barriers == flaws["none"].spills == 0
    assert flaws["half"].low_precision


def test_harness_keeps_architectures_apart_and_restores_the_driver() -> None:
    before = triton.runtime.driver._active
    x = torch.empty(512)
    codes = set()
    for arch in ARCHS:
        with compiling(arch) as launches:
            flawed_kernel[(1,)](x, torch.empty_like(x), 512, "none", 512)
        assert f".target sm_{arch}" in launches[0].asm["ptx"]
        codes.add(launches[0].asm["sass"])
    assert len(codes) == len(ARCHS)
    assert triton.runtime.driver._active is before
    with pytest.raises(ZeroDivisionError), compiling(80):
        raise ZeroDivisionError
    assert triton.runtime.driver._active is before
