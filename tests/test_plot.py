"""Charts tell the truth: values lie where their ticks say, gaps stay open, spikes stay visible, logs are read as written.

Positions are read back from the pixels of finished pictures; lines are 2 pixels wide, so 1.5 pixels are allowed.
Hardware: CPU, some seconds. Run: python -m pytest tests/test_plot.py
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from training import plot

ROOT = Path(__file__).resolve().parent.parent
PIXELS = 1.5  # half a line's width, and rounding to half pixels
BLUE, ORANGE = plot.PALETTE[:2]


def where(picture, color, top=24, tolerance=8):
    """(rows, columns) of the pixels from row `top` on that have this colour; the title is above 24, the legend above 45."""
    pixels = np.asarray(picture).astype(int)
    hit = np.abs(pixels - np.array(color)).max(2) <= tolerance
    rows, columns = np.nonzero(hit[top:])
    return rows + top, columns


def grid(picture):
    """(rows, columns) of the grid's lines: those that are grey over most of the chart."""
    hit = (np.abs(np.asarray(picture).astype(int) - np.array(plot.GRID)).max(2) <= 2)
    rows, columns = np.nonzero(hit.mean(1) > 0.5)[0], np.nonzero(hit.mean(0) > 0.5)[0]
    assert len(rows) >= 2 and len(columns) >= 2, "nothing to measure by"
    return rows, columns


# ---------------------------------------------------------------- ticks

numbers = st.floats(-1e9, 1e9, allow_subnormal=False)


@settings(deadline=None)
@given(numbers, numbers, st.integers(2, 12))
def test_ticks_are_all_the_multiples_of_the_smallest_round_step_that_is_not_too_fine(a, b, count):
    low, high = min(a, b), max(a, b)
    assume(high - low > 1e-6 * max(abs(low), abs(high)) and high - low > 1e-100)
    found = plot.ticks(low, high, count)
    assert all(low <= t <= high for t in found)
    assert math.floor(count / 2.5 - 1e-6) <= len(found) <= count + 1, "a step is 1 to 2.5 times as wide as was asked for"
    if len(found) < 2:
        return
    step = found[1] - found[0]
    power = 10.0 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(step / power - head) for head in (1, 2, 5)) < 1e-6, step
    assert np.allclose(np.diff(found), step, rtol=1e-6)
    assert found[0] - low < 1.000001 * step and high - found[-1] < 1.000001 * step, "none is missing at the ends"
    assert 0.999999 < step / ((high - low) / count) < 2.500001, "not too fine; the next smaller one would be"


@given(st.floats(-300, 290), st.floats(0.71, 12))
def test_logarithmic_ticks_are_round_and_inside_and_never_fewer_than_one(low, span):
    found = plot.log_ticks(low, low + span)
    assert 1 <= len(found) <= 9
    for t in found:
        assert low - 1e-9 <= math.log10(t) <= low + span + 1e-9
        assert float(f"{t:.0e}") == pytest.approx(t, rel=1e-12) and f"{t:.0e}"[0] in "125"


@settings(deadline=None)
@given(numbers, numbers)
def test_labels_read_back_as_their_ticks(a, b):
    assume(abs(a - b) > 1e-6 * max(abs(a), abs(b)) and abs(a - b) > 1e-100)
    found = plot.ticks(min(a, b), max(a, b))
    texts = plot.labels(found)
    assert [float(text) for text in texts] == pytest.approx(found, rel=1e-9, abs=1e-300)
    assert len(set(texts)) == len(texts)


def test_ticks_are_the_very_numbers_that_their_labels_say():
    assert plot.ticks(0, 1, 10) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "0.3 is not 3 * 0.1"
    assert plot.ticks(0, 3e-5, 3) == [0.0, 1e-5, 2e-5, 3e-5]


