"""Learning curves and scales of guidance: what is run, in which order, and what the rule chooses.

Trainings are stand-ins here, train.py's own parser reads the real flags; scores are those of
tests/test_scores.py and tests/test_traits.py. Hardware: CPU, seconds.
Run: python -m pytest tests/test_curves.py
"""

import json
import subprocess

import torch
from PIL import Image

import train
from common.files import write_json
from study import curves, estimates, evaluate, scales, scores
from study.evaluate import test_set as draw_test_set
from study.results import processor


def scored(value: float) -> dict:
    return dict.fromkeys(curves.IDENTITY + curves.COPIED, value)


# ------------------------------------------------------------ learning curves


def test_every_variant_reaches_a_mark_before_any_goes_on_and_finished_ones_stay(
        tmp_path, monkeypatch, capsys):
    began = []
    monkeypatch.setattr(curves, "train_to", lambda args, *task: began.append(task))
    monkeypatch.setattr(curves, "score", lambda weights, args: scored(0.5))
    line = ["run", "--folder", str(tmp_path), "--variants", "tass", "overlap", "--seeds", "3", "4",
            "--marks", "20", "10"]
    assert curves.main(line) == 0
    assert began == [(variant, seed, mark) for mark in (10, 20) for seed in (3, 4)
                     for variant in ("tass", "overlap")]
    record = json.loads((tmp_path / "overlap" / "seed-4-steps-20.json").read_text())
    assert record["processor"] == processor() != "" and record["scores"]["shape"] == 0.5
    (tmp_path / "tass" / "seed-3-steps-10.json").unlink()
    began.clear()
    assert curves.main(line) == 0 and began == [("tass", 3, 10)]
    capsys.readouterr()
    assert curves.main([*line, "--batch", "4"]) == 2, "other settings are another folder"
    assert "expected batch = 8, with which" in capsys.readouterr().err


def test_train_py_reads_the_flags_and_goes_on_from_the_last_mark(tmp_path, monkeypatch):
    lines = []

    def ended(line, **_):
        lines.append(train.parse_arguments(line[2:]))
        return subprocess.CompletedProcess(line, 0)
    monkeypatch.setattr(curves.subprocess, "run", ended)
    args = curves.parse_arguments(["run", "--folder", str(tmp_path)])
    for mark in (100, 200):
        for variant in curves.VARIANTS:
            curves.train_to(args, variant, 7, mark)
    found = dict(zip(curves.VARIANTS, lines, strict=False))
    changed = {name: {k for k, v in vars(a).items() if v != vars(found["tass"])[k]} - {"out"}
               for name, a in found.items()}
    augment = {"augment_color", "augment_pose", "augment_layout"}
    assert changed == {"tass": set(), "no_augment": augment} | dict.fromkeys(
        ("overlap", "time_only", "space_only", "overlap_phase"), {"placement"}) | dict.fromkeys(
        ("noise_0.15", "noise_0.3"), augment | {"noise_ref"})
    first, again = lines[0], lines[len(found)]
    assert (first.steps, again.steps, first.out) == (100, 200, again.out), "it is resumed"
    assert (train.rate(first, 99), train.rate(again, 150)) == (1.0, 1.0), "the rate never falls"
    assert first.seed == 7 and first.w_id == 0 and first.same_setting == 0.5


def test_a_training_that_fails_is_one_line_with_the_reason(tmp_path, capsys):
    line = ["run", "--folder", str(tmp_path), "--variants", "tass", "--seeds", "0", "--marks", "1",
            "--checkpoint-path", str(tmp_path / "none.safetensors")]
    assert curves.main(line) == 2
    told = capsys.readouterr().err.replace("\r", "\n").splitlines()[-1]
    assert told.startswith("study.curves: error: expected a training that ends, got status 2 from ")
    assert "none.safetensors" in told and told.endswith("; the same command tries again")


