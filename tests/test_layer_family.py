"""What all layers have in common: arguments as attributes of their names, each with an effect, and one way to be called."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

import convrnn
import convrnn.distributed
import convrnn.nn as layers

pytestmark = pytest.mark.compiled  # of the layers' own code, which the backends share

KINDS = [kind for name in layers.__all__ if (kind := getattr(layers, name)) is not layers.Bidirectional]
# Of each argument a value that is not its default; what belongs to an argument beside it.
VALUES = {
    "recurrent_kernel_size": 1,
    "stride": 2,
    "padding": 2,
    "dilation": 2,
    "recurrent_dilation": 2,
    "groups": 2,
    "recurrent_groups": 2,
    "separable": True,
    "padding_mode": "circular",
    "reset_after": True,
    "norm": "layer",
    "cell_norm": "layer",
    "residual": True,
    "dropout": 0.5,
    "recurrent_dropout": 0.5,
    "zoneout": 0.5,
    "gate_bias": -2.0,
    "chrono_max": 9,
    "learn_h0": True,
    "bidirectional": True,
    "expand": 2.0,
    "recompute": True,
    "batch_first": False,
}
BESIDE = {"chrono_max": {"gate_bias": "chrono", "chrono_max": 50}, "padding_mode": {"padding": 1}}
FACTORY = {"device", "dtype"}


def signature(kind):
    return inspect.signature(kind).parameters


def required(kind):
    """Of a stack two layers, of StackedGRU_RCN two levels."""
    values = {"input_size": 4, "hidden_size": 4, "hidden_sizes": [4, 4], "kernel_size": 3, "kernel_sizes": 3}
    values |= {"in_channels": 4, "nb_kernels": 4}
    if kind is layers.StackedGRU_RCN:
        values |= {"in_channels": [4, 4], "nb_kernels": [4, 4]}
    needed = {name for name, parameter in signature(kind).items() if parameter.default is parameter.empty}
    return {name: value for name, value in values.items() if name in needed}


def other_than_default(kind, name):
    default = signature(kind)[name].default
    if isinstance(default, bool):
        return not default
    return VALUES.get(name, VALUES.get(name.rstrip("s"), 7))


def cases():
    """(class, argument) for every argument that has a default."""
    for kind in KINDS:
        yield from ((kind, name) for name in signature(kind) if name not in required(kind) and name not in FACTORY)


def beside(kind, name):
    known = signature(kind)
    given = BESIDE.get(name, {})
    return {key: value for plain, value in given.items() for key in (plain, f"{plain}s") if key in known}


def entries(value):
    """The numbers in an argument, whether for one layer or in a list of them."""
    return {x for entry in value for x in entries(entry)} if isinstance(value, (list, tuple)) else {value}


def plain(value):
    return True if isinstance(value, nn.Parameter) else value


def run(kind, **arguments):
    """All that an argument may change: parameters, and what comes of a clip of three frames of two rows."""
    torch.manual_seed(0)
    rnn = kind(**required(kind), **arguments)
    dims = getattr(kind, "spatial_dims", 0 if issubclass(kind, (layers.MinGRU, layers.MinGRUCell)) else 2)
    x = torch.randn(3, 3, 4, *[9] * dims)
    torch.manual_seed(1)
    out, h = rnn([x, x] if kind is layers.StackedGRU_RCN else x)
    results = [*(out if isinstance(out, list) else [out]), *(h if isinstance(h, list) else [h])]
    torch.autograd.grad(sum(y.sum() for y in results), [*rnn.parameters()])  # which raises where one has no part in it
    return {**{f"parameter {name}": value for name, value in rnn.named_parameters()}, "results": results}


def same(a, b):
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_is_an_attribute_and_shown_where_it_is_not_the_default(kind):
    needed = required(kind)
    rnn = kind(**needed)
    assert all(entries(getattr(rnn, name)) == entries(value) for name, value in needed.items())
    assert "=" not in rnn.extra_repr() and rnn.extra_repr().count("4") >= 2
    for name in (name for other, name in cases() if other is kind):
        default = signature(kind)[name].default
        assert plain(getattr(rnn, name)) == (None if kind is layers.GRU_RCN and name == "bias" else default) or (
            entries(getattr(rnn, name)) == {default}
        )
        value = other_than_default(kind, name)
        changed = kind(**needed, **{**beside(kind, name), name: value})
        assert entries(plain(getattr(changed, name))) == entries(value)
        assert f"{name}=" in changed.extra_repr()


class Handed(convrnn.ConvGRU):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)


class Mixin:
    """As FSDP2 puts one before a module's own class."""


