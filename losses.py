"""What the model is paid for: matching the flow, matching it on the face, and looking like the person.

The plain diffusion loss averages over every token of the video. A face covers perhaps a tenth of them, and the part of
it that says WHO this is covers less, so a wrong identity costs almost nothing. Two terms put the weight back:

    L_fm    the flow-matching loss on all video tokens
    L_face  the same error, averaged over the face tokens only, so that its size does not depend on the face's size
    L_id    1 - cos(E(face of the decoded clean estimate), E(reference)), E a frozen face-recognition network
    L       = L_fm + w_face * L_face + w_id * L_id

paper:        face-guided identity objectives, more than one, because identity is diluted in the diffusion loss
              (ST-DRC, arXiv 2606.02441, abstract: reference-robust identity enhancement). No formula, no weights.
our reading:  these two terms. L_face with w_face = 1 equals, on average, ConsisID's trainer, which swaps the plain loss
              for a mask-normalised one half of the time. L_id on the decoded one-step estimate follows PuLID and a
              published LTX-2.3 identity LoRA.
LTX-2.3:      the noise path, the velocity target, and the causal VAE that decides how a face mask is pooled.

Conventions. sigma s: 1 = noise, 0 = data; x_s = (1-s) x0 + s noise; v = noise - x0; so x0 = x_s - s v. Tokens are
(B, L, C), video only: reference tokens are sliced off, or masked out, before they get here. Masks are 1 = counts,
0 = does not. A sample without a face must leave an average, not enter it as a zero: a zero would say "perfect face" and
would weaken the term for the others.

    fm, face = flow_matching_loss(v_hat, v), face_weighted_loss(v_hat, v, pool_face_mask(mask, 8, 32))
    crops = crop_faces(decode(clean_estimate(x_s, v_hat, s)), boxes, size=112)
    loss = total_loss(fm, face, identity_loss(embed, crops, embed(reference), valid=s <= IDENTITY_MAX_SIGMA))

Read next: guidance.py. (face.py has E, train.py is where the terms meet.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# our reading: above this noise level the one-step estimate is a blur with no face in it to recognise, and the gradient
# of L_id is noise. The caller clears `valid` for such samples.
IDENTITY_MAX_SIGMA = 0.5


def clean_estimate(x_s: Tensor, v: Tensor, s: Tensor) -> Tensor:
    """x0 = x_s - s v, the picture the model believes in after one look.

    LTX-2.3: the conversion its sampler uses, in float32. x_s and v have one shape, (B, L, C) or any other; s is the
    noise level, (B,) or a tensor of as many axes as x_s that broadcasts, such as (B, 1, 1) or per token (B, L, 1).
    Raises ValueError for any other s, since (B, L) would broadcast along the wrong axes without a word.
    """
    if s.ndim == 1:
        s = s.view(-1, *[1] * (x_s.ndim - 1))                             # (B,) -> (B, 1, 1)
    if s.ndim != x_s.ndim:
        raise ValueError(f"expected s of shape (B,) or {x_s.ndim} axes, got {tuple(s.shape)}; add axes of size 1")
    return x_s.float() - s.float() * v.float()


def flow_matching_loss(v_pred: Tensor, v_target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared velocity error per sample, then over the batch.

    LTX-2.3: per sample mean(err^2 * mask) / mean(mask), so that a sample with many masked tokens counts as much as
    any other. v_pred, v_target (B, L, C), v_target = noise - x0; mask (B, L), 1 where the token was noised, 0 on
    clean tokens (references, given frames), whose velocity nobody asks for. Each sample needs at least one counted
    token. Raises ValueError when the shapes differ.
    """
    error = _token_error(v_pred, v_target)                                # (B, L)
    if mask is None:
        return error.mean()
    mask = mask.to(error)
    return ((error * mask).mean(dim=1) / mask.mean(dim=1)).mean()


