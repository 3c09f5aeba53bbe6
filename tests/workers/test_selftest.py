"""The self-test passes on this CPU's target (test_targets runs it on all) and sees one wrong byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sterna.scheduler.warm import ALL_MATRIX_TYPES
from sterna.shm.errors import InternalError
from sterna.workers import selftest
from sterna.workers.checkpoint.held.formats import ActivationKind, Format, MatrixShape, activation_kind
from sterna.workers.checkpoint.held.packing import pack_matrix
from sterna.workers.kernels.layers import activations
from sterna.workers.kernels.target import TARGET

NAMES = [name for name, _ in ALL_MATRIX_TYPES]
SCALED = [pair for pair in ALL_MATRIX_TYPES if activation_kind(pair[1]) is not ActivationKind.FLOAT]
ROW_39 = 7  # the last row that is no padding: lane 7 of the last group, which has no second to go with it


def test_every_kind_passes_on_this_target() -> None:
    selftest.run(ALL_MATRIX_TYPES)


def damage(monkeypatch: pytest.MonkeyPatch, at: int, mask: int) -> None:
    """Have the byte `at` of every packed matrix, counted from its end if negative, altered."""

    def wrong(
        raw: npt.NDArray[np.uint8],
        file_type: Any,  # noqa: ANN401 - what pack_matrix takes
        shape: MatrixShape,
        out: npt.NDArray[np.uint8],
        start: int,
    ) -> None:
        pack_matrix(raw, file_type, shape, out, start)
        out[at] ^= np.uint8(mask)

    monkeypatch.setattr(selftest, "pack_matrix", wrong)


@pytest.mark.parametrize(("name", "form"), ALL_MATRIX_TYPES, ids=NAMES)
def test_one_wrong_code_is_seen_and_named(monkeypatch: pytest.MonkeyPatch, name: str, form: Format) -> None:
    """The first byte of a code or float holds weights of row 0 in every format."""
    damage(monkeypatch, 0 if form not in (Format.F32, Format.F16) else 1, 0x11)
    with pytest.raises(InternalError) as caught:
        selftest.check(name, form)
    text = str(caught.value)
    assert text.startswith(f"self-test: the {name} kernel for {TARGET} gives ")
    assert "(row 0, token 0)" in text
    assert text.endswith("set STERNA_KERNEL_TARGET=generic")
    assert "\n" not in text


@pytest.mark.parametrize(("name", "form"), SCALED, ids=[name for name, _ in SCALED])
def test_a_wrong_scale_of_the_last_row_is_seen(
    monkeypatch: pytest.MonkeyPatch, name: str, form: Format
) -> None:
    shape = MatrixShape(form=form, rows=selftest.ROWS, columns=selftest.COLUMNS)
    end = shape.offsets(0)[1] + shape.scales_nbytes
    # The last area of every format holds one number for each of 16 rows, float16 but for these.
    width = {Format.MXFP4: 1, Format.TL1_ROW: 4, Format.TL1_TOKEN: 4}.get(form, 2)
    damage(monkeypatch, end - (16 - ROW_39) * width + width - 1, 0x04)
    with pytest.raises(InternalError, match=r"\(row 39, token 0\)"):
        selftest.check(name, form)


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("part", ["q", "scales", "sums"])
def test_wrong_activations_are_seen_and_named(monkeypatch: pytest.MonkeyPatch, block: int, part: str) -> None:
    quantize = activations.quantize_rows

    def wrong(*arguments: Any) -> None:  # noqa: ANN401 - what quantize_rows takes
        quantize(*arguments)
        if arguments[4] == block:
            arguments[{"q": 5, "scales": 6, "sums": 7}[part]][-1, -1] += 1

    monkeypatch.setattr(activations, "quantize_rows", wrong)
    with pytest.raises(InternalError, match=rf"quantising activations by {block} is wrong on {TARGET}$"):
        selftest.run()
