"""Does docs/exercises.md say what happens? Makes every change in a copy and runs its command there.

An exercise is a heading with a number, a ```diff block (one file, named above it in backticks) or
none, and one command in a ``` block. Commands that evaluate are measured by their JSON; of the
others (demos) the lines that the change altered are shown. The bundled model, CPU; an evaluation
takes about a quarter of a minute on two cores.

    python -m bench.exercises            all, and the table for docs/exercises.md
    python -m bench.exercises 1 4        these
    python -m bench.exercises --people 8 --keep runs/exercises      clips for study/page.py
"""

import argparse
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

from common.cli import Parser, command
from common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "docs" / "exercises.md"
SCORES = ("similarity", "top1", "action", "scene", "pixels", "flicker")
SHARES = ("top1", "action", "scene")


class Exercise(NamedTuple):
    number: int
    title: str
    file: str | None  # what is changed, if anything
    before: str
    after: str
    command: str


def read(text: str) -> list[Exercise]:
    """The exercises of docs/exercises.md."""
    found = []
    pattern = r"^### (\d+)\. ([^\n]+)\n(.*?)(?=^##|\Z)"
    for number, title, body in re.findall(pattern, text, re.M | re.S):
        blocks = dict(re.findall(r"^```(\w*)\n(.*?)^```", body, re.M | re.S))  # "diff" and ""
        lines = blocks.get("diff", "").splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[:1] in (sign, " "))
                         for sign in "-+")
        file = re.search(r"`([\w/]+\.py)`\):\n", body)[1] if lines else None
        found.append(Exercise(int(number), title, file, before, after, blocks[""].strip()))
    return found


def change(source: str, exercise: Exercise) -> str:
    """The file with the change made. ValueError unless the lines are there exactly once."""
    if (count := source.count(exercise.before + "\n")) != 1:
        raise ValueError(f"expected the lines of exercise {exercise.number} once in "
                         f"{exercise.file}, got {count} times")
    return source.replace(exercise.before + "\n", exercise.after + "\n")


def run(exercise: Exercise | None, command: str, clips: Path | None = None
        ) -> tuple[dict, list[str]]:
    """Scores and printed lines of a command in a copy of the repository, changed or not.

    clips: where the clips that were scored are kept, if there are any.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for path in ROOT.iterdir():
            if path.suffix == ".py":
                shutil.copy(path, folder)
            elif path.name in ("weights", "examples"):
                (folder / path.name).symlink_to(path)
            elif any(path.glob("*.py")) and path.name not in ("tests", "bench"):
                shutil.copytree(path, folder / path.name)
        if exercise and exercise.file:
            target = folder / exercise.file
            target.write_text(change(target.read_text(encoding="utf-8"), exercise),
                              encoding="utf-8")
        words = shlex.split(command)
        done = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True,
                              text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise ValueError(f"expected `{command}` to end, got status {done.returncode}: {last}; "
                             "mend what it says")
        for made in folder.glob("runs/evaluate/*/own_reference.safetensors") if clips else ():
            clips.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made, clips)
        record = folder / "evaluate.json"
        rows = json.loads(record.read_text())["rows"] if record.exists() else {}
    return rows.get("own reference", {}).get("scores", {}), done.stdout.splitlines()


def keep(folder: Path, exercise: Exercise, sides: dict[str, tuple[str, dict, list[str]]]) -> None:
    """Write what study/page.py shows. sides: "before", "after": name of the clips, result of `run`.
    """
    (_, scores, a), (_, _, b) = sides.values()
    changed = [] if scores else [pair for pair in zip(a, b, strict=False) if pair[0] != pair[1]]
    shown = {side: {"clips": name, "scores": {s: cell(s, found) for s in SCORES if s in found}}
              for side, (name, found, _) in sides.items()}
    record = {"number": exercise.number, "title": exercise.title, "file": exercise.file,
              "change": [exercise.before, exercise.after], "command": exercise.command,
              "lines": changed, **shown}
    write_json(folder / f"{exercise.number}.json", record)


def cell(name: str, scores: dict) -> str:
    return f"{100 * scores[name][0]:.0f} %" if name in SHARES else f"{scores[name][0]:.3f}"


def cells(name: str, scores: dict) -> str:
    return f"| {name} | " + " | ".join(cell(s, scores) for s in SCORES) + " |"


def measure(args: argparse.Namespace) -> None:
    """Run the exercises and print what they change."""
    text = TEXT.read_text(encoding="utf-8")
    if args.people:
        text = re.sub(r"--people \d+", f"--people {args.people}", text)
    everything = read(text)
    known = [e for e in everything if not args.numbers or str(e.number) in args.numbers]
    table, texts, usual = [], [], {}

    def made(exercise: Exercise | None, command: str, name: str) -> tuple[str, dict, list[str]]:
        clips = args.keep and args.keep / f"{name}.safetensors"
        return name, *run(exercise, command, clips)
    for exercise in tqdm(known, desc="exercises", unit="exercise"):
        plain = exercise.command if exercise.file else everything[0].command  # a flag is a change
        if plain not in usual:  # what it says without any change
            usual[plain] = made(None, plain, f"plain-{len(usual)}")
            if scores := usual[plain][1]:
                table.append(cells(f"nothing changed, `{plain}`", scores))
        result = _, scores, told = made(exercise, exercise.command, str(exercise.number))
        if scores:
            table.append(cells(str(exercise.number), scores))
        else:
            pairs = zip(usual[plain][2], told, strict=False)
            texts += [f"\nexercise {exercise.number}:",
                      *(f"  before: {a}\n  after:  {b}" for a, b in pairs if a != b)]
        if args.keep:
            keep(args.keep, exercise, {"before": usual[plain], "after": result})
    head = ["| exercise | " + " | ".join(SCORES) + " |", "|---" * (len(SCORES) + 1) + "|"]
    print("\n".join(head + table + texts))


def main(words: list[str]) -> int:
    parser = Parser("bench.exercises", description=__doc__.split("\n")[0])
    parser.add_argument("numbers", nargs="*", help="which exercises (default: all)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for clips and scores of each")
    parser.add_argument("--people", type=int, help="to score, instead of as many as the text says")
    args = parser.parse_args(words)
    return command("bench.exercises", lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
