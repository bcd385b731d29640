"""LoRA files: every public spelling of one LoRA gives the same output, what is read back equals
what was trained, Diffusers agrees with us, and files that do not fit are refused by name.

Hardware: CPU, seconds. Command: python -m pytest tests/test_lora.py
"""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import SMALL, build, difference, diffusers_twin, inputs
from torch import nn

import model as m
from ltx import lora
from ltx.offload import CastLinear, from_float8

# The recipe's targets, and the linears whose names differ between LTX-2.3 and Diffusers.
EVERYWHERE = (*lora.LORA_TARGETS, "to_gate_logits", "patchify_proj", "adaln_single.linear",
              "prompt_adaln_single.emb.timestep_embedder.linear_1")


def trained_lora(rank=3, alpha=6.0, targets=lora.LORA_TARGETS, std=0.3) -> m.VideoTransformer:
    model = build()
    for parameter in lora.add_lora(model, rank, alpha, targets):
        nn.init.normal_(parameter, std=std)
    return model


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return difference(found, expected) / expected.abs().max().item()


def loaded(*files, dtype: torch.dtype = torch.float32) -> m.VideoTransformer:
    model = build().to(dtype)
    for path, strength in files:
        lora.load_lora(model, path, strength)
    return model


def while_loading(*files, dtype: torch.dtype = torch.float32) -> m.VideoTransformer:
    """The same, each tensor of the base changed before it is rounded, as checkpoint.py does."""
    model = build()
    change = lora.lora_changes(model, files)
    state = {name: change(name, tensor).to(dtype) for name, tensor in model.state_dict().items()}
    model.to(dtype).load_state_dict(state)
    return model


@pytest.fixture
def two(tmp_path):
    """Two LoRAs of different rank on the same linears, neither with a scale of 1."""
    lora.save_lora(tmp_path / "a.safetensors", trained_lora(3, 6))
    lora.save_lora(tmp_path / "b.safetensors", trained_lora(2, 1))
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def test_a_fresh_lora_changes_nothing_and_is_all_that_trains():
    model, batch = build(), inputs()
    before = model(**batch)
    parameters = lora.add_lora(model, rank=4, alpha=4)
    assert torch.equal(model(**batch), before)
    state = lora.lora_state_dict(model)
    assert all((tensor.abs().max() == 0) == ("lora_B" in key) for key, tensor in state.items())
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(parameters) == 2 * 10 * SMALL.num_layers
    with pytest.raises(ValueError, match="without LoRA"):
        lora.add_lora(model)


def test_lora_runs_on_a_bf16_base():
    model = build().to(torch.bfloat16)
    parameters = lora.add_lora(model, rank=2, alpha=2)
    model(**inputs()).square().mean().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in parameters)


@pytest.mark.parametrize("how", ["bf16", "fp8", "fp8 with scales"])
def test_the_hand_written_gradient_is_that_of_ordinary_layers(how):
    """x of three axes, of a bias or none; then the first block's x, which wants no gradient."""
    torch.manual_seed(0)
    base = nn.Linear(24, 16, bias=how != "fp8")
    if how != "bf16":
        base = CastLinear(base, by_row=how != "fp8")
    layer = lora.LoRALinear(base, torch.randn(4, 24), torch.randn(16, 4), 0.7)
    weight = from_float8(base.weight, getattr(base, "scale", None), torch.float32).detach()
    for learns in (True, False):
        x, found = torch.randn(2, 5, 24, requires_grad=learns), []
        plain = lambda x: (nn.functional.linear(x, weight, base.bias)  # noqa: E731
                           + x @ layer.lora_A.T @ layer.lora_B.T * 0.7)
        for run in (layer, plain):
            layer.zero_grad()
            x.grad = None
            y = run(x)
            y.square().sum().backward()
            grads = [layer.lora_A.grad, layer.lora_B.grad] + [x.grad] * learns
            found.append([y.detach(), *grads])
        assert max(difference(a, b) / b.abs().max() for a, b in zip(*found, strict=True)) < 1e-5


