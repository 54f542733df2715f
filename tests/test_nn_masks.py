"""Lengths, resets and single frames of all layers and of Bidirectional over them.

test_layer_properties.py draws them at random.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

from convrnn import (
    GRU_RCN,
    Bidirectional,
    ConvGRU,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinGRU,
    MinGRUCell,
    SepConvGRUCell,
    StackedGRU_RCN,
)

B, T, SIZE = 3, 6, 4
LENGTHS = [6, 2, 0]


class OneState(GRU_RCN):
    """GRU_RCN with its state in a list, as the other layers have theirs."""

    def forward(self, x, h=None, **masks):
        out, state = super().forward(x, None if h is None else h[0], **masks)
        return out, [state]

    def init_hidden_state(self, x):
        return [super().init_hidden_state(x)]


class Levels(nn.Module):
    """A layer of maps of two levels, over a map and every second pixel of it."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def maps(self, x):
        return [x, x[..., ::2, ::2]]

    def forward(self, x, h=None, **masks):
        outs, states = self.rnn(self.maps(x), h, **masks)
        return outs[-1], states

    def step(self, x, h=None, **masks):
        outs, states = self.rnn.step(self.maps(x), h, **masks)
        return outs[-1], states

    def init_hidden_state(self, x):
        return self.rnn.init_hidden_state(self.maps(x))


def levels(**kw):
    return StackedGRU_RCN([SIZE, SIZE], [2, 3], 3, **kw)


CASES = {
    "cell": lambda **kw: MinGRUCell(SIZE, 5, **kw),
    "layers": lambda **kw: MinGRU(SIZE, [5, 3], norm=True, residual=True, **kw),
    "conv_cell": lambda **kw: MinConv2dGRUCell(SIZE, 5, 3, stride=2, **kw),
    "conv_layers": lambda **kw: MinConv2dGRU(SIZE, [8, 3], 3, paddings=1, norm=True, residual=True, **kw),
    "rcn": lambda **kw: OneState(SIZE, 5, 3, bias=True, **kw),
    "rcn_levels": lambda **kw: Levels(levels(**kw)),
    "conv_sep": lambda **kw: SepConvGRUCell(SIZE, 3, 3, **kw),
    "both_rcn": lambda **kw: Bidirectional(GRU_RCN(SIZE, 3, (2, 3), **kw), GRU_RCN(SIZE, 2, 3, **kw)),
    "both_rcn_levels": lambda **kw: Levels(Bidirectional(levels(**kw), levels(**kw))),
    "both_conv_sep": lambda **kw: Bidirectional(SepConvGRUCell(SIZE, 3, 3, **kw)),
    "both_conv_gru": lambda **kw: Bidirectional(ConvGRU(SIZE, [3, 2], 3, strides=[2, 1], norm="layer", **kw)),
    "both": lambda **kw: Bidirectional(CASES["layers"](**kw), CASES["layers"](**kw)),
    "both_conv_shared": lambda **kw: Bidirectional(CASES["conv_cell"](**kw)),
}
ONCE = (
    "rcn_levels",
    "conv_sep",
    "both_rcn",
    "both_rcn_levels",
    "both_conv_sep",
    "both_conv_gru",
)  # their kernels are those of "rcn"
MARKED = [pytest.param(case, marks=pytest.mark.compiled if case in ONCE else ()) for case in CASES]
each_case = pytest.mark.parametrize("case", MARKED)
each_way_on = pytest.mark.parametrize("case", [case for case in MARKED if not case.values[0].startswith("both")])


def build(case, device):
    torch.manual_seed(0)
    rnn = CASES[case](device=device, dtype=torch.float64)
    x = torch.randn(
        B, T, SIZE, *([6, 5] if "conv" in case or "rcn" in case else []), dtype=torch.float64, device=device
    )
    return rnn, x, [torch.randn_like(state) for state in rnn.init_hidden_state(x)]


def make_masks(device):
    """One row has cuts beside one another and at its ends, one a cut where it ends, one nothing."""
    reset = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 0, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0]], device=device).bool()
    return {"lengths": torch.tensor(LENGTHS, device=device), "reset": reset}


