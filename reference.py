"""The reference face: from a picture to clean tokens at the end of the video's sequence, and out again.

How can a video model be shown a face? Adapters (a face encoder, extra attention layers) add new weights and see the
face through a narrow gap. ST-DRC adds nothing: the picture goes through the VAE the video uses, and its tokens join the
sequence. Every attention layer can then look the face up, in the model's own language. A prompt alone cannot carry a
face; a first frame can, but it also dictates where the person stands, and in which light.

    picture --letterbox--> canvas --VAE--> latent of one frame --patchify--> reference tokens (B, R, C)

    sequence   [ video tokens: noisy, timestep sigma | reference tokens: clean, timestep 0 ]
    index        0 ... L-1                             L ... L+R-1 = S-1

After the model the last R outputs are dropped: the reference is never denoised, gets no loss and is never decoded.

paper:        latent in-context reference injection through the video VAE's encoder, concatenated with the noisy video
              tokens, no identity adapter (ST-DRC, arXiv 2606.02441, abstract; overview figure: frozen encoder, noise on
              the video only, the portrait in the middle of a canvas of the video's own size with white beside it).
our reading:  antialiased bilinear resize, white of exactly 1.0; timestep 0; video first, reference after (the order is
              free, since attention knows tokens by their positions); full attention both ways, no mask.
LTX-2.3:      one token per latent cell, frame slowest, then row, then column; pictures in [-1, 1] as uint8 / 127.5 - 1.

Conventions. Timesteps are noise levels per token: 1 = noise, 0 = clean. "No reference" is this file not being called:
the tokens are absent, not zero. Where the reference stands in space and time is rope.py's business, not ours.

    canvas = letterbox(Image.open("face.jpg"), height=512, width=768)[None]
    tokens, timesteps, positions = append_reference(video, sigmas, grid, encode_reference(vae.encode, canvas), ref_grid)
    velocity = drop_reference(model(tokens, timesteps, positions), L)

Read next: augment.py, which keeps the model from copying the canvas. (rope.py gave the tokens their place.)
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

WHITE = 1.0  # in the VAE's range [-1, 1]


def letterbox(image: Image.Image, height: int, width: int, pad: float = WHITE) -> Tensor:
    """Fit the whole picture into height x width pixels, centred, the rest filled with `pad`.

    paper: (figure) the portrait keeps its aspect and stands centred on a white canvas as large as a video frame.
    our reading: the resize filter. A centre crop would cut into the face of a portrait photo in a landscape video.
    Takes any PIL mode; camera rotation (EXIF) is applied, transparency is laid on white. Returns (3, height, width)
    float32 in [-1, 1]. Raises ValueError for a canvas without pixels or a pad outside [-1, 1].
    """
    if height < 1 or width < 1:
        raise ValueError(f"expected a canvas of at least 1x1 pixels, got {height}x{width}; give the video's size")
    if not -1 <= pad <= 1:
        raise ValueError(f"expected pad in [-1, 1], got {pad}; use 1 for white, -1 for black")
    image = _to_rgb(image)
    scale = min(height / image.height, width / image.width)
    # A very thin picture must keep one pixel, and rounding must not push past the canvas.
    h = min(height, max(1, round(image.height * scale)))
    w = min(width, max(1, round(image.width * scale)))
    # PIL widens the filter when it shrinks (antialiasing); without that a large photo would glitter.
    pixels = np.array(image.resize((w, h), Image.Resampling.BILINEAR), dtype=np.float32)        # (h, w, 3)
    canvas = torch.full((3, height, width), float(pad))
    top, left = (height - h) // 2, (width - w) // 2
    canvas[:, top : top + h, left : left + w] = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    return canvas


def patchify(latent: Tensor) -> Tensor:
    """Latent grid -> tokens, (B, C, F, H, W) -> (B, F*H*W, C).

    LTX-2.3: a patch is one latent cell (the VAE has already folded 32x32 pixels into it), so this only reorders: frame
    slowest, then row, then column. rope.py counts positions in the same order; that is what ties the two together.
    """
    B, C, F, H, W = latent.shape
    return latent.reshape(B, C, F * H * W).transpose(1, 2)                # (B, L, C)


def unpatchify(tokens: Tensor, F: int, H: int, W: int) -> Tensor:
    """Tokens -> latent grid, (B, F*H*W, C) -> (B, C, F, H, W); undoes `patchify`.

    LTX-2.3: token order as above. Raises ValueError when the tokens do not fill the grid, which usually means that the
    reference tokens are still there.
    """
    B, L, C = tokens.shape
    if F * H * W != L:
        raise ValueError(f"expected {F}*{H}*{W} = {F * H * W} tokens, got {L}; drop the reference tokens first")
    return tokens.transpose(1, 2).reshape(B, C, F, H, W)


def encode_reference(encode: Callable[[Tensor], Tensor], canvas: Tensor) -> Tensor:
    """Canvas -> reference tokens, through the same VAE as the video.

    paper: reference -> video VAE encoder -> latent tokens; (figure) the encoder is frozen, hence no gradient here.
    LTX-2.3: one picture is a video of one frame and gives one latent frame. `encode` maps (B, 3, 1, h, w) in [-1, 1] to
    the normalised latent (B, C, 1, H, W); canvas (B, 3, h, w). Returns (B, R, C), R = H*W, as many tokens as one video
    frame has. Raises ValueError when the encoder gives more than one latent frame.
    """
    with torch.no_grad():
        latent = encode(canvas[:, :, None])                               # (B, 3, 1, h, w) -> (B, C, 1, H, W)
    if latent.ndim != 5 or latent.shape[2] != 1:
        raise ValueError(f"expected a latent (B, C, 1, H, W), got {tuple(latent.shape)}; encode a single picture")
    return patchify(latent)


def append_reference(
    tokens: Tensor, timesteps: Tensor, positions: Tensor, ref_tokens: Tensor, ref_positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the clean reference tokens behind the noisy video tokens.

    paper: concatenated with the noisy video tokens; noise on the video only. our reading: behind, at timestep 0 (the
    official in-context recipe does the same), so that the model knows them for facts and not for something to denoise.

    tokens (B, L, C); timesteps (B, L) in [0, 1]; positions (B, 3, L, 2), seconds and pixels, [start, end);
    ref_tokens (B, R, C); ref_positions (3, R, 2) or (B, 3, R, 2), see rope.py. Returns tokens (B, S, C), timesteps
    (B, S), positions (B, 3, S, 2) with S = L + R. Raises ValueError when batch, channels or counts disagree.
    """
    B, L, C = tokens.shape
    R = ref_tokens.shape[1]
    if ref_tokens.shape != (B, R, C):
        raise ValueError(f"expected reference tokens ({B}, R, {C}), got {tuple(ref_tokens.shape)}; one per sample")
    if timesteps.shape != (B, L) or positions.shape != (B, 3, L, 2):
        got = f"{tuple(timesteps.shape)} and {tuple(positions.shape)}"
        raise ValueError(f"expected timesteps ({B}, {L}) and positions ({B}, 3, {L}, 2), got {got}; one per token")
    if ref_positions.shape not in ((3, R, 2), (B, 3, R, 2)):
        got = tuple(ref_positions.shape)
        raise ValueError(f"expected reference positions (3, {R}, 2), got {got}; use the canvas's own latent grid")
    ref_positions = ref_positions.to(positions).expand(B, 3, R, 2)
    return (
        torch.cat([tokens, ref_tokens.to(tokens)], dim=1),                # (B, S, C)
        torch.cat([timesteps, timesteps.new_zeros(B, R)], dim=1),         # (B, S), 0 = clean
        torch.cat([positions, ref_positions], dim=2),                     # (B, 3, S, 2)
    )


