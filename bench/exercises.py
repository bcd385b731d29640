"""Does exercises.md say what happens? Applies every change to a copy of the repository and runs its command there.

An exercise in exercises.md is a heading with a number, a ```diff block (one file, named above it in backticks) or none,
and one command in a ``` block. Commands that evaluate are measured by their JSON; of the others (demos) the lines that
the change altered are shown. The bundled model, CPU; an evaluation takes about a quarter of a minute on two cores.

    python -m bench.exercises            all, and the table for exercises.md
    python -m bench.exercises 1 4        these
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("similarity", "top1", "action", "scene", "pixels", "flicker")
SHARES = ("top1", "action", "scene")


class Exercise(NamedTuple):
    number: int
    title: str
    file: str | None       # what is changed, if anything
    before: str
    after: str
    command: str


def read(text: str) -> list[Exercise]:
    """The exercises of exercises.md."""
    found = []
    for number, title, body in re.findall(r"^### (\d+)\. ([^\n]+)\n(.*?)(?=^##|\Z)", text, re.M | re.S):
        blocks = dict(re.findall(r"^```(\w*)\n(.*?)^```", body, re.M | re.S))               # "diff" and ""
        lines = blocks.get("diff", "").splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[:1] in (sign, " ")) for sign in "-+")
        file = re.search(r"`(\w+\.py)`\):\n", body)[1] if lines else None
        found.append(Exercise(int(number), title, file, before, after, blocks[""].strip()))
    return found


def change(source: str, exercise: Exercise) -> str:
    """The file with the change made. Raises ValueError unless the lines to change are there exactly once."""
    if (count := source.count(exercise.before + "\n")) != 1:
        raise ValueError(f"expected the lines of exercise {exercise.number} once in {exercise.file}, got {count} times")
    return source.replace(exercise.before + "\n", exercise.after + "\n")


def run(exercise: Exercise | None, command: str, folder: Path) -> tuple[dict, list[str]]:
    """Scores and printed lines of a command in a copy of the repository, changed by an exercise or not."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("weights", "examples"):
        (folder / name).symlink_to(ROOT / name)
    if exercise and exercise.file:
        target = folder / exercise.file
        target.write_text(change(target.read_text(encoding="utf-8"), exercise), encoding="utf-8")
    words = shlex.split(command)
    done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip().splitlines()[-1]}")
    rows = json.loads((folder / "evaluate.json").read_text())["rows"] if words[1] == "study.evaluate" else {}
    return rows.get("own reference", {}).get("scores", {}), done.stdout.splitlines()


def fresh(exercise: Exercise | None, command: str) -> tuple[dict, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        return run(exercise, command, Path(folder))


def cell(name: str, value: float) -> str:
    return f"{100 * value:.0f} %" if name in SHARES else f"{value:.3f}"


def main(numbers: list[str]) -> int:
    known = read((ROOT / "exercises.md").read_text(encoding="utf-8"))
    chosen = [e for e in known if not numbers or str(e.number) in numbers]
    lines, texts, usual_scores = ["| exercise | " + " | ".join(SCORES) + " |", "|---" * (len(SCORES) + 1) + "|"], [], {}

    def add(name: str, scores: dict) -> None:
        lines.append(f"| {name} | " + " | ".join(cell(s, scores[s][0]) for s in SCORES) + " |")
    for exercise in tqdm(chosen, desc="exercises", unit="exercise"):
        if exercise.file and exercise.command not in usual_scores:  # what the command says without any change
            usual_scores[exercise.command] = fresh(None, exercise.command)
            if usual_scores[exercise.command][0]:
                add(f"nothing changed, `{exercise.command}`", usual_scores[exercise.command][0])
        scores, told = fresh(exercise, exercise.command)
        if scores:
            add(str(exercise.number), scores)
        else:
            usual = usual_scores[exercise.command][1]
            pairs = [(a, b) for a, b in zip(usual, told, strict=False) if a != b]
            texts += [f"\nexercise {exercise.number}:", *(f"  before: {a}\n  after:  {b}" for a, b in pairs)]
    print("\n".join(lines + texts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
