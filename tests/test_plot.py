"""Charts tell the truth: values lie where their ticks say, gaps stay open, spikes stay visible.

Positions are read back from the pixels of finished pictures; lines are 2 pixels wide, so 1.5
pixels are allowed. Hardware: CPU, seconds. Run: python -m pytest tests/test_plot.py
"""

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from training import plot

PIXELS = 1.5  # half a line's width, and rounding to half pixels
BLUE = plot.PALETTE[0]


def where(picture, color, top=24):
    """(rows, columns) of the pixels below the title that have this colour."""
    hit = np.abs(np.asarray(picture).astype(int) - np.array(color)).max(2) <= 8
    rows, columns = np.nonzero(hit[top:])
    return rows + top, columns


def grid(picture):
    """(rows, columns) of the grid's lines: those that are grey over most of the chart."""
    hit = (np.abs(np.asarray(picture).astype(int) - np.array(plot.GRID)).max(2) <= 2)
    rows, columns = np.nonzero(hit.mean(1) > 0.5)[0], np.nonzero(hit.mean(0) > 0.5)[0]
    assert len(rows) >= 2 and len(columns) >= 2, "nothing to measure by"
    return rows, columns


# ------------------------------------------------------------ ticks


numbers = st.floats(-1e9, 1e9, allow_subnormal=False)


@settings(deadline=None, max_examples=50)
@given(numbers, numbers, st.integers(2, 12))
def test_ticks_are_all_multiples_of_a_round_step(a, b, count):
    low, high = min(a, b), max(a, b)
    assume(high - low > 1e-6 * max(abs(low), abs(high)) and high - low > 1e-100)
    found = plot.ticks(low, high, count)
    assert all(low <= t <= high for t in found)
    assert math.floor(count / 2.5 - 1e-6) <= len(found) <= count + 1, "1 to 2.5 times too wide"
    if len(found) > 1:
        step = found[1] - found[0]
        power = 10.0 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(step / power - head) for head in (1, 2, 5)) < 1e-6, step
        assert np.allclose(np.diff(found), step, rtol=1e-6)
        assert found[0] - low < 1.000001 * step and high - found[-1] < 1.000001 * step


def test_ticks_are_the_very_numbers_that_their_labels_say():
    assert plot.ticks(0, 1, 10)[:4] == [0.0, 0.1, 0.2, 0.3], "0.3 is not 3 * 0.1"
    assert plot.log_ticks(-1.2, 1.1) == [0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert plot.log_ticks(-4, 4) == [1e-4, 1e-2, 1, 1e2, 1e4]


# ------------------------------------------------------------ pixels


def test_a_peak_lies_where_the_ticks_say():
    xs = list(range(101))
    ys = [100 - abs(x - 70) for x in xs]
    picture = plot.chart({"": (xs, ys)}, "tent", "step", width=640, height=400)
    rows, columns = grid(picture)
    assert len(rows) == 8 and len(columns) == 6, "ticks 30, 40 ... 100 and 0, 20 ... 100"
    line_rows, line_columns = where(picture, BLUE)
    assert abs(line_rows.min() - rows[0]) <= PIXELS, "100 is the top tick"
    top = line_columns[line_rows == line_rows.min()].mean()
    assert abs(top - np.interp(70, range(0, 101, 20), columns)) <= PIXELS
    assert abs(line_rows.max() - rows[-1]) <= PIXELS and abs(line_columns.min() - columns[0]) <= 2


@pytest.mark.parametrize("hole", [None, math.nan, -math.inf, 1e250, "text", True])
def test_gaps_are_not_bridged_and_a_lonely_value_is_a_dot(hole):
    values = [1.0, 2.0, 1.0, hole, hole, 2.0, hole, hole, 1.0, 2.0, 1.0]
    columns = where(plot.chart({"": (list(range(11)), values)}, "gaps", "step"), BLUE)[1]
    first, last = columns.min() + 3, columns.max() - 3  # dots have a radius of 3
    at = np.interp(np.arange(0, 10.5, 0.5), [0, 10], [first, last]).round().astype(int)
    for half in (5, 6, 7, 8, 9, 11, 12, 14, 15):  # in half steps
        assert not set(range(at[half] - 3, at[half] + 4)) & set(columns), half / 2
    assert {at[10], at[2], at[1]} <= set(columns), "the lonely value, and two of the line"


def test_on_a_logarithmic_axis_equal_ratios_are_equal_distances_and_zero_is_a_gap():
    picture = plot.chart({"": ([0, 1, 2, 3, 4], [1, 10, 0.0, 100, 1000])}, "", "", log_y=True)
    rows, columns = where(picture, BLUE)
    share = (columns - columns.min() - 3) / (columns.max() - columns.min() - 6)
    height = [rows[np.abs(share - x / 4) < 0.004].mean() for x in (0, 1, 3, 4)]
    assert np.ptp(np.diff(height)) <= 2 * PIXELS and height[0] - height[1] > 30
    assert not ((share > 0.3) & (share < 0.7)).any()
    assert len(grid(picture)[0]) == 4, "one line for each power of ten"


@pytest.mark.parametrize("values", [[], [3.0], [-1e199, 1e199], [1e-199, 1e199], [1e15, 1e15 + 1]])
@pytest.mark.parametrize("log", [False, True])
def test_any_numbers_make_a_picture(values, log):
    picture = plot.chart({"run": (range(len(values)), values)}, "odd", "step", log_y=log)
    drawn = [v for v in values if plot.known(v, log)]
    assert bool(len(where(picture, BLUE, 45)[0])) == bool(drawn)


# ------------------------------------------------------------ logs


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_log_cut_at_any_byte_is_read_up_to_its_last_whole_line(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.inf, "face": None}, {"step": 3}]
    path = write(tmp_path / "log.jsonl", rows)
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("}")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        assert plot.read_log(path) == rows[:sum(end < cut for end in ends)], data[:cut]


