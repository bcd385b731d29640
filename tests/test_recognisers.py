"""The recognisers learn faces: pairs across settings and moments, look-alikes, soft pictures.

Hardware: CPU, seconds. Run: python -m pytest tests/test_recognisers.py
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from clips.face import load_facenet
from common.seeds import seeded
from toy import world
from toy.recognisers import check_recogniser, contrastive_loss, degrade, face_views

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "tiny"


def test_the_contrastive_loss_is_small_only_if_each_finds_its_own_both_ways():
    net, near = nn.Identity(), torch.eye(4)
    assert contrastive_loss(net, near, near) < 0.001
    assert contrastive_loss(net, near, near.roll(1, 0)) > 9
    torch.manual_seed(0)
    a, b = nn.functional.normalize(torch.randn(2, 6, 4), dim=-1)
    one, other = contrastive_loss(net, a, b), contrastive_loss(net, b, a)
    assert one == pytest.approx(other.item(), rel=1e-5), "both ways"
    rows = (a @ b.T / 0.1).softmax(1).diagonal().log().mean()
    columns = (a @ b.T / 0.1).softmax(0).diagonal().log().mean()
    assert one.item() == pytest.approx(-(rows + columns).item() / 2, rel=1e-4)


def test_views_show_any_moment_of_any_action_and_their_boxes_belong_to_them():
    person = world.people("val", 1).expand(300, -1)
    pictures, boxes = face_views(person, seeded(1))
    assert pictures.shape == (300, 3, 64, 64) and pictures.abs().max() <= 1
    sides = boxes[:, 3] - boxes[:, 1]
    assert sides.max() / sides.median() > 1.1, "nearer than any clip starts: later frames count"
    middle = (boxes[:, 0] + boxes[:, 2]) / 2
    assert middle.min() < 26 and middle.max() > 38, "steps to both sides"
    assert len(pictures[:, :, 1, 1].round(decimals=1).unique(dim=0)) > 20, "many settings"


def test_degraded_pictures_are_softer_and_noisier_but_keep_their_means():
    pictures = face_views(world.people("val", 64), seeded(2))[0]
    soft = degrade(pictures, seeded(3))
    assert soft.abs().max() <= 1 and (soft.mean() - pictures.mean()).abs() < 0.01
    flat = torch.zeros(64, 3, 16, 16)
    spread = degrade(flat, seeded(4)).std(dim=(1, 2, 3))
    assert spread.min() < 0.02 and 0.07 < spread.max() < 0.11, "another strength for each"


def test_the_bundled_recogniser_knows_people_it_never_saw():
    top1, nearer = check_recogniser(load_facenet(WEIGHTS / "face.safetensors", "cpu"), False, "cpu")
    assert top1 > 0.9 and nearer > 0.95, (top1, nearer)