def pool_face_mask(mask: Tensor, time_scale: int, space_scale: int) -> Tensor:
    """Face mask per pixel -> share of face per latent token, in token order.

    our reading: area pooling, so a cell half covered counts half. LTX-2.3: the VAE is causal, latent frame 0 holds
    pixel frame 0 alone and every later one holds `time_scale` frames; plain pooling by `time_scale` would be out of
    step by almost a whole latent frame and would weight the place where the face was. mask
    (B, 1 + time_scale * k, h, w) in [0, 1] -> (B, L), L = (1 + k) * (h / space_scale) * (w / space_scale).
    Raises ValueError when sizes do not divide.
    """
    _, frames, h, w = mask.shape                                          # (B, frames, h, w)
    if (frames - 1) % time_scale or h % space_scale or w % space_scale:
        raise ValueError(
            f"expected 1 + {time_scale}k frames and sides divisible by {space_scale}, got {frames} frames of {h}x{w}; "
            "crop the clip first"
        )
    cells = F.avg_pool2d(mask.float(), space_scale)                       # (B, frames, H, W)
    first, rest = cells[:, :1], cells[:, 1:]
    rest = rest.unflatten(1, (-1, time_scale)).mean(dim=2) if frames > 1 else rest      # (B, k, H, W)
    return torch.cat([first, rest], dim=1).flatten(1)                     # (B, L)


def face_weighted_loss(v_pred: Tensor, v_target: Tensor, face_mask: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean squared velocity error of the face: sum m err^2 / (sum m + eps), mean over the samples that have a face.

    paper: face-guided objective against the dilution of identity. our reading: this formula, after ConsisID. v_pred,
    v_target (B, L, C); face_mask (B, L) in [0, 1] from `pool_face_mask`. The squared error is a mean over channels,
    so L_face has the size of L_fm. Returns a scalar; with no face in the batch it is 0 but still part of the graph,
    so that .backward() works and distributed workers stay in step. Raises ValueError when the shapes differ.
    """
    error = _token_error(v_pred, v_target)                                # (B, L)
    face_mask = face_mask.to(error)
    per_sample = (error * face_mask).sum(dim=1) / (face_mask.sum(dim=1) + eps)          # (B,)
    return _mean_over(per_sample, face_mask.sum(dim=1) > 0)


def crop_faces(frames: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each frame's face box out and resize it to size x size, so that gradients reach the pixels.

    our reading: fixed boxes from the data; a detector would not be differentiable, and on half-denoised frames it
    would miss. frames (B, 3, h, w) in [-1, 1]; boxes (B, 4) as left, top, right, bottom in pixels, edges not centres:
    the whole frame is (0, 0, w, h). Give square boxes, others are stretched. Bilinear; beyond the frame the border
    repeats. There is no low-pass: a box more than twice `size` wide aliases. Returns (B, 3, size, size). Raises
    ValueError on bad shapes.
    """
    B, _, h, w = frames.shape
    if boxes.shape != (B, 4):
        raise ValueError(f"expected boxes of shape ({B}, 4), got {tuple(boxes.shape)}; give one box for each frame")
    frames, boxes = frames.float(), boxes.to(frames.device, torch.float32)  # bfloat16 cannot place a box
    left, top, right, bottom = boxes[:, :, None].unbind(dim=1)            # (B, 1) each
    middle = (torch.arange(size, device=frames.device) + 0.5) / size      # pixel middles of the crop, in (0, 1)
    # align_corners=False: -1 is the outer edge of the frame's first pixel, which is why boxes count edges.
    x = (left + (right - left) * middle) * 2 / w - 1                      # (B, size)
    y = (top + (bottom - top) * middle) * 2 / h - 1                       # (B, size)
    grid = torch.stack([x[:, None, :].expand(B, size, size), y[:, :, None].expand(B, size, size)], dim=-1)
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)


