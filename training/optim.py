"""The optimiser: Muon beside AdamW, the learning rate over a run, and the weight average (EMA).

The idea of Muon. AdamW scales every number of a gradient by itself. For a hidden *matrix* that
wastes steps: a few large singular directions take the whole update. Muon replaces the gradient,
averaged with momentum, by about the nearest orthogonal matrix, so that every direction moves
equally far. It only makes sense for matrices between hidden layers; embeddings, biases, first and
last layers stay with AdamW. (Keller Jordan, "Muon: an optimizer for hidden layers", 2024.)

LTX-2.3:      its trainer uses AdamW, and so does train.py.
our reading:  Muon, with which the tiny base and the bundled checkpoint were made. What ST-DRC
              (arXiv 2606.02441) was trained with is not known.

Conventions. Parameters come as name -> tensor, because states are saved by name; they may be
sharded (training/workers.py). A learning-rate factor, 0 .. 1, multiplies the rates of both parts.

    named = dict(model.named_parameters())
    optimizer = MuonAdamW({}, named, lr_other=2e-4)          # AdamW alone: no matrices for Muon
    loss.backward(); optimizer.step(schedule(step, steps=3000))

Read next: training/workers.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.workers import full_tensor, is_shard, like, put

# Words in the names of LTX-2.3's matrices that are not between hidden layers.
KEEP_FROM_MUON = ("patchify_proj", "proj_out", "adaln", "embed_tokens", "scale_shift_table",
                  "registers", "aggregate")


def orthogonalize(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Newton-Schulz iteration: matrices (..., m, n) -> about the nearest with singular values of 1.

    The quintic's coefficients bring every singular value into [0.7, 1.2] quickly rather than to 1
    exactly; an update does not need more. dtype: of the iteration.
    """
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


class MuonAdamW:
    """Muon for `matrices` (name -> parameter, flattened to out x rest), AdamW for `others`.

    Each part has its own learning rate; betas and weight_decay are AdamW's. precision: of Muon's
    matrix products, "bf16" or "fp32" (a CPU without bf16 units is many times faster in float32).
    """

    def __init__(self, matrices: dict[str, nn.Parameter], others: dict[str, nn.Parameter],
                 lr_matrix: float = 3e-3, lr_other: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
                 precision: str = "bf16"):
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.matrices, self.others = matrices, others
        self.lr_matrix, self.lr_other = lr_matrix, lr_other
        self.momentum = {k: torch.zeros_like(p) for k, p in matrices.items()}
        # Matrices of one shape go together, 32 at most: a card gets few large jobs.
        shapes: dict[tuple, list[str]] = {}
        for name, p in matrices.items():
            shapes.setdefault(tuple(p.shape), []).append(name)
        self.alike = [same[i:i + 32] for same in shapes.values() for i in range(0, len(same), 32)]
        self.adam = torch.optim.AdamW(others.values(), lr=lr_other, betas=betas,
                                      weight_decay=weight_decay)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.matrices.values(), *self.others.values()]

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """One update; factor: of both learning rates, usually what `schedule` says."""
        for names in self.alike:
            ahead = []
            for name in names:
                m, grad = self.momentum[name], self.matrices[name].grad
                m.lerp_(grad, 0.05)
                # Nesterov: look one step ahead
                ahead.append(full_tensor(torch.lerp(grad, m, 0.95)).flatten(1))
            updates = orthogonalize(torch.stack(ahead), dtype=self.dtype)       # (n, out, rest)
            # 0.2 sqrt(longer side) gives each number about the size of AdamW's updates, so that
            # one rate serves matrices of all shapes
            lr = self.lr_matrix * factor * 0.2 * max(updates.shape[1:]) ** 0.5
            for name, update in zip(names, updates, strict=True):
                p = self.matrices[name]
                p.add_(like(update.view(p.shape), p), alpha=-lr)
        for group in self.adam.param_groups:
            group["lr"] = self.lr_other * factor
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """Everything the optimiser remembers, flat, for `save_state`."""
        out = {f"muon.{k}": v for k, v in self.momentum.items()}
        for name, p in self.others.items():
            out |= {f"adam.{name}.{k}": v for k, v in self.adam.state.get(p, {}).items()}
        return out

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        for k, v in self.momentum.items():
            put(v, tensors[f"muon.{k}"])
        for name, p in self.others.items():
            if f"adam.{name}.step" in tensors:
                averages = {k: like(tensors[f"adam.{name}.{k}"], p).clone()
                            for k in ("exp_avg", "exp_avg_sq")}
                self.adam.state[p] = {"step": tensors[f"adam.{name}.step"].clone(), **averages}


def split_parameters(named: dict[str, nn.Parameter], keep_out: tuple[str, ...]
                     ) -> tuple[dict, dict]:
    """(matrices, others): two or more axes and no word of `keep_out` in the name -> Muon."""
    matrices = {k: p for k, p in named.items()
                if p.ndim >= 2 and not any(word in k for word in keep_out)}
    return matrices, {k: p for k, p in named.items() if k not in matrices}


def schedule(step: int, steps: int, warmup: int = 100, decay: float = 0.5, final: float = 0.0
             ) -> float:
    """Learning-rate factor: linear warm-up, flat, linear to `final` over the last `decay` share."""
    left = max(0.0, (steps - step) / max(1.0, decay * steps))  # 1 where decay begins, 0 at the end
    return min(1.0, (step + 1) / max(1, warmup), final + (1 - final) * left)


class EMA:
    """Exponential moving average of weights, which is what is shipped: steadier than the last.

    device: where it is kept, None: where the weights are, as shards are in any case.
    """

    def __init__(self, named: dict[str, Tensor], decay: float = 0.998, device: str | None = None):
        self.decay = decay
        self.shadow = {k: v.detach().to(v.device if is_shard(v) else device, copy=True)
                       for k, v in named.items()}

    @torch.no_grad()
    def update(self, named: dict[str, Tensor], step: int) -> None:
        # a young average forgets its random start faster
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for k, v in named.items():
            self.shadow[k].lerp_(v.detach().to(self.shadow[k].device), weight)
