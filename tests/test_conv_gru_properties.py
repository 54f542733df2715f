"""ConvGRU with arguments, sizes, cuts and lengths drawn at random: the reference, chunks, gradients, padding."""

import pytest
import torch
from torch.testing import assert_close

from convrnn import ConvGRU, ConvGRU1d, ConvGRU3d

from .conftest import INTERPRETED
from .conv_gru_reference import reference

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

kernel = st.integers(1, 3)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.15}


@st.composite
def layers(draw):
    """A class and its arguments."""
    kind = draw(st.sampled_from([ConvGRU1d, ConvGRU, ConvGRU, ConvGRU3d]))
    dims = kind.spatial_dims
    hidden = draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=2))
    sizes = st.tuples(*[kernel] * dims)

    def per_layer(entries):
        return draw(st.lists(entries, min_size=len(hidden), max_size=len(hidden)))

    separable = draw(st.booleans())
    arguments = {
        "kernel_sizes": per_layer(sizes),
        "recurrent_kernel_sizes": draw(st.none() | sizes.map(lambda size: [size] * len(hidden))),
        "strides": per_layer(st.integers(1, 2)),
        "dilations": per_layer(st.integers(1, 2)),
        "groups": 1 if separable else per_layer(st.integers(1, 2)),
        "recurrent_groups": 1 if separable else draw(st.integers(1, 2)),
        "separable": separable,
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        "norm": draw(st.sampled_from([None, "layer", True])),
        "cell_norm": draw(st.sampled_from([None, None, "layer"])),
        "zoneout": draw(st.sampled_from([0.0, 0.2])),
        **{name: draw(st.booleans()) for name in ("bias", "reset_after", "residual", "learn_h0", "bidirectional")},
    }
    if draw(st.booleans()):  # what the whole-sequence op covers
        plain = {"strides": 1, "dilations": 1, "groups": 1, "recurrent_groups": 1, "separable": False, "zoneout": 0.0}
        arguments |= {**plain, "padding_mode": "zeros", "cell_norm": None, "reset_after": False}
    return kind, hidden, arguments


def loss(x, outputs):
    """A scalar of x, and of every entry with a weight of its own."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    return 0 * x.sum() + sum((w * y).sum() for w, y in zip(weights, outputs, strict=True))


@hypothesis.settings(max_examples=20 if INTERPRETED else 150, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_layer_equals_its_reference(data):
    kind, hidden, arguments = data.draw(layers())
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    batch, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    size = data.draw(st.tuples(*[st.integers(5, 6)] * kind.spatial_dims))
    lengths = data.draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch).map(torch.tensor))
    flags = st.lists(st.booleans(), min_size=batch * steps, max_size=batch * steps)
    reset = data.draw(st.none() | flags.map(lambda bits: torch.tensor(bits).view(batch, steps)))
    torch.manual_seed(data.draw(st.integers(0, 99)))

    truth = kind(2, hidden, **arguments, dtype=torch.float64).eval()
    x = torch.randn(batch, steps, 2, *size).to(dtype)
    try:
        rnn = kind(2, hidden, **arguments, dtype=torch.float64).eval().requires_grad_()
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
        (ours,) = torch.autograd.grad(loss(x, [out, *h_n]), x)
        (theirs,) = torch.autograd.grad(loss(exact, [out_ref, *h_ref]), exact)
        assert_close(ours, theirs, **close)
    if rnn.directions == 1:
        cut = data.draw(st.integers(0, steps))
        parts = []
        for span in (slice(0, cut), slice(cut, steps)):
            left = None if lengths is None else lengths - span.start
            part, h = rnn(x[:, span], h, lengths=left, reset=None if reset is None else reset[:, span])
            parts.append(part)
        assert_close((torch.cat(parts, 1), h), (out, h_n), **close)
