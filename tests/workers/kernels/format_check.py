"""Digests of products in the file formats, to compare targets by; see `target_check`, no test in here."""

from __future__ import annotations

import json
import sys
from hashlib import sha256

import numpy as np

from sterna.workers.checkpoint.held.formats import Format
from sterna.workers.kernels.target import TARGET

if __package__:
    from .products.file_blocks import FORMATS, Matrix, quantized
else:  # run as a script
    from products.file_blocks import FORMATS, Matrix, quantized

ROWS, COLUMNS = (1, 16, 23), (256, 768)
COUNT = 11  # a tile of eight and three single tokens


def digests() -> dict[str, str]:
    """Return {format and shape: sha256 of the products' bytes}."""
    found = {}
    for name in FORMATS:
        for rows in ROWS:
            for columns in COLUMNS:
                matrix = Matrix.random(name, rows, columns, seed=rows * columns)
                tokens = quantized(Format[name], COUNT, columns, seed=7)
                product = np.ascontiguousarray(matrix.multiply(tokens, range(COUNT)))
                found[f"{name} {rows} x {columns}"] = sha256(product.tobytes()).hexdigest()
    return found


if __name__ == "__main__":
    json.dump({"target": TARGET, "digests": digests()}, sys.stdout)
