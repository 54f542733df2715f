"""One minGRU or minLSTM layer in one direction or both: what the stacks of vectors and of images are made of."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn.ops._check import autocast_is_on, check_floating, check_same_dtype

from ._cell import Cell, check_state
from ._convolution import Convolution, make_projection
from ._masks import Masks
from ._options import MinGRUOptions
from ._parts import fill_gate_bias, flatten_frames, reset_parameters, unflatten_frames
from ._recurrent import State
from ._stack import Layer


def scan(gate_hidden: Tensor, h: list[State] | None, i: int, flags: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs minGRU over (B, T, 2C, *S) from the i-th state (B, 1, C, *S); None is the 'zero' state."""
    state: Tensor | None = None
    if h is not None:
        state, shape = h[i], list(gate_hidden.shape)
        if not isinstance(state, Tensor):
            raise TypeError(f"h[{i}] must be a Tensor, got {type(state).__name__}")
        check_state(f"h[{i}]", state, [shape[0], 1, shape[2] // 2] + shape[3:], gate_hidden)
        state = state.squeeze(1)
    out, h_n = torch.ops.convrnn.mingru(gate_hidden, state, flags)
    return out, h_n.unsqueeze(1)


def gates_of_lstm(forget_input_hidden: Tensor) -> Tensor:
    """Returns [gate, hidden] of the minGRU whose z is minLSTM's i/(f+i), from the packed f, i, hidden (N, 3C, *S)."""
    forget, take, hidden = forget_input_hidden.chunk(3, 1)
    gate = F.logsigmoid(take) - F.logsigmoid(forget)
    return torch.cat((gate.to(hidden.dtype), hidden), 1)


def check_read(x: Tensor, reader: nn.Module) -> None:
    """TypeError unless x has the dtype of the weight that reads it, or autocast is on. What has none takes any."""
    weight = getattr(reader, "weight", x)
    if isinstance(weight, Tensor) and weight.dtype != x.dtype and weight.is_floating_point():
        check_floating("x", x)
        if not autocast_is_on(x.device.type):
            check_same_dtype("x", x, "the parameters", weight)


class MinGRUDirection(Cell):
    """h' = (1-z).h + z.g(hidden) with [gate, hidden] = gate_hidden(x), or minLSTM's, in one direction of time."""

    if TYPE_CHECKING:  # torch.jit.trace would record an annotated parameter as an Optional, which has no shape
        h0: Tensor | None
        gate_hidden: Any

    def __init__(
        self,
        size_in: int,
        size_out: int,
        convolution: Convolution | None,
        options: MinGRUOptions,
        *,
        lstm: bool,
        time_first: bool,
        backwards: bool = False,
        norm: nn.Module | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        if norm is not None:
            self.norm = norm  # first: the order of parameters is that of optimizers' checkpoints
        ones = () if convolution is None else tuple(1 for _ in convolution.kernel)
        pixel = None if convolution is None else Convolution(ones, ones, dilation=ones)
        self.size = size = options.state_channels(size_out)
        self.lstm, self.time_first, self.backwards = lstm, time_first, backwards
        self.gate_bias, self.chrono_max = options.gate_bias, options.chrono_max
        self.gate_hidden = make_projection(convolution, size_in, size, 3 if lstm else 2, options.bias, **factory)
        projects = options.out_proj or size != size_out
        self.out_proj = make_projection(pixel, size, size_out, 1, False, **factory) if projects else None
        self.register_parameter("h0", nn.Parameter(torch.empty(size, *ones, **factory)) if options.learn_h0 else None)
        self.reset_own()

    def reset_own(self) -> None:
        """Initialises what the projections do not by themselves."""
        if self.h0 is not None:
            nn.init.constant_(self.h0, 0.5)
        bias = self.gate_hidden.bias
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

    def state_size(self, size: list[int]) -> list[int]:
        return self.gate_hidden.size(size) if hasattr(self.gate_hidden, "size") else size  # a convolution has one

    def initial_state(self, x: Tensor, batch: int, size: list[int]) -> State:
        """Returns (B, 1, C, *S) in x's dtype: 1/2, or h0 where it is learned."""
        shape = [batch, 1, self.size] + size
        h0 = self.h0
        return x.new_full(shape, 0.5) if h0 is None else h0.expand(shape).to(x.dtype)

    def project(self, frames: Tensor, masks: Masks) -> Tensor:
        gate_hidden = self.gate_hidden(frames)
        return gates_of_lstm(gate_hidden) if self.lstm else gate_hidden

    def scan(self, projection: Tensor, h: list[State] | None, i: int, masks: Masks) -> tuple[Tensor, State]:
        h0 = self.h0
        if h0 is not None and h is None:
            h, i = [self.initial_state(projection, projection.shape[0], list(projection.shape[3:]))], 0
        if h0 is not None and h is not None and masks.reset is not None:
            # The scan begins anew at 1/2. It is linear in the state: what h0 has beyond that decays beside it; in float32,
            # for where h0 is small the two cancel.
            dtype = torch.promote_types(projection.dtype, torch.float32)
            precise = projection.to(dtype)
            gate = precise[:, :, : self.size]
            nothing = torch.full_like(gate, -1e4)  # g of it is zero
            out, h_n = scan(precise, [state.to(dtype) for state in h], i, masks.flags)
            decay, decay_n = scan(torch.cat((gate, nothing), 2), [torch.zeros_like(h_n)], 0, masks.flags)
            h0_offset = 2.0 * h0.to(dtype) - 1.0
            out, h_n = (out + decay * h0_offset).to(projection.dtype), (h_n + decay_n * h0_offset).to(h[i].dtype)
        else:
            out, h_n = scan(projection, h, i, masks.flags)
        if self.out_proj is not None:
            out = unflatten_frames(self.out_proj(flatten_frames(out, self.time_first)), out, self.time_first)
        return out, h_n


class MinGRULayer(Layer, MinGRUDirection):
    """A direction over norm(x), a second one beside it where bidirectional, plus res_align(x) if there is one."""

    if TYPE_CHECKING:
        forward: Any  # Layer's, whose arguments are others than a cell's

    def __init__(
        self, *parts: Any, norm: nn.Module, res_align: nn.Module | None, bidirectional: bool, **options: Any
    ) -> None:
        super().__init__(*parts, norm=norm, **options)
        self.reverse = MinGRUDirection(*parts, backwards=True, **options) if bidirectional else None
        self.res_align = res_align
        self.normalises = not isinstance(norm, nn.Identity)
