"""Which order of guidance, and which two scales? The grid, the curves, and a rule that chooses.

The idea. guidance.py sums three predictions in one of three orders with two scales; the paper gives
neither. More reference scale shows more of the face and copies more of the picture, more text scale
follows the prompt and loses the face. So each order is asked at the same 5 x 5 pairs of scales, for
the same people, prompts and noise, and what it pays for the face is drawn: each order's best face
at every accuracy of the prompt. All three cost the same calls of the model.

The rule, written down before the numbers were seen: among all settings whose prompt accuracy is
within one point of the best and whose copying of the reference's position is at most 0.20, the one
with the highest shape + similarity; if none copies so little, the same among those that copy least
(the lowest tenth).

paper: three streams, two scales (ST-DRC, arXiv 2606.02441). our reading: orders, grid, rule.

Conventions. A result is FOLDER/<order>-text-<s>-ref-<s>.json; finished ones stay, so a stopped run
goes on. Each person gets one clip for each seed of the noise. Choose on "val", report on "test".

    python -m study.scales run             75 settings, 16 people x 3 seeds: half an hour, one core
    python -m study.scales table           FOLDER/scales.md, FOLDER/scales.png, and what is chosen

Read next: study/figures.py
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.cli import Parser, check_ranges, command
from common.files import atomic_write, read_json, write_json
from guidance import ORDERS
from study.curves import load_judges, measure
from study.evaluate import TINY, Models, generate, test_set
from study.results import cell, keep_settings, markdown, number, processor
from training import plot

TEXTS, REFS = (1.0, 1.5, 2.0, 3.0, 4.0), (1.0, 2.0, 2.5, 3.0, 4.0)
COLUMNS = ("prompt", "shape", "similarity", "colors", "traits_top1", "position", "pose",
           "ref_pixels")
SHARED = ("people", "seeds", "num_inference_steps", "split")
WITHIN, LEAST = 0.01, 0.20  # of the rule


def run(args: argparse.Namespace) -> None:
    """Every result that is missing."""
    digest = hashlib.sha256(args.checkpoint_path.read_bytes()).hexdigest()[:16]
    shared = {name: getattr(args, name) for name in SHARED} | {"checkpoint_path": digest}
    keep_settings(args.folder / "settings.json", shared, ["checkpoint_path"])
    m, (nets, reader) = Models(args.checkpoint_path, args.gemma_root), load_judges(args)
    data = test_set(args.people, 1, m.numbers["height"], m.numbers["num_frames"], args.split)
    people = torch.arange(args.people).repeat(len(args.seeds))
    each = ("who", "setting", "ref_setting", "action", "ref_pose")
    repeated = data | {name: data[name][people] for name in each}       # a row for each clip
    for order, text, ref in tqdm(list(itertools.product(args.orders, TEXTS, REFS)), desc="scales",
                                 unit="setting"):
        path = args.folder / f"{order}-text-{text:g}-ref-{ref:g}.json"
        if path.exists():
            continue
        started = time.time()
        video = [generate(m, data["captions"], data["references"], argparse.Namespace(
            text_scale=text, ref_scale=ref, order=order, rescale=0.0, seed=seed, dtype="float32",
            num_inference_steps=args.num_inference_steps,
            guide_range=m.numbers["guide_range"], guide_every=m.numbers["guide_every"]),
            f"{order} {text:g} {ref:g}") for seed in args.seeds]
        found = measure(torch.cat(video), repeated, nets, reader)
        write_json(path, {"order": order, "text_scale": text, "ref_scale": ref,
                          "processor": processor(), "seconds": round(time.time() - started, 1),
                          "scores": {name: number(value) for name, value in found.items()}})


# ------------------------------------------------------------ the rule, the curves


def choose(records: list[dict]) -> dict:
    """The setting that the rule of the header takes."""
    best = max(r["scores"]["prompt"] for r in records)
    good = [r for r in records if r["scores"]["prompt"] >= best - WITHIN]
    few = sorted(r["scores"]["position"] for r in good)
    most = max(LEAST, few[len(few) // 10])
    return max((r for r in good if r["scores"]["position"] <= most),
               key=lambda r: r["scores"]["shape"] + r["scores"]["similarity"])


def front(records: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(prompt accuracy in %, score): what no other of these settings beats in both."""
    points = sorted(((r["scores"]["prompt"], r["scores"][name]) for r in records), reverse=True)
    kept: list[tuple[float, float]] = []
    for prompt, value in points:  # from the best prompt down: only a better face may follow
        if not kept or value > kept[-1][1]:
            kept.append((100 * prompt, value))
    return tuple(map(list, zip(*kept[::-1], strict=True)))


def describe(r: dict) -> str:
    return f"{r['order']}, text {r['text_scale']:g}, reference {r['ref_scale']:g}"


def table(args: argparse.Namespace) -> None:
    """Print and write FOLDER/scales.md and FOLDER/scales.png from the results that are there."""
    records = [read_json(path) for path in sorted(args.folder.glob("*-text-*.json"))]
    if not records:
        raise ValueError(f"expected results in {args.folder}, got none; "
                         "`python -m study.scales run` makes them")
    of = {order: [r for r in records if r["order"] == order] for order in ORDERS}
    of = {order: found for order, found in of.items() if found}
    rows = [[describe(r), *(cell(name, r["scores"][name]) for name in COLUMNS)]
            for r in sorted(records, key=lambda r: (ORDERS.index(r["order"]), r["text_scale"],
                                                    r["ref_scale"]))]
    chosen = [f"By the rule, of {order}: {describe(choose(found))}." for order, found in of.items()]
    lines = [f"{len(records)} settings, {sum(r['seconds'] for r in records) / 3600:.2f} hours of "
             f"one thread ({', '.join(sorted({r['processor'] for r in records}))}).", "",
             *chosen, f"Of all: **{describe(choose(records))}**.", "",
             *markdown(["setting", *(name.replace("_", " ") for name in COLUMNS)], rows)]
    atomic_write(args.folder / "scales.md", lambda p: p.write_text("\n".join(lines) + "\n"))
    panels = [plot.chart({order: front(found, name) for order, found in of.items()},
                         f"{name}, the best at each accuracy", "prompt accuracy in %")
              for name in ("shape", "similarity")]
    sheet = plot.beside(panels)
    atomic_write(args.folder / "scales.png", lambda p: sheet.save(p, format="PNG"))
    print("\n".join(lines))


# ------------------------------------------------------------ the command


def parse_arguments(line: list[str] | None = None) -> argparse.Namespace:
    p = Parser("study.scales", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("what", choices=["run", "table"], help="make and score clips; make tables")
    add("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    add("--people", type=int, default=16)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the noise")
    add("--split", choices=["test", "val"], default="val")
    add("--num-inference-steps", type=int, help="default: the checkpoint's")
    add("--folder", type=Path, default=Path("runs/scales"))
    add("--checkpoint-path", type=Path, default=TINY / "model.safetensors")
    add("--gemma-root", type=Path, default=TINY / "gemma")
    for flag, name in (("--eval-encoder", "eval_encoder"), ("--head", "head_pose"),
                       ("--traits", "traits")):
        add(flag, type=Path, default=TINY / f"{name}.safetensors")
    return p.parse_args(line)


def main(line: list[str] | None = None) -> int:
    args = parse_arguments(line)

    def do() -> None:
        check_ranges(args, {"people": (3, 1e6), "seeds": (0, 2**31),
                            "num_inference_steps": (1, 10_000)})
        run(args) if args.what == "run" else table(args)
    return command("study.scales", do)


if __name__ == "__main__":
    sys.exit(main())
