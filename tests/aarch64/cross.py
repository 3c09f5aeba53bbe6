"""Compiles a kernel for the Pi's Cortex-A76 on any host, through Numba's own passes; runs nothing.

    STERNA_KERNEL_TARGET=neon python cross.py "one token"|tile      its assembly on stdout

Not here: what that assembly must look like (`test_inner_loop`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import llvmlite.binding as llvm
from numba import types
from numba.core import compiler
from numba.core.codegen import CPUCodeLibrary
from numba.core.registry import cpu_target

TRIPLE, CPU = "aarch64-unknown-linux-gnu", "cortex-a76"
AT = types.int64
BYTES = types.Array(types.uint8, 1, "C")
TABLES = {
    kind: types.Array(kind, 2, "C") for kind in (types.int8, types.int32, types.float32)
}  # q, sums, scales and out

# name -> module, kernel, types of its arguments
KERNELS: dict[str, tuple[str, str, tuple[types.Type, ...]]] = {
    "one token": (
        "ternary_neon",
        "one_token",
        (
            BYTES, AT, AT, AT, AT, TABLES[types.int8], TABLES[types.float32], TABLES[types.int32],
            types.int32, TABLES[types.float32], AT,
        ),
    ),
    "tile": ("ternary_neon", "tile_sums", (BYTES, AT, AT, AT, AT, AT)),
}  # fmt: skip


def assembly(kernel: Any, arguments: tuple[types.Type, ...]) -> str:  # noqa: ANN401 - a numba dispatcher
    """Return the machine code of `kernel`, which may call no other kernel, for these argument types.

    Numba does not compile for another machine. It is stopped after lowering here, and its optimiser
    then works with the other machine's costs.
    """
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    typing, target = cpu_target.typing_context, cpu_target.target_context
    typing.refresh()
    target.refresh()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=CPU, opt=3, reloc="pic")
    target.codegen()._tm = machine
    flags = compiler.Flags()
    flags.no_compile = True
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.nrt = True
    result = compiler.compile_extra(typing, target, kernel.py_func, arguments, types.void, flags, {})
    library = result.library
    assert isinstance(library, CPUCodeLibrary)
    module = library._final_module
    module.triple, module.data_layout = TRIPLE, str(machine.target_data)
    library._optimize_final_module()
    return str(machine.emit_assembly(module))


def main(name: str) -> None:
    """Print the assembly of the kernel of that name."""
    module, kernel, arguments = KERNELS[name]
    found = getattr(import_module(f"sterna.workers.kernels.{module}"), kernel)
    sys.stdout.write(assembly(found, arguments))


if __name__ == "__main__":
    main(sys.argv[1])
