"""convrnn.mingru with resets and held frames: the float64 loop, pieces, NaN that must not spread, every regime of T."""

import functools
import itertools

import pytest
import torch
from torch.testing import assert_close

from convrnn import reference
from convrnn.ops import mingru

from .compare import DTYPES, check_against_reference
from .conftest import INTERPRETED

LONG = 13 if INTERPRETED else 2300  # in chunks, the last one shorter than the others

# Text and video, T whole with the rounding errors of the state carried along, and T in chunks.
SHAPES = {"short": (3, 9, 10), "video": (2, 7, 6, 3, 2), "whole": (4, 300, 6), "chunks": (2, LONG, 6)}
if INTERPRETED:
    del SHAPES["whole"]  # there is no such difference, and steps are slow
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    if INTERPRETED:
        from convrnn.kernels import chunks

        monkeypatch.setattr(chunks, "chunk_steps", lambda lanes, steps, *_: 5 if steps == LONG else steps)


def make_masks(shape, device):
    """Resets and holds, alone and together, in the first frame and the last, around ends of chunks; in a long sequence
    such that some chunks have none."""
    batch, steps = shape[:2]
    chance = 0.25 if steps < 100 else 2 / steps
    reset, hold = (torch.rand(batch, steps) < chance for _ in range(2))
    reset[0, 0] = hold[0, -1] = reset[1, -1] = hold[1, 0] = True
    reset[0, 3] = hold[0, 3] = hold[0, 4] = True
    for t in (5, 10) if INTERPRETED else (31, 32, 64, 1023, 1024, 2048):
        if steps >= LONG and t < steps:
            reset[0, t], hold[1, t], hold[1, t - 1] = True, True, True
    return {"reset": reset.to(device), "hold": hold.to(device)}


def inputs(shape, device, dtype=torch.float32, h0=True):
    x = torch.randn(shape, device=device).mul(2).to(dtype)
    return [x, torch.randn(shape[0], shape[2] // 2, *shape[3:], device=device).to(dtype) if h0 else None]


def check(x, h0, masks):
    check_against_reference(
        functools.partial(mingru, **masks),
        functools.partial(reference.mingru, **{name: mask.cpu() for name, mask in masks.items()}),
        [x, h0],
    )


@each_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype, shape, device):
    masks = make_masks(shape, device)
    if dtype in (torch.float32, torch.bfloat16) or shape[1] < 100:
        check(*inputs(shape, device, dtype), masks)
    if dtype == torch.float32:
        check(*inputs(shape, device, h0=False), {"reset": masks["reset"]})
        check(*inputs(shape, device, h0=False), {"hold": masks["hold"]})


@pytest.mark.parametrize("layout", ["channels_last", "time_first", "masks"])
def test_layouts(layout, device):
    x, h0 = inputs(SHAPES["video"], device)
    masks = make_masks(x.shape, device)
    if layout == "channels_last":
        x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    elif layout == "time_first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    else:  # (T, B) in memory, and one mask for all rows
        masks = {"reset": masks["reset"].T.contiguous().T, "hold": masks["hold"][:1].expand(2, -1)}
    check(x, h0, masks)


@each_shape
def test_pieces_and_episodes(shape, device):
    """Masked pieces of T give the whole; a reset begins what a call of its own does, up to the rounding of a chunk's end."""
    x, h0 = inputs(shape, device, torch.float64)
    masks = make_masks(shape, device)
    h, h_n = mingru(x, h0, **masks)
    out, state = [], h0
    cuts = [0, 1, 4, shape[1]]
    for a, b in itertools.pairwise(cuts):
        piece, state = mingru(x[:, a:b], state, **{name: mask[:, a:b] for name, mask in masks.items()})
        out.append(piece)
    assert_close((torch.cat(out, 1), state), (h, h_n))
    for b in range(shape[0]):
        starts = [0, *(masks["reset"][b].nonzero().flatten().tolist()), shape[1]]
        for i, (a, end) in enumerate(itertools.pairwise(starts)):
            if a < end:
                piece = slice(b, b + 1), slice(a, end)
                own = mingru(x[piece], h0[b : b + 1] if i == 0 else None, hold=masks["hold"][piece])
                assert_close(own[0], h[piece])


def grads(x, h0, masks, rounds=1):
    x, h0 = x.detach().requires_grad_(), h0.detach().requires_grad_()
    outputs = mingru(x, h0, **masks)
    found = list(outputs)
    for _ in range(rounds):
        torch.manual_seed(5)
        total = sum((torch.randn_like(y) * y).sum() for y in outputs)
        outputs = torch.autograd.grad(total, (x, h0), create_graph=rounds > 1)
        found += outputs
    return [y.detach() for y in found]


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.compiled)], ids=["first", "second_derivative"])
@each_shape
def test_what_held_frames_hold_has_no_influence(shape, rounds, device):
    x, h0 = inputs(shape, device)
    masks = make_masks(shape, device)
    held = masks["hold"].view(*shape[:2], *(1 for _ in shape[2:]))
    clean = grads(x.masked_fill(held, 0.3), h0, masks, rounds)
    for junk in (float("nan"), float("inf")):
        for a, b in zip(grads(x.masked_fill(held, junk), h0, masks, rounds), clean, strict=True):
            assert torch.equal(a, b)
    gradient = clean[2]
    assert (gradient.masked_select(held) == 0).all() and (gradient.masked_select(~held) != 0).any()


