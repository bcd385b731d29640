"""A list of faces and prompts: every part is loaded once, a killed batch goes on, and each case is
what a call of its own would have made.

Random weights, twenty cases of five frames. Hardware: CPU, seconds. Run: python -m pytest
tests/test_batch.py
"""

import json
from pathlib import Path

import av
import pytest
from tiny import draw_face, write_tiny

import sample

SKINS = ("sandybrown", "peru", "sienna", "wheat")
CASES = 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    (folder / "imgs").mkdir()
    for skin in SKINS:
        draw_face(skin=skin).save(folder / "imgs" / f"{skin}.png")
    return folder


@pytest.fixture
def listed(tiny) -> Path:
    rows = [{"img": f"imgs/{SKINS[i % 4]}.png", "prompt": f"a person in a red shirt {'laughs' * i}"}
            for i in range(CASES)]
    path = tiny / "eval.json"
    path.write_text(json.dumps(rows))
    return path


def run(tiny: Path, *words: object) -> int:
    given = ["--checkpoint-path", tiny / "model.safetensors", "--gemma-root", tiny / "gemma",
             "--device", "cpu", "--loop-seconds", "0", "--num-inference-steps", "1", *words]
    return sample.main([str(word) for word in given])


@pytest.fixture
def counted(monkeypatch):
    """How often each part was loaded, and how many latents were made."""
    counts = dict.fromkeys(("text", "vae", "transformer", "latents"), 0)

    def count(owner, name, what):
        real = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[what] += 1
            return real(*args, **kwargs)
        monkeypatch.setattr(owner, name, counting)
    count(sample.TextEncoder, "load", "text")
    count(sample.VideoVAE, "load", "vae")
    count(sample, "load_transformer", "transformer")
    count(sample, "denoise_steps", "latents")
    return counts


def stop_after(monkeypatch, name: str, calls: int):
    """Ctrl-C while a function of sample.py is called for the time after `calls`."""
    real, left = getattr(sample, name), [calls]

    def stopping(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(sample, name, stopping)


def test_twenty_cases_load_each_part_once_and_are_what_single_calls_make(
        tiny, listed, tmp_path, counted, capfd):
    out = tmp_path / "out"
    assert run(tiny, "--batch", listed, "--output-folder", out, "--seed", "7") == 0
    assert counted == {"text": 1, "vae": 2, "transformer": 1, "latents": CASES}
    assert {p.name for p in out.iterdir()} == {f"{n}.{ending}" for n in range(1, CASES + 1)
                                               for ending in ("mp4", "png", "json")}
    seen = capfd.readouterr()
    assert f"{CASES}/{CASES}" in seen.err and seen.err.count(f"| 0/{CASES}") == 1, "one bar"
    assert f"cases   {CASES}, 0 of them there already, seeds 7 to 26" in seen.out
    row = json.loads(listed.read_text())[5]
    assert run(tiny, "--ref", tiny / row["img"], "--prompt", row["prompt"], "--seed", "12",
               "--output-path", tmp_path / "one.mp4") == 0
    assert (tmp_path / "one.mp4").read_bytes() == (out / "6.mp4").read_bytes()
    record = json.loads((out / "6.json").read_text())
    assert (record["seed"], record["arguments"]["prompt"]) == (12, row["prompt"])
    assert (out / "6.mp4").read_bytes() != (out / "2.mp4").read_bytes(), "same face, other prompt"


def test_a_batch_that_is_killed_goes_on_where_it_was(tiny, listed, tmp_path, counted, monkeypatch,
                                                     capsys):
    out, words = tmp_path / "out", ("--batch", listed, "--output-folder", tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_after(patch, "keep_latent", 8)
        assert run(tiny, *words) == 130
    assert len(list(out.glob(".*.latent.safetensors"))) == 8 and not list(out.glob("*.mp4"))
    counted.update(dict.fromkeys(counted, 0))
    with monkeypatch.context() as patch:
        stop_after(patch, "write", 5)
        assert run(tiny, *words) == 130
    assert counted["latents"] == CASES - 8 and len(list(out.glob("*.mp4"))) == 5
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert len(list(out.glob(".*.latent.safetensors"))) == CASES - 5
    counted.update(dict.fromkeys(counted, 0))
    assert run(tiny, *words) == 0
    assert counted == {"text": 0, "vae": 1, "transformer": 0, "latents": 0}, "only decoding is left"
    assert "5 of them there already" in capsys.readouterr().out
    assert made.items() <= {p: p.stat().st_mtime_ns for p in out.glob("*.mp4")}.items()
    assert not list(out.glob(".*")) and len(list(out.glob("*.mp4"))) == CASES
    with av.open(str(out / "20.mp4")) as container:
        assert container.streams.video[0].frames == 5
    assert run(tiny, *words, "--seed", "1") == 2
    assert "to be made with these settings" in capsys.readouterr().err


def test_a_kept_latent_of_other_settings_is_made_anew(tiny, listed, tmp_path, counted, monkeypatch):
    listed.write_text(json.dumps(json.loads(listed.read_text())[:2]))
    with monkeypatch.context() as patch:
        stop_after(patch, "write", 0)
        assert run(tiny, "--batch", listed, "--output-folder", tmp_path / "a") == 130
    assert run(tiny, "--batch", listed, "--output-folder", tmp_path / "a", "--seed", "9") == 0
    assert run(tiny, "--batch", listed, "--output-folder", tmp_path / "b", "--seed", "9") == 0
    for name in ("1.mp4", "2.mp4"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


BAD = {
    "no JSON": ("[", "expected a JSON list of rows"),
    "no list": ('{"img": "a.png", "prompt": "x"}', "expected a JSON list of rows"),
    "no rows": ("[]", "expected a JSON list of rows"),
    "bad rows": ([{"img": "imgs/peru.png", "prompt": "x"}, {"img": "imgs/peru.png", "prompt": " "},
                  7, {"prompt": "x"}, {"img": "imgs/gone.png", "prompt": "x"},
                  {"img": "../face.png", "prompt": "x"}, {"img": "eval.json", "prompt": "x"}],
                 "expected 7 rows with a picture and a prompt in {path}, got 6 without (row 2: no "
                 "prompt, row 3: no prompt, row 4: no img, row 5: imgs/gone.png, missing file, row "
                 "6: ../face.png leads out of the list's folder and 1 more); mend them"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_list_is_one_line_before_anything_is_read(name, tiny, listed, tmp_path, counted,
                                                        capsys):
    data, told = BAD[name]
    listed.write_text(data if isinstance(data, str) else json.dumps(data))
    assert run(tiny, "--batch", listed, "--output-folder", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told.format(path=listed) in error, error
    assert not list(tmp_path.iterdir()) and not any(counted.values())


def test_a_batch_needs_its_folder_and_a_folder_its_batch(tiny, listed, tmp_path, capsys):
    for words, told in ((("--batch", listed), "--output-folder"),
                        (("--output-folder", tmp_path), "--batch"),
                        (("--batch", listed, "--output-folder", tmp_path, "--prompt", "x"),
                         "--prompt")):
        with pytest.raises(SystemExit):
            run(tiny, *words)
        assert told in capsys.readouterr().err
