"""Real files of many kinds become the right frames, broken ones are named, and a stale latent is never used.

Every file is made here with PyAV. Frames carry their number as a grey level, so that one can read off which frame came.
Hardware: CPU, some seconds. Run: python -m pytest tests/test_clips.py
"""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

import clips
from checkpoint import save_checkpoint
from clips import (
    Bucket,
    Unusable,
    box_mask,
    cache_contexts,
    cache_latents,
    check,
    choose_bucket,
    clip_times,
    cover,
    draw_reference,
    faces_for_clip,
    load_clip,
    load_faces,
    nearest,
    parse_buckets,
    probe,
    read_manifest,
)
from vae import VideoVAE

STEP = 6            # grey levels between neighbouring frames; codecs err by less than half of it
SMALL = parse_buckets("32x48x9,48x32x9,32x48x1,48x32x1", time_scale=4, space_scale=8)
WIDE = SMALL[0]


def grey(index: int) -> int:
    return 16 + STEP * index


def write(path: Path, count: int = 24, rate: str = "24", codec: str = "libx264", size: tuple = (48, 72),
          pix: str = "yuv420p", stamps: list | None = None, matrix: list | None = None, aspect: Fraction | None = None,
          draw=None, options=None, first: int = 0) -> Path:
    """A video whose frame k is grey(first + k) all over. stamps: milliseconds of each frame."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate))
        stream.height, stream.width, stream.pix_fmt = *size, pix
        stream.codec_context.thread_count = 1
        if codec in ("mpeg4", "mjpeg"):
            stream.codec_context.bit_rate = 4_000_000
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        if matrix:
            stream.set_display_matrix(matrix)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for k in range(count):
            picture = np.full((*size, 3), grey(first + k), np.uint8)
            if draw:
                draw(picture, k)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix)
            if stamps:
                frame.pts, frame.time_base = stamps[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


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


# ------------------------------------------------------------ decoding

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


@pytest.mark.parametrize("name", KINDS)
def test_every_codec_and_size_gives_its_frames_in_order_at_the_buckets_size(tmp_path, name):
    need(KINDS[name].get("codec", "libx264"))
    path = write(tmp_path / name, **KINDS[name])
    clip = load_clip(path, Bucket(32, 48, 9))
    assert clip.shape == (3, 9, 32, 48) and clip.dtype == torch.float32 and clip.abs().max() <= 1
    assert indices(clip) == list(range(9))
    found = probe(path)
    assert (found.height, found.width) == KINDS[name].get("size", (48, 72))
    assert len(found.times) == 24 and found.seconds == pytest.approx(1.0, abs=0.003) and found.frames(24.0) == 24


RATES = ["12", "15", "24", "30000/1001", "60"]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_other_frame_rates_are_resampled_to_the_nearest_frame_in_time(tmp_path, rate, suffix):
    path = write(tmp_path / f"clip.{suffix}", count=32, rate=rate)
    # By the text: the source frame whose time is nearest, of two equally near ones the earlier.
    expected = [int(np.ceil(Fraction(k, 24) * Fraction(rate) - Fraction(1, 2))) for k in range(9)]
    assert indices(load_clip(path, WIDE, 24.0)) == expected
    assert probe(path).frames(24.0) == int(32 / Fraction(rate) * 24)


def test_the_last_frames_of_a_clip_are_used_and_one_frame_more_is_too_short(tmp_path):
    for rate, count in (("24", 9), ("12", 5), ("15", 6), ("60", 23)):
        path = write(tmp_path / "clip.mp4", count=count, rate=rate)
        usable = probe(path).frames(24.0)
        assert usable == int(Fraction(count) / Fraction(rate) * 24)
        assert load_clip(path, Bucket(32, 48, usable)).shape[1] == usable
        with pytest.raises(Unusable, match=f"^too short: clip.mp4: {usable} of {usable + 1} frames$"):
            load_clip(path, Bucket(32, 48, usable + 1))


def test_variable_frame_rate_follows_the_timestamps(tmp_path):
    stamps = [0, 10, 20, 30, 100, 200, 210, 220, 300, 500, 900, 910]  # milliseconds
    for suffix in ("mp4", "mkv"):
        clip = load_clip(write(tmp_path / f"vfr.{suffix}", count=12, stamps=stamps), WIDE, 10.0)
        assert indices(clip) == [0, 4, 5, 8, 8, 9, 9, 9, 10]  # 400 and 700 lie midway: the earlier
    assert probe(tmp_path / "vfr.mp4").times == pytest.approx([s / 1000 for s in stamps], abs=1e-3)


def test_start_is_in_seconds_and_a_generator_draws_one_that_fits(tmp_path):
    path = write(tmp_path / "clip.mp4", count=30)
    assert indices(load_clip(path, WIDE, start=0.5)) == list(range(12, 21))
    firsts = set()
    for seed in range(12):
        drawn = indices(load_clip(path, WIDE, generator=torch.Generator().manual_seed(seed)))
        assert drawn == list(range(drawn[0], drawn[0] + 9)) and 0 <= drawn[0] <= 21
        firsts.add(drawn[0])
    assert len(firsts) > 5
    with pytest.raises(Unusable, match="too short"):
        load_clip(path, WIDE, start=1.0)


# Quarter turns as a phone writes them: a point (x, y) of the stored picture is shown at (a x + c y, b x + d y).
ONE = 1 << 16
TURNS = {"clockwise": ([0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30], (slice(None), slice(-8, None))),
         "counterclockwise": ([0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30], (slice(None), slice(0, 8))),
         "half": ([-ONE, 0, 0, 0, -ONE, 0, 0, 0, 1 << 30], (slice(-8, None), slice(None)))}


@pytest.mark.parametrize("turn", TURNS)
def test_rotation_in_the_header_is_honoured(tmp_path, turn):
    matrix, place = TURNS[turn]

    def top(picture, k):
        picture[:12] = 255  # the stored top rows

    path = write(tmp_path / "turned.mp4", count=9, matrix=matrix, draw=top)
    upright = turn == "half"
    assert (probe(path).height, probe(path).width) == ((48, 72) if upright else (72, 48))
    clip = load_clip(path, WIDE if upright else SMALL[1])
    bright = clip[:, 0] > 0.5
    assert bright[(slice(None), *place)].float().mean() > 0.9 and bright.float().mean() < 0.35


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = write(tmp_path / "wide.mp4", count=9, size=(48, 54), aspect=Fraction(4, 3))
    assert (probe(path).height, probe(path).width) == (48, 72)
    assert load_clip(path, WIDE).shape == (3, 9, 32, 48)


def test_pictures_and_one_frame_clips_are_videos_of_one_frame(tmp_path):
    Image.new("RGB", (72, 48), (grey(5),) * 3).save(tmp_path / "a.png")
    Image.new("RGB", (72, 48), (grey(5),) * 3).save(tmp_path / "b.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.new("RGB", (48, 72), (grey(5),) * 3).save(tmp_path / "c.jpeg", exif=exif)
    write(tmp_path / "d.mp4", count=1, first=5)
    write(tmp_path / "e.mkv", count=1, first=5, rate="60")
    write(tmp_path / "f.mp4", count=1, first=5, rate="1")  # shown for a second, and still one frame
    for name in ("a.png", "b.jpg", "c.jpeg", "d.mp4", "e.mkv", "f.mp4"):
        found = probe(tmp_path / name)
        assert (found.height, found.width, found.frames(24.0)) == (48, 72, 1), name
        assert choose_bucket(48, 72, 1, SMALL) == SMALL[2]
        clip = load_clip(tmp_path / name, SMALL[2])
        assert clip.shape == (3, 1, 32, 48) and indices(clip) == [5], name
        with pytest.raises(Unusable, match="too short"):
            load_clip(tmp_path / name, WIDE)


def test_the_crop_is_the_middle_and_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 192, 3), np.uint8)
    stripes[:, ::4] = 255                                # without a low-pass, one of four columns is seen or missed
    stripes[:, :48], stripes[:, -48:] = (255, 0, 0), (0, 0, 255)  # what the crop must remove, up to a blurred column
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    clip = load_clip(tmp_path / "stripes.png", Bucket(16, 24, 1))[:, 0, :, 1:-1]
    assert (clip + 0.5).abs().max() < 0.05, (clip + 0.5).abs().max()  # a quarter of white everywhere
    assert cover(64, 192, Bucket(16, 24, 1)) == (16, 48, 0, 12)
    same = load_clip(tmp_path / "stripes.png", Bucket(64, 192, 1))[:, 0]
    assert torch.equal(same, torch.from_numpy(stripes).permute(2, 0, 1) / 127.5 - 1), "no resize, no change"


def test_nearest_agrees_with_a_search_over_all_pairs():
    g = np.random.default_rng(0)
    for _ in range(50):
        times = np.cumsum(g.uniform(0.01, 0.1, 20)) - 0.01
        targets = np.sort(g.uniform(0, times[-1] + 0.1, 15))
        distance = np.abs(targets[:, None] - times) + np.where(np.arange(20) > 0, 1e-9, 0)
        found = list(nearest(zip(times, range(20), strict=True), targets.tolist()))
        for k, j in enumerate(found):
            assert distance[k, j] <= distance[k].min() + clips.TIE + 1e-6
        assert len(found) == 15


# ------------------------------------------------------------ buckets


def test_bucket_texts_are_read_and_bad_ones_refused():
    assert parse_buckets("512x768x121, 768x512x1") == [(512, 768, 121), (768, 512, 1)]
    for text, message in (("512x768", "expected buckets such as"), ("axbxc", "got 'axbxc'"), ("", "got ''"),
                          ("500x768x121", "multiples of 32, got 500x768x121"), ("512x768x120", "got 120; use 113"),
                          ("0x32x1", "multiples of 32"), ("32x32x-7", "multiples of 32")):
        with pytest.raises(ValueError, match=message):
            parse_buckets(text)


def test_a_clip_goes_to_the_nearest_shape_that_it_fills_with_the_most_frames():
    buckets = parse_buckets("512x768x121,512x768x49,768x512x121,512x768x1,1024x1536x121")
    assert choose_bucket(720, 1280, 200, buckets) == (512, 768, 121)
    assert choose_bucket(1280, 720, 200, buckets) == (768, 512, 121)
    assert choose_bucket(720, 1280, 60, buckets) == (512, 768, 49)
    assert choose_bucket(720, 1280, 1, buckets) == (512, 768, 1)
    assert choose_bucket(1080, 1920, 121, buckets) == (1024, 1536, 121)
    assert choose_bucket(470, 700, 121, buckets) == (512, 768, 121)  # enlarged by less than 1.1
    assert choose_bucket(1280, 720, 60, buckets) == (512, 768, 49)   # the upright one has too many frames
    shape_first = choose_bucket(1280, 720, 200, parse_buckets("512x768x121,768x512x49"))
    assert shape_first == (768, 512, 49)
    with pytest.raises(Unusable, match="too small: 460x690, the smallest bucket is 512x768x"):
        choose_bucket(460, 690, 121, buckets)
    with pytest.raises(Unusable, match="too short: 40 frames, the shortest bucket has 121"):
        choose_bucket(720, 1280, 40, [buckets[0], buckets[2]])


# ------------------------------------------------------------ manifest and check


def test_the_three_kinds_of_manifest_say_the_same(tmp_path):
    write(tmp_path / "a.mp4", count=9)
    rows = [{"video": "a.mp4", "caption": " a cat, \"grey\" ", "identity": "x", "unknown": "1"},
            {"media_path": "b.mp4", "caption": "ä dog"}]
    lists = {"m.jsonl": "\n".join(map(json.dumps, rows)), "m.json": json.dumps(rows),
             "d.json": json.dumps({"data": rows, "version": 2}),
             "m.csv": "\ufeffvideo,media_path,caption,identity,unknown\n"
                      'a.mp4,," a cat, ""grey"" ",x,1\n,b.mp4,ä dog,,\n'}
    for name, text in lists.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        read = read_manifest(tmp_path / name)
        assert [(r.number, r.video.name, r.caption, r.identity, r.broken) for r in read] == [
            (1, "a.mp4", 'a cat, "grey"', "x", None), (2, "b.mp4", "ä dog", "", None)], name


def test_an_unreadable_manifest_is_one_line(tmp_path):
    for name, data in (("none.jsonl", None), ("a.json", b"{"), ("b.json", b'{"rows": []}'), ("c.txt", b"a"),
                       ("d.csv", b"\xff\xfe\x00"), ("e.jsonl", b"\n"), ("f.json", b"[]"), ("g.json", b"[" * 100000)):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="^expected .*; ") as caught:
            read_manifest(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_no_path_leads_out_of_the_folder_unless_it_is_allowed(tmp_path):
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir(), other.mkdir()
    write(other / "a.mp4", count=9)
    (home / "link.mp4").symlink_to(other / "a.mp4")
    (home / "folder").symlink_to(other)
    (home / "loop.mp4").symlink_to(home / "loop.mp4")
    (home / "good.mp4").write_bytes((other / "a.mp4").read_bytes())
    (home / "inner.mp4").symlink_to(home / "good.mp4")
    names = ["../other/a.mp4", str(other / "a.mp4"), "link.mp4", "folder/a.mp4", "sub/../good.mp4"]
    rows = [{"video": name, "caption": "x"} for name in names]
    rows += [{"video": "good.mp4", "caption": "x", "reference": "../other/a.png"},
             {"video": "good.mp4", "caption": "x", "faces": str(other / "f.json")}]
    path = manifest(home, *rows)
    assert [row.broken and row.broken.reason for row in read_manifest(path)] == ["path outside"] * 7
    named = [row.broken and row.broken.reason for row in read_manifest(path, roots=[other])]
    assert named == ["path outside", None, None, None, "path outside", "path outside", None]
    assert [row.broken for row in read_manifest(path, allow_outside=True)] == [None] * 7
    good = manifest(home, {"video": "good.mp4", "caption": "x"}, {"video": "inner.mp4", "caption": "x"})
    assert [row.broken for row in read_manifest(good)] == [None, None]
    odd = manifest(home, {"video": "loop.mp4", "caption": "x"}, {"video": "a\0b", "caption": "x"},
                   {"video": "n" * 5000, "caption": "x"})
    assert [row.broken.reason for row in check(odd, SMALL).refused] == ["missing file"] * 3


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n",
                                  "ffconcat version 1.0\nfile good.mp4\n"])
def test_a_playlist_in_the_place_of_a_video_opens_no_other_file(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.mp4", count=9)
    (tmp_path / "list.mp4").write_text(text)
    with pytest.raises(Unusable, match="cannot be decoded"):
        probe(tmp_path / "list.mp4")


def broken_files(folder: Path) -> list[tuple[dict, str]]:
    """Rows and the reason why each is not used."""
    write(folder / "good.mp4", options={"movflags": "+faststart"})
    data = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: int(len(data) * 0.9)])
    (folder / "head.mp4").write_bytes(data[:100])
    write(folder / "long.mkv", count=39, draw=lambda p, k: np.copyto(p, np.random.default_rng(k).integers(
        0, 255, p.shape, np.uint8)))
    data = (folder / "long.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(data[: int(len(data) * 0.6)])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 100)
    write_sound(folder / "sound.mp4")
    write(folder / "short.mp4", count=8)
    write(folder / "small.mp4", size=(24, 36))
    Image.new("RGB", (72, 48)).save(folder / "good.png")
    (folder / "half.png").write_bytes((folder / "good.png").read_bytes()[:60])
    flat = '{"frame_rate": 24, "size": [48, 72], "frames": [{"t": 0, "box": [9, 9, 9, 20]}]}'
    (folder / "faces.json").write_text(flat)
    (folder / "turned.json").write_text('{"frame_rate": 24, "size": [72, 48], "frames": []}')
    (folder / "folder.mp4").mkdir()
    good = {"video": "good.mp4", "caption": "x"}
    return [(good, ""), ({**good, "reference": "good.png"}, ""), ({**good, "video": "good.png"}, "too short"),
            *(({**good, "video": name}, reason) for name, reason in (
                ("none.mp4", "missing file"), ("folder.mp4", "missing file"), ("cut.mp4", "cut off"),
                ("cut.mkv", "cut off"), ("head.mp4", "cannot be decoded"), ("empty.mp4", "cannot be decoded"),
                ("text.mp4", "cannot be decoded"),
                ("half.png", "cannot be decoded"), ("sound.mp4", "no video stream"), ("short.mp4", "too short"),
                ("small.mp4", "too small"), ("../x.mp4", "path outside"))),
            ({**good, "caption": " \n"}, "empty caption"), ({"video": "good.mp4"}, "empty caption"),
            ({"caption": "x"}, "bad row"), ({"video": 3, "caption": "x"}, "bad row"), ([1], "bad row"),
            ({**good, "faces": "faces.json"}, "bad faces file"), ({**good, "faces": "turned.json"}, "bad faces file"),
            ({**good, "faces": "none.json"}, "bad faces file"), ({**good, "reference": "none.png"}, "bad reference"),
            ({**good, "reference": "half.png"}, "bad reference"), ({**good, "reference": "good.mp4"}, "bad reference")]


def test_check_names_every_broken_row_and_its_reason_in_one_line_each(tmp_path):
    cases = broken_files(tmp_path)
    path = manifest(tmp_path, *(row for row, _ in cases))
    path.write_text(path.read_text() + "{not json\n")
    report = check(path, SMALL[:2])
    expected = {n: reason for n, (_, reason) in enumerate(cases, 1) if reason} | {len(cases) + 1: "bad row"}
    assert {row.number: row.broken.reason for row in report.refused} == expected
    assert [row.number for row in report.used] == [1, 2] and report.used[0].bucket == WIDE
    lines = report.lines()
    assert len(lines) == len(expected) + 1
    for line, (number, reason) in zip(lines, expected.items(), strict=False):
        assert line.startswith(f"row {number}: {reason}: ") and "\n" not in line
    assert lines[-1].startswith(f"2 of {len(cases) + 1} rows are used; not used: ")
    assert "cannot be decoded 4" in lines[-1] and lines[-1].endswith("; buckets: 32x48x9 2")
    assert next(line for line in lines if "cut.mp4" in line).endswith(" of 24 frames")


def test_the_command_ends_with_0_1_or_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.mp4", count=9)
    row = {"video": "a.mp4", "caption": "x"}
    manifest(tmp_path, row, name="good.jsonl")
    manifest(tmp_path, row, {"video": "b.mp4", "caption": "x"}, name="some.jsonl")
    options = ["--buckets", "32x48x9", "--time-scale", "4", "--space-scale", "8"]
    for arguments, status, words in ((["check", "good.jsonl"], 0, "1 of 1 rows are used; buckets: 32x48x9 1"),
                                     (["check", "some.jsonl"], 1, "row 2: missing file: "),
                                     (["check", "none.jsonl"], 2, ""),
                                     (["check", "good.jsonl", "--frame-rate", "0"], 2, "")):
        monkeypatch.setattr(sys, "argv", ["clips.py", *arguments, *options])
        assert clips.main() == status, arguments
        out, err = capsys.readouterr()
        assert words in out and (status != 2 or (out == "" and err.startswith("clips.py: expected ")))
        assert err.count("\n") == (status == 2), err
    run = subprocess.run([sys.executable, clips.__file__], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout.startswith("usage: clips.py") and "check" in run.stdout


# ------------------------------------------------------------ faces


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


@pytest.mark.parametrize("bucket", [Bucket(48, 72, 9), Bucket(96, 96, 9), Bucket(56, 64, 9)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_boxes_follow_a_drawn_square_through_resize_and_crop(tmp_path, bucket, scale):
    path = write(tmp_path / "square.mkv", count=12, size=(96, 160), codec="ffv1", pix="bgr0", draw=draw_square)
    faces = load_faces(faces_file(tmp_path / "faces.json", range(12), scale=scale, marks=True))
    crop = cover(96, 160, bucket)
    boxes, marks, valid = faces_for_clip(faces, bucket, crop, clip_times(9, 24.0))
    clip, seen = load_clip(path, bucket), 0
    for k in range(9):
        bright = clip[0, k] > 0
        if not valid[k]:
            continue
        seen += 1
        rows, columns = bright.any(dim=1).nonzero()[:, 0], bright.any(dim=0).nonzero()[:, 0]
        drawn = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
        inside = boxes[k].clamp(min=0).minimum(torch.tensor([bucket.width, bucket.height] * 2))
        assert (inside - drawn).abs().max() <= 1.0, (k, boxes[k], drawn)  # a pixel: the edge is smoothed
        assert torch.equal(marks[k, 0], boxes[k, :2]) and torch.equal(marks[k, 4], boxes[k, 2:])
        mask = box_mask(boxes, valid, bucket.height, bucket.width)[k]
        assert (mask - bright.float()).abs().sum() <= 2 * (rows[-1] - rows[0] + columns[-1] - columns[0] + 4)
    assert seen >= 6


def test_frames_without_a_face_and_faces_cropped_away_are_not_valid(tmp_path):
    faces = load_faces(faces_file(tmp_path / "faces.json", [0, 1, 2, 6]))
    bucket, whole = Bucket(96, 160, 9), cover(96, 160, Bucket(96, 160, 9))
    boxes, marks, valid = faces_for_clip(faces, bucket, whole, clip_times(9, 24.0))
    assert valid.tolist() == [True, True, True, False, False, False, True, False, False] and marks is None
    assert boxes[~valid].abs().sum() == 0 and box_mask(boxes, valid, 96, 160)[~valid].sum() == 0
    assert boxes[1].tolist() == list(face_box(1)) and box_mask(boxes, valid, 96, 160)[1].sum() == 24 * 24
    narrow = Bucket(96, 96, 3)  # keeps columns 32..128; the box spans 10..34, 14..38, 18..42
    assert cover(96, 160, narrow) == (96, 160, 0, 32)
    assert faces_for_clip(faces, narrow, cover(96, 160, narrow), clip_times(3, 24.0))[2].tolist() == [False] * 3
    every_third = load_faces(faces_file(tmp_path / "slow.json", [0, 3, 6], rate=8.0))  # looked at every third frame
    assert faces_for_clip(every_third, bucket, whole, clip_times(9, 24.0))[2].tolist() == [True] * 8 + [False]
    none = load_faces(faces_file(tmp_path / "none.json", []))
    assert faces_for_clip(none, bucket, whole, clip_times(9, 24.0))[2].sum() == 0


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"frame_rate": 24, "size": [4, 4]}', '{"frame_rate": 0, "size": [4, 4], "frames": []}',
    '{"frame_rate": 24, "size": [4], "frames": []}', '{"frame_rate": 24, "size": [4, 4], "frames": [{"t": 0}]}',
    '{"frame_rate": 24, "size": [4, 4], "frames": [{"t": 0, "box": [0, 0, 1]}]}',
    '{"frame_rate": 24, "size": [4, 4], "frames": [{"t": NaN, "box": [0, 0, 1, 1]}]}',
    '{"frame_rate": 24, "size": [4, 4], "frames": [{"t": 0, "box": [0, 2, 1, 1]}]}',
    '{"frame_rate": 24, "size": [4, 4], "frames": [{"t": 0, "box": [0, 0, 1, 1], "landmarks": [[0, 0]]}]}'])
def test_a_bad_faces_file_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "faces.json").write_text(text)
    with pytest.raises(ValueError, match="faces.json; see load_faces$") as caught:
        load_faces(tmp_path / "faces.json")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ references


def picture_index(picture: Image.Image) -> int:
    return round((np.asarray(picture).mean() - grey(0)) / STEP)


def draws(rows, i, count: int = 30):
    g = torch.Generator().manual_seed(0)
    return [draw_reference(rows, i, g) for _ in range(count)]


def test_the_given_reference_comes_first_then_another_clip_then_another_moment(tmp_path):
    write(tmp_path / "a.mp4", count=20)
    write(tmp_path / "b.mp4", count=10, first=24)
    Image.new("RGB", (20, 30), (250, 250, 250)).save(tmp_path / "ref.png")
    rows = [{"video": "a.mp4", "caption": "x", "identity": "p", "reference": "ref.png"},
            {"video": "a.mp4", "caption": "y", "identity": "p"}, {"video": "b.mp4", "caption": "x", "identity": "p"},
            {"video": "a.mp4", "caption": "x", "identity": "q"}, {"video": "b.mp4", "caption": "x"}]
    rows = check(manifest(tmp_path, *rows), SMALL).used
    assert len(rows) == 5
    given = draw_reference(rows, 0, torch.Generator())
    assert given.source == "given" and given.picture.size == (20, 30)
    for i, low, high in ((1, 24, 33), (2, 0, 19)):
        found = draws(rows, i)
        assert {d.source for d in found} == {"other clip"}
        assert all(low <= picture_index(d.picture) <= high for d in found)
    for i, own, others in ((3, range(9), range(9, 20)), (4, range(24, 33), range(33, 34))):
        found = draws(rows, i)
        assert {d.source for d in found} == {"other moment"}, "no identity, or nobody else has it"
        numbers = {picture_index(d.picture) for d in found}
        assert numbers <= set(others) and not numbers & set(own)


@pytest.mark.parametrize("rate", ["12", "15", "30000/1001", "60"])
def test_the_targets_own_frames_are_never_drawn_when_there_is_a_choice(tmp_path, rate):
    write(tmp_path / "a.mp4", count=36, rate=rate)
    (row,) = check(manifest(tmp_path, {"video": "a.mp4", "caption": "x"}), SMALL).used
    for start in (0.0, 0.11):
        row = clips.replace(row, start=start)
        own = set(indices(load_clip(row.video, row.bucket, 24.0, start)))
        assert own <= set(row.own_frames())
        drawn = {picture_index(d.picture) for d in draws([row], 0, 40)}
        assert len(drawn) > 5 and not drawn & set(range(min(own), max(own) + 1))


def test_a_clip_without_another_moment_gives_its_own_frame_and_says_so(tmp_path):
    write(tmp_path / "a.mp4", count=9)
    Image.new("RGB", (72, 48)).save(tmp_path / "b.png")
    rows = check(manifest(tmp_path, *({"video": n, "caption": "x"} for n in ("a.mp4", "b.png"))), SMALL).used
    assert [draw_reference(rows, i, torch.Generator()).source for i in (0, 1)] == ["own frame"] * 2


def test_frames_with_a_face_are_preferred_and_come_with_its_box(tmp_path):
    write(tmp_path / "a.mkv", count=20, size=(96, 160), codec="ffv1", pix="bgr0", draw=draw_square)
    faces_file(tmp_path / "faces.json", [2, 11, 13], marks=True)
    (row,) = check(manifest(tmp_path, {"video": "a.mkv", "caption": "x", "faces": "faces.json"}), SMALL).used
    seen = set()
    for drawn in draws([row], 0):
        bright = np.asarray(drawn.picture)[:, :, 0] > 128
        x0, y0 = bright.any(axis=0).argmax(), bright.any(axis=1).argmax()
        assert drawn.source == "other moment" and drawn.box.tolist() == [x0, y0, x0 + 24, y0 + 24]
        assert drawn.landmarks[0].tolist() == [x0, y0]
        seen.add((x0 - 10) // 4)
    assert seen == {11, 13}


# ------------------------------------------------------------ cache


class Mean(nn.Module):
    """Stands in for the VAE: the mean colour of each cell, and a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.calls = 0

    def encode(self, video):
        self.calls += 1
        return nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8)) * self.scale


