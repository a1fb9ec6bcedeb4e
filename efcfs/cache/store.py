"""The tiers of one machine, stacked: memory before disks.

Readers are answered from mappings of the memory tier's files. What is not there comes from a disk, or from
whoever `fetch` asks; once it is written, the index says that it is there. Who finds no room is told so and
goes on without the cache: nobody waits for an eviction. What memory evicts goes to a disk.

A file here is one version of one file: other contents are another file. This module knows nothing of NFS
but that a version can be told, and runs in the event loop; what blocks, it sends to threads, and leaves them
behind when the mount ends: a disk that hangs must not keep it.
"""

import errno
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence

import lmdb
import trio

from efcfs.cache.damage import DAMAGE
from efcfs.cache.demotion import Demotion
from efcfs.cache.file import CachedFile, file_digest, file_key
from efcfs.cache.index import CHUNK_BYTES, CHUNKS, EXTENT_BYTES, Change
from efcfs.cache.tier import HIGH_WATER, Tier, checksum

log = logging.getLogger(__name__)

# Files kept open, with up to two descriptors each.
MAX_FILES = 1024
# Smaller files are read into a buffer: mapping one and taking its page faults costs more than the copy.
MAPPED_BYTES = 512 * 1024
# So little is claimed and written in one transaction, which saves 15 µs, and holds up others for as long.
KEPT_AT_ONCE_BYTES = 256 * 1024
HOUSEKEEPING_S = 0.5
STRANGERS_S = 10.0
# A line in the log so often at most, for each byte that finds no room.
LINE_S = 60.0
MAX_IDLE_BUFFERS = 16
# A little below where eviction ends.
CROWDED = 0.85

# Fills the memory from an offset of the file; False: the bytes are not (or not surely) of this version.
Fetch = Callable[[int, memoryview], Awaitable[bool]]


