"""LoRA files: every public spelling of one LoRA gives the same output, fused equals applied, Diffusers' own loader and
saver agree with ours, and files that do not fit are refused by name before a weight changes.

Hardware: CPU, seconds. Run: python -m pytest tests/test_lora.py
"""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import PREFIX, SMALL, build, difference, diffusers_twin, inputs

import model as m
from ltx import checkpoint, lora

# The recipe's targets, and the linears whose names differ between LTX-2.3 and Diffusers.
EVERYWHERE = lora.LORA_TARGETS + ("to_gate_logits", "patchify_proj", "adaln_single.linear", "proj_out")
EVERYWHERE += ("prompt_adaln_single.emb.timestep_embedder.linear_1", "transformer_blocks.1.ff.net.2")


def trained_lora(rank: int = 3, alpha: float = 6, targets=lora.LORA_TARGETS, std: float = 0.3) -> m.VideoTransformer:
    model = build()
    for parameter in lora.add_lora(model, rank=rank, alpha=alpha, targets=targets):
        torch.nn.init.normal_(parameter, std=std)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return difference(found, expected) / expected.abs().max().item()


def loaded(*files, fuse: bool = True, dtype: torch.dtype = torch.float32) -> m.VideoTransformer:
    model = build().to(dtype)
    for path, strength in files:
        lora.load_lora(model, path, strength, fuse=fuse)
    return model


def through_checkpoint(folder, *files, dtype: torch.dtype | None = None) -> m.VideoTransformer:
    """The same, fused while the base is read from its file."""
    path = folder / "base.safetensors"
    checkpoint.write_file(path, {PREFIX + name: tensor for name, tensor in build().state_dict().items()}, {})
    with torch.device("meta"):
        model = m.VideoTransformer(SMALL)
    return checkpoint.load_weights(model, path, PREFIX, dtype, change=lora.lora_changes(model, files))


@pytest.fixture
def two(tmp_path):
    """Two different LoRAs of different rank on the same linears."""
    lora.save_lora(tmp_path / "a.safetensors", trained_lora(3, 6))
    lora.save_lora(tmp_path / "b.safetensors", trained_lora(2, 2))
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


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


# ---------------------------------------------------------------- spellings


def to_diffusers(name: str) -> str:
    for ours, theirs in (
        ("prompt_adaln_single", "prompt_adaln"),
        ("adaln_single", "time_embed"),
        ("patchify_proj", "proj_in"),
    ):
        name = name.replace(ours, theirs)
    return name


def to_kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


SPELLINGS = {
    "official": (lambda n: "diffusion_model." + n, "lora_A.weight", "lora_B.weight"),
    "no prefix": (lambda n: n, "lora_A.weight", "lora_B.weight"),
    "checkpoint prefix": (lambda n: "model.diffusion_model." + n, "lora_A.weight", "lora_B.weight"),
    "diffusers": (lambda n: "transformer." + to_diffusers(n), "lora_A.weight", "lora_B.weight"),
    "diffusers adapter": (to_diffusers, "lora_A.weight", "lora_B.weight"),
    "diffusers, old": (lambda n: "transformer." + to_diffusers(n), "lora.down.weight", "lora.up.weight"),
    "peft": (lambda n: "base_model.model." + n, "lora_A.weight", "lora_B.weight"),
    "peft in memory": (lambda n: "base_model.model." + to_diffusers(n), "lora_A.default.weight", "lora_B.default.weight"),
    "peft, prefix": (lambda n: "base_model.model.diffusion_model." + n, "lora_A.weight", "lora_B.weight"),
    "comfyui": (lambda n: "diffusion_model." + n, "lora_down.weight", "lora_up.weight"),
    "kohya": (to_kohya, "lora_down.weight", "lora_up.weight"),
    "kohya, diffusers": (lambda n: to_kohya(to_diffusers(n)), "lora_down.weight", "lora_up.weight"),
}


def respell(state: dict, spelling: str, alpha: float | None = None) -> dict:
    """An official state dict in another spelling; with alpha, B is divided by alpha / rank and alpha written beside."""
    rename, down, up = SPELLINGS[spelling]
    out = {}
    for key, tensor in state.items():
        stem, part = key.removeprefix("diffusion_model.").removesuffix(".weight").rsplit(".", 1)
        rank = state[key.replace("lora_B", "lora_A")].shape[0]
        tensor = tensor * rank / alpha if alpha and part == "lora_B" else tensor.clone()
        out[f"{rename(stem)}.{down if part == 'lora_A' else up}"] = tensor
        if alpha:
            out[f"{rename(stem)}.alpha"] = torch.tensor(alpha)
    return out


