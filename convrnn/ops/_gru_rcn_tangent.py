"""The tangent of gru_rcn, from which :mod:`._autograd` makes all its derivatives but the first in reverse mode."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.layout import state_dtype
from ._codes import HOLD, RESTART, has_bit
from ._library import TRITON_ON_CPU


def odd(weight: Tensor) -> Tensor:
    """The same convolution with odd kernel sizes: 'same' padding puts the odd one of an even kernel's zeros last."""
    pad: list[int] = []
    for dim in range(weight.dim() - 1, 1, -1):
        pad += [1 - weight.shape[dim] % 2, 0]
    return F.pad(weight, pad) if sum(pad) > 0 else weight


def _no_autocast(x: Any) -> contextlib.AbstractContextManager[Any]:
    """Derivatives keep the dtypes of the forward."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _convolve(frames: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """'Same' convolution of (B, channels, *S)."""
    weight = odd(weight)
    conv = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    return conv(frames, weight, bias, padding=[size // 2 for size in weight.shape[2:]])


def _convolve_all(frames: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same for all steps of (B, T, channels, *S) at once."""
    return _convolve(frames.flatten(0, 1), weight, bias).unflatten(0, frames.shape[:2])


def _states(out: Tensor, h0: Tensor | None, codes: Tensor | None) -> Tensor:
    """The state that each step reads."""
    first = torch.zeros_like(out[:, :1]) if h0 is None else h0.unsqueeze(1).to(out.dtype)
    h = torch.cat((first, out[:, :-1]), 1)
    return h if codes is None else h.masked_fill(has_bit(codes, RESTART | HOLD, h), 0.0)


def _activations(gates: Tensor, features: int) -> Tensor:
    """z, r and c (B, T, 3*Oh, *S) from what the kernels of the device kept (kernels/cpu/gru_cell.h)."""
    if gates.device.type != "cpu" or TRITON_ON_CPU:
        return gates
    return gates.reshape(*gates.shape[:2], 3, *gates.shape[3:], features).movedim(-1, 3).flatten(2, 3)


class StandIn(torch.autograd.Function):
    """``other``, in x's place of the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        return other.view_as(other)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def restore(primals: list[Tensor | None], returned: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inputs of gru_rcn from those of its backward: without W the activations are kept and x is not, only its place in
    the graph."""
    x, h0, W, U, C, _ = primals
    out, gates, codes = returned
    assert x is not None and U is not None and C is not None and out is not None and gates is not None
    if W is not None or gates.numel() == 0:
        return primals
    dtype, features = state_dtype(x), C.shape[0]
    with _no_autocast(x):
        zr, c = _activations(gates, features).to(dtype).split([2 * features, features], dim=2)
        h = _states(out.to(dtype), h0, codes)
        rh = zr[:, :, features:] * h
        most = 1e4  # where they round to 0 or 1: far out and finite in every dtype
        a_zr = torch.logit(zr).clamp(-most, most) - _convolve_all(h, U.to(dtype))
        # a GPU's division, (1 - e) / (1 + e) of the kernel's tanh, may come out two units in the last place above 1
        a_c = torch.atanh(c.clamp(-1.0, 1.0)).clamp(-most, most) - _convolve_all(rh, C.to(dtype))
        projection = torch.cat((a_zr, a_c), 2).to(x.dtype)
        return [x + (projection - x).detach(), *primals[1:]]


def jvp(
    inputs: Sequence[Any], outputs: Sequence[Tensor | None], tangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The tangent of the recurrence: what does not wait for the state's tangent is computed for all steps at once."""
    x, h0, *_, codes = inputs
    dtype = state_dtype(x)
    with _no_autocast(x):
        out, h_n = outputs[:2]
        assert out is not None and h_n is not None
        dx, dh0, dW, dU, dC, dbias = (None if t is None else t.to(dtype) for t in tangents[:6])
        dh = torch.zeros_like(h_n, dtype=dtype) if dh0 is None else dh0
        if out.numel() == 0:
            return torch.zeros_like(out), dh.to(h_n.dtype), None
        restart = held = None
        if codes is not None:
            restart, held = has_bit(codes, RESTART, x), has_bit(codes, HOLD, x)
            x = x.masked_fill(held, 0.0)
            dx = None if dx is None else dx.masked_fill(held, 0.0)
        x, U, C = (i.to(dtype) for i in (x, *inputs[3:5]))
        W, bias = (None if i is None else i.to(dtype) for i in (inputs[2], inputs[5]))
        features = C.shape[0]
        h = _states(out.to(dtype), h0, codes)
        xp = x if W is None else _convolve_all(x, W, bias)
        zr = torch.sigmoid(xp[:, :, : 2 * features] + _convolve_all(h, U))
        z, r = zr.chunk(2, dim=2)
        c = torch.tanh(xp[:, :, 2 * features :] + _convolve_all(r * h, C))

        da = torch.zeros_like(xp)  # of the pre-activations
        if dx is not None:
            da = da + (dx if W is None else _convolve_all(dx, W))
        if dW is not None:
            da = da + _convolve_all(x, dW)
        if dbias is not None:
            da = da + dbias.view(-1, *[1] * (x.dim() - 3))
        da_zr, da_c = da[:, :, : 2 * features], da[:, :, 2 * features :]
        if dU is not None:
            da_zr = da_zr + _convolve_all(h, dU)
        if dC is not None:
            da_c = da_c + _convolve_all(r * h, dC)

        steps = (t.unbind(1) for t in (da_zr, da_c, zr * (1 - zr), z, r, c - h, z * (1 - c * c), h))
        dout = []
        for t, (da_zr_t, da_c_t, slope_zr, z_t, r_t, toward, slope_c, h_t) in enumerate(zip(*steps, strict=True)):
            still = t == 0 and dh0 is None  # the state has no tangent yet
            if restart is not None:
                dh = dh.masked_fill(restart[:, t], 0.0)
            dz, dr = (slope_zr * (da_zr_t if still else da_zr_t + _convolve(dh, U))).chunk(2, dim=1)
            dc = slope_c * (da_c_t + _convolve(dr * h_t + r_t * dh, C))
            moved = (1 - z_t) * dh + toward * dz + dc
            dh = moved if held is None else torch.where(held[:, t], dh, moved)
            dout.append(dh)
        return torch.stack(dout, 1).to(out.dtype), dh.to(h_n.dtype), None


def forward_and_jvp(primals: Sequence[Tensor | None], directions: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    *inputs, codes = primals
    with _no_autocast(primals[0]):
        outputs = torch.ops.convrnn.gru_rcn(*inputs, codes=codes)
    return jvp(primals, outputs, directions)
