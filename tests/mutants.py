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
    # study
    Mutant("toy/head.py", "{\"turns left\": -yaw", "{\"turns left\": yaw", "tests/test_scores.py"),
    Mutant("toy/head.py", "y[:, 1:] * y.new_tensor(POSE_SPREAD)", "y[:, 1:]",
           "tests/test_scores.py"),
    Mutant("study/scores.py", "torch.where(found, 0.0, torch.inf)",
           "torch.where(found, torch.inf, 0.0)", "tests/test_scores.py"),
    Mutant("study/scores.py", "embed_clips(eval_encoder, video) * seen[..., None]",
           "embed_clips(eval_encoder, video)", "tests/test_scores.py"),
    Mutant("study/scores.py", "own[:, :2].mean(1) - own[:, 3:].mean(1)",
           "own[:, 3:].mean(1) - own[:, :2].mean(1)", "tests/test_scores.py"),
    Mutant("study/scores.py", "torch.where(asked[:, i] == ref[:, i], torch.nan, leak)", "leak",
           "tests/test_scores.py"),
    Mutant("study/scores.py", "(moved & (share >= 0.5))", "moved", "tests/test_scores.py"),
    Mutant("study/scores.py", "free[:, 1:] & free[:, :-1]", "free[:, 1:] | free[:, :-1]",
           "tests/test_scores.py"),
    Mutant("study/scores.py", ".abs() / 2).mean(1)", ".abs()).mean(1)", "tests/test_scores.py"),
    Mutant("study/scores.py", "start[:, column] -= offset", "start[:, column] += offset",
           "tests/test_scores.py"),
    Mutant("study/scores.py", "(table.sum(1) - own)", "table.sum(1)", "tests/test_scores.py"),
    Mutant("study/scores.py", "B.trace() - 2 * cross", "B.trace() - cross", "tests/test_scores.py"),
    Mutant("study/scores.py", "STUDENT[n - 2] if", "STUDENT[n - 1] if", "tests/test_scores.py"),
    Mutant("study/scores.py", "values[~values.isnan()]", "values.nan_to_num()",
           "tests/test_scores.py"),
    Mutant("study/results.py", "found = [x - y for", "found = [y - x for", "tests/test_results.py"),
    Mutant("study/results.py", "else 3), abs(mean) > half", "else 3), mean > half",
           "tests/test_results.py"),
    Mutant("study/results.py", "difference(records[seed], base[seed], name)",
           "difference(records[seed], next(iter(base.values())), name)", "tests/test_results.py"),
    Mutant("study/results.py", "(100, 1, \" %\") if", "(1, 3, \"\") if", "tests/test_results.py"),
    Mutant("study/results.py", "if before.get(key) != settings[key]:", "if key not in before:",
           "tests/test_results.py"),
    Mutant("study/results.py", "for r in found) / 3600", "for r in found) / 60",
           "tests/test_results.py"),
    Mutant("study/results.py", "{found[at][1]:.3f} / {found[at][0]", "{found[at][0]:.3f} / {found[at][1]",
           "tests/test_results.py"),
    Mutant("study/evaluate.py", "\"ref_pose\": data[\"ref_pose\"][first]}",
           "\"ref_pose\": data[\"ref_pose\"]}", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "world.draw_settings(people, g), torch.rand(people, generator=g)",
           "torch.rand(people, generator=g)", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "args.dtype, args.seed, *(content_hash",
           "args.dtype, *(content_hash", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "(\"*.py\", \"ltx/*.py\",", "(\"*.py\",", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "if not path.exists():", "if True:", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "None if name == \"no reference\" else tokens", "tokens",
           "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "swapped = with_person(data, (data[\"who\"] + 1)",
           "swapped = with_person(data, (data[\"who\"] + 0)", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "(data[\"who\"] + people // 2)", "(data[\"who\"])",
           "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "cosine = torch.where(marks.isnan(), box, marks)", "cosine = box",
           "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", ".nan_to_num(0)", "", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "mean().item() / 2]", "mean().item()]", "tests/test_evaluate.py"),
    Mutant("study/evaluate.py", "str(value).removeprefix(f\"{HERE}/\")", "str(value)",
           "tests/test_evaluate.py"),
    Mutant("study/ablate.py", "\"default\" if self.part == \"guidance\" else self.variant",
           "self.variant", "tests/test_ablate.py"),
    Mutant("study/ablate.py", "flags.items() if value is not None", "flags.items() if value",
           "tests/test_ablate.py"),
    Mutant("study/ablate.py", "**DEFAULT | changed)", "**DEFAULT)", "tests/test_ablate.py"),
    Mutant("study/ablate.py", "\"drop_both\": 0.0, \"drop_text\": 0.1", "\"drop_both\": 0.0",
           "tests/test_ablate.py"),
    Mutant("study/ablate.py", "args.jobs and not (training and todo[0].part == \"guidance\"):",
           "args.jobs:", "tests/test_ablate.py"),
    Mutant("study/ablate.py", "if child.returncode == 0 and more:", "if more:",
           "tests/test_ablate.py"),
    Mutant("study/ablate.py", "child.terminate()", "child.kill()", "tests/test_ablate.py"),
    Mutant("study/ablate.py", "tasks if not task.result(args.folder).exists()]", "tasks]",
           "tests/test_ablate.py"),
    Mutant("study/ablate.py", "for state in folder.glob(\"state-*.safetensors\")",
           "for state in folder.glob(\"*.safetensors\")", "tests/test_ablate.py"),
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
