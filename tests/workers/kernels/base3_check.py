"""The checks of B3 matrices that every kernel target has to pass, and digests to compare targets by.

Run as a script it prints them as JSON, in a process of its own for each STERNA_KERNEL_TARGET, as
`target_check` does. The helpers that multiply are also those of `test_base3`.
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

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]
U8 = npt.NDArray[np.uint8]

BLOCK = 256
FORMS = {"base3": 5, "ternary": 4}
POISON = np.uint8(0xA5)
SHAPES = ((1, 256), (23, 768), (40, 512), (17, 32768))
COUNT = 9  # eight tokens at once and one alone


def pack(name: str, codes: U8, scales: F32, at: int = 0) -> tuple[U8, int, int]:
    """Pack codes 0..2 (N, K) by module `name`: (arena, codes_at, scales_at), scales right behind codes."""
    module: Any = import_module(f"sterna.workers.kernels.products.{name}")
    scales_at = at + module.codes_nbytes(*codes.shape)
    end = scales_at + module.scales_nbytes(*codes.shape)
    arena = np.full(end + 64, POISON)
    bits = np.ascontiguousarray(scales.astype(np.float16)).view(np.uint16)
    module.pack(np.ascontiguousarray(codes), bits, arena, at, scales_at)
    assert (arena[:at] == POISON).all()
    assert (arena[end:] == POISON).all()
    return arena, at, scales_at


def multiply(
    name: str, packed: tuple[U8, int, int], rows: int, q: I8, x_scales: F32, tokens: list[int]
) -> F32:
    """Return W @ x[tokens] as (len(tokens), padded rows) by module `name`.

    Checks that nothing outside the output and the scratch was written.
    """
    module: Any = import_module(f"sterna.workers.kernels.products.{name}")
    groups, count, columns = -(-rows // 16), len(tokens), q.shape[1]
    wide, gap, start = groups * 16, 5, 3
    size = module.scratch_nbytes(columns, count)
    scratch = np.full(size + 64, POISON)
    out = np.full((1, start + count * (wide + gap) + 16), np.float32(7.0))
    sums = q.reshape(len(q), -1, BLOCK).sum(axis=2, dtype=np.int32)
    module.gemm(
        FORMS[name], *packed, groups, columns, np.zeros((1, 1), np.float32), q, x_scales, sums,
        np.array(tokens, np.int32), count, scratch[:size], out, start, wide + gap,
    )  # fmt: skip
    assert (scratch[size:] == POISON).all()
    table = out[0, start : start + count * (wide + gap)].reshape(count, wide + gap)
    assert (out[0, :start] == 7.0).all()
    assert (out[0, start + table.size :] == 7.0).all()
    assert (table[:, wide:] == 7.0).all()
    return table[:, :wide].copy()


def scaled(rng: np.random.Generator, rows: int, columns: int, tokens: int) -> tuple[F32, F32]:
    """Return random scales of weights and of activations."""
    w_scales = (rng.standard_normal((rows, columns // BLOCK)) * 0.1).astype(np.float16).astype(np.float32)
    x_scales = np.exp(rng.standard_normal((tokens, columns // BLOCK))).astype(np.float32)
    return w_scales, x_scales


def digests() -> dict[str, str]:
    """Return {shape: sha256 of the products}; raises AssertionError where they differ from TL1's or int64."""
    found = {}
    for rows, columns in SHAPES:
        rng = np.random.default_rng(rows + columns)
        codes = rng.integers(0, 3, (rows, columns), dtype=np.uint8)
        codes[0] = 2
        codes[-1] = 0 if rows > 1 else 2
        q = rng.integers(-128, 128, (COUNT, columns), dtype=np.int8)
        q[1], q[2], q[-1] = 127, -127, -128
        ones = np.ones((max(rows, COUNT), columns // BLOCK), np.float32)
        unscaled = multiply(
            "base3", pack("base3", codes, ones[:rows]), rows, q, ones[:COUNT], [*range(COUNT)]
        )
        true = q.astype(np.int64) @ (codes.astype(np.int64) - 1).T
        assert (unscaled[:, :rows] == true).all(), f"{rows} x {columns}"
        w_scales, x_scales = scaled(rng, rows, columns, COUNT)
        results = [
            multiply(name, pack(name, codes, w_scales), rows, q, x_scales, [*range(COUNT)])
            for name in ("base3", "ternary")
        ]
        assert results[0].tobytes() == results[1].tobytes(), f"{rows} x {columns}: not the bits of TL1"
        found[f"{rows} x {columns}"] = sha256(results[0].tobytes()).hexdigest()
    return found


def _assembly(kernel: Any, arguments: tuple[object, ...]) -> str:  # noqa: ANN401 - a numba dispatcher
    fresh = njit(nogil=True, error_model="numpy")(kernel.py_func)
    fresh(*arguments)
    (text,) = fresh.inspect_asm().values()
    return str(text)


def assemblies() -> dict[str, str]:
    """Return the machine code of the kernel for one token and of the one that unpacks a block."""
    base3: Any = import_module("sterna.workers.kernels.products.base3")
    w, zeros = np.zeros(4096, np.uint8), np.zeros((1, 1), np.float32)
    one = (
        w, 0, 2048, 256, 0, np.zeros((1, 256), np.int8), zeros, zeros.astype(np.int32), np.int32(0),
        np.zeros((1, 16), np.float32), 0,
    )  # fmt: skip
    return {
        "one token": _assembly(base3._one_token, one),
        "unpack": _assembly(base3._unpack, (w, 0, np.zeros(4096, np.uint8), 0)),
    }


def main() -> None:
    """Print {"target", "digests", "assembly"} for the target of this process."""
    target = import_module("sterna.workers.kernels.target").TARGET
    json.dump({"target": target, "digests": digests(), "assembly": assemblies()}, sys.stdout)


if __name__ == "__main__":
    main()
