"""A run: every case in several sweeps, each in a process of its own, so that the spread holds what a process decides.

Where a tensor lies in memory, and with that how its rows share the caches, stays as it is for as long as a process lives,
and can be worth more than all else that varies: repetitions within one process would agree on a figure that the next
run does not find again.
"""

import dataclasses
import multiprocessing
import signal
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from . import machine, measure
from .case import FLOOR, FRESH, GRAPH, OURS, Case, Problem
from .cases import all_cases
from .measure import Key
from .providers import compiled
from .results import Refusal, Results, Row, add_speedups

COMPILED = "compiled "
BEATEN = 1.5  # a slow baseline that takes so many times the best one's time is no longer in question
FRESH_PASSES = ("forward", "step")
CLOSE = 1.1  # one that a process would have to compile anew is, where it takes more than this

Turns = dict[Key, list[float]]  # milliseconds a call


@dataclass(frozen=True)
class Effort:
    """How much is measured: sweeps over all cases, rounds in each, torch.compile in how many cases, and memory."""

    sweeps: int
    rounds: int
    compile: bool
    exhaustive: bool
    memory: bool = True


EFFORTS = {
    "quick": Effort(sweeps=1, rounds=3, compile=False, exhaustive=False),
    "default": Effort(sweeps=5, rounds=1, compile=True, exhaustive=False),
    "full": Effort(sweeps=6, rounds=2, compile=True, exhaustive=True),
}


def five_digits(samples: list[float]) -> list[float]:
    return [float(f"{x:.5g}") for x in samples]


