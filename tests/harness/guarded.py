"""Run Triton kernels in the interpreter and fail on what it would let pass.

    with guarded(seed=0) as traffic:
        h, h_n = mingru_fwd(gate_hidden)
    assert traffic[0].loaded == gate_hidden.nbytes

Needs a process that set ``TRITON_INTERPRET=1`` before Triton was imported. Inside the context

* every lane of every load and store must hit an element of a tensor passed to that launch;
* no element is written by two programs or by two lanes of one store, or read by one program and written by another;
* programs run in an order shuffled by the seed;
* float32 rounds to bfloat16 to nearest even, as the GPU does (the interpreter truncates);
* fresh memory (``torch.empty`` and its kin) holds NaN;
* the bytes that each launch moves and the arithmetic it does are counted.
"""

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from .fresh import nan_in_fresh_memory


class KernelFault(Exception):
    """A kernel did what the interpreter permits and a GPU does not."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one launch moved and computed, masked lanes of accesses left out."""

    kernel: str
    loaded: int  # bytes
    stored: int  # bytes
    distinct_loaded: int  # bytes, each address once
    distinct_stored: int  # bytes, each address once
    flop: int  # floating-point operations and functions, each counted as one, masked lanes included


# Every operation on floating-point numbers that is arithmetic; comparisons, selections, signs and conversions are not.
_ARITHMETIC = {
    name: 1 for name in ("fadd", "fsub", "fmul", "fdiv", "precise_divf", "frem", "exp", "exp2", "log", "log2")
}
_ARITHMETIC |= {name: 1 for name in ("sqrt", "precise_sqrt", "rsqrt", "sin", "cos", "erf")} | {"fma": 2}
_ARITHMETIC |= {name: 1 for name in ("maximumf", "maxnumf", "minimumf", "minnumf", "clampf")}


class _Launch:
    """The accesses of one launch: which addresses exist, and which program read and wrote which."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.elements: dict[int, np.ndarray] = {}  # itemsize -> sorted addresses of all elements
        self.reads: list[tuple[np.ndarray, int]] = []
        self.writes: list[tuple[np.ndarray, int]] = []
        self.itemsizes: dict[str, list[int]] = {"load": [], "store": []}  # of each access, in order
        self.flop = 0

    def pass_tensors(self, tensors: list[Tensor]) -> None:
        for itemsize in {x.element_size() for x in tensors}:
            addresses = [_element_addresses(x) for x in tensors if x.element_size() == itemsize]
            self.elements[itemsize] = np.unique(np.concatenate(addresses))

    def access(self, kind: str, pointers: TensorHandle, mask: np.ndarray, program: int) -> None:
        touched = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.shape))
        # The interpreter holds a scalar condition that meets a mask as int64.
        touched = touched[np.broadcast_to(mask.astype(bool), touched.shape)].astype(np.int64)
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        outside = ~_contains(self.elements.get(itemsize, np.empty(0, np.int64)), touched)
        if outside.any():
            raise KernelFault(f"{self.kernel}, program {program}: {int(outside.sum())} lanes {kind} out of bounds")
        if kind == "store" and len(np.unique(touched)) != len(touched):
            raise KernelFault(f"{self.kernel}, program {program}: two lanes of one store write the same element")
        (self.writes if kind == "store" else self.reads).append((touched, program))
        self.itemsizes[kind].append(itemsize)

    def traffic(self) -> Traffic:
        counts = {}
        for kind, accesses in (("load", self.reads), ("store", self.writes)):
            sizes = self.itemsizes[kind]
            total = sum(len(touched) * size for (touched, _), size in zip(accesses, sizes, strict=True))
            distinct = 0
            for itemsize in set(sizes):
                alike = [touched for (touched, _), size in zip(accesses, sizes, strict=True) if size == itemsize]
                distinct += itemsize * len(np.unique(np.concatenate(alike)))
            counts[kind] = total, distinct
        (loaded, distinct_loaded), (stored, distinct_stored) = counts["load"], counts["store"]
        return Traffic(self.kernel, loaded, stored, distinct_loaded, distinct_stored, self.flop)

    def check_races(self) -> None:
        written, writer = _by_address(self.writes)
        if ((written[1:] == written[:-1]) & (writer[1:] != writer[:-1])).any():
            raise KernelFault(f"{self.kernel}: two programs write the same element")
        read, reader = _by_address(self.reads)
        also_written = _contains(written, read)
        if (writer[np.searchsorted(written, read[also_written])] != reader[also_written]).any():
            raise KernelFault(f"{self.kernel}: a program reads an element that another program writes")


def _element_addresses(x: Tensor) -> np.ndarray:
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(size) * stride).ravel()
    return x.data_ptr() + offsets * x.element_size()


def _contains(addresses: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Which queries are among the sorted addresses."""
    if len(addresses) == 0:
        return np.zeros(len(queries), bool)
    return addresses[np.searchsorted(addresses, queries).clip(max=len(addresses) - 1)] == queries


