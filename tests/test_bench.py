"""The benchmark's own honesty: wrong results are refused, the rest is kept, counted and written as it was measured."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("rich")

import torch
from torch import nn

import convrnn
from bench import __main__ as cli
from bench import cases, machine, measure, run
from bench.case import FRESH, GRAPH, OURS
from bench.cases import all_cases
from bench.providers import Provider, compiled, equal_gru, log_space, peers
from bench.results import Results, Row, add_speedups, best_baseline, load
from bench.scans import mingru, mingru_module, mingru_stream
from convrnn import reference

pytestmark = pytest.mark.compiled
CPU = torch.device("cpu")
TINY = mingru(2, 6, 4)
SMALL = "scaling-T mingru (1, 64, 64) float32"  # one of all_cases: a further sweep's process finds it by its name


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def brief(monkeypatch):
    """Two small cases, one sweep of two rounds, no pinning of this process."""
    monkeypatch.setattr(cases, "all_cases", lambda: [TINY, mingru(1, 1, 3)])
    monkeypatch.setattr(cli.machine, "prepare", torch.set_num_threads)
    monkeypatch.setattr(cli.machine, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "BLOCK_S", 1e-4)
    monkeypatch.setitem(cli.EFFORTS, "quick", run.Effort(sweeps=1, rounds=2, compile=False, exhaustive=False))


@pytest.fixture
def two_sweeps(brief, monkeypatch):
    monkeypatch.setattr(cases, "all_cases", all_cases)
    monkeypatch.setitem(cli.EFFORTS, "quick", run.Effort(sweeps=2, rounds=2, compile=False, exhaustive=False))
    return ["--quick", "--threads", "1", "--only", re.escape(SMALL)]


def test_names_are_unique():
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names)) > 60


def test_every_case_can_be_made():
    for case in all_cases():
        if not case.exhaustive:
            problem = case.problem(CPU)
            assert OURS in problem.providers and len(problem.providers) > 1
            assert problem.inputs[0].dtype == case.dtype


def test_every_op_and_module_is_measured():
    ops = {case.op.split()[0] for case in all_cases()}
    assert ops >= {"mingru", "log_scan", "gru_gates", "gru_update", "gru_rcn"}
    layers = {name for name in convrnn.__all__ if isinstance(getattr(convrnn, name), type)}
    assert ops >= {name for name in layers if "1d" not in name and "3d" not in name}  # which are the 2-D layer's code
    half = {case.op for case in all_cases() if case.dtype == torch.bfloat16 and not case.exhaustive}
    assert half >= {op for op in ops if not op.endswith("Cell")}


def test_a_run_writes_what_it_measured(brief, tmp_path, capsys):
    assert cli.main(["--quick", "--output", str(tmp_path / "run.json")]) == 0
    results = load(tmp_path / "run.json")
    assert results.complete and not results.refused
    assert {(row.provider, row.what) for row in results.rows} == {
        (provider, what) for provider in (OURS, "time loop", "log space") for what in ("forward", "backward", "step")
    }
    for row in results.rows:
        assert set(row.sweeps) == {0} and row.p20_ms <= row.ms <= row.p80_ms
        assert row.speedup_low <= row.speedup <= row.speedup_high
        assert row.error <= measure.TOLERANCE[torch.float32]
        assert row.floor_ms > 0 and results.floors(row) == row.ms / row.floor_ms
    lines = (tmp_path / "run.csv").read_text().splitlines()
    assert len(lines) == 1 + len(results.rows)
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["machine"]["threads"] and found["peaks"]["copy"] > 0
    assert "log space" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan", "shape"])
def test_a_wrong_kernel_is_refused(brief, monkeypatch, tmp_path, capsys, wrong):
    def planted(gate_hidden, h0=None):
        h, h_n = reference.mingru(gate_hidden, h0)
        if wrong == "gradient":
            return h.detach() + 0.999 * (h - h.detach()), h_n
        return {"output": h * 1.001, "nan": h / 0 * 0, "shape": h[:, :1]}[wrong], h_n

    monkeypatch.setattr(convrnn, "mingru", planted)
    assert (
        cli.main(["--quick", "--output", str(tmp_path / "run.json"), "--only", TINY.name.replace("(", "\\(")[:12]]) == 1
    )
    results = load(tmp_path / "run.json")
    assert [refusal.provider for refusal in results.refused] == [OURS]
    assert {row.provider for row in results.rows} == {"time loop", "log space"}
    assert "refused" in capsys.readouterr().out


def test_a_provider_that_fails_is_refused(monkeypatch):
    def fails(gate_hidden):
        raise RuntimeError("no such shape")

    problem = TINY.problem(CPU)
    problem.providers["broken"] = Provider(fails)
    case = mingru(2, 6, 4)
    monkeypatch.setattr(type(case), "problem", lambda self, device: problem)
    bench = run.Bench([case], run.Effort(1, 1, False, False), CPU)
    list(bench.run())
    assert [(r.provider, r.reason) for r in bench.results.refused] == [("broken", "RuntimeError: no such shape")]


def test_interrupted_keeps_what_it_measured(brief, monkeypatch, tmp_path):
    timed = run.timed

    def interrupt(case, *arguments):
        if case.shape == (1, 1, 3):
            raise KeyboardInterrupt
        return timed(case, *arguments)

    monkeypatch.setattr(run, "timed", interrupt)
    assert cli.main(["--quick", "--output", str(tmp_path / "run.json")]) == 130
    results = load(tmp_path / "run.json")
    assert not results.complete
    assert {row.shape for row in results.rows} == {(2, 6, 4)}


def test_interrupted_at_once_leaves_the_last_results(brief, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "timed", interrupt)
    (tmp_path / "run.json").write_text("the last")
    assert cli.main(["--quick", "--output", str(tmp_path / "run.json")]) == 130
    assert (tmp_path / "run.json").read_text() == "the last"


def test_a_failure_in_the_middle_keeps_and_shows_what_was_measured(brief, monkeypatch, tmp_path, capsys):
    timed = run.timed

    def fail(case, *arguments):
        if case.shape == (1, 1, 3):
            raise torch.OutOfMemoryError("no memory left")
        return timed(case, *arguments)

    monkeypatch.setattr(run, "timed", fail)
    assert cli.main(["--quick", "--output", str(tmp_path / "run.json")]) == 1
    assert {row.shape for row in load(tmp_path / "run.json").rows} == {(2, 6, 4)}
    out = capsys.readouterr().out
    assert "failed no memory left" in out and "mingru (2, 6, 4)" in out and "interrupted" in out


def test_list_and_a_pattern_that_matches_nothing(capsys):
    assert cli.main(["--list", "--only", "^log_scan"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "log_scan (16, 256, 512) float32"
    assert cli.main(["--only", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err
    for only in (SMALL, "(1, 64, 64) float32", "mingru \\(1, 64, "):  # a name, a part that is no pattern, a pattern
        assert cli.main(["--list", "--only", only]) == 0
        assert SMALL in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("options", [["--threads", "0"], ["--threads", "9999"], ["--threads", "x"]])
def test_more_threads_than_processors_are_refused(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(options)
    assert "processors of this machine" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_further_sweeps_add_to_every_row(two_sweeps, tmp_path):
    assert cli.main([*two_sweeps, "--output", str(tmp_path / "run.json")]) == 0
    results = load(tmp_path / "run.json")
    assert results.complete and {row.case for row in results.rows} == {SMALL}
    assert {row.provider for row in results.rows} == {OURS, "time loop", "log space"}
    for row in results.rows:
        assert set(row.sweeps) == {0, 1} and len(row.sweeps) == len(row.samples_ms) and row.speedup > 0


@pytest.mark.skipif(not machine.has_mallopt(), reason="glibc's malloc")
def test_fresh_pages_have_rows_and_floors_of_their_own():
    case = next(case for case in all_cases() if case.name == "mingru (4, 64, 16, 7, 7) float32")
    bench = run.Bench([case], run.Effort(sweeps=2, rounds=2, compile=False, exhaustive=False), CPU)
    subject = run.Subject(case)
    for what in ("forward", "backward", "step"):
        row = Row(case.name, "mingru", case.shape, "float32", "op", OURS, what, [1.0], [0], flop=1, bytes=1, error=0.0)
        row.kept_bytes, row.peak_bytes, row.floor_ms = 7, 8, 0.5
        row.speedup, row.speedup_low, row.speedup_high = 2.0, 1.0, 3.0
        subject.rows[OURS, what] = row
    other = Row("next", "mingru", (1,), "float32", "op", OURS, "forward", [1.0], [0], 1, 1, 0.0)
    bench.results.rows = [*subject.rows.values(), other]
    bench.add_fresh_pages([subject])
    assert [row.case for row in bench.results.rows] == [case.name] * 5 + ["next"]
    fresh = bench.results.rows[3:5]
    assert [(row.provider, row.what) for row in fresh] == [(OURS + FRESH, "forward"), (OURS + FRESH, "step")]
    for row in fresh:  # in no comparison
        assert len(row.samples_ms) == 4 and row.floor_ms != 0.5 and not row.ours
        assert (row.kept_bytes, row.peak_bytes, row.speedup, row.verdict) == (None, None, None, "")


@pytest.mark.skipif(not machine.has_mallopt(), reason="glibc's malloc")
@pytest.mark.parametrize("fresh", [False, True])
def test_large_tensors_are_fresh_pages_or_the_last_calls(fresh):
    """Counted as page faults: 16 MB are 4,096 pages, or 8 huge ones. The heap grows in a few of the first calls."""
    code = f"""
