"""Which frames of a batch are valid and where its sequences begin: lengths and resets of all layers. Scriptable."""

from typing import NamedTuple

import torch
from torch import Tensor

from convrnn.ops._check import check_mask
from convrnn.ops._codes import encode


class Masks(NamedTuple):
    """What ``lengths`` and ``reset`` say of each frame, (B, T); None where the caller gave none."""

    valid: Tensor | None = None  # bool, False for padding, where the state is held
    reset: Tensor | None = None  # bool, True where the state becomes the initial one before the frame
    flags: Tensor | None = None  # uint8, both as the ops take them


NO_MASKS = Masks()


def read_masks(x: Tensor, frame: bool, batch_first: bool, lengths: Tensor | None, reset: Tensor | None) -> Masks:
    """Returns the masks of x (B, T, ...).

    ``reset`` is checked as it was given: for a ``frame``, which x holds alone, or in the order of ``batch_first``.
    """
    batch, steps = x.shape[0], x.shape[1]
    check_mask("lengths", lengths, [batch], False, "x", x)
    check_mask("reset", reset, [batch] if frame else [batch, steps] if batch_first else [steps, batch], True, "x", x)
    if reset is not None:
        if frame:
            reset = reset.unsqueeze(1)
        elif not batch_first:
            reset = reset.transpose(0, 1)
    valid: Tensor | None = None
    if lengths is not None:
        valid = valid_frames(lengths, x)
        if reset is not None:
            reset = reset & valid
    return Masks(valid, reset, encode(reset, None if valid is None else ~valid))


def reverse_masks(masks: Masks) -> Masks:
    """Returns the masks as the direction from the end meets them: the padding first, resets after the cut."""
    valid = masks.valid
    reset = masks.reset
    if valid is not None:
        valid = valid.flip(1)
    if reset is not None:
        reset = resets_before(reset).flip(1)
    return Masks(valid, reset, encode(reset, None if valid is None else ~valid))


def valid_frames(lengths: Tensor, x: Tensor) -> Tensor:
    """Returns (B, T) bool, True for the frames that the rows of x (B, T, ...) have."""
    return torch.arange(x.shape[1], device=x.device) < lengths.to(x.device).unsqueeze(1)


def mask_padding(x: Tensor, valid: Tensor | None) -> Tensor:
    """Returns x (B, T, ...) with zeros where not ``valid``, so that not even a NaN there is read."""
    return x if valid is None else x.masked_fill(~valid.view(list(valid.shape) + [1] * (x.dim() - 2)), 0.0)


def reverse(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Returns x (B, T, ...) with the frames of each row in reverse; with ``lengths``, the padding stays behind them."""
    if lengths is None:
        return x.flip(1)
    t = torch.arange(x.shape[1], device=x.device)
    n = lengths.to(x.device, torch.int64).clamp(0, x.shape[1]).unsqueeze(1)
    source = torch.where(t < n, n - 1 - t, t)
    return x.gather(1, source.view(list(source.shape) + [1] * (x.dim() - 2)).expand_as(x))


def resets_before(reset: Tensor) -> Tensor:
    """Returns the cuts (B, T) as the other direction meets them: a cut before frame t comes after frame t-1 there."""
    t = torch.arange(reset.shape[1], device=reset.device)
    return reset.roll(-1, 1) & (t < reset.shape[1] - 1)  # a slice would tie torch.export to more than two frames
