"""MinConv2dGRUCell and MinConv2dGRU: against plain loops, every argument, carried state, TorchScript, bad input."""

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

from convrnn import (
    MinConv1dGRU,
    MinConv1dGRUCell,
    MinConv2dGRU,
    MinConv2dGRUCell,
    MinConv3dGRU,
    MinConv3dGRUCell,
    reference,
)
from convrnn.nn._convolution import Convolution

B, S, SIZE, H, W = 2, 3, 3, 5, 4
CASES = {
    "cell": (MinConv2dGRUCell, (SIZE, 4, 3), {"padding": 1}),
    "cell_stride": (MinConv2dGRUCell, (SIZE, 4, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}),
    "one": (MinConv2dGRU, (SIZE, 4, 2), {}),
    "same": (MinConv2dGRU, (SIZE, [3, 4, 4], 3), {"paddings": 1, "residual": True, "norm": True}),
    "strides": (MinConv2dGRU, (SIZE, [4, 4], [3, (1, 2)]), {"strides": [1, (2, 1)], "paddings": [(0, 1), 1]}),
    "align": (MinConv2dGRU, (SIZE, [3, 4], [2, 3]), {"strides": [1, 2], "paddings": [0, 1], "residual": True}),
}


def build(case, device, **kwargs):
    torch.manual_seed(0)
    make, sizes, options = CASES[case]
    rnn = make(*sizes, **options, **kwargs, device=device, dtype=torch.float64)
    for parameter in rnn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return rnn.eval()


def inputs(rnn, device):
    torch.manual_seed(1)
    x = torch.randn(B, S, SIZE, H, W, dtype=torch.float64, device=device)
    return x, [torch.randn_like(s) for s in rnn.init_hidden_state(x)]


def plain(rnn, case, x, h):
    """The stack restated from its state_dict and arguments: norm, convolution, loop over time, residual."""
    _, (_, _, kernels), options = CASES[case]
    strides = options.get("strides", options.get("stride", 1))
    paddings = options.get("paddings", options.get("padding", 0))
    w, states = dict(rnn.named_parameters()), []
    for i, h_i in enumerate(h):
        name = f"layers.{i}.gate_hidden" if hasattr(rnn, "layers") else "to_gate_hidden"
        kernel, stride, padding = (v[i] if isinstance(v, list) else v for v in (kernels, strides, paddings))
        assert tuple(w[f"{name}.weight"].shape[2:]) == (kernel if isinstance(kernel, tuple) else (kernel, kernel))
        y = frames = x.flatten(0, 1)
        if options.get("norm"):  # three or four channels: one group
            y = F.group_norm(frames, 1, w[f"layers.{i}.norm.weight"], w[f"layers.{i}.norm.bias"])
        y = F.conv2d(y, w[f"{name}.weight"], w.get(f"{name}.bias"), stride, padding)
        out, last = reference.mingru(y.unflatten(0, (B, S)), h_i.squeeze(1))
        states.append(last.unsqueeze(1))
        if options.get("residual"):
            align = w.get(f"layers.{i}.res_align.weight")
            assert (align is None) == (x.shape == out.shape)
            out = out + (x if align is None else F.conv2d(frames, align, None, stride, padding).unflatten(0, (B, S)))
        x = out
    return x, states


def grads(outputs, leaves):
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
    ours, truth = rnn(x, h), plain(rnn, case, x, h)
    assert_close(ours, truth)
    assert_close(grads(ours, leaves), grads(truth, leaves))


@pytest.mark.parametrize("case", CASES)
def test_zero_state_and_chunks(case, device):
    rnn = build(case, device)
    x, h = inputs(rnn, device)
    zero = rnn.init_hidden_state(x.clone().requires_grad_())
    assert all((s == 0.5).all() and not s.requires_grad and s.dtype == x.dtype and s.device == x.device for s in zero)
    assert rnn.init_hidden_state(x.bfloat16())[0].dtype == torch.bfloat16
    assert_close(rnn(x), rnn(x, zero))
    whole = rnn(x, h)
    for sizes in ([1] * S, [2, 1]):
        parts, state = [], h
        for chunk in x.split(sizes, dim=1):
            out, state = rnn(chunk, state)
            parts.append(out)
        assert_close((torch.cat(parts, 1), state), whole)
    assert_close(rnn(x.transpose(3, 4).contiguous().transpose(3, 4), h), whole)
    assert_close(rnn.to(memory_format=torch.channels_last)(x, h), whole)


def test_dropout_between_layers_only(device):
    rnn = MinConv2dGRU(SIZE, [16, 4], 1, dropout=0.25, device=device)
    seen = []
    rnn.layers[1].gate_hidden.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = torch.randn(B, 6, SIZE, 5, 5, device=device)
    out = rnn(x)[0]
    kept = seen[0] != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.03 and (out != 0).all()
    assert torch.equal(rnn.eval()(x)[0], rnn(x)[0])
    assert_close(seen[0], torch.where(kept, seen[1] / 0.75, 0))


@pytest.mark.parametrize("case", ["same", "align"])
def test_keys(case, device):
    rnn, expected = build(case, device), {}
    sizes = [SIZE, *CASES[case][1][1]]
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        k = 3 if case == "same" else (2, 3)[i]
        if case == "same":
            expected |= {f"layers.{i}.norm.weight": (a,), f"layers.{i}.norm.bias": (a,)}
        expected |= {f"layers.{i}.gate_hidden.weight": (2 * b, a, k, k), f"layers.{i}.gate_hidden.bias": (2 * b,)}
        if a != b or case == "align":
            expected[f"layers.{i}.res_align.weight"] = (b, a, k, k)
    assert {k: tuple(v.shape) for k, v in rnn.state_dict().items()} == expected
    checkpoint = {k: torch.randn(shape) for k, shape in expected.items()}
    rnn.load_state_dict(checkpoint)
    assert_close({k: v.float().cpu() for k, v in rnn.state_dict().items()}, checkpoint)
    assert rnn.layer_sizes == tuple(sizes) and rnn.num_layers == len(sizes) - 1
    assert list(build("cell", device).state_dict()) == ["to_gate_hidden.weight", "to_gate_hidden.bias"]


