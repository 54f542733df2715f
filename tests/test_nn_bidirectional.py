"""Bidirectional: against a composition by hand, shared and own weights, states, time order, TorchScript, bad input."""

import copy
import doctest
import inspect
import io
import pickle
import sys

import pytest
import torch
from torch import nn
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

B, L, SIZE = 2, 4, 3
CASES = {
    "mingru_cell": lambda **kw: MinGRUCell(SIZE, 4, **kw),
    "mingru": lambda **kw: MinGRU(SIZE, [4, 5], residual=True, **kw),
    "conv_cell": lambda **kw: MinConv2dGRUCell(SIZE, 4, 3, **kw),
    "conv": lambda **kw: MinConv2dGRU(SIZE, [4, 5], 3, strides=[1, 2], paddings=1, **kw),
    "gru_rcn": lambda **kw: GRU_RCN(SIZE, 4, 3, **kw),
    "gru_rcn_time_first": lambda **kw: GRU_RCN(SIZE, 4, 3, batch_first=False, **kw),
}
each_case = pytest.mark.parametrize("case", CASES)
each_sharing = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])


def build(case, shared, device):
    torch.manual_seed(0)
    rnn, backward_rnn = (CASES[case](device=device, dtype=torch.float64).eval() for _ in range(2))
    return Bidirectional(rnn) if shared else Bidirectional(rnn, backward_rnn)


def inputs(case, rnn, device):
    """x, its dimension of time, and states that are not the ones absent states stand for."""
    torch.manual_seed(1)
    shape = [B, L, SIZE] if case.startswith("mingru") else [B, L, SIZE, 5, 4]
    x = torch.randn(shape, dtype=torch.float64, device=device)
    time = int(case != "gru_rcn_time_first")
    x = x if time == 1 else x.transpose(0, 1)
    return x, time, [torch.randn_like(s) for s in rnn.init_hidden_state(x)]


@each_sharing
@each_case
def test_by_hand(case, shared, device):
    rnn = build(case, shared, device)
    x, time, h = inputs(case, rnn, device)
    n = len(h) // 2
    bare = isinstance(rnn.rnn, GRU_RCN)
    out_fwd, h_fwd = rnn.rnn(x, h[0] if bare else h[:n])
    out_bwd, h_bwd = (rnn.rnn if shared else rnn.backward_rnn)(x.flip(time), h[1] if bare else h[n:])
    out, h_n = rnn(x, h)
    assert_close(out, torch.cat([out_fwd, out_bwd.flip(time)], 2))
    assert_close(h_n, [h_fwd, h_bwd] if bare else [*h_fwd, *h_bwd])


@each_case
def test_position_t_holds_both_directions_of_frame_t(case, device):
    """A change at frame 2 reaches the forward half from t = 2 on, and the backward half up to t = 2."""
    rnn = build(case, True, device)
    x, time, _ = inputs(case, rnn, device)
    changed = x.clone()
    changed.select(time, 2).add_(1)
    moved = (rnn(x)[0] != rnn(changed)[0]).movedim(time, 0).movedim(2, 1).flatten(2).any(-1)
    size = moved.shape[1] // 2
    assert moved[:, :size].any(1).tolist() == [False, False, True, True]
    assert moved[:, size:].any(1).tolist() == [True, True, True, False]


@each_sharing
@each_case
def test_absent_states(case, shared, device):
    rnn = build(case, shared, device)
    x, _, _ = inputs(case, rnn, device)
    h = rnn.init_hidden_state(x.clone().requires_grad_())
    assert isinstance(h, list) and not any(s.requires_grad for s in h)
    assert_close(rnn(x), rnn(x, h))


def test_own_backward_sizes_and_one_state_for_the_batch(device):
    rnn = Bidirectional(GRU_RCN(SIZE, 4, 3, device=device), GRU_RCN(SIZE, 6, (1, 3), device=device))
    x = torch.randn(B, L, SIZE, 5, 4, device=device)
    out, h_n = rnn(x)
    assert out.shape == (B, L, 10, 5, 4)
    for states in (h_n, rnn.init_hidden_state(x)):
        assert [s.shape for s in states] == [(B, 4, 5, 4), (B, 6, 5, 4)]
    h = [torch.randn(c, 5, 4, device=device) for c in (4, 6)]
    assert_close(rnn(x, h), rnn(x, [s.expand(B, *s.shape) for s in h]))


