"""What the Triton kernels share: activations, the walk over lanes, and how launchers choose dtype and vector width.

A *lane* is one feature of one sample: an element of the frame (C, *S). A program covers BLOCK lanes of one sample.
Functions here take and return float32 (float64 for float64 tensors); kernels convert on load.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import state_dtype

NUM_WARPS = 4
WARP = 32  # threads
# Bits of a frame's code: restart the state before it, hold it through it.
RESTART = tl.constexpr(1)
HOLD = tl.constexpr(2)
VECTOR_BYTES = 16


def jit_kernel(fn: Callable) -> triton.JITFunction:
    """``triton.jit`` for a kernel whose integers are annotated (tl.int32, tl.int64), so that none is specialised.

    Otherwise Triton compiles anew for a value of 1 and for multiples of 16, and counts in 32 bits where a value fits. Nor
    is the address of ``codes``, which are read byte by byte: a step's begin anywhere.
    """
    names = inspect.signature(fn).parameters
    sizes = [name for name, p in names.items() if p.annotation in (tl.int32, tl.int64)]
    return triton.jit(
        fn, do_not_specialize=sizes, do_not_specialize_on_alignment=[name for name in names if name == "codes"]
    )


@triton.jit
def sigmoid_tail(x):
    """sigmoid(-|x|), the smaller of sigmoid(x) and 1 - sigmoid(x), to full relative accuracy and without overflow."""
    e = tl.exp(-tl.abs(x))
    return e / (1 + e)


@triton.jit
def sigmoid(x):
    tail = sigmoid_tail(x)
    return tl.where(x >= 0, 1 - tail, tail)


@triton.jit
def tanh(x):
    """tanh x = (1 - e) / (1 + e), e = exp(-2|x|); below 1/2, where 1 - e cancels, a Pade approximant of order [7/6].

    libdevice has a tanh, but no interpreter can run it. The approximant's error at 1/2 is 2e-16 relative.
    """
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    q = a * a
    near_zero = a < 0.5
    numerator = tl.where(near_zero, a * (135135 + q * (17325 + q * (378 + q))), 1 - e)
    denominator = tl.where(near_zero, 135135 + q * (62370 + q * (3150 + q * 28)), 1 + e)
    y = numerator / denominator
    return tl.where(x < 0, -y, y)


@triton.jit
def program_lanes(lanes, BLOCK: tl.constexpr):
    """The sample of this program and its lanes: index (int64), lane indices [BLOCK] (int64), mask [BLOCK].

    The grid has one axis, sample by sample, because axes 1 and 2 end at 65,535.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(lanes, BLOCK)
    sample = program // blocks
    lane = (program - sample * blocks) * BLOCK + tl.arange(0, BLOCK)
    return sample, lane, lane < lanes


@triton.jit
def restarts(code):
    return (code & RESTART) != 0


@triton.jit
def holds(code):
    return (code & HOLD) != 0


def acc_dtype(x: Tensor) -> tl.dtype:
    """Triton's name of the dtype of states and arithmetic."""
    return tl.float64 if state_dtype(x) == torch.float64 else tl.float32


def launch(
    kernel: triton.JITFunction,
    like: Tensor,
    operands: Sequence[Tensor | None],
    lanes: int,
    strides: Sequence[int],
    steps: tuple[int, ...] = (),
    chunks: int = 1,
    **constexprs: object,
) -> None:
    """Run ``kernel`` with a program for each block of lanes of each chunk of each sample of ``like`` (B, ...).

    Kernels take their operands, T and the steps of a chunk if they walk over time, the lanes of a sample and the strides,
    and VEC, BLOCK and ACC among their constexprs. A program covers one vector of ``like``'s dtype per thread: with more,
    unaligned shapes hold their addresses one by one and spill.
    """
    vec = vector_width(like, operands, (lanes, *strides))
    # No more warps than the lanes fill: few lanes are the reason to cut T in chunks.
    warps = min(NUM_WARPS, triton.next_power_of_2(triton.cdiv(lanes, WARP * vec)))
    block = warps * WARP * vec
    with torch.cuda.device_of(like):
        kernel[(like.shape[0] * chunks * triton.cdiv(lanes, block),)](
            *operands,
            *steps,
            *(extent // vec for extent in (lanes, *strides)),
            VEC=vec,
            BLOCK=block,
            ACC=acc_dtype(like),
            num_warps=warps,
            **constexprs,
        )


def vector_width(like: Tensor, operands: Iterable[Tensor | None], extents: Iterable[int]) -> int:
    """Elements of ``like`` that one access can move: the largest power of two in 16 bytes that divides every stride and
    size; 1 where an operand's address is no multiple of 16 bytes, which is all that Triton learns about addresses.

    Kernels take strides and sizes divided by it and multiply again, which is what tells the compiler about alignment;
    a hint on the value (``tl.multiple_of``) does not, and Triton by itself only sees multiples of 16.
    """
    # codes, one for each frame, are no lanes: a program reads them one by one
    if any(x.data_ptr() % VECTOR_BYTES for x in operands if x is not None and x.dtype != torch.uint8):
        return 1
    return math.gcd(VECTOR_BYTES // like.element_size(), *extents)


def stride(x: Tensor, dim: int) -> int:
    """The stride of ``x``, 0 where it is never used, so that it does not spoil the vector width."""
    return x.stride(dim) if x.shape[dim] > 1 else 0
