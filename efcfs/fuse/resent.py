"""Requests that daemons die over: the third death over one is its last, so that no request ends a mount.

The kernel sends again what a dead daemon had taken and not answered, so one request that ends a daemon would end each
that follows, until the keeper gives the mount up. Message queues put such a message aside after so many deliveries;
here it is answered EIO. That a request is begun again is written down before it is served.

A death counts if the daemon died by itself, within a minute of having begun the request. A kill from outside tells
nothing of the requests, nor does an upgrade; and a request that waits for a server that is away is there whenever a
daemon dies. Nothing is written for a request that comes the first time.
"""

import logging
import os
import struct
import time
from pathlib import Path

log = logging.getLogger(__name__)

MOST_DEATHS = 3
BLAMED_S = 60.0
# What the keeper says of a daemon that died by itself.
BY_ITSELF = (
    "internal error", "exit code", "hung for", "signal SIGSEGV", "signal SIGBUS", "signal SIGABRT", "signal SIGILL",
    "signal SIGFPE",
)  # fmt: skip

# A request's number, how many daemons died over it, and when it was begun again (monotonic seconds); the number 0,
# which no request has, with how many daemons had died when another one began.
_RECORD = struct.Struct("<QQd")
# A file that is longer is begun anew.
MOST_BYTES = 256 * 1024


class Resent:
    """What one mount's daemons died over; kept in a file at `path`.

    failovers: how many daemons of the mount have died; last_exit: how the last of them did.
    """

    def __init__(self, path: Path, failovers: int, last_exit: str) -> None:
        self._begun: dict[int, tuple[int, float]] = {}
        before = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        size_bytes = os.fstat(self._fd).st_size
        data = os.pread(self._fd, size_bytes - size_bytes % _RECORD.size, 0)
        for unique, number, at in _RECORD.iter_unpack(data):
            if unique:
                self._begun[unique] = number, at
            else:
                before = number
        if size_bytes > MOST_BYTES or size_bytes % _RECORD.size:
            os.ftruncate(self._fd, 0)
        # Since a daemon of this mount began; an upgrade changes neither number nor exit.
        self._died = failovers > before and last_exit.startswith(BY_ITSELF)
        self._write(0, failovers, time.monotonic())

    def is_last(self, unique: int, opcode: int) -> bool:
        """Note that a request comes again. True: it must not be served any more."""
        now = time.monotonic()
        deaths, begun_at = self._begun.get(unique, (0, now))
        if self._died and now - begun_at < BLAMED_S:
            deaths += 1
        self._begun[unique] = deaths, now
        self._write(unique, deaths, now)
        if deaths < MOST_DEATHS:
            return False
        log.error("%d daemons died over one request (opcode %d of <linux/fuse.h>): it is answered EIO", deaths, opcode)
        return True

    def nobody_died(self) -> None:
        """What comes again from now on was taken by a daemon that has gone, but did not die."""
        self._died = False

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, unique: int, number: int, at: float) -> None:
        try:
            os.write(self._fd, _RECORD.pack(unique, number, at))
        except OSError as error:  # a full /dev/shm: then it is not counted
            log.warning("requests that come again are not counted: %s", error)
