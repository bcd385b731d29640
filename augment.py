# SPDX-License-Identifier: MIT
# From "ST-DRC, line by line", an independent implementation of arXiv 2606.02441.
"""Make copying useless: change the reference's colour, pose and layout before the model sees it.

Reference and target show the same person, often on the same day and in the same room. A model that
copies the reference's pixels, light and framing then lowers its loss faster than one that learns
what makes the person; at inference it pastes the photo into the video. If the reference is
brighter, tilted and elsewhere on the canvas every time, all it still shares with the target is what
makes the identity.

paper:       appearance-invariant reference augmentation varies colour, pose and layout, against
             shortcut learning (ST-DRC, arXiv 2606.02441, abstract: reference-robust identity
             enhancement). No operators, no ranges.
our reading: all operators, ranges and probabilities (after MimicBrush, ConsisID, FantasyID):
    color   p 0.8   brightness, contrast, saturation +-30 %, hue +-0.05 turns, gamma 0.8..1.25; 5 %
                    grey
    pose    p 0.5   rotation +-15 degrees, shear +-5 degrees, mild perspective, on white
    layout  p 0.5   scale 0.7..1, random place, up to 5 % cut off; white, grey or random ground
    flip    p 0     off, since prompts name features by side ("a mole on the left cheek")
             A flat picture cannot turn a head: draw the reference from another frame for that.

Conventions. Pictures are canvases from reference.py, (B, 3, H, W) in [-1, 1], white = 1. For the
references of training only: never for the target video, never at inference, never for the picture
that the identity loss compares with. Strength 1 = the ranges above, 0 = off: the input bit for bit.
All chance comes from the generator that is passed in.

Usage:
    import torch
    from augment import AugmentStrength, augment_reference
    canvas, generator = torch.rand(8, 3, 64, 96) * 2 - 1, torch.Generator().manual_seed(0)
    canvas = augment_reference(canvas, generator, AugmentStrength(layout=0))    # colour and pose

Read next: losses.py
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

# our reading: how often a family is applied. Strength changes how far it goes, not how often.
P_COLOR, P_POSE, P_LAYOUT = 0.8, 0.5, 0.5
LUMA = (0.299, 0.587, 0.114)  # how bright the eye finds red, green, blue (ITU-R BT.601)


@dataclass(frozen=True)
class AugmentStrength:
    """How far each family may go; 0 = off, 1 = the ranges of the header, 2 = twice as far.

    paper: the families colour, pose and layout. our reading: the numbers, and everything else.
    Raises ValueError out of range.
    """

    color: float = 1.0
    pose: float = 1.0
    layout: float = 1.0
    flip: float = 0.0  # the probability of a mirror image, 0 to 1

    def __post_init__(self):
        for name, most in (("color", 2), ("pose", 2), ("layout", 2), ("flip", 1)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise ValueError(f"expected {name} strength between 0 and {most}, got {value}; "
                                 "use 0 for off")


def augment_color(image: Tensor, generator: Generator, strength: float = 1.0) -> Tensor:
    """Other light, other camera: brightness, contrast, saturation, hue, gamma, now and then grey.

    paper: varies colour. our reading: operators and ranges, on the whole canvas, white bars too.
    image (3, H, W) or (B, 3, H, W) in [-1, 1] -> same shape and range; always applied, the
    probability lives in `augment_reference`. Strength 0 returns the image itself.
    """
    if strength == 0:
        return image
    images = image.reshape(-1, *image.shape[-3:])                         # (B, 3, H, W)
    B, _, H, W = images.shape
    draws = _uniform(5, B, generator, images)                             # (5, B) in [-1, 1]
    brightness, contrast, saturation, hue, gamma = draws
    grey = _chance(0.05 * strength, B, generator, images)[:, 0]           # (B, 1, 1)
    amount = torch.where(grey, 0.0, 1 + 0.3 * strength * saturation[:, None, None])
    # Up to gamma everything is linear in the colour: one 3x3 matrix and one offset per picture.
    luma = images.new_tensor(LUMA)
    # amount 0: all rows luma, grey
    saturate = amount * torch.eye(3).to(images) + (1 - amount) * luma.expand(3, 3)    # (B, 3, 3)
    matrix = _hue_rotation(0.05 * strength * hue) @ saturate              # (B, 3, 3)
    x = (images.reshape(B, 3, H * W) + 1) / 2                             # (B, 3, H*W) in [0, 1]
    # Contrast turns about the picture's mean brightness, else it is a second brightness knob:
    # gain * (stretch * (x - mean) + mean).
    mean = luma @ (matrix @ x.mean(dim=-1, keepdim=True))                 # (B, 1)
    gain, stretch = (1 + 0.3 * strength * torch.stack([brightness, contrast]))[:, :, None, None]
    offset = (gain * (1 - stretch) * mean[:, None]).expand(B, 3, 1)       # (B, 3, 1)
    x = torch.baddbmm(offset, gain * stretch * matrix, x)                 # (B, 3, H*W)
    # Gamma between 1/1.25 and 1.25, even in the logarithm: darker as often as brighter.
    x = x.clamp(0, 1) ** (1.25 ** (strength * gamma))[:, None, None]
    return (2 * x - 1).view(image.shape)


def augment_pose(image: Tensor, generator: Generator, strength: float = 1.0) -> Tensor:
    """Tilt the picture: rotation, shear, mild perspective; corners that open up are white.

    paper: varies pose. our reading: the rest. Shapes, range, strength 0 as in `augment_color`.
    """
    if strength == 0:
        return image
    images = image.reshape(-1, *image.shape[-3:])
    return _warp(images, _pose_matrix(images, generator, strength)).view(image.shape)


def augment_layout(image: Tensor, generator: Generator, strength: float = 1.0) -> Tensor:
    """Put the picture elsewhere: smaller, at a random place, slightly cut, on another ground.

    paper: varies layout. our reading: the rest. Shapes, range, strength 0 as in `augment_color`.
    """
    if strength == 0:
        return image
    images = image.reshape(-1, *image.shape[-3:])
    return _warp(images, *_layout_matrix(images, generator, strength)).view(image.shape)


def augment_reference(
    images: Tensor, generator: Generator, strength: AugmentStrength = AugmentStrength()
) -> Tensor:
    """Augment a batch of references, each picture with its own draw.

    paper: appearance-invariant reference augmentation. our reading: families are switched on
    independently with P_COLOR, P_POSE, P_LAYOUT and `strength.flip`; a picture that draws none
    comes back bit for bit. images (B, 3, H, W) float32 in [-1, 1], any device; the generator may
    live on another one. Returns the same shape; `images` itself when everything is off. Raises
    ValueError for another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32:
        # bfloat16 cannot count 512 pixels
        raise ValueError(f"expected images (B, 3, H, W) in float32, got {tuple(images.shape)} "
                         f"{images.dtype}; convert, or add a batch axis")
    B, out = len(images), images
    if strength.color > 0:
        on = _chance(P_COLOR, B, generator, images)                       # (B, 1, 1, 1)
        out = torch.where(on, augment_color(out, generator, strength.color), out)
    if strength.pose > 0 or strength.layout > 0:
        # Pose and layout share one resampling: each pass blurs, and blur tells what was done.
        matrix, ground, moved = torch.eye(3).to(images), 1.0, False       # matrix: output -> input
        if strength.pose > 0:
            moved = _chance(P_POSE, B, generator, images)
            pose = _pose_matrix(images, generator, strength.pose)         # (B, 3, 3)
            matrix = torch.where(moved[:, 0], pose, matrix)
        if strength.layout > 0:
            on = _chance(P_LAYOUT, B, generator, images)
            place, colour = _layout_matrix(images, generator, strength.layout)
            # From output to input: the picture's last step (layout) is the walk's first.
            matrix = torch.where(on[:, 0], matrix @ place, matrix)
            ground = torch.where(on, colour, ground)
            moved = moved | on
        out = torch.where(moved, _warp(out, matrix, ground), out)
    if strength.flip > 0:
        out = torch.where(_chance(strength.flip, B, generator, images), out.flip(-1), out)
    return out


