"""The transformer equals LTX-2.3's: on recorded vectors, and against Diffusers on random sizes and weights.
Besides: schedules and guidance, masks and permutations, precision, checkpoint files, and what the demo's picture shows.

Hardware: CPU, under half a minute. Run: python -m pytest tests/test_model.py
"""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as m
from ltx import checkpoint as c
from rope import grid_to_positions, reference_grid, video_grid

GOLDEN = Path(__file__).parent / "golden"
PREFIX = "model.diffusion_model."
CASES = ["t2v", "per_token", "ref_append", "ref_custom_pos", "attn_mask", "context_mask", "stg_block1"]
SMALL = m.TransformerConfig(in_channels=6, out_channels=6, num_layers=2, heads=2, head_dim=12)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a.float() - b.float()).abs().max().item()


def build(config: m.TransformerConfig = SMALL, seed: int = 0) -> m.VideoTransformer:
    """A random transformer in which every tensor matters: tables and norms are moved away from their start."""
    torch.manual_seed(seed)
    model = m.VideoTransformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "table" in name:
                parameter.normal_(std=0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def inputs(config: m.TransformerConfig = SMALL, B: int = 2, F: int = 2, H: int = 2, W: int = 3, N: int = 5) -> dict:
    """Video and TASS reference tokens: random noise levels for the video, 0 for the reference."""
    grid = torch.cat([video_grid(F, H, W), reference_grid(F, H, W)])
    L, S = F * H * W, len(grid)
    timesteps = torch.rand(B, S)
    timesteps[:, L:] = 0
    return {
        "latent": torch.randn(B, S, config.in_channels),
        "timesteps": timesteps,
        "sigma": torch.rand(B),
        "positions": grid_to_positions(grid, 24)[None].repeat(B, 1, 1, 1),
        "context": torch.randn(B, N, config.dim),
    }


# ---------------------------------------------------------------- equality with other implementations


@pytest.fixture(scope="module")
def golden():
    path = GOLDEN / "transformer.safetensors"
    config = c.read_metadata(path)["config"]
    with torch.device("meta"):
        model = m.VideoTransformer(m.TransformerConfig.from_checkpoint(config["transformer"]))
    return c.load_weights(model, path, PREFIX), load_file(path), config["io"]


@pytest.mark.parametrize("grad", [True, False], ids=["per_token_rows", "rows_per_distinct_level"])
@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_the_reference_implementation(golden, case, grad):
    model, tensors, io = golden
    g = {key.removeprefix(f"io.{case}."): value for key, value in tensors.items() if key.startswith(f"io.{case}.")}
    keys = ["latent", "timesteps", "sigma", "positions", "context", "context_mask", "attention_mask"]
    skip = (io["stg_block"],) if case == "stg_block1" else ()
    with torch.set_grad_enabled(grad):
        velocity = model(**{key: g[key] for key in keys if key in g}, skip_blocks=skip)
    x0 = g["latent"] - g["timesteps"][..., None] * velocity
    found = difference(velocity, g["velocity"]), difference(x0, g["x0"])
    print(case, found)
    assert max(found) < 1e-5, found


def test_every_block_equals_the_reference_implementation(golden):
    """Names the first block that differs, when one does."""
    model, tensors, _ = golden
    seen = []
    handles = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in model.transformer_blocks]
    keys = ["latent", "timesteps", "sigma", "positions", "context"]
    model(**{key: tensors[f"io.t2v.{key}"] for key in keys})
    for handle in handles:
        handle.remove()
    for i, out in enumerate(seen):
        found = difference(out, tensors[f"io.t2v.debug.block{i}"])
        assert found < 1e-4, f"block {i} differs by {found}"


def test_reference_positions_of_the_recorded_sampler_run_come_from_our_grid():
    """The recorded run appends one plain reference: its own grid from time 0, which is our 'overlap'."""
    with safe_open(GOLDEN / "sampler.safetensors", "pt") as file:
        positions = file.get_tensor("positions")[0]
        F, H, W = json.loads(file.metadata()["config"])["latent_grid"]
    grid = torch.cat([video_grid(F, H, W), reference_grid(F, H, W, "overlap")])
    found = difference(grid_to_positions(grid, 24), positions[:, : len(grid)])
    assert found < 1e-6, found


