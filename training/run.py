"""A training that can be stopped at any moment: its states, its signals, its log.

The idea. A long training will be interrupted: a time limit, a full disk, a pulled plug. Everything
random in step n is a function of (seed, n, place in the batch), so "where we are" is one number,
and a saved state is weights, weight average, optimiser and that number. A run that was killed and
went on, and one that was never touched, end at the same weights, bit for bit (one process, same
machine).

The failure this prevents: a state that was being written when the power went. States are written
under a temporary name and renamed, and the newest `keep` of them stay. A damaged one is passed
over with a warning, and one with NaN in it is never written.

our reading: all of it; ST-DRC (arXiv 2606.02441) says nothing. States are safetensors, never
pickle: loading one cannot execute anything. They hold whole tensors, so the number of processes
may change between two commands (training/workers.py).

Conventions. `done` = finished steps; `seconds` = time spent in steps over all commands.

    run = Run("runs/mine", named, optimizer, EMA(named), settings={"lr": 1e-3})
    for step in run.steps(total=3000, minutes=60, samples_per_step=16, name="mine"):
        descend(run, step, loss, schedule(step, 3000), "clips 1, 2")

Read next: training/plot.py
"""

from __future__ import annotations

import json
import math
import sys
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

from common.cli import signals
from common.files import atomic_write, parse_json, sweep
from training.optim import EMA, MuonAdamW
from training.workers import all_reduce, average_gradients, gather, put, start_workers

LOG_EVERY = 10  # steps; the log has their mean


