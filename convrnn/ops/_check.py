"""Checks of input that the ops share. Scriptable.

The public functions check what users give. The fake kernels and the Triton bindings check the same again, since compiled
graphs and scripted archives call the op and not the function; the C++ kernels check on their own.
"""

import torch
from torch import Tensor


def check_dense(name: str, x: Tensor) -> None:
    """TypeError if ``x`` is a nested or a sparse tensor, most of which do not even have a shape."""
    if not torch.jit.is_scripting() and (x.is_nested or x.layout != torch.strided):
        kind = "nested" if x.is_nested else f"{x.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got a {kind} one")


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless ``x`` is a tensor of a dtype and layout that the kernels take."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x)}")
    check_dense(name, x)
    if x.dtype not in [torch.float32, torch.float64, torch.bfloat16, torch.float16]:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def check_shape(name: str, x: Tensor, meaning: str, expected: list[int]) -> None:
    """ValueError unless ``x`` has the shape ``expected``; ``meaning`` names its dimensions."""
    if list(x.shape) != expected:
        raise ValueError(f"{name} must be {meaning} = {expected}, got {list(x.shape)}")


def check_same_dtype(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """TypeError unless the two tensors have one dtype."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name} {other.dtype}, got {x.dtype}")


def check_same_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless the two tensors live on one device."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {x.device}")


def check_mask(
    name: str, mask: Tensor | None, expected: list[int], flags: bool, other_name: str, other: Tensor
) -> None:
    """Raises unless ``mask`` is absent, or a Tensor of the shape ``expected``: bool on the device of ``other`` where it
    holds ``flags``, else integers, on any device."""
    if mask is None:
        return
    kind = "a bool" if flags else "an integer"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be {kind} Tensor of shape {expected}, got {type(mask).__name__}")
    if (mask.dtype == torch.bool) != flags or mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name} must be {kind} Tensor, got {mask.dtype}")
    if list(mask.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {list(mask.shape)}")
    if flags:
        check_same_device(name, mask, other_name, other)


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for the device; on one that knows none, like meta, it never is."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
