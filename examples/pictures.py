"""The pictures of a run: learning curve, confusion matrix and a strip of frames with predictions.

Colours are from Okabe and Ito's palette, which colour-blind readers can tell apart; marks and words say the same again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

__all__ = ["Sample", "confusion_matrix", "learning_curve", "prediction_strip"]

BLUE, ORANGE = "#0072B2", "#D55E00"
LOSS_AND_ACCURACY = (("loss", "cross-entropy (nats)", 1), ("accuracy", "accuracy (%)", 100))
MOST_LABELS = 25  # classes above which a matrix has no room for names and counts


@dataclass(frozen=True)
class Sample:
    """Frames (T, H, W, 3) of a video, its class and the class predicted with what probability."""

    frames: NDArray[np.uint8]
    truth: str
    predicted: str
    probability: float


def learning_curve(
    rows: Sequence[dict[str, Any]],
    path: Path,
    panels: Sequence[tuple[str, str, float]] = LOSS_AND_ACCURACY,
    x: str = "epoch",
) -> None:
    """Metrics of training and validation over `x`; a panel is (metric, label of its axis, factor to its unit)."""
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (name, label, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for kind, colour, style in (("train", BLUE, "o-"), ("val", ORANGE, "s--")):
            seen = [row for row in rows if f"{kind}_{name}" in row]
            values = [unit * row[f"{kind}_{name}"] for row in seen]
            kinds = {"train": "training", "val": "validation"}
            axes.plot([row[x] for row in seen], values, style, color=colour, label=kinds[kind], markersize=4)
        axes.set(xlabel=x, ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 102 if unit == 100 else None)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def confusion_matrix(counts: NDArray[np.int64], classes: Sequence[str], title: str, path: Path) -> None:
    """Videos by true class (rows) and predicted class (columns)."""
    n = len(classes)
    side = min(12.0, 3 + 0.6 * n)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    if n <= MOST_LABELS:
        axes.set_xticks(range(n), classes, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(n), classes)
        for row, column in np.argwhere(counts):
            colour = "black" if share[row, column] > 0.5 else "white"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    figure.savefig(path, dpi=120)


def prediction_strip(samples: Sequence[Sample], title: str, path: Path) -> None:
    """A row of frames for each sample, with what it is and what it was taken for."""
    columns = len(samples[0].frames)
    figure = Figure(figsize=(3.5 + 0.9 * columns, 0.5 + 1.0 * len(samples)), layout="constrained")
    grid = figure.subplots(len(samples), columns + 1, squeeze=False, width_ratios=[3.4, *[1] * columns])
    for row, sample in zip(grid, samples, strict=True):
        _caption(row[0], sample)
        for axes, frame in zip(row[1:], sample.frames, strict=True):
            axes.imshow(frame)
            axes.set_axis_off()
    for number, axes in enumerate(grid[0, 1:], start=1):
        axes.set_title(f"frame {number}", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def _caption(axes: Axes, sample: Sample) -> None:
    right = sample.truth == sample.predicted
    axes.text(0, 0.72, f"true: {sample.truth}", fontsize=9, va="center")
    axes.text(
        0, 0.28, f"{'✓' if right else '✗'} predicted: {sample.predicted} ({sample.probability:.0%})",
        fontsize=9, va="center", color=BLUE if right else ORANGE, weight="normal" if right else "bold",
    )  # fmt: skip
    axes.set_axis_off()
