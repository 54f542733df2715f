"""Runs one launch: all threads of all programs are lanes of numpy arrays.

Threads whose ways part wait, those with the least position go first, and groups meet again where their positions do. What
a warp does together (a shuffle, a matrix product) waits for the warp, a barrier for its program.

A register holds its bits in an unsigned array (predicates: bool) of one element where all threads have the same, else of
one a thread. Arrays are never changed in place.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .counts import Counts
from .faults import Fault, LaneFault
from .memory import Global, Shared
from .parse import Instruction, Kernel, Register
from .races import WARP, Clock

MAX_STEPS = 5_000_000

Mask = np.ndarray | None  # None: all threads of the launch


@dataclass(frozen=True)
class Step:
    """One decoded instruction."""

    instruction: Instruction
    run: Callable[["Machine", Mask], None] | None  # None of control flow
    kind: str  # memory, float, special, integer or control
    section: str  # of the manual
    together: str = ""  # "warp" or "program": who must be there
    target: int | None = None  # of a branch
    exits: bool = False


@dataclass(frozen=True)
class Program:
    """A kernel whose every instruction is known."""

    kernel: Kernel
    steps: tuple[Step, ...]
    narrowest_global: int  # bytes of the narrowest access
    narrowest_shared: int


class Machine:
    """One launch of a program over a grid of one axis."""

    def __init__(
        self,
        program: Program,
        grid: int,
        arguments: list[Tensor | int],
        names: list[str],
        shared: int,
        seed: int = 0,
        detailed: bool = False,
    ) -> None:
        kernel = program.kernel
        self.program = program
        self.kernel = kernel
        self.seed = seed
        self.lanes = np.arange(grid * kernel.threads)
        self.special = {
            "%tid.x": (self.lanes % kernel.threads).astype(np.uint32),
            "%ctaid.x": (self.lanes // kernel.threads).astype(np.uint32),
            "%ntid.x": np.full(1, kernel.threads, np.uint32),
            "%nctaid.x": np.full(1, grid, np.uint32),
            "%laneid": (self.lanes % WARP).astype(np.uint32),
        }
        self.clock = Clock(grid, kernel.threads)
        self.counts = Counts(len(program.steps), detailed)
        tensors = {name: x for name, x in zip(names, arguments, strict=True) if isinstance(x, Tensor)}
        self.memory = Global(tensors, program.narrowest_global, self.clock, self.counts)
        size = max(shared, kernel.shared_bytes) if kernel.shared else 0
        self.shared = Shared(grid, size, program.narrowest_shared, self.clock, self.counts)
        self.parameters = {}
        for (name, _), x in zip(kernel.parameters, arguments, strict=True):
            self.parameters[name] = self.memory.address(x) if isinstance(x, Tensor) else x
        self.registers: list[np.ndarray | None] = [None] * len(kernel.registers)
        self.written: list[np.ndarray | bool] = [False] * len(kernel.registers)
        self.copies = Copies(len(self.lanes))
        self._at = 0

    def read(self, register: Register, mask: Mask) -> np.ndarray:
        written = self.written[register.number]
        if written is not True:
            missing = (
                self._lanes_of(mask)
                if written is False
                else self._lanes_of(~written if mask is None else mask & ~written)
            )
            if len(missing):
                raise LaneFault(int(missing[0]), f"register {register.name} is read before it is written")
            if written is False:
                return np.zeros(1, bool if register.bits == 1 else f"u{register.bits // 8}")
        return self.registers[register.number]

    def write(self, register: Register, mask: Mask, value: np.ndarray) -> None:
        """``value`` has the register's width."""
        number = register.number
        if mask is None:
            self.registers[number], self.written[number] = value, True
            return
        old, written = self.registers[number], self.written[number]
        self.registers[number] = np.where(mask, value, np.zeros(1, value.dtype) if old is None else old)
        if written is not True:
            written = mask | written
            self.written[number] = True if written.all() else written

    def _lanes_of(self, mask: Mask) -> np.ndarray:
        return self.lanes if mask is None else np.flatnonzero(mask)

    def touched(self, addresses: np.ndarray, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
        """The lanes that take part, and their addresses."""
        addresses = np.broadcast_to(addresses, self.lanes.shape)
        return (self.lanes, addresses) if mask is None else (np.flatnonzero(mask), addresses[mask])

    def spread(self, lanes: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Values of some lanes as an array over all."""
        if len(lanes) == len(self.lanes):
            return values
        result = np.zeros(len(self.lanes), values.dtype)
        result[lanes] = values
        return result

    def run(self) -> Counts:
        try:
            with np.errstate(all="ignore"):
                self._run()
            for lane in self.copies.unfinished()[:1]:
                raise LaneFault(int(lane), "ends before the wait for a cp.async")
        except LaneFault as fault:
            program, thread = divmod(fault.lane, self.kernel.threads)
            step = self.program.steps[min(self._at, len(self.program.steps) - 1)].instruction
            where = f"{self.kernel.name}, program {program}, thread {thread}: {step.text} ({step.source})"
            raise Fault(f"{where}: {fault}") from None
        return self.counts

    def _run(self) -> None:
        steps, end = self.program.steps, len(self.program.steps)
        executed = self.counts.executed
        position = np.zeros(len(self.lanes), np.int64)  # of threads that wait; that of those that run is _at
        active: Mask = None
        many = len(self.lanes)
        join = end
        ready = False  # whether all are there who must be
        apart = False
        self._at = 0
        for _ in range(MAX_STEPS):
            if apart or self._at >= join:
                apart = False
                if active is None and self._at >= end:
                    return
                group = self._next_group(position)
                if group is None:
                    return
                self._at, active, join = group
                many = len(self.lanes) if active is None else int(active.sum())
                ready = True
            step = steps[self._at]
            if step.together and not ready and (active is not None or step.instruction.guard is not None):
                position[self._lanes_of(active)] = self._at
                apart = True
                continue
            ready = False
            self.clock.now += 1
            executed[self._at] += many
            mask = self._guarded(step, active)
            if step.run is not None:
                if mask is None or mask.any():
                    step.run(self, mask)
                self._at += 1
                if self._at >= join:
                    position[self._lanes_of(active)] = self._at
                continue
            target = end if step.exits else step.target
            if mask is None:  # all of them go
                self._at = target
                continue
            stay = ~mask if active is None else active & ~mask
            position[stay] = self._at + 1
            position[mask] = target
            if active is None and not mask.any():
                self._at += 1
            else:
                apart = True
        raise LaneFault(0, f"no end after {MAX_STEPS:,} steps")

    def _guarded(self, step: Step, active: Mask) -> Mask:
        """The threads of ``active`` that execute the instruction; None if these are all threads of the launch."""
        guard = step.instruction.guard
        if guard is None:
            return active
        value = self.read(guard, active)
        value = ~value if guard.negated else value
        if active is not None:
            return active & value
        if value.all():
            return None
        return np.broadcast_to(value, self.lanes.shape)

    def _next_group(self, position: np.ndarray) -> tuple[int, Mask, int] | None:
        """Where to go on, who, and where the next others wait. A shuffle waits for its warp, a barrier for its program."""
        end = len(self.program.steps)
        while True:
            waiting = [int(at) for at in np.unique(position) if at < end]
            if not waiting:
                return None
            for at, following in zip(waiting, [*waiting[1:], end], strict=True):
                here = position == at
                step = self.program.steps[at]
                if step.together:
                    guard = step.instruction.guard
                    if guard is not None:
                        self._at = at
                        off = here & ~np.broadcast_to(self._guarded(step, here), here.shape)
                        if off.any():
                            position[off] = at + 1
                            break
                    group = WARP if step.together == "warp" else self.kernel.threads
                    here = here & np.repeat(here.reshape(-1, group).all(1), group)
                    if not here.any():
                        continue
                return at, None if here.all() else here, following
            else:
                self._refuse_waiting(position, waiting[0])

    def _refuse_waiting(self, position: np.ndarray, at: int) -> None:
        """Everybody waits, or has ended."""
        step = self.program.steps[at]
        group = WARP if step.together == "warp" else self.kernel.threads
        lane = int(np.flatnonzero(position == at)[0])
        first = lane // group * group
        missing = first + int(np.flatnonzero(position[first : first + group] != at)[0])
        self._at = at
        thread = missing % self.kernel.threads
        where = position[missing]
        other = self.program.steps[where].instruction if where < len(self.program.steps) else None
        place = "has ended" if other is None else f"waits at {other.text} ({other.source})"
        raise LaneFault(lane, f"not all threads of the {step.together} come here: thread {thread} {place}")


class Copies:
    """cp.async that were issued and not waited for, in the groups of each thread."""

    def __init__(self, lanes: int) -> None:
        self.group = np.zeros(lanes, np.int64)  # the one that a thread's next copy joins
        self._pending: list[tuple[np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]] = []

    def issue(self, lanes: np.ndarray, addresses: np.ndarray, width: int, words: np.ndarray) -> None:
        self._pending.append((lanes, addresses, width, words, self.group[lanes]))

    def wait(self, shared: Shared, mask: Mask, most: float) -> None:
        """Finish all but the ``most`` latest groups of each thread."""
        kept = []
        for lanes, addresses, width, words, groups in self._pending:
            done = groups < self.group[lanes] - most if math.isfinite(most) else np.ones(len(lanes), bool)
            if mask is not None:
                done &= mask[lanes]
            if done.any():
                shared.end_copy(addresses[done], width, lanes[done], words[done])
            if not done.all():
                kept.append(
                    tuple(x if isinstance(x, int) else x[~done] for x in (lanes, addresses, width, words, groups))
                )
        self._pending = kept

    def unfinished(self) -> np.ndarray:
        return np.concatenate([lanes for lanes, *_ in self._pending]) if self._pending else np.zeros(0, np.int64)
