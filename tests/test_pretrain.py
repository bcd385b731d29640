"""Every stage from renderer to export runs and hands on what the next one reads.

Hardware: CPU, about 20 seconds. Run: python -m pytest tests/test_pretrain.py
"""

import json
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from clips.face import load_facenet
from common.files import atomic_write
from ltx.checkpoint import open_file, read_metadata
from ltx.vae import VideoVAE, psnr
from toy import config, head, pretrain, recognisers, world
from toy.clips import encode, from_uint8
from training import validate

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "weights" / "tiny"


def tensors_of(path):
    with open_file(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def same(a, b, start=""):
    names = [name for name in a if name.startswith(start)]
    return len(names) > 0 and all(torch.equal(a[name], b[name]) for name in names)


# ------------------------------------------------------------ all of it


class Products(TorchDispatchMode):
    """Notes the number types of matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.__name__ for word in ("mm", "convolution", "attention")):
            self.types |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in which every stage has run for two steps, in float32."""
    folder, products = tmp_path_factory.mktemp("made"), Products()
    with pytest.MonkeyPatch.context() as patch, products:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        for module, name, value in ((validate, "LOOKS", 1), (validate, "SHOWN", 1),
                                    (recognisers, "check_recogniser", lambda *args: None),
                                    (head, "check_head", lambda *args: {}),
                                    (pretrain, "reference_floor", lambda vae: 20.0)):
            patch.setattr(module, name, value)
        patch.setitem(pretrain.TINY_INFERENCE, "steps", 2)
        quick = ["--no-compile", "--batch", "4", "--steps", "2", "--precision", "fp32"]
        encode = ["encode", "--clips", "32", "--precision", "fp32"]
        for words in (["render", "--clips", "32"], ["vae", *quick], encode,
                      ["base", *quick], ["face", *quick], ["eval_encoder", *quick]):
            assert pretrain.main(words) == 0, words
        files = ["--checkpoint-path", "runs/base.safetensors", "--gemma-root", "runs/gemma",
                 "--face", "runs/face.safetensors"]
        assert train.main([*files, "--full", "--optimizer", "muon", *quick]) == 0
        assert pretrain.main(["export"]) == pretrain.main(["head_pose", *quick]) == 0
    assert products.types == {torch.float32}, "nothing was left in bf16"
    return folder


def test_bf16_is_bf16_in_the_network_and_in_muon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recognisers, "check_recogniser", lambda *args: None)
    words = ["face", "--no-compile", "--batch", "4", "--steps", "1", "--precision", "bf16"]
    with Products() as products:
        assert pretrain.main(words) == 0
    assert products.types == {torch.bfloat16}


def test_train_and_export_change_the_transformer_alone(made):
    base, trained = (tensors_of(made / "runs" / name)
                     for name in ("base.safetensors", "st-drc/model.safetensors"))
    exported = tensors_of(made / "weights" / "tiny" / "model.safetensors")
    assert same(base, trained, "vae.") and base.keys() == trained.keys()
    connector = "model.diffusion_model.video_embeddings_connector."
    assert same(base, trained, connector)
    assert not same(base, trained, "model.diffusion_model.transformer_blocks.")
    assert exported.keys() == trained.keys() and same(trained, exported)
    head = read_metadata(made / "weights" / "tiny" / "model.safetensors")
    assert head["reference_placement"] == "tass" and head["training_steps"] == "2"
    assert head["config"]["inference"]["reference_psnr_floor"] == 20.0
    assert "reference_placement" not in read_metadata(made / "runs" / "base.safetensors")
    for path in ("runs/base", "runs/st-drc/model", "weights/tiny/base", "weights/tiny/model"):
        told = read_metadata(made / f"{path}.safetensors")["known_phrases"]
        assert json.loads(told) == world.phrases(), path
    for name in ("face", "eval_encoder"):  # what the stages write can be read
        net = load_facenet(made / f"weights/tiny/{name}.safetensors", "cpu")
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    assert {p.name for p in (made / "examples").iterdir()} == {f"{n}.png" for n in config.EXAMPLES}


