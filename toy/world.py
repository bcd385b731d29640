"""A procedural world of faces: the data set that ships as code.

The idea. Nobody can hand a student 200,000 people's videos, and the weights of LTX-2.3 do not fit a laptop. So we draw
people ourselves: a person is a row of numbers, and clips of that person doing something somewhere are rendered from it.
Everything that a real data set only guesses is then known exactly: who it is, where the face is, what the caption means.

* A **person** is a row of `TRAITS` (uniform numbers in [0, 1]): skin, face shape, hair, eyes, brows, nose, mouth, beard,
  glasses. Identity is *never* in the caption; it can only come from the reference picture.
* A **setting** is (scene, light, shirt); an **action** moves the head. Both are what the caption talks about.
* A **reference** is the same person at another moment: in half of the cases in the clip's own setting, in the other half
  in another one. So copying the reference's pixels pays in training, unless the method stops it: the very failure that
  ST-DRC is about (paper: reference positions and augmentation exist to prevent copy-paste).

Left and right are **image** directions: "turns left" moves the nose towards the left edge of the picture.

Conventions. Picture coordinates run from -1 to 1, x rightwards, y downwards; the head's half-height is about 0.6.
Videos are (B, 3, F, h, w) in [-1, 1]; boxes are (x0, y0, x1, y1) in pixels; masks are 1 on the face, 0 elsewhere.
Everything runs on the device of its inputs, so a GPU can render while it trains.

Read next: frames.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TRAITS = ["skin", "skin_hue", "hair_style", "hair_color", "face_width", "jaw", "eye_size", "eye_gap", "eye_color",
          "brow_size", "brow_angle", "brow_height", "nose_width", "nose_length", "mouth_width", "lip_size", "lip_color",
          "beard", "glasses", "glasses_color", "eye_tilt", "face_height"]
LOOK_ALIKE_TRAITS = 4  # a look-alike shares the first four: skin and hair

SKIN = [(0.97, 0.82, 0.71), (0.90, 0.70, 0.55), (0.78, 0.56, 0.40), (0.60, 0.40, 0.27), (0.42, 0.27, 0.18)]
HAIR = [(0.10, 0.08, 0.08), (0.30, 0.18, 0.10), (0.55, 0.33, 0.15), (0.88, 0.74, 0.38), (0.72, 0.28, 0.12),
        (0.66, 0.66, 0.68)]
IRIS = [(0.25, 0.15, 0.08), (0.15, 0.40, 0.75), (0.15, 0.50, 0.25), (0.45, 0.48, 0.52)]
FRAMES = [(0.06, 0.06, 0.08), (0.65, 0.10, 0.12), (0.12, 0.20, 0.60)]
HAIR_STYLES = ["bald", "short", "fringe", "side", "long", "afro", "bun"]

SCENES = {"in a park": 0, "at the beach": 1, "in an office": 2, "in a red room": 3, "in the snow": 4, "at night": 5}
LIGHTS = {"in daylight": (1.0, 1.0, 1.0), "in warm light": (1.08, 0.98, 0.82), "in cool light": (0.84, 0.97, 1.10),
          "in dim light": (0.76, 0.76, 0.78), "in pink light": (1.08, 0.84, 0.98)}
SHIRTS = {"red": (0.82, 0.14, 0.14), "blue": (0.14, 0.26, 0.80), "green": (0.12, 0.58, 0.24),
          "yellow": (0.94, 0.82, 0.16), "white": (0.94, 0.94, 0.94), "black": (0.10, 0.10, 0.12)}
ACTIONS = ["turns left", "turns right", "nods", "laughs", "moves to the left", "moves to the right", "comes closer",
           "stays still"]
SCENE_NAMES, LIGHT_NAMES, SHIRT_NAMES = list(SCENES), list(LIGHTS), list(SHIRTS)
# (upper colour, lower colour, horizon height, blob colour, blob x, blob y, blob radius)
BACKGROUNDS = [((0.62, 0.80, 0.95), (0.36, 0.66, 0.28), 0.25, (0.16, 0.42, 0.16), -0.95, -0.15, 0.50),
               ((0.45, 0.75, 0.98), (0.92, 0.82, 0.56), 0.40, (1.00, 0.93, 0.40), 0.85, -0.75, 0.24),
               ((0.74, 0.74, 0.70), (0.46, 0.36, 0.28), 0.50, (0.35, 0.45, 0.55), 0.95, -0.30, 0.42),
               ((0.66, 0.20, 0.20), (0.40, 0.12, 0.14), 0.55, (0.92, 0.72, 0.34), -0.90, -0.60, 0.26),
               ((0.80, 0.87, 0.94), (0.97, 0.98, 1.00), 0.30, (0.20, 0.38, 0.34), 0.98, 0.05, 0.44),
               ((0.08, 0.09, 0.26), (0.16, 0.15, 0.20), 0.45, (0.95, 0.93, 0.78), -0.78, -0.76, 0.18)]
TEMPLATES = ["a person in a {shirt} shirt {action} {scene}, {light}",
             "{scene} {light}, a person wearing a {shirt} shirt {action}",
             "a person {action} {scene}, {light}, wearing a {shirt} shirt",
             "{light}, someone in a {shirt} shirt {action} {scene}"]
SPLIT_SEEDS = {"train": 101, "val": 202, "test": 303}  # the recognisers draw random people of their own, see pretrain.py
EDGE = 0.045  # edges are blended over 1.4 pixels of a 64-pixel frame: hard edges cost codec bits and teach nothing


# ---------------------------------------------------------------------------------------------- people, settings, poses
def people(split: str, count: int) -> Tensor:
    """The first `count` people of a split, (count, len(TRAITS)) in [0, 1]. Splits never share a person."""
    g = torch.Generator().manual_seed(SPLIT_SEEDS[split])
    return torch.rand(count, len(TRAITS), generator=g)


def look_alikes(person: Tensor, generator: torch.Generator) -> Tensor:
    """Same skin and hair, every other trait redrawn: (B, T) -> (B, T). A good recogniser must tell the two apart."""
    other = torch.rand(person.shape, generator=generator, device=generator.device).to(person.device)
    other[:, :LOOK_ALIKE_TRAITS] = person[:, :LOOK_ALIKE_TRAITS]
    return other


def draw_settings(count: int, generator: torch.Generator) -> Tensor:
    """Random (scene, light, shirt) indices, (count, 3) int64 on the generator's device."""
    sizes = (len(SCENES), len(LIGHTS), len(SHIRTS))
    return torch.stack([torch.randint(n, (count,), generator=generator, device=generator.device) for n in sizes], dim=1)


