"""Is anything lost between a file and the model? One training through video files, one without.

The idea. clip_world.py writes clips whose every pixel is known. The training that reads them goes
through everything that can go wrong: containers, codecs, frame rates, sizes, rotation, cropping,
the cache. The other training is the same command with two functions replaced by the renderer,
`load_clip` of clips/cache.py (the clip) and `frame_at` of clips/manifest.py (the frame that becomes
a reference), so it never sees a codec. Both are validated on the same clips, which come from the
renderer. If both reach the same validation loss, within what another seed changes, the path is
sound.

    python -m bench.clip_path FOLDER [--steps 600 --every 50]

writes FOLDER/train, FOLDER/validation (clips), FOLDER/files, FOLDER/direct, FOLDER/files-seed-1
(runs of train.py) and FOLDER/curves.png, and prints the two losses of all three. Every run resumes.

Conventions. "direct" pictures are rendered at 64x64 at the moments of the stored frames that a
reader finds nearest.

Read next: bench/clip_world.py
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

import train
from bench.clip_world import ROOT, SIZE, plan_clips, render_at, stored_time, write_clips
from clips import cache, frames, manifest
from training import plot

SETS = {"train": (24, 72, 0), "validation": (24, 24, 1)}  # people, clips, seed
RUNS = {"files": (["validation"], 0), "direct": (["train", "validation"], 0),
        "files-seed-1": (["validation"], 1)}  # sets that come from the renderer, seed


@contextlib.contextmanager
def renderer_instead_of_files(folder: Path, sets: Sequence[str]):
    """Inside, clips and references of these sets come from the renderer. `used` counts them."""
    known = {(folder / name / "clips" / f"{clip.name}.{clip.suffix}").resolve(): clip
             for name in sets for clip in plan_clips(*SETS[name])}
    used = {"clips": 0, "references": 0}
    read_clip, read_frame = frames.load_clip, frames.frame_at

    def load_clip(path: Path, bucket: frames.Bucket, *how: object) -> torch.Tensor:
        clip = known.get(path)
        if clip is None:
            return read_clip(path, bucket, *how)
        used["clips"] += 1
        times = [stored_time(clip, time) for time in clip.direct_times][: bucket.frames]
        pictures, _ = render_at(clip, times, SIZE, SIZE)
        return torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1  # (3, F, h, w)

    def frame_at(path: Path, times: list[float], index: int) -> frames.Frame:
        clip = known.get(path)
        if clip is None:
            return read_frame(path, times, index)
        used["references"] += 1
        pictures, _ = render_at(clip, [clip.times[index]], *clip.size)
        picture = Image.fromarray(np.ascontiguousarray(pictures[0]))
        return frames.Frame(times[index], times[index], picture.height, picture.width, picture)

    with mock.patch.object(cache, "load_clip", load_clip), \
            mock.patch.object(manifest, "frame_at", frame_at):
        yield used


def run(folder: Path, name: str, args: argparse.Namespace) -> list[dict]:
    """One training, everything but the sizes at its default; the lines of its log."""
    direct, seed = RUNS[name]
    words = ["--checkpoint-path", args.checkpoint_path, "--gemma-root", args.gemma_root,
             "--face", args.face, "--manifest", folder / "train" / "manifest.jsonl",
             "--validation", folder / "validation" / "manifest.jsonl",
             "--buckets", "64x64x9,64x64x1", "--frame-rate", 8,
             "--cache", folder / f"cache-{name.split('-')[0]}", "--out", folder / name,
             "--steps", args.steps, "--batch", 4, "--lr", 1e-3, "--seed", seed,
             "--validate-every", args.every, "--no-gradient-checkpointing"]
    with renderer_instead_of_files(folder, direct) as used:
        train.train(train.parse_arguments([str(word) for word in words]))
    print(f"{name}: {used['clips']} clips and {used['references']} references "
          "came from the renderer")
    return plot.read_log(folder / name / "log.jsonl")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--every", type=int, default=50, help="steps between validations")
    p.add_argument("--checkpoint-path", type=Path, default=ROOT / "runs/base.safetensors")
    p.add_argument("--gemma-root", type=Path, default=ROOT / "runs/gemma")
    p.add_argument("--face", type=Path, default=ROOT / "runs/face.safetensors")
    args = p.parse_args()
    folder = args.folder.resolve()
    for name, numbers in SETS.items():
        if not (folder / name / "manifest.jsonl").exists():
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_clips(folder / name, *numbers)
    logs = {name: [line for line in run(folder, name, args) if "val_fm" in line] for name in RUNS}
    plot.curves(logs, folder / "curves.png")
    columns = [(name, term) for term in ("val_fm", "val_face") for name in RUNS]
    print(f"{'step':>6s}" + "".join(f"{f'{name} {term}':>26s}" for name, term in columns))
    by_step = {name: {line["step"]: line for line in lines} for name, lines in logs.items()}
    for step in by_step["files"]:
        values = (by_step[name].get(step, {}).get(term, float("nan")) for name, term in columns)
        print(f"{step:6d}" + "".join(f"{value:26.4f}" for value in values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
