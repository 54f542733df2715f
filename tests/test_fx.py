"""torch.fx.symbolic_trace of models that hold the layers: each is one node of the graph, as torch.nn.GRU is."""

import inspect

import pytest
import torch
from torch import fx, nn
from torch.testing import assert_close

import convrnn
import convrnn.nn as layers

from .modules import MODULES, tensors

pytestmark = pytest.mark.compiled  # of the layers' own code, which the backends share


class Model(nn.Module):
    """Two layers, one after another: the second goes on from the states of the first, a step at the end."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, lengths=None):
        out, h = self.rnn(self.scale * x)
        again, _ = self.rnn(x, h, lengths=lengths)
        return torch.tanh(out) + again, h


@pytest.mark.parametrize("name", [name for name in MODULES if name != "StackedGRU_RCN"])
def test_a_layer_is_a_node(name, device):
    rnn, x = MODULES[name].make(device)
    model = Model(rnn.eval())
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["rnn", "rnn"]
    lengths = torch.tensor([2, 1, 3], device=device)
    found, expected = tensors(graph(x, lengths)), tensors(model(x, lengths))
    assert_close(found, expected)
    gradients = [torch.autograd.grad(sum(y.sum() for y in ys), list(model.parameters())) for ys in (found, expected)]
    assert_close(*gradients)  # of the one set of parameters


class Levels(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        outs, h = self.rnn([x, x[..., ::2, ::2]])
        return outs[0], outs[1], h[0], h[1]


@pytest.mark.parametrize("both", [False, True])
def test_lists_of_maps(both, device):
    rnn = layers.StackedGRU_RCN([2, 2], [3, 4], 3, device=device)
    model = Levels(layers.Bidirectional(rnn) if both else rnn)
    x = torch.randn(2, 3, 2, 6, 6, device=device)
    assert_close(fx.symbolic_trace(model)(x), model(x))


class Steps(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, a, b):
        _, h = self.rnn.step(a)
        return self.rnn.step(b, h)


@pytest.mark.parametrize("name", ["GRU_RCN", "ConvGRU", "ConvGRUCell", "MinGRU", "MinConv2dGRUCell"])
def test_steps(name, device):
    rnn, x = MODULES[name].make(device)
    frames, model = x.unbind(1)[:2], Steps(rnn)
    assert_close(fx.symbolic_trace(model)(*frames), model(*frames))


def test_every_layer_says_how_it_is_traced_alone():
    for name in layers.__all__:
        kind = getattr(layers, name)
        if kind is layers.StackedGRU_RCN:
            rnn = kind([2], [2], 3)
        elif kind is layers.Bidirectional:
            rnn = kind(convrnn.MinGRU(2, 2))
        else:
            needed = sum(p.default is p.empty for p in inspect.signature(kind).parameters.values())
            rnn = kind(*(2, 2, 3)[:needed])
        with pytest.raises(TypeError, match=rf"models that hold {name}, not .* symbolic_trace\(torch.nn.Sequential"):
            fx.symbolic_trace(rnn)
    x = torch.randn(2, 3, 2)
    rnn = convrnn.MinGRU(2, 2)
    assert_close(fx.symbolic_trace(nn.Sequential(rnn))(x), rnn(x))


class Doubled(convrnn.MinGRU):
    def forward(self, x):
        return 2 * super().forward(x)[0]


class Leaves(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Doubled) or super().is_leaf_module(m, module_qualified_name)


def test_a_subclass_with_a_forward_of_its_own():
    model = nn.Sequential(Doubled(2, 2))
    with pytest.raises(TypeError, match="cannot trace into Doubled, which overrides forward: take a torch.fx.Tracer"):
        fx.symbolic_trace(model)
    x = torch.randn(2, 3, 2)
    assert_close(fx.GraphModule(model, Leaves().trace(model))(x), model(x))
