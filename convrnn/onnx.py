"""ONNX: the ops as standard operators, with ONNX's Scan over time.

``torch.onnx.export`` knows nothing of ``torch.ops.convrnn``. Decompose an exported program first::

    with torch.no_grad():
        program = torch.export.export(module.eval(), (x,), dynamic_shapes=...)
    program = program.run_decompositions(convrnn.onnx.decomposition_table())
    torch.onnx.export(program, dynamo=True).save("module.onnx")

The result runs in any runtime that has ONNX's Scan; it needs neither this package nor PyTorch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from . import reference
from .kernels.layout import state_dtype
from .ops._codes import HOLD, RESTART, has_bit

__all__ = ["decomposition_table"]


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """A decomposition of every forward op into PyTorch operations and ``scan`` over time.

    To be given to ``torch.export.ExportedProgram.run_decompositions``: the operations of the model that are not ours
    stay as they are, for the exporter to translate, but for adaptive max pooling (:class:`convrnn.StackedGRU_RCN`
    between maps of different sizes), which it cannot, and whose frames must have fixed sizes. Exported with gradients on, :func:`convrnn.gru_rcn` keeps its
    activations for a backward that a decomposed program does not have: export under ``torch.no_grad()``.

    Returns:
        Overloads of ``torch.ops.convrnn`` and functions of the same signature. The decomposition of ``gru_rcn`` raises
        ValueError where activations would be kept.

    Example:
        >>> import convrnn.onnx
        >>> len(convrnn.onnx.decomposition_table())
        6
    """
    ops = torch.ops.convrnn
    return {
        torch.ops.aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
        ops.mingru.default: _mingru,
        ops.log_scan.default: _log_scan,
        ops.gru_gates.default: reference.gru_gates,
        ops.gru_update.default: reference.gru_update,
        ops.gru_rcn.default: _gru_rcn,
    }


def _over_time(step: Callable[..., Tensor], first: Tensor, sequences: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """All states (B, T, *) of h = step(h, entries of the sequences (B, T, *)), and the last."""

    def combine(h: Tensor, entries: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        h = step(h, *entries)
        return h, h.clone()  # a carry and an output must not be one tensor

    h_n, out = scan(combine, first.contiguous(), sequences, dim=1)  # strides of the carry must not change
    return out, h_n


def _mingru(gate_hidden: Tensor, h0: Tensor | None = None, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(gate_hidden)
    gate, hidden = gate_hidden.to(dtype).chunk(2, dim=2)
    first = torch.full_like(gate[:, 0], 0.5) if h0 is None else h0.to(dtype)
    keep, new = torch.sigmoid(-gate), torch.sigmoid(gate) * reference.g(hidden)
    if codes is None:
        out, h_n = _over_time(lambda h, keep, new: keep * h + new, first, (keep, new))
    else:
        held = has_bit(codes, HOLD, gate)
        restart = has_bit(codes, RESTART, gate)
        sequences = torch.where(held, 1.0, keep), torch.where(held, 0.0, new), restart

        def step(h: Tensor, keep: Tensor, new: Tensor, restart: Tensor) -> Tensor:
            return keep * torch.where(restart, 0.5, h) + new

        out, h_n = _over_time(step, first, sequences)
    return out.to(gate_hidden.dtype), h_n.to(gate_hidden.dtype if h0 is None else h0.dtype).clone()


def _log_scan(log_a: Tensor, log_b: Tensor) -> Tensor:
    a, b = (x.to(state_dtype(log_b)) for x in (log_a, log_b))

    def step(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = a + x
        high = torch.maximum(x, b)
        high = torch.where(high == -float("inf"), 0.0, high)  # two zeros: -inf, not NaN
        return high + ((x - high).exp() + (b - high).exp()).log()

    rest, _ = _over_time(step, b[:, 0], (a, b[:, 1:]))
    return torch.cat((b[:, :1], rest), 1)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``padding="same"`` in sizes that ONNX's Conv takes, of even kernels too."""
    padding = [p for k in reversed(weight.shape[2:]) for p in ((k - 1) // 2, k // 2)]
    return (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3](F.pad(x, padding), weight, bias)


def _windows(size: int, count: int, device: torch.device) -> Tensor:
    """The pixels (count, k) of each window of adaptive pooling, its last one repeated where it is a short one."""
    i = torch.arange(count, device=device).unsqueeze(1)
    first, end = i * size // count, ((i + 1) * size + count - 1) // count
    longest = max(((j + 1) * size + count - 1) // count - j * size // count for j in range(count))
    return torch.minimum(first + torch.arange(longest, device=device), end - 1)


def _adaptive_max_pool2d(x: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    if not all(isinstance(size, int) for size in (*x.shape[-2:], *output_size)):
        return NotImplemented  # symbolic
    height, width = x.shape[-2:]
    rows, columns = (_windows(n, m, x.device) for n, m in zip((height, width), output_size, strict=True))
    pooled = x.index_select(-2, rows.flatten()).unflatten(-2, rows.shape).amax(-2)
    pooled = pooled.index_select(-1, columns.flatten()).unflatten(-1, columns.shape).amax(-1)
    # where each maximum lies in its frame; dropped from the graph unless somebody asks
    pixels = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(-2)
    at = x.flatten(-2)[..., pixels].argmax(-1, keepdim=True)
    return pooled, pixels.expand(*at.shape[:-1], -1).gather(-1, at).squeeze(-1)


def _gru_rcn(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None = None,
    keep_gates: bool = True,
    codes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if keep_gates:
        raise ValueError("gru_rcn keeps its activations here: export under torch.no_grad()")
    dtype, channels = state_dtype(x), C.shape[0]
    projected = x if W is None else _convolution(x.flatten(0, 1), W, bias).unflatten(0, x.shape[:2])
    xp, xc = projected.to(dtype).split([2 * channels, channels], dim=2)
    if h0 is None:
        first = x.new_zeros((x.shape[0], channels, *x.shape[3:]), dtype=dtype)
    else:
        first = h0.to(dtype)

    def step(h: Tensor, xp: Tensor, xc: Tensor) -> Tensor:
        z, _, rh = reference.gru_gates(xp, _convolution(h.to(x.dtype), U).to(dtype), h)
        return reference.gru_update(xc, _convolution(rh.to(x.dtype), C).to(dtype), z, h)[1]

    def coded(h: Tensor, xp: Tensor, xc: Tensor, restart: Tensor, held: Tensor) -> Tensor:
        h = torch.where(restart, 0.0, h)
        return torch.where(held, h, step(h, xp, xc))

    if codes is None:
        out, h_n = _over_time(step, first, (xp, xc))
    else:
        out, h_n = _over_time(coded, first, (xp, xc, has_bit(codes, RESTART, xp), has_bit(codes, HOLD, xp)))
    return out.to(x.dtype), h_n.to(x.dtype if h0 is None else h0.dtype).clone(), x.new_empty(0)
