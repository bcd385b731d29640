"""Training: the paper's recipe, by which a reference picture decides who appears in the video.

ST-DRC, arXiv 2606.02441. One step, top to bottom:

    reference -> augment.py (colour, pose, layout) -> frozen VAE -> clean tokens, no extra adapter
    clip latent -> losses.py: noise at sigma, on the video only
    both -> reference.py: one sequence, positions from rope.py (TASS) -> model.py -> velocity
    losses.py: flow matching + face-weighted + identity on the decoded clean estimate

The failure this prevents: a model whose references are always there, unaltered and of the same
moment, learns to paste them. So they are augmented, drawn from other moments, and now and then
left out.

    python train.py --steps 50           a taste: the bundled base, on the procedural world
    python train.py --manifest clips/manifest.jsonl --checkpoint-path ltx-2.3-22b-dev.safetensors
    torchrun --nproc_per_node=8 train.py ...    eight cards: same batch, same losses, an eighth each

paper:       Gemma and the VAE stay frozen, the video DiT is trained.
LTX-2.3:     the law of sigma; LoRA rank, clipping and precision of its in-context LoRA example.
our reading: every other number; most are explained at their line.

With --manifest the default is a LoRA; --full trains every weight of the transformer. The same
command resumes a stopped run. Conventions. sigma 1 = noise, 0 = data; a weight of 0 switches a
loss off.

Read next: common/files.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from augment import AugmentStrength, augment_reference
from clips.cache import identity
from clips.dataset import Batch, Order, PerClip, add_data_arguments, check_batch, shard_indices
from clips.face import FaceNet, area_of, faces_of, load_facenet, usable_landmarks
from common.cli import (
    DEVICES,
    DefaultsFormatter,
    Parser,
    check_folder,
    check_ranges,
    command,
    find_device,
)
from common.seeds import Generators, drawn, seeded
from losses import (
    IDENTITY_MAX_SIGMA,
    add_noise,
    clean_estimate,
    face_weighted_loss,
    flow_matching_loss,
    identity_loss,
    total_loss,
)
from ltx.checkpoint import check_weights, read_metadata, save_changed
from ltx.load import empty_transformer
from ltx.lora import save_lora
from ltx.offload import OFFLOADS
from ltx.text import check_text
from ltx.vae import VideoVAE
from model import TRANSFORMER_PREFIX, VideoTransformer, training_sigmas
from reference import Reference, encode_reference, predict_velocity, unpatchify
from rope import PLACEMENTS, Layout
from toy.clips import open_data
from training import plan
from training.frozen import check_memory_options, frozen_type, load_base, mixed_precision
from training.optim import EMA, KEEP_FROM_MUON, MuonAdamW, schedule, split_parameters
from training.run import Run, begun_with, check_finite
from training.validate import draw_curves, sample_clips, validate
from training.workers import (
    all_reduce,
    average_gradients,
    can_shard,
    choose_precision,
    full_tensor,
    gather,
    settle_thread,
    start_workers,
)

TINY = Path(__file__).resolve().parent / "weights" / "tiny"
WARMUP = 100     # our reading: steps; Adam's first averages are noise
CLIP = 1.0       # LTX-2.3: largest norm of the gradient
EMA_DECAY = 0.998  # our reading: of the weights that are written; noise levels make steps noisy
KEEP = 2         # states; two, so that a damaged one is no loss


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Every default in one place, each with its source."""
    p = Parser("train.py", description=__doc__.split("\n")[0],
               formatter_class=DefaultsFormatter)
    add, switch = p.add_argument, argparse.BooleanOptionalAction
    add("--checkpoint-path", dest="checkpoint", type=Path, default=TINY / "base.safetensors",
        help="the base model")
    add("--gemma-root", type=Path, default=TINY / "gemma", help="folder of the text encoder")
    add("--face", type=Path, default=TINY / "face.safetensors",
        help="recogniser of the identity loss (clips/face.py)")
    add("--out", type=Path, default=Path("runs/st-drc"), help="states, log, pictures, result")
    add_data_arguments(p)  # --manifest, --validation, --buckets ...: what is read
    # What is trained. LTX-2.3: rank and alpha of its in-context LoRA, float32 over a bf16 base.
    add("--full", action=switch, help="train all weights instead of a LoRA")
    add("--rank", type=int, default=32, help="of the LoRA; alpha = rank")
    add("--placement", choices=list(PLACEMENTS), default="tass", help="where reference tokens sit")
    # How long, how much. LTX-2.3's trainer: 3000 steps, batch 1 or 2, decay to a tenth.
    add("--steps", type=int, default=3000)
    add("--batch", type=int, help="clips at a time in each process; default 1, on the world 16")
    add("--accumulate", type=int, default=1, help="batches of each process in one step")
    # LTX-2.3: 2e-4 for its in-context LoRA. our reading: the others
    add("--lr", type=float, help="default 2e-4; with --full 1e-5, with Muon 1e-3, 3e-3 on matrices")
    add("--final-lr", type=float, help="factor at the end; default 0.1 (LTX-2.3), with Muon 0")
    add("--optimizer", choices=["adamw", "muon"],
        help="LTX-2.3: AdamW. Muon (training/optim.py) needs --full, and is usual with it on the "
             "world")
    add("--precision", choices=["bf16", "fp32"],
        help="LTX-2.3: bf16 mixed; on a CPU by default what is faster there")
    add("--gradient-checkpointing", action=switch,
        help="recompute blocks: slower, far less memory; on, as in LTX-2.3, except on the world")
    # our reading: for cards that the base does not fit
    add("--quantization", choices=["none", "fp8-cast"], default="none",
        help="the frozen base in one byte a number, with a scale for each row")
    add("--offload", choices=OFFLOADS, default="none",
        help="where the frozen blocks wait for their turn; slower, same result")
    # our reading: InstructPix2Pix drops 5 % each; text_first guidance needs v_0 and v_T most
    add("--drop-ref", type=float, default=0.10, help="share of samples without reference")
    add("--drop-both", type=float, default=0.05, help="share without reference and without text")
    add("--drop-text", type=float, default=0.05, help="share without text")
    # our reading: 1 = the ranges in augment.py. The bundled run took 0.3, 0.5, 0.25: the world's
    # people are told apart by skin and hair colour, and references come from another moment.
    add("--augment-color", type=float, default=1.0)
    add("--augment-pose", type=float, default=1.0)
    add("--augment-layout", type=float, default=1.0)
    add("--w-face", type=float, default=1.0, help="weight of the face-weighted loss, 0 = off")
    add("--w-id", type=float, default=0.1, help="weight of the identity loss, 0 = off")
    add("--id-sigma", type=float, default=IDENTITY_MAX_SIGMA, help="noise level it counts up to")
    # A public trainer's remedy against copying; the paper has none.
    add("--noise-ref", type=float, default=0.0, help="on reference tokens, in deviations")
    # How it is run.
    add("--device", choices=DEVICES, default="auto", help="CUDA where it is, else cpu; or mps")
    add("--seed", type=int, default=0)
    add("--parallel", choices=["fsdp", "ddp"], default="fsdp",
        help="several processes: shards or copies (training/workers.py)")
    add("--minutes", type=float, default=1e9, help="stop and save then; run again to go on")
    add("--save-seconds", type=float, default=120, help="time between saved states")
    add("--validate-every", type=int, default=500, help="steps: loss, contact sheet, curves.png")
    add("--plan", action="store_true",
        help="print what a LoRA takes on a card, by option, and how long; loads nothing")
    add("--tflops", type=float, help="for --plan: what the card reaches (bf16)")
    add("--compile", action=switch, default=False, help="torch.compile: minutes, then faster")
    args = p.parse_args(words)
    # our reading: without a manifest, how the bundled weights were trained. The world is small, so
    # all weights learn at once, and fast enough that fifty steps show something.
    toy = args.manifest is None
    args.full = toy if args.full is None else args.full
    usual = {"batch": 16 if toy else 1, "optimizer": "muon" if toy and args.full else "adamw",
             "gradient_checkpointing": not toy or args.offload != "none"}  # which needs it
    vars(args).update({k: v for k, v in usual.items() if getattr(args, k) is None})
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for what would otherwise be found out after an hour of encoding clips."""
    ranges = dict.fromkeys(("steps", "validate_every"), (1, 1e9))
    ranges |= dict.fromkeys(("batch", "accumulate", "rank"), (1, 4096))
    ranges |= dict.fromkeys(("drop_ref", "drop_both", "drop_text", "final_lr"), (0, 1))
    ranges |= dict.fromkeys(("augment_color", "augment_pose", "augment_layout"), (0, 2))
    ranges |= {"id_sigma": (0, 1), "noise_ref": (0, 10), "same_setting": (0, 1)}
    ranges |= dict.fromkeys(("w_face", "w_id", "minutes", "save_seconds", "seed"), (0, 2**63 - 1))
    check_ranges(args, ranges | dict.fromkeys(("frame_rate", "lr"), (1e-12, 1e6)))
    if args.optimizer == "muon" and not args.full:
        raise ValueError("expected --full with --optimizer muon, got a LoRA; Muon is for whole "
                         "matrices, leave it out")
    check_memory_options(args)
    check_folder(args.out)
    check_weights(empty_transformer(args.checkpoint), args.checkpoint, TRANSFORMER_PREFIX)
    check_text(args.checkpoint, args.gemma_root)


# ------------------------------------------------------------ the model and its optimiser


def make_optimizer(args: argparse.Namespace, named: dict[str, nn.Parameter]) -> MuonAdamW:
    """AdamW with PyTorch's (and LTX-2.3's) numbers; Muon for matrices inside blocks if asked."""
    if args.optimizer == "muon":
        lr = 1e-3 if args.lr is None else args.lr
        parts = split_parameters(named, KEEP_FROM_MUON)
        return MuonAdamW(*parts, lr_matrix=3 * lr, lr_other=lr, precision=args.precision)
    lr = args.lr if args.lr is not None else 1e-5 if args.full else 2e-4
    return MuonAdamW({}, named, lr_other=lr, betas=(0.9, 0.999), weight_decay=0.01)


def rate(args: argparse.Namespace, step: int) -> float:
    """The learning rate's factor. LTX-2.3: falls linearly; our reading: with Muon in the end."""
    decay, final = (0.5, 0.0) if args.optimizer == "muon" else (1.0, 0.1)
    return schedule(step, args.steps, WARMUP, decay,
                    final if args.final_lr is None else args.final_lr)


