"""Sterna serves ternary Mixture-of-Experts language models on small CPU machines.

The public face is small: `Client` and `AsyncClient` talk to a running daemon. The packages
`runtime`, `scheduler`, `workers` and `shm` hold the daemon itself.
"""

from __future__ import annotations

__version__ = "0.1.0"

# Resolved on first use: `sterna --version` must not pay for ZeroMQ and msgspec.
_PUBLIC = {
    "AsyncClient": "runtime.client.async_client",
    "Client": "runtime.client.client",
    "SternaError": "shm.errors",
}

__all__ = ["AsyncClient", "Client", "SternaError", "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sterna' has no attribute {name!r}")
    from importlib import import_module

    try:
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    except AttributeError as error:  # `from sterna import` would say that there is no such name, and no more
        raise ImportError(f"{__name__}.{name} cannot be imported: {error}") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name what can be imported, also what was not asked for yet."""
    return sorted({*globals(), *_PUBLIC})
