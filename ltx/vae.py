"""LTX-2.3's causal video VAE: pixels <-> latents.

The idea. A diffusion transformer over raw pixels would drown in tokens. The VAE folds a block of
pixels (LTX-2.3: 8 frames x 32 rows x 32 columns) into one latent vector of `latent_channels`
numbers, and unfolds it again. Two tricks keep it honest and cheap:

* *causal in time*: frame 0 is encoded from itself alone, every later latent frame from the past
  only. So a picture is simply a video of one frame. ST-DRC (arXiv 2606.02441) rests on this: the
  reference face goes through this very encoder.
* *space-to-depth instead of striding*: a down block moves pixels into channels (nothing is thrown
  away) and adds their plain average as a shortcut, so that gradients reach the first layer from
  the first step on.

LTX-2.3: every number here (widths, block list, patch size) is read from the checkpoint's config;
  the tiny bundled model and the 22B model run the same lines. There is no norm weight, no sampling
  (the log-variance channel is discarded) and no timestep conditioning.
our reading: `decode_frame`, for the identity loss.

Conventions. Video (B, 3, F, h, w) in [-1, 1]; latent (B, C, F', H, W) with zero mean and unit
deviation per channel. F = time_scale * (F' - 1) + 1, h = space_scale * H, w = space_scale * W.

    vae = VideoVAE.load("weights/tiny/model.safetensors", "cpu", torch.float32)
    latent = vae.encode(video)                                            # (B, C, F', H, W)
    video = vae.decode(latent)                                            # (B, 3, F, h, w)

Read next: ltx/tiling.py
"""

import math
import os
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltx.checkpoint import load_weights, read_metadata, shapes_from
from ltx.tiling import Plan, Tiling, decode_runs, plan_tiles

VAE_PREFIX = "vae."  # LTX-2.3: of its names in the checkpoint file
# LTX-2.3: what a block of the config does to (time, height, width). "_res": with a shortcut.
STRIDES = {"compress_space": (1, 2, 2), "compress_time": (2, 1, 1), "compress_all": (2, 2, 2)}
Stride = tuple[int, int, int]
TILING = Tiling()  # LTX-2.3: its sizes of tiles


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """LTX-2.3: every pixel's channel vector (B, C, F, H, W) to root-mean-square 1, no weight."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return x * torch.rsqrt(length.square() / x.shape[1] + eps).to(x.dtype)  # (B, C, F, H, W)


def space_to_depth(x: Tensor, stride: Stride) -> Tensor:
    """Move each st x sh x sw block into channels, sub-position (time, row, column) fastest last.

    (B, C, F*st, H*sh, W*sw) -> (B, C*st*sh*sw, F, H, W).
    """
    st, sh, sw = stride
    B, C, F, H, W = x.shape
    x = x.reshape(B, C, F // st, st, H // sh, sh, W // sw, sw)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(B, C * st * sh * sw, F // st, H // sh, W // sw)


def depth_to_space(x: Tensor, stride: Stride) -> Tensor:
    """Inverse of `space_to_depth`: (B, C*st*sh*sw, F, H, W) -> (B, C, F*st, H*sh, W*sw)."""
    st, sh, sw = stride
    B, C, F, H, W = x.shape
    C = C // (st * sh * sw)
    x = x.reshape(B, C, st, sh, sw, F, H, W)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, C, F * st, H * sh, W * sw)


def patch_pixels(video: Tensor, p: int) -> Tensor:
    """(B, 3, F, H*p, W*p) -> (B, 3*p*p, F, H, W). LTX-2.3 trap: columns vary slower."""
    return space_to_depth(video.transpose(3, 4), (1, p, p)).transpose(3, 4)


def unpatch_pixels(x: Tensor, p: int) -> Tensor:
    """Inverse of `patch_pixels`: (B, 3*p*p, F, H, W) -> (B, 3, F, H*p, W*p)."""
    return depth_to_space(x.transpose(3, 4), (1, p, p)).transpose(3, 4)


class CausalConv3d(nn.Module):
    """3x3x3 convolution: zeros around the picture, repeated edge frames in time.

    Causal (encoder): two copies of the first frame in front, so no frame sees its future. Not
    causal (decoder): one copy at either end.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3, padding=(0, 1, 1))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        if x.shape[2] == 1:  # a picture: all three frames under the kernel are it, so add them up
            weight = self.conv.weight.sum(dim=2)
            y = nnf.conv2d(x[:, :, 0], weight, self.conv.bias, padding=1)
            return y[:, :, None]                                         # (B, c_out, 1, H, W)
        first, last = x[:, :, :1], x[:, :, -1:]
        padded = [first, first, x] if causal else [first, x, last]
        x = torch.cat(padded, dim=2)                                     # (B, c_in, F+2, H, W)
        return self.conv(x)                                              # (B, c_out, F, H, W)


