"""The VAE equals Diffusers' LTX-2 VAE on random sizes and weights; it is causal; its decibels are decibels.
Decoding in tiles: the official intervals, a stated error, no seam, and memory that does not grow with the video.
Decoding one frame: bit for bit with a long reach, to a stated error with a short one. The demo and its picture.

Hardware: CPU, under 20 seconds. Run: python -m pytest tests/test_vae.py
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ltx import vae as vae_file
from ltx.checkpoint import load_weights, read_metadata
from ltx.plan import LiveBytes
from ltx.vae import (
    Tile,
    Tiling,
    VideoVAE,
    block_list,
    depth_to_space,
    patch_pixels,
    psnr,
    space_to_depth,
    space_weights,
    tile_frames,
    tile_pixels,
    tiles,
    time_tiles,
    time_weights,
    unpatch_pixels,
)
from toy import world
from toy.clips import clip_rows

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


# ------------------------------------------------------------ tiles: intervals and weights

LTX_BLOCKS = [["res_x", 4], ["compress_space", 2], ["res_x", 6], ["compress_time", 2], ["res_x", 4],
              ["compress_all", 2], ["res_x", 2], ["compress_all", 1], ["res_x", 2]]  # fmt: skip


def ltx_config(width: int = 8) -> dict:
    """LTX-2.3's own block list (8 frames x 32 x 32 pixels a cell), but narrow."""
    encoder = [[kind + ("" if kind == "res_x" else "_res"), number] for kind, number in LTX_BLOCKS]
    return {"in_channels": 3, "out_channels": 3, "latent_channels": width, "encoder_base_channels": width,
            "decoder_base_channels": width, "patch_size": 4, "encoder_blocks": encoder,
            "decoder_blocks": LTX_BLOCKS}  # fmt: skip


def narrow_ltx() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(ltx_config()).eval()


def full_tensor(runs) -> torch.Tensor:
    return torch.cat(list(runs), dim=2)


def test_the_official_default_cuts_121_frames_in_two_and_512x768_not_at_all():
    with torch.device("meta"):
        vae = VideoVAE(ltx_config())
    times, rows, columns = vae.plan_tiles((16, 16, 24), Tiling())  # 121 frames of 512x768; 10/3 and 24/2 cells
    assert times == [Tile(0, 10, 0, 3), Tile(6, 16, 4, 0)]
    assert [tile_frames(tile, 8) for tile in times] == [Tile(0, 73, 0, 24), Tile(48, 121, 25, 0)]
    assert rows == [Tile(0, 16, 0, 0)] and columns == [Tile(0, 24, 0, 0)]
    # Twice as wide and high: the shorter side in proportion (16 cells), one last tile of 4 cells.
    _, rows, columns = vae.plan_tiles((16, 32, 48), Tiling())
    assert rows == [Tile(0, 16, 0, 2), Tile(14, 30, 2, 2), Tile(28, 32, 2, 0)]
    assert columns == [Tile(0, 24, 0, 2), Tile(22, 46, 2, 2), Tile(44, 48, 2, 0)]
    assert [tile_pixels(tile, 32) for tile in columns][1] == Tile(704, 1472, 64, 64)
    assert vae.plan_tiles((16, 48, 32), Tiling())[1:] == (columns, rows)
    assert vae.plan_tiles((16, 34, 60), Tiling())[1][0].end == 14  # 1088x1920: 24 * 34 / 60 = 13.6, rounded
    assert vae.plan_tiles((3, 1, 60), Tiling())[1] == [Tile(0, 1, 0, 0)]