def _uniform(rows, B, generator, like):
    # Drawn where the generator lives, so that one seed gives one result on every device.
    draws = torch.rand(rows, B, generator=generator, device=generator.device)
    return (2 * draws - 1).to(like)                                       # (rows, B) in [-1, 1)


def _chance(p, B, generator, like):
    draws = torch.rand(B, generator=generator, device=generator.device)
    return (draws < p).to(like.device)[:, None, None, None]               # (B, 1, 1, 1) bool


def _hue_rotation(turns):
    """Turn colours about the grey axis (1, 1, 1): grey, and the white canvas, stay uncoloured."""
    angle = 2 * math.pi * turns[:, None, None]                            # (B, 1, 1)
    around = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(turns) / math.sqrt(3)
    onto_grey = torch.full((3, 3), 1 / 3).to(turns)
    across = torch.eye(3).to(turns) - onto_grey
    return onto_grey + angle.cos() * across + angle.sin() * around        # Rodrigues' formula


def _pose_matrix(images, generator, strength):
    """Output -> input in canvas coordinates [-1, 1], (B, 3, 3)."""
    B, _, H, W = images.shape
    turn, shear, tilt_x, tilt_y = strength * _uniform(4, B, generator, images)
    turn, shear = math.radians(15) * turn, math.radians(5) * shear
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    c, s = turn.cos(), turn.sin()
    rotate = torch.stack([c, -s, zero, s, c, zero, zero, zero, one]).T.view(B, 3, 3)
    slant = torch.stack([one, shear.tan(), zero, zero, one, zero, zero, zero, one]).T.view(B, 3, 3)
    # The last row lets depth grow across the picture: at 0.08 the near edge is 17 % larger.
    depth = [0.08 * tilt_x, 0.08 * tilt_y, one]
    view = torch.stack([one, zero, zero, zero, one, zero, *depth]).T.view(B, 3, 3)
    # [-1, 1] is W pixels across but H down; without this a rotation on a wide canvas squashes.
    square = torch.tensor([W / H, 1.0, 1.0]).to(images)
    return (rotate @ slant @ view) * square / square[:, None]             # diag(1/sq) M diag(sq)