def identity_loss(
    embed: Callable[[Tensor], Tensor], faces: Tensor, reference_embedding: Tensor, valid: Tensor
) -> Tensor:
    """1 - cosine between the generated face and the reference, mean over the valid samples.

    paper: face-guided identity objective. our reading: this formula, after PuLID. `embed` is the frozen recogniser,
    (B, 3, size, size) in [-1, 1] -> unit vectors (B, E); freeze its weights, but do not wrap it in no_grad: the
    gradient must pass through it (and through the VAE decoder) to the prediction. reference_embedding (B, E) comes
    from the UN-augmented reference. valid (B,) bool: has a face box and a noise level <= IDENTITY_MAX_SIGMA. Returns
    a scalar in [0, 2]; 0, still in the graph, when nothing is valid. Raises ValueError when the embeddings' shapes
    differ.
    """
    embedding = embed(faces)                                              # (B, E)
    if embedding.shape != reference_embedding.shape:
        shapes = f"{tuple(embedding.shape)} against {tuple(reference_embedding.shape)}"
        raise ValueError(f"expected embeddings of one shape, got {shapes}; use one network and size for both")
    # detach: the reference is the target; it must not move towards the prediction.
    return _mean_over(1 - F.cosine_similarity(embedding, reference_embedding.detach(), dim=-1), valid)


def total_loss(fm: Tensor, face: Tensor, identity: Tensor, w_face: float = 1.0, w_id: float = 0.1) -> Tensor:
    """L = L_fm + w_face L_face + w_id L_id.

    paper: face-guided terms beside the diffusion loss. our reading: the sum and both weights; 0 switches a term off.
    Three scalars -> one scalar.
    """
    return fm + w_face * face + w_id * identity


def _token_error(v_pred, v_target):
    if v_pred.shape != v_target.shape:
        raise ValueError(
            f"expected prediction and target of one shape, got {tuple(v_pred.shape)} and {tuple(v_target.shape)}; "
            "drop the reference tokens from the prediction first"
        )
    return (v_pred.float() - v_target.float()).square().mean(dim=-1)      # (B, L, C) -> (B, L)


def _mean_over(values, counts):
    # where, not values * counts: a sample that does not count may be NaN, and 0 * NaN is NaN. No Python branch on the
    # data either, which would break torch.compile and make the GPU wait.
    kept = torch.where(counts, values, torch.zeros_like(values))
    return kept.sum() / counts.sum().clamp_min(1)


def _demo() -> None:
    # Four tokens with the same error of 1; the face covers token 1 fully and token 2 by half.
    v_pred = torch.full((1, 4, 1), 1.0, requires_grad=True)
    v_target = torch.zeros(1, 4, 1)
    face_mask = torch.tensor([[0.0, 1.0, 0.5, 0.0]])
    face = torch.tensor([[0.6, 0.8]], requires_grad=True)                 # stands in for the embedding of the picture
    person = torch.tensor([[1.0, 0.0]])
    seen = torch.tensor([True])
    terms = {
        "L_fm": flow_matching_loss(v_pred, v_target),
        "L_fm, token 3 masked": flow_matching_loss(v_pred, v_target, torch.tensor([[1.0, 1.0, 1.0, 0.0]])),
        "L_face": face_weighted_loss(v_pred, v_target, face_mask),
        "L_face, no face": face_weighted_loss(v_pred, v_target, 0 * face_mask),
    }
    terms["L_fm + L_face"] = terms["L_fm"] + terms["L_face"]
    print("four tokens, error 1 on each, face mask [0, 1, 0.5, 0]\n")
    print(f"{'term':22s} {'value':>6s}   gradient on the tokens")
    for name, value in terms.items():
        (gradient,) = torch.autograd.grad(value, v_pred, retain_graph=True)
        print(f"{name:22s} {value.item():6.3f}   " + "  ".join(f"{g:5.2f}" for g in gradient.flatten().tolist()))

    identity = identity_loss(lambda x: F.normalize(x, dim=-1), face, person, seen)
    (gradient,) = torch.autograd.grad(identity, face)
    print(f"{'L_id':22s} {identity.item():6.3f}   on the embedding: {[round(g, 2) for g in gradient[0].tolist()]}")
    mask = torch.zeros(1, 9, 1, 1)
    mask[:, 1:5] = 1.0
    print(f"\na face in frames 1..4 of 9, pooled causally by 8: {pool_face_mask(mask, 8, 1).tolist()}")
    print("Notice: L_face pulls only on the face tokens, and without a face it is 0 and pulls on nothing.")


if __name__ == "__main__":
    _demo()