def diffusers_twin(ours: m.VideoTransformer):
    """Diffusers' audio-video transformer with our video weights and random audio weights."""
    diffusers = pytest.importorskip("diffusers", reason="the second implementation is not installed")
    config = ours.config
    twin = diffusers.LTX2VideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        cross_attention_dim=config.dim,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4 * config.heads,
        audio_cross_attention_dim=8 * config.heads,  # also split over the video's heads, hence the factor
        num_layers=config.num_layers,
        rope_type="split",
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        use_prompt_embeddings=False,
        perturbed_attn=True,
        rope_theta=config.theta,
    ).eval()
    renames = [("patchify_proj", "proj_in"), ("prompt_adaln_single", "prompt_adaln"), ("adaln_single", "time_embed")]
    renames += [("q_norm", "norm_q"), ("k_norm", "norm_k")]
    state = {}
    for name, tensor in ours.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        state[name] = tensor
    result = twin.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, f"names without a counterpart: {result.unexpected_keys}"
    video = [key for key in result.missing_keys if not any(part in key for part in ("audio", "av_cross", "a2v", "v2a"))]
    assert not video, f"video tensors that we do not have: {video}"
    return twin


@settings(max_examples=6, deadline=None)
@given(
    channels=st.integers(1, 9),
    layers=st.integers(1, 3),
    heads=st.integers(1, 4),
    pairs=st.integers(3, 8),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    skip=st.booleans(),
    hidden_key=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_transformer_equals_diffusers_on_random_sizes(channels, layers, heads, pairs, grid, skip, hidden_key, seed):
    config = m.TransformerConfig(channels, channels, layers, heads, 2 * pairs, theta=1000.0)
    ours = build(config, seed)
    batch = inputs(config, 2, *grid)
    B, S = batch["timesteps"].shape
    mask = torch.ones(B, S, S)
    mask[:, :, -1] = 0 if hidden_key else 1
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, _ = diffusers_twin(ours)(
            hidden_states=batch["latent"],
            audio_hidden_states=torch.randn(B, 3, 4),
            encoder_hidden_states=batch["context"],
            audio_encoder_hidden_states=torch.randn(B, 5, 8 * heads),
            timestep=batch["timesteps"] * 1000,
            audio_timestep=torch.rand(B, 3) * 1000,
            sigma=batch["sigma"] * 1000,
            video_coords=batch["positions"],
            audio_num_frames=3,
            isolate_modalities=True,
            spatio_temporal_guidance_blocks=[0] if skip else None,
            use_cross_timestep=True,
            video_self_attention_mask=mask,
            return_dict=False,
        )
        velocity = ours(**batch, attention_mask=mask, skip_blocks=(0,) if skip else ())
    # Outputs of random weights may be large; the bound is 1e-5 of their size, float32 rounding over a few layers.
    found = difference(velocity, expected) / max(1.0, expected.abs().max().item())
    print(config, found)
    assert found < 1e-5, found


# ---------------------------------------------------------------- properties of the transformer


def test_permuting_tokens_with_their_positions_permutes_the_output():
    model, batch = build(), inputs()
    order = torch.randperm(batch["latent"].shape[1])
    shuffled = dict(batch, latent=batch["latent"][:, order], timesteps=batch["timesteps"][:, order])
    shuffled["positions"] = batch["positions"][:, :, order]
    found = difference(model(**batch)[:, order], model(**shuffled))
    assert found < 1e-5, found


@pytest.mark.parametrize("grad", [True, False])
def test_reference_tokens_that_nobody_may_see_change_nothing_for_the_video(grad):
    model, batch = build(), inputs()
    B, S = batch["timesteps"].shape
    L = S * 2 // 3
    mask = torch.ones(B, 1, S)
    mask[:, :, L:] = 0
    with torch.set_grad_enabled(grad):
        masked = model(**batch, attention_mask=mask)[:, :L]
        visible = model(**batch)[:, :L]
        keep = {"latent": batch["latent"][:, :L], "timesteps": batch["timesteps"][:, :L]}
        keep["positions"] = batch["positions"][:, :, :L]
        alone = model(**dict(batch, **keep))
        full = model(**batch, attention_mask=mask.expand(B, S, S))[:, :L]
    found = difference(masked, alone)
    assert found < 1e-5, found
    assert difference(masked, full) < 1e-5, "a key mask and the same mask written out for every query must agree"
    assert difference(visible, alone) > 1e-3, "without the mask the reference must matter"


def test_the_placement_of_the_reference_matters_and_the_sigma_reaches_the_prompt():
    model, batch = build(), inputs()
    velocity = model(**batch)
    grid = torch.cat([video_grid(2, 2, 3), reference_grid(2, 2, 3, "overlap")])
    overlap = dict(batch, positions=grid_to_positions(grid, 24)[None].repeat(2, 1, 1, 1))
    assert difference(model(**overlap), velocity) > 1e-4
    assert difference(model(**dict(batch, sigma=batch["sigma"] * 0.5)), velocity) > 1e-4


def test_a_mask_of_ones_equals_no_mask():
    model, batch = build(), inputs()
    B, S = batch["timesteps"].shape
    masked = model(**batch, attention_mask=torch.ones(B, 1, S), context_mask=torch.ones(B, 5, dtype=torch.int64))
    found = difference(masked, model(**batch))
    assert found < 1e-5, found


def test_a_fractional_mask_scales_the_attention_weight():
    bias = m.mask_bias(torch.tensor([[[1.0, 0.5, 0.0]]]))[0, 0, 0]
    weights = torch.softmax(bias, dim=0)
    assert difference(weights, torch.tensor([2 / 3, 1 / 3, 0.0])) < 1e-6


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_bf16_runs_and_stays_close(how):
    model, batch = build(), inputs()
    B, S = batch["timesteps"].shape
    mask = torch.ones(B, 1, S)
    mask[:, :, -1] = 0
    with torch.no_grad():
        exact = model(**batch, attention_mask=mask)
        if how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = model(**batch, attention_mask=mask)
        else:
            found = model.to(torch.bfloat16)(**batch, attention_mask=mask)
            assert found.dtype == torch.bfloat16
    relative = difference(found, exact) / exact.abs().max().item()
    assert relative < 0.05, relative  # bf16 keeps 8 bits, a step of 0.4 %, over two blocks


def test_recomputing_blocks_gives_the_same_gradients():
    model, batch = build(), inputs()
    gradients = []
    for checkpoint_blocks in (False, True):
        model.zero_grad()
        model(**batch, checkpoint_blocks=checkpoint_blocks).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().max() > 0 for g in gradients[0]), "every tensor takes part"
    found = max(difference(a, b) for a, b in zip(*gradients, strict=True))
    assert found < 1e-6, found


