"""One convolutional GRU layer in one direction: what GRU_RCN, StackedGRU_RCN and the ConvGRU family are made of."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn.ops import gru_gates, gru_update
from convrnn.ops._check import autocast_is_on
from convrnn.ops.gru_rcn import coded_gru_rcn

from ..kernels.layout import state_dtype
from ._cell import Cell, check_state, time_loop
from ._convolution import Convolution
from ._masks import Masks
from ._options import GRUOptions
from ._parts import fill_gate_bias, make_norm, norm_input, reset_parameters
from ._recurrent import State


class GRUParameters(nn.Module):
    """What a layer is made of, and the op over the whole sequence, which is all that GRU_RCN needs.

    Parameters: ``W`` packed z, r, c; ``U`` z, r; ``C``; ``bias`` packed as ``W``; ``recurrent_bias`` of the candidate
    with ``reset_after``; ``h0``; the depthwise kernels of separable convolutions. Arguments are taken as checked.
    """

    if TYPE_CHECKING:  # torch.jit.trace would record an annotated parameter as an Optional, which has no shape
        reset_after: bool
        recurrent_dropout: float
        zoneout: float
        gate_bias: float | str
        chrono_max: int | None
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
        options: GRUOptions,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input, self.recurrent = input, recurrent
        for name in ("reset_after", "recurrent_dropout", "zoneout", "gate_bias", "chrono_max"):
            setattr(self, name, getattr(options, name))
        self.recompute = False

        def parameter(name: str, shape: tuple[int, ...] | None) -> None:
            empty = None if shape is None else nn.Parameter(torch.empty(shape, **factory))
            self.register_parameter(name, empty)

        for name, conv, channels, packed in (
            ("W", input, input_size, 3),
            ("U", recurrent, hidden_size, 2),
            ("C", recurrent, hidden_size, 1),
        ):
            shape, depthwise = conv.shapes(channels, packed * hidden_size)
            parameter(name, shape)
            parameter(f"{name}_depthwise", depthwise)
        parameter("bias", (3 * hidden_size,) if options.bias else None)
        parameter("recurrent_bias", (hidden_size,) if options.bias and self.reset_after else None)
        parameter("h0", (hidden_size, *(1 for _ in input.kernel)) if options.learn_h0 else None)
        self.norm_W, self.norm_U, self.norm_C = (
            make_norm("cell_norm", options.cell_norm, hidden_size, packed, **factory) for packed in (3, 2, 1)
        )
        # What the op over the sequence covers, recurrent dropout and resets to h0 aside: with the input's convolution, or
        # with any convolution before it.
        covered = self.norm_W is None and not self.reset_after and self.zoneout == 0.0
        self.fused_recurrence = recurrent.fused and covered
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

    def run_op(self, x: Tensor, h: Tensor | None, projected: bool, flags: Tensor | None) -> tuple[Tensor, Tensor]:
        """All frames in one op, from x or what it was ``projected`` to; scriptable."""
        W, bias = None if projected else self.W, None if projected else self.bias
        return coded_gru_rcn(x, h, W, self.U, self.C, bias, self.recompute, flags)


class GRULayer(Cell, GRUParameters):
    """z = s(W_z*x + U_z*h), r = s(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1-z).h + z.c."""

    def __init__(self, *args: Any, backwards: bool = False, **factory: Any) -> None:
        super().__init__(*args, **factory)
        self.backwards, self.time_first = backwards, False  # the op reads (B, T) in order

    def loops(self, masks: Masks) -> bool:
        """Whether the op over the sequence does not cover the recurrence; its resets are to zeros."""
        resets_to_h0 = masks.reset is not None and self.h0 is not None
        return not self.fused_recurrence or resets_to_h0 or (self.training and self.recurrent_dropout > 0.0)

    def project(self, frames: Tensor, masks: Masks) -> Tensor:
        """Returns the batched input projection, or the frames where the op projects them."""
        if self.fused and not self.loops(masks):
            return frames
        self.recurrent.size(self.input.size(list(frames.shape[2:])))  # which refuse frames that are too small
        return self.project_input(frames)

    def scan(self, projection: Tensor, h: list[State] | None, i: int, masks: Masks) -> tuple[Tensor, State]:
        batch, size = projection.shape[0], list(projection.shape[3:])
        loops = self.loops(masks)
        state: Any = None  # or a Tensor
        if h is not None:
            state = h[i]
            check_state(f"h[{i}]", state, [batch, self.hidden_size, *size], projection)
        initial: Tensor | None = None
        if (loops and (h is None or masks.reset is not None)) or (h is None and self.h0 is not None):
            initial = self.initial_state(projection, batch, size)
        if state is None and initial is not None:
            device = projection.device.type
            low = self.fused and not loops and autocast_is_on(device)  # the op projects in a lower precision
            state = initial.to(torch.get_autocast_dtype(device) if low else projection.dtype)
        if not loops:
            return self.run_op(projection, state, not self.fused, masks.flags)
        return time_loop(self.make_step(projection, state), projection, state, masks, initial)

    def make_step(self, projection: Tensor, h: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns a step of :func:`time_loop`; ``recurrent_dropout`` draws one mask for all."""
        size, dtype = 2 * self.hidden_size, projection.dtype
        dropout_mask: Tensor | None = None
        if self.training and self.recurrent_dropout > 0.0:
            ones = torch.ones_like(h, dtype=state_dtype(projection))
            dropout_mask = F.dropout(ones, self.recurrent_dropout)
        packs = self.reset_after and self.norm_U is None and self.recurrent.groups == 1 and self.U_depthwise is None
        gates = self._packed() if packs else self.project_gates

        def step(frame: Tensor, h: Tensor) -> Tensor:
            read = h if dropout_mask is None else h * dropout_mask
            hp = gates(read.to(dtype)).to(dtype)
            if self.reset_after:  # r . (C*h) is what the gates' op computes when C*h stands in for the state
                ch = hp[:, size:] if packs else self.project_candidate(read.to(dtype)).to(dtype)
                z, _, hc = gru_gates(frame[:, :size], hp[:, :size], ch)
            else:
                z, _, rh = gru_gates(frame[:, :size], hp, read)
                hc = self.project_candidate(rh).to(dtype)
            if self.zoneout > 0.0:
                z = z * (torch.empty_like(z).bernoulli_(1.0 - self.zoneout) if self.training else 1.0 - self.zoneout)
            return gru_update(frame[:, size:], hc, z, h)[1]

        return step

    def state_size(self, size: list[int]) -> list[int]:
        return self.input.size(size)

    def initial_state(self, x: Tensor, batch: int, size: list[int]) -> State:
        """Returns (B, hidden_size, *S'): zeros, or h0 where it is learned."""
        shape = (batch, self.hidden_size, *size)
        return x.new_zeros(shape) if self.h0 is None else self.h0.expand(shape)

    def project_input(self, frames: Tensor) -> Tensor:
        """Returns (N, 3*hidden_size, *S'), what z, r and c take from the frames."""
        if self.norm_W is None:
            return self.input(frames, self.W, self.W_depthwise, self.bias, packed=3)
        return self._normalise(self.norm_W, self.input(frames, self.W, self.W_depthwise, packed=3), self.bias)

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
