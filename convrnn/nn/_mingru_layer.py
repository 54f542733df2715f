"""One minGRU or minLSTM layer in one direction or both: what the stacks of vectors and of images are made of."""

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn.ops._check import autocast_is_on, check_floating, check_same_device, check_same_dtype

from ._checks import check_shape
from ._convolution import Conv, Convolution
from ._parts import fill_gate_bias, norm_input, reset_parameters

__all__ = ["MinGRUDirection", "MinGRULayer", "check_read", "projection", "scan"]


def scan(gate_hidden: Tensor, h: Tensor | None, i: int, codes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs minGRU over (B, T, 2C, *S) from the state h (B, 1, C, *S), the i-th; None is the 'zero' state."""
    if h is not None:
        name, shape = f"h[{i}]", list(gate_hidden.shape)
        check_shape(name, h, [shape[0], 1, shape[2] // 2] + shape[3:])
        check_floating(name, h)
        check_same_device(name, h, "x", gate_hidden)
        h = h.squeeze(1)
    out, h_n = torch.ops.convrnn.mingru(gate_hidden, h, codes)
    return out, h_n.unsqueeze(1)


def gates_of_lstm(forget_input_hidden: Tensor) -> Tensor:
    """Returns [gate, hidden] of the minGRU whose z is minLSTM's i/(f+i), from the packed f, i, hidden (N, 3C, *S)."""
    forget, take, hidden = forget_input_hidden.chunk(3, 1)
    gate = F.logsigmoid(take) - F.logsigmoid(forget)
    return torch.cat((gate.to(hidden.dtype), hidden), 1)


def projection(
    convolution: Convolution | None, size_in: int, size_out: int, packed: int, bias: bool, **factory: Any
) -> nn.Module:
    """What reads a step: ``packed`` linear maps, or convolutions, in one."""
    if convolution is None:
        return nn.Linear(size_in, packed * size_out, bias=bias, **factory)
    return Conv(convolution, size_in, size_out, packed, bias=bias, **factory)


def check_read(x: Tensor, reader: nn.Module) -> None:
    """TypeError unless x has the dtype of the weight that reads it, or autocast is on. What has none takes any."""
    weight = getattr(reader, "weight", x)
    if isinstance(weight, Tensor) and weight.dtype != x.dtype and weight.is_floating_point():
        check_floating("x", x)
        if not autocast_is_on(x.device.type):
            check_same_dtype("x", x, "the parameters", weight)


class MinGRUDirection(nn.Module):
    """h' = (1-z).h + z.g(hidden) with [gate, hidden] = gate_hidden(x), or minLSTM's, in one direction of time."""

    lstm: Final[bool]
    batch_first: Final[bool]
    backwards: Final[bool]
    if TYPE_CHECKING:  # torch.jit.trace would record an annotated parameter as an Optional, which has no shape
        h0: Tensor | None

    def __init__(
        self,
        size_in: int,
        size: int,
        size_out: int,
        convolution: Convolution | None,
        *,
        lstm: bool,
        bias: bool,
        gate_bias: float | str | None,
        chrono_max: int | None,
        learn_h0: bool,
        batch_first: bool,
        backwards: bool,
        out_proj: bool = False,
        norm: nn.Module | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        if norm is not None:
            self.norm = norm  # first: the order of parameters is that of optimizers' checkpoints
        ones = () if convolution is None else tuple(1 for _ in convolution.kernel)
        pixel = None if convolution is None else Convolution(ones, ones, dilation=ones)
        self.size, self.lstm, self.batch_first, self.backwards = size, lstm, batch_first, backwards
        self.gate_bias, self.chrono_max = gate_bias, chrono_max
        self.gate_hidden = projection(convolution, size_in, size, 3 if lstm else 2, bias, **factory)
        projects = out_proj or size != size_out
        self.out_proj = projection(pixel, size, size_out, 1, False, **factory) if projects else None
        self.register_parameter("h0", nn.Parameter(torch.empty(size, *ones, **factory)) if learn_h0 else None)
        self.reset_own()

    def reset_own(self) -> None:
        """Initialises what the projections do not by themselves."""
        if self.h0 is not None:
            nn.init.constant_(self.h0, 0.5)
        bias: Any = self.gate_hidden.bias
        if self.gate_bias is not None and bias is not None:
            gate = bias[: self.size]
            if self.lstm:  # z = i/(f+i): the input's gate is biased towards taking, the forget gate against keeping
                gate = bias[self.size : 2 * self.size]
            fill_gate_bias(gate, self.gate_bias, self.chrono_max)
            if self.lstm:
                with torch.no_grad():
                    bias[: self.size] = -gate

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        reset_parameters(self.children())
        self.reset_own()

    def initial_state(self, x: Tensor, batch: int, size: list[int]) -> Tensor:
        """Returns the state that None stands for, (B, 1, C, *S) in x's dtype: 1/2, or h0 where it is learned."""
        shape = [batch, 1, self.size] + size
        h0 = self.h0
        return x.new_full(shape, 0.5) if h0 is None else h0.expand(shape).to(x.dtype)

    if TYPE_CHECKING:
        forward: Any  # a layer's, below, takes other arguments
    else:

        def forward(
            self, frames: Tensor, x: Tensor, h: Tensor | None, i: int, codes: Tensor | None, resets: bool
        ) -> tuple[Tensor, Tensor]:
            return self.recur(frames, x, h, i, codes, resets)

    def recur(
        self, frames: Tensor, x: Tensor, h: Tensor | None, i: int, codes: Tensor | None, resets: bool
    ) -> tuple[Tensor, Tensor]:
        """Runs over the frames of x, (B, T) or (T, B) of them in one dimension; returns x's output, and the last state."""
        gate_hidden = self.gate_hidden(frames)
        if self.lstm:
            gate_hidden = gates_of_lstm(gate_hidden)
        gate_hidden = gate_hidden.unflatten(0, x.shape[:2])
        if not self.batch_first:
            gate_hidden = gate_hidden.transpose(0, 1)
        if self.backwards:
            gate_hidden = gate_hidden.flip(1)
        h0 = self.h0
        if h0 is not None and h is None:
            h = self.initial_state(gate_hidden, gate_hidden.shape[0], list(gate_hidden.shape[3:]))
        if h0 is not None and h is not None and resets:
            # The scan begins anew at 1/2. It is linear in the state: what h0 has beyond that decays beside it; in float32,
            # for where h0 is small the two cancel.
            dtype = torch.promote_types(gate_hidden.dtype, torch.float32)
            precise = gate_hidden.to(dtype)
            gate = precise[:, :, : self.size]
            nothing = torch.full_like(gate, -1e4)  # g of it is zero
            out, h_n = scan(precise, h.to(dtype), i, codes)
            decay, decay_n = scan(torch.cat((gate, nothing), 2), torch.zeros_like(h_n), i, codes)
            beyond = 2.0 * h0.to(dtype) - 1.0
            out, h_n = (out + decay * beyond).to(gate_hidden.dtype), (h_n + decay_n * beyond).to(h.dtype)
        else:
            out, h_n = scan(gate_hidden, h, i, codes)
        if self.backwards:
            out = out.flip(1)
        if not self.batch_first:
            out = out.transpose(0, 1)
        if self.out_proj is not None:
            out = self.out_proj(out.flatten(0, 1)).unflatten(0, x.shape[:2])
        return out, h_n


class MinGRULayer(MinGRUDirection):
    """A direction over norm(x), a second one beside it where bidirectional, plus res_align(x) if there is one."""

    normalises: Final[bool]

    def __init__(
        self, *sizes: Any, norm: nn.Module, res_align: nn.Module | None, bidirectional: bool, **options: Any
    ) -> None:
        super().__init__(*sizes, backwards=False, norm=norm, **options)
        self.reverse = MinGRUDirection(*sizes, backwards=True, **options) if bidirectional else None
        self.res_align = res_align
        self.normalises = not isinstance(norm, nn.Identity)

    def forward(
        self,
        x: Tensor,
        h: list[Tensor] | None,
        i: int,
        codes: Tensor | None,
        codes_back: Tensor | None,
        resets: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs over (B, T, channels, *S) from the states ``h`` of its directions, the i-th and the next of the stack."""
        if not self.batch_first:
            x = x.transpose(0, 1)
        if i == 0 and not torch.jit.is_scripting():
            check_read(x, self.gate_hidden)
        frames = x.flatten(0, 1)
        read = self.norm(norm_input(frames) if self.normalises else frames)
        out, h_n = self.recur(read, x, None if h is None else h[i], i, codes, resets)
        states = [h_n]
        if self.reverse is not None:
            back, h_n = self.reverse(read, x, None if h is None else h[i + 1], i + 1, codes_back, resets)
            out = torch.cat((out, back), 2)
            states.append(h_n)
        if self.res_align is not None:
            # Added frame by frame: the sum of two (B, T, ...) views would tie torch.export to one T.
            out = (out.flatten(0, 1) + self.res_align(frames)).unflatten(0, x.shape[:2])
        return out if self.batch_first else out.transpose(0, 1), states
