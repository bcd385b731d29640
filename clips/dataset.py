"""What one training step reads: clips as latents, their captions, a reference for each, the faces.

The idea. The recipe in train.py should not know where clips come from. Two sources give the same
`Batch`: `RealClips` below, people's files that manifest.py has checked and cache.py has encoded,
and the procedural world (toy/clips.py). Both are asked for given clips with given generators, one
for each clip, and nothing else is random. So a batch is a pure function of (seed, step, place): it
can be prepared ahead, by any number of processes, and again after a kill.

The failure this prevents: a data loader with a memory. After a resume it starts over, some clips
come twice and some never, and nobody notices. `Order` computes which clips belong to step n; there
is no position to save.

paper:        clips with a reference of the person (ST-DRC, arXiv 2606.02441).
our reading:  one shape per batch, every clip once per epoch, the reference on a canvas of the
              clip's own size.

Conventions. Clips are counted from 0 in the source's own list. Boxes and landmarks are pixels of
the clip, or of the reference's canvas; NaN landmarks = none known, `seen` False = no face there.

    order = Order(data.groups, size=16, seed=0)
    batch = data.batch(order(step), [seeded(0, step, k) for k in range(16)])

Read next: clips/face.py
"""

from __future__ import annotations

import hashlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Generator, Tensor

from clips.cache import (
    CachedLatents,
    cache_contexts,
    cache_latents,
    check_once,
    content_hash,
    lazy_encoder,
    text_dtype,
    text_key,
)
from clips.frames import DEFAULT_BUCKETS, clip_times, cover, parse_buckets
from clips.manifest import box_mask, draw_reference, faces_for_clip, load_faces, read_manifest
from common.seeds import seeded
from losses import pool_face_mask
from ltx.offload import OFFLOADS
from ltx.vae import VideoVAE
from reference import letterbox, patchify

# ------------------------------------------------------------ batches


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

    index: list[int]             # which clips of the source, to be named when something goes wrong
    grid: tuple[int, int, int]   # F', H, W
    frame_rate: float
    x0: Tensor                   # (B, L, C) clean latent tokens
    context: Tensor              # (B, N, D) of the captions
    face: Tensor                 # (B, L) share of face in each token, all 0 where none is known
    boxes: Tensor                # (B, F, 4)
    landmarks: Tensor            # (B, F, 5, 2)
    seen: Tensor                 # (B, F) bool
    reference: Tensor            # (B, 3, h, w) canvas in [-1, 1], not augmented
    reference_box: Tensor        # (B, 4)
    reference_landmarks: Tensor  # (B, 5, 2)
    reference_seen: Tensor       # (B,) bool

    def __len__(self) -> int:
        return len(self.index)


class ClipSource(Protocol):
    """What a training asks of its clips, wherever they come from."""

    groups: list[Sequence[int]]  # clips of one shape each
    null_context: Tensor         # (N, D) of the empty caption

    def batch(self, indices: list[int], generators: Sequence[Generator]) -> Batch:
        """These clips, all of one group; clip k draws from generators[k] alone."""

    def names(self, indices: list[int]) -> str:
        """For messages."""

    def fingerprint(self) -> str:
        """Another one means other clips in the same steps."""


def check_batch(step: int, batch: Batch, data: ClipSource) -> None:
    """Raise ValueError naming step, what is not finite, and its clips; a loss would only show that
    something in the whole batch is wrong."""
    parts = {"latents": batch.x0, "contexts": batch.context,
             "pixels of the reference": batch.reference}
    for what, values in parts.items():
        finite = values.isfinite().flatten(1).all(dim=1)                   # (B,)
        if bad := [i for i, good in zip(batch.index, finite, strict=True) if not good]:
            raise ValueError(f"expected finite {what}, got NaN or infinity at step {step}, "
                             f"{data.names(bad)}; delete the cached files and make them again, or "
                             "leave the rows out")


# ------------------------------------------------------------ which clips belong to a step


