"""The bundled checkpoint: it fits, it is LTX-2.3's format, and it makes the README's video. CPU, under a minute.

    pytest tests/test_bundled.py
"""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import sample
from clips.face import load_facenet
from common.seeds import seeded
from ltx.checkpoint import open_file, read_metadata
from ltx.vae import VideoVAE
from model import TransformerConfig, VideoTransformer
from toy import world
from toy.pretrain import face_views

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights" / "tiny"
PROMPT = "a person in a red shirt turns left in a park, in daylight"


def run(tmp_path, *words, ref=ROOT / "examples" / "ada.png", name="out.mp4", steps="4"):
    args = ["--ref", str(ref), "--prompt", PROMPT, "--output-path", str(tmp_path / name), "--num-inference-steps", steps]
    assert sample.main([*args, *words]) in (0, None)
    return np.asarray(Image.open(tmp_path / name.replace("mp4", "png"))).astype(int), tmp_path / name


def test_sizes_stay_below_the_promise():
    assert (WEIGHTS / "model.safetensors").stat().st_size < 20e6
    assert max(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file()) < 16 * 2**20
    assert {p.name for p in (WEIGHTS / "gemma").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}


def test_the_file_is_an_ltx_checkpoint_and_says_how_the_reference_was_placed():
    metadata = read_metadata(WEIGHTS / "model.safetensors")
    assert metadata["reference_placement"] == "tass" and metadata["model_version"] == "2.3.0"
    with open_file(WEIGHTS / "model.safetensors") as f:
        names = set(f.keys())
    with torch.device("meta"):
        transformer = VideoTransformer(TransformerConfig.from_checkpoint(metadata["config"]["transformer"]))
        vae = VideoVAE(metadata["config"]["vae"])
    expected = {"model.diffusion_model." + k for k in transformer.state_dict()} | {"vae." + k for k in vae.state_dict()}
    rest = {k for k in names - expected if not k.startswith(("text_embedding_projection.video_aggregate_embed.",
                                                             "model.diffusion_model.video_embeddings_connector."))}
    assert expected <= names and not rest


def test_the_readme_command_gives_a_video_that_plays(tmp_path):
    _, path = run(tmp_path)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        assert (stream.codec_context.name, stream.width, stream.height, frames) == ("h264", 384, 384, 9)
    assert json.loads(path.with_suffix(".json").read_text())["arguments"]["placement"] == "tass"


def test_reference_prompt_and_reference_scale_each_change_the_video(tmp_path):
    plain, _ = run(tmp_path)
    frames = slice(388, None)  # right of the reference
    for words in (["--ref-scale", "0"], ["--prompt", "a person in a blue shirt laughs at night, in daylight"]):
        other, _ = run(tmp_path, *words, name="other.mp4")
        assert np.abs(other[:, frames] - plain[:, frames]).mean() > 3, words
    other, _ = run(tmp_path, ref=ROOT / "examples" / "ben.png", name="other.mp4")
    assert np.abs(other[:, frames] - plain[:, frames]).mean() > 3


def photograph_like(h, w):
    """Colours with detail at every scale, half as strong at half the size: what pictures of the world have in common."""
    g, out = seeded(5), 0
    for k in range(6):
        coarse = torch.randn(1, 3, 3 * 2**k, 2 * 2**k, generator=g)
        out = out + torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear") / 2**(k / 2)
    return torch.sigmoid(out[0])


def test_a_photograph_gives_a_video_and_one_line_that_says_what_this_checkpoint_knows(tmp_path, capsys):
    photo = Image.fromarray((photograph_like(160, 120) * 255).byte().permute(1, 2, 0).numpy())
    photo.save(tmp_path / "photo.png")
    run(tmp_path, ref=tmp_path / "photo.png", steps="1")
    said = [line for line in "".join(capsys.readouterr()).splitlines() if "procedural world" in line]
    assert len(said) == 1 and "--checkpoint-path ltx-2.3-22b-dev.safetensors" in said[0]
    run(tmp_path, steps="1")
    assert "procedural world" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["face", "eval_encoder"])
def test_the_recognisers_tell_unseen_people_apart(name):
    net = load_facenet(WEIGHTS / f"{name}.safetensors")
    g = seeded(8)
    person = world.people("test", 48)
    views = []
    for people in (person, person, world.look_alikes(person, g)):
        pictures, boxes = face_views(people, g)
        crops = sample_crops(pictures, boxes, net.size) if name == "face" else pictures
        views.append(net(crops))
    a, b, alike = views
    first = ((a @ b.T).argmax(1) == torch.arange(48)).float().mean()
    beats = ((a * b).sum(1) > (a * alike).sum(1)).float().mean()
    assert first > 0.9 and beats > 0.9, (first, beats)


def sample_crops(pictures, boxes, size):
    from clips.face import square
    from losses import crop_faces
    return crop_faces(pictures, square(boxes), size)
