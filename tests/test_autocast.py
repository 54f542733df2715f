"""Autocast: low precision in convolutions and projections, fp32 states, dtypes as torch.nn.GRU has them; GradScaler."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import convrnn

from .conftest import INTERPRETED
from .modules import MODULES, loss, tensors

compiled = pytest.mark.compiled
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@compiled
@each_dtype
@pytest.mark.parametrize("name", MODULES)
def test_values_and_gradients(name, dtype, device):
    """Outputs in the low dtype, parameters and gradients in float32, near the float64 result of the same weights."""
    module, x = MODULES[name].make(device)
    with torch.autocast(device, dtype=dtype):
        outputs = module(x)
        total = loss(outputs)
    gradients = torch.autograd.grad(total, list(module.parameters()))
    residual = name in (
        "MinGRU",
        "MinConv2dGRU",
        "ConvGRU",
        "ConvGRU-walking",
    )  # a sum with a float32 input or norm may promote
    assert outputs[0].dtype == dtype or residual
    assert all(g.dtype == torch.float32 for g in gradients)
    exact = MODULES[name].build(device=device, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    truth = exact(x.double())
    tolerance = 4 * torch.finfo(dtype).eps
    for a, b in zip(tensors(outputs), tensors(truth), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())
    expected = torch.autograd.grad(loss(truth), list(exact.parameters()))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=10 * tolerance * b.abs().max().item())


@compiled
@each_dtype
def test_dtypes_of_nn_gru(dtype, device):
    """out and h_n as torch.nn.GRU gives them with everything in the low dtype, which is what autocast makes of it on CUDA.

    (CPU autocast leaves torch.nn.GRU alone.) A state that is given in float32 comes back in float32, unrounded.
    """
    x = torch.randn(2, 3, 4, device=device)
    out, h_n = nn.GRU(4, 5, batch_first=True, device=device, dtype=dtype)(x.to(dtype))
    ours, recurrent = convrnn.MinGRU(4, 5, device=device), convrnn.GRU_RCN(4, 5, 1, device=device)
    frames = x[..., None, None]
    with torch.autocast(device, dtype=dtype):
        assert ours(x)[0].dtype == recurrent(frames)[0].dtype == out.dtype
        assert ours(x)[1][0].dtype == recurrent(frames)[1].dtype == h_n.dtype
        assert recurrent(frames, recurrent.init_hidden_state(frames))[1].dtype == torch.float32
        assert ours(x, ours.init_hidden_state(x))[1][0].dtype == torch.float32


class Calls(TorchDispatchMode):
    """The ops that were called, with the dtypes of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), [a.dtype for a in args if isinstance(a, torch.Tensor)]))
        return func(*args, **(kwargs or {}))

    def named(self, name):
        return [dtypes for called, dtypes in self.calls if called.startswith(name)]


@contextlib.contextmanager
def enabled(device_type, dtype):
    """torch.autocast, which turns itself off where there is no CUDA device; fake tensors need none."""
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])
        torch.clear_autocast_cache()


@compiled
@each_dtype
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_weights_are_cast_once_a_call(where, dtype):
    """x, W, U and C one cast each for any T, and the state is not cast; for CUDA on fake tensors."""
    shapes = (12, 2, 3, 3), (8, 4, 3, 3), (4, 4, 3, 3)
    for steps in (2, 9):
        with FakeTensorMode(), enabled(where, dtype), torch.no_grad(), Calls() as calls:
            x, h, *weights = (torch.empty(s, device=where) for s in ((2, steps, 2, 5, 6), (2, 4, 5, 6), *shapes))
            out, h_n = convrnn.gru_rcn(x, h, *weights)
        assert (out.dtype, h_n.dtype, out.device.type) == (dtype, torch.float32, where)
        assert calls.named("convrnn.gru_rcn") == [[dtype, torch.float32, dtype, dtype, dtype]]
        assert len(calls.named("aten._to_copy")) == 4


# On the GPU's code path, in the interpreter, one module an op.
SCALED = ["GRU_RCN", "MinGRU", "SepConvGRUCell"] if INTERPRETED else MODULES


@pytest.mark.parametrize("name", SCALED)
def test_grad_scaler(name, device):
    """Scaled float16 gradients unscale to the unscaled ones; an overflow skips the step and halves the scale.

    The overflow is an infinite loss, or gradients that float16 cannot hold, which the kernels must pass on.
    """
    module, x = MODULES[name].make(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    assert scaler.is_enabled()

    def backward(scale):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            total = loss(module(x))
        scale(total).backward()

    def stepped():
        before = [p.detach().clone() for p in module.parameters()]
        scaler.step(optimizer)
        scaler.update()
        return any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))

    backward(lambda total: total)
    expected = [p.grad.clone() for p in module.parameters()]
    backward(scaler.scale)
    scaler.unscale_(optimizer)
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=2e-2 * gradient.abs().max().item())
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)  # which is what one unscales for
    assert stepped() and scaler.get_scale() == 2.0**8

    backward(lambda total: scaler.scale(total * float("inf")))
    assert not stepped() and scaler.get_scale() == 2.0**7
    scaler.update(2.0**40)
    backward(scaler.scale)
    assert not stepped() and scaler.get_scale() == 2.0**39
    scaler.update(2.0**4)
    backward(scaler.scale)
    assert stepped() and scaler.get_scale() == 2.0**4
