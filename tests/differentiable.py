"""Each op as a function of its tensors, small, in float64 and away from corners: what derivatives are checked on."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import convrnn
from convrnn import reference

from .conftest import INTERPRETED


class Case(NamedTuple):
    """``ours`` and ``reference`` take the tensors that ``inputs`` makes and return a tuple of tensors."""

    ours: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]

    def inputs(self, device: str, dtype: torch.dtype = torch.float64, seed: int = 0, *lead: int) -> list[Tensor]:
        """One tensor a shape, ``lead`` dimensions before it; no entry lies near 0, where g has its corner."""
        generator = torch.Generator().manual_seed(seed)
        made = (torch.randn((*lead, *shape), generator=generator) for shape in self.shapes)
        return [(0.7 * x + 0.15 * x.sign()).to(device, dtype) for x in made]


def _tuple(f: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def called(*args: Any) -> tuple[Tensor, ...]:
        result = f(*args)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    return called


def _gru(f: Callable[..., Any], h0: bool = True, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    def called(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return tuple(f(x, *rest, **options)) if h0 else tuple(f(x, None, *rest, **options))

    return called


def _projected(f: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x, h0, *recurrent: tuple(f(x, h0, None, *recurrent))


@functools.cache  # no copy from the host where a CUDA graph is captured
def _masks(device: torch.device) -> dict[str, Tensor]:
    reset = torch.tensor([[False, True, False], [False, False, True]], device=device)
    return {"reset": reset, "hold": torch.tensor([[False, False, True], [True, False, True]], device=device)}


def _masked(f: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """With resets and held frames, apart and together, for (2, 3, ...)."""

    def called(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return tuple(f(x, *rest, **_masks(x.device)))

    return called


_WEIGHTS = ((6, 1, 2, 3), (4, 2, 3, 1), (2, 2, 1, 2))  # kernels of even and odd sizes

CASES = {
    "mingru": Case(convrnn.mingru, reference.mingru, ((2, 3, 4, 2),)),
    "mingru-h0": Case(convrnn.mingru, reference.mingru, ((2, 3, 4), (2, 2))),
    "mingru-masks": Case(_masked(convrnn.mingru), _masked(reference.mingru), ((2, 3, 4), (2, 2))),
    "log_scan": Case(_tuple(torch.ops.convrnn.log_scan), _tuple(reference.log_scan), ((2, 3, 2), (2, 4, 2))),
    "parallel_scan_log": Case(
        _tuple(convrnn.parallel_scan_log),
        _tuple(lambda a, b: reference.log_scan(a, b).exp()),
        ((1, 4), (1, 5)),
    ),
    "gru_gates": Case(convrnn.ops.gru_gates, reference.gru_gates, ((2, 4, 3), (2, 4, 3), (2, 2, 3))),
    "gru_update": Case(convrnn.ops.gru_update, reference.gru_update, ((2, 2, 3),) * 4),
    "gru_rcn": Case(_gru(convrnn.gru_rcn, False), _gru(reference.gru_rcn, False), ((2, 3, 1, 2, 3), *_WEIGHTS)),
    "gru_rcn-h0-bias": Case(
        _gru(convrnn.gru_rcn), _gru(reference.gru_rcn), ((1, 2, 1, 2, 3), (1, 2, 2, 3), *_WEIGHTS, (6,))
    ),
    "gru_rcn-recompute": Case(
        _gru(convrnn.gru_rcn, recompute=True),
        _gru(reference.gru_rcn),
        ((1, 2, 1, 3), (1, 1, 3), (3, 1, 3), (2, 1, 3), (1, 1, 1), (3,)),
    ),
    "gru_rcn-projection": Case(
        _projected(convrnn.gru_rcn), _projected(reference.gru_rcn), ((1, 2, 6, 2, 3), (1, 2, 2, 3), *_WEIGHTS[1:])
    ),
    "gru_rcn-masks": Case(
        _masked(convrnn.gru_rcn),
        _masked(reference.gru_rcn),
        ((2, 3, 1, 3), (2, 1, 3), (3, 1, 3), (2, 1, 3), (1, 1, 1), (3,)),
    ),
    "gru_rcn-projection-masks": Case(
        _projected(_masked(convrnn.gru_rcn)),
        _projected(_masked(reference.gru_rcn)),
        ((2, 3, 3, 3), (2, 1, 3), (2, 1, 2), (1, 1, 1)),
    ),
}

if INTERPRETED:
    del CASES["gru_rcn-masks"]  # whose kernels are those of the last one


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar in which every entry of every output has a weight and a curvature of its own."""
    total = outputs[0].new_zeros(())
    for i, y in enumerate(outputs):
        weight = torch.linspace(0.3, 1.7, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)
        total = total + (weight * (y + 0.3 * (i + 1) * y * y)).sum()
    return total


def gradients_of(f: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> list[Tensor]:
    """First gradients, and the gradients of a penalty on them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(loss(f(*leaves)), leaves, create_graph=True)
    return [*first, *torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)]


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
