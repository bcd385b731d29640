"""Kill a training at random moments, go on, and compare with a run that nobody touched.

    python -m bench.kill_runs FOLDER [--kills 20 --steps 20]

writes 12 clips of the world as video files, trains on them once undisturbed (on the bundled
checkpoint), then as many times as there are kills: SIGKILL after a random part of the undisturbed
run's time, start again, SHA-256 of everything in the last state (weights, average, optimiser).
Every step is saved, so that many kills hit a file being written. A run that was done before its
kill came does not count.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.clip_world import ROOT, train_words
from training.run import load_state


def digest(out: Path) -> str:
    """Of all numbers in the newest state."""
    tensors, _ = load_state(max(out.glob("state-*.safetensors")))
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    folder, draw = args.folder.resolve(), random.Random(args.seed)
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
             "env": {**os.environ, "OMP_NUM_THREADS": "1"}}

    def command(out: Path, steps: int = args.steps) -> list[str]:
        return [sys.executable, *train_words(folder, out), "--batch", "2", "--steps", str(steps),
                "--save-seconds", "0", "--validate-every", "1000000"]

    for out in folder.glob("run-*"):
        shutil.rmtree(out)
    subprocess.run(command(folder / "run-warm-up", 1), check=True, **quiet)  # fills the cache
    start = time.time()
    subprocess.run(command(folder / "run-straight"), check=True, **quiet)
    seconds, wanted = time.time() - start, digest(folder / "run-straight")
    print(f"straight: {seconds:.1f} s, {wanted[:16]}", flush=True)
    equal = kills = 0
    while kills < args.kills:
        out, moment = folder / f"run-{kills:02d}", draw.random() * seconds
        process = subprocess.Popen(command(out), **quiet)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            shutil.rmtree(out)
            continue
        kills += 1
        newest = max((int(path.name[6:14]) for path in out.glob("state-*.safetensors")),
                     default="none")
        subprocess.run(command(out), check=True, **quiet)
        found = digest(out)
        equal += found == wanted
        print(f"kill {kills}: after {moment:.1f} s, newest state {newest}, in the end {found[:16]}",
              flush=True)
        shutil.rmtree(out)
    print(f"{equal} of {args.kills} equal")
    return equal != args.kills


if __name__ == "__main__":
    sys.exit(main())
