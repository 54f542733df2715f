"""Norms of all layers read frames of any strides, whether x wants a gradient or not: GroupNorm alone would crash."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convrnn
from convrnn.nn._parts import norm_input
from examples.next_frame import ModelConfig as PredictorConfig
from examples.next_frame import Predictor
from examples.video_model import RNNS, ModelConfig, VideoClassifier

from .modules import Stacked

pytestmark = pytest.mark.compiled  # of the layers' own code, which the backends share

B, T = 2, 3


class Functional(nn.Module):
    """A norm of a user's, in whose modules there is no GroupNorm."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels))

    def forward(self, x):
        return F.group_norm(x, 1, self.weight)


class OverChannels(nn.Module):
    """LayerNorm over the channels of each pixel, as ConvNeXt has it."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


NORMS = {
    "layer": "layer",
    "group": True,
    "GroupNorm": lambda channels: nn.GroupNorm(channels, channels),
    "Functional": Functional,
    "OverChannels": OverChannels,
}
LAYERS = {
    "ConvGRU1d": (lambda c, **kw: convrnn.ConvGRU1d(c, [4, 4], 3, norm=True, cell_norm="layer", **kw), (6,)),
    "ConvGRU": (lambda c, **kw: convrnn.ConvGRU(c, [4, 4], 3, norm="layer", residual=True, **kw), (5, 6)),
    "ConvGRU-cell_norm": (lambda c, **kw: convrnn.ConvGRU(c, 4, 3, cell_norm=True, bidirectional=True, **kw), (5, 6)),
    "ConvGRU3d": (lambda c, **kw: convrnn.ConvGRU3d(c, 4, 3, norm="group", cell_norm="layer", **kw), (3, 4, 5)),
    "ConvGRUCell": (lambda c, **kw: convrnn.ConvGRUCell(c, 4, 3, norm=Functional, cell_norm=Functional, **kw), (5, 6)),
    "SepConvGRUCell": (lambda c, **kw: convrnn.SepConvGRUCell(c, 4, 3, norm="layer", cell_norm=True, **kw), (5, 6)),
    "GRU_RCN": (lambda c, **kw: convrnn.GRU_RCN(c, 4, 3, **kw), (5, 6)),
    "StackedGRU_RCN": (lambda c, **kw: Stacked([c, c], [4, 4], 3, **kw), (5, 6)),
    "MinConv2dGRUCell": (lambda c, **kw: convrnn.MinConv2dGRUCell(c, 4, 3, padding=1, **kw), (5, 6)),
    "MinGRU": (lambda c, **kw: convrnn.MinGRU(c, [4, 4], norm=True, **kw), ()),
    "MinLSTM": (lambda c, **kw: convrnn.MinLSTM(c, [4, 4], norm="rms", bidirectional=True, **kw), ()),
    "MinConv1dGRU": (lambda c, **kw: convrnn.MinConv1dGRU(c, [4, 4], 3, paddings="same", norm=True, **kw), (6,)),
    "MinConv2dGRU": (lambda c, **kw: convrnn.MinConv2dGRU(c, [4, 4], 1, norm=True, residual=True, **kw), (5, 6)),
    "MinConv2dGRU-large": (
        lambda c, **kw: convrnn.MinConv2dGRU(c, 4, 3, paddings="same", norm="layer", **kw),
        (46, 46),
    ),
    "MinConv3dGRU": (lambda c, **kw: convrnn.MinConv3dGRU(c, [4, 4], 1, norm="layer", **kw), (3, 4, 5)),
    "Bidirectional": (
        lambda c, **kw: convrnn.Bidirectional(convrnn.MinConv2dGRU(c, 4, 3, norm=True, paddings=1, **kw)),
        (5, 6),
    ),
    **{
        f"MinConv2dGRU-{name}": (lambda c, norm=norm, **kw: convrnn.MinConv2dGRU(c, 4, 1, norm=norm, **kw), (5, 6))
        for name, norm in NORMS.items()
    },
}
KINDS = ["channels last", "slice", "one channel", "one pixel", "time first", "reversed"]


def strided(kind, channels, size):
    """A clip (B, T, channels, *size) whose strides are not those of contiguous frames."""
    if kind == "one pixel":
        size = (1,) * len(size)
    dims = len(size)
    last = torch.randn(B, T, *size, channels + (kind == "slice"))
    clip = last.movedim(-1, 2)[:, :, :channels]
    if kind == "time first":
        clip = clip.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "reversed":  # each dimension's stride larger than that of the one before
        clip = torch.randn(*reversed(size), channels, T, B).permute(*range(dims + 2, dims - 1, -1), *range(dims)[::-1])
    assert list(clip.shape) == [B, T, channels, *size]
    return clip


def results(rnn, x, wants=False):
    """Output, states and gradients of a step, the gradient of x among them where ``wants``."""
    leaves = [p for p in rnn.parameters() if p.requires_grad] + ([x.requires_grad_()] if wants else [])
    out, states = rnn(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    gradients = torch.autograd.grad((out.double() * weight).sum(), leaves, allow_unused=True)
    return [out, *(states if isinstance(states, list) else [states]), *gradients]


def check(found, expected, tolerance=1e-4):
    """Relative to the largest value, or to 1: where a norm reads one value, gradients are zero but for rounding."""
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.shape == b.shape
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp_min(1.0)


def contiguous(x, dtype):
    return torch.empty(x.shape, dtype=dtype).copy_(x)


@pytest.mark.parametrize("wants", [False, True], ids=["x alone", "x wants a gradient"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_any_strides(name, kind, wants):
    make, size = LAYERS[name]
    channels = 1 if kind == "one channel" else 4
    x = strided(kind, channels, size)
    rnn = make(channels)
    found = results(rnn, x.detach(), wants)
    check(found, results(copy.deepcopy(rnn).double(), contiguous(x, torch.float64), wants))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ConvGRU", "ConvGRU-cell_norm", "ConvGRU3d", "MinConv2dGRU", "MinConv3dGRU"])
def test_any_dtype(name, dtype):
    make, size = LAYERS[name]
    x = strided("channels last", 4, size).to(dtype)
    rnn = make(4, dtype=dtype)
    tolerance = {torch.float64: 1e-9, torch.bfloat16: 0.2, torch.float16: 0.02}[dtype]
    check(results(rnn, x), results(copy.deepcopy(rnn).double(), contiguous(x, torch.float64)), tolerance)


def test_frozen_convolutions_under_a_norm_that_learns():
    """Then what the norms within a cell read wants no gradient either, be it the input's or, channels last, the state's."""
    rnn = convrnn.ConvGRU(4, 4, 3, cell_norm="layer", bias=False).to(memory_format=torch.channels_last)
    for name, parameter in rnn.named_parameters():
        parameter.requires_grad_("norm" in name)
    x = strided("channels last", 4, (5, 6))
    found = results(rnn, x)
    assert len(found) == 8
    check(found, results(rnn.double().to(memory_format=torch.contiguous_format), contiguous(x, torch.float64)))


@pytest.mark.parametrize("rnn", RNNS)
def test_models_of_the_examples(rnn):
    frames = torch.randint(0, 256, (B, T, 32, 32, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    classifier, predictor = VideoClassifier(ModelConfig(3, rnn)), Predictor(PredictorConfig(rnn, 8, 2))
    for model, x in ((classifier, frames), (predictor, frames.float() / 255)):
        parameters, found = list(model.parameters()), []
        for clip in (x, x.contiguous()):
            torch.manual_seed(0)
            out = model(clip)
            out = out if isinstance(out, torch.Tensor) else out[0]
            found.append([out, *torch.autograd.grad(out.square().sum(), parameters)])
        check(*found)


GRAPHS = [
    (name, how)
    for name in ("ConvGRU", "ConvGRU3d", "MinConv2dGRU", "MinConv3dGRU")
    for how in ("script", "trace", "export", "aot_eager")
    if name.startswith("Min") or how != "script"
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("name", "how"), [*GRAPHS, ("MinConv2dGRU", "inductor")])
def test_graphs_of_contiguous_frames_take_others(name, how):
    make, size = LAYERS[name]
    rnn, x = make(4), strided("channels last", 4, size)
    example = x.clone(memory_format=torch.contiguous_format)
    if how == "script":
        torch.jit.save(torch.jit.script(rnn), buffer := io.BytesIO())
        graph = torch.jit.load(io.BytesIO(buffer.getvalue()))
    elif how == "trace":
        graph = torch.jit.trace(rnn, example, check_trace=False, strict=False)
    elif how == "export":
        graph = torch.export.export(rnn, (example,)).module()
    else:
        torch._dynamo.reset()
        graph = torch.compile(rnn, fullgraph=True, backend=how)
        graph(example)
    found = results(graph, x)
    check(found, results(rnn.double(), example.double()))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 6), (3, 1, 5, 6), (3, 4, 2, 3, 5), (0, 4, 5, 6)])
def test_contiguous_frames_are_read_as_they_are(shape):
    x = torch.randn(shape)
    assert norm_input(x) is x
    assert norm_input(x.half().to("meta")).device.type == "meta"
