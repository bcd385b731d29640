# SPDX-License-Identifier: MIT
# From "ST-DRC, line by line", an independent implementation of arXiv 2606.02441.
"""Where a token is: LTX-2.3's rotary positions, and where ST-DRC puts the reference among them.

Every token carries a coordinate (time, row, column). Rotary position embedding turns it into
angles and rotates queries and keys by them, so that position enters a score only as the difference
of two coordinates. The reference picture's tokens join the video's (reference.py); the question
left is *which* coordinates they get. On top of the first video frame, "look at the same place" is
the easiest thing to learn, and the model pastes the reference's pixels into the video. Just after
the last frame and past its lower right corner, the picture shares no coordinate with any video
token on any axis: it can be asked who the person is, but not what belongs at this pixel.

Source: ST-DRC, arXiv 2606.02441, "TASS-RoPE" (time-adjacent, spatially shifted) and its figure.
  paper:       reference cell (i, j) has index (F, H+i, W+j), the video 0..F-1, 0..H-1, 0..W-1; in
               the figure H=3, W=4: reference rows 3..5, columns 4..7, all at time F.
  our reading: the shift is made in latent index space; the reference then goes through the same
               mapping to seconds and pixels as the video. Other placements are comparisons.
  LTX-2.3:     everything about the mapping and the rotation itself.

Conventions. Grids are (N, 3) integers: time, row (downward), column. Positions are (A, N, 2) or
  (B, A, N, 2) float32, last axis [start, end), in seconds and pixels, A = 3 axes. A token is
  turned by the middle of its bounds; channel c of a head pairs with c + hd/2, not with c + 1.
Trap: the shift is by (F, H, W). One that puts the reference's first index where the video's last
  one is, lays the reference's first token exactly on the video's last.

Usage:
    import rope, torch
    layout = rope.Layout(F=5, H=3, W=4)                        # 60 video, 12 reference tokens
    positions = torch.cat([layout.video_positions(), layout.reference_positions()], dim=1)
    cos, sin = rope.rotary_tables(positions[None], dim=4096, heads=32)
    q = rope.apply_rotary(torch.rand(1, 32, 72, 128), cos, sin)         # your queries, and keys

Read next: augment.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Does the reference lie after the last frame in time, and past the lower right corner in space?
PLACEMENTS = {
    "tass": (True, True),             # paper: the figure
    "overlap": (False, False),        # our reading: (comparison) as in a plain in-context LoRA
    "time_only": (True, False),       # our reading: (comparison) the next frame, same place
    "space_only": (False, True),      # our reading: (comparison) frame 0's time, another place
    "overlap_phase": (False, False),  # our reading: (comparison) see Layout.source_turn
}


def video_grid(F: int, H: int, W: int) -> Tensor:
    """LTX-2.3: index of every video token, frame slowest, column fastest: (F*H*W, 3) int64.

    Raises ValueError for a size below 1.
    """
    if min(F, H, W) < 1:
        raise ValueError(f"expected F, H, W of at least 1, got {F}, {H}, {W}; "
                         "give latent sizes, not pixels")
    axes = torch.arange(F), torch.arange(H), torch.arange(W)
    return torch.cartesian_prod(*axes).reshape(-1, 3)                     # (F*H*W, 3)


def reference_grid(F: int, H: int, W: int, placement: str = "tass") -> Tensor:
    """paper: a grid of one video frame's size, shifted by (F, H, W); row by row: (H*W, 3) int64.

    Raises ValueError for an unknown placement or a size below 1.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"expected a placement out of {sorted(PLACEMENTS)}, got {placement!r}; "
                         "use one of them")
    in_time, in_space = PLACEMENTS[placement]
    shift = torch.tensor([F * in_time, H * in_space, W * in_space])       # tass: (F, H, W)
    return video_grid(1, H, W) + shift                                    # (H*W, 3)


