"""Clips of the procedural world as training reads them: latents, captions, references, faces.

The idea. world.py draws people; here they become the `Batch` of clips/dataset.py, so that train.py
cannot tell the toy from people's own files. There are two ways. A CPU renders slowly, so it keeps
what it has rendered and encoded (`python -m toy.pretrain render`, then `encode`): `cached_world`.
A GPU is faster than a disk, so it draws every clip in the step that asks for it: `FreshClips`. A
CPU that has kept nothing does the same, so that a first training needs no preparation.

The failure this prevents: a toy with a data path of its own. What works on it would say nothing of
the path that real clips take.

our reading: all of it; ST-DRC (arXiv 2606.02441) trains on real videos. As in world.py the
reference shows the person at another moment, in half of the cases in another setting. A caption
leaves out place, light, shirt or action now and then: the reference is then the only picture of it,
and what the clip shows instead must not come from there.

Conventions. Rows: person (B, T) traits, setting (B, 3), action (B,), told (B, 4) what the caption
says of both (world.caption), template (B,) of the caption. Boxes in pixels. Landmarks are not
drawn, so they are NaN; a face is seen in every frame.

    train, validation = open_world(checkpoint, gemma_root, vae, "cpu", "fp32")
    batch = train.batch([0, 1], [seeded(0, step, place) for place in range(2)])

Read next: toy/vocabulary.py
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from clips.dataset import Batch, ClipSource, open_manifest
from common.seeds import Generators, drawn, seeded
from losses import pool_face_mask
from ltx.text import TextEncoder
from ltx.vae import VideoVAE
from reference import patchify
from toy import world
from toy.config import CLIPS, DATA, FRAME_RATE, FRAMES, GRID, SIZE
from training.workers import autocast, wait

UNSAID = 0.2  # share of captions that leave out the place; of the others, the light, and so on

# ------------------------------------------------------------ rows and pictures


def draw_told(setting: Tensor, action: Tensor, generator: Generator) -> Tensor:
    """What captions tell of settings (B, 3) and actions (B,): (B, 4), UNSAID of it left out."""
    whole = torch.cat([setting, action[:, None]], dim=1)                   # (B, 4)
    left_out = torch.rand(whole.shape, generator=generator, device=generator.device) < UNSAID
    return torch.where(left_out.to(whole.device), past_the_end(whole.device), whole)


def past_the_end(device: torch.device | str = "cpu") -> Tensor:
    """The numbers that say nothing of place, light, shirt and action, (4,)."""
    return torch.tensor([len(table) for table in world.TABLES.values()], device=device)


def clip_rows(split: str, start: int, count: int) -> dict[str, Tensor]:
    """Who does what where, for clips start..start+count of a split. A pure function."""
    out = {k: [] for k in ("person", "setting", "action", "template", "told")}
    everyone = world.people(split, start + count)
    for i in range(start, start + count):
        g = seeded(world.SPLIT_SEEDS[split], i)
        out["person"].append(everyone[i])
        out["setting"].append(world.draw_settings(1, g)[0])
        out["action"].append(world.draw_actions(1, g)[0])
        out["template"].append(torch.randint(len(world.TEMPLATES), (), generator=g))
        out["told"].append(draw_told(out["setting"][-1][None], out["action"][-1][None], g)[0])
    return {k: torch.stack(v) for k, v in out.items()}


def captions_of(rows: dict[str, Tensor]) -> list[str]:
    """The caption of each row, and the null prompt."""
    each = zip(rows["told"], rows["template"], strict=True)
    return [*(world.caption(told[:3], int(told[3]), int(t)) for told, t in each), ""]


def caption_number(told: Tensor, template: Tensor) -> Tensor:
    """Where the captions of these rows stand in `world.all_captions()`, (B,): digits of a number
    of mixed base, the scene first."""
    number = torch.zeros_like(template)
    for digit, base in zip(told.T, past_the_end() + 1, strict=True):
        number = number * int(base) + digit
    return number * len(world.TEMPLATES) + template


def render_clips(rows: dict[str, Tensor], generators: Generators,
                 device: str | None = None, paint: Callable = world.render
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """Rows -> video (B, 3, F, 64, 64) in [-1, 1], boxes (B, F, 4), face mask of tokens (B, L).

    generators: of the motion; one for all clips, or one for each. device: None = that of the rows;
    paint: world.render, or the same compiled.
    """
    device = device or rows["person"].device
    poses, = drawn(generators, len(rows["action"]), lambda g, i: (
        world.action_poses(rows["action"][i], FRAMES, g),))                # (B, F, 6)
    person, setting = rows["person"].to(device), rows["setting"].to(device)
    video, boxes, mask = paint(person, setting, poses.to(device), SIZE)
    return video, boxes, pool_face_mask(mask, 4, 8)


@torch.no_grad()
def encode(vae: VideoVAE, video: Tensor, precision: str = "bf16") -> Tensor:
    """video (B, 3, F, h, w) -> latent tokens (B, L, C), computed in the training's precision: the
    bundled weights saw bf16, which is 0.01 away from float32, of a deviation of 1."""
    with autocast(video.device.type, precision):
        return patchify(vae.encode(video)).float()


# ------------------------------------------------------------ sources of batches


class WorldClips:
    """What both ways share: captions, references, the batch. `use_text` comes first.

    captions: those that may occur, the null prompt last; count: how many clips an epoch has.
    """

    same_setting = 0.5  # share of references in the clip's own setting: there copying pays

    def __init__(self, captions: list[str], count: int):
        self.captions, self.groups = captions, [range(count)]
        self.kept: dict[str, Tensor] = {}  # caption -> its context (N, D)
        self.paint = world.render

    def use_text(self, text: TextEncoder) -> None:
        self.text = text
        self.null_context = self.contexts([len(self.captions) - 1])[0]     # (N, D)

    @torch.no_grad()
    def contexts(self, rows: Sequence[int]) -> Tensor:
        """Of these captions, (B, N, D) on the CPU. The text encoder is frozen: each caption is
        encoded once, when it is first needed."""
        wanted = [self.captions[row] for row in rows]
        new = [caption for caption in dict.fromkeys(wanted) if caption not in self.kept]
        if new:
            self.kept |= dict(zip(new, self.text.encode(new).bfloat16().cpu(), strict=True))
        return torch.stack([self.kept[caption] for caption in wanted]).float()

    def clips(self, indices: list[int], generators: Generators) -> dict[str, Tensor]:
        """x0 (B, L, C), face (B, L), boxes (B, F, 4), person (B, T), setting (B, 3), and caption
        (B,), its place in `captions`."""
        raise NotImplementedError

    def batch(self, indices: list[int], generators: Generators) -> Batch:
        """The clips, each with a picture of its person at another moment."""
        clips = self.clips(indices, generators)
        person, setting = clips["person"], clips["setting"]
        pictures, boxes = drawn(generators, len(person), lambda g, i: world.draw_references(
            person[i], setting[i], g, SIZE, self.same_setting, self.paint))
        B, F = clips["boxes"].shape[:2]
        return Batch(index=list(indices), grid=GRID, frame_rate=FRAME_RATE, x0=clips["x0"],
                     context=self.contexts(clips["caption"].tolist()),
                     face=clips["face"], boxes=clips["boxes"],
                     landmarks=torch.full((B, F, 5, 2), torch.nan),
                     seen=torch.ones(B, F, dtype=torch.bool), reference=pictures,
                     reference_box=boxes, reference_landmarks=torch.full((B, 5, 2), torch.nan),
                     reference_seen=torch.ones(B, dtype=torch.bool))

    def names(self, indices: list[int]) -> str:
        return f"clips {indices}"

    def fingerprint(self) -> str:
        return f"world, {len(self.groups[0])}"


class KeptClips(WorldClips):
    """Rows with their latents (N, L, C), faces (N, L) and boxes (N, F, 4), perhaps on a disk."""

    def __init__(self, rows: dict[str, Tensor], latents: np.ndarray, faces: np.ndarray,
                 boxes: np.ndarray):
        super().__init__(captions_of(rows), len(latents))
        self.rows, self.latents, self.faces, self.boxes = rows, latents, faces, boxes

    def clips(self, indices: list[int], generators: Generators) -> dict[str, Tensor]:
        i, rows = np.array(indices), torch.tensor(indices)
        return {"caption": rows, "x0": torch.from_numpy(self.latents[i]).float(),
                "face": torch.from_numpy(self.faces[i]).float(),
                "boxes": torch.from_numpy(self.boxes[i]),
                "person": self.rows["person"][rows], "setting": self.rows["setting"][rows]}


class FreshClips(WorldClips):
    """Every clip is rendered and encoded in the step, and never comes back."""

    def __init__(self, vae: VideoVAE, precision: str = "bf16"):
        super().__init__([*world.all_captions(), ""], CLIPS)
        self.vae, self.precision = vae, precision
        if next(vae.parameters()).is_cuda:  # thousands of tiny operations become a few
            self.paint = torch.compile(world.render, dynamic=False)

    def clips(self, indices: list[int], generators: Generators) -> dict[str, Tensor]:
        def draw(g: Generator, i: slice) -> tuple[Tensor, ...]:
            count = len(range(*i.indices(len(indices))))
            person = torch.rand(count, len(world.TRAITS), generator=g, device=g.device)
            setting, action = world.draw_settings(count, g), world.draw_actions(count, g)
            template = torch.randint(len(world.TEMPLATES), (count,), generator=g, device=g.device)
            return person, setting, action, template, draw_told(setting, action, g)
        person, setting, action, template, told = drawn(generators, len(indices), draw)
        device = next(self.vae.parameters()).device.type
        rows = {"person": person, "setting": setting, "action": action}
        video, boxes, face = render_clips(rows, generators, device, self.paint)
        x0 = encode(self.vae, video, self.precision)
        return {"caption": caption_number(told, template), "x0": x0, "face": face, "boxes": boxes,
                "person": person, "setting": setting}

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}, fresh"


def from_uint8(videos: np.ndarray) -> Tensor:
    """(B, F, h, w, 3) of 0..255 -> (B, 3, F, h, w) in [-1, 1]."""
    return torch.from_numpy(np.array(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def cached_world(vae: VideoVAE, folder: Path = DATA / "train") -> KeptClips:
    """What `python -m toy.pretrain render` and `encode` have written. Raises ValueError when they
    have not, or with another VAE: nothing else would show it."""
    if not (folder / "latents.npy").exists():
        raise ValueError(f"expected latents in {folder}, got none; "
                         "run `python -m toy.pretrain render`, then `encode`")
    latents, faces, boxes, video = (np.load(folder / f"{name}.npy", mmap_mode="r")
                                    for name in ("latents", "faces", "boxes", "video"))
    again = encode(vae, from_uint8(video[:8]), "fp32")
    far = (again - torch.tensor(latents[:8]).float()).square().mean().sqrt()
    if not far < 0.1:  # latents have a deviation of 1
        raise ValueError(f"expected latents of this checkpoint's VAE in {folder}, got some that "
                         f"are {far:.2f} away; run `python -m toy.pretrain encode` again, for the "
                         "bundled VAE with --keep-text")
    return KeptClips(clip_rows("train", 0, len(latents)), latents, faces, boxes)


def validation_world(vae: VideoVAE, count: int, device: str, precision: str = "bf16"
                     ) -> KeptClips:
    """`count` clips of people nobody trains on."""
    rows = clip_rows("val", 0, count)
    video, boxes, faces = render_clips(rows, seeded(5), device)
    kept = (encode(vae, video, precision), faces, boxes)
    return KeptClips(rows, *(x.cpu().numpy() for x in kept))


def open_world(checkpoint: Path, gemma_root: Path, vae: VideoVAE, device: str, precision: str,
               quiet: bool = False) -> tuple[WorldClips, WorldClips]:
    """(clips to train on, 16 of other people to look at), each with its text encoder."""
    if device == "cpu" and (DATA / "train" / "latents.npy").exists():
        clips = cached_world(vae)
    else:
        clips = FreshClips(vae, precision)
        if not quiet:
            print("every clip is rendered and encoded in its step; a CPU is faster with kept ones: "
                  "`python -m toy.pretrain render`, then `encode`")
    text = TextEncoder.load(checkpoint, gemma_root, device, torch.float32).eval()
    both = clips, validation_world(vae, 16, device, precision)
    for part in both:
        part.use_text(text)
    return both


def open_data(args: Namespace, vae: VideoVAE, device: str, rank: int = 0, world_size: int = 1
              ) -> tuple[ClipSource, ClipSource, bool]:
    """(clips to train on, clips to look at, whether the second are never trained on), from
    train.py's arguments."""
    if args.manifest is None:
        train, shown = open_world(args.checkpoint, args.gemma_root, vae, device, args.precision,
                                  quiet=rank > 0)
        train.same_setting = args.same_setting
        return train, shown, True
    share = rank, world_size, wait
    train = open_manifest(args.manifest, args, vae, device, *share)
    if args.validation is None:
        return train, train, False
    return train, open_manifest(args.validation, args, vae, device, *share), True
