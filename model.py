"""LTX-2.3's video transformer and its noise schedule.

The base model that ST-DRC (arXiv 2606.02441) builds on. A latent video is a sequence of tokens; the transformer
looks at noisy tokens, each with its own noise level and its own coordinate, and predicts the velocity from data to
noise. Nothing in this file knows what a reference is: reference tokens are ordinary tokens whose noise level is 0 and
whose coordinate comes from rope.py. That is the paper's point of "no extra adapter" and it is why the file has to
accept one noise level *per token*; a model with one level per sample would treat the clean picture as noise.

LTX-2.3: everything here; the module tree has the very names of the published file, so weights load by name.

A block, x (B, S, D), modulated by nine rows (shift, scale, gate for each of three parts) made from the noise level:
  x += gate * self-attention(rms(x) * (1 + scale) + shift)     rotary positions, all tokens see all tokens
  x += gate * text-attention(rms(x) * (1 + scale) + shift)     keys and values from the modulated prompt context
  x += gate * feed-forward (rms(x) * (1 + scale) + shift)

Conventions
  Noise: sigma 1 is noise, 0 is data; x_s = (1-s)*x0 + s*noise; v = noise - x0; x0 = x_s - s*v. Sigmas are 0..1 here;
  the factor 1000 is applied inside. Off-values: cfg 1, stg 0, rescale 0.
  Attention masks are in [0, 1], 1 = sees, 0 = does not; fractions become a log bias. float32 and bf16, not float16.
Traps: q and k are normalised over the full width before heads are split; the gate of an attention comes from its query
  side; adaLN rows 3-5 belong to the feed-forward and 6-8 to the text attention although the latter runs first; the last
  norm subtracts the mean, the others do not.

Usage:
    config = TransformerConfig.from_checkpoint(read_metadata(path)["config"]["transformer"])     # checkpoint.py
    with torch.device("meta"):
        model = VideoTransformer(config)
    load_weights(model, path, "model.diffusion_model.", dtype=torch.bfloat16)                    # checkpoint.py
    velocity = model(latent, timesteps, sigma, positions, context)                               # (B, S, C)

Read next: vae.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rope import apply_rotary, grid_to_positions, reference_grid, rotary_tables, video_grid

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a video transformer. Defaults: LTX-2.3: the 22B checkpoint (13.1 B of it are the video part)."""

    in_channels: int = 128
    out_channels: int = 128
    num_layers: int = 48
    heads: int = 32
    head_dim: int = 128
    theta: float = 10000.0
    max_pos: tuple[float, float, float] = (20, 2048, 2048)  # seconds, pixels, pixels
    norm_eps: float = 1e-6
    timestep_scale: float = 1000.0  # sigma 0..1 -> argument of the sinusoid

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def from_checkpoint(cls, config: dict) -> "TransformerConfig":
        """Read config["transformer"] of a checkpoint header.

        Raises ValueError when a size is absent or the file describes another member of the LTX family.
        """
        for key, value in LTX23_SWITCHES.items():
            if config.get(key) != value:
                got = repr(config.get(key))
                raise ValueError(f"expected {key} = {value!r} (LTX-2.3), got {got}; use an LTX-2.3 checkpoint")
        try:
            sizes = cls(
                in_channels=config["in_channels"],
                out_channels=config["out_channels"],
                num_layers=config["num_layers"],
                heads=config["num_attention_heads"],
                head_dim=config["attention_head_dim"],
                theta=config["positional_embedding_theta"],
                max_pos=tuple(config["positional_embedding_max_pos"]),
                norm_eps=config["norm_eps"],
                timestep_scale=config["timestep_scale_multiplier"],
            )
        except KeyError as error:
            raise ValueError(f"expected {error} in the transformer config, got none; use a full header") from error
        if config.get("cross_attention_dim", sizes.dim) != sizes.dim:
            found = config["cross_attention_dim"]
            raise ValueError(f"expected cross_attention_dim {sizes.dim} (the width), got {found}; make them equal")
        return sizes

    def to_checkpoint(self) -> dict:
        """The entries of config["transformer"] that from_checkpoint reads, for writing a checkpoint."""
        return {
            **LTX23_SWITCHES,
            "_class_name": "AVTransformer3DModel",
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "num_layers": self.num_layers,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "cross_attention_dim": self.dim,
            "positional_embedding_theta": self.theta,
            "positional_embedding_max_pos": list(self.max_pos),
            "norm_eps": self.norm_eps,
            "timestep_scale_multiplier": self.timestep_scale,
        }


