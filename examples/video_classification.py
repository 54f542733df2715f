"""Classify videos with recurrent convolutions on five levels of an image network, as in arXiv 1511.06432.

Reads UCF101, or any data in its layout, and trains, tests and predicts. 'make-data' writes a stand-in that needs no
download: moving digits, synthetic motion of scikit-learn's real handwritten digits (it is not UCF101). 'demo' does all
of it in a few minutes on two CPU cores. Start with:  python -m examples.video_classification demo
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples import moving_digits, pictures
from examples.trainer import add_training_options
from examples.training import (
    MetricsLog,
    UserError,
    add_run_options,
    command,
    exit_code,
    find_checkpoint,
    load_checkpoint,
    load_config,
    pick_device,
    progress,
)
from examples.video_files import Video, probe
from examples.video_model import BACKBONES, RNNS, VideoClassifier
from examples.video_training import DATA, VARIABLES, RunConfig, can_flip, data_folders, read_videos, train
from examples.videos import Frames, SplitLists, read_lists, views

RUN = Path("runs/moving_digits")
STRIP_ROWS, STRIP_FRAMES = 8, 8


def make_data(args: argparse.Namespace) -> None:
    """The command 'make-data': moving digits in UCF101's layout."""
    print(moving_digits.DESCRIPTION)
    sizes = {name: getattr(args, name) for name in ("groups", "clips", "frames", "size", "seed")}
    counts = moving_digits.make_dataset(args.out, **sizes)
    print(f"wrote {counts['videos']} videos of {counts['classes']} classes, {counts['digits']} digits, to {args.out}")


class TrainedRun:
    """A model of a run and how it judges a video: many views, each a clip with a voice.

    Args:
        args: checkpoint or run, device, clips, crops and batch_size of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        def build(saved: dict[str, Any]) -> tuple[RunConfig, VideoClassifier]:
            config = RunConfig.from_json(saved)
            return config, VideoClassifier(config.model)

        self.device = pick_device(args.device)
        checkpoint = find_checkpoint(args)
        self.folder = checkpoint.parent
        self.config, model = load_config(self.folder, "a video classifier", build)
        self.model = model.to(self.device).eval()
        load_checkpoint(checkpoint, self.model, self.device)
        self.clips, self.crops, self.batch_size = args.clips, args.crops, args.batch_size

    @torch.inference_mode()
    def probabilities(self, video: Video, frames: Frames, flip: bool) -> Tensor:
        """Class probabilities (views, classes) of one video, on the CPU."""
        seen = views(video, frames, self.config.clip, self.clips, self.crops, flip)
        batches = [self.model(batch.to(self.device)).softmax(dim=1).cpu() for batch in seen.split(self.batch_size)]
        return torch.cat(batches)


def read_test_lists(run: TrainedRun, folder: Path, fold: int | None) -> SplitLists:
    """The lists to test on, which must be of the run's classes and name no video that it was trained on."""
    trained = run.config.train
    lists = read_lists(folder, fold or trained.fold)
    if lists.classes != run.config.classes:
        raise UserError(f"{run.folder} was trained on other classes than {folder}/classInd.txt lists: name its --lists")
    if fold not in (None, trained.fold):
        seen = set(lists.test) & set(read_lists(folder, trained.fold).train)
        if seen:
            raise UserError(
                f"{run.folder} was trained on fold {trained.fold}, "
                f"and so on {len(seen)} of the {len(lists.test)} test videos of --fold {fold}"
            )
    return lists


