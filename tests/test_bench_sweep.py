"""The sweep over random shapes: the same draw for a seed, within its range and budget; what it calls a loss, and its status."""

import io

import pytest

pytest.importorskip("rich")

import torch
from rich.console import Console

import convrnn
from bench import machine, measure, run, sweep
from bench.case import OURS
from bench.gru import gru_rcn
from bench.results import DECIDING, Refusal, Results, Row, add_speedups, load
from convrnn import reference

pytestmark = pytest.mark.compiled
CPU = torch.device("cpu")


def kernel(case) -> list[int]:
    return [int(size) for size in (case.op.partition(" ")[2] or "3x3").split("x")]


def test_a_seed_draws_the_same_shapes_again():
    names = [case.name for case in sweep.drawn(0, 60)]
    assert len(set(names)) == 60
    assert [case.name for case in sweep.drawn(0, 20)] == names[:20]  # whatever their number
    assert [case.name for case in sweep.drawn(1, 60)] != names
    assert names[:2] == [  # on every machine
        "gru_rcn 1x1 (65, 3, 41, 36, 3, 60) float32",
        "gru_rcn 1x1 (1024, 1, 51, 4, 2, 7) float32",
    ]


def test_draws_stay_within_range_and_budget_and_reach_its_ends():
    cases = sweep.drawn(0, 2000)
    for case in cases:
        assert case.forward.flop <= sweep.BUDGET.flop and case.forward.bytes <= sweep.BUDGET.bytes
        assert case.passes == ("forward", "step")
    batches, steps, *channels_and_extents = zip(*(case.shape for case in cases), strict=True)
    assert (min(batches), max(batches)) == (1, 1024) and set(steps) == {1, 2, 3, 4}
    assert [(min(found), max(found)) for found in channels_and_extents] == [(1, 512)] * 4
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    assert any(case.shape[4] != case.shape[5] for case in cases) and (512, 512) in {case.shape[4:] for case in cases}
    kernels = [kernel(case) for case in cases]
    assert {size for sizes in kernels for size in sizes} == set(range(1, 32))
    assert any(height != width for height, width in kernels)
    usual = [sizes for sizes in kernels if sizes in ([1, 1], [3, 3], [5, 5], [7, 7])]
    assert len(usual) > len(cases) / 2


@pytest.mark.parametrize("sizes", [(2, 4), (1, 1), (5, 2), (3, 3)])
def test_all_forms_agree_whatever_the_kernel(sizes):
    case = gru_rcn(2, 2, 3, 4, 6, 5, kernel=sizes, passes=("forward", "step"))
    problem = case.problem(CPU)
    assert problem.inputs[2].shape == (12, 3, *sizes)
    assert case.forward.flop == 2 * 2 * 2 * 30 * sizes[0] * sizes[1] * 12 * 7
    expected = measure.truths(problem, training=True)
    for provider in problem.providers.values():
        assert measure.error(case, problem, provider, expected(provider)) < 1e-5


@pytest.fixture
def brief(monkeypatch):
    """Two sweeps, the second in another process, and no pinning of this one."""
    monkeypatch.setattr(sweep, "EFFORT", sweep.Effort(2, 1, compile=False, exhaustive=True, memory=False))
    monkeypatch.setattr(sweep.machine, "prepare", torch.set_num_threads)
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(measure, "BLOCK_S", 1e-4)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_measures_what_was_asked_for(brief, tmp_path, capsys):
    output = tmp_path / "sweep.json"
    assert sweep.main(["--only", "3", "--threads", "1", "--json", str(output)]) == 0  # two sweeps decide no loss
    results = load(output)
    name = sweep.drawn(0, 4)[3].name
    assert results.complete and not results.refused and results.options["indices"] == {name: 3}
    assert {(row.provider, row.what) for row in results.rows} == {
        (provider, what) for provider in (OURS, "hoisted", "six convolutions") for what in ("forward", "step")
    }
    for row in results.rows:
        assert row.case == name and row.kept_bytes is None
        assert not row.ours or set(row.sweeps) == {0, 1}
    assert output.with_suffix(".csv").exists()
    out = capsys.readouterr().out
    assert "154, 1, 1, 1, 3, 2" in out and results.machine["torch"] in out and "7x7" in out
    assert "Nothing is decided in 2 of them" in out


def test_a_wrong_result_fails_the_run(brief, monkeypatch, capsys):
    monkeypatch.setattr(convrnn, "gru_rcn", lambda *inputs: [1.2 * x for x in reference.gru_rcn(*inputs)])
    assert sweep.main(["--only", "3", "--threads", "1"]) == 1
    assert "refused gru_rcn 7x7" in capsys.readouterr().out


