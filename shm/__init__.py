"""Shared memory: arenas that outlive the processes which fill them, and what lies in them.

Imports nothing of Sterna but itself; see docs/architecture.md for who may import whom.
"""
