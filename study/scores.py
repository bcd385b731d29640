"""Every score of a generated clip: one number for each clip, from its pixels alone.

The idea. One cosine flatters: a recogniser calls a blur similar, and a model that pastes its
reference into the video scores best of all. So each part of the promise has a score of its own;
each can be computed for true clips as well, and each fails in its own way. our reading: all of
them. ST-DRC (arXiv 2606.02441) names no score, only what it wants: the person, and no copying.

E = evaluation encoder, a recogniser that supervised no training, on whole frames; H = head-pose
estimator (toy/head.py); P = pixels alone. five = frames 0 2 4 6 8 of nine; cosines are with the
reference.

  similarity  E H  five  mean cosine; a frame in which H finds no face counts 0
  top1        E H  five  1 if the clip's own reference is the nearest of all references
  look_alike  E H  five  1 if it is nearer than a look-alike's picture (another shape of face)
  found       H    all   share of frames in which a face is found
  drift       E H  five  cosine of frames 0 2 less that of frames 6 8: positive if the face is lost
  min_frame   E H  five  the smallest of the five cosines
  action      H    all   1 if the head moves as the prompt says (a rule on its poses)
  scene, light, shirt                 P  all  1 if the clip shows what the prompt says
  leak_scene, leak_light, leak_shirt  P  all  1 if it shows the reference's; NaN if both agree
  flicker     P H  all   change from frame to frame at the border, where nothing moves, 0..1

Of a whole set: `leaks` (pose, position, pixels) and `frechet`. Conventions: videos (n, 3, F, h, w)
and pictures (P, 3, h, w) in [-1, 1]; poses x, y, scale, yaw, pitch, mouth as in toy/world.py.

    scores = per_clip(video, data, load_facenet("encoder.safetensors"), load_head("h.safetensors"))
    mean, half_width = summarise(scores["similarity"])

Read next: study/evaluate.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clips.face import FaceNet
from toy import world
from toy.head import MOVE, HeadPoseEstimator, read_action, read_heads
from toy.traits import WEARS_GLASSES, TraitReader, read_traits

SCORES = ("similarity", "top1", "look_alike", "found", "drift", "min_frame", "action", "scene",
          "light", "shirt", "leak_scene", "leak_light", "leak_shirt", "flicker")
# The shape that faces are told apart by, as far as an early reader of this world saw it lost.
EIGHT = ("face_width", "jaw", "eye_gap", "eye_size", "eye_tilt", "mouth_width", "lip_size",
         "brow_angle")
HAIR_REACH = 0.80  # hair ends nearer to the head's middle than this, in units of the pose's scale
# Student's t, two-sided 95 %, for 1..29 degrees of freedom
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
           2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
           2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)
NORMAL = 1.960


# ------------------------------------------------------------ head, setting, flicker


def fill_lost(found: Tensor, poses: Tensor) -> Tensor:
    """Frames without a face take the pose of the nearest that has one: found (n, F), (n, F, 6)."""
    moment = torch.arange(found.shape[1], device=found.device)
    lost = torch.where(found, 0.0, torch.inf)[:, None]                  # (n, 1, F)
    nearest = ((moment[:, None] - moment).abs() + lost).argmin(2)       # (n, F)
    return poses.gather(1, nearest[..., None].expand_as(poses))


def lit_backgrounds(size: int) -> Tensor:
    """Every empty scene under every light, (scenes, lights, 3, size, size) in [0, 1]."""
    c = world.Canvas(len(world.SCENES), size, torch.device("cpu"))
    world.paint_background(c, torch.arange(len(world.SCENES)))
    lights = torch.tensor(list(world.LIGHTS.values()))
    return (c.rgb[:, None] * lights[None, :, :, None, None]).clamp(0, 1)


def border(size: int) -> Tensor:
    """The left and right tenth of the frame, above the shoulders: (size, size) bool."""
    edge, high = size // 10, int(0.7 * size)
    out = torch.zeros(size, size, dtype=torch.bool)
    out[:high, :edge] = out[:high, -edge:] = True
    return out


def read_setting(video: Tensor) -> Tensor:
    """What the pixels show: (n, 3, F, h, w) in [-1, 1] -> (scene, light, shirt) indices (n, 3).

    Scene and light: the nearest of all lit empty scenes at the border, where hair and hands rarely
    are. Shirt: the bottom middle against each shirt under the light that was found.
    """
    size = video.shape[-1]
    rgb = (video.clamp(-1, 1) + 1) / 2
    where = border(size)
    templates = lit_backgrounds(size)[:, :, :, where]                   # (scenes, lights, 3, p)
    seen = rgb.median(dim=2).values[:, :, where]                        # (n, 3, p), over time
    distance = torch.stack([(s - templates).abs().mean((2, 3)) for s in seen])
    best = distance.flatten(1).argmin(1)                                # (n,) of scenes * lights
    scene, light = best // len(world.LIGHTS), best % len(world.LIGHTS)
    middle, half = size // 2, size // 10
    patch = rgb[:, :, :, -size // 16:, middle - half:middle + half].mean((2, 3, 4))     # (n, 3)
    lights, shirts = (torch.tensor(list(t.values())) for t in (world.LIGHTS, world.SHIRTS))
    lit = (lights[light][:, None] * shirts[None]).clamp(0, 1)           # (n, shirts, 3)
    return torch.stack([scene, light, (patch[:, None] - lit).abs().mean(2).argmin(1)], dim=1)


def flicker(video: Tensor, found: Tensor, poses: Tensor) -> Tensor:
    """Mean absolute change between neighbouring frames where nothing moves, in 0..1: (n,).

    video (n, 3, F, h, w), found (n, F), poses (n, F, 6). Of the border, what hair may reach in
    either frame is left out; NaN if that leaves nothing, or if there is one frame only.
    """
    size = video.shape[-1]
    change = ((video[:, :, 1:] - video[:, :, :-1]).abs() / 2).mean(1)   # (n, F-1, h, w)
    x = (torch.arange(size) + 0.5) / size * 2 - 1
    free = (x - poses[..., :1]).abs() > HAIR_REACH * poses[..., 2:3] + world.EDGE       # (n, F, w)
    free = free | ~found[..., None]
    still = (free[:, 1:] & free[:, :-1])[:, :, None] & border(size)     # (n, F-1, h, w)
    return (change * still).sum((1, 2, 3)) / still.sum((1, 2, 3))       # 0 / 0 is NaN


# ------------------------------------------------------------ scores of each clip


def five(frames: int) -> Tensor:
    """Which frames the identity is read from: five, evenly from first to last."""
    return torch.linspace(0, frames - 1, 5).round().long()


@torch.no_grad()
def embed_clips(eval_encoder: FaceNet, video: Tensor) -> Tensor:
    """The encoder's vectors of five frames of each clip: (n, 3, F, h, w) -> (n, 5, E)."""
    frames = video[:, :, five(video.shape[2])].transpose(1, 2)          # (n, 5, 3, h, w)
    vectors = torch.cat([eval_encoder(part.flatten(0, 1)) for part in frames.split(16)])
    return vectors.unflatten(0, (len(video), 5))                        # (n, 5, E)