@pytest.mark.parametrize("alpha", [None, 1.5], ids=["no alpha", "alpha"])
@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_every_spelling_of_one_lora_gives_the_same_output(tmp_path, spelling, alpha):
    state = lora.lora_state_dict(trained_lora(targets=EVERYWHERE, std=0.1))
    save_file(state, tmp_path / "official.safetensors")
    save_file(respell(state, spelling, alpha), tmp_path / "other.safetensors")
    batch = inputs()
    expected = loaded((tmp_path / "official.safetensors", 1.0))(**batch)
    assert relative(build()(**batch), expected) > 0.1, "the LoRA must matter for the comparison to mean anything"
    found = relative(loaded((tmp_path / "other.safetensors", 1.0))(**batch), expected)
    assert found < 1e-5, found  # float32 rounding; exactly 0 without alpha
    assert alpha or found == 0


def test_two_spellings_of_one_linear_in_one_file_are_refused(tmp_path):
    state = lora.lora_state_dict(trained_lora())
    save_file(state | respell(state, "kohya"), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="once.*lora_unet_transformer_blocks_0_attn1_to_k"):
        loaded((tmp_path / "lora.safetensors", 1.0))


AUDIO = [
    "diffusion_model.transformer_blocks.0.audio_attn1.to_q",
    "diffusion_model.transformer_blocks.1.video_to_audio_attn.to_out.0",
    "transformer.transformer_blocks.1.audio_to_video_attn.to_k",
    "diffusion_model.audio_adaln_single.linear",
    "diffusion_model.av_ca_video_scale_shift_adaln_single.linear",
    "diffusion_model.av_ca_a2v_gate_adaln_single.linear",
    "transformer.av_cross_attn_video_scale_shift.linear",
    "lora_unet_av_ca_v2a_gate_adaln_single_linear",
    "lora_unet_transformer_blocks_0_audio_ff_net_2",
    "diffusion_model.transformer_blocks.0.scale_shift_table_a2v_ca_video",
    "diffusion_model.transformer_blocks.0.scale_shift_table_v2a_ca_video",
]


def test_keys_of_the_audio_half_are_left_out_and_counted(two):
    path, _ = two
    state = load_file(path)
    extra = {f"{name}.lora_{part}.weight": torch.randn(3, 3) for name in AUDIO for part in "AB"}
    save_file(state | extra, path.with_name("with_audio.safetensors"))
    read = lora.read_lora(path.with_name("with_audio.safetensors"), build())
    assert read.audio_keys == 2 * len(AUDIO)
    assert lora.read_lora(path, build()).audio_keys == 0
    batch = inputs()
    assert torch.equal(loaded((path.with_name("with_audio.safetensors"), 1.0))(**batch), loaded((path, 1.0))(**batch))
    save_file(extra, path.with_name("only_audio.safetensors"))
    with pytest.raises(ValueError, match=f"none .{2 * len(AUDIO)} for audio"):
        lora.read_lora(path.with_name("only_audio.safetensors"), build())


# ---------------------------------------------------------------- several, fused, applied, while loading


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("strengths", [(1.0, 0.0), (0.5, -1.5)], ids=["one", "two"])
def test_fused_equals_applied_equals_fused_while_loading(tmp_path, two, dtype, bound, strengths):
    """Bounds relative to the largest output: float32 rounding; bf16 keeps 8 bits (0.4 %) through two blocks."""
    files = list(zip(two, strengths, strict=True))
    batch = inputs()
    with torch.no_grad():
        exact = loaded(*files)(**batch)
        results = {
            "fused": loaded(*files, dtype=dtype)(**batch),
            "applied": loaded(*files, fuse=False, dtype=dtype)(**batch),
            "while loading": through_checkpoint(tmp_path, *files, dtype=dtype)(**batch),
        }
        assert relative(build()(**batch), exact) > 0.1, "the LoRA must matter for the comparison to mean anything"
    for how, result in results.items():
        assert result.dtype == dtype
        found = relative(result, exact)
        print(how, dtype, found)
        assert found < bound, (how, found)


def test_two_loras_add_up_and_their_order_does_not_matter(tmp_path, two):
    a, b = two
    name = "transformer_blocks.1.ff.net.2"
    base = build().get_submodule(name).weight.detach()

    def moved(*files):
        return loaded(*files).get_submodule(name).weight.detach() - base

    both = moved((a, 0.7), (b, 2.0))
    assert both.abs().max() > 0.1
    assert difference(both, moved((a, 0.7)) + moved((b, 2.0))) < 1e-5
    assert difference(both, moved((b, 2.0), (a, 0.7))) < 1e-5
    reordered = through_checkpoint(tmp_path, (b, 2.0), (a, 0.7)).get_submodule(name).weight.detach() - base
    assert difference(both, reordered) < 1e-5
    # Stacked LoRAs are saved as one whose rank is the sum.
    stacked = loaded((a, 0.7), (b, 2.0), fuse=False)
    assert not any(p.requires_grad for key, p in stacked.named_parameters() if "lora_" in key)
    lora.save_lora(tmp_path / "sum.safetensors", stacked)
    assert load_file(tmp_path / "sum.safetensors")[f"diffusion_model.{name}.lora_A.weight"].shape[0] == 5
    assert difference(both, moved((tmp_path / "sum.safetensors", 1.0))) < 1e-5


