"""What memory evicts, on its way to the disks.

Each file has one disk. A queue lies between: evicting must not wait for a disk, and one that is slower than the
readers loses some of what leaves memory. `Demotion.run` writes, in a thread.
"""

from collections import deque
from collections.abc import Callable, Sequence

import trio

from efcfs.cache.index import Victim
from efcfs.cache.tier import Leaving, Tier

MAX_LEAVING_BYTES = 32 * 1024 * 1024


class Demotion:
    """From the tier in memory to those on disks. `run` must be running."""

    def __init__(self, memory: Tier, disks: Sequence[Tier]) -> None:
        self._memory = memory
        self._disks = disks
        self._leaving: deque[Leaving] = deque()
        self._more = trio.Event()
        self._writing = False
        self._written = trio.Event()

    async def run(self) -> None:
        while True:
            await self._more.wait()
            self._more = trio.Event()
            while self._leaving:
                self._writing = True
                await trio.to_thread.run_sync(self._write, abandon_on_cancel=True)
                self._writing = False
                self._written.set()
                self._written = trio.Event()

    def demote(self, victim: Victim, take_out: Callable[[Victim], Leaving | None]) -> None:
        """Queue what memory evicts; when the disks are slower than the readers, some of it is lost. For a thread."""
        disk = self._disk_of(victim)
        # Most of what is read from a disk leaves memory without being written again.
        if disk is not None and disk.lacks(victim) and self._leaving_bytes() < MAX_LEAVING_BYTES:
            self._queue(take_out(victim))

    async def save(self, key: bytes, number: int) -> bool:
        """Write an extent that memory has, and keeps. False: it is gone. Waits for disks slower than the caller."""
        saved = await trio.to_thread.run_sync(self._save, key, number)
        while self._leaving_bytes() > MAX_LEAVING_BYTES // 2:
            await self._written.wait()
        return saved

    async def done(self) -> None:
        """Until the queue is empty."""
        while self._leaving or self._writing:
            await self._written.wait()

    def _save(self, key: bytes, number: int) -> bool:
        record = self._memory.index.look(key, number)
        victim = Victim(key, number, record) if record is not None else None
        disk = self._disk_of(victim) if victim is not None else None
        if victim is None or disk is None or not disk.lacks(victim):
            return victim is not None
        return self._queue(self._memory.take_out(victim))

    def _queue(self, leaving: Leaving | None) -> bool:
        if leaving is None:
            return False
        self._leaving.append(leaving)
        trio.from_thread.run_sync(self._more.set)
        return True

    def _leaving_bytes(self) -> int:
        return sum(len(leaving.data) for leaving in tuple(self._leaving))

    def _write(self) -> None:
        batch = [self._leaving.popleft() for _ in range(len(self._leaving))]
        for disk in self._disks:
            disk.write_extents([leaving for leaving in batch if self._disk_of(leaving.victim) is disk])

    def _disk_of(self, victim: Victim) -> Tier | None:
        """Each file has one disk; those of a disk that failed go to the others."""
        usable = [disk for disk in self._disks if disk.usable()]
        return usable[int.from_bytes(victim.key[:4], "big") % len(usable)] if usable else None