# ------------------------------------------------------------ what is random in a step


@dataclass
class Draws(PerClip):
    """Everything random about B clips, drawn clip by clip: it does not depend on who computes
    which of them."""

    keep_ref: Tensor      # (B,) bool; guidance needs all the streams it combines
    keep_text: Tensor     # (B,) bool
    sigma: Tensor         # (B,) noise level
    noise: Tensor         # (B, L, C)
    reference: Tensor     # (B, 3, h, w) augmented
    noise_ref: Tensor     # (B, R, C) for its tokens; (B, 0, C) when they stay clean
    frame: Tensor         # (B,) which frame the identity loss looks at, -1 = none


def generators_of(args: argparse.Namespace, step: int, places: list[int], device: str
                  ) -> Generators:
    """One for each clip, whoever computes it. A card renders the world's clips all at once, with
    one generator for those of a process."""
    if device == "cuda" and args.manifest is None:
        # a call for each clip would keep the card waiting
        return seeded(args.seed, step, places[0], device=device)
    return [seeded(args.seed, step, place) for place in places]


def draw(args: argparse.Namespace, batch: Batch, generators: Generators) -> Draws:
    """paper: noise on the video only, the reference augmented. LTX-2.3: the law of sigma."""
    (B, L, C), R = batch.x0.shape, batch.grid[1] * batch.grid[2]
    strength = AugmentStrength(args.augment_color, args.augment_pose, args.augment_layout)

    def each(g: Generator, clips: slice) -> tuple[Tensor, ...]:
        pictures = batch.reference[clips]
        b, device = len(pictures), g.device
        u = torch.rand(b, 4, generator=g, device=device)
        normal = torch.randn(b, generator=g, device=device)
        noise = torch.randn(b, L, C, generator=g, device=device)
        pictures = augment_reference(pictures, g, strength)
        # last, so that without it everything else is drawn as ever
        wrong = torch.randn(b, R if args.noise_ref else 0, C, generator=g, device=device)
        return u, normal, noise, pictures, wrong
    # clip by clip, or all at once on a card
    u, normal, noise, pictures, wrong = drawn(generators, B, each)
    # One number u decides: the lowest shares drop both, then the reference; the highest the text.
    no_ref = u[:, 0] < args.drop_both + args.drop_ref                             # (B,) bool
    no_text = (u[:, 0] < args.drop_both) | (u[:, 0] > 1 - args.drop_text)
    sigma = training_sigmas(L, normal, u[:, 1], u[:, 2])                          # (B,)
    # our reading: identity is judged on one frame, where noise is low and a reference is there.
    seen = batch.seen.to(sigma.device)                                            # (B, F)
    judged = (sigma <= args.id_sigma) & ~no_ref & batch.reference_seen.to(sigma.device)
    count = seen.sum(dim=1)  # of frames with a known face; one of them is drawn
    nth = (u[:, 3] * count).long() + 1
    frame = ((seen.cumsum(dim=1) == nth[:, None]) & seen).int().argmax(dim=1)     # (B,)
    frame = torch.where(judged & (count > 0), frame, -1) if args.w_id > 0 else frame.fill_(-1)
    return Draws(~no_ref, ~no_text, sigma, noise, pictures, wrong, frame)


