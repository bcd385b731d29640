"""Where a token is: LTX-2.3's three-axis rotary positions, and where ST-DRC puts the reference among them.

Every token carries a coordinate (time, row, column). Rotary position embedding turns the coordinate into angles and
rotates queries and keys by them, so that an attention score depends only on how far two tokens are apart.
ST-DRC adds the reference picture to the sequence as ordinary tokens, so the one question left is *which* coordinates
those tokens get. If they lie on top of the first video frame, "look at the same place" is the easiest thing to learn
and the model pastes the reference's pixels into the video. Moved to the frame just after the video, and past its
lower right corner, the picture shares no coordinate with any video token on any axis: it can be looked up for who
the person is, but no longer for what belongs at this pixel.

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
  Rotation is of the "split" kind: the first half of a head's channels pairs with the second half, not with neighbours.
  The tokens are rotated by the middle of their bounds.
Trap: a shift of max(video start) - min(reference start) lands on (F-1, H-1, W-1), one patch short on every axis, and
  puts the first reference token exactly onto the last video token.

Usage:
    grid = torch.cat([video_grid(F, H, W), reference_grid(F, H, W, "tass")])
    cos, sin = rotary_tables(grid_to_positions(grid, frame_rate=24)[None], dim=4096, heads=32)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)

Read next: reference.py
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _box(frames: range, rows: range, columns: range) -> Tensor:
    """Every (time, row, column) of a box of indices; time slowest, column fastest."""
    axes = [torch.tensor(list(axis), dtype=torch.int64) for axis in (frames, rows, columns)]
    return torch.cartesian_prod(*axes).reshape(-1, 3)  # (N, 3)


def video_grid(F: int, H: int, W: int) -> Tensor:
    """Index of every video token, in the order of the token sequence.

    LTX-2.3: frame slowest, then row, then column. Returns (F*H*W, 3) int64. Raises ValueError on a size below 1.
    """
    _check_sizes(F, H, W)
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
    "tass": place_tass,
    "overlap": place_overlap,
    "time_only": place_time_only,
    "space_only": place_space_only,
    "overlap_phase": place_overlap,  # told apart by source_phase alone
}


def reference_grid(F: int, H: int, W: int, placement: str = "tass") -> Tensor:
    """Index of every reference token beside an F x H x W video, row by row.

    paper: the reference fills a grid of the same size as one video frame. Returns (H*W, 3) int64.
    Raises ValueError on an unknown placement or a size below 1.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"expected a placement out of {sorted(PLACEMENTS)}, got {placement!r}; use one of them")
    _check_sizes(F, H, W)
    return PLACEMENTS[placement](F, H, W)


