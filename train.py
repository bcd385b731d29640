"""The paper: fine-tune a text-to-video model so that a reference picture decides who appears in the video.

ST-DRC, arXiv 2606.02441. One step, top to bottom:

    reference picture -> augment.py (colour, pose, layout) -> frozen VAE -> clean tokens       paper: no extra adapter
    clip latent       -> noise at sigma                                                        paper: noise on video only
    [video tokens | reference tokens], positions from rope.py (TASS)  -> model.py -> velocity of the video tokens
    losses.py: flow matching + face-weighted + identity on the decoded clean estimate

The failure this prevents: a model whose references are always there, unaltered and of the same moment learns to paste
them. So they are augmented, drawn from other moments, and now and then left out.

paper: Gemma and the VAE stay frozen, the video DiT is trained. LTX-2.3: the law of sigma, rank, clipping, precision.
our reading: every other number; most are explained at their line.

    python train.py --manifest clips/manifest.jsonl --checkpoint-path ltx-2.3-22b-dev.safetensors --gemma-root gemma ...
    torchrun --nproc_per_node=8 train.py ...          the same on eight cards: same batch, same losses, an eighth each

Without --manifest it trains on the procedural world. The default is a LoRA, rank 32, as LTX-2.3's published in-context
LoRA recipe; --full trains every weight of the transformer. The same command resumes a stopped run.

Conventions. sigma 1 = noise, 0 = data. Shapes: B batch, L video tokens, R reference tokens, S = L + R, C latent channels,
F frames. A weight of 0 switches a loss off.

Read next: checkpoint.py
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from augment import AugmentStrength, augment_reference
from clips.cache import load_vae
from clips.dataset import Batch, ClipSource, Order, PerClip, add_data_arguments, check_batch, shard_indices
from clips.face import FaceNet, faces_of, load_facenet, usable_landmarks
from common.cli import Parser, check_folder, check_ranges, command
from common.seeds import seeded
from losses import IDENTITY_MAX_SIGMA, clean_estimate, face_weighted_loss, flow_matching_loss, identity_loss, total_loss
from ltx.checkpoint import check_weights, read_metadata, save_changed, shapes_from
from ltx.lora import add_lora, save_lora
from ltx.offload import load_by_block
from ltx.text import check_text
from ltx.vae import VideoVAE
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer, training_sigmas
from reference import append_reference, drop_reference, encode_reference, unpatchify
from rope import PLACEMENTS, grid_to_positions, reference_grid, source_phase, video_grid
from toy.clips import open_data
from training.optim import EMA, KEEP_FROM_MUON, MuonAdamW, schedule, split_parameters
from training.run import Run, check_finite
from training.validate import draw_curves, sample_clips, validate
from training.workers import (
    all_reduce,
    average_gradients,
    can_shard,
    device_name,
    full_tensor,
    settle_thread,
    shard,
    start_workers,
)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Every default in one place, each with its source."""
    p = Parser("train.py", description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--checkpoint-path", dest="checkpoint", type=Path, default=Path("runs/base.safetensors"), help="the base model")
    add("--gemma-root", type=Path, default=Path("runs/gemma"), help="folder of the text encoder")
    add("--face", type=Path, default=Path("runs/face.safetensors"), help="recogniser of the identity loss (face.py)")
    add("--out", type=Path, default=Path("runs/st-drc"), help="states, log, pictures, result")
    add_data_arguments(p)  # --manifest, --validation, --buckets ...: what is read
    # What is trained. LTX-2.3: rank and alpha of its in-context LoRA example, float32 over a bf16 base.
    add("--full", action="store_true", help="train all weights instead of a LoRA")
    add("--rank", type=int, default=32, help="of the LoRA; alpha = rank")
    add("--placement", choices=list(PLACEMENTS), default="tass", help="where reference tokens sit (rope.py)")
    # How long, how much. LTX-2.3's trainer: 3000 steps, batch 1 or 2, linear decay to a tenth, clipping at 1.
    add("--steps", type=int, default=3000)
    add("--batch", type=int, default=1, help="clips at a time in each process")
    add("--accumulate", type=int, default=1, help="batches of each process in one step")
    # LTX-2.3: 2e-4 for its in-context LoRA. our reading: 1e-5 with --full; Muon 3e-3 for matrices, 1e-3 for the rest
    add("--lr", type=float, help="default 2e-4; with --full 1e-5, with Muon 1e-3 and three times that")
    add("--optimizer", choices=["adamw", "muon"], default="adamw", help="LTX-2.3: AdamW. Muon (optim.py) needs --full")
    add("--warmup", type=int, default=100, help="steps; our reading, Adam's first averages are noise")
    add("--decay", type=float, default=1.0, help="share of the run over which the rate falls")
    add("--final-lr", type=float, default=0.1, help="the rate at the end, as a factor")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="of the computation (LTX-2.3: bf16 mixed)")
    add("--gradient-checkpointing", action=switch, default=True, help="recompute blocks: slower, far less memory (LTX-2.3)")
    # our reading: InstructPix2Pix drops 5 % each; text-first guidance needs the reference-free stream most
    add("--drop-ref", type=float, default=0.10, help="share of samples without reference")
    add("--drop-both", type=float, default=0.05, help="share without reference and without text")
    add("--drop-text", type=float, default=0.05, help="share without text")
    # our reading: 1 = the ranges in augment.py's header. The bundled run took 0.3, 0.5, 0.25: the world's people are told
    # apart by skin and hair colour, and their references already come from another moment.
    add("--augment-color", type=float, default=1.0)
    add("--augment-pose", type=float, default=1.0)
    add("--augment-layout", type=float, default=1.0)
    add("--w-face", type=float, default=1.0, help="weight of the face-weighted loss (ConsisID's on average); 0 = off")
    add("--w-id", type=float, default=0.1, help="weight of the identity loss (our reading, after PuLID); 0 = off")
    add("--id-reach", type=int, default=2, help="latent frames decoded on either side of the one that is judged (vae.py)")
    add("--average", type=float, default=0.998, help="decay of the weight average that is written; 0 = the last weights")
    # How it is run.
    add("--seed", type=int, default=0)
    add("--parallel", choices=["fsdp", "ddp"], default="fsdp", help="several processes: shards or copies (workers.py)")
    add("--minutes", type=float, default=1e9, help="stop and save after this time; run again to go on")
    add("--save-seconds", type=float, default=120, help="time between saved states")
    add("--keep", type=int, default=2, help="how many states are kept, the newest; two, so that a damaged one is no loss")
    add("--validate-every", type=int, default=500, help="steps between validations: loss, contact sheet, curves.png")
    add("--compile", action=switch, default=False, help="torch.compile: minutes at first, then faster")
    return p.parse_args(words)


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for a number that cannot be meant."""
    ranges = dict.fromkeys(("steps", "validate_every", "keep"), (1, 1e9))
    ranges |= dict.fromkeys(("batch", "accumulate", "rank"), (1, 4096))
    ranges |= dict.fromkeys(("drop_ref", "drop_both", "drop_text", "decay", "final_lr", "average"), (0, 1))
    ranges |= dict.fromkeys(("augment_color", "augment_pose", "augment_layout"), (0, 10))
    ranges |= dict.fromkeys(("w_face", "w_id", "id_reach", "warmup", "minutes", "save_seconds", "seed"), (0, 2**63 - 1))
    ranges |= dict.fromkeys(("frame_rate", "clip", "lr"), (1e-12, 1e6))
    check_ranges(args, ranges)
    if args.optimizer == "muon" and not args.full:
        raise ValueError("expected --full with --optimizer muon, got a LoRA; Muon is for whole matrices, leave it out")


def check_files(args: argparse.Namespace, config: dict) -> None:
    """Raise ValueError for what would otherwise be found out after an hour of encoding clips."""
    check_folder(args.out)
    check_weights(shapes(args, config), args.checkpoint, TRANSFORMER_PREFIX)
    check_text(args.checkpoint, args.gemma_root)


# ------------------------------------------------------------ the model and its optimiser


def shapes(args: argparse.Namespace, config: dict) -> VideoTransformer:
    """The transformer without its numbers."""
    with shapes_from(args.checkpoint):
        return VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"]))


def load_transformer(args: argparse.Namespace, config: dict, device: str, sharded: bool) -> VideoTransformer:
    """Block by block: read, add the LoRA, shard. No process ever holds more than its share and one block."""
    model = shapes(args, config)
    # LTX-2.3: what is trained is kept in float32, what is frozen in the type of the computation.
    dtype = torch.bfloat16 if args.precision == "bf16" and not args.full else torch.float32

    def finish(block: nn.Module) -> None:
        if not args.full:
            add_lora(block, rank=args.rank, alpha=args.rank)
        if sharded:
            shard(block, device)

    model.requires_grad_(args.full)
    load_by_block(model, "transformer_blocks", args.checkpoint, TRANSFORMER_PREFIX, dtype, device, finish)
    return shard(model, device) if sharded else model


def make_optimizer(args: argparse.Namespace, named: dict[str, nn.Parameter]) -> MuonAdamW:
    """AdamW with PyTorch's (and LTX-2.3's) own numbers; Muon for the matrices inside the blocks where asked for."""
    if args.optimizer == "muon":
        lr = 1e-3 if args.lr is None else args.lr
        return MuonAdamW(*split_parameters(named, KEEP_FROM_MUON), lr_matrix=3 * lr, lr_other=lr)
    lr = args.lr if args.lr is not None else 1e-5 if args.full else 2e-4
    return MuonAdamW({}, named, lr_other=lr, betas=(0.9, 0.999), weight_decay=0.01)


# ------------------------------------------------------------ what is random in a step


@dataclass
class Draws(PerClip):
    """Everything random about B clips, drawn clip by clip: it does not depend on who computes which of them."""

    keep_ref: Tensor      # (B,) bool; guidance needs all the streams it combines
    keep_text: Tensor     # (B,) bool
    sigma: Tensor         # (B,) noise level
    noise: Tensor         # (B, L, C)
    reference: Tensor     # (B, 3, h, w) augmented
    frame: Tensor         # (B,) which frame the identity loss looks at, -1 = none


def draw(args: argparse.Namespace, batch: Batch, generators: list[Generator]) -> Draws:
    """paper: noise on the video only, the reference augmented. LTX-2.3: the law of sigma."""
    L, C = batch.x0.shape[1:]
    u = torch.stack([torch.rand(4, generator=g) for g in generators])                     # (B, 4)
    normal = torch.stack([torch.randn((), generator=g) for g in generators])              # (B,)
    no_ref = u[:, 0] < args.drop_both + args.drop_ref
    no_text = (u[:, 0] < args.drop_both) | (u[:, 0] > 1 - args.drop_text)
    sigma = training_sigmas(L, normal, u[:, 1], u[:, 2])
    noise = torch.stack([torch.randn(L, C, generator=g) for g in generators])
    strength = AugmentStrength(color=args.augment_color, pose=args.augment_pose, layout=args.augment_layout)
    pictures = [augment_reference(p[None], g, strength) for p, g in zip(batch.reference, generators, strict=True)]
    # our reading: identity is judged on one frame, where noise is low, and only with the reference to follow.
    judged = (sigma <= IDENTITY_MAX_SIGMA) & ~no_ref & batch.reference_seen & batch.seen.any(dim=1)
    frame = torch.full((len(batch),), -1)
    for i in judged.nonzero()[:, 0].tolist() if args.w_id > 0 else ():
        frames = batch.seen[i].nonzero()[:, 0]                                            # those with a known face
        frame[i] = frames[int(u[i, 3] * len(frames))]
    return Draws(~no_ref, ~no_text, sigma, noise, torch.cat(pictures), frame)


# ------------------------------------------------------------ the losses of a batch


def velocity(model: VideoTransformer, noisy: Tensor, sigma: Tensor, ref_tokens: Tensor, keep_ref: Tensor,
             positions: Tensor, ref_positions: Tensor, context: Tensor, phase: Tensor | None, recompute: bool) -> Tensor:
    """Velocity of the video tokens, (B, L, C) float32.

    A dropped reference is hidden from every query rather than left out: the same numbers, and one shape for the batch.
    """
    B, L, _ = noisy.shape
    timesteps = sigma[:, None].expand(B, L)                                               # (B, L)
    tokens, timesteps, where = append_reference(noisy, timesteps, positions.expand(B, -1, -1, -1), ref_tokens,
                                                ref_positions)
    visible = torch.cat([torch.ones_like(noisy[:, :, 0]), keep_ref[:, None].expand(B, ref_tokens.shape[1])], dim=1)
    out = model(tokens, timesteps, sigma, where, context, attention_mask=visible[:, None], checkpoint_blocks=recompute,
                phase=phase)                                                              # (B, S, C)
    return drop_reference(out, L).float()


def losses(args: argparse.Namespace, forward: Callable[..., Tensor], model: VideoTransformer, vae: VideoVAE,
           net: FaceNet | None, null_context: Tensor, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching, face-weighted and identity loss, each a mean over the clips of the batch that it applies to."""
    device, grid = batch.x0.device, batch.grid
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    scales = batch.frame_rate, vae.time_scale, vae.space_scale
    positions = grid_to_positions(video_grid(*grid), *scales)[None].to(device)            # (1, 3, L, 2)
    ref_positions = grid_to_positions(reference_grid(*grid, args.placement), *scales).to(device)
    phase = source_phase(args.placement, positions.shape[2], ref_positions.shape[1])      # None, except to study it
    s = draws.sigma[:, None, None]
    noisy = (1 - s) * batch.x0 + s * draws.noise                                          # (B, L, C)
    context = torch.where(draws.keep_text[:, None, None], batch.context, null_context)    # (B, N, D)
    with autocast:
        ref_tokens = encode_reference(vae.encode, draws.reference).float()                # (B, R, C)
        v = forward(model, noisy, draws.sigma, ref_tokens, draws.keep_ref.float(), positions, ref_positions, context,
                    phase, args.gradient_checkpointing)
    fm = flow_matching_loss(v, draws.noise - batch.x0)
    face = face_weighted_loss(v, draws.noise - batch.x0, batch.face) if args.w_face > 0 else fm.new_zeros(())
    judged = (draws.frame >= 0).nonzero()[:, 0]
    if len(judged) == 0:
        return fm, face, fm.new_zeros(())
    with autocast:
        x0_hat = clean_estimate(noisy, v, draws.sigma)[judged]
        return fm, face, identity_term(args, vae, net, x0_hat, batch, draws, judged)


