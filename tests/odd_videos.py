"""Writes videos as phones, cameras and browsers make them: turned, with EXIF, of changing size."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = 200, 120, 60, 0
RATE = Fraction(1, 25)


def four_quadrants(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A picture (H, W, 3) of four grey levels."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = TOP_LEFT
    picture[: height // 2, width // 2 :] = TOP_RIGHT
    picture[height // 2 :, : width // 2] = BOTTOM_LEFT
    picture[height // 2 :, width // 2 :] = BOTTOM_RIGHT
    return picture


def write_phone_video(path: Path, matrix: Sequence[float], picture: NDArray[np.uint8], frames: int = 3) -> None:
    """MPEG-4 of one picture, with a display matrix a, b, c, d: the pixel (x, y) is shown at (a x + c y, b x + d y)."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 2**16) for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 2**30)
    path.write_bytes(data)


def write_motion_jpeg(path: Path, pictures: Sequence[NDArray[np.uint8]], orientation: int | None = None) -> None:
    """Motion JPEG of pictures of any sizes, with EXIF's number of an orientation."""
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuvj420p"
        container.start_encoding()
        for step, picture in enumerate(pictures):
            coded = io.BytesIO()
            Image.fromarray(picture).save(coded, "jpeg", quality=95, exif=exif)
            packet = av.Packet(coded.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, step, step, RATE
            container.mux(packet)
