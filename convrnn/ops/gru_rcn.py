"""GRU-RCN over a whole sequence: ``convrnn::gru_rcn`` and its public function."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_floating, check_same_device, check_same_dtype, check_shape
from ._library import register_autocast, register_once_differentiable, register_triton


def gru_rcn(
    x: Tensor, h0: Tensor | None, W: Tensor, U: Tensor, C: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z) . h_{t-1} + z . c over a sequence of frames, every projection a convolution (*).

    z = sigmoid(W_z*x_t + U_z*h_{t-1}), r = sigmoid(W_r*x_t + U_r*h_{t-1}), c = tanh(W_c*x_t + C*(r . h_{t-1})); z is the
    share of the candidate c. Zero padding keeps the size of the frames, for odd and even kernels. The input convolution
    runs once over all frames, weight gradients are batched over time, and state and gates are computed in fp32 (fp64 for
    float64). Saved for backward: the arguments, the states and [z, r, c].

    Under autocast, x, the weights and the bias are cast once a call and the state stays fp32.

    Args:
        x: (B, T, Ox, *S) with one, two or three spatial dimensions; float32, float64, bfloat16 or float16.
        h0: (B, Oh, *S), the state before the first frame, of any of these dtypes; None is zero.
        W: (3*Oh, Ox, *k), input kernels in the order z, r, candidate, of x's dtype.
        U: (2*Oh, Oh, *k), recurrent kernels z, r.
        C: (Oh, Oh, *k), the recurrent kernel of the candidate. The kernel sizes of W, U and C may differ.
        bias: (3*Oh,) in the order z, r, candidate, or None.

    Returns:
        ``out`` (B, T, Oh, *S), contiguous, in the dtype of ``x``, and ``h_n`` (B, Oh, *S), the state after the last frame
        in the dtype of ``h0`` (of ``x`` where there is none).

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: a shape or device does not fit.

    Source: Ballas et al., ICLR 2016, arXiv 1511.06432.

    Example:
        >>> W, U, C = torch.zeros(12, 3, 3, 3), torch.zeros(8, 4, 3, 3), torch.zeros(4, 4, 3, 3)
        >>> out, h_n = gru_rcn(torch.zeros(2, 5, 3, 8, 8), None, W, U, C)
        >>> out.shape, h_n.shape
        (torch.Size([2, 5, 4, 8, 8]), torch.Size([2, 4, 8, 8]))
    """
    _check_shapes(x, h0, W, U, C, bias)
    if not torch.jit.is_scripting():  # which knows no autocast by device; there the op finds the wrong dtype
        device_type = x.device.type
        checked_later = (
            torch.compiler.is_compiling()
            or (  # a compiled graph checks in the fake kernel, behind autocast
                torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
            )
        )
        if not checked_later:
            _check_dtypes(x, W, U, C, bias)
    out, h_n, _ = torch.ops.convrnn.gru_rcn(x, h0, _odd(W), _odd(U), _odd(C), bias)
    return out, h_n


def _check_shapes(x: Tensor, h0: Tensor | None, W: Tensor, U: Tensor, C: Tensor, bias: Tensor | None) -> None:
    check_floating("x", x)
    if x.dim() < 4 or x.dim() > 6 or x.shape[2] == 0:
        raise ValueError(
            f"x must be (B, T, Ox, *S) with Ox > 0 and one to three spatial dimensions, got {list(x.shape)}"
        )
    if C.dim() != x.dim() - 1 or C.shape[0] != C.shape[1]:
        raise ValueError(f"C must be (Oh, Oh, *k) with {x.dim() - 3} kernel dimensions, got {list(C.shape)}")
    channels = C.shape[0]
    _check_kernel("W", W, 3 * channels, x.shape[2], x)
    _check_kernel("U", U, 2 * channels, channels, x)
    _check_kernel("C", C, channels, channels, x)
    if bias is not None:
        check_floating("bias", bias)
        check_same_device("bias", bias, "x", x)
        check_shape("bias", bias, "(3*Oh,)", [3 * channels])
    if h0 is not None:
        _check_state("h0", h0, x, C)


def _check_state(name: str, h: Tensor, x: Tensor, C: Tensor) -> None:
    check_floating(name, h)
    check_same_device(name, h, "x", x)
    check_shape(name, h, "(B, Oh, *S)", [x.shape[0], C.shape[0]] + list(x.shape[3:]))


def _check_kernel(name: str, weight: Tensor, out_channels: int, in_channels: int, x: Tensor) -> None:
    check_floating(name, weight)
    check_same_device(name, weight, "x", x)
    if weight.dim() != x.dim() - 1 or weight.shape[0] != out_channels or weight.shape[1] != in_channels:
        raise ValueError(
            f"{name} must be {[out_channels, in_channels]} and {x.dim() - 3} kernel dimensions, got {list(weight.shape)}"
        )


def _check_dtypes(x: Tensor, W: Tensor, U: Tensor, C: Tensor, bias: Tensor | None) -> None:
    check_same_dtype("W", W, "x", x)
    check_same_dtype("U", U, "x", x)
    check_same_dtype("C", C, "x", x)
    if bias is not None:
        check_same_dtype("bias", bias, "x", x)


