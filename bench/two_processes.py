"""One process and two, the same clips in every step: how far apart are losses and weights?

    python -m bench.two_processes FOLDER [--steps 20]

writes 12 clips of the world as video files and trains on the bundled checkpoint (LoRA at its
default rate, float32) in five ways: four clips at once, two and two (--accumulate), two processes
with copies (ddp), two processes with shards (fsdp), and shards for the first half, then one
process. Four clips at once are summed up in another order than two and two, and AdamW divides by
the size of a gradient, so that rounding shows where a gradient is almost 0. The last column is
against "two and two", where every sum is the same.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.clip_world import ROOT, train_words
from training.plot import read_log
from training.run import load_state

ONE = [sys.executable]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
HALVES = ["--batch", 2, "--accumulate", 2]
WAYS = {"one process, 2 + 2 clips": (ONE, *HALVES),
        "two processes, copies": (TWO, "--batch", 2, "--parallel", "ddp"),
        "two processes, shards": (TWO, "--batch", 2, "--parallel", "fsdp")}


def train(out: Path, launcher: list[str], *flags: object) -> None:
    words = [*launcher, *train_words(out.parent, out), "--precision", "fp32", "--final-lr", 1,
             *flags]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def differences(a: Path, b: Path, steps: int) -> list[float]:
    """Largest absolute difference of the logged losses, the weights, their average, AdamW."""
    first, second = (load_state(out / f"state-{steps:08d}.safetensors")[0] for out in (a, b))
    assert first.keys() == second.keys()
    lines = zip(read_log(a / "log.jsonl"), read_log(b / "log.jsonl"), strict=True)
    losses = max(abs(x[k] - y[k]) for x, y in lines
                 for k in ("loss", "fm", "face", "id", "gradient") if k in x)
    return [losses, *(max((first[k] - second[k]).abs().max().item()
                          for k in first if k.startswith(part))
                      for part in ("model.", "ema.", "adam."))]


def show(name: str, folder: Path, out: Path, steps: int) -> float:
    """Print a row of the table; returns the largest difference against four clips at once."""
    found = differences(folder / "run-straight", out, steps)
    last = differences(folder / "run-0", out, steps)[1]
    cells = [name, *(f"{x:.1e}" for x in [*found, last])]
    print("| " + " | ".join(cells) + " |", flush=True)
    return max(found)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--steps", type=int, default=20, help="a multiple of 20, as logs have lines")
    args = p.parse_args()
    folder, steps, half = args.folder.resolve(), args.steps, args.steps // 2
    for out in folder.glob("run-*"):
        shutil.rmtree(out)
    train(folder / "run-straight", ONE, "--batch", 4, "--steps", steps)
    print(f"after {steps} steps, against one process with 4 clips\n\n"
          "| | losses | weights | average | AdamW | weights against 2 + 2 |\n|" + " --- |" * 6)
    worst = []
    for i, (name, (launcher, *flags)) in enumerate(WAYS.items()):
        train(folder / f"run-{i}", launcher, *flags, "--steps", steps)
        worst.append(show(name, folder, folder / f"run-{i}", steps))
    moved = folder / "run-moved"
    train(moved, TWO, "--batch", 2, "--steps", half)
    train(moved, ONE, *HALVES, "--steps", steps)
    name = f"shards for {half} steps, then one process, 2 + 2"
    worst.append(show(name, folder, moved, steps))
    return max(worst) > 1e-5


if __name__ == "__main__":
    sys.exit(main())