def drop_reference(output: Tensor, L: int) -> Tensor:
    """Keep what the model said about the L video tokens, (B, S, C) -> (B, L, C).

    paper: the output is the video. our reading: whatever the model predicts for reference tokens is ignored, in the
    loss as in sampling. Without a reference S = L and nothing happens. Raises ValueError when there are fewer than L
    tokens.
    """
    if output.shape[1] < L:
        raise ValueError(f"expected at least {L} tokens, got {output.shape[1]}; L counts the video tokens only")
    return output[:, :L]


def _to_rgb(image):
    image = ImageOps.exif_transpose(image)  # phones store portraits lying on their side plus a note
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit grey: PIL's own conversion clips at 255 and would turn nearly everything white.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        # Dropping alpha would uncover whatever colour hides below it, often black.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _demo() -> None:
    H, W, F, C = 2, 3, 4, 8
    picture = Image.new("RGB", (40, 64), "saddlebrown")                   # a portrait photo, a landscape video
    canvas = letterbox(picture, height=32 * H, width=32 * W)
    print(f"letterbox: {picture.width}x{picture.height} on {32 * W}x{32 * H} (width x height), one sign per 8x8 pixels")
    for row in canvas[0, ::8, ::8]:
        print("  " + "".join("." if value == WHITE else "#" for value in row))

    def encode(video):                                                    # a stand-in: mean colour of each 32x32 cell
        cells = torch.nn.functional.avg_pool2d(video[:, :, 0], 32)        # (B, 3, H, W)
        return cells.repeat(1, 3, 1, 1)[:, :C, None]                      # (B, C, 1, H, W)

    ref_tokens = encode_reference(encode, canvas[None])
    video = patchify(torch.randn(1, C, F, H, W))
    L, R = video.shape[1], ref_tokens.shape[1]
    # Plain latent indices stand in for rope.py's positions: frame F, rows H.., columns W.. for the reference.
    cells = torch.cartesian_prod(torch.arange(F), torch.arange(H), torch.arange(W)).T           # (3, L)
    grid = torch.stack([cells, cells + 1], dim=-1)[None]                  # (1, 3, L, 2), [start, end)
    ref_grid = grid[0, :, :R] + torch.tensor([F, H, W])[:, None, None]
    tokens, timesteps, positions = append_reference(video, torch.full((1, L), 0.7), grid, ref_tokens, ref_grid)

    print(f"\nsequence of S = {L} + {R} = {tokens.shape[1]} tokens, {C} numbers each")
    print("  offset   what                  timestep   (time, row, column) of the first and last token")
    for f in range(F + 1):
        a, b = f * H * W, (f + 1) * H * W - 1
        what = f"video latent frame {f}" if f < F else "reference"
        first, last = (tuple(positions[0, :, i, 0].tolist()) for i in (a, b))
        print(f"  {a:2d}..{b:2d}   {what:20s}  {timesteps[0, a]:5.1f}      {first} .. {last}")
    kept = drop_reference(tokens, L)
    print(f"\nafter the model: drop the last {R}, {tuple(tokens.shape)} -> {tuple(kept.shape)}; "
          f"identical to the video tokens: {torch.equal(kept, video)}")
    print("Notice: the reference sits at offset L with timestep 0, and its indices go on where the video's end.")


if __name__ == "__main__":
    _demo()
