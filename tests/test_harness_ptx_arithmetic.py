"""What the executor computes: exact where PTX fixes every bit, within the manual's bounds and not exact where it does not."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from .harness.ptx.driver import using
from .harness.snippet import of_three, unary

pytestmark = pytest.mark.executed

N = 4096
FLOATS = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}


def numbers(dtype: torch.dtype, seed: int, spread: float = 8.0) -> Tensor:
    """Of many sizes, some of them equal to powers of two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, generator=generator, dtype=torch.float64)
    exponent = (spread * torch.randn(N, generator=generator, dtype=torch.float64)).round()
    x = torch.where(torch.arange(N) % 8 == 0, x.sign(), x)
    return (x * 2.0**exponent).to(dtype)


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """An exact number rounded to nearest even."""
    if not value:
        return 0.0
    finfo = torch.finfo(dtype)
    digits = round(-math.log2(finfo.eps))
    exponent = math.floor(math.log2(abs(value))) if abs(value) > 2**-1000 else -1000
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, round(math.log2(finfo.tiny))) - digits)
    return float(round(value / unit) * unit)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fma_rounds_once(dtype: torch.dtype) -> None:
    """Products near the sum's other term, so that many sums lie near halfway between two numbers."""
    a, b = numbers(dtype, 1, 1.0), numbers(dtype, 2, 1.0)
    c = (numbers(torch.float64, 3, 4.0) * a.double() * b.double()).to(dtype)
    exact = [
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    expected = torch.tensor([nearest(value, dtype) for value in exact], dtype=torch.float64)
    assert torch.equal(of_three(f"fma.rn.{FLOATS[dtype]}", a, b, c).double(), expected)


def test_fma_that_rounding_twice_gets_wrong() -> None:
    """1 + 2^-24 + 2^-60: in float64 halfway between two float32, in truth above."""
    a, b = torch.full((32,), 2.0**-30), torch.full((32,), 2.0**-30)
    c = torch.ones(32)
    a[0], b[0] = 1 + 2.0**-12, 2.0**-12 + 2.0**-23  # 2^-12 + 2^-23 + 2^-24 + 2^-35
    expected = nearest(Fraction(a[0].item()) * Fraction(b[0].item()) + 1, torch.float32)
    assert of_three("fma.rn.f32", a, b, c)[0].item() == expected


@pytest.mark.parametrize("op, function", (("add", torch.add), ("sub", torch.sub), ("mul", torch.mul)))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_arithmetic(dtype: torch.dtype, op: str, function: Callable) -> None:
    a, b = numbers(dtype, 4), numbers(dtype, 5)
    actual, expected = of_three(f"{op}.{FLOATS[dtype]}", a, b), function(a, b)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind, dtype", (("bf16", torch.bfloat16), ("f16", torch.float16)))
def test_pairs(kind: str, dtype: torch.dtype) -> None:
    a, b, c = (numbers(dtype, seed, 2.0) for seed in (6, 7, 8))
    packed = [x.view(torch.int32) for x in (a, b, c)]
    assert torch.equal(of_three(f"fma.rn.{kind}x2", *packed).view(dtype), of_three(f"fma.rn.{kind}", a, b, c))
    assert torch.equal(of_three(f"abs.{kind}x2", packed[0]).view(dtype), a.abs())
    assert torch.equal(of_three(f"max.{kind}x2", *packed[:2]).view(dtype), torch.maximum(a, b))


@pytest.mark.parametrize(
    "opcode, source, target",
    (
        ("cvt.rn.bf16.f32", torch.float32, torch.bfloat16),
        ("cvt.rn.f16.f32", torch.float32, torch.float16),
        ("cvt.rn.f32.f64", torch.float64, torch.float32),
        ("cvt.f32.bf16", torch.bfloat16, torch.float32),
        ("cvt.f32.f16", torch.float16, torch.float32),
        ("cvt.f64.f32", torch.float32, torch.float64),
        ("cvt.rzi.s32.f32", torch.float32, torch.int32),
        ("cvt.rn.f32.s32", torch.int32, torch.float32),
        ("cvt.s64.s32", torch.int32, torch.int64),
        ("cvt.u32.u64", torch.int64, torch.int32),
    ),
)
def test_conversions(opcode: str, source: torch.dtype, target: torch.dtype) -> None:
    x = numbers(torch.float64, 9).to(source)
    if source.is_floating_point and target.is_floating_point:
        x[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y = unary(opcode, x, target)
    assert torch.equal(
        y.nan_to_num(nan=7.0) if target.is_floating_point else y,
        x.to(target).nan_to_num(nan=7.0) if target.is_floating_point else x.to(target),
    )


def test_conversions_to_integers_saturate() -> None:
    x = torch.tensor([3e9, -3e9, torch.nan, torch.inf, 2.5, 3.5, -2.5, -0.5] * 4)
    top = 2**31 - 1
    assert unary("cvt.rni.s32.f32", x, torch.int32)[:8].tolist() == [top, -top - 1, 0, top, 2, 4, -2, 0]
    assert unary("cvt.rmi.s32.f32", x, torch.int32)[4:8].tolist() == [2, 3, -3, -1]
    assert unary("cvt.rpi.s32.f32", x, torch.int32)[4:8].tolist() == [3, 4, -2, 0]


def test_subnormals_are_flushed_where_the_opcode_says_so() -> None:
    x = torch.full((32,), -1e-39)
    assert of_three("add.f32", x, x).tolist() == (x + x).tolist()
    flushed = of_three("add.ftz.f32", x, x)
    assert not flushed.any() and flushed.signbit().all()


@pytest.mark.parametrize("bits, dtype", ((32, torch.int32), (64, torch.int64)))
def test_integers(bits: int, dtype: torch.dtype) -> None:
    a = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, (N,), dtype=dtype)
    b = torch.randint(-1000, 1000, (N,), dtype=dtype)
    b[b == 0] = -1
    a[0], b[0] = -(2 ** (bits - 1)), -1  # whose quotient wraps
    whole = [(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]

    def check(opcode: str, function: Callable[[int, int], int]) -> None:
        wrapped = [(function(x, y) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for x, y in whole]
        assert of_three(f"{opcode}{bits}", a, b).tolist() == wrapped, opcode

    unsigned = 2**bits
    check("add.s", lambda x, y: x + y)
    check("mul.lo.s", lambda x, y: x * y)
    check("mul.hi.s", lambda x, y: x * y >> bits)
    check("mul.hi.u", lambda x, y: (x % unsigned) * (y % unsigned) >> bits)
    check("div.s", lambda x, y: abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1))
    check("rem.s", lambda x, y: abs(x) % abs(y) * (1 if x >= 0 else -1))
    check("div.u", lambda x, y: (x % unsigned) // (y % unsigned))
    check("min.s", min)
    check("xor.b", lambda x, y: x ^ y)


def test_shifts_beyond_the_width() -> None:
    x = torch.full((32,), -8, dtype=torch.int32)
    amount = torch.tensor([0, 1, 31, 32, 40, -1, 2, 3] * 4, dtype=torch.int32)
    assert of_three("shr.s32", x, amount)[:8].tolist() == [-8, -4, -1, -1, -1, -1, -2, -1]
    assert of_three("shl.b32", x, amount)[:8].tolist() == [-8, -16, 0, 0, 0, 0, -32, -64]
    assert of_three("shr.u32", x, amount)[3:6].tolist() == [0, 0, 0]


APPROXIMATE = {
    "ex2.approx.f32": (torch.exp2, "ulps", 2.0),
    "ex2.approx.ftz.f32": (torch.exp2, "ulps", 2.0),
    "rcp.approx.ftz.f32": (torch.reciprocal, "ulps", 1.0),
    "sqrt.approx.f32": (lambda x: x.abs().sqrt(), "relative", 2.0**-23),
    "rsqrt.approx.f32": (lambda x: x.abs().rsqrt(), "relative", 2.0**-22.9),
    "tanh.approx.f32": (torch.tanh, "relative", 2.0**-11),
    "lg2.approx.f32": (lambda x: x.abs().log2(), "relative", 2.0**-22),
}


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate_instructions_are_off_by_as_much_as_they_may_be(opcode: str) -> None:
    function, unit, bound = APPROXIMATE[opcode]
    x = numbers(torch.float32, 10, 2.0).clamp(-100, 100)
    if opcode[:2] in ("sq", "rs", "lg"):
        x = x.abs()
    if opcode.startswith("lg2"):
        x = torch.where((x > 0.4) & (x < 2.1), 5.0, x)
    y, again = unary(opcode, x, torch.float32), unary(opcode, x, torch.float32)
    with using(seed=1):
        other = unary(opcode, x, torch.float32)
    assert torch.equal(y, again) and not torch.equal(y, other)
    exact = function(x.double())
    error = (y.double() - exact).abs()
    if unit == "ulps":
        below = torch.nextafter(exact.abs().float(), torch.tensor(0.0)).double()
        error = error / torch.maximum(
            exact.abs().float().double() - below, torch.tensor(2.0**-149, dtype=torch.float64)
        )
    else:
        error = error / exact.abs()
    # float64 has its own rounding; the unit below a power of two is half of that above
    assert 0.6 * bound < error.max() <= (2 if unit == "ulps" else 1 + 1e-9) * bound


def test_approximate_division_and_logarithm() -> None:
    a, b = numbers(torch.float32, 11, 2.0), numbers(torch.float32, 12, 2.0)
    exact = a.double() / b.double()
    error = (of_three("div.full.f32", a, b).double() - exact).abs() / exact.abs()
    assert 2.0**-23 < error.max() <= 2 * 2.0**-23
    x = torch.linspace(0.51, 1.99, N)
    error = (unary("lg2.approx.f32", x, torch.float32).double() - x.double().log2()).abs().max()
    assert 2.0**-23 < error <= 2.0**-22
    assert unary("ex2.approx.f32", torch.zeros(32), torch.float32).eq(1).all()
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan] * 8)
    assert unary("ex2.approx.f32", special, torch.float32)[:3].tolist() == [1, torch.inf, 0]
    assert unary("rcp.approx.f32", special, torch.float32)[:3].tolist() == [torch.inf, 0, 0]


@pytest.mark.parametrize(
    "op, function", (("min", torch.fmin), ("max", torch.fmax), ("min.NaN", torch.minimum), ("max.NaN", torch.maximum))
)
def test_minimum_and_maximum(op: str, function: Callable) -> None:
    a, b = numbers(torch.float32, 13), numbers(torch.float32, 14)
    a[::5], b[::7] = torch.nan, torch.nan
    torch.testing.assert_close(of_three(f"{op}.f32", a, b), function(a, b), rtol=0, atol=0, equal_nan=True)
    a[:32], b[:32] = 0.0, -0.0
    assert of_three(f"{op}.f32", a, b)[:32].signbit().all() == op.startswith("min")
