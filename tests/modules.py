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


class Stacked(convrnn.StackedGRU_RCN):
    """StackedGRU_RCN of a map and of every second pixel of it, so that its input is one tensor as the others' is."""

    def forward(self, x: Tensor, h: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        outs, states = super().forward([x, x[..., ::2, ::2]], h)
        return outs[-1], states


VIDEO, SEQUENCE = (3, 5, 2, 7, 8), (3, 5, 2)

SCRIPTABLE = {
    "GRU_RCN": ModuleCase(lambda **kw: convrnn.GRU_RCN(2, 4, 3, bias=True, **kw), VIDEO),
    "GRU_RCN-recompute": ModuleCase(lambda **kw: convrnn.GRU_RCN(2, 4, 3, recompute=True, **kw), VIDEO),
    "MinGRUCell": ModuleCase(lambda **kw: convrnn.MinGRUCell(2, 4, **kw), SEQUENCE),
    "MinGRU": ModuleCase(lambda **kw: convrnn.MinGRU(2, [4, 6], norm=True, residual=True, **kw), SEQUENCE),
    "MinConv2dGRUCell": ModuleCase(lambda **kw: convrnn.MinConv2dGRUCell(2, 4, 3, padding=1, **kw), VIDEO),
    "MinConv2dGRU": ModuleCase(
        lambda **kw: convrnn.MinConv2dGRU(2, [4, 6], 3, strides=[1, 2], paddings=1, norm=True, residual=True, **kw),
        VIDEO,
    ),
    "MinConv1dGRU": ModuleCase(
        lambda **kw: convrnn.MinConv1dGRU(
            2, 4, 3, paddings="same", groups=2, expand=1.5, learn_h0=True, bidirectional=True, residual=True, **kw
        ),
        (3, 5, 2, 7),
    ),
    "MinLSTM": ModuleCase(lambda **kw: convrnn.MinLSTM(2, 4, **kw), SEQUENCE),
    "Bidirectional-GRU_RCN": ModuleCase(lambda **kw: convrnn.Bidirectional(convrnn.GRU_RCN(2, 4, 3, **kw)), VIDEO),
    "Bidirectional-MinGRU": ModuleCase(
        lambda **kw: convrnn.Bidirectional(convrnn.MinGRU(2, 4, **kw), convrnn.MinGRU(2, 4, **kw)), SEQUENCE
    ),
}
# One op over the sequence too.
FUSED = SCRIPTABLE | {
    "ConvGRU": ModuleCase(lambda **kw: convrnn.ConvGRU(2, [4, 6], 3, norm=True, residual=True, **kw), VIDEO),
    "ConvGRU1d": ModuleCase(lambda **kw: convrnn.ConvGRU1d(2, 4, 3, bidirectional=True, **kw), (3, 5, 2, 7)),
    "ConvGRU3d": ModuleCase(lambda **kw: convrnn.ConvGRU3d(2, 4, 3, learn_h0=True, **kw), (3, 3, 2, 4, 5, 3)),
    "ConvGRUCell": ModuleCase(lambda **kw: convrnn.ConvGRUCell(2, 4, (2, 3), **kw), VIDEO),
    "ConvGRUCell1d": ModuleCase(lambda **kw: convrnn.ConvGRUCell1d(2, 4, 3, bias=False, **kw), (3, 5, 2, 7)),
    "ConvGRUCell3d": ModuleCase(lambda **kw: convrnn.ConvGRUCell3d(2, 4, (1, 3, 3), **kw), (3, 3, 2, 4, 5, 3)),
}
# What walks over time in Python, whose graphs hold one number of steps.
WALKING = {
    "ConvGRU-walking": ModuleCase(
        lambda **kw: convrnn.ConvGRU(
            2, 4, 3, strides=2, reset_after=True, cell_norm="layer", residual=True, learn_h0=True, **kw
        ),
        (3, 2, 2, 7, 8),
    ),
    "SepConvGRUCell": ModuleCase(lambda **kw: convrnn.SepConvGRUCell(2, 4, 3, **kw), (3, 2, 2, 7, 8)),
    "StackedGRU_RCN": ModuleCase(lambda **kw: Stacked([2, 2], [4, 6], 3, bias=True, **kw), (3, 2, 2, 7, 8)),
}
MODULES = FUSED | WALKING


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a module's (out, states)."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for entry in outputs for tensor in tensors(entry)]


def loss(outputs: Any) -> Tensor:
    """A scalar in which outputs and states have weights of their own."""
    parts = tensors(outputs)
    return torch.stack([(i + 1) * y.float().square().mean() for i, y in enumerate(parts)]).sum()
