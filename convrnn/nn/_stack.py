"""A layer, out = [a cell for each direction of time](norm(x)) + res_align(x), and convolutional ones one after another."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn.ops._check import autocast_is_on, check_same_dtype

from ._cell import Cell, copy_state
from ._checks import check_clip
from ._convolution import make_res_align, read_convolutions
from ._masks import Masks, reverse_masks
from ._options import StackOptions, options_of, set_options
from ._parts import flatten_frames, make_norm, norm_input, reset_parameters, unflatten_frames
from ._recurrent import RecurrentLists, State


class Layer:
    """The pass of one layer over all frames, over parts that a subclass has as attributes. Scriptable.

    With ``time_first`` x is a transposed view of a clip (T, B, ...), whose frames are read in the order of memory.
    """

    if TYPE_CHECKING:  # annotations at run time would hide the constants of a base class from TorchScript
        time_first: bool
        normalises: bool
        norm: Any
        reverse: Any
        res_align: Any
        run_direction: Any
        state_size: Any
        initial_state: Any

    def forward(
        self, x: Tensor, h: list[State] | None, i: int, masks: Masks, back: Masks
    ) -> tuple[Tensor, list[State]]:
        """Runs over x (B, T, C, *S) from the i-th state on; ``back`` are the masks of the direction from the end."""
        frames = (x.transpose(0, 1) if self.time_first else x).flatten(0, 1)
        read = self.norm(norm_input(frames) if self.normalises else frames)
        out, h_n = self.run_direction(read, x, h, i, masks)
        states = [h_n]
        if self.reverse is not None:
            other, h_n = self.reverse(x, h, i + 1, back, read)
            out = torch.cat((out, other), 2)
            states.append(h_n)
        if self.res_align is not None:
            # Added frame by frame: the sum of two (B, T, ...) views would tie torch.export to one T.
            out = flatten_frames(out, self.time_first) + self.res_align(frames)
            out = unflatten_frames(out, x, self.time_first)
        return out, states

    def initial_states(self, x: Tensor, batch: int, size: list[int]) -> tuple[list[State], list[int]]:
        """Returns the states of both directions that None stands for, in x's dtype, and the size of their frames."""
        size = self.state_size(size)
        states = [copy_state(self.initial_state(x, batch, size), x)]
        if self.reverse is not None:
            states.append(copy_state(self.reverse.initial_state(x, batch, size), x))
        return states, size


class StackLayer(Layer):
    """A layer whose parts stand in lists of the stack's own, by which its checkpoints name them."""

    time_first = False

    def __init__(self, cell: Any, reverse: Any, norm: nn.Module, res_align: nn.Module | None) -> None:
        self.cell, self.state_size, self.initial_state = cell, cell.state_size, cell.initial_state
        self.reverse, self.norm, self.res_align = reverse, norm, res_align
        self.normalises = not isinstance(norm, nn.Identity)

    def run_direction(
        self, frames: Tensor, x: Tensor, h: list[State] | None, i: int, masks: Masks
    ) -> tuple[Tensor, State]:
        out, h_n = self.cell(x, h, i, masks, frames)
        return out, h_n


class ConvStack(RecurrentLists):
    """A stack of convolutional cells, over one to three spatial dimensions.

    Its states are those of the layers, of both directions where bidirectional. The constructor of a subclass says which
    cells it is made of.
    """

    spatial_dims: ClassVar[int] = 2
    dropout: float
    residual: bool

    def __init__(
        self,
        sizes: list[int],
        arguments: dict[str, Any],
        make_cell: Callable[..., Cell],
        options: Any,
        ending: str = "s",
    ) -> None:
        """Reads the options around the cells, and the convolutions, from the ``locals()`` of a constructor.

        Args:
            sizes: channels of the input and of each layer's state.
            arguments: of the constructor.
            make_cell: (channels, state's channels, input's convolution, state's convolution, options) -> a cell.
            options: a dataclass, of the cells.
            ending: of the arguments' names, "" for those of a single layer.
        """
        super().__init__()
        around = options_of(StackOptions, arguments)
        set_options(self, around, options)
        self.input_size, self.hidden_sizes, self.num_layers = sizes[0], sizes[1:], len(sizes) - 1
        self.set_interface(
            f"x must be one frame (B, {sizes[0]}, *S)",
            self.spatial_dims + 2,
            around.directions * self.num_layers,
            around.batch_first,
            around.bidirectional,
        )
        channels = list(zip([sizes[0], *(around.directions * size for size in sizes[1:-1])], sizes[1:], strict=True))
        inputs = read_convolutions(self, channels, arguments, ending)
        recurrents = read_convolutions(self, [(size, size) for size in sizes[1:]], arguments, ending, "recurrent_")
        factory = {"device": arguments["device"], "dtype": arguments["dtype"]}
        self.layers, self.backward_layers = nn.ModuleList(), nn.ModuleList()
        self.norms, self.res_aligns = nn.ModuleList(), nn.ModuleList()
        for (size_in, size), conv, recurrent in zip(channels, inputs, recurrents, strict=True):
            for cells in (self.layers, self.backward_layers)[: around.directions]:
                backwards = cells is self.backward_layers
                cells.append(make_cell(size_in, size, conv, recurrent, options, backwards=backwards, **factory))
            self.norms.append(make_norm("norm", around.norm, size_in, **factory) or nn.Identity())
            if around.residual:
                self.res_aligns.append(make_res_align(conv, size_in, around.directions * size, **factory))

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        reset_parameters(self.children())

    def stacked(self) -> list[StackLayer]:
        """Returns the layers, each with its parts."""
        none = [None] * self.num_layers
        reverses = self.backward_layers if self.bidirectional else none
        res_aligns = self.res_aligns if self.residual else none
        return [StackLayer(*parts) for parts in zip(self.layers, reverses, self.norms, res_aligns, strict=True)]

    def is_frame(self, x: Tensor) -> bool:
        frame = check_clip(x, self.spatial_dims, self.input_size, self.batch_first)
        if not autocast_is_on(x.device.type):
            first: Any = self.layers[0]
            check_same_dtype("x", x, "the parameters", first.W)
        return frame

    def run(self, x: Tensor, h: list[State] | None, masks: Masks) -> tuple[Tensor, list[State]]:
        back = reverse_masks(masks) if self.bidirectional else masks
        states: list[State] = []
        for i, layer in enumerate(self.stacked()):
            if i > 0 and self.training:
                x = F.dropout(x, self.dropout)
            x, last = layer.forward(x, h, len(states), masks, back)
            states += last
        return x, states

    def init_hidden_state(self, x: Tensor) -> list[State]:
        """Returns the states that ``h=None`` stands for, of the dtype and device of x, a clip or a frame."""
        frame = check_clip(x, self.spatial_dims, self.input_size, self.batch_first)
        batch, size = x.shape[0 if frame or self.batch_first else 1], list(x.shape[-self.spatial_dims :])
        states: list[State] = []
        for layer in self.stacked():
            last, size = layer.initial_states(x, batch, size)
            states += last
        return states
