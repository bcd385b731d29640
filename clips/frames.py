"""Any file -> frames: what lies between a folder of other people's videos and tensors of one shape.

The idea. A clip is frames with times, not a row of pictures. Phones film sideways and say so in the
header; frame rates differ, and wobble; an edit list hides the beginning; a copy was cut off. Taking
frames as they come gives motion at the wrong speed, faces lying on their side, or a clip that ends
in the middle, and no error. So every frame is taken by its time and turned as the header says, and
a file that cannot give what it announces raises `Unusable`.

paper:        no word on preparing data (ST-DRC, arXiv 2606.02441).
our reading:  nearest frame in time, of two the earlier. A batch has one shape: resize (antialiased
              bilinear) to cover the bucket nearest in shape, crop around the middle.
LTX-2.3:      8k+1 frames, sides multiples of 32, 24 frames a second; the tiny VAE has 4k+1 and 8.

Conventions. Clips (3, F, h, w) in [-1, 1]; sizes height before width, of the upright picture;
"512x768x121" = height x width x frames; times in seconds after the clip's first frame.

    found = probe(path)                                    # decodes to the end, keeps no pixels
    buckets = parse_buckets("512x768x121,512x768x1")
    bucket = choose_bucket(found.height, found.width, found.frames(24.0), buckets)
    clip = load_clip(path, bucket, frame_rate=24.0)        # (3, 121, 512, 768)
    picture = frame_at(path, found.times, 70).pixels()     # (h, w, 3) uint8, as stored

Read next: clips/manifest.py
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor

from clips.container import announced_size, announced_time, is_still, picture_stream
from clips.pictures import MOST_PIXELS, Unusable, open_picture, to_srgb

DEFAULT_BUCKETS = "512x768x121,768x512x121,512x768x1,768x512x1"  # LTX-2.3's size, also upright
FORMAT = 2          # of cached files and of decoding; a change here makes every cached latent new
MAX_ENLARGE = 1.1   # our reading: 1080 rows for a bucket of 1088 cannot be seen, more teaches blur
TIE = 0.0015        # seconds; two frames are equally near up to rounded timestamps (Matroska: 1 ms)
ROUNDING = 0.05     # of a frame; n frames whose timestamps were rounded are still n frames


# ------------------------------------------------------------ buckets


class Bucket(NamedTuple):
    """One shape that batches are made of: pixels and frames."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


def parse_buckets(text: str, time_scale: int = 8, space_scale: int = 32) -> list[Bucket]:
    """ "512x768x121,768x512x121" -> buckets. Scales: those of the VAE (LTX-2.3: 8 and 32).

    Raises ValueError unless sides are multiples of space_scale and frames 1 + one of time_scale.
    """
    buckets = []
    for part in text.split(","):
        try:
            bucket = Bucket(*(int(n) for n in part.strip().split("x")))
        except (ValueError, TypeError):
            raise ValueError("expected buckets such as 512x768x121 (height x width x frames), got "
                             f"{part!r}; separate several by commas") from None
        if min(bucket) < 1 or bucket.height % space_scale or bucket.width % space_scale:
            raise ValueError(f"expected sides that are multiples of {space_scale}, "
                             f"got {bucket}; round them")
        if more := (bucket.frames - 1) % time_scale:
            raise ValueError(f"expected {time_scale}k+1 frames, got {bucket.frames}; "
                             f"use {bucket.frames - more}")
        buckets.append(bucket)
    return buckets


