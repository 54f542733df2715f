"""Memory layouts that the kernels read and write without a copy, and the dtype of their states.

A sequence is a tensor ``(B, T, C, *S)``. Its batch and time strides are free; its frames ``(C, *S)`` are either
*channels first* (row-major) or *channels last* (the channel varies fastest). Every other tensor is copied to
channels first. The C++ side states the same rule in ``kernels/cpu/tensor.h``; the fake kernels in ``convrnn/ops``
and the Triton launchers call this file.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether dimensions, listed from slowest to fastest, are row-major without gaps (size-1 strides are free)."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def is_channels_last(x: Tensor, channel_dim: int) -> bool:
    """Whether the frames ``x.shape[channel_dim:]`` are channels last and not also channels first."""
    sizes, strides = x.shape[channel_dim:], x.stride()[channel_dim:]
    if _is_dense(sizes, strides):
        return False
    return _is_dense((*sizes[1:], sizes[0]), (*strides[1:], strides[0]))


def has_layout(x: Tensor, channel_dim: int, channels_last: bool) -> bool:
    """Whether the frames of ``x`` have the layout named by ``channels_last``, whatever the strides before them."""
    sizes, strides = x.shape[channel_dim:], x.stride()[channel_dim:]
    if channels_last:
        return _is_dense((*sizes[1:], sizes[0]), (*strides[1:], strides[0]))
    return _is_dense(sizes, strides)


def dense_strides(shape: Sequence[int], channel_dim: int, channels_last: bool) -> list[int]:
    """Strides of a gap-free tensor of this shape whose frames have the given layout."""
    order = list(range(len(shape)))
    if channels_last:
        order.append(order.pop(channel_dim))
    strides = [1] * len(shape)
    step = 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * max(shape[dim], 1) if isinstance(shape[dim], int) else step * shape[dim]
    return strides


def empty(like: Tensor, shape: Sequence[int], channel_dim: int, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on ``like``'s device whose frames have the given layout."""
    return like.new_empty_strided(shape, dense_strides(shape, channel_dim, channels_last), dtype=dtype)


def to_layout(x: Tensor, channel_dim: int, channels_last: bool) -> Tensor:
    """``x`` itself where its frames have the layout, else a dense copy that has it."""
    if has_layout(x, channel_dim, channels_last):
        return x
    return empty(x, x.shape, channel_dim, channels_last, x.dtype).copy_(x)


def dense(x: Tensor) -> Tensor:
    """``x`` contiguous, with row-major strides also where a dimension of size 1 leaves them open, as the fakes have it."""
    x, strides = x.contiguous(), dense_strides(x.shape, 0, channels_last=False)
    return x if list(x.stride()) == strides else x.as_strided(x.shape, strides)


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and arithmetic beside ``x``: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def frame_numel(x: Tensor, channel_dim: int) -> int:
    """Elements of one frame ``(C, *S)``."""
    return math.prod(x.shape[channel_dim:])
