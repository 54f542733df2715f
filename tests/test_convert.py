"""Checkpoints of other projects: the converted layer against the equations of theirs, stated again here."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import convrnn
from convrnn import convert
from convrnn.convert import Gates

B, T, IN, C = 2, 3, 3, 4


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def conv(read, write, kernel=(3, 3), **options):
    return nn.Conv2d(read, write, kernel, padding=tuple(k // 2 for k in kernel), **options)


def check(layer, step):
    """``step(x_t, h)`` is the other project's cell."""
    x, h = torch.randn(B, T, layer.input_size, 5, 4), torch.randn(B, layer.hidden_sizes[0], 5, 4)
    out, _ = layer(x, [h])
    for t in range(T):
        h = step(x[:, t], h)
        assert_close(out[:, t], h)


def hx_step(z, r, q):
    def step(x, h):
        joined = torch.cat((h, x), 1)
        update, reset = torch.sigmoid(z(joined)), torch.sigmoid(r(joined))
        return (1 - update) * h + update * torch.tanh(q(torch.cat((reset * h, x), 1)))

    return step


def test_raft():
    gates = nn.ModuleDict({name: conv(C + IN, C) for name in ("convz", "convr", "convq")})
    check(convert.from_raft(gates.state_dict()), hx_step(*gates.values()))


@pytest.mark.parametrize("names", ["convgru{}.conv{}", "conv{1}{0}"], ids=["torchvision", "original"])
def test_separable_raft(names):
    kernels = {1: (1, 5), 2: (5, 1)}
    gates = {(i, g): conv(C + IN, C, kernels[i]) for i in (1, 2) for g in "zrq"}
    checkpoint = {
        f"update.{names.format(i, g)}.{part}": value
        for (i, g), module in gates.items()
        for part, value in module.state_dict().items()
    }
    cell = convert.from_raft(checkpoint, prefix="update.")
    first, second = (hx_step(*(gates[i, g] for g in "zrq")) for i in (1, 2))
    x, h = torch.randn(B, T, IN, 6, 7), torch.randn(B, C, 6, 7)
    out, _ = cell(x, [h])
    for t in range(T):
        h = second(x[:, t], first(x[:, t], h))
        assert_close(out[:, t], h)


def test_robust_video_matting():
    layer = nn.ModuleDict(
        {"ih": nn.Sequential(conv(2 * C, 2 * C), nn.Sigmoid()), "hh": nn.Sequential(conv(2 * C, C), nn.Tanh())}
    )

    def step(x, h):
        r, z = layer["ih"](torch.cat((x, h), 1)).split(C, 1)
        return (1 - z) * h + z * layer["hh"](torch.cat((x, r * h), 1))

    check(convert.from_robust_video_matting(layer.state_dict()), step)


@pytest.mark.parametrize("bias", [True, False])
def test_conv_gates(bias):
    layer = nn.ModuleDict({"conv_gates": conv(IN + C, 2 * C, bias=bias), "conv_can": conv(IN + C, C, bias=bias)})

    def step(x, h):
        r, z = torch.sigmoid(layer["conv_gates"](torch.cat((x, h), 1))).chunk(2, 1)
        return (1 - z) * h + z * torch.tanh(layer["conv_can"](torch.cat((x, r * h), 1)))

    check(convert.from_conv_gates(layer.state_dict()), step)


def test_three_gates():
    layer = nn.ModuleDict({name: conv(IN + C, C, (5, 3)) for name in ("update_gate", "reset_gate", "out_gate")})

    def step(x, h):
        z, r = (torch.sigmoid(layer[name](torch.cat((x, h), 1))) for name in ("update_gate", "reset_gate"))
        return h * (1 - z) + torch.tanh(layer["out_gate"](torch.cat((x, h * r), 1))) * z

    check(convert.from_three_gates(layer.state_dict()), step)


def test_reset_after_and_a_gate_that_keeps():
    layer = nn.ModuleDict({"zr": conv(IN + C, 2 * C), "of_x": conv(IN, C, (5, 5)), "of_h": conv(C, C)})

    def step(x, h):
        z, r = torch.sigmoid(layer["zr"](torch.cat((x, h), 1))).chunk(2, 1)
        return z * h + (1 - z) * torch.tanh(layer["of_x"](x) + r * layer["of_h"](h))

    split = {"x": conv(IN, 2 * C, (5, 5)), "h": conv(C, 2 * C)}
    with torch.no_grad():  # the same gates as two convolutions, so that all kernels of x have one size
        split["x"].weight.zero_()[:, :, 1:4, 1:4] = layer["zr"].weight[:, :IN]
        split["h"].weight.copy_(layer["zr"].weight[:, IN:])
        split["x"].bias.copy_(0.25 * layer["zr"].bias)
        split["h"].bias.copy_(0.75 * layer["zr"].bias)
    checkpoint = {**layer.state_dict(), **{f"{s}.{n}": v for s, m in split.items() for n, v in m.state_dict().items()}}
    parts = [Gates("x", "zr", "x"), Gates("h", "zr", "h"), Gates("of_x", "c", "x"), Gates("of_h", "c", "h")]
    check(convert.from_gates(checkpoint, parts, z_keeps=True, reset_after=True), step)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_gates_of_each_dimension(kind):
    layer = nn.ModuleDict({"g": kind(IN + C, 2 * C, 3, padding=1), "c": kind(IN + C, C, 3, padding=1)})
    cell = convert.from_gates(layer.state_dict(), [Gates("g", "zr", "xh"), Gates("c", "c", "xh")])
    size = [3] * cell.spatial_dims
    x = torch.rand(1, IN, *size)
    joined = torch.cat((x, x.new_zeros(1, C, *size)), 1)
    assert_close(cell(x)[0], torch.sigmoid(layer["g"](joined))[:, :C] * torch.tanh(layer["c"](joined)))  # from zeros


