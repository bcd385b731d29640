"""The VAE equals Diffusers' LTX-2 VAE on random sizes and weights; it is causal; it loads itself.
One frame: bit for bit with a long reach, to a stated error with a short one.

Hardware: CPU, seconds. Run: python -m pytest tests/test_vae.py
"""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clips.face import area_of, faces_of, load_facenet
from ltx.vae import VideoVAE, block_list, psnr
from toy import world

BUNDLED = Path(__file__).resolve().parents[1] / "weights" / "tiny" / "model.safetensors"
KINDS = {"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}


def draw_config(seed: int) -> dict:
    """A narrow VAE: 2 or 3 compressions of random kind and widening, other depths and widths."""
    rng = random.Random(seed)
    steps = [(rng.choice(sorted(KINDS)), rng.choice([1, 2])) for _ in range(rng.choice([2, 3]))]

    def blocks(ending: str) -> list:
        out = [["res_x", {"num_layers": rng.randint(1, 2)}]]
        for kind, widening in steps:
            out.append([kind + ending, {"multiplier": widening}])
            out.append(["res_x", {"num_layers": rng.randint(1, 2)}])
        return out

    latent = rng.choice([8, 16])  # Diffusers takes this as the encoder's first width too
    return {"in_channels": 3, "out_channels": 3, "latent_channels": latent,
            "encoder_base_channels": latent, "decoder_base_channels": rng.choice([4, 6]),
            "patch_size": rng.choice([2, 4]), "encoder_blocks": blocks("_res"),
            "decoder_blocks": blocks("")}


def build(seed: int) -> VideoVAE:
    torch.manual_seed(seed)
    vae = VideoVAE(draw_config(seed)).eval()
    statistics = dict(vae.per_channel_statistics.named_buffers())
    statistics["mean-of-means"].normal_()
    statistics["std-of-means"].uniform_(0.5, 2)
    return vae


def diffusers_twin(vae: VideoVAE, config: dict):
    """Diffusers' VAE with our weights. It groups blocks differently: each with its compression."""
    diffusers = pytest.importorskip("diffusers", reason="the second implementation is missing")
    encoder, decoder = block_list(config["encoder_blocks"]), block_list(config["decoder_blocks"])
    downs = [entry for entry in encoder if entry[0] != "res_x"]
    ups = [entry for entry in decoder if entry[0] != "res_x"]  # output side first, like Diffusers'
    widths_down, widths_up = [config["latent_channels"]], [config["decoder_base_channels"]]
    for widths, blocks in ((widths_down, downs), (widths_up, ups)):
        for _, widening in blocks:
            widths.append(widths[-1] * widening)
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
    places = {f"encoder.down_blocks.{2 * downs}.res_blocks.": "encoder.mid_block.resnets.",
              "decoder.up_blocks.0.res_blocks.": "decoder.mid_block.resnets.",
              "per_channel_statistics.mean-of-means": "latents_mean",
              "per_channel_statistics.std-of-means": "latents_std"}
    for i in range(downs):
        theirs = f"encoder.down_blocks.{i}."
        places[f"encoder.down_blocks.{2 * i}.res_blocks."] = theirs + "resnets."
        places[f"encoder.down_blocks.{2 * i + 1}."] = theirs + "downsamplers.0."
    for i in range(ups):
        theirs = f"decoder.up_blocks.{i}."
        places[f"decoder.up_blocks.{2 * i + 1}."] = theirs + "upsamplers.0."
        places[f"decoder.up_blocks.{2 * i + 2}.res_blocks."] = theirs + "resnets."
    state = {}
    for name, tensor in vae.state_dict().items():
        old = next((old for old in places if name.startswith(old)), "")
        state[places.get(old, "") + name.removeprefix(old)] = tensor
    return state


@torch.no_grad()
@pytest.mark.parametrize("seed", [4, 7])  # all kinds of blocks between them
def test_encoding_and_decoding_equal_diffusers(seed):
    config, vae = draw_config(seed), build(seed)
    twin, s = diffusers_twin(vae, config), vae.space_scale
    video = torch.rand(2, 3, 2 * vae.time_scale + 1, 2 * s, 3 * s) * 2 - 1
    latent = vae.encode(video)
    assert latent.shape == (2, config["latent_channels"], 3, 2, 3)
    mean, std = vae.statistics()
    theirs = (twin.encode(video).latent_dist.mean - mean) / std  # they normalise in their pipeline
    encoding = (latent - theirs).abs().max().item()
    ours, theirs = vae.decode(latent), twin.decode(latent * std + mean).sample
    assert ours.shape == theirs.shape == video.shape
    decoding = (ours - theirs).abs().max().item()
    # float32 rounding; a wrong layout is off by 0.1 and more
    assert encoding < 1e-4 and decoding < 1e-4, (encoding, decoding)


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
    assert alone.shape[2] == 1 and (alone - before[:, :, :1]).abs().max() < 1e-5


@torch.no_grad()
def test_frames_beyond_the_last_whole_group_are_dropped_and_odd_sizes_refused():
    vae = build(1)
    s, t = vae.space_scale, vae.time_scale
    video = torch.rand(1, 3, t + 1, s, s)
    longer = torch.cat([video, torch.rand(1, 3, t - 1, s, s)], dim=2)
    assert torch.equal(vae.encode(video), vae.encode(longer))
    with pytest.raises(ValueError, match=f"multiples of {s}, got {s + 1}x{s}; "):
        vae.encode(torch.rand(1, 3, 1, s + 1, s))


def test_decibels_of_a_known_error():
    a = torch.zeros(2, 3, 1, 4, 4)
    b = a.clone()
    b[1] = 0.2  # a tenth of the range [-1, 1]: 20 dB
    value = psnr(a, b)
    assert value[0] >= 100 and abs(value[1].item() - 20) < 1e-3, value
    assert psnr(a + 3, a + 1)[0] >= 100, "values beyond [-1, 1] count as what is seen"


def test_a_vae_loads_itself_from_a_checkpoint(tmp_path):
    stored, rounded = VideoVAE.load(BUNDLED), VideoVAE.load(BUNDLED, "cpu", torch.bfloat16)
    assert {t.dtype for t in stored.state_dict().values()} == {torch.bfloat16}, "as in the file"
    wide = VideoVAE.load(BUNDLED, dtype=torch.float32).state_dict()
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert all(torch.equal(wide[name], t.float()) for name, t in rounded.state_dict().items())
    save_file({}, tmp_path / "a.safetensors", {"config": '{"transformer": {}}'})
    with pytest.raises(ValueError, match="^expected 'vae' in the config of .*; use the full"):
        VideoVAE.load(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "a.safetensors", {"config": '{"vae": {"latent_channels": 8}}'})
    with pytest.raises(ValueError, match="^expected 'encoder_blocks' in the config of .*; use"):
        VideoVAE.load(tmp_path / "a.safetensors")


# ---------------------------------------------------------------- one frame


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 3])
def test_one_frame_with_a_reach_of_the_whole_video_is_that_of_decode_bit_for_bit(seed):
    vae = build(seed)
    latent = torch.randn(2, vae.latent_channels, 4, 3, 2)
    video = vae.decode(latent)                                           # (2, 3, F, h, w)
    for frame in range(3 * vae.time_scale + 1):
        assert torch.equal(vae.decode_frame(latent, frame, reach=(4, 0)), video[:, :, frame]), frame
    for frame in (-1, 3 * vae.time_scale + 1):
        with pytest.raises(ValueError, match=f"between 0 and {3 * vae.time_scale}, got {frame}"):
            vae.decode_frame(latent, frame)


