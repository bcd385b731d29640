"""Whether it works: identity, prompt and copying, scored on people that no training saw.

For every test person: one reference picture in a random setting, and clips of that person for prompts whose setting is
drawn anew. Scores, each printed beside the same score of true clips (the renderer's own video of that
person doing that) and of true clips sent through the VAE (what a perfect transformer could reach):

* `similarity`   mean cosine between the reference and five frames of the clip, by the judge network
* `others`       the same against everybody else's reference: near 0 if similarity means anything
* `look-alike`   share of clips nearer to their own reference than to a picture of the look-alike (same skin and hair)
* `top-1`        share of clips whose own reference is the nearest among all test people's
* `scene`, `light`, `shirt`   share of clips that show what the prompt says. Read off the pixels, not off a network: the
                 border of the frame is compared with each scene under each light, the bottom middle with each shirt
* `leak`         among clips whose prompt differs from the reference's setting in a factor: share that show the
                 reference's instead. A copy-pasting model scores high here (paper: the failure TASS-RoPE is there to stop)

The judge (weights/tiny/judge.safetensors) supervised nothing: other random people, other width, other crops, other seed
than the recogniser of train.py. Rows `swapped` use the next person's reference with the same noise and prompt: the
identity must follow. `no reference` drops it: similarity must fall to chance.

    python evaluate.py                                  the table of the README, and evaluate.png
    python evaluate.py --people 16 --prompts 1          a quick look

Read next: the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import world
from checkpoint import load_weights, read_metadata
from face import FaceNet, load_facenet
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer, ltx_sigmas
from reference import encode_reference
from run import seeded, write_beside
from sample import denoise
from text import TextEncoder
from vae import VideoVAE, psnr
from video import save_sheet

HERE = Path(__file__).parent
JUDGED_FRAMES = [0, 2, 4, 6, 8]


# ----------------------------------------------------------------------------------------------------------- the test set
def test_set(people: int, prompts: int, size: int, frames: int, split: str = "test") -> dict:
    """References and prompts of the first `people` persons of a split; a pure function of its arguments."""
    g = seeded(2024)
    person = world.people(split, people)
    ref_setting = world.draw_settings(people, g)
    references, _ = world.draw_references(person, ref_setting, g, size, share=1.0)
    alike, _ = world.draw_references(world.look_alikes(person, g), world.draw_settings(people, g), g, size)
    who = torch.arange(people).repeat_interleave(prompts)
    setting, action = world.draw_settings(len(who), g), world.draw_actions(len(who), g)
    captions = [world.caption(s, int(a), i % len(world.TEMPLATES))
                for i, (s, a) in enumerate(zip(setting, action, strict=True))]
    poses = world.action_poses(action, frames, g)
    video = torch.cat([world.render(person[w], s, p, size)[0] for w, s, p in
                       zip(who.split(16), setting.split(16), poses.split(16), strict=True)])
    return {"who": who, "references": references, "alike": alike, "setting": setting, "ref_setting": ref_setting[who],
            "captions": captions, "true": video}


# ----------------------------------------------------------------------------------------------------------------- scores
@torch.no_grad()
def embed_clips(judge: FaceNet, video: Tensor) -> Tensor:
    """Judge vectors of five frames of each clip: (n, 3, F, h, w) -> (n, 5, E)."""
    frames = video[:, :, JUDGED_FRAMES].transpose(1, 2)                                   # (n, 5, 3, h, w)
    return torch.stack([judge(v) for v in frames])


@torch.no_grad()
def identity_scores(judge: FaceNet, video: Tensor, who: Tensor, references: Tensor, alike: Tensor) -> dict[str, float]:
    """Similarity, others, look-alike and top-1; `who` (n,) is the person each clip should show."""
    clips = embed_clips(judge, video)                                                     # (n, 5, E)
    refs, other = judge(references), judge(alike)                                         # (people, E)
    cosine = torch.einsum("nfe,pe->nfp", clips, refs).mean(1)                             # (n, people)
    own = cosine.gather(1, who[:, None])[:, 0]
    to_alike = torch.einsum("nfe,ne->nf", clips, other[who]).mean(1)
    everyone_else = (cosine.sum(1) - own) / (cosine.shape[1] - 1)
    return {"similarity": own.mean().item(), "others": everyone_else.mean().item(),
            "look-alike": (own > to_alike).float().mean().item(),
            "top-1": (cosine.argmax(1) == who).float().mean().item()}


def lit_backgrounds(size: int) -> Tensor:
    """Every empty scene under every light, (scenes, lights, 3, size, size) in [0, 1]."""
    c = world.Canvas(len(world.SCENES), size, torch.device("cpu"))
    world.paint_background(c, torch.arange(len(world.SCENES)))
    lights = torch.tensor(list(world.LIGHTS.values()))
    return (c.rgb[:, None] * lights[None, :, :, None, None]).clamp(0, 1)


def read_setting(video: Tensor) -> Tensor:
    """What the pixels show: (n, 3, F, h, w) in [-1, 1] -> (scene, light, shirt) indices (n, 3).

    Scene and light: the nearest of all lit empty scenes on the left and right border of the frame, above the shoulders,
    where hair and hands rarely are. Shirt: the bottom middle against each shirt under the light that was found.
    """
    n, _, F, size, _ = video.shape
    rgb = (video.clamp(-1, 1) + 1) / 2
    edge, high = size // 10, int(0.7 * size)
    border = torch.zeros(size, size, dtype=torch.bool)
    border[:high, :edge] = border[:high, -edge:] = True
    templates = lit_backgrounds(size)[:, :, :, border]                                    # (scenes, lights, 3, pixels)
    seen = rgb.median(dim=2).values[:, :, border]                                         # (n, 3, pixels), over time
    distance = (seen[:, None, None] - templates[None]).abs().mean((3, 4))                 # (n, scenes, lights)
    best = distance.flatten(1).argmin(1)
    scene, light = best // len(world.LIGHTS), best % len(world.LIGHTS)
    patch = rgb[:, :, :, -size // 16:, size // 2 - size // 10: size // 2 + size // 10].mean((2, 3, 4))     # (n, 3)
    lights, shirts = (torch.tensor(list(t.values())) for t in (world.LIGHTS, world.SHIRTS))
    lit = (lights[light][:, None] * shirts[None]).clamp(0, 1)                             # (n, shirts, 3)
    return torch.stack([scene, light, (patch[:, None] - lit).abs().mean(2).argmin(1)], dim=1)


def prompt_scores(video: Tensor, setting: Tensor, ref_setting: Tensor) -> dict[str, float]:
    """Accuracy per factor of the prompt, and how often the reference's setting shows where the prompt says otherwise."""
    shown = read_setting(video)
    out = {name: (shown[:, i] == setting[:, i]).float().mean().item() for i, name in enumerate(("scene", "light",
                                                                                              "shirt"))}
    differs = setting != ref_setting                                                      # (n, 3)
    return out | {"leak": ((shown == ref_setting) & differs).sum().item() / differs.sum().item()}


