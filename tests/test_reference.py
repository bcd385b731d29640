"""The reference's way into the sequence and out again: canvas, tokens, clean timesteps, slicing.

No weights: pictures are drawn here, the VAE is a stand-in. CPU, about a second.
Run: python -m pytest tests/test_reference.py
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from reference import (
    Reference,
    append_reference,
    drop_reference,
    encode_reference,
    letterbox,
    patchify,
    predict_velocity,
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
    ("size", "box"), [((50, 100), (24, 0, 32, 64)), ((160, 40), (0, 22, 80, 20))]
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
    difference = (
        (canvas - (torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)).abs().max().item()
    )
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
    assert canvas[:, 2:-2, 2:-2].abs().max() < 0.02, (
        canvas.abs().max()
    )  # plain bilinear would give -1 or 1


def test_transparent_pixels_become_white_and_not_what_hides_below_them():
    picture = Image.new("RGBA", (32, 32), (*RED, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 32, 16))  # transparent black above
    canvas = letterbox(picture, 32, 32)
    assert (canvas[:, :16] == 1).all()
    assert_colour(canvas[:, 16:], RED, tolerance=0)
    half = letterbox(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), 4, 4)
    assert half.abs().max() < 0.01, "half-transparent black on white is grey"


def test_palette_pictures_work_with_and_without_a_transparent_colour():
    picture = Image.new("RGB", (16, 16), RED)
    picture.paste((0, 255, 0), (0, 0, 16, 8))
    palette = picture.convert("P", palette=Image.Palette.ADAPTIVE)
    assert_colour(
        letterbox(palette, 16, 16)[:, 8:], RED, tolerance=4
    )  # the palette itself is coarse
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=palette.getpixel((0, 0)))  # green is see-through
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
    brightest = Image.fromarray(np.full((8, 8), 65535, dtype=dtype))
    assert_colour(letterbox(brightest, 8, 8), (255, 255, 255))


def test_camera_rotation_is_applied():
    picture = Image.new("RGB", (40, 20), "blue")  # stored lying on its side ...
    picture.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # ... "turn clockwise to view"
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    canvas = letterbox(Image.open(file), 40, 20)
    assert_colour(canvas[:, :20], RED, tolerance=0)  # left half is now the upper half
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
    video = torch.randn(B, L, C), [(torch.rand(B) * 0.9 + 0.1, L)], torch.rand(B, 3, L, 2)
    return *video, Reference(torch.randn(B, R, C), torch.rand(3, R, 2))


def test_reference_tokens_arrive_clean_behind_the_video_with_their_own_positions():
    video, timesteps, positions, ref = sequence()
    tokens, all_timesteps, all_positions = append_reference(video, timesteps, positions, ref)
    assert torch.equal(tokens[:, 24:], ref.tokens) and tokens.shape == (2, 30, 8)
    (level, noisy), (zero, clean) = all_timesteps
    assert torch.equal(level, timesteps[0][0]) and (zero == 0).all() and zero.shape == (2,)
    assert (noisy, clean) == (24, 6)
    assert torch.equal(all_positions[:, :, :24], positions), "a reference never moves the video"
    assert torch.equal(all_positions[:, :, 24:], ref.positions.expand(2, 3, 6, 2))
    batched = ref._replace(positions=ref.positions.expand(2, 3, 6, 2))
    again = append_reference(video, timesteps, positions, batched)
    assert torch.equal(again[2], all_positions), "positions may be given once or for each sample"
    assert torch.equal(drop_reference(tokens, 24), video), "append, then drop: nothing happened"
    assert torch.equal(drop_reference(video, 24), video), "without a reference nothing to drop"


@pytest.mark.parametrize("broken", range(6))
def test_parts_that_do_not_fit_together_are_refused(broken):
    video, [(level, count)], positions, (tokens, places) = sequence()
    parts = [video, positions, tokens, places, level, count]
    part = parts[broken]
    parts[broken] = count - 1 if part is count else part[..., :-1, :] if part.ndim > 2 else part[1:]
    video, positions, tokens, places, level, count = parts
    with pytest.raises(ValueError, match="expected"):
        append_reference(video, [(level, count)], positions, Reference(tokens, places))


def test_dropping_from_too_short_an_output_is_refused():
    with pytest.raises(ValueError, match="at least 24"):
        drop_reference(torch.zeros(1, 20, 8), 24)


def test_the_model_sees_one_sequence_and_only_the_video_comes_back():
    video, _, positions, ref = sequence()
    sigma, seen = torch.tensor([0.2, 0.7]), {}

    def model(tokens, timesteps, sigma, positions, context, **options):
        seen.update(tokens=tokens, timesteps=timesteps, positions=positions, **options)
        return tokens * 2

    out = predict_velocity(model, video, sigma, positions[0], "prompt", ref, skip_blocks=(3,))
    assert torch.equal(out, video * 2)
    assert torch.equal(seen["tokens"][:, 24:], ref.tokens)
    (level, noisy), (zero, clean) = seen["timesteps"]
    assert torch.equal(level, sigma) and torch.equal(zero, torch.zeros(2))
    assert (noisy, clean) == (24, 6)
    assert torch.equal(seen["positions"][1, :, :24], positions[0]) and seen["skip_blocks"] == (3,)
    assert torch.equal(predict_velocity(model, video, sigma, positions, "prompt"), video * 2)
    assert seen["tokens"].shape == video.shape, "no reference: no token of it, not zeros"
