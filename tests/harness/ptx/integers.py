"""Integers, predicates, comparisons, selections, moves."""

import numpy as np

from .arithmetic import flush, widen
from .faults import LaneFault
from .operands import DTYPES, Kernel, Run, bits_of, compute, instruction, reader, writer
from .parse import Immediate, Instruction, UnknownPtx

INT = r"(?P<kind>[su](?:16|32|64))"
BITS = r"(?P<kind>b(?:16|32|64))"


def _wide(kind: str) -> np.dtype:
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits_of(kind) // 4}")


@instruction(rf"(?P<op>add|sub|min|max)\.{INT}", "Integer Arithmetic Instructions: add, sub, min, max", "integer")
def _(statement: Instruction, kernel: Kernel, op: str, kind: str) -> Run:
    function = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}[op]
    return compute(statement, kernel, kind, [kind, kind], function)


@instruction(rf"(?P<op>neg|abs)\.{INT}", "Integer Arithmetic Instructions: neg, abs", "integer")
def _(statement: Instruction, kernel: Kernel, op: str, kind: str) -> Run:
    return compute(statement, kernel, kind, [kind], np.negative if op == "neg" else np.abs)


def _high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a product."""
    size = a.dtype.itemsize
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}")
        return (a.astype(wide) * b.astype(wide) >> np.array(8 * size, wide)).astype(a.dtype)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    cross = (x >> shift) * (y & low) + ((x & low) * (y & low) >> shift)
    other = (x & low) * (y >> shift) + (cross & low)
    high = (x >> shift) * (y >> shift) + (cross >> shift) + (other >> shift)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


@instruction(rf"mul\.(?P<part>lo|hi|wide)\.{INT}", "Integer Arithmetic Instructions: mul", "integer")
def _(statement: Instruction, kernel: Kernel, part: str, kind: str) -> Run:
    if part == "wide":
        wide = _wide(kind)
        result = f"{kind[0]}{8 * wide.itemsize}"
        return compute(statement, kernel, result, [kind, kind], lambda a, b: a.astype(wide) * b.astype(wide))
    return compute(statement, kernel, kind, [kind, kind], np.multiply if part == "lo" else _high_product)


@instruction(rf"mad\.(?P<part>lo|wide)\.{INT}", "Integer Arithmetic Instructions: mad", "integer")
def _(statement: Instruction, kernel: Kernel, part: str, kind: str) -> Run:
    if part == "wide":
        wide = _wide(kind)
        result = f"{kind[0]}{8 * wide.itemsize}"
        sources = [kind, kind, result]
        return compute(statement, kernel, result, sources, lambda a, b, c: a.astype(wide) * b.astype(wide) + c)
    return compute(statement, kernel, kind, [kind, kind, kind], lambda a, b, c: a * b + c)


def _divide(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quotient and remainder, rounded towards zero; by magnitudes, because the least number has none in its type."""
    if a.dtype.kind == "u":
        return a // b, a % b
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    x, y = (np.where(v < 0, -v, v).view(unsigned) for v in np.broadcast_arrays(a, b))
    quotient, remainder = (x // y).view(a.dtype), (x % y).view(a.dtype)
    return np.where((a < 0) != (b < 0), -quotient, quotient), np.where(a < 0, -remainder, remainder)


@instruction(rf"(?P<op>div|rem)\.{INT}", "Integer Arithmetic Instructions: div, rem", "integer")
def _(statement: Instruction, kernel: Kernel, op: str, kind: str) -> Run:
    """By zero the manual leaves the result open, so that is refused."""
    one, two = (reader(x, kind, kernel) for x in statement.operands[1:])
    write = writer(statement.operands[0], kind)

    def run(machine, mask):
        divisor = two(machine, mask)
        zero = divisor == 0
        if zero.any():
            where = np.flatnonzero(np.broadcast_to(zero, machine.lanes.shape) & (True if mask is None else mask))
            if len(where):
                raise LaneFault(int(where[0]), "division by zero")
            divisor = np.where(zero, divisor.dtype.type(1), divisor)
        write(machine, mask, _divide(one(machine, mask), divisor)[op == "rem"])

    return run


@instruction(r"bfe\.(?P<kind>[su](?:32|64))", "Integer Arithmetic Instructions: bfe", "integer")
def _(statement: Instruction, kernel: Kernel, kind: str) -> Run:
    width = bits_of(kind)

    def extract(a, start, length):
        """The field shifted to the top, and down again with or without its sign."""
        start, length = start & np.uint32(0xFF), length & np.uint32(0xFF)
        if kind[0] == "s" and (start + length > width).any():
            raise UnknownPtx("bfe of bits that are not there")
        up = np.clip(width - (start + length).astype(np.int64), 0, width - 1)
        down = np.clip(width - length.astype(np.int64), 0, width - 1)
        field = (a.view(f"u{width // 8}") << up.astype(f"u{width // 8}")).view(a.dtype) >> down.astype(a.dtype)
        return np.where(length == 0, a.dtype.type(0), field)

    return compute(statement, kernel, kind, [kind, "u32", "u32"], extract)


@instruction(
    r"(?P<op>and|or|xor|not)\.(?P<kind>pred|b16|b32|b64)", "Logic and Shift Instructions: and, or, xor, not", "integer"
)
def _(statement: Instruction, kernel: Kernel, op: str, kind: str) -> Run:
    if op == "not":
        return compute(statement, kernel, kind, [kind], np.invert)
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op]
    return compute(statement, kernel, kind, [kind, kind], function)


