"""Numbers that are none, files that are half, disks that are full, and two runs that are one.

The faults of bench/torture/faults.py with few moments (`python -m bench.torture` has them all), and
what the shared places promise by themselves: the checks and states of training/run.py, the maps of
toy/pretrain.py. Same seed, same machine, same bytes: shown for two processes with different hash
seeds.

Hardware: CPU, under half a minute. Run: python -m pytest tests/test_faults.py
"""

import os
import signal
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

import train
from bench.torture import faults
from bench.torture.harness import ROOT
from clips import cache
from toy import pretrain
from toy.world import TRAITS
from training import validate
from training.optim import EMA, MuonAdamW
from training.run import Run


def small_run(folder, name="w", **options) -> Run:
    named = {name: nn.Parameter(torch.zeros(2, 2))}
    return Run(folder, named, MuonAdamW({}, named), EMA(named), **options)


def told(capsys) -> str:
    """The one line on stderr that is no progress bar."""
    pieces = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    (line,) = [piece for piece in pieces if piece.strip() and "%|" not in piece]
    return line


def cached(folder) -> None:
    """Clips and captions are encoded, where `faults.training` reads them."""
    words = faults.caching(faults.bench() / "cache")
    assert faults.start(words, folder / "caching").wait()[0] == 0


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Commands run in tmp_path, where out/ is theirs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------ numbers that are none


@pytest.mark.parametrize("what", ["latents", "the gradient"])
def test_a_training_stops_with_step_and_clips_before_the_weights(at, monkeypatch, capsys, what):
    cached(at)
    if what == "latents":  # one clip's, as read from the cache
        read = cache.CachedLatents.__getitem__
        monkeypatch.setattr(cache.CachedLatents, "__getitem__",
                            lambda self, i: read(self, i) * (torch.inf if i == 2 else 1))
        clips = "rows 3 (2.mp4); "
    else:  # the root of |x - x| is 0 and has no derivative
        usual = train.flow_matching_loss
        monkeypatch.setattr(train, "flow_matching_loss", lambda v, target: usual(v, target) + (
            v - v.detach()).abs().sqrt().mean())
        clips = "at step 0, rows "
    assert train.main(faults.training()[1:]) == 2
    line = told(capsys)
    assert line.startswith("train.py: error: expected finite ") and what in line and clips in line
    assert line.count(".mp4") == (1 if what == "latents" else 2) and "at step " in line
    assert not list(at.rglob("lora.safetensors"))


def test_a_validation_loss_that_is_no_number_names_step_and_clips():
    clips = Namespace(groups=[range(3)], batch=lambda part, generators: part,
                      names=lambda part: f"clips {part}")
    values = {0: 1.0, 1: float("nan"), 2: 1.0}

    def compute(part, generators):
        return torch.tensor([values[part[0]], 0.0]), torch.ones(2)

    with pytest.raises(ValueError, match=r"got nan for val_fm at step 7, clips \[1\]; "):
        validate.validation_loss(clips, 1, compute, 7)
    values[1] = 4.0
    assert validate.validation_loss(clips, 1, compute, 7) == {"val_fm": 2.0, "val_face": 0.0}


def test_pretraining_stops_before_a_weight_moves(tmp_path):
    run = small_run(tmp_path)
    (w,) = run.model.values()
    pretrain.descend(run, 3, (w - 1).square().sum(), 1.0, "clips [5]")
    moved = w.detach().clone()
    assert moved.abs().min() > 0 and w.grad is None
    bad = {"loss": (w * float("nan")).sum(), "gradient": (w - w.detach()).abs().sqrt().sum()}
    for name, loss in bad.items():
        told = rf"got nan for the {name} at step 4, clips \[5\]; "
        with pytest.raises(ValueError, match=told):
            pretrain.descend(run, 4, loss, 1.0, "clips [5]")
        assert torch.equal(w, moved)
        w.grad = None


# ------------------------------------------------------------ states and maps


def test_a_state_that_is_no_number_never_takes_the_place_of_a_good_one(tmp_path):
    run = small_run(tmp_path, keep=1)
    run.done = 4
    run.save()
    with torch.no_grad():
        run.model["w"][0, 1] = float("inf")
    run.done = 5
    with pytest.raises(ValueError, match="model.w after step 5; .*state-00000004.safetensors is s"):
        run.save()
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000004.safetensors"]


