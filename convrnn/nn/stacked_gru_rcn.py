"""Stacked GRU-RCN: a recurrent layer over each level of a network's feature maps, connected from the bottom up."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import as_bool, as_pair, as_sizes, check_sequence, check_shape, check_states
from ._convolution import Convolution
from ._gru_layer import GRULayer
from ._inputs import run_other
from ._masks import NO_MASKS, Masks, mask_padding, read_masks
from ._options import GRUOptions
from ._parts import unflatten_frames
from ._recurrent import Recurrent, State

__all__ = ["StackedGRU_RCN"]


class _Weights(nn.ParameterList):
    """Parameters that are read by a call, for tools that compute a weight before its module runs, like pruning."""

    def __call__(self) -> list[Tensor]:
        return nn.Module.__call__(self)

    def forward(self) -> list[Tensor]:
        return list(self)


class _Level(GRULayer):
    """A layer whose z and r read ``bottom_up`` (N, 2*hidden_size, *S) beside the frames."""

    def forward(
        self,
        x: Tensor,
        h: list[State] | None = None,
        i: int = 0,
        masks: Masks = NO_MASKS,
        frames: Tensor | None = None,
        bottom_up: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        state = None if h is None else h[i]
        if bottom_up is None:
            return self.run_op(x, state, False, masks.flags)
        z_r, c = self.project_input(x.flatten(0, 1)).split([2 * self.hidden_size, self.hidden_size], 1)
        return self.run_op(unflatten_frames(torch.cat((z_r + bottom_up, c), 1), x, False), state, True, masks.flags)


class StackedGRU_RCN(Recurrent):
    """z = s(W_z*x + V_z*g + U_z*h), r = s(W_r*x + V_r*g + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1-z).h + z.c a level.

    x is the level's own feature map and g the new state of the level below at the same frame, max-pooled to the size of
    this level; the lowest level has none. z near 1 takes the candidate c, z near 0 keeps the state h. Each level is one op
    over the sequence (:func:`convrnn.gru_rcn`).

    Parameters: those of GRU_RCN for each level, in ``levels``, and ``bottom_up`` (2*Oh, Oh below, kh, kw) packed z, r
    for each level but the lowest.

    Args:
        in_channels: channels of the feature map of each level, from the bottom up.
        nb_kernels: channels of each level's state.
        kernel_size: size of every kernel, an int or (kh, kw).
        bias: learn a bias for each of z, r and c; it starts at zero.
        batch_first: True for sequences (B, L, ...), False for (L, B, ...).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is not positive, or the two lists differ in length.

    Source:
        Ballas et al., ICLR 2016, arXiv 1511.06432, section 3.2.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.StackedGRU_RCN(in_channels=[4, 8], nb_kernels=[3, 5], kernel_size=3)
        >>> outs, h = rnn([torch.rand(2, 6, 4, 8, 8), torch.rand(2, 6, 8, 4, 4)])
        >>> [out.shape for out in outs], h[1].shape
        ([torch.Size([2, 6, 3, 8, 8]), torch.Size([2, 6, 5, 4, 4])], torch.Size([2, 5, 4, 4]))
    """

    takes_levels: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: Sequence[int],
        nb_kernels: Sequence[int],
        kernel_size: int | tuple[int, int],
        *,
        bias: bool = False,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.nb_kernels = as_sizes("in_channels", in_channels), as_sizes("nb_kernels", nb_kernels)
        if len(self.in_channels) != len(self.nb_kernels):
            raise ValueError(
                f"nb_kernels must hold one entry for each of the {len(self.in_channels)} levels of in_channels, "
                f"got {len(self.nb_kernels)}"
            )
        self.set_interface(
            "xs must hold maps of one frame (B, Ox, H, W)",
            4,
            len(self.in_channels),
            as_bool("batch_first", batch_first),
        )
        self.kernel_size, self.bias = as_pair("kernel_size", kernel_size, 1), as_bool("bias", bias)
        self.convolution = Convolution(self.kernel_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.levels = nn.ModuleList(
            _Level(size_in, size, self.convolution, self.convolution, GRUOptions(bias=bias), **factory)
            for size_in, size in zip(self.in_channels, self.nb_kernels, strict=True)
        )
        self.bottom_up = _Weights(
            torch.empty(2 * size, size_below, *self.convolution.kernel, **factory)
            for size_below, size in zip(self.nb_kernels[:-1], self.nb_kernels[1:], strict=True)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws each packed kernel from Xavier's uniform distribution and zeroes the biases."""
        levels: list[Any] = [*self.levels]
        for level in levels:
            level.reset_parameters()
        for weight in self.bottom_up:
            nn.init.xavier_uniform_(weight)

    def forward(
        self,
        xs: Sequence[Tensor],
        h: list[Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs all levels over all frames, or over one.

        Args:
            xs: the feature maps of each level, (B, L, Ox_i, H_i, W_i), or (L, B, ...) without ``batch_first``, or those
                of one frame (B, Ox_i, H_i, W_i); float. PackedSequences of such maps, of the same lengths at every level,
                give PackedSequences.
            h: the state of each level, a list of (B, Oh_i, H_i, W_i), or None for zeros.
            lengths, reset: as :class:`convrnn.ConvGRU` takes them, for all levels.

        Returns:
            outs: the states of each level after each frame, a list of (B, L, Oh_i, H_i, W_i), (L, B, ...) or
                (B, Oh_i, H_i, W_i); zero behind a row's end.
            h_n: the states after the last frame of each row, shaped as ``h``.

        Raises:
            TypeError, ValueError: as :class:`convrnn.ConvGRU` does, or the number of levels does not fit, or
                PackedSequences differ in their lengths.
        """
        result = run_other(self, xs, h, lengths, reset)
        if result is not None:
            return result
        frame = self.are_frames(xs)
        maps = [x.unsqueeze(1) if frame else x if self.batch_first else x.transpose(0, 1) for x in xs]
        check_states(h, len(self.levels))
        masks = read_masks(maps[0], frame, self.batch_first, lengths, reset)
        outs: list[Tensor] = []
        states: list[Tensor] = []
        bottom_up = self.bottom_up()
        for i, (x, level) in enumerate(zip(maps, self.levels, strict=True)):
            x, pooled = mask_padding(x, masks.valid), None
            if i > 0:
                frames, size = outs[-1].flatten(0, 1), x.shape[3:]
                if frames.shape[2:] != size:
                    frames = F.adaptive_max_pool2d(frames, size)
                pooled = self.convolution(frames, bottom_up[i - 1])
            if h is not None:
                check_shape(f"h[{i}]", h[i], [x.shape[0], self.nb_kernels[i], *x.shape[3:]])
            out, state = level(x, h, i, masks, bottom_up=pooled)
            outs.append(out)
            states.append(state)
        outs = [mask_padding(out, masks.valid) for out in outs]
        if frame:
            return [out.squeeze(1) for out in outs], states
        return (outs if self.batch_first else [out.transpose(0, 1) for out in outs]), states

    def step(
        self, xs: Sequence[Tensor], h: list[Tensor] | None = None, *, reset: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs the maps of one frame, (B, Ox_i, H_i, W_i); what :meth:`forward` does with it, and refuses clips.

        Raises:
            ValueError: ``xs`` holds clips.
        """
        result: tuple[list[Tensor], list[Tensor]] = self.run_step(xs, h, reset)
        return result

    def init_hidden_state(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """Returns the states that ``h=None`` stands for: zeros, of the dtype and device of each level's maps."""
        batch = 0 if self.are_frames(xs) or self.batch_first else 1
        return [x.new_zeros(x.shape[batch], n, *x.shape[-2:]) for x, n in zip(xs, self.nb_kernels, strict=True)]

    def are_frames(self, xs: Sequence[Tensor]) -> bool:
        """Returns whether the maps are those of one frame, and raises if they are no clips either."""
        if not isinstance(xs, (list, tuple)):
            raise TypeError(f"xs must be a list of {len(self.levels)} Tensors, got {type(xs).__name__}")
        if len(xs) != len(self.levels):
            raise ValueError(f"xs must hold the maps of {len(self.levels)} levels, got {len(xs)}")
        layout = "(B, L, Ox, H, W)" if self.batch_first else "(L, B, Ox, H, W)"
        frames = [check_sequence(x, layout, channels) for x, channels in zip(xs, self.in_channels, strict=True)]
        if len(set(frames)) == 2:
            raise ValueError(f"xs must hold clips or maps of one frame, got both: {[list(x.shape) for x in xs]}")
        leads = [list(x.shape[:-3]) for x in xs]  # compared and not hashed: sizes are symbols under torch.export
        if any(lead != leads[0] for lead in leads):
            raise ValueError(f"xs must hold maps of one batch and number of frames, got {leads}")
        return frames[0]
