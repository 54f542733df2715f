"""What a CUDA device adds: graphs, streams, a second device, TF32, and the same bits from run to run.

`make test-gpu` runs these where they mean something. On the CPU the same bodies run with what stands in for a device's
part (a graph's replay is a second call), so that they are known to work before a device is at hand.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import convrnn
from convrnn import reference

from .compare import TOLERANCE, assert_close
from .differentiable import CASES, Case

pytestmark = pytest.mark.compiled


def with_small_recurrent_weights(f: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Sums over 32 channels stay as small as those over 8, so that an error does not grow from step to step."""
    return lambda x, h0, W, U, C, bias: tuple(f(x, h0, W, U / 10, C / 10, bias))


OPS = {
    "mingru": CASES["mingru-h0"]._replace(shapes=((2, 9, 64, 5, 4), (2, 32, 5, 4))),
    "mingru-chunks": CASES["mingru-h0"]._replace(shapes=((2, 130, 12), (2, 6))),
    "log_scan": CASES["log_scan"]._replace(shapes=((2, 9, 40), (2, 10, 40))),
    "log_scan-chunks": CASES["log_scan"]._replace(shapes=((2, 130, 6), (2, 131, 6))),
    "gru_gates": CASES["gru_gates"]._replace(shapes=((2, 16, 5), (2, 16, 5), (2, 8, 5))),
    "gru_update": CASES["gru_update"]._replace(shapes=((2, 8, 5),) * 4),
    "gru_rcn": CASES["gru_rcn-h0-bias"]._replace(
        shapes=((2, 4, 3, 6, 5), (2, 8, 6, 5), (24, 3, 3, 3), (16, 8, 3, 3), (8, 8, 3, 3), (24,))
    ),
    "gru_rcn-masks": CASES["gru_rcn-projection-masks"]._replace(
        shapes=((2, 3, 24, 6, 5), (2, 8, 6, 5), (16, 8, 3, 3), (8, 8, 3, 3))
    ),
    # With TF32, which it needs, a step is two implicit GEMMs at this size.
    "gru_rcn-gemm": Case(
        with_small_recurrent_weights(convrnn.gru_rcn),
        with_small_recurrent_weights(reference.gru_rcn),
        ((2, 4, 3, 6, 5), (2, 32, 6, 5), (96, 3, 3, 3), (64, 32, 3, 3), (32, 32, 3, 3), (96,)),
    ),
}
MODULES: dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...]]] = {
    "MinGRU": (lambda device: convrnn.MinGRU(6, [8, 4], norm=True, residual=True, device=device), (2, 130, 6)),
    "MinConv2dGRU": (lambda device: convrnn.MinConv2dGRU(3, [8, 4], 3, paddings=1, device=device), (2, 5, 3, 6, 5)),
    "GRU_RCN": (lambda device: convrnn.GRU_RCN(3, 8, 3, bias=True, device=device), (2, 4, 3, 6, 5)),
}


def float32_inputs(case: Case, device: str, seed: int = 0) -> list[Tensor]:
    return [x.requires_grad_() for x in case.inputs(device, torch.float32, seed)]


