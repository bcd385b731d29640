"""The recogniser reads published ArcFace iresnet files by their names and equals a second writing of the network
without modules; the alignment is the least-squares one, and finds turned, scaled and shifted faces again.

    pytest tests/test_face.py
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from clips import face
from clips.face import FaceNet, align, faces_of, load_facenet, similarity_transform, square, template, usable_landmarks
from losses import crop_faces, identity_loss
from toy import world

PUBLISHED = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
WIDTHS = (64, 64, 128, 256, 512)
SMALL = {"blocks": (1, 2, 1, 1), "widths": (8, 8, 12, 16, 20), "embedding": 24, "size": 32}


# ------------------------------------------------------------ the second writing: names and shapes, then the arithmetic


def published(blocks, widths=WIDTHS, embedding=512, size=112):
    """Random tensors under the names and shapes of InsightFace's iresnet; running statistics are not 0 and 1 either."""
    tensors = {}

    def put(name, *shape, scale=0.2, middle=0.0):
        tensors[name] = middle + scale * torch.empty(shape).uniform_(-1, 1)

    def norm(name, width):
        for part, middle in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
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
        mean, var, weight, bias = (t[f"{name}.{part}"].view(-1, *[1] * (x.ndim - 2))
                                   for part in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def prelu(x, name):
        return torch.where(x > 0, x, x * t[f"{name}.weight"].view(-1, 1, 1))

    x = prelu(norm(nnf.conv2d(x, t["conv1.weight"], padding=1), "bn1"), "prelu")
    for stage, depth in enumerate(blocks, 1):
        for j in range(depth):
            n, stride = f"layer{stage}.{j}", 2 if j == 0 else 1
            y = nnf.conv2d(norm(x, n + ".bn1"), t[n + ".conv1.weight"], padding=1)
            y = prelu(norm(y, n + ".bn2"), n + ".prelu")
            y = norm(nnf.conv2d(y, t[n + ".conv2.weight"], stride=stride, padding=1), n + ".bn3")
            if j == 0:
                x = norm(nnf.conv2d(x, t[n + ".downsample.0.weight"], stride=stride), n + ".downsample.1")
            x = x + y
    x = norm(nnf.linear(norm(x, "bn2").flatten(1), t["fc.weight"], t["fc.bias"]), "features")
    return x / x.square().sum(dim=1, keepdim=True).sqrt()


def small_file(tmp_path, change=lambda tensors: tensors, name="net.safetensors"):
    tensors = published(**SMALL)
    save_file(change(dict(tensors)), tmp_path / name)
    return tensors, tmp_path / name


def pictures(count, size):
    return torch.rand(count, 3, size, size) * 2 - 1


# ------------------------------------------------------------ reading published files


@pytest.mark.parametrize("depth", PUBLISHED)
def test_a_published_iresnet_loads_by_its_names_and_equals_the_plain_writing(tmp_path, depth):
    tensors, path = published(PUBLISHED[depth]), tmp_path / "backbone.safetensors"
    save_file(tensors, path)
    net = load_facenet(path)
    path.unlink()  # up to 260 MB
    x = pictures(2 if depth < 100 else 1, 112)
    with torch.no_grad():
        ours, theirs = net(x), plain(tensors, x, PUBLISHED[depth])
    assert ours.shape == (len(x), 512) and net.size == 112 and not net.training
    difference = (ours - theirs).abs().max().item()
    print(f"iresnet{depth}: max difference {difference:.1e} in unit vectors of 512 numbers")
    assert difference < 1e-6  # measured 3e-7; a number is about 0.04
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    assert abs(millions - {18: 24.03, 34: 34.14, 50: 43.59, 100: 65.16}[depth]) < 0.01  # as published
    if len(x) > 1:
        assert ours[0] @ ours[1] < 0.999, "the comparison would show little if every picture gave one vector"


@pytest.mark.parametrize("name", ["layer2.1.bn3.running_var", "layer4.0.downsample.1.running_mean", "bn2.running_var",
                                  "features.running_mean", "features.weight", "layer3.0.prelu.weight", "fc.bias"])
def test_every_kind_of_tensor_reaches_the_output(tmp_path, name):
    """Guards the comparison above: with one tensor changed in the file alone, the two writings differ."""
    def change(tensors):
        return tensors | {name: tensors[name] * 1.5 + 0.1}
    tensors, path = small_file(tmp_path, change)
    x = pictures(2, 32)
    assert (load_facenet(path)(x) - plain(tensors, x, SMALL["blocks"])).abs().max() > 1e-3


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("counters", [True, False])
def test_prefixes_and_absent_counters_change_nothing(tmp_path, prefix, counters):
    def change(tensors):
        return {prefix + k: v for k, v in tensors.items() if counters or "num_batches" not in k}
    tensors, path = small_file(tmp_path, change)
    x = pictures(2, 32)
    assert (load_facenet(path)(x) - plain(tensors, x, SMALL["blocks"])).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_read_as_float32(tmp_path, dtype):
    def change(tensors):
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    tensors, path = small_file(tmp_path, change)
    rounded = {k: v.float() for k, v in change(tensors).items()}
    net, x = load_facenet(path), pictures(2, 32)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in net.parameters())
    assert (net(x) - plain(rounded, x, SMALL["blocks"])).abs().max() < 1e-6


