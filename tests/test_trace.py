"""torch.jit.trace with its defaults, as everybody calls it: every layer, alone and within a model, gradients on and off."""

import inspect
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import convrnn.nn as layers

from .modules import tensors

# The layers' own code, which the backends share. A trace warns that it holds checks of sizes to be constant.
pytestmark = [pytest.mark.compiled, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]

OPTIONS = ("bias", "learn_h0", "bidirectional")
REQUIRED = {"input_size": 3, "hidden_size": 4, "hidden_sizes": [4, 4], "kernel_size": 3, "kernel_sizes": 3}
REQUIRED |= {"in_channels": 3, "nb_kernels": 4, "paddings": 1, "padding": 1}


def make(kind, *, turned=(), **options):
    """A layer, with the opposite of the default for the flags ``turned``, and an input of it."""
    known = inspect.signature(kind).parameters
    values = {name: value for name, value in REQUIRED.items() if name in known}
    if kind is layers.StackedGRU_RCN:
        values |= {"in_channels": [3, 3], "nb_kernels": [4, 4]}
    values |= {name: not known[name].default for name in turned}
    size = (7, 6, 5)[: getattr(kind, "spatial_dims", 0 if "MinGRU" in kind.__name__ or "LSTM" in kind.__name__ else 2)]
    x = torch.randn(2, 3, 3, *size, dtype=torch.float64)
    return kind(**values, **options, dtype=torch.float64), ([x, x] if kind is layers.StackedGRU_RCN else x)


def cases():
    """(class, flags): each layer with its defaults, with one flag turned, and with all of them."""
    for name in layers.__all__:
        kind = getattr(layers, name)
        if kind is not layers.Bidirectional:
            flags = [flag for flag in OPTIONS if flag in inspect.signature(kind).parameters]
            for turned in dict.fromkeys([(), *((flag,) for flag in flags), tuple(flags)]):
                yield pytest.param(kind, turned, id="-".join((name, *turned)))


class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        out = self.rnn(x)[0]
        return torch.tanh(out[-1] if isinstance(out, list) else out)


def check(module, x, grad):
    """With ``check_trace`` on, which traces once more without gradients and compares the graphs."""
    args = (x,) if isinstance(x, list) else x
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, args)
    torch.jit.save(traced, buffer := io.BytesIO())
    traced = torch.jit.load(io.BytesIO(buffer.getvalue()))
    other = [torch.randn_like(y) for y in x] if isinstance(x, list) else torch.randn_like(x)
    found, expected = tensors(traced(other)), tensors(module(other))
    assert_close(found, expected)
    assert_close(
        torch.autograd.grad(sum(y.sum() for y in found), list(traced.parameters())),
        torch.autograd.grad(sum(y.sum() for y in expected), list(module.parameters())),
        msg=lambda message: f"{message}\n{[name for name, _ in module.named_parameters()]}",
    )


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("kind", "turned"), [*cases()])
def test_every_layer(kind, turned, grad):
    rnn, x = make(kind, turned=turned)
    check(rnn, x, grad)
    check(Model(rnn.eval()), x, grad)


def test_a_layer_that_walks_over_time():
    rnn, x = make(layers.ConvGRU, turned=("reset_after", "residual"), strides=2, norm="layer", cell_norm="layer")
    check(Model(rnn), x, True)


ONE_WAY = ["GRU_RCN", "StackedGRU_RCN", "ConvGRU", "SepConvGRUCell", "MinGRU", "MinConv2dGRU"]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ONE_WAY)
def test_both_directions_of_every_kind(name, grad):
    rnn, x = make(getattr(layers, name), turned=("bias",))
    check(layers.Bidirectional(rnn), x, grad)
    check(Model(layers.Bidirectional(rnn, make(getattr(layers, name), turned=("bias",))[0])), x, grad)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_activations_are_kept_where_a_gradient_is_wanted(grad):
    """A trace asks at each call, however it was recorded."""
    rnn, x = make(layers.GRU_RCN)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(rnn, x)

    def kept(**options):
        with torch.profiler.profile(profile_memory=True) as profile, torch.set_grad_enabled(options["grad"]):
            traced(x)
        return sum(event.cpu_memory_usage for event in profile.key_averages() if event.key == "convrnn::gru_rcn")

    traced(x), traced(x)  # what the executor compiles, and what the op's working memory takes, once
    out = x[:, :, :1].expand(-1, -1, 4, -1, -1).numel() * x.element_size()
    assert kept(grad=True) - kept(grad=False) >= 2 * out


@pytest.mark.parametrize(
    ("name", "longer"), [("GRU_RCN", True), ("ConvGRU", True), ("MinGRU", True), ("SepConvGRUCell", False)]
)
def test_masks_are_inputs_of_a_trace(name, longer):
    rnn, x = make(getattr(layers, name))

    def masks(steps):
        return {"lengths": torch.tensor([steps, steps // 2]), "reset": torch.rand(2, steps) < 0.5}

    traced = torch.jit.trace(rnn, example_kwarg_inputs={"x": x, **masks(3)})
    for clip in (x, torch.cat((x, x), 1)) if longer else (x,):
        given = masks(clip.shape[1])
        assert_close(tensors(traced(x=clip, **given)), tensors(rnn(clip, **given)))
