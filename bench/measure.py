"""Measures one case: correctness first, then time by turns, and memory."""

import copy
import ctypes
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .case import Case, Problem
from .providers import Provider, Run

Task = Callable[[], object]
Result = TypeVar("Result")
Key = tuple[str, str]  # provider, pass

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
BLOCK_S = 0.01  # a turn lasts at least this long
SLOW_MS = 40  # a call that takes longer has one turn in a sweep


def parameters(run: Run) -> dict[str, Tensor]:
    run = getattr(run, "_orig_mod", run)  # a compiled module's own, by their own names
    return dict(run.named_parameters()) if isinstance(run, nn.Module) else {}


def leaves(problem: Problem) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in problem.inputs]


def outputs(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def upstream(outs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """A gradient for each output, the same numbers for all providers of a case: those that ``dtype`` can hold."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(out.shape, generator=generator).to(dtype).to(out.device, out.dtype) for out in outs]


def results_of(
    run: Run, inputs: list[Tensor], dtype: torch.dtype, training: bool, graph: bool = False
) -> dict[str, Tensor]:
    """The outputs and, in training, every gradient, by name; with ``graph`` what replaying a CUDA graph leaves."""
    weights, gradients = parameters(run), []

    def compute() -> list[Tensor]:
        with torch.inference_mode(not training):
            outs = outputs(run(*inputs))
        if not training:
            return outs
        if not gradients:
            gradients.extend(upstream(outs, dtype))
        return [*outs, *torch.autograd.grad(outs, [*inputs, *weights.values()], gradients)]

    if graph:
        replay, found = captured(compute)
        with torch.inference_mode():
            for x in found:
                x.fill_(math.nan)  # what capturing left there is no result of the graph's
        replay()
    else:
        found = compute()
    sources = [*(f"input {i}" for i in range(len(inputs))), *weights] if training else []
    names = [*(f"output {i}" for i in range(len(found) - len(sources))), *sources]
    return {name: x.detach().cpu() for name, x in zip(names, found, strict=True)}


def captured(compute: Callable[[], Result]) -> tuple[Task, Result]:
    """A call as a CUDA graph: what replays it, and the result that each replay writes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and makes what is made once
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()
    return graph.replay, result


def truth(run: Run, problem: Problem, training: bool) -> dict[str, Tensor]:
    exact = copy.deepcopy(run).double().cpu() if isinstance(run, nn.Module) else run
    inputs = [x.cpu().double().requires_grad_(training) for x in problem.inputs]
    return results_of(exact, inputs, problem.inputs[0].dtype, training)


def truths(problem: Problem, training: bool) -> Callable[[Provider], dict[str, Tensor]]:
    """The float64 results that a provider must give: the case's, made once, unless it brings its own."""
    shared = truth(problem.truth, problem, training)
    return lambda provider: shared if provider.truth is None else truth(provider.truth, problem, training)


def error(case: Case, problem: Problem, provider: Provider, expected: dict[str, Tensor], graph: bool = False) -> float:
    """Worst error of the outputs and, where training is measured, of the gradients, relative to each one's maximum.

    The outputs of inference count too, where that is timed: it may run other code than training. ``graph``: as CUDA
    graphs compute it.
    """
    found = []
    if "step" in case.passes:
        found.append(results_of(provider.run, leaves(problem), case.dtype, training=True, graph=graph))
        if found[0].keys() != expected.keys():
            return math.inf
    if set(case.passes) - {"backward", "step"}:
        found.append(results_of(provider.run, problem.inputs, case.dtype, training=False, graph=graph))
    return max(_error(x, expected[key]) for results in found for key, x in results.items())


def _error(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return math.inf
    difference, scale = (got.double() - expected).abs().max().item(), expected.abs().max().item()
    if not math.isfinite(difference) or not math.isfinite(scale):
        return math.inf
    return difference / scale if scale else math.inf if difference else 0.0


def complaint(error: float, case: Case, provider: Provider) -> str:
    """What is wrong with a result of that error; "" if nothing is."""
    limit = max(TOLERANCE[case.dtype], provider.tolerance)
    return "" if error <= limit else f"relative error {error:.1e}, allowed {limit:.0e}"


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
            found = run(x, state, *rest)
            # A graph goes on reading where it read when it was captured.
            capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
            state = state.copy_(found) if capturing else found

        return stream
    inputs = leaves(problem)
    if what == "backward":
        outs = outputs(run(*inputs))
        gradients = upstream(outs, inputs[0].dtype)
        return lambda: torch.autograd.grad(outs, [*inputs, *weights], gradients, retain_graph=True)
    gradients = []  # made in the first call, whose outputs have their shapes

    def forward() -> list[Tensor]:
        outs = outputs(run(*inputs))
        if not gradients:
            gradients.extend(upstream(outs, inputs[0].dtype))
        return outs

    if not weights:
        return lambda: torch.autograd.grad(forward(), inputs, gradients)
    run = copy.deepcopy(run)  # the optimizer writes to its weights, and with that would end the graph of "backward"
    for module in run.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # what copying undoes, cuDNN would do anew in every call
    optimizer = torch.optim.AdamW(  # does its work and moves nothing
        run.parameters(), lr=0.0, weight_decay=0.0, capturable=weights[0].is_cuda
    )

    def step() -> None:
        torch.autograd.backward(forward(), gradients)
        optimizer.step()
        optimizer.zero_grad()
        for x in inputs:
            x.grad = None

    return step


def by_turns(tasks: dict[Key, Task], rounds: int, first: int, device: torch.device) -> dict[Key, list[float]]:
    """What ``clock`` gives for each task in each round, the tasks taking turns; a round starts one task later than the one
    before, the first round with task ``first``.

    A round before that counts for nothing but each task's rough duration: until each has run beside the others the
    allocator takes fresh pages.
    """
    lasts = {key: _seconds(task) for key, task in tasks.items()}
    turns: dict[Key, list[float]] = {key: [] for key in tasks}
    order = list(tasks)
    order = order[first % len(order) :] + order[: first % len(order)]
    for number in range(rounds):
        for key in order:
            if number == 0 or turns[key][0] < SLOW_MS:
                turns[key].append(clock(tasks[key], device, lasts[key]))
        order = order[1:] + order[:1]
    return turns


def clock(task: Task, device: torch.device, lasts: float = math.inf) -> float:
    """Milliseconds a call, the median of one turn's, however many fit; short calls are timed in blocks.

    A call of a block's length or more is a turn by itself, of which a timer would first make another to find that out; not
    one that was known to take less, its ``lasts`` in seconds, and was held up.
    """
    if device.type == "cuda":
        from triton import testing

        return testing.do_bench(task, warmup=5, rep=20, return_mode="median")
    once = _seconds(task)
    if min(once, lasts) >= BLOCK_S:
        return once * 1e3
    timer = Timer("task()", globals={"task": task}, num_threads=torch.get_num_threads())
    return statistics.median(timer.blocked_autorange(min_run_time=BLOCK_S).times) * 1e3


def _seconds(task: Task) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


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
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (os.access(status, os.R_OK) and os.access(reset, os.W_OK) and "VmHWM" in status.read_text()):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # gives glibc's free memory back, so that using it again counts
    reset.write_text("5")  # resets VmHWM
    before = _resident(status, "VmRSS")
    step()
    return max(0, _resident(status, "VmHWM") - before)


def _resident(status: Path, name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1])
