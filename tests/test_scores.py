"""The head is read right, scores move as they should when a clip is spoiled, intervals are right.

Tolerances: shares on true clips are what the bundled estimator reaches on unseen people, with a
margin. Hardware: CPU, seconds. Run: python -m pytest tests/test_scores.py
"""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clips.face import load_facenet
from common.seeds import seeded
from study import scores
from toy import world
from toy.head import load_head, read_action, read_heads

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"
N = 24


@functools.cache
def nets():
    encoder, head = (TINY / f"{name}.safetensors" for name in ("eval_encoder", "head_pose"))
    return load_facenet(encoder), load_head(head)


@functools.cache
def true_clips():
    """Clips of unseen people, and what was asked for in the form that per_clip takes."""
    g = seeded(71)
    person = world.people("val", N)
    setting, ref_setting = world.draw_settings(N, g), world.draw_settings(N, g)
    action, ref_pose = torch.arange(N) % len(world.ACTIONS), world.still_poses(N, g)
    video = world.render(person, setting, world.action_poses(action, 9, g))[0]
    references, alike = (world.render(p, ref_setting, ref_pose[:, None])[0][:, :, 0]
                         for p in (person, world.look_alikes(person, g)))
    return video, {"who": torch.arange(N), "references": references, "alike": alike,
                   "setting": setting, "ref_setting": ref_setting, "action": action,
                   "ref_pose": ref_pose}


@functools.cache
def true_scores():
    return scores.per_clip(*true_clips(), *nets())


def means(table):
    return {name: scores.summarise(values)[0] for name, values in table.items()}


def spoiled(video, **data):
    return means(scores.per_clip(video, true_clips()[1] | data, *nets()))


def empty(frames, setting):
    scenes = scores.lit_backgrounds(64)[setting[:, 0], setting[:, 1]] * 2 - 1   # (n, 3, h, w)
    return scenes[:, :, None].repeat(1, 1, frames, 1, 1)


# ------------------------------------------------------------ the head


@pytest.mark.parametrize("frames", [9, 25])
def test_the_rule_reads_every_action_off_exact_poses(frames):
    action = torch.arange(len(world.ACTIONS)).repeat(50)
    assert torch.equal(read_action(world.action_poses(action, frames, seeded(1))), action)


def test_the_estimator_and_the_rule_agree_with_true_clips_of_unseen_people():
    video, data = true_clips()
    found, poses = read_heads(nets()[1], video)
    assert found.shape == (N, 9) and poses.shape == (N, 9, 6) and found.all()
    assert (read_action(poses) == data["action"]).float().mean() > 0.95
    error = (read_heads(nets()[1], data["references"][:, :, None])[1][:, 0]
             - data["ref_pose"]).abs().mean(0)
    assert (error < torch.tensor([0.03, 0.03, 0.04, 0.08, 0.12, 0.08])).all(), error


def test_no_face_is_found_in_empty_scenes_and_noise():
    noise = torch.randn(36, 3, 2, 64, 64, generator=seeded(5)).clamp(-1, 1)
    for video in (empty(2, world.draw_settings(36, seeded(4))), noise):
        assert not read_heads(nets()[1], video)[0].any()


def test_lost_frames_take_the_pose_of_the_nearest_frame_with_a_face():
    found = torch.tensor([[False, True, False, False, True]])
    poses = torch.arange(5.0).view(1, 5, 1).expand(1, 5, 6)
    assert scores.fill_lost(found, poses)[0, :, 0].tolist() == [1, 1, 1, 4, 4]


