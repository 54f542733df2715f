"""The video example: its data reveal nothing in a single frame, its reader is exact, its runs resume bit for bit."""

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("av", "matplotlib", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(_name)

import av
from safetensors.torch import load_file

from examples import trainer, video_classification, videos
from examples.moving_digits import CLASSES, make_dataset, write_video
from examples.training import UserError, exit_code
from examples.video_files import Video
from examples.video_model import ModelConfig, VideoClassifier
from examples.video_training import VARIABLES
from examples.videos import ClipConfig, ClipDataset, Frames

pytestmark = pytest.mark.compiled
CLIP = ClipConfig(frames=4, resize=32, crop=32)


@pytest.fixture(autouse=True)
def unset_variables(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    make_dataset(root, groups=4, clips=1, frames=8, size=32)
    return root


def command(*words) -> int:
    return exit_code(lambda: video_classification.run([str(word) for word in words]))


def train_arguments(data: Path, run: Path) -> list:
    paths = ["--videos", data / "videos", "--lists", data / "lists", "--run", run, "--device", "cpu"]
    return [
        "train",
        *paths,
        *["--epochs", "2", "--batch-size", "8", "--clip-frames", "4", "--resize", "32", "--val-fraction", "0.3"],
    ]


def test_make_dataset_is_deterministic_and_keeps_digits_apart(data, tmp_path):
    make_dataset(tmp_path / "same", groups=4, clips=1, frames=8, size=32)
    make_dataset(tmp_path / "other", groups=4, clips=1, frames=8, size=32, seed=1)
    files = sorted(path.relative_to(data) for path in data.rglob("*") if path.suffix in (".avi", ".txt"))
    assert len(files) == 4 * len(CLASSES) + 7
    assert all((data / file).read_bytes() == (tmp_path / "same" / file).read_bytes() for file in files)
    assert any((data / file).read_bytes() != (tmp_path / "other" / file).read_bytes() for file in files)
    digits = json.loads((data / "lists" / "dataset.json").read_text())["digits"]
    assert len(set(digits.values())) == len(digits)
    for fold in (1, 2, 3):
        lists = videos.read_lists(data / "lists", fold)
        train, test = ({digits[name[-11:-4]] for name, _ in part} for part in (lists.train, lists.test))
        assert train and test and not train & test


def test_read_frames_are_exact_and_coded_alone(tmp_path):
    path = tmp_path / "ramp.avi"
    write_video(path, np.stack([np.full((32, 48), 20 * t, np.uint8) for t in range(12)]))
    with av.open(str(path)) as container:
        assert {frame.pict_type for frame in container.decode(video=0)} == {av.video.frame.PictureType.I}
    frames = videos.read_frames(path, [7, 0, 7, 11], short_side=16)
    assert frames.shape == (4, 16, 24, 3)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), [140, 0, 140, 220], atol=3)
    with pytest.raises(UserError, match="no frame 12"):
        videos.read_frames(path, [12], short_side=16)


def test_split_keeps_groups_together():
    names = [(k, f"v_X_g{g:02d}_c{c:02d}.avi") for k in range(3) for g in range(9) for c in range(4)]
    everything = [Video(Path(name), label, 9, 32, 32) for label, name in names]
    train, validation = videos.split_by_group(everything, 0.2, seed=0)
    groups = [{(video.label, video.path.name[:7]) for video in part} for part in (train, validation)]
    assert len(train) + len(validation) == len(everything) and not groups[0] & groups[1]
    assert {video.label for video in validation} == {0, 1, 2} and len(validation) == 3 * 2 * 4


