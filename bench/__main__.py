"""Times every op against plain PyTorch: ``python -m bench [--device cpu|cuda]``.

Each provider is checked against float64 before it is timed; a wrong one fails the run. Providers take turns, and the
median of their turns counts.
"""

import argparse
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from .cases import Case, all_cases

TOLERANCE = 1e-3  # the log-space form is no better
ROUNDS = 7
MIN_RUN_TIME_S = 0.02


def error(case: Case, provider: Callable[..., torch.Tensor]) -> float:
    """Largest error of the provider's output, relative to the largest true value."""
    expected = case.truth(*(x.cpu().double() for x in case.inputs))
    got = provider(*case.inputs)
    return ((got.detach().cpu().double() - expected).abs().max() / expected.abs().max()).item()


def forward(case: Case, provider: Callable[..., torch.Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return provider(*case.inputs)

    return run


def training(case: Case, provider: Callable[..., torch.Tensor]) -> Callable[[], object]:
    """Forward and backward, every gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs]
    upstream = torch.randn_like(provider(*leaves))
    return lambda: torch.autograd.grad(provider(*leaves), leaves, upstream)


def measure(tasks: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median time of each task in ms, the tasks taking turns."""
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for name, run in tasks.items()
    }
    for run in tasks.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.blocked_autorange(min_run_time=MIN_RUN_TIME_S).median * 1e3)
    return {name: statistics.median(samples) for name, samples in times.items()}


def processor() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    where = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}; fp32; median ms, and how many times the time of convrnn\n")
    print(f"{'case':<34} {'provider':<18} {'forward':>18} {'forward+backward':>22}")
    failed = False
    for case in all_cases(device):
        errors = {name: error(case, provider) for name, provider in case.providers.items()}
        wrong = {name for name, e in errors.items() if not e < TOLERANCE}
        right = {name: provider for name, provider in case.providers.items() if name not in wrong}
        fast = measure({name: forward(case, provider) for name, provider in right.items()})
        full = measure({name: training(case, provider) for name, provider in right.items()})
        for name in case.providers:
            if name in wrong:
                failed = True
                print(f"{case.name:<34} {name:<18} wrong: relative error {errors[name]:.1e}")
                continue
            cells = [
                f"{t[name]:9.2f} ({t[name] / t['convrnn']:5.1f}x)" if "convrnn" in t else f"{t[name]:9.2f}"
                for t in (fast, full)
            ]
            print(f"{case.name:<34} {name:<18} {cells[0]:>18} {cells[1]:>22}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
