"""Does it work? Clips of people whom no training saw, scored next to true clips and to chance.

The idea. 0.86 of what? A score says something only beside others, so each score of study/scores.py
(which defines them) is printed, with its 95 % interval over clips, for

* `true video`       the renderer's own video of that person doing that: what can be reached
* `through the VAE`  the same, encoded and decoded: what a perfect transformer could reach
* `own reference`    what the checkpoint makes of the person's reference picture and the prompt
* `swapped`          the next person's reference: the identity must follow the picture
* `no reference`     no picture: the identity must be lost
* `silent prompt`    the prompt names the action alone: what of place, light and shirt is copied?
* `contradicting prompt`   it names another place, light and shirt than the reference shows
* `same moment`      the reference is the true clip's first frame: what of its pose is copied?
* `chance`           clips against other people's pictures and prompts, or 1 / number of choices

Generated rows share noise and prompts. Fréchet distances are to true clips of as many people of the
split "train": the row of true clips shows what the sample alone costs. Rows are scored from 8 bits;
finished ones are kept under --folder, so a killed evaluation goes on.

paper: no score and no number of it is known to us (ST-DRC, arXiv 2606.02441).
our reading: all scores, rows and levels of chance.

    python -m study.evaluate                           the two tables, evaluate.json, evaluate.png
    python -m study.evaluate --tables evaluate.json    the tables again, from the file alone
    python -m study.evaluate --videos FOLDER --ref face.jpg --face arcface.safetensors    your own
    python -m study.evaluate --videos FOLDER --batch eval.json --face arcface.safetensors     each

Read next: study/results.py
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from clips.batch import read_batch
from clips.cache import content_hash
from clips.face import FaceNet, align, faces_of, load_facenet, usable_landmarks
from clips.frames import Bucket, Crop, Frame, decode, decode_still, probe
from clips.manifest import Faces, faces_for_clip, load_faces
from clips.video import picks, save_sheet
from common.cli import Parser, check_file, check_folder, check_ranges, command
from common.files import find_file, read_json, write_json
from common.seeds import seeded
from guidance import ORDERS
from ltx.checkpoint import read_metadata
from ltx.fast_cpu import FastCPU
from ltx.load import (
    guidance_from,
    layout_from,
    load_transformer,
    machine_memory,
    read_inference,
)
from ltx.text import TextEncoder
from ltx.vae import VideoVAE, psnr
from model import ltx_sigmas
from reference import encode_reference
from sample import denoise
from study import scores
from study.results import COLUMNS, LEAKS, cell, number
from toy import world
from toy.clips import past_the_end
from toy.head import HeadPoseEstimator, load_head
from toy.traits import TraitReader, load_traits
from training.run import load_state, save_state

HERE = Path(__file__).resolve().parents[1]  # the repository
TINY = HERE / "weights" / "tiny"
# What makes clips: kept ones are of use as long as all of it stays as it is. Coarse on purpose: a
# row made twice costs minutes, a stale one costs a wrong table.
CODE = ("*.py", "ltx/*.py", "toy/*.py", "study/evaluate.py")
ROWS = ("own reference", "swapped", "no reference", "silent prompt", "contradicting prompt",
        "same moment")
GUIDED = ("text_scale", "ref_scale", "rescale", "guide_range", "guide_every")
BATCH = 16
GB_PER_CLIP = 0.005  # estimated: ten copies of 9 frames of 64x64 pixels in float32 at a time
VIDEOS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"}
OWN_SCORES = ("similarity", "min_frame", "drift", "found", "flicker", "facesim", "skipped")
CONSISID_FRAMES = 16
FACE_COLUMNS = ("traits_top1", "eyes", "shape", "colors", "attributes",
                "ref_scene", "ref_light", "ref_shirt", "ref_pixels")
NOT_OFFLINE = (
    "Not computed, needs more than these files: whether a video follows its prompt (a captioner), "
    "whether boxes\nare right (a detector), a Fréchet distance (a reference set of {0} frames of "
    "other people or more).")


# ------------------------------------------------------------ what is asked for


def test_set(people: int, prompts: int, size: int, frames: int, split: str = "test") -> dict:
    """References and prompts of a split's first `people` (P) persons, n = P * prompts clips.

    All that scores.per_clip and leaks read, captions, and the renderer's clips, `true`
    (n, 3, F, size, size). The same arguments give the same set.
    """
    g = seeded(2024)
    person = world.people(split, people)
    ref_setting = world.draw_settings(people, g)
    world.draw_settings(people, g), torch.rand(people, generator=g)  # as world.draw_references does
    ref_pose = world.still_poses(people, g)
    references = world.render(person, ref_setting, ref_pose[:, None], size)[0][:, :, 0]
    alike, _ = world.draw_references(world.look_alikes(person, g), world.draw_settings(people, g),
                                     g, size)
    another, _ = world.draw_references(person, ref_setting, seeded(2025), size, share=0)
    who = torch.arange(people).repeat_interleave(prompts)
    setting, action = world.draw_settings(len(who), g), world.draw_actions(len(who), g)
    poses = world.action_poses(action, frames, g)
    parts = zip(who.split(BATCH), setting.split(BATCH), poses.split(BATCH), strict=True)
    return {"who": who, "person": person, "references": references, "alike": alike,
            "another": another, "setting": setting, "ref_setting": ref_setting[who],
            "action": action, "start": scores.before_action(poses[:, 0], action),
            "ref_pose": ref_pose[who], "captions": captions_for(setting, action),
            "true": torch.cat([world.render(person[w], s, p, size)[0] for w, s, p in parts])}


def captions_for(setting: Tensor, action: Tensor) -> list[str]:
    """A prompt for each row of setting (n, 3) and action (n,); the templates take turns."""
    return [world.caption(s, int(a), i % len(world.TEMPLATES))
            for i, (s, a) in enumerate(zip(setting, action, strict=True))]


def with_person(data: dict, shown: Tensor) -> dict:
    """The same prompts, but with the references of the persons `shown` (n,)."""
    first = torch.searchsorted(data["who"], shown)  # any clip of that person has their reference
    return data | {"who": shown, "ref_setting": data["ref_setting"][first],
                   "ref_pose": data["ref_pose"][first]}


def silent(data: dict) -> dict:
    """Prompts for the same actions that name neither place nor light nor shirt."""
    nothing = past_the_end()[:3].expand(len(data["who"]), 3)
    return data | {"captions": captions_for(nothing, data["action"])}


def contradicting(data: dict) -> dict:
    """Prompts that name another place, another light and another shirt than the reference shows."""
    choices, asked, shown = past_the_end()[:3], data["setting"], data["ref_setting"]    # (n, 3)
    setting = torch.where(asked == shown, (asked + 1) % choices, asked)
    return data | {"setting": setting, "captions": captions_for(setting, data["action"])}


def same_moment(data: dict) -> dict:
    """References that are the first frame of the true clip of a person's first prompt: the tempting
    case, for frame 0 of the clip that is asked for looks just like them."""
    first = torch.searchsorted(data["who"], torch.arange(len(data["references"])))      # (P,)
    mine = first[data["who"]]                                           # (n,)
    return data | {"references": data["true"][first, :, 0], "ref_setting": data["setting"][mine],
                   "ref_pose": data["start"][mine]}


# ------------------------------------------------------------ making clips


class Models:
    """What a checkpoint and a Gemma folder hold, loaded at once (the tiny model is small)."""

    def __init__(self, checkpoint: Path, gemma_root: Path, device: str = "cpu"):
        metadata = read_metadata(checkpoint)
        self.config = metadata["config"]
        if "inference" not in self.config:
            raise ValueError(f"expected 'inference' in the config of {checkpoint}, got none: only "
                             "checkpoints that know the procedural world can be scored on it; use "
                             "--videos for those of others")
        self.placement = metadata.get("reference_placement", "tass")
        self.numbers = read_inference(self.config, checkpoint)
        self.device = device
        self.transformer = load_transformer(checkpoint, device, torch.float32)
        self.vae = VideoVAE.load(checkpoint, device, torch.float32)
        self.text = TextEncoder.load(checkpoint, gemma_root, device, torch.float32)


def fast(device: str) -> AbstractContextManager:
    """Quicker operations on a CPU; a card has its own."""
    return FastCPU() if device == "cpu" else nullcontext()


@torch.no_grad()
def generate(m: Models, captions: list[str], references: Tensor, args: argparse.Namespace,
             name: str) -> Tensor:
    """One clip per caption and reference (n, 3, h, w) -> (n, 3, F, h, w)."""
    layout = layout_from(m.numbers, m.vae, m.placement)
    asked = {name: getattr(args, name) for name in GUIDED}
    guidance = guidance_from(m.numbers | asked, args.order)
    steps = args.num_inference_steps or m.numbers["steps"]
    sigmas = ltx_sigmas(steps, m.numbers["schedule_tokens"])
    out = []
    with fast(m.device):
        null = m.text.encode([""])
        for start in tqdm(range(0, len(captions), BATCH), desc=name, unit="batch"):
            part = captions[start:start + BATCH]
            noise = torch.randn(len(part), layout.F * layout.H * layout.W, m.vae.latent_channels,
                                generator=seeded(args.seed, start)).to(m.device)
            pictures = references[start:start + BATCH].to(m.device)
            with torch.autocast(m.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                tokens = encode_reference(m.vae.encode, pictures).float()
                tokens = None if name == "no reference" else tokens     # (16, R, C)
                latent = denoise(m.transformer, noise, sigmas, m.text.encode(part), null, tokens,
                                 layout, guidance)
                out.append(m.vae.decode(latent).float().clamp(-1, 1).cpu())  # (16, 3, F, h, w)
    return torch.cat(out)


@torch.no_grad()
def through_vae(m: Models, video: Tensor) -> Tensor:
    """Encoded and decoded again: (n, 3, F, h, w) -> (n, 3, F, h, w)."""
    with fast(m.device):
        return torch.cat([m.vae.decode(m.vae.encode(part.to(m.device))).cpu()
                          for part in video.split(BATCH)])


def settings_key(args: argparse.Namespace) -> str:
    """Twelve digits of a hash over all that the clips depend on: weights, text, settings, code."""
    files = [args.checkpoint_path, *sorted(p for p in args.gemma_root.iterdir() if p.is_file())]
    files += [path for pattern in CODE for path in sorted(HERE.glob(pattern))]
    told = [args.split, args.people, args.prompts, args.num_inference_steps, args.text_scale,
            args.ref_scale, args.order, args.rescale, args.guide_range, args.guide_every,
            args.dtype, args.seed, *(content_hash(path, {}) for path in files)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def kept(path: Path, make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Clips of a row, uint8 (n, 3, F, h, w), and the seconds they took; made if not there yet."""
    if not path.exists():
        started, video = time.time(), make()
        if not video.isfinite().all():  # eight bits could not tell
            raise ValueError(f"expected finite pixels in the row {path.stem}, got NaN or infinity; "
                             "check the weights, use --dtype float32 or lower the scales")
        save_state(path, {"video": world.to_uint8(video)},
                   {"seconds": round(time.time() - started, 1)})
    try:
        tensors, info = load_state(path)
        return tensors["video"], info["seconds"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected the clips of a row in {path}, got {error}; "
                         "delete that file") from None


