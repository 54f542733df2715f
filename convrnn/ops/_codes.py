"""Codes of frames, (B, T) uint8: what masks over time tell a recurrence. Scriptable."""

import torch
from torch import Tensor

from ._check import check_same_device, check_shape

# Bits of a frame's code, as the kernels have them.
RESTART, HOLD = 1, 2


def encode(reset: Tensor | None, hold: Tensor | None) -> Tensor | None:
    """Returns the codes (B, T) uint8 of two masks: RESTART, HOLD, their sum or 0; None without a mask."""
    codes: Tensor | None = None
    if reset is not None:
        codes = reset.to(torch.uint8)
    if hold is not None:
        held = hold.to(torch.uint8) * 2
        codes = held if codes is None else codes + held
    return codes


def check_codes(codes: Tensor | None, name: str, frames: Tensor) -> None:
    """Raises unless ``codes`` is absent or fits the frames (B, T, ...) of that name."""
    if codes is not None:
        if codes.dtype != torch.uint8:
            raise TypeError(f"codes must be uint8, got {codes.dtype}")
        check_same_device("codes", codes, name, frames)
        check_shape("codes", codes, "(B, T)", list(frames.shape[:2]))


def has_bit(codes: Tensor, bit: int, like: Tensor) -> Tensor:
    """Where codes (B, T) have a bit, (B, T, 1, ...) with the dimensions of ``like``."""
    return ((codes & bit) != 0).view(codes.shape + (1,) * (like.dim() - 2))
