"""A cell of a kind that the package has not, whose state is a pair: what every stack does around a cell, against nn.LSTM."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import convrnn
from convrnn import state
from convrnn.nn._cell import Cell, check_state, time_loop
from convrnn.nn._options import GRUOptions
from convrnn.nn._stack import ConvStack

# The layers' own code, which the backends share.
pytestmark = pytest.mark.compiled

B, T, SIZE, HIDDEN = 3, 5, 4, 6


class LSTMCell(Cell):
    """Convolutional LSTM without a bias, gates in the order of torch.nn.LSTM."""

    def __init__(self, size_in, size, conv, recurrent, options, backwards=False, **factory):
        super().__init__()
        self.size, self.conv, self.recurrent = size, conv, recurrent
        self.backwards, self.time_first = backwards, False
        self.W = nn.Parameter(torch.randn(4 * size, size_in, *conv.kernel, **factory))
        self.U = nn.Parameter(torch.randn(4 * size, size, *conv.kernel, **factory))

    def project(self, frames, masks):
        return self.conv(frames, self.W)

    def scan(self, projection, h, i, masks):
        batch, size = projection.shape[0], list(projection.shape[3:])
        initial = self.initial_state(projection, batch, size)
        if h is not None:
            check_state(f"h[{i}]", h[i], [batch, self.size, *size], projection)

        def step(frame, state):
            a, b, g, o = (frame + self.recurrent(state[0], self.U)).chunk(4, 1)
            c = b.sigmoid() * state[1] + a.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c

        return time_loop(step, projection, initial if h is None else h[i], masks, initial)

    def state_size(self, size):
        return self.conv.size(size)

    def initial_state(self, x, batch, size):
        return x.new_zeros(batch, self.size, *size), x.new_zeros(batch, self.size, *size)


class ConvLSTM(ConvStack):
    def __init__(self, input_size, hidden_sizes, **options):
        known = inspect.signature(convrnn.ConvGRU).parameters
        arguments = {name: parameter.default for name, parameter in known.items()} | {"kernel_sizes": 1} | options
        super().__init__([input_size, *hidden_sizes], arguments, LSTMCell, GRUOptions())


def make(device, **options):
    """Two layers of both directions on single pixels, torch.nn.LSTM with their weights, and an input."""
    torch.manual_seed(0)
    factory = {"device": device, "dtype": torch.float64}
    rnn = ConvLSTM(SIZE, [HIDDEN, HIDDEN], bidirectional=True, **options, **factory)
    lstm = nn.LSTM(SIZE, HIDDEN, 2, bias=False, batch_first=True, bidirectional=True, **factory)
    with torch.no_grad():
        for i in range(2):
            for cell, ending in ((rnn.layers[i], ""), (rnn.backward_layers[i], "_reverse")):
                getattr(lstm, f"weight_ih_l{i}{ending}").copy_(cell.W.flatten(1))
                getattr(lstm, f"weight_hh_l{i}{ending}").copy_(cell.U.flatten(1))
    return rnn, lstm, torch.randn(B, T, SIZE, **factory)


def flat(states):
    """[(h, c), ...] as torch.nn.LSTM has it."""
    return tuple(torch.stack(parts)[..., 0, 0] for parts in zip(*states, strict=True))


def test_states_of_two_tensors(device):
    rnn, lstm, x = make(device)
    pixels = x[..., None, None]
    h = tuple(torch.randn(4, B, HIDDEN, dtype=x.dtype, device=device) for _ in range(2))
    pairs = [tuple(part[i, ..., None, None] for part in h) for i in range(4)]
    out, last = rnn(pixels, pairs)
    assert_close((out[..., 0, 0], flat(last)), lstm(x, h))
    assert_close(rnn(pixels), rnn(pixels, rnn.init_hidden_state(pixels)))
    first = make(device, batch_first=False)[0]
    assert_close(first(pixels.transpose(0, 1), pairs)[0].transpose(0, 1), out)
    with pytest.raises(ValueError, match=r"h\[1\]\[0\] must have shape \[3, 6, 1, 1\], got \[2, 6, 1, 1\]"):
        rnn(pixels, [pairs[0], tuple(part[:2] for part in pairs[1]), *pairs[2:]])


def test_lengths(device):
    rnn, lstm, x = make(device)
    lengths = torch.tensor([T, 2, 3])
    packed, last = lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    x[1, 2:], x[2, 3:] = float("nan"), float("inf")
    out, states = rnn(x[..., None, None], lengths=lengths)
    assert_close((out[..., 0, 0], flat(states)), (pad_packed_sequence(packed, batch_first=True)[0], last))


def test_resets(device):
    rnn, lstm, x = make(device)
    reset = torch.zeros(B, T, dtype=torch.bool, device=device)
    reset[:, 2] = True
    out, _ = rnn(x[..., None, None], reset=reset)
    assert_close(out[..., 0, 0], torch.cat((lstm(x[:, :2])[0], lstm(x[:, 2:])[0]), 1))


def test_residuals_norms_and_spatial_sizes(device):
    rnn = ConvLSTM(SIZE, [HIDDEN, 8], kernel_sizes=3, strides=[2, 1], residual=True, norm="layer", device=device)
    x = torch.randn(B, T, SIZE, 7, 6, device=device)
    out, states = rnn(x)
    assert out.shape == (B, T, 8, 4, 3) and [c.shape for _, c in states] == [(B, 6, 4, 3), (B, 8, 4, 3)]
    half, carried = rnn(x[:, :2])
    for t in range(2, T):
        frame, carried = rnn.step(x[:, t], carried)
    assert_close((frame, carried), (out[:, -1], states))
    assert_close(half, out[:, :2])
    (cut, _), begun = state.detach(carried)[1], state.reset(carried, torch.tensor([0]), 0.0)
    assert not cut.requires_grad and not begun[1][1][0].any() and begun[1][1][1].any()
    torch.autograd.grad(out.sum() + sum(c.sum() for _, c in states), [*rnn.parameters()])
