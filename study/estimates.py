"""At which noise level is it decided whose face it is? One-step estimates, with and without it.

The idea. A generated face that has the right colours and the wrong shape went wrong somewhere on
the walk from noise. So true clips of unseen people are noised to a level, the model estimates the
clean clip in one step, and a reader that took no part in training says what of the person is in
the estimate. Without the reference the answer is what the noisy clip still shows by itself. Where
both are alike, the shape stands in the noise already and the reference adds nothing: a loss that
is counted there cannot teach the model to read the reference.

paper: an identity loss (ST-DRC, arXiv 2606.02441). our reading: up to which noise level it counts
(losses.IDENTITY_MAX_SIGMA, train.py --id-sigma), and this test of it.

Conventions. sigma 1 = noise, 0 = data. Shape, colours, attributes: mean correlation over people of
what is read and what is true (scores.face_scores, shape the eight of scores.EIGHT).

    python -m study.estimates                              128 people: two minutes on one core
    python -m study.estimates --checkpoint-path other.safetensors --sigmas 0.9 0.97

Read next: study/curves.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.cli import Parser, check_ranges, command
from common.seeds import seeded
from losses import add_noise, clean_estimate
from ltx.load import layout_from
from reference import Reference, encode_reference, patchify, predict_velocity, unpatchify
from study import scores
from study.evaluate import BATCH, TINY, Models, fast, test_set
from study.results import markdown
from toy.traits import load_traits

COLUMNS = ("eight", "colors", "attributes")


@torch.no_grad()
def estimate(m: Models, data: dict, sigma: float, shown: bool) -> Tensor:
    """Clean estimates of the true clips at one noise level, decoded: (n, 3, F, h, w)."""
    layout, out = layout_from(m.numbers, m.vae, m.placement), []
    positions = layout.video_positions(), layout.reference_positions()
    for start in range(0, len(data["true"]), BATCH):
        part = slice(start, start + BATCH)
        x0 = patchify(m.vae.encode(data["true"][part]))                     # (B, L, C)
        sigmas = torch.full((len(x0),), sigma)
        noise = torch.randn(x0.shape, generator=seeded(0, start))
        x, _ = add_noise(x0, noise, sigmas)
        tokens = encode_reference(m.vae.encode, data["references"][data["who"][part]])
        v = predict_velocity(m.transformer, x, sigmas, positions[0],
                             m.text.encode(data["captions"][part]),
                             Reference(tokens, positions[1]) if shown else None)
        x0 = unpatchify(clean_estimate(x, v, sigmas), layout.F, layout.H, layout.W)
        out.append(m.vae.decode(x0).clamp(-1, 1))
    return torch.cat(out)


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    m, reader = Models(args.checkpoint_path, args.gemma_root), load_traits(args.traits)
    data = test_set(args.people, 1, m.numbers["height"], m.numbers["num_frames"], "val")
    rows = []
    with fast("cpu"):
        for sigma in tqdm(args.sigmas, desc="estimates", unit="level"):
            both = [scores.face_scores(estimate(m, data, sigma, shown), data, reader)[1]
                    for shown in (True, False)]
            rows.append([f"{sigma:g}", *(f"{found[name]:.2f}" for name in COLUMNS
                                         for found in both)])
    names = ("shape", "colours", "attributes")
    head = ["noise level", *(f"{name}{end}" for name in names
                             for end in ("", ", no reference"))]
    print("\n".join(markdown(head, rows)))


def main(line: list[str] | None = None) -> int:
    p = Parser("study.estimates", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--sigmas", type=float, nargs="+", default=[0.6, 0.8, 0.9, 0.97])
    add("--people", type=int, default=128, help="of the validation split")
    add("--checkpoint-path", type=Path, default=TINY / "model.safetensors")
    add("--gemma-root", type=Path, default=TINY / "gemma")
    add("--traits", type=Path, default=TINY / "traits.safetensors")
    args = p.parse_args(line)

    def do() -> None:
        check_ranges(args, {"sigmas": (0, 1), "people": (3, 1e6)})
        run(args)
    return command("study.estimates", do)


if __name__ == "__main__":
    sys.exit(main())
