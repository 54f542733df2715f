"""Matrix fragments: ldmatrix, stmatrix and mma.sync, with the manual's layouts.

A warp holds a matrix in parts. ``groupID`` of the manual is lane / 4, ``threadID_in_group`` lane % 4.
"""

import numpy as np

from . import arithmetic
from .machine import Machine, Mask
from .operands import Kernel, Run, address, instruction, reader, writer
from .parse import Instruction
from .races import WARP

LANE = np.arange(WARP)
GROUP, MEMBER = LANE // 4, LANE % 4


def _warps(machine: Machine, mask: Mask) -> np.ndarray:
    """The first lanes of the warps that are here."""
    return machine.lanes[::WARP] if mask is None else machine.lanes[::WARP][mask[::WARP]]


def _of_warps(values: np.ndarray, machine: Machine, warps: np.ndarray) -> np.ndarray:
    """A register of these warps, (warps, 32)."""
    return np.broadcast_to(values, machine.lanes.shape)[warps[:, None] + LANE]


def _to_lanes(values: np.ndarray, machine: Machine, warps: np.ndarray) -> np.ndarray:
    result = np.zeros(len(machine.lanes), values.dtype)
    result[warps[:, None] + LANE] = values
    return result


@instruction(
    r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16",
    "Warp Level Matrix Load Instruction: ldmatrix",
    "memory",
    together="warp",
)
def _(statement: Instruction, kernel: Kernel, count: str, trans: str | None) -> Run:
    """Matrix i of 8 rows of 8 b16: lanes 8 i to 8 i + 7 have its rows' addresses; lane l gets elements 2 (l % 4) and the
    next of row l / 4, of the transposed matrix if so said."""
    matrices = int(count)
    targets = statement.operands[0] if isinstance(statement.operands[0], tuple) else (statement.operands[0],)
    writes, where = [writer(x, "b32") for x in targets], address(statement.operands[1], kernel)

    def run(machine: Machine, mask: Mask) -> None:
        warps = _warps(machine, mask)
        lanes = (warps[:, None] + LANE[: 8 * matrices]).ravel()
        addresses = np.broadcast_to(where(machine, mask), machine.lanes.shape)[lanes]
        rows = machine.shared.load(addresses, 16, lanes).view(np.uint16).reshape(len(warps), matrices, 8, 8)
        if trans:
            rows = rows.swapaxes(2, 3)
        for i, write in enumerate(writes):
            pairs = np.ascontiguousarray(rows[:, i]).view(np.uint32)  # (warps, 8, 4): a pair a lane
            write(machine, mask, _to_lanes(pairs.reshape(len(warps), WARP), machine, warps))

    return run


@instruction(
    r"stmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<trans>\.trans)?\.shared(?:::cta)?\.b16",
    "Warp Level Matrix Store Instruction: stmatrix",
    "memory",
    together="warp",
)
def _(statement: Instruction, kernel: Kernel, count: str, trans: str | None) -> Run:
    """The inverse of ldmatrix."""
    matrices = int(count)
    where, sources = address(statement.operands[0], kernel), statement.operands[1]
    reads = [reader(x, "b32", kernel) for x in (sources if isinstance(sources, tuple) else (sources,))]

    def run(machine: Machine, mask: Mask) -> None:
        warps = _warps(machine, mask)
        lanes = (warps[:, None] + LANE[: 8 * matrices]).ravel()
        addresses = np.broadcast_to(where(machine, mask), machine.lanes.shape)[lanes]
        words = np.stack([_of_warps(read(machine, mask), machine, warps) for read in reads], axis=1)
        rows = np.ascontiguousarray(words).view(np.uint16).reshape(len(warps), matrices, 8, 8)
        rows = np.ascontiguousarray(rows.swapaxes(2, 3) if trans else rows)
        machine.shared.store(addresses, 16, lanes, rows.view(np.uint64).reshape(-1, 2))

    return run


def _halves(words: np.ndarray, kind: str) -> np.ndarray:
    """(warps, registers, 32) words as (warps, registers, 32, 2) float64."""
    bits = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)
    return (arithmetic.widen(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)


def _fragments(words: list[np.ndarray], kind: str, rows: int, depth: int) -> np.ndarray:
    """A (warps, rows, depth) operand from its registers, each (warps, 32).

    Of 16-bit types a register holds two neighbours along the depth: (row GROUP + 8 i, depth 2 MEMBER + 8 j), register i + 2 j
    of A, j of B. Of tf32 one: (GROUP + 8 i, MEMBER + 4 j).
    """
    stacked = np.stack(words, axis=1)
    operand = np.zeros((stacked.shape[0], rows, depth))
    blocks = rows // 8
    for register in range(len(words)):
        row = GROUP + 8 * (register % blocks)
        j = register // blocks
        if kind == "tf32":
            # of the 32 bits those of tf32 count
            values = (stacked[:, register] & np.uint32(0xFFFFE000)).view(np.float32)
            operand[:, row, MEMBER + 4 * j] = values
        else:
            pairs = _halves(stacked[:, register : register + 1], kind)[:, 0]
            for half in (0, 1):
                operand[:, row, 2 * MEMBER + 8 * j + half] = pairs[:, :, half]
    return operand


@instruction(
    r"mma\.sync\.aligned\.m16n8k(?P<depth>4|8|16)\.row\.col\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)\.f32",
    "Warp Level Matrix Multiply-Accumulate Instructions: mma.sync (matrix fragments for mma.m16n8k8, mma.m16n8k16)",
    "tensor",
    together="warp",
)
def _(statement: Instruction, kernel: Kernel, depth: str, kind: str) -> Run:
    """D = A B + C, (16, k) by (k, 8). Products are exact; the order of the sum is open, and it has at least the precision of
    float32: moved by up to a unit in the last place of its largest term."""
    k = int(depth)
    targets = [writer(x, "f32") for x in statement.operands[0]]
    a, b = ([reader(x, "b32", kernel) for x in operand] for operand in statement.operands[1:3])
    c = [reader(x, "f32", kernel) for x in statement.operands[3]]
    # Registers 2 i and 2 i + 1 of C and D: row GROUP + 8 i, columns 2 MEMBER and the next.
    row = np.stack([GROUP + 8 * (i // 2) for i in range(4)])
    column = np.stack([2 * MEMBER + i % 2 for i in range(4)])

    def run(machine: Machine, mask: Mask) -> None:
        warps = _warps(machine, mask)

        def registers(reads):
            return [_of_warps(read(machine, mask), machine, warps) for read in reads]

        left = _fragments(registers(a), kind, 16, k)
        right = _fragments(registers(b), kind, 8, k)
        addend = np.stack(registers(c), axis=1).astype(np.float64)
        products = np.einsum("wik,wjk->wij", left, right)[:, row, column]
        sizes = np.einsum("wik,wjk->wij", np.abs(left), np.abs(right))[:, row, column]
        largest = np.maximum(sizes, np.abs(addend)).astype(np.float32)
        total = products + addend
        noise = arithmetic.noise(machine.seed, total)
        bound = np.where(np.isfinite(largest) & (sizes > 0), np.spacing(largest), 0).astype(np.float64)
        result = arithmetic.approximate(total, noise, absolute=bound)
        for i, write in enumerate(targets):
            write(machine, mask, _to_lanes(result[:, i], machine, warps))

    return run
