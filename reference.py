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

Usage:
    import torch
    from PIL import Image
    from reference import append_reference, drop_reference, encode_reference, letterbox
    canvas = letterbox(Image.new("RGB", (300, 400), "tan"), height=64, width=96)[None]                # (1, 3, 64, 96)
    reference = encode_reference(torch.nn.AvgPool3d((1, 32, 32)), canvas)           # (1, 6, 3); really: vae.encode
    video, sigmas, grid = torch.randn(1, 24, 3), torch.full((1, 24), 0.7), torch.rand(1, 3, 24, 2)    # grid: rope.py
    tokens, timesteps, positions = append_reference(video, sigmas, grid, reference, grid[:, :, :6] + 5)     # S = 30
    velocity = drop_reference(tokens, L=24)                                         # really: of the model's output

Read next: augment.py
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

WHITE = 1.0  # in the VAE's range [-1, 1]
SIZES = (190, 120), (120, 190), (150, 150)  # width and height of the demo's pictures


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


def _portrait(width, height):
    """A face in a picture of any form; the golden edge shows that nothing is cut off."""
    picture = Image.new("RGB", (128, 128), "lightsteelblue")
    for x, y, r, colour in ((64, 150, 54, "brown"), (64, 60, 42, "tan"), (48, 52, 6, "black"), (80, 52, 6, "black"),
                            (64, 82, 8, "brown"), (86, 72, 3, "black")):
        ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r, y + r), fill=colour)
    picture = ImageOps.pad(picture, (width - 8, height - 8), color="lightsteelblue", centering=(0.5, 1))
    return ImageOps.expand(picture, 4, "goldenrod")


def _sequence(canvas, F, sigma):
    """(tokens, timesteps, positions): F video frames of 3 x 4 tokens in shades of blue, then those of the canvas."""
    shades = torch.stack([torch.linspace(a, b, F) for a, b in ((-0.4, 0.5), (0.2, 0.75), (0.5, 0.95))])     # (3, F)
    video = patchify(shades[None, :, :, None, None].expand(1, 3, F, 3, 4))                      # (1, L, 3)
    # Plain latent indices stand in for rope.py's positions: frame F, rows H.., columns W.. for the reference.
    cells = torch.cartesian_prod(torch.arange(F), torch.arange(3), torch.arange(4)).T           # (3, L)
    grid = torch.stack([cells, cells + 1], dim=-1)[None]                  # (1, 3, L, 2), [start, end)
    ref_grid = grid[:, :, :12] + torch.tensor([F, 3, 4])[:, None, None]   # (1, 3, R, 2)
    reference = encode_reference(torch.nn.AvgPool3d((1, 32, 32)), canvas[None])     # in place of a VAE: mean colours
    return append_reference(video, torch.full((1, 12 * F), sigma), grid, reference, ref_grid)


def draw(F: int = 4, sigma: float = 0.7) -> Image.Image:
    """Picture, canvas and tokens of a wide, a tall and a square portrait; below, the sequence with the last of them.

    paper: (figure) a reference of 3 x 4 cells, as large as a video frame. our reading: the rest. F video frames, 1 to 5
    (more are too small to read) at noise level sigma, 0 to 1. Token i stands at x = 110 + i * (1370 // S), y = 592.
    """
    page = Image.new("RGB", (1500, 730), "white")
    pen = ImageDraw.Draw(page)

    def say(x, y, text, size=18):
        pen.text((x, y), text, "black", ImageFont.load_default(size=size))

    for x, (w, h) in zip((20, 515, 1010), SIZES, strict=True):
        canvas = letterbox(_portrait(w, h), height=96, width=128)
        tokens, timesteps, positions = _sequence(canvas, F, sigma)
        latent = unpatchify(tokens[:, -12:], 1, 3, 4)[0, :, 0]            # (3, H, W)
        say(x, 12, f"picture {w} x {h}   ->")
        page.paste(_portrait(w, h), (x, 42))
        for y, title, image in (42, "letterbox: canvas 128 x 96", canvas), (280, "encode_reference: 12 tokens", latent):
            say(x + 210, y - 30, title)
            pixels = Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
            page.paste(pixels.resize((256, 192), Image.Resampling.NEAREST), (x + 210, y))
            for i in range(12):
                left, top = x + 210 + 64 * (i % 4), y + 64 * (i // 4)
                pen.rectangle((left, top, left + 64, top + 64), outline="silver")
                say(left + 5, top + 4, str(i), 14)
    S, step = tokens.shape[1], 1370 // tokens.shape[1]
    say(20, 502, f"append_reference: {S - 12} video tokens at timestep {sigma:g}; the square picture's 12 at 0", 22)
    for y, text in (600, "tokens"), (640, "1 = noise"), (696, "0 = clean"):
        say(20, y, text)
    for i, level in enumerate(timesteps[0].tolist()):
        x = 110 + i * step
        if i % 12 == 0:
            (time, row, column), (_, bottom, right) = positions[0, :, [i, i + 11], 0].T.int().tolist()
            say(x, 544, f"video frame {time}" if i < S - 12 else "reference")
            say(x, 568, f"time {time}, rows {row}..{bottom}, columns {column}..{right}", 13)
        pen.rectangle((x, 592, x + step - 3, 626), fill=tuple(((tokens[0, i] + 1) * 127.5).round().int().tolist()))
        pen.rectangle((x, 710 - 64 * level, x + step - 3, 712), fill="dimgrey")
        say(x + 2, 602, str(i), 12)
    return page


def _demo() -> None:
    print("letterbox: the whole picture on a canvas of 128 x 96 pixels (width x height), the rest white")
    for w, h in SIZES:
        canvas = letterbox(_portrait(w, h), height=96, width=128)
        white = (canvas == WHITE).all(dim=0)                              # (96, 128)
        y, x = (~white).nonzero().T                                       # where the picture lies
        print(f"  {w} x {h}: columns {x.min()}..{x.max()}, rows {y.min()}..{y.max()}; white {white.float().mean():.0%}")
    tokens, timesteps, positions = _sequence(canvas, F=4, sigma=0.7)
    print(f"encode_reference: a token for 32 x 32 pixels, 3 x 4 = 12; append_reference: 48 + 12 = {tokens.shape[1]}")
    print("  offset   what            timestep   (time, row, column) of the first and last token")
    for i in range(0, 60, 12):
        what = f"video frame {i // 12}" if i < 48 else "reference"
        first, last = (tuple(positions[0, :, j, 0].tolist()) for j in (i, i + 11))
        print(f"  {i:2d}..{i + 11:2d}   {what:15s} {timesteps[0, i]:5.1f}      {first} .. {last}")
    print(f"drop_reference: after the model the first {drop_reference(tokens, 48).shape[1]} are kept, the video's own")
    draw().save("reference_demo.png")
    print("wrote reference_demo.png: pictures, canvases, tokens (as mean colours); the sequence and its timesteps")
    print("Notice: the reference sits at offset L = 48 with timestep 0, and its indices go on where the video's end.")


if __name__ == "__main__":
    _demo()
