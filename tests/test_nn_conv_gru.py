"""ConvGRU: every argument against a reference of one gate at a time, chunks and steps, lengths, resets, randomness."""

import copy
import io
import pickle

import pytest
import torch
from torch.testing import assert_close

import convrnn
from convrnn import GRU_RCN, ConvGRU, ConvGRU1d, ConvGRU3d, ConvGRUCell, SepConvGRUCell

from .conftest import INTERPRETED
from .layer_reference import reference

B, T, IN = 3, 4, 4
FAST = {"kernel_sizes": 3}
# One or two layers; each case is what its name says against the same reference.
CASES = {
    "fast": {"kernel_sizes": 3},
    "fast-even": {"kernel_sizes": [(2, 4), 3], "hidden_sizes": [4, 2], "recurrent_kernel_sizes": [3, (1, 2)]},
    "no-bias": {"kernel_sizes": 3, "bias": False},
    "recurrent-kernel": {"kernel_sizes": 1, "recurrent_kernel_sizes": [5, (3, 2)], "hidden_sizes": [4, 4]},
    "stride": {"kernel_sizes": [3, 2], "strides": [2, (1, 2)], "hidden_sizes": [4, 4]},
    "padding": {"kernel_sizes": 3, "paddings": [(0, 2)]},
    "dilation": {"kernel_sizes": 3, "dilations": 2, "recurrent_dilations": [(1, 2)]},
    "groups": {"kernel_sizes": 3, "groups": 2, "recurrent_groups": 4},
    "depthwise": {"kernel_sizes": (3, 2), "groups": [4, 4], "recurrent_groups": [4, 1], "hidden_sizes": [4, 4]},
    "separable": {"kernel_sizes": [(3, 2)], "separable": True, "strides": 2},
    "reflect": {"kernel_sizes": [(3, 2)], "padding_mode": "reflect"},
    "replicate": {"kernel_sizes": 3, "padding_mode": "replicate", "dilations": 2},
    "circular": {"kernel_sizes": 3, "padding_mode": "circular"},
    "reset-after": {"kernel_sizes": 3, "reset_after": True},
    "cell-layer": {"kernel_sizes": 3, "cell_norm": "layer", "gate_bias": -1.0},
    "cell-group": {"kernel_sizes": 3, "cell_norm": "group", "hidden_sizes": 16, "reset_after": True},
    "norm": {"kernel_sizes": 3, "hidden_sizes": [4, 8], "norm": True},
    "residual": {"kernel_sizes": [3, 2], "hidden_sizes": [4, 6], "strides": [1, 2], "residual": True, "norm": "layer"},
    "zoneout": {"kernel_sizes": 3, "zoneout": 0.3},
    "bidirectional": {"kernel_sizes": 3, "hidden_sizes": [2, 3], "bidirectional": True, "residual": True},
    "learned": {"kernel_sizes": 3, "learn_h0": True, "bidirectional": True},
}


def make(kind=ConvGRU, dtype=torch.float64, device="cpu", **arguments):
    """A layer in eval mode, no parameter of which is zero."""
    torch.manual_seed(0)
    rnn = kind(IN, arguments.pop("hidden_sizes", 4), **arguments, dtype=dtype, device=device).eval()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return rnn


def clip(rnn, size=(5, 4), steps=T, device="cpu"):
    """x and states, float64."""
    torch.manual_seed(1)
    x = torch.randn(B, steps, IN, *size, dtype=torch.float64, device=device)
    return x, [torch.randn_like(h) for h in rnn.init_hidden_state(x)]


def flat(outputs):
    return [outputs[0], *outputs[1]]