def test_cached_latents_have_unit_scale_and_are_those_of_the_shipped_vae(made):
    latents = np.load(made / "data/train/latents.npy").astype(np.float32)
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.15, latents.std()
    video = np.load(made / "data/train/video.npy")[3:5]
    vae = VideoVAE.load(made / "runs/base.safetensors", dtype=torch.float32)
    again = encode(vae, from_uint8(video), "fp32")
    assert torch.allclose(again, torch.from_numpy(latents[3:5]), atol=4e-3)  # kept in float16


def test_with_keep_text_only_the_transformer_is_another(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "check_samples", lambda *args: None)
    shutil.copytree(BUNDLED, tmp_path / "weights" / "tiny")
    shutil.copytree(made / "data", tmp_path / "data")
    words = ["--keep-text", "--no-compile", "--batch", "4"]
    assert pretrain.main(["base", "--steps", "2", *words]) == 2
    assert "expected latents of this checkpoint's VAE" in capsys.readouterr().err
    assert pretrain.main(["encode", *words]) == 0
    assert pretrain.main(["base", "--steps", "1", *words]) == 0
    assert pretrain.main(["base", "--steps", "2", *words]) == 0, "it resumes"
    bundled, new = tensors_of(BUNDLED / "model.safetensors"), tensors_of("runs/base.safetensors")
    changed = {name for name in bundled if not torch.equal(bundled[name], new[name])}
    model = "model.diffusion_model."
    named = {name for name in bundled if name.startswith(model) and "_connector." not in name}
    assert bundled.keys() == new.keys() and changed == named
    assert "reference_placement" not in read_metadata("runs/base.safetensors")
    for name in pretrain.GEMMA_FILES:
        kept = (tmp_path / "runs/gemma" / name).read_bytes()
        assert kept == (BUNDLED / "gemma" / name).read_bytes()


def test_stages_that_miss_what_comes_before_them_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, expected in ((["encode"], "expected a trained VAE in runs/vae"),
                            (["vae"], "expected rendered clips in data/train"),
                            (["export"], "expected runs/st-drc/model.safetensors"),
                            (["face", "--keep-text"], "expected --keep-text with the stage"),
                            (["render", "--clips", "0"], "expected --clips between 1 and")):
        assert pretrain.main(words) == 2
        told = capsys.readouterr().err
        assert told.startswith("toy.pretrain: error: ") and expected in told, told
        assert told.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


# ------------------------------------------------------------ config


def test_the_bundled_checkpoint_has_these_tables():
    stored = read_metadata(BUNDLED / "model.safetensors")["config"]
    assert stored["vae"] == config.TINY_VAE and stored["transformer"] == config.TINY_TRANSFORMER
    floor = stored["inference"].pop("reference_psnr_floor")
    assert stored["inference"] == config.TINY_INFERENCE
    vae = VideoVAE.load(BUNDLED / "model.safetensors", dtype=torch.float32)
    clip = torch.zeros(1, 3, config.FRAMES, config.SIZE, config.SIZE)
    assert vae.encode(clip).shape[2:] == config.GRID
    assert abs(pretrain.reference_floor(vae) - floor) < 0.3, "measured again"


# ------------------------------------------------------------ render and encode


def fake_clips(rows, generators):
    """As render_clips, fast: clip k is all k."""
    k = rows["person"][:, 0]
    video = (k[:, None, None, None, None] / 127.5 - 1).expand(-1, 3, pretrain.FRAMES, 64, 64)
    return video, torch.ones(len(k), pretrain.FRAMES, 4), torch.zeros(len(k), 192)


