"""Looking at a training while it runs: losses on clips it never sees, a contact sheet, the curves.

The idea. The training loss of a diffusion model says little: every step has other clips, other
noise levels, other noise. Here clips, noise and references are fixed, so that two looks at one
run, or at two runs, differ only by the weights. For identity a sheet says more than a loss: each
row is a reference, then frames of what the model makes of it and the clip's caption.

our reading: all of it; ST-DRC (arXiv 2606.02441) shows no training curves. Dropout and
augmentation are off; guidance is that of the checkpoint's config, otherwise LTX-2.3's.

Conventions. Averaged weights, those that will be shipped. `clips` are what training reads:
any ClipSource, which have the same `groups`, `batch` and `names`. With
several processes all of them compute, and rank 0 writes.

    validate(run, clips, 4, True, compute, sample)  # -> log.jsonl, sheet.png, curves.png

Read next: toy/config.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from clips.dataset import ClipSource
from clips.video import picks, save_sheet
from common.cli import out_of_memory
from common.files import one_line
from common.seeds import seeded
from ltx.load import INFERENCE, guidance_from
from ltx.vae import VideoVAE
from model import VideoTransformer, ltx_sigmas
from reference import encode_reference
from rope import Layout
from sample import denoise
from training import plot
from training.run import Run, check_finite

LOOKS = 4   # times that every clip is looked at, each with other noise
SHOWN = 4   # clips on the sheet


@torch.no_grad()
def validate(run: Run, clips: ClipSource, size: int, held_out: bool, compute: Callable,
             sample: Callable) -> None:
    """Log the losses of `clips` when they are held out, and write the pictures.

    compute(batch, generators) -> losses (2,) and how many clips each is a mean over (2,);
    sample(indices) -> rows of pictures for the sheet; size: clips in one batch. Raises ValueError
    when a loss is not finite; a picture that cannot be made, for want of memory too, is no reason
    to end a training.
    """
    with run.ema_weights():
        if held_out:
            losses = validation_loss(clips, size, compute, run.done)
            run.log(run.done + 1, **losses)  # within the step, which is not counted yet
        try:
            rows = sample(list(clips.groups[0])[:SHOWN])
            if run.rank == 0:
                scale = 2 if rows[0][0].shape[-1] < 256 else 1
                save_sheet(run.folder / "sheet.png", rows, scale)
        except Exception as error:
            if not (isinstance(error, OSError | ValueError) or out_of_memory(error)):
                raise  # a mistake of ours
            told = one_line(error)
            print(f"warning: no contact sheet at step {run.done}: {told}", file=sys.stderr)
    draw_curves(run)


def draw_curves(run: Run) -> None:
    """log.jsonl -> curves.png, by rank 0. Only warns when it cannot be written."""
    log = run.folder / "log.jsonl"
    if run.rank == 0 and log.exists():
        try:
            plot.curves({run.folder.name: plot.read_log(log)}, run.folder / "curves.png")
        except (OSError, ValueError) as error:
            print(f"warning: {error}", file=sys.stderr)


def validation_loss(clips: ClipSource, size: int, compute: Callable, step: int) -> dict[str, float]:
    """val_fm and, when a face is known in any clip, val_face: means over clips and LOOKS.

    Raises ValueError naming step, loss and clips when one is not finite.
    """
    names, counts, sums = ("val_fm", "val_face"), torch.zeros(2), torch.zeros(2)
    for group in clips.groups:
        for look in range(LOOKS):
            for start in range(0, len(group), size):
                part = list(group[start:start + size])
                generators = [seeded(12, look, i) for i in part]
                values, found = compute(clips.batch(part, generators), generators)
                terms = dict(zip(names, values.tolist(), strict=True))
                check_finite(step, terms, clips.names(part))
                counts += found
                sums += found * values
    return {name: (s / n).item() for name, s, n in zip(names, sums, counts, strict=True) if n}


def sample_clips(clips: ClipSource, indices: list[int], config: dict, model: VideoTransformer,
                 vae: VideoVAE, placement: str, precision: AbstractContextManager
                 ) -> list[list[Tensor]]:
    """A row of pictures (3, h, w) for each clip: its reference, then frames of the video made.

    precision: of the computation, as in training.
    """
    device = next(vae.parameters()).device.type
    defaults = {**INFERENCE, **config.get("inference", {})}
    generators = [seeded(13, i) for i in indices]
    batch = clips.batch(indices, generators)
    noise = torch.stack([torch.randn(batch.x0.shape[1:], generator=g) for g in generators])
    sigmas = ltx_sigmas(defaults["steps"], defaults["schedule_tokens"])
    with torch.no_grad(), precision:
        tokens = encode_reference(vae.encode, batch.reference.to(device)).float()   # (B, R, C)
        scales = batch.frame_rate, vae.time_scale, vae.space_scale
        latent = denoise(model, noise.to(device), sigmas, batch.context.to(device),
                         clips.null_context[None].to(device), tokens,
                         Layout(*batch.grid, *scales, placement), guidance_from(defaults))
        videos = [torch.cat([run.float().cpu() for run in vae.decode_tiles(z[None])], dim=2)[0]
                  for z in latent]                                                  # (3, F, h, w)
    return [[picture, *(video[:, t] for t in picks(video.shape[1]))]
            for picture, video in zip(batch.reference, videos, strict=True)]
