"""What every Triton launch compiles to, does when it is executed, and the least time that its bytes take, without a GPU:
``make kernel-report``.

Prints four tables and writes ``bench/results/kernels.json`` and a picture of the bytes moved. Registers, spills, shared
memory, barriers and access widths are read from machine code compiled for each architecture; bytes and FLOP are those of
``bench/kernels.py``, which the tests count; what was executed is ``bench/executed.py``'s. Floors are bytes over the memory bandwidth of data sheets: nothing is timed.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table

from . import machine
from .case import OURS
from .pictures import BLUE, GREY, ORANGE, PINK, STYLE, WIDTH, save
from .readme import DEVICES

if TYPE_CHECKING:
    from .executed import Executed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RESULTS = machine.ROOT / "bench" / "results"
CHUNKED = f"{OURS}, T in chunks"
LEGEND = (
    "Triples: sm_80 / sm_90 / sm_100. Registers: of a thread, of the variant that takes most. Occupancy: share of 64 warps "
    "of a multiprocessor, min(65,536 / (registers x 32, in units of 256, x warps), 64 / warps, shared memory / (a "
    "program's + 1 KB), 32) programs x warps / 64, with 164 KB of shared memory on sm_80 and 228 KB on the others. 128 bits: "
    "share of the load and store instructions of at least that width. Bytes and FLOP: of a lane and step, as declared in "
    "bench/kernels.py and counted by the tests; exp, log and quotients count as one, and what a kernel moves once for a lane, or "
    "for a chunk of T (maps, carries), is left out. Reduce, carries and replay: of a scan whose T is cut in chunks. Kernels that "
    "convolve are shown without what their weights and their products take; the floors have both."
)
FLOORS = (
    "FLOORS, not measurements: bytes moved over the memory bandwidth of the makers' data sheets (GB/s: "
    + ", ".join(f"{name} {rates[0]}" for name, rates in DEVICES.items())
    + "). The time of convolutions is not in them, nor that of launches, some 3 to 5 us each outside a CUDA graph. Launches "
    "of a call: kernels + convolutions + other PyTorch ops, whose bytes are included; a step: of GRU-RCN. float16 is as bfloat16."
)


@dataclass(frozen=True)
class Code:
    """One kernel of a launcher, compiled for one dtype and architecture; of several variants, the worst."""

    launcher: str
    kernel: str
    dtype: str
    arch: int
    variants: int
    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    occupancy: float
    wide_share: float
    barriers: int
    bytes_per_element: int | None  # of a lane and step
    flop_per_element: int | None


@dataclass(frozen=True)
class Floor:
    """One call of a launcher at a real shape."""

    launcher: str
    dtype: str
    shape: tuple[int, ...]
    kernels: dict[str, int]  # launches by name
    convolutions: int
    other_ops: int
    launches_per_step: float | None  # of GRU-RCN, which walks over time outside its kernels
    kernel_bytes: int | None
    other_bytes: int
    flop: int | None
    floor_us: dict[str, float]  # by device


@dataclass(frozen=True)
class Moved:
    """Bytes that a call moves for each lane and step, outside convolutions."""

    launcher: str
    form: str
    dtype: str
    shape: tuple[int, ...]
    bytes_per_element: float


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compile_all(archs: Sequence[int]) -> list[Code]:
    """Every launcher at its real shapes, for every dtype and architecture."""
    from .compiled import Launch, compiling
    from .kernels import OPS, phases

    rows = []
    for launcher, op in OPS.items():
        for dtype in DTYPES:
            for arch in archs:
                variants: dict[str, dict[str, Launch]] = {}
                for shape in op.shapes:
                    with compiling(arch) as launches:
                        op.run(shape, dtype, "meta")
                    for name, launch in zip(phases([launch.kernel for launch in launches]), launches, strict=True):
                        variants.setdefault(name, {})[launch.asm["sass"]] = launch
                e, s = op.sizes(dtype)
                for kernel, codes in variants.items():
                    found, declared = codes.values(), op.declared.get(kernel)
                    rows.append(
                        Code(
                            launcher=launcher,
                            kernel=kernel,
                            dtype=name_of(dtype),
                            arch=arch,
                            variants=len(codes),
                            **{
                                name: max(getattr(launch, name) for launch in found)
                                for name in ("registers", "stack", "spills", "shared", "warps", "barriers")
                            },
                            occupancy=min(launch.occupancy for launch in found),
                            wide_share=min(launch.wide_share for launch in found),
                            bytes_per_element=sum(declared.step(e, s)) if declared else None,
                            flop_per_element=declared.flop if declared else None,
                        )
                    )
    return rows


def count_all(arch: int) -> tuple[list[Floor], list[Moved]]:
    """What every launcher launches and moves at its real shapes, and what plain PyTorch moves at the first of them where
    T is whole."""
    from .compiled import compiling
    from .kernels import OPS, Eager, eager, phases

    floors, moved = [], []
    for launcher, op in OPS.items():
        for dtype in DTYPES:
            shown = set()
            for shape in op.shapes:
                with compiling(arch) as launches, Eager() as around:
                    op.run(shape, dtype, "meta")
                kernels = Counter(phases([launch.kernel for launch in launches]))
                work = op.work(shape, dtype, kernels)
                total = None if work is None else work[0] + work[1] + around.bytes
                lanes, steps = op.extent(shape)
                per_step = (len(launches) + around.convolutions + around.ops) / steps
                walks = steps > 1 and len(launches) >= steps
                floors.append(
                    Floor(
                        launcher=launcher,
                        dtype=name_of(dtype),
                        shape=shape,
                        kernels=dict(kernels),
                        convolutions=around.convolutions,
                        other_ops=around.ops,
                        launches_per_step=per_step if walks else None,
                        kernel_bytes=None if work is None else work[0] + work[1],
                        other_bytes=around.bytes,
                        flop=None if work is None else work[2],
                        floor_us={} if total is None else {n: total / rate[0] / 1e3 for n, rate in DEVICES.items()},
                    )
                )
                ours = OURS if op.chunks(shape, dtype) == 1 else CHUNKED
                if ours not in shown and op.plain and not op.convolves:  # plain PyTorch's convolutions are not counted
                    shown.add(ours)
                    forms = {} if total is None else {ours: total}
                    if ours == OURS:
                        forms |= {form: eager(op, shape, dtype, plain).bytes for form, plain in op.plain.items()}
                    moved += [
                        Moved(launcher, form, name_of(dtype), shape, count / lanes / steps)
                        for form, count in forms.items()
                    ]
    return floors, moved


def show(codes: list[Code], floors: list[Floor], moved: list[Moved], console: Console) -> None:
    table = Table(title="Machine code", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("launcher", "kernel", "dtype"):
        table.add_column(name, no_wrap=True)
    heads = ("registers", "stack", "spills", "shared", "barriers", "warps", "occupancy", "128 bits")
    for name in (*heads, "variants", "bytes", "FLOP"):
        table.add_column(name, justify="right", no_wrap=True)
    keys = dict.fromkeys((code.launcher, code.kernel, code.dtype) for code in codes)
    for key in keys:
        found = [code for code in codes if (code.launcher, code.kernel, code.dtype) == key]
        cells = [
            triple([getattr(code, name) for code in found])
            for name in ("registers", "stack", "spills", "shared", "barriers", "warps")
        ]
        cells += [triple([f"{getattr(code, name):.0%}" for code in found]) for name in ("occupancy", "wide_share")]
        cells.append(triple([code.variants for code in found]))
        cells += [known(found[0].bytes_per_element), known(found[0].flop_per_element)]
        table.add_row(*key, *cells)
    console.print(table)
    console.print(LEGEND, style="italic", highlight=False)

    table = Table(title="\nFloors", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("launcher", "dtype", "shape"):
        table.add_column(name, no_wrap=True)
    for name in ("launches", "a step", "MB", "MFLOP", *(f"{device}, us" for device in DEVICES)):
        table.add_column(name, justify="right", no_wrap=True)
    for floor in (floor for floor in floors if floor.dtype != "float16"):
        launches = f"{sum(floor.kernels.values())} + {floor.convolutions} + {floor.other_ops}"
        total = "undeclared" if floor.kernel_bytes is None else f"{(floor.kernel_bytes + floor.other_bytes) / 1e6:.1f}"
        table.add_row(
            *(floor.launcher, floor.dtype, str(floor.shape), launches),
            "" if floor.launches_per_step is None else f"{floor.launches_per_step:.1f}",
            total,
            "" if floor.flop is None else f"{floor.flop / 1e6:.1f}",
            *(f"{us:.3g}" for us in floor.floor_us.values()),
        )
    console.print(table)
    console.print(FLOORS, style="italic", highlight=False)

    table = Table(title="\nBytes moved for a lane and step", title_justify="left", title_style="bold", box=None)
    table.pad_edge = False
    for name in ("launcher", "dtype", "shape"):
        table.add_column(name, no_wrap=True)
    forms = list(dict.fromkeys(row.form for row in moved))
    for form in forms:
        table.add_column(form, justify="right")
    for key in dict.fromkeys((row.launcher, row.dtype, row.shape) for row in moved if row.dtype != "float16"):
        found = {row.form: row for row in moved if (row.launcher, row.dtype, row.shape) == key}
        cells = [f"{found[form].bytes_per_element:.1f}" if form in found else "" for form in forms]
        table.add_row(key[0], key[1], str(key[2]), *cells)
    console.print(table)


def triple(values: list[object]) -> str:
    """One value where all are alike."""
    return str(values[0]) if len(set(values)) == 1 else " / ".join(map(str, values))


def known(value: int | None) -> str:
    return "undeclared" if value is None else str(value)


def text(codes: list[Code], floors: list[Floor], moved: list[Moved], executed: "list[Executed]") -> str:
    """JSON with a line for each row, so that a changed kernel is a small difference."""
    found = {
        "note": "Compiled and executed without a GPU, not timed. floor_us: bytes over the bandwidth of data sheets, no measurement.",
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "bandwidth_gb_s": {name: rates[0] for name, rates in DEVICES.items()},
    }
    parts = [f'"{name}": {json.dumps(value)}' for name, value in found.items()]
    for name, rows in (("code", codes), ("floors", floors), ("moved", moved), ("executed", executed)):
        lines = ",\n".join(json.dumps(dataclasses.asdict(row)) for row in rows)
        parts.append(f'"{name}": [\n{lines}\n]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def picture(moved: list[Moved], dtype: str = "float32") -> Figure:
    """Bytes of a lane and step as bars: ours, plain PyTorch, and the log-space form of the scans."""
    rows = [row for row in moved if row.dtype == dtype]
    looks = {OURS: (BLUE, ""), CHUNKED: (BLUE, "\\\\\\"), "plain PyTorch": (ORANGE, "///"), "log space": (PINK, "...")}
    launchers = list(dict.fromkeys(row.launcher for row in rows))
    figure = Figure(figsize=(WIDTH, 1.5 + 0.19 * (len(rows) + len(launchers))), layout="constrained")
    axes = figure.subplots()
    y, ticks = 0.0, {}
    for launcher in launchers:
        found = sorted((row for row in rows if row.launcher == launcher), key=lambda row: list(looks).index(row.form))
        ours = next((row.bytes_per_element for row in found if row.form == OURS), None)
        ticks[launcher] = y + (len(found) - 1) / 2
        for row in found:
            colour, hatch = looks[row.form]
            axes.barh(y, row.bytes_per_element, 0.9, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            times = "" if row.form in (OURS, CHUNKED) or ours is None else f"  ({row.bytes_per_element / ours:.1f}x)"
            axes.text(row.bytes_per_element, y, f" {row.bytes_per_element:.0f}{times}", va="center", fontsize=8.5)
            y += 1
        y += 0.7
    axes.set_yticks(
        list(ticks.values()), [launcher.replace("_fwd", " forward").replace("_bwd", " backward") for launcher in ticks]
    )
    axes.set_ylim(y - 0.8, -0.9)
    axes.set_xlim(0, 1.13 * max(row.bytes_per_element for row in rows))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"bytes moved for an element of the output ({dtype}), and how many times convrnn's")
    figure.suptitle(
        " Bytes that kernels move, against plain PyTorch op by op", x=0, ha="left", weight="bold", fontsize=12
    )
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=form) for form, (colour, hatch) in looks.items()
    ]
    axes.legend(handles=handles, loc="lower right")
    figure.supxlabel(
        "Counted, not timed: every input read and every output written once by each op or kernel, convolutions left out.",
        x=0.01,
        ha="left",
        fontsize=9,
        color=GREY,
    )
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_report", description=__doc__.splitlines()[0])
    parser.add_argument("--output", metavar="FILE", type=Path, default=RESULTS / "kernels.json", help="%(default)s")
    options = parser.parse_args(argv)
    if find_spec("triton") is None:
        print("kernel-report compiles the GPU kernels and needs Triton: pip install triton (Linux)", file=sys.stderr)
        return 2
    if os.environ.get("CONVRNN_BACKEND", "auto") not in ("", "auto") or os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "kernel-report compiles: unset CONVRNN_BACKEND and TRITON_INTERPRET, which say otherwise", file=sys.stderr
        )
        return 2

    from .compiled import ARCHS
    from .executed import execute_all
    from .executed import show as show_executed
    from .kernels import OPS

    codes = compile_all(ARCHS)
    floors, moved = count_all(ARCHS[0])
    executed = execute_all(OPS, DTYPES)
    console = Console(width=204)
    show(codes, floors, moved, console)
    show_executed(executed, console)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text(codes, floors, moved, executed))
    image = options.output.with_name(options.output.stem.removesuffix("s") + "-floors.png")
    with matplotlib.rc_context(STYLE):
        save(picture(moved), image)
    print("written:", options.output, image, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
