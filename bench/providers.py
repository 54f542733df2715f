"""The ways to compute each op that convrnn is measured against: plain PyTorch, torch.nn.GRU, and other packages."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convrnn import reference

Run = Callable[..., Any]  # a Tensor or, of the gates, a tuple of them


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        run: takes the case's inputs and returns its output or outputs; the parameters of an ``nn.Module`` get gradients too.
        truth: what ``run`` must agree with in float64, where that is not the case's own truth.
        tolerance: relative error it may reach where its dtype's is stricter.
        compile: whether to time it under torch.compile too, in cases that ask for that.
        retains: whether its backward can run again from a kept graph, and so be timed by itself.
    """

    run: Run
    truth: Run | None = None
    tolerance: float = 0.0
    compile: bool = True
    retains: bool = True


def log_space_tolerance(steps: int) -> float:
    """What the log-space form is forgiven. It takes differences of sums over all steps: its gradients are off by 0.02
    after 128 steps of four layers and by 0.2 at T = 65,536. Users use it, so it is timed, with its error shown."""
    return max(0.05, steps / 2**17)


def log_space(scan: Run | None = None) -> Run:
    """minGRU on logarithms, as its paper and other packages compute it; ``scan`` (log_a, log_b) -> x does the scan.

    The arithmetic is float32 for 16-bit tensors, without which the result is not worth timing.
    """

    def run(gate_hidden: Tensor) -> Tensor:
        gate, hidden = gate_hidden.float().chunk(2, dim=2)
        log_g = torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
        log_b = F.pad(log_g - F.softplus(-gate), (*[0, 0] * (gate.dim() - 2), 1, 0), value=-0.6931471805599453)
        return (scan or log_space_scan)(-F.softplus(gate), log_b)[:, -gate.shape[1] :].to(gate_hidden.dtype)

    return run


def log_space_scan(log_a: Tensor, log_b: Tensor) -> Tensor:
    """x_t = a_t x_{t-1} + b_t as a cumulative sum and a logcumsumexp (Heinsen 2023)."""
    log_a = F.pad(log_a, (*[0, 0] * (log_a.dim() - 2), 1, 0)).cumsum(1)
    return (log_a + torch.logcumsumexp(log_b - log_a, 1)).exp()


def time_loop(gate_hidden: Tensor) -> Tensor:
    """minGRU in plain PyTorch, one step after another, with all activations outside the loop."""
    gate, hidden = gate_hidden.chunk(2, dim=2)
    z, candidate = torch.sigmoid(gate), reference.g(hidden)
    h = torch.full_like(z[:, 0], 0.5)
    out = []
    for z_t, candidate_t in zip(z.unbind(1), candidate.unbind(1), strict=True):
        h = torch.lerp(h, candidate_t, z_t)
        out.append(h)
    return torch.stack(out, 1)


def sequential_mingru(gate_hidden: Tensor, h: Tensor) -> Tensor:
    """One step of minGRU from the state h (B, C, *S), as a user would write it."""
    gate, hidden = gate_hidden[:, 0].chunk(2, dim=1)
    return torch.lerp(h, reference.g(hidden), torch.sigmoid(gate))


def hoisted_gru_rcn(x: Tensor, h: Tensor, W: Tensor, U: Tensor, C: Tensor, stride: int = 1) -> Tensor:
    """GRU-RCN in plain PyTorch as an expert would write it: one input convolution for all frames, packed gates."""
    projected = input_convolution(x.flatten(0, 1), W, stride).unflatten(0, x.shape[:2])
    channels = C.shape[0]
    out = []
    for frame in projected.unbind(1):
        xzr, xc = frame.split([2 * channels, channels], 1)
        z, r = torch.sigmoid(xzr + F.conv2d(h, U, padding="same")).chunk(2, 1)
        h = torch.lerp(h, torch.tanh(xc + F.conv2d(r * h, C, padding="same")), z)
        out.append(h)
    return torch.stack(out, 1)