def source_phase(placement: str, video: int, reference: int, phase_scale: float = 1.0) -> Tensor | None:
    """What "overlap_phase" adds to the angles of each token: 0 for video, phase_scale for the reference; else None.

    our reading: (comparison) the layout of a public face LoRA for LTX, which some call TASS-RoPE although it is not the
    paper's: the reference lies on top of frame 0 and is told apart by a constant turn of all its angles,
    source * phase_scale * 10000^(-d / L) for channel d of L = hd/2. phase_scale 0 = plain overlap; the LoRA's own value
    is not known to us. video, reference: token counts. Returns (1, video + reference) float32 for rotary_tables.
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
    bounds = torch.stack([grid, grid + 1], dim=-1)  # (N, 3, 2) index space
    bounds = bounds.permute(1, 0, 2).to(torch.float32)  # (3, N, 2)
    time, space = bounds[:1] * time_scale, bounds[1:] * space_scale  # frames (1, N, 2), pixels (2, N, 2)
    time = (time + 1 - time_scale).clamp(min=0) / frame_rate  # seconds
    return torch.cat([time, space])  # (3, N, 2)


def rotary_frequencies(count: int, theta: float, device: torch.device | None = None) -> Tensor:
    """`count` angular frequencies from pi/2 to theta*pi/2, evenly spaced in the exponent. Returns (count,) float32.

    LTX-2.3: made in float64, then rounded. At the top end angles reach 1e4 rad, where float32 steps by 1e-3, so a
    frequency grid made in float32, or angles made in float64, would visibly miss what the weights were trained with.
    """
    exponent = torch.linspace(0.0, 1.0, count, dtype=torch.float64, device=device)
    return (theta**exponent * (math.pi / 2)).to(torch.float32)


def rotary_tables(
    positions: Tensor,
    dim: int,
    heads: int,
    theta: float = 10000.0,
    max_pos: Sequence[float] = (20, 2048, 2048),
    phase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
    limits = torch.tensor(list(max_pos), dtype=torch.float32, device=positions.device)
    unit = positions / limits[:, None] * 2 - 1  # (B, A, N) -1..1 inside max_pos

    frequencies = rotary_frequencies(dim // (2 * A), theta, positions.device)  # (n,)
    angles = unit.transpose(1, 2)[:, :, None, :] * frequencies[:, None]  # (B, N, n, A)
    angles = angles.reshape(B, N, -1)  # (B, N, n*A) frequency slow, axis fast
    missing = dim // 2 - angles.shape[-1]
    angles = torch.nn.functional.pad(angles, (missing, 0))  # (B, N, dim/2) angle 0: cos 1, sin 0
    angles = angles.reshape(B, N, heads, -1).transpose(1, 2)  # (B, nh, N, hd/2)
    if phase is not None:
        L = angles.shape[-1]
        fade = 10000.0 ** (-torch.arange(L, dtype=torch.float32, device=angles.device) / L)  # (hd/2,) 1 -> almost 0
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


def _check_sizes(F: int, H: int, W: int) -> None:
    if min(F, H, W) < 1:
        raise ValueError(f"expected F, H, W of at least 1, got {F}, {H}, {W}; give latent sizes, not pixels")


def _axis_line(video: Tensor, reference: Tensor, size: int) -> str:
    """One axis as text: V video only, R reference only, X both, . nobody."""
    used_v, used_r = set(video.tolist()), set(reference.tolist())
    marks = {(True, False): "V", (False, True): "R", (True, True): "X", (False, False): "."}
    return " ".join(marks[(i in used_v, i in used_r)] for i in range(size))


def _demo(F: int = 5, H: int = 3, W: int = 4) -> None:
    video = video_grid(F, H, W)
    print(f"Token map of a {F} x {H} x {W} video (frames x rows x columns). V video, R reference, X both, . nobody\n")
    for placement in PLACEMENTS:
        reference = reference_grid(F, H, W, placement)
        span = [f"{int(reference[:, a].min())}..{int(reference[:, a].max())}" for a in range(3)]
        print(f"{placement}: reference at time {span[0]}, rows {span[1]}, columns {span[2]}")
        for axis, (name, size) in enumerate([("time", F + 1), ("row", 2 * H), ("column", 2 * W)]):
            print(f"  {name:7s}{_axis_line(video[:, axis], reference[:, axis], size)}")
        cells = {tuple(cell) for cell in reference.tolist()} & {tuple(cell) for cell in video.tolist()}
        print(f"  shared cells: {len(cells)} of {len(reference)}\n")

    print("Seen from the front (rows down, columns right), all frames on top of each other:")
    print(f"  {'tass':{4 * W}s}   overlap")
    taken = {(row, column) for _, row, column in video.tolist()}
    pictures = [{(r, c) for _, r, c in reference_grid(F, H, W, name).tolist()} for name in ("tass", "overlap")]
    marks = {(True, False): "V", (False, True): "R", (True, True): "X", (False, False): "."}
    for r in range(2 * H):
        lines = [" ".join(marks[(r, c) in taken, (r, c) in cells] for c in range(2 * W)) for cells in pictures]
        print(f"  {lines[0]}    {lines[1]}")

    bounds = grid_to_positions(torch.stack([video[-1], reference_grid(F, H, W)[0]]), frame_rate=24)
    names = ("last video token", "first reference token")
    for name, (time, row, column) in zip(names, bounds.transpose(0, 1).tolist(), strict=True):
        print(f"{name:22s} time {time[0]:.3f}..{time[1]:.3f} s, rows {row} px, columns {column} px")
    print("Notice: only 'tass' has no X on any axis, so no coordinate tells the model where to paste from.")


if __name__ == "__main__":
    _demo()
