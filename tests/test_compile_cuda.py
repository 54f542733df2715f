"""Inductor's code for a CUDA device on a machine without one: modules on fake tensors, as far as PyTorch lets them go.

Dynamo traces, AOTAutograd lowers and Inductor schedules and writes Triton kernels as for an H100; nothing is run. Code
for training is not: see test_gradients_on_a_device_that_is_missing.
"""

import contextlib
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

from .modules import MODULES, tensors

pytest.importorskip("triton")
graph_lowering = pytest.importorskip("torch._inductor.graph")

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_compile.py runs the code on the device"),
]


@contextlib.contextmanager
def an_h100():
    """What Inductor asks about the device while it generates code."""
    from torch._inductor.runtime.hints import DeviceProperties

    properties = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        warp_size=32,
    )
    answers = {
        "torch.cuda.is_available": True,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.get_device_properties": properties,
        "torch._inductor.runtime.hints.DeviceProperties.create": properties,
        "torch._inductor.scheduler.has_triton": True,
        "torch.utils._triton.triton_hash_with_backend": "none",
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, lambda *args, answer=answer, **kwargs: answer))
        yield


def generated(module, *shapes):
    """The Python that Inductor writes for the module in inference, and the outputs of its graph on fake tensors."""
    from torch._guards import detect_fake_mode
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V

    written = []

    def write(graph_module, inputs):
        mode = detect_fake_mode(inputs)
        graph = graph_lowering.GraphLowering(
            graph_module, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True
        )
        with an_h100(), V.set_graph_handler(graph), V.set_fake_mode(mode), DebugContext():
            graph.run(*inputs)
            code = graph.codegen()[0]
        written.append(code if isinstance(code, str) else code.value)
        return graph_module

    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        for layer in module.modules():  # .to() wants the device
            for name, p in layer._parameters.items():
                if p is not None:
                    layer._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"), requires_grad=False)
        inputs = [torch.empty(shape, device="cuda") for shape in shapes]
        backend = aot_autograd(fw_compiler=write, decompositions=select_decomp_table)
        outputs = torch.compile(module, fullgraph=True, dynamic=False, backend=backend)(*inputs)
    (code,) = written
    return code, outputs


@pytest.mark.parametrize(
    ("name", "calls"),
    [("GRU_RCN", {"gru_rcn": 1}), ("MinGRU", {"mingru": 2}), ("MinConv2dGRU", {"mingru": 2})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_for_cuda_calls_our_ops(name, calls):
    """Each layer's op once, as it is, between Triton kernels for what surrounds it."""
    case = MODULES[name]
    code, outputs = generated(case.build().eval(), case.shape)
    expected = case.build(device="meta").eval()(torch.empty(case.shape, device="meta"))
    for a, b in zip(tensors(outputs), tensors(expected), strict=True):
        assert a.device.type == "cuda" and a.shape == b.shape and a.dtype == b.dtype
    compile(code, "generated", "exec")
    for op, count in calls.items():
        assert code.count(f"torch.ops.convrnn.{op}.default(") == count
    if name != "GRU_RCN":  # which is its op alone
        assert "@triton.jit" in code


GRADIENT = """
import torch
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    torch.empty(3, device="cuda", requires_grad=True).sin().sum().backward()
"""


@pytest.mark.xfail(strict=True, raises=subprocess.CalledProcessError, reason="PyTorch: no autograd without the device")
def test_gradients_on_a_device_that_is_missing():
    """In a process of its own: a CPU build ends it. So training on CUDA is neither traced nor generated here."""
    subprocess.run([sys.executable, "-c", GRADIENT], check=True, capture_output=True)
