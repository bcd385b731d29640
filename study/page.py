"""docs/explorer.html: the method to look at and to play with, one file that needs no server.

The idea. A picture in a README shows the one case that its author chose. The explorer page lets
the reader choose: two guidance scales, a token, a step, an augmentation, an exercise. Nothing is
computed in the browser. All that the page can show is made here, through the functions that
sampling and training use, and stored in the page; study/page.html draws it and decides nothing.
The failure this prevents: a demo with formulas of its own, which shows what the code once did.

paper:        what is shown: reference tokens, TASS-RoPE, augmentation, three streams (ST-DRC, arXiv
              2606.02441).
our reading:  all of the page. The real attention to the reference (`attention`) is what the bundled
              model has learnt; the score by place alone (`place_scores`) is what q = k would give.

Conventions. Pictures are uint8 while they wait, and WebP in the page: tiles of one size, so that a
row and a column name one. Numbers 0..1 travel as bytes. Everything is a function of the weights and
the code: finished clips are kept under --folder by a hash of both, and the same command goes on.
The dials take STEPS steps instead of the checkpoint's, to halve the time; the walk takes all.

    python -m study.page                        twelve minutes on one core of an AMD EPYC
    python -m study.page --quick --output-path quick.html      a small one, in seconds

Read next: docs/exercises.md
"""

import argparse
import base64
import inspect
import io
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

import losses
from augment import AugmentStrength, augment_color, augment_layout, augment_pose, augment_reference
from clips.face import load_facenet
from common.cli import Parser, check_file, check_folder, command
from common.files import atomic_write, read_json
from common.seeds import seeded
from guidance import (
    BOTH,
    NULL,
    ORDERS,
    REF,
    TEXT,
    Guidance,
    guidance_steps,
    guide,
    guided_sum,
    stream_weights,
)
from ltx.fast_cpu import FastCPU
from ltx.load import guidance_from, layout_from
from model import TransformerConfig, VideoTransformer, euler_step, ltx_sigmas
from reference import (
    Reference,
    append_reference,
    encode_reference,
    letterbox,
    predict_velocity,
    unpatchify,
)
from rope import PLACEMENTS, Layout, apply_rotary, reference_grid, rotary_tables, video_grid
from sample import denoise_steps
from study import evaluate, scores
from study.figures import HERE, NAMES
from toy import world
from toy.config import EXAMPLES
from toy.head import load_head
from training.run import load_state

TEMPLATE, PAGE = HERE / "study" / "page.html", HERE / "docs" / "explorer.html"
MOST_BYTES = 5_000_000
PROMPTS = (("in a park", "in daylight", "red", "turns left"),
           ("in the snow", "in pink light", "white", "laughs"))
STRENGTHS = (0.0, 0.5, 1.0, 2.0)  # of the augmentation's sliders
FACTORS = ("action", "scene", "light", "shirt")


class Plan(NamedTuple):
    """How much the page holds."""

    people: int = 4                   # of toy.config.EXAMPLES
    prompts: int = 2                  # of PROMPTS
    fixed: tuple = (0.0, 1.0)         # scales of the dials
    multiples: tuple = (1, 1.5, 2.5)  # and these times the checkpoint's own
    orders: tuple = ORDERS
    steps: int = 10                   # of the dials
    walk: int = 0                     # steps of the walk, 0 = the checkpoint's
    placements: tuple = tuple(PLACEMENTS)
    levels: int = 4                   # noise levels at which attention is looked at
    draws: int = 4                    # dice of the augmentation
    copies: int = 200                 # draws over which the cost of a copy is averaged
    exercises: int = 8                # people on whom they are scored; 0 = no exercises


QUICK = Plan(2, 2, (1.0,), (1,), ORDERS[::2], 2, 3, ("tass", "overlap"), levels=2, draws=2,
             copies=40, exercises=0)


# ------------------------------------------------------------ how things travel


def sheet(tiles: Tensor, quality: int = 50) -> str:
    """Tiles (rows, columns, 3, h, w) uint8 -> one WebP as a data: address."""
    rows, columns, _, h, w = tiles.shape
    whole = tiles.permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)
    return _webp(Image.fromarray(whole.contiguous().numpy()), quality=quality)


