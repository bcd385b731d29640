"""Make copying useless: change the reference's colour, pose and layout before the model sees it.

Reference and target show the same person, often on the same day and in the same room. A model that copies the
reference's pixels, light and framing then lowers its loss faster than one that learns what makes the person; at
inference it pastes the photo into the video. If the reference is brighter, tilted and elsewhere on the canvas every
time, the only things it still shares with the target are the ones that make the identity.

paper:        appearance-invariant reference augmentation varies colour, pose and layout, against shortcut learning
              (ST-DRC, arXiv 2606.02441, abstract: reference-robust identity enhancement). No operators, no ranges.
our reading:  all operators, ranges and probabilities below (after MimicBrush, ConsisID and FantasyID):
                color   p 0.8   brightness, contrast, saturation +-30 %, hue +-0.05 turns, gamma 0.8..1.25; 5 % grey
                pose    p 0.5   rotation +-15 degrees, shear +-5 degrees, mild perspective, on white
                layout  p 0.5   scale 0.7..1, random place, up to 5 % cut off, pad white / grey / random colour
                flip    p 0     mirror: off, since prompts name features by side ("a mole on the left cheek")
              Flat pictures cannot turn a head. For that, draw the reference from another frame of the same person.

Conventions. Pictures are canvases from reference.py, (B, 3, H, W) in [-1, 1], white = 1. For the references of
training only: never for the target video, never at inference, never for the picture the identity loss compares with.
Strength 1 = the ranges above, 0 = off: the input bit for bit. All chance comes from the generator that is passed in.

Usage:
    import torch
    from augment import AugmentStrength, augment_reference
    canvas, generator = torch.rand(8, 3, 64, 96) * 2 - 1, torch.Generator().manual_seed(0)      # (B, 3, H, W)
    canvas = augment_reference(canvas, generator, AugmentStrength(layout=0))                    # colour and pose only

Read next: losses.py
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor, nn

# our reading: how often a family is applied. Strength changes how far it goes, not how often.
P_COLOR, P_POSE, P_LAYOUT = 0.8, 0.5, 0.5
LUMA = (0.299, 0.587, 0.114)  # how bright the eye finds red, green and blue (ITU-R BT.601)


@dataclass(frozen=True)
class AugmentStrength:
    """How far each family may go; 0 = off, 1 = the ranges of the header, 2 = twice as far. ValueError out of range.

    paper: the families colour, pose and layout. our reading: the numbers, and everything else.
    """

    color: float = 1.0
    pose: float = 1.0
    layout: float = 1.0
    flip: float = 0.0  # the probability of a mirror image, 0 to 1

    def __post_init__(self):
        for name, most in (("color", 2), ("pose", 2), ("layout", 2), ("flip", 1)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise ValueError(f"expected {name} strength between 0 and {most}, got {value}; use 0 for off")


def augment_color(image: Tensor, generator: Generator, strength: float = 1.0) -> Tensor:
    """Other light, other camera: brightness, contrast, saturation, hue, gamma, now and then grey.

    paper: varies colour. our reading: operators and ranges, on the whole canvas, white bars too. image (3, H, W) or
    (B, 3, H, W) in [-1, 1] -> same shape and range; always applied, the probability lives in `augment_reference`.
    Strength 0 returns the image itself.
    """
    if strength == 0:
        return image
    images = image.reshape(-1, *image.shape[-3:])                         # (B, 3, H, W)
    B, _, H, W = images.shape
    brightness, contrast, saturation, hue, gamma = _uniform(5, B, generator, images)    # (B,) each, in [-1, 1]
    grey = _chance(0.05 * strength, B, generator, images)[:, 0]           # (B, 1, 1)
    amount = torch.where(grey, 0.0, 1 + 0.3 * strength * saturation[:, None, None])
    # Up to gamma everything is linear in the colour, so the whole chain is one 3x3 matrix and one offset per picture.
    luma = images.new_tensor(LUMA)
    saturate = amount * torch.eye(3).to(images) + (1 - amount) * luma.expand(3, 3)      # amount 0: all rows luma, grey
    matrix = _hue_rotation(0.05 * strength * hue) @ saturate              # (B, 3, 3)
    x = (images.reshape(B, 3, H * W) + 1) / 2                             # [0, 1], where gamma makes sense
    # Contrast turns about the picture's mean brightness, else it would be a second brightness knob.
    mean = luma @ (matrix @ x.mean(dim=-1, keepdim=True))                 # (B, 1)
    gain, stretch = (1 + 0.3 * strength * torch.stack([brightness, contrast]))[:, :, None, None]
    offset = (gain * (1 - stretch) * mean[:, None]).expand(B, 3, 1)       # gain * (stretch * (x - mean) + mean)
    x = torch.baddbmm(offset, gain * stretch * matrix, x)                 # (B, 3, H*W)
    # Gamma between 1/1.25 and 1.25, drawn evenly in the logarithm: darker as often as brighter.
    x = x.clamp(0, 1) ** (1.25 ** (strength * gamma))[:, None, None]
    return (2 * x - 1).view(image.shape)


def augment_pose(image: Tensor, generator: Generator, strength: float = 1.0) -> Tensor:
    """Tilt the picture: rotation, shear, mild perspective; corners that open up are white.

    paper: varies pose. our reading: operators and ranges. Shapes, range and strength 0 as in `augment_color`.
    """
    if strength == 0:
        return image
    images = image.reshape(-1, *image.shape[-3:])
    return _warp(images, _pose_matrix(images, generator, strength)).view(image.shape)


def augment_layout(image: Tensor, generator: Generator, strength: float = 1.0) -> Tensor:
    """Put the picture elsewhere: smaller, at a random place, slightly cut, on a white, grey or coloured ground.

    paper: varies layout. our reading: operators and ranges. Shapes, range and strength 0 as in `augment_color`.
    """
    if strength == 0:
        return image
    images = image.reshape(-1, *image.shape[-3:])
    return _warp(images, *_layout_matrix(images, generator, strength)).view(image.shape)


def augment_reference(images: Tensor, generator: Generator, strength: AugmentStrength = AugmentStrength()) -> Tensor:
    """Augment a batch of references, each picture with its own draw.

    paper: appearance-invariant reference augmentation. our reading: families are switched on independently with
    P_COLOR, P_POSE, P_LAYOUT and `strength.flip`; a picture that draws none comes back bit for bit. images (B, 3, H, W)
    float32 in [-1, 1], any device; the generator may live on another one. Returns the same shape; `images` itself when
    everything is off. Raises ValueError for another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
        got = f"{tuple(images.shape)} {images.dtype}"  # bfloat16 cannot count 512 pixels
        raise ValueError(f"expected images (B, 3, H, W) in float32, got {got}; convert, or add a batch axis")
    B, out = len(images), images
    if strength.color > 0:
        out = torch.where(_chance(P_COLOR, B, generator, images), augment_color(out, generator, strength.color), out)
    if strength.pose > 0 or strength.layout > 0:
        # Pose and layout share one resampling: each pass blurs, and blur would tell the model how much was done.
        matrix, ground, moved = torch.eye(3).to(images), 1.0, False       # matrix: output -> input, homogeneous
        if strength.pose > 0:
            moved = _chance(P_POSE, B, generator, images)
            matrix = torch.where(moved[:, 0], _pose_matrix(images, generator, strength.pose), matrix)
        if strength.layout > 0:
            on = _chance(P_LAYOUT, B, generator, images)
            place, colour = _layout_matrix(images, generator, strength.layout)
            # We walk from output to input, so the last step of the picture (layout) is the first of the walk.
            matrix = torch.where(on[:, 0], matrix @ place, matrix)
            ground = torch.where(on, colour, ground)
            moved = moved | on
        out = torch.where(moved, _warp(out, matrix, ground), out)
    if strength.flip > 0:
        out = torch.where(_chance(strength.flip, B, generator, images), out.flip(-1), out)
    return out


