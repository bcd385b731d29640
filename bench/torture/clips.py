"""Bad manifests, clips and options for the commands that read them; odd clips that have to work.

A row that cannot be used is no error of the command: `clips.manifest check` says why, goes on, and
ends with status 1. What makes the whole command senseless (no manifest, a size that is not legal,
weights of another kind) is refused with status 2 before anything is written; that holds for
clips.cache, train.py, study.evaluate, toy.pretrain and study.ablate as well.

Everything is made here with PyAV and Pillow, in the case's own folder, when the case is run.

Read next: bench/torture/faults.py
"""

import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.torture.harness import ROOT, WEIGHTS, Case
from tests.clipfiles import TURNS, draw_moving, faces_file, write, write_sound

SHAPES = ["--buckets", "32x48x9,48x32x9,32x48x1,48x32x1"]
TINY = ["--checkpoint-path", str(WEIGHTS / "model.safetensors"),
        "--gemma-root", str(WEIGHTS / "gemma")]
GOOD = {"video": "good.mp4", "caption": "a person nods"}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
PICKLE = b"\x80\x02cposix\nsystem\n(S'touch hacked'\ntR."
Prepare = Callable[[Path], object]


def nothing(folder: Path) -> None:
    pass


def check(manifest: str = "m.jsonl") -> list[str]:
    return ["clips.manifest", "check", manifest, *SHAPES, "--time-scale", "4",
            "--space-scale", "8"]


def listed(folder: Path, *rows: object) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "m.jsonl").write_text(lines, encoding="utf-8")


def row(name: str, says: str, change: object, prepare: Prepare = nothing,
        quick: bool = False) -> Case:
    """A manifest of one good row and one with this change: one is used, the other named."""
    def command(folder: Path) -> list[str]:
        write(folder / "good.mp4", count=10)
        prepare(folder)
        listed(folder, GOOD, GOOD | change if isinstance(change, dict) else change)
        return check()

    return Case(f"row: {name}", command, 1, rf"(?s)row 2: {says}.*1 of 2 rows are used",
                quick=quick)


def clip(name: str, says: str, make: Callable[[Path], object], file: str = "a.mp4",
         quick: bool = False) -> Case:
    """A manifest of one row whose clip `make` writes. says "" = it has to work."""
    def command(folder: Path) -> list[str]:
        make(folder / file)
        listed(folder, {"video": file, "caption": "a person nods"})
        return check()

    return Case(f"clip: {name}", command, 1 if says else 0,
                f"row 1: {says}" if says else "1 of 1 rows are used", quick=quick)


def manifest(name: str, says: str, data: bytes | None, file: str = "m.jsonl",
             prepare: Prepare = nothing, quick: bool = False) -> Case:
    """A manifest that cannot be read at all."""
    def command(folder: Path) -> list[str]:
        prepare(folder)
        if data is not None:
            (folder / file).write_bytes(data)
        return check(file)

    return Case(f"manifest: {name}", command, 2, says, quick=quick)


# ------------------------------------------------------------ rows


def elsewhere(folder: Path) -> None:
    """A link inside that leads outside, and one that leads to itself."""
    (folder / "link.mp4").symlink_to(ROOT / "README.md")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "folder.mp4").mkdir()


def references(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 60, 3), np.uint8)
    Image.fromarray(noise).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:2000])
    (folder / "words.png").write_text("not a picture\n")
    (folder / "empty.png").touch()
    (folder / "eps.png").write_bytes(EPS)
    header = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 10**6, 0, 0, 54, 40, 30000, 30000, 1, 24,
                         0, 0, 0, 0, 0, 0)
    (folder / "bomb.bmp").write_bytes(header + b"\0" * 1000)


def faces(text: str) -> Prepare:
    return lambda folder: (folder / "faces.json").write_text(text)


BOX = '{"frame_rate": 24, "size": [48, 72], "frames": [{"t": %s, "box": %s}]}'
NOT_A_TEXT = ((3, "3"), (True, "True"), (False, "False"), (0, "0"), (["a"], "list"),
              ({"a": 1}, "object"), ([], "nothing"))
