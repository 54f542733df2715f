"""The linear recurrence on logarithms (Heinsen 2023, arXiv 2311.06281): log x_t given log a_t and log b_t.

x_0 = b_0, x_t = a_t x_{t-1} + b_t. a, b and x are positive or zero (logarithm -inf); there is one more b than a.

One thread keeps the state of a few lanes and walks over time, U steps loaded before the first is computed.

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


@jit_kernel
def log_scan_fwd_kernel(
    log_a,  # (B, T, *S), batch and time strides free
    log_b,  # (B, T + 1, *S), batch and time strides free
    log_x,  # (B, T + 1, *S), contiguous
    T: tl.int32,
    lanes: tl.int64,  # prod(S); this and all below in units of VEC elements
    la_stride_b: tl.int64,
    la_stride_t: tl.int64,
    lb_stride_b: tl.int64,
    lb_stride_t: tl.int64,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    U: tl.constexpr,
    ACC: tl.constexpr,
):
    lanes *= VEC
    la_stride_t *= VEC
    lb_stride_t *= VEC
    sample, lane, mask = program_lanes(lanes, BLOCK)
    a_ptr = log_a + sample * (la_stride_b * VEC) + lane
    b_ptr = log_b + sample * (lb_stride_b * VEC) + lane
    x_ptr = log_x + sample * (T + 1) * lanes + lane

    m = _finite(tl.load(b_ptr, mask), ACC)
    m_low = tl.zeros((BLOCK,), ACC)
    s = tl.full((BLOCK,), 1.0, ACC)
    s_low = tl.zeros((BLOCK,), ACC)
    tl.store(x_ptr, _log(m, m_low, s, s_low), mask)
    b_ptr += lb_stride_t
    x_ptr += lanes
    for _ in range(T // U):
        log_as = ()
        log_bs = ()
        for u in tl.static_range(U):
            log_as += (tl.load(a_ptr + u * la_stride_t, mask),)
            log_bs += (tl.load(b_ptr + u * lb_stride_t, mask),)
        for u in tl.static_range(U):
            m, m_low, s, s_low = _step(m, m_low, s, s_low, log_as[u], log_bs[u], ACC)
            tl.store(x_ptr + u * lanes, _log(m, m_low, s, s_low), mask)
        a_ptr += U * la_stride_t
        b_ptr += U * lb_stride_t
        x_ptr += U * lanes
    for _ in range(T % U):
        m, m_low, s, s_low = _step(m, m_low, s, s_low, tl.load(a_ptr, mask), tl.load(b_ptr, mask), ACC)
        tl.store(x_ptr, _log(m, m_low, s, s_low), mask)
        a_ptr += la_stride_t
        b_ptr += lb_stride_t
        x_ptr += lanes


@triton.jit
def _step_backward(grad, log_a, log_b, log_x_prev, ACC: tl.constexpr):
    """dlog_a_t, dlog_b_t and the gradient that reaches log x_{t-1} from the whole gradient of log x_t [BLOCK]."""
    carried = log_a.to(ACC) + log_x_prev.to(ACC)
    log_b = log_b.to(ACC)
    d = carried - log_b
    tail = sigmoid_tail(d)
    p = tl.where(d >= 0, 1 - tail, tail)
    q = tl.where(d >= 0, tail, 1 - tail)
    zero = (carried == -float("inf")) & (log_b == -float("inf"))
    p = tl.where(zero, 0.0, p)
    q = tl.where(zero, 0.0, q)
    return p * grad, q * grad


@jit_kernel
def log_scan_bwd_kernel(
    dlog_x,  # (B, T + 1, *S), batch and time strides free
    log_a,  # (B, T, *S), batch and time strides free
    log_b,  # (B, T + 1, *S), batch and time strides free
    log_x,  # (B, T + 1, *S), batch and time strides free
    dlog_a,  # (B, T, *S), contiguous
    dlog_b,  # (B, T + 1, *S), contiguous
    T: tl.int32,
    lanes: tl.int64,  # prod(S); this and all below in units of VEC elements
    la_stride_b: tl.int64,
    la_stride_t: tl.int64,
    lb_stride_b: tl.int64,
    lb_stride_t: tl.int64,
    lx_stride_b: tl.int64,
    lx_stride_t: tl.int64,
    dlx_stride_b: tl.int64,
    dlx_stride_t: tl.int64,
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
    sample, lane, mask = program_lanes(lanes, BLOCK)
    a_ptr = log_a + sample * (la_stride_b * VEC) + (T - 1) * la_stride_t + lane
    b_ptr = log_b + sample * (lb_stride_b * VEC) + T * lb_stride_t + lane
    x_prev_ptr = log_x + sample * (lx_stride_b * VEC) + (T - 1) * lx_stride_t + lane
    dx_ptr = dlog_x + sample * (dlx_stride_b * VEC) + T * dlx_stride_t + lane
    da_ptr = dlog_a + (sample * T + (T - 1)) * lanes + lane
    db_ptr = dlog_b + (sample * (T + 1) + T) * lanes + lane

    grad = tl.zeros((BLOCK,), ACC)
    for _ in range(T // U):
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
            grad, db = _step_backward(grad + dxs[u].to(ACC), log_as[u], log_bs[u], x_prevs[u], ACC)
            tl.store(da_ptr - u * lanes, grad, mask)
            tl.store(db_ptr - u * lanes, db, mask)
        a_ptr -= U * la_stride_t
        b_ptr -= U * lb_stride_t
        x_prev_ptr -= U * lx_stride_t
        dx_ptr -= U * dlx_stride_t
        da_ptr -= U * lanes
        db_ptr -= U * lanes
    for _ in range(T % U):
        grad += tl.load(dx_ptr, mask).to(ACC)
        x_prev = tl.load(x_prev_ptr, mask)
        grad, db = _step_backward(grad, tl.load(a_ptr, mask), tl.load(b_ptr, mask), x_prev, ACC)
        tl.store(da_ptr, grad, mask)
        tl.store(db_ptr, db, mask)
        a_ptr -= la_stride_t
        b_ptr -= lb_stride_t
        x_prev_ptr -= lx_stride_t
        dx_ptr -= dlx_stride_t
        da_ptr -= lanes
        db_ptr -= lanes

    # x_0 = b_0.
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

    # log x is the widest tensor: one vector of it a thread needs no exchange between threads
    strides = (stride(log_a, 0), stride(log_a, 1), stride(log_b, 0), stride(log_b, 1))
    operands = (log_a, log_b, log_x)
    launch(log_scan_fwd_kernel, log_x, operands, frame_numel(log_b, 2), strides, (log_a.shape[1],), U=FORWARD_STEPS)
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
    operands = (*inputs, dlog_a, dlog_b)
    launch(log_scan_bwd_kernel, log_x, operands, frame_numel(log_b, 2), strides, (log_a.shape[1],), U=BACKWARD_STEPS)
    return dlog_a, dlog_b