def draw_actions(count: int, generator: torch.Generator) -> Tensor:
    """Random action indices, (count,) int64."""
    return torch.randint(len(ACTIONS), (count,), generator=generator, device=generator.device)


def caption(setting: Tensor, action: int, template: int = 0) -> str:
    """Caption of one clip: setting (3,), action index, template index -> text. Nothing in it tells who the person is."""
    scene, light, shirt = (int(i) for i in setting)
    return TEMPLATES[template].format(scene=SCENE_NAMES[scene], light=LIGHT_NAMES[light], shirt=SHIRT_NAMES[shirt],
                                      action=ACTIONS[action])


def all_captions() -> list[str]:
    """Every caption of the grammar: it is small enough to list, and the tiny tokenizer is trained on this list."""
    grid = [(s, li, sh) for s in range(len(SCENES)) for li in range(len(LIGHTS)) for sh in range(len(SHIRTS))]
    return [caption(torch.tensor(g), a, t) for g in grid for a in range(len(ACTIONS)) for t in range(len(TEMPLATES))]


def still_poses(count: int, generator: torch.Generator) -> Tensor:
    """Random resting poses, (count, 6): x, y, scale, yaw, pitch, mouth opening. Used for references and clip starts."""
    u = torch.rand(count, 6, generator=generator, device=generator.device) * 2 - 1
    spread = torch.tensor([0.10, 0.04, 0.05, 0.22, 0.15, 0.0], device=u.device)
    return u * spread + torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], device=u.device)


