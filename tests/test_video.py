"""Frames reach the file as they come: same bytes, one run in memory, no half file after a failure.

Hardware: CPU, some seconds. Run: python -m pytest tests/test_video.py
"""

import base64
import json
import re
import shutil
import subprocess
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from browser import Browser
from PIL import Image

from clips import video
from clips.video import VideoWriter, contact_sheet, picks, save_sheet, to_frames, write_outputs

SIZE = (64, 128)


def clip(num_frames: int) -> torch.Tensor:
    """(3, F, 64, 128): a disc crosses a gradient, beyond [-1, 1] here and there, as decoded."""
    y, x = torch.linspace(-1, 1, SIZE[0])[:, None], torch.linspace(-1.5, 1.5, SIZE[1])
    t = torch.arange(num_frames)[:, None, None] / num_frames
    distance = ((x - 2 * t + 1) ** 2 + (y - 0.4 * torch.cos(12 * t)) ** 2).sqrt()
    disc = torch.sigmoid(40 * (0.35 - distance))
    back = (y + x / 3).expand(num_frames, *SIZE) / 2
    return torch.stack([back - 0.5 + disc, back - 0.2 + 0.5 * disc, back + 0.4 - disc]) * 1.3


def all_at_once(path, frames: np.ndarray, rate: Fraction) -> None:
    """The plainest way, written out once more: all frames in one array, one loop."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(stream.codec_context, name, 1)  # BT.709, and for the range "limited"
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")))
        container.mux(stream.encode())


def read(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def outputs(path, runs, num_frames: int, canvas=None) -> dict:
    record = {"seed": 3, "seconds": {"text": 1.0}}
    canvas = torch.zeros(3, *SIZE) if canvas is None else canvas
    write_outputs(path, runs, num_frames, canvas, 24.0, record)
    return record


# ------------------------------------------------------------ the same video, however it arrives


@pytest.mark.parametrize(("frame_rate", "rate", "factor"),
                         [(29.97, Fraction(30000, 1001), 1), (8.0, Fraction(8), 4)])
def test_frames_added_in_runs_give_the_bytes_of_the_video_written_at_once(tmp_path, frame_rate,
                                                                          rate, factor):
    """The larger one is large enough for x264 to use several threads if it may."""
    frames = to_frames(clip(23), factor)
    all_at_once(tmp_path / "once.mp4", frames, rate)
    with VideoWriter(tmp_path / "runs.mp4", frame_rate) as writer:
        for part in np.split(frames, np.cumsum([5, 1, 0, 16])):
            writer.add(part)
    assert (tmp_path / "runs.mp4").read_bytes() == (tmp_path / "once.mp4").read_bytes()


def test_the_three_files_do_not_depend_on_how_the_video_is_divided(tmp_path):
    pixels, canvas = clip(9), torch.rand(3, *SIZE) * 2 - 1
    first = outputs(tmp_path / "first.mp4", [pixels], 9, canvas)
    outputs(tmp_path / "second.mp4", iter(pixels.split([4, 1, 4], dim=1)), 9, canvas)
    for suffix in (".mp4", ".png"):
        a, b = ((tmp_path / name).with_suffix(suffix).read_bytes() for name in ("first", "second"))
        assert a == b
    assert first["model_size"] == [9, 64, 128] and first["output_size"] == [9, 384, 768]
    assert first["enlarged"] == 6 and first["files"] == ["first.mp4", "first.png", "first.json"]
    assert json.loads((tmp_path / "first.json").read_text()) == first
    assert len(list(tmp_path.iterdir())) == 6, "three files each and no other"
    parts = [to_frames(canvas[:, None], 6)[0], *to_frames(pixels[:, [0, 2, 4, 6, 8]], 6)]
    sheet = np.asarray(Image.open(tmp_path / "first.png"))
    assert np.array_equal(sheet, np.asarray(contact_sheet(parts[0], parts[1:])))
    for i, part in enumerate(parts):
        assert np.array_equal(sheet[:, i * 772 : i * 772 + 768], part)


def test_a_sheet_has_its_rows_below_each_other_enlarged(tmp_path):
    levels = torch.linspace(-1, 1, 6)
    rows = [[torch.full((3, 2, 4), levels[3 * row + k]) for k in range(3)] for row in range(2)]
    save_sheet(tmp_path / "new" / "sheet.png", rows, scale=3)
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    assert sheet.shape == (2 * 6, 3 * 12, 3)
    assert np.abs(sheet[::6, ::12, 0].flatten() - np.linspace(0, 255, 6)).max() <= 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("name", ["12:30.mp4", "-.mp4", "http:x.MP4", "%d.mp4", "pipe:1.mp4"])
def test_a_name_is_a_name_even_where_ffmpeg_reads_an_address_out_of_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video.check_output(Path(name), tmp_path / "face.jpg")
    outputs(Path(name), [clip(3)], 3)
    data = (tmp_path / name).read_bytes()
    assert data[4:8] == b"ftyp" and data.index(b"moov") < data.index(b"mdat"), "starts at once"
    assert {path.name for path in tmp_path.iterdir()} == {
        name, f"{name[:-4]}.png", f"{name[:-4]}.json"}


def test_a_short_video_is_written_again_and_again_whole_and_forwards(tmp_path):
    for frames, rate, seconds, times in ((9, 8, 3, 3), (121, 24, 3, 1), (72, 24, 3, 1),
                                         (71, 24, 3, 2), (90, 29.97, 3, 1), (1, 24, 3, 72),
                                         (9, 8, 0, 1)):
        assert video.repeats(frames, rate, seconds) == times, (frames, rate, seconds)
    record = {}
    write_outputs(tmp_path / "out.mp4", clip(8).split(3, dim=1), 8, torch.zeros(3, *SIZE), 24.0,
                  record, 3)
    found, meant = read(tmp_path / "out.mp4").astype(int), to_frames(clip(8), 6).astype(int)
    nearest = [int(np.abs(meant - frame).mean((1, 2, 3)).argmin()) for frame in found]
    assert nearest == list(range(8)) * 3
    assert record["model_size"][0] == 8 and record["output_size"][0] == 24


def test_picks_are_evenly_spaced_from_the_first_frame_to_the_last():
    assert [picks(n) for n in (1, 2, 9)] == [[0], [0, 1], [0, 2, 4, 6, 8]]
    assert picks(121) == [0, 30, 60, 90, 120]


def test_sizes_are_enlarged_by_whole_factors_up_to_4096_and_large_videos_never():
    factors = {(64, 64): 6, (384, 384): 1, (192, 1024): 2, (96, 2048): 2, (16, 4096): 1}
    for (h, w), factor in factors.items():
        assert video.enlargement(h, w) == factor, (h, w)


def test_colours_survive_the_video_file(tmp_path):
    rows = torch.tensor([[0.9, -0.5, -0.5], [0.5, 0.2, -0.1], [-0.4, 0.6, 0.1], [1.5, 1, 1],
                         [-1, -1, -1.5]])
    frames = to_frames(rows[:, :, None, None].expand(5, 3, 64, 64).transpose(0, 1))
    with VideoWriter(tmp_path / "colours.mp4", 8.0) as writer:
        writer.add(frames)
    meant = ((rows.clamp(-1, 1) + 1) * 127.5).numpy()[:, None, None]
    found = np.abs(read(tmp_path / "colours.mp4") - meant).max()
    assert found <= 4, f"{found} of 255"  # 8-bit YUV rounds; another colour matrix is 15 off


def ffprobe(path, fields: str) -> list[str] | None:
    """What FFmpeg's own program says of the video; None where it is not installed."""
    if shutil.which("ffprobe") is None:
        return None
    command = ["ffprobe", "-v", "error", "-show_entries", f"stream={fields}", "-of", "csv=p=0"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip().split(",")


def test_primaries_transfer_matrix_and_range_are_all_said(tmp_path):
    outputs(tmp_path / "out.mp4", [clip(2)], 2)
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        for told in (frame, container.streams.video[0].codec_context):
            assert (told.color_primaries, told.color_trc, told.colorspace, told.color_range) == (
                1, 1, 1, 1), "BT.709, and for the range \"limited\""
    assert b"nclx\0\1\0\1\0\1\0" in (tmp_path / "out.mp4").read_bytes(), "in the mp4 itself, too"
    found = ffprobe(tmp_path / "out.mp4", "color_primaries,color_transfer,color_space,color_range")
    assert found in (None, ["tv", "bt709", "bt709", "bt709"])


@pytest.mark.parametrize(("frame_rate", "rate"), [
    (23.976, "24000/1001"), (23.98, "24000/1001"), (29.97, "30000/1001"), (59.94, "60000/1001"),
    (30000 / 1001, "30000/1001"), (24.0, "24"), (1.0, "1"), (240.0, "240"), (12.5, "25/2"),
    (23.9, "239/10"), (10.123456789, "820/81"),
])
def test_a_frame_rate_is_the_fraction_that_is_meant(tmp_path, frame_rate, rate):
    assert video.exact_rate(frame_rate) == Fraction(rate)
    with VideoWriter(tmp_path / "v.mp4", frame_rate) as writer:
        writer.add(np.zeros((3, 16, 16, 3), np.uint8))
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(rate)
    said = ffprobe(tmp_path / "v.mp4", "r_frame_rate")
    assert said is None or Fraction(said[0]) == Fraction(rate)


BARS = {"skin": (224, 172, 140), "red": (200, 30, 30), "green": (30, 160, 40)}
PAGE = """<pre id=o></pre><script>
async function show(name, url) {
  const v = document.createElement("video"), c = document.createElement("canvas").getContext("2d");
  [v.muted, v.preload, v.src] = [true, "auto", url];
  await new Promise((done, fail) => {v.onloadeddata = done; v.onerror = fail});
  [c.canvas.width, c.canvas.height] = [v.videoWidth, v.videoHeight];
  const at = i => [...c.getImageData(
    (i + 0.5) * v.videoWidth / BARS, v.videoHeight / 2, 1, 1).data];
  // "loaded" may come before there is a frame to draw
  do { await new Promise(r => setTimeout(r, 50)); c.drawImage(v, 0, 0) } while (at(0)[3] < 255);
  for (let i = 0; i < BARS; i++) o.textContent += `${name} ${at(i)}\n`;
}
(async () => {for (const video of VIDEOS) await show(...video); document.title = "shown"})();
</script>"""


def test_a_browser_shows_the_colours_that_were_written(tmp_path):
    """Where the description is not whole, Chromium takes less than 720 rows for BT.601, in which
    red becomes 186, 12, 32."""
    names = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no Chromium to ask: none of {', '.join(names)} is on the path")
    videos = []
    for height, width in ((64, 64), (384, 384), (512, 768), (720, 1280)):
        bars = np.array(list(BARS.values()), np.uint8)[np.arange(width) * len(BARS) // width]
        with VideoWriter(tmp_path / "bars.mp4", 24.0) as writer:
            writer.add(np.broadcast_to(bars, (2, height, width, 3)))
        data = base64.b64encode((tmp_path / "bars.mp4").read_bytes()).decode()
        videos.append((f"{width}x{height}", f"data:video/mp4;base64,{data}"))
    page = PAGE.replace("BARS", str(len(BARS))).replace("VIDEOS", json.dumps(videos))
    (tmp_path / "page.html").write_text(page)
    with Browser(browser, (tmp_path / "page.html").as_uri()) as page:
        page.wait('document.title === "shown"')
        shown = page.value("o.textContent")
    rows = re.findall(r"(\d+x\d+) (\d+),(\d+),(\d+),255", shown)
    assert len(rows) == len(videos) * len(BARS), shown
    for (size, *found), meant in zip(rows, list(BARS.values()) * len(videos), strict=True):
        assert np.abs(np.array(found, int) - meant).max() <= 3, (size, found, meant)


# ------------------------------------------------------------ memory and time


def test_a_run_and_its_frames_are_gone_before_the_next_one_is_made(tmp_path, monkeypatch):
    alive, usual = [], video.to_frames

    def watched(*args):
        frames = usual(*args)
        alive.append(weakref.ref(frames))
        return frames

    def runs():
        for _ in range(12):
            # of 24 frames, five are kept for the sheet, and one is in the writer's hands
            assert sum(old() is not None for old in alive) <= 6, "earlier frames are in memory"
            pixels = np.zeros((3, 2, *SIZE), np.float32)
            run = weakref.ref(pixels)  # the array lives as long as any tensor or view of it
            yield torch.from_numpy(pixels)
            del pixels
            assert run() is None, "an earlier run is still in memory"

    monkeypatch.setattr(video, "to_frames", watched)
    outputs(tmp_path / "out.mp4", runs(), 24)
    assert len(alive) == 24 + 1


def test_waiting_for_the_decoder_and_writing_are_timed_apart(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(video.time, "perf_counter", lambda: clock[0])

    def slow():
        for run in clip(12).split(4, dim=1):
            clock[0] += 10
            yield run

    def sheet(*parts):
        clock[0] += 0.5
        return contact_sheet(*parts)

    monkeypatch.setattr(video, "contact_sheet", sheet)
    record = outputs(tmp_path / "out.mp4", slow(), 12)
    assert record["seconds"] == {"text": 1.0, "decode": 30.0, "write": 0.5}


# ------------------------------------------------------------ failures


def interrupted():
    yield clip(8)
    raise KeyboardInterrupt


FAILURES = {
    "control-c": (interrupted, 16, KeyboardInterrupt, None),
    "nan": (lambda: [clip(8), clip(8).index_fill(1, torch.tensor(5), torch.nan)], 16, ValueError,
            "^expected finite pixels, got NaN or infinity after decoding; use --dtype float32$"),
    "too few": (lambda: [clip(8)], 16, ValueError, "expected 16 frames, got 8; "),
    "too many": (lambda: [clip(8)], 7, ValueError, "expected 7 frames, got 8; "),
    "none": (lambda: [], 1, ValueError, "expected at least one frame, got none; "),
    "other size": (lambda: [clip(8), torch.zeros(3, 8, 32, 96)], 16, ValueError,
                   "^expected frames of 64x128 like the canvas, got 32x96; "),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_passed_on_and_leaves_the_folder_as_it_was(tmp_path, name):
    runs, num_frames, kind, message = FAILURES[name]
    (tmp_path / "out.mp4").write_bytes(b"an older video")
    with pytest.raises(kind, match=message):
        outputs(tmp_path / "out.mp4", runs(), num_frames)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"an older video"


@pytest.mark.parametrize("step", ["contact_sheet", "json.dumps"])
def test_a_disk_that_is_full_after_the_video_leaves_nothing_either(tmp_path, monkeypatch, step):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"clips.video.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        outputs(tmp_path / "out.mp4", [clip(8)], 8)
    assert not list(tmp_path.iterdir())


def test_the_writer_alone_refuses_what_it_cannot_write_and_removes_its_file(tmp_path):
    path, good = tmp_path / "out.mp4", np.zeros((2, 32, 48, 3), np.uint8)
    for bad, message in (((good[0],), r"expected frames \(f, h, w, 3\) of uint8, got \(32, 48,"),
                         ((good / 2,), "of float64; "),
                         ((good[:, :31],), "expected an even height and width, got 31x48; "),
                         ((good, good[:, :30]), "of 32x48 like the first, got 30x48; ")):
        with pytest.raises(ValueError, match=message), VideoWriter(path, 24.0) as writer:
            for frames in bad:
                writer.add(frames)
        assert not path.exists()
