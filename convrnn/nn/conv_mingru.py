"""Convolutional minGRU: a convolution per frame and the scan over time; one layer, or several stacked."""

import torch
from torch import Tensor, nn

from ._checks import as_int, as_pair, as_pairs, as_probability, as_sizes, check_sequence
from ._gru_layer import make_norm
from .mingru import MinGRUBase, MinGRULayer, MinGRUStack, scan, zero_states

__all__ = ["MinConv2dGRU", "MinConv2dGRUCell"]


def state_shapes(
    size: list[int],
    hidden_sizes: list[int],
    kernel_sizes: list[tuple[int, int]],
    strides: list[tuple[int, int]],
    paddings: list[tuple[int, int]],
) -> list[list[int]]:
    """Returns (hidden_i, H_i, W_i) of each layer for an input of ``size`` (H, W)."""
    shapes: list[list[int]] = []
    height, width = size[0], size[1]
    for hidden, kernel, stride, padding in zip(hidden_sizes, kernel_sizes, strides, paddings):  # noqa: B905  TorchScript's zip takes no strict
        if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
            raise ValueError(f"x is too small: a kernel of {kernel} with padding {padding} meets {height} x {width}")
        height = (height + 2 * padding[0] - kernel[0]) // stride[0] + 1
        width = (width + 2 * padding[1] - kernel[1]) // stride[1] + 1
        shapes.append([hidden, height, width])
    return shapes


