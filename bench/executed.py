"""What the Triton kernels do when their machine code is executed: sectors, instructions, bank conflicts, and which floor is
the higher one. No GPU takes part: ``tests/harness/ptx`` executes the PTX of sm_80 and counts.

Instructions are those of PTX, of all threads: the assembler makes more of some (a division) and fewer of others (a
multiplication and an addition, which it may fuse). Loads of parameters do not count.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .kernels import Op, Shape, log_scan_inputs, phases, scan_inputs, sequence_inputs
from .readme import DEVICES

KINDS = ("memory", "float", "special", "tensor", "integer", "control")
# Sizes that the 16 bytes of a vector divide, and odd ones of video practice; of scans also a T that is cut in chunks.
ALIGNED, ODD = "aligned", "odd"
SCANS = {ALIGNED: ((2, 8, 64, 14, 14), (1, 256, 256)), ODD: ((2, 8, 17, 7, 7), (1, 256, 51))}
FRAMES = {ALIGNED: ((4, 64, 14, 14),), ODD: ((4, 17, 7, 7),)}
SEQUENCES = {ALIGNED: ((2, 2, 8, 64, 8, 8),), ODD: ((2, 2, 3, 17, 7, 7),)}
# A multiprocessor issues 128 threads' instructions a clock, of special functions 16. Its float32 lanes, by which data sheets
# count, are as many as the former, on an A100 half of them; a multiplication and an addition count as two.
ISSUE = {
    name: rates[1] / 2 * (2 if name.startswith("A100") else 1) for name, rates in DEVICES.items()
}  # 10^12 a second
SPECIAL = 1 / 8
NOTE = (
    "Executed, not timed: PTX of sm_80, T of 2 or 8 steps, or of 256 in chunks. Bytes: asked for, of a lane and step. Sectors: of 32 "
    "bytes that each warp's access touches, over these bytes; what the first of two accesses leaves of a sector, the second finds "
    "in L1. Instructions: of PTX, of a lane and step, by kind (special: exponentials, divisions). Conflicts: wavefronts of shared "
    "memory over those without bank conflicts. Floors, in ps of a lane and step: bytes over the memory's bandwidth / instructions "
    "over issue slots (128 a clock and multiprocessor; special ones 16), a star where these are the bound. float16 is as bfloat16."
)


@dataclass(frozen=True)
class Executed:
    """One kernel of a launcher, by dtype, layout and size."""

    launcher: str
    kernel: str
    dtype: str
    layout: str
    sizes: str
    shape: tuple[int, ...]
    bytes_per_element: float  # of a lane and step, as all below
    sectors: float  # over bytes
    instructions: dict[str, float]
    conflicts: float | None  # of a kernel that uses shared memory
    floors_ps: dict[str, tuple[float, float]]  # by device: memory, issue slots

    @property
    def bounds(self) -> dict[str, str]:
        return {name: "memory" if memory >= issue else "issue" for name, (memory, issue) in self.floors_ps.items()}


def shapes_of(op: Op) -> dict[str, tuple[Shape, ...]]:
    if op.inputs in (scan_inputs, log_scan_inputs):
        return SCANS
    return SEQUENCES if op.inputs is sequence_inputs else FRAMES


def arrange(x: Tensor, frame: int, channels_last: bool) -> Tensor:
    """With the channels of frames of ``frame`` dimensions, C among them, last in memory."""
    channel = x.dim() - frame
    return x.movedim(channel, -1).contiguous().movedim(-1, channel) if channels_last else x


def execute(launcher: str, op: Op, shape: Shape, dtype: torch.dtype, sizes: str, channels_last: bool) -> list[Executed]:
    """Each kernel of one call, its launches summed."""
    from tests.harness.ptx.driver import executed, installed, using

    torch.manual_seed(0)
    inputs = [x.normal_() for x in op.inputs(shape, dtype, "cpu")]
    frame = len(shape) - {scan_inputs: 2, log_scan_inputs: 2, sequence_inputs: 3}.get(op.inputs, 1)
    tensors = 2 if op.inputs is sequence_inputs else len(inputs)  # behind x and h0 come weights
    inputs = [arrange(x, frame, channels_last and i < tensors) for i, x in enumerate(inputs)]
    with installed(), executed() as launches, using(detailed=True), torch.backends.cudnn.flags(allow_tf32=True):
        op.call(*inputs)
    lanes, steps = op.extent(shape)
    found: dict[str, list] = {}
    for name, launch in zip(phases([launch.kernel for launch in launches]), launches, strict=True):
        found.setdefault(name, []).append(launch)
    rows = []
    for name, alike in found.items():
        moved = sum(launch.loaded + launch.stored for launch in alike)
        kinds = sum((launch.instructions for launch in alike), Counter())
        each = {kind: kinds[kind] / (lanes * steps) for kind in KINDS if kinds[kind]}
        least = sum(launch.counts.least_wavefronts for launch in alike)
        total = sum(each.values())
        slots = max(total, each.get("special", 0) / SPECIAL)
        rows.append(
            Executed(
                launcher=launcher,
                kernel=name,
                dtype=str(dtype).removeprefix("torch."),
                layout="channels last" if channels_last else "channels first",
                sizes=sizes,
                shape=shape,
                bytes_per_element=moved / (lanes * steps),
                sectors=round(32 * sum(launch.counts.sectors for launch in alike) / moved, 3),
                instructions={kind: round(count, 2) for kind, count in each.items()},
                conflicts=round(sum(launch.counts.wavefronts for launch in alike) / least, 2) if least else None,
                floors_ps={
                    device: (round(moved / (lanes * steps) / rates[0] * 1e3, 3), round(slots / ISSUE[device], 3))
                    for device, rates in DEVICES.items()
                },
            )
        )
    return rows


def execute_all(ops: dict[str, Op], dtypes: tuple[torch.dtype, ...]) -> list[Executed]:
    """Every launcher in every dtype and layout, at aligned and at odd sizes; frames that restart or hold the state take the
    same kernels, with a byte more for a frame."""
    return [
        row
        for launcher, op in ops.items()
        if not op.codes
        for dtype in dtypes
        for sizes, shapes in shapes_of(op).items()
        for shape in shapes
        for channels_last in (False, True)
        # a lane of a sequence of vectors has no layout, and log scans read channels first
        if not channels_last or (len(shape) > 3 and op.inputs is not log_scan_inputs)
        for row in execute(launcher, op, shape, dtype, sizes, channels_last)
    ]


def show(rows: list[Executed], console: Console) -> None:
    table = Table(title="\nExecuted", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("kernel", "dtype", "layout", "shape"):
        table.add_column(name, no_wrap=True)
    for name in ("bytes", "sectors", *KINDS, "conflicts", *(f"{device}, ps" for device in DEVICES)):
        table.add_column(name, justify="right", no_wrap=True)
    shown = set()
    for row in rows:
        key = (row.kernel, row.dtype, row.layout, row.shape)
        if row.dtype == "float16" or key in shown:
            continue
        shown.add(key)
        table.add_row(
            row.kernel.replace("_kernel", ""),
            *(row.dtype, row.layout, str(row.shape)),
            *(f"{row.bytes_per_element:.1f}", f"{row.sectors:.2f}"),
            *(f"{row.instructions.get(kind, 0):.1f}" for kind in KINDS),
            "" if row.conflicts is None else f"{row.conflicts:.2f}",
            *(
                f"{memory:.1f} / {issue:.1f}" + ("*" if row.bounds[device] == "issue" else " ")
                for device, (memory, issue) in row.floors_ps.items()
            ),
        )
    console.print(table)
    console.print(NOTE, style="italic", highlight=False)