def test_seeds():
    rcn = convrnn.GRU_RCN(IN, C, (3, 2), bias=True)
    x = torch.randn(B, T, IN, 6, 6)
    assert_close(
        convert.from_ballas2016({f"rnn.{k}": v for k, v in rcn.state_dict().items()}, prefix="rnn.")(x), rcn(x)
    )
    conv_layer = {"paddings": 1, "strides": [1, 2]}
    layers = [
        (convrnn.MinGRUCell(IN, C, bias=False), {}, x[..., 0, 0]),
        (convrnn.MinGRU(IN, [C, 5], norm=True, residual=True), {}, x[..., 0, 0]),
        (convrnn.MinConv2dGRUCell(IN, C, (3, 2), padding=1), {"padding": 1}, x),
        (convrnn.MinConv2dGRU(IN, [C, 8], 3, residual=True, norm=True, **conv_layer), conv_layer, x),
    ]
    for layer, options, x_in in layers:
        converted = convert.from_mingru(layer.state_dict(), **options)
        assert type(converted) is type(layer)
        assert_close(converted(x_in), layer(x_in))


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (
            [("g", "rz", "xh")],
            {},
            "convolutions must compute z, r and c from x and from h, got none of c from x, c from h",
        ),
        ([("g", "rz", "xh"), ("c", "r", "xh")], {}, "convolutions must compute 'r' from 'x' once, c does so again"),
        (
            [("g", "rz", "xh"), ("c", "c", "xh")],
            {"reset_after": True},
            "convolutions must compute 'c' from x and h apart",
        ),
        ([("g", "rz", "xh"), ("none", "c", "xh")], {}, "state_dict must hold none.weight"),
        ([("g", "rn", "xh"), ("c", "c", "xh")], {}, "convolutions must have gates of 'zrc'"),
        ([("g", "rz", "xh"), ("even", "c", "xh")], {}, "even.weight must have odd kernel sizes"),
        ([("g", "rz", "xh"), ("g", "c", "xh")], {}, "g.weight must have 1 x 4 output channels"),
    ],
)
def test_bad_layouts(parts, options, message):
    layer = nn.ModuleDict({"g": conv(IN + C, 2 * C), "c": conv(IN + C, C), "even": conv(IN + C, C, (2, 2))})
    with pytest.raises(ValueError, match=message):
        convert.from_gates(layer.state_dict(), [Gates(*part) for part in parts], **options)


CONVERTERS = [name for name in convert.__all__ if name.startswith("from_")]


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_module_stands_for_its_state_dict(name):
    gates = {name: conv(IN + C, C) for name in ("convz", "convr", "convq", "update_gate", "reset_gate", "out_gate")}
    pairs = {"conv_gates": conv(IN + C, 2 * C), "conv_can": conv(IN + C, C)}
    matting = {"ih": nn.Sequential(conv(2 * C, 2 * C)), "hh": nn.Sequential(conv(2 * C, C))}
    module = {
        "from_ballas2016": convrnn.GRU_RCN(IN, C, 3),
        "from_mingru": convrnn.MinGRU(IN, C),
        "from_mingru_pytorch": nn.ModuleDict({"to_hidden_and_gate": nn.Linear(IN, 2 * C, bias=False)}),
    }.get(name, nn.ModuleDict(gates | pairs | matting))
    convolutions = [[Gates("conv_gates", "rz", "xh"), Gates("conv_can", "c", "xh")]] if name == "from_gates" else []
    converter = getattr(convert, name)
    found, expected = (converter(given, *convolutions).state_dict() for given in (module, module.state_dict()))
    assert_close(found, expected)
    own = {tensor.data_ptr() for tensor in module.state_dict().values()}
    assert not any(tensor.data_ptr() in own for tensor in found.values())  # a copy
    for wrong in (None, ["weight"], "checkpoint.pt"):
        with pytest.raises(TypeError, match=r"state_dict must be a module, its state_dict\(\) or a mapping .*, got "):
            converter(wrong, *convolutions)


def test_other_checkpoints_are_refused():
    for function, message in [
        (convert.from_ballas2016, "state_dict must hold kernels W, U and C, got no W, U, C"),
        (convert.from_mingru, r"state_dict must hold to_gate_hidden.\* or layers"),
        (convert.from_raft, "state_dict must hold convz.weight, the kernels of a convolution, got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            function({"weight": torch.zeros(1)})
