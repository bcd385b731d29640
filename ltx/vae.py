"""LTX-2.3's causal video VAE: pixels <-> latents.

The idea. A diffusion transformer over raw pixels would drown in tokens. The VAE folds a block of pixels (LTX-2.3: 8
frames x 32 rows x 32 columns) into one latent vector of `latent_channels` numbers, and unfolds it again. Two tricks
keep it honest and cheap:

* *causal in time*: frame 0 is encoded from itself alone, every later latent frame from the past only. So one picture
  is simply a video of one frame. ST-DRC rests on this: the reference face goes through this very encoder.
* *space-to-depth instead of striding*: a down block moves pixels into channels (nothing is thrown away) and adds the
  plain average of them as a shortcut, so that gradients reach the first layer from the first step on.

LTX-2.3: every number here (widths, block list, patch size) is read from the checkpoint's config; the tiny bundled model
and the 22B model run the same lines. There is no norm weight, no sampling (the log-variance channel is discarded) and
no timestep conditioning.

A long video does not fit into memory while it is decoded. `decode_tiles` decodes boxes of the latent that overlap
their neighbours, fades one into the next, and yields every run of frames as soon as nothing later can change it. Boxes
that were merely cut would show: each convolution pads its box with zeros, and a line appears along every border.

Conventions. Video (B, 3, F, h, w) in [-1, 1]; latent (B, C, F', H, W) with zero mean and unit deviation per channel.
F = time_scale * (F' - 1) + 1, h = space_scale * H, w = space_scale * W. Tile sizes are given in pixels and frames; 0 =
that axis is not tiled, and no Tiling at all = `decode`, bit for bit.

    for frames in vae.decode_tiles(latent, Tiling()):                         # (B, 3, f, h, w), f varies
        writer.add(to_frames(frames[0]))                                      # video.py

Read next: tokenizer.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

# LTX-2.3: what each block of the config does to (time, height, width). "_res" (encoder) has an averaging shortcut.
STRIDES = {"compress_space": (1, 2, 2), "compress_time": (2, 1, 1), "compress_all": (2, 2, 2)}


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """LTX-2.3: scale the channel vector of every pixel to root-mean-square 1 (no weight). (B, C, F, H, W) -> same."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)        # (B, 1, F, H, W)
    return x * torch.rsqrt(length.square() / x.shape[1] + eps).to(x.dtype)