@each_sharing
@each_case
def test_keys(case, shared, device):
    single = list(CASES[case]().state_dict())
    expected = [f"rnn.{key}" for key in single] + ([] if shared else [f"backward_rnn.{key}" for key in single])
    rnn = build(case, shared, device)
    assert list(rnn.state_dict()) == expected
    checkpoint = {key: torch.randn_like(value) for key, value in rnn.state_dict().items()}
    rnn.load_state_dict(checkpoint)
    assert_close(dict(rnn.state_dict()), checkpoint)


@each_case
def test_gradients_reach_shared_weights_from_both_directions(case, device):
    shared = build(case, True, device)
    own = Bidirectional(shared.rnn, copy.deepcopy(shared.rnn))
    x, _, h = inputs(case, shared, device)
    noise = torch.randn_like(shared(x, h)[0])
    total = torch.autograd.grad((shared(x, h)[0] * noise).sum(), list(shared.parameters()))
    split = torch.autograd.grad((own(x, h)[0] * noise).sum(), list(own.parameters()))
    assert_close(list(total), [a + b for a, b in zip(split[: len(total)], split[len(total) :], strict=True)])


OFFERED = {
    "GRU_RCN": (
        lambda: GRU_RCN(3, 4, (3, 5), recompute=True),
        {"in_channels": 3, "nb_kernels": 4, "kernel_size": (3, 5)},
    ),
    "StackedGRU_RCN": (lambda: StackedGRU_RCN([3, 2], [4, 5], 3), {"in_channels": [3, 2], "nb_kernels": [4, 5]}),
    "ConvGRU": (
        lambda: ConvGRU(3, [4, 5], [3, (3, 5)], strides=[1, 2], norm=nn.InstanceNorm2d, zoneout=0.1, batch_first=False),
        {"input_size": 3, "hidden_sizes": [4, 5], "num_layers": 2, "kernel_sizes": [(3, 3), (3, 5)], "zoneout": 0.1},
    ),
    "SepConvGRUCell": (lambda: SepConvGRUCell(3, 4), {"input_size": 3, "hidden_size": 4, "kernel_size": 5}),
    "MinGRU": (
        lambda: MinGRU(3, [4, 5], norm=True, dropout=0.1),
        {"input_size": 3, "hidden_sizes": [4, 5], "layer_sizes": (3, 4, 5), "num_layers": 2, "dropout": 0.1},
    ),
    "MinGRUCell": (lambda: MinGRUCell(3, 4, bias=False), {"hidden_size": 4, "layer_sizes": (3, 4), "bias": False}),
    "MinConv2dGRU": (
        lambda: MinConv2dGRU(3, [4, 5], 3, paddings="same", residual=True),
        {"layer_sizes": (3, 4, 5), "kernel_sizes": [(3, 3), (3, 3)], "paddings": "same", "spatial_dims": 2},
    ),
    "MinConv2dGRUCell": (lambda: MinConv2dGRUCell(3, 4, 3, padding=1), {"layer_sizes": (3, 4), "padding": (1, 1)}),
}


@pytest.mark.compiled
@pytest.mark.parametrize("name", OFFERED)
def test_it_offers_what_the_layer_offers(name):
    make, values = OFFERED[name]
    rnn = make()
    both = Bidirectional(rnn)
    names = {name for name in inspect.signature(type(rnn)).parameters if hasattr(rnn, name)} | {"batch_first"}
    for argument in names - {"bidirectional"}:
        if not (name == "GRU_RCN" and argument == "bias"):  # a parameter, which the layer keeps
            assert getattr(both, argument) == getattr(rnn, argument)
    assert both.bidirectional is True
    assert {name: getattr(both, name) for name in values} == values
    assert [*both.state_dict()] == [f"rnn.{key}" for key in rnn.state_dict()]
    if both.scriptable:
        torch.jit.save(torch.jit.script(both), buffer := io.BytesIO())
        for scripted in (torch.jit.script(both), torch.jit.load(io.BytesIO(buffer.getvalue()))):
            assert {name: getattr(scripted, name) for name in values} == values


