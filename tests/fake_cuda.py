"""A card that is not there: the "cuda" path on tensors without numbers, in a PyTorch for CPUs.

PyTorch's FakeTensorMode computes shapes, types and devices and no numbers, so a model of 26 GB
costs nothing. Here only what touches "cuda" is fake; what stands on the CPU is real, as it would be
beside a real card. So a tensor on the wrong device, of a wrong type or shape is an error, a number
that is read back from the card is noticed, and the bytes alive on the card can be counted.

    FAKE_CUDA=library python ...           the library that `build` made; this module before torch
    install()                              stubs for what torch.cuda asks of a driver
    with Card() as card: ...               then card.peak, card.reads, CHOSEN

What a card does and this cannot: kernels, so numbers and times; streams and events, which are
accepted and do nothing; the allocator's rounding and fragments; workspaces of libraries. Kernels
that a PyTorch for CPUs takes apart are put together again (`rms_norm`, `silu`, `attention`).
"""

import collections
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from pathlib import Path

if "FAKE_CUDA" in os.environ:  # when torch is imported it settles whether there is a card
    ctypes.CDLL(os.environ["FAKE_CUDA"], mode=ctypes.RTLD_GLOBAL)

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
ROOT = str(SOURCE.parents[1]) + os.sep
CHOSEN = collections.Counter()  # (with or without a mask, type) of each attention on "cuda"


def build() -> Path | None:
    """fake_cuda.cpp, compiled against the PyTorch that is installed. None without a compiler."""
    if (compiler := shutil.which("g++")) is None:
        return None
    home = Path(importlib.util.find_spec("torch").origin).parent
    key = SOURCE.read_bytes() + importlib.metadata.version("torch").encode()
    name = f"fake-cuda-{os.getuid()}-{hashlib.sha256(key).hexdigest()[:12]}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-w", "-O0", "-std=c++20", "-fPIC", "-shared", SOURCE, "-o", made,
                        f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib", "-lc10",
                        "-ltorch_cpu"], check=True)
        made.replace(library)
    return library


# ------------------------------------------------------------ what torch.cuda asks of a driver


class Stream:
    """A CUDA stream without work: whatever is waited for is over."""

    def __init__(self, device: object = None):
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        pass

    wait_stream = wait_event