# ------------------------------------------------------------ scoring them


Networks = tuple[FaceNet, HeadPoseEstimator]  # the two that score


def score_row(video: Tensor, data: dict, nets: Networks, real: Tensor) -> dict:
    """Scores of clips (n, 3, F, h, w): name -> (mean, half width or None).

    real (m, E): the evaluation encoder's vectors of true clips, for the Fréchet distance.
    """
    each, leaks = scores.per_clip(video, data, *nets), scores.leaks(video, data, nets[1])
    mean = {name: scores.summarise(values) for name, values in each.items()}
    mean |= {name: (value, None) for name, (value, _) in leaks.items()}
    mean["frechet"] = scores.frechet(scores.embed_clips(nets[0], video).flatten(0, 1), real), None
    return {"scores": mean, "leaks_by_chance": {name: level for name, (_, level) in leaks.items()},
            "per_clip": {k: [number(v) for v in values.tolist()] for k, values in each.items()}}


def score_faces(video: Tensor, data: dict, reader: TraitReader) -> dict[str, tuple]:
    """What can be read of the face, trait by trait, and what the clips show of the reference's
    setting: name -> (value, half width or None)."""
    each, whole = scores.face_scores(video, data, reader)
    each |= scores.shows_reference(video, data)
    return ({name: scores.summarise(values) for name, values in each.items()}
            | {name: (number(value), None) for name, value in whole.items()})