import resource, torch
from bench import machine
machine.prepare(1, fresh={fresh})
faults = []
for _ in range(24):
    torch.zeros(4 << 20).add_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[15])
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert (int(found.stdout) >= 8 * 8) == fresh


def test_slow_baselines_that_others_beat_have_one_turn():
    def row(provider, ms, speedup):
        return Row("", "", (), "float32", "op", provider, "step", [ms], [0], 1, 1, 0.0, speedup=speedup)

    subject = run.Subject(TINY)
    times = {OURS: (200.0, 0.6), "best": (120.0, 1.0), "near": (170.0, 0.7), "far": (300.0, 0.4), "short": (39.0, 0.1)}
    subject.rows = {(name, "step"): row(name, *figures) for name, figures in times.items()}
    assert [name for name, _ in subject.keys(0)] == list(times)
    assert [name for name, _ in subject.keys(1)] == [OURS, "best", "near", "short"]


def test_what_is_compiled_is_timed_again_only_where_it_may_be_the_best_baseline():
    def row(provider, speedup):
        return Row("", "", (), "float32", "op", provider, "step", [1.0], [0], 1, 1, 0.0, speedup=speedup)

    subject = run.Subject(TINY)
    speedups = {OURS: 2.0, "plain": 0.1, "compiled plain": 0.95, "compiled log space": 0.8, "compiled " + OURS: 2.1}
    subject.rows = {(name, "step"): row(name, speedup) for name, speedup in speedups.items()}
    assert [name for name, _ in subject.keys(0)] == list(speedups)
    assert [name for name, _ in subject.keys(1)] == [OURS, "plain", "compiled plain"]


