"""Positions and rotation: equal to LTX-2.3's on recorded vectors, and what the reference placements promise.

Hardware: CPU, a few seconds. Run: python -m pytest tests/test_rope.py
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

import rope

GOLDEN = Path(__file__).parent / "golden" / "rope.safetensors"
CASES = ["real_dim_video", "small_grid", "batch2", "custom_positions", "connector_1d_real_dim", "connector_1d_small"]
SIZES = {"F": st.integers(1, 40), "H": st.integers(1, 12), "W": st.integers(1, 12)}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a - b).abs().max().item()


def middles(grid: torch.Tensor, fps: float, time_scale: int = 8, space_scale: int = 32) -> list[tuple[float, ...]]:
    return [tuple(p) for p in rope.grid_to_positions(grid, fps, time_scale, space_scale).mean(-1).T.tolist()]


@pytest.mark.parametrize("case", CASES)
def test_tables_and_rotation_equal_the_reference_implementation(case):
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])["cases"][case]
        g = {name: file.get_tensor(f"{case}.{name}") for name in ("positions", "freqs", "cos", "sin", "q", "q_rot")}
    heads = config["heads"]
    count = config["dim"] // (2 * len(config["max_pos"]))
    assert difference(rope.rotary_frequencies(count, config["theta"]), g["freqs"]) == 0
    cos, sin = rope.rotary_tables(g["positions"], config["dim"], heads, config["theta"], config["max_pos"])
    q = g["q"].unflatten(-1, (heads, -1)).transpose(1, 2)
    rotated = rope.apply_rotary(q, cos, sin).transpose(1, 2).flatten(2)
    found = [difference(cos, g["cos"]), difference(sin, g["sin"]), difference(rotated, g["q_rot"])]
    print(case, found)
    assert max(found) < 1e-5, found


def test_grid_positions_equal_the_reference_implementation():
    """The recorded small grid is 3 x 4 x 6 latent frames, rows, columns at 24 frames per second."""
    with safe_open(GOLDEN, "pt") as file:
        expected = file.get_tensor("small_grid.positions")[0]
    sizes = [len(expected[axis, :, 0].unique()) for axis in range(3)]
    found = difference(rope.grid_to_positions(rope.video_grid(*sizes), 24), expected)
    assert found < 1e-6, found


def test_the_worked_example_of_the_base_model_holds():
    positions = rope.grid_to_positions(rope.video_grid(3, 2, 2), 24)
    token4 = torch.tensor([[1 / 24, 9 / 24], [0, 32], [0, 32]])
    token11 = torch.tensor([[9 / 24, 17 / 24], [32, 64], [32, 64]])
    assert difference(positions[:, 4], token4) < 1e-6
    assert difference(positions[:, 11], token11) < 1e-6
    assert difference(positions[0, 0], torch.tensor([0, 1 / 24])) < 1e-6, "frame 0 of a causal VAE is one single frame"
    cos, sin = rope.rotary_tables(positions[None], dim=16, heads=2)
    expected = torch.tensor([[1, 1, 0.0327190, 0.0245411], [0.0245411, 0.8659424, 0.9238892, 0.9238892]])
    assert difference(cos[0, :, 4], expected) < 1e-6
    expected = torch.tensor([[0, 0, -0.9994646, -0.9996988], [-0.9996988, 0.5001438, 0.3826601, 0.3826601]])
    assert difference(sin[0, :, 4], expected) < 1e-6


@pytest.mark.parametrize("F", [1, 2, 16])
def test_the_figure_of_the_paper_rows_3_to_5_columns_4_to_7_at_time_F(F):
    grid = rope.reference_grid(F, 3, 4, "tass")
    assert grid.dtype == torch.int64
    assert grid.tolist() == [[F, row, column] for row in (3, 4, 5) for column in (4, 5, 6, 7)]


@settings(max_examples=25, deadline=None)
@given(**SIZES)
def test_each_placement_shifts_exactly_the_axes_in_its_name(F, H, W):
    first_frame = rope.video_grid(1, H, W)
    shifts = {"tass": (F, H, W), "overlap": (0, 0, 0), "time_only": (F, 0, 0), "space_only": (0, H, W),
              "overlap_phase": (0, 0, 0)}  # fmt: skip
    assert set(shifts) == set(rope.PLACEMENTS)
    for placement, shift in shifts.items():
        assert torch.equal(rope.reference_grid(F, H, W, placement), first_frame + torch.tensor(shift)), placement


@settings(max_examples=25, deadline=None)
@given(**SIZES, fps=st.floats(1, 120), scales=st.sampled_from([(8, 32), (4, 8), (1, 1)]))
def test_tass_tokens_share_no_coordinate_with_a_video_token_on_any_axis(F, H, W, fps, scales):
    video = middles(rope.video_grid(F, H, W), fps, *scales)
    reference = middles(rope.reference_grid(F, H, W), fps, *scales)
    assert len(set(reference)) == H * W
    assert not set(video) & set(reference)
    for axis in range(3):
        assert max(p[axis] for p in video) < min(p[axis] for p in reference), f"axis {axis}"


@settings(max_examples=25, deadline=None)
@given(**SIZES)
def test_only_overlap_puts_reference_tokens_onto_video_tokens(F, H, W):
    video = set(middles(rope.video_grid(F, H, W), 24))
    for placement in rope.PLACEMENTS:
        shared = video & set(middles(rope.reference_grid(F, H, W, placement), 24))
        assert len(shared) == (H * W if placement.startswith("overlap") else 0), placement


def test_tass_begins_where_the_video_ends():
    """With 121 frames the reference starts at frame 121: adjacent in time, no gap and no overlap."""
    video = rope.grid_to_positions(rope.video_grid(16, 3, 4), 24)
    reference = rope.grid_to_positions(rope.reference_grid(16, 3, 4), 24)
    assert difference(video[0, :, 1].max(), torch.tensor(121 / 24)) < 1e-6
    assert torch.equal(video.amax(dim=(1, 2)), reference.amin(dim=(1, 2)))


def test_the_phase_turns_the_reference_by_the_stated_angles_and_leaves_every_other_score_alone():
    """phase[d] = source * phase_scale * 10000^(-d / L) for channel d of every head, on top of the overlap placement."""
    F, H, W, heads, hd, scale = 2, 2, 3, 2, 12, 0.7
    grid = torch.cat([rope.video_grid(F, H, W), rope.reference_grid(F, H, W, "overlap_phase")])
    positions = rope.grid_to_positions(grid, 24)
    video, reference = F * H * W, H * W
    phase = rope.source_phase("overlap_phase", video, reference, scale)
    plain, turned = (rope.rotary_tables(positions[None], heads * hd, heads, phase=p) for p in (None, phase))
    angle = [torch.atan2(sin, cos).double() for cos, sin in (plain, turned)]
    expected = torch.tensor([[scale * 10000 ** (-d / 6) for d in range(6)]] * reference)
    found = (angle[1] - angle[0] + torch.pi) % (2 * torch.pi) - torch.pi  # (1, heads, N, L)
    assert found[:, :, :video].abs().max() == 0
    assert difference(found[:, :, video:].float(), expected.expand(1, heads, -1, -1)) < 2e-3, "angles reach 1e4 rad here"
    q, k = torch.randn(2, 1, heads, video + reference, hd)
    scores = [rope.apply_rotary(q, *t) @ rope.apply_rotary(k, *t).transpose(-1, -2) for t in (plain, turned)]
    change = (scores[1] - scores[0]).abs()
    assert change[..., :video, :video].max() == 0, "video among itself"
    assert change[..., video:, video:].max() < 1e-2, "the reference among itself: only the rounding of large angles"
    assert change[..., :video, video:].max() > 0.1, "video against reference"
    assert all(rope.source_phase(name, 4, 2) is None for name in rope.PLACEMENTS if name != "overlap_phase")
    assert rope.source_phase("overlap_phase", 4, 2, 0.0).abs().max() == 0


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    shift=st.tuples(st.floats(-4, 4), st.floats(-500, 500), st.floats(-500, 500)),
)
def test_moving_every_token_together_changes_no_attention_score(seed, shift):
    """theta is 100 here: at 10000 float32 angles reach 1e4 rad and their rounding, 1e-3, would hide the property."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cat([rope.video_grid(3, 2, 3), rope.reference_grid(3, 2, 3)])
    positions = rope.grid_to_positions(grid, 24)[None]
    q, k = torch.randn(2, 1, 4, len(grid), 12, generator=generator)

    def scores(positions):
        cos, sin = rope.rotary_tables(positions, dim=48, heads=4, theta=100)
        return rope.apply_rotary(q, cos, sin) @ rope.apply_rotary(k, cos, sin).transpose(-1, -2)

    moved = positions + torch.tensor(shift)[None, :, None, None]
    found = difference(scores(positions), scores(moved))
    assert found < 1e-3, found


