"""A run that leaves files in the checkout fails, and says which: tried on small suites in repositories of their own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiled
TESTS = Path(__file__).parent
ROOT = TESTS.parent
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
TIDY = """
import subprocess
def test_tidy(tmp_path): (tmp_path / "model.pt").touch()
def test_that_commits(): subprocess.run(["git", *"-c user.name=a -c user.email=a@a commit -qam Edited".split()], check=True)
"""


def checkout(folder: Path, test: str) -> Path:
    """A repository with this suite's own conftest.py and .gitignore, one test and one edited and one new file."""
    tests = folder / "tests"
    tests.mkdir()
    for name in ("__init__.py", "conftest.py", "litter.py"):
        shutil.copy(TESTS / name, tests)
    shutil.copy(ROOT / ".gitignore", folder)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\n")
    (tests / "test_planted.py").write_text(test)
    for name in ("kept.txt", "edited.txt", "gone.txt"):
        (folder / name).write_text(name)
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@example.com"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "All"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    (folder / "edited.txt").write_text("by hand, before the run")
    (folder / "notes").mkdir()
    (folder / "notes" / "new file.txt").write_text("by hand, before the run")
    return folder


def run(folder: Path, *options: str) -> tuple[int, list[str]]:
    """The status of the suite there, and the files that it names as left behind."""
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", *options, "tests"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    _, found, rest = done.stdout.partition("files left behind")
    return done.returncode, [line.strip() for line in rest.splitlines() if line.startswith("  ")] if found else []


@needs_git
@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_files_left_behind_fail_the_run(tmp_path, options):
    if options:
        pytest.importorskip("xdist")
    test = """
from pathlib import Path
def test_new(): Path("gru_rcn.pt").touch()
def test_new_beside_a_new_one(): Path("notes/écrit.txt").touch()
def test_changed(): Path("kept.txt").write_text("changed")
def test_changed_again(): Path("edited.txt").write_text("changed")
def test_gone(): Path("gone.txt").unlink()
def test_ignored(): Path("runs").mkdir()
"""
    status, files = run(checkout(tmp_path, test), *options)
    assert status == 1
    assert files == ["edited.txt", "gone.txt", "gru_rcn.pt", "kept.txt", "notes/écrit.txt", "runs/"]


@needs_git
def test_a_tidy_run_passes(tmp_path):
    assert run(checkout(tmp_path, TIDY)) == (0, [])


@needs_git
def test_a_failed_run_stays_failed_and_names_the_files_too(tmp_path):
    folder = checkout(tmp_path, "def test_fails(): open('left.pt', 'w').close(); assert False\n")
    assert run(folder) == (1, ["left.pt"])


@needs_git
def test_without_a_repository_nothing_is_checked(tmp_path):
    folder = checkout(tmp_path, "def test_writes(): open('left.pt', 'w').close()\n")
    shutil.rmtree(folder / ".git")
    assert run(folder) == (0, [])
    assert (folder / "left.pt").exists()
