"""What is installed, what runs on this machine and why: ``python -m convrnn.info [--json]``.

Ends with status 1 when a self-test fails.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .ops._library import BACKEND, GRU_STEP, LIBRARY

OPS = ("mingru", "log_scan", "gru_gates", "gru_update", "gru_rcn")
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta", "autograd": "Autograd", "autocast": "AutocastCPU"}
TOLERANCE = 1e-5  # relative, fp32 against fp64


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _triton() -> str:
    if find_spec("triton") is None:
        return "absent: not installed (PyTorch's CUDA builds for Linux bring it; pip install triton)"
    if BACKEND == "triton":
        return f"{_version('triton')}, interpreted for CPU tensors (CONVRNN_BACKEND=triton)"
    if BACKEND == "ptx":
        return (
            f"{_version('triton')}, compiled for CPU tensors too (CONVRNN_BACKEND=ptx), if a driver for them is there"
        )
    return f"{_version('triton')}, used for CUDA tensors"


def _gpu() -> str:
    if torch.cuda.is_available():
        names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return ", ".join(names)
    if torch.version.cuda is None:
        return f"absent: this PyTorch ({torch.__version__}) is built without CUDA"
    return f"absent: PyTorch {torch.__version__} is built for CUDA {torch.version.cuda} but finds no usable device"


def _registered() -> dict[str, list[str]]:
    """The keys of DISPATCH_KEYS that each op, forward and backward, has a kernel for."""
    names = [name for op in OPS for name in (op, f"{op}_backward")]
    return {
        name: [
            label
            for label, key in DISPATCH_KEYS.items()
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"convrnn::{name}", key)
            or (label == "meta" and torch._library.simple_registry.singleton.find(f"convrnn::{name}").fake_impl.kernel)
        ]
        for name in names
    }


Case = tuple[Callable[..., Any], Callable[..., Any], Sequence[Tensor]]


def _cases() -> dict[str, Case]:
    """For each op: ours, the reference, and inputs of odd sizes."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def log_scan(log_a: Tensor, log_b: Tensor) -> Tensor:
        log_x: Tensor = torch.ops.convrnn.log_scan(log_a, log_b)
        return log_x

    state, gate = randn(2, 5, 3, 7), randn(2, 10, 3, 7)
    weights = randn(15, 3, 3, 3) / 5, randn(10, 5, 3, 3) / 5, randn(5, 5, 3, 3) / 5
    return {
        "mingru": (ops.mingru, reference.mingru, (randn(2, 9, 10, 3, 7), state)),
        "log_scan": (log_scan, reference.log_scan, (randn(2, 9, 35), randn(2, 10, 35))),
        "gru_gates": (ops.gru_gates, reference.gru_gates, (gate, randn(2, 10, 3, 7), state)),
        "gru_update": (ops.gru_update, reference.gru_update, (state, randn(2, 5, 3, 7), state.sigmoid(), state)),
        "gru_rcn": (ops.gru_rcn, reference.gru_rcn, (randn(2, 4, 3, 3, 7), state, *weights)),
    }


def _outputs_and_gradients(f: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = f(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((output.double().square().sum() for output in outputs), torch.zeros((), dtype=torch.float64))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def self_test(device: str) -> dict[str, float | str]:
    """The largest error of each op's fp32 outputs and gradients on ``device``, relative to the fp64 reference.

    What an op raises stands in place of its error: on a machine where one is broken, the report is about the others too.
    """
    errors: dict[str, float | str] = {}
    for name, (ours, truth, inputs) in _cases().items():
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # else cuDNN rounds to 10 bits
                got = _outputs_and_gradients(ours, [x.to(device) for x in inputs])
        except (RuntimeError, ImportError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
            continue
        expected = _outputs_and_gradients(truth, [x.double() for x in inputs])
        errors[name] = max(
            ((a.detach().cpu().double() - b.detach()).abs().max() / b.detach().abs().max()).item()
            for a, b in zip(got, expected, strict=True)
        )
    return errors


def collect() -> dict[str, Any]:
    """Everything this command reports, as plain data."""
    chosen, _, available = torch.ops.convrnn.cpu_isa().partition(":")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "convrnn": _version("convrnn"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "library": str(LIBRARY),
        "backend": BACKEND,
        "gru_step": GRU_STEP,
        "isa": chosen,
        "isa_available": available.split(","),
        "threads": torch.get_num_threads(),
        "triton": _triton(),
        "gpu": _gpu(),
        "ops": _registered(),
        "self_test": {device: self_test(device) for device in devices},
    }


def _passed(error: float | str) -> bool:
    return isinstance(error, float) and error < TOLERANCE  # which NaN is not


def _failures(report: dict[str, Any]) -> list[str]:
    return [
        f"{op} on {device}"
        for device, errors in report["self_test"].items()
        for op, error in errors.items()
        if not _passed(error)
    ]


def _print(report: dict[str, Any]) -> None:
    for key in ("convrnn", "torch", "python", "platform", "library", "backend", "gru_step", "threads", "triton", "gpu"):
        print(f"{key:<10} {report[key]}")
    print(
        f"{'cpu isa':<10} {report['isa']} (this machine has {', '.join(report['isa_available'])}; CONVRNN_ISA forces one)"
    )
    print("\nop                    kernels")
    for op, keys in report["ops"].items():
        print(f"{op:<21} {' '.join(keys)}")
    print("\nself-test: largest relative error of fp32 outputs and gradients against the fp64 reference")
    for device, errors in report["self_test"].items():
        for op, error in errors.items():
            shown = f"{error:.1e}" if isinstance(error, float) else error
            print(f"{op:<12} {device:<5} {shown}  {'ok' if _passed(error) else 'FAILED'}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m convrnn.info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    as_json = parser.parse_args(argv).json
    report = collect()
    failures = _failures(report)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    if failures:
        print(f"self-test failed: {', '.join(failures)}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