def space_to_depth(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Move each st x sh x sw block into channels, sub-position (time, row, column) fastest last.

    (B, C, F*st, H*sh, W*sw) -> (B, C*st*sh*sw, F, H, W).
    """
    st, sh, sw = stride
    B, C, F, H, W = x.shape
    x = x.reshape(B, C, F // st, st, H // sh, sh, W // sw, sw)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, C * st * sh * sw, F // st, H // sh, W // sw)


def depth_to_space(x: Tensor, stride: tuple[int, int, int]) -> Tensor:
    """Inverse of `space_to_depth`: (B, C*st*sh*sw, F, H, W) -> (B, C, F*st, H*sh, W*sw)."""
    st, sh, sw = stride
    B, C, F, H, W = x.shape
    C = C // (st * sh * sw)
    x = x.reshape(B, C, st, sh, sw, F, H, W)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, C, F * st, H * sh, W * sw)


def patch_pixels(video: Tensor, p: int) -> Tensor:
    """(B, 3, F, H*p, W*p) -> (B, 3*p*p, F, H, W). LTX-2.3 trap: here the *column* varies slower than the row."""
    return space_to_depth(video.transpose(3, 4), (1, p, p)).transpose(3, 4)


def unpatch_pixels(x: Tensor, p: int) -> Tensor:
    """Inverse of `patch_pixels`: (B, 3*p*p, F, H, W) -> (B, 3, F, H*p, W*p)."""
    return depth_to_space(x.transpose(3, 4), (1, p, p)).transpose(3, 4)


class CausalConv3d(nn.Module):
    """3x3x3 convolution: zeros around the picture, repeated edge frames in time.

    Causal (encoder): two copies of the first frame in front, so no frame sees its future. Not causal (decoder): one
    copy at either end.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        if x.shape[2] == 1:  # a picture: the three frames under the kernel are one and the same, a third of the work
            y = nnf.conv2d(x[:, :, 0], self.conv.weight.sum(dim=2), self.conv.bias, padding=1)
            return y[:, :, None]                                                          # (B, c_out, 1, H, W)
        first, last = x[:, :, :1], x[:, :, -1:]
        x = torch.cat([first, first, x] if causal else [first, x, last], dim=2)           # (B, c_in, F+2, H, W)
        return self.conv(x)                                                                   # (B, c_out, F, H, W)


class ResBlock(nn.Module):
    """Two normalised convolutions added to their input; the width never changes."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = CausalConv3d(width, width)
        self.conv2 = CausalConv3d(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        y = self.conv1(nnf.silu(pixel_norm(x)), causal)                                   # (B, C, F, H, W)
        return x + self.conv2(nnf.silu(pixel_norm(y)), causal)                            # (B, C, F, H, W)


class ResStage(nn.Module):
    """`res_x` of the config: a run of ResBlocks at one width."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        # "Channels last" in memory is the layout that convolutions and norms over channels are fastest in. Weights are
        # brought into the layout of x in every call, so it pays only where x is not much smaller than they are.
        if 2 * x.numel() > self.res_blocks[0].conv1.conv.weight.numel():
            x = x.contiguous(memory_format=torch.channels_last_3d)
        for block in self.res_blocks:
            x = block(x, causal)
        return x                                                                          # (B, C, F, H, W)


class DownBlock(nn.Module):
    """`compress_*_res`: convolution then space-to-depth, plus the averaged pixels themselves as a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride, self.c_out = stride, c_out
        self.conv = CausalConv3d(c_in, c_out // math.prod(stride))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        y = self.conv(x, causal) if x.shape[2] == 1 else None  # a picture stays one until here
        if self.stride[0] == 2:  # 1 + 2k frames -> 2 + 2k, so that frame 0 stays a latent frame of its own
            x = torch.cat([x[:, :, :1], x], dim=2)
            y = None if y is None else torch.cat([y, y], dim=2)
        shortcut = space_to_depth(x, self.stride)                                         # (B, c_in*st*sh*sw, F, H, W)
        shortcut = shortcut.unflatten(1, (self.c_out, -1)).mean(dim=2)                    # (B, c_out, F, H, W)
        y = self.conv(x, causal) if y is None else y                # (B, c_out/(st*sh*sw), F*st, H*sh, W*sw)
        return space_to_depth(y, self.stride) + shortcut                                  # (B, c_out, F, H, W)


class UpBlock(nn.Module):
    """`compress_*` of the decoder: convolution then depth-to-space; a doubled time axis drops its first frame again."""

    def __init__(self, c_in: int, c_out: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(c_in, c_out * math.prod(stride))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = depth_to_space(self.conv(x, causal), self.stride)                   # (B, c_out, F*st, H*sh, W*sw)
        return x[:, :, 1:] if self.stride[0] == 2 else x                        # (B, c_out, F*st-st+1, H*sh, W*sw)


def block_list(blocks: list) -> list[tuple[str, int]]:
    """Config entries -> (kind, number): `["res_x", {"num_layers": 4}]` -> ("res_x", 4); a bare integer is num_layers."""
    out = []
    for kind, value in blocks:
        if isinstance(value, dict):
            value = value["num_layers"] if kind == "res_x" else value.get("multiplier", 1)
        out.append((kind, int(value)))
    return out


def stride_of(kind: str) -> tuple[int, int, int]:
    """Stride (time, height, width) of a compress block; ValueError for a block LTX-2.3 does not have."""
    name = kind.removesuffix("_res")
    if name not in STRIDES:
        raise ValueError(f"expected VAE blocks of LTX-2.3 (res_x, compress_*), got {kind!r}; use an LTX-2.3 checkpoint")
    return STRIDES[name]


class Encoder(nn.Module):
    """Causal encoder. LTX-2.3. (B, 3, F, h, w) -> mean (B, C, F', H, W), not yet normalised."""

    def __init__(self, config: dict):
        super().__init__()
        self.patch, latent = config["patch_size"], config["latent_channels"]
        # LTX-2.3: the official code takes `latent_channels` as the first width; both numbers are 128 there.
        width = config.get("encoder_base_channels", latent)
        self.conv_in = CausalConv3d(config["in_channels"] * self.patch**2, width)
        self.down_blocks = nn.ModuleList()
        for kind, number in block_list(config["encoder_blocks"]):
            if kind == "res_x":
                self.down_blocks.append(ResStage(width, number))
            else:
                self.down_blocks.append(DownBlock(width, width * number, stride_of(kind)))
                width *= number
        self.conv_out = CausalConv3d(width, latent + 1)  # + 1: one shared log-variance, which nobody reads

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv_in(patch_pixels(video, self.patch), True)                           # (B, width, F, h/p, w/p)
        for block in self.down_blocks:
            x = block(x, True)
        x = self.conv_out(nnf.silu(pixel_norm(x)), True)                                  # (B, C+1, F', H, W)
        return x[:, :-1]                                                                  # (B, C, F', H, W)


class Decoder(nn.Module):
    """Non-causal decoder. LTX-2.3. Un-normalised latent (B, C, F', H, W) -> (B, 3, F, h, w)."""

    def __init__(self, config: dict):
        super().__init__()
        self.patch = config["patch_size"]
        blocks = block_list(config["decoder_blocks"])[::-1]  # LTX-2.3 trap: the config lists them output side first
        width = config["decoder_base_channels"] * math.prod(n for kind, n in blocks if kind != "res_x")
        self.conv_in = CausalConv3d(config["latent_channels"], width)
        self.up_blocks = nn.ModuleList()
        for kind, number in blocks:
            if kind == "res_x":
                self.up_blocks.append(ResStage(width, number))
            else:
                self.up_blocks.append(UpBlock(width, width // number, stride_of(kind)))
                width //= number
        self.conv_out = CausalConv3d(width, config["out_channels"] * self.patch**2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z, False)                                                        # (B, width, F', H, W)
        for block in self.up_blocks:
            x = block(x, False)
        x = self.conv_out(nnf.silu(pixel_norm(x)), False)                                 # (B, 3*p*p, F, h/p, w/p)
        return unpatch_pixels(x, self.patch)                                              # (B, 3, F, h, w)


@dataclass(frozen=True)
class Tiling:
    """Size of the boxes that `decode_tiles` decodes at a time; LTX-2.3's defaults. 0 = do not tile this axis.

    space, space_overlap: pixels along the longer side (the shorter one is scaled in proportion); time, time_overlap:
    frames. Raises ValueError unless 0 <= overlap < tile.
    """

    space: int = 768
    space_overlap: int = 64
    time: int = 80
    time_overlap: int = 24

    def __post_init__(self) -> None:
        for name, size, overlap in (("space", self.space, self.space_overlap), ("time", self.time, self.time_overlap)):
            if size < 0 or overlap < 0 or (size and overlap >= size):
                raise ValueError(f"expected a tile in {name} of 0 (off) or more than its overlap, got {size} with "
                                 f"overlap {overlap}; use for example {getattr(Tiling, name)} with "
                                 f"{getattr(Tiling, name + '_overlap')}")


class Tile(NamedTuple):
    """[start, end) of one axis, and over how many cells at either end it fades into a neighbour (0 = a true end)."""

    start: int
    end: int
    left: int
    right: int


def tiles(length: int, size: int, overlap: int) -> list[Tile]:
    """Cover `length` cells with tiles of `size` that share `overlap` cells. The last one may be shorter.

    size 0, or at least the length: one tile and nothing to fade. tiles(10, 6, 2): [0, 6) fades into [4, 10).
    """
    if size == 0 or size >= length:
        return [Tile(0, length, 0, 0)]
    starts = range(0, length - overlap, size - overlap)
    return [Tile(a, min(a + size, length), overlap if a else 0, overlap if a + size < length else 0) for a in starts]


def time_tiles(length: int, size: int, overlap: int) -> list[Tile]:
    """`tiles` for latent frames, where every tile but the first starts one earlier and fades over one more.

    LTX-2.3: the decoder takes the first latent frame it sees for a picture and makes one frame of it instead of
    `time_scale`. That is wrong in the middle of a video, so a latent frame is spent on it and its frame gets weight 0.
    """
    return [Tile(a - 1, b, left + 1, right) if a else Tile(a, b, left, right)
            for a, b, left, right in tiles(length, size, overlap)]


def tile_pixels(tile: Tile, scale: int) -> Tile:
    """Latent rows or columns -> pixels."""
    return Tile(*(scale * n for n in tile))


def tile_frames(tile: Tile, scale: int) -> Tile:
    """Latent frames -> frames: [scale * a, 1 + scale * (b - 1)), because the first latent frame makes just one."""
    a, b, left, right = tile
    return Tile(scale * a, 1 + scale * (b - 1), 1 + scale * (left - 1) if left else 0, scale * right)


def space_weights(tile: Tile) -> Tensor:
    """Weight of each pixel of a tile, (n,) float32 in (0, 1]. LTX-2.3: a fade of m pixels is 1/(m+1) .. m/(m+1)."""
    k = torch.arange(tile.end - tile.start, dtype=torch.float32)
    return ((k + 1) / (tile.left + 1)).clamp(max=1) * ((len(k) - k) / (tile.right + 1)).clamp(max=1)


def time_weights(tile: Tile) -> Tensor:
    """Weight of each frame of a tile, (n,) float32 in [0, 1]. LTX-2.3: a fade-in of m frames is 0/m .. (m-1)/m."""
    if tile.left == 0:
        return space_weights(tile)
    return torch.cat([torch.zeros(1), space_weights(Tile(tile.start + 1, tile.end, tile.left - 1, tile.right))])


class VideoVAE(nn.Module):
    """Encoder, decoder and the latent statistics, under the checkpoint's names (prefix `vae.`).

    config: `config["vae"]` of the checkpoint. Attributes: `time_scale`, `space_scale` (LTX-2.3: 8 and 32),
    `latent_channels`.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.latent_channels = config["latent_channels"]
        strides = [stride_of(kind) for kind, _ in block_list(config["encoder_blocks"]) if kind != "res_x"]
        self.time_scale = math.prod(s[0] for s in strides)
        self.space_scale = config["patch_size"] * math.prod(s[1] for s in strides)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.per_channel_statistics = nn.Module()
        for name, value in (("mean-of-means", 0.0), ("std-of-means", 1.0)):
            self.per_channel_statistics.register_buffer(name, torch.full((self.latent_channels,), value))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each latent channel, both (1, C, 1, 1, 1), measured once after training."""
        named = dict(self.per_channel_statistics.named_buffers())
        return tuple(named[k].view(1, -1, 1, 1, 1) for k in ("mean-of-means", "std-of-means"))

    def encode(self, video: Tensor) -> Tensor:
        """LTX-2.3: video (B, 3, F, h, w) in [-1, 1] -> normalised latent (B, C, F', H, W).

        Frames beyond the last whole group are dropped, as in the official code. Raises ValueError when h or w is not a
        multiple of `space_scale`.
        """
        B, _, F, h, w = video.shape
        if h % self.space_scale or w % self.space_scale:
            raise ValueError(f"expected height and width to be multiples of {self.space_scale}, got {h}x{w}; resize")
        video = video[:, :, : F - (F - 1) % self.time_scale]
        mean, std = self.statistics()
        return (self.encoder(video) - mean) / std                                         # (B, C, F', H, W)

    def decode(self, latent: Tensor) -> Tensor:
        """LTX-2.3: normalised latent (B, C, F', H, W) -> video (B, 3, F, h, w), about [-1, 1], not clamped."""
        mean, std = self.statistics()
        return self.decoder(latent * std + mean)                                          # (B, 3, F, h, w)

    def decode_frame(self, latent: Tensor, frame: int, reach: int = 2) -> Tensor:
        """One frame of a video, with gradients, from the latent frames around it: (B, C, F', H, W) -> (B, 3, h, w).

        our reading: for the identity loss, which looks at one frame; decoding the other 120 would cost memory, not teach
        more. The decoder looks both ways in time, so `reach` latent frames on either side are decoded too and dropped;
        with a reach of F' the frame is that of `decode`, bit for bit. What a smaller one costs: tests/test_vae.py. Raises
        ValueError when the video has no such frame.
        """
        last = latent.shape[2] - 1
        if not 0 <= frame <= last * self.time_scale:
            raise ValueError(f"expected a frame between 0 and {last * self.time_scale}, got {frame}; count from 0")
        cell = -(-frame // self.time_scale)  # frame 0 is latent frame 0 alone, then `time_scale` frames to each
        # A window that begins later makes one frame of its first cell, as if it were a picture; that cell must not be ours.
        start = max(0, cell - max(1, reach))
        window = self.decode(latent[:, :, start : cell + reach + 1])                      # (B, 3, f, h, w)
        return window[:, :, frame - start * self.time_scale]                              # (B, 3, h, w)

    def plan_tiles(self, grid: tuple[int, int, int], tiling: Tiling | None) -> tuple[list[Tile], ...]:
        """Tiles of a latent of `grid` (F', H, W) cells along time, rows and columns, in latent cells.

        LTX-2.3: tile sizes in whole cells (24/2 in space, 10/3 in time by default), the shorter side in proportion.
        our reading: sizes are rounded to the nearest cell, overlaps up. Works without weights, on the meta device.
        Raises ValueError when a tile is not at least one cell larger than its overlap.
        """
        F, H, W = grid
        if tiling is None:
            tiling = Tiling(space=0, time=0)
        cells = {}
        for name, scale in (("space", self.space_scale), ("time", self.time_scale)):
            asked, overlap = getattr(tiling, name), getattr(tiling, name + "_overlap")
            size, shared = round(asked / scale), math.ceil(overlap / scale)
            if asked and size <= shared:
                raise ValueError(f"expected a tile in {name} at least one latent cell ({scale}) above its overlap, got "
                                 f"{asked} with overlap {overlap}; use {scale * (shared + 1)} or more, or 0 for off")
            cells[name] = size, shared
        size, shared = cells["space"]
        sides = [max(round(size * side / max(H, W)), shared + 1) if size else 0 for side in (H, W)]
        return time_tiles(F, *cells["time"]), tiles(H, sides[0], shared), tiles(W, sides[1], shared)

    def decode_tiles(self, latent: Tensor, tiling: Tiling | None = None) -> Iterator[Tensor]:
        """LTX-2.3: `decode` in pieces: latent (B, C, F', H, W) -> runs (B, 3, f, h, w) of finished frames.

        The runs are in order and together are all frames. In memory are one tile in time and what it shares with the
        next, never the whole video; for inference only (no gradients). One tile (tiling None, or a latent that fits)
        is one run, equal to `decode` bit for bit. More differ a little: a tile's outer cells do not see their
        neighbours. Raises ValueError at once, before anything is decoded (see `plan_tiles`).
        """
        return self._runs(latent, *self.plan_tiles(latent.shape[2:], tiling))

    def _runs(self, latent: Tensor, times: list[Tile], rows: list[Tile], columns: list[Tile]) -> Iterator[Tensor]:
        if len(times) == 1:
            yield self._decode_box(latent, rows, columns)
            return
        held, held_weight = None, None  # weighted sum and weights of the frames that later tiles still change
        following = [tile_frames(tile, self.time_scale).start for tile in times[1:]]
        for i, tile in enumerate(times):
            place = tile_frames(tile, self.time_scale)
            weight = time_weights(place).to(latent.device)[:, None, None]                 # (f, 1, 1)
            frames = self._decode_box(latent[:, :, tile.start : tile.end], rows, columns).float().mul_(weight)
            if held is not None:
                frames[:, :, : held.shape[2]] += held
                weight[: len(held_weight)] += held_weight
            done = following[i] - place.start if i < len(following) else len(weight)
            held, held_weight = frames[:, :, done:].clone(), weight[done:]  # a view would keep the whole tile alive
            frames = (frames[:, :, :done] / weight[:done]).to(latent.dtype)
            if done:
                yield frames                                                              # (B, 3, done, h, w)
            del frames  # before the next tile needs the room

    @torch.no_grad()  # here and not around `_runs`: PyTorch's wrapper of a generator would keep the last run alive
    def _decode_box(self, latent: Tensor, rows: list[Tile], columns: list[Tile]) -> Tensor:
        """All rows and columns of some latent frames: (B, C, F', H, W) -> (B, 3, f, h, w)."""
        if len(rows) == len(columns) == 1:
            return self.decode(latent)
        (B, _, F, H, W), s = latent.shape, self.space_scale
        frames = latent.new_zeros(B, 3, self.time_scale * (F - 1) + 1, H * s, W * s, dtype=torch.float32)
        weights = latent.new_zeros(H * s, W * s, dtype=torch.float32)
        for row in rows:
            for column in columns:
                part = self.decode(latent[..., row.start : row.end, column.start : column.end]).float()
                y, x = tile_pixels(row, s), tile_pixels(column, s)
                weight = (space_weights(y)[:, None] * space_weights(x)).to(part.device)   # (h, w) of the tile
                frames[..., y.start : y.end, x.start : x.end] += part.mul_(weight)
                weights[y.start : y.end, x.start : x.end] += weight
        return frames.div_(weights).to(latent.dtype)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1], per sample: (B, ...) x 2 -> (B,). Higher is better."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def to_picture(rgb: Tensor, height: int) -> Image.Image:
    """(3, h, w) in [-1, 1] -> an RGB picture `height` pixels high, every pixel or cell a square."""
    pixels = ((rgb.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((height * rgb.shape[2] // rgb.shape[1], height), Image.Resampling.NEAREST)


@torch.no_grad()
def draw(vae: VideoVAE, video: Tensor, scale: int = 2) -> Image.Image:
    """A clip before and after the VAE, and the latents between: video (1, 3, F, h, w) in [-1, 1] -> an RGB picture with
    a column per frame, every pixel `scale` x `scale`.

    Rows: input; reconstruction with its decibels; four times the absolute difference, taken off white; latent channels
    0, 1, 2 as red, green, blue, two deviations to full colour, each latent frame below the frames it stands for.
    """
    latent = vae.encode(video)
    back = vae.decode(latent)
    count, h, w = back.shape[2], scale * video.shape[3], scale * video.shape[4]
    left, step = 150, w + 6
    sheet = Image.new("RGB", (left + count * step + 4, 4 * h + 160), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    tops = [30, 38 + h, 66 + 2 * h, 124 + 3 * h]
    C, H, W = latent.shape[1], *latent.shape[3:]
    labels = ("input", "through\nthe VAE", "4 x difference\n(white: none)",
              f"latent {W}x{H}\nchannels 0, 1, 2\nof {C} as RGB")
    for top, text in zip(tops, labels, strict=True):
        pen.text((8, top + h / 2), text, "black", font, anchor="lm")
    for f in range(count):
        x, seen, made = left + f * step, video[0, :, f], back[0, :, f]
        for top, rgb in zip(tops, (seen, made, 1 - 4 * (seen - made.clamp(-1, 1)).abs()), strict=False):
            sheet.paste(to_picture(rgb, h), (x, top))
        pen.text((x + w / 2, 15), f"frame {f}", "black", font, anchor="mm")
        decibels = psnr(made[None], seen[None]).item()
        pen.text((x + w / 2, tops[1] + h + 12), f"{decibels:.1f} dB", "black", font, anchor="mm")
    for cell in range(latent.shape[2]):
        first, last = max(0, vae.time_scale * (cell - 1) + 1), vae.time_scale * cell
        x, end, y = left + first * step, left + last * step + w, tops[3] - 34
        pen.line([(x, y - 8), (x, y), (end, y), (end, y - 8)], "black", 2)  # a bracket under its frames
        name = f"latent frame {cell}" + (f": frames {first} to {last}" if first < last else "")
        pen.text(((x + end) / 2, y + 16), name, "black", font, anchor="mm")
        sheet.paste(to_picture(latent[0, :3, cell] / 2, h), (x + (end - x - w) // 2, tops[3]))
    return sheet


def _sizes() -> None:
    """What needs no weights: sizes of a narrow random VAE with the real block list, and what tiles cost."""
    real = [["res_x", {"num_layers": 4}], ["compress_space_res", {"multiplier": 2}], ["res_x", {"num_layers": 6}],
            ["compress_time_res", {"multiplier": 2}], ["res_x", {"num_layers": 4}],
            ["compress_all_res", {"multiplier": 2}], ["res_x", {"num_layers": 2}],
            ["compress_all_res", {"multiplier": 1}], ["res_x", {"num_layers": 2}]]
    config = {"in_channels": 3, "out_channels": 3, "latent_channels": 8, "patch_size": 4, "encoder_base_channels": 8,
              "decoder_base_channels": 8, "encoder_blocks": real,
              "decoder_blocks": [[kind.removesuffix("_res"), value] for kind, value in real]}
    torch.manual_seed(0)
    vae = VideoVAE(config).eval()
    video = torch.rand(1, 3, 17, 64, 96) * 2 - 1
    print("LTX-2.3's block list, narrow and with random weights:")
    with torch.no_grad():
        latent, first = vae.encode(video), vae.encode(video[:, :, :1])
        print(f"  one latent token covers {vae.time_scale} frames x {vae.space_scale} x {vae.space_scale} pixels")
        shapes = [tuple(x.shape) for x in (video, latent, vae.decode(latent))]
        print("  video {} -> latent {} -> video {}".format(*shapes))
        alone = (latent[:, :, :1] - first).abs().max()
        print(f"  first latent frame of the clip against the first frame alone: {alone:.1e}")
    times, rows, columns = vae.plan_tiles((16, 16, 24), Tiling())
    runs = [tile_frames(tile, vae.time_scale)[:2] for tile in times]
    print(f"  LTX-2.3's 121x512x768 decodes as frames {runs}, in {len(rows)} x {len(columns)} tile(s) of space")
    wide = torch.randn(1, vae.latent_channels, 1, 1, 48)  # two tiles of columns, [0, 32) and [28, 48)
    with torch.no_grad():
        difference = (torch.cat([*vae.decode_tiles(wide, Tiling(32 * 32, 4 * 32))], dim=2) - vae.decode(wide)).abs()
    error = difference.unflatten(4, (48, -1)).amax(dim=(0, 1, 2, 3, 5))                   # (48,) per latent column
    print(f"  tiled against whole, largest error: {error[28:32].max():.1e} where the two tiles overlap, "
          f"{error[:16].max():.1e} sixteen latent columns away")


def _bundled(path: Path) -> None:
    """The bundled VAE on a clip of the world: sizes, decibels, what a changed frame reaches, and the picture."""
    from ltx.checkpoint import load_weights, read_metadata
    from toy import world

    with torch.device("meta"):
        vae = VideoVAE(read_metadata(path)["config"]["vae"])
    load_weights(vae, path, "vae.", dtype=torch.float32)
    person, setting, action = world.people("test", 7)[6:], torch.tensor([[0, 0, 0]]), world.ACTIONS.index("turns left")
    poses = world.action_poses(torch.tensor([action]), 9, torch.Generator().manual_seed(0))
    video, _, _ = world.render(person, setting, poses)                                    # (1, 3, 9, 64, 64)
    print(f"\nThe bundled VAE on a person whom no training saw: {world.caption(setting[0], action)}")
    with torch.no_grad():
        latent = vae.encode(video)
        back = vae.decode(latent)
        changed = video.clone()
        changed[:, :, 5:] = changed[:, :, 5:].flip(4)
        reach = (vae.encode(changed) - latent).abs().amax(dim=(0, 1, 3, 4))               # (F',)
    print(f"  one latent token covers {vae.time_scale} frames x {vae.space_scale} x {vae.space_scale} pixels; "
          f"{video.numel():,} numbers -> {latent.numel():,}")
    print(f"  latent mean {latent.mean():.2f}, deviation {latent.std():.2f}; after the way back "
          f"{psnr(back, video).item():.1f} dB, largest difference {(back - video).abs().max():.2f} of 2")
    print(f"  frames 5 to 8 mirrored: latent frames 0, 1, 2 change by up to {[round(r, 2) for r in reach.tolist()]}")
    draw(vae, video).save("vae_demo.png")
    print("wrote vae_demo.png: from the top the clip, its reconstruction, four times their difference, and the latents")


def demo() -> None:
    """The text part needs nothing; the picture needs the bundled checkpoint, and one line says so when it is absent."""
    _sizes()
    path = Path(__file__).resolve().parents[1] / "weights" / "tiny" / "model.safetensors"
    if path.is_file():
        _bundled(path)
    else:
        print(f"no picture: {path} is not there")
    print("Notice: no latent frame depends on a later frame, so a picture is a one-frame video, up to rounding; that is "
          "how ST-DRC's reference enters. What the VAE loses are thin edges, and a tile is wrong only near its border.")


if __name__ == "__main__":
    demo()
