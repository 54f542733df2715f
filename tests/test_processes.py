"""Modules among processes and tools: DataLoader workers, shared memory, default devices, the profiler, wanted gradients."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import convrnn

from .modules import MODULES, loss
from .test_checkpointing import Runs

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


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method):
    """Also after the parent ran the kernels on its threads, whose pool a fork does not inherit."""
    data = Features()
    expected = torch.stack([data[i] for i in range(len(data))])
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=120, persistent_workers=False
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


@pytest.mark.parametrize(("name", "op"), [("GRU_RCN", "gru_rcn"), ("MinGRU", "mingru"), ("MinConv2dGRU", "mingru")])
def test_the_profiler_names_our_ops(name, op):
    module, x = MODULES[name].make()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        loss(module(x)).backward()
    events = {event.key: event for event in profiled.key_averages()}
    layers = 2 if op == "mingru" else 1
    assert events[f"convrnn::{op}"].count >= layers and events[f"convrnn::{op}_backward"].count >= layers
    assert f"convrnn_{op}Backward" in events


@pytest.mark.parametrize("wanted", range(6))
def test_gradients_that_are_not_wanted_are_not_computed(wanted):
    """gru_rcn_backward leaves what needs no gradient empty."""
    shapes = (2, 3, 2, 4, 5), (2, 3, 4, 5), (9, 2, 3, 3), (6, 3, 3, 3), (3, 3, 3, 3), (9,)
    inputs = [torch.randn(shape).requires_grad_(i == wanted) for i, shape in enumerate(shapes)]
    found = []

    class Watch(Runs):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func is self.op:
                found.append([y.numel() for y in result])
            return result

    with Watch(torch.ops.convrnn.gru_rcn_backward.default):
        convrnn.gru_rcn(*inputs)[0].sum().backward()
    assert found == [[inputs[i].numel() if i == wanted else 0 for i in range(6)]]


def test_no_backward_where_nothing_is_wanted():
    with Runs(torch.ops.convrnn.mingru_backward.default) as counted:
        h, _ = convrnn.mingru(torch.randn(2, 3, 4), torch.randn(2, 2))
        assert not h.requires_grad
        h, _ = convrnn.mingru(torch.randn(2, 3, 4), torch.randn(2, 2, requires_grad=True))
        h.detach()
    assert counted.runs == 0
