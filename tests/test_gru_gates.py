"""convrnn.ops.gru_gates and gru_update: one step between its convolutions, against the float64 formulas."""

import pytest
import torch

from convrnn import reference
from convrnn.ops import gru_gates, gru_update

from .compare import DTYPES, check_against_reference
from .conftest import INTERPRETED

OPS = {
    "gru_gates": (gru_gates, reference.gru_gates, (2, 2, 1)),
    "gru_update": (gru_update, reference.gru_update, (1, 1, 1, 1)),
}


def inputs(multiples, shape, device, dtype=torch.float32):
    batch, channels, *size = shape
    return [torch.randn(batch, k * channels, *size, device=device).to(dtype) for k in multiples]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 7), (1, 1), (3, 4, 2), (2, 3, 2, 2, 3)], ids=str)
def test_matches_reference(op, shape, dtype, device):
    ours, truth, multiples = OPS[op]
    check_against_reference(ours, truth, inputs(multiples, shape, device, dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_state_beside_16_bit_gates(op, dtype, device):
    ours, truth, multiples = OPS[op]
    *gates, h = inputs(multiples, (2, 3, 4), device, dtype)
    check_against_reference(ours, truth, [*gates, h.float()])
    assert ours(*gates, h.float())[-1].dtype == (torch.float32 if op == "gru_update" else dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "view",
    [lambda x: torch.cat((x, x), 1)[:, : x.shape[1]], lambda x: x.contiguous(memory_format=torch.channels_last)],
    ids=["chunk", "channels_last"],
)
def test_strides(op, view, device):
    ours, truth, multiples = OPS[op]
    check_against_reference(ours, truth, [view(x) for x in inputs(multiples, (2, 3, 4, 5), device)])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 8, 2, 4), (2, 3, 2, 2, 3)], ids=str)
def test_channels_last_stays_channels_last(op, shape, device):
    """Outputs have the layout of what the convolution returned, gradients too; a state of another is copied."""
    ours, truth, multiples = OPS[op]

    def channels_last(x):
        return x.movedim(1, -1).contiguous().movedim(-1, 1)

    def lies_channels_last(x):
        return x.movedim(1, -1).is_contiguous()

    *others, h = inputs(multiples, shape, device)
    for state in (channels_last(h), h):
        given = [*map(channels_last, others), state]
        check_against_reference(ours, truth, given)
        leaves = [x.requires_grad_() for x in given]
        outputs = ours(*leaves)
        assert all(map(lies_channels_last, outputs))
        gradients = torch.autograd.grad([y.sum() for y in outputs], leaves)
        assert all(map(lies_channels_last, gradients))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=str)
def test_empty(op, shape, device):
    ours, _, multiples = OPS[op]
    leaves = [x.requires_grad_() for x in inputs(multiples, shape, device)]
    outputs = ours(*leaves)
    assert all(output.shape == shape for output in outputs)
    gradients = torch.autograd.grad([output.sum() for output in outputs], leaves)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.2, 0.3, 30.0, 1e4])
def test_tanh_keeps_its_relative_accuracy(scale, device):
    x = torch.linspace(-1, 1, 1000, device=device).view(1, 1000) * scale
    zero = torch.zeros_like(x)
    torch.testing.assert_close(gru_update(x, zero, zero, zero)[0], x.double().tanh().float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, device):
    ours, _, multiples = OPS[op]
    leaves = [x.requires_grad_() for x in inputs(multiples, (2, 2, 3), device, torch.float64)]
    assert torch.autograd.gradcheck(ours, leaves, fast_mode=INTERPRETED)


@pytest.mark.parametrize(
    ("error", "named", "call"),
    [
        (TypeError, "h must", lambda x, h: gru_gates(x, x, h.int())),
        (ValueError, "h must", lambda x, h: gru_gates(x, x, h[0, :, 0])),
        (ValueError, "xp", lambda x, h: gru_gates(x[:, 1:], x, h)),
        (TypeError, "hp", lambda x, h: gru_gates(x, x.double(), h)),
        (TypeError, "h must", lambda x, h: gru_gates(x, x, h.double())),
        (TypeError, "h must", lambda x, h: gru_gates(x, x, h.bfloat16())),
        (ValueError, "z must", lambda x, h: gru_update(h, h, x, h)),
        (ValueError, "hc", lambda x, h: gru_update(h, h.to("meta"), h, h)),
    ],
)
def test_bad_input_is_named(error, named, call):
    with pytest.raises(error, match=named):
        call(torch.zeros(2, 6, 4), torch.zeros(2, 3, 4))