@instruction(r"(?P<op>shl|shr)\.(?P<kind>[bus](?:16|32|64))", "Logic and Shift Instructions: shl, shr", "integer")
def _(statement: Instruction, kernel: Kernel, op: str, kind: str) -> Run:
    """Amounts beyond the width count as the width."""
    width = bits_of(kind)

    def shift(a, amount):
        within = np.minimum(amount, np.uint32(width - 1)).astype(a.dtype)
        result = a << within if op == "shl" else a >> within
        return result if op == "shr" and kind[0] == "s" else np.where(amount >= width, a.dtype.type(0), result)

    return compute(statement, kernel, kind, [kind, "u32"], shift)


@instruction(r"prmt\.b32", "Data Movement and Conversion Instructions: prmt", "integer")
def _(statement: Instruction, kernel: Kernel) -> Run:
    def permute(a, b, selector):
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros(1, np.uint32)
        for i in range(4):
            pick = selector >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64)) & np.uint64(0xFF)).astype(
                np.uint32
            )
            byte = np.where(pick & np.uint32(8), np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0)), byte)
            result = result | byte << np.uint32(8 * i)
        return result

    return compute(statement, kernel, "b32", ["b32", "b32", "b32"], permute)


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _comparison(op: str, kind: str, ftz: bool):
    """A function of two operands, float ones as numbers. Unordered ones (equ, ...) hold where one is NaN."""
    if kind[0] in "bus" and kind != "bf16":
        if op in ("lo", "ls", "hi", "hs") and kind[0] == "s" or op not in _COMPARE:
            raise UnknownPtx(f"comparison {op} of .{kind}")
        return _COMPARE[op]

    def compare(a, b):
        if kind == "bf16":
            a, b = widen(a), widen(b)
        if ftz:
            a, b = flush(a), flush(b)
        unordered = np.isnan(a) | np.isnan(b)
        if op in ("num", "nan"):
            return unordered if op == "nan" else ~unordered
        if op in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
            return _COMPARE[op[:2]](a, b) | unordered
        return _COMPARE[op](a, b) & ~unordered

    return compare


_OPS = "eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan"
_SETP = "Comparison and Selection Instructions: setp"


@instruction(rf"setp\.(?P<op>{_OPS})\.(?P<kind>[bus](?:16|32|64))", _SETP, "integer")
@instruction(rf"setp\.(?P<op>{_OPS})(?P<ftz>\.ftz)?\.(?P<kind>f16|f32|f64|bf16)", _SETP, "float")
def _(statement: Instruction, kernel: Kernel, op: str, kind: str, ftz: str | None = None) -> Run:
    return compute(statement, kernel, "pred", [kind, kind], _comparison(op, kind, bool(ftz)))


