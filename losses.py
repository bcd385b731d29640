# SPDX-License-Identifier: MIT
# From "ST-DRC, line by line", an independent implementation of arXiv 2606.02441.
"""What the model is paid for: matching the flow, the flow on the face, and looking like the person.

The plain diffusion loss averages over every token of the video. A face covers perhaps a tenth of
them, and the part of it that says WHO this is covers less, so a wrong identity costs almost
nothing. Two terms put the weight back:

    L_fm    the flow-matching loss on all video tokens
    L_face  the same error, averaged over the face tokens only: it does not depend on their number
    L_id    1 - cos(E(face of the decoded clean estimate), E(reference)), E a frozen recogniser
    L       = L_fm + w_face * L_face + w_id * L_id

paper:       face-guided identity objectives, more than one, because identity is diluted in the
             diffusion loss (ST-DRC, arXiv 2606.02441, abstract: reference-robust identity
             enhancement). No formula, no weights.
our reading: these two terms. L_face with w_face = 1 equals, on average, ConsisID's trainer, which
             swaps the plain loss for a mask-normalised one half of the time. L_id on the decoded
             one-step estimate follows PuLID and a published LTX-2.3 identity LoRA.
LTX-2.3:     the noise path, the velocity target, and the causal VAE that decides how a mask is
             pooled.

Conventions. Noise level s: 1 = noise, 0 = data; x_s = (1 - s) x0 + s noise; v = noise - x0; so
x0 = x_s - s v. Tokens are (B, L, C), video only. Masks: 1 = counts, 0 = does not. A sample without
a face must leave an average, not enter it as a zero, which would say "perfect face".

Usage:
    import torch
    from losses import (add_noise, clean_estimate, crop_faces, face_weighted_loss,
                        flow_matching_loss, identity_loss, pool_face_mask, total_loss)
    x0, noise, s = torch.rand(2, 12, 8), torch.randn(2, 12, 8), torch.tensor([0.3, 0.8])
    x_s, v = add_noise(x0, noise, s)                     # v_hat: what the model makes of x_s
    v_hat, mask = v + 0.1, pool_face_mask(torch.rand(2, 17, 64, 64), 8, 32)          # (2, 12)
    frames, boxes = torch.rand(2, 3, 64, 64), torch.tensor([[8, 8, 40, 40]] * 2)     # decoded
    embed = lambda x: x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True)          # recogniser
    faces = crop_faces(frames, boxes, size=16)
    identity = identity_loss(embed, faces, embed(faces.flip(0)), valid=s <= 0.5)
    loss = total_loss(flow_matching_loss(v_hat, v), face_weighted_loss(v_hat, v, mask), identity)

Read next: guidance.py
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# our reading: above this noise level the one-step estimate is a blur with no face in it to
# recognise, and the gradient of L_id is noise. The caller clears `valid` for such samples.
IDENTITY_MAX_SIGMA = 0.5


def add_noise(x0: Tensor, noise: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy sample x_s = (1 - s) x0 + s noise, and the velocity v = noise - x0 to predict.

    LTX-2.3: a straight line from data to noise. x0, noise (B, L, C); s as in `clean_estimate`.
    """
    s = _per_sample(s, x0)                                                # (B, 1, 1)
    return (1 - s) * x0 + s * noise, noise - x0


