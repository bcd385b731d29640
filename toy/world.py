"""A procedural world of faces: the data set that ships as code.

The idea. Nobody can hand a student 200,000 people's videos, and LTX-2.3's weights do not fit a
laptop. So we draw people ourselves: a person is a row of numbers, and clips of that person doing
something somewhere are rendered from it. What a real data set only guesses is then known exactly:
who it is, where the face is, what the caption means.

* A **person** is a row of `TRAITS` (uniform in [0, 1]): skin, face shape, hair, eyes, brows, nose,
  mouth, beard, glasses. It is *never* in the caption; it can only come from the reference.
* A **setting** is (scene, light, shirt); an **action** moves the head. The caption names both.
* A **reference** is the same person at another moment: in half of the cases in the clip's own
  setting, in the other half in another one. So copying the reference's pixels pays in training
  unless the method stops it: the failure that ST-DRC (arXiv 2606.02441) is about.

our reading: all of it. Conventions. Picture coordinates run from -1 to 1, x rightwards, y
downwards; "turns left" moves the nose towards the left edge of the picture. Videos are (B, 3, F, h,
w) in [-1, 1]; boxes are (x0, y0, x1, y1) in pixels; masks are 1 on the face.

    video, boxes, masks = render(person, setting, action_poses(actions, 9, generator))

Read next: toy/clips.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TRAITS = ("skin skin_hue hair_style hair_color face_width jaw eye_size eye_gap eye_color brow_size "
          "brow_angle brow_height nose_width nose_length mouth_width lip_size lip_color beard "
          "glasses glasses_color eye_tilt face_height").split()
# Three kinds. Colours are easy to carry over, attributes are there or not, shape is what real face
# recognition lives on: lengths and angles of a pixel or two.
COLORS = ("skin", "skin_hue", "hair_color", "eye_color", "lip_color", "glasses_color")
ATTRIBUTES = ("hair_style", "beard", "glasses")
SHAPE = tuple(name for name in TRAITS if name not in COLORS + ATTRIBUTES)

SKIN = [(0.97, 0.82, 0.71), (0.90, 0.70, 0.55), (0.78, 0.56, 0.40), (0.60, 0.40, 0.27),
        (0.42, 0.27, 0.18)]
HAIR = [(0.10, 0.08, 0.08), (0.30, 0.18, 0.10), (0.55, 0.33, 0.15), (0.88, 0.74, 0.38),
        (0.72, 0.28, 0.12), (0.66, 0.66, 0.68)]
IRIS = [(0.25, 0.15, 0.08), (0.15, 0.40, 0.75), (0.15, 0.50, 0.25), (0.45, 0.48, 0.52)]
GLASSES = [(0.06, 0.06, 0.08), (0.65, 0.10, 0.12), (0.12, 0.20, 0.60)]
HAIR_STYLES = ["bald", "short", "fringe", "side", "long", "afro", "bun"]

SCENES = {"in a park": 0, "at the beach": 1, "in an office": 2, "in a red room": 3,
          "in the snow": 4, "at night": 5}
LIGHTS = {"in daylight": (1.0, 1.0, 1.0), "in warm light": (1.08, 0.98, 0.82),
          "in cool light": (0.84, 0.97, 1.10), "in dim light": (0.76, 0.76, 0.78),
          "in pink light": (1.08, 0.84, 0.98)}
SHIRTS = {"red": (0.82, 0.14, 0.14), "blue": (0.14, 0.26, 0.80), "green": (0.12, 0.58, 0.24),
          "yellow": (0.94, 0.82, 0.16), "white": (0.94, 0.94, 0.94), "black": (0.10, 0.10, 0.12)}
ACTIONS = ["turns left", "turns right", "nods", "laughs", "moves to the left",
           "moves to the right", "comes closer", "stays still"]
SCENE_NAMES, LIGHT_NAMES, SHIRT_NAMES = list(SCENES), list(LIGHTS), list(SHIRTS)
# of each scene: upper colour, lower colour, horizon height, blob colour, blob x, y and radius
BACKGROUNDS = [
    ((0.62, 0.80, 0.95), (0.36, 0.66, 0.28), 0.25, (0.16, 0.42, 0.16), -0.95, -0.15, 0.50),
    ((0.45, 0.75, 0.98), (0.92, 0.82, 0.56), 0.40, (1.00, 0.93, 0.40), 0.85, -0.75, 0.24),
    ((0.74, 0.74, 0.70), (0.46, 0.36, 0.28), 0.50, (0.35, 0.45, 0.55), 0.95, -0.30, 0.42),
    ((0.66, 0.20, 0.20), (0.40, 0.12, 0.14), 0.55, (0.92, 0.72, 0.34), -0.90, -0.60, 0.26),
    ((0.80, 0.87, 0.94), (0.97, 0.98, 1.00), 0.30, (0.20, 0.38, 0.34), 0.98, 0.05, 0.44),
    ((0.08, 0.09, 0.26), (0.16, 0.15, 0.20), 0.45, (0.95, 0.93, 0.78), -0.78, -0.76, 0.18)]
TEMPLATES = ["a person in {shirt} {action} {scene}, {light}",
             "{scene} {light}, a person wearing {shirt} {action}",
             "a person {action} {scene}, {light}, wearing {shirt}",
             "{light}, someone in {shirt} {action} {scene}"]
TABLES = {"scene": SCENES, "light": LIGHTS, "shirt": SHIRTS, "action": ACTIONS}  # what captions say
SPLIT_SEEDS = {"train": 101, "val": 202, "test": 303}
# Edges are blended over 1.4 pixels of a 64-pixel frame: hard ones cost codec bits, teach nothing.
EDGE = 0.045


# ------------------------------------------------------------ people, settings, captions, poses


def people(split: str, count: int) -> Tensor:
    """The first `count` people of a split, (count, T) in [0, 1]. Splits never share a person."""
    g = torch.Generator().manual_seed(SPLIT_SEEDS[split])
    return torch.rand(count, len(TRAITS), generator=g)


def look_alikes(person: Tensor, generator: torch.Generator) -> Tensor:
    """Same colours, hair, beard and glasses, another shape of the face: (B, T) -> (B, T).

    A recogniser that tells them apart sees the face; skin and hair alone do not tell.
    """
    other = torch.rand(person.shape, generator=generator, device=generator.device)
    other = other.to(person.device)
    shape = torch.tensor([name in SHAPE for name in TRAITS], device=person.device)
    return torch.where(shape, other, person)


def draw_settings(count: int, generator: torch.Generator) -> Tensor:
    """Random (scene, light, shirt) indices, (count, 3) int64 on the generator's device."""
    g = generator
    return torch.stack([torch.randint(len(table), (count,), generator=g, device=g.device)
                        for table in (SCENES, LIGHTS, SHIRTS)], dim=1)


