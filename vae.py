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

Conventions. Video (B, 3, F, h, w) in [-1, 1]; latent (B, C, F', H, W) with zero mean and unit deviation per channel.
F = time_scale * (F' - 1) + 1, h = space_scale * H, w = space_scale * W.

Read next: model.py, which denoises these latents.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

# LTX-2.3: what each block of the config does to (time, height, width). "_res" (encoder) has an averaging shortcut.
STRIDES = {"compress_space": (1, 2, 2), "compress_time": (2, 1, 1), "compress_all": (2, 2, 2)}


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """LTX-2.3: scale the channel vector of every pixel to root-mean-square 1 (no weight). (B, C, F, H, W) -> same."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)


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
        first, last = x[:, :, :1], x[:, :, -1:]
        pad = [first, first, x] if causal else [first, x, last]
        return self.conv(torch.cat(pad, dim=2))                                           # (B, c_out, F, H, W)


class ResBlock(nn.Module):
    """Two normalised convolutions added to their input; the width never changes."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = CausalConv3d(width, width)
        self.conv2 = CausalConv3d(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        y = self.conv1(nnf.silu(pixel_norm(x)), causal)
        return x + self.conv2(nnf.silu(pixel_norm(y)), causal)                            # (B, C, F, H, W)


class ResStage(nn.Module):
    """`res_x` of the config: a run of ResBlocks at one width."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        for block in self.res_blocks:
            x = block(x, causal)
        return x


class DownBlock(nn.Module):
    """`compress_*_res`: convolution then space-to-depth, plus the averaged pixels themselves as a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride, self.c_out = stride, c_out
        self.conv = CausalConv3d(c_in, c_out // math.prod(stride))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        if self.stride[0] == 2:  # 1 + 2k frames -> 2 + 2k, so that frame 0 stays a latent frame of its own
            x = torch.cat([x[:, :, :1], x], dim=2)
        shortcut = space_to_depth(x, self.stride)                                         # (B, c_in*st*sh*sw, F, H, W)
        shortcut = shortcut.unflatten(1, (self.c_out, -1)).mean(dim=2)                    # (B, c_out, F, H, W)
        return space_to_depth(self.conv(x, causal), self.stride) + shortcut


class UpBlock(nn.Module):
    """`compress_*` of the decoder: convolution then depth-to-space; a doubled time axis drops its first frame again."""

    def __init__(self, c_in: int, c_out: int, stride: tuple[int, int, int]):
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(c_in, c_out * math.prod(stride))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        x = depth_to_space(self.conv(x, causal), self.stride)
        return x[:, :, 1:] if self.stride[0] == 2 else x                                  # (B, c_out, F, H, W)


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
    """Causal encoder, spec e. (B, 3, F, h, w) -> mean (B, C, F', H, W), not yet normalised."""

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
        return x[:, :-1]


class Decoder(nn.Module):
    """Non-causal decoder, spec e. un-normalised latent (B, C, F', H, W) -> (B, 3, F, h, w)."""

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
        x = self.conv_in(z, False)
        for block in self.up_blocks:
            x = block(x, False)
        x = self.conv_out(nnf.silu(pixel_norm(x)), False)                                 # (B, 3*p*p, F, h/p, w/p)
        return unpatch_pixels(x, self.patch)


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
        """LTX-2.3 spec e: video (B, 3, F, h, w) in [-1, 1] -> normalised latent (B, C, F', H, W).

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
        """LTX-2.3 spec e: normalised latent (B, C, F', H, W) -> video (B, 3, F, h, w), about [-1, 1], not clamped."""
        mean, std = self.statistics()
        return self.decoder(latent * std + mean)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of two videos in [-1, 1], per sample: (B, ...) x 2 -> (B,). Higher is better."""
    error = ((a.clamp(-1, 1) - b.clamp(-1, 1)) / 2).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def demo() -> None:
    """Sizes of a narrow random VAE with the real block list, and the causality of its first frame."""
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
    with torch.no_grad():
        latent, first = vae.encode(video), vae.encode(video[:, :, :1])
        print(f"one latent token covers {vae.time_scale} frames x {vae.space_scale} x {vae.space_scale} pixels")
        print(f"video {tuple(video.shape)} -> latent {tuple(latent.shape)} -> video {tuple(vae.decode(latent).shape)}")
        print(f"first latent frame of the clip against the first frame alone: {(latent[:, :, :1] - first).abs().max():.1e}")
    print("Notice: that difference is rounding only. A picture is a one-frame video; ST-DRC's reference enters this way.")


if __name__ == "__main__":
    demo()