def action_poses(actions: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Poses over time: actions (B,) -> (B, F, 6). Motion is smooth, and at most a quarter of the frame."""
    start = still_poses(len(actions), generator)[:, None].repeat(1, frames, 1)            # (B, F, 6)
    t = torch.linspace(0, 1, frames, device=actions.device)[None]                         # (1, F)
    ease = t * t * (3 - 2 * t)
    pick = {name: (actions == i).float()[:, None] for i, name in enumerate(ACTIONS)}      # each (B, 1)
    x, y, scale, yaw, pitch, mouth = start.unbind(dim=2)                                  # each (B, F)
    side = pick["moves to the right"] - pick["moves to the left"]
    x = x * (1 - 0.5 * side.abs()) + side * (0.5 * ease - 0.25)
    yaw = yaw * (1 - 0.6 * ease * (pick["turns left"] + pick["turns right"]))
    yaw = yaw + 0.55 * ease * (pick["turns right"] - pick["turns left"])
    pitch = pitch + pick["nods"] * 0.9 * torch.sin(2 * torch.pi * t)
    mouth = mouth + pick["laughs"] * torch.sin(torch.pi * (0.15 + 0.85 * t)).clamp_min(0)
    y = y - pick["laughs"] * 0.03 * torch.sin(4 * torch.pi * t)
    scale = scale + pick["comes closer"] * (0.32 * ease - 0.20)
    return torch.stack([x, y, scale, yaw, pitch, mouth], dim=2)


# ------------------------------------------------------------------------------------------------------------ rendering
def pick_color(table: list, u: Tensor) -> Tensor:
    """Palette lookup: u (N,) in [0, 1] -> one of the colours, (N, 3)."""
    palette = torch.tensor(table, device=u.device)
    return palette[(u * len(table)).long().clamp(0, len(table) - 1)]


def cover(distance: Tensor) -> Tensor:
    """Signed distance (negative inside) -> coverage in [0, 1], with a soft edge."""
    return (0.5 - distance / EDGE).clamp(0, 1)


def ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Approximate signed distance to an ellipse of half-axes a, b around the origin."""
    k1 = torch.sqrt((x / a).square() + (y / b).square() + 1e-8)
    k2 = torch.sqrt((x / a**2).square() + (y / b**2).square() + 1e-8)
    return k1 * (k1 - 1) / k2


def box(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float, round_: float = 0.02) -> Tensor:
    """Approximate signed distance to a rounded box of half-sides a, b around the origin."""
    return torch.maximum(x.abs() - a, y.abs() - b) - round_


class Canvas:
    """N pictures that are painted on in layers, back to front. `x`, `y`: pixel centres, (1, h, w) in [-1, 1]."""

    def __init__(self, count: int, size: int, device: torch.device):
        line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
        self.y, self.x = line.view(1, size, 1), line.view(1, 1, size)
        self.rgb = torch.zeros(count, 3, size, size, device=device)

    def paint(self, alpha: Tensor, color: Tensor) -> None:
        """alpha (N, h, w) in [0, 1], colour (N, 3)."""
        self.rgb += alpha[:, None] * (color[:, :, None, None] - self.rgb)


def paint_background(c: Canvas, scene: Tensor) -> None:
    """Two flat areas and one blob per scene; scene (N,) int64."""
    table = torch.tensor([[*up, *low, h, *blob, bx, by, r] for up, low, h, blob, bx, by, r in BACKGROUNDS],
                         device=c.rgb.device)[scene]                                      # (N, 13)
    def at(i):
        return table[:, i, None, None]
    c.rgb = c.rgb + table[:, :3, None, None]
    c.paint(cover(at(6) - c.y).expand(-1, -1, c.x.shape[2]), table[:, 3:6])
    c.paint(cover(torch.sqrt((c.x - at(10)).square() + (c.y - at(11)).square()) - at(12)), table[:, 7:10])


def paint_person(c: Canvas, u: Tensor, shirt: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Paint N people: traits u (N, T), shirt index (N,), pose (N, 6). Returns face mask (N, h, w) and box (N, 4)."""
    v = {name: u[:, i, None, None] for i, name in enumerate(TRAITS)}                      # each (N, 1, 1)
    flat = {name: u[:, i] for i, name in enumerate(TRAITS)}                               # each (N,)
    px, py, scale, yaw, pitch, mouth = (p[:, None, None] for p in pose.unbind(dim=1))
    a, b = (0.42 + 0.09 * v["face_width"]) * scale, (0.56 + 0.07 * v["face_height"]) * scale
    x, y = c.x - px, c.y - py + 0.03                                                      # (N, h, w) head coordinates
    tone = torch.tensor(SKIN, device=u.device)
    position = flat["skin"] * (len(SKIN) - 1)
    low = position.long().clamp(max=len(SKIN) - 2)
    skin = torch.lerp(tone[low], tone[low + 1], (position - low)[:, None])                # skin tone is continuous
    skin = skin * (1 + (flat["skin_hue"][:, None] - 0.5) * torch.tensor([0.06, -0.06, -0.10], device=u.device))
    hair = pick_color(HAIR, flat["hair_color"])
    style = (flat["hair_style"] * len(HAIR_STYLES)).long()[:, None, None]
    is_style = {name: (style == i).float() for i, name in enumerate(HAIR_STYLES)}

    # behind the head: long hair, afro, bun
    back = is_style["long"] * cover(box(x, y - 0.18 * scale, a + 0.06, b * 0.85, 0.10))
    back = torch.maximum(back, is_style["afro"] * cover(ellipse(x, y + 0.22 * scale, a + 0.20, b * 0.80)))
    back = torch.maximum(back, is_style["bun"] * cover(ellipse(x, y + b + 0.05, 0.22 * scale, 0.20 * scale)))
    c.paint(back, hair)
    # neck and shirt follow the head sideways only
    c.paint(cover(box(x, y - 0.75 * scale, 0.19 * scale, 0.30 * scale)), skin * 0.86)
    c.paint(cover(ellipse(x, c.y - 1.22, 0.86 * scale.clamp(0.9, 1.2), 0.50)), pick_color_index(SHIRTS, shirt))
    for side in (-1.0, 1.0):  # ears slide with the turn of the head
        c.paint(cover(ellipse(x - side * (a + 0.01) + 0.10 * yaw, y - 0.02 - 0.05 * pitch, 0.075 * scale, 0.12 * scale)),
                skin * 0.90)
    # face: an ellipse whose lower half narrows with the jaw
    narrow = 1 - (0.32 * v["jaw"] - 0.08) * (y / b).clamp(0, 1)
    face = cover(ellipse(x / narrow, y, a, b))
    c.paint(face, skin)
    paint_features(c, v, flat, skin, hair, face, (x, y, a, b, scale, yaw, pitch, mouth))
    # hair in front: everything above a hairline, a little outside the face
    cap = cover(ellipse(x, y + 0.03, a + 0.045, b + 0.06))
    turn = x / a - 0.5 * yaw
    line = -0.62 + 0.22 * is_style["fringe"] + is_style["side"] * 0.28 * turn + 0.25 * is_style["short"] * turn.square() \
        + 0.34 * (is_style["long"] + is_style["bun"]) * turn.square() + 0.06 * is_style["afro"]
    grown = cap * (1 - is_style["bald"]) * cover(y - b * (line + 0.10 * pitch))
    c.paint(grown, hair)
    bounds = torch.stack([px - 1.1 * a, py - 0.03 - 1.1 * b, px + 1.1 * a, py - 0.03 + 1.1 * b], dim=1).flatten(1)
    return face, (bounds + 1) / 2 * c.rgb.shape[-1]


def pick_color_index(table: dict, index: Tensor) -> Tensor:
    """Colour of a named table by index: (N,) int64 -> (N, 3)."""
    return torch.tensor(list(table.values()), device=index.device)[index]


def paint_features(c: Canvas, v: dict, flat: dict, skin: Tensor, hair: Tensor, face: Tensor, geometry: tuple) -> None:
    """Beard, mouth, nose, eyes, brows and glasses. A feature at longitude phi of the head moves to sin(phi + yaw)."""
    x, y, a, b, scale, yaw, pitch, mouth = geometry
    n = len(skin)
    y = y - 0.16 * b * pitch
    mid = a * torch.sin(yaw) * 0.95                                                       # where the face looks
    xm = x - mid
    # beard: 0-0.5 none, then moustache, goatee, full
    kind = flat["beard"][:, None, None]
    moustache = cover(ellipse(xm, y - 0.335 * b, 0.36 * a, 0.075 * b)) * ((kind > 0.5) & (kind <= 0.66))
    goatee = cover(ellipse(xm * 1.0, y - 0.74 * b, 0.34 * a, 0.30 * b)) * ((kind > 0.66) & (kind <= 0.82))
    full = face * cover(0.34 * b - y - 0.10 * b * (xm / a).square()) * (kind > 0.82)
    c.paint((moustache + goatee + full).clamp(0, 1) * face, hair * 0.85 + 0.02)
    # mouth: lips, then the dark opening, then teeth
    width, lip = (0.24 + 0.22 * v["mouth_width"]) * a, (0.035 + 0.05 * v["lip_size"]) * scale
    lips = skin * torch.tensor([0.90, 0.55, 0.55], device=skin.device) * (1.0 - 0.15 * flat["lip_color"][:, None])
    ym = y - 0.52 * b - 0.03 * mouth
    c.paint(cover(ellipse(xm, ym, width * (1 + 0.20 * mouth), lip + 0.11 * scale * mouth)), lips)
    c.paint(cover(ellipse(xm, ym, width * (0.95 + 0.1 * mouth), 0.012 + 0.10 * scale * mouth)) * (0.45 + 0.55 * mouth),
            torch.full((n, 3), 0.12, device=skin.device))
    c.paint(cover(ellipse(xm, ym + 0.05 * scale, width * 0.7, 0.045 * scale)) * mouth, torch.full((n, 3), 0.95,
                                                                                                   device=skin.device))
    # nose: a darker wedge
    nose_w, nose_l = (0.10 + 0.12 * v["nose_width"]) * a, (0.12 + 0.12 * v["nose_length"]) * b
    c.paint(cover(ellipse(xm - 0.10 * a * torch.sin(yaw), y - 0.16 * b, nose_w, nose_l)) * 0.9, skin * 0.78)
    # eyes
    size = (0.15 + 0.06 * v["eye_size"]) * scale
    phi = 0.40 + 0.14 * v["eye_gap"]
    iris, frame = pick_color(IRIS, flat["eye_color"]), pick_color(FRAMES, flat["glasses_color"])
    white, black = torch.full((n, 3), 0.97, device=skin.device), torch.full((n, 3), 0.04, device=skin.device)
    glasses = flat["glasses"][:, None, None]
    round_, square = ((glasses > 0.55) & (glasses <= 0.78)).float(), (glasses > 0.78).float()
    for side in (-1.0, 1.0):
        angle = side * phi + yaw
        squash = (torch.cos(angle) / torch.cos(phi)).clamp(0.35, 1.2)
        ex, ey = x - a * torch.sin(angle), y + 0.14 * b
        slope = side * (v["eye_tilt"] - 0.5) * 0.5
        open_ = size * 0.62 * (1 - 0.55 * mouth)
        lid = cover(ellipse(ex, ey + slope * ex, size * squash, open_))
        c.paint(lid, white)
        c.paint(lid * cover(ellipse(ex - 0.02 * yaw, ey, size * 0.52 * squash, size * 0.52)), iris)
        c.paint(lid * cover(ellipse(ex - 0.02 * yaw, ey, size * 0.22 * squash, size * 0.22)), black)
        brow_y = ey + size + (0.02 + 0.07 * v["brow_height"]) * scale
        tilt = side * (v["brow_angle"] - 0.5) * 0.7
        c.paint(cover(box(ex, brow_y - tilt * ex, size * 1.05 * squash, (0.004 + 0.035 * v["brow_size"]) * scale)),
                hair * 0.7)
        radius = 0.225 * scale
        ring = round_ * cover(ellipse(ex, ey, radius * squash, radius).abs() - 0.022)
        ring = torch.maximum(ring, square * cover(box(ex, ey, (radius - 0.01) * squash, radius * 0.72).abs() - 0.022))
        c.paint(ring, frame)
    bridge = cover(box(xm, y + 0.16 * b, (a * torch.sin(phi) - 0.2 * scale).clamp_min(0.02), 0.006, 0.012))
    c.paint(bridge * (round_ + square), frame)


def render(person: Tensor, setting: Tensor, poses: Tensor, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Render clips.

    person (B, T) traits, setting (B, 3) indices, poses (B, F, 6) -> video (B, 3, F, size, size) in [-1, 1], face boxes
    (B, F, 4) in pixels, face masks (B, F, size, size) in [0, 1]. Any device.
    """
    B, F, _ = poses.shape
    def per_frame(t):
        return t[:, None].expand(B, F, *t.shape[1:]).flatten(0, 1)
    scene, light, shirt = per_frame(setting).unbind(dim=1)
    c = Canvas(B * F, size, person.device)
    paint_background(c, scene)
    mask, boxes = paint_person(c, per_frame(person), shirt, poses.flatten(0, 1))
    rgb = c.rgb * pick_color_index(LIGHTS, light)[:, :, None, None]
    video = (rgb.clamp(0, 1) * 2 - 1).unflatten(0, (B, F)).transpose(1, 2)                # (B, 3, F, size, size)
    return video, boxes.unflatten(0, (B, F)), mask.unflatten(0, (B, F))


def draw_references(person: Tensor, setting: Tensor, generator: torch.Generator, size: int = 64,
                    share: float = 0.5) -> tuple[Tensor, Tensor]:
    """One reference picture per person, at another moment than the clip.

    With probability `share` in the clip's own setting (copying would pay), otherwise in a random one. Returns pictures
    (B, 3, size, size) in [-1, 1] and their face boxes (B, 4).
    """
    B = len(person)
    other = draw_settings(B, generator).to(person.device)
    same = torch.rand(B, generator=generator, device=generator.device).to(person.device) < share
    setting = torch.where(same[:, None], setting, other)
    poses = still_poses(B, generator).to(person.device)[:, None]
    video, boxes, _ = render(person, setting, poses, size)
    return video[:, :, 0], boxes[:, 0]


def to_uint8(video: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------- demo
TILE, GAP, LINE, TOP = 128, 8, 26, 40  # pixels of the contact sheet: a picture, between two, a caption, the head
SHOWN = (0, 2, 4, 6, 8)  # frames
INK, GREY, RED = (40, 40, 40), (110, 110, 110), (213, 30, 30)


class Clips(NamedTuple):
    """One clip per action: captions, reference pictures (A, 3, h, w), `render`'s video, boxes and masks."""

    captions: list[str]
    references: Tensor
    video: Tensor
    boxes: Tensor
    masks: Tensor


def one_of_each(split: str = "val", seed: int = 7) -> Clips:
    """Another person of `split` for each action, in nine frames of 64 x 64."""
    g, count = torch.Generator().manual_seed(seed), len(ACTIONS)
    person, setting = people(split, count), draw_settings(count, g)
    video, boxes, masks = render(person, setting, action_poses(torch.arange(count), 9, g))
    references, _ = draw_references(person, setting, g)
    captions = [caption(setting[i], i, i % len(TEMPLATES)) for i in range(count)]
    return Clips(captions, references, video, boxes, masks)


def draw(clips: Clips) -> Image.Image:
    """Contact sheet: a clip a row under its caption; reference, frames SHOWN, mask and box of the last frame shown."""
    last = SHOWN[-1]
    mask = (clips.masks[:, None, last] * 2 - 1).expand(-1, 3, -1, -1)                     # (A, 3, h, w)
    columns = [clips.references, *(clips.video[:, :, f] for f in SHOWN), mask]
    names = ["reference", *(f"frame {f}" for f in SHOWN), f"face {last}: mask, box"]
    left = [GAP + k * (TILE + GAP) + GAP * 2 * (k > 0) for k in range(len(columns))]      # the reference stands apart
    sheet = Image.new("RGB", (left[-1] + TILE + GAP, TOP + len(clips.captions) * (LINE + TILE + GAP)), "white")
    paper, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for x, name in zip(left, names, strict=True):
        paper.text((x + TILE // 2, TOP // 2), name, INK, ImageFont.load_default(size=16), "mm")
    for row, words in enumerate(clips.captions):
        top = TOP + row * (LINE + TILE + GAP)
        paper.text((left[0], top + LINE // 2), words, GREY, font, "lm")
        for x, pictures in zip(left, columns, strict=True):
            picture = Image.fromarray(to_uint8(pictures[row]).permute(1, 2, 0).cpu().numpy())
            sheet.paste(picture.resize((TILE, TILE), Image.NEAREST), (x, top + LINE))
        x0, y0, x1, y1 = (v * TILE / clips.masks.shape[-1] for v in clips.boxes[row, last].tolist())
        paper.rectangle([left[-1] + x0, top + LINE + y0, left[-1] + x1 - 1, top + LINE + y1 - 1], outline=RED)
    return sheet


def _demo() -> None:
    """What the world knows, in numbers, and world_demo.png."""
    clips, captions = one_of_each(), all_captions()
    print(f"a person is {len(TRAITS)} numbers in [0, 1]; a setting is one of {len(SCENES)} scenes, {len(LIGHTS)} lights and "
          f"{len(SHIRTS)} shirts;\nwith {len(ACTIONS)} actions and {len(TEMPLATES)} templates: {len(captions):,} captions\n")
    print("middle of the face in frames 0 -> 8, side of its box, in pixels of 64:")
    for words, boxes in zip(clips.captions, clips.boxes, strict=True):
        (x, y), (x8, y8) = (((b[:2] + b[2:]) / 2).tolist() for b in boxes[[0, -1]])
        side, side8 = (boxes[[0, -1], 3] - boxes[[0, -1], 1]).tolist()
        print(f"  ({x:4.1f}, {y:4.1f}) -> ({x8:4.1f}, {y8:4.1f})  {side:4.1f} -> {side8:4.1f}  {words}")
    person = people("val", 256)
    others = look_alikes(person, torch.Generator().manual_seed(0)), person.roll(1, 0)
    alike, strange = ((person - other).norm(dim=1).mean() for other in others)
    print(f"\na look-alike shares {LOOK_ALIKE_TRAITS} of the {len(TRAITS)} numbers: mean distance {alike:.2f}, "
          f"of a stranger {strange:.2f} (256 people)")
    print(f"the face covers {clips.masks.mean():.0%} of the pixels: there the face loss looks")
    draw(clips).save("world_demo.png")
    print("wrote world_demo.png: an action a row; the reference, five frames, and the last one's face mask and box")
    print("Notice: the left picture is the same person, but not always in the same place, light and shirt. No caption "
          "says who it is, so only the reference can.")


if __name__ == "__main__":
    _demo()
