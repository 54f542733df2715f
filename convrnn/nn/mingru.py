"""minGRU and minLSTM, one layer or several stacked; what every layer of the family does around its scan."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import as_bool, as_int, as_sizes, check_sequence
from ._convolution import Convolution, make_projection, make_res_align, read_convolutions
from ._masks import Masks, reverse_masks
from ._mingru_layer import MinGRULayer, check_read, scan
from ._options import MinGRUOptions, StackOptions, options_of, set_options
from ._parts import Norm, make_norm, reset_parameters, unflatten_frames
from ._recurrent import RecurrentLists, State

__all__ = ["MinGRU", "MinGRUCell", "MinLSTM"]


SIZES = ("", ", L", ", H, W", ", D, H, W")  # of a frame, by its spatial dimensions


class MinGRUBase(RecurrentLists):
    """A layer of the family over sequences of vectors, or of images of ``spatial_dims``."""

    scriptable: ClassVar[bool] = True
    spatial_dims: ClassVar[int] = 0

    def __init__(self, sizes: list[int], directions: int = 1, batch_first: bool = True) -> None:
        super().__init__()
        size = SIZES[self.spatial_dims]
        self.layout = f"({'B, S' if batch_first else 'S, B'}, input_size{size})"
        self.input_size, self.layer_sizes, self.num_layers = sizes[0], tuple(sizes), len(sizes) - 1
        frame, states = f"x must be one frame (B, input_size{size})", directions * self.num_layers
        self.set_interface(frame, self.spatial_dims + 2, states, batch_first, directions == 2)

    def read_convolutions(
        self, channels: list[tuple[int, int]], arguments: dict[str, Any], ending: str = "s"
    ) -> Sequence[Convolution | None]:
        """Returns the convolution of each layer, None for a linear map."""
        return read_convolutions(self, channels, arguments, ending) if self.spatial_dims else [None for _ in channels]

    def is_frame(self, x: Tensor) -> bool:
        return check_sequence(x, self.layout, self.input_size)

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        reset_parameters(self.children())


class MinGRUStack(MinGRUBase):
    """Layer after layer over vectors or, with ``convolutions``, over images; each layer holds its parts."""

    lstm: ClassVar[bool] = False
    if TYPE_CHECKING:  # at run time a ModuleList, which TorchScript takes without an annotation
        hidden_sizes: list[int]
        dropout: float
        layers: Any

    def __init__(self, sizes: list[int], arguments: dict[str, Any]) -> None:
        """Reads the options from the ``locals()`` of a constructor; sizes are those of the input and of each output."""
        options, directions = options_of(MinGRUOptions, arguments), 2 if arguments["bidirectional"] is True else 1
        super().__init__(sizes, directions, arguments["batch_first"])
        inputs = [sizes[0], *(directions * size for size in sizes[1:-1])]
        states = [options.state_channels(size) for size in sizes[1:]]
        convolutions = self.read_convolutions(list(zip(inputs, states, strict=True)), arguments)
        around = options_of(StackOptions, arguments)
        set_options(self, around, options)
        self.hidden_sizes = sizes[1:]
        factory = {"device": arguments["device"], "dtype": arguments["dtype"]}
        self.layers = nn.ModuleList()
        for size_in, size, convolution in zip(inputs, sizes[1:], convolutions, strict=True):
            out, images = directions * size, convolution is not None
            layer = MinGRULayer(
                size_in,
                size,
                convolution,
                options,
                norm=make_norm("norm", around.norm, size_in, images=images, **factory) or nn.Identity(),
                res_align=make_res_align(convolution, size_in, out, **factory) if around.residual else None,
                bidirectional=around.bidirectional,
                time_first=not around.batch_first,
                lstm=self.lstm,
                **factory,
            )
            self.layers.append(layer)

    def run(self, x: Tensor, h: list[State] | None, masks: Masks) -> tuple[Tensor, list[State]]:
        back = reverse_masks(masks) if self.bidirectional else masks
        states: list[State] = []
        for i, layer in enumerate(self.layers):
            if i == 0 and not torch.jit.is_scripting():
                check_read(x, layer.gate_hidden)
            if i > 0 and self.training:
                x = F.dropout(x, self.dropout)
            x, last = layer(x, h, len(states), masks, back)
            states += last
        return x, states

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[State]:
        """Returns the states that ``h=None`` stands for, of x's dtype and device: 1/2, or those learned."""
        frame = self.is_frame(x)
        batch = x.shape[0] if frame or self.batch_first else x.shape[1]
        size = list(x.shape[2:]) if frame else list(x.shape[3:])
        states: list[State] = []
        for layer in self.layers:
            last, size = layer.initial_states(x, batch, size)
            states += last
        return states


