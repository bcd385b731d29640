"""A model larger than the card's memory: numbers of half the size, and blocks that come and go.

The idea. LTX-2.3's video transformer is 26 GB in bf16; 98 % of that are 48 equal blocks, of which
one works at a time.

* *half-size numbers* (`cast_linears`): the matrices are kept in float8_e4m3fn, one byte a number,
  and turned back into the type of their input when used. The price is rounding: 2.6 %
  root-mean-square per weight, which moves the bundled model's velocity by about 5 %.
* *streaming* (`load_streamed`): the blocks stay in the computer's memory ("cpu") or in the file
  ("disk"), and the next one is fetched while one computes. The price is time; the result is equal,
  bit for bit.

Without reading ahead the card would stand idle during every copy; without the waits below it would
now and then compute with half of one block and half of another, and the video would merely look a
little worse.

LTX-2.3: "fp8-cast" is a plain cast without scale factors, as in the official flag. ST-DRC (arXiv
  2606.02441) says nothing about memory.

Conventions. offload "none" is off. A streamed model is for sampling, under torch.no_grad(): a block
is valid until the next one is asked for; parameters(), state_dict() and .to() do not see streamed
blocks. Never .to(dtype) a cast model.

    cast_linears(model.transformer_blocks)                     # optional; model on the meta device
    load_streamed(model, "transformer_blocks", path, TRANSFORMER_PREFIX, dtype, "cuda", "cpu")

Read next: ltx/fast_cpu.py
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx.checkpoint import check_weights, load_weights

OFFLOADS = ("none", "cpu", "disk")
FLOAT8 = torch.float8_e4m3fn


def to_float8(weight: Tensor) -> Tensor:
    """Nearest float8_e4m3fn, beyond +-448 the bound itself; NaN stays NaN, so that damage shows."""
    if weight.dtype == FLOAT8:
        return weight
    bound = torch.finfo(FLOAT8).max  # what lies beyond it becomes NaN in some versions of PyTorch
    return weight.clamp(-bound, bound).to(FLOAT8)


def from_float8(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in the type it is used in; scale (out, 1) or None. Others than float8 stay."""
    weight = weight.to(dtype)
    return weight if scale is None else weight.mul_(scale)


class CastLinear(nn.Module):
    """A linear layer whose weight (out, in) is kept in float8_e4m3fn and cast when used. LTX-2.3.

    Names and shapes are those of nn.Linear, so checkpoints load by name. by_row: with a scale
    (out, 1), so that the largest number of each row is 448 and small ones are not lost. Weight,
    scale and bias take no gradient.
    """

    def __init__(self, linear: nn.Linear, by_row: bool = False):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = linear.weight.detach(), None
        if by_row:
            bound = torch.finfo(FLOAT8).max
            largest = weight.abs().amax(dim=1, keepdim=True)
            tiny = bound * torch.finfo(weight.dtype).tiny  # a row of zeros must not divide by zero
            scale = nn.Parameter(largest.clamp(min=tiny) / bound, requires_grad=False)
            weight = weight / scale
        self.weight = nn.Parameter(to_float8(weight), requires_grad=False)
        self.register_parameter("scale", scale)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        weight = from_float8(self.weight, self.scale, x.dtype)
        return F.linear(x, weight, self.bias)                   # (..., in) -> (..., out)


def cast_linears(module: nn.Module, by_row: bool = False) -> nn.Module:
    """Replace every nn.Linear inside by a CastLinear, in place; returns the module.

    On the meta device this only marks the weights: load_streamed casts them as they come from the
    file. The weights of a loaded module are cast now, and have to be for scales by row.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, CastLinear(child, by_row))
        else:
            cast_linears(child, by_row)
    return module


class BlockStream(nn.Module):
    """In place of a ModuleList: gives blocks 0, 1, ... in order, the next one read ahead.

    load(i) makes block i anew, weights on `device`, in a second thread; after use the block loses
    them. So never more than two have weights. What load(i) raises is raised when block i is asked
    for. Going through again, also after stopping half way, starts at block 0.
    """

    def __init__(self, count: int, load: Callable[[int], nn.Module],
                 device: str | torch.device = "cpu"):
        super().__init__()
        self.count, self.load, self.device = count, load, torch.device(device)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[nn.Module]:
        # Gradient mode and CUDA stream belong to a thread. On the computing thread's own stream
        # the memory of a block is reused only after the last kernel that reads it.
        stream = nullcontext()
        if self.device.type == "cuda":
            stream = torch.cuda.stream(torch.cuda.current_stream(self.device))

        @torch.no_grad()
        def read(i: int) -> nn.Module:
            with stream:
                return self.load(i)

        with ThreadPoolExecutor(1) as pool:  # leaving it, also half way, waits for its reading
            ahead = pool.submit(read, 0) if self.count else None
            for i in range(self.count):
                block = ahead.result()
                ahead = pool.submit(read, i + 1) if i + 1 < self.count else None
                yield block
                block.to("meta")  # a for loop still holds the module, and now no weights with it


class HostStream(BlockStream):
    """The same for blocks of equal shapes that stay in the computer's memory.

    If they compute on the CPU they are used where they are. For a CUDA device they are page-locked
    ("pinned"), which lets the card copy while it computes, and copied into two slots there in turn.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: str | torch.device = "cpu"):
        blocks = list(blocks)  # plain: not registered as children, so .to(device) leaves them here
        super().__init__(len(blocks), blocks.__getitem__, device)
        self.blocks, self.slots = blocks, []
        if self.device.type == "cuda" and blocks:
            # Tensor by tensor: PyTorch rounds page-locked memory up to a power of two, which
            # LTX-2.3's weights are.
            self.blocks = [block._apply(Tensor.pin_memory) for block in blocks]
            self.slots = [copy.deepcopy(blocks[0]).to(self.device) for _ in range(2)]
            self.side = torch.cuda.Stream(self.device)

    def __iter__(self) -> Iterator[nn.Module]:
        if self.device.type != "cuda":
            return (yield from self.blocks)
        compute = torch.cuda.current_stream(self.device)
        try:
            self._copy(0, compute)
            for i in range(self.count):
                # Wait 1: block i is not used before its copy, the latest on the side stream.
                compute.wait_stream(self.side)
                if i + 1 < self.count:
                    self._copy(i + 1, compute)
                yield self.slots[i % 2]
        finally:
            # Wait 3: stopped half way, a copy may be under way; nobody gets its memory before.
            compute.wait_stream(self.side)

    def _copy(self, i: int, compute: "torch.cuda.Stream") -> None:
        # Wait 2: the slot is not refilled before all that is queued for computing is over. That
        # includes block i-2, which used this slot, and not block i-1, which is queued only after
        # this and runs during the copy.
        self.side.wait_stream(compute)
        with torch.cuda.stream(self.side), torch.no_grad():
            pinned = self.blocks[i].state_dict()
            for name, tensor in self.slots[i % 2].state_dict().items():
                tensor.copy_(pinned[name], non_blocking=True)


