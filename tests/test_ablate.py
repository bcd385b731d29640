"""Ablations: which runs there are, that they survive stops and failures, what the table holds.

Children that would train for minutes are small stand-ins here; train.py's own parser reads the
real flags, and the last test scores the bundled weights on three people. Hardware: CPU, seconds.
Run: python -m pytest tests/test_ablate.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_results import record

import train
from common.files import write_json
from guidance import Guidance, stream_weights
from study import ablate, results

ROOT = Path(ablate.__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny"
PARTS, SEEDS = list(ablate.PARTS), [0, 1, 2]


@pytest.fixture
def networks(tmp_path):
    """Files for the flags that name files; the stand-ins never read them."""
    flags = []
    for name in ("checkpoint-path", "face", "eval-encoder", "head"):
        (tmp_path / name).write_text(name)
        flags += [f"--{name}", str(tmp_path / name)]
    return [*flags, "--folder", str(tmp_path / "out")]


# ------------------------------------------------------------ what there is to do


def test_the_plan_has_12_trainings_a_seed_and_guidance_shares_the_defaults_weights():
    tasks = ablate.plan(PARTS, SEEDS)
    trained = [t for t in tasks if t.part != "guidance"]
    assert len(trained) == 36 and len({t.variant for t in trained}) == 12
    assert len({t.result(Path("x")) for t in tasks}) == len(tasks) == 64, "each once"
    guided = [t for t in tasks if t.part == "guidance"]
    assert {t.weights(Path("x")) for t in guided} == {t.weights(Path("x")) for t in trained
                                                      if t.variant == "default"}
    scales = {t.scales for t in guided if t.seed == 0} | {ablate.SCALES}
    assert scales == {*ablate.GRID, *ablate.GUIDED.values()}, "the grid with the first seed only"
    assert {t.scales for t in guided if t.seed == 2} == set(ablate.GUIDED.values())
    assert [t.variant for t in ablate.plan(["face_loss"], [5])] == ["default", "no_face_loss"]
    joint = stream_weights(Guidance(*ablate.GUIDED["one joint scale of 3"]))
    assert len(joint) == 2 and (True, False) not in joint, "both conditions against none"


def test_train_py_reads_the_flags_and_each_variant_changes_what_it_says(tmp_path, monkeypatch):
    args = ablate.parse_arguments(["run", "--folder", str(tmp_path), "--steps", "30"])
    read = {}
    for task in ablate.plan(PARTS, [4])[:12]:
        first, second = ablate.commands(task, args)
        monkeypatch.setattr(sys, "argv", first[1:])
        found = train.parse_arguments()
        assert found.out == task.weights(tmp_path).parent and (found.seed, found.steps) == (4, 30)
        read[task.variant] = vars(found)
    again = ablate.parse_arguments(second[3:])
    assert (again.variant, again.seed, again.steps) == ("no_reference_dropout", 4, 30)
    usual, layout, pose, color = read["default"], "augment_layout", "augment_pose", "augment_color"
    changed = {name: {k for k in found if found[k] != usual[k]} - {"out"}
               for name, found in read.items()}
    assert usual["full"] and changed == {
        "default": set(), "overlap": {"placement"}, "time_only": {"placement"},
        "space_only": {"placement"}, "overlap_no_augment": {"placement", layout, pose, color},
        "no_augment": {layout, pose, color}, "color_only": {layout, pose},
        "pose_only": {layout, color}, "layout_only": {pose, color}, "no_face_loss": {"w_face"},
        "no_identity_loss": {"w_id"},
        "no_reference_dropout": {"drop_ref", "drop_both", "drop_text"}}
    other = read["no_reference_dropout"]
    assert other["drop_text"] == usual["drop_text"] + usual["drop_both"], "text as often"


def test_what_is_trained_is_only_scored_again(tmp_path):
    args = ablate.parse_arguments(["run", "--folder", str(tmp_path)])
    task = ablate.plan(PARTS, [0])[0]
    task.weights(tmp_path).parent.mkdir(parents=True)
    task.weights(tmp_path).touch()
    assert [line[3] for line in ablate.commands(task, args)] == ["score"]


# ------------------------------------------------------------ running

WRITE = """
import os, sys, time
path, text, needed = sys.argv[1:]
if needed and not os.path.exists(needed):
    sys.exit("guidance came before the default")
