"""torch.export and AOTInductor: dynamic sizes, saved programs, and a compiled package in Python and in C++."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.export import Dim
from torch.utils.cpp_extension import include_paths, library_paths

import convrnn
from convrnn.info import OPS
from convrnn.ops._library import LIBRARY

from .modules import MODULES, WALKING, tensors

pytestmark = pytest.mark.compiled


def dynamic(x, fixed=(2,)):
    """B and T, H and W of (B, T, C, *S)."""
    return ({dim: Dim.AUTO for dim in range(x.dim()) if dim not in fixed},)


def larger(x, fixed=(2,)):
    return torch.randn([n if dim in fixed else n + 3 + dim for dim, n in enumerate(x.shape)], device=x.device)


# Strict is Dynamo's trace, which test_compile.py takes of every module.
STRICT = ["GRU_RCN", "MinGRU", "MinConv2dGRU", "Bidirectional-MinGRU", "ConvGRU", "StackedGRU_RCN"]


@pytest.mark.parametrize(
    ("name", "strict"),
    [*((name, False) for name in MODULES), *((name, True) for name in STRICT)],
    ids=lambda value: value if isinstance(value, str) else ("strict" if value else "non_strict"),
)
def test_dynamic_sizes_saved_and_loaded(name, strict, device, tmp_path):
    """All but the channels; a walk over time, unrolled, has its T, and adaptive pooling between levels the frames' size."""
    module, x = MODULES[name].make(device)
    fixed = (2, 3, 4) if name == "StackedGRU_RCN" else (1, 2) if name in WALKING else (2,)
    with torch.no_grad():
        program = torch.export.export(module.eval(), (x,), dynamic_shapes=dynamic(x, fixed), strict=strict)
    (given,) = (node for node in program.graph.nodes if node.name == "x")
    symbolic = [not isinstance(size, int) for size in given.meta["val"].shape]
    assert symbolic == [dim not in fixed for dim in range(x.dim())]
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for y in (x, larger(x, fixed)):
        for a, b in zip(tensors(loaded(y)), tensors(module(y)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["GRU_RCN", "MinConv2dGRU"])
def test_a_state_is_an_input(name, device):
    module, x = MODULES[name].make(device)
    state = module.init_hidden_state(x)
    axes = {0: Dim.AUTO}
    shapes = (*dynamic(x), axes if isinstance(state, torch.Tensor) else [axes] * len(state))
    with torch.no_grad():
        program = torch.export.export(module.eval(), (x, state), dynamic_shapes=shapes)
    out, expected = program.module()(x, state), module(x, state)
    for a, b in zip(tensors(out), tensors(expected), strict=True):
        torch.testing.assert_close(a, b)


class EveryOp(torch.nn.Module):
    """Layers over a clip, a frame and a sequence, so that a package holds each op of the library."""

    def __init__(self):
        super().__init__()
        self.video = convrnn.GRU_RCN(2, 4, 3, bias=True)
        self.frame = convrnn.ConvGRUCell(4, 3, 3, reset_after=True)
        self.sequence = convrnn.MinGRU(4, 3)

    def forward(self, x):
        out, h_n = self.video(x)
        frame, _ = self.frame(h_n)
        h, states = self.sequence(out.mean((-2, -1)))
        return out, frame, h, states[0], convrnn.parallel_scan_log(-h[:, 1:].abs(), h)


RUNNER = r"""
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <fstream>
#include <iostream>

// runner LIBRARY PACKAGE INPUT OUTPUT SIZE...: runs the package on the floats of a file, and writes those of its outputs
int main(int count, char** argv) {
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  std::vector<int64_t> sizes;
  int64_t numel = 1;
  for (int i = 5; i < count; ++i) {
    sizes.push_back(std::stoll(argv[i]));
    numel *= sizes.back();
  }
  std::vector<float> x(numel);
  std::ifstream(argv[3], std::ios::binary).read(reinterpret_cast<char*>(x.data()), numel * sizeof(float));
  auto loader = torch::inductor::AOTIModelPackageLoader(argv[2]);
  std::ofstream file(argv[4], std::ios::binary);
  for (const auto& y : loader.run({at::from_blob(x.data(), sizes)})) {
    file.write(static_cast<const char*>(y.const_data_ptr()), y.nbytes());
    std::cout << y.sizes() << '\n';
  }
}
"""

LOADER = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x, expected = torch.load(sys.argv[3])
found = torch._inductor.aoti_load_package(sys.argv[2])(x)
torch.testing.assert_close(tuple(found), tuple(expected))
assert "convrnn" not in sys.modules
"""


@pytest.mark.slow
def test_aotinductor_package_in_python_and_cpp(device, tmp_path):
    """Compiled ahead of time with dynamic sizes; both programs know the op library and nothing else of this package."""
    if device != "cpu":
        pytest.skip("the library alone holds the CPU kernels")
    module, x = EveryOp().eval(), torch.randn(3, 5, 2, 7, 8)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=dynamic(x))
        called = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("convrnn")}
        assert called == {f"convrnn.{op}.default" for op in OPS}
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "every.pt2"))
        y = larger(x)
        expected = module(y)
    torch.save((y, expected), tmp_path / "case.pt")
    arguments = [str(LIBRARY), str(package), str(tmp_path / "case.pt")]
    subprocess.run([sys.executable, "-c", LOADER, *arguments], check=True, cwd="/")

    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("the program needs a C++ compiler")
    source, runner = tmp_path / "runner.cpp", tmp_path / "runner"
    source.write_text(RUNNER)
    headers = [flag for path in include_paths() for flag in ("-isystem", path)]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    # all of them: the operators of libtorch_cpu register themselves, and nothing here names one
    linked = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    y.numpy().tofile(tmp_path / "input")
    for command in (
        [compiler, "-std=c++20", "-O0", *headers, str(source), "-o", str(runner), *libraries, *linked],
        [str(runner), *arguments[:2], str(tmp_path / "input"), str(tmp_path / "output"), *map(str, y.shape)],
    ):
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [str(list(out.shape)) for out in expected]
    found = torch.from_numpy(np.fromfile(tmp_path / "output", dtype="float32"))
    torch.testing.assert_close(found, torch.cat([out.flatten() for out in expected]))