def test_a_sweep_whose_process_ends_fails_the_run(brief):
    bench = run.Bench([TINY], run.Effort(2, 1, False, False), CPU, source=list)  # no case that its process could find
    with pytest.raises(RuntimeError, match="sweep 1 ended with status 1 at mingru"):
        list(bench.run())
    assert bench.results.rows and not bench.results.complete


def test_floors_without_a_measured_one_are_those_of_the_machine():
    row = Row("", "", (), "float32", "op", OURS, "step", [2.0], [0], flop=10**9, bytes=10**6, error=0.0)
    results = Results({}, {"copy": 10.0, "float32": 1000.0})
    assert results.floors(row) == 2.0  # 1 GFLOP at 1000 GFLOP/s takes 1 ms, 1 MB at 10 GB/s a tenth
    row.bytes = 10**8
    assert results.floors(row) == 0.2


def test_speedups_are_taken_within_sweeps():
    def row(provider, samples, sweeps):
        return Row("c", "op", (1,), "float32", "op", provider, "forward", samples, sweeps, flop=1, bytes=1, error=0.0)

    # The machine is ten times slower in sweep 1: the ratio of medians would be 11 / 1.
    ours = row(OURS, [1.0, 1.0, 1.0, 10.0, 10.0], [0, 0, 0, 1, 1])
    slow, slower = row("a", [2.0, 20.0], [0, 1]), row("b", [99.0], [0])
    add_speedups([ours, slow, slower])
    assert (ours.speedup_low, ours.speedup, ours.speedup_high) == (2.0, 2.0, 2.0)
    assert slow.speedup == 1.0 and slower.speedup == pytest.approx(2 / 99)


def test_memory_counts_what_is_kept():
    problem = TINY.problem(CPU)
    assert measure.kept_bytes(problem.providers[OURS], problem) == 2 * 6 * 4 * 4  # h alone
    big = mingru(4, 64, 1024).problem(CPU)
    step = measure.task("step", big.providers[OURS], big)
    floor = 3 * 4 * 64 * 1024 * 4  # h, and the gradient of the projection
    assert floor <= measure.peak_bytes(step, CPU) < 1.5 * floor


