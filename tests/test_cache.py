"""A stale latent is never used, a damaged one is made anew, and many workers may fill one folder.

Latents and contexts are compared exactly, except where the tiny VAE or text encoder runs twice
(1e-5: other order of summation). Hardware: CPU, seconds. Run: python -m pytest tests/test_cache.py
"""

import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from clipfiles import SMALL, WIDE, manifest, write
from torch import nn

from clips import cache
from clips.cache import cache_contexts, cache_latents, check_once, content_hash, text_key
from clips.frames import Bucket, Unusable, load_clip
from clips.manifest import check, read_manifest
from ltx.checkpoint import open_file, write_file
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, TextEncoder
from ltx.vae import VideoVAE


class Mean(nn.Module):
    """Stands in for the VAE: the mean colour of each cell, and a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.calls = 0

    def encode(self, video):
        self.calls += 1
        return nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8)) * self.scale


@pytest.fixture
def rows(tmp_path):
    for k, (name, size) in enumerate((("a", (48, 72)), ("b", (48, 72)), ("c", (72, 48)))):
        write(tmp_path / f"{name}.mp4", count=12, first=k, size=size)
    listed = ({"video": f"{name}.mp4", "caption": name} for name in "abc")
    return check(manifest(tmp_path, *listed), SMALL).used


def count_new(rows, vae, folder) -> int:
    before = vae.calls
    cache_latents(rows, vae, vae.encode, folder)
    return vae.calls - before


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("[!.]*.safetensors"))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_cached_latents_are_the_direct_ones_and_are_computed_once(tmp_path, rows):
    vae, folder = Mean(), tmp_path / "cache"
    latents = cache_latents(rows, vae, vae.encode, folder)
    assert len(latents) == vae.calls == len(files(folder)) == 3 and not leftovers(folder)
    for i, row in enumerate(rows):
        direct = vae.encode(load_clip(row.video, row.bucket)[None])[0].detach()
        assert torch.equal(latents[i], direct) and not latents[i].requires_grad
    assert count_new(rows, vae, folder) == 0
    assert {str(b): group for b, group in latents.groups.items()} == {
        "32x48x9": [0, 1], "48x32x9": [2]}


def test_any_change_of_content_settings_or_weights_makes_a_new_latent(tmp_path, rows, monkeypatch):
    vae, folder = Mean(), tmp_path / "cache"
    assert count_new(rows, vae, folder) == 3
    write(tmp_path / "a.mp4", count=12, first=3)
    assert count_new(rows, vae, folder) == 1, "other content under the same name"
    os.utime(tmp_path / "b.mp4", ns=(1, 1))
    (tmp_path / "c.mp4").rename(tmp_path / "d.mp4")
    moved = [rows[0], rows[1], replace(rows[2], video=tmp_path / "d.mp4")]
    assert count_new(moved, vae, folder) == 0, "a new date or name is no new content"
    for change in ({"start": 1 / 24}, {"frame_rate": 30.0}, {"bucket": Bucket(40, 48, 9)},
                   {"bucket": Bucket(32, 48, 5)}):
        assert count_new([replace(rows[0], **change)], vae, folder) == 1, change
    with torch.no_grad():
        vae.scale += 1e-6
    assert count_new([rows[0]], vae, folder) == 1, "other weights"
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    assert count_new([rows[0]], vae, folder) == 1, "another way of decoding"


def test_other_content_of_the_same_size_is_seen_by_its_date(tmp_path):
    path, known = tmp_path / "file", {}
    path.write_bytes(b"one")
    first = content_hash(path, known)
    path.write_bytes(b"two")
    os.utime(path, ns=(5, 5))
    assert content_hash(path, known) != first


def test_the_hash_of_weights_is_of_the_header_and_the_ends_and_middle_of_each_tensor(tmp_path):
    """Elsewhere a number may change unseen: that is what 46 GB in seconds cost."""
    path, tensors = tmp_path / "a.safetensors", {"a": torch.zeros(3), "b": torch.zeros(50_000)}

    def found(at: int | None = None, header: str = "") -> str:
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        if at is not None:
            changed["b"][at] = 1
        write_file(path, changed, {"header": header})
        return content_hash(path, {})

    first = found()
    others = {found(0), found(25_000), found(49_999), found(header="x")}
    assert len(others) == 4 and first not in others and found(10_000) == first
    elsewhere = tmp_path / "folder" / "link"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to(path)
    assert content_hash(elsewhere, {}) == first, "a link of another name"
    plain = tmp_path / "plain.mp4"
    plain.write_bytes(bytes(50_000))
    before = content_hash(plain, {})
    plain.write_bytes(bytes(20_000) + b"1" + bytes(29_999))
    assert content_hash(plain, {}) != before, "of any other file all bytes count"


def test_references_and_faces_are_hashed_once_for_all_workers(tmp_path, rows):
    reference, vae = tmp_path / "face.png", Mean()
    reference.write_bytes(b"a picture")
    rows = [replace(row, reference=reference) for row in rows]
    known = cache_latents(rows, vae, vae.encode, tmp_path / "cache").known
    assert content_hash(reference, dict(known)) in known.values()
    assert any("face.png" in stamp for stamp in known), "and so it is remembered"


def test_a_damaged_cache_file_is_computed_again(tmp_path, rows):
    vae, folder = Mean(), tmp_path / "cache"
    latents = cache_latents(rows, vae, vae.encode, folder)
    good, data = latents[0].clone(), latents.paths[0].read_bytes()
    other = latents.paths[1].read_bytes()
    flipped = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]
    for damage in (data[:-5], flipped, b"", b"{}", other):
        latents.paths[0].write_bytes(damage)
        (folder / "hashes-0.json").write_text("{")
        assert count_new(rows, vae, folder) == 1 and torch.equal(latents[0], good)


def test_numbers_that_are_not_finite_are_never_kept(tmp_path, rows):
    with pytest.raises(ValueError, match=r"^expected finite .*row 1 \(a.mp4\), got NaN .*; "):
        cache_latents(rows, Mean(), lambda video: torch.full((1, 3, 3, 4, 6), torch.nan), tmp_path)
    assert not files(tmp_path)


def test_a_clip_that_changes_after_the_check_is_named_by_its_row(tmp_path, rows, monkeypatch):
    def slow(path, *arguments):
        clip = load_clip(path, *arguments)
        if path.name == "b.mp4":
            write(path, count=3)
        return clip

    vae, folder = Mean(), tmp_path / "cache"
    monkeypatch.setattr(cache, "load_clip", slow)
    with pytest.raises(Unusable, match="^changed: row 2, b.mp4 while it was read; check the man"):
        cache_latents(rows, vae, vae.encode, folder)
    assert len(files(folder)) == 1 and not leftovers(folder)
    told = "^too short: row 2, b.mp4: 3 of 9 frames; check the manifest again$"
    with pytest.raises(Unusable, match=told):
        cache_latents(rows, vae, vae.encode, folder)


def test_contexts_are_computed_once_for_each_caption_and_encoder(tmp_path):
    asked = []

    def encode(captions):
        asked.extend(captions)
        return torch.full((1, 4, 2), float(len(captions[0])))

    for captions, key in ((["a", "bb", "a"], "one"), (["bb", "ccc"], "one"), (["a"], "two")):
        contexts = cache_contexts(captions, encode, tmp_path, key)
        assert all(contexts[c]().eq(len(c)).all() for c in captions)
    assert asked == ["a", "bb", "ccc", "a"]


# ------------------------------------------------------------ many workers


def together(count: int, work) -> list:
    """work(rank, wait) in `count` threads at once; what each returned or raised."""
    barrier = threading.Barrier(count, timeout=5)

    def one(rank):
        try:
            return work(rank, barrier.wait)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("world", [2, 5])
def test_each_worker_makes_its_share_and_all_list_all(tmp_path, rows, world):
    vaes, asked = [Mean() for _ in range(world)], [[] for _ in range(world)]
    alone = cache_latents(rows, Mean(), Mean().encode, tmp_path / "alone")
    folder = tmp_path / "cache"

    def contexts(rank, wait):
        def encode(captions):
            asked[rank] += captions
            return torch.full((1, 4, 2), float(len(captions[0])))
        captions = ["a", "bb", "a", "", "dddd"]
        return cache_contexts(captions, encode, folder, "one", rank, world, wait)

    for latents in together(world, lambda rank, wait: cache_latents(
            rows, vaes[rank], vaes[rank].encode, folder, rank, world, wait)):
        assert [path.name for path in latents.paths] == [path.name for path in alone.paths]
        assert all(torch.equal(latents[i], alone[i]) for i in range(3))
    assert [vae.calls for vae in vaes] == [len(rows[rank::world]) for rank in range(world)]
    lists = [f"hashes-{rank}.json" for rank in range(min(world, 3))]
    assert sorted(path.name for path in folder.glob("*.json")) == lists
    for read in together(world, contexts):
        means = {caption: context().mean().item() for caption, context in read.items()}
        assert means == {"a": 1, "bb": 2, "": 0, "dddd": 4}
    assert asked == [["a", "bb", "", "dddd"][rank::world] for rank in range(world)]


def test_what_was_checked_before_and_has_not_changed_is_not_decoded_again(
        tmp_path, rows, monkeypatch):
    decoded, folder, probe = [], tmp_path / "cache", cache.probe
    monkeypatch.setattr(cache, "probe", lambda path: decoded.append(path.name) or probe(path))
    (tmp_path / "d.mp4").write_text("no video")
    listed = ({"video": f"{name}.mp4", "caption": "x"} for name in "abcd")
    listed = read_manifest(manifest(tmp_path, *listed))
    for report in together(2, lambda *worker: check_once(
            listed, SMALL, 24.0, folder, worker[0], 2, worker[1])):
        assert [row.found for row in report.used] == [row.found for row in rows]
        assert [row.number for row in report.refused] == [4]
    assert sorted(decoded) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    write(tmp_path / "b.mp4", count=3)
    report = check_once(listed, SMALL, 24.0, folder)
    assert decoded[4:] == ["b.mp4"] and len(report.used[1].found.times) == 3
    monkeypatch.setattr(cache, "FORMAT", 0)  # decoding has changed
    check_once(listed, SMALL, 24.0, folder)
    assert len(decoded) == 9


def test_clips_with_hdr_colours_are_counted_in_a_warning_also_from_memory(tmp_path):
    for name, transfer in (("a", 1), ("b", 16), ("c", 18)):
        write(tmp_path / f"{name}.mp4", count=9, transfer=transfer, primaries=1)
    listed = ({"video": f"{name}.mp4", "caption": "x"} for name in "abc")
    listed = read_manifest(manifest(tmp_path, *listed))
    for _ in range(2):
        summary, warning = check_once(listed, SMALL, 24.0, tmp_path / "cache").lines()
        assert summary.startswith("3 of 3 rows are used")
        assert warning.startswith("warning: HDR or wide colours in 2 of these clips, first in row")
    assert len(check_once(listed[:1], SMALL, 24.0, tmp_path / "cache").lines()) == 1


def test_one_workers_bad_clip_stops_all_of_them_and_leaves_nobody_waiting(tmp_path, rows):
    write(tmp_path / "b.mp4", count=3)
    vae = Mean()
    good, bad = together(2, lambda rank, wait: cache_latents(
        rows, vae, vae.encode, tmp_path / "cache", rank, 2, wait))
    assert isinstance(bad, Unusable) and str(bad).startswith("too short: row 2, b.mp4")
    assert "from worker 1, got no file" in str(good) and vae.calls == 2


# ------------------------------------------------------------ disks and stops


def test_a_full_disk_is_one_line_unless_all_is_there_and_whole_files_stay(
        tmp_path, rows, monkeypatch):
    def refuse(path, data):
        raise OSError(28, "No space left on device")

    vae, folder = Mean(), tmp_path / "cache"
    cache_latents(rows[:2], vae, vae.encode, folder)
    (folder / "hashes-0.json").unlink()
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", refuse)
        assert count_new(rows[:2], vae, folder) == 0
        told = "^expected to be able to write in [^\n]*, got No space left on device; make room"
        with pytest.raises(ValueError, match=told):
            cache_latents(rows, vae, vae.encode, folder)
    assert len(files(folder)) == 2 and not leftovers(folder) and count_new(rows, vae, folder) == 1


def test_what_a_killed_process_left_is_removed_after_an_hour_and_nothing_else(tmp_path, rows):
    names = [".a.0123456789abcdef.tmp.safetensors", ".b.0123456789abcdef.tmp.safetensors", ".mine"]
    for name, age in zip(names, (4000, 3000, 9999), strict=True):
        (tmp_path / name).write_bytes(b"x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache_latents(rows, Mean(), Mean().encode, tmp_path)
    assert sorted(leftovers(tmp_path)) == names[1:]


# ------------------------------------------------------------ the text encoder's key, the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint and Gemma folder; tests that change them make a copy."""
    return tiny.write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(tmp_path, model):
    """Arguments for 4 clips and 2 captions; with the null prompt that makes 3 contexts."""
    for k in range(4):
        write(tmp_path / f"{k}.mp4", count=9, first=k)
    rows = [{"video": f"{k}.mp4", "caption": f"red {k % 2}"} for k in range(4)]
    return [str(manifest(tmp_path, *rows)), "--checkpoint-path", str(model / "model.safetensors"),
            "--gemma-root", str(model / "gemma"), "--folder", str(tmp_path / "cache"),
            "--device", "cpu", "--buckets", "32x48x9"]


