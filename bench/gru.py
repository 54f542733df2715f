"""Cases of the GRU-RCN family: a step's gates, the whole sequence, the layer, one frame of a stream."""

from collections.abc import Callable

import torch
from torch import Tensor

import convrnn
from convrnn import reference

from .case import OURS, STREAM, Case, Problem, Work, convolution_work, elementwise
from .providers import FirstOutput, PlainGRU_RCN, Provider, Run, hoisted_gru_rcn, six_convolutions


def gru_gates(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """[z, r] and r.h of one step, state (B, C, *S)."""
    batch, channels, *size = shape

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        inputs = [torch.randn(batch, 2 * channels, *size, device=device).to(dtype) for _ in range(2)]
        inputs.append(torch.randn(shape, device=device).to(dtype))

        return Problem(
            inputs,
            reference.gru_gates,
            {OURS: Provider(torch.ops.convrnn.gru_gates), "plain": Provider(reference.gru_gates)},
        )

    n = torch.Size(shape).numel()
    return Case("gru_gates", shape, build, elementwise(n, dtype, 8, 5), elementwise(n, dtype, 9, 10), dtype, **options)


def gru_update(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """c and h' of one step, state (B, C, *S)."""

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        inputs = [torch.randn(shape, device=device) for _ in range(4)]
        inputs[2].sigmoid_()
        return Problem(
            [x.to(dtype) for x in inputs],
            lambda *inputs: reference.gru_update(*inputs)[1],
            {
                OURS: Provider(lambda *inputs: torch.ops.convrnn.gru_update(*inputs)[1]),
                "plain": Provider(lambda *inputs: reference.gru_update(*inputs)[1]),
            },
        )

    n = torch.Size(shape).numel()
    return Case("gru_update", shape, build, elementwise(n, dtype, 5, 5), elementwise(n, dtype, 7, 10), dtype, **options)


def gru_rcn_inputs(
    device: torch.device, dtype: torch.dtype, batch: int, steps: int, ox: int, oh: int, height: int, width: int
) -> list[Tensor]:
    """x, h0, W, U, C with 3x3 kernels, scaled as a layer's are at its start."""

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    return [
        randn(batch, steps, ox, height, width),
        randn(batch, oh, height, width, scale=0.5),
        randn(3 * oh, ox, 3, 3, scale=(9 * ox) ** -0.5),
        randn(2 * oh, oh, 3, 3, scale=(9 * oh) ** -0.5),
        randn(oh, oh, 3, 3, scale=(9 * oh) ** -0.5),
    ]


def gru_rcn_work(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Work, Work]:
    batch, steps, ox, oh, height, width = shape
    pixels = height * width
    return convolution_work(dtype, batch * steps, pixels, batch * steps * pixels * (ox + oh), 9 * 3 * oh * (ox + oh))


def gru_rcn(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """GRU-RCN with 3x3 kernels at (B, T, Ox, Oh, H, W)."""

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        return Problem(
            gru_rcn_inputs(device, dtype, *shape),
            lambda *inputs: reference.gru_rcn(*inputs)[0],
            {
                OURS: Provider(lambda *inputs: convrnn.gru_rcn(*inputs)[0]),
                "hoisted": Provider(hoisted_gru_rcn),
                "six convolutions": Provider(six_convolutions),
            },
        )

    return Case("gru_rcn", shape, build, *gru_rcn_work(shape, dtype), dtype, **options)


def gru_rcn_module(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """The layer at (B, T, Ox, Oh, H, W): what ``gru_rcn`` measures, and the module around it."""

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        x, h = gru_rcn_inputs(device, dtype, *shape)[:2]
        layer = convrnn.GRU_RCN(shape[2], shape[3], 3, device=device, dtype=dtype)
        return Problem(
            [x, h],
            PlainGRU_RCN(layer, lambda *inputs: reference.gru_rcn(*inputs)[0]),
            {
                OURS: Provider(FirstOutput(layer)),
                "hoisted": Provider(PlainGRU_RCN(layer, hoisted_gru_rcn)),
                "six convolutions": Provider(PlainGRU_RCN(layer, six_convolutions)),
            },
        )

    return Case("GRU_RCN", shape, build, *gru_rcn_work(shape, dtype), dtype, group="module", **options)


def gru_rcn_stream(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """One frame of a stream with a carried state, at (B, 1, Ox, Oh, H, W)."""

    def last(run: Callable[..., Tensor]) -> Run:
        # The state goes in second, as it comes out.
        return lambda x, h, *weights: run(x, h, *weights)[:, -1]

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        return Problem(
            gru_rcn_inputs(device, dtype, *shape),
            lambda *inputs: reference.gru_rcn(*inputs)[1],
            {
                OURS: Provider(lambda *inputs: convrnn.gru_rcn(*inputs)[1]),
                "hoisted": Provider(last(hoisted_gru_rcn)),
                "six convolutions": Provider(last(six_convolutions)),
            },
        )

    forward, _ = gru_rcn_work(shape, dtype)
    return Case("gru_rcn", shape, build, forward, Work(0, 0), dtype, group="streaming", passes=STREAM, **options)
