"""What every converter does with a checkpoint."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["StateDict", "as_mapping", "load", "under"]

StateDict = Mapping[str, Tensor] | nn.Module


def as_mapping(state_dict: StateDict) -> Mapping[str, Tensor]:
    """Returns the ``state_dict`` of a module, or the mapping as it is."""
    if isinstance(state_dict, nn.Module):
        return state_dict.state_dict()
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must be a module, its state_dict() or a mapping from names to Tensors, as torch.load gives one, "
            f"got {type(state_dict).__name__}"
        )
    return state_dict


def under(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    """Returns what has the ``prefix``, without it."""
    found = as_mapping(state_dict).items()
    return {name[len(prefix) :]: value for name, value in found if name.startswith(prefix)}


def load(module: Any, state_dict: dict[str, Tensor]) -> Any:
    """Returns the module with the weights."""
    module.load_state_dict(state_dict)
    return module
