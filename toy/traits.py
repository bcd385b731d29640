"""The trait reader: what a frame shows of a face, as numbers a person can check.

The idea. A recogniser's cosine says "similar" and not why, and it may be content with skin and
hair. In the world a face is 22 known numbers (toy/world.py), so a network can be asked for each of
them: how wide is the jaw, how far apart are the eyes? A correlation of the answers with the truth,
person by person, tells what a model carries over from its reference and what it loses. One more
answer: are both eyes there, and alike? Half-made faces show there first.

The failure this prevents: a judge that cannot see the jaw and reports 93 % of the people as right.

our reading: all of it; ST-DRC (arXiv 2606.02441) names no measure. It supervises nothing and shares
nothing with the networks that do: other people, other start. It sees frames as soft as generated
ones, from clips that went through the VAE; its own limits stand beside every result.

Conventions. Frames (B, 3, 64, 64) in [-1, 1] -> traits (B, 22) in about [0, 1], in the order of
world.TRAITS, and the logit of "eyes as they should be" (B,).

    reader = load_traits("weights/tiny/traits.safetensors")
    traits, eyes = read_traits(reader, video)                     # (n, F, 22), (n, F) bool
    python -m toy.pretrain traits                                 # makes another

Read next: study/scores.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import atomic_write
from common.seeds import seeded
from ltx.checkpoint import open_file
from ltx.vae import VideoVAE
from toy import world
from toy.config import FRAMES, RUNS, SIZE, WEIGHTS
from toy.recognisers import degrade, floats
from training.optim import EMA, MuonAdamW, schedule, split_parameters
from training.run import Run, descend
from training.workers import autocast

COUNT = len(world.TRAITS)
WIDTHS = (24, 48, 64, 96, 128, 160, 192)
SEEN = 3    # frames of a clip that are learned from
VIEWED = 5  # frames of a clip that is learned from: two latent frames, half the cost of a whole one
WEARS_GLASSES = 0.55  # world.paint_eyes: below it nobody wears any, and their colour shows nowhere


class TraitReader(nn.Module):
    """Seven convolutions, three of them halving, then two linear layers that see where in the
    frame everything was: frames (B, 3, 64, 64) -> (B, 23)."""

    STRIDES = (1, 2, 1, 2, 1, 2, 1)

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c, width, 3, stride, padding=1, bias=False)
            for c, width, stride in zip((3, *WIDTHS[:-1]), WIDTHS, self.STRIDES, strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in WIDTHS)
        self.fc = nn.Linear(WIDTHS[-1] * (SIZE // 8) ** 2, 128)
        self.out = nn.Linear(128, COUNT + 1)
        self.register_buffer("error", torch.ones(COUNT))  # of each trait, see `check_traits`

    def forward(self, frames: Tensor) -> Tensor:
        if frames.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"expected frames (B, 3, {SIZE}, {SIZE}), got {tuple(frames.shape)}; "
                             "this reader knows the tiny world only")
        x = frames
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))                               # (B, WIDTHS[i], h, w)
        y = self.out(torch.relu(self.fc(x.flatten(1)))).float()         # (B, 23)
        return torch.cat([0.5 + 0.3 * y[:, :COUNT], y[:, COUNT:]], dim=1)


def load_traits(path: str | Path) -> TraitReader:
    """A TraitReader from safetensors, frozen. Raises ValueError when the file holds another net."""
    net = TraitReader()
    wanted = {name: list(t.shape) for name, t in floats(net).items()}
    with open_file(path) as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}
        if stored != wanted:
            raise ValueError(f"expected a trait reader in {path}, got other tensors; "
                             "`python -m toy.pretrain traits` makes one")
        net.load_state_dict({name: file.get_tensor(name).float() for name in wanted}, strict=False)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def read_traits(reader: TraitReader, video: Tensor) -> tuple[Tensor, Tensor]:
    """video (n, 3, F, 64, 64) -> traits (n, F, 22), and whether both eyes are right (n, F)."""
    n, _, frames, _, _ = video.shape
    pictures = video.transpose(1, 2).flatten(0, 1)                      # (n * F, 3, 64, 64)
    out = torch.cat([reader(part.float().clamp(-1, 1)) for part in pictures.split(256)])
    out = out.unflatten(0, (n, frames))                                 # (n, F, 23)
    return out[..., :COUNT], out[..., COUNT] > 0


# ------------------------------------------------------------ what it is trained on


def odd_eyes(video: Tensor, person: Tensor, setting: Tensor, poses: Tensor, g: torch.Generator
             ) -> Tensor:
    """The same clips with one eye wrong: of another colour, painted over with skin, or smeared.

    video (B, 3, F, h, w), person (B, T), setting (B, 3), poses (B, F, 6).
    """
    B, device = len(person), video.device
    v = dict(zip(world.TRAITS, person[:, :, None].unbind(dim=1), strict=True))      # (B, 1) each
    px, py, scale, yaw, pitch, _ = poses.unbind(dim=2)                              # (B, F) each
    side = torch.randint(0, 2, (B, 1), generator=g, device=device) * 2 - 1
    # where world.paint_eyes puts this eye
    a, b = (0.42 + 0.09 * v["face_width"]) * scale, (0.56 + 0.07 * v["face_height"]) * scale
    x = px + a * torch.sin(side * (0.40 + 0.14 * v["eye_gap"]) + yaw)
    y = py - 0.03 + 0.16 * b * pitch - 0.14 * b
    line = (torch.arange(SIZE, device=device) + 0.5) / SIZE * 2 - 1                 # (h,) = (w,)
    across, down = (line - x[..., None])[:, :, None], (line - y[..., None])[..., None]
    radius = 0.23 * scale[..., None, None]
    window = world.cover(world.ellipse(across, down, radius, radius))[:, None]      # (B, 1, F, ...)
    # another colour: the eye of somebody who differs in nothing else
    other = person.clone()
    step = 0.25 * torch.randint(1, 4, (B,), generator=g, device=device)  # to one of three others
    column = world.TRAITS.index("eye_color")
    other[:, column] = (person[:, column] + step) % 1
    colour, _, _ = world.render(other, setting, poses, SIZE)
    # skin: that of the cheek below; smear: what is there, over 11 pixels
    row, col = (((at + 1) / 2 * SIZE).long().clamp(0, SIZE - 1) for at in (y + 0.27 * scale, x))
    clip, frame = torch.meshgrid(torch.arange(B), torch.arange(poses.shape[1]), indexing="ij")
    skin = video[clip.to(device), :, frame.to(device), row, col]                    # (B, F, 3)
    skin = skin.transpose(1, 2)[..., None, None].expand_as(video)
    flat = nnf.pad(video.transpose(1, 2).flatten(0, 1), (5, 5, 5, 5), mode="replicate")
    smear = nnf.avg_pool2d(flat, 11, 1).unflatten(0, (B, -1)).transpose(1, 2)
    kind = torch.randint(0, 3, (B, 1, 1, 1, 1), generator=g, device=device)
    wrong = torch.where(kind == 0, colour, torch.where(kind == 1, skin, smear))
    return torch.lerp(video, wrong, window)


@torch.no_grad()
def trait_views(person: Tensor, vae: VideoVAE, g: torch.Generator, precision: str
                ) -> tuple[Tensor, Tensor, Tensor]:
    """SEEN frames of each person (B, T), as soft as generated ones, n = SEEN * B: pictures
    (n, 3, h, w), the traits (n, T), and whether both eyes are right (n,).

    Every third clip has odd eyes; every second went through the VAE; half of all pictures are
    degraded further. People are new in every step: the reader learns by heart those it sees again,
    and then its loss falls while it reads no shape of a new face.
    """
    B, device = len(person), person.device
    setting, action = world.draw_settings(B, g), world.draw_actions(B, g)
    poses = world.action_poses(action, VIEWED, g)
    video, _, _ = world.render(person, setting, poses, SIZE)            # (B, 3, VIEWED, h, w)
    place = torch.arange(B, device=device)
    odd = place % 3 == 2
    video[odd] = odd_eyes(video[odd], person[odd], setting[odd], poses[odd], g)
    coded = place % 2 == 0
    with autocast(device.type, precision):
        video[coded] = vae.decode(vae.encode(video[coded])).float().clamp(-1, 1)
    moment = torch.rand(B, VIEWED, generator=g, device=device).argsort(dim=1)[:, :SEEN]
    pictures = video[place[:, None], :, moment].flatten(0, 1)           # (n, 3, h, w)
    worse = torch.rand(len(pictures), 1, 1, 1, generator=g, device=device) < 0.5
    pictures = torch.where(worse, degrade(pictures, g), pictures)
    return pictures, person.repeat_interleave(SEEN, dim=0), ~odd.repeat_interleave(SEEN)


def trait_loss(net: nn.Module, pictures: Tensor, person: Tensor, eyes: Tensor) -> Tensor:
    """Squared error of the traits that show, in parts of their variance, and the eyes' logit."""
    out = net(pictures)                                                 # (N, 23)
    shows = torch.ones_like(person)
    worn = person[:, world.TRAITS.index("glasses")] > WEARS_GLASSES
    shows[:, world.TRAITS.index("glasses_color")] = worn.float()
    error = 12 * (out[:, :COUNT] - person).square() * shows
    return error.sum() / shows.sum() + nnf.binary_cross_entropy_with_logits(
        out[:, COUNT], eyes.float())


