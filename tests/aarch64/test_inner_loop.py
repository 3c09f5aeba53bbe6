"""The 2-bit kernels as compiled for the Pi's Cortex-A76, on any host: the loops that were meant.

Sixteen dots and the fields of a 64-byte packet keep both vector pipes busy; whatever else stands in a loop
costs time. Not here: whether the code computes the right thing (run.sh, emulated).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cross.py")
TIMEOUT_S = 100
Loop = tuple[str, ...]
# Kernel -> for each of its loops, how many dots share one instruction that takes a field from the codes.
# None: the codes lie spread already.
DOTS_A_FIELD: dict[str, list[float | None]] = {
    "one token": [1],
    "two tokens": [2, 2],
    "by fields": [4, 4, 4, 4],
    # Spread: the second and third field take two instructions, to shift and to mask.
    "a tile": [64 / 24, None],
}


@cache
def loops(kernel: str) -> list[Loop]:
    """Return the instructions of each loop of `kernel` that holds dot products, in the order of the code."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT), kernel],
        env={**os.environ, "STERNA_KERNEL_TARGET": "neon"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = []
    for block in re.split(r"\n(?=\.LBB\d+_\d+:)", process.stdout):
        if "\tsdot\t" not in block:
            continue
        label = block[: block.index(":")]
        lines = [line.strip() for line in block.splitlines() if re.match(r"\t[a-z]", line)]
        ends = [i for i, line in enumerate(lines) if re.search(rf"{re.escape(label)}$", line)]
        assert ends, f"dots outside of a loop: {lines}"
        found.append(tuple(lines[: ends[-1] + 1]))
    return found


def named(instructions: Loop, pattern: str) -> list[str]:
    return [line for line in instructions if re.match(rf"(?:{pattern})\b", line)]


KERNELS = pytest.mark.parametrize("kernel", DOTS_A_FIELD)


@KERNELS
def test_every_dot_reads_its_activations_by_element(kernel: str) -> None:
    """So that no instruction repeats them: a loaded dword for all lanes costs a vector pipe a cycle."""
    for loop in loops(kernel):
        dots = named(loop, "sdot")
        assert len(dots) >= 16
        assert all(re.search(r"\.4b\[[0-3]\]$", dot) for dot in dots), dots
        assert named(loop, "ld1r|dup") == []


@KERNELS
def test_no_product_is_made_another_way(kernel: str) -> None:
    for loop in loops(kernel):
        assert named(loop, "mul|mla|[su]ml[as]l2?|[su]mull2?|pmull2?|udot|usdot|bl") == []


@KERNELS
def test_all_sums_stay_in_registers(kernel: str) -> None:
    for loop, dots_a_field in zip(loops(kernel), DOTS_A_FIELD[kernel], strict=True):
        assert [line for line in loop if re.search(r"\bsp\b", line)] == []
        assert named(loop, r"mov\s+v\d+") == []
        stored = 2 * len(named(loop, "stp")) + len(named(loop, "stu?r"))
        # Codes that are spread are stored, a register for four dots.
        spreads = kernel == "a tile" and dots_a_field is not None
        assert stored == (len(named(loop, "sdot")) // 4 if spreads else 0)


@KERNELS
def test_a_field_costs_one_instruction(kernel: str) -> None:
    """And a packet two for the loop itself, addresses and loads; three instructions go in per cycle."""
    for loop, dots_a_field in zip(loops(kernel), DOTS_A_FIELD[kernel], strict=True):
        dots = len(named(loop, "sdot"))
        fields = named(loop, r"(?:and|bic|[us]shr|shl|sli|[us]sra)\s+v\d+")
        assert len(fields) == (0 if dots_a_field is None else round(dots / dots_a_field)), fields
        assert len(loop) <= 2.5 * dots
