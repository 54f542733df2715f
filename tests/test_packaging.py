"""What is installed: the wheel in an environment of its own, outside the checkout."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import convrnn
from convrnn.ops._library import LIBRARY

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.compiled

SMOKE = """
import torch.utils.flop_counter  # before convrnn, which registers its formulas at once then
import convrnn, convrnn.kernels, importlib.util, pathlib, sys, torch
from convrnn.ops._library import LIBRARY
assert importlib.util.find_spec("kernels") is None, "a top-level package named kernels is installed"
site = pathlib.Path(sys.argv[1])
assert site in pathlib.Path(convrnn.__file__).parents and site in LIBRARY.parents
layer = convrnn.GRU_RCN(3, 4, 3)
out, h_n = layer(torch.randn(2, 5, 3, 8, 8))
out.sum().backward()
assert out.shape == (2, 5, 4, 8, 8) and layer.W.grad.isfinite().all()
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    layer(torch.randn(2, 5, 3, 8, 8))
assert counter.get_total_flops() > 0
"""


def run(*command, **kwargs):
    result = subprocess.run(command, check=False, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The tracked and new files of the checkout, without what earlier builds left in it."""
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    target = tmp_path_factory.mktemp("source")
    for name in files:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


# A compiler that gives what the checkout's build made of the same sources, in place of a minute's work.
COMPILER = """#!/bin/sh
for argument; do
  case "$previous:$argument" in
    -o:*.o) exec touch "$argument" ;;
    -o:*.so) exec cp {library} "$argument" ;;
  esac
  previous=$argument
done
exec {real} "$@"
"""


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """From the copy of the sources, but for its library, whose compilation `make setup` is."""
    out, tools = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tools")
    real = shutil.which("c++")
    for name in ("c++", "g++", "cc", "gcc"):
        (tools / name).write_text(COMPILER.format(library=LIBRARY, real=real))
        (tools / name).chmod(0o755)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    run(*pip, "--wheel-dir", str(out), ".", cwd=source, env=env)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_contents(wheel):
    assert "-cp310-abi3-linux" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"convrnn", f"convrnn-{wheel.name.split('-')[1]}.dist-info"}
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {f"convrnn/kernels/{name}" for name in kernels} <= set(names)
    assert "convrnn/py.typed" in names and "convrnn/_C.abi3.so" in names
    assert not [name for name in names if name.endswith((".cpp", ".h"))]


def test_no_header_is_left_out(source):
    """Of the files that a clone has: what the fixture above does not compile."""
    folder = source / "kernels" / "cpu"
    included = {
        name for path in folder.iterdir() for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
    }
    assert included and all((folder / name).is_file() for name in included), included


@pytest.mark.slow
def test_wheel_runs_outside_the_checkout(wheel, tmp_path):
    """In a fresh environment that sees this interpreter's PyTorch and nothing else of the checkout."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    here = Path(convrnn.__file__).parents[1]
    paths = [p for p in sys.path if p.endswith("site-packages") and Path(p) != here]
    # behind the environment's own packages, and without this environment's import hooks (its editable convrnn)
    (site / "torch.pth").write_text("\n".join(f"import sys; sys.path.append({p!r})" for p in paths))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CONVRNN_BACKEND")}
    run(str(python), "-c", SMOKE, str(site), cwd=tmp_path, env=env)
    run(str(python), "-m", "convrnn.info", cwd=tmp_path, env=env)


def test_the_library_uses_the_stable_abi_alone():
    """No symbol of LibTorch's unstable C++ ABI and none of CPython: that is what makes one wheel serve them all."""
    undefined = run("nm", "-D", "--undefined-only", "--demangle", str(LIBRARY))
    foreign = [line for line in undefined.splitlines() if any(s in line for s in (" c10::", " at::", " _Py", " Py"))]
    assert not foreign, foreign


def test_no_kernels_package_in_the_way():
    """convrnn/kernels would silently win over the mapping of kernels/; a top-level `kernels` belongs to others."""
    assert not (ROOT / "convrnn" / "kernels").exists()
    run(sys.executable, "-c", "import importlib.util as u; assert u.find_spec('kernels') is None", cwd="/")
    import convrnn.kernels

    assert Path(convrnn.kernels.__file__).parent == ROOT / "kernels"


@pytest.mark.slow
def test_no_compiler_is_one_sentence(source):
    env = os.environ | {"CXX": "no-such-compiler"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "elsewhere", "--build-temp", "elsewhere"]
    result = subprocess.run(command, check=False, cwd=source, env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1].startswith("convrnn needs a C++17 compiler")


def test_debug_and_max_jobs_are_honoured(source, tmp_path):
    """What `ninja` is told, by one that notes how it was called, and builds nothing."""
    noting = tmp_path / "bin" / "ninja"
    noting.parent.mkdir()
    real = shutil.which("ninja")  # which is asked for its version first
    noting.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\necho "$@" > {tmp_path}/calls\nexit 1\n'
    )
    noting.chmod(0o755)
    env = os.environ | {"DEBUG": "1", "MAX_JOBS": "1", "PATH": f"{noting.parent}:{os.environ['PATH']}"}
    folders = ("--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    command = (sys.executable, "setup.py", "build_ext", *folders)
    result = subprocess.run(command, check=False, cwd=source, env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert "-j 1" in (tmp_path / "calls").read_text()
    (plan,) = tmp_path.rglob("build.ninja")
    (flags,) = (line.split() for line in plan.read_text().splitlines() if line.startswith("post_cflags"))
    assert "-g" in flags and "-O0" in flags
