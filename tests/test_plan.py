"""What fits: the counted sizes are those of LTX-2.3, the formulas count what the modules do, the sums are measured ones.

Hardware: CPU, seconds. Run: python -m pytest tests/test_plan.py
"""

import re

import pytest
import torch
import torch.nn.functional as F
from test_memory import SIZES, inputs
from tiny import config as tiny_config
from tiny import write_tiny
from torch.backends import mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as m
from ltx import plan as p
from ltx.checkpoint import load_weights
from ltx.text import TextEncoder
from ltx.vae import VideoVAE
from model import TransformerConfig, VideoTransformer


@pytest.fixture(scope="module")
def real():
    return p.plan()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def letters(sizes: TransformerConfig, tokens: int, texts: int, levels: int) -> dict:
    return {"K": sizes.num_layers, "D": sizes.dim, "h": sizes.heads, "C": sizes.in_channels, "b": 4,
            "N": texts, "n": tokens, "U": levels}  # fmt: skip


# ---------------------------------------------------------------- sizes of the real model


def test_the_parts_have_the_published_numbers_of_parameters(real):
    counts = {name: p.numbers(part) for name, part in real.parts.items()}
    assert counts["blocks"] + counts["transformer, rest"] == 13_124_316_288
    assert len(real.parts["blocks"]) + len(real.parts["transformer, rest"]) == 1457
    assert counts["blocks"] == 48 * 268_812_352
    assert counts["connector"] == 1_612_546_304 and len(real.parts["connector"]) == 129
    assert counts["projection"] == 770_707_456
    assert counts["VAE encoder"] + 256 == 318_937_153, "published with the 256 statistics, which both halves use"
    assert counts["VAE decoder"] == 407_169_328
    assert counts["Gemma layers"] + counts["Gemma embedding"] == 11_766_034_176
    assert counts["Gemma embedding"] - 3840 == 1_006_878_720, "beside the embedding there is the final norm"


def test_the_bytes_and_tokens_are_those_of_the_official_size(real):
    assert (real.sizes["L"], real.sizes["R"], real.sizes["N"]) == (6144, 384, 1024)
    assert round(sum(real.weights[n] for n in ("blocks", "transformer, rest")) / p.GB, 2) == 26.25
    assert 0.5 < real.weights["blocks in fp8-cast"] / real.weights["blocks"] < 0.501
    assert round(real.weights["2 x blocks"] / p.GB, 2) == 1.08
    assert real.pinned["no flag"] == real.pinned["--offload disk"] == 0
    assert real.pinned["--offload cpu"] >= real.weights["blocks"]


def test_a_guided_step_is_two_passes_without_and_one_with_the_reference(real):
    assert real.passes == {6144: 2, 6528: 1}
    assert real.flops["step"] == 2 * real.flops[6144] + real.flops[6528]
    assert p.plan(ref_scale=0.0).passes == {6144: 2}
    both = p.plan(text_scale=1.0, ref_scale=1.0)
    assert both.passes == {6528: 1} and both.flops["step"] == real.flops[6528]


# ---------------------------------------------------------------- operations


@torch.no_grad()
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("grid", [(2, 3, 4), (3, 8, 8)])
def test_the_formulas_of_a_pass_count_exactly_what_the_transformer_does(grid, reference):
    """For few and for many tokens, with and without a reference; the counter does not know oneDNN's operations."""
    batch = inputs(SIZES, grid)
    L = grid[0] * grid[1] * grid[2]
    if not reference:
        batch |= {name: batch[name][:, :L] for name in ("latent", "timesteps")} | {"positions": batch["positions"][:, :, :L]}
    n = batch["latent"].shape[1]
    # The fused attention is not counted either.
    with mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        VideoTransformer(SIZES)(**batch)
    assert counter.get_total_flops() == sum(p.compute(p.PASS, letters(SIZES, n, 5, 1 + reference)).values())


@torch.no_grad()
def test_the_formulas_of_a_prompt_count_exactly_what_the_text_encoder_does(folder):
    encoder = TextEncoder.load(folder / "model.safetensors", folder / "gemma")
    found = p.plan(tiny_config(), encoder.gemma.config, 32, 32, 5)
    ids, mask = encoder.tokenize(["a person laughs", ""])
    with mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(ids, mask)
    assert counter.get_total_flops() == found.flops["text"]


@torch.no_grad()
def test_a_walk_on_shapes_finds_what_a_real_decoding_takes(folder):
    vae = load_weights(VideoVAE(tiny_config()["vae"]), folder / "model.safetensors", "vae.")
    flops, alive = p.walk_vae(VideoVAE(tiny_config()["vae"]).to("meta"), (3, 4, 4), torch.float32)
    with mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter, p.LiveBytes() as live:
        vae.decode(torch.randn(1, vae.latent_channels, 3, 4, 4))
    assert counter.get_total_flops() == flops["decode"]
    print(f"measured {live.peak + live.workspace}, on shapes {alive['decode']}")
    assert 0.9 < alive["decode"] / (live.peak + live.workspace) < 1.1


# ---------------------------------------------------------------- bytes alive


