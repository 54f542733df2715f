"""Who touched a memory last, and whether a barrier lies between: races found as they happen.

A *lane* is a thread of the launch: program times threads of a program, plus thread. A *unit* is the narrowest piece of
memory that the kernel reads or writes at once.
"""

import numpy as np

from .faults import LaneFault

WARP = 32


class Clock:
    """The time of each step, and when the threads of a program and of a warp last waited for one another."""

    def __init__(self, programs: int, threads: int) -> None:
        self.now = 1
        self.threads = threads
        self.barrier = np.zeros(programs, np.int64)
        self.warp_barrier = np.zeros(programs * threads // WARP, np.int64)
        self.shuffle = np.zeros(programs * threads // WARP, np.int64)

    def ordered(
        self, time: np.ndarray, first: np.ndarray, last: np.ndarray, lanes: np.ndarray, shuffles: bool = False
    ) -> np.ndarray:
        """Whether what lanes from ``first`` to ``last`` did at ``time`` comes before what ``lanes`` do now: their program
        (or, if they are of one, their warp) has had a barrier since, or, with ``shuffles``, their warp a shuffle."""
        program, warp = lanes // self.threads, lanes // WARP
        alone = (first == lanes) & (last == lanes)
        one_program = (first // self.threads == program) & (last // self.threads == program)
        one_warp = (first // WARP == warp) & (last // WARP == warp)
        behind_barrier = one_program & (time < self.barrier[program])
        since = np.maximum(self.warp_barrier, self.shuffle) if shuffles else self.warp_barrier
        return alone | behind_barrier | (one_warp & (time < since[warp]))


class Ledger:
    """The last writer of each unit and its readers since, with their times.

    Readers are noted when somebody writes: most tensors are read or written, not both.

    Args:
        units: of the memory.
        clock: of the launch.
        shuffles: whether a shuffle lets a thread write what another of its warp read before. So Triton moves what was read
            in place to those who write it: the value that is written depends on the read, which therefore is past.
    """

    def __init__(self, units: int, clock: Clock, shuffles: bool = False) -> None:
        self.clock = clock
        self.shuffles = shuffles
        self.units = units
        self.writer = np.full(units, -1, np.int64)
        self.write_time = np.zeros(units, np.int64)
        self.written = False
        self._first_reader = np.full(0, 0, np.int64)  # of all since the last barrier; made when first needed
        self._last_reader = self._read_time = self._first_reader
        self._log: list[tuple[np.ndarray, np.ndarray, int]] = []
        self.seen: list[np.ndarray] = []  # units of all reads

    def read(self, units: np.ndarray, lanes: np.ndarray) -> None:
        """Both flat, lanes ascending."""
        if self.written:
            writer = self.writer[units]
            self._check(writer >= 0, self.write_time[units], writer, writer, lanes, "read", "written")
        self._log.append((units, lanes, self.clock.now))
        self.seen.append(units)

    def write(self, units: np.ndarray, lanes: np.ndarray) -> None:
        self._note_readers()
        if self.written:
            writer = self.writer[units]
            self._check(writer >= 0, self.write_time[units], writer, writer, lanes, "written", "written")
        if len(self._first_reader):
            first, last = self._first_reader[units], self._last_reader[units]
            self._check(last >= 0, self._read_time[units], first, last, lanes, "written", "read", self.shuffles)
        self.written = True
        self.writer[units] = lanes
        self.write_time[units] = self.clock.now
        twice = self.writer[units] != lanes
        if twice.any():
            at = int(np.flatnonzero(twice)[0])
            other = self.writer[units[at]]
            raise LaneFault(int(lanes[at]), f"written here and by {self._name(other, lanes[at])} at once")

    def _check(self, touched, time, first, last, lanes, what, before, shuffles=False) -> None:
        if not touched.any():
            return
        race = touched & ~self.clock.ordered(time, first, last, lanes, shuffles)
        if race.any():
            at = int(np.flatnonzero(race)[0])
            others = [other for other in (first[at], last[at]) if other != lanes[at]]
            name = self._name(others[0], lanes[at])
            raise LaneFault(int(lanes[at]), f"{what} here and {before} by {name} without a barrier between")

    def _name(self, other: int, lane: int) -> str:
        program, thread = divmod(int(other), self.clock.threads)
        return f"thread {thread}" if program == lane // self.clock.threads else f"program {program}, thread {thread}"

    def _note_readers(self) -> None:
        if self._log and not len(self._first_reader):
            self._first_reader = np.full(self.units, np.iinfo(np.int64).max, np.int64)
            self._last_reader = np.full(self.units, -1, np.int64)
            self._read_time = np.zeros(self.units, np.int64)
        for units, lanes, time in self._log:
            first, last = self._first_reader[units], self._last_reader[units]
            # Readers before a barrier are before whatever comes: those since then stand for them.
            past = (last >= 0) & self.clock.ordered(self._read_time[units], first, last, lanes)
            first, last = np.where(past, lanes, first), np.where(past, lanes, last)
            # Of lanes that read one unit, numpy keeps what is assigned last.
            self._last_reader[units] = np.maximum(last, lanes)
            self._first_reader[units[::-1]] = np.minimum(first, lanes)[::-1]
            self._read_time[units] = time
        self._log.clear()

    @property
    def distinct_reads(self) -> int:
        """How many units were read at least once."""
        return len(np.unique(np.concatenate(self.seen))) if self.seen else 0

    @property
    def distinct_writes(self) -> int:
        return int((self.writer >= 0).sum())