def grey(values: Tensor) -> str:
    """Numbers (rows, columns) in 0..1 -> a lossless grey WebP of 16 steps, evenly in the root.

    A byte b stands for (b / 255)^2: attention is mostly small, and small is where steps show."""
    steps = (values.clamp(0, 1).sqrt() * 15).round() * 17
    return _webp(Image.fromarray(steps.to(torch.uint8).numpy()).convert("RGB"), lossless=True)


def packed(values: Tensor) -> str:
    """Numbers in 0..1, any shape -> one byte each, in base64."""
    return base64.b64encode((values * 255).round().to(torch.uint8).numpy().tobytes()).decode()


def _webp(image: Image.Image, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, "webp", method=6, **options)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def source(*functions: Callable) -> list[dict]:
    """In which file of the repository each function stands, and its text. No line: a number would
    be wrong after the next edit above it."""
    told = []
    for function in map(inspect.unwrap, functions):
        file = Path(inspect.getsourcefile(function)).relative_to(HERE).as_posix()
        told.append({"name": function.__name__, "file": file, "text": inspect.getsource(function)})
    return told


# ------------------------------------------------------------ who is shown


class Studio:
    """The bundled models, and the people and prompts of the page: n = people * prompts clips."""

    def __init__(self, plan: Plan, args: argparse.Namespace):
        self.plan, self.args = plan, args
        self.models = evaluate.Models(args.checkpoint_path, args.gemma_root)
        self.numbers, self.names = self.models.numbers, list(EXAMPLES)[:plan.people]
        for name in evaluate.GUIDED:
            setattr(args, name, self.numbers[name])
        args.num_inference_steps = plan.steps
        self.nets = load_facenet(args.eval_encoder), load_head(args.head)
        rows = [EXAMPLES[name] for name in self.names]
        self.data = cast(rows, plan.prompts, self.numbers["height"], self.numbers["num_frames"])
        self.references = self.data["references"][self.data["who"]]         # (n, 3, h, w)
        told = zlib.crc32(repr((plan, PROMPTS, rows)).encode())
        self.folder = args.folder / f"{evaluate.settings_key(args)}-{told:08x}"

    def layout(self, placement: str = "") -> Layout:
        return layout_from(self.numbers, self.models.vae, placement or self.models.placement)

    @torch.no_grad()
    def first(self) -> dict[str, Tensor]:
        """What sampling the first clip needs: noise, contexts, reference tokens."""
        m, layout = self.models, self.layout()
        L = layout.F * layout.H * layout.W
        return {"noise": torch.randn(1, L, m.vae.latent_channels, generator=seeded(0, 0)),
                "context": m.text.encode(self.data["captions"][:1]),
                "null_context": m.text.encode([""]),
                "reference_tokens": encode_reference(m.vae.encode, self.references[:1])}

    def sigmas(self) -> Tensor:
        return ltx_sigmas(self.plan.walk or self.numbers["steps"], self.numbers["schedule_tokens"])

    @torch.no_grad()
    def seen(self, tokens: Tensor) -> Tensor:
        """Video tokens (1, L, C), decoded: a frame for each latent one, (F, 3, h, w) uint8."""
        layout = self.layout()
        video = self.models.vae.decode(unpatchify(tokens, layout.F, layout.H, layout.W))
        video = world.to_uint8(video.clamp(-1, 1))[0]                       # (3, F, h, w)
        return video[:, ::layout.time_scale].transpose(0, 1)


def cast(rows: list[int], prompts: int, size: int, frames: int) -> dict:
    """Test people `rows`, each with the first `prompts` of PROMPTS, as scores.per_clip reads it."""
    data = evaluate.test_set(max(rows) + 1, 1, size, frames)
    tables = world.SCENE_NAMES, world.LIGHT_NAMES, world.SHIRT_NAMES, world.ACTIONS
    asked = torch.tensor([[table.index(word) for table, word in zip(tables, words, strict=True)]
                          for words in PROMPTS[:prompts]]).repeat(len(rows), 1)   # (n, 4)
    who = torch.tensor(rows).repeat_interleave(prompts)
    return data | {"who": who, "setting": asked[:, :3], "action": asked[:, 3],
                   "ref_setting": data["ref_setting"][who],
                   "captions": [world.caption(row[:3], int(row[3])) for row in asked]}


