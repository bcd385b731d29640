"""The recogniser reads published ArcFace iresnet files by their names and equals a second writing
of the network without modules; the alignment is the least-squares one, and finds turned faces.

Hardware: CPU, seconds. Run: python -m pytest tests/test_face.py
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clips.face import (
    FaceNet,
    align,
    area_of,
    faces_of,
    load_facenet,
    similarity_transform,
    square,
    template,
    usable_landmarks,
)
from losses import crop_faces, identity_loss
from toy import world

SMALL = {"blocks": (1, 2, 1, 1), "widths": (8, 8, 12, 16, 20), "embedding": 24, "size": 32}
ARCFACE = {"blocks": (2, 2, 2, 2), "widths": (64, 64, 128, 256, 512), "embedding": 512, "size": 112}


# ------------------------------------------------------------ the second writing of the network


def published(blocks, widths, embedding, size):
    """Random tensors under InsightFace's names and shapes; running statistics are not 0 and 1."""
    tensors = {}

    def put(name, *shape, scale=0.2, middle=0.0):
        tensors[name] = middle + scale * torch.empty(shape).uniform_(-1, 1)

    def norm(name, width):
        for part in ("weight", "bias", "running_mean", "running_var"):
            middle = 1.0 if part in ("weight", "running_var") else 0.0
            put(f"{name}.{part}", width, middle=middle, scale=0.4)
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name, c_out, c_in, side, gain=1.0):
        put(name, c_out, c_in, side, side, scale=gain * (3 / (c_in * side * side)) ** 0.5)

    conv("conv1.weight", widths[0], 3, 3)
    norm("bn1", widths[0])
    put("prelu.weight", widths[0], middle=0.3)
    for stage, depth in enumerate(blocks, 1):
        for j in range(depth):
            name, c_in, c_out = f"layer{stage}.{j}", widths[stage - (j == 0)], widths[stage]
            norm(f"{name}.bn1", c_in)
            conv(f"{name}.conv1.weight", c_out, c_in, 3)
            norm(f"{name}.bn2", c_out)
            put(f"{name}.prelu.weight", c_out, middle=0.3)
            conv(f"{name}.conv2.weight", c_out, c_out, 3, gain=0.5)
            norm(f"{name}.bn3", c_out)
            if j == 0:
                conv(f"{name}.downsample.0.weight", c_out, c_in, 1)
                norm(f"{name}.downsample.1", c_out)
    norm("bn2", widths[-1])
    put("fc.weight", embedding, widths[-1] * (size // 16) ** 2, scale=0.02)
    put("fc.bias", embedding)
    norm("features", embedding)
    return tensors


def plain(t, x, blocks):
    """iresnet by names, tensors and formulas alone: (B, 3, size, size) -> unit vectors (B, E)."""
    def norm(x, name):
        mean, var, weight, bias = (t[f"{name}.{part}"].view(-1, *[1] * (x.ndim - 2)) for part in
                                   ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def prelu(x, name):
        return torch.where(x > 0, x, x * t[f"{name}.weight"].view(-1, 1, 1))

    x = prelu(norm(nnf.conv2d(x, t["conv1.weight"], padding=1), "bn1"), "prelu")
    for stage, depth in enumerate(blocks, 1):
        for j in range(depth):
            n, stride = f"layer{stage}.{j}", 2 if j == 0 else 1
            y = nnf.conv2d(norm(x, n + ".bn1"), t[n + ".conv1.weight"], padding=1)
            y = prelu(norm(y, n + ".bn2"), n + ".prelu")
            y = nnf.conv2d(y, t[n + ".conv2.weight"], stride=stride, padding=1)
            if j == 0:
                x = nnf.conv2d(x, t[n + ".downsample.0.weight"], stride=stride)
                x = norm(x, n + ".downsample.1")
            x = x + norm(y, n + ".bn3")
    x = nnf.linear(norm(x, "bn2").flatten(1), t["fc.weight"], t["fc.bias"])
    x = norm(x, "features")
    return x / x.square().sum(dim=1, keepdim=True).sqrt()


def small_file(tmp_path, change=lambda tensors: tensors, name="net.safetensors"):
    tensors = published(**SMALL)
    save_file(change(dict(tensors)), tmp_path / name)
    return tensors, tmp_path / name


def pictures(count, size):
    return torch.rand(count, 3, size, size) * 2 - 1


# ------------------------------------------------------------ reading published files


def test_a_published_iresnet_loads_by_its_names_and_equals_the_plain_writing(tmp_path):
    tensors = published(**ARCFACE)
    save_file(tensors, tmp_path / "net.safetensors")
    net, x = load_facenet(tmp_path / "net.safetensors"), pictures(2, 112)
    with torch.no_grad():
        ours, theirs = net(x), plain(tensors, x, ARCFACE["blocks"])
    assert ours.shape == (2, 512) and net.size == 112 and not net.training
    assert (ours - theirs).abs().max() < 1e-6  # measured 3e-7; a number is about 0.04
    assert ours[0] @ ours[1] < 0.999, "else the comparison would show little"


def test_depths_give_the_published_numbers_of_weights():
    millions = {(2, 2, 2, 2): 24.03, (3, 4, 6, 3): 34.14, (3, 4, 14, 3): 43.59,
                (3, 13, 30, 3): 65.16}
    for blocks, expected in millions.items():
        with torch.device("meta"):
            net = FaceNet(blocks)
        assert abs(sum(p.numel() for p in net.parameters()) / 1e6 - expected) < 0.01


@pytest.mark.parametrize(("prefix", "counters", "dtype"), [
    ("module.", True, torch.float16), ("module.backbone.", False, torch.float32)])
def test_prefixes_absent_counters_and_other_types_are_read(tmp_path, prefix, counters, dtype):
    def change(tensors):
        return {prefix + k: v.to(dtype) if v.is_floating_point() else v
                for k, v in tensors.items() if counters or "num_batches" not in k}
    tensors, path = small_file(tmp_path, change)
    net, x = load_facenet(path), pictures(2, 32)
    rounded = {k: v.to(dtype).float() for k, v in tensors.items()}
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())
    assert (net(x) - plain(rounded, x, SMALL["blocks"])).abs().max() < 1e-6


def test_a_loaded_network_passes_gradients_to_the_picture_and_keeps_none(tmp_path):
    net = load_facenet(small_file(tmp_path)[1])
    x = pictures(2, 32).requires_grad_()
    person = net(pictures(2, 32)).detach()
    identity_loss(net, x, person, torch.tensor([True, True])).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 1e-5
    assert all(p.grad is None for p in net.parameters())


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_(**new):
    return lambda tensors: tensors | {k.replace("__", "."): v for k, v in new.items()}


@pytest.mark.parametrize(("change", "said"), [
    (without("fc.weight"), "fc.weight .*no such tensor"),
    (without("layer2.0.conv2.weight"), r"1 missing \['layer2.0.conv2.weight'\]"),
    (with_(head__weight=torch.zeros(3)), r"0 missing \[\] and 1 extra \['head.weight'\]"),
    (with_(bn1__weight=torch.zeros(9)), r"bn1.weight of shape \(8,\).*got \(9,\)"),
    (with_(fc__weight=torch.zeros(24)), r"fc.weight .*2 axes.*got \(24,\)"),
    (with_(bn1__bias=torch.zeros(8, dtype=torch.int32)), "bn1.bias .*floating point.*I32"),
])
def test_missing_extra_and_misshapen_tensors_are_named_in_one_line(tmp_path, change, said):
    path = small_file(tmp_path, change)[1]
    with pytest.raises(ValueError, match=said) as caught:
        load_facenet(path)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("net.pth", b"PK\x03\x04" + b"\0" * 99, "PyTorch pickle.*never opened; convert it"),
    ("w600k_r50.onnx", b"\x08\x06\x12\x07pytorch", "ONNX graph.*; convert the .pth"),
    ("words.safetensors", b"this is no table of tensors", "file of another kind.*ArcFace iresnet"),
])
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_facenet(tmp_path / name)
    assert "\n" not in str(caught.value) and "ltx" not in str(caught.value)