def identity_term(args: argparse.Namespace, vae: VideoVAE, net: FaceNet, x0_hat: Tensor, batch: Batch, draws: Draws,
                  judged: Tensor) -> Tensor:
    """our reading: 1 - cosine between the reference's face and the face in one frame of the decoded clean estimate.

    x0_hat (b, L, C) of the judged clips (b,). The un-augmented reference says who it is. Only the frames around the one
    that is judged are decoded, with gradients through the frozen decoder.
    """
    frames = []
    for x, t in zip(unpatchify(x0_hat, *batch.grid), draws.frame[judged].tolist(), strict=True):
        decode = (x[None], t, args.id_reach)
        frames.append(checkpoint(vae.decode_frame, *decode, use_reentrant=False) if args.gradient_checkpointing
                      else vae.decode_frame(*decode))                                     # (1, 3, h, w)
    t = draws.frame[judged]
    marks, ref_marks = batch.landmarks[judged, t], batch.reference_landmarks[judged]      # (b, 5, 2) each
    both = (usable_landmarks(marks) & usable_landmarks(ref_marks))[:, None, None]         # cut both faces in one way
    crops = faces_of(torch.cat(frames).float(), batch.boxes[judged, t], marks.where(both, torch.nan), net.size)
    with torch.no_grad():
        person = net(faces_of(batch.reference[judged], batch.reference_box[judged], ref_marks.where(both, torch.nan),
                              net.size))                                                  # (b, E)
    return identity_loss(net, crops, person, torch.ones(len(judged), dtype=torch.bool, device=crops.device))