@pytest.mark.parametrize("grad", [True, False])
def test_the_whole_forward_pass_compiles_into_one_graph(grad):
    """backend "eager" traces without generating code; fullgraph refuses any Python decision that depends on data."""
    torch._dynamo.reset()
    model, batch = build(), inputs()
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
        found = difference(compiled(**batch), model(**batch))
    assert found < 1e-5, found


@pytest.mark.parametrize("name", ["latent", "timesteps", "sigma", "positions", "context"])
def test_input_of_a_wrong_size_is_refused_by_name(name):
    batch = inputs()
    batch[name] = batch[name][..., :1].expand(*batch[name].shape[:-1], 7)
    with pytest.raises(ValueError, match=name if name != "latent" else "latent|timesteps"):
        build()(**batch)


def test_the_real_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = m.VideoTransformer(m.TransformerConfig())
    assert sum(p.numel() for p in model.parameters()) == 13_124_316_288
    assert len(model.state_dict()) == 1457
    assert sum(p.numel() for p in model.transformer_blocks[0].parameters()) == 268_812_352


# ---------------------------------------------------------------- schedules, guidance, sampling


def test_sigmas_equal_the_reference_implementation():
    with safe_open(GOLDEN / "schedule.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        for index, arguments in config["sigmas"].items():
            sigmas = m.ltx_sigmas(**arguments)
            found = difference(sigmas, file.get_tensor(f"sigmas.{index}"))
            assert found < 1e-5, f"{arguments}: {found}"
            assert sigmas.dtype == torch.float32
        draws = [file.get_tensor(f"train.{name}") for name in ("normal", "uniform_value", "uniform_choice")]
        for tokens in config["train_tokens"]:
            found = difference(m.training_sigmas(tokens, *draws), file.get_tensor(f"train.t.{tokens}"))
            assert found < 1e-5, f"{tokens} tokens: {found}"


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_sigmas_fall_from_one_to_zero(steps):
    sigmas = m.ltx_sigmas(steps)
    assert sigmas.shape == (steps + 1,) and sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="step"):
        m.ltx_sigmas(0)


