"""The checks that every kernel target has to pass, and digests of results to compare targets by.

Run as a script it prints them as JSON: STERNA_KERNEL_TARGET is read when the kernels are imported, so
that each target needs a process (and a NUMBA_CACHE_DIR) of its own.
"""

from __future__ import annotations

import json
import sys
from hashlib import sha256
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
ROWS = (1, 23, 40)  # one, two and three groups
TERNARY_COLUMNS = (256, 768, 8192, 32768)
Q8_COLUMNS = (32, 96, 256, 4096)
COUNT = 23  # two or more tiles, then four tokens at once, two and one alone


def digests() -> dict[str, str]:
    """Return {check: sha256 of the result's bytes}; raises AssertionError where a sum is not exact."""
    return {**_ternary(), **_q8(), **_floating()}


def assembly(kernel: Any, arguments: tuple[object, ...]) -> str:  # noqa: ANN401 - a numba dispatcher
    """Return the machine code of `kernel` for `arguments`, compiled afresh: cached code shows none."""
    fresh = njit(nogil=True, error_model="numpy")(kernel.py_func)
    fresh(*arguments)
    (text,) = fresh.inspect_asm().values()
    return str(text)


def assemblies() -> dict[str, str]:
    """Return the machine code of the inner kernels: 2-bit for one token and for tiles, 8-bit for a tile."""
    ternary = import_module("sterna.workers.kernels.products.ternary")
    q8 = import_module("sterna.workers.kernels.products.q8")
    tokens = ternary.TOKENS
    w, out = np.zeros(32768, np.uint8), np.zeros((8, 16), np.float32)
    scratch = np.zeros(max(ternary.scratch_nbytes(256, 2 * tokens), q8.scratch_nbytes(256, 8)), np.uint8)
    area = ternary.AREAS_AT
    where = (w, 0, 4096, 0, 1, 256)
    return {
        "2-bit, one token": assembly(ternary._one, (*where, 256, False, scratch, area, out, 0, 16)),
        "2-bit, by fields": assembly(ternary._fields, (*where, 256, False, tokens, scratch, area, out, 0, 0)),
        "2-bit, a tile": assembly(ternary._tiles, (*where, False, tokens, scratch, 0, area, out, 0, 0)),
        "8-bit, a tile": assembly(q8._tiles, (w, 0, 4096, 0, 1, 256, 8, scratch, 0, out, 0, 16)),
    }