# ------------------------------------------------------------ the stage


def traits_stage(args: argparse.Namespace, device: str) -> None:
    """Train on people drawn anew in every step -> weights/tiny/traits.safetensors."""
    torch.manual_seed(args.seed + 3000)
    vae = VideoVAE.load(WEIGHTS / "model.safetensors", device, torch.float32)
    net = TraitReader().to(device)
    parts = split_parameters(dict(net.named_parameters()), ("convs.0", "out"))
    optimizer = MuonAdamW(*parts, lr_matrix=3e-3, lr_other=2e-3, precision=args.precision)
    run = Run(RUNS / "traits", floats(net), optimizer, EMA({}))
    loss_fn = torch.compile(trait_loss) if args.compile else trait_loss
    for step in run.steps(args.steps, args.minutes, args.batch, "traits"):
        g = seeded(args.seed, step, 6, device=device)
        person = torch.rand(args.batch, COUNT, generator=g, device=device)
        views = trait_views(person, vae, g, args.precision)
        with autocast(device, args.precision):
            loss = loss_fn(net, *views)
        descend(run, step, loss, schedule(step, args.steps), f"people drawn with seed {args.seed}")
        run.record(loss=loss.item())
    told = check_traits(net, vae, device)
    tensors = {name: t.bfloat16().contiguous() for name, t in floats(net).items()}
    atomic_write(WEIGHTS / "traits.safetensors", lambda path: save_file(tensors, path))
    for name, value in told.items():
        print(f"traits, {name}: {value}")


