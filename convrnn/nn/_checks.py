"""Argument checks of the modules: the first block runs in constructors, the second in ``forward`` and is scriptable."""

import math
import operator
from numbers import Real
from typing import Any

from torch import Tensor

from convrnn.ops._check import check_dense

_TUPLES = {1: "a tuple of one", 2: "a pair (height, width)", 3: "a triple (depth, height, width)"}


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


def as_tuple(name: str, value: Any, minimum: int, dims: int) -> tuple[int, ...]:
    """Returns an int, or a tuple with one for each of ``dims`` spatial dimensions, as the tuple."""
    if not isinstance(value, (tuple, list)):
        value = (value,) * dims
    if len(value) != dims:
        raise ValueError(f"{name} must be an int or {_TUPLES[dims]}, got {value!r}")
    return tuple(as_int(name, entry, minimum) for entry in value)


def as_pair(name: str, value: Any, minimum: int) -> tuple[int, int]:
    """Returns an int, or a (height, width) pair of them, as the pair."""
    height, width = as_tuple(name, value, minimum, 2)
    return height, width


def as_sizes(name: str, value: Any) -> list[int]:
    """Returns an int or a non-empty list of ints, all positive, as the list."""
    if not isinstance(value, (tuple, list)):
        return [as_int(name, value, 1)]
    if len(value) == 0:
        raise ValueError(f"{name} must hold one size per layer, got an empty {type(value).__name__}")
    return [as_int(f"{name}[{i}]", size, 1) for i, size in enumerate(value)]


def per_layer(name: str, value: Any, num_layers: int, dims: int | None = None) -> list[tuple[str, Any]]:
    """Returns the name and the value of each layer's entry, which may be a tuple of an int for each of ``dims``."""
    if not isinstance(value, (tuple, list)):
        return [(name, value)] * num_layers
    if len(value) != num_layers:
        hint = ""
        if len(value) == dims and not any(isinstance(entry, (tuple, list)) for entry in value):
            one = f"[{(*value,)}]" if num_layers == 1 else f"[{(*value,)}] * {num_layers}"
            hint = f"; for a size in each dimension, the same in every layer, write {one}"
        raise ValueError(
            f"{name} must be an int or hold one entry for each of the {num_layers} layers, "
            f"got {len(value)}: {value!r}{hint}"
        )
    return [(f"{name}[{i}]", entry) for i, entry in enumerate(value)]


def as_bool(name: str, value: Any) -> bool:
    """Returns ``value``, which must be a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r} of type {type(value).__name__}")
    return value


def as_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns ``value``, which must be one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def as_gate_bias(value: Any, chrono_max: Any, bias: bool) -> tuple[float | str, int | None]:
    """Returns the initial bias of the update gate, a number or 'chrono', and the longest dependency of the latter."""
    if isinstance(value, str):
        as_choice("gate_bias", value, ("chrono",))
        if chrono_max is None:
            raise ValueError("chrono_max must be an int with gate_bias='chrono', got None")
        chrono_max = as_int("chrono_max", chrono_max, 3)
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"gate_bias must be a float or 'chrono', got {value!r} of type {type(value).__name__}")
    elif chrono_max is not None:
        raise ValueError(f"chrono_max must be None without gate_bias='chrono', got {chrono_max!r}")
    elif not math.isfinite(value):
        raise ValueError(f"gate_bias must be finite, got {value}")
    if value != 0.0 and not bias:
        raise ValueError(f"gate_bias must be 0 with bias=False, got {value!r}")
    return value if isinstance(value, str) else float(value), chrono_max


def as_probability(name: str, value: Any) -> float:
    """Returns ``value`` as a float in [0, 1]."""
    if not 0.0 <= _as_number(name, value) <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(value)


def as_positive(name: str, value: Any) -> float:
    """Returns ``value`` as a finite float greater than zero."""
    if not 0.0 < _as_number(name, value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def _as_number(name: str, value: Any) -> float:
    """Returns ``value``, which must be a real number, one of numpy's too, as a float; bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a float, got {value!r} of type {type(value).__name__}")
    return float(value)


def check_input(x: Tensor, layout: str, channels: int) -> None:
    """Raises unless ``x`` is dense and has the dimensions of ``layout``, say "(B, S, size)", and ``channels`` at index 2."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor {layout}, got {type(x).__name__}")
    check_dense("x", x)
    if x.dim() != layout.count(",") + 1 or x.shape[2] != channels:
        raise ValueError(f"x must be {layout} with {channels} channels at dim 2, got shape {list(x.shape)}")


def check_sequence(x: Tensor, layout: str, channels: int) -> bool:
    """Returns whether ``x`` is one frame of the ``layout``, without S, and raises if it is no sequence either."""
    if isinstance(x, Tensor) and x.dim() == layout.count(",") and x.shape[1] == channels:
        return True
    check_input(x, layout, channels)
    return False


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
    check_dense(name, h)
    if list(h.shape) != expected:
        raise ValueError(f"{name} must have shape {expected}, got {list(h.shape)}")


def check_clip(x: Tensor, spatial_dims: int, channels: int, batch_first: bool) -> bool:
    """Returns whether ``x`` is one frame (B, channels, *S) and raises if it is no clip (B, T, channels, *S) either."""
    clip = "(B, T, input_size, *S)" if batch_first else "(T, B, input_size, *S)"
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor {clip}, got {type(x).__name__}")
    check_dense("x", x)
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating-point Tensor, got {x.dtype}")
    frame = x.dim() == spatial_dims + 2
    if x.dim() - spatial_dims not in (2, 3) or x.shape[1 if frame else 2] != channels:
        raise ValueError(
            f"x must be {clip} or (B, input_size, *S) with {spatial_dims} spatial dimensions and {channels} channels, "
            f"got shape {list(x.shape)}"
        )
    return frame
