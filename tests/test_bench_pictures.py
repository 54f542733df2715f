"""Pictures from made-up results: every group, one group, and what a run that was cut short leaves."""

import struct
from pathlib import Path

import pytest

from bench import pictures
from bench.pictures import draw, speedup
from bench.results import Refusal, Results, Row, add_speedups

pytestmark = pytest.mark.compiled

MACHINE = {"device": "a processor", "kind": "cpu", "threads": 2, "torch": "2.13.0", "date": "2026-01-02"}
PEAKS = {"copy": 30.0, "float32": 130.0, "bfloat16": 4.0}
EVERY = ["speedup", "scaling-T", "scaling-map", "scaling-B", "scaling-C", "roofline"]
STUDIES = {
    "T": [(1, 64, 8), (1, 256, 8), (1, 4096, 8)],
    "map": [(2, 4, 8, 8, 7, 7), (2, 4, 8, 8, 14, 14)],
    "B": [(1, 64, 8), (4, 64, 8)],
    "C": [(2, 4, 8, 8, 7, 7), (2, 4, 16, 16, 7, 7)],
}


def case(op: str, shape: tuple[int, ...], group: str, dtype: str = "float32", ours: float = 1.0) -> list[Row]:
    """Rows of three providers, convrnn taking ``ours`` of some time and the best of the others twice it."""
    size = 1
    for n in shape:
        size *= n
    found = []
    for what in ("stream",) if group == "streaming" else ("forward", "step"):
        times = {"convrnn": ours, "plain": 2.0, "compiled plain": 3.0}
        rows = [
            Row(
                case=f"{group} {op} {shape} {dtype}",
                op=op,
                shape=shape,
                dtype=dtype,
                group=group,
                provider=provider,
                what=what,
                samples_ms=[time * size * jitter / 1e4 for jitter in (0.9, 1.0, 1.1)],
                sweeps=[0, 1, 2],
                flop=5 * size,
                bytes=12 * size,
                error=1e-7,
            )
            for provider, time in times.items()
        ]
        add_speedups(rows)
        found += rows
    return found


def results(*cases: list[Row], **options) -> Results:
    return Results(MACHINE, PEAKS, [row for rows in cases for row in rows], **{"complete": True} | options)


def everything() -> Results:
    return results(
        case("mingru", (16, 256, 512), "op"),
        case("mingru", (16, 256, 512), "op", dtype="bfloat16"),
        case("gru_rcn", (2, 4, 8, 8, 7, 7), "op", ours=3.0),
        case("MinGRU x4", (16, 128, 128), "module"),
        case("mingru", (1, 1, 512), "streaming"),
        *(
            case("mingru" if len(shape) == 3 else "gru_rcn", shape, group)
            for group, shapes in STUDIES.items()
            for shape in shapes
        ),
    )


def names(paths: list[Path]) -> list[str]:
    return [path.name.removeprefix("cpu-").removesuffix(".png") for path in paths]


@pytest.fixture
def unsaved(monkeypatch):
    """Figures made, and not rendered, which is what takes time."""
    monkeypatch.setattr(pictures, "save", lambda figure, path, **about: None)


def test_every_picture_is_a_small_png_that_is_900_pixels_wide_or_more(tmp_path, capsys):
    everything().save(tmp_path / "cpu.json")
    pictures.main([str(tmp_path / "cpu.json"), str(tmp_path / "new")])
    paths = [Path(text) for text in capsys.readouterr().out.split()]
    assert names(paths) == EVERY and sorted((tmp_path / "new").iterdir()) == sorted(paths)
    for path in paths:
        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data.startswith(b"\x89PNG\r\n") and 10_000 < len(data) < 150_000, path
        assert width >= 900 and height >= 400, path


@pytest.mark.usefixtures("unsaved")
@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("op", ["speedup", "roofline"]),
        ("module", ["speedup", "roofline"]),
        ("streaming", ["speedup"]),
        *((group, [f"scaling-{group}"]) for group in STUDIES),
    ],
)
def test_one_group_draws_its_own_pictures_alone(tmp_path, group, expected):
    found = everything()
    found.rows = [row for row in found.rows if row.group == group]
    assert names(draw(found, tmp_path, "cpu")) == expected


@pytest.mark.usefixtures("unsaved")
def test_what_cannot_be_drawn_is_left_out(tmp_path):
    assert draw(Results(MACHINE, {}), tmp_path / "none", "cpu") == [] and not (tmp_path / "none").exists()
    assert draw(results(case("mingru", (1, 64, 8), "T")), tmp_path, "cpu") == []  # one point is no line
    alone = [row for row in case("mingru", (1, 64, 8), "op") if row.provider == "convrnn"]
    for row in alone:
        row.speedup = row.speedup_low = row.speedup_high = None
    assert names(draw(results(alone), tmp_path, "cpu")) == ["roofline"]
    refused = results([row for row in everything().rows if row.provider == "plain"])
    assert names(draw(refused, tmp_path, "cpu")) == [name for name in EVERY if name.startswith("scaling")]


def test_losses_refusals_and_an_unfinished_run_are_said():
    found = results(case("gru_rcn", (2, 4, 8, 8, 7, 7), "op", ours=4.0), complete=False)
    found.refused = [Refusal(found.rows[0].case, "hoisted", "wrong"), Refusal("another case", "hoisted", "wrong")]
    figure = speedup(found)
    words = [text.get_text() for part in figure.subfigs for text in part.texts]
    assert any("incomplete run" in text for text in words)
    assert any("hoisted in op gru_rcn" in text.replace("\n", " ") for text in words)
    assert not any("another case" in text for text in words)
    axes = figure.subfigs[1].axes[0]
    losses = [text for text in axes.texts if text.get_weight() == "bold"]
    assert [text.get_text().strip() for text in losses] == ["0.50", "0.50"]
    assert axes.get_xlim()[0] < min(text.get_position()[0] for text in losses)
