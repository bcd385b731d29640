"""Every row of a manifest is checked before it is used; its reference is not its own picture.

Files are made by clipfiles.py. Boxes are compared with the drawn square to one pixel (a resize
smooths its edge), all else exactly. Hardware: CPU, seconds. Run: pytest tests/test_manifest.py
"""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Bag

import clipfiles
import numpy as np
import pytest
import torch
from clipfiles import SMALL, TURNS, WIDE, face_box, faces_file, manifest, write, write_picture
from PIL import Image

from clips import manifest as clips
from clips.frames import Bucket, clip_times, cover, load_clip
from clips.manifest import box_mask, check, draw_reference, faces_for_clip, load_faces
from clips.manifest import read_manifest as read

ROOT = Path(__file__).resolve().parents[1]
SQUARE = {"size": (96, 160), "codec": "ffv1", "pix": "bgr0", "draw": clipfiles.draw_square}


def reasons(rows) -> list:
    return [row.broken and row.broken.reason for row in rows]


# ------------------------------------------------------------ manifest and check


def test_the_three_kinds_of_manifest_say_the_same(tmp_path):
    rows = [{"video": "a.mp4", "caption": " a cat, \"grey\" ", "identity": "x", "unknown": "1"},
            {"media_path": "b.mp4", "caption": "ä dog"}]
    lists = {"m.jsonl": "\n".join(map(json.dumps, rows)), "m.json": json.dumps(rows),
             "d.json": json.dumps({"data": rows, "version": 2}),
             "m.csv": "\ufeffvideo,media_path,caption,identity,unknown\n"
                      'a.mp4,," a cat, ""grey"" ",x,1\n,b.mp4,ä dog,,\n'}
    for name, text in lists.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        found = [(r.number, r.video.name, r.caption, r.identity) for r in read(tmp_path / name)]
        assert found == [(1, "a.mp4", 'a cat, "grey"', "x"), (2, "b.mp4", "ä dog", "")], name


GOOD_CSV = {
    "a comma in quotes": 'video,caption\na.mp4,"a woman, smiling"\n',
    "spaces around": 'video , caption\n a.mp4 , "a woman, smiling"\n',
    "semicolons, BOM, Windows": '\ufeffvideo;caption;note\r\na.mp4;a woman, smiling;\r\n',
    "tabs": "caption\tvideo\na woman, smiling\ta.mp4\n",
    "columns without names, empty lines": 'video,caption,,\n\na.mp4,"a woman, smiling",,\n\n'}


@pytest.mark.parametrize("kind", GOOD_CSV)
def test_csv_as_people_and_spreadsheets_write_it_keeps_the_whole_caption(tmp_path, kind):
    path = tmp_path / "m.csv"
    path.write_bytes(GOOD_CSV[kind].encode())
    (row,) = read(path)
    assert (row.video.name, row.caption, row.broken) == ("a.mp4", "a woman, smiling", None)


