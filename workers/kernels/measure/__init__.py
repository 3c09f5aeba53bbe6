"""Kernels that measure: reading bandwidth, peak of the products' instruction."""
