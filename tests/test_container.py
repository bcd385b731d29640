"""What a file is, whatever its name: a still or a clip, whole or cut off, and which stream to show.

Files are made here with PyAV and Pillow; where ffprobe is installed it counts the frames, too.
Hardware: CPU, seconds. Run: python -m pytest tests/test_container.py
"""

import io
import random
import shutil
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from clipfiles import draw_moving, grey, write, write_picture
from PIL import Image

from clips.container import announced_size
from clips.frames import Unusable, decode, frame_at, probe

# ------------------------------------------------------------ a still or a clip


def animation(path: Path, kind: str, count: int = 6, mode: str = "RGB") -> Path:
    """Grey pictures of 80 ms; RGBA: half transparent."""
    first, *rest = [Image.new(mode, (32, 24), (*(grey(5 * k),) * 3, 128)[: len(mode)])
                    for k in range(count)]
    first.save(path, kind, save_all=True, append_images=rest, duration=80)
    return path


@pytest.mark.parametrize("kind", ["PNG", "GIF", "AVIF"])
@pytest.mark.parametrize("name", ["moving", "moving.png", "moving.mp4"])
def test_an_animation_is_a_clip_whatever_it_is_called(tmp_path, kind, name):
    path = animation(tmp_path / name, kind)
    every, found = list(decode(path)), probe(path)
    assert found.times == pytest.approx([0.08 * k for k in range(6)])
    assert found.seconds == pytest.approx(0.48) and found.frames(24.0) == 11
    levels = [frame.pixels().mean() for frame in every]
    assert levels == pytest.approx([grey(5 * k) for k in range(6)], abs=2)
    assert np.array_equal(frame_at(path, found.times, 4).pixels(), every[4].pixels())


@pytest.mark.parametrize("kind, mode", [("WEBP", "RGB"), ("TIFF", "RGB"), ("AVIF", "RGBA")])
def test_several_pictures_that_are_no_clip_here_are_refused_and_never_one_still(
        tmp_path, kind, mode):
    path = animation(tmp_path / "a.png", kind, mode=mode)
    with pytest.raises(Unusable, match=f"^cannot be decoded: a.png: 6 pictures in one {kind}; sav"):
        probe(path)
    assert probe(animation(path, kind, count=1, mode=mode)).frames(24.0) == 1


def test_a_name_makes_no_still_of_a_video_and_no_video_of_a_still(tmp_path):
    path = tmp_path / "a.png"
    write(tmp_path / "a.mp4", count=9).rename(path)
    assert len(probe(path).times) == 9
    write_picture(path, level=grey(3), turned=True).rename(tmp_path / "b.mkv")
    (still,) = decode(tmp_path / "b.mkv")
    assert (still.height, still.width) == (72, 48) and still.pixels().mean() == grey(3)
    film = b"".join(write_picture(tmp_path / "f.jpg", level=grey(k)).read_bytes() for k in range(5))
    (tmp_path / "film.mjpeg").write_bytes(film)
    assert len(probe(tmp_path / "film.mjpeg").times) == 5


# ------------------------------------------------------------ which stream


def box(name: bytes, *parts: bytes) -> bytes:
    data = b"".join(parts)
    return struct.pack(">I", 8 + len(data)) + name + data


