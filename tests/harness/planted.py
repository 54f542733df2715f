"""Copies of the shipped kernel files with a fault in them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def planted(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *faults: tuple[str, str]) -> ModuleType:
    """A copy of ``module`` in which each (old, new) text is replaced, imported beside it for as long as the test runs.

    Every old text must be there: a fault that no longer fits its kernel fails the test.
    """
    source = Path(module.__file__).read_text()
    for old, new in faults:
        assert old in source, f"{module.__name__} has no longer: {old}"
        source = source.replace(old, new)
    stem = f"planted_{module.__name__.rpartition('.')[2]}"
    path = folder / f"{stem}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.{stem}", path)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)  # Triton looks kernels up by their module
    spec.loader.exec_module(copy)
    return copy
