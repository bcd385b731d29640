"""A folder of real video files whose every pixel is known, some of them broken on purpose.

The idea. Whoever trains on files hopes that the frames which arrive are the frames that were
filmed: the right ones in time, upright, uncropped, not dimmed by a wrong colour range. With filmed
clips nobody can check that. So people of the procedural world are rendered here, encoded as phones,
cameras and web sites do it (five frame rates, five sizes, six codecs, four containers, sound, a
sideways one), and the same moments are kept beside them as plain numbers that never saw a codec. A
training through the files and one on the numbers must then agree; if the decoder slips by one
frame, they do not, and neither do the tests.

    python -m bench.clip_world FOLDER [--people 24 --clips 72 --seed 0]

writes FOLDER/manifest.jsonl, FOLDER/clips/ (videos and faces files) and FOLDER/direct.safetensors:
for each row number n that is meant to be used "n.video" (9, 64, 64, 3) uint8, rendered at 64x64, 8
frames per second, and "n.boxes" (9, 4), pixels of those; (1, ...) for a clip of one frame. Among
the good rows stand the BROKEN ones.

Conventions. A clip's action takes the first second and stays at its end: the frame at s seconds
shows min(s, 1). The world is square; a wider or taller picture goes on with its outermost pixels,
so the centre crop is the world again. A file of another rate than 8 or 24 has no frame at some of
the direct moments; the nearest is up to half a frame off, see `stored_time`.

Read next: tests/test_clip_world.py
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clips.face import template
from common.cli import Parser, command
from common.files import atomic_write, write_json
from ltx.checkpoint import write_file
from toy import world

ROOT = Path(__file__).resolve().parents[1]
SIZE, FRAMES, RATE = 64, 9, 8  # what training reads: the bucket 64x64x9 at 8 frames per second
STEPS = 30_000  # of a second: every rate below has its frames on whole steps
RATES = [Fraction(8), Fraction(24), Fraction(12), Fraction(30000, 1001), Fraction(60)]
SIZES = [(64, 64), (96, 96), (128, 160), (256, 256), (160, 128)]  # height, width, as displayed
USUAL, LONG = Fraction(FRAMES, RATE), Fraction(2)  # seconds
SIDEWAYS = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]  # the player turns it clockwise
REFERENCE = 256  # pixels of a row's own reference picture


class Kind(NamedTuple):
    """One way of storing a clip. sound: codec of an audio track; sideways: stored turned."""

    suffix: str
    codec: str
    options: dict[str, str]
    pix: str = "yuv420p"
    sound: str = ""
    sideways: bool = False


X264 = {"crf": "6", "preset": "veryfast", "bf": "3"}  # bf: frames stored out of their order
X265 = {"crf": "6", "preset": "veryfast", "x265-params": "log-level=none:bframes=3"}
FINE = {"qmin": "1", "qmax": "2"}
VP9 = {"crf": "6", "b": "0", "deadline": "realtime", "cpu-used": "7"}
KINDS = [
    Kind("mp4", "libx264", X264),
    Kind("mp4", "libx265", X265),
    Kind("mp4", "mpeg4", FINE),
    Kind("mov", "mjpeg", FINE, "yuvj420p"),
    Kind("mp4", "libx264", X264, sound="aac"),
    Kind("mp4", "libvpx-vp9", VP9),
    Kind("mp4", "libsvtav1", {"crf": "8", "preset": "10"}),
    Kind("mkv", "libx265", X265, sound="aac"),
    Kind("mp4", "libx264", X264, sideways=True),
    Kind("mp4", "mpeg4", {**FINE, "bf": "2"}, sound="aac"),
    Kind("webm", "libvpx-vp9", VP9, sound="libopus"),
    Kind("mp4", "libx264", X264, "yuv444p"),
]


@dataclass(frozen=True, eq=False)
class Clip:
    """Who does what where, and how it is stored.

    person (T,) traits, setting (3,); size: (height, width) displayed; seconds 0: one frame; suffix:
    of the file, "png" for a picture; seed: of the start pose.
    """

    name: str
    identity: str
    person: Tensor
    setting: Tensor
    action: int
    caption: str
    seed: int
    kind: Kind
    suffix: str
    rate: Fraction
    size: tuple[int, int]
    seconds: Fraction
    own_reference: bool = False
    named: bool = True
    marked: bool = False

    @property
    def times(self) -> list[Fraction]:
        """Seconds of the stored frames."""
        return [k / self.rate for k in range(max(1, math.ceil(self.seconds * self.rate)))]

    @property
    def direct_times(self) -> list[Fraction]:
        """Seconds of the frames that training wants."""
        return [Fraction(k, RATE) for k in range(FRAMES if self.seconds else 1)]


def plan_clips(people: int, clips: int, seed: int) -> list[Clip]:
    """Every clip of the folder, a pure function of the arguments: clip i shows person i % people.

    The clips of one person differ in place and action. Seven of ten rows are plain; one in ten has
    its own reference, one in ten no identity (and two seconds, so that another moment is left);
    clips 3 and 10 have one frame.
    """
    if not 1 <= people <= clips:
        raise ValueError(f"expected at least one clip for each person, got {people} people and "
                         f"{clips} clips; raise --clips")
    g = torch.Generator().manual_seed(seed)
    traits = torch.rand(people, len(world.TRAITS), generator=g)
    settings, actions = world.draw_settings(clips, g), world.draw_actions(people, g)
    kinds, plan = [kind for kind in KINDS if _can_write(kind.codec)], []
    for i in range(clips):
        who, turn = i % people, i // people
        setting, action = settings[i], int(actions[who] + 3 * turn) % len(world.ACTIONS)
        setting[0] = (settings[who, 0] + turn) % len(world.SCENES)
        kind, round_ = kinds[i % len(kinds)], i // len(kinds)
        plan.append(Clip(
            f"clip-{i:03d}", f"person-{who:02d}", traits[who], setting, action,
            world.caption(setting, action, i % len(world.TEMPLATES)), 100_003 * seed + i, kind,
            "png" if i == 3 else "mp4" if i == 10 else kind.suffix,
            RATES[(i + round_) % len(RATES)], SIZES[2 * i % len(SIZES)],
            Fraction(0) if i in (3, 10) else LONG if i % 10 == 7 else USUAL,
            own_reference=i % 10 == 4, named=i % 10 != 7, marked=who < 3))
    return plan


def _can_write(codec):
    try:
        av.Codec(codec, "w")
    except ValueError:
        return False
    return True


# ------------------------------------------------------------ pictures


def render_at(clip: Clip, times: Sequence[Fraction], height: int,
              width: int) -> tuple[np.ndarray, Tensor]:
    """The clip at any moments: pictures (F, h, w, 3) uint8, face boxes (F, 4) in their pixels."""
    steps = [min(STEPS, round(time * STEPS)) for time in times]
    distinct = sorted(set(steps))
    generator = torch.Generator().manual_seed(clip.seed)
    poses = world.action_poses(torch.tensor([clip.action]), STEPS + 1, generator)
    side = min(height, width)
    # A few frames at a time: whole clips make layers of 16 MB, and asking for those takes as long.
    parts = [world.render(clip.person[None], clip.setting[None], part, side)[:2]
             for part in poses[:, distinct].split(8, dim=1)]
    video, boxes = torch.cat([x for x, _ in parts], dim=2), torch.cat([x for _, x in parts], dim=1)
    down, right = (height - side) // 2, (width - side) // 2
    edges = (0, 0), (down, height - side - down), (right, width - side - right), (0, 0)
    pictures = world.to_uint8(video[0]).permute(1, 2, 3, 0).numpy()  # (f, side, side, 3)
    pictures = np.pad(pictures, edges, mode="edge")
    back = [distinct.index(step) for step in steps]
    return pictures[back], boxes[0, back] + torch.tensor([right, down, right, down])


def stored_time(clip: Clip, time: Fraction) -> Fraction:
    """When the stored frame nearest to a moment was taken; of two equally near ones the earlier."""
    return min(clip.times, key=lambda stored: (abs(stored - time), stored))


def landmarks(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) -> five points each, (N, 5, 2), as in an upright face. They do not turn."""
    return boxes[:, None, :2] + template(1) * (boxes[:, None, 2:] - boxes[:, None, :2])


