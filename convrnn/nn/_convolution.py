"""The convolutions of the layers: one to three dimensions, any padding, in groups or separable, several in one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import as_bool, as_choice, as_int, as_tuple, per_layer

Size = int | Sequence[int]
Sizes = int | Sequence[Size]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class Plan(NamedTuple):
    """What PyTorch's convolutions take; ``outer`` is padded before them. Scriptable."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    outer: list[int]
    mode: str


@dataclass(frozen=True)
class Convolution:
    """A convolution without its weights; ``padding`` holds (before, after) for each dimension, None is 'same'.

    'Same' padding with a stride gives every stride-th pixel of the convolution without one. ``separable`` convolves
    each channel on its own and then mixes the channels of each pixel.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[tuple[int, int], ...] | None = None
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    mode: str = "zeros"
    separable: bool = False
    plan: Plan = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pads, outer = [before for before, _ in self.pads], [pad for pair in reversed(self.pads) for pad in pair]
        if all(before == after for before, after in self.pads) and (self.mode == "zeros" or not any(outer)):
            outer = []
        else:
            pads = [0 for _ in pads]
        plan = Plan([*self.stride], pads, [*self.dilation], self.groups, outer, self.mode)
        object.__setattr__(self, "plan", plan)  # once: a loop over time runs the convolution at each frame

    def shown(self) -> dict[str, Any]:
        """Returns the kernel, and whatever else is not the default, under the names of a cell's arguments."""
        ones = (1,) * len(self.kernel)
        found = {
            "kernel_size": self.kernel,
            "stride": self.stride if self.stride != ones else None,
            "padding": None if self.padding is None else self.each_side,
            "dilation": self.dilation if self.dilation != ones else None,
            "groups": self.groups if self.groups > 1 else None,
            "separable": self.separable or None,
            "padding_mode": self.mode if self.mode != "zeros" else None,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def each_side(self) -> tuple[int, ...]:
        """The padding before each dimension, and after it where an argument gave it."""
        return tuple(before for before, _ in self.pads)

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """Padding (before, after) of each dimension; an even kernel has one more after, as PyTorch's 'same' has."""
        if self.padding is not None:
            return self.padding
        spans = [dilation * (kernel - 1) for dilation, kernel in zip(self.dilation, self.kernel, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)

    @property
    def preserves_size(self) -> bool:
        """True if every input keeps its size."""
        return set(self.stride) == {1} and all(
            before + after == dilation * (kernel - 1)
            for (before, after), dilation, kernel in zip(self.pads, self.dilation, self.kernel, strict=True)
        )

    @property
    def fused(self) -> bool:
        """True if this is the convolution of ``convrnn.gru_rcn``: dense, with 'same' padding of zeros."""
        same = Convolution(self.kernel, dilation=(1,) * len(self.kernel)).pads
        dense = self.groups == 1 and not self.separable and set(self.stride) == set(self.dilation) == {1}
        return dense and self.pads == same and (self.mode == "zeros" or set(self.kernel) == {1})

    @property
    def least(self) -> list[int]:
        """The smallest size of an input."""
        found = []
        for kernel, dilation, (before, after) in zip(self.kernel, self.dilation, self.pads, strict=True):
            wide = {"reflect": max(before, after) + 1, "circular": max(before, after)}.get(self.mode, 0)
            found.append(max(dilation * (kernel - 1) + 1 - before - after, wide))
        return found

    def size(self, size: list[int]) -> list[int]:
        """Returns the size of the output for an input of ``size``; ValueError where that is too small."""
        pads = [pad for pair in self.pads for pad in pair]
        return output_size(size, [*self.kernel], [*self.stride], pads, [*self.dilation], self.mode)

    def shapes(self, channels: int, out_channels: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Returns the shape of the weight, and that of the depthwise one of a separable convolution."""
        if self.separable:
            return (out_channels, channels, *(1 for _ in self.kernel)), (channels, 1, *self.kernel)
        return (out_channels, channels // self.groups, *self.kernel), None

    def check_groups(self, name: str, channels: int, out_channels: int, layer: int) -> None:
        """Raises unless the groups, which the argument ``name`` gave, divide the channels of the layer."""
        if channels % self.groups or out_channels % self.groups:
            raise ValueError(
                f"{name} must divide the {channels} -> {out_channels} channels of layer {layer}, got {self.groups}"
            )
        if self.separable and self.groups > 1:
            raise ValueError(f"{name} must be 1 with separable=True, got {self.groups}")

    def __call__(
        self, x: Tensor, weight: Tensor, depthwise: Tensor | None = None, bias: Tensor | None = None, packed: int = 1
    ) -> Tensor:
        """Convolves (N, channels, *S); ``packed`` convolutions, one after another in ``weight``, all read x."""
        return convolve(x, weight, depthwise, bias, self.plan, packed)


def read_convolutions(
    module: Any, channels: list[tuple[int, int]], arguments: Mapping[str, Any], ending: str = "s", prefix: str = ""
) -> list[Convolution]:
    """Returns the convolution of each layer, from the ``locals()`` of the module's constructor, and sets its attributes.

    Args:
        module: a layer over ``module.spatial_dims`` dimensions; the arguments become attributes of their names.
        channels: the (input, output) channels of each layer.
        arguments: ``kernel_sizes``, ``strides``, ``paddings``, ``dilations``, ``groups``, ``separable``, ``padding_mode``.
        ending: of the names: 's' where an argument may hold an entry for each layer, '' for those of a cell.
        prefix: 'recurrent_' for the convolutions of the state, which preserve its size.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    dims, count = module.spatial_dims, len(channels)
    separable = as_bool("separable", arguments["separable"])
    mode = as_choice("padding_mode", arguments["padding_mode"], PADDING_MODES)

    def entries(name: str, value: Any, dims: int | None = None) -> list[tuple[str, Any]]:
        return per_layer(name, value, count, dims) if ending else [(name, value)]

    def tuples(name: str, value: Any, minimum: int = 1) -> list[tuple[int, ...]]:
        return [as_tuple(*entry, minimum, dims) for entry in entries(f"{prefix}{name}{ending}", value, dims)]

    given = arguments[f"{prefix}kernel_size{ending}"]
    kernels = tuples("kernel_size", arguments[f"kernel_size{ending}"] if prefix and given is None else given)
    strides = tuples("stride", 1 if prefix else arguments[f"stride{ending}"])
    dilations = tuples("dilation", arguments[f"{prefix}dilation{ending}"])
    groups = [as_int(*entry, 1) for entry in entries(f"{prefix}groups", arguments[f"{prefix}groups"])]
    padding: Any = "same" if prefix else arguments[f"padding{ending}"]
    pads: list[Any] = [None for _ in channels]
    if isinstance(padding, str):
        as_choice(f"padding{ending}", padding, ("same",))
    else:
        pads = [tuple((pad, pad) for pad in entry) for entry in tuples("padding", padding, 0)]
    found = []
    for i, pair in enumerate(channels):
        found.append(Convolution(kernels[i], strides[i], pads[i], dilations[i], groups[i], mode, separable))
        found[-1].check_groups(f"{prefix}groups", *pair, i)

    values: dict[str, Any] = {
        "kernel_size": None if given is None else kernels,
        "dilation": dilations,
        "groups": groups,
    }
    if not prefix:
        sides = padding if isinstance(padding, str) else [convolution.each_side for convolution in found]
        values |= {"stride": strides, "padding": sides}
        module.separable, module.padding_mode = separable, mode
    for name, value in values.items():
        setattr(module, f"{prefix}{name.rstrip('s')}s", value)
        if not ending:
            setattr(module, f"{prefix}{name}", value[0] if isinstance(value, list) else value)
    return found


def make_projection(
    convolution: Convolution | None, size_in: int, size_out: int, packed: int, bias: bool, **factory: Any
) -> nn.Module:
    """Returns ``packed`` convolutions in one, or linear maps without a convolution."""
    if convolution is None:
        return nn.Linear(size_in, packed * size_out, bias=bias, **factory)
    return Conv(convolution, size_in, size_out, packed, bias=bias, **factory)


def make_res_align(convolution: Convolution | None, size_in: int, size_out: int, **factory: Any) -> nn.Module:
    """Returns what a layer's input takes to be added to its output: nothing where their shapes agree."""
    if size_in == size_out and (convolution is None or convolution.preserves_size):
        return nn.Identity()
    plain = None if convolution is None else replace(convolution, groups=1, separable=False)
    return make_projection(plain, size_in, size_out, 1, False, **factory)


class Conv(nn.Module):
    """``packed`` convolutions of one kind with weights of their own, all of which read the frames (N, channels, *S).

    Parameters: ``weight`` (packed*out_channels, channels/groups, *kernel), ``bias``; where separable ``depthwise``
    (channels, 1, *kernel) beside a ``weight`` of single pixels. Drawn as those of ``torch.nn.Conv2d``. Scriptable.
    """

    plan: Plan  # whose empty list does not tell TorchScript its type
    if TYPE_CHECKING:  # torch.jit.trace would record an annotated parameter as an Optional, which has no shape
        weight: Tensor
        depthwise: Tensor | None
        bias: Tensor | None

    def __init__(
        self,
        convolution: Convolution,
        channels: int,
        out_channels: int,
        packed: int = 1,
        *,
        bias: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        shape, depthwise = convolution.shapes(channels, packed * out_channels)
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.register_parameter(
            "depthwise", None if depthwise is None else nn.Parameter(torch.empty(depthwise, **factory))
        )
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[0], **factory)) if bias else None)
        self.description = ", ".join(f"{name}={value}" for name, value in convolution.shown().items())
        self.kernel, self.stride = [*convolution.kernel], [*convolution.stride]
        self.dilation = [*convolution.dilation]
        self.pads = [pad for pair in convolution.pads for pad in pair]
        self.groups, self.mode, self.plan = convolution.groups, convolution.mode, convolution.plan
        self.packed = packed
        self.least = convolution.least
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.weight, self.depthwise):
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for i, least in enumerate(self.least):
            if x.shape[i + 2] < least:
                self.size(list(x.shape[2:]))  # which says what is wrong
        return convolve(x, self.weight, self.depthwise, self.bias, self.plan, self.packed)

    def size(self, size: list[int]) -> list[int]:
        """Returns the size of the output for an input of ``size``; ValueError where that is too small."""
        return output_size(size, self.kernel, self.stride, self.pads, self.dilation, self.mode)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} channels, {self.description}, bias={self.bias is not None}"


