"""How the bundled weights were made: the tiny stand-in for LTX-2.3, trained from nothing.

The idea. ST-DRC starts from LTX-2.3, and 22 billion parameters fit no laptop. So these stages make
a small model of the same architecture, in the same file format, from clips of the procedural world.
It is *not* the paper: the paper's recipe (train.py) starts from what they have made.

    render        clips of the world -> memory map in data/ (CPU only; a GPU renders as it goes)
    vae           the causal video VAE
    encode        clips -> latents in data/ (CPU only)
    base          text-to-video without any reference: text encoder and transformer together
    face          the recogniser of train.py's identity loss              (toy/recognisers.py)
    eval_encoder  a second one, which only evaluates
    export        what train.py and the stages have made -> weights/tiny
    head_pose     the head-pose estimator, which only evaluates                  (toy/head.py)
    traits        the trait reader, which only evaluates                       (toy/traits.py)

The failure this prevents: weights that nobody can make again. Every stage resumes: the same command
goes on. our reading: all sizes, lengths and rates; arXiv 2606.02441 starts from the real LTX-2.3.

    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m toy.pretrain vae           # two processes
    python -m toy.pretrain base --keep-text     # with text encoder and VAE of the bundled weights

Read next: toy/recognisers.py
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from clips.dataset import Order, shard_indices
from clips.video import save_sheet
from common.cli import Parser, check_folder, check_ranges, command, find_device
from common.files import atomic_write, sweep
from common.seeds import seeded
from guidance import Guidance
from losses import add_noise, flow_matching_loss
from ltx.checkpoint import open_file, read_metadata, save_checkpoint
from ltx.gemma import GemmaTextModel, save_gemma
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, Connector, FeatureExtractor, TextEncoder
from ltx.tokenizer import Tokenizer
from ltx.vae import VideoVAE, psnr
from model import (
    TRANSFORMER_PREFIX,
    TransformerConfig,
    VideoTransformer,
    ltx_sigmas,
    training_sigmas,
)
from rope import Layout
from sample import denoise
from toy import world
from toy.clips import (
    FreshClips,
    WorldClips,
    cached_world,
    clip_rows,
    encode,
    from_uint8,
    render_clips,
)
from toy.config import (
    CLIPS,
    DATA,
    EXAMPLES,
    FRAME_RATE,
    FRAMES,
    GRID,
    RUNS,
    SIZE,
    TINY_GEMMA,
    TINY_INFERENCE,
    TINY_TRANSFORMER,
    TINY_VAE,
    WEIGHTS,
)
from toy.head import head_stage
from toy.recognisers import recogniser_stage
from toy.traits import traits_stage
from toy.vocabulary import train_bpe
from toy.world import box_mask
from training.optim import EMA, KEEP_FROM_MUON, MuonAdamW, schedule, split_parameters
from training.run import Run, descend
from training.workers import autocast, choose_precision, start_workers

KNOWN = {"known_phrases": json.dumps(world.phrases())}  # in the header of what read the captions
GEMMA_FILES = ("config.json", "tokenizer.json", "model.safetensors")
BLOCK = 32  # clips rendered or encoded at a time


# ------------------------------------------------------------ render


def new_map(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An .npy file of zeros as an array that is written in place.

    Its room is taken at once: writing to a map on a full disk ends the process.
    """
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(f"expected {needed / 1e9:.1f} GB of free space in {path.parent}, got "
                         f"{free / 1e9:.1f} GB; make room, or take fewer --clips")
    out = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out