class MinCell(MinGRUBase):
    """The projection and the scan alone: a single layer without options."""

    if TYPE_CHECKING:
        to_gate_hidden: Any

    def __init__(self, sizes: list[int], arguments: dict[str, Any]) -> None:
        super().__init__(sizes)
        factory = {"device": arguments["device"], "dtype": arguments["dtype"]}
        self.hidden_size, self.bias = sizes[1], as_bool("bias", arguments["bias"])
        (convolution,) = self.read_convolutions([(sizes[0], sizes[1])], arguments, "")
        self.to_gate_hidden = make_projection(convolution, sizes[0], sizes[1], 2, self.bias, **factory)

    def run(self, x: Tensor, h: list[State] | None, masks: Masks) -> tuple[Tensor, list[State]]:
        if not torch.jit.is_scripting():
            check_read(x, self.to_gate_hidden)
        gate_hidden = unflatten_frames(self.to_gate_hidden(x.flatten(0, 1)), x, False)
        out, h_n = scan(gate_hidden, h, 0, masks.flags)
        return out, [h_n]

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> list[State]:
        """Returns the state that ``h=None`` stands for: [1/2 in (B, 1, hidden_size, *S')], of x's dtype and device."""
        size = list(x.shape[2:]) if self.is_frame(x) else list(x.shape[3:])
        if hasattr(self.to_gate_hidden, "size"):  # the one of a convolution
            size = self.to_gate_hidden.size(size)
        return [x.new_full([x.shape[0], 1, self.hidden_size] + size, 0.5)]


class MinGRUCell(MinCell):
    """z = s(gate), h' = (1-z).h + z.g(hidden) with [gate, hidden] = Linear(x): one minGRU layer over a sequence.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. The gate is the first half of the output of ``to_gate_hidden``, 2*hidden_size features.

    Args:
        input_size: features of a step.
        hidden_size: features of the state and of the output.
        bias: learn the projection's bias.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is not positive.

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201.

    Example:
        >>> import torch, convrnn
        >>> cell = convrnn.MinGRUCell(3, 8)
        >>> out, h = cell(torch.rand(2, 5, 3))  # a whole sequence
        >>> out, h = cell(torch.rand(2, 1, 3), h)  # one step more
        >>> out.shape, h[0].shape
        (torch.Size([2, 1, 8]), torch.Size([2, 1, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), as_int("hidden_size", hidden_size, 1)]
        super().__init__(sizes, dict(locals()))


class MinGRU(MinGRUStack):
    """Stacked minGRU: z = s(gate), h' = (1-z).h + z.g(hidden) in each layer, its output the next layer's input.

    s is the logistic function; g(v) = v + 1/2 for v >= 0 and s(v) otherwise. z near 1 takes the candidate g(hidden), z
    near 0 keeps the state h. A layer projects its (normalised) input to [gate, hidden], scans, projects the state to
    its output where ``expand`` makes them differ, and adds its residual.

    Args:
        input_size: features of a step.
        hidden_sizes: features of each layer's output, an int for one layer.
        bias: learn the biases of the projections that the scan reads.
        norm: on each layer's input: None, True or 'layer' (LayerNorm), 'rms' (RMSNorm), or a callable from a number of
            features to a Module. A layer can be pickled whole where the callable can, which a lambda cannot.
        dropout: probability of zeroing an element of a layer's output, the last layer's excepted, while training.
        residual: add each layer's input to its output, through a Linear without bias where their sizes differ.
        expand: features of the state for each of the output, rounded down and at least 1; a Linear without bias brings them back.
        out_proj: have that Linear where the numbers of features agree, too.
        gate_bias: initial bias of z, or 'chrono': minus the logarithm of uniform numbers in [1, chrono_max - 1]. None
            draws it as the other biases.
        chrono_max: the longest dependency expected, in steps, for 'chrono'.
        learn_h0: learn the state before the first step, one number a feature, which starts at 1/2. ``reset`` then takes a
            second scan.
        bidirectional: a second direction in each layer, with weights of its own, reads the sequence from its end; its
            output joins the other's over the features.
        batch_first: True for sequences (B, S, ...), False for (S, B, ...).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is out of range, ``hidden_sizes`` is empty, or arguments exclude one another.

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201; Tallec and Ollivier, arXiv 1804.11188 (chrono).

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.MinGRU(3, [8, 16], norm=True, residual=True)
        >>> out, h = rnn(torch.rand(2, 5, 3))
        >>> out.shape, [state.shape for state in h]
        (torch.Size([2, 5, 16]), [torch.Size([2, 1, 8]), torch.Size([2, 1, 16])])
    """

    def __init__(
        self,
        input_size: int,
        hidden_sizes: int | list[int],
        *,
        bias: bool = True,
        norm: Norm = False,
        dropout: float = 0.0,
        residual: bool = False,
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


class MinLSTM(MinGRU):
    """Stacked minLSTM: f, i = s(Wx), h' = f/(f+i).h + i/(f+i).g(hidden) in each layer, with the arguments of MinGRU.

    s and g are those of :class:`MinGRU`, whose recurrence this is with z = i/(f+i), the logistic function of
    log i - log f. ``gate_hidden`` packs f, i and the candidate. ``gate_bias`` is the bias of i, and minus that of f.

    Source:
        Feng et al., "Were RNNs All We Needed?", 2024, arXiv 2410.01201.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.MinLSTM(3, [8, 16], residual=True)
        >>> rnn(torch.rand(2, 5, 3))[0].shape
        torch.Size([2, 5, 16])
    """

    lstm: ClassVar[bool] = True
