"""The command line of a Python process of ours: the only place that writes one.

In here: the interpreter and what keeps other people's files out of it. Not in here: starting the process,
its pipes and its end; each of those who start one does that (`processes/`, `chat/process.py`,
`cli/private_daemon.py`).
"""

from __future__ import annotations

import sys


def python_command(*arguments: str) -> list[str]:
    """Return the command that runs this interpreter with `arguments`, such as "-m" and a module.

    `-P` keeps the current folder out of the search for modules: a module `random` that lies there must not
    become part of the process.
    """
    return [sys.executable, "-P", *arguments]
