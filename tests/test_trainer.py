"""The examples' trainer: several processes learn what one does; no interrupt, kill or full disk costs more than it must."""

import faulthandler
import functools
import importlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

for _name in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(_name)

from safetensors.torch import load_file

from examples import selective_copying, trainer
from examples.training import exit_code
from tests.processes import run_group

pytestmark = pytest.mark.compiled
ROOT = Path(__file__).resolve().parents[1]
TINY = [
    *["--length", "12", "--memorize", "2", "--features", "8", "--layers", "2"],
    *["--steps", "8", "--interval", "2", "--val-samples", "11", "--batch-size", "4"],
]


def train(run: Path, *more: str) -> int:
    return exit_code(lambda: selective_copying.run([*TINY, "--device", "cpu", "--run", str(run), *more]))


def rows(run: Path) -> list[dict]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read]


def same_rows(actual: list[dict], expected: list[dict]) -> None:
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-6)


def train_and_stop(run: Path, *more: str, at: int = 3) -> int:
    """A run that gets SIGTERM after step `at`, in the last rank where there are several."""
    train_step = trainer.Trainer._train_step

    def stop(self, batch):
        train_step(self, batch)
        if self.step == at and self.processes.rank == self.processes.world - 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", stop)
        return train(run, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    assert train(run) == 0
    assert [row["step"] for row in rows(run)] == [2, 4, 6, 8]
    return run


def in_two_processes(rank: int, folder: Path) -> list[int]:
    codes = []
    for strategy in ("ddp", "fsdp2"):
        options = ["--strategy", strategy]
        codes += [train(folder / strategy, *options), train(folder / f"{strategy}_from_one", *options, "--resume")]
        codes += [train_and_stop(folder / f"from_{strategy}", *options)]
    return codes


def test_two_processes_learn_what_one_does_and_either_goes_on_from_the_other(whole, tmp_path, capfd):
    # stopped by the last step of an interval it is measured first when it goes on, else trained
    for strategy, at in (("ddp", 3), ("fsdp2", 4)):
        assert train_and_stop(tmp_path / f"{strategy}_from_one", at=at) == 128 + signal.SIGTERM
    assert run_group(in_two_processes, 2, tmp_path, tmp_path) == [[0, 0, 128 + signal.SIGTERM] * 2] * 2
    for strategy in ("ddp", "fsdp2"):
        assert train(tmp_path / f"from_{strategy}", "--resume") == 0
    expected = load_file(whole / "last.safetensors")
    for name in ("ddp", "fsdp2", "ddp_from_one", "fsdp2_from_one", "from_ddp", "from_fsdp2"):
        same_rows(rows(tmp_path / name), rows(whole))
        actual = load_file(tmp_path / name / "last.safetensors")
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            # Adam divides by the root of the second moment: a gradient near zero moves a weight by its rounding's sign
            torch.testing.assert_close(actual[key], value, rtol=1e-2, atol=1e-3)


def test_torchrun(whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    command += ["examples.selective_copying", *TINY, "--device", "cpu", "--run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation accuracy") == 1 and "cpu and 1 more, ddp" in done.stdout
    same_rows(rows(tmp_path), rows(whole))


def leave_with_the_model_alive(rank: int, folder: Path) -> None:
    faulthandler.dump_traceback_later(60, exit=True)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
    join = trainer.dist.init_process_group
    for count in range(60):
        where = {"init_method": f"file://{folder}/{count}", "rank": rank, "world_size": 2}
        trainer.dist.init_process_group = functools.partial(join, **where)
        with closing(trainer.Processes("cpu")) as processes:
            model = processes.spread(torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)]))
            model(torch.ones(4, 64)).sum().backward()
        del model


def test_a_model_may_outlive_the_group(tmp_path):
    """DDP's reducer, as the group's last owner, waited for a thread that waited for the GIL: once in some dozen runs."""
    mp.start_processes(leave_with_the_model_alive, (tmp_path,), nprocs=2, start_method="spawn")


