"""Files: written whole or not at all, and what stands in other people's read with bounds.

The idea. A program can be killed at any moment, and whoever reads the file next must not find half
of it. So everything is written under a hidden name in the same folder and renamed when it is
complete: a rename cannot be half done. What is read from outside (JSON, names, error texts of
libraries) is bounded before it is believed: a file of a hundred bytes can announce a gigabyte, and
a name can hold characters that steer a terminal.

ST-DRC (arXiv 2606.02441) says nothing of this; our reading: all of it. Nothing here calls fsync: a
power cut may still cost the last file.

    atomic_write("out.json", lambda path: path.write_text("{}"))
    settings = parse_json(read_text(Path("config.json")))

Read next: common/cli.py
"""

import json
import os
import secrets
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# our reading: what safetensors allows for its table; Gemma's tokenizer.json is a third of it
JSON_BYTES = 100_000_000
JSON_DEPTH = 32  # our reading: LTX-2.3's config has 5 levels; a thousand would exhaust the stack


def temp_path(path: Path) -> Path:
    """The hidden name, in the same folder, under which a file is written before it is renamed.

    Random rather than the number of the process: several machines may write to one shared folder.
    The ending stays, since some writers choose their format by it.
    """
    return path.with_name(f".{path.stem[:60]}.{secrets.token_hex(8)}.tmp{path.suffix}")


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename onto `path`: a reader sees the old file or the
    new, never half of one.

    Makes the folder. The file may be read and written by whom the umask allows. Raises OSError, one
    line, also for a full disk that safetensors met.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temp_path(path)
    try:
        temporary.touch()
        usual = temporary.stat().st_mode  # as the umask says; safetensors lets only the owner read
        temporary.unlink()
        write(temporary)
        temporary.chmod(usual)
        os.replace(temporary, path)
    except SafetensorError as error:  # the library has a type of its own for it
        raise OSError(f"cannot write {path}: {error}; make room, or choose another folder"
                      ) from None
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, seconds: float = 0) -> None:
    """Delete what killed programs left of `atomic_write` in a folder and nobody has written to for
    so many seconds."""
    for path in folder.glob(f".*.{'[0-9a-f]' * 16}.tmp*"):
        try:
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()
        except OSError:
            pass  # another process was faster


def one_line(told: object, most: int = 160) -> str:
    """What a file, a name or a library says, as one short line that cannot steer a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(told)).split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 3 :]}"


def find_file(folder: Path, name: str) -> Path:
    """The path that a list means by a name, wherever it was written: Windows parts folders by a
    backslash, macOS takes accented letters apart (NFD). As it stands when there is no such file."""
    for spelled in (name, name.replace("\\", "/")):
        for form in ("NFC", "NFD"):
            for tried in (spelled, unicodedata.normalize(form, spelled)):
                if os.path.lexists(folder / tried):
                    return folder / tried
    return folder / name


def read_text(path: Path) -> str:
    """A text file in UTF-8, of at most JSON_BYTES. Raises ValueError, one line, or OSError."""
    if not path.is_file():  # also keeps pipes and devices from being read
        raise ValueError("a folder" if path.is_dir() else "no such file")
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{size:,} bytes, more than {JSON_BYTES:,}")
    return path.read_text(encoding="utf-8-sig")


def parse_json(text: str | bytes) -> Any:
    """json.loads with bounds: at most JSON_BYTES long, nested at most JSON_DEPTH deep.

    Raises ValueError, one line, for whatever is wrong. Memory: up to 25 times the text.
    """
    if len(text) > JSON_BYTES:
        raise ValueError(f"{len(text):,} characters of JSON, more than {JSON_BYTES:,}")
    too_deep = ValueError(f"JSON nested deeper than {JSON_DEPTH} levels")
    try:
        data = json.loads(text)
    except RecursionError:
        raise too_deep from None
    level = [data]  # all lists and objects at one depth
    for _ in range(JSON_DEPTH):
        inner = (item for outer in level if isinstance(outer, dict | list)
                 for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return data
    raise too_deep


def write_json(path: Path, record: dict, indent: int | None = None) -> None:
    """A record as JSON. NaN, which is no JSON, becomes null."""
    standard = json.loads(json.dumps(record), parse_constant=lambda word: None)
    text = json.dumps(standard, indent=indent) + "\n"
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """Inverse of `write_json`. Raises ValueError for what is no JSON object."""
    try:
        record = json.loads(path.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object in {path}, got something else; delete it and run "
                         "again")
    return record
