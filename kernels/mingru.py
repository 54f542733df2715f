"""minGRU, gates and scan in one pass over the packed projection (Feng et al. 2024, arXiv 2410.01201).

z = sigmoid(gate), h_t = (1 - z_t) h_{t-1} + z_t g(hidden_t), g(x) = x + 1/2 for x >= 0, sigmoid(x) otherwise.

One thread keeps the state of a few lanes in registers and walks over time; U steps are loaded before the first of them
is computed, which is all the memory parallelism there is. Where lanes are few, T is cut in chunks (``chunks.py``).

Layout. gate_hidden (B, T, 2C, *S) holds gate in its first C channels and hidden in the others. With channels first, a
frame is C*N gates and then C*N hiddens (N = prod(S)); with channels last, each of N pixels is C gates and then C
hiddens. So lane i has its gate at i + (i // half) * half and its hidden ``half`` further, where half is C*N or C.

Rounding. The state moves from whichever end is nearer: h + z (g - h) for z < 1/2, g + (1 - z)(h - g) otherwise, and the
smaller of z and 1 - z is computed without cancellation. Rounding 1 - z would lose a small z; multiplying it out would
lose a small 1 - z.

Codes, one for each frame of a sample and so for all lanes of a program: bit 0 restarts the state, from 1/2, before the
frame; bit 1 holds it through the frame, which is selected away and not multiplied by zero.

Moved, in elements per lane and step: forward reads gate, hidden, writes h (3); backward reads gate, hidden, h, dh,
writes dgate, dhidden (6); a program reads a byte more a step for codes. Saved for backward: gate_hidden and h; z and g
are recomputed.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chunks import CUT_OFF, MAP_ARRAYS, cut, decay, linear_carries, program_chunk, scratch, store_map
from .layout import dense, empty, frame_numel, is_channels_last, to_layout
from .math import holds, jit_kernel, launch, restarts, sigmoid_tail, stride

# Steps loaded ahead. Backward holds four tensors a step: 4 steps take twice the registers of 2.
FORWARD_STEPS = 4
BACKWARD_STEPS = 2

START = tl.constexpr(0.5)  # g(0), the state without h0 and behind a restart


@triton.jit
def _gate(gate, ACC: tl.constexpr):
    """The smaller of z and 1 - z, and whether it is 1 - z, the share of h_{t-1} that the step keeps [BLOCK]."""
    gate = gate.to(ACC)
    return sigmoid_tail(gate), gate >= 0


@triton.jit
def _along(code_ptr, steps: tl.constexpr):
    """A number of itself would be an offset of 32 bits."""
    return code_ptr + tl.full((), steps, tl.int64)


@triton.jit
def _step(h, nearer, opens, hidden, code, ACC: tl.constexpr):
    """h_t from h_{t-1} [BLOCK]; here and below ``code`` is a scalar, or None."""
    if code is not None:
        h = tl.where(restarts(code), START, h)
    hidden = hidden.to(ACC)
    g = tl.where(hidden >= 0, hidden + 0.5, sigmoid_tail(hidden))
    near = tl.where(opens, g, h)
    far = tl.where(opens, h, g)
    moved = near + nearer * (far - near)
    if code is not None:
        moved = tl.where(holds(code), h, moved)
    return moved


@triton.jit
def _decay(kept, lost, nearer, opens, code):
    """The shares of what enters a chunk behind a step, in either direction of time [BLOCK]."""
    next_kept, next_lost = decay(kept, lost, nearer, opens)
    if code is not None:
        next_kept = tl.where(restarts(code), 0.0, tl.where(holds(code), kept, next_kept))
        next_lost = tl.where(restarts(code), CUT_OFF, tl.where(holds(code), lost, next_lost))
    return next_kept, next_lost


@triton.jit
def _passed(dh, nearer, opens, code):
    """The gradient of h_{t-1} through (1 - z_t) h_{t-1} from the whole gradient of h_t [BLOCK]."""
    product = dh * nearer
    passed = tl.where(opens, product, dh - product)
    if code is not None:
        passed = tl.where(restarts(code), 0.0, tl.where(holds(code), dh, passed))
    return passed


@triton.jit
def _step_backward(dh, nearer, opens, hidden, h_prev, code, ACC: tl.constexpr):
    """dgate_t, dhidden_t and the gradient of h_{t-1} from the whole gradient of h_t [BLOCK]."""
    hidden = hidden.to(ACC)
    if code is not None:
        h_prev = tl.where(restarts(code), START, h_prev.to(ACC))
    tail = sigmoid_tail(hidden)
    g = tl.where(hidden >= 0, hidden + 0.5, tail)
    dg = tl.where(hidden >= 0, 1.0, tail * (1 - tail))
    dgate = dh * (g - h_prev.to(ACC)) * nearer * (1 - nearer)
    dhidden = dh * tl.where(opens, 1 - nearer, nearer) * dg
    if code is not None:
        dgate = tl.where(holds(code), 0.0, dgate)
        dhidden = tl.where(holds(code), 0.0, dhidden)
    return dgate, dhidden, _passed(dh, nearer, opens, code)


@jit_kernel
def mingru_fwd_kernel(
    gate_hidden,  # (B, T, 2C, *S), batch and time strides free
    h0,  # (B, C, *S), batch stride free, or None for 1/2; with chunks (B, chunks, lanes), the state that enters each
    h,  # (B, T, C, *S), dense
    h_n,  # (B, C, *S), dense
    codes,  # (B, T) uint8, dense, or None: every frame is an ordinary step
    maps,  # (B, chunks, 3, lanes), dense: given, it alone is written, from a state of 0; else None
    T: tl.int32,
    chunk_steps: tl.int32,
    lanes: tl.int64,  # C*N; this and all below in units of VEC elements
    half: tl.int64,
    gh_stride_b: tl.int64,
    gh_stride_t: tl.int64,
    h0_stride_b: tl.int64,
    CHANNELS_LAST: tl.constexpr,
    CHUNKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    half *= VEC
    gh_stride_t *= VEC
    row, sample, first, steps, lane, mask = program_chunk(T, chunk_steps, lanes, CHUNKED, False, BLOCK)
    gate_ptr = gate_hidden + sample * (gh_stride_b * VEC) + first * gh_stride_t + lane
    if CHANNELS_LAST:
        gate_ptr += lane // half * half
    hidden_ptr = gate_ptr + half
    h_ptr = h + (sample * T + first) * lanes + lane
    if codes is not None:
        code_ptr = codes + (sample * T + first)

    if maps is not None:
        state = tl.zeros((BLOCK,), ACC)
        kept, lost = tl.full((BLOCK,), 1.0, ACC), tl.zeros((BLOCK,), ACC)
    elif h0 is not None:
        state = tl.load(h0 + row * (h0_stride_b * VEC) + lane, mask).to(ACC)
    else:
        state = tl.full((BLOCK,), START, ACC)
    for _ in range(steps // U):
        gates = ()
        hiddens = ()
        steps_codes = ()
        for u in tl.static_range(U):
            gates += (tl.load(gate_ptr + u * gh_stride_t, mask),)
            hiddens += (tl.load(hidden_ptr + u * gh_stride_t, mask),)
            if codes is not None:
                steps_codes += (tl.load(_along(code_ptr, u)),)
        for u in tl.static_range(U):
            nearer, opens = _gate(gates[u], ACC)
            code = steps_codes[u] if codes is not None else None
            state = _step(state, nearer, opens, hiddens[u], code, ACC)
            if maps is not None:
                kept, lost = _decay(kept, lost, nearer, opens, code)
            else:
                tl.store(h_ptr + u * lanes, state, mask)
        if codes is not None:
            code_ptr = _along(code_ptr, U)
        gate_ptr += U * gh_stride_t
        hidden_ptr += U * gh_stride_t
        h_ptr += U * lanes
    for _ in range(steps % U):
        nearer, opens = _gate(tl.load(gate_ptr, mask), ACC)
        code = tl.load(code_ptr) if codes is not None else None
        state = _step(state, nearer, opens, tl.load(hidden_ptr, mask), code, ACC)
        if maps is not None:
            kept, lost = _decay(kept, lost, nearer, opens, code)
        else:
            tl.store(h_ptr, state, mask)
        if codes is not None:
            code_ptr = _along(code_ptr, 1)
        gate_ptr += gh_stride_t
        hidden_ptr += gh_stride_t
        h_ptr += lanes
    if maps is not None:
        store_map(maps, row, lanes, lane, mask, kept, lost, state)
    else:
        tl.store(h_n + sample * lanes + lane, state, mask & (first + steps == T))


@jit_kernel
def mingru_bwd_kernel(
    dh,  # (B, T, C, *S), batch and time strides free, or None for zero
    dh_n,  # (B, C, *S), batch stride free, or None for zero; with chunks (B, chunks, lanes), what enters each
    gate_hidden,  # (B, T, 2C, *S), batch and time strides free
    h0,  # (B, C, *S), batch stride free, or None for 1/2
    h,  # (B, T, C, *S), batch and time strides free
    dgate_hidden,  # (B, T, 2C, *S), dense
    dh0,  # (B, C, *S), dense, or None if h0 is
    codes,  # (B, T) uint8, dense, or None
    maps,  # (B, chunks, 3, lanes), dense: given, it alone is written, from a gradient of 0; else None
    T: tl.int32,  # at least 1
    chunk_steps: tl.int32,
    lanes: tl.int64,  # C*N; this and all below in units of VEC elements
    half: tl.int64,
    gh_stride_b: tl.int64,
    gh_stride_t: tl.int64,
    h0_stride_b: tl.int64,
    h_stride_b: tl.int64,
    h_stride_t: tl.int64,
    dh_stride_b: tl.int64,
    dh_stride_t: tl.int64,
    dh_n_stride_b: tl.int64,
    CHANNELS_LAST: tl.constexpr,
    CHUNKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    half *= VEC
    gh_stride_t *= VEC
    h_stride_t *= VEC
    dh_stride_t *= VEC
    row, sample, first, steps, lane, mask = program_chunk(T, chunk_steps, lanes, CHUNKED, True, BLOCK)
    packed = lane
    if CHANNELS_LAST:
        packed += lane // half * half
    last = first + steps - 1
    gate_ptr = gate_hidden + sample * (gh_stride_b * VEC) + last * gh_stride_t + packed
    dgate_ptr = dgate_hidden + (sample * T + last) * (2 * lanes) + packed
    h_prev_ptr = h + sample * (h_stride_b * VEC) + (last - 1) * h_stride_t + lane  # not read at step 0
    if dh is not None:
        dh_ptr = dh + sample * (dh_stride_b * VEC) + last * dh_stride_t + lane
    if codes is not None:
        code_ptr = codes + (sample * T + last)

    if maps is not None:
        kept, lost = tl.full((BLOCK,), 1.0, ACC), tl.zeros((BLOCK,), ACC)
    if dh_n is not None:
        grad = tl.load(dh_n + row * (dh_n_stride_b * VEC) + lane, mask).to(ACC)
    else:
        grad = tl.zeros((BLOCK,), ACC)
    # The map depends on gates and dh alone.
    for _ in range((steps - 1) // U):
        gates = ()
        hiddens = ()
        h_prevs = ()
        dhs = ()
        steps_codes = ()
        for u in tl.static_range(U):
            gates += (tl.load(gate_ptr - u * gh_stride_t, mask),)
            if codes is not None:
                steps_codes += (tl.load(_along(code_ptr, -u)),)
            if maps is None:
                hiddens += (tl.load(gate_ptr - u * gh_stride_t + half, mask),)
                h_prevs += (tl.load(h_prev_ptr - u * h_stride_t, mask),)
            if dh is not None:
                dhs += (tl.load(dh_ptr - u * dh_stride_t, mask),)
        for u in tl.static_range(U):
            if dh is not None:
                grad += dhs[u].to(ACC)
            nearer, opens = _gate(gates[u], ACC)
            code = steps_codes[u] if codes is not None else None
            if maps is not None:
                kept, lost = _decay(kept, lost, nearer, opens, code)
                grad = _passed(grad, nearer, opens, code)
            else:
                dgate, dhidden, grad = _step_backward(grad, nearer, opens, hiddens[u], h_prevs[u], code, ACC)
                tl.store(dgate_ptr - u * 2 * lanes, dgate, mask)
                tl.store(dgate_ptr - u * 2 * lanes + half, dhidden, mask)
        gate_ptr -= U * gh_stride_t
        dgate_ptr -= U * 2 * lanes
        h_prev_ptr -= U * h_stride_t
        if codes is not None:
            code_ptr = _along(code_ptr, -U)
        if dh is not None:
            dh_ptr -= U * dh_stride_t
    for _ in range((steps - 1) % U):
        if dh is not None:
            grad += tl.load(dh_ptr, mask).to(ACC)
            dh_ptr -= dh_stride_t
        nearer, opens = _gate(tl.load(gate_ptr, mask), ACC)
        code = tl.load(code_ptr) if codes is not None else None
        if codes is not None:
            code_ptr = _along(code_ptr, -1)
        if maps is not None:
            kept, lost = _decay(kept, lost, nearer, opens, code)
            grad = _passed(grad, nearer, opens, code)
        else:
            hidden, h_prev = tl.load(gate_ptr + half, mask), tl.load(h_prev_ptr, mask)
            dgate, dhidden, grad = _step_backward(grad, nearer, opens, hidden, h_prev, code, ACC)
            tl.store(dgate_ptr, dgate, mask)
            tl.store(dgate_ptr + half, dhidden, mask)
        gate_ptr -= gh_stride_t
        dgate_ptr -= 2 * lanes
        h_prev_ptr -= h_stride_t

    # The first step. That of the sequence follows h0.
    if dh is not None:
        grad += tl.load(dh_ptr, mask).to(ACC)
    nearer, opens = _gate(tl.load(gate_ptr, mask), ACC)
    code = tl.load(code_ptr) if codes is not None else None
    if maps is not None:
        kept, lost = _decay(kept, lost, nearer, opens, code)
        store_map(maps, row, lanes, lane, mask, kept, lost, _passed(grad, nearer, opens, code))
    else:
        follows_h0 = mask
        if CHUNKED:
            follows_h0 = mask & (first == 0)
        if h0 is not None:
            h_prev = tl.load(h0 + sample * (h0_stride_b * VEC) + lane, follows_h0).to(ACC)
        else:
            h_prev = tl.full((BLOCK,), START, ACC)
        if CHUNKED:
            h_prev = tl.where(first > 0, tl.load(h_prev_ptr, mask & (first > 0)).to(ACC), h_prev)
        dgate, dhidden, grad = _step_backward(grad, nearer, opens, tl.load(gate_ptr + half, mask), h_prev, code, ACC)
        tl.store(dgate_ptr, dgate, mask)
        tl.store(dgate_ptr + half, dhidden, mask)
        if dh0 is not None:
            tl.store(dh0 + sample * lanes + lane, grad, follows_h0)


def _strides(gate_hidden: Tensor, h0: Tensor | None, lanes: int, channels_last: bool) -> tuple[int, ...]:
    """Lanes of half a run and the strides, in elements, that both kernels take in the order of their parameters."""
    half = gate_hidden.shape[2] // 2 if channels_last else lanes
    return half, stride(gate_hidden, 0), stride(gate_hidden, 1), 0 if h0 is None else stride(h0, 0)


def mingru_fwd(gate_hidden: Tensor, h0: Tensor | None = None, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """minGRU over a packed projection; the frame layout of ``gate_hidden`` is kept, any batch and time strides are read.

    Args:
        gate_hidden: (B, T, 2C, *S); frames in neither layout are copied to channels first.
        h0: (B, C, *S), or None for the state 1/2.
        codes: (B, T) uint8, or None for ordinary steps alone.

    Returns:
        h (B, T, C, *S) in gate_hidden's dtype and h_n (B, C, *S) in h0's (without h0, gate_hidden's), both dense.
    """
    channels_last = is_channels_last(gate_hidden, 2)
    gate_hidden = to_layout(gate_hidden, 2, channels_last)
    if h0 is not None:
        h0 = to_layout(h0, 1, channels_last)
    codes = None if codes is None else dense(codes)
    batch, steps, packed, *space = gate_hidden.shape
    frame = (packed // 2, *space)
    h = empty(gate_hidden, (batch, steps, *frame), 2, channels_last, gate_hidden.dtype)
    h_n = empty(gate_hidden, (batch, *frame), 1, channels_last, gate_hidden.dtype if h0 is None else h0.dtype)
    if h_n.numel() == 0:
        return h, h_n

    lanes = frame_numel(h_n, 1)
    chunk, chunks = cut(gate_hidden, lanes)
    maps = scratch(gate_hidden, chunks, MAP_ARRAYS.value, lanes) if chunks > 1 else None

    def run(h0: Tensor | None, reduced: Tensor | None = None) -> None:
        launch(
            mingru_fwd_kernel,
            gate_hidden if maps is None else maps,
            (gate_hidden, h0, h, h_n, codes, reduced),
            lanes,
            _strides(gate_hidden, h0, lanes, channels_last),
            (steps, chunk),
            chunks,
            CHANNELS_LAST=channels_last,
            CHUNKED=chunks > 1,
            U=FORWARD_STEPS,
        )

    if maps is not None:
        run(None, maps)
        h0 = linear_carries(gate_hidden, h0, maps, value=START.value, restarts=codes is not None)
    run(h0)
    return h, h_n


def mingru_bwd(
    dh: Tensor | None,
    dh_n: Tensor | None,
    gate_hidden: Tensor,
    h0: Tensor | None,
    h: Tensor,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`mingru_fwd`.

    Args:
        dh: gradient of h (B, T, C, *S), or None for zero.
        dh_n: gradient of h_n (B, C, *S), or None for zero.
        gate_hidden: as in forward.
        h0: as in forward.
        h: what forward returned.
        codes: as in forward.

    Returns:
        dgate_hidden like gate_hidden, dense, and dh0 like h0, dense (empty, of shape (0,), if h0 is None).
    """
    channels_last = is_channels_last(gate_hidden, 2)
    gate_hidden, h = to_layout(gate_hidden, 2, channels_last), to_layout(h, 2, channels_last)
    dh = None if dh is None else to_layout(dh, 2, channels_last)
    dh_n = None if dh_n is None else to_layout(dh_n, 1, channels_last)
    codes = None if codes is None else dense(codes)
    dgate_hidden = empty(gate_hidden, gate_hidden.shape, 2, channels_last, gate_hidden.dtype)
    if h0 is None:
        dh0 = gate_hidden.new_empty((0,))
    else:
        h0 = to_layout(h0, 1, channels_last)
        dh0 = empty(h0, h0.shape, 1, channels_last, h0.dtype)
    if dgate_hidden.numel() == 0:  # without a step the state passes through
        return dgate_hidden, dh0.zero_() if dh_n is None or h0 is None else dh0.copy_(dh_n)

    lanes = frame_numel(h, 2)
    chunk, chunks = cut(gate_hidden, lanes)
    maps = scratch(gate_hidden, chunks, MAP_ARRAYS.value, lanes) if chunks > 1 else None

    def run(dh_n: Tensor | None, reduced: Tensor | None = None) -> None:
        strides = (
            *_strides(gate_hidden, h0, lanes, channels_last),
            *(stride(h, 0), stride(h, 1)),
            *((0, 0) if dh is None else (stride(dh, 0), stride(dh, 1))),
            0 if dh_n is None else stride(dh_n, 0),
        )
        launch(
            mingru_bwd_kernel,
            gate_hidden if maps is None else maps,
            (dh, dh_n, gate_hidden, h0, h, dgate_hidden, None if h0 is None else dh0, codes, reduced),
            lanes,
            strides,
            (gate_hidden.shape[1], chunk),
            chunks,
            CHANNELS_LAST=channels_last,
            CHUNKED=chunks > 1,
            U=BACKWARD_STEPS,
        )

    if maps is not None:
        run(None, maps)
        dh_n = linear_carries(gate_hidden, dh_n, maps, restarts=codes is not None)
    run(dh_n)
    return dgate_hidden, dh0
