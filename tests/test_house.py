"""What holds for every file at the top level: short functions, typed signatures, a header that leads on, no circles.

Nothing is run. Hardware: CPU, a second. Run: python -m pytest tests/test_house.py
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in ROOT.glob("*.py"))
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")) for name in NAMES}
LONGEST_FUNCTION, LONGEST_LINE = 60, 125


def imports(name: str) -> set[str]:
    """Files of ours that a file imports when it is imported; what functions import later does not count."""
    found = set()
    for node in TREES[name].body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_short_and_public_ones_have_types(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION or node.name == "main", f"{node.name} has {length} lines"
    methods = [m for node in TREES[name].body if isinstance(node, ast.ClassDef) for m in node.body]
    for node in [*TREES[name].body, *methods]:
        if isinstance(node, ast.FunctionDef) and not (node.name.startswith("_") and node.name != "__init__"):
            assert node.returns is not None or node.name == "__init__", f"{node.name} has no return type"
            given = [a for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")]
            assert all(a.annotation is not None for a in given), f"{node.name} has an argument without type"


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_comes_from_where_and_what_to_read_next(name):
    header = ast.get_docstring(TREES[name])
    assert 10 <= len(header.splitlines()) <= 45, len(header.splitlines())
    assert re.search(r"paper:|our reading:|LTX-2\.3:|[Ss]ource:|Source\.|ST-DRC", header), "no label"
    following = re.findall(r"Read next: (\w+)\.py|Read next: (the tables in README\.md|exercises\.md)", header)
    assert following, "no 'Read next'"
    for module, _ in following:
        assert not module or module in NAMES, module


def test_the_headers_lead_through_all_files_in_the_order_of_the_readme():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Reading order")[1].split("\n\n")[1]
    told = [name for row in section.splitlines() for name in re.findall(r"`(\w+)\.py`", row.split("|")[1])]
    road = [told[0]]
    while following := re.search(r"^Read next: (\w+)\.py$", ast.get_docstring(TREES[road[-1]]), re.M):
        road.append(following[1])
        assert len(road) <= len(NAMES), road
    assert road == told


def test_nobody_imports_in_a_circle():
    done: set[str] = set()
    while len(done) < len(NAMES):
        free = {name for name in NAMES if name not in done and imports(name) <= done}
        assert free, {name: imports(name) - done for name in NAMES if name not in done}
        done |= free
