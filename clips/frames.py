"""Any file -> frames: what lies between a folder of other people's videos and tensors of one shape.

The idea. A clip is frames with times, not a row of pictures. Phones film sideways and say so in the header; frame rates
differ, and wobble; an edit list hides the beginning; a copy was cut off. Counting frames as they come then gives
motion at the wrong speed, faces lying on their side, or a clip that ends in the middle, and no error. So every frame
is taken by its time and turned as the header says, and a file that cannot give what it announces raises `Unusable`.

What comes out has a bucket's size: batches need one shape, so a clip is resized to cover the bucket nearest in shape
and cropped around its middle.

paper:        no word on preparing data (ST-DRC, arXiv 2606.02441).
our reading:  nearest frame in time, of two the earlier; resize to cover (antialiased bilinear), centre crop.
LTX-2.3:      frames 8k+1, sides multiples of 32, 24 frames per second; the tiny VAE has 4k+1 and 8.

Conventions. Clips (3, F, h, w) in [-1, 1]; sizes height before width, of the upright picture; "512x768x121" = height x
width x frames; times in seconds after the clip's first frame. start 0 = from the first frame.

    found = probe(path)                                                        # decodes to the end, keeps no pixels
    bucket = choose_bucket(found.height, found.width, found.frames(24.0), parse_buckets("512x768x121,512x768x1"))
    clip = load_clip(path, bucket, frame_rate=24.0)                            # (3, 121, 512, 768)
    picture = frame_at(path, found.times, 70).pixels()                         # (h, w, 3) uint8, as stored

Read next: clips.py
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image, ImageOps
from torch import Tensor

from common.files import one_line
from reference import letterbox

FORMAT = 1          # of the cached files and of the way clips are decoded; a change here makes every cached latent new
MAX_ENLARGE = 1.1   # our reading: a little (1080 rows for a bucket of 1088) cannot be seen, more teaches blur
TIE = 0.0015        # seconds; two frames equally near, up to the rounding of timestamps (Matroska: 1 ms): the earlier
ROUNDING = 0.05     # of a frame; a clip of n frames whose timestamps were rounded still has n frames
# What a picture may hold, whatever its name says. Pillow knows thirty more, and starts a program (Ghostscript) for one.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MOST_PIXELS = 178_956_970  # of a frame; Pillow's limit for a picture. A header of 100 bytes can announce any size
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DEFAULT_BUCKETS = "512x768x121,768x512x121,512x768x1,768x512x1"  # LTX-2.3's default size, its upright twin, and images


class Unusable(ValueError):
    """A row or clip that cannot be used: `reason` is one of a few words to count by, `detail` says what was found."""

    def __init__(self, reason: str, detail: object):
        self.reason, self.detail = reason, one_line(detail, 400)
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
    """A picture, read to its end and turned upright (EXIF); of an animation the first. Raises Unusable."""
    if not path.is_file():  # also keeps pipes and devices from being read
        raise Unusable("missing file", f"a folder at {path}" if path.is_dir() else path)
    Image.init()
    formats = [name for name in PICTURES if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken camera notes, and large photos below Pillow's limit
            with Image.open(path, formats=formats) as image:
                picture = ImageOps.exif_transpose(image)  # a copy, hence read to its end
        picture.info = {key: value for key, value in picture.info.items() if key == "transparency"}  # it is turned already
        return picture
    except Exception as error:  # decoders raise nearly every type there is on damaged files
        raise Unusable("cannot be decoded", f"{path.name}: {error}") from None


def decode(path: Path) -> Iterator[Frame]:
    """Every frame of a video or picture, in the order of display. Sound is ignored.

    Raises Unusable: "missing file", "no video stream", "cannot be decoded", or, after the last frame that could be
    read, "cut off" when the file announces more.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGES and path.is_file() and path.stat().st_size:
        image = open_picture(path)
        yield Frame(0.0, 0.0, image.height, image.width, image)
        return
    with _opened(path) as (container, stream):
        yield from _decode_stream(container, stream, path.name)


