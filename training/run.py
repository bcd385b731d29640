"""A training that can be stopped at any moment: states, signals, the log, and the one line that shows how it goes.

The idea. A long training will be interrupted: a time limit, a full disk, a pulled plug. What it costs then is decided
before. Here everything random in step n is a function of (seed, n, place in the batch), so that "where we are" is one
number, and a saved state is weights, weight average, optimiser and that number. A run that was killed and went on, and
one that was never touched, end at the same weights, bit for bit (one process, same machine).

The failure this prevents: a state that was being written when the power went. States are written beside and renamed, and
the newest `keep` of them stay; a damaged one is passed over with a warning, and one with NaN in it is never written. What
all commands share also stands here: one line for a mistake, status 2, and an end after Ctrl-C that leaves nothing half done.

our reading: all of it; ST-DRC (arXiv 2606.02441) says nothing. State files are safetensors, never pickle: loading one cannot
execute anything. They hold whole tensors, so the number of processes may change between two commands (workers.py).

Conventions. `done` = steps that are finished; `seconds` = time spent in steps over all commands. Exit status 128 + signal
after Ctrl-C (130) or SIGTERM (143).

    run = Run("runs/mine", named, optimizer, EMA(named), settings={"lr": 1e-3})
    for step in run.steps(total=3000, minutes=60, samples_per_step=16, name="mine"):
        ...
        run.record(loss=loss.item())

Read next: plot.py
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from common.files import atomic_write, parse_json
from training.optim import EMA, MuonAdamW
from training.workers import all_reduce, full_tensor, put, start_workers

LOG_EVERY = 10  # steps; the log has their mean


def save_state(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Training state -> one safetensors file; `info` (JSON-able) goes into its metadata."""
    tensors = {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}
    atomic_write(path, lambda p: save_file(tensors, p, metadata={"info": json.dumps(info)}))


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Inverse of `save_state`."""
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, parse_json(f.metadata()["info"])


def memory_gb() -> float:
    """Largest memory so far: of the card under CUDA, of this process otherwise. GB, 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def check_finite(step: int, terms: dict[str, float], clips: str) -> None:
    """Raise ValueError naming step, term and clips when a loss or gradient is no number, before it reaches the weights."""
    for name, value in terms.items():
        if not math.isfinite(value):
            raise ValueError(f"expected finite numbers, got {value} for {name} at step {step}, {clips}; lower --lr and run "
                             "again: the last saved state is from before")


