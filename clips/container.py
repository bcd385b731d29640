"""What a file says of itself: one picture or a clip, whole or cut off, which stream is the picture.

The idea. A name proves nothing and the first stream need not be the one to look at: an animation
called face.png would be trained on as one still, a phone's photo in tiles would give its upper left
corner. A copy that was cut off plays without a word up to where it ends. The container knows
better, if one asks it on its own terms. Lengths are the trap: a header may count from the beginning
of the file, of the stream, of what an edit list leaves of it, or tell the length of the sound. So
the copy is measured in bytes first; times are compared on the file's own clock only.

paper:        no word on preparing data (ST-DRC, arXiv 2606.02441).
our reading:  all of this file.

Conventions. Seconds are those of `frame.time`, not counted from the first frame; sizes in bytes.
MPEG streams, FLV, Ogg and GIF do not say where they end: cut off, they are shorter clips.

    one = is_still(path)                                   # else it is FFmpeg's
    short = announced_size(path) > path.stat().st_size     # cut off
    stream = picture_stream(container)

Read next: clips/frames.py
"""

import math
import re
import warnings
from pathlib import Path

from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from clips.pictures import PICTURES

# First bytes of the pictures that Pillow opens, still or moving.
PICTURE = re.compile(rb"\x89PNG|GIF8|BM.{4}\0\0\0\0|II\*\0|MM\0\*|RIFF.{4}WEBP|.{4}ftypavi[fs]",
                     re.DOTALL)
JPEG = b"\xff\xd8\xff"  # so begins a film of JPEGs, too: there, and only there, the name decides
IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# Outermost boxes: of MP4 and QuickTime; Matroska's header and its one segment; ASF's (WMV).
BOXES = b"ftyp moov mdat moof free skip wide uuid styp sidx emsg mfra pnot meta".split()
EBML = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")
ASF = bytes.fromhex("26b2758e66cf11a6d900aa0062ce6c")  # after the first byte, which is the kind


def is_still(path: Path) -> bool:
    """Whether the file is one picture, by its content. Raises ValueError for several pictures that
    FFmpeg does not play, and whatever Pillow raises on a damaged file."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[:3] == JPEG:  # may hold previews of itself, and is one picture all the same
        return path.suffix.lower() in IMAGES
    if not PICTURE.match(head):
        return False
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large photos below Pillow's limit
        with Image.open(path, formats=[name for name in PICTURES if name in Image.OPEN]) as image:
            count, kind, mode = getattr(image, "n_frames", 1), image.format, image.mode
    # FFmpeg plays AVIF without what is transparent, and the others not at all.
    if count > 1 and (kind in ("WEBP", "TIFF") or (kind, mode) == ("AVIF", "RGBA")):
        raise ValueError(f"{count} pictures in one {kind}; save it as a video, or one of them")
    return count == 1


def announced_size(path: Path) -> int:
    """Where the last outermost box that says its length should end, 0 where none does."""
    end, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while end < size:
            file.seek(end)
            length = _box_length(file.read(24).ljust(24, b"\0"))
            if not length:
                break
            end += length
    return end


def _box_length(head):
    """Bytes of the box that begins so, 0 where it is unknown or does not say."""
    if head[:4] in EBML and head[4]:  # a number whose leading zero bits tell how long it is
        width = 9 - head[4].bit_length()
        unknown = (1 << 7 * width) - 1
        length = int.from_bytes(head[4 : 4 + width], "big") & unknown
        return 0 if length == unknown else 4 + width + length
    if head[:4] == b"RIFF":  # AVI
        length = int.from_bytes(head[4:8], "little")
        return 8 + length + length % 2
    if head[1:16] == ASF:
        return int.from_bytes(head[16:24], "little")
    if head[4:8] in BOXES:
        length = int.from_bytes(head[:4], "big")
        return int.from_bytes(head[8:16], "big") if length == 1 else length
    return 0


def picture_stream(container: InputContainer) -> VideoStream | None:
    """The stream that players show, None where there is none: no cover of a song, and not the still
    that an animated AVIF holds beside itself. Raises ValueError for a picture in tiles."""
    videos = container.streams.video
    tiles = sum(bool(s.disposition & Disposition.dependent) for s in videos)
    if tiles > 1:  # HEIC
        raise ValueError(f"a picture in {tiles} tiles, which are not put together here; save it as "
                         "PNG or JPEG")
    beside = Disposition.attached_pic | Disposition.dependent
    shown = [s for s in videos if not s.disposition & beside]
    best = container.streams.best("video")
    return best if best in shown else next(iter(shown), None)


def announced_time(container: InputContainer, stream: VideoStream, length: float
                   ) -> tuple[float, float]:
    """When the last frame should end, and how far off that may be; -inf where nothing is said.

    length: of a frame. Ask when the stream is read to its end. An MP4 lists its frames, and which
    of them an edit list hides; the times of that list are of decoding, never after those of
    display. Other headers round, and may count the sound's last moment.
    """
    kind, alone = container.format.name, len(container.streams) == 1
    if "mp4" in kind and stream.frames:
        listed = [e.timestamp for e in stream.index_entries if e.size and not e.is_discard]
        return max(listed, default=0) * float(stream.time_base) + length, 0.5 * length
    end, slack = -math.inf, 2 * length + 0.1
    if "matroska" in kind:  # its DURATION is an end
        found = re.fullmatch(r"(\d+):(\d+):([\d.]{1,20})", stream.metadata.get("DURATION", ""))
        if found:
            end = int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3])
        elif container.duration and alone:
            end = container.duration / 1e6
    elif stream.duration and (alone or "asf" not in kind):
        end = float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return end, slack
