"""What both training scripts need around the optimiser: Muon, the weight average, and a state that survives a kill.

The idea of Muon. AdamW scales every number of a gradient by itself. For a hidden *matrix* that wastes steps: a few large
singular directions take the whole update. Muon replaces the (momentum-averaged) gradient by the nearest orthogonal
matrix, so that every direction moves equally far. It only makes sense for matrices between hidden layers; embeddings,
biases, first and last layers stay with AdamW. (Keller Jordan, "Muon: an optimizer for hidden layers", 2024.)

our reading: the paper's optimiser is unknown. A LoRA trains with AdamW as in LTX-2.3's own trainer, but with beta2 0.99,
a warm-up, and a decay to zero over the second half; Muon is for `--full` and for the tiny base.

State files are safetensors, never pickle: loading one cannot execute anything.

Read next: pretrain.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm


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

    The two learning rates stay apart; `scale` in `step` multiplies both, which is how a schedule is applied.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], others: dict[str, nn.Parameter], lr_matrix: float = 3e-3,
                 lr_other: float = 1e-3, weight_decay: float = 0.0):
        self.matrices, self.others = matrices, others
        self.lr_matrix, self.lr_other, self.weight_decay = lr_matrix, lr_other, weight_decay
        self.momentum = {k: torch.zeros_like(p) for k, p in matrices.items()}
        self.adam = torch.optim.AdamW(others.values(), lr=lr_other, betas=(0.9, 0.99), weight_decay=0.0)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.matrices.values(), *self.others.values()]

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        for name, p in self.matrices.items():
            m = self.momentum[name]
            m.lerp_(p.grad, 0.05)
            update = orthogonalize(torch.lerp(p.grad, m, 0.95).flatten(1))  # Nesterov: look one step ahead
            # 0.2 sqrt(longer side) gives the update AdamW's usual size per number, so rates carry over between shapes
            lr = self.lr_matrix * scale * 0.2 * max(update.shape) ** 0.5
            p.mul_(1 - self.lr_matrix * scale * self.weight_decay)
            p.add_(update.view_as(p), alpha=-lr)
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
            v.copy_(tensors[f"muon.{k}"])
        for name, p in self.others.items():
            keys = {k: tensors[f"adam.{name}.{k}"] for k in ("step", "exp_avg", "exp_avg_sq")
                    if f"adam.{name}.{k}" in tensors}
            if keys:
                self.adam.state[p] = {k: v.clone() if k == "step" else v.to(p.device).clone() for k, v in keys.items()}


def split_parameters(named: dict[str, nn.Parameter], keep_out: tuple[str, ...]) -> tuple[dict, dict]:
    """(matrices, others): two or more axes and no `keep_out` word in the name -> Muon; everything else -> AdamW."""
    matrices = {k: p for k, p in named.items() if p.ndim >= 2 and not any(word in k for word in keep_out)}
    return matrices, {k: p for k, p in named.items() if k not in matrices}


def schedule(step: int, steps: int, warmup: int = 100, decay: float = 0.5) -> float:
    """Learning-rate factor: linear warm-up, flat, then linear to zero over the last `decay` share of the run."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / max(1.0, decay * steps)))


class Average:
    """Exponential moving average of weights, the ones that are shipped: steadier than the last step's."""

    def __init__(self, named: dict[str, Tensor], decay: float = 0.998):
        self.decay, self.shadow = decay, {k: v.detach().clone() for k, v in named.items()}

    @torch.no_grad()
    def update(self, named: dict[str, Tensor], step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))  # young averages forget their random start faster
        for k, v in named.items():
            self.shadow[k].lerp_(v.detach(), weight)


def write_beside(path: str | Path, write) -> None:
    """Call `write(temporary path)`, then rename onto `path`: a reader sees the old file or the new one, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_state(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Training state -> one safetensors file; `info` (JSON-able) goes into its metadata."""
    tensors = {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}
    write_beside(path, lambda p: save_file(tensors, p, metadata={"info": json.dumps(info)}))


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Inverse of `save_state`."""
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["info"])


def start_workers() -> tuple[int, int]:
    """(rank, world size). Under torchrun joins the process group (gloo on CPU, nccl on CUDA), alone does nothing."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return int(os.environ.get("RANK", "0")), world


def average_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Mean of the gradients over all workers, in one message. Missing gradients count as zero."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, g in zip(parameters, (flat / world).split([p.numel() for p in parameters]), strict=True):
            p.grad.copy_(g.view_as(p))


def seeded(*numbers: int, device: str = "cpu") -> torch.Generator:
    """A generator that depends on all `numbers` (seed, step, rank ...): resuming at a step needs no saved state."""
    return torch.Generator(device=device).manual_seed(random.Random(repr(numbers)).getrandbits(63))


