"""Builds of convrnn in folders of their own, beside the installed one: a git ref's, and this checkout's as it is."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch

from .machine import ROOT

BUILDS = ROOT / "build" / "bench-compare"
SOURCES = ("convrnn", "kernels", "pyproject.toml", "setup.py")  # what a build depends on
WANTED = (*SOURCES, "LICENSE", "README.md")  # pyproject.toml names these two: without them there is no build
FLAGS = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "DEBUG", "SANITIZE")


class Unusable(Exception):
    """What was given cannot be compared with; says why."""


def git(*arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise Unusable("git is not installed: a base is built from a commit of this checkout") from None
    except subprocess.CalledProcessError as error:
        raise Unusable(f"git {arguments[0]}: {error.stderr.decode().strip() or 'failed'}") from None


def resolve(base: str) -> str:
    """The full hash of the commit that ``base`` names: a git ref, or a results file that ``python -m bench`` wrote."""
    git("rev-parse", "--git-dir")
    ref = commit_of(Path(base)) if base.endswith(".json") else base
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", ref + "^{commit}").decode().strip()
    except Unusable:
        origin = "" if ref == base else f", which {base} names,"
        raise Unusable(f"{ref!r}{origin} is no commit of this checkout: give a branch, a tag or a commit") from None


def stamp_of(results: Path) -> dict[str, Any]:
    """What a results file says of its machine and versions."""
    try:
        found = json.loads(results.read_text())
        if not {"machine", "peaks", "rows"} <= found.keys():  # a comparison, say, has a machine too
            raise ValueError
        return found["machine"]
    except OSError as error:
        raise Unusable(f"{results}: {error.strerror}") from None
    except (ValueError, AttributeError):
        raise Unusable(f"{results} is not a results file of python -m bench") from None


def differences(base: str, stamp: dict[str, Any]) -> list[str]:
    """Where a results file that was given as the base was measured otherwise than ``stamp`` says."""
    then = stamp_of(Path(base)) if base.endswith(".json") else {}
    return [
        f"{base} was measured with {name} {then[name]!r}, not {stamp[name]!r}"
        for name in ("device", "kind", "threads", "torch", "triton")
        if name in then and then[name] != stamp[name]
    ]


def commit_of(results: Path) -> str:
    """The commit that a results file was measured at."""
    commit = stamp_of(results).get("commit")
    if not commit:
        raise Unusable(f"{results} names no commit: it was measured outside a checkout")
    if commit.endswith("+"):
        raise Unusable(
            f"{results} was measured at {commit[:-1]} with local changes, which are not kept anywhere: it cannot be built "
            f"again. Compare with {commit[:-1]} itself, or with a results file of a clean checkout"
        )
    return commit


def build_commit(commit: str) -> Path:
    """The folder that holds ``convrnn`` as built from a commit."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(git("archive", "--format=tar", commit + "^{tree}"))) as archive:
            members = [member for member in archive if member.name.split("/")[0] in WANTED]
            archive.extractall(folder, members, filter="data")
        return build(Path(folder), commit[:12])


def build_checkout() -> Path:
    """The folder that holds ``convrnn`` as built from the files of this checkout, committed or not."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (
            git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *WANTED).decode().split("\0")
        ):
            if name and (ROOT / name).is_file():  # not deleted here
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)
        return build(Path(folder), "this checkout")


def build(source: Path, name: str) -> Path:
    """Installs ``source`` to a folder named after all that the build depends on, unless it is there already."""
    if not (source / "convrnn" / "__init__.py").exists() or not (source / "setup.py").exists():
        raise Unusable(f"{name} has no convrnn to build: convrnn/__init__.py or setup.py is missing")
    target = BUILDS / digest(source)
    if target.exists():
        return target
    BUILDS.mkdir(parents=True, exist_ok=True)
    print(f"building convrnn of {name}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=BUILDS) as folder:  # beside the target: moved there in one step, once complete
        install = ("install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", folder)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", *install, str(source)]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            tail = "\n".join((result.stdout + result.stderr).splitlines()[-20:])
            raise Unusable(f"convrnn of {name} does not build:\n{tail}")
        Path(folder).rename(target)
        Path(folder).mkdir()  # for the context manager to remove
    return target


def digest(source: Path) -> str:
    """A name for what the build of ``source`` depends on: its files, Python, PyTorch, compiler and flags."""
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    version = (
        subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
        if shutil.which(compiler)
        else b""
    )
    found = hashlib.sha256(
        repr((sys.version, torch.__version__, version, [os.environ.get(flag) for flag in FLAGS])).encode()
    )
    for path in sorted(
        path for name in SOURCES for path in [source / name, *(source / name).rglob("*")] if path.is_file()
    ):
        content = path.read_bytes()
        found.update(f"{path.relative_to(source)} {len(content)}\n".encode() + content)
    return found.hexdigest()[:16]
