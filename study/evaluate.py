"""Whether it works: clips of people whom no training saw, scored beside true clips and beside chance.

The idea. 0.86 of what? A score says something only beside others, so each score of scores.py (definitions, frames and
networks: its header) is printed, with its 95 % interval over clips, for

* `true video`       the renderer's own video of that person doing that: what the score can reach
* `through the VAE`  the same, encoded and decoded: what a perfect transformer could reach
* `own reference`    what the checkpoint makes of the person's reference picture and the prompt
* `swapped`          the next person's reference, same noise and prompt: the identity must follow the picture
* `no reference`     same noise and prompt, no picture: the identity must be lost
* `chance`           1 / number of choices; the first generated row scored against other people; permuted references

Fréchet distances are to true clips of as many people of the split "train" with the same prompts: the row of true clips
shows what the sample alone costs. Rows are scored from 8 bits; finished ones are kept under --folder, named by a hash
of weights, settings and code, and a killed evaluation goes on.

paper:        no score and no number of it is known to us (ST-DRC, arXiv 2606.02441).
our reading:  all scores, rows and levels of chance.

    python -m study.evaluate                                  the tables of the README, evaluate.json and evaluate.png
    python -m study.evaluate --tables evaluate.json           the same tables again, from the file alone
    python -m study.evaluate --videos FOLDER --ref face.jpg --face arcface.safetensors        your own videos, see score_folder

Read next: ablate.py
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from clips.cache import content_hash
from clips.face import FaceNet, align, faces_of, load_facenet, usable_landmarks
from clips.frames import Bucket, Crop, decode, probe
from clips.manifest import Faces, faces_for_clip, load_faces
from clips.video import picks, save_sheet
from common.cli import Parser, check_folder, check_ranges, command
from common.files import read_json, write_json
from common.seeds import seeded
from denoise import INFERENCE, denoise, guidance_steps
from guidance import ORDERS
from ltx.checkpoint import load_weights, read_metadata, shapes_from
from ltx.text import TextEncoder
from ltx.vae import VideoVAE, psnr
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer, ltx_sigmas
from reference import encode_reference
from study import scores
from study.results import COLUMNS, LEAKS, SHARES, number
from toy import world
from training.run import load_state, save_state

HERE = Path(__file__).resolve().parents[1]  # the repository
ROWS = ("own reference", "swapped", "no reference")
# What makes clips: kept ones are of use as long as these files stay as they are.
CODE = ("denoise", "guidance", "losses", "model", "reference", "rope", "study/evaluate", "toy/world",
        "ltx/gemma", "ltx/text", "ltx/tokenizer", "ltx/vae")
IDENTITY, PROMPT = COLUMNS
GB_PER_CLIP = 0.005  # estimated: ten copies of 9 frames of 64x64 pixels in float32 at a time
VIDEOS = {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"}
OWN_SCORES = ("similarity", "min_frame", "drift", "found", "flicker")
NOT_OFFLINE = ("Not computed, needs more than these files: whether a video follows its prompt (a captioner), whether boxes\n"
               "are right (a detector), a Fréchet distance (a reference set of {0} frames of other people or more).")


def test_set(people: int, prompts: int, size: int, frames: int, split: str = "test") -> dict:
    """References and prompts of a split's first `people` (P) persons, n = P * prompts: all that scores.per_clip and leaks
    read, captions, and the renderer's clips, true (n, 3, F, size, size). The same arguments give the same set."""
    g = seeded(2024)
    person = world.people(split, people)
    ref_setting = world.draw_settings(people, g)
    world.draw_settings(people, g), torch.rand(people, generator=g)  # unused; world.draw_references draws them as well
    ref_pose = world.still_poses(people, g)
    references = world.render(person, ref_setting, ref_pose[:, None], size)[0][:, :, 0]
    alike, _ = world.draw_references(world.look_alikes(person, g), world.draw_settings(people, g), g, size)
    who = torch.arange(people).repeat_interleave(prompts)
    setting, action = world.draw_settings(len(who), g), world.draw_actions(len(who), g)
    captions = [world.caption(s, int(a), i % len(world.TEMPLATES))
                for i, (s, a) in enumerate(zip(setting, action, strict=True))]
    poses = world.action_poses(action, frames, g)
    video = torch.cat([world.render(person[w], s, p, size)[0] for w, s, p in
                       zip(who.split(16), setting.split(16), poses.split(16), strict=True)])
    return {"who": who, "references": references, "alike": alike, "setting": setting, "ref_setting": ref_setting[who],
            "action": action, "ref_pose": ref_pose[who], "captions": captions, "true": video}


