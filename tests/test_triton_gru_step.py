"""The GRU step as implicit GEMMs: values where it is executed, machine code for every architecture, and when it is taken."""

import sys

import pytest
import torch
from torch import Tensor

import convrnn
from convrnn import reference

triton = pytest.importorskip("triton")

from convrnn.kernels import gru_rcn, gru_step

from .harness.compiled import AMD, ARCHS, Launch, check, check_product, compiling
from .harness.inputs import arrange, assert_close, assert_grads, double, randn, spread_out
from .harness.ptx.driver import executed

TF32 = 2.0**-10  # the epsilon of what float32 is multiplied in
# Allowed error in units of the dtype's epsilon: in 16 bits that of the other form, in float32 eight of TF32.
SEQUENCE = {torch.float32: round(8 * TF32 / torch.finfo(torch.float32).eps), torch.bfloat16: 64, torch.float16: 64}
PRODUCTS = ["gru_conv_gates_fwd_kernel", "gru_conv_update_fwd_kernel"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def tf32() -> None:
    """float32 is taken where TF32 is allowed."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield


def inputs_of(
    batch: int, steps: int, channels: int, height: int, width: int, dtype: torch.dtype, with_h0: bool = True
) -> list[Tensor | None]:
    """x, h0, W, U, C, bias."""
    kernel = (3, 3)
    shapes = [(batch, steps, 2, height, width), (batch, channels, height, width), (3 * channels, 2, *kernel)]
    shapes += [(2 * channels, channels, *kernel), (channels, channels, *kernel), (3 * channels,)]
    scales = (1, 1, 0.3, (9 * channels) ** -0.5, (9 * channels) ** -0.5, 0.3)
    inputs = [
        randn(*shape, dtype=dtype, seed=seed, scale=scale)
        for seed, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]
    inputs[1] = inputs[1] if with_h0 else None
    return inputs


# Maps smaller and larger than a tile of 64 pixels, an odd batch, channels of one block to three, and of two in depth.
SHAPES = ((3, 3, 5, 5, 8), (1, 2, 40, 1, 1), (3, 1, 17, 1, 7), (3, 2, 32, 7, 7), (1, 2, 72, 2, 3))


@pytest.mark.executed
@pytest.mark.parametrize("with_h0", (False, True), ids=("no_h0", "h0"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, shape: tuple[int, ...], with_h0: bool) -> None:
    """Backward, which knows nothing of how the step was computed, finds what it needs."""
    inputs = inputs_of(*shape, dtype, with_h0)
    with executed(seed=shape[2]) as launches:
        out, h_n, gates = gru_rcn.gru_rcn_fwd(*inputs, "gemm")
        assert [launch.kernel for launch in launches] == shape[1] * PRODUCTS
        dout, dh_n = (randn(*x.shape, dtype=dtype, seed=seed, scale=0.5) for x, seed in ((out, 7), (h_n, 8)))
        x, h0, W, U, C, _ = inputs
        actual = gru_rcn.gru_rcn_bwd(dout, dh_n, x, h0, W, U, C, out, gates, [True] * 6)
    wide = double(*inputs)
    expected = reference.gru_rcn(*wide)
    assert_close(out, expected[0], SEQUENCE[dtype], dtype)
    assert_close(h_n, expected[1], SEQUENCE[dtype], dtype)
    assert_grads(actual, expected, (dout, dh_n), wide, SEQUENCE[dtype], dtype)
    assert all(x.is_contiguous() for x in (out, h_n, gates))


@pytest.mark.executed
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_resets_and_held_frames(dtype: torch.dtype) -> None:
    """Tiles of 64 pixels that hold several samples; what is ruled out is NaN."""
    inputs = inputs_of(3, 4, 5, 5, 8, dtype)
    codes = torch.tensor([[0, 1, 2, 1], [3, 0, 1, 2], [2, 2, 0, 0]], dtype=torch.uint8)
    held = (codes & 2 != 0).view(3, 4, 1, 1, 1)
    dirty = [inputs[0].masked_fill(held, torch.nan), inputs[1].clone(), *inputs[2:]]
    dirty[1][1] = torch.nan  # of a row that begins anew
    with executed() as launches:
        out, h_n, gates = gru_rcn.gru_rcn_fwd(*dirty, "gemm", codes)
        assert [launch.kernel for launch in launches] == 4 * PRODUCTS
        dout, dh_n = (randn(*x.shape, dtype=dtype, seed=seed, scale=0.5) for x, seed in ((out, 7), (h_n, 8)))
        x, h0, W, U, C, _ = dirty
        actual = gru_rcn.gru_rcn_bwd(dout, dh_n, x, h0, W, U, C, out, gates, [True] * 6, codes)
    wide = double(*inputs)
    expected = reference.gru_rcn(*wide, reset=codes % 2 == 1, hold=codes >= 2)
    assert_close(out, expected[0], SEQUENCE[dtype], dtype)
    assert_close(h_n, expected[1], SEQUENCE[dtype], dtype)
    assert_grads(actual, expected, (dout, dh_n), wide, SEQUENCE[dtype], dtype)
    assert not gates.masked_select(held).any()


@pytest.mark.executed
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_a_projection_is_read_and_left(layout: str) -> None:
    x, h0, W, U, C, bias = inputs_of(3, 2, 8, 5, 5, torch.float32)
    convolved = torch.nn.functional.conv2d(x.flatten(0, 1), W, bias, padding=1).unflatten(0, x.shape[:2])
    projection = arrange(convolved, layout)
    with executed():
        results = [
            gru_rcn.gru_rcn_fwd(*arguments, "gemm")
            for arguments in ((x, h0, W, U, C, bias), (projection, h0, None, U, C, None))
        ]
    assert torch.equal(projection, convolved)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.executed
def test_the_state_stays_float32_from_step_to_step() -> None:
    inputs = inputs_of(2, 6, 32, 3, 3, torch.bfloat16)
    inputs[1] = inputs[1].float()
    h0 = inputs[1].clone()
    with executed():
        whole, h_n, gates = gru_rcn.gru_rcn_fwd(*inputs, "gemm")
        parts, h = [], inputs[1]
        for x in inputs[0].split(2, 1):
            out, h, _ = gru_rcn.gru_rcn_fwd(x, h, *inputs[2:], "gemm")
            parts.append(out)
    assert h_n.dtype == torch.float32 and torch.equal(h_n, h) and torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(whole[:, -1], h_n.bfloat16()) and not torch.equal(whole[:, -1].float(), h_n)
    assert torch.equal(inputs[1], h0)  # written in place is a copy
    z, _, c = gates.float().chunk(3, 2)
    torch.testing.assert_close(parts[0][:, 0].float(), torch.lerp(h0, c[:, 0], z[:, 0]), rtol=2**-7, atol=2**-7)


@pytest.mark.executed
def test_strides_beyond_2_to_the_31() -> None:
    """Gates and outputs of one sample lie 2^31 elements from those of the next."""
    results = []
    for place in (lambda x: x, lambda x: spread_out(x, 2**31 + 64)):
        gates = place(randn(3, 21, 3, 5, dtype=torch.bfloat16, seed=1))
        out = place(torch.zeros(3, 7, 3, 5, dtype=torch.bfloat16))
        state = randn(3, 3, 5, 7, dtype=torch.float32, seed=2)
        frame = state.bfloat16()
        _, _, _, U, C, _ = inputs_of(1, 1, 7, 1, 1, torch.bfloat16)
        with executed():
            gru_step.gru_conv_step_fwd(gates, state, frame, torch.empty_like(frame), out, *gru_step.pack_weights(U, C))
        assert torch.equal(frame, state.bfloat16())
        results.append((gates, out, state))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


def compiled(
    arch: int | str, dtype: torch.dtype, *shape: int, device: str = "meta", codes: Tensor | None = None
) -> list[Launch]:
    inputs = [x.to(device) for x in inputs_of(*shape, dtype)]
    with compiling(arch) as launches:
        gru_rcn.gru_rcn_fwd(*inputs, "gemm", codes)
    assert [launch.kernel for launch in launches] == shape[1] * PRODUCTS
    return launches


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code(arch: int, dtype: torch.dtype) -> None:
    for launch in compiled(arch, dtype, 16, 1, 64, 7, 7):
        check_product(launch, dtype.itemsize, registers=192)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_machine_code_with_codes(dtype: torch.dtype) -> None:
    """Codes of the pixels' samples beside it, a byte each; as many programs to a multiprocessor."""
    codes = torch.zeros(16, 1, dtype=torch.uint8, device="meta")
    for launch in compiled(90, dtype, 16, 1, 64, 7, 7, codes=codes):
        check_product(launch, dtype.itemsize, registers=216, codes=True)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "channels", "arch"),  # each pair of them, and on one architecture all
    [
        (dtype, channels, arch)
        for i, dtype in enumerate((torch.float32, torch.bfloat16))
        for j, channels in enumerate((33, 130))
        for k, arch in enumerate((90, 80, 100, AMD))
        if k == 0 or (i + j + k) % 2
    ],
    ids=str,
)
def test_machine_code_of_odd_channels(arch: int | str, dtype: torch.dtype, channels: int) -> None:
    """Correct and without spills, if not fast: operands come in smaller pieces."""
    launches = compiled(arch, dtype, 3, 1, channels, 5, 8, device="cpu")
    if arch == AMD:
        assert all(launch.stack == launch.spills == 0 for launch in launches)
    else:
        check(launches, aligned=False, barriers=40, registers=255, shared=(64 << 10) + 1024)


