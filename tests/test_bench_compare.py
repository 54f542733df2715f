"""The comparison of two versions' kernels: its verdicts on made-up times, its refusals, and its processes."""

import json
import random
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

import convrnn

pytest.importorskip("rich")
from bench import builds, compare
from bench.builds import Unusable
from bench.cases import all_cases

pytestmark = pytest.mark.compiled
ROOT = Path(__file__).resolve().parents[1]
STREAM = "streaming mingru (1, 1, 512) float32"
SCAN = "log_scan (1, 32, 64, 14, 14) float32"
EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"  # git knows it without a commit that has it


class Noisy(compare.Worker):
    """A worker whose clock is made up: 3 % noise, one turn in ten disturbed, and 2 % that a process keeps for a case."""

    def __init__(self, random: random.Random, factor: float) -> None:
        self.random, self.factor, self.replies = random, factor, []

    alive = True

    def close(self) -> None:
        pass

    def send(self, **request) -> None:
        if "case" in request:
            self.level = self.factor * self.random.lognormvariate(0, 0.02)
            self.replies.append({})
        else:
            disturbed = 1 + self.random.random() * (self.random.random() < 0.1)
            self.replies.append({"ms": self.level * disturbed * self.random.lognormvariate(0, 0.03)})

    def receive(self) -> dict:
        return self.replies.pop() if self.replies else {}


@pytest.fixture
def compared(monkeypatch):
    """The rows of so many cases, compared by the workers that ``make(side)`` gives."""

    def run(make, count: int = 1) -> list[compare.Row]:
        comparison = compare.Comparison(Path(), Path(), "cpu", 1, lambda text: None)
        monkeypatch.setattr(comparison, "worker", make)
        comparison.run([SimpleNamespace(name=str(i), passes=("forward",)) for i in range(count)])
        return comparison.rows

    monkeypatch.setattr(compare, "PATIENCE_S", 0)
    return run


def noisy(seed: int, factor: float):
    source = random.Random(seed)
    return lambda side: Noisy(source, factor if side == compare.CURRENT else 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_equal_kernels_are_neither_slower_nor_faster(compared, seed):
    assert {row.verdict for row in compared(noisy(seed, 1.0), 200)} <= {"same", "unclear"}


@pytest.mark.parametrize(("factor", "verdict"), [(1.2, "slower"), (1.5, "slower"), (1 / 1.2, "faster")])
def test_a_fifth_is_found(compared, factor, verdict):
    rows = compared(noisy(0, factor), 200)
    assert sum(row.verdict == verdict for row in rows) >= 190  # no patience here
    assert all(abs(statistics.median(compare.ratios(row.shown)) / factor - 1) < 0.1 for row in rows)


def test_a_suspect_must_show_itself_in_each_repetition():
    slow, equal = [(1.0, 1.2)] * 11, [(1.0, 1.0)] * 11
    assert compare.Row("", "", [slow, slow, slow]).verdict == "slower"
    assert compare.Row("", "", [slow, slow]).suspect and not compare.Row("", "", [slow, equal]).suspect
    assert compare.Row("", "", [slow, slow, equal]).verdict == "unclear"
    assert compare.Row("", "", [slow, equal]).verdict == "same"


def test_the_interval_holds_the_median_as_often_as_it_says():
    assert compare.interval(list(range(1, 16))) == (4, 12)  # 96.5 %, from tables of the sign test
    assert compare.interval(list(range(1, 12))) == (2, 10)
    assert compare.interval([3, 1, 2]) == (1, 3)
    source = random.Random(0)
    intervals = [compare.interval([source.expovariate(1.0) for _ in range(11)]) for _ in range(2000)]
    assert sum(low <= 0.6931 <= high for low, high in intervals) >= 0.95 * 2000


@pytest.mark.parametrize(
    ("base", "current", "verdict"),
    [
        ({"failure": "AttributeError: no op"}, {}, "not in base"),
        ({"wrong": "relative error 1"}, {}, "wrong in base"),
        ({}, {"failure": "RuntimeError"}, "failed"),
        ({"failure": "RuntimeError"}, {"wrong": "relative error 1"}, "wrong"),
    ],
)
def test_what_cannot_be_compared_is_listed(compared, base, current, verdict, tmp_path):
    class Broken(Noisy):
        ready = False

        def receive(self):
            if self.ready:
                return (base, current)[self.factor]
            self.ready = True
            return {}

    rows = compared(lambda side: Broken(random.Random(0), side))
    assert [row.verdict for row in rows] == [verdict]
    assert compare.table(rows).row_count == 1 and verdict in compare.summary(rows)
    compare.save(tmp_path / "compare.json", rows, base={})
    assert json.loads((tmp_path / "compare.json").read_text())["rows"][0]["verdict"] == verdict


class Mortal(Noisy):
    """Its process ends when it is asked to time the case "0"."""

    made = 0

    def __init__(self, side: int) -> None:
        super().__init__(random.Random(0), 1.0)
        self.dead = False
        type(self).made += 1

    @property
    def alive(self) -> bool:
        return not self.dead

    def send(self, **request) -> None:
        if "case" in request:
            self.case = request["case"]
        elif self.case == "0":
            self.dead = True
        super().send(**request)

    def receive(self) -> dict:
        return {"failure": "its process ended with status -11"} if self.dead else super().receive()


def test_a_kernel_that_kills_its_process_fails_its_case_alone(compared):
    rows = compared(lambda side: Mortal(side) if side == compare.CURRENT else Noisy(random.Random(0), 1.0), 3)
    assert rows[0].verdict == "failed" and "-11" in rows[0].note
    assert all(row.series and not row.problem for row in rows[1:])
    assert Mortal.made == 2


@pytest.fixture
def ended(monkeypatch, tmp_path):
    """The status of a comparison whose rows come from ``run``, which may raise."""

    def main(run) -> int:
        monkeypatch.setattr(compare.builds, "build_commit", lambda commit: tmp_path)
        monkeypatch.setattr(compare.builds, "build_checkout", lambda: tmp_path)
        monkeypatch.setattr(compare, "OUTPUT", tmp_path / "compare.json")
        monkeypatch.setattr(compare.Comparison, "run", run)
        return compare.main(["HEAD", "--threads", "1"])

    head()
    return main


def test_interrupted_while_it_repeats_is_no_verdict(ended, capsys):
    def run(self, cases):
        self.rows = [compare.Row("a", "forward", [[(1.0, 1.2)] * 11])]
        raise KeyboardInterrupt

    assert ended(run) == compare.INTERRUPTED
    assert "unclear" in capsys.readouterr().out and compare.OUTPUT.exists()


@pytest.mark.parametrize(
    ("problem", "status"), [("", 0), ("not in base", 2), ("wrong in base", 0), ("wrong", 1), ("failed", 1)]
)
def test_the_status_says_what_was_found(ended, problem, status):
    def run(self, cases):
        self.rows = [compare.Row("a", "forward", [] if problem else [[(1.0, 1.0)] * 11], problem)]

    assert ended(run) == status


def head() -> str:
    try:
        return builds.git("rev-parse", "HEAD").decode().strip()
    except Unusable as error:
        pytest.skip(str(error))


def results(path: Path, commit: str | None) -> str:
    path.write_text(json.dumps({"machine": {"commit": commit, "torch": "1.0"}, "peaks": {}, "rows": []}))
    return str(path)


def test_a_file_of_another_machine_is_pointed_out(tmp_path):
    file = results(tmp_path / "cpu.json", head()[:12])
    stamp = {"device": "d", "kind": "cpu", "threads": 2, "torch": "2.0", "triton": None}
    assert builds.differences(file, stamp) == [f"{file} was measured with torch '1.0', not '2.0'"]
    assert builds.differences("main", stamp) == []


def test_a_base_is_a_ref_or_a_results_file(tmp_path):
    assert builds.resolve("HEAD") == builds.resolve(results(tmp_path / "cpu.json", head()[:12])) == head()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a results file"),
        ("[", "is not a results file"),
        ('{"machine": {"commit": null}, "peaks": {}, "rows": []}', "names no commit"),
        ('{"machine": {"commit": "HEAD"}, "rows": []}', "is not a results file"),
    ],
)
def test_a_file_that_names_no_commit_is_refused(tmp_path, content, message):
    head()
    (tmp_path / "cpu.json").write_text(content)
    with pytest.raises(Unusable, match=message):
        builds.resolve(str(tmp_path / "cpu.json"))