def test(args: argparse.Namespace) -> None:
    """The command 'test': the paper's protocol, by averaged probabilities and by majority vote."""
    run = TrainedRun(args)
    classes, trained = run.config.classes, run.config.train
    video_folder, list_folder = data_folders(args, Path(trained.videos), Path(trained.lists))
    lists = read_test_lists(run, list_folder, args.fold)
    videos = read_videos(video_folder, lists.test, args.index, "test")
    frames = Frames(videos, run.config.clip.resize, args.memory_mb << 20)
    flip = can_flip(args.flip, lists)
    means, votes = [], []
    for video in progress(videos, "test"):
        probabilities = run.probabilities(video, frames, flip)
        means.append(probabilities.mean(dim=0))
        votes.append(probabilities.argmax(dim=1).bincount(minlength=len(classes)).argmax())
    mean, vote = torch.stack(means), torch.stack(votes)
    labels = torch.tensor([video.label for video in videos])
    by_average = (mean.argmax(dim=1) == labels).double().mean().item()
    by_vote = (vote == labels).double().mean().item()
    log = MetricsLog(run.folder / "metrics.jsonl")
    log.append(test_videos=len(videos), test_accuracy_average=by_average, test_accuracy_vote=by_vote)

    title = f"{len(videos)} test videos, {by_average:.1%} right (chance {1 / len(classes):.1%})"
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, (labels.numpy(), mean.argmax(dim=1).numpy()), 1)
    pictures.confusion_matrix(counts, classes, title, run.folder / "confusion.png")
    pictures.prediction_strip(strip_samples(run.config, videos, mean, frames), title, run.folder / "predictions.png")
    print(f"confusion matrix: {run.folder / 'confusion.png'}")
    print(f"frames and predictions: {run.folder / 'predictions.png'}")
    print(
        f"{args.clips} clips x {args.crops} crops{' x 2 sides' if flip else ', no flips'} of {len(videos)} videos: "
        f"test accuracy {by_average:.2%} by average, {by_vote:.2%} by majority vote"
    )


def strip_samples(
    config: RunConfig, videos: Sequence[Video], probabilities: Tensor, frames: Frames
) -> list[pictures.Sample]:
    """Videos evenly spaced through the test list, right or wrong, each with the first frames of its central clip."""
    samples = []
    for i in np.linspace(0, len(videos) - 1, min(STRIP_ROWS, len(videos)), dtype=int):
        video, (probability, label) = videos[i], probabilities[i].max(dim=0)
        start = config.clip.last_start(video.frames) // 2
        shown = frames.read(video, config.clip.indices(video.frames, start)[:STRIP_FRAMES])
        truth, predicted = config.classes[video.label], config.classes[int(label)]
        samples.append(pictures.Sample(shown, truth, predicted, probability.item()))
    return samples


def predict(args: argparse.Namespace) -> int:
    """The command 'predict': a line for each file; files that are no videos are named and make the exit code 2."""
    run = TrainedRun(args)
    failures = 0
    for file in args.files:
        try:
            video = probe(file)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failures += 1
            continue
        frames = Frames([video], run.config.clip.resize, memory_bytes=0)
        mean = run.probabilities(video, frames, run.config.train.flip).mean(dim=0)
        top = mean.argsort(descending=True)[: args.top].tolist()
        print(f"{file}: {', '.join(f'{run.config.classes[k]} {mean[k]:.1%}' for k in top)}")
    return 2 if failures else 0


