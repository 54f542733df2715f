"""convrnn.gru_rcn without W: the recurrence alone, over a projection that a convolution of any kind made."""

import pytest
import torch

from convrnn import reference
from convrnn.ops import gru_rcn
from convrnn.ops._gru_rcn_tangent import restore

from .compare import check_against_reference

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
NAMES = ["x", "h0", "U", "C"]


def make(batch=2, steps=4, hidden=4, size=(5, 6), *, kernel=None, h0=True, device="cpu", dtype=torch.float32):
    """x, h0, U, C."""
    kernel = kernel or (3,) * len(size)

    def randn(*shape, scale=1.0):
        return (torch.randn(shape, device=device) * scale).to(dtype)

    scale = (hidden * torch.Size(kernel).numel()) ** -0.5
    return [
        randn(batch, steps, 3 * hidden, *size),
        randn(batch, hidden, *size) if h0 else None,
        randn(2 * hidden, hidden, *kernel, scale=scale),
        randn(hidden, hidden, *kernel, scale=scale),
    ]


def ours(x, h0, U, C, **options):
    return gru_rcn(x, h0, None, U, C, **options)


def recomputed(*arguments):
    return ours(*arguments, recompute=True)


def truth(x, h0, U, C):
    return reference.gru_rcn(x, h0, None, U, C)


