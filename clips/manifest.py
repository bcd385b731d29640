"""A list of clips -> rows that a training can trust, each with a reference picture of the person.

The idea. A folder of clips is never clean: a copy was cut off, a caption is missing, a faces file
was made from frames that lay on their side. A training that meets such a file after two hours
stops, or, worse, goes on with wrong numbers. So every clip is decoded once before: `check` says
which rows are used and why each other one is not. The reference is drawn here, too: a model that is
shown a frame of the very clip it must make learns to copy the picture, not the person.

A manifest is JSONL, JSON or CSV with the FIELDS below; docs/clips.md explains it. A list from
somebody else must not make a training read, and a cache keep, what is not its own: paths must lead
(links followed) into the manifest's folder or one named with --root, unless --allow-outside.

paper:        a reference of the person beside each clip (ST-DRC, arXiv 2606.02441), no word on how.
our reading:  all of this file: the checks, and the order of `draw_reference`.

Conventions. Boxes (x0, y0, x1, y1) and landmarks (x, y) in pixels of the upright picture, from its
outer corner (the middle of the first pixel is 0.5); times in seconds after the clip's first frame.

    python -m clips.manifest check clips/manifest.jsonl

    report = check("clips/manifest.jsonl", parse_buckets("512x768x121,512x768x1"))
    drawn = draw_reference(report.used, 0, torch.Generator().manual_seed(0))

Read next: clips/cache.py
"""

import argparse
import csv
import io
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clips.frames import (
    DEFAULT_BUCKETS,
    TIE,
    Bucket,
    Crop,
    Probe,
    choose_bucket,
    clip_times,
    cover,
    frame_at,
    nearest,
    parse_buckets,
    probe,
)
from clips.pictures import Unusable, open_picture
from common.cli import Parser, command
from common.files import find_file, one_line, parse_json, read_text

FIELDS = ("video", "media_path", "caption", "reference", "identity", "faces")
LONGEST = 100_000  # our reading: characters of a field; LTX-2.3 reads 1024 tokens
LARGEST = 1e6      # our reading: pixels of a side


# ------------------------------------------------------------ faces


class Face(NamedTuple):
    """The face in a picture of `size` (h, w): box (4,), landmarks (5, 2) or None, in its pixels."""

    size: tuple[int, int]
    box: Tensor
    landmarks: Tensor | None


class Faces(NamedTuple):
    """Faces of one clip in pixels of a picture of `size` (h, w), and in the row's own reference."""

    frame_rate: float            # how often the detector looked, times a second
    size: tuple[int, int]
    times: Tensor                # (N,) seconds
    boxes: Tensor                # (N, 4)
    landmarks: Tensor            # (N, 5, 2), NaN where there are none
    reference: Face | None = None


def load_faces(path: str | Path) -> Faces:
    """Read a faces file:

        {"frame_rate": 24, "size": [h, w],
         "frames": [{"t": 0.0, "box": [x0, y0, x1, y1], "landmarks": [[x, y], ... 5]}, ...],
         "reference": {"size": [h, w], "box": [x0, y0, x1, y1], "landmarks": [[x, y], ... 5]}}

    Landmarks and reference are optional; a frame that is absent has no face. Sizes: of the upright
    pictures that the detector saw. Raises ValueError.
    """
    none = [[math.nan] * 2] * 5
    try:
        data = parse_json(read_text(Path(path)))
        size, frame_rate = _read_size(data["size"]), float(data["frame_rate"])
        if not 0 < frame_rate < 1e6:
            raise ValueError(f"a frame rate of {frame_rate}")
        frames = sorted(data["frames"], key=lambda row: row["t"])
        times = torch.tensor([row["t"] for row in frames], dtype=torch.float64)
        if not times.isfinite().all():
            raise ValueError("a time that is not finite")
        boxes = _read_boxes([row["box"] for row in frames])
        marks = _read_numbers([row.get("landmarks") or none for row in frames], 5, 2)
        reference = data.get("reference")
        reference = None if reference is None else _read_face(reference)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError,
            OverflowError) as error:
        told = one_line(f"no {error}" if isinstance(error, KeyError) else error)
        raise ValueError(f"expected a faces file with frame_rate, size and frames, got {told} in "
                         f"{path}; see load_faces") from None
    return Faces(frame_rate, size, times, boxes, marks, reference)


