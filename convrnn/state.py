"""What one does with recurrent states between calls: cut their history, restart or reorder rows, change the batch.

A state is what a layer of this package returns beside its output: a tensor, a list of tensors or any nest of lists,
tuples and dicts, in which each tensor has the rows of the batch at its first dimension. Each function returns a new
state of the same structure and leaves the given one as it is.
"""

from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .nn._checks import as_int
from .ops._check import check_mask

__all__ = ["detach", "reorder", "reset", "resize", "truncated_bptt"]


def detach(state: Any) -> Any:
    """Returns ``state`` without its history: gradients end here.

    Example:
        >>> h = [torch.ones(2, 3, requires_grad=True) * 2]
        >>> detach(h)[0].requires_grad
        False
    """
    return tree_map(Tensor.detach, _checked(state))


def reset(state: Any, rows: Tensor, initial: Any) -> Any:
    """Returns ``state`` with the chosen rows of the batch set to their initial values, as at a new video.

    Args:
        state: the state.
        rows: (B,) bool, True where a row begins anew, or integer indices of the rows that do.
        initial: the values to begin with: a state of the same structure, which ``init_hidden_state`` of the layer
            gives, or a number: 0 for the GRUs, 1/2 for minGRU.

    Raises:
        TypeError: ``rows`` is no bool or integer Tensor.
        ValueError: the shape of ``rows`` or the structure of ``initial`` does not fit.

    Example:
        >>> reset([torch.ones(3, 1)], torch.tensor([False, True, False]), 0.0)[0].flatten()
        tensor([1., 0., 1.])
    """
    _check_index("rows", rows)
    batch = _batch(state)
    if rows.dtype == torch.bool:
        if list(rows.shape) != [batch]:
            raise ValueError(f"rows must have shape {[batch]}, got {list(rows.shape)}")
        chosen = rows
    else:
        chosen = torch.zeros(batch, dtype=torch.bool, device=rows.device).index_fill(0, rows.long(), True)

    def begin(h: Tensor, first: Tensor) -> Tensor:
        if first.dim() > 0 and first.shape != h.shape:
            raise ValueError(f"initial must have the shape of the state {list(h.shape)}, got {list(first.shape)}")
        return torch.where(chosen.to(h.device).view(-1, *(1 for _ in h.shape[1:])), first, h)

    return _with_initial(begin, state, initial)


def reorder(state: Any, index: Tensor) -> Any:
    """Returns the rows ``index`` (int) of the state, in that order: what a beam search or a shuffled batch needs.

    Raises:
        TypeError: ``index`` is no integer Tensor.
        ValueError: ``index`` has not one dimension.

    Example:
        >>> reorder([torch.tensor([[1.0], [2.0]])], torch.tensor([1, 1, 0]))[0].flatten()
        tensor([2., 2., 1.])
    """
    _check_index("index", index)
    if index.dtype == torch.bool:
        raise TypeError("index must be an integer Tensor, got torch.bool")
    return tree_map(lambda h: h.index_select(0, index.to(h.device)), _checked(state))


def resize(state: Any, batch: int, initial: Any) -> Any:
    """Returns the state for ``batch`` rows: the first ones, followed by initial ones where it grows.

    Args:
        state: the state.
        batch: the new number of rows.
        initial: what new rows hold: a number, or a state of ``batch`` rows, of ``init_hidden_state``.

    Raises:
        ValueError: ``batch`` is negative, or ``initial`` does not fit.

    Example:
        >>> resize([torch.ones(1, 1)], 3, 0.5)[0].flatten()
        tensor([1.0000, 0.5000, 0.5000])
    """
    batch = as_int("batch", batch, 0)

    def change(h: Tensor, first: Tensor) -> Tensor:
        if batch <= h.shape[0]:
            return h[:batch].clone()
        shape = [batch, *h.shape[1:]]
        if first.dim() > 0 and list(first.shape) != shape:
            raise ValueError(f"initial must have shape {shape}, got {list(first.shape)}")
        return torch.cat((h, first.expand(shape)[h.shape[0] :]))

    return _with_initial(change, state, initial)


