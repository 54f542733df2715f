"""Floating-point arithmetic and conversions.

``add`` and ``mul`` without a rounding mode may be contracted to ``fma`` by the assembler; here they round each.
"""

import numpy as np

from . import arithmetic
from .arithmetic import flush, to_bfloat16, widen
from .machine import Machine, Mask
from .operands import DTYPES, Kernel, Run, bits_of, compute, instruction, reader, writer
from .parse import Instruction

FTZ = r"(?P<ftz>\.ftz)?"


def _ftz(function, ftz: str | None):
    """Subnormal operands and results as zeros, where the opcode says so."""
    return (lambda *x: flush(function(*map(flush, x)))) if ftz else function


_ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": arithmetic.fma,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.fmin,
    "max": np.fmax,
    "min.NaN": np.minimum,
    "max.NaN": np.maximum,
}
_OPERANDS = {"fma": 3, "neg": 1, "abs": 1}


def _zeros_in_order(op: str):
    """min and max hold -0 to be less than +0; of two NaN, or with .NaN of one, the result is the canonical NaN."""
    pick, first = _ARITHMETIC[op], np.bitwise_or if op.startswith("min") else np.bitwise_and

    def ordered(a, b):
        raw = f"u{a.dtype.itemsize}"
        result = np.where((a == 0) & (b == 0), first(a.view(raw), b.view(raw)).view(a.dtype), pick(a, b))
        return np.where(np.isnan(result), a.dtype.type(np.nan), result)

    return ordered


_FLOAT = "Floating Point Instructions: add, sub, mul, neg, abs, min, max, fma"


@instruction(rf"(?P<op>add|sub|mul)(?:\.rn)?{FTZ}\.(?P<kind>f32|f64)", _FLOAT, "float")
@instruction(rf"(?P<op>fma)\.rn{FTZ}\.(?P<kind>f32|f64)", _FLOAT, "float")
@instruction(rf"(?P<op>neg|abs){FTZ}\.(?P<kind>f32|f64)", _FLOAT, "float")
@instruction(r"(?P<op>(?:min|max)(?:\.NaN)?)(?P<ftz>\.ftz)?\.(?P<kind>f32|f64)", _FLOAT, "float")
@instruction(r"(?P<op>min|max)(?P<ftz>\.ftz)(?P<nan>\.NaN)\.(?P<kind>f32)", _FLOAT, "float")
def _(statement: Instruction, kernel: Kernel, op: str, kind: str, ftz: str | None, nan: str = "") -> Run:
    function = _zeros_in_order(op + nan) if op[:3] in ("min", "max") else _ARITHMETIC[op]
    return compute(statement, kernel, kind, [kind] * _OPERANDS.get(op, 2), _ftz(function, ftz))


def _half(op: str, kind: str):
    """A function of 16-bit words of float16 or bfloat16."""
    if op in ("neg", "abs"):
        sign = np.uint16(0x8000)
        return (lambda a: a ^ sign) if op == "neg" else (lambda a: a & ~sign)
    if kind == "bf16":
        if op == "fma":
            return arithmetic.bfloat16_fma
        function = _zeros_in_order(op) if op[:3] in ("min", "max") else _ARITHMETIC[op]
        # Sums and products of two bfloat16 lose bits in float32: float64 has room for all but what rounds to odd.
        if op in ("add", "sub"):
            one = np.full(1, 0x3F80, np.uint16)
            return lambda a, b: arithmetic.bfloat16_fma(a, one, b if op == "add" else b ^ np.uint16(0x8000))
        return lambda a, b: to_bfloat16(function(widen(a).astype(np.float64), widen(b).astype(np.float64)))
    function = _zeros_in_order(op) if op[:3] in ("min", "max") else _ARITHMETIC[op]
    return lambda *x: function(*(v.view(np.float16) for v in x)).view(np.uint16)


def _packed(function):
    """The same of both halves of a 32-bit word."""

    def both(*x):
        low, high = (function(*((v >> np.uint32(s)).astype(np.uint16) for v in x)).astype(np.uint32) for s in (0, 16))
        return low | high << np.uint32(16)

    return both


_HALF = "Half Precision Floating Point Instructions: add, sub, mul, fma, neg, abs, min, max"


@instruction(r"(?P<op>add|sub|mul)(?:\.rn)?\.(?P<kind>f16|bf16)(?P<two>x2)?", _HALF, "float")
@instruction(r"(?P<op>fma)\.rn\.(?P<kind>f16|bf16)(?P<two>x2)?", _HALF, "float")
@instruction(r"(?P<op>neg|abs)\.(?P<kind>f16|bf16)(?P<two>x2)?", _HALF, "float")
@instruction(r"(?P<op>(?:min|max)(?:\.NaN)?)\.(?P<kind>f16|bf16)(?P<two>x2)?", _HALF, "float")
def _(statement: Instruction, kernel: Kernel, op: str, kind: str, two: str | None) -> Run:
    function = _half(op, kind)
    word = "b32" if two else "b16"
    return compute(statement, kernel, word, [word] * _OPERANDS.get(op, 2), _packed(function) if two else function)


