"""The guarded interpreter finds what it is there to find: planted faults, each caught."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from .harness.guarded import KernelFault, guarded

pytestmark = pytest.mark.interpreted


@triton.jit
def double_kernel(x, y, n, stride, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2x in blocks that start ``stride`` elements apart; lanes of one store lie STEP apart."""
    i = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y + i * STEP, 2 * tl.load(x + i, i < n), i < n)


@triton.jit
def unmasked_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i), i < n)


def test_guard_lets_a_correct_kernel_pass() -> None:
    x, n = torch.arange(100.0), 100
    with guarded():
        y = torch.empty_like(x)
        double_kernel[(4,)](x, y, n, 32, 1, 32)
    assert torch.equal(y, 2 * x)


def test_guard_finds_a_missing_mask() -> None:
    x = torch.zeros(100)
    with guarded(), pytest.raises(KernelFault, match=r"unmasked_kernel, program 3: 28 lanes load out of bounds"):
        unmasked_kernel[(4,)](x, torch.empty(100), 100, 32)


def test_guard_finds_an_access_between_the_elements_of_a_view() -> None:
    x = torch.zeros(64, 2)
    with guarded(), pytest.raises(KernelFault, match="16 lanes load out of bounds"):
        double_kernel[(2,)](x[:, 0], torch.empty(64), 64, 32, 1, 32)


def test_guard_finds_overlapping_writes() -> None:
    x = torch.zeros(100)
    with guarded(), pytest.raises(KernelFault, match="two programs write the same element"):
        double_kernel[(4,)](x, torch.empty(100), 100, 31, 1, 32)
    with guarded(), pytest.raises(KernelFault, match="two lanes of one store write the same element"):
        double_kernel[(1,)](x, torch.empty(100), 100, 32, 0, 32)


def test_guard_finds_a_read_of_what_another_program_writes() -> None:
    x = torch.zeros(100)
    with guarded(), pytest.raises(KernelFault, match="reads an element that another program writes"):
        double_kernel[(2,)](x, x[1:], 64, 32, 1, 32)


def test_guard_shuffles_programs_rounds_to_nearest_and_fills_fresh_memory() -> None:
    x = torch.randn(1000)
    with guarded():
        y, untouched = torch.empty(1000, dtype=torch.bfloat16), x.new_empty_strided((2, 3), (1, 2))
        double_kernel[(32,)](x, y, 1000, 32, 1, 32)
    assert torch.equal(y, (2 * x).bfloat16())
    assert untouched.isnan().all()

    shared = torch.zeros(1)
    assert len({_last_writer(seed, shared) for seed in range(8)}) > 1


def _last_writer(seed: int, shared: torch.Tensor) -> float:
    with guarded(seed), pytest.raises(KernelFault):
        program_kernel[(4,)](shared)
    return shared.item()


@triton.jit
def program_kernel(x):
    tl.store(x, tl.program_id(0).to(tl.float32))