def chance_levels(people: int) -> dict[str, float]:
    """What guessing gets: one out of the choices."""
    choices = {"action": world.ACTIONS, "scene": world.SCENES, "light": world.LIGHTS,
               "shirt": world.SHIRTS}
    levels = {name: 1 / len(table) for name, table in choices.items()}
    return levels | {"top1": 1 / people, "look_alike": 1 / 2}


def chance_row(video: Tensor, data: dict, nets: Networks, leaks: dict[str, float]) -> dict:
    """What clips get against other people's pictures; leaks: levels of permuted references."""
    people = len(data["references"])
    found = scores.per_clip(video, with_person(data, (data["who"] + people // 2) % people), *nets)
    mean = {name: scores.summarise(found[name]) for name in ("similarity", "min_frame", *LEAKS)}
    levels = chance_levels(people) | leaks
    return {"scores": mean | {name: (level, None) for name, level in levels.items()}}


def tables(rows: dict[str, dict], *groups: tuple[str, ...]) -> str:
    """Markdown, a table for each group of scores; rows as `score_row` returns them."""
    lines = []
    for group in groups:
        lines += ["", "| clips | " + " | ".join(group).replace("_", " ") + " |",
                  "|---" * (len(group) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(cell(c, *row["scores"].get(c, (None,)))
                                              for c in group) + " |"
                  for name, row in rows.items()]
    return "\n".join(lines[1:])


def face_tables(rows: dict[str, dict]) -> str:
    """Markdown of what `score_faces` found: a summary, and each trait with the three kinds apart.
    Nothing for a record from before it."""
    rows = {name: {"scores": row["faces"]} for name, row in rows.items() if "faces" in row}
    if not rows:
        return ""
    lines = ["", "", tables(rows, FACE_COLUMNS), "", f"| trait | {' | '.join(rows)} |",
             "|---" * (len(rows) + 1) + "|"]
    for kind, names in (("colors", world.COLORS), ("attributes", world.ATTRIBUTES),
                        ("shape", world.SHAPE)):
        for name in (*names, kind):
            title = f"**{kind}, mean**" if name == kind else name.replace("_", " ")
            values = [cell(name, *row["scores"][name], digits=2) for row in rows.values()]
            lines.append(f"| {title} | {' | '.join(values)} |")
    return "\n".join(lines)


def report(record: dict) -> str:
    """What was scored, and its tables, from a record as `score_world` writes it."""
    try:
        a, dB = record["arguments"], record["vae_psnr"]
        return (f"VAE {dB:.2f} dB on {int(a['people']) * int(a['prompts'])} unseen clips; "
                f"{a['people']} people of {a['split']} x {a['prompts']} prompts, text scale "
                f"{a['text_scale']}, reference scale {a['ref_scale']}, guidance in "
                f"{a['guide_range']}, every {a['guide_every']}, {a['order']}, seed {a['seed']}\n\n"
                + tables(record["rows"], *COLUMNS) + face_tables(record["rows"]))
    except KeyError as missing:
        raise ValueError(f"expected a record of study.evaluate, got one without {missing}; "
                         "give an evaluate.json") from None


def arguments_of(args: argparse.Namespace) -> dict[str, str]:
    """For a record. Files of this repository are named from its top: it tells of no machine."""
    return {name: str(value).removeprefix(f"{HERE}{os.sep}") for name, value in vars(args).items()}


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that cannot be meant, and for more clips than memory holds."""
    check_ranges(args, {"people": (2, 1e6), "prompts": (1, 1e6), "num_inference_steps": (1, 10_000),
                        "text_scale": (0, 1000), "ref_scale": (0, 1000), "rescale": (0, 1),
                        "guide_range": (0, 1), "guide_every": (1, 10_000), "seed": (0, 2**62)})
    has = machine_memory() / 1e9
    clips = args.people * args.prompts
    if (needs := clips * GB_PER_CLIP) > has:
        raise ValueError(f"expected as many clips as fit into the {has:.0f} GB of memory, got "
                         f"{clips}, which need {needs:.0f} GB; lower --people or --prompts")


def make_rows(m: Models, data: dict, sides: dict[str, dict],
              args: argparse.Namespace) -> dict[str, tuple[Tensor, float]]:
    """name -> (clips uint8 (n, 3, F, h, w), seconds), made or taken up from --folder."""
    folder = args.folder / settings_key(args)
    make = {"through the VAE": partial(through_vae, m, data["true"])}
    for name, side in sides.items():
        references = side["references"][side["who"]]                    # (n, 3, h, w)
        make[name] = partial(generate, m, side["captions"], references, args, name)
    rows = {"true video": (world.to_uint8(data["true"]), 0.0)}
    return rows | {name: kept(folder / f"{name.replace(' ', '_')}.safetensors", work)
                   for name, work in make.items()}


def draw_people(path: Path, references: Tensor, clips: Tensor) -> None:
    """Contact sheet of 32 people or fewer: reference and three frames each, four people a row."""
    moments = picks(clips.shape[2])[::2]
    people = [[reference, *clip[:, moments].transpose(0, 1)]
              for reference, clip in zip(references, clips, strict=True)][:32]
    across = min(4, len(people))  # what fills no row is left out
    starts = range(0, len(people) - across + 1, across)
    save_sheet(path, [sum(people[i:i + across], []) for i in starts])


def score_world(args: argparse.Namespace) -> None:
    """Make or take up the clips of every row, score them, print tables, write JSON and sheet."""
    started, output = time.time(), args.output_path or Path("evaluate.json")
    check_numbers(args)
    check_folder(args.folder)
    check_file(output, ".json")
    nets = load_facenet(args.eval_encoder), load_head(args.head)
    # without it there is no table of the face's traits
    reader = load_traits(args.traits) if args.traits.exists() else None
    m = Models(args.checkpoint_path, args.gemma_root)
    d = m.numbers
    for name in GUIDED:
        if getattr(args, name) is None:
            setattr(args, name, d[name])
    guidance_from(d | {name: getattr(args, name) for name in GUIDED}, args.order)  # refuses early
    data, train = (test_set(args.people, args.prompts, d["height"], d["num_frames"], split)
                   for split in (args.split, "train"))
    other = {"swapped": with_person(data, (data["who"] + 1) % args.people),
             "silent prompt": silent(data), "contradicting prompt": contradicting(data),
             "same moment": same_moment(data)}
    sides = {name: other.get(name, data) for name in args.rows}
    clips = make_rows(m, data, sides, args)
    real = scores.embed_clips(nets[0], train["true"]).flatten(0, 1)     # (n * 5, E)
    rows = {}
    for name, (video, seconds) in tqdm(clips.items(), desc="scoring", unit="row"):
        row = score_row(video / 127.5 - 1, side := sides.get(name, data), nets, real)
        faces = {"faces": score_faces(video / 127.5 - 1, side, reader)} if reader else {}
        rows[name] = row | faces | {"seconds": seconds}
    own = args.rows[0]
    made, side = clips[own][0] / 127.5 - 1, sides[own]
    rows["chance"] = chance_row(made, side, nets, rows[own]["leaks_by_chance"])
    true, coded = (clips[name][0] / 127.5 - 1 for name in ("true video", "through the VAE"))
    record = {"rows": rows, "vae_psnr": psnr(coded, true).mean().item(),
              "seconds": round(time.time() - started, 1), "arguments": arguments_of(args)}
    shown = slice(None, None, args.prompts)  # the first prompt of each person
    draw_people(output.with_suffix(".png"), data["references"][side["who"]][shown], made[shown])
    write_json(output, record)
    print(f"{report(record)}\n\n{record['seconds']:.0f} s; clips in "
          f"{args.folder / settings_key(args)}; wrote {output} and .png")


# ------------------------------------------------------------ own videos


@torch.no_grad()
def read_own(path: Path, faces: Faces, net: FaceNet,
             look: Callable[[Path], Iterator[Frame]] = decode) -> tuple[Tensor, float]:
    """A video or picture -> the vectors of its F frames' faces (2, F, E), and its flicker in 0..1.

    Cut out by box [0] and by landmarks [1]; NaN where that cannot be done.
    """
    found = probe(path, look)
    F, h, w = len(found.times), found.height, found.width
    if abs(math.log(faces.size[0] / faces.size[1] * w / h)) > 0.02:
        raise ValueError(f"expected faces of a picture shaped {h}x{w} (height x width) for {path}, "
                         f"got {faces.size[0]}x{faces.size[1]}; detect on upright frames of that "
                         "file")
    crop, bucket = Crop(h, w, 0, 0), Bucket(h, w, F)
    boxes, marks, seen = faces_for_clip(faces, bucket, crop, found.times)
    vectors = torch.full((2, F, net.fc.out_features), math.nan)
    changes, before, (side, high) = [], None, (max(1, w // 10), int(0.7 * h))  # as scores.border
    for k, frame in enumerate(tqdm(look(path), path.name, F, unit="frame", leave=False)):
        picture = frame.resized(crop, bucket) / 127.5 - 1               # (3, h, w)
        if seen[k]:
            vectors[0, k] = net(faces_of(picture[None], boxes[k:k + 1], None, net.size))[0]
        if seen[k] and marks is not None and usable_landmarks(marks[k:k + 1]).all():
            vectors[1, k] = net(align(picture[None], marks[k:k + 1], net.size))[0]
        edge = torch.cat([picture[:, :high, :side], picture[:, :high, -side:]], dim=2)
        changes += [] if before is None else [(edge - before).abs().mean().item() / 2]
        before = edge
    return vectors, sum(changes) / len(changes) if changes else math.nan


def own_scores(vectors: Tensor, flicker: float, reference: Tensor) -> tuple[float, ...]:
    """OWN_SCORES of vectors (2, F, E) against the picture's (2, E); no face counts 0.

    A face is compared with the reference cut out in the same way, by landmarks where both have
    them: a cosine across the two ways is too low. drift: first half less second half.
    facesim: as ConsisID's script and the challenges after it define it (eval/get_facesim_fid.py):
    16 frames from first to last, no cosine below 0, frames without a face left out, and 0 if no
    frame has one. How many are left out is not told there; here that is skipped.
    """
    box, marks = torch.einsum("wfe,we->wf", vectors, reference)         # (F,) each
    cosine = torch.where(marks.isnan(), box, marks)
    picked = cosine[np.linspace(0, len(cosine) - 1, CONSISID_FRAMES, dtype=int)]      # (16,)
    faces = picked[~picked.isnan()].clamp(min=0)
    facesim = faces.mean().item() if len(faces) else 0.0
    cosine = cosine.nan_to_num(0)
    half = (len(cosine) + 1) // 2
    drift, found = cosine[:half].mean() - cosine[-half:].mean(), (~box.isnan()).float().mean()
    return (cosine.mean().item(), cosine.min().item(), drift.item(), found.item(), flicker, facesim,
            float(CONSISID_FRAMES - len(faces)))


def list_own(args: argparse.Namespace) -> list[tuple[Path, Path, Path, Path]]:
    """For each own video: its path and faces file, its picture and the picture's faces file."""
    def beside(path: Path, folder: Path | None) -> Path:
        return find_file(folder or path.parent, f"{path.stem}.json")

    if args.batch:  # pictures and videos may share names here: 1.png, 1.mp4
        rows = [(row.video(args.videos), row.img) for row in read_batch(args.batch)]
        missing = [video.name for video, _ in rows if not video.is_file()]
        if missing:
            raise ValueError(f"expected {len(rows)} videos in {args.videos}, got "
                             f"{len(rows) - len(missing)}, no {missing[0]}; make them first "
                             "(sample.py --batch)")
        return [(video, beside(video, args.faces_folder), img, beside(img, None))
                for video, img in rows]
    # A name with a dot in front is a file that sample.py is still writing.
    videos = sorted(p for p in args.videos.iterdir() if p.suffix.lower() in VIDEOS
                    and p.name[0] != ".")
    face, *files = (beside(p, args.faces_folder) for p in (args.ref, *videos))
    if not videos or len({face, *files}) <= len(files):
        raise ValueError(f"expected videos ({' '.join(sorted(VIDEOS))}) in {args.videos} and one "
                         f"faces file for each and for the picture, got {len(videos)} videos, "
                         f"{len({face, *files})} names; rename what shares one")
    return [(video, file, args.ref, face) for video, file in zip(videos, files, strict=True)]


def read_references(pictures: dict[Path, Path], net: FaceNet) -> dict[Path, Tensor]:
    """Pictures and their faces files -> the vectors (2, E) of each. ValueError without a face."""
    references = {}
    for picture, file in pictures.items():
        vectors = read_own(picture, load_faces(file), net, decode_still)[0][:, 0]       # (2, E)
        if vectors[0].isnan().any():
            raise ValueError(f"expected a face in {picture}, got none at time 0 in {file}; "
                             "take another picture")
        references[picture] = vectors
    return references


def score_folder(args: argparse.Namespace) -> None:
    """Own videos against one picture, or each against its own of a list; flicker says something
    only for a camera that stands still.

    Faces files as clips.manifest.load_faces reads them: <name>.json for each video and, with one
    frame, for each picture.
    """
    if (args.ref is None) == (args.batch is None) or args.face is None:
        raise ValueError("expected --face and one of --ref and --batch beside --videos, got "
                         "something else; give ArcFace weights, and a picture or a list")
    output = args.output_path or Path("evaluate_videos.json")
    check_file(output, ".json")
    own = list_own(args)
    net, faces = load_facenet(args.face), [load_faces(file) for _, file, _, _ in own]
    references = read_references({picture: file for _, _, picture, file in own}, net)
    rows = {}
    pairs = list(zip(own, faces, strict=True))
    for (path, _, picture, _), found in tqdm(pairs, desc="videos", unit="video"):
        values = own_scores(*read_own(path, found, net), references[picture])
        rows[path.name] = {"scores": {name: (value, None) for name, value
                                      in zip(OWN_SCORES, values, strict=True)}}
    each = {name: torch.tensor([row["scores"][name][0] for row in rows.values()])
            for name in OWN_SCORES}
    rows["mean"] = {"scores": {name: scores.summarise(values) for name, values in each.items()}}
    total = int(each["skipped"].sum())
    told = (f"facesim skips {total} of {CONSISID_FRAMES * len(own)} frames, which show no face.\n"
            + NOT_OFFLINE.format(net.fc.out_features))
    write_json(output, {"rows": rows, "frames_skipped": total, "not_computed": told,
                        "arguments": arguments_of(args)})
    print(f"{tables(rows, OWN_SCORES)}\nwrote {output}\n{told}")


# ------------------------------------------------------------ the command


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = Parser("study.evaluate", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, usual = p.add_argument, "default: the checkpoint's"
    for flag, name in (("--checkpoint-path", "model.safetensors"), ("--gemma-root", "gemma"),
                       ("--eval-encoder", "eval_encoder.safetensors"),
                       ("--head", "head_pose.safetensors"), ("--traits", "traits.safetensors")):
        add(flag, type=Path, default=TINY / name)
    add("--split", choices=["test", "val"], default="test", help="choose on val, report on test")
    add("--people", type=int, default=256)
    add("--prompts", type=int, default=1, help="per person")
    add("--num-inference-steps", type=int, help=usual)
    for flag in ("--text-scale", "--ref-scale", "--rescale"):
        add(flag, type=float, help=usual)
    add("--guide-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=usual)
    add("--guide-every", type=int, help=usual)
    add("--order", choices=ORDERS, default=ORDERS[0])
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--seed", type=int, default=0)
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--folder", type=Path, default=Path("runs/evaluate"), help="keeps finished rows of clips")
    add("--output-path", type=Path, help="default: evaluate.json (and .png), evaluate_videos.json")
    add("--tables", type=Path, metavar="JSON", help="only print the tables of a finished one")
    add("--videos", type=Path, metavar="FOLDER", help="score own videos instead")
    add("--ref", type=Path, help="own videos: picture of the person")
    add("--batch", type=Path, metavar="JSON",
        help="own videos: instead, the list of sample.py --batch, with a picture for each")
    add("--face", type=Path, help="own videos: ArcFace weights (safetensors, see clips/face.py)")
    add("--faces-folder", type=Path,
        help="own videos: their faces files and that of --ref; default: beside each video")
    return p.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    if args.tables:
        return command("study.evaluate", lambda: print(report(read_json(args.tables))))
    work = score_folder if args.videos else score_world
    return command("study.evaluate", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