class Run:
    """One resumable training run in a folder: `state-<step>.safetensors`, `log.jsonl`, pictures.

    `for step in run.steps(...)` yields the step numbers that are still to do, saves every `save_seconds`, at the end, when
    `minutes` are over, and on Ctrl-C or SIGTERM; the same command goes on where it stopped. Everything random in a step
    must come from `seeded(seed, step, ...)`.

    settings: what must not change on the way (JSON-able); resuming with others raises ValueError naming the first.
    """

    def __init__(self, folder: str | Path, model: dict[str, nn.Parameter], optimizer: MuonAdamW, average: EMA,
                 settings: dict | None = None, keep: int = 2):
        self.folder, self.model, self.optimizer, self.ema = Path(folder), model, optimizer, average
        self.settings, self.keep = settings or {}, keep
        self.rank, self.world = start_workers()
        self.done, self.seconds, self.signal = 0, 0.0, 0
        self.values: dict[str, list[float]] = defaultdict(list)  # since the last line of the log
        self.began, self.line, self.reported = (time.time(), 0), "", 0
        if self.rank == 0:
            for pattern in (".tmp??????", ".*.tmp"):  # half a state, from safetensors or from us: a kill while saving
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)
        self.resume()

    # ------------------------------------------------------------ states

    def states(self) -> list[Path]:
        """State files, the newest first; last the one of a run from before they had numbers."""
        return sorted(self.folder.glob("state*.safetensors"), key=lambda path: path.stem, reverse=True)

    def resume(self) -> None:
        """Take up the newest state that can be read; nothing happens in an empty folder."""
        for path in self.states():
            try:
                tensors, info = load_state(path)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                print(f"warning: {path} cannot be read ({error}); taking the one before", file=sys.stderr)
                continue
            break
        else:
            return
        for key, old in info.get("settings", {}).items():
            if key in self.settings and self.settings[key] != old:
                raise ValueError(f"expected {key} = {old!r}, with which the run in {self.folder} was begun, got "
                                 f"{self.settings[key]!r}; go on with the old value, or choose another folder")
        mine = {f"{prefix}.{k}": p for prefix, named in (("model", self.model), ("ema", self.ema.shadow))
                for k, p in named.items()}
        for name, p in mine.items():
            if name not in tensors or tensors[name].shape != p.shape:
                raise ValueError(f"expected a state of this model in {path}, got one without {name} {tuple(p.shape)}; "
                                 "choose another folder")
        for name, p in mine.items():
            put(p, tensors[name])
        self.optimizer.load(tensors)
        self.done, self.seconds = info["step"], info["seconds"]
        self.forget_later_lines()

    def save(self) -> None:
        """Write the state; every process takes part, because each holds only its shards. Raises OSError, one line, and
        ValueError rather than put a state that is no number any more in the place of a good one."""
        tensors = {f"model.{k}": p for k, p in self.model.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.shadow.items()} | self.optimizer.state()
        kept = {}
        for name, tensor in tensors.items():
            tensor = full_tensor(tensor.detach())
            if self.rank == 0:
                kept[name] = tensor
        if self.rank != 0:
            return
        path, states = self.folder / f"state-{self.done:08d}.safetensors", self.states()
        last = f"{states[0]} is still good" if states else "nothing was saved before"
        for name, tensor in kept.items():
            if not tensor.isfinite().all():
                raise ValueError(f"expected finite weights, got NaN or infinity in {name} after step {self.done}; lower "
                                 f"--lr and run the same command again, {last}")
        try:
            save_state(path, kept, {"step": self.done, "seconds": self.seconds, "settings": self.settings})
        except OSError as error:
            message = str(error).partition("; ")[0]
            raise OSError(f"cannot save step {self.done} in {self.folder}: {message}; make room and run the same command "
                          f"again, {last}") from None
        # Files of later steps are damaged ones that were passed over; they must not push out those that can be read.
        for old in [state for state in self.states() if state.stem <= path.stem][self.keep:]:
            old.unlink()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the model holds its averaged weights: for looking at it and for saving the result."""
        now = {k: p.detach().clone() for k, p in self.model.items()}
        with torch.no_grad():
            for k, v in self.ema.shadow.items():
                self.model[k].copy_(v)
        try:
            yield
        finally:
            with torch.no_grad():
                for k, v in now.items():
                    self.model[k].copy_(v)

    # ------------------------------------------------------------ the log

    def log(self, step: int | None = None, **values: float) -> None:
        """One line of log.jsonl, numbers rounded to seven digits. step None: as many as are done."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            line = {"step": self.done if step is None else step, "seconds": round(self.seconds, 1)}
            line |= {k: float(f"{v:.7g}") for k, v in values.items()}
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def record(self, **values: float) -> None:
        """Numbers of the step being computed, for the line on the screen and, as means, for the log."""
        for name, value in values.items():
            self.values[name].append(value)

    def report(self, step: int, samples_per_step: int) -> None:
        """Means since the last line -> the log, and the line on the screen; once for a step."""
        if step == self.reported:
            return
        self.reported = step
        started, first = self.began
        rate = (step - first) * samples_per_step * self.world / (time.time() - started)
        means = {k: sum(v) / len(v) for k, v in self.values.items()}
        self.values.clear()
        self.log(step, **means, samples_per_second=rate, memory_gb=memory_gb())
        self.line = ", ".join(f"{k}={v:.3g}" for k, v in means.items()) + f", {rate:.1f} samples/s, {memory_gb():.1f} GB"

    def forget_later_lines(self) -> None:
        """A killed run has logged steps after its last state; they will be computed, and logged, again."""
        path = self.folder / "log.jsonl"
        if self.rank != 0 or not path.exists():
            return
        lines = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= self.done:
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # cut off by the kill
        atomic_write(path, lambda p: p.write_text("".join(lines)))

    # ------------------------------------------------------------ the loop

    def agree(self, *wishes: bool) -> list[bool]:
        """One process's wish is everybody's: processes that stop at different steps would wait for each other for ever."""
        return (all_reduce(torch.tensor(wishes, dtype=torch.float32)) > 0).tolist()

    @contextmanager
    def signals(self) -> Iterator[None]:
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

    def steps(self, total: int, minutes: float, samples_per_step: int, name: str, save_seconds: float = 120
              ) -> Iterator[int]:
        """Yield what is to do up to step `total`. After a signal: save, say how to go on, exit with 128 + its number.

        samples_per_step: of this process. The bar shows the time left; its numbers are means since the last log line.
        """
        start, last_save, before = time.time(), time.time(), self.seconds
        self.began = start, self.done
        with self.signals():
            bar = tqdm(total=total, initial=self.done, desc=name, disable=self.rank != 0, dynamic_ncols=True, mininterval=2)
            while self.done < total:
                yield self.done
                self.done += 1
                self.seconds = before + time.time() - start
                bar.update()
                if self.done % LOG_EVERY == 0 or self.done == total:
                    self.report(self.done, samples_per_step)
                    bar.set_postfix_str(self.line, refresh=False)
                late = self.done % 10 == 0 and time.time() - start > minutes * 60
                stop, save = self.agree(bool(self.signal) or late, time.time() - last_save > save_seconds)
                if stop:
                    break
                if save and self.done < total:
                    self.save()
                    last_save = time.time()
            bar.close()
            self.save()
        if self.signal:
            if self.rank == 0:
                print(f"stopped after step {self.done} of {total}, everything is saved in {self.folder}; "
                      "the same command goes on", file=sys.stderr)
            sys.exit(128 + self.signal)
