"""Video files: their frames, as players show them, and their length and size."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from examples.training import UserError

__all__ = ["Video", "file_url", "probe", "read_frames", "scaled"]

# A display matrix within a degree of upright or of a quarter turn counts as that, as in FFmpeg.
MOST_TILT = math.tan(math.radians(1))


@dataclass(frozen=True)
class Video:
    """A readable file, its class number from 0 (-1: unknown) and its length and size, in frames and pixels.

    The size is that of the first frame as players show it: after the rotation that phones write into the file.
    """

    path: Path
    label: int
    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Orientation:
    """How a coded frame is shown: rows and columns exchanged or not, then rows and columns reversed or not."""

    transposed: bool
    rows_reversed: bool
    columns_reversed: bool

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as shown of those as coded, and the other way round."""
        return (width, height) if self.transposed else (height, width)

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A coded picture (H, W, 3) as shown."""
        shown = picture.swapaxes(0, 1) if self.transposed else picture
        return shown[:: -1 if self.rows_reversed else 1, :: -1 if self.columns_reversed else 1]


def file_url(path: Path) -> str:
    """The path for FFmpeg, which reads what stands before a colon as the name of a protocol."""
    return f"file:{path}"


@contextmanager
def _decoding(path: Path) -> Iterator[Iterator[av.VideoFrame]]:
    """The frames of a file's first video stream, in the order of display; UserError where it is no video."""
    try:
        # Titles may be in any encoding, and are not used.
        with av.open(file_url(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream")
            yield container.decode(video=0)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path} is not a readable video: {error.strerror}") from error


def _display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """(a, b, c, d): the coded pixel (x, y) is shown at (a x + c y, b x + d y), but for an offset."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV refuses all of a frame's side data for one kind that it does not know, such as EXIF in Motion JPEG. The
        # angle, counterclockwise, is still to be had; whether the frame is mirrored is not.
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
    return a, b, c, d


def _orientation(path: Path, frame: av.VideoFrame) -> Orientation:
    """The orientation, one of eight, that the frame's display matrix asks for; its scale is not looked at."""
    a, b, c, d = _display_matrix(frame)
    if max(abs(b), abs(c)) <= MOST_TILT * min(abs(a), abs(d)) or not any((a, b, c, d)):
        return Orientation(False, rows_reversed=d < 0, columns_reversed=a < 0)
    if max(abs(a), abs(d)) <= MOST_TILT * min(abs(b), abs(c)):
        return Orientation(True, rows_reversed=b < 0, columns_reversed=c < 0)
    raise UserError(
        f"{path} has the display matrix {a:g} {b:g} {c:g} {d:g}, which is no turn by a multiple of 90 degrees"
    )


def probe(path: Path, label: int = -1) -> Video:
    """Decode a whole file to learn its true length: headers of broken files lie, and so do those of some codecs."""
    count = height = width = 0
    with _decoding(path) as frames:
        for frame in frames:
            orientation = _orientation(path, frame)
            if not count:
                height, width = orientation.size(frame.height, frame.width)
            count += 1
    if not count:
        raise UserError(f"{path} holds no frames")
    return Video(path, label, count, height, width)


def scaled(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width with the shorter one scaled to `short_side`."""
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


def read_frames(path: Path, indices: Sequence[int], short_side: int) -> NDArray[np.uint8]:
    """RGB frames (T, H, W, 3) as players show them, at the given indices (any order, repeats allowed), scaled.

    The first frame's shorter side is scaled to `short_side`; frames of other sizes are scaled to what it becomes.
    Decodes from the start: the only way to an exact frame in every codec, and cheap for clips of a few seconds.
    """
    wanted, last = set(indices), max(indices)
    size, pictures = (0, 0), {}
    with _decoding(path) as frames:
        for index, frame in enumerate(frames):
            orientation = _orientation(path, frame)
            if index == 0:
                size = scaled(*orientation.size(frame.height, frame.width), short_side)
            if index in wanted:
                height, width = orientation.size(*size)
                pictures[index] = orientation.apply(frame.to_ndarray(format="rgb24", height=height, width=width))
            if index == last:
                return np.stack([pictures[i] for i in indices])
    raise UserError(f"{path} has no frame {last}; it changed since it was indexed")
