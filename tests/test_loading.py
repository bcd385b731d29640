"""Names and shapes are the published file's, only its video part is read, a wrong file is named.

Routes: tables typed from the published file (bench/official.py) against the modules at full size on
the meta device; a whole checkpoint at narrow widths; a fresh process whose memory is measured
(bench/load_memory.py does 4 GB); one wrong file of each kind.
Hardware: CPU, seconds, no weights.   Command: pytest tests/test_loading.py
"""

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from bench import load_memory, official
from ltx import checkpoint
from ltx.checkpoint import check_weights, load_weights, read_metadata, save_changed, shapes_from
from ltx.gemma import GemmaConfig, GemmaTextModel
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, Connector, FeatureExtractor
from ltx.vae import VAE_PREFIX, VideoVAE
from ltx.wrong_file import stranger
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer


def meta_parts(config: dict, gemma_hidden: int = 3840) -> dict[str, torch.nn.Module]:
    """Every module of the video path on the meta device, by its prefix in the file."""
    settings = config["transformer"]
    with torch.device("meta"):
        return {TRANSFORMER_PREFIX: VideoTransformer(TransformerConfig.from_checkpoint(settings)),
                CONNECTOR_PREFIX: Connector(settings),
                EXTRACTOR_PREFIX: FeatureExtractor(settings, gemma_hidden, 49),
                VAE_PREFIX: VideoVAE(config["vae"])}


def state_of(parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for prefix, module in parts.items()
            for name, tensor in module.state_dict().items()}


def shapes_of(parts: dict[str, torch.nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state_of(parts).items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


# ------------------------------------------------------------ names, shapes, numbers


def test_every_name_and_shape_is_the_published_one():
    ours, theirs = shapes_of(meta_parts(official.ltx_config())), official.video()
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))[:5]
    assert not {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    with torch.device("meta"):
        gemma = GemmaTextModel(GemmaConfig.from_dict(official.GEMMA))
    assert shapes_of({"": gemma}) == official.table(official.GEMMA_PLAIN)


def test_of_a_file_with_the_sound_only_the_video_part_is_read_and_each_tensor_once(
        tmp_path, monkeypatch):
    config, path, read = official.narrow_config(), tmp_path / "all.safetensors", []
    shapes = shapes_of(meta_parts(config, gemma_hidden=24))
    assert set(shapes) == set(official.video()), "narrow, but not one name fewer"
    tensors = official.random_weights(shapes)
    sound = {name: torch.full(shape, torch.nan, dtype=official.stored_type(name))
             for name, shape in official.audio(config).items()}
    save_file(tensors | sound, path, {"config": json.dumps(config), "model_version": "2.3.0"})
    assert read_metadata(path)["config"] == config, "no stranger"

    class Spy(checkpoint.TensorFile):
        def get_tensor(self, name):
            read.append(name)
            return super().get_tensor(name)

    monkeypatch.setattr(checkpoint, "TensorFile", Spy)
    for dtype in (None, torch.float32):
        parts = meta_parts(config, gemma_hidden=24)
        for prefix, module in parts.items():
            check_weights(module, path, prefix)
        assert not read, "checking reads no number"
        for prefix, module in parts.items():
            load_weights(module, path, prefix, dtype)
        assert sorted(read) == sorted(tensors)
        for name, tensor in state_of(parts).items():
            wanted = tensors[name] if dtype is None else tensors[name].float()  # None: as stored
            assert tensor.dtype == wanted.dtype and torch.equal(tensor, wanted), name
        read.clear()


def test_every_type_and_every_offset_is_read_as_written(tmp_path):
    path, counts = tmp_path / "types.safetensors", (1, 3, 5, 0, 5000, 7, 9, 2, 1, 11, 4, 13)
    tensors = {str(dtype): torch.arange(count).to(dtype)[:, None]
               for count, dtype in zip(counts, checkpoint.TYPES.values(), strict=True)}
    tensors["scalar"] = torch.tensor(3.0)
    save_file(tensors, path, {"a": "b"})
    with safe_open(path, "pt") as theirs, checkpoint.open_file(path) as ours:
        assert set(ours.keys()) == set(theirs.keys()) and ours.metadata() == theirs.metadata()
        rows = [(file.get_slice(name) for file in (ours, theirs)) for name in ours.keys()]
        assert all(a.get_shape() == b.get_shape() and a.get_dtype() == b.get_dtype()
                   for a, b in rows)
        again = {name: ours.get_tensor(name) for name in ours.keys()}
    for name, tensor in tensors.items():  # the file is closed, the maps are still good
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert torch.equal(again[name].double(), tensor.double())
    again["scalar"].add_(1)  # in memory; the file must stay as it is
    assert again["scalar"] == 4 and load_file(path)["scalar"] == 3


def test_a_changed_copy_keeps_the_other_tensors_and_the_config(tiny, tmp_path):
    base, copy = tiny / "model.safetensors", tmp_path / "copy.safetensors"
    tensors, name = load_file(base), "model.diffusion_model.proj_out.bias"
    save_changed(copy, base, {name: tensors[name] + 1}, {"reference_placement": "tsr"})
    again, header = load_file(copy), read_metadata(copy)
    assert header["config"] == read_metadata(base)["config"]
    assert header["reference_placement"] == "tsr" and set(again) == set(tensors)
    assert [n for n in tensors if not torch.equal(tensors[n], again[n])] == [name]


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="asks Linux for the memory's size")
def test_a_file_larger_than_the_machines_memory_opens(tmp_path):
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    memory = {words[0]: int(words[1]) * 1024 for words in lines}
    rest = memory["MemTotal:"] + memory["SwapTotal:"] + 2**30
    rows = {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
            "b": {"dtype": "U8", "shape": [rest], "data_offsets": [64, 64 + rest]}}
    header, path = json.dumps(rows).encode(), tmp_path / "huge.safetensors"
    with path.open("wb") as file:  # sparse: takes a few kilobytes of disk
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<16f", *range(16)))
        try:
            file.truncate(8 + len(header) + 64 + rest)
        except OSError as error:
            pytest.skip(f"this file system has no sparse files of this size ({error})")
    layer = torch.nn.Module()
    layer.register_buffer("a", torch.zeros(16))
    assert load_weights(layer, path, "").a.tolist() == list(range(16))


