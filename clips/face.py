"""What "the same person" means in numbers: the face recogniser behind identity loss and score.

The idea. A recogniser maps a face picture to a unit vector, so that pictures of one person point
the same way and pictures of different people do not; the cosine of two vectors is the similarity.
ST-DRC needs one while training (paper: "face-guided identity objectives"; our reading: 1 - cosine
on the decoded clean estimate, losses.py) and another one, trained apart, for scoring: a network
must never evaluate the loss that was minimised against it.

The network is ArcFace's public backbone `iresnet` (InsightFace): 112 x 112 pictures in, 512 numbers
out. Depths, widths and picture size are read off the tensors, so iresnet18, 34, 50, 100 and our
tiny ones are one code. It has only seen faces whose eyes, nose and mouth stand at fixed places. To
it a tilted face is another person, and the loss would straighten heads instead of restoring faces;
so `align` puts the landmarks in place first.

Published weights come as a .pth, which can run code and is never opened here. Convert it once:

    tensors = torch.load("net.pth", map_location="cpu", weights_only=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, "net.safetensors")

Conventions. Pictures (B, 3, size, size), RGB in [-1, 1]; embeddings (B, E) of length 1. Boxes
(x0, y0, x1, y1) and landmarks (two eyes, nose tip, two mouth corners; the one on the image's left
first) are pixels from the frame's outer corner: the first pixel's middle is (0.5, 0.5).

    net = load_facenet("net.safetensors")
    embedding = net(faces_of(frames, boxes, landmarks, net.size))  # landmarks=None: by box

Read next: clips/video.py
"""

from __future__ import annotations

import re
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from losses import crop_faces
from ltx.checkpoint import SINGLE_FILE, TYPES, TensorFile, open_file

# ArcFace's places of the five landmarks in a 112 x 112 picture, as published: 0 is the middle of
# the first pixel.
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
            (70.7299, 92.2041))
MIN_SPREAD = 0.5  # our reading: points nearer to their middle than this (rms, pixels) are one point
MIN_FIT = 0.5  # our reading: 1 = the template's form; a full profile 0.78, swapped left-right 0.23
NOT_OPENED = dict.fromkeys((".pt", ".pth", ".ckpt", ".bin", ".tar"),
                           "a PyTorch pickle, which can run code and is never opened; convert it")
NOT_OPENED[".onnx"] = ("an ONNX graph, which has lost iresnet's tensor names; convert the .pth of "
                       "the same network")


