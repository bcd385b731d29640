"""What is shown: the published file's names and shapes are ours, only its video part is read, a wrong file is named.

Routes: tables typed from the published file (official.py) against the modules at full size on the meta device; a whole
checkpoint at narrow widths against the same file without the sound; a fresh process whose memory is measured
(load_memory.py measures 4 GB); and one wrong file of each kind, through the loaders and through sample.py.
Hardware: CPU, about 15 seconds, no weights.   Command: pytest tests/test_loading.py
The line that each wrong file gets: python tests/test_loading.py
"""

import contextlib
import io
import json
import struct
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

if __name__ == "__main__":  # pytest finds the repository root through conftest.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import write_tiny

import sample
from bench import load_memory, official
from ltx import checkpoint
from ltx.checkpoint import check_weights, load_weights, open_file, read_metadata
from ltx.gemma import GemmaConfig, GemmaTextModel
from ltx.text import CONNECTOR_PREFIX, EXTRACTOR_PREFIX, Connector, FeatureExtractor
from ltx.vae import VideoVAE
from model import TransformerConfig, VideoTransformer

MODEL = official.MODEL


def meta_parts(config: dict, gemma_hidden: int = 3840) -> dict[str, torch.nn.Module]:
    """Every module of the video path on the meta device, by its prefix in the file."""
    with torch.device("meta"):
        return {
            MODEL: VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"])),
            CONNECTOR_PREFIX: Connector(config["transformer"]),
            EXTRACTOR_PREFIX: FeatureExtractor(config["transformer"], gemma_hidden, 49),
            "vae.": VideoVAE(config["vae"]),
        }


