"""Training resumes to the same weights, and every stage from renderer to LoRA runs and hands on what the next one reads.

    pytest tests/test_training.py
"""

import sys

import pytest
import torch
from torch import nn

import optim
import pretrain
import train
from checkpoint import read_metadata
from optim import Average, MuonAdamW, Run, orthogonalize, schedule, seeded, split_parameters


def toy_run(folder, minutes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    named = dict(model.named_parameters())
    optimizer = MuonAdamW(*split_parameters(named, keep_out=("2.",)))
    run = Run(folder, named, optimizer, Average(named))
    for step in run.steps(30, minutes, 4, "toy"):
        g = seeded(0, step, run.rank)
        x = torch.randn(4, 6, generator=g)
        loss = (model(x) - x[:, :2]).square().mean()
        loss.backward()
        optimizer.step(schedule(step, 30, warmup=5))
        model.zero_grad()
        run.average.update(named, step)
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
    a, b = (optim.load_state(tmp_path / x / "state.safetensors")[0] for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


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
        optim.write_beside(target, fail)
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def call(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    module.main()


def test_every_stage_hands_on_what_the_next_one_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    quick = ["--no-compile", "--batch", "4"]
    call(pretrain, monkeypatch, "render", "--clips", "32")
    call(pretrain, monkeypatch, "vae", "--steps", "2", *quick)
    call(pretrain, monkeypatch, "encode", "--clips", "32")
    call(pretrain, monkeypatch, "base", "--steps", "2", *quick)
    call(pretrain, monkeypatch, "face", "--steps", "2", *quick)
    call(pretrain, monkeypatch, "judge", "--steps", "2", *quick)
    call(train, monkeypatch, "--full", "--steps", "2", *quick)
    call(train, monkeypatch, "--steps", "2", "--out", "runs/lora", "--placement", "overlap", *quick)
    call(pretrain, monkeypatch, "export")
    model = read_metadata("weights/tiny/model.safetensors")
    assert model["reference_placement"] == "tass" and model["config"]["inference"]["width"] == 64
    before = optim.load_state("runs/st-drc/state.safetensors")[0]
    base = pretrain.load_weights(pretrain.VideoVAE(model["config"]["vae"]), "runs/base.safetensors", "vae.")
    after = pretrain.load_weights(pretrain.VideoVAE(model["config"]["vae"]), "weights/tiny/model.safetensors", "vae.")
    for (name, a), b in zip(base.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"train.py changed the frozen VAE: {name}"
    assert any(k.startswith("muon.transformer_blocks") for k in before)
    with optim.safe_open("runs/lora/lora.safetensors", "pt") as f:
        assert f.metadata()["reference_placement"] == "overlap"
        assert "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight" in f.keys()


def test_fresh_batches_carry_the_caption_of_what_they_show():
    text = pretrain.new_text_encoder(pretrain.train_bpe(pretrain.world.all_captions()[::97], 400))
    data = pretrain.FreshLatents(text, pretrain.VideoVAE(pretrain.TINY_VAE))
    batch = data.batch(8, seeded(3))
    captions = pretrain.world.all_captions()
    for index, (scene, light, shirt) in zip(batch["index"].tolist(), batch["setting"].tolist(), strict=True):
        for words in (pretrain.world.SCENE_NAMES[scene], pretrain.world.LIGHT_NAMES[light],
                      pretrain.world.SHIRT_NAMES[shirt]):
            assert words in captions[index]
    assert batch["x0"].shape == (8, 192, 128) and batch["face"].shape == (8, 192)
