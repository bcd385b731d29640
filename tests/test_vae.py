"""The VAE equals Diffusers' LTX-2 VAE on random sizes and weights; it is causal; its decibels are decibels.

Hardware: CPU, some seconds. Run: python -m pytest tests/test_vae.py
"""

import random

import pytest
import torch

from vae import VideoVAE, block_list, depth_to_space, patch_pixels, psnr, space_to_depth, unpatch_pixels

KINDS = {"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}


def draw_config(seed: int) -> dict:
    """A narrow VAE: 2 or 3 compressions of random kind and widening, other depths and widths every time."""
    rng = random.Random(seed)
    steps = [(rng.choice(sorted(KINDS)), rng.choice([1, 2])) for _ in range(rng.choice([2, 3]))]

    def blocks(ending: str) -> list:
        out = [["res_x", {"num_layers": rng.randint(1, 2)}]]
        for kind, widening in steps:
            out += [[kind + ending, {"multiplier": widening}], ["res_x", {"num_layers": rng.randint(1, 2)}]]
        return out

    latent = rng.choice([8, 16])  # Diffusers takes this as the encoder's first width too
    return {"in_channels": 3, "out_channels": 3, "latent_channels": latent, "encoder_base_channels": latent,
            "decoder_base_channels": rng.choice([4, 6]), "patch_size": rng.choice([2, 4]),
            "encoder_blocks": blocks("_res"), "decoder_blocks": blocks("")}  # fmt: skip


def build(seed: int) -> VideoVAE:
    torch.manual_seed(seed)
    vae = VideoVAE(draw_config(seed)).eval()
    statistics = dict(vae.per_channel_statistics.named_buffers())
    statistics["mean-of-means"].normal_()
    statistics["std-of-means"].uniform_(0.5, 2)
    return vae


def diffusers_twin(vae: VideoVAE, config: dict):
    """Diffusers' VAE with our weights. It groups blocks differently: convolutions and their change of size together."""
    diffusers = pytest.importorskip("diffusers", reason="the second implementation is not installed")
    encoder, decoder = block_list(config["encoder_blocks"]), block_list(config["decoder_blocks"])
    downs = [entry for entry in encoder if entry[0] != "res_x"]
    ups = [entry for entry in decoder if entry[0] != "res_x"]  # output side first, like Diffusers' own lists
    widths_down, widths_up = [config["latent_channels"]], [config["decoder_base_channels"]]
    for _, widening in downs:
        widths_down.append(widths_down[-1] * widening)
    for _, widening in ups:
        widths_up.append(widths_up[-1] * widening)
    twin = diffusers.AutoencoderKLLTX2Video(
        latent_channels=config["latent_channels"],
        block_out_channels=tuple(widths_down[1:]),
        down_block_types=("LTX2VideoDownBlock3D",) * len(downs),
        decoder_block_out_channels=tuple(widths_up[1:]),
        layers_per_block=tuple(n for kind, n in encoder if kind == "res_x"),
        decoder_layers_per_block=tuple(n for kind, n in decoder if kind == "res_x"),
        spatio_temporal_scaling=(True,) * len(downs),
        decoder_spatio_temporal_scaling=(True,) * len(ups),
        decoder_inject_noise=(False,) * (len(ups) + 1),
        downsample_type=tuple(KINDS[kind.removesuffix("_res")] for kind, _ in downs),
        upsample_type=tuple(KINDS[kind] for kind, _ in reversed(ups)),
        upsample_residual=(False,) * len(ups),
        upsample_factor=tuple(widening for _, widening in ups),
        patch_size=config["patch_size"],
        decoder_causal=False,
        decoder_spatial_padding_mode="zeros",
    ).eval()
    twin.load_state_dict(renamed(vae, len(downs), len(ups)), strict=True)
    return twin


def renamed(vae: VideoVAE, downs: int, ups: int) -> dict[str, torch.Tensor]:
    places = {f"encoder.down_blocks.{2 * i}.res_blocks.": f"encoder.down_blocks.{i}.resnets." for i in range(downs)}
    places |= {f"encoder.down_blocks.{2 * i + 1}.": f"encoder.down_blocks.{i}.downsamplers.0." for i in range(downs)}
    places |= {f"encoder.down_blocks.{2 * downs}.res_blocks.": "encoder.mid_block.resnets."}
    places |= {"decoder.up_blocks.0.res_blocks.": "decoder.mid_block.resnets."}
    places |= {f"decoder.up_blocks.{2 * i + 1}.": f"decoder.up_blocks.{i}.upsamplers.0." for i in range(ups)}
    places |= {f"decoder.up_blocks.{2 * i + 2}.res_blocks.": f"decoder.up_blocks.{i}.resnets." for i in range(ups)}
    places |= {"per_channel_statistics.mean-of-means": "latents_mean",
               "per_channel_statistics.std-of-means": "latents_std"}  # fmt: skip
    state = {}
    for name, tensor in vae.state_dict().items():
        old = next((old for old in places if name.startswith(old)), "")
        state[places.get(old, "") + name.removeprefix(old)] = tensor
    return state


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_encoding_and_decoding_equal_diffusers(seed):
    config, vae = draw_config(seed), build(seed)
    twin = diffusers_twin(vae, config)
    s, frames = vae.space_scale, 2 * vae.time_scale + 1
    video = torch.rand(2, 3, frames, 2 * s, 3 * s) * 2 - 1
    latent = vae.encode(video)
    assert latent.shape == (2, config["latent_channels"], 3, 2, 3)
    mean, std = vae.statistics()
    theirs = (twin.encode(video).latent_dist.mean - mean) / std  # Diffusers normalises in its pipeline
    encoding = (latent - theirs).abs().max().item()
    ours, theirs = vae.decode(latent), twin.decode(latent * std + mean).sample
    assert ours.shape == theirs.shape == video.shape
    decoding = (ours - theirs).abs().max().item()
    print(f"seed {seed}: encoding differs by {encoding:.1e}, decoding by {decoding:.1e}")
    assert encoding < 1e-4 and decoding < 1e-4  # float32 rounding; a wrong layout is off by 0.1 and more


@torch.no_grad()
def test_a_latent_frame_depends_on_no_later_frame_and_a_picture_is_a_one_frame_video():
    vae = build(1)
    s, t = vae.space_scale, vae.time_scale
    video = torch.rand(1, 3, 2 * t + 1, 2 * s, 2 * s) * 2 - 1
    changed = video.clone()
    changed[:, :, t + 1 :] = 0  # everything after the first two latent frames
    before, after = vae.encode(video), vae.encode(changed)
    assert (before[:, :, :2] - after[:, :, :2]).abs().max() < 1e-5
    assert (before[:, :, 2] - after[:, :, 2]).abs().max() > 1e-2
    alone = vae.encode(video[:, :, :1])
    difference = (alone - before[:, :, :1]).abs().max().item()
    assert alone.shape[2] == 1 and difference < 1e-5, difference


@torch.no_grad()
def test_frames_beyond_the_last_whole_group_are_dropped_and_odd_sizes_refused():
    vae = build(1)
    s, t = vae.space_scale, vae.time_scale
    video = torch.rand(1, 3, t + 1, s, s)
    longer = torch.cat([video, torch.rand(1, 3, t - 1, s, s)], dim=2)
    assert torch.equal(vae.encode(video), vae.encode(longer))
    with pytest.raises(ValueError, match=f"multiples of {s}, got {s + 1}x{s}; "):
        vae.encode(torch.rand(1, 3, 1, s + 1, s))


def test_folding_pixels_into_channels_loses_nothing_and_column_comes_before_row_at_the_pixel_end():
    video = torch.randn(2, 3, 2, 8, 12)
    assert torch.equal(unpatch_pixels(patch_pixels(video, 4), 4), video)
    assert torch.equal(depth_to_space(space_to_depth(video, (2, 2, 3)), (2, 2, 3)), video)
    for row, column, channel in ((1, 0, 1), (0, 1, 4), (3, 2, 11)):  # channel = 4 * column + row
        assert torch.equal(patch_pixels(video, 4)[:, channel], video[:, 0, :, row::4, column::4])


def test_decibels_of_a_known_error():
    a = torch.zeros(2, 3, 1, 4, 4)
    b = a.clone()
    b[1] = 0.2  # a tenth of the range [-1, 1]: 20 dB
    value = psnr(a, b)
    assert value[0] >= 100 and abs(value[1].item() - 20) < 1e-3, value
    assert psnr(a + 3, a + 1)[0] >= 100, "values beyond [-1, 1] count as what is seen"
