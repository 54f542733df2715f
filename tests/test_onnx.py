"""ONNX: exported through convrnn.onnx, run in onnxruntime, for sizes other than those of the export."""

import pytest
import torch
from torch.export import Dim

import convrnn
import convrnn.onnx
from convrnn.info import OPS

from .modules import MODULES, WALKING, tensors
from .samples import forward_samples

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path))
    names = [given.name for given in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))]


@torch.no_grad()  # with gradients on, every scan is traced backward too, by run_decompositions and by the exporter
def export(module, inputs, shapes, path):
    torch._dynamo.reset()  # it compiles the scan's step, and gives up where it did so eight times
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    program = program.run_decompositions(convrnn.onnx.decomposition_table())
    model = torch.onnx.export(program, dynamo=True, verbose=False)
    assert {node.domain for node in model.model.graph} <= {"", "ai.onnx"}  # standard operators alone
    model.save(str(path))


# Every graph that differs: those of recompute without gradients and of ConvGRU's cells are GRU_RCN's, once or twice, and
# those of minGRU's cells a layer of the others.
EXPORTED = ["GRU_RCN", "MinGRU", "MinConv2dGRU", "Bidirectional-GRU_RCN", "Bidirectional-MinGRU"]
EXPORTED += ["ConvGRU1d", "ConvGRU3d", "ConvGRU-walking", "SepConvGRUCell", "StackedGRU_RCN"]


@pytest.mark.parametrize("name", EXPORTED)
def test_modules(name, tmp_path, device):
    module, x = MODULES[name].make()
    path = tmp_path / "module.onnx"
    fixed = (2, 3, 4) if name == "StackedGRU_RCN" else (1, 2) if name in WALKING else (2,)
    export(module, (x,), ({dim: Dim.AUTO for dim in range(x.dim()) if dim not in fixed},), path)
    larger = torch.randn([n if dim in fixed else n + 3 + dim for dim, n in enumerate(x.shape)])
    for y in (x, larger):
        for a, b in zip(run(path, y), tensors(module(y)), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


class Masked(torch.nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths, reset):
        return self.rnn(x, lengths=lengths, reset=reset)


@pytest.mark.parametrize("name", ["MinGRU", "GRU_RCN"])
def test_lengths_and_resets(name, tmp_path, device):
    module, x = MODULES[name].make()
    module, path = Masked(module), tmp_path / "masked.onnx"
    lengths, reset = torch.tensor([5, 2, 0]), torch.rand(x.shape[:2]) < 0.4
    export(module, (x, lengths, reset), ({1: Dim.AUTO}, None, {1: Dim.AUTO}), path)
    dirty = torch.cat((x, torch.full_like(x[:, :2], torch.nan)), 1), lengths, torch.cat((reset, ~reset[:, :2]), 1)
    for given in ((x, lengths, ~reset), dirty):
        for a, b in zip(run(path, *given), tensors(module(*given)), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


class OneSize(torch.nn.Module):
    """StackedGRU_RCN of maps of one size, which it does not pool."""

    def __init__(self):
        super().__init__()
        self.rnn = convrnn.StackedGRU_RCN([2, 2], [4, 6], 3)

    def forward(self, x):
        return self.rnn([x, x.flip(-1)])


def test_levels_of_one_size(tmp_path, device):
    """All sizes dynamic but the channels."""
    module, path = OneSize(), tmp_path / "module.onnx"
    export(module, (torch.randn(3, 2, 2, 7, 8),), ({0: Dim.AUTO, 1: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO},), path)
    x = torch.randn(2, 5, 2, 9, 6)
    for a, b in zip(run(path, x), tensors(module(x)), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.xfail(strict=True, raises=torch.onnx.OnnxExporterError, reason="torch.onnx knows no adaptive max pooling")
def test_pooling_without_our_table():
    """Why convrnn.onnx decomposes it: StackedGRU_RCN pools to the size of the level above."""
    torch.onnx.export(torch.nn.AdaptiveMaxPool2d(3), (torch.randn(1, 2, 7, 7),), dynamo=True, verbose=False)


@pytest.mark.parametrize("sizes", [((7, 8), (4, 4)), ((6, 9), (3, 3)), ((5, 3), (5, 7)), ((7, 5), (1, 1))], ids=str)
def test_adaptive_pooling_is_pytorchs(sizes):
    """Values and places, of windows that overlap, differ in length or are one pixel."""
    size, output = sizes
    pool = torch.ops.aten.adaptive_max_pool2d.default
    x = torch.randn(2, 3, *size)
    for a, b in zip(convrnn.onnx.decomposition_table()[pool](x, output), pool(x, output), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", ["GRU_RCN", "MinGRU"])
def test_a_stream(name, tmp_path, device):
    """Frame by frame, the state carried by the caller."""
    module, x = MODULES[name].make()
    state = module.init_hidden_state(x)
    path = tmp_path / "step.onnx"
    export(module, (x[:, :1].contiguous(), state), None, path)
    frames, states = [], [s.clone() for s in tensors(state)]
    for t in range(x.shape[1]):
        frame, *states = run(path, x[:, t : t + 1].contiguous(), *states)
        frames.append(frame)
    torch.testing.assert_close(torch.cat(frames, 1), module(x)[0].detach(), rtol=1e-4, atol=1e-5)


def loop(combine, first, sequences, dim):
    """What scan computes, without the compilation that it does at each call; the tests above run scan itself."""
    outputs, state = [], first
    for t in range(sequences[0].shape[dim]):
        state, out = combine(state, tuple(x.select(dim, t) for x in sequences))
        outputs.append(out)
    return state, torch.stack(outputs, dim)


@pytest.mark.parametrize("op", OPS)
def test_decompositions_are_the_ops(op, device, monkeypatch):
    """In shape, dtype and value, with and without a state, with kernels of even sizes and in one dimension."""
    monkeypatch.setattr(convrnn.onnx, "scan", loop)
    overload = getattr(torch.ops.convrnn, op).default
    for arguments in forward_samples(op, device):
        if op == "gru_rcn":
            arguments = (*(*arguments, None)[:6], False, *arguments[7:])
        found = convrnn.onnx.decomposition_table()[overload](*arguments)
        for a, b in zip(tensors(found), tensors(overload(*arguments)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_kept_activations_are_refused(device):
    arguments = forward_samples("gru_rcn", device)[0]
    with pytest.raises(ValueError, match=r"export under torch\.no_grad"):
        convrnn.onnx.decomposition_table()[torch.ops.convrnn.gru_rcn.default](*arguments)