def check_data(video: Tensor, data: dict[str, Tensor], names: dict[str, tuple]) -> None:
    """Raises ValueError unless `data` has every name, a row per clip and these further axes."""
    for name, rest in names.items():
        want, got = (len(video), *rest), tuple(data[name].shape) if name in data else None
        if got != want:
            raise ValueError(f"expected {name} of shape {want} in the test data, got {got}; "
                             "one row for each clip")


@torch.no_grad()
def identity_scores(video: Tensor, found: Tensor, data: dict[str, Tensor],
                    eval_encoder: FaceNet) -> dict[str, Tensor]:
    """Similarity, top1, look_alike, drift and min_frame, each (n,); found (n, F)."""
    who = data["who"]
    seen = found[:, five(found.shape[1])]                               # (n, 5)
    vectors = embed_clips(eval_encoder, video) * seen[..., None]        # no face: cosine 0 to all
    references, alike = eval_encoder(data["references"]), eval_encoder(data["alike"])   # (P, E)
    own = torch.einsum("nfe,ne->nf", vectors, references[who])          # (n, 5)
    other = torch.einsum("nfe,ne->nf", vectors, alike[who]).mean(1)     # (n,)
    nearest = (vectors.mean(1) @ references.T).argmax(1)
    any_face = seen.any(1)
    return {"similarity": own.mean(1), "top1": ((nearest == who) & any_face).float(),
            "look_alike": ((own.mean(1) > other) & any_face).float(),
            "drift": own[:, :2].mean(1) - own[:, 3:].mean(1), "min_frame": own.amin(1)}