def _read_size(data):
    size = tuple(int(n) for n in data)
    if len(size) != 2 or not 1 <= min(size) <= max(size) <= LARGEST:
        raise ValueError(f"size {one_line(data, 80)}, not [h, w]")
    return size


def _read_numbers(rows, *shape):
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), *shape)


def _read_boxes(rows):
    boxes = _read_numbers(rows, 4)
    if not (boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()):
        raise ValueError("a box that is not [x0, y0, x1, y1] with x1 > x0 and y1 > y0")
    return boxes


def _read_face(data):
    size, (box,), marks = _read_size(data["size"]), _read_boxes([data["box"]]), None
    if (box[2:] <= 0).any() or box[0] >= size[1] or box[1] >= size[0]:
        raise ValueError(f"box {data['box']} outside the reference of {size[0]}x{size[1]}")
    if data.get("landmarks") is not None:
        (marks,) = _read_numbers([data["landmarks"]], 5, 2)
        if not marks.isfinite().all():
            raise ValueError("landmarks of the reference that are not finite")
    return Face(size, box, marks)


def faces_for_clip(faces: Faces, bucket: Bucket, crop: Crop, times: Sequence[float]
                   ) -> tuple[Tensor, Tensor | None, Tensor]:
    """Faces in the clip's frames and pixels: boxes (F, 4), landmarks (F, 5, 2) or None, valid (F,).

    crop: `cover(height, width, bucket)`, the geometry the clip went through; times: of its frames.
    valid is False, and the numbers 0, where no face was seen within half a detector step, or where
    less than half of its box is left after the crop.
    """
    if len(faces.times) == 0:
        return torch.zeros(len(times), 4), None, torch.zeros(len(times), dtype=torch.bool)
    targets = torch.tensor(times, dtype=torch.float64)
    gap, row = (targets[:, None] - faces.times).abs().min(dim=1)                    # (F,) of (F, N)
    scale = torch.tensor([crop.columns / faces.size[1], crop.rows / faces.size[0]])
    shift = torch.tensor([float(crop.left), float(crop.top)])
    boxes = faces.boxes[row] * scale.repeat(2) - shift.repeat(2)                    # (F, 4)
    marks = faces.landmarks[row] * scale - shift                                    # (F, 5, 2)
    inside = boxes.clamp(min=0).minimum(torch.tensor([bucket.width, bucket.height] * 2))
    area, kept = ((b[:, 2:] - b[:, :2]).prod(dim=1) for b in (boxes, inside))
    valid = (gap <= 0.5 / faces.frame_rate + TIE) & (kept >= 0.5 * area)
    boxes = torch.where(valid[:, None], boxes, 0.0)
    if faces.landmarks.isnan().all():
        return boxes, None, valid
    return boxes, torch.where(valid[:, None, None], marks, 0.0), valid


