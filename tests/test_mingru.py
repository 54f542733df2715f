"""convrnn.mingru: values, gradients, layouts and precision against the float64 loop."""

import pytest
import torch

from convrnn import reference
from convrnn.ops import mingru, mingru_gate_hidden

from .compare import DTYPES, TOLERANCE, assert_close, check_against_reference
from .conftest import INTERPRETED

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "chunk": lambda x: torch.cat((x, x), 2)[:, :, : x.shape[2]],
    "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    "every_other": lambda x: torch.stack((x, x), -1)[..., 0],
}


@pytest.mark.parametrize("with_h0", [False, True], ids=["no_h0", "h0"])
@pytest.mark.parametrize("size", [(), (3, 5)], ids=["text", "video"])
@pytest.mark.parametrize("layout", LAYOUTS)
# in the interpreter test_triton_scans.py has the others
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if INTERPRETED else DTYPES, ids=str)
def test_matches_reference(dtype, layout, size, with_h0, device):
    x = LAYOUTS[layout](torch.randn(2, 7, 2 * 5, *size, device=device).mul(2).to(dtype))
    h0 = torch.randn(2, 5, *size, device=device).to(dtype) if with_h0 else None
    check_against_reference(mingru, reference.mingru, [x, h0])


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 2),
        (3, 1, 2 * 301),
        (1, 9, 2 * 515),
        (1, 3, 2 * 2051),
        (2, 140 if INTERPRETED else 300, 2 * 9),  # T in chunks
        (2, 5, 2 * 3, 11),
        (1, 3, 4, 2, 3, 4),
    ],
)
def test_shapes(shape, device):
    check_against_reference(mingru, reference.mingru, [torch.randn(shape, device=device)])


@pytest.mark.parametrize("channels", [1, 2, 130, 300, 1100])
def test_channels_last_keeps_its_layout(channels, device):
    x = LAYOUTS["channels_last"](torch.randn(2, 4, 2 * channels, 3, 2, device=device))
    check_against_reference(mingru, reference.mingru, [x, torch.randn(2, channels, 3, 2, device=device)])
    h, h_n = mingru(x)
    if channels > 1:
        assert h.stride()[2] == 1 and h_n.stride()[1] == 1
        assert h.transpose(1, 2).is_contiguous(memory_format=torch.channels_last_3d) or h.movedim(2, -1).is_contiguous()