def test_damaged_later_states_do_not_push_out_those_that_can_be_read(tmp_path, capsys):
    run = small_run(tmp_path, keep=4)
    for run.done in (10, 20, 30):
        run.save()
    for step in (20, 30):
        (tmp_path / f"state-000000{step}.safetensors").write_bytes(b"half")
    run = small_run(tmp_path)
    assert run.done == 10 and capsys.readouterr().err.count("cannot be read") == 2
    for run.done in (11, 12, 13):
        run.save()
    assert small_run(tmp_path).done == 13
    steps = [int(path.stem[-8:]) for path in sorted(tmp_path.glob("state-*"))]
    assert steps == [12, 13, 20, 30], "the newest two, and what nobody could read"
    with pytest.raises(ValueError, match=r"of this model in .*, got one without model.v \(2, 2\);"):
        small_run(tmp_path, "v")


def test_rendered_clips_get_their_names_when_all_are_there_and_rendering_goes_on(at, monkeypatch):
    rendered, args = [], Namespace(clips=70, seed=0)

    def rows(split, start, count):
        rendered.append(start)
        if len(rendered) == 2:
            raise KeyboardInterrupt
        return {"person": torch.zeros(count, len(TRAITS))}

    def grey(rows, generators):
        n, (F, H, W) = len(rows["person"]), pretrain.GRID
        return (torch.zeros(n, 3, pretrain.FRAMES, 64, 64), torch.ones(n, pretrain.FRAMES, 4),
                torch.zeros(n, F * H * W))

    monkeypatch.setattr(pretrain, "render_clips", grey)
    monkeypatch.setattr(pretrain, "clip_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        pretrain.render_stage(args)
    assert not list(at.rglob("*.npy")), "nothing that training would read"
    pretrain.render_stage(args)
    pretrain.render_stage(args)  # all there
    assert rendered == [0, 32, 32, 64]
    assert {p.name for p in at.rglob("*.*")} == {"video.npy", "faces.npy", "boxes.npy"}


def test_a_map_larger_than_the_disk_is_refused_before_a_byte_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"expected 80000.0 GB of free space in .*; make room"):
        pretrain.new_map(tmp_path / "x.npy", (10**13, 4), np.float16)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ same bytes


def test_the_same_command_in_two_processes_makes_the_same_bytes(tmp_path):
    """Video, sheet and record but for its seconds; all numbers of a state and of a LoRA."""
    cached(tmp_path)
    others = {}
    for name in ("sampling", "training"):
        script, *words = faults.WORKS[name].words()
        (tmp_path / name / "out").mkdir(parents=True)
        others[name] = subprocess.Popen(
            [sys.executable, str(ROOT / script), *words], cwd=tmp_path / name,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"})
    for name, process in others.items():
        here = faults.straight(name)[0]
        assert process.wait() == 0 and faults.WORKS[name].result(tmp_path / name) == here
        assert len(here) == {"sampling": 3, "training": 2}[name]


# ------------------------------------------------------------ faults


def test_a_reader_sees_one_whole_version_or_another(tmp_path):
    for name in faults.WRITERS:
        (tmp_path / name).mkdir()
        row = faults.readers(name, 12, tmp_path / name)
        assert row.good, row


@pytest.mark.parametrize("name, number", [("sampling", signal.SIGTERM), ("caching", signal.SIGKILL),
                                          ("training", signal.SIGTERM),
                                          ("training", signal.SIGKILL)])
def test_a_command_hit_at_a_random_moment_loses_nothing_and_goes_on(tmp_path, name, number):
    row = faults.stop(name, number, 1, tmp_path)
    assert row.good and row.status == 128 + number, row


@pytest.mark.parametrize("name", ["sampling", "caching", "training"])
def test_a_full_disk_ends_in_one_line_and_with_room_the_command_goes_on(tmp_path, name):
    row = faults.full(name, faults.ROOM[name], tmp_path)
    assert row.good and row.status == 2 and row.lost == 0, row
