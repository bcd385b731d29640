"""Learning curves: what each placement has learnt, and copied, after how many steps.

The idea. One number at the end of one training cannot tell a method that is worse from one that is
slower. So every variant starts from the same base, sees the same clips, noise levels and noise, and
is stopped and scored at the same marks, with several seeds. In half of the pairs the reference
shows the clip's own place, light and shirt, and captions leave parts out: copying pays
(toy/clips.py).

paper: placement and augmentation are to stop copying (ST-DRC, arXiv 2606.02441); it shows no
curves. A public trainer's remedy, noise on the reference's latent, stands beside. our reading: all
numbers. The learning rate stays where it is (--final-lr 1), or a mark would depend on the last one;
what is scored is the EMA. No identity loss: at these lengths it changes nothing (ablations.md), and
without it twice as many steps fit.

Conventions. A result is FOLDER/<variant>/seed-<s>-steps-<n>.json. Stopped runs go on; all variants
and seeds reach a mark before any goes on, so a picture of half the work compares like with like.

    python -m study.curves run --marks 100 200 400 --seeds 0 1 2
    python -m study.curves table                    FOLDER/curves.md and FOLDER/curves.png

Read next: study/scales.py
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clips.face import FaceNet, load_facenet
from common.cli import Parser, check_ranges, command
from common.files import atomic_write, read_json, write_json
from study import scores
from study.ablate import DEFAULT, PLAIN, words
from study.evaluate import TINY, Models, Networks, generate, silent, test_set
from study.results import FACTORS, keep_settings, markdown, number, over_seeds, processor
from toy.head import load_head
from toy.traits import TraitReader, load_traits
from training import plot

HERE = Path(__file__).resolve().parents[1]  # the repository
VARIANTS = {  # what differs from DEFAULT, which is TASS with the three augmentations
    "tass": {}, "overlap": {"placement": "overlap"}, "time_only": {"placement": "time_only"},
    "space_only": {"placement": "space_only"}, "overlap_phase": {"placement": "overlap_phase"},
    "no_augment": PLAIN, "noise_0.15": PLAIN | {"noise_ref": 0.15},
    "noise_0.3": PLAIN | {"noise_ref": 0.3}}
# What is drawn: who appears, and what is copied of the reference.
IDENTITY = ("similarity", "shape", "colors", "traits_top1", "prompt")
COPIED = ("position", "pose", "ref_pixels", "ref_scene", "ref_light", "ref_shirt")
SCALES = {"text_scale": 2.0, "ref_scale": 2.5}


# ------------------------------------------------------------ scores


def measure(video: Tensor, data: dict, nets: Networks, reader: TraitReader) -> dict[str, float]:
    """Of clips (n, 3, F, h, w): IDENTITY, and of COPIED the position, pose and ref_pixels.

    shape is the mean correlation of scores.EIGHT, prompt the mean of FACTORS.
    """
    each, leaks = scores.per_clip(video, data, *nets), scores.leaks(video, data, nets[1])
    faces, whole = scores.face_scores(video, data, reader)
    means = {name: scores.summarise(values)[0] for name, values in
             (each | faces | scores.shows_reference(video, data)).items()}
    return {"similarity": means["similarity"], "shape": whole["eight"], "colors": whole["colors"],
            "traits_top1": means["traits_top1"],
            "prompt": sum(means[name] for name in FACTORS) / len(FACTORS),
            "position": leaks["position"][0], "pose": leaks["pose"][0],
            "ref_pixels": means["ref_pixels"]}


def load_judges(args: argparse.Namespace) -> tuple[Networks, TraitReader]:
    nets: tuple[FaceNet, ...] = load_facenet(args.eval_encoder), load_head(args.head)
    return nets, load_traits(args.traits)


def score(weights: Path, args: argparse.Namespace) -> dict[str, float | None]:
    """IDENTITY and COPIED of a checkpoint: what is shown of the reference's place, light and shirt
    is read where the prompt is silent."""
    nets, reader = load_judges(args)
    m = Models(weights, args.gemma_root)
    size, frames = (m.config["inference"][name] for name in ("height", "num_frames"))
    data = test_set(args.people, 1, size, frames, "val")
    how = argparse.Namespace(num_inference_steps=args.num_inference_steps, rescale=0.0, seed=0,
                             order="text_first", guide_range=(0.2, 1.0), guide_every=2,
                             dtype="float32", **SCALES)
    found = {}
    for name, side in (("own reference", data), ("silent prompt", silent(data))):
        video = generate(m, side["captions"], side["references"], how, name)
        found[name] = measure(video, side, nets, reader)
        shown = scores.shows_reference(video, side)
    copied = {name: scores.summarise(shown[name])[0] for name in COPIED[3:]}
    return {name: number(value) for name, value in (found["own reference"] | copied).items()}


# ------------------------------------------------------------ running


def result(args: argparse.Namespace, variant: str, seed: int, mark: int) -> Path:
    return args.folder / variant / f"seed-{seed}-steps-{mark}.json"


def train_to(args: argparse.Namespace, variant: str, seed: int, mark: int) -> Path:
    """Train on to `mark` steps, from the state that the last mark left; returns the weights."""
    out = args.folder / variant / f"seed-{seed}"
    flags = DEFAULT | {"w_id": 0.0} | VARIANTS[variant]
    line = [sys.executable, str(HERE / "train.py"), "--full", "--no-gradient-checkpointing",
            *words(optimizer="muon", final_lr=1, batch=args.batch, steps=mark, seed=seed, out=out,
                   validate_every=10**6, checkpoint_path=args.checkpoint_path,
                   gemma_root=args.gemma_root, **flags)]
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    with open(log, "ab") as file:
        status = subprocess.run(line, stdout=file, stderr=file, check=False,
                                env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
    if status:
        last = (log.read_text(errors="replace").splitlines() or [""])[-1].strip()
        raise ValueError(f"expected a training that ends, got status {status} from {variant}, seed "
                         f"{seed}: {last}; the same command tries again")
    return out / "model.safetensors"


def run(args: argparse.Namespace) -> None:
    """Every result that is missing, mark by mark."""
    shared = {name: getattr(args, name) for name in ("batch", "people", "num_inference_steps")}
    keep_settings(args.folder / "settings.json", shared)
    todo = [(variant, seed, mark) for mark in sorted(args.marks) for seed in args.seeds
            for variant in args.variants if not result(args, variant, seed, mark).exists()]
    for variant, seed, mark in (bar := tqdm(todo, desc="curves", unit="mark")):
        bar.set_postfix_str(f"{variant}, seed {seed}, {mark} steps")
        started = time.time()
        weights = train_to(args, variant, seed, mark)
        trained = time.time()
        found = score(weights, args)
        write_json(result(args, variant, seed, mark), {
            "arguments": shared | {"variant": variant, "seed": seed, "steps": mark},
            "processor": processor(), "scores": found,
            "seconds": {"training": round(trained - started, 1),
                        "scoring": round(time.time() - trained, 1)}})


# ------------------------------------------------------------ tables and picture

Curves = dict[str, dict[int, list[dict]]]  # variant -> steps -> scores of each seed


def read_results(args: argparse.Namespace) -> tuple[Curves, float]:
    """What --folder holds, and the hours it took."""
    curves, seconds = {}, 0.0
    for variant in args.variants:
        for path in sorted((args.folder / variant).glob("seed-*-steps-*.json")):
            record = read_json(path)
            steps = record["arguments"]["steps"]
            curves.setdefault(variant, {}).setdefault(steps, []).append(record["scores"])
            seconds += sum(record["seconds"].values())
    if not curves:
        raise ValueError(f"expected results in {args.folder}, got none; "
                         "`python -m study.curves run` makes them")
    return curves, seconds / 3600


def draw(curves: Curves, names: Sequence[str]) -> Image.Image:
    """A panel for each score, two in a row: means over seeds, shades their 95 % intervals. One mark
    is no curve: such a variant is drawn only where none has more."""
    longest = max(len(marks) for marks in curves.values())
    curves = {variant: marks for variant, marks in curves.items() if len(marks) >= min(2, longest)}
    panels = []
    for name in names:
        lines, shades = {}, {}
        for variant, marks in curves.items():
            steps = sorted(marks)
            found = [scores.mean_interval([math.nan if r[name] is None else r[name]
                                           for r in marks[s]]) for s in steps]
            means = [mean for mean, _ in found]
            lines[variant] = steps, means
            shades[variant] = (steps, [m - half for m, half in found],
                               [m + half for m, half in found])
        panels.append(plot.chart(lines, name.replace("_", " "), "steps", bands=shades))
    return plot.beside(panels)


def table(args: argparse.Namespace) -> None:
    """Print and write FOLDER/curves.md and FOLDER/curves.png from the results that are there."""
    curves, hours = read_results(args)
    columns = IDENTITY + COPIED
    rows = [[variant.replace("_", " "), str(steps), str(len(found)),
             *(over_seeds(name, [record[name] for record in found])[0] for name in columns)]
            for variant, marks in curves.items() for steps, found in sorted(marks.items())]
    head = ["variant", "steps", "seeds", *(name.replace("_", " ") for name in columns)]
    lines = ["Mean ± 95 % interval over seeds.", "", *markdown(head, rows), "",
             f"{hours:.2f} hours of one thread."]
    atomic_write(args.folder / "curves.md", lambda p: p.write_text("\n".join(lines) + "\n"))
    picture = draw(curves, ("shape", "colors", "similarity", "position", "ref_pixels", "ref_scene"))
    atomic_write(args.folder / "curves.png", lambda p: picture.save(p, format="PNG"))
    print("\n".join(lines))


# ------------------------------------------------------------ the command


def parse_arguments(line: list[str] | None = None) -> argparse.Namespace:
    p = Parser("study.curves", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("what", choices=["run", "table"], help="train and score; make tables")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--marks", nargs="+", type=int, default=[100, 200, 400], help="steps to score at")
    add("--batch", type=int, default=8)
    add("--people", type=int, default=48, help="validation people to score")
    add("--num-inference-steps", type=int, default=10)
    add("--folder", type=Path, default=Path("runs/curves"))
    add("--checkpoint-path", type=Path, default=TINY / "base.safetensors")
    add("--gemma-root", type=Path, default=TINY / "gemma")
    for flag, name in (("--eval-encoder", "eval_encoder"), ("--head", "head_pose"),
                       ("--traits", "traits")):
        add(flag, type=Path, default=TINY / f"{name}.safetensors")
    return p.parse_args(line)


def main(line: list[str] | None = None) -> int:
    args = parse_arguments(line)
    check = {"seeds": (0, 2**31), "marks": (1, 1e9), "batch": (1, 4096), "people": (3, 1e6),
             "num_inference_steps": (1, 10_000)}

    def do() -> None:
        check_ranges(args, check)
        run(args) if args.what == "run" else table(args)
    return command("study.curves", do)


if __name__ == "__main__":
    sys.exit(main())
