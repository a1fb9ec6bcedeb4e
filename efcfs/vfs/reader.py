"""The read path: what the cache has, demand reads, readahead.

A read is answered from the mapping of a cache file, without a copy. What is missing is fetched
into it, in chunks of 64 KiB for a random read and in extents of 1 MiB for a sequential one; concurrent readers of
one extent wait for one fetch. Each handle's reads are sorted into streams: sequential ones (several in one
file) and strided ones are read ahead, others are not. Where the cache has no room the bytes go through a
buffer of their own.

`FetchFrom` is the seam to the server: bytes of a file into a buffer, and the attributes that belong to them.
"""

import logging
import time
from typing import NamedTuple, Protocol

import trio

from efcfs.cache.file import CachedFile, file_key
from efcfs.cache.index import EXTENT_BYTES
from efcfs.cache.store import Store
from efcfs.nfs.client import Client
from efcfs.nfs.nfs3 import Fattr
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.rpc import Credential
from efcfs.vfs.attributes import version
from efcfs.vfs.errors import SERVER_ERRORS
from efcfs.vfs.openfile import Handle, Stream

log = logging.getLogger(__name__)

# The kernel sends several requests of its own readahead at once, in any order.
DISORDER_BYTES = 4 * 1024 * 1024
# So much read in order makes a stream worth reading ahead.
SEQUENTIAL_BYTES = 256 * 1024
# A window starts small, and doubles each time its reader had to wait: so it finds the bandwidth-delay product.
MIN_WINDOW_BYTES = 4 * 1024 * 1024
MAX_WINDOW_BYTES = 64 * 1024 * 1024
MAX_STREAMS = 8
# Strides that repeat so often are believed, and so many of them read ahead.
STRIDE_HITS = 3
STRIDES_AHEAD = 8
# Extents under way for readahead, all files together: enough for 64 links, and little for a demand read to wait for.
MAX_AHEAD = 32
MAX_IDLE_BUFFERS = 8


class Fetched(NamedTuple):
    """`length_bytes` came before end of file; `attr` of the file when it was read, None when it changed meanwhile."""

    length_bytes: int
    attr: Fattr | None


class FetchFrom(Protocol):
    """Fill `target` from `offset` of the file."""

    async def __call__(self, cred: Credential, fh: bytes, offset: int, target: memoryview) -> Fetched: ...


class Learn(Protocol):
    """Attributes of a file that came with its bytes, from a READ sent at `asked_at`."""

    def __call__(self, ino: int, attr: Fattr, asked_at: float) -> None: ...


class Written(Protocol):
    """How many writes of ours there were to a file that is open; None: some of them are not on the server yet."""

    def __call__(self, ino: int) -> int | None: ...


def fetch_from(client: Client) -> FetchFrom:
    """Fetch from the server, in READs of at most rsize, all sent at once."""

    async def one(cred: Credential, fh: bytes, offset: int, target: memoryview) -> Fetched:
        filled = 0
        while True:
            result = await client.read(cred, fh, offset + filled, target[filled:])
            filled += result.count
            if filled == len(target) or result.eof or not result.count:
                attr = result.attr if result.attr is not None else await client.getattr(cred, fh)
                return Fetched(filled, attr)

    async def fetch(cred: Credential, fh: bytes, offset: int, target: memoryview) -> Fetched:
        rsize = client.rsize
        if len(target) <= rsize:
            return await one(cred, fh, offset, target)
        pieces: dict[int, Fetched] = {}

        async def piece(start: int) -> None:
            pieces[start] = await one(cred, fh, offset + start, target[start : start + rsize])

        async with open_nursery() as nursery:
            for start in range(0, len(target), rsize):
                nursery.start_soon(piece, start)
        # A short piece is the end of file, whatever a race with a writer put after it.
        total = 0
        for start in range(0, len(target), rsize):
            total += pieces[start].length_bytes
            if pieces[start].length_bytes < min(rsize, len(target) - start):
                break
        versions = {version(p.attr) if p.attr is not None else None for p in pieces.values()}
        return Fetched(total, pieces[0].attr if len(versions) == 1 else None)

    return fetch


