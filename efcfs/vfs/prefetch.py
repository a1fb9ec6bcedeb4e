"""Small files that will be read next: the rest of a directory of which several files were read.

A reader that opens files in the order of the listing, or against it, gets those that follow; one that opens a
good part of a directory in any order gets all of it. It works from kept listings (`directories.py`), so after a
readdir: the handles and versions are known and nothing but the bytes is asked for. They go into the cache.
"""

import logging
from collections import OrderedDict

import trio

from efcfs.nfs import nfs3
from efcfs.nfs.nfs3 import DirEntryPlus
from efcfs.nfs.rpc import Credential
from efcfs.vfs.directories import Directories
from efcfs.vfs.errors import SERVER_ERRORS
from efcfs.vfs.inodes import Inode
from efcfs.vfs.reader import Reader

log = logging.getLogger(__name__)

SMALL_FILE_BYTES = 2 * 1024 * 1024
# So many opens in order, each at most so far behind the one before, are a reader in order.
IN_ORDER = 3
MAX_GAP = 8
# So many opens, and such a part of the directory, are a reader of all of it.
MANY = 16
MOST_SHARE = 0.2
# How far ahead of the reader, and how many at once.
AHEAD_FILES = 128
AHEAD_BYTES = 64 * 1024 * 1024
MAX_AT_ONCE = 16
MAX_DIRECTORIES = 256


class Progress:
    """What was opened of one directory: the last place in its listing, which way, opens in order, opens in all."""

    __slots__ = ("ahead_to", "in_order", "number", "opened", "place", "running", "step")

    def __init__(self, number: int) -> None:
        self.number = number
        self.place = -1
        # 1: in the order of the listing; -1: against it.
        self.step = 1
        self.in_order = 0
        self.opened = 0
        # The next place to prefetch.
        self.ahead_to = 0
        self.running = False


class Prefetch:
    """For all directories of one mount."""

    def __init__(self, directories: Directories, reader: Reader, nursery: trio.Nursery) -> None:
        self._directories = directories
        self._reader = reader
        self._nursery = nursery
        self._progress: OrderedDict[int, Progress] = OrderedDict()
        self._at_once = trio.CapacityLimiter(MAX_AT_ONCE)

    def opened(self, directory: Inode, name: bytes, cred: Credential) -> None:
        """A file of the directory was opened for reading."""
        known = self._directories.known(directory)
        place = self._directories.listings.place(known.number, name) if known is not None else None
        if known is None or place is None:
            return
        progress = self._progress.get(directory.ino)
        if progress is None or progress.number != known.number:
            progress = self._progress[directory.ino] = Progress(known.number)
            if len(self._progress) > MAX_DIRECTORIES:
                self._progress.popitem(last=False)
        self._progress.move_to_end(directory.ino)
        moved = (place - progress.place) * progress.step
        progress.in_order = progress.in_order + 1 if 0 < moved <= MAX_GAP else 0
        if moved < 0 and not progress.running:
            progress.step, progress.ahead_to = -progress.step, place
        progress.place = place
        progress.opened += 1
        if progress.running:
            return
        everything = progress.opened >= max(MANY, MOST_SHARE * self._directories.listings.count(known.number))
        if everything or progress.in_order >= IN_ORDER:
            progress.running = True
            self._nursery.start_soon(self._run, progress, cred, everything)

    async def _run(self, progress: Progress, cred: Credential, everything: bool) -> None:
        """Prefetch from the reader's place on; ends when it is far enough ahead, until the next open."""
        try:
            ahead_bytes, step = 0, progress.step
            if everything:
                step, progress.ahead_to = 1, 0
            elif (progress.ahead_to - progress.place) * step <= 0:
                progress.ahead_to = progress.place + step
            async with trio.open_nursery() as nursery:
                while self._reader.has_room and (
                    everything or (progress.ahead_to - progress.place) * step < AHEAD_FILES
                ):
                    entries = self._batch(progress, step)
                    for entry in entries:
                        if entry.attr is None or entry.attr.type != nfs3.NF3REG or entry.attr.size > SMALL_FILE_BYTES:
                            continue
                        ahead_bytes += entry.attr.size
                        await self._at_once.acquire_on_behalf_of(entry)
                        nursery.start_soon(self._load, entry, cred)
                    if not entries or (ahead_bytes > AHEAD_BYTES and not everything):
                        break
        finally:
            progress.running = False

    def _batch(self, progress: Progress, step: int) -> list[DirEntryPlus]:
        """The next entries in the reader's direction."""
        listings = self._directories.listings
        if step > 0:
            entries = listings.at(progress.number, progress.ahead_to, MAX_AT_ONCE)
            progress.ahead_to += len(entries)
            return entries
        low = max(0, progress.ahead_to - MAX_AT_ONCE + 1)
        if progress.ahead_to < 0:
            return []
        entries = listings.at(progress.number, low, progress.ahead_to - low + 1)
        progress.ahead_to = low - 1
        return entries[::-1]

    async def _load(self, entry: DirEntryPlus, cred: Credential) -> None:
        assert entry.attr is not None and entry.fh is not None
        try:
            await self._reader.load(cred, entry.fh, 0, entry.attr, 0, entry.attr.size)
        except SERVER_ERRORS as error:
            log.debug("prefetch of %r: %s", entry.name, error)  # who opens it gets the error
        finally:
            self._at_once.release_on_behalf_of(entry)
