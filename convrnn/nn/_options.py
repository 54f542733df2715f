"""The options of the layers, each checked once; a constructor's ``locals()`` gives them."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

from torch import nn

from ._checks import as_bool, as_gate_bias, as_positive, as_probability
from ._parts import Norm

T = TypeVar("T")


def set_options(module: nn.Module, *options: Any) -> None:
    """Makes each option an attribute of the module by its name."""
    for group in options:
        for name, value in vars(group).items():
            setattr(module, name, value)


def options_of(kind: Callable[..., T], arguments: dict[str, Any]) -> T:
    """Returns the options of that dataclass among a constructor's arguments; those it has not are at their defaults."""
    return kind(**{name: arguments[name] for name in signature(kind).parameters if name in arguments})


@dataclass
class StackOptions:
    """What stands around the cells of a stack; ``norm`` is checked where it is made."""

    norm: Norm = None
    residual: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    batch_first: bool = True

    def __post_init__(self) -> None:
        self.dropout = as_probability("dropout", self.dropout)
        for name in ("residual", "bidirectional", "batch_first"):
            as_bool(name, getattr(self, name))

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


@dataclass
class GRUOptions:
    """Of a convolutional GRU's cell, as :class:`convrnn.ConvGRU` and :class:`convrnn.GRU_RCN` describe them."""

    bias: bool = False
    reset_after: bool = False
    cell_norm: Norm = None
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    gate_bias: float | str = 0.0
    chrono_max: int | None = None
    learn_h0: bool = False

    def __post_init__(self) -> None:
        for name in ("bias", "reset_after", "learn_h0"):
            as_bool(name, getattr(self, name))
        for name in ("recurrent_dropout", "zoneout"):
            setattr(self, name, as_probability(name, getattr(self, name)))
        self.gate_bias, self.chrono_max = as_gate_bias(self.gate_bias, self.chrono_max, self.bias)


@dataclass
class MinGRUOptions:
    """Of a minGRU's or minLSTM's cell, as :class:`convrnn.MinGRU` describes them; a ``gate_bias`` of None is drawn."""

    bias: bool = True
    expand: float = 1.0
    out_proj: bool = False
    gate_bias: float | str | None = None
    chrono_max: int | None = None
    learn_h0: bool = False

    def __post_init__(self) -> None:
        for name in ("bias", "out_proj", "learn_h0"):
            as_bool(name, getattr(self, name))
        self.expand = as_positive("expand", self.expand)
        drawn = self.gate_bias is None
        start, self.chrono_max = as_gate_bias(0.0 if drawn else self.gate_bias, self.chrono_max, self.bias)
        self.gate_bias = None if drawn else start

    def state_channels(self, size: int) -> int:
        """Returns the channels of the state where the output has ``size``."""
        return max(1, int(self.expand * size + 1e-9))  # 0.29 * 100 is 29
