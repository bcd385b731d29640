"""Shape comments are true: `# (B, S, D)` at the end of a line is the shape of what that line made.

A comment that begins with a shape is checked when its line has run, under a tracer: against what
was assigned (or returned, yielded, appended), or against the argument it stands beside. Every
letter has a number of its own (SIZES), so that no two axes can be mistaken. Grammar: `(B, S),
(U,)` one shape for each value; `(B, N) each`; `(B, S, D), or (U, D)` alternatives; `(B, N, D) ->
(B, nh, N, hd)` something at hand becomes the result; `...` any axes; sums, products and quotients
of letters. A name that is not in SIZES is a number or tuple of the function itself, such as
`size`.

What is counted: every `forward` of model.py and every public function of the five method files;
each of their shape comments has to come true at least once, and none may be false in any run.
Prose is not read.

Hardware: CPU, a few seconds. Run: python -m pytest tests/test_shapes.py -s   (-s prints the count)
"""

import ast
import functools
import importlib
import io
import re
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import guidance
import losses
import model
import reference
import rope

ROOT = Path(__file__).resolve().parent.parent
METHOD = ("rope", "reference", "augment", "losses", "guidance")
FILES = (*METHOD, "model")
# README's alphabet. L = F*H*W, R = H*W, S = L + R, D = nh*hd; all other numbers differ.
SIZES = {
    "B": 2,
    "F": 3,
    "H": 5,
    "W": 7,
    "C": 11,
    "L": 105,
    "R": 35,
    "S": 140,
    "D": 40,
    "nh": 4,
    "hd": 10,
    "N": 13,
}
B, F, H, W, C, L, R, S, D, nh, hd, N = SIZES.values()
M, U = 17, 6  # keys of an attention; noise levels that differ


# ---------------------------------------------------------------- reading comments


def bracketed(comment: str) -> list[tuple[str, str]]:
    """(words before it, content) of every outermost pair of parentheses."""
    found, depth, start, last = [], 0, 0, 0
    for i, char in enumerate(comment):
        if char == "(":
            start, depth = (i if depth == 0 else start), depth + 1
        elif char == ")" and depth:
            depth -= 1
            if depth == 0:
                found.append((comment[last:start], comment[start + 1 : i]))
                last = i + 1
    return found


def axes(content: str) -> list[str] | None:
    """ "B, C+1, F'" -> ["B", "C+1", "F_"], or None for what is no shape, such as a remark in
    parentheses."""
    if "," not in content:
        return None
    content = re.sub(r"([\w\]]) \(", r"\1*(", content.replace("'", "_").replace("^", "**"))
    parts = [part.strip() for part in content.rstrip(", ").split(",")]
    parts = [re.sub(r"^(.+) or (.+)$", r"(\1, \2)", part) for part in parts]  # "S or 1": either
    for part in parts:
        try:
            ast.parse(part, mode="eval")
        except SyntaxError:
            return None
    return parts


class Comment:
    """One comment: `before`, shapes that become the result; `shapes` of the result; how they are
    meant."""

    def __init__(self, line: int, words: str):
        self.line, self.words, self.before, self.shapes = line, words, [], []
        for lead, content in bracketed(words):
            shape = axes(content)
            if shape is None:
                continue
            if "->" in lead:
                self.before, self.shapes = self.shapes, []
            self.shapes.append(shape)
        self.alternatives = ", or (" in words
        self.begins = bool(self.shapes) and re.match(r"(?:each |[a-z]+ )?\(", words) is not None


