"""Loads and stores, asynchronous copies, shuffles, barriers and branches."""

import math

import numpy as np

from .faults import LaneFault
from .machine import Machine, Mask
from .operands import DTYPES, Kernel, Run, address, bits_of, instruction, reader, writer
from .parse import Address, Immediate, Instruction, Operand, Symbol, UnknownPtx
from .races import WARP

KIND = r"(?P<kind>[bus](?:8|16|32|64)|f32|f64)"
SHARED = r"shared(?:::cta)?"


@instruction(
    r"ld\.param\.(?P<kind>[bus](?:8|16|32|64)|f32|f64)", "Data Movement and Conversion Instructions: ld", "parameter"
)
def _(statement: Instruction, kernel: Kernel, kind: str) -> Run:
    """Parameters lie in constant memory, where other instructions read them: nothing that counts."""
    target, source = statement.operands
    write, size = writer(target, kind), bits_of(kind) // 8
    if not isinstance(source, Address) or not isinstance(source.base, Symbol) or source.offset:
        raise UnknownPtx("a part of a parameter")
    name = source.base.name
    if dict(kernel.parameters).get(name) != size:
        raise UnknownPtx(f"{name} is no parameter of {size} bytes")

    def run(machine: Machine, mask: Mask) -> None:
        value = machine.parameters[name]
        bits = np.array([value], DTYPES[kind]).view(f"u{size}") if isinstance(value, float) else None
        write(machine, mask, np.array([value & (1 << 8 * size) - 1], f"u{size}") if bits is None else bits)

    return run


def _columns(words: np.ndarray, kind: str, count: int) -> list[np.ndarray]:
    """The values of ``kind`` in each lane's word or row of words."""
    values = np.ascontiguousarray(words).view(f"u{bits_of(kind) // 8}").reshape(len(words), count)
    return [np.ascontiguousarray(values[:, i]) for i in range(count)]


def _words(values: list[np.ndarray], lanes: int, width: int) -> np.ndarray:
    """The inverse of :func:`_columns`."""
    rows = np.stack([np.broadcast_to(value, (lanes,)) for value in values], axis=1)
    words = np.ascontiguousarray(rows).view(f"u{min(width, 8)}")
    return words if width > 8 else words[:, 0]


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


@instruction(
    rf"ld\.(?P<space>global|{SHARED})(?P<vector>\.v2|\.v4)?\.{KIND}",
    "Data Movement and Conversion Instructions: ld",
    "memory",
)
def _(statement: Instruction, kernel: Kernel, space: str, vector: str | None, kind: str) -> Run:
    targets, where = _parts(statement.operands[0]), address(statement.operands[1], kernel)
    _check_parts(targets, vector)
    writes = [writer(x, kind) for x in targets]
    width = len(targets) * bits_of(kind) // 8

    def run(machine: Machine, mask: Mask) -> None:
        lanes, addresses = machine.touched(where(machine, mask), mask)
        memory = machine.memory if space == "global" else machine.shared
        words = memory.load(addresses, width, lanes)
        for write, value in zip(writes, _columns(words, kind, len(writes)), strict=True):
            write(machine, mask, machine.spread(lanes, value))

    return run


@instruction(
    rf"st\.(?P<space>global|{SHARED})(?P<vector>\.v2|\.v4)?\.{KIND}",
    "Data Movement and Conversion Instructions: st",
    "memory",
)
def _(statement: Instruction, kernel: Kernel, space: str, vector: str | None, kind: str) -> Run:
    where, sources = address(statement.operands[0], kernel), _parts(statement.operands[1])
    _check_parts(sources, vector)
    raw = f"b{bits_of(kind)}"
    reads = [reader(x, raw, kernel) for x in sources]
    width = len(sources) * bits_of(kind) // 8

    def run(machine: Machine, mask: Mask) -> None:
        lanes, addresses = machine.touched(where(machine, mask), mask)
        values = [read(machine, mask) for read in reads]
        values = [value[lanes] if len(value) > 1 else value for value in values]
        memory = machine.memory if space == "global" else machine.shared
        memory.store(addresses, width, lanes, _words(values, len(lanes), width))

    return run


def _check_parts(parts: tuple[Operand, ...], vector: str | None) -> None:
    if len(parts) != int((vector or ".v1")[2]):
        raise UnknownPtx(f"{len(parts)} registers of a {vector or 'single'} access")


_COPY = "Data Movement and Conversion Instructions: cp.async"


