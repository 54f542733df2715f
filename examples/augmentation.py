"""Augmentation of clips for training: random resized crop, colour jitter and channel permutation.

One draw holds for all frames of a clip, so that nothing moves or flickers that did not before.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augment", "colour_map", "resized_crop"]

AREA, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of the crop: share of the frame's area, width to height
BRIGHTNESS = CONTRAST = SATURATION = 0.4  # factors from 1 - this to 1 + this
HUE = 0.1  # most of a turn of the colour circle, either way
GREY = torch.tensor([0.299, 0.587, 0.114])  # luma of RGB (ITU-R BT.601)


def augment(frames: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """A random crop of frames (T, 3, H, W) uint8 scaled to (T, 3, size, size) uint8, its colours changed at random."""
    cropped = resized_crop(frames, size, rng).float()
    matrix, keep = colour_map(rng)
    mean = (GREY @ cropped.mean(dim=(0, 2, 3))) * (matrix.sum() / 3)
    changed = torch.einsum("ij,tjhw->tihw", keep * matrix, cropped) + (1 - keep) * mean
    return changed.round().clamp(0, 255).byte()


def resized_crop(frames: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """A rectangle of random area, shape and place of frames (T, 3, H, W) uint8, scaled to (T, 3, size, size)."""
    height, width = frames.shape[2:]
    area, ratio = rng.uniform(*AREA) * height * width, math.exp(rng.uniform(*map(math.log, RATIO)))
    h, w = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
    top, left = int(rng.integers(height - h, endpoint=True)), int(rng.integers(width - w, endpoint=True))
    return F.interpolate(frames[:, :, top : top + h, left : left + w], (size, size), mode="bilinear", antialias=True)


def colour_map(rng: np.random.Generator) -> tuple[Tensor, float]:
    """A matrix (3, 3) of RGB: brightness, saturation, hue and a permutation; and the contrast.

    All but brightness leave grey as it is, so contrast, the distance from the mean grey, may be taken last.
    """
    brightness, contrast, saturation = 1 + rng.uniform(-1, 1, 3) * (BRIGHTNESS, CONTRAST, SATURATION)
    angle = 2 * math.pi * rng.uniform(-HUE, HUE)
    saturate = saturation * torch.eye(3) + (1 - saturation) * GREY.expand(3, 3)
    # Rotation about the axis of greys, by Rodrigues' formula.
    axis = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(angle) * torch.eye(3) + (1 - math.cos(angle)) / 3 + math.sin(angle) * axis
    permute = torch.eye(3)[torch.from_numpy(rng.permutation(3))]
    return (brightness * permute @ turn @ saturate).float(), float(contrast)
