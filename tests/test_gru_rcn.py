"""convrnn.gru_rcn: the whole-sequence op against the float64 loop over frames."""

import pytest
import torch

from convrnn import reference
from convrnn.ops import gru_rcn

from .compare import DTYPES, check_against_reference
from .conftest import INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def make(
    batch=2, steps=4, channels=(3, 4), size=(5, 6), kernels=None, *, h0=True, bias=False, device="cpu", dtype=None
):
    """x, h0, W, U, C, bias; `kernels` are the kernel sizes of W, U and C."""
    in_channels, hidden = channels
    kernels = kernels or [(3,) * len(size)] * 3

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype or torch.float32)

    return [
        randn(batch, steps, in_channels, *size),
        randn(batch, hidden, *size) if h0 else None,
        randn(3 * hidden, in_channels, *kernels[0], scale=0.3),
        randn(2 * hidden, hidden, *kernels[1], scale=0.3),
        randn(hidden, hidden, *kernels[2], scale=0.3),
        randn(3 * hidden) if bias else None,
    ]


@pytest.mark.parametrize("h0", [False, True], ids=["no_h0", "h0"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype, bias, h0, device):
    check_against_reference(gru_rcn, reference.gru_rcn, make(h0=h0, bias=bias, device=device, dtype=dtype))


@pytest.mark.parametrize(
    "kernel", [(1, 1), (3, 3), (5, 5), (2, 2), (4, 4), (1, 5), (5, 1), (2, 3), (3, 4)], ids=lambda k: f"{k[0]}x{k[1]}"
)
def test_kernel_sizes(kernel, device):
    check_against_reference(gru_rcn, reference.gru_rcn, make(kernels=[kernel] * 3, bias=True, device=device))


def test_kernels_of_different_sizes(device):
    check_against_reference(gru_rcn, reference.gru_rcn, make(kernels=[(5, 3), (3, 3), (1, 2)], device=device))
    check_against_reference(gru_rcn, reference.gru_rcn, make(size=(3,), kernels=[(4,), (6,), (2,)], device=device))


@pytest.mark.parametrize("size", [(7,), (1,), (1, 1), (1, 9), (3, 2, 4)], ids=str)
def test_frame_sizes(size, device):
    check_against_reference(gru_rcn, reference.gru_rcn, make(size=size, device=device))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "channels", "size"),
    [
        (2, (5, 32), (8, 8)),
        (3, (16, 16), (7, 7)),  # the last tiles are half outside the frame
        (1, (12, 20), (5, 9)),  # channels that fill no block; rows are shared by the threads
        (2, (9, 48), (6, 13)),
        (5, (3, 33), (13, 4)),
        (1, (64, 64), (28, 28)),
        (2, (8, 8), (2, 2)),  # too small for tiles
        (1, (16, 160), (14, 14)),  # channels are shared by the threads
    ],
    ids=str,
)
def test_tiles_of_pixels(batch, channels, size, dtype):
    """Sizes at which the CPU multiplies transformed tiles, and their neighbours."""
    inputs = make(batch, 2, channels, size, bias=True, dtype=dtype)
    scale = [1, 1, *(3 / weight[0].numel() ** 0.5 for weight in inputs[2:5]), 1]  # as layers are at their start
    inputs = [x * s for x, s in zip(inputs, scale, strict=True)]
    check_against_reference(gru_rcn, reference.gru_rcn, inputs)