@pytest.mark.parametrize("reach", [0, 2])
def test_gradients_of_one_frame_reach_the_latents_of_its_window_and_no_other(reach):
    """A window goes back one latent frame at least: its first is decoded like a picture."""
    vae = build(0)
    t = vae.time_scale
    for frame in (0, 1, 2 * t + 1, 6 * t):
        latent = torch.randn(1, vae.latent_channels, 7, 2, 2, requires_grad=True)
        vae.decode_frame(latent, frame, reach=(reach, 0)).square().sum().backward()
        cell = -(-frame // t)
        touched = [i for i in range(7) if latent.grad[:, :, i].abs().max() > 0]
        window = range(max(0, cell - max(1, reach)), min(7, cell + reach + 1))
        assert touched == list(window), (frame, touched)


REACHES = {0: 41.0, 1: 44.0, 2: 50.0, 3: 70.0}  # latent frames either side -> decibels to decode


@torch.no_grad()
def test_two_latent_frames_on_either_side_give_the_frame_of_the_whole_video_to_fifty_decibels():
    """Bundled VAE, 2 clips of people nobody trained on, 33 frames, eight of them compared."""
    vae, g = VideoVAE.load(BUNDLED, dtype=torch.float32), torch.Generator().manual_seed(5)
    person, setting = world.people("val", 2), world.draw_settings(2, g)
    video = world.render(person, setting, world.action_poses(torch.arange(2), 33, g), 64)[0]
    latent = vae.encode(video)                                           # (2, C, 9, 8, 8)
    decoded, frames, found = vae.decode(latent), [0, 1, 6, 15, 20, 29, 31, 32], {}
    assert {frame % vae.time_scale for frame in frames} == set(range(vae.time_scale))
    for reach in REACHES:
        some = [vae.decode_frame(latent, frame, reach=(reach, 0)) for frame in frames]
        some = torch.stack(some, dim=2)
        found[reach] = psnr(some.flatten()[None], decoded[:, :, frames].flatten()[None]).item()
    print({reach: round(decibels, 1) for reach, decibels in found.items()})
    assert list(found.values()) == sorted(found.values()), found
    assert all(found[reach] > least for reach, least in REACHES.items()), found
    assert found[0] < 47, "a reach of nothing can be told apart: the comparison means something"


MARGINS = {0: 34.0, 1: 44.0, 2: 51.0, 3: 57.0}  # cells around a face -> decibels to the whole


@torch.no_grad()
def test_three_cells_around_a_face_give_the_face_of_the_whole_frame_to_57_decibels():
    """And the recogniser the same vector, to 1e-5 in the cosine. Bundled VAE at four times its
    usual size, so that there is a frame around the face, of a person nobody trained on. The 22B
    decoder has more layers that look around; LTX-2.3's own tiles overlap by 2 cells."""
    vae, g = VideoVAE.load(BUNDLED, dtype=torch.float32), torch.Generator().manual_seed(5)
    net = load_facenet(BUNDLED.with_name("face.safetensors"))
    person, setting = world.people("val", 1), world.draw_settings(1, g)
    video, boxes, _ = world.render(person, setting, world.action_poses(torch.arange(1), 5, g), 256)
    latent, box = vae.encode(video), boxes[:, 1]                         # (1, C, 2, 32, 32)
    left, top, right, bottom = area = box[0].int().tolist()
    looked_at = area_of(box, torch.full((1, 5, 2), torch.nan), net.size)[0].tolist()
    whole, found, apart = vae.decode(latent)[:, :, 1], {}, {}            # (1, 3, 256, 256)
    for margin in MARGINS:
        part = vae.decode_frame(latent, 1, area, (2, margin))
        assert part.shape == whole.shape and part[:, :, 0, 0].abs().max() == 0
        face = (..., slice(top, bottom), slice(left, right))
        found[margin] = psnr(part[face], whole[face]).item()
        part = vae.decode_frame(latent, 1, looked_at, (2, margin))
        one, other = (net(faces_of(x, box, size=net.size)) for x in (part, whole))
        apart[margin] = 1 - (one * other).sum().item()
    print({margin: round(decibels, 1) for margin, decibels in found.items()}, apart)
    assert all(found[margin] >= least for margin, least in MARGINS.items()), found
    assert found[0] < 40, "without a margin it can be told apart: the comparison means something"
    assert apart[3] < 1e-5 < apart[1], apart


@pytest.mark.parametrize("area", [(10, 5, 12, 7), (-30, -9, 1, 2), (20, 14, 99, 99)])
def test_gradients_of_a_part_reach_the_cells_around_it_and_no_other(area):
    """A box may lie partly outside of the frame."""
    vae = build(0)
    s, latent = vae.space_scale, torch.randn(1, vae.latent_channels, 1, 9, 11, requires_grad=True)
    scaled = [edge * s / 2 for edge in area]
    vae.decode_frame(latent, 0, scaled, (0, 1)).square().sum().backward()
    rows, columns = latent.grad[0, :, 0].abs().amax(dim=0).nonzero().T
    left, top, right, bottom = (edge / 2 for edge in area)
    assert (rows.min(), columns.min()) == (max(0, int(top // 1) - 1), max(0, int(left // 1) - 1))
    assert rows.max() == min(8, -int(-bottom // 1)) and columns.max() == min(10, -int(-right // 1))


def test_recomputing_the_decoder_gives_the_same_gradient_bit_for_bit_and_keeps_less():
    vae, found, kept = build(3).requires_grad_(False), [], []
    for recompute in (False, True):
        latent = torch.randn(1, vae.latent_channels, 3, 2, 2,
                             generator=torch.Generator().manual_seed(0)).requires_grad_()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            video = vae.decode(latent, recompute)
        video.square().sum().backward()
        found.append(latent.grad)
        kept.append(sum(sizes))
    assert torch.equal(*found) and found[0].abs().max() > 0
    assert kept[1] < 0.5 * kept[0], kept
