"""One layer of a stack: out = [a cell for each direction of time](norm(x)) + res_align(x)."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._cell import copy_state
from ._masks import Masks
from ._parts import flatten_frames, norm_input, unflatten_frames
from ._recurrent import State


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
        state_size: Any
        initial_state: Any

    if TYPE_CHECKING:

        def run_direction(
            self, frames: Tensor, x: Tensor, h: list[State] | None, i: int, masks: Masks
        ) -> tuple[Tensor, State]: ...

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