@pytest.mark.parametrize("name", ["face", "eval_encoder"])
def test_the_bundled_recognisers_load_and_know_a_person_again(name):
    path = Path(__file__).parent.parent / "weights" / "tiny" / f"{name}.safetensors"
    net, g = load_facenet(path), torch.Generator().manual_seed(3)
    person = world.people("test", 16)

    def embed(people):
        frames, boxes = world.draw_references(people, world.draw_settings(16, g), g)
        return net(frames if name == "eval_encoder" else faces_of(frames, boxes, size=net.size))

    cosine = embed(person) @ embed(person).T                               # (16, 16)
    own = cosine.diag().mean()
    assert own > 0.9 and cosine.mean() - own / 16 < 0.1


def test_wrong_shapes_are_refused():
    calls = [("32x32.*crop", lambda: FaceNet(**SMALL)(pictures(1, 40))),
             ("points", lambda: similarity_transform(torch.rand(5, 2), template())),
             ("points", lambda: similarity_transform(torch.rand(1, 4, 2), template())),
             (r"landmarks \(2, 5, 2\)", lambda: align(pictures(2, 16), template()[None])),
             (r"landmarks \(2, 5, 2\)",
              lambda: faces_of(pictures(2, 16), torch.rand(2, 4), template()[None], 8))]
    for said, call in calls:
        with pytest.raises(ValueError, match=said):
            call()