def _uniform(rows, B, generator, like):
    """Numbers in [-1, 1), (rows, B). Drawn where the generator lives, so one seed gives one result on every device."""
    return (2 * torch.rand(rows, B, generator=generator, device=generator.device) - 1).to(like)


def _chance(p, B, generator, like):                                       # (B, 1, 1, 1)
    return (torch.rand(B, generator=generator, device=generator.device) < p).to(like.device)[:, None, None, None]


def _hue_rotation(turns):
    """Turn colours about the grey axis (1, 1, 1), which leaves grey, and so the white canvas, uncoloured."""
    angle = 2 * math.pi * turns[:, None, None]
    around = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(turns) / math.sqrt(3)
    onto_grey = torch.full((3, 3), 1 / 3).to(turns)
    return onto_grey + angle.cos() * (torch.eye(3).to(turns) - onto_grey) + angle.sin() * around    # Rodrigues' formula


def _pose_matrix(images, generator, strength):
    """Output -> input in canvas coordinates [-1, 1], (B, 3, 3)."""
    B, _, H, W = images.shape
    turn, shear, tilt_x, tilt_y = strength * _uniform(4, B, generator, images)
    turn, shear = math.radians(15) * turn, math.radians(5) * shear
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    rotate = torch.stack([turn.cos(), -turn.sin(), zero, turn.sin(), turn.cos(), zero, zero, zero, one]).T.view(B, 3, 3)
    slant = torch.stack([one, shear.tan(), zero, zero, one, zero, zero, zero, one]).T.view(B, 3, 3)
    # The last row makes depth grow across the picture: at 0.08 the near edge is about 17 % larger than the far one.
    view = torch.stack([one, zero, zero, zero, one, zero, 0.08 * tilt_x, 0.08 * tilt_y, one]).T.view(B, 3, 3)
    # [-1, 1] is W pixels across but H pixels down; without this a rotation on a wide canvas would also squash the face.
    square = torch.tensor([W / H, 1.0, 1.0]).to(images)
    return (rotate @ slant @ view) * square / square[:, None]             # diag(1/square) @ M @ diag(square)