def test_moving_only_the_reference_changes_the_scores():
    """The counterpart: the placement is visible to attention, so the test above is not empty."""
    q, k = torch.randn(2, 1, 4, 24, 12)
    scores = {}
    for placement in rope.PLACEMENTS:
        grid = torch.cat([rope.video_grid(3, 2, 3), rope.reference_grid(3, 2, 3, placement)])
        cos, sin = rope.rotary_tables(rope.grid_to_positions(grid, 24)[None], dim=48, heads=4)
        scores[placement] = rope.apply_rotary(q, cos, sin) @ rope.apply_rotary(k, cos, sin).transpose(-1, -2)
    for placement in ("overlap", "time_only", "space_only"):
        assert difference(scores["tass"][..., :18, 18:], scores[placement][..., :18, 18:]) > 0.1, placement
        assert difference(scores["tass"][..., :18, :18], scores[placement][..., :18, :18]) == 0, "video among itself"


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 4), pairs=st.integers(1, 9), axes=st.sampled_from([1, 3]), seed=st.integers(0, 999))
def test_rotation_keeps_lengths(heads, pairs, axes, seed):
    dim = 2 * pairs * heads
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(2, axes, 5, generator=generator) * 100
    cos, sin = rope.rotary_tables(positions, dim, heads, max_pos=(20, 2048, 2048)[-axes:])
    assert cos.shape == sin.shape == (2, heads, 5, pairs)
    x = torch.randn(2, heads, 5, 2 * pairs, generator=generator)
    found = difference(rope.apply_rotary(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert found < 1e-5, found


def test_leftover_pairs_sit_in_front_and_do_not_rotate():
    cos, sin = rope.rotary_tables(torch.full((1, 3, 1), 7.0), dim=64, heads=4)  # 3 * 10 frequencies for 32 pairs
    assert cos[0, 0, 0, :2].tolist() == [1, 1] and sin[0, 0, 0, :2].tolist() == [0, 0]
    assert (sin.flatten()[2:] != 0).all()


def test_rotation_keeps_the_dtype_of_its_input():
    cos, sin = rope.rotary_tables(torch.rand(1, 3, 4), dim=24, heads=2)
    assert rope.apply_rotary(torch.randn(1, 2, 4, 12, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope.reference_grid(1, 1, 1, "beside"), "placement"),
        (lambda: rope.video_grid(0, 1, 1), "at least 1"),
        (lambda: rope.reference_grid(1, -1, 1), "at least 1"),
        (lambda: rope.grid_to_positions(torch.zeros(2, 2), 24), "shape"),
        (lambda: rope.grid_to_positions(rope.video_grid(1, 1, 1), 0), "frame rate"),
        (lambda: rope.rotary_tables(torch.zeros(1, 2, 4), 24, 2), "max_pos"),
        (lambda: rope.rotary_tables(torch.zeros(1, 3, 4), 25, 2), "divisible"),
        (lambda: rope.apply_rotary(torch.zeros(1, 2, 4, 6), *torch.zeros(2, 1, 2, 5, 3)), "tables"),
    ],
)
def test_wrong_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


SHIFTS = {"overlap": (0, 0, 0), "time_only": (1, 0, 0), "space_only": (0, 1, 1), "tass": (1, 1, 1)}  # in units of F, H, W


@pytest.mark.parametrize("placement", SHIFTS)
def test_the_score_map_is_the_mean_cosine_of_the_angle_differences(placement):
    """Two routes: rotating vectors in float32, and cosines of distance times frequency in float64."""
    F, H, W, frame = 16, 6, 9, 15
    query, cells = torch.tensor([[frame, H // 2, W // 2]]), rope.reference_grid(F, H, W, placement)
    token, cells = (rope.grid_to_positions(grid, 24).mean(-1).double() for grid in (query, cells))  # (3, 1), (3, R)
    distance = (token - cells) * 2 / torch.tensor([20, 2048, 2048])[:, None]  # (3, R)
    cosines = (rope.rotary_frequencies(4096 // 6, 10000).double() * distance[..., None]).cos()  # (3, R, n)
    expected = (cosines.sum(dim=(0, 2)) + 2) / 2048  # two pairs of channels stand still
    found = difference(rope.score_map(F, H, W, placement, frame).flatten().double(), expected)
    assert found < 1e-3, found


def test_the_score_map_is_what_random_content_gives_on_average():
    torch.manual_seed(1)
    F, H, W, heads, hd = 4, 3, 4, 4, 32
    grid = torch.cat([torch.tensor([[1, 1, 2]]), rope.reference_grid(F, H, W, "overlap")])
    q = torch.nn.functional.normalize(torch.randn(2000, 1, heads * hd), dim=-1).unflatten(-1, (heads, hd)).transpose(1, 2)
    x = rope.apply_rotary(q.expand(-1, -1, len(grid), -1), *rope.rotary_tables(
        rope.grid_to_positions(grid, 24)[None], heads * hd, heads))  # fmt: skip
    average = (x[:, :, :1] * x[:, :, 1:]).sum(dim=(1, 3)).mean(dim=0).reshape(H, W)
    found = difference(average, rope.score_map(F, H, W, "overlap", 1, heads * hd, heads))
    assert found < 0.01, found


def test_the_same_cell_leads_only_where_rows_and_columns_are_shared():
    F, H, W = 16, 16, 24
    for frame in (0, 7, 15):
        for placement in SHIFTS:
            score = rope.score_map(F, H, W, placement, frame)
            lead = (score[H // 2, W // 2] - score.mean()).item()
            if placement in ("overlap", "time_only"):
                assert score.argmax() == H // 2 * W + W // 2 and lead > 0.5, (placement, frame, lead)
            else:
                assert abs(lead) < 0.01 and score.max() - score.min() < 0.1, (placement, frame, lead)
    assert rope.score_map(F, H, W, "overlap", 0)[H // 2, W // 2].item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("frame", [0, 15])
def test_a_shift_in_time_alone_moves_every_cell_of_the_score_map_alike(frame):
    for still, moved in (("overlap", "time_only"), ("space_only", "tass")):
        change = rope.score_map(16, 8, 12, moved, frame) - rope.score_map(16, 8, 12, still, frame)
        assert change.abs().min() > 0.05 and change.max() - change.min() < 1e-3, (still, moved)


def test_a_fixed_turn_of_the_query_would_undo_the_shift_of_tass():
    """The placement is no lock: a layer that learnt this turn would see the same cell lead again."""
    F, H, W, heads, hd = 16, 8, 12, 32, 128
    limits = torch.tensor([20.0, 2048, 2048])
    middle = [rope.grid_to_positions(rope.reference_grid(F, H, W, name), 24).mean(-1) for name in ("tass", "overlap")]
    shift = (middle[0] - middle[1])[:, :1]
    turn = rope.rotary_tables((shift + limits[:, None] / 2)[None], heads * hd, heads)  # angle 0 is at half of max_pos
    place = rope.grid_to_positions(torch.tensor([[0, H // 2, W // 2]]), 24)[None]
    cells = rope.grid_to_positions(rope.reference_grid(F, H, W, "tass"), 24)[None]
    content = torch.full((1, heads, H * W, hd), (heads * hd) ** -0.5)
    q = rope.apply_rotary(rope.apply_rotary(content[:, :, :1], *turn), *rope.rotary_tables(place, heads * hd, heads))
    k = rope.apply_rotary(content, *rope.rotary_tables(cells, heads * hd, heads))
    found = difference((q * k).sum(dim=(0, 1, 3)).reshape(H, W), rope.score_map(F, H, W, "overlap", 0))
    assert found < 1e-3, found


@pytest.fixture(scope="module")
def picture():
    return rope.draw()


def centres(picture, column: int, top: int, rows: int, columns: int, cell: int) -> list[list[tuple[int, ...]]]:
    """The colours at the middle of every square of a panel."""
    left = 50 + 372 * column
    spots = [[(left + c * cell + cell // 2, top + r * cell + cell // 2) for c in range(columns)] for r in range(rows)]
    return [[picture.getpixel(spot) for spot in row] for row in spots]


@pytest.mark.parametrize(("column", "placement"), enumerate(SHIFTS))
def test_the_picture_shows_video_and_reference_cells_where_the_paper_and_the_placements_put_them(
    picture, column, placement
):
    """The paper's example: 3 rows x 4 columns, here 5 frames; tass is at rows 3..5, columns 4..7, time 5."""
    dt, dr, dc = (shift * size for shift, size in zip(SHIFTS[placement], (5, 3, 4), strict=True))
    colour = {kind: tuple(value) for kind, value in zip(("", "V", "R", "VR"), rope.COLOURS.tolist(), strict=True)}

    def expected(rows, columns, video, reference):
        kinds = [["V" * ((r, c) in video) + "R" * ((r, c) in reference) for c in range(columns)] for r in range(rows)]
        return [[colour[kind] for kind in row] for row in kinds]

    def block(rows, columns, r0=0, c0=0):
        return {(r0 + r, c0 + c) for r in range(rows) for c in range(columns)}

    front = expected(6, 8, block(3, 4), block(3, 4, dr, dc))
    assert centres(picture, column, 110, 6, 8, 32) == front
    side = expected(6, 6, block(3, 5), block(3, 1, dr, dt))
    assert centres(picture, column, 368, 6, 6, 32) == side


@pytest.mark.parametrize(("column", "placement"), enumerate(SHIFTS))
def test_the_picture_colours_the_scores_on_one_scale(picture, column, placement):
    for top, frame in ((626, 0), (884, 15)):
        score = rope.score_map(16, 16, 24, placement, frame)
        expected = rope.HEAT[(score.clamp(0, 1) * 100).long()].tolist()
        assert centres(picture, column, top, 16, 24, 12) == [[tuple(colour) for colour in row] for row in expected]
    assert rope.HEAT.shape == (101, 3) and (rope.HEAT[1:].sum(dim=1) < rope.HEAT[:-1].sum(dim=1)).all(), "darker = higher"


def test_the_picture_fits_a_slide_and_other_sizes_can_be_drawn(picture):
    assert picture.mode == "RGB" and picture.width <= 1600
    other = rope.draw(1, 1, 1, video=(2, 4, 5))
    assert other.size == picture.size
    assert centres(other, 3, 110, 2, 2, 48)[1][1] == tuple(rope.COLOURS[2].tolist()), "one cell, past the corner"


def test_the_demo_shows_the_figure(capsys, tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    rope._demo()
    printed = capsys.readouterr().out
    lines = printed.strip().splitlines()
    assert 10 <= len(lines) <= 25
    assert "tass: reference at time 5, rows 3..5, columns 4..7" in lines
    assert "  frame  0: same cell  1.00, mean  0.44, lead  0.56" in lines
    assert lines[-2].startswith("wrote rope_demo.png: ") and lines[-1].startswith("Notice: ")
    assert [path.name for path in tmp_path.iterdir()] == ["rope_demo.png"]
    with Image.open("rope_demo.png") as saved:
        assert saved.tobytes() == picture.tobytes()