def render_stage(args: argparse.Namespace) -> None:
    """Render `--clips` clips once into data/train: training never waits for the renderer.

    Goes on where it was stopped, and the files get their names when they are whole.
    """
    folder = DATA / "train"
    if (folder / "boxes.npy").exists():
        boxes = np.load(folder / "boxes.npy", mmap_mode="r")
        if len(boxes) != args.clips or not boxes[-1].any():
            raise ValueError(f"expected {args.clips} clips in {folder}, got {len(boxes)}, or some "
                             "that are not rendered; give another --clips, or delete the folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"video": ((args.clips, FRAMES, SIZE, SIZE, 3), np.uint8),
              "faces": ((args.clips, math.prod(GRID)), np.float16),
              "boxes": ((args.clips, FRAMES, 4), np.float32)}
    partial = {name: folder / f"{name}.npy.{args.clips}.partial" for name in shapes}
    for name, path in partial.items():
        if not path.exists():
            atomic_write(path, lambda p, name=name: new_map(p, *shapes[name]))
    maps = {name: np.load(path, mmap_mode="r+") for name, path in partial.items()}
    for start in tqdm(range(0, args.clips, BLOCK), desc="render", unit="block"):
        stop = min(start + BLOCK, args.clips)
        if maps["boxes"][stop - 1].any():
            continue  # already there
        rows = clip_rows("train", start, stop - start)
        video, boxes, faces = render_clips(rows, seeded(args.seed, start))
        maps["video"][start:stop] = world.to_uint8(video).permute(0, 2, 3, 4, 1).numpy()
        maps["faces"][start:stop] = faces.numpy()
        maps["boxes"][start:stop] = boxes.numpy()  # last: it marks the block as complete
    for name, path in partial.items():  # boxes.npy last: it marks the folder
        maps.pop(name).flush()  # and closed: Windows renames no open file
        os.replace(path, folder / f"{name}.npy")


class Clips:
    """Batches of training clips: from the memory map on CPU, rendered on the spot on CUDA."""

    def __init__(self, device: str):
        self.device = device
        if device == "cpu":
            if not (DATA / "train" / "boxes.npy").exists():
                raise ValueError("expected rendered clips in data/train, got none; "
                                 "run `python -m toy.pretrain render` first")
            self.video = np.load(DATA / "train" / "video.npy", mmap_mode="r")
            self.boxes = np.load(DATA / "train" / "boxes.npy", mmap_mode="r")

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """video (B, 3, F, h, w) in [-1, 1] and boxes (B, F, 4)."""
        g = generator
        if self.device == "cpu":
            index = torch.randint(len(self.video), (count,), generator=g).sort().values.numpy()
            return from_uint8(self.video[index]), torch.from_numpy(self.boxes[index])
        rows = {"person": torch.rand(count, len(world.TRAITS), generator=g, device=g.device),
                "setting": world.draw_settings(count, g), "action": world.draw_actions(count, g)}
        video, boxes, _ = render_clips(rows, g)
        return video, boxes


# ------------------------------------------------------------ vae


