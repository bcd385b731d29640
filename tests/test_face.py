"""The recogniser reads ArcFace iresnet files by their own names, and equals a second, functional writing of the network.

    pytest tests/test_face.py
"""

import pytest
import torch
import torch.nn.functional as nnf
from safetensors.torch import save_file

from face import FaceNet, load_facenet, square


def random_net(**kwargs):
    net = FaceNet(**kwargs).eval()
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.5 if "var" in name else torch.randn_like(t) * 0.2)
    return net


def functional(t, x, blocks):
    """iresnet written once more, without modules: tensors by name, picture in, unit vector out."""
    def norm(x, name):
        return nnf.batch_norm(x, t[name + ".running_mean"], t[name + ".running_var"], t[name + ".weight"],
                              t[name + ".bias"])
    x = nnf.prelu(norm(nnf.conv2d(x, t["conv1.weight"], padding=1), "bn1"), t["prelu.weight"])
    for stage, depth in enumerate(blocks, 1):
        for i in range(depth):
            n, stride = f"layer{stage}.{i}", 2 if i == 0 else 1
            y = norm(nnf.conv2d(norm(x, n + ".bn1"), t[n + ".conv1.weight"], padding=1), n + ".bn2")
            y = nnf.conv2d(nnf.prelu(y, t[n + ".prelu.weight"]), t[n + ".conv2.weight"], stride=stride, padding=1)
            if i == 0:
                x = norm(nnf.conv2d(x, t[n + ".downsample.0.weight"], stride=stride), n + ".downsample.1")
            x = x + norm(y, n + ".bn3")
    x = nnf.linear(norm(x, "bn2").flatten(1), t["fc.weight"], t["fc.bias"])
    return nnf.normalize(norm(x, "features"))


@pytest.mark.parametrize("blocks", [(1, 1, 2, 1), (2, 2, 2, 2)])
def test_a_file_is_read_by_its_names_and_equals_the_functional_network(tmp_path, blocks):
    net = random_net(blocks=blocks, widths=(8, 8, 12, 16, 20), embedding=24, size=32)
    tensors = net.state_dict()
    save_file({k: v for k, v in tensors.items() if v.is_floating_point()}, tmp_path / "net.safetensors")
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    ours, theirs = load_facenet(tmp_path / "net.safetensors")(x), functional(tensors, x, blocks)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours.norm(dim=1) - 1).abs().max() < 1e-5


def test_published_sizes_follow_from_the_arguments():
    names = FaceNet(blocks=(3, 4, 14, 3)).state_dict()  # iresnet50
    assert names["fc.weight"].shape == (512, 512 * 7 * 7)
    assert names["layer3.13.conv2.weight"].shape == (256, 256, 3, 3)
    assert names["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)


def test_a_file_that_is_no_iresnet_is_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="iresnet"):
        load_facenet(tmp_path / "other.safetensors")


def test_square_keeps_the_middle_and_covers_the_box():
    box = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert square(box, grow=1.0).tolist() == [[0.0, 20.0, 40.0, 60.0]]