def save_state(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Training state -> one safetensors file; `info` (JSON-able) goes into its metadata."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    atomic_write(path, lambda p: save_file(tensors, p, metadata={"info": json.dumps(info)}))


def states(folder: Path) -> list[Path]:
    """State files, newest first; last the one of a run from before they had numbers."""
    return sorted(folder.glob("state*.safetensors"), key=lambda path: path.stem, reverse=True)


def load_state(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Inverse of `save_state`."""
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, parse_json(f.metadata()["info"])


def memory_gb() -> float:
    """Largest memory so far, of the card under CUDA, of this process otherwise. GB, 10^9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def check_finite(step: int, terms: dict[str, float], clips: str) -> None:
    """Raise ValueError naming step, term and clips when a loss or gradient is no finite number."""
    for name, value in terms.items():
        if not math.isfinite(value):
            raise ValueError(f"expected finite numbers, got {value} for {name} at step {step}, "
                             f"{clips}; lower --lr and run again: the last saved state is from "
                             "before")


def begun_with(folder: Path) -> dict:
    """The settings with which the run in a folder was begun, {} in an empty one."""
    for path in states(folder):
        try:
            with safe_open(path, "pt") as f:
                return parse_json(f.metadata()["info"])["settings"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            continue  # a damaged one: `Run` warns
    return {}


class Run:
    """One resumable training in a folder: `state-<step>.safetensors`, `log.jsonl`, pictures.

    `for step in run.steps(...)` yields the steps that are still to do. It saves every
    `save_seconds`, at the end, when `minutes` are over, and on Ctrl-C or SIGTERM; the same command
    goes on where it stopped. Everything random in a step must come from `seeded(seed, step, ...)`.

    settings: what must not change on the way (JSON-able); other ones raise ValueError. Among them
    "content": which file -> [hash of what it holds, where it lies], of which the hash counts.
    """

    def __init__(self, folder: str | Path, model: dict[str, Tensor], optimizer: MuonAdamW,
                 average: EMA, settings: dict | None = None, keep: int = 2):
        self.folder, self.model, self.optimizer = Path(folder), model, optimizer
        self.ema, self.settings, self.keep = average, settings or {}, keep
        self.rank, self.world = start_workers()
        self.done, self.seconds, self.signal = 0, 0.0, 0
        self.values: dict[str, list[float]] = defaultdict(list)  # since the last line of the log
        self.began, self.line, self.reported = (time.time(), 0), "", 0
        if self.rank == 0:  # half a state, ours or safetensors' own, of a run killed while saving
            sweep(self.folder)
            for path in self.folder.glob(".tmp??????"):
                path.unlink(missing_ok=True)
        self.resume()

    # ------------------------------------------------------------ states

    def resume(self) -> None:
        """Take up the newest state that can be read; nothing happens in an empty folder."""
        for path in states(self.folder):
            try:
                tensors, info = load_state(path)
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
                print(f"warning: {path} cannot be read ({error}); taking the one before",
                      file=sys.stderr)
                continue
            break
        else:
            return
        self.compare(info.get("settings", {}))
        mine = {f"model.{k}": p for k, p in self.model.items()}
        mine |= {f"ema.{k}": p for k, p in self.ema.shadow.items()}
        for name, p in mine.items():  # all are checked before the first is changed
            if name not in tensors or tensors[name].shape != p.shape:
                raise ValueError(f"expected a state of this model in {path}, got one without "
                                 f"{name} {tuple(p.shape)}; choose another folder")
        for name, p in mine.items():
            put(p, tensors[name])
        self.optimizer.load(tensors)
        self.done, self.seconds = info["step"], info["seconds"]
        self.forget_later_lines()

    def compare(self, before: dict) -> None:
        """Raise ValueError when a setting, or what a file holds, is not as it was."""
        for key, old in before.items():
            if key != "content" and key in self.settings and self.settings[key] != old:
                raise ValueError(f"expected {key} = {old!r}, with which the run in {self.folder} "
                                 f"was begun, got {self.settings[key]!r}; go on with the old "
                                 "value, or choose another folder")
        contents, now = before.get("content"), self.settings.get("content", {})
        if now and contents is None and self.rank == 0:
            print(f"warning: the run in {self.folder} was begun before files were told by content; "
                  "it goes on with those given now", file=sys.stderr)
        for what, (old, where) in (contents or {}).items():
            if what in now and now[what][0] != old:
                raise ValueError(f"expected the {what} with which the run in {self.folder} was "
                                 f"begun (then {where}), got other content in {now[what][1]}; give "
                                 "that again, or choose another --out")

    def save(self) -> None:
        """Write the state; every process takes part, because each holds only its shards.

        Raises OSError, and ValueError before a state that is no number replaces a good one.
        """
        tensors = {f"model.{k}": p for k, p in self.model.items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.shadow.items()} | self.optimizer.state()
        kept = {name: gather(tensor) for name, tensor in tensors.items()}
        if self.rank != 0:
            return
        path, before = self.folder / f"state-{self.done:08d}.safetensors", states(self.folder)
        last = f"{before[0]} is still good" if before else "nothing was saved before"
        for name, tensor in kept.items():
            if not tensor.isfinite().all():
                raise ValueError(f"expected finite weights, got NaN or infinity in {name} after "
                                 f"step {self.done}; lower --lr and run the same command again, "
                                 f"{last}")
        info = {"step": self.done, "seconds": self.seconds, "settings": self.settings}
        try:
            save_state(path, kept, info)
        except OSError as error:
            message = str(error).partition("; ")[0]
            raise OSError(f"cannot save step {self.done} in {self.folder}: {message}; make room "
                          f"and run the same command again, {last}") from None
        # Later states are damaged ones that were passed over; they must not push out good ones.
        for old in [state for state in states(self.folder) if state.stem <= path.stem][self.keep:]:
            old.unlink()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the model holds its averaged weights: to look at it, to save the result."""
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
        """One line of log.jsonl, numbers rounded to seven digits. step None: as many as done."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            line = {"step": self.done if step is None else step, "seconds": round(self.seconds, 1)}
            line |= {k: float(f"{v:.7g}") for k, v in values.items()}
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")

    def record(self, **values: float) -> None:
        """Numbers of the step being computed, for the screen and, as means, for the log. NaN: not
        computed in this step, and no part of the mean."""
        for name, value in values.items():
            if not math.isnan(value):
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
        self.line = ", ".join([*(f"{k}={v:.3g}" for k, v in means.items()),
                               f"{rate:.1f} samples/s", f"{memory_gb():.1f} GB"])

    def forget_later_lines(self) -> None:
        """A killed run has logged steps after its last state; they will be computed again."""
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
        """What one process wishes all do: one that stopped alone would leave the others waiting."""
        return (all_reduce(torch.tensor(wishes, dtype=torch.float32)) > 0).tolist()

    def _note(self, number: int, frame: object) -> None:
        self.signal = number

    def steps(self, total: int, minutes: float, samples_per_step: int, name: str,
              save_seconds: float = 120) -> Iterator[int]:
        """Yield the steps left up to `total`; after a signal save and exit with 128 + its number.

        samples_per_step: of this process. The bar's numbers are means since the last log line.
        """
        start = last_save = time.time()
        before = self.seconds
        self.began = start, self.done
        with signals(self._note):  # only noted: the step in progress is finished first
            bar = tqdm(total=total, initial=self.done, desc=name, disable=self.rank != 0,
                       dynamic_ncols=True, mininterval=2)
            while self.done < total:
                yield self.done
                self.done += 1
                self.seconds = before + time.time() - start
                bar.update()
                if self.done % LOG_EVERY == 0 or self.done == total:
                    self.report(self.done, samples_per_step)
                    bar.set_postfix_str(self.line, refresh=False)
                late = time.time() - start > minutes * 60
                overdue = time.time() - last_save > save_seconds
                stop, save = self.agree(bool(self.signal) or late, overdue)
                if stop:
                    break
                if save and self.done < total:
                    self.save()
                    last_save = time.time()
            bar.close()
            self.save()
        if self.signal:
            if self.rank == 0:
                print(f"stopped after step {self.done} of {total}, everything is saved in "
                      f"{self.folder}; the same command goes on", file=sys.stderr)
            sys.exit(128 + self.signal)


def descend(run: Run, step: int, loss: Tensor, factor: float, clips: str) -> None:
    """One step of the optimiser at `factor` of its rates, on gradients of norm 1 at most.

    Raises ValueError, before a weight moves, when the loss or its gradient is no finite number.
    """
    loss.backward()
    parameters = run.optimizer.parameters()
    average_gradients(parameters, run.world)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    check_finite(step, {"the loss": loss.item(), "the gradient": norm.item()}, clips)
    run.optimizer.step(factor)
    for p in parameters:
        p.grad = None
