"""LoRA files: what is saved loads again, fused equals applied, and files that do not fit are refused by name.

Hardware: CPU, seconds. Run: python -m pytest tests/test_lora.py
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import SMALL, build, difference, inputs

import lora
import model as m


def trained_lora(rank: int = 3, alpha: float = 6) -> m.VideoTransformer:
    model = build()
    for parameter in lora.add_lora(model, rank=rank, alpha=alpha):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_a_fresh_lora_changes_nothing_and_is_all_that_trains():
    model, batch = build(), inputs()
    before = model(**batch)
    parameters = lora.add_lora(model, rank=4, alpha=4)
    assert torch.equal(model(**batch), before)
    state = lora.lora_state_dict(model)
    assert all(tensor.abs().max() == 0 for key, tensor in state.items() if "lora_B" in key)
    assert all(tensor.abs().max() > 0 for key, tensor in state.items() if "lora_A" in key)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(parameters) == 2 * 10 * SMALL.num_layers
    with pytest.raises(ValueError, match="without LoRA"):
        lora.add_lora(model)


def test_a_saved_lora_has_the_names_and_shapes_of_the_public_format(tmp_path):
    lora.save_lora(tmp_path / "lora.safetensors", trained_lora(), {"reference_placement": "tass"})
    state = load_file(tmp_path / "lora.safetensors")
    stem = "diffusion_model.transformer_blocks.0."
    assert state[stem + "attn1.to_out.0.lora_A.weight"].shape == (3, SMALL.dim)
    assert state[stem + "ff.net.0.proj.lora_B.weight"].shape == (4 * SMALL.dim, 3)
    assert not [key for key in state if "alpha" in key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_saved_and_fused_equals_the_lora_applied(tmp_path, dtype):
    wrapped, batch = trained_lora(), inputs()
    path = tmp_path / "lora.safetensors"
    lora.save_lora(path, wrapped, {"reference_placement": "tass"}, dtype)
    fused = build()
    before = fused(**batch)
    assert lora.load_lora(fused, path, strength=0.0) == {"reference_placement": "tass"}
    assert torch.equal(fused(**batch), before), "strength 0 is off"
    lora.load_lora(fused, path)
    applied = wrapped(**batch)
    found = difference(fused(**batch), applied) / applied.abs().max().item()
    assert difference(applied, before) > 0.1, "the LoRA must matter for the comparison to mean anything"
    assert found < (1e-5 if dtype == torch.float32 else 5e-2), found
    lora.load_lora(fused, path, strength=-1.0)
    assert difference(fused(**batch), before) < 1e-4, "taking it away again gives the base back"


def test_lora_runs_on_a_bf16_base():
    model = build().to(torch.bfloat16)
    parameters = lora.add_lora(model, rank=2, alpha=2)
    model(**inputs()).square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"diffusion_model.nowhere.lora_A.weight": torch.zeros(1, 1)}), "nowhere"),
        (lambda s: s.update({"attn1.to_q.alpha": torch.zeros(1)}), "attn1.to_q.alpha"),
        (lambda s: s.pop("diffusion_model.transformer_blocks.1.attn2.to_k.lora_B.weight"), "1.attn2.to_k.lora_B"),
        (
            lambda s: s.update({"diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(3, 5)}),
            "0.attn1.to_q.lora_A",
        ),
        (lambda s: s.clear(), "none"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, change, message):
    state = lora.lora_state_dict(trained_lora())
    change(state)
    save_file(state, tmp_path / "lora.safetensors")
    model = build()
    with pytest.raises(ValueError, match=message):
        lora.load_lora(model, tmp_path / "lora.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), build().parameters(), strict=True))


def test_lora_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="attn9"):
        lora.add_lora(build(), targets=("attn1.to_q", "attn9.to_q"))
    with pytest.raises(ValueError, match="rank"):
        lora.add_lora(build(), rank=0)
    with pytest.raises(ValueError, match="add_lora"):
        lora.lora_state_dict(build())
