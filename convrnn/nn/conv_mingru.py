"""Convolutional minGRU over one, two or three spatial dimensions: a convolution per frame and the scan over time."""

from typing import ClassVar

import torch
from torch import Tensor

from ._checks import as_bool, as_int, as_sizes, check_sequence
from ._convolution import Conv, Size, Sizes, as_convolutions
from ._mingru_layer import check_read, scan
from ._parts import Norm
from .mingru import MinGRUBase, MinGRUStack, state_size

__all__ = [
    "MinConv1dGRU",
    "MinConv1dGRUCell",
    "MinConv2dGRU",
    "MinConv2dGRUCell",
    "MinConv3dGRU",
    "MinConv3dGRUCell",
]

LAYOUTS = {1: "(B, S, input_size, L)", 2: "(B, S, input_size, H, W)", 3: "(B, S, input_size, D, H, W)"}


class MinConvGRUCell(MinGRUBase):
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
        size_in, size = as_int("input_size", input_size, 1), as_int("hidden_size", hidden_size, 1)
        super().__init__(LAYOUTS[self.spatial_dims], [size_in, size])
        (convolution,) = as_convolutions(
            self.spatial_dims,
            [(size_in, size)],
            kernel_sizes=kernel_size,
            strides=stride,
            paddings=padding,
            dilations=dilation,
            groups=groups,
            separable=separable,
            padding_mode=padding_mode,
            plural=False,
        )
        self.hidden_size, self.bias = size, as_bool("bias", bias)
        self.kernel_size, self.stride, self.dilation = convolution.kernel, convolution.stride, convolution.dilation
        self.padding = padding if isinstance(padding, str) else convolution.each_side
        self.groups, self.separable, self.padding_mode = convolution.groups, separable, padding_mode
        self.to_gate_hidden = Conv(convolution, size_in, size, 2, bias=bias, device=device, dtype=dtype)

    def run(
        self, x: Tensor, h: list[Tensor] | None, codes: Tensor | None, codes_back: Tensor | None, resets: bool
    ) -> tuple[Tensor, list[Tensor]]:
        if not torch.jit.is_scripting():
            check_read(x, self.to_gate_hidden)
        gate_hidden = self.to_gate_hidden(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        out, h_n = scan(gate_hidden, None if h is None else h[0], 0, codes)
        return out, [h_n]

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the state that ``h=None`` stands for: [1/2 in (B, 1, hidden, *S')], of x's dtype and device."""
        frame = check_sequence(x, self.layout, self.input_size)
        size = self.to_gate_hidden.size(list(x.shape[2:]) if frame else list(x.shape[3:]))
        return [x.new_full([x.shape[0], 1, self.hidden_size] + size, 0.5)]

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        self.to_gate_hidden.reset_parameters()


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
        directions = 2 if as_bool("bidirectional", bidirectional) else 1
        inputs = [sizes[0], *(directions * size for size in sizes[1:-1])]
        states = [state_size(size, expand) for size in sizes[1:]]
        convolutions = as_convolutions(
            self.spatial_dims,
            list(zip(inputs, states, strict=True)),
            kernel_sizes=kernel_sizes,
            strides=strides,
            paddings=paddings,
            dilations=dilations,
            groups=groups,
            separable=separable,
            padding_mode=padding_mode,
        )
        super().__init__(
            LAYOUTS[self.spatial_dims],
            sizes,
            convolutions,
            bias=bias,
            norm=norm,
            dropout=dropout,
            residual=residual,
            expand=expand,
            out_proj=out_proj,
            gate_bias=gate_bias,
            chrono_max=chrono_max,
            learn_h0=learn_h0,
            bidirectional=bidirectional,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        self.kernel_sizes = [conv.kernel for conv in convolutions]
        self.strides = [conv.stride for conv in convolutions]
        self.paddings = paddings if isinstance(paddings, str) else [conv.each_side for conv in convolutions]
        self.dilations = [conv.dilation for conv in convolutions]
        self.groups = [conv.groups for conv in convolutions]
        self.separable, self.padding_mode = separable, padding_mode


class MinConv2dGRUCell(MinConvGRUCell):
    """z = s(gate), h' = (1-z).h + z.g(hidden) with [gate, hidden] = Conv2d(x): one convolutional minGRU layer.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. The gate is the first half of the convolution ``to_gate_hidden`` (input_size ->
    2*hidden_size channels). The state has the size of the convolution's output. What stands around a layer, and options
    of the recurrence, are arguments of :class:`MinConv2dGRU`.

    Args:
        input_size: channels of a frame.
        hidden_size: channels of the state and of the output.
        kernel_size: an int or (height, width), as are the next three.
        stride: of the convolution.
        padding: pixels on each side of a frame, or 'same': every stride-th pixel of an output of the input's size.
        dilation: of the convolution.
        groups: of the convolutions of gate and candidate, each by itself; input_size is depthwise.
        separable: a depthwise convolution, which gate and candidate share, and a 1x1 convolution.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
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
        strides: of the convolutions; the state has the size of their output.
        paddings: pixels on each side of a layer's input, or 'same': every stride-th pixel of an output of its size.
        dilations: of the convolutions.
        groups: of the convolutions of gate and candidate, each by itself; an int or one a layer; input_size is depthwise.
        separable: a depthwise convolution, which gate and candidate share, and a 1x1 convolution.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        dropout: probability of zeroing an element of a layer's output, the last layer's excepted, while training.
        residual: add each layer's input to its output, through a convolution without bias, of the layer's own kernel,
            stride and padding, where the channels or the size of the frame change.
        bias: learn the biases of the convolutions that the scan reads.
        norm: on each layer's input: None, 'layer' (GroupNorm of one group), 'group' or True (up to 64 groups of at
            least 4 channels), or a callable from a number of channels to a Module. A layer can be pickled whole where
            the callable can, which a lambda cannot.
        expand: channels of the state for each of the output, rounded down and at least 1; a 1x1 convolution without bias
            brings them back.
        out_proj: have that convolution where the numbers of channels agree, too.
        gate_bias: initial bias of z, or 'chrono': minus the logarithm of uniform numbers in [1, chrono_max - 1]. None
            draws it as the other biases.
        chrono_max: the longest dependency expected, in frames, for 'chrono'.
        learn_h0: learn the state before the first frame, one number a channel, which starts at 1/2.
        bidirectional: a second direction in each layer, with weights of its own, reads the sequence from its end; its
            output joins the other's over the channels.
        batch_first: True for sequences (B, S, ...), False for (S, B, ...).
        device: where the parameters live.
        dtype: their dtype.

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