def stream_blocks(count: int, load: Callable[[int, torch.device], nn.Module],
                  device: str | torch.device, offload: str) -> BlockStream:
    """The stream for offload "cpu" or "disk"; load(i, where) makes block i on the device where."""
    device = torch.device(device)
    if offload == "cpu":
        return HostStream([load(i, torch.device("cpu")) for i in range(count)], device)
    if offload == "disk":
        return BlockStream(count, lambda i: load(i, device), device)
    raise ValueError(f"expected offload cpu or disk, got {offload!r}; use one of them")


def _load_rest(model: nn.Module, blocks: str, path: str | os.PathLike, prefix: str,
               **how: object) -> nn.ModuleList:
    """load_weights for all but the blocks, which are returned; everything is checked at once."""
    check_weights(model, path, prefix)  # now, and not when some block is read
    waiting = getattr(model, blocks)
    setattr(model, blocks, nn.ModuleList())
    load_weights(model, path, prefix, **how)
    return waiting


def load_by_block(model: nn.Module, blocks: str, path: str | os.PathLike, prefix: str,
                  dtype: torch.dtype | None, device: str | torch.device,
                  finish: Callable[[int, nn.Module], object]) -> nn.Module:
    """load_weights, one block of the ModuleList named `blocks` at a time; returns the model.

    For training: `finish(i, block)` rounds a block, keeps a part of it (training/workers.py) or
    sends it away (training/frozen.py), so that the device never holds more than one whole block
    that is not finished. The model is on the meta device. Raises ValueError as load_weights.
    """
    waiting = _load_rest(model, blocks, path, prefix, dtype=dtype, device=device)
    for i, block in enumerate(waiting):
        finish(i, load_weights(block, path, f"{prefix}{blocks}.{i}.", dtype, device))
    setattr(model, blocks, waiting)
    return model


def load_streamed(model: nn.Module, blocks: str, path: str | os.PathLike, prefix: str,
                  dtype: torch.dtype | None = None, device: str | torch.device = "cpu",
                  offload: str = "none", change: Callable[[str, Tensor], Tensor] | None = None
                  ) -> nn.Module:
    """load_weights for a model on the meta device whose ModuleList is named `blocks`; returns it.

    offload "none": everything onto device; "cpu", "disk": the blocks are replaced by a stream.
    change(name in the model, tensor) as in load_weights; with "disk" it runs on every reading.
    Raises ValueError on an unknown offload, and as load_weights.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"expected offload out of {', '.join(OFFLOADS)}, got {offload!r}; "
                         "use one of them")
    eights = {name for name, like in model.state_dict().items() if like.dtype == FLOAT8}

    def changed(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor if change is None else change(name, tensor)
        return to_float8(tensor) if name in eights else tensor

    if offload == "none":
        return load_weights(model, path, prefix, dtype, device, changed)
    empty = _load_rest(model, blocks, path, prefix, dtype=dtype, device=device, change=changed)

    def load(i: int, where: torch.device) -> nn.Module:
        stem = f"{blocks}.{i}."
        block = copy.deepcopy(empty[i])  # still on the meta device, costs nothing
        return load_weights(block, path, prefix + stem, dtype, where,
                            lambda name, tensor: changed(stem + name, tensor))

    setattr(model, blocks, stream_blocks(len(empty), load, device, offload))
    return model
