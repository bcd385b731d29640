"""The scores: the head is read right, scores move as they should when a clip is spoiled, the statistics are right.

Tolerances: shares on true clips are what the bundled reader reaches on unseen people, with a margin. CPU, seconds.

    pytest tests/test_scores.py
"""

import functools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clips.face import load_facenet
from common.seeds import seeded
from study import scores
from toy import world

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"
ACTIONS = torch.arange(len(world.ACTIONS))


@functools.cache
def head():
    return scores.load_head(TINY / "head_pose.safetensors")


@functools.cache
def eval_encoder():
    return load_facenet(TINY / "eval_encoder.safetensors")


@functools.cache
def true_clips(count=32):
    """Clips of unseen people, and what was asked for in the form that per_clip takes."""
    g = seeded(71)
    person = world.people("val", count)
    setting, ref_setting = world.draw_settings(count, g), world.draw_settings(count, g)
    action, ref_pose = torch.arange(count) % len(ACTIONS), world.still_poses(count, g)
    video, _, _ = world.render(person, setting, world.action_poses(action, 9, g))
    references, _, _ = world.render(person, ref_setting, ref_pose[:, None])
    alike, _, _ = world.render(world.look_alikes(person, g), ref_setting, ref_pose[:, None])
    data = {"who": torch.arange(count), "references": references[:, :, 0], "alike": alike[:, :, 0], "setting": setting,
            "ref_setting": ref_setting, "action": action, "ref_pose": ref_pose}
    return video, data


def means(video, data=None):
    table = scores.per_clip(video, data or true_clips()[1], eval_encoder(), head())
    return {name: scores.summarise(values)[0] for name, values in table.items()}


@functools.cache
def true_means():
    return means(true_clips()[0])


def empty(video, setting):
    scenes = scores.lit_backgrounds(64)[setting[:, 0], setting[:, 1]] * 2 - 1              # (n, 3, h, w)
    return scenes[:, :, None].expand_as(video)


# ------------------------------------------------------------ the head-pose estimator and the rule


def test_the_rule_reads_every_action_off_exact_poses():
    action = ACTIONS.repeat(250)
    assert torch.equal(scores.read_action(world.action_poses(action, 9, seeded(1))), action)


def test_the_rule_reads_actions_off_clips_of_other_lengths():
    action = ACTIONS.repeat(50)
    assert torch.equal(scores.read_action(world.action_poses(action, 25, seeded(2))), action)


def test_the_reader_and_the_rule_agree_with_true_clips_above_95_percent_and_with_shuffled_ones_by_chance():
    video, data = true_clips()
    found, poses = scores.read_heads(head(), video)
    assert found.shape == (32, 9) and poses.shape == (32, 9, 6)
    read = scores.read_action(poses)
    right = (read == data["action"]).float().mean()
    assert found.all() and right > 0.95, right
    shuffled = torch.stack([(read[torch.randperm(32)] == data["action"]).float().mean() for _ in range(50)]).mean()
    assert abs(shuffled - 1 / 8) < 0.03, shuffled


def test_pose_numbers_of_unseen_people_are_near_the_truth():
    g = seeded(3)
    pose = world.still_poses(96, g)
    video, _, _ = world.render(world.people("test", 96), world.draw_settings(96, g), pose[:, None])
    error = (scores.read_heads(head(), video)[1][:, 0] - pose).abs().mean(0)
    assert (error < torch.tensor([0.03, 0.03, 0.04, 0.08, 0.12, 0.08])).all(), error


def test_no_face_is_found_in_empty_scenes_and_noise():
    video = empty(torch.empty(36, 3, 2, 64, 64), world.draw_settings(36, seeded(4)))
    noise = torch.randn(36, 3, 2, 64, 64, generator=seeded(5)).clamp(-1, 1)
    assert not scores.read_heads(head(), video)[0].any()
    assert not scores.read_heads(head(), noise)[0].any()


