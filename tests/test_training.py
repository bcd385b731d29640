"""Training resumes to the same weights, and every stage from renderer to LoRA runs and hands on what the next one reads.

    pytest tests/test_training.py
"""

import inspect
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from common.files import atomic_write
from common.seeds import seeded
from ltx.checkpoint import open_file, read_metadata
from toy import pretrain
from toy.clips import fresh_world
from training import validate
from training.optim import EMA, MuonAdamW, orthogonalize, schedule, split_parameters
from training.run import Run, load_state


def toy_run(folder, minutes, save_seconds=120):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    named = dict(model.named_parameters())
    optimizer = MuonAdamW(*split_parameters(named, keep_out=("2.",)))
    run = Run(folder, named, optimizer, EMA(named))
    for step in run.steps(30, minutes, 4, "toy", save_seconds):
        g = seeded(0, step, run.rank)
        x = torch.randn(4, 6, generator=g)
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        optimizer.step(schedule(step, 30, warmup=5))
        model.zero_grad()
        run.ema.update(named, step)
    return run, {k: v.clone() for k, v in named.items()}


def test_an_interrupted_run_ends_at_the_same_weights_bit_for_bit(tmp_path):
    _, straight = toy_run(tmp_path / "a", minutes=9)
    stops = []
    for _ in range(3):  # minutes=0 stops, and saves, after every tenth step
        run, weights = toy_run(tmp_path / "b", minutes=0)
        stops.append(run.done)
    assert stops == [10, 20, 30]
    for name, value in straight.items():
        assert torch.equal(value, weights[name]), name
    a, b = (load_state(tmp_path / x / "state-00000030.safetensors")[0] for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert len(list((tmp_path / "b").glob("state-*"))) == 2, "the newest two are kept"


def test_a_damaged_state_is_passed_over_and_other_settings_are_refused(tmp_path, capsys):
    run, _ = toy_run(tmp_path, minutes=0)
    run, weights = toy_run(tmp_path, minutes=0)
    newest = run.states()[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    again, same = toy_run(tmp_path, minutes=0)
    assert again.done == 20 and "cannot be read" in capsys.readouterr().err
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    (tmp_path / "old").mkdir()
    again.states()[0].rename(tmp_path / "old" / "state.safetensors")  # the name of earlier versions
    assert toy_run(tmp_path / "old", minutes=9)[0].done == 30
    assert (tmp_path / "old" / "state-00000030.safetensors").exists()
    named = {"w": nn.Parameter(torch.zeros(2, 2))}
    optimizer = MuonAdamW({}, named)
    Run(tmp_path / "c", named, optimizer, EMA(named), {"lr": 1e-3, "new": 1}).save()
    assert Run(tmp_path / "c", named, optimizer, EMA(named), {"lr": 1e-3}).done == 0
    with pytest.raises(ValueError, match="expected lr = 0.001"):
        Run(tmp_path / "c", named, optimizer, EMA(named), {"lr": 2e-3})


# toy_run in a process of its own, which imports no more than it needs.
TOY = """
import sys, time, torch
from torch import nn
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from common import seeds
from training.optim import EMA, MuonAdamW, schedule, split_parameters
from training.run import Run
def seeded(*numbers):
    print("in a step", flush=True)
    time.sleep(0.02)  # long enough to be hit
    return seeds.seeded(*numbers)
{source}
toy_run({folder!r}, 9, save_seconds=0)
"""


def test_signals_save_and_kills_lose_nothing(tmp_path):
    """Ctrl-C and SIGTERM end after a step with status 130 and 143; SIGKILL at random moments: the same final weights."""
    _, straight = toy_run(tmp_path / "straight", minutes=9)
    root, source = Path(__file__).resolve().parent.parent, inspect.getsource(toy_run)
    script = TOY.format(root=str(root), source=source, folder=str(tmp_path / "killed"))
    draw, seen = random.Random(3), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGKILL):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()  # the first step has begun
        time.sleep(0.12 * draw.random())
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        seen.append(process.returncode)
        if number != signal.SIGKILL and process.returncode:
            assert "everything is saved" in error and error.count("goes on") == 1, error
    assert seen[:2] == [130, 143] and seen[2:] == [-9, -9, -9], seen
    run, weights = toy_run(tmp_path / "killed", minutes=9)
    assert run.done == 30
    assert all(torch.equal(straight[name], weights[name]) for name in straight)


def test_the_log_goes_on_where_the_state_is_and_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    toy_run(tmp_path, minutes=0)  # ten steps
    log = tmp_path / "log.jsonl"
    first = log.read_text()
    log.write_text(first + '{"step": 20, "seconds": 1.0}\n{"step": 9, "sec')
    run, _ = toy_run(tmp_path, minutes=0)
    lines = log.read_text().splitlines(keepends=True)
    assert lines[0] == first and [json.loads(line)["step"] for line in lines] == [10, 20]
    assert run.seconds > json.loads(first)["seconds"] >= 0, "seconds count over all commands"


def test_averaged_weights_are_in_the_model_only_inside(tmp_path):
    run, weights = toy_run(tmp_path, minutes=9)
    with pytest.raises(RuntimeError, match="inside"), run.ema_weights():
        assert all(torch.equal(run.model[name], value) for name, value in run.ema.shadow.items())
        assert not torch.equal(run.model["0.weight"], weights["0.weight"])
        raise RuntimeError("inside")
    assert all(torch.equal(run.model[name], value) for name, value in weights.items()), "also after an error"


def test_a_command_that_cannot_be_meant_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    for words, expected in ((["--optimizer", "muon"], "--full"), (["--checkpoint-path", "nowhere"], "nowhere")):
        monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "out"), *words])
        assert train.main() == 2
        told = capsys.readouterr().err
        assert told.startswith("train.py: error: expected") and expected in told and told.count("\n") == 1, told
    assert not (tmp_path / "out").exists()


