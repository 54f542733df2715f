"""Videos in UCF101's layout: split lists, a cached index of the files, clips and crops.

The layout: VIDEOS/CLASS/NAME.avi, and a folder of lists with classInd.txt ('1 Class'), trainlist0N.txt
('Class/name.avi 1') and testlist0N.txt ('Class/name.avi') for each fold N. Names may hold blanks.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from examples.augmentation import augment
from examples.training import UserError, progress, read_json, read_text, write_text
from examples.video_files import Video, probe, read_frames, scaled

__all__ = [
    "ClipConfig",
    "ClipDataset",
    "Frames",
    "SplitLists",
    "index_videos",
    "read_lists",
    "split_by_group",
    "views",
]


@dataclass(frozen=True)
class ClipConfig:
    """A clip: `frames` frames, every `stride`-th, shorter side scaled to `resize`, of which `crop` x `crop` is seen."""

    frames: int = 10
    stride: int = 1
    resize: int = 40
    crop: int = 32

    def __post_init__(self) -> None:
        if min(self.frames, self.stride) < 1 or self.crop < 32 or self.resize < self.crop:
            raise UserError(f"a clip needs frames and stride >= 1 and resize >= crop >= 32, got {asdict(self)}")

    def indices(self, video_frames: int, start: int) -> list[int]:
        """Frame indices of the clip at `start`; a video that is too short holds its last frame."""
        return [min(start + self.stride * t, video_frames - 1) for t in range(self.frames)]

    def last_start(self, video_frames: int) -> int:
        """The latest start at which a clip still fits in the video."""
        return max(0, video_frames - 1 - self.stride * (self.frames - 1))


@dataclass(frozen=True)
class SplitLists:
    """Class names, and (file name, class number from 0) of the training and test videos of one fold."""

    classes: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]
    flip_changes_class: bool


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a list that are not blank, as ('FILE, line N', line)."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        # Lists that were put together from several files hold a byte order mark of each.
        if line := line.removeprefix("\ufeff").strip():
            yield f"{path}, line {number}", line


def _read_classes(path: Path) -> dict[str, int]:
    """Class names and their numbers from 0."""
    numbers: dict[str, int] = {}
    for where, line in _lines(path):
        words = line.split(maxsplit=1)
        if len(words) != 2 or words[0] != str(len(numbers) + 1):
            raise UserError(f"{where}: expected '{len(numbers) + 1} CLASS', got {line!r}")
        if words[1] in numbers:
            raise UserError(f"{where}: class {words[1]!r} has number {numbers[words[1]] + 1} already")
        numbers[words[1]] = len(numbers)
    return numbers


def _read_videos(path: Path, numbers: dict[str, int], numbered: bool) -> list[tuple[str, int]]:
    """File names and class numbers from 0; with `numbered` each line ends in the class's number, else none does."""
    found = []
    for where, line in _lines(path):
        class_name = line.partition("/")[0]
        if class_name not in numbers:
            raise UserError(f"{where}: class {class_name!r} is not in classInd.txt")
        name, *number = line.rsplit(maxsplit=1)
        if numbered:
            if not number or not number[0].isdecimal():
                raise UserError(f"{where}: expected 'CLASS/NAME NUMBER', got {line!r}")
            if number[0] != str(numbers[class_name] + 1):
                given = f"class {class_name!r} has number {numbers[class_name] + 1}"
                raise UserError(f"{where}: {given}, not {number[0]}")
        elif number and number[0].isdecimal() and Path(name).suffix:
            raise UserError(f"{where}: expected 'CLASS/NAME' without a number, got {line!r}")
        found.append((name if numbered else line, numbers[class_name]))
    return found