# ------------------------------------------------------------ wrong files


@pytest.mark.parametrize("part, key, value, words", [
    ("transformer", "num_layers", 10**9, "an integer from 1 to 1000 for num_layers"),
    ("transformer", "num_attention_heads", True, "an integer from 1 to 1e+06 for num_attention"),
    ("transformer", "norm_eps", float("nan"), "a number from 1e-12 to 1e+09 for norm_eps"),
    ("transformer", "positional_embedding_max_pos", [20, 2048], "a number, 3 times, from 1e-12"),
    ("inference", "stg_blocks", [0, -1], "an integer from 0 to 1000 for stg_blocks"),
    ("vae", "encoder_blocks", [["res_x"]], "pairs in encoder_blocks"),
    ("vae", "decoder_blocks", [["res_x", {"num_layers": 0}]], "an integer from 1 to 1000 for num"),
])
def test_a_number_that_no_model_can_have_is_refused(part, key, value, words, tiny, tmp_path):
    config, path = read_metadata(tiny / "model.safetensors")["config"], tmp_path / "a.safetensors"
    config[part][key] = value
    save_file({}, path, {"config": json.dumps(config)})
    with pytest.raises(ValueError, match="^expected .* in the config of .*, got .*; use ") as told:
        read_metadata(path)
    assert f"expected {words}" in str(told.value)


