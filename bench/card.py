"""What a training step of the 22B model takes on this machine's card, by option, beside the plan.

A file with the published names, types and shapes is laid out without its numbers (a sparse file of
46 GB takes a megabyte of disk), and train.py's own loader reads it; instead of the file's zeros,
for which a card is faster, each tensor is filled with random numbers where it is loaded. Then whole
steps run as train.py runs them: reference encoded, forward, three losses, backward, clipping,
AdamW, average. The clip is random, 512x768x121, its face a sixth of the picture's height.

    python -m bench.card                  a card of 80 GB: five rows in a minute or two
    python -m bench.card --layers 4       fewer blocks, for a smaller card; the plan follows
    python -m bench.card --checkpoint-path weights/tiny/base.safetensors       also on a CPU
    python -m bench.card --rows "" "--quantization fp8-cast"       other options of train.py

Peak is what PyTorch's allocator had given out at the worst moment (torch.cuda.max_memory_allocated)
of the second step or later, when AdamW's averages are there. Blocks that wait on a disk cannot be
measured so: there is no file to read. tests/test_fake_cuda.py runs the same steps without a card.
"""

import argparse
import gc
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import train
from bench import official
from clips.dataset import Batch
from clips.face import FaceNet, template
from clips.frames import Bucket
from common.cli import Parser
from common.seeds import seeded
from losses import pool_face_mask
from ltx.checkpoint import TYPES, TensorFile, read_metadata
from ltx.load import INFERENCE
from ltx.plan import RESERVE
from ltx.text import DEFAULT_TEXT_LENGTH
from ltx.vae import VideoVAE
from model import VideoTransformer
from reference import predict_velocity
from training.frozen import check_memory_options, frozen_type, load_base
from training.optim import EMA
from training.plan import training_plan

SIZE = (512, 768, 121)  # height, width, frames
ROWS = ("", "--w-id 0", "--quantization fp8-cast", "--offload cpu",
        "--offload cpu --quantization fp8-cast")
FACE = (330, 60, 415, 145)  # left, top, right, bottom: a sixth of the height
RECOGNISER = (3, 13, 30, 3)  # blocks of an iresnet100


def published_file(folder: Path, layers: int = 48) -> Path:
    """The 22B checkpoint's video half with `layers` blocks; holes in place of its numbers."""
    config = official.ltx_config()
    config["transformer"] = config["transformer"] | {"num_layers": layers}
    names = {name: shape for name, shape in official.video().items()
             if (at := re.search(r"transformer_blocks\.(\d+)", name)) is None
             or int(at[1]) < layers}
    rows = [(name, official.stored_type(name), shape) for name, shape in names.items()]
    metadata = {"config": json.dumps(config), "model_version": "2.3.0"}
    folder.mkdir(exist_ok=True)
    return official.write_sparse(folder / "ltx-2.3-22b-dev.safetensors", rows, metadata)


@contextmanager
def random_numbers() -> Iterator[None]:
    """Inside, every tensor read from a file is random, made where it is wanted."""
    def get_tensor(self: TensorFile, name: str) -> Tensor:
        entry = self.table[name]
        return torch.randn(entry.shape, dtype=TYPES[entry.type], device=self.device) * 0.02

    before, TensorFile.get_tensor = TensorFile.get_tensor, get_tensor
    try:
        yield
    finally:
        TensorFile.get_tensor = before


def random_clips(size: tuple[int, int, int], channels: int, context: tuple[int, int],
                 scales: tuple[int, int], box: tuple[float, ...], count: int = 1) -> Batch:
    """`count` clips with a face at rest: box in pixels, landmarks in it; context (tokens, width);
    scales of the VAE in time and space."""
    (h, w, frames), (time_scale, s), g = size, scales, seeded(0)
    grid = (frames - 1) // time_scale + 1, h // s, w // s
    boxes = torch.tensor(box, dtype=torch.float32).expand(count, frames, 4)
    left, top, right, bottom = (int(edge) for edge in box)
    face = torch.zeros(count, frames, h, w)
    face[:, :, top:bottom, left:right] = 1
    marks = template(right - left) + torch.tensor([left, top])             # (5, 2)
    marks = marks.expand(count, frames, 5, 2)
    return Batch(index=list(range(count)), grid=grid, frame_rate=24.0,
                 x0=torch.randn(count, grid[0] * grid[1] * grid[2], channels, generator=g),
                 context=torch.randn(count, *context, generator=g),
                 face=pool_face_mask(face, time_scale, s), boxes=boxes, landmarks=marks,
                 seen=torch.ones(count, frames, dtype=torch.bool),
                 reference=torch.rand(count, 3, h, w, generator=g) * 2 - 1,
                 reference_box=boxes[:, 0], reference_landmarks=marks[:, 0],
                 reference_seen=torch.ones(count, dtype=torch.bool))


