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

Usage:
    import torch
    from losses import crop_faces, face_weighted_loss, flow_matching_loss, identity_loss, pool_face_mask, total_loss
    v, v_hat, mask, frames = (torch.rand(2, *shape) for shape in ((12, 8), (12, 8), (17, 64, 64), (3, 64, 64)))
    embed, boxes = (lambda x: x.flatten(1) / x.flatten(1).norm(dim=1)[:, None]), torch.tensor([[8, 8, 40, 40]] * 2)
    fm, face = flow_matching_loss(v_hat, v), face_weighted_loss(v_hat, v, pool_face_mask(mask, 8, 32))
    crops = crop_faces(frames, boxes, size=16)                  # frames: the decoded clean_estimate(x_s, v_hat, s)
    loss = total_loss(fm, face, identity_loss(embed, crops, embed(crops.flip(0)), valid=torch.tensor([True, False])))

Read next: guidance.py
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# our reading: above this noise level the one-step estimate is a blur with no face in it to recognise, and the gradient
# of L_id is noise. The caller clears `valid` for such samples.
IDENTITY_MAX_SIGMA = 0.5
COLORS = {"L_fm": (0, 114, 178), "L_face": (213, 94, 0), "L_id": (0, 158, 115)}  # of the demo's picture


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
        got, k = f"got {frames} frames of {h}x{w}", f"1 + {time_scale}k frames"
        raise ValueError(f"expected {k} and sides divisible by {space_scale}, {got}; crop the clip first")
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


def identity_loss(embed: Callable[[Tensor], Tensor], faces: Tensor, reference_embedding: Tensor,
                  valid: Tensor) -> Tensor:
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
        shapes = f"{tuple(v_pred.shape)} and {tuple(v_target.shape)}"
        raise ValueError(f"expected prediction and target of one shape, got {shapes}; drop the reference tokens first")
    return (v_pred.float() - v_target.float()).square().mean(dim=-1)      # (B, L, C) -> (B, L)


def _mean_over(values, counts):
    # where, not values * counts: a sample that does not count may be NaN, and 0 * NaN is NaN. No Python branch on the
    # data either, which would break torch.compile and make the GPU wait.
    kept = torch.where(counts, values, torch.zeros_like(values))
    return kept.sum() / counts.sum().clamp_min(1)


