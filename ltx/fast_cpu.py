"""Three operations that PyTorch runs slowly on a CPU, and the faster way to the same numbers.

The idea. model.py and ltx/vae.py are written for reading: nn.Linear, attention, a convolution. On
a CPU PyTorch 2.13 hands three of them to the slower of its libraries. `FastCPU` looks at every
operation while it is on and replaces just these, so that no model has to know about it. Only
sampling is meant: with gradients, autocast or torch.compile everything passes through untouched.

our reading: all of it; LTX-2.3 and ST-DRC (arXiv 2606.02441) say nothing of this. What each trick
  gains: `python -m bench.speed`.

Conventions. Off: leave it out. On a GPU it does nothing. Arguments are PyTorch's own.

    with FastCPU():
        velocity = transformer(...)

Read next: ltx/plan.py
"""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SCORES = 2**20  # attention scores at a time: few enough to stay in a processor's cache


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
    if not x.dtype == weight.dtype == torch.float32 or not torch.backends.mkldnn.enabled:
        return F.linear(x, weight, bias)
    bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its stride
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None,
              **options: Any) -> Tensor:
    """softmax(q k' / sqrt(hd)) v. q (B, nh, N, hd), k, v (B, nh, M, hd) -> (B, nh, N, hd).

    PyTorch's fused attention makes no use of a processor's bf16 units; the three steps written out
    take half to a third of its time. What that costs: scores are rounded before the softmax, and
    the bf16 error of the bundled model's velocity becomes 1.28 % instead of 1.22 %.
    """
    if q.dtype != torch.bfloat16 or attn_mask is not None or options:
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
            or x.shape[0] != 1 or x.numel() <= weight.numel():
        return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
    bias = None if bias is None else bias.contiguous()
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)


FASTER = {F.linear: linear, F.scaled_dot_product_attention: attention, F.conv3d: conv3d}
