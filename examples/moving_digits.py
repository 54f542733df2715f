"""Moving digits: synthetic motion of real handwritten digits, written as videos in UCF101's folder layout.

The data set is *not* UCF101. It exists so that the video programs run anywhere, offline, in minutes, through the same
reader as UCF101 itself. A video shows one of scikit-learn's 1,797 handwritten digits (8x8 pixels) on a torus. Its pose
has four cyclic coordinates, x, y, turn and zoom, which all start uniformly at random; the class says which of them
advances, and in which direction. A uniform phase stays uniform when it advances, so a frame has the same distribution
in every class: no single frame tells anything about the class, only the order of the frames does.
"""

import json
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_digits

from examples.training import UserError, progress, write_text
from examples.video_files import file_url

__all__ = ["CLASSES", "make_dataset", "poses", "render", "write_video"]

# Class -> (coordinate that advances, direction). Neighbours in a row are each other played backwards.
CLASSES = {
    "MoveRight": (0, 1), "MoveLeft": (0, -1),
    "MoveDown": (1, 1), "MoveUp": (1, -1),
    "TurnClockwise": (2, 1), "TurnCounterclockwise": (2, -1),
    "Grow": (3, 1), "Shrink": (3, -1),
}  # fmt: skip
CYCLES_PER_FRAME = (0.05, 0.10)  # at 40 pixels: 2 to 4 pixels, 18 to 36 degrees or 5 to 10 % in size a frame
SCALES = (1.5, 4.0)  # smallest and largest size of a digit's pixel in the frame, in pixels
FRAMES_PER_SECOND = 25
FOLDS = 3

DESCRIPTION = (
    "Moving digits: synthetic motion (8 classes) of scikit-learn's real handwritten digits. This is not UCF101; it "
    "only has UCF101's folder layout."
)


def poses(motion: str, frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Phases (frames, 4) in [0, 1) of x, y, turn and zoom: all start at random, the one of `motion` advances."""
    coordinate, direction = CLASSES[motion]
    phases = np.tile(rng.random(4), (frames, 1))
    phases[:, coordinate] += direction * rng.uniform(*CYCLES_PER_FRAME) * np.arange(frames)
    return phases % 1


def render(digit: NDArray[np.float64], phases: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Draw a digit (8, 8) with values 0 to 16 in the given poses (T, 4); returns gray frames (T, size, size)."""
    x, y, turn, zoom = phases.T[:, :, None, None]
    rows, columns = np.mgrid[:size, :size]
    # The offset of each pixel from the digit's centre, the short way round the torus: [-size/2, size/2).
    dx = (columns - x * size + size / 2) % size - size / 2
    dy = (rows - y * size + size / 2) % size - size / 2
    scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** zoom
    # Rows grow downwards, so a growing angle turns the picture clockwise.
    cos, sin = np.cos(2 * np.pi * turn) / scale, np.sin(2 * np.pi * turn) / scale
    centre = (np.array(digit.shape) - 1) / 2
    source = np.stack((centre[0] - sin * dx + cos * dy, centre[1] + cos * dx + sin * dy))
    frames = np.stack([map_coordinates(digit, at, order=1, mode="grid-constant") for at in source.swapaxes(0, 1)])
    return np.rint(frames * (255 / 16)).astype(np.uint8)


def write_video(path: Path, frames: NDArray[np.uint8]) -> None:
    """Write gray frames (T, H, W), H and W even, as MPEG-4 in AVI.

    Every frame is coded by itself and with the same quantiser: a frame predicted from the one before, or a rate
    control with a memory, would leave traces of the motion in single frames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    quality = {"qmin": "2", "qmax": "2", "flags": "+bitexact"}
    with av.open(file_url(path), "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", FRAMES_PER_SECOND, options=quality)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode(None))


def make_dataset(
    root: Path, *, groups: int = 25, clips: int = 5, frames: int = 36, size: int = 40, seed: int = 0
) -> dict[str, int]:
    """Write ROOT/videos/CLASS/v_CLASS_gGG_cCC.avi and ROOT/lists/ with UCF101's three folds.

    Video gGG_cCC shows the same handwritten digit in all classes, so a digit says nothing about the class; different
    groups and clips show different ones, and a fold tests on whole groups, so no digit is both trained and tested on.

    Args:
        root: folder to write to.
        groups: groups of a class, at least 3 (UCF101 has 25, of which a fold tests 7).
        clips: videos of a group and class.
        frames: length of a video, in frames.
        size: height and width of a video, in pixels; even.
        seed: seed of digits and motions.

    Returns:
        How many videos, classes and digits there are.
    """
    digits = load_digits().images
    if groups < FOLDS or clips < 1 or groups * clips > len(digits):
        raise UserError(
            f"--groups must be at least {FOLDS} and groups x clips at most {len(digits)} (one digit each), "
            f"got {groups} x {clips}"
        )
    if frames < 1 or size < 16 or size % 2:
        raise UserError(f"--frames must be positive and --size even and at least 16, got {frames} and {size}")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(digits))[: groups * clips].reshape(groups, clips)
    names = [(c, g, k) for c in CLASSES for g in range(groups) for k in range(clips)]
    for motion, group, clip in progress(names, "write videos"):
        video = render(digits[chosen[group, clip]], poses(motion, frames, rng), size)
        write_video(root / "videos" / _video_name(motion, group, clip), video)

    tested = max(1, round(groups * 7 / 25))
    classes = {name: number for number, name in enumerate(CLASSES, start=1)}
    lists = root / "lists"
    write_text(lists / "classInd.txt", "".join(f"{number} {name}\n" for name, number in classes.items()))
    for fold in range(FOLDS):
        test_groups = range(fold * tested, (fold + 1) * tested)
        train = [f"{_video_name(*n)} {classes[n[0]]}\n" for n in names if n[1] not in test_groups]
        test = [f"{_video_name(*n)}\n" for n in names if n[1] in test_groups]
        write_text(lists / f"trainlist{fold + 1:02d}.txt", "".join(train))
        write_text(lists / f"testlist{fold + 1:02d}.txt", "".join(test))
    about = {
        "description": DESCRIPTION,
        # A mirror turns MoveLeft into MoveRight and clockwise into counterclockwise.
        "flip_changes_class": True,
        "seed": seed,
        "digits": {f"g{g + 1:02d}_c{c + 1:02d}": int(chosen[g, c]) for g in range(groups) for c in range(clips)},
    }
    write_text(lists / "dataset.json", json.dumps(about, indent=1) + "\n")
    return {"videos": len(names), "classes": len(CLASSES), "digits": groups * clips}


def _video_name(motion: str, group: int, clip: int) -> str:
    return f"{motion}/v_{motion}_g{group + 1:02d}_c{clip + 1:02d}.avi"