def read_lists(folder: Path, fold: int) -> SplitLists:
    """Read a fold's lists; dataset.json, if there, says whether a mirrored video belongs to another class."""
    numbers = _read_classes(folder / "classInd.txt")
    about = folder / "dataset.json"
    flip_changes_class = about.exists() and read_json(about).get("flip_changes_class", False)
    if not isinstance(flip_changes_class, bool):
        raise UserError(f"{about}: flip_changes_class must be true or false, got {flip_changes_class!r}")
    return SplitLists(
        classes=list(numbers),
        train=_read_videos(folder / f"trainlist{fold:02d}.txt", numbers, numbered=True),
        test=_read_videos(folder / f"testlist{fold:02d}.txt", numbers, numbered=False),
        flip_changes_class=flip_changes_class,
    )


def _find(folder: Path, name: str) -> Path:
    """The file that a list names.

    Where there is none, but one whose name differs only in case or in how its accents are encoded, it is that one:
    Windows and macOS do not tell them apart, and lists and videos come from there.
    """

    def key(text: str) -> str:
        return unicodedata.normalize("NFC", text).casefold()

    path = folder
    for part in Path(name).parts:
        alike = []
        if not (path / part).exists() and path.is_dir():
            alike = [found for found in path.iterdir() if key(found.name) == key(part)]
        path = alike[0] if len(alike) == 1 else path / part
    return path


def _read_index(path: Path) -> dict[str, Any]:
    """The entries of an index; UserError where the file is something else, which is then not to be written over."""

    def is_entry(value: Any) -> bool:
        if not isinstance(value, dict) or isinstance(value.get("error"), str):
            return isinstance(value, dict)
        sizes = [value.get(name) for name in ("bytes", "frames", "height", "width")]
        return type(value.get("modified_ns")) is int and all(type(size) is int and size > 0 for size in sizes)

    try:
        known = read_json(path)
        wrong = next((name for name, value in known.items() if not is_entry(value)), None)
        if wrong is not None:
            raise UserError(f"{path} is not an index of videos: {wrong!r} has no length and size")
    except UserError as error:
        raise UserError(f"{error}; delete it to index the videos anew, or name another file with --index") from error
    return known


def index_videos(folder: Path, names: Sequence[tuple[str, int]], cache: Path) -> tuple[list[Video], list[str]]:
    """Find the length and size of each video, from the cache where the file is unchanged.

    Args:
        folder: where the class folders are.
        names: (file name, class number) as in the lists.
        cache: a JSON file, read and rewritten.

    Returns:
        The readable videos, and for each other one a sentence that names it and says what is wrong.
    """
    known = _read_index(cache) if cache.exists() else {}
    paths: dict[str, Path] = {}

    def entry(name: str) -> dict[str, Any]:
        try:
            path = paths[name] = _find(folder, name)
            status = path.stat()
        except OSError as error:
            return {"error": f"{folder / name} cannot be read: {error.strerror}"}
        stamp = {"bytes": status.st_size, "modified_ns": status.st_mtime_ns}
        old = known.get(name, {})
        if stamp.items() <= old.items():
            return old
        try:
            video = probe(path)
        except UserError as error:
            return stamp | {"error": str(error)}
        return stamp | {"frames": video.frames, "height": video.height, "width": video.width}

    # FFmpeg decodes outside the interpreter's lock, so threads use all cores.
    with ThreadPoolExecutor() as pool:
        files = [name for name, _ in names]
        entries = dict(zip(files, progress(pool.map(entry, files), "index videos", len(files)), strict=True))
    if any(known.get(name) != found for name, found in entries.items()):
        write_text(cache, json.dumps(known | entries, indent=0))
    videos, broken = [], []
    for name, label in names:
        found = entries[name]
        if "error" in found:
            broken.append(str(found["error"]))
        else:
            videos.append(Video(paths[name], label, found["frames"], found["height"], found["width"]))
    return videos, broken


def split_by_group(videos: Sequence[Video], fraction: float, seed: int) -> tuple[list[Video], list[Video]]:
    """Split into training and validation videos, keeping whole groups of a class together.

    The clips of one of UCF101's groups (the _gNN_ of a name) were cut from one recording: split apart, they would let
    validation measure memory. A video without a group is its own. A class keeps at least one group for training.
    """
    groups: dict[int, dict[str, list[Video]]] = {}
    for video in videos:
        match = re.search(r"_g(\d+)_c\d+$", video.path.stem)
        groups.setdefault(video.label, {}).setdefault(match[1] if match else video.path.stem, []).append(video)
    rng = np.random.default_rng(seed)
    train, validation = [], []
    for label in sorted(groups):
        names = rng.permutation(sorted(groups[label]))
        count = min(len(names) - 1, max(1, round(fraction * len(names)))) if fraction else 0
        for i, name in enumerate(names):
            (validation if i < count else train).extend(groups[label][name])
    return train, validation


