"""Who may import whom, and what nobody may: the rules of docs/architecture.md as a walk over the source.

The checker is tested itself, on small sources that break each rule.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("shm", "workers", "scheduler", "runtime")  # each may import itself and those before it

# Sockets, clocks and processes: code that uses them cannot be replayed in a test.
IMPURE = frozenset(
    {"zmq", "socket", "time", "asyncio", "subprocess", "threading", "concurrent", "multiprocessing", "signal"}
)
IMPURE_ALLOWED = (
    "runtime/*",
    "scheduler/decoder/crew.py",
    "scheduler/process.py",
    "scheduler/lane*.py",
    "workers/pinned.py",
    "workers/process.py",
    "workers/serve.py",
    "workers/paging*",
)

# Whoever decodes these runs what the sender wrote.
CODE_FORMATS = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"})
CODE_CALLS = frozenset({"eval", "exec", "recv_pyobj", "send_pyobj"})
# file -> why it may call eval or exec; kernels generated from a template of ours are such a reason.
CODE_ALLOWED: dict[str, str] = {}


def imported(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module name) of every import in the file at `path`, relative ones resolved.

    `from x import y` yields both x and x.y, because y may be a module.
    """
    package = ["sterna", *Path(path).with_suffix("").parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            yield node.lineno, ".".join(parts)
            for alias in node.names:
                yield node.lineno, ".".join([*parts, alias.name])
        elif isinstance(node, ast.Call) and called_name(node) in {"import_module", "__import__"}:
            yield from ((node.lineno, str(arg.value)) for arg in node.args if isinstance(arg, ast.Constant))


def called_name(call: ast.Call) -> str:
    """Return the last name of what is called: recv_pyobj for sock.recv_pyobj(...), "" if there is none."""
    if isinstance(call.func, ast.Name):
        return call.func.id
    return call.func.attr if isinstance(call.func, ast.Attribute) else ""


def is_code_call(call: ast.Call) -> bool:
    """Whether `call` runs text or bytes as code; a method named eval or exec is somebody's own."""
    name = called_name(call)
    if name in {"eval", "exec"} and isinstance(call.func, ast.Attribute):
        return isinstance(call.func.value, ast.Name) and call.func.value.id == "builtins"
    return name in CODE_CALLS


def violations(source: str, path: str) -> list[str]:
    """Return every broken rule in `source`, the file at `path` (relative to the repository)."""
    tree = ast.parse(source)
    folder = path.split("/")[0]
    above = FOLDERS[FOLDERS.index(folder) + 1 :]
    found = set()
    for line, module in imported(tree, path):
        parts = module.split(".")
        if parts[0] == "sterna" and len(parts) > 1 and parts[1] in above:
            found.add(f"{path}:{line}: {folder} may not import {parts[1]}")
        if parts[0] in IMPURE and not any(fnmatch(path, pattern) for pattern in IMPURE_ALLOWED):
            found.add(f"{path}:{line}: {parts[0]} belongs into the process entry points")
        if parts[0] in CODE_FORMATS:
            found.add(f"{path}:{line}: {parts[0]} runs what it reads")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and is_code_call(node) and path not in CODE_ALLOWED:
            found.add(f"{path}:{node.lineno}: call of {called_name(node)}")
    return sorted(found)


def source_files() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_source_keeps_the_rules() -> None:
    files = source_files()
    assert len(files) > 10
    broken = [line for path in files for line in violations((ROOT / path).read_text(), path)]
    assert not broken, "\n" + "\n".join(broken)


def test_nothing_in_the_repository_reads_pickles() -> None:
    others = [
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
        ROOT / "src/sterna/__init__.py",
    ]
    for path in others:
        for line, module in imported(ast.parse(path.read_text()), str(path.relative_to(ROOT))):
            assert module.split(".")[0] not in CODE_FORMATS, f"{path}:{line}"


def test_every_exception_is_still_needed() -> None:
    """A file that no longer exists, or no longer does what it was excepted for, must leave its list."""
    files = source_files()
    for pattern in IMPURE_ALLOWED:
        matching = [path for path in files if fnmatch(path, pattern)]
        roots = {
            module.split(".")[0]
            for path in matching
            for _, module in imported(ast.parse((ROOT / path).read_text()), path)
        }
        assert roots & IMPURE, pattern
    for path in CODE_ALLOWED:
        tree = ast.parse((ROOT / path).read_text())
        assert any(isinstance(node, ast.Call) and is_code_call(node) for node in ast.walk(tree)), path


@pytest.mark.parametrize(
    ("path", "source", "text"),
    [
        ("shm/a.py", "from ..workers.serve import x", "shm may not import workers"),
        ("workers/a.py", "from ..scheduler import state", "workers may not import scheduler"),
        ("workers/kernels/a.py", "from ...runtime import config", "workers may not import runtime"),
        ("workers/kernels/a.py", "from ... import runtime", "workers may not import runtime"),
        ("scheduler/a.py", "import sterna.runtime.config", "scheduler may not import runtime"),
        ("scheduler/a.py", "from sterna import runtime", "scheduler may not import runtime"),
        ("scheduler/a.py", "def f():\n    from ..runtime import config", "scheduler may not import runtime"),
        ("scheduler/a.py", "import_module('sterna.runtime.config')", "scheduler may not import runtime"),
        ("scheduler/state.py", "import time", "time belongs into"),
        ("scheduler/state.py", "from time import monotonic", "time belongs into"),
        ("scheduler/model/process.py", "import socket", "socket belongs into"),
        ("workers/kernels/a.py", "import multiprocessing.shared_memory", "multiprocessing belongs into"),
        ("shm/slots.py", "import threading", "threading belongs into"),
        ("shm/arena.py", "if True:\n    import zmq.asyncio", "zmq belongs into"),
        ("runtime/a.py", "import pickle", "pickle runs what it reads"),
        ("runtime/a.py", "from shelve import open", "shelve runs what it reads"),
        ("runtime/a.py", "x = sock.recv_pyobj()", "call of recv_pyobj"),
        ("runtime/a.py", "sock.send_pyobj(1)", "call of send_pyobj"),
        ("workers/a.py", "eval('1')", "call of eval"),
        ("workers/kernels/a.py", "builtins.exec('1')", "call of exec"),
    ],
)
def test_checker_sees_a_broken_rule(path: str, source: str, text: str) -> None:
    found = violations(source, path)
    assert len(found) == 1
    assert text in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "runtime/a.py",
            "from ..shm.errors import X\nfrom ..scheduler import state\nimport asyncio, zmq, time",
        ),
        (
            "scheduler/a.py",
            "from ..workers.messages import X\nfrom .model import y\nfrom ..shm.arena import Arena",
        ),
        ("scheduler/lane/zeromq.py", "import zmq, time, signal"),
        ("scheduler/process.py", "import signal"),
        ("workers/paging/reader.py", "import threading"),
        ("workers/serve.py", "import time"),
        ("workers/kernels/a.py", "import numba\nmodel.eval()\nfrom .timer import time"),
    ],
)
def test_checker_accepts_what_is_allowed(path: str, source: str) -> None:
    assert violations(source, path) == []


DAEMON_MODULES = [
    "processes.supervisor",
    "daemon.daemon",
    "client.client",
    "client.async_client",
    "cli.main",
]


@pytest.mark.parametrize("module", DAEMON_MODULES)
def test_daemon_and_clients_never_import_numba(module: str) -> None:
    """Numba costs 0.6 s and 90 MB, and the process that has compiled must not be the one that serves."""
    check = (
        f"import sys, sterna.runtime.{module}; "
        "sys.exit(', '.join(sorted({'numba', 'llvmlite'} & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"sterna.runtime.{module}: {result.stderr}"


def test_one_place_starts_python() -> None:
    """A second one could forget what keeps the files of the current folder out of our processes."""
    found = [path for path in source_files() if "sys.executable" in (ROOT / path).read_text()]
    assert found == ["runtime/python_command.py"]
