"""sample.py end to end on a random tiny checkpoint: files, seeds, scales, refusals.

The weights are random, so the videos are noise; what is shown is that every part is connected as
it should be. Hardware: CPU, under half a minute. Run: python -m pytest tests/test_sample.py
"""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import INFERENCE, SIZES, draw_face, livelier, write_tiny

import sample
from ltx import options
from ltx.checkpoint import open_file, write_file
from ltx.lora import add_lora, save_lora
from model import DISTILLED_SIGMAS, VideoTransformer

PROMPT = "a person in a red shirt laughs"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def arguments(tiny: Path, out: Path, *more: str, **changes: str) -> list[str]:
    chosen = {
        "ref": tiny / "face.png",
        "prompt": PROMPT,
        "checkpoint-path": tiny / "model.safetensors",
        "gemma-root": tiny / "gemma",
        "output-path": out,
        "device": "cpu",
        "loop-seconds": "0",
        **changes,
    }
    return [part for key, value in chosen.items() for part in (f"--{key}", str(value))] + list(more)


def generate(tiny: Path, out: Path, *more: str, **changes: str) -> np.ndarray:
    """Run, and return the frames of the mp4 (F, h, w, 3)."""
    assert sample.main(arguments(tiny, out, *more, **changes)) == 0
    with av.open(str(out)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ------------------------------------------------------------ what comes out


def test_the_command_writes_a_playable_video_a_picture_and_a_record(tiny, tmp_path):
    out = tmp_path / "out.mp4"
    command = [sys.executable, str(Path(sample.__file__)),
               *arguments(tiny, out, **{"loop-seconds": "3"})]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.mp4", "out.png"], (
        "leftovers"
    )
    for word in ("seed    0", "device  cpu", "dtype   float32", "seconds",
                 "out.mp4 (0.6 s written 5 times over; .png and .json beside it)"):
        assert word in done.stdout
    assert "text+face, text, null" in done.stderr, "the progress bar names the streams"

    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (384, 384, 5 * 5), (
            "32 pixels enlarged 12 times, 5/8 of a second 5 times over"
        )
        assert float(stream.average_rate) == INFERENCE["frame_rate"]
    assert out.read_bytes().index(b"moov") < out.read_bytes().index(b"mdat"), (
        "a browser can start before the end"
    )
    assert Image.open(tmp_path / "out.png").size == (6 * 384 + 5 * 4, 384), (
        "the reference, five frames, thin gaps"
    )

    record = json.loads((tmp_path / "out.json").read_text())
    assert record["arguments"]["prompt"] == PROMPT and record["arguments"]["placement"] == "tass"
    assert record["arguments"]["streams"] == {"text+face": 2.0, "text": 1.0, "null": -2.0}
    assert (record["seed"], record["device"], record["dtype"]) == (0, "cpu", "float32")
    assert set(record["seconds"]) == {"text", "reference", "denoise", "decode", "write"}
    assert record["output_size"] == [25, 384, 384] and "torch" in record["versions"]
    assert 0 < record["reference_psnr_db"] < 60


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_video(tiny, tmp_path):
    first = generate(tiny, tmp_path / "a.mp4", seed="7")
    generate(tiny, tmp_path / "b.mp4", seed="7")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert np.abs(first.astype(int) - generate(tiny, tmp_path / "c.mp4", seed="8")).max() > 10


def test_every_condition_and_scale_reaches_the_video(tiny, tmp_path):
    draw_face(skin="black").save(tmp_path / "other.png")
    plain = generate(tiny, tmp_path / "plain.mp4").astype(int)
    changes = [{"ref-scale": "6"}, {"text-scale": "6"}, {"prompt": "blue light"},
               {"negative-prompt": "red"}, {"ref": tmp_path / "other.png"},
               {"order": "reference_first"}, {"rescale": "0.7"}]
    for change in changes:
        found = np.abs(generate(tiny, tmp_path / "out.mp4", **change) - plain).max()
        assert found > 2, f"{change} changes the video by {found} of 255"