def demo(args: argparse.Namespace) -> None:
    """The command 'demo': runs the others with their defaults, and shows each as the user could type it."""
    started = time.perf_counter()
    data = ["--videos", f"{args.data}/videos", "--lists", f"{args.data}/lists"]
    common = ["--run", str(args.run), "--device", args.device]
    seed = ["--seed", str(args.seed)]
    # The data are named to test too, or the environment could name others.
    commands = [["train", *data, *common, *seed, "--overwrite"], ["test", *data, *common]]
    if not (args.data / "lists" / "dataset.json").exists():
        commands.insert(0, ["make-data", "--out", str(args.data), *seed])
    for words in commands:
        print(f"$ python -m examples.video_classification {shlex.join(words)}", flush=True)
        run(words)
    print(f"the whole demo took {time.perf_counter() - started:.0f} s; {moving_digits.DESCRIPTION}")
    rows = MetricsLog(args.run / "metrics.jsonl").rows()
    print(f"test accuracy: {rows[-1]['test_accuracy_average']:.2%}")
    for name in ("learning_curve", "confusion", "predictions"):
        print(args.run / f"{name}.png")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(prog="python -m examples.video_classification", description=__doc__)
    commands = main.add_subparsers(required=True, metavar="COMMAND")

    def number(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    def memory(add: Any) -> None:
        add("--memory-mb", type=int, default=2048, help="keep decoded videos in memory if they fit in this many MiB")

    def judging(add: Any) -> None:
        add("--batch-size", type=number, default=25, help="clips at a time")
        memory(add)

    def reading(add: Any, videos: Path | str, lists: Path | str) -> None:
        for name, folder, otherwise in (
            ("videos", "folder of the class folders, such as UCF-101", videos),
            ("lists", "folder of the split files, such as ucfTrainTestlist", lists),
        ):
            told = f"{folder}; None: ${VARIABLES[name]}, or, where that is not set, {otherwise}"
            add(f"--{name}", type=Path, help=told)
        add("--index", type=Path, help="cache of the videos' lengths; None: index.json in the folder of the videos")
        add("--no-flip", dest="flip", action="store_false", help="no mirrored clips (moving digits: never any)")

    def voting(add: Any) -> None:
        add("--clips", type=number, default=25, help="evenly spaced clips of a video that vote")
        add("--crops", type=int, choices=(1, 5), default=5, help="crops of a clip: the centre, or the corners too")

    add = command(commands, "make-data", make_data, f"Write moving digits. {moving_digits.DESCRIPTION}").add_argument
    add("--out", type=Path, default=DATA, help="folder to write videos/ and lists/ to")
    add("--groups", type=number, default=25, help="groups of a class; a fold tests 7 of 25")
    add("--clips", type=number, default=5, help="videos of a group, each with a handwritten digit of its own")
    add("--frames", type=number, default=36, help="frames of a video")
    add("--size", type=number, default=40, help="height and width, in pixels")
    add("--seed", type=int, default=0, help="of digits and motions")

    add = command(commands, "train", train, "Train on the training list of a fold.").add_argument
    add_training_options(add, RUN, batch_size=16, lr=6e-3, weight_decay=0.01)
    memory(add)
    reading(add, DATA / "videos", DATA / "lists")
    add("-f", "--fold", type=number, default=1, help="1, 2 or 3")
    add("--rnn", choices=RNNS, default="gru_rcn", help="recurrent layer of each level")
    add("--bidirectional", action="store_true", help="read clips backwards too")
    add("--backbone", choices=BACKBONES, default="small", help="image network; vgg16 needs torchvision")
    add("--weights", type=Path, help="state_dict of torchvision's VGG-16; None: random weights")
    add("--freeze-backbone", action="store_true", help="train the recurrent heads only")
    add("--dropout", type=float, default=0.0, help="before each level's classifier (the paper: 0.7)")
    add("--clip-frames", type=number, default=10, help="frames of a clip")
    add("--stride", type=number, default=1, help="take every n-th frame")
    add("--resize", type=number, default=40, help="shorter side of the frames, in pixels")
    add("--crop", type=number, default=32, help="side of the square that the model sees, in pixels")
    add("--augment", action="store_true", help="random size, shape and colours of the crops too")
    add("--epochs", type=number, default=20, help="passes over the videos, a random clip of each")
    add("--val-fraction", type=float, default=0.1, help="share of the groups of each class to validate on")

    tested = command(commands, "test", test, "Test on the test list of a fold, as the paper does.")
    add_run_options(tested, RUN)
    add = tested.add_argument
    judging(add)
    reading(add, "those of the run", "those of the run")
    add("-f", "--fold", type=number, help="1, 2 or 3; None: that of the run")
    voting(add)

    predicted = command(commands, "predict", predict, "Print the likeliest classes of video files.")
    predicted.add_argument("files", type=Path, nargs="+", metavar="FILE", help="any video that FFmpeg reads")
    add_run_options(predicted, RUN, positional=False)
    add = predicted.add_argument
    judging(add)
    voting(add)
    add("--top", type=number, default=3, help="classes to print")

    about = "Make the data if missing, train, test, and show the paths of the pictures."
    add = command(commands, "demo", demo, about).add_argument
    add("--data", type=Path, default=DATA, help="folder of the moving digits")
    add("--run", type=Path, default=RUN, help="folder of the run, replaced")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--seed", type=int, default=0, help="of data and training")
    return main


def run(arguments: Sequence[str] | None = None) -> int | None:
    """Do what the command line says; mistakes of the user are raised as UserError."""
    args = parser().parse_args(arguments)
    return args.function(args)


if __name__ == "__main__":
    sys.exit(exit_code(run))
