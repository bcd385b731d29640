"""evaluate.py: finished rows are kept, the test set is the one of the old numbers, the tables say what the numbers say,
own videos are told apart, and bad input ends in one line.

Own videos are clips of the world written by PyAV and scored with the bundled recogniser, whose crops are boxes.
Hardware: CPU, some seconds. Run: python -m pytest tests/test_evaluate.py
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clips.face import square, template
from clips.video import VideoWriter, to_frames
from common.seeds import seeded
from study import evaluate
from study.evaluate import cell, kept, settings_key, tables, with_person
from toy import world

TINY = Path(evaluate.__file__).parent / "weights" / "tiny"
SIZE, FRAMES = 128, 9


def run(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python -m study.evaluate words`."""
    monkeypatch.setattr(sys, "argv", ["study.evaluate", *map(str, words)])
    status = evaluate.main()
    out, err = capsys.readouterr()
    return status, out, err


# ------------------------------------------------------------ the test set


def test_the_test_set_draws_what_draw_references_would_and_tells_the_pose():
    data = evaluate.test_set(4, 2, 64, 5)
    g = seeded(2024)
    person, setting = world.people("test", 4), world.draw_settings(4, g)
    references, _ = world.draw_references(person, setting, g, share=1.0)
    assert torch.equal(data["references"], references)
    alike, _ = world.draw_references(world.look_alikes(person, g), world.draw_settings(4, g), g)
    assert torch.equal(data["alike"], alike)
    assert torch.equal(data["setting"], world.draw_settings(8, g)) and torch.equal(data["action"], world.draw_actions(8, g))
    again = world.render(person[data["who"]], data["ref_setting"], data["ref_pose"][:, None])[0][:, :, 0]
    assert torch.equal(again, references[data["who"]])
    captions = [world.caption(s, int(a), i % 4) for i, (s, a) in
                enumerate(zip(data["setting"], data["action"], strict=True))]
    assert data["captions"] == captions and data["true"].shape == (8, 3, 5, 64, 64)


def test_another_split_has_other_people_and_the_same_prompts():
    test, train = evaluate.test_set(3, 1, 64, 5), evaluate.test_set(3, 1, 64, 5, "train")
    assert test["captions"] == train["captions"]
    assert (test["references"] - train["references"]).abs().flatten(1).amax(1).min() > 0.2


def test_with_another_person_the_reference_changes_and_the_prompt_does_not():
    data = evaluate.test_set(3, 2, 64, 5)
    shown = (data["who"] + 1) % 3
    other = with_person(data, shown)
    for name in ("ref_setting", "ref_pose"):
        assert torch.equal(other[name], data[name][[2, 3, 4, 5, 0, 1]]), name
    assert torch.equal(other["setting"], data["setting"]) and torch.equal(other["who"], shown)
    assert torch.equal(data["who"], torch.tensor([0, 0, 1, 1, 2, 2])), "the first data were changed"


# ------------------------------------------------------------ rows are kept


def test_a_kept_row_is_not_made_again_and_comes_back_in_8_bits(tmp_path):
    video, calls = torch.rand(2, 3, 3, 8, 8, generator=seeded(1)) * 2 - 1, []

    def make():
        calls.append(1)
        return video

    first, seconds = kept(tmp_path / "a" / "row.safetensors", make)
    second, again = kept(tmp_path / "a" / "row.safetensors", make)
    assert len(calls) == 1 and torch.equal(first, second) and seconds == again
    assert first.dtype == torch.uint8
    error = (first / 127.5 - 1 - video).abs().max().item()
    assert error <= 0.5 / 127.5 + 1e-6, f"{error} off"  # half of one of 255 steps
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["row.safetensors"], "leftovers"


def test_a_row_that_fails_leaves_no_file(tmp_path):
    def make():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept(tmp_path / "row.safetensors", make)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_row_is_one_line_that_says_what_to_do(tmp_path):
    path = tmp_path / "row.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="row.safetensors.*delete that file"):
        kept(path, lambda: torch.zeros(1, 3, 1, 8, 8))


