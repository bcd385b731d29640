"""LTX-2.3 at its full size on a small computer: a file like the published one, sampled end to end.

    python -m bench.rehearsal --folder big              60 GB of disk, about a quarter of an hour
    python -m bench.rehearsal --folder big --layers 4   a small one: 4 blocks, 4 layers of Gemma

The real weights cannot be had on every machine; their names, shapes and types can. So a checkpoint
and a Gemma folder are written with all of them (bench/official.py). What the video path reads is
filled with random numbers, the rest of the file, which is never read, is holes: zeros that take no
disk. Then `sample.py --offload disk` makes a video of two steps from them, as an owner of the real
file would: prompt, reference, guided denoising, decoding, mp4. The video is noise; that it comes
out at all, in what memory and time, is what is shown.

Measured from outside: memory that the process holds itself (RssAnon of /proc, the largest of five
readings a second; pages of files that the system caches for it can be given back at any time), and
bytes that it had read from the disk. Linux only. The tokenizer is the bundled one: Gemma's own
cannot be had without a licence. The files are deleted afterwards, unless --keep.
"""

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench import official
from common.cli import Parser, check_ranges, command
from study.results import processor

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 1 << 19  # numbers of a pattern that is repeated
NEEDED = 62e9  # bytes of both files at full size


def patterns(names: list[str]) -> dict[str, np.ndarray]:
    """Numbers for each tensor: matrices of deviation 0.01, norms and deviations around one."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(LENGTH, generator=g)
    half = (0.01 * noise).bfloat16().view(torch.int16).numpy()
    near_one = (1 + 0.01 * noise).bfloat16().view(torch.int16).numpy()
    table, positive = (0.1 * noise).numpy(), (1 + 0.01 * noise).numpy()
    out = {}
    for name in names:
        if official.stored_type(name) is torch.float32:
            out[name] = positive if "std" in name else table
        else:
            out[name] = near_one if name.endswith(("q_norm.weight", "k_norm.weight")) else half
    return out


def kept_layers(names: dict[str, tuple[int, ...]], layers: int) -> dict[str, tuple[int, ...]]:
    """Without the transformer blocks, or Gemma's layers, from `layers` on."""
    def number(name: str) -> int:
        found = re.search(r"(?:transformer_blocks|^layers)\.(\d+)\.", name)
        return int(found[1]) if found else 0
    return {name: shape for name, shape in names.items() if number(name) < layers}


def write_files(folder: Path, layers: int) -> tuple[Path, Path]:
    """The checkpoint, and the folder of the text model."""
    checkpoint, gemma = folder / "ltx-2.3-22b-dev.safetensors", folder / "gemma-3-12b-it"
    config = official.ltx_config()
    config["transformer"] = config["transformer"] | {"num_layers": layers}
    video = kept_layers(official.video(), layers)
    states = 3840 * (layers + 1)  # of Gemma's layers and of its embeddings, which are summed up
    video[official.PROJECTION + "video_aggregate_embed.weight"] = (4096, states)
    names = video | kept_layers(official.audio(config), layers)
    rows = [(name, official.stored_type(name), names[name]) for name in sorted(names)]
    metadata = {"config": json.dumps(config), "model_version": "2.3.0"}
    used = official.write_streamed(checkpoint, rows, metadata, patterns(list(video)), holes=True)
    print(f"{checkpoint.name}: {checkpoint.stat().st_size / 1e9:.1f} GB, {len(rows)} tensors, "
          f"{used / 1e9:.1f} GB of numbers, the rest holes")

    gemma.mkdir(exist_ok=True)
    text = kept_layers(official.table(official.GEMMA_PLAIN), layers)
    rows = [(f"language_model.model.{name}", torch.bfloat16, shape)
            for name, shape in text.items()]
    weights = gemma / "model.safetensors"
    used = official.write_streamed(weights, rows, {"format": "pt"},
                                   patterns([name for name, _, _ in rows]))
    settings = official.GEMMA["text_config"] | {"num_hidden_layers": layers}
    (gemma / "config.json").write_text(json.dumps(official.GEMMA | {"text_config": settings}))
    shutil.copy(ROOT / "weights" / "tiny" / "gemma" / "tokenizer.json", gemma)
    print(f"{gemma.name}: {weights.stat().st_size / 1e9:.1f} GB, {len(rows)} tensors", flush=True)
    return checkpoint, gemma


def watched(line: list[str]) -> tuple[int, float, float]:
    """Run a command: its exit status, the most memory of its own and what it read, in bytes."""
    child, most, read = subprocess.Popen(line, cwd=ROOT), 0, 0
    process = Path(f"/proc/{child.pid}")
    while child.poll() is None:
        try:
            status, disk = (process / "status").read_text(), (process / "io").read_text()
            most = max(most, int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024)
            read = int(re.search(r"\nread_bytes: (\d+)", disk)[1])
        except (OSError, TypeError):  # it has just ended
            break
        time.sleep(0.2)
    return child.wait(), most, read


def rehearse(args: argparse.Namespace) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    needed, free = NEEDED * args.layers / 48, shutil.disk_usage(args.folder).free
    if free < needed:
        raise ValueError(f"expected {needed / 1e9:.0f} GB of free disk in {args.folder}, got "
                         f"{free / 1e9:.0f}; choose another --folder, or fewer --layers")
    started, output = time.time(), args.folder / "out.mp4"
    checkpoint, gemma = write_files(args.folder, args.layers)
    print(f"written in {time.time() - started:.0f} s; {processor()}", flush=True)
    try:
        status, most, read = watched([
            sys.executable, "sample.py", "--checkpoint-path", str(checkpoint), "--gemma-root",
            str(gemma), "--ref", "examples/ada.png", "--prompt", "a person turns left at the beach",
            "--offload", "disk", "--num-inference-steps", str(args.steps), "--height",
            str(args.size[0]), "--width", str(args.size[1]), "--num-frames", str(args.size[2]),
            "--output-path", str(output.resolve()), "--device", "cpu", "--dtype", "bfloat16"])
        if status:
            raise ValueError(f"expected a video, got status {status} from sample.py; its message "
                             "stands above")
        seconds = json.loads(output.with_suffix(".json").read_text())["seconds"]
        print(f"{output.name}: {output.stat().st_size} bytes; seconds: "
              + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
              + f"; most memory of its own {most / 1e9:.1f} GB, read {read / 1e9:.1f} GB from disk")
    finally:
        if not args.keep:
            checkpoint.unlink()
            shutil.rmtree(gemma)


def main(words: list[str] | None = None) -> int:
    p = Parser("bench.rehearsal", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--folder", type=Path, required=True, help="for the files and the video")
    p.add_argument("--layers", type=int, default=48, help="of the transformer and of Gemma")
    p.add_argument("--steps", type=int, default=2)
    p.add_argument("--size", type=int, nargs=3, default=[256, 256, 9],
                   metavar=("HEIGHT", "WIDTH", "FRAMES"))
    p.add_argument("--keep", action="store_true", help="leave the files there")
    args = p.parse_args(words)

    def do() -> None:
        check_ranges(args, {"layers": (1, 48), "steps": (1, 100), "size": (1, math.inf)})
        rehearse(args)
    return command("bench.rehearsal", do)


if __name__ == "__main__":
    sys.exit(main())
