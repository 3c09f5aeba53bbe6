"""ruvllm's memory-aware routing (ADR-092) as a library: no process calls it yet."""