def vae_loss(vae: VideoVAE, video: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the squared error, a face (mask) counting three times, and the PSNR in dB.

    The log makes every clip count the same, whether it is easy or hard. A little noise on the
    latent, in each channel's deviation, teaches the decoder to forgive the transformer.
    """
    z = vae.encoder(video)                                                         # (B, C, *GRID)
    z = z + 0.1 * z.detach().float().std(dim=(0, 2, 3, 4), keepdim=True) * noise
    error = (vae.decoder(z).float() - video).square()                              # (B, 3, F, ...)
    clip = (1, 2, 3, 4)
    weighted = ((1 + 2 * mask) * error).mean(dim=clip) / (1 + 2 * mask).mean(dim=clip)  # (B,)
    return weighted.log().mean(), -10 * torch.log10(error.mean(dim=clip) / 4).mean()


def new_vae(device: str, precision: str) -> tuple[VideoVAE, Run]:
    """A VAE with its run in runs/vae, taken up where it is."""
    vae = VideoVAE(TINY_VAE).to(device)
    named = dict(vae.named_parameters())
    with torch.no_grad():
        for name, p in named.items():  # the deep stack starts close to its plain shortcuts
            if "conv2.conv.weight" in name:
                p.mul_(0.5)
    parts = split_parameters(named, keep_out=("encoder.conv_in", "decoder.conv_out"))
    optimizer = MuonAdamW(*parts, precision=precision)
    return vae, Run(RUNS / "vae", named, optimizer, EMA(named))


@torch.no_grad()
def check_vae(vae: VideoVAE, run: Run, device: str, precision: str) -> float:
    """PSNR on unseen people with the averaged weights; a sheet, input above reconstruction."""
    video = render_clips(clip_rows("val", 0, 32), seeded(5))[0].to(device)
    with run.ema_weights(), autocast(device, precision):
        out = vae.decoder(vae.encoder(video)).float()
    value = psnr(out, video).mean().item()
    save_sheet(run.folder / "sheet.png",
               [x[i, :, ::2].transpose(0, 1) for i in range(6) for x in (video, out)])
    run.log(val_psnr=value)
    return value


def vae_stage(args: argparse.Namespace, device: str) -> None:
    """Train the VAE. Clips come back, so the PSNR that counts is that of unseen people."""
    torch.manual_seed(args.seed)
    vae, run = new_vae(device, args.precision)
    clips, loss_fn = Clips(device), torch.compile(vae_loss) if args.compile else vae_loss
    latent = (args.batch, TINY_VAE["latent_channels"], *GRID)
    next_check = run.seconds + 60
    for step in run.steps(args.steps, args.minutes, args.batch, "vae"):
        g = seeded(args.seed, step, run.rank, device=device)
        video, boxes = clips.batch(args.batch, g)
        noise = torch.randn(latent, generator=g, device=device)
        with autocast(device, args.precision):
            loss, dB = loss_fn(vae, video, box_mask(boxes, SIZE), noise)
        descend(run, step, loss, schedule(step, args.steps), f"clips drawn with seed {args.seed}")
        run.ema.update(run.model, step)
        run.record(loss=loss.item(), train_psnr=dB.item())
        if run.rank == 0 and run.seconds > next_check:
            check_vae(vae, run, device, args.precision)
            next_check = run.seconds + 180
    if run.rank == 0:
        value = check_vae(vae, run, device, args.precision)
        print(f"validation PSNR {value:.2f} dB after {run.done} steps")


# ------------------------------------------------------------ encode


@torch.no_grad()
def freeze_vae(args: argparse.Namespace, device: str) -> None:
    """runs/vae -> runs/vae.safetensors: averaged weights in bf16, and the latents' statistics.

    Mean and deviation of each channel are measured on clips, so that `encode` gives unit latents.
    """
    vae, run = new_vae(device, args.precision)
    if run.done == 0:
        raise ValueError(f"expected a trained VAE in {run.folder}, got none; run `python -m "
                         "toy.pretrain vae`, or take the bundled one with --keep-text")
    vae.load_state_dict({k: v.bfloat16() for k, v in run.ema.shadow.items()}, strict=False)
    g = seeded(args.seed, 77, device=device)
    video, _ = Clips(device).batch(min(1024, args.clips), g)
    with autocast(device, args.precision):
        z = torch.cat([vae.encoder(v).float() for v in video.split(32)])            # (B, C, *GRID)
    stats = vae.per_channel_statistics
    getattr(stats, "mean-of-means").copy_(z.mean(dim=(0, 2, 3, 4)))
    getattr(stats, "std-of-means").copy_(z.std(dim=(0, 2, 3, 4)))
    tensors = {f"vae.{k}": v.bfloat16() for k, v in vae.state_dict().items()}
    save_checkpoint(RUNS / "vae.safetensors", tensors, {"vae": TINY_VAE}, {})


def encode_stage(args: argparse.Namespace, device: str) -> None:
    """Freeze the VAE, or keep the bundled one, and cache the clips' latents."""
    if not args.keep_text:
        freeze_vae(args, device)
    if device == "cpu":  # a GPU encodes what it renders, in the step
        vae = VideoVAE.load(vae_file(args), dtype=torch.float32)
        sweep(DATA / "train")  # of a command that was killed
        videos = Clips(device).video
        atomic_write(DATA / "train" / "latents.npy",
                     lambda path: encode_clips(vae, videos, path, args.precision))


def vae_file(args: argparse.Namespace) -> Path:
    return WEIGHTS / "model.safetensors" if args.keep_text else RUNS / "vae.safetensors"


def encode_clips(vae: VideoVAE, videos: np.ndarray, path: Path, precision: str) -> None:
    """videos (N, F, h, w, 3) uint8 -> an .npy file of latents (N, L, C)."""
    out = new_map(path, (len(videos), math.prod(GRID), vae.latent_channels), np.float16)
    for start in tqdm(range(0, len(videos), BLOCK), desc="encode", unit="block"):
        latents = encode(vae, from_uint8(videos[start:start + BLOCK]), precision)   # (B, L, C)
        if not latents.isfinite().all():
            raise ValueError("expected finite latents, got NaN or infinity in clips "
                             f"{start} to {start + len(latents) - 1}; train the VAE again")
        out[start:start + BLOCK] = latents.half().numpy()
    out.flush()


# ------------------------------------------------------------ base


def new_text_encoder(tokenizer: dict) -> TextEncoder:
    """A random tiny Gemma with extractor and connector, around a given tokenizer.json content."""
    config, states = TINY_TRANSFORMER, TINY_GEMMA.num_hidden_layers + 1
    extractor = FeatureExtractor(config, TINY_GEMMA.hidden_size, states)
    return TextEncoder(Tokenizer(tokenizer), GemmaTextModel(TINY_GEMMA), extractor,
                       Connector(config), config["text_max_length"])


def new_transformer() -> VideoTransformer:
    """Every block starts as a plain residual layer: noise level and prompt change nothing yet,
    gates are half open."""
    model = VideoTransformer(TransformerConfig.from_checkpoint(TINY_TRANSFORMER))
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[[2, 5, 8]] = 0.5
            block.prompt_scale_shift_table.zero_()
        for part in (model.adaln_single.linear, model.prompt_adaln_single.linear, model.proj_out):
            nn.init.normal_(part.weight, std=1e-3)
            nn.init.zeros_(part.bias)
        model.scale_shift_table.zero_()
    return model


@torch.no_grad()
def check_samples(run: Run, model: VideoTransformer, text: TextEncoder, vae: VideoVAE, device: str,
                  precision: str) -> None:
    """Contact sheet of eight fixed validation prompts and noises, with the averaged weights."""
    rows, d = clip_rows("val", 0, 8), TINY_INFERENCE
    prompts = [world.caption(setting, int(action))
               for setting, action in zip(rows["setting"], rows["action"], strict=True)]
    noise = torch.randn(8, math.prod(GRID), vae.latent_channels, generator=seeded(12)).to(device)
    sigmas = ltx_sigmas(d["steps"], d["schedule_tokens"])
    with run.ema_weights(), autocast(device, precision):
        latent = denoise(model, noise, sigmas, text.encode(prompts), text.encode([""]), None,
                         Layout(*GRID, FRAME_RATE, vae.time_scale, vae.space_scale),
                         Guidance(d["text_scale"]))
        video = vae.decode(latent).float().cpu()                                    # (8, 3, F, ...)
    save_sheet(run.folder / "sheet.png", [list(v[:, ::2].transpose(0, 1)) for v in video])


def draw_noise(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """LTX-2.3: noise level per sample (B,), noise (B, L, C) and the noisy (1 - s) x0 + s noise."""
    B, L, _ = x0.shape
    g, device = generator, x0.device
    normal = torch.randn(B, generator=g, device=device)
    u = torch.rand(2, B, generator=g, device=device)
    sigma = training_sigmas(L, normal, u[0], u[1])                                  # (B,)
    noise = torch.randn(x0.shape, generator=g, device=device)
    return sigma, noise, add_noise(x0, noise, sigma)[0]


def base_loss(model: VideoTransformer, context: Callable[..., Tensor], words: tuple[Tensor, ...],
              x0: Tensor, noise: Tensor, noisy: Tensor, sigma: Tensor, positions: Tensor) -> Tensor:
    """Plain flow matching on the video tokens; context(*words) -> (B, N, D)."""
    timesteps = [(sigma, x0.shape[1])]  # one noise level for all tokens
    v = model(noisy, timesteps, sigma, positions, context(*words))                  # (B, L, C)
    return flow_matching_loss(v.float(), noise - x0)


def learning_text(text: TextEncoder, data: WorldClips) -> tuple[Callable, Callable]:
    """For `base_loss`: words -> context, and rows of `data.captions` -> their words (ids, mask)."""
    ids, mask = text.tokenize(data.captions)                                        # (U, N) each
    return text, lambda rows: (ids[rows], mask[rows])


def kept_text(text: TextEncoder, data: WorldClips) -> tuple[Callable, Callable]:
    """The same for a text encoder that does not learn: it is asked once about each caption."""
    data.use_text(text)

    def words(rows: Tensor) -> tuple[Tensor]:
        return (data.contexts(rows.tolist()).to(rows.device),)                      # (B, N, D)
    return lambda context: context, words


def base_stage(args: argparse.Namespace, device: str) -> None:
    """Text-to-video without any reference: what LTX-2.3 is to the paper, this is to train.py."""
    torch.manual_seed(args.seed)
    tokenizer = train_bpe(world.all_captions()[::7], TINY_GEMMA.vocab_size)
    text, model = new_text_encoder(tokenizer), new_transformer()
    learning = nn.ModuleDict({"text": text, "transformer": model})  # this Gemma starts from zero
    if args.keep_text:
        learning = nn.ModuleDict({"transformer": model})
        text = TextEncoder.load(WEIGHTS / "model.safetensors", WEIGHTS / "gemma", device,
                                torch.float32).eval()
    named = dict(learning.to(device).named_parameters())
    vae = VideoVAE.load(vae_file(args), device, torch.float32)
    data = cached_world(vae) if device == "cpu" else FreshClips(vae, args.precision)
    context, words = (kept_text if args.keep_text else learning_text)(text, data)
    optimizer = MuonAdamW(*split_parameters(named, KEEP_FROM_MUON), lr_matrix=3e-3, lr_other=1e-3,
                          precision=args.precision)
    run = Run(RUNS / ("base_keep_text" if args.keep_text else "base"), named, optimizer, EMA(named))
    positions = Layout(*GRID, FRAME_RATE, 4, 8).video_positions()                   # (3, L, 2)
    positions = positions.expand(args.batch, -1, -1, -1).to(device)
    loss_fn = torch.compile(base_loss) if args.compile else base_loss
    order = Order(data.groups, args.batch * run.world, args.seed)
    next_check = run.seconds + 300
    for step in run.steps(args.steps, args.minutes, args.batch, "base"):
        g = seeded(args.seed, step, run.rank, device=device)
        mine = shard_indices(order(step), run.rank, run.world, args.batch)
        batch = data.clips([i for _, i in mine], [seeded(args.seed, step, k) for k, _ in mine])
        x0 = batch["x0"].to(device)                                                 # (B, L, C)
        sigma, noise, noisy = draw_noise(x0, g)
        drop = torch.rand(args.batch, generator=g, device=device) < 0.1  # for guidance
        rows = torch.where(drop, len(data.captions) - 1, batch["caption"].to(device))
        with autocast(device, args.precision):
            loss = loss_fn(model, context, words(rows), x0, noise, noisy, sigma, positions)
        descend(run, step, loss, schedule(step, args.steps, decay=0.2), data.names(order(step)))
        run.ema.update(named, step)
        run.record(loss=loss.item())
        if run.rank == 0 and (run.seconds > next_check or step + 1 == args.steps):
            check_samples(run, model, text, vae, device, args.precision)
            next_check = run.seconds + 300
    if run.rank == 0:
        write_base(args, run.ema.shadow, text, tokenizer)


def write_base(args: argparse.Namespace, weights: dict[str, Tensor], text: TextEncoder,
               tokenizer: dict) -> None:
    """Averaged weights and what was kept -> runs/base.safetensors and runs/gemma."""
    vae = read_metadata(vae_file(args))["config"]["vae"]
    config = {"transformer": TINY_TRANSFORMER, "vae": vae, "inference": TINY_INFERENCE}
    with open_file(vae_file(args)) as file:  # with --keep-text also connector and extractor
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    for name, value in weights.items():
        for ours, theirs in (("text.extractor.", EXTRACTOR_PREFIX),
                             ("text.connector.", CONNECTOR_PREFIX),
                             ("transformer.", TRANSFORMER_PREFIX)):
            if name.startswith(ours):
                tensors[theirs + name.removeprefix(ours)] = value.bfloat16()
    save_checkpoint(RUNS / "base.safetensors", tensors, config, KNOWN)
    if args.keep_text:
        copy_files({RUNS / "gemma" / name: WEIGHTS / "gemma" / name for name in GEMMA_FILES})
    else:
        gemma = {name.removeprefix("text.gemma."): value for name, value in weights.items()
                 if name.startswith("text.gemma.")}
        text.gemma.load_state_dict(gemma)
        save_gemma(RUNS / "gemma", text.gemma, tokenizer, torch.bfloat16)


# ------------------------------------------------------------ export


def copy_files(sources: dict[Path, Path]) -> None:
    """{copy: original}; nothing is written when an original is missing."""
    for source in sources.values():
        if not source.exists():
            raise ValueError(f"expected {source}, got no such file; run the stage that writes it "
                             "first (--help lists them)")
    for target, source in sources.items():
        atomic_write(target, lambda path, source=source: shutil.copyfile(source, path))


@torch.no_grad()
def reference_floor(vae: VideoVAE) -> float:
    """The VAE's PSNR on references of unseen people, first percentile minus 1 dB: what lies below
    is no person of this world."""
    g, person = seeded(31), world.people("val", 256)
    pictures, _ = world.draw_references(person, world.draw_settings(256, g), g, SIZE)
    dB = torch.cat([psnr(vae.decode(vae.encode(p[:, :, None])), p[:, :, None])
                    for p in pictures.split(32)])
    return round(dB.quantile(0.01).item() - 1, 1)


def export_stage(args: argparse.Namespace, device: str) -> None:
    """runs/ -> weights/tiny: the checkpoint of train.py, its base, Gemma and the recognisers."""
    trained = RUNS / "st-drc" / "model.safetensors"
    if not trained.exists():
        raise ValueError(f"expected {trained}, got no such file; run train.py --full first")
    names = ["base.safetensors", "face.safetensors", "eval_encoder.safetensors"]
    names += [f"gemma/{name}" for name in GEMMA_FILES]
    copy_files({WEIGHTS / name: RUNS / name for name in names})
    with open_file(trained) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        kept = {key: value for key, value in file.metadata().items()
                if key in ("reference_placement", "training_steps")}
    floor = reference_floor(VideoVAE.load(trained, dtype=torch.float32))
    config = {"transformer": TINY_TRANSFORMER, "vae": TINY_VAE,
              "inference": TINY_INFERENCE | {"reference_psnr_floor": floor}}
    save_checkpoint(WEIGHTS / "model.safetensors", tensors, config, kept | KNOWN)
    for path in sorted(WEIGHTS.rglob("*.*")):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    for name, row in EXAMPLES.items():
        person, setting = world.people("test", row + 1)[-1:], torch.tensor([[2, 0, 4]])
        picture, _ = world.draw_references(person, setting, seeded(row), size=256, share=1.0)
        image = Image.fromarray(world.to_uint8(picture[0]).permute(1, 2, 0).numpy())
        atomic_write(Path("examples") / f"{name}.png",
                     lambda path, image=image: image.save(path, format="PNG"))


# ------------------------------------------------------------ the command

STAGES = {  # stage -> what it runs, default steps, default batch
    "render": (lambda args, device: render_stage(args), 0, 0), "vae": (vae_stage, 9600, 8),
    "encode": (encode_stage, 0, 0), "base": (base_stage, 4000, 8),
    "face": (recogniser_stage, 600, 64), "eval_encoder": (recogniser_stage, 450, 64),
    "export": (export_stage, 0, 0), "head_pose": (head_stage, 1600, 64),
    "traits": (traits_stage, 540, 64)}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("toy.pretrain", description=__doc__.split("\n")[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    lengths = ", ".join(f"{name} {steps}" for name, (_, steps, _) in STAGES.items() if steps)
    add("stage", choices=list(STAGES))
    add("--steps", type=int, help=f"default: {lengths}")
    add("--batch", type=int, help="per worker; default: vae and base 8, others 64")
    add("--minutes", type=float, default=1e9, help="stop and save then; run again to go on")
    add("--clips", type=int, default=CLIPS, help="of render")
    add("--keep-text", action="store_true",
        help="base, encode: text encoder and VAE are those of weights/tiny, and stay as they are")
    add("--precision", choices=["bf16", "fp32"], help="default: bf16; on a CPU what is faster")
    add("--seed", type=int, default=0)
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(words)
    check_ranges(args, {"steps": (1, 1e9), "batch": (2, 4096), "minutes": (0, 1e9),
                        "clips": (1, 1e7), "seed": (0, 2**62)})
    if args.keep_text and args.stage not in ("encode", "base"):
        raise ValueError("expected --keep-text with the stage encode or base, got "
                         f"{args.stage}; leave it out")
    _, steps, batch = STAGES[args.stage]
    args.steps = steps if args.steps is None else args.steps
    args.batch = batch if args.batch is None else args.batch
    return args


def pretrain(args: argparse.Namespace) -> None:
    for folder in (RUNS, DATA, WEIGHTS):
        check_folder(folder)
    start_workers()  # first of all: it says which card is ours
    device = find_device()
    torch.set_flush_denormal(True)  # denormal numbers can slow a CPU tenfold
    if args.stage not in ("render", "export"):
        args.precision = choose_precision(args.precision, device)
    run, _, _ = STAGES[args.stage]
    run(args, device)


def main(words: list[str] | None = None) -> int:
    return command("toy.pretrain", lambda: pretrain(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
