"""One trainer for all examples: a process, or several under torchrun; metrics, checkpoints, resuming, interrupts.

What a step does follows from the seed and the number of the step alone: a run goes on from any step, on any number of
processes, as if it had never stopped. Rank r of n trains on every n-th sample of a batch, from the r-th on.
"""

import argparse
import atexit
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from examples.training import (
    BEST,
    LAST,
    Interrupted,
    MetricsLog,
    UserError,
    learning_rate_factor,
    load_checkpoint,
    parameter_count,
    pick_device,
    progress,
    read_json,
    reserve,
    save_checkpoint,
    seed_everything,
    write_text,
)

__all__ = ["Plan", "Processes", "Samples", "Trainer", "add_training_options", "check_run"]

STRATEGIES = ("ddp", "fsdp2")

# (model, batch) -> metrics of each sample, (n,): "loss", whose mean is trained on, and any others, such as "accuracy"
Objective = Callable[[nn.Module, list[Tensor]], dict[str, Tensor]]


class Samples(Sized, Protocol):
    """A data set: sample `index` as it is drawn in pass `epoch`; it may draw at random from these two alone."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class Plan:
    """The optimisation of a run: AdamW with a warm-up and a cosine; a row of metrics each `interval` steps."""

    steps: int
    interval: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int

    def __post_init__(self) -> None:
        counts = min(self.steps, self.interval, self.batch_size)
        if not (self.lr > 0 and self.weight_decay >= 0 and self.seed >= 0 and counts > 0):
            raise UserError(
                "training needs --lr > 0, --weight-decay >= 0, --seed >= 0, --interval > 0, "
                "and steps and samples to train on"
            )


class Processes:
    """The processes that train together: those of torchrun, or this one alone; for contextlib.closing."""

    def __init__(self, device: str, strategy: str = "ddp") -> None:
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if self.world > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.device, self.strategy = pick_device(device), strategy
        self.first = self.rank == 0

        self._joins = self.world > 1 and not dist.is_initialized()
        if self._joins:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def close(self) -> None:
        """Leave the group, if it was made here."""
        if self._joins:
            # DDP's reducer may outlive this. As the group's last owner it would join gloo's thread while it holds the
            # GIL, which that thread may be waiting for; Python lets the GIL go, so Python keeps the group to the end.
            group = dist.group.WORLD
            atexit.register(lambda: group)
            dist.destroy_process_group()

    def spread(self, model: nn.Module) -> nn.Module:
        """The model to train with: gradients averaged over the processes, with fsdp2 weights sharded in place."""
        if self.world == 1:
            return model
        if self.device.type == "cuda":  # on the CPU, PyTorch's batch norm knows its own process's samples only
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if self.strategy == "ddp":
            return DistributedDataParallel(model)
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in _blocks(model):
            fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            dist.all_reduce(sums)
        return sums

    def agree(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.world == 1:
            return number
        shared = torch.tensor(number)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def say(self, *words: object) -> None:
        """Print, once."""
        if self.first:
            print(*words, flush=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost ModuleLists: what a large model repeats."""
    for child in module.children():
        yield from child if isinstance(child, nn.ModuleList) else _blocks(child)


class Shard:
    """The batches of steps first+1, first+2, ... that a rank trains on: keys (epoch, index), pass after pass."""

    def __init__(self, samples: int, plan: Plan, first: int, processes: Processes) -> None:
        self.samples, self.plan, self.first, self.processes = samples, plan, first, processes

    def __len__(self) -> int:
        return self.plan.steps - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, drawn, order = self.plan.batch_size, -1, np.empty(0, dtype=int)
        for step in range(self.first, self.plan.steps):
            keys = []
            for position in range(step * size + self.processes.rank, (step + 1) * size, self.processes.world):
                epoch, place = divmod(position, self.samples)
                if epoch != drawn:
                    drawn, order = epoch, np.random.default_rng((self.plan.seed, epoch)).permutation(self.samples)
                keys.append((epoch, int(order[place])))
            yield keys