def forward_and_backward(f: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of the sum of their squares."""
    outputs = f(*inputs)
    gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs)
    return [*(y.detach() for y in outputs), *gradients]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=False)


def deterministic(name: str) -> contextlib.AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=name == "gru_rcn-gemm")


@contextlib.contextmanager
def side_stream(device: str) -> Iterator[None]:
    """A stream that is not the current one, on which work already waits; synchronised at the end."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles, some 30 ms: what runs on another stream comes before what follows here
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(f: Callable[[], list[Tensor]], device: str) -> tuple[list[Tensor], Callable[[], object]]:
    """The static results of ``f`` in a CUDA graph, and its replay; kernels are compiled before the capture."""
    with side_stream(device):
        f()
    if device == "cpu":
        results = f()
        return results, lambda: [x.copy_(y) for x, y in zip(results, f(), strict=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = f()
    return results, graph.replay


@pytest.mark.parametrize("name", OPS)
def test_cuda_graph_of_forward_and_backward(name: str, device: str) -> None:
    """Captured once, replayed on other values in the same memory: what an eager call gives for these."""
    case = OPS[name]
    inputs = float32_inputs(case, device)
    with deterministic(name):
        results, replay = captured(lambda: forward_and_backward(case.ours, inputs), device)
        for seed in (1, 2):
            others = float32_inputs(case, device, seed)
            with torch.no_grad():
                for x, other in zip(inputs, others, strict=True):
                    x.copy_(other)
            replay()
            assert_equal(results, forward_and_backward(case.ours, others))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_compile_reduce_overhead(name: str, device: str) -> None:
    """Generated code in CUDA graphs, forward and backward, gives what the module gives, call after call."""
    torch._dynamo.reset()
    build, shape = MODULES[name]
    module = build(device)
    # The mode is the code generator's. Of these modules' code for the CPU, test_compile.py generates that of MinGRU and
    # GRU_RCN, in training.
    options = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
    compiled = torch.compile(module, fullgraph=True, **options)

    def step(f: nn.Module, x: Tensor) -> list[Tensor]:
        outputs = torch.utils._pytree.tree_leaves(f(x))
        leaves = [x, *module.parameters()]
        gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves)
        return [y.detach().clone() for y in (*outputs, *gradients)]

    for _ in range(4):  # a warm-up, a capture, replays
        x = torch.randn(shape, device=device, requires_grad=True)
        torch.compiler.cudagraph_mark_step_begin()
        for i, (a, b) in enumerate(zip(step(compiled, x), step(module, x), strict=True)):
            assert_close(f"result {i}", a, b.cpu().double(), 4 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", OPS)
def test_side_stream(name: str, device: str) -> None:
    """Kernels run on the current stream: after the inputs were written there, and no earlier."""
    case = OPS[name]
    written = float32_inputs(case, device)
    with deterministic(name):
        expected = forward_and_backward(case.ours, written)
        inputs = [torch.full_like(x, torch.nan).requires_grad_() for x in written]
        with side_stream(device):
            with torch.no_grad():
                for x, values in zip(inputs, written, strict=True):
                    x.copy_(values)
            results = forward_and_backward(case.ours, inputs)
    assert_equal(results, expected)


@pytest.mark.parametrize("name", OPS)
def test_device_that_is_not_the_current_one(name: str, device: str) -> None:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device is present, this takes two")
    other = "cuda:1" if device == "cuda" else device
    case = OPS[name]
    results = forward_and_backward(case.ours, float32_inputs(case, other))
    assert {x.device for x in results} == {torch.device(other)}
    expected = forward_and_backward(case.ours, float32_inputs(case, device))
    for i, (x, y) in enumerate(zip(results, expected, strict=True)):  # the devices may be of two kinds
        assert_close(f"result {i}", x, y.cpu().double(), 2 * TOLERANCE[torch.float32])


@pytest.mark.parametrize("tf32", (False, True), ids=("ieee", "tf32"))
@pytest.mark.parametrize("name", OPS)
def test_tf32_is_for_convolutions_alone(name: str, tf32: bool, device: str) -> None:
    """float32 with TF32 off is float32; on, it rounds what a convolution multiplies to 10 bits, and nothing else."""
    case = OPS[name]
    inputs = float32_inputs(case, device)
    truth = [x.detach().cpu().double().requires_grad_() for x in inputs]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        results = forward_and_backward(case.ours, inputs)
    rounds = tf32 and device == "cuda" and name.startswith("gru_rcn")
    tolerance = 2e-2 if rounds else 10 * TOLERANCE[torch.float32]
    for i, (x, y) in enumerate(zip(results, forward_and_backward(case.reference, truth), strict=True)):
        assert_close(f"result {i}", x, y, tolerance)


@pytest.mark.parametrize("name", OPS)
def test_the_same_bits_from_run_to_run(name: str, device: str) -> None:
    """Also where the allocator hands out memory that holds other values."""
    case = OPS[name]
    inputs = float32_inputs(case, device)
    with deterministic(name):
        expected = forward_and_backward(case.ours, inputs)
        for value in (torch.nan, 1e30):
            freed = [torch.full_like(x, value) for x in (*expected, *expected) for _ in range(3)]
            del freed
            assert_equal(forward_and_backward(case.ours, inputs), expected)
