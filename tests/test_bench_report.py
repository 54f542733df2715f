"""The summary below the benchmark's table: what is decided, what is not, and for want of what."""

import pytest

pytest.importorskip("rich")

from bench import report
from bench.case import OURS
from bench.results import DECIDING, Results, Row, add_speedups

pytestmark = pytest.mark.compiled


def rows(case: str, ours: list[float], plain: list[float], sweeps: list[int]) -> list[Row]:
    """convrnn's row and a baseline's, with a turn in each of ``sweeps``."""
    found = [
        Row(case, "gru_rcn", (1,), "float32", "op", provider, "forward", samples, sweeps, flop=1, bytes=1, error=0.0)
        for provider, samples in ((OURS, ours), ("plain", plain))
    ]
    add_speedups(found)
    return found


def summary(*measured: list[Row]) -> list[str]:
    return report.summary(Results({}, {}, [row for found in measured for row in found])).plain.splitlines()


def test_one_sweep_decides_nothing_and_shows_every_ratio():
    first, *lines = summary(
        rows("fast", [28 / 28, 28 / 25, 28 / 29], [28.0, 28.0, 28.0], [0, 0, 0]),
        rows("slow", [2.0, 2.0, 2.0], [1.0, 1.0, 1.0], [0, 0, 0]),
    )
    assert first == (
        f"For lack of sweeps (1 of the {DECIDING} that a verdict takes) nothing is decided in 2 measurements. "
        "The best baseline's time over ours:"
    )
    assert lines == ["  slow, forward: 0.50 (0.50-0.50)", "  fast, forward: 28.0 (25.0-29.0)"]


def test_sweeps_enough_decide():
    sweeps = list(range(DECIDING))
    lines = summary(
        rows("fast", [1.0] * 5, [2.0] * 5, sweeps),
        rows("slow", [2.0] * 5, [1.0] * 5, sweeps),
        rows("even", [1.0] * 5, [0.5, 0.5, 1.0, 2.0, 2.0], sweeps),
    )
    assert lines == [
        "Faster than the best baseline in 1 of 3 measurements, slower in 1, undecided (the spread holds 1) in 1.",
        "  slower: slow, forward: 0.50 (0.50-0.50)",
        "  undecided: even, forward: 1.00 (0.50-2.00)",
    ]


def test_an_interrupted_run_says_what_it_left_undecided():
    first, *others = summary(
        rows("fast", [1.0] * 5, [2.0] * 5, list(range(DECIDING))), rows("late", [1.0] * 4, [3.0] * 4, [0, 1, 2, 3])
    )
    assert first == (
        "Faster than the best baseline in 1 of 1 measurements, slower in 0, undecided (the spread holds 1) in 0. "
        f"For lack of sweeps (4 of the {DECIDING} that a verdict takes) nothing is decided in 1 more."
    )
    assert others == ["  late, forward: 3.00 (3.00-3.00)"]


def test_no_measurements_are_no_lack_of_sweeps():
    assert summary() == [
        "Faster than the best baseline in 0 of 0 measurements, slower in 0, undecided (the spread holds 1) in 0."
    ]
