"""ONNX: exported through convrnn.onnx, run in onnxruntime, for sizes other than those of the export."""

import pytest
import torch
from torch.export import Dim

import convrnn
import convrnn.onnx
from convrnn.info import OPS

from .modules import MODULES, SCRIPTABLE, WALKING, tensors
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


def export(module, inputs, shapes, path):
    torch._dynamo.reset()  # it compiles the scan's step, and gives up where it did so eight times
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=shapes)
    program = program.run_decompositions(convrnn.onnx.decomposition_table())
    model = torch.onnx.export(program, dynamo=True, verbose=False)
    assert {node.domain for node in model.model.graph} <= {"", "ai.onnx"}  # standard operators alone
    model.save(str(path))


# Every graph that differs: those of recompute without gradients and of ConvGRU's cells are GRU_RCN's, once or twice.
EXPORTED = [name for name in SCRIPTABLE if name != "GRU_RCN-recompute"]
EXPORTED += ["ConvGRU1d", "ConvGRU3d", "ConvGRU-walking"]


@pytest.mark.parametrize("name", EXPORTED)
def test_modules(name, tmp_path, device):
    module, x = MODULES[name].make()
    path = tmp_path / "module.onnx"
    fixed = (1, 2) if name in WALKING else (2,)
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


@pytest.mark.xfail(strict=True, raises=torch.onnx.OnnxExporterError, reason="torch.onnx knows no adaptive max pooling")
def test_pooling_between_levels():
    """What StackedGRU_RCN does where a level's maps are smaller than those of the level below."""
    torch.onnx.export(torch.nn.AdaptiveMaxPool2d(3), (torch.randn(1, 2, 7, 7),), dynamo=True, verbose=False)


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


@pytest.mark.parametrize("op", OPS)
def test_decompositions_are_the_ops(op, device):
    """In shape, dtype and value, with and without a state, with kernels of even sizes and in one dimension."""
    overload = getattr(torch.ops.convrnn, op).default
    samples = forward_samples(op, device)
    chosen = [samples[i] for i in (1, 2, 4, 5, 6, -2, -1)] if op == "gru_rcn" else [*samples[:2], *samples[5:]]
    for arguments in chosen:
        if op == "gru_rcn":
            arguments = (*(*arguments, None)[:6], False, *arguments[7:])
        found = convrnn.onnx.decomposition_table()[overload](*arguments)
        for a, b in zip(tensors(found), tensors(overload(*arguments)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_kept_activations_are_refused(device):
    arguments = forward_samples("gru_rcn", device)[0]
    with pytest.raises(ValueError, match=r"export under torch\.no_grad"):
        convrnn.onnx.decomposition_table()[torch.ops.convrnn.gru_rcn.default](*arguments)
