"""What holds for the house as a whole: which rooms there are, which way imports run, how files
look.

Nothing is run. Hardware: CPU, a second. Run: python -m pytest tests/test_house.py
"""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHOD = ("rope", "reference", "augment", "losses", "guidance")
EIGHT = (*METHOD, "model", "train", "sample")
# Each may import those before it, and files of its own room.
FLOORS = [{"common", *METHOD}, {"model"}, {"ltx"}, {"clips"}, {"sample"}, {"training"}, {"toy"},
          {"train", "study"}]
ROOMS = ("common", "ltx", "clips", "training", "toy", "study")
PRODUCT = [*(ROOT / f"{name}.py" for name in EIGHT),
           *(path for room in ROOMS for path in sorted((ROOT / room).glob("*.py")))]
NAMES = [str(path.relative_to(ROOT)) for path in PRODUCT]
TREES = {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in NAMES}
EVERYTHING = [*PRODUCT, *(path for room in ("bench", "tests", "examples")
                          for path in sorted((ROOT / room).rglob("*.py")))]


def imported(name: str) -> set[str]:
    """The modules that a file names anywhere, as paths from the root; strangers have no such
    file."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {module.replace(".", "/") + ".py" for module in found}
    return {path for path in paths if (ROOT / path).is_file()}


def floor(name: str) -> int:
    top = name.removesuffix(".py").split("/")[0]
    return next(i for i, rooms in enumerate(FLOORS) if top in rooms)


def functions(name: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]


def test_ls_shows_the_paper():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    assert {name for name in top if name.endswith(".py")} == {f"{name}.py" for name in EIGHT}
    folders = {name for name in top if (ROOT / name).is_dir()}
    assert folders == {*ROOMS, "bench", "tests", "docs", "examples", "weights"}


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_one_way(name):
    for other in imported(name):
        if other.split("/")[0] == name.split("/")[0]:
            continue  # of its own room; circles are looked for below
        assert floor(other) < floor(name) or (floor(name) == 7 and floor(other) <= 7), other
    if name.removesuffix(".py") in METHOD:
        assert not imported(name), "a method file can be copied alone"
    if name == "model.py":
        assert imported(name) == {"rope.py"}


def test_nobody_imports_in_a_circle():
    done: set[str] = set()
    while len(done) < len(NAMES):
        free = {name for name in NAMES if name not in done and imported(name) - {name} <= done}
        assert free, {name: imported(name) - done for name in NAMES if name not in done}
        done |= free


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_short_have_few_parameters_and_types(name):
    for node in functions(name):
        length = node.end_lineno - node.lineno + 1
        assert length <= 70, f"{node.name} has {length} lines"
        given = [a for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                 if a.arg not in ("self", "cls")]
        assert len(given) <= 8, f"{node.name} has {len(given)} parameters"
    methods = [m for node in TREES[name].body if isinstance(node, ast.ClassDef) for m in node.body]
    for node in [*TREES[name].body, *methods]:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert node.returns is not None, f"{node.name} has no return type"
            given = [a for a in node.args.args + node.args.kwonlyargs
                     if a.arg not in ("self", "cls")]
            assert all(a.annotation for a in given), f"{node.name} has an argument without type"


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_it_is_where_it_comes_from_and_what_to_read_next(name):
    header = ast.get_docstring(TREES[name])
    assert 8 <= len(header.splitlines()) <= 50, len(header.splitlines())
    assert re.search(r"paper:|our reading:|LTX-2\.3:|[Ss]ource:|ST-DRC", header), "no label"
    assert (following := re.search(r"Read next: (\S+)", header)), "no 'Read next'"
    assert (ROOT / following[1].rstrip(".,")).is_file(), following[1]


def test_the_headers_lead_through_all_files_once():
    road = ["reference.py"]
    while road[-1] in TREES:
        following = re.search(r"Read next: (\S+)", ast.get_docstring(TREES[road[-1]]))[1]
        assert following not in road, f"{road[-1]} leads back to {following}"
        road.append(following)
    assert set(road[:-1]) == set(NAMES), set(NAMES) ^ set(road[:-1])


def test_no_line_is_wider_than_100_columns():
    wide = [f"{path.relative_to(ROOT)}:{i}" for path in EVERYTHING
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 100]
    assert not wide, wide


@pytest.mark.parametrize("name", EIGHT)
def test_the_eight_explain_themselves_with_a_comment_every_five_lines(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    docs = {line for node in ast.walk(TREES[f"{name}.py"])
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for line in range(node.lineno, node.end_lineno + 1)}
    comments = sum(token.type == tokenize.COMMENT and token.start[0] not in docs
                   for token in tokenize.generate_tokens(io.StringIO(source).readline))
    code = sum(bool(line.strip()) and not line.strip().startswith("#") and i not in docs
               for i, line in enumerate(source.splitlines(), 1))
    assert comments >= 0.2 * code, f"{comments} comments on {code} lines of code"


def test_the_product_touches_no_search_path_and_has_no_package_files():
    assert not [name for name in NAMES if "sys.path" in (ROOT / name).read_text(encoding="utf-8")]
    assert not [path for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
