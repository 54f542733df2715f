"""StackedGRU_RCN against the paper's equations, a level and a frame at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from convrnn import GRU_RCN, StackedGRU_RCN

B, T = 2, 3


@pytest.mark.parametrize("batch_first", [True, False])
def test_paper(device, batch_first):
    options = {"bias": True, "batch_first": batch_first, "dtype": torch.float64, "device": device}
    rnn = StackedGRU_RCN([3, 4, 5], [2, 3, 4], (3, 2), **options)
    xs = [torch.randn(B, T, c, s, s, dtype=torch.float64, device=device) for c, s in ((3, 8), (4, 4), (5, 4))]
    given = xs if batch_first else [x.transpose(0, 1) for x in xs]
    h = [torch.randn_like(state) for state in rnn.init_hidden_state(given)]
    outs, h_n = rnn(given, h)
    pools = [None, lambda g: F.max_pool2d(g, 2), lambda g: g]

    def conv(x, weight):
        return F.conv2d(F.pad(x, (0, 1, 1, 1)), weight)

    for t in range(T):
        below = None
        for i, level in enumerate(rnn.levels):
            W, bias = level.W.chunk(3), level.bias.chunk(3)
            Wz, Wr, Wc = (conv(xs[i][:, t], w) + b.view(1, -1, 1, 1) for w, b in zip(W, bias, strict=True))
            Uz, Ur = (conv(h[i], u) for u in level.U.chunk(2))
            Vz, Vr = (0, 0) if i == 0 else (conv(pools[i](below), v) for v in rnn.bottom_up[i - 1].chunk(2))
            z, r = torch.sigmoid(Wz + Vz + Uz), torch.sigmoid(Wr + Vr + Ur)
            h[i] = below = (1 - z) * h[i] + z * torch.tanh(Wc + conv(r * h[i], level.C))
            assert_close(outs[i].select(1 if batch_first else 0, t), below)
    assert_close(h_n, h)
    assert all(g.any() for g in torch.autograd.grad(outs[-1].sum(), [*rnn.parameters()]))


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