FACES = {
    "not JSON": "{", "a list": "[]", "no size": '{"frame_rate": 24, "frames": []}',
    "turned": '{"frame_rate": 24, "size": [72, 48], "frames": []}',
    "rate 0": '{"frame_rate": 0, "size": [48, 72], "frames": []}',
    "10^400 wide": f'{{"frame_rate": 24, "size": [48, 1{"0" * 400}], "frames": []}}',
    "time NaN": BOX % ("NaN", "[1, 2, 3, 4]"), "box of three": BOX % ("0", "[1, 2, 3]"),
    "box inside out": BOX % ("0", "[9, 9, 1, 1]"),
    "box of texts": BOX % ("0", '["a", "b", "c", "d"]'), "nested 100,000 deep": "[" * 100_000}
ROWS = [
    *(row(f"{field} is {told}", rf"bad row: {field} is .*, not a text", {field: value})
      for field in ("video", "caption", "reference", "identity", "faces")
      for value, told in NOT_A_TEXT),
    row("is a number", "bad row: not a table", 1),
    row("is null", "bad row: not a table", None),
    row("is a text", "bad row: not a table", "a.mp4"),
    row("is a list", "bad row: not a table", [GOOD]),
    row("no video", "bad row: neither video nor media_path", {"video": None}),
    row("an empty video", "bad row: neither video nor media_path", {"video": ""}),
    row("no caption", "empty caption", {"caption": None}),
    row("a caption of spaces", "empty caption", {"caption": " \n\t"}),
    row("a caption of a million characters", "bad row: caption has 1,000,000 characters",
        {"caption": "x" * 10**6}, quick=True),
    row("half a character in the caption", "bad row: caption holds half a character",
        {"caption": "a \ud800 b"}),
    row("half a character in the video", "bad row: video holds half a character",
        {"video": "\udfff.mp4"}),
    row("a video of 5000 characters", "(missing file|path outside)", {"video": "x" * 5000}),
    row("a zero byte in the video", "missing file", {"video": "a\0b.mp4"}),
    row("line ends and colours in the video", r"missing file: [^\n\x1b]*none",
        {"video": "\x1b[31m\nrow 9: x\u2028none"}),
    row("a video that is not there", "missing file", {"video": "none.mp4"}, quick=True),
    row("a video that is a folder", "missing file", {"video": "folder.mp4"}, elsewhere),
    row("a video in the folder above", "path outside: .* contains ", {"video": "../good.mp4"},
        quick=True),
    row("a video by way of ..", "path outside", {"video": "out/../good.mp4"}),
    row("an absolute video elsewhere", "path outside", {"video": str(ROOT / "README.md")}),
    row("a device", "path outside", {"video": "/dev/zero"}),
    row("a link that leads outside", "path outside", {"video": "link.mp4"}, elsewhere, True),
    row("a link to itself", "(missing file|path outside)", {"video": "loop.mp4"}, elsewhere),
    row("a reference outside", "path outside", {"reference": "../ref.png"}),
    row("a reference that is not there", "bad reference", {"reference": "none.png"}),
    row("a reference that is a video", "bad reference", {"reference": "good.mp4"}),
    *(row(f"a reference: {name}", "bad reference", {"reference": name}, references)
      for name in ("cut.jpg", "words.png", "empty.png", "eps.png", "bomb.bmp")),
    row("faces outside", "path outside", {"faces": "/etc/hostname"}),
    row("faces that are not there", "bad faces file", {"faces": "none.json"}),
    *(row(f"faces: {name}", "bad faces file", {"faces": "faces.json"}, faces(text))
      for name, text in FACES.items()),
]

# ------------------------------------------------------------ clips


def cut(share: float, **how: object) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        write(path, count=24, draw=draw_moving, **how)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
    return make


def odd(**how: object) -> Callable[[Path], object]:
    return lambda path: write(path, **{"count": 10} | how)


