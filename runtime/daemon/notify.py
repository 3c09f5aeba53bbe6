"""Telling the service manager how we are (sd_notify), in a dozen lines of the standard library."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(text: str) -> None:
    """Send `text` ("READY=1", "STATUS=...", "STOPPING=1") to $NOTIFY_SOCKET; without one do nothing.

    A manager that does not listen is no reason to fail.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(1.0)
        channel.sendto(text.encode(), address)
