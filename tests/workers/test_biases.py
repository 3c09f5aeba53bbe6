"""Experts with biases and other activations, from a file to their outputs, and what is refused."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sterna.shm.arena import Arena
from sterna.shm.errors import InternalError
from sterna.shm.slots import SlotTable, arena_nbytes
from sterna.workers.activation import Activation
from sterna.workers.checkpoint.held.formats import Format, MatrixShape
from sterna.workers.checkpoint.types.table import TYPES_BY_NAME
from sterna.workers.messages import Compute, Configure, ExpertPage, FileSlab, LayerShape, PageIn
from sterna.workers.serve import ExpertWorker

from .. import oracles

D_MODEL, D_FF, LAYER, TOKENS = 48, 80, 4, 5
WIDE = [(D_FF, D_MODEL), (D_FF, D_MODEL), (D_MODEL, D_FF)]
LENGTHS = (D_FF, D_FF, D_MODEL)
SIZES = [*WIDE, *((length, 1) for length in LENGTHS)]


def layer_shape(
    activation: int = Activation.CLAMPED, sizes: list[tuple[int, int]] = SIZES, form: Format = Format.F32
) -> LayerShape:
    """Return float32 matrices and what is behind them in `form`, in one precision."""
    parts, at = [], 0
    for i, (rows, columns) in enumerate(sizes):
        shape = MatrixShape(form=Format.F32 if i < 3 else form, rows=rows, columns=columns)
        parts.append((int(shape.form), rows, columns, at))
        at += shape.nbytes
    return LayerShape(d_model=D_MODEL, d_ff=D_FF, precisions=[parts], activation=int(activation))


class Stage:
    """A file with one expert, all float32, and a worker over two slots for such experts."""

    def __init__(self, path: Path, activation: Activation) -> None:
        rng = np.random.default_rng(8)
        self.values: list[oracles.F32] = []
        self.slabs, contents = [], b"header!"
        for i, size in enumerate(SIZES):
            values = (rng.standard_normal(size) * (0.3, 3.0)[i > 2]).astype(np.float32)
            self.slabs.append(FileSlab(len(contents), values.nbytes, TYPES_BY_NAME["F32"].id, f"part {i}"))
            contents += values.tobytes()
            self.values.append(values)
        path.write_bytes(contents)
        self.fd = os.open(path, os.O_RDONLY)
        shape = layer_shape(activation)
        nbytes = sum(
            MatrixShape(form=Format(form), rows=rows, columns=columns).nbytes
            for form, rows, columns, _ in shape.precisions[0]
        )
        self.arena = Arena.create("weights", arena_nbytes([(2, nbytes)]))
        self.slots = SlotTable(self.arena.bytes, [(2, nbytes)])
        self.slots.memory[self.slots.at(0) : self.slots.at(2)] = 0xEE
        self.worker = ExpertWorker(self.slots, [self.fd])
        self.configured = Configure(layers={LAYER: shape})
        self.worker.configure(self.configured)

    def page_in(self, slabs: list[FileSlab] | None = None) -> None:
        page = ExpertPage(LAYER, 6, 1, 0, self.slabs if slabs is None else slabs)
        self.worker.page_in(PageIn(seq=1, page=page))

    def compute(self, x: oracles.F32) -> oracles.F32:
        message = Compute(
            seq=1, layer=LAYER, precision=0, activation_kind=0, tokens=TOKENS,
            experts=[6], slots=[1], starts=[0, TOKENS],
        )  # fmt: skip
        frames = (bytearray(x.tobytes()), bytearray(np.arange(TOKENS, dtype=np.int32).tobytes()))
        return self.worker.compute(message, [memoryview(frame) for frame in frames])[1].copy()

    def close(self) -> None:
        self.worker.loader.file.close()
        os.close(self.fd)
        self.arena.close()
        # The mapping has a descriptor of its own, which goes with the last array over it.
        self.__dict__.clear()
        gc.collect()


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path / "expert", Activation.CLAMPED)
    yield made
    made.close()


def test_biases_lie_behind_the_matrices_in_their_own_order(stage: Stage) -> None:
    stage.page_in()
    base = stage.slots.at(1)
    for (_, length, _, at), values in zip(
        stage.configured.layers[LAYER].precisions[0][3:], stage.values[3:], strict=True
    ):
        held = stage.slots.memory[base + at : base + at + 4 * length].view(np.float32)
        assert held.tobytes() == values.reshape(-1).tobytes()
    assert (stage.slots.memory[stage.slots.at(0) : base] == 0xEE).all()


def test_an_expert_with_biases_agrees_with_float64(stage: Stage) -> None:
    stage.page_in()
    x = np.random.default_rng(1).standard_normal((TOKENS, D_MODEL)).astype(np.float32)
    gate, up, down, *biases = (part.astype(np.float64) for part in stage.values)
    b_gate, b_up, b_down = (bias.reshape(-1) for bias in biases)
    middle = oracles.activated(x @ gate.T + b_gate, x @ up.T + b_up, Activation.CLAMPED)
    np.testing.assert_allclose(stage.compute(x), middle @ down.T + b_down, rtol=0, atol=2e-4)


@pytest.mark.parametrize("count", [3, 5, 7])
def test_a_page_without_one_slab_for_each_part_is_refused(stage: Stage, count: int) -> None:
    with pytest.raises(InternalError, match=f"layer 4: {count} slabs"):
        stage.page_in([*stage.slabs, stage.slabs[0]][:count])


@pytest.mark.parametrize(
    "sizes",
    [
        SIZES[:2], SIZES[:5], [*SIZES, SIZES[3]], [*WIDE, *SIZES[4:], SIZES[3]],
        [*WIDE, *((1, length) for length in LENGTHS)], [WIDE[2], *WIDE[1:]],
    ],
    ids=["two matrices", "two biases", "seven parts", "order", "rows", "gate and down"],
)  # fmt: skip
def test_parts_that_do_not_fit_each_other_are_refused(stage: Stage, sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(InternalError, match="experts of 48 and 80 values"):
        stage.worker.configure(Configure(layers={LAYER: layer_shape(sizes=sizes)}))


def test_biases_of_another_format_are_refused(stage: Stage) -> None:
    with pytest.raises(InternalError, match="experts of 48 and 80 values"):
        stage.worker.configure(Configure(layers={LAYER: layer_shape(form=Format.F16)}))


@pytest.mark.parametrize("activation", [-1, 3, 1 << 40])
def test_an_unknown_activation_is_refused(stage: Stage, activation: int) -> None:
    shape = msgspec.structs.replace(layer_shape(), activation=activation)
    with pytest.raises(InternalError, match=f"layer 4: there is no activation {activation}"):
        stage.worker.configure(Configure(layers={LAYER: shape}))
