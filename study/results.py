"""Results of runs as JSON files; the tables and the picture that are made from them alone.

The idea. A number typed by hand into a table is wrong sooner or later, and nobody can tell which
run it came from. Here every finished run is one file, and all that is shown is computed from files.

Two runs with the same people, prompts and noise differ by much less than either's own spread. So a
variant is compared with the default seed by seed and, within a seed, clip by clip: what both share
falls out, and the interval is that of the difference.

our reading: all of it; ST-DRC (arXiv 2606.02441) publishes no such table. Conventions: a record has
"scores" (name -> mean, or value of the whole set), "clips" (name -> one number per clip), "chance"
(name -> level), "seconds"; null = does not apply. Intervals are 95 %, over seeds, Student's t; one
seed has none.

    lines, tested, marked = comparison({"overlap": {0: a, 1: b}}, {0: c, 1: d}, ("similarity",))

Read next: study/ablate.py
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path

from common.files import atomic_write, read_json, write_json
from study import scores
from training import plot

FACTORS = ("action", "scene", "light", "shirt")
LEAKS = ("leak_scene", "leak_light", "leak_shirt")
COLUMNS = (("similarity", "top1", "look_alike", "found", "min_frame", "drift", "frechet"),
           (*FACTORS, *LEAKS, "pose", "position", "pixels", "flicker"))
OVERVIEW = ("similarity", "top1", "look_alike", "action", "pose", "position", "pixels")
SHARES = {"top1", "look_alike", "found", "prompt", *FACTORS, *LEAKS, "traits_top1", "eyes",
          "ref_scene", "ref_light", "ref_shirt"}  # printed in percent
Records = dict[int, dict]  # seed -> record


def number(value: float) -> float | None:
    """For JSON, which knows no NaN: six digits, or None."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def processor() -> str:
    """What this machine calls its processor; figures of a CPU mean little without it."""
    info = Path("/proc/cpuinfo")  # Linux
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def keep_settings(path: Path, settings: dict, files: Sequence[str] = ()) -> dict:
    """Note what all results of a folder share, or raise ValueError if another was noted before.
    files: settings that are hashes of files."""
    before = read_json(path) if path.exists() else settings
    for key in settings:
        if before.get(key) != settings[key]:
            name = f"--{key.replace('_', '-')}"
            was, now, keep = ((f"the file for {name}", "other content", "give that file")
                              if key in files else
                              (f"{key} = {before.get(key)}", settings[key], "keep the old one"))
            raise ValueError(f"expected {was}, with which {path} was begun, got {now}; {keep}, or "
                             "choose another --folder")
    if not path.exists():
        write_json(path, settings, indent=1)
    return settings


# ------------------------------------------------------------ one cell


def cell(name: str, mean: float | None, half: float | None = None, sign: str = "",
         digits: int = 3) -> str:
    """A score with the half width of its interval, shares in percent; a dash if there is none."""
    if mean is None or math.isnan(mean):
        return "–"
    factor, digits, unit = (100, 1, " %") if name in SHARES else (1, digits, "")
    spread = "" if half is None or math.isnan(half) else f" ± {factor * half:.{digits}f}"
    return f"{factor * mean:{sign}.{digits}f}{spread}{unit}"


def over_seeds(name: str, values: Sequence[float | None], sign: str = "") -> tuple[str, bool]:
    """A score of several seeds as a cell, "" for none; whether its interval excludes 0.

    One value has no interval, and excludes nothing.
    """
    values = [value for value in values if value is not None]
    if not values:
        return "", False
    mean, half = scores.mean_interval(values)
    return cell(name, mean, half, sign, 4 if name == "flicker" else 3), abs(mean) > half


def difference(a: dict, b: dict, name: str) -> float | None:
    """a - b: mean over the clips that have the score in both, or of the whole sets; or None."""
    mine, other = ([record["scores"].get(name)] for record in (a, b))
    if name in a["clips"] and name in b["clips"]:
        mine, other = a["clips"][name], b["clips"][name]
    found = [x - y for x, y in zip(mine, other, strict=True) if x is not None and y is not None]
    return math.fsum(found) / len(found) if found else None


def differences(records: Records, base: Records, name: str) -> list[float | None]:
    """`difference` for every seed that both have."""
    return [difference(records[seed], base[seed], name) for seed in records if seed in base]


def of_seeds(records: Records, name: str, key: str = "scores") -> list[float | None]:
    return [record[key].get(name) for record in records.values()]


