"""minGRU: ``convrnn::mingru`` and its public functions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import layout
from ._autograd import Formulas, Forward, fold, register, register_backward_op
from ._check import check_floating, check_mask, check_same_device, check_same_dtype, check_shape
from ._codes import HOLD, RESTART, check_codes, encode, has_bit
from ._library import register_triton


def mingru(
    gate_hidden: Tensor, h0: Tensor | None = None, reset: Tensor | None = None, hold: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z_t) . h_{t-1} + z_t . g(hidden_t) with z_t = sigmoid(gate_t), for all t in one pass.

    g(x) = x + 1/2 for x >= 0 and sigmoid(x) otherwise; z is the share of the candidate. Arithmetic and state are fp32
    (fp64 for float64) whatever the dtype of the tensors, so that one call, several calls on pieces of T, and one call
    a step agree. Saved for backward: the inputs and ``h``.

    Where ``reset``, h_{t-1} is 1/2 instead, and where ``hold``, h_t = h_{t-1}; where both, h_t = 1/2. What is forgotten
    and what is held out of the recurrence has no influence, be it NaN, and gets no gradient.

    Differentiable any number of times, in reverse and in forward mode, and under ``torch.func``'s transforms. A second
    derivative, or a tangent, is scans again: the tangent runs one more, a double backward two and two of their
    backwards, beside elementwise operations. g has a corner at 0, where the derivative from the right is taken.

    Args:
        gate_hidden: (B, T, 2*C, *S), the gates' pre-activations in the first C channels and the candidates' in the last;
            float32, float64, bfloat16 or float16. Any batch and time strides; frames (C, *S) that are contiguous or
            channels last are read in place.
        h0: (B, C, *S), the state before the first step, of any of these dtypes. None is minGRU's 'zero' state,
            g(0) = 1/2 everywhere.
        reset: (B, T) bool, True where a sequence begins: the state before the frame is forgotten, for the one that None
            as h0 stands for.
        hold: (B, T) bool, True where the state passes a frame as it is, as in the padding of a batch.

    Returns:
        ``h`` (B, T, C, *S) in the dtype and frame layout of ``gate_hidden``, and ``h_n`` (B, C, *S), the state after
        the last step in the dtype of ``h0`` (of ``gate_hidden`` where there is none).

    Raises:
        TypeError: an argument is no floating-point tensor, a mask no bool one.
        ValueError: a shape or device does not fit.

    Source: Feng et al. 2024, arXiv 2410.01201; over frames, Heindl 2024.

    Example:
        >>> h, h_n = mingru(torch.zeros(2, 5, 2 * 3))
        >>> h.shape, h_n.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 3]))
    """
    _check(gate_hidden, h0)
    frames = list(gate_hidden.shape[:2])
    check_mask("reset", reset, frames, True, "gate_hidden", gate_hidden)
    check_mask("hold", hold, frames, True, "gate_hidden", gate_hidden)
    h, h_n = torch.ops.convrnn.mingru(gate_hidden, h0, encode(reset, hold))
    return h, h_n


def mingru_gate_hidden(gate: Tensor, hidden: Tensor, h: Tensor) -> Tensor:
    """All states of :func:`mingru` from separate gates and candidates.

    The two are packed first: where one projection makes both, :func:`mingru` on its result saves that copy.

    Args:
        gate: (B, T, C, *S), the gates' pre-activations.
        hidden: (B, T, C, *S), the candidates' pre-activations, of the same dtype.
        h: (B, 1, C, *S), the state before the first step.

    Returns:
        The states (B, T, C, *S).

    Raises:
        TypeError: an argument is no floating-point tensor, or gate and hidden differ in dtype.
        ValueError: a shape or device does not fit.

    Example:
        >>> mingru_gate_hidden(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3), torch.full((2, 1, 3), 0.5)).shape
        torch.Size([2, 5, 3])
    """
    check_floating("gate", gate)
    check_floating("hidden", hidden)
    check_floating("h", h)
    if gate.dim() < 3:
        raise ValueError(f"gate must be (B, T, C, *S), got {list(gate.shape)}")
    if hidden.shape != gate.shape:
        raise ValueError(f"hidden must have the shape of gate {list(gate.shape)}, got {list(hidden.shape)}")
    check_same_dtype("hidden", hidden, "gate", gate)
    if h.dim() != gate.dim() or h.shape[1] != 1:
        raise ValueError(f"h must be (B, 1, C, *S) for gate {list(gate.shape)}, got {list(h.shape)}")
    return mingru(torch.cat((gate, hidden), dim=2), h.squeeze(1))[0]