def test_sizes_asked_for_are_the_sizes_made(tiny, tmp_path):
    sizes = {
        "height": "16",
        "width": "40",
        "num-frames": "1",
        "frame-rate": "23.976",
        "num-inference-steps": "1",
    }
    frames = generate(tiny, tmp_path / "out.mp4", **sizes)
    assert frames.shape == (1, 16 * 24, 40 * 24, 3)


def test_the_trained_placement_is_the_default_and_another_one_is_warned_of(tiny, tmp_path, capsys):
    other = write_tiny(tmp_path / "other", metadata={"reference_placement": "overlap"})
    assert sample.main(arguments(other, tmp_path / "o.mp4", "--dry-run")) == 0
    assert "placement = 'overlap'" in capsys.readouterr().out
    assert sample.main(arguments(other, tmp_path / "o.mp4", "--dry-run", placement="tass")) == 0
    told = capsys.readouterr().out
    assert "placement = 'tass'" in told and "trained with --placement overlap" in told
    bare = write_tiny(tmp_path / "bare", metadata={})
    assert sample.main(arguments(bare, tmp_path / "o.mp4", "--dry-run", placement="time_only")) == 0
    assert "warning: neither checkpoint nor LoRA" in capsys.readouterr().out


def test_a_lora_changes_the_video_in_proportion_and_brings_its_placement(tiny, tmp_path, capsys):
    model = VideoTransformer(SIZES)
    add_lora(model, rank=2, alpha=2)
    livelier(model)
    save_lora(tmp_path / "lora.safetensors", model, {"reference_placement": "time_only"})
    plain = generate(tiny, tmp_path / "a.mp4")
    lora = str(tmp_path / "lora.safetensors")
    changed = generate(tiny, tmp_path / "b.mp4", "--lora", lora)
    assert np.abs(plain.astype(int) - changed).max() > 2
    assert json.loads((tmp_path / "b.json").read_text())["arguments"]["placement"] == "time_only"
    off = generate(tiny, tmp_path / "c.mp4", "--lora", lora, "0").astype(int)
    assert np.abs(off - changed).max() > 2
    for wrong in (["--lora", lora, "x"], ["--lora", lora, "1", "2"], ["--lora", "gone"],
                  ["--lora", str(tiny / "face.png")]):  # fmt: skip
        capsys.readouterr()
        assert sample.main(arguments(tiny, tmp_path / "d.mp4", *wrong)) == 2
        assert "lora" in capsys.readouterr().err.lower()
    assert not (tmp_path / "d.mp4").exists()


def test_two_loras_add_up_and_may_not_disagree_about_the_placement(tiny, tmp_path, capsys):
    paths = []
    for i, placement in enumerate(("tass", "tass", "overlap")):
        torch.manual_seed(10 + i)
        model = VideoTransformer(SIZES)
        add_lora(model, rank=2, alpha=2)
        save_lora(
            tmp_path / f"{i}.safetensors", livelier(model), {"reference_placement": placement}
        )
        paths.append(str(tmp_path / f"{i}.safetensors"))
    one, both = (["--lora", paths[0]], ["--lora", paths[0], "--lora", paths[1], "0.5"])
    first, second = (
        generate(tiny, tmp_path / "a.mp4", *one),
        generate(tiny, tmp_path / "b.mp4", *both),
    )
    assert np.abs(first.astype(int) - second).max() > 2
    assert json.loads((tmp_path / "b.json").read_text())["arguments"]["lora"] == [
        [paths[0], 1.0],
        [paths[1], 0.5],
    ]
    capsys.readouterr()
    assert sample.main(arguments(tiny, tmp_path / "d.mp4", *one, "--lora", paths[2])) == 2
    assert "expected LoRAs trained with one placement" in capsys.readouterr().err
    assert not (tmp_path / "d.mp4").exists()


