"""The README says nothing that is not so: its commands run, its flags, files, functions and pictures exist.

Commands that take seconds are run as they stand there, in an empty folder beside copies of what they read; those that
need hours, other people's weights or a network are parsed by the program they call. Every command is one or the other.
Hardware: CPU, about 20 seconds. Run: python -m pytest tests/test_readme.py
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
from study import ablate

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "exercises.md") if (ROOT / name).exists()}
README = TEXTS["README.md"]


def commands(text: str) -> list[str]:
    """Every command of a text: lines of fenced blocks (continued lines joined), and spans of code that begin like one."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest)]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(python\S*|torchrun|pip|pytest)\s", part + " ")]


def program(command: str) -> tuple[str, list[str]] | None:
    """The script of ours that a command calls, and its arguments; None for pip, pytest and other people's programs."""
    words = shlex.split(command)
    for i, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[i + 1:]
    return None


CALLS = sorted({call[0] for text in TEXTS.values() for c in commands(text) if (call := program(c))})
RUN = [c for text in TEXTS.values() for c in dict.fromkeys(commands(text))
       if (call := program(c)) and not call[1] and (ROOT / call[0]).is_file() and call[0] != "study.evaluate"
       and not call[0].startswith("tests/")]  # those without an argument are demos


def run(script: str, words: list[str], monkeypatch) -> int:
    """A script of ours as if called from the command line, in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", [script, *words])
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_there_are_commands_to_test():
    assert len(commands(README)) > 20 and len(RUN) >= 5, (len(commands(README)), RUN)
    assert commands("`python a.py --b`\n```\npip install x && python c.py \\\n  --d\n```\n`not one`") == [
        "pip install x", "python c.py    --d", "python a.py --b"]  # fmt: skip


@pytest.mark.parametrize("command", RUN)
def test_a_command_without_arguments_runs_and_draws_what_it_says(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(program(command)[0], [], monkeypatch) == 0
    told = capsys.readouterr().out
    for picture in re.findall(r"wrote (\w+\.png)", told):
        assert (tmp_path / picture).stat().st_size > 0


def test_the_first_command_makes_its_three_files(tmp_path, monkeypatch):
    (command,) = [c for c in commands(README) if "--ref examples/ada.png --prompt" in c]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert run(*program(command), monkeypatch) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"examples", "out.mp4", "out.png", "out.json"}


@pytest.mark.parametrize("script", CALLS)
def test_every_script_is_there_and_knows_the_flags_it_is_given(script, monkeypatch, capsys):
    assert (ROOT / script).is_file(), script
    if script == "examples/make_faces.py":  # needs an environment of its own, its flags are read in its source
        known = (ROOT / script).read_text(encoding="utf-8")
    elif "argparse" in (source := (ROOT / script).read_text(encoding="utf-8")) or "parse_arguments" in source:
        assert run(script, ["--help"], monkeypatch) == 0
        known = capsys.readouterr().out
    else:
        known = source  # reads sys.argv itself
    for text in TEXTS.values():
        for call in filter(None, map(program, commands(text))):
            if call[0] == script:
                flags = {word for word in call[1] if word.startswith("--")}
                assert not [flag for flag in flags if flag not in known], call


def test_flags_named_alone_belong_to_some_script():
    known = "".join(p.read_text(encoding="utf-8") for p in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])
    for name, text in TEXTS.items():
        flags = {flag for span in re.findall(r"`(--[^`]+)`", text) for flag in re.findall(r"--[a-z][a-z-]+", span)}
        missing = [flag for flag in sorted(flags) if f'"{flag}"' not in known and flag[2:].replace("-", "_") not in known]
        assert missing == [], (name, missing)


def test_files_and_pictures_that_are_named_exist():
    for name, text in TEXTS.items():
        for path in re.findall(r"\]\(([^)#]+)\)", text):
            assert "://" in path or (ROOT / path).exists(), (name, path)
        for path in re.findall(r"`((?:tests/|examples/|weights/)?[\w/]+\.(?:py|md|txt))`", text):
            assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), (name, path)


def test_the_reading_order_names_every_module_once():
    section = README.split("## Reading order")[1].split("\n## ")[0].split("\n\n")[1]
    named = [name for row in section.splitlines() for name in re.findall(r"`(\w+)\.py`", row.split("|")[1])]
    assert sorted(named) == sorted(p.stem for p in ROOT.glob("*.py")), set(named) ^ {p.stem for p in ROOT.glob("*.py")}


def test_the_table_of_components_names_functions_and_tests_that_exist():
    rows = re.findall(r"^\| [^|]+ \| `(\w+)\.py` \| ([^|]+) \| `(tests/\w+\.py)` \|", README, re.M)
    assert len(rows) >= 5
    for module, functions, test in rows:
        tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        named = set(re.findall(r"`(\w+)`", functions))
        assert named and named <= defined, (module, named - defined)
        assert re.search(rf"\b({'|'.join(named)})\b", (ROOT / test).read_text(encoding="utf-8")), test


def test_every_change_of_the_exercises_can_be_made_and_leaves_python():
    known = exercises.read(TEXTS["exercises.md"])
    assert [e.number for e in known] == list(range(1, 13))
    for e in known:
        assert (ROOT / program(e.command)[0]).is_file()
        if e.file:
            before = (ROOT / e.file).read_text(encoding="utf-8")
            after = exercises.change(before, e)
            assert after != before
            compile(after, e.file, "exec")
    broken = known[0]._replace(before="not in the file")
    with pytest.raises(ValueError, match="once in rope.py, got 0 times"):
        exercises.change((ROOT / "rope.py").read_text(encoding="utf-8"), broken)


def test_the_table_of_ablations_is_what_the_records_beside_it_give(tmp_path, capsys):
    shipped = ROOT / "examples" / "ablate"
    shutil.copytree(shipped, tmp_path / "ablate")
    assert ablate.main(["table", "--folder", str(tmp_path / "ablate")]) == 0
    assert (tmp_path / "ablate" / "table.md").read_text() == (shipped / "table.md").read_text()
    rows = (shipped / "table.md").read_text().split("## overview")[1].split("\n\n")[1].splitlines()
    assert len(rows) > 12 and all(row in README.splitlines() for row in rows)


@pytest.mark.parametrize(("script", "words"), [("study.evaluate", ["--tables", "examples/evaluate.json"]),
                                               ("tests/fewer_calls.py", ["examples/fewer_calls"])])  # fmt: skip
def test_the_tables_of_scores_are_what_the_records_give(script, words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert run(script, words, monkeypatch) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) > 12 and all(row in README.splitlines() for row in rows)
