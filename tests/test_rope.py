"""Positions and rotation: equal to LTX-2.3's on recorded vectors, and what TASS promises.

Hardware: CPU, a few seconds. Run: python -m pytest tests/test_rope.py
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import rope
from rope import Layout

GOLDEN = Path(__file__).parent / "golden" / "rope.safetensors"
CASES = ["real_dim_video", "small_grid", "batch2", "custom_positions", "connector_1d_real_dim",
         "connector_1d_small"]
SIZES = {"F": st.integers(1, 40), "H": st.integers(1, 12), "W": st.integers(1, 12)}
SHIFTS = {"tass": (1, 1, 1), "overlap": (0, 0, 0), "time_only": (1, 0, 0), "space_only": (0, 1, 1),
          "overlap_phase": (0, 0, 0)}  # in units of F, H, W


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a - b).abs().max().item()


def scores(positions, q, k, dim=48, heads=4, theta=10000.0):
    tables = rope.rotary_tables(positions, dim, heads, theta)
    return rope.apply_rotary(q, *tables) @ rope.apply_rotary(k, *tables).transpose(-1, -2)


@pytest.mark.parametrize("case", CASES)
def test_tables_and_rotation_equal_the_official_code(case):
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])["cases"][case]
        names = ("positions", "freqs", "cos", "sin", "q", "q_rot")
        g = {name: file.get_tensor(f"{case}.{name}") for name in names}
    heads = config["heads"]
    count = config["dim"] // (2 * len(config["max_pos"]))
    assert difference(rope.rotary_frequencies(count, config["theta"]), g["freqs"]) == 0
    cos, sin = rope.rotary_tables(g["positions"], config["dim"], heads, config["theta"],
                                  config["max_pos"])
    q = g["q"].unflatten(-1, (heads, -1)).transpose(1, 2)
    rotated = rope.apply_rotary(q, cos, sin).transpose(1, 2).flatten(2)
    pairs = (cos, g["cos"]), (sin, g["sin"]), (rotated, g["q_rot"])
    found = [difference(*pair) for pair in pairs]
    assert max(found) < 1e-5, found


def test_grid_positions_equal_the_official_code():
    """The recorded small grid is 3 x 4 x 6 latent frames, rows, columns at 24 frames per second."""
    with safe_open(GOLDEN, "pt") as file:
        expected = file.get_tensor("small_grid.positions")[0]
    sizes = [len(expected[axis, :, 0].unique()) for axis in range(3)]
    assert difference(Layout(*sizes).video_positions(), expected) < 1e-6


def test_frame_0_of_a_causal_vae_is_one_single_frame():
    positions = rope.grid_to_positions(rope.video_grid(3, 2, 2), 24)
    assert difference(positions[0, 0], torch.tensor([0, 1 / 24])) < 1e-6
    assert difference(positions[:, 4], torch.tensor([[1 / 24, 9 / 24], [0, 32], [0, 32]])) < 1e-6
    last = torch.tensor([[9 / 24, 17 / 24], [32, 64], [32, 64]])
    assert difference(positions[:, 11], last) < 1e-6


@pytest.mark.parametrize("F", [1, 2, 16])
def test_the_figure_of_the_paper_rows_3_to_5_columns_4_to_7_at_time_F(F):
    grid = rope.reference_grid(F, 3, 4, "tass")
    assert grid.dtype == torch.int64
    assert grid.tolist() == [[F, row, column] for row in (3, 4, 5) for column in (4, 5, 6, 7)]


@settings(max_examples=25, deadline=None)
@given(**SIZES)
def test_each_placement_shifts_exactly_the_axes_in_its_name(F, H, W):
    assert set(SHIFTS) == set(rope.PLACEMENTS)
    for placement, (f, h, w) in SHIFTS.items():
        expected = rope.video_grid(1, H, W) + torch.tensor([f * F, h * H, w * W])
        assert torch.equal(rope.reference_grid(F, H, W, placement), expected), placement


@settings(max_examples=25, deadline=None)
@given(**SIZES, fps=st.floats(1, 120), scales=st.sampled_from([(8, 32), (4, 8), (1, 1)]))
def test_tass_tokens_share_no_coordinate_with_a_video_token_on_any_axis(F, H, W, fps, scales):
    layout = Layout(F, H, W, fps, *scales)
    video, reference = layout.video_positions().mean(-1), layout.reference_positions().mean(-1)
    assert len(set(map(tuple, reference.T.tolist()))) == H * W
    assert (video.amax(dim=1) < reference.amin(dim=1)).all()
    for placement, shift in SHIFTS.items():  # and only overlap lies on top of the video
        cells = Layout(F, H, W, fps, *scales, placement=placement).reference_positions()[:3]
        shared = set(map(tuple, video.T.tolist())) & set(map(tuple, cells.mean(-1).T.tolist()))
        assert len(shared) == (0 if any(shift) else H * W), placement


def test_tass_begins_where_the_video_ends():
    """With 121 frames the reference starts at frame 121: adjacent, no gap and no overlap."""
    layout = Layout(16, 3, 4)
    video, reference = layout.video_positions(), layout.reference_positions()
    assert difference(video[0, :, 1].max(), torch.tensor(121 / 24)) < 1e-6
    assert torch.equal(video.amax(dim=(1, 2)), reference.amin(dim=(1, 2)))


def test_the_source_turn_turns_the_reference_and_leaves_every_other_score_alone():
    """turn * 10000^(-d / L) for channel d of every head, on top of the overlap placement."""
    heads, hd, turn, video = 2, 12, 0.7, 12
    layout = Layout(2, 2, 3, placement="overlap_phase", source_turn=turn)
    turned = torch.cat([layout.video_positions(), layout.reference_positions()], dim=1)[None]
    plain = turned[:, :3]
    assert turned.shape[1] == 4 and Layout(2, 2, 3).video_positions().shape[0] == 3
    angles = []
    for positions in (plain, turned):
        cos, sin = rope.rotary_tables(positions, heads * hd, heads)
        angles.append(torch.atan2(sin, cos).double())
    found = (angles[1] - angles[0] + torch.pi) % (2 * torch.pi) - torch.pi    # (1, heads, N, L)
    expected = torch.tensor([turn * 10000 ** (-d / 6) for d in range(6)]).double()
    assert found[:, :, :video].abs().max() == 0
    assert (found[:, :, video:] - expected).abs().max() < 2e-3, "angles reach 1e4 rad here"
    q, k = torch.randn(2, 1, heads, 18, hd)
    before, after = (scores(p, q, k, heads * hd, heads) for p in (plain, turned))
    change = (after - before).abs()
    assert change[..., :video, :video].max() == 0, "video among itself"
    assert change[..., video:, video:].max() < 1e-2, "only the rounding of large angles"
    assert change[..., :video, video:].max() > 0.1, "video against reference"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999),
       shift=st.tuples(st.floats(-4, 4), st.floats(-500, 500), st.floats(-500, 500)))
def test_moving_every_token_together_changes_no_attention_score(seed, shift):
    """theta is 100 here: at 10000 float32 angles reach 1e4 rad, and their rounding hides it."""
    layout = Layout(3, 2, 3)
    positions = torch.cat([layout.video_positions(), layout.reference_positions()], dim=1)[None]
    q, k = torch.randn(2, 1, 4, 24, 12, generator=torch.Generator().manual_seed(seed))
    moved = positions + torch.tensor(shift)[None, :, None, None]
    found = difference(scores(positions, q, k, theta=100), scores(moved, q, k, theta=100))
    assert found < 1e-3, found


def test_moving_only_the_reference_changes_its_scores_and_not_the_video_s():
    """The counterpart: attention sees the placement, so the test above is not empty."""
    q, k = torch.randn(2, 1, 4, 24, 12)
    found = {}
    for placement in ("tass", "overlap", "time_only", "space_only"):
        layout = Layout(3, 2, 3, placement=placement)
        both = torch.cat([layout.video_positions(), layout.reference_positions()], dim=1)
        found[placement] = scores(both[None], q, k)
    for placement in ("overlap", "time_only", "space_only"):
        assert difference(found["tass"][..., :18, 18:], found[placement][..., :18, 18:]) > 0.1
        assert difference(found["tass"][..., :18, :18], found[placement][..., :18, :18]) == 0


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 4), pairs=st.integers(1, 9), axes=st.sampled_from([1, 3]))
def test_rotation_keeps_lengths(heads, pairs, axes):
    positions = torch.rand(2, axes, 5) * 100
    cos, sin = rope.rotary_tables(positions, 2 * pairs * heads, heads,
                                  max_pos=(20, 2048, 2048)[-axes:])
    assert cos.shape == sin.shape == (2, heads, 5, pairs)
    x = torch.randn(2, heads, 5, 2 * pairs)
    assert difference(rope.apply_rotary(x, cos, sin).norm(dim=-1), x.norm(dim=-1)) < 1e-5
    assert rope.apply_rotary(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_leftover_pairs_sit_in_front_and_do_not_rotate():
    cos, sin = rope.rotary_tables(torch.full((1, 3, 1), 7.0), dim=64, heads=4)  # 30 for 32 pairs
    assert cos[0, 0, 0, :2].tolist() == [1, 1] and sin[0, 0, 0, :2].tolist() == [0, 0]
    assert (sin.flatten()[2:] != 0).all()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: rope.reference_grid(1, 1, 1, "beside"), "placement"),
    (lambda: rope.video_grid(0, 1, 1), "at least 1"),
    (lambda: rope.grid_to_positions(torch.zeros(2, 2), 24), "use video_grid"),
    (lambda: rope.grid_to_positions(rope.video_grid(1, 1, 1), 0), "frame rate"),
    (lambda: rope.rotary_tables(torch.zeros(1, 2, 4), 24, 2), "max_pos"),
    (lambda: rope.rotary_tables(torch.zeros(1, 3, 4), 25, 2), "divisible"),
    (lambda: rope.apply_rotary(torch.zeros(1, 2, 4, 6), *torch.zeros(2, 1, 2, 5, 3)), "tables"),
])
def test_wrong_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("placement", ["overlap", "tass"])
def test_the_score_map_is_the_mean_cosine_of_the_angle_differences(placement):
    """Two routes: rotating vectors in float32, and cosines of distance times frequency."""
    layout, frame = Layout(16, 6, 9, placement=placement), 15
    token = rope.grid_to_positions(torch.tensor([[frame, 3, 4]]), 24).mean(-1).double()   # (3, 1)
    cells = layout.reference_positions().mean(-1).double()                                # (3, R)
    distance = (token - cells) * 2 / torch.tensor([20, 2048, 2048])[:, None]              # (3, R)
    frequencies = rope.rotary_frequencies(4096 // 6, 10000).double()
    cosines = (frequencies * distance[..., None]).cos()                   # (3, R, n)
    expected = (cosines.sum(dim=(0, 2)) + 2) / 2048       # two pairs of channels stand still
    assert difference(rope.score_map(layout, frame).flatten().double(), expected) < 1e-3


def test_the_same_cell_leads_only_where_rows_and_columns_are_shared():
    for placement in ("overlap", "time_only", "space_only", "tass"):
        for frame in (0, 15):
            score = rope.score_map(Layout(16, 16, 24, placement=placement), frame)
            lead = (score[8, 12] - score.mean()).item()
            if placement in ("overlap", "time_only"):
                assert score.argmax() == 8 * 24 + 12 and lead > 0.5, (placement, frame, lead)
            else:
                assert abs(lead) < 0.01, (placement, frame, lead)


def test_a_fixed_turn_of_the_query_would_undo_the_shift_of_tass():
    """The placement is no lock: a layer that learnt this turn would see the same cell lead."""
    layout, heads, hd = Layout(16, 8, 12), 32, 128
    overlap = Layout(16, 8, 12, placement="overlap")
    shift = (layout.reference_positions() - overlap.reference_positions()).mean(-1)[:, :1]
    middle = torch.tensor([20.0, 2048, 2048])[:, None] / 2      # angle 0 is at half of max_pos
    turn = rope.rotary_tables((shift + middle)[None], heads * hd, heads)
    place = rope.grid_to_positions(torch.tensor([[0, 4, 6]]), 24)[None]
    content = torch.full((1, heads, 96, hd), (heads * hd) ** -0.5)
    q = rope.apply_rotary(content[:, :, :1], *turn)
    q = rope.apply_rotary(q, *rope.rotary_tables(place, heads * hd, heads))
    tables = rope.rotary_tables(layout.reference_positions()[None], heads * hd, heads)
    found = (q * rope.apply_rotary(content, *tables)).sum(dim=(0, 1, 3)).reshape(8, 12)
    assert difference(found, rope.score_map(overlap, 0)) < 1e-3
