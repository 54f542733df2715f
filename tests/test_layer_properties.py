"""Layers with arguments, sizes, cuts and lengths drawn at random: the reference, chunks, steps, gradients, padding."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.testing import assert_close

from convrnn import (
    GRU_RCN,
    Bidirectional,
    ConvGRU,
    ConvGRU1d,
    ConvGRU3d,
    MinConv1dGRU,
    MinConv2dGRU,
    MinConv3dGRU,
    MinGRU,
    MinLSTM,
    SepConvGRUCell,
    StackedGRU_RCN,
)

from .conftest import INTERPRETED
from .layer_reference import reference

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.15}


class Drawn(NamedTuple):
    """A layer with 2 channels in, ``dims`` dimensions of a frame, and ``levels`` of them where its input is a list.

    Of ``gate_bias`` None says nothing about the initial biases.
    """

    make: Callable[..., Any]
    dims: int
    batch_first: bool = True
    levels: int | None = None
    gate_bias: float | str | None = None


def convolutions(draw, dims, layers):
    """Arguments of the convolutions that both families have, and one size of a kernel."""
    sizes = st.tuples(*[st.integers(1, 3)] * dims)

    def per_layer(entries):
        return draw(st.lists(entries, min_size=layers, max_size=layers))

    separable = draw(st.booleans())
    arguments = {
        "kernel_sizes": per_layer(sizes),
        "strides": per_layer(st.integers(1, 2)),
        "paddings": draw(st.sampled_from(["same", "same", 1])),
        "dilations": per_layer(st.integers(1, 2)),
        "groups": 1 if separable else per_layer(st.integers(1, 2)),
        "separable": separable,
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    }
    return arguments, sizes


def switches(draw, *names):
    return {name: draw(st.booleans()) for name in names}


def gate_biases(draw, bias, none):
    """Arguments of the gate's initial bias; ``none`` is the default."""
    value = draw(st.sampled_from([none, -1.5, "chrono"])) if bias else none
    return {"gate_bias": value, "chrono_max": 9 if value == "chrono" else None}


@st.composite
def gru_layers(draw, both=True):
    """A layer of the ConvGRU family."""
    kind = draw(st.sampled_from([ConvGRU1d, ConvGRU, ConvGRU, ConvGRU3d]))
    hidden = draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2))
    arguments, sizes = convolutions(draw, kind.spatial_dims, len(hidden))
    arguments |= {
        "recurrent_kernel_sizes": draw(st.none() | sizes.map(lambda size: [size] * len(hidden))),
        "recurrent_groups": 1 if arguments["separable"] else draw(st.integers(1, 2)),
        "norm": draw(st.sampled_from([None, "layer", True])),
        "cell_norm": draw(st.sampled_from([None, None, "layer"])),
        "zoneout": draw(st.sampled_from([0.0, 0.2])),
        **switches(draw, "bias", "reset_after", "residual", "learn_h0", "batch_first"),
        "bidirectional": both and draw(st.booleans()),
    }
    arguments |= gate_biases(draw, arguments["bias"], 0.0)
    if draw(st.booleans()):  # what the whole-sequence op covers
        plain = {"strides": 1, "dilations": 1, "groups": 1, "recurrent_groups": 1, "separable": False, "zoneout": 0.0}
        arguments |= {**plain, "paddings": "same", "padding_mode": "zeros", "cell_norm": None, "reset_after": False}
    return Drawn(
        lambda **kw: kind(2, hidden, **arguments, **kw),
        kind.spatial_dims,
        arguments["batch_first"],
        gate_bias=arguments["gate_bias"] if arguments["bias"] else None,
    )


@st.composite
def mingru_layers(draw, both=True):
    """A layer of the minGRU family."""
    kind = draw(st.sampled_from([MinGRU, MinLSTM, MinConv1dGRU, MinConv2dGRU, MinConv3dGRU]))
    hidden = draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2))
    dims = getattr(kind, "spatial_dims", 0)
    arguments = convolutions(draw, dims, len(hidden))[0] if dims else {}
    arguments |= {
        "norm": draw(st.sampled_from([None, True, "layer", "group" if dims else "rms"])),
        "expand": draw(st.sampled_from([1.0, 1.0, 2.0, 1.5])),
        **switches(draw, "bias", "residual", "learn_h0", "batch_first"),
        "bidirectional": both and draw(st.booleans()),
    }
    arguments |= gate_biases(draw, arguments["bias"], None)
    if arguments.get("groups", 1) != 1:
        arguments["expand"] = 2.0  # which they divide
    return Drawn(
        lambda **kw: kind(2, hidden, **arguments, **kw),
        dims,
        arguments["batch_first"],
        gate_bias=arguments["gate_bias"] if arguments["bias"] else None,
    )


