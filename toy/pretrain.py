"""Makes the bundled tiny base model: the stand-in for LTX-2.3, trained from nothing on world.py.

This is *not* the paper. ST-DRC starts from LTX-2.3; we cannot ship 22 billion parameters, so these stages make a small
model of the same architecture, in the same file format, for the paper's recipe (train.py) to start from:

    python -m toy.pretrain render      clips of the world -> memory map in data/             (CPU only; a GPU renders as it goes)
    python -m toy.pretrain vae         the causal video VAE
    python -m toy.pretrain encode      clips -> cached latents
    python -m toy.pretrain base        text-to-video without any reference: Gemma-style encoder, connector, transformer
    python -m toy.pretrain face        the recogniser that supervises identity (random people, new ones in every step)
    python -m toy.pretrain eval_encoder       a second one, other random people, width and seed: it only ever evaluates
    python -m toy.pretrain export      everything -> weights/tiny
    python -m toy.pretrain head        reads where the head is and whether there is one, for scores.py (uses the bundled VAE)

Every stage resumes: run the same command again, on CPU or CUDA. `--minutes` bounds one command, the state in runs/
carries on. `torchrun --nproc_per_node=2 pretrain.py vae` uses two worker processes.

The failure this prevents: a score by the very network that was trained on. So recogniser and eval_encoder see other people and
have other widths, and the head-pose estimator supervises nothing. our reading: all sizes, lengths and rates (tables below).

Conventions. sigma 1 = noise, 0 = data; pictures in [-1, 1]; --minutes left out = no limit.

Read next: scores.py
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from clips.dataset import Order, shard_indices
from clips.face import FaceNet, square
from clips.video import save_sheet
from common.cli import Parser, check_folder, check_ranges, command
from common.files import atomic_write
from common.seeds import seeded
from denoise import denoise
from losses import crop_faces, flow_matching_loss
from ltx.checkpoint import load_weights, read_metadata, save_checkpoint
from ltx.gemma import GemmaConfig, GemmaTextModel, save_gemma
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, Connector, FeatureExtractor, TextEncoder
from ltx.tokenizer import Tokenizer
from ltx.vae import VideoVAE, psnr
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer, ltx_sigmas, training_sigmas
from reference import patchify
from rope import grid_to_positions, video_grid
from study.scores import POSE_SPREAD, HeadPoseEstimator, read_action, read_heads
from toy import world
from toy.clips import cached_world, clip_rows, fresh_world, render_clips
from toy.config import CLIPS, DATA, FRAME_RATE, FRAMES, GRID, SIZE
from toy.vocabulary import train_bpe
from training.optim import EMA, KEEP_FROM_MUON, MuonAdamW, schedule, split_parameters
from training.run import Run, check_finite
from training.workers import average_gradients

RUNS, WEIGHTS = Path("runs"), Path("weights/tiny")

# The tiny model: LTX-2.3's own config keys with small numbers. Same code, other numbers.
TINY_VAE = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3,
    "latent_channels": 128,  # as LTX-2.3
    "patch_size": 4, "norm_layer": "pixel_norm", "latent_log_var": "uniform", "use_quant_conv": False,
    "causal_decoder": False, "timestep_conditioning": False, "normalize_latent_channels": False, "scaling_factor": 1.0,
    "encoder_base_channels": 32, "decoder_base_channels": 32, "spatial_padding_mode": "zeros",
    "encoder_blocks": [["res_x", {"num_layers": 2}], ["compress_all_res", {"multiplier": 2}],
                       ["res_x", {"num_layers": 2}], ["compress_time_res", {"multiplier": 1}],
                       ["res_x", {"num_layers": 2}]],
    "decoder_blocks": [["res_x", {"num_layers": 2}], ["compress_all", {"multiplier": 2}],
                       ["res_x", {"num_layers": 3}], ["compress_time", {"multiplier": 1}],
                       ["res_x", {"num_layers": 2}]],
}

TINY_TRANSFORMER = TransformerConfig(
    in_channels=128, out_channels=128, num_layers=6, heads=4, head_dim=48,
    # LTX's own 10000 and (20 s, 2048, 2048) would waste most frequencies on a one-second, 64-pixel clip
    theta=100.0, max_pos=(2, 128, 128),
).to_checkpoint() | {
    "connector_num_layers": 1, "connector_num_attention_heads": 4, "connector_attention_head_dim": 48,
    "connector_num_learnable_registers": 16, "connector_positional_embedding_max_pos": [64],
    "connector_apply_gated_attention": True, "connector_norm_output": True, "use_embeddings_connector": True,
    "text_encoder_norm_type": "per_token_rms", "text_max_length": 48,
}
TINY_GEMMA = GemmaConfig(vocab_size=512, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=48, query_pre_attn_scalar=48.0,
                         sliding_window=64)
EXAMPLES = {"ada": 7, "ben": 15, "cleo": 18, "dan": 13}  # name -> row of the test split
# What sample.py uses when a flag is not given; a checkpoint without this entry gets LTX-2.3's official numbers. The two
# scales were chosen on the validation split (python -m study.evaluate --split val --text-scale ... --ref-scale ...), and so was
# the saving of calls: all streams in every second step and one in the last, 1.93 calls a step (tests/fewer_calls.py).
TINY_INFERENCE = {"width": SIZE, "height": SIZE, "num_frames": FRAMES, "frame_rate": FRAME_RATE, "steps": 15,
                  "text_scale": 2.0, "ref_scale": 2.5, "rescale": 0.0, "guide_range": [0.2, 1.0], "guide_every": 2,
                  "schedule_tokens": GRID[0] * GRID[1] * GRID[2]}


# --------------------------------------------------------------------------------------------------------- data: render
def new_map(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An .npy file of zeros as an array. Its room is taken at once: writing to a map on a full disk ends the process."""
    needed, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(f"expected {needed / 1e9:.1f} GB of free space in {path.parent}, got {free / 1e9:.1f} GB; make "
                         "room, or take fewer --clips")
    out = np.lib.format.open_memmap(path, "w+", dtype, shape)
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out


