"""Modules among processes and tools: DataLoader workers, shared memory, default devices, the profiler."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import convrnn

from . import differentiable
from .differentiable import CASES
from .modules import MODULES, loss

pytestmark = pytest.mark.compiled


class Features(torch.utils.data.Dataset):
    """Runs a layer in the worker."""

    def __init__(self):
        self.rnn = convrnn.GRU_RCN(2, 3, 3)

    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = torch.randn(1, 3, 2, 5, 6, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            return self.rnn(x)[0][0]


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])  # a spawned one imports PyTorch first
def test_data_loader_workers(method, workers):
    """Also after the parent ran the kernels on its threads, whose pool a fork does not inherit."""
    data = Features()
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=workers, multiprocessing_context=method, timeout=120, persistent_workers=False
    )
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def _train_shared(rank, module, x):
    module(x)[0].square().mean().backward()
    with torch.no_grad():
        for p in module.parameters():
            p.sub_(p.grad)


@pytest.mark.slow
def test_shared_memory_is_trained_by_another_process():
    module, x = MODULES["GRU_RCN"].make()
    before = [p.detach().clone() for p in module.parameters()]
    gradients = torch.autograd.grad(module(x)[0].square().mean(), list(module.parameters()))
    module.share_memory()
    torch.multiprocessing.spawn(_train_shared, (module, x), nprocs=1)
    for p, old, g in zip(module.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - g)


@pytest.fixture
def defaults():
    """Puts the default device and dtype back."""
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    yield
    torch.set_default_device(None if device == torch.device("cpu") else device)
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("name", MODULES)
def test_default_device(name, defaults):
    """Built without memory and filled: what was built on the CPU, once it is given the same numbers."""
    x = MODULES[name].make()[1]

    def tensors_of(module):
        return [*module.parameters(), *module.buffers()]

    with torch.device("meta"):
        within = MODULES[name].build()
    torch.set_default_device("meta")
    literal = MODULES[name].build()
    torch.set_default_device("cpu")
    torch.manual_seed(1)
    expected = MODULES[name].build()
    for module in (within, literal):
        assert tensors_of(module) and all(t.is_meta for t in tensors_of(module))
        module.to_empty(device="cpu")
        with torch.no_grad():
            for t in tensors_of(module):
                t.fill_(float("nan"))
        torch.manual_seed(1)
        for part in module.modules():  # as torch.distributed.fsdp's deferred initialisation does
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        assert all(t.isfinite().all() for t in tensors_of(module)), name
        assert module(x)[0].shape == expected(x)[0].shape
        module.load_state_dict(expected.state_dict())
        assert torch.equal(module(x)[0], expected(x)[0])


@pytest.mark.parametrize("name", MODULES)
def test_default_dtype(name, defaults):
    torch.set_default_dtype(torch.float64)
    assert all(p.dtype == torch.float64 for p in MODULES[name].build().parameters())
    torch.set_default_dtype(torch.float32)
    module, x = MODULES[name].make()
    moved = module.to(torch.float64)
    loss(moved(x.double())).backward()
    assert all(p.grad.dtype == torch.float64 for p in moved.parameters())


@pytest.mark.parametrize("name", ["mingru-h0", "log_scan", "gru_gates", "gru_update", "gru_rcn-h0-bias"])
def test_the_profiler_names_our_ops(name):
    leaves = [x.requires_grad_() for x in CASES[name].inputs("cpu")]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        total = differentiable.loss(CASES[name].ours(*leaves))
        total.backward()
    events = {event.key: event for event in profiled.key_averages(group_by_input_shape=True)}
    op = name.split("-")[0]
    assert events[f"convrnn::{op}"].count == events[f"convrnn::{op}_backward"].count == 1
    assert list(leaves[0].shape) in events[f"convrnn::{op}"].input_shapes
    assert f"convrnn_{op}Backward" in events