def draw_actions(count: int, generator: torch.Generator) -> Tensor:
    """Random action indices, (count,) int64."""
    return torch.randint(len(ACTIONS), (count,), generator=generator, device=generator.device)


def caption(setting: Tensor, action: int, template: int = 0) -> str:
    """Caption of one clip; setting (3,). Nothing in it tells who the person is.

    An index one past the end of its table says nothing: the caption leaves that part out.
    """
    parts = zip(TABLES.items(), (*setting.tolist(), action), strict=True)
    said = {name: [*table, ""][int(i)] for (name, table), i in parts}
    said["shirt"] = f"a {said['shirt']} shirt" if said["shirt"] else ""
    text = TEMPLATES[template].format(**said)
    if not said["shirt"]:  # a preposition in front of nothing
        text = text.replace("person in ", "person ").replace("someone in ", "someone ")
        text = text.replace("wearing ", "")
    return ", ".join(" ".join(part.split()) for part in text.split(",") if part.strip())


def all_captions() -> list[str]:
    """Every caption of the grammar, with and without each part: the tokenizer is trained on them.
    The scene changes slowest, the template fastest."""
    numbers = torch.cartesian_prod(*(torch.arange(len(t) + 1) for t in TABLES.values()))
    return [caption(row[:3], int(row[3]), template) for row in numbers
            for template in range(len(TEMPLATES))]


def phrases() -> list[str]:
    """What captions are made of. Checkpoints carry it, so that sample.py can name other words."""
    shirts = [f"{worn} a {shirt} shirt" for worn in ("in", "wearing") for shirt in SHIRTS]
    return ["a person", "someone", *shirts, *ACTIONS, *SCENES, *LIGHTS]