def render_stage(args: argparse.Namespace) -> None:
    """Render `--clips` clips once into data/train: training never waits for the renderer. Resumable in blocks: the files
    get their names when they are whole, boxes.npy last."""
    folder = DATA / "train"
    if (folder / "boxes.npy").exists():
        boxes = np.load(folder / "boxes.npy", mmap_mode="r")
        if len(boxes) != args.clips or not boxes[-1].any():
            raise ValueError(f"expected {args.clips} clips in {folder}, got {len(boxes)}, or some that are not rendered; "
                             "give another --clips, or delete the folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ((FRAMES - 1) // 4 + 1) * (SIZE // 8) ** 2
    shapes = {"video": ((args.clips, FRAMES, SIZE, SIZE, 3), np.uint8), "faces": ((args.clips, tokens), np.float16),
              "boxes": ((args.clips, FRAMES, 4), np.float32)}
    beside = {k: folder / f"{k}.npy.{args.clips}.partial" for k in shapes}
    for name, path in beside.items():
        if not path.exists():
            atomic_write(path, lambda p, name=name: new_map(p, *shapes[name]))
    maps = {k: np.load(path, mmap_mode="r+") for k, path in beside.items()}
    for start in tqdm(range(0, args.clips, 32), desc="render", unit="block"):
        if maps["boxes"][min(start + 32, args.clips) - 1].any():
            continue  # already there
        video, boxes, faces = render_clips(clip_rows("train", start, min(32, args.clips - start)), seeded(args.seed, start))
        maps["video"][start:start + 32] = world.to_uint8(video).permute(0, 2, 3, 4, 1).numpy()
        maps["faces"][start:start + 32] = faces.numpy()
        maps["boxes"][start:start + 32] = boxes.numpy()  # last: it marks the block as complete
    for name, path in beside.items():
        maps[name].flush()
        os.replace(path, folder / f"{name}.npy")


def descend(run: Run, step: int, loss: Tensor, factor: float, clips: str) -> None:
    """One step of the optimiser. Raises ValueError, before a weight moves, when the loss or its gradient is no number."""
    loss.backward()
    parameters = run.optimizer.parameters()
    average_gradients(parameters, run.world)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    check_finite(step, {"the loss": loss.item(), "the gradient": norm.item()}, clips)
    run.optimizer.step(factor)
    for p in parameters:
        p.grad = None


class Clips:
    """Batches of training clips: from the memory map on CPU, rendered on the spot on CUDA."""

    def __init__(self, device: str):
        self.device = device
        if device == "cpu":
            if not (DATA / "train" / "boxes.npy").exists():
                raise ValueError("expected rendered clips in data/train, got none; run `python -m toy.pretrain render` first")
            self.video = np.load(DATA / "train" / "video.npy", mmap_mode="r")
            self.boxes = np.load(DATA / "train" / "boxes.npy", mmap_mode="r")

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """video (B, 3, F, h, w) in [-1, 1] and boxes (B, F, 4)."""
        if self.device == "cpu":
            index = torch.randint(len(self.video), (count,), generator=generator).sort().values.numpy()
            video = torch.from_numpy(self.video[index]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            return video, torch.from_numpy(self.boxes[index])
        g = generator
        rows = {"person": torch.rand(count, len(world.TRAITS), generator=g, device=g.device),
                "setting": world.draw_settings(count, g), "action": world.draw_actions(count, g)}
        video, boxes, _ = render_clips(rows, g)
        return video, boxes


def box_mask(boxes: Tensor, size: int) -> Tensor:
    """Boxes (B, F, 4) -> 1 inside, 0 outside, (B, 1, F, size, size)."""
    line = torch.arange(size, device=boxes.device) + 0.5
    x0, y0, x1, y1 = (b[:, :, None] for b in boxes.unbind(dim=2))
    inside_x, inside_y = (line > x0) & (line < x1), (line > y0) & (line < y1)             # (B, F, size)
    return (inside_y[:, :, :, None] & inside_x[:, :, None]).float()[:, None]


# ------------------------------------------------------------------------------------------------------------ stage: VAE
def vae_loss(vae: VideoVAE, video: Tensor, mask: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction loss; faces count three times. The log of each clip's error is the (negative) PSNR itself.

    A little noise on the latent, in units of each channel's deviation, teaches the decoder to forgive the transformer
    its small mistakes.
    """
    z = vae.encoder(video)                                                                # (B, C, F', H, W)
    z = z + 0.1 * z.detach().float().std(dim=(0, 2, 3, 4), keepdim=True) * noise
    error = (vae.decoder(z).float() - video).square()                                     # (B, 3, F, h, w)
    weighted = ((1 + 2 * mask) * error).mean(dim=(1, 2, 3, 4)) / (1 + 2 * mask).mean(dim=(1, 2, 3, 4))
    return weighted.log().mean(), -10 * torch.log10(error.mean(dim=(1, 2, 3, 4)) / 4).mean()


def init_vae(vae: VideoVAE) -> None:
    """Halve the second convolution of each residual block: the deep stack starts close to its plain shortcuts."""
    with torch.no_grad():
        for name, p in vae.named_parameters():
            if "conv2.conv.weight" in name:
                p.mul_(0.5)


def validation_clips(count: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Clips of people nobody trains on: video (B, 3, F, h, w), boxes (B, F, 4)."""
    video, boxes, _ = render_clips(clip_rows("val", 0, count), seeded(seed))
    return video, boxes


@torch.no_grad()
def check_vae(vae: VideoVAE, run: Run, device: str) -> float:
    """PSNR on unseen people with the averaged weights, and a sheet: input above, reconstruction below."""
    video = validation_clips(32)[0].to(device)
    with run.ema_weights(), torch.autocast(device, torch.bfloat16):
        out = vae.decoder(vae.encoder(video)).float()
    value = psnr(out, video).mean().item()
    rows = [x[i, :, ::2].transpose(0, 1) for i in range(6) for x in (video, out)]
    save_sheet(run.folder / "sheet.png", rows)
    run.log(val_psnr=value)
    return value


def vae_stage(args: argparse.Namespace, device: str) -> None:
    """Train the VAE. Each rendered clip comes back two or three times; the PSNR that counts is on unseen people."""
    torch.manual_seed(args.seed)
    vae = VideoVAE(TINY_VAE).to(device)
    init_vae(vae)
    named = dict(vae.named_parameters())
    optimizer = MuonAdamW(*split_parameters(named, keep_out=("encoder.conv_in", "decoder.conv_out")))
    run = Run(RUNS / "vae", named, optimizer, EMA(named))
    clips, loss_fn = Clips(device), torch.compile(vae_loss) if args.compile else vae_loss
    latent = (args.batch, 128, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    next_check = run.seconds + 60
    for step in run.steps(args.steps, args.minutes, args.batch, "vae"):
        g = seeded(args.seed, step, run.rank, device=device)
        video, boxes = clips.batch(args.batch, g)
        noise = torch.randn(latent, generator=g, device=device)
        with torch.autocast(device, torch.bfloat16):
            loss, dB = loss_fn(vae, video, box_mask(boxes, SIZE), noise)
        descend(run, step, loss, schedule(step, args.steps), f"clips drawn with seed {args.seed}")
        run.ema.update(named, step)
        run.record(loss=loss.item(), train_psnr=dB.item())
        if run.rank == 0 and run.seconds > next_check:
            check_vae(vae, run, device)
            next_check = run.seconds + 180
    if run.rank == 0:
        print(f"validation PSNR {check_vae(vae, run, device):.2f} dB after {run.done} steps")


# --------------------------------------------------------------------------------------------------------- stage: encode
@torch.no_grad()
def measure_statistics(vae: VideoVAE, video: Tensor) -> None:
    """Set the latent mean and deviation per channel from clips, so that `encode` gives unit latents."""
    with torch.autocast(video.device.type, torch.bfloat16):
        z = torch.cat([vae.encoder(v).float() for v in video.split(32)])
    stats = vae.per_channel_statistics
    getattr(stats, "mean-of-means").copy_(z.mean(dim=(0, 2, 3, 4)))
    getattr(stats, "std-of-means").copy_(z.std(dim=(0, 2, 3, 4)))


def encode_stage(args: argparse.Namespace, device: str) -> None:
    """Freeze the VAE (averaged weights, rounded to the bf16 that is shipped) and cache the clips' latents."""
    vae = VideoVAE(TINY_VAE).to(device)
    named = dict(vae.named_parameters())
    run = Run(RUNS / "vae", named, MuonAdamW(*split_parameters(named, ("encoder.conv_in", "decoder.conv_out"))),
              EMA(named))
    vae.load_state_dict({k: v.bfloat16() for k, v in run.ema.shadow.items()}, strict=False)
    clips = Clips(device)
    measure_statistics(vae, clips.batch(min(1024, args.clips), seeded(args.seed, 77, device=device))[0])
    tensors = {f"vae.{k}": v.bfloat16() for k, v in vae.state_dict().items()}
    save_checkpoint(RUNS / "vae.safetensors", tensors, {"vae": TINY_VAE}, {})
    if device != "cpu":
        return  # a GPU encodes what it renders, in the step
    load_weights(vae, RUNS / "vae.safetensors", "vae.", torch.float32)
    for left in (DATA / "train").glob(".latents.npy.*.tmp"):  # of a command that was killed
        left.unlink()
    atomic_write(DATA / "train" / "latents.npy", lambda path: encode_clips(vae, clips.video, path))


def encode_clips(vae: VideoVAE, videos: np.ndarray, path: Path) -> None:
    """videos (N, F, h, w, 3) uint8 -> an .npy file of latents (N, L, C)."""
    out = new_map(path, (len(videos), GRID[0] * GRID[1] * GRID[2], vae.latent_channels), np.float16)
    for start in tqdm(range(0, len(videos), 32), desc="encode", unit="block"):
        video = torch.from_numpy(np.array(videos[start:start + 32])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = patchify(vae.encode(video))
        if not latents.isfinite().all():
            raise ValueError(f"expected finite latents, got NaN or infinity in clips {start} to {start + len(video) - 1}; "
                             "train the VAE again")
        out[start:start + 32] = latents.half().numpy()
    out.flush()


# ----------------------------------------------------------------------------------------------------------- stage: base
def new_text_encoder(tokenizer: dict) -> TextEncoder:
    """A random tiny Gemma with extractor and connector, around a given tokenizer.json content."""
    config = TINY_TRANSFORMER
    extractor = FeatureExtractor(config, TINY_GEMMA.hidden_size, TINY_GEMMA.num_hidden_layers + 1)
    return TextEncoder(Tokenizer(tokenizer), GemmaTextModel(TINY_GEMMA), extractor, Connector(config),
                       config["text_max_length"])


def init_transformer(model: VideoTransformer) -> None:
    """Start every block as a plain residual layer: noise level and prompt modulate nothing yet, gates are half open."""
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[[2, 5, 8]] = 0.5
            block.prompt_scale_shift_table.zero_()
        for part in (model.adaln_single.linear, model.prompt_adaln_single.linear, model.proj_out):
            nn.init.normal_(part.weight, std=1e-3)
            nn.init.zeros_(part.bias)
        model.scale_shift_table.zero_()


@torch.no_grad()
def check_samples(run: Run, model: VideoTransformer, text: TextEncoder, vae: VideoVAE, device: str) -> None:
    """Contact sheet of eight fixed validation prompts and noises, averaged weights: runs/base/sheet.png."""
    n, g, d = 8, seeded(12), TINY_INFERENCE
    rows = clip_rows("val", 0, n)
    prompts = [world.caption(s, int(a)) for s, a in zip(rows["setting"], rows["action"], strict=True)]
    noise = torch.randn(n, GRID[0] * GRID[1] * GRID[2], vae.latent_channels, generator=g).to(device)
    with run.ema_weights(), torch.autocast(device, torch.bfloat16):
        latent = denoise(model, text.encode(prompts), text.encode([""]), None, GRID, FRAME_RATE,
                         (vae.time_scale, vae.space_scale), ltx_sigmas(d["steps"], d["schedule_tokens"]), noise,
                         d["text_scale"])
        video = vae.decode(latent).float().cpu()
    save_sheet(run.folder / "sheet.png", [list(v[:, ::2].transpose(0, 1)) for v in video])


def draw_noise(x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """LTX-2.3: noise level per sample (B,), noise (B, L, C) and the noisy latent (1 - s) x0 + s noise."""
    B, L, _ = x0.shape
    device = x0.device
    normal = torch.randn(B, generator=generator, device=device)
    u = torch.rand(2, B, generator=generator, device=device)
    sigma = training_sigmas(L, normal, u[0], u[1])
    noise = torch.randn(x0.shape, generator=generator, device=device)
    s = sigma[:, None, None]
    return sigma, noise, (1 - s) * x0 + s * noise


def base_loss(text: TextEncoder, model: VideoTransformer, x0: Tensor, noise: Tensor, noisy: Tensor, sigma: Tensor,
              positions: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Plain flow matching on video tokens. Text encoder and transformer learn together: this Gemma starts from zero."""
    timesteps = sigma[:, None].expand(-1, x0.shape[1])                                    # (B, L)
    v = model(noisy, timesteps, sigma, positions, text(ids, mask))                        # (B, L, C)
    return flow_matching_loss(v.float(), noise - x0)


def base_stage(args: argparse.Namespace, device: str) -> None:
    """Text-to-video without any reference: what LTX-2.3 is to the paper, this is to train.py."""
    torch.manual_seed(args.seed)
    tokenizer = train_bpe(world.all_captions()[::7], TINY_GEMMA.vocab_size)
    text, model = new_text_encoder(tokenizer), VideoTransformer(TransformerConfig.from_checkpoint(TINY_TRANSFORMER))
    init_transformer(model)
    both = nn.ModuleDict({"text": text, "transformer": model}).to(device)
    vae = load_weights(VideoVAE(TINY_VAE), RUNS / "vae.safetensors", "vae.", torch.float32, device).eval()
    data = cached_world() if device == "cpu" else fresh_world(vae)
    all_ids, all_masks = text.tokenize(data.captions)
    named = dict(both.named_parameters())
    optimizer = MuonAdamW(*split_parameters(named, KEEP_FROM_MUON), lr_matrix=3e-3, lr_other=1e-3)
    run = Run(RUNS / "base", named, optimizer, EMA(named))
    positions = grid_to_positions(video_grid(*GRID), FRAME_RATE, 4, 8).expand(args.batch, -1, -1, -1).to(device)
    loss_fn = torch.compile(base_loss) if args.compile else base_loss
    order = Order(data.groups, args.batch * run.world, args.seed)
    next_check = run.seconds + 300
    for step in run.steps(args.steps, args.minutes, args.batch, "base"):
        g = seeded(args.seed, step, run.rank, device=device)
        mine = shard_indices(order(step), run.rank, run.world, args.batch)
        batch = data.clips([i for _, i in mine], [seeded(args.seed, step, place) for place, _ in mine])
        x0 = batch["x0"].to(device)
        sigma, noise, noisy = draw_noise(x0, g)
        drop = torch.rand(args.batch, generator=g, device=device) < 0.1                   # text dropout, for guidance
        rows = torch.where(drop, len(all_ids) - 1, batch["caption"].to(device))
        with torch.autocast(device, torch.bfloat16):
            loss = loss_fn(text, model, x0, noise, noisy, sigma, positions, all_ids[rows], all_masks[rows])
        descend(run, step, loss, schedule(step, args.steps, decay=0.2), data.names(order(step)))
        run.ema.update(named, step)
        run.record(loss=loss.item())
        if run.rank == 0 and (run.seconds > next_check or step + 1 == args.steps):
            check_samples(run, model, text, vae, device)
            next_check = run.seconds + 300
    if run.rank == 0:
        write_base(run.ema.shadow, text, tokenizer)


def write_base(weights: dict[str, Tensor], text: TextEncoder, tokenizer: dict) -> None:
    """Averaged weights + frozen VAE -> runs/base.safetensors in LTX-2.3's format, and the Gemma folder."""
    tensors = {}
    for name, value in weights.items():
        for ours, theirs in (("text.extractor.", EXTRACTOR_PREFIX), ("text.connector.", CONNECTOR_PREFIX),
                             ("transformer.", TRANSFORMER_PREFIX)):
            if name.startswith(ours):
                tensors[theirs + name.removeprefix(ours)] = value.bfloat16()
    vae = VideoVAE(TINY_VAE)
    load_weights(vae, RUNS / "vae.safetensors", "vae.", torch.float32)
    tensors |= {f"vae.{k}": v.bfloat16() for k, v in vae.state_dict().items()}
    config = {"transformer": TINY_TRANSFORMER, "vae": TINY_VAE, "inference": TINY_INFERENCE}
    save_checkpoint(RUNS / "base.safetensors", tensors, config, {})
    text.gemma.load_state_dict({k.removeprefix("text.gemma."): v for k, v in weights.items()
                                if k.startswith("text.gemma.")})
    save_gemma(RUNS / "gemma", text.gemma, tokenizer, torch.bfloat16)


@torch.no_grad()
def reference_floor(vae: VideoVAE) -> float:
    """The VAE's PSNR on references of unseen people, first percentile minus 1 dB: what lies below is no world person."""
    g = seeded(31)
    person = world.people("val", 256)
    pictures, _ = world.draw_references(person, world.draw_settings(256, g), g, SIZE)
    dB = torch.cat([psnr(vae.decode(vae.encode(p[:, :, None])), p[:, :, None]) for p in pictures.split(32)])
    return round(dB.quantile(0.01).item() - 1, 1)


# ---------------------------------------------------------------------------------------------------- stages: recognisers
def degrade(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur and noise, so that a recogniser reads faces, not the renderer's crisp pixels. (B, 3, h, w) -> same."""
    B, device = len(pictures), pictures.device
    u = torch.rand(2, B, 1, 1, 1, generator=generator, device=device)
    blurred = nnf.avg_pool2d(nnf.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1)
    noise = torch.randn(pictures.shape, generator=generator, device=device)
    return (torch.lerp(pictures, blurred, u[0] * 0.8) + 0.10 * u[1] * noise).clamp(-1, 1)


def face_views(person: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One picture per person at a random moment of a random action anywhere: (B, 3, 64, 64), boxes (B, 4)."""
    B = len(person)
    poses = world.action_poses(world.draw_actions(B, generator), FRAMES, generator)
    moment = torch.randint(FRAMES, (B,), generator=generator, device=person.device)
    pose = poses[torch.arange(B, device=person.device), moment][:, None]
    video, boxes, _ = world.render(person, world.draw_settings(B, generator), pose, SIZE)
    return degrade(video[:, :, 0], generator), boxes[:, 0]


def contrastive_loss(net: FaceNet, first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE: each picture must find the other picture of its person among everyone's, both ways."""
    a, b = net(torch.cat([first, second])).chunk(2)                                       # (B, E) each
    scores = a @ b.T / temperature
    target = torch.arange(len(a), device=a.device)
    return (nnf.cross_entropy(scores, target) + nnf.cross_entropy(scores.T, target)) / 2


def recogniser_stage(args: argparse.Namespace, device: str, eval_encoder: bool) -> None:
    """Train a recogniser on pairs of pictures of one person in two settings; every person has its look-alike beside it.

    face: sees crops around the face box, as ArcFace does; supervises identity in train.py. eval_encoder: sees whole frames
    (a generated video comes without a box), another width, other random people; used by evaluate.py only.
    """
    torch.manual_seed(args.seed + (1000 if eval_encoder else 0))
    widths = (20, 28, 56, 96, 160) if eval_encoder else (16, 24, 48, 96, 128)
    net = FaceNet((1, 1, 2, 1), widths, embedding=128, size=SIZE).to(device)
    named = dict(net.named_parameters())
    optimizer = MuonAdamW(*split_parameters(named, ("net.conv1", "fc", "prelu")), lr_matrix=2e-3, lr_other=1e-3)
    name = "eval_encoder" if eval_encoder else "face"
    run = Run(RUNS / name, named | {k: v for k, v in net.named_buffers() if v.is_floating_point()}, optimizer,
              EMA({}))
    loss_fn = torch.compile(contrastive_loss) if args.compile else contrastive_loss
    for step in run.steps(args.steps, args.minutes, args.batch, name):
        g = seeded(args.seed, step, 4 if eval_encoder else 3, device=device)
        person = torch.rand(args.batch // 2, len(world.TRAITS), generator=g, device=device)
        person = torch.cat([person, world.look_alikes(person, g)])
        views = []
        for _ in range(2):
            pictures, boxes = face_views(person, g)
            shake = torch.rand(len(boxes), 4, generator=g, device=device) * 4 - 2         # real boxes are never exact
            views.append(pictures if eval_encoder else crop_faces(pictures, square(boxes + shake), SIZE))
        with torch.autocast(device, torch.bfloat16):
            loss = loss_fn(net, *views)
        descend(run, step, loss, schedule(step, args.steps), f"people drawn with seed {args.seed}")
        run.record(loss=loss.item())
    tensors = {k: v.bfloat16().contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}
    atomic_write(RUNS / f"{name}.safetensors", lambda p: save_file(tensors, p))
    print(f"{name}: top-1 and look-alike accuracy among 256 unseen people: {check_recogniser(net, eval_encoder, device)}")


@torch.no_grad()
def check_recogniser(net: FaceNet, eval_encoder: bool, device: str) -> tuple[float, float]:
    """Validation people, two settings: share found first among all, share that beats the look-alike."""
    net.eval()
    g = seeded(9, device=device)
    person = world.people("val", 256).to(device)
    def embed(people: Tensor) -> Tensor:
        pictures, boxes = face_views(people, g)
        return net(pictures if eval_encoder else crop_faces(pictures, square(boxes), SIZE))
    a, b, other = embed(person), embed(person), embed(world.look_alikes(person, g))
    top1 = ((a @ b.T).argmax(1) == torch.arange(len(a), device=device)).float().mean()
    return round(top1.item(), 3), round(((a * b).sum(1) > (a * other).sum(1)).float().mean().item(), 3)


# ----------------------------------------------------------------------------------------------------- stage: head-pose estimator
def widened_poses(count: int, generator: torch.Generator) -> Tensor:
    """Poses at random moments of random actions, shaken a little and with any mouth in a third of the cases: (B, 6).

    Generated heads combine what the world never does at once, so the columns must not predict each other.
    """
    g, device = generator, generator.device
    poses = world.action_poses(world.draw_actions(count, g), FRAMES, g)                   # (B, F, 6)
    pose = poses[torch.arange(count, device=device), torch.randint(FRAMES, (count,), generator=g, device=device)]
    shake = torch.tensor([0.08, 0.04, 0.06, 0.20, 0.20, 0.0], device=device)
    pose = pose + shake * (torch.rand(count, 6, generator=g, device=device) * 2 - 1)
    u = torch.rand(2, count, generator=g, device=device)
    pose[:, 5] = torch.where(u[0] < 1 / 3, u[1], pose[:, 5])
    return pose


def without_head(pictures: Tensor, boxes: Tensor, setting: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, h, w) that show no face any more, in turn: the empty scene; the head (box (B, 4), hair included)
    painted over by the scene, by noise, by a smear of itself; noise that hides nearly everything."""
    c = world.Canvas(len(pictures), SIZE, pictures.device)
    world.paint_background(c, setting[:, 0])
    empty = (c.rgb * world.pick_color_index(world.LIGHTS, setting[:, 1])[:, :, None, None]).clamp(0, 1) * 2 - 1
    x0, y0, x1, y1 = boxes.unbind(1)
    w, h = (x1 - x0) * 0.3, (y1 - y0) * 0.3
    head = box_mask(torch.stack([x0 - w, y0 - h, x1 + w, y1], 1)[:, None], SIZE)[:, :, 0]              # (B, 1, h, w)
    noise = torch.randn(pictures.shape, generator=generator, device=pictures.device) * 0.6
    smear = nnf.avg_pool2d(nnf.pad(pictures, (12, 12, 12, 12), mode="replicate"), 25, 1)
    weight = 0.85 + 0.15 * torch.rand(len(pictures), 1, 1, 1, generator=generator, device=pictures.device)
    kinds = torch.stack([empty, torch.lerp(pictures, empty, head), torch.lerp(pictures, noise, head),
                         torch.lerp(pictures, smear, head), torch.lerp(pictures, noise, weight)])
    place = torch.arange(len(pictures), device=pictures.device)
    return kinds[place % len(kinds), place].clamp(-1, 1)


def head_views(person: Tensor, vae: VideoVAE, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, h, w) as soft as generated ones, poses (B, 6), presence (B,): every fourth shows no face.

    Every second picture went through the VAE as a clip of one frame, all through `degrade`.
    """
    B = len(person)
    pose, setting = widened_poses(B, generator), world.draw_settings(B, generator)
    video, boxes, _ = world.render(person, setting, pose[:, None], SIZE)
    pictures, present = video[:, :, 0], torch.arange(B, device=person.device) % 4 != 3
    gone = ~present
    pictures[gone] = without_head(pictures[gone], boxes[gone, 0], setting[gone], generator)
    coded = torch.arange(B, device=person.device) % 8 < 4
    with torch.no_grad(), torch.autocast(person.device.type, torch.bfloat16):
        pictures[coded] = vae.decode(vae.encode(pictures[coded][:, :, None]))[:, :, 0].float()
    return degrade(pictures, generator), pose, present


def head_loss(net: HeadPoseEstimator, pictures: Tensor, pose: Tensor, present: Tensor) -> Tensor:
    """Presence: cross-entropy. Pose: squared error in units of each number's spread, where there is a head."""
    out = net(pictures)                                                                   # (B, 7)
    error = ((out[:, 1:] - pose) / out.new_tensor(POSE_SPREAD)).square().mean(1)
    return nnf.binary_cross_entropy_with_logits(out[:, 0], present.float()) + (error * present).sum() / present.sum()


def head_stage(args: argparse.Namespace, device: str) -> None:
    """Train the head-pose estimator of scores.py on people drawn anew in every step -> weights/tiny/head_pose.safetensors."""
    torch.manual_seed(args.seed + 2000)
    vae = load_weights(VideoVAE(read_metadata(WEIGHTS / "model.safetensors")["config"]["vae"]),
                       WEIGHTS / "model.safetensors", "vae.", torch.float32, device).eval().requires_grad_(False)
    net = HeadPoseEstimator().to(device)
    named = dict(net.named_parameters())
    optimizer = MuonAdamW(*split_parameters(named, ("convs.0", "out")), lr_matrix=3e-3, lr_other=2e-3)
    run = Run(RUNS / "head", named | {k: v for k, v in net.named_buffers() if v.is_floating_point()}, optimizer,
              EMA({}))
    loss_fn = torch.compile(head_loss) if args.compile else head_loss
    for step in run.steps(args.steps, args.minutes, args.batch, "head"):
        g = seeded(args.seed, step, 5, device=device)
        person = torch.rand(args.batch, len(world.TRAITS), generator=g, device=device)
        loss = loss_fn(net, *head_views(person, vae, g))
        descend(run, step, loss, schedule(step, args.steps), f"people drawn with seed {args.seed}")
        run.record(loss=loss.item())
    tensors = {k: v.float().contiguous() for k, v in net.state_dict().items() if v.is_floating_point()}
    atomic_write(WEIGHTS / "head_pose.safetensors", lambda p: save_file(tensors, p))
    for name, value in check_head(net, vae, device).items():
        print(f"head, {name}: {value}")


@torch.no_grad()
def check_head(net: HeadPoseEstimator, vae: VideoVAE, device: str) -> dict[str, float]:
    """On unseen people: mean error of each pose number, presence, and read_action on true clips and through the VAE."""
    net.eval()
    g = seeded(9, device=device)
    pictures, pose, present = head_views(world.people("val", 256).to(device), vae, g)
    out = net(pictures)
    error = (out[present, 1:] - pose[present]).abs().mean(0)
    report = {f"mean error of {name}": e for name, e in zip(("x", "y", "scale", "yaw", "pitch", "mouth"), error.tolist(),
                                                           strict=True)}
    report["presence accuracy"] = ((out[:, 0] > 0) == present).float().mean().item()
    actions = torch.arange(256, device=device) % len(world.ACTIONS)
    video, _, _ = world.render(world.people("val", 256).to(device), world.draw_settings(256, g),
                               world.action_poses(actions, FRAMES, g), SIZE)
    coded = torch.cat([vae.decode(vae.encode(v)).clamp(-1, 1) for v in video.split(16)])
    for name, clips in (("true clips", video), ("true clips through the VAE", coded)):
        found, poses = read_heads(net, clips)
        report[f"faces found in {name}"] = found.float().mean().item()
        report[f"actions read in {name}"] = (read_action(poses) == actions).float().mean().item()
    return {name: round(value, 4) for name, value in report.items()}


# --------------------------------------------------------------------------------------------------------- stage: export
def export_stage(args: argparse.Namespace, device: str) -> None:
    """runs/ -> weights/tiny: the checkpoint that train.py wrote, the Gemma folder and the two recognisers."""
    trained = RUNS / "st-drc" / "model.safetensors"
    sources = {f"{name}.safetensors": RUNS / f"{name}.safetensors" for name in ("face", "eval_encoder")}
    sources |= {f"gemma/{name}": RUNS / "gemma" / name for name in ("config.json", "tokenizer.json",
                                                                    "model.safetensors")}
    for source in (trained, *sources.values()):
        if not source.exists():
            raise ValueError(f"expected {source}, got no such file; run the stage that writes it first (--help lists them)")
    for name, source in sources.items():
        atomic_write(WEIGHTS / name, lambda p, source=source: shutil.copyfile(source, p))
    with safe_open(trained, "pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    vae = load_weights(VideoVAE(TINY_VAE), trained, "vae.", torch.float32)
    config = {"transformer": TINY_TRANSFORMER, "vae": TINY_VAE,
              "inference": TINY_INFERENCE | {"reference_psnr_floor": reference_floor(vae)}}
    kept = {k: v for k, v in metadata.items() if k in ("reference_placement", "training_steps")}
    save_checkpoint(WEIGHTS / "model.safetensors", tensors, config, kept)
    for path in sorted(WEIGHTS.rglob("*.*")):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    for name, row in EXAMPLES.items():  # faces for the README, people of the test split
        picture, _ = world.draw_references(world.people("test", row + 1)[-1:], torch.tensor([[2, 0, 4]]), seeded(row),
                                           size=256, share=1.0)
        image = Image.fromarray(world.to_uint8(picture[0]).permute(1, 2, 0).numpy())
        atomic_write(Path("examples") / f"{name}.png", lambda p, image=image: image.save(p, format="PNG"))


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("toy.pretrain", description=__doc__.split("\n")[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("stage", choices=["render", "vae", "encode", "base", "face", "eval_encoder", "export", "head"])
    parser.add_argument("--steps", type=int, help="default: vae 9600, base 4000, face 600, eval_encoder 450, head 1600")
    parser.add_argument("--batch", type=int, help="per worker; default: vae and base 8, others 64")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop (and save) after this time; run again to go on")
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(words)
    check_ranges(args, {"steps": (1, 1e9), "batch": (2, 4096), "minutes": (0, 1e9), "clips": (1, 1e7),
                        "seed": (0, 2**62)})
    defaults = {"vae": (9600, 8), "base": (4000, 8), "face": (600, 64), "eval_encoder": (450, 64), "head": (1600, 64)}
    defaults = defaults.get(args.stage, (0, 0))
    args.steps = defaults[0] if args.steps is None else args.steps
    args.batch = defaults[1] if args.batch is None else args.batch
    return args


def pretrain(args: argparse.Namespace) -> None:
    for folder in (RUNS, DATA, WEIGHTS):
        check_folder(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_flush_denormal(True)
    if args.stage == "render":
        render_stage(args)
    elif args.stage in ("face", "eval_encoder"):
        recogniser_stage(args, device, eval_encoder=args.stage == "eval_encoder")
    else:
        {"vae": vae_stage, "encode": encode_stage, "base": base_stage, "head": head_stage,
         "export": export_stage}[args.stage](args, device)


def main(words: list[str] | None = None) -> int:
    return command("toy.pretrain", lambda: pretrain(parse_arguments(words)))


if __name__ == "__main__":
    sys.exit(main())