def test_tiles_cover_everything_share_what_they_fade_over_and_weigh_something_everywhere():
    for length in range(1, 34, 2):
        for size in range(0, 13):
            for overlap in range(0, max(size, 1)):
                row, later = tiles(length, size, overlap), time_tiles(length, size, overlap)
                case = (length, size, overlap)
                assert row[0].start == 0 and row[-1].end == length and row[0].left == row[-1].right == 0, case
                for a, b in zip(row[:-1], row[1:], strict=True):
                    assert a.end - b.start == a.right == b.left == overlap and a.end - a.start == size, case
                for a, b in zip(later[:-1], later[1:], strict=True):
                    assert a.end - b.start == b.left == a.right + 1 and a.start <= b.start and a.end < b.end, case
                for parts, place, weigh in ((row, tile_pixels, space_weights), (later, tile_frames, time_weights)):
                    total = torch.zeros(2 * length if parts is row else 2 * (length - 1) + 1)
                    for tile in parts:
                        start, end, _, _ = place(tile, 2)
                        total[start:end] += weigh(place(tile, 2))
                    assert total.min() > 0, case
                    if 2 * overlap <= size:  # never more than two tiles in one place: the weights sum to 1
                        assert (total - 1).abs().max() < 1e-6, case


def test_fades_are_the_specified_fractions():
    fade = space_weights(Tile(10, 20, 3, 2))
    assert torch.allclose(fade, torch.tensor([1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]), atol=1e-7)
    fade = time_weights(Tile(10, 18, 4, 2))  # a temporal fade-in begins with a frame of weight 0
    assert torch.allclose(fade, torch.tensor([0, 1 / 4, 2 / 4, 3 / 4, 1, 1, 2 / 3, 1 / 3]), atol=1e-7)
    assert torch.equal(space_weights(Tile(0, 5, 0, 0)), torch.ones(5))
    assert torch.equal(time_weights(Tile(0, 5, 0, 0)), torch.ones(5))
    assert torch.equal(time_weights(Tile(8, 12, 1, 0)), torch.tensor([0.0, 1, 1, 1]))  # no overlap asked for


def test_sizes_become_whole_cells_and_impossible_ones_are_refused_in_one_line():
    with torch.device("meta"):
        vae = VideoVAE(ltx_config())  # 8 frames, 32 pixels
    assert vae.plan_tiles((16, 1, 40), Tiling(335, 33, 37, 9)) == (
        time_tiles(16, 5, 2), tiles(1, 10, 2), tiles(40, 10, 2))  # to the nearest cell; overlaps up
    for wrong in ({"space": -1}, {"space": 64, "space_overlap": 64}, {"time_overlap": -8}, {"time": 8}):
        with pytest.raises(ValueError, match="^expected a tile in (space|time) of 0 .*, got .*; use .*$"):
            Tiling(**wrong)
    Tiling(space=0, time=0)  # off, whatever the overlaps
    for wrong, hint in ((Tiling(space=15, space_overlap=0), "use 32 or more"), (Tiling(96, 65), "use 128 or more"),
                        (Tiling(time=8, time_overlap=7), "use 16 or more")):
        latent = torch.zeros(1, 8, 2, 2, 2, device="meta")
        with pytest.raises(ValueError, match=f"^expected a tile in .*, got .*; {hint}, or 0 for off$"):
            vae.decode_tiles(latent, wrong)  # at once, not when the first run is asked for


# ------------------------------------------------------------ tiles: the frames


def by_the_book(vae: VideoVAE, latent: torch.Tensor, time: tuple, rows: tuple, columns: tuple) -> torch.Tensor:
    """The specification word for word: (size, overlap) in cells; every tile, three ramps each, one sum."""
    T, S = vae.time_scale, vae.space_scale
    B, _, F, H, W = latent.shape

    def intervals(length: int, size: int, overlap: int) -> list[list[int]]:
        found, start = [], 0
        while not found or found[-1][1] < length:
            found.append([start, min(start + size, length), overlap if start else 0, overlap])
            start += size - overlap
        found[-1][3] = 0
        return found

    total = torch.zeros(B, 3, 1 + T * (F - 1), S * H, S * W, dtype=torch.float64)
    weights = torch.zeros(total.shape[2:], dtype=torch.float64)
    for i, (f0, f1, fl, fr) in enumerate(intervals(F, *time)):
        f0, fl = (f0 - 1, fl + 1) if i else (f0, fl)
        for h0, h1, hl, hr in intervals(H, *rows):
            for w0, w1, wl, wr in intervals(W, *columns):
                part = vae.decode(latent[:, :, f0:f1, h0:h1, w0:w1]).double()
                weight = torch.ones(part.shape[2:], dtype=torch.float64)
                left = 1 + T * (fl - 1) if fl else 0
                for k in range(left):
                    weight[k] *= k / left
                for k in range(T * fr):
                    weight[-1 - k] *= (k + 1) / (T * fr + 1)
                for axis, ramp_in, ramp_out in ((1, S * hl, S * hr), (2, S * wl, S * wr)):
                    for k in range(ramp_in):
                        weight.select(axis, k).mul_((k + 1) / (ramp_in + 1))
                    for k in range(ramp_out):
                        weight.select(axis, -1 - k).mul_((k + 1) / (ramp_out + 1))
                box = (slice(T * f0, 1 + T * (f1 - 1)), slice(S * h0, S * h1), slice(S * w0, S * w1))
                total[(..., *box)] += part * weight
                weights[box] += weight
    return total / weights