def _layout_matrix(images, generator, strength):
    """Output -> input, (B, 3, 3), and the colour of the ground, (B, 3, 1, 1)."""
    size, across, down, kind, *colour = _uniform(7, len(images), generator, images)
    scale = 1 - 0.15 * strength * (size + 1)                              # 0.7 .. 1 of the canvas at strength 1
    # The picture's centre roams as far as the canvas leaves room, and 0.1 (5 % of the side) beyond, which cuts it.
    room = 1 - scale + 0.1 * strength
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    rows = [1 / scale, zero, -room * across / scale, zero, 1 / scale, -room * down / scale, zero, zero, one]
    white, grey = (kind < -1 / 3)[:, None], (kind > 1 / 3)[:, None]       # a third each; the rest a random colour
    ground = torch.where(white, 1.0, torch.where(grey, 0.0, torch.stack(colour, dim=1)))                # (B, 3)
    return torch.stack(rows).T.view(-1, 3, 3), ground[:, :, None, None]


def _warp(images, matrix, ground=1.0):
    """Fetch every output pixel from where `matrix` points; beyond the picture lies `ground`, by default white."""
    y, x = (((torch.arange(n) + 0.5) * 2 / n - 1).to(images) for n in images.shape[-2:])    # pixel middles in [-1, 1]
    m = matrix[..., None, None]                                           # (B, 3, 3, 1, 1)
    u, v, depth = (m[:, :, 0] * x + (m[:, :, 1] * y[:, None] + m[:, :, 2])).unbind(dim=1)        # matrix @ (x, y, 1)
    depth = depth.clamp_min(0.1)                                          # behind the eye: far off the picture
    grid = torch.stack([u / depth, v / depth], dim=-1)                    # (B, H, W, 2)
    # grid_sample pads with zeros only: make the ground zero, put it back afterwards. Edges then fade softly into it.
    return (nn.functional.grid_sample(images - ground, grid, align_corners=False) + ground).clamp(-1, 1)