class Block(nn.Module):
    """iresnet's residual block: norm, conv, norm, PReLU, conv (strided), norm."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.prelu = nn.PReLU(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False),
                                            nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))                  # (B, c_out, h, w)
        y = self.bn3(self.conv2(y))                                        # (B, c_out, h/s, w/s)
        return y + (x if self.downsample is None else self.downsample(x))  # (B, c_out, h/s, w/s)


class FaceNet(nn.Module):
    """ArcFace `iresnet`: pictures (B, 3, size, size) in [-1, 1] -> unit vectors (B, E).

    blocks: (2, 2, 2, 2) is iresnet18, (3, 4, 6, 3) 34, (3, 4, 14, 3) 50, (3, 13, 30, 3) 100. Raises
    ValueError when the picture has another size.
    """

    def __init__(self, blocks: tuple = (3, 4, 14, 3), widths: tuple = (64, 64, 128, 256, 512),
                 embedding: int = 512, size: int = 112):
        super().__init__()
        self.size = size
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.prelu = nn.PReLU(widths[0])
        for i, depth in enumerate(blocks):
            c_in, c_out = widths[i], widths[i + 1]
            stage = [Block(c_in, c_out, 2)] + [Block(c_out, c_out, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1] * (size // 16) ** 2, embedding)
        self.features = nn.BatchNorm1d(embedding)

    def forward(self, pictures: Tensor) -> Tensor:
        if pictures.shape[-2:] != (self.size, self.size):
            raise ValueError(f"expected faces of {self.size}x{self.size}, got "
                             f"{tuple(pictures.shape[-2:])}; crop first")
        x = self.prelu(self.bn1(self.conv1(pictures)))                     # (B, c_0, size, size)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)                                                   # half the height, width
        x = self.bn2(x).flatten(1)                                         # (B, c_4 (size/16)^2)
        x = self.features(self.fc(x))                                      # (B, E)
        return nnf.normalize(x.float(), dim=1)                             # (B, E)


# ------------------------------------------------------------ reading


def load_facenet(path: str | Path, device: str = "cpu") -> FaceNet:
    """Read an iresnet from safetensors by its published names; its sizes follow from the tensors.

    Names may stand behind "module." and "backbone."; any floating-point type is read as float32;
    num_batches_tracked may be there or not. Returns it frozen, in evaluation mode. Raises
    ValueError, one line, for a file of another kind and for missing, extra or misshapen tensors,
    which it names, before a number is read.
    """
    def counts(name: str) -> bool:
        return not name.endswith("num_batches_tracked")  # of the training, and of no use here

    with open_recogniser(path) as file:
        stored = {re.sub(r"^((module|backbone)\.)+", "", name): name
                  for name in file.keys() if counts(name)}
        with torch.device("meta"):  # shapes only, no memory
            net = FaceNet(*sizes_in(file, stored, path))
        wanted = {name: like for name, like in net.state_dict().items() if counts(name)}
        check_tensors(file, stored, wanted, path)
        tensors = {name: file.get_tensor(stored[name]).to(device, torch.float32) for name in wanted}
    zeros = {name: torch.tensor(0, device=device) for name in net.state_dict() if not counts(name)}
    net.load_state_dict(tensors | zeros, assign=True)
    return net.eval().requires_grad_(False)


def open_recogniser(path: str | Path) -> TensorFile:
    """checkpoint.open_file, with this file's advice: pickles and ONNX graphs are not opened."""
    try:
        return open_file(path)
    except ValueError as error:
        message = str(error).replace(SINGLE_FILE, "a safetensors file of an ArcFace iresnet")
    if (kind := Path(path).suffix.lower()) in NOT_OPENED and Path(path).is_file():
        message = (f"expected a safetensors file, got {path}, {NOT_OPENED[kind]} as the head of "
                   "face.py shows")
    raise ValueError(message)