def toy_terms(sigmas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """our reading: (picture) the terms at each sigma for a model that takes the person for somebody else.

    Its velocity is off by x0 - other at every sigma, its clean estimate by sigma times that. Tokens are pixels, and E
    compares pixels. Returns L_fm, L_face, L_id as columns (sigmas, 3) and the estimates' faces (sigmas, 48, 48, 3).
    """
    people, terms, crops = [], [], []
    for hair, skin in (("black", "peachpuff"), ("gold", "sienna")):
        pen = ImageDraw.Draw(picture := Image.new("RGB", (128, 96), "lightsteelblue"))
        for at, c in (((12, 24, 51, 65), hair), ((16, 32, 47, 71), skin), ((21, 45, 26, 50), 0), ((37, 45, 42, 50), 0)):
            pen.ellipse(at, c)
        people.append(torch.tensor(list(picture.tobytes())).view(1, -1, 3) / 127.5 - 1)           # (1, 12288, 3)
    x0, other, noise = *people, torch.randn(1, 12288, 3, generator=torch.Generator().manual_seed(0))
    mask = pool_face_mask(F.pad(torch.ones(1, 1, 48, 48), (8, 72, 24, 24)), 8, 1)                 # (1, 12288)
    crop = lambda x: crop_faces(x.mT.reshape(1, 3, 96, 128), torch.tensor([[8, 24, 56, 72]]), 48)  # noqa: E731
    embed = lambda faces: F.normalize((faces - faces.mean(dim=(2, 3), keepdim=True)).flatten(1))  # noqa: E731
    for s in sigmas:
        x_s, v, v_hat = (1 - s) * x0 + s * noise, noise - x0, noise - other
        crops.append(crop(clean_estimate(x_s, v_hat, torch.tensor([s]))))
        identity = identity_loss(embed, crops[-1], embed(crop(x0)), torch.tensor([True]))
        terms.append(torch.stack([flow_matching_loss(v_hat, v), face_weighted_loss(v_hat, v, mask), identity]))
    return torch.stack(terms), ((torch.cat(crops) + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1)


def draw(mask: Tensor, sigmas: Sequence[float]) -> Image.Image:
    """our reading: (picture) left `pool_face_mask` of a mask (1, frames, 96, 128), right `toy_terms` at rising sigmas.

    Returns (1590, 535) RGB. Cell (i, j) of latent frame k has its corner at pixel (630 + 40 j, 90 + 150 k + 40 i), is
    40 wide and (1 - share) 230 + share orange; a term y is at pixel (880 + 650 sigma, 350 - 280 y).
    """
    pen = ImageDraw.Draw(picture := Image.new("RGB", (3180, 1070), "white"))  # twice the size, halved at the end
    def write(x, y, words, color="black", anchor="lm"):
        pen.text((2 * x, 2 * y), words, color, ImageFont.load_default(30), anchor)
    def paste(share, x, y, step):  # white lines between the cells
        pixels = 230 + share[:, :, None] * (torch.tensor(COLORS["L_face"]) - 230)
        pixels[::step] = pixels[:, ::step] = 255
        picture.paste(Image.fromarray(pixels.round().byte().numpy()), (2 * x, 2 * y))
    write(20, 30, "A face box, frame by frame, and its share of each latent cell, 32 x 32 pixels (pool_face_mask)")
    for k, cells in enumerate(pool_face_mask(mask, 8, 32).view(-1, 3, 4)):
        write(710, 78 + 150 * k, f"latent frame {k}", "dimgray", "mm")
        for n, t in enumerate(range(max(0, 8 * k - 7), 8 * k + 1)):
            paste(mask[0, t], 20 + 70 * n, 126 + 150 * k, 32)
            write(52 + 70 * n, 112 + 150 * k, str(t), "dimgray", "mm")
        paste(cells.repeat_interleave(80, 0).repeat_interleave(80, 1), 630, 90 + 150 * k, 80)
        for n, share in enumerate(cells.flatten().tolist()):
            write(650 + n % 4 * 40, 110 + 150 * k + n // 4 * 40, f"{share:.2f}", anchor="mm")
    terms, faces = toy_terms(sigmas)
    pen.line((1760, 120, 1760, 700, 3060, 700), "black", 3)
    pen.line((1760 + 1300 * IDENTITY_MAX_SIGMA, 120, 1760 + 1300 * IDENTITY_MAX_SIGMA, 700), "silver", 3)
    names = "L_fm: all tokens", "L_face: the face's tokens", "L_id: 1 - cos, counts left of the line"
    for name, color, x, values in zip(names, COLORS.values(), (880, 1040, 1260), terms.T.tolist(), strict=True):
        write(x, 30, name, color)
        pen.line([(1760 + 1300 * s, 700 - 560 * y) for s, y in zip(sigmas, values, strict=True)], color, 6)
    for s, face in list(zip(sigmas, faces.numpy(), strict=True))[:: len(sigmas) // 4]:
        picture.paste(Image.fromarray(face).resize((192, 192), Image.Resampling.NEAREST), (1664 + round(1300 * s), 770))
        write(880 + 650 * s, 368, f"{s:g}", anchor="mm")
        write(870, 350 - 280 * s, f"{s:g}", anchor="rm")
    write(832, 504, "sigma, and the face in the clean estimate: at 0 the person herself, at 1 whom the model sees")
    return picture.reduce(2)


def _demo() -> None:
    mask = torch.cat([F.pad(torch.ones(1, 1, 48, 48), (8 + 4 * t, 72 - 4 * t, 24, 24)) for t in range(17)], dim=1)
    print("A face moves right. Its share of the middle row of cells, pooled over frame 0, frames 1..8, frames 9..16:")
    print(*pool_face_mask(mask, 8, 32).view(3, 3, 4)[:, 1].tolist(), sep="\n")
    print("A model sees somebody else. Its velocity error is the same at every noise level, its clean estimate is not:")
    sigmas = (0.0, 0.25, 0.5, 0.75, 1.0)
    print("  sigma    L_fm  L_face    L_id   total, with L_id up to 0.5 only: above it a real estimate is a blur")
    for s, (fm, face, i) in zip(sigmas, toy_terms(sigmas)[0].tolist(), strict=True):
        print(f"{s:7.2f} {fm:7.3f} {face:7.3f} {abs(i):7.3f}{total_loss(fm, face, i * (s <= IDENTITY_MAX_SIGMA)):8.3f}")
    draw(mask, [i / 20 for i in range(21)]).save("losses_demo.png")
    print("wrote losses_demo.png: left the mask in pixels and on the latent grid, right the terms over the noise level")
    print("Notice: L_fm hardly sees the wrong face, L_face sees it in full, L_id where the clean estimate shows it.")


if __name__ == "__main__":
    _demo()
