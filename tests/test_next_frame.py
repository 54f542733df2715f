"""Next-frame prediction: it learns to beat copying on a file, and its live stream is what it computes at once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("av", "matplotlib", "PIL", "safetensors", "skimage", "sklearn", "tqdm"):
    pytest.importorskip(_name)

from PIL import Image

from examples import next_frame
from examples.moving_digits import write_video
from examples.next_frame import RNNS, Clips, DataConfig, ModelConfig, Predictor, quality, read_parts, stream
from examples.training import exit_code

from .odd_videos import four_quadrants, write_phone_video

pytestmark = pytest.mark.compiled
SMALL = ["--short-side", 32, "--crop", 16, "--frames", 4, "--channels", 8, "--layers", 1, "--batch-size", 4]


def command(*words) -> int:
    return exit_code(lambda: next_frame.run([str(word) for word in words]))


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """Smooth waves that move two pixels a frame to the right."""
    x = np.arange(48)[None, None, :] - 2 * np.arange(60)[:, None, None]
    frames = 127 + 100 * np.sin(2 * np.pi * x / 16) * np.ones((1, 32, 1))
    path = tmp_path_factory.mktemp("video") / "waves.avi"
    write_video(path, frames.astype(np.uint8))
    return path


@pytest.mark.parametrize("rnn", RNNS)
def test_it_beats_copying_the_last_frame(video, tmp_path, rnn, capsys):
    options = ["train", "--video", video, "--rnn", rnn, "--run", tmp_path, "--device", "cpu", *SMALL]
    assert command(*options, "--steps", 60, "--interval", 30, "--lr", 0.01) == 0
    assert command("test", tmp_path / "best.safetensors", "--device", "cpu") == 0
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["test_psnr"] > row["copy_psnr"] + 3 and row["test_ssim"] > row["copy_ssim"]
    assert "live stream" in capsys.readouterr().out
    with Image.open(tmp_path / "predictions.gif") as animation:
        assert animation.size == (48, 3 * 32 + 2 * 2) and animation.n_frames == 60 - 48 - 1
    assert (tmp_path / "predictions.png").stat().st_size > 5000


@pytest.mark.parametrize("rnn", RNNS)
def test_the_stream_equals_all_frames_at_once(rnn):
    model = Predictor(ModelConfig(rnn, 8, 2)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    frames = torch.rand(2, 9, 3, 16, 24, dtype=torch.float64)
    expected, _ = model(frames)
    assert not torch.allclose(expected, frames)
    torch.testing.assert_close(stream(model, frames)[0], expected.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rnn", RNNS)
def test_frames_as_decoders_give_them(rnn):
    """Views of (B, T, H, W, 3), which want no gradient: the same gradients of the weights as of contiguous frames."""
    model = Predictor(ModelConfig(rnn, 8, 2)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    frames = torch.rand(2, 5, 16, 24, 3, dtype=torch.float64).movedim(-1, 2)
    wanted = []
    for x in (frames, frames.contiguous()):
        predicted, _ = model(x)
        wanted.append([predicted, *torch.autograd.grad(predicted.square().mean(), list(model.parameters()))])
    torch.testing.assert_close(*wanted, rtol=1e-9, atol=1e-12)


def test_untrained_it_copies_the_last_frame():
    frames = torch.rand(1, 3, 3, 8, 8)
    assert torch.equal(Predictor(ModelConfig("gru_rcn", 4, 1))(frames)[0], frames)


def test_a_phone_video_is_turned_as_players_show_it(tmp_path):
    write_phone_video(tmp_path / "phone.mp4", (0, 1, -1, 0), four_quadrants(48, 64), frames=30)
    training, *_ = read_parts(DataConfig(str(tmp_path / "phone.mp4"), short_side=32, frames=2, crop=16))
    assert training.shape[1:] == (3, 42, 32)
    assert abs(training[0, 0, 4:16, 4:12].float().mean() - 60) < 3  # was at the bottom, left


def test_clips_stay_inside_the_part():
    part = torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 18, 30)
    config = DataConfig("", short_side=18, frames=4, crop=16)
    fixed = [Clips(part, config, 3)[0, i][0] for i in range(3)]
    assert [clip[0, 0, 0, 0].item() for clip in fixed] == [0, 7, 15] and fixed[0].shape == (5, 3, 16, 16)
    drawn = {int(Clips(part, config, 3, seed=0)[epoch, 0][0][0, 0, 0, 0]) for epoch in range(300)}
    assert drawn == set(range(16))


def test_quality_of_an_exact_prediction():
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    assert quality(frames, frames) == (pytest.approx(10 * np.log10(12 * 255**2)), 1.0)
    psnr, ssim = quality(frames ^ 8, frames)  # an error of 8 everywhere
    assert psnr == pytest.approx(20 * np.log10(255 / 8)) and ssim < 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--video", "nowhere.mp4"], "nowhere.mp4 is not a readable video"),
        (["--crop", "15"], "an even --crop"),
        (["--frames", "30"], "too few for samples of 30"),
    ],
)
def test_mistakes_are_one_sentence(video, tmp_path, capsys, words, message):
    assert command("train", "--video", video, "--run", tmp_path / "run", "--device", "cpu", *SMALL, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
