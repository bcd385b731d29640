"""One process and two, the same clips in every step: how far apart are losses and weights in the end?

    python -m bench.two_processes FOLDER [--steps 20]

writes 12 clips of the world as video files and trains on the bundled checkpoint (LoRA at its default rate, float32) in five
ways: four clips at once, two and two (--accumulate), two processes with copies (ddp), two processes with shards (fsdp),
and shards for the first half, then one process. Four clips at once are summed up in another order than two and two, and
AdamW divides by the size of a gradient, so that rounding shows where a gradient is almost 0. The last column is against
"two and two", where every sum is the same.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

from bench.clip_world import write_clips
from training.plot import read_log
from training.run import load_state

TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


def train(folder: Path, out: Path, launcher: list[str], *flags: object) -> None:
    tiny = ROOT / "weights" / "tiny"
    words = [*launcher, "train.py", "--manifest", folder / "clips" / "manifest.jsonl", "--cache", folder / "cache",
             "--buckets", "64x64x9,64x64x1", "--frame-rate", 8, "--checkpoint-path", tiny / "model.safetensors",
             "--gemma-root", tiny / "gemma", "--face", tiny / "face.safetensors", "--precision", "fp32", "--warmup", 2,
             "--final-lr", 1, "--out", out, *flags]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def differences(a: Path, b: Path, steps: int) -> list[float]:
    """Largest absolute difference of the logged losses, the weights, their average, AdamW's state."""
    first, second = (load_state(out / f"state-{steps:08d}.safetensors")[0] for out in (a, b))
    assert first.keys() == second.keys()
    losses = [abs(x[k] - y[k]) for x, y in zip(read_log(a / "log.jsonl"), read_log(b / "log.jsonl"), strict=True)
              for k in ("loss", "fm", "face", "id", "gradient") if k in x]
    return [max(losses), *(max((first[k] - second[k]).abs().max().item() for k in first if k.startswith(part))
                           for part in ("model.", "ema.", "adam."))]


def show(name: str, straight: Path, halves: Path, out: Path, steps: int) -> float:
    """Print a row of the table; returns the largest difference against `straight`."""
    found = differences(straight, out, steps)
    print("| " + " | ".join([name, *(f"{x:.1e}" for x in [*found, differences(halves, out, steps)[1]])]) + " |", flush=True)
    return max(found)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--steps", type=int, default=20)
    args = p.parse_args()
    folder, steps = args.folder.resolve(), args.steps
    if not (folder / "clips" / "manifest.jsonl").exists():
        write_clips(folder / "clips", people=4, clips=12)
    for out in folder.glob("run-*"):
        shutil.rmtree(out)
    ways = {"one process, 2 + 2 clips": ([], "--batch", 2, "--accumulate", 2),
            "two processes, copies": (TWO, "--batch", 2, "--parallel", "ddp"),
            "two processes, shards": (TWO, "--batch", 2, "--parallel", "fsdp")}
    straight = folder / "run-straight"
    train(folder, straight, [sys.executable], "--batch", 4, "--steps", steps)
    print(f"after {steps} steps, against one process with 4 clips\n")
    print("| | losses | weights | average | AdamW | weights against 2 + 2 |\n|" + " --- |" * 6)
    worst = 0.0
    for i, (name, (launcher, *flags)) in enumerate(ways.items()):
        train(folder, folder / f"run-{i}", launcher or [sys.executable], *flags, "--steps", steps)
        worst = max(worst, show(name, straight, folder / "run-0", folder / f"run-{i}", steps))
    moved = folder / "run-moved"
    train(folder, moved, TWO, "--batch", 2, "--steps", steps // 2)
    train(folder, moved, [sys.executable], "--batch", 2, "--accumulate", 2, "--steps", steps)
    name = f"shards for {steps // 2} steps, then one process, 2 + 2"
    worst = max(worst, show(name, straight, folder / "run-0", moved, steps))
    return worst > 1e-5


if __name__ == "__main__":
    sys.exit(main())
