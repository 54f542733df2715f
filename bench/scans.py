"""Cases of the minGRU family: the scans, the layers, one step of a stream."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convrnn
from convrnn import reference

from .case import OURS, STREAM, Case, Problem, Work, adding, convolution_work, elementwise
from .providers import (
    FirstOutput,
    PlainBidirectional,
    PlainStack,
    Provider,
    Run,
    equal_gru,
    log_space,
    log_space_scan,
    log_space_tolerance,
    peers,
    sequential_mingru,
    time_loop,
)

LOOP_STEPS = 4096  # a Python loop over more steps takes seconds


def mingru(*shape: int, dtype: torch.dtype = torch.float32, others: tuple[str, ...] = (), **options: object) -> Case:
    """minGRU at output shape (B, T, C, *S); of the peers, those named in ``others`` take part."""
    batch, steps, channels, *size = shape

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        gate_hidden = torch.randn(batch, steps, 2 * channels, *size, device=device).to(dtype)
        providers = {OURS: Provider(lambda gate_hidden: convrnn.mingru(gate_hidden)[0])}
        if steps <= LOOP_STEPS:
            providers["time loop"] = Provider(time_loop, compile=False)
        providers["log space"] = Provider(log_space(), tolerance=log_space_tolerance(steps))
        providers |= {name: provider for name, provider in peers(steps).items() if name in others}
        return Problem(
            [gate_hidden], lambda gate_hidden: reference.mingru(gate_hidden)[0], providers, adding(gate_hidden)
        )

    n = torch.Size(shape).numel()
    return Case("mingru", shape, build, elementwise(n, dtype, 3, 5), elementwise(n, dtype, 6, 12), dtype, **options)


def log_scan(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """The general scan, (B, T, C, *S) steps."""
    batch, steps, *rest = shape

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        log_a = -F.softplus(torch.randn(shape, device=device)).to(dtype)
        log_b = torch.randn(batch, steps + 1, *rest, device=device).to(dtype)

        def loop(log_a: Tensor, log_b: Tensor) -> Tensor:
            return reference.log_scan(log_a, log_b).exp()

        def log_space_in_float32(log_a: Tensor, log_b: Tensor) -> Tensor:
            return log_space_scan(log_a.float(), log_b.float()).to(log_a.dtype)

        return Problem(
            [log_a, log_b],
            loop,
            {
                OURS: Provider(convrnn.parallel_scan_log),
                "time loop": Provider(loop, compile=False),
                "log space": Provider(log_space_in_float32, tolerance=log_space_tolerance(steps)),
            },
        )

    n = torch.Size(shape).numel()
    return Case("log_scan", shape, build, elementwise(n, dtype, 3, 5), elementwise(n, dtype, 6, 8), dtype, **options)


def stack_problem(x: Tensor, stack: nn.Module) -> Problem:
    steps = x.shape[1]
    return Problem(
        [x],
        PlainStack(stack, lambda gate_hidden: reference.mingru(gate_hidden)[0]),
        {
            OURS: Provider(FirstOutput(stack)),
            "time loop": Provider(PlainStack(stack, time_loop), compile=False),
            "log space": Provider(PlainStack(stack, log_space()), tolerance=log_space_tolerance(steps)),
        },
    )


def mingru_module(
    *shape: int,
    layers: int = 1,
    gru: bool = True,
    lstm: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> Case:
    """Stacked minGRU, or minLSTM, as many features in as out, (B, T, C)."""
    batch, steps, features = shape
    kind = convrnn.MinLSTM if lstm else convrnn.MinGRU

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        x = torch.randn(shape, device=device).to(dtype)
        problem = stack_problem(x, kind(features, [features] * layers, device=device, dtype=dtype))
        if gru:
            provider = equal_gru(features, features)
            provider.run.to(device, dtype)
            problem.providers["torch.nn.GRU"] = provider
        return problem

    weights = (3 if lstm else 2) * features * features
    work = convolution_work(dtype, batch * steps, 1, 2 * batch * steps * features, layers * weights)
    return Case(
        kind.__name__ + (f" x{layers}" if layers > 1 else ""), shape, build, *work, dtype, group="module", **options
    )


def minconv_module(
    *shape: int, hidden: tuple[int, ...] = (16, 32, 64), dtype: torch.dtype = torch.float32, **options: object
) -> Case:
    """Stacked convolutional minGRU with residuals, each layer halving the frame, input (B, T, C, H, W)."""
    batch, steps, channels, height, width = shape

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        x = torch.randn(shape, device=device).to(dtype)
        return stack_problem(
            x,
            convrnn.MinConv2dGRU(
                channels, list(hidden), 3, strides=2, paddings=1, residual=True, device=device, dtype=dtype
            ),
        )

    forward, backward, below = Work(0, 0), Work(0, 0), channels
    for level, size in enumerate(hidden, 1):
        pixels = (height >> level) * (width >> level)
        moved = batch * steps * (4 * pixels * below + pixels * size)
        layer = convolution_work(dtype, batch * steps, pixels, moved, 9 * 3 * below * size)
        forward, backward, below = forward + layer[0], backward + layer[1], size
    return Case("MinConv2dGRU", shape, build, forward, backward, dtype, group="module", **options)


def bidirectional_module(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """Bidirectional minGRU, (B, T, C)."""
    batch, steps, features = shape

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        x = torch.randn(shape, device=device).to(dtype)
        rnns = [convrnn.MinGRU(features, features, device=device, dtype=dtype) for _ in range(2)]

        def plain(scan: Run) -> nn.Module:
            return PlainBidirectional(*(PlainStack(rnn, scan) for rnn in rnns))

        return Problem(
            [x],
            plain(lambda gate_hidden: reference.mingru(gate_hidden)[0]),
            {
                OURS: Provider(FirstOutput(convrnn.Bidirectional(*rnns))),
                "time loop": Provider(plain(time_loop)),
                "log space": Provider(plain(log_space()), tolerance=log_space_tolerance(steps)),
            },
        )

    work = convolution_work(dtype, batch * steps, 1, 3 * batch * steps * features, 4 * features * features)
    return Case("Bidirectional", shape, build, *work, dtype, group="module", **options)


class StreamingCell(nn.Module):
    """A single-layer module of convrnn, its list of states unpacked: (x, state) -> state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(x, [h.unsqueeze(1)])[1][0].squeeze(1)