def moving(kind: str) -> Callable[[Path], object]:
    first, *rest = [Image.new("RGB", (72, 48), (20 * k,) * 3) for k in range(9)]
    return lambda path: first.save(path, kind, save_all=True, append_images=rest, duration=40)


def playlist(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n"
                    f"file://{ROOT}/README.md\n")


VARIABLE = [0, 40, 90, 100, 180, 200, 260, 300, 380, 400, 460, 520]
CLIPS = [
    clip("sound only", "no video stream", write_sound, quick=True),
    clip("cut off, index first", "cut off", cut(0.8, options={"movflags": "+faststart"}),
         quick=True),
    clip("cut off, index last", "cut off", cut(0.8)),
    clip("the first 100 bytes", "cut off", cut(0.01)),
    clip("cut off Matroska", "cut off", cut(0.6), "a.mkv"),
    clip("cut off AVI", "cut off", cut(0.6, codec="mpeg4"), "a.avi"),
    clip("an animated WebP", "cannot be decoded: .* 9 pictures in one WEBP", moving("WEBP"),
         "a.webp"),
    clip("a TIFF of nine pages", "cannot be decoded: .* 9 pictures in one TIFF", moving("TIFF"),
         "a.tif"),
    clip("an animated PNG", "", moving("PNG"), "a.png"),
    clip("a video named as a picture", "",
         lambda p: write(p.with_suffix(".mp4"), count=10).rename(p), "a.png"),
    clip("mirrored", "", odd(matrix=[-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30])),
    clip("interlaced", "", odd(coder={"x264-params": "tff=1"})),
    clip("Matroska that starts late", "", odd(stamps=[3000 + 40 * k for k in range(10)]), "a.mkv"),
    clip("empty", "cannot be decoded", lambda p: p.touch()),
    clip("words", "cannot be decoded", lambda p: p.write_text("not a video\n" * 100)),
    clip("zeros", "cannot be decoded", lambda p: p.write_bytes(bytes(100_000))),
    clip("a playlist that names another file", "cannot be decoded", playlist),
    clip("a pickle", "cannot be decoded", lambda p: p.write_bytes(PICKLE)),
    clip("eight frames, which fill the bucket of one", "", odd(count=8)),
    clip("too small", "too small", odd(size=(24, 32))),
    clip("one frame", "", odd(count=1), quick=True),
    clip("variable frame rate", "", odd(count=12, stamps=VARIABLE), quick=True),
    *(clip(f"rotated, {turn}", "", odd(matrix=matrix), quick=turn == "clockwise")
      for turn, (matrix, _) in TURNS.items()),
    clip("odd sizes", "", odd(codec="ffv1", pix="bgr0", size=(47, 71)), "a.mkv", quick=True),
    clip("odd sizes, 4:2:0", "", odd(codec="ffv1", size=(47, 71)), "a.mkv"),
    clip("10-bit", "", odd(pix="yuv420p10le"), quick=True),
    clip("12 frames per second", "", odd(count=12, rate="12")),
    clip("240 frames per second", "", odd(count=120, rate="240")),
    clip("grey", "", odd(codec="ffv1", pix="gray"), "a.mkv"),
    clip("with transparency", "", odd(codec="ffv1", pix="yuva420p"), "a.mkv"),
    clip("a picture", "", lambda p: Image.new("RGB", (72, 48)).save(p), "a.png"),
    clip("another name's ending", "", lambda p: write(p.with_suffix(".mkv"), count=10).rename(p)),
]

# ------------------------------------------------------------ manifests


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "m.jsonl")


