"""What a case is: an op or a module at one shape and dtype, with its providers and the work it must do."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .providers import Provider, Run

OURS = "convrnn"
FLOOR = "floor"  # no provider: what memory alone takes, timed beside them
GRAPH = " in a CUDA graph"  # ends the name of a provider that runs in one
FRESH = ", new pages"  # ends the name of one whose large tensors are new pages from the system in every call
TRAINING = ("forward", "backward", "step")  # step: forward and backward, every gradient
STREAM = ("stream",)  # one time step, the state that comes out going in again


@dataclass(frozen=True)
class Work:
    """What a pass cannot do without: every input read and every output written once, and its arithmetic."""

    bytes: int
    flop: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flop + other.flop)


@dataclass
class Problem:
    """A case made concrete.

    Attributes:
        inputs: of every provider.
        truth: the result as a function of them, in float64.
        providers: who computes it.
        floors: for each pass a call that moves the bytes it cannot avoid and does nothing else, where there is one.
    """

    inputs: list[Tensor]
    truth: Run
    providers: dict[str, Provider]
    floors: dict[str, Callable[[], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One op or module at one shape and dtype.

    Attributes:
        op: its name.
        shape: (B, T, C, *S) for minGRU, (B, T, Ox, Oh, H, W) for GRU-RCN and ConvGRU; of the op's output else.
        build: makes the problem on a device; the same numbers every time.
        forward: the work of a forward pass.
        backward: the work of a backward pass, from the outputs' gradients to those of all inputs and parameters.
        dtype: of inputs and parameters.
        group: "op", "module", "streaming", or the axis of a scaling study: "T", "B", "C", "map".
        passes: what is timed.
        compile: also time torch.compile of each provider that is plain PyTorch or ours.
        exhaustive: part of ``--full`` alone.
    """

    op: str
    shape: tuple[int, ...]
    build: Callable[[torch.device, torch.dtype], Problem] = field(repr=False)
    forward: Work
    backward: Work
    dtype: torch.dtype = torch.float32
    group: str = "op"
    passes: tuple[str, ...] = TRAINING
    compile: bool = False
    exhaustive: bool = False

    @property
    def name(self) -> str:
        kind = {"op": "", "module": "", "streaming": "streaming "}.get(self.group, f"scaling-{self.group} ")
        return f"{kind}{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    def work(self, what: str) -> Work:
        return {"backward": self.backward, "step": self.forward + self.backward}.get(what, self.forward)

    def problem(self, device: torch.device) -> Problem:
        torch.manual_seed(0)
        return self.build(device, self.dtype)


def adding(packed: Tensor) -> dict[str, Callable[[], object]]:
    """The bytes of minGRU over ``packed`` (2n elements), moved by torch.add: n + n to n, and 2n + 2n to 2n for backward."""
    flat = packed.detach().flatten()
    halves, other = flat.chunk(2), flat.clone()

    def forward() -> object:
        return torch.add(*halves)

    def backward() -> object:
        return torch.add(flat, other)

    return {"forward": forward, "backward": backward, "step": lambda: (forward(), backward())}


def elementwise(elements: int, dtype: torch.dtype, moved: int, flop: int) -> Work:
    return Work(elements * moved * dtype.itemsize, elements * flop)


def convolution_work(dtype: torch.dtype, frames: int, pixels: int, tensors: int, weights: int) -> tuple[Work, Work]:
    """Forward and backward of convolutions with ``weights`` multiply-adds a pixel; ``tensors`` elements in and out."""
    flop = 2 * frames * pixels * weights
    return Work((tensors + weights) * dtype.itemsize, flop), Work(2 * (tensors + weights) * dtype.itemsize, 2 * flop)
