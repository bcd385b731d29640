"""What a file is that is no LTX-2.3 checkpoint, in one line, and what to take instead.

The idea. Somebody who downloads 46 GB sooner or later gives the wrong file: half of it, the web
page in front of it, a LoRA, the text model, last year's model. Python would answer with a traceback
or, worse, with a model that runs and paints noise. So `describe` says what stands at a path that
cannot be opened at all, from its first bytes, and `stranger` what a readable file is, from its
header and names. Nothing here reads a weight, and a pickle, which can run code, is never opened.

LTX-2.3: the names, switches and versions that tell its relatives apart. ST-DRC (arXiv 2606.02441)
  says nothing of files.
our reading: the sentences. Only positive evidence counts: what is not known to be another model
  passes, and is held to its names and shapes later (ltx/checkpoint.py).

    describe(path, error)                            # "a web page at x.safetensors; download ..."
    stranger(header, names)                          # "a LoRA; give it with --lora, ...", or None

Read next: ltx/vae.py
"""

import re
from collections.abc import Iterable
from pathlib import Path

from common.files import one_line, parse_json

SINGLE_FILE = "ltx-2.3-22b-dev.safetensors"  # LTX-2.3: the published checkpoint

# The first bytes of a file that is not safetensors -> what it is, what to do.
BEGINNINGS = {
    b"GGUF": ("a GGUF file (numbers packed for other programs)", f"use {SINGLE_FILE}"),
    b"PK\x03\x04": ("a zip archive, the form of .pt and .ckpt files, which can run code and are "
                    "never opened", "use a .safetensors file"),
    b"\x80": ("a pickle (.pt, .ckpt, .bin), which can run code and is never opened",
              "use a .safetensors file"),
    b"version https://git-lfs": ("a git-lfs pointer, not the file it points to",
                                 "run git lfs pull"),
    b"<": ("a web page",
           "download the file itself, after accepting its licence where one is asked for"),
    b"{": ("a JSON text, perhaps the index of a folder", "give the .safetensors file"),
}  # fmt: skip


def describe(path: Path, error: Exception) -> str:
    """What stands at a path that is no readable safetensors: "<thing> at <path>; <what to do>"."""
    if path.is_dir():
        if (path / "model_index.json").exists() or (path / "transformer").is_dir():
            return f"a diffusers folder at {path}; give the single file {SINGLE_FILE} instead"
        if (path / "tokenizer.json").exists():
            return (f"the folder of a text model at {path}; that is for --gemma-root, "
                    f"give {SINGLE_FILE} here")
        return f"a folder at {path}; give the .safetensors file"
    if not path.is_file():
        return f"no file at {path}; check the path"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")  # safetensors: of the JSON that follows
            likely = start[8:9] == b"{" and length < 10**8
            table = file.read(max(0, length - 56)) if likely else None
    except OSError as problem:
        return f"an unreadable one at {path} ({problem.strerror}); check its permissions"
    if size == 0:
        return f"an empty file at {path}; download it again"
    if table is not None:
        thing = _cut_off(start[8:] + table, length, size) or f"a damaged one ({one_line(error)})"
        return f"{thing} at {path}; download it again"
    for beginning, (thing, advice) in BEGINNINGS.items():
        if start.startswith(beginning):
            return f"{thing} at {path}; {advice}"
    return f"a file of another kind at {path} ({one_line(error)}); use {SINGLE_FILE}"


def _cut_off(table: bytes, length: int, size: int) -> str | None:
    """How many bytes of how many there are, where some are missing."""
    whole, at_least = 8 + length, "at least "
    if size >= whole:
        try:
            rows = parse_json(table[:length])
            ends = [row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__"]
            whole, at_least = whole + max(ends, default=0), ""
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
    if size >= whole:
        return None
    return f"a download that was cut off: {size:,} of {at_least}{whole:,} bytes"


# LTX-2.3: switches its config does not have, and what their absence means. Other values are later.
LATER = {"ff_bias": True, "use_prompt_adaln_single": True, "use_keyframes_abs_pos_embedding": False,
         "connector_ff_bias": True}  # fmt: skip
LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.",
              ".dora_scale")  # fmt: skip
DIFFUSERS_MARKS = ("proj_in.", "time_embed.", "transformer_blocks.", "encoder.", "decoder.",
                   "connectors.")  # fmt: skip


def stranger(metadata: dict, names: Iterable[str]) -> str | None:
    """What a safetensors file is, if it is surely no LTX-2.3 checkpoint: "<thing>; <what to do>".

    metadata: the header, "config" parsed. None when nothing speaks against the file; only positive
    evidence counts, because a checkpoint may leave out what it does not need.
    """
    names = list(names)
    if any(mark in name for name in names for mark in LORA_MARKS):
        return f"a LoRA; give it with --lora, and {SINGLE_FILE} as the checkpoint"
    config, version = metadata.get("config", {}), metadata.get("model_version", "")
    if other := generation(version, config.get("transformer", {}), names):
        return f"{other}; use {SINGLE_FILE}"
    if not config and any(name.endswith("embed_tokens.weight") for name in names):
        return ("a text model without a 'config' entry; that is for --gemma-root, "
                f"use {SINGLE_FILE} here")
    if not config and names and all(name.startswith(DIFFUSERS_MARKS) for name in names):
        return ("one part of a diffusers folder, without a 'config' entry; "
                f"use the single file {SINGLE_FILE}")
    return None


def generation(version: str, settings: dict, names: list[str]) -> str | None:
    """Which relative of LTX-2.3 a file holds and how that shows; None when it may be LTX-2.3.

    version: "model_version" of the header; settings: config["transformer"]; names: of all tensors.
    """
    number = re.match(r"(\d+)\.(\d+)", version)
    release = (int(number[1]), int(number[2])) if number else (2, 3)
    kind = settings.get("_class_name")
    elder = any("caption_projection." in name for name in names)  # LTX-2.3 has none
    sound = any("audio" in name for name in names)
    said, shown = f"model_version {version!r:.40}", "caption_projection tensors"
    if kind == "Transformer3DModel" or release < (1, 0) or (
            elder and not sound and kind is None and not number):
        told = f"_class_name {one_line(kind)}" if kind else said if number else shown
        return f"LTX-Video 0.9, an older model ({told})"
    if release < (2, 3) or elder:
        return f"LTX-2.0, an older model ({said if release < (2, 3) else shown})"
    if kind == "AVTransformer3DModel" and "cross_attention_adaln" not in settings:
        return "LTX-2.0, an older model (no cross_attention_adaln in its config)"
    if release > (2, 3):
        return f"LTX-{one_line(version, 40)}, a later model ({said})"
    for key, value in LATER.items():
        if settings.get(key, value) != value:
            return f"LTX-2.5, a later model ({key} = {one_line(settings[key])})"
    if any(name.endswith("keyframes_abs_pos_embedding") for name in names):
        return "LTX-2.5, a later model (a tensor keyframes_abs_pos_embedding)"
    return None
