"""Whether a combine may be given to ``tl.associative_scan``, which groups it as it likes."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _both_groupings_kernel(x, grouped, PARTS: tl.constexpr, COMBINE: tl.constexpr, BLOCK: tl.constexpr):
    """x is (3, PARTS, BLOCK), three elements of as many parts as the combine takes; grouped (2, PARTS, BLOCK)."""
    i = tl.arange(0, BLOCK)
    elements = ()
    for k in tl.static_range(3):
        parts = ()
        for part in tl.static_range(PARTS):
            parts += (tl.load(x + (k * PARTS + part) * BLOCK + i),)
        elements += (parts,)
    left = COMBINE(*COMBINE(*elements[0], *elements[1]), *elements[2])
    right = COMBINE(*elements[0], *COMBINE(*elements[1], *elements[2]))
    for part in tl.static_range(PARTS):
        tl.store(grouped + part * BLOCK + i, left[part])
        tl.store(grouped + (PARTS + part) * BLOCK + i, right[part])


def assert_associative(
    combine: triton.JITFunction,
    elements: Tensor,
    rtol: float = 1e-5,
    of: Callable[[Tensor], Tensor] = lambda parts: parts,
) -> None:
    """Compare (a b) c with a (b c).

    Args:
        combine: takes the parts of two elements and returns those of their combination, a tuple.
        elements: (3, parts, n): a, b and c, n of each, n a power of two.
        rtol: relative to the largest number of a part.
        of: what to compare of a combination's parts, where several stand for the same.
    """
    _, parts, n = elements.shape
    grouped = elements.new_empty((2, parts, n))
    _both_groupings_kernel[(1,)](elements, grouped, parts, combine, n)
    left, right = map(of, grouped)
    error = (left - right).abs().amax(1) / torch.maximum(left.abs(), right.abs()).amax(1)
    assert (error <= rtol).all(), f"{combine.__name__} is not associative: parts differ by {error.tolist()}"
