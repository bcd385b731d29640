"""Real files of many kinds, made with PyAV for the tests of frames.py, clips.py and cache.py.

Frames carry their number as a grey level (`grey`, read back by `indices`), so that one can tell which frame came.
"""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from clips.frames import parse_buckets
from clips.manifest import draw_reference

STEP = 6            # grey levels between neighbouring frames; codecs err by less than half of it
SMALL = parse_buckets("32x48x9,48x32x9,32x48x1,48x32x1", time_scale=4, space_scale=8)
WIDE = SMALL[0]


def grey(index: int) -> int:
    return 16 + STEP * index


def write(path: Path, count: int = 24, rate: str = "24", codec: str = "libx264", size: tuple = (48, 72),
          pix: str = "yuv420p", stamps: list | None = None, matrix: list | None = None, aspect: Fraction | None = None,
          draw=None, options=None, first: int = 0, coder: dict | None = None) -> Path:
    """A video whose frame k is grey(first + k) all over. stamps: milliseconds of each frame; options: of the container;
    coder: of the codec."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *size, pix
        stream.codec_context.thread_count = 1
        stream.codec_context.options = coder or {}
        if codec in ("mpeg4", "mjpeg"):
            stream.codec_context.bit_rate = 4_000_000
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        if matrix:
            stream.set_display_matrix(matrix)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for k in range(count):
            picture = np.full((*size, 3), min(grey(first + k), 255), np.uint8)
            if draw:
                draw(picture, k)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix)
            if stamps:
                frame.pts, frame.time_base = stamps[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


BLOCKS = np.kron(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8), np.ones((4, 4, 1), np.uint8))


def draw_moving(picture: np.ndarray, k: int) -> None:
    """A window that moves over a fixed pattern of blocks: no frame looks like its neighbours."""
    h, w = picture.shape[:2]
    picture[:] = BLOCKS[k % 100 : k % 100 + h, 2 * k % 100 : 2 * k % 100 + w]


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(clip: torch.Tensor) -> torch.Tensor:
    """(3, F, h, w) in [-1, 1] -> mean level of each frame, 0..255."""
    return (clip.mean(dim=(0, 2, 3)) + 1) * 127.5


def indices(clip: torch.Tensor) -> list[int]:
    """Which frame each one is, and a check that it can be told: within 2.5 levels of a whole number of steps."""
    found = (levels(clip) - grey(0)) / STEP
    error = (found - found.round()).abs().max().item() * STEP
    assert error < 2.5, f"{error:.1f} levels off"
    return found.round().int().tolist()


def manifest(folder: Path, *rows: dict, name: str = "manifest.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def need(codec: str) -> None:
    try:
        av.Codec(codec, "w")
    except Exception:
        pytest.skip(f"this FFmpeg cannot write {codec}")


KINDS = {
    "h264.mp4": {},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "h265.mkv": {"codec": "libx265"},
    "ten-bit.mp4": {"pix": "yuv420p10le"},
    "odd.mkv": {"codec": "ffv1", "pix": "bgr0", "size": (47, 71)},
    "odd-4-2-0.mkv": {"codec": "ffv1", "size": (47, 71)},
    "tall.mjpeg.avi": {"codec": "mjpeg", "pix": "yuvj420p", "size": (72, 48)},
    "transport.ts": {},
}

# Quarter turns as a phone writes them: a point (x, y) of the stored picture is shown at (a x + c y, b x + d y).
ONE = 1 << 16
TURNS = {"clockwise": ([0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30], (slice(None), slice(-8, None))),
         "counterclockwise": ([0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30], (slice(None), slice(0, 8))),
         "half": ([-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30], (slice(-8, None), slice(None)))}


def face_box(k: int) -> tuple[int, int, int, int]:
    return 10 + 4 * k, 16 + k, 34 + 4 * k, 40 + k


def draw_square(picture: np.ndarray, k: int) -> None:
    x0, y0, x1, y1 = face_box(k)
    picture[:] = 0
    picture[y0:y1, x0:x1] = 255


def faces_file(path: Path, numbers, size=(96, 160), scale: float = 1.0, rate: float = 24.0, marks=False) -> Path:
    """Boxes of the drawn square in frames `numbers`, as a detector that saw frames of size * scale would tell them."""
    frames = []
    for k in numbers:
        x0, y0, x1, y1 = (scale * n for n in face_box(k))
        frames.append({"t": k / 24, "box": [x0, y0, x1, y1]})
        if marks:
            frames[-1]["landmarks"] = [[x0, y0], [x1, y0], [(x0 + x1) / 2, (y0 + y1) / 2], [x0, y1], [x1, y1]]
    size = [round(scale * n) for n in size]
    path.write_text(json.dumps({"frame_rate": rate, "size": size, "frames": frames}))
    return path


def picture_index(picture: Image.Image) -> int:
    return round((np.asarray(picture).mean() - grey(0)) / STEP)


def draws(rows, i, count: int = 30):
    g = torch.Generator().manual_seed(0)
    return [draw_reference(rows, i, g) for _ in range(count)]
