"""The head-pose estimator: where the head is in a frame, how it is turned, whether there is one.

The idea. Whether a video does what its prompt says ("turns left") can be read off the head's pose
in each frame, by a rule that cannot learn the prompt's prejudices as a classifier could. In the
world every pose is known, so a small network learns to read it: seven convolutions, four of them
halving, then two linear layers that see where in the frame everything was.

The failure this prevents: an estimator that is right on rendered frames and guesses on generated
ones. So it sees what generated heads are like: poses that no action of the world has, blur and
noise, frames that went through the VAE, and pictures that show no head at all.

our reading: all of it; ST-DRC (arXiv 2606.02441) scores no poses. It supervises nothing; only
study/scores.py asks it.

Conventions. Frames (B, 3, 64, 64) in [-1, 1]; poses x, y, scale, yaw, pitch, mouth as in world.py.

    head = load_head("weights/tiny/head_pose.safetensors")
    found, poses = read_heads(head, video)                         # (n, F) bool, (n, F, 6)
    python -m toy.pretrain head_pose                               # makes another

Read next: toy/traits.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import atomic_write
from common.seeds import seeded
from ltx.checkpoint import load_weights, open_file, read_metadata
from ltx.vae import VideoVAE
from toy import world
from toy.config import FRAMES, RUNS, SIZE, WEIGHTS
from toy.recognisers import degrade, floats
from training.optim import EMA, MuonAdamW, schedule, split_parameters
from training.run import Run, descend
from training.workers import autocast

POSE_NAMES = ("x", "y", "scale", "yaw", "pitch", "mouth")
POSE_MIDDLE = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
POSE_SPREAD = (0.15, 0.03, 0.08, 0.25, 0.30, 0.35)  # about one deviation over the world's frames
# What each action of world.action_poses changes from first to last frame (nods and laughs: there
# and back).
TURN, MOVE, CLOSER, NOD, LAUGH = 0.55, 0.50, 0.32, 1.80, 1.00


# ------------------------------------------------------------ the network, and what it reads


class HeadPoseEstimator(nn.Module):
    """Presence and pose of the head in a frame: (B, 3, 64, 64) in [-1, 1] -> (B, 7).

    Column 0 is the logit of "there is a face", columns 1-6 are the pose. Seven convolutions, four
    of them halving, then two linear layers that see where in the frame everything was. Made by
    `python -m toy.pretrain head_pose`. Raises ValueError for frames of another size.
    """

    STRIDES = (2, 2, 1, 2, 1, 2, 1)

    def __init__(self, widths: Sequence[int] = (16, 32, 32, 48, 48, 64, 64), hidden: int = 64):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c, width, 3, stride, padding=1, bias=False)
            for c, width, stride in zip((3, *widths[:-1]), widths, self.STRIDES, strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.fc = nn.Linear(widths[-1] * (SIZE // 16) ** 2, hidden)
        self.out = nn.Linear(hidden, 7)

    def forward(self, frames: Tensor) -> Tensor:
        if frames.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"expected frames (B, 3, {SIZE}, {SIZE}), got {tuple(frames.shape)}; "
                             "this estimator knows the tiny world only")
        x = frames
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))                               # (B, widths[i], h, w)
        y = self.out(torch.relu(self.fc(x.flatten(1)))).float()         # (B, 7)
        pose = y.new_tensor(POSE_MIDDLE) + y[:, 1:] * y.new_tensor(POSE_SPREAD)
        return torch.cat([y[:, :1], pose], dim=1)


def load_head(path: str | Path) -> HeadPoseEstimator:
    """A HeadPoseEstimator from safetensors, frozen; its widths follow from the tensors."""
    with open_file(path) as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}
        names = [f"convs.{i}.weight" for i in range(len(HeadPoseEstimator.STRIDES))] + ["fc.weight"]
        *widths, hidden = ((stored.get(name) or [1])[0] for name in names)
        with torch.device("meta"):
            net = HeadPoseEstimator(widths, hidden)
        wanted = {k: list(t.shape) for k, t in net.state_dict().items() if t.is_floating_point()}
        for name in wanted.keys() | stored.keys():
            if stored.get(name) != wanted.get(name):
                raise ValueError(f"expected a head-pose estimator in {path}, with {name} of shape "
                                 f"{wanted.get(name)}, got {stored.get(name)}; "
                                 "`python -m toy.pretrain head_pose` makes one")
        tensors = {name: file.get_tensor(name).float() for name in wanted}
    counts = {name: torch.tensor(0) for name in net.state_dict() if name not in wanted}
    net.load_state_dict(tensors | counts, assign=True)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def read_heads(head: HeadPoseEstimator, video: Tensor) -> tuple[Tensor, Tensor]:
    """The head in every frame: (n, 3, F, 64, 64) -> found (n, F) bool, poses (n, F, 6)."""
    n, _, frames, _, _ = video.shape
    pictures = video.transpose(1, 2).flatten(0, 1)                      # (n * F, 3, 64, 64)
    out = torch.cat([head(part.clamp(-1, 1)) for part in pictures.split(256)])
    out = out.unflatten(0, (n, frames))                                 # (n, F, 7)
    return out[..., 0] > 0, out[..., 1:]


def read_action(poses: Tensor) -> Tensor:
    """What the head does: poses (n, F, 6) -> (n,) index into world.ACTIONS.

    Each action has one quantity, divided by what world.action_poses does: turns change yaw, steps
    x, coming closer the scale (mean of the last quarter of the frames less that of the first), a
    nod takes the pitch there and back (range less net change), a laugh opens and shuts the mouth
    (range). The largest wins; below half of its full size nothing happened: "stays still". A rule
    cannot learn the prompt's prejudices as a classifier could.
    """
    k = max(1, poses.shape[1] // 4)
    change = poses[:, -k:].mean(1) - poses[:, :k].mean(1)               # (n, 6)
    x, _, scale, yaw, _, _ = change.unbind(1)                           # each (n,)
    pitch, mouth = poses[..., 4], poses[..., 5]                         # each (n, F)
    back = (pitch.amax(1) - pitch.amin(1)) - (pitch[:, -1] - pitch[:, 0]).abs()
    evidence = {"turns left": -yaw / TURN, "turns right": yaw / TURN, "nods": back / NOD,
                "laughs": (mouth.amax(1) - mouth.amin(1)) / LAUGH,
                "moves to the left": -x / MOVE, "moves to the right": x / MOVE,
                "comes closer": scale / CLOSER, "stays still": torch.full_like(x, 0.5)}
    return torch.stack([evidence[name] for name in world.ACTIONS], dim=1).argmax(1)


# ------------------------------------------------------------ what it is trained on


def widened_poses(count: int, generator: torch.Generator) -> Tensor:
    """Poses of random moments of random actions, shaken, a third with any mouth: (B, 6).

    Generated heads combine what the world never does at once: columns must not predict each other.
    """
    g, device = generator, generator.device
    poses = world.action_poses(world.draw_actions(count, g), FRAMES, g)             # (B, F, 6)
    moment = torch.randint(FRAMES, (count,), generator=g, device=device)
    pose = poses[torch.arange(count, device=device), moment]                        # (B, 6)
    shake = torch.tensor([0.08, 0.04, 0.06, 0.20, 0.20, 0.0], device=device)
    pose = pose + shake * (torch.rand(count, 6, generator=g, device=device) * 2 - 1)
    u = torch.rand(2, count, generator=g, device=device)
    pose[:, 5] = torch.where(u[0] < 1 / 3, u[1], pose[:, 5])
    return pose


def without_head(pictures: Tensor, boxes: Tensor, setting: Tensor, generator: torch.Generator
                 ) -> Tensor:
    """Pictures (B, 3, h, w) that show no face any more, in five ways that take turns.

    The empty scene; the head (box (B, 4), hair included) painted over by the scene, by noise or by
    a smear of itself; noise that hides nearly everything.
    """
    g, device = generator, pictures.device
    c = world.Canvas(len(pictures), SIZE, device)
    world.paint_background(c, setting[:, 0])
    light = world.pick_color_index(world.LIGHTS, setting[:, 1])[:, :, None, None]
    empty = (c.rgb * light).clamp(0, 1) * 2 - 1                                     # (B, 3, h, w)
    x0, y0, x1, y1 = boxes.unbind(1)
    w, h = (x1 - x0) * 0.3, (y1 - y0) * 0.3
    hair = torch.stack([x0 - w, y0 - h, x1 + w, y1], 1)[:, None]                    # (B, 1, 4)
    head = world.box_mask(hair, SIZE)[:, :, 0]                                      # (B, 1, h, w)
    noise = torch.randn(pictures.shape, generator=g, device=device) * 0.6
    smear = nnf.avg_pool2d(nnf.pad(pictures, (12, 12, 12, 12), mode="replicate"), 25, 1)
    weight = 0.85 + 0.15 * torch.rand(len(pictures), 1, 1, 1, generator=g, device=device)
    ways = [empty, torch.lerp(pictures, empty, head), torch.lerp(pictures, noise, head),
            torch.lerp(pictures, smear, head), torch.lerp(pictures, noise, weight)]
    place = torch.arange(len(pictures), device=device)
    return torch.stack(ways)[place % len(ways), place].clamp(-1, 1)


def head_views(person: Tensor, vae: VideoVAE, generator: torch.Generator, precision: str
               ) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, h, w) as soft as generated ones, poses (B, 6), presence (B,).

    Every fourth shows no face; every second went through the VAE as a clip of one frame.
    """
    B, place = len(person), torch.arange(len(person), device=person.device)
    pose, setting = widened_poses(B, generator), world.draw_settings(B, generator)
    video, boxes, _ = world.render(person, setting, pose[:, None], SIZE)
    pictures, present, coded = video[:, :, 0], place % 4 != 3, place % 8 < 4
    gone = ~present
    pictures[gone] = without_head(pictures[gone], boxes[gone, 0], setting[gone], generator)
    with torch.no_grad(), autocast(person.device.type, precision):
        seen = vae.decode(vae.encode(pictures[coded][:, :, None]))                  # (b, 3, 1, ...)
        pictures[coded] = seen[:, :, 0].float()
    return degrade(pictures, generator), pose, present


