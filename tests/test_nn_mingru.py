"""MinGRUCell and MinGRU: against plain loops, every argument, carried state, checkpoints, TorchScript, bad input."""

import copy
import doctest
import io
import itertools
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from convrnn import MinGRU, MinGRUCell, MinLSTM, reference

B, S, SIZE = 2, 5, 3
CASES = {
    "cell": lambda **kw: MinGRUCell(SIZE, 4, **kw),
    "one": lambda **kw: MinGRU(SIZE, 4, **kw),
    "two": lambda **kw: MinGRU(SIZE, [4, 6], **kw),
    "all": lambda **kw: MinGRU(SIZE, [4, 4, 6], norm=True, residual=True, **kw),
}
OPTIONS = {"norm": "rms", "residual": True, "expand": 1.5, "learn_h0": True, "bidirectional": True}


def build(case, device, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    rnn = CASES[case](device=device, dtype=dtype, **kwargs)
    for name, parameter in rnn.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    return rnn.eval()


def inputs(rnn, device):
    """x, and states that are not the 'zero' state, negative values among them."""
    torch.manual_seed(1)
    x = torch.randn(B, S, SIZE, dtype=torch.float64, device=device)
    return x, [torch.randn_like(s) for s in rnn.init_hidden_state(x)]


def plain(rnn, x, h, residual):
    """The stack restated from its state_dict: norm, projection, loop over time, residual."""
    w, states = dict(rnn.named_parameters()), []
    for i, h_i in enumerate(h):
        key = f"layers.{i}.gate_hidden." if hasattr(rnn, "layers") else "to_gate_hidden."
        size = x.shape[-1]
        norm = [w.get(f"layers.{i}.norm.{name}") for name in ("weight", "bias")]
        y = x if norm[0] is None else F.layer_norm(x, [size], *norm)
        out, last = reference.mingru(F.linear(y, w[f"{key}weight"], w.get(f"{key}bias")), h_i.squeeze(1))
        states.append(last.unsqueeze(1))
        if residual:
            align = w.get(f"layers.{i}.res_align.weight")
            assert (align is None) == (size == out.shape[-1])
            out = out + (x if align is None else F.linear(x, align))
        x = out
    return x, states


def grads(outputs, leaves):
    """Gradients of out and of every h_n, weighted by noise of another seed than the inputs'."""
    torch.manual_seed(2)
    flat = [outputs[0], *outputs[1]]
    return torch.autograd.grad(flat, leaves, [torch.randn_like(y) for y in flat])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, bias, device):
    rnn = build(case, device, bias=bias)
    assert any(name.endswith("gate_hidden.bias") for name in rnn.state_dict()) == bias
    x, h = inputs(rnn, device)
    leaves = [x.requires_grad_(), *[s.requires_grad_() for s in h], *rnn.parameters()]
    ours, truth = rnn(x, h), plain(rnn, x, h, residual=case == "all")
    assert_close(ours, truth)
    assert_close(grads(ours, leaves), grads(truth, leaves))


@pytest.mark.parametrize("case", CASES)
def test_zero_state(case, device):
    rnn = build(case, device)
    x = inputs(rnn, device)[0].requires_grad_()
    h = rnn.init_hidden_state(x)
    assert [s.shape for s in h] == [(B, 1, size) for size in rnn.layer_sizes[1:]] and len(h) == rnn.num_layers
    assert all((s == 0.5).all() and not s.requires_grad and s.dtype == x.dtype and s.device == x.device for s in h)
    assert rnn.init_hidden_state(x.bfloat16())[0].dtype == torch.bfloat16
    assert_close(rnn(x), rnn(x, h))