# ------------------------------------------------------------ the panels


def dials(studio: Studio) -> dict:
    """Clips and two scores of every order and pair of scales."""
    plan, args = studio.plan, studio.args
    texts, refs = (sorted({*plan.fixed, *(studio.numbers[name] * k for k in plan.multiples)})
                   for name in ("text_scale", "ref_scale"))
    done, clips, similarity, prompt = {}, {}, {}, {}
    for order, text, ref in product(plan.orders, texts, refs):
        guidance = Guidance(text, ref, order)
        weights = tuple(sorted(stream_weights(guidance).items()))
        args.order, args.text_scale, args.ref_scale = order, text, ref
        name = f"{order} {text:g} {ref:g}"
        if weights not in done:  # orders that agree are the same clips
            video, _ = evaluate.kept(studio.folder / f"{name.replace(' ', '-')}.safetensors",
                                     lambda name=name: evaluate.generate(
                                         studio.models, studio.data["captions"],
                                         studio.references, args, name))
            done[weights] = video, scores.per_clip(video / 127.5 - 1, studio.data, *studio.nets)
        video, found = done[weights]
        clips.setdefault(order, []).append(video.transpose(1, 2))           # (n, F, 3, h, w)
        similarity.setdefault(order, []).append(found["similarity"])
        prompt.setdefault(order, []).append(torch.stack([found[f] for f in FACTORS]).mean(0))
    # clips of an order: a sheet for each person, a row for each (text, ref, prompt)
    sheets = {order: [sheet(torch.cat([clip[p:p + plan.prompts] for clip in pairs]))
                      for p in range(0, plan.people * plan.prompts, plan.prompts)]
              for order, pairs in clips.items()}
    weights = {order: [{NAMES[s]: w for s, w in stream_weights(Guidance(t, r, order)).items()}
                       for t, r in product(texts, refs)] for order in plan.orders}
    return {"texts": texts, "refs": refs, "sheets": sheets, "weights": weights,
            "usual": [studio.numbers["text_scale"], studio.numbers["ref_scale"]],
            "steps": plan.steps, "frames": studio.numbers["num_frames"],
            "prompts": studio.data["captions"][:plan.prompts],
            "similarity": {k: _rounded(v) for k, v in similarity.items()},
            "prompt": {k: _rounded(v) for k, v in prompt.items()},
            "sources": source(guided_sum, stream_weights, guide, scores.identity_scores)}


def _rounded(rows: list[Tensor]) -> list[list[float]]:
    return [[round(value, 3) for value in row.tolist()] for row in rows]


def place_scores(layout: Layout, config: TransformerConfig) -> Tensor:
    """Score of every video token with every reference cell if q = k: by place alone, (L, R).

    As rope.score_map, for all tokens and with the model's own frequencies."""
    positions = torch.cat([layout.video_positions(), layout.reference_positions()], dim=1)
    N, R = positions.shape[1], layout.H * layout.W
    same = torch.full((1, config.heads, N, config.head_dim), config.dim**-0.5)
    tables = rotary_tables(positions[None], config.dim, config.heads, config.theta, config.max_pos)
    turned = apply_rotary(same, *tables)[0]                                 # (nh, L + R, hd)
    return torch.einsum("hld,hrd->lr", turned[:, :-R], turned[:, -R:])


@contextmanager
def listening(model: VideoTransformer) -> Iterator[list[list[Tensor]]]:
    """Inside, every self-attention's normalised q and k (B, N, D) are noted: a pair a block."""
    heard = [[], []]
    hooks = [norm.register_forward_hook(lambda _, __, out, notes=notes: notes.append(out))
             for block in model.transformer_blocks
             for norm, notes in ((block.attn1.q_norm, heard[0]), (block.attn1.k_norm, heard[1]))]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention(model: VideoTransformer, x: Tensor, sigma: Tensor, context: Tensor,
              tokens: Tensor, layout: Layout) -> Tensor:
    """How much every video token looks at every token, averaged over heads: (layers, L, S).

    What F.scaled_dot_product_attention computes inside and does not give out: softmax of
    q k / sqrt(hd), from the q and k that the model really made. x (1, L, C), tokens (1, R, C)."""
    config, video = model.config, layout.video_positions()
    reference = Reference(tokens, layout.reference_positions())
    with listening(model) as heard:
        predict_velocity(model, x, sigma, video, context, reference)
    positions = torch.cat([video, reference.positions], dim=1)[None]        # (1, A, S, 2)
    tables = rotary_tables(positions, config.dim, config.heads, config.theta, config.max_pos)
    layers = []
    for pair in zip(*heard, strict=True):
        q, k = (apply_rotary(part.unflatten(-1, (config.heads, -1)).transpose(1, 2), *tables)
                for part in pair)                                           # (1, nh, S, hd) each
        weights = (q @ k.mT * config.head_dim**-0.5).softmax(-1)            # (1, nh, S, S)
        layers.append(weights[0, :, :x.shape[1]].mean(0))
    return torch.stack(layers)


