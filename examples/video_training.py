"""Training of the video classifier: a random clip of each video an epoch, checkpoints, resuming."""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples import pictures
from examples.training import (
    MetricsLog,
    UserError,
    learning_rate_factor,
    load_checkpoint,
    parameter_count,
    pick_device,
    progress,
    read_json,
    save_checkpoint,
    seed_everything,
    write_text,
)
from examples.video_model import ModelConfig, VideoClassifier
from examples.videos import ClipConfig, ClipDataset, Frames, SplitLists, Video, index_videos, read_lists, split_by_group

__all__ = ["BEST", "RunConfig", "can_flip", "read_videos", "train"]

BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """The data and the optimisation of a run; `lr` is the highest learning rate, `val_fraction` a share of groups."""

    videos: str
    lists: str
    fold: int
    flip: bool
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    val_fraction: float
    seed: int

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.weight_decay >= 0 and 0 <= self.val_fraction < 1 and self.seed >= 0):
            raise UserError("training needs --lr > 0, --weight-decay >= 0, --val-fraction in [0, 1) and --seed >= 0")


@dataclass(frozen=True)
class RunConfig:
    """All that makes a run what it is: the config.json beside its checkpoints."""

    model: ModelConfig
    clip: ClipConfig
    train: TrainConfig
    classes: list[str]

    @classmethod
    def load(cls, run: Path) -> "RunConfig":
        """The configuration of the run in a folder."""
        path = run / "config.json"
        saved = read_json(path)
        try:
            model, clip, train = (
                ModelConfig(**saved["model"]),
                ClipConfig(**saved["clip"]),
                TrainConfig(**saved["train"]),
            )
            return cls(model, clip, train, saved["classes"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not the configuration of a run: {error}") from error

    def save(self, run: Path) -> None:
        """Write config.json."""
        write_text(run / "config.json", json.dumps(asdict(self), indent=1) + "\n")

    def check_resumes(self, started: "RunConfig") -> None:
        """A run goes on with the options it was started with, or not at all; only `epochs` may change."""
        for part in ("model", "clip", "train"):
            old = asdict(getattr(started, part))
            for name, value in asdict(getattr(self, part)).items():
                if name != "epochs" and value != old[name]:
                    raise UserError(
                        f"the run was started with {name} {old[name]}, which --resume cannot change to {value}"
                    )
        if self.classes != started.classes:
            raise UserError(f"the run was started with other classes than {self.train.lists}/classInd.txt lists")


def read_videos(folder: Path, listed: Sequence[tuple[str, int]], index: Path | None, kind: str) -> list[Video]:
    """Index the listed videos; name and count the broken ones, and go on without them."""
    if not folder.is_dir():
        raise UserError(f"--videos {folder} is not a folder; 'make-data' writes videos to try")
    videos, broken = index_videos(folder, listed, index or folder / "index.json")
    if broken:
        print(f"skipped {len(broken)} of {len(listed)} {kind} videos:", *broken, sep="\n  ", file=sys.stderr)
    if not videos:
        raise UserError(f"none of the {len(listed)} {kind} videos could be read from {folder}")
    return videos


def can_flip(wanted: bool, lists: SplitLists) -> bool:
    """Whether to mirror clips: only if a mirrored video keeps its class, by the data set's own word."""
    return wanted and not lists.flip_changes_class


def train(args: argparse.Namespace) -> None:
    """The command 'train': everything it writes goes to the folder --run."""
    device = pick_device(args.device)
    lists = read_lists(args.lists, args.fold)
    config = _config(args, lists)
    if args.resume:
        config.check_resumes(RunConfig.load(args.run))
    elif args.overwrite:
        for name in (BEST, LAST):
            (args.run / name).unlink(missing_ok=True)
    elif (args.run / LAST).exists():
        raise UserError(f"{args.run} already holds a run: add --resume or --overwrite, or name another with --run")

    videos = read_videos(args.videos, lists.train, args.index, "training")
    training, validation = split_by_group(videos, args.val_fraction, args.seed)
    frames = Frames(videos, config.clip.resize, args.memory_mb << 20)
    seed_everything(args.seed)
    trainer = Trainer(
        VideoClassifier(config.model, args.weights).to(device),
        ClipDataset(training, frames, config.clip, seed=args.seed, flip=config.train.flip),
        ClipDataset(validation, frames, config.clip),
        config.train,
        args.workers,
    )
    first, best = 1, (-math.inf, -math.inf)
    if args.resume:
        state = load_checkpoint(args.run / LAST, trainer.model, device, trainer.optimizer)
        first, best = state["epoch"] + 1, tuple(state["best"])
    config.save(args.run)
    log = MetricsLog(args.run / "metrics.jsonl")
    log.keep_before(first)
    if args.compile:
        trainer.model.compile()
    direction = ", both directions" if args.bidirectional else ""
    print(
        f"{args.rnn}{direction}, {parameter_count(trainer.model):,} parameters, on {device}; "
        f"{len(training)} training and {len(validation)} validation videos of {len(lists.classes)} classes; "
        f"flips {'on' if config.train.flip else 'off'}"
    )
    for epoch in range(first, args.epochs + 1):
        row = trainer.run_epoch(epoch)
        log.append(**row)
        print(f"epoch {epoch}/{args.epochs}", *(f"{k} {v:.4g}" for k, v in row.items() if k != "epoch"), sep="  ")
        # Equal accuracies are told apart by loss; without validation videos the latest epoch is the best.
        score = (row["val_accuracy"], -row["val_loss"]) if validation else (epoch, 0)
        if score > best:
            best = score
            save_checkpoint(args.run / BEST, trainer.model, {"epoch": epoch, "best": best})
        save_checkpoint(args.run / LAST, trainer.model, {"epoch": epoch, "best": best}, trainer.optimizer)
    pictures.learning_curve(log.rows(), args.run / "learning_curve.png")
    print(f"learning curve: {args.run / 'learning_curve.png'}")


def _config(args: argparse.Namespace, lists: SplitLists) -> RunConfig:
    if args.weights is not None and args.backbone != "vgg16":
        raise UserError("--weights is for --backbone vgg16 only")
    return RunConfig(
        ModelConfig(
            len(lists.classes), args.rnn, args.bidirectional, args.backbone, args.freeze_backbone, args.dropout
        ),
        ClipConfig(args.clip_frames, args.stride, args.resize, args.crop),
        TrainConfig(
            videos=str(args.videos),
            lists=str(args.lists),
            fold=args.fold,
            flip=can_flip(args.flip, lists),
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            weight_decay=args.weight_decay,
            val_fraction=args.val_fraction,
            seed=args.seed,
        ),
        lists.classes,
    )


class Trainer:
    """Trains a classifier of clips, an epoch at a time."""

    def __init__(
        self, model: nn.Module, training: ClipDataset, validation: ClipDataset, config: TrainConfig, workers: int
    ) -> None:
        self.model, self.training, self.validation, self.config = model, training, validation, config
        self.workers = workers
        self.device = next(model.parameters()).device
        learned = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=config.lr, weight_decay=config.weight_decay)

    def run_epoch(self, epoch: int) -> dict[str, float]:
        """Train on a random clip of each video, then validate; epochs count from 1."""
        # Every epoch draws from a seed of its own: a resumed run goes on exactly as if it had never stopped.
        seed_everything(self.config.seed, epoch)
        started = time.perf_counter()
        row = {"epoch": epoch} | self._train(epoch)
        if len(self.validation):
            row |= self._validate()
        return row | {"seconds": round(time.perf_counter() - started, 3)}

    def _train(self, epoch: int) -> dict[str, float]:
        self.model.train()
        self.training.epoch = epoch
        loader = DataLoader(self.training, self.config.batch_size, shuffle=True, num_workers=self.workers)
        # Kept on the device, so that the GPU need not wait for the CPU after each step.
        sums = torch.zeros(2, device=self.device)
        for step, (clips, labels) in enumerate(progress(loader, f"epoch {epoch}"), start=1):
            done = (epoch - 1 + step / len(loader)) / self.config.epochs
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * learning_rate_factor(done)
            clips, labels = clips.to(self.device), labels.to(self.device)
            logits = self.model(clips)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
            self.optimizer.step()
            sums += _loss_and_hits(logits.detach(), labels)
        loss, accuracy = (sums / len(self.training)).tolist()
        if not math.isfinite(loss):
            raise UserError(f"the training loss became {loss} in epoch {epoch}: lower --lr")
        return {"train_loss": loss, "train_accuracy": accuracy}

    @torch.inference_mode()
    def _validate(self) -> dict[str, float]:
        self.model.eval()
        sums = torch.zeros(2, device=self.device)
        for clips, labels in DataLoader(self.validation, self.config.batch_size, num_workers=self.workers):
            sums += _loss_and_hits(self.model(clips.to(self.device)), labels.to(self.device))
        loss, accuracy = (sums / len(self.validation)).tolist()
        return {"val_loss": loss, "val_accuracy": accuracy}


def _loss_and_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy and number of right answers of a batch, (2,)."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((loss, (logits.argmax(dim=1) == labels).sum()))