@pytest.mark.compiled
@pytest.mark.parametrize(
    "size",
    [
        *[(height, width) for height in (5, 6, 7, 8, 9) for width in (5, 6, 7, 8, 9)],
        (13, 15),
        (28, 28),
        (4, 16),  # one row of tiles of 4x4
        (17, 3),  # one column
        (1, 16),
        (1, 1),
    ],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tiles_at_the_edges_of_frames(size, dtype):
    """Tiles of 2x2 and 4x4, in so many frames that weight gradients take 4x4 where the convolutions do."""
    inputs = make(6, 2, (9, 20), size, bias=True, dtype=dtype)
    scale = [1, 1, *(3 / weight[0].numel() ** 0.5 for weight in inputs[2:5]), 1]
    inputs = [x * s for x, s in zip(inputs, scale, strict=True)]
    check_against_reference(gru_rcn, reference.gru_rcn, inputs)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("batch", "channels", "size", "kernels"),
    [
        (3, (16, 32), (13, 15), [(5, 5)] * 3),
        (1, (16, 24), (29, 30), [(7, 7)] * 3),  # rows are shared by the threads
        (2, (20, 40), (14, 14), [(3, 5), (4, 4), (2, 3)]),
        (8, (16, 64), (9, 10), [(3, 5), (6, 3), (3, 6)]),  # tiles of 2x2
        (2, (32, 96), (28, 28), [(2, 2), (8, 1), (3, 8)]),  # squares of weight gradients end within a block
        (4, (9, 40), (28, 30), [(7, 7), (5, 5), (4, 4)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_kernels_in_blocks(batch, channels, size, kernels, dtype):
    """Tiles for kernels other than 3x3, which are cut into blocks of 3x3 taps."""
    inputs = make(batch, 2, channels, size, kernels, bias=True, dtype=dtype)
    scale = [1, 1, *(3 / weight[0].numel() ** 0.5 for weight in inputs[2:5]), 1]
    inputs = [x * s for x, s in zip(inputs, scale, strict=True)]
    check_against_reference(gru_rcn, reference.gru_rcn, inputs)


@pytest.mark.compiled
@pytest.mark.parametrize(("channels", "size"), [((256, 64), (14, 14)), ((64, 128), (8, 8))], ids=str)
def test_error_of_tiles_of_many_channels(channels, size):
    """Tiles of 4x4 magnify the error of sums over channels: it stays below 5e-6 of the largest output, and in gradients below
    4e-6 (direct float32 convolutions: 7e-7 to 1.2e-6 and 7e-7)."""
    inputs = make(4, 2, channels, size, bias=True)
    scale = [1, 1, *(3 / weight[0].numel() ** 0.5 for weight in inputs[2:5]), 1]
    inputs = [x * s for x, s in zip(inputs, scale, strict=True)]
    leaves = [x.requires_grad_() for x in inputs]
    truth = [x.detach().double().requires_grad_() for x in inputs]
    results = []
    for op, arguments in ((gru_rcn, leaves), (reference.gru_rcn, truth)):
        out, _ = op(*arguments)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
        results.append((out, *torch.autograd.grad(out, arguments, upstream)))
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
        assert error <= (5e-6 if i == 0 else 4e-6), (i, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("h0", [False, True], ids=["no_h0", "h0"])
def test_recomputed_activations_are_those_kept(h0, dtype, device):
    arguments = make(3, 5, (8, 16), (6, 7), h0=h0, bias=True, device=device, dtype=dtype)
    found = []
    for recompute in (False, True):
        leaves = [a if a is None else a.clone().requires_grad_() for a in arguments]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, to=saved: to.append(x.numel()) or x, lambda x: x):
            out, h_n = gru_rcn(*leaves, recompute=recompute)
        gradients = torch.autograd.grad(out.sum() + h_n.square().sum(), [x for x in leaves if x is not None])
        found.append((sum(saved), out, h_n, *gradients))
    (kept, *expected), (without, *actual) = found
    assert kept - without >= 3 * expected[0].numel() - 3 * 16
    for a, b in zip(actual, expected, strict=True):
        # the state of a later step is read back in 16 bits where they are computed again
        tolerance = 0.015 if dtype == torch.bfloat16 else 1e-6 if INTERPRETED or device == "cuda" else 0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


FRAMES = [((16, 160), (14, 14)), ((3, 20), (9, 11)), ((16, 24), (7, 10)), ((4, 8), (2, 5, 6))]


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("batch", "channels", "size", "kernel", "dtype"),
    [
        *((batch, *frames, 3, torch.float32) for frames in FRAMES for batch in (1, 2, 3, 5)),
        (11, (8, 16), (8, 8), 3, torch.float32),
        (13, (3, 8), (1, 1), 3, torch.float32),
        *((batch, (8, 24), (28, 30), 7, torch.float32) for batch in (1, 6)),
        (1, (100, 160), (14, 14), 3, torch.float32),  # 5 threads share channels of x too
        (3, (16, 160), (7, 10), 3, torch.bfloat16),
    ],
    ids=str,
)
def test_threads_do_not_change_a_bit(batch, channels, size, kernel, dtype, monkeypatch):
    """Whether threads take whole samples, and how many together, or share rows and channels follows from their number.

    Of our convolutions: PyTorch's promise nothing.
    """
    monkeypatch.setenv("CONVRNN_CPU_CONV", "own")
    before = torch.get_num_threads()
    kernels = [(kernel,) * len(size)] * 3
    leaves = [x.requires_grad_() for x in make(batch, 3, channels, size, kernels, bias=True, dtype=dtype)]
    results = {False: [], True: []}
    try:
        for threads in (1, 2, 4, 5):
            torch.set_num_threads(threads)
            with torch.no_grad():
                inference = gru_rcn(*leaves)
            for recompute in (False, True):
                out, h_n = gru_rcn(*leaves, recompute=recompute)
                gradients = torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)
                results[recompute].append((*inference, out, h_n, *gradients))
    finally:
        torch.set_num_threads(before)
    for first, *others in results.values():
        for result in others:
            assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("batch", "channels", "size", "kernel"),
    [
        (3, (6, 20), (9, 11), (5, 5)),
        (1, (8, 34), (12, 9), (2, 2)),
        (2, (7, 33), (6, 5), (5, 5)),  # odd: channels come in pairs
        (9, (4, 8), (1, 1), (3, 3)),  # most taps meet no frame
        (2, (8, 16), (3, 5, 6), (3, 3, 3)),
        (4, (4, 160), (14, 5), (1, 5)),  # more frames than weight gradients take at once
        (2, (5, 40), (3, 7), (1, 1)),  # no zeros beside a row, whose pixels come in pairs
        (3, (6, 16), (8, 5), (3, 4)),
    ],
    ids=str,
)
def test_products_of_bfloat16(batch, channels, size, kernel):
    """Where the CPU has them, convolutions and weight gradients multiply bfloat16 numbers and sum in float32."""
    arguments = make(batch, 3, channels, size, [kernel] * 3, bias=True)
    arguments[2:5] = [w / 4 for w in arguments[2:5]]
    check_against_reference(gru_rcn, reference.gru_rcn, [a.bfloat16() for a in arguments])


@pytest.mark.compiled
def test_many_chunks_of_steps():
    """Backward works on as many steps at a time as a few megabytes hold."""
    arguments = make(1, 7, (5, 64), (28, 28), bias=True, dtype=torch.float64)
    arguments[2:5] = [w / 4 for w in arguments[2:5]]
    check_against_reference(gru_rcn, reference.gru_rcn, arguments)


def test_inference_gives_the_same_states(device):
    arguments = make(3, 4, (8, 16), (6, 7), bias=True, device=device)
    with torch.inference_mode():
        states = gru_rcn(*arguments)
    for x, y in zip(states, gru_rcn(*(a.requires_grad_() for a in arguments)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (1, 3), (3, 1)])
def test_one_sample_and_one_step(batch, steps, device):
    for h0 in (False, True):
        check_against_reference(gru_rcn, reference.gru_rcn, make(batch, steps, h0=h0, device=device))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x, x), 2)[:, :, : x.shape[2]],
        lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    ],
    ids=["time_first", "chunk", "channels_last"],
)
def test_strides(view, device):
    x, h0, *weights = make(device=device)
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    h0 = h0.transpose(-1, -2).contiguous().transpose(-1, -2)
    check_against_reference(gru_rcn, reference.gru_rcn, [view(x), h0, *weights])


