"""A GRU-RCN step as two implicit GEMMs: each 3x3 convolution with its gates as epilogue (* is convolution).

gates:  [z, r] = sigmoid(xp + U*h), rh = r h        update:  c = tanh(xc + C*rh), h' = (1 - z) h + z c

A program computes BLOCK_M pixels, counted over the whole batch, of BLOCK_N channels: a matrix product of depth 9 C whose
rows are the pixels' neighbourhoods, read where they lie, zero outside the frame and never written out. A step takes two
kernels at least, because c needs rh of the neighbours.

The state and what is convolved - its copy in x's dtype, or the float32 state itself, and rh - are channels last, (B, *S,
C), so that the depth is contiguous; xp, z, r, c and out are channels first, as the sequence keeps them. Sums, gates and
state are float32; 16-bit operands are multiplied as they are, float32 ones in TF32.

Moved, in elements per lane: gates 4 reads, 3 writes, update 4 and 4; in float32, where the state is what is convolved, 3
and 3, 4 and 3. Each launch reads its weights, 18 C^2 or 9 C^2 elements. A pixel's neighbours, for each block of channels,
and the weights, for each block of pixels, are read again, from L2. Nothing but z, r, c and h is saved, as in ``gru_rcn``.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .math import NUM_WARPS, VECTOR_BYTES, holds, jit_kernel, restarts, sigmoid, stride, tanh

BLOCK_M = 64  # pixels: the rows of one product of a warp group
BLOCK_N = 32  # channels
DEPTH_BYTES = 128  # of a row of operands: what one swizzle of shared memory spans
NUM_STAGES = 4

# The interpreter would multiply bfloat16's bit patterns. Products of 16-bit numbers are exact in float32.
UPCAST = tl.constexpr(triton.knobs.runtime.interpret)

# Where "auto" takes these kernels; use_gemm says why.
MAX_PIXELS, CHANNELS, MIN_CHANNELS, MAX_FLOP = 49, 16, 32, 2**30


@triton.jit
def tile(total, height, width, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The program's pixels [BLOCK_M]: index in the batch and whether there is one, sample, pixel in the frame, row and
    column; and its first channel.

    Divided per pixel are 32-bit numbers, smaller than a frame; the batch may hold more pixels than these count.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(features, BLOCK_N)
    first = program // blocks * BLOCK_M
    area = height.to(tl.int64) * width
    sample = first // area
    i = tl.arange(0, BLOCK_M)
    local = (first % area).to(tl.int32) + i
    place = local % area.to(tl.int32)
    pixel = first + i
    sample += local // area.to(tl.int32)
    return pixel, pixel < total, sample, place, place // width, place % width, program % blocks * BLOCK_N


@triton.jit
def convolve(
    x,  # (B, *S, C)
    weight,  # (rows, 3, 3, C)
    pixel,
    valid,
    row,
    column,
    height,
    width,
    features,
    first_output,
    outputs,
    depth,  # in blocks of BLOCK_K channels of one tap
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums [BLOCK_M, ROWS] over the 3x3 neighbourhoods of pixels, for the rows of ``weight`` from ``first_output`` on."""
    acc = tl.zeros((BLOCK_M, ROWS), tl.float32)
    output = first_output + tl.arange(0, ROWS)
    x += pixel[:, None] * features
    weight += output[:, None] * (9 * features)
    blocks = tl.cdiv(features, BLOCK_K).to(tl.int32)
    for k in range(depth):
        tap = k // blocks
        dy, dx = tap // 3 - 1, tap % 3 - 1
        channel = (k % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = valid & (row + dy >= 0) & (row + dy < height) & (column + dx >= 0) & (column + dx < width)
        known = (channel < features)[None, :]
        neighbour = (dy.to(tl.int64) * width + dx) * features
        a = tl.load(x + (neighbour + channel)[None, :], inside[:, None] & known, other=0)
        b = tl.load(weight + (tap * features + channel)[None, :], (output < outputs)[:, None] & known, other=0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="tf32")
    return acc


@jit_kernel
def gru_conv_gates_fwd_kernel(
    x,  # (B, *S, C), what is convolved of the state
    weight,  # (C, 2, 3, 3, C), U's rows with z and r of a channel side by side
    h,  # (B, *S, C), the state
    zr,  # (B, 2C, *S), xp in, z and r out
    rh,  # (B, *S, C)
    codes,  # (B,) uint8, or None
    total: tl.int64,  # pixels of the batch
    height: tl.int32,
    width: tl.int32,
    features: tl.int64,  # C, in units of VEC elements
    zr_stride: tl.int64,
    depth: tl.int32,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    features *= VEC
    pixel, valid, sample, place, row, column, first = tile(total, height, width, features, BLOCK_M, BLOCK_N)
    acc = convolve(
        *(x, weight, pixel, valid, row, column, height, width, features, 2 * first, 2 * features, depth),
        *(2 * BLOCK_N, BLOCK_M, BLOCK_K),
    )
    hz, hr = acc.reshape(BLOCK_M, BLOCK_N, 2).split()
    channel = first + tl.arange(0, BLOCK_N)
    # Channels first: tiles are transposed, so that threads follow the pixels.
    area = height.to(tl.int64) * width
    zr += (sample * zr_stride + place)[None, :] + channel[:, None] * area
    mask = valid[None, :] & (channel < features)[:, None]
    if codes is not None:
        code = tl.load(codes + sample, valid, other=0)
        hz, hr = tl.where(restarts(code)[:, None], 0.0, hz), tl.where(restarts(code)[:, None], 0.0, hr)
    z = sigmoid(tl.load(zr, mask).to(tl.float32) + tl.trans(hz))
    r = sigmoid(tl.load(zr + features * area, mask).to(tl.float32) + tl.trans(hr))
    if codes is not None:
        z, r = tl.where(holds(code)[None, :], 0.0, z), tl.where(holds(code)[None, :], 0.0, r)
    tl.store(zr, z, mask)
    tl.store(zr + features * area, r, mask)
    lane = pixel[:, None] * features + channel[None, :]
    mask = valid[:, None] & (channel < features)[None, :]
    rh += lane
    gated = tl.trans(r) * tl.load(h + lane, mask)
    if codes is not None:
        gated = tl.where((restarts(code) | holds(code))[:, None], 0.0, gated)
    tl.store(rh, gated, mask)


@jit_kernel
def gru_conv_update_fwd_kernel(
    rh,  # (B, *S, C)
    weight,  # (C, 3, 3, C)
    h,  # (B, *S, C), the state, h' on return
    frame,  # (B, *S, C), a copy of h' in x's dtype, or None
    z,  # (B, C, *S)
    c,  # (B, C, *S), xc in, c out
    out,  # (B, C, *S), a copy of h'
    codes,  # (B,) uint8, or None
    total: tl.int64,  # pixels of the batch
    height: tl.int32,
    width: tl.int32,
    features: tl.int64,  # C, in units of VEC elements
    gates_stride: tl.int64,  # of z and c
    out_stride: tl.int64,
    depth: tl.int32,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    features *= VEC
    pixel, valid, sample, place, row, column, first = tile(total, height, width, features, BLOCK_M, BLOCK_N)
    acc = convolve(
        *(rh, weight, pixel, valid, row, column, height, width, features, first, features, depth),
        *(BLOCK_N, BLOCK_M, BLOCK_K),
    )
    channel = first + tl.arange(0, BLOCK_N)
    area = height.to(tl.int64) * width
    plane = place[None, :] + channel[:, None] * area
    gates = (sample * gates_stride)[None, :] + plane
    mask = valid[None, :] & (channel < features)[:, None]
    lane = pixel[:, None] * features + channel[None, :]
    lane_mask = valid[:, None] & (channel < features)[None, :]
    candidate = tanh(tl.load(c + gates, mask).to(tl.float32) + tl.trans(acc))
    if codes is not None:
        code = tl.load(codes + sample, valid, other=0)
        candidate = tl.where(holds(code)[None, :], 0.0, candidate)
    tl.store(c + gates, candidate, mask)
    state = tl.trans(tl.load(h + lane, lane_mask))
    if codes is not None:
        state = tl.where(restarts(code)[None, :], 0.0, state)
        moved = state + tl.load(z + gates, mask).to(tl.float32) * (candidate - state)
        state = tl.where(holds(code)[None, :], state, moved)
    else:
        state += tl.load(z + gates, mask).to(tl.float32) * (candidate - state)
    tl.store(out + (sample * out_stride)[None, :] + plane, state, mask)
    state = tl.trans(state)
    tl.store(h + lane, state, lane_mask)
    if frame is not None:
        tl.store(frame + lane, state, lane_mask)


def use_gemm(step: str, x: Tensor, U: Tensor, C: Tensor) -> bool:
    """Whether GRU-RCN over x (B, T, Ox, *S) takes its steps here. Sizes, dtype and settings decide, T does not.

    "gemm" is wherever the kernels can: 3x3 kernels, 2-D frames, 16-bit tensors, or float32 where cuDNN's convolutions may
    use TF32. "auto" is where halving the launches should win on paper: on maps of at most 7x7 pixels, whose tiles a
    library leaves partly empty, with channels in whole vectors, and while the larger convolution of a step takes no longer
    than its launch (2^30 FLOP are 3 us at a third of an H100's peak). "cudnn" is never.
    """
    batch, _, _, *space = x.shape
    features = C.shape[0]
    if step == "cudnn" or len(space) != 2 or not U.shape[2:] == C.shape[2:] == (3, 3) or math.prod(space) > 2**30:
        return False
    # One setting, whichever of PyTorch's two interfaces wrote it.
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    if x.dtype not in (torch.bfloat16, torch.float16) and not tf32:
        return False
    if step == "gemm":
        return True
    pixels = math.prod(space)
    flop = 2 * batch * pixels * 9 * features * 2 * features
    fits = pixels <= MAX_PIXELS and features >= MIN_CHANNELS and features % CHANNELS == 0 and flop <= MAX_FLOP
    return fits and _has_tensor_cores(x.device)


@functools.cache
def _has_tensor_cores(device: torch.device) -> bool:
    """NVIDIA's, for bfloat16 and TF32; elsewhere than on a GPU nothing speaks against."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def pack_weights(U: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """U as (C, 2, 3, 3, C) and C as (C, 3, 3, C): rows of the product's depth, z and r of a channel side by side."""
    features = C.shape[0]
    zr = U.view(2, features, features, 3, 3).permute(1, 0, 3, 4, 2)
    return zr.contiguous(), C.permute(0, 2, 3, 1).contiguous()


def gru_conv_step_fwd(
    gates: Tensor,
    state: Tensor,
    frame: Tensor,
    rh: Tensor,
    out: Tensor,
    U: Tensor,
    C: Tensor,
    zero_state: bool = False,
    codes: Tensor | None = None,
) -> None:
    """One step, in place.

    Args:
        gates: (B, 3C, *S), the input's projection, in whose place z, r, c are left; dense frames, any batch stride.
        state: (B, *S, C), float32: h, then h'.
        frame: (B, *S, C), the state in the dtype of gates; it may be the state.
        rh: (B, *S, C) in that dtype, to be written.
        out: (B, C, *S) in that dtype, for h'; dense frames, any batch stride.
        U, C: from :func:`pack_weights`.
        zero_state: h is zero, there is nothing to convolve.
        codes: (B,) uint8, dense, or None for an ordinary step.
    """
    batch, height, width, features = state.shape
    total = batch * height * width
    vec = math.gcd(VECTOR_BYTES // rh.element_size(), features)
    # What one swizzle spans, but no more than the channels, nor than 16 accesses, which take registers; a product's least.
    block_k = max(16, min(DEPTH_BYTES // rh.element_size(), 16 * vec, triton.next_power_of_2(features)))
    depth = 0 if zero_state else 9 * triton.cdiv(features, block_k)
    grid = (triton.cdiv(total, BLOCK_M) * triton.cdiv(features, BLOCK_N),)
    sizes = (total, height, width, features // vec, stride(gates, 0))
    options = {
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": block_k,
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
    }
    z, c = gates[:, :features], gates[:, 2 * features :]
    copy = None if frame is state else frame
    with torch.cuda.device_of(state):
        gru_conv_gates_fwd_kernel[grid](frame, U, state, gates, rh, codes, *sizes, depth, VEC=vec, **options)
        gru_conv_update_fwd_kernel[grid](
            *(rh, C, state, copy, z, c, out, codes), *sizes, stride(out, 0), depth, VEC=vec, **options
        )
