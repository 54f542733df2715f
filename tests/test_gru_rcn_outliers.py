"""An outlier in a frame, such as a fill value of radar or climate data, spoils no element that does not see it.

Each convolution of the op is looked at alone: forward through the activations that are kept, data and weight gradients through
activations that are given. An element may be off by 2e-5 of what it sums, or of the median of these sums over its frame. This is
what our own convolutions hold; channels have weights of like size.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from convrnn.ops import gru_rcn

pytestmark = pytest.mark.compiled

BOUND = {torch.float32: 2e-5, torch.float64: 4e-14, torch.bfloat16: 2e-5, torch.float16: 2e-5}
# Of its own sum an element may be off by the rounding of 16-bit factors and results too.
ROUNDING = {torch.float32: 1e-6, torch.float64: 2e-15, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def own_convolutions(monkeypatch):
    monkeypatch.setenv("CONVRNN_CPU_CONV", "own")


CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv(x: Tensor, weight: Tensor) -> Tensor:
    return CONV[x.dim() - 2](x, weight, padding="same")


def data_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    x = torch.zeros(gradient.shape[0], weight.shape[1], *gradient.shape[2:], dtype=gradient.dtype, requires_grad=True)
    return torch.autograd.grad(conv(x, weight), x, gradient)[0]


def weight_gradient(x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    weight = weight.clone().requires_grad_()
    return torch.autograd.grad(conv(x, weight), weight, gradient)[0]


def from_kept(gates: Tensor) -> Tensor:
    """Activations (N, 3*Oh, *S) from the op's own layout: channels last in each of z, r and c."""
    frames, channels, *size = gates.shape
    return gates.view(frames, 3, *size, channels // 3).movedim(-1, 2).reshape(gates.shape)


def to_kept(gates: Tensor) -> Tensor:
    return torch.stack(gates.chunk(3, 1), 1).movedim(2, -1).reshape(gates.shape)


def assert_bounded(actual: Tensor, expected: Tensor, sums: Tensor, slope: float = 1.0, bound: float = 0.0) -> None:
    """|actual - expected| <= slope (bound of the convolution) for each element; `sums` are those of magnitudes."""
    dtype = actual.dtype
    frame = sums.flatten(2)
    usual = frame.median(-1).values.view(*frame.shape[:2], *(1 for _ in sums.shape[2:]))
    allowed = slope * (BOUND[dtype] * torch.maximum(sums, usual) + ROUNDING[dtype] * sums)
    allowed += bound + ROUNDING[dtype] * expected.abs() + (1e-35 if dtype != torch.float16 else 1e-7)
    in_range = sums < torch.finfo(dtype).max / 4  # beyond, the result or a part of its sum may overflow
    error = torch.where(in_range, (actual.double() - expected).abs(), 0.0)
    assert (error <= allowed).all(), (
        f"{(error / allowed).max():.2f} times what is allowed, in {(error > allowed).sum()}"
    )


def put_outliers(x: Tensor, value: float, where: str) -> None:
    """In place, into frames (N, C, *S)."""
    size = x.shape[2:]
    middle = tuple(n // 2 for n in size)
    if where == "corner":
        x[(slice(None), slice(None), *(0 for _ in size))] = value
    elif where == "one channel":
        x[(slice(None), 0, *middle)] = value
    elif where == "edge, the last channel":
        x[(slice(None), -1, *middle[:-1], size[-1] - 1)] = -value
    elif where == "scattered":
        x[torch.rand(x.shape[0], 1, *size).expand_as(x) < 0.01] = value
    elif where == "region":  # what a radar does not see
        distance = sum(
            ((torch.arange(n) - n / 2) ** 2).view(-1, *(1,) * (len(size) - i - 1)) for i, n in enumerate(size)
        )
        x[:, :, distance > 0.2 * max(size) ** 2] = value
    elif where == "mostly zeros":
        x[:, :, torch.rand(size) < 0.7] = 0
        x[(slice(None), 0, *middle)] = value


PLACES = ["corner", "one channel", "edge, the last channel", "scattered", "region", "mostly zeros"]

# frames, channels in and out, size, kernel: both sizes of tiles, kernels of one block and several, and the direct method.
SHAPES = [
    (2, 16, 16, (32, 32), (3, 3)),
    (1, 3, 16, (40, 70), (3, 3)),
    (9, 64, 48, (7, 7), (3, 3)),
    (3, 16, 32, (6, 5), (3, 3)),
    (1, 100, 20, (14, 15), (3, 3)),
    (2, 32, 16, (20, 16), (5, 5)),
    (1, 16, 16, (33, 28), (7, 7)),
    (2, 16, 32, (16, 16), (3, 5)),
    (2, 5, 7, (12, 12), (3, 3)),
    (2, 16, 16, (16, 16), (1, 5)),
    (3, 8, 16, (40,), (3,)),
    (1, 8, 16, (4, 6, 8), (3, 3, 3)),
]


def weight(channels_out: int, channels_in: int, kernel: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    w = torch.randn(channels_out, channels_in, *kernel)
    return (w / w[0].numel() ** 0.5).to(dtype)


def none(channels_out: int, channels_in: int, dims: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(channels_out, channels_in, *(1,) * dims, dtype=dtype)


def largest(dtype: torch.dtype, value: float) -> float:
    return min(value, 6e4) if dtype == torch.float16 else value


def check_forward(which: str, shape, dtype: torch.dtype, value: float, where: str) -> None:
    frames, inputs, hidden, size, kernel = shape
    x = torch.randn(frames, inputs if which == "W" else hidden, *size)
    put_outliers(x, largest(dtype, value), where)
    x = x.to(dtype)
    U, C = none(2 * hidden, hidden, len(size), dtype), none(hidden, hidden, len(size), dtype)
    W, h0, projection = None, None, torch.zeros(frames, 1, 3 * hidden, *size, dtype=dtype)
    if which == "W":
        W, projection = weight(3 * hidden, inputs, kernel, dtype), x[:, None]
    else:
        h0 = x
        U, C = (
            (weight(2 * hidden, hidden, kernel, dtype), C)
            if which == "U"
            else (U, weight(hidden, hidden, kernel, dtype))
        )
    gates = from_kept(torch.ops.convrnn.gru_rcn(projection, h0, W, U, C, None, True, None)[2][:, 0])
    used = {"W": W, "U": U, "C": C}[which]
    read = x.double() / 2 if which == "C" else x.double()  # r = 1 / 2
    a, sums = conv(read, used.double()), conv(read.abs(), used.double().abs())
    z_and_r = 2 * hidden if which != "C" else 0
    if z_and_r:
        assert_bounded(gates[:, :z_and_r], torch.sigmoid(a[:, :z_and_r]), sums[:, :z_and_r], 1 / 4)
    if which != "U":
        assert_bounded(gates[:, 2 * hidden :], torch.tanh(a[:, z_and_r:]), sums[:, z_and_r:])


def check_backward(which: str, shape, dtype: torch.dtype, value: float, where: str) -> None:
    """dout or what the weights multiply, or both, have outliers; z, r and c are given."""
    frames, inputs, hidden, size, kernel = shape
    if which != "W":
        inputs = hidden
    dout, x = torch.randn(frames, hidden, *size), torch.randn(frames, inputs, *size)
    put_outliers(dout, largest(dtype, value), where)
    for i in range(1, frames if abs(value) < 1e18 else 0, 2):  # in every other frame both, unless that overflows
        put_outliers(x[i : i + 1], largest(dtype, value), where)
    dout, x = dout.to(dtype), x.to(dtype)
    gates = (0.2 + 0.6 * torch.rand(frames, 3 * hidden, *size)).to(dtype)
    z, r, c = gates.double().chunk(3, 1)
    dims = len(size)
    U, C = none(2 * hidden, hidden, dims, dtype), none(hidden, hidden, dims, dtype)
    W, h0, up = None, None, dout.double()
    given = torch.zeros(frames, 1, 3 * hidden, *size, dtype=dtype)
    if which == "W":
        W, given = weight(3 * hidden, inputs, kernel, dtype), x[:, None]
        h = torch.zeros_like(up)
    else:
        h0, h = x, x.double()
        U, C = (
            (weight(2 * hidden, hidden, kernel, dtype), C)
            if which == "U"
            else (U, weight(hidden, hidden, kernel, dtype))
        )
    out = (h + z * (c - h)).to(dtype)
    dx, dh0, dW, dU, dC, _ = torch.ops.convrnn.gru_rcn_backward(
        dout[:, None], None, given, h0, W, U, C, out[:, None], to_kept(gates)[:, None], [True] * 6, None, None
    )
    az, ac = up * (c - h) * z * (1 - z), up * z * (1 - c * c)
    if which == "W":
        da, read, used = torch.cat((az, torch.zeros_like(az), ac), 1), x.double(), W
        assert_bounded(dx[:, 0], data_gradient(da, W.double()), data_gradient(da.abs(), W.double().abs()))
        found = dW
    elif which == "U":
        da, read, used = torch.cat((az, torch.zeros_like(az)), 1), h, U
        through, sums = data_gradient(da, U.double()), data_gradient(da.abs(), U.double().abs())
        past = up * (1 - z)
        assert_bounded(dh0, past + through, sums + past.abs())
        found = dU
    else:
        da, read, used = ac, r * h, C
        through, sums = data_gradient(da, C.double()), data_gradient(da.abs(), C.double().abs())
        past = up * (1 - z)
        assert_bounded(dh0, past + r * through, r * sums + past.abs())
        found = dC
    w = used.double()
    assert_bounded(found, weight_gradient(read, da, w), weight_gradient(read.abs(), da.abs(), w))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("check", [check_forward, check_backward], ids=["forward", "backward"])
def test_places(check, shape, where):
    for which in "WUC":
        check(which, shape, torch.float32, 1e5, where)


@pytest.mark.parametrize("value", [1e3, -9999.0, 1e7, 1e18, 9.96921e36], ids="{:g}".format)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[5]], ids=str)
@pytest.mark.parametrize("check", [check_forward, check_backward], ids=["forward", "backward"])
def test_values(check, shape, value):
    for where in ("one channel", "scattered"):
        for which in "WUC":
            check(which, shape, torch.float32, value, where)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:6] + SHAPES[-2:], ids=str)