def rewrite(path: Path, change) -> None:
    """A safetensors file with change(tensors, settings) done to it."""
    with open_file(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = dict(file.metadata() or {})
    settings = json.loads(metadata.get("config", "{}"))
    change(tensors, settings)
    write_file(path, tensors, metadata | {"config": json.dumps(settings)})


def nudge(prefix: str):
    def change(tensors, settings):
        for name in tensors:
            if name.startswith(prefix):
                tensors[name].view(-1)[:1].add_(1)
    return change


CHANGES = [  # file, what is done to it, whether contexts depend on it
    ("gemma/config.json", None, True), ("gemma/tokenizer.json", None, True),
    ("gemma/model.safetensors", nudge(""), True),
    ("model.safetensors", nudge(EXTRACTOR_PREFIX), True),
    ("model.safetensors", nudge(CONNECTOR_PREFIX), True),
    ("model.safetensors", lambda x, s: s["transformer"].update(text_max_length=64), True),
    ("model.safetensors", nudge("vae."), False),
    ("model.safetensors", nudge("model.diffusion_model.transformer_blocks."), False),
    ("model.safetensors", lambda x, s: s["vae"].update(more=1), False)]


def test_the_text_key_changes_with_all_that_a_context_depends_on_and_nothing_else(tmp_path, model):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    checkpoint, gemma = folder / "model.safetensors", folder / "gemma"
    first = text_key(checkpoint, gemma, tmp_path / "cache")
    keys = {first}
    for number, (name, change, matters) in enumerate(CHANGES):
        before = (folder / name).read_bytes()
        if change:
            rewrite(folder / name, change)
        else:
            (folder / name).write_bytes(before + b"\n")
        key = text_key(checkpoint, gemma, tmp_path / "cache")
        assert (key not in keys) if matters else (key == first), CHANGES[number]
        keys.add(key)
        (folder / name).write_bytes(before)
    assert text_key(checkpoint, gemma, tmp_path / "cache", dtype=torch.bfloat16) not in keys
    folder.rename(tmp_path / "moved")
    gemma = tmp_path / "moved" / "gemma"
    assert text_key(tmp_path / "moved" / "model.safetensors", gemma, tmp_path / "cache") == first


def test_the_text_files_are_read_once_and_by_one_worker(tmp_path, model, monkeypatch):
    opened = []
    monkeypatch.setattr(cache, "open_file", lambda path: opened.append(path) or open_file(path))
    checkpoint, gemma = model / "model.safetensors", tmp_path / "gemma"
    shutil.copytree(model / "gemma", gemma)
    keys = together(3, lambda rank, wait: text_key(checkpoint, gemma, tmp_path, rank, wait))
    assert opened == [checkpoint] and [path.name for path in tmp_path.glob("*.json")] == [
        "hashes-0.json"]
    assert set(keys) == {text_key(checkpoint, gemma, tmp_path)} and len(opened) == 1
    (gemma / "tokenizer.json").unlink()
    told = together(2, lambda rank, wait: text_key(checkpoint, gemma, tmp_path, rank, wait))
    assert [str(error)[:35] for error in told] == ["expected config.json, tokenizer.jso"] * 2


def test_the_command_makes_everything_once_and_says_so(
        command, tmp_path, model, monkeypatch, capsys):
    folder = tmp_path / "cache"
    assert cache.main(command) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines() == [
        "4 of 4 rows are used; buckets: 32x48x9 4",
        f"latents: 0 were there, 4 made, in {folder}",
        f"contexts: 0 were there, 3 made, in {folder}"]
    key = text_key(model / "model.safetensors", model / "gemma", folder)
    contexts = cache_contexts(["", "red 1"], None, folder, key)
    encoder = TextEncoder.load(model / "model.safetensors", model / "gemma", dtype=torch.float32)
    vae = VideoVAE.load(model / "model.safetensors", dtype=torch.float32)
    path = tmp_path / "manifest.jsonl"
    latents = cache_latents(check(path, SMALL).used, vae, None, folder)
    with torch.no_grad():
        latent = vae.encode(load_clip(tmp_path / "0.mp4", WIDE)[None])[0]
        errors = [(contexts[c]() - encoder.encode([c])[0]).abs().max() for c in contexts]
        errors.append((latents[0] - latent).abs().max())
    assert max(errors) < 1e-5 and contexts[""]().dtype == torch.float32, errors
    monkeypatch.setattr(TextEncoder, "load", lambda *a, **k: pytest.fail("it was loaded"))
    path.write_text(path.read_text() + '{"video": "none.mp4", "caption": "red"}\n')
    assert cache.main(command) == 1
    broken, summary, *counts = capsys.readouterr().out.splitlines()
    assert broken.startswith("row 5: missing file: ") and summary.startswith("4 of 5 ")
    assert counts == [f"latents: 4 were there, 0 made, in {folder}",
                      f"contexts: 3 were there, 0 made, in {folder}"]


def test_what_cannot_work_ends_with_2_and_one_line_before_anything_is_made(
        command, tmp_path, capsys):
    for flag, value, words in (
            ("--frame-rate", "-1", "expected a frame rate above 0"),
            ("--device", "abacus", "expected a device"),
            ("--gemma-root", str(tmp_path), "config.json"),
            ("--folder", __file__, "expected to be able to write in")):
        assert cache.main([*command, flag, value]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("clips.cache: error: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "cache").exists()
