"""Public weights that are not ours are asked as they were trained: LTX-Best-Face-ID.

Its file is not here; what is compared are the numbers that its nodes define, written out again.
Random weights. Hardware: CPU, seconds. Run: python -m pytest tests/test_preset.py
"""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import INFERENCE, SIZES, livelier, write_tiny

import sample
from clips.pictures import load_canvas
from ltx import options
from ltx.lora import add_lora, save_lora
from model import VideoTransformer
from rope import Layout, rotary_tables

PUBLISHED = "Best_FaceID_v1.0_LoRA.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("tiny"), metadata={})  # as LTX-2.3: says nothing
    model = VideoTransformer(SIZES)
    add_lora(model, rank=2, alpha=2)
    livelier(model)
    save_lora(folder / PUBLISHED, model)
    save_lora(folder / "other.safetensors", model)
    save_lora(folder / "ours-best-face-id.safetensors", model, {"reference_placement": "tass"})
    return folder


def asked(tiny, tmp_path, *words: object) -> dict:
    """The arguments in the record of a run."""
    given = ["--ref", tiny / "face.png", "--prompt", "red light", "--loop-seconds", "0",
             "--checkpoint-path", tiny / "model.safetensors", "--gemma-root", tiny / "gemma",
             "--device", "cpu", "--output-path", tmp_path / "o.mp4", "--num-inference-steps", "1",
             *words]
    assert sample.main([str(word) for word in given]) == 0
    return json.loads((tmp_path / "o.json").read_text())["arguments"]


SCHEME = {"preset": "best-face-id", "placement": "overlap_phase", "order": "two_deltas",
          "text_scale": 4.0, "ref_scale": 3.0, "canvas": "crop", "prompt": "ref_t2v: red light"}
PLAIN = {"preset": "none", "canvas": "letterbox", "prompt": "red light", "placement": "tass",
         "text_scale": INFERENCE["text_scale"], "ref_scale": INFERENCE["ref_scale"]}


@pytest.mark.parametrize(("words", "found"), [
    (("--lora", PUBLISHED), SCHEME),
    (("--lora", "other.safetensors", "--preset", "best-face-id"), SCHEME),
    (("--lora", PUBLISHED, "--preset", "none"), PLAIN | {"order": "two_deltas"}),
    (("--lora", "other.safetensors"), PLAIN | {"order": "two_deltas"}),
    (("--lora", "ours-best-face-id.safetensors"), PLAIN | {"order": "text_first"}),
    ((), PLAIN | {"order": "text_first"}),
    (("--lora", PUBLISHED, "--text-scale", "1.5", "--ref-scale", "2.5", "--order", "text_first",
      "--canvas", "letterbox", "--placement", "overlap", "--prompt", "ref_t2v: red light"),
     SCHEME | {"text_scale": 1.5, "ref_scale": 2.5, "order": "text_first", "canvas": "letterbox",
               "placement": "overlap"})])
def test_name_header_and_flags_decide_how_weights_are_asked(tiny, tmp_path, capsys, words, found):
    words = [tiny / word if word.endswith(".safetensors") else word for word in words]
    record = asked(tiny, tmp_path, *words)
    assert {name: record[name] for name in found} == found
    told = capsys.readouterr().out
    assert ("says that it was trained with references" in told) == (
        found["preset"] == "none" and not any("ours" in str(word) for word in words))


def test_the_rotation_is_the_published_one(tiny, tmp_path):
    """phase[d] = value * 10000^(-d/L) on top of the ordinary rotation of frame 0, every head."""
    layout = Layout(F=3, H=2, W=4, placement=options.PRESETS["best-face-id"]["placement"])
    dim, heads = 96, 4
    L, value = dim // heads // 2, 2.0 * 1.0  # half the head's width; source_id x phase_scale
    both = torch.cat([layout.video_positions(), layout.reference_positions()], dim=1)[None]
    cos, sin = rotary_tables(both, dim, heads)
    found = torch.complex(cos, sin)                                        # (1, 4, 24 + 8, 12)
    plain = torch.complex(*rotary_tables(Layout(F=3, H=2, W=4).video_positions()[None], dim, heads))
    assert torch.equal(found[:, :, :24], plain), "video tokens are not turned"
    phase = [value * 10000 ** (-d / L) for d in range(L)]
    turned = plain[:, :, :8] * torch.tensor([complex(math.cos(p), math.sin(p)) for p in phase])
    assert phase[0] == 2.0 and (found[:, :, 24:] - turned).abs().max() < 2e-6


def test_the_model_sees_a_clean_reference_on_frame_0_also_beside_the_negative_prompt(
        tiny, tmp_path, monkeypatch):
    calls, load = [], sample.load_transformer

    def noting(*args):
        model = load(*args)
        model.register_forward_pre_hook(lambda _, given: calls.append(given))
        return model
    monkeypatch.setattr(sample, "load_transformer", noting)
    asked(tiny, tmp_path, "--lora", tiny / PUBLISHED)
    assert len(calls) == 3
    (_, times, _, places, prompt), (_, alone, _, _, same), (_, kept, _, _, negative) = calls
    R = 16                                                                 # 4 x 4 cells a frame
    (video, L), (clean, count) = times                                     # noise levels, by run
    assert count == R and clean.eq(0).all() and video.eq(1).all()
    assert torch.equal(places[0, :3, -R:], places[0, :3, :R]), "frame 0's places"
    assert places[0, 3, :-R].eq(0).all() and places[0, 3, -R:].eq(2).all()
    assert torch.equal(prompt, same) and not torch.equal(prompt, negative)
    assert [n for _, n in alone] == [L] and [n for _, n in kept] == [L, R]
    # v_RT + 3 (v_RT - v_R) + 2 (v_RT - v_T), as the nodes' sampler adds it up
    weights = json.loads((tmp_path / "o.json").read_text())["arguments"]["streams"]
    assert weights == {"text+face": 6.0, "text": -2.0, "face": -3.0}


@pytest.mark.parametrize("size", [(48, 96), (96, 40)])
def test_a_crop_is_the_middle_of_the_picture_without_a_border(tmp_path, size):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    side = min(size)
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    middle = torch.from_numpy(pixels[top:top + side, left:left + side]).permute(2, 0, 1)
    found = load_canvas(tmp_path / "a.png", side, side, crop=True)
    assert torch.equal(((found + 1) * 127.5).round().to(torch.uint8), middle)
