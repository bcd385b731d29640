"""Numbers that are none, files that are half, disks that are full: what happens then, and that two runs are one.

The faults of torture_faults.py with few moments (`python -m bench.torture` has them all), and what each of the shared
places promises by itself: run.py's checks and states, pretrain.py's maps, evaluate.py's rows.

Same seed, same machine, same bytes: shown for two processes with different hash seeds.

Hardware: CPU, under half a minute. Run: python -m pytest tests/test_faults.py
"""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import train
from bench.torture.faults import ROOM, WORKS, WRITERS, bench, caching, full, readers, start, stop, straight, training
from clips import dataset
from common.cli import check_folder, check_ranges, command
from common.files import atomic_write
from study import evaluate
from toy import pretrain
from toy.world import TRAITS
from training import validate
from training.optim import EMA, MuonAdamW
from training.run import Run

ROOT = Path(train.__file__).resolve().parent


def toy(folder: Path, name: str = "w", **options) -> Run:
    named = {name: nn.Parameter(torch.zeros(2, 2))}
    return Run(folder, named, MuonAdamW({}, named), EMA(named), **options)


def told(capsys) -> str:
    """The one line on stderr that is no progress bar."""
    pieces = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    (line,) = [piece for piece in pieces if piece.strip() and "%|" not in piece]
    return line


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Commands run in tmp_path, where out/ is theirs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def cached() -> None:
    """The bench holds the latents and contexts that training reads."""
    assert start([*caching()[:-1], str(bench() / "cache")], bench()).wait()[0] == 0


# ------------------------------------------------------------ numbers that are none


def test_a_latent_that_is_no_number_stops_training_with_step_and_row(cached, at, monkeypatch, capsys):
    read = dataset.CachedLatents.__getitem__
    monkeypatch.setattr(dataset.CachedLatents, "__getitem__",
                        lambda self, i: read(self, i) * (torch.inf if i == 2 else 1))
    assert train.main(training()[1:]) == 2
    line = told(capsys)
    assert line.startswith("train.py: error: expected finite latents, got NaN or infinity at step ") and "; " in line
    assert "rows 3 (2.mp4); " in line and ".mp4" not in line.replace("2.mp4", ""), line
    assert not list(at.rglob("lora.safetensors"))


def test_a_gradient_that_is_no_number_stops_training_although_the_losses_are_fine(cached, at, monkeypatch, capsys):
    """The root of |x - x| is 0 and has no derivative."""
    usual = train.total_loss
    monkeypatch.setattr(train, "total_loss", lambda fm, *rest: usual(fm, *rest) + (fm - fm.detach()).abs().sqrt())
    assert train.main(training()[1:]) == 2
    line = told(capsys)
    assert "expected finite numbers, got nan for the gradient at step 0, rows " in line and line.count(".mp4") == 2, line
    assert not list((at / "out").glob("*"))


def test_a_validation_loss_that_is_no_number_names_step_and_clips():
    clips = Namespace(groups=[range(3)], batch=lambda part, generators: part, names=lambda part: f"clips {part}")
    values = {0: 1.0, 1: float("nan"), 2: 1.0}

    def compute(part, generators):
        return torch.tensor([values[part[0]], 0.0]), torch.ones(2)

    with pytest.raises(ValueError, match=r"got nan for val_fm at step 7, clips \[1\]; "):
        validate.validation_loss(clips, 1, compute, 7)
    values[1] = 4.0
    assert validate.validation_loss(clips, 1, compute, 7) == {"val_fm": 2.0, "val_face": 0.0}


def test_pretraining_stops_before_a_weight_moves(tmp_path):
    run = toy(tmp_path)
    (w,) = run.model.values()
    pretrain.descend(run, 3, (w - 1).square().sum(), 1.0, "clips [5]")
    moved = w.detach().clone()
    assert moved.abs().min() > 0 and w.grad is None
    for loss, name in (((w * float("nan")).sum(), "loss"), (w.sum() + (w - w.detach()).abs().sqrt().sum(), "gradient")):
        with pytest.raises(ValueError, match=rf"got nan for the {name} at step 4, clips \[5\]; "):
            pretrain.descend(run, 4, loss, 1.0, "clips [5]")
        assert torch.equal(w, moved)
        w.grad = None