def places(studio: Studio) -> dict:
    """For each placement: where tokens lie, scores by place, and the model's real attention."""
    layout, model, start = studio.layout(), studio.models.transformer, studio.first()
    sigmas, R = studio.sigmas(), layout.H * layout.W
    steps = torch.linspace(0, len(sigmas) - 2, studio.plan.levels).round().long().tolist()
    out = {"grid": [layout.F, layout.H, layout.W], "usual": studio.models.placement,
           "levels": [round(sigmas[i].item(), 3) for i in steps],
           "layers": len(model.transformer_blocks), "placements": {},
           "video": video_grid(layout.F, layout.H, layout.W).tolist(),
           "sources": source(reference_grid, Layout, place_scores, attention)}
    for placement in studio.plan.placements:
        layout = studio.layout(placement)
        by_place = place_scores(layout, model.config)                       # (L, R)
        walk = denoise_steps(model, sigmas=sigmas, layout=layout, **start,
                             guidance=guidance_from(studio.numbers, ORDERS[0]))
        x, maps = start["noise"], []
        for i, (following, _) in enumerate(walk):
            if i in steps:
                maps.append(attention(model, x, sigmas[i:i + 1], start["context"],
                                      start["reference_tokens"], layout)[..., -R:])
            x = following
        maps = torch.stack(maps)                                            # (levels, layers, L, R)
        maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1)         # first: over all layers
        most = maps.amax(-1, keepdim=True).clamp_min(1e-9)
        out["placements"][placement] = {
            "grid": reference_grid(layout.F, layout.H, layout.W, placement).tolist(),
            "place": packed((by_place + 1) / 2), "attention": grey((maps / most).flatten(0, 2)),
            "share": packed(maps.sum(-1)), "frames": sheet(studio.seen(x)[None], 80)}
    return out


def walk(studio: Studio) -> dict:
    """Every step of one sampling run: what is noisy, what each stream believes, and the sum."""
    model, layout, start = studio.models.transformer, studio.layout(), studio.first()
    guidance, sigmas = guidance_from(studio.numbers, ORDERS[0]), studio.sigmas()
    beside = Reference(start["reference_tokens"], layout.reference_positions())
    contexts = {True: start["context"], False: start["null_context"]}

    @torch.no_grad()
    def estimate(x: Tensor, sigma: Tensor, text: bool, ref: bool) -> Tensor:
        v = predict_velocity(model, x, sigma, layout.video_positions(), contexts[text],
                             beside if ref else None)
        return losses.clean_estimate(x, v, sigma)                           # (1, L, C)

    x, rows = start["noise"], []
    steps = denoise_steps(model, sigmas=sigmas, layout=layout, guidance=guidance, **start)
    for i, (following, guided) in enumerate(steps):
        streams = [estimate(x, sigmas[i:i + 1], *s) for s in (NULL, TEXT, REF, BOTH)]
        rows.append(torch.cat([studio.seen(part) for part in (x, *streams, guided)]))
        x = following
    weights = stream_weights(guidance)
    return {"sigmas": [round(s, 3) for s in sigmas.tolist()], "sheet": sheet(torch.stack(rows), 55),
            "runs": guidance_steps(sigmas, guidance), "frames": layout.F,
            "weights": [weights.get(s, 0) for s in (NULL, TEXT, REF, BOTH)],
            "sources": source(denoise_steps, predict_velocity, append_reference,
                              losses.clean_estimate, euler_step)}


