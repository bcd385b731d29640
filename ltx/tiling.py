"""Decoding a long video in overlapping tiles, so that memory is that of one tile.

The idea. A long video does not fit into memory while it is decoded. So boxes of the latent are
decoded that overlap their neighbours; one fades into the next, and every run of frames is handed
out as soon as nothing later can change it. Boxes that were merely cut would show: each convolution
pads its box with zeros, and a line appears along every border.

LTX-2.3: tile sizes, fades and the odd frame in time are the official ones. ST-DRC (arXiv
  2606.02441) says nothing of tiles.
our reading: sizes are rounded to the nearest latent cell, overlaps up.

Conventions. Tiling is in pixels and frames, a Tile in cells of one axis of the latent, or in its
pixels or frames. 0 = that axis is not tiled; no Tiling at all = the plain decoding, bit for bit.

    for frames in vae.decode_tiles(latent):                        # (B, 3, f, h, w), f varies
        writer.add(to_frames(frames[0]))                           # clips/video.py

Read next: ltx/tokenizer.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Size of the boxes that are decoded at a time; LTX-2.3's defaults. 0 = do not tile this axis.

    space, space_overlap: pixels along the longer side (the shorter one is scaled in proportion);
    time, time_overlap: frames. Raises ValueError unless 0 <= overlap < tile.
    """

    space: int = 768
    space_overlap: int = 64
    time: int = 80
    time_overlap: int = 24

    def __post_init__(self) -> None:
        for name in ("space", "time"):
            size, overlap = getattr(self, name), getattr(self, name + "_overlap")
            if size < 0 or overlap < 0 or (size and overlap >= size):
                usual = f"{getattr(Tiling, name)} with {getattr(Tiling, name + '_overlap')}"
                raise ValueError(f"expected a tile in {name} of 0 (off) or more than its overlap, "
                                 f"got {size} with overlap {overlap}; use for example {usual}")


class Tile(NamedTuple):
    """[start, end) of one axis; over how many cells either end fades (0 = an end of the video)."""

    start: int
    end: int
    left: int
    right: int

    def pixels(self, scale: int) -> Tile:
        """Latent rows or columns -> pixels."""
        return Tile(*(scale * n for n in self))

    def frames(self, scale: int) -> Tile:
        """Latent frames -> frames, of which the first latent frame makes just one."""
        left = 1 + scale * (self.left - 1) if self.left else 0
        return Tile(scale * self.start, 1 + scale * (self.end - 1), left, scale * self.right)


Plan = tuple[list[Tile], list[Tile], list[Tile]]  # tiles along time, rows and columns
Scales = tuple[int, int]  # frames to a latent frame, pixels to a latent row or column


def tiles(length: int, size: int, overlap: int) -> list[Tile]:
    """Cover `length` cells with tiles of `size` that share `overlap`; the last may be shorter.

    size 0, or at least the length: one tile. tiles(10, 6, 2): [0, 6) fades into [4, 10).
    """
    if size == 0 or size >= length:
        return [Tile(0, length, 0, 0)]
    return [Tile(a, min(a + size, length), overlap if a else 0, overlap if a + size < length else 0)
            for a in range(0, length - overlap, size - overlap)]


def time_tiles(length: int, size: int, overlap: int) -> list[Tile]:
    """`tiles` for latent frames: all but the first start one earlier and fade over one more.

    LTX-2.3: the decoder takes the first latent frame it sees for a picture and makes one frame of
    it. In the middle of a video that is wrong, so a latent frame is spent on it, at weight 0.
    """
    return [Tile(a - 1, b, left + 1, right) if a else Tile(a, b, left, right)
            for a, b, left, right in tiles(length, size, overlap)]


def space_weights(tile: Tile) -> Tensor:
    """Weight of each pixel, (n,) float32 in (0, 1]. LTX-2.3: m pixels fade 1/(m+1) .. m/(m+1)."""
    k = torch.arange(tile.end - tile.start, dtype=torch.float32)
    rise, fall = (k + 1) / (tile.left + 1), (len(k) - k) / (tile.right + 1)
    return rise.clamp(max=1) * fall.clamp(max=1)


def time_weights(tile: Tile) -> Tensor:
    """Weight of each frame, (n,) float32 in [0, 1]. LTX-2.3: m frames fade in 0/m .. (m-1)/m."""
    if tile.left == 0:
        return space_weights(tile)
    rest = Tile(tile.start + 1, tile.end, tile.left - 1, tile.right)
    return torch.cat([torch.zeros(1), space_weights(rest)])