TRANSFORMER_PREFIX = "model.diffusion_model."  # LTX-2.3: of its names in the checkpoint file

# LTX-2.3: what tells this generation from its relatives; the code below has no other branch.
LTX23_SWITCHES = {
    "rope_type": "split",
    "frequencies_precision": "float64",
    "use_middle_indices_grid": True,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_second_linear": False,
    "qk_norm": "rms_norm",
}


# ---------------------------------------------------------------- parts of a block


class ChannelNorm(nn.Module):
    """RMS norm with a weight per channel, for queries and keys."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # (..., D)


class Attention(nn.Module):
    """Gated multi-head attention with normalised queries and keys. LTX-2.3: used by the blocks and by text.py.

    dim: width of the queries and of the output; context_dim: width of the context (None: dim). Raises ValueError when
    dim is not divisible by heads.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, eps: float = 1e-6):
        super().__init__()
        if dim % heads:
            raise ValueError(f"expected a width divisible by the heads, got {dim} and {heads}; change one")
        context_dim = dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(context_dim, dim)
        self.to_v = nn.Linear(context_dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.q_norm = ChannelNorm(dim, eps)
        self.k_norm = ChannelNorm(dim, eps)
        self.to_gate_logits = nn.Linear(dim, heads)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        skip: bool = False,
    ) -> Tensor:
        """x (B, N, D) asks, context (B, M, Dc) answers (None: x itself). Returns (B, N, D).

        rotary: cos, sin from rope.rotary_tables, for queries and keys alike. bias: added to the scores, broadcast to
        (B, nh, N, M); see mask_bias. skip: LTX-2.3: perturbed self-attention for STG, every token reads only itself.
        """
        B, N, D = x.shape
        context = x if context is None else context  # (B, M, Dc)
        v = self._split(self.to_v(context))  # (B, nh, M, hd)
        if skip:
            out = v
        else:
            # The norm spans the full width, so it has to come before the split into heads.
            q = self._split(self.q_norm(self.to_q(x)))  # (B, nh, N, hd)
            k = self._split(self.k_norm(self.to_k(context)))  # (B, nh, M, hd)
            if rotary is not None:
                q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
            q, k = q.to(v.dtype), k.to(v.dtype)  # autocast may leave the norms in float32
            bias = None if bias is None else bias.to(v.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, nh, N, hd)
        gate = 2 * torch.sigmoid(self.to_gate_logits(x))  # (B, N, nh), 1 when the logits are 0
        out = out.transpose(1, 2) * gate[..., None]  # (B, N, nh, hd)
        return self.to_out[0](out.reshape(B, N, D))  # (B, N, D)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, nh, N, hd)


