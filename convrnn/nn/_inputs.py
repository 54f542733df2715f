"""What the layers take in the place of Tensors: packed sequences, and the proxies that torch.fx traces a model with."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ._parts import package_class


def run_other(rnn: Any, x: Any, h: Any, lengths: Any, reset: Any) -> Any:
    """Returns what ``rnn`` does for an x that is a PackedSequence or a torch.fx.Proxy, or a list of them; else None."""
    leaves = _leaves(x)
    for leaf in leaves:
        if isinstance(leaf, Proxy):
            return _record(rnn, leaf.tracer, (x, h, lengths, reset))
    if any(isinstance(leaf, PackedSequence) for leaf in leaves):
        run = partial(package_class(rnn).forward, rnn)  # not that of a subclass, which has run when this one asks
        return _run_packed(run, x, leaves, h, lengths, reset, rnn.batch_first)
    return None


def check_step(x: Any) -> None:
    """TypeError if the frame ``x`` is a PackedSequence, or holds one: these are sequences."""
    for leaf in _leaves(x):
        if isinstance(leaf, PackedSequence):
            raise TypeError("x must be a Tensor, got PackedSequence")


def _leaves(x: Any) -> list[Any]:
    """The entries of a list or tuple, or x alone; a PackedSequence is a tuple of another kind."""
    return [*x] if type(x) in (list, tuple) else [x]


def _record(rnn: nn.Module, tracer: Any, arguments: tuple[Any, ...]) -> Any:
    """Records one call of ``rnn``, a leaf of the graph as the layers of torch.nn are: what it does depends on sizes."""
    name, path = type(rnn).__name__, tracer.path_of_module(rnn)
    if type(rnn).forward is not package_class(rnn).forward:
        raise TypeError(
            f"torch.fx cannot trace into {name}, which overrides forward: take a torch.fx.Tracer whose is_leaf_module is "
            "True for it"
        )
    if path == "":
        raise TypeError(
            f"torch.fx traces models that hold {name}, not {name} itself: write symbolic_trace(torch.nn.Sequential(rnn))"
        )
    return tracer.create_proxy("call_module", path, arguments, {})


def _run_packed(
    run: Callable[..., tuple[Any, Any]],
    x: Any,
    leaves: list[Any],
    h: Any,
    lengths: Any,
    reset: Any,
    batch_first: bool,
) -> tuple[Any, Any]:
    """Runs a layer over packed sequences; h and ``reset`` have the rows in the order of the batch, as what comes back."""
    if lengths is not None:
        raise ValueError("lengths must be None with a PackedSequence, which has its own, got a value")
    first = leaves[0]
    for leaf in leaves:
        if not isinstance(leaf, PackedSequence):
            raise TypeError(
                f"xs must hold Tensors or PackedSequences, got {type(leaf).__name__} beside a PackedSequence"
            )
        if not _same(leaf.batch_sizes, first.batch_sizes) or not _same(leaf.sorted_indices, first.sorted_indices):
            raise ValueError("xs must hold PackedSequences of the same lengths")
    batch, order, back = int(first.batch_sizes[0]), first.sorted_indices, first.unsorted_indices
    # In the order of the lengths, as torch.nn.GRU: turning them back here would wait for the device.
    padded = [pad_packed_sequence(PackedSequence(x.data, x.batch_sizes), batch_first=batch_first) for x in leaves]
    sizes = padded[0][1]

    def rows(state: Any, index: Tensor) -> Any:
        """Those of a state in another order; as it is where it has none, or not those, which the layer then refuses."""
        if isinstance(state, (list, tuple)):
            return type(state)(rows(entry, index) for entry in state)
        has_rows = isinstance(state, Tensor) and state.dim() >= first.data.dim() and state.shape[0] == batch
        return state.index_select(0, index) if has_rows else state

    if order is not None:
        h = rows(h, order)
        if isinstance(reset, Tensor) and reset.dim() == 2 and reset.shape[0 if batch_first else 1] == batch:
            reset = reset.index_select(0 if batch_first else 1, order)
    many = type(x) in (list, tuple)
    given = [clip for clip, _ in padded]
    out, states = run(given if many else given[0], h, lengths=sizes, reset=reset)
    packed = [
        PackedSequence(pack_padded_sequence(y, sizes, batch_first=batch_first).data, first.batch_sizes, order, back)
        for y in (out if many else [out])
    ]
    return packed if many else packed[0], states if back is None else rows(states, back)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.equal(b))
