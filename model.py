"""LTX-2.3's video transformer and its noise schedule.

The base model that ST-DRC (arXiv 2606.02441) builds on. A latent video is a sequence of tokens; the
transformer looks at noisy tokens, each with its own noise level and its own coordinate, and
predicts the velocity from data to noise. Nothing in this file knows what a reference is: reference
tokens are ordinary tokens whose noise level is 0 and whose coordinate comes from rope.py. That is
the paper's point of "no extra adapter", and it is why the file accepts one noise level *per token*;
a model with one level per sample would treat the clean picture as noise.

LTX-2.3: everything here; the module tree has the names of the published file, so weights load by
name. A block, x (B, S, D), modulated by nine rows (shift, scale, gate for each of three parts) that
are made from the noise level:

  x += gate * self-attention(rms(x) * (1 + scale) + shift)    all tokens see all, rotary positions
  x += gate * text-attention(rms(x) * (1 + scale) + shift)    keys, values: the modulated prompt
  x += gate * feed-forward  (rms(x) * (1 + scale) + shift)

Conventions. Sigma 1 is noise, 0 is data (losses.py has the formulas); the factor 1000 is applied
  inside. Attention masks are in [0, 1], 1 = sees, 0 = does not; fractions become a log bias.
  float32 and bf16, not float16.
Traps. q and k are normalised over the full width before heads are split; the gate of an attention
  comes from its query side; rows 3-5 of the nine belong to the feed-forward and 6-8 to the text
  attention, although the latter runs first; the last norm subtracts the mean, the others do not.

Usage (ltx/load.py does it for a real file):
    model = VideoTransformer(TransformerConfig(num_layers=2, heads=4, head_dim=32))
    velocity = model(latent, timesteps, sigma, positions, context)                   # (B, S, C)

Read next: sample.py
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rope import apply_rotary, rotary_tables

# ---------------------------------------------------------------- configuration

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
# Ours -> the name in the file's config.
CONFIG_NAMES = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_layers": "num_layers",
    "heads": "num_attention_heads",
    "head_dim": "attention_head_dim",
    "theta": "positional_embedding_theta",
    "max_pos": "positional_embedding_max_pos",
    "norm_eps": "norm_eps",
    "timestep_scale": "timestep_scale_multiplier",
}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a video transformer.

    Defaults: LTX-2.3: the 22B checkpoint (13.1 B of it are the video part).
    """

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

        Raises ValueError when a size is absent or the file describes another member of the family.
        """
        for key, value in LTX23_SWITCHES.items():
            if config.get(key) != value:
                raise ValueError(f"expected {key} = {value!r} (LTX-2.3), got {config.get(key)!r}; "
                                 "use an LTX-2.3 checkpoint")
        try:
            sizes = {ours: config[theirs] for ours, theirs in CONFIG_NAMES.items()}
        except KeyError as error:
            raise ValueError(f"expected {error} in the transformer config, got none; "
                             "use a full header") from error
        sizes = cls(**sizes | {"max_pos": tuple(sizes["max_pos"])})
        if (found := config.get("cross_attention_dim", sizes.dim)) != sizes.dim:
            raise ValueError(f"expected cross_attention_dim {sizes.dim} (the width), got {found}; "
                             "make them equal")
        return sizes

    def to_checkpoint(self) -> dict:
        """The entries of config["transformer"] that from_checkpoint reads."""
        sizes = {theirs: getattr(self, ours) for ours, theirs in CONFIG_NAMES.items()}
        sizes |= {"cross_attention_dim": self.dim, "_class_name": "AVTransformer3DModel"}
        return LTX23_SWITCHES | sizes | {CONFIG_NAMES["max_pos"]: list(self.max_pos)}


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
    """Gated multi-head attention with normalised queries and keys; also used by ltx/text.py.

    dim: width of the queries and of the output; context_dim: width of the context (None: dim).
    Raises ValueError when dim is not divisible by heads.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, eps: float = 1e-6):
        super().__init__()
        if dim % heads:
            raise ValueError(f"expected a width divisible by the heads, got {dim} and {heads}; "
                             "change one")
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

        rotary: cos, sin from rope.rotary_tables, for queries and keys alike. bias: added to the
        scores, broadcast to (B, nh, N, M); see mask_bias. skip: LTX-2.3: perturbed self-attention
        for STG, every token reads only itself.
        """
        B, N, D = x.shape
        context = x if context is None else context                       # (B, M, Dc)
        v = self._split(self.to_v(context))                               # (B, nh, M, hd)
        if skip:
            out = v
        else:
            # The norm spans the full width, so it has to come before the split into heads.
            q = self._split(self.q_norm(self.to_q(x)))                    # (B, nh, N, hd)
            k = self._split(self.k_norm(self.to_k(context)))              # (B, nh, M, hd)
            if rotary is not None:
                q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
            q, k = q.to(v.dtype), k.to(v.dtype)  # autocast may leave the norms in float32
            bias = None if bias is None else bias.to(v.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, nh, N, hd)
        gate = 2 * torch.sigmoid(self.to_gate_logits(x))                  # (B, N, nh), 1 at logit 0
        out = out.transpose(1, 2) * gate[..., None]                       # (B, N, nh, hd)
        return self.to_out[0](out.reshape(B, N, D))                       # (B, N, D)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, nh, N, hd)


class FeedForward(nn.Module):
    """Two linears with a tanh-approximated GELU between. The names net.0.proj, net.2 are LTX's."""

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        first = nn.ModuleDict({"proj": nn.Linear(dim, hidden)})
        self.net = nn.ModuleDict({"0": first, "2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.net["0"]["proj"](x), approximate="tanh")     # (B, N, 4*D)
        return self.net["2"](hidden)                                      # (B, N, D)


SINUSOID = 256  # LTX-2.3: width of the noise level's sinusoid in every size of the model
Runs = Sequence[tuple[Tensor, int]]  # a noise level (B,), and how many tokens in a row have it


class AdaLN(nn.Module):
    """Noise level -> modulation rows: sinusoid, two linears (the embedding), silu, one linear."""

    def __init__(self, dim: int, rows: int):
        super().__init__()
        self.rows = rows
        layers = {"linear_1": nn.Linear(SINUSOID, dim), "linear_2": nn.Linear(dim, dim)}
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict(layers)})
        self.linear = nn.Linear(dim, rows * dim)

    def forward(self, level: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """level (...) float32, times 1000. Returns (..., rows, D) and the embedding (..., D)."""
        half = SINUSOID // 2
        k = torch.arange(half, dtype=torch.float32, device=level.device)
        omega = torch.exp(-math.log(10000.0) * k / half)                  # divisor 128, not 127
        angle = level[..., None] * omega
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)    # (..., 256) cosines first
        embedder = self.emb["timestep_embedder"]
        embedding = embedder["linear_2"](F.silu(embedder["linear_1"](wave)))      # (..., D)
        rows = self.linear(F.silu(embedding)).unflatten(-1, (self.rows, -1))      # (..., rows, D)
        return rows, embedding