@pytest.mark.parametrize("h0", [False, True], ids=["no_h0", "h0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("f", [ours, recomputed], ids=["kept", "recomputed"])
def test_matches_reference(f, dtype, h0, device):
    check_against_reference(f, truth, make(h0=h0, device=device, dtype=dtype))


@pytest.mark.parametrize(
    ("size", "kernel"), [((7,), (4,)), ((1, 1), (3, 3)), ((5, 9), (2, 3)), ((3, 2, 4), (3, 1, 3))], ids=str
)
def test_sizes(size, kernel, device):
    for batch, steps in ((1, 1), (3, 2)):
        check_against_reference(ours, truth, make(batch, steps, 3, size, kernel=kernel, device=device))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x, x), 2)[:, :, 3 : x.shape[2] + 3],
        lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    ],
    ids=["time_first", "chunk", "channels_last", "transposed"],
)
def test_strides(view, device):
    x, *rest = make(device=device)
    check_against_reference(ours, truth, [view(x), *rest])
    check_against_reference(recomputed, truth, [view(x), *rest])


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("batch", "hidden", "size"),
    [(3, 16, (7, 7)), (5, 33, (13, 4)), (1, 64, (28, 28)), (1, 160, (14, 14))],  # samples, rows or channels are shared
    ids=str,
)
def test_maps_and_threads(batch, hidden, size):
    """Tiles, parts and chunks of the C++ kernels, whose number of threads does not change a bit."""
    arguments = make(batch, 3, hidden, size)
    check_against_reference(ours, truth, arguments)
    leaves, before = [a.requires_grad_() for a in arguments], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for f in (ours, recomputed):
                out, h_n = f(*leaves)
                results.append((out, h_n, *torch.autograd.grad(out.square().sum() + h_n.sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize(("batch", "steps", "size"), [(2, 0, (5, 6)), (0, 3, (5, 6)), (2, 3, (0, 4))], ids=str)
def test_empty(batch, steps, size, device):
    leaves = [a.requires_grad_() for a in make(batch, steps, size=size, device=device)]
    out, h_n = ours(*leaves)
    gradients = torch.autograd.grad(out.sum() + h_n.sum(), leaves)
    assert out.shape == (batch, steps, 4, *size) and [g.shape for g in gradients] == [a.shape for a in leaves]
    assert torch.equal(h_n, leaves[1]) and torch.equal(gradients[1], torch.ones_like(h_n))
    assert not any(g.any() for g in (gradients[0], *gradients[2:]))


def test_only_the_wanted_gradients(device):
    arguments = make(device=device)
    leaves = [a.clone().requires_grad_() for a in arguments]
    expected = torch.autograd.grad(ours(*leaves)[0].sum(), leaves)
    for i, name in enumerate(NAMES):
        chosen = [a.clone().requires_grad_(i == j) for j, a in enumerate(arguments)]
        ours(*chosen)[0].sum().backward()
        torch.testing.assert_close(chosen[i].grad, expected[i], msg=name)


def test_what_is_kept(device):
    """The activations instead of the projection, or, where they are computed again, the projection."""
    leaves = [a.requires_grad_() for a in make(device=device)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.clone()) or x, lambda x: x):
        for f in (ours, recomputed):
            saved.clear()
            out, _ = f(*leaves)
            known = [a.detach() for a in (*(leaves[1:] if f is ours else leaves), out)]
            others = [x for x in saved if not any(torch.equal(x, y) for y in known)]
            assert [x.shape for x in others if x.numel() > 0] == ([leaves[0].shape] if f is ours else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_double_backward_where_gates_are_saturated(dtype, device):
    """It finds the projection from the activations, which 1 and 0 do not tell."""
    arguments = make(1, 3, device=device, dtype=dtype)
    arguments[0] = arguments[0] * torch.tensor([1.0, 200.0]).repeat(6).view(-1, 1, 1).to(device, dtype)

    def penalty(f, inputs):
        out, h_n = f(*inputs)
        gradients = torch.autograd.grad(out.square().sum() + h_n.sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)

    actual = penalty(ours, [a.requires_grad_() for a in arguments])
    expected = penalty(truth, [a.detach().cpu().double().requires_grad_() for a in arguments])
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype] * b.abs().max().item()
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=tolerance, msg=name)


@pytest.mark.executed
@pytest.mark.parametrize("sign", [1, -1])
def test_a_candidate_that_division_rounded_beyond_1(sign, device):
    """(1 - e) / (1 + e) of a GPU's division may be two units in the last place above 1, where atanh is NaN."""
    x, h0, U, C = make(1, 2, device=device)
    out = torch.zeros_like(x[:, :, :4])
    gates = torch.cat([torch.full_like(out, value) for value in (0.5, 0.5, sign * (1 + 2**-22))], 2)
    restored = restore([x, h0, None, U, C, None], [out, gates, None])
    assert restored[0].isfinite().all()


@pytest.mark.compiled
def test_gradcheck(device):
    leaves = [a.requires_grad_() for a in make(1, 2, 1, (3, 2), device=device, dtype=torch.float64)]
    for f in (ours, recomputed):
        assert torch.autograd.gradcheck(f, leaves)
        assert torch.autograd.gradgradcheck(f, leaves)


def test_autocast(device):
    x, h0, U, C = make(device=device)
    x.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        out, h_n = ours(x, h0, U, C)
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert out.dtype == torch.bfloat16 and h_n.dtype == gradient.dtype == torch.float32
    assert torch.equal(out, ours(x.bfloat16(), h0, U.bfloat16(), C.bfloat16())[0])


def test_as_the_projection_of_the_op_itself(device):
    """What a layer may do instead of giving W."""
    _, h0, U, C = make(device=device)
    W, bias = torch.randn(12, 3, 3, 3, device=device), torch.randn(12, device=device)
    frames = torch.randn(2, 4, 3, 5, 6, device=device)
    projection = torch.nn.functional.conv2d(frames.flatten(0, 1), W, bias, padding=1).unflatten(0, (2, 4))
    for a, b in zip(ours(projection, h0, U, C), gru_rcn(frames, h0, W, U, C, bias), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("error", "named", "position", "bad"),
    [
        (ValueError, r"x must be \(B, T, 3\*Oh, \*S\) without W = \[2, 4, 12, 5, 6\]", 0, lambda x: x[:, :, 1:]),
        (TypeError, "U must have the dtype of x", 0, lambda x: x.double()),
        (ValueError, "h0 must", 1, lambda h: h[..., 1:]),
        (ValueError, "U must", 2, lambda w: w[:, 1:]),
        (ValueError, "C must", 3, lambda w: w[:, 1:]),
    ],
)
def test_bad_input_is_named(error, named, position, bad):
    arguments = make()
    arguments[position] = bad(arguments[position])
    with pytest.raises(error, match=named):
        ours(*arguments)


def test_a_bias_without_W_is_refused(device):
    x, h0, U, C = make(device=device)
    bias = torch.zeros(12, device=device)
    with pytest.raises(ValueError, match="bias must be None without W"):
        gru_rcn(x, h0, None, U, C, bias)
    out, _, gates = torch.ops.convrnn.gru_rcn(x, h0, None, U, C)
    for op, arguments in (
        (torch.ops.convrnn.gru_rcn, (x, h0, None, U, C, bias)),
        (torch.ops.convrnn.gru_rcn, (x[:, :, :9], h0, None, U, C)),
        (torch.ops.convrnn.gru_rcn_backward, (out, None, x, h0, None, U, C, out, gates, [True] * 6, bias)),
        (torch.ops.convrnn.gru_rcn_backward, (out, None, x[:, :, :9], h0, None, U, C, out, gates, [True] * 6)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            op(*arguments)