def episodes(rnn, x, h, lengths, reset):
    """Row by row and episode by episode, without a mask: both directions of an episode see that episode alone."""
    rows, finals = [], []
    for b in range(B):
        cuts = [t for t in range(lengths[b]) if reset[b][t] and t > 0]
        bounds = list(zip([0, *cuts], [*cuts, lengths[b]], strict=True))
        row, state = x[b : b + 1], [s[b : b + 1] for s in h]
        blank = rnn(x[:1])[0][:, :1].detach() * 0
        if lengths[b] == 0:
            rows.append(blank.expand(1, T, *blank.shape[2:]))
            finals.append(state)
            continue
        both = isinstance(rnn.rnn if isinstance(rnn, Levels) else rnn, Bidirectional)
        initial, outs, ends = rnn.init_hidden_state(row), [], []
        half = len(h) // 2 if both else len(h)
        for i, (a, end) in enumerate(bounds):
            fwd = state[:half] if i == 0 and not reset[b][0] else initial[:half]
            bwd = state[half:] if i == len(bounds) - 1 else initial[half:]
            out, last = rnn(row[:, a:end], fwd + bwd)
            outs.append(out)
            ends.append(last)
        rows.append(torch.cat([*outs, *[blank] * (T - lengths[b])], 1))
        finals.append(ends[-1][:half] + ends[0][half:])
    return torch.cat(rows), [torch.cat(states) for states in zip(*finals, strict=True)]


def check_gradients(ours, theirs, leaves):
    torch.manual_seed(3)
    weights = [torch.randn_like(y) for y in (ours[0], *ours[1])]
    found, wanted = (
        torch.autograd.grad([y[0], *y[1]], leaves, weights, materialize_grads=True) for y in (ours, theirs)
    )
    assert_close(found, wanted)
    return found


@each_case
def test_masks_give_what_each_episode_gives_alone(case, device):
    rnn, x, h = build(case, device)
    masks = make_masks(device)
    leaves = [x.requires_grad_(), *[state.requires_grad_() for state in h], *rnn.parameters()]
    ours = rnn(x, h, **masks)
    theirs = episodes(rnn, x, h, LENGTHS, masks["reset"].tolist())
    assert_close(ours, theirs)
    gradient = check_gradients(ours, theirs, leaves)[0]
    assert not gradient[1, 2:].any() and not gradient[2].any()
    for name in masks:
        alone = {"lengths": [T] * B, "reset": [[False] * T] * B, name: masks[name].tolist()}
        assert_close(rnn(x, h, **{name: masks[name]}), episodes(rnn, x, h, **alone))