class Run:
    """One resumable training run in a folder: `state-<step>.safetensors`, `log.jsonl`, contact sheets.

    `for step in run.steps(...)` yields the step numbers that are still to do, saves every `save_seconds`, at the end, when
    `minutes` are over, and on Ctrl-C or SIGTERM; the same command goes on where it stopped. Everything random in a step
    must come from `seeded(seed, step, rank)`, so that a run that was killed and one that was not compute the same weights.
    The newest `keep` states stay, so that one damaged file does not end a run.

    settings: what must not change on the way (JSON-able); resuming with others raises ValueError naming the first.
    """

    def __init__(self, folder: str | Path, model: dict[str, nn.Parameter], optimizer: MuonAdamW, average: Average,
                 settings: dict | None = None, keep: int = 2):
        self.folder, self.model, self.optimizer, self.average = Path(folder), model, optimizer, average
        self.settings, self.keep = settings or {}, keep
        self.rank, self.world = start_workers()
        self.done, self.seconds, self.losses, self.signal = 0, 0.0, {}, 0
        self.resume()

    def states(self) -> list[Path]:
        """State files, the newest first; last the one of a run from before they had numbers."""
        return sorted(self.folder.glob("state*.safetensors"), key=lambda path: path.stem, reverse=True)

    def resume(self) -> None:
        """Take up the newest state that can be read; nothing happens in an empty folder."""
        for path in self.states():
            try:
                tensors, info = load_state(path)
            except (SafetensorError, OSError, KeyError) as error:
                print(f"warning: {path} cannot be read ({error}); taking the one before", file=sys.stderr)
                continue
            break
        else:
            return
        for key, old in info.get("settings", {}).items():
            if key in self.settings and self.settings[key] != old:
                raise ValueError(f"expected {key} = {old!r}, with which the run in {self.folder} was begun, got "
                                 f"{self.settings[key]!r}; go on with the old value, or choose another folder")
        with torch.no_grad():
            for k, p in self.model.items():
                p.copy_(tensors[f"model.{k}"])
            for k, v in self.average.shadow.items():
                v.copy_(tensors[f"average.{k}"])
        self.optimizer.load(tensors)
        self.done, self.seconds = info["step"], info["seconds"]

    def save(self) -> None:
        if self.rank != 0:
            return
        tensors = {f"model.{k}": p for k, p in self.model.items()}
        tensors |= {f"average.{k}": v for k, v in self.average.shadow.items()} | self.optimizer.state()
        info = {"step": self.done, "seconds": self.seconds, "settings": self.settings}
        save_state(self.folder / f"state-{self.done:08d}.safetensors", tensors, info)
        for old in self.states()[self.keep:]:
            old.unlink()

    @contextmanager
    def averaged(self):
        """Inside, the model holds its averaged weights: for looking at it and for saving the result."""
        now = {k: p.detach().clone() for k, p in self.model.items()}
        with torch.no_grad():
            for k, v in self.average.shadow.items():
                self.model[k].copy_(v)
            yield
            for k, v in now.items():
                self.model[k].copy_(v)

    def log(self, **values: float) -> None:
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps({"step": self.done, "seconds": round(self.seconds, 1), **values}) + "\n")

    def stop_together(self, stop: bool) -> bool:
        """One worker's wish is everybody's: workers that stop at different steps would wait for each other for ever."""
        if self.world == 1:
            return stop
        flag = torch.tensor([float(stop)])
        if torch.cuda.is_available():
            flag = flag.cuda()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    @contextmanager
    def signals(self):
        """Inside, Ctrl-C and SIGTERM are only noted, and `steps` ends after the step that is being computed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        def note(number: int, frame: object) -> None:
            self.signal = number
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def steps(self, total: int, minutes: float, samples_per_step: int, name: str, save_seconds: float = 120):
        """Yield what is to do up to step `total`. After a signal: save, say how to go on, exit with 128 + its number."""
        start, last_save, first = time.time(), time.time(), self.done
        bar = tqdm(total=total, initial=first, desc=name, disable=self.rank != 0, dynamic_ncols=True, mininterval=2)
        before = self.seconds
        with self.signals():
            while self.done < total:
                yield self.done
                self.done += 1
                self.seconds = before + time.time() - start
                bar.update()
                if self.done % 10 == 0:
                    rate = (self.done - first) * samples_per_step * self.world / (time.time() - start)
                    shown = {k: f"{v:.4f}" for k, v in self.losses.items()}
                    bar.set_postfix(shown | {"samples/s": f"{rate:.1f}"}, refresh=False)
                if self.done % 50 == 0:
                    self.log(**self.losses)
                if time.time() - last_save > save_seconds:
                    self.save()
                    last_save = time.time()
                late = self.done % 10 == 0 and time.time() - start > minutes * 60
                if self.stop_together(bool(self.signal) or late):
                    break
            bar.close()
            self.save()
        if self.signal:
            if self.rank == 0:
                print(f"stopped after step {self.done} of {total}, everything is saved in {self.folder}; "
                      "the same command goes on", file=sys.stderr)
            sys.exit(128 + self.signal)