def per_clip(video: Tensor, data: dict[str, Tensor], eval_encoder: FaceNet,
             head: HeadPoseEstimator) -> dict[str, Tensor]:
    """All of SCORES for clips (n, 3, F, 64, 64): name -> (n,), NaN where a score does not apply.

    data: who (n,) row of the person that each clip should show, references and alike (P, 3, h, w),
    setting and ref_setting (n, 3) of prompt and reference picture, action (n,) of the prompt. A
    clip in which fewer than half of the frames show a face has the wrong action.
    """
    check_data(video, data, {"who": (), "setting": (3,), "ref_setting": (3,), "action": ()})
    video = video.float().clamp(-1, 1)
    found, poses = read_heads(head, video)
    share = found.float().mean(1)                                       # (n,)
    out = identity_scores(video, found, data, eval_encoder) | {"found": share}
    moved = read_action(fill_lost(found, poses)) == data["action"]
    out["action"] = (moved & (share >= 0.5)).float()
    shown, asked, ref = read_setting(video), data["setting"], data["ref_setting"]       # (n, 3)
    for i, name in enumerate(("scene", "light", "shirt")):
        out[name] = (shown[:, i] == asked[:, i]).float()
        leak = (shown[:, i] == ref[:, i]).float()
        out[f"leak_{name}"] = torch.where(asked[:, i] == ref[:, i], torch.nan, leak)
    out["flicker"] = flicker(video, found, poses)
    return {name: out[name] for name in SCORES}


# ------------------------------------------------------------ scores of a whole set


def correlation(a: Tensor, b: Tensor) -> float:
    """Mean over columns of Pearson's correlation: a, b (n, k). NaN for fewer than 3 rows."""
    if len(a) < 3:
        return math.nan
    a, b = a.double() - a.double().mean(0), b.double() - b.double().mean(0)
    return ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)).mean().item()


def before_action(start: Tensor, action: Tensor) -> Tensor:
    """Poses (n, 6) of first frames, less the start that action_poses gives each action (n,)."""
    start = start.clone()
    for name, column, offset in (("moves to the left", 0, MOVE / 2),
                                 ("moves to the right", 0, -MOVE / 2), ("comes closer", 2, -0.20)):
        start[:, column] -= offset * (action == world.ACTIONS.index(name))
    return start


def leaks(video: Tensor, data: dict[str, Tensor],
          head: HeadPoseEstimator) -> dict[str, tuple[float, float]]:
    """What of the reference shows in frame 0, as (leak, its chance level); 1 is a perfect copy.

    pose: correlation over clips of the reference's yaw and pitch with those of frame 0 (mean of
    the two); position: the same of x, y and scale, less the start that the prompt's action asks
    for. Frames without a face are left out; chance is the mean over 200 permutations of the
    references. One correlation of n clips strays by 1 / sqrt(n).
    pixels: mean over clips of the correlation of all pixels of frame 0 with the own reference;
    chance: with everybody else's. Hair and skin of one person correlate without any copying, so
    compare it with the true clips' number.
    data as for per_clip, and ref_pose (n, 6), the head's pose in the clip's reference picture.
    """
    check_data(video, data, {"who": (), "action": (), "ref_pose": (6,)})
    found, poses = read_heads(head, video[:, :, :1].float())
    start = before_action(poses[:, 0], data["action"])                  # (n, 6)
    start, ref = start[found[:, 0]], data["ref_pose"][found[:, 0]]
    g = torch.Generator().manual_seed(0)
    shuffles = [torch.randperm(len(ref), generator=g) for _ in range(200)]
    out = {}
    for name, columns in (("pose", [3, 4]), ("position", [0, 1, 2])):
        a, b = ref[:, columns], start[:, columns]
        chance = [correlation(a[p], b) for p in shuffles]
        out[name] = (correlation(a, b), sum(chance) / len(chance))
    return out | {"pixels": pixel_leak(video[:, :, 0], data["references"], data["who"])}


def pixel_leak(frames: Tensor, references: Tensor, who: Tensor) -> tuple[float, float]:
    """Mean correlation of frames (n, 3, h, w) with their own of the references (P, 3, h, w), and
    with the others'."""
    table = _centred(frames) @ _centred(references).T                   # (n, P)
    own = table.gather(1, who[:, None])[:, 0]
    others = (table.sum(1) - own) / max(len(references) - 1, 1)
    return own.mean().item(), others.mean().item() if len(references) > 1 else math.nan


