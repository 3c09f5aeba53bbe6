"""Check one source file: ruff, mypy, the rules of the whole, and the tests that belong to the file.

Tests mirror the source: `runtime/config.py` is tested by `tests/runtime/test_config.py`. Where a file has no
such twin, the tests that import it are run, and where there are none, those of its folder. Rooms whose tests
lie elsewhere are in ELSEWHERE.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
ALWAYS = (TESTS / "test_architecture.py", TESTS / "test_rooms.py", TESTS / "test_shape.py")
# room -> files and folders of tests that run what its files do.
ELSEWHERE = {
    "runtime/bench": ("runtime/cli/test_kernels.py",),
    "runtime/cli/commands": ("runtime/cli", "system/test_generate_command.py"),
    "scheduler/model/families": ("families",),
}


def tests_of(source: Path) -> list[Path]:
    """Return the files and folders of tests of `source`, a path relative to the root; [] without any."""
    if source.parts[0] == "tests":
        return [ROOT / source]
    folder = TESTS / source.parent
    twins = sorted({*folder.glob(f"test_{source.stem}.py"), *folder.glob(f"test_{source.stem}_*.py")})
    if twins:
        return twins
    package, name = ".".join(("sterna", *source.parts[:-1])), source.stem
    forms = (f"from {package}.{name} import", f'import_module("{package}.{name}")')
    plain = f"from {package} import "
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        lines = path.read_text().splitlines()
        if any(form in line or (line.startswith(plain) and name in line) for line in lines for form in forms):
            found.append(path)
    elsewhere = [TESTS / each for each in ELSEWHERE.get(source.parent.as_posix(), ())]
    apart = [path for path in found if not any(path.is_relative_to(each) for each in elsewhere)]
    return [*elsewhere, *apart] or sorted(folder.glob("test_*.py"))


def main() -> int:
    """Run the checks one after the other; return the exit code of the first that fails."""
    source = Path(sys.argv[1]).resolve().relative_to(ROOT)
    if not (ROOT / source).is_file() or source.suffix != ".py":
        print(f"{source}: no Python file of this repository", file=sys.stderr)
        return 64
    own = tests_of(source)
    if not own:
        print(f"{source}: no test belongs to it; only the rules of the whole are checked", file=sys.stderr)
    tests = [str(path.relative_to(ROOT)) for path in (*own, *ALWAYS)]
    python = sys.executable
    for command in (
        ["ruff", "check", str(source)],
        ["ruff", "format", "--check", str(source)],
        ["mypy"],
        ["pytest", "-q", "-m", "not slow and not bench", *tests],
    ):
        print("+", " ".join(command), flush=True)
        code = subprocess.run([python, "-m", *command], cwd=ROOT, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
