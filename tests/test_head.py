"""What the head-pose estimator learns from; what it reads is in test_scores.py.

Hardware: CPU, seconds. Run: python -m pytest tests/test_head.py
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from common.seeds import seeded
from ltx.vae import VideoVAE
from toy import head, world

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "tiny"


@pytest.fixture(scope="module")
def estimator():
    return head.load_head(WEIGHTS / "head_pose.safetensors")


@pytest.fixture(scope="module")
def views():
    """Pictures, poses and presence of 80 people."""
    vae = VideoVAE.load(WEIGHTS / "model.safetensors", dtype=torch.float32)
    return head.head_views(world.people("val", 80), vae, seeded(1), "bf16")


def test_the_bundled_estimator_reads_poses_and_presence_of_people_it_never_saw(estimator, views):
    pictures, pose, present = views
    out = estimator(pictures)
    error = (out[present, 1:] - pose[present]).abs().mean(0) / torch.tensor(head.POSE_SPREAD)
    assert (error < 0.5).all(), error
    assert ((out[:, 0] > 0) == present).float().mean() > 0.97


def test_a_third_of_the_poses_have_any_mouth_and_all_are_shaken():
    pose = head.widened_poses(2000, seeded(4))
    open_ = (pose[:, 5] > 0.02).float().mean()
    assert 0.38 < open_ < 0.46, "a third, and the laughs among the others"
    world_s = world.action_poses(world.draw_actions(2000, seeded(5)), 9, seeded(6)).flatten(0, 1)
    assert (pose.std(0)[:5] > world_s.std(0)[:5]).all()


def test_every_fourth_view_shows_no_face_and_half_went_through_the_vae(views):
    pictures, _, present = views
    assert pictures.shape == (80, 3, 64, 64) and pictures.abs().max() <= 1
    assert present.tolist() == [True, True, True, False] * 20
    person, seen = world.people("val", 8), []

    class Vae:
        def encode(self, clips):
            seen.append(clips.shape)
            return clips

        def decode(self, latent):
            return latent * 0 + 0.5
    grey = head.head_views(person, Vae(), seeded(1), "bf16")[0]
    assert seen == [(4, 3, 1, 64, 64)], "as clips of one frame"
    middle = grey.mean(dim=(1, 2, 3))
    assert (middle[:4] - 0.5).abs().max() < 0.02 and (middle[4:] - 0.5).abs().min() > 0.02


def test_without_a_head_the_five_ways_take_turns_and_none_shows_a_face(estimator):
    g, setting = seeded(7), world.draw_settings(50, seeded(8))
    pose = world.still_poses(50, seeded(9))[:, None]
    video, boxes, _ = world.render(world.people("val", 50), setting, pose)
    gone = head.without_head(video[:, :, 0], boxes[:, 0], setting, g)
    assert (estimator(gone)[:, 0] < 0).float().mean() > 0.95
    empty, painted = gone[0::5], gone[1::5]
    corner = (slice(None), slice(None), slice(0, 4), slice(0, 4))
    assert torch.allclose(painted[corner], video[1::5, :, 0][corner]), "scene around is kept"
    flat = [(x[:, :, 1:] - x[:, :, :-1]).abs().mean() for x in (gone[2::5], gone[3::5], empty)]
    assert flat[0] > 3 * flat[2] and flat[1] < flat[0], "noise, smear, scene"


def test_the_pose_of_a_missing_head_costs_nothing():
    class Says(nn.Module):
        def forward(self, pictures):
            return torch.tensor([[9.0, 0, 0, 1, 0, 0, 0], [-9.0, 5, 5, 5, 5, 5, 5]])
    pose = torch.zeros(2, 6)
    pose[:, 2] = 1 + head.POSE_SPREAD[2]
    loss = head.head_loss(Says(), None, pose, torch.tensor([True, False]))
    assert loss.item() == pytest.approx(1 / 6, abs=1e-3), "one of six numbers off by one spread"
