"""The guarded interpreter finds what it is there to find: planted faults, each caught."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from .harness.associative import assert_associative
from .harness.guarded import KernelFault, guarded
from .harness.inputs import assert_close, randn

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


def test_guard_finds_a_missing_mask_of_a_store() -> None:
    """Also where the memory behind the tensor exists, because it belongs to another."""
    both = torch.zeros(2, 100)
    with guarded(), pytest.raises(KernelFault, match=r"unmasked_store_kernel, program 3: 28 lanes store out of bounds"):
        unmasked_store_kernel[(4,)](both[0], 100, 32)


@triton.jit
def unmasked_store_kernel(y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.where(i < n, 1.0, 0.0))


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


@triton.jit
def sum_kernel(x, y, n, UPCAST: tl.constexpr, BLOCK: tl.constexpr):
    """y = 2x in float32, or in the dtype of x."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n)
    if UPCAST:
        value = value.to(tl.float32)
    tl.store(y + i, value + value, i < n)


def test_arithmetic_in_bfloat16_gives_other_values() -> None:
    """The interpreter computes on the words of bfloat16, and the comparison with float64 says so."""
    x = randn(96, dtype=torch.bfloat16, seed=1)
    results = []
    for upcast in (True, False):
        with guarded():
            results.append(torch.empty_like(x))
            sum_kernel[(3,)](x, results[-1], 96, upcast, 32)
    assert_close(results[0], 2 * x.double(), 1, torch.bfloat16)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        assert_close(results[1], 2 * x.double(), 1, torch.bfloat16)


@triton.jit
def linear_combine(a, b, next_a, next_b):
    """x -> next_a (a x + b) + next_b."""
    return a * next_a, next_a * b + next_b


@triton.jit
def swapped_combine(a, b, next_a, next_b):
    return a * next_a, a * next_b + b + next_b


def test_associativity_is_checked_because_the_interpreter_never_regroups() -> None:
    elements = randn(3, 2, 64, dtype=torch.float32, seed=1, scale=1.0)
    assert_associative(linear_combine, elements)
    with pytest.raises(AssertionError, match="swapped_combine is not associative"):
        assert_associative(swapped_combine, elements)


def test_guard_counts_bytes_and_arithmetic() -> None:
    x = torch.zeros(100, dtype=torch.float16)
    with guarded() as launches:
        double_kernel[(4,)](x, torch.empty(100), 100, 32, 1, 32)
        twice_kernel[(2,)](x, torch.empty(64), 32)
    assert [launch.kernel for launch in launches] == ["double_kernel", "twice_kernel"]
    assert (launches[0].loaded, launches[0].stored, launches[0].flop) == (200, 400, 128)
    assert (launches[1].loaded, launches[1].distinct_loaded, launches[1].flop) == (128, 64, 0)


@triton.jit
def twice_kernel(x, y, BLOCK: tl.constexpr):
    """Each element of x, twice."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i // 2))
