"""One convolutional GRU layer in one direction: what GRU_RCN, StackedGRU_RCN and the ConvGRU family are made of."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn.ops import gru_gates, gru_update
from convrnn.ops._check import autocast_is_on
from convrnn.ops._codes import encode
from convrnn.ops.gru_rcn import coded_gru_rcn

from ..kernels.layout import state_dtype
from ._convolution import Convolution
from ._parts import Norm, fill_gate_bias, make_norm, norm_input, reset_parameters

__all__ = ["GRULayer", "GRUParameters"]


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
    if not out:
        return projection[:, :, :features], h.clone()
    return torch.stack(out, 1), state.to(h.dtype)


class GRUParameters(nn.Module):
    """What a layer is made of, and the op over the whole sequence, which is all that GRU_RCN needs.

    Parameters: ``W`` packed z, r, c; ``U`` z, r; ``C``; ``bias`` packed as ``W``; ``recurrent_bias`` of the candidate
    with ``reset_after``; ``h0``; the depthwise kernels of separable convolutions. Arguments are taken as checked.
    """

    if TYPE_CHECKING:  # torch.jit.trace would record an annotated parameter as an Optional, which has no shape
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
            fill_gate_bias(self.bias[: self.hidden_size], self.gate_bias, self.chrono_max)
        reset_parameters(norm for norm in (self.norm_W, self.norm_U, self.norm_C) if norm is not None)

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
            if h is None and self.h0 is not None:
                low = autocast_is_on(x.device.type)  # the dtype of the projection, which is the op's here
                h = self.initial_state(x).to(torch.get_autocast_dtype(x.device.type) if low else x.dtype)
            return self.run_fused(x, h, codes)
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
        x = x if norm is None else norm(norm_input(x))
        return x if bias is None else x + bias.view(-1, *(1 for _ in self.recurrent.kernel))
