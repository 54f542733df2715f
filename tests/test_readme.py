"""README: every Python block runs, in order, in one process, as a reader would paste them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.compiled  # a minute in the interpreter, of ops that other tests run there
def test_python_blocks_run(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)  # noqa: S102  running it is the point


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert links and not missing, missing


def test_make_targets_exist():
    named = set(re.findall(r"`make ([a-z-]+)", (ROOT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert named and named <= targets, named - targets


def test_each_row_of_the_compatibility_table_has_its_test():
    """A file of tests, which test_linked_files_exist looks for, or a target of make, for which the test above does."""
    section = (ROOT / "README.md").read_text().split("\n## Inside PyTorch\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.+)\|$", section, flags=re.MULTILINE)[2:]
    backed = [re.findall(r"\(tests/test_\w+\.py\)|`make test-\w+`", row.split("|")[-1]) for row in rows]
    assert len(rows) >= 10 and all(backed), rows
