"""Pictures of every kind are read as they are meant: colours, brightness, orientation, size.

Files and profiles are written here, byte by byte where Pillow cannot write them; right values come
from the formulas of sRGB, Display P3, Adobe RGB and CIELAB in numpy, never from ImageCms. Lossy
files are compared within 2 levels. Hardware: CPU, seconds. Run: pytest tests/test_pictures.py
"""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from clipfiles import manifest, write
from PIL import Image

from clips import pictures
from clips.frames import Bucket, Unusable, decode, load_clip, parse_buckets, probe
from clips.manifest import check, draw_reference
from clips.pictures import load_canvas, open_picture

SKIN, RED, GREEN, BLUE = (224, 172, 140), (200, 30, 30), (30, 160, 40), (40, 60, 200)
PATCHES = np.array([SKIN, RED, GREEN, BLUE])
# XYZ under D50 of red, green and blue, as columns: what profiles of these spaces hold.
SRGB = np.array([[.43607, .38515, .14307], [.22249, .71687, .06061], [.01392, .09708, .71410]])
P3 = np.array([[.51512, .29198, .15710], [.24120, .69225, .06657], [-.00105, .04189, .78407]])
ADOBE = np.array([[.60974, .20528, .14919], [.31111, .62567, .06322], [.01947, .06087, .74457]])
WHITE = (.9642, 1, .8249)
GAMMA = 563 / 256  # Adobe RGB's, 2.2 as a profile can say it


def linear(levels):
    x = np.asarray(levels) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def levels(light):
    x = np.clip(light, 0, 1)
    return 255 * np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def stored(columns, gamma=None):
    """The patches as a file in another space holds them, (4, 3) uint8."""
    light = np.clip(linear(PATCHES) @ (np.linalg.inv(columns) @ SRGB).T, 0, 1)
    return (levels(light) if gamma is None else 255 * light ** (1 / gamma)).round().astype(np.uint8)


def by_hand(numbers, columns, gamma=None):
    """Numbers of a file in another space -> sRGB levels."""
    light = linear(numbers) if gamma is None else (np.asarray(numbers) / 255) ** gamma
    return levels(light @ (np.linalg.inv(SRGB) @ columns).T)


# ------------------------------------------------------------ profiles and files, by hand


def fixed(*numbers) -> bytes:
    return b"".join(struct.pack(">i", round(65536 * n)) for n in numbers)


def curve(gamma) -> bytes:
    """sRGB's for None: gamma 2.4 with a straight foot."""
    if gamma is None:
        return b"para\0\0\0\0\0\3\0\0" + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"


def profile(kind: bytes, space: bytes, between: bytes, **tags: bytes) -> bytes:
    """An ICC profile of version 2: 128 bytes, a table, and the tags."""
    text = b"desc\0\0\0\0\0\0\0\2x\0" + bytes(79)
    tags = {"desc": text + b"\0", "wtpt": b"XYZ \0\0\0\0" + fixed(*WHITE), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12s4s", start + len(body), 0x02400000, kind, space, between,
                       struct.pack(">6H", 2026, 1, 1, 0, 0, 0), b"acsp")
    return head.ljust(68, b"\0") + fixed(*WHITE).ljust(60, b"\0") + table + body


def screen(columns, gamma=None) -> bytes:
    tags = {f"{c}XYZ": b"XYZ \0\0\0\0" + fixed(*columns[:, i]) for i, c in enumerate("rgb")}
    tags |= {f"{c}TRC": curve(gamma) for c in "rgb"}
    return profile(b"mntr", b"RGB ", b"XYZ ", **tags)


INKS = {(0, 0, 0, 0): (100, 0, 0), (0, 1, 1, 0): (48, 60, 40), (1, 0, 0, 0): (60, -20, -35)}


def press() -> bytes:
    """Four inks -> CIELAB, from a table of the 16 full prints; INKS names three, the rest is black.
    """
    grid = [INKS.get(tuple(int(bit) for bit in f"{n:04b}"), (0, 0, 0)) for n in range(16)]
    cells = b"".join(bytes([round(L * 2.55), a + 128, b + 128]) for L, a, b in grid)
    same = bytes(range(256))
    return profile(b"prtr", b"CMYK", b"Lab ", A2B0=b"mft1\0\0\0\0\4\3\2\0" + fixed(
        1, 0, 0, 0, 1, 0, 0, 0, 1) + 4 * same + cells + 3 * same)


