"""GRU-RCN: the convolutional GRU over a whole sequence of feature maps."""

from typing import ClassVar

import torch
from torch import Tensor

from ._checks import as_bool, as_int, as_pair, check_sequence, check_shape
from ._convolution import Convolution
from ._gru_layer import GRUParameters
from ._inputs import run_other
from ._masks import Masks
from ._options import GRUOptions
from ._recurrent import Recurrent, State

__all__ = ["GRU_RCN"]


class GRU_RCN(GRUParameters, Recurrent):
    """z = s(W_z*x + U_z*h), r = s(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1-z).h + z.c, frame after frame.

    ``*`` is a convolution with zero padding that keeps the frame's size, ``.`` the elementwise product, s the
    logistic function. z near 1 takes the candidate c, z near 0 keeps the state h. An even kernel pads one more row
    or column at the end than at the start, as ``padding="same"`` does in PyTorch.

    Parameters of the module: ``W`` (3*Oh, Ox, kh, kw) packed in the order z, r, c; ``U`` (2*Oh, Oh, kh, kw) in the
    order z, r; ``C`` (Oh, Oh, kh, kw); ``bias`` (3*Oh), packed as ``W``, or None. With Ox = ``in_channels`` and
    Oh = ``nb_kernels``.

    Args:
        in_channels: channels Ox of a frame.
        nb_kernels: channels Oh of the state and of the output.
        kernel_size: size of every kernel, an int or (kh, kw).
        batch_first: True for sequences (B, L, ...), False for (L, B, ...).
        bias: learn a bias for each of z, r and c; it starts at zero.
        recompute: in training save only the hidden states and recompute z, r and c in backward: a quarter of the memory
            of hidden size, for about another forward pass of time (see :func:`convrnn.gru_rcn`).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is not positive, or ``kernel_size`` is no pair.

    Source:
        Ballas et al., "Delving Deeper into Convolutional Networks for Learning Video Representations", ICLR 2016,
        arXiv 1511.06432.

    Example:
        >>> import torch, convrnn
        >>> rnn = convrnn.GRU_RCN(in_channels=5, nb_kernels=8, kernel_size=3)
        >>> out, h_n = rnn(torch.rand(2, 4, 5, 6, 6))
        >>> out.shape, h_n.shape
        (torch.Size([2, 4, 8, 6, 6]), torch.Size([2, 8, 6, 6]))
    """

    single_state: ClassVar[bool] = True
    scriptable: ClassVar[bool] = True

    def __init__(
        self,
        in_channels: int,
        nb_kernels: int,
        kernel_size: int | tuple[int, int],
        batch_first: bool = True,
        *,
        bias: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        in_channels, nb_kernels = as_int("in_channels", in_channels, 1), as_int("nb_kernels", nb_kernels, 1)
        convolution = Convolution(as_pair("kernel_size", kernel_size, 1))
        options = GRUOptions(bias=bias)
        super().__init__(in_channels, nb_kernels, convolution, convolution, options, device=device, dtype=dtype)
        self.in_channels, self.nb_kernels, self.kernel_size = in_channels, nb_kernels, convolution.kernel
        self.recompute = as_bool("recompute", recompute)
        self.set_interface("x must be one frame (B, Ox, H, W)", 4, 1, as_bool("batch_first", batch_first))

    def forward(
        self, x: Tensor, h: Tensor | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs h' = (1-z).h + z.c over all frames, or over one.

        Args:
            x: frames (B, L, Ox, H, W), or (L, B, Ox, H, W) without ``batch_first``, or one frame (B, Ox, H, W); float. A
                PackedSequence of such frames gives a PackedSequence.
            h: initial state (B, Oh, H, W), or (Oh, H, W) for the same one in every row of the batch, or None for zeros.
            lengths, reset: as :class:`convrnn.ConvGRU` takes them.

        Returns:
            out: the state after each frame, (B, L, Oh, H, W), or (L, B, Oh, H, W) without ``batch_first``, or
                (B, Oh, H, W) for one frame; zero behind a row's end.
            h_n: the state after the last frame of each row, (B, Oh, H, W).

        Raises:
            TypeError, ValueError: as :class:`convrnn.ConvGRU` does.
        """
        if not torch.jit.is_scripting() and not isinstance(x, Tensor):
            result = run_other(self, x, h, lengths, reset)
            if result is not None:
                return result
        out, states = self.run_clip(x, None if h is None else [h], lengths, reset)
        return out, states[0]

    def step(self, x: Tensor, h: Tensor | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Runs one frame (B, Ox, H, W); what :meth:`forward` does with it, and refuses a clip.

        Raises:
            ValueError: ``x`` is a clip.
        """
        result: tuple[Tensor, Tensor] = self.run_step(x, h, reset)
        return result

    @torch.jit.export
    def init_hidden_state(self, x: Tensor) -> Tensor:
        """Returns the state that ``h=None`` stands for: zeros (B, Oh, H, W), of the dtype and device of x."""
        batch = x.shape[0] if self.is_frame(x) or self.batch_first else x.shape[1]
        return x.new_zeros([batch, self.nb_kernels, x.shape[-2], x.shape[-1]])

    def is_frame(self, x: Tensor) -> bool:
        return check_sequence(x, "(B, L, Ox, H, W)" if self.batch_first else "(L, B, Ox, H, W)", self.in_channels)

    def run(self, x: Tensor, h: list[State] | None, masks: Masks) -> tuple[Tensor, list[State]]:
        state: Tensor | None = None
        if h is not None:
            state, shape = h[0], [x.shape[0], self.nb_kernels, x.shape[3], x.shape[4]]
            if isinstance(state, Tensor) and state.dim() == 3:
                check_shape("h", state, shape[1:])
                state = state.expand(shape)
            check_shape("h", state, shape)
        out, h_n = self.run_op(x, state, False, masks.flags)
        return out, [h_n]