class ResBlock(nn.Module):
    """Two normalised convolutions added to their input; the width never changes."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = CausalConv3d(width, width)
        self.conv2 = CausalConv3d(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        y = self.conv1(nnf.silu(pixel_norm(x)), causal)                  # (B, C, F, H, W)
        return x + self.conv2(nnf.silu(pixel_norm(y)), causal)           # (B, C, F, H, W)


class ResStage(nn.Module):
    """`res_x` of the config: a run of ResBlocks at one width."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool, recompute: bool = False) -> Tensor:
        # "Channels last" is the layout in memory that convolutions and norms over channels are
        # fastest in. Every call brings the weights into the layout of x, so x must not be small.
        if 2 * x.numel() > self.res_blocks[0].conv1.conv.weight.numel():
            x = x.contiguous(memory_format=torch.channels_last_3d)
        for block in self.res_blocks:
            x = maybe_recomputed(block, x, causal, recompute)
        return x                                                         # (B, C, F, H, W)


def maybe_recomputed(block: nn.Module, x: Tensor, causal: bool, recompute: bool) -> Tensor:
    """block(x, causal); with `recompute` only x is kept for the backward pass."""
    return checkpoint(block, x, causal, use_reentrant=False) if recompute else block(x, causal)


class DownBlock(nn.Module):
    """`compress_*_res`: convolution then space-to-depth; the averaged pixels are its shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: Stride):
        super().__init__()
        self.stride, self.c_out = stride, c_out
        self.conv = CausalConv3d(c_in, c_out // math.prod(stride))

    def _even(self, x: Tensor) -> Tensor:
        """1 + 2k frames -> 2 + 2k where time is halved, so that frame 0 keeps its own latent."""
        return torch.cat([x[:, :, :1], x], dim=2) if self.stride[0] == 2 else x

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        even = self._even(x)                                           # (B, c_in, F*st, H*sh, W*sw)
        shortcut = space_to_depth(even, self.stride)                   # (B, c_in*st*sh*sw, F, H, W)
        shortcut = shortcut.unflatten(1, (self.c_out, -1)).mean(dim=2)   # (B, c_out, F, H, W)
        # A picture stays one while it is convolved.
        y = self._even(self.conv(x, causal)) if x.shape[2] == 1 else self.conv(even, causal)
        return space_to_depth(y, self.stride) + shortcut                 # (B, c_out, F, H, W)


class UpBlock(nn.Module):
    """`compress_*`: convolution then depth-to-space; a doubled time axis drops its first frame."""

    def __init__(self, c_in: int, c_out: int, stride: Stride):
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(c_in, c_out * math.prod(stride))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = depth_to_space(self.conv(x, causal), self.stride)         # (B, c_out, F*st, H*sh, W*sw)
        return x[:, :, 1:] if self.stride[0] == 2 else x         # (B, c_out, F*st-st+1, H*sh, W*sw)


def block_list(blocks: list) -> list[tuple[str, int]]:
    """Config entries -> (kind, number): both {"num_layers": 4} and a plain 4 become 4."""
    out = []
    for kind, value in blocks:
        if isinstance(value, dict):
            value = value["num_layers"] if kind == "res_x" else value.get("multiplier", 1)
        out.append((kind, int(value)))
    return out


def stride_of(kind: str) -> Stride:
    """Stride (time, height, width) of a compress block. Raises ValueError for an unknown block."""
    name = kind.removesuffix("_res")
    if name not in STRIDES:
        raise ValueError(f"expected VAE blocks of LTX-2.3 (res_x, compress_*), got {kind!r}; "
                         "use an LTX-2.3 checkpoint")
    return STRIDES[name]


class Encoder(nn.Module):
    """Causal encoder. LTX-2.3. (B, 3, F, h, w) -> mean (B, C, F', H, W), not yet normalised."""

    def __init__(self, config: dict):
        super().__init__()
        self.patch, latent = config["patch_size"], config["latent_channels"]
        # LTX-2.3: the official code takes `latent_channels` as the first width; both are 128 there.
        width = config.get("encoder_base_channels", latent)
        self.conv_in = CausalConv3d(config["in_channels"] * self.patch**2, width)
        self.down_blocks = nn.ModuleList()
        for kind, number in block_list(config["encoder_blocks"]):
            if kind == "res_x":
                self.down_blocks.append(ResStage(width, number))
            else:
                self.down_blocks.append(DownBlock(width, width * number, stride_of(kind)))
                width *= number
        self.conv_out = CausalConv3d(width, latent + 1)  # + 1: a log-variance, which nobody reads

    def forward(self, video: Tensor) -> Tensor:
        x = self.conv_in(patch_pixels(video, self.patch), True)          # (B, width, F, h/p, w/p)
        for block in self.down_blocks:
            x = block(x, True)
        x = self.conv_out(nnf.silu(pixel_norm(x)), True)                 # (B, C+1, F', H, W)
        return x[:, :-1]                                                 # (B, C, F', H, W)


class Decoder(nn.Module):
    """Non-causal decoder. LTX-2.3. Un-normalised latent (B, C, F', H, W) -> (B, 3, F, h, w)."""

    def __init__(self, config: dict):
        super().__init__()
        self.patch = config["patch_size"]
        # LTX-2.3 trap: the config lists the decoder's blocks output side first.
        blocks = block_list(config["decoder_blocks"])[::-1]
        width = math.prod(number for kind, number in blocks if kind != "res_x")
        width *= config["decoder_base_channels"]
        self.conv_in = CausalConv3d(config["latent_channels"], width)
        self.up_blocks = nn.ModuleList()
        for kind, number in blocks:
            if kind == "res_x":
                self.up_blocks.append(ResStage(width, number))
            else:
                self.up_blocks.append(UpBlock(width, width // number, stride_of(kind)))
                width //= number
        self.conv_out = CausalConv3d(width, config["out_channels"] * self.patch**2)

    def forward(self, z: Tensor, recompute: bool = False) -> Tensor:
        x = self.conv_in(z, False)                                       # (B, width, F', H, W)
        for block in self.up_blocks:
            if isinstance(block, ResStage):
                x = block(x, False, recompute)
            else:
                x = maybe_recomputed(block, x, False, recompute)
        x = self.conv_out(nnf.silu(pixel_norm(x)), False)                # (B, 3*p*p, F, h/p, w/p)
        return unpatch_pixels(x, self.patch)                             # (B, 3, F, h, w)


class VideoVAE(nn.Module):
    """Encoder, decoder and the latent statistics, under the checkpoint's names.

    config: config["vae"] of the checkpoint. Attributes: `time_scale`, `space_scale` (LTX-2.3: 8
    and 32), `latent_channels`.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.latent_channels = config["latent_channels"]
        kinds = [kind for kind, _ in block_list(config["encoder_blocks"]) if kind != "res_x"]
        self.time_scale = math.prod(stride_of(kind)[0] for kind in kinds)
        self.space_scale = config["patch_size"] * math.prod(stride_of(kind)[1] for kind in kinds)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.per_channel_statistics = nn.Module()
        for name, value in (("mean-of-means", 0.0), ("std-of-means", 1.0)):
            numbers = torch.full((self.latent_channels,), value)
            self.per_channel_statistics.register_buffer(name, numbers)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu",
             dtype: torch.dtype | None = None) -> "VideoVAE":
        """The VAE of a checkpoint, frozen (paper: figure); dtype None keeps the stored type.

        Raises ValueError for a file that is no LTX-2.3 checkpoint, or has no VAE or another one.
        """
        config = read_metadata(path)["config"]
        if "vae" not in config:
            raise ValueError(f"expected 'vae' in the config of {path}, got none; "
                             "use the full checkpoint")
        with shapes_from(path):
            vae = cls(config["vae"])
        return load_weights(vae, path, VAE_PREFIX, dtype, device).eval().requires_grad_(False)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each latent channel, both (1, C, 1, 1, 1), from after training."""
        named = dict(self.per_channel_statistics.named_buffers())
        return tuple(named[k].view(1, -1, 1, 1, 1) for k in ("mean-of-means", "std-of-means"))

    def encode(self, video: Tensor) -> Tensor:
        """LTX-2.3: video (B, 3, F, h, w) in [-1, 1] -> normalised latent (B, C, F', H, W).

        Frames beyond the last whole group are dropped, as in the official code. Raises ValueError
        when h or w is not a multiple of `space_scale`.
        """
        B, _, F, h, w = video.shape
        if h % self.space_scale or w % self.space_scale:
            raise ValueError(f"expected height and width to be multiples of {self.space_scale}, "
                             f"got {h}x{w}; resize")
        video = video[:, :, : F - (F - 1) % self.time_scale]
        mean, std = self.statistics()
        return (self.encoder(video.to(mean.dtype)) - mean) / std         # (B, C, F', H, W)

    def decode(self, latent: Tensor, recompute: bool = False) -> Tensor:
        """LTX-2.3: normalised latent (B, C, F', H, W) -> (B, 3, F, h, w), about [-1, 1].

        recompute: keep little for the backward pass and compute the decoder's blocks again there.
        """
        mean, std = self.statistics()
        return self.decoder(latent.to(mean.dtype) * std + mean, recompute)        # (B, 3, F, h, w)

    def decode_frame(self, latent: Tensor, frame: int, area: Sequence[float] | None = None,
                     reach: tuple[int, int] = (2, 3), recompute: bool = False) -> Tensor:
        """One frame of a video, or a part of it, with gradients: (B, C, F', H, W) -> (B, 3, h, w).

        our reading: for the identity loss, which looks at a face in one frame. area: left, top,
        right, bottom in pixels; None: the whole frame. The decoder looks around in time and space,
        so as many latent frames and cells as `reach` says are decoded on every side too. Beyond
        them the frame is 0. With a reach of the whole video all is as in `decode`, bit for bit;
        what a smaller one costs: tests/test_vae.py. recompute: as in `decode`. Raises ValueError
        when the video has no such frame.
        """
        last = latent.shape[2] - 1
        if not 0 <= frame <= last * self.time_scale:
            raise ValueError(f"expected a frame between 0 and {last * self.time_scale}, "
                             f"got {frame}; count from 0")
        cell = -(-frame // self.time_scale)  # frame 0 is latent frame 0, then `time_scale` to each
        # The first cell of a window makes one frame, as if it were a picture; it must not be ours.
        start = max(0, cell - max(1, reach[0]))
        (H, W), s = latent.shape[3:], self.space_scale
        left, top, right, bottom = (0, 0, W * s, H * s) if area is None else area
        rows, columns = (slice(max(0, math.floor(a / s) - reach[1]), math.ceil(b / s) + reach[1])
                         for a, b in ((top, bottom), (left, right)))
        cells = latent[:, :, start : cell + reach[0] + 1, rows, columns]
        picture = self.decode(cells, recompute)[:, :, frame - start * self.time_scale]
        around = (columns.start, W - columns.stop, rows.start, H - rows.stop)
        return nnf.pad(picture, [s * max(0, n) for n in around])         # (B, 3, h, w)

    def plan_tiles(self, grid: tuple[int, int, int], tiling: Tiling | None) -> Plan:
        """Tiles of a latent of `grid` (F', H, W) cells, see ltx/tiling.py. Needs no weights."""
        return plan_tiles(grid, tiling, (self.time_scale, self.space_scale))

    def decode_tiles(self, latent: Tensor, tiling: Tiling | None = TILING) -> Iterator[Tensor]:
        """`decode` in pieces: latent (B, C, F', H, W) -> runs (B, 3, f, h, w) of finished frames.

        The runs are in order and together are all frames. One tile (tiling None, or a latent that
        fits) is one run, equal to `decode` bit for bit. More differ a little: the outer cells of a
        tile do not see their neighbours. Raises ValueError at once, before anything is decoded.
        """
        plan = self.plan_tiles(latent.shape[2:], tiling)
        return decode_runs(self.decode, latent, plan, (self.time_scale, self.space_scale))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, higher is better: 2 x (B, ...) in [-1, 1] -> (B,)."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp_min(1e-10))


@torch.no_grad()
def demo() -> None:
    blocks = [["compress_space", 2], ["compress_time", 2], ["compress_all", 2], ["compress_all", 1]]
    config = {"in_channels": 3, "out_channels": 3, "latent_channels": 8, "patch_size": 4,
              "decoder_base_channels": 8, "encoder_blocks": blocks, "decoder_blocks": blocks}
    torch.manual_seed(0)
    vae, video = VideoVAE(config), torch.rand(1, 3, 17, 64, 96) * 2 - 1
    latent = vae.encode(video)
    print("LTX-2.3's compressions, narrow and with random weights: one latent vector stands for "
          f"{vae.time_scale} frames x {vae.space_scale} x {vae.space_scale} pixels")
    shapes = [tuple(x.shape) for x in (video, latent, vae.decode(latent))]
    print("  video {} -> latent {} -> video {}".format(*shapes))
    video[:, :, 9:] = 0
    change = (vae.encode(video) - latent).abs().amax(dim=(0, 1, 3, 4)).tolist()
    print("  frames 9 to 16 black: latent frames change by", ", ".join(f"{c:.2g}" for c in change))
    print("Notice: no latent frame depends on a later frame, so a picture is a video of one frame; "
          "that is how ST-DRC's reference enters.")


if __name__ == "__main__":
    demo()
