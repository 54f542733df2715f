"""ConvGRU: convolutional GRU layers over one, two or three spatial dimensions, one or several stacked."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn.ops._check import autocast_is_on, check_floating, check_same_device, check_same_dtype

from ._checks import (
    as_bool,
    as_gate_bias,
    as_int,
    as_probability,
    as_sizes,
    check_clip,
    check_shape,
    check_states,
)
from ._convolution import Conv, Sizes, as_convolutions
from ._gru_layer import GRULayer
from ._inputs import check_step, run_other
from ._masks import blank, read_masks, resets_before
from ._parts import Norm, described, make_norm, norm_input, reset_parameters

__all__ = ["ConvGRU", "ConvGRU1d", "ConvGRU3d"]


class ConvGRU(nn.Module):
    """z = s(W_z*x + U_z*h), r = s(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1-z).h + z.c in each layer.

    ``*`` is a convolution, ``.`` the elementwise product, s the logistic function. z near 1 takes the candidate c, z
    near 0 keeps the state h. Each layer reads the output of the one before, and computes the input's convolutions, of
    any kind, for all frames at once. A layer whose recurrent convolutions are dense, with zero padding and without
    dilation, runs as one op over the sequence (:func:`convrnn.gru_rcn`), with ``lengths`` and ``reset`` too, as long as
    none of ``reset_after``, ``cell_norm``, ``zoneout`` and ``recurrent_dropout`` (in training) is in use, nor ``reset``
    with ``learn_h0``; every other walks over time. Compiled, such a walk is unrolled.

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
            layer then walks over time, for the op begins anew from zeros alone.
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

    spatial_dims: ClassVar[int] = 2
    plural: ClassVar[bool] = True  # the arguments of several layers: a cell's are named in the singular
    groups: int | list[int]
    recurrent_groups: int | list[int]

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
        super().__init__()
        dims = self.spatial_dims
        self.input_size = as_int("input_size", input_size, 1)
        self.hidden_sizes = as_sizes("hidden_sizes", hidden_sizes)
        self.num_layers = len(self.hidden_sizes)
        self.bidirectional = as_bool("bidirectional", bidirectional)
        directions = 2 if bidirectional else 1
        self.num_states = directions * self.num_layers
        self.batch_first = as_bool("batch_first", batch_first)
        self.dropout = as_probability("dropout", dropout)
        self.residual, self.bias = as_bool("residual", residual), as_bool("bias", bias)
        self.gate_bias, self.chrono_max = as_gate_bias(gate_bias, chrono_max, bias)
        self.reset_after, self.learn_h0 = as_bool("reset_after", reset_after), as_bool("learn_h0", learn_h0)
        self.recurrent_dropout = as_probability("recurrent_dropout", recurrent_dropout)
        self.zoneout = as_probability("zoneout", zoneout)
        self.norm, self.cell_norm = norm, cell_norm

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inputs = [self.input_size, *(directions * size for size in self.hidden_sizes[:-1])]
        common: dict[str, Any] = {"separable": separable, "padding_mode": padding_mode, "plural": self.plural}
        convolutions = as_convolutions(
            dims,
            list(zip(inputs, self.hidden_sizes, strict=True)),
            kernel_sizes=kernel_sizes,
            strides=strides,
            paddings=paddings,
            dilations=dilations,
            groups=groups,
            **common,
        )
        recurrents = as_convolutions(
            dims,
            [(size, size) for size in self.hidden_sizes],
            kernel_sizes=kernel_sizes if recurrent_kernel_sizes is None else recurrent_kernel_sizes,
            strides=1,
            paddings="same",
            dilations=recurrent_dilations,
            groups=recurrent_groups,
            **common,
            prefix="recurrent_",
        )
        self.kernel_sizes = [conv.kernel for conv in convolutions]
        self.strides = [conv.stride for conv in convolutions]
        self.paddings = paddings if isinstance(paddings, str) else [conv.each_side for conv in convolutions]
        self.dilations = [conv.dilation for conv in convolutions]
        self.groups = [conv.groups for conv in convolutions]
        self.recurrent_kernel_sizes = None if recurrent_kernel_sizes is None else [conv.kernel for conv in recurrents]
        self.recurrent_dilations = [conv.dilation for conv in recurrents]
        self.recurrent_groups = [conv.groups for conv in recurrents]
        self.separable, self.padding_mode = separable, padding_mode
        options: dict[str, Any] = {
            "bias": bias,
            "reset_after": reset_after,
            "cell_norm": cell_norm,
            "recurrent_dropout": self.recurrent_dropout,
            "zoneout": self.zoneout,
            "gate_bias": self.gate_bias,
            "chrono_max": self.chrono_max,
            "learn_h0": learn_h0,
        }
        self.layers, self.backward_layers = nn.ModuleList(), nn.ModuleList()
        self.norms, self.res_aligns = nn.ModuleList(), nn.ModuleList()
        for i, (size_in, size) in enumerate(zip(inputs, self.hidden_sizes, strict=True)):
            conv, recurrent = convolutions[i], recurrents[i]
            for direction in (self.layers, self.backward_layers)[:directions]:
                direction.append(GRULayer(size_in, size, conv, recurrent, **options, **factory))
            self.norms.append(make_norm("norm", norm, size_in, **factory) or nn.Identity())
            if residual:
                same = size_in == directions * size and conv.keeps_size
                aligned = replace(conv, groups=1, separable=False)
                self.res_aligns.append(
                    nn.Identity() if same else Conv(aligned, size_in, directions * size, bias=False, **factory)
                )

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        reset_parameters([*self.layers, *self.backward_layers, *self.norms, *self.res_aligns])

    def forward(
        self,
        x: Tensor,
        h: list[Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs every layer over a clip, or over one frame.

        With ``lengths``, what lies behind a row's end has no influence: not on the outputs before it, not on the states
        returned, not on gradients. With ``reset``, nothing before the frame has influence on what follows it; the
        backward direction begins anew on the other side of the cut.

        Args:
            x: clip (B, T, input_size, *S), or (T, B, ...) without ``batch_first``, or one frame (B, input_size, *S);
                float. A PackedSequence of such frames gives a PackedSequence.
            h: the state before the first frame: a list of (B, hidden_i, *S_i), one a layer; when bidirectional two a
                layer, forward first. None for zeros, or for the learned state.
            lengths: (B,) integers, frames of each row; values outside of 0..T act as the nearest of them.
            reset: bool of the shape of x's first two dimensions (B for one frame), True where the state becomes the
                initial one before the frame is read.

        Returns:
            out: output of the last layer, (B, T, hidden, *S'), (T, B, hidden, *S') or (B, hidden, *S'); zero behind a
                row's end.
            h_n: state of each layer and direction behind the last frame it read, before its residual is added.

        Raises:
            TypeError: an argument is no Tensor, ``h`` no list, or a dtype does not fit.
            ValueError: a shape or device does not fit, or a PackedSequence has ``lengths`` beside it.
        """
        if not isinstance(x, Tensor):
            found = run_other(self, ConvGRU.forward, x, h, lengths, reset, self.batch_first)
            if found is not None:
                return found
        frame = check_clip(x, self.spatial_dims, self.input_size, self.batch_first)
        if frame:
            x = x.unsqueeze(1)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        layer: Any = self.layers[0]
        if not autocast_is_on(x.device.type):
            check_same_dtype("x", x, "the parameters", layer.W)
        check_states(h, self.num_states)
        live, reset = read_masks(x, frame, self.batch_first, lengths, reset)
        if live is not None:
            x = blank(x, live)
        states: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if i > 0:
                x = F.dropout(x, self.dropout, self.training)
            frames = x.flatten(0, 1)
            norm = self.norms[i]
            read = norm(frames if isinstance(norm, nn.Identity) else norm_input(frames)).unflatten(0, x.shape[:2])
            given = [None, None] if h is None else self._checked_states(i, h, x)
            out, h_n = layer(read, given[0], live, reset)
            states.append(h_n)
            if self.bidirectional:
                back, h_n = self.backward_layers[i](
                    read.flip(1),
                    given[1],
                    None if live is None else live.flip(1),
                    None if reset is None else resets_before(reset).flip(1),
                )
                states.append(h_n)
                out = torch.cat((out, back.flip(1)), 2)
            if len(self.res_aligns) > 0:
                out = out + self.res_aligns[i](frames).unflatten(0, x.shape[:2])
            x = out
        if live is not None:
            x = blank(x, live)
        if frame:
            return x.squeeze(1), states
        return x if self.batch_first else x.transpose(0, 1), states

    def step(
        self, x: Tensor, h: list[Tensor] | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one frame (B, input_size, *S); what :meth:`forward` does with it, and refuses a clip.

        Raises:
            ValueError: ``x`` is a clip, or the layer bidirectional: what comes later is not there yet.
        """
        if self.bidirectional:
            raise ValueError("step must be called on a layer of one direction, got bidirectional=True")
        check_step(x)
        if isinstance(x, Tensor) and x.dim() != self.spatial_dims + 2:
            raise ValueError(f"x must be one frame (B, {self.input_size}, *S), got shape {list(x.shape)}")
        return self(x, h, reset=reset)

    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the states that ``h=None`` stands for, of the dtype and device of x, a clip or a frame."""
        frame = check_clip(x, self.spatial_dims, self.input_size, self.batch_first)
        x = x.unsqueeze(1) if frame else x if self.batch_first else x.transpose(0, 1)
        states: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            pair: list[Any] = [layer, *([self.backward_layers[i]] if self.bidirectional else [])]
            states += [direction.initial_state(x).to(x.dtype, copy=True) for direction in pair]
            x = states[-1].unsqueeze(1)
        return states

    def _checked_states(self, i: int, h: list[Tensor], x: Tensor) -> list[Tensor | None]:
        """The states of layer i, whose input is x."""
        layer: Any = self.layers[i]
        states: list[Tensor | None] = []
        directions = self.num_states // self.num_layers
        for j in range(directions * i, directions * (i + 1)):
            check_shape(f"h[{j}]", h[j], [x.shape[0], layer.hidden_size, *layer.input.size(list(x.shape[3:]))])
            check_floating(f"h[{j}]", h[j])
            check_same_device(f"h[{j}]", h[j], "x", x)
            states.append(h[j])
        return states

    def extra_repr(self) -> str:
        return described(self)


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
