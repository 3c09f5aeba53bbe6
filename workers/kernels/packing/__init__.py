"""Kernels from a file's blocks to the layouts of the products, and encoders."""
