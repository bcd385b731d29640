"""A stale latent is never used, a damaged one is made anew, and many workers may fill one folder.

Latents and contexts are compared exactly, except where the tiny VAE runs twice (1e-5: other order of summation).
Hardware: CPU, some seconds. Run: python -m pytest tests/test_cache.py
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from clipfiles import SMALL, WIDE, manifest, write
from torch import nn

from clips import cache
from clips.cache import cache_contexts, cache_latents, content_hash, text_key
from clips.frames import Bucket, Unusable, load_clip
from clips.manifest import check
from ltx.checkpoint import open_file, write_file
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, TextEncoder


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
    return check(manifest(tmp_path, *({"video": f"{n}.mp4", "caption": n} for n in "abc")), SMALL).used


def count_new(rows, vae, folder) -> int:
    before = vae.calls
    cache_latents(rows, vae, vae.encode, folder)
    return vae.calls - before


def test_cached_latents_are_the_direct_ones_and_are_computed_once(tmp_path, rows):
    vae, folder = Mean(), tmp_path / "cache"
    latents = cache_latents(rows, vae, vae.encode, folder)
    assert len(latents) == 3 and vae.calls == 3
    for i, row in enumerate(rows):
        direct = vae.encode(load_clip(row.video, row.bucket)[None])[0].detach()
        assert torch.equal(latents[i], direct) and not latents[i].requires_grad
    assert count_new(rows, vae, folder) == 0
    assert {str(b): group for b, group in latents.groups.items()} == {"32x48x9": [0, 1], "48x32x9": [2]}


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


def test_a_change_in_the_middle_of_a_large_file_is_seen_when_its_date_changes(tmp_path):
    path, known = tmp_path / "large", {}
    data = bytearray(3 << 20)
    path.write_bytes(data)
    first = content_hash(path, known)
    data[len(data) // 2] = 1
    path.write_bytes(data)
    os.utime(path, ns=(5, 5))
    assert content_hash(path, known) != first


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other", "text"])
def test_a_damaged_cache_file_is_computed_again(tmp_path, rows, damage):
    vae, folder = Mean(), tmp_path / "cache"
    latents = cache_latents(rows, vae, vae.encode, folder)
    good, data = latents[0].clone(), latents.paths[0].read_bytes()
    bad = {"cut": data[:-5], "flipped": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:], "empty": b"", "text": b"{}",
           "other": latents.paths[1].read_bytes()}[damage]
    latents.paths[0].write_bytes(bad)
    (folder / "hashes-0.json").write_text("{")
    assert count_new(rows, vae, folder) == 1
    assert torch.equal(latents[0], good)


def test_an_interrupted_caching_goes_on_where_it_stopped(tmp_path, rows):
    vae, folder = Mean(), tmp_path / "cache"

    def dies(video):
        if vae.calls == 2:
            raise KeyboardInterrupt
        return vae.encode(video)

    with pytest.raises(KeyboardInterrupt):
        cache_latents(rows, vae, dies, folder)
    assert len(list(folder.glob("*.safetensors"))) == 2 and not list(folder.glob("*.partial"))
    assert count_new(rows, vae, folder) == 1


def test_a_clip_that_changed_since_the_check_is_named_by_its_row(tmp_path, rows):
    write(tmp_path / "b.mp4", count=3)
    vae = Mean()
    with pytest.raises(Unusable, match="^too short: row 2, b.mp4: 3 of 9 frames; check the manifest again$"):
        cache_latents(rows, vae, vae.encode, tmp_path / "cache")


def test_a_clip_that_is_replaced_while_it_is_read_gives_no_latent(tmp_path, rows, monkeypatch):
    def slow(path, *arguments):
        clip = load_clip(path, *arguments)
        if path.name == "b.mp4":
            write(path, count=13)
        return clip

    monkeypatch.setattr(cache, "load_clip", slow)
    vae = Mean()
    with pytest.raises(Unusable, match="^changed: row 2, b.mp4 while it was read; check the manifest again$"):
        cache_latents(rows, vae, vae.encode, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1


def test_contexts_are_computed_once_for_each_caption_and_encoder(tmp_path):
    asked = []

    def encode(captions):
        asked.extend(captions)
        return torch.full((len(captions), 4, 2), float(len(captions[0])))

    contexts = cache_contexts(["a", "bb", "a"], encode, tmp_path, "one")
    assert asked == ["a", "bb"] and torch.equal(contexts["bb"](), torch.full((4, 2), 2.0))
    cache_contexts(["bb", "ccc"], encode, tmp_path, "one")
    assert asked == ["a", "bb", "ccc"]
    cache_contexts(["a"], encode, tmp_path, "two")
    assert asked == ["a", "bb", "ccc", "a"]


def test_a_complete_cache_of_contexts_never_calls_the_encoder(tmp_path):
    cache_contexts(["a", ""], lambda captions: torch.ones(1, 4, 2), tmp_path, "one")
    contexts = cache_contexts(["", "a", ""], lambda captions: pytest.fail("called"), tmp_path, "one")
    assert list(contexts) == ["", "a"] and torch.equal(contexts[""](), torch.ones(4, 2))


# ------------------------------------------------------------ many workers


def together(count: int, work) -> list:
    """work(rank, wait) in `count` threads at once; wait is a barrier of all of them. What each returned or raised."""
    barrier = threading.Barrier(count, timeout=10)

    def one(rank):
        try:
            return work(rank, barrier.wait)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize("world", [2, 5])
def test_each_worker_makes_its_share_and_all_list_all(tmp_path, rows, world):
    vaes, folder = [Mean() for _ in range(world)], tmp_path / "cache"
    alone = cache_latents(rows, Mean(), Mean().encode, tmp_path / "alone")
    found = together(world, lambda rank, wait: cache_latents(rows, vaes[rank], vaes[rank].encode, folder, rank, world,
                                                             wait))
    assert [vae.calls for vae in vaes] == [len(rows[rank::world]) for rank in range(world)]
    for latents in found:
        assert len(latents) == 3 and all(torch.equal(latents[i], alone[i]) for i in range(3))
        assert [path.name for path in latents.paths] == [path.name for path in alone.paths]
    assert count_new(rows, Mean(), folder) == 0
    asked = [[] for _ in range(world)]

    def contexts(rank, wait):
        def encode(captions):
            asked[rank] += captions
            return torch.full((1, 4, 2), float(len(captions[0])))
        return cache_contexts(["a", "bb", "a", "", "dddd"], encode, folder, "one", rank, world, wait)

    for read in together(world, contexts):
        means = {caption: context().mean().item() for caption, context in read.items()}
        assert means == {"a": 1, "bb": 2, "": 0, "dddd": 4}
    assert asked == [["a", "bb", "", "dddd"][rank::world] for rank in range(world)]


def test_no_two_workers_write_one_list_of_hashes_and_each_file_is_hashed_once(tmp_path, rows, monkeypatch):
    hashed, written, digest, write = [], [], hashlib.file_digest, cache._write_beside
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(file.name) or digest(file, kind))
    monkeypatch.setattr(cache, "_write_beside", lambda path, data: written.append(path.name) or write(path, data))
    vaes, folder = [Mean(), Mean()], tmp_path / "cache"
    for _ in range(2):
        together(2, lambda rank, wait: cache_latents(rows, vaes[rank], vaes[rank].encode, folder, rank, 2, wait))
        lists = sorted(name for name in written if name.endswith(".json"))
        assert sorted(hashed) == sorted(str(row.video) for row in rows) and lists == ["hashes-0.json", "hashes-1.json"]


def test_only_the_first_worker_draws_a_progress_bar(tmp_path, rows, monkeypatch):
    shown = []
    monkeypatch.setattr(cache, "tqdm", lambda items, disable, **rest: shown.append(disable) or items)
    for rank in (0, 1):
        cache_latents(rows[:1], Mean(), Mean().encode, tmp_path, rank, 2)
        cache_contexts(["a"], lambda captions: torch.ones(1, 4, 2), tmp_path, "one", rank, 2)
    assert shown == [None, None, True, True]


def test_one_workers_bad_clip_stops_all_of_them_and_leaves_nobody_waiting(tmp_path, rows):
    write(tmp_path / "b.mp4", count=3)
    vae = Mean()
    good, bad = together(2, lambda rank, wait: cache_latents(rows, vae, vae.encode, tmp_path / "cache", rank, 2, wait))
    assert isinstance(bad, Unusable) and str(bad).startswith("too short: row 2, b.mp4")
    assert str(good).startswith("expected ") and "from worker 1, got no file" in str(good) and vae.calls == 2


def test_a_file_that_several_write_at_once_is_whole_at_every_moment(tmp_path):
    path, x, stop, seen = tmp_path / "x.safetensors", torch.arange(50_000.0), threading.Event(), []

    def work(rank, wait):
        while rank == 0 and not stop.is_set():
            if path.exists():
                seen.append(cache._is_whole(path, "key"))
        try:
            for _ in range(20 * min(rank, 1)):
                cache._save(path, "key", x)
        finally:
            stop.set()  # the first that is done, or fails

    errors = [error for error in together(5, work) if error is not None]
    assert not errors and len(seen) > 5 and all(seen), (errors, len(seen))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def run(arguments: list[str], seconds: float, told: Path) -> None:
    """The command, `seconds` slower at each clip; what it prints goes to a file."""
    def slow(*arguments):
        time.sleep(seconds)
        return load_clip(*arguments)

    cache.load_clip, sys.argv = slow, ["clips.cache", *arguments]
    sys.stdout = sys.stderr = told.open("w")
    status = cache.main()
    sys.stdout.flush()
    os._exit(status)


def start(arguments: list[str], seconds: float, told: Path) -> multiprocessing.Process:
    """The command in a process of its own (a copy of this one: it need not load torch again)."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    process = multiprocessing.get_context("fork").Process(target=run, args=(arguments, seconds, told))
    process.start()
    return process


