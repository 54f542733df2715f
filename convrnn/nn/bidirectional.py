"""Both directions of time over any recurrent layer of this package."""

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from ._checks import check_states
from .gru_rcn import GRU_RCN

__all__ = ["Bidirectional"]


class Bidirectional(nn.Module):
    """out[t] = [forward state after frames 0..t, backward state after frames L-1..t], joined over the channels.

    The backward direction reads the sequence from its end; its output is turned back in time, so that position t holds
    both directions of frame t, as in ``torch.nn.GRU``. torch-mingru's ``Bidirectional`` does not turn it back: there
    the backward half of ``out[:, t]`` belongs to frame L-1-t. A head trained on that layout finds its backward half in
    ``out[:, :, C:].flip(1)``, with C channels a direction.

    Args:
        rnn: the layer for the forward direction: GRU_RCN, MinGRU, MinConv2dGRU or a cell of theirs.
        backward_rnn: the layer for the backward direction; None shares ``rnn`` and its weights.

    Raises:
        TypeError: ``rnn`` or ``backward_rnn`` is no recurrent layer of this package.
        ValueError: the two differ in their number of layers, kind of state or ``batch_first``.

    Source:
        Schuster and Paliwal, "Bidirectional Recurrent Neural Networks", 1997.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.Bidirectional(convrnn.MinGRU(3, [4, 8]), convrnn.MinGRU(3, [4, 8]))
        >>> out, h = rnn(torch.rand(2, 5, 3))
        >>> out.shape, len(h)
        (torch.Size([2, 5, 16]), 4)
    """

    single_state: Final[bool]
    num_states: Final[int]
    time_dim: Final[int]
    if TYPE_CHECKING:  # at run time these are submodules, which TorchScript takes without an annotation
        rnn: Any
        backward_rnn: Any

    def __init__(self, rnn: nn.Module, backward_rnn: nn.Module | None = None) -> None:
        super().__init__()
        kind = _kind("rnn", rnn)
        other = kind if backward_rnn is None else _kind("backward_rnn", backward_rnn)
        if other != kind:
            raise ValueError(
                "backward_rnn must agree with rnn in (state is one Tensor, number of states, dimension of time): "
                f"expected {kind}, got {other}"
            )
        self.single_state, self.num_states, self.time_dim = kind
        self.rnn = rnn
        self.backward_rnn = backward_rnn

    def forward(self, x: Tensor, h: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Runs both directions over the whole sequence.

        Args:
            x: the sequence, as ``rnn`` takes it.
            h: initial states of the forward direction, then those of the backward direction, as ``rnn`` takes them
                (GRU_RCN: [h_fwd, h_bwd]); None for the states of :meth:`init_hidden_state`.

        Returns:
            out: both outputs joined over the channels (dim 2), in the order of time.
            h_n: final states, ordered as ``h``; the backward ones belong to the first frame.

        Raises:
            TypeError: ``x`` is no Tensor, or ``h`` no list of them.
            ValueError: ``x``, the number of states or a state's shape does not fit.
        """
        check_states(h, 2 * self.num_states)
        out_fwd, h_fwd = self._forward_direction(x, None if h is None else h[: self.num_states])
        out_bwd, h_bwd = self._backward_direction(x.flip(self.time_dim), None if h is None else h[self.num_states :])
        return torch.cat((out_fwd, out_bwd.flip(self.time_dim)), dim=2), h_fwd + h_bwd

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the states that ``h=None`` stands for, forward then backward, of the dtype and device of x."""
        h_fwd = self.rnn.init_hidden_state(x)
        h_bwd = self.rnn.init_hidden_state(x) if self.backward_rnn is None else self.backward_rnn.init_hidden_state(x)
        if self.single_state:
            return [h_fwd, h_bwd]
        states: list[Tensor] = h_fwd + h_bwd
        return states

    def _forward_direction(self, x: Tensor, h: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        if self.single_state:
            out, state = self.rnn(x, None if h is None else h[0])
            return out, [state]
        out, states = self.rnn(x, h)
        return out, states

    def _backward_direction(self, x: Tensor, h: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        if self.backward_rnn is None:
            return self._forward_direction(x, h)
        if self.single_state:
            out, state = self.backward_rnn(x, None if h is None else h[0])
            return out, [state]
        out, states = self.backward_rnn(x, h)
        return out, states


def _kind(name: str, rnn: Any) -> tuple[bool, int, int]:
    """Returns (state is one Tensor, number of states, dimension of time)."""
    if isinstance(rnn, GRU_RCN):
        return True, 1, 1 if rnn.batch_first else 0
    if not hasattr(rnn, "num_layers") or not hasattr(rnn, "init_hidden_state"):
        raise TypeError(f"{name} must be a recurrent layer of convrnn, got {type(rnn).__name__}")
    return False, rnn.num_layers, 1