def truncated_bptt(
    rnn: Callable[..., tuple[Any, Any]],
    x: Any,
    steps: int,
    state: Any = None,
    time_dim: int = 1,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Iterator[tuple[slice, Any, Any]]:
    """Runs ``rnn`` over ``x`` in chunks of ``steps`` frames; gradients reach to the start of a chunk and no further.

    Yields for each chunk its place in time, its output and the state behind it. Call ``backward`` before asking for the
    next: the state that goes on is detached.

    Args:
        rnn: a layer, or what takes (x, state) and returns (out, state).
        x: the sequence; a list of them, of one number of frames, for StackedGRU_RCN.
        steps: frames of a chunk; the last one may have fewer.
        state: the state before the first frame.
        time_dim: dimension of time of x, 0 for a layer with ``batch_first=False``.
        lengths: (B,) frames of each row of the whole sequence; each chunk gets what is left of them.
        reset: bool of the shape of x's first two dimensions, as the layer takes it.

    Raises:
        TypeError: ``steps`` or ``time_dim`` is no int, ``x`` no Tensor and no list of them, or a mask no Tensor of its
            dtype.
        ValueError: ``steps`` is not positive, ``x`` has no such dimension, the Tensors of ``x`` differ in their frames, or the shape or device of a
            mask does not fit.

    Source:
        Williams and Peng, "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network
        Trajectories", 1990.

    Example:
        >>> import convrnn
        >>> rnn, x = convrnn.ConvGRU(3, 4, 3), torch.rand(2, 5, 3, 6, 6)
        >>> for span, out, state in truncated_bptt(rnn, x, steps=2):
        ...     out.square().mean().backward()
        >>> span, out.shape
        (slice(4, 5, None), torch.Size([2, 1, 4, 6, 6]))
    """
    steps = as_int("steps", steps, 1)
    leaves = tree_flatten(x)[0]
    if isinstance(x, PackedSequence) or not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(f"x must be a Tensor or a list of Tensors, got {type(x).__name__}")
    first = leaves[0]
    time_dim = as_int("time_dim", time_dim, -first.dim())
    if time_dim >= first.dim():
        raise ValueError(f"time_dim must be less than the {first.dim()} dimensions of x, got {time_dim}")
    total = first.shape[time_dim]
    if any(leaf.shape[time_dim] != total for leaf in leaves):
        raise ValueError(
            f"x must hold Tensors of one number of frames at dim {time_dim}, got {[leaf.shape[time_dim] for leaf in leaves]}"
        )
    # Of the whole sequence: the layer sees no more than a chunk of them.
    time_dim %= first.dim()
    if lengths is not None:
        check_mask("lengths", lengths, [first.shape[1 if time_dim == 0 else 0]], False, "x", first)
    check_mask("reset", reset, list(first.shape[:2]), True, "x", first)
    for start in range(0, total, steps):
        span = slice(start, min(start + steps, total))

        def part(y: Tensor, span: slice = span) -> Tensor:
            return y.narrow(time_dim, span.start, span.stop - span.start)

        masks = {} if lengths is None else {"lengths": lengths.long() - start}
        if reset is not None:
            masks["reset"] = part(reset)
        out, state = rnn(tree_map(part, x), state, **masks)
        yield span, out, state
        state = detach(state)


def _checked(state: Any) -> Any:
    for h in tree_flatten(state)[0]:
        if not isinstance(h, Tensor) or h.dim() == 0:
            raise TypeError(f"state must be a nest of Tensors with the batch first, got {type(h).__name__} in it")
    return state


def _batch(state: Any) -> int:
    sizes = {h.shape[0] for h in tree_flatten(_checked(state))[0]}
    if len(sizes) != 1:
        raise ValueError(f"state must hold Tensors of one number of rows, got {sorted(sizes)}")
    return sizes.pop()


def _check_index(name: str, index: Tensor) -> None:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex():
        raise TypeError(f"{name} must be a bool or integer Tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    if index.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(index.shape)}")


def _with_initial(change: Callable[[Tensor, Tensor], Tensor], state: Any, initial: Any) -> Any:
    """Maps ``change`` over the state's tensors and their initial values, of the dtype and device of the state."""
    leaves, structure = tree_flatten(_checked(state))
    if isinstance(initial, Real):
        firsts = [h.new_full((), float(initial)) for h in leaves]
    else:
        firsts, other = tree_flatten(initial)
        if other != structure or not all(isinstance(first, Tensor) for first in firsts):
            raise ValueError(f"initial must be a number or a state of the structure {structure}, got {other}")
    changed = [change(h, first.to(h.device, h.dtype)) for h, first in zip(leaves, firsts, strict=True)]
    return tree_unflatten(changed, structure)