def test_a_state_that_is_no_number_never_takes_the_place_of_a_good_one(tmp_path):
    run = toy(tmp_path, keep=1)
    run.done = 4
    run.save()
    with torch.no_grad():
        run.model["w"][0, 1] = float("inf")
    run.done = 5
    with pytest.raises(ValueError, match="model.w after step 5; .*state-00000004.safetensors is still good"):
        run.save()
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000004.safetensors"]


def test_a_row_of_an_evaluation_that_is_no_number_is_not_kept(tmp_path):
    with pytest.raises(ValueError, match="expected finite pixels in the row row"):
        evaluate.kept(tmp_path / "row.safetensors", lambda: torch.full((1, 3, 1, 8, 8), float("nan")))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ states and files


def test_damaged_later_states_do_not_push_out_those_that_can_be_read(tmp_path, capsys):
    run = toy(tmp_path, keep=4)
    for run.done in (10, 20, 30):
        run.save()
    for step in (20, 30):
        (tmp_path / f"state-000000{step}.safetensors").write_bytes(b"half")
    run = toy(tmp_path)
    assert run.done == 10 and capsys.readouterr().err.count("cannot be read") == 2
    for run.done in (11, 12, 13):
        run.save()
    assert toy(tmp_path).done == 13
    steps = [int(path.stem[-8:]) for path in sorted(tmp_path.glob("state-*"))]
    assert steps == [12, 13, 20, 30], "the newest two, and what nobody could read"


def test_a_state_of_another_model_is_refused_in_one_line(tmp_path):
    toy(tmp_path).save()
    with pytest.raises(ValueError, match=r"expected a state of this model in .*, got one without model.v \(2, 2\); choose"):
        toy(tmp_path, "v")