def test_rendering_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    rendered, args = [], Namespace(clips=70, seed=0)

    def rows(split, start, count):
        if len(rendered) == 2:
            raise KeyboardInterrupt
        rendered.append(start)
        return {"person": torch.arange(start, start + count).float()[:, None]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "render_clips", fake_clips)
    monkeypatch.setattr(pretrain, "clip_rows", rows)
    with pytest.raises(KeyboardInterrupt):
        pretrain.render_stage(args)
    assert not list(tmp_path.rglob("*.npy")), "nothing that training would read"
    rendered.insert(0, None)  # so that it does not stop again
    pretrain.render_stage(args)
    names = {path.name for path in tmp_path.rglob("*.*")}
    assert rendered == [None, 0, 32, 64] and names == {"video.npy", "faces.npy", "boxes.npy"}
    video = np.load("data/train/video.npy")
    assert (video == np.arange(70)[:, None, None, None, None]).all(), "each clip in its place"
    pretrain.render_stage(args)
    assert len(rendered) == 4, "all there"
    with pytest.raises(ValueError, match="expected 71 clips in .*, got 70, "):
        pretrain.render_stage(Namespace(clips=71, seed=0))
    batch, boxes = pretrain.Clips("cpu").batch(5, torch.Generator().manual_seed(0))
    assert batch.shape == (5, 3, 9, 64, 64) and boxes.shape == (5, 9, 4)
    assert set(world.to_uint8(batch)[:, 0, 0, 0, 0].tolist()) < set(range(70))


def test_latents_get_their_name_when_they_are_whole_and_finite(tmp_path):
    class Stopped(nn.Module):
        latent_channels = 4

        def encode(self, video):
            return torch.full((len(video), 4, *config.GRID), torch.inf)

    videos = np.zeros((3, 9, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="expected finite latents, got NaN .* in clips 0 to 2; "):
        atomic_write(tmp_path / "latents.npy",
                     lambda path: pretrain.encode_clips(Stopped(), videos, path, "fp32"))
    assert not list(tmp_path.iterdir())


def test_a_map_larger_than_the_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected 80000.0 GB of free space in .*; make room"):
        pretrain.new_map(tmp_path / "x.npy", (10**13, 4), np.float16)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ losses


def fake_vae(out):
    return SimpleNamespace(encoder=lambda video: torch.zeros(len(video), 4, 1, 1, 2),
                           decoder=lambda z: out)


def test_a_face_counts_three_times_in_the_vae_loss():
    video, mask = torch.zeros(1, 3, 1, 2, 2), torch.zeros(1, 1, 1, 2, 2)
    mask[..., 0, 0] = 1
    noise = torch.zeros(1, 4, 1, 1, 2)

    def loss(*wrong):
        out = video.clone()
        for row, column in wrong:
            out[..., row, column] = 0.1
        return pretrain.vae_loss(fake_vae(out), video, mask, noise)[0].exp().item()
    assert loss((0, 0)) == pytest.approx(3 * loss((1, 1)), rel=1e-5)
    assert loss((0, 0), (0, 1), (1, 0), (1, 1)) == pytest.approx(0.01, rel=1e-5)
    out = torch.rand(2, 3, 1, 2, 2)
    both = torch.zeros_like(out)
    _, dB = pretrain.vae_loss(fake_vae(out), both, torch.zeros(2, 1, 1, 2, 2), noise)
    assert dB.item() == pytest.approx(psnr(out, both).mean().item(), abs=1e-4)


def test_the_noisy_latent_follows_the_noise_level():
    x0 = torch.randn(6, 192, 8)
    sigma, noise, noisy = pretrain.draw_noise(x0, torch.Generator().manual_seed(1))
    assert sigma.shape == (6,) and 0 < sigma.min() and sigma.max() <= 1
    s = sigma[:, None, None]
    assert torch.allclose(noisy - x0, s * (noise - x0), atol=1e-5) and noise.std() > 0.9
    v = noise - x0

    def model(tokens, timesteps, sigma_, positions, context):
        assert tokens is noisy and timesteps == [(sigma, 192)]
        return v + context
    loss = pretrain.base_loss(model, lambda a, b: a - b, (torch.tensor(5.0), torch.tensor(3.0)),
                              x0, noise, noisy, sigma, None)
    assert loss == pytest.approx(4.0)