@pytest.mark.parametrize("case", ["mingru", "conv", "gru_rcn"])
def test_num_states_counts_both_directions(case, device):
    rnn = build(case, False, device)
    assert len(rnn(inputs(case, rnn, device)[0])[1]) == rnn.num_states


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("case", "shared"), [("mingru", True), ("conv", False), ("gru_rcn", True), ("gru_rcn_time_first", False)]
)
def test_copies_script_compile(case, shared, device):
    torch._dynamo.reset()  # one forward serves the whole family, and recompilations are counted for it
    rnn = build(case, shared, device)
    x, _, h = inputs(case, rnn, device)
    torch.jit.save(torch.jit.script(rnn), buffer := io.BytesIO())
    scripted = torch.jit.load(io.BytesIO(buffer.getvalue()))
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), scripted, compiled):
        assert_close(other(x, h), rnn(x, h))
        assert_close(other(x), rnn(x))
    assert_close(scripted.init_hidden_state(x), rnn.init_hidden_state(x))


@pytest.mark.compiled
@pytest.mark.parametrize("case", ["mingru", "conv", "gru_rcn"])
def test_export_with_dynamic_time(case, device):
    rnn = build(case, False, device)
    x, _, _ = inputs(case, rnn, device)
    time = torch.export.Dim("time", min=2, max=64)
    program = torch.export.export(rnn, (x,), dynamic_shapes=({1: time},))
    longer = torch.cat([x, x, x], dim=1)
    assert_close(program.module()(longer), rnn(longer))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Bidirectional(torch.nn.Linear(3, 4)), TypeError, "rnn must be a recurrent layer .* got Linear"),
        (lambda: Bidirectional(torch.nn.GRU(3, 4)), TypeError, "rnn must be a recurrent layer .* got GRU"),
        (lambda: Bidirectional(MinGRU(3, 4), MinGRU(3, [4, 4])), ValueError, "backward_rnn must agree with rnn"),
        (
            lambda: Bidirectional(GRU_RCN(3, 4, 3), MinConv2dGRU(3, 4, 3)),
            ValueError,
            "backward_rnn must agree with rnn",
        ),
        (lambda: Bidirectional(GRU_RCN(3, 4, 3), GRU_RCN(3, 4, 3, False)), ValueError, "backward_rnn must agree"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@each_case
def test_bad_input(case, device):
    rnn = build(case, False, device)
    x, _, h = inputs(case, rnn, device)
    with pytest.raises(ValueError, match=f"h must hold {len(h)} states, got {len(h) - 1}"):
        rnn(x, h[1:])
    with pytest.raises(TypeError, match="h must be a list"):
        rnn(x, h[0])
    with pytest.raises(ValueError, match="must have shape"):
        rnn(x, [*h[:-1], h[-1][:1]])
    with pytest.raises(ValueError, match="x must be"):
        rnn(x[:, :, :2])


def test_it_takes_no_step(device):
    with pytest.raises(ValueError, match="step must be called on a layer of one direction, got Bidirectional"):
        Bidirectional(MinGRU(SIZE, 4, device=device)).step(torch.zeros(B, SIZE, device=device))


def test_levels_are_refused_as_the_stack_refuses_them(device):
    rnn = Bidirectional(StackedGRU_RCN([SIZE, SIZE], [4, 4], 3, device=device))
    x = torch.zeros(B, L, SIZE, 5, 4, device=device)
    with pytest.raises(TypeError, match="xs must be a list of 2 Tensors, got Tensor"):
        rnn(x)
    with pytest.raises(ValueError, match="xs must hold the maps of 2 levels, got 1"):
        rnn([x])
    with pytest.raises(ValueError, match="h must hold 4 states, got 2"):
        rnn([x, x], [x[:, 0], x[:, 0]])
    with pytest.raises(ValueError, match="backward_rnn must agree with rnn"):
        Bidirectional(rnn.rnn, StackedGRU_RCN([SIZE], [4], 3))


def test_example():
    results = doctest.testmod(sys.modules[Bidirectional.__module__])
    assert results.attempted > 0 and results.failed == 0
