"""One bad input: what is typed, what must come of it, and whether it did.

The idea. A command that fails well says in one line what is wrong and what to do, ends with status
2 and leaves no file behind. That is a claim about hundreds of inputs that nobody types twice, so
they are rows of a table (`Case`). Each runs in a process of its own, a fork of this one so that
torch is imported once, with bounded memory and time, in a folder made for it. It fails if there is
a traceback, another status, another message, a file in out/ that was not announced, a change to any
file that was there before, or anything new elsewhere in the folder.

Faults (kills, full disks, readers that come at the wrong moment) need more than one process; they
are functions that return a finished `Row`.

Conventions. Status 2 = refused, 0 = worked, 128 + signal = stopped. Bytes lost: of files that were
there before a command that failed or was killed, and are gone or changed after it.

Read next: bench/torture/inputs.py
"""

import contextlib
import gc
import hashlib
import importlib
import inspect
import io
import os
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# A forked child cannot use threads that its parent has started.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights" / "tiny"
HANG = 300  # seconds without using the processor; long, for machines that do other work
LONGEST_LINE = 600  # characters of an error line; longer ones repeat the input


@dataclass(frozen=True)
class Case:
    """One bad (or odd but good) input.

    command(folder): prepares files in an empty folder and returns for example ["sample.py",
    "--ref", "x.png"] or ["clips.manifest", "check", ...]; `out/` is there already, relative paths
    are relative to the folder. status: 2 refused, 0 works. says: regular expression found in the
    printed line (status 0: anywhere in what was printed). leaves: names in out/ afterwards. quick:
    part of --quick. seconds: of processor time; memory_gb: beyond what the process has when it
    starts; file_bytes: no file may grow beyond it (as on a full disk). check(folder): "" or what is
    wrong, when everything else is as expected.
    """

    name: str
    command: Callable[[Path], list[str]]
    status: int = 2
    says: str = ""
    leaves: tuple[str, ...] = ()
    quick: bool = False
    seconds: float = 10
    memory_gb: float = 4
    file_bytes: int | None = None
    check: Callable[[Path], str] | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. lost: bytes; count: faults injected; why: what is not as expected.

    The name of a fault begins with its kind and a colon: "SIGKILL: sampling", "reader: ...".
    """

    case: str
    command: str
    line: str
    status: int
    files: str
    good: bool
    lost: int = 0
    count: int = 1
    why: str = ""
    seconds: float = 0.0


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file below a folder -> bytes and SHA-256; for comparing before and after."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            files[name] = len(data), hashlib.sha256(data).hexdigest()
        else:
            files[name] = 0, os.readlink(path) if path.is_symlink() else "folder or device"
    return files


def show(command: list[str]) -> str:
    """A command as one short line; very long words are named by their length."""
    words = [word if len(word) <= 80 else f"{word[:12]}...({len(word)} characters)"
             for word in command]
    line = shlex.join(words).replace(str(ROOT) + "/", "")
    return line.encode("utf-8", "backslashreplace").decode()


def main_of(name: str) -> Callable[[list[str]], int | None]:
    """The main of "train.py" or "clips.manifest"."""
    main = importlib.import_module(name.removesuffix(".py")).main
    return main if inspect.signature(main).parameters else lambda _: main()


def warm_up() -> None:
    """Refuse a command once here: what PyTorch imports at first use is then there for all forks."""
    words = ["--ref", str(ROOT / "examples" / "ada.png"), "--prompt", "", "--height", "65",
             "--output-path", str(Path(tempfile.gettempdir()) / "torture.mp4")]
    with contextlib.redirect_stderr(io.StringIO()):
        main_of("sample.py")(words)


def child(case: Case, command: list[str], folder: Path, main: Callable) -> int:
    """Runs in the fork: bounds, current folder, the command; returns its exit status."""
    os.chdir(folder)
    if os.path.exists("/proc/self/statm"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = int(pages * resource.getpagesize() + case.memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (int(case.seconds), int(case.seconds) + 1))
    if case.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_bytes,) * 2)
    signal.alarm(HANG)
    sys.argv = list(command)
    try:
        return main(command[1:]) or 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1


def fork_process() -> int:
    """os.fork, after which the child collects none of its parent's garbage: an object of PyAV's
    waits, when it dies, for threads that were not copied into the child."""
    gc.collect()
    gc.freeze()
    pid = os.fork()
    if pid:
        gc.unfreeze()
    return pid


def fork(case: Case, command: list[str], folder: Path, logs: Path) -> tuple[int, str, str]:
    """Run a command in a child: status (128 + signal if one ended it), stdout, stderr."""
    main = main_of(command[0])
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := fork_process()) == 0:
        status = 1
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout = os.fdopen(1, "w", errors="strict", encoding="utf-8", buffering=1)
            sys.stderr = os.fdopen(2, "w", errors="backslashreplace", encoding="utf-8", buffering=1)
            status = child(case, command, folder, main)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [(logs / name).read_text(encoding="utf-8", errors="replace")
             for name in ("stdout", "stderr")]
    return 128 - code if code < 0 else code, *texts


def words_wrong(case: Case, status: int, line: str, stdout: str, stderr: str) -> list[str]:
    """What is not as announced in status and words."""
    wrong, errors = [], sum("error:" in said for said in stderr.splitlines())
    if status != case.status:
        wrong.append(f"status {status}, not {case.status}")
    if "Traceback (most recent call last)" in stderr:
        wrong.append("a traceback")
    if re.search(r"^\S*:\d+: \w*Warning", stderr, re.M):
        wrong.append("a library's warning")
    if errors != (case.status == 2):
        wrong.append(f"{errors} error lines")
    advice = "; " in line or re.search(  # argparse's own lines name the flag
        "error: (argument|the following arguments|unrecognized)", line)
    if case.status == 2 and not (len(line) <= LONGEST_LINE and line.isprintable() and advice):
        wrong.append("not one short line that says what to do after '; '")
    if not re.search(case.says, line if case.status == 2 else stdout + stderr):
        wrong.append(f"does not say {case.says!r}")
    return wrong


def files_wrong(case: Case, before: dict, after: dict) -> tuple[list[str], int]:
    """What is not as announced among the files, and how many bytes were lost."""
    wrong, left = [], sorted(name[4:] for name in after if name.startswith("out/"))
    if left != sorted(case.leaves):
        wrong.append(f"files in out/: {', '.join(left) or 'none'}, not "
                     f"{', '.join(case.leaves) or 'none'}")
    kept = {name: what for name, what in before.items()
            if case.status != 0 or not name.startswith("out/")}
    lost = sum(size for name, (size, digest) in kept.items()
               if after.get(name, (0, ""))[1] != digest)
    if changed := [name for name, what in kept.items() if after.get(name) != what]:
        wrong.append(f"changed or gone: {', '.join(changed)}")
    if new := [name for name in after.keys() - before.keys() if not name.startswith("out/")]:
        wrong.append(f"new outside out/: {', '.join(new)}")
    return wrong, lost


def told_line(case: Case, stdout: str, stderr: str) -> str:
    """What the command said about the case: its error, its warning, else its last line."""
    if errors := [line for line in stderr.splitlines() if "error:" in line]:
        return errors[-1]
    lines = [line for line in (stdout + stderr).splitlines() if line.startswith("warning:")]
    lines = lines or stdout.splitlines()
    lines = [line for line in lines if case.says and re.search(case.says, line)] or lines
    return lines[-1].strip() if lines else ""


def run_case(case: Case) -> Row:
    """Prepare, run, compare. The scratch folder is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        folder, logs = Path(place) / "case", Path(place) / "logs"
        (folder / "out").mkdir(parents=True)
        logs.mkdir()
        command = case.command(folder)
        before, start = snapshot(folder), time.perf_counter()
        status, stdout, stderr = fork(case, command, folder, logs)
        seconds, after = time.perf_counter() - start, snapshot(folder)
        line = told_line(case, stdout, stderr)
        wrong, lost = files_wrong(case, before, after)
        wrong = words_wrong(case, status, line, stdout, stderr) + wrong
        if not wrong and case.check and (problem := case.check(folder)):
            wrong.append(problem)
        files = ", ".join(sorted(name[4:] for name in after if name.startswith("out/"))) or "-"
        line, told = (text.replace(str(folder), ".") for text in (line, show(command)))
    line = line.replace(str(ROOT) + "/", "")
    return Row(case.name, told, line, status, files, not wrong, lost, why="; ".join(wrong),
               seconds=seconds)
