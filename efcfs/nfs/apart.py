"""RENAMEs between two directories, and calls that go into one of them, do not meet on the server.

NFS-Ganesha sleeps for a second in such a RENAME when it finds the lock of one of the two taken (mdcache_src_dest_lock),
by a LOOKUP, a REMOVE or a READDIR. The kernel lets nobody list or change what it renames in; what it does not hold back
does: LOOKUPs of names that are known and no longer fresh, and calls of the daemon's own. Nobody waits longer than the
second that is to be saved: the server may be away, and a LOOKUP then wants to be told so. No I/O here.
"""

import contextlib
from collections.abc import AsyncIterator

import trio

from efcfs.nfs.light import in_task

MOST_S = 1.0


class Apart:
    """Of one server."""

    __slots__ = ("_inside", "_waiting", "moving")

    def __init__(self) -> None:
        # Directories that a RENAME is for, or waits for; and how many calls are in others.
        self.moving: set[bytes] = set()
        self._inside: dict[bytes, int] = {}
        self._waiting = trio.lowlevel.ParkingLot()

    async def enter(self, fh: bytes) -> None:
        """Wait until no RENAME is for that directory. To be followed by `leave`."""
        if fh in self.moving:
            await in_task()
            with trio.move_on_after(MOST_S):
                while fh in self.moving:  # which may have changed while the task began
                    await self._waiting.park()
        self._inside[fh] = self._inside.get(fh, 0) + 1

    def leave(self, fh: bytes) -> None:
        left = self._inside[fh] - 1
        if left:
            self._inside[fh] = left
        else:
            del self._inside[fh]
            if self.moving:
                self._waiting.unpark_all()

    @contextlib.asynccontextmanager
    async def between(self, *fhs: bytes) -> AsyncIterator[None]:
        """A RENAME is to go from one directory to the other: not before those are out who are in there."""
        await in_task()
        with trio.move_on_after(MOST_S):
            while not self.moving.isdisjoint(fhs):
                await self._waiting.park()
        self.moving.update(fhs)
        try:
            with trio.move_on_after(MOST_S):
                while not self._inside.keys().isdisjoint(fhs):
                    await self._waiting.park()
            yield
        finally:
            self.moving.difference_update(fhs)
            self._waiting.unpark_all()
