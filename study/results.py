"""Results of runs as JSON files, and the tables and the picture that are made from them alone.

A number typed by hand into a table is wrong sooner or later, and nobody can tell which run it came from. Here every
finished run is one file, and everything that is shown is computed from files.

Two runs with the same people, prompts and noise differ by much less than either's own spread. So a variant is compared
with the default seed by seed and, within a seed, clip by clip: what both share falls out, and the interval is that of
the difference.

Source: no part of ST-DRC (arXiv 2606.02441). Conventions: a record has "scores" (name -> mean, or value of the whole
set), "clips" (name -> one number per clip), "chance" (name -> level), "seconds"; null = does not apply. Intervals are
95 %, over seeds, Student's t; one seed has none.

    lines, tested, marked = comparison({"overlap": {0: a, 1: b}}, base={0: c, 1: d}, columns=("similarity", "top1"))

Read next: exercises.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.files import atomic_write, read_json, write_json
from study import scores
from training import plot

FACTORS = ("action", "scene", "light", "shirt")
LEAKS = ("leak_scene", "leak_light", "leak_shirt")
COLUMNS = (("similarity", "top1", "look_alike", "found", "min_frame", "drift", "frechet"),
           (*FACTORS, *LEAKS, "pose", "position", "pixels", "flicker"))
OVERVIEW = ("similarity", "top1", "look_alike", "action", "pose", "position", "pixels")
SHARES = {"top1", "look_alike", "found", "prompt", *FACTORS, *LEAKS}  # printed in percent
Records = dict[int, dict]  # seed -> record


def number(value: float) -> float | None:
    """For JSON, which knows no NaN: six digits, or None."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def keep_settings(path: Path, settings: dict) -> dict:
    """Note what all results beside `path` share, or compare it with what was noted. Raises ValueError if it differs."""
    before = read_json(path) if path.exists() else settings
    for key in (key for key in settings if before.get(key) != settings[key]):
        raise ValueError(f"expected {key} = {before.get(key)}, with which {path} was begun, got {settings[key]}; "
                         "keep the old one, or choose another --folder")
    if not path.exists():
        write_json(path, settings, indent=1)
    return settings


def difference(a: dict, b: dict, name: str) -> float | None:
    """a - b: mean over the clips that have the score in both, or of the whole sets; None if nothing can be compared."""
    mine, other = ([record["scores"].get(name)] for record in (a, b))
    if name in a["clips"] and name in b["clips"]:
        mine, other = a["clips"][name], b["clips"][name]
    found = [x - y for x, y in zip(mine, other, strict=True) if x is not None and y is not None]
    return math.fsum(found) / len(found) if found else None


def text(name: str, values: Sequence[float | None], sign: str = "") -> tuple[str, bool]:
    """Values over seeds -> ("mean ± half width", whether the interval excludes 0, which one value never does)."""
    values = [value for value in values if value is not None]
    if not values:
        return "", False
    mean, half = scores.mean_interval(values) if len(values) > 1 else (values[0], math.nan)
    factor, digits, unit = (100, 1, " %") if name in SHARES else (1, 4 if name == "flicker" else 3, "")
    spread = "" if math.isnan(half) else f" ± {factor * half:.{digits}f}"
    return f"{factor * mean:{sign}.{digits}f}{spread}{unit}", abs(mean) > half


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def comparison(rows: dict[str, Records], base: Records, columns: Sequence[str]) -> tuple[list[str], int, int]:
    """Markdown: chance, the default, then each variant, and below it its difference to the default, paired by seed.

    Differences whose interval excludes 0 are bold. Returns the lines, how many differences have an interval, and how
    many of these are bold: one in twenty would be without any effect.
    """
    def row(label: str, values: list[list]) -> list[str]:
        return [label, str(len(values[0])), *(text(name, v)[0] for name, v in zip(columns, values, strict=True))]
    levels = [[r["chance"].get(name) for r in base.values()] for name in columns]
    means = [sum(v) / len(v) if v and None not in v else None for v in levels]
    out, tested, marked = [["chance", "", *(text(n, [m])[0] for n, m in zip(columns, means, strict=True))]], 0, 0
    for label, records in {"default": base, **rows}.items():
        if not records:
            out.append([label, "not run", *[""] * len(columns)])
            continue
        out.append(row(label, [[r["scores"].get(name) for r in records.values()] for name in columns]))
        both = [(records[seed], base[seed]) for seed in records if seed in base]
        if records is base or not both:
            continue
        cells = [text(name, [difference(*pair, name) for pair in both], "+") for name in columns]
        out.append([f"{label} - default", str(len(both)), *(f"**{c}**" if bold else c for c, bold in cells)])
        tested += sum("±" in cell for cell, _ in cells)
        marked += sum(bold for _, bold in cells)
    return markdown(["clips", "seeds", *(name.replace("_", " ") for name in columns)], out), tested, marked