time.sleep("/default/" in path)  # the default takes longer than the others
with open(path + ".part", "w") as file:
    file.write(text)
os.rename(path + ".part", path)
"""


def stand_in(began, broken=()):
    """ablate.commands whose children write a made-up result, or fail if `broken` names them."""
    def commands(task, args):
        began.append((task.variant, task.seed))
        path, needed = task.result(args.folder), ""
        write = [sys.executable, "-c", WRITE, str(path), json.dumps(record(part=task.part)), needed]
        if task.variant in broken:
            return [[sys.executable, "-c", "print('no room'); raise SystemExit(3)"], write]
        if task.part == "guidance":
            write[-1] = str(task.weights(args.folder).parent.with_suffix(".json"))
        return [write]
    return commands


def test_finished_runs_are_not_repeated_and_lost_ones_are(networks, tmp_path, monkeypatch, capsys):
    line = ["run", *networks, "--only", "placement", "guidance", "--seeds", "0", "--jobs", "9"]
    monkeypatch.setattr(ablate, "commands", stand_in(began := []))
    assert ablate.main(line) == 0
    tasks = [(t.variant, t.seed) for t in ablate.plan(["placement", "guidance"], [0])]
    assert began == tasks and len(tasks) == 4 + 20
    told = capsys.readouterr().out
    assert told.startswith("0 of 24 results") and told.count(" finished\n") == 24
    began.clear()
    assert ablate.main(line) == 0 and began == []
    (tmp_path / "out" / "overlap" / "seed-0.json").unlink()
    assert ablate.main(line) == 0 and began == [("overlap", 0)]
    capsys.readouterr()
    (tmp_path / "head").write_text("another head")
    assert ablate.main(line) == 2, "other settings are another folder"
    told = capsys.readouterr().err
    assert told.startswith("study.ablate: error: expected the file for --head, with which ")
    assert told.endswith(", got other content; give that file, or choose another --folder\n")


def test_a_failed_child_is_reported_and_the_others_go_on(networks, tmp_path, monkeypatch, capsys):
    began, line = [], ["run", *networks, "--only", "placement", "--seeds", "0", "--jobs", "1"]
    monkeypatch.setattr(ablate, "commands", stand_in(began, broken=("default", "time_only")))
    assert ablate.main(line) == 1
    out, error = capsys.readouterr()
    assert "default seed 0 failed with status 3: no room" in out
    assert "overlap seed 0 finished" in out
    assert "\nfailed: default seed 0, time_only seed 0;" in error and len(began) == 4
    monkeypatch.setattr(ablate, "commands", stand_in(began))
    assert ablate.main(line) == 0 and began[4:] == [("default", 0), ("time_only", 0)]


# In a process of its own: children that note SIGTERM and take a moment to end, as a training does.
LONG = """
import sys
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
ablate.commands = lambda task, args: [[sys.executable, "-c", CHILD,
                                       str(task.result(args.folder).with_suffix(".note"))]]
