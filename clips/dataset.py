"""What one training step reads: clips as latents, their captions, a reference for each, and where the faces are.

The idea. The recipe in train.py should not know where clips come from. Two sources give the same `Batch`: `WorldClips`, the
procedural world (references are drawn afresh, every box is known), and `RealClips`, files that clips.py has checked and
cache.py has encoded. Both are asked for given clips with given random generators, one per clip, and nothing else
is random. So a batch is a pure function of (seed, step, place): it can be prepared ahead, by any number of processes,
and again after a kill.

The failure this prevents: a data loader with a memory. After a resume it starts over, some clips come twice and some
never, and nobody notices. `Order` computes which clips belong to step n; there is no position to save.

paper:        clips with a reference of the person (ST-DRC, arXiv 2606.02441).
our reading:  one shape per batch, every clip once per epoch, the reference on a canvas of the clip's own size.

Conventions. Clips are counted from 0 in the source's own list. Boxes and landmarks are pixels of the clip, or of the
canvas for the reference; NaN landmarks = none known, `seen` False = no face in that frame.

    order = Order(data.groups, size=16, seed=0)
    batch = data.batch(order(step), [seeded(0, step, k) for k in range(16)])        # x0 (B, L, C), reference (B, 3, h, w)

Read next: optim.py
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

from clips.cache import CachedLatents, cache_contexts, cache_latents, check_once, lazy_encoder, text_dtype, text_key
from clips.frames import DEFAULT_BUCKETS, clip_times, cover, parse_buckets
from clips.manifest import box_mask, draw_reference, faces_for_clip, load_faces
from common.seeds import seeded
from losses import pool_face_mask
from ltx.offload import OFFLOADS
from ltx.text import TextEncoder
from ltx.vae import VideoVAE
from reference import letterbox, patchify
from toy import world
from training.workers import wait

DATA = Path("data")
FRAMES, SIZE, FRAME_RATE = 9, 64, 8.0                # of the world's clips; at 48 pixels the eyes would be 1-2 pixels wide
GRID = ((FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)  # latent frames, height, width under the tiny VAE
CLIPS = 24_576                                       # every one shows another person


class PerClip:
    """Base of dataclasses whose tensors and lists have one entry for each clip of a batch."""

    def part(self, start: int, stop: int) -> Self:
        """Clips start .. stop - 1."""
        return replace(self, **{f.name: v[start:stop] for f in fields(self)
                                if isinstance(v := getattr(self, f.name), (Tensor, list))})

    def to(self, device: str) -> Self:
        """Every tensor on the device."""
        return replace(self, **{f.name: v.to(device) for f in fields(self)
                                if isinstance(v := getattr(self, f.name), Tensor)})


@dataclass
class Batch(PerClip):
    """B clips of one shape. F frames of h x w pixels; L = F' H W video tokens."""

    index: list[int]          # which clips of the source, to be named when something goes wrong
    grid: tuple[int, int, int]  # F', H, W
    frame_rate: float
    x0: Tensor                # (B, L, C) clean latent tokens
    context: Tensor           # (B, N, D) of the captions
    face: Tensor              # (B, L) share of face in each token, all 0 where no face is known
    boxes: Tensor             # (B, F, 4)
    landmarks: Tensor         # (B, F, 5, 2)
    seen: Tensor              # (B, F) bool
    reference: Tensor         # (B, 3, h, w) canvas in [-1, 1], not augmented
    reference_box: Tensor     # (B, 4)
    reference_landmarks: Tensor  # (B, 5, 2)
    reference_seen: Tensor    # (B,) bool

    def __len__(self) -> int:
        return len(self.index)


def check_batch(step: int, batch: Batch, data: WorldClips | RealClips) -> None:
    """Raise ValueError naming step, what is not finite, and the clips it belongs to; losses only show the whole batch."""
    for what, values in (("latents", batch.x0), ("contexts", batch.context), ("pixels of the reference", batch.reference)):
        if bad := [i for i, value in zip(batch.index, values, strict=True) if not value.isfinite().all()]:
            raise ValueError(f"expected finite {what}, got NaN or infinity at step {step}, {data.names(bad)}; delete the "
                             "cached files and make them again, or leave the rows out")