FAMILIES = {"colour": augment_color, "pose": augment_pose, "layout": augment_layout,
            "all": lambda images, generator, s: augment_reference(images, generator, AugmentStrength(s, s, s))}


def draw(face: Tensor, strengths: tuple[float, ...] = (0, 0.25, 0.5, 1), draws: int = 3) -> Image.Image:
    """Contact sheet of a face (3, H, W): a row per family, always applied; last, all as a training draws them.

    our reading: as the operators. Columns: `draws` seeds at each strength (one where off); a seed draws alike in all.
    """
    H, W = face.shape[1:]
    cells = [(s, seed) for s in strengths for seed in range(draws if s else 1)]
    sheet = Image.new("RGB", (82 + len(cells) * (W + 6) + 14 * len(strengths), 38 + len(FAMILIES) * (H + 6)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for row, (name, augment) in enumerate(FAMILIES.items()):
        for column, (s, seed) in enumerate(cells):
            x, y = 82 + column * (W + 6) + 14 * strengths.index(s), 38 + row * (H + 6)
            picture = augment(face[None], Generator().manual_seed(seed), s)[0]
            pen.rectangle((x - 1, y - 1, x + W, y + H), outline="silver")  # white on white needs an edge
            sheet.paste(Image.fromarray(((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()), (x, y))
            if row == seed == 0:
                pen.text((x, 8), f"strength {s}" if s else "0 = off", "black", font)
        pen.text((10, y + H // 2), name, "black", font, anchor="lm")
    return sheet


def _demo() -> None:
    path = Path(__file__).with_name("examples") / "ada.png"
    picture = Image.open(path).convert("RGB") if path.exists() else Image.new("RGB", (128, 128), "lightsteelblue")
    if not path.exists():                                                 # this file alone: a face with a mole
        for x, y, r, colour in ((64, 150, 54, "brown"), (64, 60, 42, "tan"), (48, 52, 6, "black"), (80, 52, 6, "black"),
                                (64, 82, 8, "brown"), (86, 72, 3, "black")):
            ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r, y + r), fill=colour)
    pixels = torch.frombuffer(bytearray(picture.resize((128, 128)).tobytes()), dtype=torch.uint8).view(128, 128, 3)
    face = pixels.permute(2, 0, 1) / 127.5 - 1
    faces, generator = face[None, :, ::2, ::2].repeat(200, 1, 1, 1), Generator().manual_seed(0)
    print("How wrong is a model that pastes the reference? 0 = not at all, 1 = no better than one flat colour.")
    print("  strength        0   0.25    0.5      1    (mean square error / variance, 200 draws of one face)")
    for name, augment in FAMILIES.items():
        errors = [((augment(faces, generator, s) - faces) ** 2).mean() / faces.var() for s in (0, 0.25, 0.5, 1)]
        print(f"  {name:10s}" + "".join(f" {error:6.3f}" for error in errors))
    same = (augment_reference(faces, generator) == faces).flatten(1).all(dim=1).sum()
    print(f"Alone a family always acts, in 'all' with probability {P_COLOR}, {P_POSE}, {P_LAYOUT}: 5 % draw none.")
    print(f"So at strength 1, {same} of 200 came back bit for bit; at strength 0 every picture does.")
    draw(face).save("augment_demo.png")
    print("wrote augment_demo.png: a row for each family and for all together, a column for each strength and draw")
    print("Notice: along a row one draw goes further: light, tilt, place, ground change, the face's shape does not.")


if __name__ == "__main__":
    _demo()