def applies(batch: Batch, draws: Draws) -> Tensor:
    """How many clips each loss is a mean over, (3,): all, those with a face, those judged by the recogniser."""
    return torch.tensor([len(batch), (batch.face.sum(dim=1) > 0).sum(), (draws.frame >= 0).sum()], dtype=torch.float32)


# ------------------------------------------------------------ the run


def save_result(args: argparse.Namespace, run: Run, model: VideoTransformer) -> Path:
    """Averaged weights -> a LoRA file, or a whole checkpoint that sample.py loads as it is. All processes take part."""
    metadata = {"reference_placement": args.placement, "training_steps": str(run.done)}
    with run.ema_weights():
        if not args.full:
            save_lora(args.out / "lora.safetensors", model, metadata, torch.bfloat16, full_tensor, write=run.rank == 0)
            return args.out / "lora.safetensors"
        trained = {TRANSFORMER_PREFIX + k: full_tensor(p.detach()).cpu().bfloat16() for k, p in model.named_parameters()}
    if run.rank == 0:
        save_changed(args.out / "model.safetensors", args.checkpoint, trained, metadata)
    return args.out / "model.safetensors"


def begin(args: argparse.Namespace, model: VideoTransformer, data: ClipSource, world_size: int) -> Run:
    """The run in --out, from its newest state when there is one. What decides the result must be as it was."""
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    free = ("steps", "minutes", "compile", "out", "save_seconds", "keep", "batch", "accumulate", "parallel", "cache",
            "validate_every", "gradient_checkpointing", "validation", "manifest")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in free}
    settings["clips_per_step"] = args.batch * args.accumulate * world_size  # shared out as one likes
    settings["clips"] = data.fingerprint()
    return Run(args.out, named, make_optimizer(args, named), EMA(named, args.average), settings, args.keep)


