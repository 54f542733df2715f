"""What a run found, as rows; written as JSON (everything) and CSV (the table)."""

import csv
import dataclasses
import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .case import GRAPH, OURS

CONFIDENCE = 0.95  # of an interval that is to hold the true median
DECIDING = 5  # sweeps, of which the lowest and the highest enclose the median with 94 %; fewer say too little


@dataclass
class Row:
    """One provider's pass of one case.

    Attributes:
        case, op, shape, dtype, group: as in ``Case``.
        provider: who computed it.
        what: "forward", "backward", "step" (both, every gradient; for modules also an AdamW step) or "stream" (one
            time step, the state carried).
        samples_ms: the median time of a call in each of several turns, spread over the whole run.
        sweeps: the sweep over all cases that each belongs to; what shares a number ran within moments.
        flop, bytes: the work that the pass cannot do without.
        error: worst error of output and gradients against float64, relative to the largest value of each.
        kept_bytes: what the forward keeps for the backward beside inputs and parameters.
        peak_bytes: memory that a training step adds at its peak.
        floor_ms: time that moving the same bytes took beside it, where that was timed.
        speedup, speedup_low, speedup_high: how many times the best baseline's time it takes less: median of the sweeps,
            and the interval that holds the true one.
    """

    case: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    group: str
    provider: str
    what: str
    samples_ms: list[float]
    sweeps: list[int]
    flop: int
    bytes: int
    error: float
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    floor_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p20_ms(self) -> float:
        return quantile(self.samples_ms, 0.2)

    @property
    def p80_ms(self) -> float:
        return quantile(self.samples_ms, 0.8)

    @property
    def ours(self) -> bool:
        """convrnn as it is called, in a CUDA graph or not; under torch.compile it is another way to run it."""
        return self.provider.removesuffix(GRAPH) == OURS

    @property
    def decidable(self) -> bool:
        """Whether it has sweeps enough for a verdict."""
        return len(set(self.sweeps)) >= DECIDING

    @property
    def verdict(self) -> str:
        """On which side of 1 the spread of the speed-up lies: "faster", "slower" or "undecided"; "" without a baseline."""
        if self.speedup is None:
            return ""
        if not self.decidable:
            return "undecided"
        return "faster" if self.speedup_low > 1 else "slower" if self.speedup_high < 1 else "undecided"

    @property
    def gb_s(self) -> float:
        return self.bytes / self.ms / 1e6

    @property
    def gflop_s(self) -> float:
        return self.flop / self.ms / 1e6


@dataclass
class Refusal:
    """A provider that was not timed: its result was wrong, or it failed."""

    case: str
    provider: str
    reason: str


@dataclass
class Results:
    """A run: the machine, its measured peaks (copy in GB/s, dtypes in GFLOP/s), rows, refusals.

    ``options`` says what was asked for, and how many seconds it took.
    """

    machine: dict[str, Any]
    peaks: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    complete: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def copy_share(self, row: Row) -> float:
        return row.gb_s / self.peaks["copy"]

    def peak_share(self, row: Row) -> float:
        return row.gflop_s / self.peaks[row.dtype]

    def floors(self, row: Row) -> float:
        """The time of a pass in floors: moving its bytes as timed beside it or, where it was not, at the copy's rate, or
        its arithmetic at the measured peak, whichever takes longer."""
        peaks = max(row.bytes / self.peaks["copy"], row.flop / self.peaks[row.dtype]) / 1e6
        return row.ms / (row.floor_ms or peaks)

    def save(self, path: Path) -> None:
        """Writes ``path`` (JSON) and, beside it, the same table as CSV."""
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".part")  # so that an end in the middle of writing leaves the last file whole
        whole.write_text(json.dumps(dataclasses.asdict(self), separators=(",", ":")) + "\n")
        whole.replace(path)
        with path.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            for row in self.rows:
                writer.writerow({name: self.cell(row, name) for name in CSV_COLUMNS})

    def digest(self) -> str:
        """A name for this content: pictures carry it, so that one of other results is found out."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def cell(self, row: Row, name: str) -> object:
        value = getattr(self, name)(row) if name in ("copy_share", "peak_share", "floors") else getattr(row, name)
        return float(f"{value:.5g}") if isinstance(value, float) else value


CSV_COLUMNS = (
    *("case", "op", "shape", "dtype", "group", "provider", "what"),
    *("ms", "p20_ms", "p80_ms", "speedup", "speedup_low", "speedup_high"),
    *("gb_s", "copy_share", "gflop_s", "peak_share", "floors", "error", "kept_bytes", "peak_bytes"),
)


def load(path: Path) -> Results:
    """Reads a file that ``Results.save`` wrote."""
    found = json.loads(path.read_text())
    found["rows"] = [Row(**{**row, "shape": tuple(row["shape"])}) for row in found["rows"]]
    found["refused"] = [Refusal(**refusal) for refusal in found["refused"]]
    return Results(**found)


def quantile(samples: list[float], q: float) -> float:
    """By Weibull's positions, i / (n + 1): few samples give a wide spread, as they should."""
    return float(np.quantile(samples, q, method="weibull"))


def best_baseline(row: Row, rows: list[Row]) -> Row | None:
    """The fastest of ``rows`` to which ``row`` is compared: same case and pass, in a CUDA graph as it is or not."""
    rivals = [
        other
        for other in rows
        if (other.case, other.what, other.provider.endswith(GRAPH))
        == (row.case, row.what, row.provider.endswith(GRAPH))
        and OURS not in other.provider
    ]
    return min(rivals, key=lambda other: other.ms, default=None)


def add_speedups(rows: list[Row]) -> None:
    """Fills in the speed-ups of ``rows``: the best baseline's time over each row's.

    A ratio is taken within each sweep, so that what slows the whole machine for a while cancels. A CUDA graph runs without
    launches: its rows are compared among themselves. Turns of one sweep are no independent samples: they stand for
    themselves where there is one sweep alone.
    """
    for row in rows:
        best = best_baseline(row, rows)
        if best is None:
            continue
        theirs, own = by_sweep(best), by_sweep(row)
        pairs = own.items() if len(own) > 1 else zip(row.sweeps, row.samples_ms, strict=True)
        ratios = [theirs.get(sweep, best.ms) / ms for sweep, ms in pairs]
        row.speedup = statistics.median(ratios)
        row.speedup_low, row.speedup_high = interval(ratios)


def by_sweep(row: Row) -> dict[int, float]:
    """The median of each sweep's turns."""
    turns: dict[int, list[float]] = {}
    for ms, sweep in zip(row.samples_ms, row.sweeps, strict=True):
        turns.setdefault(sweep, []).append(ms)
    return {sweep: statistics.median(found) for sweep, found in turns.items()}


def interval(samples: list[float]) -> tuple[float, float]:
    """The narrowest interval of order statistics that holds the true median with CONFIDENCE; all of few samples."""
    count, cut, tail = len(samples), 0, 2 * 0.5 ** len(samples)
    while tail <= 1 - CONFIDENCE:
        cut += 1
        tail += 2 * math.comb(count, cut) * 0.5**count
    ordered = sorted(samples)
    cut = max(cut - 1, 0)
    return ordered[cut], ordered[count - 1 - cut]
