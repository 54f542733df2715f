"""torch.compile: every module and public function whole, static and dynamic, in training and inference, alone and in models."""

import warnings

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import is_tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import convrnn
from convrnn.info import OPS

from .modules import FUSED, MODULES, loss, tensors
from .samples import backward_samples, forward_samples

pytestmark = [pytest.mark.compiled, pytest.mark.slow]

each_module = pytest.mark.parametrize("name", MODULES)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same(compiled, module, x, tolerance=1e-5):
    """Outputs, and where gradients are on every gradient, of the compiled module and the module."""
    results = []
    for f in (compiled, module):
        leaf = x.detach().requires_grad_(torch.is_grad_enabled())
        outputs = f(leaf)
        found = tensors(outputs)
        if torch.is_grad_enabled():
            found += torch.autograd.grad(loss(outputs), [leaf, *module.parameters()])
        results.append(found)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def resized(x, batch, steps, *size):
    return torch.randn(batch, steps, x.shape[2], *size[: x.dim() - 3], device=x.device)


@each_module
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_modules_are_one_graph(name, training, device):
    """fullgraph=True raises at a graph break; sizes are constants here, and a call with the state carried on follows."""
    module, x = MODULES[name].make(device)
    module.train(training)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.set_grad_enabled(training):
        assert_same(compiled, module, x)
        state = module(x)[1]
        for a, b in zip(tensors(compiled(x, state)), tensors(module(x, state)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["GRU_RCN", "MinConv2dGRU", "SepConvGRUCell"])
def test_explain_counts_one_graph(name, device):
    """What fullgraph=True says of all modules above, in the words that users ask for it with."""
    module, x = MODULES[name].make(device)
    explained = torch._dynamo.explain(module)(x)
    assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons


# Code takes long to generate, and these stand for the others: GRU_RCN for what is that op between two views,
# MinConv2dGRUCell for MinConv2dGRU, and training, whose forward is inference's with more outputs, for inference.
GENERATED = {"GRU_RCN", "MinGRU", "MinConv2dGRUCell", "Bidirectional-MinGRU", "ConvGRU1d"}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", FUSED)
def test_sizes_change_without_a_compilation(name, training, device):
    """One graph for any B, T, H and W; where a layer runs PyTorch's convolutions, for any B and T.

    Of those Inductor knows no symbolic H and W in training (it compiles for each), nor strided ones at all: see
    test_strided_convolutions_of_one_view.
    """
    convolutions = name.startswith("MinConv2d")
    module, x = MODULES[name].make(device)
    module.train(training)
    counter = CompileCounterWithBackend("inductor" if training and name in GENERATED else "aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=None if convolutions else True, backend=counter)
    counts = []
    with torch.set_grad_enabled(training):
        # at least 16 frames: PyTorch's fake convolution guards on that number
        for batch, steps, *size in ((4, 5, 7, 8, 6), (5, 9, 11, 12, 5), (7, 6, 9, 14, 7), (2, 17, 13, 10, 4)):
            assert_same(compiled, module, resized(x, batch, steps, *((7, 8) if convolutions else size)), 1e-4)
            counts.append(counter.frame_count)
    assert len(set(counts[1:] if convolutions else counts)) == 1, counts


@pytest.mark.parametrize("name", ["GRU_RCN", "MinGRU", "MinConv2dGRU", "Bidirectional-GRU_RCN", "ConvGRU"])
def test_default_dynamic_mode_compiles_twice_at_most(name, device):
    """dynamic=None: once for the first length, once more for all others."""
    module, x = MODULES[name].make(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for steps in (6, 7, 9, 12, 31):
        assert_same(compiled, module, resized(x, 3, steps, 7, 8))
    assert counter.frame_count <= 3


@pytest.mark.xfail(strict=True, raises=torch._inductor.exc.InductorError, reason="pytorch/pytorch#172204")
def test_a_view_kept_for_backward(device):
    """Inductor sorts the symbolic strides of a view that backward keeps. No layer of ours takes part."""
    weight = torch.randn(3, 2, 3, 3, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: F.conv2d(x.flatten(0, 1), weight), dynamic=True)
    compiled(torch.randn(4, 5, 2, 7, 9, device=device)).sum().backward()


@pytest.mark.xfail(strict=True, raises=torch._inductor.exc.InductorError, reason="ValueRangeError in a stride's range")
def test_strided_convolutions_of_one_view(device):
    """The sum of two strided convolutions of symbolic frames, one of them reshaped: no layer of ours takes part."""
    weights = [torch.randn(4, 2, 3, 3, device=device, requires_grad=True) for _ in range(2)]

    def f(x):
        frames = x.flatten(0, 1)
        first, second = (F.conv2d(frames, weight, stride=2, padding=1) for weight in weights)
        return (first.unflatten(0, x.shape[:2]).cumsum(1).flatten(0, 1) + second).unflatten(0, x.shape[:2])

    with torch._functorch.config.patch(recompute_views=True):  # past the failure of the test above
        torch.compile(f, dynamic=True)(torch.randn(4, 5, 2, 7, 9, device=device)).sum().backward()


class Network(nn.Module):
    """Convolutions and norms frame by frame around recurrent layers, and a head on each frame."""

    def __init__(self, device):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())
        self.gru = MODULES["GRU_RCN"].build()
        self.bridge = nn.Sequential(nn.Conv2d(4, 2, 1), nn.GroupNorm(1, 2))
        self.mingru = MODULES["MinConv2dGRUCell"].build()
        self.neck = nn.Sequential(nn.Conv2d(4, 5, 3, stride=2), nn.GroupNorm(1, 5), nn.GELU())
        self.head = nn.Linear(5, 7)
        self.to(device)

    def forward(self, x):
        frames = self.stem(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        out, _ = self.gru(frames)
        out, _ = self.mingru(self.bridge(out.flatten(0, 1)).unflatten(0, x.shape[:2]))
        features = self.neck(out.flatten(0, 1)).mean((-2, -1)).unflatten(0, x.shape[:2])
        return self.head(features)


def test_inside_a_larger_model(device):
    network = Network(device).eval()  # batch norm's statistics would move between the two calls
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for batch, steps in ((4, 5), (5, 6), (6, 9)):  # at least 16 frames, as above
        assert_same(compiled, network, torch.randn(batch, steps, 3, 12, 13, device=device), 1e-4)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", ["GRU_RCN", "MinConv2dGRUCell"])
def test_reduce_overhead_carries_a_state(name, device):
    """Under CUDA graphs an output lives until the next step's replay: what is carried on is cloned."""
    module, x = MODULES[name].make(device)
    step = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad(), warnings.catch_warnings():
        expected = module(x)[0]
        state, frames = module.init_hidden_state(x), []
        for t in range(x.shape[1]):
            torch.compiler.cudagraph_mark_step_begin()
            frame, state = step(x[:, t : t + 1], state)
            frames.append(frame.clone())
            state = state.clone() if isinstance(state, torch.Tensor) else [s.clone() for s in state]
        torch.testing.assert_close(torch.cat(frames, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_cuda_traces_to_opaque_calls(op):
    """Fake CUDA tensors, forward and backward: the graph that a compiler is given holds our op and nothing of its inside.

    Each op is traced on its own: a build without CUDA has no autograd thread for the device.
    """
    for name, samples in ((op, forward_samples), (f"{op}_backward", backward_samples)):
        f = getattr(torch.ops.convrnn, name)
        for arguments in samples(op, "cpu"):
            expected = tensors(f(*arguments))
            with FakeTensorMode():
                fakes = [
                    torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda") if is_tensor(a) else a
                    for a in arguments
                ]
                graph = make_fx(lambda *moved, f=f: f(*moved))(*fakes).graph
                found = tensors(f(*fakes))
            assert [(y.shape, y.stride(), y.device.type) for y in found] == [
                (y.shape, y.stride(), "cuda") for y in expected
            ]
            calls = [
                str(node.target) for node in graph.nodes if node.op == "call_function" and "getitem" not in node.name
            ]
            assert calls == [f"convrnn.{name}.default"]


FUNCTIONS = {
    "mingru_gate_hidden": lambda x: convrnn.mingru_gate_hidden(x, x + 1, x[:, :1] * 2),
    "mingru": lambda x: convrnn.mingru(x)[0],
    "mingru-masks": lambda x: convrnn.mingru(x, None, x.flatten(2)[:, :, 0] > 0.5, x.flatten(2)[:, :, 1] < 0)[0],
    "parallel_scan_log": lambda x: convrnn.parallel_scan_log(x[:, 1:], x),
    "gru_rcn": lambda x: convrnn.gru_rcn(x, None, *(torch.ones(s, device=x.device) / 9 for s in WEIGHTS))[0],
}
WEIGHTS = (9, 4, 3, 3), (6, 3, 3, 3), (3, 3, 3, 3)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_one_graph(name, dynamic, device):
    """In inference and in training, at two sizes."""
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 5, 4, 7, 8), (5, 9, 4, 11, 6)):
        x = torch.rand(shape, device=device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), FUNCTIONS[name](x))
        results = [(f(leaf), leaf) for f in (compiled, FUNCTIONS[name]) for leaf in [x.clone().requires_grad_()]]
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaf) for y, leaf in results))