@st.composite
def rcn_layers(draw):
    """GRU_RCN, StackedGRU_RCN, or SepConvGRUCell."""
    kind = draw(st.sampled_from([SepConvGRUCell, StackedGRU_RCN, GRU_RCN]))
    if kind is SepConvGRUCell:
        options = {
            "kernel_size": draw(st.integers(1, 4)),
            "dilation": draw(st.integers(1, 2)),
            "recurrent_groups": draw(st.integers(1, 2)),
            "padding_mode": draw(st.sampled_from(["zeros", "replicate"])),
            "norm": draw(st.sampled_from([None, "layer"])),
            "zoneout": draw(st.sampled_from([0.0, 0.2])),
            **switches(draw, "bias", "reset_after", "residual", "learn_h0", "batch_first"),
        }
        options |= gate_biases(draw, options["bias"], 0.0)
        make = lambda **kw: SepConvGRUCell(2, 4, **options, **kw)
        return Drawn(make, 2, options["batch_first"], gate_bias=options["gate_bias"] if options["bias"] else None)
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    options = {"kernel_size": kernel, **switches(draw, "bias", "batch_first")}
    if kind is GRU_RCN:
        options["recompute"] = draw(st.booleans())
        return Drawn(lambda **kw: GRU_RCN(2, 3, **options, **kw), 2, options["batch_first"])
    levels = draw(st.integers(1, 3))
    make = lambda **kw: StackedGRU_RCN([2] * levels, [3, 2, 4][:levels], **options, **kw)
    return Drawn(make, 2, options["batch_first"], levels)


@st.composite
def both_directions(draw):
    """Bidirectional over any layer of one direction."""
    one = draw(st.sampled_from([rcn_layers(), gru_layers(both=False), mingru_layers(both=False)]).flatmap(lambda x: x))
    if draw(st.booleans()):
        return one._replace(make=lambda **kw: Bidirectional(one.make(**kw)))
    return one._replace(make=lambda **kw: Bidirectional(one.make(**kw), one.make(**kw)))


