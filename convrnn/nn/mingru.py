"""minGRU and minLSTM, one layer or several stacked; what every layer of the family does around its scan."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn.ops._codes import encode

from ._checks import (
    as_bool,
    as_gate_bias,
    as_int,
    as_positive,
    as_probability,
    as_sizes,
    check_sequence,
    check_states,
)
from ._convolution import Convolution
from ._inputs import check_step, run_other
from ._masks import blank, read_masks, resets_before
from ._mingru_layer import MinGRULayer, check_read, projection, scan
from ._parts import Norm, described, make_feature_norm, make_norm

__all__ = ["MinGRU", "MinGRUCell", "MinLSTM"]


def state_size(size: int, expand: float) -> int:
    """Features of the state where the output has ``size``."""
    return max(1, int(as_positive("expand", expand) * size + 1e-9))  # 0.29 * 100 is 29


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
        if not torch.jit.is_scripting() and not isinstance(x, Tensor):
            found = run_other(self, MinGRUBase.forward, x, h, lengths, reset, self.batch_first)
            if found is not None:
                return found
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
        check_step(x)
        if isinstance(x, Tensor) and x.dim() != self.layout.count(","):
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
        out_proj: bool,
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
        self.out_proj = as_bool("out_proj", out_proj)
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
                out_proj=out_proj,
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
            features to a Module. A layer can be pickled whole where the callable can, which a lambda cannot.
        dropout: probability of zeroing an element of a layer's output, the last layer's excepted, while training.
        residual: add each layer's input to its output, through a Linear without bias where their sizes differ.
        expand: features of the state for each of the output, rounded down and at least 1; a Linear without bias brings them back.
        out_proj: have that Linear where the numbers of features agree, too.
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
        out_proj: bool = False,
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
            out_proj=out_proj,
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