def still_poses(count: int, generator: torch.Generator) -> Tensor:
    """Random resting poses, (count, 6): x, y, scale, yaw, pitch, mouth opening."""
    u = torch.rand(count, 6, generator=generator, device=generator.device) * 2 - 1
    spread = torch.tensor([0.10, 0.04, 0.05, 0.22, 0.15, 0.0], device=u.device)
    return u * spread + torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], device=u.device)


def action_poses(actions: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """Poses over time: actions (B,) -> (B, F, 6). Smooth, and at most a quarter of the frame."""
    start = still_poses(len(actions), generator)[:, None].repeat(1, frames, 1)      # (B, F, 6)
    t = torch.linspace(0, 1, frames, device=actions.device)[None]                   # (1, F)
    ease = t * t * (3 - 2 * t)
    does = {name: (actions == i).float()[:, None] for i, name in enumerate(ACTIONS)}  # (B, 1) each
    x, y, scale, yaw, pitch, mouth = start.unbind(dim=2)                            # (B, F) each
    side = does["moves to the right"] - does["moves to the left"]
    x = x * (1 - 0.5 * side.abs()) + side * (0.5 * ease - 0.25)
    yaw = yaw * (1 - 0.6 * ease * (does["turns left"] + does["turns right"]))
    yaw = yaw + 0.55 * ease * (does["turns right"] - does["turns left"])
    pitch = pitch + does["nods"] * 0.9 * torch.sin(2 * torch.pi * t)
    mouth = mouth + does["laughs"] * torch.sin(torch.pi * (0.15 + 0.85 * t)).clamp_min(0)
    y = y - does["laughs"] * 0.03 * torch.sin(4 * torch.pi * t)
    scale = scale + does["comes closer"] * (0.32 * ease - 0.20)
    return torch.stack([x, y, scale, yaw, pitch, mouth], dim=2)


# ------------------------------------------------------------ shapes and layers


def pick_color(table: list, u: Tensor) -> Tensor:
    """Palette lookup: N numbers u in [0, 1] -> one of the colours for each, (N, 3)."""
    index = (u.flatten() * len(table)).long().clamp(0, len(table) - 1)
    return torch.tensor(table, device=u.device)[index]


def pick_color_index(table: dict, index: Tensor) -> Tensor:
    """Colour of a named table by index: (N,) int64 -> (N, 3)."""
    return torch.tensor(list(table.values()), device=index.device)[index]


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
    """N pictures, painted in layers from back to front. x, y: pixel centres in [-1, 1]."""

    def __init__(self, count: int, size: int, device: torch.device):
        line = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
        self.y, self.x = line.view(1, size, 1), line.view(1, 1, size)
        self.rgb = torch.zeros(count, 3, size, size, device=device)

    def paint(self, alpha: Tensor, color: Tensor) -> None:
        """alpha (N, h, w) in [0, 1], colour (N, 3)."""
        self.rgb += alpha[:, None] * (color[:, :, None, None] - self.rgb)


class Head(NamedTuple):
    """N heads as they stand in the picture. What has no shape here is (N, 1, 1)."""

    traits: dict[str, Tensor]
    skin: Tensor   # (N, 3) colour
    hair: Tensor   # (N, 3) colour
    x: Tensor      # (N, 1, w) the pixels, seen from the head's middle
    y: Tensor      # (N, h, 1)
    a: Tensor      # half-width
    b: Tensor      # half-height
    scale: Tensor
    yaw: Tensor
    pitch: Tensor
    mouth: Tensor  # 0 shut, 1 open


def pose_heads(c: Canvas, person: Tensor, pose: Tensor) -> Head:
    """person (N, T), pose (N, 6)."""
    traits = dict(zip(TRAITS, person[:, :, None, None].unbind(dim=1), strict=True))
    px, py, scale, yaw, pitch, mouth = pose[:, :, None, None].unbind(dim=1)
    tones = torch.tensor(SKIN, device=person.device)
    tone = traits["skin"][:, :, 0] * (len(SKIN) - 1)                                # (N, 1)
    low = tone[:, 0].long().clamp(max=len(SKIN) - 2)
    skin = torch.lerp(tones[low], tones[low + 1], tone - low[:, None])  # continuous, unlike hair
    hue = torch.tensor([0.06, -0.06, -0.10], device=person.device)
    skin = skin * (1 + (traits["skin_hue"][:, :, 0] - 0.5) * hue)
    a = (0.42 + 0.09 * traits["face_width"]) * scale
    b = (0.56 + 0.07 * traits["face_height"]) * scale
    return Head(traits, skin, pick_color(HAIR, traits["hair_color"]), c.x - px, c.y - py + 0.03,
                a, b, scale, yaw, pitch, mouth)


# ------------------------------------------------------------ painting


def paint_background(c: Canvas, scene: Tensor) -> None:
    """Two flat areas and one blob per scene; scene (N,) int64."""
    table = torch.tensor([[*up, *low, h, *blob, bx, by, r]
                          for up, low, h, blob, bx, by, r in BACKGROUNDS], device=c.rgb.device)
    table = table[scene]                                                            # (N, 13)
    horizon, bx, by, radius = (table[:, i, None, None] for i in (6, 10, 11, 12))
    c.rgb = c.rgb + table[:, :3, None, None]
    c.paint(cover(horizon - c.y).expand(-1, -1, c.x.shape[2]), table[:, 3:6])
    distance = torch.sqrt((c.x - bx).square() + (c.y - by).square()) - radius
    c.paint(cover(distance), table[:, 7:10])


def paint_person(c: Canvas, person: Tensor, shirt: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Paint N people: traits (N, T), shirt index (N,), pose (N, 6).

    Returns face mask (N, h, w) and box (N, 4) in pixels.
    """
    head = pose_heads(c, person, pose)
    v, skin, hair, x, y, a, b, scale, yaw, pitch, _ = head
    style = (v["hair_style"] * len(HAIR_STYLES)).long()
    has = {name: (style == i).float() for i, name in enumerate(HAIR_STYLES)}
    # behind the head: long hair, afro, bun
    back = has["long"] * cover(box(x, y - 0.18 * scale, a + 0.06, b * 0.85, 0.10))
    afro = cover(ellipse(x, y + 0.22 * scale, a + 0.20, b * 0.80))
    bun = cover(ellipse(x, y + b + 0.05, 0.22 * scale, 0.20 * scale))
    c.paint(torch.maximum(torch.maximum(back, has["afro"] * afro), has["bun"] * bun), hair)
    # neck and shirt follow the head sideways only
    c.paint(cover(box(x, y - 0.75 * scale, 0.19 * scale, 0.30 * scale)), skin * 0.86)
    c.paint(cover(ellipse(x, c.y - 1.22, 0.86 * scale.clamp(0.9, 1.2), 0.50)),
            pick_color_index(SHIRTS, shirt))
    for side in (-1.0, 1.0):  # ears slide with the turn of the head
        ear = ellipse(x - side * (a + 0.01) + 0.10 * yaw, y - 0.02 - 0.05 * pitch,
                      0.075 * scale, 0.12 * scale)
        c.paint(cover(ear), skin * 0.90)
    # face: an ellipse whose lower half narrows with the jaw
    narrow = 1 - (0.32 * v["jaw"] - 0.08) * (y / b).clamp(0, 1)
    face = cover(ellipse(x / narrow, y, a, b))
    c.paint(face, skin)
    paint_mouth(c, head, face)
    paint_eyes(c, head)
    # hair in front: everything above a hairline, a little outside the face
    cap = cover(ellipse(x, y + 0.03, a + 0.045, b + 0.06))
    turn = x / a - 0.5 * yaw
    line = (-0.62 + 0.22 * has["fringe"] + has["side"] * 0.28 * turn
            + 0.25 * has["short"] * turn.square()
            + 0.34 * (has["long"] + has["bun"]) * turn.square() + 0.06 * has["afro"])
    c.paint(cap * (1 - has["bald"]) * cover(y - b * (line + 0.10 * pitch)), hair)
    px, py = pose[:, :2, None, None].unbind(dim=1)
    bounds = [px - 1.1 * a, py - 0.03 - 1.1 * b, px + 1.1 * a, py - 0.03 + 1.1 * b]
    return face, (torch.stack(bounds, dim=1).flatten(1) + 1) / 2 * c.rgb.shape[-1]


def paint_mouth(c: Canvas, head: Head, face: Tensor) -> None:
    """Beard, mouth and nose, around the line where the face looks; face: mask (N, h, w)."""
    v, skin, hair, x, y, a, b, scale, yaw, pitch, mouth = head
    grey = torch.ones_like(skin)
    y = y - 0.16 * b * pitch
    x = x - a * torch.sin(yaw) * 0.95
    kind = v["beard"]  # up to a half none, then moustache, goatee, full
    moustache = cover(ellipse(x, y - 0.335 * b, 0.36 * a, 0.075 * b))
    goatee = cover(ellipse(x, y - 0.74 * b, 0.34 * a, 0.30 * b))
    full = face * cover(0.34 * b - y - 0.10 * b * (x / a).square())
    beard = (moustache * ((kind > 0.5) & (kind <= 0.66)) + goatee * ((kind > 0.66) & (kind <= 0.82))
             + full * (kind > 0.82))
    c.paint(beard.clamp(0, 1) * face, hair * 0.85 + 0.02)
    # lips, then the dark opening, then teeth
    width, lip = (0.24 + 0.22 * v["mouth_width"]) * a, (0.035 + 0.05 * v["lip_size"]) * scale
    lips = skin * torch.tensor([0.90, 0.55, 0.55], device=skin.device)
    lips = lips * (1.0 - 0.15 * v["lip_color"][:, :, 0])
    ym = y - 0.52 * b - 0.03 * mouth
    c.paint(cover(ellipse(x, ym, width * (1 + 0.20 * mouth), lip + 0.11 * scale * mouth)), lips)
    gap = ellipse(x, ym, width * (0.95 + 0.1 * mouth), 0.012 + 0.10 * scale * mouth)
    c.paint(cover(gap) * (0.45 + 0.55 * mouth), 0.12 * grey)
    c.paint(cover(ellipse(x, ym + 0.05 * scale, width * 0.7, 0.045 * scale)) * mouth, 0.95 * grey)
    # nose: a darker wedge
    nose_w = (0.10 + 0.12 * v["nose_width"]) * a
    nose_l = (0.12 + 0.12 * v["nose_length"]) * b
    nose = ellipse(x - 0.10 * a * torch.sin(yaw), y - 0.16 * b, nose_w, nose_l)
    c.paint(cover(nose) * 0.9, skin * 0.78)


def paint_eyes(c: Canvas, head: Head) -> None:
    """Eyes, brows and glasses. What sits at longitude phi of the head moves to sin(phi + yaw)."""
    v, skin, hair, x, y, a, b, scale, yaw, pitch, mouth = head
    grey = torch.ones_like(skin)
    y = y - 0.16 * b * pitch
    size = (0.15 + 0.06 * v["eye_size"]) * scale
    phi = 0.40 + 0.14 * v["eye_gap"]
    iris = pick_color(IRIS, v["eye_color"])
    frame = pick_color(GLASSES, v["glasses_color"])
    glasses, radius = v["glasses"], 0.225 * scale
    round_, square = ((glasses > 0.55) & (glasses <= 0.78)).float(), (glasses > 0.78).float()
    for side in (-1.0, 1.0):
        angle = side * phi + yaw
        squash = (torch.cos(angle) / torch.cos(phi)).clamp(0.35, 1.2)
        ex, ey = x - a * torch.sin(angle), y + 0.14 * b
        slope = side * (v["eye_tilt"] - 0.5) * 0.5
        lid = cover(ellipse(ex, ey + slope * ex, size * squash, size * 0.62 * (1 - 0.55 * mouth)))
        c.paint(lid, 0.97 * grey)
        for share, color in ((0.52, iris), (0.22, 0.04 * grey)):  # iris, pupil
            c.paint(lid * cover(ellipse(ex - 0.02 * yaw, ey, size * share * squash, size * share)),
                    color)
        brow_y = ey + size + (0.02 + 0.07 * v["brow_height"]) * scale
        tilt = side * (v["brow_angle"] - 0.5) * 0.7
        thick = (0.004 + 0.035 * v["brow_size"]) * scale
        c.paint(cover(box(ex, brow_y - tilt * ex, size * 1.05 * squash, thick)), hair * 0.7)
        ring = round_ * cover(ellipse(ex, ey, radius * squash, radius).abs() - 0.022)
        edge = box(ex, ey, (radius - 0.01) * squash, radius * 0.72).abs() - 0.022
        c.paint(torch.maximum(ring, square * cover(edge)), frame)
    length = (a * torch.sin(phi) - 0.2 * scale).clamp_min(0.02)
    bridge = cover(box(x - a * torch.sin(yaw) * 0.95, y + 0.16 * b, length, 0.006, 0.012))
    c.paint(bridge * (round_ + square), frame)


def render(person: Tensor, setting: Tensor, poses: Tensor, size: int = 64
           ) -> tuple[Tensor, Tensor, Tensor]:
    """person (B, T) traits, setting (B, 3) indices, poses (B, F, 6) -> video, boxes, masks.

    video (B, 3, F, size, size) in [-1, 1], face boxes (B, F, 4) in pixels, face masks (B, F, size,
    size) in [0, 1].
    """
    B, F, _ = poses.shape

    def per_frame(t: Tensor) -> Tensor:
        return t[:, None].expand(B, F, *t.shape[1:]).flatten(0, 1)
    scene, light, shirt = per_frame(setting).unbind(dim=1)
    c = Canvas(B * F, size, person.device)
    paint_background(c, scene)
    mask, boxes = paint_person(c, per_frame(person), shirt, poses.flatten(0, 1))
    rgb = c.rgb * pick_color_index(LIGHTS, light)[:, :, None, None]                 # (B F, 3, ...)
    video = (rgb.clamp(0, 1) * 2 - 1).unflatten(0, (B, F)).transpose(1, 2)          # (B, 3, F, ...)
    return video, boxes.unflatten(0, (B, F)), mask.unflatten(0, (B, F))


def draw_references(person: Tensor, setting: Tensor, generator: torch.Generator, size: int = 64,
                    share: float = 0.5, paint: Callable = render) -> tuple[Tensor, Tensor]:
    """One reference picture per person, at another moment than the clip.

    With probability `share` in the clip's own setting (copying would pay), otherwise in a random
    one; paint: `render`, or the same compiled. Returns pictures (B, 3, size, size) in [-1, 1] and
    their face boxes (B, 4).
    """
    B = len(person)
    other = draw_settings(B, generator).to(person.device)
    same = torch.rand(B, generator=generator, device=generator.device).to(person.device) < share
    setting = torch.where(same[:, None], setting, other)
    poses = still_poses(B, generator).to(person.device)[:, None]
    video, boxes, _ = paint(person, setting, poses, size)
    return video[:, :, 0], boxes[:, 0]


def to_uint8(video: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def box_mask(boxes: Tensor, size: int) -> Tensor:
    """Boxes (B, F, 4) -> 1 inside, 0 outside, (B, 1, F, size, size)."""
    line = torch.arange(size, device=boxes.device) + 0.5
    x0, y0, x1, y1 = (b[:, :, None] for b in boxes.unbind(dim=2))                   # (B, F, 1) each
    across, down = (line > x0) & (line < x1), (line > y0) & (line < y1)             # (B, F, size)
    return (down[:, :, :, None] & across[:, :, None]).float()[:, None]


def demo() -> None:
    """The grammar in numbers, and a caption of each action with the path of its face."""
    g, count = torch.Generator().manual_seed(7), len(ACTIONS)
    print(f"a person is {len(TRAITS)} numbers; with {len(SCENES)} scenes, {len(LIGHTS)} lights, "
          f"{len(SHIRTS)} shirts, {count} actions\nand {len(TEMPLATES)} templates there are "
          f"{len(all_captions()):,} captions. Face: middle and side of its box, in pixels of 64\n")
    setting, poses = draw_settings(count, g), action_poses(torch.arange(count), 9, g)
    _, boxes, _ = render(people("val", count), setting, poses)
    middles, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 3] - boxes[..., 1]
    for i in range(count):
        (x, y), (x8, y8) = middles[i, 0], middles[i, 8]
        print(f"({x:4.1f}, {y:4.1f}) {sides[i, 0]:4.1f} -> ({x8:4.1f}, {y8:4.1f}) "
              f"{sides[i, 8]:4.1f}  {caption(setting[i], i, i % len(TEMPLATES))}")
    print("\nNotice: the caption says what the face does and where, and never who it is.")


if __name__ == "__main__":
    demo()