@torch.no_grad()
def check_traits(net: TraitReader, vae: VideoVAE, device: str) -> dict[str, float]:
    """Correlation with the truth on unseen people's clips that went through the VAE, trait by
    trait, and how often the eyes are judged rightly. Sets `net.error`, the root mean square error
    of a trait read from one such clip."""
    net.eval()
    g, person = seeded(9, device=device), world.people("val", 256).to(device)
    setting, action = world.draw_settings(256, g), world.draw_actions(256, g)
    poses = world.action_poses(action, FRAMES, g)
    clips, _, _ = world.render(person, setting, poses, SIZE)
    wrong = odd_eyes(clips, person, setting, poses, g)
    coded, odd = (torch.cat([vae.decode(vae.encode(part)) for part in each.split(32)]).float()
                  for each in (clips, wrong))
    read, fine = read_traits(net, coded)
    mean = read.mean(dim=1)                                             # (256, 22)
    net.error.copy_((mean - person).square().mean(dim=0).sqrt())
    worn = person[:, world.TRAITS.index("glasses")] > WEARS_GLASSES
    told = {}
    for i, name in enumerate(world.TRAITS):
        shown = worn if name == "glasses_color" else torch.ones_like(worn)
        pair = torch.stack([mean[shown, i], person[shown, i]])
        told[name] = torch.corrcoef(pair)[0, 1].item()
    told["eyes called right in true clips"] = fine.float().mean().item()
    told["and where one is wrong"] = read_traits(net, odd)[1].float().mean().item()
    return {name: round(value, 3) for name, value in told.items()}
