"""StackedGRU_RCN against the paper's equations, a level and a frame at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from convrnn import GRU_RCN, Bidirectional, StackedGRU_RCN

B, T = 2, 3
POOLS = [None, lambda g: F.max_pool2d(g, 2), lambda g: g]  # between the maps of make()


def make(device, **options):
    """A stack of three levels, its maps (B, T, ...) and a state for each, in float64."""
    rnn = StackedGRU_RCN([3, 4, 5], [2, 3, 4], (3, 2), bias=True, dtype=torch.float64, device=device, **options)
    xs = [torch.randn(B, T, c, s, s, dtype=torch.float64, device=device) for c, s in ((3, 8), (4, 4), (5, 4))]
    return rnn, xs, [torch.randn(B, c, s, s, dtype=torch.float64, device=device) for c, s in ((2, 8), (3, 4), (4, 4))]


def paper(rnn, xs, h, order=range(T)):
    """The states of each level after each frame, read in this order, and the last ones."""

    def conv(x, weight):
        return F.conv2d(F.pad(x, (0, 1, 1, 1)), weight)

    h, outs = [*h], [[None] * T for _ in h]
    for t in order:
        below = None
        for i, level in enumerate(rnn.levels):
            W, bias = level.W.chunk(3), level.bias.chunk(3)
            Wz, Wr, Wc = (conv(xs[i][:, t], w) + b.view(1, -1, 1, 1) for w, b in zip(W, bias, strict=True))
            Uz, Ur = (conv(h[i], u) for u in level.U.chunk(2))
            Vz, Vr = (0, 0) if i == 0 else (conv(POOLS[i](below), v) for v in rnn.bottom_up[i - 1].chunk(2))
            z, r = torch.sigmoid(Wz + Vz + Uz), torch.sigmoid(Wr + Vr + Ur)
            h[i] = below = outs[i][t] = (1 - z) * h[i] + z * torch.tanh(Wc + conv(r * h[i], level.C))
    return [torch.stack(out, 1) for out in outs], h


@pytest.mark.parametrize("batch_first", [True, False])
def test_paper(device, batch_first):
    rnn, xs, h = make(device, batch_first=batch_first)
    outs, h_n = rnn(xs if batch_first else [x.transpose(0, 1) for x in xs], h)
    assert_close(([out if batch_first else out.transpose(0, 1) for out in outs], h_n), paper(rnn, xs, h))
    assert all(g.any() for g in torch.autograd.grad(outs[-1].sum(), [*rnn.parameters()]))


@pytest.mark.compiled  # the kernels are those of one direction
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_both_directions(device, shared):
    (rnn, xs, h), (other, _, back) = make(device), make(device)
    both = Bidirectional(rnn) if shared else Bidirectional(rnn, other)
    (outs, h_n), (wanted, last) = both(xs, h + back), paper(rnn, xs, h)
    turned, first = paper(rnn if shared else other, xs, back, reversed(range(T)))
    assert_close((outs, h_n), ([torch.cat(pair, 2) for pair in zip(wanted, turned, strict=True)], last + first))
    ours = torch.autograd.grad([y.square().sum() for y in (*outs, *h_n)], [*both.parameters()])
    truth = torch.autograd.grad([y.square().sum() for y in (*wanted, *turned, *last, *first)], [*both.parameters()])
    assert_close(ours, truth)
    assert_close(both(xs), both(xs, both.init_hidden_state(xs)))
    frames, _ = both([x[:, 0] for x in xs])
    assert [out.shape for out in frames] == [out[:, 0].shape for out in outs]


def test_one_level_is_gru_rcn(device):
    rnn, seed = StackedGRU_RCN([3], [4], 3, device=device), GRU_RCN(3, 4, 3, device=device)
    rnn.levels[0].load_state_dict(seed.state_dict())
    x = torch.randn(B, T, 3, 5, 5, device=device)
    (out,), (h_n,) = rnn([x])
    assert_close((out, h_n), seed(x))


def test_each_level_is_one_op(device):
    rnn = StackedGRU_RCN([3, 4], [2, 3], 3, device=device)
    with torch.profiler.profile() as profile:
        rnn([torch.randn(B, T, 3, 8, 8, device=device), torch.randn(B, T, 4, 4, 4, device=device)])
    ran = {event.key: event.count for event in profile.key_averages() if event.key.startswith("convrnn::")}
    assert ran == {"convrnn::gru_rcn": 2}
