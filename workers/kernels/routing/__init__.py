"""Kernels of routing and residency: top-k, eviction, prediction, replay."""
