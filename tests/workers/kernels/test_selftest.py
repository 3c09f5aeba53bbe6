"""The self-test passes on this CPU's target (test_targets runs it on all) and sees one wrong byte."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sterna.shm.errors import InternalError
from sterna.workers.kernels import floating, q8, selftest, ternary
from sterna.workers.kernels.target import TARGET

COLUMNS = selftest.COLUMNS
SCALES_AT = 32 * 1024
GROUP_2 = 2  # the last group, which has no second to go with it
ROW_39 = 7  # the last row that is no padding, in that group


def test_this_target_passes() -> None:
    selftest.run()


@pytest.mark.parametrize(
    ("module", "arena", "at", "name"),
    [
        (ternary, 2, 0, "ternary"),
        (ternary, 2, GROUP_2 * COLUMNS * 4 + (COLUMNS // 16 - 1) * 64 + ROW_39 * 4 + 3, "ternary"),
        (ternary, 2, SCALES_AT, "ternary"),
        (ternary, 2, SCALES_AT + 5 * 32 + ROW_39 * 2 + 1, "ternary"),
        (q8, 3, 0, "8-bit"),
        (q8, 3, GROUP_2 * COLUMNS * 16 + (COLUMNS // 4 - 1) * 64 + ROW_39 * 4 + 3, "8-bit"),
        (q8, 3, SCALES_AT + 1, "8-bit"),
        (floating, 4, 2, "float (format 0)"),
    ],
)
def test_one_flipped_bit_is_seen_and_named(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, arena: int, at: int, name: str
) -> None:
    """`arena` is which argument of `pack` holds the packed bytes."""
    pack = module.pack

    def wrong(*arguments: Any) -> None:  # noqa: ANN401 - what pack takes
        pack(*arguments)
        arguments[arena][at] ^= np.uint8(0x40)

    monkeypatch.setattr(module, "pack", wrong)
    with pytest.raises(InternalError) as caught:
        selftest.run()
    text = str(caught.value)
    assert text.startswith(f"self-test: the {name} kernel for {TARGET} gives ")
    assert text.endswith("set STERNA_KERNEL_TARGET=generic")
    assert "\n" not in text


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("part", ["q", "scales", "sums"])
def test_wrong_activations_are_seen_and_named(monkeypatch: pytest.MonkeyPatch, block: int, part: str) -> None:
    quantize = selftest.quantize_rows

    def wrong(*arguments: Any) -> None:  # noqa: ANN401 - what quantize_rows takes
        quantize(*arguments)
        if arguments[3] == block:
            arguments[{"q": 4, "scales": 5, "sums": 6}[part]][-1, -1] += 1

    monkeypatch.setattr(selftest, "quantize_rows", wrong)
    with pytest.raises(InternalError, match=rf"quantising activations by {block} is wrong on {TARGET}$"):
        selftest.run()
