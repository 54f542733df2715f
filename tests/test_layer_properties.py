"""Layers with arguments, sizes, cuts and lengths drawn at random: the reference, chunks, gradients, padding."""

import pytest
import torch
from torch.testing import assert_close

from convrnn import ConvGRU, ConvGRU1d, ConvGRU3d, MinConv1dGRU, MinConv2dGRU, MinConv3dGRU, MinGRU, MinLSTM

from .conftest import INTERPRETED
from .layer_reference import reference

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.15}


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


@st.composite
def gru_layers(draw):
    """A class of the ConvGRU family, its hidden sizes and its arguments."""
    kind = draw(st.sampled_from([ConvGRU1d, ConvGRU, ConvGRU, ConvGRU3d]))
    hidden = draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2))
    arguments, sizes = convolutions(draw, kind.spatial_dims, len(hidden))
    arguments |= {
        "recurrent_kernel_sizes": draw(st.none() | sizes.map(lambda size: [size] * len(hidden))),
        "recurrent_groups": 1 if arguments["separable"] else draw(st.integers(1, 2)),
        "norm": draw(st.sampled_from([None, "layer", True])),
        "cell_norm": draw(st.sampled_from([None, None, "layer"])),
        "zoneout": draw(st.sampled_from([0.0, 0.2])),
        **switches(draw, "bias", "reset_after", "residual", "learn_h0", "bidirectional"),
    }
    if draw(st.booleans()):  # what the whole-sequence op covers
        plain = {"strides": 1, "dilations": 1, "groups": 1, "recurrent_groups": 1, "separable": False, "zoneout": 0.0}
        arguments |= {**plain, "paddings": "same", "padding_mode": "zeros", "cell_norm": None, "reset_after": False}
    return kind, hidden, arguments


@st.composite
def mingru_layers(draw):
    """A class of the minGRU family, its hidden sizes and its arguments."""
    kind = draw(st.sampled_from([MinGRU, MinLSTM, MinConv1dGRU, MinConv2dGRU, MinConv3dGRU]))
    hidden = draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2))
    dims = getattr(kind, "spatial_dims", 0)
    arguments = convolutions(draw, dims, len(hidden))[0] if dims else {}
    arguments |= {
        "norm": draw(st.sampled_from([None, True, "layer", "group" if dims else "rms"])),
        "expand": draw(st.sampled_from([1.0, 1.0, 2.0, 1.5])),
        **switches(draw, "bias", "residual", "learn_h0", "bidirectional"),
    }
    if arguments.get("groups", 1) != 1:
        arguments["expand"] = 2.0  # which they divide
    return kind, hidden, arguments


def loss(x, outputs):
    """A scalar of x, and of every entry with a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    return 0 * x.sum() + sum((w * y).sum() for w, y in zip(weights, outputs, strict=True))


@pytest.mark.parametrize("layers", [gru_layers, mingru_layers])
@hypothesis.settings(max_examples=8 if INTERPRETED else 120, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_layer_equals_its_reference(layers, data):
    kind, hidden, arguments = data.draw(layers())
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    batch, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    size = data.draw(st.tuples(*[st.integers(5, 6)] * getattr(kind, "spatial_dims", 0)))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch).map(torch.tensor))
    flags = st.lists(st.booleans(), min_size=batch * steps, max_size=batch * steps)
    reset = data.draw(st.none() | flags.map(lambda bits: torch.tensor(bits).view(batch, steps)))
    torch.manual_seed(data.draw(st.integers(0, 99)))

    truth = kind(2, hidden, **arguments, dtype=torch.float64).eval()
    x = torch.randn(batch, steps, 2, *size).to(dtype)
    try:
        rnn = kind(2, hidden, **arguments, dtype=torch.float64).eval().requires_grad_()
        for parameter in truth.parameters():  # biases, norms and learned states too
            torch.nn.init.normal_(parameter, std=0.4)
        h = [torch.randn_like(state).to(dtype) for state in truth.init_hidden_state(x.double())]
        truth(x.double(), [state.double() for state in h])
    except ValueError as error:  # a frame smaller than what reflect and circular padding must find
        assert "x is too small" in str(error)
        hypothesis.reject()
    rnn.load_state_dict(truth.to(dtype).state_dict())
    truth.double()
    rnn.to(dtype)

    masks = {"lengths": lengths, "reset": reset}
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    out, h_n = rnn(x, h, **masks)
    out_ref, h_ref = reference(truth, exact, [state.double() for state in h], **masks)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    assert_close((out.double(), [state.double() for state in h_n]), (out_ref, h_ref), **close)
    if lengths is not None:  # whatever the padding holds
        padding = (torch.arange(steps) >= lengths[:, None]).view(batch, steps, *[1] * (x.dim() - 2))
        again = rnn(x.masked_fill(padding, float("nan")), h, **masks)
        assert_close(again, (out, h_n), atol=0, rtol=0)
    if dtype == torch.float64:
        options = {"allow_unused": True, "materialize_grads": True}
        ours = torch.autograd.grad(loss(x, [out, *h_n]), [x, *rnn.parameters()], **options)
        theirs = torch.autograd.grad(loss(exact, [out_ref, *h_ref]), [exact, *truth.parameters()], **options)
        assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    if not arguments["bidirectional"]:
        cut = data.draw(st.integers(0, steps))
        parts = []
        for span in (slice(0, cut), slice(cut, steps)):
            left = None if lengths is None else lengths - span.start
            part, h = rnn(x[:, span], h, lengths=left, reset=None if reset is None else reset[:, span])
            parts.append(part)
        assert_close((torch.cat(parts, 1), h), (out, h_n), **close)
