"""README and docs say nothing that is not so: their commands run or parse, their files exist.

Commands that take seconds are run as they stand there, in an empty folder; those that need hours,
other people's weights or a GPU are parsed by the program they call.
Hardware: CPU, half a minute. Run: python -m pytest tests/test_readme.py
"""

import ast
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from bench import exercises
from study import ablate, curves, scales

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = TEXTS["README.md"]


def commands(text: str) -> list[str]:
    """Lines of fenced blocks (continued lines joined), and spans of code that begin like one."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(python3?|torchrun)\s", part + " ")]


def program(command: str) -> tuple[str, list[str]] | None:
    """The file of ours that a command calls, and its arguments."""
    words = shlex.split(re.split(r"\s{3,}", command)[0], comments=True)  # remarks stand apart
    for i, word in enumerate(words):
        if word == "-m" and words[i + 1] != "pytest":
            name = words[i + 1].replace(".", "/")
            inside = ROOT / name / "__main__.py"
            return f"{name}/__main__.py" if inside.is_file() else f"{name}.py", words[i + 2 :]
        if word.endswith(".py"):
            return word, words[i + 1 :]
    return None


CALLS = [(name, *call) for name, text in TEXTS.items() for command in commands(text)
         if (call := program(command))]
DEMOS = sorted({file for _, file, words in CALLS if not words and "/" not in file})


def run(script: str, words: list[str], monkeypatch) -> int:
    """A script of ours as if called from the command line, in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_the_readme_is_read_in_ten_minutes_and_begins_with_three_commands():
    assert len(README) <= 12_000, len(README)
    assert [program(c)[0] for c in commands(README) if program(c)][:2] == ["rope.py", "sample.py"] \
        or "sample.py" in README
    assert len(CALLS) > 20


@pytest.mark.parametrize("script", DEMOS)
def test_a_command_without_arguments_runs(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(script, [], monkeypatch) == 0 and "Notice" in capsys.readouterr().out


def test_the_first_command_makes_its_three_files(tmp_path, monkeypatch):
    (words,) = [w for _, file, w in CALLS if file == "sample.py" and "examples/ada.png" in w]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert run("sample.py", words, monkeypatch) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"examples", "out.mp4", "out.png", "out.json"}


@pytest.mark.parametrize("file", sorted({file for _, file, _ in CALLS}))
def test_every_program_is_there_and_knows_the_flags_it_is_given(file, monkeypatch, capsys):
    assert (ROOT / file).is_file(), file
    known = (ROOT / file).read_text(encoding="utf-8")
    known += '"--help"'
    if file == "bench/fewer_calls.py":  # hands its flags on
        known += (ROOT / "study/evaluate.py").read_text(encoding="utf-8")
    if file == "sample.py":
        known += (ROOT / "ltx/options.py").read_text(encoding="utf-8")
    if file == "train.py":
        known += (ROOT / "clips/dataset.py").read_text(encoding="utf-8")
    if file.startswith("clips/"):
        known += (ROOT / "clips/manifest.py").read_text(encoding="utf-8")
    for name, other, words in CALLS:
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        missing = [flag for flag in flags if f'"{flag}"' not in known]
        assert other != file or not missing, (name, missing)


def test_flags_files_and_pictures_that_are_named_exist():
    product = "".join(p.read_text(encoding="utf-8") for p in ROOT.rglob("*.py")
                      if p.relative_to(ROOT).parts[0][0] != ".")
    for name, text in TEXTS.items():
        prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
        flags = {flag for span in re.findall(r"`(--[^`]+)`", prose)
                 for flag in re.findall(r"--[a-z][a-z-]+", span)}
        missing = [f for f in sorted(flags) if f'"{f}"' not in product and f"`{f}" not in product]
        assert missing == [], (name, missing)
        for path in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert "://" in path or ((ROOT / name).parent / path).exists(), (name, path)
        for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|md|txt))`", prose):
            assert (ROOT / path).exists() or path in ("lora.safetensors",), (name, path)


def test_the_table_of_components_names_functions_and_tests_that_exist():
    files = r"((?:`\w+\.py`(?:, )?)+)"
    rows = re.findall(rf"^\| [^|]+ \| {files} \| ([^|]+) \| ([^|]+) \|", README, re.M)
    assert len(rows) >= 7
    for files, functions, tests in rows:
        trees = [ast.parse((ROOT / f).read_text(encoding="utf-8"))
                 for f in re.findall(r"`(\w+\.py)`", files)]
        defined = {node.name for tree in trees for node in tree.body if hasattr(node, "name")}
        named = set(re.findall(r"`(\w+)`", functions))
        assert named and named <= defined, (files, named - defined)
        told = [(ROOT / t).read_text(encoding="utf-8")
                for t in re.findall(r"`(tests/\w+\.py)`", tests)]
        assert told and all(any(re.search(rf"\b{n}\b", text) for text in told) for n in named)


def test_every_change_of_the_exercises_can_be_made_and_leaves_python():
    known = exercises.read(TEXTS["docs/exercises.md"])
    assert [e.number for e in known] == list(range(1, 13))
    for e in known:
        if e.file:
            before = (ROOT / e.file).read_text(encoding="utf-8")
            after = exercises.change(before, e)
            assert after != before
            compile(after, e.file, "exec")


def test_tables_are_what_the_records_beside_them_give(tmp_path, monkeypatch, capsys):
    shipped = ROOT / "examples" / "ablate"
    shutil.copytree(shipped, tmp_path / "ablate")
    assert ablate.main(["table", "--folder", str(tmp_path / "ablate")]) == 0
    found = (tmp_path / "ablate" / "table.md").read_text()
    assert found == (shipped / "table.md").read_text()
    rows = found.split("## overview")[1].split("\n\n")[1].splitlines()
    assert len(rows) > 12 and all(row in TEXTS["docs/ablations.md"].splitlines() for row in rows)
    for program, name, text in ((curves, "curves", "ablations"), (scales, "scales", "results")):
        shutil.copytree(ROOT / "examples" / name, tmp_path / name)
        capsys.readouterr()
        assert program.main(["table", "--folder", str(tmp_path / name)]) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        assert len(rows) > 4 and all(row in TEXTS[f"docs/{text}.md"].splitlines() for row in rows)
    monkeypatch.chdir(ROOT)
    for script, words in (("study/evaluate.py", ["--tables", "examples/evaluate.json"]),
                          ("bench/fewer_calls.py", ["examples/fewer_calls"])):
        capsys.readouterr()
        assert run(script, words, monkeypatch) == 0
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        assert len(rows) > 12, script
        assert all(row in TEXTS["docs/results.md"].splitlines() for row in rows), script