def check_against_reference(rnn, x, h, **masks):
    """Outputs, states and every gradient."""
    leaves = [x.requires_grad_(), *rnn.parameters(), *([] if h is None else [state.requires_grad_() for state in h])]
    ours, truth = flat(rnn(x, h, **masks)), flat(reference(rnn, x, h, **masks))
    assert_close(ours, truth)
    torch.manual_seed(2)
    upstream = [torch.randn_like(y) for y in truth]
    got = torch.autograd.grad(ours, leaves, upstream, allow_unused=True)
    wanted = torch.autograd.grad(truth, leaves, upstream, allow_unused=True)
    for leaf, a, b in zip(leaves, got, wanted, strict=True):
        zero = torch.zeros_like(leaf)
        assert_close(zero if a is None else a, zero if b is None else b)


# In the interpreter whole clips are for one layer on the op over the sequence and for one of two directions.
WHOLE = ["fast", "bidirectional"] if INTERPRETED else CASES


@pytest.mark.parametrize(
    ("name", "masked"),
    [*((name, False) for name in WHOLE), *((name, True) for name in CASES)],
    ids=lambda value: {False: "whole", True: "masked"}.get(value, value),
)
def test_reference(device, name, masked):
    rnn = make(device=device, **CASES[name])
    x, h = clip(rnn, device=device)
    masks = {}
    if masked:
        masks["lengths"] = torch.tensor([T, 0, 2], device=device)
        masks["reset"] = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 0]], device=device).bool()
    check_against_reference(rnn, x, None if name == "learned" else h, **masks)


@pytest.mark.parametrize("kind, size", [(ConvGRU1d, (6,)), (ConvGRU3d, (3, 2, 4))])
@pytest.mark.parametrize(
    "arguments", [{}, {"strides": 2, "padding_mode": "circular", "groups": 2}], ids=["fast", "loop"]
)
def test_dimensions(device, kind, size, arguments):
    rnn = make(kind, device=device, kernel_sizes=2, **arguments)
    check_against_reference(rnn, *clip(rnn, size, device=device))
    cell = {ConvGRU1d: convrnn.ConvGRUCell1d, ConvGRU3d: convrnn.ConvGRUCell3d}[kind](IN, 4, 2)
    assert cell(torch.rand(2, IN, *size))[0].shape == (2, 4, *size)


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].get("bidirectional")])
def test_chunks_and_steps_carry_the_state(device, name):
    rnn = make(device=device, **CASES[name])
    x, h = clip(rnn, device=device)
    whole, last = rnn(x, h)
    out, states = rnn(x[:, :3], h)
    frame, states = rnn(x[:, 3], states)
    assert_close((torch.cat((out, frame[:, None]), 1), states), (whole, last))
    for t in range(T):
        frame, h = rnn.step(x[:, t], h)
        assert_close(frame, whole[:, t])
    assert_close(h, last)


def test_padding_has_no_influence(device):
    rnn = make(device=device, kernel_sizes=3, hidden_sizes=[4, 3], bidirectional=True, residual=True, norm="layer")
    x, h = clip(rnn, device=device)
    lengths = torch.tensor([4, 1, 0], device=device)
    dirty = x.clone()
    dirty[1, 1:], dirty[2] = float("nan"), float("inf")
    dirty.requires_grad_()
    clean = rnn(x, h, lengths=lengths)
    out, states = rnn(dirty, h, lengths=lengths.cpu().int())
    assert_close((out, states), clean, atol=0, rtol=0)
    (gradient,) = torch.autograd.grad(out.sum() + sum(state.sum() for state in states), dirty)
    assert not gradient[1, 1:].any() and not gradient[2].any() and gradient[:2, 0].all()
    assert not out[1, 1:].any() and torch.equal(states[0][2], h[0][2])