def test_a_lora_saved_and_fused_equals_the_lora_that_was_trained(tmp_path):
    wrapped, batch, path = trained_lora(), inputs(), tmp_path / "lora.safetensors"
    lora.save_lora(path, wrapped, {"reference_placement": "tass"})
    state = load_file(path)
    stem = "diffusion_model.transformer_blocks.0."
    assert state[stem + "attn1.to_out.0.lora_A.weight"].shape == (3, SMALL.dim)
    assert state[stem + "ff.net.0.proj.lora_B.weight"].shape == (4 * SMALL.dim, 3)
    model = build()
    before, applied = model(**batch), wrapped(**batch)
    assert lora.load_lora(model, path, strength=0.0) == {"reference_placement": "tass"}
    assert torch.equal(model(**batch), before), "strength 0 is off"
    lora.load_lora(model, path)
    assert relative(before, applied) > 0.1, "or the comparison would mean nothing"
    assert relative(model(**batch), applied) < 1e-5
    lora.load_lora(model, path, strength=-1.0)
    assert difference(model(**batch), before) < 1e-4, "taking it away again gives the base back"


# ---------------------------------------------------------------- spellings


def to_diffusers(name: str) -> str:
    for ours, theirs in (("prompt_adaln_single", "prompt_adaln"), ("adaln_single", "time_embed"),
                         ("patchify_proj", "proj_in")):
        name = name.replace(ours, theirs)
    return name


def to_kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


SPELLINGS = {
    "official": (lambda n: "diffusion_model." + n, "lora_A", "lora_B"),
    "no prefix": (lambda n: n, "lora_A", "lora_B"),
    "checkpoint prefix": (lambda n: "model.diffusion_model." + n, "lora_A", "lora_B"),
    "diffusers": (lambda n: "transformer." + to_diffusers(n), "lora_A", "lora_B"),
    "diffusers adapter": (to_diffusers, "lora_A", "lora_B"),
    "diffusers, old": (lambda n: "transformer." + to_diffusers(n), "lora.down", "lora.up"),
    "peft": (lambda n: "base_model.model." + n, "lora_A", "lora_B"),
    "peft in memory": (lambda n: "base_model.model." + to_diffusers(n), "lora_A.default",
                       "lora_B.default"),
    "peft in diffusers": (to_diffusers, "lora_A.default", "lora_B.default"),
    "comfyui": (lambda n: "diffusion_model." + n, "lora_down", "lora_up"),
    "kohya": (to_kohya, "lora_down", "lora_up"),
    "kohya, diffusers": (lambda n: to_kohya(to_diffusers(n)), "lora_down", "lora_up"),
}


def respell(state: dict, spelling: str, alpha: float | None = None) -> dict:
    """An official state dict in another spelling; with alpha, B is divided by alpha / rank."""
    rename, down, up = SPELLINGS[spelling]
    out = {}
    for key, tensor in state.items():
        name, part = key.removeprefix("diffusion_model.").removesuffix(".weight").rsplit(".", 1)
        rank = state[key.replace("lora_B", "lora_A")].shape[0]
        tensor = tensor * rank / alpha if alpha and part == "lora_B" else tensor.clone()
        out[f"{rename(name)}.{down if part == 'lora_A' else up}.weight"] = tensor
        if alpha:
            out[f"{rename(name)}.alpha"] = torch.tensor(alpha)
    return out


def test_every_spelling_of_one_lora_gives_the_same_output(tmp_path):
    state = lora.lora_state_dict(trained_lora(targets=EVERYWHERE, std=0.1))
    path, batch = tmp_path / "lora.safetensors", inputs()
    save_file(state, path)
    expected = loaded((path, 1.0))(**batch)
    assert relative(build()(**batch), expected) > 0.1, "or the comparison would mean nothing"
    for spelling in SPELLINGS:
        for alpha, how, bound in ((None, loaded, 0), (1.5, loaded, 1e-5),
                                  (1.5, while_loading, 1e-5)):
            save_file(respell(state, spelling, alpha), path)
            # PEFT's settings mean a scale of 1 here; beside files of others they are not read
            write_settings(tmp_path, {"lora_alpha": 3 if "peft" in spelling else 99, "r": 3})
            found = relative(how((path, 1.0))(**batch), expected)
            assert found <= bound, (spelling, alpha, found)  # 1e-5: float32 rounding


# ---------------------------------------------------------------- PEFT, with its settings beside


def write_settings(folder, settings: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(settings))


PEFT_KEYS = ["base_model.model.{}.weight", "{}.default.weight"]  # as it saves, as it holds them