def test_weights_that_wait_elsewhere_give_the_same_video_and_float8_a_similar_one(tiny, tmp_path):
    """The whole command, text model included; the lora is fused while each block is read."""
    model = VideoTransformer(SIZES)
    add_lora(model, rank=2, alpha=2)
    save_lora(tmp_path / "lora.safetensors", livelier(model), {"reference_placement": "tass"})
    lora = ("--lora", str(tmp_path / "lora.safetensors"))
    plain = generate(tiny, tmp_path / "a.mp4", *lora)
    for offload in ("cpu", "disk"):
        assert np.array_equal(
            generate(tiny, tmp_path / "b.mp4", *lora, "--offload", offload), plain
        ), offload
    eighth = generate(tiny, tmp_path / "c.mp4", *lora, "--quantization", "fp8-cast")
    streamed = generate(
        tiny, tmp_path / "d.mp4", *lora, "--quantization", "fp8-cast", "--offload", "disk"
    )
    assert np.array_equal(eighth, streamed)
    found = np.abs(eighth.astype(int) - plain).mean()
    assert 0 < found < 16, (
        found
    )  # of 255; random weights, so small differences grow from step to step


def test_distilled_sampling_takes_eight_fixed_steps_in_one_stream_and_says_so(
    tiny, tmp_path, capfd, monkeypatch
):
    levels, walk = [], sample.denoise_steps

    def noted(model, noise, sigmas, *rest):
        levels.append(tuple(round(sigma, 6) for sigma in sigmas.tolist()))
        return walk(model, noise, sigmas, *rest)

    monkeypatch.setattr(sample, "denoise_steps", noted)
    a = generate(tiny, tmp_path / "a.mp4", "--distilled", **{"text-scale": "5"})
    assert levels == [DISTILLED_SIGMAS]
    seen = capfd.readouterr()
    assert "--distilled runs one stream; --text-scale" in seen.out
    assert "8/8" in seen.err and "denoise [text+face]" in seen.err
    assert np.array_equal(
        a, generate(tiny, tmp_path / "b.mp4", "--distilled", **{"ref-scale": "0"})
    )
    assert (
        sample.main(
            arguments(tiny, tmp_path / "c.mp4", "--distilled", "--num-inference-steps", "30")
        )
        == 2
    )
    assert "expected 8 steps" in capfd.readouterr().err


def test_the_perturbed_stream_and_the_source_turn_reach_the_video(tiny, tmp_path, capsys):
    plain = generate(tiny, tmp_path / "a.mp4").astype(int)
    stg = generate(tiny, tmp_path / "b.mp4", "--stg-blocks", "1", **{"stg-scale": "1"})
    assert np.abs(plain - stg).max() > 2
    assert sample.main(arguments(tiny, tmp_path / "c.mp4", **{"stg-scale": "1"})) == 2
    assert "expected --stg-blocks between 0 and 1, got 28" in capsys.readouterr().err
    turned = generate(tiny, tmp_path / "d.mp4", placement="overlap_phase").astype(int)
    assert np.abs(turned - generate(tiny, tmp_path / "e.mp4", placement="overlap")).max() > 2


def test_the_plan_needs_no_weights_and_covers_a_given_file_too(tiny, capsys):
    assert sample.main(["--plan"]) == 0
    out = capsys.readouterr().out
    assert "12,902,992,896" in out and "80 GB" in out, "the 48 blocks of the 22B model"
    own = [
        "--checkpoint-path",
        str(tiny / "model.safetensors"),
        "--gemma-root",
        str(tiny / "gemma"),
    ]
    assert sample.main(["--plan", *own]) == 0
    assert "12,902,992,896" not in capsys.readouterr().out


