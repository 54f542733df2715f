"""Checks of user input that several public functions share. Scriptable."""

import torch
from torch import Tensor


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless ``x`` is a strided tensor of a dtype that the kernels take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x)}")
    if x.dtype not in [torch.float32, torch.float64, torch.bfloat16, torch.float16]:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless the two tensors live on one device."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {x.device}")
