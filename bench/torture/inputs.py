"""Bad inputs of sample.py, and odd ones that have to work.

Pictures, prompts, sizes, scales, outputs, weights, text models, LoRAs: each row says how a folder
is prepared, what is typed, and what must be printed; harness.py runs them and compares. Good cases
make a real video (one frame, one step) on the bundled weights, and the picture sheet must show the
reference as it was meant: upright, in its colours, on white where it was transparent.

Two folders here cannot be written to by root either: /proc, and a path whose folder is a file. A
limit on the size of files is, to a command, what a full disk is.

Read next: bench/torture/clips.py
"""

import json
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from bench.torture.harness import ROOT, WEIGHTS, Case
from reference import letterbox

OUT = ("out.json", "out.mp4", "out.png")
FACE = ROOT / "examples" / "ada.png"
FAST = ["--num-inference-steps", "1", "--num-frames", "1", "--text-scale", "1", "--ref-scale", "1",
        "--device", "cpu"]
SAMPLING = 30  # seconds of processor time, far more than a video of one frame needs
QUICK = True   # at the end of a row: part of --quick
WORKS = {"status": 0, "leaves": OUT, "seconds": SAMPLING}
Write = Callable[[Path], object]


def sample(*more: str, ref: object = FACE, prompt: str = "a person in a red shirt") -> list[str]:
    """A command that would work; `more` comes last and so replaces what stands before."""
    return ["sample.py", "--ref", str(ref), "--prompt", prompt, "--output-path", "out/out.mp4",
            *FAST, *more]


def refusals(*rows: tuple, **options: object) -> list[Case]:
    """Rows of name, words (a text is split at blanks), what is printed, and perhaps QUICK."""
    cases = []
    for name, given, says, *quick in rows:
        words = given.split() if isinstance(given, str) else given
        cases.append(Case(name, lambda folder, words=words: sample(*words), says=says,
                          quick=bool(quick), **options))
    return cases


def works(*rows: tuple) -> list[Case]:
    return refusals(*rows, **WORKS)


# ------------------------------------------------------------ pictures