def box_mask(boxes: Tensor, valid: Tensor, height: int, width: int) -> Tensor:
    """Boxes (F, 4) -> mask (F, height, width), 1 on the face, 0 elsewhere and where not valid."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5                    # pixel middles
    x0, y0, x1, y1 = boxes[:, :, None].unbind(dim=1)                                # (F, 1) each
    across, down = (x >= x0) & (x < x1), (y >= y0) & (y < y1)                       # (F, w), (F, h)
    return (down[:, :, None] & across[:, None, :] & valid[:, None, None]).float()


# ------------------------------------------------------------ the manifest


@dataclass(frozen=True)
class Row:
    """One row. `broken` says why it cannot be used, None if nothing is known against it.

    bucket, found and frame_rate are filled in by `check`; start: seconds, where the target begins.
    """

    number: int
    video: Path | None = None
    caption: str = ""
    reference: Path | None = None
    identity: str = ""
    faces: Path | None = None
    broken: Unusable | None = None
    bucket: Bucket | None = None
    found: Probe | None = None
    frame_rate: float = 24.0
    start: float = 0.0

    def own_frames(self) -> range:
        """The stored frames that the target is made of: from the first to the last of them."""
        numbered = ((time, k) for k, time in enumerate(self.found.times))
        own = list(nearest(numbered, clip_times(self.bucket.frames, self.frame_rate, self.start)))
        return range(own[0], own[-1] + 1)


def read_manifest(path: str | Path, allow_outside: bool = False, roots: Sequence[str | Path] = ()
                  ) -> list[Row]:
    """Rows of a manifest, numbered from 1 (JSONL: by line), the unusable ones with `broken` set.

    roots: more folders that paths may lead into; allow_outside: anywhere. Raises ValueError only
    when the manifest itself cannot be read, or holds no row.
    """
    path = Path(path)
    folders = [Path(root).resolve() for root in (path.parent, *roots)]
    rows = [_make_row(number, data, folders, allow_outside) for number, data in _read_table(path)]
    if not rows:
        raise ValueError(f"expected rows in {path}, got none; write one line for each clip")
    return rows


def _read_table(path):
    try:
        text, kind = read_text(path), path.suffix.lower()
        if kind in (".jsonl", ".ndjson"):
            lines = enumerate(text.split("\n"), 1)
            return [(number, _parse_line(line)) for number, line in lines if line.strip()]
        if kind == ".csv":
            data = _read_csv(text)
        elif kind == ".json":
            data = parse_json(text)
            data = data["data"] if isinstance(data, dict) and "data" in data else data
        else:
            raise ValueError("its name ends otherwise")
        if not isinstance(data, list):
            raise ValueError("no list inside")
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a manifest (.jsonl, .json or .csv), got {path}: {error}; "
                         "see docs/clips.md") from None
    return list(enumerate(data, 1))


def _read_csv(text):
    """The first line names the columns; between them commas, or semicolons or tabs, as some
    spreadsheets write. A cell too many is a comma without quotes: the text before it is cut."""
    comma = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True,
                       skipinitialspace=True)
    try:
        names, *rows = [[cell.strip() for cell in cells] for cells in lines if cells] or [[]]
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from None
    if "caption" not in names or not {"video", "media_path"} & set(names):
        raise ValueError(f"a first line without video or caption: {one_line(names, 80)}")
    if twice := [name for name in FIELDS if names.count(name) > 1]:
        raise ValueError(f"two columns named {twice[0]}")
    told = f"names; texts with {comma!r} need double quotes, empty cells their {comma!r}"
    return [dict(zip(names, row, strict=True)) if len(row) == len(names)
            else Unusable("bad row", f"{len(row)} cells for {len(names)} {told}") for row in rows]


def _parse_line(line):
    try:
        return parse_json(line)
    except ValueError as error:
        return Unusable("bad row", error)


def _make_row(number, data, folders, allow_outside):
    try:
        text = _texts(data)
        video, caption = text["video"] or text["media_path"], text["caption"].strip()
        if not video:
            raise Unusable("bad row", "neither video nor media_path")
        if not caption:
            raise Unusable("empty caption", video)
        paths = [_locate(name, folders, allow_outside) if name else None
                 for name in (video, text["reference"], text["faces"])]
    except Unusable as error:
        return Row(number, broken=error)
    return Row(number, paths[0], caption, paths[1], text["identity"], paths[2])


def _texts(data):
    """The FIELDS of a row, "" where there is nothing."""
    if isinstance(data, Unusable):
        raise data
    if not isinstance(data, dict):
        raise Unusable("bad row", "not a table of names and values")
    text = {name: "" if data.get(name) is None else data[name] for name in FIELDS}
    for name, value in text.items():
        if not isinstance(value, str):
            raise Unusable("bad row", f"{name} is {value!r:.40}, not a text")
        if len(value) > LONGEST:
            told = f"{name} has {len(value):,} characters, more than {LONGEST:,}"
            raise Unusable("bad row", told)
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise Unusable("bad row", f"{name} holds half a character (a surrogate)")
    return text


def _locate(name, folders, allow_outside):
    try:
        path = find_file(folders[0], name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a zero byte
        raise Unusable("missing file", f"{name}: {error}") from None
    if not allow_outside:
        if ".." in name.replace("\\", "/").split("/"):
            raise Unusable("path outside", f"{name} contains ..")
        if not any(path.is_relative_to(folder) for folder in folders):
            raise Unusable("path outside", f"{name} leads to {path}; name its folder with --root")
    return path


# ------------------------------------------------------------ the check


@dataclass(frozen=True)
class Report:
    """Checked rows: those that are used, with bucket and probe, and the others, with `broken`."""

    rows: list[Row]

    @property
    def used(self) -> list[Row]:
        return [row for row in self.rows if row.broken is None]

    @property
    def refused(self) -> list[Row]:
        return [row for row in self.rows if row.broken is not None]

    def lines(self) -> list[str]:
        """One line for each row that is not used, then the summary, then a warning."""
        lines = [f"row {row.number}: {row.broken}" for row in self.refused]
        summary = f"{len(self.used)} of {len(self.rows)} rows are used"
        for title, counts in (("not used", Counter(row.broken.reason for row in self.refused)),
                              ("buckets", Counter(str(row.bucket) for row in self.used))):
            if counts:
                told = ", ".join(f"{name} {n}" for name, n in counts.most_common())
                summary += f"; {title}: {told}"
        lines.append(summary)
        if beyond := [row for row in self.used if row.found.beyond_srgb]:
            lines.append(f"warning: HDR or wide colours in {len(beyond)} of these clips, first in "
                         f"row {beyond[0].number}: read as if they were BT.709, they come out "
                         "pale; convert them before")
        return lines


def check(manifest: str | Path, buckets: Sequence[Bucket], frame_rate: float = 24.0,
          allow_outside: bool = False, roots: Sequence[str | Path] = ()) -> Report:
    """Decode every clip of a manifest once. Raises ValueError when the manifest is unreadable."""
    return check_rows(read_manifest(manifest, allow_outside, roots), buckets, frame_rate)


def check_rows(rows: Sequence[Row], buckets: Sequence[Bucket], frame_rate: float) -> Report:
    """`check` for rows that are read already."""
    bar = tqdm(rows, desc="check", unit="row", disable=None)
    return Report([check_row(row, buckets, frame_rate) for row in bar])


def check_row(row: Row, buckets: Sequence[Bucket], frame_rate: float,
              look: Callable[[Path], Probe] = probe) -> Row:
    """The row with bucket and probe, or with `broken`. look: decodes a clip, or remembers it."""
    if row.broken is not None:
        return row
    try:
        found = look(row.video)
        bucket = choose_bucket(found.height, found.width, found.frames(frame_rate), buckets)
        _check_files(row, found)
    except Unusable as error:
        return replace(row, broken=error)
    except OSError as error:  # no permission, a name too long
        return replace(row, broken=Unusable("missing file", error))
    except (ValueError, ArithmeticError) as error:  # a decoder's own words, times without end
        return replace(row, broken=Unusable("cannot be decoded", error))
    return replace(row, bucket=bucket, found=found, frame_rate=frame_rate)


def _check_files(row, found):
    """The row's faces file and reference picture can be read, and fit each other and the clip."""
    if row.faces is not None:
        try:
            faces = load_faces(row.faces)
        except ValueError as error:
            raise Unusable("bad faces file", error) from None
        _same_shape(row.faces, faces.size, (found.height, found.width), "clip")
    if row.reference is not None:
        try:
            picture = open_picture(row.reference)
        except Unusable as error:
            raise Unusable("bad reference", error.detail) from None
        if row.faces is not None and faces.reference is not None:
            _same_shape(row.faces, faces.reference.size, picture.size[::-1], "reference")