def test_a_loaded_network_passes_gradients_to_the_picture_and_keeps_none(tmp_path):
    net = load_facenet(small_file(tmp_path)[1])
    x = pictures(2, 32).requires_grad_()
    identity_loss(net, x, net(pictures(2, 32)).detach(), torch.tensor([True, True])).backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 1e-5
    assert all(p.grad is None for p in net.parameters())


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def with_(**new):
    return lambda tensors: tensors | {k.replace("__", "."): v for k, v in new.items()}


@pytest.mark.parametrize(("change", "said"), [
    (without("conv1.weight"), "conv1.weight"),
    (without("fc.weight"), "fc.weight"),
    (without("layer2.0.conv1.weight"), "layer2.0.conv1.weight"),
    (without("layer2.0.conv2.weight"), r"1 missing \['layer2.0.conv2.weight'\]"),
    (without("bn2.running_var"), r"1 missing \['bn2.running_var'\] and 0 extra"),
    (with_(head__weight=torch.zeros(3)), r"0 missing \[\] and 1 extra \['head.weight'\]"),
    (with_(layer1__0__se__fc1=torch.zeros(3)), "layer1.0.se.fc1"),
    (with_(bn1__weight=torch.zeros(9)), r"bn1.weight of shape \(8,\).*got \(9,\)"),
    (with_(fc__weight=torch.zeros(24, 90)), r"fc.weight of shape \(24, 80\).*got \(24, 90\)"),
    (with_(fc__weight=torch.zeros(24)), r"fc.weight .*2 axes.*got \(24,\)"),
    (with_(bn1__bias=torch.zeros(8, dtype=torch.int32)), "bn1.bias .*floating point.*I32"),
    (lambda tensors: {"weight": torch.zeros(3)}, "conv1.weight .*no such tensor"),
])
def test_missing_extra_and_misshapen_tensors_are_named_in_one_line(tmp_path, change, said):
    path = small_file(tmp_path, change)[1]
    with pytest.raises(ValueError, match=said) as caught:
        load_facenet(path)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("absent.safetensors", None, "no file"),
    ("backbone.pth", b"PK\x03\x04" + b"\0" * 99, "PyTorch pickle.*never opened; convert it"),
    ("backbone.pt", b"\x80\x02cos\nsystem\n.", "PyTorch pickle.*never opened; convert it"),
    ("w600k_r50.onnx", b"\x08\x06\x12\x07pytorch", "ONNX graph.*; convert the .pth"),
    ("words.safetensors", b"this is no table of tensors", "file of another kind.*ArcFace iresnet"),
    ("empty.safetensors", b"", "empty file"),
])
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_facenet(tmp_path / name)
    assert "\n" not in str(caught.value) and "; " in str(caught.value) and "ltx" not in str(caught.value)


@pytest.mark.parametrize("name", ["face", "eval_encoder"])
def test_the_bundled_recognisers_load_and_know_a_person_again(name):
    path = Path(__file__).parent.parent / "weights" / "tiny" / f"{name}.safetensors"
    net, g, person = load_facenet(path), torch.Generator().manual_seed(3), world.people("test", 16)

    def embed(people):
        frames, boxes = world.draw_references(people, world.draw_settings(16, g), g)
        return net(frames if name == "eval_encoder" else faces_of(frames, boxes, size=net.size))

    cosine = embed(person) @ embed(person).T
    assert cosine.diag().mean() > 0.9 and (cosine.mean() - cosine.diag().mean() / 16) < 0.1


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match="32x32.*crop"):
        FaceNet(**SMALL).eval()(pictures(1, 40))


# ------------------------------------------------------------ the similarity transform


def turned(points, degrees, scale, shift):
    c, s = torch.tensor(degrees).deg2rad().cos(), torch.tensor(degrees).deg2rad().sin()
    return points @ torch.stack([c, s, -s, c]).view(2, 2).to(points) * scale + torch.tensor(shift).to(points)


