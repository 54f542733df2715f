"""Counts the instructions of the CPU kernels, which no noise moves: ``python -m bench.instructions``.

Each pass of each case runs under valgrind's callgrind, on our provider alone and one thread. Counted is what happens
between entry and return of our C++ ops, with all that they call, less the C library's
allocator, whose work depends on all that ran before; Python and autograd are not. Ends with status 1 if a count grew against those of ``--compare``, 2 if nothing can be counted.

Time is another matter: a count knows nothing of caches, of memory, and of what an instruction costs. Valgrind hides
AVX-512 from the program, which then runs its AVX2 kernels.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import machine, measure
from .case import OURS, STREAM, Case
from .cases import BF16, all_cases, named
from .gru import gru_gates, gru_rcn, gru_rcn_stream, gru_update
from .scans import log_scan, mingru, mingru_stream

LIMIT = 0.01  # what a count may differ by and still be the same
CALLS = 3  # the least of them counts
ALLOCATOR = re.compile(
    r"(__libc_|__GI_+|_int_)?(malloc|free|calloc|realloc|memalign)\b|_mid_memalign|posix_memalign|aligned_alloc"
    r"|malloc_consolidate|unlink_chunk|sysmalloc|systrim|heap_trim|tcache_|arena_get|alloc_perturb|__glibc_morecore"
    r"|(__)?s?brk\b|mmap|munmap|mremap|madvise"
)
COLOURS = {"more": "bold red", "fewer": "green"}

# The ops are what TORCH_BOX made of functions in an unnamed namespace; cpu_isa alone is in a named one, and serves as the
# mark between two calls. Patterns that begin alike hide one another in callgrind, and a function that matches OPS must not
# call another that does: it would switch collecting off.
OPS = "*boxer<*(anonymous namespace)::*>::boxed_fn(*)"
MARK = "*isa_report*>::boxed_fn(*)"
PERFORM = "import sys; from bench import instructions; instructions.perform(*sys.argv[1:])"


class Uncountable(Exception):
    """Nothing can be counted here; says why."""


@dataclass(frozen=True)
class Count:
    """Instructions of one pass of one case, and the elements of the case's outputs."""

    case: str
    what: str
    instructions: int
    elements: int

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements


