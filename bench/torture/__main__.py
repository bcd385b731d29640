"""Everything that users, disks and the plug do to the commands, and what each command said about it: one table.

    python -m bench.torture                 # all cases and faults, minutes
    python -m bench.torture --quick         # a representative part, under 50 s
    python -m bench.torture --only "PNG"    # those whose name contains it

The idea. A command that fails well says in one line what is wrong and what to do, ends with status 2 and leaves no file
behind. That is a claim about hundreds of inputs that nobody types twice, so they are collected as rows of a table (`Case`):
how to prepare a folder, which command to run in it, and what must come of it. Each case runs in a process of its own, a
fork of this one so that torch is imported once, with bounded memory and time and the folder as its current one. It fails
if there is a traceback, another status, another message, a file in out/ that was not announced, a change to any file that
was there before, or anything new elsewhere in the folder.

Faults (kills, full disks, readers that come at the wrong moment) need more than one process; they are functions that
return a finished `Row`.

Conventions. Cases: CASES of torture_inputs.py and torture_clips.py; faults: FAULTS of torture_faults.py. Status 2 = refused,
0 = worked, 128 + signal = stopped. Bytes lost: of files that were there before a command that failed or was killed, and
are gone or changed after it. Exit status 1 if any row is not as expected.

Read next: torture_inputs.py
"""

import argparse
import contextlib
import hashlib
import importlib
import inspect
import io
import json
import os
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked child cannot use threads that its parent has started

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights" / "tiny"
QUICK_SECONDS = 50
HANG = 300  # seconds that a command may take without using the processor; long, for machines that do other work
LONGEST_LINE = 600  # characters of an error line; longer ones repeat the input instead of naming it


@dataclass(frozen=True)
class Case:
    """One bad (or odd but good) input.

    command(folder): prepares files in an empty folder and returns for example ["sample.py", "--ref", "x.png"]; `out/`
    is there already, and relative paths are relative to the folder. status: 2 refused, 0 works. says: regular expression
    that must be found in the printed line (status 0: anywhere in what was printed). leaves: names in out/ afterwards.
    quick: part of --quick. seconds: of processor time; memory_gb: beyond what the process has when it starts; file_bytes:
    no file may grow beyond it (as on a full disk).
    check(folder): "" or what is wrong, when everything else is as expected.
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
    """One line of the table. lost: bytes; count: how many times the fault was injected; why: what is not as expected.

    The name of a fault begins with its kind and a colon: "SIGKILL: sampling", "disk full: training", "reader: ...".
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
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                files[str(path.relative_to(folder))] = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
        else:
            files[str(path.relative_to(folder))] = (0, os.readlink(path) if path.is_symlink() else "folder or device")
    return files


def show(command: list[str]) -> str:
    """A command as one short line; very long words are named by their length."""
    words = [word if len(word) <= 80 else f"{word[:12]}...({len(word)} characters)" for word in command]
    return shlex.join(words).replace(str(ROOT) + "/", "").encode("utf-8", "backslashreplace").decode()


def main_of(script: str) -> Callable[[list[str]], int | None]:
    module = importlib.import_module(script.removesuffix(".py"))
    return module.main if inspect.signature(module.main).parameters else lambda _: module.main()


def warm_up() -> None:
    """Check a command once here, so that what PyTorch imports at first use is there for all forks: a second for each."""
    words = ["--ref", str(ROOT / "examples" / "ada.png"), "--prompt", "", "--dry-run", "--output-path",
             str(Path(tempfile.gettempdir()) / "torture.mp4")]
    with contextlib.redirect_stdout(io.StringIO()):
        main_of("sample.py")(words)


def child(case: Case, command: list[str], folder: Path, main: Callable) -> int:
    """Runs in the fork: bounds, current folder, the command; returns its exit status."""
    os.chdir(folder)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if os.path.exists("/proc") else 0
    if now:
        resource.setrlimit(resource.RLIMIT_AS, (now + int(case.memory_gb * 1e9),) * 2)
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