def with_person(data: dict, shown: Tensor) -> dict:
    """The same prompts, but with the references of the persons `shown` (n,)."""
    first = torch.searchsorted(data["who"], shown)  # any clip of that person: they share one reference
    return data | {"who": shown, "ref_setting": data["ref_setting"][first], "ref_pose": data["ref_pose"][first]}


class Models:
    """Everything that a checkpoint and a Gemma folder hold, loaded at once (the tiny model is small)."""

    def __init__(self, checkpoint: Path, gemma_root: Path):
        metadata = read_metadata(checkpoint)
        self.config = metadata["config"]
        if "inference" not in self.config:
            raise ValueError(f"expected 'inference' in the config of {checkpoint}, got none: only checkpoints that know the "
                             "procedural world can be scored on it; use --videos for those of others")
        self.placement = metadata.get("reference_placement", "tass")
        with shapes_from(checkpoint):
            self.transformer = VideoTransformer(TransformerConfig.from_checkpoint(self.config["transformer"]))
            self.vae = VideoVAE(self.config["vae"])
        load_weights(self.transformer, checkpoint, TRANSFORMER_PREFIX, torch.float32)
        load_weights(self.vae, checkpoint, "vae.", torch.float32)
        self.text = TextEncoder.load(checkpoint, gemma_root, "cpu", torch.float32)