@dataclass(frozen=True)
class Counts:
    """A run: ``cpu_isa()`` and PyTorch as seen under valgrind, valgrind's version, and the counts."""

    isa: str
    torch: str
    valgrind: str
    counts: list[Count]

    def find(self, case: str, what: str) -> Count | None:
        return next((count for count in self.counts if (count.case, count.what) == (case, what)), None)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load(path: Path) -> Counts:
    """Reads a file that ``Counts.save`` wrote."""
    try:
        found = json.loads(path.read_text())
        return Counts(**{**found, "counts": [Count(**count) for count in found["counts"]]})
    except OSError as error:
        raise Uncountable(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise Uncountable(f"{path} is not a file that --save wrote") from None


def small_cases() -> Iterator[Case]:
    """Every op at shapes that valgrind is through with in a minute, yet millions of instructions a pass."""
    yield mingru(4, 128, 256)
    yield mingru(2, 8, 64, 14, 14)
    yield mingru(4, 128, 256, dtype=BF16)
    yield log_scan(4, 128, 256)
    yield gru_gates(4, 64, 28, 28)
    yield gru_gates(4, 64, 28, 28, dtype=BF16)
    yield gru_update(4, 64, 28, 28)
    yield gru_rcn(2, 3, 8, 16, 14, 14)
    yield gru_rcn(2, 4, 5, 16, 8, 8, dtype=BF16)
    yield mingru_stream(1, 1, 512)
    yield gru_rcn_stream(1, 1, 5, 32, 8, 8)


def passes(cases: list[Case]) -> Iterator[tuple[Case, str, measure.Task, int]]:
    """Each pass of the cases, prepared, with the number of elements of its case's outputs."""
    for case in cases:
        problem = case.problem(torch.device("cpu"))
        provider = problem.providers[OURS]
        with torch.inference_mode():
            elements = sum(out.numel() for out in measure.outputs(provider.run(*problem.inputs)))
        for what in STREAM if case.passes == STREAM else ("forward", "backward"):
            yield case, what, measure.task(what, provider, problem), elements


def perform(folder: str, *names: str) -> None:
    """What runs under callgrind: every pass of the cases named, a dump before each mark; says in ``folder`` what it did."""
    torch.set_num_threads(1)
    known = {case.name: case for case in [*all_cases(), *small_cases()]}
    cases = [known[name] for name in names]
    for _, _, task, _ in passes(cases):
        task()  # what is initialised once, or imported late, is done before anything is slow
    instrument(folder)
    mark, done = torch.ops.convrnn.cpu_isa, []
    for case, what, task, elements in passes(cases):
        mark()  # the preparation called ops too
        for _ in range(CALLS):
            task()
            mark()
        done.append((case.name, what, elements))
    Path(folder, "done.json").write_text(json.dumps({"isa": mark(), "torch": torch.__version__, "passes": done}))


def instrument(folder: str) -> None:
    """Has callgrind instrument this process from here on: importing torch under instrumentation takes minutes."""
    # max-invoke-ms=0: no ptrace, which containers refuse; so the request must find this process busy, not waiting
    options = [f"--pid={os.getpid()}", f"--vgdb-prefix={folder}/vgdb", "--max-invoke-ms=0"]
    with subprocess.Popen(["vgdb", *options, "instrumentation", "on"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            pass
    if process.returncode:
        sys.exit(f"vgdb failed ({process.returncode})")


def count(cases: Sequence[Case]) -> Counts:
    """Counts the passes of ``cases``, which must be among ``all_cases()`` and ``small_cases()``.

    Raises:
        Uncountable: valgrind is missing, or failed.
    """
    for tool in ("valgrind", "vgdb"):
        if shutil.which(tool) is None:
            raise Uncountable(
                f"{tool} was not found: install valgrind (Debian and Ubuntu: apt install valgrind; "
                "Fedora: dnf install valgrind)"
            )
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--vgdb-prefix={folder}/vgdb"),
            *(f"--toggle-collect={OPS}", f"--dump-before={MARK}", f"--callgrind-out-file={folder}/dump"),
            *("--compress-strings=no", "--compress-pos=no"),
            *(sys.executable, "-c", PERFORM, folder, *(case.name for case in cases)),
        ]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "CONVRNN_BACKEND": "auto"}
        result = subprocess.run(
            command, cwd=machine.ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
        )
        report = Path(folder, "done.json")
        if result.returncode or not report.exists():
            tail = "\n".join((result.stdout + result.stderr).splitlines()[-15:])
            raise Uncountable(f"the process under valgrind ended ({result.returncode}):\n{tail}")
        done = json.loads(report.read_text())
        counts = [
            Count(case, what, least(Path(folder), number), elements)
            for number, (case, what, elements) in enumerate(done["passes"])
        ]
    return Counts(done["isa"], done["torch"], version, counts)


def least(folder: Path, number: int) -> int:
    """The least count of the calls of a pass; each pass has CALLS dumps, and one before them of its preparation."""
    first = number * (CALLS + 1) + 2  # callgrind numbers from 1
    dumps = [folder / f"dump.{index}" for index in range(first, first + CALLS)]
    found = [instructions(dump.read_text()) for dump in dumps if dump.exists()]
    if len(found) < CALLS or not min(found):
        raise Uncountable("callgrind saw no op of convrnn: its library has no symbols (was it stripped?)")
    return min(found)


def instructions(dump: str) -> int:
    """The instructions in a dump of callgrind, those of the allocator left out.

    Raises:
        ValueError: it is none, or counts another event.
    """
    if not re.search(r"^events: Ir$", dump, re.MULTILINE):
        raise ValueError("not a dump of callgrind that counts instructions (Ir)")
    total, counted, callee = 0, True, False
    for line in dump.splitlines():
        if line.startswith("fn="):
            counted = not ALLOCATOR.match(line.removeprefix("fn="))
        elif line.startswith("calls="):
            callee = True  # the next line is the cost of what was called: it has lines of its own
        elif line[:1].isdigit():  # position, cost
            total += int(line.split()[1]) if counted and not callee else 0
            callee = False
    return total


def verdict(now: Count, before: Count | None) -> str:
    if before is None:
        return "new"
    ratio = now.instructions / before.instructions
    return "more" if ratio > 1 + LIMIT else "fewer" if ratio < 1 - LIMIT else "same"


def table(now: Counts, before: Counts | None) -> Table:
    found = Table(box=None, pad_edge=False, header_style="bold")
    found.add_column("case", no_wrap=True)
    found.add_column("pass")
    compared = ("saved", "ratio", "verdict") if before else ()
    for name in ("instructions", "per element", *compared):
        found.add_column(name, justify="right", no_wrap=True)
    for row in now.counts:
        cells: list[str | Text] = [f"{row.instructions:,}", f"{row.per_element:.2f}"]
        if before:
            old, word = before.find(row.case, row.what), verdict(row, before.find(row.case, row.what))
            cells += [f"{old.instructions:,}", f"{row.instructions / old.instructions:.4f}"] if old else ["", ""]
            cells.append(Text(word, COLOURS.get(word, "")))
        found.add_row(row.case, row.what, *cells)
    return found


def show(now: Counts, before: Counts | None, console: Console) -> int:
    """Prints the counts, against those ``before`` if there are any. Returns how many grew."""
    console.print(
        f"[bold]instructions[/] of one thread, torch {now.torch}, {now.valgrind}; kernels {now.isa} (in use: available): "
        "valgrind hides AVX-512"
    )
    for name in ("isa", "torch", "valgrind") if before else ():
        if getattr(now, name) != getattr(before, name):
            console.print(f"[yellow]saved with another {name}: {getattr(before, name)}[/]")
    console.print(table(now, before))
    if before is None:
        return 0
    words = [verdict(row, before.find(row.case, row.what)) for row in now.counts]
    console.print(
        ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        + f". Ratio: now / saved; same: within "
        f"{LIMIT:.0%}."
    )
    return words.count("more")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases whose name holds or matches it")
    parser.add_argument("--save", metavar="FILE.json", type=Path, help="write the counts")
    parser.add_argument("--compare", metavar="FILE.json", type=Path, help="compare with counts that --save wrote")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(width=120, highlight=False)
    cases = named(options.only, small_cases())
    try:
        if not cases:
            raise Uncountable(
                f"--only: no case matches {options.only!r} of: {', '.join(c.name for c in small_cases())}"
            )
        before = load(options.compare) if options.compare else None
        with console.status(f"{len(cases)} cases under valgrind, a minute or two"):
            now = count(cases)
    except Uncountable as error:
        print(f"bench.instructions: {error}", file=sys.stderr)
        return 2
    grown = show(now, before, console)
    if options.save:
        now.save(options.save)
    return int(grown > 0)


if __name__ == "__main__":
    sys.exit(main())
