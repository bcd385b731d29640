"""Every row of a manifest is checked before it is used, and comes with a reference that is not its own picture.

Files are made by clipfiles.py. Boxes are compared with the drawn square to one pixel (a resize smooths its edge), all
else exactly. Hardware: CPU, some seconds. Run: python -m pytest tests/test_clips.py
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clipfiles import (
    SMALL,
    WIDE,
    draw_square,
    draws,
    face_box,
    faces_file,
    indices,
    manifest,
    picture_index,
    write,
    write_sound,
)
from PIL import Image

from clips import manifest as clips
from clips.frames import Bucket, clip_times, cover, load_clip
from clips.manifest import box_mask, check, draw_reference, faces_for_clip, load_faces, read_manifest

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
        monkeypatch.setattr(sys, "argv", ["clips.manifest", *arguments, *options])
        assert clips.main() == status, arguments
        out, err = capsys.readouterr()
        assert words in out and (status != 2 or (out == "" and err.startswith("clips.manifest: error: expected ")))
        assert err.count("\n") == (status == 2), err
    run = subprocess.run([sys.executable, clips.__file__], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout.startswith("usage: clips.py") and "check" in run.stdout


# ------------------------------------------------------------ faces


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


REFERENCES = [
    "1", "[]", "{}", '{"size": [30, 20]}', '{"size": [30, 20], "box": null}', '{"size": [30], "box": [1, 2, 3, 4]}',
    '{"size": [0, 20], "box": [1, 2, 3, 4]}', '{"size": [30, 20], "box": [1, 2, 3]}',
    '{"size": [30, 20], "box": [3, 2, 1, 4]}',
    '{"size": [30, 20], "box": [1, 2, NaN, 4]}', '{"size": [30, 20], "box": [20, 2, 25, 4]}',
    '{"size": [30, 20], "box": [1, 2, 3, 4], "landmarks": [[1, 2]]}',
    '{"size": [30, 20], "box": [1, 2, 3, 4], "landmarks": [[1, 2], [1, 2], [1, 2], [1, 2], [1, NaN]]}']


@pytest.mark.parametrize("text", REFERENCES)
def test_a_bad_reference_entry_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "faces.json"
    path.write_text(f'{{"frame_rate": 24, "size": [4, 4], "frames": [], "reference": {text}}}')
    with pytest.raises(ValueError, match="faces.json; see load_faces$") as caught:
        load_faces(path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ references


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
        row = replace(row, start=start)
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


def add_reference(path: Path, size: list, **face) -> Path:
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"reference": {"size": size, **face}}))
    return path


@pytest.mark.parametrize("scale", [1, 2])
def test_the_given_reference_comes_with_the_face_that_the_faces_file_tells_in_its_own_pixels(tmp_path, scale):
    write(tmp_path / "a.mp4", count=12, size=(96, 160))
    Image.new("RGB", (20, 30)).save(tmp_path / "ref.png")
    box, marks = [4, 6, 14, 18], [[6, 9], [12, 9], [9, 12], [7, 15], [11, 15]]
    for number, face in enumerate(({"box": box, "landmarks": marks}, {"box": box})):
        face = {key: (scale * np.array(value)).tolist() for key, value in face.items()}
        add_reference(faces_file(tmp_path / f"{number}.json", [0]), [30 * scale, 20 * scale], **face)
    row = {"video": "a.mp4", "caption": "x", "reference": "ref.png"}
    rows = check(manifest(tmp_path, {**row, "faces": "0.json"}, {**row, "faces": "1.json"}, row,
                          {"video": "a.mp4", "caption": "x", "faces": "0.json"}), SMALL).used
    drawn = [draw_reference(rows, i, torch.Generator()) for i in range(4)]
    assert [d.source for d in drawn] == ["given"] * 3 + ["other moment"]
    assert drawn[0].box.tolist() == drawn[1].box.tolist() == box and drawn[0].landmarks.tolist() == marks
    assert drawn[1].landmarks is None and drawn[2].box is None and drawn[2].landmarks is None
    assert drawn[3].box is None, "the entry belongs to the reference picture, not to a frame"


def test_a_reference_entry_made_from_a_picture_of_another_shape_is_a_bad_faces_file(tmp_path):
    write(tmp_path / "a.mp4", count=12, size=(96, 160))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "ref.jpg", exif=exif)
    row = {"video": "a.mp4", "caption": "x", "reference": "ref.jpg"}
    for name, size in (("upright", [30, 20]), ("stored", [20, 30])):
        add_reference(faces_file(tmp_path / f"{name}.json", [0]), size, box=[1, 2, 9, 9])
    report = check(manifest(tmp_path, {**row, "faces": "upright.json"}, {**row, "faces": "stored.json"}), SMALL)
    assert [row.number for row in report.used] == [1]
    assert report.lines()[0] == ("row 2: bad faces file: stored.json: size 20x30 has another shape than the "
                                 "reference's 30x20; detect on upright pictures")
