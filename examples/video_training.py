"""Training of the video classifier: a random clip of each video an epoch."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from examples import pictures
from examples.trainer import Plan, Processes, Trainer, check_run
from examples.training import UserError, from_json, seed_everything
from examples.video_files import Video
from examples.video_model import ModelConfig, VideoClassifier
from examples.videos import ClipConfig, ClipDataset, Frames, SplitLists, index_videos, read_lists, split_by_group

__all__ = ["DATA", "VARIABLES", "RunConfig", "can_flip", "data_folders", "read_videos", "train"]

DATA = Path("data/moving_digits")
# The environment variables that stand in for options; torch-mingru's example reads them too.
VARIABLES = {"videos": "UCF101_PATH", "lists": "UCF101_ANNPATH"}


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
    augment: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction must lie in [0, 1), got {self.val_fraction}")


@dataclass(frozen=True)
class RunConfig:
    """All that makes a run what it is: the config.json beside its checkpoints."""

    model: ModelConfig
    clip: ClipConfig
    train: TrainConfig
    classes: list[str]

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "RunConfig":
        """What config.json holds."""
        model, clip = from_json(ModelConfig, saved["model"]), from_json(ClipConfig, saved["clip"])
        classes = saved["classes"]
        if not isinstance(classes, list) or len(classes) != model.classes:
            raise TypeError(f"classes must be a list of {model.classes} names, got {classes!r}")
        return cls(model, clip, from_json(TrainConfig, saved["train"]), classes)


def data_folders(args: argparse.Namespace, videos: Path, lists: Path) -> tuple[Path, Path]:
    """The folders of the videos and of the lists: as the options say, else the environment, else as given here."""
    chosen: dict[str, Path | None] = {name: getattr(args, name) for name in VARIABLES}
    open_options = [name for name, option in chosen.items() if option is None]
    set_here = [name for name in open_options if os.environ.get(VARIABLES[name])]
    for name in set_here:
        chosen[name] = Path(os.environ[VARIABLES[name]])
        if not chosen[name].is_dir():
            raise UserError(f"{VARIABLES[name]}={chosen[name]} is not a folder: correct the variable, or give --{name}")
    if set_here and len(set_here) < len(open_options):  # one data set's videos do not go with another's lists
        (other,) = set(open_options) - set(set_here)
        raise UserError(f"{VARIABLES[set_here[0]]} is set and {VARIABLES[other]} is not: set both, or give --{other}")
    return chosen["videos"] or videos, chosen["lists"] or lists


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
    args.videos, args.lists = data_folders(args, DATA / "videos", DATA / "lists")
    lists = read_lists(args.lists, args.fold)
    config = _config(args, lists)
    check_run(args, asdict(config))
    with closing(Processes(args.device, args.strategy)) as processes:
        videos = read_videos(args.videos, lists.train, args.index, "training")
        training, validation = split_by_group(videos, args.val_fraction, args.seed)
        frames = Frames(videos, config.clip.resize, args.memory_mb << 20)
        seed_everything(args.seed)
        model = VideoClassifier(config.model, args.weights).to(processes.device)
        if args.compile:
            model.compile()
        steps = math.ceil(args.epochs * len(training) / args.batch_size)
        interval = math.ceil(len(training) / args.batch_size)
        trainer = Trainer(
            args.run,
            asdict(config),
            model,
            loss_and_accuracy,
            ClipDataset(training, frames, config.clip, args.seed, config.train.flip, args.augment),
            ClipDataset(validation, frames, config.clip),
            Plan(steps, interval, args.batch_size, args.lr, args.weight_decay, args.seed),
            processes,
            workers=args.workers,
            resume=args.resume,
        )
        direction = ", both directions" if args.bidirectional else ""
        flips = "on" if config.train.flip else "off"
        augmented = ", augmented" if args.augment else ""
        processes.say(f"{args.rnn}{direction}; {len(lists.classes)} classes; flips {flips}{augmented}")
        trainer.fit()
        if processes.first:
            pictures.learning_curve(trainer.log.rows(), args.run / "learning_curve.png")
        processes.say(f"learning curve: {args.run / 'learning_curve.png'}")


def loss_and_accuracy(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Cross-entropy and whether the answer is right, (n,), of clips and their class numbers."""
    clips, labels = batch
    logits = model(clips)
    return {"loss": F.cross_entropy(logits, labels, reduction="none"), "accuracy": logits.argmax(dim=1) == labels}


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
            augment=args.augment,
        ),
        lists.classes,
    )
