"""What users install and operators copy: the package's layout, the Makefile, deploy/."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from sterna.runtime.config import SETTINGS, Config, load_config
from sterna.shm.errors import ConfigError

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "sterna.service"
EXAMPLE = DEPLOY / "config.toml"
FOLDERS = ("runtime", "scheduler", "workers", "shm")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_links_lead_to_the_folders() -> None:
    for name in FOLDERS:
        link = ROOT / "src/sterna" / name
        assert str(link.readlink()) == f"../../{name}", (
            "a relative link survives a clone, an absolute one does not"
        )


def test_every_folder_with_code_is_a_package() -> None:
    """Setuptools leaves out a folder without __init__.py, silently."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path.parent


def test_package_data_exists() -> None:
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / "src" / package.replace(".", "/")).glob(pattern)), f"{package}: {pattern}"


def test_command_leads_to_a_function() -> None:
    module_name, function_name = PYPROJECT["project"]["scripts"]["sterna"].split(":")
    spec = find_spec(module_name)
    assert spec is not None
    assert spec.origin is not None
    assert re.search(rf"^def {function_name}\(", Path(spec.origin).read_text(), re.MULTILINE)


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_module(tmp_path: Path) -> None:
    """Builds both from the tracked and new files; fetches the build backend, hence slow."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    tree = tmp_path / "tree"
    for name in filter(None, listed.stdout.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    expected = {
        f"{folder}/{path.relative_to(ROOT / folder)}" for folder in FOLDERS for path in code(ROOT / folder)
    }
    build = "import setuptools.build_meta as b; b.build_wheel('.'); b.build_sdist('.')"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    python = tmp_path / "venv/bin/python"
    requires = PYPROJECT["build-system"]["requires"]
    subprocess.run([python, "-m", "pip", "install", "-q", *requires], check=True, timeout=120)
    subprocess.run([python, "-c", build], cwd=tree, check=True, timeout=120, capture_output=True)
    with zipfile.ZipFile(next(tree.glob("*.whl"))) as wheel:
        found = {name.removeprefix("sterna/") for name in wheel.namelist()}
    assert expected | {"py.typed"} <= found
    with tarfile.open(next(tree.glob("*.tar.gz"))) as sdist:
        names = sdist.getnames()
    assert all(any(name.endswith(f"sterna/{each}") for name in names) for each in expected)


def code(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in {".py", ".gguf"}]


def make(folder: Path, path: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make on a copy of the Makefile in `folder`, with only `path` to find programs in."""
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    program = shutil.which("make")
    if program is None:
        pytest.skip("make is not installed")
    env = {"PATH": path, "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [program, "-C", str(folder), *arguments], env=env, capture_output=True, text=True, timeout=60
    )


def test_make_test_runs_every_check(tmp_path: Path) -> None:
    result = make(tmp_path, os.environ["PATH"], "-n", "test")
    assert result.returncode == 0, result.stderr
    for step in (
        "ruff check",
        "ruff format --check",
        "mypy",
        "sterna warm",
        'pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow and not bench"',
    ):
        assert f".venv/bin/{step}" in result.stdout or f".venv/bin/python -m {step}" in result.stdout
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "make test"
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_make_demo_and_serve_run_the_command(tmp_path: Path) -> None:
    demo = '.venv/bin/sterna generate "Once upon a time" --echo --temperature 0.7 --max-tokens 200'
    steps = make(tmp_path, os.environ["PATH"], "-n", "demo").stdout
    assert demo in steps
    # How to go on: the command is on no PATH yet.
    assert f"{tmp_path}/.venv/bin/sterna serve" in steps.partition(demo)[2]
    assert f"{tmp_path}/.venv/bin/activate" in steps.partition(demo)[2]
    assert ".venv/bin/sterna serve" in make(tmp_path, os.environ["PATH"], "-n", "serve").stdout


