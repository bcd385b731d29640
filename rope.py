"""Where a token is: LTX-2.3's three-axis rotary positions, and where ST-DRC puts the reference among them.

Every token carries a coordinate (time, row, column). Rotary position embedding turns the coordinate into angles and
rotates queries and keys by them, so that an attention score depends only on how far two tokens are apart. ST-DRC adds
the reference picture to the sequence as ordinary tokens, so the one question left is *which* coordinates those tokens
get. If they lie on top of the first video frame, "look at the same place" is the easiest thing to learn and the model
pastes the reference's pixels into the video. Moved to the frame just after the video, and past its lower right corner,
the picture shares no coordinate with any video token on any axis: it can be looked up for who the person is, but no
longer for what belongs at this pixel.

Source: ST-DRC, arXiv 2606.02441, component "TASS-RoPE" (time-adjacent, spatially shifted) and its figure.
  paper:       reference cell (i, j) has index (F, H+i, W+j) when the video has indices 0..F-1, 0..H-1, 0..W-1;
               the figure's example is H=3, W=4: reference rows 3..5, columns 4..7, all at time F.
  our reading: the shift is made in latent index space and the reference then goes through the very mapping from
               index to seconds and pixels that the video uses; the paper does not say where the shift is applied.
               The other placements are comparisons of ours, not the paper's.
  LTX-2.3:     everything about the mapping and the rotation itself.

Conventions
  Index grids are (N, 3) integers, columns time, row, column; rows of a picture run downward.
  Positions are (3, N, 2) or (B, 3, N, 2) float32, last axis [start, end): seconds for time, pixels for row and column.
  A token is turned by the middle of its bounds; "split": channel c of a head pairs with c + hd/2, not with c + 1.
Trap: a shift that puts the reference's first index where the video's last one is, is one patch short on every axis: its
  first token lies exactly on the video's last. The shift is by (F, H, W).

Usage:
    import rope, torch
    grid = torch.cat([rope.video_grid(5, 3, 4), rope.reference_grid(5, 3, 4, "tass")])  # 60 video, 12 reference tokens
    cos, sin = rope.rotary_tables(rope.grid_to_positions(grid, frame_rate=24)[None], dim=4096, heads=32)
    q, k = (rope.apply_rotary(x, cos, sin) for x in torch.rand(2, 1, 32, len(grid), 128))  # rand: your q and k

Read next: reference.py
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def _box(frames: range, rows: range, columns: range) -> Tensor:
    """Every (time, row, column) of a box of indices; time slowest, column fastest."""
    axes = [torch.tensor(list(axis), dtype=torch.int64) for axis in (frames, rows, columns)]
    return torch.cartesian_prod(*axes).reshape(-1, 3)  # (N, 3)


def video_grid(F: int, H: int, W: int) -> Tensor:
    """LTX-2.3: index of every video token, frame slowest, column fastest: (F*H*W, 3) int64. No size may be below 1."""
    if min(F, H, W) < 1:
        raise ValueError(f"expected F, H, W of at least 1, got {F}, {H}, {W}; give latent sizes, not pixels")
    return _box(range(F), range(H), range(W))


def place_tass(F: int, H: int, W: int) -> Tensor:
    """paper: TASS-RoPE figure. Reference cell (i, j) at (F, H+i, W+j). Returns (H*W, 3) int64."""
    return _box(range(F, F + 1), range(H, 2 * H), range(W, 2 * W))


def place_overlap(F: int, H: int, W: int) -> Tensor:
    """our reading: (comparison) cell (i, j) at (0, i, j), on top of frame 0, as in a plain in-context LoRA."""
    return _box(range(1), range(H), range(W))


def place_time_only(F: int, H: int, W: int) -> Tensor:
    """our reading: (comparison) cell (i, j) at (F, i, j), the next frame, same place on the canvas."""
    return _box(range(F, F + 1), range(H), range(W))


def place_space_only(F: int, H: int, W: int) -> Tensor:
    """our reading: (comparison) cell (i, j) at (0, H+i, W+j), frame 0's time, past the lower right corner."""
    return _box(range(1), range(H, 2 * H), range(W, 2 * W))