def plan_tiles(grid: tuple[int, int, int], tiling: Tiling | None, scales: Scales) -> Plan:
    """Tiles of a latent of `grid` (F', H, W) cells along time, rows and columns, in latent cells.

    LTX-2.3: whole cells (24/2 in space, 10/3 in time by default), the shorter side in proportion.
    Raises ValueError when a tile is not at least one cell larger than its overlap.
    """
    F, H, W = grid
    tiling = Tiling(space=0, time=0) if tiling is None else tiling
    cells = []
    for name, scale in zip(("time", "space"), scales, strict=True):
        asked, overlap = getattr(tiling, name), getattr(tiling, name + "_overlap")
        size, shared = round(asked / scale), math.ceil(overlap / scale)
        if asked and size <= shared:
            raise ValueError(f"expected a tile in {name} at least one latent cell ({scale}) above "
                             f"its overlap, got {asked} with overlap {overlap}; "
                             f"use {scale * (shared + 1)} or more, or 0 for off")
        cells.append((size, shared))
    time, (size, shared) = cells
    rows, columns = (max(round(size * side / max(H, W)), shared + 1) if size else 0
                     for side in (H, W))
    return time_tiles(F, *time), tiles(H, rows, shared), tiles(W, columns, shared)


def decode_runs(decode: Callable[[Tensor], Tensor], latent: Tensor, plan: Plan,
                scales: Scales) -> Iterator[Tensor]:
    """Latent (B, C, F', H, W) -> runs (B, 3, f, h, w) of finished frames, in order.

    decode: latent -> video, for a box. In memory are one tile in time and what it shares with the
    next, never the whole video; for inference only (no gradients).
    """
    times, rows, columns = plan
    if len(times) == 1:
        yield decode_box(decode, latent, rows, columns, scales)
        return
    held, held_weight = None, None  # sums over the frames that later tiles still change
    following = [tile.frames(scales[0]).start for tile in times[1:]]
    for i, tile in enumerate(times):
        place = tile.frames(scales[0])
        weight = time_weights(place).to(latent.device)[:, None, None]     # (f, 1, 1)
        box = latent[:, :, tile.start : tile.end]
        frames = decode_box(decode, box, rows, columns, scales).float().mul_(weight)
        if held is not None:
            frames[:, :, : held.shape[2]] += held
            weight[: len(held_weight)] += held_weight
        done = following[i] - place.start if i < len(following) else len(weight)
        held = frames[:, :, done:].clone()  # a view would keep the whole tile alive
        held_weight = weight[done:]
        frames = (frames[:, :, :done] / weight[:done]).to(latent.dtype)
        if done:
            yield frames                                                  # (B, 3, done, h, w)
        del frames  # before the next tile needs the room


@torch.no_grad()  # not around `decode_runs`: a wrapped generator would keep its last run alive
def decode_box(decode: Callable[[Tensor], Tensor], latent: Tensor, rows: list[Tile],
               columns: list[Tile], scales: Scales) -> Tensor:
    """All rows and columns of some latent frames: (B, C, F', H, W) -> (B, 3, f, h, w)."""
    if len(rows) == len(columns) == 1:
        return decode(latent)
    (B, _, F, H, W), (t, s) = latent.shape, scales
    total = latent.new_zeros(B, 3, t * (F - 1) + 1, H * s, W * s, dtype=torch.float32)
    weights = latent.new_zeros(H * s, W * s, dtype=torch.float32)
    for row in rows:
        for column in columns:
            part = decode(latent[..., row.start : row.end, column.start : column.end]).float()
            y, x = row.pixels(s), column.pixels(s)
            weight = (space_weights(y)[:, None] * space_weights(x)).to(part.device)
            total[..., y.start : y.end, x.start : x.end] += part.mul_(weight)
            weights[y.start : y.end, x.start : x.end] += weight
    return total.div_(weights).to(latent.dtype)


def demo() -> None:
    times, rows, columns = plan_tiles((16, 32, 48), Tiling(), (8, 32))
    print("LTX-2.3's tiles of 121 frames of 1024 x 1536: [start, end) and the fades at either end")
    for name, parts in {"frames": [tile.frames(8) for tile in times],
                        "rows": [tile.pixels(32) for tile in rows],
                        "columns": [tile.pixels(32) for tile in columns]}.items():
        print(f"  {name:8s}", *(f"[{a}, {b}) {left}|{right}  " for a, b, left, right in parts))
    for tile in tiles(10, 6, 2):
        print(f"  weights of {tile[:2]} of 10 cells:", space_weights(tile).numpy().round(2))
    print("Notice: where two tiles overlap their weights sum to one: a fade and not a line.")


if __name__ == "__main__":
    demo()