# ------------------------------------------------------------ the losses of a batch


class Frozen(NamedTuple):
    """What the losses use and nobody trains."""

    vae: VideoVAE
    net: FaceNet | None    # the recogniser
    null_context: Tensor   # (N, D)


def losses(args: argparse.Namespace, model: VideoTransformer, predict: Callable[..., Tensor],
           frozen: Frozen, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching, face-weighted and identity loss, each a mean over the clips it applies to.

    predict: reference.predict_velocity, compiled or not.
    """
    vae, device = frozen.vae, frozen.null_context.device
    # What decides about shapes is read before it is on the card, which would have to be waited for.
    drops = not draws.keep_ref.any(), not draws.keep_ref.all()  # all clips do; some clips do
    frame, judged = draws.frame, (draws.frame >= 0).nonzero()[:, 0]               # (B,), (b,)
    clips, draws = batch.to(device), draws.to(device)
    scales = batch.frame_rate, vae.time_scale, vae.space_scale
    layout = Layout(*batch.grid, *scales, args.placement)
    noisy, target = add_noise(clips.x0, draws.noise, draws.sigma)                 # (B, L, C) each
    keep = draws.keep_text[:, None, None]
    context = torch.where(keep, clips.context, frozen.null_context)               # (B, N, D)
    with mixed_precision(args, device.type):
        reference, mask = shown(args, vae, draws, layout, drops)
        v = predict(model, noisy, draws.sigma, layout.video_positions().to(device), context,
                    reference, attention_mask=mask).float()                       # (B, L, C)
        fm = flow_matching_loss(v, target)
        face = identity = fm.new_zeros(())
        if args.w_face > 0:
            face = face_weighted_loss(v, target, clips.face)
        if len(judged):
            x0 = clean_estimate(noisy, v, draws.sigma)                            # (B, L, C)
            identity = identity_term(args, frozen, x0, batch, judged, frame)
    return fm, face, identity


def shown(args: argparse.Namespace, vae: VideoVAE, draws: Draws, layout: Layout,
          drops: tuple[bool, bool]) -> tuple[Reference | None, Tensor | None]:
    """The reference for the model, and the mask that hides it from clips which drop it.

    drops: do all clips, do some. All: it is absent, as in sampling. None: no mask, so that the
    fastest attention serves. A compiled model gets reference and mask in any case: one shape.
    """
    everybody, somebody = drops
    if everybody and not args.compile:
        return None, None
    tokens = encode_reference(vae.encode, draws.reference).float()                # (B, R, C)
    if draws.noise_ref.shape[1]:  # a held-out loss draws none
        tokens = tokens + args.noise_ref * tokens.std() * draws.noise_ref
    reference = Reference(tokens, layout.reference_positions().to(tokens.device))
    if not somebody and not args.compile:
        return reference, None
    seen = draws.keep_ref.float()[:, None].expand(tokens.shape[:2])               # (B, R)
    video = seen.new_ones(len(seen), layout.F * layout.H * layout.W)              # (B, L)
    return reference, torch.cat([video, seen], dim=1)[:, None]                    # (B, 1, S)


def identity_term(args: argparse.Namespace, frozen: Frozen, x0: Tensor, batch: Batch,
                  judged: Tensor, frame: Tensor) -> Tensor:
    """our reading: 1 - cosine between the reference's face and that of a decoded clean estimate.

    x0 (B, L, C), of which the clips judged (b,) are looked at; frame (B,) which of its frames. The
    un-augmented reference says who it is. Only the face and what is near it in space and time is
    decoded, with gradients through the frozen decoder.
    """
    vae, net, device = frozen.vae, frozen.net, x0.device
    t = frame[judged]                                                             # (b,)
    # where the face is: five landmarks, NaN where none are known
    marks, ref_marks = batch.landmarks[judged, t], batch.reference_landmarks[judged]  # (b, 5, 2)
    # both faces are cut in one way: by landmarks, or else by boxes
    usable = usable_landmarks(marks) & usable_landmarks(ref_marks)                # (b,)
    marks, ref_marks = (m.where(usable[:, None, None], torch.nan) for m in (marks, ref_marks))
    boxes = batch.boxes[judged, t]                                                # (b, 4)
    areas = area_of(boxes, marks, net.size).tolist()
    frames = [vae.decode_frame(unpatchify(x0[i : i + 1], *batch.grid), at, area,
                               recompute=args.gradient_checkpointing)             # (1, 3, h, w)
              for i, at, area in zip(judged.tolist(), t.tolist(), areas, strict=True)]
    crops = faces_of(torch.cat(frames).float(), boxes, marks, net.size)
    with torch.no_grad():  # the target: who the reference shows
        pictures, ref_boxes = batch.reference[judged].to(device), batch.reference_box[judged]
        person = net(faces_of(pictures, ref_boxes, ref_marks, net.size))          # (b, E)
    return identity_loss(net, crops, person, torch.ones(len(judged), dtype=torch.bool,
                                                        device=device))


def applies(args: argparse.Namespace, batch: Batch, draws: Draws) -> Tensor:
    """How many clips each loss is a mean over, (3,): all, with a face, judged. 0: switched off."""
    with_face, judged = (batch.face.sum(dim=1) > 0).sum(), (draws.frame >= 0).sum()
    with_face = with_face * (args.w_face > 0)
    return torch.tensor([len(batch), with_face, judged], dtype=torch.float32)


# ------------------------------------------------------------ the run


def begin(args: argparse.Namespace, model: VideoTransformer, clips: str, world_size: int) -> Run:
    """The run in --out, from its newest state when there is one. What decides the result must be
    as it was, files by their content; clips: which they are."""
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    free = ("steps", "minutes", "compile", "out", "save_seconds", "batch", "accumulate", "parallel",
            "cache", "validate_every", "gradient_checkpointing", "validation", "manifest", "root",
            "allow_outside", "offload_text", "checkpoint", "gemma_root", "face", "device",
            "offload", "plan", "tflops")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                if k not in free}
    # However the clips of a step are shared out, it is the same step.
    settings["clips_per_step"] = args.batch * args.accumulate * world_size
    files = {"checkpoint": args.checkpoint, "text model": args.gemma_root}
    files |= {"recogniser": args.face} if args.w_id > 0 else {}
    settings["content"] = {what: [identity(path), str(path)] for what, path in files.items()}
    settings["content"]["clips"] = [clips, str(args.manifest or "the procedural world")]
    optimizer = make_optimizer(args, named)
    # The average of a LoRA is half a gigabyte that a card need not hold.
    ema = EMA(named, EMA_DECAY, None if args.full else "cpu")
    return Run(args.out, named, optimizer, ema, settings, KEEP)


def descend(args: argparse.Namespace, batch: Batch, draws: Draws, compute: Callable,
            world_size: int) -> tuple[list[float], Tensor]:
    """Gradients of one step, --batch clips at a time. Returns the three losses as means over
    everybody that has them, and how many those are, (3,)."""
    counts, terms = all_reduce(applies(args, batch, draws)), torch.zeros(3)
    for a in range(0, len(batch), args.batch):
        part, drawn = batch.part(a, a + args.batch), draws.part(a, a + args.batch)
        weights = applies(args, part, drawn) / counts.clamp(min=1)  # this part's share in the mean
        found = torch.stack(compute(part, drawn))                                 # (3,)
        # times world_size: gradients will be averaged over processes, these are parts of one sum
        fm, face, identity = found * weights.to(found) * world_size
        total_loss(fm, face, identity, args.w_face, args.w_id).backward()
        terms += found.detach().cpu() * weights
    return all_reduce(terms).tolist(), counts


def held_out_losses(args: argparse.Namespace, compute: Callable) -> Callable:
    """(batch, generators) -> flow-matching and face losses (2,) with nothing dropped or augmented,
    and their counts."""
    off = ("drop_ref", "drop_both", "drop_text", "augment_color", "augment_pose", "augment_layout",
           "w_id", "noise_ref")
    plain = argparse.Namespace(**vars(args) | dict.fromkeys(off, 0.0))

    def look(batch: Batch, generators: Generators) -> tuple[Tensor, Tensor]:
        draws = draw(plain, batch, generators)
        return torch.stack(compute(batch, draws)[:2]).cpu(), applies(args, batch, draws)[:2]
    return look


def save_result(args: argparse.Namespace, run: Run, model: VideoTransformer) -> Path:
    """EMA weights -> a LoRA file, or a whole checkpoint that sample.py loads as it is. All
    processes take part."""
    metadata = {"reference_placement": args.placement, "training_steps": str(run.done)}
    known = read_metadata(args.checkpoint).get("known_phrases")
    if known and args.manifest is None:  # people's own captions teach other words
        metadata["known_phrases"] = known
    with run.ema_weights():
        if not args.full:
            path = args.out / "lora.safetensors"
            save_lora(path, model, metadata, torch.bfloat16, gather, write=run.rank == 0)
            return path
        trained = {TRANSFORMER_PREFIX + k: gather(p).bfloat16()
                   for k, p in model.named_parameters()}
    if run.rank == 0:
        save_changed(args.out / "model.safetensors", args.checkpoint, trained, metadata)
    return args.out / "model.safetensors"


def train(args: argparse.Namespace) -> None:
    """The whole run: check, load, step by step to the end, save."""
    check_arguments(args)
    rank, world_size = start_workers()
    device = find_device(args.device)
    if world_size > 1 and device != find_device():
        raise ValueError(f"expected --device auto with several processes, got {device}; drop it")
    torch.set_flush_denormal(True)  # denormal numbers can slow a CPU tenfold
    args.precision = choose_precision(args.precision or begun_with(args.out).get("precision"),
                                      device)  # a run keeps its own
    torch.manual_seed(args.seed)
    config = read_metadata(args.checkpoint)["config"]
    # paper: the VAE is frozen; gradients of the identity loss pass through it
    vae = VideoVAE.load(args.checkpoint, device, torch.float32)
    net = load_facenet(args.face, device) if args.w_id > 0 else None
    data, looked_at, held_out = open_data(args, vae, device, rank, world_size)
    vae.to(frozen_type(args))  # clips were encoded in float32
    sharded = args.parallel == "fsdp" and can_shard()
    model = load_base(args, device, sharded)
    run = begin(args, model, data.fingerprint(), world_size)
    order = Order(data.groups, args.batch * args.accumulate * world_size, args.seed)
    # Gathering shards would break a compiled graph into pieces.
    predict = torch.compile(predict_velocity) if args.compile and not sharded else predict_velocity
    frozen = Frozen(vae, net, data.null_context.to(device))

    def compute(batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        return losses(args, model, predict, frozen, batch, draws)

    def read(step: int) -> tuple[list[int], Batch, Draws]:
        everyone = order(step)
        mine = shard_indices(everyone, rank, world_size, args.batch)
        generators = generators_of(args, step, [place for place, _ in mine], device)
        batch = data.batch([i for _, i in mine], generators)
        check_batch(step, batch, data)
        return everyone, batch, draw(args, batch, generators)

    look = held_out_losses(args, compute)
    sheet = partial(sample_clips, looked_at, config=config, model=model, vae=vae,
                    placement=args.placement, precision=mixed_precision(args, device))
    ahead = ThreadPoolExecutor(1, initializer=settle_thread, initargs=(torch.get_num_threads(),))
    ready = ahead.submit(read, run.done)  # the next step's clips are read while this one computes
    samples = args.batch * args.accumulate
    for step in run.steps(args.steps, args.minutes, samples, "st-drc", args.save_seconds):
        everyone, batch, draws = ready.result()
        ready = ahead.submit(read, step + 1)
        (fm, face, identity), counts = descend(args, batch, draws, compute, world_size)
        average_gradients(run.optimizer.parameters(), world_size)
        norm = full_tensor(nn.utils.clip_grad_norm_(run.optimizer.parameters(), CLIP)).item()
        terms = {"flow matching": fm, "the face-weighted loss": face, "the identity loss": identity,
                 "the gradient": norm}
        check_finite(step, terms, data.names(everyone))
        run.optimizer.step(rate(args, step))  # on finite numbers only
        model.zero_grad(set_to_none=True)
        run.ema.update(run.model, step)
        with_face, with_id = (counts[1:] / counts[0]).tolist()  # a missing face shows here
        # A loss that nobody has is not 0, which would look perfect: it is left out of the log.
        run.record(loss=fm + args.w_face * face + args.w_id * identity, fm=fm,
                   face=face if with_face else math.nan, id=identity if with_id else math.nan,
                   lr=rate(args, step) * run.optimizer.lr_other, gradient=norm,
                   with_face=with_face, with_id=with_id)
        if (step + 1) % args.validate_every == 0 or step + 1 == args.steps:
            run.report(step + 1, samples)
            validate(run, looked_at, args.batch, held_out, look, sheet)
        elif (step + 1) % 100 == 0:  # a glance, long before the first validation
            draw_curves(run)
    ahead.shutdown(cancel_futures=True)
    path = save_result(args, run, model)
    if rank == 0:
        print(f"wrote {path} after {run.done} steps, {run.seconds / 60:.0f} min; "
              f"look at {args.out / 'sheet.png'}")


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    return command("train.py", lambda: plan.show(args) if args.plan else train(args))


if __name__ == "__main__":
    sys.exit(main())
