"""The machine: what it is, and what it reaches at best, measured."""

import argparse
import ctypes
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[1]
COPY_BYTES = 256 << 20  # past every cache


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt


def device(text: str) -> str:
    """A command line's device: one that is there."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this PyTorch finds no CUDA device (python -m convrnn.info says why)")
    return text


def thread_count(text: str) -> int:
    """A command line's number of threads: not more than there are processors to run them."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not text.isdecimal() or not 1 <= int(text) <= available:
        raise argparse.ArgumentTypeError(f"expected 1 to {available}, the processors of this machine, got {text}")
    return int(text)


def prepare(threads: int, fresh: bool = False) -> None:
    """Uses so many threads, on as many processors, so that they are not moved about, and float32 as it is, not tf32; keeps what is
    freed for the next call, or with ``fresh`` takes all large memory anew."""
    take_fresh_pages() if fresh else keep_memory()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0), key=rank)[:threads])
    torch.set_num_threads(threads)


def keep_memory() -> None:
    """Has glibc keep what is freed for the next call, whatever its size, as jemalloc and tcmalloc do.

    By itself it gives large blocks back and takes fresh pages for the next tensor, or does not, as the calls before
    decide. On a virtual machine a page can take longer to get than to compute: that would be all one measures.
    """
    if has_mallopt():
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)


def take_fresh_pages() -> None:
    """Has glibc ask the system for every block of 128 KB or more, and give it back when freed: the other extreme."""
    if has_mallopt():
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)


def has_mallopt() -> bool:
    return hasattr(ctypes.CDLL(None), "mallopt")


def rank(processor: int) -> tuple[int, int]:
    """Sorts the first hardware thread of every core before any second one (Linux)."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/core_cpus_list")
    first = int(re.match(r"\d+", siblings.read_text())[0]) if siblings.exists() else processor
    return processor - first, processor


def stamp(device: torch.device) -> dict[str, Any]:
    """What a reader must know to place a figure: machine, versions, commit, threads, date."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "kernels": kernels(device),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "numpy": version("numpy"),
        "peers": {name: version(name) for name in ("accelerated-scan", "minGRU-pytorch", "mingru-scans")},
        "convrnn": version("convrnn"),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def kernels(device: torch.device) -> str:
    """Those that run: Triton's, interpreted where they are chosen for the CPU, or the instruction set of the C++ ones."""
    if device.type == "cuda":
        return "Triton"
    if os.environ.get("CONVRNN_BACKEND") in ("triton", "ptx"):
        return "Triton, interpreted or executed without a GPU"
    return torch.ops.convrnn.cpu_isa().partition(":")[0]


def processor() -> str:
    """Name, family and model, as Linux knows them: cloud machines hide the rest of the name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    entries = [line.partition(":") for line in info.read_text().split("\n\n")[0].splitlines()]
    values = {key.strip(): value.strip() for key, _, value in entries}
    name = values.get("model name", platform.machine())
    return f"{name} (family {values['cpu family']}, model {values['model']})" if "cpu family" in values else name


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of this checkout, with + if files that it tracks were changed; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", "kernels", "convrnn", "bench/*.py", "setup.py"
        )
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peaks(device: torch.device, dtypes: set[torch.dtype]) -> dict[str, float]:
    """Copy bandwidth in GB/s, read and written, and for each dtype the GFLOP/s of the best library product found."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * COPY_BYTES / seconds(lambda: target.copy_(source), device) / 1e9}
    rates: list[float] = []
    for dtype in sorted(dtypes | {torch.float32}, key=lambda dtype: -dtype.itemsize):
        # Where 16-bit products are slower than float32's, arithmetic on such tensors is float32's.
        found[str(dtype).removeprefix("torch.")] = max(rates := [*rates, *products(device, dtype)])
    return found


def products(device: torch.device, dtype: torch.dtype) -> list[float]:
    """GFLOP/s of a matrix product and of a convolution that should run at the machine's peak."""
    # Large enough for the peak; without hardware for it a CPU takes seconds for a large 16-bit product.
    size = 4096 if device.type == "cuda" else 1024 if dtype == torch.float32 else 256
    a = torch.randn(size, size, device=device).to(dtype)
    x = torch.randn(size // 128, 128, 28, 28, device=device).to(dtype)
    weight = torch.randn(128, 128, 3, 3, device=device).to(dtype)
    tasks: list[tuple[int, Callable[[], object]]] = [
        (2 * size**3, lambda: a @ a),
        (2 * x.numel() * 9 * 128, lambda: F.conv2d(x, weight, padding=1)),
    ]
    return [flop / seconds(task, device) / 1e9 for flop, task in tasks]


@torch.inference_mode()
def seconds(task: Callable[[], object], device: torch.device) -> float:
    """The best of a few calls: a peak is what nothing disturbed."""
    task()
    timer = Timer("task()", globals={"task": task}, num_threads=torch.get_num_threads())
    return min(timer.blocked_autorange(min_run_time=0.05).times)
