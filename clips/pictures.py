"""A picture file -> the picture as it is meant: upright, its colours in sRGB, white behind it.

The idea. The numbers in a file are not colours yet. A phone stores a face on its side and in
Display P3, where 200 of red is another red; a print shop's file holds four inks, and a profile that
says how they look on paper; a scanner writes 16 bits, a renderer floats. Taken for sRGB each of
them still gives a face, of the wrong skin, and no error. So what a file says about its numbers is
followed here, once, for the references of sampling and training and for pictures among the clips.

paper:        a portrait beside each clip, no word on files (ST-DRC, arXiv 2606.02441).
our reading:  all of it. Perceptual rendering intent, which is what profiles of inks are made for
              (the paper's black becomes black); between screens all intents are the same.

Conventions. Pictures are PIL's, of mode RGB; h, w: height before width. Pillow hands out the upper
eight bits of 16-bit colour, which is what sRGB keeps of it.

    picture = open_picture(Path("face.jpg"))               # any mode, profile and orientation
    canvas = load_canvas(Path("face.jpg"), 512, 768)       # (3, 512, 768), for --ref

Read next: clips/batch.py
"""

import io
import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from common.cli import warn
from common.files import one_line
from reference import letterbox, to_rgb

SMALL = 16  # our reading: pixels; no face can be told from another below
# What a picture may hold, whatever its name says; for other kinds Pillow may start a program.
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MOST_PIXELS = 178_956_970  # of a frame; Pillow's limit. A header of 100 bytes can announce any size
MOST_JPEG = 2 * MOST_PIXELS  # our reading: phones make 200 million; a progressive one takes 2 GB
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags, and a value of the second


class Unusable(ValueError):
    """A row or clip that cannot be used: `reason`, a few words to count by, and what was found."""

    def __init__(self, reason: str, detail: object):
        self.reason, self.detail = reason, one_line(detail, 400)
        super().__init__(f"{self.reason}: {self.detail}")


def open_picture(path: Path) -> Image.Image:
    """A picture, read to its end, as it is meant to be seen; an animation's first. Raises Unusable.

    A JPEG above MOST_PIXELS is shrunk to a quarter of its sides while it is decoded; a profile that
    cannot be used costs one warning.
    """
    if not path.is_file():  # also keeps pipes and devices from being read
        raise Unusable("missing file", f"a folder at {path}" if path.is_dir() else path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken camera notes, large photos below the limit
            with _opened(path) as image:
                picture = ImageOps.exif_transpose(_eight_bits(image))  # a copy, read to its end
                adobe = _interoperability(image).get(1) == "R03"  # so named
            # Turned already; what damaged notes say is not asked a second time (`to_rgb` would).
            notes = picture.info
            picture.info = {key: told for key, told in notes.items() if key == "transparency"}
            if "icc_profile" in notes:
                return to_srgb(picture, notes["icc_profile"] or b"", path)  # None: it is in pieces
            if adobe:
                _warn_once(f"{path} is in Adobe RGB, as its camera's notes say, and holds no "
                           "profile, so its colours are taken for sRGB; save it in sRGB")
            return to_rgb(picture)
    except Exception as error:  # decoders raise nearly every type there is on damaged files
        raise Unusable("cannot be decoded", f"{path.name}: {error}") from None


def _interoperability(image):
    try:
        return image.getexif().get_ifd(ExifTags.IFD.Interop)
    except KeyError:  # older Pillow where the notes have none
        return {}


def _opened(path):
    with path.open("rb") as file:
        if file.read(3) != b"\xff\xd8\xff":  # no JPEG
            Image.init()
            return Image.open(path, formats=[name for name in PICTURES if name in Image.OPEN])
    image = JpegImageFile(path)  # not through Image.open, which refuses before one can shrink
    pixels = image.width * image.height
    if pixels > MOST_JPEG:
        raise ValueError(f"{pixels:,} pixels, more than {MOST_JPEG:,}; shrink it")
    if pixels > MOST_PIXELS:
        image.draft(None, (image.width // 4, image.height // 4))
    return image


def _eight_bits(image):
    """Grey numbers of more than eight bits, of which Pillow's own conversion keeps the lowest, as
    eight (mode L). Raises ValueError where white may be any number."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    numbers, tags = np.asarray(image).astype(np.float32), getattr(image, "tag_v2", {})
    low, high = numbers.min(), numbers.max()
    if image.mode == "F":
        white = 1 if high <= 1 else 255
        known = high <= 1 or 16 <= high <= 255  # 1.3 is neither of them; taken for 255: black
    else:
        white = 2 ** min(16, tags.get(BITS, [16])[0]) - 1  # Pillow leaves 12 bits where they are
        known = high <= white
    if low < 0 or not known:  # as NaN
        raise ValueError(f"grey numbers from {low:g} to {high:g}, and no telling which is white; "
                         "save it with 8 or 16 bits")
    numbers[numbers == image.info.pop("transparency", -1)] = white
    numbers *= 255 / white
    grey = Image.fromarray(numbers.round().astype(np.uint8))
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow turns 8 bits round, and no others
        grey = ImageOps.invert(grey)
    grey.info = image.info
    return grey


def to_srgb(image: Image.Image, profile: bytes, path: object) -> Image.Image:
    """Colours by an ICC profile -> RGB in sRGB, what is transparent on white. path: for the warning
    that a profile costs which cannot be used."""
    plain = to_rgb(image)
    stored = {"CMYK": image} if image.mode == "CMYK" else {"RGB": plain}
    if Image.getmodebase(image.mode) == "L":  # grey may have a profile for grey or for colours
        stored["GRAY"] = plain.convert("L")
    try:
        read = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = read.profile.xcolor_space.strip()
        if space not in stored:
            raise ValueError(f"it is for {space}, the picture is {image.mode}")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(stored[space], read, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        _warn_once(f"the colour profile in {path} cannot be used ({one_line(error)}), so its "
                   "colours are taken for sRGB")
        return plain


@cache
def _warn_once(text):
    warn(text)  # the same reference is opened again and again


def load_canvas(path: Path, height: int, width: int, crop: bool = False) -> Tensor:
    """A reference of the user's on a canvas of the video's size, (3, h, w) in [-1, 1].

    crop: the largest part around its middle that has the video's shape, instead of the whole
    picture on white. our reading: for weights that were trained so (ltx/options.py).
    Raises ValueError, one line that says what to do.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"expected a picture at {path}, got {got}; check --ref")
    try:
        image = open_picture(path)
        size, filter_ = (width, height), Image.Resampling.BILINEAR
        canvas = letterbox(ImageOps.fit(image, size, filter_) if crop else image, height, width)
    except (ValueError, OSError) as error:
        raise ValueError(f"expected a readable picture at {path}, got "
                         f"{getattr(error, 'detail', error)}; save it as PNG or JPEG, not huge"
                         ) from error
    if min(image.size) < SMALL:
        _warn_once(f"the reference {path} has {image.width}x{image.height} pixels, too few to show "
                   "a face")
    return canvas