class Setting(NamedTuple):
    """What train.losses is given, the clips last."""

    args: argparse.Namespace
    model: VideoTransformer
    frozen: train.Frozen
    clips: Batch
    draws: train.Draws

    def losses(self) -> tuple[Tensor, Tensor, Tensor]:
        return train.losses(self.args, self.model, predict_velocity, self.frozen, self.clips,
                            self.draws)


def prepare(checkpoint: Path, flags: list[str], device: str, size: tuple[int, int, int] = SIZE,
            face: tuple[float, ...] = FACE, count: int = 1) -> Setting:
    """train.py's model for a LoRA, and clips that keep their reference, at a noise level where
    identity is judged."""
    args = train.parse_arguments(["--checkpoint-path", str(checkpoint), "--no-full", "--batch",
                                  f"{count}", "--gradient-checkpointing", *flags])
    args.precision = args.precision or "bf16"
    check_memory_options(args)
    settings = read_metadata(checkpoint)["config"]["transformer"]
    vae = VideoVAE.load(checkpoint, device, frozen_type(args))
    net = FaceNet(RECOGNISER).eval().requires_grad_(False).to(device) if args.w_id > 0 else None
    model = load_base(args, device, sharded=False)
    tokens, width = settings.get("text_max_length", DEFAULT_TEXT_LENGTH), model.config.dim
    clips = random_clips(size, vae.latent_channels, (tokens, width),
                         (vae.time_scale, vae.space_scale), face, count)
    draws = train.draw(args, clips, [seeded(0, 0, k) for k in range(count)])
    draws.sigma[:], draws.keep_ref[:], draws.keep_text[:] = 0.4, True, True
    draws.frame[:] = size[2] // 2 if args.w_id > 0 else -1
    frozen = train.Frozen(vae, net, torch.zeros(tokens, width, device=device))
    return Setting(args, model, frozen, clips, draws)


def stepper(setting: Setting) -> Callable[[], float]:
    """A function that takes one whole step of training and returns its loss."""
    args, model, _, clips, draws = setting
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    ema = EMA(named, train.EMA_DECAY, None if args.full else "cpu")
    optimizer = train.make_optimizer(args, named)

    def step() -> float:
        (fm, _, _), _ = train.descend(args, clips, draws, lambda *_: setting.losses(), 1)
        nn.utils.clip_grad_norm_(optimizer.parameters(), train.CLIP)
        optimizer.step(1.0)
        model.zero_grad(set_to_none=True)
        ema.update(named, 0)
        return fm
    return step


def measure(step: Callable[[], float], device: str, steps: int) -> tuple[float, float]:
    """(seconds of a step, GB at the worst moment of it), after two that do not count."""
    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    step(), step()
    wait()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
    return (time.perf_counter() - start) / steps, peak


def planned(checkpoint: Path, flags: str, size: tuple[int, int, int]) -> str:
    """What training/plan.py says, without its allowance."""
    args = train.parse_arguments(["--checkpoint-path", str(checkpoint), *shlex.split(flags)])
    option = " ".join(word for word in shlex.split(flags) if word not in ("--w-id", "0"))
    needs = training_plan(read_metadata(checkpoint)["config"], Bucket(*size), args).needs
    found = needs.get(option or "no flag")
    return f"{(sum(found.values()) - RESERVE) / 1e9:.1f}" if found else "-"


def main() -> int:
    parser = Parser("bench.card", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--checkpoint-path", type=Path, help="a real file instead, at its own size")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="FLAGS", help="train.py's")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.checkpoint_path:
        parser.error("expected a CUDA device, got none; run it where one is, or give a small file "
                     "with --checkpoint-path")
    size, steps, numbers = SIZE, 2, random_numbers()
    if args.checkpoint_path:
        usual = {**INFERENCE, **read_metadata(args.checkpoint_path)["config"].get("inference", {})}
        size, steps, numbers = tuple(usual[k] for k in ("height", "width", "num_frames")), 20, None
    face = tuple(side * size[0] / SIZE[0] for side in FACE)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if numbers else device}, "
          f"{args.checkpoint_path or f'{args.layers} blocks'}, {size[1]}x{size[0]}x{size[2]}, LoRA "
          "of rank 32, batch 1\n\n| train.py | seconds per step | peak GB | planned GB |\n"
          "|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, numbers or nullcontext():
        checkpoint = args.checkpoint_path or published_file(Path(folder), args.layers)
        for flags in args.rows:
            step = stepper(prepare(checkpoint, shlex.split(flags), device, size, face))
            seconds, peak = measure(step, device, steps)
            print(f"| {flags or 'no flag'} | {seconds:.3g} | {peak:.1f} | "
                  f"{planned(checkpoint, flags, size)} |", flush=True)
            del step
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
