"""Random damage to files and command lines: a refusal in one line, or it works; nothing else.

A loader may raise ValueError or OSError with one line. Another exception, more than 10 seconds of
processor time, or more than MOST_MB of memory (a picture: PICTURE_MB) for an input below 100 kB,
fails. Files are damaged in their bytes (bits, ends, pieces filled, inserted) and, where they are
JSON, in their values: a text where a number belongs, NaN, 10^400, a list nested 50 deep. Then:
nothing is executed from a file, and no path in a manifest leads out of its folder.

Hardware: CPU, about 15 seconds.  Command: pytest tests/test_fuzz.py     hundreds of examples
Twenty times as many, other ones every time:  pytest tests/test_fuzz.py -m nightly
"""

import ast
import contextlib
import copy
import io
import json
import math
import os
import re
import signal
import string
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from clipfiles import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

import sample
import train
from clips import cache, face
from clips import manifest as clips
from clips.frames import Bucket, cover, probe
from clips.manifest import faces_for_clip, load_faces, read_manifest
from clips.pictures import open_picture
from ltx.checkpoint import check_weights, load_weights, open_file, read_metadata, shapes_from
from ltx.gemma import GemmaConfig, GemmaTextModel, load_gemma
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
PICTURE_MB = 3000  # 100 bytes can announce Pillow's limit: 716 MB, and four copies at most
RUNS = pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.nightly,
                                                         id="nightly")])


def fuzz(count: int, times: int, strategy: st.SearchStrategy):
    """Decorator: call the function with that many examples, now."""
    def run(function):
        how = settings(max_examples=count * times, deadline=None, database=None,
                       derandomize=times == 1, suppress_health_check=list(HealthCheck))
        how(given(strategy)(function))()
    return run


def memory_mb(what: str) -> float:
    """VmRSS (now) or VmHWM (the most since the mark was reset) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1e3


@contextlib.contextmanager
def bounded(most_mb: float = MOST_MB):
    """Fails when what is inside takes longer or more memory than it may."""
    def late(*_):
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    if measured := os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
        start = memory_mb("VmRSS")
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if measured:
        assert (used := memory_mb("VmHWM") - start) < most_mb, f"{used:.0f} MB"


def outcome(load, *words, most_mb: float = MOST_MB) -> str:
    """"read" or "refused", in bounds; the line of a refusal must be one, and short."""
    with bounded(most_mb):
        try:
            load(*words)
            return "read"
        except (ValueError, OSError) as error:
            line = str(error)
    assert line and len(line.splitlines()) == 1 and len(line) < 1000, line[:2000]
    return "refused"


# ------------------------------------------------------------ damage


def damage(good: bytes):
    """Strategy: the same bytes with one to four things wrong, half of them near the beginning."""
    places = st.one_of(st.integers(0, min(200, len(good)) - 1), st.integers(0, len(good) - 1))
    kinds = st.sampled_from(["flip", "fill", "cut", "insert", "number"])
    edits = st.lists(st.tuples(kinds, places, st.integers(0, 255)), min_size=1, max_size=4)

    def apply(edits: list) -> bytes:
        data = bytearray(good)
        for kind, at, value in edits:
            piece = {"flip": bytes([(data[at] if at < len(data) else 0) ^ 1 << value % 8]),
                     "fill": bytes([value % 2 * 255]) * (value % 16), "cut": b"", "insert": b"",
                     "number": struct.pack("<Q", value << value % 57)}[kind]
            data[at : len(data) if kind == "cut" else at + len(piece)] = piece
            if kind == "insert":
                data[at:at] = bytes([value]) * (value % 9)
        return bytes(data)

    return edits.map(apply)


def nested(depth: int) -> list:
    return [] if depth == 0 else [nested(depth - 1)]


WEIRD = [None, True, False, -1, 0, 1, 3, 0.5, 1e308, math.nan, math.inf, 10**12, 10**400, "", "x",
         "9" * 30, "\x00", "../x", "\ud800", "\u2028\x1b[2J", "y" * 5000, [], {}, [[]], {"a": 1},
         [1, 2, 3], ["a", None], {"b": {}}, nested(50)]


def changed(good):
    """Strategy: the same JSON with one to three values gone, or replaced by what is odd there."""
    change = st.tuples(st.integers(0, 10**6), st.integers(-1, len(WEIRD) - 1))  # -1: gone

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
                if how < 0:
                    del holder[key]
                else:
                    holder[key] = copy.deepcopy(WEIRD[how])
        return data

    return st.lists(change, min_size=1, max_size=3).map(apply)


def damaged_json(good):
    """Strategy: bytes of a JSON file, wrong in its values or in its bytes."""
    return st.one_of(changed(good).map(lambda data: json.dumps(data).encode()),
                     damage(json.dumps(good).encode()))


# ------------------------------------------------------------ files


class Kind(NamedTuple):
    """A kind of file: its damaged bytes, and how it is read; what was read is checked there."""

    file: str
    data: st.SearchStrategy
    read: Callable[[Path], object]
    examples: int = 120
    most_mb: float = MOST_MB


def parts(data: bytes) -> tuple[dict, bytes]:
    """Table and numbers of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(table: object, numbers: bytes) -> bytes:
    """Inverse of `parts`."""
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + numbers