def head_loss(net: nn.Module, pictures: Tensor, pose: Tensor, present: Tensor) -> Tensor:
    """Cross-entropy of presence, and squared errors of the pose in its spreads where it is."""
    out = net(pictures)                                                             # (B, 7)
    error = ((out[:, 1:] - pose) / out.new_tensor(POSE_SPREAD)).square().mean(1)    # (B,)
    missed = nnf.binary_cross_entropy_with_logits(out[:, 0], present.float())
    return missed + (error * present).sum() / present.sum()


# ------------------------------------------------------------ the stage


def head_stage(args: argparse.Namespace, device: str) -> None:
    """Train on people drawn anew in every step -> weights/tiny/head_pose.safetensors."""
    torch.manual_seed(args.seed + 2000)
    checkpoint = WEIGHTS / "model.safetensors"
    # Not VideoVAE.load: this VAE's random start comes before the network's, whose seed it shares.
    vae = VideoVAE(read_metadata(checkpoint)["config"]["vae"])
    load_weights(vae, checkpoint, "vae.", torch.float32, device).eval().requires_grad_(False)
    net = HeadPoseEstimator().to(device)
    parts = split_parameters(dict(net.named_parameters()), ("convs.0", "out"))
    optimizer = MuonAdamW(*parts, lr_matrix=3e-3, lr_other=2e-3, precision=args.precision)
    run = Run(RUNS / "head_pose", floats(net), optimizer, EMA({}))
    loss_fn = torch.compile(head_loss) if args.compile else head_loss
    for step in run.steps(args.steps, args.minutes, args.batch, "head_pose"):
        g = seeded(args.seed, step, 5, device=device)
        person = torch.rand(args.batch, len(world.TRAITS), generator=g, device=device)
        loss = loss_fn(net, *head_views(person, vae, g, args.precision))
        descend(run, step, loss, schedule(step, args.steps), f"people drawn with seed {args.seed}")
        run.record(loss=loss.item())
    tensors = {name: t.float().contiguous() for name, t in floats(net).items()}
    atomic_write(WEIGHTS / "head_pose.safetensors", lambda path: save_file(tensors, path))
    for name, value in check_head(net, vae, args.precision, device).items():
        print(f"head_pose, {name}: {value}")