@torch.no_grad()
@pytest.mark.parametrize("time, space, overlaps", [
    ((3, 1), 4, 1), ((4, 3), 4, 3), ((2, 0), 3, 0), ((20, 1), 4, 2), ((3, 2), 20, 1)])  # fmt: skip
def test_streamed_tiles_equal_the_specification_in_one_sum(time, space, overlaps):
    """Two routes, one answer: run by run against all tiles in one sum. Largest difference measured: 2e-7."""
    vae = build(5)
    t, s = vae.time_scale, vae.space_scale
    latent = torch.randn(2, vae.latent_channels, 8, 4, 6)
    side = max(round(space * 4 / 6), overlaps + 1)
    book = by_the_book(vae, latent, time, (side, overlaps), (space, overlaps))
    found = full_tensor(vae.decode_tiles(latent, Tiling(space * s, overlaps * s, time[0] * t, time[1] * t)))
    assert found.shape == book.shape == vae.decode(latent).shape
    difference = (found - book).abs().max().item()
    assert difference < 2e-6, difference


@torch.no_grad()
def test_one_tile_is_decode_bit_for_bit():
    vae = build(1)
    latent = torch.randn(1, vae.latent_channels, 3, 4, 5)
    s, t = vae.space_scale, vae.time_scale
    for dtype in (torch.float32, torch.bfloat16):
        vae, latent = vae.to(dtype), latent.to(dtype)
        for tiling in (None, Tiling(), Tiling(space=0, time=0), Tiling(5 * s, s, 3 * t, t), Tiling(0, 0, 3 * t, 2 * t)):
            (run,) = vae.decode_tiles(latent, tiling)
            assert run.dtype == dtype and torch.equal(run, vae.decode(latent)), tiling
        runs = list(vae.decode_tiles(latent, Tiling(4 * s, s, 2 * t, t)))  # several tiles keep the type too
        assert {run.dtype for run in runs} == {dtype} and sum(run.shape[2] for run in runs) == 2 * t + 1


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbour_in_the_batch_and_no_gradient_is_kept():
    vae = build(1)
    latent = torch.randn(2, vae.latent_channels, 5, 4, 5)
    tiling = Tiling(3 * vae.space_scale, vae.space_scale, 2 * vae.time_scale, vae.time_scale)
    both = full_tensor(vae.decode_tiles(latent, tiling))
    for i in range(2):
        assert (both[i : i + 1] - full_tensor(vae.decode_tiles(latent[i : i + 1], tiling))).abs().max() < 1e-5
    with torch.enable_grad():
        assert not any(run.requires_grad for run in vae.decode_tiles(latent, tiling))


@torch.no_grad()
def test_the_first_run_is_there_before_the_second_tile_is_decoded_and_runs_are_never_empty():
    vae = build(1)
    t = vae.time_scale
    latent = torch.randn(1, vae.latent_channels, 9, 2, 2)
    calls, decode = [], vae.decode
    vae.decode = lambda box: calls.append(box.shape[2]) or decode(box)
    runs = vae.decode_tiles(latent, Tiling(0, 0, 4 * t, t))  # latent frames [0, 4), [2, 7), [5, 9)
    assert not calls
    lengths = []
    for seen in ([4], [4, 5], [4, 5, 4]):
        lengths.append(next(runs).shape[2])
        assert calls == seen
    assert next(runs, None) is None and lengths == [2 * t, 3 * t, 3 * t + 1]
    for size, overlap in ((2, 1), (3, 2), (4, 3), (1, 0)):  # the first two tiles may begin together
        runs = list(vae.decode_tiles(latent, Tiling(0, 0, size * t, overlap * t)))
        assert all(run.shape[2] for run in runs) and sum(run.shape[2] for run in runs) == 8 * t + 1


