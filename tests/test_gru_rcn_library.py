"""GRU-RCN on the CPU with PyTorch's convolutions, which serve the shapes at which ours are slower."""

import pytest
import torch
from torch.profiler import profile

from convrnn import reference
from convrnn.ops import gru_rcn

from .compare import check_against_reference
from .test_gru_rcn import make

pytestmark = pytest.mark.compiled


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setenv("CONVRNN_CPU_CONV", "library")


def ops_of(call) -> set[str]:
    with profile() as record:
        call()
    return {event.key for event in record.key_averages()}


def runs_on_library(inputs, **options) -> bool:
    return "aten::convolution" in ops_of(lambda: gru_rcn(*inputs, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("h0", [False, True], ids=["no_h0", "h0"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("size", [(7,), (5, 6), (1, 9), (1, 1), (3, 2, 4)], ids=str)
def test_matches_reference(library, size, bias, h0, dtype):
    inputs = make(size=size, h0=h0, bias=bias, dtype=dtype)
    check_against_reference(gru_rcn, reference.gru_rcn, inputs)


@pytest.mark.parametrize("kernel", [(1, 1), (5, 5), (1, 3), (7, 1), (15, 15)], ids=str)
def test_kernels(library, kernel):
    """Those that reach beyond the frame on all sides too."""
    inputs = make(kernels=[kernel, (3, 3), kernel], bias=True)
    assert runs_on_library(inputs)
    check_against_reference(gru_rcn, reference.gru_rcn, inputs)


@pytest.mark.parametrize("shape", [(1, 1, (1, 1), (4, 4)), (2, 3, (1, 5), (6, 3)), (3, 1, (4, 1), (1, 8))], ids=str)
def test_one_step_and_one_channel(library, shape):
    check_against_reference(gru_rcn, reference.gru_rcn, make(*shape))


def test_ready_projection(library):
    h0, U, C = (make()[i] for i in (1, 3, 4))
    projection = torch.randn(2, 4, 3 * C.shape[0], 5, 6)
    check_against_reference(gru_rcn, reference.gru_rcn, [projection, h0, None, U, C, None])


def test_strided_tensors_and_a_state_of_another_dtype(library):
    x, h0, W, U, C, bias = make(bias=True)
    x = x.movedim(2, -1).contiguous().movedim(-1, 2)
    W = W.to(memory_format=torch.channels_last)
    check_against_reference(gru_rcn, reference.gru_rcn, [x, h0.double(), W, U.transpose(2, 3), C, bias])


def test_gradients_that_nobody_wants(library):
    inputs = make(bias=True)
    whole = torch.autograd.grad(
        gru_rcn(*(leaves := [t.clone().requires_grad_() for t in inputs]))[0].square().sum(), leaves
    )
    for i in range(len(inputs)):
        one = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(gru_rcn(*one)[0].square().sum(), one[i])
        torch.testing.assert_close(gradient, whole[i], rtol=1e-5, atol=1e-6)


def test_recomputed_activations(library):
    inputs = [t.requires_grad_() for t in make(bias=True)]
    kept = torch.autograd.grad(gru_rcn(*inputs)[0].square().sum(), inputs)
    recomputed = torch.autograd.grad(gru_rcn(*inputs, recompute=True)[0].square().sum(), inputs)
    torch.testing.assert_close(recomputed, kept, rtol=1e-4, atol=1e-5)


def test_results_stay_as_they_are(library):
    """They do not stand in memory that the next call takes."""
    inputs = [t.requires_grad_() for t in make()[:5]]

    def call() -> tuple[torch.Tensor, ...]:
        outputs = gru_rcn(*inputs)
        return *outputs, *torch.autograd.grad([t.sum() for t in outputs], inputs)

    first = call()
    copies = [t.clone() for t in first]
    for t in inputs:
        t.data.mul_(-1)
    call()
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


def test_autocast(library):
    """Autocast chooses the op's dtype; it does not reach into the op."""
    inputs = make(bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gru_rcn(*inputs)[0]
    x, h0, *weights = inputs
    assert torch.equal(found, gru_rcn(x.bfloat16(), h0, *(w.bfloat16() for w in weights))[0])


def test_which_convolutions_are_taken(monkeypatch):
    monkeypatch.delenv("CONVRNN_CPU_CONV", raising=False)
    usual = [make(2, 2, (5, 32), (8, 8)), make(1, 2, (64, 64), (28, 28)), make(2, 2, (3, 8), (16, 16))]
    assert not any(runs_on_library(inputs) for inputs in usual)
    assert runs_on_library(make(1, 2, (3, 4), (512, 512)))
    assert runs_on_library(make(1, 2, (1, 1), (128, 128), [(31, 31)] * 3))
    monkeypatch.setenv("CONVRNN_CPU_CONV", "own")
    assert not runs_on_library(make(1, 2, (3, 4), (512, 512)))
    monkeypatch.setenv("CONVRNN_CPU_CONV", "library")
    assert runs_on_library(usual[0])
    even = make(kernels=[(2, 2)] * 3)
    masked = {"reset": torch.zeros(2, 4, dtype=torch.bool)}
    assert not runs_on_library(even)
    assert not runs_on_library(make(), **masked)
    assert not runs_on_library(make(dtype=torch.float64))
    assert not runs_on_library(make(size=(3, 2, 4), dtype=torch.bfloat16))  # PyTorch's gradients are wrong there
    monkeypatch.setenv("CONVRNN_CPU_CONV", "")
    assert not runs_on_library(usual[0])
    monkeypatch.setenv("CONVRNN_CPU_CONV", "ours")
    with pytest.raises(RuntimeError, match="CONVRNN_CPU_CONV: expected auto, own or library, got 'ours'"):
        gru_rcn(*make())
