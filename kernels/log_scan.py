"""The linear recurrence on logarithms (Heinsen 2023, arXiv 2311.06281): log x_t given log a_t and log b_t.

x_0 = b_0, x_t = a_t x_{t-1} + b_t. a, b and x are positive or zero (logarithm -inf); there is one more b than a.

One thread keeps the state of a few lanes and walks over time, U steps loaded before the first is computed. Where lanes
are few, T is cut in chunks (``chunks.py``), whose maps combine as steps do.

The state is (m, s) with x = s exp(m). While log b_t - (m + log a_t) <= HEADROOM, m absorbs log a_t and s gains
exp(log b_t - m); above it, m restarts at log b_t and s is scaled: one exponential a step either way, and one logarithm
for the output. Two sums run over all of T, so both carry their rounding errors along: m sums log a, s contributions.
Without headroom a = 1 - small would pass through exp(log a) rounded near 1, and a sum of T terms amplifies that; with
much of it, m and log s grow apart and cancel. Error at T = 65,536, emulated in float32, relative to max(1, |log x|):
at most 3e-7 over eight families of input, against 5e-4 for plain sums without headroom.

Zeros: logarithms are clamped to -1e30, so no infinity meets another, and outputs below half of that become -inf.

Backward. With d_t = log a_t + log x_{t-1} - log b_t, p_t = a_t x_{t-1} / x_t = sigmoid(d_t), q_t = b_t / x_t = 1 - p_t
(both 0 where x_t = 0; q_0 = 1): G_t = dlog_x_t + p_{t+1} G_{t+1}, dlog_a_t = p_t G_t, dlog_b_t = q_t G_t.

State, arithmetic and log x are float32 whatever the inputs, float64 for float64: log x rounded to 16 bits would move x by
a share of |log x|. Moved, in elements per lane and step: forward 3, backward 6
(reads log a, log b, log x, dlog x; writes dlog a, dlog b). Saved: log a, log b, log x; p and q are recomputed.
"""

import triton
import triton.language as tl
from torch import Tensor

from .chunks import (
    CARRIES_AHEAD,
    MAP_ARRAYS,
    cut,
    decay,
    launch_carries,
    linear_carries,
    program_chunk,
    scratch,
    store_map,
)
from .layout import frame_numel, has_layout, state_dtype
from .math import jit_kernel, launch, program_lanes, sigmoid_tail, stride

FORWARD_STEPS = 4
BACKWARD_STEPS = 2

HEADROOM = tl.constexpr(1.0)
ZERO = tl.constexpr(-1e30)