def pictures(folder: Path) -> Kind:
    goods, profile = [], ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind, mode in zip("PNG JPEG WEBP BMP TIFF GIF PNG JPEG TIFF TIFF".split(),
                          "RGB RGB RGB RGB RGB P RGBA CMYK F I;16".split(), strict=True):
        file = io.BytesIO()
        picture = Image.linear_gradient("L").resize((14, 9)).convert(mode)
        picture.save(file, kind, icc_profile=profile if kind in ("PNG", "WEBP") else None)
        goods.append(file.getvalue())

    def read(path: Path) -> None:
        canvas = letterbox(open_picture(path), 16, 24)
        assert canvas.shape == (3, 16, 24) and canvas.isfinite().all()

    return Kind("a.png", st.sampled_from(goods).flatmap(damage), read, most_mb=PICTURE_MB)


def videos(folder: Path) -> Kind:
    goods = [write(folder / f"good.{kind}", count=6, size=(32, 48), codec=codec, pix=pix)
             for kind, codec, pix in (("mp4", "libx264", "yuv420p"), ("mkv", "mpeg4", "yuv420p"),
                                      ("avi", "mjpeg", "yuvj420p"))]

    def read(path: Path) -> None:
        found = probe(path)
        assert found.height > 0 and len(found.times) > 0

    data = st.sampled_from([path.read_bytes() for path in goods]).flatmap(damage)
    return Kind("a.mp4", data, read)


ROW = {"video": "clips/a.mp4", "caption": "a person", "reference": "ref.png", "identity": "p",
       "faces": "faces.json"}
VALUES = st.one_of(st.sampled_from([*WEIRD, *ROW.values(), "/etc/passwd", "..", "clips/../../x",
                                    "link/x", "~/x"]), st.text(max_size=30), st.floats())
KEYS = st.one_of(st.sampled_from([*ROW, "media_path"]), st.text(max_size=5))
ANY_ROWS = st.lists(st.one_of(st.dictionaries(KEYS, VALUES, max_size=7), changed(ROW), VALUES),
                    min_size=1, max_size=4)


def manifests(kind: str) -> Callable[[Path], Kind]:
    lines = ANY_ROWS.map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
    head = ",".join(ROW).encode() + b"\n"
    whole = ANY_ROWS.map(lambda rows: json.dumps({"data": rows}).encode())
    data = {"jsonl": st.one_of(lines, lines.flatmap(lambda good: damage(good or b"{}"))),
            "json": st.one_of(whole, whole.flatmap(damage)),
            "csv": st.one_of(damage(",".join(ROW.values()).encode()), st.binary(max_size=60)).map(
                lambda line: head + line)}

    def make(folder: Path) -> Kind:
        inside = folder / "in"
        inside.mkdir()
        (inside / "link").symlink_to(folder)

        def read(path: Path) -> None:
            for row in read_manifest(path):
                if row.broken is None:
                    named = [p for p in (row.video, row.reference, row.faces) if p is not None]
                    assert row.caption and all(p.is_relative_to(inside) for p in named)
                else:
                    assert str(row.broken).isprintable() and len(str(row.broken)) < 500

        return Kind(f"in/m.{kind}", data[kind], read)
    return make


