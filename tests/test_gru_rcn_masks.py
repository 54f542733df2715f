"""convrnn.gru_rcn with resets and held frames: the float64 loop, pieces, NaN that must not spread, threads and chunks.

Derivatives of every order: test_autograd.py and test_functorch.py have masks among their cases.
"""

import functools
import itertools

import pytest
import torch
from torch.testing import assert_close

from convrnn import reference
from convrnn.ops import gru_rcn

from .compare import check_against_reference
from .conftest import INTERPRETED
from .test_gru_rcn import make

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
B, T = 3, 5


def make_masks(device, batch=B, steps=T):
    """Resets and holds, alone and together, beside one another, in the first frame and the last; a row held throughout."""
    reset, hold = (torch.rand(batch, steps) < 0.3 for _ in range(2))
    reset[0, 0] = reset[0, -1] = hold[0, 1] = reset[0, 2] = hold[0, 2] = hold[0, 3] = True
    reset[1, 0] = hold[1, 0] = hold[1, -1] = reset[1, 2] = True
    hold[2] = True
    return {"reset": reset.to(device), "hold": hold.to(device)}


def arguments(device, form="W", dtype=torch.float32, h0=True, **sizes):
    """x, h0, W, U, C, bias, or with a ready projection x, h0, None, U, C, None."""
    made = make(B, T, h0=h0, bias=True, device=device, dtype=dtype, **sizes)
    if form == "projection":
        made[0] = torch.randn(B, T, 3 * made[4].shape[0], *made[0].shape[3:], device=device).to(dtype)
        made[2] = made[5] = None
    return made


def check(inputs, masks, **options):
    check_against_reference(
        functools.partial(gru_rcn, **masks, **options),
        functools.partial(reference.gru_rcn, **{name: mask.cpu() for name, mask in masks.items()}),
        inputs,
    )


each_form = pytest.mark.parametrize("form", ["W", "projection"])
again = pytest.param(True, marks=pytest.mark.compiled)  # what the interpreter needs of it is in test_matches_reference
each_way = pytest.mark.parametrize("recompute", [False, again], ids=["kept", "recomputed"])


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matches_reference(dtype, form, recompute, device):
    masks = make_masks(device)
    check(arguments(device, form, dtype), masks, recompute=recompute)
    if dtype == torch.float32 and not recompute:
        for name in masks:
            check(arguments(device, form, h0=False), {name: masks[name]}, recompute=recompute)


