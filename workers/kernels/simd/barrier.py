"""An optimisation barrier for byte vectors: LLVM must not look through it.

Without it LLVM turns three additions of a byte into one multiplication by 9, 27, 81 or 243, which x86
and NEON do not have for bytes at that price. An empty piece of assembly costs no instruction and, being
empty, needs no assembler.
"""

from __future__ import annotations

from llvmlite import ir

from ..target import TARGET
from .vector import LANES, part

# Bytes of a register and the constraint that names its class. Other targets go without: there the
# multiplication is slow and right.
_REGISTERS = {"avx512vnni": (64, "v"), "avxvnni": (32, "x"), "avx2": (32, "x"), "neon": (16, "w")}
_WIDTH, _CLASS = _REGISTERS.get(TARGET, (4 * LANES, ""))


def emit_registers(builder: ir.IRBuilder, vector: ir.Value) -> list[ir.Value]:
    """Return the 64 bytes of `vector` in pieces as large as a register."""
    if _WIDTH == 4 * LANES:
        return [vector]
    return [part(builder, vector, start, _WIDTH) for start in range(0, 4 * LANES, _WIDTH)]


def emit_barrier(builder: ir.IRBuilder, register: ir.Value) -> ir.Value:
    """Return `register`, one of `emit_registers`, as a value of unknown origin."""
    if not _CLASS:
        return register
    function_type = ir.FunctionType(register.type, [register.type])
    return builder.call(ir.InlineAsm(function_type, "", f"={_CLASS},0", side_effect=False), [register])
