"""Loads the C++ library (schemas and CPU kernels) and registers the Python side of the ops.

The environment variable CONVRNN_BACKEND chooses which kernels CPU tensors reach:

* unset or ``auto``: the C++ kernels;
* ``triton``: the Triton kernels, in Triton's interpreter. Slow, and exact enough to test the GPU's code path - launchers,
  ops, autograd, modules - on a machine without a GPU;
* ``ptx``: the Triton kernels, compiled, on whatever driver Triton was given. The tests give it one that executes the
  machine code on CPU tensors (``tests/harness/ptx``); there is none besides.

CUDA tensors always reach the Triton kernels.

CONVRNN_GRU_STEP chooses how the Triton kernels compute a step of GRU-RCN (``kernels/gru_step.py``):

* unset or ``cudnn``: the library's convolutions and the kernels of the gates;
* ``gemm``: convolution and gates in one kernel, wherever that can be: 3x3 kernels on 2-D frames of 16-bit tensors, or of
  float32 ones where cuDNN's convolutions may use TF32;
* ``auto``: by sizes, where that should win on paper. It was not measured on a GPU, and so is not the default.
"""

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ._check import autocast_is_on

BACKENDS = ("auto", "triton", "ptx")
GRU_STEPS = ("cudnn", "gemm", "auto")


def _find_library() -> Path:
    folder = Path(__file__).resolve().parents[1]
    found = sorted(folder.glob("_C*.so"))
    # convrnn.kernels is mapped from kernels/ by the installer: it is missing where only the library was built
    if not found or importlib.util.find_spec("convrnn.kernels") is None:
        raise ImportError(
            f"{'convrnn.kernels' if found else 'the C++ library'} is missing from {folder}: install with "
            "`pip install --no-build-isolation -e .` in the source tree"
        )
    return found[0]


def _setting(name: str, values: tuple[str, ...]) -> str:
    """The value of an environment variable, the first of ``values`` where it is unset or empty."""
    value = os.environ.get(name, "") or values[0]
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}")
    return value


def _choose_backend() -> str:
    backend = _setting("CONVRNN_BACKEND", BACKENDS)
    if backend != "auto" and importlib.util.find_spec("triton") is None:
        raise ImportError(f"CONVRNN_BACKEND={backend} needs Triton, which is not installed: pip install triton")
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when its own functions are defined.
        if "triton" in sys.modules:
            raise ImportError(
                "CONVRNN_BACKEND=triton runs Triton's interpreter: set TRITON_INTERPRET=1 or import convrnn before triton"
            )
        os.environ["TRITON_INTERPRET"] = "1"
    return backend


LIBRARY = _find_library()
BACKEND = _choose_backend()
TRITON_ON_CPU = BACKEND != "auto"
GRU_STEP = _setting("CONVRNN_GRU_STEP", GRU_STEPS)
torch.ops.load_library(str(LIBRARY))
# Reads CONVRNN_ISA: a wrong value is an error at import, not at the first call.
torch.ops.convrnn.cpu_isa()

_registrations = torch.library.Library("convrnn", "IMPL")
_autocast_kernels: dict[str, Callable[..., Any]] = {}


def register_triton(op: str, kernel: Callable[..., Any]) -> None:
    """Registers the function that calls the Triton launcher of ``op`` for CUDA tensors (and see CONVRNN_BACKEND)."""
    _registrations.impl(op, kernel, "CUDA")
    if TRITON_ON_CPU:
        with warnings.catch_warnings():
            # Replacing the C++ kernel is the purpose.
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            _registrations.impl(op, kernel, "CPU")


def register_autocast(op: str, kernel: Callable[..., Any]) -> None:
    """Registers ``kernel(device_type, *args)`` to run in place of ``op`` where autocast is on."""

    def on(device_type: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: kernel(device_type, *args, **kwargs)

    _autocast_kernels[op] = kernel
    _registrations.impl(op, on("cuda"), "AutocastCUDA")
    _registrations.impl(op, on("cpu"), "AutocastCPU")


def autocast_kernel(op: str, inputs: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The kernel that autocast would run in place of ``op`` on these inputs, if it is on."""
    kernel = _autocast_kernels.get(op)
    if kernel is None:
        return None
    device_type = next(x.device.type for x in inputs if isinstance(x, torch.Tensor))
    return functools.partial(kernel, device_type) if autocast_is_on(device_type) else None


def register_kernel(op: str, kernel: Callable[..., Any], key: str, with_keyset: bool = False) -> None:
    """Registers ``kernel`` for ``op`` at a dispatch key."""
    _registrations.impl(op, kernel, key, with_keyset=with_keyset)