def _check_op(x: Tensor, h0: Tensor | None, W: Tensor, U: Tensor, C: Tensor, bias: Tensor | None) -> None:
    _check_shapes(x, h0, W, U, C, bias)
    _check_dtypes(x, W, U, C, bias)
    for name, weight in (("W", W), ("U", U), ("C", C)):
        if any(size % 2 == 0 for size in weight.shape[2:]):
            raise ValueError(
                f"{name} must have odd kernel sizes (convrnn.gru_rcn takes even ones), got {list(weight.shape)}"
            )


def _check_backward(
    dout: Tensor | None,
    dh_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    W: Tensor,
    U: Tensor,
    C: Tensor,
    out: Tensor,
    gates: Tensor,
    output_mask: list[bool],
) -> None:
    _check_op(x, h0, W, U, C, None)
    if dh_n is not None:
        _check_state("dh_n", dh_n, x, C)
    for name, sequence, times in (("dout", dout, 1), ("out", out, 1), ("gates", gates, 3)):
        if sequence is not None:
            check_same_device(name, sequence, "x", x)
            check_same_dtype(name, sequence, "x", x)
            shape = [*x.shape[:2], times * C.shape[0], *x.shape[3:]]
            check_shape(name, sequence, f"(B, T, {times}*Oh, *S)", shape)
    if len(output_mask) != 6:
        raise ValueError(f"output_mask must hold 6 flags, got {len(output_mask)}")


def _odd(weight: Tensor) -> Tensor:
    """The same convolution with odd kernel sizes: 'same' padding puts the odd one of an even kernel's zeros last."""
    pad: list[int] = []
    for dim in range(weight.dim() - 1, 1, -1):
        pad += [1 - weight.shape[dim] % 2, 0]
    return F.pad(weight, pad) if sum(pad) > 0 else weight


@torch.library.register_fake("convrnn::gru_rcn")
def _(
    x: Tensor, h0: Tensor | None, W: Tensor, U: Tensor, C: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_op(x, h0, W, U, C, bias)
    batch, steps, _, *size = x.shape
    h_n = x.new_empty((batch, C.shape[0], *size), dtype=x.dtype if h0 is None else h0.dtype)
    return x.new_empty((batch, steps, C.shape[0], *size)), h_n, x.new_empty((batch, steps, W.shape[0], *size))


@torch.library.register_fake("convrnn::gru_rcn_backward")
def _(
    dout: Tensor | None,
    dh_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    W: Tensor,
    U: Tensor,
    C: Tensor,
    out: Tensor,
    gates: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    _check_backward(dout, dh_n, x, h0, W, U, C, out, gates, output_mask)
    inputs = (x, h0, W, U, C, W.new_empty(W.shape[0]))
    return tuple(
        x.new_empty(0) if like is None or not wanted else like.new_empty(like.shape)
        for like, wanted in zip(inputs, output_mask, strict=True)
    )


def _triton(
    x: Tensor, h0: Tensor | None, W: Tensor, U: Tensor, C: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.gru_rcn import gru_rcn_fwd

    _check_op(x, h0, W, U, C, bias)
    return gru_rcn_fwd(x, h0, W, U, C, bias)


def _triton_backward(*args: Any) -> tuple[Tensor, ...]:
    from ..kernels.gru_rcn import gru_rcn_bwd

    _check_backward(*args)
    return gru_rcn_bwd(*args)


def _autocast(
    device_type: str, x: Tensor, h0: Tensor | None, W: Tensor, U: Tensor, C: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: Tensor) -> Tensor:
        return t if t.dtype == torch.float64 else t.to(dtype)

    with torch.autocast(device_type, enabled=False):
        out, h_n, gates = torch.ops.convrnn.gru_rcn(
            cast(x), h0, cast(W), cast(U), cast(C), None if bias is None else cast(bias)
        )
    return out, h_n, gates


def _autocast_backward(device_type: str, *args: Any) -> Any:
    """The convolutions of the backward keep the dtype of the forward."""
    with torch.autocast(device_type, enabled=False):
        return torch.ops.convrnn.gru_rcn_backward(*args)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    out, _, gates = output
    ctx.save_for_backward(*inputs[:5], out, gates)  # x, h0, W, U, C
    ctx.mark_non_differentiable(gates)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dh_n: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    wanted = [*ctx.needs_input_grad, False][:6]  # the dispatcher drops an absent bias
    if dout is None and dh_n is None:
        return (None,) * len(wanted)
    gradients = torch.ops.convrnn.gru_rcn_backward(dout, dh_n, *ctx.saved_tensors, wanted)
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


register_triton("gru_rcn", _triton)
register_triton("gru_rcn_backward", _triton_backward)
register_autocast("gru_rcn", _autocast)
register_autocast("gru_rcn_backward", _autocast_backward)
torch.library.register_autograd("convrnn::gru_rcn", _backward, setup_context=_setup_context)
register_once_differentiable("gru_rcn_backward")