class Subject:
    """A case under measurement: its rows, and the times of its floors, which are no rows."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.rows: dict[Key, Row] = {}
        self.floors: dict[str, list[float]] = {}

    def keys(self, sweep: int) -> list[Key]:
        """What a sweep times: after the first one no slow baseline that others beat by far, nor what is compiled unless it
        may be the best baseline."""

        def in_question(name: str, row: Row) -> bool:
            if name.startswith(COMPILED):
                return OURS not in name and (row.speedup or 1) > 1 / CLOSE
            return name == OURS or row.ms < measure.SLOW_MS or (row.speedup or 1) > 1 / BEATEN

        return [key for key, row in self.rows.items() if sweep == 0 or in_question(key[0], row)]

    def add(self, sweep: int, turns: Turns) -> None:
        for (name, what), found in turns.items():
            if name == FLOOR:
                self.floors.setdefault(what, []).extend(found)
                continue
            row = self.rows[name, what]
            row.samples_ms += five_digits(found)
            row.sweeps += [sweep] * len(found)
        for what in self.case.passes:
            rows = [row for row in self.rows.values() if row.what == what]
            if what in self.floors:
                for row in rows:
                    row.floor_ms = statistics.median(self.floors[what])
            add_speedups(rows)

    def on_fresh_pages(self, turns: Turns) -> list[Row]:
        """Rows of ours beside those of the same passes, whose floors were on fresh pages too."""
        return [
            dataclasses.replace(
                self.rows[OURS, what],
                provider=OURS + FRESH,
                samples_ms=five_digits(turns[OURS, what]),
                sweeps=[0] * len(turns[OURS, what]),
                floor_ms=statistics.median(turns[FLOOR, what]),
                **dict.fromkeys(("kept_bytes", "peak_bytes", "speedup", "speedup_low", "speedup_high")),
            )
            for what in FRESH_PASSES
        ]


class Bench:
    """Measures cases; ``results`` always holds what is known so far.

    ``source`` makes them again, and others perhaps, in the process of a further sweep: it can be pickled, a case cannot.
    """

    def __init__(
        self, cases: list[Case], effort: Effort, device: torch.device, source: Callable[[], list[Case]] = all_cases
    ) -> None:
        self.cases = cases
        self.effort = effort
        self.device = device
        self.source = source
        self.subjects: list[Subject] = []
        self.results = Results(machine.stamp(device), {})

    def run(self) -> Iterator[Case]:
        """Measures; yields each case when a sweep is through with it."""
        self.results.peaks = machine.peaks(self.device, {case.dtype for case in self.cases})
        for case in self.cases:
            problem = concrete(case, self.effort.compile, self.device)
            subject = self.prepare(case, problem)
            subject.add(0, timed(case, problem, subject.keys(0), self.effort.rounds, 0, self.device))
            self.results.rows += subject.rows.values()
            self.subjects.append(subject)
            yield case
        yield from self.further(range(1, self.effort.sweeps), self.subjects)
        fresh = [subject for subject in self.subjects if subject.case.group == "op" and subject.floors and subject.rows]
        if fresh and self.effort.sweeps > 1 and self.device.type == "cpu" and machine.has_mallopt():
            self.add_fresh_pages(fresh)
        self.results.complete = True

    def further(self, sweeps: range, subjects: list[Subject]) -> Iterator[Case]:
        """Adds sweeps over ``subjects``, each in a process of its own."""
        for sweep in sweeps:
            wanted = {subject.case.name: subject.keys(sweep) for subject in subjects}
            for subject, turns in zip(subjects, self.again(wanted, self.effort.rounds, sweep), strict=True):
                subject.add(sweep, turns)
                yield subject.case

    def add_fresh_pages(self, subjects: list[Subject]) -> None:
        """Times ours against its floors once more, where large tensors are fresh pages: what a first call sees."""
        wanted = {subject.case.name: [(OURS, what) for what in FRESH_PASSES] for subject in subjects}
        rounds = self.effort.rounds * self.effort.sweeps
        rows = self.results.rows
        for subject, turns in zip(subjects, self.again(wanted, rounds, 0, fresh=True), strict=True):
            end = max(i for i, row in enumerate(rows) if row.case == subject.case.name) + 1
            rows[end:end] = subject.on_fresh_pages(turns)

    def again(self, wanted: dict[str, list[Key]], rounds: int, sweep: int, fresh: bool = False) -> Iterator[Turns]:
        """Times the cases in another process, whose large tensors are ``fresh`` pages or not.

        Raises:
            RuntimeError: it ended before it was through.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the memory is the other process's now
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=repeat,
            args=(
                *(sender, self.source, wanted, self.effort.compile, rounds, sweep),
                *(self.device, torch.get_num_threads(), fresh),
            ),
            daemon=True,
        )
        process.start()
        sender.close()  # so that its end is noticed
        try:
            for name in wanted:
                try:
                    yield receiver.recv()
                except EOFError:
                    process.join()
                    raise RuntimeError(f"sweep {sweep} ended with status {process.exitcode} at {name}") from None
        finally:
            process.kill()
            process.join()

    def prepare(self, case: Case, problem: Problem) -> Subject:
        """Refuses providers whose results are wrong, and measures the memory of the others."""
        subject = Subject(case)
        expected = measure.truths(problem, training="step" in case.passes)
        for name, provider in problem.providers.items():
            try:
                results = expected(provider)
                error = measure.error(case, problem, provider, results)
                if wrong := measure.complaint(error, case, provider):
                    self.refuse(subject, name, f"wrong: {wrong}")
                    continue
                for what in case.passes:
                    if what != "backward" or provider.retains:
                        self.add_row(subject, problem, name, what, error)
                if self.device.type == "cuda" and not name.startswith(COMPILED):
                    self.add_graphs(subject, problem, name, results)
            except Exception as exception:  # noqa: BLE001  any provider may fail: reported, and the run ends non-zero
                self.refuse(subject, name, f"{type(exception).__name__}: {exception}")
        return subject

    def refuse(self, subject: Subject, name: str, reason: str) -> None:
        self.results.refused.append(Refusal(subject.case.name, name, reason))
        subject.rows = {key: row for key, row in subject.rows.items() if key[0] != name}

    def add_graphs(self, subject: Subject, problem: Problem, name: str, expected: dict[str, torch.Tensor]) -> None:
        """The same passes in a CUDA graph; not backward, which runs on its forward's stream, outside the capture."""
        case, provider = subject.case, problem.providers[name]
        try:
            error = measure.error(case, problem, provider, expected, graph=True)
            if wrong := measure.complaint(error, case, provider):
                raise RuntimeError(f"wrong: {wrong}")
            for what in case.passes:
                if what != "backward":
                    measure.captured(measure.task(what, provider, problem))
                    self.add_row(subject, problem, name + GRAPH, what, error)
        except RuntimeError as exception:
            self.refuse(subject, name + GRAPH, str(exception))

    def add_row(self, subject: Subject, problem: Problem, name: str, what: str, error: float) -> None:
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
        if self.effort.memory and what == "step" and not name.endswith(GRAPH):
            provider = problem.providers[name]
            row.kept_bytes = measure.kept_bytes(provider, problem)
            row.peak_bytes = measure.peak_bytes(measure.task(what, provider, problem), self.device)
        subject.rows[name, what] = row


def concrete(case: Case, compile: bool, device: torch.device) -> Problem:
    """The case's problem, with the providers under torch.compile that it asks for."""
    problem = case.problem(device)
    if case.compile and compile:
        problem.providers |= {COMPILED + name: compiled(p) for name, p in problem.providers.items() if p.compile}
    return problem


def timed(case: Case, problem: Problem, keys: list[Key], rounds: int, sweep: int, device: torch.device) -> Turns:
    """One sweep's turns of the passes in ``keys``, and of the case's floors."""
    tasks = {}
    for name, what in keys:
        task = measure.task(what, problem.providers[name.removesuffix(GRAPH)], problem)
        tasks[name, what] = measure.captured(task)[0] if name.endswith(GRAPH) else task
    tasks |= {(FLOOR, what): task for what, task in problem.floors.items() if what in case.passes}
    return measure.by_turns(tasks, rounds, sweep, device)


def repeat(
    replies: Connection,
    source: Callable[[], list[Case]],
    wanted: dict[str, list[Key]],
    compile: bool,
    rounds: int,
    sweep: int,
    device: torch.device,
    threads: int,
    fresh: bool,
) -> None:
    """A further sweep, as a process: sends the turns of each case in ``wanted``, in its order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked decides
    machine.prepare(threads, fresh)
    cases = {case.name: case for case in source()}
    for name, keys in wanted.items():
        problem = concrete(cases[name], compile, device)
        replies.send(timed(cases[name], problem, keys, rounds, sweep, device))
