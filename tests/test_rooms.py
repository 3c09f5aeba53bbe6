"""The rooms: which folder may import which, that no import goes in a circle, and how full each one is.

In here: the layout below the four folders. Not in here: the order of the four folders and what nobody may
import (`test_architecture.py`), the length of files (`test_shape.py`).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from .test_architecture import FOLDERS, ROOT, imported, source_files

MAX_MODULES = 20

# room -> the rooms beside it in the same folder that it may import. The folder itself (`runtime` for
# runtime/config.py) stands for the modules that lie directly in it. What lies in a lower folder is open to
# all, but for `CLOSED`.
MAY_IMPORT: dict[str, set[str]] = {
    "runtime": {"runtime/protocol"},
    "runtime/protocol": set(),
    "runtime/text": set(),
    "runtime/chat": {"runtime", "runtime/protocol", "runtime/text"},
    "runtime/client": {"runtime/protocol"},
    "runtime/memory": {"runtime"},
    "runtime/processes": {"runtime", "runtime/memory"},
    "runtime/examine": {"runtime", "runtime/chat", "runtime/memory", "runtime/text"},
    "runtime/quality": {"runtime/client", "runtime/protocol"},
    "runtime/quantize": {"runtime", "runtime/memory", "runtime/text"},
    "runtime/bench": set(),
    "runtime/daemon": {
        "runtime",
        "runtime/daemon/engine",
        "runtime/daemon/model",
        "runtime/memory",
        "runtime/processes",
        "runtime/protocol",
        "runtime/quality",
        "runtime/text",
    },
    "runtime/daemon/engine": {"runtime", "runtime/daemon", "runtime/daemon/model", "runtime/processes"},
    "runtime/daemon/model": {
        "runtime",
        "runtime/chat",
        "runtime/memory",
        "runtime/protocol",
        "runtime/text",
    },
    "runtime/cli": {
        "runtime",
        "runtime/cli/commands",
        "runtime/client",
        "runtime/daemon",
        "runtime/examine",
        "runtime/protocol",
    },
    "runtime/cli/commands": {
        "runtime",
        "runtime/bench",
        "runtime/chat",
        "runtime/cli",
        "runtime/client",
        "runtime/daemon",
        "runtime/examine",
        "runtime/processes",
        "runtime/protocol",
        "runtime/quality",
        "runtime/quantize",
    },
    "scheduler": {
        "scheduler/decoder",
        "scheduler/experts",
        "scheduler/lane",
        "scheduler/model",
        "scheduler/residency",
    },
    "scheduler/lane": {"scheduler", "scheduler/model"},
    "scheduler/model": {"scheduler/model/families"},
    "scheduler/model/families": {"scheduler/model"},
    "scheduler/decoder": {"scheduler", "scheduler/model"},
    "scheduler/residency": {"scheduler", "scheduler/model"},
    "scheduler/residency/precision": {"scheduler/model"},
    "scheduler/residency/reference": {"scheduler/residency"},
    "scheduler/residency/replay": {"scheduler/residency"},
    "scheduler/experts": {
        "scheduler",
        "scheduler/decoder",
        "scheduler/lane",
        "scheduler/model",
        "scheduler/residency",
        "scheduler/residency/replay",
    },
    "workers": {
        "workers/checkpoint/held",
        "workers/checkpoint/types",
        "workers/kernels",
        "workers/kernels/layers",
        "workers/kernels/products",
        "workers/kernels/routing",
        "workers/paging",
    },
    "workers/paging": {"workers", "workers/checkpoint/held", "workers/checkpoint/types"},
    "workers/checkpoint/types": set(),
    "workers/checkpoint/file": {"workers/checkpoint/types"},
    "workers/checkpoint/held": {
        "workers/checkpoint/types",
        "workers/kernels/packing",
        "workers/kernels/products",
    },
    "workers/kernels": {"workers", "workers/kernels/simd"},
    "workers/kernels/simd": {"workers/kernels"},
    "workers/kernels/products": {"workers/kernels", "workers/kernels/simd"},
    "workers/kernels/packing": {"workers/kernels", "workers/kernels/products", "workers/kernels/simd"},
    "workers/kernels/layers": {
        "workers",
        "workers/kernels",
        "workers/kernels/products",
        "workers/kernels/simd",
    },
    "workers/kernels/measure": {"workers", "workers/kernels", "workers/kernels/simd"},
    "workers/kernels/routing": {"workers", "workers/kernels"},
    "shm": set(),
}

# room -> lower folders that are closed to it: clients must run where no engine does.
CLOSED: dict[str, set[str]] = {
    "runtime/client": {"scheduler", "workers"},
    "runtime/text": {"scheduler", "workers"},
    "runtime/chat": {"scheduler", "workers"},
}

# Rooms of processes that serve or ask: numba costs 0.6 s and 90 MB, and whoever compiled must not serve.
WITHOUT_NUMBA = (
    "runtime",
    "runtime/chat",
    "runtime/cli",
    "runtime/client",
    "runtime/daemon",
    "runtime/daemon/engine",
    "runtime/daemon/model",
    "runtime/memory",
    "runtime/processes",
    "runtime/protocol",
    "runtime/quality",
    "runtime/text",
)
# Import the compiler, or ask it what the CPU can do; only the fork server and its children import them.
ASK_FOR_FEATURES = (
    "sterna.runtime.processes.kernel_environment",
    "sterna.runtime.processes.kernel_steps",
    "sterna.runtime.processes.kernel_target",
)

Graph = Mapping[str, Iterable[str]]


def module_of(path: str) -> str:
    """Return the dotted name of a source file: sterna.shm.slots for shm/slots.py."""
    return "sterna." + path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module_of(path): path for path in source_files()}


def room_of(module: str) -> str:
    return str(Path(MODULES[module]).parent)


def imports() -> dict[str, set[str]]:
    """Return module -> the modules of ours that it imports, wherever in the file; packages left out."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if path.endswith("__init__.py"):
            continue  # no more than a docstring: test_packages_import_nothing
        names = {name for _, name in imported(ast.parse((ROOT / path).read_text()), path)}
        graph[module] = {n for n in names if n in MODULES and not MODULES[n].endswith("__init__.py")}
        graph[module].discard(module)
    return graph


