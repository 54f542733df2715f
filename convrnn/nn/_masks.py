"""Which frames of a batch are there and where its sequences begin: lengths and resets of all layers. Scriptable."""

import torch
from torch import Tensor

from convrnn.ops._check import check_mask


def read_masks(
    x: Tensor, frame: bool, batch_first: bool, lengths: Tensor | None, reset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns, (B, T), which frames the rows of x (B, T, ...) have, and which of these begin a sequence.

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
    live: Tensor | None = None
    if lengths is not None:
        live = live_frames(lengths, x)
        if reset is not None:
            reset = reset & live
    return live, reset


def live_frames(lengths: Tensor, x: Tensor) -> Tensor:
    """Returns (B, T) bool, True for the frames that the rows of x (B, T, ...) have."""
    return torch.arange(x.shape[1], device=x.device) < lengths.to(x.device).unsqueeze(1)


def blank(x: Tensor, live: Tensor) -> Tensor:
    """Returns x (B, T, ...) with zeros where not ``live``, so that not even a NaN there is read."""
    return x.masked_fill(~per_frame(live, x), 0.0)


def per_frame(mask: Tensor, x: Tensor) -> Tensor:
    """Returns ``mask`` (B, T) with the dimensions of x (B, T, ...)."""
    return mask.view(list(mask.shape) + [1] * (x.dim() - 2))


def reverse(x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Returns x (B, T, ...) with the frames of each row in reverse; with ``lengths``, the padding stays behind them."""
    if lengths is None:
        return x.flip(1)
    t = torch.arange(x.shape[1], device=x.device)
    n = lengths.to(x.device, torch.int64).clamp(0, x.shape[1]).unsqueeze(1)
    return x.gather(1, per_frame(torch.where(t < n, n - 1 - t, t), x).expand_as(x))


def resets_before(reset: Tensor) -> Tensor:
    """Returns the cuts (B, T) as the other direction meets them: frame t-1 begins anew where frame t does in this one."""
    t = torch.arange(reset.shape[1], device=reset.device)
    return reset.roll(-1, 1) & (t < reset.shape[1] - 1)  # a slice would tie torch.export to more than two frames
