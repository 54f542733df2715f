"""GRU-RCN over a whole sequence: ``convrnn::gru_rcn`` and its public function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._autograd import Formulas, Forward, fold, loop, register, register_backward_op
from ._check import autocast_is_on, check_floating, check_mask, check_same_device, check_same_dtype, check_shape
from ._codes import check_codes, encode
from ._gru_rcn_tangent import StandIn, forward_and_jvp, jvp, odd, restore
from ._library import GRU_STEP, register_autocast, register_triton


def gru_rcn(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None = None,
    recompute: bool = False,
    reset: Tensor | None = None,
    hold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z) . h_{t-1} + z . c over a sequence of frames, every projection a convolution (*).

    z = sigmoid(W_z*x_t + U_z*h_{t-1}), r = sigmoid(W_r*x_t + U_r*h_{t-1}), c = tanh(W_c*x_t + C*(r . h_{t-1})); z is the
    share of the candidate c. Zero padding keeps the size of the frames, for odd and even kernels. The input convolution
    runs once over all frames, weight gradients are batched over time, and state and gates are computed in fp32 (fp64 for
    float64). Saved for backward: the arguments, the states and [z, r, c], or with ``recompute`` the arguments and the states.

    Without W, x is the projection itself: what z, r and c take from the input by a convolution of any kind, biases
    included. The op then runs the recurrence alone, and x's gradient is that of the projection. It is saved with
    ``recompute`` only; a double backward finds it from [z, r, c], with their rounding.

    Where ``reset``, h_{t-1} is zero instead, and where ``hold``, h_t = h_{t-1}; where both, h_t is zero. What is forgotten
    and what is held out of the recurrence has no influence on what follows, be it NaN, and gets no gradient from it. (A frame
    that is NaN has NaN in its own gradients; hold it.)

    On the CPU NaN, infinity and outliers, such as a fill value of -9999, spoil no element that does not see them.
    Export for inference under ``torch.no_grad()``: where gradients are on, activations are kept.

    Differentiable any number of times, in reverse and in forward mode, and under ``torch.func``'s transforms. Tangents
    walk over time in Python, two convolutions a step, with every other convolution batched over time; a double backward
    runs the op and such a walk, and differentiates both. ``torch.func.vmap`` over x and h0 joins the batch; where
    weights are mapped, or gradients of weights are (per-sample gradients), the op is called once for each entry.

    Under autocast, x, the weights and the bias are cast once a call and the state stays fp32.

    Args:
        x: (B, T, Ox, *S) with one, two or three spatial dimensions; float32, float64, bfloat16 or float16. Without W,
            (B, T, 3*Oh, *S) in the order z, r, candidate.
        h0: (B, Oh, *S), the state before the first frame, of any of these dtypes; None is zero.
        W: (3*Oh, Ox, *k), input kernels in the order z, r, candidate, of x's dtype; None where x is the projection.
        U: (2*Oh, Oh, *k), recurrent kernels z, r.
        C: (Oh, Oh, *k), the recurrent kernel of the candidate. The kernel sizes of W, U and C may differ.
        bias: (3*Oh,) in the order z, r, candidate, or None; None without W.
        recompute: compute the activations again in backward instead of keeping them: a quarter of the memory of
            hidden size is kept, for about another forward pass of time. On the CPU with 16-bit tensors they follow from
            the states as returned, rounded, and differ from the first ones by that.
        reset: (B, T) bool, True where a sequence begins: the state before the frame is forgotten, for zeros.
        hold: (B, T) bool, True where the state passes a frame as it is, as in the padding of a batch.

    Returns:
        ``out`` (B, T, Oh, *S), contiguous, in the dtype of ``x``, and ``h_n`` (B, Oh, *S), the state after the last frame
        in the dtype of ``h0`` (of ``x`` where there is none).

    Raises:
        TypeError: an argument is no floating-point tensor, a mask no bool one, or the dtypes differ.
        ValueError: a shape or device does not fit.

    Source: Ballas et al., ICLR 2016, arXiv 1511.06432.

    Example:
        >>> W, U, C = torch.zeros(12, 3, 3, 3), torch.zeros(8, 4, 3, 3), torch.zeros(4, 4, 3, 3)
        >>> out, h_n = gru_rcn(torch.zeros(2, 5, 3, 8, 8), None, W, U, C)
        >>> out.shape, h_n.shape
        (torch.Size([2, 5, 4, 8, 8]), torch.Size([2, 4, 8, 8]))
        >>> strided = torch.nn.functional.conv2d(torch.zeros(10, 3, 16, 16), W, stride=2, padding=1)
        >>> gru_rcn(strided.unflatten(0, (2, 5)), None, None, U, C)[0].shape
        torch.Size([2, 5, 4, 8, 8])
    """
    codes: Tensor | None = None
    if reset is not None or hold is not None:
        _check_shapes(x, h0, W, U, C, bias)
        frames = list(x.shape[:2])
        check_mask("reset", reset, frames, True, "x", x)
        check_mask("hold", hold, frames, True, "x", x)
        codes = encode(reset, hold)
    return coded_gru_rcn(x, h0, W, U, C, bias, recompute, codes)


