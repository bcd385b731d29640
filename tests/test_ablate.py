"""Ablations: which runs there are, that they survive stops and failures, and that the tables say what the files say.

Children that would train for minutes are small stand-ins here; train.py's own parser reads the real flags, and the last
test scores the bundled weights on three people. Made-up records have intervals worked out by hand.

Hardware: CPU, about 12 seconds. Run: python -m pytest tests/test_ablate.py
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from guidance import stream_weights
from rope import PLACEMENTS
from study import ablate, results

ROOT = Path(ablate.__file__).resolve().parent
TINY = ROOT / "weights" / "tiny"
PARTS, SEEDS = list(ablate.PARTS), [0, 1, 2]


@pytest.fixture
def networks(tmp_path):
    """Files for the flags that name files; the stand-ins never read them."""
    flags = []
    for name in ("checkpoint-path", "face", "eval_encoder", "head"):
        (tmp_path / name).write_text(name)
        flags += [f"--{name}", str(tmp_path / name)]
    return [*flags, "--folder", str(tmp_path / "out")]


def record(values=(0.5,), part="default", seconds=(3600, 360), **scores):
    """A result with one score per clip, "similarity", and others for the whole set."""
    return {"arguments": {"steps": 8, "batch": 2, "people": len(values), "part": part, "recipe": {"placement": "tass"}},
            "chance": {"pose": 0.25},
            "seconds": dict(zip(("training", "scoring"), seconds, strict=True)), "clips": {"similarity": list(values)},
            "scores": {"similarity": sum(values) / len(values), "prompt": 0.75} | scores}


# -------------------------------------------------------------------------------------------------- what there is to do


def test_the_plan_has_12_trainings_per_seed_each_once_and_guidance_shares_the_defaults_weights():
    tasks = ablate.plan(PARTS, SEEDS)
    trained = [t for t in tasks if t.part != "guidance"]
    assert len(trained) == 36 and len({t.variant for t in trained}) == 12
    assert len({t.result(Path("x")) for t in tasks}) == len(tasks) == 64
    assert [trained[a].variant for a in (0, 12, 24)] == ["default"] * 3, "the first of its seed"
    guided = [t for t in tasks if t.part == "guidance"]
    assert {t.weights(Path("x")) for t in guided} == {t.weights(Path("x")) for t in trained if t.variant == "default"}
    assert {t.scales for t in guided if t.seed == 0} | {ablate.SCALES} == {*ablate.GRID, *ablate.GUIDED.values()}
    assert {t.scales for t in guided if t.seed == 2} == set(ablate.GUIDED.values()) and ablate.SCALES in ablate.GRID
    assert [t.variant for t in ablate.plan(["face_loss"], [5])] == ["default", "no_face_loss"]
    assert len(stream_weights(*ablate.GUIDED["one joint scale of 3"])) == 2, "both conditions against null"
    assert (True, False) not in stream_weights(*ablate.GUIDED["one joint scale of 3"])
    assert all(not ref for _, ref in stream_weights(*ablate.GUIDED["no reference"]))


def test_train_py_reads_the_flags_and_each_variant_changes_what_its_name_says(monkeypatch, tmp_path):
    args = ablate.parse_arguments(["run", "--folder", str(tmp_path), "--steps", "30"])
    read = {}
    for task in ablate.plan(PARTS, [4])[:12]:
        first, second = ablate.commands(task, args)
        monkeypatch.setattr(sys, "argv", first[1:])
        found = train.parse_arguments()
        train.check_numbers(found)
        assert Path(first[1]).name == "train.py" and second[2] == "score"
        assert found.out == task.weights(tmp_path).parent and (found.seed, found.steps) == (4, 30)
        read[task.variant] = vars(found)
    assert read["default"]["full"] and not read["default"]["gradient_checkpointing"]
    usual = read["default"]
    changed = {name: {k for k in found if found[k] != usual[k]} - {"out"} for name, found in read.items()}
    layout, pose, color = "augment_layout", "augment_pose", "augment_color"
    assert changed == {"default": set(), "overlap": {"placement"}, "time_only": {"placement"},
                       "space_only": {"placement"}, "no_augment": {layout, pose, color}, "color_only": {layout, pose},
                       "pose_only": {layout, color}, "layout_only": {pose, color}, "no_face_loss": {"w_face"},
                       "no_identity_loss": {"w_id"}, "overlap_no_augment": {"placement", layout, pose, color},
                       "no_reference_dropout": {"drop_ref", "drop_both", "drop_text"}}
    assert {found["placement"] for found in read.values()} <= set(PLACEMENTS)
    share = [read[v]["drop_text"] + read[v]["drop_both"] for v in ("default", "no_reference_dropout")]
    assert share[0] == share[1], "text is dropped as often"
    again = ablate.parse_arguments(second[2:])
    assert (again.variant, again.seed, again.steps, again.folder) == ("no_reference_dropout", 4, 30, tmp_path)


def test_what_is_trained_is_only_scored_again(tmp_path):
    args = ablate.parse_arguments(["run", "--folder", str(tmp_path)])
    task = ablate.plan(PARTS, [0])[0]
    assert len(ablate.commands(task, args)) == 2
    task.weights(tmp_path).parent.mkdir(parents=True)
    task.weights(tmp_path).touch()
    assert [line[2] for line in ablate.commands(task, args)] == ["score"]


# -------------------------------------------------------------------------------------------------------------- running

WRITE = """
import os, sys, time
path, text, needed = sys.argv[1:]
if needed and not os.path.exists(needed):
    sys.exit(f"{needed} is not there yet")
