"""Real files of many kinds become the right frames, at the right times, upright, or are refused.

Every file is made here with PyAV; pixels of lossy codecs are compared by grey level (half a step of
6), everything else exactly. Hardware: CPU, some seconds. Run: python -m pytest tests/test_frames.py
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from clipfiles import (
    BLOCKS,
    ONE,
    SMALL,
    TURNS,
    WIDE,
    draw_moving,
    grey,
    indices,
    write,
    write_picture,
)
from PIL import Image, ImageOps

from clips import frames
from clips.frames import Bucket, Unusable, decode, frame_at, load_clip, probe

# ------------------------------------------------------------ decoding

KINDS = {
    "h264.mp4": {}, "mpeg4.avi": {"codec": "mpeg4"}, "vp9.webm": {"codec": "libvpx-vp9"},
    "ten-bit.mp4": {"pix": "yuv420p10le"}, "odd.mkv": {"codec": "ffv1", "size": (47, 71)},
    "transport.ts": {},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_codec_and_size_gives_its_frames_in_order_at_the_buckets_size(tmp_path, name):
    path = write(tmp_path / name, **KINDS[name])
    clip = load_clip(path, Bucket(32, 48, 9))
    assert clip.shape == (3, 9, 32, 48) and clip.dtype == torch.float32 and clip.abs().max() <= 1
    assert indices(clip) == list(range(9))
    found = probe(path)
    assert (found.height, found.width) == KINDS[name].get("size", (48, 72))
    assert len(found.times) == 24 and found.seconds == pytest.approx(1.0, abs=0.003)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_other_frame_rates_are_resampled_to_the_nearest_frame_in_time(tmp_path, suffix):
    for rate in ("12", "15", "30000/1001", "60"):
        path = write(tmp_path / f"clip.{suffix}", count=32, rate=rate)
        # By the text: the frame whose time is nearest, of two equally near ones the earlier.
        exact = [Fraction(k, 24) * Fraction(rate) - Fraction(1, 2) for k in range(9)]
        assert indices(load_clip(path, WIDE, 24.0)) == [int(np.ceil(n)) for n in exact]
        assert probe(path).frames(24.0) == int(32 / Fraction(rate) * 24)


def test_the_last_frames_of_a_clip_are_used_and_one_frame_more_is_too_short(tmp_path):
    for rate, count, usable in (("24", 9, 9), ("12", 5, 10), ("15", 6, 9), ("60", 23, 9)):
        path = write(tmp_path / "clip.mp4", count=count, rate=rate)
        assert load_clip(path, Bucket(32, 48, usable)).shape[1] == usable
        with pytest.raises(Unusable, match=f"^too short: .*: {usable} of {usable + 1} frames$"):
            load_clip(path, Bucket(32, 48, usable + 1))


def test_variable_frame_rate_follows_the_timestamps_from_a_start_in_seconds(tmp_path):
    stamps = [0, 10, 20, 30, 100, 200, 210, 220, 300, 500, 900, 910]  # milliseconds
    for suffix in ("mp4", "mkv"):
        path = write(tmp_path / f"vfr.{suffix}", count=12, stamps=stamps)
        # 400 and 700 lie midway: the earlier
        assert indices(load_clip(path, WIDE, 10.0)) == [0, 4, 5, 8, 8, 9, 9, 9, 10]
        assert indices(load_clip(path, WIDE, 20.0, start=0.2)) == [5, 7, 8, 8, 8, 9, 9, 9, 9]


@pytest.mark.parametrize("turn", TURNS)
def test_rotation_in_the_header_is_honoured(tmp_path, turn):
    matrix, place = TURNS[turn]

    def top(picture, k):
        picture[:12] = 255  # the stored top rows

    path = write(tmp_path / "turned.mp4", count=9, matrix=matrix, draw=top)
    shape = (48, 72) if turn == "half" else (72, 48)
    assert (probe(path).height, probe(path).width) == shape
    bright = load_clip(path, WIDE if turn == "half" else SMALL[1])[:, 0] > 0.5
    assert bright[(slice(None), *place)].float().mean() > 0.9 and bright.float().mean() < 0.35


# Quadrants as ffmpeg and browsers show them, from above: stored are red, green, blue, yellow.
ORIENTATIONS = {(1, 0, 0, 1): "RGBY", (-1, 0, 0, 1): "GRYB", (1, 0, 0, -1): "BYRG",
                (-1, 0, 0, -1): "YBGR", (0, 1, -1, 0): "BRYG", (0, -1, 1, 0): "GYRB",
                (0, 1, 1, 0): "RBGY", (0, -1, -1, 0): "YGBR"}


@pytest.mark.parametrize("numbers", ORIENTATIONS)
def test_a_display_matrix_turns_and_mirrors_the_picture(tmp_path, numbers):
    def quadrants(picture, k):
        h, w = picture.shape[0] // 2, picture.shape[1] // 2
        picture[:h, :w], picture[:h, w:] = (200, 30, 30), (30, 160, 40)
        picture[h:, :w], picture[h:, w:] = (40, 60, 200), (240, 220, 60)

    a, b, c, d = (ONE * n for n in numbers)
    path = write(tmp_path / "a.mp4", 1, draw=quadrants, matrix=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    (found,) = decode(path)
    pixels = found.pixels()
    assert (found.height, found.width) == pixels.shape[:2] == ((72, 48) if b else (48, 72))
    seen = ""
    for row in (1, 3):
        for column in (1, 3):
            r, g, b = pixels[found.height * row // 4, found.width * column // 4]
            seen += "Y" if min(r, g) > 200 else "RGB"[np.argmax([r, g, b])]
    assert seen == ORIENTATIONS[numbers]


@pytest.mark.parametrize("name, how", [
    ("a.mkv", {"codec": "ffv1"}), ("a.webm", {"codec": "libvpx-vp9", "coder": {"crf": "10"}}),
    ("b.webm", {"codec": "libvpx", "coder": {"crf": "4", "b": "5M", "auto-alt-ref": "0"}})])
def test_what_is_transparent_lies_on_white_as_in_a_still(tmp_path, name, how):
    def fade(picture, k):
        picture[:] = 200, 40, 40, 255
        picture[:, 24:48, 3], picture[:, 48:, 3] = 128, 0

    path = write(tmp_path / name, 3, pix="yuva420p", draw=fade, **how)
    frame = list(decode(path))[1]
    found = [frame.pixels()[24, column].tolist() for column in (12, 36, 60)]
    for seen, right in zip(found, ([200, 40, 40], [227, 147, 147], [255] * 3), strict=True):
        assert seen == pytest.approx(right, abs=4), found


def test_two_fields_become_one_picture_of_the_first_moment(tmp_path):
    def column(picture, at):
        picture[:] = 16
        picture[:, at : at + 12] = 235

    def fields(picture, k):
        column(picture, 6 * k)
        late = np.empty_like(picture)
        column(late, 6 * k + 3)
        picture[::2] = late[::2]  # the odd rows are the first field, as the file says

    path = write(tmp_path / "a.mp4", 9, draw=fields, coder={"x264-params": "bff=1:crf=4"})
    every, times = list(decode(path)), probe(path).times
    assert times == pytest.approx([k / 24 for k in range(9)])
    right = np.empty((48, 72, 3), np.uint8)
    for k, frame in enumerate(every):
        column(right, 6 * k)
        error = np.abs(frame.pixels().astype(int) - right)[2:-2].mean()
        assert error < 2, (k, error)  # levels; 9 with teeth, 18 of the second moment
    assert np.array_equal(frame_at(path, times, 5).pixels(), every[5].pixels())


def test_notes_without_a_name_do_not_hide_the_orientation(tmp_path):
    for turn in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.fromarray(BLOCKS[:48, :72]).save(tmp_path / "a.jpg", exif=exif, subsampling=0)
        with Image.open(tmp_path / "a.jpg") as image:
            right = np.asarray(ImageOps.exif_transpose(image)).astype(int)
        (tmp_path / "a.jpg").rename(tmp_path / "a.mjpeg")  # by its name a film of JPEGs: FFmpeg's
        (found,) = decode(tmp_path / "a.mjpeg")
        assert (found.height, found.width) == right.shape[:2]
        assert np.abs(found.pixels() - right).mean() < 12, turn  # turned wrongly 60 and more


@pytest.mark.parametrize("transfer, primaries, beyond", [
    (16, 9, True), (18, 9, True), (14, 9, True), (1, 12, True), (1, 1, False), (2, 2, False)])
def test_hdr_and_wide_colours_are_noticed(tmp_path, transfer, primaries, beyond):
    path = write(tmp_path / "a.mp4", 2, transfer=transfer, primaries=primaries)
    assert probe(path).beyond_srgb is beyond


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = write(tmp_path / "wide.mp4", count=9, size=(48, 54), aspect=Fraction(4, 3))
    assert (probe(path).height, probe(path).width) == (48, 72)


def test_hd_files_that_do_not_name_their_colour_matrix_are_read_as_bt709(tmp_path):
    def red(picture, k):
        picture[:] = 200, 40, 40

    (found,) = decode(write(tmp_path / "hd.mp4", 1, size=(720, 720), draw=red, colors="ITU709"))
    error = np.abs(found.pixels()[100, 100].astype(int) - [200, 40, 40]).max()
    assert error <= 4, error  # levels; by BT.601 it is off by 20


def test_pictures_and_one_frame_clips_are_videos_of_one_frame(tmp_path):
    write_picture(tmp_path / "a.png", level=grey(5))
    write_picture(tmp_path / "turned.jpeg", (48, 72), grey(5), turned=True)
    write(tmp_path / "d.mp4", count=1, first=5)
    write(tmp_path / "f.mp4", count=1, first=5, rate="1")  # shown for a second, still one frame
    for name in ("a.png", "turned.jpeg", "d.mp4", "f.mp4"):
        found = probe(tmp_path / name)
        assert (found.height, found.width, found.frames(24.0)) == (48, 72, 1), name
        clip = load_clip(tmp_path / name, SMALL[2])
        assert clip.shape == (3, 1, 32, 48) and indices(clip) == [5], name
        with pytest.raises(Unusable, match="too short"):
            load_clip(tmp_path / name, WIDE)


def test_the_crop_is_the_middle_and_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((64, 192, 3), np.uint8)
    stripes[:, ::4] = 255  # without a low-pass, one of four columns is seen or missed
    stripes[:, :48], stripes[:, -48:] = (255, 0, 0), (0, 0, 255)  # what the crop must remove
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    clip = load_clip(tmp_path / "stripes.png", Bucket(16, 24, 1))[:, 0, :, 1:-1]
    assert (clip + 0.5).abs().max() < 0.05, "a quarter of white everywhere"
    assert frames.cover(64, 192, Bucket(16, 24, 1)) == (16, 48, 0, 12)
    same = load_clip(tmp_path / "stripes.png", Bucket(64, 192, 1))[:, 0]
    assert torch.equal(same, torch.from_numpy(stripes).permute(2, 0, 1) / 127.5 - 1), "no resize"


def test_a_playlist_in_the_place_of_a_video_opens_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.mp4", count=9)
    for text in ("#EXTM3U\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n",
                 "ffconcat version 1.0\nfile good.mp4\n"):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(Unusable, match="cannot be decoded"):
            probe(tmp_path / "list.mp4")


# ------------------------------------------------------------ one frame by its number

GROUPS = {"coder": {"x264-params": "keyint=8:min-keyint=8:scenecut=0:bframes=3"}, "count": 30}
OPEN = {"coder": {"x264-params": "open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=3"},
        "count": 30}
NARROW = [0, 1, 2, 3, 100, 101, 102, 220, 221, 500, 900, 910]  # 1 ms apart: nearer than TIE
HIDDEN = [40 * k - 200 for k in range(30)]  # an edit list hides what comes before 0
SOUGHT = {
    "b-frames.mp4": GROUPS, "open.mkv": OPEN, "open.ts": OPEN, "no-stamps.h264": GROUPS,
    "fragments.mp4": {**GROUPS, "options": {"movflags": "frag_keyframe+empty_moov"}},
    # Both begin in the middle after a seek, with frames that lack what they were predicted from:
    "b-frames.ts": {"codec": "mpeg4", "coder": {"bf": "2", "g": "6"}, "count": 40},
    "refresh.mkv": {"coder": {"x264-params": "intra-refresh=1:keyint=8:bframes=0"}, "count": 40},
    "moving.gif": {"codec": "gif", "pix": "rgb8"},
    "narrow.mkv": {"stamps": NARROW, "count": 12, "coder": {"g": "4"}},
    "edit-list.mp4": {**GROUPS, "stamps": HIDDEN},
    "late.mp4": {**GROUPS, "stamps": [t + 900 for t in HIDDEN]},
    "turned.mp4": {**GROUPS, "matrix": TURNS["clockwise"][0]},
}


@pytest.mark.parametrize("name", SOUGHT)
def test_a_frame_by_its_number_is_that_frame_of_the_whole_decoding(tmp_path, name, monkeypatch):
    path = write(tmp_path / name, draw=draw_moving, **SOUGHT[name])
    every, times = list(decode(path)), probe(path).times
    assert len(every) == len(times) and (name != "edit-list.mp4" or len(times) == 25)
    if name in ("b-frames.mp4", "open.mkv", "fragments.mp4", "turned.mp4"):  # where seeking works
        monkeypatch.setattr(frames, "decode", lambda path: pytest.fail("from the beginning"))
    for k, frame in enumerate(every[1:], 1):
        found = frame_at(path, times, k)
        assert (found.height, found.width) == (frame.height, frame.width)
        assert found.time == pytest.approx(frame.time, abs=1e-9)
        assert found.end == pytest.approx(frame.end, abs=1e-9)
        assert np.array_equal(found.pixels(), frame.pixels()), k


def test_a_frame_number_that_is_not_there_is_refused_and_a_cut_file_is_named(tmp_path):
    path = write(tmp_path / "a.mkv", count=9)
    times = probe(path).times
    for index in (-1, 9):
        with pytest.raises(ValueError, match=f"expected a frame number below 9, got {index}; "):
            frame_at(path, times, index)
    write(path, count=5)
    with pytest.raises(Unusable, match="^cut off: a.mkv: fewer than 8 frames$"):
        frame_at(path, times, 7)
    Image.fromarray(BLOCKS).save(tmp_path / "a.png")
    assert np.array_equal(frame_at(tmp_path / "a.png", (0.0,), 0).pixels(), BLOCKS)


# ------------------------------------------------------------ buckets


def test_bucket_texts_are_read_and_bad_ones_refused():
    assert frames.parse_buckets("512x768x121, 768x512x1") == [(512, 768, 121), (768, 512, 1)]
    for text, message in (("512x768", "expected buckets such as"), ("axbxc", "got 'axbxc'"),
                          ("500x768x121", "multiples of 32, got 500x768x121"),
                          ("512x768x120", "got 120; use 113"), ("0x32x1", "multiples of 32")):
        with pytest.raises(ValueError, match=message):
            frames.parse_buckets(text)


def test_a_clip_goes_to_the_nearest_shape_that_it_fills_with_the_most_frames():
    buckets = frames.parse_buckets("512x768x121,512x768x49,768x512x121,512x768x1,1024x1536x121")
    for clip, bucket in (
            ((720, 1280, 200), (512, 768, 121)), ((1280, 720, 200), (768, 512, 121)),
            ((720, 1280, 60), (512, 768, 49)), ((720, 1280, 1), (512, 768, 1)),
            ((1080, 1920, 121), (1024, 1536, 121)),
            ((470, 700, 121), (512, 768, 121)),  # enlarged by less than 1.1
            ((1280, 720, 60), (512, 768, 49))):  # the upright one has too many frames
        assert frames.choose_bucket(*clip, buckets) == bucket
    upright_is_shorter = frames.parse_buckets("512x768x121,768x512x49")
    assert frames.choose_bucket(1280, 720, 200, upright_is_shorter) == (768, 512, 49), "shape first"
    with pytest.raises(Unusable, match="too small: 460x690, the smallest bucket is 512x768x"):
        frames.choose_bucket(460, 690, 121, buckets)
    with pytest.raises(Unusable, match="too short: 40 frames, the shortest bucket has 121"):
        frames.choose_bucket(720, 1280, 40, [buckets[0], buckets[2]])
