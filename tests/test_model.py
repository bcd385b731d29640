"""The transformer equals LTX-2.3's: on recorded vectors, and against Diffusers on random sizes.

tests/check_golden.py compares schedule and sampling loop. Besides: masks, permutations, precision.

Hardware: CPU, under half a minute. Run: python -m pytest tests/test_model.py
"""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import model as m
from ltx import checkpoint as c
from rope import Layout

GOLDEN = Path(__file__).parent / "golden"
PREFIX = "model.diffusion_model."
CASES = [
    "t2v",
    "per_token",
    "ref_append",
    "ref_custom_pos",
    "attn_mask",
    "context_mask",
    "stg_block1",
]
SMALL = m.TransformerConfig(in_channels=6, out_channels=6, num_layers=2, heads=2, head_dim=12)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a.float() - b.float()).abs().max().item()


def build(config: m.TransformerConfig = SMALL, seed: int = 0) -> m.VideoTransformer:
    """A random transformer in which every tensor matters: tables and norms are moved away."""
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


def both(layout: Layout) -> torch.Tensor:
    """Positions of video and reference, (1, A, S, 2)."""
    return torch.cat([layout.video_positions(), layout.reference_positions()], dim=1)[None]


def inputs(
    config: m.TransformerConfig = SMALL, B: int = 2, F: int = 2, H: int = 2, W: int = 3, N: int = 5
) -> dict:
    """Video and TASS reference tokens: random noise levels for the video, 0 for the reference."""
    L, S = F * H * W, (F + 1) * H * W
    timesteps = torch.rand(B, S)
    timesteps[:, L:] = 0
    return {
        "latent": torch.randn(B, S, config.in_channels),
        "timesteps": timesteps,
        "sigma": torch.rand(B),
        "positions": both(Layout(F, H, W)).repeat(B, 1, 1, 1),
        "context": torch.randn(B, N, config.dim),
    }


# ------------------------------------------------------------ equality with other implementations


@pytest.fixture(scope="module")
def golden():
    path = GOLDEN / "transformer.safetensors"
    config = c.read_metadata(path)["config"]
    with torch.device("meta"):
        model = m.VideoTransformer(m.TransformerConfig.from_checkpoint(config["transformer"]))
    return c.load_weights(model, path, PREFIX), load_file(path), config["io"]


@pytest.mark.parametrize("case", CASES)
def test_velocity_equals_the_reference_implementation(golden, case):
    model, tensors, io = golden
    g = {
        key.removeprefix(f"io.{case}."): value
        for key, value in tensors.items()
        if key.startswith(f"io.{case}.")
    }
    keys = [
        "latent",
        "timesteps",
        "sigma",
        "positions",
        "context",
        "context_mask",
        "attention_mask",
    ]
    skip = (io["stg_block"],) if case == "stg_block1" else ()
    velocity = model(**{key: g[key] for key in keys if key in g}, skip_blocks=skip)
    x0 = g["latent"] - g["timesteps"][..., None] * velocity
    found = difference(velocity, g["velocity"]), difference(x0, g["x0"])
    print(case, found)
    assert max(found) < 1e-5, found


def diffusers_twin(ours: m.VideoTransformer):
    """Diffusers' audio-video transformer with our video weights and random audio weights."""
    diffusers = pytest.importorskip(
        "diffusers", reason="the second implementation is not installed"
    )
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
        audio_cross_attention_dim=8
        * config.heads,  # also split over the video's heads, hence the factor
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
    renames = [
        ("patchify_proj", "proj_in"),
        ("prompt_adaln_single", "prompt_adaln"),
        ("adaln_single", "time_embed"),
    ]
    renames += [("q_norm", "norm_q"), ("k_norm", "norm_k")]
    state = {}
    for name, tensor in ours.state_dict().items():
        for old, new in renames:
            name = name.replace(old, new)
        state[name] = tensor
    result = twin.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, f"names without a counterpart: {result.unexpected_keys}"
    video = [
        key
        for key in result.missing_keys
        if not any(part in key for part in ("audio", "av_cross", "a2v", "v2a"))
    ]
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
def test_transformer_equals_diffusers_on_random_sizes(
    channels, layers, heads, pairs, grid, skip, hidden_key, seed
):
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
    # 1e-5 of the outputs' size: float32 rounding over a few layers.
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