# ------------------------------------------------------------ the similarity transform


def turned(points, degrees, scale, shift):
    angle = torch.tensor(degrees).deg2rad()
    turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)
    return points @ turn.to(points) * scale + torch.tensor(shift).to(points)


def apply(matrix, points):
    return torch.einsum("bij,bnj->bni", matrix[:, :, :2], points) + matrix[:, None, :, 2]


def lstsq(source, target):
    """A similarity by brute force: x' = a x - b y + tx, y' = b x + a y + ty, four unknowns."""
    rows = []
    for x, y in source.tolist():
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
    rows, right = torch.tensor(rows, dtype=torch.float64), target.double().reshape(-1, 1)
    a, b, tx, ty = torch.linalg.lstsq(rows, right).solution[:, 0]
    return torch.stack([a, -b, tx, b, a, ty]).view(2, 3)


COORDINATE = st.floats(-500, 4000, width=32)
FIVE = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=5, max_size=5)


@settings(max_examples=40, deadline=None)
@given(st.lists(FIVE, min_size=1, max_size=3))
def test_the_transform_is_the_least_squares_one_for_any_landmarks(landmarks):
    source = torch.tensor(landmarks, dtype=torch.float64)
    assume(bool((source.var(dim=1, correction=0).sum(1) > 1.0).all()))
    for row, points in zip(similarity_transform(source, template()), source, strict=True):
        brute = lstsq(points, template())
        found, expected = (apply(m[None], points[None]) for m in (row, brute))
        assert (found - expected).abs().max() < 1e-5  # pixels of the 112 x 112 picture
        assert row[:, :2].det() >= 0, "a reflection"


def test_landmarks_are_usable_when_they_are_apart_finite_and_in_the_form_of_a_face():
    good, one, middle = template(), torch.full((5, 2), 1000.1), template().mean(0)
    profile = (good - middle) * torch.tensor([0.2, 1.0]) + middle
    rows = {"turned": turned(good, 100.0, 3.0, (900.0, -20.0)), "a profile": profile,
            "one point": one, "within a pixel": one + 0.01 * good, "nan": good * torch.nan,
            "infinite": good * torch.inf, "left and right swapped": good[[1, 0, 2, 4, 3]],
            "mirrored": good * torch.tensor([-1.0, 1.0]), "mouth first": good[[3, 4, 2, 0, 1]]}
    found = usable_landmarks(torch.stack(list(rows.values()))).tolist()
    assert dict(zip(rows, found, strict=True)) == {name: i < 2 for i, name in enumerate(rows)}
    matrix = similarity_transform(torch.stack([one, rows["mirrored"]]), template())
    assert matrix[0].isnan().all() and matrix[1, :, :2].det() > 0, "turned and never reflected"
    with pytest.raises(ValueError, match="row 1; reorder"):
        align(pictures(2, 16), torch.stack([good, rows["mirrored"]]))


# ------------------------------------------------------------ aligned pictures


def test_an_upright_face_is_cut_out_as_by_its_box():
    frames = torch.rand(3, 3, 90, 120) * 2 - 1
    corner = torch.tensor([[10.0, 4.0], [20.5, 30.25], [-8.0, 40.0]])
    side = torch.tensor([60.0, 33.0, 70.0])
    landmarks = corner[:, None] + template(1) * side[:, None, None]
    boxes = torch.cat([corner, corner + side[:, None]], dim=1)
    difference = (align(frames, landmarks, 48) - crop_faces(frames, boxes, 48)).abs().max()
    assert difference < 1e-4, f"{difference:.1e}"  # noise: a shift of 0.001 pixels would show