def test_time_first_and_resets_of_frames(device):
    first = make(device=device, kernel_sizes=3)
    last = make(device=device, kernel_sizes=3, batch_first=False)
    x, h = clip(first, device=device)
    masks = {"lengths": torch.tensor([4, 1, 3]), "reset": torch.rand(B, T, device=device) < 0.5}
    out, h_n = last(x.transpose(0, 1), h, lengths=masks["lengths"], reset=masks["reset"].T)
    assert_close((out.transpose(0, 1), h_n), first(x, h, **masks))
    assert_close(last.init_hidden_state(x.transpose(0, 1)), first.init_hidden_state(x))
    rows = torch.tensor([True, False, True], device=device)
    out, _ = first.step(x[:, 0], h, reset=rows)
    assert_close(out[rows], first(x[rows, 0])[0])
    assert_close(out[1], first(x[:, 0], h)[0][1])


def test_fast_path_is_the_layer_of_gru_rcn(device):
    cell, seed = ConvGRUCell(IN, 5, 3, device=device), GRU_RCN(IN, 5, 3, bias=True, device=device)
    cell.layers[0].load_state_dict(seed.state_dict())
    x, h = torch.randn(B, T, IN, 5, 4, device=device), torch.randn(B, 5, 5, 4, device=device)
    with torch.profiler.profile() as profile:
        out, (h_n,) = cell(x, [h])
    ran = {event.key for event in profile.key_averages()}
    assert "convrnn::gru_rcn" in ran and "convrnn::gru_gates" not in ran
    assert torch.equal(out, seed(x, h)[0]) and torch.equal(h_n, seed(x, h)[1])


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({"strides": 2}, True),
        ({"paddings": 0, "dilations": 2, "learn_h0": True}, True),
        ({"groups": 2, "input_size": 4}, True),
        ({"padding_mode": "reflect", "recurrent_kernel_sizes": 1}, True),
        ({"recurrent_dilations": 2}, False),
        ({"separable": True}, False),
        ({"strides": 2, "cell_norm": "layer"}, False),
    ],
    ids=str,
)
def test_one_op_over_the_sequence_whatever_projects_the_input(device, options, fused):
    rnn = ConvGRU(**{"input_size": IN, "hidden_sizes": 4, "kernel_sizes": 3, **options}, device=device)
    x = torch.randn(B, T, rnn.input_size, 7, 6, device=device)
    with torch.profiler.profile() as profile:
        rnn(x)
    calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("convrnn::")}
    assert calls == ({"convrnn::gru_rcn": 1} if fused else {"convrnn::gru_gates": T, "convrnn::gru_update": T})


def test_reset_after_is_the_rule_of_torch(device):
    gru = torch.nn.GRU(IN, 5, batch_first=True, dtype=torch.float64, device=device)
    rnn = ConvGRU(IN, 5, 1, reset_after=True, dtype=torch.float64, device=device)
    r, z, n = gru.weight_ih_l0.chunk(3)
    layer, state = rnn.layers[0], gru.weight_hh_l0.chunk(3)
    b_r, b_z, b_n = (gru.bias_ih_l0 + gru.bias_hh_l0 * torch.tensor([1, 1, 0]).repeat_interleave(5).to(device)).chunk(3)
    new = {"W": torch.cat((-z, r, n)), "U": torch.cat((-state[1], state[0])), "C": state[2]}  # PyTorch's z keeps
    new = {name: weight[..., None, None] for name, weight in new.items()}
    new |= {"bias": torch.cat((-b_z, b_r, b_n)), "recurrent_bias": gru.bias_hh_l0[10:]}
    layer.load_state_dict(new)
    x = torch.randn(B, T, IN, dtype=torch.float64, device=device)
    out, h_n = rnn(x[..., None, None])
    assert_close((out[..., 0, 0], h_n[0][None, ..., 0, 0]), gru(x))


def test_dropout_between_layers(device):
    rnn = make(device=device, kernel_sizes=3, hidden_sizes=[4, 4], dropout=1.0)
    x, _ = clip(rnn, device=device)
    evaluated = rnn(x)[0]
    cut = rnn.train()(x)[0]
    assert_close(cut, rnn.eval()(torch.randn_like(x))[0] * 0 + _second_layer_of_zeros(rnn, x))
    assert not torch.allclose(cut, evaluated)


