"""LoRA: train and carry a small correction instead of 13 billion weights.

A linear layer W gets a second path of low rank, W x + B (A x); W stays frozen, and only A and B are trained, saved and
handed on. For LTX-2.3 that is a file of half a gigabyte instead of 26.

LTX-2.3: which layers, rank and alpha: those of its published in-context LoRA recipe; the names in the file.
our reading: that ST-DRC (arXiv 2606.02441) is trained this way. The paper shows that the transformer is trained, not how.

Conventions. strength 0 = off. "Fused" means added into W for good, "applied" means kept beside it.

    parameters = add_lora(model, rank=32, alpha=32)                         # train these
    save_lora("st-drc.safetensors", model, {"reference_placement": "tass"})
    load_lora(other_model, "st-drc.safetensors", strength=1.0)              # fused

Read next: train.py
"""

import math
import os
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import open_file, write_file

# LTX-2.3: the modules of the published in-context LoRA recipe.
LORA_TARGETS = tuple(f"{attn}.{name}" for attn in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
LORA_TARGETS += ("ff.net.0.proj", "ff.net.2")
LORA_PREFIX = "diffusion_model."


class LoRALinear(nn.Module):
    """A frozen linear plus a trainable low-rank correction: base(x) + alpha/rank * B(A(x)). B starts at zero.

    The correction is kept in float32 whatever the base has. Raises ValueError on a rank below 1.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        if rank < 1:
            raise ValueError(f"expected a rank of at least 1, got {rank}; 32 is usual")
        device = base.weight.device
        self.base = base
        self.scale = alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (B, N, rank)
        return out + (F.linear(low, self.lora_B) * self.scale).to(out.dtype)


def add_lora(
    model: nn.Module, rank: int = 32, alpha: float = 32, targets: Iterable[str] = LORA_TARGETS
) -> list[nn.Parameter]:
    """Freeze the model, wrap every linear whose name ends in a target, return the new parameters to train.

    our reading: rank, alpha and targets of LTX's in-context LoRA recipe. The wrapped linear's own weight moves to
    "<name>.base.weight". Raises ValueError when a target matches nothing or is already wrapped.
    """
    if _lora_modules(model):
        raise ValueError("expected a model without LoRA, got one that has it; load a fresh model")
    targets = tuple(targets)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model.requires_grad_(False)
    trained, used = [], set()
    for name, linear in linears.items():
        hits = [target for target in targets if name == target or name.endswith("." + target)]
        if hits:
            used.update(hits)
            wrapped = LoRALinear(linear, rank, alpha)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, wrapped)
            trained += [wrapped.lora_A, wrapped.lora_B]
    unused = [target for target in targets if target not in used]
    if unused:
        raise ValueError(f"expected linears named like {unused[0]!r}, got none in the model; correct the targets")
    return trained


def _lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA under the names LTX-2.3 tools expect; raises ValueError when the model has none.

    LTX-2.3: loaders add B @ A and know no alpha, so alpha/rank is folded into B here.
    """
    modules = _lora_modules(model)
    if not modules:
        raise ValueError("expected a model with LoRA, got one without; call add_lora first")
    state = {}
    for name, module in modules.items():
        state[f"{LORA_PREFIX}{name}.lora_A.weight"] = module.lora_A.detach().clone()  # (rank, in)
        state[f"{LORA_PREFIX}{name}.lora_B.weight"] = module.lora_B.detach() * module.scale  # (out, rank)
    return state


def save_lora(
    path: str | os.PathLike,
    model: nn.Module,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the LoRA alone as a safetensors file; metadata (strings) say how it was trained.

    LTX-2.3: the official trainer writes bf16; float32 loses nothing. Raises ValueError when the model has no LoRA.
    """
    write_file(path, {key: tensor.to(dtype) for key, tensor in lora_state_dict(model).items()}, metadata or {})


@torch.no_grad()
def load_lora(model: nn.Module, path: str | os.PathLike, strength: float = 1.0) -> dict[str, str]:
    """Add strength * B @ A of a LoRA file into the weights of `model`, for good; returns the file's metadata.

    Off: strength 0. Everything is checked before the first weight changes. Raises ValueError naming the key when one is
    unknown, lacks its partner, or does not fit the model.
    """
    with open_file(path) as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, a handle and not a dict
    modules = dict(model.named_modules())
    updates = []
    for key in sorted(tensors):
        stem, _, part = key.removesuffix(".weight").rpartition(".")
        module = modules.get(stem.removeprefix(LORA_PREFIX))
        module = module.base if isinstance(module, LoRALinear) else module
        known = key.startswith(LORA_PREFIX) and key.endswith(".weight") and part in ("lora_A", "lora_B")
        if not known or not isinstance(module, nn.Linear):
            raise ValueError(f"expected LoRA keys of linears in this model, got {key!r}; use a LoRA made for LTX-2.3")
        partner = f"{stem}.{'lora_B' if part == 'lora_A' else 'lora_A'}.weight"
        if partner not in tensors:
            raise ValueError(f"expected {partner!r} beside {key!r}, got no such tensor; the file is incomplete")
        if part == "lora_A":
            A, B = tensors[key], tensors[partner]
            if (B.shape[0], A.shape[1]) != tuple(module.weight.shape) or B.shape[1] != A.shape[0]:
                shapes = f"{tuple(B.shape)} and {tuple(A.shape)}"
                raise ValueError(f"expected {key!r} for weight {tuple(module.weight.shape)}, got {shapes}; check sizes")
            updates.append((module.weight, A, B))
    if not updates:
        raise ValueError(f"expected LoRA tensors in {path}, got none; use another file")
    if strength != 0:
        for weight, A, B in updates:
            change = B.to(weight.device, torch.float32) @ A.to(weight.device, torch.float32)
            weight.copy_(weight.to(torch.float32) + strength * change)
    return metadata