def descend(args: argparse.Namespace, batch: Batch, draws: Draws, compute: Callable, device: str,
            world_size: int) -> tuple[list[float], Tensor]:
    """Gradients of one step, --batch clips at a time. Returns the three losses as means over everybody that has them,
    and how many that are, (3,)."""
    counts, terms = all_reduce(applies(batch, draws)), torch.zeros(3)
    for a in range(0, len(batch), args.batch):
        part, drawn = batch.part(a, a + args.batch), draws.part(a, a + args.batch)
        weights = applies(part, drawn) / counts.clamp(min=1)  # this part's share in the mean over everybody
        found = torch.stack(compute(part.to(device), drawn.to(device)))                   # (3,)
        # times world_size: the processes' gradients will be averaged, and these are parts of one sum
        fm, face, identity = found * weights.to(device) * world_size
        total_loss(fm, face, identity, args.w_face, args.w_id).backward()
        terms += found.detach().cpu() * weights
    return all_reduce(terms).tolist(), counts


def held_out_losses(args: argparse.Namespace, compute: Callable, device: str) -> Callable:
    """(batch, generators) -> flow-matching and face losses (2,) with nothing dropped or augmented, and their counts."""
    plain = argparse.Namespace(**vars(args) | dict.fromkeys(
        ("drop_ref", "drop_both", "drop_text", "augment_color", "augment_pose", "augment_layout", "w_id"), 0.0))

    def look(batch: Batch, generators: list[Generator]) -> tuple[Tensor, Tensor]:
        draws = draw(plain, batch, generators)
        return torch.stack(compute(batch.to(device), draws.to(device))[:2]).cpu(), applies(batch, draws)[:2]
    return look


