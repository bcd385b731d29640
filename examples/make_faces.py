"""Finds the faces in people's own clips with MediaPipe, for the two face losses of train.py.

    python3.11 -m venv faces-env && faces-env/bin/pip install mediapipe==0.10.21 av pillow
    faces-env/bin/python examples/make_faces.py clips/manifest.jsonl

writes clips/faces/*.json (format: clips/manifest.py, `load_faces`) and clips/manifest-faces.jsonl,
which names them. MediaPipe (Apache-2.0) wants numpy below 2, hence the environment of its own, and
nothing of this repository is imported. Frames without a face are left out; of several faces the
largest counts. Numbers are pixels of the upright picture, from its outer corner.

Read next: docs/clips.md
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import mediapipe as mp
import numpy as np
from PIL import Image, ImageOps

# `python -m clips.manifest check` says what is wrong with such a row.
BAD_ROW = (OSError, ValueError, LookupError, AttributeError, TypeError, av.FFmpegError,
           Image.DecompressionBombError)
FIVE = ((33, 133), (362, 263), (4,), (61,), (291,))  # mesh points: corners of each eye, nose, mouth
RATE = 8  # looks a second that the file announces: a look speaks for 1/16 s before and after it
boxes = mp.solutions.face_detection.FaceDetection(model_selection=1)             # far faces, too
mesh = mp.solutions.face_mesh.FaceMesh(static_image_mode=True, max_num_faces=1)  # a near face only


def pictures(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """Seconds and upright picture, its pixels square, of every frame of a clip or picture file."""
    try:  # what is inside decides, not the name
        with Image.open(path) as image:
            several = getattr(image, "n_frames", 1) > 1  # frames, previews, pages
            if not (several and image.format in ("PNG", "GIF", "AVIF")):
                yield 0.0, ImageOps.exif_transpose(image).convert("RGB")
                return
    except Image.UnidentifiedImageError:
        pass  # a video
    with av.open(str(path)) as file:
        stream = file.streams.best("video")  # the first may be a cover
        for n, frame in enumerate(file.decode(stream)):
            time = frame.time
            if time is None:  # raw streams keep no times
                time = n / (stream.average_rate or 24)
            width = round(frame.width * (stream.sample_aspect_ratio or 1))
            yield float(time), upright(frame.to_image(width=width), frame)


def upright(picture: Image.Image, frame: av.VideoFrame) -> Image.Image:
    """Turned and mirrored as the header says: (x, y) is shown at (a x + c y, b x + d y)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = (int(n) for n in np.frombuffer(matrix, np.int32)[:5])
        if abs(b) + abs(c) > abs(a) + abs(d):
            picture, a, d = picture.transpose(Image.Transpose.TRANSPOSE), c, b
        picture = ImageOps.mirror(picture) if a < 0 else picture
        picture = ImageOps.flip(picture) if d < 0 else picture
    return picture


def look(picture: Image.Image) -> dict:
    """Box and five points of the largest face; {} without a face."""
    w, h = picture.size
    found = boxes.process(np.asarray(picture)).detections or []
    found = [face.location_data.relative_bounding_box for face in found]
    for b in sorted(found, key=lambda b: b.width * b.height, reverse=True):
        side = round(2 * max(b.width * w, b.height * h))    # a square, twice the face, ...
        x = round((b.xmin + b.width / 2) * w - side / 2)
        y = round((b.ymin + b.height / 2) * h - side / 2)
        near = picture.crop((x, y, x + side, y + side))     # ... makes far faces near ones
        for face in mesh.process(np.asarray(near)).multi_face_landmarks or []:
            points = np.array([(p.x, p.y) for p in face.landmark]) * side
            points += x + 0.5, y + 0.5                      # MediaPipe: 0 is a pixel's middle
            five = [points[list(i)].mean(axis=0).round(2).tolist() for i in FIVE]
            low, high = points.min(axis=0).round(2), points.max(axis=0).round(2)
            return {"box": [*low, *high], "landmarks": five}
    return {}


def main(manifest: Path) -> None:
    folder = manifest.parent
    try:
        lines = manifest.read_text(encoding="utf-8-sig").strip().split("\n")
        row = json.loads(lines[0])
        Path(row.get("video") or row["media_path"])
    except BAD_ROW:  # also CSV, and JSON on one line or several
        print(f"make_faces.py: error: expected JSONL that begins with a clip, got {manifest}; "
              "write CSV or JSON as JSONL first", file=sys.stderr)
        sys.exit(2)
    (folder / "faces").mkdir(exist_ok=True)
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
            video = folder / (row.get("video") or row["media_path"])
            looks = [(time, picture.size, look(picture)) for time, picture in pictures(video)]
            first, size, _ = looks[0]
            seen = [{"t": time - first, **face} for time, _, face in looks if face]
            faces = {"frame_rate": RATE, "size": size[::-1], "frames": seen}
            if row.get("reference"):
                _, picture = next(pictures(folder / row["reference"]))
                if face := look(picture):
                    faces["reference"] = {"size": picture.size[::-1], **face}
        except BAD_ROW as error:
            print(f"row {n + 1} stays without faces: {error}")
            continue
        row["faces"] = f"faces/{n + 1:06}-{video.stem}.json"
        (folder / row["faces"]).write_text(json.dumps(faces), encoding="utf-8")
        lines[n] = json.dumps(row)
        print(f"{video.name}: a face in {len(seen)} of {len(looks)} frames", flush=True)
    text = "\n".join(lines) + "\n"
    manifest.with_name(manifest.stem + "-faces.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(*sys.argv[1:2]))
