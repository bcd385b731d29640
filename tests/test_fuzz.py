"""Random damage to every kind of file and to every command line: one line and a refusal, or it works; never anything else.

A loader may raise ValueError or OSError with one line. Another exception, more than 10 seconds of processor time, or
more than MOST_MB of memory (a picture: PICTURE_MB) for an input below 100 kB, fails. Files are damaged in their bytes
(bits, ends, pieces filled, inserted) and, where they are JSON, in their values: a text where a number belongs, NaN, 10^400,
a list nested 50 deep.
Then: nothing is executed from a file, and no path in a manifest leads out of its folder.
Hardware: CPU, about 20 seconds.   Command: pytest tests/test_fuzz.py      hundreds of examples of each kind
Thousands of each, other ones every time, about 5 minutes:   pytest tests/test_fuzz.py -m nightly
"""

import ast
import contextlib
import copy
import io
import json
import math
import os
import signal
import string
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from clipfiles import manifest, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import sample
import train
from clips import cache, face
from clips import manifest as clips
from clips.frames import Bucket, Unusable, cover, open_picture, probe
from clips.manifest import faces_for_clip, load_faces, read_manifest
from common.files import parse_json
from ltx import checkpoint
from ltx.checkpoint import check_weights, load_weights, read_metadata, shapes_from
from ltx.gemma import GemmaConfig, GemmaTextModel, _gemma_files, load_gemma
from ltx.lora import read_lora
from ltx.text import check_text
from ltx.tokenizer import Tokenizer
from ltx.vae import VideoVAE
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer
from reference import letterbox
from study import ablate, evaluate
from toy import pretrain
from toy.vocabulary import train_bpe
from training.run import load_state

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "weights" / "tiny"
SECONDS, MOST_MB = 10, 400  # of processor time and of memory, for one input
PICTURE_MB = 3000           # 100 bytes can announce 179 million pixels, Pillow's limit: 716 MB, and four copies at most
RUNS = pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.nightly, id="nightly")])


def examples(count: int, times: int) -> settings:
    return settings(max_examples=count * times, deadline=None, database=None, derandomize=times == 1,
                    suppress_health_check=list(HealthCheck))


