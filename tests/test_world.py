"""The procedural world: people, splits, captions, and the ground truth that the losses and scores rely on. CPU, seconds.

    pytest tests/test_world.py
"""

import numpy as np
import torch

from toy import world


def clips(count=6, seed=0, action=None):
    g = torch.Generator().manual_seed(seed)
    person, setting = world.people("val", count), world.draw_settings(count, g)
    actions = world.draw_actions(count, g) if action is None else torch.full((count,), world.ACTIONS.index(action))
    return world.render(person, setting, world.action_poses(actions, 9, g))


def test_splits_never_share_a_person():
    tables = [world.people(split, 2000) for split in world.SPLIT_SEEDS]
    for i, a in enumerate(tables):
        for b in tables[i + 1:]:
            nearest = torch.cdist(a, b).min()
            assert nearest > 0.05, f"two splits come within {nearest:.3f} of each other"


def test_the_first_people_of_a_split_do_not_depend_on_how_many_are_asked_for():
    assert torch.equal(world.people("test", 5), world.people("test", 50)[:5])


def test_look_alikes_share_skin_and_hair_and_nothing_else():
    person = world.people("test", 64)
    other = world.look_alikes(person, torch.Generator().manual_seed(1))
    shared = world.LOOK_ALIKE_TRAITS
    assert torch.equal(person[:, :shared], other[:, :shared])
    assert (person[:, shared:] != other[:, shared:]).all()
    assert world.TRAITS[:shared] == ["skin", "skin_hue", "hair_style", "hair_color"]


def test_captions_name_setting_and_action_but_never_the_person():
    captions = world.all_captions()
    assert len(captions) == len(set(captions)) == 6 * 5 * 6 * 8 * 4
    words = {word.strip(",") for text in captions for word in text.split()}
    assert not words & {"hair", "glasses", "beard", "bald", "skin", "eyes", "he", "she", "man", "woman"}


def test_masks_and_boxes_agree_and_stay_on_the_face():
    video, boxes, mask = clips(12, seed=3)
    assert video.shape == (12, 3, 9, 64, 64) and video.abs().max() <= 1
    assert mask.min() >= 0 and mask.max() <= 1
    ys, xs = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    for b in range(12):
        for f in range(9):
            x0, y0, x1, y1 = boxes[b, f]
            inside = (xs > x0 - 1) & (xs < x1 + 1) & (ys > y0 - 1) & (ys < y1 + 1)
            outside = mask[b, f][~inside].sum()
            assert outside == 0, f"{outside} pixels of the face lie outside its box"
            assert mask[b, f].sum() > 0.4 * (x1 - x0) * (y1 - y0) / 1.21


def test_left_and_right_are_directions_in_the_picture():
    for name, sign in (("moves to the left", -1), ("moves to the right", 1)):
        _, boxes, _ = clips(8, action=name)
        middle = (boxes[..., 0] + boxes[..., 2]) / 2
        travelled = sign * (middle[:, -1] - middle[:, 0])
        assert (travelled > 8).all() and (travelled <= 17).all(), travelled


def test_half_of_the_references_share_the_clips_setting():
    g = torch.Generator().manual_seed(0)
    person = world.people("train", 1).expand(200, -1)
    setting = torch.zeros(200, 3, dtype=torch.long)
    pictures, _ = world.draw_references(person, setting, g, size=16)
    park = world.render(person[:1], setting[:1], world.still_poses(1, g)[:, None], 16)[0][0, :, 0, 0, 0]
    share = ((pictures[:, :, 0, 0] - park).abs().amax(1) < 1e-3).float().mean()
    assert 0.42 < share < 0.68, share  # half, plus the settings that were drawn the same by chance


def test_the_same_generator_gives_the_same_clip():
    assert torch.equal(clips(3, seed=5)[0], clips(3, seed=5)[0])
    assert not torch.equal(clips(3, seed=5)[0], clips(3, seed=6)[0])


# ------------------------------------------------------------ the demo's picture


def test_the_contact_sheet_shows_the_rendered_pixels_with_reference_and_frames_in_place():
    clips_ = world.one_of_each("val", 7)
    sheet = np.asarray(world.draw(clips_))
    assert sheet.shape[1] <= 1600 and len(clips_.captions) == len(world.ACTIONS)
    shown = [clips_.references, *(clips_.video[:, :, f] for f in world.SHOWN)]
    for row in range(len(clips_.captions)):
        top = world.TOP + row * (world.LINE + world.TILE + world.GAP) + world.LINE
        for k, pictures in enumerate(shown):
            left = world.GAP + k * (world.TILE + world.GAP) + 2 * world.GAP * (k > 0)
            tile = sheet[top:top + world.TILE:2, left:left + world.TILE:2]
            assert (tile == world.to_uint8(pictures[row]).permute(1, 2, 0).numpy()).all(), (row, k)
            assert (sheet[top - 1:top, left:left + world.TILE] == 255).all(), "white ground, no text on the picture"
        tile = sheet[top:top + world.TILE, -world.GAP - world.TILE:-world.GAP].astype(int)
        mask = clips_.masks[row, world.SHOWN[-1]].numpy().repeat(2, 0).repeat(2, 1)
        line = tile[..., 0] != tile[..., 2]  # red
        assert (abs(tile[..., 0] - 255 * mask)[~line] <= 1).all()
        ys, xs = np.nonzero(line)
        box = clips_.boxes[row, world.SHOWN[-1]].numpy()
        assert abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 2 - box).max() <= 0.5, "pixels of 64"


def test_every_action_is_in_the_sheet_once_and_its_caption_says_so():
    clips_ = world.one_of_each()
    for action, words in zip(world.ACTIONS, clips_.captions, strict=True):
        assert action in words
    assert not torch.equal(clips_.references, world.one_of_each(seed=8).references)


def test_the_demo_explains_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    world._demo()
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-2].startswith("wrote world_demo.png: ") and lines[-1].startswith("Notice: ") and 10 <= len(lines) <= 25
    assert [path.name for path in tmp_path.iterdir()] == ["world_demo.png"]