def clean_estimate(x_s: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """x0 = x_s - s v, the picture the model believes in after one look.

    LTX-2.3: the conversion its sampler uses, in float32. x_s, v of one shape, (B, L, C) or any
    other; s (B,), or with as many axes as x_s: (B, 1, 1), or per token (B, L, 1). Raises
    ValueError for any other s, since (B, L) would broadcast along the wrong axes without a word.
    """
    return x_s.float() - _per_sample(s, x_s).float() * v.float()


def flow_matching_loss(v_pred: Tensor, v_target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared velocity error per sample, then over the batch.

    LTX-2.3: per sample mean(err^2 * mask) / mean(mask), so that a sample with many masked tokens
    counts as much as any other. v_pred, v_target (B, L, C); mask (B, L): 1 where the token was
    noised, 0 on clean tokens, whose velocity nobody asks for. Each sample needs at least one
    counted token. Raises ValueError when the shapes differ.
    """
    error = _token_error(v_pred, v_target)                                # (B, L)
    if mask is None:
        return error.mean()
    mask = mask.to(error)
    return ((error * mask).mean(dim=1) / mask.mean(dim=1)).mean()


def pool_face_mask(mask: Tensor, time_scale: int, space_scale: int) -> Tensor:
    """Face mask per pixel -> share of face per latent token, in token order.

    our reading: area pooling, so a cell half covered counts half. LTX-2.3: the VAE is causal,
    latent frame 0 holds pixel frame 0 alone and every later one `time_scale` frames; plain pooling
    by `time_scale` would be out of step by almost a latent frame and weight the place where the
    face was. mask (B, 1 + time_scale * k, h, w) in [0, 1] -> (B, L), L = (1 + k) * (h /
    space_scale) * (w / space_scale). Raises ValueError when sizes do not divide.
    """
    _, frames, h, w = mask.shape                                          # (B, frames, h, w)
    if (frames - 1) % time_scale or h % space_scale or w % space_scale:
        raise ValueError(f"expected 1 + {time_scale}k frames and sides divisible by {space_scale}, "
                         f"got {frames} frames of {h}x{w}; crop the clip first")
    cells = F.avg_pool2d(mask.float(), space_scale)                       # (B, frames, H, W)
    first, rest = cells[:, :1], cells[:, 1:]
    if frames > 1:
        rest = rest.unflatten(1, (-1, time_scale)).mean(dim=2)            # (B, k, H, W)
    return torch.cat([first, rest], dim=1).flatten(1)                     # (B, L)


def face_weighted_loss(
    v_pred: Tensor, v_target: Tensor, face_mask: Tensor, eps: float = 1e-6
) -> Tensor:
    """Velocity error of the face: sum m err^2 / (sum m + eps), mean over samples with a face.

    paper: face-guided objective against the dilution of identity. our reading: this formula, after
    ConsisID. v_pred, v_target (B, L, C); face_mask (B, L) in [0, 1] from `pool_face_mask`. The
    squared error is a mean over channels, so L_face has the size of L_fm. With no face in the
    batch it is 0 but still part of the graph, so that .backward() works and distributed workers
    stay in step. Raises ValueError when the shapes differ.
    """
    error = _token_error(v_pred, v_target)                                # (B, L)
    face_mask = face_mask.to(error)
    total = face_mask.sum(dim=1)                                          # (B,)
    per_sample = (error * face_mask).sum(dim=1) / (total + eps)           # (B,)
    return _mean_over(per_sample, total > 0)


def crop_faces(frames: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each frame's face box out and resize it to size x size; gradients reach the pixels.

    our reading: fixed boxes from the data; a detector would not be differentiable, and would miss
    on half-denoised frames. frames (B, 3, h, w) in [-1, 1]; boxes (B, 4) as left, top, right,
    bottom in pixels, edges not centres: the whole frame is (0, 0, w, h). Give square boxes, others
    are stretched. Bilinear, border repeated, no low-pass: a box over twice `size` wide aliases.
    Returns (B, 3, size, size). Raises ValueError on bad shapes.
    """
    B, _, h, w = frames.shape
    if boxes.shape != (B, 4):
        raise ValueError(f"expected boxes of shape ({B}, 4), got {tuple(boxes.shape)}; "
                         "give one box for each frame")
    # float32: bfloat16 cannot place a box
    frames, boxes = frames.float(), boxes.to(frames.device, torch.float32)
    left, top, right, bottom = boxes[:, :, None].unbind(dim=1)            # (B, 1) each
    middle = (torch.arange(size, device=frames.device) + 0.5) / size      # (size,) from 0 to 1
    # align_corners=False: -1 is the outer edge of the first pixel, which is why boxes count edges.
    x = (left + (right - left) * middle) * 2 / w - 1                      # (B, size)
    y = (top + (bottom - top) * middle) * 2 / h - 1                       # (B, size)
    x, y = x[:, None, :].expand(B, size, size), y[:, :, None].expand(B, size, size)
    grid = torch.stack([x, y], dim=-1)                                    # (B, size, size, 2)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False)


def identity_loss(
    embed: Callable[[Tensor], Tensor], faces: Tensor, reference_embedding: Tensor, valid: Tensor
) -> Tensor:
    """1 - cosine between the generated face and the reference, mean over the valid samples.

    paper: face-guided identity objective. our reading: this formula, after PuLID. `embed` is the
    frozen recogniser, (B, 3, size, size) in [-1, 1] -> unit vectors (B, E); freeze its weights but
    do not wrap it in no_grad: the gradient must pass through it (and the VAE decoder) to the
    prediction. reference_embedding (B, E) comes from the UN-augmented reference. valid (B,) bool:
    has a face box and a noise level <= IDENTITY_MAX_SIGMA. Returns a scalar in [0, 2]; 0, still in
    the graph, when nothing is valid. Raises ValueError when the embeddings' shapes differ.
    """
    embedding = embed(faces)                                              # (B, E)
    if embedding.shape != reference_embedding.shape:
        raise ValueError(f"expected embeddings of one shape, got {tuple(embedding.shape)} against "
                         f"{tuple(reference_embedding.shape)}; use one network and size for both")
    # detach: the reference is the target; it must not move towards the prediction.
    cosine = F.cosine_similarity(embedding, reference_embedding.detach(), dim=-1)     # (B,)
    return _mean_over(1 - cosine, valid)


def total_loss(
    fm: Tensor, face: Tensor, identity: Tensor, w_face: float = 1.0, w_id: float = 0.1
) -> Tensor:
    """L = L_fm + w_face L_face + w_id L_id, three scalars -> one; a weight of 0 = off.

    paper: face-guided terms beside the diffusion loss. our reading: the sum and both weights.
    """
    return fm + w_face * face + w_id * identity


def _per_sample(s, x):
    if s.ndim == 1:
        s = s.view(-1, *[1] * (x.ndim - 1))                               # (B,) -> (B, 1, 1)
    if s.ndim != x.ndim:
        raise ValueError(f"expected s of shape (B,) or {x.ndim} axes, got {tuple(s.shape)}; "
                         "add axes of size 1")
    return s


def _token_error(v_pred, v_target):
    if v_pred.shape != v_target.shape:
        raise ValueError(f"expected prediction and target of one shape, got {tuple(v_pred.shape)} "
                         f"and {tuple(v_target.shape)}; drop the reference tokens first")
    return (v_pred.float() - v_target.float()).square().mean(dim=-1)      # (B, L, C) -> (B, L)


def _mean_over(values, counts):
    # where, not values * counts: a sample that does not count may be NaN, and 0 * NaN is NaN. No
    # Python branch on the data: it would break torch.compile and make a GPU wait.
    kept = torch.where(counts, values, torch.zeros_like(values))
    return kept.sum() / counts.sum().clamp_min(1)


def _demo() -> None:
    face = torch.ones(1, 1, 48, 48)
    frames = [F.pad(face, (8 + 4 * t, 72 - 4 * t, 24, 24)) for t in range(17)]  # it moves right
    mask = pool_face_mask(torch.cat(frames, dim=1), 8, 32)                # (1, 36), 3 x 3 x 4 cells
    print("A face moves right. Its share of the middle row of cells, latent frames 0, 1 and 2:")
    print(*mask.view(3, 3, 4)[:, 1].tolist(), sep="\n")
    # A model that sees somebody else in the face's tokens, and noise as it is everywhere.
    x0, noise = torch.randn(2, 1, 36, 16, generator=torch.Generator().manual_seed(0))
    other = torch.where(mask[..., None] > 0, -x0, x0)                     # (1, 36, 16)
    embed = lambda tokens: F.normalize(tokens.flatten(1))  # noqa: E731
    yes = torch.tensor([True])
    print("A model sees somebody else there:  sigma    L_fm  L_face    L_id")
    for s in (torch.tensor([x]) for x in (0.0, 0.25, 0.5, 0.75, 1.0)):
        (x_s, v), v_hat = add_noise(x0, noise, s), noise - other
        seen = clean_estimate(x_s, v_hat, s) * mask[..., None]
        terms = (flow_matching_loss(v_hat, v), face_weighted_loss(v_hat, v, mask),
                 identity_loss(embed, seen, embed(x0 * mask[..., None]), yes))
        print(f"{s.item():40.2f}" + "".join(f"{term.item():8.2f}" for term in terms))
    print("Notice: L_fm is diluted over all tokens, L_face is not; L_id is what the clean estimate")
    print("shows, so it counts up to sigma 0.5 only: above it a real model's estimate is a blur.")


if __name__ == "__main__":
    _demo()
