"""Inputs of every op for the tests of registration: dtypes, strides, optional arguments."""

from collections.abc import Iterable

import torch
from torch import Tensor


def _randn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype)


def grown(arguments: Iterable[object]) -> tuple[object, ...]:
    """The arguments with leaves in place of the tensors that can have a gradient."""
    return tuple(
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    )


def _upstream(y: Tensor, kind: int) -> Tensor:
    """A gradient of y with strides as y's, as of half of a concatenation, or as of a sum."""
    if kind == 1 and y.dim() > 1:
        return torch.cat((y, torch.randn_like(y)), 1)[:, y.shape[1] :]
    return torch.randn_like(y) if kind == 0 else torch.randn_like(y.flatten()[:1]).squeeze().expand(y.shape)


def forward_samples(op: str, device: str, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor | None, ...]]:
    """Argument tuples of ``torch.ops.convrnn.<op>``."""

    def randn(*shape: int) -> Tensor:
        return _randn(device, dtype, *shape)

    def channels_last(x: Tensor) -> Tensor:
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)

    if op == "mingru":
        video = randn(2, 4, 6, 2, 3)
        return [
            (randn(2, 4, 6), None),
            (randn(2, 4, 12)[:, :, :6], randn(2, 3)),
            (video, randn(2, 3, 2, 3)),
            (channels_last(video), randn(2, 3, 2, 3)),
            (randn(4, 2, 6).transpose(0, 1), randn(2, 3)),
            (video, None, torch.tensor([[0, 1, 2, 3], [2, 2, 1, 0]], dtype=torch.uint8, device=device)),
            (randn(2, 4, 6), randn(2, 3), torch.tensor([[0, 0, 1, 0]] * 2, dtype=torch.uint8, device=device)),
        ]
    if op == "log_scan":
        return [
            (randn(2, 4, 3), randn(2, 5, 3)),
            (randn(4, 2, 3, 2).transpose(0, 1), randn(2, 5, 6, 2)[:, :, :3]),
        ]
    if op == "gru_gates":
        return [
            (randn(2, 6, 4), randn(2, 6, 4), randn(2, 3, 4)),
            (randn(2, 8, 4)[:, :6], randn(2, 6, 4), randn(2, 3, 4)),
            tuple(channels_last(randn(2, channels, 3, 2)) for channels in (6, 6, 3)),
            (randn(2, 6, 4, 5), channels_last(randn(2, 6, 4, 5)), randn(2, 3, 4, 5)),
        ]
    if op == "gru_update":
        return [
            tuple(randn(2, 3, 4) for _ in range(4)),
            (randn(2, 6, 4)[:, 3:], *(randn(2, 3, 4) for _ in range(3))),
            tuple(channels_last(randn(2, 3, 4, 2)) for _ in range(4)),
            (randn(2, 3, 4, 5), channels_last(randn(2, 3, 4, 5)), *(randn(2, 3, 4, 5) for _ in range(2))),
        ]
    if op == "gru_rcn":
        weights = randn(9, 2, 3, 3), randn(6, 3, 3, 3), randn(3, 3, 3, 3)
        codes = torch.tensor([[2, 1, 0], [3, 0, 2]], dtype=torch.uint8, device=device)
        return [
            (randn(2, 3, 4, 4, 5)[:, :, 2:], None, *weights, None),
            (randn(3, 2, 2, 4, 5).transpose(0, 1), randn(2, 3, 4, 5), *weights, randn(9)),
            (randn(2, 3, 2, 4, 5), None, randn(9, 2, 2, 3), randn(6, 3, 3, 4), randn(3, 3, 1, 2), randn(9), False),
            (randn(2, 3, 2, 4), randn(2, 1, 4), randn(3, 2, 2), randn(2, 1, 2), randn(1, 1, 2)),
            (randn(2, 3, 2, 4), None, randn(9, 2, 3), randn(6, 3, 1), randn(3, 3, 3), randn(9)),
            (randn(3, 2, 9, 4, 5).transpose(0, 1), randn(2, 3, 4, 5), None, *weights[1:], None),
            (randn(2, 3, 4, 5, 9).movedim(-1, 2), None, None, *weights[1:], None, False),
            (
                channels_last(randn(2, 3, 2, 4, 5)),
                channels_last(randn(2, 3, 4, 5)),
                *(channels_last(weight) for weight in weights),
            ),
            (randn(2, 3, 2, 5, 1), randn(2, 3, 5, 1), randn(9, 2, 1, 3), randn(6, 3, 1, 3), randn(3, 3, 1, 3), None),
            (randn(2, 3, 9, 4, 5), None, None, *weights[1:], None, False, codes.mT.contiguous().mT),
            (randn(2, 3, 2, 4, 5), randn(2, 3, 4, 5), *weights, None, True, codes),
        ]
    raise ValueError(f"no samples for {op}")


def backward_samples(op: str, device: str, dtype: torch.dtype = torch.float32) -> list[tuple[object, ...]]:
    """Argument tuples of ``torch.ops.convrnn.<op>_backward`` that follow from the forward's."""
    forward = getattr(torch.ops.convrnn, op)
    samples: list[tuple[object, ...]] = []
    for i, arguments in enumerate(forward_samples(op, device, dtype)):
        outputs = forward(*arguments)
        upstream = [_upstream(y, i % 3) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
        if op == "mingru":
            for given in (upstream, (None, upstream[1]), (upstream[0], None)):
                samples.append((*given, *arguments[:2], outputs[0], *arguments[2:]))
        elif op == "log_scan":
            samples.append((*upstream, *arguments, outputs))
        elif op == "gru_gates":
            samples.append((*upstream, *outputs[:2], arguments[2]))
        elif op == "gru_update":
            samples.append((*upstream, arguments[2], outputs[0], arguments[3]))
        else:
            out, _, gates = outputs
            bias = arguments[5] if len(arguments) > 5 else None
            masks = [True] * 6, [False, True, False, True, False, False], [True, False, False, True, True, True]
            for mask in masks:
                samples.append((upstream[0], None, *arguments[:5], out, gates, mask, bias, *arguments[7:]))
            samples.append((None, upstream[1], *arguments[:5], out, gates, masks[0], bias, *arguments[7:]))
    return samples
