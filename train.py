"""The paper: fine-tune a text-to-video model so that a reference picture decides who appears in the video.

ST-DRC, arXiv 2606.02441. One step, top to bottom:

    reference picture -> augment.py (colour, pose, layout) -> frozen VAE -> clean tokens       paper: no extra adapter
    clip latent       -> noise at sigma                                                        paper: noise on video only
    [video tokens | reference tokens], positions from rope.py (TASS)  -> model.py -> velocity of the video tokens
    losses.py: flow matching + face-weighted + identity on the decoded clean estimate

paper: Gemma and the VAE stay frozen, the video DiT is trained. our reading: everything with a number attached: dropout
rates, loss weights, schedule (paper-silent; each is explained at its line below).

`--full` trains every weight of the transformer (how the bundled checkpoint was made; Muon for the matrices, see optim.py).
The default is a LoRA, rank 32, as LTX-2.3's published in-context LoRA recipe. The same command resumes a stopped run.

Conventions. sigma 1 = noise, 0 = data. Shapes: B batch, L video tokens, R reference tokens, S = L + R, C latent channels.

Read next: sample.py, which uses what this file trains.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

import world
from augment import AugmentStrength, augment_reference
from checkpoint import load_weights, read_metadata, save_checkpoint
from face import FaceNet, load_facenet, square
from lora import add_lora, save_lora
from losses import (
    IDENTITY_MAX_SIGMA,
    clean_estimate,
    crop_faces,
    face_weighted_loss,
    flow_matching_loss,
    identity_loss,
    total_loss,
)
from model import TransformerConfig, VideoTransformer
from optim import Average, MuonAdamW, Run, average_gradients, schedule, seeded, split_parameters
from pretrain import FRAME_RATE, GRID, KEEP_FROM_MUON, SIZE, TRANSFORMER_PREFIX, check_samples, draw_noise, latent_source
from reference import append_reference, drop_reference, encode_reference, unpatchify
from rope import PLACEMENTS, grid_to_positions, reference_grid, source_phase, video_grid
from text import TextEncoder
from vae import VideoVAE


def parse_arguments() -> argparse.Namespace:
    """Every default in one place, each with its source."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--checkpoint-path", dest="checkpoint", type=Path, default=Path("runs/base.safetensors"),
                   help="text-to-video base")
    p.add_argument("--gemma-root", type=Path, default=Path("runs/gemma"))
    p.add_argument("--face", type=Path, default=Path("runs/face.safetensors"), help="recogniser of the identity loss")
    p.add_argument("--out", type=Path, default=Path("runs/st-drc"))
    p.add_argument("--full", action="store_true", help="train all weights instead of a LoRA")
    p.add_argument("--rank", type=int, default=32, help="LoRA rank, alpha = rank (LTX-2.3's in-context LoRA example)")
    p.add_argument("--steps", type=int, default=3000, help="LTX-2.3's trainer default")
    p.add_argument("--batch", type=int, default=16, help="clips per worker and step")
    p.add_argument("--minutes", type=float, default=1e9, help="stop and save after this time; run again to go on")
    p.add_argument("--save-seconds", type=float, default=120, help="time between saved states; the newest two are kept")
    p.add_argument("--lr", type=float, help="default 2e-4 for a LoRA (LTX-2.3), 1e-3 (Muon 3e-3) with --full")
    p.add_argument("--placement", choices=list(PLACEMENTS), default="tass", help="where reference tokens sit (rope.py)")
    # our reading: InstructPix2Pix drops 5 % each; text-first guidance needs the reference-free stream most
    p.add_argument("--drop-ref", type=float, default=0.10, help="share of samples without reference")
    p.add_argument("--drop-both", type=float, default=0.05, help="share without reference and without text")
    p.add_argument("--drop-text", type=float, default=0.05, help="share without text")
    # our reading: 1 = the ranges in augment.py's header. The bundled run took 0.3, 0.5, 0.5: the world's people are told
    # apart by skin and hair colour, and their references already come from another moment.
    p.add_argument("--augment-color", type=float, default=1.0)
    p.add_argument("--augment-pose", type=float, default=1.0)
    p.add_argument("--augment-layout", type=float, default=1.0)
    p.add_argument("--w-face", type=float, default=1.0, help="weight of the face-weighted loss (follows ConsisID)")
    p.add_argument("--w-id", type=float, default=0.1, help="weight of the identity loss; 0 = off")
    p.add_argument("--id-samples", type=int, default=4, help="clips per step decoded for the identity loss")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return p.parse_args()


