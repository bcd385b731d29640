"""What is shown: the bundled checkpoint is LTX-2.3's format, and it makes the README's video.

Hardware: CPU, under half a minute. Command: python -m pytest tests/test_bundled.py
"""

import json
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from ltx.checkpoint import open_file, read_metadata
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, check_text
from ltx.vae import VideoVAE
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer
from toy import world

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "weights" / "tiny"
PROMPT = "a person in a red shirt turns left in a park, in daylight"


def run(folder, *words, ref=ROOT / "examples" / "ada.png", prompt=PROMPT, steps=2):
    """The sheet of a video: the reference, then its frames."""
    path = folder / "out.mp4"
    assert sample.main(["--ref", str(ref), "--prompt", prompt, "--output-path", str(path),
                        "--num-inference-steps", str(steps), *words]) == 0
    return np.asarray(Image.open(path.with_suffix(".png"))).astype(int)


def test_the_files_are_small_and_an_ltx_checkpoint_that_says_where_the_reference_was():
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 16 * 2**20
    metadata = read_metadata(WEIGHTS / "model.safetensors")
    assert metadata["reference_placement"] == "tass" and metadata["model_version"] == "2.3.0"
    base = read_metadata(WEIGHTS / "base.safetensors")
    for told in (metadata, base):
        assert json.loads(told["known_phrases"]) == world.phrases()
    with torch.device("meta"):
        config = TransformerConfig.from_checkpoint(metadata["config"]["transformer"])
        parts = {TRANSFORMER_PREFIX: VideoTransformer(config),
                 "vae.": VideoVAE(metadata["config"]["vae"])}
    extractor, connector, _, _ = check_text(WEIGHTS / "model.safetensors", WEIGHTS / "gemma")
    parts |= {EXTRACTOR_PREFIX: extractor, CONNECTOR_PREFIX: connector}
    expected = {prefix + name for prefix, part in parts.items() for name in part.state_dict()}
    with open_file(WEIGHTS / "model.safetensors") as file:
        assert set(file.keys()) == expected


def test_face_prompt_and_reference_scale_each_change_a_video_that_plays(tmp_path):
    plain = run(tmp_path)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
        found = stream.codec_context.name, stream.width, stream.height, frames
    assert found == ("h264", 384, 384, 3 * 9)  # 1.1 s, three times over
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["arguments"]["placement"] == "tass"
    for what, other in {
        "face": run(tmp_path, ref=ROOT / "examples" / "ben.png"),
        "prompt": run(tmp_path, prompt="a person in a blue shirt laughs at night, in daylight"),
        "reference scale": run(tmp_path, "--ref-scale", "0"),
    }.items():
        change = np.abs(other - plain)[:, 388:].mean()  # right of the reference
        assert change > 3, (what, change)


def test_words_that_it_never_read_are_named_and_captions_with_parts_left_out_are_not(tmp_path,
                                                                                     capsys):
    for prompt, told in (("an astronaut rides a horse", "astronaut, rides, horse; "),
                         (f"{PROMPT}, with a beard", "with, beard; "), ("someone nods", None),
                         ("a person wearing a black shirt, in pink light", None)):
        assert sample.main(["--ref", str(ROOT / "examples" / "ada.png"), "--prompt", prompt,
                            "--output-path", str(tmp_path / "out.mp4"), "--dry-run"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "never read" in line]
        assert len(lines) == bool(told) and all(f"never read: {told}" in line for line in lines)


def test_a_photograph_gives_a_video_and_one_line_about_what_this_checkpoint_knows(tmp_path, capsys):
    photo, generator = 0, torch.Generator().manual_seed(5)
    for k in range(6):  # as in photographs: detail at every scale, weaker at the finer ones
        coarse = torch.randn(1, 3, 3 * 2**k, 2 * 2**k, generator=generator)
        photo = photo + F.interpolate(coarse, (160, 120), mode="bilinear") / 2 ** (k / 2)
    pixels = (torch.sigmoid(photo[0]) * 255).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    run(tmp_path, ref=tmp_path / "photo.png", steps=1)
    told = "".join(capsys.readouterr()).splitlines()
    said = [line for line in told if "procedural world" in line]
    assert len(said) == 1 and "--checkpoint-path ltx-2.3-22b-dev.safetensors" in said[0]
    run(tmp_path, steps=1)
    assert "procedural world" not in "".join(capsys.readouterr())
