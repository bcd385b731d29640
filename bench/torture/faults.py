"""Signals at random moments, full disks, readers at the wrong moment: what was saved stays whole.

The idea. Four commands work for long and write at the end or in between: sampling, caching,
training, evaluating. Each is run once undisturbed. Then it is stopped at a random moment (SIGINT,
SIGTERM) or killed (SIGKILL), and three things must hold: every file under a final name is whole; a
stopped command said so in one line and ended with 128 + signal; and the same command, run again,
ends at the result of the undisturbed run. A full disk must end in status 2 and one line, and with
room again the same command goes on. Readers poll a file while it is written again and again, and
look just before and just after each rename: they see one whole version or another.

Conventions. A moment is a share of the processor time that the undisturbed run took, so that a busy
machine changes nothing. The commands run in forks of this process, on a random checkpoint of a few
thousand weights; evaluating uses the bundled one. A full disk is a tmpfs of a few megabytes where
this process may mount one, otherwise a bound on the size of files (RLIMIT_FSIZE).

    python -m bench.torture --only SIG

Read next: tests/test_faults.py
"""

import atexit
import contextlib
import functools
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bench.torture.harness import WEIGHTS, Row, fork_process, show
from clips import video
from common import files
from ltx import checkpoint
from tests.clipfiles import draw_moving, manifest, write
from tests.tiny import write_tiny
from training import run

MOMENTS, FEW = 10, 1  # how often a signal hits each command: in the whole table, with --quick
UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, AssertionError)
Result = dict[str, str]  # hash of each file under a final name


# ------------------------------------------------------------ the four commands


