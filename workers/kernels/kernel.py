"""The one decorator of all kernels.

No fast-math: results must not depend on how a compiler regroups a sum, because the same token has
to give the same bits alone and in any batch. Where a fused multiply-add is wanted it is written.
"""

from __future__ import annotations

from numba import njit

from .late import watched

_compiled = njit(nogil=True, cache=True, fastmath=False, error_model="numpy")


def kernel(function):
    """Return `function` as a kernel: compiled for the types that it is called with, and kept in the cache.

    A kernel that Python calls in every layer takes its arrays one by one, however many there are: 24 such
    arguments cost 1.6 us a call, the same in NamedTuples 5.4 us (x86-64, CPython 3.11, numba 0.68), because
    each tuple is taken apart in Python; a layer makes a dozen such calls for each token. Elsewhere a
    NamedTuple of arrays reads better: `routing.replay`.
    """
    return watched(_compiled(function))


def named(function, suffix):
    """Return `function` under a name of its own: for kernels that a function makes several of.

    A compiled kernel's symbol is its qualified name, its argument types and a number counted per process. Two
    of the same name that were compiled in different processes may have the same symbol, and whoever loads
    both from the cache then calls one of them for both.
    """
    function.__qualname__ = function.__name__ = f"{function.__name__}_{suffix}"
    return function


# For pieces of a kernel: merged into each caller before LLVM sees it. A call that stays a call would
# pass vectors through memory and every array as seven words.
piece = njit(nogil=True, fastmath=False, error_model="numpy", inline="always")

# For what only other kernels call: no wrappers to compile.
inner = njit(nogil=True, fastmath=False, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

# The same, but LLVM merges it into its callers. For what a kernel does often between two hot loops, where
# handing over the arrays would cost as much as the work.
merged = njit(
    nogil=True,
    fastmath=False,
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    forceinline=True,
)