@pytest.fixture
def rows(tmp_path):
    for k, (name, size) in enumerate((("a", (48, 72)), ("b", (48, 72)), ("c", (72, 48)))):
        write(tmp_path / f"{name}.mp4", count=12, first=k, size=size)
    return check(manifest(tmp_path, *({"video": f"{n}.mp4", "caption": n} for n in "abc")), SMALL).used


def count_new(rows, vae, folder) -> int:
    before = vae.calls
    cache_latents(rows, vae, vae.encode, folder)
    return vae.calls - before


def test_cached_latents_are_the_direct_ones_and_are_computed_once(tmp_path, rows):
    vae, folder = Mean(), tmp_path / "cache"
    latents = cache_latents(rows, vae, vae.encode, folder)
    assert len(latents) == 3 and vae.calls == 3
    for i, row in enumerate(rows):
        direct = vae.encode(load_clip(row.video, row.bucket)[None])[0].detach()
        assert torch.equal(latents[i], direct) and not latents[i].requires_grad
    assert count_new(rows, vae, folder) == 0
    assert {str(b): group for b, group in latents.groups.items()} == {"32x48x9": [0, 1], "48x32x9": [2]}
    (part, x), *rest = latents.batches(rows[0].bucket, 2, torch.Generator().manual_seed(1))
    assert sorted(part) == [0, 1] and x.shape == (2, 3, 3, 4, 6) and torch.equal(x[0], latents[part[0]]) and not rest
    assert [p for p, _ in latents.batches(rows[0].bucket, 1)] == [[0], [1]]