@pytest.mark.compiled
def test_one_machine_code_for_every_size() -> None:
    codes = [
        [launch.asm["sass"] for launch in compiled(90, torch.bfloat16, *shape)]
        for shape in ((1, 1, 64, 1, 1), (16, 1, 64, 7, 7), (2, 1, 128, 16, 1))
    ]
    assert codes[0] == codes[1] == codes[2]


@pytest.mark.compiled
def test_more_pixels_than_2_to_the_31() -> None:
    with torch.device("meta"):
        launches = compiled(90, torch.bfloat16, 2**26, 1, 32, 7, 7)
    assert {launch.grid for launch in launches} == {(2**26 * 49 // 64,)}


X, U, C = (16, 10, 3, 7, 7), (128, 64, 3, 3), (64, 64, 3, 3)


@pytest.mark.parametrize(
    "x, U, C, auto, gemm",
    (
        (X, U, C, True, True),
        ((16, 1, 3, 7, 7), U, C, True, True),
        ((16, 10, 3, 8, 8), U, C, False, True),  # a larger map
        ((160, 10, 3, 7, 7), U, C, False, True),  # more arithmetic than a launch takes
        (X, (32, 16, 3, 3), (16, 16, 3, 3), False, True),  # few channels
        (X, (80, 40, 3, 3), (40, 40, 3, 3), False, True),  # no multiple of 16
        (X, (128, 64, 3, 3), (64, 64, 1, 3), False, False),
        (X, (128, 64, 5, 5), C, False, False),
        ((16, 10, 3, 49), (128, 64, 3), (64, 64, 3), False, False),
        ((16, 10, 3, 2, 2, 2), (128, 64, 3, 3, 3), (64, 64, 3, 3, 3), False, False),
    ),
    ids=str,
)
def test_when_it_is_taken(x: tuple[int, ...], U: tuple[int, ...], C: tuple[int, ...], auto: bool, gemm: bool) -> None:
    def taken(step: str, dtype: torch.dtype) -> bool:
        return gru_step.use_gemm(step, *(torch.empty(shape, dtype=dtype, device="meta") for shape in (x, U, C)))

    for dtype in DTYPES:
        assert [taken(step, dtype) for step in ("auto", "gemm", "cudnn")] == [auto, gemm, False]
    assert not taken("gemm", torch.float64)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert not taken("gemm", torch.float32) and taken("gemm", torch.bfloat16) == gemm


@pytest.mark.executed
def test_the_op_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its sizes or as CONVRNN_GRU_STEP says, with the results of the other form up to rounding, gradients included."""
    inputs = [x.requires_grad_() for x in inputs_of(1, 2, 32, 3, 3, torch.float32)]
    results = []
    for step in ("auto", "gemm", "cudnn"):
        monkeypatch.setattr(sys.modules["convrnn.ops.gru_rcn"], "GRU_STEP", step)
        with executed() as launches:
            out, h_n = convrnn.gru_rcn(*inputs)
            grads = torch.autograd.grad(out.square().sum() + h_n.square().sum(), inputs)
        assert (PRODUCTS[0] in [launch.kernel for launch in launches]) == (step != "cudnn")
        results.append([out, h_n, *grads])
    for x, y, z in zip(*results, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=8 * TF32, atol=8 * TF32)