def grid_to_positions(
    grid: Tensor, frame_rate: float, time_scale: int = 8, space_scale: int = 32
) -> Tensor:
    """Bounds of every token in seconds and pixels, from its latent index.

    LTX-2.3: a latent frame covers `time_scale` frames, a latent cell `space_scale` pixels a side.
    The VAE is causal: latent frame 0 holds one single frame, so time bounds move back by
    time_scale - 1 frames and stop at 0. grid (N, 3); frame_rate in frames per second. Returns
    (3, N, 2) float32. Raises ValueError for another shape or a rate that is not positive.
    """
    if grid.ndim != 2 or grid.shape[1] != 3:
        raise ValueError(f"expected a grid (N, 3), got {tuple(grid.shape)}; use video_grid")
    if not frame_rate > 0:
        raise ValueError(f"expected a frame rate above 0, got {frame_rate}; give frames per second")
    bounds = torch.stack([grid.T, grid.T + 1], dim=-1).to(torch.float32)  # (3, N, 2) indices
    time, space = bounds[:1] * time_scale, bounds[1:] * space_scale       # frames, pixels
    time = (time + 1 - time_scale).clamp(min=0) / frame_rate              # (1, N, 2) seconds
    return torch.cat([time, space])                                       # (3, N, 2)


@dataclass(frozen=True)
class Layout:
    """Where all tokens of one clip lie: the latent grid, its units, and the reference's place.

    paper: placement "tass". F, H, W: latent frames, rows, columns; frame_rate in frames per
    second; the scales are the VAE's. source_turn counts for "overlap_phase" alone. our reading:
    (comparison) some public LoRAs for LTX, which others call TASS-RoPE although it is not the
    paper's scheme, lay the reference on frame 0 and tell it apart by a constant turn of its
    angles: a fourth axis, 0 for video tokens, source_turn for the reference (rotary_tables).
    """

    F: int
    H: int
    W: int
    frame_rate: float = 24.0
    time_scale: int = 8
    space_scale: int = 32
    placement: str = "tass"
    source_turn: float = 2.0  # what LTX-Best-Face-ID was trained with (BFSNodes 1.29)

    def video_positions(self) -> Tensor:
        """(A, L, 2), L = F*H*W: the same with and without a reference."""
        return self._positions(video_grid(self.F, self.H, self.W), turn=0.0)

    def reference_positions(self) -> Tensor:
        """(A, R, 2), R = H*W."""
        grid = reference_grid(self.F, self.H, self.W, self.placement)
        return self._positions(grid, turn=self.source_turn)

    def _positions(self, grid, turn):
        units = self.frame_rate, self.time_scale, self.space_scale
        positions = grid_to_positions(grid, *units)                       # (3, N, 2)
        if self.placement != "overlap_phase":
            return positions
        return torch.cat([positions, torch.full_like(positions[:1], turn)])  # (4, N, 2)


def rotary_frequencies(count: int, theta: float, device: torch.device | None = None) -> Tensor:
    """`count` angular frequencies from pi/2 to theta*pi/2, evenly spaced in the exponent.

    LTX-2.3: frequencies are made in float64 and rounded, angles in float32, as in training: at
    the top end they reach 1e4 rad, where float32 steps by 1e-3, so any other rounding shows.
    Returns (count,) float32.
    """
    exponent = torch.linspace(0.0, 1.0, count, dtype=torch.float64)  # Apple's GPUs have no float64
    return (theta**exponent * (torch.pi / 2)).to(device, torch.float32)