IMPORTS = imports()


def circles(graph: Graph) -> list[list[str]]:
    """Return every set of two or more nodes that reach each other, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in order:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], order[other])
        if lowest[node] == order[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in order:
            visit(node)
    return found


def level(package: str, graph: Graph) -> dict[str, set[str]]:
    """Return which of a package's own modules and folders import which, each folder taken as one."""
    prefix, depth = package + ".", package.count(".") + 1
    found: dict[str, set[str]] = defaultdict(set)
    for module, others in graph.items():
        for other in others:
            if module.startswith(prefix) and other.startswith(prefix):
                here, there = module.split(".")[depth], other.split(".")[depth]
                if here != there:
                    found[here].add(there)
    return found


def packages() -> list[str]:
    return sorted({name.rpartition(".")[0] for name in MODULES if name.count(".") > 1} | {"sterna"})


def rooms() -> dict[str, set[str]]:
    """Return room -> the other rooms that it imports."""
    found: dict[str, set[str]] = {room_of(module): set() for module in IMPORTS}
    for module, others in IMPORTS.items():
        found[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    return found


def test_rooms_import_what_they_may(capsys: pytest.CaptureFixture[str]) -> None:
    found = rooms()
    sizes = Counter(room_of(module) for module in IMPORTS)
    with capsys.disabled():
        print("\nrooms, with their modules and what they import inside their folder:")
        for room, others in found.items():
            beside = sorted(other for other in others if other.split("/")[0] == room.split("/")[0])
            print(f"  {room:32} {sizes[room]:2}  {' '.join(beside) or '-'}")
    assert set(found) == set(MAY_IMPORT), "a room is missing here, or one is gone"
    wrong = []
    for room, others in found.items():
        folder = room.split("/")[0]
        beside = {other for other in others if other.split("/")[0] == folder}
        wrong += [f"{room} may not import {other}" for other in beside - MAY_IMPORT[room]]
        wrong += [
            f"{room} may not import {other}"
            for other in others
            if other.split("/")[0] in CLOSED.get(room, ())
        ]
    assert not wrong, "\n".join(sorted(wrong))


def test_every_permission_is_used() -> None:
    found = rooms()
    idle = {room: allowed - found[room] for room, allowed in MAY_IMPORT.items() if allowed - found[room]}
    assert not idle, idle


def test_packages_import_nothing() -> None:
    """Whoever imports one module of a room does not pay for the others."""
    for path in source_files():
        if path.endswith("__init__.py"):
            assert not list(imported(ast.parse((ROOT / path).read_text()), path)), path


def test_no_import_goes_in_a_circle() -> None:
    assert circles(IMPORTS) == []


@pytest.mark.parametrize("package", packages())
def test_no_circle_at_any_level(package: str) -> None:
    """The children of a folder, files and folders alike, have an order in which each imports earlier ones."""
    assert circles(level(package, IMPORTS)) == []


def test_no_room_is_too_full() -> None:
    paths = [*source_files(), *(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py"))]
    sizes = Counter(str(Path(path).parent) for path in paths if not path.endswith("__init__.py"))
    full = {room: size for room, size in sizes.items() if size > MAX_MODULES}
    assert not full, full


def test_folders_that_never_import_numba() -> None:
    modules = [module for module in MODULES if room_of(module) in WITHOUT_NUMBA]
    modules = [module for module in modules if module not in ASK_FOR_FEATURES]
    assert len(modules) > 50
    script = (
        "import sys\nfrom importlib import import_module\n"
        f"for name in {modules!r}:\n"
        "    import_module(name)\n"
        "    if {'numba', 'llvmlite'} & set(sys.modules): sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_two_classes_share_a_name() -> None:
    """But for messages: each protocol names them as it likes."""
    where: dict[str, list[str]] = defaultdict(list)
    for path in source_files():
        if path.endswith(("messages.py", "_wire.py")):
            continue
        for node in ast.parse((ROOT / path).read_text()).body:
            if isinstance(node, ast.ClassDef):
                where[node.name.lstrip("_")].append(path)
    shared = {name: paths for name, paths in where.items() if len(paths) > 1}
    assert not shared, shared


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"a": ["b"], "b": ["a"]}, [["a", "b"]]),
        ({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["d"]}, [["b", "c"]]),
    ],
)
def test_circles_are_found(graph: Graph, found: list[list[str]]) -> None:
    assert circles(graph) == found


def test_a_level_takes_a_folder_as_one() -> None:
    graph = {"p.a.x": ["p.b.y", "p.a.z"], "p.b.w": ["p.a.z"], "p.a.z": [], "q.a": ["p.b.y"]}
    assert level("p", graph) == {"a": {"b"}, "b": {"a"}}


assert set(FOLDERS) == {room.split("/")[0] for room in MAY_IMPORT}