def drawing(mode: str = "RGB", size: tuple[int, int] = (60, 90)) -> Image.Image:
    """Three bands: upside down, mirrored or in wrong colours it is another picture."""
    image = Image.new("RGB", size, (230, 150, 100))
    draw, (w, h) = ImageDraw.Draw(image), size
    draw.rectangle([0, h // 3, w, 2 * h // 3], fill=(40, 160, 60))
    draw.rectangle([w // 2, 2 * h // 3, w, h], fill=(30, 50, 180))
    return image.convert(mode)


def sheet_shows(folder: Path, meant: Image.Image, tolerance: float) -> str:
    """"" if the first picture of out.png is `meant` on its canvas, at any enlargement."""
    with Image.open(folder / "out" / "out.png") as sheet:
        side = sheet.height
        shown = sheet.convert("RGB").crop((0, 0, side, side))
        seen = np.asarray(shown.resize((64, 64), Image.Resampling.BOX), float)
    wanted = ((letterbox(meant, 64, 64) + 1) * 127.5).permute(1, 2, 0).numpy()
    found = float(np.abs(seen - wanted).mean())
    return "" if found <= tolerance else (
        f"the reference on the sheet differs by {found:.1f} of 255, more than {tolerance}")


def picture(name: str, file: str, write: Write, meant: Image.Image | None = None,
            tolerance: float = 6, quick: bool = False, says: str = "") -> Case:
    """A picture that has to work. `write` saves it; `meant`: how it looks."""
    def command(folder: Path) -> list[str]:
        write(folder / file)
        return sample(ref=file)
    return Case(name, command, says=says, quick=quick, **WORKS,
                check=lambda folder: sheet_shows(folder, meant or drawing(), tolerance))


def no_picture(name: str, file: str, write: Write,
               says: str = "expected a readable picture") -> Case:
    def command(folder: Path) -> list[str]:
        write(folder / file)
        return sample(ref=file)
    return Case(name, command, says=says, quick=True)


def png(width: int, height: int, rows: bytes = b"", depth: int = 8) -> bytes:
    """A PNG written by hand; `rows` are the filtered rows, possibly fewer than promised."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        data = kind + data
        return struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def exif(path: Path, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    turned = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180}  # as it was held
    drawing().transpose(turned[orientation]).save(path, exif=tags, quality=95)


def animated(path: Path) -> None:
    black = Image.new("RGB", (60, 90), "black")
    drawing().save(path, save_all=True, append_images=[black] * 2, duration=100)


def see_through(path: Path) -> None:
    """The left half is transparent, with black below: it has to become white."""
    image = drawing("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 30, 90))
    image.save(path)


def on_white() -> Image.Image:
    image = drawing()
    image.paste((255, 255, 255), (0, 0, 30, 90))
    return image


def sixteen_bit_grey(path: Path) -> None:
    Image.fromarray(np.asarray(drawing("L")).astype(np.uint16) * 257).save(path)


def thirty_two_bit_grey(path: Path) -> None:
    Image.fromarray(np.asarray(drawing("L")).astype(np.int32) * 257).save(path)


def sixteen_bit_color(path: Path) -> None:
    rows = np.asarray(drawing()).astype(">u2") * 257  # (h, w, 3)
    path.write_bytes(png(60, 90, b"".join(b"\0" + row.tobytes() for row in rows), depth=16))


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def flip(path: Path, place: int, bit: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def small_video(path: Path) -> None:
    black = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(3):
            file.mux(stream.encode(black))
        file.mux(stream.encode())


def jpeg(path: Path) -> None:
    drawing(size=(400, 600)).save(path, "JPEG", quality=95)


EPS = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(owned) (w) file closefile\n"
       b"showpage\n")
ONE_WIDE = {height: Image.new("RGB", (1, height), "brown") for height in (1, 4000)}
PICTURES = [
    picture("animated GIF", "a.gif", animated, tolerance=10, quick=True),
    picture("animated PNG", "a.png", animated),
    picture("animated WebP", "a.webp", animated, tolerance=10),
    picture("PNG of 16 bits, grey", "a.png", sixteen_bit_grey, drawing("L")),
    picture("PNG of 16 bits, colour", "a.png", sixteen_bit_color, quick=True),
    picture("palette", "a.png", lambda p: drawing("P").save(p), tolerance=25),
    picture("palette with transparency", "a.gif",
            lambda p: drawing("P").save(p, transparency=255), tolerance=25),
    picture("one bit per pixel", "a.png", lambda p: drawing("1").save(p), drawing("1"), 10),
    picture("CMYK", "a.jpg", lambda p: drawing("CMYK").save(p, quality=95), tolerance=10),
    picture("RGBA", "a.png", see_through, on_white(), quick=True),
    picture("grey with alpha", "a.png", lambda p: drawing("LA").save(p), drawing("L")),
    picture("grey", "a.jpg", lambda p: drawing("L").save(p, quality=95), drawing("L")),
    picture("EXIF: turned by 90 degrees", "a.jpg", lambda p: exif(p, 6), quick=True),
    picture("EXIF: upside down", "a.jpg", lambda p: exif(p, 3)),
    picture("EXIF is rubbish", "a.jpg",
            lambda p: drawing().save(p, exif=b"Exif\0\0" + b"\xff" * 40, quality=95)),
    picture("BMP", "a.bmp", lambda p: drawing().save(p)),
    picture("TIFF of 32 bits", "a.tif", thirty_two_bit_grey, drawing("L")),
    picture("a name without ending, with spaces and a line break", "a \n face",
            lambda p: drawing().save(p, "PNG")),
    *(picture(f"1 x {height} pixels", "a.png", image.save, image,
              says=f"1x{height} pixels, too few to show a face")
      for height, image in ONE_WIDE.items()),
    *refusals(
        ("picture missing", "--ref gone.png", "got no such file", QUICK),
        ("picture is a folder", "--ref out", "got a folder", QUICK),
        ("picture is a device", "--ref /dev/zero", "expected a picture", QUICK),
        ("picture with a name of 5000 characters", ["--ref", "x" * 5000],
         "--ref|File name too long")),
    no_picture("picture is empty", "a.png", lambda p: p.touch()),
    no_picture("picture is text", "a.png", lambda p: p.write_text("not a picture")),
    no_picture("JPEG cut off", "a.jpg", lambda p: (jpeg(p), cut(p))),
    no_picture("JPEG of 20 bytes", "a.jpg",
               lambda p: (jpeg(p), p.write_bytes(p.read_bytes()[:20])), "readable"),
    no_picture("PNG cut off", "a.png", lambda p: (drawing().save(p), cut(p))),
    no_picture("PNG with a flipped bit", "a.png", lambda p: (drawing().save(p), flip(p, 60))),
    no_picture("30000 x 30000 pixels: a decompression bomb", "a.png",
               lambda p: p.write_bytes(png(30_000, 30_000, b"\0" * 10**6)), "30000|900000000"),
    no_picture("13000 x 13000 pixels promised, a few rows there", "a.png",
               lambda p: p.write_bytes(png(13_000, 13_000, b"\0" * 10**6))),
    no_picture("a picture of no pixels", "a.png", lambda p: p.write_bytes(png(0, 0))),
    no_picture("a video given as picture", "a.mp4", small_video),
    no_picture("a video that is called .png", "a.png", small_video),
    no_picture("PostScript, which a picture library would have run", "a.eps",
               lambda p: p.write_bytes(EPS), "readable picture"),
    no_picture("a checkpoint as picture", "a.png",
               lambda p: shutil.copy(WEIGHTS / "model.safetensors", p), "readable"),
]


# ------------------------------------------------------------ prompts


def prompt(name: str, text: str, says: str = "", quick: bool = False) -> Case:
    return Case(name, lambda folder: sample(prompt=text), says=says, quick=quick, **WORKS)


CUT = "has [0-9]+ tokens, only the first 48"
PROMPTS = [
    prompt("prompt is empty", "", "warning: the prompt", quick=True),
    prompt("prompt of spaces", " \t\n ", "warning: the prompt"),
    prompt("prompt of control characters", "\x01\x02\x07\x1b\x7f", "warning: the prompt"),
    prompt("prompt of 100 000 characters", "a person laughs, " * 5882, CUT, quick=True),
    prompt("prompt of 100 000 characters without a space", "a" * 100_000, CUT),
    prompt("prompt of 30 000 Chinese characters", "一个人微笑" * 6000, CUT),
    prompt("prompt in Arabic, Devanagari, Greek and emoji",
           "شخص يضحك व्यक्ति άνθρωπος 🙂‍↔️ 👩🏽"),
    prompt("prompt with a lone surrogate", "a person\udcff\ud800 laughs",
           "warning: a prompt holds bytes"),
    prompt("prompt of names of special pieces", "<bos><eos><pad><unk><0x00> \u2581"),
    prompt("prompt that looks like a template", "{prompt} %s %(x)s $HOME `ls` '\"\\"),
    *works(("negative prompt of 100 000 characters", ["--negative-prompt", "blurred " * 12_500],
            "the negative prompt has [0-9]+ tokens")),
    Case("prompt missing", lambda folder: ["sample.py", "--ref", str(FACE)],
         says="required: --prompt", quick=True),
    Case("picture and prompt missing", lambda folder: ["sample.py"],
         says="required: --ref, --prompt"),
]

# ------------------------------------------------------------ sizes, steps, scales

ABSURD = "would take at least [0-9.]+ [GTPE]B.*this machine has [0-9.]+ [GT]B"
STEPS = "--num-inference-steps"
NUMBERS = [
    *refusals(
        ("height between sizes", "--height 65", "multiple of 8, got 65; use 64 or 72", QUICK),
        ("height zero", "--height 0", "use 8", QUICK),
        ("width negative", "--width -64", "--width .*use 8", QUICK),
        ("frames between sizes", "--num-frames 8", "use 5 or 9"),
        ("frames zero", "--num-frames 0", "use 1"),
        ("frames negative", "--num-frames -8", "use 1"),
        ("sides of 800 000", "--height 800000 --width 800000", ABSURD, QUICK),
        ("a side of 8 * 10^18", "--height 8000000000000000000", "--height"),
        ("a side with 30 digits", "--height 8" + "0" * 29, "--height", QUICK),
        ("a side with 5000 digits", "--height " + "8" * 5000, "--height"),
        ("40 000 001 frames", "--num-frames 40000001", ABSURD, QUICK),
        ("10 000 frames of 8192 x 8192", "--num-frames 10001 --height 8192 --width 8192", ABSURD),
        ("not a whole number", "--height 64.5", "invalid int value"),
        ("not a number", ["--frame-rate", "\x1b[31mfast\n"], "invalid float value", QUICK),
        ("steps zero", f"{STEPS} 0", f"{STEPS} between 1", QUICK),
        ("steps negative", f"{STEPS} -3", f"{STEPS} between 1"),
        ("steps absurd", f"{STEPS} 1000000000", f"{STEPS} between 1"),
        ("--guide-every zero", "--guide-every 0", "every 0", QUICK),
        ("--guide-every negative", "--guide-every -2", "every -2"),
        ("--guide-range upside down", "--guide-range 0.9 0.1", "0.9 to 0.1", QUICK),
        ("--guide-range NaN", "--guide-range nan 1", "nan"),
        ("--guide-range infinite", "--guide-range 0 inf",
         "--guide-range between 0 and 1, got inf"),
        ("--guide-range of one number", "--guide-range 0.5", "expected 2 arguments")),
    *works(("--guide-range of one level, every third step",
            "--guide-range 0.4 0.4 --guide-every 3", "")),
    *refusals(("seed negative", "--seed -1", "--seed between 0"),
              ("seed of 2^63", f"--seed {2**63}", "--seed between 0")),
    *works(("largest seed", f"--seed {2**63 - 1}", ""),
           ("largest scales", "--text-scale 1000 --ref-scale 1000", "")),
    *refusals(
        ("--stg-blocks beyond the model", "--stg-scale 1 --stg-blocks 6", "between 0 and 5, got 6"),
        ("unknown flag with an escape sequence", ["--\x1b[2Jhieght", "64"], "unrecognized", QUICK),
        ("unknown order", "--order face_first", "invalid choice"),
        ("no such device", "--device tpu", "invalid choice"),
        ("--plan of an absurd size", "--plan --height 8000000000 --width 8000000000", "--height"),
        ("--plan of a NaN", "--plan --text-scale nan", "finite")),
    *(Case(f"--{flag} {value}", lambda folder, word=f"--{flag}={value}": sample(word),
           says=f"--{flag} between", quick=value == "nan")
      for flag in ("text-scale", "ref-scale", "rescale", "stg-scale", "frame-rate")
      for value in ("nan", "inf", "-inf", "-1e9")),
]


# ------------------------------------------------------------ outputs


def old_files(folder: Path) -> None:
    """What an earlier run left; harness.py compares it afterwards."""
    for name in OUT:
        (folder / "out" / name).write_bytes(b"the result of yesterday, " * 40)


def over_old(name: str, *more: str, says: str, **options: object) -> Case:
    def command(folder: Path) -> list[str]:
        old_files(folder)
        nan_inside(folder / "nan.safetensors", "vae.decoder.conv_out.conv.bias")
        return sample(*more)
    return Case(name, command, says=says, leaves=OUT, seconds=SAMPLING, **options)


def replaced(folder: Path) -> str:
    stale = [name for name in OUT
             if (folder / "out" / name).read_bytes().startswith(b"the result of yesterday")]
    return f"not replaced: {', '.join(stale)}" if stale else ""


def a_folder_there(folder: Path) -> list[str]:
    (folder / "out" / "out.json").mkdir()
    return sample()


def a_link_there(folder: Path) -> list[str]:
    (folder / "elsewhere.mp4").write_bytes(b"another file")
    (folder / "out" / "out.mp4").symlink_to(folder / "elsewhere.mp4")
    return sample()


def a_file_for_a_folder(folder: Path) -> list[str]:
    (folder / "file").write_text("no folder")
    return sample("--output-path", "file/out.mp4")


def the_reference_there(folder: Path) -> list[str]:
    shutil.copy(FACE, folder / "out" / "out.png")
    return sample(ref="out/out.png")


OUTPUTS = [
    *refusals(("output in a missing folder", "--output-path gone/out.mp4",
               "existing output folder", QUICK)),
    Case("output in a folder that is a file", a_file_for_a_folder, says="existing output folder",
         quick=True),
    *refusals(
        ("output where nobody may write", "--output-path /proc/out.mp4", "writable folder", QUICK),
        ("output is no mp4", "--output-path out/out.avi", "ending in .mp4"),
        ("output without a name", "--output-path out/.mp4", "ending in .mp4"),
        ("output with a name as long as a name may be", f"--output-path out/{'x' * 251}.mp4",
         "writable|too long", QUICK),
        ("output with a name that is no text", "--output-path out/\udcff.mp4", "--output-path")),
    Case("the sheet's place is a folder", a_folder_there, says="got a folder",
         leaves=("out.json",), quick=True),
    Case("output is a link: the link is replaced, not what it names", a_link_there, **WORKS),
    Case("output would replace the reference", the_reference_there, says="the reference itself",
         leaves=("out.png",), quick=True),
    Case("older files are replaced by whole ones", lambda folder: (old_files(folder), sample())[1],
         check=replaced, quick=True, **WORKS),
    over_old("older files stay when the decoder gives NaN", "--checkpoint-path", "nan.safetensors",
             says="NaN", quick=True),
    over_old("older files stay when files may not grow beyond 4 kB", says="too large|space",
             file_bytes=4096, quick=True),
    over_old("older files stay when files may not grow beyond 40 kB", says="too large|space",
             file_bytes=40_960),
]


# ------------------------------------------------------------ weights


def parts(path: Path) -> tuple[dict, bytes]:
    """Table and numbers of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(table: dict | bytes, numbers: bytes) -> bytes:
    """Inverse of `parts`."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + numbers


def nan_inside(path: Path, name: str) -> None:
    """The bundled checkpoint with one tensor of NaN (all bits set, in every type)."""
    table, numbers = parts(WEIGHTS / "model.safetensors")
    begin, end = table[name]["data_offsets"]
    path.write_bytes(joined(table, numbers[:begin] + b"\xff" * (end - begin) + numbers[end:]))


def weights(name: str, change: Write, says: str = "expected", quick: bool = False,
            **options: object) -> Case:
    """change(path) writes or spoils a copy of the checkpoint."""
    def command(folder: Path) -> list[str]:
        shutil.copy(WEIGHTS / "model.safetensors", folder / "w.safetensors")
        change(folder / "w.safetensors")
        return sample("--checkpoint-path", "w.safetensors")
    return Case(name, command, says=says, quick=quick, **options)


def header(name: str, change: Callable[[dict], object], says: str = "expected",
           **options: object) -> Case:
    """change(table) edits the checkpoint's table, whose "config" is parsed for it."""
    def write(path: Path) -> None:
        table, numbers = parts(path)
        metadata = table["__metadata__"]
        metadata["config"] = json.loads(metadata["config"])
        change(table)
        config = metadata.get("config")
        if config is not None and not isinstance(config, str):
            metadata["config"] = json.dumps(config)
        path.write_bytes(joined(table, numbers))
    return weights(name, write, says, **options)


ABSENT = object()


def put(data: dict, *path: object) -> None:
    """put(data, "a", "b", value): data["a"]["b"] = value; ABSENT removes it."""
    *way, key, value = path
    for step in way:
        data = data[step]
    if value is ABSENT:
        del data[key]
    else:
        data[key] = value


def config(*path: object) -> Case:
    """The checkpoint's config with one value changed: path of keys, then the value."""
    *keys, value = path
    told = "missing" if value is ABSENT else f"= {value!r}"
    return header(f"config: {' '.join(keys)} {told}",
                  lambda table: put(table["__metadata__"]["config"], *path))


CODE = b"cos\nsystem\n(S'touch owned'\ntR."  # unpickling this text calls os.system("touch owned")


def zipped_code(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", CODE)
        file.writestr("archive/version", "3")


def lora_as_checkpoint(path: Path) -> None:
    path.write_bytes(joined(pair("transformer_blocks.0.attn1.to_q", [2, 2], [2, 2],
                                 {"reference_placement": "tass"}), bytes(32)))


def pair(target: str, a: list[int], b: list[int], metadata: dict | None = None) -> dict:
    """A LoRA's table: two tensors of float32 that share the file's zeros."""
    table, at = {"__metadata__": metadata or {}}, 0
    for end, shape in (("lora_A", a), ("lora_B", b)):
        size = 4 * shape[0] * shape[1]
        table[f"diffusion_model.{target}.{end}.weight"] = {
            "dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return table


MODEL, FIRST = "model.diffusion_model.", "model.diffusion_model.patchify_proj.weight"
NANS = {"the transformer": MODEL + "transformer_blocks.3.attn1.to_q.weight",
        "the VAE's encoder": "vae.encoder.conv_in.conv.weight",
        "the VAE's decoder": "vae.decoder.conv_in.conv.weight",
        "the connector": MODEL + "video_embeddings_connector.learnable_registers"}
LFS = "version https://git-lfs.github.com/spec/v1\n"
WEIGHT_FILES = [
    *refusals(("weights missing", "--checkpoint-path gone.safetensors", "got no file", QUICK),
              ("weights are a folder", "--checkpoint-path out", "got a folder"),
              ("weights are a device", "--checkpoint-path /dev/zero", "got no file")),
    weights("weights empty", lambda p: p.write_bytes(b""), "an empty file", quick=True),
    weights("weights cut off", cut, "cut off", quick=True),
    weights("weights cut off by one byte", lambda p: p.write_bytes(p.read_bytes()[:-1]), "cut off"),
    weights("weights cut off inside the header", lambda p: p.write_bytes(p.read_bytes()[:1000]),
            "cut off"),
    weights("weights of 5 bytes", lambda p: p.write_bytes(b"\x01\0\0\0\0"), quick=True),
    weights("a header of 2^63 bytes", lambda p: p.write_bytes(b"\0" * 7 + b"\x80{}" + bytes(99)),
            quick=True),
    weights("a header nested 100 000 deep",
            lambda p: p.write_bytes(joined(b'{"a":' * 10**5 + b"0" + b"}" * 10**5, b""))),
    weights("a text called .safetensors", lambda p: p.write_text("weights, promised"), quick=True),
    weights("a web page called .safetensors", lambda p: p.write_text("<html>Please log in</html>"),
            "a web page"),
    weights("a git-lfs pointer", lambda p: p.write_text(LFS), "git lfs pull"),
    weights("the text model's weights",
            lambda p: shutil.copy(WEIGHTS / "gemma" / "model.safetensors", p), "gemma-root",
            quick=True),
    weights("the face model's weights", lambda p: shutil.copy(WEIGHTS / "face.safetensors", p)),
    weights("a LoRA as checkpoint", lora_as_checkpoint, "a LoRA; give it with --lora", quick=True),
    weights("a pickle that would run a command", lambda p: p.write_bytes(CODE), quick=True),
    weights("a binary pickle", lambda p: p.write_bytes(b"\x80\x04" + CODE), "never opened"),
    weights("a .pt archive that would run a command", zipped_code, "never opened", quick=True),
    *(weights(f"header with a flipped bit at byte {place}", lambda p, place=place: flip(p, place),
              quick=place < 9) for place in (0, 3, 7, 8, 9, 39_000)),
    *(weights(f"NaN in {where}", lambda p, name=name: nan_inside(p, name), "NaN", seconds=SAMPLING)
      for where, name in NANS.items()),
    header("config is not JSON", lambda t: t["__metadata__"].update(config="{not JSON"),
           "expected JSON", quick=True),
    header("config is a list", lambda t: t["__metadata__"].update(config="[1]"), "an object"),
    header("config nested 100 000 deep",
           lambda t: t["__metadata__"].update(config="[" * 10**5 + "]" * 10**5)),
    header("no config", lambda t: t["__metadata__"].pop("config"), "'config'"),
    header("a tensor is missing", lambda t: t.pop(FIRST), quick=True),
    header("a tensor has another name", lambda t: t.update({"other": t.pop(FIRST)}), FIRST),
    header("a tensor has another shape", lambda t: t[FIRST].update(shape=t[FIRST]["shape"][::-1]),
           "shape"),
    header("a tensor has negative sides", lambda t: t[FIRST].update(shape=[-1, -1])),
    header("a tensor of whole numbers", lambda t: t[FIRST].update(dtype="I16"), "floating-point"),
    header("a tensor of a type that nobody knows", lambda t: t[FIRST].update(dtype="F99")),
    header("offsets beyond the file",
           lambda t: t[FIRST].update(data_offsets=[10**15, 10**15 + 8])),
    header("trained with a placement of another name",
           lambda t: t["__metadata__"].update(reference_placement="sideways"), "sideways"),
    *(config(part, value) for part in ("transformer", "vae")
      for value in (ABSENT, [], "x", 3, None, {})),
    *(config("inference", value) for value in ([], "x", 3)),
    *(config("transformer", key, value)
      for key in ("num_layers", "num_attention_heads", "attention_head_dim", "connector_num_layers",
                  "text_max_length", "connector_num_learnable_registers", "in_channels")
      for value in (-1, 0, "x", [6], None, 10**12)),
    config("transformer", "positional_embedding_max_pos", [2, "x", 128]),
    config("transformer", "positional_embedding_max_pos", 3),
    config("transformer", "norm_eps", "small"),
    config("transformer", "positional_embedding_max_pos", []),
    *(config("transformer", key, "x")
      for key in ("positional_embedding_theta", "cross_attention_dim", "timestep_scale_multiplier",
                  "connector_positional_embedding_max_pos")),
    *(config("vae", key, value)
      for key in ("latent_channels", "patch_size", "encoder_base_channels")
      for value in (-1, 0, "x", None, 10**12)),
    *(config("vae", "encoder_blocks", value)
      for value in ([], "x", [["x", 1]], [["res_x", {}]], [["res_x", {"num_layers": 10**12}]], [1],
                    {"a": 1})),
    *(config("inference", key, value)
      for key in ("width", "num_frames", "frame_rate", "steps", "text_scale", "schedule_tokens",
                  "reference_psnr_floor", "guide_range", "stg_blocks")
      for value in ("x", [], {})),
]


# ------------------------------------------------------------ the text model's folder, and LoRAs


def gemma(name: str, change: Write, says: str = "expected", **options: object) -> Case:
    """change(folder) spoils a copy of the text model's folder."""
    def command(folder: Path) -> list[str]:
        shutil.copytree(WEIGHTS / "gemma", folder / "gemma")
        change(folder / "gemma")
        return sample("--gemma-root", "gemma")
    return Case(name, command, says=says, **options)


def rewritten(file: str, *path: object, says: str = "expected") -> Case:
    """A JSON file of the folder with one value changed: path of keys, then the value."""
    def write(folder: Path) -> None:
        data = json.loads((folder / file).read_text(encoding="utf-8"))
        put(data, *path)
        (folder / file).write_text(json.dumps(data), encoding="utf-8")

    *keys, value = path
    told = "missing" if value is ABSENT else f"= {value!r}"
    return gemma(f"{file}: {'.'.join(keys)} {told}", write, says)


def texts(file: str) -> list[Case]:
    """A file that should be a JSON object and is not."""
    deep = '{"a":' * 10**5 + "1" + "}" * 10**5
    kinds = {"missing": lambda p: p.unlink(), "empty": lambda p: p.write_bytes(b""), "cut off": cut,
             "not JSON": lambda p: p.write_text("{'a': 1}"),
             "a list": lambda p: p.write_text("[]"), "a number": lambda p: p.write_text("NaN"),
             "no text": lambda p: p.write_bytes(b"\xff\xfe\x00{"),
             "an empty object": lambda p: p.write_text("{}"),
             "nested 100 000 deep": lambda p: p.write_text(deep),
             "a folder": lambda p: (p.unlink(), p.mkdir()),
             "a number of 10 000 digits":
                 lambda p: p.write_text('{"vocab_size": ' + "1" * 10_000 + "}")}
    return [gemma(f"{file}: {name}", lambda folder, spoil=spoil: spoil(folder / file),
                  quick=name in ("not JSON", "missing")) for name, spoil in kinds.items()]


def lora(name: str, table: dict, says: str = "", numbers: bytes = bytes(64),
         **options: object) -> Case:
    def command(folder: Path) -> list[str]:
        (folder / "l.safetensors").write_bytes(joined(table, numbers))
        return sample("--lora", "l.safetensors")
    return Case(f"LoRA: {name}", command, says=says, **options)


def nan_gemma(folder: Path) -> None:
    table, numbers = parts(folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes(joined(table, b"\xff" * len(numbers)))


TO_Q = "transformer_blocks.0.attn1.to_q"
TASS, SIDEWAYS = (pair(TO_Q, [1, 192], [192, 1], {"reference_placement": name})
                  for name in ("tass", "sideways"))
TOKENIZER = [
    *(("model", value) for value in ("x", [], None, ABSENT)),
    *(("model", "type", value) for value in ("Unigram", 3)),
    *(("model", "vocab", value) for value in ([], "x", ABSENT)),
    ("model", "vocab", "<bos>", ABSENT),
    *(("model", "vocab", "<pad>", value) for value in ("zero", -1, 1.5, None)),
    ("model", "vocab", "<0x00>", 10**12),
    *(("model", "merges", value)
      for value in ({}, "x", [1], [["a"]], [[["a"], "b"]], None, ABSENT)),
    ("normalizer", "x"), ("normalizer", ABSENT), ("normalizer", "pattern", 3),
    *(("added_tokens", value)
      for value in ("x", 3, [1], [{}], [{"content": 3, "id": 3}], [{"content": "a", "id": "x"}],
                    [{"content": "", "id": 3}])),
]
TEXT_MODEL = [
    *refusals(("text model's folder missing", "--gemma-root gone", "config.json in", QUICK),
              ("text model's folder is a file", ["--gemma-root", str(FACE)],
               "config.json in")),
    *texts("tokenizer.json"), *texts("config.json"),
    *(rewritten("tokenizer.json", *path) for path in TOKENIZER),
    *(rewritten("config.json", key, value)
      for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "layer_types", "rope_scaling")
      for value in (-1, 0, "x", [7], 10**12)
      if (key, value) not in (("layer_types", 0), ("rope_scaling", 0))),  # 0 = not given
    rewritten("config.json", "model_type", "llama", says="gemma3"),
    gemma("text model's weights missing", lambda f: (f / "model.safetensors").unlink(), quick=True),
    gemma("text model's weights cut off", lambda f: cut(f / "model.safetensors"), "cut off"),
    gemma("text model's weights are a text", lambda f: (f / "model.safetensors").write_text("x")),
    gemma("NaN in the text model", nan_gemma, "NaN", seconds=SAMPLING),
    *refusals(
        ("LoRA missing", "--lora gone.safetensors", "--lora", QUICK),
        ("LoRA is the checkpoint", ["--lora", str(WEIGHTS / "model.safetensors")], "check --lora"),
        ("LoRA is a picture", ["--lora", str(FACE)], "check --lora", QUICK),
        ("LoRA of strength NaN", ["--lora", str(FACE), "nan"], "--lora PATH", QUICK)),
    lora("of another model", pair("blocks.0.q", [1, 192], [192, 1]), "check --lora"),
    lora("of another width", pair(TO_Q, [1, 8], [8, 1]), "check --lora", quick=True),
    lora("without tensors", {"__metadata__": {}}, "check --lora", numbers=b""),
    lora("with another placement than the command's", SIDEWAYS, "sideways", bytes(1536)),
    lora("of NaN", TASS, "NaN", b"\xff" * 1536, seconds=SAMPLING),
    lora("of zeros", TASS, "output", bytes(1536), **WORKS),
]

CASES = [*PICTURES, *PROMPTS, *NUMBERS, *OUTPUTS, *WEIGHT_FILES, *TEXT_MODEL]
