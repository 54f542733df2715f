"""FLOP formulas for torch.utils.flop_counter: of gru_rcn, whose convolutions it would count if it saw them."""

import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from . import _library  # noqa: F401  the ops must be there

_MODULE = "torch.utils.flop_counter"
Shape = Sequence[int]


def _convolutions(x: Shape, weights: Sequence[Shape | None]) -> list[int]:
    """FLOPs of one frame of the whole batch for each weight, as aten.convolution is counted; none for None."""
    return [0 if weight is None else 2 * x[0] * math.prod(x[3:]) * math.prod(weight) for weight in weights]


def _forward(x: Shape, h0: Shape | None, W: Shape | None, U: Shape, C: Shape, *args: Any, **kwargs: Any) -> int:
    w, u, c = _convolutions(x, (W, U, C))
    steps = x[1]
    return steps * w + (steps if h0 is not None else max(steps - 1, 0)) * (u + c)


def _backward(
    dout: Shape | None,
    dh_n: Shape | None,
    x: Shape,
    h0: Shape | None,
    W: Shape | None,
    U: Shape,
    C: Shape,
    out: Shape,
    gates: Shape,
    output_mask: Sequence[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    w, u, c = _convolutions(x, (W, U, C))
    steps = x[1]
    recurrent = steps if h0 is not None else max(steps - 1, 0)  # a zero state is not convolved
    earlier = max(steps - 1, 0)  # through the state; the first step's gradients of r and h0 where somebody wants them
    flops = (recurrent if any(output_mask[i] for i in (0, 1, 2, 3, 5)) else earlier) * c
    flops += (steps if h0 is not None and output_mask[1] else earlier) * u
    flops += steps * w * (output_mask[0] + output_mask[2]) + recurrent * (u * output_mask[3] + c * output_mask[4])
    if math.prod(gates) == 0:
        flops += _forward(x, h0, W, U, C)
    return flops


def _register(module: ModuleType) -> None:
    module.register_flop_formula(torch.ops.convrnn.gru_rcn)(_forward)
    module.register_flop_formula(torch.ops.convrnn.gru_rcn_backward)(_backward)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers the formulas once the counter is imported: importing it here would import Triton."""

    loader: Any

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register(module)


if _MODULE in sys.modules:
    _register(sys.modules[_MODULE])
else:
    sys.meta_path.insert(0, _AfterImport())