@triton.jit
def _two_sum(a, b):
    """a + b and its rounding error, for finite a and b of any order."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit
def _finite(log, ACC: tl.constexpr):
    return tl.maximum(log.to(ACC), ZERO, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _step(m, m_low, s, s_low, log_a, log_b, ACC: tl.constexpr):
    """x_t = a_t x_{t-1} + b_t on x = (s + s_low) exp(m + m_low) [BLOCK]."""
    log_b = _finite(log_b, ACC)
    moved, error = _two_sum(m, _finite(log_a, ACC))
    moved_low = m_low + error
    d = (moved - log_b) + moved_low
    restart = d < -HEADROOM
    e = tl.exp(tl.where(restart, d, -d))
    scale = tl.where(restart, e, 1.0)
    s, error = _two_sum(s * scale, tl.where(restart, 1.0, e))
    return tl.where(restart, log_b, moved), tl.where(restart, 0.0, moved_low), s, s_low * scale + error


@triton.jit
def _log(m, m_low, s, s_low):
    log_x = m + (m_low + tl.log(s + s_low))
    return tl.where(log_x < 0.5 * ZERO, -float("inf"), log_x)


@triton.jit
def _add(total, low, x):
    """A compensated sum, one term longer."""
    total, error = _two_sum(total, x)
    return total, low + error


@triton.jit
def _state(log_x):
    return log_x, tl.zeros_like(log_x), tl.full(log_x.shape, 1.0, log_x.dtype), tl.zeros_like(log_x)


@triton.jit
def _load_state(ptr, lanes, mask):
    m, m_low = tl.load(ptr, mask), tl.load(ptr + lanes, mask)
    return m, m_low, tl.load(ptr + 2 * lanes, mask), tl.load(ptr + 3 * lanes, mask)


@triton.jit
def _store_state(ptr, lanes, mask, m, m_low, s, s_low):
    tl.store(ptr, m, mask)
    tl.store(ptr + lanes, m_low, mask)
    tl.store(ptr + 2 * lanes, s, mask)
    tl.store(ptr + 3 * lanes, s_low, mask)


@jit_kernel
def log_scan_fwd_kernel(
    log_a,  # (B, T, *S), batch and time strides free
    log_b,  # (B, T + 1, *S), batch and time strides free
    log_x,  # (B, T + 1, *S), contiguous
    carries,  # (B, chunks, 4, lanes), dense: the state that enters each chunk; else None
    maps,  # (B, chunks, 6, lanes), dense: given, it alone is written, from a state of 0; else None
    T: tl.int32,
    chunk_steps: tl.int32,
    lanes: tl.int64,  # prod(S); this and all below in units of VEC elements
    la_stride_b: tl.int64,
    la_stride_t: tl.int64,
    lb_stride_b: tl.int64,
    lb_stride_t: tl.int64,
    CHUNKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    la_stride_t *= VEC
    lb_stride_t *= VEC
    row, sample, first, steps, lane, mask = program_chunk(T, chunk_steps, lanes, CHUNKED, False, BLOCK)
    a_ptr = log_a + sample * (la_stride_b * VEC) + first * la_stride_t + lane
    b_ptr = log_b + sample * (lb_stride_b * VEC) + first * lb_stride_t + lane
    x_ptr = log_x + (sample * (T + 1) + first) * lanes + lane

    if maps is not None:
        sum_a, sum_a_low = tl.zeros((BLOCK,), ACC), tl.zeros((BLOCK,), ACC)
        m, m_low, s, s_low = _state(tl.full((BLOCK,), ZERO, ACC))
    elif carries is not None:
        m, m_low, s, s_low = _load_state(carries + row * 4 * lanes + lane, lanes, mask)
    else:
        m, m_low, s, s_low = _state(_finite(tl.load(b_ptr, mask), ACC))
    if maps is None:
        tl.store(x_ptr, _log(m, m_low, s, s_low), mask & (first == 0))
    b_ptr += lb_stride_t
    x_ptr += lanes
    for _ in range(steps // U):
        log_as = ()
        log_bs = ()
        for u in tl.static_range(U):
            log_as += (tl.load(a_ptr + u * la_stride_t, mask),)
            log_bs += (tl.load(b_ptr + u * lb_stride_t, mask),)
        for u in tl.static_range(U):
            m, m_low, s, s_low = _step(m, m_low, s, s_low, log_as[u], log_bs[u], ACC)
            if maps is not None:
                sum_a, sum_a_low = _add(sum_a, sum_a_low, _finite(log_as[u], ACC))
            else:
                tl.store(x_ptr + u * lanes, _log(m, m_low, s, s_low), mask)
        a_ptr += U * la_stride_t
        b_ptr += U * lb_stride_t
        x_ptr += U * lanes
    for _ in range(steps % U):
        log_a_t = tl.load(a_ptr, mask)
        m, m_low, s, s_low = _step(m, m_low, s, s_low, log_a_t, tl.load(b_ptr, mask), ACC)
        if maps is not None:
            sum_a, sum_a_low = _add(sum_a, sum_a_low, _finite(log_a_t, ACC))
        else:
            tl.store(x_ptr, _log(m, m_low, s, s_low), mask)
        a_ptr += la_stride_t
        b_ptr += lb_stride_t
        x_ptr += lanes
    if maps is not None:
        map_ptr = maps + row * 6 * lanes + lane
        _store_state(map_ptr, lanes, mask, m, m_low, s, s_low)
        tl.store(map_ptr + 4 * lanes, sum_a, mask)
        tl.store(map_ptr + 5 * lanes, sum_a_low, mask)


@triton.jit
def _load_map(ptr, lanes, mask):
    m, m_low, s, s_low = _load_state(ptr, lanes, mask)
    return m, m_low, s, s_low, tl.load(ptr + 4 * lanes, mask), tl.load(ptr + 5 * lanes, mask)


@triton.jit
def _carry(m, m_low, s, s_low, chunk_map):
    """The state behind a chunk: what enters it times exp(sum_a), and what it ends with from nothing."""
    end_m, end_m_low, end_s, end_s_low, sum_a, sum_a_low = chunk_map
    moved, moved_low = _add(m, m_low, sum_a)
    moved_low += sum_a_low
    d = (moved - end_m) + (moved_low - end_m_low)
    restart = d < -HEADROOM
    e = tl.exp(tl.where(restart, d, -d))
    mine = tl.where(restart, e, 1.0)
    its = tl.where(restart, 1.0, e)
    s, error = _two_sum(s * mine, end_s * its)
    m, m_low = tl.where(restart, end_m, moved), tl.where(restart, end_m_low, moved_low)
    return m, m_low, s, s_low * mine + (end_s_low * its + error)


@jit_kernel
def log_scan_carry_kernel(
    log_b,  # (B, T + 1, *S), batch stride free
    maps,  # (B, chunks, 6, lanes), dense: m, m_low, s, s_low from a state of 0, sum of log a and its rounding error
    carries,  # (B, chunks, 4, lanes), dense: m, m_low, s, s_low
    chunks: tl.int32,
    lanes: tl.int64,
    lb_stride_b: tl.int64,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
    ACC: tl.constexpr,
):
    sample, lane, mask = program_lanes(lanes, BLOCK)
    m, m_low, s, s_low = _state(_finite(tl.load(log_b + sample * lb_stride_b + lane, mask), ACC))
    map_ptr = maps + sample * chunks * 6 * lanes + lane
    carry_ptr = carries + sample * chunks * 4 * lanes + lane
    for _ in range(chunks // U):
        chunk_maps = ()
        for u in tl.static_range(U):
            chunk_maps += (_load_map(map_ptr + u * 6 * lanes, lanes, mask),)
        for u in tl.static_range(U):
            _store_state(carry_ptr + u * 4 * lanes, lanes, mask, m, m_low, s, s_low)
            m, m_low, s, s_low = _carry(m, m_low, s, s_low, chunk_maps[u])
        map_ptr += U * 6 * lanes
        carry_ptr += U * 4 * lanes
    for _ in range(chunks % U):
        _store_state(carry_ptr, lanes, mask, m, m_low, s, s_low)
        m, m_low, s, s_low = _carry(m, m_low, s, s_low, _load_map(map_ptr, lanes, mask))
        map_ptr += 6 * lanes
        carry_ptr += 4 * lanes


@triton.jit
def _shares(log_a, log_b, log_x_prev, ACC: tl.constexpr):
    """p and q, the shares of x_t that a_t x_{t-1} and b_t make up; the smaller of them, and whether that is p [BLOCK]."""
    carried = log_a.to(ACC) + log_x_prev.to(ACC)
    log_b = log_b.to(ACC)
    d = carried - log_b
    tail = sigmoid_tail(d)
    head = 1 - tail
    zero = (carried == -float("inf")) & (log_b == -float("inf"))
    p = tl.where(zero, 0.0, tl.where(d >= 0, head, tail))
    q = tl.where(zero, 0.0, tl.where(d >= 0, tail, head))
    return p, q, tl.where(zero, 0.0, tail), (d < 0) | zero


@jit_kernel
def log_scan_bwd_kernel(
    dlog_x,  # (B, T + 1, *S), batch and time strides free
    log_a,  # (B, T, *S), batch and time strides free
    log_b,  # (B, T + 1, *S), batch and time strides free
    log_x,  # (B, T + 1, *S), batch and time strides free
    dlog_a,  # (B, T, *S), contiguous
    dlog_b,  # (B, T + 1, *S), contiguous
    carries,  # (B, chunks, lanes), dense: the gradient that enters each chunk; else None
    maps,  # (B, chunks, 3, lanes), dense: given, it alone is written, from a gradient of 0; else None
    T: tl.int32,
    chunk_steps: tl.int32,
    lanes: tl.int64,  # prod(S); this and all below in units of VEC elements
    la_stride_b: tl.int64,
    la_stride_t: tl.int64,
    lb_stride_b: tl.int64,
    lb_stride_t: tl.int64,
    lx_stride_b: tl.int64,
    lx_stride_t: tl.int64,
    dlx_stride_b: tl.int64,
    dlx_stride_t: tl.int64,
    CHUNKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    la_stride_t *= VEC
    lb_stride_t *= VEC
    lx_stride_t *= VEC
    dlx_stride_t *= VEC
    row, sample, first, steps, lane, mask = program_chunk(T, chunk_steps, lanes, CHUNKED, True, BLOCK)
    end = first + steps
    a_ptr = log_a + sample * (la_stride_b * VEC) + (end - 1) * la_stride_t + lane
    b_ptr = log_b + sample * (lb_stride_b * VEC) + end * lb_stride_t + lane
    x_prev_ptr = log_x + sample * (lx_stride_b * VEC) + (end - 1) * lx_stride_t + lane
    dx_ptr = dlog_x + sample * (dlx_stride_b * VEC) + end * dlx_stride_t + lane
    da_ptr = dlog_a + (sample * T + (end - 1)) * lanes + lane
    db_ptr = dlog_b + (sample * (T + 1) + end) * lanes + lane

    if maps is not None:
        kept, lost = tl.full((BLOCK,), 1.0, ACC), tl.zeros((BLOCK,), ACC)
    if carries is not None:
        grad = tl.load(carries + row * lanes + lane, mask)
    else:
        grad = tl.zeros((BLOCK,), ACC)
    for _ in range(steps // U):
        log_as = ()
        log_bs = ()
        x_prevs = ()
        dxs = ()
        for u in tl.static_range(U):
            log_as += (tl.load(a_ptr - u * la_stride_t, mask),)
            log_bs += (tl.load(b_ptr - u * lb_stride_t, mask),)
            x_prevs += (tl.load(x_prev_ptr - u * lx_stride_t, mask),)
            dxs += (tl.load(dx_ptr - u * dlx_stride_t, mask),)
        for u in tl.static_range(U):
            grad += dxs[u].to(ACC)
            p, q, tail, keeps_tail = _shares(log_as[u], log_bs[u], x_prevs[u], ACC)
            if maps is not None:
                kept, lost = decay(kept, lost, tail, keeps_tail)
            else:
                tl.store(db_ptr - u * lanes, q * grad, mask)
            grad = p * grad  # dlog_a_t, which log x_{t-1} receives too
            if maps is None:
                tl.store(da_ptr - u * lanes, grad, mask)
        a_ptr -= U * la_stride_t
        b_ptr -= U * lb_stride_t
        x_prev_ptr -= U * lx_stride_t
        dx_ptr -= U * dlx_stride_t
        da_ptr -= U * lanes
        db_ptr -= U * lanes
    for _ in range(steps % U):
        grad += tl.load(dx_ptr, mask).to(ACC)
        x_prev = tl.load(x_prev_ptr, mask)
        p, q, tail, keeps_tail = _shares(tl.load(a_ptr, mask), tl.load(b_ptr, mask), x_prev, ACC)
        if maps is not None:
            kept, lost = decay(kept, lost, tail, keeps_tail)
        else:
            tl.store(db_ptr, q * grad, mask)
        grad = p * grad
        if maps is None:
            tl.store(da_ptr, grad, mask)
        a_ptr -= la_stride_t
        b_ptr -= lb_stride_t
        x_prev_ptr -= lx_stride_t
        dx_ptr -= dlx_stride_t
        da_ptr -= lanes
        db_ptr -= lanes

    if maps is not None:
        store_map(maps, row, lanes, lane, mask, kept, lost, grad)
    else:  # x_0 = b_0
        if CHUNKED:
            mask = mask & (first == 0)
        grad += tl.load(dx_ptr, mask).to(ACC)
        zero = tl.load(b_ptr, mask).to(ACC) == -float("inf")
        tl.store(db_ptr, tl.where(zero, 0.0, grad), mask)


def _dense_frames(x: Tensor) -> Tensor:
    return x if has_layout(x, 2, channels_last=False) else x.contiguous()


def log_scan_fwd(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log x of x_0 = b_0, x_t = a_t x_{t-1} + b_t; batch and time strides are free, frames that are not dense are copied.

    Args:
        log_a: (B, T, *S), finite or -inf.
        log_b: (B, T + 1, *S), finite or -inf.

    Returns:
        log x (B, T + 1, *S), contiguous, float32 (float64 for float64).
    """
    log_a, log_b = _dense_frames(log_a), _dense_frames(log_b)
    log_x = log_b.new_empty(log_b.shape, dtype=state_dtype(log_b))
    if log_x.numel() == 0:
        return log_x

    lanes, steps = frame_numel(log_b, 2), log_a.shape[1]
    chunk, chunks = cut(log_a, lanes)
    strides = (stride(log_a, 0), stride(log_a, 1), stride(log_b, 0), stride(log_b, 1))

    def run(carries: Tensor | None = None, maps: Tensor | None = None) -> None:
        # log x is the widest tensor: one vector of it a thread needs no exchange between threads
        operands = (log_a, log_b, log_x, carries, maps)
        launch(
            *(log_scan_fwd_kernel, log_x, operands, lanes, strides, (steps, chunk), chunks),
            CHUNKED=chunks > 1,
            U=FORWARD_STEPS,
        )

    if chunks == 1:
        run()
    else:
        maps, carries = (scratch(log_x, chunks, arrays, lanes) for arrays in (6, 4))
        run(maps=maps)
        operands = (log_b, maps, carries)
        launch_carries(log_scan_carry_kernel, log_x, operands, chunks, lanes, stride(log_b, 0), U=CARRIES_AHEAD // 2)
        run(carries)
    return log_x


def log_scan_bwd(dlog_x: Tensor, log_a: Tensor, log_b: Tensor, log_x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`log_scan_fwd`.

    Args:
        dlog_x: gradient of log x (B, T + 1, *S).
        log_a: as in forward.
        log_b: as in forward.
        log_x: what forward returned.

    Returns:
        dlog_a (B, T, *S) and dlog_b (B, T + 1, *S), contiguous, in the dtypes of log_a and log_b.
    """
    dlog_a, dlog_b = log_a.new_empty(log_a.shape), log_b.new_empty(log_b.shape)
    if dlog_b.numel() == 0:
        return dlog_a, dlog_b

    inputs = [_dense_frames(x) for x in (dlog_x, log_a, log_b, log_x)]
    dlog_x, log_a, log_b, log_x = inputs
    strides = [stride(x, dim) for x in (log_a, log_b, log_x, dlog_x) for dim in (0, 1)]
    lanes, steps = frame_numel(log_b, 2), log_a.shape[1]
    chunk, chunks = cut(log_a, lanes)

    def run(carries: Tensor | None = None, maps: Tensor | None = None) -> None:
        operands = (*inputs, dlog_a, dlog_b, carries, maps)
        launch(
            *(log_scan_bwd_kernel, log_x, operands, lanes, strides, (steps, chunk), chunks),
            CHUNKED=chunks > 1,
            U=BACKWARD_STEPS,
        )

    if chunks == 1:
        run()
    else:
        maps = scratch(log_x, chunks, MAP_ARRAYS.value, lanes)
        run(maps=maps)
        run(linear_carries(log_x, None, maps))
    return dlog_a, dlog_b
