"""Decoding in tiles: the official intervals, the specification word for word, a stated error, no
seam, and memory that does not grow with the video.

Hardware: CPU, seconds. Run: python -m pytest tests/test_tiling.py
"""

import pytest
import torch
from test_vae import BUNDLED, build

from ltx import tiling as tiling_file
from ltx.plan import LiveBytes
from ltx.tiling import Tile, Tiling, plan_tiles, space_weights, tiles, time_tiles, time_weights
from ltx.vae import VideoVAE, psnr
from toy import world

SCALES = (8, 32)  # LTX-2.3: frames and pixels of a latent cell


def ltx_vae() -> VideoVAE:
    """LTX-2.3's own block list (8 frames x 32 x 32 pixels a cell), but narrow."""
    blocks = [["res_x", 4], ["compress_space", 2], ["res_x", 6], ["compress_time", 2], ["res_x", 4],
              ["compress_all", 2], ["res_x", 2], ["compress_all", 1], ["res_x", 2]]
    torch.manual_seed(0)
    return VideoVAE({"in_channels": 3, "out_channels": 3, "latent_channels": 8, "patch_size": 4,
                     "encoder_base_channels": 8, "decoder_base_channels": 8,
                     "encoder_blocks": blocks, "decoder_blocks": blocks}).eval()


def joined(runs) -> torch.Tensor:
    return torch.cat(list(runs), dim=2)


# ------------------------------------------------------------ intervals and weights


def test_the_official_default_cuts_121_frames_in_two_and_512x768_not_at_all():
    times, rows, columns = plan_tiles((16, 16, 24), Tiling(), SCALES)  # 10/3 and 24/2 cells
    assert times == [Tile(0, 10, 0, 3), Tile(6, 16, 4, 0)]
    assert [tile.frames(8) for tile in times] == [Tile(0, 73, 0, 24), Tile(48, 121, 25, 0)]
    assert rows == [Tile(0, 16, 0, 0)] and columns == [Tile(0, 24, 0, 0)]
    # Twice as wide and high: the shorter side in proportion (16 cells), one last tile of 4 cells.
    _, rows, columns = plan_tiles((16, 32, 48), Tiling(), SCALES)
    assert rows == [Tile(0, 16, 0, 2), Tile(14, 30, 2, 2), Tile(28, 32, 2, 0)]
    assert columns == [Tile(0, 24, 0, 2), Tile(22, 46, 2, 2), Tile(44, 48, 2, 0)]
    assert columns[1].pixels(32) == Tile(704, 1472, 64, 64)
    assert plan_tiles((16, 48, 32), Tiling(), SCALES)[1:] == (columns, rows)
    assert plan_tiles((16, 34, 60), Tiling(), SCALES)[1][0].end == 14  # 24 * 34 / 60 = 13.6
    assert plan_tiles((3, 1, 60), Tiling(), SCALES)[1] == [Tile(0, 1, 0, 0)]


def test_wherever_tiles_overlap_their_weights_sum_to_one():
    for length, size, overlap in ((n, s, o) for n in (1, 2, 7, 12, 33) for s in (0, 1, 2, 5, 12)
                                  for o in range(max(s, 1))):
        space, time = torch.zeros(2 * length), torch.zeros(2 * length - 1)
        for tile in (tile.pixels(2) for tile in tiles(length, size, overlap)):
            space[tile.start : tile.end] += space_weights(tile)
        for tile in (tile.frames(2) for tile in time_tiles(length, size, overlap)):
            time[tile.start : tile.end] += time_weights(tile)
        for total in (space, time):
            assert total.min() > 0, (length, size, overlap)  # nothing is left out
            if 2 * overlap <= size:  # never more than two tiles in one place
                assert (total - 1).abs().max() < 1e-6, (length, size, overlap)


