"""python -m convrnn.info, the instruction-set switch and the backend switch, each in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from convrnn import info

pytestmark = pytest.mark.compiled


def run(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CONVRNN_", "TRITON_"))} | environment
    return subprocess.run([sys.executable, *arguments], check=False, env=env, capture_output=True, text=True)


def report(**environment):
    result = run("-m", "convrnn.info", "--json", **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def whole_report():
    return report()


def test_text_names_every_op_and_passes():
    result = run("-m", "convrnn.info")
    assert result.returncode == 0 and "FAILED" not in result.stdout
    for op in info.OPS:
        assert f"{op}_backward" in result.stdout


def test_every_op_has_a_kernel_for_every_device(whole_report):
    ops = whole_report["ops"]
    assert len(ops) == 2 * len(info.OPS)
    for op, keys in ops.items():
        assert {"cpu", "cuda", "meta", "autograd"} <= set(keys), op


def test_a_failed_self_test_ends_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(info, "self_test", lambda device: {"mingru": float("nan")})
    assert info.main([]) == 1
    assert "mingru on cpu" in capsys.readouterr().err


def test_every_instruction_set_passes_and_agrees(whole_report):
    """Each set in a process of its own: same inputs, errors of the same size, results within fp32 rounding."""
    code = (
        "import torch, convrnn; torch.manual_seed(0)\n"
        "x = torch.randn(2, 9, 70, 3, requires_grad=True); h, _ = convrnn.mingru(x); h.sum().backward()\n"
        "a, b = torch.randn(2, 9, 35), torch.randn(2, 10, 35)\n"
        "z = convrnn.ops.gru_gates(torch.randn(2, 70), torch.randn(2, 70), torch.randn(2, 35))[0]\n"
        "y = torch.cat([t.flatten() for t in (h, x.grad, convrnn.parallel_scan_log(a, b), z)])\n"
        "from convrnn import info; status = info.main(['--json'])\n"
        "print(','.join(f'{v:.9g}' for v in y.tolist())); raise SystemExit(status)"
    )
    results = {}
    for name in whole_report["isa_available"]:
        result = run("-c", code, CONVRNN_ISA=name)
        assert result.returncode == 0, result.stderr
        found, values = result.stdout.strip().rsplit("\n", 1)
        assert json.loads(found)["isa"] == name
        results[name] = [float(v) for v in values.split(",")]
    assert "plain" in results
    for name, values in results.items():
        assert values == pytest.approx(results["plain"], rel=2e-6, abs=1e-7), name


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CONVRNN_ISA", "sse9", "CONVRNN_ISA must be one of"),
        ("CONVRNN_BACKEND", "cudnn", "CONVRNN_BACKEND must be one of auto, triton, ptx"),
        ("CONVRNN_GRU_STEP", "triton", "CONVRNN_GRU_STEP must be one of cudnn, gemm, auto"),
    ],
)
def test_wrong_switches_are_errors_at_import(variable, value, message):
    result = run("-c", "import convrnn", **{variable: value})
    assert result.returncode != 0 and message in result.stderr


def test_forcing_a_backend_that_is_absent_raises():
    hide = "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a)"
    for backend in ("triton", "ptx"):
        result = run("-c", f"{hide}; import convrnn", CONVRNN_BACKEND=backend)
        assert result.returncode != 0 and f"CONVRNN_BACKEND={backend} needs Triton" in result.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_backend_runs_the_triton_kernels():
    code = (
        "import sys, convrnn, torch; convrnn.mingru(torch.zeros(1, 2, 4)); m = sys.modules['convrnn.kernels.mingru'];"
        "print(type(m.mingru_fwd_kernel).__name__)"
    )
    assert run("-c", code, CONVRNN_BACKEND="triton").stdout.strip() == "InterpretedFunction"
    assert "KeyError: 'convrnn.kernels.mingru'" in run("-c", code).stderr


def test_import_needs_neither_triton_nor_numpy():
    """`import convrnn` needs torch alone, and brings in no kernel file."""
    code = "import sys, convrnn; print([m for m in sys.modules if m == 'triton' or m.startswith('convrnn.kernels.')])"
    assert run("-c", code).stdout.strip() == "['convrnn.kernels.layout']"
