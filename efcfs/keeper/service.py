"""A keeper that systemd runs: sd_notify(3), and the store that keeps the mount's fds while no keeper lives.

Without NOTIFY_SOCKET in the environment nothing here does anything.
"""

import contextlib
import os
import socket

FUSE, STATE = "efcfs-fuse", "efcfs-state"
LISTEN_FDS_START = 3
SEND_S = 5.0


def notify(*lines: str, fd: int | None = None) -> None:
    """Tell the service manager."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.settimeout(SEND_S)
        sock.connect(address)
        socket.send_fds(sock, ["\n".join(lines).encode()], [] if fd is None else [fd])


def store(name: str, fd: int) -> None:
    """Have the service manager keep the fd. It must not poll it: each request would wake it up."""
    notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fd=fd)


def forget(name: str) -> None:
    notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def inherited() -> dict[str, int]:
    """What a keeper before us left in the store, by name."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    fds = range(LISTEN_FDS_START, LISTEN_FDS_START + int(os.environ.get("LISTEN_FDS", "0")))
    return dict(zip(names, fds, strict=False))