class PlainCell(nn.Module):
    """The projection of a cell, copied, and one step of the recurrence: (x, state) -> state."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = copy.deepcopy(projection)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return sequential_mingru(self.projection(x.flatten(0, 1)).unflatten(0, x.shape[:2]), h)


def mingru_stream(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """One step of minGRU with a carried state, at output shape (B, 1, C, *S)."""
    batch, steps, channels, *size = shape

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        inputs = [torch.randn(batch, steps, 2 * channels, *size), torch.rand(batch, channels, *size)]
        return Problem(
            [x.to(device, dtype) for x in inputs],
            sequential_mingru,
            {
                OURS: Provider(lambda gate_hidden, h: convrnn.mingru(gate_hidden, h)[1]),
                "plain": Provider(sequential_mingru),
            },
        )

    work = elementwise(torch.Size(shape).numel(), dtype, 4, 5)
    return Case("mingru", shape, build, work, Work(0, 0), dtype, group="streaming", passes=STREAM, **options)


def cell_stream(*shape: int, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    """One step of MinGRUCell (B, 1, C) or MinConv2dGRUCell (B, 1, C, H, W), as many features in as out."""
    batch, _, features, *size = shape

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        inputs = [torch.randn(shape), torch.rand(batch, features, *size)]
        if size:
            cell = convrnn.MinConv2dGRUCell(features, features, 3, padding=1, device=device, dtype=dtype)
        else:
            cell = convrnn.MinGRUCell(features, features, device=device, dtype=dtype)
        plain = PlainCell(cell.to_gate_hidden)
        return Problem(
            [x.to(device, dtype) for x in inputs],
            plain,
            {OURS: Provider(StreamingCell(cell)), "plain": Provider(plain)},
        )

    pixels = torch.Size(size).numel()
    weights = (9 if size else 1) * 2 * features * features
    forward, _ = convolution_work(dtype, batch, pixels, 3 * batch * pixels * features, weights)
    op = "MinConv2dGRUCell" if size else "MinGRUCell"
    return Case(op, shape, build, forward, Work(0, 0), dtype, group="streaming", passes=STREAM, **options)
