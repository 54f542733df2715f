"""The compile harness finds what it is there to find: planted faults, each caught; and it leaves no trace."""

from collections.abc import Callable

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from .harness.compiled import ARCHS, Launch, check, compiling

pytestmark = pytest.mark.compiled


@triton.jit
def flawed_kernel(x, y, n, FLAW: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if FLAW == "narrow":
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if FLAW == "spill":
        values = ()
        for k in tl.static_range(96):
            values += (tl.load(x + i + k * BLOCK),)
        tl.debug_barrier()
        for k in tl.static_range(96):
            total += values[95 - k] * values[k]
    else:
        total += tl.load(x + i, i < n)
    if FLAW == "barrier":
        total += tl.sum(total, 0)
    tl.store(y + i, total, i < n)


@pytest.mark.parametrize(
    "flaw, found",
    (
        ("none", lambda launch: False),
        ("narrow", lambda launch: launch.narrow_offsets),
        ("spill", lambda launch: launch.spills and launch.stack),
        ("barrier", lambda launch: launch.barriers and launch.shared),
    ),
    ids=("none", "narrow", "spill", "barrier"),
)
def test_harness_finds(flaw: str, found: Callable[[Launch], object]) -> None:
    x = torch.empty(8192)
    with compiling(90) as launches:
        flawed_kernel[(2,)](x, torch.empty_like(x), x.numel(), flaw, 512)
    if flaw == "none":
        check(launches)
    else:
        assert found(launches[0])
        with pytest.raises(AssertionError):
            check(launches)


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