MANIFESTS = [
    manifest("missing", "no such file", None),
    manifest("a folder", "a folder", None, "out"),
    manifest("a pipe", "no such file", None, prepare=a_pipe),
    manifest("empty", "expected rows in .*, got none", b"", quick=True),
    manifest("only empty lines", "expected rows in .*, got none", b"\n \n\n"),
    manifest("not UTF-8", "utf-8", b'{"video": "a.mp4", "caption": "caf\xe9"}\n', quick=True),
    manifest("UTF-16", "utf-8", '{"video": "a.mp4"}'.encode("utf-16")),
    manifest("another ending", "its name ends otherwise", b"a.mp4\n", "m.txt"),
    manifest("JSON cut off", "got", b'[{"video": "a.mp4",', "m.json"),
    manifest("JSON without a list", "no list inside", b'{"rows": []}', "m.json"),
    manifest("JSON, an empty list", "expected rows", b"[]", "m.json"),
    manifest("JSON nested 100,000 deep", "nested deeper than 32 levels", b"[" * 100_000,
             "m.json", quick=True),
    manifest("JSON, a number of 10,000 digits", "got", b"9" * 10_000, "m.json"),
    manifest("CSV, a quote that never ends", "got", b'video,caption\n"a.mp4,x\n', "m.csv"),
    manifest("CSV, a field of a million characters", "field larger",
             b"video,caption\na.mp4," + b"x" * 10**6, "m.csv"),
]

# ------------------------------------------------------------ options


def files(folder: Path) -> None:
    """Weights that are none, a manifest without a usable row, a file where a folder should be."""
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors",
              {"config": '{"transformer": {}}'})
    save_file({"diffusion_model.a.lora_A.weight": torch.zeros(1, 1)},
              folder / "lora.safetensors")
    (folder / "evil.pt").write_bytes(PICKLE)
    (folder / "file").write_text("a file\n")
    listed(folder, {"video": "none.mp4", "caption": "x"})
    faces_file(folder / "faces.json", [0])


def options(command: str, before: Sequence[str], *rows: tuple, quick: object = None) -> list[Case]:
    """A command that would work, or nearly, and then the words of each row; `files` are there.

    rows: the words (a text is split at blanks), what the refusal says. quick: the row of --quick.
    """
    cases = []
    for given, says in rows:
        words = given.split() if isinstance(given, str) else given

        def prepare(folder: Path, words: list[str] = words) -> list[str]:
            files(folder)
            return [command, *before, *words]

        name = f"{command}: {' '.join(words)[-44:]}"
        cases.append(Case(name, prepare, 2, says, quick=given == quick))
    return cases


CHECKED = options(
    "clips.manifest", ("check", "none.jsonl"),
    ("--buckets 32x48", "expected buckets such as"),
    (["--buckets", ""], "expected buckets such as"),
    ("--buckets 33x48x9", "multiples of 32"), ("--buckets 0x0x0", "multiples of 32"),
    ("--buckets=-32x-32x9", "multiples of 32"), ("--buckets 32x64x8", r"8k\+1 frames"),
    ("--buckets axbxc", "expected buckets such as"), ("--frame-rate 0", "frame rate above 0"),
    ("--frame-rate -24", "frame rate above 0"), ("--frame-rate nan", "frame rate above 0"),
    ("--frame-rate inf", "frame rate above 0"), ("--frame-rate fast", "--frame-rate"),
    ("--time-scale 0", "scales of at least 1"), ("--space-scale -8", "scales of at least 1"),
    ("--no-such-flag", "unrecognized|No such|no-such-flag"), ("--root", "--root"))
CHECKED.append(Case("clips.manifest: an unknown command",
                    lambda folder: ["clips.manifest", "chek", "m.jsonl"], 2, "chek"))

WEIGHTS_WRONG = (
    ("--checkpoint-path none.safetensors", "no file at"),
    ("--checkpoint-path evil.pt", "a pickle .* can run code and is never opened"),
    ("--checkpoint-path lora.safetensors", "a LoRA"),
    ("--checkpoint-path file", "another kind"), ("--checkpoint-path other.safetensors", "expected"),
    ("--checkpoint-path out", "a folder"),
    ("--gemma-root none", "config.json"), ("--gemma-root file", "config.json"))
REST = (*TINY, *SHAPES, "--folder", "out/cache")
NO_MANIFEST = ["none.jsonl", *REST]
CACHE = [
    *options("clips.cache", ("m.jsonl", *REST), *WEIGHTS_WRONG,
             ("--buckets 30x48x9", "multiples of 8"), ("--frame-rate nan", "frame rate above 0"),
             ("--device tpu", "expected a device of this machine"),
             ("--offload-text moon", "moon")),
    *options("clips.cache", (), (NO_MANIFEST, "no such file"), ("", "required"),
             quick=NO_MANIFEST)]

