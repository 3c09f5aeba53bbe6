"""A process that compiles kernels into the cache and ends: `python -m ... ARGUMENTS NUMBERS PARENT`.

ARGUMENTS: those of `scheduler.warm.steps`, as JSON; NUMBERS: of the steps to run, as JSON; PARENT: the
nursery's process number. After each step it prints "done NUMBER"; for a step that fails, one line saying why.
Its environment is the nursery's, which has set what numba reads; it ends with the nursery.
"""

from __future__ import annotations

import json
import sys

from .nursery import describe, die_with_parent

EXIT_FAILED = 70


def main() -> int:
    """Run the steps; return the exit code."""
    die_with_parent(int(sys.argv[3]))
    from ...scheduler import warm

    steps = warm.steps(**json.loads(sys.argv[1]))
    for number in json.loads(sys.argv[2]):
        try:
            steps[number][1]()
        except Exception as error:  # told to the nursery, whatever a step raised
            print(describe(error), flush=True)
            return EXIT_FAILED
        print(f"done {number}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
