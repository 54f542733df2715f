"""What the machine code of a launch must satisfy; ``bench.compiled`` compiles it and reads it."""

from bench.compiled import AMD, ARCHS, Launch, compiling

__all__ = ["AMD", "ARCHS", "Launch", "check", "compiling"]

SHARED = 4 << 10  # of a launch that may exchange between threads


def check(launches: list[Launch], aligned: bool = True, barriers: int = 0, registers: int = 128) -> None:
    """The budget of every shipped launch: nothing in local memory, wide accesses, 64-bit offsets, float32 arithmetic,
    no barriers, and shared memory only where there is a barrier."""
    assert launches
    for launch in launches:
        assert launch.stack == launch.local == launch.spills == 0, launch.kernel
        assert launch.barriers <= barriers, launch.kernel
        assert launch.shared <= (SHARED if barriers else 0), launch.kernel
        assert launch.registers <= registers, launch.kernel
        assert not launch.narrow_offsets, launch.kernel
        assert not launch.low_precision, launch.kernel
        if aligned:
            assert launch.wide_share == 1, f"{launch.kernel}: {launch.loads}, {launch.stores}"