def test_sizes_become_whole_cells_and_impossible_ones_are_refused_in_one_line():
    assert plan_tiles((16, 1, 40), Tiling(335, 33, 37, 9), SCALES) == (
        time_tiles(16, 5, 2), tiles(1, 10, 2), tiles(40, 10, 2))  # to the nearest; overlaps up
    for wrong in ({"space": -1}, {"space": 64, "space_overlap": 64}, {"time_overlap": -8}):
        with pytest.raises(ValueError, match="^expected a tile in (space|time) of 0 .*; use .*$"):
            Tiling(**wrong)
    Tiling(space=0, time=0)  # off, whatever the overlaps
    with torch.device("meta"):
        vae, latent = ltx_vae(), torch.zeros(1, 8, 2, 2, 2)
    for wrong, hint in ((Tiling(space=15, space_overlap=0), "use 32 or more"),
                        (Tiling(96, 65), "use 128 or more"), (Tiling(0, 0, 8, 7), "use 16 or")):
        with pytest.raises(ValueError, match=f"^expected a tile in .*, got .*; {hint}.* for off$"):
            vae.decode_tiles(latent, wrong)  # at once, not when the first run is asked for


# ------------------------------------------------------------ the frames


def by_the_book(vae: VideoVAE, latent: torch.Tensor, time: tuple, rows: tuple, columns: tuple
                ) -> torch.Tensor:
    """The specification word for word: (size, overlap) in cells; three ramps a tile, one sum."""
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
                box = slice(T * f0, 1 + T * (f1 - 1)), slice(S * h0, S * h1), slice(S * w0, S * w1)
                total[(..., *box)] += part * weight
                weights[box] += weight
    return total / weights


@torch.no_grad()
@pytest.mark.parametrize("time, space, overlap", [((3, 1), 4, 1), ((4, 3), 4, 3), ((2, 0), 3, 0)])
def test_streamed_tiles_equal_the_specification_in_one_sum(time, space, overlap):
    """Two routes, one answer: run by run against all tiles in one sum."""
    vae = build(5)
    t, s = vae.time_scale, vae.space_scale
    latent = torch.randn(2, vae.latent_channels, 8, 4, 6)
    side = max(round(space * 4 / 6), overlap + 1)
    book = by_the_book(vae, latent, time, (side, overlap), (space, overlap))
    tiling = Tiling(space * s, overlap * s, time[0] * t, time[1] * t)
    found = joined(vae.decode_tiles(latent, tiling))
    assert found.shape == book.shape == vae.decode(latent).shape
    assert (found - book).abs().max() < 2e-6  # measured 2e-7


@torch.no_grad()
def test_one_tile_is_decode_bit_for_bit():
    vae = build(1)
    latent = torch.randn(1, vae.latent_channels, 3, 4, 5)
    s, t = vae.space_scale, vae.time_scale
    for dtype in (torch.float32, torch.bfloat16):
        vae, latent = vae.to(dtype), latent.to(dtype)
        for tiling in (None, Tiling(), Tiling(0, 0, 0, 0), Tiling(5 * s, s, 3 * t, t)):
            (run,) = vae.decode_tiles(latent, tiling)
            assert run.dtype == dtype and torch.equal(run, vae.decode(latent)), tiling
        with torch.enable_grad():
            runs = list(vae.decode_tiles(latent.requires_grad_(), Tiling(4 * s, s, 2 * t, t)))
        assert {run.dtype for run in runs} == {dtype}, "several tiles keep the type too"
        assert not any(run.requires_grad for run in runs), "for inference only"


@torch.no_grad()
def test_the_first_run_is_there_before_the_second_tile_is_decoded_and_runs_are_never_empty():
    vae = build(1)
    t = vae.time_scale
    latent = torch.randn(1, vae.latent_channels, 9, 2, 2)
    calls, decode = [], vae.decode
    vae.decode = lambda box: calls.append(box.shape[2]) or decode(box)
    runs = vae.decode_tiles(latent, Tiling(0, 0, 4 * t, t))  # latent frames [0, 4), [2, 7), [5, 9)
    lengths = []
    for seen in ([4], [4, 5], [4, 5, 4]):
        lengths.append(next(runs).shape[2])
        assert calls == seen
    assert next(runs, None) is None and lengths == [2 * t, 3 * t, 3 * t + 1]
    for size, overlap in ((2, 1), (4, 3), (1, 0)):  # the first two tiles may begin together
        runs = list(vae.decode_tiles(latent, Tiling(0, 0, size * t, overlap * t)))
        assert all(run.shape[2] for run in runs) and joined(runs).shape[2] == 8 * t + 1