TRAINING = [*TINY, "--face", str(WEIGHTS / "face.safetensors"), "--out", "out/run", "--steps", "1",
            "--manifest", "m.jsonl", *SHAPES, "--cache", "out/cache"]
NUMBERS = """steps 0, steps -3, steps many, steps 1.5, batch 0, batch -1, accumulate 0, rank 0,
    rank -4, lr nan, lr inf, lr -1, lr 0, drop-ref 1.5, drop-both nan,
    drop-text -0.1, w-face -1, w-face nan, w-id inf, augment-color nan, augment-pose -1,
    final-lr nan, minutes nan, seed -1, seed 1e3, validate-every 0, save-seconds -1,
    frame-rate nan, placement beside, optimizer sgd, precision fp8"""
TRAIN = [
    *options("train.py", TRAINING, *((f"--{given.strip()}", f"--{given.split()[0]}")
                                     for given in NUMBERS.split(",")), quick="--lr nan"),
    *options("train.py", TRAINING, *WEIGHTS_WRONG,
             ("--face none.safetensors", "no (such )?file"), ("--face evil.pt", "pickle"),
             ("--manifest none.jsonl", "no such file"), ("--buckets 31x48x9", "multiples of 8"),
             ("--out file", "; "), ("--optimizer muon", "--full"),
             ("--validation none.jsonl", "; ")),
    *options("train.py", (), (TRAINING, "expected .*row|usable|used|clips"), quick=TRAINING)]

EVALUATE = options(
    "study.evaluate", (*TINY, "--people", "4", "--folder", "out/rows",
                       "--output-path", "out/e.json"),
    ("--people 0", "--people"), ("--people -1", "--people"), ("--people 999999999", "; "),
    ("--people x", "--people"), ("--prompts 0", "--prompts"),
    ("--num-inference-steps 0", "--num-inference-steps"), ("--text-scale nan", "-scale"),
    ("--ref-scale -1", "--ref-scale"), ("--ref-scale inf", "--ref-scale"),
    ("--rescale 2", "--rescale"), ("--guide-range 1 0", "; "), ("--guide-range nan 1", "; "),
    ("--guide-every 0", "; "), ("--seed -1", "--seed"), ("--split train", "split"),
    ("--order x", "order"), ("--rows x", "rows"), ("--dtype fp8", "dtype"),
    ("--eval-encoder none.safetensors", "no file"), ("--head evil.pt", "; "),
    ("--output-path file/e.json", "; "), ("--folder file", "; "), ("--videos none", "; "),
    ("--videos out", "; "), ("--videos file", "; "), *WEIGHTS_WRONG)
PRETRAIN = options(
    "toy.pretrain", (), ("sing", "sing"), ("", "stage"), ("vae --steps 0", "; "),
    ("base --steps -1", "; "), ("vae --steps x", "--steps"), ("base --batch 0", "; "),
    ("vae --minutes nan", "; "), ("render --clips 0", "; "), ("render --clips -5", "; "),
    ("face --seed -1", "; "), ("head_pose --wide", "--wide"))
ABLATE = options(
    "study.ablate", ("run", "--folder", "out/a", *TINY), ("--steps 0", "--steps"),
    ("--batch -1", "--batch"), ("--people 1", "--people"), ("--jobs 0", "--jobs"),
    ("--minutes nan", "--minutes"), ("--seeds 1 1", "--seeds"), ("--seeds -1", "--seeds"),
    ("--seeds x", "--seeds"), ("--only all", "--only"),
    ("--num-inference-steps 0", "--num-inference-steps"))
ABLATE += options("study.ablate", (), ("fly", "fly"))

CASES = [*ROWS, *CLIPS, *MANIFESTS, *CHECKED, *CACHE, *TRAIN, *EVALUATE, *PRETRAIN, *ABLATE]