def test_two_processes_fill_one_folder_and_neither_damages_a_file(command, tmp_path):
    processes = [start(command, 0.02, tmp_path / f"{n}.txt") for n in range(2)]
    for n, process in enumerate(processes):
        process.join(40)
        assert process.exitcode == 0, (tmp_path / f"{n}.txt").read_text()
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 8 + 5 and all(cache._is_whole(path, path.stem) for path in files)
    assert not list((tmp_path / "cache").glob("*.partial"))


# ------------------------------------------------------------ disks and signals


@contextmanager
def largest_file(size: int):
    """Inside, no file may grow beyond `size` bytes: writing fails in the middle, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_whole_and_nothing_half_written(tmp_path, rows):
    vae, folder = Mean(), tmp_path / "cache"
    cache_latents(rows[:1], vae, vae.encode, folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    with largest_file(600), pytest.raises(ValueError, match="^expected to be able to write in .*, got .*; ") as told:
        cache_latents(rows, vae, vae.encode, folder)
    assert "\n" not in str(told.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("hashes-")} == before
    assert count_new(rows, vae, folder) == 2


def test_a_folder_that_cannot_be_written_is_one_line_unless_it_holds_everything(tmp_path, rows, monkeypatch):
    vae = Mean()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^expected to be able to write in .*file, got (File exists|Not a dir.*); "):
        cache_latents(rows, vae, vae.encode, tmp_path / "file")
    cache_latents(rows, vae, vae.encode, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("hashes-*"):
        path.unlink()

    def refuse(path, data):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert count_new(rows, vae, tmp_path / "cache") == 0
    with pytest.raises(ValueError, match="got Permission denied; "):
        cache_latents(rows, vae, vae.encode, tmp_path / "new")


def test_what_a_killed_process_left_is_removed_after_an_hour_and_nothing_else(tmp_path, rows):
    folder, vae, mark = tmp_path / "cache", Mean(), "0123456789abcdef"
    folder.mkdir()
    names = [f"a.safetensors.{mark}.partial", f"b.safetensors.{mark}.partial", "holiday.zip.partial"]
    for name, age in zip(names, (4000, 3000, 9999), strict=True):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - age,) * 2)
    cache_latents(rows, vae, vae.encode, folder)
    assert sorted(path.name for path in folder.glob("*.partial")) == names[1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_caching_with_one_line_and_the_same_command_goes_on(command, tmp_path, number):
    folder, told = tmp_path / "cache", tmp_path / "told.txt"
    process, deadline = start(command, 0.2, told), time.time() + 40
    while not list(folder.glob("*.safetensors")) and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(40)
    lines = told.read_text().splitlines()
    assert process.exitcode == 128 + number, lines
    assert len(lines) == 2 and lines[0].startswith("8 of 8 rows") and lines[1].startswith("clips.cache: stopped; ")
    files = list(folder.glob("*.safetensors"))
    assert 0 < len(files) < 8 and all(cache._is_whole(path, path.stem) for path in files)
    assert not list(folder.glob("*.partial")) and list(folder.glob("hashes-0.json"))
    process = start(command, 0.0, told)
    process.join(40)
    assert process.exitcode == 0 and told.read_text().splitlines()[1].startswith(f"latents: {len(files)} were there, ")


# ------------------------------------------------------------ the text encoder's key, and the command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint and Gemma folder; tests that change them make a copy."""
    folder = tiny.write_tiny(tmp_path_factory.mktemp("tiny"))
    TextEncoder.load(folder / "model.safetensors", folder / "gemma").encode([""])
    cache.load_vae(folder / "model.safetensors")  # the first use of torch's meta device imports much: before any fork
    return folder


