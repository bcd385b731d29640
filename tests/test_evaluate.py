"""Rows are kept, the test set is fixed, tables say what numbers say, own videos are told apart.

Own videos are clips of the world written by PyAV and scored with the bundled recogniser, whose
crops are boxes. Hardware: CPU, seconds. Run: python -m pytest tests/test_evaluate.py
"""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from clips.face import square, template
from clips.video import VideoWriter, to_frames
from common.seeds import seeded
from study import evaluate, scores
from study.evaluate import kept, settings_key, tables, with_person
from toy import world
from toy.head import load_head

ROOT = Path(evaluate.__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny"
SIZE, FRAMES = 128, 9


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python -m study.evaluate words`."""
    status = evaluate.main([str(word) for word in words])
    return status, *capsys.readouterr()


def refused(capsys, words, told: str) -> None:
    status, out, err = run(capsys, *words)
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.startswith("study.")]
    assert status == 2 and out == "" and len(lines) == 1, err
    assert lines[0].startswith("study.evaluate: error: ") and told in lines[0], lines[0]
    assert "; " in lines[0], lines[0]


# ------------------------------------------------------------ the test set


def test_the_test_set_draws_what_draw_references_would_and_tells_the_pose():
    data = evaluate.test_set(4, 2, 64, 5)
    g = seeded(2024)
    person, setting = world.people("test", 4), world.draw_settings(4, g)
    references, _ = world.draw_references(person, setting, g, share=1.0)
    assert torch.equal(data["references"], references)
    alike = world.draw_references(world.look_alikes(person, g), world.draw_settings(4, g), g)[0]
    assert torch.equal(data["alike"], alike)
    assert torch.equal(data["setting"], world.draw_settings(8, g))
    assert torch.equal(data["action"], world.draw_actions(8, g))
    again = world.render(person[data["who"]], data["ref_setting"], data["ref_pose"][:, None])[0]
    assert torch.equal(again[:, :, 0], references[data["who"]])
    assert data["captions"][5] == world.caption(data["setting"][5], int(data["action"][5]), 1)
    assert (data["another"] - references).abs().flatten(1).amax(1).min() > 0.2, "another moment"
    train = evaluate.test_set(4, 2, 64, 5, "train")
    assert train["captions"] == data["captions"], "another split has the same prompts"
    assert (train["references"] - references).abs().flatten(1).amax(1).min() > 0.2, "other people"


def test_with_another_person_the_reference_changes_and_the_prompt_does_not():
    data = evaluate.test_set(3, 2, 64, 5)
    other = with_person(data, (data["who"] + 1) % 3)
    for name in ("ref_setting", "ref_pose"):
        assert torch.equal(other[name], data[name][[2, 3, 4, 5, 0, 1]]), name
    assert torch.equal(other["setting"], data["setting"])
    assert data["who"].tolist() == [0, 0, 1, 1, 2, 2], "the first data were changed"


def test_sides_are_silent_contradict_the_reference_or_show_the_same_moment():
    data = evaluate.test_set(24, 2, 64, 9)
    said = evaluate.silent(data)["captions"]
    assert all(any(a in text for a in world.ACTIONS) for text in said)
    assert not any(name in text for text in said
                   for name in (*world.SCENES, *world.LIGHTS, "shirt"))
    against = evaluate.contradicting(data)
    assert (data["setting"] == data["ref_setting"]).any(dim=0).all(), "each part by chance"
    assert not (against["setting"] == data["ref_setting"]).any()
    for text, setting in zip(against["captions"], against["setting"].tolist(), strict=True):
        tables = world.SCENES, world.LIGHTS, world.SHIRTS
        assert all(list(t)[i] in text for t, i in zip(tables, setting, strict=True)), text
    moment = evaluate.same_moment(data)
    assert torch.equal(moment["references"][3], data["true"][6, :, 0])
    assert torch.equal(moment["ref_setting"][7], data["setting"][6])
    first = {name: moment[name][::2] for name in ("who", "action", "ref_pose")}
    leaks = scores.leaks(data["true"][::2], first | {"references": moment["references"]},
                         load_head(TINY / "head_pose.safetensors"))
    assert min(leaks["position"][0], leaks["pose"][0]) > 0.7 and leaks["pixels"][0] > 0.999, leaks


# ------------------------------------------------------------ rows are kept


def test_a_kept_row_is_not_made_again_and_comes_back_in_8_bits(tmp_path):
    video, calls = torch.rand(2, 3, 3, 8, 8, generator=seeded(1)) * 2 - 1, []
    path = tmp_path / "a" / "row.safetensors"
    first, seconds = kept(path, lambda: calls.append(1) or video)
    second, again = kept(path, lambda: calls.append(1) or video)
    assert len(calls) == 1 and torch.equal(first, second) and seconds == again
    error = (first / 127.5 - 1 - video).abs().max().item()
    assert error <= 0.5 / 127.5 + 1e-6, f"{error} off: half of one of 255 steps"
    assert [p.name for p in path.parent.iterdir()] == ["row.safetensors"], "leftovers"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="row.safetensors.*delete that file"):
        kept(path, lambda: video)
    with pytest.raises(ValueError, match="expected finite pixels in the row b"):
        kept(tmp_path / "b.safetensors", lambda: video / 0)
    assert not (tmp_path / "b.safetensors").exists()


def test_the_folder_of_kept_rows_follows_weights_settings_and_code(tmp_path, monkeypatch):
    code = ("model.py", "ltx/vae.py", "toy/world.py", "study/evaluate.py")
    for name in ("m.safetensors", "gemma/config.json", *code):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(evaluate, "HERE", tmp_path)
    words = ["--checkpoint-path", f"{tmp_path}/m.safetensors", "--gemma-root", f"{tmp_path}/gemma"]

    def key(*more):
        return settings_key(evaluate.parse_arguments([*words, *more]))
    keys = {key()}
    assert key("--output-path", "other.json", "--rows", "swapped") in keys
    settings = ("--people 8", "--seed 1", "--text-scale 4", "--order two_deltas", "--split val",
                "--num-inference-steps 3", "--dtype bfloat16", "--prompts 2", "--ref-scale 1",
                "--rescale 0.5", "--guide-every 2", "--guide-range 0 0.5")
    keys |= {key(*more.split()) for more in settings}
    for name in ("m.safetensors", "gemma/config.json", *code):
        (tmp_path / name).write_text("{} ")
        keys.add(key())
    assert len(keys) == 1 + len(settings) + 2 + len(code)


# ------------------------------------------------------------ the whole evaluation


def test_tables_have_a_row_for_each_kind_of_clips_and_a_column_for_each_score():
    rows = {"own": {"scores": {"top1": (0.5, 0.25), "pose": (0.125, None)}},
            "chance": {"scores": {"top1": (0.25, None)}}}
    assert tables(rows, ("top1", "min_frame"), ("pose",)).split("\n") == [
        "| clips | top1 | min frame |", "|---|---|---|", "| own | 50.0 ± 25.0 % | – |",
        "| chance | 25.0 % | – |", "", "| clips | pose |", "|---|---|", "| own | 0.125 |",
        "| chance | – |"]
    columns = [name for group in evaluate.COLUMNS for name in group]
    assert sorted(columns) == sorted([*scores.SCORES, "frechet", "pose", "position", "pixels"])


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Four people, three steps: the arguments and the folder."""
    folder = tmp_path_factory.mktemp("evaluated")
    words = ["--people", "4", "--num-inference-steps", "3", "--folder", str(folder / "rows"),
             "--output-path", str(folder / "e.json")]
    evaluate.score_world(evaluate.parse_arguments(words))
    return words, folder


def test_an_evaluation_has_true_clips_chance_and_the_rows_between(evaluated):
    _, folder = evaluated
    record = json.loads((folder / "e.json").read_text())
    rows = {name: row["scores"] for name, row in record["rows"].items()}
    assert list(rows) == ["true video", "through the VAE", *evaluate.ROWS, "chance"]
    true, own, chance = (rows[name] for name in ("true video", "own reference", "chance"))
    assert true["top1"] == [1.0, 0.0] and true["action"][0] == true["scene"][0] == 1.0
    assert chance["top1"] == [0.25, None] and chance["action"][0] == 0.125
    assert max(chance["similarity"][0], rows["no reference"]["similarity"][0]) < 0.4
    assert min(own["similarity"][0], rows["swapped"]["similarity"][0]) > 0.5, rows
    each, other = (record["rows"][name]["per_clip"] for name in ("own reference", "swapped"))
    assert abs(sum(each["similarity"]) / 4 - own["similarity"][0]) < 1e-6
    assert each["similarity"] != other["similarity"]
    assert record["arguments"]["text_scale"] == "2.0", "the scales that were used, not None"
    assert str(ROOT) not in json.dumps(record), "paths of this machine stay out"
    with Image.open(folder / "e.png") as sheet:
        assert sheet.size == (4 * 4 * 64 * 2, 64 * 2)


def test_a_second_run_takes_the_clips_from_the_folder(evaluated, monkeypatch, capsys):
    words, folder = evaluated
    before = json.loads((folder / "e.json").read_text())["rows"]
    monkeypatch.setattr(evaluate, "generate", lambda *_: 1 / 0)  # never called
    status, out, _ = run(capsys, *words)
    assert status == 0 and json.loads((folder / "e.json").read_text())["rows"] == before
    status, again, _ = run(capsys, "--tables", folder / "e.json")
    assert status == 0 and "| chance |" in again and out.startswith(again.rstrip("\n"))


def test_bad_evaluations_and_records_are_one_line(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"rows": {}}')
    (tmp_path / "broken.json").write_text("{")
    for words, told in ((["--people", 1], "expected --people between 2 and"),
                        (["--checkpoint-path", tmp_path / "no.safetensors"], "no.safetensors"),
                        (["--output-path", tmp_path / "e.png"], "a file name that ends in .json"),
                        (["--head", TINY / "eval_encoder.safetensors"], "head"),
                        (["--tables", tmp_path / "other.json"], "got one without 'arguments'"),
                        (["--tables", tmp_path / "broken.json"], "expected a JSON object")):
        refused(capsys, words, told)


# ------------------------------------------------------------ own videos


def write_person(folder: Path, name: str, person, marks=False) -> Path:
    """A clip of one person with its faces file, and name-face.png with its own."""
    g = seeded(5, name)
    setting, action = world.draw_settings(1, g), torch.tensor([0])
    video, boxes, _ = world.render(person[None], setting, world.action_poses(action, FRAMES, g),
                                   SIZE)
    with VideoWriter(folder / f"{name}.mp4", 8.0) as writer:
        writer.add(to_frames(video[0]))
    write_faces(folder / f"{name}.json", boxes[0], range(FRAMES), marks)
    picture, box = world.draw_references(person[None], setting, g, SIZE)
    Image.fromarray(to_frames(picture[0][:, None])[0]).save(folder / f"{name}-face.png")
    write_faces(folder / f"{name}-face.json", box, range(1), marks)
    return folder / f"{name}-face.png"


def write_faces(path: Path, boxes, found, marks: bool) -> None:
    corner, opposite = square(boxes)[:, None].split(2, dim=-1)
    points = corner + template(1) * (opposite - corner)  # landmarks that give the box's own crop
    frames = [{"t": k / 8, "box": boxes[k].tolist()}
              | ({"landmarks": points[k].tolist()} if marks else {}) for k in found]
    whole = {"frame_rate": 8, "size": [SIZE, SIZE], "frames": frames}
    path.write_text(json.dumps(whole))


@pytest.fixture
def own(tmp_path):
    """Pictures of two people, the second with landmarks; their videos lie in the same folder."""
    ada, ben = world.people("test", 2)
    return write_person(tmp_path, "ada", ada), write_person(tmp_path, "ben", ben, marks=True)


def scored(capsys, ref: Path, *more) -> dict[str, dict[str, float]]:
    words = ["--videos", ref.parent, "--ref", ref, "--face", TINY / "face.safetensors"]
    status, _, err = run(capsys, *words, "--output-path", ref.parent / "out.json", *more)
    assert status == 0, err
    rows = json.loads((ref.parent / "out.json").read_text())["rows"]
    return {name: {k: v[0] for k, v in row["scores"].items()} for name, row in rows.items()}


def test_the_own_video_is_more_similar_than_the_others_for_both_pictures(own, capsys):
    for ref, mine, other in ((own[0], "ada.mp4", "ben.mp4"), (own[1], "ben.mp4", "ada.mp4")):
        found = scored(capsys, ref)
        assert found[mine]["similarity"] > 0.7 and found[other]["similarity"] < 0.4, found
        mean = (found[mine]["similarity"] + found[other]["similarity"]) / 2
        assert found["mean"]["similarity"] == pytest.approx(mean)
        assert found[mine]["flicker"] < 0.01, "the scene stands still; what is left is the codec's"


def test_the_picture_is_read_like_any_reference_whatever_its_name_ends_in(own, capsys):
    hidden = Image.open(own[0]).convert("RGBA")
    hidden.putalpha(0)  # white for whoever reads pictures, Ada's face for a reader of videos
    hidden.save(own[0].with_suffix(""), "PNG")
    assert scored(capsys, own[0].with_suffix(""))["ada.mp4"]["similarity"] < 0.4


def test_a_faces_file_is_found_whoever_composed_the_letters_of_its_name(own, capsys):
    folder = own[0].parent
    for name, other in (("ben.mp4", "b\u00e9n.mp4"), ("ben.json", "be\u0301n.json")):
        (folder / name).rename(folder / other)
    assert set(scored(capsys, own[0])) == {"ada.mp4", "b\u00e9n.mp4", "mean"}


def test_a_frame_without_a_face_counts_0(own, capsys):
    whole, folder = scored(capsys, own[0])["ada.mp4"], own[0].parent / "faces"
    folder.mkdir()
    for path in folder.parent.glob("*.json"):
        path.rename(folder / path.name)
    faces = json.loads((folder / "ada.json").read_text())
    (folder / "ada.json").write_text(json.dumps(faces | {"frames": faces["frames"][:6]}))
    cut = scored(capsys, own[0], "--faces-folder", folder)["ada.mp4"]
    assert cut["found"] == pytest.approx(6 / 9) and cut["min_frame"] == 0
    assert 0.5 * whole["similarity"] < cut["similarity"] < 0.8 * whole["similarity"]
    assert cut["drift"] > whole["drift"] + 0.3, "the face is lost in the second half"


def test_landmarks_are_compared_with_landmarks_and_boxes_with_boxes():
    vectors, reference = torch.full((2, 3, 2), math.nan), torch.eye(2)  # box e0, landmarks e1
    vectors[0, :2] = torch.tensor([0.5, 0.0])
    vectors[1, 0] = torch.tensor([0.0, 0.9])
    mean, low, _, found, *_ = evaluate.own_scores(vectors, 0.0, reference)
    assert mean == pytest.approx((0.9 + 0.5 + 0) / 3) and low == 0
    assert found == pytest.approx(2 / 3)


@pytest.mark.parametrize("frames", [5, 16, 40])
def test_facesim_is_consisids_mean_over_16_frames_and_says_how_many_it_skips(frames):
    g = seeded(3, str(frames))
    cosine = torch.rand(frames, generator=g) * 2 - 1
    cosine[::3] = math.nan                                             # no face
    vectors = torch.stack([cosine, cosine * math.nan])[..., None]      # (2, F, 1), by box alone
    *_, facesim, skipped = evaluate.own_scores(vectors, 0.0, torch.ones(2, 1))
    picked = [cosine[int(i * (frames - 1) / 15)].item() for i in range(16)]
    kept_ = [max(0.0, value) for value in picked if not math.isnan(value)]
    assert 0 < len(kept_) < 16 and skipped == 16 - len(kept_)
    assert facesim == pytest.approx(sum(kept_) / len(kept_))
    *_, facesim, skipped = evaluate.own_scores(vectors * math.nan, 0.0, torch.ones(2, 1))
    assert (facesim, skipped) == (0.0, 16)


def test_a_benchmarks_videos_are_each_scored_against_their_own_picture(own, capsys):
    folder = own[0].parent
    (folder / "out").mkdir()
    (folder / "faces").mkdir()
    for number, name in ((1, "ben"), (2, "ada")):
        (folder / f"{name}.mp4").rename(folder / "out" / f"{number}.mp4")
        (folder / f"{name}.json").rename(folder / "faces" / f"{number}.json")
    faces = json.loads((folder / "faces" / "2.json").read_text())
    shown = json.dumps(faces | {"frames": faces["frames"][:6]})        # of 9
    (folder / "faces" / "2.json").write_text(shown)
    rows = [{"img": f"{name}-face.png", "prompt": "x"} for name in ("ben", "ada")]
    (folder / "eval.json").write_text(json.dumps(rows))
    words = ["--videos", folder / "out", "--batch", folder / "eval.json", "--faces-folder",
             folder / "faces", "--face", TINY / "face.safetensors", "--output-path",
             folder / "scores.json"]
    status, out, err = run(capsys, *words)
    assert status == 0, err
    record = json.loads((folder / "scores.json").read_text())
    found = {name: row["scores"] for name, row in record["rows"].items()}
    assert min(found["1.mp4"]["facesim"][0], found["2.mp4"]["facesim"][0]) > 0.7, found
    assert found["1.mp4"]["skipped"][0] == 0
    skipped = sum(int(i * 8 / 15) >= 6 for i in range(16))             # frames 6, 7, 8 of 0..8
    assert found["2.mp4"]["skipped"][0] == skipped == record["frames_skipped"] > 0
    assert f"facesim skips {skipped} of 32 frames" in out
    (folder / "out" / "2.mp4").unlink()
    refused(capsys, words, "expected 2 videos")
    refused(capsys, [*words, "--ref", own[0]], "one of --ref and --batch")


def test_flicker_is_the_change_at_the_border_in_brightness_from_0_to_1(tmp_path):
    frames = torch.full((FRAMES, SIZE, SIZE, 3), 100, dtype=torch.uint8)
    frames[1::2] = 125
    frames[::3, 20:100, 20:100] = 200  # inside and at the bottom anything may move
    frames[::2, 100:] = 30
    with VideoWriter(tmp_path / "v.mp4", 8.0) as writer:
        writer.add(frames.numpy())
    write_faces(tmp_path / "v.json", torch.zeros(0, 4), range(0), False)
    net = evaluate.load_facenet(TINY / "face.safetensors")
    faces = evaluate.load_faces(tmp_path / "v.json")
    vectors, flicker = evaluate.read_own(tmp_path / "v.mp4", faces, net)
    assert abs(flicker - 25 / 255) < 2 / 255, flicker  # the codec errs by a level or two
    assert vectors.shape == (2, FRAMES, 128) and vectors.isnan().all()


def test_bad_own_videos_are_one_line_and_nothing_is_written(own, capsys):
    folder, ref = own[0].parent, own[0]
    (folder / "empty").mkdir()

    def refuse(told, **changed):
        flags = {"videos": folder, "ref": ref, "face": TINY / "face.safetensors",
                 "output-path": folder / "out.json"} | changed
        refused(capsys, [w for k, v in flags.items() if v for w in (f"--{k}", v)], told)
    refuse("--face and one of --ref and --batch", face=None)
    refuse("a file name that ends in .json", **{"output-path": folder / "out.csv"})
    refuse("nowhere", videos=folder / "nowhere")
    refuse("got 0 videos", videos=folder / "empty")
    refuse("ada-face.png", face=ref)
    faces = json.loads((folder / "ben.json").read_text())
    (folder / "ben.json").write_text(json.dumps(faces | {"size": [64, 128]}))
    refuse("128x128")
    (folder / "ben.json").write_text(json.dumps(faces))
    (folder / "ada-face.json").write_text(json.dumps(faces | {"frames": []}))
    refuse("expected a face in")
    (folder / "ben.mp4").rename(folder / "ada.mkv")
    refuse("2 videos, 2 names")
    assert not (folder / "out.json").exists() and not list(folder.glob(".*"))
