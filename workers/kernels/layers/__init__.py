"""Kernels of whole layers: attention, feed-forward, norms, activations."""
