"""What every command does: its flags, its refusals in one line, and how it ends.

The idea. Somebody who types a wrong number, a folder that cannot be written, or Ctrl-C wants one
line that says what to do, and no half-written file. So argparse complains in one line, checks
raise ValueError("expected ..., got ...; what to do"), and `command` turns that, a full disk or a
signal into a line and an exit status: 2 for what a user can mend, 130 after Ctrl-C, 143 after
SIGTERM. A mistake of ours keeps its traceback. `| head` has read enough when it leaves: no line.

ST-DRC (arXiv 2606.02441) says nothing of this; our reading: all of it.

    def main(words: list[str] | None = None) -> int:
        return command("mine.py", lambda: work(parse_arguments(words)))

Read next: common/seeds.py
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError

from common.files import one_line

MOST_TOLD = 500  # characters of an error line: fits a screen
BROKEN_PIPE = 141  # 128 + SIGPIPE, a signal that Windows has not
DEVICES = ("auto", "cpu", "cuda", "mps")


def warn(text: str) -> None:
    """What works, but perhaps not as hoped: a line that nobody can take for an error."""
    print(f"warning: {text}", flush=True)


def _let_go_of_output() -> None:
    """Python flushes once more when it ends, and would complain about a pipe that nobody reads."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults in --help, but no "None" where the help itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """One line per mistake; argparse alone prints the whole usage first."""

    def error(self, message: str) -> NoReturn:
        told = one_line(message, MOST_TOLD)
        self.exit(2, f"{self.prog}: error: {told}; see {self.prog} --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        _let_go_of_output()  # of --help
        super().exit(status, message)


def check_ranges(args: argparse.Namespace, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise ValueError for a number outside its range, both ends included. None passes; NaN fails
    every comparison."""
    for name, (low, high) in ranges.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not low <= value <= high:
                raise ValueError(f"expected --{name.replace('_', '-')} between {low} and "
                                 f"{high:g}, got {value}; see --help")


def find_device(asked: str = "auto") -> str:
    """What PyTorch calls the device: "auto" is a CUDA card where there is one, else the CPU; "mps",
    Apple's GPU, comes only when asked for. Raises ValueError for one that this machine lacks."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    if asked == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[asked]:
        raise ValueError(f"expected a device for {asked} on this machine, got none; use --device "
                         "cpu")
    return asked


def check_folder(folder: Path) -> None:
    """Raise ValueError unless files can be written there, or the folder can be made: now, and not
    after the first hour."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=there):  # permission bits alone miss read-only disks
            pass
    except OSError as error:
        raise ValueError(f"expected a folder to write in, got {folder} ({error.strerror}); "
                         "choose another") from None


def check_file(path: Path, ending: str) -> None:
    """Raise ValueError unless a file of this ending can be written there, in the same way."""
    if path.suffix.lower() != ending or path.is_dir():
        raise ValueError(f"expected a file name that ends in {ending}, got {path}; choose another")
    check_folder(path.parent)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory, a card's or the computer's, did not suffice; PyTorch has no type for both."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError)
                                              and "memory" in str(error))


@contextmanager
def signals(react: Callable[[int, object], None]) -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM call react(number, frame), wherever the program was started from.

    Python allows that in the main thread only; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, react) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    sys.unraisablehook = lambda _: None  # a progress bar that is thrown away half made complains
    raise KeyboardInterrupt(number)


def command(name: str, work: Callable[[], object], stopped: str = "the same command goes on",
            smaller: str = "take fewer or smaller clips at a time") -> int:
    """Run a script's work; its exit status. What a user can mend is one line and 2; stopped by
    Ctrl-C 130, SIGTERM 143, and nobody left who reads what is printed 141, without a word.

    stopped: what is said then; smaller: what to do when memory does not suffice.
    During the steps of a run both signals are only noted, see `Run.signals`.
    """
    hook = sys.unraisablehook
    try:
        with signals(_stop):
            work()
            print(end="", flush=True)  # a disk that is full is noticed here, not after the end
        return 0
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt as signalled:
        status = 128 + (signalled.args[0] if signalled.args else signal.SIGINT)
        told = f"stopped; {stopped}"
    except (ValueError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
        status, told = 2, one_line(error, MOST_TOLD)
        if out_of_memory(error):
            told = f"expected enough memory for this size, got too little; {smaller}"
        elif isinstance(error, RuntimeError):
            raise  # a mistake of ours, which needs its traceback
        told = "error: " + told + ("" if "; " in told else "; check that file and the free space")
    finally:
        _let_go_of_output()
    gc.collect()  # frees what the error kept alive: progress bars are closed, their lines ended
    print(f"{name}: {told}", file=sys.stderr)
    sys.unraisablehook = hook
    return status