sys.exit(ablate.main(sys.argv[1:]))
"""


def test_ctrl_c_stops_the_children_with_sigterm_and_waits(networks, tmp_path):
    line = ["run", *networks, "--only", "placement", "--seeds", "0"]
    process = subprocess.Popen([sys.executable, "-c", LONG, *line], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    notes = [tmp_path / "out" / name / "seed-0.note" for name in ("default", "overlap")]
    while not all(n.exists() and n.read_text() for n in notes) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped; the same command goes on" in out, out
    assert [path.read_text() for path in notes] == ["saved", "saved"]
    assert not (tmp_path / "out" / "time_only" / "seed-0.note").exists(), "nothing new is begun"


def test_when_the_time_is_up_nothing_is_begun(networks, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "commands", stand_in(began := []))
    assert ablate.main(["run", *networks, "--only", "dropout", "--minutes", "0"]) == 0
    assert "time is up, 6 results to go" in capsys.readouterr().out and began == []


# ------------------------------------------------------------ the table, and refusals


def test_the_table_comes_from_the_files_alone_and_names_what_is_missing(tmp_path, capsys):
    def write(variant, seed, found):
        write_json(tmp_path / variant / f"seed-{seed}.json", found)
    for seed in (0, 1):
        write("default", seed, record([0.6]))
        write("overlap", seed, record([0.5], "placement"))
    write("text-3-ref-0-text_first", 0, record([0.0], "guidance", (0, 180), prompt=0.875))
    line = ["table", "--only", "placement", "guidance", "--seeds", "0", "1"]
    assert ablate.main([*line, "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out == (tmp_path / "table.md").read_text() and (tmp_path / "grid.png").exists()
    for said in ("8 steps of 2 clips", "Default: placement tass.",
                 "| overlap - default | 2 | **-0.100 ± 0.000** |", "| time_only | not run |",
                 "| no reference (2 streams) | 1 | 0.000 |", "Missing: time_only seed 0, space",
                 "| reference first (3 streams) | not run |",
                 "| 3 | 0.000 / 87.5 % | 0.600 / 75.0 % |",
                 "| default | 2 | 2.00 | 0.20 |", "| all | 5 | 4.00 | 0.45 |"):
        assert said in out, said


def test_what_cannot_be_meant_is_refused_in_one_line(networks, tmp_path, capsys):
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "seed-0.json").write_text('{"scores":')
    for words, told in ((["run", *networks, "--jobs", "0"], "expected --jobs between 1"),
                        (["run", *networks, "--minutes", "nan"], "expected --minutes"),
                        (["run", *networks, "--seeds", "1", "1"], "expected different --seeds"),
                        (["run", *networks, "--seeds", "-1"], "expected --seeds between 0"),
                        (["run", *networks, "--eval-encoder", "nowhere"], "for --eval-encoder"),
                        (["score", *networks, "--variant", "nobody"], "expected --variant out of"),
                        (["table", "--folder", str(tmp_path / "none")], "expected results in"),
                        (["table", "--folder", str(tmp_path)], "expected a JSON object")):
        assert ablate.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("study.ablate: error: expected") and error.count("\n") == 1, error
        assert told in error and "; " in error, error
    assert not (tmp_path / "out").exists() and list(tmp_path.glob("*.md")) == []


# ------------------------------------------------------------ the real score, briefly


def test_scoring_gives_every_score_twice_the_same_and_tidies_up(tmp_path, capsys):
    folder = tmp_path / "default" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(TINY / "model.safetensors")
    (folder / "state-00000008.safetensors").touch()
    (folder / "log.jsonl").write_text('{"step": 4, "seconds": 2.5}\n{"step": 8, "seconds": 7.0}\n')
    line = ["score", "--folder", str(tmp_path), "--people", "3", "--num-inference-steps", "1",
            "--checkpoint-path", str(TINY / "model.safetensors"),
            "--gemma-root", str(TINY / "gemma"), "--face", str(TINY / "face.safetensors")]

    def scored(variant):
        assert ablate.main([*line, "--variant", variant]) == 0, capsys.readouterr().err
        return json.loads((tmp_path / variant / "seed-0.json").read_text())
    first, other = scored("default"), scored("text-3-ref-0-text_first")
    assert not list(folder.glob("state*")) and (folder / "model.safetensors").exists()
    again = scored("default")
    assert again["clips"] == first["clips"] and again["scores"] == first["scores"]
    assert other["scores"] != first["scores"]
    assert {n for columns in results.COLUMNS for n in columns} | {"prompt"} == set(first["scores"])
    assert all(len(values) == 3 for values in first["clips"].values())
    four = [first["scores"][name] for name in results.FACTORS]
    assert abs(first["scores"]["prompt"] - sum(four) / 4) < 1e-5
    assert first["chance"]["action"] == 0.125 and first["chance"]["look_alike"] == 0.5
    assert first["seconds"]["training"] == 7.0 and "--placement" in first["arguments"]["train.py"]
    assert other["seconds"]["training"] == 0 and other["arguments"]["train.py"] is None
