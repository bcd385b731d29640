"""What the switches of train.py cost here: samples per second and peak memory, a process each.

    python -m bench.train_speed [--batch 16 --steps 30]

Each row is a fresh run of train.py on the procedural world's cached clips (`python -m toy.pretrain
render, vae, encode, base, face` first), read off its own log; the first steps, which fill caches,
are left out. Memory is the largest the process ever held, libraries, recogniser, VAE and text
encoder included.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from training.plot import read_log

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = {"trained": {"LoRA": [], "all weights": ["--full"]},
            "gradient checkpointing": {"on": [], "off": ["--no-gradient-checkpointing"]},
            "identity loss": {"on": [], "off": ["--w-id", "0"]}}


def measure(flags: list[str], steps: int, batch: int) -> tuple[float, float]:
    """(samples per second from step 10 on, GB)."""
    with tempfile.TemporaryDirectory() as out:
        words = ["--steps", steps + 1, "--batch", batch, "--out", out, "--precision", "bf16",
                 "--validate-every", 10**9, *flags]
        done = subprocess.run([sys.executable, "train.py", *map(str, words)], cwd=ROOT, text=True,
                              capture_output=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        if done.returncode:
            raise SystemExit(done.stderr[-500:])
        log = {line["step"]: line for line in read_log(Path(out) / "log.jsonl")}
    seconds = log[steps]["seconds"] - log[10]["seconds"]
    return (steps - 10) * batch / seconds, log[steps]["memory_gb"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--steps", type=int, default=30, help="a multiple of 10")
    args = p.parse_args()
    print(f"batch {args.batch}, {os.environ.get('OMP_NUM_THREADS', '1')} thread(s), bf16\n")
    print(f"| {' | '.join(SWITCHES)} | samples/s | GB |\n|{' --- |' * (len(SWITCHES) + 2)}")
    for chosen in itertools.product(*(options.items() for options in SWITCHES.values())):
        flags = [flag for _, words in chosen for flag in words]
        rate, memory = measure(flags, args.steps, args.batch)
        names = " | ".join(name for name, _ in chosen)
        print(f"| {names} | {rate:.1f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