def test_a_whole_sampling_run_equals_the_reference_implementation():
    g = load_file(GOLDEN / "sampler.safetensors")
    with safe_open(GOLDEN / "sampler.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    clean, mask, x = g["clean_latent"], g["denoise_mask"], g["latent.0"]
    scales = {"cfg": config["cfg_scale"], "stg": config["stg_scale"], "rescale": config["rescale_scale"]}
    for i in range(config["steps"]):
        level = mask * g["sigmas"][i]
        assert difference(level, g[f"timesteps.{i}"]) < 1e-6
        estimates = [x - level * g[f"velocity_{stream}.{i}"] for stream in ("cond", "uncond", "ptb")]
        guided = m.ltx_guidance(*estimates, **scales)
        blended = m.blend_clean(guided, clean, mask)
        x = m.euler_step(x, blended, g["sigmas"][i], g["sigmas"][i + 1])
        pairs = [(guided, "guided_x0"), (blended, "blended_x0")]
        found = [difference(a, g[f"{name}.{i}"]) for a, name in pairs] + [difference(x, g[f"latent.{i + 1}"])]
        assert max(found) < 1e-5, f"step {i}: {found}"
    kept = (mask == 0).expand_as(x)
    assert difference(x[kept], clean[kept]) < 1e-6, "clean tokens stay where they are"


def test_base_guidance_at_its_off_values_is_the_conditional_estimate_bit_for_bit():
    cond, other = torch.randn(2, 1, 4, 3)
    assert torch.equal(m.ltx_guidance(cond, cfg=1, stg=0, rescale=0), cond)
    with pytest.raises(ValueError, match="uncond"):
        m.ltx_guidance(cond, perturbed=other, cfg=3, stg=1)
    with pytest.raises(ValueError, match="perturbed"):
        m.ltx_guidance(cond, other, cfg=3, stg=1)


# ---------------------------------------------------------------- checkpoint files


def saved(path: Path) -> Path:
    tensors = {PREFIX + name: tensor for name, tensor in build().state_dict().items()}
    tensors["audio_vae.not_ours"] = torch.zeros(2)
    c.save_checkpoint(path, tensors, {"transformer": SMALL.to_checkpoint()}, {"note": "test"})
    return path


def test_a_checkpoint_written_and_read_gives_the_same_model(tmp_path):
    path = saved(tmp_path / "folder" / "model.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"], "nothing half-written stays behind"
    metadata = c.read_metadata(path)
    assert metadata["model_version"] == "2.3.0" and metadata["note"] == "test"
    config = m.TransformerConfig.from_checkpoint(metadata["config"]["transformer"])
    assert config == SMALL
    with torch.device("meta"):
        model = m.VideoTransformer(config)
    c.load_weights(model, path, PREFIX)
    batch = inputs()
    assert torch.equal(model(**batch), build()(**batch))
    with torch.device("meta"):
        half = m.VideoTransformer(config)
    c.load_weights(half, path, PREFIX, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_missing_and_misshapen_tensors_are_named(tmp_path):
    path = saved(tmp_path / "model.safetensors")
    tensors = load_file(path)
    name = PREFIX + "transformer_blocks.1.attn2.k_norm.weight"
    tensors[name] = torch.zeros(3)
    save_file(tensors, tmp_path / "misshapen.safetensors")
    with pytest.raises(ValueError, match=name):
        c.load_weights(build(), tmp_path / "misshapen.safetensors", PREFIX)
    del tensors[name]
    save_file(tensors, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=name):
        c.load_weights(build(), tmp_path / "missing.safetensors", PREFIX)
    with pytest.raises(ValueError, match="config"):
        c.read_metadata(tmp_path / "missing.safetensors")


def test_other_files_and_other_models_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("not a tensor file, but long enough to look at")
    with pytest.raises(ValueError, match="safetensors"):
        c.read_metadata(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="no file"):
        c.read_metadata(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="rope_type"):
        m.TransformerConfig.from_checkpoint({**SMALL.to_checkpoint(), "rope_type": "interleaved"})
    sizes = SMALL.to_checkpoint()
    del sizes["num_layers"]
    with pytest.raises(ValueError, match="num_layers"):
        m.TransformerConfig.from_checkpoint(sizes)
    with pytest.raises(ValueError, match="strings"):
        c.save_checkpoint(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {}, {"steps": 3})


# ---------------------------------------------------------------- the demo and its picture


@pytest.mark.parametrize("sigma", [1.0, 0.55, 0.1])
def test_the_drawn_sequence_is_noise_and_data_in_proportion_and_its_reference_is_clean(sigma):
    clean, noise, L = torch.randn(9, 5), torch.randn(9, 5), 6
    tokens, timesteps = m.noisy_sequence(clean, noise, sigma, L)
    found = difference(tokens[:L], (1 - sigma) * clean[:L] + sigma * noise[:L])
    assert found < 1e-6, found
    assert torch.equal(tokens[L:], clean[L:])
    assert timesteps.tolist() == pytest.approx([sigma] * L + [0] * 3)


def test_drawn_cells_are_blue_below_zero_white_at_it_and_red_above():
    pixels = np.asarray(m.draw_cells(torch.tensor([[-9.0, -2, -1, 0, 1, 2, 9]]), 3)).astype(int)
    assert pixels.shape == (3, 21, 3) and (pixels == pixels[1, 1::3].repeat(3, axis=0)[None]).all()
    red, _, blue = pixels[1, 1::3].T
    assert (red - blue).tolist()[3] == 0 and (pixels[1, 10] == 255).all()
    assert ((red - blue)[:3] < 0).all() and ((red - blue)[4:] > 0).all()
    assert (pixels[1, 1] == pixels[1, 4]).all() and (pixels[1, 1] != pixels[1, 7]).any(), "full colour from 2 on"


def test_the_picture_has_a_tick_where_each_level_lies():
    schedules = {"30": m.ltx_sigmas(30), "distilled": torch.tensor(m.DISTILLED_SIGMAS)}
    pixels = np.asarray(m.draw_levels(schedules, width=2080)).astype(int)  # an axis of 2000 pixels, from 40 to 2040
    orange = (np.abs(pixels - (213, 94, 0)).sum(axis=2) == 0)[100:].reshape(-1, 2080)
    for row, levels in enumerate(schedules.values()):
        found = set(np.flatnonzero(orange[90 * row : 90 * row + 8].all(axis=0)))
        expected = {40 + round(2000 * (1 - level)) for level in levels.tolist()}
        assert expected <= found, expected - found
        assert all(min(abs(x - e) for e in expected) <= 1 for x in found), "a tick is two pixels wide"


def test_the_picture_shows_noise_leaving_the_video_and_a_reference_that_never_changes():
    pixels = np.asarray(m.draw(shown=(0, 25, 29))).astype(int)
    assert pixels.shape[1] <= 1600
    cells = pixels[560 : 560 + 16 * 12]  # 16 channels, 12 pixels each
    borders = np.flatnonzero((cells == 0).all(axis=(0, 2)))[::2]  # the black line between video and reference
    assert len(borders) == 3, borders
    references = [cells[:, x + 3 : x + 12 * 12 - 3] for x in borders]
    videos = [cells[:, x - 24 * 12 : x - 1] for x in borders]
    assert all((reference == references[0]).all() for reference in references[1:])
    assert references[0].std() > 5, "not an empty rectangle"
    rough = [np.abs(np.diff(video[6::12, 6::12], axis=1)).mean() for video in videos]  # noise: neighbours differ
    assert rough[0] > 1.3 * rough[1] > 1.6 * rough[2], rough


def test_the_demo_runs_and_writes_its_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    m._demo()
    text = capsys.readouterr().out
    assert "13,124,316,288" in text
    assert [line.split(":")[0] for line in text.splitlines()[-2:]] == ["wrote model_demo.png", "Notice"]
    assert [path.name for path in tmp_path.iterdir()] == ["model_demo.png"]
    assert 10 <= len(text.splitlines()) <= 25