def test_clips_and_views(data):
    video = videos.probe(next((data / "videos").rglob("*.avi")), label=3)
    frames = Frames([video], CLIP.resize, memory_bytes=0)
    kept = Frames([video], CLIP.resize, memory_bytes=1 << 20)
    np.testing.assert_array_equal(frames.read(video, [5, 1]), kept.read(video, [5, 1]))
    clip, label = ClipDataset([video], frames, CLIP)[0, 0]
    assert clip.shape == (4, 3, 32, 32) and label == 3
    random = ClipDataset([video], kept, CLIP, seed=0)
    seen = []
    for epoch in range(10):
        torch.testing.assert_close(random[epoch, 0], random[epoch, 0])
        seen.append(random[epoch, 0][0])
    assert any(not torch.equal(seen[0], other) for other in seen)
    augmented = ClipDataset([video], kept, CLIP, seed=0, augmented=True)
    torch.testing.assert_close(augmented[0, 0], augmented[0, 0])
    assert augmented[0, 0][0].shape == clip.shape and not torch.equal(augmented[0, 0][0], random[0, 0][0])
    assert torch.equal(ClipDataset([video], frames, CLIP, augmented=True)[0, 0][0], clip)  # to measure on: none
    votes = videos.views(video, kept, CLIP, clips=3, crops=5, flip=True)
    assert votes.shape == (30, 4, 3, 32, 32)
    torch.testing.assert_close(votes[15:], votes[:15].flip(-1))
    assert CLIP.indices(video_frames=2, start=0) == [0, 1, 1, 1]


@pytest.mark.parametrize("rnn", ["gru_rcn", "min_conv2d_gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_model_learns_with_all_its_parameters(rnn, bidirectional):
    model = VideoClassifier(ModelConfig(5, rnn, bidirectional))
    logits = model(torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8))
    assert logits.shape == (2, 5)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rnn", ["gru_rcn", "min_conv2d_gru"])
def test_clips_as_decoders_give_them(rnn):
    """Views of (B, T, H, W, 3), which want no gradient: the same gradients of the weights as of contiguous clips."""
    model = VideoClassifier(ModelConfig(3, rnn, bidirectional=True)).double()
    clips = torch.randint(0, 256, (2, 3, 40, 32, 3), dtype=torch.uint8).movedim(-1, 2)
    wanted = []
    for x in (clips, clips.contiguous(), clips.double(), clips.contiguous().double()):
        logits = model(x)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]))
        wanted.append([logits, *torch.autograd.grad(loss, list(model.parameters()))])
    for found in wanted[:-1]:
        torch.testing.assert_close(found, wanted[-1], rtol=1e-8, atol=1e-10)


def test_vgg16_without_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(UserError, match="install the torchvision"):
        VideoClassifier(ModelConfig(5, backbone="vgg16"))


def test_an_interrupted_run_resumes_bit_for_bit(data, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(*train_arguments(data, whole)) == 0
    train_step = trainer.Trainer._train_step

    def stop(self, batch):
        train_step(self, batch)
        if self.step == 3:  # the epochs have two steps
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", stop)
        assert command(*train_arguments(data, broken)) == 128 + signal.SIGTERM
    assert "stopped after step 3" in capsys.readouterr().err
    assert command(*train_arguments(data, broken)) == 2
    assert command(*train_arguments(data, broken), "--resume", "--lr", 0.1) == 2
    assert command(*train_arguments(data, broken), "--resume") == 0
    expected, actual = (load_file(run / "last.safetensors") for run in (whole, broken))
    assert all(torch.equal(expected[name], actual[name]) for name in expected.keys() | actual.keys())
    rows = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    capsys.readouterr()

    assert command("test", "--run", whole, "--clips", 2, "--device", "cpu") == 0
    assert "no flips" in capsys.readouterr().out
    pictures = ("learning_curve.png", "confusion.png", "predictions.png")
    assert all((whole / name).stat().st_size > 5000 for name in pictures)
    video = next((data / "videos").rglob("*.avi"))
    assert command("predict", "--run", whole, "--top", 2, "--device", "cpu", video, data / "lists/classInd.txt") == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{video}: ") and out.count("%") == 2
    assert "classInd.txt is not a readable video" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--videos", "nowhere", "--lists", "{lists}"], "--videos nowhere is not a folder"),
        (["train", "--lists", "nowhere"], "classInd.txt"),
        (["train", "--lists", "{lists}", "--crop", "16"], "crop >= 32"),
        (["train", "--lists", "{lists}", "--device", "tricorder"], "--device tricorder"),
        (["test", "--run", "nowhere"], "there is no checkpoint nowhere"),
        (["make-data", "--out", "x", "--groups", "2000"], "at most 1797"),
    ],
)
def test_mistakes_are_one_sentence(data, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert command(*(word.format(lists=data / "lists") for word in words)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
