"""Layers of minGRU-pytorch against the package itself: sequences, states, steps, and what is refused."""

import pytest
import torch
from minGRU_pytorch import minGRU
from minGRU_pytorch.minGRU import g
from minGRU_pytorch.minLM import minLM
from minGRU_pytorch.minLSTM import minLSTM
from torch.testing import assert_close

import convrnn
from convrnn import convert

pytestmark = pytest.mark.compiled  # what a checkpoint becomes, not how it is computed

B, T, DIM = 2, 9, 6
# expansion_factor, proj_out; None is that of the factor
SHAPES = [(1.0, None), (1.0, True), (1.5, None), (1.5, False), (2.0, True), (0.5, None), (0.34, False), (1.1, None)]
each = pytest.mark.parametrize(("factor", "proj_out"), SHAPES)
each_kind = pytest.mark.parametrize("kind", [minGRU, minLSTM])


def both(kind, factor, proj_out):
    theirs = kind(DIM, expansion_factor=factor, proj_out=proj_out).double()
    return theirs, convert.from_mingru_pytorch(theirs.state_dict())


@each
@each_kind
def test_sequences_states_and_gradients(kind, factor, proj_out):
    theirs, ours = both(kind, factor, proj_out)
    assert type(ours) is (convrnn.MinGRU if kind is minGRU else convrnn.MinLSTM)
    x = 2 * torch.randn(B, T, DIM, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected, state = theirs(inputs[0], return_next_prev_hidden=True)
    out, (h,) = ours(inputs[1])
    assert_close((out, h), (expected, state), rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(out)
    of_x, of_gates, *of_out = torch.autograd.grad(
        (expected * weight).sum(), [inputs[0], *theirs.parameters()], retain_graph=True
    )
    ours_of = torch.autograd.grad((out * weight).sum(), [inputs[1], *(p for p in ours.parameters() if p.requires_grad)])
    hidden, *rest = of_gates.chunk(2 if kind is minGRU else 3)
    assert_close(ours_of, (of_x, torch.cat([*rest, hidden]), *of_out), rtol=1e-8, atol=1e-9)


@each
@each_kind
def test_steps_and_going_on_from_a_state(kind, factor, proj_out):
    theirs, ours = both(kind, factor, proj_out)
    x = torch.randn(B, T, DIM, dtype=torch.float64)
    state, h = None, None
    for t in range(T):
        expected, state = theirs(x[:, t : t + 1], state, return_next_prev_hidden=True)
        out, h = ours(x[:, t : t + 1], h)
        assert_close((out, h[0]), (expected, state), rtol=1e-9, atol=1e-10)
    expected, _ = theirs(x, state, return_next_prev_hidden=True)
    begin = g(state) if kind is minLSTM else state  # theirs begins several steps at g of the state
    assert_close(ours(x, [begin])[0], expected, rtol=1e-9, atol=1e-10)


@each
@each_kind
def test_the_layer_is_what_its_arguments_make(kind, factor, proj_out):
    theirs, ours = both(kind, factor, proj_out)
    arguments = {name: getattr(ours, name) for name in ("bias", "expand", "out_proj", "learn_h0")}
    again = type(ours)(ours.input_size, ours.hidden_sizes, **arguments, dtype=torch.float64)
    again.load_state_dict(ours.state_dict())
    x = torch.randn(B, T, DIM, dtype=torch.float64)
    assert_close(again(x), ours(x))
    assert ours.layers[0].h0.count_nonzero() == 0 and not ours.layers[0].h0.requires_grad
    learned = [p for p in ours.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("use_lstm", [False, True])
def test_layers_within_a_language_model(use_lstm):
    model = minLM(num_tokens=8, dim=DIM, depth=2, use_lstm=use_lstm, dropout=0.1).double()
    x = torch.randn(B, T, DIM, dtype=torch.float64)
    for i in range(2):
        for checkpoint in (model, model.state_dict()):
            ours = convert.from_mingru_pytorch(checkpoint, prefix=f"layers.{i}.2.")
            assert_close(ours(x)[0], model.layers[i][2](x), rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match=r"got layers under 'layers.0.2.', 'layers.1.2.'"):
        convert.from_mingru_pytorch(model)
    with pytest.raises(ValueError, match=r"write from_mingru_pytorch\(..., prefix='layers.0.2.'\)"):
        convert.from_mingru(model)


def test_the_other_converter_hands_it_on():
    theirs = minGRU(DIM)
    x = torch.randn(B, T, DIM)
    assert_close(convert.from_mingru(theirs)(x)[0], theirs(x))
    assert_close(
        convert.from_mingru({f"rnn.{k}": v for k, v in theirs.state_dict().items()}, prefix="rnn.")(x)[0], theirs(x)
    )
    with pytest.raises(ValueError, match=r"got minGRU-pytorch's: write from_mingru_pytorch\(..., prefix=''\)"):
        convert.from_mingru(theirs, dropout=0.5)


W = torch.zeros(12, DIM)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "state_dict must hold to_hidden_and_gate.weight or to_hidden_and_f_i_gate.weight$"),
        ({"to_hidden_and_gate.weight": W[:11]}, r"to_hidden_and_gate.weight must be \(2\*inner, dim\), got \[11, 6\]"),
        ({"to_hidden_and_f_i_gate.weight": W[:11]}, r"must be \(3\*inner, dim\), got \[11, 6\]"),
        ({"to_hidden_and_gate.weight": W[0]}, r"must be \(2\*inner, dim\), got \[6\]"),
        ({"to_hidden_and_gate.weight": W, "to_out.weight": W.T}, r"to_out.weight must be \(dim, 6\), got \[6, 12\]$"),
        (
            {"to_hidden_and_gate.weight": W, "to_hidden_and_gate.bias": W[:, 0], "norm.gamma": W[0]},
            "weights of to_hidden_and_gate and to_out alone, .* got to_hidden_and_gate.bias, norm.gamma too",
        ),
        (convrnn.MinGRU(DIM, DIM).state_dict(), "this is torch-mingru's: write from_mingru$"),
        (convrnn.MinGRUCell(DIM, DIM).state_dict(), "this is torch-mingru's: write from_mingru$"),
    ],
)
def test_bad_checkpoints(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        convert.from_mingru_pytorch(checkpoint)
