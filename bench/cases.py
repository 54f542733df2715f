"""What is measured: for each case its inputs, its truth, the providers that compute it, and the bytes it must move."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import convrnn
from convrnn import reference

Provider = Callable[..., Tensor]


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        name: what the table calls it.
        inputs: its arguments; all of them get gradients in the training measurement.
        truth: the op in plain PyTorch, run in float64 to check the providers.
        providers: the ways to compute it, by name; ``convrnn`` is ours.
        floor_bytes: bytes that the forward must move, each input read and each output written once.
    """

    name: str
    inputs: list[Tensor]
    truth: Provider
    providers: dict[str, Provider] = field(default_factory=dict)
    floor_bytes: int = 0


def log_space_mingru(gate_hidden: Tensor) -> Tensor:
    """minGRU as a cumulative sum and a logcumsumexp, the form its paper and other packages use."""
    gate, hidden = gate_hidden.chunk(2, dim=2)
    log_g = torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
    log_a = F.pad(-F.softplus(gate), (*[0, 0] * (gate.dim() - 2), 1, 0)).cumsum(1)
    log_b = F.softplus(-gate).neg() + log_g
    log_h0 = torch.full_like(log_b[:, :1], 0.5).log()
    return (log_a + torch.logcumsumexp(torch.cat((log_h0, log_b), 1) - log_a, 1)).exp()[:, 1:]


def hoisted_gru_rcn(x: Tensor, h: Tensor, W: Tensor, U: Tensor, C: Tensor) -> Tensor:
    """GRU-RCN in plain PyTorch as an expert would write it: one input convolution for all frames, packed gates."""
    projected = F.conv2d(x.flatten(0, 1), W, padding="same").unflatten(0, x.shape[:2])
    channels = C.shape[0]
    out = []
    for t in range(x.shape[1]):
        xzr, xc = projected[:, t].split([2 * channels, channels], 1)
        z, r = torch.sigmoid(xzr + F.conv2d(h, U, padding="same")).chunk(2, 1)
        h = torch.lerp(h, torch.tanh(xc + F.conv2d(r * h, C, padding="same")), z)
        out.append(h)
    return torch.stack(out, 1)


def six_convolutions(x: Tensor, h: Tensor, W: Tensor, U: Tensor, C: Tensor) -> Tensor:
    """GRU-RCN as its paper writes it."""
    (Wz, Wr, Wc), (Uz, Ur) = W.chunk(3), U.chunk(2)
    out = []
    for frame in x.unbind(1):
        z = torch.sigmoid(F.conv2d(frame, Wz, padding="same") + F.conv2d(h, Uz, padding="same"))
        r = torch.sigmoid(F.conv2d(frame, Wr, padding="same") + F.conv2d(h, Ur, padding="same"))
        h = (1 - z) * h + z * torch.tanh(F.conv2d(frame, Wc, padding="same") + F.conv2d(r * h, C, padding="same"))
        out.append(h)
    return torch.stack(out, 1)


def mingru_case(device: str, *shape: int) -> Case:
    """minGRU at output shape (B, T, C, *S)."""
    batch, steps, channels, *size = shape
    gate_hidden = torch.randn(batch, steps, 2 * channels, *size, device=device)
    return Case(
        f"mingru {shape}",
        [gate_hidden],
        lambda gate_hidden: reference.mingru(gate_hidden)[0],
        {"convrnn": lambda gate_hidden: convrnn.mingru(gate_hidden)[0], "log space": log_space_mingru},
        floor_bytes=3 * gate_hidden.numel() // 2 * gate_hidden.element_size(),
    )


def gru_rcn_case(device: str, batch: int, steps: int, in_channels: int, channels: int, size: int) -> Case:
    """GRU-RCN with 3x3 kernels over (B, T, Ox, size, size) frames."""

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device) * scale

    inputs = [
        randn(batch, steps, in_channels, size, size),
        randn(batch, channels, size, size),
        randn(3 * channels, in_channels, 3, 3, scale=(9 * in_channels) ** -0.5),
        randn(2 * channels, channels, 3, 3, scale=(9 * channels) ** -0.5),
        randn(channels, channels, 3, 3, scale=(9 * channels) ** -0.5),
    ]
    return Case(
        f"gru_rcn {(batch, steps, in_channels, channels, size, size)}",
        inputs,
        lambda *a: reference.gru_rcn(*a)[0],
        {
            "convrnn": lambda *a: convrnn.gru_rcn(*a)[0],
            "hoisted": hoisted_gru_rcn,
            "six convolutions": six_convolutions,
        },
        floor_bytes=4 * (inputs[0].numel() + batch * steps * channels * size**2),
    )


def all_cases(device: str) -> list[Case]:
    """Shapes from the documents of the re-created projects, from video practice and from text."""
    torch.manual_seed(0)
    return [
        mingru_case(device, 16, 256, 512),
        mingru_case(device, 4, 4096, 256),
        mingru_case(device, 16, 10, 256, 14, 14),
        mingru_case(device, 4, 16, 64, 56, 56),
        gru_rcn_case(device, 16, 10, 5, 32, 8),
        gru_rcn_case(device, 16, 10, 64, 64, 7),
        gru_rcn_case(device, 4, 10, 64, 64, 28),
        gru_rcn_case(device, 1, 1, 64, 64, 28),
    ]