def test_whole_steps_have_no_ticks_between_them():
    assert len(grid(plot.chart({"": ([1, 2, 3], [1, 3, 2])}, "", "step"))[1]) == 3
    assert len(grid(plot.chart({"": ([1, 2, 2.5, 3], [1, 3, 2, 2])}, "", "hours"))[1]) > 3


def test_labels_are_short():
    assert plot.labels([0.0, 0.1, 0.2, 0.3]) == ["0", "0.1", "0.2", "0.3"]
    assert plot.labels(plot.ticks(0, 3000)) == ["0", "1000", "2000", "3000"]
    assert plot.labels([0.0, 5e-5, 1e-4]) == ["0", "5e-5", "1e-4"]
    assert plot.labels([-2.0, -1.5]) == ["-2.0", "-1.5"]
    assert plot.labels([2e6, 4e6]) == ["2e6", "4e6"]


# ---------------------------------------------------------------- pixels


def test_a_horizontal_line_lies_on_the_row_of_its_tick_and_the_label_stands_beside_it():
    picture = plot.chart({"": (list(range(100)), [7.0] * 100)}, "flat", "step")
    (line, columns), rows = where(picture, BLUE), grid(picture)[0]  # the line hides the grid at 7.0
    ink = np.nonzero((np.asarray(picture)[24:262, :columns.min() - 25] < 120).all(2).any(1))[0] + 24
    texts = [group.mean() for group in np.split(ink, np.nonzero(np.diff(ink) > 2)[0] + 1)]
    assert len(texts) == 3 and len(rows) == 2, "6.5, 7.0 and 7.5"
    assert line.max() - line.min() <= 2 and abs(line.mean() - rows.mean()) <= PIXELS, "7.0 lies between 6.5 and 7.5"
    assert np.abs(np.array(texts) - [rows[0], line.mean(), rows[1]]).max() <= PIXELS, (texts, rows)


def test_a_peak_lies_where_the_ticks_say():
    xs = list(range(101))
    picture = plot.chart({"": (xs, [100 - abs(x - 70) for x in xs])}, "tent", "step", width=640, height=400)
    rows, columns = grid(picture)
    assert len(rows) == 8 and len(columns) == 6, "ticks 30, 40 ... 100 and 0, 20 ... 100"
    line_rows, line_columns = where(picture, BLUE)
    assert abs(line_rows.min() - rows[0]) <= PIXELS, "100 is the top tick"
    assert abs(line_columns[line_rows == line_rows.min()].mean() - np.interp(70, range(0, 101, 20), columns)) <= PIXELS
    assert abs(line_rows.max() - rows[-1]) <= PIXELS and abs(line_columns.min() - columns[0]) <= PIXELS, "starts at 30"
    for tick, row in zip(range(90, 20, -10), rows[1:], strict=True):
        crossing = line_columns[(line_rows == row) & (line_columns < columns[3])].mean()
        assert abs(crossing - np.interp(tick - 30, range(0, 101, 20), columns)) <= PIXELS, tick


def test_gaps_are_not_bridged_and_a_lonely_value_is_a_dot():
    xs = list(range(11))
    for hole in (None, math.nan, math.inf, -math.inf, 1e250, 10**400, "text", True):
        values = [1.0, 2.0, 1.0, hole, hole, 2.0, hole, hole, 1.0, 2.0, 1.0]
        picture = plot.chart({"": (xs, values)}, "gaps", "step")
        first, last = (where(picture, BLUE)[1].min() + 3, where(picture, BLUE)[1].max() - 3)  # dots have a radius of 3
        seen = set(where(picture, BLUE)[1].tolist())
        column = np.interp(np.arange(11), [0, 10], [first, last])
        for empty in (2.5, 3, 4, 4.5, 5.5, 6, 7, 7.5):
            middle = round(np.interp(empty, xs, column))
            assert not set(range(middle - 3, middle + 4)) & seen, hole
        assert {round(column[5]), round(column[1]), round((column[0] + column[1]) / 2)} <= seen, hole


