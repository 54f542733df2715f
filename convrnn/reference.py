"""Each op as a plain PyTorch loop: the truth that the tests compare with and a baseline of the benchmarks.

Nothing here is fast, and nothing here uses the kernels. Run it in float64 for the truth.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VanillaGRU_RCN", "g", "gru_gates", "gru_rcn", "gru_update", "log_scan", "mingru"]


def g(x: Tensor) -> Tensor:
    """g(x) = x + 1/2 for x >= 0, sigmoid(x) otherwise: minGRU's positive candidate activation (arXiv 2410.01201)."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def mingru(
    gate_hidden: Tensor, h0: Tensor | None = None, reset: Tensor | None = None, hold: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z_t) h_{t-1} + z_t g(hidden_t), z = sigmoid(gate); see :func:`convrnn.mingru`."""
    gate, hidden = gate_hidden.chunk(2, dim=2)
    h = torch.full_like(gate[:, 0], 0.5) if h0 is None else h0
    # sigmoid(-gate) is 1 - z without its cancellation where z is close to 1; unbind, whose gradient is one tensor, keeps
    # the backward linear in T
    keep, new = torch.sigmoid(-gate).unbind(1), (torch.sigmoid(gate) * g(hidden)).unbind(1)
    out = []
    for t, (keep_t, new_t) in enumerate(zip(keep, new, strict=True)):
        if reset is not None:
            h = torch.where(reset[:, t].view(-1, *(1 for _ in h.shape[1:])), 0.5, h)
        moved = keep_t * h + new_t
        h = moved if hold is None else torch.where(hold[:, t].view(-1, *(1 for _ in h.shape[1:])), h, moved)
        out.append(h)
    return torch.stack(out, dim=1), h


def log_scan(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log x of x_0 = b_0, x_t = a_t x_{t-1} + b_t, one logaddexp a step; see :func:`convrnn.parallel_scan_log`."""
    first, *rest = log_b.unbind(1)
    log_x = [first]
    for log_a_t, log_b_t in zip(log_a.unbind(1), rest, strict=True):
        log_x.append(torch.logaddexp(log_a_t + log_x[-1], log_b_t))
    return torch.stack(log_x, dim=1)


def gru_gates(xp: Tensor, hp: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[z, r] = sigmoid(xp + hp), and r.h; xp and hp are (B, 2C, *S), h is (B, C, *S)."""
    z, r = torch.sigmoid(xp + hp).chunk(2, dim=1)
    return z, r, r * h


def gru_update(xc: Tensor, hc: Tensor, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """c = tanh(xc + hc), h' = (1 - z) h + z c; all are (B, C, *S)."""
    c = torch.tanh(xc + hc)
    return c, (1 - z) * h + z * c


def _same_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3](x, weight, bias, padding="same")


def gru_rcn(
    x: Tensor,
    h0: Tensor | None,
    W: Tensor | None,
    U: Tensor,
    C: Tensor,
    bias: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    hold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GRU-RCN with packed convolutions, one frame after another; see :func:`convrnn.gru_rcn`."""
    h = x.new_zeros(x.shape[0], C.shape[0], *x.shape[3:]) if h0 is None else h0
    out = []
    for t in range(x.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t].view(-1, *(1 for _ in h.shape[1:])), 0.0, h)
        xz, xr, xc = (x[:, t] if W is None else _same_conv(x[:, t], W, bias)).chunk(3, dim=1)
        z, _, rh = gru_gates(torch.cat((xz, xr), 1), _same_conv(h, U), h)
        _, moved = gru_update(xc, _same_conv(rh, C), z, h)
        h = moved if hold is None else torch.where(hold[:, t].view(-1, *(1 for _ in h.shape[1:])), h, moved)
        out.append(h)
    return torch.stack(out, dim=1), h


class VanillaGRU_RCN(nn.Module):
    """GRU-RCN as the paper writes it: six convolutions a frame (Ballas et al., ICLR 2016, arXiv 1511.06432).

    z = sigmoid(Wz*x + Uz*h), r = sigmoid(Wr*x + Ur*h), c = tanh(Wc*x + Uc*(r.h)), h' = (1 - z).h + z.c

    Args:
        in_channels: channels of a frame.
        nb_kernels: channels of the state.
        kernel_size: (kh, kw) of every convolution; zero padding keeps the frame's size.
        batch_first: must be True; the class exists to be compared with, not to be used.
    """

    def __init__(
        self, in_channels: int, nb_kernels: int, kernel_size: tuple[int, int], batch_first: bool = True
    ) -> None:
        super().__init__()
        if not batch_first:
            raise ValueError("batch_first must be True: the reference layer takes (B, L, C, H, W) only")

        def conv(channels: int) -> nn.Conv2d:
            return nn.Conv2d(channels, nb_kernels, kernel_size, padding="same", bias=False)

        self.convWz, self.convUz = conv(in_channels), conv(nb_kernels)
        self.convWr, self.convUr = conv(in_channels), conv(nb_kernels)
        self.convWh, self.convUh = conv(in_channels), conv(nb_kernels)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """x is (B, L, in_channels, H, W), h is (B, nb_kernels, H, W); returns all states and the last."""
        out = []
        for t in range(x.shape[1]):
            z = torch.sigmoid(self.convWz(x[:, t]) + self.convUz(h))
            r = torch.sigmoid(self.convWr(x[:, t]) + self.convUr(h))
            c = torch.tanh(self.convWh(x[:, t]) + self.convUh(r * h))
            h = (1 - z) * h + z * c
            out.append(h)
        return torch.stack(out, dim=1), h