def test_any_change_of_content_settings_or_weights_makes_a_new_latent(tmp_path, rows, monkeypatch):
    vae, folder = Mean(), tmp_path / "cache"
    assert count_new(rows, vae, folder) == 3
    write(tmp_path / "a.mp4", count=12, first=3)
    assert count_new(rows, vae, folder) == 1, "other content under the same name"
    os.utime(tmp_path / "b.mp4", ns=(1, 1))
    (tmp_path / "c.mp4").rename(tmp_path / "d.mp4")
    moved = [rows[0], rows[1], clips.replace(rows[2], video=tmp_path / "d.mp4")]
    assert count_new(moved, vae, folder) == 0, "a new date or name is no new content"
    for change in ({"start": 1 / 24}, {"frame_rate": 30.0}, {"bucket": Bucket(40, 48, 9)},
                   {"bucket": Bucket(32, 48, 5)}):
        assert count_new([clips.replace(rows[0], **change)], vae, folder) == 1, change
    with torch.no_grad():
        vae.scale += 1e-6
    assert count_new([rows[0]], vae, folder) == 1, "other weights"
    monkeypatch.setattr(clips, "FORMAT", clips.FORMAT + 1)
    assert count_new([rows[0]], vae, folder) == 1, "another way of decoding"


def test_a_change_in_the_middle_of_a_large_file_is_seen_when_its_date_changes(tmp_path):
    path, known = tmp_path / "large", {}
    data = bytearray(3 << 20)
    path.write_bytes(data)
    first = clips.content_hash(path, known)
    data[len(data) // 2] = 1
    path.write_bytes(data)
    os.utime(path, ns=(5, 5))
    assert clips.content_hash(path, known) != first


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "text"])
def test_a_damaged_cache_file_is_computed_again(tmp_path, rows, damage):
    vae, folder = Mean(), tmp_path / "cache"
    latents = cache_latents(rows, vae, vae.encode, folder)
    good, data = latents[0].clone(), latents.paths[0].read_bytes()
    bad = {"cut": data[:-5], "flipped": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:], "empty": b"", "text": b"{}",
           "other": latents.paths[1].read_bytes()}[damage]
    latents.paths[0].write_bytes(bad)
    (folder / "hashes.json").write_text("{")
    assert count_new(rows, vae, folder) == 1
    assert torch.equal(latents[0], good)


