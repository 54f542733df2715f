"""The measured parts of the READMEs are what their results files say."""

import pytest

pytest.importorskip("rich")

import torch
from PIL import Image

from bench import readme
from bench.cases import PEERS, select


@pytest.mark.parametrize("document", readme.PARTS, ids=lambda path: str(path.relative_to(readme.ROOT)))
def test_document_agrees_with_its_results(document):
    assert document.read_text() == readme.rewritten(document), "run python -m bench.readme"


def test_a_changed_figure_is_noticed(monkeypatch, tmp_path):
    source = readme.ROOT / "README.md"
    text = source.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| mingru "))
    changed = tmp_path / "README.md"
    changed.write_text(text.replace(row, row.replace("x: ", "1x: ", 1)))
    monkeypatch.setattr(readme, "PARTS", {changed: readme.PARTS[source]})
    assert changed.read_text() != text
    assert readme.rewritten(changed) == text


def test_a_missing_part_is_an_error(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing generated here\n")
    monkeypatch.setattr(readme, "PARTS", {page: {"floors": readme.floors}})
    with pytest.raises(ValueError, match="begins floors"):
        readme.rewritten(page)


def test_published_results_are_whole():
    for name in ("cpu", "scaling-1-thread", "scaling-2-threads"):
        results = readme.load(readme.ROOT / "bench" / "results" / f"{name}.json")
        assert results.complete and not results.refused and results.options["effort"] == "default"
        assert not results.machine["commit"].endswith("+"), "measured with local changes"


def test_published_figures_are_of_every_case_and_provider():
    """In the run that README shows; peers are optional, and torch.compile is not in every case."""
    results = readme.load(readme.ROOT / "bench" / "results" / "cpu.json")
    assert not results.options["only"] and results.options["seconds"] < 300
    found = {(row.case, row.provider) for row in results.rows}
    for case in select("", exhaustive=False):
        names = case.problem(torch.device("cpu")).providers.keys() - set(PEERS)
        assert {(case.name, name) for name in names} <= found
        assert not case.compile or (case.name, "compiled convrnn") in found


@pytest.mark.parametrize("name", ["cpu", "scaling-2-threads"])
def test_published_pictures_show_the_published_results(name):
    folder = readme.ROOT / "bench" / "results"
    pictures = sorted(folder.glob(f"{name}-*.png"))
    assert pictures
    digest = readme.load(folder / f"{name}.json").digest()
    assert {Image.open(picture).text["results"] for picture in pictures} == {digest}, "run python -m bench.pictures"