def _centred(pictures: Tensor) -> Tensor:
    """Pictures (n, 3, h, w) -> (n, 3 h w) without their mean and of length 1: products of two are
    their correlation."""
    flat = pictures.float().flatten(1)
    return torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of vectors a (n, E), b (m, E), each taken as a Gaussian.

    |ma - mb|^2 + tr(A + B - 2 (AB)^(1/2)) for means m and covariances A, B, in float64: the
    squared 2-Wasserstein distance. Few vectors make it larger (with n near E the covariances are
    poor), so compare sets of equal size, and give the number for two halves of true clips too.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected vectors (n, E) and (m, E), two or more each, got "
                         f"{tuple(a.shape)} and {tuple(b.shape)}; flatten clips and frames first")
    a, b = a.double(), b.double()
    def covariance(x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return x.T @ x / (len(x) - 1)
    A, B = covariance(a), covariance(b)                                 # (E, E) each
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T             # A^(1/2)
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()  # eigenvalues of AB
    value = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return max(0.0, value.item())


# ------------------------------------------------------------ the face, trait by trait


@torch.no_grad()
def face_scores(video: Tensor, data: dict[str, Tensor], reader: TraitReader
                ) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the trait reader sees in clips (n, 3, F, 64, 64): scores of each clip, and of the set.

    Of each clip, (n,): traits_top1, 1 if among all people of `person` (P, 22) the clip's own is the
    nearest to what is read, each trait in its reader's error; eyes, share of frames whose two eyes
    are there and alike. Of the set: the correlation of each trait, read as a mean over frames, with
    the truth, and the means of the three kinds; glasses' colour counts where glasses are worn.
    """
    read, eyes = read_traits(reader, video)                             # (n, F, 22), (n, F)
    read, person, who = read.mean(dim=1), data["person"], data["who"]
    far = ((read[:, None] - person) / reader.error).square().sum(dim=2)             # (n, P)
    each = {"traits_top1": (far.argmin(dim=1) == who).float(), "eyes": eyes.float().mean(dim=1)}
    truth, whole = person[who], {}
    worn = truth[:, world.TRAITS.index("glasses")] > WEARS_GLASSES
    for i, name in enumerate(world.TRAITS):
        shown = worn if name == "glasses_color" else torch.ones_like(worn)
        whole[name] = correlation(read[shown, i], truth[shown, i])
    for kind, names in (("colors", world.COLORS), ("attributes", world.ATTRIBUTES),
                        ("shape", world.SHAPE), ("eight", EIGHT)):
        whole[kind] = sum(whole[name] for name in names) / len(names)
    return each, whole


def shows_reference(video: Tensor, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of the reference a clip shows, whatever the prompt says; each (n,).

    ref_scene, ref_light, ref_shirt: 1 if it is the reference's; chance: one out of the choices.
    ref_pixels: how much better all pixels of frame 0 correlate with the reference than with
    `another` (P, 3, h, w) picture of the same person in another setting. The person is the same in
    both, so 0 = nothing is copied, for true clips too, unless reference and clip share a setting.
    """
    same = (read_setting(video) == data["ref_setting"]).float()         # (n, 3)
    who, frames = data["who"], _centred(video[:, :, 0])                 # (n,), (n, 3 h w)
    apart = _centred(data["references"][who]) - _centred(data["another"][who])
    return dict(zip(("ref_scene", "ref_light", "ref_shirt"), same.T, strict=True)) | {
        "ref_pixels": (frames * apart).sum(1)}


# ------------------------------------------------------------ intervals


def summarise(values: Tensor) -> tuple[float, float]:
    """Mean and 95 % half width over clips, values (n,), normal approximation; NaN is left out.

    The half width is NaN for a single value, both are NaN for none.
    """
    kept = values[~values.isnan()].double()
    mean = kept.mean().item() if len(kept) else math.nan
    return mean, NORMAL * (kept.std() / len(kept) ** 0.5).item() if len(kept) > 1 else math.nan


def mean_interval(x: Sequence[float]) -> tuple[float, float]:
    """Mean and 95 % half width over runs, NaN for a single run.

    Student's t: for the usual three seeds the factor is 4.303 and not 1.960.
    """
    n = len(x)
    if n == 0:
        raise ValueError("expected one run or more, got none; finish a run first")
    mean = math.fsum(x) / n
    if n == 1:
        return mean, math.nan
    t = STUDENT[n - 2] if n - 2 < len(STUDENT) else NORMAL
    return mean, t * math.sqrt(math.fsum((v - mean) ** 2 for v in x) / (n - 1) / n)
