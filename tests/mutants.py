"""A frozen list of one-line faults, and whether the tests notice each of them.

A suite is worth what it catches. Every row of MUTANTS is a mistake that somebody could make in one line; the command
makes it in a copy of the repository, runs the tests that should notice, and prints which one did. A fault that
survives is a hole in the suite: write the test, do not touch the row. Not collected by pytest: it takes minutes.

    python tests/mutants.py                 all of them, two at a time
    python tests/mutants.py rope losses     those whose file or text contains a word
    python tests/mutants.py --check         only that every row still fits its file

Hardware: CPU. Run it after deleting or rewriting a test.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds for the tests of one fault; one that hangs is noticed, too


class Mutant(NamedTuple):
    file: str
    before: str  # stands exactly once in the file
    after: str
    tests: str   # what pytest is given: files, or single tests, separated by blanks


MUTANTS: list[Mutant] = [
    # common
    Mutant("common/files.py", "        write(temporary)\n        os.replace(temporary, path)",
           "        write(path)", "tests/test_files.py"),
    Mutant("common/files.py", 'f".{path.stem[:60]}.', 'f"{path.stem[:60]}.', "tests/test_files.py"),
    Mutant("common/files.py", "        temporary.unlink(missing_ok=True)", "        pass",
           "tests/test_files.py"),
    Mutant("common/files.py", "st_mtime >= seconds", "st_mtime <= seconds", "tests/test_files.py"),
    Mutant("common/files.py", "in range(JSON_DEPTH):", "in range(JSON_DEPTH + 1):",
           "tests/test_files.py"),
    Mutant("common/files.py", "if not path.is_file():", "if path.is_dir():", "tests/test_files.py"),
    Mutant("common/cli.py", "not low <= value <= high", "(value < low or value > high)",
           "tests/test_cli.py"),
    Mutant("common/cli.py", "if os.path.lexists(p))", "if p.is_dir())", "tests/test_cli.py"),
    Mutant("common/cli.py", "signalled.args[0] if signalled.args else signal.SIGINT",
           "signal.SIGINT", "tests/test_cli.py"),
    Mutant("common/cli.py", "            signal.signal(number, handler)", "            pass",
           "tests/test_cli.py"),
    Mutant("common/cli.py", "raise  # a mistake of ours", "pass  # a mistake of ours",
           "tests/test_cli.py"),
    Mutant("common/cli.py", "    sys.unraisablehook = hook", "    pass", "tests/test_cli.py"),
]


def misfit(mutant: Mutant) -> str:
    """What is wrong with a row, or nothing."""
    path = ROOT / mutant.file
    if not path.exists():
        return f"{mutant.file} does not exist"
    count = path.read_text(encoding="utf-8").count(mutant.before)
    if count != 1:
        return f"{mutant.before!r} stands {count} times in {mutant.file}"
    gone = [t for t in mutant.tests.split() if not (ROOT / t.partition("::")[0]).exists()]
    return f"no such test file: {gone[0]}" if gone else ""


def killer(mutant: Mutant) -> str:
    """The test that noticed, or "" when the fault survived."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for path in ROOT.iterdir():
            if path.name in ("weights", "examples", "docs"):
                (folder / path.name).symlink_to(path)
            elif path.is_dir() and not path.name.startswith(".") and path.name not in ("runs", "data"):
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.is_file():
                shutil.copy(path, folder)
        target = folder / mutant.file
        text = target.read_text(encoding="utf-8")
        target.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
                   *mutant.tests.split()]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
        except subprocess.TimeoutExpired:
            return f"(over {LIMIT} s)"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode not in (0, 1, 2) or (done.returncode and not found):
        return f"(pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]!r})"
    return found[1] if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only rows whose file, text or tests contain one of them")
    parser.add_argument("--check", action="store_true", help="run nothing, see whether the rows fit the files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.words or any(w in " ".join(m) for w in args.words)]
    if wrong := [told for m in chosen if (told := misfit(m))]:
        print(*wrong, sep="\n")
        return 2
    if args.check:
        print(f"{len(chosen)} faults fit their files")
        return 0
    start, survived = time.time(), 0
    print("| file | instead of | stands | noticed by |\n|---|---|---|---|")
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, test in zip(chosen, pool.map(killer, chosen), strict=True):
            survived += not test
            cells = (" ".join(text.split()).replace("|", "/") for text in mutant[1:3])
            print(f"| {mutant.file} | `" + "` | `".join(cells) + f"` | {test or 'NOBODY'} |", flush=True)
    print(f"\n{len(chosen)} faults, {len(chosen) - survived} killed, {survived} survived, {time.time() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
