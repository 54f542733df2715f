"""The interpreter's count of arithmetic counts what it should."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from .harness.flop import counted

pytestmark = pytest.mark.interpreted


@triton.jit
def double_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2 * tl.load(x + i, i < n), i < n)


@triton.jit
def functions_kernel(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(x + i, tl.maximum(tl.exp(value) + tl.log(value), -tl.abs(value)))


@triton.jit
def product_kernel(x, y, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y + i, tl.dot(tl.load(x + i), tl.load(x + i)))


def test_arithmetic_is_counted() -> None:
    """Each operation of each element, masked ones too; signs and moves are free."""
    x = torch.ones(100)
    with counted() as launches:
        double_kernel[(4,)](x, torch.empty(100), 100, 32)
        functions_kernel[(1,)](x, 64)
        product_kernel[(1,)](torch.ones(16, 16), torch.empty(16, 16), 16)
    assert [(launch.kernel, launch.flop) for launch in launches] == [
        ("double_kernel", 4 * 32),
        ("functions_kernel", 4 * 64),
        ("product_kernel", 2 * 16**3),
    ]