def test_what_safetensors_calls_a_full_disk_is_an_error_of_the_system(tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise SafetensorError("No space left on device")

    with pytest.raises(OSError, match="x.safetensors: No space left on device; make room"):
        atomic_write(target, fail)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def fake_clips(rows, generators):
    """As pretrain.render_clips, all grey and fast."""
    n = len(rows["person"])
    tokens = pretrain.GRID[0] * pretrain.GRID[1] * pretrain.GRID[2]
    return torch.zeros(n, 3, pretrain.FRAMES, 64, 64), torch.ones(n, pretrain.FRAMES, 4), torch.zeros(n, tokens)


def test_rendered_clips_get_their_names_when_all_are_there_and_rendering_goes_on(at, monkeypatch):
    rendered, args = [], Namespace(clips=70, seed=0)

    def rows(split, start, count):
        if len(rendered) == 2:
            raise KeyboardInterrupt
        rendered.append(start)
        return {"person": torch.zeros(count, len(TRAITS))}

    monkeypatch.setattr(pretrain, "render_clips", fake_clips)
    monkeypatch.setattr(pretrain, "clip_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        pretrain.render_stage(args)
    assert not list(at.rglob("*.npy")), "nothing that training would read"
    with pytest.raises(ValueError, match="expected rendered clips"):
        pretrain.Clips("cpu")
    rendered.insert(0, None)  # so that it does not stop again
    pretrain.render_stage(args)
    assert rendered == [None, 0, 32, 64] and {p.name for p in at.rglob("*.*")} == {"video.npy", "faces.npy", "boxes.npy"}
    pretrain.render_stage(args)
    assert len(rendered) == 4, "all there"
    with pytest.raises(ValueError, match="expected 71 clips in .*, got 70, "):
        pretrain.render_stage(Namespace(clips=71, seed=0))


def test_latents_get_their_name_when_they_are_whole(at):
    class Stopped(nn.Module):
        latent_channels = 4

        def encode(self, video):
            raise KeyboardInterrupt

    videos = np.zeros((3, 9, 64, 64, 3), np.uint8)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(at / "latents.npy", lambda path: pretrain.encode_clips(Stopped(), videos, path))
    assert not list(at.iterdir())


def test_a_map_larger_than_the_disk_is_refused_before_a_byte_is_written(at):
    with pytest.raises(ValueError, match=r"expected 80000.0 GB of free space in .*, got \d+.\d GB; make room"):
        pretrain.new_map(at / "x.npy", (10**13, 4), np.float16)
    assert not list(at.iterdir())


def test_a_video_that_is_still_being_written_is_not_scored(at, capsys):
    (at / ".out.77.mp4").write_bytes(b"half a video")
    words = ["--videos", str(at), "--ref", str(at / "x.png"), "--face", "face.safetensors"]
    assert evaluate.main(words) == 2 and ", got 0 videos" in told(capsys)


# ------------------------------------------------------------ words


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    for module, words in ((train, ["--steps", "many"]), (evaluate, ["--order", "x" * 10_000]), (pretrain, ["sleep"])):
        with pytest.raises(SystemExit) as stopped:
            module.main(words)
        line, name = told(capsys), f"{module.__name__}.py"
        assert stopped.value.code == 2 and line.startswith(f"{name}: error: ") and line.endswith(f"; see {name} --help")
        assert len(line) < 600


def test_numbers_outside_their_range_are_refused_and_none_is_a_default():
    args = Namespace(a=None, b=[0.0, 1.0], c_d=2)
    check_ranges(args, {"a": (0, 1), "b": (0, 1), "c_d": (1, 2)})
    for value in (0, 3, float("nan"), float("inf")):
        args.c_d = value
        with pytest.raises(ValueError, match=f"expected --c-d between 1 and 2, got {value}; "):
            check_ranges(args, {"c_d": (1, 2)})
    args.b[1] = float("nan")
    with pytest.raises(ValueError, match="expected --b between 0 and 1, got nan; "):
        check_ranges(args, {"b": (0, 1)})


def test_a_file_where_a_folder_should_be_is_found_at_once(cached, at, capsys):
    (at / "out").write_text("a file")
    assert train.main(training()[1:]) == 2
    assert "expected a folder to write in, got out (Not a directory); choose another" in told(capsys)
    check_folder(at / "new" / "and" / "deep")
    assert [path.name for path in at.iterdir()] == ["out"], "nothing is made"


def test_more_people_than_fit_into_memory_are_refused_with_the_gigabytes(at, capsys):
    assert evaluate.main(["--people", "1000000", "--prompts", "10"]) == 2
    assert "got 10000000, which need 50000 GB; " in told(capsys) and not list(at.iterdir())


# ------------------------------------------------------------ same bytes


def result_apart(name: str, folder: Path) -> dict[str, str]:
    """Hashes of what the command writes in a Python of its own, with another hash seed than here."""
    (folder / "out").mkdir()
    words = WORKS[name].words()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return WORKS[name].result(folder)


@pytest.mark.parametrize("name", ["sampling", "training"])
def test_the_same_command_in_two_processes_makes_the_same_bytes(tmp_path, name):
    """Sampling: video, sheet and record but for its seconds. Training: all numbers of the state and of the LoRA. For
    another number of threads PyTorch promises nothing, and the README says what was found."""
    here = straight(name)[0]
    assert len(here) == {"sampling": 3, "training": 2}[name]
    assert result_apart(name, tmp_path) == here


# ------------------------------------------------------------ faults


def test_a_signal_while_a_progress_bar_is_being_made_is_still_one_line(capfd):
    """The bar is half-built then, and its `__del__` fails; Python would print that, with a traceback."""
    class Half:
        def __init__(self):
            signal.raise_signal(signal.SIGTERM)
            self.whole = True

        def __del__(self):
            self.whole.bit_length()  # AttributeError
    hook = sys.unraisablehook
    assert command("x.py", Half) == 143
    assert capfd.readouterr().err == "x.py: stopped; the same command goes on\n"
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("name", WRITERS)
def test_a_reader_sees_one_whole_version_or_another(tmp_path, name):
    row = readers(name, 12, tmp_path)
    assert row.good, row


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("name", ["sampling", "caching", "training"])
def test_a_command_hit_at_a_random_moment_loses_nothing_and_the_next_goes_on(tmp_path, name, number):
    row = stop(name, number, 1, tmp_path)
    assert row.good and row.status == 128 + number, row


@pytest.mark.parametrize("name", ["sampling", "caching", "training"])
def test_a_full_disk_ends_in_one_line_and_with_room_the_command_goes_on(tmp_path, name):
    row = full(name, ROOM[name], tmp_path)
    assert row.good and row.status == 2 and row.lost == 0, row
