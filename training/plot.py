"""Line charts with Pillow: what trainings logged, a panel per number, a line per run.

The idea. A training that goes wrong shows it in a curve long before it shows it in a sample. Two
habits of plotting hide it again: a smoothed line has no spikes, and a line drawn through a hole
looks like a measurement. Here a long log is drawn as means with a shade from the smallest to the
largest value, so that the one bad step stays visible, and NaN is a gap. No part of the paper:
ST-DRC (arXiv 2606.02441) shows no curves.

Conventions. log.jsonl holds one JSON object per line: "step", "seconds", numbers. What is no
number, NaN, infinite or at least 1e200 is a gap; on a logarithmic axis so is what is not positive.
A resumed run logs some steps twice: the later line counts. Lengths in the code are pixels of a
drawing of twice the size, which is halved at the end: that smooths its lines.

    curves({"": read_log("runs/a/log.jsonl")}, "curves.png")     # no name, no legend
    python -m training.plot runs/a/log.jsonl runs/b/log.jsonl --out curves.png

Read next: training/validate.py
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common.cli import Parser, check_file, command
from common.files import atomic_write

# Okabe and Ito's colours, told apart by the colour-blind; their yellow is too pale on white
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
           (86, 180, 233), (0, 0, 0))
INK, GREY, GRID = (40, 40, 40), (110, 110, 110), (226, 226, 226)
HUGE = 1e200  # from here on values are gaps: their differences must stay finite
POINTS = 150  # a line of twice as many is drawn in groups: a panel has three pixels for each
Values = Sequence[float | None]


def known(value: object, log: bool = False) -> bool:
    """Whether a value can be drawn; see the conventions above."""
    return (type(value) in (int, float) and abs(value) < HUGE  # NaN fails
            and (not log or value > 1 / HUGE))


# ------------------------------------------------------------ axes


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Multiples of a step 1, 2 or 5 x 10^k within [low, high]: the smallest step that gives about
    `count` or fewer. Raises ValueError unless low < high."""
    if not low < high:
        raise ValueError(f"expected low < high, got {low} and {high}; widen a flat range first")
    rough = (high - low) / count
    power = math.floor(math.log10(rough))
    fits = ((h, power) for h in (1, 2, 5) if h * 10.0**power >= rough)
    head, power = next(fits, (1, power + 1))
    # whole numbers: 3 * 0.1 is not 0.3, but 3 / 10 is
    up, down = 10 ** max(power, 0), 10 ** max(-power, 0)
    first, last = (round(end / (head * 10.0**power)) for end in (low, high))
    return [t for k in range(first - 1, last + 2) if low <= (t := k * head * up / down) <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks from 10^low to 10^high: powers of ten, with 2 and 5 between if the axis is short."""
    if high - low < 0.7:
        return ticks(10**low, 10**high)
    every, heads = math.ceil((high - low) / 6), (1, 2, 5) if high - low < 2.5 else (1,)
    powers = [k for k in range(math.floor(low), math.ceil(high) + 1) if k % every == 0]
    return [h * 10.0**k for k in powers for h in heads if low <= k + math.log10(h) <= high]


class Axis:
    """Values -> pixels from `start` to `end`, with a margin of a twentieth on both sides."""

    def __init__(self, values: list[float], log: bool = False):
        self.log, self.start, self.end = log, 0.0, 1.0  # set when the labels are: `draw_axes`
        places = [math.log10(v) if log else v for v in values] or [0.0, 1.0]
        low, high = min(places), max(places)
        size, margin = max(abs(low), abs(high)), 0.05 * (high - low)
        if high - low <= 1e-9 * size:  # a flat line needs room too
            margin = 0.1 * size or 1.0
        self.low, self.high = low - margin, high + margin

    def ticks(self, spacing: float) -> list[float]:
        count = max(2, int(abs(self.end - self.start) / spacing))
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, count)

    def place(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


# ------------------------------------------------------------ one panel


def pieces(columns: Sequence[Values], log: bool) -> list[list[tuple]]:
    """Columns (x, y, ...) -> the stretches of points without a gap; some are a single point."""
    out: list[list[tuple]] = [[]]
    for point in zip(*columns, strict=True):
        if known(point[0]) and all(known(v, log) for v in point[1:]):
            out[-1].append(point)
        elif out[-1]:
            out.append([])
    return [piece for piece in out if piece]


def chart(series: dict[str, tuple[Values, Values]], title: str, x_label: str, width: int = 480,
          height: int = 300, log_y: bool = False,
          bands: dict[str, tuple[Values, Values, Values]] | None = None) -> Image.Image:
    """One panel: a line per series through its points (xs, ys), a shade (xs, low, high) around it.

    bands: the shades, by the name of their series. width, height: of the picture, in pixels. Dots
    mark single points and those of a short line. Raises ValueError for columns of unequal length.
    """
    bands = bands or {}
    lines = {name: pieces(columns, log_y) for name, columns in series.items()}
    shades = {name: pieces(columns, log_y) for name, columns in bands.items()}
    found = [piece for drawn in (lines, shades) for some in drawn.values() for piece in some]
    xs = [x for columns in (*series.values(), *bands.values()) for x in columns[0] if known(x)]
    ys = [value for piece in found for point in piece for value in point[1:]]
    x, y = Axis(xs), Axis(ys, log_y)  # gaps count in x: a line that ends in NaN ends early
    picture = Image.new("RGB", (2 * width, 2 * height), "white")
    draw = ImageDraw.Draw(picture, "RGBA")  # shades are translucent: none covers another
    draw.text((width, 10), title, INK, ImageFont.load_default(26), anchor="mt")
    top = draw_legend(draw, list(series) if any(series) else [], width)
    draw_axes(draw, x, y, x_label, top, picture.size, whole=all(v == int(v) for v in xs))
    if not ys:
        middle = ((x.start + x.end) / 2, (y.start + y.end) / 2)
        draw.text(middle, "no values", GREY, ImageFont.load_default(24), anchor="mm")
    for name, color in zip(series, cycle(PALETTE), strict=False):
        for piece in shades.get(name, []):
            rim = [(a, high) for a, _, high in piece] + [(a, low) for a, low, _ in piece[::-1]]
            if len(piece) > 1:
                draw.polygon([(x.place(a), y.place(b)) for a, b in rim], (*color, 60))
        few = sum(map(len, lines[name])) <= 25
        for piece in lines[name]:
            places = [(x.place(a), y.place(b)) for a, b in piece]
            draw.line(places, color, 4, joint="curve")
            for a, b in places if few or len(places) == 1 else []:
                draw.ellipse((a - 6, b - 6, a + 6, b + 6), color)
    return picture.reduce(2)


def draw_legend(draw: ImageDraw.ImageDraw, names: list[str], width: int) -> int:
    """Swatches and names in as many rows as they need; returns the row where the chart begins."""
    font, left, top = ImageFont.load_default(22), 24, 48
    for name, color in zip(names, cycle(PALETTE), strict=False):
        short = name if len(name) <= 32 else f"...{name[-29:]}"  # of a path the end tells more
        need = 80 + int(draw.textlength(short, font))
        if left > 24 and left + need > 2 * width:
            left, top = 24, top + 30
        draw.rectangle((left, top + 9, left + 39, top + 14), color)
        draw.text((left + 52, top + 12), short, INK, font, anchor="lm")
        left += need
    return top + 36 if names else top


def draw_axes(draw: ImageDraw.ImageDraw, x: Axis, y: Axis, x_label: str, top: int,
              size: tuple[int, int], whole: bool) -> None:
    """Grid, labels and frame; tells both axes where they lie. whole: no ticks between integers."""
    font, (width, height) = ImageFont.load_default(20), size
    y.start, y.end = float(height - 76), float(top + 12)
    rows = y.ticks(spacing=70)
    texts = [f"{value:.7g}" for value in rows]
    x.start, x.end = 28 + max(draw.textlength(text, font) for text in texts), float(width - 28)
    for value, text in zip(rows, texts, strict=True):
        row = int(y.place(value) / 2) * 2  # whole pixels of the small picture keep the grid sharp
        draw.rectangle((x.start, row, x.end, row + 1), GRID)
        draw.text((x.start - 10, row + 1), text, INK, font, anchor="rm")
    columns = [t for t in x.ticks(spacing=150) if not whole or t == int(t)]
    for value in columns:
        column = int(x.place(value) / 2) * 2
        draw.rectangle((column, y.end, column + 1, y.start), GRID)
        draw.text((column + 1, y.start + 10), f"{value:.7g}", INK, font, anchor="mt")
    draw.line([(x.start, y.end), (x.start, y.start), (x.end, y.start)], GREY, 2)
    draw.text(((x.start + x.end) / 2, height - 12), x_label, GREY, font, anchor="mb")


# ------------------------------------------------------------ logs


def read_log(path: str | Path) -> list[dict]:
    """The lines of a log.jsonl. A last line that is cut off is skipped: a run may be writing it.

    Raises OSError for no file, ValueError naming the line that is no JSON object with a "step".
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # no end of line behind it
                break
            row = None
        if not isinstance(row, dict) or not known(row.get("step")):
            raise ValueError(f'expected a JSON object with a number "step" per line, got '
                             f"{line[:40]!r} in line {number} of {path}; give a run's log.jsonl")
        rows.append(row)
    return rows


def grouped(rows: list[dict], key: str) -> tuple[list[float], Values, Values, Values]:
    """One number by rising step: (x, mean, smallest, largest) of successive groups, about POINTS.

    A log of fewer than 2 POINTS values stays as it is. A group without a number is a gap.
    """
    values = {row["step"]: row[key] for row in rows if key in row}  # the later of two lines stays
    steps, size = sorted(values), max(1, len(values) // POINTS)
    groups = [steps[start:start + size] for start in range(0, len(steps), size)]
    numbers = [[values[step] for step in group if known(values[step])] for group in groups]
    return ([sum(group) / len(group) for group in groups],
            [sum(n) / len(n) if n else None for n in numbers],
            [min(n, default=None) for n in numbers], [max(n, default=None) for n in numbers])


def panel(logs: dict[str, list[dict]], key: str) -> Image.Image:
    """The chart of one number, a line per run; logarithmic if positive with max > 100 min."""
    found = {name: grouped(rows, key) for name, rows in logs.items()}
    ends = [v for _, _, low, high in found.values() for v in (*low, *high) if v is not None]
    log_y = bool(ends) and min(ends) > 0 and max(ends) > 100 * min(ends)
    bands = {name: (xs, low, high) for name, (xs, _, low, high) in found.items() if low != high}
    note = "step (line: means, shade: smallest to largest)" if bands else "step"
    means = {name: (xs, mean) for name, (xs, mean, _, _) in found.items()}
    return chart(means, key, note, log_y=log_y, bands=bands)


def beside(panels: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size on a sheet, two in a row."""
    width, height = panels[0].size
    size = (width * min(2, len(panels)), height * math.ceil(len(panels) / 2))
    sheet = Image.new("RGB", size, "white")
    for i, picture in enumerate(panels):
        sheet.paste(picture, (i % 2 * width, i // 2 * height))
    return sheet


def curves(logs: dict[str, list[dict]], path: str | Path) -> None:
    """Write a PNG with a panel for every number but step and seconds, in two columns.

    logs: name of the run -> what `read_log` gave; without any number the picture says so.
    """
    keys = dict.fromkeys(key for rows in logs.values() for row in rows for key in row
                         if type(row[key]) in (int, float) and key not in ("step", "seconds"))
    panels = [panel(logs, key) for key in keys] or [chart({}, "nothing logged yet", "step")]
    sheet = beside(panels)
    atomic_write(path, lambda temporary: sheet.save(temporary, format="PNG"))


def plot(args: argparse.Namespace) -> None:
    check_file(args.out, ".png")
    names = [path.resolve().parent.name for path in args.logs]
    if len(set(names)) < len(names):  # two folders of one name
        names = [str(path) for path in args.logs]
    logs = {name: read_log(path) for name, path in zip(names, args.logs, strict=True)}
    curves(logs, args.out)
    print(f"wrote {args.out}")


def main(words: list[str] | None = None) -> int:
    parser = Parser("training.plot", description="Draw what runs logged, one panel per number.")
    parser.add_argument("logs", nargs="+", type=Path, metavar="log.jsonl",
                        help="one or more, named by their folders")
    parser.add_argument("--out", type=Path, default=Path("curves.png"),
                        help="PNG to write (default: %(default)s)")
    return command("training.plot", lambda: plot(parser.parse_args(words)))


if __name__ == "__main__":
    sys.exit(main())