def test_orthogonalize_brings_singular_values_near_one():
    for shape in ((12, 40), (40, 12)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=seeded(1))))
        assert values.min() > 0.5 and values.max() < 1.35, (values.min(), values.max())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(target, fail)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def call(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


def test_every_stage_hands_on_what_the_next_one_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    quick = ["--no-compile", "--batch", "4"]
    for name in ("LOOKS", "SHOWN"):
        monkeypatch.setattr(validate, name, 1)
    call(pretrain, monkeypatch, "render", "--clips", "32")
    call(pretrain, monkeypatch, "vae", "--steps", "2", *quick)
    call(pretrain, monkeypatch, "encode", "--clips", "32")
    call(pretrain, monkeypatch, "base", "--steps", "2", *quick)
    call(pretrain, monkeypatch, "face", "--steps", "2", *quick)
    call(pretrain, monkeypatch, "eval_encoder", "--steps", "2", *quick)
    call(train, monkeypatch, "--full", "--optimizer", "muon", "--steps", "2", *quick)
    call(train, monkeypatch, "--steps", "2", "--out", "runs/lora", "--placement", "overlap", *quick)
    assert train.main() == 0, "nothing left to do"
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "3", "--out", "runs/lora", "--rank", "8", *quick])
    assert train.main() == 2, "another rank is another run"
    call(pretrain, monkeypatch, "export")
    model = read_metadata("weights/tiny/model.safetensors")
    assert model["reference_placement"] == "tass" and model["config"]["inference"]["width"] == 64
    before = load_state("runs/st-drc/state-00000002.safetensors")[0]
    base = pretrain.load_weights(pretrain.VideoVAE(model["config"]["vae"]), "runs/base.safetensors", "vae.")
    after = pretrain.load_weights(pretrain.VideoVAE(model["config"]["vae"]), "weights/tiny/model.safetensors", "vae.")
    for (name, a), b in zip(base.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"train.py changed the frozen VAE: {name}"
    assert any(k.startswith("muon.transformer_blocks") for k in before)
    with open_file("runs/lora/lora.safetensors") as f:
        assert f.metadata()["reference_placement"] == "overlap"
        assert "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight" in f.keys()


def test_fresh_batches_carry_the_caption_of_what_they_show():
    data = fresh_world(pretrain.VideoVAE(pretrain.TINY_VAE))
    clips = data.clips(list(range(8)), [seeded(3, k) for k in range(8)])
    captions = pretrain.world.all_captions()
    for index, (scene, light, shirt) in zip(clips["caption"].tolist(), clips["setting"].tolist(), strict=True):
        for words in (pretrain.world.SCENE_NAMES[scene], pretrain.world.LIGHT_NAMES[light],
                      pretrain.world.SHIRT_NAMES[shirt]):
            assert words in captions[index]
    assert clips["x0"].shape == (8, 192, 128) and clips["face"].shape == (8, 192)