def _same_shape(path, size, seen, what):
    if abs(math.log(size[0] / size[1] * seen[1] / seen[0])) > 0.02:
        told = f"{path.name}: size {size[0]}x{size[1]} has another shape than the {what}'s"
        raise Unusable("bad faces file", f"{told} {seen[0]}x{seen[1]}; detect on upright pictures")


# ------------------------------------------------------------ references


class Drawn(NamedTuple):
    """A reference. source: "given", "other clip", "other moment" or "own frame".

    box (4,), landmarks (5, 2) in the picture's pixels, None where a faces file does not say.
    """

    picture: Image.Image
    source: str
    box: Tensor | None
    landmarks: Tensor | None


def draw_reference(rows: Sequence[Row], i: int, generator: torch.Generator) -> Drawn:
    """A picture of the person in row i, for reference.letterbox. rows: `Report.used`.

    our reading: the row's own picture; else a frame of another clip of the same identity; else a
    frame of the same clip outside the target; only where none of these exists a frame of the target
    itself. With a faces file, a frame with a face is preferred.
    """
    row = rows[i]
    if row.reference is not None:
        return _given(row)
    others = [other for other in rows
              if row.identity and other.identity == row.identity and other.video != row.video]
    if others:
        row = others[_randint(len(others), generator)]
        return _draw_frame(row, range(len(row.found.times)), "other clip", generator)
    own = row.own_frames()
    rest = [k for k in range(len(row.found.times)) if k not in own]
    return _draw_frame(row, rest or own, "other moment" if rest else "own frame", generator)


