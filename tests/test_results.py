"""The tables say what the records say: paired, with the right intervals, and nothing twice.

Made-up records; the intervals are worked out by hand. Hardware: CPU, a second.
Run: python -m pytest tests/test_results.py
"""

import math
import platform

import pytest

from study import results
from study.results import cell, over_seeds


def record(values=(0.5,), part="default", seconds=(3600, 360), **scores):
    """A result with one score per clip, "similarity", and others for the whole set."""
    shared = {"steps": 8, "batch": 2, "people": len(values), "recipe": {"placement": "tass"}}
    return {"arguments": shared | {"part": part}, "chance": {"pose": 0.25},
            "seconds": dict(zip(("training", "scoring"), seconds, strict=True)),
            "clips": {"similarity": list(values)},
            "scores": {"similarity": sum(values) / len(values), "prompt": 0.75} | scores}


# Differences of 0.10, 0.11, 0.12 over three seeds: t = 4.303, s = 0.01, half width 0.0248. The
# seeds themselves are far apart: unpaired, nothing would show.
BASE = {seed: record([level], pose=level) for seed, level in enumerate((0.2, 0.5, 0.8))}
NEAR = {seed: record([level + d], pose=level)
        for seed, (level, d) in enumerate(((0.2, 0.10), (0.5, 0.11), (0.8, 0.12)))}


def cells(lines):
    return [[text.strip() for text in line.strip("|").split("|")] for line in lines]


def test_a_difference_counts_the_clips_that_both_have_or_else_the_whole_sets():
    a, b = record(pose=0.3), record(pose=0.1)
    a["clips"]["similarity"], b["clips"]["similarity"] = [0.9, None, 0.5], [0.5, 0.7, 0.2]
    assert math.isclose(results.difference(a, b, "similarity"), (0.4 + 0.3) / 2)
    assert math.isclose(results.difference(a, b, "pose"), 0.2)
    assert results.difference(a, b, "frechet") is None


def test_differences_are_paired_by_seed_and_bold_when_the_interval_excludes_0():
    lines, tested, marked = results.comparison({"near": NEAR, "far": {}}, BASE,
                                               ("similarity", "pose", "drift"))
    assert cells(lines)[0] == ["clips", "seeds", "similarity", "pose", "drift"]
    assert cells(lines)[2:] == [
        ["chance", "", "", "0.250", ""], ["default", "3", "0.500 ± 0.745", "0.500 ± 0.745", ""],
        ["near", "3", "0.610 ± 0.770", "0.500 ± 0.745", ""],
        ["near - default", "3", "**+0.110 ± 0.025**", "+0.000 ± 0.000", ""],
        ["far", "not run", "", "", ""]]
    assert (tested, marked) == (2, 1)
    lines, tested, _ = results.comparison({"near": {0: NEAR[0], 7: NEAR[1]}}, BASE, ("similarity",))
    assert lines[-1] == "| near - default | 1 | +0.100 |" and tested == 0, "one seed: no interval"


def test_the_overview_has_a_row_for_each_variant_with_its_mean_and_its_paired_difference():
    parts = {"augment": {"near": NEAR, "not_run": {}}, "guidance": {"else": {7: NEAR[0]}}}
    rows = [row[:3] for row in cells(results.overview(parts, BASE))]
    assert rows[0] == ["variant", "seeds", "similarity"]
    assert rows[2:] == [["default", "3", "0.500 ± 0.745"],
                        ["near", "3", "0.610 (**+0.110 ± 0.025**)"], ["else", "1", "0.300"]]


def test_cells_are_percent_or_three_digits_with_their_interval_and_a_dash_for_nothing():
    assert cell("top1", 0.9531, 0.0212) == "95.3 ± 2.1 %" and cell("top1", 1 / 256) == "0.4 %"
    assert cell("similarity", 0.8626, 0.0071) == "0.863 ± 0.007"
    assert cell("drift", -0.01, math.nan) == "-0.010"
    assert cell("leak_scene", math.nan, math.nan) == cell("frechet", None) == "–"
    assert over_seeds("flicker", [0.0123]) == ("0.0123", False), "one seed excludes nothing"
    assert over_seeds("drift", [None]) == ("", False)
    assert over_seeds("drift", [0.1, 0.3, 0.2], "+") == ("+0.200 ± 0.248", False)
    assert over_seeds("drift", [-0.2, -0.21]) == ("-0.205 ± 0.064", True), "a fall is a change, too"


def test_the_grid_has_similarity_and_prompt_at_each_pair_of_scales(tmp_path):
    found = {(3.0, 0.0): record([0.0]), (1.0, 2.0): record([0.3], prompt=0.875)}
    rows = cells(results.grid(found, tmp_path / "grid.png"))
    assert rows[0] == ["text scale", "reference scale 0", "reference scale 2"]
    assert rows[2:] == [["1", "not run", "0.300 / 87.5 %"], ["3", "0.000 / 75.0 %", "not run"]]
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_hours_are_summed_by_part_and_all_together():
    lines = results.compute({"default": [record(), record()],
                             "guidance": [record(seconds=(0, 180))]})
    assert cells(lines)[2:] == [["default", "2", "2.00", "0.20"], ["guidance", "1", "0.00", "0.05"],
                                ["all", "3", "2.00", "0.25"]]


def test_a_folder_begun_with_other_settings_is_refused(tmp_path):
    path = tmp_path / "settings.json"
    assert results.keep_settings(path, {"steps": 8}) == results.keep_settings(path, {"steps": 8})
    with pytest.raises(ValueError, match="expected steps = 8, .* got 9; keep the old one"):
        results.keep_settings(path, {"steps": 9})


def test_a_report_without_the_default_is_refused():
    with pytest.raises(ValueError, match="expected a result of the default"):
        results.report({"placement": {"overlap": NEAR}}, {})


def test_the_processor_is_named_as_the_machine_names_it(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9R45\nmodel name\t: x\n")
    monkeypatch.setattr(results, "Path", lambda _: info)
    assert results.processor() == "AMD EPYC 9R45"
    info.unlink()
    assert results.processor() == (platform.processor() or platform.machine())
