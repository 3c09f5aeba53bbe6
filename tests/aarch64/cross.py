"""Compiles a kernel for the Pi's Cortex-A76 on any host, through Numba's own passes; runs nothing.

    STERNA_KERNEL_TARGET=neon python cross.py NAME      the assembly of KERNELS[NAME] on stdout

Not here: what that assembly must look like (`test_inner_loop`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import compiler
from numba.core.codegen import JITCodeLibrary
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target

TRIPLE, CPU = "aarch64-unknown-linux-gnu", "cortex-a76"
AT = types.int64
BYTES = types.Array(types.uint8, 1, "C")
OUT = types.Array(types.float32, 2, "C")
PLACES = (BYTES, AT, AT, AT, AT, AT)  # w, codes, scales, first and last group, columns


def kernels() -> dict[str, tuple[Any, tuple[types.Type, ...]]]:
    """Return name -> kernel, types of its arguments."""
    # Kernels of another machine are not kept.
    Dispatcher.enable_caching = lambda self: None  # type: ignore[method-assign]
    ternary = import_module("sterna.workers.kernels.products.ternary")
    tile = import_module("sterna.workers.kernels.simd.tile").Tile
    end = (OUT, AT, AT)  # out, place, step
    by_row = types.boolean
    few = (*PLACES, AT, by_row, BYTES, AT, *end)
    return {
        "one token": (ternary._one, (*PLACES, AT, by_row, BYTES, AT, *end)),
        "two tokens": (ternary._few, (tile(2), *few)),
        "four tokens": (ternary._few, (tile(4), *few)),
        "by fields": (ternary._fields, (*PLACES, AT, by_row, AT, BYTES, AT, *end)),
        "a tile": (ternary._tiles, (*PLACES, by_row, AT, BYTES, AT, AT, *end)),
    }


class _Library(JITCodeLibrary):  # type: ignore[misc] # Numba is untyped
    """A library that is linked and optimised like any other but never loaded into this process."""

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """Finish the library; nothing of it has an address."""
        self._ensure_finalized()
        return 0


def assembly(kernel: Any, arguments: tuple[types.Type, ...]) -> str:  # noqa: ANN401 - a numba dispatcher
    """Return the machine code of `kernel`, with all it calls, for these argument types.

    Numba does not compile for another machine. Here its code generator gets the other machine's
    description, so that its optimiser works with that machine's costs, and nothing is made executable.
    """
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    typing, target = cpu_target.typing_context, cpu_target.target_context
    typing.refresh()
    target.refresh()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=CPU, opt=3, reloc="pic")
    codegen = target.codegen()
    codegen._tm, codegen._data_layout = machine, str(machine.target_data)
    codegen._library_class = _Library

    def empty_module(name: str) -> ir.Module:
        module = ir.Module(name)
        module.triple, module.data_layout = TRIPLE, codegen._data_layout
        return module

    codegen._create_empty_module = empty_module
    codegen.set_env = lambda name, environment: None  # it would be written into loaded code
    flags = compiler.Flags()
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.nrt = True
    result = compiler.compile_extra(typing, target, kernel.py_func, arguments, types.void, flags, {})
    return str(machine.emit_assembly(result.library._final_module))


def main(name: str) -> None:
    """Print the assembly of the kernel of that name."""
    sys.stdout.write(assembly(*kernels()[name]))


if __name__ == "__main__":
    main(sys.argv[1])
