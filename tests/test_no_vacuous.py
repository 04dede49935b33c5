"""No test that cannot fail: a lint over this folder, itself shown to find what it looks for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

# Calls whose value is the whole point: as a statement they check nothing.
_VERDICTS = {"allclose", "isclose", "equal", "array_equal", "issubset", "is_contiguous"}
# Calls that fail by themselves.
_FAILING = {"raises", "warns", "fail", "opcheck", "deprecated_call", "gradcheck"}


def _called(node: ast.AST) -> str:
    """The last name of a call's function: `c` of a.b.c(...)."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _asserts(function: ast.FunctionDef, asserting: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        name = _called(node)
        if name.startswith("assert") or name in _FAILING or name in asserting:
            return True
    return False


def asserting_helpers(trees: list[ast.AST]) -> set[str]:
    """Functions that assert, directly or through another one."""
    helpers: set[str] = set()
    while True:
        found = {f.name for tree in trees for f in _functions(tree) if _asserts(f, helpers)}
        if found == helpers:
            return helpers
        helpers = found


def vacuous(tree: ast.AST, helpers: set[str]) -> list[str]:
    """Everything in a test file that looks like a check and is none."""
    found = []
    for node in ast.walk(tree):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Expr) and _called(node.value) in _VERDICTS:
            found.append(f"{where}: the verdict of {_called(node.value)}() is dropped")
        elif isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant | ast.Tuple):
            found.append(f"{where}: assert of a constant or a tuple")
        elif isinstance(node, ast.ExceptHandler) and _swallows(node):
            found.append(f"{where}: a swallowed exception")
        elif _called(node) == "suppress":
            found.append(f"{where}: contextlib.suppress")
        elif _called(node) == "raises" and _catches_all(node):
            found.append(f"{where}: pytest.raises of any exception, without match")
    for function in _functions(tree):
        if function.name.startswith("test") and not _asserts(function, helpers):
            found.append(f"line {function.lineno}: {function.name} asserts nothing")
    found += _skipped_whole(tree)
    return found


def _swallows(handler: ast.ExceptHandler) -> bool:
    return all(isinstance(s, ast.Pass | ast.Continue | ast.Return) for s in handler.body)


def _catches_all(call: ast.AST) -> bool:
    assert isinstance(call, ast.Call)
    names = {getattr(argument, "id", "") for argument in call.args}
    return bool(names & {"Exception", "BaseException"}) and not call.keywords


def _skipped_whole(tree: ast.AST) -> list[str]:
    """A module or test under an unconditional skip or an expected failure."""
    marks = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        f"line {node.lineno}: unconditional pytest.mark.{node.attr}"
        for node in marks
        if node.attr in ("skip", "xfail")
        and getattr(node.value, "attr", "") == "mark"
        # conftest marks what this machine cannot run, test by test.
        and not any(_called(call) == "add_marker" for call in ast.walk(tree))
    ]


def _trees() -> dict[str, ast.AST]:
    return {path.name: ast.parse(path.read_text()) for path in sorted(TESTS.rglob("*.py"))}


def test_no_test_is_vacuous():
    trees = _trees()
    helpers = asserting_helpers(list(trees.values()))
    found = [f"{name} {text}" for name, tree in trees.items() for text in vacuous(tree, helpers)]
    assert not found, "\n".join(found)


def test_every_test_file_has_tests():
    empty = [
        name
        for name, tree in _trees().items()
        if name.startswith("test_") and not any(f.name.startswith("test") for f in _functions(tree))
    ]
    assert not empty


@pytest.mark.parametrize(
    "planted",
    [
        "def test_a():\n    torch.allclose(x, y)\n    assert x",
        "def test_a():\n    x.equal(y)\n    assert x",
        "def test_a():\n    run()",
        "def test_a():\n    helper()\n\ndef helper():\n    return 1",
        "def test_a():\n    try:\n        assert f()\n    except Exception:\n        pass",
        "def test_a():\n    for x in y:\n        try:\n            assert x\n        except:\n"
        "            continue",
        "def test_a():\n    with suppress(ValueError):\n        assert f()",
        "def test_a():\n    assert True",
        "def test_a():\n    assert (x == y, 'equal')",
        "def test_a():\n    with pytest.raises(Exception):\n        f()",
        "@pytest.mark.skip(reason='later')\ndef test_a():\n    assert f()",
        "pytestmark = pytest.mark.skip\n\ndef test_a():\n    assert f()",
        "@pytest.mark.xfail\ndef test_a():\n    assert f()",
    ],
)
def test_planted_vacuity_is_found(planted):
    tree = ast.parse(planted)
    assert vacuous(tree, asserting_helpers([tree]))


@pytest.mark.parametrize(
    "honest",
    [
        "def test_a():\n    assert torch.allclose(x, y)",
        "def test_a():\n    helper()\n\ndef helper():\n    other()\n\ndef other():\n    assert x",
        "def test_a():\n    with pytest.raises(ValueError, match='shape'):\n        f()",
        "def test_a():\n    torch.testing.assert_close(x, y)",
        "def test_a():\n    try:\n        f()\n    except ValueError as error:\n"
        "        assert 'shape' in str(error)",
    ],
)
def test_honest_tests_pass_the_lint(honest):
    tree = ast.parse(honest)
    assert not vacuous(tree, asserting_helpers([tree]))