def test_gru_has_as_many_parameters():
    for features, hidden in ((64, 64), (256, 256), (512, 128)):
        count = sum(p.numel() for p in equal_gru(features, hidden).run.parameters())
        assert count == pytest.approx(2 * hidden * (features + 1), rel=0.02)


def test_a_compiled_module_keeps_the_names_of_its_parameters():
    for provider in mingru_module(1, 4, 4).problem(CPU).providers.values():
        assert measure.parameters(compiled(provider).run).keys() == measure.parameters(provider.run).keys()


def test_a_modules_step_moves_no_weight():
    problem = mingru_module(2, 5, 4).problem(CPU)
    for provider in problem.providers.values():
        assert isinstance(provider.run, nn.Module)
        before = [p.clone() for p in provider.run.parameters()]
        backward = measure.task("backward", provider, problem)
        measure.task("step", provider, problem)()
        backward()  # its graph is still whole
        assert all(torch.equal(a, b) for a, b in zip(before, provider.run.parameters(), strict=True))


@pytest.mark.parametrize("name", ["accelerated-scan ref", "minGRU-pytorch", "mingru-scans"])
def test_peers_compute_the_same(name):
    provider = peers(10).get(name)
    if provider is None:
        pytest.skip(f"{name} is not installed")
    x = torch.randn(2, 10, 6)
    torch.testing.assert_close(provider.run(x), reference.mingru(x)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_space()(x), reference.mingru(x)[0], atol=1e-4, rtol=1e-4)


def test_cuda_clock_asks_triton(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    calls = []
    monkeypatch.setattr(testing, "do_bench", lambda task, **options: calls.append(options) or 1.5)
    assert measure.clock(lambda: None, torch.device("cuda")) == 1.5
    assert [options["return_mode"] for options in calls] == ["median"]


def imitated(compute):
    """``measure.captured`` without a GPU: a replay computes anew, into the tensors of the first result."""
    found = compute()

    def replay():
        with torch.inference_mode():
            for x, now in zip(found, compute(), strict=True):
                x.copy_(now)

    return replay, found


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("case", [TINY, mingru_stream(2, 1, 4), mingru_module(2, 5, 4)], ids=lambda case: case.op)
def test_what_a_graph_leaves_is_checked(monkeypatch, case, empty):
    """An empty graph, of a kernel that went to another stream, leaves nothing and takes no time at all."""
    monkeypatch.setattr(measure, "captured", lambda compute: (lambda: None, compute()) if empty else imitated(compute))
    problem = case.problem(CPU)
    bench, subject = run.Bench([case], run.EFFORTS["quick"], CPU), run.Subject(case)
    bench.add_row(subject, problem, OURS, case.passes[0], 0.0)
    expected = measure.truths(problem, training="step" in case.passes)(problem.providers[OURS])
    monkeypatch.setattr(measure, "task", lambda what, *_: list)
    bench.add_graphs(subject, problem, OURS, expected)
    found = [what for name, what in subject.rows if name == OURS + GRAPH]
    assert found == ([] if empty else [what for what in case.passes if what != "backward"])
    assert (OURS, case.passes[0]) in subject.rows  # as it is called it stays
    assert [refusal.reason[:25] for refusal in bench.results.refused] == ["wrong: relative error inf"] * empty


def test_graphs_are_compared_among_themselves():
    def row(provider, ms):
        sweeps = list(range(5))
        return Row("c", "op", (1,), "float32", "op", provider, "step", [ms] * 5, sweeps, flop=1, bytes=1, error=0.0)

    rows = [row(OURS, 4.0), row("plain", 6.0), row(OURS + GRAPH, 2.0), row("plain" + GRAPH, 1.0)]
    add_speedups(rows)
    assert [row.speedup for row in rows] == [1.5, 1.0, 0.5, 1.0]
    assert [best_baseline(row, rows).provider for row in rows] == ["plain", "plain", "plain" + GRAPH, "plain" + GRAPH]
    assert [row.ours for row in rows] == [True, False, True, False]
    assert [row.verdict for row in rows] == ["faster", "undecided", "slower", "undecided"]
    rows[0].sweeps = [0, 0, 1, 2, 3]  # too few to tell, however they agree
    assert rows[0].verdict == "undecided"
