"""What fits: counted sizes are LTX-2.3's, formulas count what modules do, sums are measured ones.

Hardware: CPU, seconds. Run: python -m pytest tests/test_plan.py
"""

import re
from argparse import Namespace

import pytest
import torch
from test_offload import SIZES, inputs
from tiny import config as tiny_config
from tiny import write_tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from guidance import Guidance
from ltx import plan as p
from ltx.text import TextEncoder
from ltx.vae import VideoVAE
from model import TransformerConfig, VideoTransformer

TINY_SIZE = {"height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def real():
    return p.plan()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder.load(folder / "model.safetensors", folder / "gemma")


def letters(sizes: TransformerConfig, tokens: int, levels: int, b: int = 4) -> dict:
    return {"K": sizes.num_layers, "D": sizes.dim, "h": sizes.heads, "C": sizes.in_channels, "b": b,
            "N": 5, "n": tokens, "U": levels}


def test_the_parts_have_the_published_numbers_of_parameters(real):
    counts = {name: p.numbers(part) for name, part in real.parts.items()}
    assert counts["blocks"] + counts["transformer, rest"] == 13_124_316_288
    assert counts["blocks"] == counts["blocks in fp8-cast"] == 48 * 268_812_352
    assert counts["connector"] == 1_612_546_304 and counts["projection"] == 770_707_456
    assert counts["VAE encoder"] + 256 == 318_937_153, "the 256 statistics serve both halves"
    assert counts["VAE decoder"] == 407_169_328
    assert counts["Gemma layers"] + counts["Gemma embedding"] == 11_766_034_176


def test_the_official_size_has_the_published_tokens_and_each_option_its_bytes(real):
    assert (real.sizes["L"], real.sizes["R"], real.sizes["N"]) == (6144, 384, 1024)

    def on_card(option, *names):
        return round(sum(real.needs[option]["denoise"][name] for name in names) / p.GB, 2)

    assert on_card("no flag", "blocks", "transformer, rest") == 26.25
    assert on_card("--quantization fp8-cast", "blocks in fp8-cast") == 12.91, "half, and the norms"
    assert on_card("--offload cpu", "2 x blocks") == 1.08
    assert real.pinned["no flag"] == real.pinned["--offload disk"] == 0
    assert round(real.pinned["--offload cpu"] / p.GB, 2) == 25.81, "powers of two: nothing is lost"


def test_only_streams_that_read_the_reference_pay_for_it(real):
    assert real.passes == {6144: 2, 6528: 1}
    assert real.flops["step"] == 2 * real.flops[6144] + real.flops[6528]
    for guidance, passes in ((Guidance(ref_scale=0.0), {32: 2}), (Guidance(1.0, 1.0), {48: 1}),
                             (Guidance(order="two_deltas"), {32: 1, 48: 2})):
        assert p.plan(tiny_config(), size=TINY_SIZE, guidance=guidance).passes == passes


# ---------------------------------------------------------------- operations


@torch.no_grad()
@pytest.mark.parametrize("grid, reference", [((2, 3, 4), False), ((3, 8, 8), True)])
def test_the_formulas_of_a_pass_count_exactly_what_the_transformer_does(grid, reference):
    batch = inputs(SIZES, grid)
    n = batch["latent"].shape[1] if reference else grid[0] * grid[1] * grid[2]
    batch |= {"latent": batch["latent"][:, :n], "timesteps": batch["timesteps"][: 1 + reference],
              "positions": batch["positions"][:, :, :n]}
    # The fused attention is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        VideoTransformer(SIZES)(**batch)
    z = letters(SIZES, n, 1 + reference)
    assert counter.get_total_flops() == sum(p.compute(p.PASS, z).values())


@torch.no_grad()
def test_the_formulas_of_a_prompt_count_exactly_what_the_text_encoder_does(encoder):
    found = p.plan(tiny_config(), encoder.gemma.config, TINY_SIZE)
    ids, mask = encoder.tokenize(["a person laughs", ""])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(ids, mask)
    assert counter.get_total_flops() == found.flops["text"]


@torch.no_grad()
def test_a_walk_on_shapes_finds_what_a_real_decoding_takes(folder):
    vae = VideoVAE.load(folder / "model.safetensors")
    flops, alive = p.walk_vae(VideoVAE(tiny_config()["vae"]).to("meta"), (3, 4, 4), torch.float32)
    with FlopCounterMode(display=False) as counter, p.LiveBytes() as live:
        vae.decode(torch.randn(1, vae.latent_channels, 3, 4, 4))
    assert counter.get_total_flops() == flops["decode"]
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
    assert live.peak == 800


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_for_denoising_holds_against_a_measured_pass(dtype):
    """Within 5 %, on a model wide enough that the tokens dominate."""
    sizes = TransformerConfig(in_channels=16, out_channels=16, num_layers=2, heads=8, head_dim=32,
                              max_pos=(2, 128, 128))
    model, batch = VideoTransformer(sizes).to(dtype), inputs(sizes, (5, 8, 8))
    with p.LiveBytes() as live:
        model(**batch)
    z = letters(sizes, batch["latent"].shape[1], 2, dtype.itemsize)
    ratio = live.peak / p.compute({"": p.ALIVE["denoise"]}, z)[""]
    assert 0.95 < ratio < 1.05, ratio


@torch.no_grad()
def test_the_sums_for_the_text_encoder_hold_against_measured_ones(encoder):
    found = p.plan(tiny_config(), encoder.gemma.config, TINY_SIZE, dtype=torch.float32)
    ids, mask = encoder.tokenize(["a person laughs", ""])
    measured = {}
    with p.LiveBytes() as live:
        states = encoder.gemma(ids, mask)
        measured["Gemma"], live.peak = live.peak, live.now
        features = encoder.extractor(states, mask)
        measured["projection"] = live.peak
        del states
        live.peak = live.now
        encoder.connector(features, mask)
    measured["connector"] = live.peak
    for name, peak in measured.items():
        assert 0.6 < peak / found.alive[name] < 1.05, (name, peak, found.alive[name])


def test_what_a_size_takes_at_the_least_is_a_part_of_what_it_takes_and_known_at_any_size(real):
    with torch.device("meta"):
        vae = VideoVAE(p.REAL["vae"])
    least = p.least_bytes(p.REAL, vae, (16, 16, 24), torch.bfloat16, tiled=False)
    for part, stage in (("encode the reference", "encode"), ("decode the video", "decode"),
                        ("denoise", "denoise")):
        assert 0.1 < least[part] / real.alive[stage] < 1, (part, least[part], real.alive[stage])
    tiled = p.least_bytes(p.REAL, vae, (16, 16, 24), torch.bfloat16)
    assert tiled["decode the video"] == tiled["encode the reference"] < least["decode the video"]
    absurd = p.least_bytes(p.REAL, vae, (10**7, 10**5, 10**5), torch.bfloat16)
    assert min(absurd.values()) > 10**12


# ---------------------------------------------------------------- the table


def test_the_smallest_card_needs_streaming_and_the_largest_does_not(real):
    rows = {row[0]: dict(zip(p.CARDS, row[-len(p.CARDS) :], strict=True)) for row in p.fits(real)}
    assert rows["no flag"][12] == "no" and rows["no flag"][80] == "yes"
    assert rows["--offload cpu"][12] == rows["--offload disk"][12] == "yes"
    assert rows["--offload-text cpu --quantization fp8-cast"][16] == "yes"
    decoding = {"decode": 11 * p.GB, "decode, tiled": 6 * p.GB}  # a longer video, a smaller card
    need = {stage: {"alive": size} for stage, size in decoding.items()}
    one = p.Plan(real.parts, real.sizes, {}, {}, {}, {"x": need}, {"x": 0})
    assert p.fits(one)[0][-5:] == ["yes"] * 5
    need["decode"]["alive"] = 13 * p.GB
    assert p.fits(one)[0][-5:] == ["decode tiled", *["yes"] * 4]


def test_every_sum_is_the_sum_of_its_printed_parts(real, monkeypatch, capsys):
    monkeypatch.setattr(p, "plan", lambda *_: real)
    p.print_plan(Namespace(checkpoint_path=p.BUNDLED, gemma_root=None, height=None))
    out, unit = capsys.readouterr().out, {"G": 1e9, "M": 1e6}
    assert out.startswith("LTX-2.3 22B: ") and "12,902,992,896" in out
    lines = [line for line in out.splitlines() if "reserve = " in line]
    assert len(lines) == 11
    for line in lines:
        *terms, total = (float(v) * unit[u] for v, u in re.findall(r"(\d+\.\d\d) ([GM])B", line))
        assert abs(sum(terms) - total) < 0.03 * p.GB, line
    for formula in (*p.PASS.values(), *p.PROMPT.values(), *p.ALIVE.values()):
        assert f"`{formula}`" in out


def test_a_given_file_is_planned_from_its_own_config_and_table(folder, capsys):
    p.print_plan(Namespace(checkpoint_path=folder / "model.safetensors", text_scale=None, width=64,
                           gemma_root=folder / "gemma"))
    out = capsys.readouterr().out
    blocks = VideoTransformer(SIZES).transformer_blocks.state_dict().values()
    row = next(line for line in out.splitlines() if line.startswith("| blocks |"))
    stored = p.short(sum(t.numel() * 4 for t in blocks), "B")
    assert row.endswith(f"{stored} |"), "the tiny file is float32"
    assert "{'height': 32, 'width': 64, 'num_frames': 5}" in out, "what was asked, else its own"


def test_mistakes_are_named(folder):
    with pytest.raises(ValueError, match="steps of 8 and 4.k . 1 frames, got 32 x 500, 5 frames"):
        p.plan(tiny_config(), size=TINY_SIZE | {"height": 500})
    with pytest.raises(ValueError, match="at most 1e.10 pixels in a video, got 28.80 T; lower"):
        p.plan(tiny_config(), size={"height": 10**6, "width": 32 * 10**5, "num_frames": 9})
    with pytest.raises(ValueError, match="aggregate_embed.weight of shape .* the checkpoint's own"):
        p.show(folder / "model.safetensors")
