"""GRU_RCN: against the six-convolution reference, every argument, carried state, TorchScript, bad input."""

import copy
import doctest
import io
import pickle

import pytest
import torch
from torch.testing import assert_close

import convrnn.nn.gru_rcn
from convrnn import GRU_RCN, reference

B, L, OX, OH, H, W = 2, 4, 3, 5, 5, 4


def inputs(device):
    torch.manual_seed(1)
    x = torch.randn(B, L, OX, H, W, dtype=torch.float64, device=device)
    return x, torch.randn(B, OH, H, W, dtype=torch.float64, device=device)


def layer(device, kernel_size=3, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    rnn = GRU_RCN(OX, OH, kernel_size, device=device, dtype=dtype, **kwargs)
    if rnn.bias is not None:
        torch.nn.init.normal_(rnn.bias)
    return rnn


def grads(outputs, *leaves):
    """Gradients of both outputs, weighted by noise of another seed than the inputs'."""
    torch.manual_seed(2)
    return torch.autograd.grad(outputs, leaves, [torch.randn_like(y) for y in outputs])


@pytest.mark.parametrize("kernel_size", [(3, 3), (1, 5), (2, 4)])
def test_vanilla_values_and_gradients(device, kernel_size):
    rnn = layer(device, kernel_size)
    ref = reference.VanillaGRU_RCN(OX, OH, kernel_size).to(device, torch.float64)
    packed = {
        "W": [ref.convWz.weight, ref.convWr.weight, ref.convWh.weight],
        "U": [ref.convUz.weight, ref.convUr.weight],
        "C": [ref.convUh.weight],
    }
    rnn.load_state_dict({name: torch.cat(weights) for name, weights in packed.items()})
    x, h = (v.requires_grad_() for v in inputs(device))
    ours, truth = rnn(x, h), ref(x, h)
    assert_close(ours, truth)
    dx, dh, *dw = grads(ours, x, h, rnn.W, rnn.U, rnn.C)
    rx, rh, *rw = grads(truth, x, h, *[w for weights in packed.values() for w in weights])
    assert_close((dx, dh), (rx, rh))
    assert_close(dw, [torch.cat(rw[:3]), torch.cat(rw[3:5]), rw[5]])


def test_bias(device):
    rnn = layer(device, bias=True)
    x, h = inputs(device)
    ours, truth = rnn(x, h), reference.gru_rcn(x, h, rnn.W, rnn.U, rnn.C, rnn.bias)
    assert_close(ours, truth)
    assert_close(grads(ours, rnn.bias), grads(truth, rnn.bias))


def test_state_forms(device):
    rnn, (x, h) = layer(device), inputs(device)
    zeros = rnn.init_hidden_state(x)
    assert zeros.shape == (B, OH, H, W) and zeros.dtype == x.dtype and zeros.device == x.device
    assert not zeros.any()
    assert not rnn.init_hidden_state(x.clone().requires_grad_()).requires_grad
    assert rnn.init_hidden_state(x.bfloat16()).dtype == torch.bfloat16
    assert_close(rnn(x), rnn(x, zeros))
    one = h[0].clone().requires_grad_()
    each = h[:1].repeat(B, 1, 1, 1).requires_grad_()
    assert_close(rnn(x, one), rnn(x, each))
    assert_close(grads(rnn(x, one), one)[0], grads(rnn(x, each), each)[0].sum(0))


def test_batch_first(device):
    first, last = layer(device), layer(device, batch_first=False)
    x, h = inputs(device)
    out, h_n = last(x.transpose(0, 1), h)
    assert out.shape == (L, B, OH, H, W) and h_n.shape == (B, OH, H, W)
    assert_close((out.transpose(0, 1), h_n), first(x, h))
    assert last.init_hidden_state(x.transpose(0, 1)).shape == (B, OH, H, W)


@pytest.mark.parametrize("sizes", [[1] * L, [1, L - 1], [3, 1]], ids=str)
def test_chunks_carry_the_state(device, sizes):
    rnn, (x, h) = layer(device), inputs(device)
    whole, last = rnn(x, h)
    parts = []
    for chunk in x.split(sizes, dim=1):
        out, h = rnn(chunk, h)
        parts.append(out)
    assert_close((torch.cat(parts, 1), h), (whole, last))


def test_strided_input(device):
    rnn, (x, h) = layer(device), inputs(device)
    truth = rnn(x, h)
    assert_close(rnn(x.transpose(3, 4).contiguous().transpose(3, 4), h.to(memory_format=torch.channels_last)), truth)
    assert_close(rnn(x.repeat(1, 2, 1, 1, 1)[:, :L], h), truth)


def test_parameters(device):
    rnn = GRU_RCN(OX, OH, (3, 2), bias=True, device=device)
    shapes = {"W": (3 * OH, OX, 3, 2), "U": (2 * OH, OH, 3, 2), "C": (OH, OH, 3, 2), "bias": (3 * OH,)}
    assert {k: tuple(v.shape) for k, v in rnn.state_dict().items()} == shapes
    assert list(GRU_RCN(OX, OH, 3).state_dict()) == ["W", "U", "C"] and GRU_RCN(OX, OH, 3).bias is None
    for name in "WUC":
        weight = getattr(rnn, name)
        bound = (6 / ((weight.shape[0] + weight.shape[1]) * 6)) ** 0.5
        assert 0.8 * bound < weight.abs().max() <= bound
    assert not rnn.bias.any()
    before = rnn.W.clone()
    torch.nn.init.ones_(rnn.bias)
    rnn.reset_parameters()
    assert not torch.equal(before, rnn.W) and not rnn.bias.any()
    assert "3, 5, (3, 2), bias=True" in repr(rnn)


def test_copies_agree(device):
    rnn, (x, h) = layer(device, bias=True), inputs(device)
    truth = rnn(x, h)
    fresh = GRU_RCN(OX, OH, 3, bias=True).to(device, torch.float64)
    fresh.load_state_dict(rnn.state_dict())
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn)), fresh):
        assert_close(other(x, h), truth)