@contextmanager
def _opened(path):
    """The file's container and the stream to decode."""
    if not path.is_file():  # also keeps pipes and devices from being read
        raise Unusable("missing file", path)
    if path.stat().st_size == 0:
        raise Unusable("cannot be decoded", f"{path.name}: an empty file")
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
            if streams[0].codec_context is None:
                raise Unusable("cannot be decoded", f"{path.name}: in a form that this FFmpeg does not know")
            streams[0].thread_type = "AUTO"
            streams[0].codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            yield container, streams[0]


def _usual_length(stream):
    return float(1 / (stream.average_rate or stream.guessed_rate or 24))


def _frame(frame, now, stream):
    """A decoded frame with its time, its length and its size as displayed."""
    length = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else _usual_length(stream)
    height, width = frame.height, max(1, round(frame.width * float(stream.sample_aspect_ratio or 1)))
    if round(frame.rotation / 90) % 2:
        height, width = width, height
    return Frame(now, now + length, height, width, frame)


def _decode_stream(container, stream, name):
    usual = _usual_length(stream)
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
        now, count = stamp - first, count + 1
        shown = _frame(frame, now, stream)
        end, length = shown.end, shown.end - now
        yield shown
    if count == 0:
        raise Unusable("cannot be decoded", f"{name}: {_told(error) if error else 'no frame inside'}")
    announced = _announced_seconds(container, stream)
    missing = announced is not None and announced - end > max(0.5 * length, 0.002)
    if missing and stream.frames > count:
        raise Unusable("cut off", f"{name}: {count} of {stream.frames} frames")
    if missing and not stream.frames and announced - end > 2 * length + 0.1:
        raise Unusable("cut off", f"{name}: {end:.2f} of {announced:.2f} seconds")
    if error:
        raise Unusable("cannot be decoded", f"{name}: {_told(error)} after {count} frames")


def frame_at(path: str | Path, times: Sequence[float], index: int) -> Frame:
    """The stored frame number `index` of a file whose frames have `times` (Probe.times): list(decode(path))[index].

    A late frame of a long video would cost decoding all before it. So: seek to the key frame before its time and decode
    from there until the time is met (up to TIE). Where that cannot be trusted (no seeking, no timestamps, frames
    nearer than TIE, no key frame met on the way), everything before is decoded after all.
    Raises ValueError for an index that is not there, Unusable as `decode` does, or "cut off".
    """
    path = Path(path)
    if not 0 <= index < len(times):
        raise ValueError(f"expected a frame number below {len(times)}, got {index}; use the times of this file")
    around = times[max(0, index - 1) : index + 2]
    distinct = all(late - early > TIE for early, late in zip(around, around[1:], strict=False))
    frame = _sought(path, times[index]) if index and distinct and path.suffix.lower() not in IMAGES else None
    if frame is None:
        frame = next(islice(decode(path), index, None), None)
    if frame is None:
        raise Unusable("cut off", f"{path.name}: fewer than {index + 1} frames")
    return frame


def _sought(path, target):
    """The frame at `target` seconds by seeking, None where there is doubt. Back twice: some files seek by the order
    of decoding, and then the key frame found may be shown after the target."""
    with _opened(path) as (container, stream):
        try:
            first = next(container.decode(stream)).time
            for back in (0.0, 2.0):
                offset = round((first + max(0.0, target - back)) / stream.time_base)
                container.seek(offset, stream=stream, backward=True)
                whole = False  # frames before the first key frame may lack what they were predicted from
                for frame in container.decode(stream):
                    now = frame.time - first
                    if now > target + TIE:
                        break
                    whole = whole or frame.key_frame
                    if whole and now >= target - TIE:
                        return None if frame.is_corrupt else _frame(frame, now, stream)
        except (av.FFmpegError, OSError, ValueError, TypeError, StopIteration):  # TypeError: a frame without a time
            pass
    return None


def _announced_seconds(container, stream):
    """What the header says, None if nothing trustworthy. An edit list may hide frames: then the seconds are right."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if "matroska" in container.format.name and (text := stream.metadata.get("DURATION")):
        numbers = re.fullmatch(r"(\d+):(\d+):([\d.]{1,20})", text)
        return int(numbers[1]) * 3600 + int(numbers[2]) * 60 + float(numbers[3]) if numbers else None
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