def test_a_line_that_ends_in_nan_does_not_fill_the_axis():
    xs = list(range(101))
    columns = where(plot.chart({"": (xs, [1.0 if x <= 50 else math.nan for x in xs])}, "ended", "step"), BLUE)[1]
    whole = where(plot.chart({"": (xs, [1.0] * 101)}, "not ended", "step"), BLUE)[1]
    assert abs((columns.max() - columns.min()) / (whole.max() - whole.min()) - 0.5) < 0.02


def test_on_a_logarithmic_axis_equal_ratios_are_equal_distances_and_zero_is_a_gap():
    picture = plot.chart({"": ([0, 1, 2, 3, 4], [1, 10, 0.0, 100, 1000])}, "log", "step", log_y=True)
    rows, columns = where(picture, BLUE)
    share = (columns - columns.min() - 3) / (columns.max() - columns.min() - 6)
    height = [rows[np.abs(share - x / 4) < 0.004].mean() for x in (0, 1, 3, 4)]
    assert np.ptp(np.diff(height)[[0, 2]]) <= 2 * PIXELS and abs(np.diff(height)[0]) > 30
    assert abs(height[1] - height[2] - (height[0] - height[1])) <= 2 * PIXELS
    assert not ((share > 0.3) & (share < 0.7)).any()
    assert len(grid(picture)[0]) == 4, "one line for each power of ten"
    assert len(grid(plot.chart({"": ([0, 1], [3.0, 4.1])}, "", "", log_y=True))[0]) >= 3, "also within one decade"
    far = plot.chart({"": ([0, 1], [1e-30, 1.0])}, "", "", log_y=True)
    assert where(far, BLUE)[1].min() < 75, "labels of decades are short: 1e-28, not 28 digits"


def test_series_have_their_own_colours_and_the_empty_name_has_no_legend():
    two = plot.chart({"a": ([0, 1], [0, 0]), "b": ([0, 1], [1, 1])}, "", "")
    assert where(two, BLUE, 45)[0].min() > where(two, ORANGE, 45)[0].max() + 50, "a below b"
    head = np.asarray(two)[20:44]
    assert (head == BLUE).all(2).any() and (head == ORANGE).all(2).any()
    one = np.asarray(plot.chart({"": ([0, 1], [0, 1])}, "", ""))
    assert (one[:18] == 255).all(), "no title, no legend"


def test_a_missing_run_keeps_the_colours_of_the_others():
    picture = plot.chart({"a": ([], []), "b": ([0, 1], [1, 2])}, "", "")
    assert len(where(picture, ORANGE, 45)[0]) and not len(where(picture, BLUE, 45)[0])


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [-1e199, 1e199], [1e-199, 1e199], [5e-324, 1e-320], [1e15, 1e15 + 1]])
@pytest.mark.parametrize("log", [False, True])
def test_any_numbers_make_a_picture(values, log):
    picture = plot.chart({"run": (list(range(len(values))), values)}, "odd", "step", log_y=log)
    assert picture.size == (480, 300) and picture.mode == "RGB"
    drawn = [v for v in values if plot.known(v, log)]
    assert bool(len(where(picture, BLUE, 45)[0])) == bool(drawn)


def test_columns_of_different_length_shades_without_line_and_tiny_pictures_are_refused():
    with pytest.raises(ValueError, match="expected columns of one length.*'a'"):
        plot.chart({"a": ([1, 2], [1])}, "", "")
    with pytest.raises(ValueError, match="a line for every shade.*'b'"):
        plot.chart({"a": ([1], [1])}, "", "", bands={"b": ([1], [1], [1])})
    with pytest.raises(ValueError, match="make it larger"):
        plot.chart({"a": ([1], [1])}, "", "", width=60, height=60)
    with pytest.raises(ValueError, match="expected low < high"):
        plot.ticks(1.0, 1.0)


