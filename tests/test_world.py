"""The procedural world: people, splits, captions, and the truth that losses and scores rely on.

Hardware: CPU, seconds. Run: python -m pytest tests/test_world.py
"""

import pytest
import torch

from toy import world


def clips(count=6, seed=0, action=None):
    g = torch.Generator().manual_seed(seed)
    person, setting = world.people("val", count), world.draw_settings(count, g)
    actions = world.draw_actions(count, g)
    if action is not None:
        actions = torch.full((count,), world.ACTIONS.index(action))
    return world.render(person, setting, world.action_poses(actions, 9, g))


# ------------------------------------------------------------ people and captions


def test_splits_never_share_a_person_and_begin_the_same_whatever_their_length():
    tables = [world.people(split, 2000) for split in world.SPLIT_SEEDS]
    for i, a in enumerate(tables):
        for b in tables[i + 1:]:
            assert torch.cdist(a, b).min() > 0.05
    assert torch.equal(world.people("train", 5), tables[0][:5])


def test_look_alikes_differ_in_the_shape_of_the_face_alone():
    person = world.people("test", 64)
    other = world.look_alikes(person, torch.Generator().manual_seed(1))
    differs = {name for name, column in zip(world.TRAITS, (person != other).T, strict=True)
               if column.all()}
    assert differs == set(world.SHAPE) and (person != other).any(0).sum() == len(differs)
    kinds = world.COLORS + world.ATTRIBUTES + world.SHAPE
    assert sorted(kinds) == sorted(world.TRAITS) and len(world.SHAPE) == 13


def test_captions_name_setting_and_action_but_never_the_person():
    captions = world.all_captions()
    assert len(captions) == 7 * 6 * 7 * 9 * 4
    tables = [f"{shirt} shirt" for shirt in world.SHIRTS], world.SCENES, world.LIGHTS, world.ACTIONS
    whole = [text for text in captions if all(any(w in text for w in table) for table in tables)]
    assert len(set(whole)) == 6 * 5 * 6 * 8 * 4, "the same words in another order are another text"
    words = {word.strip(",") for text in captions for word in text.split()}
    assert not words & {"hair", "glasses", "beard", "bald", "skin", "eyes", "he", "she", "man"}
    assert {word for phrase in world.phrases() for word in phrase.split()} == words
    told = world.caption(torch.tensor([4, 3, 1]), 2)
    assert told == "a person in a blue shirt nods in the snow, in dim light"


def test_a_caption_leaves_out_what_is_past_the_end_of_its_table():
    """By hand: nothing dangles, no comma and no preposition."""
    expected = {(6, 3, 1, 2, 0): "a person in a blue shirt nods, in dim light",
                (4, 5, 6, 2, 0): "a person nods in the snow",
                (6, 3, 6, 8, 1): "in dim light, a person",
                (4, 3, 6, 2, 2): "a person nods in the snow, in dim light",
                (4, 5, 1, 8, 2): "a person in the snow, wearing a blue shirt",
                (6, 5, 6, 8, 3): "someone", (6, 5, 1, 2, 3): "someone in a blue shirt nods"}
    for (scene, light, shirt, action, template), text in expected.items():
        assert world.caption(torch.tensor([scene, light, shirt]), action, template) == text


# ------------------------------------------------------------ pictures


def test_masks_and_boxes_agree_and_stay_on_the_face():
    video, boxes, mask = clips(12, seed=3)
    assert video.shape == (12, 3, 9, 64, 64) and video.abs().max() <= 1
    assert mask.min() >= 0 and mask.max() <= 1
    inside = world.box_mask(boxes + torch.tensor([-1, -1, 1, 1]), 64)[:, 0]
    assert (mask * (1 - inside)).sum() == 0, "pixels of the face outside its box"
    x0, y0, x1, y1 = boxes.unbind(-1)
    assert (mask.sum((-1, -2)) > 0.4 * (x1 - x0) * (y1 - y0) / 1.21).all()
    middle = (mask.sum(-2) * (torch.arange(64) + 0.5)).sum(-1) / mask.sum((-1, -2))
    assert (middle - (x0 + x1) / 2).abs().max() < 0.5, "the face is symmetrical, so is its box"


def test_a_box_mask_is_one_inside_its_box():
    boxes = torch.tensor([[[1.0, 2.0, 3.0, 3.0], [0.0, 0.0, 0.6, 4.0]]])
    first, second = world.box_mask(boxes, 4)[0, 0]
    assert first.nonzero().tolist() == [[2, 1], [2, 2]], "row 2, columns 1 and 2"
    assert second[:, 0].tolist() == [1, 1, 1, 1] and second.sum() == 4


@pytest.mark.parametrize("action, sign", [("moves to the left", -1), ("moves to the right", 1)])
def test_left_and_right_are_directions_in_the_picture(action, sign):
    _, boxes, _ = clips(8, action=action)
    middle = (boxes[..., 0] + boxes[..., 2]) / 2
    travelled = sign * (middle[:, -1] - middle[:, 0])
    assert (travelled > 8).all() and (travelled <= 17).all(), travelled


def test_a_head_that_turns_right_moves_its_eyes_to_the_right():
    """The whites of the eyes are the brightest pixels of a dark face."""
    person = world.people("val", 40)
    person[:, world.TRAITS.index("skin")] = 1.0
    person[:, world.TRAITS.index("glasses")] = 0.0
    pose = torch.zeros(40, 2, 6)
    pose[:, :, 2], pose[:, 0, 3], pose[:, 1, 3] = 1.0, -0.4, 0.4
    setting = torch.tensor([[5, 0, 5]]).expand(40, -1)  # at night, in black
    video, _, _ = world.render(person, setting, pose)
    white = (video[:, :, :, 20:36, 14:50] > 0.8).all(1).float()  # (40, 2, 16, 36)
    column = (white.sum(2) * torch.arange(36)).sum(-1) / white.sum((2, 3))
    assert (column[:, 1] - column[:, 0]).mean() > 2, "one eye hides behind the head"


def test_half_of_the_references_share_the_clips_setting():
    g = torch.Generator().manual_seed(0)
    person = world.people("train", 1).expand(200, -1)
    setting = torch.zeros(200, 3, dtype=torch.long)
    pose = world.still_poses(1, g)[:, None]
    park = world.render(person[:1], setting[:1], pose, 16)[0][0, :, 0, 0, 0]

    def shared(share):
        pictures, _ = world.draw_references(person, setting, g, 16, share)
        return ((pictures[:, :, 0, 0] - park).abs().amax(1) < 1e-3).float().mean()
    assert 0.42 < shared(0.5) < 0.68, "half, and the settings drawn the same by chance"
    assert shared(1.0) == 1 and shared(0.0) < 0.2


def test_the_same_generator_gives_the_same_clip():
    assert torch.equal(clips(3, seed=5)[0], clips(3, seed=5)[0])
    assert not torch.equal(clips(3, seed=5)[0], clips(3, seed=6)[0])


def test_the_demo_names_every_action(capsys):
    world.demo()
    told = capsys.readouterr().out
    assert all(action in told for action in world.ACTIONS) and len(told.splitlines()) < 20
