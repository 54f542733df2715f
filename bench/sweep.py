"""Looks for shapes at which plain PyTorch is faster: ``python -m bench.sweep``.

Draws GRU-RCN shapes at random, times ``convrnn.gru_rcn`` on each against the plain forms of the benchmark as the benchmark
does (values checked against float64 first, then by turns, five sweeps in processes of their own), and lists where the
fastest plain form wins. Ends with status 1 if there is such a shape, or if a result of convrnn is wrong.

What is drawn, the same shapes for a seed on every machine, and the first ones whatever their number:

- Channels of input and state 1 to 512, height and width 1 to 512, batch 1 to 1024, each by itself log-uniform, but the
  lowest and the highest value with a probability of a twentieth each; 1 to 4 steps. Of half of the maps the width is not
  drawn so, but between half and twice the height, as frames are.
- Kernels: six in ten are 1x1, 3x3 (twice as often), 5x5 or 7x7, a quarter square of any size to 31x31, even ones too, the
  rest of two such sizes.
- float32 and bfloat16, as often.
- What takes more than BUDGET is drawn anew: so the largest maps have few channels, and the most channels small maps.

Both passes have h0: *forward* without gradients, *step* with forward and backward to the gradients of x, h0 and the
weights. Ratio: time of the fastest plain form / ours in the same sweep, median of the sweeps, and the interval that holds
the true one. A loss is a ratio below MARGIN whose whole interval is below 1; "undecided" is what is neither a loss nor
surely faster. Of more than a hundred passes the noise picks some: shapes with a loss are swept five times more, and judged
by these sweeps alone.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from . import machine, report
from .case import OURS, Case, Work
from .cases import STUDY
from .gru import gru_rcn
from .results import DECIDING, Results, Row, add_speedups, best_baseline
from .run import Bench, Effort

WIDTH = 150
INTERRUPTED = 130  # as a shell has it
EFFORT = Effort(sweeps=DECIDING, rounds=1, compile=False, exhaustive=True, memory=False)
MARGIN = 0.97  # what processes of the same code may differ by

CHANNELS, EXTENT, BATCH, KERNEL, STEPS = (1, 512), (1, 512), (1, 1024), (1, 31), (1, 4)
EDGE = 0.05  # how often an axis takes its lowest value, and how often its highest
USUAL = (1, 3, 3, 5, 7)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BUDGET = Work(bytes=64 << 20, flop=3 * 10**9)  # of a forward pass: 60 shapes take some ten minutes on two cores


def fixed() -> list[Case]:
    """Shapes that were slower than plain PyTorch once: few channels on large frames, tiny maps, large kernels, and in bfloat16
    many channels."""
    bf16 = torch.bfloat16
    return [
        gru_rcn(1, 2, 1, 4, 512, 512, kernel=(1, 1), passes=STUDY),
        gru_rcn(1, 2, 3, 4, 512, 512, passes=STUDY),
        gru_rcn(1, 4, 1, 1, 256, 256, passes=STUDY),
        gru_rcn(4, 4, 1, 1, 128, 160, passes=STUDY),
        gru_rcn(512, 2, 4, 4, 5, 5, passes=STUDY),
        gru_rcn(1, 2, 3, 8, 512, 512, dtype=bf16, passes=STUDY),
        gru_rcn(1, 2, 1, 1, 128, 128, kernel=(31, 31), passes=STUDY),
        gru_rcn(2, 4, 256, 256, 7, 7, dtype=bf16, passes=STUDY),
        gru_rcn(4, 4, 512, 512, 7, 7, dtype=bf16, passes=STUDY),
    ]


def drawn(seed: int, count: int) -> list[Case]:
    """The first ``count`` cases of a seed, no two the same."""
    return list(islice(draws(random.Random(seed)), count))


def draws(rng: random.Random) -> Iterator[Case]:
    known: set[str] = set()
    while True:
        batch, steps = along(rng, BATCH), rng.randint(*STEPS)
        shape = (batch, steps, along(rng, CHANNELS), along(rng, CHANNELS), *extents(rng))
        case = gru_rcn(*shape, kernel=kernel(rng), dtype=rng.choice(list(DTYPES.values())), passes=STUDY)
        within = case.forward.bytes <= BUDGET.bytes and case.forward.flop <= BUDGET.flop
        if within and case.name not in known:
            known.add(case.name)
            yield case


def along(rng: random.Random, axis: tuple[int, int]) -> int:
    """A size from the lowest to the highest of ``axis``."""
    (low, high), where = axis, rng.random()
    if where < 2 * EDGE:
        return low if where < EDGE else high
    return int(low * ((high + 1) / low) ** rng.random())


def extents(rng: random.Random) -> tuple[int, int]:
    height = along(rng, EXTENT)
    if rng.random() < 0.5:
        return height, along(rng, EXTENT)
    return height, min(max(round(height * 2 ** rng.uniform(-1, 1)), EXTENT[0]), EXTENT[1])


def kernel(rng: random.Random) -> tuple[int, int]:
    kind = rng.random()
    if kind < 0.85:
        size = rng.choice(USUAL) if kind < 0.6 else along(rng, KERNEL)
        return size, size
    return along(rng, KERNEL), along(rng, KERNEL)


def verdict(row: Row) -> str:
    """ "faster", "loss", "undecided" or, of a run that was interrupted, "too few sweeps"."""
    if not row.decidable:
        return "too few sweeps"
    if row.verdict == "slower":
        return "loss" if row.speedup < MARGIN else "undecided"
    return row.verdict


def lost(results: Results) -> list[Row]:
    """What convrnn lost, the worst first."""
    rows = [row for row in results.rows if row.ours and verdict(row) == "loss"]
    return sorted(rows, key=lambda row: row.speedup)


def measured(bench: Bench) -> Iterator[Case]:
    """Sweeps over everything, then over what was lost, whose rows keep the second sweeps alone; yields each case measured."""
    yield from bench.run()
    suspects = {row.case for row in lost(bench.results)}
    if not suspects:
        return
    again = range(EFFORT.sweeps, 2 * EFFORT.sweeps)
    yield from bench.further(again, [subject for subject in bench.subjects if subject.case.name in suspects])
    rows = [row for row in bench.results.rows if row.case in suspects]
    for row in rows:
        if any(sweep in again for sweep in row.sweeps):  # not of a baseline that others beat by far
            turns = [turn for turn in zip(row.samples_ms, row.sweeps, strict=True) if turn[1] in again]
            row.samples_ms, row.sweeps = map(list, zip(*turns, strict=True))
    add_speedups(rows)


def table(results: Results) -> Table:
    """A line for each pass of each case."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    found.add_column("#", justify="right")
    found.add_column("B, T, Ox, Oh, H, W", no_wrap=True)
    for name in ("kernel", "dtype", "pass"):
        found.add_column(name, no_wrap=True)
    for name in ("convrnn, ms", "plain, ms"):
        found.add_column(name, justify="right", no_wrap=True)
    found.add_column("fastest plain form")
    found.add_column("ratio", justify="right", no_wrap=True)
    found.add_column("verdict")
    colours = {"faster": "green", "loss": "bold red"}
    for row in results.rows:
        plain = best_baseline(row, results.rows)
        if not row.ours or plain is None:
            continue
        found.add_row(
            str(results.options["indices"][row.case]),
            ", ".join(map(str, row.shape)),
            row.op.partition(" ")[2] or "3x3",
            row.dtype,
            row.what,
            f"{row.ms:.3g}",
            f"{plain.ms:.3g}",
            plain.provider,
            ratio(row),
            Text(verdict(row), colours.get(verdict(row), "")),
        )
    return found


