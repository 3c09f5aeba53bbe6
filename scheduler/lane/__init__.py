"""How batches reach the workers: the interface and its transports."""
