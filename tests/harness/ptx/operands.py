"""How instructions read and write registers, and the table that they enter themselves in."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .machine import Machine, Mask, Program, Step
from .parse import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol, UnknownPtx, parse

DTYPES: dict[str, type] = {
    **{f"{kind}{8 * n}": np.dtype(f"u{n}").type for kind in "bu" for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}").type for n in (1, 2, 4, 8)},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "pred": np.bool_,
}

Read = Callable[[Machine, Mask], np.ndarray]
Write = Callable[[Machine, Mask, np.ndarray], None]
Run = Callable[[Machine, Mask], None]


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else 8 * np.dtype(DTYPES[kind]).itemsize


def constant(value: int, dtype: type) -> np.ndarray:
    """An array of one element with the bits of an integer."""
    if dtype is np.bool_:
        return np.array([bool(value)])
    size = np.dtype(dtype).itemsize
    return np.array([value & (1 << 8 * size) - 1], f"u{size}").view(dtype)


def reader(operand: Operand, kind: str, kernel: Kernel) -> Read:
    """A function that returns the operand as PTX's type ``kind``; what is wider is truncated, as st and cvt have it."""
    dtype = DTYPES[kind]
    if isinstance(operand, Immediate):
        if operand.float_bits and operand.float_bits != bits_of(kind):
            raise UnknownPtx(f"a float of {operand.float_bits} bits as .{kind}")
        if not operand.float_bits and np.dtype(dtype).kind == "f":
            raise UnknownPtx(f"the integer {operand.value} as .{kind}")
        fixed = constant(operand.value, dtype)
        return lambda machine, mask: fixed
    if isinstance(operand, Symbol):
        if operand.name in kernel.shared:
            fixed = constant(kernel.shared[operand.name], dtype)
            return lambda machine, mask: fixed
        if operand.name not in ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "%laneid") or dtype is not np.uint32:
            raise UnknownPtx(f"{operand.name} as .{kind}")
        return lambda machine, mask: machine.special[operand.name]
    if not isinstance(operand, Register):
        raise UnknownPtx(f"{operand} as .{kind}")
    if operand.bits < bits_of(kind):
        raise UnknownPtx(f"{operand.name} of {operand.bits} bits as .{kind}")
    if operand.negated:
        return lambda machine, mask: ~machine.read(operand, mask)
    if operand.bits == bits_of(kind):
        return lambda machine, mask: machine.read(operand, mask).view(dtype)
    raw = f"u{bits_of(kind) // 8}"
    return lambda machine, mask: machine.read(operand, mask).astype(raw).view(dtype)


def writer(operand: Operand, kind: str) -> Write:
    """A function that writes a result of PTX's type ``kind``; it is extended to a wider register by its sign, if it has one."""
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda machine, mask, value: None
    if not isinstance(operand, Register) or operand.bits < bits_of(kind):
        raise UnknownPtx(f"{operand} cannot hold a .{kind}")
    if operand.bits == 1:
        return lambda machine, mask, value: machine.write(operand, mask, value)
    raw = np.dtype(f"u{operand.bits // 8}")
    if operand.bits == bits_of(kind):
        return lambda machine, mask, value: machine.write(operand, mask, value.view(raw))
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{operand.bits // 8}")
    narrow = DTYPES[kind]
    return lambda machine, mask, value: machine.write(operand, mask, value.view(narrow).astype(wide).view(raw))


def address(operand: Operand, kernel: Kernel) -> Read:
    """A function that returns addresses as int64."""
    if not isinstance(operand, Address):
        raise UnknownPtx(f"{operand} as an address")
    offset = operand.offset
    if operand.base is None:
        return lambda machine, mask: np.full(1, offset)
    if isinstance(operand.base, Symbol):
        fixed = np.full(1, kernel.shared[operand.base.name] + offset)
        return lambda machine, mask: fixed
    kind = f"u{operand.base.bits}"
    base = reader(operand.base, kind, kernel)
    return lambda machine, mask: base(machine, mask).astype(np.int64) + offset


def compute(
    instruction: Instruction, kernel: Kernel, result: str, sources: list[str], function: Callable[..., np.ndarray]
) -> Run:
    """An instruction that reads some operands, computes, and writes one."""
    if len(instruction.operands) != 1 + len(sources):
        raise UnknownPtx(f"{len(instruction.operands)} operands instead of {1 + len(sources)}")
    reads = [reader(x, kind, kernel) for x, kind in zip(instruction.operands[1:], sources, strict=True)]
    write = writer(instruction.operands[0], result)
    if len(reads) == 1:
        (one,) = reads
        return lambda machine, mask: write(machine, mask, function(one(machine, mask)))
    if len(reads) == 2:
        one, two = reads
        return lambda machine, mask: write(machine, mask, function(one(machine, mask), two(machine, mask)))
    return lambda machine, mask: write(machine, mask, function(*(read(machine, mask) for read in reads)))


@dataclass(frozen=True)
class Row:
    """One entry of the table: which opcodes, where the manual says what they do, and what builds their function."""

    opcodes: re.Pattern[str]
    section: str
    kind: str
    build: Callable[..., Run | None]
    together: str


TABLE: list[Row] = []


def instruction(opcodes: str, section: str, kind: str, together: str = "") -> Callable:
    """Enters a function in the table.

    Args:
        opcodes: a pattern of whole opcodes, their modifiers among them: what it does not name is unknown.
        section: of the manual (Parallel Thread Execution ISA, chapter "Instruction Set"), by its title; the numbers of
            sections differ between versions.
        kind: memory, float, special, tensor, integer or control, for the counts.
        together: "warp" or "program" where all of its threads must be there.
    """

    def enter(build: Callable[..., Run | None]) -> Callable[..., Run | None]:
        TABLE.append(Row(re.compile(opcodes), section, kind, build, together))
        return build

    return enter


def decode(statement: Instruction, kernel: Kernel) -> Step:
    for row in TABLE:
        if found := row.opcodes.fullmatch(statement.opcode):
            try:
                run = row.build(statement, kernel, **found.groupdict())
            except UnknownPtx as problem:
                raise UnknownPtx(f"{kernel.name}, {statement.source}: {statement.text}: {problem}") from None
            target = None
            if row.kind == "control" and run is None and statement.operands:
                target = kernel.labels[statement.operands[0].name]
            exits = run is None and target is None
            return Step(statement, run, row.kind, row.section, row.together, target, exits)
    raise UnknownPtx(f"{kernel.name}, {statement.source}: {statement.text}: the instruction is not known")


def _narrowest(kernel: Kernel, space: str) -> int:
    """Bytes of the narrowest access to a memory; 16 without any."""
    widths = [16]
    for statement in kernel.code:
        if found := re.fullmatch(rf"(?:ld|st)\.{space}.*?(?:\.v(\d))?\.[a-z]+(\d+)", statement.opcode):
            widths.append(int(found[1] or 1) * int(found[2]) // 8)
        elif statement.opcode.startswith(("cp.async.ca.", "cp.async.cg.")):
            widths.append(statement.operands[2].value)
    return min(widths)


@functools.lru_cache(maxsize=512)
def assemble(ptx: str) -> Program:
    """PTX text, decoded; raises UnknownPtx for what the table does not have."""
    kernel = parse(ptx)
    steps = tuple(decode(statement, kernel) for statement in kernel.code)
    return Program(kernel, steps, _narrowest(kernel, "global"), _narrowest(kernel, "shared"))
