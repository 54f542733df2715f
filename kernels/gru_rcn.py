"""GRU-RCN over a whole sequence (Ballas et al., ICLR 2016, arXiv 1511.06432); * is convolution.

z = s(W_z*x + U_z*h), r = s(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1 - z).h + z.c

Forward runs the input convolution once over all B*T frames; a step is two convolutions (U, C) and two kernels (gates,
update), or, where ``step`` says so, two kernels that convolve themselves (``gru_step``). The activations z, r, c are written over
the input projection, and they and h are all that is saved. A projection that was given instead of x is read where it is.
Backward runs the two data-gradient convolutions and two kernels a step, keeps the gradients of all pre-activations, and
takes every weight gradient, and x's, once over all B*T frames.

The state and its gradient are float32 from step to step (float64 for float64), convolutions see them rounded to x's
dtype. Moved between memory and the kernels, in elements per lane and step: forward 15 (16 where the state is rounded),
backward 18, three of which are second copies that spare a convolution the copying of its batch-strided input.
Codes, a byte for each frame of a sample, are read by every kernel of a step (``gru_gates``): one that restarts drops what the
convolution made of the state before; in backward, the gradients that it and a held one pass on are selected, and the batched
weight gradients see zeros in place of the states that were not read.
There is no synchronisation with the host and no allocation that depends on data, so both directions can be captured in
a CUDA graph.
"""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from .gru_gates import gru_gates_fwd, gru_update_fwd, launch_step
from .gru_step import gru_conv_step_fwd, pack_weights, use_gemm
from .layout import dense, state_dtype, to_layout
from .math import HOLD, RESTART, holds, jit_kernel, program_lanes, restarts