@pytest.mark.parametrize(("size", "kernel"), [((7,), (4,)), ((6, 5), (2, 3)), ((3, 2, 4), (3, 1, 3))], ids=str)
def test_sizes_and_layouts(size, kernel, device):
    inputs = arguments(device, size=size, kernels=[kernel] * 3)
    masks = make_masks(device)
    check(inputs, masks)
    inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
    # (T, B) in memory, and one mask for all rows
    check(inputs, {"reset": masks["reset"].T.contiguous().T, "hold": masks["hold"][:1].expand(B, -1)})


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("batch", "channels", "size"),
    [(4, (9, 20), (8, 9)), (1, (5, 24), (13, 4)), (1, (16, 160), (14, 14)), (1, (5, 64), (28, 28))],
    ids=str,
)
def test_threads_parts_and_chunks(batch, channels, size):
    """Whole samples, rows or channels a thread, and steps of backward in several chunks, one of them held throughout."""
    dtype = torch.float64 if size == (28, 28) else torch.float32
    inputs = make(batch, 7, channels, size, bias=True, dtype=dtype)
    scale = [1, 1, *(3 / weight[0].numel() ** 0.5 for weight in inputs[2:5]), 1]
    inputs = [x * s for x, s in zip(inputs, scale, strict=True)]
    reset, hold = torch.rand(batch, 7) < 0.3, torch.rand(batch, 7) < 0.3
    hold[:, 3:6] = reset[:, 1] = True
    masks = {"reset": reset, "hold": hold}
    check(inputs, masks)
    leaves, before = [x.requires_grad_() for x in inputs], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for recompute in (False, True):
                out, h_n = gru_rcn(*leaves, recompute=recompute, **masks)
                results.append((out, h_n, *torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@each_form
def test_pieces_and_episodes(form, device):
    """Masked pieces of T give the whole; a reset begins what a call of its own does."""
    x, h0, *weights = arguments(device, form, torch.float64)
    masks = make_masks(device)
    h, h_n = gru_rcn(x, h0, *weights, **masks)
    for cuts in ([0, 1, 4, T], range(T + 1)):
        out, state = [], h0
        for a, b in itertools.pairwise(cuts):
            piece, state = gru_rcn(x[:, a:b], state, *weights, **{name: mask[:, a:b] for name, mask in masks.items()})
            out.append(piece)
        assert_close((torch.cat(out, 1), state), (h, h_n))
    for b in range(B):
        starts = [0, *(masks["reset"][b].nonzero().flatten().tolist()), T]
        for i, (a, end) in enumerate(itertools.pairwise(starts)):
            if a < end:
                piece = slice(b, b + 1), slice(a, end)
                own, _ = gru_rcn(x[piece], h0[b : b + 1] if i == 0 else None, *weights, hold=masks["hold"][piece])
                assert_close(own, h[piece])


def grads(inputs, masks, rounds=1, recompute=False):
    leaves = [x if x is None else x.detach().requires_grad_() for x in inputs]
    there = [x for x in leaves if x is not None]
    outputs = gru_rcn(*leaves, recompute=recompute, **masks)
    found = list(outputs)
    for _ in range(rounds):
        torch.manual_seed(5)
        total = sum((torch.randn_like(y) * y).sum() for y in outputs)
        outputs = torch.autograd.grad(total, there, create_graph=rounds > 1)
        found += outputs
    return [y.detach() for y in found]


@pytest.mark.parametrize("rounds", [1, pytest.param(2, marks=pytest.mark.compiled)], ids=["first", "second_derivative"])
@each_way
@each_form
def test_what_held_frames_hold_has_no_influence(form, recompute, rounds, device):
    x, *rest = arguments(device, form)
    masks = make_masks(device)
    held = masks["hold"].view(B, T, 1, 1, 1)
    clean = grads([x.masked_fill(held, 0.3), *rest], masks, rounds, recompute)
    for junk in (float("nan"), float("inf")):
        for a, b in zip(grads([x.masked_fill(held, junk), *rest], masks, rounds, recompute), clean, strict=True):
            assert torch.equal(a, b)
    for gradient in clean[2 :: (len(clean) - 2) // rounds]:  # of x, first and second
        assert (gradient.masked_select(held) == 0).all() and (gradient.masked_select(~held) != 0).any()


@each_way
@each_form
def test_nothing_crosses_a_reset(form, recompute, device):
    """NaN in one sequence: not in the next one's states, nor in its gradients or those of the one before."""
    x, h0, *weights = arguments(device, form)
    reset = torch.zeros(B, T, dtype=torch.bool, device=device)
    reset[:, 1] = reset[:, 3] = True
    hold = torch.zeros_like(reset)
    hold[0, 2] = True  # the state of NaN passes a frame
    dirty = x.clone()
    dirty[:, 1] = float("nan")
    masks = {"reset": reset, "hold": hold}
    found, clean = (grads([y, h0, *weights], masks, recompute=recompute) for y in (dirty, x))
    for a, b in zip((found[0], found[2]), (clean[0], clean[2]), strict=True):  # out, dx
        assert a[:, 1].isnan().any() and a[1:, 2].isnan().any()
        assert torch.equal(a[:, :1], b[:, :1]) and torch.equal(a[:, 3:], b[:, 3:])
    assert not found[2][0, 2].any()
    assert torch.equal(found[1], clean[1]) and torch.equal(found[3], clean[3])  # h_n, dh0
    out, h_n = gru_rcn(x, torch.full_like(h0, float("nan")), *weights, **masks)
    assert out[:, 0].isnan().all() and out[:, 1:].isfinite().all() and h_n.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_held_throughout(dtype, device):
    """The state passes bit for bit, signs of zeros and all; with a reset it is zero."""
    x, h0, *weights = arguments(device, dtype=dtype)
    small = 1e-40 if dtype == torch.float32 else 1e-30
    h0[0, 0, 0] = torch.tensor([-0.0, float("inf"), small, -small, 0.0, 1.0], device=device)
    h0 = h0.float()  # of numbers that the dtype has
    hold = torch.zeros(B, T, dtype=torch.bool, device=device)
    hold[0] = True
    x, h0 = x.requires_grad_(), h0.requires_grad_()
    out, h_n = gru_rcn(x, h0, *weights, hold=hold)
    assert torch.equal(h_n[0].view(torch.int32), h0[0].view(torch.int32))
    assert torch.equal(out[0].view(torch.int16), h0[:1].to(dtype).expand(T, -1, -1, -1).contiguous().view(torch.int16))
    dx, dh0 = torch.autograd.grad(out.float().sum() + h_n.sum(), (x, h0))
    assert (dx[0] == 0).all() and (dh0[0] == T + 1).all()
    out, h_n = gru_rcn(x, h0, *weights, hold=hold, reset=hold)
    assert not out[0].any() and not h_n[0].any() and torch.autograd.grad(out[0].sum(), h0)[0].eq(0).all()


@pytest.mark.parametrize(("batch", "steps"), [(2, 0), (0, 3)])
def test_empty(batch, steps, device):
    leaves = [x.requires_grad_() for x in make(batch, steps, bias=True, device=device)]
    flags = torch.ones(batch, steps, dtype=torch.bool, device=device)
    out, h_n = gru_rcn(*leaves, reset=flags, hold=flags)
    assert out.shape == (batch, steps, 4, 5, 6) and torch.equal(h_n, leaves[1])
    assert torch.equal(torch.autograd.grad(out.sum() + h_n.sum(), leaves)[1], torch.ones_like(h_n))


@pytest.mark.compiled
def test_only_the_wanted_gradients(device):
    masks, inputs = make_masks(device), arguments(device)
    leaves = [a.clone().requires_grad_() for a in inputs]
    expected = torch.autograd.grad(gru_rcn(*leaves, **masks)[0].sum(), leaves)
    for i in range(len(inputs)):
        chosen = [a.clone().requires_grad_(i == j) for j, a in enumerate(inputs)]
        gru_rcn(*chosen, **masks)[0].sum().backward()
        assert_close(chosen[i].grad, expected[i])


def test_autocast(device):
    inputs, masks = arguments(device), make_masks(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, h_n = gru_rcn(*inputs, **masks)
    assert out.dtype == torch.bfloat16 and h_n.dtype == torch.float32
    x, h0, *weights = inputs
    assert torch.equal(out, gru_rcn(x.bfloat16(), h0, *(w.bfloat16() for w in weights), **masks)[0])


def test_no_mask_is_no_code(device):
    """Masks that say nothing change no bit."""
    inputs = arguments(device)
    flags = torch.zeros(B, T, dtype=torch.bool, device=device)
    for a, b in zip(grads(inputs, {"reset": flags, "hold": flags}), grads(inputs, {}), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if INTERPRETED else 0)


FLAGS = torch.zeros(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("error", "message", "masks"),
    [
        (TypeError, r"reset must be a bool Tensor of shape \[2, 4\], got list", {"reset": [True]}),
        (TypeError, "reset must be a bool Tensor, got torch.uint8", {"reset": FLAGS.byte()}),
        (ValueError, r"reset must have shape \[2, 4\], got \[4, 2\]", {"reset": FLAGS.T}),
        (ValueError, r"hold must have shape \[2, 4\], got \[2\]", {"hold": FLAGS[:, 0]}),
        (ValueError, r"hold must be on the device of x \(cpu\), got meta", {"hold": FLAGS.to("meta")}),
    ],
)
def test_bad_input_is_named(error, message, masks):
    with pytest.raises(error, match=message):
        gru_rcn(*make(), **masks)


def test_bad_codes_are_refused_by_the_ops(device):
    x, h0, W, U, C, _ = make(device=device)
    out, _, gates = torch.ops.convrnn.gru_rcn(x, h0, W, U, C)
    saved = (out, None, x, h0, W, U, C, out, gates, [True] * 6, None)
    for codes in (FLAGS.to(device), FLAGS.byte().T.to(device)):
        with pytest.raises((TypeError, ValueError, RuntimeError), match="codes"):
            torch.ops.convrnn.gru_rcn(x, h0, W, U, C, None, True, codes)
        with pytest.raises((TypeError, ValueError, RuntimeError), match="codes"):
            torch.ops.convrnn.gru_rcn_backward(*saved, codes)
