"""Expert workers: checkpoint reading, kernels, and the process that computes experts."""