class Trainer:
    """Trains a model and keeps a run's folder: config.json, metrics.jsonl, best and last checkpoint.

    Args:
        run: the folder.
        config: all that makes the run what it is, for config.json.
        model: on the processes' device, the same in each.
        objective: metrics of each sample of a batch.
        training: samples to train on.
        validation: samples to measure on at each interval; may be empty.
        plan: the optimisation.
        processes: who trains.
        workers: processes of each rank that load samples.
        resume: go on from the folder's last checkpoint.
    """

    def __init__(
        self,
        run: Path,
        config: dict[str, Any],
        model: nn.Module,
        objective: Objective,
        training: Samples,
        validation: Samples,
        plan: Plan,
        processes: Processes,
        *,
        workers: int = 0,
        resume: bool = False,
    ) -> None:
        if plan.batch_size % processes.world:
            raise UserError(f"--batch-size {plan.batch_size} must be a multiple of the {processes.world} processes")
        self.run, self.model, self.objective, self.plan, self.processes = run, model, objective, plan, processes
        self.training, self.validation, self.workers = training, validation, workers
        self.log = MetricsLog(run / "metrics.jsonl")
        size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
        learned = parameter_count(model)
        if processes.first:  # the old and the new last checkpoint, with AdamW's two moments, and the best one's
            reserve(run, 2 * (size + 8 * learned) + 2 * size + (1 << 20))
        self.module = processes.spread(model)
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=plan.lr, weight_decay=plan.weight_decay
        )
        self.step, self.best, self.due = 0, [-math.inf], False
        self.sums: dict[str, Tensor] = {}
        if resume:
            state = load_checkpoint(run / LAST, model, processes.device, self.optimizer)
            self.step, self.best, self.due = state["step"], state["best"], state["due"]
            for name, value in state["sums"].items():  # the sum over the ranks is theirs that were stopped
                self.sums[name] = torch.tensor(value * processes.first, dtype=torch.float64, device=processes.device)
        if processes.first:
            write_text(run / "config.json", json.dumps(config, indent=1) + "\n")
            self.log.keep(self.step - self.due)
        processes.say(
            f"{learned:,} parameters, on {processes.device}"
            + (f" and {processes.world - 1} more, {processes.strategy}" if processes.world > 1 else "")
            + f"; {len(training):,} training and {len(validation):,} validation samples"
        )

    def fit(self, show: Callable[[int], None] | None = None) -> None:
        """Train to the plan's last step; `show` is called with the step after each interval, on every rank.

        SIGINT and SIGTERM stop after the step that they find; a checkpoint is saved and Interrupted raised.
        """
        stop = 0

        def note(number: int, frame: FrameType | None) -> None:
            nonlocal stop
            stop = number

        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            batches = iter(self._loader(self.training, Shard(len(self.training), self.plan, self.step, self.processes)))
            while self.step < self.plan.steps or self.due:
                if not self.due:
                    started = time.perf_counter()
                    end = min(self.plan.steps, (self.step // self.plan.interval + 1) * self.plan.interval)
                    for _ in self._progress(range(self.step, end), f"step {self.step}"):
                        self._train_step(next(batches))
                        self.due = self.step == end
                        if stopped := self.processes.agree(stop):
                            break
                    self._add("seconds", torch.tensor(time.perf_counter() - started if self.processes.first else 0.0))
                    if stopped:
                        self._save_and_stop(stopped)
                measured = self._measure(lambda: self.processes.agree(stop))
                if measured is None:
                    self._save_and_stop(self.processes.agree(stop))
                self._report(measured or {})
                if show is not None:
                    show(self.step)
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _progress(self, steps: range, text: str) -> Any:
        return progress(steps, text) if self.processes.first else steps

    def _loader(self, samples: Samples, keys: Any) -> DataLoader:
        # A generator of its own: the draws of a worker's seed would else move the model's random numbers.
        return DataLoader(
            samples,  # type: ignore[arg-type]
            batch_sampler=keys,
            num_workers=self.workers,
            generator=torch.Generator(),
            pin_memory=self.processes.device.type == "cuda",
        )

    def _add(self, name: str, value: Tensor) -> None:
        value = value.to(self.processes.device, torch.float64)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _train_step(self, batch: list[Tensor]) -> None:
        self.module.train()
        seed_everything(self.plan.seed, self.step, self.processes.rank)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr * learning_rate_factor((self.step + 1) / self.plan.steps)
        metrics = self.objective(self.module, [x.to(self.processes.device, non_blocking=True) for x in batch])
        self.optimizer.zero_grad()
        metrics["loss"].mean().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        self.optimizer.step()
        self.step += 1
        # Kept on the device, so that the GPU need not wait for the CPU after each step.
        for name, values in metrics.items():
            self._add(name, values.detach().double().sum())
        self._add("samples", torch.tensor(len(metrics["loss"])))

    @torch.no_grad()  # not inference_mode: fsdp2 would keep what it gathers as tensors that training cannot use
    def _measure(self, stopped: Callable[[], int]) -> dict[str, float] | None:
        """Means over the validation samples; None if a signal came before the end."""
        count, world = len(self.validation), self.processes.world
        if count == 0:
            return {}
        self.module.eval()
        local = self.plan.batch_size // world
        # Every rank takes as many samples, for fsdp2's ranks run in step; those past the end are not counted.
        mine = range(self.processes.rank, math.ceil(count / world) * world, world)
        parts = [mine[i : i + local] for i in range(0, len(mine), local)]
        keys = [[(0, position % count) for position in part] for part in parts]
        sums: dict[str, Tensor] = {}
        for part, batch in zip(parts, self._loader(self.validation, keys), strict=True):
            metrics = self.objective(self.module, [x.to(self.processes.device) for x in batch])
            counted = torch.tensor([position < count for position in part], device=self.processes.device)
            for name, values in metrics.items():
                sums[name] = (
                    sums.get(name, torch.zeros((), dtype=torch.float64)).to(values.device)
                    + (values.double() * counted).sum()
                )
            if stopped():
                return None
        return {f"val_{name}": (self.processes.total(value) / count).item() for name, value in sums.items()}

    def _totals(self) -> dict[str, float]:
        return {name: self.processes.total(value.clone()).item() for name, value in self.sums.items()}

    def _report(self, measured: dict[str, float]) -> None:
        """Write the interval's row and its checkpoints."""
        totals = self._totals()
        seconds, samples = totals.pop("seconds"), totals.pop("samples")
        row: dict[str, float] = {"step": self.step}
        row["epoch"] = round(self.step * self.plan.batch_size / len(self.training), 3)
        row |= {f"train_{name}": value / samples for name, value in totals.items()} | measured
        if not math.isfinite(row["train_loss"]):
            raise UserError(f"the training loss became {row['train_loss']} before step {self.step}: lower --lr")
        row["seconds"] = round(seconds, 3)
        self.sums, self.due = {}, False
        # Equal accuracies are told apart by loss; without validation samples the latest step is the best.
        loss = measured.get("val_loss")
        score = (
            [float(self.step)] if loss is None else [*(v for k, v in measured.items() if k == "val_accuracy"), -loss]
        )
        if self.processes.first:
            self.log.append(**row)
        self.processes.say(
            f"step {self.step}/{self.plan.steps}", *(f" {k} {v:.4g}" for k, v in row.items() if k != "step")
        )
        if score > self.best:
            self.best = score
            self._save(BEST)
        self._save(LAST)

    def _save(self, name: str) -> None:
        state = {"step": self.step, "best": self.best, "due": self.due, "sums": self._totals()}
        optimizer = self.optimizer if name == LAST else None
        save_checkpoint(self.run / name, self.model, state, optimizer, write=self.processes.first)

    def _save_and_stop(self, number: int) -> None:
        self._save(LAST)
        raise Interrupted(
            number, f"stopped after step {self.step}, {self.run / LAST} is saved: --resume goes on from it"
        )


def check_run(args: argparse.Namespace, config: dict[str, Any], may_change: tuple[str, ...] = ("epochs",)) -> None:
    """See that the folder --run is free, or holds the run that --resume goes on with, made with the same options."""
    if args.resume:
        started = read_json(args.run / "config.json")
        for part, now in config.items():
            then = started.get(part)
            if isinstance(now, dict) and not isinstance(then, dict):
                raise UserError(f"{args.run} holds a run of another kind: its config.json lacks {part!r}")
            pairs = [(k, then.get(k), v) for k, v in now.items()] if isinstance(now, dict) else [(part, then, now)]
            for name, old, new in pairs:
                if name not in may_change and new != old:
                    raise UserError(f"the run was started with {name} {old}, which --resume cannot change to {new}")
    elif args.overwrite:
        for name in (BEST, LAST):
            (args.run / name).unlink(missing_ok=True)
    elif (args.run / LAST).exists():
        raise UserError(f"{args.run} already holds a run: add --resume or --overwrite, or name another with --run")


def add_training_options(add: Any, run: Path, *, batch_size: int, lr: float, weight_decay: float) -> None:
    """The options that all training commands have."""
    add("--run", type=Path, default=run, help="folder of the run: config, checkpoints, metrics, pictures")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; under torchrun each process takes a GPU")
    add("--strategy", choices=STRATEGIES, default="ddp", help="under torchrun: replicate the weights, or shard them")
    add("--batch-size", type=int, default=batch_size, help="samples of a step, of all processes together")
    add("--lr", type=float, default=lr, help="highest learning rate")
    add("--weight-decay", type=float, default=weight_decay, help="of AdamW")
    add("--seed", type=int, default=0, help="of weights, data and order")
    add("--workers", type=int, default=0, help="processes that load samples, for each process that trains")
    add("--compile", action="store_true", help="compile the model")
    add("--resume", action="store_true", help="go on from the last checkpoint; give the same options again")
    add("--overwrite", action="store_true", help="replace the run that the folder holds")
