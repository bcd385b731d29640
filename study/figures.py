"""All pictures of README and docs, drawn from the functions that the model uses.

The idea. A drawing by hand shows what its author believes, and goes on showing it when the code has
changed. So every position and number here is asked of rope.py, reference.py, augment.py, losses.py
and guidance.py, of the procedural world, or of the bundled weights: if a picture looks wrong, the
code is. One function a picture, all of them listed in FIGURES.

paper:        rope.png has its figure's example, a 3 x 4 reference (ST-DRC, arXiv 2606.02441).
our reading:  everything else that is drawn.

Conventions. Lengths are pixels of a page 900 wide, as GitHub shows it; no type is below 13. A page
is drawn four times as large and kept twice as large. Pictures are (3, h, w) in [-1, 1]. Colours are
told apart by colour-blind readers (after Okabe and Ito) and mean the same everywhere: blue the
video, red the reference, green the prompt, violet the face in the video.

    python -m study.figures                     all of them, two minutes on one core
    python -m study.figures rope guidance       these two

Read next: study/page.py
"""

import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from textwrap import wrap

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageStat
from torch import Tensor

import losses as loss
from augment import AugmentStrength, augment_color, augment_layout, augment_pose, augment_reference
from clips.face import load_facenet, square
from common.cli import Parser, command
from common.files import atomic_write
from guidance import BOTH, NULL, ORDERS, REF, TEXT, Guidance, guided_sum, stream_weights
from reference import Reference, append_reference, drop_reference, encode_reference, letterbox
from rope import Layout, reference_grid, score_map, video_grid
from study import evaluate
from toy import world

HERE = Path(__file__).resolve().parents[1]  # the repository
TINY = HERE / "weights" / "tiny"
WIDE, DRAWN, KEPT = 900, 4, 2
WHITE, INK, GREY, LINE, PALE = (255,) * 3, (34,) * 3, (105,) * 3, (190,) * 3, (238,) * 3
VIDEO, REFERENCE, PROMPT, FACE = (0, 114, 178), (213, 94, 0), (0, 140, 100), (150, 60, 130)
Color = tuple[int, ...]
Point = Sequence[float]


# ------------------------------------------------------------ paper and pencil
def mixed(color: Color, share: float) -> Color:
    """The colour on white: share 1 all of it, 0 white."""
    return tuple(round(255 + share * (c - 255)) for c in color)