# ------------------------------------------------------------ tables


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def comparison(rows: dict[str, Records], base: Records,
               columns: Sequence[str]) -> tuple[list[str], int, int]:
    """Markdown: chance, the default, then each variant and its difference to the default.

    Differences are paired by seed; bold if the interval excludes 0. Returns the lines, how many
    differences have an interval, and how many of these are bold: without any effect one in twenty.
    """
    levels = [of_seeds(base, name, "chance") for name in columns]
    means = [sum(v) / len(v) if None not in v else None for v in levels]
    out = [["chance", "", *(over_seeds(n, [m])[0] for n, m in zip(columns, means, strict=True))]]
    tested = marked = 0
    for label, records in {"default": base, **rows}.items():
        if not records:
            out.append([label, "not run", *[""] * len(columns)])
            continue
        values = (over_seeds(name, of_seeds(records, name))[0] for name in columns)
        out.append([label, str(len(records)), *values])
        both = len(records.keys() & base.keys())
        if records is not base and both:
            found = [over_seeds(n, differences(records, base, n), "+") for n in columns]
            cells = (f"**{text}**" if bold else text for text, bold in found)
            out.append([f"{label} - default", str(both), *cells])
            tested += sum("±" in text for text, _ in found)
            marked += sum(bold for _, bold in found)
    head = ["clips", "seeds", *(name.replace("_", " ") for name in columns)]
    return markdown(head, out), tested, marked


def overview(parts: dict[str, dict[str, Records]], base: Records) -> list[str]:
    """Markdown, a row for each variant: mean (difference to the default ± interval)."""
    def bare(text: str) -> str:
        return text.removesuffix(" %")  # the head of the column says it

    def both(records: Records, name: str) -> str:
        mean = over_seeds(name, of_seeds(records, name))[0].split(" ±")[0]
        apart, bold = over_seeds(name, differences(records, base, name), "+")
        mark = "**" * bold
        return f"{bare(mean)} ({mark}{bare(apart)}{mark})" if apart else bare(mean)
    plain = (bare(over_seeds(name, of_seeds(base, name))[0]) for name in OVERVIEW)
    rows = [["default", str(len(base)), *plain]]
    rows += [[label.replace("_", " "), str(len(records)), *(both(records, n) for n in OVERVIEW)]
             for variants in parts.values() for label, records in variants.items() if records]
    names = (name.replace("_", " ") + (", %" if name in SHARES else "") for name in OVERVIEW)
    return markdown(["variant", "seeds", *names], rows)


def report(parts: dict[str, dict[str, Records]], base: Records) -> list[str]:
    """part -> row -> records: what all runs share, the overview, two tables for each part."""
    if not base:
        raise ValueError("expected a result of the default to compare with, got none; "
                         "run `python -m study.ablate run` first")
    shared = next(iter(base.values()))["arguments"]
    recipe = ", ".join(f"{name.replace('_', ' ')} {v}" for name, v in shared["recipe"].items())
    lines = [f"{shared['steps']} steps of {shared['batch']} clips, {shared['people']} validation "
             "people; mean ± 95 % interval over seeds; differences of shares in points, "
             "bold: the interval excludes 0.", "", f"Default: {recipe}.", "",
             "## overview: mean (difference to the default)", "", *overview(parts, base), ""]
    tested = marked = 0
    for part, rows in parts.items():
        for columns in COLUMNS:
            found, more, bold = comparison(rows, base, columns)
            lines += [f"## {part.replace('_', ' ')}", "", *found, ""]
            tested, marked = tested + more, marked + bold
    return [*lines, f"{marked} of {tested} differences are bold; "
                    f"without any effect {tested / 20:.0f} would be.", ""]


def grid(records: dict[tuple[float, float], dict], path: Path) -> list[str]:
    """(text scale, reference scale) -> record: draws `path`; a table of similarity / prompt."""
    found = {at: (100 * r["scores"]["prompt"], r["scores"]["similarity"])
             for at, r in records.items()}
    texts, refs = (sorted({at[i] for at in found}) for i in (0, 1))
    lines = {f"text scale {t:g}": [found[t, r] for r in refs if (t, r) in found] for t in texts}
    picture = plot.chart({name: tuple(zip(*points, strict=True)) for name, points in lines.items()},
                         "similarity to the reference, by prompt accuracy",
                         "prompt accuracy in %; along a line the reference scale goes "
                         + ", ".join(f"{r:g}" for r in refs), 640, 420)
    atomic_write(path, lambda p: picture.save(p, format="PNG"))

    def entry(at: tuple[float, float]) -> str:
        return f"{found[at][1]:.3f} / {found[at][0]:.1f} %" if at in found else "not run"
    return markdown(["text scale", *(f"reference scale {r:g}" for r in refs)],
                    [[f"{t:g}", *(entry((t, r)) for r in refs)] for t in texts])


def compute(parts: dict[str, list[dict]]) -> list[str]:
    """Hours that the results of each part took, and of all together, as a table."""
    parts = parts | {"all": [record for found in parts.values() for record in found]}
    rows = [[part, str(len(found)), *(f"{sum(r['seconds'][kind] for r in found) / 3600:.2f}"
                                      for kind in ("training", "scoring"))]
            for part, found in parts.items()]
    return markdown(["part", "results", "training", "scoring"], rows)
