"""The recorded vectors of the reference implementation are reproduced, and the comparison notices one wrong weight.

Hardware: CPU, some seconds. Run: python -m pytest tests/test_golden.py
"""

import os
import shutil
from pathlib import Path

import check_golden
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
WEIGHT_OF_FILE = {
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
    tokenizer = os.environ.get("GEMMA_TOKENIZER")  # compared only where Gemma 3's tokenizer.json is at hand
    status = check_golden.main([str(GOLDEN)] + (["--tokenizer", tokenizer] if tokenizer else []))
    lines = capsys.readouterr().out.splitlines()
    worst = float(lines[-1].removeprefix("worst "))
    print(lines[-1])
    assert status == 0 and worst <= 1e-4, "\n".join(lines)
    compared = {line.split()[0] for line in lines[:-1]}
    present = {path.name for path in GOLDEN.iterdir() if path.suffix in (".safetensors", ".json")}
    assert compared == present, f"not compared: {present - compared}"


def copy_changed(name: str, tensor: str, folder: Path) -> None:
    """Copy one file, with 0.01 added to the last number of one tensor."""
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    tensors[tensor].view(-1)[-1] += 0.01
    with safe_open(path, "pt") as file:
        save_file(tensors, folder / path.name, metadata=file.metadata())


@pytest.mark.parametrize("name", WEIGHT_OF_FILE)
def test_one_wrong_number_is_noticed(name, tmp_path, capsys):
    copy_changed(name, WEIGHT_OF_FILE[name], tmp_path)
    assert check_golden.main([str(tmp_path)]) != 0, capsys.readouterr().out


def test_missing_weights_wrong_ids_and_empty_folders_fail(tmp_path, capsys):
    assert check_golden.main([str(tmp_path)]) != 0, "an empty folder proves nothing"
    path = GOLDEN / "vae_decoder.safetensors"
    tensors = load_file(path)
    del tensors["vae.decoder.conv_in.conv.bias"]
    with safe_open(path, "pt") as file:
        save_file(tensors, tmp_path / path.name, metadata=file.metadata())
    assert check_golden.main([str(tmp_path)]) != 0
    (tmp_path / path.name).unlink()
    shutil.copyfile(GOLDEN / "rope.safetensors", tmp_path / "other.safetensors")
    assert check_golden.main([str(tmp_path)]) != 0, "a file of unknown kind must not pass in silence"
    capsys.readouterr()