# ------------------------------------------------------------ files


def write_video(path: Path, pictures: np.ndarray, rate: Fraction, kind: Kind) -> None:
    """Pictures (F, h, w, 3) uint8 in order of display -> a video, frame k at k / rate seconds."""
    os.environ.setdefault("SVT_LOG", "1")  # else the AV1 encoder tells its settings each time
    if kind.sideways:
        pictures = np.rot90(pictures, 1, axes=(1, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(kind.codec, rate=rate, options=kind.options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], kind.pix
        stream.codec_context.thread_count = 1
        if kind.codec in ("mpeg4", "mjpeg"):
            stream.codec_context.bit_rate = 50_000_000
        if kind.sideways:
            stream.set_display_matrix(SIDEWAYS)
        sound = container.add_stream(kind.sound, rate=48000) if kind.sound else None
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=kind.pix)))
        container.mux(stream.encode())
        if sound is not None:
            _add_sound(container, sound, len(pictures) / rate)


def _add_sound(container, stream, seconds):
    count = round(float(seconds) * 48000)
    wave = 0.1 * np.sin(np.arange(count) * (2 * np.pi * 440 / 48000))
    frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def write_clip(folder: Path, clip: Clip) -> dict[str, str]:
    """Its video, faces file and perhaps reference in folder/clips; returns its row."""
    pictures, boxes = render_at(clip, clip.times, *clip.size)
    video = folder / "clips" / f"{clip.name}.{clip.suffix}"
    if clip.suffix == "png":
        Image.fromarray(pictures[0]).save(video)
    else:
        write_video(video, pictures, clip.rate, clip.kind)
    row = {"video": f"clips/{video.name}", "caption": clip.caption,
           "faces": f"clips/{clip.name}.json"}
    if clip.named:
        row["identity"] = clip.identity
    faces = {"frame_rate": float(clip.rate), "size": list(clip.size),
             "frames": _faces(clip, clip.times, boxes)}
    if clip.own_reference:
        generator = torch.Generator().manual_seed(clip.seed)
        picture, box = world.draw_references(clip.person[None], clip.setting[None], generator,
                                             REFERENCE)
        row["reference"] = f"clips/{clip.name}-reference.png"
        picture = world.to_uint8(picture[0]).permute(1, 2, 0).numpy()  # (h, w, 3)
        Image.fromarray(picture).save(folder / row["reference"])
        faces["reference"] = {"size": [REFERENCE, REFERENCE], **_face(clip, box[0])}
    write_json(folder / row["faces"], faces)
    return row


