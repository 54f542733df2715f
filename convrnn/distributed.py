"""Context parallelism: recurrences over sequences whose time axis is split over the processes of a group."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .kernels.layout import state_dtype
from .ops._check import check_mask
from .ops._codes import HOLD, RESTART, encode, has_bit
from .ops.mingru import _check as _check_mingru

__all__ = ["mingru"]


def mingru(
    gate_hidden: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    hold: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z_t) . h_{t-1} + z_t . g(hidden_t) over a sequence whose steps are split over the ranks of a group.

    Rank r holds the r-th part of T; parts may differ in length. In forward each rank scans its part from a zero state
    and sends where that leads, B, and the share of the first state that is forgotten on the way, D = 1 - prod(1 - z);
    every rank then folds the ranks before it, h += B - D.h, and scans its part from the state that results. Backward
    does the same from the last rank to the first. So a rank scans twice in each direction (the first rank once), and a
    pair of states (B, C, *S) in fp32 (fp64 for float64) is all that it sends, whatever T is. A step that ``reset`` marks
    forgets all that came before it, D = 1, on this rank and on those before; one that ``hold`` marks nothing.

    The loss is the sum of the ranks' losses, as it is where each rank sums over its own steps; the gradients are those
    of that sum. Every process of the group must call this, with the same B, C, *S and dtype, and go through its
    backward, or the others wait for it. Backward with ``create_graph=True`` raises RuntimeError.

    Args:
        gate_hidden: (B, T_r, 2*C, *S), this rank's steps, as for :func:`convrnn.mingru`.
        h0: (B, C, *S), the state before the whole sequence's first step. The first rank's is used, and gets the whole
            gradient; the others' gradients are zero. None is minGRU's 'zero' state, g(0) = 1/2.
        reset: (B, T_r) bool, where one of this rank's steps begins a sequence, as for :func:`convrnn.mingru`.
        hold: (B, T_r) bool, where the state passes one of them as it is, as in the padding of a batch.
        group: the process group; None is the default one.

    Returns:
        ``h`` (B, T_r, C, *S), this rank's states, and ``h_n`` (B, C, *S), on every rank the state after the whole
        sequence's last step, so that it can be the ``h0`` of the next piece.

    Raises:
        TypeError: an argument is no floating-point tensor, a mask no bool one.
        ValueError: a shape or device does not fit, this process is not in ``group``, or no process group exists.

    Source: the associative form of a first-order recurrence, Martin and Cundy 2018, arXiv 1709.04057; minGRU: Feng et al.
        2024, arXiv 2410.01201.

    Example:
        >>> store = torch.distributed.HashStore()
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> h, h_n = mingru(torch.zeros(2, 5, 2 * 3))  # under torchrun: each rank with its own steps
        >>> torch.distributed.destroy_process_group()
        >>> h.shape, h_n.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 3]))
    """
    _check_mingru(gate_hidden, h0)
    frames = list(gate_hidden.shape[:2])
    check_mask("reset", reset, frames, True, "gate_hidden", gate_hidden)
    check_mask("hold", hold, frames, True, "gate_hidden", gate_hidden)
    if dist.get_rank(group) < 0:
        raise ValueError("group must be a process group that this process belongs to, got one that it does not")
    h, h_n = _MinGRU.apply(gate_hidden, h0, encode(reset, hold), group)  # type: ignore[no-untyped-call]
    return h, h_n


def _gather_pair(a: Tensor, b: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Every rank's a and b, each (ranks, *a.shape): all that crosses the group."""
    pair = torch.stack((a, b))
    pairs = pair.new_empty(dist.get_world_size(group), *pair.shape)
    dist.all_gather(list(pairs.unbind(0)), pair, group=group)
    first, second = pairs.unbind(1)
    return first, second


def _fold(h: Tensor, end: Tensor, forgotten: Tensor) -> Tensor:
    """The state behind a rank's steps from the one before them; of what is forgotten nothing is left, be it NaN."""
    return torch.where(forgotten == 1.0, end, h + (end - forgotten * h))


class _MinGRU(torch.autograd.Function):
    """The scan of one rank's steps between what comes from the left and, in backward, from the right."""

    @staticmethod
    def forward(
        ctx: Any, gate_hidden: Tensor, h0: Tensor | None, codes: Tensor | None, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        dtype = state_dtype(gate_hidden)
        shape = (gate_hidden.shape[0], gate_hidden.shape[2] // 2, *gate_hidden.shape[3:])
        h = None
        if rank == 0:
            # The sequence's first state is known here: this rank's end forgets all else, and it need not scan again.
            start = gate_hidden.new_full(shape, 0.5, dtype=dtype) if h0 is None else h0.to(dtype)
            h, end = torch.ops.convrnn.mingru(gate_hidden, start, codes)
            forgotten = torch.ones_like(end)
        else:
            start = gate_hidden.new_zeros(shape, dtype=dtype)
            _, end = torch.ops.convrnn.mingru(gate_hidden, start, codes)
            # log(1 - z) and expm1, for 1 - prod(1 - z) loses all z below an epsilon
            kept = F.logsigmoid(-gate_hidden.chunk(2, dim=2)[0].to(dtype))
            if codes is not None:
                kept = kept.masked_fill(has_bit(codes, HOLD, kept), 0.0)
            forgotten = -torch.expm1(kept.sum(dim=1))
            if codes is not None:
                forgotten = forgotten.masked_fill(has_bit(codes, RESTART, kept).any(dim=1), 1.0)
        ends, forgets = _gather_pair(end, forgotten, group)
        h_n = ends[0]
        for r in range(1, ranks):
            if r == rank:
                start = h_n
            h_n = _fold(h_n, ends[r], forgets[r])
        if h is None:
            h, _ = torch.ops.convrnn.mingru(gate_hidden, start, codes)
        ctx.save_for_backward(gate_hidden, start, h, forgets, codes)
        ctx.group, ctx.h0_dtype = group, None if h0 is None else h0.dtype
        ctx.set_materialize_grads(False)
        return h, h_n.to(gate_hidden.dtype if h0 is None else h0.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, dh_n: Tensor | None) -> tuple[Tensor, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: what follows would leave no trace in the graph
            raise RuntimeError("convrnn.distributed.mingru can be differentiated once, not with create_graph=True")
        gate_hidden, start, h, forgets, codes = ctx.saved_tensors
        rank, ranks = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        mine = torch.zeros_like(start)
        if rank > 0 and dh is not None:  # what this rank's own steps ask of the state before them
            _, mine = torch.ops.convrnn.mingru_backward(dh, None, gate_hidden, start, h, codes)
        asked, last = _gather_pair(mine, mine.new_zeros(mine.shape) if dh_n is None else dh_n.to(mine.dtype), ctx.group)
        d_end = last.sum(dim=0)
        for r in range(ranks - 1, rank, -1):
            d_end = _fold(d_end, asked[r], forgets[r])
        dgate_hidden, d_start = torch.ops.convrnn.mingru_backward(dh, d_end, gate_hidden, start, h, codes)
        if ctx.h0_dtype is None:
            return dgate_hidden, None, None, None
        return dgate_hidden, (d_start if rank == 0 else torch.zeros_like(d_start)).to(ctx.h0_dtype), None, None
