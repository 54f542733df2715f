"""Inputs of launchers in every layout, and the comparison of what comes back with float64."""

import mmap

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def randn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 2.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def arrange(x: Tensor, layout: str) -> Tensor:
    """The values of ``x`` (B, T, C, *S) in another memory layout; "expanded" repeats the first sample instead."""
    if layout == "chunk":
        return torch.cat((x, torch.full_like(x, torch.nan)), dim=2)[:, :, : x.shape[2]]
    if layout == "channels_last":
        return x.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "time_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "odd":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double().requires_grad_() for x in tensors]


def assert_close(actual: Tensor, expected: Tensor, epsilons: int, dtype: torch.dtype) -> None:
    tolerance = epsilons * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_grads(
    actual: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    upstream: tuple[Tensor, ...],
    inputs: list[Tensor | None],
    epsilons: int,
    dtype: torch.dtype,
) -> None:
    """Compare with autograd's gradients of the inputs, in order; None stands for an input that was not given."""
    loss = sum((y * dy.double()).sum() for y, dy in zip(outputs, upstream, strict=True))
    wanted = [x for x in inputs if x is not None]
    expected = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    for gradient, x in zip(actual, inputs, strict=True):
        if x is None:
            assert gradient.shape == (0,)
        else:
            assert_close(gradient, next(expected), epsilons, dtype)


def spread_out(x: Tensor, *strides: int) -> Tensor:
    """The values of ``x``, its first dimensions as many elements apart as said, however many: memory is reserved, and
    only the pages that hold an element exist."""
    assert len(strides) <= x.dim()
    strides = (*strides, *x.stride()[len(strides) :])
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # a name since Python 3.11
    memory = torch.frombuffer(mmap.mmap(-1, extent * x.element_size(), flags=flags), dtype=x.dtype)
    return memory.as_strided(x.shape, strides).copy_(x)