def test_warnings_are_one_line_each_and_do_not_stop_the_run(tiny, tmp_path, capsys):
    generate(tiny, tmp_path / "out.mp4", prompt="", height="72")
    warnings = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")
    ]
    assert len(warnings) == 4, warnings
    text = "\n".join(warnings)
    assert (
        "the prompt is empty" in text
        and "72 px puts reference positions beyond the trained 128 px" in text
    )
    assert "this checkpoint was trained at 32x32, 5 frames" in text
    assert "--checkpoint-path ltx-2.3-22b-dev.safetensors" in text and "procedural world" in text


def test_words_that_no_caption_held_are_named_once_with_the_nearest_phrases(tiny, tmp_path, capsys):
    """A checkpoint or a LoRA without a list has read everything."""
    def warned(folder, *more, prompt, **changes):
        arguments_ = arguments(folder, tmp_path / "o.mp4", "--dry-run", *more, prompt=prompt)
        for key, value in changes.items():
            arguments_ += [f"--{key.replace('_', '-')}", value]
        assert sample.main(arguments_) == 0
        return [line for line in capsys.readouterr().out.splitlines() if "never read" in line]

    listed = {"reference_placement": "tass",
              "known_phrases": json.dumps(["a person", "laughs", "at the beach", "in a red shirt"])}
    known = write_tiny(tmp_path / "known", metadata=listed)
    odd = "a PERSON, with a beard: laughs \x1b[2J at beach!"
    assert warned(tiny, prompt=odd) == []
    assert warned(known, prompt="laughs in a shirt, at the beach.") == []
    assert warned(known, prompt=odd, negative_prompt="red beard, reds") == [
        "warning: these weights never read: PERSON, with, beard, 2J, reds; the nearest phrases "
        "that they know: a person, at the beach, in a red shirt"]
    model = VideoTransformer(SIZES)
    add_lora(model, rank=2, alpha=2)
    for name, metadata in (("own", {}), ("world", {"known_phrases": '["with a beard"]'})):
        save_lora(tmp_path / f"{name}.safetensors", model, metadata)
    assert warned(known, "--lora", str(tmp_path / "own.safetensors"), prompt=odd) == []
    (line,) = warned(known, "--lora", str(tmp_path / "world.safetensors"), prompt=odd)
    assert "never read: PERSON, 2J; the" in line
    for broken in ("{", "[1]", '{"a": 1}'):
        wrong = write_tiny(tmp_path / "wrong", metadata={"known_phrases": broken})
        assert sample.main(arguments(wrong, tmp_path / "o.mp4", "--dry-run")) == 2
        assert "expected a list of texts as 'known_phrases'" in capsys.readouterr().err