@torch.no_grad()
def test_memory_is_that_of_a_tile_and_not_of_the_video():
    """Bytes of tensors alive at once while runs come and go, with a decoder that costs nothing by itself."""
    with torch.device("meta"):
        vae = VideoVAE(ltx_config())

    frame, cells = 3 * 64 * 96 * 4, (16, 31, 61)

    def enlarge(box: torch.Tensor) -> torch.Tensor:
        before.append(live.now / frame)
        B, _, F, H, W = box.shape
        video = box[:, :3, :, None, :, None, :, None].expand(B, 3, F, 8, H, 32, W, 32)
        return video.reshape(B, 3, 8 * F, 32 * H, 32 * W)[:, :, 7:]

    vae.decode, peaks = enlarge, {}
    for length in cells:
        latent, count, before = torch.randn(1, 8, length, 2, 3), 0, []
        with LiveBytes() as live:
            runs = vae.decode_tiles(latent, Tiling())
            while (run := next(runs, None)) is not None:
                count += run.shape[2]
                run = None
        peaks[length] = live.peak / frame
        assert count == 8 * length - 7 and before[0] < 0.1
        assert 25 <= max(before[1:]) < 25.1, f"{before} frames beside a tile: only what it shares with the next, 25"
    print(f"peak in frames: {peaks}")
    # One tile (88 frames inside this decoder), what is shared (25, twice while it is copied), and a run (56).
    assert 88 < peaks[61] <= 88 + 2 * 25 + 56 + 1 and peaks[61] == peaks[31], peaks


# ------------------------------------------------------------ tiles: error and seams


@pytest.fixture(scope="module")
def portrait():
    """The bundled VAE and a clip of 17 frames, 128x192, of one of the world's people; latent (1, 128, 5, 16, 24)."""
    path = Path(__file__).resolve().parent.parent / "weights" / "tiny" / "model.safetensors"
    vae = VideoVAE(read_metadata(path)["config"]["vae"])
    load_weights(vae, path, "vae.", torch.float32).eval()
    g = torch.Generator().manual_seed(7)
    person, setting = world.people("val", 1), world.draw_settings(1, g)
    poses = world.action_poses(torch.zeros(1, dtype=torch.long), 17, g)
    video = world.render(person, setting, poses, 192)[0][:, :, :, 32:160]
    with torch.no_grad():
        latent = vae.encode(video)
        return vae, video, latent, vae.decode(latent)


# Tiling, then bounds of the error of tiled against untiled pixels: largest, mean, PSNR in dB.
BOUNDS = {
    "space, 64 px": (Tiling(64, 16, 0, 0), 0.40, 0.019, 37.0),
    "space, 96 px": (Tiling(96, 32, 0, 0), 0.135, 0.0075, 44.4),
    "time": (Tiling(0, 0, 8, 4), 0.45, 0.0047, 42.5),
    "both": (Tiling(96, 32, 8, 4), 0.46, 0.0100, 40.4),
}