def shapes_of(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def size(module: torch.nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values())


# ------------------------------------------------------------ full size


def test_every_name_and_shape_of_the_video_path_is_the_published_one():
    ours = {}
    for prefix, module in meta_parts(official.ltx_config()).items():
        ours |= shapes_of(module, prefix)
    theirs = official.video()
    assert set(ours) == set(theirs), sorted(set(ours) ^ set(theirs))[:5]
    wrong = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    assert not wrong, wrong


def test_every_part_has_the_published_number_of_parameters():
    parts = meta_parts(official.ltx_config())
    transformer, connector, projection, vae = parts.values()
    found = {
        "transformer": size(transformer), "transformer tensors": len(transformer.state_dict()),
        "block": size(transformer.transformer_blocks[0]), "connector": size(connector),
        "connector tensors": len(connector.state_dict()), "projection": size(projection),
        "VAE encoder": size(vae.encoder) + size(vae.per_channel_statistics),
        "VAE decoder": size(vae.decoder) + size(vae.per_channel_statistics),
    }  # fmt: skip
    assert found == {
        "transformer": 13_124_316_288, "transformer tensors": 1457, "block": 268_812_352, "connector": 1_612_546_304,
        "connector tensors": 129, "projection": 770_707_456, "VAE encoder": 318_937_153, "VAE decoder": 407_169_328,
    }  # fmt: skip
    total = sum(size(module) for module in parts.values())
    assert round(total / 1e9, 2) == 16.23 and round(2 * total / 1e9, 1) == 32.5


def test_the_list_of_the_sounds_tensors_has_the_published_number_of_names_and_parameters():
    sound, video = official.audio(official.ltx_config()), official.video()
    assert not set(sound) & set(video)

    def count(rows, *inside, outside="\0"):
        kept = [shape for name, shape in rows.items() if all(word in name for word in inside) and outside not in name]
        return len(kept), sum(torch.Size(shape).numel() for shape in kept)

    assert count({**sound, **video}, MODEL, outside="embeddings_connector") == (4186, 18_988_838_144)
    assert count(sound, "audio_embeddings_connector") == (129, 403_620_096)
    assert count(sound, "audio_aggregate_embed") == (2, 385_353_728)


def test_every_name_and_shape_of_gemma_12b_is_the_published_one():
    config = GemmaConfig.from_dict(official.GEMMA)
    with torch.device("meta"):
        gemma = GemmaTextModel(config)
    assert shapes_of(gemma) == official.table(official.GEMMA_PLAIN)
    assert size(gemma) == 11_766_034_176 and gemma.embed_tokens.weight.numel() == 1_006_878_720


# ------------------------------------------------------------ a whole file at narrow widths


@pytest.fixture(scope="module")
def full_tensor(tmp_path_factory):
    """A checkpoint with all official names and one without the sound's; the config."""
    config, folder = official.narrow_config(), tmp_path_factory.mktemp("whole")
    shapes = {}
    for prefix, module in meta_parts(config, gemma_hidden=24).items():
        shapes |= shapes_of(module, prefix)
    assert set(shapes) == set(official.video()), "narrow, but not one name fewer than the published file"
    tensors = official.random_weights(shapes)
    foreign = {name: torch.full(shape, torch.nan, dtype=official.stored_type(name))
               for name, shape in official.audio(config).items()}  # fmt: skip
    metadata = {"config": json.dumps(config), "model_version": "2.3.0"}
    save_file({**tensors, **foreign}, folder / "all.safetensors", metadata)
    save_file(tensors, folder / "video.safetensors", metadata)
    return folder, config, tensors


def load_all(path: Path, config: dict, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    loaded = {}
    for prefix, module in meta_parts(config, gemma_hidden=24).items():
        load_weights(module, path, prefix, dtype)
        assert not any(tensor.is_meta for tensor in module.state_dict().values())
        loaded |= {prefix + name: tensor for name, tensor in module.state_dict().items()}
    return loaded


def test_a_file_with_the_sound_equals_the_same_file_without_it(whole):
    folder, config, tensors = whole
    with_sound, without = (load_all(folder / name, config) for name in ("all.safetensors", "video.safetensors"))
    assert set(with_sound) == set(without) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(with_sound[name], tensor) and torch.equal(without[name], tensor), name
        assert with_sound[name].dtype == tensor.dtype, f"{name}: the stored type is kept"
    kinds = {tensor.dtype for tensor in with_sound.values()}
    assert kinds == {torch.bfloat16, torch.float32}, "the file holds both types and so does what is loaded"
    converted = load_all(folder / "all.safetensors", config, torch.float32)
    assert all(torch.equal(converted[name], tensor.float()) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}


def test_the_libraries_reader_gives_the_same_numbers(whole):
    folder, _, tensors = whole
    with safe_open(folder / "all.safetensors", "pt") as theirs, open_file(folder / "all.safetensors") as ours:
        assert set(ours.keys()) == set(theirs.keys()) and ours.metadata() == theirs.metadata()
        for name in tensors:
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
            assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name


def test_every_type_and_every_offset_is_read_as_written(tmp_path):
    counts = [(1, torch.int8), (3, torch.bfloat16), (5, torch.float8_e4m3fn), (0, torch.float32), (5000, torch.float64),
              (7, torch.bool), (9, torch.float16), (2, torch.int64), (1, torch.uint8), (11, torch.float32)]  # fmt: skip
    tensors = {f"{count} {dtype}": torch.arange(count).to(dtype)[:, None] for count, dtype in counts}
    tensors["scalar"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "types.safetensors")
    with open_file(tmp_path / "types.safetensors") as file:
        again = {name: file.get_tensor(name) for name in file.keys()}
    for name, tensor in tensors.items():  # the file is closed, the maps are still good
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert torch.equal(again[name].double(), tensor.double())
    again["scalar"].add_(1)  # in memory; the file must stay as it is
    assert again["scalar"] == 4
    assert torch.equal(load_file(tmp_path / "types.safetensors")["scalar"], tensors["scalar"])


def test_a_name_that_nobody_asked_for_is_never_read(whole, monkeypatch):
    folder, config, tensors = whole
    read = []

    class Spy(checkpoint.TensorFile):
        def get_tensor(self, name):
            read.append(name)
            return super().get_tensor(name)

    monkeypatch.setattr(checkpoint, "TensorFile", Spy)
    load_all(folder / "all.safetensors", config)
    assert sorted(read) == sorted(tensors), "each wanted tensor once, and no other"
    read.clear()
    for prefix, module in meta_parts(config, gemma_hidden=24).items():
        check_weights(module, folder / "all.safetensors", prefix)
    assert not read, "checking reads no number"


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="asks Linux for the size of the memory")
def test_a_file_larger_than_the_machines_memory_opens(tmp_path):
    memory = {line.split()[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()}
    rest = memory["MemTotal:"] + memory["SwapTotal:"] + 2**30
    header = json.dumps({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]},
                         "b": {"dtype": "U8", "shape": [rest], "data_offsets": [64, 64 + rest]}}).encode()  # fmt: skip
    with (tmp_path / "huge.safetensors").open("wb") as file:  # sparse: takes a few kilobytes of disk
        file.write(struct.pack("<Q", len(header)) + header + struct.pack("<16f", *range(16)))
        try:
            file.truncate(8 + len(header) + 64 + rest)
        except OSError as error:
            pytest.skip(f"this file system has no sparse files of this size ({error})")
    layer = torch.nn.Module()
    layer.register_buffer("a", torch.zeros(16))
    load_weights(layer, tmp_path / "huge.safetensors", "")
    assert layer.a.tolist() == list(range(16))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_loading_costs_the_used_part_and_no_second_copy(tmp_path):
    costs = []
    for name, gigabytes in (("small", 0.02), ("large", 0.32)):
        path = tmp_path / f"{name}.safetensors"
        _, used = load_memory.write_large(path, gigabytes)
        found = load_memory.load_in_fresh_process(path)
        path.unlink()
        assert found["zeros"] == 0 and found["finite"]
        costs.append((found["peak"] - found["baseline"], used))
    # The difference of two sizes leaves out what every process pays once (the library's own code, about 95 MB).
    ratio = (costs[1][0] - costs[0][0]) / (costs[1][1] - costs[0][1])
    print(f"memory per byte of weights: {ratio:.3f}")
    assert 0.9 < ratio < 1.15, f"{ratio:.3f} bytes of memory per byte of weights; twice would be 2"


