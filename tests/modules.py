"""Every module, small, with an input of sizes that differ from each other: what the tests of PyTorch's tools run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import convrnn


class ModuleCase(NamedTuple):
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]

    def make(self, device: str = "cpu", **options: Any) -> tuple[nn.Module, Tensor]:
        """The module and an input of it."""
        return self.build(device=device, **options), torch.randn(self.shape, device=device)


VIDEO, SEQUENCE = (3, 5, 2, 7, 8), (3, 5, 2)

MODULES = {
    "GRU_RCN": ModuleCase(lambda **kw: convrnn.GRU_RCN(2, 4, 3, bias=True, **kw), VIDEO),
    "GRU_RCN-recompute": ModuleCase(lambda **kw: convrnn.GRU_RCN(2, 4, 3, recompute=True, **kw), VIDEO),
    "MinGRUCell": ModuleCase(lambda **kw: convrnn.MinGRUCell(2, 4, **kw), SEQUENCE),
    "MinGRU": ModuleCase(lambda **kw: convrnn.MinGRU(2, [4, 6], norm=True, residual=True, **kw), SEQUENCE),
    "MinConv2dGRUCell": ModuleCase(lambda **kw: convrnn.MinConv2dGRUCell(2, 4, 3, padding=1, **kw), VIDEO),
    "MinConv2dGRU": ModuleCase(
        lambda **kw: convrnn.MinConv2dGRU(2, [4, 6], 3, strides=[1, 2], paddings=1, norm=True, residual=True, **kw),
        VIDEO,
    ),
    "Bidirectional-GRU_RCN": ModuleCase(lambda **kw: convrnn.Bidirectional(convrnn.GRU_RCN(2, 4, 3, **kw)), VIDEO),
    "Bidirectional-MinGRU": ModuleCase(
        lambda **kw: convrnn.Bidirectional(convrnn.MinGRU(2, 4, **kw), convrnn.MinGRU(2, 4, **kw)), SEQUENCE
    ),
}


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a module's (out, states)."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for entry in outputs for tensor in tensors(entry)]


def loss(outputs: Any) -> Tensor:
    """A scalar in which outputs and states have weights of their own."""
    parts = tensors(outputs)
    return torch.stack([(i + 1) * y.float().square().mean() for i, y in enumerate(parts)]).sum()
