"""Is anything lost between a file and the model? One training through video files, one on the very pictures.

The idea. clip_world.py writes clips whose every pixel is known. The training that reads them goes through everything
that can go wrong: containers, codecs, frame rates, sizes, rotation, cropping, the cache. The other training is the same
command with two functions replaced by the renderer, `cache.load_clip` (the clip) and `clips.frame_at` (the frame that
becomes a reference), so it never sees a codec. Both are validated on the same clips, which come from the renderer. If both
reach the same validation loss, within what another seed changes, the path is sound.

    python -m bench.clip_path FOLDER [--steps 600 --every 50]

writes FOLDER/train, FOLDER/validation (clips), FOLDER/files, FOLDER/direct, FOLDER/files-seed-1 (runs of train.py) and
FOLDER/curves.png, and prints the two losses of all three. Every run resumes.

Conventions. "direct" pictures are rendered at 64x64 at the moments of the stored frames that a reader finds nearest.

Read next: clip_world.py
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

ROOT = Path(__file__).resolve().parents[1]

import train
from bench.clip_world import SIZE, plan_clips, render_at, stored_time, write_clips
from clips import (
    cache,
    frames,
)
from clips import manifest as clips
from training import plot

SETS = {"train": (24, 72, 0), "validation": (24, 24, 1)}  # people, clips, seed


@contextlib.contextmanager
def renderer_instead_of_files(folder: Path, sets: Sequence[str]):
    """Inside, clips and references of these sets come from the renderer. `used` counts them."""
    known = {(folder / name / "clips" / f"{clip.name}.{clip.suffix}").resolve(): clip
             for name in sets for clip in plan_clips(*SETS[name])}
    used = {"clips": 0, "references": 0}

    def load_clip(path: Path, bucket: frames.Bucket, frame_rate: float, start: float) -> torch.Tensor:
        clip = known.get(path)
        if clip is None:
            return frames.load_clip(path, bucket, frame_rate, start)
        used["clips"] += 1
        times = [stored_time(clip, time) for time in clip.direct_times][: bucket.frames]
        pictures, _ = render_at(clip, times, SIZE, SIZE)
        return torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1         # (3, F, 64, 64)

    def frame_at(path: Path, times: list[float], index: int) -> frames.Frame:
        clip = known.get(path)
        if clip is None:
            return frames.frame_at(path, times, index)
        used["references"] += 1
        pictures, _ = render_at(clip, [clip.times[index]], *clip.size)
        picture = Image.fromarray(np.ascontiguousarray(pictures[0]))
        return frames.Frame(times[index], times[index], picture.height, picture.width, picture)

    with mock.patch.object(cache, "load_clip", load_clip), mock.patch.object(clips, "frame_at", frame_at):
        yield used


def run(folder: Path, name: str, direct: Sequence[str], seed: int, args: argparse.Namespace) -> None:
    """One training with everything at its default but the sizes; the sets named in `direct` come from the renderer."""
    words = ["--checkpoint-path", args.checkpoint_path, "--gemma-root", args.gemma_root, "--face", args.face,
             "--manifest", folder / "train" / "manifest.jsonl", "--validation", folder / "validation" / "manifest.jsonl",
             "--buckets", "64x64x9,64x64x1", "--frame-rate", 8, "--cache", folder / f"cache-{name.split('-')[0]}",
             "--out", folder / name, "--steps", args.steps, "--batch", 4, "--lr", 1e-3, "--seed", seed,
             "--validate-every", args.every, "--no-gradient-checkpointing"]
    with mock.patch.object(sys, "argv", ["train.py", *map(str, words)]), renderer_instead_of_files(folder, direct) as used:
        train.train(train.parse_arguments())
    print(f"{name}: {used['clips']} clips and {used['references']} references came from the renderer")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--every", type=int, default=50, help="steps between validations")
    for name, default in (("checkpoint-path", ROOT / "runs/base.safetensors"), ("gemma-root", ROOT / "runs/gemma"),
                          ("face", ROOT / "runs/face.safetensors")):
        p.add_argument(f"--{name}", type=Path, default=default)
    args = p.parse_args()
    folder = args.folder.resolve()
    for name, numbers in SETS.items():
        if not (folder / name / "manifest.jsonl").exists():
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_clips(folder / name, *numbers)
    run(folder, "files", ["validation"], 0, args)
    run(folder, "direct", ["train", "validation"], 0, args)
    run(folder, "files-seed-1", ["validation"], 1, args)
    logs = {name: plot.read_log(folder / name / "log.jsonl") for name in ("files", "direct", "files-seed-1")}
    validations = {name: [line for line in log if "val_fm" in line] for name, log in logs.items()}
    plot.curves(validations, folder / "curves.png")
    steps = [line["step"] for line in logs["files"] if "val_fm" in line]
    print(f"{'step':>6s}" + "".join(f"{name + ' ' + term:>26s}" for term in ("val_fm", "val_face") for name in logs))
    for step in steps:
        row = [line[term] for term in ("val_fm", "val_face") for log in logs.values() for line in log
               if line["step"] == step and term in line]
        print(f"{step:6d}" + "".join(f"{value:26.4f}" for value in row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
