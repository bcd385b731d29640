"""The losses: who is supervised, by how much, and who is not.

No weights; small tensors and a toy recogniser. CPU, about a second.
Run: python -m pytest tests/test_losses.py
"""

import pytest
import torch
import torch.nn.functional as F

from losses import (
    add_noise,
    clean_estimate,
    crop_faces,
    face_weighted_loss,
    flow_matching_loss,
    identity_loss,
    pool_face_mask,
    total_loss,
)


def assert_close(a, b, tolerance=1e-6):  # float32 means of about a hundred numbers near 1
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.3g}"


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (3, 10, 1)])
def test_clean_estimate_inverts_the_forward_process(shape):
    x0, noise, s = torch.randn(3, 10, 4), torch.randn(3, 10, 4), torch.rand(shape)
    x_s, v = add_noise(x0, noise, s)
    assert_close(clean_estimate(x_s, v, s), x0)
    assert torch.equal(v, noise - x0)
    wide = s.view(-1, 1, 1) if s.ndim == 1 else s
    assert torch.equal(x_s, (1 - wide) * x0 + wide * noise)
    assert torch.equal(add_noise(x0, noise, torch.ones(3))[0], noise), "sigma 1 is noise"


def test_clean_estimate_refuses_a_noise_level_that_would_broadcast_wrongly():
    with pytest.raises(ValueError, match="expected s"):
        clean_estimate(torch.zeros(4, 4, 4), torch.zeros(4, 4, 4), torch.zeros(4, 4))


def test_a_perfect_prediction_costs_nothing_and_flow_matching_is_the_mean_squared_error():
    v, error = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    assert flow_matching_loss(v, v).item() == 0
    assert_close(flow_matching_loss(v + error, v), F.mse_loss(v + error, v))
    assert_close(flow_matching_loss(v + error, v, torch.ones(2, 6)), F.mse_loss(v + error, v))


def test_reference_tokens_get_no_loss():
    v_pred, v_target = torch.randn(2, 10, 4, requires_grad=True), torch.randn(2, 10, 4)
    mask = torch.ones(2, 10)
    mask[:, 6:] = 0  # L = 6 video tokens, R = 4 reference tokens
    loss = flow_matching_loss(v_pred, v_target, mask)
    assert_close(loss, flow_matching_loss(v_pred[:, :6], v_target[:, :6]))
    loss.backward()
    assert v_pred.grad[:, 6:].abs().max() == 0
    assert v_pred.grad[:, :6].abs().min() > 0


def test_a_sample_with_few_noised_tokens_counts_as_much_as_a_full_one():
    v_pred, v_target = torch.ones(2, 4, 3), torch.zeros(2, 4, 3)
    v_pred[1] *= 2  # squared error 1 and 4
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
    assert_close(flow_matching_loss(v_pred, v_target, mask), (1 + 4) / 2)


def test_face_mask_pooling_is_causal_the_first_frame_stands_alone():
    mask = torch.zeros(1, 9, 4, 4)  # 1 + 2 * 4 frames -> 3 latent frames
    mask[:, 0, :2, :2] = 1  # frame 0: top left cell full
    mask[:, 1:3, 2:, :2] = 1  # frames 1, 2 of 1..4: bottom left, half time
    mask[:, 8, :, 3] = 1  # frame 8 of 5..8: right column, half the cell
    expected = [1, 0, 0, 0, 0, 0, 0.5, 0, 0, 0.125, 0, 0.125]  # three frames of four cells
    pooled = pool_face_mask(mask, time_scale=4, space_scale=2)
    assert pooled.tolist() == [expected]


def test_pooling_a_single_picture_gives_one_latent_frame_and_area_is_kept():
    mask = torch.rand(2, 1, 64, 96)
    assert pool_face_mask(mask, 8, 32).shape == (2, 6)
    assert_close(pool_face_mask(mask, 8, 32).mean(), mask.mean())


@pytest.mark.parametrize("shape", [(1, 8, 32, 32), (1, 9, 33, 32), (1, 9, 32, 40)])
def test_pooling_refuses_sizes_that_do_not_divide(shape):
    with pytest.raises(ValueError, match="expected 1 \\+ 8k frames"):
        pool_face_mask(torch.zeros(shape), 8, 32)


def test_the_face_loss_looks_at_the_face_only_and_does_not_depend_on_its_size():
    v_pred, v_target = torch.full((1, 8, 2), 3.0, requires_grad=True), torch.zeros(1, 8, 2)
    small, large = torch.zeros(1, 8), torch.zeros(1, 8)
    small[:, 2], large[:, :6] = 1, 1
    assert_close(
        face_weighted_loss(v_pred, v_target, small), 9.0, 1e-4
    )  # eps = 1e-6 shifts it by 1e-5
    assert_close(face_weighted_loss(v_pred, v_target, large), 9.0, 1e-4)
    (gradient,) = torch.autograd.grad(face_weighted_loss(v_pred, v_target, small), v_pred)
    assert gradient[:, 2].abs().min() > 0
    assert gradient.abs().sum() == gradient[:, 2].abs().sum()