def choose_bucket(height: int, width: int, frames: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket nearest in shape that the clip fills; of several the longest, then the largest.

    our reading. frames: at the target frame rate, 1 for an image. A clip fills a bucket that it
    need not be enlarged for by more than MAX_ENLARGE, and whose frames it has. Raises Unusable
    ("too small", "too short") when it fills none.
    """
    large = [b for b in buckets if max(b.height / height, b.width / width) <= MAX_ENLARGE]
    if not large:
        smallest = min(buckets, key=lambda b: b.height * b.width)
        raise Unusable("too small", f"{height}x{width}, the smallest bucket is {smallest}")
    fit = [b for b in large if b.frames <= frames]
    if not fit:
        shortest = min(b.frames for b in large)
        raise Unusable("too short", f"{frames} frames, the shortest bucket has {shortest}")
    shape = math.log(height / width)
    return min(fit, key=lambda b: (abs(math.log(b.height / b.width) - shape),
                                   -b.frames, -b.height * b.width))


class Crop(NamedTuple):
    """Resize to rows x columns, then keep the bucket's size from (top, left) on."""

    rows: int
    columns: int
    top: int
    left: int


def cover(height: int, width: int, bucket: Bucket) -> Crop:
    """Resize until both sides cover the bucket, aspect kept to a pixel; crop around the middle."""
    scale = max(bucket.height / height, bucket.width / width)
    rows = max(bucket.height, round(height * scale))
    columns = max(bucket.width, round(width * scale))
    return Crop(rows, columns, (rows - bucket.height) // 2, (columns - bucket.width) // 2)


# ------------------------------------------------------------ decoding


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame, not yet RGB. time, end: seconds; height, width: pixels as displayed."""

    time: float
    end: float
    height: int
    width: int
    source: av.VideoFrame | Image.Image

    def pixels(self) -> np.ndarray:
        """RGB, upright, (h, w, 3) uint8; pixels that are not square are not stretched yet. What is
        transparent lies on white."""
        if isinstance(self.source, Image.Image):
            return np.asarray(self.source)
        # Files often leave the colour matrix unsaid; players then take BT.709 for HD, BT.601 below.
        unsaid = self.source.colorspace == 2 and self.source.height >= 720
        matrix = "ITU709" if unsaid else None
        if not any(component.is_alpha for component in self.source.format.components):
            rgb = self.source.to_ndarray(format="rgb24", src_colorspace=matrix)
        else:
            rgb = self.source.to_ndarray(format="rgba", src_colorspace=matrix)
            share = rgb[:, :, 3:] / np.float32(255)
            rgb = (rgb[:, :, :3] * share + 255 * (1 - share)).round().astype(np.uint8)
        if profile := _profile(self.source):
            rgb = np.asarray(to_srgb(Image.fromarray(rgb), bytes(profile), "a frame"))
        turned, right, down = _display(self.source)
        rgb = rgb.swapaxes(0, 1) if turned else rgb
        return np.ascontiguousarray(rgb[::down, ::right])

    def beyond_srgb(self) -> bool:
        """Whether a video says that it is HDR (PQ, HLG) or has the primaries of BT.2020 or P3, by
        the numbers of ITU-T H.273, and holds no profile that says more."""
        return isinstance(self.source, av.VideoFrame) and not _profile(self.source) and (
            self.source.color_trc in (16, 18) or self.source.color_primaries in (9, 11, 12))

    def resized(self, crop: Crop, bucket: Bucket) -> Tensor:
        """(3, h, w) uint8 of the bucket's size, antialiased."""
        x = torch.from_numpy(self.pixels().copy()).permute(2, 0, 1)[None]           # (1, 3, h, w)
        x = nnf.interpolate(x, (crop.rows, crop.columns), mode="bilinear", antialias=True)
        return x[0, :, crop.top :, crop.left :][:, : bucket.height, : bucket.width]


def _display(frame):
    """How the stored picture is shown: whether rows become columns, and then the direction of the
    columns and of the rows, 1 or -1. Phones turn, selfie cameras mirror."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside notes of a kind that PyAV has no name for (Exif): only the angle
        quarter = round(frame.rotation / 90) % 4
        return quarter % 2 == 1, -1 if quarter in (2, 3) else 1, -1 if quarter in (1, 2) else 1
    if matrix is None:
        return False, 1, 1
    # A point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = (int(n) for n in np.frombuffer(matrix, np.int32)[:5])
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    right, down = (c, b) if turned else (a, d)
    return turned, -1 if right < 0 else 1, -1 if down < 0 else 1


def _profile(frame):
    """The ICC profile of a HEIC picture or a film of JPEGs, None where there is none."""
    try:
        return frame.side_data.get("ICC_PROFILE")
    except ValueError:  # beside notes of a kind that PyAV has no name for (Exif): it shows nothing
        return None


def _undecodable(path, told):
    return Unusable("cannot be decoded", f"{path.name}: {told}")


def decode_still(path: Path) -> Iterator[Frame]:
    """A picture file, whatever its ending, as a clip of one frame. Raises Unusable."""
    image = open_picture(path)
    yield Frame(0.0, 0.0, image.height, image.width, image)


def decode(path: Path) -> Iterator[Frame]:
    """Every frame of a video or picture, in the order of display. Sound is ignored.

    Raises Unusable: "missing file", "no video stream", "cannot be decoded", or, after the last
    frame that could be read, "cut off" when the file announces more; missing bytes are noticed
    before the first.
    """
    path = Path(path)
    if path.is_file() and _is_still(path):
        yield from decode_still(path)
        return
    with _opened(path) as (container, stream):
        yield from _decode_stream(container, stream, path)


def _is_still(path):
    try:
        return is_still(path)
    except Exception as error:  # decoders raise nearly every type there is on damaged files
        raise _undecodable(path, error) from None


@contextmanager
def _opened(path):
    """The container of a clip and the stream to decode."""
    if not path.is_file():  # also keeps pipes and devices from being read
        raise Unusable("missing file", path)
    size, announced = path.stat().st_size, announced_size(path)
    if size == 0:
        raise _undecodable(path, "an empty file")
    if size < announced:
        raise Unusable("cut off", f"{path.name}: {size:,} of {announced:,} bytes")
    with path.open("rb") as file:
        try:  # A playlist may name other files or addresses; no protocol is left to open those.
            container = av.open(file, options={"protocol_whitelist": "none"},
                                metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            raise _undecodable(path, _told(error)) from None
        with container:
            if not container.streams:
                raise _undecodable(path, "only the beginning of a file")
            try:
                stream = picture_stream(container)
            except ValueError as error:
                raise _undecodable(path, error) from None
            if stream is None:
                raise Unusable("no video stream", path.name)
            if stream.codec_context is None:
                raise _undecodable(path, "in a form that this FFmpeg does not know")
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            yield container, stream


def _told(error):
    return getattr(error, "strerror", None) or error


def _usual_length(stream):
    return float(1 / (stream.average_rate or stream.guessed_rate or 24))


def _frame(frame, now, stream):
    """A decoded frame with its time, its length and its size as displayed."""
    length = _usual_length(stream)
    if frame.duration and frame.time_base:
        length = float(frame.duration * frame.time_base)
    aspect = float(stream.sample_aspect_ratio or 1)
    height, width = frame.height, max(1, round(frame.width * aspect))
    if _display(frame)[0]:
        height, width = width, height
    return Frame(now, now + length, height, width, frame)


def _decode_stream(container, stream, path):
    usual = _usual_length(stream)
    first, count, now, error = None, 0, -usual, None
    frames = _progressive(_decoded(container, stream), stream)
    while True:
        try:
            frame = next(frames, None)
        except (av.FFmpegError, OSError, ValueError) as problem:
            frame, error = None, problem
        if frame is None:
            break
        stamp = frame.time
        if stamp is None:  # raw streams have no timestamps
            stamp = (first or 0.0) + now + usual
        first = stamp if first is None else first
        now, count = stamp - first, count + 1
        shown = _frame(frame, now, stream)
        end, length = shown.end, shown.end - now
        yield shown
    if count == 0:
        raise _undecodable(path, _told(error) if error else "no frame inside")
    announced, slack = announced_time(container, stream, length)
    if announced - (first + end) > slack:
        told = f"{end:.2f} of {announced - first:.2f} seconds"
        raise Unusable("cut off", f"{path.name}: {told}")
    if error:
        raise _undecodable(path, f"{_told(error)} after {count} frames")


def _decoded(container, stream):
    """The stream's frames. FFmpeg's own decoders of VP8 and VP9 leave out what is transparent."""
    name, tags = stream.codec_context.name, stream.metadata
    if "1" not in (tags.get("alpha_mode"), tags.get("ALPHA_MODE")) or name not in ("vp8", "vp9"):
        yield from container.decode(stream)
        return
    coder = av.CodecContext.create("libvpx" if name == "vp8" else "libvpx-vp9", "r")
    coder.options = {"max_pixels": str(MOST_PIXELS)}
    for packet in container.demux(stream):
        yield from coder.decode(packet if packet.size else None)


def _progressive(frames, stream):
    """The frames, from the first interlaced one on through a deinterlacer. Such a frame holds two
    moments, one in the even rows and one in the odd; what moves has teeth. It stays one frame."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            steps = [graph.add_buffer(template=stream),
                     graph.add("bwdif", "mode=send_frame:deint=interlaced"),
                     graph.add("buffersink")]
            graph.link_nodes(*steps).configure()
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _filtered(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _filtered(graph)


def _filtered(graph):
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):  # it waits for the next frame; it is done
            return


def frame_at(path: str | Path, times: Sequence[float], index: int) -> Frame:
    """list(decode(path))[index], faster. times: of the file's frames (Probe.times).

    Seeks to the key frame before and decodes until the time is met (up to TIE). Where that cannot
    be trusted (no seeking, no timestamps, frames nearer than TIE, no key frame on the way, two
    fields), decodes from the beginning. Raises ValueError for another index, Unusable as `decode`
    does.
    """
    path = Path(path)
    if not 0 <= index < len(times):
        raise ValueError(f"expected a frame number below {len(times)}, got {index}; "
                         "use the times of this file")
    around = times[max(0, index - 1) : index + 2]
    distinct = all(late - early > TIE for early, late in zip(around, around[1:], strict=False))
    frame = _sought(path, times[index]) if index and distinct else None
    frame = frame or next(islice(decode(path), index, None), None)
    if frame is None:
        raise Unusable("cut off", f"{path.name}: fewer than {index + 1} frames")
    return frame


def _sought(path, target):
    """The frame at `target` seconds by seeking, None where there is doubt. Two tries: some files
    seek by the order of decoding, and then the key frame found may be shown after the target."""
    with _opened(path) as (container, stream):
        try:
            first = next(_decoded(container, stream)).time
            for back in (0.0, 2.0):
                offset = round((first + max(0.0, target - back)) / stream.time_base)
                container.seek(offset, stream=stream, backward=True)
                key_met = False  # frames before a key frame may lack what they were predicted from
                for frame in _decoded(container, stream):
                    now = frame.time - first
                    if now > target + TIE or frame.interlaced_frame:
                        break
                    key_met = key_met or frame.key_frame
                    if key_met and now >= target - TIE:
                        return None if frame.is_corrupt else _frame(frame, now, stream)
        except (av.FFmpegError, OSError, ValueError, TypeError, StopIteration):
            pass  # TypeError: a frame without a time
    return None


# ------------------------------------------------------------ clips


@dataclass(frozen=True)
class Probe:
    """What a clip is: pixels as displayed, seconds of each of its frames, seconds in all; whether
    its colours reach beyond sRGB (HDR and the like), for which `pixels` takes them all the same."""

    height: int
    width: int
    times: tuple[float, ...]
    seconds: float
    beyond_srgb: bool = False

    def frames(self, frame_rate: float) -> int:
        """Frames it gives at another rate; a picture, or a clip of one frame, gives one."""
        several = math.floor(self.seconds * frame_rate + ROUNDING)
        return 1 if len(self.times) == 1 else max(1, several)


def probe(path: Path, look: Callable[[Path], Iterator[Frame]] = decode) -> Probe:
    """Decode a clip to its end, keeping no pixels. Raises Unusable as `decode` does."""
    times, size = [], None
    for frame in look(path):
        if size is None:
            size, beyond = (frame.height, frame.width), frame.beyond_srgb()
        times.append(frame.time)
        seconds = frame.end
    return Probe(*size, tuple(times), seconds, beyond)


def clip_times(frames: int, frame_rate: float, start: float = 0.0) -> list[float]:
    """Seconds of a clip's frames at the target rate, (frames,)."""
    return [start + k / frame_rate for k in range(frames)]


def nearest(timed: Iterable[tuple[float, Any]], targets: Sequence[float]) -> Iterator[Any]:
    """For each target time the item nearest in time, of two the earlier; beyond the last item, that
    item. Both in rising order; reads no further than needed."""
    before, wanted = None, iter(targets)
    target = next(wanted, None)
    for time, item in timed:
        while target is not None and target <= time:
            earlier = before is not None and target - before[0] <= time - target + TIE
            yield before[1] if earlier else item
            target = next(wanted, None)
        if target is None:
            return
        before = time, item
    while target is not None and before is not None:
        yield before[1]
        target = next(wanted, None)


def load_clip(path: str | Path, bucket: Bucket, frame_rate: float = 24.0, start: float = 0.0
              ) -> Tensor:
    """A clip at the bucket's size and the target frame rate, (3, F, h, w) float32 in [-1, 1].

    our reading: resize to cover (antialiased bilinear), centre crop, the nearest frame in time.
    start: seconds. Raises Unusable as `decode` does, or "too short".
    """
    path = Path(path)
    video = torch.empty(bucket.frames, 3, bucket.height, bucket.width)
    frames, last = decode(path), None
    times = clip_times(bucket.frames, frame_rate, start)
    for k, frame in enumerate(nearest(((frame.time, frame) for frame in frames), times)):
        if frame is not last:  # a slow clip shows one frame several times
            crop = cover(frame.height, frame.width, bucket)
            picture = frame.resized(crop, bucket) / 127.5 - 1                       # (3, h, w)
            last = frame
        video[k] = picture
    # One frame is one frame, however long it is shown.
    available = 1 if last.time == 0 else (last.end - start) * frame_rate + ROUNDING
    if next(frames, None) is None and available < (bucket.frames if bucket.frames > 1 else 0):
        found = max(0, math.floor(available))
        raise Unusable("too short", f"{path.name}: {found} of {bucket.frames} frames")
    return video.transpose(0, 1)                                                    # (3, F, h, w)