def six_convolutions(x: Tensor, h: Tensor, W: Tensor, U: Tensor, C: Tensor, stride: int = 1) -> Tensor:
    """GRU-RCN as its paper writes it."""
    (Wz, Wr, Wc), (Uz, Ur) = W.chunk(3), U.chunk(2)
    out = []
    for frame in x.unbind(1):
        xz, xr, xc = (input_convolution(frame, weight, stride) for weight in (Wz, Wr, Wc))
        z = torch.sigmoid(xz + F.conv2d(h, Uz, padding="same"))
        r = torch.sigmoid(xr + F.conv2d(h, Ur, padding="same"))
        h = (1 - z) * h + z * torch.tanh(xc + F.conv2d(r * h, C, padding="same"))
        out.append(h)
    return torch.stack(out, 1)


def input_convolution(frames: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th pixel of the 'same' convolution; with a stride, of an odd kernel."""
    if stride == 1:
        return F.conv2d(frames, weight, padding="same")
    return F.conv2d(frames, weight, stride=stride, padding=[size // 2 for size in weight.shape[2:]])


class PlainStack(nn.Module):
    """A stack of minGRU or minLSTM layers (``convrnn.MinGRU`` and its kin, copied) around another ``scan``."""

    def __init__(self, stack: nn.Module, scan: Run) -> None:
        super().__init__()
        self.layers = copy.deepcopy(stack.layers)
        self.scan = scan

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            frames = x.flatten(0, 1)
            gate_hidden = layer.gate_hidden(layer.norm(frames)).unflatten(0, x.shape[:2])
            if layer.lstm:
                forget, take, hidden = gate_hidden.chunk(3, 2)
                gate_hidden = torch.cat((F.logsigmoid(take) - F.logsigmoid(forget), hidden), 2)
            out = self.scan(gate_hidden)
            if layer.res_align is not None:
                out = out + layer.res_align(frames).unflatten(0, x.shape[:2])
            x = out
        return x


class PlainBidirectional(nn.Module):
    """Two ``PlainStack``, the second on the sequence turned around."""

    def __init__(self, rnn: nn.Module, backward_rnn: nn.Module) -> None:
        super().__init__()
        self.rnn, self.backward_rnn = rnn, backward_rnn

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.rnn(x), self.backward_rnn(x.flip(1)).flip(1)), 2)


class PlainGRU_RCN(nn.Module):
    """The parameters of a ``convrnn.GRU_RCN``, copied, around another function."""

    def __init__(self, layer: nn.Module, run: Run) -> None:
        super().__init__()
        self.W, self.U, self.C = (nn.Parameter(getattr(layer, name).detach().clone()) for name in "WUC")
        self.run = run

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.run(x, h, self.W, self.U, self.C)


class PlainConvGRU(nn.Module):
    """The one layer of a ``convrnn.ConvGRU`` without biases, copied, around another function."""

    def __init__(self, rnn: nn.Module, run: Run) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainGRU_RCN(layer, run) for layer in rnn.layers)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.layers[0](x, h)


class PlainStackedGRU_RCN(nn.Module):
    """The levels of a ``convrnn.StackedGRU_RCN``, copied, around another function.

    What comes from the level below is more channels of the input, which the candidate does not read.
    """

    def __init__(self, rnn: nn.Module, run: Run) -> None:
        super().__init__()
        self.levels, self.bottom_up = copy.deepcopy(rnn.levels), copy.deepcopy(rnn.bottom_up)
        self.run = run

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        outs: list[Tensor] = []
        for i, (x, level) in enumerate(zip(maps, self.levels, strict=True)):
            weight = level.W
            if i > 0:
                below = F.adaptive_max_pool2d(outs[-1].flatten(0, 1), x.shape[3:]).unflatten(0, x.shape[:2])
                x = torch.cat((x, below), 2)
                unread = weight.new_zeros(level.hidden_size, *self.bottom_up[i - 1].shape[1:])
                weight = torch.cat((weight, torch.cat((self.bottom_up[i - 1], unread))), 1)
            h = x.new_zeros(x.shape[0], level.hidden_size, *x.shape[3:])
            outs.append(self.run(x, h, weight, level.U, level.C))
        return tuple(outs)


class PlainUpdates(nn.Module):
    """The layers of convrnn's cells, copied, that update a state one after another: (x, state) -> state."""

    def __init__(self, layers: Iterable[nn.Module], run: Run) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PlainGRU_RCN(layer, run) for layer in layers)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(x, h)[:, -1]
        return h


