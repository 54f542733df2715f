"""A PackedSequence as the input of every layer, as torch.nn.GRU takes one: each row alone is what must come back."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing import assert_close

from convrnn import (
    GRU_RCN,
    Bidirectional,
    ConvGRU,
    ConvGRU1d,
    ConvGRU3d,
    ConvGRUCell,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinConv3dGRU,
    MinGRU,
    MinGRUCell,
    MinLSTM,
    SepConvGRUCell,
    StackedGRU_RCN,
)

pytestmark = pytest.mark.compiled  # the order of rows, which no kernel sees

SIZE, LENGTHS = 2, [2, 5, 1]
MAP = (4, 5)


def levels(**kw):
    return StackedGRU_RCN([SIZE, SIZE], [2, 3], 3, **kw)


# A layer, the size of its frames; cells of the minGRU family know no batch_first.
CASES = {
    "GRU_RCN": (lambda **kw: GRU_RCN(SIZE, 3, 3, bias=True, **kw), MAP),
    "StackedGRU_RCN": (levels, MAP),
    "ConvGRU": (lambda **kw: ConvGRU(SIZE, [3, 2], 3, strides=[2, 1], norm="layer", residual=True, **kw), MAP),
    "ConvGRU-walking": (lambda **kw: ConvGRU(SIZE, 3, 3, reset_after=True, bidirectional=True, **kw), MAP),
    "ConvGRU1d": (lambda **kw: ConvGRU1d(SIZE, 3, 3, learn_h0=True, **kw), (5,)),
    "ConvGRU3d": (lambda **kw: ConvGRU3d(SIZE, 3, 3, bidirectional=True, **kw), (2, 3, 2)),
    "ConvGRUCell": (lambda **kw: ConvGRUCell(SIZE, 3, 3, **kw), MAP),
    "SepConvGRUCell": (lambda **kw: SepConvGRUCell(SIZE, 3, 3, **kw), MAP),
    "MinGRU": (lambda **kw: MinGRU(SIZE, [3, 2], norm=True, residual=True, **kw), ()),
    "MinLSTM": (lambda **kw: MinLSTM(SIZE, 3, bidirectional=True, **kw), ()),
    "MinConv2dGRU": (lambda **kw: MinConv2dGRU(SIZE, [3, 2], 3, paddings=1, norm=True, **kw), MAP),
    "MinConv3dGRU": (lambda **kw: MinConv3dGRU(SIZE, 3, 1, learn_h0=True, **kw), (2, 3, 2)),
    "MinGRUCell": (lambda **kw: MinGRUCell(SIZE, 3, **kw), ()),
    "MinConv2dGRUCell": (lambda **kw: MinConv2dGRUCell(SIZE, 3, 3, stride=2, **kw), MAP),
    "both-MinGRU": (lambda **kw: Bidirectional(MinGRU(SIZE, 3, **kw), MinGRU(SIZE, 2, **kw)), ()),
    "both-MinConv2dGRUCell": (lambda **kw: Bidirectional(MinConv2dGRUCell(SIZE, 3, 3, **kw)), MAP),
    "both-GRU_RCN": (lambda **kw: Bidirectional(GRU_RCN(SIZE, 3, 3, **kw), GRU_RCN(SIZE, 2, 3, **kw)), MAP),
    "both-ConvGRU": (lambda **kw: Bidirectional(ConvGRU(SIZE, [3, 2], 3, norm="layer", **kw)), MAP),
    "both-SepConvGRUCell": (lambda **kw: Bidirectional(SepConvGRUCell(SIZE, 3, 3, **kw)), MAP),
    "both-StackedGRU_RCN": (lambda **kw: Bidirectional(levels(**kw), levels(**kw)), MAP),
}
FORMS = [
    pytest.param(case, batch_first, id=f"{case}{'' if batch_first else '-time_first'}")
    for case in CASES
    for batch_first in (True, False)
    if batch_first or not case.endswith(("MinGRUCell", "MinConv2dGRUCell"))
]


class OfOneInput(nn.Module):
    """A layer with one input and a list of states, whatever the layer's are; of levels, a map and its second pixels."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.levels = isinstance(rnn, StackedGRU_RCN) or getattr(rnn, "takes_levels", False)
        self.one_state = isinstance(rnn, GRU_RCN)

    def maps(self, x):
        if not self.levels:
            return x
        if isinstance(x, PackedSequence):
            return [x, x._replace(data=x.data[..., ::2, ::2])]
        return [x, x[..., ::2, ::2]]

    def forward(self, x, h=None, **masks):
        out, states = self.rnn(self.maps(x), h[0] if self.one_state and h is not None else h, **masks)
        return out[-1] if self.levels else out, [states] if self.one_state else states


def build(case, device, **options):
    """A layer, rows of unequal lengths that want gradients, and states."""
    make, size = CASES[case]
    rnn = OfOneInput(make(device=device, dtype=torch.float64, **options))
    rows = [torch.randn(n, SIZE, *size, device=device, dtype=torch.float64, requires_grad=True) for n in LENGTHS]
    batch = nn.utils.rnn.pad_sequence([row.detach() for row in rows], options.get("batch_first", True))
    states = rnn.rnn.init_hidden_state(rnn.maps(batch))
    h = [torch.randn_like(state).requires_grad_() for state in ([states] if rnn.one_state else states)]
    return rnn, rows, h


