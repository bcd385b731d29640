"""Frames into a video file, one run after the other.

The idea. A decoder that works in tiles hands over finished frames while the rest of the video is
still numbers in a latent. Whoever collects them first and writes them afterwards holds the whole
video three times (decoder's floats, 8-bit pixels, encoder), and a long or large video ends in "out
of memory" after all the hard work is done. So the mp4 is written as the frames come: `VideoWriter`
takes any number of them, any number of times, and what is not yet in the file is some fifty frames
inside the H.264 encoder. The picture sheet needs five frames, whose places are known in advance.

Second failure prevented: half a file. Everything is written under a hidden name and the three files
are renamed together at the very end. Whatever goes wrong before (a full disk, NaN in the pixels,
Ctrl-C), nothing is left.

our reading: all of it. No part of ST-DRC (arXiv 2606.02441) and no LTX-2.3 fact.

Conventions. Tensors hold pixels in [-1, 1], (3, f, h, w); arrays hold 8-bit RGB, (f, h, w, 3).
However frames are divided into runs, the file has the same bytes.

    with VideoWriter("out.mp4", 24.0) as writer:  # frames per second
        for frames in vae.decode_tiles(latent, tiling):  # (1, 3, f, h, w)
            writer.add(to_frames(frames[0].float().cpu()))

Read next: training/optim.py
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Self

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image
from torch import Tensor, nn

from common.files import atomic_write, temp_path

SHORT_SIDE, LONG_SIDE = 384, 4096  # pixels; smaller videos are enlarged, none beyond the second


def to_frames(video: Tensor, factor: int = 1) -> np.ndarray:
    """(3, f, h, w) in [-1, 1], clamped -> (f, h*factor, w*factor, 3) uint8. factor 1 = off."""
    frames = video.transpose(0, 1)                                         # (f, 3, h, w)
    if factor > 1:
        frames = nn.functional.interpolate(frames, scale_factor=factor, mode="bicubic")
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def exact_rate(frame_rate: float) -> Fraction:
    """Frames per second as the fraction that is meant: 23.976 and 29.97 are what television made
    of 24 and 30, 24000/1001 and 30000/1001; any other keeps a denominator of at most 1001."""
    television = Fraction(round(frame_rate * 1.001) * 1000, 1001)
    if abs(frame_rate - television) < 2e-4 * frame_rate:  # 23.98 is meant, too; 24 is 1e-3 away
        return television
    return Fraction(frame_rate).limit_denominator(1001)


class VideoWriter:
    """H.264 in an mp4 that any browser plays; frames are added as they come.

    The file is complete when the `with` block ends, and removed when the block raises.
    """

    def __init__(self, path: str | os.PathLike, frame_rate: float):
        self.path, self.frame_rate = Path(path), frame_rate
        self.container = self.stream = None

    def __enter__(self) -> Self:
        # absolute: FFmpeg takes 12:30.mp4 for an address on the network
        self.container = av.open(str(self.path.absolute()), "w", format="mp4",
                                 options={"movflags": "+faststart"})
        return self

    def add(self, frames: np.ndarray) -> None:
        """Append frames (f, h, w, 3) uint8 RGB. The first ones set the size; raises ValueError on
        another one."""
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"expected frames (f, h, w, 3) of uint8, got {frames.shape} of "
                             f"{frames.dtype}; use to_frames")
        height, width = frames.shape[1:3]
        if self.stream is None:
            self._start(height, width)
        if (height, width) != (self.stream.height, self.stream.width):
            raise ValueError(f"expected frames of {self.stream.height}x{self.stream.width} like "
                             f"the first, got {height}x{width}; resize them")
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709,
                                   dst_color_range=ColorRange.MPEG, dst_color_trc=ColorTrc.BT709,
                                   dst_color_primaries=ColorPrimaries.BT709)
            self.container.mux(self.stream.encode(frame))

    def _start(self, height: int, width: int) -> None:
        if height % 2 or width % 2:  # yuv420p keeps one colour for 2x2 pixels
            raise ValueError(f"expected an even height and width, got {height}x{width}; crop or "
                             "pad by one")
        # No B-frames: with them x264 reads memory it has not set at some widths, 64 and 576 among
        # them, and the same frames give other bytes from call to call.
        options = {"crf": "14", "bf": "0"}
        self.stream = self.container.add_stream("libx264", rate=exact_rate(self.frame_rate),
                                                options=options)
        self.stream.height, self.stream.width, self.stream.pix_fmt = height, width, "yuv420p"
        codec = self.stream.codec_context
        codec.thread_count = 1  # x264 notes it in the file: same seed, same bytes
        # All four, or players guess all four: Chromium then shows red 200, 30, 30 as 186, 12, 32 in
        # videos of less than 720 rows.
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        complete = False
        try:
            if kind is None:
                if self.stream is None:
                    raise ValueError("expected at least one frame, got none; add frames before the "
                                     "block ends")
                self.container.mux(self.stream.encode())  # what the encoder still holds back
            self.container.close()
            complete = kind is None
        finally:
            if not complete:
                self.path.unlink(missing_ok=True)


# ------------------------------------------------------------ picture sheets


def picks(num_frames: int) -> list[int]:
    """Places of up to five evenly spaced frames, the first and the last among them."""
    return np.linspace(0, num_frames - 1, min(5, num_frames)).round().astype(int).tolist()


def contact_sheet(reference: np.ndarray, picked: list[np.ndarray]) -> Image.Image:
    """The reference (h, w, 3), then frames of the same size, thin grey gaps between."""
    gap = np.full((len(reference), 4, 3), 128, np.uint8)
    parts = [reference, *(part for frame in picked for part in (gap, frame))]
    return Image.fromarray(np.concatenate(parts, axis=1))


def save_sheet(path: Path, rows: list[list[Tensor]], scale: int = 2) -> None:
    """A PNG of rows of pictures (3, h, w) in [-1, 1], enlarged by a whole factor."""
    picture = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)  # (3, rows h, cols w)
    image = Image.fromarray(to_frames(picture[:, None].cpu())[0])
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    atomic_write(path, lambda hidden: image.save(hidden, format="PNG"))


# ------------------------------------------------------------ what sample.py leaves


def enlargement(height: int, width: int) -> int:
    """The whole factor, 1 or more, that lifts the shorter side to SHORT_SIDE and leaves the longer
    below LONG_SIDE."""
    wanted = math.ceil(SHORT_SIDE / min(height, width))
    return max(1, min(wanted, LONG_SIDE // max(height, width)))


def repeats(num_frames: int, frame_rate: float, seconds: float) -> int:
    """How often a video is written, whole and forwards, to last so long; 1 if it does anyway."""
    return max(1, math.ceil(seconds * frame_rate / num_frames))


def single_frames(runs: Iterable[Tensor], seconds: dict[str, float]) -> Iterator[Tensor]:
    """Runs (3, f, h, w) of any device and type -> frames (3, 1, h, w), float32 on the CPU.

    Adds the time that the runs took to arrive to seconds["decode"]. Raises ValueError when a pixel
    is not finite.
    """
    runs = iter(runs)
    while True:
        start = time.perf_counter()
        run = next(runs, None)
        run = None if run is None else run.cpu()  # waits for the device, and frees its memory
        seconds["decode"] = round(seconds.get("decode", 0) + time.perf_counter() - start, 2)
        if run is None:
            return
        for i in range(run.shape[1]):
            # a copy: a view would keep the whole run alive
            frame = run[:, i : i + 1].to(torch.float32, copy=True)
            if not frame.isfinite().all():
                raise ValueError("expected finite pixels, got NaN or infinity after decoding; use "
                                 "--dtype float32")
            yield frame
        del run  # before the next one is made


def check_output(path: Path, ref: Path) -> None:
    """Raise ValueError unless write_outputs can write its three files there: before the work."""
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"expected an output path ending in .mp4, got {path}; rename "
                         "--output-path")
    if any("\ud800" <= char <= "\udfff" for char in str(path)):
        raise ValueError("expected an --output-path of ordinary characters, got bytes that are no "
                         "text; choose another")
    if not path.parent.is_dir():
        raise ValueError(f"expected an existing output folder, got {path.parent}; create it")
    for target in (path, path.with_suffix(".png"), path.with_suffix(".json")):
        if target.is_dir() or target.resolve() == ref.resolve():
            raise ValueError(f"expected {target} to be free for the output, got a folder or the "
                             "reference itself; change --output-path")
    trial = temp_path(path)
    try:  # permission bits alone miss read-only disks, full ones, and names that are too long
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"expected a writable folder, got {path.parent} ({error.strerror}); "
                         "change --output-path") from error


def write_outputs(path: Path, runs: Iterable[Tensor], num_frames: int, canvas: Tensor,
                  frame_rate: float, record: dict, times: int = 1) -> None:
    """path (.mp4), the picture sheet (.png) and the record (.json), from runs (3, f, h, w).

    Holds one run at a time. Small videos are enlarged. times: how often the whole video is written,
    since a player is through with a second before anybody has looked; above 1 all frames are kept,
    at a byte a colour. canvas (3, h, w): the reference. The record gains the sizes, the file names,
    and in "seconds" the time the runs took to arrive ("decode") and the rest ("write"). Raises
    ValueError on a pixel that is not finite or another number of frames than announced, and passes
    on what `runs` raises; no file is left then, and older files of these names stay as they were.
    """
    start, (h, w) = time.perf_counter(), canvas.shape[-2:]
    seconds = record.setdefault("seconds", {})
    before, factor = seconds.get("decode", 0), enlargement(h, w)
    targets = [path, path.with_suffix(".png"), path.with_suffix(".json")]
    hidden = [temp_path(target) for target in targets]
    places, picked, kept, count = set(picks(num_frames)), [], [], 0
    try:
        with VideoWriter(hidden[0], frame_rate) as writer:
            for frame in single_frames(runs, seconds):
                if frame.shape[-2:] != (h, w):
                    raise ValueError(f"expected frames of {h}x{w} like the canvas, got "
                                     f"{frame.shape[-2]}x{frame.shape[-1]}; letterbox the "
                                     "reference to their size")
                pixels = to_frames(frame, factor)                          # (1, h', w', 3)
                writer.add(pixels)
                if count in places:
                    picked.append(pixels[0])
                if times > 1:
                    kept.append(pixels)
                count += 1
            for pixels in kept * (times - 1):
                writer.add(pixels)
        if count != num_frames:
            raise ValueError(f"expected {num_frames} frames, got {count}; announce as many as the "
                             "runs hold")
        reference = to_frames(canvas[:, None].float().cpu(), factor)[0]    # (h', w', 3)
        contact_sheet(reference, picked).save(hidden[1])
        record |= {"model_size": [count, h, w],
                   "output_size": [count * times, *reference.shape[:2]],
                   "enlarged": factor, "files": [target.name for target in targets]}
        decoding = seconds["decode"] - before
        seconds["write"] = round(time.perf_counter() - start - decoding, 2)
        hidden[2].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for temporary, target in zip(hidden, targets, strict=True):
            os.replace(temporary, target)
    finally:
        for temporary in hidden:
            temporary.unlink(missing_ok=True)
