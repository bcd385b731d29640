"""The optimiser: Muon beside AdamW, the learning rate over a run, and the weight average that is shipped.

The idea of Muon. AdamW scales every number of a gradient by itself. For a hidden *matrix* that wastes steps: a few large
singular directions take the whole update. Muon replaces the (momentum-averaged) gradient by the nearest orthogonal
matrix, so that every direction moves equally far. It only makes sense for matrices between hidden layers; embeddings,
biases, first and last layers stay with AdamW. (Keller Jordan, "Muon: an optimizer for hidden layers", 2024.)

our reading: the optimiser of ST-DRC (arXiv 2606.02441) is unknown. train.py uses AdamW as LTX-2.3's own trainer does; Muon
made the tiny base and the bundled checkpoint.

Conventions. Parameters come as name -> tensor, because states are saved by name. Everything works on sharded parameters
too (workers.py). Learning-rate factors are in 0..1 and multiply the rates of both parts.

    named = dict(model.named_parameters())
    optimizer = MuonAdamW({}, named, lr_other=2e-4)                  # AdamW alone: no matrices for Muon
    loss.backward(); optimizer.step(schedule(step, steps=3000))

Read next: workers.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.workers import full_tensor, like, put

# Words in the names of LTX-2.3's matrices that are not between hidden layers.
KEEP_FROM_MUON = ("patchify_proj", "proj_out", "adaln", "embed_tokens", "scale_shift_table", "registers", "aggregate")


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration: matrix (m, n) -> about the nearest matrix whose singular values are all 1.

    The quintic's coefficients push every singular value into [0.7, 1.2] quickly rather than to 1 exactly; the update
    does not need more.
    """
    x = g.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).to(g.dtype)


class MuonAdamW:
    """Muon for `matrices` (name -> parameter, flattened to out x rest), AdamW for `others`.

    The two learning rates stay apart; `scale` in `step` multiplies both, which is how a schedule is applied. betas and
    weight_decay are AdamW's.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], others: dict[str, nn.Parameter], lr_matrix: float = 3e-3,
                 lr_other: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        self.matrices, self.others = matrices, others
        self.lr_matrix, self.lr_other = lr_matrix, lr_other
        self.momentum = {k: torch.zeros_like(p) for k, p in matrices.items()}
        self.adam = torch.optim.AdamW(others.values(), lr=lr_other, betas=betas, weight_decay=weight_decay)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.matrices.values(), *self.others.values()]

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        for name, p in self.matrices.items():
            m = self.momentum[name]
            m.lerp_(p.grad, 0.05)
            update = orthogonalize(full_tensor(torch.lerp(p.grad, m, 0.95)).flatten(1))  # Nesterov: look one step ahead
            # 0.2 sqrt(longer side) gives the update AdamW's usual size per number, so rates carry over between shapes
            lr = self.lr_matrix * scale * 0.2 * max(update.shape) ** 0.5
            p.add_(like(update.view(p.shape), p), alpha=-lr)
        for group in self.adam.param_groups:
            group["lr"] = self.lr_other * scale
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
            keys = {k: tensors[f"adam.{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")
                    if f"adam.{name}.{k}" in tensors}
            if keys:
                self.adam.state[p] = {k: v.clone() if k == "step" else like(v, p).clone() for k, v in keys.items()}


def split_parameters(named: dict[str, nn.Parameter], keep_out: tuple[str, ...]) -> tuple[dict, dict]:
    """(matrices, others): two or more axes and no `keep_out` word in the name -> Muon; everything else -> AdamW."""
    matrices = {k: p for k, p in named.items() if p.ndim >= 2 and not any(word in k for word in keep_out)}
    return matrices, {k: p for k, p in named.items() if k not in matrices}


def schedule(step: int, steps: int, warmup: int = 100, decay: float = 0.5, final: float = 0.0) -> float:
    """Learning-rate factor: linear warm-up, flat, then linear to `final` over the last `decay` share of the run."""
    left = max(0.0, (steps - step) / max(1.0, decay * steps))               # 1 where the decay begins, 0 at the end
    return min(1.0, (step + 1) / max(1, warmup), final + (1 - final) * left)


class EMA:
    """Exponential moving average of weights, the ones that are shipped: steadier than the last step's."""

    def __init__(self, named: dict[str, Tensor], decay: float = 0.998):
        self.decay, self.shadow = decay, {k: v.detach().clone() for k, v in named.items()}

    @torch.no_grad()
    def update(self, named: dict[str, Tensor], step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))  # young averages forget their random start faster
        for k, v in named.items():
            self.shadow[k].lerp_(v.detach(), weight)