@pytest.mark.parametrize("check", [check_forward, check_backward], ids=["forward", "backward"])
def test_dtypes(check, shape, dtype):
    for which in "WUC":
        check(which, shape, dtype, 1e5, "scattered")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nan_and_infinity_reach_what_sees_them(shape, dtype, value):
    frames, inputs, hidden, size, kernel = shape
    x = torch.randn(frames, 1, inputs, *size).to(dtype)
    W, U = weight(3 * hidden, inputs, kernel, dtype), weight(2 * hidden, hidden, kernel, dtype)
    C = weight(hidden, hidden, kernel, dtype)
    at = (0, 0, -1, *(n - 1 for n in size[:-1]), size[-1] // 2)  # in the last row, where taps lie outside the frame
    x[at] = value
    seen = torch.zeros(frames, 1, *size, dtype=torch.float64)
    seen[(0, 0, *at[3:])] = 1
    reached = conv(seen, torch.ones(1, 1, *kernel, dtype=torch.float64))[:, None] > 0.5
    kept = from_kept(torch.ops.convrnn.gru_rcn(x, None, W, U, C, None, True, None)[2][:, 0])
    expected = conv(x[:, 0].double(), W.double())
    for found, a in (
        (kept[:, :hidden], torch.sigmoid(expected[:, :hidden])),
        (kept[:, 2 * hidden :], expected[:, 2 * hidden :].tanh()),
    ):
        assert torch.equal(found.isnan(), a.isnan())
        torch.testing.assert_close(found.double(), a, rtol=2e-2, atol=2e-2, equal_nan=True)
    assert not gru_rcn(x, None, W, U, C)[0][~reached.expand(-1, -1, hidden, *(-1 for _ in size))].isnan().any()

    x[at], dout = 1.0, torch.randn(frames, 1, hidden, *size).to(dtype)
    dout[(0, 0, 0, *at[3:])] = value
    gates = (0.2 + 0.6 * torch.rand(frames, 3 * hidden, *size)).to(dtype)
    none_of = [none(n * hidden, hidden, len(size), dtype) for n in (2, 1)]
    out = (gates[:, :hidden] * gates[:, 2 * hidden :])[:, None]
    dx, _, dW, *_ = torch.ops.convrnn.gru_rcn_backward(
        dout, None, x, None, W, *none_of, out, to_kept(gates)[:, None], [True] * 6, None, None
    )
    da = torch.zeros(frames, 3 * hidden, *size, dtype=torch.float64)
    da[(0, 0, *at[3:])] = da[(0, 2 * hidden, *at[3:])] = value
    assert torch.equal(~dx[:, 0].isfinite(), ~data_gradient(da, W.double()).isfinite())
    ones = torch.ones_like(x[:, 0]).double()
    taps = (
        weight_gradient(ones, (~da.isfinite()).double(), W.double()) > 0.5
    )  # those that read a pixel of the frame there
    assert torch.equal(~dW.isfinite(), taps)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["x", "dout"])
