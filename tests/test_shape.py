"""How long files and functions are, that they say what they are for, and where attributes are made.

The limits are design/style rules; the figures printed are those by which other code was judged
(median file, median and 90th percentile function, share with docstring and return type).
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("runtime", "scheduler", "workers", "shm")
KERNELS = "workers/kernels/"

MAX_FILE_LINES = 400
MAX_MEDIAN_FILE_LINES = 150
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 90

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A function or class: where, what, and whether somebody else may use it."""

    path: str
    name: str
    node: Function | ast.ClassDef
    public: bool

    @property
    def where(self) -> str:
        return f"{self.path}:{self.node.lineno}: {self.name}"

    @property
    def num_lines(self) -> int:
        """Lines from `def` to the last, without decorators."""
        assert self.node.end_lineno is not None
        return self.node.end_lineno - self.node.lineno + 1

    @property
    def documented(self) -> bool:
        """An @overload shares the docstring of what it overloads."""
        return ast.get_docstring(self.node) is not None or any(
            isinstance(decorator, ast.Name) and decorator.id == "overload"
            for decorator in self.node.decorator_list
        )

    @property
    def typed(self) -> bool:
        return isinstance(self.node, ast.ClassDef) or self.node.returns is not None


def definitions(tree: ast.Module, path: str) -> Iterator[Definition]:
    """Yield every function and class of a file, also nested ones; those are never public."""
    stack: list[tuple[ast.AST, str, bool]] = [(tree, "", True)]
    while stack:
        parent, prefix, reachable = stack.pop()
        for node in ast.iter_child_nodes(parent):
            if not isinstance(node, Function | ast.ClassDef):
                stack.append((node, prefix, reachable))
                continue
            public = reachable and not node.name.startswith("_")
            yield Definition(path=path, name=prefix + node.name, node=node, public=public)
            stack.append((node, f"{prefix}{node.name}.", public and isinstance(node, ast.ClassDef)))


def late_attributes(node: ast.ClassDef) -> list[str]:
    """Return the attributes that a method makes though `__init__` does not; bases may make some, unseen."""
    if node.bases:
        return []
    fields = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
    made = {target.id for target in fields if isinstance(target, ast.Name)}
    stored: set[str] = set()
    for method in node.body:
        if isinstance(method, Function):
            found = {
                each.attr
                for each in ast.walk(method)
                if isinstance(each, ast.Attribute)
                and isinstance(each.ctx, ast.Store)
                and isinstance(each.value, ast.Name)
                and each.value.id == "self"
            }
            target = made if method.name in ("__init__", "__post_init__") else stored
            target |= found
    return sorted(stored - made)


def problems(source: str, path: str) -> list[str]:
    """Return what breaks a limit in `source`, the file at `path` (relative to the repository)."""
    tree = ast.parse(source)
    found = []
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        found.append(f"{path}: {lines} lines, limit {MAX_FILE_LINES}")
    if source.strip() and ast.get_docstring(tree) is None:
        found.append(f"{path}: no module docstring")
    limit = MAX_KERNEL_LINES if path.startswith(KERNELS) else MAX_FUNCTION_LINES
    for each in definitions(tree, path):
        if isinstance(each.node, ast.ClassDef):
            late = late_attributes(each.node)
            found += [f"{each.where}.{name}: not made in __init__" for name in late]
        if isinstance(each.node, Function):
            if each.num_lines > limit:
                found.append(f"{each.where}: {each.num_lines} lines, limit {limit}")
            # Numba types the arguments and results of kernels.
            if not each.typed and not path.startswith(KERNELS):
                found.append(f"{each.where}: no return annotation")
        if each.public and not each.documented and not path.startswith(KERNELS):
            found.append(f"{each.where}: no docstring")
    return found