@each_case
def test_padding_has_no_influence(case, device):
    rnn, x, h = build(case, device)
    masks = make_masks(device)
    lengths = masks["lengths"]
    padding = torch.arange(T, device=device) >= lengths[:, None]
    dirty = x.masked_fill(padding.view(B, T, *(1 for _ in x.shape[2:])), float("nan")).requires_grad_()
    parameters = list(rnn.parameters())
    results = []
    beyond = torch.where(lengths == T, T + 9, torch.where(lengths == 0, -1, lengths)).cpu().int()
    for given, sizes in ((x.requires_grad_(), lengths), (dirty, beyond)):
        out, states = rnn(given, h, lengths=sizes, reset=masks["reset"])
        grads = torch.autograd.grad(out.square().sum() + sum(s.sum() for s in states), [given, *parameters])
        results.append([out, *states, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(y.isfinite().all() for y in results[0]) and not results[0][0][padding].any()


@each_way_on
def test_whole_chunks_and_frames_agree(case, device):
    rnn, x, h = build(case, device)
    masks = make_masks(device)
    whole = rnn(x, h, **masks)
    parts, state = [], h
    for a, b in ((0, 1), (1, 4), (4, T)):
        out, state = rnn(x[:, a:b], state, lengths=masks["lengths"] - a, reset=masks["reset"][:, a:b])
        parts.append(out)
    assert_close((torch.cat(parts, 1), state), whole)

    frames, state = [], h
    for t in range(T):
        out, state = rnn.step(x[:, t], state, reset=masks["reset"][:, t])
        frames.append(out)
    assert_close((torch.stack(frames, 1), state), rnn(x, h, reset=masks["reset"]))
    assert_close(rnn(x[:, 0], h)[0], rnn(x[:, :1], h)[0][:, 0])
    assert_close(rnn.init_hidden_state(x[:, 0]), rnn.init_hidden_state(x))
    out, state = rnn(x[:, 0], h, lengths=torch.tensor([1, 0, 1]))
    assert not out[1].any() and torch.equal(state[0][1], h[0][1])


@pytest.mark.parametrize("case", [case for case in MARKED if case.values[0].startswith("both")])
def test_one_frame_in_both_directions(case, device):
    rnn, x, h = build(case, device)
    row = torch.tensor([True, False, True], device=device)
    out, states = rnn(x[:, 0], h, reset=row)
    clip, expected = rnn(x[:, :1], h, reset=row[:, None])
    assert_close((out, states), (clip[:, 0], expected))


def test_bidirectional_passes_masks_to_conv_gru(device):
    torch.manual_seed(0)
    options = {"hidden_sizes": 3, "kernel_sizes": 3, "device": device, "dtype": torch.float64}
    rnn = Bidirectional(ConvGRU(SIZE, **options), ConvGRU(SIZE, **options))
    both = ConvGRU(SIZE, bidirectional=True, **options)
    both.layers.load_state_dict(rnn.rnn.layers.state_dict())
    both.backward_layers.load_state_dict(rnn.backward_rnn.layers.state_dict())
    x = torch.randn(B, T, SIZE, 5, 4, dtype=torch.float64, device=device)
    h = [torch.randn_like(state) for state in both.init_hidden_state(x)]
    assert_close(rnn(x, h, **make_masks(device)), both(x, h, **make_masks(device)))


TIME_FIRST = {
    "rcn": lambda **kw: GRU_RCN(SIZE, 3, 3, **kw),
    "conv_gru": lambda **kw: ConvGRU(SIZE, [3, 2], 3, **kw),
    "levels": lambda **kw: StackedGRU_RCN([SIZE], [3], 3, **kw),
    "both_rcn": lambda **kw: Bidirectional(GRU_RCN(SIZE, 3, 3, **kw)),
    "both_levels": lambda **kw: Bidirectional(StackedGRU_RCN([SIZE], [3], 3, **kw)),
    "both_conv_gru": lambda **kw: Bidirectional(ConvGRU(SIZE, [3, 2], 3, **kw), ConvGRU(SIZE, [4, 2], 3, **kw)),
}


@pytest.mark.compiled
@pytest.mark.parametrize("case", TIME_FIRST)
def test_time_first(case, device):
    """With (T, B) in x, reset and out, as with (B, T)."""
    make, masks = TIME_FIRST[case], make_masks(device)
    first, last = (make(batch_first=order, device=device, dtype=torch.float64) for order in (True, False))
    last.load_state_dict(first.state_dict())
    x = torch.randn(B, T, SIZE, 5, 4, dtype=torch.float64, device=device)

    def packed(x):
        return [x] if case.endswith("levels") else x

    def unpacked(outputs):
        return (outputs[0][0] if case.endswith("levels") else outputs[0]), outputs[1]

    for given in ({}, {"lengths": masks["lengths"]}, masks):
        turned = {name: mask.T if name == "reset" else mask for name, mask in given.items()}
        out, h = unpacked(last(packed(x.transpose(0, 1)), **turned))
        assert_close((out.transpose(0, 1), h), unpacked(first(packed(x), **given)))
    reset = masks["reset"][:, 0]
    assert_close(last(packed(x[:, 0]), h, reset=reset), first(packed(x[:, 0]), h, reset=reset))


@pytest.mark.compiled
def test_masks_do_not_make_a_layer_walk(device):
    """One op a layer over the sequence, with both masks; with a learned h0, whose restarts the op does not know, with
    lengths."""
    x, masks = torch.randn(B, T, SIZE, 6, 6, device=device), make_masks(device)

    def ran(rnn, x, **masks):
        with torch.profiler.profile() as profile:
            rnn(x, **masks)
        return {e.key: e.count for e in profile.key_averages() if e.key.startswith("convrnn::")}

    assert ran(GRU_RCN(SIZE, 3, 3, device=device), x, **masks) == {"convrnn::gru_rcn": 1}
    assert ran(StackedGRU_RCN([SIZE] * 2, [2, 3], 3, device=device), [x, x], **masks) == {"convrnn::gru_rcn": 2}
    rnn = ConvGRU(SIZE, [3, 2], 3, strides=[1, 2], norm="layer", bidirectional=True, device=device)
    assert ran(rnn, x, **masks) == {"convrnn::gru_rcn": 4}
    rnn = ConvGRU(SIZE, 3, 3, learn_h0=True, device=device)
    assert ran(rnn, x, lengths=masks["lengths"]) == {"convrnn::gru_rcn": 1}
    assert "convrnn::gru_rcn" not in ran(rnn, x, **masks)


@pytest.mark.compiled
@pytest.mark.parametrize("case", ["layers", "both_conv_shared", "both_rcn"])
def test_script_compile_export(case, device):
    torch._dynamo.reset()
    rnn, x, h = build(case, device)
    masks = make_masks(device)
    expected = rnn(x, h, **masks)
    assert_close(torch.jit.script(rnn)(x, h, **masks), expected)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    leaf, twin = (x.clone().requires_grad_() for _ in range(2))
    out, states = compiled(leaf, h, **masks)
    assert_close((out, states), expected)
    assert_close(
        *(torch.autograd.grad(y.square().sum(), z) for y, z in ((out, leaf), (rnn(twin, h, **masks)[0], twin)))
    )
    time = torch.export.Dim("time", min=2, max=64)
    shapes = {"x": {1: time}, "h": None, "lengths": None, "reset": {1: time}}
    program = torch.export.export(rnn, (x, None), masks, dynamic_shapes=shapes)
    longer = torch.cat((x, x), 1), None
    more = {"lengths": masks["lengths"] * 2, "reset": torch.cat((masks["reset"],) * 2, 1)}
    assert_close(program.module()(*longer, **more), rnn(*longer, **more))


FLAGS = torch.zeros(B, T, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            TypeError,
            r"lengths must be an integer Tensor of shape \[3\], got list",
            lambda f, x: f(x, lengths=[1, 2, 3]),
        ),
        (TypeError, "lengths must be an integer Tensor, got torch.float", lambda f, x: f(x, lengths=torch.ones(B))),
        (TypeError, "lengths must be an integer Tensor, got torch.bool", lambda f, x: f(x, lengths=FLAGS[:, 0])),
        (ValueError, r"lengths must have shape \[3\], got \[2\]", lambda f, x: f(x, lengths=torch.ones(2).int())),
        (TypeError, "reset must be a bool Tensor, got torch.int32", lambda f, x: f(x, reset=FLAGS.int())),
        (TypeError, r"reset must be a bool Tensor of shape \[3, 6\], got list", lambda f, x: f(x, reset=[True])),
        (ValueError, r"reset must have shape \[3, 6\], got \[6, 3\]", lambda f, x: f(x, reset=FLAGS.T)),
        (ValueError, r"reset must be on the device of x \(cpu\), got meta", lambda f, x: f(x, reset=FLAGS.to("meta"))),
        (
            ValueError,
            "lengths must be None with a PackedSequence",
            lambda f, x: f(pack_sequence([x[0]]), lengths=torch.tensor([T])),
        ),
    ],
)
@pytest.mark.parametrize("case", ["cell", "layers", "conv_sep", "both", "both_rcn"])
def test_bad_calls(case, error, message, call):
    rnn, x, _ = build(case, "cpu")
    with pytest.raises(error, match=message):
        call(rnn, x)