def loss(outputs):
    """A scalar of every entry, with a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    return sum((w * y).sum() for w, y in zip(weights, outputs, strict=True))


def initial_gate_biases(rnn):
    for layer in rnn.modules():
        if hasattr(layer, "C") and layer.bias is not None:
            yield layer.bias[: layer.hidden_size]
        elif hasattr(layer, "gate_hidden"):
            gates = layer.gate_hidden.bias.split(layer.size)
            yield (gates[1] - gates[0]) / 2 if layer.lstm else gates[0]


def check_gate_bias(rnn, value):
    found = torch.cat(list(initial_gate_biases(rnn)))
    if value == "chrono":
        assert (-math.log(8) <= found).all() and (found <= 0).all() and found.unique().numel() > 1
    else:
        assert (found == value).all()


class Runner:
    """A layer in its own order of time and kind of state, called with lists (B, T, ...) and lists of states."""

    def __init__(self, rnn, drawn):
        self.rnn, self.drawn = rnn, drawn
        self.bare = isinstance(rnn, GRU_RCN)

    def given(self, maps, clip=True):
        maps = [x.transpose(0, 1) if clip and not self.drawn.batch_first else x for x in maps]
        return maps[0] if self.drawn.levels is None else maps

    def returned(self, out, h, clip=True):
        outs, states = [out] if self.drawn.levels is None else out, [h] if self.bare else h
        return [y.transpose(0, 1) if clip and not self.drawn.batch_first else y for y in outs], states

    def initial(self, maps):
        h = self.rnn.init_hidden_state(self.given(maps))
        return [h] if self.bare else h

    def __call__(self, maps, h, lengths=None, reset=None):
        reset = reset if reset is None or self.drawn.batch_first else reset.T
        return self.returned(*self.rnn(self.given(maps), h[0] if self.bare else h, lengths=lengths, reset=reset))

    def frame(self, maps, t, h, lengths=None, reset=None):
        frames, h = self.given([x[:, t] for x in maps], clip=False), h[0] if self.bare else h
        reset = None if reset is None else reset[:, t]
        if lengths is None:
            return self.returned(*self.rnn.step(frames, h, reset=reset), clip=False)
        return self.returned(*self.rnn(frames, h, lengths=lengths - t, reset=reset), clip=False)


# Their kernels are those of the others, and take a minute in the interpreter.
ONCE = [pytest.param(layers, marks=pytest.mark.compiled) for layers in (rcn_layers, both_directions)]


@pytest.mark.parametrize("layers", [gru_layers, mingru_layers, *ONCE])
@hypothesis.settings(max_examples=8 if INTERPRETED else 40, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_layer_equals_its_reference(layers, data):
    drawn = data.draw(layers())
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    batch, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    size = data.draw(st.tuples(*[st.integers(5, 6)] * drawn.dims))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch).map(torch.tensor))
    flags = st.lists(st.booleans(), min_size=batch * steps, max_size=batch * steps)
    reset = data.draw(st.none() | flags.map(lambda bits: torch.tensor(bits).view(batch, steps)))
    torch.manual_seed(data.draw(st.integers(0, 99)))

    truth = drawn.make(dtype=torch.float64).eval()
    if drawn.gate_bias is not None:
        check_gate_bias(truth, drawn.gate_bias)
    sizes = [size, (3, 2), (3, 2)][: drawn.levels or 1]
    maps = [torch.randn(batch, steps, 2, *entry).to(dtype) for entry in sizes]
    for parameter in truth.parameters():  # biases, norms and learned states too
        torch.nn.init.normal_(parameter, std=0.4)
    try:
        h = [torch.randn_like(state).to(dtype) for state in Runner(truth, drawn).initial(maps)]
        Runner(truth, drawn)([x.double() for x in maps], [state.double() for state in h])
    except ValueError as error:  # a frame smaller than what reflect and circular padding must find
        assert "x is too small" in str(error)
        hypothesis.reject()
    run = Runner(drawn.make(dtype=dtype).eval(), drawn)
    run.rnn.load_state_dict(truth.to(dtype).state_dict())
    truth.double()

    masks = {"lengths": lengths, "reset": reset}
    leaves = [x.requires_grad_() for x in (*maps, *h)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    outs, h_n = run(maps, h, **masks)
    given, states = exact[: len(maps)], exact[len(maps) :]
    outs_ref, h_ref = reference(truth, given if drawn.levels else given[0], states, **masks)
    outs_ref = outs_ref if drawn.levels else [outs_ref]
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    assert_close([y.double() for y in (*outs, *h_n)], [*outs_ref, *h_ref], **close)
    if lengths is not None:  # whatever the padding holds
        padding = torch.arange(steps) >= lengths[:, None]
        dirty = [x.masked_fill(padding.view(batch, steps, *[1] * (x.dim() - 2)), float("nan")) for x in maps]
        assert_close(run(dirty, h, **masks), (outs, h_n), atol=0, rtol=0)
    if dtype == torch.float64:
        options = {"allow_unused": True, "materialize_grads": True}
        ours = torch.autograd.grad(loss([*leaves, *outs, *h_n]), [*leaves, *run.rnn.parameters()], **options)
        theirs = torch.autograd.grad(loss([*exact, *outs_ref, *h_ref]), [*exact, *truth.parameters()], **options)
        assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    if getattr(run.rnn, "bidirectional", isinstance(run.rnn, Bidirectional)):
        return
    cut = data.draw(st.integers(0, steps))
    parts, state = [], h
    for span in (slice(0, cut), slice(cut, steps)):
        left = None if lengths is None else lengths - span.start
        part, state = run([x[:, span] for x in maps], state, left, None if reset is None else reset[:, span])
        parts.append(part)
    assert_close(([torch.cat(level, 1) for level in zip(*parts, strict=True)], state), (outs, h_n), **close)
    frames, state = [], h
    for t in range(steps):
        frame, state = run.frame(maps, t, state, **masks)
        frames.append(frame)
    assert_close(([torch.stack(level, 1) for level in zip(*frames, strict=True)], state), (outs, h_n), **close)