def ratio(row: Row) -> str:
    return f"{report.ratio(row.speedup)} ({report.spread(row)})"


def summary(results: Results) -> str:
    """How many passes are faster, lost and undecided; then every loss, and how to measure them again."""
    verdicts = [verdict(row) for row in results.rows if row.ours and row.verdict]
    losses, indices = lost(results), results.options["indices"]
    lines = [
        f"{len(verdicts)} passes: {verdicts.count('faster')} faster than the fastest plain form, "
        + f"{len(losses)} lost (below {MARGIN}, the whole interval below 1), {verdicts.count('undecided')} undecided."
    ]
    if few := verdicts.count("too few sweeps"):
        lines.append(f"Nothing is decided in {few} of them: a verdict takes {DECIDING} sweeps.")
    lines += [f"  loss: {indices[row.case]}: {row.case}, {row.what}: {ratio(row)}" for row in losses]
    if losses:
        again = sorted({indices[row.case] for row in losses})
        lines.append(f"Again: python -m bench.sweep {results.options['list']} --only {' '.join(map(str, again))}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the draw; default: %(default)s")
    parser.add_argument("--shapes", type=int, default=60, help="how many are drawn; default: %(default)s")
    parser.add_argument("--cases", action="store_true", help="a fixed list instead: shapes that were lost once")
    parser.add_argument(
        "--only", metavar="INDEX", type=int, nargs="+", help="these of the list alone, by their numbers"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="shapes of this dtype alone")
    parser.add_argument(
        "--threads", type=machine.thread_count, default=torch.get_num_threads(), help="default: %(default)s"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write every sample there, and a table beside it as CSV"
    )
    parser.add_argument("--list", action="store_true", help="print the numbers and names of the shapes, and stop")
    options = parser.parse_args(argv)
    if options.shapes < 1:
        parser.error(f"argument --shapes: expected 1 or more, got {options.shapes}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    source: Callable[[], list[Case]] = fixed if options.cases else partial(drawn, options.seed, options.shapes)
    cases = dict(enumerate(source()))
    if unknown := set(options.only or ()) - cases.keys():
        print(f"--only: expected 0 to {len(cases) - 1}, got {', '.join(map(str, sorted(unknown)))}", file=sys.stderr)
        return 2
    cases = {
        index: case
        for index, case in cases.items()
        if (not options.only or index in options.only)
        and (options.dtype is None or case.dtype == DTYPES[options.dtype])
    }
    if options.list:
        print(*(f"{index:3} {case.name}" for index, case in cases.items()), sep="\n")
        return 0
    if not cases:
        print(f"--only, --dtype: none of these shapes is of dtype {options.dtype}", file=sys.stderr)
        return 2
    machine.prepare(options.threads)
    console = Console(width=WIDTH, highlight=False)
    bench = Bench(list(cases.values()), EFFORT, torch.device("cpu"), source)
    bench.results.options = {
        "list": "--cases" if options.cases else f"--seed {options.seed} --shapes {options.shapes}",
        "indices": {case.name: index for index, case in cases.items()},
    }
    # No thread redraws while something is timed.
    with Live(auto_refresh=False, transient=True, console=console) as live:
        try:
            for done, case in enumerate(measured(bench), 1):
                live.update(f"{done}/{len(cases) * EFFORT.sweeps} {case.name}", refresh=True)
        except KeyboardInterrupt:
            bench.results.complete = False
            console.print("[bold yellow]interrupted")
    return show(bench.results, console, options.json)


def show(results: Results, console: Console, output: Path | None) -> int:
    """Prints and writes what was found; the status that the program ends with."""
    console.print(report.heading(results))
    console.print(table(results))
    for refusal in results.refused:
        console.print(f"[bold red]refused[/] {refusal.case}: {refusal.provider}: {refusal.reason}")
    console.print(summary(results), markup=False)
    if output is not None:
        results.save(output)
        console.print(f"written: {output}, {output.with_suffix('.csv')}")
    if not results.complete:
        return INTERRUPTED
    return int(bool(lost(results)) or any(refusal.provider == OURS for refusal in results.refused))


if __name__ == "__main__":
    sys.exit(main())