@instruction(
    rf"(?P<op>div|rcp|sqrt)\.rn{FTZ}\.(?P<kind>f32|f64)", "Floating Point Instructions: div, rcp, sqrt", "special"
)
def _(statement: Instruction, kernel: Kernel, op: str, ftz: str | None, kind: str) -> Run:
    function = {"div": np.divide, "rcp": lambda a: a.dtype.type(1) / a, "sqrt": np.sqrt}[op]
    return compute(statement, kernel, kind, [kind] * (2 if op == "div" else 1), _ftz(function, ftz))


def _approximate(statement: Instruction, kernel: Kernel, ftz: str | None, function, bound, operands: int = 1) -> Run:
    """``function`` in float64, moved within ``bound``, which is given the operands."""
    reads = [reader(x, "f32", kernel) for x in statement.operands[1:]]
    write = writer(statement.operands[0], "f32")
    assert len(reads) == operands

    def run(machine: Machine, mask: Mask) -> None:
        x = [read(machine, mask) for read in reads]
        x = list(map(flush, x)) if ftz else x
        wide = [v.astype(np.float64) for v in x]
        result = arithmetic.approximate(function(*wide), arithmetic.noise(machine.seed, *x), **bound(*wide))
        write(machine, mask, flush(result) if ftz else result)

    return run


def _exp2(x: np.ndarray) -> np.ndarray:
    return np.where(x < -200, 0.0, np.exp2(np.maximum(x, -200)))


@instruction(rf"ex2\.approx{FTZ}\.f32", "Floating Point Instructions: ex2", "special")
def _(statement: Instruction, kernel: Kernel, ftz: str | None) -> Run:
    """2 units in the last place; 2^0 is 1."""
    return _approximate(statement, kernel, ftz, _exp2, lambda x: {"ulps": np.where(x == 0, 0, 2)})


@instruction(rf"lg2\.approx{FTZ}\.f32", "Floating Point Instructions: lg2", "special")
def _(statement: Instruction, kernel: Kernel, ftz: str | None) -> Run:
    """2^-22: in itself between 1/2 and 2, where the logarithm is small, and relative elsewhere."""

    def bound(x):
        near_one = (x > 0.5) & (x < 2)
        return {"absolute": np.where(near_one, 2.0**-22, 0), "relative": np.where(near_one, 0, 2.0**-22)}

    return _approximate(statement, kernel, ftz, np.log2, bound)


@instruction(rf"rcp\.approx{FTZ}\.f32", "Floating Point Instructions: rcp", "special")
def _(statement: Instruction, kernel: Kernel, ftz: str | None) -> Run:
    """1 unit in the last place."""
    return _approximate(statement, kernel, ftz, lambda x: 1 / x, lambda x: {"ulps": 1})


@instruction(rf"sqrt\.approx{FTZ}\.f32", "Floating Point Instructions: sqrt", "special")
def _(statement: Instruction, kernel: Kernel, ftz: str | None) -> Run:
    return _approximate(statement, kernel, ftz, np.sqrt, lambda x: {"relative": 2.0**-23})


@instruction(rf"rsqrt\.approx{FTZ}\.f32", "Floating Point Instructions: rsqrt", "special")
def _(statement: Instruction, kernel: Kernel, ftz: str | None) -> Run:
    return _approximate(statement, kernel, ftz, lambda x: 1 / np.sqrt(x), lambda x: {"relative": 2.0**-22.9})


@instruction(r"tanh\.approx\.f32", "Floating Point Instructions: tanh", "special")
def _(statement: Instruction, kernel: Kernel) -> Run:
    return _approximate(statement, kernel, None, np.tanh, lambda x: {"relative": 2.0**-11})


@instruction(rf"div\.full{FTZ}\.f32", "Floating Point Instructions: div", "special")
def _(statement: Instruction, kernel: Kernel, ftz: str | None) -> Run:
    """2 units in the last place, for divisors of any size."""
    return _approximate(statement, kernel, ftz, np.divide, lambda a, b: {"ulps": 2}, operands=2)


@instruction(rf"div\.approx{FTZ}\.f32", "Floating Point Instructions: div", "special")
def _(statement: Instruction, kernel: Kernel, ftz: str | None) -> Run:
    """2 units in the last place for divisors up to 2^126; beyond, zero, and of an infinite dividend NaN."""

    def divide(a, b):
        huge = (np.abs(b) > 2.0**126) & np.isfinite(b)
        return np.where(huge, np.where(np.isinf(a), np.nan, np.copysign(0, a) * np.sign(b)), a / b)

    return _approximate(statement, kernel, ftz, divide, lambda a, b: {"ulps": 2}, operands=2)