def test_wrong_files_frames_and_test_data_are_one_line(tmp_path):
    tensors = load_file(TINY / "head_pose.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "out.bias"}, tmp_path / "short.safetensors")
    for path, told in ((tmp_path / "short.safetensors", "with out.bias of shape"),
                       (TINY / "eval_encoder.safetensors", "expected a head-pose estimator")):
        with pytest.raises(ValueError, match=told) as error:
            load_head(path)
        assert "\n" not in str(error.value) and "; " in str(error.value)
    with pytest.raises(ValueError, match="expected frames"):
        nets()[1](torch.zeros(1, 3, 32, 32))
    video, data = true_clips()
    with pytest.raises(ValueError, match="expected setting of shape"):
        scores.per_clip(video, data | {"setting": data["setting"][:3]}, *nets())


# ------------------------------------------------------------ what each score does


def test_true_clips_score_as_they_should():
    assert tuple(true_scores()) == scores.SCORES
    m = means(true_scores())
    assert m["found"] == 1 and m["action"] > 0.95 and m["top1"] > 0.85 and m["look_alike"] > 0.9, m
    assert m["scene"] == m["light"] == m["shirt"] == 1
    assert m["leak_scene"] == m["leak_light"] == m["leak_shirt"] == 0
    assert m["flicker"] == 0 and abs(m["drift"]) < 0.05 and m["min_frame"] < m["similarity"], m


def test_swapped_people_lose_their_identity_and_nothing_else():
    video, data = true_clips()
    m, true = spoiled(video, who=data["who"].roll(1)), means(true_scores())
    assert m["top1"] < 0.1 and m["similarity"] < true["similarity"] - 0.3, m
    assert 0.2 < m["look_alike"] < 0.8 and m["action"] == true["action"] and m["scene"] == 1, m


def test_flicker_is_the_size_of_a_change_and_leaves_out_what_hair_may_reach():
    wave = torch.tensor([0.0, 0.05]).repeat(5)[:9].view(1, 1, 9, 1, 1)  # 0.05 of [-1, 1] is 0.025
    found, poses = read_heads(nets()[1], true_clips()[0])
    flicker = scores.flicker(true_clips()[0] * 0.9 + wave, found, poses)
    assert abs(scores.summarise(flicker)[0] - 0.025) < 1e-4
    video, poses = torch.zeros(1, 3, 2, 64, 64), torch.zeros(1, 2, 6)
    poses[..., 2] = 1
    video[:, :, 1, :, :6], poses[0, 1, 0] = 1, -0.5  # the head moves left, hair covers the border
    assert scores.flicker(video, torch.ones(1, 2, dtype=torch.bool), poses) == 0


def test_a_reference_setting_in_the_clip_shows_as_leak_and_not_as_prompt():
    _, data = true_clips()
    poses = world.action_poses(data["action"], 9, seeded(6))
    m = spoiled(world.render(world.people("val", N), data["ref_setting"], poses)[0])
    assert m["leak_scene"] == m["leak_light"] == m["leak_shirt"] == 1
    assert m["scene"] < 0.4 and m["light"] < 0.5 and m["shirt"] < 0.4, m
    same = data["setting"] == data["ref_setting"]                       # (n, 3)
    assert torch.equal(true_scores()["leak_scene"].isnan(), same[:, 0])


def test_faces_that_vanish_cost_found_similarity_minimum_and_drift():
    video, data = true_clips()
    nobody = empty(9, data["setting"])
    m = spoiled(torch.cat([video[:, :, :5], nobody[:, :, 5:]], dim=2))
    assert abs(m["found"] - 5 / 9) < 0.01 and m["min_frame"] == 0 and m["drift"] > 0.3, m
    assert abs(m["similarity"] - 0.6 * means(true_scores())["similarity"]) < 0.08, "3 frames of 5"
    gone = spoiled(nobody)
    assert gone["scene"] == 1
    assert all(gone[k] == 0 for k in ("similarity", "top1", "look_alike", "found", "action")), gone


def test_a_pasted_reference_shows_in_every_leak_and_true_clips_stay_near_chance():
    video, data = true_clips()
    pasted = torch.cat([data["references"][:, :, None], video[:, :, 1:]], dim=2)
    still = data | {"action": torch.full((N,), world.ACTIONS.index("stays still"))}
    true, copy = scores.leaks(video, data, nets()[1]), scores.leaks(pasted, still, nets()[1])
    assert copy["pixels"][0] > 0.999 and copy["position"][0] > 0.8 and copy["pose"][0] > 0.7, copy
    assert true["pixels"][0] < 0.7 and all(abs(true[k][0]) < 0.35 for k in ("pose", "position"))
    assert all(abs(copy[k][1]) < 0.05 for k in ("pose", "position"))
    others = (torch.corrcoef(data["references"].flatten(1)).sum() - N) / (N * (N - 1))
    assert abs(copy["pixels"][1] - others) < 1e-4, "pasted: each reference with all the others"


def test_with_the_person_fixed_true_clips_share_no_pixels_with_the_reference():
    video, data = true_clips()
    another, _ = world.draw_references(world.people("val", N), data["ref_setting"], seeded(72),
                                       share=0)
    shown = scores.shows_reference(video, data | {"another": another})
    mean, half = scores.summarise(shown["ref_pixels"])
    assert abs(mean) < half, "the person is in both pictures, the clip's setting in neither"
    pasted = data["references"][:, :, None].expand_as(video)
    shown = scores.shows_reference(pasted, data | {"another": another})
    apart = [1 - np.corrcoef(a.flatten(), b.flatten())[0, 1]
             for a, b in zip(data["references"], another, strict=True)]
    assert torch.allclose(shown["ref_pixels"].double(), torch.tensor(apart), atol=1e-5)
    assert min(shown[k].mean() for k in ("ref_scene", "ref_light", "ref_shirt")) > 0.95


def test_the_start_that_an_action_asks_for_is_no_position_leak():
    """Every clip starts where its reference stands, moved by what its action begins with."""
    _, data = true_clips()
    pose, action = data["ref_pose"].clone(), data["action"]
    for name, column, by in (("moves to the left", 0, 0.25), ("moves to the right", 0, -0.25),
                             ("comes closer", 2, -0.20)):
        pose[:, column] += by * (action == world.ACTIONS.index(name))
    video = world.render(world.people("val", N), data["setting"], pose[:, None])[0]
    assert scores.leaks(video, data, nets()[1])["position"][0] > 0.7


# ------------------------------------------------------------ distances and intervals


def test_frechet_distance_of_gaussians_computed_by_hand():
    """Means (0, 0) and (3, 4), variances (2, 8) and (18, 8): 25 + (sqrt 18 - sqrt 2)^2 = 33."""
    corner = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * math.sqrt(0.75)
    a, b = (corner * torch.tensor(variance).sqrt() + torch.tensor(mean)
            for variance, mean in (([2.0, 8.0], [0.0, 0.0]), ([18.0, 8.0], [3.0, 4.0])))
    assert abs(scores.frechet(a, b) - 33) < 1e-4 and scores.frechet(a, a) < 1e-6
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert abs(scores.frechet(a @ turn, b @ turn) - 33) < 1e-4, "turning the axes changes nothing"
    with pytest.raises(ValueError, match="expected vectors"):
        scores.frechet(a[:1], b)


def test_intervals_against_known_numbers():
    mean, half = scores.mean_interval([1.0, 2.0, 3.0])  # deviation 1, t(2) = 4.303
    assert mean == 2 and abs(half - 4.303 / math.sqrt(3)) < 1e-9
    thirty = [float(i % 2) for i in range(30)]
    assert abs(scores.mean_interval(thirty)[1] - 2.045 * math.sqrt(7.5 / 29 / 30)) < 1e-9
    assert math.isnan(scores.mean_interval([5.0])[1])
    mean, half = scores.summarise(torch.tensor([0.0, math.nan, 1.0, 0.0, 1.0]))
    assert mean == 0.5 and abs(half - 1.96 * math.sqrt(1 / 3) / 2) < 1e-6, "NaN is left out"
    assert all(math.isnan(v) for v in scores.summarise(torch.full((3,), math.nan)))