def test_the_folder_of_kept_rows_follows_weights_and_settings(tmp_path, monkeypatch):
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text("{}")
    (tmp_path / "m.safetensors").write_bytes(b"weights")
    words = ["--checkpoint-path", str(tmp_path / "m.safetensors"), "--gemma-root", str(tmp_path / "gemma")]
    key = settings_key(evaluate.parse_arguments(words))
    assert key == settings_key(evaluate.parse_arguments([*words, "--output-path", "other.json", "--rows", "swapped"]))
    keys = {key}
    for more in (["--people", "8"], ["--seed", "1"], ["--text-scale", "4"], ["--order", "two_deltas"], ["--split", "val"],
                 ["--num-inference-steps", "3"], ["--dtype", "bfloat16"], ["--prompts", "2"], ["--ref-scale", "1"],
                 ["--rescale", "0.5"]):
        keys.add(settings_key(evaluate.parse_arguments([*words, *more])))
    (tmp_path / "m.safetensors").write_bytes(b"Weights")
    keys.add(settings_key(evaluate.parse_arguments(words)))
    (tmp_path / "gemma" / "config.json").write_text("{} ")
    keys.add(settings_key(evaluate.parse_arguments(words)))
    (tmp_path / "model.py").write_text("# other code")
    for name in evaluate.CODE:
        if name != "model":
            (tmp_path / f"{name}.py").write_text((Path(evaluate.__file__).parent / f"{name}.py").read_text())
    monkeypatch.setattr(evaluate, "HERE", tmp_path)
    keys.add(settings_key(evaluate.parse_arguments(words)))
    assert len(keys) == 14


# ------------------------------------------------------------ tables


def test_cells_are_percent_or_three_digits_with_their_interval_and_a_dash_for_nothing():
    assert cell("top1", 0.9531, 0.0212) == "95.3 ± 2.1 %"
    assert cell("top1", 1 / 256) == "0.4 %"
    assert cell("similarity", 0.8626, 0.0071) == "0.863 ± 0.007"
    assert cell("drift", -0.01, math.nan) == "-0.010"
    assert cell("leak_scene", math.nan, math.nan) == cell("frechet", None) == "–"


def test_tables_have_a_row_for_each_kind_of_clips_and_a_column_for_each_score():
    rows = {"own": {"scores": {"top1": (0.5, 0.25), "pose": (0.125, None)}}, "chance": {"scores": {"top1": (0.25, None)}}}
    assert tables(rows, ("top1", "min_frame"), ("pose",)).split("\n") == [
        "| clips | top1 | min frame |", "|---|---|---|", "| own | 50.0 ± 25.0 % | – |", "| chance | 25.0 % | – |", "",
        "| clips | pose |", "|---|---|", "| own | 0.125 |", "| chance | – |"]


def test_every_score_has_its_column():
    from study.scores import SCORES

    columns = [*evaluate.IDENTITY, *evaluate.PROMPT]
    assert sorted(columns) == sorted([*SCORES, "frechet", "pose", "position", "pixels"])


def test_what_is_not_a_number_becomes_null_in_the_json(tmp_path):
    evaluate.write_json(tmp_path / "a.json", {"a": math.nan, "b": [1.5, (math.nan, None)], "c": "NaN"})
    assert (tmp_path / "a.json").read_text() == '{"a": null, "b": [1.5, [null, null]], "c": "NaN"}\n'