FACES = {"frame_rate": 24, "size": [48, 72],
         "frames": [{"t": k / 24, "box": [1, 2, 30, 40],
                     "landmarks": [[k, 1], [2, 2], [3, 3], [4, 4], [5, 5]]} for k in range(3)],
         "reference": {"size": [20, 30], "box": [1, 2, 9, 9]}}


def faces(folder: Path) -> Kind:
    bucket, moments = Bucket(32, 48, 9), [k / 24 for k in range(9)]

    def read(path: Path) -> None:
        boxes, _, valid = faces_for_clip(load_faces(path), bucket, cover(48, 72, bucket), moments)
        assert boxes.shape == (9, 4) and boxes[valid].isfinite().all()

    return Kind("faces.json", damaged_json(FACES), read)


def checkpoints(folder: Path) -> Kind:
    good = save({"vae.weight": torch.randn(3, 4), "vae.bias": torch.randn(3)}, {"config": "{}"})
    table, numbers = parts(good)
    tables = changed(table).map(lambda table: joined(table, numbers))

    def read(path: Path) -> None:
        with torch.device("meta"):
            module = nn.Linear(4, 3)
        load_weights(module, path, "vae.")
        assert module.weight.shape == (3, 4)
        read_metadata(path)

    return Kind("w.safetensors", st.one_of(damage(good), tables), read, 200)


def configs(folder: Path) -> Kind:
    """The bundled table over a file of zeros that takes no room: only shapes are looked at."""
    table, numbers = parts((TINY / "model.safetensors").read_bytes())
    config = json.loads(table["__metadata__"]["config"])

    def read(path: Path) -> None:
        os.truncate(path, path.stat().st_size + len(numbers))
        found = read_metadata(path)["config"]
        with shapes_from(path):
            model = VideoTransformer(TransformerConfig.from_checkpoint(found["transformer"]))
            vae = VideoVAE(found["vae"])
        check_weights(model, path, TRANSFORMER_PREFIX)
        check_weights(vae, path, "vae.")
        check_text(path, TINY / "gemma")

    return Kind("w.safetensors", st.one_of(st.just(config), changed(config)).map(
        lambda data: joined(table | {"__metadata__": {"config": json.dumps(data)}}, b"")), read, 40)


def loras(folder: Path) -> Kind:
    model = nn.ModuleDict({"to_q": nn.Linear(4, 3)})
    tensors = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(3, 2),
               "alpha": torch.tensor(2.0)}
    good = save({f"diffusion_model.to_q.{part}": tensor for part, tensor in tensors.items()})
    table, numbers = parts(good)
    adapters = changed({"transformer.lora_alpha": 2, "transformer.r": 2, "use_dora": False}).map(
        lambda entry: table | {"__metadata__": {"lora_adapter_metadata": json.dumps(entry)}})
    tables = st.one_of(changed(table), adapters).map(lambda table: joined(table, numbers))

    def read(path: Path) -> None:
        found = read_lora(path, model)
        assert all(math.isfinite(scale) for _, _, scale in found.pairs.values())

    return Kind("lora.safetensors", st.one_of(damage(good), tables), read)


PROMPTS = ["", "a person in a red shirt", "\ud800\udfff", "\x00\x1b", "雪の中" * 40, "a" * 3000,
           "<bos><pad> <0x41>"]


def tokenizers(folder: Path) -> Kind:
    good = train_bpe(["a person in a red shirt turns left, a person nods"], 330)
    pieces = good["model"].pop("vocab")  # damage outside of the 300 pieces

    def with_pieces(data: object) -> bytes:
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            data["model"]["vocab"] = pieces
        return json.dumps(data).encode()

    def read(path: Path) -> None:
        tokenizer = Tokenizer(path)
        for prompt in PROMPTS:
            ids, mask = tokenizer.encode_padded(prompt, 16)
            assert len(ids) == len(mask) == 16
            assert ids.min() >= 0 and int(ids.max()) <= max(tokenizer.pieces)

    data = st.one_of(changed(good).map(with_pieces), damage(with_pieces(copy.deepcopy(good))))
    return Kind("tokenizer.json", data, read)