@pytest.mark.parametrize("sizes", [[1] * S, [1, S - 1], [3, 2]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_chunks_carry_the_state(case, sizes, device):
    rnn = build(case, device)
    x, h = inputs(rnn, device)
    whole, last = rnn(x, h)
    parts = []
    for chunk in x.split(sizes, dim=1):
        out, h = rnn(chunk, h)
        parts.append(out)
    assert_close((torch.cat(parts, 1), h), (whole, last))


@pytest.mark.compiled
def test_dropout_between_layers_only(device):
    torch.manual_seed(0)
    rnn = MinGRU(SIZE, [64, 4], dropout=0.25, device=device)
    seen = []
    rnn.layers[1].gate_hidden.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = torch.randn(B, 64, SIZE, device=device)
    out, h = rnn(x)
    first, last = MinGRU(SIZE, 64, device=device), MinGRU(64, 4, device=device)
    first.layers[0].load_state_dict(rnn.layers[0].state_dict())
    last.layers[0].load_state_dict(rnn.layers[1].state_dict())
    full = first(x)[0].flatten(0, 1)
    kept = seen[0] != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    assert_close(seen[0], torch.where(kept, full / 0.75, 0))
    assert_close(out, last(seen[0].unflatten(0, (B, 64)))[0])
    assert_close(h[0], full.unflatten(0, (B, 64))[:, -1:])
    assert_close(rnn.eval()(x)[0], last(first(x)[0])[0])
    assert not torch.equal(rnn.train()(x)[0], rnn(x)[0])
    one = MinGRU(SIZE, 4, dropout=1.0, device=device)
    assert_close(one(x)[0], one.eval()(x)[0])


def test_keys(device):
    assert list(build("cell", device).state_dict()) == ["to_gate_hidden.weight", "to_gate_hidden.bias"]
    sizes = [SIZE, 4, 4, 6]
    expected = {}
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        expected |= {f"layers.{i}.norm.weight": (a,), f"layers.{i}.norm.bias": (a,)}
        expected |= {f"layers.{i}.gate_hidden.weight": (2 * b, a), f"layers.{i}.gate_hidden.bias": (2 * b,)}
        if a != b:
            expected[f"layers.{i}.res_align.weight"] = (b, a)
    rnn = build("all", device)
    assert {k: tuple(v.shape) for k, v in rnn.state_dict().items()} == expected
    checkpoint = {k: torch.randn(shape) for k, shape in expected.items()}
    rnn.load_state_dict(checkpoint)
    assert_close(rnn.layers[2].res_align.weight.float().cpu(), checkpoint["layers.2.res_align.weight"])
    assert rnn.layer_sizes == (3, 4, 4, 6) and rnn.num_layers == 3
    assert "3, [4, 4, 6], norm=True, residual=True" in repr(rnn)


@pytest.mark.compiled
@pytest.mark.parametrize("case", ["cell", "all"])
def test_copies_script_compile(case, device):
    torch._dynamo.reset()  # one forward serves the whole family, and recompilations are counted for it
    rnn = build(case, device)
    x, h = inputs(rnn, device)
    torch.jit.save(torch.jit.script(rnn), buffer := io.BytesIO())
    scripted = torch.jit.load(io.BytesIO(buffer.getvalue()))
    fresh = CASES[case]().to(device, torch.float64)
    fresh.load_state_dict(rnn.state_dict())
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), fresh, scripted, compiled):
        assert_close(other(x, h), rnn(x, h))
        assert_close(other(x), rnn(x))
    assert_close(scripted.init_hidden_state(x), rnn.init_hidden_state(x))
    low = rnn.to(torch.bfloat16)(x.bfloat16(), [s.bfloat16() for s in h])
    assert low[0].dtype == low[1][0].dtype == torch.bfloat16
    assert_close(low[0].double(), scripted(x, h)[0], atol=0.1, rtol=0.05)
    meta = build(case, "meta")(x.to("meta"))
    assert meta[0].shape == low[0].shape and [s.shape for s in meta[1]] == [s.shape for s in h]


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_time_first_is_batch_first_transposed(kind, device):
    torch.manual_seed(0)
    rnn = kind(SIZE, [4, 6], **OPTIONS, device=device)
    other = kind(SIZE, [4, 6], **OPTIONS, batch_first=False, device=device)
    other.load_state_dict(rnn.state_dict())
    x = torch.randn(B, S, SIZE, device=device)
    h = [torch.randn_like(state) for state in rnn.init_hidden_state(x)]
    masks = {"lengths": torch.tensor([S, 2], device=device), "reset": torch.rand(B, S, device=device) < 0.4}
    expected = rnn(x, h, **masks)
    out, h_n = other(x.transpose(0, 1), h, **masks | {"reset": masks["reset"].T})
    assert_close((out.transpose(0, 1), h_n), expected)
    assert [s.shape for s in other.init_hidden_state(x.transpose(0, 1))] == [s.shape for s in h]


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_initial_parameters(kind, device):
    torch.manual_seed(0)
    rnn = kind(SIZE, [64, 8], **OPTIONS, gate_bias="chrono", chrono_max=50, device=device)
    gates = 3 if kind is MinLSTM else 2
    layer = rnn.layers[0]
    assert layer.gate_hidden.weight.shape == (gates * 96, SIZE) and layer.out_proj.weight.shape == (64, 96)
    assert layer.reverse.gate_hidden.weight.shape == (gates * 96, SIZE) and (layer.h0 == 0.5).all()
    bias = layer.gate_hidden.bias.unflatten(0, (gates, 96))
    keeps, takes = (bias[0], bias[1]) if kind is MinLSTM else (-bias[0], bias[0])
    assert keeps.min() >= 0 and keeps.exp().min() >= 1 and keeps.exp().max() <= 49 and keeps.exp().std() > 10
    assert_close(takes, -keeps)
    assert bias[-1].abs().max() <= SIZE**-0.5  # as torch.nn.Linear has it
    before = {name: parameter.clone() for name, parameter in rnn.named_parameters()}
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.fill_(7.0)
    rnn.reset_parameters()
    assert not any((parameter == 7.0).any() for parameter in rnn.parameters())
    assert torch.equal(before["layers.0.h0"], rnn.layers[0].h0)
    assert kind(SIZE, 4, gate_bias=0.0, bias=False, device=device).layers[0].gate_hidden.bias is None
    assert (kind(SIZE, 4, gate_bias=-2.0, device=device).layers[0].gate_hidden.bias == -2.0).sum() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restart_from_a_small_learned_state_keeps_its_digits(dtype, device):
    """With z = 0 the state is h0 for good, however often it begins anew."""
    rnn = MinGRU(1, 1, learn_h0=True, gate_bias=-1e3, device=device, dtype=dtype)
    with torch.no_grad():
        rnn.layers[0].gate_hidden.weight.zero_()
        rnn.layers[0].h0.fill_(1e-3)
    out, h_n = rnn(torch.zeros(1, 3, 1, device=device, dtype=dtype), reset=torch.tensor([[0, 1, 0]], device=device) > 0)
    assert out.dtype == h_n[0].dtype == dtype
    assert_close(out, rnn.layers[0].h0.detach().expand_as(out), rtol=1e-4, atol=0)