def sizes_in(file: TensorFile, stored: dict[str, str], path: str | Path
             ) -> tuple[tuple, tuple, int, int]:
    """(blocks, widths, embedding, size) of the network in an open file.

    stored: published name -> name in the file.
    """
    needed = {"conv1.weight": 4, **{f"layer{i}.0.conv1.weight": 4 for i in range(1, 5)},
              "fc.weight": 2}
    shapes = {name: tuple(file.get_slice(stored[name]).get_shape()) if name in stored else ()
              for name in needed}
    for name, axes in needed.items():
        if len(shapes[name]) != axes or 0 in shapes[name]:
            raise ValueError(f"expected {name} of an ArcFace iresnet, {axes} axes, in {path}, got "
                             f"{shapes[name] or 'no such tensor'}; give the backbone of an "
                             "iresnet18, 34, 50 or 100")
    found = [re.match(r"layer([1-4])\.(\d{1,3})\.", name) for name in stored]
    blocks = tuple(1 + max(int(m[2]) for m in found if m and int(m[1]) == i) for i in range(1, 5))
    widths = tuple(shapes[name][0] for name in needed if name != "fc.weight")
    embedding, flat = shapes["fc.weight"]
    return blocks, widths, embedding, 16 * isqrt(flat // widths[-1])


def check_tensors(file: TensorFile, stored: dict[str, str], wanted: dict[str, Tensor],
                  path: str | Path) -> None:
    """Raise ValueError unless the file holds exactly `wanted`, in shape and as real numbers."""
    missing = [name for name in wanted if name not in stored]
    extra = [stored[name] for name in stored if name not in wanted]
    if missing or extra:
        raise ValueError(f"expected exactly an ArcFace iresnet's tensors in {path}, got "
                         f"{len(missing)} missing {missing[:3]} and {len(extra)} extra {extra[:3]}"
                         "; save the backbone's state dict alone")
    for name, like in wanted.items():
        row = file.get_slice(stored[name])
        floating = TYPES.get(row.get_dtype(), torch.int8).is_floating_point
        if row.get_shape() != list(like.shape) or not floating:
            raise ValueError(f"expected {name} of shape {tuple(like.shape)}, floating point, in "
                             f"{path}, got {tuple(row.get_shape())} of {row.get_dtype()}; convert "
                             "the published file again")


# ------------------------------------------------------------ cutting faces out


def square(boxes: Tensor, grow: float = 1.25) -> Tensor:
    """Face boxes (..., 4) -> squares around the same middle, `grow` times the longer side: hair
    belongs to a person."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    half = torch.maximum(x1 - x0, y1 - y0) * grow / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return torch.stack([x - half, y - half, x + half, y + half], dim=-1)


def template(size: int = 112) -> Tensor:
    """Where ArcFace wants the five landmarks in a size x size picture, (5, 2) pixels from the outer
    corner."""
    return (torch.tensor(TEMPLATE) + 0.5) * (size / 112)


def similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """Turn, scale and shift (never mirror) that bring source (B, N, 2) nearest to target (N, 2), as
    matrices (B, 2, 3).

    Least squares, Umeyama's solution. In the plane it needs no SVD: points p, q are complex numbers
    about their middles, turn and scale one factor a + ib = sum(conj(p) q) / sum(|p|^2). In float32
    or better, and without matrix products, which autocast would round. Source points that coincide
    (MIN_SPREAD) or are not finite have no answer: their matrix is NaN. Raises ValueError on wrong
    shapes.
    """
    if source.ndim != 3 or source.shape[1:] != target.shape or target.shape[-1] != 2:
        raise ValueError(f"expected points (B, N, 2) and (N, 2), got {tuple(source.shape)} and "
                         f"{tuple(target.shape)}; give as many target points as source points")
    p = source.to(torch.promote_types(source.dtype, torch.float32))
    q = target.to(p)
    (x0, y0), (u0, v0) = p.mean(dim=1).unbind(1), q.mean(dim=0)            # middles, (B,) and ()
    (px, py), (qx, qy) = (p - p.mean(1, keepdim=True)).unbind(-1), (q - q.mean(0)).unbind(-1)
    length = (px.square() + py.square()).mean(dim=1)                       # (B,)
    length = torch.where(length >= MIN_SPREAD**2, length, torch.nan)
    a = (px * qx + py * qy).mean(dim=1) / length
    b = (px * qy - py * qx).mean(dim=1) / length
    rows = [a, -b, u0 - a * x0 + b * y0, b, a, v0 - b * x0 - a * y0]
    return torch.stack(rows, dim=1).view(-1, 2, 3)                         # (B, 2, 3)


def usable_landmarks(landmarks: Tensor) -> Tensor:
    """(B, 5, 2) -> (B,) bool: finite, apart, and in the form of a face (MIN_FIT), which it is not
    with left and right swapped.

    our reading: write NaN where a detector found nothing. If all rows are False, the points stand
    in another order.
    """
    def spread(points: Tensor) -> Tensor:
        return points.var(dim=-2, correction=0).sum(-1).sqrt()             # rms distance

    matrix = similarity_transform(landmarks, template())
    scale = torch.hypot(matrix[:, 0, 0], matrix[:, 1, 0])                  # (B,)
    return scale * spread(landmarks.to(matrix)) >= MIN_FIT * spread(template())


def align(frames: Tensor, landmarks: Tensor, size: int = 112) -> Tensor:
    """Turn, scale and shift every frame so that its landmarks (B, 5, 2) come nearest to
    `template(size)`.

    frames (B, 3, h, w) -> (B, 3, size, size) float32; gradients reach the pixels. Bilinear, the
    border repeats beyond the frame, no low-pass: for an upright face the same as crop_faces. Raises
    ValueError on wrong shapes and for landmarks that are not `usable_landmarks`.
    """
    B, _, h, w = frames.shape
    if landmarks.shape != (B, 5, 2):
        raise ValueError(f"expected landmarks ({B}, 5, 2), got {tuple(landmarks.shape)}; give five "
                         "to each frame")
    if len(bad := (~usable_landmarks(landmarks)).nonzero()):
        row = int(bad[0, 0])
        raise ValueError("expected eyes, nose and mouth corners, image left first, got "
                         f"{landmarks[row].tolist()} in row {row}; reorder them, or cut this face "
                         "out by box")
    landmarks = landmarks.to(frames.device, torch.float32)  # bfloat16 cannot place them
    middle = torch.arange(size, device=landmarks.device) + 0.5
    x, y = in_frame(landmarks, middle, middle[:, None], size)              # (B, size, size) each
    grid = torch.stack([x * 2 / w - 1, y * 2 / h - 1], dim=-1)             # (B, size, size, 2)
    # align_corners=False: -1 is the frame's outer edge
    return nnf.grid_sample(frames.float(), grid, mode="bilinear", padding_mode="border",
                           align_corners=False)


def in_frame(landmarks: Tensor, u: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where in its frame `align` finds the places u (columns), v (rows) of its picture: x and y,
    (B, ...) each, for u and v that broadcast to (...), two axes."""
    matrix = similarity_transform(landmarks, template(size))               # frame -> picture
    a, b = matrix[:, 0, 0, None, None], matrix[:, 1, 0, None, None]
    u, v = u - matrix[:, 0, 2, None, None], v - matrix[:, 1, 2, None, None]
    # picture -> frame: divide u + iv by a + ib
    return (a * u + b * v) / (a * a + b * b), (a * v - b * u) / (a * a + b * b)


def area_of(boxes: Tensor, landmarks: Tensor, size: int = 112) -> Tensor:
    """The part of each frame that `faces_of` looks at: left, top, right, bottom, (B, 4)."""
    edge = torch.tensor([0.0, size], device=landmarks.device)
    x, y = in_frame(landmarks, edge, edge[:, None], size)                  # (B, 2, 2), the corners
    corners = [x.amin((1, 2)), y.amin((1, 2)), x.amax((1, 2)), y.amax((1, 2))]
    aligned = usable_landmarks(landmarks)[:, None]                         # (B, 1)
    return torch.where(aligned, torch.stack(corners, dim=1), square(boxes.to(x)))


def faces_of(frames: Tensor, boxes: Tensor, landmarks: Tensor | None = None, size: int = 112
             ) -> Tensor:
    """The faces for the recogniser: frames (B, 3, h, w) -> (B, 3, size, size), by landmarks where
    usable, else by box.

    boxes (B, 4), landmarks None or (B, 5, 2), NaN where there are none; both on the CPU for a card
    that shall not wait. Cut the reference and the
    generated face in the same way: the two ways show a face at different sizes, and a cosine across
    them is too low.
    """
    if landmarks is None:
        return crop_faces(frames, square(boxes), size)
    if landmarks.shape != (len(frames), 5, 2):
        raise ValueError(f"expected landmarks ({len(frames)}, 5, 2), got {tuple(landmarks.shape)}; "
                         "NaN where unknown")
    known = usable_landmarks(landmarks)                                    # (B,)
    faces = torch.empty(len(frames), 3, size, size, device=frames.device)
    if known.any():
        faces[known] = align(frames[known], landmarks[known], size)
    if not known.all():
        faces[~known] = crop_faces(frames[~known], square(boxes[~known]), size)
    return faces
