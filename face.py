"""What "the same person" means in numbers: the face-recognition network behind the identity loss and the identity score.

The idea. A recogniser maps a face picture to a unit vector, so that pictures of one person point the same way and
pictures of different people do not; the cosine of two vectors is the similarity. ST-DRC needs one while training (paper:
"face-guided identity objectives"; our reading: 1 - cosine on the decoded clean estimate, losses.py) and another one,
independently trained, for scoring: a network must never judge the loss that was minimised against it.

The architecture is the public ArcFace backbone `iresnet` (InsightFace), with its tensor names, so that published weights
converted to safetensors load: 112 x 112 pictures, widths 64-512, 512 numbers out. Widths, depths and the picture size are
read off the tensors; our tiny recognisers are the same network with smaller numbers.

Conventions. Pictures (B, 3, size, size) in [-1, 1]; embeddings (B, E) of length 1; boxes (x0, y0, x1, y1) in pixels.

Read next: losses.py for the loss, evaluate.py for the score.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as nnf
from safetensors import safe_open
from torch import Tensor, nn


class Block(nn.Module):
    """iresnet's residual block: norm, conv, norm, PReLU, conv (strided), norm; the shortcut follows the stride."""

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
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        y = self.bn3(self.conv2(y))
        return y + (x if self.downsample is None else self.downsample(x))                 # (B, c_out, h/stride, w/stride)


class FaceNet(nn.Module):
    """ArcFace `iresnet`: pictures (B, 3, size, size) in [-1, 1] -> unit vectors (B, E).

    iresnet50 is FaceNet(blocks=(3, 4, 14, 3)). Raises ValueError when the picture has another size.
    """

    def __init__(self, blocks: tuple = (3, 4, 14, 3), widths: tuple = (64, 64, 128, 256, 512), embedding: int = 512,
                 size: int = 112):
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
            raise ValueError(f"expected faces of {self.size}x{self.size}, got {tuple(pictures.shape[-2:])}; crop first")
        x = self.prelu(self.bn1(self.conv1(pictures)))                                    # (B, widths[0], size, size)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        x = self.features(self.fc(self.bn2(x).flatten(1)))                                # (B, E)
        return nnf.normalize(x.float(), dim=1)


def load_facenet(path: str | Path, device: str = "cpu") -> FaceNet:
    """Read a recogniser from safetensors; depths, widths and picture size are inferred from the tensors.

    Returns it frozen, in evaluation mode. Raises ValueError when names are missing.
    """
    try:
        with safe_open(path, "pt") as f:
            tensors = {k: f.get_tensor(k).float() for k in f.keys()}
    except Exception as error:
        raise ValueError(f"expected a safetensors file with ArcFace iresnet weights at {path}: {error}") from None
    if "conv1.weight" not in tensors or "layer4.0.conv1.weight" not in tensors:
        raise ValueError(f"expected iresnet tensor names (conv1.weight, layer4.0.conv1.weight ...) in {path}")
    blocks = tuple(sum(f"layer{i}.{j}.conv1.weight" in tensors for j in range(200)) for i in range(1, 5))
    widths = (len(tensors["conv1.weight"]), *(len(tensors[f"layer{i}.0.conv1.weight"]) for i in range(1, 5)))
    embedding, flat = tensors["fc.weight"].shape
    net = FaceNet(blocks, widths, embedding, size=16 * round((flat / widths[-1]) ** 0.5))
    missing, unexpected = net.load_state_dict(tensors, strict=False)
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"expected exactly iresnet's tensors in {path}, missing {missing[:3]}, extra {unexpected[:3]}")
    return net.eval().requires_grad_(False).to(device)


def square(boxes: Tensor, grow: float = 1.25) -> Tensor:
    """Face boxes (..., 4) -> squares around the same middle, `grow` times the longer side, so that hair is inside."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    half = torch.maximum(x1 - x0, y1 - y0) * grow / 2
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return torch.stack([x - half, y - half, x + half, y + half], dim=-1)


def demo() -> None:
    """The bundled recogniser on people of the world: same person, look-alike, stranger."""
    import world
    from losses import crop_faces

    path = Path(__file__).parent / "weights" / "tiny" / "face.safetensors"
    net = load_facenet(path)
    g = torch.Generator().manual_seed(3)
    person = world.people("test", 32)
    groups = {"same person, another moment": person, "look-alike": world.look_alikes(person, g),
              "stranger": person.roll(1, 0)}
    def embed(people: Tensor) -> Tensor:
        pictures, boxes = world.draw_references(people, world.draw_settings(32, g), g)
        return net(crop_faces(pictures, square(boxes), net.size))
    anchor = embed(person)
    for name, people in groups.items():
        print(f"{name:28s} mean cosine {(anchor * embed(people)).sum(1).mean():+.2f}")
    print("Notice: the look-alike shares skin and hair, so it lies between. Cosine alone flatters; count who is first.")


if __name__ == "__main__":
    demo()
