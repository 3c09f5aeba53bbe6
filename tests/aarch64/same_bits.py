"""Prints digests of what the kernels of this machine compute, or compares two such prints.

    same_bits.py                          {"target": ..., "digests": {check: sha256}} on stdout
    same_bits.py --compare FILE FILE      exit 1 with the names of the checks that differ

The checks, and the exactness of all integer sums, are those of tests/workers/kernels: target_check.py and
format_check.py, with which one machine's targets are compared there.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import numba

FOLDER = Path(__file__).parents[1] / "workers" / "kernels"
CHECKS = ("target_check", "format_check", "base3_check")


def printed() -> str:
    """Run the checks and return their digests as JSON."""
    # Where the tests keep theirs (tests/conftest.py): what they compiled is not compiled again.
    numba.config.CACHE_DIR = str(import_module("sterna.workers.kernels.cache").cache_dir())
    target = import_module("sterna.workers.kernels.target").TARGET
    sys.path.insert(0, str(FOLDER))
    digests: dict[str, str] = {}
    for name in CHECKS:
        digests |= import_module(name).digests()
    return json.dumps({"target": target, "digests": digests})


def compare(first: str, second: str) -> str | None:
    """Return what is wrong with two prints, or None if they hold the same checks with the same digests."""
    here, there = (json.loads(Path(path).read_text()) for path in (first, second))
    if here["target"] == there["target"]:
        return f"both were made by the kernels for {here['target']}"
    names = here["digests"].keys() | there["digests"].keys()
    wrong = sorted(name for name in names if here["digests"].get(name) != there["digests"].get(name))
    if wrong or not names:
        return f"{there['target']} and {here['target']} differ in {wrong or 'nothing: there are no checks'}"
    sys.stdout.write(f"{len(names)} results of {there['target']} have the bits of {here['target']}\n")
    return None


def main(arguments: list[str]) -> None:
    """Do what the module's docstring says."""
    if arguments[:1] == ["--compare"]:
        sys.exit(compare(*arguments[1:]))
    sys.stdout.write(printed())


if __name__ == "__main__":
    main(sys.argv[1:])
