"""Results as a table in the terminal."""

from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .case import OURS, TRAINING
from .measure import TOLERANCE
from .results import DECIDING, Results, Row

WIDTH = 176  # the table's; a narrower terminal wraps it
LEGEND = (
    "ms: median (p20-p80) of turns spread over the run; x: the best baseline's time over this one's, in the same sweep; GB/s: bytes "
    "that cannot be avoided; kept: for backward; peak: memory a training step adds; floors: "
    "forward / step over the time that their bytes alone (torch.add beside it, or the copy's rate) or their arithmetic (the peak) "
    "take; rates: of the last pass shown. Yellow "
    "errors: inexact by nature."
)
LIMITS = {str(dtype).removeprefix("torch."): limit for dtype, limit in TOLERANCE.items()}


def show(results: Results, console: Console) -> None:
    """Prints the machine, a line for each provider of each case, what was refused, and where convrnn loses."""
    console.print(heading(results))
    console.print(
        f"measured peaks: copy {results.peaks['copy']:.1f} GB/s, "
        + ", ".join(f"{dtype} {peak:.0f} GFLOP/s" for dtype, peak in results.peaks.items() if dtype != "copy")
    )
    for number, (case, rows) in enumerate(groupby(results.rows, lambda row: row.case)):
        console.print(table(results, case, list(rows), header=number == 0))
    console.print(LEGEND, style="italic")
    for refusal in results.refused:
        console.print(f"[bold red]refused[/] {refusal.case}: {refusal.provider}: {refusal.reason}", highlight=False)
    console.print(summary(results), highlight=False)
    if not results.complete:
        console.print("[bold yellow]incomplete: the run was interrupted[/]")


def heading(results: Results) -> str:
    """The machine and the versions."""
    machine = results.machine
    return (
        f"[bold]{machine['device']}[/], {machine['threads']} threads, {machine['kernels']} kernels, {machine['date']}\n"
        f"convrnn {machine['convrnn']} at {machine['commit']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"Python {machine['python']}, {machine['system']}"
    )


def table(results: Results, case: str, rows: list[Row], header: bool) -> Table:
    """A line for each provider; rates are those of the training step, or of the one pass there is."""
    found = Table(title=case, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=header)
    found.add_column("provider", width=22, no_wrap=True)
    for what in ("forward or stream", "backward", "step"):
        found.add_column(f"{what}, ms", width=22, no_wrap=True)
        found.add_column("x", justify="right", width=5)
    found.add_column("floors", justify="right", width=11, no_wrap=True)
    for name in ("GB/s", "of copy", "GFLOP/s", "of peak", "kept MB", "peak MB", "error"):
        found.add_column(name, justify="right", width=7, no_wrap=True)
    for provider in dict.fromkeys(row.provider for row in rows):
        found.add_row(*line(results, {row.what: row for row in rows if row.provider == provider}))
    return found


def line(results: Results, passes: dict[str, Row]) -> list[str | Text]:
    last = list(passes.values())[-1]
    ours = OURS in last.provider
    cells: list[str | Text] = [Text("  " + last.provider, style="cyan" if ours else "")]
    for what in TRAINING:
        row = passes.get("stream" if what == "forward" and "stream" in passes else what)
        cells.append(time(row) if row else "")
        cells.append(Text(ratio(row.speedup), style=colour(row) if ours else "") if row else "")
    exact = last.error <= LIMITS[last.dtype]
    return [
        *cells,
        "/".join(ratio(results.floors(passes[what])) for what in ("forward", "stream", "step") if what in passes),
        f"{last.gb_s:.1f}",
        f"{results.copy_share(last):.0%}",
        f"{last.gflop_s:.1f}",
        f"{results.peak_share(last):.0%}",
        megabytes(last.kept_bytes),
        megabytes(last.peak_bytes),
        Text(f"{last.error:.0e}", style="" if exact else "yellow"),
    ]


def time(row: Row) -> str:
    return (
        f"{row.ms:.3g} ({row.p20_ms:.3g}-{row.p80_ms:.3g})"
        if row.ms < 1000
        else f"{row.ms:.0f} ({row.p20_ms:.0f}-{row.p80_ms:.0f})"
    )


def ratio(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.1f}" if speedup >= 10 else f"{speedup:.2f}"


def colour(row: Row) -> str:
    """Green or red where the spread of the ratio lies on one side of 1."""
    return {"faster": "green", "slower": "red"}.get(row.verdict, "")


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def summary(results: Results) -> Text:
    """How often convrnn is faster than every baseline, how often it is not, and by how much; all ratios that are of too few
    sweeps to decide anything."""
    rows = [row for row in results.rows if row.ours and row.verdict]
    text = Text(verdicts(rows))
    for row in sorted(rows, key=lambda row: row.speedup):
        if row.verdict != "faster":
            label, where = f"{row.verdict}: " if row.decidable else "", row.provider.removeprefix(OURS)
            text.append(f"\n  {label}{row.case}, {row.what}{where}: {ratio(row.speedup)} ({spread(row)})")
    return text


def verdicts(rows: list[Row]) -> str:
    """In how many of ``rows`` convrnn is faster than the best baseline, slower, or neither; of how many nothing can be told."""
    found, few = [row.verdict for row in rows if row.decidable], [row for row in rows if not row.decidable]
    sentences = []
    if found or not rows:
        sentences.append(
            f"Faster than the best baseline in {found.count('faster')} of {len(found)} measurements, slower in "
            f"{found.count('slower')}, undecided (the spread holds 1) in {found.count('undecided')}."
        )
    if few:
        most = max(len(set(row.sweeps)) for row in few)
        sentences.append(
            f"For lack of sweeps ({most} of the {DECIDING} that a verdict takes) nothing is decided in "
            f"{len(few)} {'more' if found else 'measurements'}."
        )
        if not found:
            sentences.append("The best baseline's time over ours:")
    return " ".join(sentences)


def spread(row: Row) -> str:
    return f"{ratio(row.speedup_low)}-{ratio(row.speedup_high)}"