# ------------------------------------------------------------------------------------------------------------- generation
class Models:
    """Everything that a checkpoint and a Gemma folder hold, loaded at once (the tiny model is small)."""

    def __init__(self, checkpoint: Path, gemma_root: Path):
        metadata = read_metadata(checkpoint)
        self.config = metadata["config"]
        self.placement = metadata.get("reference_placement", "tass")
        with torch.device("meta"):
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
    steps = args.num_inference_steps or d["steps"]
    sigmas = ltx_sigmas(steps, d["schedule_tokens"])
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
                             args.ref_scale, args.order, args.rescale, m.placement)
            out.append(m.vae.decode(latent).float().clamp(-1, 1))
    return torch.cat(out)


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--checkpoint-path", type=Path, default=HERE / "weights" / "tiny" / "model.safetensors")
    p.add_argument("--gemma-root", type=Path, default=HERE / "weights" / "tiny" / "gemma")
    p.add_argument("--judge", type=Path, default=HERE / "weights" / "tiny" / "judge.safetensors")
    p.add_argument("--split", choices=["test", "val"], default="test", help="choose settings on val, report on test")
    p.add_argument("--people", type=int, default=128)
    p.add_argument("--prompts", type=int, default=2, help="prompts per person")
    p.add_argument("--num-inference-steps", type=int, help="default: the checkpoint's")
    p.add_argument("--text-scale", type=float, help="default: the checkpoint's")
    p.add_argument("--ref-scale", type=float, help="default: the checkpoint's")
    p.add_argument("--order", default="text_first")
    p.add_argument("--rescale", type=float, help="default: the checkpoint's")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rows", nargs="+", default=["own reference", "swapped", "no reference"])
    p.add_argument("--output-path", type=Path, default=Path("evaluate.json"), help="also writes the .png beside it")
    return p.parse_args()


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Markdown table: one row per kind of clip, one column per score."""
    columns = list(next(iter(rows.values())))
    print("| clips | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, scores in rows.items():
        cells = [f"{scores[c]:.2f}" if c in ("similarity", "others") else f"{100 * scores[c]:.1f} %" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    args = parse_arguments()
    started = time.time()
    m, judge = Models(args.checkpoint_path, args.gemma_root), load_facenet(args.judge)
    for name in ("text_scale", "ref_scale", "rescale"):
        if getattr(args, name) is None:
            setattr(args, name, m.config["inference"][name])
    data = test_set(args.people, args.prompts, m.config["inference"]["height"], m.config["inference"]["num_frames"],
                    args.split)
    who = data["who"]
    with torch.no_grad():
        through = torch.cat([m.vae.decode(m.vae.encode(v)).clamp(-1, 1) for v in data["true"].split(16)])
    clips = {"true video": data["true"], "true video through the VAE": through}
    shown_person = dict.fromkeys(clips, who)
    for name in args.rows:
        shown_person[name] = (who + 1) % args.people if name == "swapped" else who
        clips[name] = generate(m, data["captions"], data["references"][shown_person[name]], args, name)
    rows = {name: identity_scores(judge, video, shown_person[name], data["references"], data["alike"])
            | prompt_scores(video, data["setting"], data["ref_setting"]) for name, video in clips.items()}
    dB = psnr(through, data["true"]).mean().item()
    print(f"VAE on {len(who)} unseen clips: {dB:.2f} dB; {args.people} test people x {args.prompts} prompts, text scale "
          f"{args.text_scale}, reference scale {args.ref_scale}, {args.order}, seed {args.seed}")
    print_table(rows)
    own = args.rows[0]
    sheet = []
    for i in range(0, min(16, args.people) * args.prompts, args.prompts):
        sheet.append([data["references"][who[i]], *clips[own][i].transpose(0, 1)[[0, 4, 8]]])
    half = (len(sheet) + 1) // 2
    save_sheet(args.output_path.with_suffix(".png"), [a + b for a, b in zip(sheet[:half], sheet[half:], strict=True)], 2)
    record = {"rows": rows, "vae_psnr": dB, "seconds": round(time.time() - started, 1),
              "arguments": {k: str(v) for k, v in vars(args).items()}}
    write_beside(args.output_path, lambda p: p.write_text(json.dumps(record, indent=1)))
    print(f"{time.time() - started:.0f} s; wrote {args.output_path} and {args.output_path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