class Inline:
    """A thread pool without a thread: dispatch modes belong to the thread that entered them."""

    def __init__(self, *_: object, **__: object):
        pass

    def submit(self, work, *given) -> types.SimpleNamespace:
        result = work(*given)
        return types.SimpleNamespace(result=lambda: result)

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def apply(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """nn.Module._apply with new parameters; PyTorch's own swaps tensors, which fake ones refuse."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = nn.Parameter(function(p.detach()), p.requires_grad)
    for name, b in module._buffers.items():
        module._buffers[name] = None if b is None else function(b)
    return module


def install(*pools: types.ModuleType) -> None:
    """Make PyTorch, and the modules that have a ThreadPoolExecutor, work with a Card."""
    assert "FAKE_CUDA" in os.environ, "set it to the library that build() made"
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") goes by the CPU
    card = types.SimpleNamespace(total_memory=80 * 10**9)
    answers = {"is_available": True, "is_bf16_supported": True, "device_count": 1,
               "current_device": 0, "current_stream": Stream(), "get_device_properties": card,
               **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "empty_cache"))}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Stream, torch.cuda.stream = Stream, lambda stream: stream
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.accelerator.empty_host_cache = lambda: None
    Tensor.pin_memory, nn.Module._apply = lambda self: self, apply
    F.rms_norm, F.silu, F.scaled_dot_product_attention = rms_norm, silu, attention
    for module in pools:
        module.ThreadPoolExecutor = Inline


# ------------------------------------------------------------ kernels that a card has


library = torch.library.Library("card", "DEF")
library.define("rms_norm(Tensor x, Tensor? weight) -> (Tensor, Tensor)")
library.define("rms_norm_backward(Tensor g, Tensor x, Tensor r, Tensor? weight) -> Tensor")
library.define("silu(Tensor x) -> Tensor")
library.define("silu_backward(Tensor g, Tensor x) -> Tensor")
PLAIN = {"rms_norm": F.rms_norm, "silu": F.silu, "attention": F.scaled_dot_product_attention}
for name in ("rms_norm_backward", "silu", "silu_backward"):
    torch.library.register_fake(f"card::{name}", lambda x, *_: torch.empty_like(x), lib=library)


@torch.library.register_fake("card::rms_norm", lib=library)
def _(x, weight):
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *(output[1:] if isinstance(output, tuple) else ()))


def rms_norm_backward(ctx, g, _) -> tuple:
    x, weight, r = ctx.saved_tensors
    learns = weight is not None and ctx.needs_input_grad[1]
    gradient = torch.ops.card.rms_norm_backward(g, x, r, weight)
    return gradient, torch.empty_like(weight) if learns else None


def silu_backward(ctx, g) -> Tensor:
    return torch.ops.card.silu_backward(g, *ctx.saved_tensors)


torch.library.register_autograd("card::rms_norm", rms_norm_backward, setup_context=keep,
                                lib=library)
torch.library.register_autograd("card::silu", silu_backward, setup_context=keep, lib=library)


def silu(x: Tensor) -> Tensor:
    return torch.ops.card.silu(x) if x.device.type == "cuda" else PLAIN["silu"](x)


def rms_norm(x, shape, weight=None, eps=None) -> Tensor:
    if x.device.type != "cuda":
        return PLAIN["rms_norm"](x, shape, weight, eps)
    if torch.is_autocast_enabled("cuda"):  # as autocast's list says
        x, weight = x.float(), None if weight is None else weight.float()
    assert weight is None or weight.dtype == x.dtype, "two types: the fused kernel is left"
    return torch.ops.card.rms_norm(x, weight)[0]


def attention(q, k, v, attn_mask=None, **options) -> Tensor:
    """Flash without a mask, the memory-efficient kernel with one; cuDNN's takes the same memory."""
    if q.device.type != "cuda":
        return PLAIN["attention"](q, k, v, attn_mask, **options)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (t.to(torch.bfloat16) for t in (q, k, v))
        attn_mask = None if attn_mask is None else attn_mask.to(torch.bfloat16)
    assert q.dtype == k.dtype == v.dtype, f"attention of {q.dtype}, {k.dtype}, {v.dtype}"
    CHOSEN["no mask" if attn_mask is None else "mask", q.dtype] += 1
    if attn_mask is None and q.dtype == torch.bfloat16:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    if attn_mask is not None:
        assert attn_mask.dtype in (q.dtype, torch.bool), f"a mask of {attn_mask.dtype}"
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, torch.is_grad_enabled())[0]


# ------------------------------------------------------------ the card


def place() -> str:
    """Which line of the product is running, and whether a block of the transformer is."""
    frame, line, inside = sys._getframe(2), "backward", ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.startswith(ROOT + "tests"):
            if line == "backward":
                line = f"{name.removeprefix(ROOT)}:{frame.f_lineno}"
            if frame.f_code.co_qualname == "Block.forward":
                inside = " inside a block"
        frame = frame.f_back
    return line + inside


aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Card(TorchDispatchMode):
    """Inside, "cuda" is this card.

    now, peak: bytes alive on it, and most of them since the last `reset`; reads: how often each
    line of the product read something back from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.alive = FakeTensorMode(allow_non_fake_inputs=True), set()
        self.now = self.peak = 0
        self.reads = collections.Counter()

    def reset(self) -> None:
        self.peak = self.now
        self.reads.clear()
        CHOSEN.clear()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.prim.device.default:
            return getattr(args[0], "fake_device", None) or torch.device("cpu")
        device = kwargs.get("device")
        device = None if device is None else torch.device(device).type
        fakes = [t for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)]
        if not fakes and device != "cuda":
            return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default:
            self.reads[place()] += 1
            return True if args[0].dtype == torch.bool else 1
        if function is aten._to_copy.default and device == "cpu":
            self.reads[place()] += 1
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is aten._to_copy.default and not fakes:  # quicker than a fake of the original
            function, kwargs = torch.empty, {"dtype": kwargs.get("dtype") or args[0].dtype,
                                             "device": "cuda"}
            args = (args[0].shape,)
        if function in INDEXING:  # a mask that stands on the CPU is counted there
            places = [i.nonzero()[:, 0] if type(i) is Tensor and i.dtype == torch.bool else i
                      for i in args[1]]
            args = (args[0], places, *args[2:])
        with self.fake:
            out = function(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda":
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size
