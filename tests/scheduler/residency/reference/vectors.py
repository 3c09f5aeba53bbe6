"""The golden vectors of ruvllm's MoE modules (ADR-092), by subject.

Numbers are float32 except in 'precision' and ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[3] / "data" / "moe-reference.jsonl"


def cases(subject: str) -> list[dict[str, Any]]:
    return [case for case in map(json.loads, FILE.read_text().splitlines()) if case["kind"] == subject]


def number_of(case: dict[str, Any]) -> str:
    return f"case {case['case']}"
