"""Several processes, one training: who holds which part of the weights, and sums over all of us.

The idea. `torchrun --nproc_per_node=N train.py ...` starts the same script N times. Each process
takes other clips, and all must end every step with the same weights. Two ways to get there:

* "ddp"   every process holds all weights, and the gradients of its own clips are averaged.
* "fsdp"  every process holds 1/N of each weight, of its gradient and of its optimiser state. A
          block's weights are gathered when the block runs and dropped afterwards (PyTorch's
          `fully_shard`). More messages, but a model that fits on no single card can be trained.

The failure this prevents: N processes that average their *means*. A process whose clips show no
face would halve the face loss of the others. So losses are sums divided by counts over everybody
(`all_reduce`), and the result does not depend on how many processes shared the work.

our reading: all of it; ST-DRC (arXiv 2606.02441) says nothing about devices.

Conventions. rank 0 .. world - 1; without torchrun world is 1, and all returns at once. A sharded
tensor is a DTensor. `full_tensor`, `gather` and `put` are called by all together, or they wait for
ever.

    rank, world = start_workers()
    if world > 1 and can_shard(): shard(model, "cpu")
    count = all_reduce(torch.tensor([3.0]))

Read next: training/frozen.py
"""

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.cli import find_device
from ltx.fast_cpu import bf16_time


def use_own_card() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def start_workers() -> tuple[int, int]:
    """(rank, world). Under torchrun it joins the process group (gloo on CPU, nccl on CUDA).

    Before the first tensor goes to "cuda", which is from now on this process's own card.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        use_own_card()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # The usual half hour is too short: others wait while one encodes the last long clips.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    return int(os.environ.get("RANK", "0")) if world > 1 else 0, world


def settle_thread(threads: int) -> None:
    """What a second thread does not inherit: the number of CPU threads, and the process's card."""
    torch.set_num_threads(threads)
    use_own_card()


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(values: Tensor) -> Tensor:
    """Sum over all processes, elementwise; the same on each of them. On the CPU, shape kept."""
    if not dist.is_initialized():
        return values
    values = values.to(find_device(), copy=True)
    dist.all_reduce(values)
    return values.cpu()


def choose_precision(asked: str | None, device: str) -> str:
    """"bf16" or "fp32": as asked; LTX-2.3: bf16 on a card; on a CPU what it is faster in.

    Without bf16 units, as in most laptops, bf16 takes many times as long. Prints why. All processes
    take what rank 0 found, for their gradients are one sum.
    """
    if asked is not None:
        return asked
    if device != "cpu":  # our reading: float32 on Apple's GPU, where no bf16 was ever tried
        return "bf16" if device == "cuda" else "fp32"
    first = not dist.is_initialized() or dist.get_rank() == 0
    ratio = all_reduce(torch.tensor(bf16_time() if first else 0.0)).item()
    chosen = "bf16" if ratio < 1 else "fp32"
    if first:
        print(f"precision {chosen}: a matrix product in bf16 takes {ratio:.2g} times as long as in "
              "float32 on this CPU; --precision decides otherwise", flush=True)
    return chosen


def autocast(device: str, precision: str) -> torch.autocast:
    """Inside, matrix products and convolutions are in bf16 if that is the precision."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """ "ddp": mean of the gradients over all processes. Missing gradients count as zero.

    Sharded gradients have been averaged by `fully_shard` already and are left alone.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters if not is_shard(p)]
    if world > 1 and grads:
        flat = torch.cat([g.flatten() for g in grads])  # one message instead of hundreds
        dist.all_reduce(flat)
        for g, mean in zip(grads, (flat / world).split([g.numel() for g in grads]), strict=True):
            g.copy_(mean.view_as(g))


# ------------------------------------------------------------ shards


def can_shard() -> bool:
    """Several processes, whose backend has the two messages that `fully_shard` needs?"""
    if not dist.is_initialized():
        return False
    world, device = dist.get_world_size(), find_device()
    try:
        part, parts = torch.ones(2, device=device), torch.ones(2 * world, device=device)
        dist.reduce_scatter_single(part, parts)
        dist.all_gather_single(parts, part)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def shard(module: nn.Module, device: str) -> nn.Module:
    """Keep 1/N of every parameter here, frozen ones too; forward gathers them. Returns the module.

    Shard each block by itself, then the module around them: then one block is gathered at a time.
    """
    # Imported here: it takes most of a second, which a process alone need not spend.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # PyTorch 2.13 warns of its own old names, and of outputs that may be views; we change none.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    return fully_shard(module, mesh=init_device_mesh(device, (dist.get_world_size(),)))


def is_shard(tensor: Tensor) -> bool:
    """Whether only a part of it is here (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, or all shards of one put together on every process."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor in the memory of rank 0's computer, an empty one in other processes.

    Tensor by tensor: no card, and no other process, ever holds more than one whole tensor.
    """
    whole = full_tensor(tensor.detach())
    if dist.is_initialized() and dist.get_rank() != 0:
        return torch.empty(0, dtype=whole.dtype)
    return whole.cpu()


def like(value: Tensor, model: Tensor) -> Tensor:
    """`value`, which every process holds whole, on the device of `model` and sharded if that is."""
    value = value.to(model.device)
    if is_shard(model):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, model.device_mesh, model.placements, src_data_rank=None)
    return value


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole `value` into `target`, sharded or not."""
    target.copy_(like(value.to(target.dtype), target))