def test_nan_beside_zeros(where, value):
    """0 * NaN is summed by the taps that read both, and by no others."""
    x, dout = torch.ones(1, 1, 16, 13, 13), torch.ones(1, 1, 16, 13, 13)
    bad, zero = (x, dout) if where == "x" else (dout, x)
    bad[0, 0, 0, 0, 6] = value
    zero[..., :7, :] = 0
    gates = torch.full((1, 48, 13, 13), 0.5)
    W, U, C = weight(48, 16, (3, 3), x.dtype), none(32, 16, 2, x.dtype), none(16, 16, 2, x.dtype)
    dW = torch.ops.convrnn.gru_rcn_backward(
        dout, None, x, None, W, U, C, torch.full_like(dout, 0.25), gates[:, None], [True] * 6, None, None
    )[2]
    up = dout[:, 0].double()
    da = torch.cat((up / 8, torch.zeros_like(up), up * 3 / 8), 1)
    # by taps: the library's gradient may read zeros around the frame
    padded = F.pad(x[:, 0].double(), (1, 1, 1, 1), value=1.0)
    expected = torch.zeros(48, 16, 3, 3, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            rows, columns = slice(max(0, 1 - i), 13 - max(0, i - 1)), slice(max(0, 1 - j), 13 - max(0, j - 1))
            read = padded[0, :, i : i + 13, j : j + 13][:, rows, columns]
            expected[:, :, i, j] = torch.einsum("nyx,kyx->nk", da[0][:, rows, columns], read)
    assert torch.equal(dW.isfinite(), expected.isfinite())
