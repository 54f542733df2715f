"""Convolutional minGRU over one, two or three spatial dimensions: a convolution per frame and the scan over time."""

from typing import ClassVar

import torch

from ._checks import as_int, as_sizes
from ._convolution import Size, Sizes
from ._parts import Norm
from .mingru import MinCell, MinGRUStack

__all__ = [
    "MinConv1dGRU",
    "MinConv1dGRUCell",
    "MinConv2dGRU",
    "MinConv2dGRUCell",
    "MinConv3dGRU",
    "MinConv3dGRUCell",
]


class MinConvGRUCell(MinCell):
    """The cell of any number of spatial dimensions, which its subclasses set."""

    spatial_dims: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: Size,
        *,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        separable: bool = False,
        padding_mode: str = "zeros",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), as_int("hidden_size", hidden_size, 1)]
        super().__init__(sizes, dict(locals()))


class MinConvGRU(MinGRUStack):
    """The stack of any number of spatial dimensions, which its subclasses set."""

    spatial_dims: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | list[int],
        kernel_sizes: Sizes,
        *,
        strides: Sizes = 1,
        paddings: Sizes | str = 0,
        dilations: Sizes = 1,
        groups: int | list[int] = 1,
        separable: bool = False,
        padding_mode: str = "zeros",
        dropout: float = 0.0,
        residual: bool = False,
        bias: bool = True,
        norm: Norm = False,
        expand: float = 1.0,
        out_proj: bool = False,
        gate_bias: float | str | None = None,
        chrono_max: int | None = None,
        learn_h0: bool = False,
        bidirectional: bool = False,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), *as_sizes("hidden_sizes", hidden_sizes)]
        super().__init__(sizes, dict(locals()))


class MinConv2dGRUCell(MinConvGRUCell):
    """z = s(gate), h' = (1-z).h + z.g(hidden) with [gate, hidden] = Conv2d(x): one convolutional minGRU layer.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. The gate is the first half of the convolution ``to_gate_hidden`` (input_size ->
    2*hidden_size channels). The state has the size of the convolution's output. What stands around a layer, and options
    of the recurrence, are arguments of :class:`MinConv2dGRU`.

    Args:
        input_size: channels of a frame.
        hidden_size: channels of the state and of the output.
        kernel_size: an int or (height, width).
        stride, padding, dilation, groups, separable, padding_mode: as those of :class:`ConvGRUCell`. Gate and candidate
            have ``groups`` of their own, and share a depthwise convolution.
        bias: learn the convolution's bias.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, no int or pair, or arguments exclude one another.

    Source:
        Heindl et al., "Convolutional MinGRU", 2024; Feng et al., arXiv 2410.01201.

    Example:
        >>> import torch, convrnn
        >>> cell = convrnn.MinConv2dGRUCell(3, 8, kernel_size=3, stride=2, padding=1)
        >>> out, h = cell(torch.rand(2, 4, 3, 6, 6))
        >>> out.shape, h[0].shape
        (torch.Size([2, 4, 8, 3, 3]), torch.Size([2, 1, 8, 3, 3]))
    """

    spatial_dims: ClassVar[int] = 2


class MinConv1dGRUCell(MinConvGRUCell):
    """:class:`MinConv2dGRUCell` along one dimension: h' = (1-z).h + z.g(hidden) over (B, S, input_size, L).

    Example:
        >>> import torch, convrnn
        >>> convrnn.MinConv1dGRUCell(3, 8, kernel_size=3, padding="same")(torch.rand(2, 4, 3, 9))[0].shape
        torch.Size([2, 4, 8, 9])
    """

    spatial_dims: ClassVar[int] = 1


class MinConv3dGRUCell(MinConvGRUCell):
    """:class:`MinConv2dGRUCell` of volumes: h' = (1-z).h + z.g(hidden) over (B, S, input_size, D, H, W).

    Example:
        >>> import torch, convrnn
        >>> convrnn.MinConv3dGRUCell(3, 8, kernel_size=(1, 3, 3))(torch.rand(2, 4, 3, 4, 5, 6))[0].shape
        torch.Size([2, 4, 8, 4, 3, 4])
    """

    spatial_dims: ClassVar[int] = 3


class MinConv2dGRU(MinConvGRU):
    """Stacked convolutional minGRU: z = s(gate), h' = (1-z).h + z.g(hidden), a layer's output the next layer's input.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. A layer convolves its (normalised) input to [gate, hidden], scans, projects the state to
    its output where ``expand`` makes them differ, and adds its residual.

    Where an argument takes a list, its entries belong to the layers, and are ints or pairs (height, width); one int
    holds for all layers.

    Args:
        input_size: channels of a frame.
        hidden_sizes: channels of each layer's output, an int for one layer.
        kernel_sizes: kernels of the convolutions.
        strides, paddings, dilations, groups, separable, padding_mode: as those of the input's convolutions of
            :class:`ConvGRU`. Gate and candidate have ``groups`` of their own, and share a depthwise convolution.
        dropout, bias, out_proj, gate_bias, chrono_max, learn_h0, bidirectional, batch_first, device, dtype: as those of
            :class:`MinGRU`, a frame in the place of a step.
        residual: add each layer's input to its output, through a convolution without bias, of the layer's own kernel,
            stride and padding, where the channels or the size of the frame change.
        norm: on each layer's input, as that of :class:`ConvGRU`.
        expand: channels of the state for each of the output, rounded down and at least 1; a 1x1 convolution without bias
            brings them back.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, a list has not one entry a layer, or arguments exclude one another.

    Source:
        Heindl et al., "Convolutional MinGRU", 2024; Feng et al., arXiv 2410.01201.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.MinConv2dGRU(3, [8, 16], kernel_sizes=3, strides=[1, 2], paddings=1, residual=True)
        >>> out, h = rnn(torch.rand(2, 4, 3, 6, 6))
        >>> out.shape, [state.shape for state in h]
        (torch.Size([2, 4, 16, 3, 3]), [torch.Size([2, 1, 8, 6, 6]), torch.Size([2, 1, 16, 3, 3])])
    """

    spatial_dims: ClassVar[int] = 2


class MinConv1dGRU(MinConvGRU):
    """:class:`MinConv2dGRU` along one dimension: h' = (1-z).h + z.g(hidden) over (B, S, input_size, L).

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.MinConv1dGRU(3, [8, 16], kernel_sizes=5, paddings="same", dilations=[1, 2])
        >>> rnn(torch.rand(2, 4, 3, 32))[0].shape
        torch.Size([2, 4, 16, 32])
    """

    spatial_dims: ClassVar[int] = 1


class MinConv3dGRU(MinConvGRU):
    """:class:`MinConv2dGRU` of volumes: h' = (1-z).h + z.g(hidden) over (B, S, input_size, D, H, W).

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.MinConv3dGRU(3, 8, kernel_sizes=3, paddings="same", separable=True)
        >>> rnn(torch.rand(2, 4, 3, 4, 5, 6))[0].shape
        torch.Size([2, 4, 8, 4, 5, 6])
    """

    spatial_dims: ClassVar[int] = 3
