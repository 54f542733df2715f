"""What the machine code of a launch must satisfy; ``bench.compiled`` compiles it and reads it."""

import re

from bench.compiled import AMD, ARCHS, Launch, compiling

__all__ = ["AMD", "ARCHS", "Launch", "check", "check_product", "compiling"]

SHARED = 4 << 10  # of a launch that may exchange between threads

# What the tensor cores are asked for, in PTX and in SASS: by a warp, by a group of four, by one thread for all.
PRODUCT = {80: ("mma.sync", "HMMA"), 90: ("wgmma.mma_async", "HGMMA"), 100: ("tcgen05.mma", "UTCHMMA")}


def check(
    launches: list[Launch], aligned: bool = True, barriers: int = 0, registers: int = 128, shared: int = SHARED
) -> None:
    """The budget of every shipped launch: nothing in local memory, wide accesses, 64-bit offsets, float32 arithmetic,
    one grid axis, no barriers, and shared memory only where there is a barrier."""
    assert launches
    for launch in launches:
        assert launch.stack == launch.local == launch.spills == 0, launch.kernel
        assert launch.barriers <= barriers, launch.kernel
        assert launch.shared <= (shared if barriers else 0), launch.kernel
        assert launch.registers <= registers, launch.kernel
        assert not launch.narrow_offsets, launch.kernel
        assert not launch.low_precision, launch.kernel
        assert len(launch.grid) == 1 and launch.grid[0] < 2**31, launch.kernel  # axes 1 and 2 end at 65,535
        if aligned:
            assert launch.wide_share == 1, f"{launch.kernel}: {launch.loads}, {launch.stores}"


def check_product(launch: Launch, itemsize: int, registers: int, codes: bool = False) -> None:
    """The budget of a matrix product with its epilogue: on the tensor cores, its operands copied to shared memory 128 bits
    at a time, where two programs find room on a multiprocessor, and what is channels first element by element."""
    check([launch], aligned=False, barriers=32, registers=registers, shared=(64 << 10) + SHARED)
    ptx, sass = PRODUCT[launch.arch]
    assert ptx in launch.asm["ptx"] and re.search(rf"\b{sass}\b", launch.asm["sass"]), launch.kernel
    copies = re.findall(r"\bLDGSTS[.\w]*", launch.asm["sass"])
    assert copies and all(copy.endswith(".128") for copy in copies), launch.kernel
    assert set(launch.loads + launch.stores) == {8 * itemsize, 128} | ({8} if codes else set()), launch.kernel
    assert launch.programs_per_sm >= 2, launch.kernel