def test_a_row_of_csv_with_a_cell_too_many_or_too_few_is_bad_and_says_so(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("video,caption,identity\na.mp4,a man,x\nb.mp4,a woman, smiling, in a park,y\n"
                    "c.mp4,a man\nd.mp4,a man,\n")
    rows = read(path)
    assert [str(row.broken or "")[:28] for row in rows] == [
        "", "bad row: 5 cells for 3 names", "bad row: 2 cells for 3 names", ""]
    assert str(rows[1].broken).endswith("; texts with ',' need double quotes, empty cells their '"
                                        ",'")
    path.write_text("video;caption\na.mp4;a woman; smiling\n")
    assert "3 cells for 2 names; texts with ';' need" in str(read(path)[0].broken)


def test_csv_without_the_two_names_or_with_a_loose_quote_is_refused_with_the_place(tmp_path):
    path = tmp_path / "m.csv"
    for text, told in (("Video,Caption\na,b\n", r"without video or caption: \['Video', 'Cap"),
                       ("sep=;\nvideo;caption\na;b\n", "without video or caption"), ("", r": \[\]"),
                       ("video,caption,caption\na,b,c\n", "two columns named caption"),
                       ('video,caption\na,b\nc,"d" e\nf,g\n', "line 3: "),
                       ('video,caption\na,"b\nc,d\n', "unexpected end of data")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^expected a manifest .*m.csv: .*{told}.*clips.md$"):
            read(path)


def test_an_unreadable_manifest_is_one_line(tmp_path):
    for name, data in (("none.jsonl", None), ("a.json", b"{"), ("b.json", b'{"rows": []}'),
                       ("c.txt", b"a"), ("d.csv", b"\xff\xfe\x00"), ("e.jsonl", b"\n")):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"^expected .*{name}.*; [^\n]*$"):
            read(tmp_path / name)


def test_no_path_leads_out_of_the_folder_unless_it_is_allowed(tmp_path):
    home, other = tmp_path / "home", tmp_path / "home-of-others"
    home.mkdir(), other.mkdir()
    (home / "link.mp4").symlink_to(other / "a.mp4")
    (home / "loop.mp4").symlink_to(home / "loop.mp4")
    (home / "inner.mp4").symlink_to(home / "good.mp4")
    good = {"video": "good.mp4", "caption": "x"}
    rows = [{**good, "video": str(other / "a.mp4")}, {**good, "video": "link.mp4"},
            {**good, "faces": str(other / "f.json")}, {**good, "video": "sub/../good.mp4"},
            {**good, "reference": "../home-of-others/a.png"}]
    path = manifest(home, *rows)
    assert reasons(read(path)) == ["path outside"] * 5
    assert reasons(read(path, roots=[other])) == [None] * 3 + ["path outside"] * 2
    assert reasons(read(path, allow_outside=True)) == [None] * 5
    assert reasons(read(manifest(home, good, {**good, "video": "inner.mp4"}))) == [None] * 2
    odd = manifest(home, *({**good, "video": name} for name in ("loop.mp4", "a\0b", "n" * 5000)))
    assert reasons(check(odd, SMALL).refused) == ["missing file"] * 3


def test_names_may_come_from_windows_or_from_a_mac(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "Be\u0301a.mp4").touch()
    row = {"video": "sub\\B\u00e9a.mp4", "faces": "sub/B\u00e9a.mp4", "caption": "x"}
    found, outside = read(manifest(tmp_path, row, {**row, "video": "sub\\..\\sub\\B\u00e9a.mp4"}))
    assert found.video == found.faces == (tmp_path / "sub" / "Be\u0301a.mp4").resolve()
    assert reasons([outside]) == ["path outside"]


def broken_files(folder: Path) -> list[tuple[dict, str]]:
    """Rows and the reason why each is not used."""
    write(folder / "good.mp4", options={"movflags": "+faststart"})
    data = (folder / "good.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: int(len(data) * 0.9)])
    (folder / "head.mp4").write_bytes(data[:100])
    write(folder / "long.mkv", count=39, draw=clipfiles.draw_moving, coder={"crf": "1"})
    data = (folder / "long.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(data[: int(len(data) * 0.6)])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 100)
    clipfiles.write_sound(folder / "sound.mp4")
    write(folder / "short.mp4", count=8)
    write(folder / "small.mp4", size=(24, 36))
    write_picture(folder / "good.png")
    (folder / "half.png").write_bytes((folder / "good.png").read_bytes()[:60])
    write_picture(folder / "turned.jpg", (30, 20), turned=True)
    faces_file(folder / "turned.json", [0], size=(72, 48))
    for name, size in (("upright", [30, 20]), ("stored", [20, 30])):
        face = {"size": size, "box": [1, 2, 9, 9]}
        faces_file(folder / f"ref-{name}.json", [0], size=(48, 72), reference=face)
    (folder / "folder.mp4").mkdir()
    good = {"video": "good.mp4", "caption": "x"}
    turned = {**good, "reference": "turned.jpg"}
    return [(good, ""), ({**turned, "faces": "ref-upright.json"}, ""),
            *(({**good, "video": name}, reason) for name, reason in (
                ("none.mp4", "missing file"), ("folder.mp4", "missing file"),
                ("cut.mp4", "cut off"), ("cut.mkv", "cut off"), ("head.mp4", "cut off"),
                ("empty.mp4", "cannot be decoded"), ("text.mp4", "cannot be decoded"),
                ("half.png", "cannot be decoded"), ("sound.mp4", "no video stream"),
                ("short.mp4", "too short"), ("good.png", "too short"), ("small.mp4", "too small"),
                (3, "bad row"))),
            ({**good, "caption": " \n"}, "empty caption"), ({"video": "a.mp4"}, "empty caption"),
            ({"caption": "x"}, "bad row"), ([1], "bad row"),
            ({**good, "faces": "turned.json"}, "bad faces file"),
            ({**good, "faces": "none.json"}, "bad faces file"),
            ({**turned, "faces": "ref-stored.json"}, "bad faces file"),
            ({**good, "reference": "none.png"}, "bad reference"),
            ({**good, "reference": "half.png"}, "bad reference"),
            ({**good, "reference": "good.mp4"}, "bad reference")]


def test_check_names_every_broken_row_and_its_reason_in_one_line_each(tmp_path):
    cases = broken_files(tmp_path)
    path = manifest(tmp_path, *(row for row, _ in cases))
    path.write_text("\n" + path.read_text() + "{not json\n")
    report = check(path, SMALL[:2])
    expected = {n: reason for n, (_, reason) in enumerate(cases, 2) if reason}
    expected[len(cases) + 2] = "bad row"
    assert {row.number: row.broken.reason for row in report.refused} == expected
    assert [row.number for row in report.used] == [2, 3] and report.used[0].bucket == WIDE
    *lines, summary = report.lines()
    for line, (number, reason) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"row {number}: {reason}: ") and "\n" not in line
    assert summary.startswith(f"2 of {len(cases) + 1} rows are used; not used: ")
    assert "cannot be decoded 3" in summary and summary.endswith("; buckets: 32x48x9 2")
    size = (tmp_path / "good.mp4").stat().st_size
    told = f"cut off: cut.mp4: {int(size * 0.9):,} of {size:,} bytes"
    assert next(line for line in lines if "cut.mp4" in line).endswith(told)


def test_the_command_ends_with_0_1_or_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"video": "a.mp4", "caption": "x"}
    write(tmp_path / "a.mp4", count=9)
    manifest(tmp_path, row, name="good.jsonl")
    manifest(tmp_path, row, {**row, "video": "b.mp4"}, name="some.jsonl")
    options = ["--buckets", "32x48x9", "--time-scale", "4", "--space-scale", "8"]
    for words, status, told in ((["good.jsonl"], 0, "1 of 1 rows are used; buckets: 32x48x9 1"),
                                (["some.jsonl"], 1, "row 2: missing file: "),
                                (["none.jsonl"], 2, ""),
                                (["good.jsonl", "--frame-rate", "0"], 2, "")):
        assert clips.main(["check", *words, *options]) == status, words
        out, err = capsys.readouterr()
        refused = out == "" and err.startswith("clips.manifest: error: expected ")
        assert told in out and refused == (status == 2) and err.count("\n") == (status == 2), err
    assert clips.main([]) == 0 and "check" in capsys.readouterr().out


# ------------------------------------------------------------ faces


@pytest.mark.parametrize("bucket, scale", [(Bucket(48, 72, 9), 1.0), (Bucket(96, 96, 9), 0.5)])
def test_boxes_follow_a_drawn_square_through_resize_and_crop(tmp_path, bucket, scale):
    path = write(tmp_path / "square.mkv", count=12, **SQUARE)
    faces = load_faces(faces_file(tmp_path / "faces.json", range(12), scale=scale, marks=True))
    crop = cover(96, 160, bucket)
    boxes, marks, valid = faces_for_clip(faces, bucket, crop, clip_times(9, 24.0))
    bright = load_clip(path, bucket)[0] > 0                                         # (F, h, w)
    for k in valid.nonzero()[:, 0]:
        y, x = bright[k].nonzero().T
        drawn = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        inside = boxes[k].clamp(min=0).minimum(torch.tensor([bucket.width, bucket.height] * 2))
        assert (inside - drawn).abs().max() <= 1.0, (k, boxes[k], drawn)
        assert torch.equal(marks[k, 0], boxes[k, :2]) and torch.equal(marks[k, 4], boxes[k, 2:])
    assert valid.sum() >= 6


def test_frames_without_a_face_and_faces_cropped_away_are_not_valid(tmp_path):
    def valid_for(bucket, numbers, rate=24.0):
        faces = load_faces(faces_file(tmp_path / "faces.json", numbers, rate=rate))
        times = clip_times(bucket.frames, 24.0)
        return faces_for_clip(faces, bucket, cover(96, 160, bucket), times)

    same = Bucket(96, 160, 9)
    boxes, marks, valid = valid_for(same, [0, 1, 2, 6])
    assert valid.nonzero()[:, 0].tolist() == [0, 1, 2, 6] and marks is None
    assert boxes[~valid].abs().sum() == 0 and boxes[1].tolist() == list(face_box(1))
    mask, (x0, y0, x1, y1) = box_mask(boxes, valid, 96, 160), face_box(1)
    assert mask[~valid].sum() == 0 and mask[1].sum() == mask[1, y0:y1, x0:x1].sum() == 24 * 24
    narrow = Bucket(96, 96, 3)  # keeps columns 32..128; the boxes end at 34, 38 and 42
    assert not valid_for(narrow, [0, 1, 2])[2].any()
    every_third = valid_for(same, [0, 3, 6], rate=8.0)[2]  # looked at every third frame
    assert every_third.tolist() == [True] * 8 + [False]
    assert not valid_for(same, [])[2].any()


def test_a_bad_faces_file_is_refused_in_one_line(tmp_path):
    path, nan, box = tmp_path / "faces.json", float("nan"), [0, 0, 1, 1]
    good = {"frame_rate": 24, "size": [4, 4], "frames": []}
    path.write_text(json.dumps(good))
    assert len(load_faces(path).times) == 0
    frames = ({"t": 0}, {"t": 0, "box": [0, 0, 1]}, {"t": nan, "box": box},
              {"t": 0, "box": [0, 2, 1, 1]}, {"t": 0, "box": box, "landmarks": [[0, 0]]})
    faces = (1, {"size": [30, 20]}, {"size": [0, 20], "box": box},
             *({"size": [30, 20], "box": bad} for bad in ([1, 2, 3], [1, 2, nan, 4], [3, 2, 1, 4],
                                                          [20, 2, 25, 4])),
             {"size": [30, 20], "box": box, "landmarks": [[1, 2]] * 4 + [[1, nan]]})
    for data in ([], {**good, "frame_rate": 0}, {**good, "size": [4]},
                 *({**good, "frames": [frame]} for frame in frames),
                 *({**good, "reference": face} for face in faces)):
        path.write_text(json.dumps(data))
        with pytest.raises(ValueError, match="^expected [^\n]*faces.json; see load_faces$"):
            load_faces(path)


def fake_mediapipe() -> Bag:
    """Finds a face where a picture is white (255), and a smaller one where it is light (200)."""
    def corners(picture, low, high):
        (h, w), grey = picture.shape[:2], picture[:, :, 0]
        y, x = ((grey >= low) & (grey <= high)).nonzero()
        return x.min() / w, y.min() / h, x.max() / w, y.max() / h

    def detect(picture):
        found = corners(picture, 150, 229), corners(picture, 230, 255)
        found = [Bag(xmin=a, ymin=b, width=c - a, height=d - b) for a, b, c, d in found]
        return Bag(detections=[Bag(location_data=Bag(relative_bounding_box=f)) for f in found])

    def mesh(picture):
        a, b, c, d = corners(picture, 150, 255)
        return Bag(multi_face_landmarks=[Bag(landmark=[Bag(x=a, y=b), Bag(x=c, y=d)] * 234)])

    detection, mesh = (Bag(process=f) for f in (detect, mesh))
    return Bag(solutions=Bag(face_detection=Bag(FaceDetection=lambda **_: detection),
                             face_mesh=Bag(FaceMesh=lambda **_: mesh)))


def clockwise(x0, y0, x1, y1):
    return 96 - y1, x0, 96 - y0, x1


def mirrored(x0, y0, x1, y1):
    """Turned, and rows and columns exchanged."""
    return y0, x0, y1, x1


@pytest.mark.parametrize("matrix, shown", [
    (TURNS["clockwise"][0], clockwise), ([0, 65536, 0, 65536, 0, 0, 0, 0, 1 << 30], mirrored)])
def test_the_example_detector_tells_the_faces_where_they_were_drawn(
        tmp_path, monkeypatch, matrix, shown):
    def draw(picture, k):
        clipfiles.draw_square(picture, k)
        picture[80:88, 140:148] = 200

    stored = np.zeros((96, 160, 3), np.uint8)
    draw(stored, 3)
    Image.fromarray(stored).save(tmp_path / "ref.png")
    write(tmp_path / "a.mp4", count=12, size=(96, 160), draw=draw, matrix=matrix,
          coder={"crf": "0"}, stamps=[1000 + 40 * k for k in range(12)])
    row = {"video": "a.mp4", "caption": "x"}
    path = manifest(tmp_path, {**row, "video": "none.mp4"}, {**row, "reference": "ref.png"})
    monkeypatch.setitem(sys.modules, "mediapipe", fake_mediapipe())
    monkeypatch.setattr(sys, "argv", ["make_faces.py", str(path)])
    runpy.run_path(str(ROOT / "examples" / "make_faces.py"), run_name="__main__")
    (row,) = check(tmp_path / "manifest-faces.jsonl", SMALL).used
    faces = load_faces(row.faces)
    assert faces.times.tolist() == pytest.approx([0.04 * k for k in range(12)])
    # The middles of the outermost pixels.
    upright = torch.tensor([shown(*face_box(k)) for k in range(12)]).float()
    upright += torch.tensor([0.5, 0.5, -0.5, -0.5])
    assert faces.size == (160, 96) and torch.allclose(faces.boxes, upright, atol=0.02)
    reference = torch.tensor(face_box(3)) + torch.tensor([0.5, 0.5, -0.5, -0.5])
    assert faces.reference.size == (96, 160)
    assert torch.allclose(faces.reference.box, reference, atol=0.02)


@pytest.mark.parametrize("text", [
    "video,caption\na.mp4,x\n", '[{"video": "a.mp4", "caption": "x"}]',
    '{"data": [\n{"video": "a.mp4", "caption": "x"}\n]}', "\xe9", None])
def test_the_example_detector_refuses_what_is_no_jsonl_and_writes_nothing(
        tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "m.csv"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    monkeypatch.setitem(sys.modules, "mediapipe", fake_mediapipe())
    monkeypatch.setattr(sys, "argv", ["make_faces.py", str(path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "examples" / "make_faces.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and f"got {path};" in err
    assert list(tmp_path.iterdir()) == [path] * (text is not None)


# ------------------------------------------------------------ references


def draws(rows, i):
    g = torch.Generator().manual_seed(0)
    return [draw_reference(rows, i, g) for _ in range(30)]


def numbers(drawn) -> set[int]:
    """Which frames the pictures are."""
    return {round((np.asarray(d.picture).mean() - 16) / clipfiles.STEP) for d in drawn}


def test_the_given_reference_comes_first_then_another_clip_then_another_moment(tmp_path):
    write(tmp_path / "a.mp4", count=20)
    write(tmp_path / "b.mp4", count=10, first=24)
    write_picture(tmp_path / "ref.png", (20, 30))
    a, b = ({"video": name, "caption": "x"} for name in ("a.mp4", "b.mp4"))
    rows = [{**a, "identity": "p", "reference": "ref.png"}, {**a, "identity": "p"},
            {**b, "identity": "p"}, {**a, "identity": "q"}, a, b]
    rows = check(manifest(tmp_path, *rows), SMALL).used
    given = draw_reference(rows, 0, torch.Generator())
    assert given.source == "given" and given.picture.size == (20, 30)
    for i, source, frames in ((1, "other clip", range(24, 34)), (2, "other clip", range(20)),
                              (3, "other moment", range(9, 20)), (4, "other moment", range(9, 20)),
                              (5, "other moment", range(33, 34))):
        found = draws(rows, i)
        assert {d.source for d in found} == {source} and numbers(found) <= set(frames), i


def test_the_targets_own_frames_are_drawn_only_when_there_is_nothing_else(tmp_path):
    for rate in ("15", "60"):
        write(tmp_path / "a.mp4", count=36, rate=rate)
        path = manifest(tmp_path, {"video": "a.mp4", "caption": "x"})
        for start in (0.0, 0.11):
            row = replace(check(path, SMALL).used[0], start=start)
            own = clipfiles.indices(load_clip(row.video, row.bucket, 24.0, start))
            drawn = numbers(draws([row], 0))
            assert len(drawn) > 5 and not drawn & set(range(min(own), max(own) + 1))
    write(tmp_path / "a.mp4", count=9)
    assert draw_reference(check(path, SMALL).used, 0, torch.Generator()).source == "own frame"


def test_frames_with_a_face_are_preferred_and_come_with_its_box(tmp_path):
    write(tmp_path / "a.mkv", count=20, **SQUARE)
    faces_file(tmp_path / "faces.json", [2, 11, 13], marks=True)
    row = {"video": "a.mkv", "caption": "x", "faces": "faces.json"}
    rows, seen = check(manifest(tmp_path, row), SMALL).used, set()
    for drawn in draws(rows, 0):
        bright = np.asarray(drawn.picture)[:, :, 0] > 128
        x0, y0 = bright.any(axis=0).argmax(), bright.any(axis=1).argmax()
        assert drawn.source == "other moment" and drawn.box.tolist() == [x0, y0, x0 + 24, y0 + 24]
        assert drawn.landmarks[0].tolist() == [x0, y0]
        seen.add((x0 - 10) // 4)
    assert seen == {11, 13}


def test_the_given_reference_comes_with_its_face_in_its_own_pixels(tmp_path):
    write(tmp_path / "a.mp4", count=12, size=(96, 160))
    write_picture(tmp_path / "ref.png", (20, 30))
    marks = [[6, 9], [12, 9], [9, 12], [7, 15], [11, 15]]
    face = {"size": [60, 40], "box": [8, 12, 28, 36]}  # the detector saw it twice as large
    twice = {"landmarks": (2 * np.array(marks)).tolist()}
    faces_file(tmp_path / "0.json", [0], reference=face | twice)
    faces_file(tmp_path / "1.json", [0], reference=face)
    other = {"video": "a.mp4", "caption": "x"}
    row = {**other, "reference": "ref.png"}
    rows = check(manifest(tmp_path, {**row, "faces": "0.json"}, {**row, "faces": "1.json"}, row,
                          {**other, "faces": "0.json"}), SMALL).used
    marked, boxed, bare, moment = (draw_reference(rows, i, torch.Generator()) for i in range(4))
    assert marked.box.tolist() == boxed.box.tolist() == [4, 6, 14, 18]
    assert marked.landmarks.tolist() == marks and boxed.landmarks is None and bare.box is None
    assert moment.source == "other moment" and moment.box is None, "the entry is not a frame's"
