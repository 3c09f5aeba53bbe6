"""The router's product: logits of all experts of a layer, with the bias that some models have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...workers.kernels.layers.norms import add_vector
from ..decoder.dense import DenseWeights, Linear, Rows

F32 = npt.NDArray[np.float32]


class Gate:
    """The gate of one layer. A row of logits is `padded` wide: the experts rounded up to 16."""

    def __init__(self, dense: DenseWeights, layer: int) -> None:
        self._matrix: Linear = dense.linear(f"{layer}.ffn_gate_inp")
        self.padded = self._matrix.padded
        key = f"{layer}.ffn_gate_inp_bias"
        self._bias: F32 | None = None
        if dense.has(key):
            bias = dense.vector(key)
            self._bias = np.zeros(self.padded, np.float32)
            self._bias[: len(bias)] = bias

    def apply(self, rows: Rows, index: npt.NDArray[np.int32], count: int, out: F32) -> None:
        """Write the logits of `count` rows to `out` (capacity, padded); index: int32 (1, capacity)."""
        self._matrix.apply(rows, index, count, out)
        if self._bias is not None:
            add_vector(out, self._bias, count, self.padded)
