"""What training a LoRA takes: bytes on the card by option and size of the clips, and time.

The idea. As in ltx/plan.py: the modules themselves, as shapes, are counted; formulas are printed
from the text they are computed from; the identity loss's part of the decoder is walked forward and
backward. A step is largest when the backward pass begins: every block's input is kept, and the last
block is computed again and differentiated, or the decoder is.

our reading: RESERVE, an allowance, and a face of half the picture's height. ST-DRC (arXiv
  2606.02441) says nothing about memory. tests/test_fake_cuda.py holds each sum to the bytes that
  train.py has alive on a card that only pretends; `python -m bench.card` measures a real one.

Conventions. As in ltx/plan.py. Besides: r is the LoRA's rank and A the count of its numbers (kept
  in float32, with AdamW's two averages); a step is one clip. Operations: forward, forward again,
  and backward, in which the frozen weights need no gradient of their own.

    python train.py --plan                                # LTX-2.3, every option, two sizes
    python train.py --plan --buckets 512x512x25 --tflops 350 --steps 2000

Read next: training/run.py
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clips.face import FaceNet
from clips.frames import Bucket, parse_buckets
from ltx.checkpoint import read_metadata, shapes_from
from ltx.lora import add_lora
from ltx.offload import cast_linears
from ltx.plan import (
    ALIVE,
    BUNDLED,
    CARDS,
    GB,
    PASS,
    REAL,
    RESERVE,
    LiveBytes,
    compute,
    duration,
    short,
    table,
    walk_vae,
)
from ltx.text import DEFAULT_TEXT_LENGTH
from ltx.vae import VideoVAE
from model import Block, TransformerConfig, VideoTransformer
from training.frozen import ENDS

OPTIONS = ("no flag", "--quantization fp8-cast", "--offload cpu", "--offload disk",
           "--offload cpu --quantization fp8-cast")
RECOGNISER = (3, 13, 30, 3)  # blocks of an iresnet100, the largest that is published
SHOWN = 4                    # clips that are sampled at once for the contact sheet
# Evaluated as they stand; tests hold the sums to measurements.
BYTES = {"adapters, AdamW": "12*A",
         "inputs of all blocks": "K*n*D*b",
         "a block's backward": "31*n*D*b + 6*N*D*b"}


@dataclass(frozen=True)
class TrainingPlan:
    """FLOPs of a step, the letters, and bytes: by option and what takes them."""

    sizes: dict[str, int]
    flops: int
    needs: dict[str, dict[str, int]]
    validation: dict[str, int]    # by option: the most that a look at the model takes
    copied: dict[str, int]        # by option: bytes that a step brings to the card
    encoding: int                 # bytes: the VAE and a clip, before the training


def count(module: nn.Module) -> int:
    """Bytes of a module's tensors as they are."""
    return sum(t.numel() * t.itemsize for t in module.state_dict().values())


def block_bytes(config: TransformerConfig, dtype: torch.dtype) -> tuple[int, int, int]:
    """Of one block: as loaded, in one byte a number; and the numbers of a LoRA of rank 1."""
    with torch.device("meta"):
        block = Block(config).to(dtype)
        plain = count(block)
        one_byte = count(cast_linears(block, by_row=True))
        return plain, one_byte, sum(p.numel() for p in add_lora(block, rank=1, alpha=1))


