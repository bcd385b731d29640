# SPDX-License-Identifier: MIT
# From "ST-DRC, line by line", an independent implementation of arXiv 2606.02441.
"""The reference face: from a picture to clean tokens at the end of the sequence, and out again.

How can a video model be shown a face? Adapters (a face encoder, extra attention layers) add new
weights and see the face through a narrow gap. ST-DRC adds nothing: the picture goes through the
VAE that the video uses, and its tokens join the sequence. Every attention layer can look the face
up, in the model's own language. A prompt alone cannot carry a face; a first frame can, but it
also dictates where the person stands, and in which light.

    picture --letterbox--> canvas --VAE--> latent of one frame --patchify--> tokens (B, R, C)

    sequence   [ video tokens: noisy, timestep sigma | reference tokens: clean, timestep 0 ]
    index        0 ... L-1                             L ... L+R-1 = S-1

The last R outputs are dropped: the reference is never denoised, gets no loss, is never decoded.

paper:       latent in-context reference injection through the video VAE's encoder, concatenated
             with the noisy video tokens, no identity adapter (ST-DRC, arXiv 2606.02441, abstract);
             frozen encoder, noise on the video only, the portrait in the middle of a canvas of the
             video's own size with white beside it (overview figure).
our reading: antialiased bilinear resize, white of exactly 1.0; timestep 0; video first (the order
             is free, attention knows tokens by their positions); attention both ways, no mask.
LTX-2.3:     one token per latent cell; pictures in [-1, 1] as uint8 / 127.5 - 1.

Conventions. Timesteps are noise levels per token: 1 = noise, 0 = clean. "No reference" means that
the tokens are absent, not zero. Where the reference stands in space and time is rope.py's business.

Usage:
    import torch
    from PIL import Image
    from reference import Reference, encode_reference, letterbox, predict_velocity
    canvas = letterbox(Image.new("RGB", (300, 400), "tan"), height=64, width=96)[None]
    tokens = encode_reference(torch.nn.AvgPool3d((1, 32, 32)), canvas)  # really: vae.encode
    place = torch.rand(3, 30, 2)                                        # really: rope.Layout's
    model = lambda tokens, timesteps, sigma, positions, context: tokens
    v = predict_velocity(model, torch.randn(1, 24, 3), torch.tensor([0.7]), place[:, :24],
                         context=None, reference=Reference(tokens, place[:, 24:]))  # (1, 24, 3)

Read next: rope.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

WHITE = 1.0  # in the VAE's range [-1, 1]
Runs = list[tuple[Tensor, int]]  # a noise level (B,), and how many tokens in a row have it


class Reference(NamedTuple):
    """paper: the clean tokens of one picture, and our reading: their positions (rope.py)."""

    tokens: Tensor     # (B, R, C)
    positions: Tensor  # (A, R, 2) or (B, A, R, 2)


def letterbox(image: Image.Image, height: int, width: int, pad: float = WHITE) -> Tensor:
    """Fit the whole picture into height x width pixels, centred, the rest filled with `pad`.

    paper: (figure) the portrait keeps its aspect and stands centred on a white canvas as large as
    a video frame. our reading: the resize filter; a centre crop would cut into the face of a
    portrait photo in a landscape video. Takes any PIL mode; camera rotation (EXIF) is applied,
    transparency is laid on white. Returns (3, height, width) float32 in [-1, 1]. Raises ValueError
    for a canvas without pixels or a pad outside [-1, 1].
    """
    if height < 1 or width < 1:
        raise ValueError(f"expected a canvas of at least 1x1 pixels, got {height}x{width}; "
                         "give the video's size")
    if not -1 <= pad <= 1:
        raise ValueError(f"expected pad in [-1, 1], got {pad}; use 1 for white, -1 for black")
    image = to_rgb(image)
    scale = min(height / image.height, width / image.width)
    # A very thin picture must keep one pixel, and rounding must not push past the canvas.
    h = min(height, max(1, round(image.height * scale)))
    w = min(width, max(1, round(image.width * scale)))
    # PIL widens the filter when it shrinks (antialiasing); else a large photo would glitter.
    resized = image.resize((w, h), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32))        # (h, w, 3)
    canvas = torch.full((3, height, width), float(pad))
    top, left = (height - h) // 2, (width - w) // 2
    canvas[:, top : top + h, left : left + w] = pixels.permute(2, 0, 1) / 127.5 - 1
    return canvas


def patchify(latent: Tensor) -> Tensor:
    """Latent grid -> tokens, (B, C, F, H, W) -> (B, F*H*W, C).

    LTX-2.3: a patch is one latent cell (the VAE has already folded 32x32 pixels into it), so this
    only reorders: frame slowest, then row, then column, as rope.py counts positions.
    """
    B, C, F, H, W = latent.shape
    return latent.reshape(B, C, F * H * W).transpose(1, 2)                # (B, L, C)


def unpatchify(tokens: Tensor, F: int, H: int, W: int) -> Tensor:
    """Tokens -> latent grid, (B, F*H*W, C) -> (B, C, F, H, W); undoes `patchify`.

    LTX-2.3: token order as above. Raises ValueError when the tokens do not fill the grid, which
    usually means that the reference tokens are still there.
    """
    B, L, C = tokens.shape
    if F * H * W != L:
        raise ValueError(f"expected {F}*{H}*{W} = {F * H * W} tokens, got {L}; "
                         "drop the reference tokens first")
    return tokens.transpose(1, 2).reshape(B, C, F, H, W)


def encode_reference(encode: Callable[[Tensor], Tensor], canvas: Tensor) -> Tensor:
    """Canvas -> reference tokens, through the same VAE as the video.

    paper: reference -> video VAE encoder -> latent tokens; (figure) the encoder is frozen, hence
    no gradient here. LTX-2.3: one picture is a video of one frame and gives one latent frame.
    `encode` maps (B, 3, 1, h, w) in [-1, 1] to the normalised latent (B, C, 1, H, W); canvas
    (B, 3, h, w). Returns (B, R, C), R = H*W, as many tokens as one video frame has. Raises
    ValueError when the encoder gives more than one latent frame.
    """
    with torch.no_grad():
        latent = encode(canvas[:, :, None])                               # (B, C, 1, H, W)
    if latent.ndim != 5 or latent.shape[2] != 1:
        raise ValueError(f"expected a latent (B, C, 1, H, W), got {tuple(latent.shape)}; "
                         "encode a single picture")
    return patchify(latent)


def append_reference(
    tokens: Tensor, timesteps: Runs, positions: Tensor, reference: Reference
) -> tuple[Tensor, Runs, Tensor]:
    """Put the clean reference tokens behind the noisy video tokens.

    paper: concatenated with the noisy video tokens; noise on the video only. our reading: behind,
    at timestep 0 (the official in-context recipe does the same), so that the model knows them for
    facts and not for something to denoise. tokens (B, L, C); timesteps [(level (B,), L)], since all
    video tokens have one level in [0, 1]; positions (B, A, L, 2). Returns tokens (B, S, C),
    timesteps [(level, L), (zeros (B,), R)], positions (B, A, S, 2), S = L + R. Raises ValueError
    when batch, channels or counts disagree.
    """
    B, L, C = tokens.shape
    R, A = reference.tokens.shape[1], positions.shape[1]
    if reference.tokens.shape != (B, R, C):
        raise ValueError(f"expected reference tokens ({B}, R, {C}), got "
                         f"{tuple(reference.tokens.shape)}; one per sample")
    level, counted = timesteps[0][0], sum(count for _, count in timesteps)
    if level.shape != (B,) or counted != L or positions.shape != (B, A, L, 2):
        raise ValueError(f"expected timesteps ({B},) for {L} tokens and positions ({B}, {A}, {L}, "
                         f"2), got {tuple(level.shape)} for {counted} and {tuple(positions.shape)};"
                         " count the video's tokens")
    if reference.positions.shape not in ((A, R, 2), (B, A, R, 2)):
        raise ValueError(f"expected reference positions ({A}, {R}, 2), got "
                         f"{tuple(reference.positions.shape)}; use the canvas's own latent grid")
    beside = reference.positions.to(positions).expand(B, A, R, 2)
    return (
        torch.cat([tokens, reference.tokens.to(tokens)], dim=1),          # (B, S, C)
        [*timesteps, (torch.zeros_like(level), R)],                       # 0 = clean
        torch.cat([positions, beside], dim=2),                            # (B, A, S, 2)
    )


def drop_reference(output: Tensor, L: int) -> Tensor:
    """Keep what the model said about the L video tokens, (B, S, C) -> (B, L, C).

    paper: the output is the video. our reading: whatever the model predicts for reference tokens
    is ignored, in the loss as in sampling. Raises ValueError for fewer than L tokens.
    """
    if output.shape[1] < L:
        raise ValueError(f"expected at least {L} tokens, got {output.shape[1]}; "
                         "L counts the video tokens only")
    return output[:, :L]


def predict_velocity(
    model: Callable[..., Tensor],
    tokens: Tensor,
    sigma: Tensor,
    positions: Tensor,
    context: Tensor,
    reference: Reference | None = None,
    **options: Any,
) -> Tensor:
    """Append, run the model, drop: the velocity of the video tokens, in sampling and in training.

    paper: the reference beside the video in one sequence. tokens (B, L, C), all at noise level
    sigma (B,), which the model is told for every token and once more for the prompt; positions
    (A, L, 2) or (B, A, L, 2); context (B, N, D), the prompt; reference None = its tokens are
    absent. our reading: `options` go to the model as they are. Returns (B, L, C).
    """
    B, L, _ = tokens.shape
    timesteps = [(sigma, L)]                                              # one level for all
    positions = positions.expand(B, -1, L, 2)                             # (B, A, L, 2)
    if reference is not None:
        tokens, timesteps, positions = append_reference(tokens, timesteps, positions, reference)
    output = model(tokens, timesteps, sigma, positions, context, **options)  # (B, S, C)
    return drop_reference(output, L)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode -> RGB, upright (EXIF), on white where it is transparent; the same size.

    our reading: all of it. Numbers are taken for sRGB; colour profiles are clips/pictures.py's.
    """
    image = ImageOps.exif_transpose(image)  # phones store portraits on their side, plus a note
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit grey: PIL's own conversion clips at 255 and would turn nearly everything white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        # Dropping alpha would uncover whatever colour hides below it, often black.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _demo() -> None:
    print("letterbox: the whole picture on a canvas of 128 x 96 pixels, the rest white")
    for width, height in (190, 120), (120, 190), (150, 150):
        canvas = letterbox(Image.new("RGB", (width, height), "tan"), height=96, width=128)
        y, x = (canvas != WHITE).any(dim=0).nonzero().T  # where the picture lies
        print(f"  {width} x {height}: columns {x.min()}..{x.max()}, rows {y.min()}..{y.max()}")
    tokens = encode_reference(torch.nn.AvgPool3d((1, 32, 32)), canvas[None])  # mean colours
    # Plain latent indices stand in for rope.py's positions: frame 4, rows 3.., columns 4..
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(4)).T
    video = torch.stack([cells, cells + 1], dim=-1)                       # (3, 48, 2)
    beside = Reference(tokens, video[:, :12] + torch.tensor([4, 3, 4])[:, None, None])
    noisy, levels = torch.zeros(1, 48, 3), [(torch.tensor([0.7]), 48)]
    _, timesteps, positions = append_reference(noisy, levels, video[None], beside)
    levels = torch.cat([level.repeat(count) for level, count in timesteps])  # (S,)
    print("The sequence: 4 frames of 3 x 4 cells, then the reference")
    print("  offset   what            timestep   (time, row, column) of the first and last token")
    for i in range(0, 60, 12):
        what = f"video frame {i // 12}" if i < 48 else "reference"
        first, last = (tuple(positions[0, :, j, 0].tolist()) for j in (i, i + 11))
        print(f"  {i:2d}..{i + 11}   {what:15s} {levels[i]:5.1f}      {first} .. {last}")
    print("Notice: the reference sits at offset L = 48 with timestep 0, where the indices go on.")


if __name__ == "__main__":
    _demo()
