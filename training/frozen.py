"""The base under a LoRA: loaded block by block, in bf16 or one byte a number, on the card or not.

The idea. Under a LoRA 99 % of the weights never change. So they need no gradient, no second copy in
float32, not even all their bits (`--quantization fp8-cast`); and they need not be on the card.
With `--offload` each block's weights are copied there just before the block runs, forward in order,
and once more, in reverse, when the backward pass computes the block again (gradient checkpointing).
The next block is copied while one computes. Nothing is ever written back: nothing has changed.

    forward     0 -> 1 -> 2 -> ... -> 47
    backward    0 <- 1 <- 2 <- ... <- 47     the last two are still there: no copy at the turn

The failure this prevents: a block that computes with half of another one's weights. The loss would
go down all the same, only worse. Two places on the card are filled in turn (block i in place i mod
2), and two waits keep them apart: a block waits for its copy, and a copy waits for all that was
asked of the block before it in that place.

LTX-2.3: trained weights in float32, frozen ones in bf16; its one-byte file keeps the first two
  blocks and the last two in bf16. our reading: the rest; ST-DRC (arXiv 2606.02441) says nothing
  about memory. For sampling, where blocks only go forward, ltx/offload.py is simpler.

Conventions. Gradients with --offload equal those without, bit for bit. It needs gradient
checkpointing: without it the backward pass would want every block's weights at once.

    model = load_base(args, "cuda", sharded=False)           # args: train.py's

Read next: training/plan.py
"""

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ltx.checkpoint import load_weights
from ltx.load import empty_transformer
from ltx.lora import add_lora
from ltx.offload import cast_linears, load_by_block
from model import TRANSFORMER_PREFIX, VideoTransformer
from training.workers import shard

ENDS = 2     # LTX-2.3: blocks at either end that are never rounded to one byte
ALIGN = 256  # bytes; where a tensor may begin

# ------------------------------------------------------------ loading


def frozen_type(args: argparse.Namespace) -> torch.dtype:
    """What is trained is kept in float32, what is frozen in the type of the computation."""
    return torch.bfloat16 if args.precision == "bf16" and not args.full else torch.float32


def mixed_precision(args: argparse.Namespace, device: str) -> torch.autocast:
    """Under it float32 weights compute in bf16. Those that were loaded in bf16 do so by themselves,
    without copies of every tensor in both types."""
    return torch.autocast(device, torch.bfloat16, enabled=args.precision == "bf16" and args.full)


def check_memory_options(args: argparse.Namespace) -> None:
    """Raise ValueError for --quantization and --offload where they cannot be."""
    for flag in ("quantization", "offload"):
        if getattr(args, flag) == "none":
            continue
        if args.full:
            raise ValueError(f"expected a LoRA with --{flag}, got --full, under which no weight is "
                             "frozen; use --no-full")
        if args.parallel == "fsdp" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"expected --parallel ddp with --{flag}, got fsdp, which spreads the "
                             "blocks over the cards anyway; use one of them")
    if args.offload != "none" and (args.compile or not args.gradient_checkpointing):
        got = "--compile" if args.compile else "--no-gradient-checkpointing"
        raise ValueError(f"expected blocks that are computed again one by one with --offload, got "
                         f"{got}; leave it out")


def load_base(args: argparse.Namespace, device: str, sharded: bool) -> VideoTransformer:
    """The transformer to train. The device never holds more than what stays on it and one block."""
    model = empty_transformer(args.checkpoint).requires_grad_(args.full)  # shapes, no numbers yet
    where, dtype, waiting = "transformer_blocks", frozen_type(args), []
    empty = copy.deepcopy(model.transformer_blocks)

    def rounded(i: int, block: nn.Module) -> nn.Module:
        inner = ENDS <= i < len(empty) - ENDS
        return cast_linears(block, by_row=True) if inner and args.quantization != "none" else block

    def finish(i: int, block: nn.Module) -> None:
        rounded(i, block)
        if not args.full:
            add_lora(block, rank=args.rank, alpha=args.rank)
        if sharded:
            shard(block, device)
        if args.offload != "none":
            frozen = frozen_of(block)
            waiting.append(pinned(frozen, device) if args.offload == "cpu" else None)
            set_frozen(block, {name: p.to("meta") for name, p in frozen.items()})

    def read(i: int) -> dict[str, Tensor]:  # from the file, in every step
        block = load_weights(copy.deepcopy(empty[i]), args.checkpoint,
                             f"{TRANSFORMER_PREFIX}{where}.{i}.", dtype, device)
        return frozen_of(rounded(i, block))

    load_by_block(model, where, args.checkpoint, TRANSFORMER_PREFIX, dtype, device, finish)
    if args.offload != "none":
        FrozenBlocks(model.transformer_blocks,
                     waiting.__getitem__ if args.offload == "cpu" else read, device)
    model.gradient_checkpointing = args.gradient_checkpointing
    return shard(model, device) if sharded else model