def test_what_is_no_commit_is_refused(tmp_path, capsys):
    with pytest.raises(Unusable, match="local changes"):
        builds.resolve(results(tmp_path / "cpu.json", head()[:12] + "+"))
    with pytest.raises(Unusable, match="No such file"):
        builds.resolve(str(tmp_path / "absent.json"))
    with pytest.raises(Unusable, match="no convrnn to build"):
        builds.build_commit(EMPTY_TREE)
    assert compare.main(["no-such-ref"]) == 2
    assert "'no-such-ref' is no commit of this checkout" in capsys.readouterr().err
    assert compare.main(["HEAD", "--only", "no such case"]) == 2


def test_a_build_is_named_after_what_it_depends_on(tmp_path):
    (tmp_path / "setup.py").write_text("")
    name = builds.digest(tmp_path)
    (tmp_path / "README.md").write_text("")
    assert builds.digest(tmp_path) == name
    (tmp_path / "setup.py").write_text("changed")
    assert builds.digest(tmp_path) != name


@pytest.fixture
def package(tmp_path) -> Path:
    """A folder with the installed convrnn in it, as a build would leave it."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(convrnn.__file__).parent, tmp_path / "convrnn", ignore=ignored)
    shutil.copytree(ROOT / "kernels", tmp_path / "convrnn" / "kernels", ignore=ignored, dirs_exist_ok=True)
    return tmp_path


def test_two_processes_each_with_its_own_convrnn(package, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(compare, "PATIENCE_S", 0)
    older = tmp_path_factory.mktemp("older")
    shutil.copytree(package, older, dirs_exist_ok=True)
    with (older / "convrnn" / "__init__.py").open("a") as file:
        file.write("\ndel parallel_scan_log\n")
    comparison = compare.Comparison(older, package, "cpu", 1, lambda text: None)
    cases = {case.name: case for case in all_cases()}
    comparison.run([cases[STREAM], cases[SCAN]])
    stream, *scan = comparison.rows
    assert not stream.problem and all(0 < ms < 1000 for pair in stream.series[0] for ms in pair)
    assert {row.verdict for row in scan} == {"not in base"} and "parallel_scan_log" in scan[0].note


def test_a_process_takes_nothing_from_the_checkout(package, capfd):
    """Without its kernels/ the copy is incomplete, and the editable install must not fill the gap."""
    shutil.rmtree(package / "convrnn" / "kernels")
    worker = compare.Worker(package, "cpu", 1)
    assert worker.receive() == {"failure": "its process ended with status 1"} and not worker.alive
    worker.close()
    assert "convrnn.kernels is missing" in capfd.readouterr().err