@pytest.mark.parametrize("shape", [(2, 0, 6), (0, 3, 6), (0, 0, 6), (2, 3, 0), (2, 3, 6, 0)])
def test_empty(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    h0 = torch.randn(shape[0], shape[2] // 2, *shape[3:], device=device, requires_grad=True)
    h, h_n = mingru(x, h0)
    assert h.shape == (shape[0], shape[1], shape[2] // 2, *shape[3:])
    if shape[1] == 0:
        assert torch.equal(h_n, h0)
    (h.sum() + h_n.sum()).backward()
    assert x.grad.shape == x.shape and h0.grad.shape == h0.shape


def test_no_state_is_one_half(device):
    x = torch.randn(2, 3, 8, device=device)
    half = torch.full((2, 4), 0.5, device=device)
    assert torch.equal(mingru(x)[0], mingru(x, half)[0])
    assert torch.equal(mingru(x[:, :0])[1], half)


def test_any_split_of_time_agrees(device):
    x, h = torch.randn(2, 9, 6, 2, device=device), torch.randn(2, 3, 2, device=device)
    whole, h_n = mingru(x, h)
    parts = []
    for piece in x.split([1, 4, 0, 3, 1], dim=1):
        out, h = mingru(piece, h)
        parts.append(out)
    assert torch.equal(torch.cat(parts, 1), whole) and torch.equal(h, h_n)


def test_state_is_fp32_whatever_the_dtype(device):
    x, h = torch.randn(1, 64, 8, device=device).bfloat16(), torch.zeros(1, 4, device=device)
    for t in range(64):
        _, h = mingru(x[:, t : t + 1], h)
    assert h.dtype == torch.float32
    assert_close("h", h, reference.mingru(x.cpu().double(), torch.zeros(1, 4).double())[1], 1e-6)


@pytest.mark.parametrize("logit", [-1e4, -90.0, -20.0, 20.0, 90.0, 1e4])
def test_extreme_logits(logit, device):
    x = torch.randn(1, 3, 8, device=device)
    x[:, :, :4] = logit
    h0 = torch.randn(1, 4, device=device)
    check_against_reference(mingru, reference.mingru, [x, h0])
    x[:, :, 4:] = logit
    check_against_reference(mingru, reference.mingru, [x, h0])


def test_nan_and_inf_are_not_hidden(device):
    x = torch.zeros(1, 4, 4, device=device)
    x[0, 1, 0] = float("nan")
    x[0, 2, 3] = float("inf")
    h, _ = mingru(x)
    assert h[0, 0].isfinite().all() and h[0, 1:, 0].isnan().all() and not h[0, 2:, 1].isfinite().any()


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.parametrize("bias", [0.0, -3.9, -11.5], ids=["z_0.5", "z_0.02", "z_1e-5"])
def test_long_sequences_stay_exact(bias, device):
    x = torch.randn(1, 65536, 2 * 8, device=device)
    x[:, :, :8] += bias
    expected = reference.mingru(x.cpu().double())[0]
    error = ((mingru(x)[0].cpu() - expected).abs() / expected.abs()).max().item()
    assert error < (1e-5 if device == "cpu" else 2e-5)  # the CPU's scan carries its rounding errors along


def test_gradients_where_one_output_is_used(device):
    x = torch.randn(2, 5, 6, device=device, requires_grad=True)
    reference_x = x.detach().cpu().double().requires_grad_()
    for which in (0, 1):
        (got,) = torch.autograd.grad(mingru(x)[which].sum(), x)
        (expected,) = torch.autograd.grad(reference.mingru(reference_x)[which].sum(), reference_x)
        assert_close("gradient", got, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("with_h0", [False, True], ids=["no_h0", "h0"])
def test_gradcheck(with_h0, device):
    # away from 0, where g has a corner
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, device=device)
    x = (x + x.sign() * 0.1).requires_grad_()
    h0 = torch.randn(2, 2, 2, dtype=torch.float64, device=device, requires_grad=True) if with_h0 else None
    assert torch.autograd.gradcheck(mingru, (x, h0), fast_mode=INTERPRETED)


def test_gate_hidden_is_the_seeds_entry_point(device):
    gate, hidden, h = (torch.randn(2, t, 3, 4, device=device) for t in (5, 5, 1))
    expected = mingru(torch.cat((gate, hidden), 2), h[:, 0])[0]
    assert torch.equal(mingru_gate_hidden(gate, hidden, h), expected)


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (TypeError, "gate_hidden", lambda x: mingru(x.int())),
        (TypeError, "gate_hidden", lambda x: mingru([1.0])),
        (ValueError, "gate_hidden", lambda x: mingru(x[0])),
        (ValueError, "gate_hidden", lambda x: mingru(x[:, :, :5])),
        (ValueError, "h0", lambda x: mingru(x, torch.zeros(2, 4))),
        (ValueError, "h0", lambda x: mingru(x, torch.zeros(1, 3))),
        (ValueError, "h0", lambda x: mingru(x, torch.zeros(2, 3, device="meta"))),
        (TypeError, "h0", lambda x: mingru(x, torch.zeros(2, 3, dtype=torch.long))),
        (ValueError, "hidden", lambda x: mingru_gate_hidden(x, x[:, :1], x[:, :1])),
        (TypeError, "hidden", lambda x: mingru_gate_hidden(x, x.double(), x[:, :1])),
        (ValueError, "h must", lambda x: mingru_gate_hidden(x, x, x)),
    ],
)
def test_bad_input_is_named(error, named, call):
    with pytest.raises(error, match=named):
        call(torch.zeros(2, 3, 6))
