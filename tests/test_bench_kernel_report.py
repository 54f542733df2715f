"""The report on the Triton launches: it runs without a GPU, says what it needs, and the committed one is not out of date."""

import dataclasses
import io
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

from bench import executed, kernel_report, kernels
from bench.compiled import Launch
from bench.kernel_report import CHUNKED, DEVICES, DTYPES, OURS, RESULTS

COMMITTED = json.loads((RESULTS / "kernels.json").read_text())


def test_report_needs_triton_and_a_compiler(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("CONVRNN_BACKEND", "triton")
    assert kernel_report.main([]) == 2
    assert "unset CONVRNN_BACKEND" in capsys.readouterr().err
    monkeypatch.setattr(kernel_report, "find_spec", lambda name: None)
    assert kernel_report.main([]) == 2
    assert "needs Triton: pip install triton" in capsys.readouterr().err


@pytest.mark.compiled
@pytest.mark.slow
def test_report_of_some_launchers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also a kernel that nobody declared: it is shown, and nothing is claimed of its bytes."""
    undeclared = dataclasses.replace(kernels.OPS["gru_update_fwd"], kernels={})
    chosen = {"mingru_fwd": kernels.OPS["mingru_fwd"], "gru_update_fwd": undeclared}
    monkeypatch.setattr(kernels, "OPS", chosen)
    monkeypatch.setattr(kernel_report, "DTYPES", (torch.float32,))
    assert kernel_report.main(["--output", str(tmp_path / "kernels.json")]) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())
    phases = ("mingru_fwd_kernel", "mingru_fwd_kernel, reduce", "carry_kernel", "mingru_fwd_kernel, replay")
    assert [(row["kernel"], row["arch"]) for row in found["code"]] == [
        (kernel, arch)
        for kernels in (phases, ("gru_update_fwd_kernel",))
        for arch in (80, 90, 100)
        for kernel in kernels
    ]
    first, *_, last = found["code"]
    assert (first["bytes_per_element"], first["flop_per_element"], last["bytes_per_element"]) == (12, 10, None)
    assert found["floors"][-1]["floor_us"] == {} and found["floors"][-1]["kernels"] == {"gru_update_fwd_kernel": 1}
    ours = [OURS, "plain PyTorch", "log space", CHUNKED]
    assert [row["form"] for row in found["moved"]] == [*ours, "plain PyTorch"]
    assert [round(row["bytes_per_element"], 1) for row in found["moved"] if row["form"] in (OURS, CHUNKED)] == [
        12.5,
        21.0,
    ]
    assert {row["kernel"] for row in found["executed"]} == {*phases, "gru_update_fwd_kernel"}
    assert (tmp_path / "kernel-floors.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "gru_update_fwd_kernel" in printed and "undeclared" in printed and "FLOORS, not measurements" in printed


def test_committed_report_covers_every_launcher() -> None:
    wanted = {
        (launcher, kernel, str(dtype).removeprefix("torch."), arch)
        for launcher, op in kernels.OPS.items()
        for kernel in op.declared
        for dtype in DTYPES
        for arch in (80, 90, 100)
    }
    assert wanted == {(row["launcher"], row["kernel"], row["dtype"], row["arch"]) for row in COMMITTED["code"]}
    found = {(row["launcher"], row["kernel"], row["dtype"], row["sizes"]) for row in COMMITTED["executed"]}
    assert found == {
        (launcher, kernel, dtype, sizes)
        for launcher, kernel, dtype, _ in wanted
        for sizes in ("aligned", "odd")
        if not kernels.OPS[launcher].codes
    }
    assert COMMITTED["bandwidth_gb_s"] == {name: rates[0] for name, rates in DEVICES.items()}


@pytest.mark.parametrize(
    "floor", COMMITTED["floors"], ids=lambda row: f"{row['launcher']}-{row['dtype']}-{row['shape']}"
)
def test_committed_floors_follow_from_the_declared_bytes(floor: dict) -> None:
    op, shape = kernels.OPS[floor["launcher"]], tuple(floor["shape"])
    read, written, flop = op.work(shape, getattr(torch, floor["dtype"]), Counter(floor["kernels"]))
    assert (floor["kernel_bytes"], floor["flop"]) == (read + written, flop)
    for name, (bandwidth, *_) in DEVICES.items():
        assert floor["floor_us"][name] == pytest.approx((read + written + floor["other_bytes"]) / bandwidth / 1e3)


def test_tables_are_as_wide_as_they_say() -> None:
    rows = {
        name: [
            row_type(**{**row, **({"shape": tuple(row["shape"])} if "shape" in row else {})}) for row in COMMITTED[name]
        ]
        for name, row_type in (
            ("code", kernel_report.Code),
            ("floors", kernel_report.Floor),
            ("moved", kernel_report.Moved),
            ("executed", executed.Executed),
        )
    }
    console = Console(width=204, record=True, file=io.StringIO())
    kernel_report.show(rows["code"], rows["floors"], rows["moved"], console)
    executed.show(rows["executed"], console)
    assert all(code.kernel in console.export_text(clear=False) for code in rows["code"])
    assert "…" not in console.export_text()


@pytest.mark.parametrize(
    "registers, shared, warps, arch, programs",
    (
        (32, 0, 4, 90, 16),  # 64 warps
        (40, 0, 4, 90, 12),  # 65,536 / (40 x 32 x 4)
        (33, 0, 4, 90, 12),  # registers come in eights
        (255, 0, 4, 90, 2),
        (32, 20 << 10, 4, 80, 7),  # 164 KB / 21 KB
        (32, 20 << 10, 4, 100, 10),  # 228 KB / 21 KB
        (32, 0, 1, 90, 32),  # the hardware's limit
    ),
)
def test_occupancy(registers: int, shared: int, warps: int, arch: int, programs: int) -> None:
    counts = {"stack": 0, "local": 0, "spills": 0, "barriers": 0}
    launch = Launch(
        "kernel", arch, (1,), warps, registers, shared=shared, loads=Counter(), stores=Counter(), asm={}, **counts
    )
    assert launch.programs_per_sm == programs and launch.occupancy == programs * warps / 64


def calls(rows: list[executed.Executed]) -> dict[tuple, list[executed.Executed]]:
    """The kernels of each call."""
    found: dict[tuple, list[executed.Executed]] = {}
    for row in rows:
        found.setdefault((row.launcher, row.dtype, row.layout, row.shape), []).append(row)
    return found


def check_executed(rows: list[executed.Executed]) -> None:
    """Bytes are those declared; whole sectors are asked for wherever sizes are multiples of the vector."""
    for (launcher, dtype, _, shape), alike in calls(rows).items():
        op, dtype = kernels.OPS[launcher], getattr(torch, dtype)
        lanes, steps = op.extent(shape)
        # what a convolution's program reads of its neighbours' pixels is not declared, and may come from the cache
        if not op.convolves:
            launches = Counter({row.kernel: steps if op.inputs is kernels.sequence_inputs else 1 for row in alike})
            read, written, _ = op.work(shape, dtype, launches)
            assert sum(row.bytes_per_element for row in alike) == pytest.approx((read + written) / lanes / steps)
        for row in alike:
            # Of a float32 state beside 16-bit tensors a thread reads 32 bytes in two halves, each half of a sector.
            halves = dtype.itemsize == 2 and op.inputs is kernels.sequence_inputs
            assert row.sizes == "odd" or row.sectors <= (1.5 if halves and op.convolves else 1.23 if halves else 1.1)


def test_committed_executions() -> None:
    rows = [executed.Executed(**{**row, "shape": tuple(row["shape"])}) for row in COMMITTED["executed"]]
    check_executed(rows)
    assert all(row.conflicts is None or row.conflicts <= 1.01 for row in rows)
    bound = {(row.kernel, row.sizes) for row in rows if "issue" in row.bounds.values()}
    assert ("mingru_bwd_kernel", "aligned") not in bound and ("mingru_fwd_kernel", "odd") in bound


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", ("mingru_fwd", "log_scan_bwd", "gru_update_fwd", "gru_rcn_bwd", "gru_rcn_fwd, gemm"))
def test_executions_of_some_launchers(name: str) -> None:
    rows = executed.execute_all({name: kernels.OPS[name]}, (torch.bfloat16,))
    check_executed(rows)
    assert {row.sizes for row in rows} == {"aligned", "odd"}
    assert all(sum(row.instructions.values()) > 0 for row in rows)
