"""Cases of the GRU-RCN family: a step's gates, the whole sequence, the layer, one frame of a stream."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import convrnn
from convrnn import reference

from .case import OURS, STREAM, Case, Problem, Work, convolution_work, elementwise
from .providers import (
    FirstOfOneState,
    FirstOutput,
    NextState,
    OutputOfLevels,
    PlainConvGRU,
    PlainGRU_RCN,
    PlainStackedGRU_RCN,
    PlainUpdates,
    Provider,
    Run,
    hoisted_gru_rcn,
    six_convolutions,
)


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
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    steps: int,
    ox: int,
    oh: int,
    height: int,
    width: int,
    kernel: tuple[int, int] = (3, 3),
) -> list[Tensor]:
    """x, h0, W, U, C, scaled as a layer's are at its start."""
    taps = math.prod(kernel)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    return [
        randn(batch, steps, ox, height, width),
        randn(batch, oh, height, width, scale=0.5),
        randn(3 * oh, ox, *kernel, scale=(taps * ox) ** -0.5),
        randn(2 * oh, oh, *kernel, scale=(taps * oh) ** -0.5),
        randn(oh, oh, *kernel, scale=(taps * oh) ** -0.5),
    ]


def gru_rcn_work(shape: tuple[int, ...], dtype: torch.dtype, kernel: tuple[int, int] = (3, 3)) -> tuple[Work, Work]:
    batch, steps, ox, oh, height, width = shape
    pixels, weights = height * width, math.prod(kernel) * 3 * oh * (ox + oh)
    return convolution_work(dtype, batch * steps, pixels, batch * steps * pixels * (ox + oh), weights)


def gru_rcn(
    *shape: int, kernel: tuple[int, int] = (3, 3), dtype: torch.dtype = torch.float32, **options: object
) -> Case:
    """GRU-RCN at (B, T, Ox, Oh, H, W)."""

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        return Problem(
            gru_rcn_inputs(device, dtype, *shape, kernel),
            lambda *inputs: reference.gru_rcn(*inputs)[0],
            {
                OURS: Provider(lambda *inputs: convrnn.gru_rcn(*inputs)[0]),
                "hoisted": Provider(hoisted_gru_rcn),
                "six convolutions": Provider(six_convolutions),
            },
        )

    op = "gru_rcn" if kernel == (3, 3) else f"gru_rcn {kernel[0]}x{kernel[1]}"
    return Case(op, shape, build, *gru_rcn_work(shape, dtype, kernel), dtype, **options)


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


def conv_gru_module(*shape: int, stride: int = 2, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """ConvGRU whose input convolution makes the map smaller, at (B, T, Ox, Oh, H, W) of the input."""
    batch, steps, ox, oh, height, width = shape
    size = [-(-extent // stride) for extent in (height, width)]

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        rnn = convrnn.ConvGRU(ox, oh, 3, strides=stride, bias=False, device=device, dtype=dtype)
        inputs = [torch.randn(batch, steps, ox, height, width), 0.5 * torch.randn(batch, oh, *size)]
        plain = {
            name: PlainConvGRU(rnn, partial(run, stride=stride))
            for name, run in (("hoisted", hoisted_gru_rcn), ("six convolutions", six_convolutions))
        }
        return Problem(
            [x.to(device, dtype) for x in inputs],
            plain["six convolutions"],
            {OURS: Provider(FirstOfOneState(rnn)), **{name: Provider(run) for name, run in plain.items()}},
        )

    pixels = torch.Size(size).numel()
    moved = batch * steps * (ox * height * width + oh * pixels)
    work = convolution_work(dtype, batch * steps, pixels, moved, 9 * 3 * oh * (ox + oh))
    return Case("ConvGRU", shape, build, *work, dtype, group="module", **options)


def stacked_gru_rcn_module(*shape: int, levels: int = 2, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """StackedGRU_RCN at (B, T, C, H, W) of the lowest level, as many channels out as in; each next level has twice the
    channels of the one below and half its size."""
    batch, steps, channels, height, width = shape
    maps = [(channels << i, height >> i, width >> i) for i in range(levels)]

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        sizes = [size for size, _, _ in maps]
        rnn = convrnn.StackedGRU_RCN(sizes, sizes, 3, device=device, dtype=dtype)
        return Problem(
            [torch.randn(batch, steps, *size).to(device, dtype) for size in maps],
            PlainStackedGRU_RCN(rnn, lambda *inputs: reference.gru_rcn(*inputs)[0]),
            {
                OURS: Provider(OutputOfLevels(rnn)),
                "hoisted": Provider(PlainStackedGRU_RCN(rnn, hoisted_gru_rcn)),
                "six convolutions": Provider(PlainStackedGRU_RCN(rnn, six_convolutions)),
            },
        )

    forward, backward = Work(0, 0), Work(0, 0)
    for i, (size, *extents) in enumerate(maps):
        pixels, below = torch.Size(extents).numel(), maps[i - 1][0] if i > 0 else 0
        moved = batch * steps * pixels * (2 * size + below)
        level = convolution_work(dtype, batch * steps, pixels, moved, 9 * size * (3 * 2 * size + 2 * below))
        forward, backward = forward + level[0], backward + level[1]
    return Case("StackedGRU_RCN", shape, build, forward, backward, dtype, group="module", **options)


def conv_gru_stream(*shape: int, separable: bool = False, dtype: torch.dtype = torch.float32) -> Case:
    """One frame through ConvGRUCell with 3x3 kernels, or SepConvGRUCell with 1x5 and 5x1, at (B, 1, Ox, Oh, H, W)."""
    batch, steps, ox, oh, height, width = shape

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        factory = {"bias": False, "device": device, "dtype": dtype}
        if separable:
            cell = convrnn.SepConvGRUCell(ox, oh, 5, **factory)
            layers = [cell.horizontal.layers[0], cell.vertical.layers[0]]
        else:
            cell = convrnn.ConvGRUCell(ox, oh, 3, **factory)
            layers = [cell.layers[0]]
        inputs = [torch.randn(batch, steps, ox, height, width), 0.5 * torch.randn(batch, oh, height, width)]
        return Problem(
            [x.to(device, dtype) for x in inputs],
            PlainUpdates(layers, lambda *inputs: reference.gru_rcn(*inputs)[0]),
            {
                OURS: Provider(NextState(cell)),
                "hoisted": Provider(PlainUpdates(layers, hoisted_gru_rcn)),
                "six convolutions": Provider(PlainUpdates(layers, six_convolutions)),
            },
        )

    moved, taps = batch * height * width * (ox + 2 * oh), 10 if separable else 9
    forward, _ = convolution_work(dtype, batch, height * width, moved, taps * 3 * oh * (ox + oh))
    op = "SepConvGRUCell" if separable else "ConvGRUCell"
    return Case(op, shape, build, forward, Work(0, 0), dtype, group="streaming", passes=STREAM)
