"""Writes the generated parts of README.md and bench/README.md from results files: ``python -m bench.readme``.

A part stands between two comments, the first of which names its file; ``tests/test_bench_readme.py`` fails where a part and
its file disagree.
"""

import re
import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from .case import GRAPH
from .gru import gru_rcn
from .machine import ROOT
from .report import ratio, spread, verdicts
from .results import Results, Row, best_baseline, load
from .scans import mingru

# The forms of the two projects that convrnn re-creates.
ORIGINAL = ("log space", "six convolutions")


def machine(results: Results) -> str:
    found = results.machine
    return (
        f"{found['device']}, {found['threads']} thread{'s' * (found['threads'] != 1)}, {found['kernels']} kernels, torch "
        f"{found['torch']}, commit {found['commit']}, {found['date']}. Measured peaks: copy {results.peaks['copy']:.0f} GB/s, "
        f"float32 {results.peaks['float32']:.0f} GFLOP/s."
    )


def performance(results: Results) -> str:
    """A line for each case: times, and how many times convrnn's the best baseline's time is."""
    lines = [
        machine(results),
        "",
        "| case | forward or stream | backward | training step | best baseline of the last pass | last pass over the original form | kept for backward, MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [row for row in results.rows if row.group in ("op", "module", "streaming")]
    found = [row for row in rows if row.ours]
    for case, provider in dict.fromkeys((row.case, row.provider) for row in found):
        ours = {row.what: row for row in found if (row.case, row.provider) == (case, provider)}
        last = list(ours.values())[-1]
        best = best_baseline(last, rows)
        forms = [form + (GRAPH if provider.endswith(GRAPH) else "") for form in ORIGINAL]
        original = next((r for r in rows if (r.case, r.what) == (case, last.what) and r.provider in forms), None)
        lines.append(
            f"| {case}{GRAPH if provider.endswith(GRAPH) else ''} "
            f"| {cell(ours.get('forward') or ours.get('stream'))} | {cell(ours.get('backward'))} "
            f"| {cell(ours.get('step'))} | {best.provider if best else ''} "
            f"| {ratio(original.ms / last.ms) + 'x' if original else ''} "
            f"| {kept(last)}{' against ' + kept(original) if original and original.kept_bytes is not None else ''} |"
        )
    return "\n".join([*lines, "", verdicts([row for row in found if row.verdict])])


def cell(row: Row | None) -> str:
    """Milliseconds, the speed-up and its spread; bold unless the spread lies above 1."""
    if row is None:
        return ""
    if not row.verdict:
        return f"{row.ms:.3g}"
    speedup = f"{ratio(row.speedup)}x: {spread(row)}"
    return f"{row.ms:.3g} ({speedup if row.verdict == 'faster' else f'**{speedup}**'})"


def kept(row: Row) -> str:
    return "" if row.kept_bytes is None else f"{row.kept_bytes / 1e6:.3g}"


def study(results: Results) -> str:
    """A table for each op and axis: time of a call, every provider, and what a training step needs of memory."""
    parts = [machine(results)]
    rows = [row for row in results.rows if row.group in ("T", "B", "C", "map")]
    for (op, axis), group in groupby(
        sorted(rows, key=lambda row: (row.op, row.group)), lambda row: (row.op, row.group)
    ):
        found = list(group)
        shapes = list(dict.fromkeys(row.shape for row in found))
        names = list(dict.fromkeys(row.provider for row in found))
        parts += [
            "",
            f"`{op}` along {axis}: forward / training step in ms (p20-p80) [MB that the step adds at its peak]",
            "",
        ]
        parts += ["| shape | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
        for shape in shapes:
            cells = []
            for name in names:
                passes = {row.what: row for row in found if (row.shape, row.provider) == (shape, name)}
                cells.append(" / ".join(time(passes[what]) for what in ("forward", "step") if what in passes))
            parts.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(parts)


def time(row: Row) -> str:
    memory = "" if row.what == "forward" or row.peak_bytes is None else f" [{row.peak_bytes / 1e6:.3g}]"
    return f"{row.ms:.3g} ({row.p20_ms:.3g}-{row.p80_ms:.3g}){memory}"


# GB/s of memory and TFLOP/s of dense float32, tf32 and bfloat16 products, from the makers' data sheets.
DEVICES = {"A100 80 GB": (2039, 19.5, 156, 312), "H100 SXM": (3350, 67, 494, 989), "H200": (4800, 67, 494, 989)}
DEVICES |= {"B200": (8000, 75, 1125, 2250)}
FLOORS = [mingru(16, 256, 512), mingru(1, 65536, 64), mingru(4, 16, 64, 56, 56), mingru(16, 10, 256, 14, 14)]
FLOORS += [gru_rcn(16, 10, 64, 64, 7, 7), gru_rcn(4, 10, 64, 64, 28, 28), gru_rcn(16, 10, 256, 256, 14, 14)]


def floors() -> str:
    """What a training step takes at least on a GPU: bytes over bandwidth, or FLOP over the products' rate, in float32
    without and with tf32, and in bfloat16."""
    lines = ["| training step | MB | GFLOP | " + " | ".join(f"{name}, us" for name in DEVICES) + " |"]
    lines.append("| --- " * (3 + len(DEVICES)) + "|")
    for case in FLOORS:
        work = case.work("step")
        cells = []
        for bandwidth, *rates in DEVICES.values():
            # float32 moves twice what bfloat16 does; a scan's arithmetic is no product, and hides behind its bytes
            moved = [work.bytes / share / bandwidth / 1e3 for share in (1, 1, 2)]
            if case.op == "gru_rcn":
                moved = [max(us, work.flop / rate / 1e6) for us, rate in zip(moved, rates, strict=True)]
            cells.append(" / ".join(f"{us:.0f}" for us in dict.fromkeys(moved)))
        lines.append(
            f"| {case.op} {case.shape} | {work.bytes / 1e6:.1f} | {work.flop / 1e9:.2f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def measured(name: str, render: Callable[[Results], str]) -> tuple[str, Callable[[], str]]:
    return name, lambda: render(load(ROOT / name))


# Each document's parts, by the name that stands in the comment before them.
PARTS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": dict([measured("bench/results/cpu.json", performance)]),
    ROOT / "bench" / "README.md": dict(
        [
            measured("bench/results/scaling-2-threads.json", study),
            measured("bench/results/scaling-1-thread.json", study),
            ("floors", floors),
        ]
    ),
}


def rewritten(document: Path) -> str:
    """The document with every generated part made anew."""
    text = document.read_text()
    for name, render in PARTS[document].items():
        part = re.compile(rf"(<!-- begin {re.escape(name)}[^>]* -->\n).*?(<!-- end -->)", re.DOTALL)
        if not part.search(text):
            raise ValueError(f"{document} has no comment that begins {name}")
        body = render()
        text = part.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main() -> int:
    for document in PARTS:
        document.write_text(rewritten(document))
        print(f"written: {document.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