@jit_kernel
def gru_rcn_bwd_candidate_kernel(
    dh,  # (B, C, *S) in ACC: in, gradient from the later steps; out, what of it reaches h_prev past the gates
    conv,  # (B, C, *S), added to dh on the way in, or None
    dout,  # (B, C, *S), likewise, or None
    z,  # (B, C, *S)
    c,  # (B, C, *S)
    h_prev,  # (B, C, *S)
    dz,  # (B, C, *S), gradient of z's pre-activation
    dc,  # (B, C, *S), gradient of c's pre-activation
    dz_frame,  # a copy of dz
    dc_frame,  # a copy of dc
    codes,  # (B,) uint8, or None; where a frame restarts, the copies are zero, for nothing passes to the state before
    lanes: tl.int64,  # C*N; this and the batch strides in units of VEC elements
    dh_stride: tl.int64,
    conv_stride: tl.int64,
    dout_stride: tl.int64,
    z_stride: tl.int64,
    c_stride: tl.int64,
    h_prev_stride: tl.int64,
    dz_stride: tl.int64,
    dc_stride: tl.int64,
    dz_frame_stride: tl.int64,
    dc_frame_stride: tl.int64,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    sample, lane, mask = program_lanes(lanes, BLOCK)
    dh += sample * (dh_stride * VEC) + lane
    grad = tl.load(dh, mask)
    if conv is not None:
        grad += tl.load(conv + sample * (conv_stride * VEC) + lane, mask).to(ACC)
    if dout is not None:
        grad += tl.load(dout + sample * (dout_stride * VEC) + lane, mask).to(ACC)
    update = tl.load(z + sample * (z_stride * VEC) + lane, mask).to(ACC)
    candidate = tl.load(c + sample * (c_stride * VEC) + lane, mask).to(ACC)
    state = tl.load(h_prev + sample * (h_prev_stride * VEC) + lane, mask).to(ACC)
    if codes is not None:
        code = tl.load(codes + sample)
        state = tl.where(restarts(code), 0.0, state)
    grad_z = grad * (candidate - state) * update * (1 - update)
    grad_c = grad * update * (1 - candidate * candidate)
    passed = grad * (1 - update)
    if codes is not None:
        grad_z, grad_c = tl.where(holds(code), 0.0, grad_z), tl.where(holds(code), 0.0, grad_c)
        passed = tl.where(restarts(code), 0.0, tl.where(holds(code), grad, passed))
    tl.store(dh, passed, mask)
    tl.store(dz + sample * (dz_stride * VEC) + lane, grad_z, mask)
    tl.store(dc + sample * (dc_stride * VEC) + lane, grad_c, mask)
    if codes is not None:
        grad_z, grad_c = tl.where(restarts(code), 0.0, grad_z), tl.where(restarts(code), 0.0, grad_c)
    tl.store(dz_frame + sample * (dz_frame_stride * VEC) + lane, grad_z, mask)
    tl.store(dc_frame + sample * (dc_frame_stride * VEC) + lane, grad_c, mask)


@jit_kernel
def gru_rcn_bwd_reset_kernel(
    dh,  # (B, C, *S) in ACC: in, as the candidate kernel left it; out, with what reaches h_prev through r.h
    drh,  # (B, C, *S), gradient of r.h
    r,  # (B, C, *S)
    h_prev,  # (B, C, *S)
    dr,  # (B, C, *S), gradient of r's pre-activation
    dr_frame,  # a copy of dr
    codes,  # (B,) uint8, or None
    lanes: tl.int64,  # C*N; this and the batch strides in units of VEC elements
    dh_stride: tl.int64,
    drh_stride: tl.int64,
    r_stride: tl.int64,
    h_prev_stride: tl.int64,
    dr_stride: tl.int64,
    dr_frame_stride: tl.int64,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    sample, lane, mask = program_lanes(lanes, BLOCK)
    dh += sample * (dh_stride * VEC) + lane
    grad_h = tl.load(dh, mask)
    grad = tl.load(drh + sample * (drh_stride * VEC) + lane, mask).to(ACC)
    reset = tl.load(r + sample * (r_stride * VEC) + lane, mask).to(ACC)
    state = tl.load(h_prev + sample * (h_prev_stride * VEC) + lane, mask).to(ACC)
    grad_r = grad * state * reset * (1 - reset)
    passed = grad_h + grad * reset
    if codes is not None:
        code = tl.load(codes + sample)
        unread = restarts(code) | holds(code)
        grad_r, passed = tl.where(unread, 0.0, grad_r), tl.where(unread, grad_h, passed)
    tl.store(dh, passed, mask)
    tl.store(dr + sample * (dr_stride * VEC) + lane, grad_r, mask)
    tl.store(dr_frame + sample * (dr_frame_stride * VEC) + lane, grad_r, mask)


def _padding(weight: Tensor) -> list[int]:
    return [size // 2 for size in weight.shape[2:]]


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """A convolution that keeps the frame's size (odd kernels); transposed, its gradient with respect to its input."""
    ones, zeros = [1] * (weight.dim() - 2), [0] * (weight.dim() - 2)
    return torch.ops.aten.convolution(x, weight, bias, ones, _padding(weight), ones, transposed, zeros, 1).contiguous()


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (x, weight, bias) over all frames at once; grad and x are (B, T, channels, *S)."""
    ones, zeros = [1] * (weight.dim() - 2), [0] * (weight.dim() - 2)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad.flatten(0, 1),
        x.flatten(0, 1),
        weight,
        [weight.shape[0]],
        *(ones, _padding(weight), ones, False, zeros, 1),
        output_mask,
    )
    return dx.view(x.shape) if output_mask[0] else None, dweight, dbias


def _step_codes(codes: Tensor | None, steps: int) -> Sequence[Tensor | None]:
    """The codes (B,) of each step, dense."""
    return [None] * steps if codes is None else codes.t().contiguous().unbind()


def gru_rcn_fwd(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None,
    step: str = "cudnn",
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """GRU-RCN over (B, T) frames of 1, 2 or 3 dimensions.

    Args:
        x: (B, T, Ox, *S), or without W the projection (B, T, 3*Oh, *S).
        h0: (B, Oh, *S), or None for zeros.
        W: (3*Oh, Ox, *k), input weights in the order z, r, candidate, or None; all kernel sizes are odd.
        U: (2*Oh, Oh, *k'), recurrent weights z, r.
        C: (Oh, Oh, *k'), candidate's recurrent weights.
        bias: (3*Oh,), or None; None without W.
        step: "cudnn", "gemm" or "auto": how a step is computed, see :func:`use_gemm`.
        codes: (B, T) uint8, or None for ordinary steps alone.

    Returns:
        out (B, T, Oh, *S) in x's dtype, h_n (B, Oh, *S) in h0's (without h0, x's), gates (B, T, 3*Oh, *S), the
        activations z, r, c for backward; all contiguous.
    """
    batch, steps, _, *space = x.shape
    features = C.shape[0]
    out = x.new_empty((batch, steps, features, *space))
    gemm = out.numel() > 0 and use_gemm(step, x, U, C)
    state_shape = (batch, *space, features) if gemm else (batch, features, *space)
    if h0 is None:
        state = x.new_zeros(state_shape, dtype=state_dtype(x))
    else:
        first = h0.movedim(1, -1) if gemm else h0
        state = first.to(state_dtype(x), copy=True, memory_format=torch.contiguous_format)
    dtype = x.dtype if h0 is None else h0.dtype
    if out.numel() == 0:
        return out, state.to(dtype), x.new_empty((batch, steps, 3 * features, *space))

    U, C = U.contiguous(), C.contiguous()  # a convolution by channels-last weights returns what is copied in each step
    if W is not None:
        gates = projection = dense(_conv(x.flatten(0, 1), W, bias).view(batch, steps, 3 * features, *space))
    else:
        gates, projection = x.new_empty((batch, steps, 3 * features, *space)), to_layout(x, 2, channels_last=False)
    # What the convolutions see of the state: the state itself, or a copy rounded to x's dtype.
    rounds = x.dtype != state.dtype
    frame = state.to(x.dtype)
    rh = torch.empty_like(frame)
    step_codes = _step_codes(codes, steps)
    if gemm:
        weights = pack_weights(U, C)
        if gates is not projection:
            gates.copy_(projection)  # these kernels work in place
        for t in range(steps):
            zero = t == 0 and h0 is None
            gru_conv_step_fwd(gates[:, t], state, frame, rh, out[:, t], *weights, zero, step_codes[t])
        return out, dense(state.movedim(-1, 1).to(dtype)), gates
    no_state = x.new_zeros((1, 2 * features, *space)).expand(batch, -1, *space)
    for t in range(steps):
        skip = t == 0 and h0 is None  # convolutions of a zero state
        xp = projection[:, t]
        z, r, c = gates[:, t].chunk(3, dim=1)
        hp = no_state if skip else _conv(frame, U)
        gru_gates_fwd(xp[:, : 2 * features], hp, state, (z, r, rh), step_codes[t])
        hc = no_state[:, :features] if skip else _conv(rh, C)
        third = frame if rounds else None
        gru_update_fwd(xp[:, 2 * features :], hc, z, state, (c, state, out[:, t]), third, step_codes[t])
    return out, state.to(dtype), gates


def gru_rcn_bwd(
    dout: Tensor | None,
    dh_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    out: Tensor,
    gates: Tensor,
    output_mask: list[bool],
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gru_rcn_fwd`.

    Args:
        dout: gradient of out, or None for zero.
        dh_n: gradient of h_n, or None for zero.
        x, h0, W, U, C: as in forward; without W, x is not read.
        out, gates: what forward returned.
        output_mask: which of the gradients of (x, h0, W, U, C, bias) are wanted.
        codes: as in forward.

    Returns:
        Gradients of (x, h0, W, U, C, bias); of shape (0,) where not wanted.
    """
    wanted = list(output_mask)
    wanted[1] = wanted[1] and h0 is not None
    wanted[2], wanted[5] = wanted[2] and W is not None, wanted[5] and W is not None
    U, C, out, gates = (tensor.contiguous() for tensor in (U, C, out, gates))
    state_shape = (out.shape[0], *out.shape[2:])
    if dh_n is None:
        dh = x.new_zeros(state_shape, dtype=state_dtype(x))
    else:
        dh = dh_n.to(state_dtype(x), copy=True, memory_format=torch.contiguous_format)
    grads: list[Tensor | None]
    if out.numel() == 0:  # no frame, or none with a pixel and a channel: the state passes through
        grads = [torch.zeros_like(x), dh, None if W is None else torch.zeros_like(W)]
        grads += [torch.zeros_like(U), torch.zeros_like(C), x.new_zeros(3 * C.shape[0])]
    else:
        da = torch.empty_like(gates)
        dout = None if dout is None else dout.contiguous()
        wants_r = any(wanted[:4]) or wanted[5]
        dh = _walk_back(dout, dh, h0, U, C, out, gates, da, codes, wants_h0=wanted[1], wants_r=wants_r)
        dx = dW = dbias = None
        if W is None:
            dx = da
        elif wanted[0] or wanted[2] or wanted[5]:
            if codes is not None and wanted[2]:
                x = _zero_where(codes & HOLD.value, x)
            dx, dW, dbias = _conv_backward(da, x, W, [wanted[0], wanted[2], wanted[5]])
        grads = [dx, dh, dW, *_recurrent_weight_grads(da, h0, U, C, out, gates, wanted[3], wanted[4], codes), dbias]
    if wanted[1]:
        grads[1] = dh.to(h0.dtype)
    # A library may return what the mask did not ask for.
    return tuple(dense(grad) if want else x.new_empty((0,)) for grad, want in zip(grads, wanted, strict=True))


def _walk_back(
    dout: Tensor | None,
    dh: Tensor,
    h0: Tensor | None,
    U: Tensor,
    C: Tensor,
    out: Tensor,
    gates: Tensor,
    da: Tensor,
    codes: Tensor | None,
    wants_h0: bool,
    wants_r: bool,
) -> Tensor:
    """Fill da (B, T, 3*Oh, *S), the gradients of the pre-activations, and return the gradient of h0 if it is wanted.

    ``dh`` enters as the gradient of h_n and is overwritten. Without ``wants_r``, da of the first step's r is not needed.
    """
    batch, steps, features, *space = out.shape
    dzr_frame = out.new_empty((batch, 2 * features, *space))
    dz_frame, dr_frame = dzr_frame[:, :features], dzr_frame[:, features:]
    dc_frame = out.new_empty((batch, features, *space))
    first = out.new_zeros((1, features, *space)).expand(batch, -1, *space) if h0 is None else h0.contiguous()
    conv = None
    step_codes = _step_codes(codes, steps)
    for t in reversed(range(steps)):
        z, r, c = gates[:, t].chunk(3, dim=1)
        dz, dr, dc = da[:, t].chunk(3, dim=1)
        h_prev = out[:, t - 1] if t > 0 else first
        dout_t = None if dout is None else dout[:, t]
        code = (step_codes[t],)
        launch_step(
            *(gru_rcn_bwd_candidate_kernel, z, dh, conv, dout_t, z, c, h_prev, dz, dc, dz_frame, dc_frame), codes=code
        )
        if t == 0 and (h0 is None or not wants_r):
            dr.zero_()  # r acted on a zero state
            break
        drh = _conv(dc_frame, C, transposed=True)
        launch_step(gru_rcn_bwd_reset_kernel, z, dh, drh, r, h_prev, dr, dr_frame, codes=code)
        if t > 0 or wants_h0:
            conv = _conv(dzr_frame, U, transposed=True)
    return dh.add_(conv) if wants_h0 and conv is not None else dh


def _zero_where(flags: Tensor, x: Tensor) -> Tensor:
    """x (B, T, ...), with zeros in the frames of ``flags`` (B, T) that are not 0."""
    return x.masked_fill((flags != 0).view(*flags.shape, *(1 for _ in x.shape[2:])), 0.0)


def _recurrent_weight_grads(
    da: Tensor,
    h0: Tensor | None,
    U: Tensor,
    C: Tensor,
    out: Tensor,
    gates: Tensor,
    wants_U: bool,
    wants_C: bool,
    codes: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of U and C over all frames at once."""
    if not (wants_U or wants_C):
        return None, None
    features, steps = C.shape[0], out.shape[1]
    h_prev = out[:, :-1]
    if h0 is not None:
        h_prev = torch.cat((h0.to(out.dtype).unsqueeze(1), h_prev), dim=1)[:, :steps]
    # Without h0 the first frame follows a zero state and adds nothing.
    skipped = steps - h_prev.shape[1]
    da, gates = da[:, skipped:], gates[:, skipped:]
    if codes is not None:
        h_prev = _zero_where(codes[:, skipped:] & (RESTART.value | HOLD.value), h_prev)
    dU = dC = None
    if wants_U:
        dU = _conv_backward(da[:, :, : 2 * features], h_prev, U, [False, True, False])[1]
    if wants_C:
        rh = gates[:, :, features : 2 * features] * h_prev
        dC = _conv_backward(da[:, :, 2 * features :], rh, C, [False, True, False])[1]
    return dU, dC