# ------------------------------------------------------------ the whole evaluation


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Four people, one row of clips, two steps: the arguments, the record and the folder of kept rows."""
    folder = tmp_path_factory.mktemp("evaluated")
    words = ["--people", "4", "--num-inference-steps", "2", "--rows", "own reference", "--folder", str(folder / "rows"),
             "--output-path", str(folder / "e.json")]
    evaluate.score_world(evaluate.parse_arguments(words))
    return words, folder


def test_an_evaluation_writes_true_clips_and_chance_beside_the_row_with_all_numbers(evaluated):
    _, folder = evaluated
    record = json.loads((folder / "e.json").read_text())
    assert list(record["rows"]) == ["true video", "through the VAE", "own reference", "chance"]
    true, chance = record["rows"]["true video"]["scores"], record["rows"]["chance"]["scores"]
    assert true["top1"] == [1.0, 0.0] and true["action"][0] == true["scene"][0] == 1.0 and true["flicker"][0] < 1e-6
    assert chance["top1"] == [0.25, None] and chance["look_alike"][0] == 0.5 and chance["action"][0] == 0.125
    assert chance["similarity"][0] < 0.5 < true["similarity"][0]
    assert {"pose", "position", "pixels"} <= chance.keys()
    each = record["rows"]["own reference"]["per_clip"]
    assert all(len(values) == 4 for values in each.values())
    mean = record["rows"]["own reference"]["scores"]["similarity"][0]
    assert abs(sum(each["similarity"]) / 4 - mean) < 1e-6
    assert record["arguments"]["text_scale"] == "2.0", "the scales that were used, not None"
    with Image.open(folder / "e.png") as sheet:
        assert sheet.size == (4 * 4 * 64 * 2, 64 * 2)


def test_a_second_run_takes_the_clips_from_the_folder_and_ends_at_the_same_scores(evaluated, monkeypatch, capsys):
    words, folder = evaluated
    before = json.loads((folder / "e.json").read_text())["rows"]
    files = sorted(path.name for path in (folder / "rows").glob("*/*"))
    assert files == ["own_reference.safetensors", "through_the_VAE.safetensors"]
    assert load_file(next((folder / "rows").glob("*/own*")))["video"].shape == (4, 3, 9, 64, 64)

    def never(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(evaluate, "generate", never)
    status, out, _ = run(monkeypatch, capsys, *words)
    assert status == 0 and "| own reference |" in out and "| chance |" in out
    assert json.loads((folder / "e.json").read_text())["rows"] == before


def test_the_tables_come_again_from_the_file_alone_and_bad_files_are_one_line(evaluated, monkeypatch, capsys, tmp_path):
    words, folder = evaluated
    _, first, _ = run(monkeypatch, capsys, *words)
    status, out, _ = run(monkeypatch, capsys, "--tables", folder / "e.json")
    assert status == 0 and "| own reference |" in out and first.startswith(out.rstrip("\n"))
    assert str(Path(__file__).parent.parent) not in (folder / "e.json").read_text(), "paths of this machine stay out"
    (tmp_path / "other.json").write_text('{"rows": {}}')
    refused(monkeypatch, capsys, ["--tables", tmp_path / "other.json"], "got one without vae_psnr, split,")
    (tmp_path / "broken.json").write_text("{")
    refused(monkeypatch, capsys, ["--tables", tmp_path / "broken.json"], "expected a JSON object")
    refused(monkeypatch, capsys, ["--tables", tmp_path / "none.json"], "none.json")


# ------------------------------------------------------------ own videos


def write_person(folder: Path, name: str, person: torch.Tensor, found: range = range(FRAMES), marks: bool = False) -> Path:
    """A clip of one person, an mp4 of FRAMES frames with its faces file, and name-face.png with its own."""
    g = seeded(5, name)
    setting = world.draw_settings(1, g)
    video, boxes, _ = world.render(person[None], setting, world.action_poses(torch.tensor([0]), FRAMES, g), SIZE)
    with VideoWriter(folder / f"{name}.mp4", 8.0) as writer:
        writer.add(to_frames(video[0]))
    write_faces(folder / f"{name}.json", boxes[0], found, marks)
    picture, box = world.draw_references(person[None], setting, g, SIZE)
    Image.fromarray(to_frames(picture[0][:, None])[0]).save(folder / f"{name}-face.png")
    write_faces(folder / f"{name}-face.json", box, range(1), marks)
    return folder / f"{name}-face.png"


def write_faces(path: Path, boxes: torch.Tensor, found: range, marks: bool) -> None:
    corner, opposite = square(boxes)[:, None].split(2, dim=-1)
    points = corner + template(1) * (opposite - corner)  # these landmarks reproduce the crop by box
    frames = [{"t": k / 8, "box": boxes[k].tolist()} | ({"landmarks": points[k].tolist()} if marks else {}) for k in found]
    path.write_text(json.dumps({"frame_rate": 8, "size": [SIZE, SIZE], "frames": frames}))


@pytest.fixture
def own(tmp_path):
    """Two people's videos; the pictures lie beside."""
    ada, ben = world.people("test", 2)
    return write_person(tmp_path, "ada", ada), write_person(tmp_path, "ben", ben)