def test_functions_of_states(device):
    """convrnn.state inside of a graph: a step that restarts, reorders, resizes and detaches what it carries."""
    rnn = convrnn.ConvGRU(2, 4, 3, device=device)

    def step(x, h, rows, order):
        h = convrnn.state.reset(h, rows, rnn.init_hidden_state(x))
        out, h = rnn.step(x, convrnn.state.reorder(h, order))
        return out, convrnn.state.resize(convrnn.state.detach(h), 2, 0.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (3, 5):
        x = torch.randn(batch, 2, 6, 7, device=device)
        h = [torch.randn_like(state) for state in rnn.init_hidden_state(x)]
        arguments = x, h, torch.arange(batch, device=device) % 2 == 0, torch.randperm(batch, device=device)
        torch.testing.assert_close(compiled(*arguments), step(*arguments))


def test_functions_inside_generated_code(device):
    """All in one graph, fused with operations before, between and after, at sizes that change."""
    counter = CompileCounterWithBackend("inductor")

    def f(x):
        x = (x * 2).tanh()
        return torch.cat([function(x).sigmoid().sum((-1, -2)).flatten() for function in FUNCTIONS.values()])

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((3, 5, 4, 7, 8), (5, 9, 4, 11, 6)):
        x = torch.randn(shape, device=device, requires_grad=True)
        torch.testing.assert_close(compiled(x), f(x), rtol=1e-4, atol=1e-4)
        (a,), (b,) = (torch.autograd.grad(y(x).square().sum(), x) for y in (compiled, f))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
