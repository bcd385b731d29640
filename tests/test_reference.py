"""The reference's way into the sequence and out again: canvas, tokens, clean timesteps, slicing; the demo's picture.

No weights: pictures are drawn here, the VAE is a stand-in. CPU, about a second.
Run: python -m pytest tests/test_reference.py
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from reference import (
    SIZES,
    _portrait,
    append_reference,
    draw,
    drop_reference,
    encode_reference,
    letterbox,
    patchify,
    unpatchify,
)

RED = (200, 30, 60)


def to_pixels(canvas):
    return ((canvas + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()  # (H, W, 3)


def assert_colour(canvas, colour, tolerance=1):
    difference = np.abs(to_pixels(canvas).astype(int) - np.array(colour)).max()
    assert difference <= tolerance, f"largest difference {difference} of 255"


# ---- canvas


@pytest.mark.parametrize(
    ("size", "box"), [((50, 100), (24, 0, 32, 64)), ((160, 40), (0, 22, 80, 20))], ids=["portrait", "landscape"]
)
def test_letterbox_keeps_the_aspect_centred_on_white(size, box):
    canvas = letterbox(Image.new("RGB", size, RED), height=64, width=80)
    left, top, w, h = box
    assert canvas.shape == (3, 64, 80)
    assert canvas.dtype == torch.float32
    picture = torch.zeros(64, 80, dtype=torch.bool)
    picture[top : top + h, left : left + w] = True
    assert (canvas[:, ~picture] == 1.0).all(), "the rest of the canvas is exactly white"
    assert_colour(canvas[:, top : top + h, left : left + w], RED, tolerance=0)


def test_a_picture_of_the_canvas_size_passes_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    canvas = letterbox(Image.fromarray(pixels), 32, 48)
    assert (to_pixels(canvas) == pixels).all()
    difference = (canvas - (torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)).abs().max().item()
    assert difference == 0, difference


def test_black_and_white_reach_the_ends_of_the_range_and_the_pad_is_free():
    assert letterbox(Image.new("RGB", (8, 8), "black"), 8, 8).max() == -1
    assert letterbox(Image.new("RGB", (8, 8), "white"), 8, 8).min() == 1
    assert (letterbox(Image.new("RGB", (8, 8), "white"), 8, 16, pad=-1)[:, :, :4] == -1).all()


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1), (33, 31), (3001, 2000)])
def test_any_size_fits_a_small_canvas(size):
    assert letterbox(Image.new("RGB", size, RED), 32, 32).shape == (3, 32, 32)


def test_shrinking_is_antialiased_a_fine_checkerboard_becomes_grey():
    board = np.indices((512, 512)).sum(axis=0) % 2 * 255
    canvas = letterbox(Image.fromarray(board.astype(np.uint8)), 32, 32)
    assert canvas[:, 2:-2, 2:-2].abs().max() < 0.02, canvas.abs().max()   # plain bilinear would give -1 or 1


def test_transparent_pixels_become_white_and_not_what_hides_below_them():
    picture = Image.new("RGBA", (32, 32), (*RED, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 32, 16))                           # transparent black above
    canvas = letterbox(picture, 32, 32)
    assert (canvas[:, :16] == 1).all()
    assert_colour(canvas[:, 16:], RED, tolerance=0)
    half = letterbox(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), 4, 4)
    assert half.abs().max() < 0.01, "half-transparent black on white is grey"


def test_palette_pictures_work_with_and_without_a_transparent_colour():
    picture = Image.new("RGB", (16, 16), RED)
    picture.paste((0, 255, 0), (0, 0, 16, 8))
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    assert_colour(letterbox(palette, 16, 16)[:, 8:], RED, tolerance=4)    # the palette itself is coarse
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=palette.getpixel((0, 0)))      # green is see-through
    canvas = letterbox(Image.open(file), 16, 16)
    assert (canvas[:, :8] == 1).all()
    assert_colour(canvas[:, 8:], RED, tolerance=4)


def test_grey_grey_with_alpha_one_bit_and_cmyk_pictures_work():
    assert_colour(letterbox(Image.new("L", (8, 8), 90), 8, 8), (90, 90, 90))
    assert_colour(letterbox(Image.new("LA", (8, 8), (90, 255)), 8, 8), (90, 90, 90))
    assert_colour(letterbox(Image.new("LA", (8, 8), (90, 0)), 8, 8), (255, 255, 255))
    assert_colour(letterbox(Image.new("1", (8, 8), 1), 8, 8), (255, 255, 255))
    assert_colour(letterbox(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), 8, 8), (255, 0, 0))


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_16_bit_grey_keeps_its_brightness_and_does_not_clip_to_white(mode):
    dtype = np.uint16 if mode == "I;16" else np.int32
    picture = Image.fromarray(np.full((8, 8), 90 * 257, dtype=dtype))
    assert picture.mode == mode
    assert_colour(letterbox(picture, 8, 8), (90, 90, 90))


def test_camera_rotation_is_applied():
    picture = Image.new("RGB", (40, 20), "blue")                          # stored lying on its side ...
    picture.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6                                                      # ... "turn clockwise to view"
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    canvas = letterbox(Image.open(file), 40, 20)
    assert_colour(canvas[:, :20], RED, tolerance=0)                       # left half is now the upper half
    assert_colour(canvas[:, 20:], (0, 0, 255), tolerance=0)


def test_letterbox_leaves_the_callers_picture_alone_and_refuses_nonsense():
    picture = Image.new("RGBA", (8, 8), (1, 2, 3, 4))
    letterbox(picture, 16, 16)
    assert picture.mode == "RGBA"
    assert picture.size == (8, 8)
    with pytest.raises(ValueError, match="canvas"):
        letterbox(picture, 0, 16)
    with pytest.raises(ValueError, match="pad"):
        letterbox(picture, 16, 16, pad=255)


# ---- tokens


def test_patchify_orders_tokens_by_frame_then_row_then_column():
    F, H, W = 2, 3, 4
    latent = torch.arange(F * H * W).view(1, 1, F, H, W)
    assert patchify(latent).flatten().tolist() == list(range(F * H * W))
    assert patchify(torch.zeros(2, 5, F, H, W)).shape == (2, F * H * W, 5)


def test_unpatchify_undoes_patchify_and_notices_left_over_reference_tokens():
    latent = torch.randn(2, 5, 3, 4, 6)
    assert torch.equal(unpatchify(patchify(latent), 3, 4, 6), latent)
    with pytest.raises(ValueError, match="drop the reference"):
        unpatchify(torch.zeros(2, 3 * 4 * 6 + 24, 5), 3, 4, 6)


def test_the_reference_gives_as_many_tokens_as_one_video_frame_and_no_gradient():
    scale = torch.nn.Parameter(torch.ones(()))

    def encode(video):
        assert video.shape == (2, 3, 1, 64, 96), "one picture is a video of one frame"
        return scale * video[:, :, :, ::32, ::32]

    canvas = torch.randn(2, 3, 64, 96)
    tokens = encode_reference(encode, canvas)
    assert tokens.shape == (2, 2 * 3, 3)
    assert not tokens.requires_grad, "the encoder is frozen"
    assert torch.equal(tokens[:, 4], canvas[:, :, 32, 32]), "row 1, column 1 of 2x3 is token 4"
    with pytest.raises(ValueError, match="single picture"):
        encode_reference(lambda video: torch.zeros(2, 8, 2, 2, 3), canvas)


def sequence(B=2, L=24, R=6, C=8):
    return (torch.randn(B, L, C), torch.rand(B, L) * 0.9 + 0.1, torch.rand(B, 3, L, 2),
            torch.randn(B, R, C), torch.rand(3, R, 2))


def test_append_then_drop_is_the_identity():
    video, timesteps, positions, ref, ref_positions = sequence()
    tokens, all_timesteps, all_positions = append_reference(video, timesteps, positions, ref, ref_positions)
    assert tokens.shape == (2, 30, 8)
    assert all_timesteps.shape == (2, 30)
    assert all_positions.shape == (2, 3, 30, 2)
    assert torch.equal(drop_reference(tokens, 24), video)
    assert torch.equal(drop_reference(video, 24), video), "without a reference nothing happens"


def test_reference_timesteps_are_zero_and_the_videos_are_untouched():
    video, timesteps, positions, ref, ref_positions = sequence()
    _, out, _ = append_reference(video, timesteps, positions, ref, ref_positions)
    assert (out[:, 24:] == 0).all()
    assert torch.equal(out[:, :24], timesteps)


def test_reference_tokens_arrive_clean_behind_the_video_with_their_own_positions():
    video, timesteps, positions, ref, ref_positions = sequence()
    tokens, _, out = append_reference(video, timesteps, positions, ref, ref_positions)
    assert torch.equal(tokens[:, 24:], ref)
    assert torch.equal(out[:, :, :24], positions), "a reference never moves the video"
    assert torch.equal(out[:, :, 24:], ref_positions.expand(2, 3, 6, 2))
    _, _, batched = append_reference(video, timesteps, positions, ref, ref_positions.expand(2, 3, 6, 2))
    assert torch.equal(out, batched), "positions may be given once or for each sample"


@pytest.mark.parametrize("broken", range(5))
def test_parts_that_do_not_fit_together_are_refused(broken):
    parts = list(sequence())
    parts[broken] = parts[broken][..., :-1, :] if parts[broken].ndim > 2 else parts[broken][:, :-1]
    with pytest.raises(ValueError, match="expected"):
        append_reference(*parts)


def test_dropping_from_too_short_an_output_is_refused():
    with pytest.raises(ValueError, match="at least 24"):
        drop_reference(torch.zeros(1, 20, 8), 24)


# ---- the picture of the demo: canvases at y = 42, tokens at y = 280, the sequence at y = 592 and its timesteps below


def drawn(F=4, sigma=0.7):
    return np.asarray(draw(F, sigma))


def token_colour(page, i, S):
    return page[622, 110 + i * (1370 // S) + 1]                           # below the token's number


def demo_canvas(width, height):
    return letterbox(_portrait(width, height), 96, 128)


def test_the_canvases_are_drawn_as_letterbox_makes_them():
    page = drawn()
    for x, size in zip((230, 725, 1220), SIZES, strict=True):
        shown, expected = page[42 : 42 + 192, x : x + 256], to_pixels(demo_canvas(*size)).repeat(2, 0).repeat(2, 1)
        same = (shown == expected).all(axis=-1).reshape(3, 64, 4, 64)[:, 24:, :, 24:]            # past edge and number
        assert same.all(), size
    assert page.shape[1] <= 1600


def test_the_reference_is_drawn_as_the_tokens_of_its_canvas_in_the_grid_and_in_the_sequence():
    page, S = drawn(), 60
    tokens = encode_reference(torch.nn.AvgPool3d((1, 32, 32)), demo_canvas(*SIZES[-1])[None])[0]            # (12, 3)
    colours = ((tokens + 1) * 127.5).round().int().numpy()
    for i in range(12):
        row, column = divmod(i, 4)
        assert (token_colour(page, 48 + i, S) == colours[i]).all(), i
        assert (page[280 + 64 * row + 40, 1220 + 64 * column + 40] == colours[i]).all(), i
    assert len(np.unique(colours, axis=0)) > 6, "and they can be told apart"


def test_the_video_is_drawn_as_one_blue_for_each_frame():
    page = drawn()
    frames = [{tuple(token_colour(page, i, 60).tolist()) for i in range(12 * f, 12 * f + 12)} for f in range(4)]
    assert all(len(colours) == 1 for colours in frames), frames
    assert len(set.union(*frames)) == 4, frames
    assert all(blue > green > red for red, green, blue in set.union(*frames)), frames


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_the_bars_are_as_high_as_the_timesteps_and_the_reference_has_none(sigma):
    page = drawn(F=2, sigma=sigma)
    grey = (page[640:710] == 105).all(axis=-1)                            # 64 rows of pixels for 1
    heights = [grey[:, 110 + i * (1370 // 36) + 1].sum() for i in range(36)]
    assert set(heights[:24]) == {round(64 * sigma)}, heights
    assert set(heights[24:]) == {0}, heights