def keeps_size(kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """True if the convolution's output has the input's height and width, whatever they are."""
    return stride == (1, 1) and all(2 * p == k - 1 for k, p in zip(kernel, padding, strict=True))


class MinConv2dGRUCell(MinGRUBase):
    """z = s(gate), h' = (1-z).h + z.g(hidden) with [gate, hidden] = Conv2d(x): one convolutional minGRU layer.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. The gate is the first half of the convolution ``to_gate_hidden`` (input_size ->
    2*hidden_size channels). The state has the size of the convolution's output.

    Args:
        input_size: channels of a frame.
        hidden_size: channels of the state and of the output.
        kernel_size: an int or (height, width).
        stride: an int or (height, width).
        padding: zeros on each side of a frame, an int or (height, width).
        bias: learn the convolution's bias.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: a size is no int.
        ValueError: a size, kernel or stride is not positive, a padding is negative, or one of them is no pair.

    Source:
        Heindl et al., "Convolutional MinGRU", 2024; Feng et al., arXiv 2410.01201.

    Example:
        >>> import torch, convrnn
        >>> cell = convrnn.MinConv2dGRUCell(3, 8, kernel_size=3, stride=2, padding=1)
        >>> out, h = cell(torch.rand(2, 4, 3, 6, 6))
        >>> out.shape, h[0].shape
        (torch.Size([2, 4, 8, 3, 3]), torch.Size([2, 1, 8, 3, 3]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), as_int("hidden_size", hidden_size, 1)]
        super().__init__("(B, S, input_size, H, W)", sizes)
        self.kernel_size = as_pair("kernel_size", kernel_size, 1)
        self.stride = as_pair("stride", stride, 1)
        self.padding = as_pair("padding", padding, 0)
        self.to_gate_hidden = nn.Conv2d(
            self.layer_sizes[0],
            2 * self.layer_sizes[1],
            self.kernel_size,
            self.stride,
            self.padding,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def run(self, x: Tensor, h: list[Tensor] | None, codes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        gate_hidden = self.to_gate_hidden(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        out, h_n = scan(gate_hidden, None if h is None else h[0], 0, codes)
        return out, [h_n]

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the state that ``h=None`` stands for: [1/2 in (B, 1, hidden, H', W')], of x's dtype and device."""
        check_sequence(x, self.layout, self.layer_sizes[0])
        return zero_states(
            x,
            state_shapes(list(x.shape[-2:]), [self.layer_sizes[1]], [self.kernel_size], [self.stride], [self.padding]),
        )


class MinConv2dGRU(MinGRUStack):
    """Stacked convolutional minGRU: z = s(gate), h' = (1-z).h + z.g(hidden), a layer's output the next layer's input.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. A layer convolves its (normalised) input to [gate, hidden], scans, and adds its residual.

    Args:
        input_size: channels of a frame.
        hidden_sizes: channels of each layer's state, an int for one layer.
        kernel_sizes: an int for all layers, or a list with an int or a pair (height, width) per layer.
        strides: likewise.
        paddings: likewise; zeros on each side of a layer's input.
        dropout: probability of zeroing an element of a layer's output, the last layer's excepted, while training.
        residual: add each layer's input to its output, through a convolution without bias, of the layer's own kernel,
            stride and padding, where the channels or the size of the frame change.
        bias: learn the biases of the convolutions that the scan reads.
        norm: GroupNorm on each layer's input, with up to 64 groups of at least 4 channels.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: a size is no int, or ``dropout`` no number.
        ValueError: a size, kernel or stride is not positive, a padding is negative, ``dropout`` lies outside [0, 1],
            ``hidden_sizes`` is empty, or another list has not one entry per layer.

    Source:
        Heindl et al., "Convolutional MinGRU", 2024; Feng et al., arXiv 2410.01201.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.MinConv2dGRU(3, [8, 16], kernel_sizes=3, strides=[1, 2], paddings=1, residual=True)
        >>> out, h = rnn(torch.rand(2, 4, 3, 6, 6))
        >>> out.shape, [state.shape for state in h]
        (torch.Size([2, 4, 16, 3, 3]), [torch.Size([2, 1, 8, 6, 6]), torch.Size([2, 1, 16, 3, 3])])
    """

    kernel_sizes: list[tuple[int, int]]
    strides: list[tuple[int, int]]
    paddings: list[tuple[int, int]]

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | list[int],
        kernel_sizes: int | list[int] | list[tuple[int, int]],
        *,
        strides: int | list[int] | list[tuple[int, int]] = 1,
        paddings: int | list[int] | list[tuple[int, int]] = 0,
        dropout: float = 0.0,
        residual: bool = False,
        bias: bool = True,
        norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), *as_sizes("hidden_sizes", hidden_sizes)]
        kernels = as_pairs("kernel_sizes", kernel_sizes, 1, len(sizes) - 1)
        steps = as_pairs("strides", strides, 1, len(sizes) - 1)
        pads = as_pairs("paddings", paddings, 0, len(sizes) - 1)

        def layer(i: int) -> MinGRULayer:
            size_in, size_out = sizes[i], sizes[i + 1]

            def conv(channels: int, bias: bool) -> nn.Conv2d:
                return nn.Conv2d(
                    size_in, channels, kernels[i], steps[i], pads[i], bias=bias, device=device, dtype=dtype
                )

            res_align: nn.Module | None = None
            if residual and size_in == size_out and keeps_size(kernels[i], steps[i], pads[i]):
                res_align = nn.Identity()
            elif residual:
                res_align = conv(size_out, bias=False)
            return MinGRULayer(
                make_norm("norm", bool(norm), size_in, device=device, dtype=dtype) or nn.Identity(),
                conv(2 * size_out, bias=bias),
                res_align,
            )

        layers = [layer(i) for i in range(len(sizes) - 1)]
        super().__init__("(B, S, input_size, H, W)", sizes, layers, as_probability("dropout", dropout))
        self.kernel_sizes, self.strides, self.paddings = kernels, steps, pads

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the states that ``h=None`` stands for: 1/2 in (B, 1, hidden_i, H_i, W_i), of x's dtype and device."""
        check_sequence(x, self.layout, self.layer_sizes[0])
        return zero_states(
            x, state_shapes(list(x.shape[-2:]), self.hidden_sizes, self.kernel_sizes, self.strides, self.paddings)
        )
