"""What a user calls: a clip or a frame in either order of time, lengths and resets, as one pass over (B, T, ...).

The layers of this package have three parts, each written once:

- :class:`Recurrent` is the module a user calls. It turns its input into (B, T, ...), reads the masks, hides padding, calls
  ``run`` and turns the result back.
- ``Layer`` (``_stack.py``) is one layer of a stack: a norm, a cell for each direction of time, a residual.
- ``Cell`` (``_cell.py``) is one recurrence in one direction: ``project`` the input of all frames at once, then ``scan``
  the projection over time, by one op or, where no op covers the options, by ``time_loop``.

A state has the batch first. It is a Tensor, or a tuple of them such as LSTM's (h, c): masks, initial states and copies
take both. TorchScript compiles the minGRU family, whose states are Tensors.

A new recurrence is a subclass of ``Cell`` and one of a stack, whose constructor makes the cells.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ._checks import check_states
from ._inputs import check_step, run_other
from ._masks import NO_MASKS, Masks, mask_padding, read_masks
from ._parts import format_repr

if TYPE_CHECKING:
    State = Any  # a Tensor or a tuple of them
else:
    State = Tensor  # TorchScript reads annotations, and knows no other


# What two layers must have in common to be the directions of one Bidirectional.
INTERFACE = ("single_state", "num_states", "batch_first", "frame_dims", "takes_levels")


class Recurrent(nn.Module):
    """A layer over clips and frames; subclasses give ``is_frame`` and ``run``."""

    single_state: ClassVar[bool] = False  # a Tensor in the place of a list of states
    takes_levels: ClassVar[bool] = False  # a list of inputs
    scriptable: ClassVar[bool] = False  # by TorchScript
    if TYPE_CHECKING:  # annotations at run time would hide the constants of a base class from TorchScript
        batch_first: bool
        bidirectional: bool
        num_states: int
        frame_dims: int
        frame_rule: str

    def set_interface(
        self, frame_rule: str, frame_dims: int, num_states: int, batch_first: bool, bidirectional: bool = False
    ) -> None:
        """Says what a frame is, for messages and in dimensions, and how many states the layer has."""
        self.frame_rule, self.frame_dims, self.num_states = frame_rule, frame_dims, num_states
        self.batch_first, self.bidirectional = batch_first, bidirectional

    def is_frame(self, x: Tensor) -> bool:
        """Returns whether x is one frame, without T, and raises if it is no clip either."""
        raise NotImplementedError

    def run(self, x: Tensor, h: list[State] | None, masks: Masks) -> tuple[Tensor, list[State]]:
        """Runs over x (B, T, ...), whose padding is zero."""
        raise NotImplementedError

    def run_clip(
        self,
        x: Tensor,
        h: list[State] | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        masks: Masks = NO_MASKS,  # a default, for TorchScript reads no global
    ) -> tuple[Tensor, list[State]]:
        """Runs over a clip in the caller's order, or over one frame."""
        frame = self.is_frame(x)
        if frame:
            x = x.unsqueeze(1)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        if h is not None:
            check_states(h, self.num_states)
        if lengths is not None or reset is not None:
            masks = read_masks(x, frame, self.batch_first, lengths, reset)
        valid = masks.valid
        out, states = self.run(x if valid is None else mask_padding(x, valid), h, masks)
        if valid is not None:
            out = mask_padding(out, valid)
        if frame:
            out = out.squeeze(1)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, states

    def run_step(self, x: Any, h: Any, reset: Tensor | None) -> Any:
        """Runs one frame through ``forward``; ValueError for a clip, and where a later frame would be needed."""
        if self.bidirectional:
            raise ValueError("step must be called on a layer of one direction, got bidirectional=True")
        check_step(x)
        for entry in x if self.takes_levels and isinstance(x, (list, tuple)) else [x]:
            if isinstance(entry, Tensor) and entry.dim() != self.frame_dims:
                raise ValueError(f"{self.frame_rule}, got shape {list(entry.shape)}")
        return self(x, h, reset=reset)

    def extra_repr(self) -> str:
        return format_repr(self)


class RecurrentLists(Recurrent):
    """A layer of one input and a list of states."""

    def forward(
        self, x: Tensor, h: list[State] | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        """Runs every layer over a clip, or over one frame.

        With ``lengths``, what lies behind a row's end has no influence: not on the outputs before it, not on the states
        returned, not on gradients. With ``reset``, nothing before the frame has influence on what follows it; the
        backward direction begins anew on the other side of the cut.

        Args:
            x: clip (B, T, input_size, *S), or (T, B, ...) without ``batch_first``, or one frame (B, input_size, *S);
                float. S is the frame's size; vectors have none. A PackedSequence of such frames gives a PackedSequence.
            h: the state before the first frame: a list with one a layer, when bidirectional two a layer, forward first,
                of the shapes that :meth:`init_hidden_state` returns. None for the initial state, or the learned one.
            lengths: (B,) integers, frames of each row; values outside of 0..T act as the nearest of them.
            reset: bool of the shape of x's first two dimensions (B for one frame), True where the state becomes the
                initial one before the frame is read.

        Returns:
            out: output of the last layer, (B, T, hidden, *S'), (T, B, hidden, *S') or (B, hidden, *S'); zero behind a
                row's end.
            h_n: state of each layer and direction after the last frame it read, before its residual is added.

        Raises:
            TypeError: an argument is no Tensor, ``h`` no list of them, or a dtype does not fit.
            ValueError: a shape, the number of states or a mask's device does not fit, or a PackedSequence has
                ``lengths`` beside it.
        """
        if not torch.jit.is_scripting() and not isinstance(x, Tensor):
            result = run_other(self, x, h, lengths, reset)
            if result is not None:
                return result
        return self.run_clip(x, h, lengths, reset)

    def step(
        self, x: Tensor, h: list[State] | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        """Runs one frame (B, input_size, *S); what :meth:`forward` does with it, and refuses a clip.

        Raises:
            ValueError: ``x`` is a clip, or the layer bidirectional: what comes later is not there yet.
        """
        return self.run_step(x, h, reset)