def augmentation(studio: Studio) -> dict:
    """One reference under every strength of colour, pose and layout, and the price of a copy."""
    plan, size = studio.plan, studio.numbers["height"]
    picture = letterbox(Image.open(HERE / "examples" / f"{studio.names[0]}.png"), size, size)[None]
    tiles, own, mean = [], [], []

    def price(copies: Tensor) -> float:  # as augment.py's demo counts it
        return round(((copies - picture).square().mean() / picture.var()).item(), 3)

    for strength in product(STRENGTHS, repeat=3):
        row = []
        for draw in range(plan.draws):
            shown = picture
            for change, s in zip((augment_color, augment_pose, augment_layout), strength,
                                 strict=True):
                shown = change(shown, seeded(draw, 1), s)  # a slider leaves the others' draws alone
            row.append(shown)
        many = picture.expand(plan.copies, -1, -1, -1)
        mean.append(price(augment_reference(many, seeded(0), AugmentStrength(*strength))))
        own.append([price(shown) for shown in row])
        tiles.append(world.to_uint8(torch.cat(row)))
    return {"strengths": STRENGTHS, "sheet": sheet(torch.stack(tiles), 60), "own": own,
            "mean": mean, "copies": plan.copies,
            "sources": source(augment_color, augment_pose, augment_layout, augment_reference)}


def exercises(studio: Studio, people: int = 4) -> list[dict]:
    """Before and after of every exercise, from what `python -m bench.exercises --keep` has kept."""
    scored = studio.plan.exercises
    if not scored:
        return []
    folder = studio.folder / "exercises"
    if not folder.exists():
        half = folder.with_name("exercises.half")  # renamed when it is complete
        call = [sys.executable, "-m", "bench.exercises", "--people", str(scored), "--keep",
                str(half.absolute())]
        done = subprocess.run(call, cwd=HERE, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise ValueError(f"expected exercises that run, got status {done.returncode}: {last}; "
                             "mend what it says, finished clips are kept")
        half.rename(folder)
    out = []
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
        told = read_json(path) | {"people": people, "scored": scored}
        for side in (told["before"], told["after"]):
            clips = folder / f"{side['clips']}.safetensors"
            if clips.exists():
                video = load_state(clips)[0]["video"][:people, :, ::2]      # (people, 3, 5, h, w)
                side["sheet"] = sheet(video.transpose(1, 2))
        out.append(told)
    return out


# ------------------------------------------------------------ the page


def explorer(studio: Studio) -> str:
    """The template with all that the panels show in the place of DATA."""
    size, references = studio.numbers["height"], studio.references[::studio.plan.prompts]
    data = {"size": size, "people": studio.names, "frame_rate": studio.numbers["frame_rate"],
            "references": sheet(world.to_uint8(references)[None], 85)}
    panels = {"dials": dials, "places": places, "walk": walk, "augment": augmentation,
              "exercises": exercises}
    with FastCPU():
        for name, panel in panels.items():
            started = time.time()
            data[name] = panel(studio)
            print(f"{name:10s}{time.time() - started:5.0f} s", flush=True)
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1)


def work(args: argparse.Namespace) -> None:
    """Make the page, or refuse: nothing is written that is too large."""
    check_file(args.output_path, ".html")
    check_folder(args.folder)
    started = time.time()
    known = evaluate.parse_arguments([])
    known.folder = args.folder
    text = explorer(Studio(QUICK if args.quick else Plan(), known))
    if len(text) > MOST_BYTES:
        raise ValueError(f"expected a page of at most {MOST_BYTES:,} bytes, got {len(text):,}; "
                         "hold less (Plan) or lower the quality of `sheet`")
    atomic_write(args.output_path, lambda path: path.write_text(text, encoding="utf-8"))
    print(f"{args.output_path}: {args.output_path.stat().st_size:,} bytes, "
          f"{time.time() - started:.0f} s")


def main(words: list[str] | None = None) -> int:
    p = Parser("study.page", description=__doc__.split("\n")[0])
    p.add_argument("--output-path", type=Path, default=PAGE, help="(default: docs/explorer.html)")
    p.add_argument("--folder", type=Path, default=Path("runs/page"), help="keeps finished clips")
    p.add_argument("--quick", action="store_true", help="a small page that shows little")
    args = p.parse_args(words)
    return command("study.page", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
