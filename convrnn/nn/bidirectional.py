"""Both directions of time over any recurrent layer of this package."""

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from ._checks import check_states
from ._convolution import Convolution
from ._inputs import run_other
from ._masks import resets_before, reverse, valid_frames
from ._parts import reset_parameters
from ._recurrent import INTERFACE, Recurrent, State

__all__ = ["Bidirectional"]


class Bidirectional(nn.Module):
    """out[t] = [forward state after frames 0..t, backward state after frames L-1..t], joined over the channels.

    The backward direction reads the sequence from its end; its output is turned back in time, so that position t holds
    both directions of frame t, as in ``torch.nn.GRU``. torch-mingru's ``Bidirectional`` does not turn it back: there
    the backward half of ``out[:, t]`` belongs to frame L-1-t. A head trained on that layout finds its backward half in
    ``out[:, :, C:].flip(1)``, with C channels a direction.

    Over a StackedGRU_RCN, x and out are lists with an entry for each level, and what a level takes from the one below
    stays within its direction.

    The arguments and sizes of ``rnn`` as it is wrapped are attributes by the same names: ``input_size``,
    ``hidden_sizes``, ``layer_sizes``, ``num_layers``, ``kernel_sizes`` and so on, as far as the layer has them; what is
    learned is in ``rnn``. ``bidirectional`` is True, ``num_states`` counts both directions.

    Args:
        rnn: the layer for the forward direction: any of this package that is of one direction.
        backward_rnn: the layer for the backward direction; None shares ``rnn`` and its weights.

    Raises:
        TypeError: ``rnn`` or ``backward_rnn`` is no recurrent layer of this package.
        ValueError: the two differ in their number of layers, kind of state or input, or ``batch_first``.

    Source:
        Schuster and Paliwal, "Bidirectional Recurrent Neural Networks", 1997.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.Bidirectional(convrnn.MinGRU(3, [4, 8]), convrnn.MinGRU(3, [4, 8]))
        >>> out, h = rnn(torch.rand(2, 5, 3))
        >>> out.shape, len(h), rnn.layer_sizes
        (torch.Size([2, 5, 16]), 4, (3, 4, 8))
    """

    single_state: Final[bool]
    num_states: Final[int]
    time_dim: Final[int]
    frame_dims: Final[int]
    takes_levels: Final[bool]
    scriptable: Final[bool]
    if TYPE_CHECKING:  # at run time these are submodules, which TorchScript takes without an annotation
        rnn: Any
        backward_rnn: Any

    def __init__(self, rnn: nn.Module, backward_rnn: nn.Module | None = None) -> None:
        super().__init__()
        kind = _interface("rnn", rnn)
        other = kind if backward_rnn is None else _interface("backward_rnn", backward_rnn)
        if other != kind:
            raise ValueError(f"backward_rnn must agree with rnn: expected {kind}, got {other}")
        self.rnn, self.backward_rnn = rnn, backward_rnn
        self.single_state, self.takes_levels = bool(rnn.single_state), bool(rnn.takes_levels)
        self.frame_dims, self.num_states = kind["frame_dims"], 2 * kind["num_states"]
        self.time_dim, self.bidirectional, self.scriptable = int(kind["batch_first"]), True, bool(rnn.scriptable)
        for name in (*vars(rnn), "spatial_dims"):
            value = getattr(rnn, name, None)
            own = name.startswith("_") or isinstance(value, (Tensor, nn.Module, Convolution))
            if hasattr(rnn, name) and not own and not hasattr(self, name):
                setattr(self, name, value)

    def reset_parameters(self) -> None:
        """Initialises the parameters of both layers anew, as their constructors did."""
        reset_parameters(self.children())

    def forward(
        self, x: Tensor, h: list[Tensor] | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs both directions over the whole sequence.

        With ``lengths``, the backward direction begins at the last frame of each row. With ``reset``, it begins anew on
        the other side of the cut: at frame t-1, where the forward direction does at t.

        Args:
            x: the sequence, as ``rnn`` takes it, a PackedSequence too, or one frame; over StackedGRU_RCN the list of
                each level's maps.
            h: initial states of the forward direction, then those of the backward direction, as ``rnn`` takes them
                (GRU_RCN: [h_fwd, h_bwd]); None for the states of :meth:`init_hidden_state`.
            lengths: (B,) integers, frames of each row, as ``rnn`` takes them.
            reset: (B, L) bool, for one frame (B,), True where a sequence begins, as ``rnn`` takes it.

        Returns:
            out: both outputs joined over the channels (dim 2), in the order of time; over StackedGRU_RCN those of each
                level, a list.
            h_n: final states, ordered as ``h``; the backward ones belong to the first frame.

        Raises:
            TypeError, ValueError: as ``rnn`` does.
        """
        if not torch.jit.is_scripting() and not isinstance(x, Tensor):
            result = run_other(self, x, h, lengths, reset)
            if result is not None:
                return result
        if not torch.jit.is_scripting() and self.takes_levels:
            return self._run_levels(x, h, lengths, reset)
        outs, states = self._run([x], isinstance(x, Tensor) and x.dim() == self.frame_dims, h, lengths, reset)
        return outs[0], states

    def _run_levels(
        self, xs: Any, h: list[State] | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Any, list[State]]:
        return self._run(list(xs), self.rnn.are_frames(xs), h, lengths, reset)

    def _run(
        self, xs: list[Tensor], frame: bool, h: list[State] | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[list[Tensor], list[State]]:
        """:meth:`forward` over the inputs of each level, of which all but StackedGRU_RCN have one."""
        check_states(h, self.num_states)
        half = self.num_states // 2
        if frame:
            xs = [x.unsqueeze(self.time_dim) for x in xs]
            if isinstance(reset, Tensor):
                reset = reset.unsqueeze(self.time_dim)
        outs, states = self._direction(False, xs, None if h is None else h[:half], lengths, reset)
        if reset is not None:
            cuts = self._batch_first(reset)
            if lengths is not None:
                cuts = cuts & valid_frames(lengths, self._batch_first(xs[0]))
            reset = self._batch_first(reverse(resets_before(cuts), lengths))
        xs = [self._reverse(x, lengths) for x in xs]
        others, last = self._direction(True, xs, None if h is None else h[half:], lengths, reset)
        both = [torch.cat((out, self._reverse(others[i], lengths)), 2) for i, out in enumerate(outs)]
        return [out.squeeze(self.time_dim) for out in both] if frame else both, states + last

    def _direction(
        self, backwards: bool, xs: list[Tensor], h: list[State] | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[list[Tensor], list[State]]:
        """Calls one of the layers; TorchScript knows no variable that holds a module."""
        if self.takes_levels:
            shared = self.backward_rnn is None or not backwards
            outs, states = (self.rnn if shared else self.backward_rnn)(xs, h, lengths=lengths, reset=reset)
            return outs, states
        x = xs[0]
        if self.single_state:
            first = None if h is None else h[0]
            if self.backward_rnn is not None and backwards:
                out, state = self.backward_rnn(x, first, lengths, reset)
                return [out], [state]
            out, state = self.rnn(x, first, lengths, reset)
            return [out], [state]
        if self.backward_rnn is not None and backwards:
            out, states = self.backward_rnn(x, h, lengths, reset)
            return [out], states
        out, states = self.rnn(x, h, lengths, reset)
        return [out], states

    def step(self, x: Any, h: list[Tensor] | None = None, *, reset: Tensor | None = None) -> Any:
        """Raises ValueError, as every layer of two directions does: what comes later is not there yet."""
        raise ValueError("step must be called on a layer of one direction, got Bidirectional")

    def _batch_first(self, x: Tensor) -> Tensor:
        """From the order of ``rnn`` to (B, T, ...), and back."""
        return x if self.time_dim == 1 else x.transpose(0, 1)

    def _reverse(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return self._batch_first(reverse(self._batch_first(x), lengths))

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the states that ``h=None`` stands for, forward then backward, of the dtype and device of x."""
        if torch.jit.is_scripting() and not self.scriptable:  # torch.jit.trace compiles what is exported, too
            raise NotImplementedError("init_hidden_state must be called on the layer itself, its trace has none")
        else:
            return self._initial_states(x)

    def _initial_states(self, x: Tensor) -> list[Tensor]:
        h_fwd = self.rnn.init_hidden_state(x)
        h_bwd = self.rnn.init_hidden_state(x) if self.backward_rnn is None else self.backward_rnn.init_hidden_state(x)
        if self.single_state:
            return [h_fwd, h_bwd]
        states: list[Tensor] = h_fwd + h_bwd
        return states


def _interface(name: str, rnn: Any) -> dict[str, Any]:
    if not isinstance(rnn, Recurrent) or rnn.bidirectional:
        raise TypeError(f"{name} must be a recurrent layer of convrnn of one direction, got {type(rnn).__name__}")
    return {attribute: getattr(rnn, attribute) for attribute in INTERFACE}
