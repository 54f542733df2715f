"""minGRU and minLSTM of other projects."""

from typing import Any

import torch
from torch import Tensor

from ..nn import MinConv2dGRU, MinConv2dGRUCell, MinGRU, MinGRUCell, MinLSTM
from ._state_dict import StateDict, load, under

__all__ = ["from_mingru", "from_mingru_pytorch"]

# The projections of minGRU-pytorch, the layer each is of, and what it packs, in our order: theirs has hidden first.
PYTORCH = {
    "to_hidden_and_gate": (MinGRU, ("gate", "hidden"), ("hidden", "gate")),
    "to_hidden_and_f_i_gate": (MinLSTM, ("f", "i", "hidden"), ("hidden", "f", "i")),
}


def from_mingru(
    state_dict: StateDict, *, prefix: str = "", **options: Any
) -> MinGRUCell | MinGRU | MinConv2dGRUCell | MinConv2dGRU:
    """Returns torch-mingru's MinGRU, MinConv2dGRU or a cell of theirs, h' = (1-z).h + z.g(v); the names say which.

    A layer of minGRU-pytorch is handed on to :func:`from_mingru_pytorch`.

    Args:
        state_dict: the checkpoint.
        prefix: what comes before the layer's names, with its dot.
        options: what weights do not tell: ``dropout``, ``strides`` and ``paddings`` (``stride`` and ``padding`` of a
            cell), and for layers without a norm's or residual's weights, ``residual``.

    Raises:
        TypeError: ``state_dict`` is neither a mapping nor a module.
        ValueError: the checkpoint is of another layer, or an option does not fit.

    Example:
        >>> rnn = from_mingru(MinGRU(3, [8, 16], norm=True).state_dict())
        >>> rnn.hidden_sizes
        [8, 16]
    """
    own = under(state_dict, prefix)
    others = _prefixes(own)
    if others == [""] and not options:
        return from_mingru_pytorch(own)
    if others:
        raise ValueError(
            f"state_dict must be torch-mingru's, got minGRU-pytorch's: write from_mingru_pytorch(..., "
            f"prefix={prefix + others[0]!r})"
        )
    if "to_gate_hidden.weight" in own:
        weight = own["to_gate_hidden.weight"]
        made = {"bias": "to_gate_hidden.bias" in own, "device": weight.device, "dtype": weight.dtype, **options}
        sizes = weight.shape[1], weight.shape[0] // 2
        if weight.dim() == 2:
            return load(MinGRUCell(*sizes, **made), own)
        return load(MinConv2dGRUCell(*sizes, (weight.shape[2], weight.shape[3]), **made), own)
    weights: list[Tensor] = []
    while f"layers.{len(weights)}.gate_hidden.weight" in own:
        weights.append(own[f"layers.{len(weights)}.gate_hidden.weight"])
    if not weights:
        raise ValueError(f"state_dict must hold {prefix}to_gate_hidden.* or {prefix}layers.*.gate_hidden.*")
    made = {
        "bias": "layers.0.gate_hidden.bias" in own,
        "norm": "layers.0.norm.weight" in own,
        "residual": any(".res_align." in name for name in own),
        "device": weights[0].device,
        "dtype": weights[0].dtype,
        **options,
    }
    hidden = [weight.shape[0] // 2 for weight in weights]
    if weights[0].dim() == 2:
        return load(MinGRU(weights[0].shape[1], hidden, **made), own)
    kernels = [(weight.shape[2], weight.shape[3]) for weight in weights]
    return load(MinConv2dGRU(weights[0].shape[1], hidden, kernels, **made), own)


def from_mingru_pytorch(state_dict: StateDict, *, prefix: str = "") -> MinGRU | MinLSTM:
    """Returns minGRU-pytorch's ``minGRU`` or ``minLSTM``, h' = (1-z).h + z.g(hidden) from zero; the names say which.

    ``to_hidden_and_gate`` packs the candidate first, ours the gate. ``to_out`` becomes ``out_proj``: by its shape the
    layer's ``expand``, or without it (``proj_out=False``) the ``hidden_sizes``. Their sequences begin at zero, ours at
    1/2: the layer has a learned state h0 that is zero and wants no gradient. In exact arithmetic outputs and states are
    theirs; ``next_prev_hidden`` is ``h[0]``. One thing differs: given a state h and more than one step, their
    ``minLSTM`` begins at g(h), where step by step it begins at h, as this does.

    In a language model of theirs the layers have the prefixes ``layers.0.2.``, ``layers.1.2.`` and so on.

    Args:
        state_dict: the checkpoint, or the module.
        prefix: what comes before the layer's names, with its dot.

    Raises:
        TypeError: ``state_dict`` is neither a mapping nor a module.
        ValueError: the checkpoint is none of the two, or holds what they have not.

    Source:
        github.com/lucidrains/minGRU-pytorch; Feng et al., arXiv 2410.01201.

    Example:
        >>> theirs = {"to_hidden_and_gate.weight": torch.randn(24, 8), "to_out.weight": torch.randn(8, 12)}
        >>> from_mingru_pytorch(theirs)
        MinGRU(
          8, [8], bias=False, expand=1.5, out_proj=True, learn_h0=True
          (layers): ModuleList(
            (0): MinGRULayer(
              (norm): Identity()
              (gate_hidden): Linear(in_features=8, out_features=24, bias=False)
              (out_proj): Linear(in_features=12, out_features=8, bias=False)
            )
          )
        )
    """
    own = under(state_dict, prefix)
    found = [name for name in PYTORCH if f"{name}.weight" in own]
    if len(found) != 1:
        theirs = _prefixes(own)
        hint = f", got layers under {', '.join(repr(prefix + name) for name in theirs)}" if theirs else ""
        if any(".gate_hidden." in name or name.startswith("to_gate_hidden.") for name in own):
            hint = "; this is torch-mingru's: write from_mingru"
        raise ValueError(
            f"state_dict must hold {prefix}to_hidden_and_gate.weight or {prefix}to_hidden_and_f_i_gate.weight{hint}"
        )
    kind, ours, packed = PYTORCH[found[0]]
    weight, out = own.pop(f"{found[0]}.weight"), own.pop("to_out.weight", None)
    if own:
        raise ValueError(
            f"state_dict must hold the weights of {found[0]} and to_out alone, as minGRU-pytorch's layers have them, got "
            f"{', '.join(prefix + name for name in own)} too"
        )
    if weight.dim() != 2 or weight.shape[0] % len(ours):
        raise ValueError(f"{prefix}{found[0]}.weight must be ({len(ours)}*inner, dim), got {list(weight.shape)}")
    inner = weight.shape[0] // len(ours)
    if out is not None and (out.dim() != 2 or out.shape[1] != inner):
        raise ValueError(f"{prefix}to_out.weight must be (dim, {inner}), got {list(out.shape)}")
    size = inner if out is None else out.shape[0]
    parts = dict(zip(packed, weight.chunk(len(ours)), strict=True))
    rnn = kind(
        weight.shape[1],
        size,
        bias=False,
        expand=inner / size,
        out_proj=out is not None,
        learn_h0=True,
        device=weight.device,
        dtype=weight.dtype,
    )
    weights = {"gate_hidden.weight": torch.cat([parts[name] for name in ours]), "h0": weight.new_zeros(inner)}
    if out is not None:
        weights["out_proj.weight"] = out
    rnn.layers[0].load_state_dict(weights)
    rnn.layers[0].h0.requires_grad_(False)
    return rnn


def _prefixes(own: dict[str, Tensor]) -> list[str]:
    """Returns under what layers of minGRU-pytorch stand in the checkpoint."""
    ends = tuple(f"{name}.weight" for name in PYTORCH)
    return [name[: -len(end)] for name in own for end in ends if name.endswith(end)]
