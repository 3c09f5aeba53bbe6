"""Measuring kernels and experts on this machine, beside llama.cpp where it is built."""