def overview(parts: dict[str, dict[str, Records]], base: Records) -> list[str]:
    """Markdown, one row for each variant of every part: mean (difference to the default ± interval, bold as above)."""
    def cells(records: Records) -> Iterator[str]:
        both = [(records[seed], base[seed]) for seed in records if seed in base]
        for name in OVERVIEW:
            mean = text(name, [r["scores"].get(name) for r in records.values()])[0].split(" ±")[0].removesuffix(" %")
            apart, bold = text(name, [difference(*pair, name) for pair in both], "+")
            apart = f"{'**' * bold}{apart.removesuffix(' %')}{'**' * bold}"
            yield f"{mean} ({apart})" if apart else mean
    plain = [text(name, [r["scores"].get(name) for r in base.values()])[0].removesuffix(" %") for name in OVERVIEW]
    rows = [["default", str(len(base)), *plain]]
    rows += [[label.replace("_", " "), str(len(records)), *cells(records)]
             for variants in parts.values() for label, records in variants.items() if records]
    names = (name.replace("_", " ") + (", %" if name in SHARES else "") for name in OVERVIEW)
    return markdown(["variant", "seeds", *names], rows)


def report(parts: dict[str, dict[str, Records]], base: Records) -> list[str]:
    """part -> row -> records: what all runs share, two tables for each part, how many differences are bold."""
    if not base:
        raise ValueError("expected a result of the default to compare with, got none; run `ablate.py run` first")
    shared = next(iter(base.values()))["arguments"]
    recipe = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shared["recipe"].items())
    lines = [f"{shared['steps']} steps of {shared['batch']} clips, {shared['people']} validation people; "
             "mean ± 95 % interval over seeds; differences of shares in points, bold: the interval excludes 0.", "",
             f"Default: {recipe}.", "", "## overview: mean (difference to the default)", "",
             *overview(parts, base), ""]
    tested = marked = 0
    for part, rows in parts.items():
        for columns in COLUMNS:
            found, more, bold = comparison(rows, base, columns)
            lines += [f"## {part.replace('_', ' ')}", "", *found, ""]
            tested, marked = tested + more, marked + bold
    return [*lines, f"{marked} of {tested} differences are bold; without any effect {tested / 20:.0f} would be.", ""]


def grid(records: dict[tuple[float, float], dict], path: Path) -> list[str]:
    """(text scale, reference scale) -> record: writes the picture, returns a table of similarity / prompt accuracy."""
    found = {at: (100 * r["scores"]["prompt"], r["scores"]["similarity"]) for at, r in records.items()}
    texts, refs = (sorted({at[i] for at in found}) for i in (0, 1))
    points = {t: [found[t, r] for r in refs if (t, r) in found] for t in texts}
    note = f"prompt accuracy in %; along a line the reference scale goes {', '.join(f'{r:g}' for r in refs)}"
    picture = plot.chart({f"text scale {t:g}": tuple(zip(*at, strict=True)) for t, at in points.items()},
                         "similarity to the reference, by prompt accuracy", note, 640, 420)
    atomic_write(path, lambda beside: picture.save(beside, format="PNG"))
    return markdown(["text scale", *(f"reference scale {r:g}" for r in refs)],
                    [[f"{t:g}", *(f"{found[t, r][1]:.3f} / {found[t, r][0]:.1f} %" if (t, r) in found else "not run"
                                  for r in refs)] for t in texts])


def compute(parts: dict[str, list[dict]]) -> list[str]:
    """What the results of each part cost, and all together, as a table: part -> records."""
    rows = [(part, len(found), *(sum(r["seconds"][kind] for r in found) / 3600 for kind in ("training", "scoring")))
            for part, found in parts.items()]
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    return markdown(["part", "results", "training", "scoring"],
                    [[part, str(n), f"{training:.2f}", f"{scoring:.2f}"] for part, n, training, scoring in rows])
