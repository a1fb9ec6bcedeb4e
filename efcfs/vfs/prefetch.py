"""Small files that will be read next: the rest of a directory of which several files were read.

A reader that opens files in the order of the listing, or against it, gets those that follow; one that opens a
good part of a directory in any order gets all of it. It works from kept listings (`directories.py`), so after a
readdir: the handles and versions are known and nothing but the bytes is asked for. They go into the cache, and
from there into the kernel's page cache where that saves a request (`store_pages`): on an immutable mount a file whose
pages are there is opened, read and closed without one.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable

import trio

from efcfs.nfs import nfs3
from efcfs.nfs.nfs3 import DirEntryPlus
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.rpc import Credential
from efcfs.vfs.directories import Directories
from efcfs.vfs.errors import SERVER_ERRORS
from efcfs.vfs.inodes import Inode, Inodes
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
# Of files whose pages the kernel has, it does not tell that they are read; so one in so many has none, to tell where
# the reader is.
MARKER = 8
MAX_TO_STORE = 64

# As in `attributes.Kernel`.
StorePages = Callable[[int, bytes], None]


class Progress:
    """What was opened of one directory: the last place in its listing, which way, opens in order, opens in all."""

    __slots__ = ("ahead_to", "everything", "in_order", "ino", "number", "opened", "place", "running", "step")

    def __init__(self, ino: int, number: int) -> None:
        self.ino = ino
        self.number = number
        self.place = -1
        # 1: in the order of the listing; -1: against it.
        self.step = 1
        self.in_order = 0
        self.opened = 0
        # All of it was prefetched, or was tried to be.
        self.everything = False
        # The next place to prefetch.
        self.ahead_to = 0
        self.running = False


class Prefetch:
    """For all directories of one mount."""

    def __init__(self, directories: Directories, reader: Reader, inodes: Inodes, nursery: trio.Nursery) -> None:
        self.store_pages: StorePages | None = None
        self._directories = directories
        self._inodes = inodes
        self._reader = reader
        self._nursery = nursery
        self._progress: OrderedDict[int, Progress] = OrderedDict()
        self._to_store: list[tuple[int, bytes]] = []
        self._storing = False

    def opened(self, inode: Inode, cred: Credential) -> None:
        """A file is opened for reading."""
        try:
            directory = self._inodes.get(inode.parent)
        except KeyError:
            return  # the kernel has forgotten it
        known = self._directories.known(directory)
        place = self._directories.listings.place(known.number, inode.name) if known is not None else None
        if known is None or place is None:
            return
        progress = self._progress.get(directory.ino)
        if progress is None or progress.number != known.number:
            progress = self._progress[directory.ino] = Progress(directory.ino, known.number)
            if len(self._progress) > MAX_DIRECTORIES:
                self._progress.popitem(last=False)
        self._progress.move_to_end(directory.ino)
        moved = (place - progress.place) * progress.step
        progress.in_order = progress.in_order + 1 if 0 < moved <= MAX_GAP else 0
        if moved < 0 and not progress.running:
            progress.step, progress.ahead_to = -progress.step, place
        progress.place = place
        progress.opened += 1
        if progress.running or progress.everything:
            return
        if progress.in_order >= IN_ORDER:
            if (progress.ahead_to - place) * progress.step < 0:
                progress.ahead_to = place + progress.step
            if (progress.ahead_to - place) * progress.step < AHEAD_FILES // 2:
                progress.running = True
                self._nursery.start_soon(self._run, progress, cred)
            return
        many = max(MANY, MOST_SHARE * self._directories.listings.count(known.number))
        if progress.opened >= many and not progress.in_order:
            progress.running = progress.everything = True
            progress.step, progress.ahead_to = 1, 0
            self._nursery.start_soon(self._run, progress, cred)

    async def _run(self, progress: Progress, cred: Credential) -> None:
        """Prefetch from `ahead_to` on; ends when it is far enough ahead, until a later open."""
        left_bytes = AHEAD_BYTES
        batch: list[tuple[int, DirEntryPlus]] = []

        async def following() -> tuple[int, DirEntryPlus] | None:
            """The next file to load; the workers share what comes of a batch."""
            nonlocal left_bytes
            while True:
                while batch:
                    place, entry = batch.pop(0)
                    if self._is_wanted(entry) and entry.attr is not None:
                        left_bytes -= entry.attr.size
                        return place, entry
                far = (progress.ahead_to - progress.place) * progress.step >= AHEAD_FILES or left_bytes <= 0
                if (far and not progress.everything) or not self._reader.has_room:
                    return None
                batch.extend(self._batch(progress))
                if not batch:
                    return None
                await trio.lowlevel.checkpoint()

        async def worker() -> None:
            while (chosen := await following()) is not None:
                await self._load(progress, *chosen, cred)

        try:
            async with open_nursery() as nursery:
                for _ in range(MAX_AT_ONCE):
                    nursery.start_soon(worker)
        finally:
            progress.running = False

    def _is_wanted(self, entry: DirEntryPlus) -> bool:
        attr = entry.attr
        if attr is None or entry.fh is None or attr.type != nfs3.NF3REG or not 0 < attr.size <= SMALL_FILE_BYTES:
            return False
        return not self._reader.has(entry.fh, attr)

    def _batch(self, progress: Progress) -> list[tuple[int, DirEntryPlus]]:
        """The next entries in the reader's direction, with their places."""
        listings, at = self._directories.listings, progress.ahead_to
        if progress.step > 0:
            entries = listings.at(progress.number, at, MAX_AT_ONCE)
            progress.ahead_to += len(entries)
            return list(enumerate(entries, at))
        if at < 0:
            return []
        low = max(0, at - MAX_AT_ONCE + 1)
        entries = listings.at(progress.number, low, at - low + 1)
        progress.ahead_to = low - 1
        return list(enumerate(entries, low))[::-1]

    async def _load(self, progress: Progress, place: int, entry: DirEntryPlus, cred: Credential) -> None:
        assert entry.attr is not None and entry.fh is not None
        try:
            there = await self._reader.load(cred, entry.fh, 0, entry.attr, 0, entry.attr.size)
        except SERVER_ERRORS as error:
            log.debug("prefetch of %r: %s", entry.name, error)  # who opens it gets the error
            return
        # Not where the reader may be already: storing waits for a page that is being read.
        ahead = not progress.everything and (place - progress.place) * progress.step > MARKER
        if there is not None and self.store_pages is not None and ahead and place % MARKER:
            inode = self._inodes.at(progress.ino, entry.name)
            if inode is not None and inode.fh == entry.fh and len(self._to_store) < MAX_TO_STORE:
                self._to_store.append((inode.ino, bytes(there)))
                if not self._storing:
                    self._storing = True
                    self._nursery.start_soon(self._store, self.store_pages)

    async def _store(self, store_pages: StorePages) -> None:
        """Give the kernel what has come: in a thread, for it may wait for pages that are being read."""
        while self._to_store:
            files, self._to_store = self._to_store, []
            await trio.to_thread.run_sync(_store_all, store_pages, files, abandon_on_cancel=True)
        self._storing = False


def _store_all(store_pages: StorePages, files: list[tuple[int, bytes]]) -> None:
    for ino, data in files:
        store_pages(ino, data)
