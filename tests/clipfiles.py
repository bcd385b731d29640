"""Real files of many kinds, made with PyAV for the tests of clips/ (and by bench/torture).

Frames carry their number as a grey level (`grey`, read back by `indices`), so that one can tell
which frame came.
"""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from clips.frames import parse_buckets

STEP = 6            # grey levels between neighbouring frames; codecs err by less than half of it
SMALL = parse_buckets("32x48x9,48x32x9,32x48x1,48x32x1", time_scale=4, space_scale=8)
WIDE = SMALL[0]
BLOCKS = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8).repeat(4, 0).repeat(4, 1)

# Quarter turns as a phone writes them: a point (x, y) of the stored picture is shown at
# (a x + c y, b x + d y). And where its top rows are then.
ONE = 1 << 16
TURNS = {
    "clockwise": ([0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30], (slice(None), slice(-8, None))),
    "counterclockwise": ([0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30], (slice(None), slice(0, 8))),
    "half": ([-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30], (slice(-8, None), slice(None))),
}


def grey(index: int) -> int:
    return 16 + STEP * index


def write(path: Path, count: int = 24, rate: str = "24", codec: str = "libx264",
          size: tuple = (48, 72), pix: str = "yuv420p", draw=None, first: int = 0, **more) -> Path:
    """A video whose frame k is grey(first + k) all over, or drawn by draw(picture, k).

    more: stamps (milliseconds of each frame), matrix (a display matrix), aspect (of a pixel),
    colors (matrix), transfer and primaries (their numbers), options (of the container), coder
    (options of the codec).
    """
    with av.open(str(path), "w", options=more.get("options", {})) as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *size, pix
        stream.codec_context.thread_count = 1
        stream.codec_context.options = more.get("coder", {})
        if codec in ("mpeg4", "mjpeg"):
            stream.codec_context.bit_rate = 4_000_000
        if "stamps" in more:
            stream.codec_context.time_base = Fraction(1, 1000)
        if "matrix" in more:
            stream.set_display_matrix(more["matrix"])
        if "transfer" in more:
            stream.codec_context.color_trc = more["transfer"]
            stream.codec_context.color_primaries = more["primaries"]
        if "aspect" in more:
            stream.codec_context.sample_aspect_ratio = more["aspect"]
        for k in range(count):
            picture = np.full((*size, 3), min(grey(first + k), 255), np.uint8)
            if pix.startswith("yuva"):
                picture = np.concatenate([picture, np.full((*size, 1), 255, np.uint8)], axis=2)
            if draw:
                draw(picture, k)
            kind = "rgba" if picture.shape[2] == 4 else "rgb24"
            frame = av.VideoFrame.from_ndarray(picture, format=kind)
            frame = frame.reformat(format=pix, dst_colorspace=more.get("colors"))
            if "stamps" in more:
                frame.pts, frame.time_base = more["stamps"][k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def draw_moving(picture: np.ndarray, k: int) -> None:
    """A window that moves over a fixed pattern of blocks: no frame looks like its neighbours."""
    h, w = picture.shape[:2]
    picture[:] = BLOCKS[k % 100 : k % 100 + h, 2 * k % 100 : 2 * k % 100 + w]


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_picture(path: Path, size: tuple = (72, 48), level: int = 0, turned: bool = False) -> Path:
    """One grey picture, size (width, height); turned: the header says that it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    Image.new("RGB", size, (level,) * 3).save(path, exif=exif)
    return path


def indices(clip: torch.Tensor) -> list[int]:
    """Which frame each of a clip (3, F, h, w) is, and a check that it can be told (half a STEP)."""
    levels = (clip.mean(dim=(0, 2, 3)) + 1) * 127.5
    found = (levels - grey(0)) / STEP
    error = (found - found.round()).abs().max().item() * STEP
    assert error < 2.5, f"{error:.1f} levels off"
    return found.round().int().tolist()


def manifest(folder: Path, *rows: dict, name: str = "manifest.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def face_box(k: int) -> tuple[int, int, int, int]:
    return 10 + 4 * k, 16 + k, 34 + 4 * k, 40 + k


def draw_square(picture: np.ndarray, k: int) -> None:
    x0, y0, x1, y1 = face_box(k)
    picture[:] = 0
    picture[y0:y1, x0:x1] = 255


def faces_file(path: Path, numbers, size=(96, 160), scale: float = 1.0, rate: float = 24.0,
               marks=False, **more) -> Path:
    """Boxes of the drawn square in frames `numbers`, as a detector that saw frames of size * scale
    would tell them. more: further entries of the file."""
    frames = []
    for k in numbers:
        x0, y0, x1, y1 = (scale * n for n in face_box(k))
        frames.append({"t": k / 24, "box": [x0, y0, x1, y1]})
        if marks:
            middle = [(x0 + x1) / 2, (y0 + y1) / 2]
            frames[-1]["landmarks"] = [[x0, y0], [x1, y0], middle, [x0, y1], [x1, y1]]
    size = [round(scale * n) for n in size]
    path.write_text(json.dumps({"frame_rate": rate, "size": size, "frames": frames, **more}))
    return path