def train(args: argparse.Namespace) -> None:
    """The whole run: check, load, step by step to the end, save."""
    check_numbers(args)
    rank, world_size = start_workers()
    device = device_name()
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    config = read_metadata(args.checkpoint)["config"]
    check_files(args, config)
    vae = load_vae(args.checkpoint, device)
    net = load_facenet(args.face, device) if args.w_id > 0 else None
    data, shown, held_out = open_data(args, vae, device, rank, world_size)
    sharded = args.parallel == "fsdp" and can_shard()
    model = load_transformer(args, config, device, sharded)
    run = begin(args, model, data, world_size)
    order = Order(data.groups, args.batch * args.accumulate * world_size, args.seed)
    forward = torch.compile(velocity) if args.compile and not sharded else velocity  # gathering breaks a graph into pieces
    compute = partial(losses, args, forward, model, vae, net, data.null_context.to(device))

    def read(step: int) -> tuple[list[int], Batch, Draws]:
        everyone = order(step)
        mine = shard_indices(everyone, rank, world_size, args.batch)
        generators = [seeded(args.seed, step, place) for place, _ in mine]
        batch = data.batch([i for _, i in mine], generators)
        check_batch(step, batch, data)
        return everyone, batch, draw(args, batch, generators)

    ahead = ThreadPoolExecutor(1, initializer=settle_thread, initargs=(torch.get_num_threads(),))
    ready = ahead.submit(read, run.done)  # the next step's clips are read while this one computes
    for step in run.steps(args.steps, args.minutes, args.batch * args.accumulate, "st-drc", args.save_seconds):
        everyone, batch, draws = ready.result()
        ready = ahead.submit(read, step + 1)
        (fm, face, identity), counts = descend(args, batch, draws, compute, device, world_size)
        average_gradients(run.optimizer.parameters(), world_size)
        norm = full_tensor(nn.utils.clip_grad_norm_(run.optimizer.parameters(), args.clip)).item()
        check_finite(step, {"flow matching": fm, "the face-weighted loss": face, "the identity loss": identity,
                            "the gradient": norm}, data.names(everyone))
        factor = schedule(step, args.steps, args.warmup, args.decay, args.final_lr)
        run.optimizer.step(factor)
        model.zero_grad(set_to_none=True)
        run.ema.update(run.model, step)
        shares = (counts[1:] / counts[0]).tolist()  # where a face is missing, its losses are left out, and here it shows
        run.record(loss=fm + args.w_face * face + args.w_id * identity, fm=fm, face=face, id=identity,
                   lr=factor * run.optimizer.lr_other, gradient=norm, with_face=shares[0], with_id=shares[1])
        if (step + 1) % args.validate_every == 0 or step + 1 == args.steps:
            run.report(step + 1, args.batch * args.accumulate)
            validate(run, shown, args.batch, held_out, held_out_losses(args, compute, device),
                     lambda clips: sample_clips(shown, clips, config, model, vae, args.placement, args.precision))
        elif (step + 1) % 100 == 0:
            draw_curves(run)
    ahead.shutdown(cancel_futures=True)
    path = save_result(args, run, model)
    if rank == 0:
        print(f"wrote {path} after {run.done} steps, {run.seconds / 60:.0f} min")


def main(words: list[str] | None = None) -> int:
    return command("train.py", lambda: train(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