time.sleep(0 if needed else 0.2)  # a training takes longer
with open(path + ".part", "w") as file:
    file.write(text)
os.rename(path + ".part", path)
"""


def stand_in(began, broken=()):
    """ablate.commands whose children write a made-up result, or fail where the variant is in `broken`."""
    def commands(task, args):
        began.append((task.variant, task.seed))
        if task.variant in broken:
            return [[sys.executable, "-c", "print('no room'); raise SystemExit(3)"], ["never reached"]]
        path, needed = task.result(args.folder), ""
        if task.part == "guidance":
            needed = str(task.weights(args.folder).parent.with_suffix(".json"))
        return [[sys.executable, "-c", WRITE, str(path), json.dumps(record(part=task.part)), needed]]
    return commands


def test_finished_runs_are_not_repeated_and_what_was_lost_is(networks, tmp_path, monkeypatch, capsys):
    began, line = [], ["run", *networks, "--only", "placement", "guidance", "--seeds", "0", "1", "--jobs", "9"]
    monkeypatch.setattr(ablate, "commands", stand_in(began))
    assert ablate.main(line) == 0
    tasks = [(t.variant, t.seed) for t in ablate.plan(["placement", "guidance"], [0, 1])]
    assert sorted(began) == sorted(tasks) and len(tasks) == 8 + 24
    assert {name for name, _ in began[:8]} == {"default", "overlap", "time_only", "space_only"}, "guidance waits"
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("0 of 32 results") and len(told) == 33
    assert told[1].startswith("1 of 32: ") and told[1].endswith(" h left") and "finished" in told[1], told[1]
    assert told[-1].endswith("about 0.0 h left")
    began.clear()
    assert ablate.main(line) == 0 and began == []
    (tmp_path / "out" / "overlap" / "seed-1.json").unlink()
    assert ablate.main(line) == 0 and began == [("overlap", 1)]
    assert ablate.main([*line, "--steps", "9"]) == 2, "other settings are another folder"
    error = capsys.readouterr().err
    assert error.startswith("ablate.py: error: expected steps = 800") and error.count("\n") == 1
    (tmp_path / "head").write_text("another head")
    assert ablate.main(line) == 2 and "expected head = " in capsys.readouterr().err


def test_a_failed_child_is_reported_the_others_go_on_and_the_status_is_1(networks, tmp_path, monkeypatch, capsys):
    began, line = [], ["run", *networks, "--only", "placement", "--seeds", "0", "--jobs", "1"]
    monkeypatch.setattr(ablate, "commands", stand_in(began, broken=("default", "time_only")))
    assert ablate.main(line) == 1
    out, error = capsys.readouterr()
    assert "default seed 0 failed with status 3: no room" in out and "overlap seed 0 finished" in out
    assert error.startswith("failed: default seed 0, time_only seed 0;") and len(began) == 4
    assert "unknown time left" in out.splitlines()[1], "after a failure nobody knows how long a run takes"
    monkeypatch.setattr(ablate, "commands", stand_in(began))
    assert ablate.main(line) == 0 and began[4:] == [("default", 0), ("time_only", 0)]


# In a process of its own: children that note SIGTERM in a file, and take a moment to end, as a training does.
LONG = """
import signal, sys, time
sys.path.insert(0, {root!r})
from study import ablate
CHILD = '''
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("saved")
    raise SystemExit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1]).write_text("begun")
time.sleep(60)
'''
ablate.commands = lambda task, args: [[sys.executable, "-c", CHILD, str(task.result(args.folder).with_suffix(".note"))]]
sys.exit(ablate.main(sys.argv[1:]))
"""


def test_ctrl_c_and_the_end_of_the_time_stop_the_children_with_sigterm_and_wait(networks, tmp_path):
    for number, minutes, status, said in ((signal.SIGINT, 9, 130, "stopped; the same command goes on"),
                                          (None, 0.05, 0, "time is up, 4 results to go")):
        line = ["run", *networks, "--only", "placement", "--seeds", "0", "--minutes", str(minutes)]
        process = subprocess.Popen([sys.executable, "-c", LONG.format(root=str(ROOT)), *line], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        notes = [tmp_path / "out" / name / "seed-0.note" for name in ("default", "overlap")]
        while number and not all(path.exists() and path.read_text() for path in notes) and process.poll() is None:
            time.sleep(0.05)
        if number:
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == status and said in out, (process.returncode, out)
        assert [path.read_text() for path in notes] == ["saved", "saved"]
        assert not (tmp_path / "out" / "time_only" / "seed-0.note").exists(), "nothing new is begun"
        for path in notes:
            path.unlink()
    children = ablate.Children()
    children.stop()
    assert children.run([sys.executable, "-c", "raise SystemExit(0)"], tmp_path / "log"), "nothing is begun afterwards"


# --------------------------------------------------------------------------------------------------------------- tables


def test_differences_are_paired_by_clip_and_by_seed_and_bold_when_the_interval_excludes_0():
    a, b = record(pose=0.3), record(pose=0.1)
    a["clips"]["similarity"], b["clips"]["similarity"] = [0.9, None, 0.5], [0.5, 0.7, 0.2]
    assert math.isclose(results.difference(a, b, "similarity"), (0.4 + 0.3) / 2), "only clips that both have"
    assert math.isclose(results.difference(a, b, "pose"), 0.2) and results.difference(a, b, "frechet") is None
    # Differences 0.10, 0.11, 0.12 over three seeds: t = 4.303, s = 0.01, half width 4.303 * 0.01 / sqrt(3) = 0.0248.
    # The seeds themselves are far apart (0.2, 0.5, 0.8): unpaired, nothing would show.
    base = {seed: record([level], pose=level) for seed, level in enumerate((0.2, 0.5, 0.8))}
    near = {seed: record([level + d], pose=level) for seed, (level, d) in
            enumerate(((0.2, 0.10), (0.5, 0.11), (0.8, 0.12)))}
    lines, tested, marked = results.comparison({"near": near, "far": {}}, base, ("similarity", "pose", "drift"))
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["clips", "seeds", "similarity", "pose", "drift"]
    assert cells[2:] == [["chance", "", "", "0.250", ""], ["default", "3", "0.500 ± 0.745", "0.500 ± 0.745", ""],
                         ["near", "3", "0.610 ± 0.770", "0.500 ± 0.745", ""],
                         ["near - default", "3", "**+0.110 ± 0.025**", "+0.000 ± 0.000", ""],
                         ["far", "not run", "", "", ""]]
    assert (tested, marked) == (2, 1)
    wide = {seed: record([level + d]) for seed, (level, d) in enumerate(((0.2, 0.1), (0.5, 0.2), (0.8, 0.3)))}
    lines, _, marked = results.comparison({"wide": wide}, base, ("similarity",))  # half width 0.248 around 0.2
    assert "+0.200 ± 0.248" in lines[-1] and marked == 0
    lines, tested, _ = results.comparison({"near": {0: near[0], 7: near[1]}}, base, ("similarity",))
    assert lines[-1] == "| near - default | 1 | +0.100 |" and tested == 0, "one common seed: a number, no interval"


def test_the_overview_has_a_row_for_each_variant_with_its_mean_and_its_paired_difference():
    base = {seed: record([level]) for seed, level in enumerate((0.2, 0.5, 0.8))}
    near = {seed: record([level + d]) for seed, (level, d) in enumerate(((0.2, 0.10), (0.5, 0.11), (0.8, 0.12)))}
    lines = results.overview({"augment": {"near": near, "not_run": {}}, "guidance": {"else": {7: near[0]}}}, base)
    rows = [[c.strip() for c in line.strip("|").split("|")][:3] for line in lines]
    assert rows[0] == ["variant", "seeds", "similarity"] and "top1, %" in lines[0]
    assert rows[2:] == [["default", "3", "0.500 ± 0.745"], ["near", "3", "0.610 (**+0.110 ± 0.025**)"],
                        ["else", "1", "0.300"]]


def test_shares_are_percent_and_flicker_has_a_fourth_digit():
    assert results.text("top1", [0.5, 0.5])[0] == "50.0 ± 0.0 %"
    assert results.text("flicker", [0.0123])[0] == "0.0123" and results.text("drift", [-0.0123], "+")[0] == "-0.012"
    assert results.text("drift", [None]) == ("", False)
    assert results.text("drift", [0.1, 0.3, 0.2]) == ("0.200 ± 0.248", False)


def write(folder, variant, seed, found):
    path = folder / variant / f"seed-{seed}.json"
    results.write_json(path, found)
    return path


def test_the_table_comes_from_the_files_alone_and_names_what_is_missing(tmp_path, capsys):
    for seed in (0, 1):
        write(tmp_path, "default", seed, record([0.6]))
        write(tmp_path, "overlap", seed, record([0.5], "placement"))
    for variant, similarity in (("text-3-ref-0-text_first", 0.0), ("text-1-ref-2-text_first", 0.3)):
        write(tmp_path, variant, 0, record([similarity], "guidance", (0, 180), prompt=0.875))
    line = ["table", "--folder", str(tmp_path), "--only", "placement", "guidance", "--seeds", "0", "1"]
    assert ablate.main(line) == 0
    out = capsys.readouterr().out
    assert out.strip() == (tmp_path / "table.md").read_text().strip()
    for said in ("8 steps of 2 clips", "Default: placement tass.", "| overlap - default | 2 | **-0.100 ± 0.000** |",
                 "| time_only | not run |", "| no reference (2 streams) | 1 | 0.000 |",
                 "| reference first (3 streams) | not run |", "Missing: time_only seed 0, space_only seed 0, time_only",
                 "| text scale | reference scale 0 | reference scale 2 |", "| 1 | not run | 0.300 / 87.5 % |",
                 "| 3 | 0.000 / 87.5 % | 0.600 / 75.0 % |", "| default | 2 | 2.00 | 0.20 |",
                 "| placement | 2 | 2.00 | 0.20 |", "| guidance | 2 | 0.00 | 0.10 |", "| all | 6 | 4.00 | 0.50 |"):
        assert said in out, said
    with Image.open(tmp_path / "grid.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0, 114, 178), (213, 94, 0)} <= colors, "a line of its own for each text scale"
    write(tmp_path, "default", 0, record([0.7]))
    assert ablate.main(line) == 0 and "| overlap - default | 2 | -0.150 ± 0.635 |" in capsys.readouterr().out


def test_without_results_or_with_a_damaged_one_the_table_says_so_in_one_line(tmp_path, capsys):
    line = ["table", "--folder", str(tmp_path)]
    path = write(tmp_path, "overlap", 0, record())
    damaged = "expected a JSON object"
    for text, expected in ((path.read_text(), "expected a result of the default"), ('{"scores":', damaged),
                           ("[1]", damaged), (None, "expected results in")):
        path.write_text(text) if text else path.unlink()
        assert ablate.main(line) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"ablate.py: error: {expected}") and error.count("\n") == 1, error
    assert list(tmp_path.glob("*.md")) == []


def test_commands_that_cannot_be_meant_are_refused_in_one_line(networks, tmp_path, capsys):
    for words, expected in ((["--jobs", "0"], "--jobs"), (["--steps", "0"], "--steps"), (["--people", "2"], "--people"),
                            (["--seeds", "1", "1"], "different --seeds"), (["--seeds", "-1"], "different --seeds"),
                            (["--minutes", "nan"], "--minutes"), (["--eval_encoder", "nowhere"], "--eval_encoder")):
        assert ablate.main(["run", *networks, *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ablate.py: error: expected") and expected in error and error.count("\n") == 1, error
    assert ablate.main(["score", *networks, "--variant", "nobody"]) == 2 and "expected --variant out of default" in \
        capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- the real score, briefly


def test_scoring_the_bundled_weights_gives_every_score_twice_the_same_and_tidies_up(tmp_path, capsys):
    folder = tmp_path / "default" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")
    (folder / "state-00000008.safetensors").touch()
    (folder / "log.jsonl").write_text('{"step": 4, "seconds": 2.5}\n{"step": 8, "seconds": 7.0}\n')
    line = ["score", "--folder", str(tmp_path), "--people", "3", "--num-inference-steps", "1",
            "--checkpoint-path", str(TINY / "model.safetensors"), "--gemma-root", str(TINY / "gemma"),
            "--face", str(TINY / "face.safetensors")]
    assert ablate.main(line) == 0, capsys.readouterr().err
    first = json.loads((tmp_path / "default" / "seed-0.json").read_text())
    assert first["seconds"]["training"] == 7.0 and first["seconds"]["scoring"] > 0
    assert not list(folder.glob("state*")) and (folder / "model.safetensors").exists()
    assert {name for columns in results.COLUMNS for name in columns} | {"prompt"} == set(first["scores"])
    assert all(len(values) == 3 for values in first["clips"].values())
    assert first["arguments"]["scales"] == [3.0, 2.0, "text_first"] and "--placement" in first["arguments"]["train.py"]
    assert first["chance"]["action"] == 0.125 and first["chance"]["look_alike"] == 0.5
    torch.manual_seed(1)
    assert ablate.main([*line, "--variant", "text-3-ref-0-text_first"]) == 0
    other = json.loads((tmp_path / "text-3-ref-0-text_first" / "seed-0.json").read_text())
    assert ablate.main(line) == 0
    again = json.loads((tmp_path / "default" / "seed-0.json").read_text())
    assert again["clips"] == first["clips"] and again["scores"] == first["scores"], "prompts and noise are fixed"
    assert other["seconds"]["training"] == 0 and other["arguments"]["train.py"] is None
    assert other["scores"] != first["scores"]
