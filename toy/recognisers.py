"""Two recognisers of the world's people: one supervises the training, the other only evaluates.

The idea. A recogniser maps a picture to a vector, so that two pictures of one person lie closer
than pictures of two. It learns from pairs: the same person in two settings, moments and qualities,
among a batch of others, each of which has its look-alike beside it. The look-alike, who differs in
the shape of the face alone, and pairs across settings are what makes it look at the face; pairs
from one clip would teach it backgrounds, other people without look-alikes the colour of hair.

The failure this prevents: a score by the very network that was trained on. So there are two of
them, which see other people, have other widths and start from other weights:

    face          crops around the face box, as ArcFace sees them; the identity loss of train.py
    eval_encoder  whole frames, since a generated video comes without a box; study/scores.py alone

our reading: both, and all sizes; ST-DRC (arXiv 2606.02441) does not name its recogniser.

Conventions. Pictures (B, 3, h, w) in [-1, 1], boxes (B, 4) in pixels, people (B, T) as in world.py.

    python -m toy.pretrain face
    python -m toy.pretrain eval_encoder

Read next: toy/head.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file
from torch import Tensor, nn

from clips.face import FaceNet, square
from common.files import atomic_write
from common.seeds import seeded
from losses import crop_faces
from toy import world
from toy.config import FRAMES, RUNS, SIZE
from training.optim import EMA, MuonAdamW, schedule, split_parameters
from training.run import Run, descend
from training.workers import autocast


def degrade(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Random blur and noise, as in generated frames: what is read must not be crisp pixels."""
    B, device = len(pictures), pictures.device
    u = torch.rand(2, B, 1, 1, 1, generator=generator, device=device)
    blurred = nnf.avg_pool2d(nnf.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1)
    noise = torch.randn(pictures.shape, generator=generator, device=device)
    return (torch.lerp(pictures, blurred, u[0] * 0.8) + 0.10 * u[1] * noise).clamp(-1, 1)


def face_views(person: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A picture of each person (B, T) at a random moment of a random action in a random setting.

    Returns pictures (B, 3, 64, 64) and face boxes (B, 4).
    """
    B = len(person)
    poses = world.action_poses(world.draw_actions(B, generator), FRAMES, generator)  # (B, F, 6)
    moment = torch.randint(FRAMES, (B,), generator=generator, device=person.device)
    pose = poses[torch.arange(B, device=person.device), moment][:, None]            # (B, 1, 6)
    video, boxes, _ = world.render(person, world.draw_settings(B, generator), pose, SIZE)
    return degrade(video[:, :, 0], generator), boxes[:, 0]


def contrastive_loss(net: nn.Module, first: Tensor, second: Tensor, temperature: float = 0.1
                     ) -> Tensor:
    """InfoNCE: each picture must find its person's other picture among everyone's, both ways."""
    a, b = net(torch.cat([first, second])).chunk(2)                                 # (B, E) each
    scores = a @ b.T / temperature                                                  # (B, B)
    target = torch.arange(len(a), device=a.device)
    return (nnf.cross_entropy(scores, target) + nnf.cross_entropy(scores.T, target)) / 2


def floats(net: nn.Module) -> dict[str, Tensor]:
    """Weights and running statistics, but not the number of batches that BatchNorm counts."""
    return {name: t for name, t in net.state_dict().items() if t.is_floating_point()}


def recogniser_stage(args: argparse.Namespace, device: str) -> None:
    """Train the recogniser that args.stage names -> runs/<stage>.safetensors, in bf16."""
    whole_frames = args.stage == "eval_encoder"
    torch.manual_seed(args.seed + (1000 if whole_frames else 0))
    widths = (20, 28, 56, 96, 160) if whole_frames else (16, 24, 48, 96, 128)
    net = FaceNet((1, 1, 2, 1), widths, embedding=128, size=SIZE).to(device)
    parts = split_parameters(dict(net.named_parameters()), ("net.conv1", "fc", "prelu"))
    optimizer = MuonAdamW(*parts, lr_matrix=2e-3, lr_other=1e-3, precision=args.precision)
    run = Run(RUNS / args.stage, floats(net), optimizer, EMA({}))
    loss_fn = torch.compile(contrastive_loss) if args.compile else contrastive_loss
    for step in run.steps(args.steps, args.minutes, args.batch, args.stage):
        g = seeded(args.seed, step, 4 if whole_frames else 3, device=device)
        person = torch.rand(args.batch // 2, len(world.TRAITS), generator=g, device=device)
        person = torch.cat([person, world.look_alikes(person, g)])                  # (B, T)
        views = []
        for _ in range(2):
            pictures, boxes = face_views(person, g)
            shake = torch.rand(len(boxes), 4, generator=g, device=device) * 4 - 2  # as real boxes
            views.append(pictures if whole_frames
                         else crop_faces(pictures, square(boxes + shake), SIZE))
        with autocast(device, args.precision):
            loss = loss_fn(net, *views)
        descend(run, step, loss, schedule(step, args.steps), f"people drawn with seed {args.seed}")
        run.record(loss=loss.item())
    tensors = {name: t.bfloat16().contiguous() for name, t in floats(net).items()}
    atomic_write(RUNS / f"{args.stage}.safetensors", lambda path: save_file(tensors, path))
    print(f"{args.stage}: top-1 and look-alike accuracy among 256 unseen people: "
          f"{check_recogniser(net, whole_frames, device)}")


@torch.no_grad()
def check_recogniser(net: FaceNet, whole_frames: bool, device: str) -> tuple[float, float]:
    """On people of the validation split in two settings: the share that is found first among all,
    and the share that beats its look-alike."""
    net.eval()
    g = seeded(9, device=device)
    person = world.people("val", 256).to(device)

    def embed(people: Tensor) -> Tensor:
        pictures, boxes = face_views(people, g)
        return net(pictures if whole_frames else crop_faces(pictures, square(boxes), SIZE))
    a, b, other = embed(person), embed(person), embed(world.look_alikes(person, g))  # (P, E) each
    top1 = (a @ b.T).argmax(1) == torch.arange(len(a), device=device)
    nearer = (a * b).sum(1) > (a * other).sum(1)
    return round(top1.float().mean().item(), 3), round(nearer.float().mean().item(), 3)
