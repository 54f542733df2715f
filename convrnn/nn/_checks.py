"""Argument checks of the modules: the first block runs in constructors, the second in ``forward`` and is scriptable."""

import operator
from typing import Any

from torch import Tensor


def as_int(name: str, value: Any, minimum: int) -> int:
    """Returns ``value`` as an int of at least ``minimum``; numpy integers pass, bool and float do not."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def as_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Returns an int, or a (height, width) pair of them, as the pair."""
    if not isinstance(value, (tuple, list)):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be an int or a pair (height, width), got {value!r}")
    return as_int(name, value[0], minimum), as_int(name, value[1], minimum)


def as_sizes(name: str, value: Any) -> list[int]:
    """Returns an int or a non-empty list of ints, all positive, as the list."""
    if not isinstance(value, (tuple, list)):
        return [as_int(name, value, 1)]
    if len(value) == 0:
        raise ValueError(f"{name} must hold one size per layer, got an empty {type(value).__name__}")
    return [as_int(f"{name}[{i}]", size, 1) for i, size in enumerate(value)]


def as_pairs(name: str, value: Any, minimum: int, num_layers: int) -> list[tuple[int, int]]:
    """Returns an int for all layers, or a list with an int or a pair per layer, as one pair per layer."""
    if not isinstance(value, (tuple, list)):
        return [as_pair(name, value, minimum)] * num_layers
    if len(value) != num_layers:
        raise ValueError(
            f"{name} must be an int or hold one entry for each of the {num_layers} layers, got {len(value)}: {value!r}"
        )
    return [as_pair(f"{name}[{i}]", entry, minimum) for i, entry in enumerate(value)]


def as_probability(name: str, value: Any) -> float:
    """Returns ``value`` as a float in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {value!r} of type {type(value).__name__}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(value)


def check_input(x: Tensor, layout: str, channels: int) -> None:
    """Raises unless ``x`` has the dimensions of ``layout``, say "(B, S, size)", and ``channels`` at index 2."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor {layout}, got {type(x).__name__}")
    if x.dim() != layout.count(",") + 1 or x.shape[2] != channels:
        raise ValueError(f"x must be {layout} with {channels} channels at dim 2, got shape {list(x.shape)}")


def check_states(h: list[Tensor] | None, count: int) -> None:
    """Raises unless ``h`` is absent or holds ``count`` states."""
    if h is not None:
        if not isinstance(h, (list, tuple)):
            raise TypeError(f"h must be a list of {count} Tensors, got {type(h).__name__}")
        if len(h) != count:
            raise ValueError(f"h must hold {count} states, got {len(h)}")


def check_shape(name: str, h: Tensor, expected: list[int]) -> None:
    """Raises unless the state ``h`` has the shape ``expected``."""
    if not isinstance(h, Tensor):
        raise TypeError(f"{name} must be a Tensor of shape {expected}, got {type(h).__name__}")
    if list(h.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {list(h.shape)}")