def from_lab(L, a, b):
    """CIELAB under D50 -> sRGB levels."""
    f = np.array([(L + 16) / 116 + a / 500, (L + 16) / 116, (L + 16) / 116 - b / 200])
    xyz = np.where(f > 6 / 29, f ** 3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * WHITE
    return levels(np.linalg.inv(SRGB) @ xyz)


def striped(patches, mode="RGB") -> Image.Image:
    """Four stripes of 16x32 pixels."""
    rows = np.tile(np.repeat(np.asarray(patches, np.uint8), 16, axis=0), (32, 1, 1))
    return Image.frombytes(mode, (64, 32), rows.tobytes())


def seen(path) -> np.ndarray:
    """The colours of the four stripes, (4, 3)."""
    return np.asarray(open_picture(path)).astype(int)[16, 8::16]


def tiff(path, numbers, bits, kind=1, photometric=1, order="<", data=None) -> Path:
    """A grey TIFF of one strip. kind: 1 whole numbers, 2 signed, 3 floats."""
    h, w = numbers.shape
    data = data or numbers.astype(numbers.dtype.newbyteorder(order)).tobytes()
    tags = {256: w, 257: h, 258: bits, 259: 1, 262: photometric, 273: 140, 277: 1, 278: h,
            279: len(data), 339: kind}
    table = b"".join(struct.pack(order + "HHII", tag, 4, 1, n) for tag, n in tags.items())
    mark = {"<": b"II", ">": b"MM"}[order]
    head = mark + struct.pack(order + "HIH", 42, 8, len(tags)) + table
    path.write_bytes(head.ljust(140, b"\0") + data)
    return path


def png(path, depth, kind, row, **chunks) -> Path:
    """A PNG of 16 times the same row of 16 pixels."""
    def chunk(name, data):
        data = name.encode() + data
        return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    head = chunk("IHDR", struct.pack(">IIBBBBB", 16, 16, depth, kind, 0, 0, 0))
    more = b"".join(chunk(*item) for item in chunks.items())
    body = chunk("IDAT", zlib.compress(16 * (b"\0" + row)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + more + body + chunk("IEND", b""))
    return path


# ------------------------------------------------------------ colours


SPACES = {"display-p3": (P3, None), "adobe-rgb": (ADOBE, GAMMA), "srgb": (SRGB, None)}
FILES = {"jpg": {"quality": 98, "subsampling": 0}, "png": {}, "tif": {}, "webp": {"lossless": True},
         "avif": {"quality": 100, "subsampling": "4:4:4"}}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("ending", FILES)
def test_a_profile_of_a_screen_is_followed_into_srgb(tmp_path, space, ending):
    path, numbers = tmp_path / f"a.{ending}", stored(*SPACES[space])
    striped(numbers).save(path, icc_profile=screen(*SPACES[space]), **FILES[ending])
    inside = np.asarray(Image.open(path))[16, 8::16]  # one level more or less may be three in sRGB
    assert np.abs(seen(path) - by_hand(inside, *SPACES[space])).max() <= 1.5, seen(path)
    assert np.abs(seen(path) - PATCHES)[:2].max() <= 2, seen(path)
    assert space == "srgb" or np.abs(inside.astype(int) - PATCHES)[:2].max() > 10


def test_every_entrance_reads_the_same_picture(tmp_path, capsys):
    """sample.py --ref, a manifest's reference, and pictures as clips, by Pillow or FFmpeg."""
    size, numbers = Bucket(32, 64, 1), stored(P3)
    for ending in ("png", "jpg", "avif", "mjpeg"):
        path = tmp_path / f"a.{ending}"
        kind = {"jpg": "JPEG", "mjpeg": "JPEG"}.get(ending)
        striped(numbers).save(path, kind, icc_profile=screen(P3), **FILES.get(ending, FILES["jpg"]))
        (row,) = check(manifest(tmp_path, {"video": path.name, "caption": "x",
                                           "reference": path.name}),
                       parse_buckets("32x64x1", 4, 8)).used
        drawn = draw_reference([row], 0, torch.Generator()).picture
        for read in (load_canvas(path, 32, 64), load_clip(path, size)[:, 0],
                     torch.from_numpy(np.array(drawn)).permute(2, 0, 1) / 127.5 - 1):
            found = (read[:, 16, 8] + 1) * 127.5
            assert (found - torch.tensor(SKIN)).abs().max() <= 2.01, (ending, found)
    assert "warning" not in capsys.readouterr().out


def test_notes_that_hide_a_profile_from_pyav_do_not_cost_the_picture(tmp_path):
    notes = Image.Exif()
    notes[0x0112] = 1
    striped(stored(P3)).save(tmp_path / "a.mjpeg", "JPEG", icc_profile=screen(P3), exif=notes)
    (frame,) = decode(tmp_path / "a.mjpeg")
    assert np.abs(frame.pixels()[16, 8].astype(int) - stored(P3)[0]).max() < 5


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_four_inks_are_read_by_their_own_profile_and_without_one_by_the_plain_formula(
        tmp_path, ending):
    path, inks = tmp_path / f"a.{ending}", 255 * np.array([*INKS, (0, 1, 1, 0)])
    striped(inks, "CMYK").save(path, icc_profile=press(), **FILES[ending])
    right = np.array([from_lab(*lab) for lab in (*INKS.values(), INKS[0, 1, 1, 0])])
    assert np.abs(seen(path) - right).max() <= 2, (seen(path), right)
    striped(inks, "CMYK").save(path, **FILES[ending])
    plain = [(255, 255, 255), (255, 0, 0), (0, 255, 255), (255, 0, 0)]
    assert np.abs(seen(path) - plain).max() <= 3, seen(path)


def test_grey_pictures_follow_profiles_of_grey_and_of_colours(tmp_path):
    right = levels((90 / 255) ** 1.0)  # the profile says that numbers are light itself
    grey = profile(b"mntr", b"GRAY", b"XYZ ", kTRC=curve(1.0))
    for picture in (Image.new("L", (64, 32), 90), Image.new("LA", (64, 32), (90, 255)),
                    Image.fromarray(np.full((32, 64), 90 * 257, np.uint16))):
        for told in (grey, screen(P3, 1.0)):
            picture.save(tmp_path / "a.png", icc_profile=told)
            assert np.abs(seen(tmp_path / "a.png") - right).max() <= 1, picture.mode


def test_what_is_transparent_is_white_beside_a_profile_too(tmp_path):
    numbers = stored(P3)
    clear = np.concatenate([numbers, [[255], [0], [255], [0]]], axis=1)
    striped(clear, "RGBA").save(tmp_path / "a.png", icc_profile=screen(P3))
    right = PATCHES.copy()
    right[1::2] = 255
    assert np.abs(seen(tmp_path / "a.png") - right).max() <= 2
    palette = Image.new("P", (64, 32), 1)
    palette.putpalette([0, 0, 0, *numbers[0]])
    palette.paste(0, (0, 0, 16, 32))
    palette.save(tmp_path / "b.png", icc_profile=screen(P3), transparency=0)
    assert np.abs(seen(tmp_path / "b.png") - [(255,) * 3, *3 * [SKIN]]).max() <= 2


BROKEN = {"cut off": screen(P3)[:300], "nothing": b"", "words": b"not a profile " * 50,
          "for grey": profile(b"mntr", b"GRAY", b"XYZ ", kTRC=curve(1.0)), "for inks": press()}


@pytest.mark.parametrize("kind", [*BROKEN, "no zlib", "inks with a screen's"])
def test_a_profile_that_cannot_be_used_is_one_warning_and_srgb(tmp_path, capsys, kind):
    path, picture, right = tmp_path / "a.png", Image.new("RGB", (16, 16), SKIN), SKIN
    if kind == "no zlib":
        png(path, 8, 2, bytes(16 * SKIN), iCCP=b"x\0\0rubbish")
    elif kind == "inks with a screen's":
        path, right = tmp_path / "a.tif", (255, 0, 0)
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, icc_profile=screen(P3))
    elif kind == "nothing":  # Pillow writes none: a chunk of JPEG, number 1 of 2
        path = tmp_path / "a.jpg"
        picture.save(path, quality=98, subsampling=0, icc_profile=b"x")
        data = path.read_bytes()
        path.write_bytes(data.replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2"))
    else:
        picture.save(path, icc_profile=BROKEN[kind])
    for _ in range(3):
        assert np.abs(np.asarray(open_picture(path)).astype(int) - right).max() <= 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.startswith(f"warning: the colour profile in {path} cannot")


def test_a_camera_that_notes_adobe_rgb_without_a_profile_costs_one_warning(tmp_path, capsys):
    notes = Image.Exif()
    notes.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.new("RGB", (16, 16), SKIN).save(tmp_path / "a.jpg", exif=notes)
    open_picture(tmp_path / "a.jpg"), open_picture(tmp_path / "a.jpg")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "a.jpg is in Adobe RGB" in out and "save it in sRGB" in out


# ------------------------------------------------------------ brightness


RAMP = np.tile(np.linspace(0, 1, 16), (16, 1))
GREYS = {  # what is written, and the levels that a row must show; "" is refused
    "floats up to 1": (RAMP.astype("f4"), 32, 3, 255 * RAMP),
    "floats up to 255": ((255 * RAMP).astype("f4"), 32, 3, 255 * RAMP),
    "floats, dark": ((0.1 * RAMP).astype("f4"), 32, 3, 25.5 * RAMP),
    "floats up to 1.3": ((1.3 * RAMP).astype("f4"), 32, 3, ""),
    "floats up to 65535": ((65535 * RAMP).astype("f4"), 32, 3, ""),
    "floats below 0": ((RAMP - 0.1).astype("f4"), 32, 3, ""),
    "floats, NaN": (np.where(RAMP == 1, np.nan, RAMP).astype("f4"), 32, 3, ""),
    "16 bits": ((65535 * RAMP).astype("u2"), 16, 1, 255 * RAMP),
    "32 bits up to 65535": ((65535 * RAMP).astype("u4"), 32, 1, 255 * RAMP),
    "32 bits": ((2**31 * RAMP).astype("u4"), 32, 1, ""),
    "16 bits, negative": ((-5 * RAMP).astype("i2"), 16, 2, ""),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", GREYS)
def test_grey_numbers_of_many_bits_keep_their_brightness_or_are_refused(tmp_path, kind, order):
    numbers, bits, sample, right = GREYS[kind]
    path = tiff(tmp_path / "a.tif", numbers, bits, sample, order=order)
    try:
        found = np.asarray(open_picture(path))[:, :, 0]
    except Unusable as error:
        unknown = order == ">" and kind.startswith("32 bits")  # to Pillow
        assert unknown or right == "" and "no telling which is white; save it" in str(error)
    else:
        assert np.abs(found - right).max() <= 1, found[0]


def test_twelve_bits_and_white_as_zero_are_no_other_brightness(tmp_path):
    data = 128 * bytes([0x5A, 0x55, 0xA5])  # 0x5A5 of 0xFFF
    path = tiff(tmp_path / "a.tif", np.zeros((16, 16), "u1"), 12, data=data)
    assert np.ptp(np.asarray(open_picture(path))) == 0
    assert open_picture(path).getpixel((8, 8)) == 3 * (round(255 * 0x5A5 / 0xFFF),)
    for numbers, bits, kind in ((np.full((16, 16), 90, "u1"), 8, 1),
                                (np.full((16, 16), 90 * 257, "u2"), 16, 1),
                                (np.full((16, 16), 90 / 255, "f4"), 32, 3)):
        path = tiff(tmp_path / "b.tif", numbers, bits, kind, photometric=0)
        assert open_picture(path).getpixel((8, 8)) == (165, 165, 165), bits


def test_the_modes_of_pngs_are_right_to_the_level(tmp_path):
    deep = {n: struct.pack(">H", 257 * n) for n in (0, 90, 40, 255)}
    half = deep[90] * 8 + deep[40] * 8
    pair = lambda a, b: (deep[90] + deep[a]) * 8 + (deep[40] + deep[b]) * 8  # noqa: E731
    for depth, kind, row, chunks, left, right in (
            (16, 0, half, {}, 90, 40),
            (16, 0, 8 * b"\x5a\1" + 8 * deep[40], {"tRNS": b"\x5a\1"}, 255, 40),
            (16, 4, pair(0, 255), {}, 255, 40), (8, 0, bytes(8 * [90] + 8 * [40]), {}, 90, 40),
            (8, 0, bytes(8 * [90] + 8 * [40]), {"tRNS": b"\0\x28"}, 90, 255),
            (8, 4, bytes(8 * [90, 255] + 8 * [40, 0]), {}, 90, 255),
            (8, 3, bytes(8 * [0] + 8 * [1]), {"PLTE": bytes(3 * [90] + 3 * [40])}, 90, 40),
            (8, 3, bytes(8 * [0] + 8 * [1]),
             {"PLTE": bytes(3 * [90] + 3 * [40]), "tRNS": b"\xff\x00"}, 90, 255),
            (1, 0, b"\xff\x00", {}, 255, 0), (1, 0, b"\xff\x00", {"tRNS": b"\0\0"}, 255, 255)):
        picture = open_picture(png(tmp_path / "a.png", depth, kind, row, **chunks))
        found = picture.getpixel((2, 8)), picture.getpixel((13, 8))
        assert found == (3 * (left,), 3 * (right,)), (depth, kind, chunks, found)


# ------------------------------------------------------------ orientation and size


TURNED = {1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud,
          5: lambda p: p.transpose(1, 0, 2), 6: lambda p: np.rot90(p, -1),
          7: lambda p: np.rot90(p, 2).transpose(1, 0, 2), 8: lambda p: np.rot90(p, 1)}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_all_eight_orientations_are_shown_as_the_camera_was_held(tmp_path, ending):
    picture = np.full((32, 48, 3), RED, np.uint8)
    picture[:16, :24], picture[:16, 24:] = GREEN, BLUE
    for orientation, turn in TURNED.items():
        notes = Image.Exif()
        notes[0x0112] = orientation
        path = tmp_path / f"a.{ending}"
        Image.fromarray(picture).save(path, exif=notes, **FILES[ending])
        found, right = np.asarray(open_picture(path)), turn(picture)
        assert found.shape == right.shape, orientation
        assert np.abs(found.astype(int) - right).mean() < 2, orientation
        assert probe(path).height == right.shape[0]


def test_a_jpeg_of_200_megapixels_is_shrunk_while_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    Image.new("L", (16320, 12240), 90).save(path)
    with warnings.catch_warnings(), pytest.raises(Image.DecompressionBombError):
        warnings.simplefilter("ignore")
        Image.open(path)
    picture = open_picture(path)
    assert picture.size == (4080, 3060) and picture.getpixel((4079, 3059)) == (90, 90, 90)
    data, size = path.read_bytes(), struct.pack(">HH", 12240, 16320)
    assert data.count(size) == 1
    path.write_bytes(data.replace(size, struct.pack(">HH", 65500, 65500)))
    with pytest.raises(Unusable, match="^cannot be decoded: a.jpg: 4,290,250,000 pixels, more th"):
        open_picture(path)
    monkeypatch.setattr(pictures, "MOST_PIXELS", 3000)  # a small one shows that nothing moves
    notes = Image.Exif()
    notes[0x0112] = 6
    striped(stored(P3)).resize((256, 128), Image.Resampling.NEAREST).rotate(90, expand=True).save(
        path, exif=notes, icc_profile=screen(P3), **FILES["jpg"])
    picture = open_picture(path)
    assert picture.size == (64, 32) and np.abs(seen(path) - PATCHES)[:2].max() <= 2


def test_other_pictures_without_end_are_refused_in_a_line_that_says_what_to_do(tmp_path):
    path = png(tmp_path / "a.png", 8, 2, bytes(16 * SKIN))
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)
    with pytest.raises(ValueError, match="got .*900000000 pixels.*; save it as PNG or JPEG, not h"):
        load_canvas(path, 32, 32)
    tiff(tmp_path / "b.tif", (2 * RAMP).astype("f4"), 32, 3)
    with pytest.raises(ValueError, match="grey numbers from 0 to 2.*; save it as PNG or JPEG"):
        load_canvas(tmp_path / "b.tif", 32, 32)
    write(tmp_path / "c.png.mp4", count=1).rename(tmp_path / "c.png")
    with pytest.raises(Unusable, match="^cannot be decoded: c.png: "):
        open_picture(tmp_path / "c.png")