@torch.no_grad()
@pytest.mark.parametrize("name", BOUNDS)
def test_tiled_frames_are_within_the_stated_error_of_untiled_ones(name, portrait):
    """Bundled VAE, pixels in [-1, 1]. Measured: largest error, mean error, PSNR (untiled against the clip: 36.8 dB).

    64 px with 16 shared (2 cells, LTX-2.3's number of cells): 0.363, 0.0171, 37.5 dB; 96 px with 32: 0.122, 0.0068,
    44.9 dB; 8 frames with 4: 0.412, 0.0042, 43.0 dB; 96 px and 8 frames: 0.426, 0.0090, 40.9 dB.
    """
    vae, video, latent, untiled = portrait
    tiling, largest, mean, decibels = BOUNDS[name]
    tiled = full_tensor(vae.decode_tiles(latent, tiling))
    error = (tiled - untiled).abs()
    found = error.max().item(), error.mean().item(), psnr(tiled, untiled).item()
    print(f"{name}: largest {found[0]:.3f}, mean {found[1]:.4f}, {found[2]:.1f} dB; against the clip itself "
          f"{psnr(tiled, video).item():.1f} dB, untiled {psnr(untiled, video).item():.1f} dB")
    assert 0 < found[0] < largest and found[1] < mean and found[2] > decibels, found


def jump_ratio(vae: VideoVAE, latent: torch.Tensor, tiling: Tiling, untiled: torch.Tensor) -> float:
    """Mean absolute jump from one pixel to the next, tiled / untiled, at the worst row or column of any fade."""
    tiled, worst = full_tensor(vae.decode_tiles(latent, tiling)), 0.0
    for axis, parts in zip((3, 4), vae.plan_tiles(latent.shape[2:], tiling)[1:], strict=True):
        other = [i for i in range(5) if i != axis]
        ratio = tiled.diff(dim=axis).abs().mean(dim=other) / untiled.diff(dim=axis).abs().mean(dim=other)
        for start, _, left, _ in [tile_pixels(part, vae.space_scale) for part in parts[1:]]:
            worst = max(worst, ratio[start - 1 : start + left].max().item())  # ratio[x]: from pixel x to pixel x + 1
    return worst


CUTS = {
    "in the middle of what they share": lambda tile, k, n: (k >= tile.left // 2) & (n - k > (tile.right + 1) // 2),
    "where the later one begins": lambda tile, k, n: n - k > tile.right,
    "where the earlier one ends": lambda tile, k, n: k >= tile.left,
    "nowhere, plain average": lambda tile, k, n: k >= 0,
}


@torch.no_grad()
def test_no_border_of_tiles_shows_and_any_plain_cut_would(portrait, monkeypatch):
    """Measured, tiled / untiled: 2.00 with 16 px shared, 1.16 with 32 px. Cut instead of faded: 5.1 to 10.0.

    The number is that of the worst of all rows and columns in any fade, borders included.
    """
    vae, _, latent, _ = portrait
    latent = latent[:, :, :2]  # five frames are enough to see it
    untiled = vae.decode(latent)
    narrow, wide = (jump_ratio(vae, latent, tiling, untiled) for tiling in (Tiling(64, 16, 0, 0), Tiling(96, 32, 0, 0)))
    print(f"16 px shared: {narrow:.2f}, 32 px shared: {wide:.2f}")
    for name, keep in CUTS.items():
        monkeypatch.setattr(vae_file, "space_weights", lambda tile, keep=keep: keep(
            tile, torch.arange(tile.end - tile.start), tile.end - tile.start).float())
        cut = jump_ratio(vae, latent, Tiling(64, 16, 0, 0), untiled)
        print(f"cut {name}: {cut:.2f}")
        assert cut > 4.5, (name, cut)
    assert narrow < 2.5 and wide < 1.5, (narrow, wide)


@torch.no_grad()
def test_ltx_blocks_are_exact_away_from_the_border_and_wrong_only_where_a_tile_cannot_see():
    """LTX-2.3's blocks, random weights, one row of 64 latent columns in two tiles of 40 that share 2, 8 or 16.

    Measured: no pixel differs by more than 1e-5 farther than 11 columns from the border of a tile. Mean error over the
    row 0.016, 0.0047, 0.0033, beside a deviation of the pixels of 0.28. Random weights say nothing about LTX-2.3's own.
    """
    vae = narrow_ltx()
    latent = torch.randn(1, 8, 1, 1, 64)
    untiled, means = vae.decode(latent), []
    for overlap in (2, 8, 16):
        tiled = full_tensor(vae.decode_tiles(latent, Tiling(40 * 32, overlap * 32, 0, 0)))
        error = (tiled - untiled).abs().unflatten(4, (64, 32))                            # (1, 3, 1, 32, 64, 32)
        means.append(error.mean().item())
        error = error.amax(dim=(0, 1, 2, 3, 5))                                           # (64,) latent columns
        start = 40 - overlap  # the second tile's; the first one's end is 40
        assert error[: min(start, 40 - 12)].max() < 1e-5, "the first tile alone, 12 columns before its end"
        assert error[max(start + 12, 40) :].max() < 1e-5, "the second tile alone, 12 columns after its beginning"
        assert error[start:40].max() > 1e-2, "both tiles, and neither sees all it should"
    print(f"mean error with 2, 8, 16 shared columns: {means}; deviation of the pixels {untiled.std():.2f}")
    assert all(found < bound for found, bound in zip(means, (0.02, 0.006, 0.0045), strict=True)), means


# ---------------------------------------------------------------- one frame


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 3])
def test_one_frame_with_a_reach_of_the_whole_video_is_that_of_decode_bit_for_bit(seed):
    vae = build(seed)
    latent = torch.randn(2, vae.latent_channels, 4, 3, 2)
    video = vae.decode(latent)                                                            # (2, 3, F, h, w)
    assert video.shape[2] == 3 * vae.time_scale + 1
    for frame in range(video.shape[2]):
        for reach in (4, 9):
            assert torch.equal(vae.decode_frame(latent, frame, reach), video[:, :, frame]), (frame, reach)


