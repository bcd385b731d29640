"""At LTX-2.3's full width our parts equal diffusers' and transformers' with the same weights.

    python -m bench.full_width          ten minutes on two cores, 16 GB of memory

The tests compare small models of random sizes; rounding grows with the width, and a mistake may
need it. So here the transformer has two blocks of width 4096, Gemma two layers of width 3840 (one
of each kind of attention), the VAE is whole; the weights are random. Each row prints the difference
as a part of the output: in float32 the largest by the largest (at most 1e-4), and with both
programs in bf16 the root mean squares (at most 2 %). Beside it, how far each of the two is in bf16
from itself in float32: what rounding alone does. Exit status 1 if a row is beyond.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import official
from common.cli import Parser
from ltx.gemma import FULL, SLIDING, GemmaConfig, GemmaTextModel
from ltx.vae import VideoVAE
from model import TransformerConfig
from study.results import processor
from tests import test_model, test_vae

EXACT, ROUNDED = 1e-4, 0.02  # the limits in float32 and bf16
Parts = tuple[nn.Module, nn.Module, Callable[[nn.Module, nn.Module], tuple[Tensor, Tensor]]]


def transformer() -> Parts:
    """Two blocks, a clip of 32 tokens and a reference of 16, 64 rows of text."""
    config = TransformerConfig.from_checkpoint(official.TRANSFORMER | {"num_layers": 2})
    ours = test_model.build(config)
    batch = test_model.inputs(config, 1, 2, 4, 4, 64)

    def run(ours: nn.Module, twin: nn.Module) -> tuple[Tensor, Tensor]:
        dtype = next(ours.parameters()).dtype
        latent, context = (batch[name].to(dtype) for name in ("latent", "context"))
        audio = torch.zeros(1, 3, 4, dtype=dtype), torch.zeros(1, 5, 8 * config.heads, dtype=dtype)
        theirs, _ = twin(
            hidden_states=latent, audio_hidden_states=audio[0], encoder_hidden_states=context,
            audio_encoder_hidden_states=audio[1], timestep=batch["timesteps"] * 1000,
            audio_timestep=torch.zeros(1, 3), sigma=batch["sigma"] * 1000,
            video_coords=batch["positions"], audio_num_frames=3, isolate_modalities=True,
            use_cross_timestep=True, return_dict=False)
        return ours(**batch | {"latent": latent, "context": context}), theirs
    return ours, test_model.diffusers_twin(ours), run


def vae(decoding: bool) -> Parts:
    """The whole VAE on nine frames of 64 x 64 pixels."""
    ours = VideoVAE(official.VAE).eval()
    ours.per_channel_statistics.get_buffer("std-of-means").uniform_(0.5, 2)
    video, latent = torch.rand(1, 3, 9, 64, 64) * 2 - 1, torch.randn(1, 128, 2, 2, 2)

    def run(ours: nn.Module, twin: nn.Module) -> tuple[Tensor, Tensor]:
        dtype = next(ours.parameters()).dtype
        mean, std = (part.to(dtype) for part in ours.statistics())
        if decoding:
            return (ours.decode(latent.to(dtype)),
                    twin.decode(latent.to(dtype) * std + mean).sample)
        theirs = twin.encode(video.to(dtype)).latent_dist.mean
        return ours.encode(video.to(dtype)), (theirs - mean) / std
    return ours, test_vae.diffusers_twin(ours, official.VAE), run


def gemma() -> Parts:
    """Two layers, one of each kind, 64 tokens, half of them padding; a small vocabulary."""
    import transformers
    sizes = official.GEMMA["text_config"] | {
        "num_hidden_layers": 2, "vocab_size": 512, "layer_types": [SLIDING, FULL],
        "rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                            SLIDING: {"rope_type": "default", "rope_theta": 1e4}}}
    del sizes["rope_scaling"]
    ours = GemmaTextModel(GemmaConfig.from_dict(sizes)).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_(std=0.1 if "norm" in name else 0.02)
    config = transformers.Gemma3TextConfig(**sizes, attn_implementation="eager")
    twin = transformers.Gemma3TextModel(config).eval()
    twin.load_state_dict(ours.state_dict())
    ids, mask = torch.randint(3, 512, (1, 64)), torch.ones(1, 64, dtype=torch.long)
    mask[:, :32] = 0

    def run(ours: nn.Module, twin: nn.Module) -> tuple[Tensor, Tensor]:
        theirs = twin(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.stack(ours(ids, mask))[1:, :, 32:], torch.stack(theirs)[1:, :, 32:]
    return ours, twin, run


def apart(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference by that of b."""
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@torch.no_grad()
def compare(name: str, make: Callable[[], Parts]) -> bool:
    """Print a row; whether it is within the limits."""
    torch.manual_seed(0)
    started = time.time()
    ours, twin, run = make()
    count = sum(p.numel() for p in ours.parameters()) / 1e9
    mine, theirs = run(ours, twin)
    exact = ((mine - theirs).abs().max() / theirs.abs().max()).item()
    half = [part.float() for part in run(ours.bfloat16(), twin.bfloat16())]
    rounded, (own, its) = apart(*half), map(apart, half, (mine, theirs))
    print(f"{name:22s}{count:5.2f} G parameters   float32 {exact:.1e}   bf16 {rounded:.1e}   "
          f"(rounding: ours {own:.1e}, theirs {its:.1e})   {time.time() - started:4.0f} s",
          flush=True)
    return exact <= EXACT and rounded <= ROUNDED


def main(words: list[str] | None = None) -> int:
    Parser("bench.full_width", description=__doc__.split("\n")[0],
           formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # theirs, about types
    print(f"largest difference / largest output, {processor()}")
    rows = {"transformer, 2 blocks": transformer, "VAE, encoding": lambda: vae(False),
            "VAE, decoding": lambda: vae(True), "Gemma, 2 layers": gemma}
    within = [compare(name, make) for name, make in rows.items()]
    return int(not all(within))


if __name__ == "__main__":
    sys.exit(main())
