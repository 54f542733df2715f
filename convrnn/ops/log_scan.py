"""First-order linear recurrences in log space: ``convrnn::log_scan`` and :func:`parallel_scan_log`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.layout import state_dtype
from ._autograd import Formulas, Forward, fold, register, register_backward_op, zeros_if_none
from ._check import check_floating, check_same_device, check_same_dtype, check_shape
from ._library import register_triton
from .mingru import affine_scan


def parallel_scan_log(log_a: Tensor, log_b: Tensor) -> Tensor:
    """x_0 = b_0, x_t = a_t x_{t-1} + b_t for positive a and b, given by their logarithms.

    The kernel returns log x in fp32 (fp64 for float64), computed in one pass without the cumulative sums of the usual
    form, whose error grows with T; this function returns its exponential. -inf stands for a zero coefficient.

    Differentiable any number of times, in reverse and in forward mode, and under ``torch.func``'s transforms. Tangents
    and second derivatives run :func:`mingru`'s scan in float64 beside the log scan's own. The derivative with respect
    to a coefficient that is zero is taken as zero.

    Args:
        log_a: (B, T, *), log a_1 .. log a_T; float32, float64, bfloat16 or float16.
        log_b: (B, T+1, *), log b_0 .. log b_T, of the same dtype; b_0 is the initial value.

    Returns:
        x (B, T+1, *), contiguous.

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: a shape or device does not fit.

    Source: the recurrence of Heinsen 2023, arXiv 2311.06281.

    Example:
        >>> parallel_scan_log(torch.zeros(1, 3), torch.zeros(1, 4))  # x_t = x_{t-1} + 1
        tensor([[1., 2., 3., 4.]])
    """
    _check(log_a, log_b)
    return torch.ops.convrnn.log_scan(log_a, log_b).exp().to(log_b.dtype)


def _check(log_a: Tensor, log_b: Tensor) -> None:
    check_floating("log_a", log_a)
    check_floating("log_b", log_b)
    check_same_device("log_b", log_b, "log_a", log_a)
    check_same_dtype("log_b", log_b, "log_a", log_a)
    if log_a.dim() < 2:
        raise ValueError(f"log_a must be (B, T, *), got {list(log_a.shape)}")
    check_shape("log_b", log_b, "(B, T+1, *)", [log_a.shape[0], log_a.shape[1] + 1] + list(log_a.shape[2:]))


def _check_backward(dlog_x: Tensor, log_a: Tensor, log_b: Tensor, log_x: Tensor) -> None:
    _check(log_a, log_b)
    for name, x in (("dlog_x", dlog_x), ("log_x", log_x)):
        check_same_device(name, x, "log_b", log_b)
        check_shape(name, x, "(B, T+1, *)", list(log_b.shape))
        if x.dtype != state_dtype(log_b):
            raise TypeError(f"{name} must be {state_dtype(log_b)} for log_b {log_b.dtype}, got {x.dtype}")


@torch.library.register_fake("convrnn::log_scan")
def _(log_a: Tensor, log_b: Tensor) -> Tensor:
    _check(log_a, log_b)
    return log_b.new_empty(log_b.shape, dtype=state_dtype(log_b))


@torch.library.register_fake("convrnn::log_scan_backward")
def _(dlog_x: Tensor, log_a: Tensor, log_b: Tensor, log_x: Tensor) -> tuple[Tensor, Tensor]:
    _check_backward(dlog_x, log_a, log_b, log_x)
    return log_a.new_empty(log_a.shape), log_b.new_empty(log_b.shape)


def _triton(log_a: Tensor, log_b: Tensor) -> Tensor:
    from ..kernels.log_scan import log_scan_fwd

    _check(log_a, log_b)
    return log_scan_fwd(log_a, log_b)


def _triton_backward(dlog_x: Tensor, log_a: Tensor, log_b: Tensor, log_x: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels.log_scan import log_scan_bwd

    _check_backward(dlog_x, log_a, log_b, log_x)
    return log_scan_bwd(dlog_x, log_a, log_b, log_x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, dlog_x: Tensor) -> tuple[Tensor, Tensor]:
    dlog_a, dlog_b = torch.ops.convrnn.log_scan_backward(dlog_x, *ctx.saved_tensors)
    return dlog_a, dlog_b


def _jvp(inputs: Sequence[Any], outputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> tuple[Tensor]:
    """dlog_x_t = p_t . (dlog_x_{t-1} + dlog_a_t) + (1 - p_t) . dlog_b_t with p_t = a_t x_{t-1} / x_t.

    With A_t the sum of dlog_a up to t, dlog_x - A follows minGRU's recurrence: its gate is log b_t - log a_t -
    log x_{t-1}, its input dlog_b - A. Sums over all of T want float64, though the difference is local.
    """
    log_a, log_b, log_x = (x.double() for x in (*inputs, outputs[0]))
    dlog_a, dlog_b = (t.double() for t in zeros_if_none(tangents, inputs))
    dead = log_x == -float("inf")  # x_t = 0: there log_scan_backward is zero
    dlog_b = torch.where(dead | (log_b == -float("inf")), 0.0, dlog_b)
    gate = log_b[:, 1:] - log_a - torch.where(dead[:, :-1], 0.0, log_x[:, :-1])
    gate = torch.where(dead[:, 1:] | dead[:, :-1], float("inf"), gate)
    sums = torch.where(log_a == -float("inf"), 0.0, dlog_a).cumsum(1)
    # frames of one channel, so that gate and input pack along dim 2 whatever their rank
    gate, w = gate.unsqueeze(2), (dlog_b[:, 1:] - sums).unsqueeze(2)
    rest = affine_scan(gate, w, dlog_b[:, :1])[0].squeeze(2) + sums
    dlog_x = torch.cat((dlog_b[:, :1], torch.where(dead[:, 1:], 0.0, rest)), 1)
    return (dlog_x.to(state_dtype(inputs[1])),)


def _forward_and_jvp(
    primals: Sequence[Tensor | None], directions: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    return _jvp(primals, (torch.ops.convrnn.log_scan(*primals),), directions)


register_triton("log_scan", _triton)
register_triton("log_scan_backward", _triton_backward)
register("log_scan", Formulas(_setup_context, _backward, _jvp, fold("log_scan")))
register_backward_op("log_scan_backward", Forward(_forward_and_jvp, (0,), (1, 2)), fold("log_scan_backward"))
