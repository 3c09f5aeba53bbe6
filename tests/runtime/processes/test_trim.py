"""The compiler's code is given back after the warm-up, and is there again when it is needed."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import re
from pathlib import Path
import llvmlite.binding as llvm
from sterna.runtime.processes.trim import trim

def use():
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    module = llvm.parse_assembly("define i32 @f() { ret i32 7 }")
    machine = llvm.Target.from_default_triple().create_target_machine()
    return len(machine.emit_object(module))

def resident_kib():
    text = Path("/proc/self/smaps").read_text()
    found = re.findall(r"^\\S+ r-xp .*llvmlite.*\\n(?:Size|KernelPageSize|MMUPageSize).*\\n(?:.*\\n)*?Rss: +(\\d+)", text, re.M)
    return sum(map(int, found))

size = use()
before = resident_kib()
trim()
after = resident_kib()
assert use() == size
print(before, after)
"""  # noqa: E501


def test_code_of_the_compiler_goes_and_comes_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )
    before, after = map(int, done.stdout.split())
    print(f"\n{before} KiB of code, {after} after")
    assert before > 1000
    assert after < before / 10
