"""Selective copying: of a long sequence of noise, remember the few tokens that matter, in order, and say them at the end.

The task of Gu and Dao 2023, arXiv 2312.00752. A sequence holds `--memorize` content tokens at random places among
noise; as many markers follow it, and at each the next content token is to be named. A linear recurrence whose gates do
not see the input cannot do it: it cannot tell noise from content. Train with:  python -m examples.selective_copying
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convrnn
from examples import pictures
from examples.trainer import Plan, Processes, Trainer, add_training_options, check_run
from examples.training import UserError, exit_code, seed_everything

RUN = Path("runs/selective_copying")
NOISE, MARKER, FIRST_CONTENT = 0, 1, 2


@dataclass(frozen=True)
class TaskConfig:
    """`length` tokens, `memorize` of which are content; a vocabulary of noise, marker and content tokens."""

    length: int
    memorize: int
    vocabulary: int

    def __post_init__(self) -> None:
        if not 1 <= self.memorize <= self.length or self.vocabulary <= FIRST_CONTENT:
            raise UserError(
                f"the task needs 1 <= --memorize <= --length and --vocabulary > {FIRST_CONTENT}, got {asdict(self)}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Stacked minGRU: features of a layer, number of layers."""

    features: int
    layers: int


class Sequences:
    """Tokens (length + memorize,) and the content (memorize,) to name; sample i of an epoch is always the same."""

    def __init__(self, config: TaskConfig, count: int, seed: int) -> None:
        self.config, self.count, self.seed = config, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        config, rng = self.config, np.random.default_rng((self.seed, *key))
        content = rng.integers(FIRST_CONTENT, config.vocabulary, config.memorize)
        places = np.sort(rng.choice(config.length, config.memorize, replace=False))
        tokens = np.full(config.length + config.memorize, NOISE)
        tokens[places] = content
        tokens[config.length :] = MARKER
        return torch.from_numpy(tokens), torch.from_numpy(content)


class Copier(nn.Module):
    """Token logits (B, memorize, vocabulary) at the markers of tokens (B, length + memorize)."""

    def __init__(self, task: TaskConfig, config: ModelConfig) -> None:
        super().__init__()
        self.memorize = task.memorize
        self.embed = nn.Embedding(task.vocabulary, config.features)
        sizes = [config.features] * config.layers
        self.rnn = convrnn.MinGRU(config.features, sizes, norm=True, residual=True)
        self.name = nn.Sequential(nn.LayerNorm(config.features), nn.Linear(config.features, task.vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.rnn(self.embed(tokens))
        return self.name(out[:, -self.memorize :])


def loss_and_accuracy(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Cross-entropy, share of tokens named rightly and whether all are, (n,)."""
    tokens, content = batch
    logits = model(tokens)
    right = logits.argmax(dim=2) == content
    loss = F.cross_entropy(logits.transpose(1, 2), content, reduction="none").mean(dim=1)
    return {"loss": loss, "accuracy": right.double().mean(dim=1), "sequences_right": right.all(dim=1)}


def train(args: argparse.Namespace) -> None:
    """Train, validate, and draw the curve."""
    task = TaskConfig(args.length, args.memorize, args.vocabulary)
    model_config = ModelConfig(args.features, args.layers)
    plan = Plan(args.steps, args.interval, args.batch_size, args.lr, args.weight_decay, args.seed)
    config = {"task": asdict(task), "model": asdict(model_config), "train": asdict(plan)}
    check_run(args, config, may_change=("steps",))
    with closing(Processes(args.device, args.strategy)) as processes:
        seed_everything(args.seed)
        model = Copier(task, model_config).to(processes.device)
        if args.compile:
            model.compile()
        trainer = Trainer(
            args.run,
            config,
            model,
            loss_and_accuracy,
            Sequences(task, 1_000_000, args.seed),
            Sequences(task, args.val_samples, args.seed + 1),
            plan,
            processes,
            workers=args.workers,
            resume=args.resume,
        )
        trainer.fit()
        if processes.first:
            rows = trainer.log.rows()
            pictures.learning_curve(rows, args.run / "learning_curve.png", x="step")
            print(f"learning curve: {args.run / 'learning_curve.png'}")
            print(f"validation accuracy: {rows[-1]['val_accuracy']:.2%}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="python -m examples.selective_copying",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = main.add_argument
    add("--length", type=int, default=64, help="tokens of a sequence before the markers (the paper: 4096)")
    add("--memorize", type=int, default=4, help="content tokens among them (the paper: 16)")
    add("--vocabulary", type=int, default=6, help="noise, marker, and the rest content (the paper: 16)")
    add("--features", type=int, default=64, help="of a layer")
    add("--layers", type=int, default=3, help="of minGRU")
    add("--steps", type=int, default=1000, help="training steps, each on new sequences")
    add("--interval", type=int, default=100, help="steps between validations and checkpoints")
    add("--val-samples", type=int, default=1024, help="sequences to validate on")
    add_training_options(add, RUN, batch_size=64, lr=3e-3, weight_decay=0.01)
    return main


def run(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says; mistakes of the user are raised as UserError."""
    train(parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(exit_code(run))