@instruction(r"cp\.async\.(?P<level>ca|cg)\.shared\.global", _COPY, "memory")
def _(statement: Instruction, kernel: Kernel, level: str) -> Run:
    """Bytes beyond the source's size, the last operand, are zeros. Global memory is read as the instruction runs, shared
    memory written when the thread waits for the copy's group."""
    target, source = (address(x, kernel) for x in statement.operands[:2])
    width = statement.operands[2]
    if not isinstance(width, Immediate) or width.value not in ((16,) if level == "cg" else (4, 8, 16)):
        raise UnknownPtx("a copy of such a size")
    width = width.value
    size = reader(statement.operands[3], "u32", kernel) if len(statement.operands) > 3 else None

    def run(machine: Machine, mask: Mask) -> None:
        lanes, targets = machine.touched(target(machine, mask), mask)
        _, sources = machine.touched(source(machine, mask), mask)
        words = np.zeros((len(lanes), width // 8) if width > 8 else len(lanes), f"u{min(width, 8)}")
        there = np.ones(len(lanes), bool)
        if size is not None:
            sizes = np.broadcast_to(size(machine, mask), machine.lanes.shape)[lanes]
            odd = (sizes != 0) & (sizes != width)
            if odd.any():
                raise LaneFault(int(lanes[np.flatnonzero(odd)[0]]), "a copy of a part of its size")
            there = sizes == width
        if there.any():
            words[there] = machine.memory.load(sources[there], width, lanes[there])
        machine.shared.begin_copy(targets, width, lanes)
        machine.copies.issue(lanes, targets, width, words)

    return run


@instruction(r"cp\.async\.commit_group", _COPY + ".commit_group", "control")
def _(statement: Instruction, kernel: Kernel) -> Run:
    def run(machine: Machine, mask: Mask) -> None:
        machine.copies.group[slice(None) if mask is None else mask] += 1

    return run


@instruction(r"cp\.async\.(?P<all>wait_all|wait_group)", _COPY + ".wait_group", "control")
def _(statement: Instruction, kernel: Kernel, all: str) -> Run:
    most = math.inf if all == "wait_all" else statement.operands[0].value

    def run(machine: Machine, mask: Mask) -> None:
        machine.copies.wait(machine.shared, mask, most)

    return run


@instruction(
    r"(?:bar|barrier)\.sync(?:\.aligned)?|barrier\.cta\.sync(?:\.aligned)?",
    "Parallel Synchronization and Communication Instructions: bar",
    "control",
    together="program",
)
def _(statement: Instruction, kernel: Kernel) -> Run:
    """Of the whole program, all of it at one instruction, as Triton's code has it."""
    if statement.operands[0] != Immediate(0) or statement.operands[1:] not in ((), (Immediate(kernel.threads),)):
        raise UnknownPtx("a barrier of a part of the program")

    def run(machine: Machine, mask: Mask) -> None:
        programs = machine.lanes[:: kernel.threads] // kernel.threads
        machine.clock.barrier[programs if mask is None else programs[mask[:: kernel.threads]]] = machine.clock.now

    return run


@instruction(
    r"bar\.warp\.sync",
    "Parallel Synchronization and Communication Instructions: bar.warp.sync",
    "control",
    together="warp",
)
def _(statement: Instruction, kernel: Kernel) -> Run:
    _whole_warp(statement.operands[0])

    def run(machine: Machine, mask: Mask) -> None:
        warps = machine.lanes[::WARP] // WARP
        warps = warps if mask is None else warps[mask[::WARP]]
        machine.clock.warp_barrier[warps] = machine.clock.now

    return run


def _whole_warp(operand: Operand) -> None:
    if operand not in (Immediate(-1), Immediate(0xFFFFFFFF)):
        raise UnknownPtx("a part of a warp")


@instruction(
    r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32",
    "Data Movement and Conversion Instructions: shfl.sync",
    "memory",
    together="warp",
)
def _(statement: Instruction, kernel: Kernel, mode: str) -> Run:
    """From lane j of the warp, where j is in range; else, and to the predicate, what the thread has itself, and false."""
    targets = _parts(statement.operands[0])
    write = writer(targets[0], "b32")
    write_valid = writer(targets[1], "pred") if len(targets) > 1 else None
    value, amount, limits = (reader(x, "u32", kernel) for x in statement.operands[1:4])
    _whole_warp(statement.operands[4])

    def run(machine: Machine, mask: Mask) -> None:
        lane = machine.lanes % WARP
        b, c = (read(machine, mask).astype(np.int64) for read in (amount, limits))
        b, clamp, segment = b & 31, c & 31, c >> 8 & 31
        first, last = lane & segment, lane & segment | clamp & ~segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}[mode]
        valid = source >= last if mode == "up" else source <= last
        source = np.where(valid, source, lane)
        values = np.broadcast_to(value(machine, mask), lane.shape)
        warps = machine.lanes[::WARP] // WARP
        machine.clock.shuffle[warps if mask is None else warps[mask[::WARP]]] = machine.clock.now
        write(machine, mask, values[machine.lanes - lane + source])
        if write_valid is not None:
            write_valid(machine, mask, valid)

    return run


@instruction(r"bra(?:\.uni)?", "Control Flow Instructions: bra", "control")
@instruction(r"ret|exit", "Control Flow Instructions: ret, exit", "control")
def _(statement: Instruction, kernel: Kernel) -> None:
    """The machine's own."""
