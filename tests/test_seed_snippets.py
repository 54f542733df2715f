"""The usage snippets of the two packages that convrnn replaces, run as published but for the import.

The shapes, arguments and assertions are those packages' own; sizes that only cost time are smaller here.
"""

import pytest
import torch

import convrnn
from convrnn import GRU_RCN
from convrnn.reference import VanillaGRU_RCN


def test_gru_rcn_usage(device):
    """pytorch-convgru-cell: one (Oh, N1, N2) state for the whole batch, sizes as published."""
    N1, N2, Ox, Oh, L, B = 8, 8, 5, 32, 3, 2  # L and B were 100 and 16
    input = torch.rand((B, L, Ox, N1, N2), device=device)
    state = torch.rand((Oh, N1, N2), device=device)

    rnn = GRU_RCN(in_channels=Ox, nb_kernels=Oh, kernel_size=(3, 3)).to(device)
    assert sum(p.numel() for p in rnn.parameters() if p.requires_grad) == 9 * (3 * Oh * Ox + 3 * Oh * Oh)

    output, new_state = rnn(input, state)
    assert output.shape == (B, L, Oh, N1, N2) and new_state.shape == (B, Oh, N1, N2)


def test_gru_rcn_performance_setup(device):
    """pytorch-convgru-cell's timing set-up; the published one calls backward on outputs made under no_grad."""
    x = torch.rand((2, 2, 5, 8, 8), device=device)  # batch and steps were 16 and 10
    h = torch.rand((2, 32, 8, 8), device=device)
    rnn_ref = VanillaGRU_RCN(in_channels=5, nb_kernels=32, kernel_size=(3, 3)).to(device)
    rnn_cpp = GRU_RCN(in_channels=5, nb_kernels=32, kernel_size=(3, 3)).to(device)

    with torch.no_grad():
        y_cpp, _ = rnn_cpp(x, h)
        y_ref, _ = rnn_ref(x, h)
    y_cpp.requires_grad = True
    y_ref.requires_grad = True
    grad = torch.rand((2, 2, 32, 8, 8), device=device)
    y_cpp.backward(grad)
    y_ref.backward(grad)
    assert torch.equal(y_cpp.grad, y_ref.grad)


@pytest.fixture
def float64_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64_default")
def test_gru_rcn_technical_validity(device):
    N1, N2, Ox, Oh, B, L = 8, 8, 5, 32, 2, 3  # B and L were 16 and 5
    x1 = torch.rand((B, L, Ox, N1, N2), device=device, requires_grad=True)
    h1 = torch.rand((B, Oh, N1, N2), device=device, requires_grad=True)
    x2 = x1.clone().detach().requires_grad_(True)
    h2 = h1.clone().detach().requires_grad_(True)

    rnn_ref = VanillaGRU_RCN(in_channels=Ox, nb_kernels=Oh, kernel_size=(3, 3)).to(device)
    rnn_cpp = GRU_RCN(in_channels=Ox, nb_kernels=Oh, kernel_size=(3, 3)).to(device)

    rnn_cpp.W.data = torch.cat([rnn_ref.convWz.weight, rnn_ref.convWr.weight, rnn_ref.convWh.weight], dim=0)
    rnn_cpp.U.data = torch.cat([rnn_ref.convUz.weight, rnn_ref.convUr.weight], dim=0)
    rnn_cpp.C.data = rnn_ref.convUh.weight.clone()  # published as .copy(), which a Tensor has not

    y1, new_h1 = rnn_ref(x1, h1)
    y2, new_h2 = rnn_cpp(x2, h2)
    assert torch.all(torch.isclose(y1, y2))
    assert torch.all(torch.isclose(new_h1, new_h2))

    grad = torch.rand(y1.shape, device=device)  # published with x1.shape, which has other channels
    y1.backward(grad)
    y2.backward(grad)
    assert torch.all(torch.isclose(x1.grad, x2.grad))
    assert torch.all(torch.isclose(h1.grad, h2.grad))

    x_rnn_dW = torch.cat([rnn_ref.convWz.weight.grad, rnn_ref.convWr.weight.grad, rnn_ref.convWh.weight.grad], dim=0)
    x_rnn_dU = torch.cat([rnn_ref.convUz.weight.grad, rnn_ref.convUr.weight.grad], dim=0)
    assert torch.all(torch.isclose(x_rnn_dW, rnn_cpp.W.grad))
    assert torch.all(torch.isclose(x_rnn_dU, rnn_cpp.U.grad))
    assert torch.all(torch.isclose(rnn_ref.convUh.weight.grad, rnn_cpp.C.grad))


def test_mingru(device):
    """torch-mingru: stacked MinGRU, called at once, with states, and step by step."""
    B, input_size, hidden_sizes, S = 10, 3, [32, 64], 16  # S was 128
    rnn = convrnn.MinGRU(input_size=input_size, hidden_sizes=hidden_sizes, dropout=0.0, residual=True).eval().to(device)

    x = torch.randn(B, S, input_size, device=device)
    out, h = rnn(x)
    assert out.shape == (B, S, 64)
    assert h[0].shape == (B, 1, 32)
    assert h[1].shape == (B, 1, 64)

    h = rnn.init_hidden_state(x)
    out, h = rnn(torch.randn(B, S, input_size, device=device), h=h)

    h = rnn.init_hidden_state(x)
    out_seq = []
    for i in range(x.shape[1]):
        out, h = rnn(x[:, i : i + 1], h=h)
        out_seq.append(out)
    out_seq = torch.cat(out_seq, 1)
    assert out_seq.shape == (B, S, 64)

    out_par, h = rnn(x, rnn.init_hidden_state(x))
    assert torch.allclose(out_seq, out_par, atol=1e-4)


def test_min_conv2d_gru(device):
    """torch-mingru: three strided convolutional layers with residuals."""
    B, S = 2, 3  # were 5 and 10
    rnn = (
        convrnn.MinConv2dGRU(
            input_size=3,
            hidden_sizes=[16, 32, 64],
            kernel_sizes=[3, 3, 3],
            paddings=1,
            strides=2,
            dropout=0.0,
            residual=True,
        )
        .eval()
        .to(device)
    )

    x = torch.randn(B, S, 3, 16, 16, device=device)  # was 64 x 64
    out, h = rnn(x)
    assert out.shape == (B, S, 64, 2, 2)
    assert h[0].shape == (B, 1, 16, 8, 8)
    assert h[1].shape == (B, 1, 32, 4, 4)
    assert h[2].shape == (B, 1, 64, 2, 2)

    h = rnn.init_hidden_state(x)
    out, h = rnn(x, h=h)

    h = rnn.init_hidden_state(x)
    out_seq = []
    for i in range(x.shape[1]):
        out, h = rnn(x[:, i : i + 1], h=h)
        out_seq.append(out)
    out_seq = torch.cat(out_seq, 1)
    assert out_seq.shape == (B, S, 64, 2, 2)

    out_par, h = rnn(x, rnn.init_hidden_state(x))
    assert torch.allclose(out_seq, out_par, atol=1e-4)