def test_dtypes_and_meta(device):
    x, h = inputs(device)
    out, h_n = layer(device)(x, h)
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.bfloat16, 0.1)]:
        low, low_n = layer(device).to(dtype)(x.to(dtype), h.to(dtype))
        assert low.dtype == low_n.dtype == dtype
        assert_close(low.double(), out, atol=tolerance, rtol=0)
    low, low_n = layer("meta")(x.to("meta"))
    assert low.shape == out.shape and low_n.shape == h_n.shape


@pytest.mark.compiled
def test_script_and_compile(device):
    rnn, (x, h) = layer(device, (3, 2), batch_first=False, bias=True), inputs(device)
    x = x.transpose(0, 1)
    torch.jit.save(torch.jit.script(rnn), buffer := io.BytesIO())
    scripted = torch.jit.load(io.BytesIO(buffer.getvalue()))
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    for other in (scripted, compiled):
        assert_close(other(x, h), rnn(x, h))
        assert_close(other(x, h[0]), rnn(x, h[0]))
        assert_close(other(x), rnn(x))
    assert_close(scripted.init_hidden_state(x), rnn.init_hidden_state(x))
    with pytest.raises(torch.jit.Error, match="h must have shape"):
        scripted(x, h[:1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4, 3), ValueError, "in_channels must be at least 1, got 0"),
        ((3, -1, 3), ValueError, "nb_kernels must be at least 1, got -1"),
        ((3, 4.0, 3), TypeError, "nb_kernels must be an int, got 4.0"),
        ((3, True, 3), TypeError, "nb_kernels must be an int"),
        ((3, 4, (3, 3, 3)), ValueError, "kernel_size must be an int or a pair"),
        ((3, 4, (3, 0)), ValueError, "kernel_size must be at least 1"),
        ((3, 4, "same"), TypeError, "kernel_size must be an int, got 'same'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GRU_RCN(*arguments)


def test_bad_input(device):
    rnn, (x, h) = layer(device), inputs(device)
    for bad_x in (x[0, 0], x[:, :, :2]):
        with pytest.raises(ValueError, match=r"x must be \(B, L, Ox, H, W\) with 3 channels at dim 2, got shape"):
            rnn(bad_x)
    for bad_h in (h[:1], h[:, :2], h[..., 1:], h[0, 0], h[0, 1:], h[None]):
        with pytest.raises(ValueError, match="h must have shape .* got"):
            rnn(x, bad_h)
    with pytest.raises(ValueError, match=r"x must be \(B, L, Ox, H, W\) .* got shape \[2, 2, 5, 4\]"):
        rnn(x[:, 0, :2])
    with pytest.raises(TypeError, match="h must be a Tensor .* got list"):
        rnn(x, [h])
    with pytest.raises(TypeError, match="x must be a Tensor .* got ndarray"):
        rnn(x.cpu().numpy())


def test_example():
    results = doctest.testmod(convrnn.nn.gru_rcn)
    assert results.attempted > 0 and results.failed == 0
