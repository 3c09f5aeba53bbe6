"""Routing traces: written, read, and replayed against every policy."""
