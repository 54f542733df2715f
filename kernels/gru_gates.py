"""The elementwise half of a convolutional GRU step, between the two recurrent convolutions and after them.

gates:  [z, r] = sigmoid(xp + hp), rh = r h        update:  c = tanh(xc + hc), h' = (1 - z) h + z c

xp, xc are input projections, hp, hc convolutions of h and of rh. Tensors are (B, kC, *S) with a free batch stride and
dense frames, channels first or channels last, all of a launch alike: that of what a convolution returned decides, and
what has another is copied. A lane is an element of the frame (C, *S). Of a pair of gates, lane i has z at i and r a frame
further with channels first; with channels last each pixel is C times z and then C times r, as in ``mingru``.
Everything but the state has one dtype; the state h may be float32 beside it. Arithmetic is float32 (float64 for
float64), each lane reads all it needs before it writes, so destinations may be the sources.

Codes, one for each sample of a step of the sequence: bit 0 restarts the state, from zeros, before the frame; bit 1 holds it
through the frame, whose activations are then kept as zeros. What they rule out is selected away, never multiplied by zero.

Moved, in elements per lane: gates 5 reads, 3 writes; update 4 and 2; backward 6 and 3, and 5 and 3. Saved for backward:
z, r, c and h, the activations themselves: s' = s (1 - s), tanh' = 1 - c^2. Nothing is recomputed.
"""

import triton
import triton.language as tl
from torch import Tensor

from .layout import empty, frame_numel, is_channels_last, to_layout
from .math import holds, jit_kernel, launch, program_lanes, restarts, sigmoid, stride, tanh