def test_modules_are_built_as_shapes_and_what_cannot_be_built_is_one_line():
    with shapes_from("x.safetensors"):
        assert torch.zeros(1).is_meta
    for error, words in ((KeyError("patch_size"), "^expected 'patch_size' in the config of x"),
                         (RuntimeError("a\nb"), "^expected sizes in the config of x.* .a b.; use"),
                         (ValueError("a\nb; c"), "^a b; c$")):
        with pytest.raises(ValueError, match=words), shapes_from("x.safetensors"):
            raise error


def readable_files(tensors: dict, config: dict) -> dict[str, tuple[dict, dict | None, str]]:
    """Wrong files that safetensors can read: name -> tensors, header, words of the line."""
    new, one, prefix = config["transformer"], torch.ones(2, 2), TRANSFORMER_PREFIX
    elder = {key: value for key, value in new.items() if key != "cross_attention_adaln"}
    captions = {f"{prefix}caption_projection.linear_1.weight": one}
    sound = {f"{prefix}transformer_blocks.0.audio_attn1.to_q.weight": one}
    marker = {f"{prefix}keyframes_abs_pos_embedding": one}
    part = {"transformer_blocks.0.attn1.norm_q.weight": one, "proj_in.weight": one + 1}
    absent = f"{prefix}transformer_blocks.1.attn2.k_norm.weight"
    bent = f"{prefix}transformer_blocks.0.ff.net.2.weight"

    def header(version: str = "", **changes: object) -> dict[str, str]:
        told = {"config": json.dumps({**config, "transformer": {**new, **changes}})}
        return told | ({"model_version": version} if version else {})

    old = {"config": json.dumps({"transformer": elder})}
    return {
        "LTX-2.0": (tensors | captions | sound, old, "got LTX-2.0, an older model (caption"),
        "2.0 by version": (tensors, header("2.0.0"), "LTX-2.0, an older model (model_version"),
        "2.0 by config": (tensors, old, "got LTX-2.0, an older model (no cross_attention"),
        "2.0 bare": (captions | sound, None, "got LTX-2.0, an older model (caption"),
        "2.5 by config": (tensors, header(ff_bias=False), "a later model (ff_bias = False)"),
        "2.5 by tensor": (tensors | marker, header(), "a later model (a tensor"),
        "2.5 by version": (tensors, header("2.5.1"), "got LTX-2.5.1, a later"),
        "LTX-Video": (captions, header(_class_name="Transformer3DModel"), "got LTX-Video 0.9, an"),
        "0.9 by version": (tensors, header("0.9.7", _class_name=None), "got LTX-Video 0.9, an"),
        "0.9 bare": (captions, None, "got LTX-Video 0.9, an older"),
        "LoRA": ({"diffusion_model.patchify_proj.lora_A.weight": one}, None, "got a LoRA; give"),
        "diffusers part": (part, {"format": "pt"}, "one part of a diffusers folder"),
        "text model": ({"model.embed_tokens.weight": one}, None, "a text model"),
        "bare": (tensors, None, "'config' entry"),
        "no JSON": (tensors, {"config": "{"}, "expected JSON in 'config'"),
        "a list": (tensors, {"config": "[1]"}, "expected an object in 'config'"),
        "part a list": (tensors, {"config": '{"vae": []}'}, "expected an object 'vae'"),
        "no transformer": (tensors, {"config": "{}"}, "use an LTX-2.3 checkpoint"),
        "missing": ({n: t for n, t in tensors.items() if n != absent}, header(), absent),
        "misshapen": (tensors | {bent: one}, header(), f"expected {bent} of shape"),
        "integers": (tensors | {bent: tensors[bent].byte()}, header(), "expected floating-point"),
    }


