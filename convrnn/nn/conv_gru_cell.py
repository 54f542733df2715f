"""Single layers of ConvGRU, with arguments in the singular, and the update of RAFT made of two of them."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._checks import as_int, check_clip, check_states
from ._convolution import Size
from ._inputs import run_other
from ._masks import read_masks
from ._parts import Norm, described, reset_parameters
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

    plural: ClassVar[bool] = False

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
        super().__init__(
            input_size,
            as_int("hidden_size", hidden_size, 1),
            kernel_size,
            recurrent_kernel_sizes=recurrent_kernel_size,
            strides=stride,
            paddings=padding,
            dilations=dilation,
            recurrent_dilations=recurrent_dilation,
            groups=groups,
            recurrent_groups=recurrent_groups,
            separable=separable,
            padding_mode=padding_mode,
            bias=bias,
            reset_after=reset_after,
            norm=norm,
            cell_norm=cell_norm,
            residual=residual,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            gate_bias=gate_bias,
            chrono_max=chrono_max,
            learn_h0=learn_h0,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        (self.hidden_size,), (self.kernel_size,), (self.stride,) = self.hidden_sizes, self.kernel_sizes, self.strides
        (self.dilation,), (self.recurrent_dilation,) = self.dilations, self.recurrent_dilations
        recurrent = self.recurrent_kernel_sizes
        self.recurrent_kernel_size = None if recurrent is None else recurrent[0]
        self.padding = self.paddings if isinstance(self.paddings, str) else self.paddings[0]
        self.groups, self.recurrent_groups = (
            as_int("groups", groups, 1),
            as_int("recurrent_groups", recurrent_groups, 1),
        )


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


class SepConvGRUCell(nn.Module):
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
        super().__init__()
        common: dict[str, Any] = {
            "dilation": dilation,
            "recurrent_dilation": recurrent_dilation,
            "groups": groups,
            "recurrent_groups": recurrent_groups,
            "separable": separable,
            "padding_mode": padding_mode,
            "bias": bias,
            "reset_after": reset_after,
            "norm": norm,
            "cell_norm": cell_norm,
            "recurrent_dropout": recurrent_dropout,
            "zoneout": zoneout,
            "gate_bias": gate_bias,
            "chrono_max": chrono_max,
            "batch_first": batch_first,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.kernel_size = length = as_int("kernel_size", kernel_size, 1)
        self.horizontal = ConvGRUCell(input_size, hidden_size, (1, length), learn_h0=learn_h0, **common, **factory)
        self.vertical = ConvGRUCell(input_size, hidden_size, (length, 1), residual=residual, **common, **factory)
        self.input_size, self.hidden_size = self.horizontal.input_size, self.horizontal.hidden_size
        self.batch_first, self.learn_h0, self.residual = self.horizontal.batch_first, learn_h0, residual
        for name in common:
            setattr(self, name, getattr(self.horizontal, name))

    def reset_parameters(self) -> None:
        """Initialises all parameters anew, as the constructor did."""
        reset_parameters(self.children())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # of checkpoints from when the first update had a residual too, which nothing read
        state_dict.pop(f"{prefix}horizontal.res_aligns.0.weight", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(
        self,
        x: Tensor,
        h: list[Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs a frame (B, input_size, H, W) or a clip (B, T, input_size, H, W) from the state [(B, hidden_size, H, W)].

        ``lengths`` and ``reset`` are those of :class:`ConvGRU`, and so is a PackedSequence as x.

        Returns:
            out: (B, hidden_size, H, W) or (B, T, hidden_size, H, W); zero behind a row's end.
            h_n: list of the state after the last frame of each row.

        Raises:
            TypeError: an argument is no Tensor, ``h`` no list of one, or the dtype of a mask does not fit.
            ValueError: a shape or a mask's device does not fit, or a PackedSequence has ``lengths`` beside it.
        """
        if not isinstance(x, Tensor):
            found = run_other(self, SepConvGRUCell.forward, x, h, lengths, reset, self.batch_first)
            if found is not None:
                return found
        if check_clip(x, 2, self.input_size, self.batch_first):
            return self._update(x, h, lengths, reset)
        time = 1 if self.batch_first else 0
        clip = x if time == 1 else x.transpose(0, 1)
        live, reset = read_masks(clip, False, self.batch_first, lengths, reset)
        check_states(h, 1)
        out: list[Tensor] = []
        state = self.init_hidden_state(x) if h is None else [*h]
        for t, frame in enumerate(clip.unbind(1)):
            there = None if live is None else live[:, t].long()  # one frame of a row, or none
            frame_out, state = self._update(frame, state, there, None if reset is None else reset[:, t])
            out.append(frame_out)
        if not out:
            return state[0].unsqueeze(time).narrow(time, 0, 0), state
        return torch.stack(out, time), state

    def _update(
        self, x: Tensor, h: list[Tensor] | None, lengths: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        _, state = self.horizontal(x, h, lengths=lengths, reset=reset)
        out, state = self.vertical(x, state, lengths=lengths)
        return out, state

    def step(
        self, x: Tensor, h: list[Tensor] | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs one frame (B, input_size, H, W)."""
        if isinstance(x, Tensor) and x.dim() != 4:
            raise ValueError(f"x must be one frame (B, {self.input_size}, H, W), got shape {list(x.shape)}")
        check_clip(x, 2, self.input_size, self.batch_first)
        return self._update(x, h, None, reset)

    def init_hidden_state(self, x: Tensor) -> list[Tensor]:
        """Returns the state that ``h=None`` stands for, of the dtype and device of x."""
        return self.horizontal.init_hidden_state(x)

    def extra_repr(self) -> str:
        return described(self)
