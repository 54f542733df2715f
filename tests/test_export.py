"""torch.export and AOTInductor: dynamic sizes, saved programs, and a compiled package in Python and in C++."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim

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
    fixed = (1, 2, 3, 4) if name == "StackedGRU_RCN" else (1, 2) if name in WALKING else (2,)
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


CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(runner CXX)
find_package(Torch REQUIRED)
add_executable(runner runner.cpp)
target_link_libraries(runner "${TORCH_LIBRARIES}")
set_property(TARGET runner PROPERTY CXX_STANDARD 20)
"""

RUNNER = r"""
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>
#include <iostream>

// runner LIBRARY PACKAGE CASE: runs the package on x and compares with the outputs that Python computed
int main(int, char** argv) {
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << '\n';
    return 1;
  }
  torch::jit::Module held = torch::jit::load(argv[3]);
  auto loader = torch::inductor::AOTIModelPackageLoader(argv[2]);
  auto outputs = loader.run({held.attr("x").toTensor()});
  const auto out = held.attr("out").toTensor(), h_n = held.attr("h_n").toTensor();
  if (outputs.size() != 2 || !at::allclose(outputs[0], out, 1e-5, 1e-6) || !at::allclose(outputs[1], h_n, 1e-5, 1e-6)) {
    std::cerr << "outputs differ\n";
    return 1;
  }
  std::cout << "equal " << outputs[0].sizes() << '\n';
}
"""

LOADER = """
import sys, torch
torch.ops.load_library(sys.argv[1])
case = torch.jit.load(sys.argv[3])
found = torch._inductor.aoti_load_package(sys.argv[2])(case.x)
torch.testing.assert_close(tuple(found), (case.out, case.h_n))
assert "convrnn" not in sys.modules
"""


class Held(torch.nn.Module):
    """Tensors in a file that C++ reads."""

    def __init__(self, **held):
        super().__init__()
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.slow
def test_aotinductor_package_in_python_and_cpp(device, tmp_path):
    """Compiled ahead of time with dynamic sizes; both programs know the op library and nothing else of this package."""
    if device != "cpu":
        pytest.skip("the library alone holds the CPU kernels")
    module, x = MODULES["GRU_RCN"].make(device)
    with torch.no_grad():
        program = torch.export.export(module.eval(), (x,), dynamic_shapes=dynamic(x))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "gru_rcn.pt2"))
        y = larger(x)
        out, h_n = module(y)
    torch.jit.script(Held(x=y, out=out, h_n=h_n)).save(str(tmp_path / "case.pt"))
    arguments = [str(LIBRARY), str(package), str(tmp_path / "case.pt")]
    subprocess.run([sys.executable, "-c", LOADER, *arguments], check=True, cwd="/")

    if shutil.which("cmake") is None:
        pytest.skip("the C++ program needs cmake")
    (tmp_path / "CMakeLists.txt").write_text(CMAKE)
    (tmp_path / "runner.cpp").write_text(RUNNER)
    build = tmp_path / "build"
    prefix = Path(torch.__file__).parent / "share" / "cmake"
    for command in (
        ["cmake", "-S", str(tmp_path), "-B", str(build), f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=None"],
        ["cmake", "--build", str(build)],
        [str(build / "runner"), *arguments],
    ):
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("equal")
