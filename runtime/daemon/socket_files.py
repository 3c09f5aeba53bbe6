"""What a daemon holds in the file system: its socket with the lock beside it, a folder for inner sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import zmq

from ...shm.errors import AlreadyRunning, NotPermitted
from ..protocol.sockets import server_socket

RUN_FOLDER_PREFIX = "sterna-"


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[int]:
    """Hold the lock beside the socket and yield it; a second bind of an ipc path would silently steal it.

    Raises AlreadyRunning, or NotPermitted when the folder cannot be written. The socket goes at the
    end, the lock file stays: removing it would let two daemons hold two locks.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NotPermitted(f"cannot make the socket's lock {path}.lock: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(f"another daemon serves ipc://{path}") from None
        try:
            yield fd
        finally:
            with contextlib.suppress(OSError):  # there may be something else in its place
                path.unlink()
    finally:
        os.close(fd)


@contextlib.contextmanager
def run_folder(lock_fd: int) -> Iterator[Path]:
    """Yield a fresh folder for the inner sockets and remove it at the end.

    Its name stands in the lock file: one that a killed daemon left is removed by the next on that socket.
    """
    left = Path(os.fsdecode(os.pread(lock_fd, 4096, 0)))
    if left.name.startswith(RUN_FOLDER_PREFIX) and left.is_dir() and left.stat().st_uid == os.getuid():
        shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=RUN_FOLDER_PREFIX))
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, os.fsencode(folder), 0)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.ftruncate(lock_fd, 0)


def bind_clients(url: str) -> zmq.Socket[bytes]:
    """Return the clients' ROUTER socket; its file has the mode that the umask gives, at most 0660."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = server_socket(context)
    before = os.umask(os.umask(0o077) | 0o007)
    try:
        socket.bind(url)
    except zmq.ZMQError as error:
        socket.close()
        raise NotPermitted(f"cannot listen on {url}: {error.strerror}") from error
    finally:
        os.umask(before)
    return socket
