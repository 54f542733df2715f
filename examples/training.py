"""What every program needs: seeds, device, learning rate, metrics, progress, checkpoints and clear errors."""

import codecs
import io
import json
import math
import os
import random
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

__all__ = [
    "BEST",
    "LAST",
    "Interrupted",
    "MetricsLog",
    "UserError",
    "add_run_options",
    "command",
    "exit_code",
    "find_checkpoint",
    "from_json",
    "learning_rate_factor",
    "load_checkpoint",
    "load_config",
    "parameter_count",
    "pick_device",
    "progress",
    "read_json",
    "read_text",
    "reserve",
    "save_checkpoint",
    "seed_everything",
    "write_text",
]

BEST, LAST = "best.safetensors", "last.safetensors"
# UTF-32's mark begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Built = TypeVar("Built")


class UserError(Exception):
    """A mistake in what the user gave; its message is one sentence that says what to do, shown without a traceback."""


class Interrupted(Exception):
    """A signal stopped the program, which saved its work; the message says where."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def exit_code(program: Callable[[], int | None]) -> int:
    """Run `program`; what the user or the machine did wrong becomes one line on stderr and an exit code above 0."""
    # Names of files and texts hold characters that a terminal's encoding may lack.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return program() or 0
    # An OSError, such as a full disk or a folder that cannot be written, says in its message which file it is about.
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def seed_everything(*seed: int) -> None:
    """Seed Python, NumPy and PyTorch from a tuple, e.g. (seed, epoch), so that an epoch does not depend on the last."""
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" takes the GPU where PyTorch sees one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # An unknown name is a RuntimeError, a build without CUDA an AssertionError.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    return device


def parameter_count(model: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def learning_rate_factor(done: float, warmup: float = 0.1) -> float:
    """Linear warm-up, then half a cosine down to 0; `done` runs over (0, 1] of the whole training."""
    if done < warmup:
        return done / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))


def progress(items: Iterable, description: str, total: int | None = None) -> tqdm:
    """`items` with a progress bar on a terminal, silent elsewhere: logs of batch jobs hold no bars."""
    return tqdm(items, desc=description, total=total, leave=False, disable=None)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place only once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:  # else a power cut could leave the new name with half its bytes
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def reserve(folder: Path, size: int) -> None:
    """See that `folder` can be written and holds `size` bytes more, before hours of work rely on it.

    Removes what a killed process left half written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rest in folder.glob(".*.safetensors.*"):
            rest.unlink()
        probe = folder / f".reserve.{os.getpid()}"
        try:
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot hold {size / 1e6:.0f} MB of checkpoints: {error.strerror}") from error


def command(commands: Any, name: str, function: Callable[[Any], Any], text: str) -> ArgumentParser:
    """Add a command to what ``add_subparsers`` gave; returns its parser."""
    sub = commands.add_parser(name, help=text, description=text, formatter_class=ArgumentDefaultsHelpFormatter)
    sub.set_defaults(function=function)
    return sub


def add_run_options(parser: ArgumentParser, run: Path, *, positional: bool = True) -> None:
    """The options of all commands that use a trained model; with `positional` its checkpoint may be an argument too."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--run", type=Path, default=run, help="folder of a trained run, or a checkpoint in it")
    if positional:
        group.add_argument("checkpoint", type=Path, nargs="?", metavar="CHECKPOINT", help="the same as --run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def find_checkpoint(args: Namespace) -> Path:
    """The checkpoint that the options of add_run_options name: a file, or the best one in the folder of a run."""
    chosen: Path = getattr(args, "checkpoint", None) or args.run
    path = chosen / BEST if chosen.is_dir() or not chosen.suffix else chosen
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: train first, or name another folder with --run")
    if not (path.parent / "config.json").is_file():
        raise UserError(f"{path} is not a checkpoint in the folder of a run: there is no config.json beside it")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave the old one as it was."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in the encoding that its byte order mark names; without the mark, lines ending in \\n."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        name, reason = encoding.removesuffix("-sig").upper(), f"{error.reason} at byte {error.start}"
        raise UserError(f"{path} is not text in {name}, {reason}: save it as UTF-8") from error
    if "\0" in text:  # every other byte of English in UTF-16
        raise UserError(f"{path} holds null characters, as text in UTF-16 without a byte order mark: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} does not hold a JSON object, but {text.strip()[:20]!r}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    return _json_object(read_text(path), str(path))


def from_json(cls: type[Built], values: Any) -> Built:
    """A dataclass of numbers, words and switches from a JSON object; TypeError where their types differ."""
    if not isinstance(values, dict):
        raise TypeError(f"{cls.__name__} must be an object, got {values!r}")
    for name, kind in get_type_hints(cls).items():
        allowed = (int, float) if kind is float else (kind,)
        if name in values and type(values[name]) not in allowed:
            raise TypeError(f"{name} must be of type {kind.__name__}, got {values[name]!r}")
    return cls(**values)


def load_config(run: Path, kind: str, build: Callable[[dict[str, Any]], Built]) -> Built:
    """What `build` makes of the config.json in the folder of a run, which must be that of a `kind`."""
    path = run / "config.json"
    saved = read_json(path)
    try:
        return build(saved)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path} is not the configuration of {kind}: {reason}") from error


class MetricsLog:
    """Rows of a JSON-lines file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run will write again, and those of no step."""
        kept = [row for row in self.rows() if row.get("step", step + 1) <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, oldest first; without the last one if a killed process left it half written."""
        if not self.path.exists():
            return []
        *whole, _ = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [_json_object(line, f"{self.path}, line {number}") for number, line in enumerate(whole, start=1)]

    def append(self, **row: Any) -> None:
        """Add a row; it is in the file when the call returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def save_checkpoint(
    path: Path,
    model: nn.Module,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    write: bool = True,
) -> None:
    """Write weights, optimizer state and `state` (JSON) as one safetensors file, in one step or not at all.

    `state` and the optimizer's plain numbers go to the file's header, so weights and step can never disagree. Sharded
    tensors are gathered, so that any number of processes can go on from the file: every process calls this, one with
    `write`.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    header = {"state": json.dumps(state)}
    if optimizer is not None:
        saved = optimizer.state_dict()
        for index, values in saved["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        header["param_groups"] = json.dumps(saved["param_groups"])
    whole = {}
    for name, value in tensors.items():
        gathered = value.full_tensor() if isinstance(value, DTensor) else value
        if write:
            whole[name] = gathered.cpu().contiguous()
    if not write:
        return
    with _replacing(path) as temporary:
        try:
            save_file(whole, temporary, header)
        except safetensors.SafetensorError as error:
            raise UserError(f"cannot write {path}: {error}") from error


def _sharded_as(like: Tensor, value: Tensor) -> Tensor:
    """This process's shard of `value` where `like` is sharded, else `value`."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def load_checkpoint(
    path: Path, model: nn.Module, device: torch.device, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Fill `model`, and `optimizer` if given, from a file of :func:`save_checkpoint`; returns its `state`."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; train first, or name another folder with --run")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            names: list[str] = file.keys()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable checkpoint: {error}") from error
    if "state" not in header or (optimizer is not None and "param_groups" not in header):
        raise UserError(f"{path} was not written by this program: its header lacks the training state")
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    own = model.state_dict()
    try:
        model.load_state_dict({name: _sharded_as(own.get(name, value), value) for name, value in weights.items()})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit the model in config.json: {reason}") from error
    if optimizer is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = _sharded_as(parameters[int(index)], value)
        optimizer.load_state_dict({"state": moments, "param_groups": json.loads(header["param_groups"])})
    return json.loads(header["state"])