def apply(matrix, points):
    return torch.einsum("bij,bnj->bni", matrix[:, :, :2], points) + matrix[:, None, :, 2]


def lstsq(source, target):
    """The four numbers of a similarity (a, b, shift) by brute force: x' = a x - b y + tx, y' = b x + a y + ty."""
    rows = []
    for x, y in source.tolist():
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
    rows, right = torch.tensor(rows, dtype=torch.float64), target.double().reshape(-1, 1)
    a, b, tx, ty = torch.linalg.lstsq(rows, right).solution[:, 0]
    return torch.stack([a, -b, tx, b, a, ty]).view(2, 3)


COORDINATE = st.floats(-500, 4000, width=32)
FIVE = st.lists(st.tuples(COORDINATE, COORDINATE), min_size=5, max_size=5)


@settings(max_examples=150, deadline=None)
@given(st.lists(FIVE, min_size=1, max_size=3))
def test_the_transform_is_the_least_squares_one_for_any_landmarks(landmarks):
    source = torch.tensor(landmarks, dtype=torch.float64)
    assume(bool((source.var(dim=1, correction=0).sum(1) > 1.0).all()))
    matrix = similarity_transform(source, template())
    for row, points in zip(matrix, source, strict=True):
        found, brute = apply(row[None], points[None]), apply(lstsq(points, template())[None], points[None])
        assert (found - brute).abs().max() < 1e-5  # pixels of the 112 x 112 picture
        assert row[:, :2].det() >= 0, "a reflection"


@settings(max_examples=100, deadline=None)
@given(st.floats(-180, 180), st.floats(0.3, 30), st.floats(-2000, 2000), st.floats(-2000, 2000))
def test_a_known_turn_scale_and_shift_is_found_again(degrees, scale, dx, dy):
    landmarks = turned(template(), degrees, scale, (dx, dy))[None]
    error = (apply(similarity_transform(landmarks, template()), landmarks) - template()).abs().max()
    assert error < 0.01, f"{error:.4f} pixels"  # float32 with shifts of 2000 pixels
    assert usable_landmarks(landmarks).all()


def test_mirrored_points_are_turned_and_never_reflected():
    mirrored = template() * torch.tensor([-1.0, 1.0]) + torch.tensor([112.0, 0.0])
    matrix = similarity_transform(mirrored[None], template())
    assert matrix[0, :, :2].det() > 0
    assert (matrix[0, 0, 0] - matrix[0, 1, 1]).abs() == 0 and (matrix[0, 0, 1] + matrix[0, 1, 0]).abs() == 0
    assert (apply(matrix, mirrored[None]) - template()).abs().max() > 5, "a reflection would bring them to 0"
    assert not usable_landmarks(mirrored[None]).any(), "left and right swapped"
    with pytest.raises(ValueError, match="row 0; reorder"):
        align(pictures(1, 112), mirrored[None])


def test_points_that_coincide_or_are_not_numbers_give_nan_and_are_not_usable():
    good, one = template(), torch.full((5, 2), 1000.1)
    rows = torch.stack([good, one, good * torch.nan, good * torch.inf, one + 0.1 * torch.randn(5, 2), good])
    matrix = similarity_transform(rows, template())
    assert matrix.isfinite().flatten(1).all(1).tolist() == [True, False, False, False, False, True]
    assert usable_landmarks(rows).tolist() == [True, False, False, False, False, True]
    with pytest.raises(ValueError, match="row 1"):
        align(pictures(6, 16), rows)


def test_profiles_are_usable_and_a_swapped_order_is_not():
    middle = template().mean(0)
    profile = (template() - middle) * torch.tensor([0.2, 1.0]) + middle
    assert usable_landmarks(profile[None]).all()
    assert not usable_landmarks(template()[[1, 0, 2, 4, 3]][None]).any()
    assert not usable_landmarks(template()[[3, 4, 2, 0, 1]][None]).any(), "mouth first"


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="points"):
        similarity_transform(torch.rand(5, 2), template())
    with pytest.raises(ValueError, match="points"):
        similarity_transform(torch.rand(1, 4, 2), template())
    with pytest.raises(ValueError, match=r"landmarks \(2, 5, 2\)"):
        align(pictures(2, 16), template()[None])
    with pytest.raises(ValueError, match=r"landmarks \(2, 5, 2\)"):
        faces_of(pictures(2, 16), torch.rand(2, 4), template()[None], 8)


# ------------------------------------------------------------ aligned pictures