@torch.no_grad()
def generate(m: Models, captions: list[str], references: Tensor, args: argparse.Namespace, name: str) -> Tensor:
    """One clip per caption and reference (n, 3, h, w), in batches of 16 -> (n, 3, F, h, w)."""
    d = m.config["inference"]
    grid = ((d["num_frames"] - 1) // m.vae.time_scale + 1, d["height"] // m.vae.space_scale,
            d["width"] // m.vae.space_scale)
    sigmas = ltx_sigmas(args.num_inference_steps or d["steps"], d["schedule_tokens"])
    null = m.text.encode([""])
    out = []
    for start in tqdm(range(0, len(captions), 16), desc=name, unit="batch"):
        part = captions[start:start + 16]
        noise = torch.randn(len(part), grid[0] * grid[1] * grid[2], m.vae.latent_channels,
                            generator=seeded(args.seed, start))
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            tokens = encode_reference(m.vae.encode, references[start:start + 16]).float()
            latent = denoise(m.transformer, m.text.encode(part), null, None if name == "no reference" else tokens, grid,
                             d["frame_rate"], (m.vae.time_scale, m.vae.space_scale), sigmas, noise, args.text_scale,
                             args.ref_scale, args.order, args.rescale, m.placement,
                             guide_range=args.guide_range, guide_every=args.guide_every)
            out.append(m.vae.decode(latent).float().clamp(-1, 1))
    return torch.cat(out)


def settings_key(args: argparse.Namespace) -> str:
    """Twelve hex digits of a hash over all that the clips depend on: weights, text folder, settings, code."""
    files = [args.checkpoint_path, *sorted(p for p in args.gemma_root.iterdir() if p.is_file())]
    files += [HERE / f"{name}.py" for name in CODE]
    told = [args.split, args.people, args.prompts, args.num_inference_steps, args.text_scale, args.ref_scale,
            args.order, args.rescale, args.guide_range, args.guide_every, args.dtype, args.seed,
            *(content_hash(path, {}) for path in files)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def kept(path: Path, make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Clips of a row, uint8 (n, 3, F, h, w), and the seconds they took; made and written only if not there yet."""
    if not path.exists():
        started, video = time.time(), make()
        if not video.isfinite().all():  # eight bits could not tell
            raise ValueError(f"expected finite pixels in the row {path.stem}, got NaN or infinity; check the weights, use "
                             "--dtype float32 or lower the scales")
        save_state(path, {"video": world.to_uint8(video)}, {"seconds": round(time.time() - started, 1)})
    try:
        tensors, info = load_state(path)
        return tensors["video"], info["seconds"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"expected the clips of a row in {path}, got {error}; delete that file") from None


def score_row(video: Tensor, data: dict, eval_encoder: FaceNet, head: scores.HeadPoseEstimator, real: Tensor) -> dict:
    """Scores of clips (n, 3, F, h, w): name -> (mean, half width or None); real (m, E): eval_encoder vectors of true clips."""
    each, leaks = scores.per_clip(video, data, eval_encoder, head), scores.leaks(video, data, head)
    mean = {name: scores.summarise(values) for name, values in each.items()}
    mean |= {name: (value, None) for name, (value, _) in leaks.items()}
    mean["frechet"] = scores.frechet(scores.embed_clips(eval_encoder, video).flatten(0, 1), real), None
    return {"scores": mean, "leaks_by_chance": {name: level for name, (_, level) in leaks.items()},
            "per_clip": {name: [number(value) for value in values.tolist()] for name, values in each.items()}}


def chance_row(video: Tensor, data: dict, eval_encoder: FaceNet, head: scores.HeadPoseEstimator, leaks: dict[str, float]) -> dict:
    """What clips get that have nothing to do with their reference and prompt; leaks: the permuted level of each."""
    people = len(data["references"])
    other = scores.per_clip(video, with_person(data, (data["who"] + people // 2) % people), eval_encoder, head)
    known = leaks | {"top1": 1 / people, "look_alike": 1 / 2, "action": 1 / len(world.ACTIONS),
                     "scene": 1 / len(world.SCENES), "light": 1 / len(world.LIGHTS), "shirt": 1 / len(world.SHIRTS)}
    mean = {name: scores.summarise(other[name]) for name in ("similarity", "min_frame", *LEAKS)}
    return {"scores": mean | {name: (level, None) for name, level in known.items()}}


def cell(name: str, mean: float | None, half: float | None = None) -> str:
    """One number with the half width of its interval; a dash where there is none."""
    if mean is None or math.isnan(mean):
        return "–"
    factor, digits, unit = (100, 1, " %") if name in SHARES else (1, 3, "")
    spread = "" if half is None or math.isnan(half) else f" ± {factor * half:.{digits}f}"
    return f"{factor * mean:.{digits}f}{spread}{unit}"


def tables(rows: dict[str, dict], *groups: tuple[str, ...]) -> str:
    """Markdown, a table for each group of scores; rows: name -> {"scores": {score: (mean, half width or None)}}."""
    lines = []
    for group in groups:
        lines += ["", "| clips | " + " | ".join(group).replace("_", " ") + " |", "|---" * (len(group) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(cell(c, *row["scores"].get(c, (None,))) for c in group) + " |"
                  for name, row in rows.items()]
    return "\n".join(lines[1:])


def arguments_of(args: argparse.Namespace) -> dict[str, str]:
    """For a record. Files of this repository are named from its top, so that a record tells nothing of a machine."""
    return {k: str(v.relative_to(HERE) if isinstance(v, Path) and v.is_relative_to(HERE) else v)
            for k, v in vars(args).items()}


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for a number that cannot be meant, and for more clips than fit into memory."""
    check_ranges(args, {"people": (2, 1e6), "prompts": (1, 1e6), "num_inference_steps": (1, 10_000), "text_scale": (0, 1000),
                        "ref_scale": (0, 1000), "rescale": (0, 1), "guide_range": (0, 1), "guide_every": (1, 10_000),
                        "seed": (0, 2**62)})
    clips, has = args.people * args.prompts, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if (needs := clips * GB_PER_CLIP) > has:
        raise ValueError(f"expected as many clips as fit into the {has:.0f} GB of memory, got {clips}, which need "
                         f"{needs:.0f} GB; lower --people or --prompts")


def score_world(args: argparse.Namespace) -> None:
    """Make or take up the clips of every row, score them, print the tables, write JSON and contact sheet."""
    started, output = time.time(), args.output_path or Path("evaluate.json")
    check_numbers(args)
    for folder in (args.folder, output.parent):
        check_folder(folder)
    m = Models(args.checkpoint_path, args.gemma_root)
    d, eval_encoder, head = m.config["inference"], load_facenet(args.eval_encoder), scores.load_head(args.head)
    for name in ("text_scale", "ref_scale", "rescale", "guide_range", "guide_every"):
        setattr(args, name, {**INFERENCE, **d}[name] if getattr(args, name) is None else getattr(args, name))
    guidance_steps(torch.ones(2), args.guide_range, args.guide_every)  # complains about what it cannot do
    data, train = (test_set(args.people, args.prompts, d["height"], d["num_frames"], s) for s in (args.split, "train"))
    folder, who, true = args.folder / settings_key(args), data["who"], world.to_uint8(data["true"])
    side = {"true video": data, "through the VAE": data}
    make = {"through the VAE": lambda: torch.cat([m.vae.decode(m.vae.encode(v)) for v in data["true"].split(16)])}
    for name in args.rows:
        side[name] = with_person(data, (who + 1) % args.people) if name == "swapped" else data
        make[name] = partial(generate, m, data["captions"], data["references"][side[name]["who"]], args, name)
    clips = {"true video": (true, 0.0)}
    with torch.no_grad():
        clips |= {name: kept(folder / f"{name.replace(' ', '_')}.safetensors", work) for name, work in make.items()}
        real = scores.embed_clips(eval_encoder, train["true"]).flatten(0, 1)                     # (n * 5, E)
    rows, own = {}, args.rows[0]
    for name, (video, seconds) in tqdm(clips.items(), desc="scoring", unit="row"):
        rows[name] = score_row(video / 127.5 - 1, side[name], eval_encoder, head, real) | {"seconds": seconds}
    made = clips[own][0] / 127.5 - 1
    rows["chance"] = chance_row(made, side[own], eval_encoder, head, rows[own]["leaks_by_chance"])
    dB = psnr(clips["through the VAE"][0] / 127.5 - 1, true / 127.5 - 1).mean().item()
    record = {"rows": rows, "vae_psnr": dB, "seconds": round(time.time() - started, 1), "arguments": arguments_of(args)}
    people = [[picture, *clip[:, picks(clip.shape[1])[::2]].transpose(0, 1)] for picture, clip in
              zip(data["references"][side[own]["who"]], made, strict=True)][::args.prompts][:32]
    across = min(4, len(people))  # people in a row of the sheet; what fills no row is left out
    starts = range(0, len(people) - across + 1, across)
    save_sheet(output.with_suffix(".png"), [sum(people[i:i + across], []) for i in starts])
    write_json(output, record)
    print(f"{report(record)}\n\n{record['seconds']:.0f} s; clips in {folder}; wrote {output} and .png")


def report(record: dict) -> str:
    """What was scored, and its two tables, from a record as `score_world` writes it. Raises ValueError for another."""
    a, named = record.get("arguments", {}), ("split", "people", "prompts", "text_scale", "ref_scale", "guide_range",
                                             "guide_every", "order", "seed")
    missing = [name for name in ("rows", "vae_psnr") if name not in record] + [name for name in named if name not in a]
    if missing:
        raise ValueError(f"expected a record of evaluate.py, got one without {', '.join(missing)}; give an evaluate.json")
    return (f"VAE {record['vae_psnr']:.2f} dB on {int(a['people']) * int(a['prompts'])} unseen clips; {a['people']} people "
            f"of {a['split']} x {a['prompts']} prompts, text scale {a['text_scale']}, reference scale {a['ref_scale']}, "
            f"guidance in {a['guide_range']}, every {a['guide_every']}, {a['order']}, seed {a['seed']}\n\n"
            f"{tables(record['rows'], IDENTITY, PROMPT)}")


@torch.no_grad()
def read_own(path: Path, faces: Faces, net: FaceNet) -> tuple[Tensor, float]:
    """A video or picture -> the vectors of its F frames' faces, cut out by box [0] and by landmarks [1], (2, F, E), NaN
    where that cannot be done, and its flicker in 0..1 brightness. Raises Unusable as frames.decode does, ValueError."""
    found = probe(path)
    F, h, w = len(found.times), found.height, found.width
    if abs(math.log(faces.size[0] / faces.size[1] * w / h)) > 0.02:
        raise ValueError(f"expected faces of a picture shaped {h}x{w} (height x width) for {path}, got {faces.size[0]}x"
                         f"{faces.size[1]}; detect on upright frames of that file")
    boxes, marks, seen = faces_for_clip(faces, Bucket(h, w, F), Crop(h, w, 0, 0), found.times)
    vectors, changes, before = torch.full((2, F, net.fc.out_features), math.nan), [], None
    side, high = max(1, w // 10), int(0.7 * h)
    for k, frame in enumerate(tqdm(decode(path), desc=path.name, total=F, unit="frame", leave=False)):
        picture = frame.resized(Crop(h, w, 0, 0), Bucket(h, w, F)) / 127.5 - 1            # (3, h, w)
        if seen[k]:
            vectors[0, k] = net(faces_of(picture[None], boxes[k:k + 1], None, net.size))[0]
        if seen[k] and marks is not None and usable_landmarks(marks[k:k + 1]).all():
            vectors[1, k] = net(align(picture[None], marks[k:k + 1], net.size))[0]
        edge = torch.cat([picture[:, :high, :side], picture[:, :high, -side:]], dim=2)    # as scores.border
        changes += [] if before is None else [(edge - before).abs().mean().item() / 2]
        before = edge
    return vectors, sum(changes) / len(changes) if changes else math.nan


def score_folder(args: argparse.Namespace) -> None:
    """Own videos: similarity to one picture (all frames: mean, minimum, first half minus second), share of frames with
    a face, flicker at the border (says something only where the camera stands still). A frame without a face counts 0.

    Faces files as clips.load_faces reads them, <name>.json for each video and, with one frame, for the picture. A face
    is compared with the reference cut out in the same way: a cosine across the two ways is too low.
    """
    if args.ref is None or args.face is None:
        raise ValueError("expected --ref and --face beside --videos, got not both; give a picture and ArcFace weights")
    # A name with a dot in front is a file that sample.py is still writing.
    videos = sorted(p for p in args.videos.iterdir() if p.suffix.lower() in VIDEOS and p.name[0] != ".")
    files = [(args.faces_folder or p.parent) / f"{p.stem}.json" for p in (args.ref, *videos)]
    if not videos or len(set(files)) < len(files):
        raise ValueError(f"expected videos ({' '.join(sorted(VIDEOS))}) in {args.videos} and one faces file for each and "
                         f"for the picture, got {len(videos)} videos, {len(set(files))} names; rename what shares one")
    net, (face, *others) = load_facenet(args.face), [load_faces(file) for file in files]  # all, before the long work
    reference = read_own(args.ref, face, net)[0][:, 0]                                    # (2, E)
    if reference[0].isnan().any():
        raise ValueError(f"expected a face in {args.ref}, got none at time 0 in {files[0]}; take another picture")
    rows = {}
    for path, faces in tqdm(list(zip(videos, others, strict=True)), desc="videos", unit="video"):
        vectors, flicker = read_own(path, faces, net)
        box, marks = torch.einsum("wfe,we->wf", vectors, reference)                       # (F,) each
        cosine = torch.where(marks.isnan(), box, marks).nan_to_num(0)
        half = (len(cosine) + 1) // 2
        found, drift = (~box.isnan()).float().mean(), cosine[:half].mean() - cosine[-half:].mean()
        values = (cosine.mean().item(), cosine.min().item(), drift.item(), found.item(), flicker)
        rows[path.name] = {"scores": {name: (value, None) for name, value in zip(OWN_SCORES, values, strict=True)}}
    rows["mean"] = {"scores": {name: scores.summarise(torch.tensor([row["scores"][name][0] for row in rows.values()]))
                               for name in OWN_SCORES}}
    output, told = args.output_path or Path("evaluate_videos.json"), NOT_OFFLINE.format(reference.shape[1])
    write_json(output, {"rows": rows, "not_computed": told, "arguments": arguments_of(args)})
    print(f"{tables(rows, OWN_SCORES)}\nwrote {output}\n{told}")


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = Parser("study.evaluate", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for flag, name in (("--checkpoint-path", "model.safetensors"), ("--gemma-root", "gemma"),
                       ("--eval_encoder", "eval_encoder.safetensors"), ("--head", "head_pose.safetensors")):
        p.add_argument(flag, type=Path, default=HERE / "weights" / "tiny" / name)
    p.add_argument("--split", choices=["test", "val"], default="test", help="choose settings on val, report on test")
    p.add_argument("--people", type=int, default=256)
    p.add_argument("--prompts", type=int, default=1, help="per person")
    p.add_argument("--num-inference-steps", type=int, help="default: the checkpoint's")
    for flag in ("--text-scale", "--ref-scale", "--rescale"):
        p.add_argument(flag, type=float, help="default: the checkpoint's")
    p.add_argument("--guide-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="default: the checkpoint's")
    p.add_argument("--guide-every", type=int, help="default: the checkpoint's")
    p.add_argument("--order", choices=ORDERS, default=ORDERS[0])
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    p.add_argument("--folder", type=Path, default=Path("runs") / "evaluate", help="keeps finished rows of clips")
    p.add_argument("--output-path", type=Path, help="default: evaluate.json (and .png), evaluate_videos.json")
    p.add_argument("--tables", type=Path, metavar="JSON", help="only print the tables of an evaluation that is done")
    p.add_argument("--videos", type=Path, metavar="FOLDER", help="score own videos instead")
    p.add_argument("--ref", type=Path, help="own videos: picture of the person")
    p.add_argument("--face", type=Path, help="own videos: ArcFace weights (safetensors, see face.py)")
    p.add_argument("--faces-folder", type=Path, help="own videos: the faces files; default: beside video and picture")
    return p.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    if args.tables:
        return command("study.evaluate", lambda: print(report(read_json(args.tables))))
    return command("study.evaluate", lambda: score_folder(args) if args.videos else score_world(args))


if __name__ == "__main__":
    sys.exit(main())