def fork(case: Case, command: list[str], folder: Path, logs: Path) -> tuple[int, str, str]:
    """Run the case's command in a child: status (128 + signal if one ended it), stdout, stderr."""
    main = main_of(command[0])
    sys.stdout.flush()
    sys.stderr.flush()
    if (pid := os.fork()) == 0:
        status = 1
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                target = os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(target, number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", errors=how, encoding="utf-8", buffering=1)
                                      for number, how in ((1, "strict"), (2, "backslashreplace")))  # as Python's own
            status = child(case, command, folder, main)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [(logs / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")]
    return 128 - code if code < 0 else code, *texts


def complaints(case: Case, status: int, line: str, said: str, errors: list[str], stderr: str) -> list[str]:
    """What is not as announced in status and words."""
    wrong = []
    if status != case.status:
        wrong.append(f"status {status}, not {case.status}")
    if "Traceback (most recent call last)" in stderr:
        wrong.append("a traceback")
    if re.search(r"^\S*:\d+: \w*Warning", stderr, re.M):
        wrong.append("a library's warning")
    if len(errors) != (case.status == 2):
        wrong.append(f"{len(errors)} error lines")
    advice = "; " in line or re.search("error: (argument|the following arguments|unrecognized)", line)  # argparse's own
    if case.status == 2 and not (len(line) <= LONGEST_LINE and line.isprintable() and advice):
        wrong.append("not one short line that says what to do after '; '")
    if not re.search(case.says, line if case.status == 2 else said):
        wrong.append(f"does not say {case.says!r}")
    return wrong


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
        errors = [line for line in stderr.splitlines() if "error:" in line]
        told = [line for line in (stdout + stderr).splitlines() if line.startswith("warning:")] or stdout.splitlines()
        told = [line for line in told if case.says and re.search(case.says, line)] or told  # what the case is about
        line = errors[-1] if errors else told[-1].strip() if told else ""
        wrong = complaints(case, status, line, stdout + stderr, errors, stderr)
        left = sorted(name[4:] for name in after if name.startswith("out/"))
        if left != sorted(case.leaves):
            wrong.append(f"files in out/: {', '.join(left) or 'none'}, not {', '.join(case.leaves) or 'none'}")
        kept = {name: what for name, what in before.items() if case.status != 0 or not name.startswith("out/")}
        lost = sum(size for name, (size, digest) in kept.items() if after.get(name, (0, ""))[1] != digest)
        if changed := [name for name, what in kept.items() if after.get(name) != what]:
            wrong.append(f"changed or gone: {', '.join(changed)}")
        if new := [name for name in after.keys() - before.keys() if not name.startswith("out/")]:
            wrong.append(f"new outside out/: {', '.join(new)}")
        if not wrong and case.check and (problem := case.check(folder)):
            wrong.append(problem)
        line = line.replace(str(folder), ".").replace(str(ROOT) + "/", "")
    return Row(case.name, show(command).replace(str(folder), "."), line, status, ", ".join(left) or "-", not wrong,
               lost, why="; ".join(wrong), seconds=seconds)


# ------------------------------------------------------------ all of them, and the table


def collect(name: str, what: str) -> list:
    """CASES or FAULTS of a module beside this file."""
    return list(getattr(importlib.import_module(name), what)) if (Path(__file__).with_name(f"{name}.py")).exists() else []


def run_fault(name: str, fault: Callable[[Path], Row]) -> Row:
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        start = time.perf_counter()
        try:
            row = fault(Path(place))
        except Exception as error:
            traceback.print_exc()
            row = Row(name, "", "", 1, "", False, why=f"the fault itself failed: {error!r}")
    return Row(**asdict(row) | {"seconds": time.perf_counter() - start})


def cell(text: object, width: int) -> str:
    """Text that stays one cell of a Markdown table."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split())).replace("|", "/")
    return text if len(text) <= width else text[: width - 3] + "..."


def print_row(row: Row, width: int) -> None:
    cells = [cell(row.case, 60), cell(row.command, width), cell(row.line, 2 * width), str(row.status), cell(row.files, 60)]
    print("| " + " | ".join(cells) + " |" + ("" if row.good else f" <- NOT AS EXPECTED: {row.why}"), flush=True)


def counts(cases: list[Row], faults: list[Row]) -> str:
    """The last lines: how much was tried, how much was survived, how much was lost."""
    refused, works = (sum(row.status == status for row in cases) for status in (2, 0))
    kinds = Counter()
    for row in faults:
        kinds[row.case.partition(":")[0]] += row.count
    kills = sum(row.count for row in faults if row.case.startswith("SIG") and row.good)
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    rest = f", {len(cases) - refused - works} with another status" if refused + works < len(cases) else ""
    return (f"bad inputs tried: {len(cases)} ({refused} refused, {works} work{rest})\n"
            f"faults injected: {sum(kinds.values())}{f' ({told})' if told else ''}\nkills survived: {kills}\n"
            f"bytes lost: {sum(row.lost for row in cases + faults)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"a representative part, under {QUICK_SECONDS} s")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases and faults whose name contains it")
    parser.add_argument("--refused", action="store_true", help="of these only inputs that are refused at once, no faults")
    parser.add_argument("--width", type=int, default=70, help="of the command's column (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    cases = [case for name in ("torture_inputs", "torture_clips") for case in collect(name, "CASES")
             if (case.quick or not args.quick) and args.only in case.name
             and (not args.refused or case.status == 2 and case.seconds <= Case.seconds)]
    faults = [(name, fault) for name, fault, quick in collect("torture_faults", "FAULTS")
              if (quick or not args.quick) and args.only in name and not args.refused]
    if cases:
        warm_up()
    print("| case | command | printed line | status | files left |\n|---|---|---|---|---|")
    rows: tuple[list[Row], list[Row]] = ([], [])
    for kind, work in enumerate([[lambda c=case: run_case(c) for case in cases],
                                 [lambda n=name, f=fault: run_fault(n, f) for name, fault in faults]]):
        for run in work:
            rows[kind].append(run())
            print_row(rows[kind][-1], args.width)
    wrong = [row for row in rows[0] + rows[1] if not row.good]
    print(f"\n{counts(*rows)}\nnot as expected: {len(wrong)}\nseconds: {time.perf_counter() - start:.0f}")
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows[0] + rows[1]], indent=1), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.modules["torture"] = sys.modules["__main__"]  # the rows' own files import the shapes from here
    sys.exit(main())
