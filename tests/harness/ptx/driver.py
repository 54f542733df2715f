"""Sends every Triton launch of a process to the executor: ``CONVRNN_BACKEND=ptx``.

    install()
    with recorded() as launches:
        h, h_n = mingru_fwd(gate_hidden)  # CPU tensors
    assert launches[0].loaded == gate_hidden.nbytes

Triton sees a device whose binary is PTX: its own compiler for CUDA, without the assembler, and a driver that runs the text.
Launchers, specialisation and caches are those that a GPU would have.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import triton.backends
from torch import device as TorchDevice
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from ..fresh import nan_in_fresh_memory
from . import Counts, Machine, assemble
from .machine import Program

NAME = "ptx"
SHARED_MEMORY = 163 << 10  # bytes that a program may have, on sm_80


class Backend(CUDABackend):
    """Triton's compiler for NVIDIA, up to PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == NAME

    def hash(self) -> str:
        """Part of the names of cached kernels: Triton's own have a binary, these do not."""
        return f"{NAME}-{super().hash()}"

    def add_stages(self, stages: dict, options: object, language: object) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one launch did."""

    program: Program
    grid: int
    counts: Counts
    distinct_loaded: int  # bytes, each address once
    distinct_stored: int

    @property
    def kernel(self) -> str:
        return self.program.kernel.name

    @property
    def loaded(self) -> int:
        return self.counts.loaded

    @property
    def stored(self) -> int:
        return self.counts.stored

    @property
    def instructions(self) -> Counter[str]:
        """Executed, in threads, by kind."""
        found: Counter[str] = Counter()
        for step, times in zip(self.program.steps, self.counts.executed, strict=True):
            found[step.kind] += int(times)
        return found


@dataclasses.dataclass
class Settings:
    """Of all launches.

    Attributes:
        arch: compute capability that code is compiled for; 90 where no wgmma is involved.
        seed: of what approximate instructions return.
        detailed: whether sectors and wavefronts are counted.
        launches: a list that receives each launch.
        rewrite: changes the text of a kernel before it runs, for tests that plant a fault in it.
    """

    arch: int = 80
    seed: int = 0
    detailed: bool = False
    launches: list[Launch] | None = None
    rewrite: Callable[[str], str] = str


settings = Settings()


class _Launcher:
    """Called by Triton with all arguments of a launch, in the order of its signature."""

    def __init__(self, src: object, metadata: object) -> None:
        self.names = [name for name, kind in src.signature.items()]
        self.taken = [kind != "constexpr" for kind in src.signature.values()]
        self.shared = metadata.shared

    def __call__(self, x, y, z, stream, text, packed, launch_metadata, enter_hook, exit_hook, *arguments) -> None:
        program = assemble(settings.rewrite(text))
        if (y, z) != (1, 1):
            raise NotImplementedError(f"a grid of {x} x {y} x {z}: only one axis is executed")
        given = [
            (name, argument) for name, argument, taken in zip(self.names, arguments, self.taken, strict=True) if taken
        ]
        # behind them Triton's own scratch memory, which no kernel of ours asks for
        given += [("scratch", 0)] * (len(program.kernel.parameters) - len(given))
        names, values = zip(*given, strict=True)
        execute(program, x, list(names), list(values), self.shared)


def execute(program: Program, grid: int, names: list[str], arguments: list, shared: int = 0) -> Launch | None:
    """Run a program on tensors and ints; raises Fault. Nothing happens on a grid of no programs."""
    if grid == 0:
        return None
    machine = Machine(program, grid, arguments, names, shared, settings.seed, settings.detailed)
    counts = machine.run()
    if settings.launches is None:
        return None
    launch = Launch(program, grid, counts, *machine.memory.distinct_bytes)
    settings.launches.append(launch)
    return launch


class Driver:
    """What Triton asks of a device."""

    launcher_cls = _Launcher

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda name, text, shared, device: (name, text.decode(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(NAME, settings.arch, 32)

    def get_current_device(self) -> str:
        return f"{NAME} {settings.arch}"  # the key of Triton's kernels in memory

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> TorchDevice:
        return TorchDevice("cpu")

    @staticmethod
    def is_active() -> bool:
        return False  # installed by name, never found


def install() -> None:
    """From now on launches of this process are executed here."""
    triton.backends.backends[NAME] = triton.backends.Backend(compiler=Backend, driver=Driver)
    driver.set_active(Driver())


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """The same for a while."""
    before = driver._active  # not the property, which would look for a device
    install()
    try:
        yield
    finally:
        driver.set_active(before)


@contextlib.contextmanager
def using(**changes: object) -> Iterator[None]:
    """Other settings for a while."""
    before = {name: getattr(settings, name) for name in changes}
    for name, value in changes.items():
        setattr(settings, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


@contextlib.contextmanager
def recorded(detailed: bool = False) -> Iterator[list[Launch]]:
    """A list that receives what each launch did, in order."""
    launches: list[Launch] = []
    with using(launches=launches, detailed=detailed):
        yield launches


@contextlib.contextmanager
def executed(seed: int = 0) -> Iterator[list[Launch]]:
    """The same, with another seed, and NaN in fresh memory (``torch.empty`` and its kin)."""
    with recorded() as launches, using(seed=seed), nan_in_fresh_memory():
        yield launches
