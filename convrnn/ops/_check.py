"""Checks of input that the ops share. Scriptable.

The public functions check what users give. The fake kernels and the Triton bindings check the same again, since compiled
graphs and scripted archives call the op and not the function; the C++ kernels check on their own.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless ``x`` is a tensor of a dtype that the kernels take; forward-mode AD is an error too."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x)}")
    if not torch.jit.is_scripting():
        _check_no_tangent(name, x)
    if x.dtype not in [torch.float32, torch.float64, torch.bfloat16, torch.float16]:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")


def _check_no_tangent(name: str, x: Tensor) -> None:
    """PyTorch would silently drop the tangent of an op without a forward-mode formula."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"{name} carries a tangent: convrnn's ops have no forward-mode AD yet")


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