@pytest.fixture
def command(tmp_path, model):
    """Arguments for a folder of 8 clips and 4 captions; with the null prompt that makes 5 contexts."""
    for k in range(8):
        write(tmp_path / f"{k}.mp4", count=9, first=k)
    rows = [{"video": f"{k}.mp4", "caption": f"red {k % 4}"} for k in range(8)]
    return [str(manifest(tmp_path, *rows)), "--checkpoint-path", str(model / "model.safetensors"), "--gemma-root",
            str(model / "gemma"), "--folder", str(tmp_path / "cache"), "--device", "cpu", "--buckets", "32x48x9"]


def call(monkeypatch, capsys, arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["clips.cache", *arguments])
    status = cache.main()
    return status, *capsys.readouterr()


def rewrite(path: Path, change) -> None:
    """A safetensors file with change(tensors, metadata) done to it."""
    with open_file(path) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    change(tensors, metadata)
    write_file(path, tensors, metadata)


def settings(data, change):
    config = json.loads(data["config"])
    change(config)
    data["config"] = json.dumps(config)


TEXT = {"gemma/config.json": lambda p: p.write_text(p.read_text() + "\n"),
        "gemma/tokenizer.json": lambda p: p.write_text(p.read_text() + "\n"),
        "gemma/model.safetensors": lambda p: rewrite(p, lambda x, m: x[min(x)].view(-1)[:1].add_(1))}