def measured(ratios: dict[int, list[float]], **about: object) -> Results:
    """A run in which the passes of these shapes, by number, had these ratios in five sweeps."""
    results = Results(machine.stamp(CPU), {}, complete=True, **about)
    results.options = {"list": "--seed 0 --shapes 60", "indices": {}}
    for number, (case, found) in enumerate(zip(sweep.draws(sweep.random.Random(0)), ratios.values(), strict=False)):
        index = list(ratios)[number]
        results.options["indices"][case.name] = index
        for provider, samples in ((OURS, [1.0] * len(found)), ("hoisted", found)):
            results.rows.append(
                Row(
                    *(case.name, case.op, case.shape, "float32", "op", provider, "step"),
                    *(samples, list(range(len(found))), 1, 1, 0.0),
                )
            )
    add_speedups(results.rows)
    return results


def shown(results: Results) -> tuple[int, str]:
    console = Console(width=sweep.WIDTH, file=io.StringIO())
    return sweep.show(results, console, None), console.file.getvalue()


def test_losses_are_named_and_fail_the_run():
    ratios = {4: [2.0] * 5, 7: [0.5, 0.6, 0.7, 0.8, 0.9], 9: [0.98] * 5, 11: [0.6, 0.7, 0.8, 0.9, 1.1], 30: [0.4] * 5}
    results = measured(ratios)
    status, text = shown(results)
    assert status == 1
    verdicts = {index: sweep.verdict(row) for index, row in zip(ratios, results.rows[::2], strict=True)}
    assert verdicts == {4: "faster", 7: "loss", 9: "undecided", 11: "undecided", 30: "loss"}
    names = list(results.options["indices"])
    assert text.splitlines()[-4:] == [
        "5 passes: 1 faster than the fastest plain form, 2 lost (below 0.97, the whole interval below 1), 2 undecided.",
        f"  loss: 30: {names[4]}, step: 0.40 (0.40-0.40)",
        f"  loss: 7: {names[1]}, step: 0.70 (0.50-0.90)",
        "Again: python -m bench.sweep --seed 0 --shapes 60 --only 7 30",
    ]


class Stub:
    """A ``Bench`` whose further sweeps find these ratios."""

    def __init__(self, results: Results, ratios: list[float]) -> None:
        self.results, self.ratios = results, ratios
        names = results.options["indices"]
        self.subjects = [run.Subject(case) for case in sweep.drawn(0, len(names))]
        for subject in self.subjects:
            rows = [row for row in results.rows if row.case == subject.case.name]
            subject.rows = {(row.provider, row.what): row for row in rows}

    def run(self):
        yield from (subject.case for subject in self.subjects)

    def further(self, sweeps, subjects):
        for number, found in zip(sweeps, self.ratios, strict=True):
            for subject in subjects:
                subject.add(number, {(OURS, "step"): [1.0], ("hoisted", "step"): [found]})
                yield subject.case


@pytest.mark.parametrize("again, verdict", [([0.9] * 5, "loss"), ([0.7, 0.8, 0.9, 1.0, 1.1], "undecided")])
def test_a_loss_counts_if_five_more_sweeps_find_it_again(again, verdict):
    bench = Stub(measured({0: [2.0] * 5, 1: [0.5] * 5, 2: [0.98] * 5}), again)
    cases = [case.name for case in sweep.measured(bench)]
    names = list(bench.results.options["indices"])
    assert cases == names + [names[1]] * 5  # the lost one alone
    ours = bench.results.rows[::2]
    assert [sweep.verdict(row) for row in ours] == ["faster", verdict, "undecided"]
    assert ours[1].sweeps == [5, 6, 7, 8, 9] and ours[1].speedup == pytest.approx(0.9)
    assert ours[0].sweeps == [0, 1, 2, 3, 4]


def test_the_status_without_a_loss():
    assert shown(measured({4: [2.0] * 5, 9: [0.98] * 5}))[0] == 0
    interrupted = measured({4: [2.0] * 5, 9: [0.5] * (DECIDING - 1)})
    interrupted.complete = False
    status, text = shown(interrupted)
    assert status == 130 and "too few sweeps" in text and "loss:" not in text
    assert shown(measured({4: [2.0] * 5}, refused=[Refusal("c", "hoisted", "inexact")]))[0] == 0
    assert shown(measured({4: [2.0] * 5}, refused=[Refusal("c", OURS, "wrong")]))[0] == 1


def test_the_list_and_what_it_lacks(capsys):
    assert sweep.main(["--list", "--dtype", "bfloat16", "--shapes", "6"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["3", "4"]
    assert sweep.main(["--list", "--cases"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(sweep.fixed()) >= 7
    assert sweep.main(["--only", "5", "60", "--shapes", "6"]) == 2
    assert "expected 0 to 5, got 60" in capsys.readouterr().err
    assert sweep.main(["--only", "0", "--dtype", "bfloat16"]) == 2
    assert "bfloat16" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["--shapes", "0"])