def test_strength_zero_and_an_empty_list_change_nothing(two):
    a, b = two
    assert lora.lora_changes(build(), []) is None
    assert lora.lora_changes(build(), [(a, 0.0), (b, 0.0)]) is None
    assert not any(isinstance(module, lora.LoRALinear) for module in loaded((a, 0.0), fuse=False).modules())
    change = lora.lora_changes(build(), [(a, 0.0), (b, 1.0)])
    untouched = torch.randn(4)
    assert change("transformer_blocks.0.attn1.to_q.bias", untouched) is untouched
    assert change("proj_out.weight", untouched) is untouched
    weight = torch.zeros(SMALL.dim, SMALL.dim)
    assert change("transformer_blocks.0.attn1.to_q.weight", weight).abs().max() > 0.1
    assert weight.abs().max() == 0, "the tensor read from the file stays as it is"


class OddLinear(torch.nn.Module):
    """A linear that is no nn.Linear: all that LoRALinear asks for is weight, in_features, out_features and a call."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_lora_works_on_linears_of_another_class(two, fuse):
    model, batch = build(), inputs()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, OddLinear(module))
    lora.load_lora(model, two[0], fuse=fuse)
    found = relative(model(**batch), loaded((two[0], 1.0))(**batch))
    assert found < 1e-5, found


# ---------------------------------------------------------------- Diffusers' own loader and saver


def diffusers_output(twin, batch) -> torch.Tensor:
    """The twin's video output without sound; its audio half gets zeros."""
    B, audio = len(batch["sigma"]), twin.config
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return twin(
            hidden_states=batch["latent"],
            audio_hidden_states=torch.zeros(B, 3, audio.audio_in_channels),
            encoder_hidden_states=batch["context"],
            audio_encoder_hidden_states=torch.zeros(B, 5, audio.audio_cross_attention_dim),
            timestep=batch["timesteps"] * 1000,
            audio_timestep=torch.zeros(B, 3),
            sigma=batch["sigma"] * 1000,
            video_coords=batch["positions"],
            audio_num_frames=3,
            isolate_modalities=True,
            use_cross_timestep=True,
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def loader():
    """Diffusers' LoRA methods of the LTX-2 pipeline, without the rest of the pipeline."""
    pytest.importorskip("peft", reason="Diffusers loads LoRA with it")
    loaders = pytest.importorskip("diffusers.loaders", reason="the second implementation is not installed")

    class Pipeline(loaders.LTX2LoraLoaderMixin):
        hf_device_map = None

        def __init__(self, transformer):
            self.transformer = transformer
            self.components = {"transformer": transformer}

    return Pipeline


def test_our_lora_loaded_by_diffusers_into_the_same_base_gives_the_same_output(tmp_path, loader):
    trained, batch = trained_lora(targets=EVERYWHERE, std=0.1), inputs()
    lora.save_lora(tmp_path / "lora.safetensors", trained, {"reference_placement": "tass"})
    twin = diffusers_twin(build())
    before = diffusers_output(twin, batch)
    loader(twin).load_lora_weights(str(tmp_path / "lora.safetensors"))
    after = diffusers_output(twin, batch)
    ours = loaded((tmp_path / "lora.safetensors", 1.0))(**batch)
    found = relative(ours, after), relative(trained(**batch), after)
    print("ours and diffusers'", found, "moved by", relative(before, after))
    assert relative(before, after) > 0.1, "the LoRA must matter for the comparison to mean anything"
    assert max(found) < 1e-5, found


@pytest.mark.parametrize("how", ["save_lora_adapter", "save_lora_weights", "save_lora_weights without its header"])
def test_a_lora_saved_by_diffusers_gives_the_same_output_here(tmp_path, loader, how):
    """Diffusers puts alpha into the header; its pipeline's saver does so only when asked, so alpha = rank there."""
    import peft

    batch = inputs()
    twin = diffusers_twin(build())
    targets = ["to_q", "to_out.0", "ff.net.2", "time_embed.linear", "proj_in"]  # of the audio half as well
    alpha = 3 if "without" in how else 7
    twin.add_adapter(peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=targets))
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if how == "save_lora_adapter":
        twin.save_lora_adapter(tmp_path)
    else:
        header = {} if "without" in how else {"transformer_lora_adapter_metadata": twin.peft_config["default"].to_dict()}
        layers = peft.get_peft_model_state_dict(twin, adapter_name="default")
        loader.save_lora_weights(tmp_path, transformer_lora_layers=layers, **header)
    path = next(tmp_path.glob("*.safetensors"))
    expected = diffusers_output(twin, batch)
    found = relative(loaded((path, 1.0))(**batch), expected)
    read = lora.read_lora(path, build())
    print(how, found, f"{len(read.pairs)} linears, {read.audio_keys} audio keys")
    assert found < 1e-5, found
    assert relative(build()(**batch), expected) > 0.1, "the LoRA must matter for the comparison to mean anything"
    assert len(read.pairs) == SMALL.num_layers * 5 + 2 and read.audio_keys > 0