class Reader:
    """All reads of one mount. Readahead runs in `nursery`; without a store there is none."""

    def __init__(
        self, fetch: FetchFrom, store: Store | None, server: bytes, learn: Learn, written: Written,
        nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        self._fetch = fetch
        self._store = store
        self._server = server
        self._learn = learn
        self._written = written
        self._nursery = nursery
        self._ahead = trio.CapacityLimiter(MAX_AHEAD)
        self._idle_buffers: list[memoryview] = []

    def at_once(self, handle: Handle, offset: int, size_bytes: int, attr: Fattr) -> memoryview | None:
        """What `read` would answer, if memory has it: most reads of a warm cache end here."""
        store, opened = self._store, handle.file
        if store is None or offset + size_bytes > attr.size:
            return None
        if opened.cached is None or opened.cached[0] is not attr:
            opened.cached = (attr, self.cached(opened.fh, attr))
        file = opened.cached[1]
        if file is None:
            return None
        there = store.get(file, offset, size_bytes)
        if there is not None:
            self._note(handle, file, offset, size_bytes, waits=False)
        return there

    async def read(self, handle: Handle, offset: int, size_bytes: int, attr: Fattr) -> memoryview | bytes:
        """Up to `size_bytes` at `offset` of a file with these attributes; short only at its end as the server has it.

        The memory of the answer belongs to the reader: use it before the next await. Raises what a READ raises.
        """
        size_bytes = min(size_bytes, attr.size - offset)
        if size_bytes <= 0:
            return b""
        there = self.at_once(handle, offset, size_bytes, attr)
        if there is not None:
            return there
        opened, store = handle.file, self._store
        file = opened.cached[1] if opened.cached is not None else None
        if store is not None and file is not None and store.disks and store.crowded:
            there = await store.beside_memory(file, offset, size_bytes)
        if store is not None and file is not None and there is None:
            sequential = self._note(handle, file, offset, size_bytes, waits=True)
            await self._bring(file, handle.cred, opened.fh, opened.ino, offset, size_bytes, sequential)
            opened.cached = None  # so that a file which lost its place in the cache gets a new one
            there = store.get(file, offset, size_bytes)
            if there is None and store.disks:
                there = await store.beside_memory(file, offset, size_bytes)
        # No room, just evicted, or the file changed: then as the server has it now.
        return there if there is not None else await self.exactly(handle, offset, size_bytes)

    async def exactly(self, handle: Handle, offset: int, size_bytes: int) -> memoryview:
        """The bytes as the server has them now, past the cache."""
        size_bytes = max(0, size_bytes)
        # Touching new memory costs as much as receiving into it.
        buffer = self._idle_buffers.pop() if self._idle_buffers else memoryview(bytearray(EXTENT_BYTES))
        target = buffer[:size_bytes] if size_bytes <= len(buffer) else memoryview(bytearray(size_bytes))
        asked_at = time.monotonic()
        fetched = await self._fetch(handle.cred, handle.file.fh, offset, target)
        if len(self._idle_buffers) < MAX_IDLE_BUFFERS:
            self._idle_buffers.append(buffer)  # nothing is received into it before the caller's next await
        if fetched.attr is not None:
            self._learn(handle.file.ino, fetched.attr, asked_at)
        return target[: fetched.length_bytes]

    @property
    def has_room(self) -> bool:
        """Whether more can be brought in without evicting."""
        return self._store is not None and not self._store.crowded

    def identity(self, fh: bytes) -> bytes:
        """What the cache knows the file by."""
        return self._server + fh

    def cached(self, fh: bytes, attr: Fattr) -> CachedFile | None:
        """The cache's file for this version."""
        if self._store is None:
            return None
        return self._store.file(self.identity(fh), *version(attr))

    async def forget(self, fh: bytes, attr: Fattr) -> None:
        """Drop what is cached of this version."""
        if self._store is not None:
            await trio.to_thread.run_sync(self._store.evict_file, self.identity(fh), *version(attr))

    def has(self, fh: bytes, attr: Fattr) -> bool:
        """Whether all of this version is in memory."""
        return self._store is not None and self._store.has(self.identity(fh), *version(attr))

    async def load(
        self, cred: Credential, fh: bytes, ino: int, attr: Fattr, offset: int, size_bytes: int
    ) -> memoryview | None:
        """Bring a part of a file into the cache; None when there is no room. Raises what a READ raises.

        The memory of the answer is good until the next await.
        """
        if not size_bytes:
            return memoryview(b"")
        file = self.cached(fh, attr)
        if file is None or self._store is None:
            return None
        await self._bring(file, cred, fh, ino, offset, size_bytes, True)
        return self._store.get(file, offset, size_bytes)

    # -- bringing things in ------------------------------------------------------------------------

    async def _bring(
        self, file: CachedFile, cred: Credential, fh: bytes, ino: int, offset: int, size_bytes: int, whole: bool
    ) -> None:
        """Fill what is missing of the range; `whole`: to the end of each extent."""
        end = offset + size_bytes
        first, last = offset // EXTENT_BYTES, (end - 1) // EXTENT_BYTES
        if first == last:
            await self._fill(file, cred, fh, ino, first, offset, end, whole)
            return
        async with open_nursery() as nursery:
            for number in range(first, last + 1):
                nursery.start_soon(self._fill, file, cred, fh, ino, number, offset, end, whole)

    async def _fill(
        self, file: CachedFile, cred: Credential, fh: bytes, ino: int, number: int, offset: int, end: int, whole: bool
    ) -> None:
        store = self._store
        assert store is not None
        while True:
            chunks = store.missing(file, number, offset, end)
            if chunks is None:
                return
            other = file.filling.get(number)
            if other is None:
                break
            await other.wait()
        if whole:
            extent_end = min((number + 1) * EXTENT_BYTES, file.size_bytes)
            chunks = store.missing(file, number, offset, extent_end) or chunks

        async def fetch(at: int, target: memoryview) -> bool:
            asked_at, written = time.monotonic(), self._written(ino)
            fetched = await self._fetch(cred, fh, at, target)
            # With a write of ours beside it, attributes of after may have come with bytes of before.
            if fetched.attr is None or written is None or self._written(ino) != written:
                return False
            self._learn(ino, fetched.attr, asked_at)
            same_version = file_key(self.identity(fh), *version(fetched.attr)) == file.key
            return same_version and fetched.length_bytes == len(target)

        event = file.filling[number] = trio.Event()
        try:
            await store.fill(file, number, chunks, fetch)
        finally:
            del file.filling[number]
            event.set()

    # -- readahead ---------------------------------------------------------------------------------

    def _note(self, handle: Handle, file: CachedFile, offset: int, size_bytes: int, *, waits: bool) -> bool:
        """Find the stream that this read belongs to and read ahead for it. True: it is sequential."""
        end = offset + size_bytes
        streams = handle.streams
        for stream in streams:
            if -stream.slack_bytes <= offset - stream.next_offset <= stream.slack_bytes:
                break
        else:
            stride = self._stride(handle, offset)
            if stride:
                self._ahead_by(handle, file, stride, offset, size_bytes)
                return False
            if len(streams) == MAX_STREAMS:
                streams.pop()
            streams.insert(0, Stream(offset, end))
            return False
        if stream is not streams[0]:
            streams.remove(stream)
            streams.insert(0, stream)
        handle.last_offset = offset
        stream.next_offset = max(stream.next_offset, end)
        if stream.next_offset - stream.start_offset < SEQUENTIAL_BYTES:
            return False
        stream.slack_bytes = DISORDER_BYTES
        if not stream.window_bytes:
            stream.window_bytes = MIN_WINDOW_BYTES
            stream.ahead_to = end // EXTENT_BYTES
        elif waits:
            stream.window_bytes = min(2 * stream.window_bytes, self._most_ahead_bytes())
        stop = min(stream.next_offset + stream.window_bytes, file.size_bytes)
        for number in range(max(stream.ahead_to, end // EXTENT_BYTES), -(-stop // EXTENT_BYTES)):
            self._start_ahead(handle, file, number * EXTENT_BYTES, EXTENT_BYTES)
            stream.ahead_to = number + 1
        return True

    def _stride(self, handle: Handle, offset: int) -> int:
        """The distance between the handle's last reads if it was the same several times, else 0."""
        stride = offset - handle.last_offset
        handle.stride_hits = handle.stride_hits + 1 if stride == handle.stride else 0
        handle.stride, handle.last_offset = stride, offset
        return stride if handle.stride_hits >= STRIDE_HITS else 0

    def _ahead_by(self, handle: Handle, file: CachedFile, stride: int, offset: int, size_bytes: int) -> None:
        for step in range(1, STRIDES_AHEAD + 1):
            at = offset + step * stride
            if 0 <= at < file.size_bytes:
                self._start_ahead(handle, file, at, size_bytes, whole=False)

    def _start_ahead(
        self, handle: Handle, file: CachedFile, offset: int, size_bytes: int, *, whole: bool = True
    ) -> None:
        assert self._store is not None
        end = min(offset + size_bytes, file.size_bytes)
        number = offset // EXTENT_BYTES
        if number in file.filling or self._store.missing(file, number, offset, end) is None:
            return
        self._nursery.start_soon(self._read_ahead, handle, file, offset, end - offset, whole)

    async def _read_ahead(self, handle: Handle, file: CachedFile, offset: int, size_bytes: int, whole: bool) -> None:
        async with self._ahead:
            if handle.closed:
                return
            try:
                await self._bring(file, handle.cred, handle.file.fh, handle.file.ino, offset, size_bytes, whole)
            except SERVER_ERRORS as error:
                # Nobody may have asked for it; who does, asks the server again and gets the error.
                log.debug("readahead: %s", error)

    def _most_ahead_bytes(self) -> int:
        assert self._store is not None
        return max(MIN_WINDOW_BYTES, min(MAX_WINDOW_BYTES, self._store.memory.capacity_bytes // 8))