@jit_kernel
def gru_gates_fwd_kernel(
    xp,  # (B, 2C, *S)
    hp,  # (B, 2C, *S)
    h,  # (B, C, *S)
    z,  # (B, C, *S)
    r,  # (B, C, *S)
    rh,  # (B, C, *S)
    codes,  # (B,) uint8, or None
    lanes: tl.int64,  # C*N; this, half and the batch strides in units of VEC elements
    half: tl.int64,  # from z to r: C*N, with channels last C
    xp_stride: tl.int64,
    hp_stride: tl.int64,
    h_stride: tl.int64,
    z_stride: tl.int64,
    r_stride: tl.int64,
    rh_stride: tl.int64,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    sample, lane, mask = program_lanes(lanes, BLOCK)
    packed = lane
    if CHANNELS_LAST:
        half *= VEC
        packed += lane // half * half
    else:
        half = lanes  # the same number, but the compiler does not know, and would hold both
    xp += sample * (xp_stride * VEC) + packed
    hp += sample * (hp_stride * VEC) + packed
    xz, xr = tl.load(xp, mask).to(ACC), tl.load(xp + half, mask).to(ACC)
    hz, hr = tl.load(hp, mask).to(ACC), tl.load(hp + half, mask).to(ACC)
    state = tl.load(h + sample * (h_stride * VEC) + lane, mask).to(ACC)
    if codes is not None:
        code = tl.load(codes + sample)
        hz, hr = tl.where(restarts(code), 0.0, hz), tl.where(restarts(code), 0.0, hr)
        state = tl.where(restarts(code) | holds(code), 0.0, state)
    reset = sigmoid(xr + hr)
    z = z + sample * (z_stride * VEC) + lane
    update = sigmoid(xz + hz)
    if codes is not None:
        update, reset = tl.where(holds(code), 0.0, update), tl.where(holds(code), 0.0, reset)
    tl.store(z, update, mask)
    tl.store(r + sample * (r_stride * VEC) + lane, reset, mask)
    tl.store(rh + sample * (rh_stride * VEC) + lane, reset * state, mask)


@jit_kernel
def gru_update_fwd_kernel(
    xc,  # (B, C, *S), as all below
    hc,
    z,
    h,
    c,
    h_next,
    rounded,  # a second copy of h_next in the dtype of this tensor, or None
    frame,  # a third one, or None
    codes,  # (B,) uint8, or None
    lanes: tl.int64,  # C*N; this and the batch strides in units of VEC elements
    xc_stride: tl.int64,
    hc_stride: tl.int64,
    z_stride: tl.int64,
    h_stride: tl.int64,
    c_stride: tl.int64,
    h_next_stride: tl.int64,
    rounded_stride: tl.int64,
    frame_stride: tl.int64,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    sample, lane, mask = program_lanes(lanes, BLOCK)
    x = tl.load(xc + sample * (xc_stride * VEC) + lane, mask).to(ACC)
    x += tl.load(hc + sample * (hc_stride * VEC) + lane, mask).to(ACC)
    update = tl.load(z + sample * (z_stride * VEC) + lane, mask).to(ACC)
    state = tl.load(h + sample * (h_stride * VEC) + lane, mask).to(ACC)
    candidate = tanh(x)
    if codes is not None:
        code = tl.load(codes + sample)
        state = tl.where(restarts(code), 0.0, state)
        candidate = tl.where(holds(code), 0.0, candidate)
        state = tl.where(holds(code), state, state + update * (candidate - state))
    else:
        state += update * (candidate - state)
    tl.store(c + sample * (c_stride * VEC) + lane, candidate, mask)
    tl.store(h_next + sample * (h_next_stride * VEC) + lane, state, mask)
    if rounded is not None:
        tl.store(rounded + sample * (rounded_stride * VEC) + lane, state, mask)
    if frame is not None:
        tl.store(frame + sample * (frame_stride * VEC) + lane, state, mask)


@jit_kernel
def gru_gates_bwd_kernel(
    dz,  # (B, C, *S), as all but da
    dr,
    drh,
    z,
    r,
    h,
    da,  # (B, 2C, *S), the gradient of xp and of hp
    dh,
    lanes: tl.int64,  # C*N; this, half and the batch strides in units of VEC elements
    half: tl.int64,  # from z to r: C*N, with channels last C
    dz_stride: tl.int64,
    dr_stride: tl.int64,
    drh_stride: tl.int64,
    z_stride: tl.int64,
    r_stride: tl.int64,
    h_stride: tl.int64,
    da_stride: tl.int64,
    dh_stride: tl.int64,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    sample, lane, mask = program_lanes(lanes, BLOCK)
    packed = lane
    if CHANNELS_LAST:
        half *= VEC
        packed += lane // half * half
    else:
        half = lanes  # the same number, but the compiler does not know, and would hold both
    grad_z = tl.load(dz + sample * (dz_stride * VEC) + lane, mask).to(ACC)
    grad_r = tl.load(dr + sample * (dr_stride * VEC) + lane, mask).to(ACC)
    grad_rh = tl.load(drh + sample * (drh_stride * VEC) + lane, mask).to(ACC)
    update = tl.load(z + sample * (z_stride * VEC) + lane, mask).to(ACC)
    reset = tl.load(r + sample * (r_stride * VEC) + lane, mask).to(ACC)
    state = tl.load(h + sample * (h_stride * VEC) + lane, mask).to(ACC)
    da += sample * (da_stride * VEC) + packed
    tl.store(da, grad_z * update * (1 - update), mask)
    tl.store(da + half, (grad_r + grad_rh * state) * reset * (1 - reset), mask)
    tl.store(dh + sample * (dh_stride * VEC) + lane, grad_rh * reset, mask)


@jit_kernel
def gru_update_bwd_kernel(
    dc,  # (B, C, *S), as all below
    dh_next,
    z,
    c,
    h,
    da,  # the gradient of xc and of hc
    dz,
    dh,
    lanes: tl.int64,  # C*N; this and the batch strides in units of VEC elements
    dc_stride: tl.int64,
    dh_next_stride: tl.int64,
    z_stride: tl.int64,
    c_stride: tl.int64,
    h_stride: tl.int64,
    da_stride: tl.int64,
    dz_stride: tl.int64,
    dh_stride: tl.int64,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    sample, lane, mask = program_lanes(lanes, BLOCK)
    grad_c = tl.load(dc + sample * (dc_stride * VEC) + lane, mask).to(ACC)
    grad_h = tl.load(dh_next + sample * (dh_next_stride * VEC) + lane, mask).to(ACC)
    update = tl.load(z + sample * (z_stride * VEC) + lane, mask).to(ACC)
    candidate = tl.load(c + sample * (c_stride * VEC) + lane, mask).to(ACC)
    state = tl.load(h + sample * (h_stride * VEC) + lane, mask).to(ACC)
    tl.store(da + sample * (da_stride * VEC) + lane, (grad_c + grad_h * update) * (1 - candidate * candidate), mask)
    tl.store(dz + sample * (dz_stride * VEC) + lane, grad_h * (candidate - state), mask)
    tl.store(dh + sample * (dh_stride * VEC) + lane, grad_h * (1 - update), mask)


def launch_step(
    kernel: triton.JITFunction, like: Tensor, *operands: Tensor | None, codes: tuple[Tensor | None, ...] = ()
) -> None:
    """Run an elementwise kernel over the lanes of ``like`` (B, C, *S); the batch strides of the operands are free. One that
    knows codes takes (codes,) behind its operands, (B,) or None."""
    lanes = frame_numel(like, 1)
    if like.shape[0] * lanes > 0:
        launch(kernel, like, (*operands, *codes), lanes, [0 if x is None else stride(x, 0) for x in operands])


def launch_gates(
    kernel: triton.JITFunction,
    like: Tensor,
    channels_last: bool,
    *operands: Tensor,
    codes: tuple[Tensor | None, ...] = (),
) -> None:
    """:func:`launch_step` for a kernel with pairs of gates among its operands."""
    lanes = frame_numel(like, 1)
    if like.shape[0] * lanes > 0:
        half = like.shape[1] if channels_last else lanes
        strides = [half, *(stride(x, 0) for x in operands)]
        launch(kernel, like, (*operands, *codes), lanes, strides, CHANNELS_LAST=channels_last)


def gru_gates_fwd(
    xp: Tensor,
    hp: Tensor,
    h: Tensor,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[z, r] = sigmoid(xp + hp), and r h.

    Args:
        xp: (B, 2C, *S).
        hp: (B, 2C, *S) in xp's dtype; its frames' layout is that of the results, others are copied to it.
        h: (B, C, *S) in xp's dtype or float32.
        out: where to put (z, r, rh): dense frames in that layout, any batch stride, possibly xp's own memory.
        codes: (B,) uint8, dense, or None for an ordinary step.

    Returns:
        z, r, rh (B, C, *S) in xp's dtype, dense unless given.
    """
    channels_last = is_channels_last(hp, 1)
    inputs = [to_layout(x, 1, channels_last) for x in (xp, hp, h)]
    z, r, rh = (empty(hp, h.shape, 1, channels_last, hp.dtype) for _ in range(3)) if out is None else out
    launch_gates(gru_gates_fwd_kernel, z, channels_last, *inputs, z, r, rh, codes=(codes,))
    return z, r, rh


def gru_update_fwd(
    xc: Tensor,
    hc: Tensor,
    z: Tensor,
    h: Tensor,
    out: tuple[Tensor, Tensor, Tensor | None] | None = None,
    frame: Tensor | None = None,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """c = tanh(xc + hc), h' = (1 - z) h + z c.

    Args:
        xc: (B, C, *S).
        hc: (B, C, *S), as z in xc's dtype; its frames' layout is that of the results, others are copied to it.
        z: (B, C, *S).
        h: (B, C, *S) in xc's dtype or float32.
        out: where to put (c, h', copy of h' or None): dense frames in that layout, any batch stride, possibly the memory
            of xc and h.
        frame: where to put one more copy of h'.
        codes: (B,) uint8, dense, or None for an ordinary step.

    Returns:
        c in xc's dtype and h' in h's, (B, C, *S), dense unless given.
    """
    channels_last = is_channels_last(hc, 1)
    inputs = [to_layout(x, 1, channels_last) for x in (xc, hc, z, h)]
    if out is None:
        c, h_next = (empty(hc, h.shape, 1, channels_last, x.dtype) for x in (hc, h))
        rounded = None
    else:
        c, h_next, rounded = out
    launch_step(gru_update_fwd_kernel, c, *inputs, c, h_next, rounded, frame, codes=(codes,))
    return c, h_next


def gru_gates_bwd(dz: Tensor, dr: Tensor, drh: Tensor, z: Tensor, r: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`gru_gates_fwd`; all arguments are (B, C, *S).

    Returns:
        da (B, 2C, *S) in z's dtype, the gradient of xp and of hp, and dh in h's dtype, both dense in the layout of z.
    """
    channels_last = is_channels_last(z, 1)
    inputs = [to_layout(x, 1, channels_last) for x in (dz, dr, drh, z, r, h)]
    da = empty(z, (z.shape[0], 2 * z.shape[1], *z.shape[2:]), 1, channels_last, z.dtype)
    dh = empty(z, h.shape, 1, channels_last, h.dtype)
    launch_gates(gru_gates_bwd_kernel, z, channels_last, *inputs, da, dh)
    return da, dh


def gru_update_bwd(dc: Tensor, dh_next: Tensor, z: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gru_update_fwd`; all arguments are (B, C, *S).

    Returns:
        da in c's dtype, the gradient of xc and of hc, dz in c's dtype, and dh in h's dtype, all dense in the layout of c.
    """
    channels_last = is_channels_last(c, 1)
    inputs = [to_layout(x, 1, channels_last) for x in (dc, dh_next, z, c, h)]
    da, dz, dh = (empty(c, c.shape, 1, channels_last, x.dtype) for x in (c, c, h))
    launch_step(gru_update_bwd_kernel, c, *inputs, da, dz, dh)
    return da, dz, dh