def test_the_table_has_means_and_intervals_over_seeds_and_a_picture(tmp_path, capsys):
    for seed, value in enumerate((0.1, 0.2, 0.3)):
        write_json(tmp_path / "tass" / f"seed-{seed}-steps-10.json", {
            "arguments": {"steps": 10}, "scores": scored(value) | {"pose": None},
            "seconds": {"training": 1800, "scoring": 600}})
    assert curves.main(["table", "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "| tass | 10 | 3 | 0.200 ± 0.248 |" in told, "4.303 * 0.1 / sqrt(3)"
    assert "2.00 hours" in told and told == (tmp_path / "curves.md").read_text()
    with Image.open(tmp_path / "curves.png") as sheet:
        assert sheet.size == (960, 900)
    assert curves.main(["table", "--folder", str(tmp_path / "empty")]) == 2


def test_one_mark_is_no_curve(monkeypatch):
    drawn = []

    def chart(lines, *_, **__):
        drawn.append(list(lines))
        return Image.new("RGB", (4, 3))
    monkeypatch.setattr(curves.plot, "chart", chart)
    point, longer = {10: [scored(0.1)]}, {10: [scored(0.1)], 20: [scored(0.2)]}
    curves.draw({"tass": longer, "overlap": point}, ["shape"])
    curves.draw({"overlap": point}, ["shape"])
    assert drawn == [["tass"], ["overlap"]], "alone it is better than nothing"


# ------------------------------------------------------------ scales


def setting(order: str, text: float, prompt: float, shape: float, position: float) -> dict:
    return {"order": order, "text_scale": text, "ref_scale": 1.0, "seconds": 36.0,
            "processor": "x", "scores": scored(0.5) | {"prompt": prompt, "shape": shape,
                                                       "position": position}}


def test_the_rule_takes_the_best_face_among_those_that_follow_and_do_not_copy():
    a = setting("text_first", 1.0, 0.99, 0.4, 0.1)
    deaf = setting("text_first", 2.0, 0.97, 0.9, 0.1)
    copies = setting("text_first", 3.0, 0.985, 0.8, 0.21)
    b = setting("two_deltas", 1.0, 0.985, 0.5, 0.2)
    assert scales.choose([a, deaf, copies, b]) is b
    assert scales.choose([deaf | {"scores": deaf["scores"] | {"position": 0.5}}, copies]) is copies
    curve = scales.front([a, deaf, copies, b], "shape")
    assert curve == ([97.0, 98.5, 99.0], [0.9, 0.8, 0.4])


def test_each_setting_is_scored_over_seeds_once_and_drawn(tmp_path, monkeypatch, capsys):
    asked = []

    def generate(m, captions, references, how, name):
        asked.append((how.order, how.text_scale, how.ref_scale, how.seed))
        return draw_test_set(3, 1, 64, 9, "val")["true"]
    monkeypatch.setattr(scales, "generate", generate)
    monkeypatch.setattr(scales, "TEXTS", (1.0, 2.0))
    monkeypatch.setattr(scales, "REFS", (3.0,))
    line = ["run", "--people", "3", "--seeds", "5", "6", "--folder", str(tmp_path),
            "--orders", "two_deltas"]
    assert scales.main(line) == 0
    assert asked == [("two_deltas", text, 3.0, seed) for text in (1.0, 2.0) for seed in (5, 6)]
    assert scales.main(line) == 0 and len(asked) == 4
    record = json.loads((tmp_path / "two_deltas-text-2-ref-3.json").read_text())
    found = record["scores"]
    assert found["prompt"] == 1 and found["similarity"] > 0.9 and found["traits_top1"] > 0.6
    assert record["processor"] == processor()
    capsys.readouterr()
    assert scales.main(["table", "--folder", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "Of all: **two_deltas, text " in told and "| two_deltas, text 2, reference 3 | 100.0 %" \
        in told
    with Image.open(tmp_path / "scales.png") as picture:
        assert picture.size == (960, 300)


def test_the_measured_clips_are_those_of_the_references_own_people():
    """Repeated people keep their rows: swapped ones lose the identity."""
    data = draw_test_set(4, 1, 64, 9, "val")
    args = curves.parse_arguments(["run"])
    found = curves.measure(data["true"], data, *curves.load_judges(args))
    assert found["traits_top1"] == 1 and found["prompt"] == 1 and found["similarity"] > 0.9
    nets, reader = curves.load_judges(args)
    whole = scores.face_scores(data["true"], data, reader)[1]
    assert found["shape"] == whole["eight"] != whole["shape"]
    other = curves.measure(data["true"], evaluate.with_person(data, (data["who"] + 1) % 4),
                           nets, reader)
    assert other["traits_top1"] == 0 and other["similarity"] < 0.5
    assert torch.isfinite(torch.tensor(found["ref_pixels"]))




def test_an_estimate_from_little_noise_is_the_clip_and_from_noise_alone_the_references_person():
    m = evaluate.Models(evaluate.TINY / "model.safetensors", evaluate.TINY / "gemma")
    data = draw_test_set(6, 1, 64, 9, "val")
    with torch.no_grad():
        coded = m.vae.decode(m.vae.encode(data["true"])).clamp(-1, 1)
    near = estimates.estimate(m, data, 0.02, True)
    assert (near - coded).abs().mean() < 0.02
    far = {shown: estimates.estimate(m, data, 1.0, shown) for shown in (True, False)}
    reader = curves.load_judges(curves.parse_arguments(["run"]))[1]
    read = {shown: scores.face_scores(video, data, reader)[1] for shown, video in far.items()}
    assert read[True]["attributes"] > read[False]["attributes"] + 0.3, read


def test_estimates_are_a_table_of_both_for_each_level(monkeypatch, capsys):
    asked = []

    def estimate(m, data, sigma, shown):
        asked.append((sigma, shown))
        return data["true"]
    monkeypatch.setattr(estimates, "estimate", estimate)
    assert estimates.main(["--people", "4", "--sigmas", "0.5", "0.9"]) == 0
    assert asked == [(0.5, True), (0.5, False), (0.9, True), (0.9, False)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| noise level | shape | shape, no reference |")
    assert lines[3].startswith("| 0.9 | 0.") and len(lines) == 4
    assert estimates.main(["--sigmas", "1.5"]) == 2
