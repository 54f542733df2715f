"""ConvGRU: convolutional GRU layers over one, two or three spatial dimensions, one or several stacked."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from ._checks import as_int, as_sizes
from ._convolution import Sizes
from ._gru_layer import GRULayer
from ._options import GRUOptions, options_of
from ._parts import Norm
from ._stack import ConvStack

__all__ = ["ConvGRU", "ConvGRU1d", "ConvGRU3d"]


class ConvGRU(ConvStack):
    """z = s(W_z*x + U_z*h), r = s(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1-z).h + z.c in each layer.

    ``*`` is a convolution, ``.`` the elementwise product, s the logistic function. z near 1 takes the candidate c, z
    near 0 keeps the state h. Each layer reads the output of the one before. The input's convolutions, of any kind, are
    computed for all frames at once. Supported options run as one fused op over the sequence (:func:`convrnn.gru_rcn`),
    with ``lengths`` and ``reset`` too; the others loop over time in Python, which a compiler unrolls. Supported are
    recurrent convolutions that are dense, zero-padded and not dilated, without ``reset_after``, ``cell_norm`` and
    ``zoneout``, without ``recurrent_dropout`` in training, and without ``learn_h0`` where there is a ``reset``.

    Parameters of each layer, in ``layers`` and ``backward_layers``: ``W`` (3*hidden, input, *k) packed z, r, c; ``U``
    (2*hidden, hidden, *k) packed z, r; ``C`` (hidden, hidden, *k); ``bias`` (3*hidden).

    Where an argument takes a list, its entries belong to the layers, and are ints or tuples with an int for each
    spatial dimension; one int holds for all layers.

    Args:
        input_size: channels of a frame.
        hidden_sizes: channels of each layer's state, an int for one layer.
        kernel_sizes: kernels of the input's convolutions.
        recurrent_kernel_sizes: kernels of the state's convolutions; None takes ``kernel_sizes``.
        strides: of the input's convolutions; the state has the size of their output.
        paddings: of the input's convolutions, on each side, or 'same': every stride-th pixel of an output of the
            input's size. The state's convolutions keep its size always.
        dilations: of the input's convolutions.
        recurrent_dilations: of the state's convolutions.
        groups: of the input's convolutions, for each gate; an int or one a layer. input_size is depthwise.
        recurrent_groups: of the state's convolutions.
        separable: each convolution a depthwise one, which its gates share, and a 1x1 convolution.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular', for all convolutions.
        bias: learn a bias for each of z, r and c, and with ``reset_after`` one of C*h.
        reset_after: c = tanh(W_c*x + r.(C*h + b)), as in ``torch.nn.GRU``.
        norm: on each layer's input: None, 'layer' (GroupNorm of one group), 'group' or True (up to 64 groups of at
            least 4 channels), or a callable from a number of channels to a Module. A layer can be pickled whole where
            the callable can, which a lambda cannot.
        cell_norm: likewise on W*x, U*h and C*(r.h), before biases; 'layer' and 'group' treat each gate on its own, a
            callable gets 3*hidden, 2*hidden and hidden channels.
        residual: add each layer's input to its output, through a convolution without bias, of the layer's own kernel,
            stride and padding, where the channels or the size of the frame change.
        dropout: probability of zeroing an element of a layer's output, the last layer's excepted, while training.
        recurrent_dropout: likewise of an element of the state that the recurrent convolutions read; the mask is drawn
            once a call (variational dropout).
        zoneout: probability that an element of the state keeps its value in a step; (1-p).z stands for it in eval.
        gate_bias: initial bias of z, or 'chrono': minus the logarithm of uniform numbers in [1, chrono_max - 1].
        chrono_max: the longest dependency expected, in frames, for 'chrono'.
        learn_h0: learn the state before the first frame, one number a channel, which starts at zero. With ``reset`` the
            layer then loops over time, for the fused op resets to zeros only.
        bidirectional: a second layer beside each, with weights of its own, reads the sequence from its end; its output
            joins the other's over the channels.
        batch_first: True for sequences (B, T, ...), False for (T, B, ...).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, a list has not one entry a layer, or arguments exclude one another.

    Source:
        Ballas et al., ICLR 2016, arXiv 1511.06432; Gal and Ghahramani, arXiv 1512.05287 (recurrent dropout); Krueger
        et al., arXiv 1606.01305 (zoneout); Tallec and Ollivier, arXiv 1804.11188 (chrono); Ba et al., arXiv 1607.06450
        (normalised cells).

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.ConvGRU(3, [8, 16], kernel_sizes=[5, 3], strides=[2, 1], norm="layer", residual=True)
        >>> out, h = rnn(torch.rand(2, 4, 3, 6, 6))  # a clip
        >>> out.shape, [state.shape for state in h]
        (torch.Size([2, 4, 16, 3, 3]), [torch.Size([2, 8, 3, 3]), torch.Size([2, 16, 3, 3])])
        >>> out, h = rnn(torch.rand(2, 3, 6, 6), h)  # the next frame
        >>> out.shape
        torch.Size([2, 16, 3, 3])
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | Sequence[int],
        kernel_sizes: Sizes,
        *,
        recurrent_kernel_sizes: Sizes | None = None,
        strides: Sizes = 1,
        paddings: Sizes | str = "same",
        dilations: Sizes = 1,
        recurrent_dilations: Sizes = 1,
        groups: int | Sequence[int] = 1,
        recurrent_groups: int | Sequence[int] = 1,
        separable: bool = False,
        padding_mode: str = "zeros",
        bias: bool = True,
        reset_after: bool = False,
        norm: Norm = None,
        cell_norm: Norm = None,
        residual: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        gate_bias: float | str = 0.0,
        chrono_max: int | None = None,
        learn_h0: bool = False,
        bidirectional: bool = False,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), *as_sizes("hidden_sizes", hidden_sizes)]
        arguments = locals()
        super().__init__(sizes, arguments, GRULayer, options_of(GRUOptions, arguments))


class ConvGRU1d(ConvGRU):
    """:class:`ConvGRU` over (B, T, input_size, L): h' = (1-z).h + z.c with convolutions along one dimension.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.ConvGRU1d(3, 8, kernel_sizes=5, padding_mode="circular")
        >>> rnn(torch.rand(2, 4, 3, 16))[0].shape
        torch.Size([2, 4, 8, 16])
    """

    spatial_dims: ClassVar[int] = 1


class ConvGRU3d(ConvGRU):
    """:class:`ConvGRU` over (B, T, input_size, D, H, W): h' = (1-z).h + z.c with convolutions of volumes.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.ConvGRU3d(3, 8, kernel_sizes=[(1, 3, 3)])
        >>> rnn(torch.rand(2, 2, 3, 4, 5, 6))[0].shape
        torch.Size([2, 2, 8, 4, 5, 6])
    """

    spatial_dims: ClassVar[int] = 3