@pytest.mark.parametrize(("batch", "steps"), [(2, 0), (0, 3), (0, 0)])
def test_empty(batch, steps, device):
    leaves = [x.requires_grad_() for x in make(batch, steps, bias=True, device=device)]
    out, h_n = gru_rcn(*leaves)
    assert out.shape == (batch, steps, 4, 5, 6) and torch.equal(h_n, leaves[1])
    gradients = torch.autograd.grad(out.sum() + h_n.sum(), leaves)
    assert torch.equal(gradients[1], torch.ones_like(leaves[1]))
    assert all(gradient.eq(0).all() for gradient in gradients[2:])


@pytest.mark.parametrize("size", [(0, 4), (3, 0)], ids=str)
def test_frames_without_pixels(size, device):
    leaves = [x.requires_grad_() for x in make(size=size, bias=True, device=device)]
    out, h_n = gru_rcn(*leaves)
    gradients = torch.autograd.grad(out.sum() + h_n.sum(), leaves)
    assert [g.shape for g in gradients] == [x.shape for x in leaves] and not any(g.any() for g in gradients)


def test_any_split_of_time_agrees(device):
    x, h, *weights = make(steps=6, device=device)
    whole, h_n = gru_rcn(x, h, *weights)
    parts = []
    for piece in x.split([1, 3, 2], dim=1):
        out, h = gru_rcn(piece, h, *weights)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(h, h_n, rtol=0, atol=1e-6)


