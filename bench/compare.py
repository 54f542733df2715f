"""Compares this checkout's kernels with another version's: ``python -m bench.compare BASE``.

BASE is a git ref, or a results file of ``python -m bench``, which stands for the commit it was measured at. Both
versions are built in folders of their own and timed by two processes that take turns (10 ms or a call) as ABBA, so that
what slows the machine for a while slows both. Ends with status 1 if a case got slower, or its result wrong; 2 if nothing
can be compared.

How a verdict comes about: the ratio current / base is taken within each round, and its median given the 95 % interval
that order statistics give without an assumption on the noise. A median beyond the margin makes a case suspect, no more:
of a hundred cases the noise picks some, and memory that lies well or badly stays so as long as a process lives. Suspects
are timed again in fresh processes, twice, and for longer; "slower" and "faster" are those whose whole interval lay beyond
the margin, on the same side, both times, and the figures shown are those of the repetitions alone.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from . import builds, machine
from .builds import Unusable
from .case import Case
from .cases import add_options, select
from .results import CONFIDENCE, interval

WORKER = Path(__file__).with_name("worker.py")
OUTPUT = machine.ROOT / "bench" / "results" / "latest" / "compare.json"
WIDTH = 160
INTERRUPTED = 130  # as a shell has it

MARGIN = 0.05  # what processes of the same code may differ by: where their memory lies
ROUNDS = 11  # at least; twice as many in a repetition
PATIENCE_S = 1.0  # for as long more rounds are added where the interval spans a margin; twice as long in a repetition
REPETITIONS = 2  # of suspects, in fresh processes

BASE, CURRENT = 0, 1
PROBLEMS = {  # by side and kind of reply; what the current side has is the one to know
    (BASE, "failure"): "not in base",
    (BASE, "wrong"): "wrong in base",
    (CURRENT, "failure"): "failed",
    (CURRENT, "wrong"): "wrong",
}
BAD = ("slower", "failed", "wrong")
COLOURS = {"same": "", "faster": "green", **dict.fromkeys(BAD, "bold red")}

Round = tuple[float, float]  # milliseconds a call, base and current


@dataclass
class Row:
    """One pass of one case on both sides.

    Attributes:
        case, what: as in the bench.
        series: for each pair of processes its rounds; the first is the one that finds suspects.
        problem: what kept it from being compared, one of PROBLEMS.
        note: the same in the words of the side that had it.
    """

    case: str
    what: str
    series: list[list[Round]] = field(default_factory=list)
    problem: str = ""
    note: str = ""

    @property
    def shown(self) -> list[Round]:
        return list(chain(*self.series[1:])) or self.series[0]

    @property
    def suspect(self) -> int:
        """1 or -1: the first look says slower or faster; every repetition so far says the same, and surely. 0: no."""
        if self.problem:
            return 0
        first = beyond(statistics.median(ratios(self.series[0])))
        return first if all(found_side(series) == first for series in self.series[1:]) else 0

    @property
    def verdict(self) -> str:
        if self.problem:
            return self.problem
        if len(self.series) > REPETITIONS and self.suspect:
            return "slower" if self.suspect > 0 else "faster"
        return "same" if found_side(self.shown) == 0 else "unclear"


def ratios(rounds: Iterable[Round]) -> list[float]:
    return [current / base for base, current in rounds]


def beyond(ratio: float) -> int:
    """1 beyond the margin (slower), -1 beyond it on the other side (faster), 0 within."""
    return (ratio > 1 + MARGIN) - (ratio < 1 / (1 + MARGIN))


def found_side(rounds: list[Round]) -> int | None:
    """The side that the whole interval lies on; None where it spans two."""
    low, high = map(beyond, interval(ratios(rounds)))
    return low if low == high else None


class Worker:
    """A process that times the cases on the convrnn of one folder."""

    def __init__(self, package: Path, device: str, threads: int) -> None:
        options = ["--package", str(package), "--device", device, "--threads", str(threads)]
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, **request: Any) -> None:
        try:
            print(json.dumps(request), file=self.process.stdin)
        except BrokenPipeError:
            pass  # receive() says why

    def receive(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"failure": f"its process ended with status {self.process.wait()}"}

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.receive()


class Comparison:
    """Two builds, and what was found about them."""

    def __init__(self, base: Path, current: Path, device: str, threads: int, progress: Callable[[str], None]) -> None:
        self.packages = base, current
        self.device, self.threads, self.progress = device, threads, progress
        self.rows: list[Row] = []

    def run(self, cases: list[Case]) -> None:
        self.rows = [Row(case.name, what) for case in cases for what in case.passes]
        self.sit(self.rows, effort=1)
        for _ in range(REPETITIONS):
            self.sit([row for row in self.rows if row.suspect], effort=2)

    def sit(self, rows: list[Row], effort: int) -> None:
        """Adds a series to ``rows``: a fresh pair of processes; the first one checks the results too."""
        if not rows:
            return
        workers: list[Worker] = []
        try:
            for case in dict.fromkeys(row.case for row in rows):
                self.progress(case if effort == 1 else f"again, in fresh processes: {case}")
                if not all(worker.alive for worker in workers) or not workers:
                    self.close(workers)  # the pair: what a process decides is drawn for both anew
                    workers += [self.worker(side) for side in (BASE, CURRENT)]
                    for side, worker in enumerate(workers):
                        if "failure" in (ready := worker.receive()):
                            raise Unusable(f"{self.packages[side]}: {ready['failure']}")
                prepared = [row for row in rows if row.case == case]
                self.prepare(workers, prepared, check=effort == 1)
                for row in prepared:
                    if not row.problem:
                        self.measure(workers, row, effort)
        finally:
            self.close(workers)

    def worker(self, side: int) -> Worker:
        return Worker(self.packages[side], self.device, self.threads)

    @staticmethod
    def close(workers: list[Worker]) -> None:
        while workers:
            workers.pop().close()

    def prepare(self, workers: list[Worker], rows: list[Row], check: bool) -> None:
        for worker in workers:
            worker.send(case=rows[0].case, check=check)  # both at once: nothing is timed here
        replies = {side: worker.receive() for side, worker in enumerate(workers)}
        for row in rows:
            self.note(row, replies)

    def measure(self, workers: list[Worker], row: Row, effort: int) -> None:
        found: list[Round] = []
        order = [BASE, CURRENT]
        end = time.monotonic() + effort * PATIENCE_S
        while len(found) < effort * ROUNDS or (found_side(found) is None and time.monotonic() < end):
            replies = {side: workers[side].ask(what=row.what) for side in order}
            order.reverse()  # ABBA: a drift falls on both
            self.note(row, replies)
            if row.problem:
                return
            found.append((replies[BASE]["ms"], replies[CURRENT]["ms"]))
        row.series.append(found)

    @staticmethod
    def note(row: Row, replies: dict[int, dict[str, Any]]) -> None:
        for (side, kind), problem in PROBLEMS.items():
            if kind in replies[side]:
                row.problem, row.note = problem, replies[side][kind]


def table(rows: list[Row]) -> Table:
    found = Table(box=None, pad_edge=False, header_style="bold")
    found.add_column("case", no_wrap=True)
    found.add_column("pass")
    for name in ("base ms", "current ms", "ratio", "interval"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("verdict")
    for i, row in enumerate(rows):
        if row.problem and i > 0 and (rows[i - 1].case, rows[i - 1].problem) == (row.case, row.problem):
            continue  # all passes of a case share it
        verdict = Text(row.verdict, COLOURS.get(row.verdict, "yellow"))
        found.add_row(
            row.case,
            "" if row.problem else row.what,
            *figures(row),
            verdict.append(f": {row.note}" if row.note else ""),
        )
    return found


def figures(row: Row) -> list[str]:
    """Base and current in ms, their ratio and its interval, where there are any."""
    if row.problem:
        return [""] * 4
    base, current = (statistics.median(times) for times in zip(*row.shown, strict=True))
    low, high = interval(ratios(row.shown))
    return [f"{base:.4g}", f"{current:.4g}", f"{statistics.median(ratios(row.shown)):.3f}", f"{low:.3f}-{high:.3f}"]


def summary(rows: list[Row]) -> str:
    verdicts = [row.verdict for row in rows]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    return (
        f"{counts}. Ratio: current / base, above 1 where this checkout is slower, with its {CONFIDENCE:.0%} interval; slower, "
        f"faster: by more than {MARGIN:.0%}, in {REPETITIONS} repetitions too; same: surely within that; unclear: neither."
    )


def save(path: Path, rows: list[Row], **about: Any) -> None:
    """Writes everything as JSON; ``about`` says what was compared and where."""
    found = []
    for row in rows:
        entry = dataclasses.asdict(row) | {"verdict": row.verdict}
        if not row.problem:
            entry["ratio"], entry["interval"] = statistics.median(ratios(row.shown)), interval(ratios(row.shown))
        found.append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "margin": MARGIN, "confidence": CONFIDENCE, "rows": found}, indent=1) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="a git ref, or a JSON file of python -m bench")
    add_options(parser)
    parser.add_argument("--quick", action="store_true", help="ops and streams alone, no modules and no studies")
    return parser.parse_args(argv)


def choose(only: str, quick: bool) -> list[Case]:
    found = [case for case in select(only, exhaustive=False) if not quick or case.group in ("op", "streaming")]
    if not found:
        raise Unusable(f"--only: no case matches {only!r}; python -m bench --list names them")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(width=WIDTH, highlight=False)
    comparison, interrupted = None, False
    try:
        cases = choose(options.only, options.quick)
        commit = builds.resolve(options.base)
        packages = builds.build_commit(commit), builds.build_checkout()
        stamp = machine.stamp(torch.device(options.device)) | {"threads": options.threads}
        console.print(
            f"base {options.base} ({commit[:12]}), current {stamp['commit']}; {stamp['device']}, {options.threads} threads"
        )
        for difference in builds.differences(options.base, stamp):
            console.print(f"[yellow]{difference}[/]: both are timed here and now")
        if packages[0] == packages[1]:
            console.print("both have the same sources: whatever differs is noise")
        if hasattr(os, "getloadavg") and os.getloadavg()[0] > os.cpu_count() / 2:
            console.print("[yellow]other work runs on this machine: much will be unclear; --threads 1 suffers least[/]")
        # no thread that redraws while something is timed
        with Live(auto_refresh=False, transient=True, console=console) as live:
            comparison = Comparison(
                *packages, options.device, options.threads, lambda text: live.update(text, refresh=True)
            )
            comparison.run(cases)
    except Unusable as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if comparison is None:
            return INTERRUPTED
        interrupted = True
        console.print("[bold yellow]interrupted: what was not reached is left out, what was not repeated is unclear")
    rows = [row for row in comparison.rows if row.problem or row.series]
    save(OUTPUT, rows, base={"given": options.base, "commit": commit}, machine=stamp)
    console.print(table(rows))
    console.print(summary(rows), f"written: {OUTPUT}", sep="\n")
    if interrupted:
        return INTERRUPTED
    if all(row.problem == PROBLEMS[BASE, "failure"] for row in rows):
        print(f"bench.compare: {options.base} runs none of these cases", file=sys.stderr)
        return 2
    return int(any(row.verdict in BAD for row in rows))


if __name__ == "__main__":
    sys.exit(main())