def test_lost_frames_take_the_pose_of_the_nearest_frame_with_a_face():
    found = torch.tensor([[False, True, False, False, True]])
    poses = torch.arange(5.0).view(1, 5, 1).expand(1, 5, 6)
    assert scores.fill_lost(found, poses)[0, :, 0].tolist() == [1, 1, 1, 4, 4]


def test_the_reader_is_small_and_says_in_one_line_what_is_wrong(tmp_path):
    path = TINY / "head_pose.safetensors"
    assert path.stat().st_size < 1e6 and sum(p.numel() for p in head().parameters()) < 200_000
    assert not any(p.requires_grad for p in head().parameters()) and not head().training
    with pytest.raises(ValueError, match="expected frames") as error:
        head()(torch.zeros(1, 3, 32, 32))
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != "out.bias"}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="expected out.bias") as error:
        scores.load_head(tmp_path / "short.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="expected a head-pose estimator"):
        scores.load_head(TINY / "eval_encoder.safetensors")


# ------------------------------------------------------------ what each score does


def test_true_clips_score_as_they_should():
    table = scores.per_clip(*true_clips(), eval_encoder(), head())
    assert tuple(table) == scores.SCORES and all(v.shape == (32,) for v in table.values())
    m = true_means()
    assert m["found"] == 1 and m["action"] > 0.95 and m["top1"] > 0.85 and m["look_alike"] > 0.9, m
    assert m["scene"] == m["light"] == m["shirt"] == 1 and m["leak_scene"] == m["leak_light"] == m["leak_shirt"] == 0
    assert m["flicker"] == 0 and abs(m["drift"]) < 0.05 and m["min_frame"] < m["similarity"], m


def test_swapped_people_lose_their_identity_and_nothing_else():
    video, data = true_clips()
    m = means(video, data | {"who": data["who"].roll(1)})
    assert m["top1"] < 0.1 and m["similarity"] < true_means()["similarity"] - 0.3 and 0.2 < m["look_alike"] < 0.8, m
    assert m["action"] == true_means()["action"] and m["scene"] == 1


def test_a_frozen_clip_stays_still_and_a_reversed_one_turns_the_other_way():
    video, data = true_clips()
    frozen = means(video[:, :, :1].expand_as(video))
    assert abs(frozen["action"] - 1 / 8) < 0.05 and frozen["drift"] == 0 and frozen["flicker"] == 0
    _, poses = scores.read_heads(head(), video.flip(2))
    left, right = world.ACTIONS.index("turns left"), world.ACTIONS.index("turns right")
    read = scores.read_action(poses)
    assert (read[data["action"] == left] == right).float().mean() > 0.8


def test_flickering_light_shows_in_flicker_by_its_size():
    video, _ = true_clips()
    wave = torch.tensor([0.0, 0.05]).repeat(5)[:9].view(1, 1, 9, 1, 1)                    # +0.05 of [-1, 1] is 0.025
    m = means(video * 0.9 + wave)
    assert abs(m["flicker"] - 0.025) < 1e-4, m["flicker"]


def test_the_reference_background_shows_as_leak_and_not_as_prompt():
    video, data = true_clips()
    person = world.people("val", 32)
    copied, _, _ = world.render(person, data["ref_setting"], world.action_poses(data["action"], 9, seeded(6)))
    m = means(copied)
    assert m["leak_scene"] == m["leak_light"] == m["leak_shirt"] == 1
    assert m["scene"] < 0.4 and m["light"] < 0.5 and m["shirt"] < 0.4, m
    table = scores.per_clip(video, data, eval_encoder(), head())
    assert torch.equal(table["leak_scene"].isnan(), data["setting"][:, 0] == data["ref_setting"][:, 0])


def test_faces_that_vanish_in_the_second_half_cost_found_similarity_minimum_and_drift():
    video, data = true_clips()
    spoiled = video.clone()
    spoiled[:, :, 5:] = empty(video, data["setting"])[:, :, 5:]
    m = means(spoiled)
    assert abs(m["found"] - 5 / 9) < 0.01 and m["min_frame"] == 0 and m["drift"] > 0.3, m
    assert abs(m["similarity"] - 0.6 * true_means()["similarity"]) < 0.08, m               # three of the five frames
    gone = means(empty(video, data["setting"]))
    assert gone["similarity"] == gone["top1"] == gone["look_alike"] == gone["found"] == gone["action"] == 0, gone
    assert gone["scene"] == 1


def test_a_pasted_reference_shows_in_every_leak_and_true_clips_stay_near_chance():
    video, data = true_clips()
    pasted = video.clone()
    pasted[:, :, 0] = data["references"]
    still = data | {"action": torch.full((32,), world.ACTIONS.index("stays still"))}
    true, copy = scores.leaks(video, data, head()), scores.leaks(pasted, still, head())
    assert copy["pixels"][0] > 0.999 and copy["position"][0] > 0.8 and copy["pose"][0] > 0.7, copy
    assert true["pixels"][0] < 0.7 and all(abs(true[k][0]) < 0.35 for k in ("pose", "position")), true
    assert all(abs(copy[k][1]) < 0.05 for k in ("pose", "position")) and copy["pixels"][1] < 0.6, copy


def test_wrong_test_data_is_named():
    video, data = true_clips()
    with pytest.raises(ValueError, match="expected action in the test data"):
        scores.per_clip(video, {k: v for k, v in data.items() if k != "action"}, eval_encoder(), head())
    with pytest.raises(ValueError, match="expected setting of shape"):
        scores.per_clip(video, data | {"setting": data["setting"][:3]}, eval_encoder(), head())


# ------------------------------------------------------------ distances and intervals


def test_frechet_distance_of_gaussians_computed_by_hand():
    """Four points each: means (0, 0) and (3, 4), variances (2, 8) and (18, 8): 25 + (sqrt 18 - sqrt 2)^2 = 33."""
    corner = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * math.sqrt(3) / 2     # unit variance
    def cloud(variance, mean):
        return corner * torch.tensor(variance).sqrt() + torch.tensor(mean)
    a, b = cloud([2.0, 8.0], [0.0, 0.0]), cloud([18.0, 8.0], [3.0, 4.0])
    assert abs(scores.frechet(a, b) - 33) < 1e-4 and scores.frechet(a, a) < 1e-6
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert abs(scores.frechet(a @ turn, b @ turn) - 33) < 1e-4, "turning the axes changes nothing"
    with pytest.raises(ValueError, match="expected vectors"):
        scores.frechet(a[:1], b)


def test_intervals_against_known_numbers():
    mean, half = scores.mean_interval([1.0, 2.0, 3.0])                                    # deviation 1, t(2) = 4.303
    assert mean == 2 and abs(half - 4.303 / math.sqrt(3)) < 1e-9
    assert abs(scores.mean_interval([0.0, 2.0])[1] - 12.706) < 1e-9                       # sqrt 2 over sqrt 2
    assert math.isnan(scores.mean_interval([5.0])[1])
    thirty = [float(i % 2) for i in range(30)]
    assert abs(scores.mean_interval(thirty)[1] - 2.045 * math.sqrt(7.5 / 29 / 30)) < 1e-9
    assert scores.paired_interval([1.0, 5.0, 9.0], [0.0, 4.0, 8.0]) == (1.0, 0.0)
    with pytest.raises(ValueError, match="none"):
        scores.mean_interval([])
    with pytest.raises(ValueError, match="pair them"):
        scores.paired_interval([1.0], [])


def test_nan_entries_are_left_out_of_a_summary():
    mean, half = scores.summarise(torch.tensor([0.0, math.nan, 1.0, 0.0, 1.0]))
    assert mean == 0.5 and abs(half - 1.96 * math.sqrt(1 / 3) / 2) < 1e-6
    assert all(math.isnan(v) for v in scores.summarise(torch.full((3,), math.nan)))
