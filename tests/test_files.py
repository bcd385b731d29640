"""Files are written whole or not at all, and JSON from outside is bounded before it is believed.

Hardware: CPU, a second. Run: python -m pytest tests/test_files.py
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from common import files


def test_a_name_from_another_system_finds_its_file(tmp_path):
    """Backslashes of Windows; letters composed there, taken apart on a Mac's disk, and back."""
    composed, apart = "B\u00e9a.mp4", "Be\u0301a.mp4"
    for name in ("clips/plain.mp4", f"clips/{apart}", f"both/{apart}", f"both/{composed}",
                 f"alone/{composed}", "back\\slash.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for given, found in (("clips\\plain.mp4", "clips/plain.mp4"),
                         (f"clips\\{composed}", f"clips/{apart}"),
                         (f"alone/{apart}", f"alone/{composed}"),
                         (f"both/{composed}", f"both/{composed}"),
                         (f"both/{apart}", f"both/{apart}"),
                         ("back\\slash.mp4", "back\\slash.mp4"), ("none\\x.mp4", "none\\x.mp4")):
        assert str(files.find_file(tmp_path, given)) == f"{tmp_path}/{found}"


def test_a_file_is_written_under_a_hidden_name_in_its_folder_and_renamed(tmp_path):
    target, seen = tmp_path / "new" / "a.tar.gz", []

    def write(path):
        path.write_text("text")
        seen.append((path.parent, path.name[0], path.suffix, target.exists()))

    files.atomic_write(target, write)
    assert seen == [(target.parent, ".", ".gz", False)] and target.read_text() == "text"
    assert [path.name for path in target.parent.iterdir()] == ["a.tar.gz"]
    names = {files.temp_path(target) for _ in range(9)}
    assert len(names) == 9, "two programs that write to one folder do not meet"
    assert len(files.temp_path(tmp_path / ("x" * 250 + ".png")).name) < 255, "as disks allow"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_whoever_the_umask_lets_read_may_read_what_safetensors_wrote(tmp_path, umask):
    before = os.umask(umask)
    try:
        files.atomic_write(tmp_path / "a", lambda path: save_file({"x": np.zeros(1)}, path))
        files.atomic_write(tmp_path / "b", lambda path: path.write_text("text"))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
    with pytest.raises(FileNotFoundError):
        files.atomic_write(tmp_path / "b", lambda path: None)
    assert (tmp_path / "b").read_text() == "text"


@pytest.mark.parametrize("error", [ValueError("half"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail(path):
        path.write_text("half")
        raise error

    with pytest.raises(type(error)):
        files.atomic_write(target, fail)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_what_safetensors_calls_a_full_disk_is_an_error_of_the_system(tmp_path):
    def fail(path):
        raise SafetensorError("No space left on device")

    with pytest.raises(OSError, match="x.safetensors: No space left on device; make room"):
        files.atomic_write(tmp_path / "x.safetensors", fail)


def test_only_old_leftovers_of_ours_are_swept(tmp_path):
    for kind in ("old", "new"):
        left = files.temp_path(tmp_path / f"{kind}.safetensors")
        left.touch()
        if kind == "old":
            os.utime(left, (1, 1))
    for name in (".mine.tmp", "kept.safetensors"):
        (tmp_path / name).touch()
    files.sweep(tmp_path, seconds=60)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 3 and left[0] == ".mine.tmp" and left[1].startswith(".new."), left
    files.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_text_from_outside_becomes_one_short_line_that_cannot_steer_a_terminal():
    assert files.one_line("a\x1b[2Jb\n\u2028 c") == "a [2Jb c"
    line = files.one_line("x" * 10_000, most=60)
    assert len(line) <= 60 and " ... " in line


def test_json_is_bounded_in_depth_and_size(tmp_path, monkeypatch):
    assert files.parse_json("[" * 32 + "]" * 32)
    for depth in (33, 900, 100_000):
        for opened, closed in (("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")):
            with pytest.raises(ValueError, match="^JSON nested deeper than 32 levels$"):
                files.parse_json(opened * depth + "1" + closed * depth)
    monkeypatch.setattr(files, "JSON_BYTES", 20)
    (tmp_path / "a.json").write_text("9" * 21)
    for read in (lambda: files.parse_json("9" * 21), lambda: files.read_text(tmp_path / "a.json")):
        with pytest.raises(ValueError, match="more than 20"):
            read()


def test_only_a_file_is_read_as_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbftext")
    assert files.read_text(tmp_path / "bom.txt") == "text"
    for path, got in ((Path("/dev/null"), "no such file"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=got):
            files.read_text(path)


def test_a_record_is_standard_json_and_comes_back(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1.5, "b": [math.nan, math.inf]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": 1.5, "b": [None] * 2}
    assert files.read_json(path) == {"a": 1.5, "b": [None, None]}
    for text in ("[1]", "half {", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="expected a JSON object in .*a.json, got something"):
            files.read_json(path)