PLACEMENTS: dict[str, Callable[[int, int, int], Tensor]] = {
    "tass": place_tass, "overlap": place_overlap, "time_only": place_time_only, "space_only": place_space_only,
    "overlap_phase": place_overlap,  # told apart by source_phase alone
}


def reference_grid(F: int, H: int, W: int, placement: str = "tass") -> Tensor:
    """paper: the reference fills a grid of the same size as one video frame. Its indices, row by row: (H*W, 3) int64.

    Raises ValueError on an unknown placement or a size below 1.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"expected a placement out of {sorted(PLACEMENTS)}, got {placement!r}; use one of them")
    if min(F, H, W) < 1:
        raise ValueError(f"expected F, H, W of at least 1, got {F}, {H}, {W}; give latent sizes, not pixels")
    return PLACEMENTS[placement](F, H, W)


def source_phase(placement: str, video: int, reference: int, phase_scale: float = 1.0) -> Tensor | None:
    """What "overlap_phase" adds to the angles of each token: 0 for video, phase_scale for the reference; else None.

    our reading: (comparison) the layout of a public face LoRA for LTX, which some call TASS-RoPE although it is not the
    paper's: the reference lies on top of frame 0 and is told apart by a constant turn of all its angles,
    source * phase_scale * 10000^(-d / (hd/2)) for channel d of hd/2. phase_scale 0 = plain overlap; the LoRA's own
    value is not known to us. video, reference: token counts. Returns (1, video + reference) float32 for rotary_tables.
    """
    if placement != "overlap_phase":
        return None
    return torch.cat([torch.zeros(video), torch.full((reference,), float(phase_scale))])[None]


def grid_to_positions(grid: Tensor, frame_rate: float, time_scale: int = 8, space_scale: int = 32) -> Tensor:
    """Bounds of every token in seconds and pixels, from its latent index.

    LTX-2.3: a latent frame covers `time_scale` frames, a latent cell `space_scale` pixels a side. The VAE is causal:
    latent frame 0 holds one single frame, so time bounds move back by time_scale - 1 frames and stop at 0.
    grid (N, 3) integers; frame_rate in frames per second. Returns (3, N, 2) float32, last axis [start, end).
    Raises ValueError on a grid of another shape or a frame rate that is not positive.
    """
    if grid.ndim != 2 or grid.shape[1] != 3:
        raise ValueError(f"expected a grid of shape (N, 3), got {tuple(grid.shape)}; use video_grid")
    if not frame_rate > 0:
        raise ValueError(f"expected a frame rate above 0, got {frame_rate}; give frames per second")
    bounds = torch.stack([grid.T, grid.T + 1], dim=-1).to(torch.float32)  # (3, N, 2) index space
    time, space = bounds[:1] * time_scale, bounds[1:] * space_scale  # frames (1, N, 2), pixels (2, N, 2)
    time = (time + 1 - time_scale).clamp(min=0) / frame_rate  # seconds
    return torch.cat([time, space])  # (3, N, 2)


def rotary_frequencies(count: int, theta: float, device: torch.device | None = None) -> Tensor:
    """`count` angular frequencies from pi/2 to theta*pi/2, evenly spaced in the exponent. Returns (count,) float32.

    LTX-2.3: made in float64, then rounded. At the top end angles reach 1e4 rad, where float32 steps by 1e-3, so a
    frequency grid made in float32, or angles made in float64, would visibly miss what the weights were trained with.
    """
    exponent = torch.linspace(0.0, 1.0, count, dtype=torch.float64, device=device)
    return (theta**exponent * (torch.pi / 2)).to(torch.float32)


def rotary_tables(positions: Tensor, dim: int, heads: int, theta: float = 10000.0,
                  max_pos: Sequence[float] = (20, 2048, 2048), phase: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which every head rotates every token.

    LTX-2.3: positions are divided by `max_pos` (seconds, pixels, pixels) and mapped from 0..1 to -1..1; angles are
    listed with frequency slow and axis fast, filled up in front with "no rotation", and dealt out to the heads in
    order, so that head 0 has the lowest frequencies.
    positions (B, A, N, 2): bounds, of which the middle is used; or (B, A, N): used as they are. A is the number of axes
    (3 for video; 1 for the text connector) and the length of max_pos. dim is the width over all heads. phase (B, N) or
    (1, N) is an extra turn per token (see source_phase), None = off.
    Returns cos, sin, each (B, heads, N, dim/heads/2) float32. Raises ValueError when sizes do not fit.
    """
    if positions.ndim not in (3, 4) or positions.shape[1] != len(max_pos):
        shape = tuple(positions.shape)
        raise ValueError(f"expected positions (B, {len(max_pos)}, N[, 2]), got {shape}; give one max_pos per axis")
    if dim % (2 * heads):
        raise ValueError(f"expected a width divisible by 2*heads, got width {dim} and {heads} heads; change one")
    positions = positions.to(torch.float32)
    if positions.ndim == 4:
        positions = (positions[..., 0] + positions[..., 1]) / 2  # (B, A, N)
    B, A, N = positions.shape
    unit = positions / positions.new_tensor(list(max_pos))[:, None] * 2 - 1  # (B, A, N) -1..1 inside max_pos
    frequencies = rotary_frequencies(dim // (2 * A), theta, positions.device)  # (n,)
    angles = unit.transpose(1, 2)[:, :, None, :] * frequencies[:, None]  # (B, N, n, A)
    angles = angles.reshape(B, N, -1)  # (B, N, n*A) frequency slow, axis fast
    missing = dim // 2 - angles.shape[-1]
    angles = torch.nn.functional.pad(angles, (missing, 0))  # (B, N, dim/2) angle 0: cos 1, sin 0
    angles = angles.reshape(B, N, heads, -1).transpose(1, 2)  # (B, nh, N, hd/2)
    if phase is not None:
        d = torch.arange(angles.shape[-1], dtype=torch.float32, device=angles.device)  # (hd/2,)
        fade = 10000.0 ** (-d / len(d))  # (hd/2,) 1 -> almost 0
        angles = angles + phase.to(angles)[:, None, :, None] * fade  # every head alike
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys; lengths do not change, scores come to depend on position differences only.

    LTX-2.3: channel c of the first half and channel c of the second half form one plane; cos and sin are rounded to
    the dtype of x first. x (B, nh, N, hd); cos, sin (B, nh, N, hd/2) from rotary_tables. Returns the shape of x.
    Raises ValueError when cos does not fit x.
    """
    nh, N, hd = x.shape[1:]
    if cos.shape[1:] != (nh, N, hd // 2):
        raise ValueError(f"expected tables (B, {nh}, {N}, {hd // 2}), got {tuple(cos.shape)}; build them for this x")
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # (B, nh, N, hd/2) each
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)  # a cos - b sin, b cos + a sin
    return torch.cat(turned, dim=-1)  # (B, nh, N, hd)


DRAWN = ("overlap", "time_only", "space_only", "tass")
COLOURS = torch.tensor([[232] * 3, [0, 114, 178], [240, 180, 40], [150, 20, 110]])  # nobody, video, reference, both
HEAT = torch.tensor([255.0, 244, 208]).lerp(torch.tensor([120.0, 0, 40]), torch.linspace(0, 1, 101)[:, None]).int()


def score_map(F: int, H: int, W: int, placement: str, frame: int, dim: int = 4096, heads: int = 32) -> Tensor:
    """our reading: (picture) score of a frame's middle video token with each reference cell, by place alone: (H, W).

    One same unit vector in every q and k leaves the mean over all planes of cos(angle difference), 1 at no distance; so
    does the average over random q = k. [H//2, W//2] is the cell of the token's own row and column. 24 frames a second.
    """
    grid = torch.cat([torch.tensor([[frame, H // 2, W // 2]]), reference_grid(F, H, W, placement)])
    content = torch.full((1, heads, len(grid), dim // heads), dim**-0.5)  # (1, nh, 1+R, hd)
    turned = apply_rotary(content, *rotary_tables(grid_to_positions(grid, 24)[None], dim, heads))
    return (turned[:, :, :1] * turned[:, :, 1:]).sum(dim=(0, 1, 3)).reshape(H, W)


def draw(F: int = 5, H: int = 3, W: int = 4, video: tuple[int, int, int] = (16, 16, 24)) -> Image.Image:
    """our reading: (picture) a column per placement: tokens of F x H x W from two sides, two score_maps of `video`."""
    picture = Image.new("RGB", (1520, 1150), "white")
    pen, small, large = ImageDraw.Draw(picture), ImageFont.load_default(size=19), ImageFont.load_default(size=32)
    for x, placement in zip(range(50, 1520, 372), DRAWN, strict=True):
        pen.text((x, 40), placement, "black", large, "ls")
        taken = torch.zeros(2, F + 1, 2 * H, 2 * W, dtype=torch.int64)  # (source, time, row, column)
        taken[(0, *video_grid(F, H, W).T)] = 1
        taken[(1, *reference_grid(F, H, W, placement).T)] = 2
        front, side = taken.amax(dim=1).sum(dim=0), taken.amax(dim=3).sum(dim=0).T  # (2H, 2W), (2H, F+1)
        panels = [("front: rows down, columns right", COLOURS[front]), ("side: rows down, time right", COLOURS[side])]
        for frame in (0, video[0] - 1):
            score = score_map(*video, placement, frame)
            caption = f"frame {frame}: same cell {score[video[1] // 2, video[2] // 2]:.2f}, mean {score.mean():.2f}"
            panels.append((caption, HEAT[(score.clamp(0, 1) * 100).long()]))
        for y, (caption, colours) in zip((110, 368, 626, 884), panels, strict=True):
            pen.text((x, y - 28), caption, "black", small, "ls")
            cell = min(48, 320 // colours.shape[1], 192 // colours.shape[0])
            for r, c in torch.cartesian_prod(*map(torch.arange, colours.shape[:2])).tolist():
                left, top = x + c * cell, y + r * cell
                pen.rectangle((left, top, left + cell - 2, top + cell - 2), fill=tuple(colours[r, c].tolist()))
                if r == 0 and c % (48 // cell) == 0:  # an index every 48 pixels at most
                    pen.text((left + cell / 2, y - 5), str(c), "black", small, "ms")
                if c == 0 and r % (48 // cell) == 0:
                    pen.text((x - 6, top + cell / 2), str(r), "black", small, "rm")
    names = ("nobody", "video", "reference", "both", "score <= 0", "score 0.25", "score 0.5", "score 0.75", "score 1")
    for i, colour in enumerate([*COLOURS, *HEAT[::25]]):
        pen.rectangle((50 + 160 * i, 1106, 204 + 160 * i, 1136), fill=tuple(colour.tolist()))
        pen.text((127 + 160 * i, 1121), names[i], "white" if colour.sum() < 380 else "black", small, "mm")
    return picture


def _demo() -> None:
    print("Where the 3 x 4 reference tokens lie beside a video of 5 frames x 3 rows x 4 columns (the paper's example).")
    print("Then scores by place alone, with equal q and k: LTX-2.3's 32 heads of 128, 121 frames of 512 x 768.")
    for name in DRAWN:
        (time, row, column), (_, bottom, right) = reference_grid(5, 3, 4, name)[[0, -1]].tolist()
        print(f"{name}: reference at time {time}, rows {row}..{bottom}, columns {column}..{right}")
        for t in (0, 15):
            s = score_map(16, 16, 24, name, t)
            print(f"  frame {t:2d}: same cell {s[8, 12]:5.2f}, mean {s.mean():5.2f}, lead {s[8, 12] - s.mean():5.2f}")
    draw().save("rope_demo.png")
    print("wrote rope_demo.png: tokens from the front and from the side, scores of one token in frames 0 and 15")
    print("Notice: the shift in space ends the lead of the same cell (the cross is its row and column), the one in"
          " time moves all cells alike. With tass 'copy what lies here' is not free; a trained q could still do it.")


if __name__ == "__main__":
    _demo()