def sources() -> dict[str, str]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def test_source_keeps_its_shape(capsys: pytest.CaptureFixture[str]) -> None:
    files = sources()
    assert len(files) > 10
    file_lines = [len(text.splitlines()) for text in files.values()]
    every = [each for path, text in files.items() for each in definitions(ast.parse(text), path)]
    functions = [each for each in every if isinstance(each.node, Function)]
    lengths = sorted(each.num_lines for each in functions)
    documented = sum(each.documented for each in functions) / len(functions)
    typed = sum(each.typed for each in functions) / len(functions)
    with capsys.disabled():
        print(
            f"\nshape: {len(files)} files, {sum(file_lines)} lines; "
            f"file median {statistics.median(file_lines):.0f} max {max(file_lines)}; "
            f"function median {statistics.median(lengths):.0f} "
            f"p90 {lengths[len(lengths) * 9 // 10]} max {lengths[-1]}; "
            f"with docstring {documented:.0%}, with return type {typed:.0%}"
        )
    assert statistics.median(file_lines) <= MAX_MEDIAN_FILE_LINES
    found = [line for path, text in files.items() for line in problems(text, path)]
    assert not found, "\n" + "\n".join(found)


def test_no_file_of_tests_is_too_long() -> None:
    texts = {path: path.read_text() for path in sorted((ROOT / "tests").rglob("*.py"))}
    assert len(texts) > 100
    lengths = {str(path.relative_to(ROOT)): len(text.splitlines()) for path, text in texts.items()}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


DOC = '"""Doc."""\n'


def body(lines: int) -> str:
    """Return a documented function of `lines` lines."""
    return DOC + 'def f() -> None:\n    """Doc."""\n' + "    x = 1\n" * (lines - 2)


@pytest.mark.parametrize(
    ("path", "source", "text"),
    [
        ("shm/a.py", DOC + "x = 1\n" * 400, "401 lines, limit 400"),
        ("shm/a.py", "x = 1\n", "no module docstring"),
        ("shm/a.py", body(61), "f: 61 lines, limit 60"),
        ("workers/kernels/a.py", body(91), "f: 91 lines, limit 90"),
        ("shm/a.py", DOC + "def _f():\n    return 1\n", "_f: no return annotation"),
        (
            "workers/a.py",
            DOC + "def _f() -> None:\n    def g():\n        return 1\n",
            "_f.g: no return ann",
        ),
        ("shm/a.py", DOC + "def f() -> int:\n    return 1\n", "f: no docstring"),
        ("shm/a.py", DOC + "if x:\n    def f() -> int:\n        return 1\n", "f: no docstring"),
        ("shm/a.py", DOC + "class A:\n    x: int\n", "A: no docstring"),
        (
            "shm/a.py",
            DOC + f"class A:\n    {DOC}    async def f(self) -> int:\n        return 1\n",
            "A.f: no docs",
        ),
        (
            "shm/a.py",
            DOC + "class _A:\n    def f(self) -> None:\n        self.x = self.y = 1\n    y: int\n",
            "_A.x: not made in __init__",
        ),
    ],
)
def test_checker_sees_what_is_out_of_shape(path: str, source: str, text: str) -> None:
    found = problems(source, path)
    assert len(found) == 1, found
    assert text in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("shm/a.py", DOC + "x = 1\n" * 399),
        ("shm/a.py", body(60)),
        ("workers/kernels/a.py", body(90)),
        ("shm/__init__.py", ""),
        ("workers/kernels/a.py", DOC + "def f() -> int:\n    return 1\n"),
        ("shm/a.py", DOC + "@overload\ndef f() -> int: ...\n"),
        ("shm/a.py", DOC + "class _A:\n    def f(self) -> int:\n        return 1\n"),
        ("shm/a.py", DOC + "def _f() -> int:\n    def g() -> int:\n        return 1\n    return g()\n"),
        (
            "shm/a.py",
            DOC + "class _A:\n    def __init__(self) -> None:\n        self.x = 0\n"
            "    def f(self) -> None:\n        self.x = 1\n",
        ),
    ],
)
def test_checker_accepts_what_is_in_shape(path: str, source: str) -> None:
    assert problems(source, path) == []
