"""minGRU: a linear projection per time step and the scan over time; one layer, or several stacked."""

import itertools
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from convrnn.ops._check import check_mask
from convrnn.ops._codes import encode
from convrnn.ops.mingru import coded_mingru

from ._checks import as_int, as_probability, as_sizes, check_sequence, check_shape, check_states
from ._masks import blank, live_frames, run_packed

__all__ = ["MinGRU", "MinGRUCell"]


def scan(gate_hidden: Tensor, h: Tensor | None, i: int, codes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs minGRU over (B, T, 2C, *S) from the state h (B, 1, C, *S) of layer i; None is the 'zero' state."""
    if h is not None:
        shape = list(gate_hidden.shape)
        check_shape(f"h[{i}]", h, [shape[0], 1, shape[2] // 2] + shape[3:])
        h = h.squeeze(1)
    out, h_n = coded_mingru(gate_hidden, h, codes)
    return out, h_n.unsqueeze(1)


def zero_states(x: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    """Returns g(0) = 1/2 in (B, 1, *shape) for each shape."""
    states: list[Tensor] = []
    for shape in shapes:
        states.append(x.new_full([x.shape[0], 1] + shape, 0.5))
    return states


class MinGRULayer(nn.Module):
    """out = mingru(gate_hidden(norm(x))), plus res_align(x) if there is one; each module sees one frame at a time."""

    def __init__(self, norm: nn.Module, gate_hidden: nn.Module, res_align: nn.Module | None) -> None:
        super().__init__()
        self.norm = norm
        self.gate_hidden = gate_hidden
        self.res_align = res_align

    def forward(self, x: Tensor, h: Tensor | None, i: int, codes: Tensor | None) -> tuple[Tensor, Tensor]:
        frames = x.flatten(0, 1)
        out, h_n = scan(self.gate_hidden(self.norm(frames)).unflatten(0, x.shape[:2]), h, i, codes)
        if self.res_align is not None:
            # Added frame by frame: the sum of two (B, T, ...) views would tie torch.export to one T.
            out = (out.flatten(0, 1) + self.res_align(frames)).unflatten(0, x.shape[:2])
        return out, h_n


class MinGRUBase(nn.Module):
    """What layers and cells of the family do with frames, lengths and resets around ``run``, their pass over a sequence."""

    layer_sizes: Final[tuple[int, ...]]
    num_layers: Final[int]
    if TYPE_CHECKING:
        run: Any

    def __init__(self, layout: str, sizes: list[int]) -> None:
        super().__init__()
        self.layout = layout
        self.layer_sizes = tuple(sizes)
        self.num_layers = len(sizes) - 1

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs every layer over the whole sequence, or over one frame.

        With ``lengths``, what lies behind a row's end has no influence: not on the outputs before it, not on the states
        returned, not on gradients. With ``reset``, nothing before the frame has influence on what follows it.

        Args:
            x: sequence (B, S, input_size), over images (B, S, input_size, H, W), or one frame of it, without S; float.
                A PackedSequence of such frames gives a PackedSequence.
            h: initial state of each layer, a list of (B, 1, hidden_i), over images (B, 1, hidden_i, H_i, W_i); None for
                the 'zero' state g(0) = 1/2.
            lengths: (B,) integers, frames of each row; values outside of 0..S act as the nearest of them.
            reset: (B, S) bool, for one frame (B,), True where the state becomes the 'zero' state before the frame is
                read.

        Returns:
            out: output of the last layer, (B, S, hidden) or (B, S, hidden, H', W'), without S for one frame; zero
                behind a row's end.
            h_n: state of each layer after the last frame of each row, before its residual is added, shaped as ``h``.

        Raises:
            TypeError: an argument is no Tensor, ``h`` no list of them, or the dtype of a mask does not fit.
            ValueError: a shape, the number of states or a mask's device does not fit, or a PackedSequence has
                ``lengths`` beside it.
        """
        if not torch.jit.is_scripting() and isinstance(x, PackedSequence):
            return run_packed(self, x, h, lengths, reset)
        frame = check_sequence(x, self.layout, self.layer_sizes[0])
        if frame:
            x = x.unsqueeze(1)
            if isinstance(reset, Tensor):
                reset = reset.unsqueeze(1)
        check_states(h, self.num_layers)
        check_mask("lengths", lengths, [x.shape[0]], False, "x", x)
        check_mask("reset", reset, list(x.shape[:2]), True, "x", x)
        live: Tensor | None = None
        hold: Tensor | None = None
        if lengths is not None:
            live = live_frames(lengths, x)
            hold = ~live
            x = blank(x, live)
            if reset is not None:
                reset = reset & live
        out, states = self.run(x, h, encode(reset, hold))
        if live is not None:
            out = blank(out, live)
        if frame:
            out = out.squeeze(1)
        return out, states

    def step(
        self, x: Tensor, h: list[Tensor] | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one frame, (B, input_size) or (B, input_size, H, W); what :meth:`forward` does with it, and refuses a clip.

        Raises:
            ValueError: ``x`` is a sequence.
        """
        if isinstance(x, Tensor) and x.dim() != self.layout.count(","):
            raise ValueError(f"x must be one frame {self.layout.replace('S, ', '')}, got shape {list(x.shape)}")
        return self(x, h, reset=reset)


class MinGRUStack(MinGRUBase):
    """Layer after layer, dropout between them: what MinGRU and MinConv2dGRU have in common."""

    hidden_sizes: list[int]

    def __init__(self, layout: str, sizes: list[int], layers: list[MinGRULayer], dropout: float) -> None:
        super().__init__(layout, sizes)
        self.hidden_sizes = sizes[1:]
        self.dropout = dropout
        self.layers = nn.ModuleList(layers)

    def run(self, x: Tensor, h: list[Tensor] | None, codes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        states: list[Tensor] = []
        out = x
        for i, layer in enumerate(self.layers):
            if i > 0:
                out = F.dropout(out, self.dropout, self.training)
            out, state = layer(out, None if h is None else h[i], i, codes)
            states.append(state)
        return out, states

    def extra_repr(self) -> str:
        residual = any(layer.res_align is not None for layer in self.layers)
        return f"{self.layer_sizes[0]}, hidden_sizes={self.hidden_sizes}, dropout={self.dropout}, residual={residual}"


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
        self.to_gate_hidden = nn.Linear(
            self.layer_sizes[0], 2 * self.layer_sizes[1], bias=bias, device=device, dtype=dtype
        )

    def run(self, x: Tensor, h: list[Tensor] | None, codes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        out, h_n = scan(self.to_gate_hidden(x), None if h is None else h[0], 0, codes)
        return out, [h_n]

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the state that ``h=None`` stands for: [1/2 in (B, 1, hidden_size)], of x's dtype and device."""
        check_sequence(x, self.layout, self.layer_sizes[0])
        return zero_states(x, [[self.layer_sizes[1]]])


class MinGRU(MinGRUStack):
    """Stacked minGRU: z = s(gate), h' = (1-z).h + z.g(hidden) in each layer, its output the next layer's input.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. A layer projects its (normalised) input to [gate, hidden], scans, and adds its residual.

    Args:
        input_size: features of a step.
        hidden_sizes: features of each layer's state, an int for one layer.
        bias: learn the projections' biases.
        norm: LayerNorm on each layer's input.
        dropout: probability of zeroing an element of a layer's output, the last layer's excepted, while training.
        residual: add each layer's input to its output, through a Linear without bias where their sizes differ.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: a size is no int, or ``dropout`` no number.
        ValueError: a size is not positive, ``hidden_sizes`` is empty, or ``dropout`` lies outside [0, 1].

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201.

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
        norm: bool = False,
        dropout: float = 0.0,
        residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), *as_sizes("hidden_sizes", hidden_sizes)]

        def layer(size_in: int, size_out: int) -> MinGRULayer:
            res_align: nn.Module | None = None
            if residual and size_in == size_out:
                res_align = nn.Identity()
            elif residual:
                res_align = nn.Linear(size_in, size_out, bias=False, device=device, dtype=dtype)
            return MinGRULayer(
                nn.LayerNorm(size_in, device=device, dtype=dtype) if norm else nn.Identity(),
                nn.Linear(size_in, 2 * size_out, bias=bias, device=device, dtype=dtype),
                res_align,
            )

        layers = [layer(*pair) for pair in itertools.pairwise(sizes)]
        super().__init__("(B, S, input_size)", sizes, layers, as_probability("dropout", dropout))

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the states that ``h=None`` stands for: 1/2 in (B, 1, hidden_i), of x's dtype and device."""
        check_sequence(x, self.layout, self.layer_sizes[0])
        return zero_states(x, [[size] for size in self.hidden_sizes])