class Order:
    """step -> the `size` clips of that step, over all processes; every clip once per epoch.

    our reading. groups: lists of clips of one shape; a batch is of one group. What does not fill a
    batch waits for the next epoch, which shuffles anew; a group smaller than a batch is repeated to
    fill it. Raises ValueError without clips.
    """

    def __init__(self, groups: Sequence[Sequence[int]], size: int, seed: int):
        self.groups, self.size, self.seed = [list(group) for group in groups if group], size, seed
        self.per_epoch = sum(max(1, len(group) // size) for group in self.groups)
        self.epoch, self.batches = -1, []
        if not self.groups:
            raise ValueError("expected clips to train on, got none; "
                             "`python -m clips.manifest check` says why rows are not used")

    def __call__(self, step: int) -> list[int]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.batches = self._shuffle(seeded(self.seed, "order", epoch))
        return self.batches[place]

    def _shuffle(self, g: Generator) -> list[list[int]]:
        batches = []
        for group in self.groups:
            order = [group[k] for k in torch.randperm(len(group), generator=g).tolist()]
            order *= -(-self.size // len(order))  # more than once only in a group below a batch
            last = len(order) - self.size
            batches += [order[a : a + self.size] for a in range(0, last + 1, self.size)]
        return [batches[k] for k in torch.randperm(len(batches), generator=g).tolist()]


def shard_indices(indices: list[int], rank: int, world_size: int, size: int
                  ) -> list[tuple[int, int]]:
    """This process's share of a step, as (place in the step, clip).

    Every world_size-th run of `size` places, so that what is computed together does not depend on
    the number of processes.
    """
    runs = range(rank * size, len(indices), world_size * size)
    return [(place, indices[place]) for a in runs for place in range(a, a + size)]


# ------------------------------------------------------------ people's own clips


class RealClips:
    """Rows of a checked manifest with their cached latents and contexts.

    contexts: caption -> function that reads (N, D), "" among them; scales: the VAE's in time and
    space. A faces file is read once.
    """

    def __init__(self, latents: CachedLatents, contexts: dict[str, Callable[[], Tensor]],
                 time_scale: int, space_scale: int):
        self.rows, self.latents, self.contexts = latents.rows, latents, contexts
        self.null_context = contexts[""]().float()
        self.groups = list(latents.groups.values())
        self.scales = time_scale, space_scale
        self.known: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def faces(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of clip i: boxes (F, 4), landmarks (F, 5, 2), NaN where none are known, seen (F,)."""
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

    def reference(self, i: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Canvas (3, h, w) of the clip's size, and the face on it: box (4,), landmarks (5, 2),
        seen ()."""
        bucket, drawn = self.rows[i].bucket, draw_reference(self.rows, i, generator)
        canvas = letterbox(drawn.picture, bucket.height, bucket.width)
        box, marks = torch.zeros(4), torch.full((5, 2), torch.nan)
        if drawn.box is not None:
            w, h = drawn.picture.size
            scale = min(bucket.height / h, bucket.width / w)
            corner = torch.tensor([bucket.width - w * scale, bucket.height - h * scale]) / 2
            box = drawn.box * scale + corner.repeat(2)
            marks = marks if drawn.landmarks is None else drawn.landmarks * scale + corner
        return canvas, box, marks, torch.tensor(drawn.box is not None)

    def batch(self, indices: list[int], generators: Sequence[Generator]) -> Batch:
        """The clips, all of one bucket, each with a reference drawn by `draw_reference`."""
        def stack(parts: Sequence[tuple]) -> list[Tensor]:
            return [torch.stack(part) for part in zip(*parts, strict=True)]

        rows = [self.rows[i] for i in indices]
        x0 = torch.stack([self.latents[i] for i in indices])               # (B, C, F', H, W)
        context = torch.stack([self.contexts[row.caption]().float() for row in rows])  # (B, N, D)
        boxes, marks, seen = stack([self.faces(i) for i in indices])
        h, w = rows[0].bucket.height, rows[0].bucket.width
        mask = torch.stack([box_mask(b, s, h, w) for b, s in zip(boxes, seen, strict=True)])
        pictures, ref_boxes, ref_marks, ref_seen = stack(
            [self.reference(i, g) for i, g in zip(indices, generators, strict=True)])
        return Batch(index=list(indices), grid=tuple(x0.shape[2:]), frame_rate=rows[0].frame_rate,
                     x0=patchify(x0).float(), context=context,
                     face=pool_face_mask(mask, *self.scales), boxes=boxes, landmarks=marks,
                     seen=seen, reference=pictures, reference_box=ref_boxes,
                     reference_landmarks=ref_marks, reference_seen=ref_seen)

    def names(self, indices: list[int]) -> str:
        rows = [self.rows[i] for i in indices]
        return "rows " + ", ".join(f"{row.number} ({row.video.name})" for row in rows)

    def fingerprint(self) -> str:
        """Of latents, captions, identities, and the content of references and faces files; where
        they lie does not matter."""
        def told(path: Path | None) -> str | None:
            return None if path is None else content_hash(path, self.latents.known)

        rows = [(path.name, row.caption, told(row.reference), row.identity, told(row.faces))
                for row, path in zip(self.rows, self.latents.paths, strict=True)]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def add_data_arguments(p: ArgumentParser) -> None:
    """What train.py reads. LTX-2.3: its default size and frame rate; buckets: see frames.py."""
    add = p.add_argument
    add("--manifest", type=Path,
        help="own clips (clips/manifest.py); without it the procedural world")
    add("--validation", type=Path,
        help="a second manifest, never trained on: its loss is logged, its references shown")
    add("--buckets", default=DEFAULT_BUCKETS, help="height x width x frames, separated by commas")
    add("--frame-rate", type=float, default=24.0, help="of the clips after decoding")
    add("--root", action="append", default=[],
        help="a folder that the manifest's paths may lead into; repeatable")
    add("--allow-outside", action="store_true", help="the manifest's paths may lead anywhere")
    add("--cache", type=Path, default=Path("cache"), help="latents and contexts, computed once")
    add("--offload-text", choices=OFFLOADS, default="none",
        help="where Gemma's layers wait, as in sample.py")
    add("--same-setting", type=float, default=0.5,
        help="share of the world's references that show the place, light and shirt of their clip")


def open_manifest(manifest: Path, args: Namespace, vae: VideoVAE, device: str, rank: int = 0,
                  world_size: int = 1, wait: Callable[[], object] | None = None) -> RealClips:
    """Check a manifest, compute what the cache folder does not hold yet, and open it.

    All processes share the work; `wait` returns when all of them have called it (None: alone).
    args: train.py's buckets, frame_rate, root, allow_outside, checkpoint, gemma_root, offload_text
    and cache. The text encoder is loaded only when a caption is new, and freed again. Raises
    ValueError when no row can be used.
    """
    share_out = {"folder": args.cache, "rank": rank, "world": world_size, "wait": wait}
    shapes = parse_buckets(args.buckets, vae.time_scale, vae.space_scale)
    rows = read_manifest(manifest, args.allow_outside, args.root)
    report = check_once(rows, shapes, args.frame_rate, **share_out)
    if rank == 0:
        print("\n".join(report.lines()))
    if not report.used:
        raise ValueError(f"expected a row that can be used in {manifest}, got none; the lines "
                         "above say why")
    latents = cache_latents(report.used, vae, lambda clip: vae.encode(clip.to(device)), **share_out)
    encode = lazy_encoder(args.checkpoint, args.gemma_root, device, args.offload_text)
    key = text_key(args.checkpoint, args.gemma_root, args.cache, rank, wait, text_dtype(device))
    captions = ["", *(row.caption for row in report.used)]
    contexts = cache_contexts(captions, encode, key=key, **share_out)
    return RealClips(latents, contexts, vae.time_scale, vae.space_scale)