def test_reference_tokens_that_nobody_may_see_change_nothing_for_the_video():
    model, batch = build(), inputs()
    B, S = batch["timesteps"].shape
    L = S * 2 // 3
    mask = torch.ones(B, 1, S)
    mask[:, :, L:] = 0
    with torch.no_grad():
        masked = model(**batch, attention_mask=mask)[:, :L]
        visible = model(**batch)[:, :L]
        keep = {"latent": batch["latent"][:, :L], "timesteps": batch["timesteps"][:, :L]}
        keep["positions"] = batch["positions"][:, :, :L]
        alone = model(**dict(batch, **keep))
        full = model(**batch, attention_mask=mask.expand(B, S, S))[:, :L]
    found = difference(masked, alone)
    assert found < 1e-5, found
    assert difference(masked, full) < 1e-5, (
        "a key mask and the same mask written out for every query must agree"
    )
    assert difference(visible, alone) > 1e-3, "without the mask the reference must matter"


@pytest.mark.parametrize("counts", [(18,), (12, 6), (6, 6, 6)])
def test_runs_of_tokens_equal_the_same_levels_written_out_for_each(counts):
    """Outputs and the gradients of every tensor; the rows are made once a run, not once a token."""
    model, batch = build(), inputs()
    runs = [(torch.rand(2), count) for count in counts]
    written = torch.cat([level[:, None].expand(2, count) for level, count in runs], dim=1)
    asked, found = [], []
    model.adaln_single.register_forward_pre_hook(lambda _, given: asked.append(given[0].shape))
    for timesteps in (written, runs):
        model.zero_grad()
        velocity = model(**dict(batch, timesteps=timesteps))
        velocity.square().mean().backward()
        found.append([velocity, *(p.grad for p in model.parameters())])
    assert asked == [(2, 18), (2, len(counts))]
    worst = max(difference(a, b) / max(1, b.abs().max()) for a, b in zip(*found, strict=True))
    assert worst < 1e-5, worst
    with pytest.raises(ValueError, match="timesteps"):
        model(**dict(batch, timesteps=[*runs, (torch.rand(2), 1)]))


def test_the_placement_of_the_reference_matters_and_the_sigma_reaches_the_prompt():
    model, batch = build(), inputs()
    velocity = model(**batch)
    overlap = dict(batch, positions=both(Layout(2, 2, 3, placement="overlap")).repeat(2, 1, 1, 1))
    assert difference(model(**overlap), velocity) > 1e-4
    assert difference(model(**dict(batch, sigma=batch["sigma"] * 0.5)), velocity) > 1e-4


def test_a_mask_of_ones_equals_no_mask():
    model, batch = build(), inputs()
    B, S = batch["timesteps"].shape
    masked = model(
        **batch,
        attention_mask=torch.ones(B, 1, S),
        context_mask=torch.ones(B, 5, dtype=torch.int64),
    )
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
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(**batch).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().max() > 0 for g in gradients[0]), "every tensor takes part"
    found = max(difference(a, b) for a, b in zip(*gradients, strict=True))
    assert found < 1e-6, found


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("runs", [True, False])
def test_the_whole_forward_pass_compiles_into_one_graph(grad, runs):
    """backend "eager" traces only; fullgraph refuses any decision that depends on data."""
    torch._dynamo.reset()
    model, batch = build(), inputs()
    if runs:
        batch["timesteps"] = [(torch.rand(2), 12), (torch.zeros(2), 6)]
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


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_sigmas_fall_from_one_to_zero(steps):
    sigmas = m.ltx_sigmas(steps)
    assert sigmas.shape == (steps + 1,) and sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="step"):
        m.ltx_sigmas(0)


# ---------------------------------------------------------------- checkpoint files


def saved(path: Path) -> Path:
    tensors = {PREFIX + name: tensor for name, tensor in build().state_dict().items()}
    tensors["audio_vae.not_ours"] = torch.zeros(2)
    c.save_checkpoint(path, tensors, {"transformer": SMALL.to_checkpoint()}, {"note": "test"})
    return path


def test_a_checkpoint_written_and_read_gives_the_same_model(tmp_path):
    path = saved(tmp_path / "folder" / "model.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"], (
        "nothing half-written stays behind"
    )
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


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="rope_type"):
        m.TransformerConfig.from_checkpoint({**SMALL.to_checkpoint(), "rope_type": "interleaved"})
    sizes = SMALL.to_checkpoint()
    del sizes["num_layers"]
    with pytest.raises(ValueError, match="num_layers"):
        m.TransformerConfig.from_checkpoint(sizes)
    with pytest.raises(ValueError, match="cross_attention_dim"):
        m.TransformerConfig.from_checkpoint({**SMALL.to_checkpoint(), "cross_attention_dim": 7})
