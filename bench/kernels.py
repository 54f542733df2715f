"""What the Triton launchers move and compute, declared on paper, beside what plain PyTorch moves for the same.

An :class:`Op` is a public launcher. Its kernels' bytes and FLOP are declared for a lane (an element of the state) and a
time step; ``tests/test_kernel_traffic.py`` counts both, bytes in executed machine code, and must find the same. A kernel without a
declaration is found all the same, when its launcher runs: it is shown without bytes, and fails that test.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from convrnn import reference
from convrnn.kernels import chunks, gru_gates, gru_rcn, log_scan, mingru
from convrnn.kernels.layout import state_dtype

from .providers import hoisted_gru_rcn, log_space, log_space_scan, time_loop

Shape = tuple[int, ...]
Bytes = Callable[[int, int], tuple[int, int]]  # read and written, for elements of e bytes and states of s bytes
NOTHING: Bytes = lambda e, s: (0, 0)


@dataclass(frozen=True)
class Traffic:
    """What one launch of a kernel moves and computes.

    Attributes:
        step: bytes of a lane and step.
        flop: of a lane and step: additions, products, quotients, maxima, exp and log, each counted as one.
        once: bytes of a lane besides, in a kernel that walks over time; None in a kernel of a single step.
        flop_once: likewise.
        chunk: bytes of a lane and chunk besides, where T is cut.
        flop_chunk: likewise.
        products: of a GRU step that convolves in its kernel, by how many (C, C, 3, 3) weights. Its bytes are those moved
            to and from memory, each once; what comes again from the cache is not counted.
    """

    step: Bytes
    flop: int
    once: Bytes | None = None
    flop_once: int = 0
    chunk: Bytes = NOTHING
    flop_chunk: int = 0
    products: int = 0

    def lane(self, e: int, s: int, steps: int, chunks: int) -> tuple[int, int, int]:
        """Bytes read, bytes written and FLOP of a lane."""
        if self.once is None:
            return *self.step(e, s), self.flop
        counts = (steps, chunks, 1)
        moved = [part(e, s) for part in (self.step, self.chunk, self.once)]
        read, written = (sum(n * part[side] for n, part in zip(counts, moved, strict=True)) for side in (0, 1))
        return read, written, steps * self.flop + chunks * self.flop_chunk + self.flop_once


def phases(launches: Sequence[str]) -> list[str]:
    """The names by which one call's kernels are declared, in order: where T is cut in chunks, a scan's kernel runs before
    the carries and again behind them, and has a name for each."""
    carries = next((i for i, kernel in enumerate(launches) if kernel.endswith("carry_kernel")), None)
    if carries is None:
        return list(launches)
    before, after = launches[:carries], launches[carries + 1 :]
    return [*(f"{kernel}, reduce" for kernel in before), launches[carries], *(f"{kernel}, replay" for kernel in after)]


@dataclass(frozen=True)
class Op:
    """A public launcher.

    Attributes:
        shapes: real ones, for which the report states floors: (B, T, C, *S) of a scan, (B, C, *S) of a step, (B, T, Ox,
            Oh, *S) of GRU-RCN.
        inputs: makes its differentiable inputs for a shape, dtype and device, uninitialised, h0 among them.
        call: runs it on these inputs; a backward with every upstream gradient.
        kernels: what it launches, where T is whole.
        chunked: what it launches where T is cut in chunks, by the names of :func:`phases`.
        plain: the same in plain PyTorch, as functions of these inputs.
        backward: whether plain PyTorch does it by autograd.
        wide_state: whether 16-bit tensors have a float32 state.
        codes: whether every kernel reads a code, a byte, for each frame of a sample too. Counted once, whatever number of
            programs read it.
        boundary: bytes read, bytes written and FLOP of a lane that ``kernels`` counts and the first launch of a call spares.
    """

    shapes: tuple[Shape, ...]
    inputs: Callable[[Shape, torch.dtype, str], list[Tensor]]
    call: Callable[..., object]
    kernels: dict[str, Traffic]
    plain: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    chunked: dict[str, Traffic] = field(default_factory=dict)
    backward: bool = False
    wide_state: bool = False
    codes: bool = False
    boundary: Callable[[int, int], tuple[int, int, int]] = lambda e, s: (0, 0, 0)

    def run(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.call(*self.inputs(shape, dtype, device))

    def sizes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes of an element and of a state."""
        wide = state_dtype(torch.empty(0, dtype=dtype)).itemsize
        return dtype.itemsize, wide if self.wide_state else dtype.itemsize

    def extent(self, shape: Shape) -> tuple[int, int]:
        """Lanes of all samples, and steps."""
        if self.inputs is step_inputs or self.inputs is update_inputs:
            return math.prod(shape), 1
        return shape[0] * math.prod(shape[3 if self.inputs is sequence_inputs else 2 :]), shape[1]

    @property
    def declared(self) -> dict[str, Traffic]:
        return self.kernels | self.chunked

    def chunks(self, shape: Shape, dtype: torch.dtype) -> int:
        """How many chunks T is cut in, on a device with as many multiprocessors as an H100."""
        if not self.chunked:
            return 1
        lanes, _ = self.extent(shape)
        return chunks.cut(torch.empty(shape[:2], dtype=dtype, device="meta"), lanes // shape[0])[1]

    def work(self, shape: Shape, dtype: torch.dtype, launches: Counter[str]) -> tuple[int, int, int] | None:
        """Bytes read, bytes written and FLOP of one call with these :func:`phases`; None where one is not declared."""
        if not launches.keys() <= self.declared.keys():
            return None
        lanes, steps = self.extent(shape)
        e, s = self.sizes(dtype)
        total = [-spared for spared in self.boundary(e, s)]
        for kernel, count in launches.items():
            lane = self.declared[kernel].lane(e, s, steps, self.chunks(shape, dtype))
            total = [sum_ + count * n for sum_, n in zip(total, lane, strict=True)]
        read, written, flop = (lanes * n for n in total)
        if self.codes:
            read += shape[0] * sum(launches.values())
        products = sum(count * self.declared[kernel].products for kernel, count in launches.items())
        if products:
            channels = shape[3]
            read += products * 9 * channels**2 * e
            flop += products * 2 * 9 * channels * lanes
        return read, written, flop

    @property
    def convolves(self) -> bool:
        """Whether its kernels convolve."""
        return any(kernel.products for kernel in self.kernels.values())


def scan_inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """gate_hidden, h0."""
    batch, steps, channels, *space = shape
    shapes = ((batch, steps, 2 * channels, *space), (batch, channels, *space))
    return [torch.empty(size, dtype=dtype, device=device) for size in shapes]


def log_scan_inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """log_a, log_b."""
    batch, steps, *rest = shape
    return [torch.empty((batch, n, *rest), dtype=dtype, device=device) for n in (steps, steps + 1)]


def step_inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """xp, hp, h."""
    batch, channels, *space = shape
    return [torch.empty((batch, n * channels, *space), dtype=dtype, device=device) for n in (2, 2, 1)]


def update_inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """xc, hc, z, h."""
    return [torch.empty(shape, dtype=dtype, device=device) for _ in range(4)]


def sequence_inputs(shape: Shape, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, h0, W, U, C with kernels of 3."""
    batch, steps, ox, oh, *space = shape
    k = [3] * len(space)
    shapes = ((batch, steps, ox, *space), (batch, oh, *space), (3 * oh, ox, *k), (2 * oh, oh, *k), (oh, oh, *k))
    return [torch.empty(size, dtype=dtype, device=device) for size in shapes]


def _mingru_bwd(gate_hidden: Tensor, h0: Tensor) -> None:
    h = gate_hidden.new_empty((*gate_hidden.shape[:2], *h0.shape[1:]))
    mingru.mingru_bwd(torch.empty_like(h), torch.empty_like(h0), gate_hidden, h0, h)


def _log_scan_bwd(log_a: Tensor, log_b: Tensor) -> None:
    log_x = log_b.new_empty(log_b.shape, dtype=state_dtype(log_b))
    log_scan.log_scan_bwd(torch.empty_like(log_x), log_a, log_b, log_x)


def _gru_gates_bwd(xp: Tensor, hp: Tensor, h: Tensor) -> None:
    gru_gates.gru_gates_bwd(*(torch.empty_like(h) for _ in range(5)), h)


def _gru_update_bwd(xc: Tensor, hc: Tensor, z: Tensor, h: Tensor) -> None:
    gru_gates.gru_update_bwd(xc, torch.empty_like(h), z, hc, h)


def _codes(x: Tensor, codes: bool) -> Tensor | None:
    """Codes of all kinds, one after another."""
    return torch.arange(math.prod(x.shape[:2]), device=x.device).view(x.shape[:2]).byte() % 4 if codes else None


def _gru_rcn_fwd(step: str, codes: bool = False) -> Callable[..., object]:
    return lambda x, *inputs: gru_rcn.gru_rcn_fwd(x, *inputs, None, step, _codes(x, codes))


def _gru_rcn_bwd(codes: bool = False) -> Callable[..., None]:
    def call(x: Tensor, h0: Tensor, W: Tensor, U: Tensor, C: Tensor) -> None:
        out = x.new_empty((*x.shape[:2], *h0.shape[1:]))
        gates = x.new_empty((*x.shape[:2], 3 * h0.shape[1], *h0.shape[2:]))
        dout, dh_n = torch.empty_like(out), torch.empty_like(h0)
        wanted = [True] * 5 + [False]
        gru_rcn.gru_rcn_bwd(dout, dh_n, x, h0, W, U, C, out, gates, wanted, _codes(x, codes))

    return call


SCANS = ((4, 16, 64, 56, 56), (16, 256, 512), (1, 65536, 64))  # of the last two T is cut in chunks
FRAMES = ((16, 64, 7, 7), (4, 64, 28, 28), (16, 256, 14, 14))
SMALL_MAPS = ((16, 10, 64, 64, 7, 7), (1, 16, 64, 64, 7, 7), (32, 10, 128, 128, 4, 4))
SEQUENCES = ((16, 10, 64, 64, 7, 7), (4, 10, 64, 64, 28, 28), (16, 10, 256, 256, 14, 14))
LOOP = "plain PyTorch"  # at its best: all that can be outside the loop over time, and convolutions hoisted
MINGRU = {LOOP: lambda gate_hidden, h0: time_loop(gate_hidden)}
MINGRU["log space"] = lambda gate_hidden, h0: log_space()(gate_hidden)

# z, r, rh from two pairs of pre-activations and the state, as a step of its own and in the sequence.
GATES = Traffic(lambda e, s: (4 * e + s, 3 * e), 11)

# Kept, lost and moved of each chunk in, the state that enters it out; first the state before all of T in.
CARRIES = Traffic(NOTHING, 0, lambda e, s: (e, 0), chunk=lambda e, s: (3 * s, s), flop_chunk=5)

OPS: dict[str, Op] = {
    "mingru_fwd": Op(
        SCANS,
        scan_inputs,
        mingru.mingru_fwd,
        # gate, hidden in, h out; h0 in, h_n out
        {"mingru_fwd_kernel": Traffic(lambda e, s: (2 * e, e), 10, lambda e, s: (e, e))},
        MINGRU,
        # gate, hidden in, the map out; gate, hidden, the state that enters in, h, h_n out
        {
            "mingru_fwd_kernel, reduce": Traffic(lambda e, s: (2 * e, 0), 14, NOTHING, chunk=lambda e, s: (0, 3 * s)),
            "carry_kernel": CARRIES,
            "mingru_fwd_kernel, replay": Traffic(
                lambda e, s: (2 * e, e), 10, lambda e, s: (0, e), chunk=lambda e, s: (s, 0)
            ),
        },
        wide_state=True,
    ),
    "mingru_bwd": Op(
        SCANS,
        scan_inputs,
        _mingru_bwd,
        # gate, hidden, dh, h_{t-1} in, dgate, dhidden out, where h0 stands for h_{-1}; dh_n in, dh0 out
        {"mingru_bwd_kernel": Traffic(lambda e, s: (4 * e, 2 * e), 20, lambda e, s: (e, e))},
        MINGRU,
        # gate, dh in, the map out; the gradient that enters in
        {
            "mingru_bwd_kernel, reduce": Traffic(lambda e, s: (2 * e, 0), 10, NOTHING, chunk=lambda e, s: (0, 3 * s)),
            "carry_kernel": CARRIES,
            "mingru_bwd_kernel, replay": Traffic(
                lambda e, s: (4 * e, 2 * e), 20, lambda e, s: (0, e), chunk=lambda e, s: (s, 0)
            ),
        },
        backward=True,
        wide_state=True,
    ),
    "log_scan_fwd": Op(
        SCANS,
        log_scan_inputs,
        log_scan.log_scan_fwd,
        # log a, log b in, log x out; log b_0 in, log x_0 out
        {"log_scan_fwd_kernel": Traffic(lambda e, s: (2 * e, s), 25, lambda e, s: (e, s), 5)},
        {LOOP: reference.log_scan, "log space": log_space_scan},
        # log a, log b in, m, s, the sum of log a out, each with its rounding error; m, s that enter a chunk
        {
            "log_scan_fwd_kernel, reduce": Traffic(lambda e, s: (2 * e, 0), 29, NOTHING, chunk=lambda e, s: (0, 6 * s)),
            "log_scan_carry_kernel": Traffic(
                NOTHING, 0, lambda e, s: (e, 0), 1, chunk=lambda e, s: (6 * s, 4 * s), flop_chunk=24
            ),
            "log_scan_fwd_kernel, replay": Traffic(
                lambda e, s: (2 * e, s), 25, lambda e, s: (0, s), chunk=lambda e, s: (4 * s, 0), flop_chunk=4
            ),
        },
        wide_state=True,
    ),
    "log_scan_bwd": Op(
        SCANS,
        log_scan_inputs,
        _log_scan_bwd,
        # log a, log b, log x, dlog x in, dlog a, dlog b out; of step 0 dlog x_0 and log b_0 in, dlog b_0 out
        {"log_scan_bwd_kernel": Traffic(lambda e, s: (2 * e + 2 * s, 2 * e), 9, lambda e, s: (e + s, e), 1)},
        {LOOP: reference.log_scan, "log space": log_space_scan},
        # log a, log b, log x, dlog x in, the map out; the gradient that enters in
        {
            "log_scan_bwd_kernel, reduce": Traffic(
                lambda e, s: (2 * e + 2 * s, 0), 12, NOTHING, chunk=lambda e, s: (0, 3 * s)
            ),
            "carry_kernel": replace(CARRIES, once=NOTHING),
            "log_scan_bwd_kernel, replay": Traffic(
                *(lambda e, s: (2 * e + 2 * s, 2 * e), 9, lambda e, s: (e + s, e)),
                chunk=lambda e, s: (s, 0),
                flop_chunk=1,
            ),
        },
        backward=True,
        wide_state=True,
    ),
    "gru_gates_fwd": Op(
        FRAMES, step_inputs, gru_gates.gru_gates_fwd, {"gru_gates_fwd_kernel": GATES}, {LOOP: reference.gru_gates}
    ),
    "gru_gates_bwd": Op(
        FRAMES,
        step_inputs,
        _gru_gates_bwd,
        # dz, dr, drh, z, r, h in, da (two), dh out
        {"gru_gates_bwd_kernel": Traffic(lambda e, s: (5 * e + s, 2 * e + s), 9)},
        {LOOP: reference.gru_gates},
        backward=True,
    ),
    "gru_update_fwd": Op(
        FRAMES,
        update_inputs,
        gru_gates.gru_update_fwd,
        # xc, hc, z, h in, c, h' out
        {"gru_update_fwd_kernel": Traffic(lambda e, s: (3 * e + s, e + s), 22)},
        {LOOP: reference.gru_update},
    ),
    "gru_update_bwd": Op(
        FRAMES,
        update_inputs,
        _gru_update_bwd,
        # dc, dh', z, c, h in, da, dz, dh out
        {"gru_update_bwd_kernel": Traffic(lambda e, s: (3 * e + 2 * s, 2 * e + s), 9)},
        {LOOP: reference.gru_update},
        backward=True,
    ),
    "gru_rcn_fwd": Op(
        SEQUENCES,
        sequence_inputs,
        _gru_rcn_fwd("cudnn"),
        # the update also writes h' to the output and, where the state is not of x's dtype, for the convolution
        {
            "gru_gates_fwd_kernel": GATES,
            "gru_update_fwd_kernel": Traffic(lambda e, s: (3 * e + s, 2 * e + s + (e if e < s else 0)), 22),
        },
        {LOOP: hoisted_gru_rcn},
        wide_state=True,
    ),
    "gru_rcn_fwd, gemm": Op(
        SMALL_MAPS,
        sequence_inputs,
        _gru_rcn_fwd("gemm"),
        {
            # the state and, where it is not of x's dtype, its copy, xz, xr in, z, r, rh out
            "gru_conv_gates_fwd_kernel": Traffic(
                lambda e, s: (2 * e + s + (e if e < s else 0), 3 * e), GATES.flop, products=2
            ),
            # rh, xc, z, h in, c, h', its copies for the output and for the next step out
            "gru_conv_update_fwd_kernel": Traffic(
                lambda e, s: (3 * e + s, 2 * e + s + (e if e < s else 0)), 22, products=1
            ),
        },
        {LOOP: hoisted_gru_rcn},
        wide_state=True,
    ),
    "gru_rcn_bwd": Op(
        SEQUENCES,
        sequence_inputs,
        _gru_rcn_bwd(),
        {
            # dh, the convolution's gradient, dout, z, c, h_{t-1} in, dh, dz, dc and copies of the last two out
            "gru_rcn_bwd_candidate_kernel": Traffic(lambda e, s: (5 * e + s, 4 * e + s), 13),
            # dh, drh, r, h_{t-1} in, dh, dr and a copy out
            "gru_rcn_bwd_reset_kernel": Traffic(lambda e, s: (3 * e + s, 2 * e + s), 6),
        },
        {LOOP: hoisted_gru_rcn},
        backward=True,
        wide_state=True,
        boundary=lambda e, s: (e, 0, 1),  # no convolution before the last step of the sequence
    ),
}
# The same with frames that restart or hold the state; plain PyTorch is compared without.
OPS |= {
    f"{name}, codes": replace(OPS[name], call=call, plain={}, codes=True)
    for name, call in (
        ("gru_rcn_fwd", _gru_rcn_fwd("cudnn", codes=True)),
        ("gru_rcn_fwd, gemm", _gru_rcn_fwd("gemm", codes=True)),
        ("gru_rcn_bwd", _gru_rcn_bwd(codes=True)),
    )
}


class Eager(TorchDispatchMode):
    """Counts what PyTorch's own ops move: every input read once and every output written once by each op, without
    views, without allocation, and without convolutions, which are only counted."""

    # Of these the first argument is written and not read.
    _OVERWRITES = ("copy_", "fill_", "zero_")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.ops = 0
        self.convolutions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        outputs = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if func.is_view or name.startswith(("empty", "new_empty", "detach", "set_")) or not outputs:
            return result
        if "convolution" in name:
            self.convolutions += 1
            return result
        inputs = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in self._OVERWRITES:
            inputs = inputs[1:]
        elif name.startswith(("zeros", "ones", "full", "new_")):
            inputs = []
        self.ops += 1
        self.bytes += sum(map(_extent, inputs)) + sum(map(_extent, outputs))
        return result


def _extent(x: Tensor) -> int:
    """Bytes of memory behind a tensor: an expanded one has fewer than elements."""
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)


def eager(op: Op, shape: Shape, dtype: torch.dtype, plain: Callable[..., object]) -> Eager:
    """What a plain form moves for the op, at a size that needs no memory: tensors of the meta device."""
    inputs = [x.requires_grad_() for x in op.inputs(shape, dtype, "meta")]
    with Eager() as forward:
        outputs = plain(*inputs)
    if not op.backward:
        return forward
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    upstream = [torch.empty_like(x) for x in outputs]
    with Eager() as backward:
        torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return backward
