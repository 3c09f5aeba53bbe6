"""Where the daemon listens, and the one factory for ZeroMQ sockets with their options.

In here: socket URLs (default, check, probe) and sockets that are ready to bind or connect. Not in here:
binding, the lock file and the folder's mode (`daemon/socket_files.py`), frames (`codec.py`), conversations
(`client/`).
Nothing in here creates a file or folder, and libraries for sockets are imported when one is made.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...shm.errors import ConfigError, DaemonUnreachable, NotPermitted

if TYPE_CHECKING:
    import zmq

    S = TypeVar("S", bound=zmq.Socket[Any])

SYSTEM_SOCKET = Path("/run/sterna/sterna.sock")
# sun_path holds 108 bytes with the closing zero.
MAX_IPC_PATH_BYTES = 107
DEFAULT_MAX_FRAME_BYTES = 16 * 2**20


def default_socket_url(env: Mapping[str, str] | None = None, *, system_socket: Path = SYSTEM_SOCKET) -> str:
    """Return the URL that daemon and clients use when none is given; creates nothing.

    STERNA_SOCKET wins; then $XDG_RUNTIME_DIR/sterna if that folder is ours, the system's socket if there is
    one, and a folder of this user in /tmp. Raises ConfigError when STERNA_SOCKET is wrong.
    """
    env = os.environ if env is None else env
    if url := env.get("STERNA_SOCKET"):
        return check_url(url, "environment STERNA_SOCKET")
    runtime_dir = env.get("XDG_RUNTIME_DIR", "")
    if runtime_dir and _usable_folder(Path(runtime_dir)):
        candidate = Path(runtime_dir) / "sterna" / "sterna.sock"
        if len(os.fsencode(candidate)) <= MAX_IPC_PATH_BYTES:
            return f"ipc://{candidate}"
    if system_socket.exists():
        return f"ipc://{system_socket}"
    return f"ipc:///tmp/sterna-{os.getuid()}/sterna.sock"


def check_url(url: str, origin: str = "socket") -> str:
    """Return `url` if a daemon can listen there; raises ConfigError that names `origin` if not."""
    if url.startswith("tcp://"):
        raise ConfigError(
            f"{origin}: expected ipc://PATH, found {url!r}: TCP comes in a later version, with CURVE keys"
        )
    path = url.removeprefix("ipc://")
    if path == url or not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ConfigError(f"{origin}: expected ipc:// and the absolute path of a socket, found {url!r}")
    n_bytes = len(os.fsencode(path))
    if n_bytes > MAX_IPC_PATH_BYTES:
        raise ConfigError(
            f"{origin}: expected a path of at most {MAX_IPC_PATH_BYTES} bytes, found {n_bytes}: {path!r}"
        )
    return url


def ipc_path(url: str) -> Path:
    """Return the path of a checked URL."""
    return Path(url.removeprefix("ipc://"))


def probe(url: str) -> None:
    """Find out at once what ZeroMQ would retry for ever: no socket, nobody behind it, no access.

    Raises DaemonUnreachable or NotPermitted. Returns if somebody listens, or might (a full backlog).
    """
    import socket as stdlib_socket

    path = ipc_path(url)
    _refuse_squatted(path)
    with stdlib_socket.socket(stdlib_socket.AF_UNIX, stdlib_socket.SOCK_STREAM) as trial:
        trial.setblocking(False)
        try:
            trial.connect(os.fspath(path))
        except FileNotFoundError:
            raise unreachable(url, "there is no such socket") from None
        except ConnectionRefusedError:
            raise unreachable(url, "nothing listens there") from None
        except PermissionError:
            raise NotPermitted(f"no access to the socket {url}: {os.strerror(errno.EACCES)}") from None
        except BlockingIOError:
            return
        except OSError as e:
            raise unreachable(url, e.strerror or str(e)) from None


def unreachable(url: str, why: str) -> DaemonUnreachable:
    """Return the error for a daemon that is not there, with the way out."""
    return DaemonUnreachable(f"no daemon at {url}: {why}; start one with 'sterna serve'")


def server_socket(context: zmq.Context[S], *, max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> S:
    """Return an unbound ROUTER; a send raises EHOSTUNREACH if the client is gone, EAGAIN if it is slow."""
    import zmq

    socket = _hardened(context.socket(zmq.ROUTER), max_frame_bytes)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
    socket.setsockopt(zmq.RCVHWM, 64)
    socket.setsockopt(zmq.SNDHWM, 256)
    socket.setsockopt(zmq.BACKLOG, 128)
    return socket


def client_socket(context: zmq.Context[S], *, max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES) -> S:
    """Return an unconnected DEALER."""
    import zmq

    socket = _hardened(context.socket(zmq.DEALER), max_frame_bytes)
    socket.setsockopt(zmq.RCVHWM, 256)
    socket.setsockopt(zmq.SNDHWM, 64)
    return socket


def _hardened(socket: S, max_frame_bytes: int) -> S:
    import zmq

    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5_000)
    return socket


def _usable_folder(folder: Path) -> bool:
    try:
        found = folder.stat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK)
    )


def _refuse_squatted(path: Path) -> None:
    """Do not talk to a stranger who made our folder in /tmp before we did."""
    try:
        folder, above = path.parent.stat(), path.parent.parent.stat()
    except OSError:
        return  # the connect that follows tells what is wrong
    if (
        above.st_mode & stat.S_IWOTH
        and above.st_mode & stat.S_ISVTX
        and folder.st_uid not in (os.getuid(), 0)
    ):
        raise NotPermitted(f"the folder {path.parent} belongs to user {folder.st_uid}, not to you")
