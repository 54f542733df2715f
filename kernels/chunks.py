"""T cut in chunks that run side by side, for scans of few lanes, and when to cut it.

One thread that walks over all of T for its lanes keeps the memory busy only where lanes are many. Where they are few,
three launches take its place:

1. Every chunk reduces its steps to what it does to the state that enters it: the scan's own kernel, storing a map.
2. The carries: one thread a lane walks over the chunks' maps and writes the state that enters each (``carry_kernel``).
3. Every chunk runs again from that state and stores its results: the scan's own kernel, on (sample, chunk) rows.

A linear map is state -> kept state + moved, with ``lost`` = 1 - kept beside it: products of numbers near 1 lose what
makes them differ from 1, sums of small losses do not, and the state moves by moved - lost state where kept is large.
Backward in time, the gradient that enters a chunk comes from the chunk after it; chunks are counted from the last then,
and the maps are the same.

Maps and carries are float32, float64 for float64, laid out (B, chunks, arrays, lanes).
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import state_dtype
from .math import WARP, acc_dtype, jit_kernel, program_lanes, stride

# Bytes that must be on their way to each multiprocessor to keep its share of the memory busy: 2.3 MB on an H100.
BYTES_IN_FLIGHT = 17_500
# Elements that a thread loads ahead for each of its lanes: forward 4 steps of two tensors, backward 2 of four.
ELEMENTS_AHEAD = 8
STEPS_AHEAD = 4
CARRIES_AHEAD = 16

# Powers of two. Below 32 steps maps and carries are no longer few beside the elements; over more than 256, rounding
# errors of a float32 state begin to show (256 * 2^-25 < 1e-5).
MIN_CHUNK, MAX_CHUNK = 32, 256
MIN_CHUNKS = 4

MAP_ARRAYS = tl.constexpr(3)

# The lost share of a map that restarts: nothing is left of what enters, whatever it was. No share comes to 2, which tells
# it apart from one that vanished, through which a NaN passes.
CUT_OFF = tl.constexpr(2.0)


def chunk_steps(lanes: int, steps: int, itemsize: int, processors: int) -> int:
    """How many steps make a chunk; ``steps`` where T stays whole. Shape, dtype and device alone decide.

    Chunks move 5 elements per output instead of 3 (backward 8, of the log scan 10, instead of 6), so T stays whole where
    the lanes keep half of the bytes in flight that the memory needs. Else the longest path is shortest: a chunk twice,
    STEPS_AHEAD steps at a time, and the maps of all chunks once, CARRIES_AHEAD at a time: sqrt(steps / 8) steps.

    Args:
        lanes: over the whole batch.
        steps: T.
        itemsize: bytes of an element.
        processors: multiprocessors of the device.
    """
    enough = 2 * lanes * ELEMENTS_AHEAD * itemsize >= processors * BYTES_IN_FLIGHT
    if enough or steps < MIN_CHUNKS * MIN_CHUNK:
        return steps
    shortest_path = math.isqrt(steps * STEPS_AHEAD // (2 * CARRIES_AHEAD))
    return min(max(triton.next_power_of_2(shortest_path), MIN_CHUNK), MAX_CHUNK)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; elsewhere (the interpreter, compiling without a device) those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def cut(x: Tensor, lanes: int) -> tuple[int, int]:
    """The steps of a chunk and the number of chunks for a scan over ``x`` (B, T, ...) with ``lanes`` to a sample."""
    batch, steps = x.shape[:2]
    chunk = chunk_steps(batch * lanes, steps, x.element_size(), multiprocessors(x.device))
    return chunk, max(1, triton.cdiv(steps, max(1, chunk)))


@triton.jit
def program_chunk(T, chunk_steps, lanes, CHUNKED: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """What this program covers: its (sample, chunk) row, sample, first step, steps, lanes and mask as program_lanes.

    Chunks are counted in the order in which the scan comes to them. Where T is whole, row and sample are one, and
    constants say so: treating it as one chunk of many costs registers.
    """
    row, lane, mask = program_lanes(lanes, BLOCK)
    sample = row
    first = 0
    steps = T
    if CHUNKED:
        chunks = tl.cdiv(T, chunk_steps)
        sample = (row.to(tl.int32) // chunks).to(tl.int64)
        chunk = row - sample * chunks
        if BACKWARD:
            chunk = chunks - 1 - chunk
        first = chunk * chunk_steps
        steps = tl.minimum(T - first, chunk_steps).to(tl.int32)
    return row, sample, first, steps, lane, mask


@triton.jit
def decay(kept, lost, tail, keeps_tail):
    """The shares that are kept and lost after a step that keeps ``tail``, or 1 - tail, of the state."""
    product = kept * tail
    loss = tl.where(keeps_tail, kept - product, product)
    return tl.where(keeps_tail, product, kept - product), lost + loss


@triton.jit
def carry(state, kept, lost, moved):
    """The state behind a chunk from the state before it."""
    return tl.where(kept >= 0.5, state + (moved - lost * state), moved + kept * state)


@triton.jit
def store_map(maps, row, lanes, lane, mask, kept, lost, moved):
    ptr = maps + row * MAP_ARRAYS * lanes + lane
    tl.store(ptr, kept, mask)
    tl.store(ptr + lanes, lost, mask)
    tl.store(ptr + 2 * lanes, moved, mask)


@jit_kernel
def carry_kernel(
    initial,  # (B, *), lanes dense, batch stride free, or None for INITIAL everywhere
    maps,  # (B, chunks, 3, lanes), dense
    carries,  # (B, chunks, lanes), dense
    chunks: tl.int32,
    lanes: tl.int64,
    initial_stride_b: tl.int64,
    INITIAL: tl.constexpr,
    RESTARTS: tl.constexpr,  # whether maps may be cut off
    BLOCK: tl.constexpr,
    U: tl.constexpr,
    ACC: tl.constexpr,
):
    sample, lane, mask = program_lanes(lanes, BLOCK)
    if initial is not None:
        state = tl.load(initial + sample * initial_stride_b + lane, mask).to(ACC)
    else:
        state = tl.full((BLOCK,), INITIAL, ACC)
    map_ptr = maps + sample * chunks * MAP_ARRAYS * lanes + lane
    carry_ptr = carries + sample * chunks * lanes + lane
    for _ in range(chunks // U):
        kepts = ()
        losts = ()
        moveds = ()
        for u in tl.static_range(U):
            kepts += (tl.load(map_ptr + u * MAP_ARRAYS * lanes, mask),)
            losts += (tl.load(map_ptr + (u * MAP_ARRAYS + 1) * lanes, mask),)
            moveds += (tl.load(map_ptr + (u * MAP_ARRAYS + 2) * lanes, mask),)
        for u in tl.static_range(U):
            tl.store(carry_ptr + u * lanes, state, mask)
            state = carry(state, kepts[u], losts[u], moveds[u])
            if RESTARTS:
                state = tl.where(losts[u] == CUT_OFF, moveds[u], state)
        map_ptr += U * MAP_ARRAYS * lanes
        carry_ptr += U * lanes
    for _ in range(chunks % U):
        tl.store(carry_ptr, state, mask)
        kept, lost = tl.load(map_ptr, mask), tl.load(map_ptr + lanes, mask)
        moved = tl.load(map_ptr + 2 * lanes, mask)
        state = carry(state, kept, lost, moved)
        if RESTARTS:
            state = tl.where(lost == CUT_OFF, moved, state)
        map_ptr += MAP_ARRAYS * lanes
        carry_ptr += lanes


def scratch(like: Tensor, chunks: int, arrays: int, lanes: int) -> Tensor:
    """Uninitialised maps or carries (B, chunks, arrays, lanes) beside ``like`` (B, ...)."""
    return like.new_empty((like.shape[0], chunks, arrays, lanes), dtype=state_dtype(like))


def launch_carries(
    kernel: triton.JITFunction,
    like: Tensor,
    operands: tuple[Tensor | None, ...],
    chunks: int,
    lanes: int,
    initial_stride_b: int,
    **constexprs: object,
) -> None:
    """Run ``kernel`` with a warp for each 32 lanes of each sample: its walk waits for memory, not for lack of width, so
    a thread loads many maps of one lane ahead rather than a few of a vector of lanes."""
    with torch.cuda.device_of(like):
        kernel[(like.shape[0] * triton.cdiv(lanes, WARP),)](
            *operands,
            chunks,
            lanes,
            initial_stride_b,
            BLOCK=WARP,
            ACC=acc_dtype(like),
            num_warps=1,
            **constexprs,
        )


def linear_carries(
    like: Tensor, initial: Tensor | None, maps: Tensor, value: float = 0.0, restarts: bool = False
) -> Tensor:
    """The states (B * chunks, lanes) that enter the chunks of ``maps`` (B, chunks, 3, lanes).

    Args:
        like: whose dtype decides that of the states.
        initial: (B, *) with dense lanes, the state before the first chunk; None for ``value`` everywhere.
        maps: kept, lost and moved of each chunk.
        value: see initial.
        restarts: whether maps may be cut off.
    """
    _, chunks, _, lanes = maps.shape
    carries = scratch(like, chunks, 1, lanes)
    launch_carries(
        carry_kernel,
        like,
        (initial, maps, carries),
        chunks,
        lanes,
        0 if initial is None else stride(initial, 0),
        INITIAL=value,
        RESTARTS=restarts,
        U=CARRIES_AHEAD,
    )
    return carries.flatten(0, 2)