def draw(points, height, width, radius):
    """Frames (B, 5, height, width), channel k a round bump at point k of (B, 5, 2), pixels from the outer corner."""
    y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    px, py = points[:, :, :1, None], points[:, :, 1:, None]
    return torch.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2))


def middles(pictures_):
    """Centres of mass of every channel, (B, K, 2), pixels from the outer corner."""
    b, k, h, w = pictures_.shape
    y, x = torch.arange(h)[:, None] + 0.5, torch.arange(w) + 0.5
    mass = pictures_.sum((2, 3))
    return torch.stack([(pictures_ * x).sum((2, 3)) / mass, (pictures_ * y).sum((2, 3)) / mass], dim=2)


@pytest.mark.parametrize("size", [112, 32, 64, 224])
@pytest.mark.parametrize(("degrees", "scale", "shift"), [
    (0.0, 1.0, (60.0, 30.0)), (25.0, 1.5, (90.0, 20.0)), (-70.0, 0.9, (40.0, 140.0)), (180.0, 1.2, (200.0, 190.0)),
])
def test_drawn_landmarks_land_on_the_template(size, degrees, scale, shift):
    landmarks = turned(template(), degrees, scale, shift)[None]
    frames = draw(landmarks, 240, 320, radius=2.0 * scale)
    found = middles(align(frames, landmarks, size))
    error = (found - template(size)).abs().max().item()
    print(f"size {size}, {degrees} degrees, scale {scale}: {error:.4f} pixels")
    assert error < 0.02  # measured up to 0.0098
    assert (template(size) / size - template(112) / 112).abs().max() < 1e-6


def test_an_upright_face_is_cut_out_as_by_its_box():
    frames = pictures(3, 90)
    corner, side = torch.tensor([[10.0, 4.0], [20.5, 30.25], [-8.0, 40.0]]), torch.tensor([60.0, 33.0, 70.0])
    landmarks = corner[:, None] + template(1) * side[:, None, None]
    boxes = torch.cat([corner, corner + side[:, None]], dim=1)
    difference = (align(frames, landmarks, 48) - crop_faces(frames, boxes, 48)).abs().max()
    assert difference < 1e-4, f"{difference:.1e}"  # the frames are noise: a shift of 0.001 pixels would show


def test_alignment_equals_the_published_recipe():
    """InsightFace: fit to the template, then warp, both counting pixel middles 0, 1, 2 ...; ours from the corner."""
    published_points = torch.tensor([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
                                     [70.7299, 92.2041]])
    frame, landmarks = pictures(1, 128).double(), turned(published_points, 12.0, 0.7, (40.0, 0.0)) + torch.randn(5, 2)
    matrix = torch.cat([lstsq(landmarks, published_points), torch.tensor([[0.0, 0, 1]]).double()]).inverse()
    v, u = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    x, y, _ = torch.einsum("ij,jvu->ivu", matrix, torch.stack([u, v, torch.ones_like(u)]).double())
    inside = (x > 0) & (x < 126) & (y > 0) & (y < 126)
    column, row = x.clamp(0, 126).long(), y.clamp(0, 126).long()
    right, down = x - column, y - row                                      # bilinear by hand
    upper = frame[..., row, column] * (1 - right) + frame[..., row, column + 1] * right
    lower = frame[..., row + 1, column] * (1 - right) + frame[..., row + 1, column + 1] * right
    theirs, ours = upper * (1 - down) + lower * down, align(frame, landmarks[None] + 0.5)
    assert inside.float().mean() > 0.7
    assert ((ours - theirs) * inside).abs().max() < 1e-4


def test_alignment_undoes_a_turn_of_the_picture():
    """A smooth picture seen straight, and the same picture turned by 90 degrees with its landmarks: one crop."""
    straight = nnf.interpolate(pictures(1, 8), size=(96, 96), mode="bicubic")
    landmarks = 14 + template(68)[None]
    quarter = straight.rot90(1, (2, 3))                                    # counter-clockwise: (x, y) -> (y, 96 - x)
    moved = torch.stack([landmarks[..., 1], 96 - landmarks[..., 0]], dim=-1)
    assert (align(straight, landmarks, 64) - align(quarter, moved, 64)).abs().max() < 1e-4
    assert (align(straight, landmarks, 64) - align(quarter, landmarks, 64)).abs().max() > 0.3


def test_gradients_reach_the_pixels_under_the_face_and_only_those():
    frames = pictures(2, 100).requires_grad_()
    landmarks = turned(template(), 20.0, 0.3, (30.0, 30.0)).expand(2, 5, 2)
    (align(frames, landmarks, 40) * pictures(2, 40)).sum().backward()
    assert frames.grad.isfinite().all()
    assert frames.grad[:, :, 50, 45].abs().min() > 0 and frames.grad[:, :, 90:].abs().max() == 0