@pytest.mark.parametrize("line", [b'{"step": 1, "lo', b"[1]", b"{}", b'{"step": "1"}',
                                  b'{"step": NaN}', b"\xff\xfe", b"[" * 100000])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match="expected a JSON object.*in line 2 of.*log.jsonl") as told:
        plot.read_log(path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_of_a_step_that_was_logged_twice_the_later_line_counts():
    rows = [{"step": s, "loss": 1.0} for s in (10, 20, 30)]
    rows += [{"step": s, "loss": 2.0} for s in (15, 20, 40)]
    expected = ([10, 15, 20, 30, 40], *[[1.0, 2.0, 2.0, 1.0, 2.0]] * 3)
    assert plot.grouped(rows, "loss") == expected


def test_a_long_log_becomes_means_and_keeps_every_extreme():
    values = [math.sin(i) for i in range(3000)]
    values[1234], values[99], values[2000:2040] = 50.0, -7.0, [math.nan] * 40
    rows = [{"step": i, "loss": v} for i, v in enumerate(values)]
    xs, mean, low, high = plot.grouped(rows, "loss")
    assert len(xs) == plot.POINTS and 0 <= min(xs) and max(xs) < 3000
    assert max(v for v in high if v is not None) == 50.0
    assert min(v for v in low if v is not None) == -7.0
    assert mean.count(None) == low.count(None) == high.count(None) == 2, "20 without a number"
    assert mean[0] == pytest.approx(sum(values[:20]) / 20, abs=1e-12)


def test_one_bad_step_in_three_thousand_is_seen_in_the_picture():
    rows = [{"step": i, "loss": 1.0 + 0.1 * math.sin(i)} for i in range(3000)]
    rows[1500]["loss"] = 3.0
    picture = plot.panel({"": rows}, "loss")
    rows, columns = where(picture, (195, 224, 240))  # blue, a quarter over white
    line = where(picture, BLUE)
    middle = (line[1].min() + line[1].max()) / 2
    assert rows.min() < 60, "the shade reaches to the top"
    assert abs(columns[rows == rows.min()].mean() - middle) <= 3, "at half of the width"
    assert line[0].min() > 180, "the mean of its group does not"


def test_numbers_over_decades_get_a_logarithmic_axis(monkeypatch):
    seen = {}
    monkeypatch.setattr(plot, "chart", lambda series, title, x_label, log_y, bands:
                        seen.update({title: log_y}))
    rows = [{"step": i, "far": 1.5 * 101.0**i, "near": 99.0**i, "zero": 1000.0 * i} for i in (0, 1)]
    for key in ("far", "near", "zero", "none"):
        plot.panel({"": rows}, key)
    assert seen == {"far": True, "near": False, "zero": False, "none": False}


# ------------------------------------------------------------ files


def test_every_logged_number_has_a_panel_in_two_columns(tmp_path):
    a = [{"step": 1, "seconds": 1.0, "loss": 1.0, "note": "x", "flag": True},
         {"step": 2, "seconds": 2.0, "val": math.nan}]
    b = [{"step": 1, "seconds": 1.0, "other": 3}]
    plot.curves({"a": a, "b": b}, tmp_path / "new" / "curves.png")
    with Image.open(tmp_path / "new" / "curves.png") as image:
        assert image.format == "PNG" and image.size == (960, 600)
        last, none = (image.crop((x, 300, x + 480, 600)).getextrema() for x in (0, 480))
    assert last != ((255, 255),) * 3 and none == ((255, 255),) * 3, "three panels, then white"


def test_the_command_draws_two_runs_under_the_names_of_their_folders(tmp_path, monkeypatch, capsys):
    named = []
    monkeypatch.setattr(plot, "curves", lambda logs, path: named.append(list(logs)))
    logs = [write(tmp_path / folder / "log.jsonl", [{"step": 1}]) for folder in ("a", "b", "x/a")]
    assert plot.main([str(logs[0]), str(logs[1]), "--out", "o.png"]) == 0
    assert plot.main([str(logs[0]), str(logs[2])]) == 0
    assert named == [["a", "b"], [str(logs[0]), str(logs[2])]]
    assert capsys.readouterr().out == "wrote o.png\nwrote curves.png\n"


@pytest.mark.parametrize("log, out", [("none.jsonl", "o.png"), ("good.jsonl", "o.jpg")])
def test_a_wrong_command_says_so_in_one_line_and_writes_nothing(tmp_path, capsys, log, out):
    write(tmp_path / "good.jsonl", [{"step": 1, "loss": 1.0}])
    assert plot.main([str(tmp_path / log), "--out", str(tmp_path / out)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("training.plot: error: ") and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["good.jsonl"]