def rotary_tables(
    positions: Tensor,
    dim: int,
    heads: int,
    theta: float = 10000.0,
    max_pos: Sequence[float] = (20, 2048, 2048),
) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which every head rotates every token, (B, heads, N, dim/heads/2) each.

    LTX-2.3: positions are divided by `max_pos` (seconds, pixels, pixels) and mapped from 0..1 to
    -1..1; angles are listed with frequency slow and axis fast, filled up in front with "no
    rotation", and dealt out to the heads in order: head 0 has the lowest frequencies.
    positions (B, A, N, 2): bounds, of which the middle is used; or (B, A, N): used as they are.
    max_pos has one entry an axis (3 for video; 1 for the text connector); an axis more is
    Layout.source_turn. dim is the width over all heads. Raises ValueError when sizes do not fit.
    """
    A = len(max_pos)
    if positions.ndim not in (3, 4) or positions.shape[1] not in (A, A + 1):
        raise ValueError(f"expected positions (B, {A}, N[, 2]), got {tuple(positions.shape)}; "
                         "give one max_pos per axis")
    if dim % (2 * heads):
        raise ValueError(f"expected a width divisible by 2*heads, got width {dim} and {heads} "
                         "heads; change one")
    positions = positions.to(torch.float32)
    if positions.ndim == 4:
        positions = (positions[..., 0] + positions[..., 1]) / 2           # (B, A or A + 1, N)
    positions, turn = positions[:, :A], positions[:, A:]                  # turn: (B, 0 or 1, N)
    B, _, N = positions.shape
    unit = positions / positions.new_tensor(list(max_pos))[:, None] * 2 - 1  # (B, A, N) in -1..1
    frequencies = rotary_frequencies(dim // (2 * A), theta, positions.device)  # (n,)
    angles = unit.transpose(1, 2)[:, :, None, :] * frequencies[:, None]   # (B, N, n, A)
    angles = angles.reshape(B, N, -1)                                     # (B, N, n*A)
    missing = dim // 2 - angles.shape[-1]
    angles = torch.nn.functional.pad(angles, (missing, 0))                # (B, N, dim/2), cos 0 = 1
    angles = angles.reshape(B, N, heads, -1).transpose(1, 2)              # (B, nh, N, hd/2)
    cos, sin = angles.cos(), angles.sin()                                 # (B, nh, N, hd/2)
    if turn.shape[1]:  # every head alike, fading over its channels from 1 to almost 0
        d = torch.arange(angles.shape[-1], device=angles.device)          # (hd/2,)
        more = turn[..., None] * 10000.0 ** (-d / len(d))                 # (B, 1, N, hd/2)
        # A turn more, not an angle more: beside 1e4 rad, float32 would round it to 1e-3.
        cos, sin = cos * more.cos() - sin * more.sin(), sin * more.cos() + cos * more.sin()
    return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys: lengths stay, scores come to depend on position differences only.

    LTX-2.3: channel c of the first half and channel c of the second half form one plane; cos and
    sin are rounded to the dtype of x first. x (B, nh, N, hd); cos, sin (B, nh, N, hd/2) from
    rotary_tables. Returns the shape of x. Raises ValueError when the tables do not fit.
    """
    nh, N, hd = x.shape[1:]
    if cos.shape[1:] != (nh, N, hd // 2):
        raise ValueError(f"expected tables (B, {nh}, {N}, {hd // 2}), got {tuple(cos.shape)}; "
                         "build them for this x")
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, dim=-1)                                             # (B, nh, N, hd/2) each
    turned_a = torch.addcmul(a * cos, b, sin, value=-1)                   # a cos - b sin
    turned_b = torch.addcmul(b * cos, a, sin)                             # b cos + a sin
    return torch.cat([turned_a, turned_b], dim=-1)                        # (B, nh, N, hd)


def score_map(layout: Layout, frame: int, dim: int = 4096, heads: int = 32) -> Tensor:
    """our reading: (demo) score of a frame's middle token with each reference cell, by place alone.

    Equal unit vectors in every q and k leave the mean over all planes of cos(angle difference),
    1 at no distance. Returns (H, W).
    """
    H, W = layout.H, layout.W
    query = frame * H * W + H // 2 * W + W // 2                           # the middle token
    asked = layout.video_positions()[:, query : query + 1]                # (A, 1, 2)
    positions = torch.cat([asked, layout.reference_positions()], dim=1)   # (A, 1 + H*W, 2)
    same = torch.full((1, heads, 1 + H * W, dim // heads), dim**-0.5)     # (1, nh, 1 + H*W, hd)
    turned = apply_rotary(same, *rotary_tables(positions[None], dim, heads))
    return (turned[:, :, :1] * turned[:, :, 1:]).sum(dim=(0, 1, 3)).reshape(H, W)


def _demo() -> None:
    print("The paper's example: a 3 x 4 reference, 5 frames of 3 rows x 4 columns. Then, for")
    print("LTX-2.3's 121 frames of 512 x 768 (16 x 16 x 24 cells), scores by place, q = k.")
    for name in ("overlap", "time_only", "space_only", "tass"):
        (time, row, left), (_, bottom, right) = reference_grid(5, 3, 4, name)[[0, -1]].tolist()
        print(f"{name}: reference at time {time}, rows {row}..{bottom}, columns {left}..{right}")
        for frame in (0, 15):
            s = score_map(Layout(16, 16, 24, placement=name), frame)
            print(f"  from frame {frame:2d}: same cell {s[8, 12]:5.2f}, all cells {s.mean():5.2f}")
    print("Notice: shifted in space, the same cell is no longer ahead of the others. A face is")
    print("then found by what q and k hold; a trained q could ask for a place, but not for free.")


if __name__ == "__main__":
    _demo()
