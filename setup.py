"""Builds convrnn's C++ library: LibTorch's stable ABI and CPython's limited API, so that one wheel serves every
PyTorch from the declared floor up and every Python from 3.10 up. The rest of the packaging is in pyproject.toml."""

import os
import shutil
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_FLOOR = "0x020a000000000000"  # 2.10, as declared in pyproject.toml


class Build(BuildExtension):
    """BuildExtension (ninja; MAX_JOBS and CXX honoured) that says in one sentence what is missing."""

    def build_extensions(self) -> None:
        compiler = (os.environ.get("CXX") or "c++").split()[0]
        if shutil.which(compiler) is None:
            raise SystemExit(
                f"convrnn needs a C++17 compiler to build and '{compiler}' was not found: install g++ or clang++ "
                "(Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or name yours in CXX."
            )
        super().build_extensions()


debug = os.environ.get("DEBUG", "0").lower() not in ("", "0", "off", "false")
sanitizers = os.environ.get("SANITIZE", "")  # address,undefined: see make test-sanitized
library = CppExtension(
    "convrnn._C",
    sorted(str(source) for source in Path("kernels/cpu").glob("*.cpp")),
    define_macros=[("TORCH_TARGET_VERSION", TORCH_FLOOR), ("Py_LIMITED_API", "0x030a0000")],
    # -ffp-contract: the same fused multiply-adds from every compiler. No -march: the instruction set is chosen at run
    # time (kernels/cpu/isa.h). -fno-trapping-math: else a select whose arms compute is a branch and no loop vectorises.
    extra_compile_args=[
        "-std=c++17",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
    ]
    + [f"-ffile-prefix-map={Path.cwd()}/="]  # errors name files of the project, not of the machine that built it
    + (["-O0", "-g"] if debug else ["-O3", "-g0"])
    + ([f"-fsanitize={sanitizers}", "-fno-sanitize-recover", "-g1"] if sanitizers else []),
    extra_link_args=[f"-fsanitize={sanitizers}"] if sanitizers else [],
    depends=sorted(str(header) for header in Path("kernels/cpu").glob("*.h")),
    py_limited_api=True,
)

setup(
    packages=["convrnn", "convrnn.convert", "convrnn.kernels", "convrnn.nn", "convrnn.ops"],
    package_dir={"convrnn": "convrnn", "convrnn.kernels": "kernels"},
    package_data={"convrnn": ["py.typed"]},
    include_package_data=False,  # else the C++ sources travel in the wheel
    ext_modules=[library],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