def test_alignment_equals_the_published_recipe():
    """InsightFace: fit to the template, then warp, both counting pixel middles 0, 1, 2 ..."""
    points = torch.tensor([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366],
                           [41.5493, 92.3655], [70.7299, 92.2041]])
    frame = pictures(1, 128).double()
    landmarks = turned(points, 12.0, 0.7, (40.0, 0.0)) + torch.randn(5, 2)
    last = torch.tensor([[0.0, 0.0, 1.0]]).double()
    matrix = torch.cat([lstsq(landmarks, points), last]).inverse()
    v, u = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    here = torch.stack([u, v, torch.ones_like(u)]).double()
    x, y, _ = torch.einsum("ij,jvu->ivu", matrix, here)
    inside = (x > 0) & (x < 126) & (y > 0) & (y < 126)
    column, row = x.clamp(0, 126).long(), y.clamp(0, 126).long()
    right, down = x - column, y - row                                      # bilinear by hand
    upper = frame[..., row, column] * (1 - right) + frame[..., row, column + 1] * right
    lower = frame[..., row + 1, column] * (1 - right) + frame[..., row + 1, column + 1] * right
    theirs, ours = upper * (1 - down) + lower * down, align(frame, landmarks[None] + 0.5)
    assert inside.float().mean() > 0.7
    assert ((ours - theirs) * inside).abs().max() < 1e-4


def test_low_precision_frames_and_autocast_do_not_move_the_face():
    frames = pictures(2, 100)
    landmarks = turned(template(), 20.0, 0.5, (30.0, 20.0)).expand(2, 5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        cast = align(frames, landmarks)
    assert (cast - align(frames, landmarks)).abs().max() < 1e-5
    low = frames.bfloat16()
    assert torch.equal(align(low, landmarks), align(low.float(), landmarks))


def test_faces_of_uses_landmarks_where_there_are_some_and_the_box_elsewhere():
    frames = pictures(4, 64).requires_grad_()
    boxes = torch.tensor([[10.0, 10, 50, 54]]).repeat(4, 1)
    landmarks = turned(template(), 15.0, 0.4, (20.0, 5.0)).repeat(4, 1, 1)
    landmarks[1], landmarks[3] = torch.nan, 20.0
    boxes[0] = torch.nan  # nobody looks at it
    faces = faces_of(frames, boxes, landmarks, 32)
    assert torch.equal(faces[[0, 2]], align(frames[[0, 2]], landmarks[[0, 2]], 32))
    assert torch.equal(faces[[1, 3]], crop_faces(frames[[1, 3]], square(boxes[[1, 3]]), 32))
    faces.square().sum().backward()
    assert frames.grad.isfinite().all() and (frames.grad.abs().amax((1, 2, 3)) > 0).all()
    for marks in (None, torch.full((3, 5, 2), torch.nan)):
        by_box = faces_of(frames[1:], boxes[1:], marks, 32)
        assert torch.equal(by_box, crop_faces(frames[1:], square(boxes[1:]), 32))


def test_square_keeps_the_middle_and_covers_the_box():
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert square(box, grow=1.0).tolist() == [[0.0, 20.0, 40.0, 60.0]]
    assert square(box, grow=2.0).tolist() == [[-20.0, 0.0, 60.0, 80.0]]


def test_the_area_is_what_is_looked_at_by_landmarks_as_by_box():
    """Every pixel of the frame that gets a gradient lies in it, and it is no larger than need be;
    a tilted face's corners stand out on all sides."""
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    marks = torch.stack([(template(32) - 16) @ turn.T + torch.tensor([30.0, 40.0]),
                         torch.full((5, 2), torch.nan)])
    boxes = torch.tensor([[0.0, 0, 8, 8], [20, 30, 40, 46]])
    frames = torch.rand(2, 3, 80, 70, requires_grad=True)
    faces_of(frames, boxes, marks, 32).square().sum().backward()
    for k, area in enumerate(area_of(boxes, marks, 32)):
        rows, columns = frames.grad[k].abs().sum(dim=0).nonzero().T
        seen = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (area - seen).abs().max() < 2, (area, seen)