@instruction(
    rf"setp\.(?P<op>{_OPS})\.(?P<join>and|or|xor)(?P<ftz>\.ftz)?\.(?P<kind>[bus](?:16|32|64)|f32|f64)", _SETP, "integer"
)
def _(statement: Instruction, kernel: Kernel, op: str, join: str, ftz: str | None, kind: str) -> Run:
    compare = _comparison(op, kind, bool(ftz))
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[join]
    return compute(statement, kernel, "pred", [kind, kind, "pred"], lambda a, b, c: combine(compare(a, b), c))


@instruction(rf"setp\.(?P<op>{_OPS})\.(?P<kind>f16|bf16)x2", "Half Precision Comparison Instructions: setp", "float")
def _(statement: Instruction, kernel: Kernel, op: str, kind: str) -> Run:
    """``%p|%q``: of the lower and of the upper halves."""
    compare = _comparison(op, kind, False)
    pair, *sources = statement.operands
    one, two = (reader(x, "b32", kernel) for x in sources)
    writes = [writer(x, "pred") for x in pair]

    def run(machine, mask):
        a, b = one(machine, mask), two(machine, mask)
        for write, shift in zip(writes, (0, 16), strict=True):
            halves = [(x >> np.uint32(shift)).astype(np.uint16).view(DTYPES[kind]) for x in (a, b)]
            write(machine, mask, compare(*halves))

    return run


@instruction(r"selp\.(?P<kind>[bus](?:16|32|64)|f32|f64)", "Comparison and Selection Instructions: selp", "integer")
def _(statement: Instruction, kernel: Kernel, kind: str) -> Run:
    return compute(statement, kernel, kind, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))


@instruction(
    r"mov\.(?P<kind>pred|[bus](?:16|32|64)|f32|f64)", "Data Movement and Conversion Instructions: mov", "integer"
)
def _(statement: Instruction, kernel: Kernel, kind: str) -> Run:
    """Also to and from parts: ``mov.b32 {%rs1, %rs2}, %r1``, the lowest first.

    LLVM packs registers that nothing writes where it drops that part of the pair later. They are NaN here, and anywhere else
    an error.
    """
    target, source = statement.operands
    if isinstance(target, tuple):
        part = f"b{bits_of(kind) // len(target)}"
        read, writes = reader(source, f"b{bits_of(kind)}", kernel), [writer(x, part) for x in target]

        def unpack(machine, mask):
            value = read(machine, mask)
            for i, write in enumerate(writes):
                write(machine, mask, (value >> value.dtype.type(i * bits_of(part))).astype(DTYPES[part]))

        return unpack
    if isinstance(source, tuple):
        part, dtype = f"b{bits_of(kind) // len(source)}", DTYPES[f"b{bits_of(kind)}"]
        nan = Immediate((1 << bits_of(part) - 1) - 1)
        reads = [reader(nan if x in kernel.undefined else x, part, kernel) for x in source]
        write = writer(target, kind)

        def pack(machine, mask):
            value = np.zeros(1, dtype)
            for i, read in enumerate(reads):
                value = value | read(machine, mask).astype(dtype) << dtype(i * bits_of(part))
            write(machine, mask, value)

        return pack
    return compute(statement, kernel, kind, [kind], lambda a: a)


@instruction(
    r"cvt\.(?P<to>[us](?:8|16|32|64))\.(?P<kind>[us](?:8|16|32|64))",
    "Data Movement and Conversion Instructions: cvt",
    "integer",
)
def _(statement: Instruction, kernel: Kernel, to: str, kind: str) -> Run:
    dtype = DTYPES[to]
    return compute(statement, kernel, to, [kind], lambda a: a.astype(dtype))


@instruction(r"cvta\.to\.global\.u64", "Data Movement and Conversion Instructions: cvta", "integer")
def _(statement: Instruction, kernel: Kernel) -> Run:
    """Generic addresses of global memory are those of global memory."""
    return compute(statement, kernel, "u64", ["u64"], lambda a: a)