def test_norm_groups():
    expected = {1: 1, 3: 1, 4: 1, 6: 1, 8: 1, 16: 4, 24: 4, 32: 8, 48: 8, 64: 16, 96: 16, 128: 32, 256: 64, 512: 64}
    assert {c: MinConv2dGRU(c, 1, 1, norm=True).layers[0].norm.num_groups for c in expected} == expected


def test_residual_decided_as_by_running_a_frame():
    for k, stride, padding in itertools.product(range(1, 8), range(1, 4), range(4)):
        same = F.conv2d(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, k, k), None, stride, padding).shape[2] == 16
        assert Convolution((k, k), (stride, stride), ((padding, padding),) * 2).preserves_size == same


@pytest.mark.parametrize("kind", [MinConv1dGRUCell, MinConv2dGRUCell, MinConv3dGRUCell])
def test_a_cell_is_a_stack_of_one_layer(kind, device):
    dims = kind.spatial_dims
    options = {"dilation": 2, "groups": 2, "padding_mode": "circular", "padding": 1}
    cell = kind(4, 6, 3, **options, device=device)
    stack = {1: MinConv1dGRU, 2: MinConv2dGRU, 3: MinConv3dGRU}[dims]
    rnn = stack(4, 6, 3, dilations=2, groups=2, padding_mode="circular", paddings=1, device=device)
    rnn.load_state_dict({f"layers.0.{name[3:]}": value for name, value in cell.state_dict().items()})
    x = torch.randn(B, S, 4, *[5] * dims, device=device)
    assert_close(cell(x), rnn(x))
    assert_close(cell.init_hidden_state(x), rnn.init_hidden_state(x))
    scripted = torch.jit.script(cell)
    assert_close(scripted(x), cell(x))


def test_time_first(device):
    torch.manual_seed(0)
    options = {"paddings": "same", "norm": "layer", "residual": True, "bidirectional": True, "device": device}
    rnn, other = MinConv1dGRU(3, [4, 6], 3, **options), MinConv1dGRU(3, [4, 6], 3, **options, batch_first=False)
    other.load_state_dict(rnn.state_dict())
    x = torch.randn(B, S, 3, 7, device=device)
    out, h_n = other(x.transpose(0, 1))
    assert_close((out.transpose(0, 1), h_n), rnn(x))


@pytest.mark.compiled
@pytest.mark.parametrize("case", ["cell_stride", "same", "strides"])
def test_copies_script_compile(case, device):
    torch._dynamo.reset()  # one forward serves the whole family, and recompilations are counted for it
    rnn = build(case, device)
    x, h = inputs(rnn, device)
    torch.jit.save(torch.jit.script(rnn), buffer := io.BytesIO())
    scripted = torch.jit.load(io.BytesIO(buffer.getvalue()))
    copies = (
        copy.deepcopy(rnn),
        pickle.loads(pickle.dumps(rnn)),
        torch.compile(rnn, fullgraph=True, backend="aot_eager"),
    )
    for other in (scripted, *copies):
        assert_close(other(x, h), rnn(x, h))
        assert_close(other(x), rnn(x))
    assert_close(scripted.init_hidden_state(x), rnn.init_hidden_state(x))
    low = rnn.to(torch.bfloat16)(x.bfloat16(), [s.bfloat16() for s in h])
    assert low[0].dtype == low[1][0].dtype == torch.bfloat16
    assert_close(low[0].double(), scripted(x, h)[0], atol=0.1, rtol=0.05)
    meta = build(case, "meta")(x.to("meta"))
    assert meta[0].shape == low[0].shape and [s.shape for s in meta[1]] == [s.shape for s in h]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MinConv2dGRUCell(3, 4, 3, stride=0), ValueError, "stride must be at least 1, got 0"),
        (lambda: MinConv2dGRUCell(3, 4, 3, padding=-1), ValueError, "padding must be at least 0, got -1"),
        (lambda: MinConv2dGRU(3, [4, 4], [3]), ValueError, "kernel_sizes must .* each of the 2 layers, got 1"),
        (lambda: MinConv2dGRU(3, 4, 3, strides=[1, 2]), ValueError, "strides must .* each of the 1 layers, got 2"),
        (lambda: MinConv2dGRU(3, 4, 3, paddings=[], dropout=2), ValueError, "paddings must .* 1 layers, got 0"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("case", ["cell", "align"])
def test_bad_input(case, device):
    rnn = build(case, device)
    x, h = inputs(rnn, device)
    with pytest.raises(ValueError, match="x must be .* with 3 channels at dim 2, got shape"):
        rnn(x[:, :, :2])
    for bad_h in (h[-1][:1], h[-1][:, 0], h[-1][..., 1:], h[-1][:, :, 1:]):
        with pytest.raises(ValueError, match=rf"h\[{len(h) - 1}\] must have shape .* got"):
            rnn(x, [*h[:-1], bad_h])
    with pytest.raises(ValueError, match="x is too small"):
        build("one", device).init_hidden_state(x[..., :1])


def test_example():
    results = doctest.testmod(sys.modules[MinConv2dGRU.__module__])
    assert results.attempted > 0 and results.failed == 0