PARTS = {
    "extractor": (lambda x, m: x[EXTRACTOR_PREFIX + "video_aggregate_embed.weight"].view(-1)[:1].add_(1), True),
    "connector": (lambda x, m: x[CONNECTOR_PREFIX + "learnable_registers"].view(-1)[:1].add_(1), True),
    "its settings": (lambda x, m: settings(m, lambda c: c["transformer"].update(text_max_length=64)), True),
    "vae": (lambda x, m: [x[k].add_(1) for k in x if k.startswith("vae.")], False),
    "blocks": (lambda x, m: [x[k].add_(1) for k in x if ".transformer_blocks." in k], False),
    "vae's settings": (lambda x, m: settings(m, lambda c: c["vae"].update(more=1)), False)}


def test_the_text_key_changes_with_all_that_a_context_depends_on_and_nothing_else(tmp_path, model, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    monkeypatch.setattr(TextEncoder, "load", lambda *a, **k: pytest.fail("the encoder was loaded"))
    checkpoint, gemma = folder / "model.safetensors", folder / "gemma"
    first = text_key(checkpoint, gemma, tmp_path / "cache")
    keys = {first}
    for name, change in TEXT.items():
        before = (folder / name).read_bytes()
        change(folder / name)
        keys.add(text_key(checkpoint, gemma, tmp_path / "cache"))
        (folder / name).write_bytes(before)
    assert len(keys) == 1 + len(TEXT)
    before = checkpoint.read_bytes()
    for name, (change, matters) in PARTS.items():
        rewrite(checkpoint, change)
        key = text_key(checkpoint, gemma, tmp_path / "cache")
        assert (key not in keys) if matters else (key == first), name
        keys.add(key)
        checkpoint.write_bytes(before)
    folder.rename(tmp_path / "moved")
    assert text_key(tmp_path / "moved/model.safetensors", tmp_path / "moved/gemma", tmp_path / "cache") == first


def test_the_text_files_are_read_once_and_by_one_worker(tmp_path, model, monkeypatch):
    hashed, opened, digest = [], [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, kind: hashed.append(Path(f.name).name) or digest(f, kind))
    monkeypatch.setattr(cache, "open_file", lambda path: opened.append(path) or open_file(path))
    checkpoint, gemma = model / "model.safetensors", model / "gemma"
    keys = together(3, lambda rank, wait: text_key(checkpoint, gemma, tmp_path, rank, wait))
    assert sorted(hashed) == ["config.json", "model.safetensors", "tokenizer.json"] and opened == [checkpoint]
    assert len(set(keys)) == 1 and text_key(checkpoint, gemma, tmp_path) == keys[0] and len(hashed) == 3
    assert text_key(checkpoint, gemma, tmp_path / "other") == keys[0] and len(hashed) == 6


def test_a_text_folder_that_lacks_a_file_is_one_line_for_every_worker(tmp_path, model):
    gemma = tmp_path / "gemma"
    shutil.copytree(model / "gemma", gemma)
    for name in ("tokenizer.json", "config.json"):
        (gemma / name).unlink()
        told = together(2, lambda rank, wait: text_key(model / "model.safetensors", gemma, tmp_path, rank, wait))
        assert [str(error)[:50] for error in told] == ["expected config.json, tokenizer.json and *.safeten"] * 2


def test_the_command_makes_everything_once_and_says_so(command, tmp_path, model, monkeypatch, capsys):
    folder = tmp_path / "cache"
    status, out, err = call(monkeypatch, capsys, command)
    assert (status, err) == (0, "") and out.splitlines() == [
        "8 of 8 rows are used; buckets: 32x48x9 8", f"latents: 0 were there, 8 made, in {folder}",
        f"contexts: 0 were there, 5 made, in {folder}"]
    encoder = TextEncoder.load(model / "model.safetensors", model / "gemma", dtype=torch.float32)
    captions = ["", *(f"red {k}" for k in range(4))]
    contexts = cache_contexts(captions, None, folder, text_key(model / "model.safetensors", model / "gemma", folder))
    with torch.no_grad():
        error = max((contexts[c]() - encoder.encode([c])[0]).abs().max().item() for c in captions)
    assert error < 1e-5 and contexts[""]().dtype == torch.float32, error
    monkeypatch.setattr(TextEncoder, "load", lambda *a, **k: pytest.fail("the encoder was loaded"))
    with (tmp_path / "manifest.jsonl").open("a") as file:
        file.write('{"video": "none.mp4", "caption": "red"}\n')
    status, out, err = call(monkeypatch, capsys, command)
    lines = out.splitlines()
    assert (status, err) == (1, "") and lines[0].startswith("row 9: missing file: ") and lines[1].startswith("8 of 9 ")
    assert lines[2:] == [f"latents: 8 were there, 0 made, in {folder}", f"contexts: 5 were there, 0 made, in {folder}"]


def test_the_command_takes_the_factors_of_the_checkpoints_vae(command, tmp_path, model, monkeypatch, capsys):
    assert call(monkeypatch, capsys, command)[0] == 0
    vae = cache.load_vae(model / "model.safetensors")
    (row, *_) = check(tmp_path / "manifest.jsonl", SMALL).used
    latents = cache_latents([row], vae, lambda x: pytest.fail("not there yet"), tmp_path / "cache")
    with torch.no_grad():
        error = (latents[0] - vae.encode(load_clip(tmp_path / "0.mp4", WIDE)[None])[0]).abs().max().item()
    assert error < 1e-5, error


@pytest.mark.parametrize("changed, words", [
    ({"--buckets": "32x48x8"}, "expected 4k+1 frames"), ({"--buckets": "30x48x9"}, "multiples of 8"),
    ({"--frame-rate": "-1"}, "expected a frame rate above 0"), ({"--device": "abacus"}, "expected a device"),
    ({"--gemma-root": str(Path(__file__).parent)}, "config.json"), ({"--checkpoint-path": "/none"}, "got no file at"),
    ({"--folder": __file__}, "expected to be able to write in"), ({0: "none.jsonl"}, "expected a manifest")])
def test_what_cannot_work_ends_with_2_and_one_line_before_anything_is_made(command, tmp_path, monkeypatch, capsys,
                                                                           changed, words):
    if 0 in changed:
        command[0] = changed.pop(0)
    status, out, err = call(monkeypatch, capsys, [*command, *(part for pair in changed.items() for part in pair)])
    assert status == 2 and err.startswith("clips.cache: error: ") and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.glob("cache/*"))
