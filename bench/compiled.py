"""Compile every Triton launch of a call for one GPU architecture, on a machine that has none, and read the result.

    with compiling(90) as launches:
        mingru_fwd(torch.empty(2, 8, 64))
    assert launches[0].spills == 0

Inside the context the project's own launchers run on CPU tensors; Triton derives the specialisation of each launch from
its true arguments (alignment, None) and compiles it, and nothing is executed: outputs keep whatever they held. Tensors
on the meta device do as well, at sizes that no memory holds.
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
AMD = "gfx942"

_BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_AMD_WIDTHS = {"u8": 8, "i8": 8, "ubyte": 8, "byte": 8, "sbyte": 8, "u16": 16, "b16": 16, "ushort": 16, "short": 16}
_AMD_WIDTHS |= {"dword": 32, "b32": 32, "dwordx2": 64, "b64": 64, "dwordx3": 96, "b96": 96, "dwordx4": 128, "b128": 128}

# What one multiprocessor has (CUDA's programming guide, "Technical specifications per compute capability").
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
PROGRAMS_PER_SM = 32
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
SHARED_RESERVED = 1 << 10  # by the driver, for each program
REGISTER_UNIT = 256  # of a warp are allocated together


@dataclasses.dataclass(frozen=True)
class Launch:
    """One compiled launch. Bytes and counts are those of the machine code, not of a run."""

    kernel: str
    arch: int | str
    grid: tuple[int, ...]
    warps: int  # per program
    registers: int  # per thread
    stack: int  # bytes per thread
    local: int  # bytes per thread
    shared: int  # bytes per program
    loads: Counter[int]  # global loads by width in bits, those into shared memory among them
    stores: Counter[int]  # global stores by width in bits
    spills: int  # instructions on local memory (LDL, STL)
    barriers: int
    asm: dict[str, str]  # ttir, ptx and sass, or amdgcn

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

    @property
    def low_precision(self) -> list[str]:
        """TTIR lines that compute in 16 bits: kernels convert what they load to float32 first."""
        arithmetic = re.compile(r"(arith\.(add|sub|mul|div|rem|max\w*|min\w*)f|math\.\w+) .*(x|: )b?f16>?( loc|$)")
        return [line.strip() for line in self.asm["ttir"].splitlines() if arithmetic.search(line)]

    @property
    def programs_per_sm(self) -> int:
        """How many programs of this launch one multiprocessor holds: the least of what registers, warps, shared memory
        and the hardware's own limit allow."""
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = REGISTERS_PER_SM // per_warp // self.warps
        by_shared = SHARED_PER_SM[self.arch] // (self.shared + SHARED_RESERVED)
        return min(by_registers, WARPS_PER_SM // self.warps, by_shared, PROGRAMS_PER_SM)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's 64 warps (2,048 threads) that this launch can keep there."""
        return self.programs_per_sm * self.warps / WARPS_PER_SM


class _CompileOnlyDriver:
    """The part of Triton's driver that compiling asks for."""

    def __init__(self, arch: int | str) -> None:
        self.target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # Triton keys its kernels in memory by device: one key for each architecture, and none that a real device has.
        return f"compile only, {self.target.backend} {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling(arch: int | str) -> Iterator[list[Launch]]:
    """Compile for ``sm_<arch>``, or for an AMD architecture by its name, instead of launching; the list receives one
    record per launch, in order."""
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


def _read(kernel, arch: int | str, grid: tuple[int, ...]) -> Launch:
    code = _read_nvidia(kernel.asm["cubin"]) if isinstance(arch, int) else _read_amd(kernel.asm["amdgcn"])
    texts = {name: kernel.asm[name] for name in ("ttir", "ptx", "amdgcn") if name in kernel.asm}
    return Launch(
        kernel=kernel.metadata.name,
        arch=arch,
        grid=grid,
        warps=kernel.metadata.num_warps,
        shared=kernel.metadata.shared,
        **{**code, "asm": {**texts, **code["asm"]}},
    )


def _read_nvidia(cubin: bytes) -> dict:
    usage, sass = _disassemble(cubin)
    loads, stores, others = _count(sass)
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "loads": loads,
        "stores": stores,
        "spills": others["LDL"] + others["STL"],
        "barriers": others["BAR"],
        "asm": {"sass": sass},
    }


def _read_amd(code: str) -> dict:
    """The same of AMD's assembly, where local memory is called scratch and is the stack."""
    usage = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for what, suffix in re.findall(r"^\s+(?:global|buffer|flat)_(load|store)_(\w+)", code, re.MULTILINE):
        widths[what][next((_AMD_WIDTHS[part] for part in suffix.split("_") if part in _AMD_WIDTHS), 32)] += 1
    return {
        "registers": usage["vgpr_count"],
        "stack": usage["private_segment_fixed_size"],
        "local": 0,
        "loads": widths["load"],
        "stores": widths["store"],
        "spills": usage["vgpr_spill_count"] + usage["sgpr_spill_count"],
        "barriers": len(re.findall(r"^\s+s_barrier", code, re.MULTILINE)),
        "asm": {},
    }


@functools.cache
def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and machine code; cached by the code itself, because a time loop launches it again and again."""

    def tool(name: str, *args: str) -> str:
        return subprocess.run([_BIN / name, *args], check=True, capture_output=True, text=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        # its dataflow analysis, a quarter of its time, follows branches to their targets: nothing here asks for them
        sass = tool("nvdisasm", "-c", "--no-dataflow", file.name)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}, sass


def _count(sass: str) -> tuple[Counter[int], Counter[int], Counter[str]]:
    """Global loads and stores by width in bits, and every other instruction by name."""
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    others: Counter[str] = Counter()
    for name, suffixes in re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([.\w]*)", sass):
        if name in ("LDG", "LDGSTS", "STG"):
            width = next((_WIDTHS[part] for part in suffixes.split(".") if part in _WIDTHS), 32)
            (stores if name == "STG" else loads)[width] += 1
        else:
            others[name] += 1
    return loads, stores, others
