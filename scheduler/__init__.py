"""The engine: batching, routing, attention, KV cache, sampling, and the lane to the workers."""