class FeedForward(nn.Module):
    """Two linears with a tanh-approximated GELU between. LTX-2.3: the names net.0.proj and net.2 are the file's."""

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        first = nn.ModuleDict({"proj": nn.Linear(dim, hidden)})
        self.net = nn.ModuleDict({"0": first, "2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](F.gelu(self.net["0"]["proj"](x), approximate="tanh"))  # (B, N, D)


SINUSOID = 256  # LTX-2.3: width of the noise level's sinusoid in every size of the model


class AdaLN(nn.Module):
    """Noise level -> modulation rows. LTX-2.3: sinusoid, two linears (the embedding), silu, one linear (the rows)."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.rows = rows
        embedder = nn.ModuleDict({"linear_1": nn.Linear(SINUSOID, dim), "linear_2": nn.Linear(dim, dim)})
        self.emb = nn.ModuleDict({"timestep_embedder": embedder})
        self.linear = nn.Linear(dim, rows * dim)

    def forward(self, level: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """level (...) float32, already times 1000. Returns rows (..., rows, D) and the embedding (..., D)."""
        half = SINUSOID // 2
        k = torch.arange(half, dtype=torch.float32, device=level.device)
        omega = torch.exp(-math.log(10000.0) * k / half)  # divisor 128, not 127
        angle = level[..., None] * omega
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)  # (..., 256) cosines first
        embedder = self.emb["timestep_embedder"]
        embedding = embedder["linear_2"](F.silu(embedder["linear_1"](wave)))  # (..., D)
        rows = self.linear(F.silu(embedding)).unflatten(-1, (self.rows, -1))  # (..., rows, D)
        return rows, embedding


def modulate(x: Tensor, shift: Tensor, factor: Tensor, eps: float) -> Tensor:
    """RMS norm without weight, then norm * factor + shift; x (B, N, D), the others that shape or (1, D)."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=eps), factor)


# The smallest bf16 number: also a float32 number, and it stays finite when autocast rounds the bias to bf16.
NEVER = torch.finfo(torch.bfloat16).min


def mask_bias(mask: Tensor) -> Tensor:
    """Attention weights in [0, 1] -> what to add to the scores. LTX-2.3: log(value); 0 becomes "never".

    mask (B, N, M), or (B, 1, M) when every query has the same keys. Returns (B, 1, N or 1, M) float32.
    """
    mask = mask.to(torch.float32)
    bias = torch.where(mask > 0, mask.clamp(min=torch.finfo(torch.float32).tiny).log(), NEVER)
    return bias[:, None]


class Block(nn.Module):
    """One transformer block; see the header for its three steps."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.eps = eps
        self.attn1 = Attention(dim, config.heads, eps=eps)
        self.attn2 = Attention(dim, config.heads, eps=eps)
        self.ff = FeedForward(dim)
        self.scale_shift_table = nn.Parameter(torch.randn(9, dim) / dim**0.5)
        self.prompt_scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,  # (B, S, D)
        context: Tensor,  # (B, N, D)
        rows: Tensor,  # (B, S, 9, D), or (U, 9, D) together with pick, or (1, 9, D)
        prompt_rows: Tensor,  # (B, 1, 2, D)
        pick: Tensor | None,  # (B, S) which of the U distinct noise levels a token has
        rotary: tuple[Tensor, Tensor],  # (B, nh, S, hd/2) each
        bias: Tensor | None,  # (B, 1, S or 1, S)
        context_bias: Tensor | None,  # (B, 1, 1, N)
        skip: bool,
    ) -> Tensor:
        m = _rows(self.scale_shift_table + rows, pick)
        h = modulate(x, m(0), m(1, 1), self.eps)  # (B, S, D)
        x = torch.addcmul(x, m(2), self.attn1(h, rotary=rotary, bias=bias, skip=skip))  # x + gate * attention

        shift, scale = (self.prompt_scale_shift_table + prompt_rows).unbind(-2)  # (B, 1, D) each
        h = modulate(x, m(6), m(7, 1), self.eps)
        x = torch.addcmul(x, m(8), self.attn2(h, torch.addcmul(shift, context, 1 + scale), bias=context_bias))

        h = modulate(x, m(3), m(4, 1), self.eps)
        return torch.addcmul(x, m(5), self.ff(h))  # (B, S, D)


def _rows(table: Tensor, pick: Tensor | None) -> Callable[..., Tensor]:
    """Row r of a modulation table, plus a number, for every token: (B, S, D), or (1, D) where all tokens have the same.

    With pick the table holds distinct noise levels only, and each token looks up its own.
    """

    def row(r: int, plus: float = 0) -> Tensor:
        chosen = table[..., r, :] + plus if plus else table[..., r, :]
        return chosen if pick is None else F.embedding(pick, chosen)

    return row


# ---------------------------------------------------------------- the transformer


class VideoTransformer(nn.Module):
    """LTX-2.3's transformer without the audio half, which is numerically the same as running it without audio."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim = config.dim
        self.config = config
        self.patchify_proj = nn.Linear(config.in_channels, dim)
        self.adaln_single = AdaLN(dim, 9)
        self.prompt_adaln_single = AdaLN(dim, 2)
        self.transformer_blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, config.out_channels)

    def forward(
        self,
        latent: Tensor,
        timesteps: Tensor,
        sigma: Tensor,
        positions: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        skip_blocks: Sequence[int] = (),
        checkpoint_blocks: bool = False,
        phase: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, S, C) of every token, in the dtype of the weights (or of autocast).

        latent (B, S, C): noisy video tokens and clean reference tokens. timesteps (B, S): noise level of each token,
        0..1, 0 for clean ones. sigma (B,): noise level of the sample, which modulates the prompt even when every token
        is clean. positions (B, 3, S, 2): bounds in seconds and pixels. context (B, N, D) from text.py.
        context_mask (B, N): 1 = a token to read. attention_mask (B, S, S), row = query, or (B, 1, S) to hide keys from
        everyone at little cost; values in [0, 1]. skip_blocks: LTX-2.3: blocks with perturbed self-attention (STG).
        checkpoint_blocks: recompute blocks in the backward pass, less memory. phase (B or 1, S): an extra turn of a
        token's rotary angles (rope.source_phase), None for ST-DRC. Raises ValueError on sizes that disagree.
        """
        self._check(latent, timesteps, sigma, positions, context)
        config, dtype = self.config, self.scale_shift_table.dtype
        tables = rotary_tables(positions, config.dim, config.heads, config.theta, config.max_pos, phase)
        # Made in float32, rounded once and not in every block.
        rotary = tuple(table.to(dtype) for table in tables)  # (B, nh, S, hd/2) each
        del tables
        bias = None if attention_mask is None else mask_bias(attention_mask)  # (B, 1, S or 1, S)
        context_bias = None if context_mask is None else mask_bias(context_mask[:, None])  # (B, 1, 1, N)

        # In sampling a few thousand tokens share two or three noise levels, so the nine rows are made once per level.
        # Finding the levels depends on the data, which neither training nor a compiled graph wants.
        levels, pick = timesteps.to(torch.float32), None
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            levels, pick = torch.unique(levels, return_inverse=True)  # (U,), (B, S)
            pick = pick if len(levels) > 1 else None  # one level for all: rows (1, D) fit any token as they are
        rows, embedding = self.adaln_single(levels * config.timestep_scale, dtype)  # (..., 9, D), (..., D)
        prompt_level = sigma.to(torch.float32)[:, None] * config.timestep_scale  # (B, 1)
        prompt_rows, _ = self.prompt_adaln_single(prompt_level, dtype)  # (B, 1, 2, D)

        x = self.patchify_proj(latent.to(dtype))  # (B, S, D)
        context = context.to(dtype)
        for i, block in enumerate(self.transformer_blocks):
            inputs = (x, context, rows, prompt_rows, pick, rotary, bias, context_bias, i in skip_blocks)
            x = checkpoint(block, *inputs, use_reentrant=False) if checkpoint_blocks else block(*inputs)

        # The last modulation reuses the embedding itself, before silu and linear.
        m = _rows(self.scale_shift_table + embedding[..., None, :], pick)
        x = F.layer_norm(x, x.shape[-1:], eps=config.norm_eps)  # subtracts the mean, unlike every norm above
        return self.proj_out(torch.addcmul(m(0), x, m(1, 1)).to(dtype))  # (B, S, C)

    def _check(self, latent: Tensor, timesteps: Tensor, sigma: Tensor, positions: Tensor, context: Tensor) -> None:
        B, S = latent.shape[:2]
        expected = {
            "latent": (latent, (B, S, self.config.in_channels)),
            "timesteps": (timesteps, (B, S)),
            "sigma": (sigma, (B,)),
            "positions": (positions, (B, 3, S, 2)),
            "context": (context, (B, context.shape[1], self.config.dim)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}; see forward")


# ---------------------------------------------------------------- noise levels, sampling


def token_shift(tokens: int) -> float:
    """LTX-2.3: longer sequences need more noise: 0.95 at 1024 tokens, 2.05 at 4096, a line through both, no limit."""
    return 0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024)


def ltx_sigmas(steps: int, tokens: int = 4096) -> Tensor:
    """Noise levels of a sampling run, from 1 down to 0.1 and then 0. Returns (steps + 1,) float32.

    LTX-2.3: evenly spaced, shifted towards noise, stretched so that the last level before 0 is 0.1. The official
    one-stage run uses 4096 tokens whatever the size of the video. Raises ValueError for fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}; 30 is usual")
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float32)[:-1]  # (steps,)
    weight = torch.tensor(math.exp(token_shift(tokens)))  # float32, so that the first level comes out as exactly 1
    shifted = weight / (weight + (1 / even - 1))
    if steps > 1:  # with one step the only level is 1, and there is nothing to stretch
        shifted = 1 - (1 - shifted) * ((1 - 0.1) / (1 - shifted[-1]))
    return torch.cat([shifted, torch.zeros(1)])