@torch.no_grad()
def check_head(net: HeadPoseEstimator, vae: VideoVAE, precision: str, device: str
               ) -> dict[str, float]:
    """On unseen people: mean error of each pose number, accuracy of presence, and `read_action` on
    true clips and on those that went through the VAE."""
    net.eval()
    g, person = seeded(9, device=device), world.people("val", 256).to(device)
    pictures, pose, present = head_views(person, vae, g, precision)
    out = net(pictures)                                                             # (256, 7)
    error = (out[present, 1:] - pose[present]).abs().mean(0)
    report = {f"mean error of {name}": value
              for name, value in zip(POSE_NAMES, error.tolist(), strict=True)}
    report["presence accuracy"] = ((out[:, 0] > 0) == present).float().mean().item()
    actions = torch.arange(256, device=device) % len(world.ACTIONS)
    setting, poses = world.draw_settings(256, g), world.action_poses(actions, FRAMES, g)
    video, _, _ = world.render(person, setting, poses, SIZE)
    coded = torch.cat([vae.decode(vae.encode(v)).clamp(-1, 1) for v in video.split(16)])
    for name, clips in (("true clips", video), ("true clips through the VAE", coded)):
        found, poses = read_heads(net, clips)
        report[f"faces found in {name}"] = found.float().mean().item()
        report[f"actions read in {name}"] = (read_action(poses) == actions).float().mean().item()
    return {name: round(value, 4) for name, value in report.items()}