def _by_address(accesses: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    addresses = np.concatenate([np.empty(0, np.int64), *(touched for touched, _ in accesses)])
    programs = np.concatenate([np.empty(0, np.int64), *(np.full(len(t), program) for t, program in accesses)])
    order = np.argsort(addresses, kind="stable")
    return addresses[order], programs[order]


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Nearest even, as raw 16-bit words; adding half a unit in the last place must not turn NaN into infinity."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@contextlib.contextmanager
def guarded(seed: int = 0) -> Iterator[list[Traffic]]:
    """See the module's text; raises KernelFault from the launch that is at fault. The list receives what each launch
    moved, in order."""
    builder, executor = InterpreterBuilder, GridExecutor
    call, pass_args, cast = executor.__call__, executor._init_args_hst, builder.cast_impl
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    shuffle = random.Random(seed)
    launch = _Launch("")
    launches: list[Traffic] = []
    order: list[int] = []

    def guarded_call(self, *args, **kwargs):
        nonlocal launch
        launch = _Launch(self.fn.__name__)
        try:
            call(self, *args, **kwargs)
        except InterpreterError as error:
            # The interpreter wraps what a kernel raises once for every level of device functions.
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):
                cause = cause.__cause__
            raise (cause if isinstance(cause, KernelFault) else error) from None
        launch.check_races()
        launches.append(launch.traffic())

    def guarded_args(self, args, kwargs):
        args, kwargs = pass_args(self, args, kwargs)
        launch.pass_tensors([x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])
        return args, kwargs

    def shuffled_dim(self, *sizes):
        set_grid_dim(self, *sizes)
        order[:] = range(int(np.prod(sizes)))
        shuffle.shuffle(order)

    def shuffled_idx(self, *index):
        place = order[int(np.ravel_multi_index(index, self.grid_dim))]
        set_grid_idx(self, *(int(i) for i in np.unravel_index(place, self.grid_dim)))

    def program(self) -> int:
        return int(np.ravel_multi_index(self.grid_idx, self.grid_dim))

    def guarded_load(self, pointers, mask, *rest):
        launch.access("load", pointers, mask.data, program(self))
        return load(self, pointers, mask, *rest)

    def guarded_store(self, pointers, value, mask, *rest):
        launch.access("store", pointers, mask.data, program(self))
        return store(self, pointers, value, mask, *rest)

    def refused_atomic(self, *args):
        raise KernelFault(f"{launch.kernel}: atomic accesses are not tracked")

    def rounding_cast(self, value, dtype):
        if dtype.scalar == tl.bfloat16 and value.dtype.scalar in (tl.float32, tl.float64):
            return TensorHandle(_round_to_bfloat16(value.data), tl.bfloat16)
        return cast(self, value, dtype)

    def counted_dot(self, a, b, *rest):
        launch.flop += 2 * a.data.shape[0] * b.data.size  # (m, k) and (k, n)
        return dot(self, a, b, *rest)

    def counted(name: str, flop: int):
        compute = getattr(builder, name)

        def count(self, *args):
            result = compute(self, *args)
            launch.flop += flop * result.data.size
            return result

        return count

    patches = {
        executor: {"__call__": guarded_call, "_init_args_hst": guarded_args},
        builder: {
            "set_grid_dim": shuffled_dim,
            "set_grid_idx": shuffled_idx,
            "create_masked_load": guarded_load,
            "create_masked_store": guarded_store,
            "create_atomic_cas": refused_atomic,
            "create_atomic_rmw": refused_atomic,
            "cast_impl": rounding_cast,
            "create_dot": counted_dot,
            **{f"create_{name}": counted(f"create_{name}", flop) for name, flop in _ARITHMETIC.items()},
        },
    }
    with contextlib.ExitStack() as stack:
        for owner, members in patches.items():
            for name, member in members.items():
                stack.enter_context(mock.patch.object(owner, name, member))
        stack.enter_context(nan_in_fresh_memory())
        yield launches
