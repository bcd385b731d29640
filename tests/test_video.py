"""Frames reach the file as they come: same bytes, no more than one run in memory, and no half file after a failure.

Hardware: CPU, some seconds. Run: python -m pytest tests/test_video.py
"""

import json
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from clips import video
from clips.video import VideoWriter, contact_sheet, moving_pattern, picks, to_frames, write_outputs
from ltx.plan import LiveBytes

SIZE = (64, 128)


def clip(num_frames: int) -> torch.Tensor:
    """(3, F, 64, 128), moving, and beyond [-1, 1] here and there, as decoded pixels are."""
    return torch.cat(list(moving_pattern(num_frames, *SIZE)), dim=1) * 1.3


def whole_at_once(path, frames: np.ndarray, frame_rate: float) -> None:
    """The plainest way, written out once more: all frames in one array, one loop."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        rate = Fraction(frame_rate).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def outputs(path, runs, num_frames: int, canvas=None, **record) -> dict:
    record = {"seed": 3, "seconds": {"text": 1.0}, **record}
    write_outputs(path, runs, num_frames, torch.zeros(3, *SIZE) if canvas is None else canvas, 24.0, record)
    return record


# ------------------------------------------------------------ the same video, however it arrives


@pytest.mark.parametrize("frame_rate", [24.0, 29.97, 8.0])
def test_frames_added_in_runs_give_the_bytes_of_the_whole_video_written_at_once(tmp_path, frame_rate):
    frames = to_frames(clip(23))
    whole_at_once(tmp_path / "whole.mp4", frames, frame_rate)
    for name, sizes in (("one", [23]), ("each", [1] * 23), ("uneven", [5, 1, 0, 16, 1])):
        with VideoWriter(tmp_path / f"{name}.mp4", frame_rate) as writer:
            for part in np.split(frames, np.cumsum(sizes)[:-1]):
                writer.add(part)
        assert (tmp_path / f"{name}.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_files_do_not_depend_on_how_the_video_is_divided(tmp_path, dtype):
    pixels = clip(17).to(dtype)
    first = outputs(tmp_path / "first.mp4", [pixels], 17)
    second = outputs(tmp_path / "second.mp4", iter(pixels.split([4, 12, 1], dim=1)), 17)
    for suffix in (".mp4", ".png"):
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()
    assert first["output_size"] == second["output_size"] == [17, 384, 768]
    assert first["model_size"] == [17, 64, 128] and first["enlarged"] == 6
    assert first["files"] == ["first.mp4", "first.png", "first.json"]
    assert json.loads((tmp_path / "first.json").read_text()) == first
    assert len(list(tmp_path.iterdir())) == 6, "three files each and nothing beside them"


def test_the_picture_sheet_shows_the_reference_and_five_frames_of_the_video(tmp_path):
    pixels, canvas = clip(17), torch.rand(3, *SIZE) * 2 - 1
    outputs(tmp_path / "out.mp4", pixels.split(3, dim=1), 17, canvas)
    sheet = np.asarray(Image.open(tmp_path / "out.png"))
    parts = [to_frames(canvas[:, None], 6)[0], *to_frames(pixels[:, [0, 4, 8, 12, 16]], 6)]
    assert np.array_equal(sheet, np.asarray(contact_sheet(parts[0], parts[1:])))
    assert sheet.shape == (384, 6 * 768 + 5 * 4, 3)
    for i, part in enumerate(parts):
        assert np.array_equal(sheet[:, i * 772 : i * 772 + 768], part)


def test_picks_are_evenly_spaced_from_the_first_frame_to_the_last():
    assert [picks(n) for n in (1, 2, 9, 121)] == [[0], [0, 1], [0, 2, 4, 6, 8], [0, 30, 60, 90, 120]]
    for n in range(1, 300):
        assert len(set(picks(n))) == min(n, 5) and picks(n)[0] == 0 and picks(n)[-1] == n - 1


def test_sizes_are_enlarged_by_whole_factors_up_to_4096_and_large_videos_never():
    for h, w, factor in ((64, 64, 6), (384, 384, 1), (512, 768, 1), (192, 1024, 2), (96, 2048, 2), (16, 4096, 1)):
        assert video.enlargement(h, w) == factor, (h, w)


def test_colours_survive_the_video_file(tmp_path):
    rows = torch.tensor([[0.9, -0.5, -0.5], [0.5, 0.2, -0.1], [-0.4, 0.6, 0.1], [1, 1, 1], [-1, -1, -1]])
    frames = to_frames(rows[:, :, None, None].expand(5, 3, 64, 64).transpose(0, 1))
    with VideoWriter(tmp_path / "colours.mp4", 8.0) as writer:
        writer.add(frames)
    found = np.abs(read(tmp_path / "colours.mp4").astype(int) - frames).max()
    assert found <= 4, f"{found} of 255"  # 8-bit YUV rounds; another colour matrix would be 15 and more off


# ------------------------------------------------------------ memory and time


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path):
    """Bytes of tensors alive at once, 8-bit frames included. Keeping all frames anywhere makes the last line fail."""
    peaks, run_bytes = {}, 8 * 3 * 64 * 128 * 4
    for num_frames in (16, 32, 96):
        with LiveBytes() as live:
            outputs(tmp_path / "out.mp4", (run * 1 for run in moving_pattern(num_frames, *SIZE)), num_frames)
        peaks[num_frames] = live.peak
    print(f"peak in runs of 8 frames: { {n: round(peak / run_bytes, 1) for n, peak in peaks.items()} }")
    assert run_bytes < peaks[16]
    assert peaks[96] <= 1.02 * peaks[16], peaks


def test_a_run_is_gone_before_the_next_one_is_made(tmp_path):
    alive = []

    def runs():
        for _ in range(6):
            assert sum(old() is not None for old in alive) == 0, "an earlier run is still in memory"
            pixels = np.zeros((3, 4, *SIZE), np.float32)
            alive.append(weakref.ref(pixels))  # the array lives as long as any tensor or view of it
            yield torch.from_numpy(pixels)
            del pixels

    outputs(tmp_path / "out.mp4", runs(), 24)
    assert len(alive) == 6


def test_waiting_for_the_decoder_and_writing_are_timed_apart(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(video.time, "perf_counter", lambda: clock[0])

    def slow():
        for run in clip(12).split(4, dim=1):
            clock[0] += 10
            yield run

    monkeypatch.setattr(video, "contact_sheet", lambda *parts: clock.append(clock.pop() + 0.5) or contact_sheet(*parts))
    record = outputs(tmp_path / "out.mp4", slow(), 12)
    assert record["seconds"] == {"text": 1.0, "decode": 30.0, "write": 0.5}


# ------------------------------------------------------------ failures


def interrupted(error):
    yield clip(8)
    raise error


FAILURES = {
    "runs raise": (lambda: interrupted(RuntimeError("out of memory")), 16, RuntimeError, "out of memory"),
    "control-c": (lambda: interrupted(KeyboardInterrupt()), 16, KeyboardInterrupt, None),
    "raises at once": (lambda: (1 / 0 for _ in range(1)), 16, ZeroDivisionError, "division"),
    "nan": (lambda: [clip(8), clip(8).index_fill(1, torch.tensor(5), torch.nan)], 16, ValueError,
            "^expected finite pixels, got NaN or infinity after decoding; use --dtype float32$"),
    "infinity": (lambda: [torch.full((3, 1, *SIZE), torch.inf)], 1, ValueError, "expected finite pixels"),
    "too few": (lambda: [clip(8)], 16, ValueError, "expected 16 frames, got 8; "),
    "too many": (lambda: [clip(8)], 7, ValueError, "expected 7 frames, got 8; "),
    "none": (lambda: [], 1, ValueError, "expected at least one frame, got none; "),
    "other size": (lambda: [clip(8), torch.zeros(3, 8, 32, 96)], 16, ValueError,
                   "^expected frames of 64x128 like the canvas, got 32x96; "),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_passed_on_and_leaves_the_folder_as_it_was(tmp_path, name):
    runs, num_frames, kind, message = FAILURES[name]
    (tmp_path / "out.mp4").write_bytes(b"an older video")
    with pytest.raises(kind, match=message) as caught:
        outputs(tmp_path / "out.mp4", runs(), num_frames)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"an older video"


@pytest.mark.parametrize("step", ["contact_sheet", "json.dumps"])
def test_a_failure_after_the_video_was_written_leaves_nothing_either(tmp_path, monkeypatch, step):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"video.{step}", full)
    with pytest.raises(OSError, match="No space left"):
        outputs(tmp_path / "out.mp4", [clip(8)], 8)
    assert not list(tmp_path.iterdir())


def test_the_writer_alone_removes_its_file_when_its_block_fails_and_refuses_what_it_cannot_write(tmp_path):
    path, good = tmp_path / "out.mp4", np.zeros((2, 32, 48, 3), np.uint8)
    for bad, message in ((good[0], r"expected frames \(f, h, w, 3\) of uint8, got \(32, 48, 3\) of uint8; "),
                         (good / 2, "of float64; "), (good[:, :31], "expected an even height and width, got 31x48; ")):
        with pytest.raises(ValueError, match=message), VideoWriter(path, 24.0) as writer:
            writer.add(bad)
        assert not path.exists()
    with pytest.raises(ValueError, match="expected frames of 32x48 like the first, got 30x48; "):
        with VideoWriter(path, 24.0) as writer:
            writer.add(np.concatenate([good] * 50))
            assert path.exists(), "the file grows while the block runs"
            writer.add(good[:, :30])
    assert not path.exists()
    with VideoWriter(path, 24.0) as writer:
        writer.add(good)
    assert read(path).shape == good.shape
