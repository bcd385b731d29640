"""The reference implementation's recorded vectors are reproduced; one wrong number is noticed.

Hardware: CPU, some seconds. Run: python -m pytest tests/test_golden.py
"""

import os
from pathlib import Path

import check_golden
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
ONE_NUMBER = {
    "transformer": "model.diffusion_model.transformer_blocks.1.attn2.q_norm.weight",
    "text_connector": "text_embedding_projection.video_aggregate_embed.bias",
    "vae_encoder": "vae.per_channel_statistics.std-of-means",
    "vae_decoder": "vae.decoder.conv_out.conv.bias",
    "gemma3": "language_model.model.layers.5.self_attn.q_norm.weight",
    "sampler": "velocity_uncond.2",
    "schedule": "train.normal",
    "rope": "small_grid.positions",
}


def test_every_recorded_vector_is_reproduced_within_1e_4(capsys):
    tokenizer = os.environ.get("GEMMA_TOKENIZER")  # Gemma 3's tokenizer.json, where it is at hand
    status = check_golden.main([str(GOLDEN), *(["--tokenizer", tokenizer] if tokenizer else [])])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0 and float(lines[-1].removeprefix("worst ")) <= 1e-4, "\n".join(lines)
    compared = {line.split()[0] for line in lines[:-1]}
    assert compared == {path.name for path in GOLDEN.iterdir()}


def changed(name: str, change, folder: Path) -> None:
    """A copy of one file with changed tensors."""
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "pt") as file:
        save_file(tensors, folder / path.name, metadata=file.metadata())


@pytest.mark.parametrize("name", ONE_NUMBER)
def test_one_wrong_number_is_noticed(name, tmp_path):
    changed(name, lambda tensors: tensors[ONE_NUMBER[name]].view(-1)[-1].add_(0.01), tmp_path)
    assert check_golden.main([str(tmp_path)]) != 0


def test_missing_weights_files_of_unknown_kind_and_empty_folders_fail(tmp_path):
    assert check_golden.main([str(tmp_path)]) != 0, "an empty folder proves nothing"
    changed("vae_decoder", lambda ts: ts.pop("vae.decoder.conv_in.conv.bias"), tmp_path)
    assert check_golden.main([str(tmp_path)]) != 0
    (tmp_path / "vae_decoder.safetensors").rename(tmp_path / "other.safetensors")
    assert check_golden.main([str(tmp_path)]) != 0, "must not pass in silence"