@functools.cache
def bench() -> Path:
    """tiny/ (checkpoint, text folder, a face) and clips/ (four, with a manifest); made once."""
    folder = Path(tempfile.mkdtemp(prefix="torture-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_tiny(folder / "tiny")
    (folder / "clips").mkdir()
    rows = []
    for i in range(4):
        write(folder / "clips" / f"{i}.mp4", codec="mpeg4", size=(48, 48), draw=draw_moving,
              first=i)
        rows.append({"video": f"{i}.mp4", "caption": f"a person in a red shirt, take {i}",
                     "identity": f"{i % 2}"})
    manifest(folder / "clips", *rows)
    return folder


def weights() -> list[str]:
    tiny = bench() / "tiny"
    return ["--checkpoint-path", str(tiny / "model.safetensors"),
            "--gemma-root", str(tiny / "gemma")]


def read_clips() -> list[str]:
    return ["--buckets", "32x32x5,32x32x1", "--frame-rate", "8"]


def sampling(seed: int = 0) -> list[str]:
    return ["sample.py", "--ref", str(bench() / "tiny" / "face.png"),
            "--prompt", "a person in a red shirt laughs", *weights(), "--num-inference-steps", "8",
            "--seed", str(seed), "--output-path", "out/out.mp4"]


def caching(folder: Path = Path("out")) -> list[str]:
    return ["clips.cache", str(bench() / "clips" / "manifest.jsonl"), *read_clips(), *weights(),
            "--folder", str(folder)]


def training(steps: int = 6) -> list[str]:
    return ["train.py", "--manifest", str(bench() / "clips" / "manifest.jsonl"), *read_clips(),
            *weights(), "--face", str(WEIGHTS / "face.safetensors"),
            "--cache", str(bench() / "cache"), "--batch", "2", "--final-lr", "1",
            "--save-seconds", "0", "--steps", str(steps), "--out", "out"]


def evaluating() -> list[str]:
    return ["study.evaluate", "--people", "4", "--num-inference-steps", "1",
            "--rows", "own reference", "no reference", "--folder", "out/rows",
            "--output-path", "out/e.json"]


def tensors(path: Path) -> str:
    """SHA-256 of all numbers in a safetensors file, whatever their order; raises for half a one."""
    found = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            numbers = file.get_tensor(name).reshape(-1).view(torch.uint8)  # NumPy has no bfloat16
            found.update(name.encode() + numbers.numpy().tobytes())
    return found.hexdigest()


def bytes_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def of_sampling(folder: Path) -> Result:
    """Everything but the seconds in the record."""
    record, said = folder / "out" / "out.json", None
    if record.exists():
        said = {k: v for k, v in json.loads(record.read_text()).items() if k != "seconds"}
    media = sorted((folder / "out").glob("out.[mp]*"))
    return {path.name: bytes_of(path) for path in media} | {"out.json": str(said)}


def of_caching(folder: Path) -> Result:
    return {path.name: tensors(path) for path in sorted((folder / "out").glob("*.safetensors"))}


def of_training(folder: Path) -> Result:
    """The newest state and the LoRA; every state must be readable and its numbers finite."""
    states = sorted((folder / "out").glob("state-*.safetensors"))
    for state in states:
        numbers = run.load_state(state)[0].values()
        assert all(tensor.isfinite().all() for tensor in numbers), state.name
    results = [*states[-1:], *(folder / "out").glob("lora.safetensors")]
    return {path.name: tensors(path) for path in results}


def of_evaluating(folder: Path) -> Result:
    kept = sorted((folder / "out" / "rows").glob("*/*.safetensors"))
    found, record = {path.name: tensors(path) for path in kept}, folder / "out" / "e.json"
    if record.exists():
        rows = json.loads(record.read_text())["rows"]
        found["e.json"] = str({name: {k: v for k, v in row.items() if k != "seconds"}
                               for name, row in rows.items()})
    return found


@dataclass(frozen=True)
class Work:
    """words: of the command. result(folder): raises when a file under a final name is not whole.

    steady: the files of an interrupted run are already those of the undisturbed one.
    """

    words: Callable[[], list[str]]
    result: Callable[[Path], Result]
    steady: bool = True


WORKS = {"sampling": Work(sampling, of_sampling), "caching": Work(caching, of_caching),
         "training": Work(training, of_training, steady=False),
         "evaluating": Work(evaluating, of_evaluating)}


def told_command(name: str) -> str:
    """As the table shows it."""
    return show(WORKS[name].words()).replace(str(bench()) + "/", "")


# ------------------------------------------------------------ a command in a fork


@dataclass
class Child:
    """A command that is running; log: what it says on stderr."""

    pid: int
    log: Path

    def seconds(self) -> float:
        """Of processor time so far."""
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9
        except (OSError, ValueError):  # no Linux: nothing better than the clock
            return time.time() - self.log.stat().st_ctime

    def ended(self) -> bool:
        """Whether it has; it is still there to be waited for."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self) -> tuple[int, str, float]:
        """Status (128 + signal), stderr without progress bars, seconds of processor time."""
        _, code, used = os.wait4(self.pid, 0)
        code = os.waitstatus_to_exitcode(code)
        lines = [line.rpartition("\r")[2]
                 for line in self.log.read_text(errors="replace").split("\n")]
        told = "\n".join(line for line in lines if line.strip() and "%|" not in line)
        return 128 - code if code < 0 else code, told, used.ru_utime + used.ru_stime


def start(words: list[str], folder: Path, prepare: Callable[[], object] = lambda: None) -> Child:
    """Fork; in the child: the folder as the current one, prepare(), then the command's main."""
    if words[0] == "train.py":  # every optimiser imports it, for seconds; the forks need not
        importlib.import_module("torch._dynamo")
    module = importlib.import_module(words[0].removesuffix(".py"))
    (folder / "out").mkdir(parents=True, exist_ok=True)
    log = folder / "stderr"
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := fork_process():
        return Child(pid, log)
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        torch.set_num_threads(1)
        prepare()
        sys.argv = words
        status = module.main() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@functools.cache
def straight(name: str) -> tuple[Result, float]:
    """Result of the undisturbed command, and its seconds of processor time."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=bench()))
    if name == "training":
        start(caching(bench() / "cache"), folder).wait()
    status, said, seconds = start(WORKS[name].words(), folder).wait()
    if status:
        raise RuntimeError(f"{name} does not even work undisturbed: {said}")
    return WORKS[name].result(folder), seconds


@functools.cache
def older() -> Path:
    """Outputs of another seed, which lie where sampling wants to write."""
    folder = Path(tempfile.mkdtemp(prefix="older-", dir=bench()))
    status, said, _ = start(sampling(seed=1), folder).wait()
    assert status == 0, said
    return folder


def names(folder: Path) -> list[str]:
    """Of all files in out/."""
    out = folder / "out"
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def hidden(name: str) -> bool:
    """Whether it is the name of a file that is being written, which nothing reads."""
    return Path(name).name.startswith(".") or name.endswith(".partial")


def half_files(name: str, folder: Path) -> tuple[Result, list[str]]:
    """The results there, and what is wrong when one of them cannot be read."""
    try:
        return WORKS[name].result(folder), []
    except UNREADABLE as error:
        return {}, [f"a file that is not whole: {error!r}"]


# ------------------------------------------------------------ signals


def after_signal(name: str, folder: Path, number: int, status: int, said: str) -> list[str]:
    """What is wrong after a command was hit by a signal."""
    wanted, wrong = straight(name)[0], []
    if status != 128 + number:
        wrong.append(f"status {status}: {said[-300:]}")
    if number != signal.SIGKILL:
        if said.count("\n") > 0 or "stopped" not in said:
            wrong.append(f"not one line that it was stopped: {said[-300:]!r}")
        if left := list(filter(hidden, names(folder))):
            wrong.append(f"left behind: {left}")
    found, half = half_files(name, folder)
    if WORKS[name].steady:
        whole = [wanted, of_sampling(older())] if name == "sampling" else [wanted]
        wrong += [f"{file} is of no run" for file, digest in found.items()
                  if digest not in [w.get(file) for w in whole]]
    return wrong + half


def hit(name: str, number: int, folder: Path, draw: random.Random
        ) -> tuple[int, str, list[str], list[str]]:
    """The command, a signal at a random moment, and the command again.

    Returns status, stderr, files left, what is wrong.
    """
    work, (wanted, seconds) = WORKS[name], straight(name)
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if name == "sampling":
            shutil.copytree(older(), folder)
        child, moment = start(work.words(), folder), (0.05 + 0.9 * draw.random()) * seconds
        while not child.ended() and child.seconds() < moment:
            time.sleep(0.002)
        in_time = not child.ended()
        os.kill(child.pid, number)
        status, said, _ = child.wait()
        if in_time and status:
            break  # otherwise it was faster this time, and there was nothing to disturb
    else:
        raise RuntimeError(f"{name} was never hit in time")
    left, wrong = names(folder), after_signal(name, folder, number, status, said)
    again, told, _ = start(work.words(), folder).wait()
    if again:
        wrong.append(f"the next run ends with {again}: {told[-300:]}")
    elif (found := work.result(folder)) != wanted:
        other = [file for file in wanted if found.get(file) != wanted[file]]
        wrong.append(f"the next run ends elsewhere: {other}")
    return status, said, left, wrong


def title(name: str, number: int, moments: int) -> str:
    plural = "s" if moments > 1 else ""
    return f"{signal.Signals(number).name}: {name}, {moments} random moment{plural}"


def stop(name: str, number: int, moments: int, folder: Path) -> Row:
    """A command hit by one signal at several random moments."""
    draw = random.Random(f"{name} {number} {moments}")
    problems, left, line, status = [], set(), "", 0
    for _ in range(moments):
        status, said, files_left, wrong = hit(name, number, folder / "work", draw)
        left, line, problems = left | set(files_left), said or line, problems + wrong
    finals = {Path(file).name for file in left if not hidden(file)}
    told = f"{len(finals)} whole" + " and files being written" * any(map(hidden, left))
    return Row(title(name, number, moments), told_command(name), line, status, told, not problems,
               count=moments, why="; ".join(problems))


# ------------------------------------------------------------ full disks


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[str]:
    """A disk of 16 MB at `folder`, "tmpfs", where that may be mounted; otherwise ""."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield "tmpfs" if mounted else ""
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def full(name: str, room: int, folder: Path) -> Row:
    """A command on a disk that has room for `room` more bytes, and again when there is room."""
    words, wanted, out = WORKS[name].words(), straight(name)[0], folder / "out"
    with disk(out) as kind:
        if name == "sampling":
            shutil.copytree(older() / "out", out, dirs_exist_ok=True)
        if name == "training":
            assert start(training(2), folder).wait()[0] == 0
        before = {path: (path.stat().st_size, bytes_of(path)) for path in out.rglob("*.*")
                  if path.name != "log.jsonl"}  # which grows

        def bound() -> None:
            if not kind:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        if kind:  # take all space but `room` bytes
            (out / ".filler").write_bytes(b"x" * max(0, shutil.disk_usage(out).free - room))
        status, said, _ = start(words, folder, bound).wait()
        (out / ".filler").unlink(missing_ok=True)
        left, problems = names(folder), half_files(name, folder)[1]
        errors = [line for line in said.split("\n") if "error:" in line]
        if status != 2 or len(errors) != 1 or "Traceback" in said or "; " not in said:
            problems.append(f"status {status}, said {said[-400:]!r}")
        if behind := list(filter(hidden, left)):
            problems.append(f"left behind: {behind}")
        lost = [path for path, (_, digest) in before.items()
                if not path.exists() or bytes_of(path) != digest]
        problems += [f"{path.name} was changed" for path in lost]
        again, told, _ = start(words, folder).wait()
        if again or WORKS[name].result(folder) != wanted:
            problems.append(f"with room again: status {again}, {told[-300:]}")
    told = f"{len(left)} whole, on {kind or 'a bounded file size'}"
    return Row(f"disk full: {name}", told_command(name), (errors or [said])[-1], status, told,
               not problems, lost=sum(before[path][0] for path in lost), why="; ".join(problems))


# ------------------------------------------------------------ readers


def write_video(path: Path, version: int) -> None:
    frames = torch.full((3, 2, 16, 16), version / 40 - 1)
    video.write_outputs(path, [frames], 2, torch.zeros(3, 16, 16), 8.0,
                        {"seconds": {}, "version": version})


def write_text(path: Path, version: int) -> None:
    files.atomic_write(path, lambda p: p.write_text(f"{version:6d}" * 9999))


def numbers(version: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((20_000,), float(version))}


# the function that writes -> name of a file, how version n of it is written
WRITERS: dict[str, tuple[str, Callable[[Path, int], object]]] = {
    "run.save_state": ("state.safetensors",
                       lambda path, n: run.save_state(path, numbers(n), {"step": n})),
    "files.atomic_write": ("text.txt", write_text),
    "files.write_json": ("record.json",
                         lambda path, n: files.write_json(path, {"n": [n] * 20_000})),
    "checkpoint.write_file": ("lora.safetensors",
                              lambda path, n: checkpoint.write_file(path, numbers(n),
                                                                    {"n": str(n)})),
    "video.write_outputs": ("out.mp4", write_video),
}


def read_while_writing(path: Path, write: Callable[[Path, int], object], versions: int
                       ) -> tuple[set[str], set[str], int]:
    """(contents that were whole, contents that readers saw, how many looks they took)."""
    whole, seen, looks, done, replace = set(), set(), 0, threading.Event(), os.replace

    def look() -> None:
        nonlocal looks
        with contextlib.suppress(FileNotFoundError):
            seen.add(bytes_of(path))
        looks += 1

    def poll() -> None:
        while not done.is_set():
            look()

    def replace_watched(source: os.PathLike, target: os.PathLike) -> None:
        look()  # written under its hidden name, not yet renamed
        replace(source, target)
        look()

    write(path, 0)
    whole.add(bytes_of(path))
    reader = threading.Thread(target=poll)
    os.replace = replace_watched
    reader.start()
    try:
        for n in range(1, versions):
            write(path, n)
            whole.add(bytes_of(path))
    finally:
        os.replace = replace
        done.set()
        reader.join()
    return whole, seen, looks


def readers(name: str, versions: int, folder: Path) -> Row:
    """One way of writing files, watched."""
    file, write = WRITERS[name]
    whole, seen, looks = read_while_writing(folder / file, write, versions)
    half, left = len(seen - whole), sorted(path.name for path in folder.iterdir())
    wrong = [f"{half} half files were seen"] * (half > 0)
    wrong += ["readers saw one version only"] * (len(seen) < 2)
    wrong += [f"left behind: {left}"] * any(map(hidden, left))
    told = f"{looks} looks, {len(seen)} versions seen, {half} halves"
    return Row(f"reader: {name}", f"{versions} versions of {file}", told, 0, ", ".join(left),
               not wrong, count=versions - 1, why="; ".join(wrong))


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# bytes of room: less than what is to come
ROOM = {"sampling": 2000, "caching": 5000, "training": 20_000, "evaluating": 200_000}
FAULTS: list[tuple[str, Callable[[Path], Row], bool]] = [  # name, fault, part of --quick
    *((title(name, number, count), functools.partial(stop, name, number, count), count == FEW)
      for count in (FEW, MOMENTS) for name in WORKS for number in SIGNALS
      if count == MOMENTS or (name != "evaluating" and number != signal.SIGINT)),
    *((f"disk full: {name}", functools.partial(full, name, room), name in ("sampling", "training"))
      for name, room in ROOM.items()),
    *((f"reader: {name}", functools.partial(readers, name, 40), True) for name in WRITERS),
]