def heic(path: Path, tiles: int) -> Path:
    """A HEIC of 64x64 light pixels, in one piece or in four tiles, behind a dark thumbnail. Pieces
    are JPEGs, which the format allows and which need no settings."""
    pieces = []
    for size, level in ((32, 40), *(((32, 200),) * 4 if tiles else ((64, 200),))):
        file = io.BytesIO()
        Image.new("RGB", (size, size), (level,) * 3).save(file, "JPEG")
        pieces.append(file.getvalue())
    kinds = [b"jpeg"] * len(pieces) + [b"grid"] * (tiles > 0)
    count = len(kinds)  # things in the file; the last is the picture
    items = [box(b"infe", b"\2\0\0\0", struct.pack(">2H", i, 0), kind, b"\0")
             for i, kind in enumerate(kinds, 1)]
    links = box(b"thmb", struct.pack(">3H", 1, 1, count))
    links += box(b"dimg", struct.pack(">6H", count, 4, 2, 3, 4, 5)) if tiles else b""
    sizes = [box(b"ispe", bytes(4), struct.pack(">2I", n, n)) for n in (32, 64)]
    told = [struct.pack(">H2B", i, 1, 2 if i == count else 1) for i in range(1, count + 1)]
    layout = struct.pack(">4B2H", 0, 0, 1, 1, 64, 64)  # 2 by 2

    def meta(at: int) -> bytes:
        places = b""
        for i, data in enumerate(pieces, 1):
            places += struct.pack(">4H2I", i, 0, 0, 1, at, len(data))
            at += len(data)
        places += struct.pack(">4H2I", count, 1, 0, 1, 0, len(layout)) if tiles else b""
        return box(b"meta", bytes(4), box(b"hdlr", bytes(8), b"pict", bytes(13)),
                   box(b"pitm", bytes(4), struct.pack(">H", count)),
                   box(b"iloc", b"\1\0\0\0\x44\0", struct.pack(">H", count), places),
                   box(b"iinf", bytes(4), struct.pack(">H", count), *items),
                   box(b"iref", bytes(4), links),
                   box(b"iprp", box(b"ipco", *sizes),
                       box(b"ipma", bytes(4), struct.pack(">I", count), *told)),
                   box(b"idat", layout))

    head = box(b"ftyp", b"heic", bytes(4), b"mif1heic")
    start = len(head) + len(meta(0)) + 8
    path.write_bytes(head + meta(start) + box(b"mdat", *pieces))
    return path


def test_a_photo_in_tiles_is_refused_and_never_its_first_tile_or_its_thumbnail(tmp_path):
    (whole,) = decode(heic(tmp_path / "whole.heic", 0))
    assert whole.pixels().shape == (64, 64, 3) and abs(whole.pixels().mean() - 200) < 3
    with pytest.raises(Unusable, match="^cannot be decoded: .* a picture in 4 tiles, which are"):
        probe(heic(tmp_path / "tiles.heic", 4))


# ------------------------------------------------------------ whole or cut off

GOPS = {"closed": "keyint=12:min-keyint=12:scenecut=0:bframes=3",
        "open": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: write(folder / f"{name}.mp4", count=72, draw=draw_moving,
                        coder={"x264-params": words}) for name, words in GOPS.items()}


def lossless_cut(source: Path, target: Path, start: float, seconds: float, shift: float = 0.0,
                 key: bool = True) -> int:
    """As `ffmpeg -ss start -i source -t seconds -c copy target`: packets from the key frame before
    on, or from any, and times from the start. The number of frames that begin after it."""
    seen, first = 0, None
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        old.seek(round(start * 1e6))
        for packet in old.demux(stream):
            time = -1 if packet.dts is None else float(packet.dts * packet.time_base)
            if packet.dts is None or (not key and time < start):
                continue
            if time >= start + seconds:
                break
            shown = float(packet.pts * packet.time_base)
            first = shown if first is None else first  # an open group holds frames before it
            seen += shown >= max(start, first) - 1e-6
            back = round((start - shift) / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, copy
            new.mux(packet)
    return seen


def counted(path: Path) -> int:
    """Frames by our decoding, and the same by ffprobe, where it is installed."""
    count = len(probe(path).times)
    if shutil.which("ffprobe"):
        words = ("ffprobe -v error -count_frames -select_streams v:0 -of csv=p=0 "
                 "-show_entries stream=nb_read_frames")
        told = subprocess.run([*words.split(), path], capture_output=True, text=True, check=True)
        assert int(told.stdout.split()[0]) == count
    return count


@pytest.mark.parametrize("gop", GOPS)
def test_lossless_cuts_at_any_start_are_used_with_the_frames_that_are_to_be_seen(
        tmp_path, sources, gop):
    rng = random.Random(gop)
    for k in range(8):
        start, seconds = rng.uniform(0.1, 1.5), rng.uniform(0.3, 1.4)
        path = tmp_path / f"{k}.{'mov' if k % 2 else 'mp4'}"
        seen = lossless_cut(sources[gop], path, start, seconds)  # an edit list hides the others
        assert counted(path) == seen, (start, seconds)


@pytest.mark.parametrize("suffix", ["mkv", "ts", "mp4"])
def test_a_clip_that_starts_late_or_between_key_frames_is_used(tmp_path, sources, suffix):
    path = tmp_path / f"late.{suffix}"
    seen = lossless_cut(sources["closed"], path, 0.0, 1.5, shift=5.0)
    assert counted(path) == seen and probe(path).times[0] == 0.0
    lossless_cut(sources["closed"], path, 0.7, 2.0, key=False)
    assert 36 <= counted(path) < 48  # what came before the first key frame cannot be decoded


def test_an_edit_list_that_hides_the_end_is_no_cut(tmp_path):
    """As phones trim: the frames stay in the file."""
    path = write(tmp_path / "a.mp4", count=48, coder={"x264-params": GOPS["closed"]})
    data = bytearray(path.read_bytes())
    place = data.index(b"elst") + 12  # behind version, flags and count: milliseconds
    assert data[place : place + 4] == struct.pack(">I", 2000)
    data[place : place + 4] = struct.pack(">I", 1125)
    path.write_bytes(data)
    assert counted(path) == 27


def test_a_box_may_reach_to_the_end_or_say_its_length_in_eight_bytes(tmp_path):
    """As live streams and cameras write."""
    assert counted(write(tmp_path / "a.mkv", options={"live": "1"})) == 24
    path = write(tmp_path / "a.mp4", options={"movflags": "faststart"})
    data = path.read_bytes()
    place = data.index(b"mdat") - 4
    path.write_bytes(data[:place] + bytes(4) + data[place + 4 :])
    assert counted(path) == 24
    long = struct.pack(">I4sQ", 1, b"mdat", len(data) - place + 8)  # over the free box before
    path.write_bytes(data[: place - 8] + long + data[place + 8 :])
    assert counted(path) == 24 and announced_size(path) == len(data)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Unusable, match="^cut off"):
        probe(path)