def words_for(ref: Path, *more) -> list:
    return ["--videos", ref.parent, "--ref", ref, "--face", TINY / "face.safetensors", "--output-path",
            ref.parent / "out.json", *more]


def scored(ref: Path) -> dict[str, dict[str, float]]:
    rows = json.loads((ref.parent / "out.json").read_text())["rows"]
    return {name: {score: value[0] for score, value in row["scores"].items()} for name, row in rows.items()}


def test_the_own_video_is_more_similar_than_the_others_for_both_pictures(own, monkeypatch, capsys):
    for ref, mine, other in ((own[0], "ada.mp4", "ben.mp4"), (own[1], "ben.mp4", "ada.mp4")):
        status, out, err = run(monkeypatch, capsys, *words_for(ref))
        assert status == 0, err
        found = scored(ref)
        assert found[mine]["similarity"] > 0.7 and found[other]["similarity"] < 0.4, found
        assert found[mine]["found"] == 1 and found[mine]["min_frame"] <= found[mine]["similarity"]
        assert found["mean"]["similarity"] == pytest.approx((found[mine]["similarity"] + found[other]["similarity"]) / 2)
        assert found[mine]["flicker"] < 0.01, "the scene stands still; what is left is the codec's"
        assert f"| {mine} |" in out
        assert "Not computed" in out and "follows its prompt" in out and "128 frames" in out.replace("\n", " ")


def test_flicker_is_the_change_at_the_border_in_brightness_from_0_to_1(tmp_path):
    frames = torch.full((FRAMES, SIZE, SIZE, 3), 100, dtype=torch.uint8)
    frames[1::2] = 125
    frames[::3, 20:100, 20:100] = 200  # inside and at the bottom anything may move
    frames[::2, 100:] = 30
    with VideoWriter(tmp_path / "v.mp4", 8.0) as writer:
        writer.add(frames.numpy())
    write_faces(tmp_path / "v.json", torch.zeros(0, 4), range(0), False)
    net = evaluate.load_facenet(TINY / "face.safetensors")
    vectors, flicker = evaluate.read_own(tmp_path / "v.mp4", evaluate.load_faces(tmp_path / "v.json"), net)
    assert abs(flicker - 25 / 255) < 2 / 255, flicker  # the codec errs by a level or two
    assert vectors.shape == (2, FRAMES, 128) and vectors.isnan().all()


def test_a_frame_without_a_face_counts_0(own, monkeypatch, capsys):
    run(monkeypatch, capsys, *words_for(own[0]))
    whole = scored(own[0])["ada.mp4"]
    faces = json.loads((own[0].parent / "ada.json").read_text())
    faces["frames"] = faces["frames"][:6]
    (own[0].parent / "ada.json").write_text(json.dumps(faces))
    assert run(monkeypatch, capsys, *words_for(own[0]))[0] == 0
    cut = scored(own[0])["ada.mp4"]
    assert cut["found"] == pytest.approx(6 / 9) and cut["min_frame"] == 0
    assert 0.5 * whole["similarity"] < cut["similarity"] < 0.8 * whole["similarity"]
    assert cut["drift"] > whole["drift"] + 0.3, "the face is lost in the second half"