def peft_file(folder, settings: object, spelled: str = PEFT_KEYS[0]):
    """A LoRA of one linear, rank 3, with PEFT's names and perhaps settings; returns its path."""
    stem, path = "transformer_blocks.1.attn2.to_k.", folder / "adapter.safetensors"
    shapes = {"lora_A": (3, SMALL.dim), "lora_B": (SMALL.dim, 3)}
    save_file({spelled.format(stem + part): torch.randn(s) for part, s in shapes.items()}, path)
    if isinstance(settings, dict):
        settings = {"peft_type": "LORA", "bias": "none", "use_dora": False} | settings
    if settings is not None:
        write_settings(folder, settings)
    return path


@pytest.mark.parametrize(("settings", "scale"), [
    ({"lora_alpha": 12, "r": 3}, 12 / 3),
    ({"lora_alpha": 12, "r": 3, "use_rslora": True}, 12 / 3**0.5),
    ({"lora_alpha": 12, "r": 8, "rank_pattern": {"to_k": 3}}, 12 / 3),
    ({"lora_alpha": 12, "r": 3, "alpha_pattern": {"to_q": 5, "attn2.to_k": 6, "to_k": 7}}, 6 / 3),
    ({"lora_alpha": 12, "r": 3, "alpha_pattern": {"tn2.to_k": 5}}, 12 / 3),
    ({"lora_alpha": 12, "r": 3, "alpha_pattern": {"transformer_blocks.1.attn2.to_k": 1},
      "use_rslora": True}, 1 / 3**0.5),
    ({"lora_alpha": 12, "init_lora_weights": "gaussian", "target_modules": ["to_k"]}, 12 / 3),
])
def test_the_strength_of_a_peft_adapter_is_that_of_its_settings(settings, scale, tmp_path):
    for spelled in PEFT_KEYS:
        path = peft_file(tmp_path, settings, spelled)
        ((_, _, found),) = lora.read_lora(path, build()).pairs.values()
        assert found == pytest.approx(scale, rel=1e-6), spelled


@pytest.mark.parametrize(("settings", "words"), [
    (None, "PEFT's adapter_config.json .*, got none, and no alpha .*attn2.to_k'; put"),
    ({"r": 3}, "settings in .*adapter_config.json, got no 'lora_alpha'; "),
    ({"lora_alpha": 12, "r": 8}, r"rank out of \{8\} .*, got 3 for .*attn2.to_k'; "),
    ({"lora_alpha": 12, "use_dora": True}, "got use_dora = True in "),
    ({"lora_alpha": 12, "bias": "all"}, "got bias = all in "),
    ({"lora_alpha": 12, "fan_in_fan_out": True}, "got fan_in_fan_out = True in "),
    ({"lora_alpha": 12, "init_lora_weights": "pissa_niter_4"}, "got init_lora_weights = pissa_"),
    ({"lora_alpha": 12, "peft_type": "LOHA"}, "got peft_type = LOHA in "),
    ({"lora_alpha": 12, "of_another_year": {"a": 1}}, "got of_another_year = .* in "),
    ({"lora_alpha": 12, "alpha_pattern": {".*to_k": 5}}, "got alpha_pattern = .* in "),
    ({"lora_alpha": 12, "alpha_pattern": {"to_k": float("inf")}}, "a number for to_k in .* inf"),
    ([1], "JSON with PEFT's settings in .*adapter_config.json, got "),
])
def test_a_peft_adapter_that_is_more_than_two_matrices_is_refused(settings, words, tmp_path):
    path = peft_file(tmp_path, settings)
    with pytest.raises(ValueError, match=f"^expected .*{words}[^\n]*$"):
        lora.read_lora(path, build())


@pytest.mark.parametrize("more", [
    {}, {"use_rslora": True},
    {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_q": 3, "ff.net.2": 11}},
], ids=["plain", "rank-stabilised", "patterns"])
def test_a_peft_adapter_equals_pefts_own_merge(more, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_out.0", "ff.net.2"],
                               **more)
    adapted, batch = peft.get_peft_model(build(), settings), inputs()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path)
    expected = adapted.merge_and_unload()(**batch)
    assert relative(build()(**batch), expected) > 0.1, "or the comparison would mean nothing"
    assert relative(loaded((tmp_path / "adapter_model.safetensors", 1.0))(**batch), expected) < 1e-5