def load_models(args: argparse.Namespace, device: str) -> tuple[VideoTransformer, VideoVAE, TextEncoder, FaceNet]:
    """Transformer (to be trained), and the frozen VAE, text encoder and recogniser."""
    config = read_metadata(args.checkpoint)["config"]
    with torch.device("meta"):
        model = VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"]))
        vae = VideoVAE(config["vae"])
    load_weights(model, args.checkpoint, TRANSFORMER_PREFIX, torch.float32, device)
    load_weights(vae, args.checkpoint, "vae.", torch.float32, device)
    text = TextEncoder.load(args.checkpoint, args.gemma_root, device, torch.float32)
    return model, vae.eval().requires_grad_(False), text.eval().requires_grad_(False), load_facenet(args.face, device)


@torch.no_grad()
def cache_contexts(text: TextEncoder, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The text path is frozen, so each distinct caption is encoded once: contexts (U, N, D) and the row of each clip."""
    rows, inverse = torch.unique(ids, dim=0, return_inverse=True)
    first = torch.full((len(rows),), len(ids), device=ids.device)                         # (U,) a clip of each caption
    first = first.scatter_reduce(0, inverse, torch.arange(len(ids), device=ids.device), "amin")
    blocks = tqdm(first.split(128), desc="captions", disable=int(os.environ.get("RANK", "0")) != 0)
    return torch.cat([text(ids[i], mask[i]).bfloat16() for i in blocks]), inverse


def velocity(model: VideoTransformer, noisy: Tensor, sigma: Tensor, ref_tokens: Tensor, keep_ref: Tensor,
             positions: Tensor, ref_positions: Tensor, context: Tensor, phase: Tensor | None = None) -> Tensor:
    """Velocity of the video tokens, (B, L, C) float32.

    A dropped reference is hidden from every query rather than left out: the same numbers, and one compiled graph.
    """
    B, L, _ = noisy.shape
    timesteps = sigma[:, None].expand(B, L)                                               # (B, L)
    tokens, timesteps, where = append_reference(noisy, timesteps, positions.expand(B, -1, -1, -1), ref_tokens,
                                                ref_positions)
    visible = torch.cat([torch.ones_like(noisy[:, :, 0]), keep_ref[:, None].expand(B, ref_tokens.shape[1])], dim=1)
    out = model(tokens, timesteps, sigma, where, context, attention_mask=visible[:, None], phase=phase)  # (B, S, C)
    return drop_reference(out, L).float()


def drop_conditions(args: argparse.Namespace, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which samples keep their reference and their text, two (B,) booleans. Guidance needs all the streams it combines."""
    u = torch.rand(batch, generator=generator, device=generator.device)
    both = u < args.drop_both
    no_ref = u < args.drop_both + args.drop_ref
    no_text = both | (u > 1 - args.drop_text)
    return ~no_ref, ~no_text


def identity_term(args: argparse.Namespace, vae: VideoVAE, net: FaceNet, x0_hat: Tensor, sigma: Tensor,
                  keep_ref: Tensor, boxes: Tensor, anchor: Tensor, generator: torch.Generator) -> Tensor:
    """our reading: 1 - cosine between the reference and one frame of the decoded clean estimate, at low noise only.

    The cleanest `--id-samples` clips of the batch are decoded, with gradients through the frozen decoder. A one-step
    estimate at high noise has no face to recognise; losses.py says which noise is low enough.
    """
    pick = sigma.argsort()[:args.id_samples]
    frames = vae.decode(unpatchify(x0_hat[pick], *GRID))                                  # (b, 3, F, h, w)
    t = torch.randint(frames.shape[2], (len(pick),), generator=generator, device=generator.device)
    rows = torch.arange(len(pick), device=pick.device)
    crops = crop_faces(frames[rows, :, t].float(), square(boxes[pick, t]), net.size)      # (b, 3, size, size)
    valid = (sigma[pick] <= IDENTITY_MAX_SIGMA) & keep_ref[pick]
    return identity_loss(net, crops, anchor[pick], valid)


def make_optimizer(args: argparse.Namespace, model: VideoTransformer) -> tuple[dict[str, nn.Parameter], MuonAdamW]:
    """LoRA: AdamW on the two small matrices of each layer. --full: Muon on the blocks' matrices, AdamW on the rest."""
    if args.full:
        named = dict(model.named_parameters())
        lr = 1e-3 if args.lr is None else args.lr
        return named, MuonAdamW(*split_parameters(named, KEEP_FROM_MUON), lr_matrix=3 * lr, lr_other=lr)
    add_lora(model, rank=args.rank, alpha=args.rank)
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return named, MuonAdamW({}, named, lr_other=2e-4 if args.lr is None else args.lr)


def save_result(args: argparse.Namespace, run: Run, model: VideoTransformer) -> Path:
    """Averaged weights -> a LoRA file, or a whole checkpoint that sample.py loads as it is."""
    metadata = {"reference_placement": args.placement, "training_steps": str(run.done)}
    with run.averaged():
        if not args.full:
            save_lora(args.out / "lora.safetensors", model, metadata, dtype=torch.bfloat16)
            return args.out / "lora.safetensors"
        with safe_open(args.checkpoint, "pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        tensors |= {TRANSFORMER_PREFIX + k: p.detach().cpu().bfloat16() for k, p in model.named_parameters()}
        save_checkpoint(args.out / "model.safetensors", tensors, read_metadata(args.checkpoint)["config"], metadata)
        return args.out / "model.safetensors"


def check_finite(step: int, terms: dict[str, Tensor], rows: Tensor) -> None:
    """Raise ValueError naming the step, the term and the clips as soon as a loss is not a number: saved states stay good."""
    for name, value in terms.items():
        if not value.isfinite():
            raise ValueError(f"expected finite losses, got {value.item()} for {name} at step {step}, clips "
                             f"{rows.tolist()}; lower --lr and run again: the last saved state is from before")


def train(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    model, vae, text, net = load_models(args, device)
    data = latent_source(text, args.checkpoint, device)
    contexts, context_row = cache_contexts(text, data.ids, data.mask)
    null_row = context_row[-1]
    named, optimizer = make_optimizer(args, model)
    free = ("steps", "minutes", "compile", "out", "save_seconds")  # what may change when a run is taken up again
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
                if key not in free}
    run = Run(args.out, named, optimizer, Average(named), settings)
    strength = AugmentStrength(color=args.augment_color, pose=args.augment_pose, layout=args.augment_layout)
    positions = grid_to_positions(video_grid(*GRID), FRAME_RATE, vae.time_scale, vae.space_scale)[None].to(device)
    ref_positions = grid_to_positions(reference_grid(*GRID, args.placement), FRAME_RATE, vae.time_scale,
                                      vae.space_scale).to(device)
    phase = source_phase(args.placement, positions.shape[2], ref_positions.shape[1])  # None, except to study it
    forward = torch.compile(velocity) if args.compile else velocity

    next_check = run.seconds + 300
    for step in run.steps(args.steps, args.minutes, args.batch, "st-drc", args.save_seconds):
        g = seeded(args.seed, step, run.rank, device=device)
        batch = {k: v.to(device) for k, v in data.batch(args.batch, g).items()}
        keep_ref, keep_text = drop_conditions(args, args.batch, g)
        context = contexts[torch.where(keep_text, context_row[batch["index"]], null_row)].float()    # (B, N, D)

        pictures, ref_boxes = world.draw_references(batch["person"], batch["setting"], g, SIZE)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            anchor = net(crop_faces(pictures, square(ref_boxes), net.size))  # the un-augmented picture says who it is
        augmented = augment_reference(pictures, g, strength)                              # (B, 3, h, w)
        with torch.autocast(device, torch.bfloat16):
            ref_tokens = encode_reference(vae.encode, augmented).float()                  # (B, R, C)

        sigma, noise, noisy = draw_noise(batch["x0"], g)
        with torch.autocast(device, torch.bfloat16):
            v = forward(model, noisy, sigma, ref_tokens, keep_ref.float(), positions, ref_positions, context, phase)
        fm = flow_matching_loss(v, noise - batch["x0"])
        face = face_weighted_loss(v, noise - batch["x0"], batch["face"])
        identity = fm.new_zeros(())
        if args.w_id > 0:
            x0_hat = clean_estimate(noisy, v, sigma)
            with torch.autocast(device, torch.bfloat16):
                identity = identity_term(args, vae, net, x0_hat, sigma, keep_ref, batch["boxes"], anchor, g)
        check_finite(step, {"flow matching": fm, "the face-weighted loss": face, "the identity loss": identity},
                     batch["index"] if "index" in batch else torch.arange(args.batch))
        total_loss(fm, face, identity, args.w_face, args.w_id).backward()

        average_gradients(optimizer.parameters(), run.world)
        nn.utils.clip_grad_norm_(optimizer.parameters(), 1.0)
        optimizer.step(schedule(step, args.steps))
        model.zero_grad(set_to_none=True)
        run.average.update(named, step)
        now = {"fm": fm.item(), "face": face.item(), "id": identity.item()}
        run.losses = {k: 0.98 * run.losses.get(k, v) + 0.02 * v for k, v in now.items()}
        if run.rank == 0 and (run.seconds > next_check or step + 1 == args.steps):
            check_samples(run, model, text, vae, device, args.placement)
            next_check = run.seconds + 300
    if run.rank == 0:
        print(f"wrote {save_result(args, run, model)} after {run.done} steps, {run.seconds / 60:.0f} min")


def main() -> int:
    try:
        train(parse_arguments())
    except KeyboardInterrupt:  # before the first step; later ones are noted and the run is saved, see Run.signals
        print("train.py: stopped while preparing; the same command begins again", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"train.py: error: {message}" + ("" if "; " in message else "; check that file and the free space"),
              file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