@pytest.mark.parametrize("suffix, codec", [("wmv", "wmv2"), ("avi", "mpeg4"), ("mkv", "libx264"),
                                           ("mov", "libx264")])
def test_the_length_of_the_sound_is_not_the_length_of_the_picture(tmp_path, suffix, codec):
    path = tmp_path / f"long.{suffix}"
    with av.open(str(path), "w") as file:
        video, audio = file.add_stream(codec, rate=24), file.add_stream("pcm_s16le", rate=8000)
        video.height, video.width, video.pix_fmt = 48, 72, "yuv420p"
        audio.layout = "mono"
        for k in range(30):  # tenths of a second
            if k < 24:
                picture = np.full((48, 72, 3), grey(k), np.uint8)
                file.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            sound.sample_rate, sound.pts = 8000, 800 * k
            file.mux(audio.encode(sound))
        for stream in (video, audio):
            file.mux(stream.encode())
    assert counted(path) == 24


WHOLE = {
    "index-first.mp4": {"options": {"movflags": "faststart"}}, "index-last.mp4": {}, "a.mov": {},
    "fragments.mp4": {"options": {"movflags": "frag_keyframe+empty_moov"}, "coder": {"g": "6"}},
    "a.mkv": {}, "a.webm": {"codec": "libvpx-vp9"}, "a.avi": {"codec": "mpeg4"},
    "a.wmv": {"codec": "wmv2"}}


@pytest.mark.parametrize("name", WHOLE)
def test_a_copy_that_was_cut_off_is_refused_wherever_it_ends(tmp_path, name):
    path = write(tmp_path / name, count=48, draw=draw_moving, **WHOLE[name])
    data = path.read_bytes()
    end = announced_size(path)  # a WMV's last box holds only an index
    assert len(data) - 98 * (end < len(data)) == end and counted(path) == 48
    path.write_bytes(data + b"a camera's own notes behind the last box")
    assert counted(path) == 48
    rng = random.Random(name)
    for size in [*(rng.randrange(100, end) for _ in range(12)), end - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(Unusable, match=f"^cut off: {name}: {size:,} of [0-9,]* bytes"):
            probe(path)


@pytest.mark.parametrize("name", ["index-first.mp4", "a.mkv", "a.avi"])
def test_a_copy_whose_end_is_empty_is_refused(tmp_path, name):
    """As a download leaves it that makes room first and then stops."""
    path = write(tmp_path / name, count=48, draw=draw_moving, **WHOLE[name])
    data = path.read_bytes()
    size = int(len(data) * 0.6)
    path.write_bytes(data[:size] + bytes(len(data) - size))
    with pytest.raises(Unusable, match=r"^cut off: .*: \d.\d\d of (1.9|2.0)\d seconds$"):
        probe(path)
