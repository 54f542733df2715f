"""One recurrence in one direction of time: the protocol that every stack is built on, and the loop over time.

A subclass of :class:`Cell` gives

- ``project(frames, masks)``: what the recurrence takes from all frames (N, C, *S), in one batched product;
- ``scan(projection, h, i, masks)``: the states after each frame, and the last one, over the projection (B, T, ...) from
  the i-th of the states ``h``;
- ``state_size(size)`` and ``initial_state(x, batch, size)``: the frame size of the state, and the state that None means.

``scan`` calls the op that covers the cell's options, with ``masks.flags``, or :func:`time_loop` with a step of its own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from convrnn.ops._check import check_floating, check_same_device

from ..kernels.layout import state_dtype
from ._checks import check_shape
from ._masks import NO_MASKS, Masks
from ._recurrent import State


class Cell(nn.Module):
    """A recurrence over (B, T, C, *S), or over (T, B, ...) transposed where ``time_first``; ``backwards`` from the end."""

    if TYPE_CHECKING:  # annotations at run time would hide the constants of a base class from TorchScript
        time_first: bool
        backwards: bool

    def forward(
        self,
        x: Tensor,
        h: list[State] | None = None,
        i: int = 0,
        masks: Masks = NO_MASKS,
        frames: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Runs from the i-th of the states; ``masks`` are in the cell's own direction.

        ``frames`` (N, C, *S) are read in the place of x's where given, normalised.
        """
        if frames is None:
            frames = (x.transpose(0, 1) if self.time_first else x).flatten(0, 1)
        return self.run_direction(frames, x, h, i, masks)

    def run_direction(
        self, frames: Tensor, x: Tensor, h: list[State] | None, i: int, masks: Masks
    ) -> tuple[Tensor, State]:
        projection = self.project(frames, masks)
        if self.time_first:
            projection = torch.unflatten(projection, 0, [x.shape[1], x.shape[0]]).transpose(0, 1)
        else:
            projection = torch.unflatten(projection, 0, x.shape[:2])  # x.unflatten runs more Python
        if self.backwards:
            projection = projection.flip(1)
        out, h_n = self.scan(projection, h, i, masks)
        return (out.flip(1) if self.backwards else out), h_n

    def project(self, frames: Tensor, masks: Masks) -> Tensor:
        """Returns what the recurrence takes from all frames (N, ...) of a clip: the batched input projection."""
        raise NotImplementedError

    def scan(self, projection: Tensor, h: list[State] | None, i: int, masks: Masks) -> tuple[Tensor, State]:
        """Returns the output (B, T, size, *S'), and the state after the last frame of each row."""
        raise NotImplementedError

    def state_size(self, size: list[int]) -> list[int]:
        """Returns the frame size of the state for frames of ``size``; ValueError where that is too small."""
        raise NotImplementedError

    def initial_state(self, x: Tensor, batch: int, size: list[int]) -> State:
        """Returns the state that None stands for, on the device of x; ``size`` is the state's. It may be a view."""
        raise NotImplementedError


def check_state(name: str, h: State, shape: list[int], x: Tensor) -> None:
    """Raises unless the state, or each part of it, is a floating-point Tensor of the shape on the device of x."""
    if not torch.jit.is_scripting() and isinstance(h, (list, tuple)):
        for j, part in enumerate(h):
            check_state(f"{name}[{j}]", part, shape, x)
    else:
        check_shape(name, h, shape)
        check_floating(name, h)
        check_same_device(name, h, "x", x)


def copy_state(h: State, x: Tensor) -> State:
    """Returns the state in x's dtype, no view of what is learned."""
    if not torch.jit.is_scripting() and isinstance(h, (list, tuple)):
        return tuple(copy_state(part, x) for part in h)
    return h.to(x.dtype, copy=True)


def map_state(f: Callable[..., Tensor], *states: State) -> State:
    """Applies f to the Tensors of states of one structure."""
    if isinstance(states[0], Tensor):
        return f(*states)
    return tuple(map_state(f, *parts) for parts in zip(*states, strict=True))


def time_loop(
    step: Callable[[Tensor, State], State],
    projection: Tensor,
    h: State,
    masks: Masks,
    initial: State | None = None,
) -> tuple[Tensor, State]:
    """Runs a recurrence that no op covers, frame by frame. Compiled, the loop is unrolled.

    Args:
        step: a frame of the projection and the state before it -> the state after it, in the state's dtype.
        projection: (B, T, P, *S).
        h: the state before the first frame; its Tensor (B, C, *S), or the first of its Tensors, is the output.
        masks: (B, T) where a state is held or reset.
        initial: what a reset begins with.

    Returns:
        The outputs (B, T, C, *S) in the dtype of ``projection``, and the last state in the dtypes of ``h``.
    """
    accumulate, ones = state_dtype(projection), (1,) * (projection.dim() - 2)
    state = map_state(lambda part: part.to(accumulate), h)
    first = None if masks.reset is None else map_state(lambda part: part.to(accumulate), initial)
    out: list[Tensor] = []
    for t, frame in enumerate(projection.unbind(1)):
        if masks.reset is not None:
            state = _select(masks.reset[:, t].view(-1, *ones), first, state)
        new = step(frame, state)
        state = new if masks.valid is None else _select(masks.valid[:, t].view(-1, *ones), new, state)
        out.append((state if isinstance(state, Tensor) else state[0]).to(projection.dtype))
    if not out:
        channels = (h if isinstance(h, Tensor) else h[0]).shape[1]
        return projection[:, :, :channels], map_state(Tensor.clone, h)
    return torch.stack(out, 1), map_state(lambda part, given: part.to(given.dtype), state, h)


def _select(flags: Tensor, chosen: State, other: State) -> State:
    if isinstance(chosen, Tensor):
        return torch.where(flags, chosen, other)
    return tuple(_select(flags, a, b) for a, b in zip(chosen, other, strict=True))