def test_a_batch_is_a_multiple_of_the_processes(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(trainer.dist, "is_initialized", lambda: True)
    assert train(tmp_path) == 2
    assert "--batch-size 4 must be a multiple of the 3 processes" in capsys.readouterr().err


@pytest.mark.parametrize("at", [4, 6])  # the last step of an interval too
def test_interrupted_it_saves_and_goes_on_bit_for_bit(whole, tmp_path, at, monkeypatch, capsys):
    train_step = trainer.Trainer._train_step

    def stop(self, batch):
        train_step(self, batch)
        if self.step == at:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", stop)
        assert train(tmp_path) == 130
    assert f"interrupted: stopped after step {at}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert train(tmp_path, "--resume") == 0
    assert rows(tmp_path) == rows(whole)
    assert '"seconds": 0.0}' not in (tmp_path / "metrics.jsonl").read_text()  # the time before the stop counts too
    expected, actual = (load_file(run / "last.safetensors") for run in (whole, tmp_path))
    assert all(torch.equal(expected[name], actual[name]) for name in expected.keys() | actual.keys())


KILLED = """
import os, signal, sys
from examples import selective_copying, training
save_file = training.save_file
def half(tensors, path, header):
    save_file(tensors, path, header)
    if '"step": 6' in header["state"] and "param_groups" in header:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
training.save_file = half
selective_copying.run(sys.argv[1:])
"""


def test_killed_while_it_writes_a_checkpoint_it_loses_one_interval(whole, tmp_path):
    command = [sys.executable, "-c", KILLED, *TINY, "--device", "cpu", "--run", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob(".last.safetensors.*"))) == 1
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tra')
    assert train(tmp_path, "--resume") == 0
    assert rows(tmp_path) == rows(whole)
    assert not list(tmp_path.glob(".last.safetensors.*"))


def test_a_full_disk_or_unwritable_folder_is_told_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.Trainer, "_train_step", lambda *_: pytest.fail("trained"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # what a full disk or a quota says, without one
    try:
        assert train(tmp_path / "full") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "full cannot hold 1 MB of checkpoints: File too large" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert train(tmp_path / "file" / "run") == 2
    assert "cannot hold 1 MB of checkpoints: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "--lr", "1"], "the run was started with lr 0.003, which --resume cannot change to 1.0"),
        ([], "already holds a run"),
        (["--resume", "--memorize", "13"], "1 <= --memorize <= --length"),
        (["--resume", "--batch-size", "0"], "steps and samples to train on"),
        (["--resume", "--interval", "0"], "--interval > 0"),
    ],
)
def test_mistakes_are_one_sentence(whole, more, message, capsys):
    assert train(whole, *more) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ['{"train": 3, "task": 3, "model": 3}', '{"data": {}}', "[]"])
def test_a_run_of_another_kind_does_not_go_on(tmp_path, text, capsys):
    (tmp_path / "config.json").write_text(text)
    assert train(tmp_path, "--resume") == 2
    said = (
        "config.json does not hold a JSON object"
        if text == "[]"
        else "holds a run of another kind: its config.json lacks 'task'"
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("selective_copying", [[]]),
        ("language_model", [[], ["train"], ["sample"]]),
        ("next_frame", [[], ["train"], ["test"]]),
        ("video_classification", [[], ["make-data"], ["train"], ["test"], ["predict"], ["demo"]]),
    ],
)
def test_help_explains_every_option(name, commands, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for module in ("av", "PIL", "skimage", "sklearn", "scipy"):
        pytest.importorskip(module)
    program = importlib.import_module(f"examples.{name}")
    for command in commands:
        with pytest.raises(SystemExit) as done:
            program.run([*command, "--help"])
        lines = capsys.readouterr().out.partition("options:")[2].splitlines()
        assert done.value.code == 0 and lines
        for number, line in enumerate(lines):
            if line.startswith("  -"):  # the text stands behind the option, or on the next line where it is long
                told = line.strip().partition("  ")[2] or lines[number + 1].strip()
                assert told and not told.startswith("-"), line
    text = (ROOT / "examples" / "README.md").read_text()
    assert f"python -m examples.{name}" in text and f"`{name}.py`" in text


def commands_of_readme() -> list[tuple[str, list[str]]]:
    text = (ROOT / "examples" / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"(?:python -m|torchrun .*-m --) examples\.(\w+)([^`\n]*)", text)
    return [(name, shlex.split(words, comments=True)) for name, words in found]


def test_every_command_of_the_readme_is_one():
    commands = commands_of_readme()
    assert len(commands) >= 14 and {name for name, _ in commands} >= {"next_frame", "language_model"}
    for name, words in commands:
        importlib.import_module(f"examples.{name}").parser().parse_args(words)


def test_compiled_it_learns_the_same(whole, tmp_path, monkeypatch):
    """The graph is all that is tested here: what Inductor makes of it takes a minute, and PyTorch answers for it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend=backend, fullgraph=True))
    assert train_and_stop(tmp_path, "--compile") == 128 + signal.SIGTERM
    assert train(tmp_path, "--compile", "--resume") == 0
    assert graphs
    same_rows(rows(tmp_path), rows(whole))
