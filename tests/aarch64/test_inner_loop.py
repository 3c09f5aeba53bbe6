"""The 2-bit kernels as compiled for the Pi's Cortex-A76, on any host: the loop that was meant.

Sixteen dots and sixteen masks of a 64-byte group keep both vector pipes busy for 16 cycles; whatever else
stands in the loop costs time. Not here: whether the code computes the right thing (run.sh, emulated).
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


@cache
def loop(kernel: str) -> tuple[str, ...]:
    """Return the instructions of the block of `kernel` that holds the most dot products."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT), kernel],
        env={**os.environ, "STERNA_KERNEL_TARGET": "neon"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    blocks = re.split(r"\n(?=\.LBB\d+_\d+:)", process.stdout)
    body = max(blocks, key=lambda block: block.count("\tsdot\t"))
    label = body[: body.index(":")]
    lines = [line.strip() for line in body.splitlines() if re.match(r"\t[a-z]", line)]
    end = max(i for i, line in enumerate(lines) if line.startswith("b") and line.endswith(label))
    return tuple(lines[: end + 1])


def named(instructions: tuple[str, ...], pattern: str) -> list[str]:
    return [line for line in instructions if re.match(rf"(?:{pattern})\b", line)]


KERNELS = pytest.mark.parametrize("kernel", ["one token", "tile"])


@KERNELS
def test_every_dot_reads_its_activations_by_element(kernel: str) -> None:
    """So that no instruction repeats them: a loaded dword for all lanes costs a vector pipe a cycle."""
    dots = named(loop(kernel), "sdot")
    assert len(dots) >= 16
    assert all(re.search(r"\.4b\[[0-3]\]$", dot) for dot in dots), dots
    assert named(loop(kernel), "ld1r|dup") == []


@KERNELS
def test_no_product_is_made_another_way(kernel: str) -> None:
    assert named(loop(kernel), "mul|mla|[su]ml[as]l2?|[su]mull2?|pmull2?|udot|usdot|bl") == []


@KERNELS
def test_all_sums_stay_in_registers(kernel: str) -> None:
    assert [line for line in loop(kernel) if "sp" in line or named((line,), "st[rpu]r?")] == []
    assert named(loop(kernel), r"mov\s+v\d+") == []


def test_a_field_costs_one_instruction() -> None:
    body = loop("one token")
    dots, fields = len(named(body, "sdot")), len(named(body, "and")) + len(named(body, "[us]shr"))
    assert fields == dots
    # Two for the loop itself, addresses and loads; three instructions go in per cycle.
    assert len(body) <= 2.5 * dots