def test_a_dry_run_prints_the_settings_and_writes_nothing(tiny, tmp_path, capsys):
    assert sample.main(arguments(tiny, tmp_path / "out.mp4", "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "height = 32" in out and "num_inference_steps = 3" in out and "streams" in out
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_missing_is_named_before_anything_is_loaded(tiny, tmp_path, capsys):
    with open_file(tiny / "model.safetensors") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    for name in ("vae.decoder.conv_out.conv.bias", "model.diffusion_model.proj_out.bias"):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        write_file(tmp_path / "less.safetensors", rest, metadata)
        less = arguments(tiny, tmp_path / "o.mp4", "--dry-run",
                         **{"checkpoint-path": tmp_path / "less.safetensors"})
        assert sample.main(less) == 2 and name in capsys.readouterr().err


def test_the_help_shows_defaults_and_two_real_commands():
    text = options.build_parser().format_help()
    assert text.count("  python sample.py --ref") == 2
    assert (
        " ".join(text.split()).count("default: ") >= 18
    )  # however wide the terminal breaks the lines
    for line in options.EXAMPLES.split("  python sample.py")[1:]:
        words = [word for word in line.replace("\\", "").split() if word.startswith("--")]
        assert all(word in text for word in words)


# ------------------------------------------------------------ refusals


def bomb(path: Path) -> None:
    """A PNG header that promises 60000 x 60000 pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    draw_face(400).save(folder / "whole.jpg")
    draw_face(400).save(folder / "whole.png")
    for name in ("whole.jpg", "whole.png"):
        data = (folder / name).read_bytes()
        (folder / name.replace("whole", "cut")).write_bytes(data[: len(data) // 2])
    (folder / "empty.png").touch()
    (folder / "words.png").write_text("not a picture")
    bomb(folder / "bomb.png")
    (folder / "cut.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    (folder / "folder.mp4").mkdir()
    return folder


REFUSALS = {
    "no such reference": ({"ref": "{broken}/gone.png"}, "no such file"),
    "reference is a folder": ({"ref": "{broken}"}, "got a folder"),
    "reference is text": ({"ref": "{broken}/words.png"}, "expected a readable picture"),
    "reference is cut off (jpg)": ({"ref": "{broken}/cut.jpg"}, "expected a readable picture"),
    "reference is a bomb": ({"ref": "{broken}/bomb.png"}, "expected a readable picture"),
    "no checkpoint": ({"checkpoint-path": "{broken}/gone"}, "got no file at"),
    "checkpoint cut off": (
        {"checkpoint-path": "{broken}/cut.safetensors"},
        "expected a safetensors file",
    ),
    "checkpoint is a text model": (
        {"checkpoint-path": "{tiny}/gemma/model.safetensors"},
        "'config'",
    ),
    "height between sizes": ({"height": "33"}, "use 32 or 40"),
    "frames between sizes": ({"num-frames": "8"}, "use 5 or 9"),
    "no steps": ({"num-inference-steps": "0"}, "--num-inference-steps between 1"),
    "scale not finite": ({"text-scale": "nan"}, "--text-scale between 0"),
    "rescale above one": ({"rescale": "1.5"}, "--rescale between 0 and 1"),
    "unknown flag": ({"hieght": "64"}, "unrecognized arguments"),
    "no output folder": (
        {"output-path": "{out}/gone/out.mp4"},
        "expected an existing output folder",
    ),
    "output not writable": ({"output-path": "/proc/out.mp4"}, "expected a writable folder"),
    "output not mp4": ({"output-path": "{out}/out.avi"}, "expected an output path ending in .mp4"),
    "output would replace the reference": (
        {"output-path": "{tiny}/face.mp4"},
        "the reference itself",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_mistake_is_refused_with_one_line_and_nothing_is_written(
    name, tiny, broken, tmp_path, capfd
):
    changes, expected = REFUSALS[name]
    places = {"tiny": tiny, "broken": broken, "out": tmp_path}
    changes = {key: value.format(**places) for key, value in changes.items()}
    before = sorted(tiny.rglob("*")), sorted(broken.rglob("*")), (tiny / "face.png").read_bytes()
    try:
        status = sample.main(arguments(tiny, tmp_path / "out.mp4", **changes))
    except SystemExit as stop:  # from the argument parser
        status = stop.code
    error = capfd.readouterr().err
    assert status == 2
    assert error.count("\n") == 1 and error.startswith("sample.py: error: ") and "; " in error, (
        error
    )
    assert expected in error, error
    assert not list(tmp_path.iterdir())
    assert (
        sorted(tiny.rglob("*")),
        sorted(broken.rglob("*")),
        (tiny / "face.png").read_bytes(),
    ) == before


def test_a_forgotten_argument_and_a_missing_gpu_are_refused(tiny, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        sample.main(["--prompt", "x"])
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "--ref" in error
    if not torch.cuda.is_available():
        assert sample.main(arguments(tiny, tmp_path / "out.mp4", device="cuda")) == 2
        assert "--device cpu" in capfd.readouterr().err


def test_a_failure_while_writing_leaves_no_half_files(tiny, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clips.video.contact_sheet", full)
    assert sample.main(arguments(tiny, tmp_path / "out.mp4")) == 2
    assert "No space left" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
