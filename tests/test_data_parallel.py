"""DDP and FSDP2 on two processes of the CPU: the gradients of one process, and checkpoints that move between the two."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import convrnn
from tests.processes import run_group

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"),
]

WORLD = 2


class Network(nn.Module):
    """All kinds of layers; ``spare`` is used only where it is asked for."""

    def __init__(self):
        super().__init__()
        self.video = convrnn.GRU_RCN(2, 4, 3, bias=True)
        self.levels = convrnn.StackedGRU_RCN([4, 4], [4, 4], 3)
        self.walk = convrnn.ConvGRU(4, 4, 3, reset_after=True, cell_norm="layer", learn_h0=True, bidirectional=True)
        self.conv = convrnn.MinConv2dGRU(8, [4, 6], 3, paddings=1, norm=True, residual=True)
        self.sequence = convrnn.Bidirectional(convrnn.MinGRU(6, 4))
        self.spare = convrnn.MinGRU(6, 4)

    def forward(self, x, spare=False):
        frames = self.video(x)[0]
        frames = self.levels([frames, frames[..., ::2, ::2]])[0][-1]
        out, _ = self.conv(self.walk(frames)[0])
        features = out.mean((-2, -1))
        total = self.sequence(features)[0].square().mean((1, 2))
        return total + self.spare(features)[0].mean((1, 2)) if spare else total


def batch():
    return torch.randn(2 * WORLD, 3, 2, 5, 6, generator=torch.Generator().manual_seed(1))


def alone(x, spare):
    """The model and its gradients for the whole batch in one process."""
    torch.manual_seed(0)
    model = Network()
    model(x, spare).mean().backward()
    return model


def assert_gradients(model, truth, full=lambda g: g):
    for a, b in zip(model.parameters(), truth.parameters(), strict=True):
        expected = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(torch.zeros_like(b) if a.grad is None else full(a.grad), expected)


def shard(x):
    return x.chunk(WORLD)[dist.get_rank()]


def ddp(rank, folder):
    x = batch()
    for options, spare in (({}, True), ({"static_graph": True}, True), ({"find_unused_parameters": True}, False)):
        truth = alone(x, spare)
        model = DistributedDataParallel(copy.deepcopy(truth), **options)
        for _ in range(2):  # a static graph is used from the second step on
            model.zero_grad()
            model(shard(x), spare).mean().backward()
            assert_gradients(model.module, truth)
    truth = alone(x, True)
    model = DistributedDataParallel(copy.deepcopy(truth))
    model.zero_grad()
    first, second = shard(x).split(1)  # gradients accumulate on each process and are summed with the last
    with model.no_sync():
        (model(first, True).mean() / 2).backward()
    (model(second, True).mean() / 2).backward()
    assert_gradients(model.module, truth)


def fsdp(rank, folder):
    x = batch()
    truth = alone(x, True)
    model = copy.deepcopy(truth)
    parts = [
        model.video,
        *model.levels.levels,
        model.levels,
        model.walk,
        *model.conv.layers,
        model.sequence,
        model.spare,
    ]
    for layer in (*parts, model):
        fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (WORLD,)))
    assert all(p.to_local().numel() < p.numel() for p in model.parameters() if p.shape[0] >= WORLD)
    for _ in range(2):
        model.zero_grad()
        model(shard(x), True).mean().backward()
        assert_gradients(model, truth, lambda g: g.full_tensor())

    # through torch.distributed.checkpoint into a model of other weights, sharded, and into one that is not
    state = get_model_state_dict(model)
    assert list(state) == list(truth.state_dict())
    dcp.save(state, checkpoint_id=folder)
    for p in model.parameters():
        nn.init.zeros_(p)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    for a, b in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.equal(a.full_tensor(), b)
    whole = {key: torch.zeros_like(value) for key, value in truth.state_dict().items()}
    dcp.load(whole, checkpoint_id=folder)
    assert all(torch.equal(value, truth.state_dict()[key]) for key, value in whole.items())


def both(rank, folder):
    ddp(rank, folder)
    fsdp(rank, folder)


def test_two_processes(tmp_path, device):
    """One group for both: it takes longer to start than to run."""
    if device != "cpu" or sys.platform != "linux":
        pytest.skip("two processes of the CPU")
    run_group(both, WORLD, tmp_path, str(tmp_path / "checkpoint"))