class Store:
    """All tiers. `run` must be running."""

    def __init__(self, memory: Tier, disks: Sequence[Tier] = (), *, verify_memory: bool = False) -> None:
        self.memory = memory
        self.disks = list(disks)
        self._verify_memory = verify_memory
        self._files: OrderedDict[bytes, CachedFile] = OrderedDict()
        self._evict = trio.Event()
        # Memory is about as full as it gets: then what a disk has is not brought in, to be evicted at once.
        self.crowded = False
        self._until_look = 0
        self._next_line_at = 0.0
        self._idle_buffers: list[memoryview] = []
        self._answer = memoryview(bytearray(MAPPED_BYTES))
        self._demotion = Demotion(self.memory, self.disks)

    @property
    def tiers(self) -> list[Tier]:
        return [self.memory, *self.disks]

    async def run(self) -> None:
        """Evict, demote, probe and note what was used, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._demotion.run)
            nursery.start_soon(self._remove_strangers)
            while True:
                with trio.move_on_after(HOUSEKEEPING_S):
                    await self._evict.wait()
                self._evict = trio.Event()
                if self.memory.usable():
                    self.memory.index.rest()
                await trio.to_thread.run_sync(self._keep_house, abandon_on_cancel=True)

    def close(self) -> None:
        for tier in self.tiers:
            tier.close()

    # -- files -------------------------------------------------------------------------------------

    def file(self, identity: bytes, size_bytes: int, mtime_ns: int, ctime_ns: int) -> CachedFile | None:
        """This version of the file; None when it can have no place. Other versions of it are dropped."""
        if not size_bytes or not self.memory.usable():
            return None
        key = file_key(identity, size_bytes, mtime_ns, ctime_ns)
        file = self._files.get(key)
        if file is not None and file.index is self.memory.index:
            self._files.move_to_end(key)
            return file
        digest = file_digest(identity)
        try:
            present = self.memory.index.present_version(digest)
            if present is not None and present != key:
                self._drop(present)
            fd = self.memory.open(key, size_bytes)
        except (OSError, lmdb.Error) as error:
            self._not_kept(error)
            return None
        file = CachedFile(key, self.memory.index, size_bytes, fd, digest if present != key else None)
        self._files[key] = file
        if len(self._files) > MAX_FILES:
            # Whoever still reads from it holds its memory; it is unmapped after that.
            self._files.popitem(last=False)
        return file

    def get(self, file: CachedFile, offset: int, length_bytes: int) -> memoryview | None:
        """The bytes, if all of them are in memory. The answer is good until the next await."""
        try:
            return self._get(file, offset, length_bytes) if self._knows(file) else None
        except lmdb.Error as error:
            self._not_kept(error)
            return None

    def _get(self, file: CachedFile, offset: int, length_bytes: int) -> memoryview | None:
        memory, end = self.memory, offset + length_bytes
        index, key = memory.index, file.key
        index.renew()
        for number in range(offset // EXTENT_BYTES, (end - 1) // EXTENT_BYTES + 1):
            wanted = _mask(number, offset, end)
            if wanted & ~index.mask(key, number):
                memory.counters.misses += 1
                return None
            memory.touch(key, number)
            if self._verify_memory and not self._matches(file, number, wanted):
                return None
            if file.size_bytes >= MAPPED_BYTES:
                file.map_pages(number, wanted)
        memory.counters.hits += 1
        if file.size_bytes >= MAPPED_BYTES:
            return file.view[offset:end]
        answer = self._answer[:length_bytes]
        return answer if os.preadv(file.fd, [answer], offset) == length_bytes else None

    def has(self, identity: bytes, size_bytes: int, mtime_ns: int, ctime_ns: int) -> bool:
        """Whether memory has all of this version; a few µs for a small file, which is not opened."""
        if not self.memory.usable():
            return False
        key = file_key(identity, size_bytes, mtime_ns, ctime_ns)
        extents = range(-(-size_bytes // EXTENT_BYTES))
        try:
            self.memory.index.renew()
            return not any(_mask(n, 0, size_bytes) & ~self.memory.index.mask(key, n) for n in extents)
        except lmdb.Error as error:
            self._not_kept(error)
            return False

    def missing(self, file: CachedFile, number: int, offset: int, end: int) -> range | None:
        """The chunks of the extent between `offset` and `end` of the file that memory lacks, as one run.

        None as well where memory can have none of them.
        """
        if not self._knows(file):
            return None
        try:
            self.memory.index.renew()
            lacking = _mask(number, offset, end) & ~self.memory.index.mask(file.key, number)
        except lmdb.Error as error:
            self._not_kept(error)
            return None
        if not lacking:
            return None
        return range((lacking & -lacking).bit_length() - 1, lacking.bit_length())

    async def fill(self, file: CachedFile, number: int, chunks: range, fetch: Fetch) -> bool:
        """Bring in a run of chunks of one extent. False: there is no room, or they are of another version.

        They come into a buffer and are written to the cache's file from there: receiving into its mapping takes
        a page fault for every 4 KiB, 690 µs a MiB in all against 410 for the write.
        The caller sees to it that nobody else fills the same extent of `file` meanwhile. Raises what `fetch` raises.
        """
        start = number * EXTENT_BYTES + chunks.start * CHUNK_BYTES
        end = min(number * EXTENT_BYTES + chunks.stop * CHUNK_BYTES, file.size_bytes)
        at_once = end - start <= KEPT_AT_ONCE_BYTES
        if not self._has_room() or not (at_once or self._reserve(file, number)):
            return False
        buffer = self._idle_buffers.pop() if self._idle_buffers else memoryview(bytearray(EXTENT_BYTES))
        target = buffer[: end - start]
        there = 0
        for disk in self.disks:
            if disk.usable():
                there = await trio.to_thread.run_sync(
                    disk.read_chunks, file.key, number, chunks.start, target, abandon_on_cancel=True
                )
                if there:
                    break
        # What the disk did not have is fetched in one piece from the first to the last of it.
        lacking = [chunk for chunk in chunks if not there >> chunk & 1]
        if lacking:
            low = number * EXTENT_BYTES + lacking[0] * CHUNK_BYTES
            high = min(number * EXTENT_BYTES + (lacking[-1] + 1) * CHUNK_BYTES, end)
            if not await fetch(low, target[low - start : high - start]):
                return False
        # In the loop, 0.4 ms a MiB: handing it to a thread made reading 15 % slower.
        kept = self._keep(file, number, chunks.start, target, reserve=at_once)
        if len(self._idle_buffers) < MAX_IDLE_BUFFERS:
            self._idle_buffers.append(buffer)  # not when the fetch failed: something may still come into it
        if not kept:
            self._files.pop(file.key, None)  # it lost its name to an eviction: map it anew
        return kept

    async def beside_memory(self, file: CachedFile, offset: int, length_bytes: int) -> memoryview | None:
        """The bytes from a disk into a buffer of their own, if one has all of them: for when memory has no room."""
        low = offset // CHUNK_BYTES * CHUNK_BYTES
        end = offset + length_bytes
        buffer = memoryview(bytearray(min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, file.size_bytes) - low))

        def read(disk: Tier) -> bool:
            for number in range(low // EXTENT_BYTES, (end - 1) // EXTENT_BYTES + 1):
                start = max(low, number * EXTENT_BYTES)
                piece = buffer[start - low : (number + 1) * EXTENT_BYTES - low]
                wanted = _mask(number, start, start + len(piece))
                if disk.read_chunks(file.key, number, start % EXTENT_BYTES // CHUNK_BYTES, piece) != wanted:
                    return False
            return True

        for disk in self.disks:
            if disk.usable() and await trio.to_thread.run_sync(read, disk, abandon_on_cancel=True):
                return buffer[offset - low : end - low]
        return None

    # -- for the commands --------------------------------------------------------------------------

    @property
    def room_bytes(self) -> int:
        """How much can be here at once: memory's blocks are on the disks too, where there are any."""
        disks_bytes = sum(disk.capacity_bytes for disk in self.disks if disk.usable())
        return int(HIGH_WATER * max(disks_bytes, self.memory.capacity_bytes))

    async def on_disk(self, key: bytes, number: int, size_bytes: int) -> bool:
        """Whether a disk has the whole extent."""
        wanted = _mask(number, 0, size_bytes)
        for disk in self.disks:
            if disk.usable() and not wanted & ~await trio.to_thread.run_sync(disk.mask, key, number):
                return True
        return False

    async def save(self, key: bytes, number: int) -> bool:
        """Prefer an extent that memory has to what was only read once, and write it to a disk. False: it is gone.

        Waits for a disk that is slower than the caller.
        """
        try:
            with self.memory.index.change() as txn:
                txn.promote(key, number)
        except (OSError, lmdb.Error) as error:
            self._not_kept(error)
        return not self.disks or await self._demotion.save(key, number)

    async def saved(self) -> None:
        """Until all that is on its way to a disk is there."""
        await self._demotion.done()

    def cached_bytes(self, identity: bytes, size_bytes: int, mtime_ns: int, ctime_ns: int) -> dict[str, int]:
        """How much of the file each tier has, and all of them together ("any"), every chunk verified.

        Blocks: for a thread.
        """
        key = file_key(identity, size_bytes, mtime_ns, ctime_ns)
        together: dict[int, int] = {}
        told: dict[str, int] = {}
        for tier in self.tiers:
            if tier.usable():
                here = tier.verified(key, size_bytes)
                told[tier.name] = _bytes_in(here, size_bytes)
                for number, mask in here.items():
                    together[number] = together.get(number, 0) | mask
        return {**told, "any": _bytes_in(together, size_bytes)}

    def evict_file(self, identity: bytes, size_bytes: int, mtime_ns: int, ctime_ns: int) -> None:
        """Forget the file in all tiers. Blocks: for a thread."""
        key = file_key(identity, size_bytes, mtime_ns, ctime_ns)
        for tier in self.tiers:
            if tier.usable():
                try:
                    tier.drop_file(key)
                except (OSError, lmdb.Error) as error:
                    tier.trouble(error)

    def resize(self, name: str, capacity_bytes: int) -> bool:
        """Another quota for a tier; eviction follows. False: there is no such tier. Blocks: for a thread."""
        for tier in self.tiers:
            if tier.name == name and tier.usable():
                try:
                    tier.set_capacity(capacity_bytes)
                    return True
                except (OSError, lmdb.Error) as error:
                    tier.trouble(error)
        return False

    def clear(self) -> None:
        """Empty all tiers. Blocks: for a thread."""
        self._files.clear()
        for tier in self.tiers:
            if tier.usable():
                try:
                    tier.clear()
                except (OSError, lmdb.Error) as error:
                    tier.trouble(error)

    # -- parts -------------------------------------------------------------------------------------

    def _knows(self, file: CachedFile) -> bool:
        """Whether memory's index tells of this file's bytes: not of one from before a failure."""
        return self.memory.usable() and file.index is self.memory.index

    def _not_kept(self, error: Exception) -> None:
        """Memory goes on without some bytes; one with a damaged index is taken out."""
        if isinstance(error, DAMAGE):
            self.memory.fail(error)
        elif time.monotonic() >= self._next_line_at:
            self._next_line_at = time.monotonic() + LINE_S
            log.warning("no room in the cache in memory: %s", error)

    def _has_room(self) -> bool:
        """Whether an extent more may come; near the end of the room eviction is told."""
        self._until_look -= 1
        if self._until_look <= 0:
            try:
                pressure = self.memory.pressure()
            except (OSError, lmdb.Error) as error:
                self._not_kept(error)
                return False
            # Looking takes 10 µs, so far from a full tier it is not done for each extent.
            room_bytes = (HIGH_WATER - pressure) * self.memory.capacity_bytes
            self._until_look = int(room_bytes / EXTENT_BYTES / 8)
            self.crowded = pressure > CROWDED
            if pressure > HIGH_WATER:
                self._evict.set()
                return pressure < 1.0
        return True

    def _reserve(self, file: CachedFile, number: int) -> bool:
        """Claim the extent: it is not punched while its bytes are under way."""
        try:
            with self.memory.index.change() as txn:
                self._claim(txn, file, number)
        except (OSError, lmdb.Error) as error:
            self._not_kept(error)
            return False
        file.unset = None
        return True

    @staticmethod
    def _claim(txn: Change, file: CachedFile, number: int) -> None:
        if file.unset is not None:
            txn.set_version(file.unset, file.key)
        txn.reserve(file.key, number)

    def _keep(self, file: CachedFile, number: int, first: int, data: memoryview, *, reserve: bool) -> bool:
        """Write chunks to the cache's file, then to the index; with `reserve` all in one transaction."""
        sums = [
            (first + start // CHUNK_BYTES, checksum(data[start : start + CHUNK_BYTES]))
            for start in range(0, len(data), CHUNK_BYTES)
        ]
        offset = number * EXTENT_BYTES + first * CHUNK_BYTES
        if not self._knows(file):
            return False
        try:
            if not reserve:
                _write(file.fd, data, offset)
            with self.memory.index.change() as txn:
                # Eviction takes the names of files without extents, in transactions too.
                if os.fstat(file.fd).st_nlink == 0:
                    return False
                if reserve:
                    self._claim(txn, file, number)
                    _write(file.fd, data, offset)
                kept = txn.add(file.key, number, sums)
        except (OSError, lmdb.Error) as error:
            self._not_kept(error)
            return False
        file.unset = None
        file.filled(number)
        return kept

    def _matches(self, file: CachedFile, number: int, wanted: int) -> bool:
        """Whether chunks in memory are what their sums say."""
        record = self.memory.index.look(file.key, number)
        for chunk in range(CHUNKS):
            if record is not None and wanted >> chunk & 1:
                start = number * EXTENT_BYTES + chunk * CHUNK_BYTES
                if checksum(file.view[start : min(start + CHUNK_BYTES, file.size_bytes)]) != record.sum_of(chunk):
                    self.memory.found_bad(file.key, number, chunk, record)
                    return False
        return record is not None

    def _drop(self, key: bytes) -> None:
        self._files.pop(key, None)
        self.memory.drop_file(key)  # the disks' copy is never asked for again, and leaves in its time

    def _keep_house(self) -> None:
        demote = self._demotion.demote if any(disk.usable() for disk in self.disks) else None
        for tier in self.tiers:
            try:
                tier.probe()
                if not (tier.usable() and tier.has_its_index()):
                    continue
                tier.note_touches()
                pressure = tier.pressure()
                if tier is self.memory:
                    self.crowded = pressure > CROWDED
                if pressure > HIGH_WATER:
                    tier.evict(demote if tier is self.memory else None)
                tier.punch_due()
            except (OSError, lmdb.Error) as error:
                if tier is self.memory and not isinstance(error, DAMAGE):
                    log.warning("memory cache: %s", error)
                else:
                    tier.trouble(error)

    async def _remove_strangers(self) -> None:
        while True:
            await trio.sleep(STRANGERS_S)  # first: a daemon that takes over has other things to do
            for tier in self.tiers:
                if tier.usable():
                    await trio.to_thread.run_sync(tier.remove_strangers, abandon_on_cancel=True)

def _write(fd: int, data: memoryview, offset: int) -> None:
    if os.pwrite(fd, data, offset) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _mask(number: int, offset: int, end: int) -> int:
    """The chunks of extent `number` that hold any of the file's bytes from `offset` to `end`."""
    start = number * EXTENT_BYTES
    low = max(offset - start, 0) // CHUNK_BYTES
    high = min(-(-(end - start) // CHUNK_BYTES), CHUNKS)
    return (1 << high) - (1 << low)


def _bytes_in(masks: Mapping[int, int], size_bytes: int) -> int:
    """Bytes of a file of that size in these chunks of its extents; the last chunk may be a short one."""
    total = sum(mask.bit_count() for mask in masks.values()) * CHUNK_BYTES
    last = (size_bytes - 1) // CHUNK_BYTES
    short = masks.get(last // CHUNKS, 0) >> last % CHUNKS & 1
    return total - (-size_bytes % CHUNK_BYTES if short else 0)
