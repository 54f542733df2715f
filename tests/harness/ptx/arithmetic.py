"""PTX's arithmetic on numpy arrays, bit for bit where the manual fixes every bit, and moved within its bounds where not.

bfloat16 is held as its 16 bits (uint16); all else as numpy's own types.
"""

import numpy as np

CANONICAL_NAN = np.uint16(0x7FFF)  # of bfloat16: what an instruction returns for any NaN


def flush(x: np.ndarray) -> np.ndarray:
    """``.ftz``: subnormal numbers become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(np.zeros_like(x), x), x)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as float32: all of its numbers are there."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even; from float64 by way of an odd float32, so that nothing is rounded twice."""
    if x.dtype == np.float64:
        x = _odd_float32(x)
    bits = x.view(np.uint32)
    # adding half a unit in the last place must not turn a NaN into an infinity
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), CANONICAL_NAN, rounded)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """``cvt.rna.tf32``: to 10 bits of mantissa, to nearest, halves away from zero; the other 13 bits are zeros."""
    bits = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits, x.view(np.uint32)).view(np.float32)


def _odd_float32(x: np.ndarray) -> np.ndarray:
    """float64 to float32: towards zero, the last bit set where anything was dropped."""
    near = x.astype(np.float32)
    inexact = near != x
    towards_zero = np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)
    odd = (towards_zero.view(np.uint32) | np.uint32(1)).view(np.float32)
    return np.where(inexact & np.isfinite(x), odd, near)


def _sum_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd: rounding that again, to fewer bits, is right (Boldo and Melquiond, 2008)."""
    total = a + b
    other = total - a
    error = (a - (total - other)) + (b - other)
    bits = total.view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0) & np.isfinite(total), bits + step, bits)
    return odd.view(np.float64)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once, of float16, float32 or float64."""
    if a.dtype == np.float64:
        return _fma_float64(a, b, c)
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)  # the product is exact
    if a.dtype == np.float16:
        return _sum_to_odd(product, addend).astype(np.float16)
    total = product + addend
    result = total.astype(np.float32)
    # Rounded twice: that shows only where float64 came to lie halfway between two float32, or the result is subnormal.
    halfway = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if halfway.any() or (np.abs(result) < np.finfo(np.float32).tiny).any():
        result = _sum_to_odd(product, addend).astype(np.float32)
    return result


def _fma_float64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Boldo and Melquiond, "Emulation of a FMA and correctly-rounded sums", 2008, of numbers whose parts do not overflow."""

    def halves(x):
        high = x * 134217729.0
        high = high - (high - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    product_low = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    sum_high = c + product_low
    other = sum_high - c
    sum_low = (c - (sum_high - other)) + (product_low - other)
    total = product + sum_high
    other = total - product
    total_low = (product - (total - other)) + (sum_high - other)
    result = total + _sum_to_odd(total_low, sum_low)
    # The product's low part cannot be found where a number is huge, and is nothing where the product is zero or infinite.
    found = np.isfinite(result) & (product != 0)
    return np.where(found, result, product + c)


def bfloat16_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    a, b, c = (widen(x).astype(np.float64) for x in (a, b, c))
    return to_bfloat16(_sum_to_odd(a * b, c))


def noise(seed: int, *inputs: np.ndarray) -> np.ndarray:
    """From -1 to 1, half of them one of the two: a function of the seed and of the inputs' bits, as a device's error is."""
    mixed = np.uint64(0x9E3779B97F4A7C15 * (seed + 1) & 0xFFFFFFFFFFFFFFFF)
    for x in inputs:
        bits = x.view(f"u{x.dtype.itemsize}").astype(np.uint64)
        mixed = (mixed ^ bits) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(32))
    return np.clip((mixed >> np.uint64(40)).astype(np.float64) / 2**22 - 2, -1, 1)


def approximate(
    exact: np.ndarray, noise: np.ndarray, ulps: float = 0, relative: float = 0, absolute: float | np.ndarray = 0
) -> np.ndarray:
    """float32 results that differ from the exact ones (float64) by as much as their bounds allow, rounding included.

    Args:
        exact: zeros, infinities and NaN stay what they are, but for zeros with an absolute bound.
        noise: from -1 to 1, how much of the bound.
        ulps: bound in units of the last place of the result.
        relative: bound as a share of the result.
        absolute: bound in itself, zero where another holds.
    """
    ulp = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    bound = ulps * ulp + relative * np.abs(exact) + absolute
    rounding = np.spacing((np.abs(exact) + bound).astype(np.float32)).astype(np.float64) / 2
    moved = exact + noise * np.maximum(bound - rounding, 0)
    # the sign is computed by itself: a subnormal result does not cross zero
    moved = np.where((moved < 0) == (exact < 0), moved, np.copysign(0.0, exact)) if np.all(absolute == 0) else moved
    result = moved.astype(np.float32)
    return np.where(
        np.isfinite(exact) & (bound > 0) & ((exact != 0) | (absolute > 0)), result, exact.astype(np.float32)
    )


def reciprocal_high(x: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """``rcp.approx.ftz.f64``: of the operand's upper 32 bits, with 20 bits of mantissa, the lower 32 bits zero."""
    upper = np.uint64(0xFFFFFFFF00000000)
    x = (flush(x).view(np.uint64) & upper).view(np.float64)
    exact = 1 / x
    moved = exact * (1 + noise * 2.0**-20)
    result = (moved.view(np.uint64) & upper).view(np.float64)
    return flush(np.where(np.isfinite(exact) & (exact != 0), result, exact))