def gemma_configs(folder: Path) -> Kind:
    good = json.loads((TINY / "gemma" / "config.json").read_text())

    def read(path: Path) -> None:
        with torch.device("meta"):
            GemmaTextModel(GemmaConfig.from_folder(path.parent))

    return Kind("config.json", damaged_json(good), read, 80)


KINDS = {"picture": pictures, "video": videos, "JSONL manifest": manifests("jsonl"),
         "JSON manifest": manifests("json"), "CSV manifest": manifests("csv"), "faces": faces,
         "checkpoint": checkpoints, "checkpoint's config": configs, "LoRA": loras,
         "tokenizer": tokenizers, "Gemma config": gemma_configs}


@RUNS
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_in_one_line_or_read(times, name, tmp_path):
    kind, counts = KINDS[name](tmp_path), {"refused": 0, "read": 0}
    path = tmp_path / kind.file
    before = set(tmp_path.rglob("*"))

    @fuzz(kind.examples, times, kind.data)
    def holds(data):
        path.write_bytes(data)
        counts[outcome(kind.read, path, most_mb=kind.most_mb)] += 1

    assert min(counts.values()) > 0, f"{counts}: the damage is too weak or too strong"
    assert set(tmp_path.rglob("*")) - before == {path}


def test_a_bomb_a_pipe_and_a_device_are_refused_at_once(tmp_path):
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 10**6, 0, 0, 54, 40, 30000, 30000, 1, 24,
                         0, 0, 0, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(header + bytes(1000))
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "bomb.png", tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        for load in (open_picture, open_file, load_faces, read_manifest, probe):
            assert outcome(load, path) == "refused"


def test_a_hundred_thousand_characters_without_a_space_take_seconds():
    tokenizer = Tokenizer(TINY / "gemma" / "tokenizer.json")
    for word in ("a" * 100_000, "雪" * 100_000):
        assert outcome(tokenizer.encode_padded, word, 48) == "read"


def test_json_is_bounded_in_depth_wherever_it_comes_from_outside(tmp_path):
    deep = "[" * 3000 + "]" * 3000
    for name, load in (("tokenizer.json", Tokenizer), ("faces.json", load_faces),
                       ("config.json", lambda path: GemmaConfig.from_folder(path.parent)),
                       ("m.json", read_manifest), ("w.safetensors", read_metadata)):
        table = {"__metadata__": {"config": deep}}
        (tmp_path / name).write_bytes(deep.encode() if ".json" in name else joined(table, b""))
        with pytest.raises(ValueError, match="nested deeper"):
            load(tmp_path / name)


# ------------------------------------------------------------ command lines

WORDS = st.one_of(
    st.sampled_from(["nan", "inf", "-inf", "-1", "0", "1", "2", "1e999", "1.5", "9" * 5000, "", " ",
                     "--", "-", "x", "\x00", "\ud800", "٣", "0x10", "1_0", "/dev/null",
                     "/nowhere/x", "true", "run", "vae"]),
    st.text(string.printable, max_size=8), st.integers().map(str), st.floats().map(str))


def entrance(main, *first: str):
    def run(words: list[str]) -> int | None:
        try:
            return main([*first, *words])
        finally:
            torch.set_flush_denormal(False)  # hypothesis wants true floating point
    return run


NO_WEIGHTS = ["--checkpoint-path", "/nowhere/w", "--gemma-root", "/nowhere/g"]  # nothing begins
ENTRANCES = {
    "sample.py": entrance(sample.main), "train.py": entrance(train.main, *NO_WEIGHTS),
    "study.evaluate": lambda words: evaluate.check_numbers(evaluate.parse_arguments(words)),
    "study.ablate": ablate.parse_arguments, "toy.pretrain": pretrain.parse_arguments,
    "clips.manifest": entrance(clips.main, "check", "/nowhere/m.jsonl"),
    "clips.cache": entrance(cache.main, "/nowhere/m.jsonl", *NO_WEIGHTS)}


def flags_in_help(parse, capsys) -> list[str]:
    with contextlib.suppress(SystemExit):
        parse(["--help"])
    words = {word.strip("[],") for word in capsys.readouterr().out.split()}
    return sorted(word for word in words if word.startswith("--") and word != "--help")


