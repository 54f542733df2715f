"""Fails a run of the suite that leaves a file in the checkout which was not there before, or other than it was."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CACHES = re.compile(r"(^|/)(__pycache__|\.\w+_cache|\.hypothesis)/")  # Python's own and the tools'


class Litter:
    """A plugin that compares what git calls changed, untracked or ignored when the run starts and when it ends."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before: dict[str, str] = {}
        self.found: list[str] = []

    @classmethod
    def register(cls, config: pytest.Config) -> None:
        """Once a run: of pytest-xdist's processes the one that starts the others. Not in a copy without git."""
        if hasattr(config, "workerinput") or not (config.rootpath / ".git").exists() or shutil.which("git") is None:
            return
        config.pluginmanager.register(cls(config.rootpath), "litter")

    def pytest_sessionstart(self) -> None:
        self.before = state(self.root)

    @pytest.hookimpl(trylast=True)  # after pytest-xdist has ended its processes
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        paths = self.before | state(self.root)  # what was committed meanwhile is as it was
        changed = (path for path in paths if self.before.get(path) != digest(self.root / path))
        self.found = sorted(path for path in changed if not CACHES.search(path))
        if self.found and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.found:
            terminalreporter.section("files left behind", red=True, bold=True)
            terminalreporter.line(
                "New, changed or gone since the run began, by a test (tests write to tmp_path) or by hand:"
            )
            for path in self.found:
                terminalreporter.line(f"  {path}")


def state(root: Path) -> dict[str, str]:
    """A digest of each file that differs from the last commit or that it lacks."""
    # Of folders that are ignored as a whole the name alone.
    options = ["--porcelain", "-z", "--no-renames", "--untracked-files=all", "--ignored=matching"]
    command = ["git", "--no-optional-locks", "status", *options]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, errors="surrogateescape", check=False)
    if done.returncode:
        raise pytest.UsageError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return {path: digest(root / path) for path in (entry[3:] for entry in done.stdout.split("\0") if entry)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
