"""Kill a training at random moments, go on, and compare: the weights must be those of a run that nobody touched.

    python -m bench.kill_runs FOLDER [--kills 20 --steps 20]

writes 12 clips of the world as video files, trains on them once undisturbed (on the bundled checkpoint), then as many
times as there are kills: SIGKILL after a random part of the undisturbed run's time, start again, SHA-256 of everything
in the last state (weights, average, optimiser). Every step is saved, so that many kills hit a file being written. A run
that was done before its kill came does not count.
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

ROOT = Path(__file__).resolve().parents[1]

from bench.clip_world import write_clips
from training.run import load_state


def command(folder: Path, out: Path, steps: int) -> list[str]:
    tiny = ROOT / "weights" / "tiny"
    words = [sys.executable, "train.py", "--manifest", folder / "clips" / "manifest.jsonl", "--cache", folder / "cache",
             "--buckets", "64x64x9,64x64x1", "--frame-rate", 8, "--checkpoint-path", tiny / "model.safetensors",
             "--gemma-root", tiny / "gemma", "--face", tiny / "face.safetensors", "--steps", steps, "--batch", 2,
             "--save-seconds", 0, "--validate-every", 10**6, "--out", out]
    return [str(word) for word in words]


def digest(out: Path) -> str:
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
    if not (folder / "clips" / "manifest.jsonl").exists():
        write_clips(folder / "clips", people=4, clips=12)
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
             "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    for out in folder.glob("run-*"):
        shutil.rmtree(out)
    subprocess.run(command(folder, folder / "run-warm-up", 1), check=True, **quiet)  # fills the cache
    start = time.time()
    subprocess.run(command(folder, folder / "run-straight", args.steps), check=True, **quiet)
    seconds, wanted = time.time() - start, digest(folder / "run-straight")
    print(f"straight: {seconds:.1f} s, {wanted[:16]}", flush=True)
    equal = kills = 0
    while kills < args.kills:
        out = folder / f"run-{kills:02d}"
        process = subprocess.Popen(command(folder, out, args.steps), **quiet)
        wait = draw.random() * seconds
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:
            shutil.rmtree(out)
            continue
        kills += 1
        states = sorted(path.name[6:14] for path in out.glob("state-*.safetensors"))
        subprocess.run(command(folder, out, args.steps), check=True, **quiet)
        found = digest(out)
        equal += found == wanted
        print(f"kill {kills}: after {wait:.1f} s, newest state {int(states[-1]) if states else 'none'}, in the end "
              f"{found[:16]}", flush=True)
        shutil.rmtree(out)
    print(f"{equal} of {args.kills} equal")
    return equal != args.kills


if __name__ == "__main__":
    sys.exit(main())
