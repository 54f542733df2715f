"""Videos from phones, cameras and browsers: read as players show them, or named, counted and skipped."""

import os
from pathlib import Path

import numpy as np
import pytest

for _name in ("av", "matplotlib", "PIL", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(_name)

import av

from examples import pictures, video_classification, videos
from examples.moving_digits import write_video
from examples.training import UserError, exit_code
from examples.videos import ClipConfig, ClipDataset, Frames, index_videos, views

from .odd_videos import four_quadrants, write_motion_jpeg, write_phone_video

pytestmark = pytest.mark.compiled

# Display matrices, and the grey levels top left, top right, bottom left, bottom right that the ffmpeg program shows.
SHOWN = {
    (1, 0, 0, 1): (200, 120, 60, 0),
    (0, 1, -1, 0): (60, 200, 0, 120),  # a quarter turn clockwise, as of a phone held upright
    (-1, 0, 0, -1): (0, 60, 120, 200),
    (0, -1, 1, 0): (120, 0, 200, 60),
    (-1, 0, 0, 1): (120, 200, 0, 60),  # mirrored, as of a phone's front camera
    (1, 0, 0, -1): (60, 0, 200, 120),
    (0, 1, 1, 0): (200, 60, 120, 0),
    (0, -1, -1, 0): (0, 120, 60, 200),
    (0, 2, -0.5, 0): (60, 200, 0, 120),  # scale is not looked at
    (0.01, 1, -1, 0.01): (60, 200, 0, 120),  # rounded by some editor
    (0, 0, 0, 0): (200, 120, 60, 0),  # nothing to show a picture by
}


def quadrants(picture: np.ndarray) -> list[int]:
    """Mean grey levels of a picture's quarters, away from their edges."""
    h, w = picture.shape[0] // 2, picture.shape[1] // 2
    return [int(picture[y + 3 : y + h - 3, x + 3 : x + w - 3].mean().round()) for y in (0, h) for x in (0, w)]


@pytest.mark.parametrize(("matrix", "levels"), SHOWN.items(), ids=str)
def test_frames_are_turned_as_players_show_them(tmp_path, matrix, levels):
    path = tmp_path / "phone.mp4"
    write_phone_video(path, matrix, four_quadrants())
    size = (64, 48) if abs(matrix[1]) > abs(matrix[0]) else (48, 64)
    (video,), broken = index_videos(tmp_path, [("phone.mp4", 0)], tmp_path / "index.json")
    assert (video.frames, video.height, video.width, broken) == (3, *size, [])
    assert videos.probe(path, label=0) == video
    on_demand = Frames([video], 36, memory_bytes=0)
    kept = Frames([video], 36, memory_bytes=3 * 3 * 36 * 48)
    assert len(kept._kept) == 1
    for frames in (on_demand.read(video, [2, 0]), kept.read(video, [2, 0])):
        assert frames.shape == (2, *(side * 3 // 4 for side in size), 3)
        np.testing.assert_allclose(quadrants(frames[0]), levels, atol=3)
    clip = ClipConfig(frames=2, resize=36, crop=36)
    seen = [ClipDataset([video], on_demand, clip)[0, 0][0], views(video, kept, clip, clips=1, crops=1, flip=False)[0]]
    for frames in seen:
        np.testing.assert_allclose(quadrants(frames[0].permute(1, 2, 0).numpy()), levels, atol=3)


@pytest.mark.parametrize("matrix", [(0.88, 0.48, -0.48, 0.88), (1, 1, 0, 1), (1, 0.1, -0.1, 1)])
def test_a_video_shown_askew_is_named(tmp_path, matrix):
    write_phone_video(tmp_path / "askew.mp4", matrix, four_quadrants())
    found, (said,) = index_videos(tmp_path, [("askew.mp4", 0)], tmp_path / "index.json")
    assert found == [] and "askew.mp4 has the display matrix" in said and "no turn by a multiple of 90 degrees" in said


@pytest.mark.parametrize(
    ("orientation", "matrix"), [(1, (1, 0, 0, 1)), (3, (-1, 0, 0, -1)), (6, (0, 1, -1, 0)), (8, (0, -1, 1, 0))]
)
def test_orientation_in_exif(tmp_path, orientation, matrix):
    """Motion JPEG of a camera: PyAV knows nothing of EXIF and refuses the frame's side data for it."""
    path = tmp_path / "camera.avi"
    write_motion_jpeg(path, [four_quadrants()] * 2, orientation)
    frames = videos.read_frames(path, [0, 1], short_side=48)
    assert videos.probe(path).height == frames.shape[1] == (48 if matrix[0] else 64)
    np.testing.assert_allclose(quadrants(frames[1]), SHOWN[matrix], atol=3)


def test_frames_that_change_size_are_scaled_to_the_first(tmp_path):
    """As browsers record calls: lower resolution for a while, and a phone that is turned."""
    sizes = [(48, 64)] * 2 + [(24, 32)] * 2 + [(64, 48)] * 2
    write_motion_jpeg(tmp_path / "call.avi", [four_quadrants(*size) for size in sizes])
    (video,), broken = index_videos(tmp_path, [("call.avi", 0)], tmp_path / "index.json")
    assert (video.frames, video.height, video.width, broken) == (6, 48, 64, [])
    for memory in (0, 1 << 20):
        frames = Frames([video], 36, memory).read(video, [5, 3, 0])
        assert frames.shape == (3, 36, 48, 3)
        for frame in frames:
            np.testing.assert_allclose(quadrants(frame), SHOWN[1, 0, 0, 1], atol=4)
    assert videos.read_frames(video.path, [4], 36).shape == (1, 36, 48, 3)  # also where the first is not asked for


def test_titles_in_any_encoding(tmp_path):
    """HMDB51's files hold such titles; PyAV decodes the metadata of file and stream when it opens them."""
    for name in ("a.avi", "a.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            container.metadata["title"] = stream.metadata["title"] = "ABCDEFGH"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(four_quadrants(), format="rgb24")))
            container.mux(stream.encode(None))
        data = (tmp_path / name).read_bytes()
        assert b"ABCDEFGH" in data
        (tmp_path / name).write_bytes(data.replace(b"ABCDEFGH", b"caf\xe9 \xff\x80\x81"))
    names = [("a.avi", 0), ("a.mkv", 1)]
    found, broken = index_videos(tmp_path, names, tmp_path / "index.json")
    assert [video.frames for video in found] == [1, 1] and broken == []
    assert videos.read_frames(found[0].path, [0], 48).shape == (1, 48, 64, 3)


@pytest.mark.parametrize(
    "name",
    ["a b.avi", "12:30.avi", "http:x.avi", "é ü.avi", "X.AVI", "y.Mp4", "100%d.avi", os.fsdecode(b"caf\xe9.avi")],
)
def test_names_of_files(tmp_path, monkeypatch, name):
    """Also relative to the working folder, where FFmpeg takes what stands before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    write_video(Path(name), np.zeros((3, 32, 48), np.uint8))
    assert (tmp_path / name).is_file()
    assert videos.probe(Path(name)).frames == 3
    assert videos.read_frames(Path(name), [2], 32).shape == (1, 32, 48, 3)


def test_what_is_no_video_is_named_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http:x.avi", "a b.avi"):
        with pytest.raises(UserError, match=f"^{name} is not a readable video: No such file"):
            videos.probe(Path(name))


def test_training_test_pictures_and_prediction_see_them_turned(tmp_path, monkeypatch, capsys):
    upright = four_quadrants(48, 64)
    for name, matrix in (
        ("A/v_g01_c01.MP4", (0, 1, -1, 0)),
        ("A/v_g02_c01.mp4", (1, 0, 0, 1)),
        ("A/askew.mp4", (1, 1, 0, 1)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_phone_video(tmp_path / name, matrix, upright)
    write_motion_jpeg(tmp_path / "A/12:30 caf\u00e9.avi", [upright, four_quadrants(24, 40)])
    names = sorted(f"A/{path.name}" for path in (tmp_path / "A").iterdir())
    for name, text in {
        "classInd.txt": "1 A\n",
        "trainlist01.txt": "".join(f"{name} 1\r\n" for name in names),
        "testlist01.txt": "\n".join(names),
    }.items():
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    strips = []
    monkeypatch.setattr(pictures, "prediction_strip", lambda samples, *_: strips.extend(samples))

    def command(*words):
        code = exit_code(lambda: video_classification.run([str(word) for word in (*words, "--device", "cpu")]))
        return code, capsys.readouterr()

    run = ["--run", tmp_path / "run"]
    folders = ["--videos", tmp_path, "--lists", tmp_path]
    tiny = ["--epochs", 1, "--batch-size", 3, "--clip-frames", 2, "--resize", 36]
    tiny += ["--val-fraction", 0.3, "--memory-mb", 0]
    code, said = command("train", *folders, *run, *tiny)
    assert code == 0 and "2 training and 1 validation samples" in said.out
    assert "skipped 1 of 4 training videos:" in said.err and "askew.mp4 has the display matrix" in said.err
    code, said = command("test", *folders, *run, "--clips", 1, "--crops", 1)
    assert code == 0 and "skipped 1 of 4 test videos:" in said.err
    assert [sample.frames.shape[1:3] for sample in strips] == [(36, 48), (48, 36), (36, 48)]
    np.testing.assert_allclose(quadrants(strips[1].frames[0]), SHOWN[0, 1, -1, 0], atol=3)

    seen = []
    read = video_classification.views
    monkeypatch.setattr(video_classification, "views", lambda *words: seen.append(read(*words)) or seen[-1])
    code, said = command("predict", *run, "--clips", 1, "--crops", 1, *(tmp_path / name for name in names[::2]))
    assert code == 0 and said.out == "".join(f"{tmp_path / name}: A 100.0%\n" for name in names[::2])
    assert names[2].endswith(".MP4")
    left, right = seen[1][0, 0, 0, 3:13, 3:10], seen[1][0, 0, 0, 3:13, -10:-3]
    assert abs(left.float().mean() - 60) < 3 and abs(right.float().mean() - 200) < 3
