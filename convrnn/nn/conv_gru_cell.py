"""Single layers of ConvGRU, with arguments in the singular, and the update of RAFT made of two of them."""

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._checks import as_int
from ._convolution import Size
from ._gru_layer import GRULayer
from ._masks import Masks
from ._options import GRUOptions, options_of
from ._parts import Norm, reset_parameters
from ._recurrent import RecurrentLists, State
from ._stack import ConvStack
from .conv_gru import ConvGRU

__all__ = ["ConvGRUCell", "ConvGRUCell1d", "ConvGRUCell3d", "SepConvGRUCell"]


class ConvGRUCell(ConvGRU):
    """z = s(W_z*x + U_z*h), r = s(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1-z).h + z.c: one layer.

    z near 1 takes the candidate c, z near 0 keeps the state h. This is a :class:`ConvGRU` of one layer, with its
    arguments in the singular; like it, it takes whole clips too. The state is a list of one tensor.

    Args:
        input_size: channels of a frame.
        hidden_size: channels of the state and of the output.
        kernel_size: kernel of the input's convolutions, an int or an int for each dimension; so are the next ones.
        recurrent_kernel_size: kernel of the state's convolutions; None takes ``kernel_size``.
        stride: of the input's convolutions.
        padding: of the input's convolutions, or 'same'.
        dilation: of the input's convolutions.
        recurrent_dilation: of the state's convolutions.
        groups: of the input's convolutions, for each gate; input_size is depthwise.
        recurrent_groups: of the state's convolutions.
        separable, padding_mode, bias, reset_after, norm, cell_norm, residual, recurrent_dropout, zoneout, gate_bias,
            chrono_max, learn_h0, batch_first, device, dtype: as those of :class:`ConvGRU`.

    Raises:
        TypeError: an argument has the wrong type, or there is no such argument.
        ValueError: a number is out of range, or arguments exclude one another.

    Source:
        Ballas et al., ICLR 2016, arXiv 1511.06432.

    Example:
        >>> import torch, convrnn
        >>> cell = convrnn.ConvGRUCell(3, 8, kernel_size=3, reset_after=True)
        >>> out, h = cell(torch.rand(2, 3, 6, 6))
        >>> out.shape, h[0].shape
        (torch.Size([2, 8, 6, 6]), torch.Size([2, 8, 6, 6]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: Size,
        *,
        recurrent_kernel_size: Size | None = None,
        stride: Size = 1,
        padding: Size | str = "same",
        dilation: Size = 1,
        recurrent_dilation: Size = 1,
        groups: int = 1,
        recurrent_groups: int = 1,
        separable: bool = False,
        padding_mode: str = "zeros",
        bias: bool = True,
        reset_after: bool = False,
        norm: Norm = None,
        cell_norm: Norm = None,
        residual: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        gate_bias: float | str = 0.0,
        chrono_max: int | None = None,
        learn_h0: bool = False,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [as_int("input_size", input_size, 1), as_int("hidden_size", hidden_size, 1)]
        arguments = locals()
        ConvStack.__init__(self, sizes, arguments, GRULayer, options_of(GRUOptions, arguments), ending="")
        self.hidden_size = sizes[1]


class ConvGRUCell1d(ConvGRUCell):
    """:class:`ConvGRUCell` over frames (B, input_size, L) and clips of them: h' = (1-z).h + z.c.

    Example:
        >>> import torch, convrnn
        >>> convrnn.ConvGRUCell1d(3, 8, kernel_size=3)(torch.rand(2, 3, 9))[0].shape
        torch.Size([2, 8, 9])
    """

    spatial_dims: ClassVar[int] = 1


class ConvGRUCell3d(ConvGRUCell):
    """:class:`ConvGRUCell` over volumes (B, input_size, D, H, W) and clips of them: h' = (1-z).h + z.c.

    Example:
        >>> import torch, convrnn
        >>> convrnn.ConvGRUCell3d(3, 8, kernel_size=3)(torch.rand(2, 3, 4, 4, 4))[0].shape
        torch.Size([2, 8, 4, 4, 4])
    """

    spatial_dims: ClassVar[int] = 3


class SepConvGRUCell(RecurrentLists):
    """h <- ConvGRUCell(x, h) with kernels 1 x k, then h <- ConvGRUCell(x, h) with kernels k x 1: two updates a frame.

    In each, z near 1 takes the candidate, z near 0 keeps the state: h' = (1-z).h + z.c. The update of RAFT.

    Args:
        input_size: channels of a frame.
        hidden_size: channels of the state and of the output.
        kernel_size: the length k of both kernels.
        dilation, recurrent_dilation, groups, recurrent_groups, separable, padding_mode, bias, reset_after, norm,
            cell_norm, recurrent_dropout, zoneout, gate_bias, chrono_max, batch_first, device, dtype: of both updates, as
            those of :class:`ConvGRUCell`.
        residual: add each frame to the output, as :class:`ConvGRUCell` does, once.
        learn_h0: learn the state before the first frame.

    Raises:
        TypeError: an argument has the wrong type, or there is no such argument.
        ValueError: a number is out of range, or arguments exclude one another.

    Source:
        Teed and Deng, "RAFT: Recurrent All-Pairs Field Transforms for Optical Flow", ECCV 2020, arXiv 2003.12039.

    Example:
        >>> import torch, convrnn
        >>> cell = convrnn.SepConvGRUCell(3, 8)
        >>> out, h = cell(torch.rand(2, 3, 6, 6))
        >>> out.shape, h[0].shape
        (torch.Size([2, 8, 6, 6]), torch.Size([2, 8, 6, 6]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        kernel_size: int = 5,
        *,
        dilation: Size = 1,
        recurrent_dilation: Size = 1,
        groups: int = 1,
        recurrent_groups: int = 1,
        separable: bool = False,
        padding_mode: str = "zeros",
        bias: bool = True,
        reset_after: bool = False,
        norm: Norm = None,
        cell_norm: Norm = None,
        residual: bool = False,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        gate_bias: float | str = 0.0,
        chrono_max: int | None = None,
        learn_h0: bool = False,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        arguments = locals()
        super().__init__()
        names = inspect.signature(ConvGRUCell).parameters.keys() - {"kernel_size", "residual", "learn_h0"}
        common = {name: value for name, value in arguments.items() if name in names}
        self.kernel_size = length = as_int("kernel_size", kernel_size, 1)
        self.horizontal = ConvGRUCell(kernel_size=(1, length), learn_h0=learn_h0, **common)
        self.vertical = ConvGRUCell(kernel_size=(length, 1), residual=residual, **common)
        for name in common.keys() - {"device", "dtype"}:
            setattr(self, name, getattr(self.horizontal, name))
        self.learn_h0, self.residual = learn_h0, residual
        self.set_interface(f"x must be one frame (B, {self.input_size}, H, W)", 4, 1, self.batch_first)

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        reset_parameters(self.children())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # of checkpoints from when the first update had a residual too, which nothing read
        state_dict.pop(f"{prefix}horizontal.res_aligns.0.weight", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def is_frame(self, x: Tensor) -> bool:
        return self.horizontal.is_frame(x)

    def run(self, x: Tensor, h: list[State] | None, masks: Masks) -> tuple[Tensor, list[State]]:
        states = (
            self.horizontal.init_hidden_state(x.transpose(0, 1) if not self.batch_first else x) if h is None else [*h]
        )
        out: list[Tensor] = []
        for t, frame in enumerate(x.unbind(1)):
            lengths = None if masks.valid is None else masks.valid[:, t].long()  # one frame of a row, or none
            reset = None if masks.reset is None else masks.reset[:, t]
            _, states = self.horizontal(frame, states, lengths=lengths, reset=reset)
            frame_out, states = self.vertical(frame, states, lengths=lengths)
            out.append(frame_out)
        return torch.stack(out, 1) if out else states[0].unsqueeze(1)[:, :0], states

    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the state that ``h=None`` stands for, of the dtype and device of x."""
        return self.horizontal.init_hidden_state(x)