def _given(row):
    picture = open_picture(row.reference)
    face = load_faces(row.faces).reference if row.faces is not None else None
    if face is None:
        return Drawn(picture, "given", None, None)
    scale = torch.tensor([picture.width / face.size[1], picture.height / face.size[0]])  # x, y
    marks = None if face.landmarks is None else face.landmarks * scale
    return Drawn(picture, "given", face.box * scale.repeat(2), marks)


def _draw_frame(row, indices, source, generator):
    found, seen, box, marks = row.found, [], None, None
    if row.faces is not None:
        stored = Bucket(found.height, found.width, 1)
        crop = cover(found.height, found.width, stored)  # nothing is cropped away
        boxes, landmarks, valid = faces_for_clip(load_faces(row.faces), stored, crop, found.times)
        seen = [k for k in indices if valid[k]]
    choice = seen or indices
    wanted = choice[_randint(len(choice), generator)]
    if seen:
        box = boxes[wanted]
        if landmarks is not None and not landmarks[wanted].isnan().any():
            marks = landmarks[wanted]
    frame = frame_at(row.video, found.times, wanted)
    picture = Image.fromarray(frame.pixels())
    if picture.size != (frame.width, frame.height):  # its pixels are not square
        picture = picture.resize((frame.width, frame.height), Image.Resampling.BILINEAR)
    return Drawn(picture, source, box, marks)


def _randint(count, generator):
    return int(torch.randint(count, (), generator=generator, device=generator.device))


# ------------------------------------------------------------ command line


def add_manifest_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments that say which clips: also those of clips/cache.py."""
    add = p.add_argument
    add("manifest", type=Path, help="JSONL, JSON or CSV, one row for each clip")
    add("--buckets", default=DEFAULT_BUCKETS, help="height x width x frames, separated by commas")
    add("--frame-rate", type=float, default=24.0, help="of the latents, whatever the files have")
    add("--root", action="append", default=[], help="a folder that paths may lead into; repeatable")
    add("--allow-outside", action="store_true", help="paths may lead anywhere")


def check_arguments(args: argparse.Namespace, time_scale: int, space_scale: int,
                    check: Callable[..., Report] = check_rows) -> Report:
    """`check_rows` (or cache.check_once) with the arguments above; prints the report."""
    if not 0 < args.frame_rate < 1e6:
        raise ValueError(f"expected a frame rate above 0, got {args.frame_rate}; "
                         "use for example 24")
    buckets = parse_buckets(args.buckets, time_scale, space_scale)
    rows = read_manifest(args.manifest, args.allow_outside, args.root)
    report = check(rows, buckets, args.frame_rate)
    print("\n".join(report.lines()))
    return report


def main(words: list[str] | None = None) -> int:
    """Exit status: 0 every row is used, 1 some are not, 2 the manifest or a setting is no good."""
    p = Parser("clips.manifest", description=__doc__.split("\n")[0])
    c = p.add_subparsers(dest="command").add_parser(
        "check", help="say how many rows are used and why each other one is not",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_manifest_arguments(c)
    add = c.add_argument
    add("--time-scale", type=int, default=8, help="the VAE's frames per latent frame (tiny: 4)")
    add("--space-scale", type=int, default=32, help="the VAE's pixels per latent cell (tiny: 8)")
    args = p.parse_args(words)
    if args.command is None:
        p.print_help()
        return 0
    refused = []

    def work() -> None:
        if min(args.time_scale, args.space_scale) < 1:
            raise ValueError(f"expected scales of at least 1, got {args.time_scale} and "
                             f"{args.space_scale}; see --help")
        refused.extend(check_arguments(args, args.time_scale, args.space_scale).refused)

    return command("clips.manifest", work, "nothing was written") or int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
