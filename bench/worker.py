"""Times the cases of this checkout on the convrnn of one folder: one of the two processes behind ``bench.compare``.

A request is a JSON object on a line of stdin, the reply one on stdout: ``{"case": name, "check": bool}`` prepares a
case, ``{"what": pass}`` times one of its passes for a turn. It is a script, not a module, so that the checkout itself
is not on the path, where its own convrnn would come first.
"""

import argparse
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TURN_S = 0.01  # a turn lasts at least this long, after as long to warm up; a call that takes longer is a turn by itself


def only_from(package: Path) -> None:
    """Makes ``package`` the one place to import convrnn from, and imports it.

    Raises:
        SystemExit: some of it, or the C++ library, came from elsewhere.
    """
    sys.path[0] = str(package)  # in place of this script's folder
    # An editable install's finder would fill in whatever modules the package lacks.
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if not getattr(finder, "__module__", "").startswith("__editable__")
    ]
    import torch

    import convrnn  # noqa: F401

    files = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "convrnn" and m.__file__]
    strays = [file for file in [*files, *torch.ops.loaded_libraries] if package not in Path(file).resolve().parents]
    if strays or not torch.ops.loaded_libraries:
        sys.exit(f"expected convrnn and its C++ library in {package}, found {strays or 'no library'}")


def load(name: str, path: Path) -> ModuleType:
    """Imports a module or a package of this checkout by its path."""
    folders = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Bench:
    """The checkout's cases, one of them prepared at a time, on our provider alone."""

    def __init__(self, device: str, threads: int) -> None:
        import torch

        import convrnn

        # One truth for both sides: the base's own may be wrong, or lack what a newer case needs. It uses no kernels.
        convrnn.reference = load("convrnn.reference", ROOT / "convrnn" / "reference.py")
        load("bench", ROOT / "bench" / "__init__.py")
        from bench import case, cases, machine, measure

        machine.prepare(threads)
        self.device, self.threads = torch.device(device), threads
        self.ours = case.OURS
        self.measure = measure
        self.cases = {case.name: case for case in cases.all_cases()}

    def prepare(self, name: str, check: bool) -> dict[str, Any]:
        """Builds the case's problem and, where asked to, says what is wrong with our provider's results."""
        self.case, self.tasks, self.slow = self.cases[name], {}, {}
        self.problem = self.case.problem(self.device)
        self.problem.providers = {self.ours: self.problem.providers[self.ours]}
        if check:
            provider = self.problem.providers[self.ours]
            expected = self.measure.truths(self.problem, training="step" in self.case.passes)
            error = self.measure.error(self.case, self.problem, provider, expected(provider))
            if wrong := self.measure.complaint(error, self.case, provider):
                return {"wrong": wrong}
        return {}

    def time(self, what: str) -> dict[str, Any]:
        """Milliseconds a call in one turn: the best, for all else that runs on the machine only ever adds to it."""
        from torch.utils.benchmark import Timer

        if what not in self.tasks:
            self.tasks[what] = self.measure.task(what, self.problem.providers[self.ours], self.problem)
        task = self.tasks[what]
        if self.device.type == "cuda":
            return {"ms": self.measure.clock(task, self.device)}
        if self.slow.get(what):
            start = perf_counter()
            task()
            return {"ms": (perf_counter() - start) * 1e3}
        timer = Timer("task()", globals={"task": task}, num_threads=self.threads)
        best = min(timer.blocked_autorange(min_run_time=TURN_S).times)
        self.slow[what] = best > TURN_S
        return {"ms": best * 1e3}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.time(request["what"]) if "what" in request else self.prepare(request["case"], request["check"])
        except Exception as error:  # noqa: BLE001  another version's ops may raise anything
            return {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, required=True, help="the folder that holds convrnn/")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks decides
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything prints is no reply
    only_from(options.package.resolve())
    bench = Bench(options.device, options.threads)
    print("{}", file=replies, flush=True)  # ready
    for line in sys.stdin:
        print(json.dumps(bench.answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
