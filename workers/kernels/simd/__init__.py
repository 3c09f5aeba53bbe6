"""A small vector vocabulary for Numba: sixteen 32-bit lanes, or sixty-four bytes.

Kernels are written once for this logical width. LLVM splits it into two AVX2 or four NEON
registers; only the byte dot product (`dot`) differs by target.
"""