# ------------------------------------------------------------ wrong files

OLD = {"_class_name": "Transformer3DModel", "num_layers": 28, "num_attention_heads": 32, "attention_head_dim": 64,
       "caption_channels": 4096, "cross_attention_dim": 2048, "in_channels": 128, "out_channels": 128,
       "qk_norm": "rms_norm", "positional_embedding_type": "rope"}  # fmt: skip
NEW_ONLY = ("apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector",
            "caption_proj_input_norm", "caption_projection_first_linear",
            "caption_projection_second_linear")  # fmt: skip


def write_wrong_files(tiny: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """One wrong file of each kind -> where it is, words of the line it must get."""
    good = tiny / "model.safetensors"
    tensors, data = load_file(good), good.read_bytes()
    with safe_open(good, "pt") as file:
        config = json.loads(file.metadata()["config"])
    cases: dict[str, tuple[Path, str]] = {}

    def add(case: str, content: bytes, ending: str, words: str) -> None:
        path = folder / (case.replace(" ", "_").replace("/", "_") + ending)
        path.write_bytes(content)
        cases[case] = path, words

    def weights(case: str, tensors: dict, words: str, metadata: dict | None) -> None:
        path = folder / (case.replace(" ", "_") + ".safetensors")
        save_file(tensors, path, metadata)
        cases[case] = path, words

    def header(transformer: dict, version: str | None = None) -> dict[str, str]:
        told = {"config": json.dumps({**config, "transformer": transformer})}
        return told | ({"model_version": version} if version else {})

    captions = {f"{MODEL}caption_projection.linear_1.weight": torch.ones(2, 2)}
    sound = {f"{MODEL}transformer_blocks.0.audio_attn1.to_q.weight": torch.ones(2, 2)}
    elder = {key: value for key, value in config["transformer"].items() if key not in NEW_ONLY}
    later = {**config["transformer"], "ff_bias": False, "use_keyframes_abs_pos_embedding": True}
    marker = {f"{MODEL}keyframes_abs_pos_embedding": torch.ones(2)}
    weights("LTX-2.0", {**tensors, **captions, **sound}, "got LTX-2.0, an older", header(elder))
    weights("LTX-2.0 by its version", tensors, "got LTX-2.0, an older", header(config["transformer"], "2.0.0"))
    weights("LTX-2.0 without config", {**captions, **sound}, "got LTX-2.0, an older", None)
    weights("LTX-2.5", {**tensors, **marker}, "got LTX-2.5, a later", header(later))
    weights("LTX-2.5 by its config", tensors, "a later model (ff_bias = False)", header(later, "2.3.0"))
    weights("LTX-2.5 by a tensor", {**tensors, **marker}, "a later model (a tensor", header(config["transformer"]))
    weights("LTX-2.5 by its version", tensors, "got LTX-2.5.1, a later", header(config["transformer"], "2.5.1"))
    weights("LTX-Video 0.9", captions, "got LTX-Video 0.9, an older", header(OLD))
    weights("LTX-Video 0.9 without config", captions, "got LTX-Video 0.9, an older", None)
    base = "diffusion_model.transformer_blocks.0.attn1.to_q.lora_"
    pair = {base + "A.weight": torch.ones(2, 2), base + "B.weight": torch.ones(2, 2)}
    weights("LoRA", pair, "got a LoRA; give", None)
    weights("fp8 with scales", {**tensors, f"{MODEL}patchify_proj.weight_scale": torch.ones(1)}, "packed with scales",
            header(config["transformer"]))
    parts = {"transformer_blocks.0.attn1.norm_q.weight": torch.ones(2), "proj_in.weight": torch.ones(2, 2)}
    weights("one part of a diffusers folder", parts, "one part of a diffusers folder", {"format": "pt"})
    weights("text model", {"model.embed_tokens.weight": torch.ones(2, 2)}, "a text model", {"format": "pt"})
    weights("tensors without config", tensors, "'config' entry", None)
    weights("config not JSON", tensors, "expected JSON in 'config'", {"config": "{"})
    weights("config not an object", tensors, "expected an object", {"config": "[1]"})
    only_vae = {"config": json.dumps({"vae": config["vae"]})}
    weights("config without a transformer", tensors, "use an LTX-2.3 checkpoint", only_vae)

    absent, bent = f"{MODEL}transformer_blocks.1.attn2.k_norm.weight", f"{MODEL}transformer_blocks.0.ff.net.2.weight"
    stored = header(config["transformer"], "2.3.0")
    weights("missing tensor", {n: t for n, t in tensors.items() if n != absent}, absent, stored)
    weights("misshapen tensor", {**tensors, bent: torch.ones(3, 3)}, f"expected {bent} of shape", stored)
    weights("integer tensor", {**tensors, bent: tensors[bent].to(torch.int8)}, "expected floating-point", stored)

    add("truncated download", data[: len(data) * 2 // 3], ".safetensors",
        f"cut off: {len(data) * 2 // 3:,} of {len(data):,} bytes")
    add("truncated in the header", data[:1000], ".safetensors", "cut off: 1,000 of at least ")
    add("truncated at the start", data[:5], ".safetensors", "expected a safetensors file")
    add("damaged header", data[:8] + b"{" + b"?" * 200 + data[209:], ".safetensors", "got a damaged one")
    add("too long", data + b"more", ".safetensors", "got a damaged one")
    add("empty file", b"", ".safetensors", "got an empty file")
    add("GGUF", b"GGUF\x03\0\0\0" + bytes(200), ".gguf", "got a GGUF file")
    add("pickle", b"\x80\x02cos\nsystem\nX\x05\0\0\0false\x85R.", ".pt", "got a pickle")
    with zipfile.ZipFile(folder / "zip.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\0.")
    cases["pickle in a zip"] = folder / "zip.ckpt", "got a zip archive"
    add("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 46\n", ".safetensors",
        "got a git-lfs pointer")
    add("web page", b"<!DOCTYPE html><html><body>Access denied</body></html>", ".safetensors", "got a web page")
    add("index of shards", b'{"weight_map": {}}', ".json", "got a JSON text")
    add("words", b"these are words and no weights at all", ".safetensors", "got a file of another kind")

    (folder / "diffusers" / "transformer").mkdir(parents=True)
    (folder / "diffusers" / "model_index.json").write_text("{}")
    (folder / "plain").mkdir()
    cases["diffusers folder"] = folder / "diffusers", "got a diffusers folder"
    cases["another folder"] = folder / "plain", "got a folder"
    cases["the text model's folder"] = tiny / "gemma", "got the folder of a text model"
    cases["no file"] = folder / "gone.safetensors", "got no file at"
    return cases


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def wrong_files(tiny, tmp_path_factory):
    return write_wrong_files(tiny, tmp_path_factory.mktemp("wrong"))


def printed_line(path: Path, tiny: Path, out: Path) -> tuple[int, str]:
    """Exit status and standard error of sample.py for this checkpoint."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = sample.main(["--ref", str(tiny / "face.png"), "--prompt", "a person laughs", "--device", "cpu",
                              "--checkpoint-path", str(path), "--gemma-root", str(tiny / "gemma"),
                              "--output-path", str(out / "out.mp4")])  # fmt: skip
    return status, error.getvalue()


def load_parts(path: Path) -> None:
    """The loaders in the order of sample.py."""
    settings = read_metadata(path)["config"].get("transformer") or {}
    with torch.device("meta"):
        model = VideoTransformer(TransformerConfig.from_checkpoint(settings))
    load_weights(model, path, MODEL)


CASES = ["LTX-2.0", "LTX-2.0 by its version", "LTX-2.0 without config", "LTX-2.5", "LTX-2.5 by its config",
         "LTX-2.5 by a tensor", "LTX-2.5 by its version",
         "LTX-Video 0.9", "LTX-Video 0.9 without config", "LoRA", "fp8 with scales", "one part of a diffusers folder",
         "text model", "tensors without config", "config not JSON", "config not an object",
         "config without a transformer", "missing tensor", "misshapen tensor", "integer tensor", "truncated download",
         "truncated in the header", "truncated at the start", "damaged header", "too long", "empty file", "GGUF",
         "pickle", "pickle in a zip", "git-lfs pointer", "web page", "index of shards", "words", "diffusers folder",
         "another folder", "the text model's folder", "no file"]  # fmt: skip
IN_THE_TENSORS = ("missing tensor", "misshapen tensor", "integer tensor")  # nothing in the header tells


def test_every_wrong_file_is_in_the_list(wrong_files):
    assert sorted(wrong_files) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_file_gets_one_line_that_says_what_it_is(case, wrong_files):
    path, words = wrong_files[case]
    with pytest.raises(ValueError, match="expected ") as caught:
        load_parts(path)
    line = str(caught.value)
    assert "\n" not in line and "; " in line, line
    assert words in line, line
    if case not in IN_THE_TENSORS and case != "config without a transformer":
        with pytest.raises(ValueError) as caught:
            read_metadata(path)
        assert str(caught.value) == line, "the header alone is enough to tell"


@pytest.mark.parametrize("case", CASES)
def test_sample_refuses_a_wrong_file_with_one_line_and_writes_nothing(case, wrong_files, tiny, tmp_path):
    path, words = wrong_files[case]
    status, error = printed_line(path, tiny, tmp_path)
    assert status == 2
    assert error.count("\n") == 1 and error.startswith("sample.py: error: expected ") and "; " in error, error
    assert words in error and error.count(str(path)) <= 2, error
    assert not list(tmp_path.iterdir())


def test_load_weights_alone_names_a_relative_too(wrong_files):
    with torch.device("meta"):
        model = VideoTransformer(TransformerConfig(num_layers=1, heads=2, head_dim=12))
    for case in ("LoRA", "LTX-2.0 without config", "LTX-Video 0.9 without config"):
        path, words = wrong_files[case]
        with pytest.raises(ValueError, match=words):
            load_weights(model, path, MODEL)


def test_a_good_file_is_no_stranger(whole, tiny):
    folder, config, _ = whole
    for path in (folder / "all.safetensors", folder / "video.safetensors", tiny / "model.safetensors"):
        assert "transformer" in read_metadata(path)["config"]
    assert read_metadata(folder / "all.safetensors")["config"] == config
    absent = {"model_version": "2.3.1", "config": official.ltx_config()}
    assert checkpoint.stranger(absent, {**official.video(), **official.audio(official.ltx_config())}) is None
    assert checkpoint.stranger({"model_version": "a test", "config": {}}, []) is None


def print_wrong_files() -> None:
    """The table `case | line` for every wrong file."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("tiny", "wrong", "out"):
            (folder / name).mkdir()
        tiny = write_tiny(folder / "tiny")
        for case, (path, _) in write_wrong_files(tiny, folder / "wrong").items():
            _, line = printed_line(path, tiny, folder / "out")
            print(f"{case} | {line.strip().replace(str(folder) + '/', '')}")


if __name__ == "__main__":
    print_wrong_files()