AUDIO = [
    "diffusion_model.transformer_blocks.0.audio_attn1.to_q",
    "transformer.transformer_blocks.1.audio_to_video_attn.to_k",
    "diffusion_model.av_ca_a2v_gate_adaln_single.linear",
    "transformer.av_cross_attn_video_scale_shift.linear",
    "lora_unet_av_ca_v2a_gate_adaln_single_linear",
    "diffusion_model.transformer_blocks.0.scale_shift_table_a2v_ca_video",
]


def test_keys_of_the_audio_half_are_left_out_and_counted(two):
    path, state = two[0].with_name("audio.safetensors"), load_file(two[0])
    extra = {f"{name}.lora_{part}.weight": torch.randn(3, 3) for name in AUDIO for part in "AB"}
    save_file(state | extra, path)
    read, plain = lora.read_lora(path, build()), lora.read_lora(two[0], build())
    assert (read.audio_keys, plain.audio_keys) == (2 * len(AUDIO), 0)
    assert read.pairs.keys() == plain.pairs.keys()
    save_file(extra, path)
    with pytest.raises(ValueError, match=f"none .{2 * len(AUDIO)} for audio"):
        lora.read_lora(path, build())


# ---------------------------------------------------------------- several, and while loading


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_two_loras_add_up_in_any_order_fused_afterwards_or_while_loading(two, dtype, bound):
    """Relative to the largest output: float32 rounding; bf16 keeps 8 bits through two blocks."""
    (a, b), batch, name = two, inputs(), "transformer_blocks.1.ff.net.2.weight"
    one, other, both = (loaded(*files).state_dict()[name]
                        for files in ([(a, 0.5)], [(b, -1.5)], [(a, 0.5), (b, -1.5)]))
    assert difference(both, one + other - build().state_dict()[name]) < 1e-5
    with torch.no_grad():
        exact = loaded((a, 0.5), (b, -1.5))(**batch)
        assert relative(build()(**batch), exact) > 0.1, "or the comparison would mean nothing"
        for how in (loaded, while_loading):
            result = how((b, -1.5), (a, 0.5), dtype=dtype)(**batch)
            assert result.dtype == dtype
            assert relative(result, exact) < bound, how


def test_strength_zero_and_an_empty_list_change_nothing(two):
    a, b = two
    assert lora.lora_changes(build(), []) is None
    assert lora.lora_changes(build(), [(a, 0.0), (b, 0.0)]) is None
    change, weight = lora.lora_changes(build(), [(a, 0.0), (b, 1.0)]), torch.zeros(24, 24)
    assert change("proj_out.weight", weight) is weight
    assert change("transformer_blocks.0.attn1.to_q.weight", weight).abs().max() > 0.1
    assert weight.abs().max() == 0, "the tensor read from the file stays as it is"


def test_what_the_command_line_says_of_loras_is_a_path_and_a_strength(two):
    a, b = map(str, two)
    assert lora.parse_loras([[a], [b, "-0.5"]]) == [(a, 1.0), (b, -0.5)]
    for words, message in (([a, "x"], "PATH .STRENGTH."), ([a, "nan"], "PATH .STRENGTH."),
                           ([a, "1", "2"], "PATH .STRENGTH."), (["gone"], "no file at gone")):
        with pytest.raises(ValueError, match=message):
            lora.parse_loras([words])


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
    loaders = pytest.importorskip("diffusers.loaders", reason="no second implementation installed")

    class Pipeline(loaders.LTX2LoraLoaderMixin):
        hf_device_map = None

        def __init__(self, transformer):
            self.transformer = transformer
            self.components = {"transformer": transformer}

    return Pipeline


def test_our_lora_loaded_by_diffusers_into_the_same_base_gives_the_same_output(tmp_path, loader):
    trained, batch = trained_lora(targets=EVERYWHERE, std=0.1), inputs()
    path, twin = tmp_path / "lora.safetensors", diffusers_twin(build())
    lora.save_lora(path, trained, {"reference_placement": "tass"})
    before = diffusers_output(twin, batch)
    loader(twin).load_lora_weights(str(path))
    after = diffusers_output(twin, batch)
    assert relative(before, after) > 0.1, "or the comparison would mean nothing"
    assert relative(loaded((path, 1.0))(**batch), after) < 1e-5
    assert relative(trained(**batch), after) < 1e-5