class Mixed(Mixin, convrnn.MinGRU):
    pass


def test_a_subclass_shows_the_arguments_of_the_class():
    assert Handed(4, 6, 3, strides=2).extra_repr() == "4, [6], [(3, 3)], strides=[(2, 2)]"
    assert Mixed(4, 6, norm="rms").extra_repr() == "4, [6], norm='rms'"


@pytest.mark.parametrize("kind", [convrnn.ConvGRUCell, convrnn.MinConv2dGRUCell, convrnn.SepConvGRUCell])
def test_integers_of_numpy_are_shown_as_ints(kind):
    groups = [name for name in ("groups", "recurrent_groups") if name in signature(kind)]
    shown = kind(**required(kind), **{name: np.int64(2) for name in groups}).extra_repr()
    assert shown.endswith(", ".join(f"{name}=2" for name in groups))


def test_numbers_of_numpy_are_taken_as_numbers():
    given = {"hidden_sizes": [np.int32(4), np.int64(6)], "dropout": np.float32(0.5), "gate_bias": np.float32(-1.0)}
    rnn = convrnn.ConvGRU(np.int64(4), kernel_sizes=np.int64(3), strides=np.uint8(2), zoneout=np.float64(0.5), **given)
    assert rnn.extra_repr() == (
        "4, [4, 6], [(3, 3), (3, 3)], strides=[(2, 2), (2, 2)], dropout=0.5, zoneout=0.5, gate_bias=-1.0"
    )
    rnn = convrnn.MinGRU(np.int64(4), expand=np.int64(2), chrono_max=np.int64(9), **{**given, "gate_bias": "chrono"})
    assert rnn.extra_repr() == "4, [4, 6], dropout=0.5, expand=2.0, gate_bias='chrono', chrono_max=9"


def test_none_and_false_are_one_norm():
    assert convrnn.ConvGRU(4, 6, 3, norm=False, cell_norm=False).extra_repr() == "4, [6], [(3, 3)]"
    assert convrnn.MinGRU(4, 6, norm=None).extra_repr() == "4, [6]"
    assert convrnn.MinGRU(4, 6, gate_bias=0.0).extra_repr() == "4, [6], gate_bias=0.0"  # None draws it


@pytest.mark.parametrize(("kind", "name"), [case for case in cases() if case[1] != "recompute"])
def test_an_argument_has_an_effect(kind, name):
    given = beside(kind, name)
    plainly, changed = run(kind, **given), run(kind, **{**given, name: other_than_default(kind, name)})
    assert plainly.keys() != changed.keys() or not all(map(same, plainly.values(), changed.values()))


@pytest.mark.parametrize("kind", [*KINDS, layers.Bidirectional])
def test_every_layer_is_called_the_same_way(kind):
    _, x, *rest = inspect.signature(kind.forward).parameters.values()
    assert x.name == ("xs" if kind is layers.StackedGRU_RCN else "x")
    assert [p.name for p in rest] == ["h", "lengths", "reset"] and all(p.default is None for p in rest)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in rest)
    _, x, h, reset = inspect.signature(kind.step).parameters.values()
    assert (h.name, reset.name) == ("h", "reset") and reset.kind is reset.KEYWORD_ONLY
    assert list(inspect.signature(kind.init_hidden_state).parameters)[1:] == [x.name]
    if kind is not layers.Bidirectional:
        factory = list(inspect.signature(kind).parameters.values())[-2:]
        assert [p.name for p in factory] == ["device", "dtype"]


@pytest.mark.parametrize("kind", [*KINDS, layers.Bidirectional])
def test_parameters_are_drawn_anew(kind):
    rnn = (
        kind(**required(kind))
        if kind in KINDS
        else kind(layers.MinGRU(4, 4, norm=True), layers.MinGRU(4, 4, norm=True))
    )
    for parameter in rnn.parameters():
        nn.init.constant_(parameter, 3.0)
    rnn.reset_parameters()
    assert not any((parameter == 3.0).any() for parameter in rnn.parameters())


def test_all_that_is_public_has_an_example():
    """pytest runs them (--doctest-modules)."""
    modules = (convrnn, convrnn.convert, convrnn.distributed, convrnn.state)
    public = {name: thing for module in modules for name in module.__all__ if callable(thing := getattr(module, name))}
    without = [name for name, thing in public.items() if ">>>" not in (inspect.getdoc(thing) or "")]
    assert len(public) > 35 and not without, without
