"""Each method file works alone: copied into an empty folder its demo and its header's example run.

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

pytestmark = pytest.mark.parametrize("name", METHOD)


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def alone(name, tmp_path, script, *flags):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, *flags, script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_demo_runs_in_an_empty_folder_and_says_what_to_notice(name, tmp_path):
    # -I: neither PYTHONPATH nor the user's site can lend a module of ours
    lines = alone(name, tmp_path, f"{name}.py", "-I").strip().splitlines()
    assert any(line.startswith("Notice: ") for line in lines[-2:]) and len(lines) <= 25
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.py"], "it only prints"


def test_the_header_s_example_runs_as_pasted(name, tmp_path):
    """The first thing that somebody who lifts the file types."""
    example = ast.get_docstring(tree(name)).split("\nUsage:\n")[1].split("\n\n")[0]
    assert f"from {name} import" in example or f"import {name}" in example
    (tmp_path / "example.py").write_text(textwrap.dedent(example))
    alone(name, tmp_path, "example.py", "-sE")


def test_it_imports_only_common_packages_and_says_where_it_comes_from(name):
    packages = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            packages.add(node.module.split(".")[0])
    assert packages <= set(sys.stdlib_module_names) | {"torch", "numpy", "PIL"}, packages
    first = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()[:2]
    assert first[0] == "# SPDX-License-Identifier: MIT" and "2606.02441" in first[1]


def test_every_public_function_says_whether_paper_reading_or_base_model(name):
    public = [node for node in tree(name).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
              and not node.name.startswith("_")]
    unlabelled = [node.name for node in public
                  if not any(label in (ast.get_docstring(node) or "") for label in LABELS)]
    assert unlabelled == []


def test_nothing_happens_at_import(name):
    # Top level holds imports, constants, definitions and the guard.
    for node in tree(name).body[1:]:  # the first statement is the docstring
        allowed = (ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign
                   | ast.AnnAssign)
        guard = isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
        assert isinstance(node, allowed) or guard, f"line {node.lineno}: {ast.unparse(node)[:60]}"
