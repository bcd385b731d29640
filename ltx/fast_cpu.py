"""Three operations that PyTorch runs slowly on a CPU, and the faster way to the same numbers.

The idea. model.py and ltx/vae.py are written for reading: nn.Linear, attention, a convolution. On
a CPU PyTorch 2.13 hands three of them to the slower of its libraries. `FastCPU` looks at every
operation while it is on and replaces just these, so that no model has to know about it. Only
sampling is meant: with gradients or torch.compile everything passes through untouched, under
autocast everything but attention.

The failure this prevents: what is faster on one processor being taken for faster on all. oneDNN is
missing from some builds of PyTorch, and most processors have no bf16 units: there a product in bf16
takes up to two hundred times as long as in float32. So both are tried, once in a process.

our reading: all of it; LTX-2.3 and ST-DRC (arXiv 2606.02441) say nothing of this. What each trick
  gains: `python -m bench.speed`.

Conventions. Off: leave it out. On a GPU it does nothing. Arguments are PyTorch's own.

    with FastCPU():
        velocity = transformer(...)

Read next: ltx/plan.py
"""

import functools
import itertools
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SCORES = 2**20  # attention scores at a time: few enough to stay in a processor's cache
PROBE = 512     # rows of the matrices that are timed: large enough to be about arithmetic


@functools.cache
def bf16_time() -> float:
    """How long a matrix product takes in bf16 on this CPU, as a multiple of float32's time.

    About 0.3 with bf16 units (avx512_bf16, amx), 2 to 200 without. The best of up to 20 turns
    counts: other programs, which have a busy processor in between, only ever slow a turn down.
    """
    best, end = {}, time.perf_counter() + 0.5
    with torch.autocast("cpu", enabled=False):  # which would make both products the same
        for turn in range(20):
            if turn >= 3 and time.perf_counter() > end:
                break
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.ones(PROBE, PROBE, dtype=dtype)
                start = time.perf_counter()
                x @ x
                best[dtype] = min(time.perf_counter() - start, best.get(dtype, float("inf")))
    return best[torch.bfloat16] / best[torch.float32]


@functools.cache
def has_onednn() -> bool:
    """Whether this build of PyTorch has the two operations below, by trying them.

    torch.backends.mkldnn.enabled does not tell: it is a switch, and on even where oneDNN is absent.
    """
    x = torch.ones(1, 1, 1, 1, 1)
    try:
        torch.ops.mkldnn._linear_pointwise(x, x[0, 0, 0], None, "none", [], "")
        torch.mkldnn_convolution(x, x, None, (0, 0, 0), (1, 1, 1), (1, 1, 1), 1)
    except (AttributeError, RuntimeError):  # no such name; a name with nothing behind it
        return False
    return True


class FastCPU(TorchFunctionMode):
    """Context: linear layers, attention and 3-D convolutions on CPU tensors take the faster way."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        replacement = FASTER.get(func)
        if replacement is not None and args and args[0].device.type == "cpu" and not (
                torch.is_grad_enabled() or torch.compiler.is_compiling()):
            # Under autocast matrix products are not in the type that their inputs have.
            if replacement is attention or not torch.is_autocast_enabled("cpu"):
                func = replacement
        return func(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D), weight (O, D), bias (O,) -> (..., O).

    PyTorch hands a float32 matrix product to MKL, which uses half of the vector width of an AMD
    processor. The operation that PyTorch's own compiler puts in its place goes to oneDNN, which
    uses all of it: 210 against 460 GFLOP/s on two Zen 5 cores.
    """
    if not x.dtype == weight.dtype == torch.float32 or not torch.backends.mkldnn.enabled \
            or not has_onednn():
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its stride
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
              **options: Any) -> Tensor:
    """softmax(q k' / sqrt(hd)) v. q (B, nh, N, hd), k, v (B, nh, M, hd) -> (B, nh, N, hd).

    PyTorch's fused attention makes no use of a processor's bf16 units; the three steps written out
    take half to a third of its time. What that costs: scores are rounded before the softmax, and
    the bf16 error of the bundled model's velocity becomes 1.28 % instead of 1.22 %. Without bf16
    units the fused one is faster: it computes in float32.
    """
    if q.dtype != torch.bfloat16 or attn_mask is not None or options or bf16_time() > 1:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)
    (B, nh, N, hd), M = q.shape, k.shape[2]
    q = (q * hd**-0.5).reshape(B * nh, N, hd)
    k, v = k.reshape(B * nh, M, hd).transpose(1, 2), v.reshape(B * nh, M, hd)
    out = torch.empty_like(q)                                                # (B*nh, N, hd)
    rows, heads = max(64, SCORES // M // 64 * 64), max(1, SCORES // (N * M))
    for h, r in itertools.product(range(0, B * nh, heads), range(0, N, rows)):
        scores = q[h : h + heads, r : r + rows] @ k[h : h + heads]           # (heads, rows, M)
        out[h : h + heads, r : r + rows] = scores.softmax(-1) @ v[h : h + heads]
    return out.unflatten(0, (B, nh))


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: tuple = (1, 1, 1),
           padding: tuple = (0, 0, 0), dilation: tuple = (1, 1, 1), groups: int = 1) -> Tensor:
    """x (B, c, F, h, w) -> (B, c', F', h', w').

    PyTorch takes a plain loop for one small float32 clip, several times slower than oneDNN.
    """
    if not x.dtype == weight.dtype == torch.float32 or not torch.backends.mkldnn.enabled \
            or x.shape[0] != 1 or x.numel() <= weight.numel() or not has_onednn():
        return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    bias = None if bias is None else bias.contiguous()
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)


FASTER = {F.linear: linear, F.scaled_dot_product_attention: attention, F.conv3d: conv3d}