def memory_mb(what: str) -> float:
    """VmRSS (now) or VmHWM (the most since the mark was reset) of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1e3


@contextlib.contextmanager
def bounded(most_mb: float = MOST_MB):
    """Fails when what is inside takes longer or more memory than it may."""
    def late(*_):
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    measured = os.access("/proc/self/clear_refs", os.W_OK)
    if measured:
        Path("/proc/self/clear_refs").write_text("5")
        start = memory_mb("VmRSS")
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if measured:
        assert (used := memory_mb("VmHWM") - start) < most_mb, f"{used:.0f} MB"


def outcome(load, *given, most_mb: float = MOST_MB):
    """What `load` returns, or None when it refuses; its line must be one, and short."""
    with bounded(most_mb):
        try:
            return load(*given)
        except (ValueError, OSError) as error:
            line = str(error)
    assert line and len(line.splitlines()) == 1 and len(line) < 1000, line[:2000]
    return None


# ------------------------------------------------------------ damage


def damage(good: bytes):
    """Strategy: the same bytes with one to four things wrong; half of them in the first 200, where headers are."""
    place = st.one_of(st.integers(0, min(200, len(good)) - 1), st.integers(0, len(good) - 1))
    kinds = st.sampled_from(["flip", "fill", "cut", "insert", "repeat", "number"])
    edits = st.lists(st.tuples(kinds, place, st.integers(0, 255)), min_size=1, max_size=4)

    def apply(edits: list) -> bytes:
        data = bytearray(good)
        for kind, at, value in edits:
            if kind == "flip" and at < len(data):
                data[at] ^= 1 << value % 8
            elif kind == "fill":
                data[at : at + value % 16] = bytes([value % 2 * 255]) * len(data[at : at + value % 16])
            elif kind == "cut":
                del data[at:]
            elif kind == "insert":
                data[at:at] = bytes([value]) * (value % 9)
            elif kind == "repeat":
                data[at:at] = data[at : at + value]
            else:
                data[at : at + 8] = struct.pack("<Q", value << value % 57)
        return bytes(data)

    return edits.map(apply)


def nested(depth: int) -> list:
    return [] if depth == 0 else [nested(depth - 1)]


WEIRD = [None, True, False, -1, 0, 1, 3, 0.5, 1e308, math.nan, math.inf, 10**12, 10**400, "", "x", "9" * 30, "\x00", "../x",
         "\ud800", "\u2028\x1b[2J", "y" * 5000, [], {}, [[]], {"a": 1}, [1, 2, 3], ["a", None], {"b": {}}, nested(50)]


def changed(good):
    """Strategy: the same JSON with one to three of its values gone, or something that does not belong there."""
    change = st.tuples(st.integers(0, 10**6), st.one_of(st.just("gone"), st.integers(0, len(WEIRD) - 1)))

    def apply(changes: list):
        data = copy.deepcopy(good)
        for number, how in changes:
            places = []
            for holder in (queue := [data]):
                for key in holder if isinstance(holder, dict) else range(len(holder)):
                    places.append((holder, key))
                    if isinstance(holder[key], dict | list) and holder[key] not in WEIRD:
                        queue.append(holder[key])
            if places:
                holder, key = places[number % len(places)]
                if how == "gone":
                    del holder[key]
                else:
                    holder[key] = copy.deepcopy(WEIRD[how])
        return data

    return st.lists(change, min_size=1, max_size=3).map(apply)


# ------------------------------------------------------------ pictures and clips


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[bytes]:
    """Small pictures of every format that is read, each with more than one pixel type where it has some."""
    base, exif, made = Image.linear_gradient("L").resize((14, 9)), Image.Exif(), []
    exif[0x0112] = 6
    for mode, kinds in (("RGB", "PNG JPEG WEBP BMP TIFF"), ("RGBA", "PNG WEBP TIFF"), ("P", "PNG GIF BMP"), ("LA", "PNG"),
                        ("I;16", "PNG TIFF"), ("CMYK", "JPEG TIFF"), ("1", "PNG BMP"), ("L", "JPEG")):
        for kind in kinds.split():
            image = Image.new("I;16", (14, 9), 999) if mode == "I;16" else base.convert(mode)
            options = {"exif": exif} if mode == "RGB" and kind == "JPEG" else {}
            options |= {"save_all": True, "append_images": [image]} if kind == "GIF" else {}
            file = io.BytesIO()
            image.save(file, kind, **options)
            made.append(file.getvalue())
    return made


@RUNS
def test_a_damaged_picture_is_refused_in_one_line_or_shown(times, pictures, tmp_path):
    path, counts = tmp_path / "a.png", [0, 0]

    @examples(20, times)
    @given(st.data())
    def holds(data):
        for good in pictures:  # each example: all of them, each with damage of its own
            path.write_bytes(data.draw(damage(good)))
            picture = outcome(open_picture, path, most_mb=PICTURE_MB)
            counts[picture is not None] += 1
            if picture is not None:
                canvas = outcome(letterbox, picture, 16, 24, most_mb=PICTURE_MB)
                assert canvas is None or canvas.shape == (3, 16, 24) and canvas.isfinite().all()

    holds()
    assert min(counts) > 10, f"{counts[0]} refused, {counts[1]} shown: the damage is too weak or too strong"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_an_undamaged_picture_of_every_kind_is_read(pictures, tmp_path):
    for data in pictures:
        (tmp_path / "a.png").write_bytes(data)
        assert open_picture(tmp_path / "a.png").size in ((14, 9), (9, 14))


def test_a_picture_that_other_programs_would_have_to_run_for_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # Pillow would hand this one to Ghostscript
    (tmp_path / "face.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(Unusable, match="cannot identify image file"):
        open_picture(tmp_path / "face.png")
    with pytest.raises(ValueError, match="; "):
        sample.load_canvas(tmp_path / "face.png", 64, 64)


def test_a_bomb_a_pipe_and_a_device_are_refused_at_once(tmp_path):
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 10**6, 0, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(header + bytes(1000))
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "bomb.png", tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        assert outcome(open_picture, path) is None
        assert outcome(checkpoint.open_file, path) is None
        assert outcome(load_faces, path) is None
        assert outcome(read_manifest, path) is None
        assert outcome(probe, path) is None


@RUNS
def test_a_damaged_clip_is_refused_in_one_line_or_decoded(times, tmp_path):
    kinds = ("mp4", "libx264", "yuv420p"), ("mkv", "mpeg4", "yuv420p"), ("avi", "mjpeg", "yuvj420p")
    goods = [write(tmp_path / f"good.{kind}", count=6, size=(32, 48), codec=codec, pix=pix).read_bytes()
             for kind, codec, pix in kinds]

    @examples(70, times)
    @given(st.data())
    def holds(data):
        for good in goods:
            (tmp_path / "a.mp4").write_bytes(data.draw(damage(good)))
            found = outcome(probe, tmp_path / "a.mp4")
            assert found is None or found.height > 0 and len(found.times) > 0

    holds()


# ------------------------------------------------------------ manifests and faces files

ROW = {"video": "clips/a.mp4", "caption": "a person", "reference": "ref.png", "identity": "p", "faces": "faces.json"}
VALUES = st.one_of(st.sampled_from([*WEIRD, *ROW.values(), "/etc/passwd", "..", "clips/../../x", "link/x", "~/x"]),
                   st.text(max_size=30), st.integers(), st.floats())
ROWS = st.dictionaries(st.one_of(st.sampled_from([*ROW, "media_path"]), st.text(max_size=5)), VALUES, max_size=7)


@RUNS
def test_any_manifest_gives_rows_or_one_line_and_no_row_leads_outside(times, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    used = []

    def look(path: Path, data: bytes) -> None:
        path.write_bytes(data)
        for row in outcome(read_manifest, path) or []:
            if row.broken is None:
                used.append(row)
                assert row.caption and all(p is None or p.is_relative_to(tmp_path / "in")
                                           for p in (row.video, row.reference, row.faces))
            else:
                assert str(row.broken).isprintable() and len(str(row.broken)) < 500

    @examples(120, times)
    @given(st.lists(st.one_of(ROWS, changed(ROW), VALUES), min_size=1, max_size=4), st.binary(max_size=60), st.data())
    def holds(rows, noise, data):
        lines = "\n".join(json.dumps(row) for row in rows).encode()
        look(tmp_path / "in" / "m.jsonl", lines)
        look(tmp_path / "in" / "m.jsonl", data.draw(damage(lines)))
        look(tmp_path / "in" / "m.json", json.dumps(data.draw(st.sampled_from([rows, {"data": rows}]))).encode())
        look(tmp_path / "in" / "m.csv", b"video,caption,reference\na.mp4,x,\n" + noise)
        look(tmp_path / "in" / "m.csv", ",".join(ROW).encode() + b"\n" + data.draw(damage(",".join(ROW.values()).encode())))

    holds()
    assert len(used) > 50


FACES = {"frame_rate": 24, "size": [48, 72], "frames": [{"t": k / 24, "box": [1, 2, 30, 40],
         "landmarks": [[k, 1], [2, 2], [3, 3], [4, 4], [5, 5]]} for k in range(3)],
         "reference": {"size": [20, 30], "box": [1, 2, 9, 9]}}  # fmt: skip


@RUNS
def test_any_faces_file_is_refused_in_one_line_or_gives_boxes(times, tmp_path):
    bucket, path = Bucket(32, 48, 9), tmp_path / "faces.json"

    @examples(150, times)
    @given(st.one_of(changed(FACES).map(lambda d: json.dumps(d).encode()), damage(json.dumps(FACES).encode())))
    def holds(data):
        path.write_bytes(data)
        faces = outcome(load_faces, path)
        if faces is not None:
            boxes, _, valid = faces_for_clip(faces, bucket, cover(48, 72, bucket), [k / 24 for k in range(9)])
            assert boxes.shape == (9, 4) and boxes[valid].isfinite().all()

    holds()


# ------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> bytes:
    """A file of the published form with two small tensors; its table is what is damaged."""
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    config = json.dumps(read_metadata(TINY / "model.safetensors")["config"])
    tensors = {"vae.weight": torch.randn(3, 4), "vae.bias": torch.randn(3)}
    save_file(tensors, path, {"config": config, "model_version": "2.3.0"})
    return path.read_bytes()


def with_table(table: object, body: bytes) -> bytes:
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + body


@RUNS
def test_a_damaged_checkpoint_is_refused_in_one_line_or_loads(times, weights, tmp_path):
    path, length = tmp_path / "w.safetensors", int.from_bytes(weights[:8], "little")
    table, loaded = json.loads(weights[8 : 8 + length]), []
    table["__metadata__"]["config"] = "{}"
    lengths = st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + weights[8:])
    deep = st.sampled_from([b'{"a":' + b"[" * n + b"]" * n + b"}" for n in (20, 100, 2000, 50000)]).map(
        lambda text: len(text).to_bytes(8, "little") + text)

    @examples(250, times)
    @given(st.one_of(damage(weights), lengths, deep,
                     changed(table).map(lambda t: with_table(t, weights[8 + length :]))))
    def holds(data):
        path.write_bytes(data)
        outcome(read_metadata, path)
        with torch.device("meta"):
            module = nn.Linear(4, 3)
        if outcome(load_weights, module, path, "vae.") is not None:
            loaded.append(module)
            assert module.weight.shape == (3, 4)

    holds()
    assert loaded and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@RUNS
def test_a_changed_config_is_refused_in_one_line_or_gives_modules(times, tmp_path):
    """The whole bundled table over a file of zeros that takes no room on the disk: only shapes are looked at."""
    source, path = TINY / "model.safetensors", tmp_path / "w.safetensors"
    with source.open("rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    config = json.loads(table["__metadata__"]["config"])
    body = source.stat().st_size

    def build(path: Path) -> None:
        found = read_metadata(path)["config"]
        with shapes_from(path):
            model, vae = VideoTransformer(TransformerConfig.from_checkpoint(found["transformer"])), VideoVAE(found["vae"])
        check_weights(model, path, TRANSFORMER_PREFIX)
        check_weights(vae, path, "vae.")
        check_text(path, TINY / "gemma")

    @examples(200, times)
    @given(changed(config))
    def holds(changed_config):
        table["__metadata__"]["config"] = json.dumps(changed_config)
        path.write_bytes(with_table(table, b""))
        os.truncate(path, path.stat().st_size + body)
        outcome(build, path)

    holds()


@RUNS
def test_a_damaged_lora_is_refused_in_one_line_or_gives_pairs(times, tmp_path):
    path, model = tmp_path / "lora.safetensors", nn.ModuleDict({"to_q": nn.Linear(4, 3)})
    adapter = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 2, "transformer.r": 2})}
    parts = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(3, 2), "alpha": torch.tensor(2.0)}
    save_file({f"diffusion_model.to_q.{part}": tensor for part, tensor in parts.items()}, path, adapter)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    table = json.loads(good[8 : 8 + length])

    def other_adapter(entry: object) -> bytes:
        return with_table(table | {"__metadata__": {"lora_adapter_metadata": json.dumps(entry)}}, good[8 + length :])

    @examples(200, times)
    @given(st.one_of(damage(good), changed(table).map(lambda t: with_table(t, good[8 + length :])),
                     changed({"transformer.lora_alpha": 2, "use_dora": False}).map(other_adapter)))
    def holds(data):
        path.write_bytes(data)
        found = outcome(read_lora, path, model)
        assert found is None or all(math.isfinite(scale) for _, _, scale in found.pairs.values())

    holds()


# ------------------------------------------------------------ text models

PROMPTS = ["", "a person in a red shirt", "\ud800\udfff", "\x00\x1b", "雪の中" * 40, "a" * 3000, "<bos><pad> <0x41>"]


@RUNS
def test_a_damaged_tokenizer_is_refused_in_one_line_or_encodes_every_prompt(times, tmp_path):
    good, path = train_bpe(["a person in a red shirt turns left, a person nods"], 330), tmp_path / "tokenizer.json"
    flat = copy.deepcopy(good)
    flat["model"]["vocab"] = dict(list(flat["model"]["vocab"].items())[-40:])  # more damage outside of the 300 pieces
    written = json.dumps(good).encode()

    def full_tensor(data: object) -> bytes:
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            data["model"]["vocab"] = good["model"]["vocab"] | data["model"]["vocab"]
        return json.dumps(data).encode()

    @examples(200, times)
    @given(st.one_of(damage(written), changed(good).map(lambda d: json.dumps(d).encode()), changed(flat).map(full_tensor)))
    def holds(data):
        path.write_bytes(data)
        tokenizer = outcome(Tokenizer, path)
        if tokenizer is not None:
            for prompt in PROMPTS:
                ids, mask = outcome(tokenizer.encode_padded, prompt, 16)
                assert len(ids) == len(mask) == 16 and ids.min() >= 0 and int(ids.max()) <= max(tokenizer.pieces)

    holds()


@RUNS
def test_a_changed_gemma_config_is_refused_in_one_line_or_gives_a_model(times, tmp_path):
    good = json.loads((TINY / "gemma" / "config.json").read_text())
    new = {"text_config": {k: v for k, v in good.items() if "rope" not in k} | {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {}}}}

    def build(folder: Path) -> nn.Module:
        with torch.device("meta"):
            return GemmaTextModel(GemmaConfig.from_folder(folder))

    @examples(200, times)
    @given(st.one_of(changed(good).map(lambda d: json.dumps(d).encode()), damage(json.dumps(good).encode()),
                     changed(new).map(lambda d: json.dumps(d).encode())))
    def holds(data):
        (tmp_path / "config.json").write_bytes(data)
        outcome(build, tmp_path)

    holds()


def test_a_hundred_thousand_characters_without_a_space_take_seconds():
    tokenizer = Tokenizer(TINY / "gemma" / "tokenizer.json")
    for word in ("a" * 100_000, "雪" * 100_000, "person" * 20_000):
        start = time.process_time()
        ids, _ = tokenizer.encode_padded(word, 48)
        assert len(ids) == 48 and (took := time.process_time() - start) < SECONDS, f"{took:.1f} s"


# ------------------------------------------------------------ JSON


def test_json_is_bounded_in_depth_and_size_wherever_it_comes_from_outside(tmp_path, monkeypatch):
    assert parse_json("[" * 32 + "]" * 32) == nested(31)
    for depth in (33, 900, 100_000):
        for opened, closed in (("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")):
            with pytest.raises(ValueError, match="^JSON nested deeper than 32 levels$"):
                parse_json(opened * depth + "1" + closed * depth)
    deep = "[" * 3000 + "]" * 3000
    for name, load in (("tokenizer.json", Tokenizer), ("config.json", lambda p: GemmaConfig.from_folder(p.parent)),
                       ("m.json", read_manifest), ("faces.json", load_faces)):
        path = tmp_path / name
        for text_inside, says in ((deep, "nested deeper"), ('{"a": "' + "x" * 3000 + '"}', "more than 2,000")):
            path.write_text(text_inside)
            with monkeypatch.context() as m:
                m.setattr(checkpoint, "JSON_BYTES", 2000 if "more" in says else 10**8)
                with pytest.raises(ValueError, match=says):
                    load(path)
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", {"config": deep, "lora_adapter_metadata": deep})
    with pytest.raises(ValueError, match="nested deeper"):
        read_metadata(tmp_path / "w.safetensors")
    rows = read_manifest(manifest(tmp_path, ROW).rename(tmp_path / "m.jsonl"))
    assert [row.broken for row in rows] == [None]
    (tmp_path / "m.jsonl").write_text(f"{json.dumps(ROW)}\n{deep}\n{json.dumps(ROW | {'caption': 'x' * 100_001})}\n")
    told = [row.broken and row.broken.detail for row in read_manifest(tmp_path / "m.jsonl")]
    assert told == [None, "JSON nested deeper than 32 levels", "caption has 100,001 characters, more than 100,000"]


# ------------------------------------------------------------ command lines


WORDS = st.one_of(st.sampled_from(["nan", "inf", "-inf", "-1", "0", "1", "2", "1e999", "1.5", "9" * 5000, "", " ", "--", "-",
                                   "x", "\x00", "\ud800", "٣", "0x10", "1_0", "/dev/null", "/nowhere/x", "true", "run"]),
                  st.text(string.printable, max_size=8), st.integers().map(str), st.floats().map(str))


def parsers():
    """Every entrance: how its words are read and judged without beginning the work, and its flags."""
    def train_only(words):
        train.check_numbers(train.parse_arguments(words))

    def evaluate_only(words):
        evaluate.check_numbers(evaluate.parse_arguments(words))

    def clips_only(words):
        clips.main(["check", "/nowhere/m.jsonl", *words])

    def cache_only(words):
        cache.main(["/nowhere/m.jsonl", "--checkpoint-path", "/nowhere/w", "--gemma-root", "/nowhere/g", *words])

    return {"train.py": train_only, "study.evaluate": evaluate_only, "toy.pretrain": pretrain.parse_arguments,
            "study.ablate": ablate.parse_arguments, "clips.manifest": clips_only, "clips.cache": cache_only,
            "sample.py": lambda words: sample.build_parser().parse_args(words)}


def flags_in_help(parse, *first: str) -> list[str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        parse([*first, "--help"])
    return sorted({word.strip("[],") for word in out.getvalue().split() if word.strip("[]").startswith("--")} - {"--help"})


@RUNS
@pytest.mark.parametrize("entrance", [f"{name}.py" for name in "sample train evaluate pretrain ablate clips cache".split()])
def test_any_command_line_is_understood_or_refused_in_one_line(times, entrance, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parse = parsers()[entrance]
    flags = flags_in_help(parse)
    assert len(flags) > 4, flags

    @examples(80, times)
    @given(st.lists(st.one_of(st.sampled_from(flags), WORDS), max_size=6))
    def holds(words):
        capsys.readouterr()
        with bounded():
            try:
                parse(words)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
            except SystemExit as stop:
                told = capsys.readouterr().err
                assert stop.code == 0 or (stop.code == 2 and sum("error:" in line for line in told.splitlines()) == 1), told

    holds()
    assert not list(tmp_path.iterdir())


@RUNS
def test_any_settings_of_sample_are_resolved_or_refused_and_nothing_is_written(times, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = ["--ref", str(ROOT / "examples" / "ada.png"), "--prompt", "a person", "--device", "cpu", "--dry-run"]
    numbers = ["height", "width", "num-frames", "frame-rate", "num-inference-steps", "text-scale", "ref-scale", "rescale",
               "guide-every", "seed", "stg-scale", "phase-scale"]
    values = st.sampled_from(["nan", "inf", "-1", "0", "1", "8", "64", "9", "1e30", "1" + "0" * 20, "99999992", "-0.0"])

    @examples(8, times)
    @given(st.dictionaries(st.sampled_from(numbers), values, min_size=1, max_size=2), st.text(max_size=20))
    def holds(given_numbers, prompt):
        capsys.readouterr()
        words = [f"--{name}={value}" for name, value in given_numbers.items()]
        with bounded():
            try:
                status = sample.main([*start, f"--prompt={prompt}", *words])
            except SystemExit as stop:
                status = stop.code
        told = capsys.readouterr().err
        assert status in (0, 2) and told.count("error:") == (status == 2) and "Traceback" not in told, told

    holds()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ nothing is executed from a file

# What can run code that a file holds. torch.save writes pickles; the object collectives of torch.distributed send them.
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"torch.load", "torch.save", "torch.jit.load", "torch.package", "torch.hub", "os.system", "os.popen",
           "importlib.import_module", "torch.utils.cpp_extension", "torch.ops.load_library", "ctypes.CDLL"}
OBJECTS = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"}


def executions(source: str) -> list[str]:
    """Places of a Python source where a file's content, or a text, could become code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Name) and node.id in CALLS and isinstance(node.ctx, ast.Load):
            found.append(node.id)
        if isinstance(node, ast.Attribute) and (ast.unparse(node) in METHODS or node.attr in OBJECTS):
            found.append(ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell") and ast.unparse(node.value) != "False":
            found.append(f"{node.arg}={ast.unparse(node.value)}")
    return found


def test_no_source_can_run_what_a_file_holds():
    """Without exception for what a user runs; a test may run the repository's own sources, but never what it loads."""
    sources = {path: executions(path.read_text(encoding="utf-8")) for folder in ("", "tests")
               for path in sorted((ROOT / folder).glob("*.py"))}
    assert len(sources) > 50
    own = {"eval", "exec", "compile", "import runpy", "importlib.import_module"}
    left = {path.name: set(found) - (own if path.parent.name == "tests" else set()) for path, found in sources.items()}
    wrong = {name: found for name, found in left.items() if found}
    assert wrong == {}
    for line in ("import pickle", "from marshal import loads", "torch.load(x)", "eval(x)", "np.load(p, allow_pickle=True)",
                 "x = exec", "import yaml as y", "dist.all_gather_object(a, b)", "torch.jit.load(p)", "os.system(x)"):
        assert executions(line), f"the walk misses {line!r}"
    assert not executions("model.eval(); re.compile('x'); torch.compile(f); x.load()")


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path):
    witness = tmp_path / "hacked"
    payload = b"cposix\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR."
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("model/data.pkl", payload)
    (tmp_path / "raw.pt").write_bytes(payload)
    (tmp_path / "two.pt").write_bytes(b"\x80\x02" + payload)
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({payload!r})"], check=True)
    assert witness.exists(), "the payload works where a pickle is loaded"
    witness.unlink()
    module = nn.Linear(2, 2)
    for name in ("zip.pt", "raw.pt", "two.pt"):
        data, gemma = (tmp_path / name).read_bytes(), tmp_path / f"gemma-{name}"
        gemma.mkdir()
        (gemma / "config.json").write_bytes((TINY / "gemma" / "config.json").read_bytes())
        (gemma / "model.safetensors").write_bytes(data)
        (gemma / "tokenizer.json").write_bytes(data)
        for load in (read_metadata, load_faces, open_picture, probe, face.load_facenet):
            assert outcome(load, tmp_path / name) is None
        for load, *words in ((load_weights, module, tmp_path / name, ""), (read_lora, tmp_path / name, module),
                             (load_gemma, gemma), (Tokenizer, gemma / "tokenizer.json"),
                             (sample.load_canvas, tmp_path / name, 64, 64), (check_text, tmp_path / name, TINY / "gemma")):
            assert outcome(load, *words) is None
        with pytest.raises(Exception, match="."):  # safetensors' own type; Run.resume takes the state before
            load_state(tmp_path / name)
        assert not witness.exists(), "the payload was run"
    for name in ("zip.pt", "two.pt"):
        with pytest.raises(ValueError, match="can run code"):
            read_metadata(tmp_path / name)


def test_an_index_of_shards_cannot_name_files_elsewhere(tmp_path):
    for name in ("../x.safetensors", "/etc/passwd", "a/b.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(ValueError, match="expected names of files beside"):
            _gemma_files(tmp_path)