def walk_identity(vae: VideoVAE, bucket: Bucket) -> tuple[int, int]:
    """FLOPs and most bytes alive of decoding a face of half the picture's height, and back."""
    frames = (bucket.frames - 1) // vae.time_scale + 1
    cells = frames, bucket.height // vae.space_scale, bucket.width // vae.space_scale
    side, dtype = min(bucket.height // 2, bucket.width), next(vae.parameters()).dtype
    left, top = (bucket.width - side) // 2, (bucket.height - side) // 2
    latent = torch.empty(1, vae.latent_channels, *cells, dtype=dtype, device="meta")
    what = bucket.frames // 2, (left, top, left + side, top + side)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode_frame(latent, *what)
    with LiveBytes() as live:
        vae.decode_frame(latent.requires_grad_(), *what, recompute=True).sum().backward()
    # forward, forward again, and backward, where the frozen weights want no gradient
    return 3 * counter.get_total_flops(), live.peak + live.workspace


def walk_clip(vae: VideoVAE, bucket: Bucket) -> int:
    """Bytes of the VAE and of what is alive at most while it encodes one clip; the allowance."""
    video = torch.empty(1, 3, bucket.frames, *bucket[:2], device="meta")
    with torch.no_grad(), LiveBytes() as live:
        vae.encode(video)
    return count(vae) + live.peak + live.workspace + RESERVE


def step_flops(sizes: dict[str, int]) -> int:
    """Of the transformer: forward twice, then backward: as much again for linears, whose weights
    want no gradient, and two and a half times as much for attention, which multiplies five matrices
    there instead of two."""
    parts = compute(PASS, sizes)
    scores = sum(flops for name, flops in parts.items() if "scores" in name)
    return 3 * (sum(parts.values()) - scores) + round(4.5 * scores)


def training_plan(config: dict, bucket: Bucket, args: argparse.Namespace,
                  dtype: torch.dtype = torch.bfloat16) -> TrainingPlan:
    """All figures of one step. args: train.py's rank and w_id; config: a checkpoint's.

    Raises KeyError for a config without transformer or VAE, ValueError for one that is not LTX-2.3.
    """
    c = TransformerConfig.from_checkpoint(config["transformer"])
    with torch.device("meta"):
        vae, model = VideoVAE(config["vae"]).to(dtype).requires_grad_(False), VideoTransformer(c)
        net = FaceNet(RECOGNISER)
    plain, one_byte, per_rank = block_bytes(c, dtype)
    grid = (bucket.frames - 1) // vae.time_scale + 1, *(side // vae.space_scale
                                                        for side in bucket[:2])
    R, n = grid[1] * grid[2], (grid[0] + 1) * grid[1] * grid[2]
    sizes = {"K": c.num_layers, "D": c.dim, "h": c.heads, "C": c.in_channels, "b": dtype.itemsize,
             "L": n - R, "R": R, "n": n, "U": 2, "r": args.rank,
             "N": config["transformer"].get("text_max_length", DEFAULT_TEXT_LENGTH),
             "A": c.num_layers * args.rank * per_rank}  # fmt: skip
    terms, face_flops = compute(BYTES, sizes), 0
    backward = terms.pop("a block's backward")
    if args.w_id > 0:
        face_flops, alive = walk_identity(vae, bucket)
        backward, terms["recogniser"] = max(backward, alive), count(net)
    rest = count(model.to(dtype)) - c.num_layers * plain
    flops, alive = walk_vae(vae, grid, dtype)
    denoise = compute({"": ALIVE["denoise"]}, sizes)[""]
    look = 4 * sizes["A"] + max(SHOWN * denoise, alive["decode, tiled"])
    needs, validation, copied = {}, {}, {}
    ends = min(2 * ENDS, c.num_layers)
    for option in OPTIONS:
        blocks = c.num_layers * plain
        if "fp8" in option:
            blocks = ends * plain + (c.num_layers - ends) * one_byte
        copied[option] = 2 * blocks if "--offload" in option else 0
        if "--offload" in option:  # two places; from a disk a third block is on its way
            blocks = (3 if "disk" in option else 2) * plain
        need = {"blocks": blocks, "rest": rest, "VAE": count(vae), **terms}
        needs[option] = need = need | {"largest backward": backward, "reserve": RESERVE}
        validation[option] = sum(need.values()) - backward - need["inputs of all blocks"] + look
    vae_flops = flops["encode"] // 2 + face_flops
    return TrainingPlan(sizes, step_flops(sizes) + vae_flops, needs, validation, copied,
                        walk_clip(vae.float(), bucket))


def show(args: argparse.Namespace) -> None:
    """The plan as text. args: train.py's; its default checkpoint, the bundled one, means LTX-2.3.

    Raises ValueError when a file is no LTX-2.3 checkpoint, and for buckets that do not fit it.
    """
    config, name = REAL, "LTX-2.3 22B"
    if args.checkpoint != BUNDLED.with_name("base.safetensors"):
        config, name = read_metadata(args.checkpoint)["config"], str(args.checkpoint)
    with shapes_from(args.checkpoint):
        scales = VideoVAE(config["vae"])
    print(f"{name}, a LoRA of rank {args.rank}, batch 1, identity loss "
          f"{'on' if args.w_id > 0 else 'off'}\n")
    table(["alive in a step", "formula"], [[term, f"`{text}`"] for term, text in BYTES.items()])
    for bucket in parse_buckets(args.buckets, scales.time_scale, scales.space_scale):
        with shapes_from(args.checkpoint):
            p = training_plan(config, bucket, args)
        print(f"{bucket}: " + " ".join(f"{letter}={n}" for letter, n in p.sizes.items()))
        print(f"a step {short(p.flops, 'FLOP')}; {args.steps} steps "
              f"{duration(args.steps * p.flops, args.tflops)}\n")
        table(["train.py", *p.needs["no flag"], "sum", "a look", "copied in a step",
               *(f"{card} GB" for card in CARDS)], [row(p, option) for option in OPTIONS])
        print(f"before it each clip is encoded once, in float32: {short(p.encoding, 'B')}\n")
    print("Notice: the weights decide. What is kept for the backward pass grows with the clip; a "
          "face that fills the picture takes twice the decoder's part. The text model comes first, "
          "and is gone then: python sample.py --plan.")


def row(p: TrainingPlan, option: str) -> list[str]:
    """One line of the table: every term, the sum, a look at the model, and which cards hold it."""
    need = p.needs[option]
    total = sum(need.values())
    most = max(total, p.validation[option])
    told = (*need.values(), total, p.validation[option], p.copied[option])
    return [option, *(short(n, "B") for n in told),
            *("yes" if most <= card * GB else "no" for card in CARDS)]