class Order:
    """step -> the `size` clips of that step, over all processes: one group at a time, every clip once per epoch.

    our reading. groups: lists of clips of one shape. What does not fill a batch waits for the next epoch, which shuffles
    anew; a group smaller than a batch is repeated to fill it. Raises ValueError without clips.
    """

    def __init__(self, groups: Sequence[Sequence[int]], size: int, seed: int):
        self.groups, self.size, self.seed = [list(group) for group in groups if group], size, seed
        self.per_epoch = sum(max(1, len(group) // size) for group in self.groups)
        self.epoch, self.batches = -1, []
        if not self.groups:
            raise ValueError("expected clips to train on, got none; `python -m clips.manifest check` says why rows are not used")

    def __call__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, self._shuffle(seeded(self.seed, "order", epoch))
        return self.batches[place]

    def _shuffle(self, g: Generator) -> list[list[int]]:
        batches = []
        for group in self.groups:
            order = [group[k] for k in torch.randperm(len(group), generator=g).tolist()]
            order *= -(-self.size // len(order))  # only where one batch asks for more clips than there are
            batches += [order[a : a + self.size] for a in range(0, len(order) - self.size + 1, self.size)]
        return [batches[k] for k in torch.randperm(len(batches), generator=g).tolist()]


def shard_indices(indices: list[int], rank: int, world_size: int, size: int) -> list[tuple[int, int]]:
    """This process's part of a step, as (place in the whole batch, clip): every world_size-th run of `size` places."""
    runs = range(rank * size, len(indices), world_size * size)
    return [(place, indices[place]) for a in runs for place in range(a, a + size)]


# ------------------------------------------------------------------------------------------------------ the world: clips
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


def render_clips(rows: dict[str, Tensor], generators: Generator | Sequence[Generator], device: str = "cpu"
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """Rows -> video (B, 3, F, 64, 64) in [-1, 1], face boxes (B, F, 4), face mask on the latent grid (B, L)."""
    if isinstance(generators, Generator):
        poses = world.action_poses(rows["action"], FRAMES, generators)
    else:
        poses = torch.cat([world.action_poses(rows["action"][i : i + 1], FRAMES, g) for i, g in enumerate(generators)])
    video, boxes, mask = world.render(rows["person"].to(device), rows["setting"].to(device), poses.to(device), SIZE)
    return video, boxes, pool_face_mask(mask, 4, 8)


class WorldClips:
    """Clips of the procedural world, either kept as latents (`cached_world`) or made on the spot (`fresh_world`).

    captions: of each clip, or all that may occur, the null prompt last. rows, latents (N, L, C), faces (N, L), boxes
    (N, F, 4): of the kept clips; vae: makes fresh ones. `encode_captions` before the first `batch`.
    """

    def __init__(self, captions: list[str], rows: dict | None = None, latents: np.ndarray | None = None,
                 faces: np.ndarray | None = None, boxes: np.ndarray | None = None, vae: VideoVAE | None = None):
        self.captions, self.vae = captions, vae
        self.rows, self.latents, self.faces, self.boxes = rows, latents, faces, boxes
        self.groups = [range(CLIPS if latents is None else len(latents))]

    @torch.no_grad()
    def encode_captions(self, text: TextEncoder, quiet: bool = False) -> None:
        """The text path is frozen, so each distinct caption is encoded once: contexts (U, N, D), and the row of each."""
        distinct = list(dict.fromkeys(self.captions))
        blocks = tqdm(range(0, len(distinct), 128), desc="captions", disable=quiet)
        self.contexts = torch.cat([text.encode(distinct[a : a + 128]).bfloat16().cpu() for a in blocks])
        place = {caption: row for row, caption in enumerate(distinct)}
        self.context_row = torch.tensor([place[caption] for caption in self.captions])
        self.null_context = self.contexts[self.context_row[-1]].float()                   # (N, D)

    def clips(self, indices: list[int], generators: Sequence[Generator]) -> dict[str, Tensor]:
        """caption (B,), x0 (B, L, C), face (B, L), boxes (B, F, 4), person (B, T), setting (B, 3)."""
        if self.vae is not None:
            return self._fresh(generators)
        i, rows = np.array(indices), torch.tensor(indices)
        return {"caption": rows, "x0": torch.from_numpy(self.latents[i]).float(),
                "face": torch.from_numpy(self.faces[i]).float(), "boxes": torch.from_numpy(self.boxes[i]),
                "person": self.rows["person"][rows], "setting": self.rows["setting"][rows]}

    @torch.no_grad()
    def _fresh(self, generators: Sequence[Generator]) -> dict[str, Tensor]:
        device = next(self.vae.parameters()).device.type
        rows = {"person": torch.cat([torch.rand(1, len(world.TRAITS), generator=g) for g in generators]),
                "setting": torch.cat([world.draw_settings(1, g) for g in generators]),
                "action": torch.cat([world.draw_actions(1, g) for g in generators])}
        template = torch.cat([torch.randint(len(world.TEMPLATES), (1,), generator=g) for g in generators])
        video, boxes, face = render_clips(rows, generators, device)
        with torch.autocast(device, torch.bfloat16):
            x0 = patchify(self.vae.encode(video)).float()
        sizes = (len(world.LIGHTS), len(world.SHIRTS), len(world.ACTIONS), len(world.TEMPLATES))
        caption = rows["setting"][:, 0]  # the place of this caption in world.all_captions()
        for size, digit in zip(sizes, (*rows["setting"].T[1:], rows["action"], template), strict=True):
            caption = caption * size + digit
        return {"caption": caption, "x0": x0, "face": face, "boxes": boxes, "person": rows["person"],
                "setting": rows["setting"]}

    def batch(self, indices: list[int], generators: Sequence[Generator]) -> Batch:
        """The clips, each with a picture of its person at another moment, half of them in another setting."""
        clips = self.clips(indices, generators)
        drawn = [world.draw_references(clips["person"][i : i + 1], clips["setting"][i : i + 1], g, SIZE)
                 for i, g in enumerate(generators)]
        pictures, boxes = (torch.cat(part) for part in zip(*drawn, strict=True))
        B, F = clips["boxes"].shape[:2]
        return Batch(index=list(indices), grid=GRID, frame_rate=FRAME_RATE, x0=clips["x0"],
                     context=self.contexts[self.context_row[clips["caption"]]].float(), face=clips["face"],
                     boxes=clips["boxes"], landmarks=torch.full((B, F, 5, 2), torch.nan),
                     seen=torch.ones(B, F, dtype=torch.bool), reference=pictures, reference_box=boxes,
                     reference_landmarks=torch.full((B, 5, 2), torch.nan),
                     reference_seen=torch.ones(B, dtype=torch.bool))

    def names(self, indices: list[int]) -> str:
        return f"clips {indices}"

    def fingerprint(self) -> str:
        """Another one means other clips in the same steps."""
        return f"world, {len(self.groups[0])}"


def captions_of(rows: dict[str, Tensor]) -> list[str]:
    """The caption of each row, and the null prompt."""
    each = zip(rows["setting"], rows["action"], rows["template"], strict=True)
    return [*(world.caption(s, int(a), int(t)) for s, a, t in each), ""]


def cached_world(folder: Path = DATA / "train") -> WorldClips:
    """The clips that `pretrain.py render` and `encode` have written. Raises ValueError when they are not there."""
    if not (folder / "latents.npy").exists():
        raise ValueError(f"expected latents in {folder}, got none; run `python -m toy.pretrain render`, then `encode`")
    latents, faces, boxes = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "faces", "boxes"))
    rows = clip_rows("train", 0, len(latents))
    return WorldClips(captions_of(rows), rows, latents, faces, boxes)


def fresh_world(vae: VideoVAE) -> WorldClips:
    """For a GPU, which is faster than a disk: every clip is rendered and encoded in the step, and never comes back."""
    return WorldClips([*world.all_captions(), ""], vae=vae)


@torch.no_grad()
def validation_world(vae: VideoVAE, count: int, device: str) -> WorldClips:
    """`count` clips of people nobody trains on."""
    rows = clip_rows("val", 0, count)
    video, boxes, faces = render_clips(rows, seeded(5), device)
    with torch.autocast(device, torch.bfloat16):
        latents = patchify(vae.encode(video)).float()
    return WorldClips(captions_of(rows), rows, *(x.cpu().numpy() for x in (latents, faces, boxes)))


def open_world(checkpoint: Path, gemma_root: Path, vae: VideoVAE, device: str, quiet: bool = False
               ) -> tuple[WorldClips, WorldClips]:
    """(clips to train on, 16 of other people to look at), with the contexts of their captions."""
    clips = cached_world() if device == "cpu" else fresh_world(vae)
    text = TextEncoder.load(checkpoint, gemma_root, device, torch.float32).eval()
    both = clips, validation_world(vae, 16, device)
    for part in both:
        part.encode_captions(text, quiet)
    return both


# ------------------------------------------------------------------------------------------------------------ real clips
class RealClips:
    """Rows of a checked manifest (clips.py), their cached latents and contexts (cache.py).

    rows: `Report.used`; contexts: caption -> function that reads (N, D), "" among them; scales: the VAE's in time and
    space. Faces files are read once, here.
    """

    def __init__(self, latents: CachedLatents, contexts: dict, time_scale: int, space_scale: int):
        self.rows, self.latents, self.contexts = latents.rows, latents, contexts
        self.null_context = contexts[""]().float()
        self.groups = list(latents.groups.values())
        self.scales = time_scale, space_scale
        self.known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def faces(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of clip i: boxes (F, 4), landmarks (F, 5, 2), NaN where none are known, and seen (F,)."""
        if i not in self.known:
            row, frames = self.rows[i], self.rows[i].bucket.frames
            boxes, marks, seen = torch.zeros(frames, 4), None, torch.zeros(frames, dtype=torch.bool)
            if row.faces is not None:
                crop = cover(row.found.height, row.found.width, row.bucket)
                times = clip_times(frames, row.frame_rate, row.start)
                boxes, marks, seen = faces_for_clip(load_faces(row.faces), row.bucket, crop, times)
            marks = torch.full((frames, 5, 2), torch.nan) if marks is None else marks
            self.known[i] = boxes, marks, seen
        return self.known[i]

    def batch(self, indices: list[int], generators: Sequence[Generator]) -> Batch:
        """The clips, all of one bucket, each with a reference drawn by `clips.draw_reference`."""
        bucket = self.rows[indices[0]].bucket
        x0 = torch.stack([self.latents[i] for i in indices])                              # (B, C, F', H, W)
        faces = [self.faces(i) for i in indices]
        boxes, marks, seen = (torch.stack(part) for part in zip(*faces, strict=True))
        mask = torch.stack([box_mask(b, s, bucket.height, bucket.width) for b, _, s in faces])
        drawn = [self.reference(i, g) for i, g in zip(indices, generators, strict=True)]
        pictures, ref_boxes, ref_marks, ref_seen = (torch.stack(part) for part in zip(*drawn, strict=True))
        context = torch.stack([self.contexts[self.rows[i].caption]().float() for i in indices])
        return Batch(index=list(indices), grid=tuple(x0.shape[2:]), frame_rate=self.rows[indices[0]].frame_rate,
                     x0=patchify(x0).float(), context=context, face=pool_face_mask(mask, *self.scales), boxes=boxes,
                     landmarks=marks, seen=seen, reference=pictures, reference_box=ref_boxes,
                     reference_landmarks=ref_marks, reference_seen=ref_seen)

    def reference(self, i: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Canvas (3, h, w) of the clip's size, and the face on it: box (4,), landmarks (5, 2), seen ()."""
        bucket, drawn = self.rows[i].bucket, draw_reference(self.rows, i, generator)
        canvas = letterbox(drawn.picture, bucket.height, bucket.width)
        box, marks = torch.zeros(4), torch.full((5, 2), torch.nan)
        if drawn.box is not None:
            w, h = drawn.picture.size
            scale = min(bucket.height / h, bucket.width / w)
            corner = torch.tensor([(bucket.width - w * scale) / 2, (bucket.height - h * scale) / 2])
            box = drawn.box * scale + corner.repeat(2)
            marks = marks if drawn.landmarks is None else drawn.landmarks * scale + corner
        return canvas, box, marks, torch.tensor(drawn.box is not None)

    def fingerprint(self) -> str:
        """Another one means other clips in the same steps: latents (by content), captions, where references come from."""
        rows = [(path.name, row.caption, str(row.reference), row.identity, row.faces is None)
                for row, path in zip(self.rows, self.latents.paths, strict=True)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

    def names(self, indices: list[int]) -> str:
        return "rows " + ", ".join(f"{self.rows[i].number} ({self.rows[i].video.name})" for i in indices)


def add_data_arguments(p: ArgumentParser) -> None:
    """What train.py reads. LTX-2.3: its default size and frame rate; the buckets are explained in frames.py."""
    add = p.add_argument
    add("--manifest", type=Path, help="own clips (clips.py); without it the procedural world")
    add("--validation", type=Path, help="a second manifest, never trained on: its loss is logged, its references shown")
    add("--buckets", default=DEFAULT_BUCKETS, help="height x width x frames, separated by commas")
    add("--frame-rate", type=float, default=24.0, help="of the clips after decoding")
    add("--root", action="append", default=[], help="a folder that the manifest's paths may lead into; repeatable")
    add("--allow-outside", action="store_true", help="the manifest's paths may lead anywhere")
    add("--cache", type=Path, default=Path("cache"), help="latents and contexts, computed once")
    add("--offload-text", choices=OFFLOADS, default="none", help="where Gemma's layers wait, as in sample.py")


def open_manifest(manifest: Path, args: Namespace, vae: VideoVAE, device: str, rank: int = 0, world_size: int = 1
                  ) -> RealClips:
    """Check a manifest, compute what the cache folder does not hold yet, and open it. All processes share the work.

    args: train.py's buckets, frame_rate, root, allow_outside, checkpoint, gemma_root, offload_text, cache. The text encoder
    is loaded only when a caption is new, and freed again. Raises ValueError when no row can be used.
    """
    share_out = {"folder": args.cache, "rank": rank, "world": world_size, "wait": wait}
    shapes = parse_buckets(args.buckets, vae.time_scale, vae.space_scale)
    report = check_once(manifest, shapes, args.frame_rate, args.allow_outside, args.root, **share_out)
    if rank == 0:
        print("\n".join(report.lines()))
    if not report.used:
        raise ValueError(f"expected a row that can be used in {manifest}, got none; the lines above say why")
    latents = cache_latents(report.used, vae, lambda clip: vae.encode(clip.to(device)), **share_out)
    encode = lazy_encoder(args.checkpoint, args.gemma_root, device, args.offload_text)
    key = text_key(args.checkpoint, args.gemma_root, args.cache, rank, wait, text_dtype(device))
    captions = ["", *(row.caption for row in report.used)]
    contexts = cache_contexts(captions, encode, key=key, **share_out)
    return RealClips(latents, contexts, vae.time_scale, vae.space_scale)


def open_data(args: Namespace, vae: VideoVAE, device: str, rank: int = 0, world_size: int = 1) -> tuple:
    """(clips to train on, clips to look at, whether the second are never trained on), from train.py's arguments."""
    if args.manifest is None:
        return *open_world(args.checkpoint, args.gemma_root, vae, device, quiet=rank > 0), True
    train = open_manifest(args.manifest, args, vae, device, rank, world_size)
    if args.validation is None:
        return train, train, False
    return train, open_manifest(args.validation, args, vae, device, rank, world_size), True