# ---------------------------------------------------------------- logs


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_log_cut_at_any_byte_is_read_up_to_its_last_whole_line(tmp_path):
    rows = [{"step": 1, "seconds": 0.5, "loss": 2.0}, {"step": 2, "seconds": 1.0, "loss": math.inf, "face": None},
            {"step": 3, "seconds": 1.5, "loss": 1.0, "note": "fin"}]  # fmt: skip
    path = write(tmp_path / "log.jsonl", rows)
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("}")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        assert plot.read_log(path) == rows[:sum(end < cut for end in ends)], data[:cut]


@pytest.mark.parametrize("line", [b'{"step": 1, "lo', b"[1]", b"3", b"null", b"{}", b'{"step": "1"}', b'{"step": NaN}',
                                  b'{"step": null}', b"\xff\xfe", b"[" * 100000])  # fmt: skip
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match="expected a JSON object.*in line 2 of.*log.jsonl") as error:
        plot.read_log(path)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match="in line 2 of"):
        plot.read_log(path)


def test_what_is_whole_but_no_row_is_not_taken_for_a_cut_off_line(tmp_path):
    (tmp_path / "list.json").write_text('[{"step": 1}]')
    with pytest.raises(ValueError, match="in line 1 of .*list.json"):
        plot.read_log(tmp_path / "list.json")
    (tmp_path / "log.jsonl").write_text('\n{"step": 1}\n\n{"step": 2}')
    assert plot.read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}], "empty lines and a missing last end"


def test_of_a_step_that_was_logged_twice_the_later_line_counts():
    rows = [{"step": s, "loss": 1.0} for s in (10, 20, 30)] + [{"step": s, "loss": 2.0} for s in (15, 20, 40)]
    assert plot.grouped(rows, "loss") == ([10, 15, 20, 30, 40], *[[1.0, 2.0, 2.0, 1.0, 2.0]] * 3)


def test_a_number_that_few_lines_hold_is_one_line_through_them():
    rows = [{"step": s, "loss": 1.0} | ({"val": s / 10} if s % 100 == 0 else {}) for s in range(0, 301, 10)]
    assert plot.grouped(rows, "val")[:2] == ([0, 100, 200, 300], [0, 10, 20, 30])


def test_a_long_log_becomes_means_and_keeps_every_extreme():
    values = [math.sin(i) for i in range(3000)]
    values[1234], values[99], values[2000:2040] = 50.0, -7.0, [math.nan] * 40
    xs, mean, low, high = plot.grouped([{"step": i, "loss": v} for i, v in enumerate(values)], "loss")
    assert len(xs) == plot.POINTS and 0 <= min(xs) and max(xs) < 3000
    assert max(v for v in high if v is not None) == 50.0 and min(v for v in low if v is not None) == -7.0
    assert mean.count(None) == low.count(None) == high.count(None) == 2, "two groups of 20 have no number"
    assert mean[0] == pytest.approx(sum(values[:20]) / 20, abs=1e-12)


def test_one_bad_step_in_three_thousand_is_seen_in_the_picture():
    calm = [{"step": i, "loss": 1.0 + 0.1 * math.sin(i)} for i in range(3000)]
    spike = [row | ({"loss": 3.0} if row["step"] == 1500 else {}) for row in calm]
    picture = np.asarray(plot.panel({"": spike}, "loss")).astype(int)
    shade = np.abs(picture - (195, 224, 240)).max(2) < 20                                 # blue, a quarter over white
    rows, columns = np.nonzero(shade)
    line = where(picture, BLUE)
    middle = (line[1].min() + line[1].max()) / 2
    assert rows.min() < 60, "the shade reaches to the top"
    assert abs(columns[rows == rows.min()].mean() - middle) <= 3, "at half of the width"
    assert line[0].min() > 180, "the mean of its group does not"


