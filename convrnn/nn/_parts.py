"""What the layers of both families have beside their recurrence: norms, the gate's initial bias, what repr shows."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Norm = bool | str | Callable[[int], nn.Module] | None


def norm_groups(channels: int) -> int:
    """Returns the first of 64, 32, 16, 8, 4, 1 that divides the channels and leaves min(4, channels) in a group."""
    return next(n for n in (64, 32, 16, 8, 4, 1) if channels % n == 0 and channels // n >= min(4, channels))


def make_norm(name: str, norm: Norm, channels: int, packed: int = 1, images: bool = True, **factory: Any) -> Any:
    """Returns the normalisation of ``packed`` times ``channels`` channels, each of the packed ones on its own, or None.

    None and False are none, 'layer' is a GroupNorm of one group, 'group' and True one of up to 64 groups of at least 4
    channels; of vectors, which are no ``images``, True and 'layer' are LayerNorm, 'rms' is RMSNorm. A callable gets the
    number of all channels.
    """
    if norm is None or norm is False:
        return None
    if callable(norm):
        return _called(name, norm, packed * channels, factory)
    names = ("layer", "group") if images else ("layer", "rms")
    if norm is not True and norm not in names:
        counted = "channels" if images else "features"
        raise ValueError(
            f"{name} must be None, {names[0]!r}, {names[1]!r} or a callable {counted} -> Module, got {norm!r}"
        )
    if not images:
        return (nn.RMSNorm if norm == "rms" else nn.LayerNorm)(channels, **factory)
    groups = 1 if norm == "layer" else norm_groups(channels)
    return nn.GroupNorm(packed * groups, packed * channels, **factory)


def flatten_frames(x: Tensor, time_first: bool) -> Tensor:
    """Returns the frames of x (B, T, ...) as (N, ...), with ``time_first`` in the order (T, B). Scriptable."""
    return (x.transpose(0, 1) if time_first else x).flatten(0, 1)


def unflatten_frames(frames: Tensor, x: Tensor, time_first: bool) -> Tensor:
    """Returns the frames (N, ...) as (B, T, ...) with B and T of x: the inverse of :func:`flatten_frames`."""
    if time_first:
        return torch.unflatten(frames, 0, [x.shape[1], x.shape[0]]).transpose(0, 1)
    return torch.unflatten(frames, 0, x.shape[:2])  # x.unflatten runs more Python


def norm_input(x: Tensor) -> Tensor:
    """Returns frames (N, C, *S) as every norm can read them: not channels last on the CPU. Scriptable.

    GroupNorm's CPU backward for images and volumes in a channels-last format (``suggest_memory_format``, which also
    takes one channel, one pixel or a slice for it) writes the gradient of its input without asking whether there is one.
    Where nobody wants that gradient, but one of weight or bias, and a frame has fewer than 2048 pixels, the process dies
    by SIGSEGV. It has been so in every dtype since https://github.com/pytorch/pytorch/pull/89485, whose kernel for larger
    frames does ask. Contiguous frames, strides of dimensions of size one included, take another kernel, which is also
    the faster one.
    """
    if not x.is_cpu or x.dim() < 4:
        return x
    # Contiguous frames have a pixel's stride of 1 and a larger one of a channel, unless they are single pixels. A graph
    # that is recorded from them meets others later.
    if torch.jit.is_scripting():
        anew = x.stride(1) <= x.stride(-1)
    else:
        anew = torch.jit.is_tracing() or torch.compiler.is_exporting() or x.stride(1) <= x.stride(-1)
    return x.flatten(1).view(x.shape) if anew else x


def _called(name: str, norm: Callable[[int], nn.Module], channels: int, factory: dict[str, Any]) -> nn.Module:
    if isinstance(norm, nn.Module):  # which would be a part of the layer, as an attribute of it
        raise TypeError(
            f"{name} must be a name or a callable that makes a Module, got the Module {type(norm).__name__}"
        )
    module = norm(channels)
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name} must return a Module for a number of channels, got {type(module).__name__}")
    return module.to(**factory)


def reset_parameters(modules: Iterable[Any]) -> None:
    """Calls ``reset_parameters`` of each module, or of the modules in it where it has none of its own."""
    for module in modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        else:
            reset_parameters(module.children())


@torch.no_grad()
def fill_gate_bias(gate: Tensor, value: float | str, chrono_max: int | None) -> None:
    """Fills the bias of z with a number, or for 'chrono' with minus the logarithm of numbers drawn from [1, max - 1].

    log U(1, T-1) is the bias of a gate that keeps; z is the gate that takes, hence the sign.
    """
    if isinstance(value, str):
        gate.copy_(-torch.empty_like(gate).uniform_(1.0, float((chrono_max or 2) - 1)).log())
    else:
        gate.fill_(value)


def package_class(module: nn.Module) -> Any:
    """Returns the module's class in this package, of which a user may have a subclass, or another package a base."""
    return next(base for base in type(module).__mro__ if base.__module__.startswith("convrnn."))


def format_repr(module: nn.Module) -> str:
    """Returns the arguments of the constructor, from attributes of their names: those required, and what is no default."""
    found = []
    for name, parameter in inspect.signature(package_class(module)).parameters.items():
        value = getattr(module, name, parameter.default)  # a subclass may lack one, as device and dtype are lacking
        if isinstance(value, Tensor):
            value = True  # a bias that is learned
        if parameter.default is inspect.Parameter.empty and hasattr(module, name):
            found.append(f"{value!r}")
        elif not _is_default(value, parameter.default):
            found.append(f"{name}={value!r}")
    return ", ".join(found)


def _is_default(value: Any, default: Any) -> bool:
    """Whether a value, or each entry of a list or tuple, is the default; None and False both are none of a thing."""
    if isinstance(value, (list, tuple)) and not isinstance(default, (list, tuple)):
        return all(_is_default(entry, default) for entry in value)
    if value is None or value is False:  # not in (None, False): 0.0 equals False
        return default is None or default is False
    return bool(value == default)
