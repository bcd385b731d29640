"""Makes the bundled tiny base model: the stand-in for LTX-2.3, trained from nothing on world.py.

This is *not* the paper. ST-DRC starts from LTX-2.3; we cannot ship 22 billion parameters, so these stages make a small
model of the same architecture, in the same file format, for the paper's recipe (train.py) to start from:

    python pretrain.py render      clips of the world -> memory map in data/             (CPU only; a GPU renders as it goes)
    python pretrain.py vae         the causal video VAE
    python pretrain.py encode      clips -> cached latents
    python pretrain.py base        text-to-video without any reference: Gemma-style encoder, connector, transformer
    python pretrain.py face        the recogniser that supervises identity (world people of the split "train")
    python pretrain.py judge       a second recogniser, other people, other width, other seed: it only ever evaluates
    python pretrain.py export      everything -> weights/tiny

Every stage resumes: run the same command again, on CPU or CUDA. `--minutes` bounds one command, the state in runs/
carries on. `torchrun --nproc_per_node=2 pretrain.py vae` uses two worker processes (on CPU faster than two threads).

Read next: train.py, where the paper begins.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import world
from losses import pool_face_mask
from optim import Average, MuonAdamW, Run, average_gradients, schedule, seeded, split_parameters
from vae import VideoVAE, psnr

DATA, RUNS, WEIGHTS = Path("data"), Path("runs"), Path("weights/tiny")
FRAMES, SIZE, FRAME_RATE = 9, 64, 8.0  # 64 pixels: at 48 the eyes are 1-2 pixels; at 96 everything costs 2.3 times more
CLIPS = 24_576                         # every one shows another person

# The tiny model: LTX-2.3's own config keys with small numbers. Same code, other numbers.
TINY_VAE = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3,
    "latent_channels": 128,  # as LTX: the best linear code gains 3 dB over 64 channels and the transformer hardly notices
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


# --------------------------------------------------------------------------------------------------------- data: render
def clip_rows(split: str, start: int, count: int) -> dict[str, Tensor]:
    """Who does what where, for clips start..start+count of a split. A pure function of its arguments."""
    out = {k: [] for k in ("person", "setting", "action", "template")}
    everyone = world.people(split, start + count)
    for i in range(start, start + count):
        g = seeded(world.SPLIT_SEEDS[split], i)
        out["person"].append(everyone[i])
        out["setting"].append(world.draw_settings(1, g)[0])
        out["action"].append(world.draw_actions(1, g)[0])
        out["template"].append(torch.randint(len(world.TEMPLATES), (), generator=g))
    return {k: torch.stack(v) for k, v in out.items()}


def render_clips(rows: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows -> video (B, 3, F, 64, 64) in [-1, 1], face boxes (B, F, 4), face mask on the latent grid (B, L)."""
    device = generator.device
    poses = world.action_poses(rows["action"].to(device), FRAMES, generator)
    video, boxes, mask = world.render(rows["person"].to(device), rows["setting"].to(device), poses, SIZE)
    return video, boxes, pool_face_mask(mask, 4, 8)