class Page:
    """A white page with a title; all lengths are pixels of a page 900 wide."""

    def __init__(self, height: float, title: str = ""):
        self.image = Image.new("RGB", (WIDE * DRAWN, round(height * DRAWN)), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.text(20, 26, title, 19, bold=True)

    def done(self) -> Image.Image:
        return self.image.reduce(DRAWN // KEPT)

    def text(self, x: float, y: float, words: str, size: float = 15, color: Color = INK,
             align: str = "l", bold: bool = False) -> float:
        """Lines, the first one around y; v_T is v with a small T. Returns the last one's end."""
        for row, line in enumerate(words.split("\n")):
            parts = re.split(r"(?<=\b[vsL])_(\w+)", line)  # every other one is a subscript
            fonts = [ImageFont.load_default(size * DRAWN * (0.72 if i % 2 else 1))
                     for i in range(len(parts))]
            lengths = [f.getlength(part) / DRAWN for f, part in zip(fonts, parts, strict=True)]
            x_at = x - sum(lengths) * {"l": 0, "m": 0.5, "r": 1}[align]
            for i, part in enumerate(parts):
                place = x_at * DRAWN, (y + size * (1.35 * row + 0.36 + 0.24 * (i % 2))) * DRAWN
                self.pen.text(place, part, color, fonts[i], "ls", stroke_width=2 * bold)
                x_at += lengths[i]
        return x_at

    def box(self, x: float, y: float, w: float, h: float, fill: Color | None = None,
            edge: Color | None = None, width: float = 1, round_: float = 0) -> None:
        corners = [x * DRAWN, y * DRAWN, (x + w) * DRAWN - 1, (y + h) * DRAWN - 1]
        self.pen.rounded_rectangle(corners, round_ * DRAWN, fill, edge, round(width * DRAWN))

    def named(self, x: float, y: float, w: float, h: float, words: str, fill: Color = WHITE,
              edge: Color = INK, ink: Color = INK) -> None:
        self.box(x, y, w, h, fill, edge, 1.5, 5)
        self.text(x + w / 2, y + h / 2 - 10 * words.count("\n"), words, 15, ink, "m")

    def line(self, *points: Point, color: Color = INK, width: float = 1.5) -> None:
        places = [(x * DRAWN, y * DRAWN) for x, y in points]
        self.pen.line(places, color, round(width * DRAWN), "curve")

    def arrow(self, *points: Point, color: Color = GREY, width: float = 2) -> None:
        """A line through the points, with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        size = (4 + 2.2 * width) / max(((x - x0) ** 2 + (y - y0) ** 2) ** 0.5, 1e-6)
        dx, dy = size * (x - x0), size * (y - y0)
        self.line(*points[:-1], (x - 0.8 * dx, y - 0.8 * dy), color=color, width=width)
        self.area((x, y), (x - dx - 0.42 * dy, y - dy + 0.42 * dx),
                  (x - dx + 0.42 * dy, y - dy - 0.42 * dx), color=color)

    def area(self, *corners: Point, color: Color) -> None:
        self.pen.polygon([(x * DRAWN, y * DRAWN) for x, y in corners], color)

    def dot(self, x: float, y: float, radius: float, fill: Color, edge: Color) -> None:
        corners = [(v + d) * DRAWN for d in (-radius, radius) for v in (x, y)]
        self.pen.ellipse(corners, fill, edge, 2 * DRAWN)

    def paste(self, picture: Tensor, x: float, y: float, w: float, h: float | None = None,
              smooth: bool = True) -> None:
        image = Image.fromarray(world.to_uint8(picture).permute(1, 2, 0).contiguous().numpy())
        how = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
        size = round(w * DRAWN), round((h or w) * DRAWN)
        self.image.paste(image.resize(size, how), (round(x * DRAWN), round(y * DRAWN)))

    def tokens(self, colors: Tensor, x: float, y: float, w: float, h: float, edge: Color) -> None:
        """Tokens (3, rows, columns), each w wide and h high, in a frame."""
        _, rows, columns = colors.shape
        self.paste(colors, x, y, w * columns, h * rows, smooth=False)
        for i, j in product(range(rows), range(columns)):
            self.box(x + w * j, y + h * i, w + 0.5, h + 0.5, edge=WHITE, width=0.5)
        self.box(x, y, w * columns, h * rows, edge=edge, width=2)

    def numbers(self, shares: Tensor, x: float, y: float, w: float, h: float) -> None:
        """Numbers (rows, columns) between 0 and 1 on violet that deepens with them."""
        for i, j in product(*map(range, shares.shape)):
            share, left, top = shares[i, j].item(), x + w * j, y + h * i
            ink = WHITE if share > 0.65 else INK
            self.box(left, top, w - 1, h - 1, mixed(FACE, 0.06 + 0.86 * max(share, 0) ** 1.2))
            self.text(left + w / 2, top + h / 2, f"{share:.2f}", 14, ink, "m")


def portrait() -> Image.Image:
    """An upright picture, three wide and four high."""
    picture = Image.open(HERE / "examples" / "ada.png").convert("RGB")
    return picture.crop((picture.width // 8, 0, picture.width * 7 // 8, picture.height))


def mean_colors(canvas: Tensor, side: int) -> Tensor:
    """Reference tokens (1, R, 3) of an "encoder" that keeps each cell's mean colour."""
    return encode_reference(torch.nn.AvgPool3d((1, side, side)), canvas[None])


def random_colors(count: int) -> Tensor:                                  # (1, count, 3)
    return torch.randn(1, count, 3, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------ the five ideas
def reference() -> Image.Image:
    """A portrait becomes a canvas, tokens, and the clean end of the sequence."""
    page = Page(568, "The reference joins the sequence: clean tokens behind the noisy ones")
    layout, sigma = Layout(4, 3, 4), 0.7
    L, canvas = 4 * 3 * 4, letterbox(portrait(), height=96, width=128)
    clean = mean_colors(canvas, 32)                                       # (1, R, 3)
    s = torch.tensor([sigma])
    noisy, _ = loss.add_noise(clean.repeat(1, layout.F, 1), random_colors(L), s)   # (1, L, 3)
    tokens, timesteps, _ = append_reference(
        noisy, [(s, L)], layout.video_positions()[None],
        Reference(clean, layout.reference_positions()))                   # (1, S, 3)
    levels = [level.item() for level, count in timesteps for _ in range(count)]  # S numbers
    page.paste(letterbox(portrait(), height=512, width=384), 20, 90, 96, 128)
    page.paste(letterbox(portrait(), height=378, width=504), 214, 91, 168, 126)
    page.box(214, 91, 168, 126, edge=LINE)
    page.tokens(clean[0].T.view(3, 3, 4), 492, 91, 42, 42, REFERENCE)
    for x, words in ((68, "picture"), (298, "canvas, one frame large"), (576, "12 tokens")):
        page.text(x, 72, words, 15, GREY, "m")
    for x, words in ((165, "letterbox"), (437, "VAE"), (732, "append")):
        page.text(x, 138, words, align="m")
    page.arrow((127, 154), (203, 154))
    page.arrow((399, 154), (475, 154))
    page.arrow((670, 154), (794, 154), (794, 250))
    S, kept = tokens.shape[1], drop_reference(tokens, L).shape[1]
    R, step = S - L, 860 / S
    for k in range(0, S, R):
        x, w, level = 20 + k * step, R * step - 3, levels[k]
        middle = x + R * step / 2
        color, name = (VIDEO, f"video frame {k // R}") if k < L else (REFERENCE, "reference")
        page.text(middle, 268, name, 15, color, "m", bold=k >= L)
        page.tokens(tokens[0, k:k + R].T[:, None], x, 284, w / R, 26, color)
        page.box(x, 364 - 40 * level, w, 40 * level + 2, mixed(color, 0.45))
        page.text(middle, 350, f"timestep {level:g}: {'noisy' if level else 'clean'}", align="m")
        page.arrow((middle, 372), (middle, 394))
        if k < kept:
            page.arrow((middle, 434), (middle, 456))
            page.box(x, 464, w, 26, mixed(color, 0.45), color, 2)
    page.named(20, 398, 857, 34, "transformer: every token can look at every other", PALE, LINE)
    page.text(20 + kept * step / 2, 510, f"velocities of the video's {kept} tokens", align="m")
    page.text(20 + (kept + S) / 2 * step, 477, "x", 28, GREY, "m")
    page.text(20 + (kept + S) / 2 * step, 510, f"dropped: the last {S - kept}", align="m")
    page.text(20, 546, "No new weights: the same VAE, the same transformer. Attention fetches the "
              "face.")
    return page.done()


def rope() -> Image.Image:
    """A row for each placement: all tokens, a time step a grid, and what place alone favours."""
    page = Page(626, "Where the reference's tokens lie, and which of them place alone favours")
    places = {"overlap": "on top of\nthe first frame", "time_only": "after the\nlast frame",
              "space_only": "past the first\nframe's corner",
              "tass": "after the last\nframe, past its\ncorner"}
    F, H, W = 5, 3, 4  # the paper's figure
    for k, (name, words) in enumerate(places.items()):
        top, grid = 108 + 115 * k, reference_grid(F, H, W, name)
        frame = min(grid[0, 0].item(), F - 1)  # the video's nearest to the reference
        if name == "tass":
            page.box(6, top - 17, 888, 109, mixed(REFERENCE, 0.1))
        page.text(18, top + 9, name, 17, bold=True)
        page.text(18, top + 31, words, 14, GREY)
        taken = torch.zeros(2, F + 1, 2 * H, 2 * W).bool()                # video, reference
        taken[(0, *video_grid(F, H, W).T)] = taken[(1, *grid.T)] = True
        for t, i, j in product(*map(range, taken.shape[1:])):
            x, y, (video, ref) = 160 + 88 * t + 10 * j, top + 12.5 * i, taken[:, t, i, j].tolist()
            page.box(x, y, 9, 11.5, VIDEO if video else REFERENCE if ref else (228,) * 3)
            if video and ref:
                page.area((x + 8.8, y), (x + 8.8, y + 11.3), (x, y + 11.3), color=REFERENCE)
            if (t, i, j) == (frame, H // 2, W // 2):
                query = x + 4.5, y + 5.75
        page.dot(*query, 5.2, WHITE, INK)
        page.numbers(score_map(Layout(F, H, W, placement=name), frame), 716, top, 42, 25)
        page.box(715 + 42 * (W // 2), top + 25 * (H // 2) - 1, 43, 26, edge=INK, width=2)
    for t in range(F + 1):
        page.text(200 + 88 * t, 64, f"time {t}", 14, GREY, "m")
    page.text(800, 64, "score, if q = k", 14, GREY, "m")
    page.arrow((160, 95), (240, 95), width=1.2)
    page.text(160, 84, "columns", 13, GREY)
    page.arrow((147, 108), (147, 183), width=1.2)
    page.text(140, 172, "rows", 13, GREY, "r")
    for x, color, words in ((20, VIDEO, "video"), (98, REFERENCE, "reference")):
        page.box(x, 562, 16, 16, color)
        page.text(x + 22, 570, words)
    page.dot(222, 570, 6, WHITE, INK)
    page.text(234, 570, "the query, a video token of the nearest frame")
    page.box(578, 561, 28, 18, edge=INK, width=2)
    page.text(614, 570, "the same cell of the reference")
    page.text(20, 601, "With tass the same cell is not ahead. The face is found by content: q and "
              "k are learnt, and eye asks for eye wherever it lies.")
    return page.done()


def augment() -> Image.Image:
    """A row for each family of changes, always applied, and one for all as a training draws."""
    page = Page(568, "In training the reference keeps changing, so copying it does not pay")
    def all_by_chance(images: Tensor, generator: torch.Generator, s: float) -> Tensor:
        return augment_reference(images, generator, AugmentStrength(s, s, s))
    families = (("colour", "light and\ncamera", augment_color),
                ("pose", "tilt and\nperspective", augment_pose),
                ("layout", "size, place,\nground", augment_layout),
                ("all", "each by\nchance", all_by_chance))
    face = letterbox(Image.open(HERE / "examples" / "ada.png"), 228, 228)
    columns = [(0, 0, 126), (0.5, 0, 262), (0.5, 1, 382), (1, 0, 518), (1, 1, 638), (1, 2, 758)]
    for x, words in ((126, "picture"), (262, "half strength"), (518, "full strength")):
        page.text(x, 62, words, 15, GREY)
    for row, (name, told, change) in enumerate(families):
        y = 80 + 120 * row
        page.text(20, y + 28, name, 17, bold=True)
        page.text(20, y + 52, told, 14, GREY)
        for strength, seed, x in columns:
            generator = torch.Generator().manual_seed(seed)
            page.paste(change(face[None], generator, strength)[0], x, y, 114)
            page.box(x, y, 114, 114, edge=LINE)  # white on white needs an edge
    return page.done()


def losses() -> Image.Image:
    """Above: the face's share of each latent token. Below: what a model pays for somebody else."""
    page = Page(806, "A wrong face costs little in the plain loss, so two terms look at the face")
    page.text(20, 62, "1. How much of each latent token is face (pool_face_mask)", 16, bold=True)
    right = torch.tensor([world.ACTIONS.index("moves to the right")])
    poses = world.action_poses(right, 9, torch.Generator().manual_seed(0))
    clip, _, mask = world.render(world.people("val", 1), torch.tensor([[2, 0, 1]]), poses, 128)
    shares = loss.pool_face_mask(mask, time_scale=8, space_scale=32).view(2, 4, 4)
    grey = clip[0].mean(dim=0, keepdim=True) * 0.5 + 0.5                  # (1, 9, 128, 128), pale
    violet = torch.tensor(FACE).view(3, 1, 1, 1) / 127.5 - 1
    tinted = torch.lerp(grey, 0.4 * grey + 0.6 * violet, mask)            # (3, 9, 128, 128)
    for k, frames in enumerate((range(1), range(1, 9))):
        y = 112 + 146 * k
        page.text(20, y + 45, "frames\n1 to 8" if k else "frame 0", 15, GREY)
        for n, t in enumerate(frames):
            page.paste(tinted[:, t], 84 + 71 * n, y + 22, 68)
        page.arrow((90 + 71 * len(frames), y + 56), (732, y + 56))
        page.text(810, y - 14, f"latent frame {k}", 15, GREY, "m")
        page.numbers(shares[k], 742, y, 34, 28)
    page.text(20, 402, "2. What a model pays that takes the person for another", 16, bold=True)
    sigmas = [i / 40 for i in range(41)]
    _loss_chart(page, sigmas, *wrong_person(sigmas))
    return page.done()


@torch.no_grad()
def wrong_person(sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The terms (sigmas, 3) of a model that takes the person for somebody else: L_fm, L_face, L_id.

    Its velocity is off by x0 - other, its clean estimate by sigma times that; tokens are pixels.
    Also returns the estimates, (sigmas, 3, 128, 128).
    """
    setting, poses = torch.tensor([[2, 0, 1]] * 2), torch.tensor([[[0.0, 0, 1, 0, 0, 0]]] * 2)
    video, boxes, mask = world.render(world.people("val", 8)[[1, 3]], setting, poses, 128)
    x0, other = video[:, :, 0].flatten(2).mT.split(1)                     # (1, h*w, 3) each
    net, box, face = load_facenet(TINY / "face.safetensors"), square(boxes[:1, 0]), mask[:1]
    true, yes = net(loss.crop_faces(video[:1, :, 0], box, net.size)), torch.tensor([True])
    noise, terms, estimates = random_colors(x0.shape[1]), [], []
    for s in torch.tensor(sigmas)[:, None]:
        (x_s, v), v_hat = loss.add_noise(x0, noise, s), noise - other
        estimates.append(loss.clean_estimate(x_s, v_hat, s).mT.view(1, 3, 128, 128))
        terms.append(torch.stack([
            loss.flow_matching_loss(v_hat, v), loss.face_weighted_loss(v_hat, v, face.flatten(1)),
            loss.identity_loss(net, loss.crop_faces(estimates[-1], box, net.size), true, yes)]))
    return torch.stack(terms), torch.cat(estimates)


def _loss_chart(page: Page, sigmas: Sequence[float], terms: Tensor, estimates: Tensor) -> None:
    left, base, wide, high = 84, 668, 560, 240  # the chart's lower left corner and size
    top, end = 1.3 * terms.max().item(), left + wide * loss.IDENTITY_MAX_SIGMA
    page.box(left, base - high, end - left, high, mixed(REFERENCE, 0.16))
    page.line((end, base), (end, base - high), color=REFERENCE, width=2)
    page.text((left + end) / 2, base - high + 16, "L_id counts here", 16, REFERENCE, "m", bold=True)
    page.text(end + 10, base - high + 16, f"above sigma {loss.IDENTITY_MAX_SIGMA:g} it is off: a "
              "real\nmodel's estimate is a blur there", 15, REFERENCE)
    page.line((left, base - high), (left, base), (left + wide, base))
    curves = (("L_fm: all tokens", VIDEO), ("L_face: the face's tokens", FACE),
              ("L_id: 1 - cosine", REFERENCE))
    for values, (words, color) in zip(terms.T.tolist(), curves, strict=True):
        places = [(left + wide * s, base - high * y / top)
                  for s, y in zip(sigmas, values, strict=True)]
        page.line(*places, color=mixed(color, 0.35), width=4)
        page.line(*(p for p in places if p[0] <= end or color != REFERENCE), color=color, width=4)
        page.text(left + wide + 12, places[-1][1], words, 16, color, bold=True)
    for s in (0, 0.25, 0.5, 0.75, 1):
        x = left + wide * s
        page.line((x, base), (x, base + 5))
        page.text(x, base + 18, f"{s:g}", align="m")
        page.paste(estimates[round(s * (len(sigmas) - 1))], x - 46, base + 34, 92)
    for y in (0, 0.5, 1):
        page.text(left - 10, base - high * y / top, f"{y:g}", align="r")
    page.text(left + wide + 60, base + 18, "sigma: 0 data, 1 noise\n\nthe clean estimate:\n"
              "at 0 the true person,\nat 1 somebody else")


# four predictions as points: prompt and face together do more than the sum of what each does alone
STREAMS = {"v_0": (0.0, 0.0), "v_T": (1.0, 0.1), "v_R": (-0.3, 1.5), "v_RT": (1.3, 1.7)}
NAMES = {NULL: "v_0", TEXT: "v_T", REF: "v_R", BOTH: "v_RT"}
COLORS = PROMPT, REFERENCE  # of s_T, of s_R
WALKS = {  # order: the scales where its sum starts; then which scale moves along which difference
    "text_first": ((0, 0), ((0, "v_0", "v_T"), (1, "v_T", "v_RT")),
                   ("v_0", " + s_T (v_T - v_0)", " + s_R (v_RT - v_T)")),
    "reference_first": ((0, 0), ((1, "v_0", "v_R"), (0, "v_R", "v_RT")),
                        ("v_0", " + s_R (v_R - v_0)", " + s_T (v_RT - v_R)")),
    "two_deltas": ((1, 1), ((0, "v_R", "v_RT"), (1, "v_T", "v_RT")),
                   ("v_RT", " + (s_T - 1)(v_RT - v_R)", " + (s_R - 1)(v_RT - v_T)")),
}


def guidance(scales: tuple[float, float] = (3, 2)) -> Image.Image:
    """A panel for each order: the streams that it runs, their differences, and the sum's walk."""
    page = Page(474, "One scale for the prompt, one for the face: three ways to sum three streams")
    for panel, order in enumerate(ORDERS):
        left, (_, steps, (first, *others)) = 20 + 298 * panel, WALKS[order]
        page.text(left, 66, order, 17, bold=True)
        end = page.text(left, 92, first, 14.5)
        for (scale, _, _), words in zip(steps, others, strict=True):
            end = page.text(end, 92, words, 14.5, COLORS[scale])
        _walk(page, order, scales, left + 22)
    for x, color, width, words in ((20, PROMPT, 1.8, "what the prompt changes"),
                                   (318, REFERENCE, 1.8, "what the face changes"),
                                   (560, LINE, 5, "times its scale (two_deltas: less 1)")):
        page.arrow((x, 416), (x + 38, 416), color=color, width=width)
        page.text(x + 46, 416, words)
    page.text(774, 448, "guided velocity")
    page.dot(760, 448, 7, INK, INK)
    page.text(42, 448, "a stream, one call of the model:   v_0 sees neither,   v_T the prompt,   "
              "v_R the face,   v_RT both")
    page.dot(27, 448, 5, WHITE, GREY)
    return page.done()


def _walk(page: Page, order: str, scales: tuple[float, float], left: float) -> None:
    """Streams, thin differences between them, and the thick way to the guided sum."""
    start, steps, _ = WALKS[order]
    corner = tuple(scales[k] if k == steps[0][0] else start[k] for k in (0, 1))
    points = {name: torch.tensor([left + 50 * x, 358 - 60 * y]) for name, (x, y) in STREAMS.items()}
    stops = [guided_sum(order, *now, *points.values()).tolist() for now in (start, corner, scales)]
    for (scale, a, b), tail, head in zip(steps, stops, stops[1:], strict=False):
        page.arrow(tail, head, color=mixed(COLORS[scale], 0.45), width=5)
        page.arrow(points[a].tolist(), points[b].tolist(), color=COLORS[scale], width=1.8)
    beside = {NULL: (0, 21), TEXT: (4, 21), REF: (-20, 0), BOTH: (0, -20)}
    for stream in stream_weights(Guidance(*scales, order)):
        (x, y), (right, down) = points[NAMES[stream]].tolist(), beside[stream]
        page.dot(x, y, 5, WHITE, GREY)
        page.text(x + right, y + down, NAMES[stream], 16, align="m")
    x, y = stops[-1]
    page.dot(x, y, 7, INK, INK)
    page.text(x + 7, y - 20, f"s_T = {scales[0]}, s_R = {scales[1]}", align="r")


# ------------------------------------------------------------ with the bundled weights
@cache
def models() -> evaluate.Models:
    return evaluate.Models(TINY / "model.safetensors", TINY / "gemma")


def made(captions: list[str], references: Tensor, **scales: float) -> Tensor:
    """Clips (n, 3, F, h, w) of references (n, 3, h, w), as study/evaluate.py makes them.

    The one place where a picture meets the sampler. scales: text_scale, ref_scale.
    """
    args, known = evaluate.parse_arguments([]), models().config["inference"] | scales
    for name in ("text_scale", "ref_scale", "rescale", "guide_range", "guide_every"):
        setattr(args, name, known[name])
    return evaluate.generate(models(), captions, references, args, "own reference")


@cache
def first_people(count: int) -> tuple[Tensor, Tensor, list[str]]:
    """Of the first people of the evaluation: references, clips, and the prompts' two words."""
    data = evaluate.test_set(256, 1, 64, 9)
    words = []
    for (scene, _, _), action in zip(data["setting"][:count], data["action"], strict=False):
        place = re.sub(r"^(in|at) ((an?|the) )?", "", world.SCENE_NAMES[scene])
        words.append(f"{place}, {world.ACTIONS[action].replace(' to the', '')}")
    references = data["references"][:count]
    return references, made(data["captions"][:count], references), words


def people(count: int = 24) -> Image.Image:
    """The first test people: the reference, and three frames of the clip under its two words."""
    references, clips, words = first_people(count)
    page = Page(58 + (count + 2) // 3 * 96, f"The first {count} test people, unpicked: the "
                "reference, then three frames of the clip")
    for n in range(count):
        x, y = 20 + 298 * (n % 3), 62 + 96 * (n // 3)
        page.text(x + 77, y + 4, words[n])
        page.box(x - 3, y + 15, 70, 70, edge=REFERENCE, width=2)
        for k, picture in enumerate((references[n], *clips[n, :, ::4].unbind(1))):
            page.paste(picture, x + 66 * k + 11 * (k > 0), y + 18, 64, smooth=False)
    return page.done()


def webp(count: int = 12) -> list[Image.Image]:
    """The frames of an animation: references beside their moving clips, four people a row."""
    references, clips, words = first_people(24)
    frames = []
    for t in range(clips.shape[2]):
        page = Page(8 + (count + 3) // 4 * 128)
        for n in range(count):
            x, y = 10 + 227 * (n % 4), 4 + 128 * (n // 4)
            page.text(x, y + 10, words[n])
            page.paste(references[n], x, y + 22, 98)
            page.box(x, y + 22, 98, 98, edge=REFERENCE, width=3)
            page.paste(clips[n, :, t], x + 102, y + 22, 98)
        frames.append(page.done())
    return frames


def scales(texts: Point = (1, 1.5, 2, 3, 5), refs: Point = (0, 1, 2.5, 4)) -> Image.Image:
    """One person, one prompt: a strip of three frames for each pair of guidance scales."""
    page = Page(208 + 74 * len(texts), "The reference scale brings the face, a large text scale "
                "takes some of it away")
    prompt = "a person in a red shirt laughs in a park, in daylight"
    canvas = letterbox(Image.open(HERE / "examples" / "ada.png"), 64, 64)
    known, below = models().config["inference"], 172 + 74 * len(texts)
    page.paste(canvas, 20, 52, 84)
    page.box(20, 52, 84, 84, edge=REFERENCE, width=3)
    page.text(118, 74, f"prompt: {prompt}", 16)
    page.text(489, 112, "reference scale s_R", 16, REFERENCE, "m", bold=True)
    page.text(20, below - 216, "text\nscale\ns_T", 16, PROMPT, bold=True)
    for j, ref in enumerate(refs):
        x, told = 92 + 200 * j, {0: ": no reference", 1: ": not amplified"}.get(ref, "")
        page.text(x + 97, 138, f"{ref:g}{told}", 16, align="m")
        for i, text in enumerate(texts):
            y = 156 + 74 * i
            clips = made([prompt], canvas[None], text_scale=text, ref_scale=ref)
            for k, picture in enumerate(clips[0, :, ::4].unbind(1)):
                page.paste(picture, x + 65 * k, y, 64, smooth=False)
            if (text, ref) == (known["text_scale"], known["ref_scale"]):
                page.box(x - 4, y - 4, 202, 72, edge=INK, width=3)
            page.text(80, y + 32, f"{text:g}", 16, align="r")
    page.box(92, below, 26, 16, edge=INK, width=3)
    page.text(126, below + 8, "the scales that the bundled checkpoint brings with it")
    return page.done()


def pipeline() -> Image.Image:
    """From a face and a prompt to a video, in three parts from top to bottom."""
    prompt = "a person in a red shirt turns left in a park, in daylight"
    page, canvas, (F, H, W) = Page(738, "1  Encode, once"), letterbox(portrait(), 64, 64), (3, 8, 8)
    page.box(8, 186, 884, 356, PALE)
    page.text(20, 212, "2  Denoise, step by step", 19, bold=True)
    page.text(20, 572, "3  Decode, once", 19, bold=True)
    _encode(page, prompt, canvas)
    noise = 0.6 * random_colors(F * H * W)[0].T.view(3, F, H, W)
    frames = [([t, 0, 0], noise[:, t], VIDEO) for t in range(F)]
    place, clean = reference_grid(F, H, W)[0].tolist(), mean_colors(canvas, 8)[0].T.view(3, H, W)
    frames.append((place, clean, REFERENCE))
    for (t, row, column), colors, edge in reversed(frames):  # time goes to the back
        page.tokens(colors, 36 + 11 * column + 15 * t, 278 + 11 * row - 11 * t, 11, 11, edge)
    page.text(36, 243, "noisy video tokens", 15, VIDEO, bold=True)
    page.text(258, 436, "TASS: after the last frame,\npast its corner", 15, REFERENCE, "r")
    page.arrow((262, 398), (280, 398))  # to the stream that sees the face
    _three_calls(page)
    page.arrow((782, 520), (782, 634))
    page.text(772, 562, "after the last step", align="r")
    page.named(722, 640, 120, 48, "VAE\ndecoder")
    page.arrow((716, 664), (672, 664))
    for k, picture in enumerate(made([prompt], canvas[None])[0, :, ::2].unbind(1)):
        page.paste(picture, 20 + 129 * k, 600, 126)
    return page.done()


def _encode(page: Page, prompt: str, canvas: Tensor) -> None:
    """The face's way to tokens, the prompt's way to its context, and where both go on."""
    page.paste(letterbox(portrait(), height=368, width=276), 20, 50, 69, 92)
    page.paste(letterbox(portrait(), 368, 368), 126, 50, 92)
    page.box(126, 50, 92, 92, edge=LINE)
    page.named(250, 72, 76, 48, "VAE\nencoder")
    page.tokens(mean_colors(canvas, 8)[0].T.view(3, 8, 8), 358, 50, 11.5, 11.5, REFERENCE)
    page.text(556, 76, "\n".join(wrap(prompt, 21)), align="m")
    page.named(666, 72, 86, 48, "Gemma")
    for n in range(9):
        page.box(788 + 9 * n, 64, 7, 64, mixed(PROMPT, 0.35 + 0.65 * (n * 5 % 9) / 9))
    for x, end in ((94, 121), (223, 245), (331, 353), (636, 660), (757, 780)):
        page.arrow((x, 96), (end, 96))
    for x, name, color in ((54, "face", REFERENCE), (172, "letterbox", REFERENCE),
                           (404, "clean tokens", REFERENCE), (556, "prompt", PROMPT),
                           (826, "context", PROMPT)):
        page.text(x, 158, name, 15, color, "m", bold=True)
    page.arrow((404, 172), (404, 228), (240, 228), (240, 328), color=REFERENCE)
    page.arrow((826, 172), (826, 228), (548, 228), (548, 250), color=PROMPT)


def _three_calls(page: Page) -> None:
    """Three calls of the transformer, their sum, and the step that leads back to the tokens."""
    page.named(492, 254, 112, 196, "LTX-2.3\nvideo\ntransformer")
    page.named(678, 254, 208, 196, "")
    _, steps, sums = WALKS["text_first"]
    inks = INK, *(COLORS[scale] for scale, _, _ in steps)
    for row, (stream, words, ink) in enumerate(zip((NULL, TEXT, BOTH), sums, inks, strict=True)):
        y, x = 286 + 56 * row, 284
        for name, without, color, w, seen in (("video", "", VIDEO, 54, True),
                                              ("prompt", "empty", PROMPT, 64, stream[0]),
                                              ("face", "none", REFERENCE, 48, stream[1])):
            chip = (name, color, color, WHITE) if seen else (without, PALE, LINE, GREY)
            page.named(x, y - 14, w, 28, *chip)
            x += w + 5
        page.arrow((x + 1, y), (488, y))
        page.arrow((608, y), (630, y))
        page.text(650, y, NAMES[stream], 17, align="m")
        page.text(694, y, words.strip(), 17, ink)
    page.text(694, 434, "= guided velocity")
    page.arrow((782, 454), (782, 476))
    page.named(702, 480, 160, 36, "one Euler step")
    page.arrow((698, 498), (56, 498), (56, 372))
    page.text(300, 516, "a little less noise, again")


DRAWINGS = (pipeline, reference, rope, augment, losses, guidance, people, scales)
FIGURES: dict[str, tuple[Callable[[], Image.Image | list[Image.Image]], str]] = {
    "webp": (webp, "examples/people.webp"),
    **{draw.__name__: (draw, f"examples/{draw.__name__}.png") for draw in DRAWINGS},
}


def save(picture: Image.Image | list[Image.Image], path: Path) -> None:
    """A PNG, of 256 colours where that does not show; or frames as a WebP that repeats for ever."""
    if isinstance(picture, list):
        first, *others = picture
        pauses = [125] * len(others) + [800]  # milliseconds: the clips have 8 frames a second
        atomic_write(path, lambda p: first.save(p, save_all=True, append_images=others, loop=0,
                                                duration=pauses, quality=80))
        return
    few = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    error = ImageStat.Stat(ImageChops.difference(picture, few.convert("RGB"))).mean
    kept = few if max(error) < 0.3 else picture  # of 255: looked at, it does not show
    atomic_write(path, lambda p: kept.save(p, optimize=True))


def main(words: list[str] | None = None) -> int:
    parser = Parser("study.figures", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    names = parser.parse_args(words).names or list(FIGURES)

    def draw() -> None:
        if unknown := [name for name in names if name not in FIGURES]:
            raise ValueError(f"expected some of {', '.join(FIGURES)}, got {unknown[0]}; see --help")
        for name in names:
            started, (figure, path) = time.time(), FIGURES[name]
            save(figure(), HERE / path)
            print(f"{path}: {(HERE / path).stat().st_size:,} bytes, {time.time() - started:.0f} s")
    return command("study.figures", draw)


if __name__ == "__main__":
    sys.exit(main())