def _run(
    name: str, form: int, arena: U8, offsets: tuple[int, int], rows: int, q: U8, block: int
) -> dict[str, F32]:
    """Return the products with scales of 1 and with the block scales 1, 2, 3, ... / 7."""
    module = import_module(f"sterna.workers.kernels.products.{name}")
    count, columns = q.shape
    groups = -(-rows // 16)
    scratch = np.full(module.scratch_nbytes(columns, count), np.uint8(0xA5))
    sums = q.view(np.int8).reshape(count, -1, block).sum(axis=2, dtype=np.int32)
    ones = np.ones(sums.shape, np.float32)
    varied = (np.arange(1, sums.size + 1, dtype=np.float32) / np.float32(7)).reshape(sums.shape)
    results = {}
    for name, scales in (("exact", ones), ("scaled", varied)):
        out = np.zeros((count, groups * 16), np.float32)
        module.gemm(
            form, arena, *offsets, groups, columns, np.zeros((1, 1), np.float32), q.view(np.int8),
            scales, sums, np.arange(count, dtype=np.int32), count, scratch, out, 0, groups * 16,
        )  # fmt: skip
        results[name] = out[:, :rows]
    return results


def _digest(array: npt.NDArray[np.generic]) -> str:
    return sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _activations(rng: np.random.Generator, columns: int) -> U8:
    """Return random rows, and one row each of 127 and -127."""
    q = rng.integers(-127, 128, (COUNT, columns), dtype=np.int8)
    q[1], q[2] = 127, -127
    return q.view(np.uint8)


def _ternary() -> dict[str, str]:
    ternary = import_module("sterna.workers.kernels.products.ternary")
    found = {}
    for rows in ROWS:
        for columns in TERNARY_COLUMNS:
            rng = np.random.default_rng(rows * columns)
            codes = rng.integers(0, 3, (rows, columns), dtype=np.uint8)
            codes[0] = 2 if columns % 512 else 0
            q = _activations(rng, columns)
            scales_at = 32 + ternary.codes_nbytes(rows, columns)
            arena = np.zeros(scales_at + ternary.scales_nbytes(rows, columns), np.uint8)
            one = np.full((rows, columns // 256), 0x3C00, np.uint16)
            ternary.pack(codes, one, arena, 32, scales_at)
            by_row = np.zeros(scales_at + ternary.row_scales_nbytes(rows), np.uint8)
            ternary.pack_row(codes, np.ones(rows, np.float32), by_row, 32, scales_at)
            true = q.view(np.int8).astype(np.int64) @ (codes.astype(np.int64) - 1).T
            for form, weights, block in (
                (ternary.TL1, arena, 256),
                (ternary.TL1_ROW, by_row, 256),
                (ternary.TL1_ROW, by_row, columns),
            ):
                results = _run("ternary", form, weights, (32, scales_at), rows, q, block)
                name = f"ternary {form} {rows} x {columns} by {block}"
                assert (results["exact"] == true).all(), name
                found |= {f"{name} {k}": _digest(v) for k, v in results.items()}
    return found


def _q8() -> dict[str, str]:
    q8 = import_module("sterna.workers.kernels.products.q8")
    repack = import_module("sterna.workers.kernels.packing.repack")
    found = {}
    for rows in ROWS:
        for columns in Q8_COLUMNS:
            rng = np.random.default_rng(rows * columns)
            weights = rng.integers(-127, 128, (rows, columns), dtype=np.int8)
            weights[0] = 127 if columns % 64 else -127
            q = _activations(rng, columns)
            blocks = np.zeros((rows, columns // 32, 34), np.uint8)
            blocks[:, :, 1] = 0x3C
            blocks[:, :, 2:] = weights.view(np.uint8).reshape(rows, -1, 32)
            scales_at = 32 + q8.codes_nbytes(rows, columns)
            arena = np.zeros(scales_at + q8.scales_nbytes(rows, columns), np.uint8)
            repack.q8_0(np.frombuffer(blocks.tobytes(), np.uint8), rows, columns, arena, 32, scales_at)
            results = _run("q8", 3, arena, (32, scales_at), rows, q, 32)
            true = q.view(np.int8).astype(np.int64) @ weights.astype(np.int64).T
            inside = np.abs(true) < 2**23  # beyond 2^24 the float32 between blocks rounds
            assert (results["exact"][inside] == true[inside]).all(), f"q8 {rows} x {columns}"
            found |= {f"q8 {rows} x {columns} {k}": _digest(v) for k, v in results.items()}
    return found


def _floating() -> dict[str, str]:
    floating = import_module("sterna.workers.kernels.products.floating")
    activations = import_module("sterna.workers.kernels.layers.activations")
    repack = import_module("sterna.workers.kernels.packing.repack")
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((23, 256)).astype(np.float16)
    x = rng.standard_normal((COUNT, 256)).astype(np.float32)
    arena = np.zeros(floating.nbytes(23, 256, 2), np.uint8)
    repack.floats(np.frombuffer(weights.tobytes(), np.uint8), 23, 256, 2, arena, 0)
    out = np.zeros((COUNT, 32), np.float32)
    none = np.zeros((1, 1), np.float32)
    floating.GEMMS[floating.F16](
        floating.F16, arena, 0, 0, 2, 256, x, none.astype(np.int8), none, none.astype(np.int32),
        np.arange(COUNT, dtype=np.int32), COUNT, arena, out, 0, 32,
    )  # fmt: skip
    rows = activations.QuantizedRows.allocate(COUNT, 256, 32)
    rows.fill(x, COUNT)
    parts = (rows.q.tobytes(), rows.scales.tobytes(), rows.sums.tobytes())
    return {"floating": _digest(out), "quantised": sha256(b"".join(parts)).hexdigest()}


def main() -> None:
    """Print {"target", "digests", "assembly"} for the target of this process; the self-test must pass."""
    target = import_module("sterna.workers.kernels.target").TARGET
    import_module("sterna.workers.selftest").run()
    json.dump({"target": target, "digests": digests(), "assembly": assemblies()}, sys.stdout)


if __name__ == "__main__":
    main()