def _second_layer_of_zeros(rnn, x):
    return rnn.layers[1](x.new_zeros(B, T, 4, *x.shape[3:]))[0]


def test_recurrent_dropout_draws_one_mask_a_call(device):
    rnn = make(device=device, kernel_sizes=1, recurrent_dropout=0.5)
    layer = rnn.layers[0]
    x, (h,) = clip(rnn, device=device)
    torch.manual_seed(5)
    ours = rnn.train()(x, [h])[0]
    torch.manual_seed(5)
    keep = torch.nn.functional.dropout(torch.ones_like(h), 0.5)
    assert set(keep.unique().tolist()) == {0.0, 2.0}
    read, convolve = h, torch.nn.functional.conv2d
    for t in range(T):
        xz, xr, xc = convolve(x[:, t], layer.W, layer.bias).chunk(3, 1)
        hz, hr = convolve(read * keep, layer.U).chunk(2, 1)
        z, r = torch.sigmoid(xz + hz), torch.sigmoid(xr + hr)
        read = (1 - z) * read + z * torch.tanh(xc + convolve(r * (read * keep), layer.C))
        assert_close(ours[:, t], read)
    assert not torch.equal(ours, rnn(x, [h])[0]) and torch.equal(rnn.eval()(x, [h])[0], rnn(x, [h])[0])


def test_zoneout(device):
    rnn = make(device=device, kernel_sizes=3, zoneout=0.5).train()
    x, (h,) = clip(rnn, (16, 16), device=device)
    out = rnn(x, [h])[0]
    kept = out[:, 0] == h
    assert 0.47 < kept.double().mean() < 0.53
    plain = make(device=device, kernel_sizes=3)(x[:, 0], [h])[0]
    assert_close(out[:, 0][~kept], plain[~kept])
    expectation = rnn.eval()(x[:, 0], [h])[0]
    assert_close(expectation, (h + plain) / 2)
    rnn.layers[0].zoneout = 1.0
    assert torch.equal(rnn.train()(x, [h])[1][0], h)


def test_callable_norms_get_the_channels(device):
    seen = []

    def norm(channels):
        seen.append(channels)
        return torch.nn.BatchNorm2d(channels)

    rnn = ConvGRU(IN, [4, 6], 3, norm=norm, cell_norm=norm, device=device)
    assert seen == [12, 8, 4, 4, 18, 12, 6, 4]
    rnn(torch.randn(B, T, IN, 5, 4, device=device))[0].sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


def test_initialisation(device):
    chrono = ConvGRUCell(IN, 64, 1, gate_bias="chrono", chrono_max=50, device=device).layers[0].bias
    z, rest = chrono[:64], chrono[64:]
    assert z.max() <= 0 and z.min() >= -(torch.tensor(49.0).log()) - 1e-6 and z.std() > 0.3 and not rest.any()
    constant = ConvGRUCell(IN, 3, 1, gate_bias=-2.0, learn_h0=True, reset_after=True, device=device)
    layer = constant.layers[0]
    assert layer.bias.tolist() == [-2.0] * 3 + [0.0] * 6 and not layer.h0.any() and layer.h0.shape == (3, 1, 1)
    before = copy.deepcopy(constant.state_dict())
    with torch.no_grad():
        for parameter in constant.parameters():
            parameter.fill_(3.0)
    constant.reset_parameters()
    assert layer.bias.tolist() == [-2.0] * 3 + [0.0] * 6 and not layer.h0.any() and not layer.recurrent_bias.any()
    assert not torch.equal(layer.W, before["layers.0.W"]) and layer.W.std() > 0


def test_copies_and_repr(device):
    rnn = make(device=device, kernel_sizes=3, strides=2, bidirectional=True, residual=True, cell_norm="layer")
    x, h = clip(rnn, device=device)
    torch.save(rnn.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    fresh = make(device=device, kernel_sizes=3, strides=2, bidirectional=True, residual=True, cell_norm="layer")
    fresh.reset_parameters()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), fresh):
        assert_close(other(x, h), rnn(x, h))
    shown = "4, [4], [(3, 3)], strides=[(2, 2)], cell_norm='layer', residual=True, bidirectional=True"
    assert rnn.extra_repr() == shown


