"""Real files of many kinds become the right frames, at the right times, upright; broken ones are named.

Every file is made here with PyAV; pixels of lossy codecs are compared by grey level (half a step of 6), everything else
exactly. Hardware: CPU, some seconds. Run: python -m pytest tests/test_frames.py
"""

import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from clipfiles import KINDS, SMALL, TURNS, WIDE, draw_moving, grey, indices, need, write
from PIL import Image

from clips import frames
from clips.frames import (
    Bucket,
    Unusable,
    choose_bucket,
    cover,
    decode,
    frame_at,
    load_clip,
    nearest,
    parse_buckets,
    probe,
)

# ------------------------------------------------------------ decoding


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
            assert distance[k, j] <= distance[k].min() + frames.TIE + 1e-6
        assert len(found) == 15


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n",
                                  "ffconcat version 1.0\nfile good.mp4\n"])
def test_a_playlist_in_the_place_of_a_video_opens_no_other_file(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.mp4", count=9)
    (tmp_path / "list.mp4").write_text(text)
    with pytest.raises(Unusable, match="cannot be decoded"):
        probe(tmp_path / "list.mp4")


# ------------------------------------------------------------ one frame by its number

GROUPS = {"coder": {"x264-params": "keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0"}, "count": 30}
OPEN = {"coder": {"x264-params": "open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=3:b-adapt=0"}, "count": 30}
WOBBLE = [0, 10, 20, 30, 100, 200, 210, 220, 300, 500, 900, 910]
NARROW = [0, 1, 2, 3, 100, 101, 102, 220, 221, 500, 900, 910]  # 1 ms apart: nearer than TIE
HIDDEN = [40 * k - 200 for k in range(30)]  # an edit list hides what comes before 0
SOUGHT = KINDS | {
    "b-frames.mp4": GROUPS, "open.mp4": OPEN, "open.mkv": OPEN, "open.ts": OPEN, "b-frames.avi": GROUPS,
    "fragments.mp4": {**GROUPS, "options": {"movflags": "frag_keyframe+empty_moov"}}, "no-stamps.h264": GROUPS,
    "b-frames.mpg": {"codec": "mpeg2video", "coder": {"bf": "2", "g": "8"}},
    # Both begin in the middle after a seek, with frames that lack what they were predicted from:
    "b-frames.ts": {"codec": "mpeg4", "coder": {"bf": "2", "g": "6"}, "count": 40},
    "refresh.mkv": {"coder": {"x264-params": "intra-refresh=1:keyint=8:bframes=0"}, "count": 40},
    "moving.gif": {"codec": "gif", "pix": "rgb8"},
    "wobble.mp4": {"stamps": WOBBLE, "count": 12, "coder": {"g": "4"}},
    "narrow.mkv": {"stamps": NARROW, "count": 12, "coder": {"g": "4"}},
    "edit-list.mp4": {**GROUPS, "stamps": HIDDEN}, "late.mp4": {**GROUPS, "stamps": [t + 900 for t in HIDDEN]},
    **{f"{turn}.mp4": {**GROUPS, "matrix": matrix} for turn, (matrix, _) in TURNS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", SOUGHT)
def test_a_frame_by_its_number_is_that_frame_of_the_whole_decoding(tmp_path, name):
    need(SOUGHT[name].get("codec", "libx264"))
    path = write(tmp_path / name, draw=draw_moving, **SOUGHT[name])
    every, times = list(decode(path)), probe(path).times
    assert len(every) == len(times) and (name != "edit-list.mp4" or len(times) == 25)
    for k, frame in enumerate(every):
        found = frame_at(path, times, k)
        assert (found.height, found.width) == (frame.height, frame.width)
        assert found.time == pytest.approx(frame.time, abs=1e-9) and found.end == pytest.approx(frame.end, abs=1e-9)
        assert np.array_equal(found.pixels(), frame.pixels()), k


@pytest.mark.parametrize("name", ["b-frames.mp4", "open.mkv", "wobble.mp4", "fragments.mp4", "clockwise.mp4"])
def test_where_seeking_works_nothing_is_decoded_from_the_beginning(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, draw=draw_moving, **SOUGHT[name])
    times = probe(path).times
    monkeypatch.setattr(frames, "decode", lambda path: pytest.fail("decoded from the beginning"))
    for k in range(1, len(times)):
        assert frame_at(path, times, k).time == pytest.approx(times[k], abs=1e-9)


def test_a_frame_number_that_is_not_there_is_refused_and_a_cut_file_is_named(tmp_path):
    path = write(tmp_path / "a.mkv", count=9)
    times = probe(path).times
    for index in (-1, 9):
        with pytest.raises(ValueError, match=f"expected a frame number below 9, got {index}; "):
            frame_at(path, times, index)
    write(path, count=5)
    with pytest.raises(Unusable, match="^cut off: a.mkv: fewer than 8 frames$"):
        frame_at(path, times, 7)
    Image.new("RGB", (72, 48), (grey(5),) * 3).save(tmp_path / "a.png")
    assert frame_at(tmp_path / "a.png", (0.0,), 0).pixels().mean() == grey(5)


def test_the_last_frame_of_a_long_clip_is_the_same_either_way(tmp_path):
    path = write(tmp_path / "long.mp4", count=1500, coder={"preset": "ultrafast", "g": "50"}, draw=draw_moving)
    times = probe(path).times
    start = time.perf_counter()
    found = frame_at(path, times, 1499)
    middle = time.perf_counter()
    *_, last = decode(path)
    end = time.perf_counter()
    print(f"frame 1499: {1000 * (middle - start):.0f} ms by seeking, {1000 * (end - middle):.0f} ms without")
    assert np.array_equal(found.pixels(), last.pixels())


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