def _layout_matrix(images, generator, strength):
    """Output -> input, (B, 3, 3), and the colour of the ground, (B, 3, 1, 1)."""
    size, across, down, kind, *colour = _uniform(7, len(images), generator, images)
    scale = 1 - 0.15 * strength * (size + 1)                              # 0.7 .. 1 at strength 1
    # The centre roams as far as the canvas leaves room, and 0.1 (5 % of a side) beyond: a cut.
    room = 1 - scale + 0.1 * strength
    right, below = -room * across / scale, -room * down / scale
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    rows = [1 / scale, zero, right, zero, 1 / scale, below, zero, zero, one]
    white, grey = (kind < -1 / 3)[:, None], (kind > 1 / 3)[:, None]       # a third each
    ground = torch.where(grey, 0.0, torch.stack(colour, dim=1))           # (B, 3)
    ground = torch.where(white, 1.0, ground)
    return torch.stack(rows).T.view(-1, 3, 3), ground[:, :, None, None]


def _warp(images, matrix, ground=1.0):
    """Fetch every output pixel from where `matrix` points; beyond the picture lies `ground`."""
    # pixel middles in [-1, 1]
    y, x = (((torch.arange(n) + 0.5) * 2 / n - 1).to(images) for n in images.shape[-2:])
    m = matrix[..., None, None]                                           # (B, 3, 3, 1, 1)
    point = m[:, :, 0] * x + (m[:, :, 1] * y[:, None] + m[:, :, 2])       # matrix @ (x, y, 1)
    u, v, depth = point.unbind(dim=1)                                     # (B, H, W) each
    depth = depth.clamp_min(0.1)                                          # behind the eye: far off
    grid = torch.stack([u / depth, v / depth], dim=-1)                    # (B, H, W, 2)
    # grid_sample pads with zeros only: make the ground zero and put it back. Edges fade softly.
    sampled = nn.functional.grid_sample(images - ground, grid, align_corners=False)
    return (sampled + ground).clamp(-1, 1)


def _demo() -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    head = (x**2 + y**2 < 0.4).float() - ((x.abs() - 0.25) ** 2 + (y + 0.1) ** 2 < 0.01).float()
    face = torch.stack([0.8 * head, 0.4 * head, 0.2 + 0.1 * head]).clamp(-1, 1)    # (3, 64, 64)
    faces, generator = face.expand(200, 3, 64, 64), Generator().manual_seed(0)
    print("How wrong is a model that pastes the reference? Square error / variance, 200 draws:")
    print("  strength        0   0.25    0.5      1")
    for name, augment in (
        ("colour", augment_color), ("pose", augment_pose), ("layout", augment_layout),
        ("all", lambda f, g, s: augment_reference(f, g, AugmentStrength(s, s, s))),
    ):
        copies = [augment(faces, generator, s) for s in (0, 0.25, 0.5, 1)]
        errors = [(copy - faces).square().mean() / faces.var() for copy in copies]
        print(f"  {name:10s}" + "".join(f" {error:6.3f}" for error in errors))
    same = (copies[-1] == faces).flatten(1).all(dim=1).sum()
    print(f"Alone a family always acts, in 'all' with p {P_COLOR}, {P_POSE}, {P_LAYOUT}; 5 % draw")
    print(f"none, here {same} of 200. At strength 0 every picture comes back bit for bit.")
    print("Notice: 0 = not wrong at all, 1 = no better than one flat colour. Copying stops paying.")


if __name__ == "__main__":
    _demo()
