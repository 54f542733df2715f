"""One convolutional GRU layer in one direction: what GRU_RCN, StackedGRU_RCN and the ConvGRU family are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn.ops import gru_gates, gru_update
from convrnn.ops._codes import encode
from convrnn.ops.gru_rcn import coded_gru_rcn

from ..kernels.layout import state_dtype

__all__ = ["Convolution", "GRULayer", "GRUParameters", "Norm", "make_norm"]

Norm = bool | str | Callable[[int], nn.Module] | None


@dataclass(frozen=True)
class Convolution:
    """A convolution without its weights; ``padding`` holds (before, after) for each dimension, None is 'same'.

    'Same' padding with a stride gives every stride-th pixel of the convolution without one. ``separable`` convolves
    each channel on its own and then mixes the channels of each pixel.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[tuple[int, int], ...] | None = None
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    mode: str = "zeros"
    separable: bool = False

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Padding (before, after) of each dimension; an even kernel has one more after, as PyTorch's 'same' has."""
        if self.padding is not None:
            return self.padding
        spans = [dilation * (kernel - 1) for dilation, kernel in zip(self.dilation, self.kernel, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)

    @property
    def keeps_size(self) -> bool:
        """True if every input keeps its size."""
        return set(self.stride) == {1} and all(
            before + after == dilation * (kernel - 1)
            for (before, after), dilation, kernel in zip(self.pads, self.dilation, self.kernel, strict=True)
        )

    @property
    def fused(self) -> bool:
        """True if this is the convolution of ``convrnn.gru_rcn``: dense, with 'same' padding of zeros."""
        same = Convolution(self.kernel, dilation=(1,) * len(self.kernel)).pads
        dense = self.groups == 1 and not self.separable and set(self.stride) == set(self.dilation) == {1}
        return dense and self.pads == same and (self.mode == "zeros" or set(self.kernel) == {1})

    def size(self, size: list[int]) -> list[int]:
        """Returns the size of the output for an input of ``size``; ValueError where that is too small."""
        out = []
        for extent, kernel, stride, pads, dilation in zip(
            size, self.kernel, self.stride, self.pads, self.dilation, strict=True
        ):
            span = dilation * (kernel - 1)
            most = {"reflect": extent - 1, "circular": extent}.get(self.mode, max(pads))
            if extent + sum(pads) <= span or max(pads) > most:
                raise ValueError(
                    f"x is too small: a kernel of {self.kernel} with dilation {self.dilation} and {self.mode} padding "
                    f"{self.pads} meets {' x '.join(map(str, size))}"
                )
            out.append((extent + sum(pads) - span - 1) // stride + 1)
        return out

    def shapes(self, channels: int, out_channels: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Returns the shape of the weight, and that of the depthwise one of a separable convolution."""
        if self.separable:
            return (out_channels, channels, *(1 for _ in self.kernel)), (channels, 1, *self.kernel)
        return (out_channels, channels // self.groups, *self.kernel), None

    def __call__(
        self, x: Tensor, weight: Tensor, depthwise: Tensor | None = None, bias: Tensor | None = None, packed: int = 1
    ) -> Tensor:
        """Convolves (N, channels, *S); ``packed`` convolutions, one after another in ``weight``, all read x."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        pads = self.pads
        padding = tuple(before for before, _ in pads)
        if any(before != after for before, after in pads) or (self.mode != "zeros" and any(padding)):
            flat = [pad for before, after in reversed(pads) for pad in (before, after)]
            x = F.pad(x, flat, "constant" if self.mode == "zeros" else self.mode)
            padding = (0,) * len(pads)
        if depthwise is not None:
            x = convolve(x, depthwise, None, self.stride, padding, self.dilation, depthwise.shape[0])
            return convolve(x, weight, bias)
        if self.groups == 1:
            return convolve(x, weight, bias, self.stride, padding, self.dilation)
        # The groups divide each of the packed convolutions, not their pack.
        x = x.repeat(1, packed, *(1 for _ in self.kernel))
        return convolve(x, weight, bias, self.stride, padding, self.dilation, packed * self.groups)


def norm_groups(channels: int) -> int:
    """Returns the first of 64, 32, 16, 8, 4, 1 that divides the channels and leaves min(4, channels) in a group."""
    return next(n for n in (64, 32, 16, 8, 4, 1) if channels % n == 0 and channels // n >= min(4, channels))


def make_norm(name: str, norm: Norm, channels: int, packed: int = 1, **factory: Any) -> nn.Module | None:
    """Returns the normalisation of ``packed`` times ``channels`` channels, each of the packed ones on its own.

    None and False are none, 'layer' is a GroupNorm of one group, 'group' and True one of up to 64 groups of at least 4
    channels; a callable gets the number of all channels.
    """
    if norm is None or norm is False:
        return None
    if callable(norm):
        module = norm(packed * channels)
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} must return a Module for a number of channels, got {type(module).__name__}")
        return module.to(**factory)
    if norm is not True and norm not in ("layer", "group"):
        raise ValueError(f"{name} must be None, 'layer', 'group' or a callable channels -> Module, got {norm!r}")
    groups = 1 if norm == "layer" else norm_groups(channels)
    return nn.GroupNorm(packed * groups, packed * channels, **factory)


def recur(
    projection: Tensor,
    h: Tensor,
    gates: Callable[[Tensor], Tensor],
    candidate: Callable[[Tensor], Tensor] | None,
    *,
    reset_after: bool = False,
    keep: Tensor | None = None,
    zoneout: float = 0.0,
    training: bool = False,
    live: Tensor | None = None,
    restart: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over all frames for projections and recurrent convolutions of any kind, step after step.

    Args:
        projection: (B, T, 3*C, *S), what z, r and c take from the input, biases included.
        h: (B, C, *S), the state before the first frame.
        gates: the recurrent convolutions of z and r: (B, C, *S) -> (B, 2*C, *S).
        candidate: that of c: (B, C, *S) -> (B, C, *S), its bias included; None with ``reset_after`` where ``gates``
            computes it too, (B, 3*C, *S), for there all three read the same state.
        reset_after: c = tanh(x_c + r . candidate(h)) instead of tanh(x_c + candidate(r . h)).
        keep: (B, C, *S), factors of the state that the recurrent convolutions read.
        zoneout: probability that an element keeps its state; its expectation where not ``training``.
        live: (B, T) bool, False where the state is held as it is.
        restart: (B, T) bool, True where the state becomes ``initial`` before the frame.

    Returns:
        The states (B, T, C, *S) in the dtype of ``projection``, and the last one in the dtype of ``h``.
    """
    features, dtype = projection.shape[2] // 3, projection.dtype
    ones = (1,) * (projection.dim() - 2)
    state = h.to(state_dtype(projection))
    out: list[Tensor] = []
    for t, frame in enumerate(projection.unbind(1)):
        if restart is not None:
            assert initial is not None
            state = torch.where(restart[:, t].view(-1, *ones), initial.to(state.dtype), state)
        read = state if keep is None else state * keep
        hp = gates(read.to(dtype)).to(dtype)
        if reset_after:  # r . (C*h) is what the gates' op computes when C*h stands in for the state
            ch = hp[:, 2 * features :] if candidate is None else candidate(read.to(dtype)).to(dtype)
            z, _, hc = gru_gates(frame[:, : 2 * features], hp[:, : 2 * features], ch)
        else:
            assert candidate is not None
            z, _, rh = gru_gates(frame[:, : 2 * features], hp, read)
            hc = candidate(rh).to(dtype)
        if zoneout > 0.0:
            z = z * (torch.empty_like(z).bernoulli_(1.0 - zoneout) if training else 1.0 - zoneout)
        if live is not None:
            z = z * live[:, t].view(-1, *ones)  # z = 0 leaves the state, to the last bit
        _, state = gru_update(frame[:, 2 * features :], hc, z, state)
        out.append(state.to(dtype))
    return torch.stack(out, 1) if out else projection[:, :, :features], state.to(h.dtype)


class GRUParameters(nn.Module):
    """What a layer is made of, and the op over the whole sequence, which is all that GRU_RCN needs.

    Parameters: ``W`` packed z, r, c; ``U`` z, r; ``C``; ``bias`` packed as ``W``; ``recurrent_bias`` of the candidate
    with ``reset_after``; ``h0``; the depthwise kernels of separable convolutions. Arguments are taken as checked.
    """

    W: Tensor
    U: Tensor
    C: Tensor
    W_depthwise: Tensor | None
    U_depthwise: Tensor | None
    C_depthwise: Tensor | None
    bias: Tensor | None
    recurrent_bias: Tensor | None
    h0: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        input: Convolution,
        recurrent: Convolution,
        *,
        bias: bool = False,
        reset_after: bool = False,
        cell_norm: Norm = None,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        gate_bias: float | str = 0.0,
        chrono_max: int | None = None,
        learn_h0: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input, self.recurrent = input, recurrent
        self.reset_after, self.recurrent_dropout, self.zoneout = reset_after, recurrent_dropout, zoneout
        self.gate_bias, self.chrono_max = gate_bias, chrono_max
        self.recompute = recompute

        def parameter(name: str, shape: tuple[int, ...] | None) -> None:
            empty = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, empty)

        for name, conv, channels, packed in (
            ("W", input, input_size, 3),
            ("U", recurrent, hidden_size, 2),
            ("C", recurrent, hidden_size, 1),
        ):
            shape, depthwise = conv.shapes(channels, packed * hidden_size)
            parameter(name, shape)
            parameter(f"{name}_depthwise", depthwise)
        parameter("bias", (3 * hidden_size,) if bias else None)
        parameter("recurrent_bias", (hidden_size,) if bias and reset_after else None)
        parameter("h0", (hidden_size, *(1 for _ in input.kernel)) if learn_h0 else None)

        def norm(packed: int) -> nn.Module | None:
            return make_norm("cell_norm", cell_norm, hidden_size, packed, device=device, dtype=dtype)

        self.norm_W, self.norm_U, self.norm_C = norm(3), norm(2), norm(1)
        # What the whole-sequence op covers, recurrent dropout and restarts from h0 aside: with the input's convolution, or
        # with any convolution before it.
        self.fused_recurrence = recurrent.fused and self.norm_W is None and not reset_after and zoneout == 0.0
        self.fused = input.fused and self.fused_recurrence
        GRUParameters.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Draws each packed kernel from Xavier's uniform distribution; zeroes biases and h0, but for the gate's bias."""
        for name in ("W", "U", "C"):
            nn.init.xavier_uniform_(getattr(self, name))
            if getattr(self, f"{name}_depthwise") is not None:
                nn.init.xavier_uniform_(getattr(self, f"{name}_depthwise"))
        for vector in (self.bias, self.recurrent_bias, self.h0):
            if vector is not None:
                nn.init.zeros_(vector)
        if self.bias is not None:
            with torch.no_grad():
                gate = self.bias[: self.hidden_size]
                if isinstance(self.gate_bias, str):
                    # log U(1, T-1) is the bias of a gate that keeps; z is the gate that takes, hence the sign.
                    gate.copy_(-torch.empty_like(gate).uniform_(1.0, float((self.chrono_max or 2) - 1)).log())
                else:
                    gate.fill_(self.gate_bias)
        norms: list[Any] = [self.norm_W, self.norm_U, self.norm_C]
        for norm in norms:
            if hasattr(norm, "reset_parameters"):
                norm.reset_parameters()

    def run_fused(self, x: Tensor, h: Tensor | None, codes: Tensor | None) -> tuple[Tensor, Tensor]:
        """The whole sequence in one op; scriptable."""
        return coded_gru_rcn(x, h, self.W, self.U, self.C, self.bias, self.recompute, codes)


class GRULayer(GRUParameters):
    """z = s(W_z*x + U_z*h), r = s(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1-z).h + z.c."""

    def initial_state(self, x: Tensor) -> Tensor:
        """Returns the state that None stands for, (B, hidden_size, *S'): zeros, or h0 where it is learned."""
        shape = (x.shape[0], self.hidden_size, *self.input.size(list(x.shape[3:])))
        return x.new_zeros(shape) if self.h0 is None else self.h0.expand(shape)

    def forward(
        self,
        x: Tensor,
        h: Tensor | None = None,
        live: Tensor | None = None,
        restart: Tensor | None = None,
        below: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs all frames (B, T, input_size, *S); ``below`` (B, T, 2*hidden_size, *S') joins what z and r read.

        Where not ``live`` (B, T), the state is held as it is; where ``restart`` (B, T), it becomes the initial one before
        the frame.
        """
        dropout = self.recurrent_dropout if self.training else 0.0
        restarts_from_h0 = restart is not None and self.h0 is not None  # the op's restart is from zeros
        walks = not self.fused_recurrence or dropout > 0.0 or restarts_from_h0
        codes = None if walks else encode(restart, None if live is None else ~live)
        if self.fused and below is None and not walks:
            return self.run_fused(x, self.initial_state(x) if h is None and self.h0 is not None else h, codes)
        self.recurrent.size(self.input.size(list(x.shape[3:])))  # which refuse frames that are too small
        projection = self.project(x)
        if below is not None:
            size = self.hidden_size
            projection = torch.cat((projection[:, :, : 2 * size] + below, projection[:, :, 2 * size :]), 2)
        initial: Tensor | None = None
        if (walks and (h is None or restart is not None)) or (h is None and self.h0 is not None):
            initial = self.initial_state(x)
        if h is None and initial is not None:
            h = initial.to(projection.dtype)
        if not walks:
            return coded_gru_rcn(projection, h, None, self.U, self.C, None, self.recompute, codes)
        assert h is not None
        packs = self.reset_after and self.norm_U is None and self.recurrent.groups == 1 and self.U_depthwise is None
        return recur(
            projection,
            h,
            self._packed() if packs else self.project_gates,
            None if packs else self.project_candidate,
            reset_after=self.reset_after,
            keep=F.dropout(torch.ones_like(h, dtype=state_dtype(projection)), dropout) if dropout > 0.0 else None,
            zoneout=self.zoneout,
            training=self.training,
            live=live,
            restart=restart,
            initial=initial,
        )

    def project(self, x: Tensor) -> Tensor:
        """Returns (B, T, 3*hidden_size, *S'), what z, r and c take from the frames."""
        frames = x.flatten(0, 1)
        if self.norm_W is None:
            out = self.input(frames, self.W, self.W_depthwise, self.bias, packed=3)
        else:
            out = self._normalise(self.norm_W, self.input(frames, self.W, self.W_depthwise, packed=3), self.bias)
        return out.unflatten(0, x.shape[:2])

    def project_gates(self, h: Tensor) -> Tensor:
        return self._normalise(self.norm_U, self.recurrent(h, self.U, self.U_depthwise, packed=2), None)

    def project_candidate(self, h: Tensor) -> Tensor:
        return self._normalise(self.norm_C, self.recurrent(h, self.C, self.C_depthwise), self.recurrent_bias)

    def _packed(self) -> Callable[[Tensor], Tensor]:
        """Both recurrent convolutions in one."""
        weight, bias = torch.cat((self.U, self.C)), self.recurrent_bias
        if bias is not None:
            bias = F.pad(bias, (2 * self.hidden_size, 0))
        return lambda h: self.recurrent(h, weight, None, bias)

    def _normalise(self, norm: nn.Module | None, x: Tensor, bias: Tensor | None) -> Tensor:
        """The bias comes last: a normalisation over the channels of a gate would take a constant of theirs away."""
        x = x if norm is None else norm(x)
        return x if bias is None else x + bias.view(-1, *(1 for _ in self.recurrent.kernel))