# LTX-2.3: the levels the distilled checkpoint was trained for: 8 steps, one stream.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)


def training_sigmas(tokens: int, normal: Tensor, uniform_value: Tensor, uniform_choice: Tensor) -> Tensor:
    """Noise levels to train at, one per sample, from three given draws of one shape. Returns that shape, float32.

    LTX-2.3: sigmoid of a normal shifted by token_shift(tokens), spread to 0..1 between its 0.5 % and 99.9 % points;
    one sample in ten uniform instead. tokens counts the video only, not the reference.
    normal ~ N(0, 1); uniform_value and uniform_choice ~ U(0, 1).
    """
    shift, floor = token_shift(tokens), 1e-3
    low, high = (1 / (1 + math.exp(-(shift + z))) for z in (-2.5758, 3.0902))
    level = (torch.sigmoid(normal + shift) - low) / (high - low)
    level = torch.where(level < floor, 2 * floor - level, level).clamp(0, 1)  # mirrored at 0.001
    return torch.where(uniform_choice > 0.1, level, floor + (1 - floor) * uniform_value)


def euler_step(x: Tensor, x0: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """From level sigma to sigma_next along the straight line through the clean estimate. LTX-2.3; float32.

    sigma is one number for all tokens; a token with x0 == x (a reference) stays where it is.
    """
    x, x0 = x.to(torch.float32), x0.to(torch.float32)
    return x + (x - x0) / sigma * (sigma_next - sigma)


def blend_clean(x0: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    """Put known tokens back into the estimate. LTX-2.3. mask: 1 = generated, 0 = kept clean; broadcasts to x0."""
    return x0 * mask + clean * (1 - mask)


def ltx_guidance(
    cond: Tensor,
    uncond: Tensor | None = None,
    perturbed: Tensor | None = None,
    cfg: float = 3.0,
    stg: float = 1.0,
    rescale: float = 0.7,
) -> Tensor:
    """LTX-2.3's own guidance of clean estimates, for sampling the base model without a reference; float32.

    cond + (cfg-1)*(cond-uncond) + stg*(cond-perturbed), where perturbed comes from a pass with skip_blocks. Off: cfg 1,
    stg 0, rescale 0; an input that is off may be None. rescale pulls the spread of values back to that of cond,
    measured over the whole tensor. Raises ValueError when an input that is on is missing.
    """
    cond = cond.to(torch.float32)
    guided = cond
    for name, weight, other in (("uncond", cfg - 1, uncond), ("perturbed", stg, perturbed)):
        if weight == 0:
            continue
        if other is None:
            raise ValueError(f"expected a {name} estimate for a weight of {weight}, got None; pass it or turn it off")
        guided = guided + weight * (cond - other.to(torch.float32))
    if rescale != 0:
        guided = guided * (rescale * cond.std() / guided.std() + 1 - rescale)
    return guided


# ---------------------------------------------------------------- demo


def noisy_sequence(clean: Tensor, noise: Tensor, sigma: float, video: int) -> tuple[Tensor, Tensor]:
    """What the transformer reads at level sigma: tokens (S, C) and the level of each, timesteps (S,).

    LTX-2.3: from pure noise one Euler step with a perfect estimate leads to x_s = (1-s)*x0 + s*noise, exactly. clean,
    noise (S, C); the first `video` tokens are noised, the reference behind them stays clean, at level 0.
    """
    generated = (torch.arange(len(clean)) < video).float()  # (S,), 1 = video, 0 = reference
    tokens = blend_clean(euler_step(noise, clean, 1.0, sigma), clean, generated[:, None])  # (S, C)
    return tokens, sigma * generated


def draw_cells(values: Tensor, cell: int) -> Image.Image:
    """Numbers (rows, columns) as squares of `cell` pixels: -2 and below blue, 0 white, 2 and above red."""
    share = (values / 2).clamp(-1, 1)[..., None]
    full = torch.where(share > 0, torch.tensor([178.0, 24, 43]), torch.tensor([33.0, 102, 172]))  # (rows, columns, 3)
    picture = Image.fromarray((255 + share.abs() * (full - 255)).round().byte().numpy())
    return picture.resize((cell * picture.width, cell * picture.height), Image.Resampling.NEAREST)


def draw_levels(schedules: dict[str, Tensor], width: int = 700) -> Image.Image:
    """One line per schedule from noise (left) to data (right), with a tick at every level, so that gaps show."""
    picture = Image.new("RGB", (width, 90 * len(schedules) + 100), "white")
    pen, left, right = ImageDraw.Draw(picture), 40, width - 40
    pen.text((width / 2, 12), "where the levels lie: one tick each", "black", ImageFont.load_default(20), anchor="mt")
    for row, (name, levels) in enumerate(schedules.items()):
        y = 90 * row + 100
        above = int((levels[:-1] > 0.85).sum())
        text = f"{name}: {above} of {len(levels) - 1} evaluations above 0.85"
        pen.text((left, y - 20), text, "black", ImageFont.load_default(16), anchor="ls")
        pen.line((left, y, right, y), "grey", 1)
        for level in levels.tolist():
            x = round(left + (1 - level) * (right - left))
            pen.line((x, y - 12, x, y + 12), (213, 94, 0), 2)
    for level in (1, 0.8, 0.6, 0.4, 0.2, 0):
        x = round(left + (1 - level) * (right - left))
        pen.text((x, picture.height - 55), f"{level:g}", "black", ImageFont.load_default(14), anchor="mm")
    ends = "noise  <-   noise level sigma   ->  data"
    pen.text((width / 2, picture.height - 22), ends, "black", ImageFont.load_default(16), anchor="mm")
    return picture


def draw(steps: int = 30, shown: Sequence[int] = (0, 25, 29), few: int = 8) -> Image.Image:
    """Three schedules as curves and ticks (`steps`, `few`, distilled), and one sequence at three levels of the first.

    shown: which evaluations of the run of `steps` to show tokens for, 0 = pure noise. The sequence is a 2x3x4 video
    and its reference, 16 channels, smooth made-up values. Returns an RGB picture, 1440 pixels wide.
    """
    from training.plot import chart

    schedules = {f"{steps} steps": ltx_sigmas(steps), f"{few} steps": ltx_sigmas(few),
                 "distilled, 8 steps": torch.tensor(DISTILLED_SIGMAS)}  # fmt: skip
    series = {name: ([i / (len(s) - 1) for i in range(len(s))], s.tolist()) for name, s in schedules.items()}
    curves = chart(series, "noise level (1 = noise, 0 = data)", "share of the steps done", 480, 300)
    sheet = Image.new("RGB", (1440, 860), "white")
    sheet.paste(curves.resize((704, 440), Image.Resampling.LANCZOS), (10, 10))
    sheet.paste(draw_levels(schedules), (730, 40))

    generator, cell = torch.Generator().manual_seed(0), 12
    grid = torch.cat([video_grid(2, 3, 4), reference_grid(2, 3, 4)]).float()  # (S, 3)
    waves, phase = torch.randn(3, 16, generator=generator), torch.rand(16, generator=generator)
    clean = torch.sin(grid @ waves + 6 * phase)  # (S, C): neighbours are alike, as in a video
    noise, L = torch.randn(clean.shape, generator=generator), 2 * 3 * 4
    pen, small = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for place, step in enumerate(shown):
        sigma = schedules[f"{steps} steps"][step].item()
        tokens, timesteps = noisy_sequence(clean, noise, sigma, L)
        left, top = 24 + 472 * place, 560
        title = f"step {step} of {steps}: sigma {sigma:.2f}"
        pen.text((left, top - 34), title, "black", ImageFont.load_default(20), anchor="ls")
        sheet.paste(draw_cells(tokens.T, cell), (left, top))
        sheet.paste(draw_cells(2 * timesteps[None], cell), (left, top + 16 * cell + 8))
        pen.rectangle((left, top + 16 * cell + 8, left + len(clean) * cell, top + 17 * cell + 8), outline="grey")
        pen.text((left, top - 8), f"{L} video tokens", "black", small, anchor="ls")
        pen.text((left + L * cell + 6, top - 8), f"{len(clean) - L} reference", "black", small, anchor="ls")
        pen.line((left + L * cell, top - 22, left + L * cell, top + 17 * cell + 8), "black", 2)
        pen.text((left, top + 17 * cell + 14), f"timestep {sigma:.2f} each", "black", small, anchor="lt")
        pen.text((left + L * cell + 6, top + 17 * cell + 14), "timestep 0 each", "black", small, anchor="lt")
    text = "One column per token, one row per channel (blue below 0, red above); the strip below is its noise level."
    pen.text((24, 832), text, "black", small, anchor="ls")
    return sheet


def _demo() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(in_channels=16, out_channels=16, num_layers=2, heads=4, head_dim=16)
    model = VideoTransformer(config).eval()
    frames, rows, columns = 3, 4, 4
    tokens = frames * rows * columns
    positions = grid_to_positions(video_grid(frames, rows, columns), frame_rate=24)[None]
    latent, context = torch.randn(1, tokens, 16), torch.randn(1, 8, config.dim)
    sigma = torch.tensor([0.7])
    timesteps = sigma[:, None].expand(1, tokens)
    with torch.no_grad():
        velocity = model(latent, timesteps, sigma, positions, context)
    print("A random transformer of LTX-2.3's build, very small")
    for name, tensor in [("latent", latent), ("positions", positions), ("context", context), ("velocity", velocity)]:
        print(f"  {name:10s}{tuple(tensor.shape)}")

    with torch.device("meta"):
        full = VideoTransformer(TransformerConfig())
    print(f"\n{'parameters':24s}{'this demo':>14s}{'LTX-2.3':>18s}")
    for (name, small), (_, large) in zip(model.named_children(), full.named_children(), strict=True):
        counts = [sum(p.numel() for p in module.parameters()) for module in (small, large)]
        print(f"  {name:22s}{counts[0]:14,}{counts[1]:18,}")
    totals = [sum(p.numel() for p in module.parameters()) for module in (model, full)]
    print(f"  {'all':22s}{totals[0]:14,}{totals[1]:18,}")

    print("\nNoise levels (1 = noise, 0 = data) of a run of 30 steps, of 8 steps, and of the distilled checkpoint")
    for row in (*ltx_sigmas(30).split(16), ltx_sigmas(8), torch.tensor(DISTILLED_SIGMAS)):
        print("  " + " ".join(f"{value:.3f}" for value in row.tolist()))
    draw().save("model_demo.png")
    high, last = int((ltx_sigmas(30)[:-1] > 0.85).sum()), ltx_sigmas(30)[-2].item()
    print("wrote model_demo.png: the three schedules as curves, their levels as ticks, and a video with its reference "
          "as tokens at three levels")
    print(f"Notice: {high} of 30 evaluations lie above 0.85, where the layout is decided; the last step leaps from "
          f"{last:.1f} to 0; the reference's tokens never change, each token has a level of its own.")


if __name__ == "__main__":
    _demo()
