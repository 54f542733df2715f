"""Results as pictures: speed-up over the best baseline, time along one axis, and the roofline.

``python -m bench.pictures RESULTS.json [FOLDER]`` draws them again. Colours are mostly from Okabe and Ito's palette,
which colour-blind readers can tell apart; markers, line styles and words say the same again.
"""

import argparse
import io
import math
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .case import GRAPH, OURS, TRAINING
from .results import Results, Row, best_baseline, load
from .run import COMPILED

WIDTH, DPI = 8.5, 130  # inches; shown at some 900 pixels
STYLE = {"font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "figure.facecolor": "white"}
STYLE |= {"axes.grid": True, "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
BLUE, VERMILION, GREEN, ORANGE, PINK, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
LOOKS = tuple(zip((BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, "#332288", "0.55", "#661100"), "osD^vPX<>", strict=True))
GREY = "0.35"
PASSES = {"forward": SKY, "backward": ORANGE, "step": BLUE, "stream": GREEN}
WORDS = {"step": "training step", "stream": "streaming step"}
BAR, GAP = 0.11, 0.085  # inches
SYMBOLS = {"T": "T", "map": "S", "B": "B", "C": "C"}
AXES = {"T": "T, time steps", "map": "S, side of the map (pixels)", "B": "B, sequences in a batch", "C": "C, channels"}
SPREAD = 0.028  # decades between points of one intensity


def draw(results: Results, folder: Path, stem: str) -> list[Path]:
    """Writes ``folder/<stem>-<picture>.png`` for every picture that there are rows for; returns their paths."""
    paths = []
    with matplotlib.rc_context(STYLE):
        figures = {"speedup": speedup(results)}
        figures |= {f"scaling-{group}": scaling(results, group) for group in AXES}
        figures["roofline"] = roofline(results)
        for name, figure in figures.items():
            if figure is not None:
                folder.mkdir(parents=True, exist_ok=True)
                paths.append(folder / f"{stem}-{name}.png")
                save(figure, paths[-1], results=results.digest())
    return paths


def save(figure: Figure, path: Path, **about: str) -> None:
    """Writes a PNG of few colours, which takes a third of the bytes; rare colours are kept. ``about`` becomes its metadata."""
    full = io.BytesIO()
    figure.savefig(full, format="png", dpi=DPI)
    few = Image.open(full).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    text = PngInfo()
    for name, value in about.items():
        text.add_text(name, value)
    few.save(path, optimize=True, pnginfo=text)


def speedup(results: Results) -> Figure | None:
    """The best baseline's time over convrnn's as bars from 1: to the left where convrnn is the slower one."""
    tabled = [row for row in results.rows if row.group in ("op", "module", "streaming")]
    rows = [row for row in tabled if row.ours and row.verdict]
    panels: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        title = "minGRU (B, T, C) or (B, T, C, H, W)"
        if any(name in row.op.lower() for name in ("gru_", "convgru")):
            title = "GRU-RCN, ConvGRU (B, T, Ox, Oh, H, W); gates (B, C, H, W)"
        how = GRAPH if row.provider.endswith(GRAPH) else ""
        panels.setdefault(title, {}).setdefault(row.case.removesuffix(" float32") + how, []).append(row)
    if not panels:
        return None
    heights = [sum(BAR * len(found) + GAP for found in cases.values()) for cases in panels.values()]
    figure, body = frame(
        results,
        "Speed-up of convrnn over the best baseline",
        [Patch(color=PASSES[p], label=WORDS.get(p, p)) for p in PASSES if any(row.what == p for row in rows)],
        "Bars: median of turns; whiskers: lowest to highest sweep. Numbers: every loss, and the last pass of a case. "
        "Baseline: the fastest provider that is not convrnn, under torch.compile too where that was timed. "
        "float32 unless named." + refusals(results, tabled),
        sum(heights) + 0.55 * len(heights) + 0.45,
    )
    grid = body.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    low, high = min(1, *(row.speedup_low for row in rows)), max(1, *(row.speedup_high for row in rows))
    room = max(1.25, (high / low) ** 0.13)  # for a number at either end
    grid[0].set(xscale="log", xlim=(min(0.65, low / room), high * room))
    for axes, (title, cases) in zip(grid, panels.items(), strict=True):
        bars(axes, cases)
        axes.set_title(title, pad=18)
        axes.axvspan(axes.get_xlim()[0], 1, color=VERMILION, alpha=0.09, linewidth=0, zorder=0)
        above = {"transform": axes.get_xaxis_transform(), "va": "bottom", "fontsize": 9}
        axes.text(0.97, 1, "slower", ha="right", color=VERMILION, **above)
        axes.text(1.03, 1, "faster", ha="left", color=BLUE, **above)
    name_ticks(grid[-1].xaxis, unit="×")
    grid[-1].set_xlabel("the best baseline's time over convrnn's (ratio)")
    return figure


def bars(axes: Axes, cases: dict[str, list[Row]]) -> None:
    """A bar for each pass of each case, from top to bottom; one unit of the axis is an inch."""
    y, ticks, group = GAP / 2, {}, None
    for name, rows in cases.items():
        if group not in (None, rows[0].group):
            axes.axhline(y - GAP / 2, color="0.6", linewidth=0.8)
        group = rows[0].group
        ticks[y + BAR * len(rows) / 2] = name
        for row in rows:
            middle, lost = y + BAR / 2, row.speedup < 1
            axes.barh(middle, row.speedup - 1, BAR, 1, color=PASSES[row.what], edgecolor="white", linewidth=0.5)
            axes.plot((row.speedup_low, row.speedup_high), (middle, middle), color="black", linewidth=1)
            if lost or row is rows[-1]:
                end = min(row.speedup, row.speedup_low) if lost else max(row.speedup, row.speedup_high)
                digits = max(0, (1 if lost else 2) - math.floor(math.log10(row.speedup)))
                look = {"ha": "right", "color": VERMILION, "weight": "bold"} if lost else {"ha": "left"}
                axes.text(end, middle, f" {row.speedup:.{digits}f} ", va="center_baseline", fontsize=8, **look)
            y += BAR
        y += GAP
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(y - GAP / 2, 0)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def scaling(results: Results, group: str) -> Figure | None:
    """Time against the size that a study varies: a line of panels for each op, a column for each pass."""
    rows = [row for row in results.rows if row.group == group]
    studies = {op: [row for row in rows if row.op == op] for op in dict.fromkeys(row.op for row in rows)}
    studies = {op: found for op, found in studies.items() if varying(found)}
    if not studies:
        return None
    rows = [row for found in studies.values() for row in found]
    passes = [what for what in TRAINING if any(row.what == what for row in rows)]
    looks = looks_of([base(row.provider) for row in rows])
    handles = [Line2D([], [], color=look[0], marker=look[1], label=name) for name, look in looks.items()]
    for dashes, label in sorted({dashed(row.provider) for row in rows if row.provider not in looks}):
        handles.append(Line2D([], [], color=GREY, linestyle=dashes, label=label))
    figure, body = frame(
        results,
        f"Time against {AXES[group]}",
        handles,
        "Lines: median of turns; bands: 20th to 80th percentile; grey: in proportion to the arithmetic."
        + refusals(results, rows),
        2.6 * len(studies),
    )
    grid = body.subplots(len(studies), len(passes), sharex="row", sharey="row", squeeze=False)
    for panels, (op, found) in zip(grid, studies.items(), strict=True):
        axis = varying(found)[-1]
        sizes = [SYMBOLS[group] if i in varying(found) else str(size) for i, size in enumerate(found[0].shape)]
        panels[0].set(xscale="log", yscale="log", ylabel="time (ms)")
        for axes, what in zip(panels, passes, strict=True):
            for provider in dict.fromkeys(row.provider for row in found if row.what == what):
                timed = [row for row in found if (row.what, row.provider) == (what, provider)]
                curve(axes, sorted(timed, key=lambda row: row.shape), axis, *looks[base(provider)])
            axes.set_title(f"{op} ({', '.join(sizes)}), {WORDS.get(what, what)}")
            axes.set_xlabel(AXES[group])
        panels[0].set_ylim(panels[0].get_ylim())  # the guides do not widen it
        for axes, what in zip(panels, passes, strict=True):
            guide(axes, [row for row in found if (row.what, row.provider) == (what, OURS)], axis, SYMBOLS[group])
        name_ticks(panels[0].xaxis, at=sorted({row.shape[axis] for row in found}))
        name_ticks(panels[0].yaxis)
    body.align_ylabels()
    return figure


def varying(rows: list[Row]) -> list[int]:
    """Which entries of the rows' shapes differ."""
    return [i for i, sizes in enumerate(zip(*(row.shape for row in rows), strict=True)) if len(set(sizes)) > 1]


def base(provider: str) -> str:
    """Who computes, however it is run."""
    return provider.removeprefix(COMPILED).removesuffix(GRAPH)


def dashed(provider: str) -> tuple[str, str]:
    """The line style that says how a provider is run, and its meaning."""
    if provider.startswith(COMPILED):
        return ":", COMPILED.strip()
    return ("--", GRAPH.strip()) if provider.endswith(GRAPH) else ("-", "")


def curve(axes: Axes, rows: list[Row], axis: int, colour: str, marker: str) -> None:
    x = [row.shape[axis] for row in rows]
    axes.plot(x, [row.ms for row in rows], dashed(rows[0].provider)[0], color=colour, marker=marker, markersize=5)
    low, high = [row.p20_ms for row in rows], [row.p80_ms for row in rows]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def guide(axes: Axes, rows: list[Row], axis: int, symbol: str) -> None:
    """A line below convrnn's last point, as steep as the arithmetic grows."""
    if len(rows) < 2:
        return
    first, last = min(rows, key=lambda row: row.shape[axis]), max(rows, key=lambda row: row.shape[axis])
    start, end = first.shape[axis], last.shape[axis]
    slope = round(math.log(last.flop / first.flop) / math.log(end / start))
    top = last.ms / 2
    axes.plot((start, end), (top * (start / end) ** slope, top), color="0.65", linewidth=1, zorder=1)
    axes.text(end, top, f" ∝ {symbol}" + {1: "", 2: "²"}.get(slope, f"^{slope}"), va="center", color=GREY, fontsize=9)


def roofline(results: Results) -> Figure | None:
    """Rate against FLOP per byte of convrnn and of the best baselines, under what the machine reaches."""
    rows = [row for row in results.rows if row.group in ("op", "module") and row.provider == OURS]
    rows = [row for row in rows if row.what in ("forward", "step") and {"copy", row.dtype} <= results.peaks.keys()]
    if not rows:
        return None
    passes = [what for what in TRAINING if any(row.what == what for row in rows)]
    dtypes = sorted({row.dtype for row in rows}, key=lambda dtype: dtype != "float32")
    looks = looks_of([kind(row) for row in rows])
    marks = [mark(look, label=name) for name, look in looks.items()]
    marks += [mark(("0.5", "o"), label="best baseline", markerfacecolor="white")]
    marks += [mark(("0.8", "o"), label=dtype, markeredgecolor="black") for dtype in dtypes if dtype != "float32"]
    figure, body = frame(
        results,
        "Roofline",
        [Line2D([], [], **style) for style in marks],
        "Filled: convrnn; hollow, on the same stem: the best baseline. Roofs: measured copy bandwidth, and the fastest "
        "library product found for a dtype. A point above the sloped roof ran from cache; one above the flat roof multiplied "
        "less than the definition, which is what counts here (Winograd's method). Black edges and a dashed roof: 16-bit "
        "tensors, whose arithmetic may be float32. Points of one intensity stand side by side.",
        3.5 * len(passes) + 0.3,
    )
    grid = body.subplots(len(passes), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    corner = max(results.peaks[dtype] for dtype in dtypes) / results.peaks["copy"]
    places = [corner, *(row.flop / row.bytes for row in rows)]
    grid[0].set(xscale="log", yscale="log", xlim=(min(places) / 2, max(places) * 2))
    for axes, what in zip(grid, passes, strict=True):
        for row, x in spread([row for row in rows if row.what == what]):
            points(axes, x, row, best_baseline(row, results.rows), looks[kind(row)])
        axes.set_title(WORDS.get(what, what))
        axes.set_ylabel("GFLOP/s")
    for axes in grid:
        roofs(axes, results.peaks, dtypes)
    grid[-1].set_xlabel("FLOP per byte that has to be moved")
    name_ticks(grid[-1].xaxis)
    name_ticks(grid[-1].yaxis)
    return figure


def kind(row: Row) -> str:
    """The op without its number of layers."""
    return row.op.partition(" x")[0]


def spread(rows: list[Row]) -> list[tuple[Row, float]]:
    """Each row with its FLOP per byte, moved a little where others have the same."""
    places = [row.flop / row.bytes for row in rows]
    alike = [round(math.log10(x), 2) for x in places]
    shifts = [alike[:i].count(x) - (alike.count(x) - 1) / 2 for i, x in enumerate(alike)]
    return [(row, x * 10 ** (SPREAD * shift)) for row, x, shift in zip(rows, places, shifts, strict=True)]


def points(axes: Axes, x: float, row: Row, other: Row | None, look: tuple[str, str]) -> None:
    edge = {"markeredgecolor": look[0] if row.dtype == "float32" else "black"}
    if other is not None:
        axes.plot((x, x), (other.gflop_s, row.gflop_s), color=look[0], linewidth=0.8, alpha=0.6, zorder=2)
        axes.plot(x, other.gflop_s, **mark(look, markerfacecolor="white", **edge))
    axes.plot(x, row.gflop_s, **mark(look, **edge))


def mark(look: tuple[str, str], **style: object) -> dict[str, object]:
    return {"color": look[0], "marker": look[1], "linestyle": "", "markersize": 6.5, "zorder": 3, **style}


def roofs(axes: Axes, peaks: dict[str, float], dtypes: list[str]) -> None:
    """The measured limits, from one side of the panel to the other."""
    left, right = axes.get_xlim()
    highest = max(peaks[dtype] for dtype in dtypes)
    corner = highest / peaks["copy"]
    style = {"color": "black", "linewidth": 1.2, "zorder": 1}
    words = {"fontsize": 9, "color": GREY}
    axes.plot((left, corner), (left * peaks["copy"], highest), **style)
    middle = math.sqrt(left * corner)
    slope = f"copy: {number(peaks['copy'], 3)} GB/s"
    axes.text(0.95 * middle, middle * peaks["copy"], slope, ha="right", va="bottom", **words)
    for dtype in dtypes:
        peak, dashes = peaks[dtype], "-" if dtype == "float32" else "--"
        axes.plot((peak / peaks["copy"], right), (peak, peak), dashes, **style)
        side = "bottom" if peak == highest else "top"  # so that the words of two alike stand apart
        axes.text(right, peak, f" {dtype}\n {number(peak, 3)}\n GFLOP/s", va=side, linespacing=1, **words)


def number(value: float, digits: int = 6) -> str:
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def looks_of(names: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name."""
    return dict(zip(dict.fromkeys(names), cycle(LOOKS), strict=False))


def frame(
    results: Results, title: str, handles: Sequence[Line2D | Patch], note: str, height: float
) -> tuple[Figure, SubFigure]:
    """A figure with a title, a legend and a note; and the part of it, ``height`` inches, for the panels."""
    machine = results.machine
    threads = [f"{machine['threads']} threads"] if machine["kind"] == "cpu" else []
    where = [machine["device"], *threads, f"torch {machine['torch']}", machine["date"]]
    where += [] if results.complete else ["incomplete run"]
    columns = max(1, min(len(handles), 120 // (8 + max(len(handle.get_label()) for handle in handles))))
    notes = textwrap.wrap(note, 126, break_on_hyphens=False)
    heights = [0.55 + 0.21 * math.ceil(len(handles) / columns), height, 0.1 + 0.17 * len(notes)]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    head, body, foot = figure.subfigures(3, 1, height_ratios=heights)
    x, top = 0.012, 1 - 0.08 / heights[0]
    head.text(x, top, title, va="top", fontsize=12, weight="bold")
    head.text(x, top - 0.21 / heights[0], ", ".join(where), va="top", color=GREY)
    head.legend(handles=handles, loc="lower left", ncols=columns, borderaxespad=0.1, fontsize=9.5)
    foot.text(x, 1, "\n".join(notes), va="top", fontsize=9, color=GREY)
    return figure, body


def name_ticks(axis: Axis, unit: str = "", at: Sequence[float] = ()) -> None:
    """Plain numbers on a logarithmic axis: at the places given, or at as many a decade as there is room for."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high / low < 1e4 else (1,)
    axis.set_major_locator(FixedLocator(at) if at else LogLocator(subs=subs, numticks=30))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value) + unit))
    axis.set_minor_locator(NullLocator() if at else axis.get_minor_locator())
    axis.set_minor_formatter(NullFormatter())


def refusals(results: Results, rows: list[Row]) -> str:
    """A sentence on what is missing from the cases of these rows."""
    found = {row.case: [r.provider for r in results.refused if r.case == row.case] for row in rows}
    words = [f"{', '.join(names)} in {case.removesuffix(' float32')}" for case, names in found.items() if names]
    return f" Refused, and not timed: {'; '.join(words)}." if words else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("results", metavar="RESULTS.json", type=Path)
    parser.add_argument("folder", metavar="FOLDER", type=Path, nargs="?", help="default: that of RESULTS.json")
    options = parser.parse_args(argv)
    print(*draw(load(options.results), options.folder or options.results.parent, options.results.stem), sep="\n")


if __name__ == "__main__":
    main()