def convolve(
    x: Tensor, weight: Tensor, depthwise: Tensor | None, bias: Tensor | None, plan: Plan, packed: int
) -> Tensor:
    """``packed`` convolutions of (N, channels, *S), as the plan says. Scriptable."""
    stride, padding, dilation, groups, outer, mode = plan
    if len(outer) > 0:
        x = F.pad(x, outer, "constant" if mode == "zeros" else mode)
    if depthwise is not None:
        x = _convolve(x, depthwise, None, stride, padding, dilation, depthwise.shape[0])
        once = [1] * len(stride)
        return _convolve(x, weight, bias, once, [0] * len(stride), once, 1)
    if groups > 1:
        # They divide each of the packed convolutions, not their pack.
        x = x.repeat([1, packed] + [1] * len(stride))
        groups = groups * packed
    return _convolve(x, weight, bias, stride, padding, dilation, groups)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    if len(stride) == 1:
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)
    if len(stride) == 2:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return F.conv3d(x, weight, bias, stride, padding, dilation, groups)


def output_size(
    size: list[int], kernel: list[int], stride: list[int], pads: list[int], dilation: list[int], mode: str
) -> list[int]:
    """The size of a convolution's output, ``pads`` being (before, after) of each dimension. Scriptable."""
    out: list[int] = []
    for i in range(len(size)):
        extent, before, after = size[i], pads[2 * i], pads[2 * i + 1]
        span = dilation[i] * (kernel[i] - 1)
        wide = max(before, after)
        if (
            extent + before + after <= span
            or (mode == "reflect" and wide > extent - 1)
            or (mode == "circular" and wide > extent)
        ):
            raise ValueError(
                f"x is too small: a kernel of {kernel} with dilation {dilation} and {mode} padding {pads} meets {size}"
            )
        out.append((extent + before + after - span - 1) // stride[i] + 1)
    return out
