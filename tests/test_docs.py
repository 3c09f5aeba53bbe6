"""What the docs say is so: their Python runs, printed help is the program's, every name leads somewhere."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from sterna.runtime.cli.main import cli
from sterna.shm.errors import REQUEST_ERRORS, OutOfResources, SternaError, error_of

from .system.daemon_process import Daemon, clean_env
from .system.test_chat import TEMPLATE, with_template

ROOT = Path(__file__).parent.parent
FOLDERS = ("runtime", "scheduler", "workers", "shm")
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md"), *ROOT.glob(".github/**/*.md")]
)
# It tells of versions gone by, and so of names gone by.
NAMED = [page for page in PAGES if page.name != "CHANGELOG.md"]
OPERATIONS = (ROOT / "docs/operations.md").read_text()
FENCE = re.compile(r"^ *```([\w-]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LEVELS = ("debug", "info", "warning", "error", "exception", "critical")


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


FILES = tracked()
SOURCES = [name for name in FILES if name.endswith(".py") and name.split("/")[0] in (*FOLDERS, "tests")]


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- names ----


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target or target.startswith(("#", "mailto:")):
            continue
        if not (page.parent / target.partition("#")[0]).exists():
            lost.append(target)
    assert lost == []


def leads_to_a_file(name: str) -> bool:
    return any(f"/{path}".endswith(f"/{name}") for path in FILES)


@pytest.mark.parametrize("page", NAMED, ids=relative)
def test_every_file_that_is_named_exists(page: Path) -> None:
    assert names_without_a_file(page.read_text()) == []


def names_without_a_file(text: str) -> list[str]:
    """Return the files and folders in backquotes that are not there, but for folders "(to come)"."""
    lost = [name for name in re.findall(r"`([\w./-]+\.(?:py|md|sh))\b", text) if not leads_to_a_file(name)]
    folders = r"`((?:runtime|scheduler|workers|shm|tests|docs|benchmarks|deploy)/[\w./]*)`(?!\s\(to come\))"
    return lost + [name for name in re.findall(folders, text) if not (ROOT / name).exists()]


def test_only_the_name_before_the_words_is_to_come() -> None:
    text = "`runtime/later/` (to come)\nand `runtime/never/` and `runtime/cli/`, `runtime/gone.py` (to come)"
    assert names_without_a_file(text) == ["runtime/gone.py", "runtime/never/"]


def test_every_file_that_a_docstring_names_exists() -> None:
    lost = []
    for name in SOURCES:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node, clean=False) or ""
                found = re.findall(r"(?<![\w/*.-])[\w.-]+(?:/[\w.-]+)*\.(?:py|md)\b", text)
                lost += [f"{name}: {each}" for each in found if not leads_to_a_file(each)]
    assert lost == []


def test_every_test_that_is_named_exists() -> None:
    source = "\n".join((ROOT / name).read_text() for name in SOURCES if name.startswith("tests/"))
    known = {*re.findall(r"\bdef (test_\w+)", source), *(Path(name).stem for name in SOURCES)}
    lost = [
        f"{relative(page)}: {name}"
        for page in NAMED
        for name in re.findall(r"(?<![\w/*])test_\w+", FENCE.sub("", page.read_text()))
        if name not in known
    ]
    assert lost == []


def test_every_room_has_its_line() -> None:
    rows = set(re.findall(r"^\| `([\w/]+)/` \|", (ROOT / "docs/README.md").read_text(), re.MULTILINE))
    rooms = {
        path.parent.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert rows == rooms


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in NAMED:
        for target in re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{relative(page)}: make {target}"


def test_make_check_finds_the_tests_of_rooms_that_have_none_of_their_name() -> None:
    check = runpy.run_path(str(ROOT / ".ci/check.py"))
    for room, places in check["ELSEWHERE"].items():
        files = sorted((ROOT / room).glob("*.py"))
        assert files, room
        assert not (ROOT / "tests" / room).exists(), f"{room} has tests of its own now"
        found = check["tests_of"](files[-1].relative_to(ROOT))
        assert {ROOT / "tests" / place for place in places} <= set(found)
        assert all(path.exists() for path in found)
    assert all(path.exists() for path in check["ALWAYS"])


# ---- commands ----


def test_the_page_of_commands_is_their_help() -> None:
    """`make docs` writes it; spaces do not count, since versions of click break lines differently."""
    # In a process of its own: click keeps a command's help option as the first caller's context has it.
    done = subprocess.run(
        [sys.executable, "-c", "import runpy; print(runpy.run_path('docs/write_cli.py')['page']())"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert (ROOT / "docs/cli.md").read_text().split() == done.stdout.split(), "run `make docs`"


def command_lines() -> list[tuple[str, list[str]]]:
    """Return the page and the words of every line in a block of a page that calls `sterna`."""
    found = []
    for page in NAMED:
        if page.name == "cli.md":
            continue
        for language, block in FENCE.findall(page.read_text()):
            for line in block.splitlines() if language in ("", "sh") else []:
                words = shlex.split(line.removeprefix("$ "), comments=True) if "sterna " in line else []
                while words and "=" in words[0]:
                    words = words[1:]
                if words and words[0] in ("sterna", ".venv/bin/sterna"):
                    found.append((f"{relative(page)}: {line.strip()}", words[1:]))
    return found


def test_commands_and_options_that_are_shown_exist() -> None:
    lines = command_lines()
    assert len(lines) > 20
    for shown, words in lines:
        command: click.Command = cli
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            assert words[0] in command.commands, shown
            command, words = command.commands[words[0]], words[1:]
        options = {
            each for parameter in command.params for each in (*parameter.opts, *parameter.secondary_opts)
        }
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= {*options, "--help", "-h", "--version"}, shown


# ---- operations.md ----


def test_exit_codes_and_error_codes_are_listed() -> None:
    listed = {
        int(code)
        for row in re.findall(r"^\| ([\d, ]+) \|", OPERATIONS, re.MULTILINE)
        for code in row.split(",")
    }
    classes = [SternaError]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    assert {cls.exit_code for cls in classes} <= listed
    section = OPERATIONS.partition("## Error codes of requests")[2].partition("## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| .* \| (yes)? ?\|$", section, re.MULTILINE)
    pairs = {code: (int(exit_code), bool(retryable)) for code, exit_code, retryable in rows}
    classes_by_code = REQUEST_ERRORS | {OutOfResources.code: OutOfResources}
    assert pairs == {code: (cls.exit_code, cls.retryable) for code, cls in classes_by_code.items()}
    # Those that the text names.
    named = re.findall(r"`(\w+)`, exit\scode (\d+)", OPERATIONS)
    assert named
    assert [(code, error_of(code, "").exit_code) for code, _ in named] == [(c, int(n)) for c, n in named]


def logged() -> set[tuple[str, str]]:
    """Return (name, level) of every event that the code logs; `%s` in a name stands for any word."""
    found = set()
    for name in SOURCES:
        if name.startswith("tests/"):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            target = node.func.value
            if node.func.attr in LEVELS and isinstance(target, ast.Name) and target.id == "log":
                text = node.args[0]
                assert isinstance(text, ast.Constant), f"{name}:{node.lineno}: an event's name is a literal"
                event = str(text.value).split()[0]
                assert re.fullmatch(r"[a-z]+\.(?:[a-z_]+|%s)", event), f"{name}:{node.lineno}: {event}"
                found.add((event, {"exception": "error"}.get(node.func.attr, node.func.attr)))
    return found


def test_log_events_are_those_of_the_code() -> None:
    rows = set(re.findall(r"^\| `([a-z]+\.[a-z_]+)` \| (\w+) \|", OPERATIONS, re.MULTILINE))
    code = logged()
    assert len(code) > 20

    def same(row: tuple[str, str], event: tuple[str, str]) -> bool:
        pattern = re.escape(event[0]).replace("%s", "[a-z_]+")
        return row[1] == event[1] and re.fullmatch(pattern, row[0]) is not None

    assert {event for event in code if not any(same(row, event) for row in rows)} == set(), "not in the table"
    assert {row for row in rows if not any(same(row, event) for event in code)} == set(), "not in the code"


# ---- Python blocks ----


def python_blocks(page: str) -> list[tuple[str, str]]:
    """Return each Python block of a page and the block behind it if that shows what is printed, else ""."""
    blocks = FENCE.findall((ROOT / page).read_text())
    return [
        (code, blocks[i + 1][1] if i + 1 < len(blocks) and blocks[i + 1][0] == "text" else "")
        for i, (language, code) in enumerate(blocks)
        if language == "python"
    ]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on the embedded model, to which a chat template was given: some blocks need one."""
    path = with_template(tmp_path_factory.mktemp("model") / "tales-small.gguf", TEMPLATE)
    started = Daemon(str(path))
    try:
        yield started.start()
    finally:
        started.remove()


def run_block(code: str, socket: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix="st-"))
    try:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            capture_output=True, text=True, timeout=100, env=clean_env(folder, STERNA_SOCKET=socket),
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.daemon
@pytest.mark.parametrize("page", ["README.md", "docs/chat.md", "docs/embeddings.md"])
def test_python_blocks_run_and_print_what_they_show(daemon: Daemon, page: str) -> None:
    blocks = python_blocks(page)
    assert blocks
    for code, printed in blocks:
        found = run_block(code, daemon.url)
        if printed:
            assert found.strip("\n") == printed.strip("\n")


def test_every_python_block_is_run() -> None:
    pages = {
        relative(page)
        for page in NAMED
        if any(language == "python" for language, _ in FENCE.findall(page.read_text()))
    }
    (mark,) = (
        each
        for each in test_python_blocks_run_and_print_what_they_show.pytestmark
        if each.name == "parametrize"
    )
    assert pages == set(mark.args[1])