@RUNS
@pytest.mark.parametrize("name", ENTRANCES)
def test_any_command_line_is_refused_in_one_line(times, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    parse = ENTRANCES[name]
    flags = flags_in_help(parse, capsys)
    assert len(flags) > 4, flags

    @fuzz(40, times, st.lists(st.one_of(st.sampled_from(flags), WORDS), max_size=6))
    def holds(words):
        capsys.readouterr()
        with bounded():
            try:
                status = parse(words)
            except ValueError as error:
                assert len(str(error).splitlines()) == 1
                return
            except SystemExit as stop:
                status = stop.code
        told = capsys.readouterr().err
        assert told.count("error:") == (status == 2) and "Traceback" not in told, told

    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ nothing is executed from a file

# What can make code of a file's content. torch.save writes pickles; object collectives send them.
EXECUTES = re.compile(r"""
    import\ (pickle|cPickle|cloudpickle|dill|joblib|shelve|marshal|yaml|runpy|code)(\..*)?
  | eval | exec | compile | __import__ | importlib\.import_module
  | torch\.(load|save|jit\.load|hub|package) | os\.(system|popen) | ctypes\.CDLL
  | .*\.(broadcast|scatter)_object_list | .*gather_object
  | (allow_pickle|shell)=(?!False).*""", re.X)


def executions(source: str) -> list[str]:
    """Imports, names and keywords of a Python source that EXECUTES matches."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(f"import {node.module}")
        elif isinstance(node, ast.Name | ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.keyword):
            found.append(f"{node.arg}={ast.unparse(node.value)}")
    return list(filter(EXECUTES.fullmatch, found))


def test_no_source_can_run_what_a_file_holds():
    """Without exception for what users run; tests and bench may compile and import our own."""
    rooms = [path for path in ROOT.iterdir() if path.name not in ("tests", "bench")]
    sources = [*ROOT.glob("*.py"), *(path for room in rooms for path in room.glob("*.py"))]
    assert len(sources) > 30
    assert not {path: found for path in sources
                if (found := executions(path.read_text(encoding="utf-8")))}
    for line in ("import pickle", "from marshal import loads", "torch.load(x)", "eval(x)",
                 "np.load(p, allow_pickle=True)", "x = exec", "import yaml as y", "os.system(x)",
                 "dist.all_gather_object(a, b)"):
        assert executions(line), f"the walk misses {line!r}"
    assert not executions("model.eval(); re.compile('x'); torch.compile(f); x.load()")


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path):
    witness, module = tmp_path / "hacked", nn.Linear(2, 2)
    payload = b"cposix\nsystem\n(S'touch " + str(witness).encode() + b"'\ntR."
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({payload!r})"], check=True)
    assert witness.exists(), "the payload works where a pickle is loaded"
    witness.unlink()
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("model/data.pkl", payload)
    (tmp_path / "raw.pt").write_bytes(payload)
    (tmp_path / "two.pt").write_bytes(b"\x80\x02" + payload)
    (tmp_path / "config.json").write_bytes((TINY / "gemma" / "config.json").read_bytes())
    for path in sorted(tmp_path.glob("*.pt")):
        (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
        for load, *words in ((read_metadata, path), (load_faces, path), (open_picture, path),
                             (probe, path), (face.load_facenet, path), (read_lora, path, module),
                             (load_weights, module, path, ""), (load_gemma, tmp_path),
                             (Tokenizer, path), (check_text, path, TINY / "gemma")):
            assert outcome(load, *words) == "refused"
        with pytest.raises(SafetensorError):
            load_state(path)
        assert not witness.exists(), "the payload was run"
    with pytest.raises(ValueError, match="can run code"):
        read_metadata(tmp_path / "zip.pt")


def test_an_index_of_shards_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "config.json").write_bytes((TINY / "gemma" / "config.json").read_bytes())
    for name in ("../x.safetensors", "/etc/passwd", "a/b.safetensors"):
        index = json.dumps({"weight_map": {"x": name}})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="expected names of files beside"):
            load_gemma(tmp_path)
