"""Outputs and gradients of an op against its float64 reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Largest error, relative to the largest value of the tensor compared: a few units in the last place of the dtype, for
# values that pass a handful of roundings to it. float32 holds on a GPU too, whose exp is approximate.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}

MakeInputs = Callable[[], Sequence[Tensor | None]]


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Like torch.testing.assert_close, relative to the largest value of each time step, so that no step hides."""
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    if expected.numel() == 0:
        return
    error = (actual.detach().cpu().double() - expected.detach()).abs()
    scale = expected.detach().abs()
    steps = tuple(range(2, expected.dim())) if expected.dim() > 2 else ()
    if steps:  # (B, T, *): the scale of each frame, but not of one that is small by chance
        scale = torch.maximum(scale.amax(steps, keepdim=True), scale.amax() / 10)
    else:
        scale = scale.amax()
    worst = (error / scale.clamp_min(1e-30)).amax().item()
    assert worst <= tolerance, f"{name}: relative error {worst:.2e} > {tolerance:.0e}"


def check_against_reference(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    tolerance: float | None = None,
) -> None:
    """Values and every gradient of ``ours`` against ``reference`` in float64 on the same (rounded) inputs.

    Inputs keep their strides. Upstream gradients come from a seed of their own.
    """
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    truth = [None if x is None else x.detach().cpu().double().clone().requires_grad_() for x in inputs]
    outputs, expected = _tuple(ours(*leaves)), _tuple(reference(*truth))
    dtype = next(x.dtype for x in inputs if x is not None)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    for i, (a, b) in enumerate(zip(outputs, expected, strict=True)):
        assert_close(f"output {i}", a, b, tolerance)
    generator = torch.Generator().manual_seed(1234)
    # rounded to the output's dtype, so that both sides see the same numbers
    upstream = [torch.randn(b.shape, generator=generator).to(a.dtype) for a, b in zip(outputs, expected, strict=True)]
    got = torch.autograd.grad(
        outputs,
        [x for x in leaves if x is not None],
        [u.to(a.device) for u, a in zip(upstream, outputs, strict=True)],
    )
    wanted = torch.autograd.grad(expected, [x for x in truth if x is not None], [u.double() for u in upstream])
    named = [i for i, x in enumerate(inputs) if x is not None]
    for i, a, b in zip(named, got, wanted, strict=True):
        assert_close(f"gradient of input {i}", a, b, 2 * tolerance)