def broken_files(data: bytes) -> dict[str, tuple[bytes, str]]:
    """Wrong files that it cannot read: name -> bytes, words of the line."""
    end, header = len(data) * 2 // 3, data[:8] + b"{" + b"?" * 200
    return {
        "cut": (data[:end], f"cut off: {end:,} of {len(data):,} bytes"),
        "cut early": (data[:1000], "cut off: 1,000 of at least "),
        "cut at once": (data[:5], "got a file of another kind"),
        "damaged": (header + data[209:], "got a damaged one"),
        "too long": (data + b"more", "got a damaged one"),
        "untyped": (data.replace(b'"F32"', b'"F31"', 1), "got a damaged one"),
        "empty": (b"", "got an empty file"),
        "numbers.gguf": (b"GGUF\x03\0\0\0" + bytes(200), "got a GGUF file"),
        "evil.pt": (b"\x80\x02cos\nsystem\nX\x05\0\0\0false\x85R.", "got a pickle"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "got a git-lfs"),
        "page": (b"<!DOCTYPE html><html><body>Access denied", "got a web page"),
        "index.json": (b'{"weight_map": {}}', "got a JSON text"),
        "words": (b"these are words and no weights", "got a file of another kind"),
    }


def load(path: Path, dtype: torch.dtype | None = None) -> VideoTransformer:
    config = read_metadata(path)["config"]
    with shapes_from(path):
        model = VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"]))
    return load_weights(model, path, TRANSFORMER_PREFIX, dtype)


def test_a_wrong_file_gets_one_line_that_says_what_it_is(tiny, tmp_path):
    good = tiny / "model.safetensors"
    cases, config = {tmp_path: "got a folder"}, read_metadata(good)["config"]
    for name, (tensors, header, words) in readable_files(load_file(good), config).items():
        cases[tmp_path / name] = words
        save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / name, header)
    for name, (data, words) in broken_files(good.read_bytes()).items():
        cases[tmp_path / name] = words
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\0.")
    (tmp_path / "diffusers" / "transformer").mkdir(parents=True)
    cases |= {tmp_path / "zip.ckpt": "got a zip archive", tmp_path / "gone": "got no file at",
              tmp_path / "diffusers": "got a diffusers folder",
              tiny / "gemma": "got the folder of a text model"}
    for path, words in cases.items():
        with pytest.raises(ValueError, match="^expected .*, got .*; .*$") as told:
            load(path)
        assert words in str(told.value), f"{path.name}: {told.value}"
        if path.name not in ("missing", "misshapen", "integers", "no transformer"):
            with pytest.raises(ValueError) as alone:
                read_metadata(path)
            assert str(alone.value) == str(told.value), f"{path.name}: the header is enough to tell"
    model = torch.nn.Linear(1, 1)
    for name in ("LoRA", "2.0 bare", "0.9 bare"):  # a loader that reads no header names them, too
        with pytest.raises(ValueError, match=f"^expected tensor .*{cases[tmp_path / name][:12]}"):
            load_weights(model, tmp_path / name, TRANSFORMER_PREFIX)


def test_the_published_file_is_no_stranger():
    config = official.ltx_config()
    names = official.video() | official.audio(config)
    assert stranger({"model_version": "2.3.1", "config": config}, names) is None
    for name in ("", "encoder.a"):  # names in which nothing speaks for another model
        assert stranger({"model_version": "a test"}, ["a.weight", name]) is None


# ------------------------------------------------------------ float8