def _check(gate_hidden: Tensor, h0: Tensor | None, codes: Tensor | None = None) -> None:
    check_floating("gate_hidden", gate_hidden)
    if gate_hidden.dim() < 3 or gate_hidden.shape[2] % 2 != 0:
        raise ValueError(f"gate_hidden must be (B, T, 2*C, *S), got {list(gate_hidden.shape)}")
    if h0 is not None:
        _check_state("h0", h0, gate_hidden)
    check_codes(codes, "gate_hidden", gate_hidden)


def _check_state(name: str, h: Tensor, gate_hidden: Tensor) -> None:
    check_floating(name, h)
    check_same_device(name, h, "gate_hidden", gate_hidden)
    shape = [gate_hidden.shape[0], gate_hidden.shape[2] // 2] + list(gate_hidden.shape[3:])
    check_shape(name, h, "(B, C, *S)", shape)


def _check_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    gate_hidden: Tensor,
    h0: Tensor | None,
    h: Tensor,
    codes: Tensor | None = None,
) -> None:
    _check(gate_hidden, h0, codes)
    if dh_n is not None:
        _check_state("dh_n", dh_n, gate_hidden)
    shape = [*gate_hidden.shape[:2], gate_hidden.shape[2] // 2, *gate_hidden.shape[3:]]
    for name, x in (("dh", dh), ("h", h)):
        if x is not None:
            check_same_device(name, x, "gate_hidden", gate_hidden)
            check_same_dtype(name, x, "gate_hidden", gate_hidden)
            check_shape(name, x, "(B, T, C, *S)", shape)


def _state_like(gate_hidden: Tensor, h0: Tensor | None, channels_last: bool) -> Tensor:
    shape = (gate_hidden.shape[0], gate_hidden.shape[2] // 2, *gate_hidden.shape[3:])
    return layout.empty(gate_hidden, shape, 1, channels_last, gate_hidden.dtype if h0 is None else h0.dtype)


@torch.library.register_fake("convrnn::mingru")
def _(gate_hidden: Tensor, h0: Tensor | None = None, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check(gate_hidden, h0, codes)
    channels_last = layout.is_channels_last(gate_hidden, 2)
    shape = (*gate_hidden.shape[:2], gate_hidden.shape[2] // 2, *gate_hidden.shape[3:])
    h = layout.empty(gate_hidden, shape, 2, channels_last, gate_hidden.dtype)
    return h, _state_like(gate_hidden, h0, channels_last)


@torch.library.register_fake("convrnn::mingru_backward")
def _(
    dh: Tensor | None,
    dh_n: Tensor | None,
    gate_hidden: Tensor,
    h0: Tensor | None,
    h: Tensor,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_backward(dh, dh_n, gate_hidden, h0, h, codes)
    channels_last = layout.is_channels_last(gate_hidden, 2)
    dgate_hidden = layout.empty(gate_hidden, gate_hidden.shape, 2, channels_last, gate_hidden.dtype)
    return dgate_hidden, gate_hidden.new_empty(0) if h0 is None else _state_like(gate_hidden, h0, channels_last)


def _triton(gate_hidden: Tensor, h0: Tensor | None = None, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from ..kernels.mingru import mingru_fwd

    _check(gate_hidden, h0, codes)
    return mingru_fwd(gate_hidden, h0, codes)


def _triton_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    gate_hidden: Tensor,
    h0: Tensor | None,
    h: Tensor,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from ..kernels.mingru import mingru_bwd

    _check_backward(dh, dh_n, gate_hidden, h0, h, codes)
    return mingru_bwd(dh, dh_n, gate_hidden, h0, h, codes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate_hidden, h0, codes = inputs
    ctx.save_for_backward(gate_hidden, h0, output[0], codes)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dh: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
    if dh is None and dh_n is None:
        return None, None, None
    gate_hidden, h0, h, codes = ctx.saved_tensors
    dgate_hidden, dh0 = torch.ops.convrnn.mingru_backward(dh, dh_n, gate_hidden, h0, h, codes)
    return dgate_hidden, None if h0 is None else dh0, None


def affine_scan(gate: Tensor, w: Tensor, first: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """d_t = (1 - z_t) . d_{t-1} + z_t . w_t with z = sigmoid(gate) from d_0 = ``first``, for w of any sign.

    g is the identity plus 1/2 where its argument is not negative. The step is a weighted mean, so it commutes with a
    shift and a scale: they bring every lane (over time) to [1.5, 2.5] + 1/2 and back, at a few units in the last place of
    its largest entry. Shift and scale are constants to a derivative: it does not depend on them.

    Args:
        gate, w: (B, T, C, *S).
        first: (B, C, *S).
        codes: (B, T) uint8, as those of minGRU, but for restarts, from 0. w of a frame that is held must be 0.

    Returns:
        d (B, T, C, *S) and the last d.
    """
    scale, sizes = first.detach().abs().unsqueeze(1), w.detach().abs()
    if codes is not None:
        # minGRU restarts from 1/2, which no shift makes 0 beside g: with z = 1 a frame forgets that, and takes z w
        restart = has_bit(codes, RESTART, w)
        w = torch.where(restart, torch.sigmoid(gate) * w, w)
        gate = torch.where(restart, float("inf"), gate)
        codes = torch.where((codes & RESTART) != 0, RESTART, codes).to(torch.uint8)
        scale, sizes = (x.nan_to_num(0.0, 0.0, 0.0) for x in (scale, sizes))  # a NaN ends where its sequence does
    if w.shape[1] > 0:
        scale = torch.maximum(scale, sizes.amax(1, keepdim=True))
    scale = torch.where(scale == 0, 1.0, scale)
    packed = torch.cat((gate, w / scale + 1.5), 2)
    d, d_n = torch.ops.convrnn.mingru(packed, first / scale.squeeze(1) + 2, codes)
    return (d - 2) * scale, (d_n - 2) * scale.squeeze(1)


def _jvp(
    inputs: Sequence[Any], outputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """dh_t = (1 - z_t) . dh_{t-1} + z_t . [(1 - z_t) . dgate_t . (g_t - h_{t-1}) + g'(hidden_t) . dhidden_t]."""
    gate_hidden, h0, codes = inputs
    (out, h_n), (dgate_hidden, dh0) = outputs, tangents[:2]
    assert out is not None and h_n is not None
    if codes is not None:
        held = has_bit(codes, HOLD, gate_hidden)
        gate_hidden = gate_hidden.masked_fill(held, 0.0)
        dgate_hidden = None if dgate_hidden is None else dgate_hidden.masked_fill(held, 0.0)
    dtype = layout.state_dtype(gate_hidden)
    gate, hidden = gate_hidden.to(dtype).chunk(2, dim=2)
    start = torch.full_like(h_n, 0.5, dtype=dtype) if h0 is None else h0.to(dtype)
    first = torch.zeros_like(h_n, dtype=dtype) if dh0 is None else dh0.to(dtype)
    if dgate_hidden is None:
        w = torch.zeros_like(gate)
    else:
        dgate, dhidden = dgate_hidden.to(dtype).chunk(2, dim=2)
        small = torch.sigmoid(hidden)
        g = torch.where(hidden >= 0, hidden + 0.5, small)
        slope = torch.where(hidden >= 0, 1.0, small * (1 - small))
        h_prev = torch.cat((start.unsqueeze(1), out.to(dtype)), 1)[:, : gate.shape[1]]
        if codes is not None:
            h_prev = h_prev.masked_fill(has_bit(codes, RESTART, h_prev), 0.5)
        w = torch.sigmoid(-gate) * dgate * (g - h_prev) + slope * dhidden
    dh, dh_n = affine_scan(gate, w, first, codes)
    return dh.to(gate_hidden.dtype), dh_n.to(gate_hidden.dtype if h0 is None else h0.dtype)


def _forward_and_jvp(
    primals: Sequence[Tensor | None], directions: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    return _jvp(primals, torch.ops.convrnn.mingru(*primals), directions)


register_triton("mingru", _triton)
register_triton("mingru_backward", _triton_backward)
register("mingru", Formulas(_setup_context, _backward, _jvp, fold("mingru")))
register_backward_op(
    "mingru_backward", Forward(_forward_and_jvp, (0, 1), (2, 3), constants=(5,)), fold("mingru_backward")
)