def test_low_precision_frames_and_autocast_do_not_move_the_face():
    frames, landmarks = pictures(2, 100), turned(template(), 20.0, 0.5, (30.0, 20.0)).expand(2, 5, 2)
    plain_ = align(frames, landmarks)
    with torch.autocast("cpu", torch.bfloat16):
        assert (align(frames, landmarks) - plain_).abs().max() < 1e-5
    rounded = frames.bfloat16()
    assert (align(rounded, landmarks) - align(rounded.float(), landmarks)).abs().max() == 0


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
    for marks in (None, torch.full((4, 5, 2), torch.nan)):
        by_box = faces_of(frames[1:], boxes[1:], marks if marks is None else marks[1:], 32)
        assert torch.equal(by_box, crop_faces(frames[1:], square(boxes[1:]), 32))
    assert torch.equal(faces_of(frames[[0]], boxes[[0]], landmarks[[0]], 32), faces[[0]]), "no box needed at all"


def test_square_keeps_the_middle_and_covers_the_box():
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert square(box, grow=1.0).tolist() == [[0.0, 20.0, 40.0, 60.0]]


# ------------------------------------------------------------ the demo's picture


def test_pairs_are_cosines_of_the_faces_that_they_give():
    net = load_facenet(face.TINY)
    found = face.pairs(net, count=6)
    anchor = net(found[face.ANCHOR][0])
    for name, (faces, cosines) in found.items():
        assert faces.shape == (6, 3, net.size, net.size) and cosines.shape == (6,)
        theirs = torch.nn.functional.cosine_similarity(anchor, net(faces))
        assert (cosines - theirs).abs().max() < 1e-5, name
    mean = {name: cosines.mean().item() for name, (_, cosines) in found.items()}
    assert mean[face.ANCHOR] > 0.9999 and mean[face.SAME] > mean[face.ALIKE] + 0.2 > mean[face.STRANGER] + 0.2
    for degrees in face.TURNS:
        straight, tilted = (found[f"turned by {degrees}, by {how}"] for how in ("landmarks", "box"))
        assert (straight[0] - found[face.ANCHOR][0]).abs().mean() < 0.05 < (tilted[0] - straight[0]).abs().mean()
        assert straight[1].mean() > 0.98


def test_the_picture_shows_the_faces_and_puts_every_ring_at_its_cosine():
    people = {name: (pictures(3, 64), cosines) for name, cosines in
              (("one", torch.tensor([1.0, 1.0, 1.0])), ("two", torch.tensor([-1.0, 0.0, 0.7])))}
    picture = face.draw(people, rows=2)
    sheet = np.asarray(picture)
    assert picture.width <= 1600
    for k, (faces, cosines) in enumerate(people.values()):
        left = face.LEFT + k * (face.TILE + face.GAP)
        for row in range(2):
            top = 60 + row * (face.TILE + 34)
            tile = sheet[top:top + face.TILE:2, left:left + face.TILE:2]
            assert (tile == world.to_uint8(faces[row]).permute(1, 2, 0).numpy()).all(), (k, row)
        line = sheet[picture.height - 32 - 34 * len(people) + 34 * k + 17]          # through the rings of this kind
        drawn = set(np.nonzero((line == face.COLORS[k]).all(-1))[0].tolist())
        places = [face._scale(c, picture.width) for c in cosines.tolist()]
        bar = face._scale(cosines.mean().item(), picture.width)
        rings = {x + side for x in places for side in (-3, 3)} | set(range(bar - 1, bar + 2))
        names = {x for x in drawn if x < face.LEFT + 210}
        assert drawn - names == rings, (k, drawn - names, rings)
    assert face._scale(0.0, 1000) * 2 == face._scale(-1.0, 1000) + face._scale(1.0, 1000)
    with pytest.raises(ValueError, match="expected 1 to 6 kinds"):
        face.draw({str(i): (pictures(1, 8), torch.ones(1)) for i in range(7)})


def test_the_demo_explains_and_draws_and_says_in_one_line_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    face._demo()
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-2].startswith("wrote face_demo.png: ") and lines[-1].startswith("Notice: ") and 10 <= len(lines) <= 25
    assert [path.name for path in tmp_path.iterdir()] == ["face_demo.png"]
    monkeypatch.setattr(face, "TINY", tmp_path / "face.safetensors")
    with pytest.raises(ValueError, match="^[^\n]*no file[^\n]*$"):
        face._demo()