def test_live_bytes_counts_storages_once_and_forgets_the_freed():
    with p.LiveBytes() as live:
        a = torch.zeros(100)
        b = a[10:].view(9, 10)  # a view
        b.add_(1)  # in place
        c = a + 1
        assert live.now == 800
        del a
        assert live.now == 800, "the view keeps the storage"
        del b, c
        assert live.now == 0
        torch.zeros(50)
    assert live.peak == 800


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_for_denoising_holds_against_a_measured_pass(monkeypatch, dtype):
    """Within 5 %, with the fused attention that a card uses, on a model wide enough that the tokens dominate."""
    monkeypatch.setattr(m, "attend", lambda q, k, v, bias=None: F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    sizes = TransformerConfig(in_channels=16, out_channels=16, num_layers=2, heads=8, head_dim=32, max_pos=(2, 128, 128))
    model, batch = VideoTransformer(sizes).to(dtype), inputs(sizes, (5, 8, 8))
    with p.LiveBytes() as live:
        model(**batch)
    z = letters(sizes, batch["latent"].shape[1], 5, 2) | {"b": dtype.itemsize}
    formula = p.compute({"": p.ALIVE["denoise"]}, z)[""]
    print(f"{dtype}: measured {live.peak:,}, formula {formula:,}, ratio {live.peak / formula:.3f}")
    assert 0.95 < live.peak / formula < 1.05


@torch.no_grad()
def test_the_sums_for_the_text_encoder_hold_against_measured_ones(folder):
    encoder = TextEncoder.load(folder / "model.safetensors", folder / "gemma")
    found = p.plan(tiny_config(), encoder.gemma.config, 32, 32, 5, dtype=torch.float32)
    ids, mask = encoder.tokenize(["a person laughs", ""])
    with p.LiveBytes() as live:
        states = encoder.gemma(ids, mask)
        gemma, live.peak = live.peak, live.now
        features = encoder.extractor(states, mask)
        projection = live.peak
        del states
        live.peak = live.now
        encoder.connector(features, mask)
    for name, measured in (("Gemma", gemma), ("projection", projection), ("connector", live.peak)):
        print(f"{name}: measured {measured:,}, formula {found.alive[name]:,}, ratio {measured / found.alive[name]:.3f}")
        assert 0.6 < measured / found.alive[name] < 1.05, name


# ---------------------------------------------------------------- the table


def test_the_smallest_card_needs_streaming_and_the_largest_does_not(real):
    rows = {row[0]: row[-len(p.CARDS) :] for row in p.fits(real)}
    assert rows["no flag"][0] == "no" and rows["no flag"][-1] == "yes"
    assert rows["--offload cpu"][0] == rows["--offload disk"][0] == "yes"
    order = ["no", "decode tiled", "yes"]
    for option, cells in rows.items():
        ranks = [order.index(cell) for cell in cells]
        assert ranks == sorted(ranks), f"{option}: a larger card never fits less"
    long = {row[0]: row[-len(p.CARDS) :] for row in p.fits(p.plan(num_frames=481))}
    assert {row[0]: row[-3] for row in p.fits(real)}["--offload-text cpu --quantization fp8-cast"] == "yes", "24 GB"
    assert "decode tiled" in long["--offload cpu"], "a long video needs tiles on a small card"


def test_every_sum_is_the_sum_of_its_printed_parts(real, capsys):
    p.print_plan()
    out = capsys.readouterr().out
    unit = {"G": 1e9, "M": 1e6, "k": 1e3, "": 1}
    totals = [need for stages in real.needs.values() for need in stages.values()]
    lines = [line for line in out.splitlines() if "reserve = " in line]
    assert len(lines) == 11
    for line in lines:
        *terms, total = (float(v) * unit[u] for v, u in re.findall(r"(\d+\.\d\d) ([GMk]?)B", line))
        assert abs(sum(terms) - total) < 0.03 * p.GB, line
        assert min(abs(total - need) for need in totals) < 0.006 * p.GB, line
    for formula in (*p.PASS.values(), *p.PROMPT.values(), *p.ALIVE.values()):
        assert f"`{formula}`" in out
    assert "13,124" not in out and "12,902,992,896" in out


def test_a_given_file_is_planned_from_its_own_config_and_table(folder, capsys):
    p.print_plan(folder / "model.safetensors", folder / "gemma")
    out = capsys.readouterr().out
    stored = sum(t.numel() * 4 for t in VideoTransformer(SIZES).transformer_blocks.state_dict().values())
    row = next(line for line in out.splitlines() if line.startswith("| blocks |"))
    assert row.endswith(f"{p.short(stored, 'B')} |"), "the tiny file is float32"
    assert "'height': 32, 'width': 32, 'num_frames': 5" in out, "its own default size"


def test_what_a_size_takes_at_the_least_is_a_part_of_what_it_takes_and_is_answered_at_any_size(real):
    vae = p.build_parts(p.REAL, p.GEMMA)[1]
    least = p.least_bytes(p.REAL, vae, (16, 16, 24), torch.bfloat16, tiled=False)
    for part, stage in (("encode the reference", "encode"), ("decode the video", "decode"), ("denoise", "denoise")):
        assert 0.1 < least[part] / real.alive[stage] < 1, (part, least[part], real.alive[stage])
    absurd = p.least_bytes(p.REAL, vae, (10**7, 10**5, 10**5), torch.bfloat16)
    assert min(absurd.values()) > 10**12


def test_mistakes_are_named(folder):
    with pytest.raises(ValueError, match="steps of 32 and 8.k . 1 frames, got 768 x 500, 121 frames"):
        p.plan(height=500)
    with pytest.raises(ValueError, match="video_aggregate_embed.weight of shape .* give the checkpoint's own --gemma-root"):
        p.print_plan(folder / "model.safetensors")