@torch.no_grad()
def test_memory_is_that_of_a_tile_and_not_of_the_video():
    """Bytes of tensors alive at once while runs come and go, with a decoder that costs nothing."""
    with torch.device("meta"):
        vae = ltx_vae()
    frame = 3 * 64 * 96 * 4

    def enlarge(box: torch.Tensor) -> torch.Tensor:
        before.append(live.now / frame)
        B, _, F, H, W = box.shape
        video = box[:, :3, :, None, :, None, :, None].expand(B, 3, F, 8, H, 32, W, 32)
        return video.reshape(B, 3, 8 * F, 32 * H, 32 * W)[:, :, 7:]

    vae.decode, peaks = enlarge, {}
    for length in (31, 61):
        latent, count, before = torch.randn(1, 8, length, 2, 3), 0, []
        with LiveBytes() as live:
            runs = vae.decode_tiles(latent)
            while (run := next(runs, None)) is not None:
                count += run.shape[2]
                run = None
        peaks[length] = live.peak / frame
        assert count == 8 * length - 7 and before[0] < 0.1
        assert 25 <= max(before[1:]) < 25.1, "frames besides a tile: the 25 shared ones"
    # One tile (88 frames inside this decoder), what is shared (25, twice while copied), a run (56).
    assert 88 < peaks[61] <= 88 + 2 * 25 + 56 + 1 and peaks[61] == peaks[31], peaks


# ------------------------------------------------------------ error and seams


def jump_ratio(vae: VideoVAE, latent: torch.Tensor, tiling: Tiling, untiled: torch.Tensor) -> float:
    """Mean jump from pixel to pixel, tiled / untiled, at the worst row or column of a fade."""
    tiled, worst = joined(vae.decode_tiles(latent, tiling)), 0.0
    for axis, parts in zip((3, 4), vae.plan_tiles(latent.shape[2:], tiling)[1:], strict=True):
        other = [i for i in range(5) if i != axis]
        jumps = [video.diff(dim=axis).abs().mean(dim=other) for video in (tiled, untiled)]
        for start, _, left, _ in [part.pixels(vae.space_scale) for part in parts[1:]]:
            fade = slice(start - 1, start + left)  # entry x: from pixel x to pixel x + 1
            worst = max(worst, (jumps[0] / jumps[1])[fade].max().item())
    return worst


@torch.no_grad()
def test_no_border_of_tiles_shows_and_a_plain_cut_would(monkeypatch):
    """Bundled VAE, a person in five frames of 128x192. Measured, tiled / untiled: 2.00 with 16 px
    shared, 1.16 with 32 px; cut or averaged: 5 and more."""
    vae, g = VideoVAE.load(BUNDLED, dtype=torch.float32), torch.Generator().manual_seed(7)
    person, setting = world.people("val", 1), world.draw_settings(1, g)
    poses = world.action_poses(torch.zeros(1, dtype=torch.long), 17, g)[:, :5]
    video = world.render(person, setting, poses, 192)[0][:, :, :, 32:160]
    latent = vae.encode(video)                                           # (1, 128, 2, 16, 24)
    untiled = vae.decode(latent)
    tiled = joined(vae.decode_tiles(latent, Tiling(64, 16, 0, 0)))
    assert psnr(tiled, untiled) > 36, "a tile's outer cells do not see their neighbours"
    assert jump_ratio(vae, latent, Tiling(64, 16, 0, 0), untiled) < 2.5
    assert jump_ratio(vae, latent, Tiling(96, 32, 0, 0), untiled) < 1.5
    for keep in (lambda tile, k: k >= tile.left, lambda tile, k: k >= 0):
        def cut(tile: Tile, keep=keep) -> torch.Tensor:
            return keep(tile, torch.arange(tile.end - tile.start)).float()

        monkeypatch.setattr(tiling_file, "space_weights", cut)
        assert jump_ratio(vae, latent, Tiling(64, 16, 0, 0), untiled) > 4.5
