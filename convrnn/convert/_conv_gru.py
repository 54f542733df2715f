"""Convolutional GRU cells of other projects.

Other cells compute each gate by one convolution of [x, h] or [h, x] joined over the channels; a convolution of the one
plus a convolution of the other is the same, so their kernels are cut in two. Where their update gate is the share of
the old state, 1 - s(v) = s(-v) makes it ours: its kernels and bias change their sign.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..nn import GRU_RCN, ConvGRUCell, ConvGRUCell1d, ConvGRUCell3d, SepConvGRUCell
from ..nn._checks import as_bool
from ._state_dict import StateDict, as_mapping, load, under

__all__ = [
    "Gates",
    "from_ballas2016",
    "from_conv_gates",
    "from_gates",
    "from_raft",
    "from_robust_video_matting",
    "from_three_gates",
]


class Gates(NamedTuple):
    """One convolution of another project's cell.

    Attributes:
        name: its name in the ``state_dict``: ``name.weight`` and maybe ``name.bias``.
        gates: what it computes, in the order of its output channels: letters of 'z' (update), 'r' (reset) and 'c'.
        reads: what it reads, in the order of its input channels: 'xh', 'hx', 'x' or 'h'.

    Example:
        >>> Gates("conv_gates", "rz", "xh")  # one convolution of [x, h], the reset gate first
        Gates(name='conv_gates', gates='rz', reads='xh')
    """

    name: str
    gates: str
    reads: str


def from_gates(
    state_dict: StateDict,
    convolutions: list[Gates],
    *,
    prefix: str = "",
    z_keeps: bool = False,
    reset_after: bool = False,
) -> ConvGRUCell:
    """Returns h' = (1-z).h + z.c with the weights of any ConvGRU cell with 'same' padding of zeros and odd kernels.

    Args:
        state_dict: the checkpoint, or the module.
        convolutions: the cell's convolutions. Together they must compute each of z, r and c from x and from h.
        prefix: what comes before their names, with its dot.
        z_keeps: the cell computes h' = z.h + (1-z).c.
        reset_after: the cell computes c = tanh(W_c*x + r.(C*h + b)); then c's two convolutions must be separate.

    Raises:
        TypeError: a flag is no bool, or ``state_dict`` neither a mapping nor a module.
        ValueError: a weight is missing, or shapes, gates or kernels do not fit.

    Example:
        >>> gates = torch.nn.Conv2d(3 + 4, 8, 3, padding=1)  # of [x, h], reset gate first
        >>> candidate = torch.nn.Conv2d(3 + 4, 4, 3, padding=1)
        >>> checkpoint = torch.nn.ModuleDict({"g": gates, "c": candidate}).state_dict()
        >>> cell = from_gates(checkpoint, [Gates("g", "rz", "xh"), Gates("c", "c", "xh")])
        >>> cell.input_size, cell.hidden_sizes
        (3, [4])
    """
    state_dict = as_mapping(state_dict)
    z_keeps, reset_after = as_bool("z_keeps", z_keeps), as_bool("reset_after", reset_after)
    weights: dict[tuple[str, str], Tensor] = {}
    biases: dict[tuple[str, str], Tensor] = {}
    first = _weight(state_dict, prefix + convolutions[0].name)
    hidden = first.shape[0] // len(convolutions[0].gates)
    for name, gates, reads in convolutions:
        weight = _weight(state_dict, prefix + name)
        if set(gates) - set("zrc") or reads not in ("xh", "hx", "x", "h"):
            raise ValueError(
                f"convolutions must have gates of 'zrc' and read 'xh', 'hx', 'x' or 'h', got {gates!r}, {reads!r}"
            )
        if weight.shape[0] != len(gates) * hidden or ("h" in reads and weight.shape[1] < hidden):
            raise ValueError(
                f"{prefix}{name}.weight must have {len(gates)} x {hidden} output channels and read {reads!r}, "
                f"got shape {list(weight.shape)}"
            )
        if any(size % 2 == 0 for size in weight.shape[2:]):
            raise ValueError(f"{prefix}{name}.weight must have odd kernel sizes, got shape {list(weight.shape)}")
        bias = state_dict.get(f"{prefix}{name}.bias")
        if reset_after and "c" in gates and len(reads) == 2:
            raise ValueError(
                f"convolutions must compute 'c' from x and h apart with reset_after, got {reads!r} in {name}"
            )
        sizes = {"x": weight.shape[1] - (hidden if "h" in reads else 0), "h": hidden}
        for gate, rows in zip(gates, weight.split(hidden), strict=True):
            for source, part in zip(reads, rows.split([sizes[source] for source in reads], 1), strict=True):
                if (gate, source) in weights:
                    raise ValueError(f"convolutions must compute {gate!r} from {source!r} once, {name} does so again")
                weights[gate, source] = part
        for gate, rows in zip(gates, () if bias is None else bias.split(hidden), strict=bias is not None):
            source = "h" if reset_after and gate == "c" and reads == "h" else "x"
            biases[gate, source] = biases.get((gate, source), torch.zeros_like(rows)) + rows
    missing = [f"{gate} from {source}" for gate in "zrc" for source in "xh" if (gate, source) not in weights]
    if missing:
        raise ValueError(f"convolutions must compute z, r and c from x and from h, got none of {', '.join(missing)}")

    sign = {"z": -1 if z_keeps else 1, "r": 1, "c": 1}
    packed = {
        "W": torch.cat([sign[gate] * weights[gate, "x"] for gate in "zrc"]),
        "U": torch.cat([sign[gate] * weights[gate, "h"] for gate in "zr"]),
        "C": weights["c", "h"],
    }
    if packed["U"].shape[2:] != packed["C"].shape[2:]:
        raise ValueError(
            f"convolutions of h must have one kernel size, got {list(packed['U'].shape[2:])} and {list(packed['C'].shape[2:])}"
        )
    if biases:
        zero = torch.zeros_like(first[:hidden].flatten(1)[:, 0])
        packed["bias"] = torch.cat([sign[gate] * biases.get((gate, "x"), zero) for gate in "zrc"])
        if reset_after:
            packed["recurrent_bias"] = biases.get(("c", "h"), zero)
    kind = {3: ConvGRUCell1d, 4: ConvGRUCell, 5: ConvGRUCell3d}[first.dim()]
    cell = kind(
        packed["W"].shape[1],
        hidden,
        tuple(packed["W"].shape[2:]),
        recurrent_kernel_size=tuple(packed["U"].shape[2:]),
        bias=bool(biases),
        reset_after=reset_after,
        device=first.device,
        dtype=first.dtype,
    )
    cell.layers[0].load_state_dict(packed)
    return cell


def from_ballas2016(state_dict: StateDict, *, prefix: str = "", batch_first: bool = True) -> GRU_RCN:
    """Returns pytorch-convgru-cell's ``GRU_RCN``, h' = (1-z).h + z.c, from its W, U and C.

    Raises:
        ValueError: W, U or C is missing or has an impossible shape.

    Example:
        >>> rnn = from_ballas2016(GRU_RCN(5, 8, 3).state_dict())
        >>> rnn
        GRU_RCN(5, 8, (3, 3))
    """
    own = under(state_dict, prefix)
    missing = [name for name in ("W", "U", "C") if name not in own or own[name].dim() != 4]
    if missing:
        raise ValueError(
            f"state_dict must hold kernels {prefix}W, {prefix}U and {prefix}C, got no {', '.join(missing)}"
        )
    W, C = own["W"], own["C"]
    rnn = GRU_RCN(
        W.shape[1],
        C.shape[0],
        (C.shape[2], C.shape[3]),
        batch_first,
        bias="bias" in own,
        device=W.device,
        dtype=W.dtype,
    )
    return load(rnn, own)


def from_raft(state_dict: StateDict, *, prefix: str = "") -> ConvGRUCell | SepConvGRUCell:
    """Returns RAFT's update cell: ``convz``, ``convr`` and ``convq`` over [h, x], h' = (1-z).h + z.c.

    The separable one (kernels 1 x 5, then 5 x 1) is known by its names, torchvision's ``convgru1.convz`` or the
    original's ``convz1``.

    Source:
        Teed and Deng, ECCV 2020, arXiv 2003.12039.

    Raises:
        ValueError: a weight is missing or does not fit.

    Example:
        >>> conv = lambda: torch.nn.Conv2d(4 + 3, 4, 3, padding=1)
        >>> gates = torch.nn.ModuleDict({"convz": conv(), "convr": conv(), "convq": conv()})
        >>> from_raft(gates.state_dict()).hidden_size
        4
    """

    state_dict = as_mapping(state_dict)

    def cell(pattern: str) -> ConvGRUCell:
        names = [Gates(pattern.format(gate), ours, "hx") for gate, ours in (("z", "z"), ("r", "r"), ("q", "c"))]
        return from_gates(state_dict, names, prefix=prefix)

    for pattern in ("convgru{}.conv{{}}", "conv{{}}{}"):
        if f"{prefix}{pattern.format(1).format('z')}.weight" in state_dict:
            first, second = cell(pattern.format(1)), cell(pattern.format(2))
            W = first.state_dict()["layers.0.W"]
            length = W.shape[3]
            if first.kernel_size != (1, length) or second.kernel_size != (length, 1):
                raise ValueError("state_dict must hold kernels 1 x k and then k x 1")
            both = SepConvGRUCell(
                W.shape[1],
                first.hidden_size,
                length,
                bias="layers.0.bias" in first.state_dict(),
                device=W.device,
                dtype=W.dtype,
            )
            both.horizontal.load_state_dict(first.state_dict())
            both.vertical.load_state_dict(second.state_dict())
            return both
    return cell("conv{}")


def from_robust_video_matting(state_dict: StateDict, *, prefix: str = "") -> ConvGRUCell:
    """Returns RobustVideoMatting's ConvGRU: ``ih`` (r, z) and ``hh`` (c) over [x, h], h' = (1-z).h + z.c.

    Source:
        Lin et al., "Robust High-Resolution Video Matting with Temporal Guidance", WACV 2022, arXiv 2108.11515.

    Raises:
        ValueError: a weight is missing or does not fit.

    Example:
        >>> ih, hh = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1)
        >>> layer = torch.nn.ModuleDict({"ih": torch.nn.Sequential(ih), "hh": torch.nn.Sequential(hh)})
        >>> from_robust_video_matting(layer.state_dict()).input_size
        4
    """
    return from_gates(state_dict, [Gates("ih.0", "rz", "xh"), Gates("hh.0", "c", "xh")], prefix=prefix)


def from_conv_gates(state_dict: StateDict, *, prefix: str = "") -> ConvGRUCell:
    """Returns the cell of ``conv_gates`` (r, z) and ``conv_can`` (c) over [x, h], h' = (1-z).h + z.c.

    The layout of ConvGRU-pytorch and its descendants; a stack of theirs has the prefixes ``cell_list.0.`` and so on.

    Raises:
        ValueError: a weight is missing or does not fit.

    Example:
        >>> gates, can = torch.nn.Conv2d(7, 8, 3), torch.nn.Conv2d(7, 4, 3)
        >>> from_conv_gates(torch.nn.ModuleDict({"conv_gates": gates, "conv_can": can}).state_dict()).input_size
        3
    """
    return from_gates(state_dict, [Gates("conv_gates", "rz", "xh"), Gates("conv_can", "c", "xh")], prefix=prefix)


def from_three_gates(state_dict: StateDict, *, prefix: str = "") -> ConvGRUCell:
    """Returns the cell of ``update_gate``, ``reset_gate`` and ``out_gate`` over [x, h], h' = (1-z).h + z.c.

    The layout of pytorch_convgru and its descendants, event-camera networks among them.

    Raises:
        ValueError: a weight is missing or does not fit.

    Example:
        >>> conv = lambda: torch.nn.Conv2d(7, 4, 3)
        >>> gates = torch.nn.ModuleDict({"update_gate": conv(), "reset_gate": conv(), "out_gate": conv()})
        >>> from_three_gates(gates.state_dict()).input_size
        3
    """
    names = [Gates("update_gate", "z", "xh"), Gates("reset_gate", "r", "xh"), Gates("out_gate", "c", "xh")]
    return from_gates(state_dict, names, prefix=prefix)


def _weight(state_dict: Mapping[str, Tensor], name: str) -> Tensor:
    weight = state_dict.get(f"{name}.weight")
    if weight is None or weight.dim() not in (3, 4, 5):
        found = "none" if weight is None else f"shape {list(weight.shape)}"
        raise ValueError(f"state_dict must hold {name}.weight, the kernels of a convolution, got {found}")
    return weight
