"""Each method file works alone: copied into an empty folder its demo runs, and it says where every claim comes from.

No weights. Every demo and example is a fresh Python process: about twenty seconds on one CPU core.
Run: python -m pytest tests/test_method_files.py
"""

import ast
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHOD = ("rope", "reference", "augment", "losses", "guidance")
LABELS = ("paper:", "our reading:", "LTX-2.3:")
MAX_LINES = 250

pytestmark = pytest.mark.parametrize("name", METHOD)


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def tree(name):
    return ast.parse(source(name))


def test_the_demo_runs_in_an_empty_folder_and_says_what_to_notice(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    run = subprocess.run(
        [sys.executable, "-I", f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )  # -I: neither PYTHONPATH nor the user's site can lend a module of ours
    assert run.returncode == 0, run.stderr
    assert "notice" in run.stdout.strip().splitlines()[-1].lower(), run.stdout
    pictures = [path.name for path in tmp_path.iterdir() if path.name != f"{name}.py"]
    assert len(pictures) <= 1, pictures
    assert all(picture.endswith(".png") for picture in pictures), pictures


def test_the_header_s_example_runs_as_pasted(name, tmp_path):
    """The first thing that somebody who lifts the file types: in an empty folder, beside the file alone."""
    example = ast.get_docstring(tree(name)).split("\nUsage:\n")[1].split("\n\n")[0]
    assert f"from {name} import" in example or f"import {name}" in example
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    (tmp_path / "example.py").write_text(textwrap.dedent(example))
    run = subprocess.run([sys.executable, "-sE", "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_it_imports_nothing_of_ours_and_only_common_packages(name):
    ours = {path.stem for path in ROOT.glob("*.py")}
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "PIL"}
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            packages = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            packages = [node.module.split(".")[0]]
        else:
            continue
        for package in packages:
            assert package not in ours, f"line {node.lineno} imports our {package}"
            assert package in allowed, f"line {node.lineno} imports {package}"


def test_every_public_function_says_whether_paper_reading_or_base_model(name):
    unlabelled = [
        node.name
        for node in tree(name).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and node.name not in ("demo", "main")
        and not any(label in (ast.get_docstring(node) or "") for label in LABELS)
    ]
    assert unlabelled == []


def test_public_signatures_carry_types(name):
    for node in tree(name).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.returns is not None, f"{node.name} has no return type"
            arguments = node.args.args + node.args.kwonlyargs
            assert all(a.annotation is not None for a in arguments), f"{node.name} has an argument without type"


def test_the_header_names_the_paper_and_the_next_file(name):
    header = ast.get_docstring(tree(name))
    assert "ST-DRC, arXiv 2606.02441" in header
    assert "Read next:" in header
    assert any(label in header for label in LABELS)
    assert 10 <= len(header.splitlines()) <= 40


def test_it_keeps_to_the_promised_length(name):
    lines = source(name).splitlines()
    assert len(lines) <= MAX_LINES, len(lines)
    longest = max(map(len, lines))
    assert longest <= 120, longest
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_nothing_happens_at_import(name):
    # Top level holds imports, constants, definitions and the guard; calls there may only build constants.
    for node in tree(name).body[1:]:  # the first statement is the docstring
        allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
        guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        assert isinstance(node, allowed) or guard, f"line {node.lineno}: {ast.unparse(node)[:60]}"
