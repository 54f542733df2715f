"""Times convrnn against what else computes the same: ``python -m bench``.

Every provider is checked against float64 before it is timed; a wrong one is refused and fails the run.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live

from . import machine, pictures, report
from .cases import add_options, select
from .run import EFFORTS, Bench

LATEST = machine.ROOT / "bench" / "results" / "latest"
INTERRUPTED = 130  # as a shell has it


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    add_options(parser)
    parser.set_defaults(effort="default")
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument(
        "--quick", dest="effort", action="store_const", const="quick", help="one sweep, no torch.compile"
    )
    effort.add_argument("--full", dest="effort", action="store_const", const="full", help="every study, more sweeps")
    parser.add_argument("--output", metavar="FILE", type=Path, help="default: bench/results/latest/<device>.json")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    effort = EFFORTS[options.effort]
    cases = select(options.only, effort.exhaustive)
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    if not cases:
        print(f"--only: no case matches {options.only!r}; python -m bench --list names them", file=sys.stderr)
        return 2
    output = options.output or LATEST / f"{options.device}.json"
    device = torch.device(options.device)
    machine.prepare(options.threads)
    console = Console(width=report.WIDTH)
    bench = Bench(cases, effort, device)
    bench.results.options = {"effort": options.effort, "only": options.only}
    start, failure = time.monotonic(), None
    # No thread redraws while something is timed.
    with Live(auto_refresh=False, transient=True, console=console) as live:
        try:
            for done, case in enumerate(bench.run(), 1):
                live.update(f"{done}/{len(cases) * effort.sweeps} {case.name}", refresh=True)
                bench.results.options["seconds"] = round(time.monotonic() - start)
                bench.results.save(output)
        except KeyboardInterrupt:
            console.print("[bold yellow]interrupted")
        except RuntimeError as error:  # out of memory, or a sweep's process that ended
            failure = error
    if not bench.results.rows:
        if failure is not None:
            raise failure
        return INTERRUPTED  # before anything was measured: what an earlier run wrote stays
    bench.results.save(output)
    report.show(bench.results, console)
    written = [output, output.with_suffix(".csv"), *pictures.draw(bench.results, output.parent, output.stem)]
    console.print("written:", *(str(path) for path in written), sep="\n  ", highlight=False)
    if failure is not None:
        console.print(f"[bold red]failed[/] {failure}", highlight=False)
        return 1
    if not bench.results.complete:
        return INTERRUPTED
    return int(bool(bench.results.refused))


if __name__ == "__main__":
    sys.exit(main())