def test_landmarks_are_used_only_where_picture_and_frame_both_have_them(tmp_path, monkeypatch, capsys):
    person = world.people("test", 1)[0]
    ref, by_landmarks = write_person(tmp_path, "ada", person, marks=True), evaluate.align
    used = []
    monkeypatch.setattr(evaluate, "align", lambda *a: used.append(1) or by_landmarks(*a))
    assert run(monkeypatch, capsys, *words_for(ref))[0] == 0
    aligned = scored(ref)["ada.mp4"]
    assert len(used) == 1 + FRAMES
    faces = json.loads((tmp_path / "ada.json").read_text())
    for row in faces["frames"]:
        del row["landmarks"]
    (tmp_path / "ada.json").write_text(json.dumps(faces))
    assert run(monkeypatch, capsys, *words_for(ref))[0] == 0
    by_box = scored(ref)["ada.mp4"]
    assert abs(by_box["similarity"] - aligned["similarity"]) < 0.02  # these landmarks cut nearly what the box cuts
    vectors, _ = evaluate.read_own(tmp_path / "ada.mp4", evaluate.load_faces(tmp_path / "ada.json"),
                                   evaluate.load_facenet(TINY / "face.safetensors"))
    assert vectors[1].isnan().all() and not vectors[0].isnan().any()


def test_faces_files_may_lie_in_a_folder_of_their_own(own, tmp_path, monkeypatch, capsys):
    (tmp_path / "faces").mkdir()
    for path in tmp_path.glob("*.json"):
        path.rename(tmp_path / "faces" / path.name)
    status, _, err = run(monkeypatch, capsys, *words_for(own[0], "--faces-folder", tmp_path / "faces"))
    assert status == 0, err
    assert scored(own[0])["ada.mp4"]["similarity"] > 0.7


# ------------------------------------------------------------ refusals


def refused(monkeypatch, capsys, words, told: str) -> None:
    status, out, err = run(monkeypatch, capsys, *words)
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("study.evaluate")]
    assert status == 2 and out == "" and len(lines) == 1, err
    assert lines[0].startswith("evaluate.py: error: ") and told in lines[0] and "; " in lines[0], lines[0]


def test_bad_own_videos_are_one_line_and_nothing_is_written(own, monkeypatch, capsys):
    folder, ref = own[0].parent, own[0]
    words = words_for(ref)
    refused(monkeypatch, capsys, words[:4], "--ref and --face")
    refused(monkeypatch, capsys, [words[0], folder / "nowhere", *words[2:]], "nowhere")
    (folder / "empty").mkdir()
    refused(monkeypatch, capsys, [words[0], folder / "empty", *words[2:]], "got 0 videos")
    refused(monkeypatch, capsys, [*words[:4], "--face", ref], "ada-face.png")
    refused(monkeypatch, capsys, [*words[:3], folder / "no.png", *words[4:]], "no.json")
    (folder / "ben.mp4").rename(folder / "ada.mkv")
    refused(monkeypatch, capsys, words, "2 videos, 2 names")
    (folder / "ada.mkv").rename(folder / "ben.mp4")
    faces = json.loads((folder / "ben.json").read_text())
    (folder / "ben.json").write_text(json.dumps(faces | {"size": [64, 128]}))
    refused(monkeypatch, capsys, words, "128x128")
    (folder / "ben.json").unlink()
    refused(monkeypatch, capsys, words, "ben.json")
    (folder / "ben.json").write_text(json.dumps(faces))
    (folder / "ben.mp4").write_bytes((folder / "ben.mp4").read_bytes()[:600])
    refused(monkeypatch, capsys, words, "ben.mp4")
    (folder / "ada-face.json").write_text(json.dumps(faces | {"frames": []}))
    refused(monkeypatch, capsys, words, "expected a face in")
    assert not (folder / "out.json").exists() and not list(folder.glob(".*"))


def test_bad_evaluations_are_one_line(tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, ["--people", 1], "expected --people between 2 and")
    refused(monkeypatch, capsys, ["--checkpoint-path", tmp_path / "no.safetensors"], "no.safetensors")
    refused(monkeypatch, capsys, ["--head", TINY / "eval_encoder.safetensors"], "head")