def _face(clip, box):
    face = {"box": [round(x, 3) for x in box.tolist()]}
    if clip.marked:
        points = landmarks(box[None])[0].tolist()
        face["landmarks"] = [[round(x, 3) for x in point] for point in points]
    return face


def _faces(clip, times, boxes):
    return [{"t": float(time), **_face(clip, box)} for time, box in zip(times, boxes, strict=True)]


# ------------------------------------------------------------ what goes wrong in a folder


def _cut_off(path, pictures):
    """The index stands in front, a third of the frames is gone."""
    whole = path.with_name("whole.mp4")
    with av.open(str(whole), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=24, options={**FINE, "g": "1"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        stream.codec_context.bit_rate = 50_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = whole.read_bytes()
    path.write_bytes(data[: 2 * len(data) // 3])
    whole.unlink()


def _half_copied(path, pictures):
    """The index would have stood at the end."""
    _plain(path, pictures)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _text(path, pictures):
    path.write_text("this is a letter, not a film\n" * 40, encoding="utf-8")


def _sound_only(path, pictures):
    with av.open(str(path), "w") as container:
        _add_sound(container, container.add_stream("aac", rate=48000), 1)


def _tiny(path, pictures):
    _plain(path, pictures[:, ::2, ::2])


def _plain(path, pictures):
    write_video(path, pictures, Fraction(24), KINDS[0])


def _nothing(path, pictures):
    """The file is not written."""


# file, how it is made, the reason that `python -m clips.manifest check` must give
BROKEN: list[tuple[str, Callable[[Path, np.ndarray], None], str]] = [
    ("clips/cut-off.mp4", _cut_off, "cut off"),
    ("clips/half-copied.mp4", _half_copied, "cut off"),
    ("clips/letter.mp4", _text, "cannot be decoded"),
    ("clips/song.mp4", _sound_only, "no video stream"),
    ("clips/no-caption.mp4", _plain, "empty caption"),
    ("clips/never-written.mp4", _nothing, "missing file"),
    ("../elsewhere.mp4", _nothing, "path outside"),
    ("clips/thumbnail.mp4", _tiny, "too small"),
    ("clips/upright-faces.mp4", _plain, "bad faces file"),
]


def write_broken(folder: Path, clip: Clip) -> list[dict[str, str]]:
    """The files of BROKEN, showing another clip's person, and their rows."""
    times = [Fraction(k, 24) for k in range(27)]
    pictures, boxes = render_at(clip, times, SIZE, SIZE)
    upright = {"frame_rate": 24.0, "size": [128, 64],
               "frames": _faces(clip, times, boxes)}
    write_json(folder / "clips/upright-faces.json", upright)
    rows = []
    for name, make, reason in BROKEN:
        make(folder / name, pictures)
        caption = "  " if reason == "empty caption" else clip.caption
        rows.append({"video": name, "caption": caption, "identity": clip.identity})
        if reason == "bad faces file":
            rows[-1]["faces"] = "clips/upright-faces.json"
    return rows


# ------------------------------------------------------------ all of it


def number_rows(clips: int) -> list[int | None]:
    """Line by line of the manifest: the index of the good clip there, or None for a broken row."""
    every = max(1, clips // len(BROKEN))
    lines: list[int | None] = []
    broken = 0
    for i in range(clips):
        lines.append(i)
        if (i + 1) % every == 0 and broken < len(BROKEN):
            lines.append(None)
            broken += 1
    return lines + [None] * (len(BROKEN) - broken)


def write_clips(folder: str | Path, people: int = 24, clips: int = 72, seed: int = 0) -> Path:
    """Write the folder described above; returns the path of the manifest, which is written last.

    people, clips: counts of the good ones; clips are dealt to the people in turn, so clips = 3 *
    people gives three to each. The same arguments give the same pictures. Raises ValueError when
    there are fewer clips than people, or when the folder holds a manifest already.
    """
    folder = Path(folder)
    plan, manifest = plan_clips(people, clips, seed), folder / "manifest.jsonl"
    if manifest.exists():
        raise ValueError(f"expected a new folder, got one with a manifest: {manifest}; "
                         "name another or delete it")
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    bar = tqdm(plan, desc="clips", unit="clip", disable=None)
    good = [write_clip(folder, clip) for clip in bar]
    bad, rows, direct = iter(write_broken(folder, plan[0])), [], {}
    for number, i in enumerate(number_rows(clips), 1):
        rows.append(next(bad) if i is None else good[i])
        if i is not None:
            pictures, boxes = render_at(plan[i], plan[i].direct_times, SIZE, SIZE)
            direct |= {f"{number}.video": torch.from_numpy(pictures), f"{number}.boxes": boxes}
    settings = {"people": str(people), "clips": str(clips), "seed": str(seed)}
    write_file(folder / "direct.safetensors", direct, settings)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    atomic_write(manifest, lambda path: path.write_text(lines, encoding="utf-8"))
    return manifest


def train_words(folder: Path, out: Path) -> list[str]:
    """train.py on 12 clips in folder/clips, made if need be, and on the bundled weights."""
    if not (folder / "clips" / "manifest.jsonl").exists():
        write_clips(folder / "clips", people=4, clips=12)
    tiny = ROOT / "weights" / "tiny"
    words = ["train.py", "--manifest", folder / "clips" / "manifest.jsonl",
             "--cache", folder / "cache", "--buckets", "64x64x9,64x64x1", "--frame-rate", RATE,
             "--checkpoint-path", tiny / "model.safetensors", "--gemma-root", tiny / "gemma",
             "--face", tiny / "face.safetensors", "--out", out]
    return [str(word) for word in words]


def main(arguments: list[str] | None = None) -> int:
    p = Parser("clip_world.py", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--people", type=int, default=24)
    p.add_argument("--clips", type=int, default=72, help="good ones; the broken ones are added")
    p.add_argument("--seed", type=int, default=0)

    def work() -> None:
        args = p.parse_args(arguments)
        path = write_clips(args.folder, args.people, args.clips, args.seed)
        print(f"{args.clips} clips and {len(BROKEN)} broken ones: {path}")
    return command("clip_world.py", work)


if __name__ == "__main__":
    sys.exit(main())