def test_make_with_an_old_python_says_so(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "sed", "touch"):
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    old = programs / "python3"
    old.write_text('#!/bin/bash\n[ "$1" = -V ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = make(tmp_path, str(programs), "lint")
    assert result.returncode != 0
    assert "Sterna needs Python 3.11 or newer; PATH has Python 3.9.2." in result.stderr


def test_example_config_loads() -> None:
    config = load_config(EXAMPLE, {}, {})
    assert config.socket == "ipc:///run/sterna/sterna.sock"
    assert config.model is None


def test_example_config_explains_every_setting(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()
    keys = re.findall(r"^(?:# )?([a-z_]+) = ", text, re.MULTILINE)
    assert sorted(keys) == sorted(SETTINGS)
    whole = tmp_path / "config.toml"
    whole.write_text(re.sub(r"^# ([a-z_]+ = )", r"\1", text, flags=re.MULTILINE))
    assert load_config(whole, {}, {}).model == Path("/var/lib/sterna/model.gguf")
    whole.write_text(text.replace("max_queue", "max_queues"))
    with pytest.raises(ConfigError, match="max_queues"):
        load_config(whole, {}, {})


def test_example_config_has_the_defaults_of_config() -> None:
    """Only the socket and the time to start, in which a small board compiles, are the service's own."""
    text = EXAMPLE.read_text()
    config = load_config(EXAMPLE, {}, {})
    blocks = re.findall(r"((?:^#.*\n)+)^(?:# )?([a-z_]+) = (.+)$", text, re.MULTILINE)
    told = {key: (" ".join(comment.replace("#", " ").split()), value) for comment, key, value in blocks}
    for each in dataclasses.fields(Config):
        comment, value = told[each.name]
        if each.default in (None, dataclasses.MISSING):
            assert re.search(r"\[[^\]]+\]", comment), each.name
            continue
        shown = f'"{each.default}"' if isinstance(each.default, str) else str(each.default)
        assert f"[{shown}]" in comment, each.name
        if each.name != "start_timeout_s":
            assert value == shown, each.name
            assert getattr(config, each.name) == each.default


def test_example_config_names_every_choice() -> None:
    text = EXAMPLE.read_text()
    for name, rule in SETTINGS.items():
        block = re.search(rf"((?:^#.*\n)+)^(?:# )?{name} = ", text, re.MULTILINE)
        assert block is not None
        for choice in rule.choices:
            assert f'"{choice}"' in block[1], (name, choice)


def unit(section: str) -> dict[str, list[str]]:
    """Return the directives of a section, each with all its values."""
    values: dict[str, list[str]] = {}
    for line in UNIT.read_text().split(f"[{section}]\n")[1].split("\n[")[0].splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            values.setdefault(name, []).append(value)
    return values


def seconds(text: str) -> float:
    return float(text.removesuffix("ms")) / 1000 if text.endswith("ms") else float(text)


def test_unit_and_example_config_agree() -> None:
    config = load_config(EXAMPLE, {}, {})
    service = unit("Service")
    assert seconds(service["TimeoutStartSec"][0]) > config.start_timeout_s
    assert seconds(service["TimeoutStopSec"][0]) > config.shutdown_timeout_s
    assert config.socket == f"ipc:///run/{service['RuntimeDirectory'][0]}/sterna.sock"
    assert "--config /etc/sterna/config.toml" in service["ExecStart"][0]


def test_unit_lets_libzmq_and_numba_live() -> None:
    """Each of these was seen to end the process or the start."""
    service = unit("Service")
    allowed = [value.split() for value in service["SystemCallFilter"] if not value.startswith("~")]
    assert "sched_setscheduler" in allowed[-1], "libzmq aborts (thread.cpp) when it may not call it"
    assert "MemoryDenyWriteExecute" not in service
    assert "WatchdogSec" not in service
    assert "NUMBA_CACHE_DIR" not in UNIT.read_text(), "CACHE_DIRECTORY says it already"


def test_unit_verifies(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "sterna.service"
    # The one complaint that a machine without Sterna in /opt has to make.
    text, count = re.subn(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE)
    assert count == 1
    copy.write_text(text)
    result = subprocess.run([tool, "verify", copy], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    copy.write_text(text.replace("PrivateUsers=yes", "PrivateUser=yes"))
    result = subprocess.run([tool, "verify", copy], capture_output=True, text=True, timeout=60)
    assert "PrivateUser" in result.stderr, "verify no longer complains about an unknown directive"


def test_readme_gives_a_reason_for_every_directive() -> None:
    text = (DEPLOY / "README.md").read_text()
    usual = {"ExecStart", "WantedBy", "Description"}
    directives = {name for section in ("Unit", "Service", "Install") for name in unit(section)}
    assert sorted(name for name in directives - usual if f"{name}=" not in text) == []


def test_account_is_the_units() -> None:
    account = (DEPLOY / "sysusers.d/sterna.conf").read_text().splitlines()[-1].split()
    service = unit("Service")
    assert account[:2] == ["u", service["User"][0]] == ["u", service["Group"][0]]


def test_example_says_what_the_help_says_of_workers_and_prompts() -> None:
    text = EXAMPLE.read_text()
    assert SETTINGS["workers"].unset in text
    assert "# Prompts and answers are never logged.\n" in text