@torch.no_grad()
def test_one_frame_of_a_picture_and_a_frame_that_is_not_there():
    vae = build(1)
    latent = torch.randn(1, vae.latent_channels, 1, 2, 2)
    assert torch.equal(vae.decode_frame(latent, 0), vae.decode(latent)[:, :, 0])
    for frame in (-1, 1):
        with pytest.raises(ValueError, match=f"between 0 and 0, got {frame}"):
            vae.decode_frame(latent, frame)


@pytest.mark.parametrize("frame", [0, 1, 9, 24])
@pytest.mark.parametrize("reach", [0, 1, 2])
def test_gradients_of_one_frame_reach_the_latents_of_its_window_and_no_other(frame, reach):
    """Bundled VAE, 7 latent frames of 4 frames each. A window goes back one at least: its first cell is a picture's."""
    vae = bundled()
    latent = torch.randn(1, vae.latent_channels, 7, 2, 2, requires_grad=True)
    vae.decode_frame(latent, frame, reach).square().sum().backward()
    cell = -(-frame // vae.time_scale)
    touched = [i for i in range(7) if latent.grad[:, :, i].abs().max() > 0]
    assert touched == list(range(max(0, cell - max(1, reach)), min(7, cell + reach + 1))), touched


def bundled() -> VideoVAE:
    path = Path(vae_file.__file__).parent / "weights" / "tiny" / "model.safetensors"
    return load_weights(VideoVAE(read_metadata(path)["config"]["vae"]), path, "vae.", torch.float32).eval()


REACHES = {0: 41.0, 1: 44.0, 2: 50.0, 3: 70.0}  # latent frames on either side -> decibels to the whole decode


@torch.no_grad()
def test_two_latent_frames_on_either_side_give_the_frame_of_the_whole_video_to_fifty_decibels():
    """Bundled VAE, 4 clips of people nobody trained on, 49 frames, ten of them compared. Measured for a reach of 0, 1,
    2 and 3: 43.7, 47.3, 57.8 and 76.3 dB (one PSNR over all). The VAE itself redraws these clips at 31.4 dB."""
    vae, rows = bundled(), clip_rows("val", 0, 4)
    poses = world.action_poses(rows["action"], 49, torch.Generator().manual_seed(5))
    video = world.render(rows["person"], rows["setting"], poses, 64)[0]
    latent = vae.encode(video)                                                            # (4, C, 13, 8, 8)
    whole_video, frames, found = vae.decode(latent), [0, 1, 6, 15, 20, 29, 34, 43, 47, 48], {}  # every place in a cell
    assert {frame % vae.time_scale for frame in frames} == set(range(vae.time_scale))
    for reach in REACHES:
        some = torch.stack([vae.decode_frame(latent, frame, reach) for frame in frames], dim=2)
        found[reach] = psnr(some.flatten()[None], whole_video[:, :, frames].flatten()[None]).item()
    print(f"the whole decode against the clips: {psnr(whole_video.flatten()[None], video.flatten()[None]).item():.1f}")
    print("\n".join(["reach  decibels", *(f"{reach:5d}  {found[reach]:8.1f}" for reach in REACHES)]))
    assert list(found.values()) == sorted(found.values()), found
    assert all(found[reach] > least for reach, least in REACHES.items()), found
    assert found[0] < 47, "a reach of nothing can be told apart: the comparison means something"


class Folding:
    """In the place of a VAE: cells of 2 frames x 4 x 4 pixels, and one known error on the way back, in frame 2."""

    time_scale = 2

    def encode(self, video):
        first, rest = video[:, :, :1].repeat(1, 1, 2, 1, 1), video[:, :, 1:]
        self.video = video
        return 2 * torch.nn.functional.avg_pool3d(torch.cat([first, rest], dim=2), (2, 4, 4))

    def decode(self, latent):
        back = self.video.clone()
        back[:, 1, 2, :4, :4] += 0.1  # green, in frame 2, upper left: four times 0.1 of 2 is 51 of 255
        return back


def test_the_picture_holds_the_clip_its_reconstruction_four_times_their_difference_and_the_latents():
    video = torch.rand(1, 3, 5, 8, 12) * 1.6 - 0.8
    pixels = np.asarray(vae_file.draw(Folding(), video, scale=2))
    as_bytes = ((video[0] + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()        # (F, h, w, 3)
    left, step, h, w = 150, 12 * 2 + 6, 16, 24  # the label column, a frame and its gap, the size of an enlarged frame
    tops = [30, 38 + h, 66 + 2 * h, 124 + 3 * h]
    for f in range(5):
        columns = slice(left + f * step, left + f * step + w)
        seen, made, difference = (pixels[top : top + h, columns][::2, ::2] for top in tops[:3])
        assert np.array_equal(seen, as_bytes[f]), f"frame {f} of the input"
        wrong = np.zeros((8, 12, 3), dtype=bool)
        wrong[:4, :4, 1] = f == 2
        assert np.array_equal(made[~wrong], as_bytes[f][~wrong]), f"frame {f} of the reconstruction"
        assert (difference[~wrong] == 255).all() and (difference[wrong] == 204).all(), np.unique(difference)
    cells = torch.nn.functional.avg_pool2d(video[0].transpose(0, 1)[[0, 1, 3]], 4)        # (3, 3, 2, 3): first frames
    cells[1:] = (cells[1:] + torch.nn.functional.avg_pool2d(video[0].transpose(0, 1)[[2, 4]], 4)) / 2
    for cell, x in enumerate([left, left + step + step // 2, left + 3 * step + step // 2]):  # middles of their spans
        found = pixels[tops[3] : tops[3] + h, x : x + w][4::8, 4::8].astype(int)
        expected = ((cells[cell] + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert np.abs(found - expected).max() <= 1, f"latent frame {cell}"


def test_the_demo_prints_the_decibels_of_the_bundled_vae_and_writes_its_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae_file.demo()
    lines = capsys.readouterr().out.splitlines()
    decibels = float(next(line for line in lines if " dB" in line).split(" dB")[0].split()[-1])
    assert 25 < decibels < 40, decibels
    assert [line.split(":")[0] for line in lines[-2:]] == ["wrote vae_demo.png", "Notice"]
    assert [path.name for path in tmp_path.iterdir()] == ["vae_demo.png"]
    assert np.asarray(vae_file.Image.open("vae_demo.png")).shape[1] <= 1600


def test_without_the_bundled_file_the_demo_says_so_in_one_line_and_prints_the_rest(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vae_file, "__file__", str(tmp_path / "vae.py"))
    vae_file.demo()
    text = capsys.readouterr().out
    assert text.count("no picture") == 1 and "8 frames x 32 x 32 pixels" in text and "Notice:" in text
    assert not list(tmp_path.iterdir())
