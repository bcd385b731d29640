"""Real clips: from a list of video files to latents that training can read.

The idea. A folder of clips is never clean: phones film sideways, frame rates differ and wobble, a copy was cut off, a
caption is missing. A training that meets such a file after two hours stops, or, worse, goes on with wrong frames. So
every clip is decoded once before: `check` says which rows are used and why each other one is not. What is left is
brought to a few resolution buckets (batches need one shape), run through the frozen VAE once, and kept.

The latents are kept under a hash of everything they depend on: the clip's bytes, bucket, frame rate, start, the VAE's
weights, and FORMAT of this file. Change one and another file is asked for; an old latent is never used by mistake.

Manifest: JSONL, JSON (a list, or {"data": [...]}) or CSV with `video` (or `media_path`) and `caption`, optional
`reference` (a picture), `identity` (who is seen), `faces` (a faces file, see `load_faces`); other fields are ignored.
Paths are relative to the manifest's folder and must stay inside it, or inside a folder named with --root.

paper:        a reference of the person beside each clip (ST-DRC, arXiv 2606.02441); no word on preparing data.
our reading:  all of this file: nearest frame in time, resize to cover and centre crop, the order of `draw_reference`.
LTX-2.3:      frames 8k+1, sides multiples of 32, 24 frames per second; the tiny VAE has 4k+1 and 8.

Conventions. Clips (3, F, h, w) in [-1, 1]; pictures height before width, "512x768x121" = height x width x frames; boxes
(x0, y0, x1, y1) in pixels; times in seconds after the clip's first frame. start 0 = from the first frame.

    report = check("clips/manifest.jsonl", parse_buckets("512x768x121,512x768x1"))
    latents = cache_latents(report.used, vae, vae.encode, "cache")
    rows, x0 = next(latents.batches(report.used[0].bucket, 4, generator))          # [int] * 4, (4, C, F', H, W)

Read next: train.py
"""

import argparse
import csv
import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_weights, open_file, read_metadata, write_file
from reference import letterbox

FORMAT = 1          # of the cached files and of the way clips are decoded; a change here makes every cached latent new
MAX_ENLARGE = 1.1   # our reading: a little (1080 rows for a bucket of 1088) cannot be seen, more teaches blur
TIE = 0.0015        # seconds; two frames equally near, up to the rounding of timestamps (Matroska: 1 ms): the earlier
ROUNDING = 0.05     # of a frame; a clip of n frames whose timestamps were rounded still has n frames
FIELDS = ("video", "media_path", "caption", "reference", "identity", "faces")
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DEFAULT_BUCKETS = "512x768x121,768x512x121,512x768x1,768x512x1"  # LTX-2.3's default size, its upright twin, and images


class Unusable(ValueError):
    """A row or clip that cannot be used: `reason` is one of a few words to count by, `detail` says what was found."""

    def __init__(self, reason: str, detail: object):
        self.reason, self.detail = reason, " ".join(str(detail).split())  # one line, whatever a file name contains
        super().__init__(f"{self.reason}: {self.detail}")


# ------------------------------------------------------------ buckets


class Bucket(NamedTuple):
    """One shape that batches are made of: pixels and frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def parse_buckets(text: str, time_scale: int = 8, space_scale: int = 32) -> list[Bucket]:
    """ "512x768x121,768x512x121" -> buckets, height x width x frames. Scales: those of the VAE (LTX-2.3: 8 and 32).

    Raises ValueError unless sides are multiples of space_scale and frames 1 + a multiple of time_scale.
    """
    buckets = []
    for part in text.split(","):
        try:
            bucket = Bucket(*(int(n) for n in part.strip().split("x")))
        except (ValueError, TypeError):
            raise ValueError(f"expected buckets such as 512x768x121 (height x width x frames), got {part!r}; separate "
                             "several by commas") from None
        if min(bucket) < 1 or bucket.height % space_scale or bucket.width % space_scale:
            raise ValueError(f"expected sides that are multiples of {space_scale}, got {bucket}; round them")
        if (bucket.frames - 1) % time_scale:
            fewer = bucket.frames - (bucket.frames - 1) % time_scale
            raise ValueError(f"expected {time_scale}k+1 frames, got {bucket.frames}; use {fewer}")
        buckets.append(bucket)
    return buckets


def choose_bucket(height: int, width: int, frames: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket nearest in shape among those that the clip fills; of several, the one with most frames, then pixels.

    our reading. height, width: pixels as displayed; frames: at the target frame rate, 1 for an image. A clip fills a
    bucket when it has its frames and need not be enlarged by more than MAX_ENLARGE. Raises Unusable ("too small", "too
    short") when there is none.
    """
    large = [b for b in buckets if max(b.height / height, b.width / width) <= MAX_ENLARGE]
    if not large:
        smallest = min(buckets, key=lambda b: b.height * b.width)
        raise Unusable("too small", f"{height}x{width}, the smallest bucket is {smallest}")
    fit = [b for b in large if b.frames <= frames]
    if not fit:
        raise Unusable("too short", f"{frames} frames, the shortest bucket has {min(b.frames for b in large)}")
    shape = math.log(height / width)
    return min(fit, key=lambda b: (abs(math.log(b.height / b.width) - shape), -b.frames, -b.height * b.width))


