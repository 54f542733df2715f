"""One GRU step between its convolutions: ``convrnn::gru_gates`` and ``convrnn::gru_update``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import layout
from ._autograd import Formulas, fold, pull_back, register, zeros_if_none
from ._check import check_floating, check_same_device, check_same_dtype, check_shape
from ._library import register_triton


def _check(h: Tensor, others: list[tuple[str, Tensor, int]]) -> None:
    check_floating("h", h)
    if h.dim() < 2:
        raise ValueError(f"h must be (B, C, *S), got {list(h.shape)}")
    first_name, first, _ = others[0]
    for name, x, times in others:
        check_floating(name, x)
        check_same_device(name, x, "h", h)
        check_shape(name, x, f"(B, {times}*C, *S)", [h.shape[0], times * h.shape[1]] + list(h.shape[2:]))
        check_same_dtype(name, x, first_name, first)
    if h.dtype != first.dtype and (h.dtype != torch.float32 or first.dtype == torch.float64):
        raise TypeError(
            f"h must be {first.dtype}, as {first_name} is, or the float32 state of a 16-bit {first_name}; got {h.dtype}"
        )


def gru_gates(xp: Tensor, hp: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[z, r] = sigmoid(xp + hp) and r . h: the gates of a GRU whose reset gate comes before the convolution.

    Differentiable any number of times, in reverse and in forward mode, and under ``torch.func``'s transforms; the first
    derivative in reverse mode is a kernel, the others are elementwise PyTorch operations.

    Args:
        xp: (B, 2*C, *S), the input's projections for z (first C channels) and r, bias included; float32, float64,
            bfloat16 or float16.
        hp: (B, 2*C, *S), the state's projections, of the same dtype.
        h: (B, C, *S), the state, of the same dtype or float32.

    Returns:
        z, r and r . h, each (B, C, *S), dense, in the dtype of ``xp``: channels last where ``hp`` is, else contiguous.
        Arguments of another memory format are copied.

    Raises:
        TypeError: an argument is no floating-point tensor, or a dtype does not fit.
        ValueError: a shape or device does not fit.

    Source: Ballas et al., ICLR 2016, arXiv 1511.06432.

    Example:
        >>> z, r, rh = gru_gates(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.ones(1, 2, 2, 2))
        >>> z.shape, round(rh.unique().item(), 3)
        (torch.Size([1, 2, 2, 2]), 0.5)
    """
    _check(h, [("xp", xp, 2), ("hp", hp, 2)])
    z, r, rh = torch.ops.convrnn.gru_gates(xp, hp, h)
    return z, r, rh


