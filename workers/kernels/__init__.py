"""Numba kernels over ternary and 8-bit weights."""