# ---------------------------------------------------------------- files that do not fit

Q = "diffusion_model.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"diffusion_model.nowhere.lora_A.weight": torch.zeros(1, 1)}), "nowhere"),
        (lambda s: s.update({f"diffusion_model.x{i}.lora_A.weight": torch.zeros(1) for i in range(5)}), "x0.*x2.*2 more"),
        (lambda s: s.update({"diffusion_model.transformer_blocks.0.attn1.to_q.alpha": torch.ones(2)}), "to_q.alpha"),
        (lambda s: s.update({"diffusion_model.proj_out.alpha": torch.ones(())}), "proj_out.alpha"),
        (lambda s: s.update({f"{Q}.dora_scale": torch.zeros(1)}), "dora_scale"),
        (lambda s: s.update({f"{Q}.diff_b": torch.zeros(1)}), "diff_b"),
        (lambda s: s.update({f"text_encoders.{Q}.lora_A.weight": torch.zeros(1)}), "text_encoders"),
        (lambda s: s.update({"diffusion_model.scale_shift_table": torch.zeros(1)}), "scale_shift_table"),
        (lambda s: s.pop("diffusion_model.transformer_blocks.1.attn2.to_k.lora_B.weight"), "1.attn2.to_k.lora_A"),
        (lambda s: s.pop("diffusion_model.transformer_blocks.1.attn2.to_k.lora_A.weight"), "1.attn2.to_k.lora_B"),
        (lambda s: s.update({f"{Q}.lora_A.weight": torch.zeros(3, 5)}), r"\(24, 24\).*to_q.lora_A.*\(3, 5\).*\(24, 3\)"),
        (lambda s: s.update({f"{Q}.lora_B.weight": torch.zeros(24, 2)}), r"to_q.lora_B.weight' \(24, 2\)"),
        (lambda s: s.update({f"{Q}.lora_A.weight": torch.zeros(3, 24, 1)}), r"\(3, 24, 1\)"),
        (lambda s: s.clear(), "none"),
    ],
)
@pytest.mark.parametrize("fuse", [True, False])
def test_a_lora_that_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path, change, message, fuse):
    state = lora.lora_state_dict(trained_lora())
    change(state)
    save_file(state, tmp_path / "lora.safetensors")
    model = build()
    with pytest.raises(ValueError, match=message):
        lora.load_lora(model, tmp_path / "lora.safetensors", fuse=fuse)
    with pytest.raises(ValueError, match=message):
        lora.lora_changes(model, [(tmp_path / "lora.safetensors", 0.0)])
    after, before = model.state_dict(), build().state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "JSON"),
        ("[]", "JSON"),
        (json.dumps({"lora_alpha": "much"}), "JSON"),
        (json.dumps({"lora_alpha": 4, "use_rslora": True}), "use_rslora"),
        (json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"to_q": 2}}), "alpha_pattern"),
    ],
)
def test_a_header_that_describes_something_else_is_refused(tmp_path, entry, message):
    lora.save_lora(tmp_path / "lora.safetensors", trained_lora(), {"lora_adapter_metadata": entry})
    with pytest.raises(ValueError, match=message):
        loaded((tmp_path / "lora.safetensors", 1.0))


def test_lora_targets_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match="attn9"):
        lora.add_lora(build(), targets=("attn1.to_q", "attn9.to_q"))
    with pytest.raises(ValueError, match="rank"):
        lora.add_lora(build(), rank=0)
    with pytest.raises(ValueError, match="add_lora"):
        lora.lora_state_dict(build())


def test_targets_that_match_nothing_leave_the_model_as_it_was():
    model = build()
    with pytest.raises(ValueError, match="attn9"):
        lora.add_lora(model, targets=("attn1.to_q", "attn9.to_q"))
    assert list(model.state_dict()) == list(build().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_demo_runs(capsys):
    lora._demo()
    assert "163,577,856" in capsys.readouterr().out