def test_an_interrupted_caching_goes_on_where_it_stopped(tmp_path, rows):
    vae, folder = Mean(), tmp_path / "cache"

    def dies(video):
        if vae.calls == 2:
            raise KeyboardInterrupt
        return vae.encode(video)

    with pytest.raises(KeyboardInterrupt):
        cache_latents(rows, vae, dies, folder)
    assert len(list(folder.glob("*.safetensors"))) == 2 and not list(folder.glob("*.partial"))
    assert count_new(rows, vae, folder) == 1


def test_a_clip_that_changed_since_the_check_is_named_by_its_row(tmp_path, rows):
    write(tmp_path / "b.mp4", count=3)
    vae = Mean()
    with pytest.raises(Unusable, match="^too short: row 2, b.mp4: 3 of 9 frames; check the manifest again$"):
        cache_latents(rows, vae, vae.encode, tmp_path / "cache")


def test_the_cache_command_takes_the_factors_of_the_checkpoints_vae(tmp_path, monkeypatch, capsys):
    vae = VideoVAE(tiny.VAE)
    save_checkpoint(tmp_path / "vae.safetensors", {f"vae.{k}": v for k, v in vae.state_dict().items()},
                    {"vae": tiny.VAE, "transformer": {}})
    write(tmp_path / "a.mp4", count=9)
    arguments = [str(manifest(tmp_path, {"video": "a.mp4", "caption": "x"})), "--checkpoint-path",
                 str(tmp_path / "vae.safetensors"), "--folder", str(tmp_path / "cache"), "--buckets"]
    for buckets, status in (("32x48x9", 0), ("32x48x8", 2), ("30x48x9", 2)):
        monkeypatch.setattr(sys, "argv", ["clips.py", "cache", *arguments, buckets])
        assert clips.main() == status, capsys.readouterr()
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    with torch.no_grad():
        direct = vae.eval().encode(load_clip(tmp_path / "a.mp4", WIDE)[None])[0]
    assert (clips._load(cached) - direct).abs().max() < 1e-5


def test_contexts_are_computed_once_for_each_caption_and_encoder(tmp_path):
    asked = []

    def encode(captions):
        asked.extend(captions)
        return torch.full((len(captions), 4, 2), float(len(captions[0])))

    contexts = cache_contexts(["a", "bb", "a"], encode, tmp_path, "one")
    assert asked == ["a", "bb"] and torch.equal(contexts["bb"](), torch.full((4, 2), 2.0))
    cache_contexts(["bb", "ccc"], encode, tmp_path, "one")
    assert asked == ["a", "bb", "ccc"]
    cache_contexts(["a"], encode, tmp_path, "two")
    assert asked == ["a", "bb", "ccc", "a"]
