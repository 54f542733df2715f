"""convrnn.state on the states of both families: rows reset, reordered, added and removed, history cut."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

import convrnn
from convrnn import state

pytestmark = pytest.mark.compiled  # nothing here asks which kernel computes

B, T = 3, 5
CLIP = torch.ones(2, 4, 3)
PACKED = pack_sequence([CLIP[0], CLIP[1, :2]], enforce_sorted=False)
LAYERS = {
    "ConvGRU": lambda: convrnn.ConvGRU(2, [4, 3], 3, strides=[1, 2], learn_h0=True, bidirectional=True, bias=True),
    "MinConv2dGRU": lambda: convrnn.MinConv2dGRU(2, [4, 3], 3, paddings=1),
    "GRU_RCN": lambda: convrnn.GRU_RCN(2, 4, 3),
}


@pytest.fixture(params=LAYERS)
def made(request, device):
    rnn = LAYERS[request.param]().to(device)
    x = torch.randn(B, T, 2, 6, 5, device=device)
    return rnn, x, rnn(x)[1]


def test_reset_rows_continue_as_new_ones(made):
    rnn, x, h = made
    rows = torch.tensor([True, False, True], device=x.device)
    initial = rnn.init_hidden_state(x)
    new = state.reset(h, rows, initial)
    assert_close(state.reset(h, torch.tensor([2, 0], device=x.device), initial), new)
    out, fresh, old = rnn(x, new)[0], rnn(x)[0], rnn(x, h)[0]
    assert_close(out[rows], fresh[rows])
    assert_close(out[1], old[1])


def test_reorder_and_resize_the_batch(made):
    rnn, x, h = made
    index = torch.tensor([2, 2, 0, 1], device=x.device)
    assert_close(rnn(x[index], state.reorder(h, index))[0], rnn(x, h)[0][index])
    assert_close(rnn(x[:2], state.resize(h, 2, 0.0))[0], rnn(x, h)[0][:2])
    more = torch.cat((x, x))
    grown = state.resize(h, 2 * B, rnn.init_hidden_state(more))
    assert_close(rnn(more, grown)[0], torch.cat((rnn(x, h)[0], rnn(x)[0])))


def test_truncated_bptt_cuts_gradients_and_nothing_else():
    rnn = convrnn.ConvGRU(2, 4, 3)
    x = torch.randn(B, T, 2, 6, 5, requires_grad=True)
    whole, last = rnn(x)
    spans, outs = [], []
    for span, out, h in state.truncated_bptt(rnn, x, 2):
        final = h
        spans.append(span)
        outs.append(out)
        (gradient,) = torch.autograd.grad(out[:, -1].sum(), x)
        reached = gradient.flatten(2).any(2).any(0).tolist()
        assert reached == [span.start <= t < span.stop for t in range(T)]
    assert spans == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert_close((torch.cat(outs, 1), final), (whole, last))
    assert final[0].requires_grad and not state.detach(final)[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)  # of which 3 - 4 is 255
def test_truncated_bptt_cuts_masks_and_lists_too(dtype):
    rnn = convrnn.StackedGRU_RCN([2, 2], [3, 4], 3, batch_first=False)
    xs = [torch.randn(T, B, 2, size, size) for size in (6, 3)]
    masks = {"lengths": torch.tensor([5, 0, 3], dtype=dtype), "reset": torch.rand(T, B) < 0.3}
    outs, last = rnn(xs, **masks)
    chunks = list(state.truncated_bptt(rnn, xs, 2, time_dim=0, **masks))
    assert_close([torch.cat(level) for level in zip(*(out for _, out, _ in chunks), strict=True)], outs)
    assert_close(chunks[-1][2], last)


def test_nests_and_numbers():
    nest = {"a": [torch.ones(2, 3)], "b": (torch.ones(2, 1, 4),)}
    grown = state.resize(nest, 3, 0.5)
    assert grown["a"][0][2].unique() == 0.5 and grown["b"][0].shape == (3, 1, 4)
    assert nest["a"][0].shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h: state.reset(h, [True], 0.0), TypeError, "rows must be a bool or integer Tensor, got list"),
        (lambda h: state.reset(h, torch.ones(3) > 0, 0.0), ValueError, r"rows must have shape \[2\], got \[3\]"),
        (lambda h: state.reset(h, torch.ones(2, 1) > 0, 0.0), ValueError, "rows must have one dimension"),
        (lambda h: state.reset(h, torch.ones(2) > 0, [h[0][:1]]), ValueError, r"initial must have the shape"),
        (lambda h: state.reset(h, torch.ones(2) > 0, h[0]), ValueError, "initial must be a number or a state of"),
        (lambda h: state.reorder(h, torch.ones(2)), TypeError, "index must be a bool or integer Tensor"),
        (lambda h: state.reorder(h, torch.ones(2) > 0), TypeError, "index must be an integer Tensor"),
        (lambda h: state.resize(h, -1, 0.0), ValueError, "batch must be at least 0, got -1"),
        (lambda h: state.resize(h, 2.0, 0.0), TypeError, "batch must be an int, got 2.0"),
        (lambda h: state.resize(h, 3, [h[0]]), ValueError, r"initial must have shape \[3, 4\], got \[2, 4\]"),
        (lambda h: state.detach([None]), TypeError, "state must be a nest of Tensors"),
        (
            lambda h: state.reset([*h, torch.ones(3)], torch.ones(2) > 0, 0.0),
            ValueError,
            "state must hold Tensors of one",
        ),
        (lambda h: next(state.truncated_bptt(None, 3.0, 1)), TypeError, "x must be a Tensor or a list of .* got float"),
        (lambda h: next(state.truncated_bptt(None, h[0], 0)), ValueError, "steps must be at least 1, got 0"),
        (lambda h: next(state.truncated_bptt(None, CLIP, 2.0)), TypeError, "steps must be an int, got 2.0"),
        (
            lambda h: next(state.truncated_bptt(None, CLIP, 2, time_dim=3)),
            ValueError,
            "time_dim must be less than the 3 d",
        ),
        (lambda h: next(state.truncated_bptt(None, CLIP, 2, time_dim=-4)), ValueError, "time_dim must be at least -3"),
        (
            lambda h: next(state.truncated_bptt(None, PACKED, 2)),
            TypeError,
            "x must be a Tensor or a list of Tensors, got PackedSequence",
        ),
        (
            lambda h: next(state.truncated_bptt(None, [CLIP, CLIP[:, 1:]], 2)),
            ValueError,
            r"x must hold Tensors of one number of frames at dim 1, got \[4, 3\]",
        ),
        (
            lambda h: next(state.truncated_bptt(None, CLIP, 2, lengths=[4, 4])),
            TypeError,
            r"lengths must be an integer Tensor of shape \[2\], got list",
        ),
        (
            lambda h: next(
                state.truncated_bptt(None, CLIP.transpose(0, 1), 2, time_dim=0, lengths=torch.ones(4).int())
            ),
            ValueError,
            r"lengths must have shape \[2\], got \[4\]",
        ),
        (
            lambda h: next(state.truncated_bptt(None, CLIP, 2, reset=[True])),
            TypeError,
            r"reset must be a bool Tensor of shape \[2, 4\], got list",
        ),
        (
            lambda h: next(state.truncated_bptt(None, CLIP, 2, reset=torch.ones(2, 5) > 0)),
            ValueError,
            r"reset must have shape \[2, 4\], got \[2, 5\]",
        ),
    ],
)
def test_bad_calls(call, error, message):
    with pytest.raises(error, match=message):
        call([torch.ones(2, 4)])


def test_truncated_bptt_counts_time_from_either_end():
    rnn, x, lengths = convrnn.ConvGRU(3, 4, 3, batch_first=False), torch.randn(5, 2, 3, 6, 6), torch.tensor([5, 2])
    reset = torch.rand(5, 2) < 0.5
    chunks = [list(state.truncated_bptt(rnn, x, 2, time_dim=dim, lengths=lengths, reset=reset)) for dim in (0, -5)]
    for (_, expected, _), (_, actual, _) in zip(*chunks, strict=True):
        assert torch.equal(actual, expected)


def test_truncated_bptt_takes_sequences_of_tokens():
    def rnn(x, h):
        return x + 1, torch.zeros(1)

    found = [out.tolist() for _, out, _ in state.truncated_bptt(rnn, torch.arange(5), 2, time_dim=0)]
    assert found == [[1, 2], [3, 4], [5]]


def test_numbers_of_numpy():
    rnn, x = convrnn.MinGRU(3, 4), torch.randn(2, 5, 3)
    chunks = state.truncated_bptt(rnn, x, np.int64(2), time_dim=np.int32(1))
    assert [(span.start, span.stop, out.shape[1]) for span, out, _ in chunks] == [(0, 2, 2), (2, 4, 2), (4, 5, 1)]
    h = [torch.ones(2, 3)]
    assert torch.equal(
        state.resize(h, np.int64(3), np.float32(0.5))[0], torch.tensor([[1.0] * 3, [1.0] * 3, [0.5] * 3])
    )
    assert torch.equal(
        state.reset(h, torch.tensor([True, False]), np.int64(0))[0], torch.tensor([[0.0] * 3, [1.0] * 3])
    )