def test_bad_calls_of_one_layer():
    rnn, x, _ = build("layers", "cpu")
    with pytest.raises(ValueError, match=r"x must be one frame \(B, input_size\), got shape \[3, 6, 4\]"):
        rnn.step(x)
    frames, maps = torch.zeros(B, T, SIZE, 4, 4), [torch.zeros(B, T, SIZE, 4, 4)] * 2
    with pytest.raises(ValueError, match=r"x must be one frame \(B, Ox, H, W\), got shape \[3, 6, 4, 4, 4\]"):
        GRU_RCN(SIZE, 3, 3).step(frames)
    levels = StackedGRU_RCN([SIZE, SIZE], [2, 3], 3)
    with pytest.raises(ValueError, match=r"xs must hold maps of one frame \(B, Ox, H, W\), got shape"):
        levels.step(maps)
    with pytest.raises(ValueError, match="xs must hold clips or maps of one frame, got both"):
        levels([maps[0], maps[1][:, 0]])
    with pytest.raises(ValueError, match=r"reset must have shape \[3, 6\], got \[6, 3\]"):
        levels(maps, reset=FLAGS.T)
    with pytest.raises(TypeError, match="lengths must be an integer Tensor, got torch.float32"):
        GRU_RCN(SIZE, 3, 3)(frames, lengths=torch.ones(B))