def coded_gru_rcn(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None,
    recompute: bool,
    codes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """:func:`gru_rcn` for masks that ``encode`` has read already."""
    _check_shapes(x, h0, W, U, C, bias, codes)
    if not torch.jit.is_scripting():  # which knows no autocast by device; there the op finds the wrong dtype
        # a compiled graph checks in the fake kernel, behind autocast
        checked_later = torch.compiler.is_compiling() or autocast_is_on(x.device.type)
        if not checked_later:
            _check_dtypes(x, W, U, C, bias)
    return _run(x, h0, W, U, C, bias, recompute, codes)


@torch.jit.script_if_tracing  # a trace then asks anew, at each call, whether a gradient is wanted
def _run(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None,
    recompute: bool,
    codes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    keep = not recompute and _needs_gradient([x, h0, W, U, C, bias])
    if not torch.jit.is_scripting():
        # inside of torch.func's transforms a tensor does not say whether a gradient will be wanted
        keep = not recompute and (keep or torch._C._are_functorch_transforms_active())
    out, h_n, _ = torch.ops.convrnn.gru_rcn(x, h0, W, U, C, bias, keep, codes)
    return out, h_n


def _needs_gradient(inputs: list[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for x in inputs:
            if x is not None and x.requires_grad:
                return True
    return False


def _check_shapes(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None,
    codes: Tensor | None = None,
) -> None:
    check_floating("x", x)
    if x.dim() < 4 or x.dim() > 6 or x.shape[2] == 0:
        raise ValueError(
            f"x must be (B, T, Ox, *S) with Ox > 0 and one to three spatial dimensions, got {list(x.shape)}"
        )
    if C.dim() != x.dim() - 1 or C.shape[0] != C.shape[1]:
        raise ValueError(f"C must be (Oh, Oh, *k) with {x.dim() - 3} kernel dimensions, got {list(C.shape)}")
    channels = C.shape[0]
    if W is None:
        check_shape("x", x, "(B, T, 3*Oh, *S) without W", [x.shape[0], x.shape[1], 3 * channels] + list(x.shape[3:]))
        if bias is not None:
            raise ValueError("bias must be None without W: x is what it would be added to, got a Tensor")
    else:
        _check_kernel("W", W, 3 * channels, x.shape[2], x)
    _check_kernel("U", U, 2 * channels, channels, x)
    _check_kernel("C", C, channels, channels, x)
    if bias is not None:
        check_floating("bias", bias)
        check_same_device("bias", bias, "x", x)
        check_shape("bias", bias, "(3*Oh,)", [3 * channels])
    if h0 is not None:
        _check_state("h0", h0, x, C)
    check_codes(codes, "x", x)


def _check_state(name: str, h: Tensor, x: Tensor, C: Tensor) -> None:
    check_floating(name, h)
    check_same_device(name, h, "x", x)
    check_shape(name, h, "(B, Oh, *S)", [x.shape[0], C.shape[0]] + list(x.shape[3:]))


def _check_kernel(name: str, weight: Tensor, out_channels: int, in_channels: int, x: Tensor) -> None:
    check_floating(name, weight)
    check_same_device(name, weight, "x", x)
    fits = weight.dim() == x.dim() - 1 and weight.shape[0] == out_channels and weight.shape[1] == in_channels
    if not fits or any([size == 0 for size in weight.shape[2:]]):  # noqa: C419  TorchScript has no generators
        raise ValueError(
            f"{name} must be {[out_channels, in_channels]} and {x.dim() - 3} kernel dimensions, got {list(weight.shape)}"
        )


def _check_dtypes(x: Tensor, W: Tensor | None, U: Tensor, C: Tensor, bias: Tensor | None) -> None:
    if W is not None:
        check_same_dtype("W", W, "x", x)
    check_same_dtype("U", U, "x", x)
    check_same_dtype("C", C, "x", x)
    if bias is not None:
        check_same_dtype("bias", bias, "x", x)


def _check_op(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None,
    codes: Tensor | None,
) -> None:
    _check_shapes(x, h0, W, U, C, bias, codes)
    _check_dtypes(x, W, U, C, bias)


def _check_backward(
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
    bias: Tensor | None = None,
    codes: Tensor | None = None,
) -> None:
    _check_op(x, h0, W, U, C, bias, codes)
    if dh_n is not None:
        _check_state("dh_n", dh_n, x, C)
    for name, sequence, times in (("dout", dout, 1), ("out", out, 1), ("gates", gates, 3)):
        if sequence is not None:
            check_same_device(name, sequence, "x", x)
            check_same_dtype(name, sequence, "x", x)
            if name == "gates" and sequence.numel() == 0:
                continue  # not kept
            shape = [*x.shape[:2], times * C.shape[0], *x.shape[3:]]
            check_shape(name, sequence, f"(B, T, {times}*Oh, *S)", shape)
    if len(output_mask) != 6:
        raise ValueError(f"output_mask must hold 6 flags, got {len(output_mask)}")


@torch.library.register_fake("convrnn::gru_rcn")
def _(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None = None,
    keep_gates: bool = True,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_op(x, h0, W, U, C, bias, codes)
    batch, steps, _, *size = x.shape
    out = x.new_empty((batch, steps, C.shape[0], *size))
    h_n = x.new_empty((batch, C.shape[0], *size), dtype=x.dtype if h0 is None else h0.dtype)
    return out, h_n, x.new_empty((batch, steps, 3 * C.shape[0], *size) if keep_gates else (0,))


@torch.library.register_fake("convrnn::gru_rcn_backward")
def _(
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
    bias: Tensor | None = None,
    codes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check_backward(dout, dh_n, x, h0, W, U, C, out, gates, output_mask, bias, codes)
    inputs = (x, h0, W, U, C, None if W is None else W.new_empty(W.shape[0]))
    return tuple(
        x.new_empty(0) if like is None or not wanted else like.new_empty(like.shape)
        for like, wanted in zip(inputs, output_mask, strict=True)
    )


def _odd_or_none(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else odd(weight)


def _narrow(gradient: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient of ``weight`` from that of ``odd(weight)``; as it is where nobody asked for it."""
    if weight is None or gradient.dim() != weight.dim() or gradient.shape == weight.shape:
        return gradient
    for dim in range(2, weight.dim()):
        gradient = gradient.narrow(dim, gradient.shape[dim] - weight.shape[dim], weight.shape[dim])
    return gradient.clone(memory_format=torch.contiguous_format)


def _triton(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None = None,
    keep_gates: bool = True,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.gru_rcn import gru_rcn_fwd

    _check_op(x, h0, W, U, C, bias, codes)
    out, h_n, gates = gru_rcn_fwd(x, h0, _odd_or_none(W), odd(U), odd(C), bias, GRU_STEP, codes)
    return out, h_n, gates if keep_gates else gates.new_empty(0)


def _triton_backward(
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
    bias: Tensor | None = None,
    codes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    from ..kernels.gru_rcn import gru_rcn_bwd, gru_rcn_fwd

    _check_backward(dout, dh_n, x, h0, W, U, C, out, gates, output_mask, bias, codes)
    widened = _odd_or_none(W), odd(U), odd(C)
    if gates.numel() == 0 and out.numel() > 0:
        gates = gru_rcn_fwd(x, h0, *widened, bias, GRU_STEP, codes)[2]
    dx, dh0, dW, dU, dC, dbias = gru_rcn_bwd(dout, dh_n, x, h0, *widened, out, gates, output_mask, codes)
    return dx, dh0, _narrow(dW, W), _narrow(dU, U), _narrow(dC, C), dbias


def _autocast(
    device_type: str,
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None = None,
    keep_gates: bool = True,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    with torch.autocast(device_type, enabled=False):
        out, h_n, gates = torch.ops.convrnn.gru_rcn(
            cast(x), h0, cast(W), cast(U), cast(C), cast(bias), keep_gates, codes
        )
    return out, h_n, gates


def _autocast_backward(device_type: str, *args: Any) -> Any:
    """The convolutions of the backward keep the dtype of the forward."""
    with torch.autocast(device_type, enabled=False):
        return torch.ops.convrnn.gru_rcn_backward(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...], gates_for_x: bool = False) -> None:
    x, h0, W, U, C, bias, _, codes = inputs
    out, _, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)
    kept: Tensor | None = gates
    if gates_for_x and W is None and gates.numel() > 0:
        # backward does not read x, and nobody else keeps it: the activations take its place, saved once for both
        with torch.enable_grad():
            x, kept = StandIn.apply(x, gates), None  # type: ignore[no-untyped-call]
    ctx.save_for_backward(x, h0, W, U, C, out, kept, bias, codes)


def _setup_reverse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup_context(ctx, inputs, output, gates_for_x=True)


def _backward(ctx: Any, dout: Tensor | None, dh_n: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    wanted = [*ctx.needs_input_grad, False][:6]
    if dout is None and dh_n is None:
        return (None,) * 8
    *saved, gates, bias, codes = ctx.saved_tensors
    if gates is None:
        gates = saved[0].detach()
    gradients = torch.ops.convrnn.gru_rcn_backward(dout, dh_n, *saved, gates, wanted, bias, codes)
    found = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    return (*found, None, None)


_WEIGHTS, _BACKWARD_WEIGHTS = (2, 3, 4, 5), (4, 5, 6, 10)
_fold, _loop = fold("gru_rcn", _WEIGHTS), loop("gru_rcn")
_fold_backward, _loop_backward = fold("gru_rcn_backward", _BACKWARD_WEIGHTS), loop("gru_rcn_backward")


def _vmap(info: Any, in_dims: Sequence[Any], *inputs: Any) -> tuple[Any, Any]:
    rule = _loop if any(in_dims[i] is not None for i in _WEIGHTS) else _fold
    return rule(info, in_dims, *inputs)


def _vmap_backward(info: Any, in_dims: Sequence[Any], *inputs: Any) -> tuple[Any, Any]:
    # a gradient of weights sums over the batch, which the mapped dimension must stay out of
    apart = any(in_dims[i] is not None for i in _BACKWARD_WEIGHTS) or any(inputs[9][2:])
    return (_loop_backward if apart else _fold_backward)(info, in_dims, *inputs)


register_triton("gru_rcn", _triton)
register_triton("gru_rcn_backward", _triton_backward)
register_autocast("gru_rcn", _autocast)
register_autocast("gru_rcn_backward", _autocast_backward)
register("gru_rcn", Formulas(_setup_context, _backward, jvp, _vmap, _setup_reverse))
register_backward_op(
    "gru_rcn_backward",
    Forward(forward_and_jvp, (0, 1), (2, 3, 4, 5, 6, 10), constants=(11,), returned=(7, 8, 11), restore=restore),
    _vmap_backward,
)
