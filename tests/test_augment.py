"""Reference augmentation: what changes, what may not, that all chance comes from the generator.

No weights; pictures are random or drawn here. CPU, a few seconds.
Run: python -m pytest tests/test_augment.py
"""

import pytest
import torch
import torch.nn.functional as F

from augment import AugmentStrength, augment_color, augment_layout, augment_pose, augment_reference

FAMILIES = {"color": augment_color, "pose": augment_pose, "layout": augment_layout}
OFF = AugmentStrength(color=0, pose=0, layout=0, flip=0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(B=32, H=24, W=32):
    """Smooth random pictures in [-1, 1]."""
    small = torch.rand(B, 3, 4, 5, generator=seeded(7)) * 2 - 1
    return F.interpolate(small, (H, W), mode="bilinear")


def changed(a, b):
    return (a != b).flatten(1).any(dim=1)


def share_changed(**strength):
    images = pictures(1).repeat(2000, 1, 1, 1)
    settings = AugmentStrength(**{"color": 0, "pose": 0, "layout": 0, "flip": 0, **strength})
    return changed(augment_reference(images, seeded(), settings), images).float().mean().item()


def test_all_strengths_zero_return_the_input_bit_for_bit_and_draw_nothing():
    images, generator = pictures(), seeded()
    before = generator.get_state()
    assert torch.equal(augment_reference(images, generator, OFF), images)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_at_strength_zero_returns_the_input_bit_for_bit(family):
    image = pictures(1)[0]
    assert torch.equal(FAMILIES[family](image, seeded(), 0.0), image)
    assert not torch.equal(FAMILIES[family](image, seeded(), 1.0), image)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vanishing_strength_changes_vanishingly_little(family):
    image = pictures(1)[0]
    largest = (FAMILIES[family](image, seeded(), 1e-3) - image)[:, 1:-1, 1:-1].abs().max().item()
    assert largest < 1e-2, largest  # smooth picture: no jump at the off-value


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(24, 32), (40, 16), (32, 32)])
def test_shape_and_range_are_kept_and_nothing_is_nan(strength, shape):
    images = torch.rand(32, 3, *shape) * 2 - 1
    out = augment_reference(images, seeded(), AugmentStrength(strength, strength, strength, 0.5))
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert out.isfinite().all()
    assert out.min() >= -1, out.min()
    assert out.max() <= 1, out.max()


def test_one_seed_gives_one_result_and_another_seed_another():
    images = pictures()
    copy, before = images.clone(), torch.get_rng_state()
    assert torch.equal(augment_reference(images, seeded(1)), augment_reference(images, seeded(1)))
    assert torch.equal(images, copy), "the input is not written to"
    assert torch.equal(torch.get_rng_state(), before), "all chance comes from the generator"
    assert not torch.equal(
        augment_reference(images, seeded(1)), augment_reference(images, seeded(2))
    )


def test_pictures_that_draw_nothing_come_back_bit_for_bit():
    images = pictures(400)
    untouched = (~changed(augment_reference(images, seeded()), images)).float().mean().item()
    assert abs(untouched - 0.2 * 0.5 * 0.5) < 0.04, (
        untouched
    )  # 1 - p of color, pose, layout; 400 draws


@pytest.mark.parametrize(("family", "p"), [("color", 0.8), ("pose", 0.5), ("layout", 0.5)])
def test_families_are_applied_as_often_as_the_header_says(family, p):
    share = share_changed(**{family: 1.0})
    assert abs(share - p) < 0.05, share  # 2000 draws: three deviations are 0.034


def test_mirror_is_off_by_default_and_its_strength_is_its_probability():
    assert AugmentStrength().flip == 0
    images = pictures(4)
    assert torch.equal(
        augment_reference(images, seeded(), AugmentStrength(0, 0, 0, flip=1.0)), images.flip(-1)
    )
    share = share_changed(flip=0.25)
    assert abs(share - 0.25) < 0.04, share


def test_color_moves_nothing_equal_pixels_stay_equal():
    image = pictures(1)[0]
    image[:, :, 16:] = image[:, :, :16]  # two equal halves
    out = augment_color(image, seeded(3))
    difference = (out[:, :, 16:] - out[:, :, :16]).abs().max().item()
    assert difference < 1e-6, difference


def test_color_keeps_grey_pictures_grey():
    grey = pictures(16)[:, :1].repeat(1, 3, 1, 1)
    out = augment_color(grey, seeded())
    difference = (out - out.mean(dim=1, keepdim=True)).abs().max().item()
    assert difference < 1e-5, difference
    assert (out - grey).abs().flatten(1).amax(dim=1).min() > 0.01, "but not unchanged"