def render_stage(args: argparse.Namespace) -> None:
    """Render `--clips` clips once into data/train: training never waits for the renderer. Resumable in blocks."""
    folder = DATA / "train"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ((FRAMES - 1) // 4 + 1) * (SIZE // 8) ** 2
    shapes = {"video": ((args.clips, FRAMES, SIZE, SIZE, 3), np.uint8), "boxes": ((args.clips, FRAMES, 4), np.float32),
              "faces": ((args.clips, tokens), np.float16)}
    fresh = not (folder / "video.npy").exists()
    maps = {k: np.lib.format.open_memmap(folder / f"{k}.npy", "w+" if fresh else "r+", dtype, shape)
            for k, (shape, dtype) in shapes.items()}
    for start in tqdm(range(0, args.clips, 32), desc="render", unit="block"):
        if not fresh and maps["boxes"][start + 31].any():
            continue  # already there
        video, boxes, faces = render_clips(clip_rows("train", start, 32), seeded(args.seed, start))
        maps["video"][start:start + 32] = world.to_uint8(video).permute(0, 2, 3, 4, 1).numpy()
        maps["faces"][start:start + 32] = faces.numpy()
        maps["boxes"][start:start + 32] = boxes.numpy()  # last: it marks the block as complete


class Clips:
    """Batches of training clips: from the memory map on CPU, rendered on the spot on CUDA."""

    def __init__(self, device: str):
        self.device = device
        if device == "cpu":
            if not (DATA / "train" / "boxes.npy").exists():
                raise SystemExit("no rendered clips in data/train: run `python pretrain.py render` first")
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
    its small mistakes; measured, it costs the reconstruction almost nothing.
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


def save_sheet(path: Path, rows: list[Tensor], scale: int = 2) -> None:
    """Contact sheet: each row a list of pictures (n, 3, h, w) in [-1, 1], side by side; enlarged by a whole factor."""
    picture = torch.cat([torch.cat(list(r), dim=2) for r in rows], dim=1)
    image = Image.fromarray(world.to_uint8(picture).permute(1, 2, 0).cpu().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * scale, image.height * scale), Image.NEAREST).save(path)


@torch.no_grad()
def check_vae(vae: VideoVAE, weights: dict[str, Tensor], run: Run, device: str) -> float:
    """PSNR on unseen people with the averaged weights, and a sheet: input above, reconstruction below."""
    now = {k: p.detach().clone() for k, p in vae.named_parameters()}
    vae.load_state_dict(weights, strict=False)
    video = validation_clips(32)[0].to(device)
    with torch.autocast(device, torch.bfloat16):
        out = vae.decoder(vae.encoder(video)).float()
    vae.load_state_dict(now, strict=False)
    value = psnr(out, video).mean().item()
    rows = [x[i, :, ::2].transpose(0, 1) for i in range(6) for x in (video, out)]
    save_sheet(run.folder / "sheet.png", rows)
    run.log(val_psnr=value)
    return value


def vae_stage(args: argparse.Namespace, device: str) -> None:
    """Train the VAE. Every clip shows a new person, so there is nothing to memorise and no need for a test loss."""
    torch.manual_seed(args.seed)
    vae = VideoVAE(TINY_VAE).to(device)
    init_vae(vae)
    named = dict(vae.named_parameters())
    optimizer = MuonAdamW(*split_parameters(named, keep_out=("encoder.conv_in", "decoder.conv_out")))
    run = Run(RUNS / "vae", named, optimizer, Average(named))
    clips, loss_fn = Clips(device), torch.compile(vae_loss) if args.compile else vae_loss
    latent = (args.batch, 128, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    next_check = run.seconds + 60
    for step in run.steps(args.steps, args.minutes, args.batch, "vae"):
        g = seeded(args.seed, step, run.rank, device=device)
        video, boxes = clips.batch(args.batch, g)
        noise = torch.randn(latent, generator=g, device=device)
        with torch.autocast(device, torch.bfloat16):
            loss, dB = loss_fn(vae, video, box_mask(boxes, SIZE), noise)
        loss.backward()
        average_gradients(optimizer.parameters(), run.world)
        nn.utils.clip_grad_norm_(optimizer.parameters(), 1.0)
        optimizer.step(schedule(step, args.steps))
        vae.zero_grad(set_to_none=True)
        run.average.update(named, step)
        run.losses = {"loss": 0.98 * run.losses.get("loss", loss.item()) + 0.02 * loss.item(),
                      "train_psnr": 0.98 * run.losses.get("train_psnr", dB.item()) + 0.02 * dB.item()}
        if run.rank == 0 and run.seconds > next_check:
            check_vae(vae, run.average.shadow, run, device)
            next_check = run.seconds + 180
    if run.rank == 0:
        print(f"validation PSNR {check_vae(vae, run.average.shadow, run, device):.2f} dB after {run.done} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["render", "vae"])
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--clips", type=int, default=CLIPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.set_flush_denormal(True)
    if args.stage == "render":
        render_stage(args)
    elif args.stage == "vae":
        vae_stage(args, device)


if __name__ == "__main__":
    main()