def test_a_lora_saved_by_diffusers_with_alpha_in_its_header_gives_the_same_output(tmp_path, loader):
    import peft

    batch, twin = inputs(), diffusers_twin(build())
    targets = ["to_q", "to_out.0", "ff.net.2", "time_embed.linear", "proj_in"]  # audio as well
    twin.add_adapter(peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets))
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    layers = peft.get_peft_model_state_dict(twin, adapter_name="default")
    header = twin.peft_config["default"].to_dict()
    loader.save_lora_weights(tmp_path, transformer_lora_layers=layers,
                             transformer_lora_adapter_metadata=header)
    path = next(tmp_path.glob("*.safetensors"))
    expected = diffusers_output(twin, batch)
    read = lora.read_lora(path, build())
    assert len(read.pairs) == SMALL.num_layers * 5 + 2 and read.audio_keys > 0
    assert relative(build()(**batch), expected) > 0.1, "or the comparison would mean nothing"
    assert relative(loaded((path, 1.0))(**batch), expected) < 1e-5


# ---------------------------------------------------------------- files that do not fit

Q = "diffusion_model.transformer_blocks.0.attn1.to_q."
OTHERS = {f"diffusion_model.x{i}.lora_A.weight": torch.zeros(1) for i in range(5)}
HEADERS = {"use_dora = True in": '{"lora_alpha": 4, "transformer.use_dora": true}',
           "settings in 'lora_adapter_metadata', got could": '{"lora_alpha": "much"}',
           "settings in 'lora_adapter_metadata', got no 'lora_alpha'": "{}",
           "a number for lora_alpha in .*, got nan": '{"lora_alpha": NaN}'}
BROKEN = {
    "x0.*x1.*x2.* and 2 more; ": lambda s: s | OTHERS,
    "dora_scale": lambda s: s | {Q + "dora_scale": torch.zeros(1)},
    r"one number in .*to_q.alpha.*\(2,\)": lambda s: s | {Q + "alpha": torch.ones(2)},
    "a number but 0 in .*to_q.alpha.*nan": lambda s: s | {Q + "alpha": torch.tensor(torch.nan)},
    "a number but 0 in .*to_q.alpha.*0.0": lambda s: s | {Q + "alpha": torch.tensor(0.0)},
    "proj_out.alpha' without": lambda s: s | {"diffusion_model.proj_out.alpha": torch.ones(())},
    "to_q.lora_B.weight' without": lambda s: {k: s[k] for k in s if k != Q + "lora_A.weight"},
    r"\(24, 24\).*\(3, 5\).*\(24, 3\)": lambda s: s | {Q + "lora_A.weight": torch.zeros(3, 5)},
    r"\(24, 2\); ": lambda s: s | {Q + "lora_B.weight": torch.zeros(24, 2)},
    "once.*lora_unet_transformer_blocks_0_attn1_to_k": lambda s: s | respell(s, "kohya"),
    "got none": lambda s: {},
    **dict.fromkeys(HEADERS, dict),
}


def test_a_lora_that_does_not_fit_is_refused_by_name_and_changes_nothing(tmp_path):
    state, model, path = lora.lora_state_dict(trained_lora()), build(), tmp_path / "x.safetensors"
    for message, change in BROKEN.items():
        header = {"lora_adapter_metadata": HEADERS[message]} if message in HEADERS else None
        save_file(change(state), path, header)
        with pytest.raises(ValueError, match=message):
            lora.load_lora(model, path)
        with pytest.raises(ValueError, match=message):
            lora.lora_changes(model, [(path, 0.0)])
    after, before = model.state_dict(), build().state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_targets_that_match_nothing_are_refused_and_leave_the_model_as_it_was():
    model = build()
    with pytest.raises(ValueError, match="attn9"):
        lora.add_lora(model, targets=("attn1.to_q", "attn9.to_q"))
    with pytest.raises(ValueError, match="rank"):
        lora.add_lora(model, rank=0)
    with pytest.raises(ValueError, match="add_lora"):
        lora.lora_state_dict(model)
    assert list(model.state_dict()) == list(build().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_demo_runs(capsys):
    lora._demo()
    assert "13,124,316,288 weights; its LoRA of rank 32: 163,577,856" in capsys.readouterr().out