def test_numbers_over_decades_get_a_logarithmic_axis(monkeypatch):
    seen = {}

    def spy(series, title, x_label, log_y=False, bands=None):
        seen[title] = log_y
        return Image.new("RGB", (480, 300))

    monkeypatch.setattr(plot, "chart", spy)
    rows = [{"step": i, "far": 1.5 * 101.0**i, "near": 99.0**i, "zero": 1000.0 * i, "none": None} for i in (0, 1)]
    for key in ("far", "near", "zero", "none"):
        plot.panel({"": rows}, key)
    assert seen == {"far": True, "near": False, "zero": False, "none": False}


# ---------------------------------------------------------------- files


def test_every_logged_number_has_a_panel_in_two_columns(tmp_path, monkeypatch):
    titles, chart = [], plot.chart
    monkeypatch.setattr(plot, "chart", lambda series, title, *a, **k: titles.append(title) or chart(series, title, *a, **k))
    a = [{"step": 1, "seconds": 1.0, "loss": 1.0, "note": "x", "flag": True}, {"step": 2, "seconds": 2.0, "val": math.nan}]
    b = [{"step": 1, "seconds": 1.0, "other": 3}]
    plot.curves({"a": a, "b": b}, tmp_path / "new" / "curves.png")
    assert titles == ["loss", "val", "other"]
    with Image.open(tmp_path / "new" / "curves.png") as image:
        assert image.format == "PNG" and image.size == (960, 600)
        for column, row, full in ((0, 0, True), (1, 0, True), (0, 1, True), (1, 1, False)):
            part = image.crop((480 * column, 300 * row, 480 * (column + 1), 300 * (row + 1)))
            assert (part.getextrema() != ((255, 255),) * 3) == full, "three panels, then white"
    plot.curves({"": []}, tmp_path / "new" / "curves.png")
    with Image.open(tmp_path / "new" / "curves.png") as image:
        assert image.size == (480, 300), "nothing logged yet"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["curves.png"]


def test_a_write_that_fails_leaves_the_picture_before_it(tmp_path, monkeypatch):
    target = tmp_path / "curves.png"
    target.write_bytes(b"before")

    def full(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        plot.curves({"": [{"step": 1, "loss": 1.0}]}, target)
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


def test_the_command_draws_two_runs_under_the_names_of_their_folders(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(plot, "curves", lambda logs, path: named.append((list(logs), path)))
    logs = [write(tmp_path / folder / "log.jsonl", [{"step": 1, "loss": 1.0}]) for folder in ("a", "b", "x/a")]
    assert plot.main([str(logs[0]), str(logs[1]), "--out", "o.png"]) == 0
    assert plot.main([str(logs[0]), str(logs[2])]) == 0
    monkeypatch.chdir(tmp_path / "b")
    assert plot.main(["log.jsonl"]) == 0
    assert named == [(["a", "b"], Path("o.png")), ([str(logs[0]), str(logs[2])], Path("curves.png")),
                     (["b"], Path("curves.png"))]  # fmt: skip


def test_the_command_runs_from_any_folder(tmp_path):
    write(tmp_path / "a" / "log.jsonl", [{"step": i, "seconds": 1.0, "loss": 1.0 / (1 + i)} for i in range(3)])
    command = [sys.executable, str(ROOT / "training.plot"), "a/log.jsonl"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout == "wrote curves.png\n", run.stderr
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (480, 300)


@pytest.mark.parametrize("what", ["missing", "folder", "broken", "jpg", "nowhere"])
def test_a_wrong_command_says_so_in_one_line_and_writes_nothing(tmp_path, capsys, what):
    good = write(tmp_path / "a" / "log.jsonl", [{"step": 1, "loss": 1.0}])
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n{}\n")
    log = {"missing": tmp_path / "none.jsonl", "folder": tmp_path / "a", "broken": bad}.get(what, good)
    out = {"jpg": tmp_path / "o.jpg", "nowhere": good / "o.png"}.get(what, tmp_path / "o.png")
    before = sorted(tmp_path.rglob("*"))
    assert plot.main([str(good), str(log), "--out", str(out)] if log != good else [str(log), "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("plot.py: error: ") and captured.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
