"""Measures one case: correctness first, then time by turns, and memory."""

import copy
import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .case import Case, Problem
from .providers import Provider, Run

Task = Callable[[], object]
Key = tuple[str, str]  # provider, pass

GRAPH = " in a CUDA graph"

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
BLOCK_S = 0.01  # a turn lasts at least this long
SLOW_MS = 100  # a call that takes longer has one turn in a sweep


def parameters(run: Run) -> dict[str, Tensor]:
    return dict(run.named_parameters()) if isinstance(run, nn.Module) else {}


def leaves(problem: Problem) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in problem.inputs]


def upstream(out: Tensor) -> Tensor:
    """A gradient for the output, the same one for all providers of a case."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator).to(out.device, out.dtype)


def results_of(run: Run, inputs: list[Tensor], training: bool) -> dict[str, Tensor]:
    """The output and, in training, every gradient, by name."""
    with torch.set_grad_enabled(training):
        out = run(*inputs)
    found = {"output": out}
    if training:
        names = [f"input {i}" for i in range(len(inputs))] + list(parameters(run))
        found |= zip(names, torch.autograd.grad(out, [*inputs, *parameters(run).values()], upstream(out)), strict=True)
    return {name: x.detach().cpu() for name, x in found.items()}


def truth(run: Run, problem: Problem, training: bool) -> dict[str, Tensor]:
    exact = copy.deepcopy(run).double().cpu() if isinstance(run, nn.Module) else run
    return results_of(exact, [x.cpu().double().requires_grad_(training) for x in problem.inputs], training)


def truths(problem: Problem, training: bool) -> Callable[[Provider], dict[str, Tensor]]:
    """The float64 results that a provider must give: the case's, made once, unless it brings its own."""
    shared = truth(problem.truth, problem, training)
    return lambda provider: shared if provider.truth is None else truth(provider.truth, problem, training)


def error(case: Case, problem: Problem, provider: Provider, expected: dict[str, Tensor]) -> float:
    """Worst error of the output and, where training is measured, of the gradients, relative to each one's maximum."""
    training = "step" in case.passes
    got = results_of(provider.run, leaves(problem) if training else problem.inputs, training)
    return max(_error(x, expected[key]) for key, x in got.items())


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape or not got.isfinite().all():
        return float("inf")
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def tolerance(case: Case, provider: Provider) -> float:
    return max(TOLERANCE[case.dtype], provider.tolerance)


def task(what: str, provider: Provider, problem: Problem) -> Task:
    """A pass of a provider as a call without arguments."""
    run, weights = provider.run, list(parameters(provider.run).values())
    if what == "forward":
        return torch.inference_mode()(lambda: run(*problem.inputs))
    if what == "stream":
        x, state, *rest = problem.inputs

        @torch.inference_mode()
        def stream() -> None:
            nonlocal state
            state = run(x, state, *rest)

        return stream
    inputs = leaves(problem)
    if what == "backward":
        out = run(*inputs)
        gradient = upstream(out)
        return lambda: torch.autograd.grad(out, [*inputs, *weights], gradient, retain_graph=True)
    gradient: Tensor | None = None  # made in the first call, whose output has its shape

    def forward() -> Tensor:
        nonlocal gradient
        out = run(*inputs)
        if gradient is None:
            gradient = upstream(out)
        return out

    if not weights:
        return lambda: torch.autograd.grad(forward(), inputs, gradient)
    run = copy.deepcopy(run)  # the optimizer writes to its weights, and with that would end the graph of "backward"
    optimizer = torch.optim.AdamW(  # does its work and moves nothing
        run.parameters(), lr=0.0, weight_decay=0.0, capturable=weights[0].is_cuda
    )

    def step() -> None:
        forward().backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        for x in inputs:
            x.grad = None

    return step


def by_turns(tasks: dict[Key, Task], rounds: int, device: torch.device) -> dict[Key, list[float]]:
    """Milliseconds a call of each task in each round, the tasks taking turns, each round starting with another one."""
    samples: dict[Key, list[float]] = {key: [] for key in tasks}
    order = list(tasks)
    for number in range(rounds):
        for key in order:
            if number == 0 or samples[key][0] < SLOW_MS:
                samples[key].append(clock(tasks[key], device, graph=key[0].endswith(GRAPH)))
        order = order[1:] + order[:1]
    return samples


def clock(task: Task, device: torch.device, graph: bool) -> float:
    """Milliseconds a call, the median over a turn."""
    if device.type == "cuda":
        from triton import testing

        if graph:
            return testing.do_bench_cudagraph(task, rep=20, return_mode="median")
        return testing.do_bench(task, warmup=5, rep=20, return_mode="median")
    timer = Timer("task()", globals={"task": task}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=BLOCK_S).median * 1e3


def kept_bytes(provider: Provider, problem: Problem) -> int:
    """What autograd keeps between forward and backward, beside inputs and parameters; a storage counts once."""
    inputs = leaves(problem)
    known = {x.untyped_storage().data_ptr() for x in [*inputs, *parameters(provider.run).values()]}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = provider.run(*inputs)  # alive until the sum: a freed address could be another tensor's
        total = sum(sizes.values())
    del out
    return total


def peak_bytes(step: Task, device: torch.device) -> int | None:
    """Memory that a training step adds at its peak: device memory, or what this process has resident (Linux)."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # gives the allocator's free memory back, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _resident(status, "VmRSS")
    step()
    return max(0, _resident(status, "VmHWM") - before)


def _resident(status: Path, name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1])