# ------------------------------------------------------------ frozen blocks that come and go


def frozen_of(block: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimiser never sees, by name; a LoRA's inner ".base" left out of the name."""
    return {name.replace(".base.", "."): p for name, p in block.named_parameters()
            if not p.requires_grad}


def set_frozen(block: nn.Module, values: dict[str, Tensor]) -> None:
    """Give a block's frozen parameters these values."""
    for name, _ in list(block.named_parameters()):
        if (value := values.get(name.replace(".base.", "."))) is not None:
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def views_into(place: Tensor, frozen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors like these, one behind the other in the bytes of `place`."""
    views, start = {}, 0
    for name, like in frozen.items():
        stop = start + like.numel() * like.itemsize
        views[name] = place[start:stop].view(like.dtype).view(like.shape)
        start = -(-stop // ALIGN) * ALIGN
    return views


def pinned(frozen: dict[str, Tensor], device: str | torch.device) -> dict[str, Tensor]:
    """Copies in the computer's memory; page-locked for a card, which can then copy by itself."""
    lock = torch.device(device).type == "cuda"
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in frozen.items()}
    return {name: tensor.pin_memory() if lock else tensor for name, tensor in copies.items()}


class FrozenBlocks:
    """Fetches the frozen weights of each block when it is called, one block ahead.

    read(i) gives block i's, by the names of `frozen_of`, on any device; what it raises is raised
    where the block is called. The blocks are changed in place: their frozen parameters become views
    into two places on `device`.
    """

    def __init__(self, blocks: Sequence[nn.Module], read: Callable[[int], dict[str, Tensor]],
                 device: str | torch.device):
        self.count, self.read, self.device = len(blocks), read, torch.device(device)
        frozen = [frozen_of(block) for block in blocks]
        size = max(sum(-(-p.numel() * p.itemsize // ALIGN) * ALIGN for p in each.values())
                   for each in frozen)
        places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self.views = [views_into(places[i % 2], each) for i, each in enumerate(frozen)]
        self.held: list[int | None] = [None, None]  # which block is, or soon will be, in a place
        self.coming: dict[int, Future] = {}
        self.last = -1
        self.pool = ThreadPoolExecutor(1)  # a disk is waited for in a thread of its own
        self.side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for i, block in enumerate(blocks):
            set_frozen(block, self.views[i])
            block.register_forward_pre_hook(lambda *_, i=i: self.fetch(i))

    def fetch(self, i: int) -> None:
        """Block i is about to compute, for the first time or again."""
        self._bring(i)
        copied = self.coming[i].result()
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)  # wait 1: for its copy
        forward = i == self.last + 1 or i < self.last - 1 or self.count == 1
        ahead = i + 1 if forward else i - 1  # the same block twice: the backward pass begins
        if 0 <= ahead < self.count:
            self._bring(ahead)
        self.last = i

    def _bring(self, i: int) -> None:
        place = i % 2
        if self.held[place] != i:
            self.coming.pop(self.held[place], None)
            self.held[place], used = i, None
            if self.side is not None:
                used = torch.cuda.current_stream(self.device).record_event()
            self.coming[i] = self.pool.submit(self._copy, i, used)

    @torch.no_grad()
    def _copy(self, i: int, used: "torch.cuda.Event | None") -> "torch.cuda.Event | None":
        """In the second thread. used: when all that was queued for this place is over."""
        with nullcontext() if self.side is None else torch.cuda.stream(self.side):
            if used is not None:
                self.side.wait_event(used)  # wait 2: for those who still read this place
            values = self.read(i)
            for name, view in self.views[i].items():
                view.copy_(values[name], non_blocking=True)
            return None if self.side is None else self.side.record_event()
