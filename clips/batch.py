"""Many faces and prompts at once: the list of a benchmark, and the videos that belong to its rows.

The idea. A benchmark of identity is a file of rows, a picture and a prompt each, and wants a folder
of videos named by the rows' numbers. Called once a row, a program loads 70 GB once a row. So the
list is read here, whole and before any work: a bad row in the middle of a night is a row too late.
And a night's work goes on after a kill: a video that is there is not made again, and a latent that
waits for the decoder lies beside it. Both say with which settings they were made.

paper:       nothing of this (ST-DRC, arXiv 2606.02441).
our reading: the form is that of the IPVG challenge 2026, track 1 (ACM Multimedia): eval.json with
             "img" and "prompt", videos 1.mp4, 2.mp4, ... in the order of its rows.

Conventions. Rows count from 1. Pictures are relative to the list's folder, and lie in it: a list
from somebody else cannot have other files read and shown in its outputs.

    for row in read_batch(Path("eval.json")): row.number, row.img, row.prompt
    row.video(Path("out"))                                                # out/1.mp4
    is_done(row.video(Path("out")), settings)

Read next: clips/container.py
"""

import json
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from clips.pictures import Unusable, open_picture
from common.files import find_file, one_line, parse_json, read_json, read_text
from ltx.checkpoint import open_file, write_file

MOST_TOLD = 5  # bad rows that are named; the rest is counted


class Row(NamedTuple):
    """One case: its number from 1, the picture of the person, what happens."""

    number: int
    img: Path
    prompt: str

    def video(self, folder: Path) -> Path:
        """Where its video is, or will be."""
        return folder / f"{self.number}.mp4"


def read_batch(path: Path) -> list[Row]:
    """The rows of an eval.json. Every picture is opened once: raises ValueError, one line that
    names the bad rows."""
    try:
        data = parse_json(read_text(path))
        if not isinstance(data, list) or not data:
            raise ValueError(one_line(data, 60))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a JSON list of rows with img and prompt in {path}, got "
                         f"{one_line(error)}; check --batch") from None
    rows, bad = [], []
    for number, row in enumerate(data, 1):
        try:
            rows.append(Row(number, *_read_row(row, path.parent)))
        except ValueError as error:
            bad.append(f"row {number}: {getattr(error, 'detail', error)}")
    if bad:
        told = ", ".join(bad[:MOST_TOLD])
        more = f" and {len(bad) - MOST_TOLD} more" if len(bad) > MOST_TOLD else ""
        raise ValueError(f"expected {len(data)} rows with a picture and a prompt in {path}, got "
                         f"{len(bad)} without ({told}{more}); mend them")
    return rows


def _read_row(row, folder):
    img, prompt = (row.get(name) if isinstance(row, dict) else None for name in ("img", "prompt"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("no prompt")
    if not isinstance(img, str) or not img:
        raise ValueError("no img")
    picture = find_file(folder, img)
    if not picture.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{one_line(img, 60)} leads out of the list's folder")
    try:
        open_picture(picture)
    except Unusable as error:
        raise ValueError(f"{one_line(img, 60)}, {error.reason}") from None
    return picture, prompt


# ------------------------------------------------------------ what a killed batch left


def latent_path(video: Path) -> Path:
    """Where the latent of a video waits to be decoded."""
    return video.with_name(f".{video.stem}.latent.safetensors")


def keep_latent(video: Path, settings: dict, latent: Tensor, fidelity: float) -> None:
    """Write a latent (1, C, F, H, W), and how well the reference was encoded, in dB."""
    told = {"settings": json.dumps(settings), "reference_psnr_db": repr(fidelity)}
    write_file(latent_path(video), {"latent": latent.contiguous()}, told)


def kept_latent(video: Path, settings: dict) -> tuple[Tensor, float] | None:
    """Inverse of `keep_latent`; None where there is none, or one of other settings."""
    if not latent_path(video).exists():
        return None
    with open_file(latent_path(video)) as file:
        told = file.metadata()
        if told["settings"] != json.dumps(settings):
            return None
        return file.get_tensor("latent"), float(told["reference_psnr_db"])


def is_done(video: Path, settings: dict) -> bool:
    """Is the video there? Raises ValueError if its record tells of other settings."""
    if not video.exists():
        return False
    record = video.with_suffix(".json")
    made = read_json(record).get("arguments") if record.exists() else None
    if made != json.loads(json.dumps(settings)):
        raise ValueError(f"expected {video} to be made with these settings, got others in {record};"
                         " give the old command, or another --output-folder")
    return True