class Levels(NamedTuple):
    """The modulation rows that AdaLN made of the noise levels, and which tokens have which level.

    rows (B, U, r, D): of each level. runs: how many tokens in a row have each of the U levels; None
    where U is 1 (all tokens alike) or their number (each its own).
    """

    rows: Tensor
    runs: list[int] | None

    def of(self, table: Tensor, first: int, count: int) -> list[Tensor]:
        """`count` rows from `first` on, the block's own table (r, D) added: (B, U, D) each."""
        last = first + count
        return (table[first:last] + self.rows[..., first:last, :]).unbind(-2)

    def apply(self, function: Callable[..., Tensor], tokens: list[Tensor], rows: list[Tensor]
              ) -> Tensor:
        """function(*tokens, *rows): tokens (B, S, D) each, rows (B, U, D) each -> (B, S, D).

        A run of tokens at a time, with the rows of its level: written out for every token, a row
        would be 50 megabytes at full size.
        """
        if self.runs is None:
            return function(*tokens, *rows)
        pieces = zip(*(t.split(self.runs, dim=1) for t in tokens),
                     *(row.split(1, dim=1) for row in rows), strict=True)
        return torch.cat([function(*piece) for piece in pieces], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """rms(x) * (1 + scale) + shift; x (B, N, D), the others that shape or (B, 1, D)."""
    return torch.addcmul(shift, F.rms_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, in one pass; x, y (B, N, D), gate that shape or (B, 1, D)."""
    return torch.addcmul(x, gate, y)


# The smallest bf16 number: also a float32 number, and finite when autocast rounds the bias.
NEVER = torch.finfo(torch.bfloat16).min


def mask_bias(mask: Tensor) -> Tensor:
    """Attention weights in [0, 1] -> what to add to the scores: log(value); 0 becomes "never".

    mask (B, N, M), or (B, 1, M) when every query has the same keys. Returns (B, 1, N or 1, M)
    float32.
    """
    mask = mask.to(torch.float32)
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(mask > 0, mask.clamp(min=tiny).log(), NEVER)[:, None]


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
        x: Tensor,                      # (B, S, D)
        context: Tensor,                # (B, N, D)
        levels: Levels,                 # nine rows for the tokens
        prompt_levels: Levels,          # two rows for the prompt
        rotary: tuple[Tensor, Tensor],  # (B, nh, S, hd/2) each
        bias: Tensor | None,            # (B, 1, S or 1, S)
        context_bias: Tensor | None,    # (B, 1, 1, N)
        skip: bool,                     # STG: perturb the self-attention
    ) -> Tensor:
        norm = partial(modulate, eps=self.eps)
        shift, scale, gate = levels.of(self.scale_shift_table, 0, 3)      # (B, U, D) each
        h = levels.apply(norm, [x], [shift, scale])                       # (B, S, D)
        h = self.attn1(h, rotary=rotary, bias=bias, skip=skip)            # (B, S, D)
        x = levels.apply(add_gated, [x, h], [gate])

        shift, scale, gate = levels.of(self.scale_shift_table, 6, 3)      # 6, not 3: see the header
        h = levels.apply(norm, [x], [shift, scale])                       # (B, S, D)
        shift, scale = prompt_levels.of(self.prompt_scale_shift_table, 0, 2)      # (B, 1, D) each
        prompt = torch.addcmul(shift, context, 1 + scale)                 # (B, N, D) without a norm
        h = self.attn2(h, prompt, bias=context_bias)                      # (B, S, D)
        x = levels.apply(add_gated, [x, h], [gate])

        shift, scale, gate = levels.of(self.scale_shift_table, 3, 3)
        h = levels.apply(norm, [x], [shift, scale])                       # (B, S, D)
        return levels.apply(add_gated, [x, self.ff(h)], [gate])           # (B, S, D)


# ---------------------------------------------------------------- the transformer


class VideoTransformer(nn.Module):
    """LTX-2.3's transformer without the audio half, which equals running it without audio.

    gradient_checkpointing = True: blocks are recomputed in the backward pass; slower, far less
    memory.
    """

    gradient_checkpointing = False

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
        timesteps: Tensor | Runs,
        sigma: Tensor,
        positions: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        skip_blocks: Sequence[int] = (),
    ) -> Tensor:
        """Velocity (B, S, C) of every token, in the dtype of the weights (or of autocast).

        latent (B, S, C): noisy video tokens and clean reference tokens. timesteps: noise levels in
        0..1, 0 for clean tokens; (B, S), or as runs of tokens that share one. sigma (B,): noise
        level of the sample, which modulates the prompt even when every token is clean. positions
        (B, A, S, 2): bounds in seconds and pixels, A = 3 (rope.Layout). context (B, N, D) from
        ltx/text.py. context_mask (B, N): 1 = a token to read. attention_mask (B, S, S), row =
        query, or (B, 1, S) to hide keys from everyone at little cost; values in [0, 1].
        skip_blocks: LTX-2.3: blocks with perturbed self-attention (STG). Raises ValueError on sizes
        that disagree.
        """
        self._check(latent, timesteps, sigma, positions, context)
        config, dtype = self.config, self.scale_shift_table.dtype
        sizes = config.dim, config.heads, config.theta, config.max_pos
        # Made in float32, rounded once and not in every block.
        rotary = tuple(table.to(dtype) for table in rotary_tables(positions, *sizes))
        bias = None if attention_mask is None else mask_bias(attention_mask)
        context_bias = None if context_mask is None else mask_bias(context_mask[:, None])

        # A few thousand tokens share two noise levels: nine rows for each level, not each token.
        runs = None
        if not isinstance(timesteps, Tensor):
            runs = [count for _, count in timesteps] if len(timesteps) > 1 else None
            timesteps = torch.stack([level for level, _ in timesteps], dim=1)     # (B, U)
        levels = timesteps.to(torch.float32) * config.timestep_scale      # (B, U), or (B, S)
        rows, embedding = self.adaln_single(levels, dtype)        # (B, U, 9, D), (B, U, D)
        prompt_level = sigma.to(torch.float32)[:, None] * config.timestep_scale   # (B, 1)
        prompt_rows, _ = self.prompt_adaln_single(prompt_level, dtype)            # (B, 1, 2, D)

        x = self.patchify_proj(latent.to(dtype))                          # (B, S, D)
        inputs = context.to(dtype), Levels(rows, runs), Levels(prompt_rows, None), rotary
        for i, block in enumerate(self.transformer_blocks):
            rest = *inputs, bias, context_bias, i in skip_blocks
            if self.gradient_checkpointing:
                x = checkpoint(block, x, *rest, use_reentrant=False)      # (B, S, D)
            else:
                x = block(x, *rest)                                       # (B, S, D)

        # The last modulation reuses the embedding itself, before silu and linear.
        levels = Levels(embedding[..., None, :], runs)
        shift, scale = levels.of(self.scale_shift_table, 0, 2)            # (B, U, D) each
        x = F.layer_norm(x, x.shape[-1:], eps=config.norm_eps)  # subtracts the mean, too
        x = levels.apply(lambda x, shift, scale: torch.addcmul(shift, x, 1 + scale), [x],
                         [shift, scale])
        return self.proj_out(x.to(dtype))                                 # (B, S, C)

    def _check(self, latent, timesteps, sigma, positions, context):
        B, S = latent.shape[:2]
        axes = positions.shape[1] if positions.shape[1:2] == (4,) else 3
        if not isinstance(timesteps, Tensor):  # as if each token had its own
            (level, _), tokens = timesteps[0], sum(count for _, count in timesteps)
            timesteps = level[..., None].expand(*level.shape, tokens)
        expected = {
            "latent": (latent, (B, S, self.config.in_channels)),
            "timesteps": (timesteps, (B, S)),
            "sigma": (sigma, (B,)),
            "positions": (positions, (B, axes, S, 2)),
            "context": (context, (B, context.shape[1], self.config.dim)),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"expected {name} of shape {shape}, got {tuple(tensor.shape)}; "
                                 "see forward")


# ---------------------------------------------------------------- noise levels, sampling


def token_shift(tokens: int) -> float:
    """LTX-2.3: longer sequences need more noise: 0.95 at 1024 tokens, 2.05 at 4096, linear."""
    return 0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024)


def ltx_sigmas(steps: int, tokens: int = 4096) -> Tensor:
    """Noise levels of a sampling run, from 1 down to 0.1 and then 0. Returns (steps + 1,) float32.

    LTX-2.3: evenly spaced, shifted towards noise, stretched so that the last level before 0 is
    0.1. The official one-stage run uses 4096 tokens whatever the size of the video. Raises
    ValueError for fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"expected at least 1 step, got {steps}; 30 is usual")
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float32)[:-1]      # (steps,)
    weight = torch.tensor(math.exp(token_shift(tokens)))  # float32: the first level is exactly 1
    shifted = weight / (weight + (1 / even - 1))
    if steps > 1:  # with one step the only level is 1, and there is nothing to stretch
        shifted = 1 - (1 - shifted) * ((1 - 0.1) / (1 - shifted[-1]))
    return torch.cat([shifted, torch.zeros(1)])