class Crop(NamedTuple):
    """Resize to rows x columns, then keep the bucket's size from (top, left) on."""

    rows: int
    columns: int
    top: int
    left: int


def cover(height: int, width: int, bucket: Bucket) -> Crop:
    """Resize until both sides cover the bucket, keeping the aspect up to a pixel's rounding; crop around the middle."""
    scale = max(bucket.height / height, bucket.width / width)
    rows, columns = max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))
    return Crop(rows, columns, (rows - bucket.height) // 2, (columns - bucket.width) // 2)


# ------------------------------------------------------------ decoding


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame, not yet turned into RGB. time, end: seconds; height, width: pixels as displayed."""

    time: float
    end: float
    height: int
    width: int
    source: av.VideoFrame | Image.Image

    def pixels(self) -> np.ndarray:
        """RGB, turned upright, (h, w, 3) uint8; pixels that are not square are not stretched yet."""
        if isinstance(self.source, Image.Image):
            canvas = letterbox(self.source, self.height, self.width)      # its own size: converts only, lays on white
            return ((canvas + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        # Files often leave the colour matrix unsaid; players then take BT.709 for HD, BT.601 below. HDR stays as it is.
        unsaid = self.source.colorspace == 2 and self.source.height >= 720
        rgb = self.source.to_ndarray(format="rgb24", src_colorspace="ITU709" if unsaid else None)
        return np.ascontiguousarray(np.rot90(rgb, round(self.source.rotation / 90) % 4))

    def resized(self, crop: Crop, bucket: Bucket) -> Tensor:
        """(3, h, w) uint8 of the bucket's size, antialiased."""
        x = torch.from_numpy(self.pixels().copy()).permute(2, 0, 1)[None]                 # (1, 3, h, w)
        x = nnf.interpolate(x, (crop.rows, crop.columns), mode="bilinear", antialias=True)
        return x[0, :, crop.top : crop.top + bucket.height, crop.left : crop.left + bucket.width]


def open_picture(path: Path) -> Image.Image:
    """A picture, read to its end and turned upright (EXIF). Raises Unusable("cannot be decoded")."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)  # a copy, hence read to its end
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unusable("cannot be decoded", f"{path.name}: {error}") from None


def decode(path: Path) -> Iterator[Frame]:
    """Every frame of a video or picture, in the order of display. Sound is ignored.

    Raises Unusable: "missing file", "no video stream", "cannot be decoded", or, after the last frame that could be
    read, "cut off" when the file announces more.
    """
    path = Path(path)
    if not path.is_file():  # also keeps pipes and devices from being read
        raise Unusable("missing file", path)
    if path.stat().st_size == 0:
        raise Unusable("cannot be decoded", f"{path.name}: an empty file")
    if path.suffix.lower() in IMAGES:
        image = open_picture(path)
        yield Frame(0.0, 0.0, image.height, image.width, image)
        return
    # A playlist may name other files or addresses. The file is opened by us, and no protocol is left to open another.
    with path.open("rb") as file:
        try:
            container = av.open(file, options={"protocol_whitelist": "none"}, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise Unusable("cannot be decoded", f"{path.name}: {_told(error)}") from None
        with container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not container.streams:
                raise Unusable("cannot be decoded", f"{path.name}: only the beginning of a file")
            if not streams:
                raise Unusable("no video stream", path.name)
            yield from _decode_stream(container, streams[0], path.name)


def _decode_stream(container, stream, name):
    stream.thread_type = "AUTO"
    aspect = float(stream.sample_aspect_ratio or 1)
    usual = float(1 / (stream.average_rate or stream.guessed_rate or 24))
    first, count, now, error = None, 0, -usual, None
    frames = container.decode(stream)
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            break
        except (av.FFmpegError, OSError, ValueError) as problem:
            error = problem
            break
        stamp = frame.time if frame.time is not None else (first or 0.0) + now + usual  # raw streams have no stamps
        first = stamp if first is None else first
        length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else usual
        now, count = stamp - first, count + 1
        height, width = frame.height, max(1, round(frame.width * aspect))
        if round(frame.rotation / 90) % 2:
            height, width = width, height
        yield Frame(now, now + length, height, width, frame)
    if count == 0:
        raise Unusable("cannot be decoded", f"{name}: {_told(error) if error else 'no frame inside'}")
    announced = _announced_seconds(container, stream)
    missing = announced is not None and announced - (now + length) > max(0.5 * length, 0.002)
    if missing and stream.frames > count:
        raise Unusable("cut off", f"{name}: {count} of {stream.frames} frames")
    if missing and not stream.frames and announced - (now + length) > 2 * length + 0.1:
        raise Unusable("cut off", f"{name}: {now + length:.2f} of {announced:.2f} seconds")
    if error:
        raise Unusable("cannot be decoded", f"{name}: {_told(error)} after {count} frames")


def _announced_seconds(container, stream):
    """What the header says, None if nothing trustworthy. An edit list may hide frames: then the seconds are right."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if "matroska" in container.format.name and (text := stream.metadata.get("DURATION")):
        hours, minutes, seconds = text.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    if "matroska" in container.format.name and container.duration and not container.streams.audio:
        return container.duration / 1e6
    return None


def _told(error):
    return getattr(error, "strerror", None) or error


@dataclass(frozen=True)
class Probe:
    """What a clip is. height, width: pixels as displayed; times: seconds of its frames; seconds: its length."""

    height: int
    width: int
    times: tuple[float, ...]
    seconds: float

    def frames(self, frame_rate: float) -> int:
        """Frames it gives at another rate; a picture, or a clip of one frame, gives one."""
        return 1 if len(self.times) == 1 else max(1, math.floor(self.seconds * frame_rate + ROUNDING))


def probe(path: Path) -> Probe:
    """Decode a clip to its end, keeping no pixels. Raises Unusable as `decode` does."""
    times, first = [], None
    for frame in decode(path):
        first = first or (frame.height, frame.width)
        times.append(frame.time)
        seconds = frame.end
    return Probe(*first, tuple(times), seconds)


def clip_times(frames: int, frame_rate: float, start: float = 0.0) -> list[float]:
    """Seconds of a clip's frames at the target rate, (frames,)."""
    return [start + k / frame_rate for k in range(frames)]


def nearest(timed: Iterable[tuple[float, Any]], targets: Sequence[float]) -> Iterator[Any]:
    """For each target time the item nearest in time, of two the earlier. Both in rising order; reads no further than
    needed. Beyond the last item that item is given."""
    before, wanted = None, iter(targets)
    target = next(wanted, None)
    for time, item in timed:
        while target is not None and target <= time:
            yield before[1] if before is not None and target - before[0] <= time - target + TIE else item
            target = next(wanted, None)
        if target is None:
            return
        before = time, item
    while target is not None and before is not None:
        yield before[1]
        target = next(wanted, None)


def load_clip(path: str | Path, bucket: Bucket, frame_rate: float = 24.0, start: float | None = None,
              generator: torch.Generator | None = None) -> Tensor:
    """A clip at the bucket's size and the target frame rate, (3, F, h, w) float32 in [-1, 1].

    our reading: resize to cover (antialiased bilinear), centre crop, the nearest frame in time. start: seconds; None is
    0, or drawn evenly from all that fit when a generator is given. Raises Unusable as `decode` does, or "too short".
    """
    if start is None:
        spare = 0.0
        if generator is not None:
            found = probe(Path(path))
            spare = max(0, found.frames(frame_rate) - bucket.frames) / frame_rate
        start = spare * torch.rand((), generator=generator, device=generator.device).item() if spare else 0.0
    video = torch.empty(bucket.frames, 3, bucket.height, bucket.width)
    times = clip_times(bucket.frames, frame_rate, start)
    frames, last = decode(Path(path)), None
    for k, frame in enumerate(nearest(((frame.time, frame) for frame in frames), times)):
        if frame is not last:  # a slow clip shows one frame several times
            picture = frame.resized(cover(frame.height, frame.width, bucket), bucket) / 127.5 - 1    # (3, h, w)
            last = frame
        video[k] = picture
    available = 1 if last.time == 0 else (last.end - start) * frame_rate + ROUNDING  # one frame, however long shown
    if next(frames, None) is None and available < (bucket.frames if bucket.frames > 1 else 0):
        raise Unusable("too short", f"{Path(path).name}: {max(0, math.floor(available))} of {bucket.frames} frames")
    return video.transpose(0, 1)                                                          # (3, F, h, w)


# ------------------------------------------------------------ faces


class Faces(NamedTuple):
    """Faces of one clip: times (N,) in seconds, boxes (N, 4) and landmarks (N, 5, 2), NaN where there are none, in
    pixels of a picture of `size` (h, w); the detector looked `frame_rate` times a second."""

    frame_rate: float
    size: tuple[int, int]
    times: Tensor
    boxes: Tensor
    landmarks: Tensor


def load_faces(path: str | Path) -> Faces:
    """Read a faces file:

        {"frame_rate": 24, "size": [h, w], "frames": [{"t": 0.0, "box": [x0, y0, x1, y1],
                                                       "landmarks": [[x, y], ...] (5, optional)}, ...]}

    A frame that is absent has no face. size: of the upright picture that the detector saw. Raises ValueError.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        size, frame_rate = tuple(int(n) for n in data["size"]), float(data["frame_rate"])
        frames = sorted(data["frames"], key=lambda row: row["t"])
        times = torch.tensor([row["t"] for row in frames], dtype=torch.float64)
        boxes = torch.tensor([row["box"] for row in frames], dtype=torch.float32).reshape(-1, 4)
        none = [[math.nan] * 2] * 5
        marks = torch.tensor([row.get("landmarks") or none for row in frames], dtype=torch.float32).reshape(-1, 5, 2)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"expected a faces file with frame_rate, size and frames, got {told} in {path}; see load_faces"
                         ) from None
    if len(size) != 2 or min(size) < 1 or not 0 < frame_rate < 1e6 or not (len(times) == len(boxes) == len(marks)):
        raise ValueError(f"expected size [h, w] and a frame rate above 0, got {size} and {frame_rate} in {path}; "
                         "see load_faces")
    if not (times.isfinite().all() and boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()):
        raise ValueError(f"expected boxes [x0, y0, x1, y1], x1 > x0 and y1 > y0, got another in {path}; see load_faces")
    return Faces(frame_rate, size, times, boxes, marks)


def faces_for_clip(faces: Faces, bucket: Bucket, crop: Crop, times: Sequence[float]
                   ) -> tuple[Tensor, Tensor | None, Tensor]:
    """Faces at the times of a clip's frames, in its own pixels: boxes (F, 4), landmarks (F, 5, 2) or None, valid (F,).

    crop: `cover(height, width, bucket)`, the geometry the clip went through. valid is False, and the numbers 0, where
    no face was seen within half a detector step, or where less than half of its box is left after the crop.
    """
    if len(faces.times) == 0:
        return torch.zeros(len(times), 4), None, torch.zeros(len(times), dtype=torch.bool)
    distance = (torch.tensor(times, dtype=torch.float64)[:, None] - faces.times).abs()    # (F, N)
    gap, row = distance.min(dim=1)
    scale = torch.tensor([crop.columns / faces.size[1], crop.rows / faces.size[0]])
    shift = torch.tensor([float(crop.left), float(crop.top)])
    boxes = faces.boxes[row] * scale.repeat(2) - shift.repeat(2)                          # (F, 4)
    marks = faces.landmarks[row] * scale - shift                                          # (F, 5, 2)
    inside = boxes.clamp(min=0).minimum(torch.tensor([bucket.width, bucket.height] * 2))
    area, kept = ((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (boxes, inside))
    valid = (gap <= 0.5 / faces.frame_rate + TIE) & (kept >= 0.5 * area)
    boxes = torch.where(valid[:, None], boxes, 0.0)
    if faces.landmarks.isnan().all():
        return boxes, None, valid
    return boxes, torch.where(valid[:, None, None], marks, 0.0), valid


def box_mask(boxes: Tensor, valid: Tensor, height: int, width: int) -> Tensor:
    """Boxes (F, 4) -> mask (F, height, width), 1 on the face, for losses.pool_face_mask; all 0 where not valid."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5                          # pixel middles
    x0, y0, x1, y1 = boxes[:, :, None].unbind(dim=1)                                      # (F, 1) each
    across, down = (x >= x0) & (x < x1), (y >= y0) & (y < y1)                             # (F, w), (F, h)
    return (down[:, :, None] & across[:, None, :] & valid[:, None, None]).float()


# ------------------------------------------------------------ the manifest


@dataclass(frozen=True)
class Row:
    """One row. `broken` says why it cannot be used ("reason: detail"), None if nothing is known against it.

    bucket, found and frame_rate are filled in by `check`; start: seconds, where the target's own frames begin.
    """

    number: int
    video: Path | None = None
    caption: str = ""
    reference: Path | None = None
    identity: str = ""
    faces: Path | None = None
    broken: Unusable | None = None
    bucket: Bucket | None = None
    found: Probe | None = None
    frame_rate: float = 24.0
    start: float = 0.0

    def own_frames(self) -> range:
        """Which of the clip's stored frames the target is made of: from the first to the last of them."""
        times = clip_times(self.bucket.frames, self.frame_rate, self.start)
        own = list(nearest(zip(self.found.times, range(len(self.found.times)), strict=True), times))
        return range(own[0], own[-1] + 1)


def read_manifest(path: str | Path, allow_outside: bool = False, roots: Sequence[str | Path] = ()) -> list[Row]:
    """Rows of a manifest, the unusable ones with `broken` set. Numbers: lines of a JSONL file, else rows from 1.

    roots: folders, beside the manifest's own, that paths may lead into; allow_outside: anywhere. Symbolic links are
    followed first. Raises ValueError only when the manifest itself cannot be read, or holds no row.
    """
    path = Path(path)
    folders = [Path(root).resolve() for root in (path.parent, *roots)]
    rows = [_make_row(number, data, folders, allow_outside) for number, data in _read_table(path)]
    if not rows:
        raise ValueError(f"expected rows in {path}, got none; write one line for each clip")
    return rows


def _read_table(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        kind = path.suffix.lower()
        if kind in (".jsonl", ".ndjson"):
            return [(n, _parse_line(line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        if kind == ".csv":
            data = list(csv.DictReader(text.splitlines(keepends=True), strict=True))
        elif kind == ".json":
            data = json.loads(text)
            data = data["data"] if isinstance(data, dict) and "data" in data else data
        else:
            raise ValueError("its name ends otherwise")
        if not isinstance(data, list):
            raise ValueError("no list inside")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"expected a manifest (.jsonl, .json or .csv), got {path}: {error}; see the README") from None
    return list(enumerate(data, 1))


def _parse_line(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unusable("bad row", error)


def _make_row(number, data, folders, allow_outside):
    try:
        if isinstance(data, Unusable):
            raise data
        if not isinstance(data, dict):
            raise Unusable("bad row", "not a table of names and values")
        text = {name: data.get(name) or "" for name in FIELDS}
        for name, value in text.items():
            if not isinstance(value, str):
                raise Unusable("bad row", f"{name} is {value!r:.40}, not a text")
        video = text["video"] or text["media_path"]
        if not video:
            raise Unusable("bad row", "neither video nor media_path")
        if not text["caption"].strip():
            raise Unusable("empty caption", video)
        paths = [_locate(name, folders, allow_outside) if name else None
                 for name in (video, text["reference"], text["faces"])]
    except Unusable as error:
        return Row(number, broken=error)
    return Row(number, paths[0], text["caption"].strip(), paths[1], text["identity"], paths[2])


def _locate(name, folders, allow_outside):
    try:
        path = (folders[0] / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
        raise Unusable("missing file", f"{name}: {error}") from None
    if not allow_outside:
        if ".." in Path(name).parts:
            raise Unusable("path outside", f"{name} contains ..")
        if not any(path.is_relative_to(folder) for folder in folders):
            raise Unusable("path outside", f"{name} leads to {path}; name its folder with --root")
    return path


# ------------------------------------------------------------ the check


@dataclass(frozen=True)
class Report:
    """What `check` found: rows that are used, with bucket and probe, and the others, with `broken`."""

    used: list[Row]
    refused: list[Row]

    def lines(self) -> list[str]:
        """One line for each row that is not used, then the summary."""
        lines = [f"row {row.number}: {row.broken}" for row in self.refused]
        total = len(self.used) + len(self.refused)
        lines.append(f"{len(self.used)} of {total} rows are used")
        for title, counts in (("not used", Counter(row.broken.reason for row in self.refused)),
                              ("buckets", Counter(str(row.bucket) for row in self.used))):
            if counts:
                lines[-1] += f"; {title}: " + ", ".join(f"{name} {n}" for name, n in counts.most_common())
        return lines


def check(manifest: str | Path, buckets: Sequence[Bucket] | None = None, frame_rate: float = 24.0,
          allow_outside: bool = False, roots: Sequence[str | Path] = ()) -> Report:
    """Decode every clip of a manifest once and sort the rows. Raises ValueError when the manifest is unreadable."""
    buckets = parse_buckets(DEFAULT_BUCKETS) if buckets is None else buckets
    rows = [check_row(row, buckets, frame_rate)
            for row in tqdm(read_manifest(manifest, allow_outside, roots), desc="check", unit="row", disable=None)]
    return Report([row for row in rows if row.broken is None], [row for row in rows if row.broken is not None])


def check_row(row: Row, buckets: Sequence[Bucket], frame_rate: float = 24.0) -> Row:
    """The row with bucket and probe filled in, or with `broken`."""
    if row.broken is not None:
        return row
    try:
        found = probe(row.video)
        bucket = choose_bucket(found.height, found.width, found.frames(frame_rate), buckets)
        if row.faces is not None:
            _check_faces(row.faces, found)
        if row.reference is not None:
            try:
                open_picture(row.reference)
            except Unusable as error:
                raise Unusable("bad reference", error.detail) from None
    except Unusable as error:
        return replace(row, broken=error)
    except OSError as error:  # no permission, a name too long
        return replace(row, broken=Unusable("missing file", error))
    return replace(row, bucket=bucket, found=found, frame_rate=frame_rate)


def _check_faces(path, found):
    try:
        height, width = load_faces(path).size
    except ValueError as error:
        raise Unusable("bad faces file", error) from None
    if abs(math.log(height / width * found.width / found.height)) > 0.02:
        raise Unusable("bad faces file", f"{path.name}: size {height}x{width} has another shape than the clip's "
                                         f"{found.height}x{found.width}; detect on upright frames")


# ------------------------------------------------------------ references


class Drawn(NamedTuple):
    """A reference. source: "given", "other clip", "other moment" or "own frame"; box (4,), landmarks (5, 2) in the
    picture's pixels, None where a faces file does not say."""

    picture: Image.Image
    source: str
    box: Tensor | None
    landmarks: Tensor | None


def draw_reference(rows: Sequence[Row], i: int, generator: torch.Generator) -> Drawn:
    """A picture of the person in row i, for reference.letterbox.

    our reading: the row's own picture; else a frame of another clip of the same identity; else a frame of the same clip
    outside the target's own span; only where none of these exists a frame of the target itself (the paper wants the
    person, not the picture, to be copied). With a faces file, a frame with a face is preferred. rows: `Report.used`.
    """
    row = rows[i]
    if row.reference is not None:
        return Drawn(open_picture(row.reference), "given", None, None)
    others = [other for other in rows if row.identity and other.identity == row.identity and other.video != row.video]
    if others:
        row = others[_randint(len(others), generator)]
        return _draw_frame(row, list(range(len(row.found.times))), "other clip", generator)
    own = row.own_frames()
    rest = [k for k in range(len(row.found.times)) if k not in own]
    return _draw_frame(row, rest or list(own), "other moment" if rest else "own frame", generator)


def _draw_frame(row, indices, source, generator):
    probe, boxes, marks = row.found, None, None
    if row.faces is not None:
        whole = Bucket(probe.height, probe.width, 1)
        boxes, marks, valid = faces_for_clip(load_faces(row.faces), whole, cover(*whole[:2], whole), probe.times)
        seen = [k for k in indices if valid[k]]
        indices, boxes = seen or indices, boxes if seen else None
    wanted = indices[_randint(len(indices), generator)]
    frame = next(frame for k, frame in enumerate(decode(row.video)) if k == wanted)
    picture = Image.fromarray(frame.pixels())
    if picture.size != (frame.width, frame.height):
        picture = picture.resize((frame.width, frame.height), Image.Resampling.BILINEAR)
    landmarks = None if boxes is None or marks is None or marks[wanted].isnan().any() else marks[wanted]
    return Drawn(picture, source, None if boxes is None else boxes[wanted], landmarks)


def _randint(count, generator):
    return int(torch.randint(count, (), generator=generator, device=generator.device))


# ------------------------------------------------------------ the cache


def content_hash(path: Path, known: dict[str, list]) -> str:
    """sha256 of all bytes; `known` remembers it by path, size and time of change, and is added to."""
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    if known.get(str(path), [None])[:-1] != stamp:
        with path.open("rb") as file:
            known[str(path)] = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
    return known[str(path)][-1]


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights, so that another VAE never finds this one's latents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _key(**settings):
    return hashlib.sha256(json.dumps({"format": FORMAT, **settings}, sort_keys=True).encode()).hexdigest()


def _save(path, key, tensor):
    write_file(path, {"x": tensor}, {"key": key, "sha256": hashlib.sha256(_bytes(tensor)).hexdigest()})


def _is_whole(path, key):
    try:
        with open_file(path) as file:
            found = file.metadata()
            return found["key"] == key and found["sha256"] == hashlib.sha256(_bytes(file.get_tensor("x"))).hexdigest()
    except (ValueError, KeyError, OSError):
        return False


def _load(path):
    with open_file(path) as file:
        return file.get_tensor("x")


class CachedLatents:
    """Latents of rows, read when asked for. `latents[i]` is (C, F', H, W); `groups`: bucket -> its row indices."""

    def __init__(self, rows: Sequence[Row], paths: Sequence[Path]):
        self.rows, self.paths = list(rows), list(paths)
        self.groups: dict[Bucket, list[int]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            self.groups[row.bucket].append(i)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        return _load(self.paths[i])

    def batches(self, bucket: Bucket, size: int, generator: torch.Generator | None = None
                ) -> Iterator[tuple[list[int], Tensor]]:
        """Each clip of the bucket once: row indices and latents (B, C, F', H, W), the last batch perhaps smaller. In
        random order when a generator is given."""
        group = self.groups[bucket]
        order = torch.arange(len(group))
        if generator is not None:
            order = torch.randperm(len(group), generator=generator, device=generator.device)
        indices = [group[k] for k in order.tolist()]
        for k in range(0, len(indices), size):
            part = indices[k : k + size]
            yield part, torch.stack([self[i] for i in part])


@torch.no_grad()
def cache_latents(rows: Sequence[Row], vae: nn.Module, encode: Callable[[Tensor], Tensor], folder: str | Path
                  ) -> CachedLatents:
    """Latents of checked rows (`Report.used`), computed where the folder does not hold them yet.

    encode: (1, 3, F, h, w) -> (1, C, F', H, W), usually vae.encode; the clip is on the CPU, so move it inside where the
    VAE is elsewhere. vae is only hashed. Stop it at any moment and call it again; a damaged file is made anew. Raises
    Unusable with the row's number when a clip has changed since the check.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, list_of_hashes, paths = weights_hash(vae), folder / "hashes.json", []
    try:
        known = json.loads(list_of_hashes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}  # it only saves time
    try:
        for row in tqdm(rows, desc="latents", unit="clip", disable=None):
            key = _key(content=content_hash(row.video, known), picture=row.video.suffix.lower() in IMAGES, vae=weights,
                       bucket=list(row.bucket), frame_rate=row.frame_rate, start=row.start)
            paths.append(folder / f"{key}.safetensors")
            if not _is_whole(paths[-1], key):
                try:
                    clip = load_clip(row.video, row.bucket, row.frame_rate, row.start)
                except Unusable as error:
                    detail = f"row {row.number}, {error.detail}; check the manifest again"
                    raise Unusable(error.reason, detail) from None
                _save(paths[-1], key, encode(clip[None])[0])
    finally:
        beside = list_of_hashes.with_suffix(".partial")
        beside.write_text(json.dumps(known), encoding="utf-8")
        beside.replace(list_of_hashes)
    return CachedLatents(rows, paths)


@torch.no_grad()
def cache_contexts(captions: Sequence[str], encode: Callable[[list[str]], Tensor], folder: str | Path, key: str
                   ) -> dict[str, Callable[[], Tensor]]:
    """Contexts of captions, each distinct one computed once: `contexts[caption]()` reads it, (N, D).

    encode: list of one caption -> (1, N, D). key: whatever the context depends on beside the caption, such as
    weights_hash of the text encoder. Resumable, and damaged files are made anew, as in `cache_latents`.
    """
    folder, paths = Path(folder), {}
    for caption in tqdm(dict.fromkeys(captions), desc="captions", unit="caption", disable=None):
        name = _key(caption=caption, encoder=key)
        paths[caption] = folder / f"{name}.safetensors"
        if not _is_whole(paths[caption], name):
            _save(paths[caption], name, encode([caption])[0])
    return {caption: (lambda path=path: _load(path)) for caption, path in paths.items()}


# ------------------------------------------------------------ command line


def _load_vae(checkpoint: Path) -> nn.Module:
    from vae import VideoVAE

    with torch.device("meta"):
        vae = VideoVAE(read_metadata(checkpoint)["config"]["vae"])
    return load_weights(vae, checkpoint, "vae.", torch.float32, "cuda" if torch.cuda.is_available() else "cpu")


def main() -> int:
    """Exit status: 0 every row is used, 1 some are not, 2 the manifest (or another argument) cannot be used."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = p.add_subparsers(dest="command")
    for name, words in (("check", "say how many rows are used and why each other one is not"),
                        ("cache", "check, then compute the latents of the rows that are used")):
        c = commands.add_parser(name, help=words, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        c.add_argument("manifest", type=Path)
        c.add_argument("--buckets", default=DEFAULT_BUCKETS, help="height x width x frames, separated by commas")
        c.add_argument("--frame-rate", type=float, default=24.0)
        c.add_argument("--root", action="append", default=[], help="a folder that paths may lead into; repeatable")
        c.add_argument("--allow-outside", action="store_true", help="paths may lead anywhere")
        if name == "cache":
            c.add_argument("--checkpoint-path", dest="checkpoint", type=Path, required=True, help="holds the VAE")
            c.add_argument("--folder", type=Path, default=Path("cache"), help="where the latents are kept")
        else:
            c.add_argument("--time-scale", type=int, default=8, help="the VAE's frames per latent frame (tiny: 4)")
            c.add_argument("--space-scale", type=int, default=32, help="the VAE's pixels per latent cell (tiny: 8)")
    args = p.parse_args()
    if args.command is None:
        p.print_help()
        return 0
    try:
        if not 0 < args.frame_rate < 1e6:
            raise ValueError(f"expected a frame rate above 0, got {args.frame_rate}; use for example 24")
        vae = _load_vae(args.checkpoint) if args.command == "cache" else None
        scales = (args.time_scale, args.space_scale) if vae is None else (vae.time_scale, vae.space_scale)
        buckets = parse_buckets(args.buckets, *scales)
        report = check(args.manifest, buckets, args.frame_rate, args.allow_outside, args.root)
        print("\n".join(report.lines()))
        if vae is not None:
            device = next(vae.parameters()).device
            latents = cache_latents(report.used, vae, lambda clip: vae.encode(clip.to(device)), args.folder)
            print(f"{len(latents)} latents in {args.folder}")
    except ValueError as error:
        print(f"clips.py: {error}", file=sys.stderr)
        return 2
    return 1 if report.refused else 0


if __name__ == "__main__":
    sys.exit(main())