class Frames:
    """Frames of videos by index; decodes all videos once and keeps them in memory where they fit, else on demand."""

    def __init__(self, videos: Sequence[Video], short_side: int, memory_bytes: int) -> None:
        self.short_side = short_side
        self._kept: dict[Path, NDArray[np.uint8]] = {}
        if sum(3 * v.frames * np.prod(scaled(v.height, v.width, short_side)) for v in videos) <= memory_bytes:
            for video in progress(videos, "decode videos"):
                self._kept[video.path] = read_frames(video.path, range(video.frames), short_side)

    def read(self, video: Video, indices: Sequence[int]) -> NDArray[np.uint8]:
        """RGB frames (T, H, W, 3) of a video."""
        if video.path in self._kept:
            return self._kept[video.path][indices]
        return read_frames(video.path, indices, self.short_side)


class ClipDataset(Dataset):
    """One clip (T, 3, crop, crop) uint8 and the class number of each video.

    With a seed the clip is a random one: start, crop and, if `flip`, side; with `augmented`, size and shape of the crop
    and its colours too. It depends on seed, epoch and video only, not on the number of workers. Without a seed it is
    the central clip.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        frames: Frames,
        clip: ClipConfig,
        seed: int | None = None,
        flip: bool = False,
        augmented: bool = False,
    ) -> None:
        self.videos, self.frames, self.clip, self.seed, self.flip = videos, frames, clip, seed, flip
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, i = key
        video, crop = self.videos[i], self.clip.crop
        start, top, left, mirror = self.clip.last_start(video.frames) / 2, 0.5, 0.5, False
        if self.seed is not None:
            rng = np.random.default_rng((self.seed, epoch, i))
            start = rng.integers(self.clip.last_start(video.frames), endpoint=True)
            top, left = rng.random(2)
            mirror = self.flip and rng.random() < 0.5
        pictures = self.frames.read(video, self.clip.indices(video.frames, int(start)))
        if self.seed is not None and self.augmented:
            return augment(_as_clip(pictures[:, :, ::-1] if mirror else pictures), crop, rng), video.label
        top, left = round(top * (pictures.shape[1] - crop)), round(left * (pictures.shape[2] - crop))
        pictures = pictures[:, top : top + crop, left : left + crop]
        return _as_clip(pictures[:, :, ::-1] if mirror else pictures), video.label


def views(video: Video, frames: Frames, clip: ClipConfig, clips: int, crops: int, flip: bool) -> Tensor:
    """The clips that vote on a video: (clips * crops * (2 if flip else 1), T, 3, crop, crop) uint8.

    `clips` evenly spaced clips; the centre crop, or with `crops` = 5 the four corners too. The paper takes 25 clips,
    five crops and flips. Source: Ballas et al., ICLR 2016, arXiv 1511.06432.
    """
    starts = np.linspace(0, clip.last_start(video.frames), clips).round().astype(int)
    indices = np.array([clip.indices(video.frames, int(s)) for s in starts])
    unique, inverse = np.unique(indices, return_inverse=True)
    pictures = frames.read(video, unique.tolist())
    bottom, right = pictures.shape[1] - clip.crop, pictures.shape[2] - clip.crop
    corners = [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)][:crops]
    seen = [pictures[:, y : y + clip.crop, x : x + clip.crop] for y, x in corners]
    if flip:
        seen += [picture[:, :, ::-1] for picture in seen]
    return torch.cat([_as_clip(picture)[torch.from_numpy(inverse.reshape(indices.shape))] for picture in seen])


def _as_clip(pictures: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