def test_samples_without_a_face_do_not_enter_as_zero():
    v_pred, v_target = torch.randn(3, 8, 2), torch.randn(3, 8, 2)
    mask = torch.rand(3, 8)
    mask[1] = 0
    alone = face_weighted_loss(v_pred[[0, 2]], v_target[[0, 2]], mask[[0, 2]])
    assert_close(face_weighted_loss(v_pred, v_target, mask), alone)


def test_a_batch_without_faces_costs_zero_and_still_has_a_gradient():
    v_pred = torch.randn(2, 8, 2, requires_grad=True)
    loss = face_weighted_loss(v_pred, torch.randn(2, 8, 2), torch.zeros(2, 8))
    loss.backward()
    assert loss.item() == 0
    assert v_pred.grad.abs().max() == 0


def test_cropping_the_whole_frame_at_its_own_size_returns_the_frame():
    frames = torch.randn(2, 3, 16, 16)
    boxes = torch.tensor([[0.0, 0, 16, 16]]).repeat(2, 1)
    assert_close(crop_faces(frames, boxes, 16), frames, 1e-5)


def test_a_box_on_pixel_edges_cuts_exactly_those_pixels_in_left_top_right_bottom_order():
    frames = torch.randn(1, 3, 20, 32)
    crop = crop_faces(frames, torch.tensor([[10.0, 4, 18, 12]]), 8)
    assert_close(crop, frames[:, :, 4:12, 10:18], 1e-5)


def embed(faces):
    """A toy recogniser: a fixed random projection, normalised."""
    weight = torch.randn(3 * 8 * 8, 5, generator=torch.Generator().manual_seed(0))
    return F.normalize(faces.flatten(1) @ weight, dim=-1)


def test_the_identity_loss_gradient_flows_to_the_pixels_inside_the_box_only():
    frames = torch.randn(1, 3, 24, 24, requires_grad=True)
    person = embed(torch.randn(1, 3, 8, 8)).requires_grad_()
    crops = crop_faces(frames, torch.tensor([[8.0, 8, 16, 16]]), 8)
    identity_loss(embed, crops, person, torch.tensor([True])).backward()
    inside = frames.grad[:, :, 8:16, 8:16]
    assert inside.abs().min() > 0
    outside = frames.grad.abs().sum() - inside.abs().sum()
    assert outside < 1e-4 * inside.abs().sum(), outside  # float32 rounding of the sampling points
    assert person.grad is None, "the reference is a target and must not be pulled"


def test_the_identity_loss_is_zero_for_the_same_face_and_two_for_the_opposite():
    faces = torch.randn(3, 3, 8, 8)
    yes = torch.ones(3, dtype=torch.bool)
    assert_close(identity_loss(embed, faces, embed(faces), yes), 0.0)
    assert_close(identity_loss(embed, faces, -embed(faces), yes), 2.0)


def test_invalid_samples_leave_the_identity_average_even_when_they_are_nan():
    faces, person = torch.randn(3, 3, 8, 8), embed(torch.randn(3, 3, 8, 8))
    alone = identity_loss(embed, faces[:2], person[:2], torch.tensor([True, True]))
    faces[2] = float("nan")
    assert_close(identity_loss(embed, faces, person, torch.tensor([True, True, False])), alone)


def test_with_nothing_valid_the_identity_loss_is_zero_and_still_has_a_gradient():
    faces = torch.randn(2, 3, 8, 8, requires_grad=True)
    loss = identity_loss(embed, faces, embed(torch.randn(2, 3, 8, 8)), torch.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0
    assert faces.grad.abs().max() == 0


def test_weight_zero_switches_a_term_off_and_the_defaults_are_one_and_a_tenth():
    fm, face, identity = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    assert_close(total_loss(fm, face, identity), 3.3)
    assert total_loss(fm, face, identity, w_face=0, w_id=0).item() == 1.0


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="drop the reference tokens"):
        flow_matching_loss(torch.zeros(1, 10, 2), torch.zeros(1, 6, 2))
    with pytest.raises(ValueError, match="boxes"):
        crop_faces(torch.zeros(2, 3, 8, 8), torch.zeros(1, 4), 4)
    with pytest.raises(ValueError, match="embeddings"):
        identity_loss(
            embed, torch.zeros(2, 3, 8, 8), torch.zeros(2, 7), torch.ones(2, dtype=torch.bool)
        )
