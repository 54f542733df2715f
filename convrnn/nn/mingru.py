"""minGRU and minLSTM: a projection of each step and the scan over time; one layer, or several stacked."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from convrnn.ops._check import autocast_is_on, check_floating, check_same_device, check_same_dtype
from convrnn.ops._codes import encode

from ._checks import (
    as_bool,
    as_gate_bias,
    as_int,
    as_positive,
    as_probability,
    as_sizes,
    check_sequence,
    check_shape,
    check_states,
)
from ._convolution import Conv, Convolution
from ._masks import blank, read_masks, resets_before, run_packed
from ._parts import Norm, described, fill_gate_bias, make_feature_norm, make_norm, reset_parameters

__all__ = ["MinGRU", "MinGRUCell", "MinLSTM"]


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


def state_size(size: int, expand: float) -> int:
    """Features of the state where the output has ``size``."""
    return max(1, int(as_positive("expand", expand) * size + 1e-9))  # 0.29 * 100 is 29


def check_read(x: Tensor, reader: nn.Module) -> None:
    """TypeError unless x has the dtype of the weight that reads it, or autocast is on. What has none takes any."""
    weight = getattr(reader, "weight", x)
    if isinstance(weight, Tensor) and weight.dtype != x.dtype and weight.is_floating_point():
        check_floating("x", x)
        if not autocast_is_on(x.device.type):
            check_same_dtype("x", x, "the parameters", weight)


class MinGRUDirection(nn.Module):
    """h' = (1-z).h + z.g(hidden) with [gate, hidden] = gate_hidden(x), or minLSTM's, in one direction of time."""

    h0: Tensor | None
    lstm: Final[bool]
    batch_first: Final[bool]
    backwards: Final[bool]

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
        self.out_proj = None if size == size_out else projection(pixel, size, size_out, 1, False, **factory)
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

    def __init__(
        self, *sizes: Any, norm: nn.Module, res_align: nn.Module | None, bidirectional: bool, **options: Any
    ) -> None:
        super().__init__(*sizes, backwards=False, norm=norm, **options)
        self.reverse = MinGRUDirection(*sizes, backwards=True, **options) if bidirectional else None
        self.res_align = res_align

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
        read = self.norm(frames)
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


class MinGRUBase(nn.Module):
    """What layers and cells of the family do with frames, lengths and resets around ``run``, their pass over a sequence."""

    layer_sizes: Final[tuple[int, ...]]
    num_layers: Final[int]
    num_states: Final[int]
    batch_first: Final[bool]
    bidirectional: Final[bool]
    if TYPE_CHECKING:
        run: Any

    def __init__(self, layout: str, sizes: list[int], batch_first: bool = True, bidirectional: bool = False) -> None:
        super().__init__()
        self.layout = layout if batch_first else layout.replace("(B, S,", "(S, B,")
        self.input_size, self.layer_sizes = sizes[0], tuple(sizes)
        self.num_layers = len(sizes) - 1
        self.num_states = (2 if bidirectional else 1) * self.num_layers
        self.batch_first, self.bidirectional = batch_first, bidirectional

    def extra_repr(self) -> str:
        return described(self)

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs every layer over the whole sequence, or over one frame.

        With ``lengths``, what lies behind a row's end has no influence: not on the outputs before it, not on the states
        returned, not on gradients. With ``reset``, nothing before the frame has influence on what follows it; the
        backward direction begins anew on the other side of the cut.

        Args:
            x: sequence (B, S, input_size), over images (B, S, input_size, *S), or (S, B, ...) without ``batch_first``,
                or one frame of it, without S; float. A PackedSequence of such frames gives a PackedSequence.
            h: initial states, a list of (B, 1, state_i), over images (B, 1, state_i, *S_i): one a layer, when
                bidirectional two a layer, forward first. None for the initial state: g(0) = 1/2, or the learned one.
            lengths: (B,) integers, frames of each row; values outside of 0..S act as the nearest of them.
            reset: bool of the shape of x's first two dimensions (B for one frame), True where the state becomes the
                initial one before the frame is read.

        Returns:
            out: output of the last layer, (B, S, hidden), (B, S, hidden, *S') or as x has it; zero behind a row's end.
            h_n: states after the last frame of each row, before the residual is added, shaped as ``h``.

        Raises:
            TypeError: an argument is no Tensor, ``h`` no list of them, or a dtype does not fit.
            ValueError: a shape, the number of states or a mask's device does not fit, or a PackedSequence has
                ``lengths`` beside it.
        """
        if not torch.jit.is_scripting() and isinstance(x, PackedSequence):
            return run_packed(self, x, h, lengths, reset, self.batch_first)
        frame = check_sequence(x, self.layout, self.input_size)
        if frame:
            x = x.unsqueeze(1)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        check_states(h, self.num_states)
        if h is not None:
            for i, state in enumerate(h):
                if not isinstance(state, Tensor):
                    raise TypeError(f"h[{i}] must be a Tensor, got {type(state).__name__}")
        live, reset = read_masks(x, frame, self.batch_first, lengths, reset)
        hold: Tensor | None = None
        if live is not None:
            hold = ~live
            x = blank(x, live)
        codes = encode(reset, hold)
        codes_back: Tensor | None = None
        if self.bidirectional:
            codes_back = encode(
                None if reset is None else resets_before(reset).flip(1), None if hold is None else hold.flip(1)
            )
        out, states = self.run(x, h, codes, codes_back, reset is not None)
        if live is not None:
            out = blank(out, live)
        if frame:
            out = out.squeeze(1)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, states

    def step(
        self, x: Tensor, h: list[Tensor] | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one frame, (B, input_size) or (B, input_size, *S); what :meth:`forward` does with it, and refuses a clip.

        Raises:
            ValueError: ``x`` is a sequence, or the layer bidirectional: what comes later is not there yet.
        """
        if self.bidirectional:
            raise ValueError("step must be called on a layer of one direction, got bidirectional=True")
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        if x.dim() != self.layout.count(","):
            raise ValueError(f"x must be one frame {self.layout.replace('S, ', '', 1)}, got shape {list(x.shape)}")
        return self(x, h, reset=reset)


class MinGRUStack(MinGRUBase):
    """Layer after layer, dropout between them: what the stacks of both kinds of projection have in common."""

    hidden_sizes: list[int]
    lstm: ClassVar[bool] = False
    if TYPE_CHECKING:  # at run time a ModuleList, which TorchScript takes without an annotation
        layers: Any

    def __init__(
        self,
        layout: str,
        sizes: list[int],
        convolutions: list[Convolution] | None,
        *,
        bias: bool,
        norm: Norm,
        dropout: float,
        residual: bool,
        expand: float,
        gate_bias: float | str | None,
        chrono_max: int | None,
        learn_h0: bool,
        bidirectional: bool,
        batch_first: bool,
        **factory: Any,
    ) -> None:
        super().__init__(layout, sizes, as_bool("batch_first", batch_first), as_bool("bidirectional", bidirectional))
        self.residual, self.bias = as_bool("residual", residual), as_bool("bias", bias)
        start, self.chrono_max = as_gate_bias(0.0 if gate_bias is None else gate_bias, chrono_max, bias)
        self.gate_bias, self.learn_h0 = None if gate_bias is None else start, as_bool("learn_h0", learn_h0)
        self.norm, self.expand = norm, as_positive("expand", expand)
        self.hidden_sizes = sizes[1:]
        self.dropout = as_probability("dropout", dropout)
        self.layers = nn.ModuleList()
        directions = 2 if bidirectional else 1
        for i, size in enumerate(self.hidden_sizes):
            size_in = sizes[0] if i == 0 else directions * sizes[i]
            convolution = None if convolutions is None else convolutions[i]
            make = make_feature_norm if convolution is None else make_norm
            res_align: nn.Module | None = None
            if residual and size_in == directions * size and (convolution is None or convolution.keeps_size):
                res_align = nn.Identity()
            elif residual:
                plain = None if convolution is None else replace(convolution, groups=1, separable=False)
                res_align = projection(plain, size_in, directions * size, 1, False, **factory)
            layer = MinGRULayer(
                size_in,
                state_size(size, expand),
                size,
                convolution,
                norm=make("norm", norm, size_in, **factory) or nn.Identity(),
                res_align=res_align,
                bidirectional=bidirectional,
                batch_first=batch_first,
                lstm=self.lstm,
                bias=bias,
                gate_bias=self.gate_bias,
                chrono_max=self.chrono_max,
                learn_h0=learn_h0,
                **factory,
            )
            self.layers.append(layer)

    def run(
        self, x: Tensor, h: list[Tensor] | None, codes: Tensor | None, codes_back: Tensor | None, resets: bool
    ) -> tuple[Tensor, list[Tensor]]:
        states: list[Tensor] = []
        out = x
        for i, layer in enumerate(self.layers):
            if i > 0 and self.training:
                out = F.dropout(out, self.dropout, self.training)
            out, last = layer(out, h, len(states), codes, codes_back, resets)
            states += last
        return out, states

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the states that ``h=None`` stands for, of x's dtype and device: 1/2, or those learned."""
        frame = check_sequence(x, self.layout, self.input_size)
        batch = x.shape[0] if frame or self.batch_first else x.shape[1]
        size = list(x.shape[2:]) if frame else list(x.shape[3:])
        states: list[Tensor] = []
        for layer in self.layers:
            if hasattr(layer.gate_hidden, "size"):  # the one of a convolution
                size = layer.gate_hidden.size(size)
            states.append(layer.initial_state(x, batch, size).clone())  # not a view of what is learned
            if layer.reverse is not None:
                states.append(layer.reverse.initial_state(x, batch, size).clone())
        return states

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        for layer in self.layers:
            layer.reset_parameters()


class MinGRUCell(MinGRUBase):
    """z = s(gate), h' = (1-z).h + z.g(hidden) with [gate, hidden] = Linear(x): one minGRU layer over a sequence.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. The gate is the first half of the output of ``to_gate_hidden``, 2*hidden_size features.

    Args:
        input_size: features of a step.
        hidden_size: features of the state and of the output.
        bias: learn the projection's bias.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is not positive.

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201.

    Example:
        >>> import torch, convrnn
        >>> cell = convrnn.MinGRUCell(3, 8)
        >>> out, h = cell(torch.rand(2, 5, 3))  # a whole sequence
        >>> out, h = cell(torch.rand(2, 1, 3), h)  # one step more
        >>> out.shape, h[0].shape
        (torch.Size([2, 1, 8]), torch.Size([2, 1, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), as_int("hidden_size", hidden_size, 1)]
        super().__init__("(B, S, input_size)", sizes)
        self.hidden_size, self.bias = sizes[1], as_bool("bias", bias)
        self.to_gate_hidden = nn.Linear(self.input_size, 2 * self.hidden_size, bias=bias, device=device, dtype=dtype)

    def run(
        self, x: Tensor, h: list[Tensor] | None, codes: Tensor | None, codes_back: Tensor | None, resets: bool
    ) -> tuple[Tensor, list[Tensor]]:
        if not torch.jit.is_scripting():
            check_read(x, self.to_gate_hidden)
        out, h_n = scan(self.to_gate_hidden(x), None if h is None else h[0], 0, codes)
        return out, [h_n]

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the state that ``h=None`` stands for: [1/2 in (B, 1, hidden_size)], of x's dtype and device."""
        check_sequence(x, self.layout, self.input_size)
        return [x.new_full([x.shape[0], 1, self.hidden_size], 0.5)]

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        self.to_gate_hidden.reset_parameters()


class MinGRU(MinGRUStack):
    """Stacked minGRU: z = s(gate), h' = (1-z).h + z.g(hidden) in each layer, its output the next layer's input.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. A layer projects its (normalised) input to [gate, hidden], scans, projects the state to
    its output where ``expand`` makes them differ, and adds its residual.

    Args:
        input_size: features of a step.
        hidden_sizes: features of each layer's output, an int for one layer.
        bias: learn the biases of the projections that the scan reads.
        norm: on each layer's input: None, True or 'layer' (LayerNorm), 'rms' (RMSNorm), or a callable from a number of
            features to a Module.
        dropout: probability of zeroing an element of a layer's output, the last layer's excepted, while training.
        residual: add each layer's input to its output, through a Linear without bias where their sizes differ.
        expand: features of the state for each of the output, rounded down and at least 1; a Linear without bias brings them back.
        gate_bias: initial bias of z, or 'chrono': minus the logarithm of uniform numbers in [1, chrono_max - 1]. None
            draws it as the other biases.
        chrono_max: the longest dependency expected, in steps, for 'chrono'.
        learn_h0: learn the state before the first step, one number a feature, which starts at 1/2. ``reset`` then takes a
            second scan.
        bidirectional: a second direction in each layer, with weights of its own, reads the sequence from its end; its
            output joins the other's over the features.
        batch_first: True for sequences (B, S, ...), False for (S, B, ...).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, ``hidden_sizes`` is empty, or arguments exclude one another.

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201; Tallec and Ollivier, arXiv 1804.11188 (chrono).

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.MinGRU(3, [8, 16], norm=True, residual=True)
        >>> out, h = rnn(torch.rand(2, 5, 3))
        >>> out.shape, [state.shape for state in h]
        (torch.Size([2, 5, 16]), [torch.Size([2, 1, 8]), torch.Size([2, 1, 16])])
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | list[int],
        *,
        bias: bool = True,
        norm: Norm = False,
        dropout: float = 0.0,
        residual: bool = False,
        expand: float = 1.0,
        gate_bias: float | str | None = None,
        chrono_max: int | None = None,
        learn_h0: bool = False,
        bidirectional: bool = False,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "(B, S, input_size)",
            [as_int("input_size", input_size, 1), *as_sizes("hidden_sizes", hidden_sizes)],
            None,
            bias=bias,
            norm=norm,
            dropout=dropout,
            residual=residual,
            expand=expand,
            gate_bias=gate_bias,
            chrono_max=chrono_max,
            learn_h0=learn_h0,
            bidirectional=bidirectional,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )


class MinLSTM(MinGRU):
    """Stacked minLSTM: f, i = s(Wx), h' = f/(f+i).h + i/(f+i).g(hidden) in each layer, with the arguments of MinGRU.

    s and g are those of :class:`MinGRU`, whose recurrence this is with z = i/(f+i), the logistic function of
    log i - log f. ``gate_hidden`` packs f, i and the candidate. ``gate_bias`` is the bias of i, and minus that of f.

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.MinLSTM(3, [8, 16], residual=True)
        >>> rnn(torch.rand(2, 5, 3))[0].shape
        torch.Size([2, 5, 16])
    """

    lstm: ClassVar[bool] = True
