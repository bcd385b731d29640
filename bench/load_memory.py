"""Measure the memory that loading the transformer out of a large checkpoint takes.

    python -m bench.load_memory          a file of 4.2 GB, written, loaded three times, deleted
    python -m bench.load_memory --gigabytes 8 --path big.safetensors --keep

Linux only; needs 5 GB of disk. The file has LTX-2.3's names and 48 blocks at a smaller width: about
60 % of it is the video transformer, the rest is the sound's half, mixed between (the tensors stand
in the order of their names). The used part is a repeated pattern without a zero, the rest is NaN
throughout, so neither can be stored or skipped by a trick of the file system.

What is measured. A fresh process imports torch and model.py (baseline), builds the transformer on
the meta device, loads it, and then counts the zeros of every weight, which needs every page of it.
The peak (VmHWM) is the largest number of bytes that the process ever had in memory, pages mapped
from the file included; peak minus baseline is what loading cost. The same weights held twice, a
model of random numbers first, or the sound's half would all show.

dtype None and bf16 keep the stored numbers: at most the used part + 15 % (exit status 1 above it).
float32 doubles them, so twice the used part is what the result itself needs; that has no limit.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ltx.checkpoint import load_weights, read_metadata
from model import TransformerConfig, VideoTransformer

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "model.diffusion_model."
SHARE = 0.6  # of the file is the video transformer
LIMIT = 1.15


def write_large(path: Path, gigabytes: float) -> tuple[int, int]:
    """Write the file; returns its size and the used part of it, in bytes."""
    from bench import official  # only the writing process needs the tables

    full = 2 * 13.12e9  # bytes of the transformer at its full width of 4096
    width = 4096 * math.sqrt(SHARE * gigabytes * 1e9 / full)
    config = official.narrow_config(heads=round(width / 64), head_dim=64)
    with torch.device("meta"):
        model = VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"]))
    shapes = {PREFIX + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    rng, pattern = np.random.default_rng(0), {}
    # bf16 between 0.008 and 0.03, and float32: never zero
    half = np.uint16(0x3C00) + rng.integers(0, 0x100, 1 << 19, np.uint16)
    single = rng.uniform(0.01, 0.03, 1 << 18).astype(np.float32)
    for name in shapes:
        pattern[name] = single if official.stored_type(name) is torch.float32 else half
    shapes |= official.audio(config)
    stored = sum(math.prod(shape) * official.stored_type(name).itemsize
                 for name, shape in shapes.items())
    for i in range(max(0, math.ceil((gigabytes * 1e9 - stored) / 2**26))):
        shapes[f"vocoder.filler.{i}.weight"] = (2**25,)  # 2**26 bytes
    rows = [(name, official.stored_type(name), shapes[name]) for name in sorted(shapes)]
    metadata = {"config": json.dumps(config), "model_version": "2.3.0"}
    used = official.write_streamed(path, rows, metadata, pattern)
    return path.stat().st_size, used


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"expected {field} in /proc/self/status, got none; run this on Linux")


def load_here(path: Path, dtype: str) -> dict:
    """Load in this process, which should be a fresh one: bytes, zeros of the weights, seconds."""
    baseline, start = resident("VmRSS"), time.perf_counter()
    config = TransformerConfig.from_checkpoint(read_metadata(path)["config"]["transformer"])
    with torch.device("meta"):
        model = VideoTransformer(config)
    load_weights(model, path, PREFIX, dtype=None if dtype == "None" else getattr(torch, dtype))
    loaded = time.perf_counter() - start
    weights = list(model.state_dict().values())
    zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in weights)
    finite = all(bool(tensor.sum().isfinite()) for tensor in weights)  # NaN is the sound's half
    return {"baseline": baseline, "peak": resident("VmHWM"), "zeros": zeros, "finite": finite,
            "loaded": loaded, "touched": time.perf_counter() - start,
            "file": resident("RssFile"), "anonymous": resident("RssAnon")}


def load_in_fresh_process(path: Path, dtype: str = "None") -> dict:
    command = [sys.executable, "-m", "bench.load_memory", "--load", str(path), dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def report(path: Path, gigabytes: float) -> int:
    start = time.perf_counter()
    size, used = write_large(path, gigabytes)
    print(f"file      {size / 1e6:8.0f} MB, written in {time.perf_counter() - start:.0f} s")
    print(f"used part {used / 1e6:8.0f} MB ({used / size:.0%}), limit {LIMIT * used / 1e6:.0f} MB")
    print(f"{'dtype':10s}{'baseline':>9s}{'peak':>7s}{'cost':>7s}{'of used part':>14s}"
          "   at the end: file, anonymous; seconds to load, to touch")
    status = 0
    for dtype in ("None", "bfloat16", "float32"):
        found = load_in_fresh_process(path, dtype)
        cost = found["peak"] - found["baseline"]
        bad = (found["zeros"] or not found["finite"]
               or (dtype != "float32" and cost > LIMIT * used))
        status |= int(bool(bad))
        print(f"{dtype:10s}{found['baseline'] / 1e6:9.0f}{found['peak'] / 1e6:7.0f}"
              f"{cost / 1e6:7.0f}{cost / used:14.3f}   {found['file'] / 1e6:.0f}, "
              f"{found['anonymous'] / 1e6:.0f}; {found['loaded']:.2f}, {found['touched']:.1f}"
              + ("   TOO MUCH OR WRONG" if bad else ""))
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--path", type=Path, help="where to write the file (default: a temporary folder)")
    add("--gigabytes", type=float, default=4.2, help="size of the file (default: %(default)s)")
    add("--keep", action="store_true", help="leave the file there (default: delete it)")
    add("--load", nargs=2, metavar=("PATH", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load_here(Path(args.load[0]), args.load[1])))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = args.path or Path(folder) / "large.safetensors"
        try:
            return report(path, args.gigabytes)
        finally:
            if not args.keep:
                path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