def test_the_initial_state_is_no_view_of_the_learned_one(device):
    rnn = MinGRU(SIZE, 4, learn_h0=True, bidirectional=True, device=device)
    with torch.no_grad():
        for state in rnn.init_hidden_state(torch.zeros(2, 1, SIZE, device=device)):
            state[0].fill_(9.0)
    assert (rnn.layers[0].h0 == 0.5).all() and (rnn.layers[0].reverse.h0 == 0.5).all()


def test_the_order_of_parameters_is_that_of_optimizers_checkpoints():
    names = [name for name, _ in MinGRU(3, [4, 8], norm=True, residual=True).named_parameters()]
    layer = ["norm.weight", "norm.bias", "gate_hidden.weight", "gate_hidden.bias", "res_align.weight"]
    assert names == [f"layers.{i}.{name}" for i in (0, 1) for name in layer]


def test_a_norm_of_several_modules_is_reset_too():
    rnn = MinGRU(3, 4, norm=lambda size: torch.nn.Sequential(torch.nn.LayerNorm(size)))
    torch.nn.init.constant_(rnn.layers[0].norm[0].weight, 7.0)
    rnn.reset_parameters()
    assert (rnn.layers[0].norm[0].weight == 1.0).all()


def test_scripted_with_every_option(device):
    rnn = MinLSTM(SIZE, [4, 6], **OPTIONS, batch_first=False, device=device).eval()
    x = torch.randn(S, B, SIZE, device=device)
    lengths, reset = torch.tensor([S, 2], device=device), torch.rand(S, B, device=device) < 0.4
    scripted = torch.jit.script(rnn)
    assert_close(scripted(x, None, lengths, reset), rnn(x, None, lengths, reset))
    assert_close(scripted.init_hidden_state(x), rnn.init_hidden_state(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MinGRUCell(0, 4), ValueError, "input_size must be at least 1, got 0"),
        (lambda: MinGRUCell(3, 4.5), TypeError, "hidden_size must be an int, got 4.5"),
        (lambda: MinGRU(3, []), ValueError, "hidden_sizes must hold one size per layer"),
        (lambda: MinGRU(3, [4, 0]), ValueError, r"hidden_sizes\[1\] must be at least 1, got 0"),
        (lambda: MinGRU("3", 4), TypeError, "input_size must be an int, got '3'"),
        (lambda: MinGRU(3, 4, dropout=1.5), ValueError, r"dropout must lie in \[0, 1\], got 1.5"),
        (lambda: MinGRU(3, 4, dropout="0"), TypeError, "dropout must be a float"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("case", ["cell", "two"])
def test_bad_input(case, device):
    rnn = build(case, device)
    x, h = inputs(rnn, device)
    for bad_x in (x[0, 0], x[0, :, :2], x[:, :, :2]):
        with pytest.raises(ValueError, match=r"x must be \(B, S, input_size\) with 3 channels at dim 2, got shape"):
            rnn(bad_x)
    with pytest.raises(ValueError, match=f"h must hold {len(h)} states, got {len(h) + 1}"):
        rnn(x, [*h, h[0]])
    with pytest.raises(TypeError, match="h must be a list .* got Tensor"):
        rnn(x, h[0])
    with pytest.raises(TypeError, match=rf"h\[{len(h) - 1}\] must be float32, .* got torch.int32"):
        rnn(x, [*h[:-1], h[-1].int()])
    with pytest.raises(ValueError, match=rf"h\[{len(h) - 1}\] must be on the device of x .* got meta"):
        rnn(x, [*h[:-1], h[-1].to("meta")])
    for bad_h in (h[-1][:1], h[-1][:, 0], h[-1][..., 1:]):
        with pytest.raises(ValueError, match=rf"h\[{len(h) - 1}\] must have shape .* got"):
            rnn(x, [*h[:-1], bad_h])


def test_example():
    results = doctest.testmod(sys.modules[MinGRU.__module__])
    assert results.attempted > 0 and results.failed == 0