def test_about_one_in_twenty_pictures_loses_its_colour():
    out = augment_color(pictures(1).repeat(1000, 1, 1, 1), seeded())
    grey = (out.amax(dim=1) - out.amin(dim=1)).flatten(1).amax(dim=1) < 1e-4
    assert 0.03 < grey.float().mean() < 0.075, grey.float().mean()


def test_pose_opens_white_corners_and_keeps_the_middle_in_place():
    black = torch.full((64, 3, 33, 33), -1.0)
    out = augment_pose(black, seeded())
    assert (out[:, :, 10:23, 10:23] < -0.999).all(), "the middle is still picture"
    assert (out[:, :, 0, 0] == 1).any(), "some corner is white"


def test_pose_does_not_squash_a_wide_canvas():
    disc = torch.full((1, 3, 64, 128), 1.0)
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(128) - 63.5, indexing="ij")
    disc[:, :, (x**2 + y**2) < 20**2] = -1
    out = augment_pose(disc.repeat(64, 1, 1, 1), seeded())
    longest = []
    for dark in out[:, 0] < 0:
        spread = torch.linalg.eigvalsh(torch.cov(dark.nonzero().float().T))
        longest.append((spread[1] / spread[0]).sqrt().item())  # of the ellipse's two axes
    assert max(longest) < 1.2, longest  # 5 degrees of shear alone give 1.09


def test_pose_and_layout_both_show_where_both_are_drawn():
    black = torch.full((300, 3, 100, 100), -1.0)
    dark = (augment_reference(black, seeded(), AugmentStrength(0, 1, 1)) < -0.99).all(dim=1)
    rows, columns = dark.any(dim=2).sum(dim=-1), dark.any(dim=1).sum(dim=-1)
    filled = dark.sum(dim=(1, 2)) / (rows * columns)  # below 1: tilted in its bounding box
    assert ((rows < 85) & (columns < 85) & (filled < 0.95)).any(), "small and tilted"
    assert ((rows < 85) & (columns < 85) & (filled > 0.99)).any(), "small and upright"


def test_layout_shrinks_to_no_less_than_seven_tenths_and_cuts_at_most_a_twentieth():
    black = torch.full((500, 3, 100, 100), -1.0)
    out = augment_layout(black, seeded())
    # A ground that is black in all three colours would be taken for picture; here is none.
    dark = (out < -0.99).all(dim=1)
    sizes = torch.cat([dark.any(dim=1).sum(dim=-1), dark.any(dim=2).sum(dim=-1)])
    assert sizes.min() >= 70 - 5 - 2, sizes.min()  # 0.7, less 5 cut, less 2 blended at the edge
    assert sizes.max() > 97
    left = dark.any(dim=1).float().argmax(dim=-1)
    assert left.min() == 0
    assert left.max() > 20, left.max()


def test_layout_grounds_are_white_grey_or_a_colour_a_third_each():
    black = torch.full((900, 3, 40, 40), -1.0)
    out = augment_layout(black, seeded())
    corners = torch.stack([out[:, :, y, x] for y in (0, -1) for x in (0, -1)], dim=-1)  # (B, 3, 4)
    brightest = corners.sum(dim=1).argmax(dim=-1)
    ground = corners[torch.arange(900), :, brightest]
    ground = ground[(ground > -0.99).any(dim=-1)]  # where the ground shows in a corner
    white, grey = (
        (ground == 1).all(dim=-1).float().mean(),
        (ground.abs() < 1e-6).all(dim=-1).float().mean(),
    )
    assert len(ground) > 600, len(ground)
    assert 0.27 < white < 0.40, white
    assert 0.27 < grey < 0.40, grey


def test_pose_and_layout_together_are_resampled_once():
    # On noise every interpolation shows: it takes some of the finest detail away.
    noise = torch.rand(200, 3, 64, 64, generator=seeded(5)) * 2 - 1
    both = augment_reference(noise, seeded(), AugmentStrength(0, 1, 1))
    twice = augment_pose(augment_layout(noise, seeded(1)), seeded(2))

    def spread(images):
        return images[:, :, 28:36, 28:36].std().item()

    assert spread(twice) < 0.93 * spread(both), (spread(twice), spread(both))


@pytest.mark.parametrize(
    "kwargs", [{"color": -0.1}, {"pose": 3}, {"flip": 1.5}, {"layout": float("nan")}]
)
def test_strengths_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError, match="expected"):
        AugmentStrength(**kwargs)


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8).bfloat16()]
)
def test_a_picture_without_batch_axis_colours_or_precision_is_refused(images):
    with pytest.raises(ValueError, match="expected images"):
        augment_reference(images, seeded())