@instruction(r"rcp\.approx\.ftz\.f64", "Floating Point Instructions: rcp.approx.ftz.f64", "special")
def _(statement: Instruction, kernel: Kernel) -> Run:
    read, write = reader(statement.operands[1], "f64", kernel), writer(statement.operands[0], "f64")

    def run(machine: Machine, mask: Mask) -> None:
        x = read(machine, mask)
        write(machine, mask, arithmetic.reciprocal_high(x, arithmetic.noise(machine.seed, x)))

    return run


@instruction(r"copysign\.(?P<kind>f32|f64)", "Floating Point Instructions: copysign", "float")
def _(statement: Instruction, kernel: Kernel, kind: str) -> Run:
    return compute(statement, kernel, kind, [kind, kind], lambda sign, x: np.copysign(x, sign))


_CVT = "Data Movement and Conversion Instructions: cvt"
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@instruction(r"cvt\.rn\.(?P<to>f16|f32|f64|bf16)\.(?P<kind>[su](?:8|16|32|64))", _CVT, "float")
def _(statement: Instruction, kernel: Kernel, to: str, kind: str) -> Run:
    if to == "bf16" or to == "f16" and bits_of(kind) > 16:
        # by way of float64, which is exact up to 53 bits
        round_ = to_bfloat16 if to == "bf16" else lambda x: x.astype(np.float16)
        return compute(statement, kernel, to, [kind], lambda a: round_(a.astype(np.float64)))
    return compute(statement, kernel, to, [kind], lambda a: a.astype(DTYPES[to]))


@instruction(rf"cvt\.(?P<mode>rni|rzi|rmi|rpi){FTZ}\.(?P<to>[su](?:8|16|32|64))\.(?P<kind>f16|f32|f64)", _CVT, "float")
def _(statement: Instruction, kernel: Kernel, mode: str, ftz: str | None, to: str, kind: str) -> Run:
    """What is too large becomes the largest number, NaN 0."""
    limits = np.iinfo(DTYPES[to])

    def convert(a):
        whole = _ROUND[mode]((flush(a) if ftz else a).astype(np.float64))
        high, low = whole >= float(limits.max), whole <= float(limits.min)
        middle = np.where(high | low | np.isnan(whole), 0, whole).astype(DTYPES[to])
        return np.where(high, DTYPES[to](limits.max), np.where(low, DTYPES[to](limits.min), middle))

    return compute(statement, kernel, to, [kind], convert)


@instruction(rf"cvt\.(?P<mode>rni|rzi|rmi|rpi){FTZ}\.(?P<kind>f32|f64)\.(?P=kind)", _CVT, "float")
def _(statement: Instruction, kernel: Kernel, mode: str, ftz: str | None, kind: str) -> Run:
    return compute(statement, kernel, kind, [kind], _ftz(_ROUND[mode], ftz))


@instruction(rf"cvt{FTZ}\.(?P<to>f32|f64)\.(?P<kind>f16|bf16|f32)", _CVT, "float")
def _(statement: Instruction, kernel: Kernel, to: str, kind: str, ftz: str | None) -> Run:
    """To where every number is: exact."""
    dtype = DTYPES[to]

    def convert(a):
        x = (widen(a) if kind == "bf16" else a).astype(dtype)
        return flush(x) if ftz and to == "f32" else x

    return compute(statement, kernel, to, [kind], convert)


@instruction(rf"cvt\.rn{FTZ}\.(?P<to>f16|bf16|f32)\.(?P<kind>f32|f64)", _CVT, "float")
def _(statement: Instruction, kernel: Kernel, to: str, kind: str, ftz: str | None) -> Run:
    def convert(a):
        a = flush(a) if ftz and kind == "f32" else a
        return to_bfloat16(a) if to == "bf16" else a.astype(DTYPES[to])

    return compute(statement, kernel, to, [kind], _ftz(convert, ftz) if to == "f32" else convert)


@instruction(r"cvt\.rn\.(?P<to>f16|bf16)x2\.f32", _CVT, "float")
def _(statement: Instruction, kernel: Kernel, to: str) -> Run:
    """The first operand becomes the upper half."""

    def convert(high, low):
        words = [(to_bfloat16(x) if to == "bf16" else x.astype(np.float16).view(np.uint16)) for x in (high, low)]
        high, low = (x.astype(np.uint32) for x in words)
        return high << np.uint32(16) | low

    return compute(statement, kernel, "b32", ["f32", "f32"], convert)


@instruction(r"cvt\.rna\.tf32\.f32", _CVT, "float")
def _(statement: Instruction, kernel: Kernel) -> Run:
    return compute(statement, kernel, "f32", ["f32"], arithmetic.to_tf32)