@each_shape
def test_nothing_crosses_a_reset(shape, device):
    """NaN in one sequence: not in the next one's states, nor in its gradients or those of the one before."""
    x, h0 = inputs(shape, device)
    reset = torch.zeros(shape[:2], dtype=torch.bool, device=device)
    first, second = shape[1] // 3, 2 * shape[1] // 3
    reset[:, first] = reset[:, second] = True
    dirty = x.clone()
    dirty[:, first : first + 2] = float("nan")
    for a, b in zip(grads(dirty, h0, {"reset": reset}), grads(x, h0, {"reset": reset}), strict=True):
        if a.dim() == x.dim():
            assert a[:, first:second].isnan().any()
            assert torch.equal(a[:, :first], b[:, :first]) and torch.equal(a[:, second:], b[:, second:])
        else:
            assert torch.equal(a, b)
    nan = torch.full_like(h0, float("nan"))
    h, h_n = mingru(x, nan, reset=reset)
    assert h[:, :first].isnan().all() and h[:, first:].isfinite().all() and h_n.isfinite().all()


def test_a_frame_without_a_reset_still_passes_nan(device):
    """Through a whole chunk that forgets by its gates alone."""
    x = torch.full((1, LONG, 2), 80.0, device=device)
    reset = torch.zeros(1, LONG, dtype=torch.bool, device=device)
    assert mingru(x, torch.full((1, 1), float("nan"), device=device), reset=reset)[1].isnan().all()


def test_rows_that_are_held_throughout(device):
    x, h0 = inputs((2, 5, 6), device)
    hold = torch.tensor([[True] * 5, [False] * 5], device=device)
    x, h0 = x.requires_grad_(), h0.requires_grad_()
    h, h_n = mingru(x, h0, hold=hold)
    assert torch.equal(h[0], h0[:1].expand(5, -1)) and torch.equal(h_n[0], h0[0])
    dx, dh0 = torch.autograd.grad(h.sum() + h_n.sum(), (x, h0))
    assert (dx[0] == 0).all() and (dh0[0] == 6).all()
    h, _ = mingru(x, h0, hold=hold, reset=hold)
    assert (h[0] == 0.5).all() and torch.autograd.grad(h[0].sum(), h0)[0].eq(0).all()


@pytest.mark.parametrize("shape", [(2, 0, 6), (0, 3, 6), (2, 3, 0)])
def test_empty(shape, device):
    x, h0 = inputs(shape, device)
    flags = torch.ones(shape[:2], dtype=torch.bool, device=device)
    h, h_n = mingru(x, h0, reset=flags, hold=flags)
    assert h.shape == (shape[0], shape[1], shape[2] // 2)
    assert shape[1] or torch.equal(h_n, h0)


@pytest.mark.compiled  # in the interpreter test_autograd.py has masks among its cases
def test_gradcheck(device):
    torch.manual_seed(1)
    x, h0 = (y + y.sign() * 0.1 for y in inputs((2, 4, 4), device, torch.float64))  # away from 0, where g has a corner
    masks = {
        "reset": torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]], device=device).bool(),
        "hold": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]], device=device).bool(),
    }
    leaves = (x.requires_grad_(), h0.requires_grad_())
    f = functools.partial(mingru, **masks)
    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves)


FLAGS = torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "masks"),
    [
        (TypeError, r"reset must be a bool Tensor of shape \[2, 3\], got list", {"reset": [True]}),
        (TypeError, "reset must be a bool Tensor, got torch.uint8", {"reset": FLAGS.byte()}),
        (ValueError, r"reset must have shape \[2, 3\], got \[3, 2\]", {"reset": FLAGS.T}),
        (ValueError, r"hold must have shape \[2, 3\], got \[2\]", {"hold": FLAGS[:, 0]}),
        (ValueError, r"hold must be on the device of gate_hidden \(cpu\), got meta", {"hold": FLAGS.to("meta")}),
    ],
)
def test_bad_input_is_named(error, message, masks):
    x = torch.zeros(2, 3, 6)
    with pytest.raises(error, match=message):
        mingru(x, **masks)
