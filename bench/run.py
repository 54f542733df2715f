"""A run: every case in several sweeps, so that the spread holds what the machine does over minutes."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch

from . import machine, measure
from .case import FLOOR, GRAPH, OURS, Case, Problem
from .measure import Key
from .providers import compiled
from .results import Refusal, Results, Row, add_speedups

COMPILED = "compiled "


@dataclass(frozen=True)
class Effort:
    """How much is measured: sweeps over all cases, rounds in each, and torch.compile in how many cases."""

    sweeps: int
    rounds: int
    compile: bool
    exhaustive: bool


EFFORTS = {
    "quick": Effort(sweeps=1, rounds=3, compile=False, exhaustive=False),
    "default": Effort(sweeps=2, rounds=3, compile=True, exhaustive=False),
    "full": Effort(sweeps=4, rounds=4, compile=True, exhaustive=True),
}


@dataclass
class Subject:
    """A case under measurement."""

    case: Case
    problem: Problem
    rows: dict[Key, Row] = field(default_factory=dict)
    floors: dict[str, list[float]] = field(default_factory=dict)


class Bench:
    """Measures cases; ``results`` always holds what is known so far."""

    def __init__(self, cases: list[Case], effort: Effort, device: torch.device) -> None:
        self.cases = cases
        self.effort = effort
        self.device = device
        self.results = Results(machine.stamp(device), {})

    def run(self) -> Iterator[Case]:
        """Measures; yields each case when a sweep is through with it."""
        self.results.peaks = machine.peaks(self.device, {case.dtype for case in self.cases})
        subjects: dict[str, Subject] = {}
        for sweep in range(self.effort.sweeps):
            for case in self.cases:
                if case.name not in subjects:
                    subjects[case.name] = self.prepare(case)
                self.time(subjects[case.name], sweep)
                yield case
        self.results.complete = True

    def prepare(self, case: Case) -> Subject:
        """Builds the problem, refuses providers whose results are wrong, and measures the memory of the others."""
        problem = case.problem(self.device)
        if case.compile and self.effort.compile:
            problem.providers |= {COMPILED + name: compiled(p) for name, p in problem.providers.items() if p.compile}
        subject = Subject(case, problem)
        expected = measure.truths(problem, training="step" in case.passes)
        for name, provider in list(problem.providers.items()):
            try:
                error = measure.error(case, problem, provider, expected(provider))
                limit = measure.tolerance(case, provider)
                if not error <= limit:
                    self.refuse(subject, name, f"wrong: relative error {error:.1e}, allowed {limit:.0e}")
                    continue
                # What is compiled for training has a backward that frees its buffers: it cannot run again by itself.
                for what in case.passes if provider.inference else ("step",):
                    self.add_row(subject, name, what, error)
            except Exception as exception:  # noqa: BLE001  any provider may fail: reported, and the run ends non-zero
                self.refuse(subject, name, f"{type(exception).__name__}: {exception}")
        if self.device.type == "cuda":
            self.add_graphs(subject)
        return subject

    def refuse(self, subject: Subject, name: str, reason: str) -> None:
        self.results.refused.append(Refusal(subject.case.name, name, reason))
        del subject.problem.providers[name]
        subject.rows = {key: row for key, row in subject.rows.items() if key[0] != name}

    def add_graphs(self, subject: Subject) -> None:
        """The same passes in a CUDA graph; not backward, which runs on its forward's stream, outside the capture."""
        for (name, what), row in list(subject.rows.items()):
            if what == "backward" or name.startswith(COMPILED):
                continue
            try:
                measure.clock(
                    measure.task(what, subject.problem.providers[name], subject.problem), self.device, graph=True
                )
            except RuntimeError as exception:
                self.results.refused.append(Refusal(subject.case.name, name + GRAPH, f"{what}: {exception}"))
            else:
                self.add_row(subject, name + GRAPH, what, row.error)

    def add_row(self, subject: Subject, name: str, what: str, error: float) -> None:
        case, work = subject.case, subject.case.work(what)
        row = Row(
            case=case.name,
            op=case.op,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            group=case.group,
            provider=name,
            what=what,
            samples_ms=[],
            sweeps=[],
            flop=work.flop,
            bytes=work.bytes,
            error=error,
        )
        if what == "step" and not name.endswith(GRAPH):
            provider = subject.problem.providers[name]
            row.kept_bytes = measure.kept_bytes(provider, subject.problem)
            row.peak_bytes = measure.peak_bytes(measure.task(what, provider, subject.problem), self.device)
        subject.rows[name, what] = row

    def time(self, subject: Subject, sweep: int) -> None:
        tasks = {
            key: measure.task(key[1], subject.problem.providers[key[0].removesuffix(GRAPH)], subject.problem)
            for key, row in subject.rows.items()
            if sweep == 0 or row.samples_ms[0] < measure.VERY_SLOW_MS or key[0] == OURS
        }
        tasks |= {(FLOOR, what): task for what, task in subject.problem.floors.items() if what in subject.case.passes}
        turns = measure.by_turns(tasks, self.effort.rounds, self.device)
        for key, row in subject.rows.items():
            for samples in turns.get(key, []):
                row.samples_ms += (float(f"{ms:.5g}") for ms in samples)
                row.sweeps += [sweep] * len(samples)
        for what in subject.problem.floors.keys() & set(subject.case.passes):
            found = subject.floors.setdefault(what, [])
            found += chain(*turns[FLOOR, what])
            for key, row in subject.rows.items():
                if key[1] == what:
                    row.floor_ms = statistics.median(found)
        if sweep == 0:
            self.results.rows += subject.rows.values()
        for what in subject.case.passes:
            add_speedups([row for key, row in subject.rows.items() if key[1] == what])