# LTX-2.3: the levels the distilled checkpoint was trained for: 8 steps, one stream.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)


def training_sigmas(
    tokens: int, normal: Tensor, uniform_value: Tensor, uniform_choice: Tensor
) -> Tensor:
    """Noise levels to train at, one per sample, from three given draws of one shape; float32.

    LTX-2.3: sigmoid of a normal shifted by token_shift(tokens), spread to 0..1 between its 0.5 %
    and 99.9 % points; one sample in ten uniform instead. tokens counts the video only, not the
    reference. normal ~ N(0, 1); uniform_value and uniform_choice ~ U(0, 1).
    """
    shift, floor = token_shift(tokens), 1e-3
    low, high = (1 / (1 + math.exp(-(shift + z))) for z in (-2.5758, 3.0902))
    level = (torch.sigmoid(normal + shift) - low) / (high - low)
    level = torch.where(level < floor, 2 * floor - level, level).clamp(0, 1)  # mirrored at 0.001
    return torch.where(uniform_choice > 0.1, level, floor + (1 - floor) * uniform_value)


def euler_step(x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """From level sigma to sigma_next along the straight line through the clean estimate x0.

    LTX-2.3; float32. One sigma for all tokens; where x0 == x nothing moves.
    """
    x, x0 = x.to(torch.float32), x0.to(torch.float32)
    return x + (x - x0) / sigma * (sigma_next - sigma)


def _demo() -> None:
    print("Where the noise levels lie: 1 = noise, 0 = data")
    runs = {"30 steps": ltx_sigmas(30), "8 steps": ltx_sigmas(8)}
    for name, sigmas in (runs | {"distilled": torch.tensor(DISTILLED_SIGMAS)}).items():
        above = (sigmas[:-1] > 0.85).sum()
        print(f"  {name:10s}{above} of {len(sigmas) - 1} evaluations above 0.85; the last three at",
              " ".join(f"{s:.2f}" for s in sigmas[-4:-1]))
    model = VideoTransformer(TransformerConfig(num_layers=2, heads=4, head_dim=32))
    tokens, place = torch.randn(1, 8, 128), torch.rand(1, 3, 8, 2)
    v = model(tokens, torch.full((1, 8), 0.5), torch.tensor([0.5]), place, torch.randn(1, 6, 128))
    print(f"A random model of {sum(p.numel() for p in model.parameters()):,} weights: tokens",
          f"{tuple(tokens.shape)} -> velocity {tuple(v.shape)}")
    print("Notice: most of the work is done where the eye sees only noise: there the layout, and")
    print("who appears, is decided; the last steps draw details.")


if __name__ == "__main__":
    _demo()