class FirstOutput(nn.Module):
    """A layer that returns (out, state), reduced to out; its parameters keep their names."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs)[0]

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        return self.layer.named_parameters(*args, **kwargs)


class FirstOfOneState(FirstOutput):
    """The same of a layer whose state is a list of one tensor, here given alone."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.layer(x, [h])[0]


class OutputOfLevels(FirstOutput):
    """The same of a layer that takes and returns lists of maps."""

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.layer(maps)[0])


class NextState(FirstOutput):
    """A cell whose state is a list of one tensor, reduced to (x, state) -> state."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.layer(x, [h])[1][0]


def equal_gru(features: int, hidden: int) -> Provider:
    """torch.nn.GRU with as many parameters as a minGRU layer of these sizes.

    The layer has 2 hidden (features + 1) of them and the GRU 3 n (features + n + 2): solved for n. It computes
    another function, so that its truth is itself in float64.
    """
    n = round(((features + 2) ** 2 + 8 * hidden * (features + 1) / 3) ** 0.5 / 2 - (features + 2) / 2)
    gru = FirstOutput(nn.GRU(features, n, batch_first=True))
    return Provider(gru, truth=copy.deepcopy(gru).double())


def _accelerated_scan(gate_hidden: Tensor) -> Tensor:
    from accelerated_scan.ref import scan

    z, candidate = torch.sigmoid(gate_hidden[:, :, : gate_hidden.shape[2] // 2]), gate_hidden.chunk(2, 2)[1]
    a, b = 1 - z, z * reference.g(candidate)
    b = torch.cat((b[:, :1] + 0.5 * a[:, :1], b[:, 1:]), 1)  # the scan starts from 0, minGRU from 1/2
    return scan(a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous()).transpose(1, 2)


def _mingru_pytorch_scan(log_a: Tensor, log_b: Tensor) -> Tensor:
    from minGRU_pytorch.minGRU import heinsen_associative_scan_log

    return heinsen_associative_scan_log(F.pad(log_a, (0, 0, 1, 0)), log_b)


def _mingru_scans_scan(log_a: Tensor, log_b: Tensor) -> Tensor:
    from mingru import parallel_scan_log

    return parallel_scan_log(log_a, log_b)


def peers(steps: int) -> dict[str, Provider]:
    """minGRU over a float32 projection (B, T, 2C), T = ``steps``, by those of the optional packages that are installed."""
    tolerance = log_space_tolerance(steps)
    found: dict[str, tuple[str, Provider]] = {
        "accelerated-scan ref": ("accelerated_scan", Provider(_accelerated_scan, compile=False)),
        "minGRU-pytorch": (
            "minGRU_pytorch",
            Provider(log_space(_mingru_pytorch_scan), tolerance=tolerance, compile=False),
        ),
        "mingru-scans": (
            "mingru.triton_scans",
            Provider(log_space(_mingru_scans_scan), tolerance=tolerance, compile=False),
        ),
    }
    return {name: provider for name, (package, provider) in found.items() if _installed(package)}


def _installed(module: str) -> bool:
    # A parent that is missing, or is the other package of that name, is as good as absent.
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compiled(provider: Provider) -> Provider:
    """The provider under torch.compile, for one shape; a compiled backward frees its buffers."""
    return dataclasses.replace(provider, run=torch.compile(provider.run, dynamic=False), retains=False)