@pytest.mark.parametrize("given", ["sorted", "unsorted"])
@pytest.mark.parametrize(("case", "batch_first"), FORMS)
def test_each_row_alone(case, batch_first, given, device):
    rnn, rows, h = build(case, device, **({} if batch_first else {"batch_first": False}))
    if given == "sorted":
        rows = [rows[1], rows[0], rows[2]]
    packed = pack_sequence(rows, enforce_sorted=given == "sorted")
    out, states = rnn(packed, h)
    assert isinstance(out, PackedSequence)
    assert torch.equal(out.batch_sizes, packed.batch_sizes) and out.sorted_indices is packed.sorted_indices
    assert out.unsorted_indices is packed.unsorted_indices
    padded, sizes = pad_packed_sequence(out, batch_first=True)
    assert sizes.tolist() == [len(row) for row in rows]
    time, expected, expected_states = 1 if batch_first else 0, [], []
    for i, row in enumerate(rows):
        alone, last = rnn(row.unsqueeze(1 - time), [state[i : i + 1] for state in h])
        expected.append(alone.squeeze(1 - time))
        expected_states.append(last)
    assert_close([padded[i, : len(row)] for i, row in enumerate(rows)], expected)
    assert_close(states, [torch.cat(rows_of) for rows_of in zip(*expected_states, strict=True)])
    leaves, weights = [*rows, *h, *rnn.parameters()], [torch.randn_like(y) for y in (*expected, *states)]
    alone = [y for last in zip(*expected_states, strict=True) for y in last]
    pieces = [weight[i : i + 1] for weight in weights[len(rows) :] for i in range(len(rows))]
    found = torch.autograd.grad(
        [*(padded[i, : len(row)] for i, row in enumerate(rows)), *states], leaves, weights, materialize_grads=True
    )
    wanted = torch.autograd.grad([*expected, *alone], leaves, [*weights[: len(rows)], *pieces], materialize_grads=True)
    assert_close(found, wanted)


@pytest.mark.parametrize(("case", "batch_first"), FORMS)
def test_resets_and_absent_states(case, batch_first, device):
    """``reset`` has the rows in the order of the batch, and that of the padded sequence's dimensions."""
    rnn, rows, h = build(case, device, **({} if batch_first else {"batch_first": False}))
    packed = pack_sequence(rows, enforce_sorted=False)
    batch, lengths = pad_packed_sequence(packed, batch_first=batch_first)
    reset = torch.rand(batch.shape[:2], device=device) < 0.5
    for given in ({}, {"reset": reset}, {"reset": reset, "h": h}):
        out, states = rnn(packed, **given)
        expected, expected_states = rnn(batch, lengths=lengths, **given)
        assert_close((pad_packed_sequence(out, batch_first=batch_first)[0], states), (expected, expected_states))


def test_one_state_for_the_whole_batch(device):
    """Its first dimension is no row, although there are as many channels as rows."""
    rnn, rows, _ = build("GRU_RCN", device)
    packed, h = pack_sequence(rows, enforce_sorted=False), torch.randn(3, *MAP, device=device, dtype=torch.float64)
    assert_close(rnn.rnn(packed, h)[1], rnn.rnn(packed, h.expand(len(rows), *h.shape))[1])


def test_the_order_is_that_of_torch_gru(device):
    """What comes back fits what torch.nn.GRU returns for the same batch, entry by entry."""
    x = torch.randn(3, 6, SIZE, device=device)
    packed = pack_padded_sequence(x, torch.tensor([2, 6, 3]), batch_first=True, enforce_sorted=False)
    theirs, h_n = nn.GRU(SIZE, 3, batch_first=True, device=device)(packed)
    ours, states = MinGRU(SIZE, 3, device=device)(packed)
    assert ours.data.shape == theirs.data.shape and states[0].shape[0] == h_n.shape[1]
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_bad_calls(case):
    rnn, rows, h = build(case, "cpu")
    packed = pack_sequence(rows, enforce_sorted=False)
    with pytest.raises(ValueError, match="lengths must be None with a PackedSequence, which has its own, got a value"):
        rnn(packed, lengths=torch.tensor(LENGTHS))
    with pytest.raises(ValueError, match=r"reset must have shape \[3, 5\], got \[5, 3\]"):
        rnn(packed, reset=torch.zeros(5, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"h.* must have shape \[3, "):
        rnn(packed, [h[0][:2], *h[1:]])
    with pytest.raises(TypeError, match=r"h.* must be a Tensor"):
        rnn(packed, ["h", *h[1:]])
    if not case.startswith("both") and not getattr(rnn.rnn, "bidirectional", False):
        with pytest.raises(TypeError, match="x must be a Tensor.* got PackedSequence"):
            rnn.rnn.step(rnn.maps(packed))


def test_levels_are_packed_alike():
    rnn = levels()
    a, b = (pack_sequence([torch.randn(n, SIZE, *MAP) for n in lengths]) for lengths in ((3, 2), (3, 1)))
    with pytest.raises(ValueError, match="xs must hold PackedSequences of the same lengths"):
        rnn([a, b])
    with pytest.raises(TypeError, match="xs must hold Tensors or PackedSequences, got Tensor beside a PackedSequence"):
        rnn([a, torch.randn(2, 3, SIZE, *MAP)])
    with pytest.raises(TypeError, match="xs must be a list of 2 Tensors"):
        rnn(a)
    with pytest.raises(ValueError, match="xs must hold the maps of 2 levels, got 1"):
        rnn([a])


class Doubled(GRU_RCN):
    def forward(self, frames, state=None):
        out, state = super().forward(frames, state)
        return PackedSequence(2 * out.data, *out[1:]), state


def test_a_forward_of_a_subclass_is_called_once():
    rnn = Doubled(SIZE, 3, 3)
    packed = pack_sequence([torch.randn(2, SIZE, *MAP)])
    assert_close(rnn(packed)[0].data, 2 * GRU_RCN.forward(rnn, packed)[0].data)
