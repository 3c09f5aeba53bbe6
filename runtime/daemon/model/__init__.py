"""The model that is served: what is read of its file once, and the memory that the daemon owns for it."""