def test_state_is_fp32_whatever_the_dtype(device):
    x, h0, *weights = make(device=device, dtype=torch.bfloat16)
    out, h_n = gru_rcn(x, h0.float(), *weights)
    assert out.dtype == torch.bfloat16 and h_n.dtype == torch.float32
    # Triton's interpreter truncates to bfloat16: up to one unit in the last place
    torch.testing.assert_close(out[:, -1], h_n.bfloat16(), rtol=2**-7 if INTERPRETED else 0, atol=0)


def test_only_the_wanted_gradients(device):
    names = ["x", "h0", "W", "U", "C", "bias"]
    arguments = make(bias=True, device=device)
    leaves = [a.clone().requires_grad_() for a in arguments]
    expected = torch.autograd.grad(gru_rcn(*leaves)[0].sum(), leaves)
    for i, name in enumerate(names):
        chosen = [a.clone().requires_grad_(i == j) for j, a in enumerate(arguments)]
        gru_rcn(*chosen)[0].sum().backward()
        torch.testing.assert_close(chosen[i].grad, expected[i], msg=name)


def test_gradients_where_one_output_is_used(device):
    arguments = make(device=device)
    for which in (0, 1):
        check_against_reference(
            lambda *a, i=which: gru_rcn(*a)[i], lambda *a, i=which: reference.gru_rcn(*a)[i], arguments
        )


@pytest.mark.parametrize("kernel", [(3, 3), (2, 3)], ids=str)
def test_gradcheck(kernel, device):
    leaves = [
        x.requires_grad_()
        for x in make(1, 2, (2, 2), (3, 2), [kernel] * 3, bias=True, device=device, dtype=torch.float64)
    ]
    assert torch.autograd.gradcheck(gru_rcn, leaves, fast_mode=INTERPRETED)


@pytest.mark.parametrize(
    ("error", "named", "position", "bad"),
    [
        (TypeError, "x must", 0, lambda x: x.long()),
        (ValueError, "x must", 0, lambda x: x[0, 0]),
        (ValueError, "W must", 0, lambda x: x[:, :, 1:]),
        (TypeError, "W must", 0, lambda x: x.double()),
        (ValueError, "h0 must", 1, lambda h: h[:1]),
        (ValueError, "h0 must", 1, lambda h: h[..., 1:]),
        (ValueError, "h0 must", 1, lambda h: h.to("meta")),
        (ValueError, "W must", 2, lambda w: w[1:]),
        (ValueError, "U must", 3, lambda w: w[:, 1:]),
        (TypeError, "U must", 3, lambda w: w.bfloat16()),
        (ValueError, "C must", 4, lambda w: w[:, 1:]),
        (ValueError, "C must", 4, lambda w: w[0]),
        (ValueError, "U must", 3, lambda w: w[..., :0]),
        (ValueError, "bias must", 5, lambda b: b[1:]),
        (TypeError, "bias must", 5, lambda b: b.double()),
    ],
)
def test_bad_input_is_named(error, named, position, bad):
    arguments = make(bias=True)
    arguments[position] = bad(arguments[position])
    with pytest.raises(error, match=named):
        gru_rcn(*arguments)
