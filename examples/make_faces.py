"""python make_faces.py clips/manifest.jsonl -> clips/faces/*.json and clips/manifest-faces.jsonl, which names them."""
import json
import sys
from pathlib import Path

import av
import mediapipe as mp
import numpy as np
from PIL import Image, ImageOps

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
FIVE = ((33, 133), (362, 263), (4,), (61,), (291,))  # mesh points: an eye is the middle of its two corners; nose; mouth
finder = mp.solutions.face_detection.FaceDetection(model_selection=1)            # boxes of faces, far ones too
mesh = mp.solutions.face_mesh.FaceMesh(static_image_mode=True, max_num_faces=1)  # 468 points, needs a near face

def pictures(path):
    """(seconds, upright picture with square pixels) for every frame of a clip, or of a picture file."""
    if path.suffix.lower() in IMAGES:
        yield 0.0, ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        return
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        for n, frame in enumerate(file.decode(stream)):
            time = n / (stream.average_rate or 24) if frame.time is None else frame.time  # raw streams keep no times
            width = round(frame.width * (stream.sample_aspect_ratio or 1))
            yield float(time), frame.to_image(width=width).rotate(frame.rotation, expand=True)

def look(picture):
    """Box and five points of the largest face, in pixels from the picture's outer corner; {} without a face."""
    w, h = picture.size
    found = [d.location_data.relative_bounding_box for d in finder.process(np.asarray(picture)).detections or []]
    for b in sorted(found, key=lambda b: b.width * b.height, reverse=True):
        side = round(2 * max(b.width * w, b.height * h))                 # a square twice as large as the face ...
        x, y = round((b.xmin + b.width / 2) * w - side / 2), round((b.ymin + b.height / 2) * h - side / 2)
        near = picture.crop((x, y, x + side, y + side))                  # ... makes a far face a near one
        for face in mesh.process(np.asarray(near)).multi_face_landmarks or []:
            points = np.array([(p.x, p.y) for p in face.landmark]) * side + (x + 0.5, y + 0.5)  # 0: a pixel middle
            five = [points[list(i)].mean(axis=0).round(2).tolist() for i in FIVE]
            return {"box": [*points.min(axis=0).round(2), *points.max(axis=0).round(2)], "landmarks": five}
    return {}

manifest = Path(sys.argv[1])
folder, lines = manifest.parent, manifest.read_text(encoding="utf-8-sig").strip().split("\n")
(folder / "faces").mkdir(exist_ok=True)
for n, line in enumerate(lines):
    try:
        row = json.loads(line)
        video = folder / (row.get("video") or row["media_path"])
        looks = [(time, picture.size, look(picture)) for time, picture in pictures(video)]
        seen = [{"t": time - looks[0][0], **face} for time, _, face in looks if face]
        faces = {"frame_rate": 8, "size": looks[0][1][::-1], "frames": seen}  # 8: a look speaks for 1/16 s around it
        if row.get("reference"):
            picture = next(pictures(folder / row["reference"]))[1]
            if face := look(picture):
                faces["reference"] = {"size": picture.size[::-1], **face}
    except (OSError, ValueError, LookupError, AttributeError, TypeError, av.FFmpegError) as error:
        print(f"row {n + 1} stays without faces: {error}")                   # `clips.py check` says what is wrong
        continue
    row["faces"] = f"faces/{n + 1:06}-{video.stem}.json"
    (folder / row["faces"]).write_text(json.dumps(faces), encoding="utf-8")
    lines[n] = json.dumps(row)
    print(f"{video.name}: a face in {len(seen)} of {len(looks)} frames", flush=True)
manifest.with_name(manifest.stem + "-faces.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