def to_float8(weight: torch.Tensor, rows: bool, kind: torch.dtype = torch.float8_e4m3fn
              ) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as the writers of fp8 files store it: the largest number becomes the type's own.
    rows: a scale for each row (out, 1), else one number ()."""
    largest = weight.float().abs().amax(1, keepdim=True) if rows else weight.float().abs().max()
    scale = largest / torch.finfo(kind).max
    return (weight.float() / scale).to(kind), scale


def in_float8(tensors: dict, names: list[str], rows: bool, scale: str = "weight_scale",
              more: tuple[str, ...] = (), kind: torch.dtype = torch.float8_e4m3fn) -> dict:
    """The tensors, those of the names as float8 with a scale of that name and `more` beside."""
    out = dict(tensors)
    for name in names:
        stem = name.removesuffix("weight")
        out[name], out[stem + scale] = to_float8(tensors[name], rows, kind)
        out |= {stem + other: torch.tensor(0.25) for other in more}
    return out


def matrices(tensors: dict, part: str) -> list[str]:
    return [name for name, t in tensors.items()
            if part in name and name.endswith(".weight") and t.ndim == 2]


FLOAT8 = {  # who writes it -> how; the official file's names stand in Lightricks/LTX-2's issues
    "LTX-2.3-fp8": (False, "weight_scale", ("input_scale",)),
    "ComfyUI": (False, "scale_weight", ("scale_input",)),
    "ComfyUI, newer": (False, "weight_scale", ("comfy_quant",)),
    "compressed-tensors": (True, "weight_scale", ()),
    "e5m2": (True, "weight_scale", (), torch.float8_e5m2),
}


@pytest.mark.parametrize("how", FLOAT8.values(), ids=FLOAT8)
def test_a_float8_matrix_means_its_numbers_times_its_scale(how, tiny, tmp_path):
    """Every number comes back within half a step of the type: 3 bits (e5m2: 2) behind the first."""
    good, path = load_file(tiny / "model.safetensors"), tmp_path / "fp8.safetensors"
    names, step = matrices(good, "transformer_blocks"), 2**-3 if torch.float8_e5m2 in how else 2**-4
    header = {"config": json.dumps(read_metadata(tiny / "model.safetensors")["config"])}
    save_file(in_float8(good, names, *how) | {"scaled_fp8": torch.zeros(2)}, path, header)
    model = load(path)
    assert len(names) == 24 and load_file(path)[names[0]].dtype.itemsize == 1
    for name, found in model.state_dict().items():
        wanted = good[TRANSFORMER_PREFIX + name]
        if TRANSFORMER_PREFIX + name in names:
            error, largest = (found - wanted).abs(), wanted.abs().amax(1, keepdim=True)
            assert (error <= step * wanted.abs() + 1e-4 * largest).all() and error.max() > 0, name
        else:
            assert torch.equal(found, wanted), name


def test_float8_without_a_scale_means_itself(tiny, tmp_path):
    good, path = load_file(tiny / "model.safetensors"), tmp_path / "fp8.safetensors"
    eights = {n: t.to(torch.float8_e4m3fn) for n, t in good.items() if n.startswith("model.")}
    header = {"config": json.dumps(read_metadata(tiny / "model.safetensors")["config"])}
    save_file(good | eights, path, header)
    for name, found in load(path, torch.float32).state_dict().items():
        assert torch.equal(found, eights[TRANSFORMER_PREFIX + name].float()), name


def test_a_changed_copy_of_a_float8_file_has_no_scale_beside_other_numbers(tiny, tmp_path):
    good, base = load_file(tiny / "model.safetensors"), tmp_path / "fp8.safetensors"
    names = matrices(good, "transformer_blocks.0.ff")
    header = {"config": json.dumps(read_metadata(tiny / "model.safetensors")["config"])}
    save_file(in_float8(good, names, *FLOAT8["LTX-2.3-fp8"]), base, header)
    save_changed(tmp_path / "copy", base, {names[0]: good[names[0]]}, {})
    again = load_file(tmp_path / "copy")
    assert set(again) == set(good) | {names[1].removesuffix("weight") + end
                                      for end in ("weight_scale", "input_scale")}
    first = load(tmp_path / "copy").state_dict()[names[0].removeprefix(TRANSFORMER_PREFIX)]
    assert torch.equal(first, good[names[0]])


def packed(tensors: dict, name: str, other: str) -> dict[str, tuple[dict, str]]:
    """Matrices whose numbers mean something we do not read: by whom -> tensors, words of the line.
    other: a second matrix."""
    stem, w, rest = name.removesuffix("weight"), tensors[name], dict(tensors)
    del rest[name]
    eight, scale = to_float8(w, rows=False)
    half = torch.zeros(len(w), w.shape[1] // 2, dtype=torch.uint8)
    one, blocks = torch.ones(()), torch.full((len(w), w.shape[1] // 8), 127, dtype=torch.uint8)

    def also(more: str, numbers: torch.Tensor, *names: str) -> tuple[dict, str]:
        return rest | {name: numbers} | {more_name: one + i for i, more_name in enumerate(
            (more, *names))}, f"got also {more}; use "

    scaled = {name: eight, f"{stem}weight_scale": scale}
    return {
        "a scale that is perhaps inverse": also(f"{stem}weight_scale_inv", eight),
        "a scale beside bf16": also(f"{stem}weight_scale", w.bfloat16()),
        "int8": also(f"{stem}weight_scale", w.to(torch.int8)),
        "bitsandbytes, 8 bits": also(f"{stem}SCB", w.to(torch.int8)),
        "bitsandbytes, 4 bits": also(f"{name}.absmax", half.reshape(-1, 1)),
        "smoothed": (rest | scaled | {f"{stem}pre_quant_scale": one},
                     f"got also {stem}pre_quant_scale; "),
        "not from zero": (rest | scaled | {f"{stem}weight_zero_point": one},
                          f"got also {stem}weight_zero_point; "),
        "nvfp4": (rest | {name: half, f"{stem}weight_scale_2": one}, f"also {stem}weight_scale_2"),
        "two scales": (rest | scaled | {f"{stem}scale_weight": one}, f"also {stem}scale_weight; "),
        "blocks": (rest | scaled | {f"{stem}weight_scale": torch.ones(2, 2)},
                   f"each row, in {stem}weight_scale of "),
        "columns": (rest | scaled | {f"{stem}weight_scale": torch.ones(1, w.shape[1])},
                    f"each row, in {stem}weight_scale of "),
        "mxfp8": (rest | scaled | {f"{stem}weight_scale": blocks[:, :1].contiguous()},
                  f"floating-point numbers in {stem}weight_scale of "),
        "one of two": (rest | scaled | {other: tensors[other].to(torch.float8_e4m3fn)},
                       f"a scale beside {other} in "),
        "compressed-tensors, 4 bits": (rest | {f"{stem}weight_packed": half},
                                       f"{name} in .*, got {stem}weight_packed, numbers packed"),
        "GPTQ": (rest | {f"{stem}qweight": half}, f"{name} in .*, got {stem}qweight, numbers"),
        "quanto": (rest | {f"{name}._data": half}, f"{name} in .*, got {name}._data, numbers"),
        "torchao": (rest | {f"{name}:qdata": half}, f"{name} in .*, got {name}:qdata, numbers"),
    }


def test_numbers_that_mean_something_else_are_refused(tiny, tmp_path):
    good, path = load_file(tiny / "model.safetensors"), tmp_path / "packed.safetensors"
    first, second = matrices(good, "transformer_blocks.0.ff")
    header = {"config": json.dumps(read_metadata(tiny / "model.safetensors")["config"])}
    for who, (tensors, words) in packed(good, first, second).items():
        save_file(tensors, path, header)
        with pytest.raises(ValueError, match=f"^expected .*{words}.*{checkpoint.SINGLE_FILE}$"):
            load(path)
            pytest.fail(who)


# ------------------------------------------------------------ memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory as Linux tells it")
def test_loading_costs_the_used_part_and_no_second_copy(tmp_path):
    load_memory.write_large(tmp_path / "small", 0.02)
    _, used = load_memory.write_large(tmp_path / "large", 0.14)
    # The small one first: what every process pays once, the library's own code, is then paid.
    code = """import json, sys
from bench.load_memory import load_here
print(json.dumps([load_here(path, "None") for path in sys.argv[1:]][1]))"""
    command = [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    found = json.loads(done.stdout or done.stderr)
    ratio = (found["peak"] - found["baseline"]) / used
    assert found["zeros"] == 0 and found["finite"]
    assert 0.9 < ratio < 1.15, f"{ratio:.3f} bytes of memory per byte of weights; twice would be 2"