def comments_of(source: str) -> dict[int, Comment]:
    """Line -> its comment, for comments behind code that begin with a shape."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip():
            comment = Comment(token.start[0], token.string.lstrip("# "))
            if comment.begins:
                found[comment.line] = comment
    return found


def functions_of(source: str) -> dict[str, ast.FunctionDef]:
    """Every function of a file by its qualified name; functions inside functions belong to
    those."""
    found = {}

    def walk(body: list, prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                walk(node.body, prefix + node.name + ".")
            elif isinstance(node, ast.FunctionDef):
                found[prefix + node.name] = node

    walk(ast.parse(source).body, "")
    return found


# ---------------------------------------------------------------- comparing


def fits(shape: list[str], actual: tuple, names: dict) -> bool:
    """Whether a shape of letters is this shape of numbers."""

    def axis(part: str, size: int) -> bool:
        value = eval(part, {"__builtins__": {}}, names)  # noqa: S307  (our own comments)
        return size in value if isinstance(value, tuple) else size == value

    if "..." in shape:
        i = shape.index("...")
        after = len(shape) - i - 1
        if len(actual) < len(shape) - 1:
            return False
        shape, actual = shape[:i] + shape[i + 1 :], (*actual[:i], *actual[len(actual) - after :])
    return len(shape) == len(actual) and all(
        axis(part, size) for part, size in zip(shape, actual, strict=True)
    )


def values_in(thing: object) -> list:
    """The tensors (or things with a shape) of a value: of a list, tuple or dict its items."""
    if isinstance(thing, dict):
        return list(thing.values())
    return list(thing) if isinstance(thing, tuple | list) else [thing]


def shapes_in(names: dict) -> list[tuple]:
    """Shapes of the tensors a frame knows by name, also with x[:, :, None], the one axis our code
    adds in place."""
    plain = [tuple(x.shape) for x in names.values() if isinstance(x, torch.Tensor)]
    return plain + [(*shape[:2], 1, *shape[2:]) for shape in plain]


def compare(comment: Comment, thing: object, names: dict, at_hand: list[tuple]) -> str | None:
    """None when the comment is true of the thing, else what is wrong. at_hand: shapes before the
    line ran."""
    things = values_in(thing)
    if things and all(isinstance(x, int) for x in things):  # B, S = x.shape
        things = [torch.empty(things, device="meta")]
    if any(not hasattr(x, "shape") for x in things) or not things:
        return f"no shape to compare with: {type(thing).__name__}"
    actual = [tuple(x.shape) for x in things]
    shapes = comment.shapes
    if comment.alternatives:
        true = all(any(fits(shape, a, names) for shape in shapes) for a in actual)
    elif len(shapes) == 1:
        true = all(fits(shapes[0], a, names) for a in actual)
    else:
        true = len(shapes) <= len(actual) and all(
            fits(s, a, names) for s, a in zip(shapes, actual, strict=False)
        )
    if true and comment.before:
        true = all(any(fits(shape, a, names) for a in at_hand) for shape in comment.before)
    return None if true else f"is {' and '.join(map(str, actual))}"


# ---------------------------------------------------------------- running


class Watch:
    """Runs calls and compares the shape comments of one function, and of functions inside it, as
    their lines finish."""

    def __init__(self, path: Path, name: str):
        source = path.read_text(encoding="utf-8")
        self.path, self.name, self.node = str(path), name, functions_of(source)[name]
        lines = range(self.node.lineno, self.node.end_lineno + 1)
        self.comments = {line: c for line, c in comments_of(source).items() if line in lines}
        self.statements, self.headers = (
            {},
            {},
        )  # line -> innermost simple statement; line -> function that begins there
        for node in ast.walk(self.node):
            if isinstance(node, ast.FunctionDef):
                self.headers |= dict.fromkeys(range(node.lineno, node.body[0].lineno), node)
            elif isinstance(node, ast.stmt) and not hasattr(node, "body"):
                self.statements |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), node)
        self.true: set[int] = set()
        self.false: dict[int, str] = {}

    def note(
        self, comment: Comment, thing: object, frame, sizes: dict, at_hand: list[tuple] = ()
    ) -> None:
        names = {
            name: x for name, x in frame.f_locals.items() if isinstance(x, int | tuple)
        } | sizes
        try:
            wrong = compare(comment, thing, names, at_hand)
        except NameError as error:
            wrong = f"cannot be read: {error}"
        if wrong is None:
            self.true.add(comment.line)
        else:
            self.false.setdefault(comment.line, f"line {comment.line}: '# {comment.words}' {wrong}")

    def finish(
        self, statement: ast.stmt, frame, sizes: dict, at_hand: list[tuple], result: object = None
    ) -> None:
        """A statement has run: compare its comments."""
        for comment in [
            c for line, c in self.comments.items() if self.statements.get(line) is statement
        ]:
            thing = result
            if not isinstance(statement, ast.Return) and not is_yield(statement):
                thing = assigned(statement, frame)
            parts = getattr(statement.value, "elts", [])
            own_lines = [part.end_lineno for part in parts]
            if (
                len(set(own_lines)) == len(parts) > 1 and comment.line in own_lines
            ):  # a tuple, one value per line
                thing = thing[own_lines.index(comment.line)]
            self.note(comment, thing, frame, sizes, at_hand)

    def arguments(self, frame, sizes: dict) -> None:
        node = self.headers.get(frame.f_code.co_firstlineno)
        for argument in node.args.args + node.args.kwonlyargs if node else []:
            comment, value = self.comments.get(argument.lineno), frame.f_locals.get(argument.arg)
            if comment and argument.lineno != node.lineno and value is not None:
                self.note(comment, value, frame, sizes)

    def run(self, call: Callable[[], object], sizes: dict) -> None:
        def local_tracer(frame):
            pending, at_hand = None, []

            def local(frame, event, result):
                nonlocal pending, at_hand
                if event == "line":
                    statement = self.statements.get(frame.f_lineno)
                    # A `with` is entered once more between a return's value and the return itself.
                    if (
                        pending is not None
                        and statement is not pending
                        and not isinstance(pending, ast.Return)
                    ):
                        if not is_yield(pending):
                            self.finish(pending, frame, sizes, at_hand)
                    if statement is not None or not isinstance(pending, ast.Return):
                        if pending is not statement:
                            pending, at_hand = statement, shapes_in(frame.f_locals)
                elif event == "return" and pending is not None:
                    self.finish(pending, frame, sizes, at_hand, result)
                    if isinstance(pending, ast.Return):
                        header = self.headers.get(frame.f_code.co_firstlineno)
                        if header and (
                            comment := self.comments.get(header.lineno)
                        ):  # def f(x):  # (B, 1)
                            self.note(comment, result, frame, sizes)
                return local

            return local

        def tracer(frame, event, _):
            code = frame.f_code
            ours = code.co_qualname == self.name or code.co_qualname.startswith(
                self.name + ".<locals>."
            )
            if (
                event != "call"
                or not ours
                or code.co_filename != self.path
                or code.co_name.startswith("<")
            ):
                return None
            self.arguments(frame, sizes)
            return local_tracer(frame)

        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            call()
        finally:
            sys.settrace(before)


def is_yield(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Yield)


def assigned(statement: ast.stmt, frame) -> object:
    """What a finished statement assigned or appended."""

    def value(target: ast.expr) -> object:
        return eval(
            compile(ast.Expression(target), "target", "eval"), frame.f_globals, frame.f_locals
        )  # noqa: S307

    def load(target: ast.expr) -> ast.expr:
        return ast.parse(ast.unparse(target), mode="eval").body

    if isinstance(statement, ast.Expr):  # kept.append(x)
        return value(load(statement.value.func.value))[-1]
    target = statement.targets[-1] if isinstance(statement, ast.Assign) else statement.target
    if isinstance(target, ast.Tuple):
        found = [value(load(part)) for part in target.elts]
        if all(isinstance(x, int) for x in found):
            return found
        return [
            x for part, x in zip(target.elts, found, strict=True) if getattr(part, "id", "") != "_"
        ]
    return value(load(target))


# ------------------------------------------------------------ cases: how each function is called

CASES: dict[str, list[tuple[Callable[[], object], dict]]] = {}


def case(name: str, **sizes: object) -> Callable:
    """The decorated function calls `name`, "file.Class.function"; sizes: further letters and their
    numbers."""

    def add(call: Callable) -> Callable:
        CASES.setdefault(name, []).append((call, {**SIZES, **sizes}))
        return call

    return add


rand = torch.rand
SMALL = model.TransformerConfig(in_channels=C, out_channels=C, num_layers=1, heads=nh, head_dim=hd)


LAYOUT = rope.Layout(F, H, W)


def positions(batch: int = B) -> torch.Tensor:
    both = torch.cat([LAYOUT.video_positions(), LAYOUT.reference_positions()], dim=1)
    return both[None].repeat(batch, 1, 1, 1)  # (B, 3, S, 2)


@case("rope.apply_rotary")
def _():
    rope.apply_rotary(rand(B, nh, N, hd), *rope.rotary_tables(rand(B, 3, N, 2), D, nh))


@case("rope.grid_to_positions", N=L)
def _():
    rope.grid_to_positions(rope.video_grid(F, H, W), 24)


@case("rope.video_grid")
def _():
    rope.video_grid(F, H, W)


@case("rope.reference_grid")
def _():
    rope.reference_grid(F, H, W)


@case("rope.rotary_tables", A=3, n=D // 6)
def _():
    rope.rotary_tables(rand(B, 4, N, 2), D, nh)


@case("rope.rotary_tables", A=1, n=D // 2)
def _():
    rope.rotary_tables(rand(B, 1, N, 2), D, nh, max_pos=(9,))


@case("rope.Layout._positions", N=L)
def _():
    rope.Layout(F, H, W, placement="overlap_phase").video_positions()


@case("rope.score_map", A=3)
def _():
    rope.score_map(LAYOUT, 0, dim=D, heads=nh)


@case("reference.letterbox", h=24, w=18)
def _():
    reference.letterbox(reference.Image.new("RGB", (36, 48)), 24, 50)


@case("reference.patchify")
def _():
    reference.patchify(rand(B, C, F, H, W))


@case("reference.unpatchify")
def _():
    reference.unpatchify(rand(B, L, C), F, H, W)


@case("reference.encode_reference", h=8 * H, w=8 * W)
def _():
    reference.encode_reference(lambda x: x.new_zeros(B, C, 1, H, W), rand(B, 3, 8 * H, 8 * W))


@case("reference.append_reference", A=3)
def _():
    beside = reference.Reference(rand(B, R, C), rand(3, R, 2))
    reference.append_reference(rand(B, L, C), [(rand(B), L)], rand(B, 3, L, 2), beside)


@case("reference.predict_velocity", A=3)
def _():
    beside = reference.Reference(rand(B, R, C), rand(3, R, 2))
    reference.predict_velocity(lambda x, *_: x, rand(B, L, C), rand(B), rand(3, L, 2), None, beside)


@case("losses._per_sample")
@case("losses.add_noise")
def _():
    losses.add_noise(rand(B, L, C), rand(B, L, C), rand(B))


@case("losses.clean_estimate")
def _():
    losses.clean_estimate(rand(B, L, C), rand(B, L, C), rand(B))


@case("losses.flow_matching_loss")
def _():
    losses.flow_matching_loss(rand(B, L, C), rand(B, L, C), torch.ones(B, L))


@case("losses._token_error")
def _():
    losses._token_error(rand(B, L, C), rand(B, L, C))


@case("losses.pool_face_mask", frames=9, h=4 * H, w=4 * W, k=2)
def _():
    losses.pool_face_mask(rand(B, 9, 4 * H, 4 * W), time_scale=4, space_scale=4)


@case("losses.face_weighted_loss")
def _():
    losses.face_weighted_loss(rand(B, L, C), rand(B, L, C), rand(B, L))


@case("losses.crop_faces")
def _():
    losses.crop_faces(rand(B, 3, 24, 30), rand(B, 4), 19)


@case("losses.identity_loss", E=19)
def _():
    losses.identity_loss(
        lambda x: x.flatten(1)[:, :19], rand(B, 3, 8, 8), rand(B, 19), torch.ones(B) > 0
    )


@case("guidance.guide")
def _():
    predict = lambda *_, **options: rand(B, L, C)  # noqa: E731
    guidance.guide(predict, guidance.Guidance(rescale=0.7, stg_scale=1.0))
    deltas = {}
    for _ in range(2):
        guidance.guide(predict, guidance.Guidance(), deltas)


@case("augment.augment_color")
def _():
    importlib.import_module("augment").augment_color(rand(B, 3, H, W), torch.Generator(), 1.0)


@case("augment.augment_reference")
def _():
    importlib.import_module("augment").augment_reference(rand(B, 3, H, W), torch.Generator())


@case("model.ChannelNorm.forward")
def _():
    model.ChannelNorm(D, 1e-6)(rand(B, N, D))


@case("model.Attention.forward", M=M, Dc=19)
def _():
    model.Attention(D, nh, context_dim=19)(rand(B, N, D), rand(B, M, 19))


@case("model.Attention._split")
def _():
    model.Attention(D, nh)._split(rand(B, N, D))


@case("model.FeedForward.forward")
def _():
    model.FeedForward(D)(rand(B, N, D))


@case("model.AdaLN.forward", rows=9)
def _():
    model.AdaLN(D, rows=9)(rand(B, S), torch.float32)


RUNS = [20, 20, 20, 20, 20, 40]  # tokens of each of U noise levels, S together


def run_block(bias: torch.Tensor | None, count: int, runs: list[int] | None) -> None:
    block, tables = model.Block(SMALL), rope.rotary_tables(positions(), D, nh)
    levels = model.Levels(rand(B, count, 9, D), runs)
    prompt = model.Levels(rand(B, 1, 2, D), None)
    block(rand(B, S, D), rand(B, N, D), levels, prompt, tables, bias, rand(B, 1, 1, N), False)


@case("model.Block.forward", U=U)
def _():
    run_block(rand(B, 1, 1, S), U, RUNS)


@case("model.Block.forward", U=1)
def _():
    run_block(None, 1, None)


@case("model.Block.forward", U=S)
def _():
    run_block(rand(B, 1, S, S), S, None)


@case("model.Levels.apply", U=U)
def _():
    levels = model.Levels(rand(B, U, 9, D), RUNS)
    levels.apply(model.add_gated, [rand(B, S, D), rand(B, S, D)], [rand(B, U, D)])


def run_model(timesteps: object, mask: torch.Tensor, grad: bool) -> None:
    net = model.VideoTransformer(SMALL)
    net.gradient_checkpointing = grad
    with torch.set_grad_enabled(grad):
        net(rand(B, S, C), timesteps, rand(B), positions(), rand(B, N, D), rand(B, N), mask)


@case("model.VideoTransformer.forward", U=U)
def _():
    run_model([(rand(B), count) for count in RUNS], rand(B, 1, S), grad=True)


@case("model.VideoTransformer.forward", U=S)
def _():
    run_model(rand(B, S), rand(B, S, S), grad=False)


@case("model.ltx_sigmas", steps=9)
def _():
    model.ltx_sigmas(9)


# ---------------------------------------------------------------- what is claimed


def counted(name: str) -> dict[str, ast.FunctionDef]:
    """The functions of a file whose comments have to come true."""
    functions = functions_of((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    if name == "model":
        return {key: node for key, node in functions.items() if key.endswith(".forward")}
    return {key: node for key, node in functions.items() if not key.startswith("_")}


@functools.cache
def watched(name: str) -> Watch:
    file, function = name.split(".", 1)
    watch = Watch(ROOT / f"{file}.py", function)
    for call, sizes in CASES.get(name, []):
        watch.run(call, sizes)
    return watch


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_shape_comment_is_false(name):
    watch = watched(name)
    assert not watch.false, "\n".join(watch.false.values())


@pytest.mark.parametrize("name", FILES)
def test_every_shape_comment_of_what_is_counted_comes_true(name):
    total = 0
    for function in counted(name):
        watch = watched(f"{name}.{function}")
        never = [
            f"line {line}: '# {c.words}'"
            for line, c in watch.comments.items()
            if line not in watch.true
        ]
        assert not never, f"{function}: no case runs, or attaches, {'; '.join(never)}; add a case"
        total += len(watch.true)
    print(f"{name}.py: {total} shape comments in {len(counted(name))} functions, all true")


FALSE = """
def f(x):
    B, S, D = x.shape                          # (B, S, D)
    y = x.transpose(1, 2)                      # (B, S, D)
    a, b = y, y[0]                             # (B, D, S), (D, S)
    z = y.flatten(1)                           # (B, 7*S) -> (B, S*D)
    for _ in range(2):
        w = z[:1]                              # (B, S*D)
    return (
        y,                                     # (B, D, S)
        z,                                     # (..., D)
    )
"""


def test_a_false_comment_is_found_and_a_true_one_is_not(tmp_path):
    path = tmp_path / "false.py"
    path.write_text(FALSE, encoding="utf-8")
    names = {}
    exec(compile(FALSE, str(path), "exec"), names)  # noqa: S102
    watch = Watch(path, "f")
    watch.run(lambda: names["f"](rand(B, S, D)), {"B": B, "S": S, "D": D})
    assert sorted(watch.false) == [4, 6, 8, 11], watch.false
    assert watch.true == {3, 5, 10}
    assert watch.false[4] == f"line 4: '# (B, S, D)' is {(B, D, S)}"
