"""The device that the suite runs on, its seed, and the shapes that fit it."""

import os
from collections.abc import Iterator

import pytest
import torch

import convrnn  # noqa: F401  before anything imports triton: see CONVRNN_BACKEND

from .litter import Litter

BACKEND = os.environ.get("CONVRNN_BACKEND", "")
# The kernels are Triton's: in its interpreter, or their machine code executed by tests/harness/ptx. Either takes its time.
INTERPRETED = BACKEND in ("triton", "ptx")
if BACKEND == "ptx":
    from .harness.ptx.driver import install

    install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the tests put their tensors")


def pytest_configure(config: pytest.Config) -> None:
    Litter.register(config)
    config.addinivalue_line("markers", "compiled: not where Triton kernels run for CPU tensors (CONVRNN_BACKEND unset)")
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter alone (CONVRNN_BACKEND=triton)")
    config.addinivalue_line("markers", "executed: runs where machine code is executed alone (CONVRNN_BACKEND=ptx)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test` runs the suite for each backend: each test in its place."""
    here = {"triton": "interpreted", "ptx": "executed"}.get(BACKEND, "compiled")
    places = [list(filter(item.get_closest_marker, ("compiled", "interpreted", "executed"))) for item in items]
    deselected = [item for item, wanted in zip(items, places, strict=True) if wanted and here not in wanted]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]
    # Files with slow tests first: begun last, one would keep a process at work while the others have none.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda: no CUDA device is present")
    # cuDNN's default rounds fp32 convolutions to tf32, 10 bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield name


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