def gru_update(xc: Tensor, hc: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """c = tanh(xc + hc), h' = (1 - z) . h + z . c: the candidate and the next state; z is the candidate's share.

    Differentiable as :func:`gru_gates` is.

    Args:
        xc: (B, C, *S), the input's projection for the candidate, bias included.
        hc: (B, C, *S), the projection of r . h, of the same dtype.
        z: (B, C, *S), the update gate, of the same dtype.
        h: (B, C, *S), the state, of the same dtype or float32.

    Returns:
        c in the dtype of ``xc`` and h' in the dtype of ``h``, each (B, C, *S), dense: channels last where ``hc`` is, else
        contiguous. Arguments of another memory format are copied.

    Raises:
        TypeError: an argument is no floating-point tensor, or a dtype does not fit.
        ValueError: a shape or device does not fit.

    Source: Ballas et al., ICLR 2016, arXiv 1511.06432.

    Example:
        >>> zero, half = torch.zeros(1, 2), torch.full((1, 2), 0.5)
        >>> gru_update(zero, zero, half, torch.ones(1, 2))[1]
        tensor([[0.5000, 0.5000]])
    """
    _check(h, [("xc", xc, 1), ("hc", hc, 1), ("z", z, 1)])
    c, h_next = torch.ops.convrnn.gru_update(xc, hc, z, h)
    return c, h_next


def _frames(like: Tensor, h: Tensor, dtype: torch.dtype, times: int = 1) -> Tensor:
    """(B, times*C, *S) for the state h (B, C, *S), dense, with frames laid out as those of ``like``."""
    shape = (h.shape[0], times * h.shape[1], *h.shape[2:])
    return layout.empty(like, shape, 1, layout.is_channels_last(like, 1), dtype)


@torch.library.register_fake("convrnn::gru_gates")
def _(xp: Tensor, hp: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(h, [("xp", xp, 2), ("hp", hp, 2)])
    return _frames(hp, h, xp.dtype), _frames(hp, h, xp.dtype), _frames(hp, h, xp.dtype)


@torch.library.register_fake("convrnn::gru_gates_backward")
def _(dz: Tensor, dr: Tensor, drh: Tensor, z: Tensor, r: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    _check(h, [("dz", dz, 1), ("dr", dr, 1), ("drh", drh, 1), ("z", z, 1), ("r", r, 1)])
    return _frames(z, h, z.dtype, times=2), _frames(z, h, h.dtype)


@torch.library.register_fake("convrnn::gru_update")
def _(xc: Tensor, hc: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    _check(h, [("xc", xc, 1), ("hc", hc, 1), ("z", z, 1)])
    return _frames(hc, h, xc.dtype), _frames(hc, h, h.dtype)


@torch.library.register_fake("convrnn::gru_update_backward")
def _(dc: Tensor, dh_next: Tensor, z: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(h, [("dc", dc, 1), ("z", z, 1), ("c", c, 1)])
    _check(h, [("dh_next", dh_next, 1), ("h", h, 1)])
    return _frames(c, h, c.dtype), _frames(c, h, c.dtype), _frames(c, h, h.dtype)


def _triton_gates(xp: Tensor, hp: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.gru_gates import gru_gates_fwd

    _check(h, [("xp", xp, 2), ("hp", hp, 2)])
    return gru_gates_fwd(xp, hp, h)


def _triton_gates_backward(
    dz: Tensor, dr: Tensor, drh: Tensor, z: Tensor, r: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    from ..kernels.gru_gates import gru_gates_bwd

    _check(h, [("dz", dz, 1), ("dr", dr, 1), ("drh", drh, 1), ("z", z, 1), ("r", r, 1)])
    return gru_gates_bwd(dz, dr, drh, z, r, h)


def _triton_update(xc: Tensor, hc: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels.gru_gates import gru_update_fwd

    _check(h, [("xc", xc, 1), ("hc", hc, 1), ("z", z, 1)])
    return gru_update_fwd(xc, hc, z, h)


def _triton_update_backward(
    dc: Tensor, dh_next: Tensor, z: Tensor, c: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.gru_gates import gru_update_bwd

    _check(h, [("dc", dc, 1), ("z", z, 1), ("c", c, 1)])
    _check(h, [("dh_next", dh_next, 1), ("h", h, 1)])
    return gru_update_bwd(dc, dh_next, z, c, h)


def _gates_setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    z, r, _ = output
    ctx.save_for_backward(z, r, inputs[2])


def _gates_backward(ctx: Any, dz: Tensor, dr: Tensor, drh: Tensor) -> tuple[Tensor | None, ...]:
    da, dh = torch.ops.convrnn.gru_gates_backward(dz, dr, drh, *ctx.saved_tensors)
    return da, da, dh


def _update_setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, _, z, h = inputs
    ctx.save_for_backward(z, output[0], h)


def _update_backward(ctx: Any, dc: Tensor, dh_next: Tensor) -> tuple[Tensor | None, ...]:
    da, dz, dh = torch.ops.convrnn.gru_update_backward(dc, dh_next, *ctx.saved_tensors)
    return da, da, dz, dh


def _gates_jvp(
    inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    (_, _, h), (z, r, _) = inputs, outputs
    dxp, dhp, dh = zeros_if_none(tangents, inputs)
    da_z, da_r = (dxp + dhp).chunk(2, dim=1)
    dz, dr = z * (1 - z) * da_z, r * (1 - r) * da_r
    return dz, dr, (dr * h + r * dh).to(r.dtype)


def _update_jvp(
    inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    (_, _, z, h), (c, _) = inputs, outputs
    dxc, dhc, dz, dh = zeros_if_none(tangents, inputs)
    dc = (1 - c * c) * (dxc + dhc)
    return dc, ((1 - z) * dh + (c - h) * dz + z * dc).to(h.dtype)


# The backward ops once more, in operations that PyTorch differentiates, and their tangents.


def _gates_backward_formula(dz: Tensor, dr: Tensor, drh: Tensor, z: Tensor, r: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    da = torch.cat((dz * z * (1 - z), (dr + drh * h) * r * (1 - r)), 1)
    return da.to(z.dtype), (drh * r).to(h.dtype)


def _gates_backward_jvp(
    inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    dz, dr, drh, z, r, h = inputs
    tdz, tdr, tdrh, tz, tr, th = zeros_if_none(tangents, inputs)
    ta_z = tdz * z * (1 - z) + dz * (1 - 2 * z) * tz
    ta_r = (tdr + tdrh * h + drh * th) * r * (1 - r) + (dr + drh * h) * (1 - 2 * r) * tr
    return torch.cat((ta_z, ta_r), 1).to(z.dtype), (tdrh * r + drh * tr).to(h.dtype)


def _update_backward_formula(dc: Tensor, dh_next: Tensor, z: Tensor, c: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    da = (dc + dh_next * z) * (1 - c * c)
    return da.to(c.dtype), (dh_next * (c - h)).to(c.dtype), (dh_next * (1 - z)).to(h.dtype)


def _update_backward_jvp(
    inputs: Sequence[Any], outputs: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    dc, dh_next, z, c, h = inputs
    tdc, tdh_next, tz, tc, th = zeros_if_none(tangents, inputs)
    ta = (tdc + tdh_next * z + dh_next * tz) * (1 - c * c) - 2 * (dc + dh_next * z) * c * tc
    tz_out = tdh_next * (c - h) + dh_next * (tc - th)
    return ta.to(c.dtype), tz_out.to(c.dtype), (tdh_next * (1 - z) - dh_next * tz).to(h.dtype)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _pull_back(formula: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return tuple(pull_back(formula, saved, list(gradients), ctx.needs_input_grad[: len(saved)])[1])

    return backward


register_triton("gru_gates", _triton_gates)
register_triton("gru_gates_backward", _triton_gates_backward)
register_triton("gru_update", _triton_update)
register_triton("gru_update_backward", _triton_update_backward)
register("gru_gates", Formulas(_gates_setup_context, _gates_backward, _gates_jvp, fold("gru_gates")))
register("gru_update", Formulas(_update_setup_context, _update_backward, _update_jvp, fold("gru_update")))
register(
    "gru_gates_backward",
    Formulas(_save_inputs, _pull_back(_gates_backward_formula), _gates_backward_jvp, fold("gru_gates_backward")),
)
register(
    "gru_update_backward",
    Formulas(_save_inputs, _pull_back(_update_backward_formula), _update_backward_jvp, fold("gru_update_backward")),
)
