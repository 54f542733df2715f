"""Compile every Triton launch of a call for one GPU architecture, on a machine that has none, and read the result.

    with compiling(90) as launches:
        mingru_fwd(torch.empty(2, 8, 64))
    assert launches[0].spills == 0

Inside the context the project's own launchers run on CPU tensors; Triton derives the specialisation of each launch from
its true arguments (alignment, None) and compiles it, and nothing is executed: outputs keep whatever they held.
"""

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHS = (80, 90, 100)

_BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One compiled launch. Bytes and counts are those of the machine code, not of a run."""

    kernel: str
    arch: int
    grid: tuple[int, ...]
    registers: int  # per thread
    stack: int  # bytes per thread
    local: int  # bytes per thread
    shared: int  # bytes per program
    loads: Counter[int]  # global loads by width in bits
    stores: Counter[int]  # global stores by width in bits
    spills: int  # instructions on local memory (LDL, STL)
    barriers: int
    asm: dict[str, str]  # ttir, ptx, sass

    @property
    def wide_share(self) -> float:
        """Share of the global accesses that move at least 128 bits."""
        widths = self.loads + self.stores
        return sum(n for width, n in widths.items() if width >= 128) / max(widths.total(), 1)

    @property
    def narrow_offsets(self) -> list[str]:
        """TTIR lines where an element offset could wrap: 32-bit pointer offsets and 32-bit multiplications."""
        addptr = re.compile(r"tt\.addptr .*, (tensor<\d+x)?i32>?( loc|$)")
        product = re.compile(r"arith\.muli .*: (tensor<\d+x)?i32>?( loc|$)")
        return [line.strip() for line in self.asm["ttir"].splitlines() if addptr.search(line) or product.search(line)]


class _CompileOnlyDriver:
    """The part of Triton's driver that compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keys its kernels in memory by device: one key for each architecture, and none that a real device has.
        return f"compile only, sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Launch]]:
    """Compile for ``sm_<arch>`` instead of launching; the list receives one record per launch, in order."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1: run these tests in a process without it")
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(_read(kernel, arch, tuple(grid)))
        return kernel

    before = driver._active  # not the property, which would look for a device
    driver.set_active(_CompileOnlyDriver(arch))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield launches
    finally:
        driver.set_active(before)


def _read(kernel, arch: int, grid: tuple[int, ...]) -> Launch:
    usage, sass = _disassemble(kernel.asm["cubin"])
    loads, stores, others = _count(sass)
    return Launch(
        kernel=kernel.metadata.name,
        arch=arch,
        grid=grid,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=kernel.metadata.shared,
        loads=loads,
        stores=stores,
        spills=others["LDL"] + others["STL"],
        barriers=others["BAR"],
        asm={"ttir": kernel.asm["ttir"], "ptx": kernel.asm["ptx"], "sass": sass},
    )


@functools.cache
def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code; cached by the code itself, because a time loop launches it again and again."""

    def tool(name: str, *args: str) -> str:
        return subprocess.run([_BIN / name, *args], check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = tool("nvdisasm", "-c", file.name)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}, sass


def _count(sass: str) -> tuple[Counter[int], Counter[int], Counter[str]]:
    """Global loads and stores by width in bits, and every other instruction by name."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    others: Counter[str] = Counter()
    for name, suffixes in re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([.\w]*)", sass):
        if name in ("LDG", "STG"):
            width = next((_WIDTHS[part] for part in suffixes.split(".") if part in _WIDTHS), 32)
            (loads if name == "LDG" else stores)[width] += 1
        else:
            others[name] += 1
    return loads, stores, others


def check(launches: list[Launch], aligned: bool = True, barriers: int = 0, registers: int = 128) -> None:
    """What every shipped launch must satisfy: nothing spilled, wide accesses, 64-bit offsets, no barriers."""
    assert launches
    for launch in launches:
        assert launch.stack == launch.local == launch.spills == 0, launch.kernel
        assert launch.barriers <= barriers, launch.kernel
        assert launch.registers <= registers, launch.kernel
        assert not launch.narrow_offsets, launch.kernel
        if aligned:
            assert launch.wide_share == 1, f"{launch.kernel}: {launch.loads}, {launch.stores}"
