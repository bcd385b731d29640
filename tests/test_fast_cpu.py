"""The faster ways on a CPU give the plain numbers, and step aside wherever they are not meant.

Hardware: CPU, seconds. Run: python -m pytest tests/test_fast_cpu.py
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_vae import build
from torch.backends import mkldnn
from torch.utils._python_dispatch import TorchDispatchMode

from ltx import fast_cpu
from ltx.fast_cpu import FastCPU

x, w = torch.randn(2, 5, 24), torch.randn(7, 24)
clip, kernel = torch.randn(1, 4, 5, 12, 10), torch.randn(6, 4, 3, 3, 3)
q, k, v = (torch.randn(2, 3, n, 16, dtype=torch.bfloat16) for n in (70, 33, 33))
CALLS = {
    "linear": (lambda: F.linear(x, w, w[:, 0]), "_linear_pointwise"),
    "linear without bias": (lambda: F.linear(x, w), "_linear_pointwise"),
    "attention": (lambda: F.scaled_dot_product_attention(q, k, v), "_softmax"),
    "conv3d": (lambda: F.conv3d(clip, kernel, kernel[:, 0, 0, 0, 0], padding=(0, 1, 1)),
               "mkldnn_convolution"),
    "strided conv3d": (lambda: F.conv3d(clip, kernel, None, (1, 2, 2)), "mkldnn_convolution"),
}
OTHER = {
    "a mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(70, 33).bool()),
    "a scale": lambda: F.scaled_dot_product_attention(q, k, v, scale=2.0),
    "float32 attention": lambda: F.scaled_dot_product_attention(q.float(), k.float(), v.float()),
    "a float64 product": lambda: F.linear(x.double(), w.double()),
    "a bf16 product": lambda: F.linear(x.bfloat16(), w.bfloat16()),
    "a bf16 convolution": lambda: F.conv3d(clip.bfloat16(), kernel.bfloat16()),
    "several clips": lambda: F.conv3d(clip.repeat(2, 1, 1, 1, 1), kernel),
    "a small clip": lambda: F.conv3d(clip[..., :3, :3], kernel),
}


class Names(TorchDispatchMode):
    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def run(call, fast: bool = True) -> tuple[torch.Tensor, str]:
    """What a call returns and the names of the operations that it was made of."""
    with Names() as seen:
        if not fast:
            return call(), str(seen.names)
        with FastCPU():
            return call(), str(seen.names)


@torch.no_grad()
@pytest.mark.parametrize("name, autocast", [*((n, False) for n in CALLS), ("attention", True)])
def test_the_faster_way_is_taken_and_gives_the_plain_numbers(name, autocast, monkeypatch):
    monkeypatch.setattr(fast_cpu, "SCORES", 33 * 64)  # attention in several pieces of 64 rows
    monkeypatch.setattr(fast_cpu, "bf16_time", lambda: 0.4)
    call, operation = CALLS[name]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (plain, usual), (found, taken) = run(call, fast=False), run(call)
    assert operation in taken and operation not in usual
    assert found.dtype == plain.dtype and found.shape == plain.shape
    # float32 sums in another order; bf16: scores and weights are rounded once more, 2^-8 each
    bound = 2e-2 if plain.dtype == torch.bfloat16 else 1e-5
    assert (found - plain).abs().max() <= bound * plain.abs().max()


@pytest.mark.parametrize("name", [*CALLS, *OTHER])
def test_everything_else_passes_through_untouched(name):
    call = OTHER.get(name) or CALLS[name][0]

    def same() -> bool:
        (plain, usual), (found, taken) = run(call, fast=False), run(call)
        return taken == usual and torch.equal(found, plain)

    assert same(), "with gradients"
    with torch.no_grad():
        assert name in CALLS or same()
        if name != "attention":  # it needs no oneDNN, and autocast leaves its inputs alone
            with mkldnn.flags(enabled=False):
                assert same(), "without oneDNN"
            with torch.autocast("cpu", torch.bfloat16):
                assert same(), "under autocast"


def absent(*args):
    """What an operation says that has a name in this build of PyTorch, and nothing behind it."""
    raise RuntimeError("mkldnn_convolution_forward: ATen not compiled with MKLDNN support")


@torch.no_grad()
@pytest.mark.parametrize("missing", ["names", "code"])
@pytest.mark.parametrize("name", ["linear", "conv3d"])
def test_a_build_without_onednn_takes_the_plain_way(name, missing, monkeypatch):
    """Apple's builds have no such operations, though their switch, mkldnn.enabled, is on."""
    plain = CALLS[name][0]()
    if missing == "names":
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
        monkeypatch.delattr(torch, "mkldnn_convolution")
    else:
        monkeypatch.setattr(torch, "mkldnn_convolution", absent)
    fast_cpu.has_onednn.cache_clear()
    try:
        assert mkldnn.enabled and torch.equal(run(CALLS[name][0])[0], plain)
    finally:
        fast_cpu.has_onednn.cache_clear()


@torch.no_grad()
def test_a_processor_without_bf16_units_keeps_the_fused_attention(monkeypatch):
    monkeypatch.setattr(fast_cpu, "bf16_time", lambda: 34.0)
    plain, usual = run(CALLS["attention"][0], fast=False)
    assert run(CALLS["attention"][0])[1] == usual


@torch.no_grad()
def test_a_whole_vae_gives_the_same_video():
    vae = build(3)
    video = torch.rand(1, 3, 2 * vae.time_scale + 1, 2 * vae.space_scale, 3 * vae.space_scale)
    latent = vae.encode(video)
    again = vae.decode(latent)
    with FastCPU():
        assert torch.allclose(vae.encode(video), latent, atol=1e-5)
        assert torch.allclose(vae.decode(latent), again, atol=1e-5)