@pytest.mark.parametrize(
    "arguments", [FAST, {"kernel_sizes": 3, "strides": 2, "reset_after": True}], ids=["fast", "loop"]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_dtypes_and_autocast(device, arguments, dtype, tolerance):
    rnn = make(device=device, **arguments)
    x, h = clip(rnn, device=device)
    truth, last = rnn(x, h)
    low, h_n = copy.deepcopy(rnn).to(dtype)(x.to(dtype), [h[0].float()])
    assert low.dtype == dtype and h_n[0].dtype == torch.float32
    assert_close((low.double(), h_n[0].double()), (truth, last[0]), atol=tolerance, rtol=0)
    if dtype == torch.bfloat16:
        with torch.autocast(device, dtype):
            low, _ = copy.deepcopy(rnn).float()(x.float(), [h[0].float()])
        assert low.dtype == dtype
        assert_close(low.double(), truth, atol=tolerance, rtol=0)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "arguments", [FAST, {**CASES["residual"], "bidirectional": True, "zoneout": 0.1}], ids=["fast", "loop"]
)
def test_compile(device, arguments):
    rnn = make(device=device, **arguments)
    x, h = clip(rnn, device=device)
    x = x[:, :2]
    masks = {"lengths": torch.tensor([2, 0, 1], device=device), "reset": torch.rand(B, 2, device=device) < 0.5}
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, h), rnn(x, h))
    assert_close(compiled(x, h, **masks), rnn(x, h, **masks))


def test_separable_cell(device):
    cell = convrnn.SepConvGRUCell(IN, 5, device=device, dtype=torch.float64)
    x = torch.randn(B, 2, IN, 5, 4, dtype=torch.float64, device=device)
    state = cell.init_hidden_state(x)
    for t in range(2):
        _, state = reference(cell.horizontal, x[:, t : t + 1], state)
        _, state = reference(cell.vertical, x[:, t : t + 1], state)
    out, h = cell(x)
    assert_close((out[:, -1], h), (state[0], state))
    assert_close(cell.step(x[:, 1], cell(x[:, 0])[1]), (out[:, 1], h))


@pytest.mark.compiled
def test_separable_cell_loads_checkpoints_with_the_residual_that_was_not_read():
    cells = torch.nn.ModuleList([SepConvGRUCell(IN, 5, residual=True) for _ in range(2)])
    old = {**cells.state_dict(), "0.horizontal.res_aligns.0.weight": torch.ones(5, IN, 1, 5)}
    cells.load_state_dict(old)
    assert "0.horizontal.res_aligns.0.weight" in old
    with pytest.raises(RuntimeError, match="1.vertical.res_aligns.1.weight"):
        cells.load_state_dict({**old, "1.vertical.res_aligns.1.weight": torch.ones(5, IN, 5, 1)})


@pytest.mark.parametrize("build", [ConvGRU, ConvGRUCell, SepConvGRUCell])
def test_the_initial_state_is_no_view_of_the_learned_one(build, device):
    rnn = build(3, 4, 3, learn_h0=True, device=device)
    learned = [parameter for name, parameter in rnn.named_parameters() if name.endswith("h0")]
    assert len(learned) == 1  # one update's, which reads the state that is carried on
    with torch.no_grad():
        rnn.init_hidden_state(torch.zeros(2, 3, 5, 5, device=device))[0][0].fill_(9.0)
    assert not learned[0].any()
    out, h_n = rnn(torch.zeros(2, 0, 3, 5, 5, device=device))
    assert out.shape == (2, 0, 4, 5, 5) and h_n[0].shape == (2, 4, 5, 5)
