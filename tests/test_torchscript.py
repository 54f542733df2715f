"""TorchScript: modules scripted or traced, saved, and loaded where convrnn is imported and where the op library alone is."""

import subprocess
import sys

import pytest
import torch

from convrnn.ops._library import LIBRARY

from .modules import MODULES, SCRIPTABLE, tensors

pytestmark = pytest.mark.compiled

RUN = """
import sys, torch
{prepare}
for path in sys.argv[2:]:
    x, expected, gradients = torch.load(path + ".case")
    module = torch.jit.load(path)
    out, states = module(x)
    found = [out, *([states] if isinstance(states, torch.Tensor) else states)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if gradients is not None:
        for a, b in zip(torch.autograd.grad(out.sum(), list(module.parameters())), gradients, strict=True):
            torch.testing.assert_close(a, b)
{check}
"""


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("alone", [False, True], ids=["imported", "library_alone"])
def test_archives_in_a_fresh_process(alone, device, tmp_path):
    """With convrnn imported they train too; derivatives are registered in Python."""
    if device != "cpu":
        pytest.skip("the library alone holds the CPU kernels")
    paths = []
    for name, case in MODULES.items():
        module, x = case.make()
        path = str(tmp_path / f"{name}.pt")
        if name in SCRIPTABLE:
            torch.jit.script(module).save(path)
        else:  # the others for the sizes of x: their Python is more than TorchScript knows
            torch.jit.trace(module, x, strict=False, check_trace=False).save(path)
        outputs = module(x)
        gradients = torch.autograd.grad(outputs[0].sum(), list(module.parameters()))
        torch.save((x, [y.detach() for y in tensors(outputs)], None if alone else gradients), path + ".case")
        paths.append(path)
    prepare = "torch.ops.load_library(sys.argv[1]); torch.set_grad_enabled(False)" if alone else "import convrnn"
    check = 'assert "convrnn" not in sys.modules' if alone else ""
    code = RUN.format(prepare=prepare, check=check)
    subprocess.run([sys.executable, "-c", code, str(LIBRARY), *paths], check=True, cwd="/")


@pytest.mark.parametrize("name", SCRIPTABLE)
def test_frozen_and_optimised_for_inference(name, device):
    module, x = SCRIPTABLE[name].make(device)
    frozen = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.script(module.eval())))
    with torch.no_grad():
        for _ in range(2):  # the profiling executor optimises after a first call
            for a, b in zip(tensors(frozen(x)), tensors(module(x)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
