"""The read path: demand reads and readahead over several links.

A handle that reads sequentially gets a window: a ring of blocks into which READs are received straight from
the socket and from which the kernel is answered without a copy. Other reads fetch what was asked and no
more. `Fetch` is the seam that the block cache takes later: bytes of a file into a buffer.
"""

import logging
from typing import Protocol

import trio

from efcfs.nfs.client import Client
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.rpc import Credential
from efcfs.vfs.errors import SERVER_ERRORS
from efcfs.vfs.openfile import Block, Handle, Window

log = logging.getLogger(__name__)

BLOCK_BYTES = 1024 * 1024
RING_BLOCKS = 16
RING_BYTES = RING_BLOCKS * BLOCK_BYTES
# The kernel sends up to four requests of its own readahead at once, in any order.
DISORDER_BYTES = 4 * BLOCK_BYTES
# Rings in use at once, all handles together; the next reader goes without readahead of ours.
MAX_RINGS = 8
# Kept for the next reader, since touching 16 MiB of new memory costs as much as receiving it.
MAX_IDLE_RINGS = 1
SEQUENTIAL_HITS = 2


class Fetch(Protocol):
    """Fill `target` from `offset` of the file; returns how many bytes there were before end of file."""

    async def __call__(self, cred: Credential, fh: bytes, offset: int, target: memoryview) -> int: ...


def fetch_from(client: Client) -> Fetch:
    """Fetch from the server, in READs of at most rsize, all sent at once."""

    async def one(cred: Credential, fh: bytes, offset: int, target: memoryview) -> int:
        filled = 0
        while filled < len(target):
            result = await client.read(cred, fh, offset + filled, target[filled:])
            filled += result.count
            if result.eof or not result.count:
                break
        return filled

    async def fetch(cred: Credential, fh: bytes, offset: int, target: memoryview) -> int:
        rsize = client.rsize
        if len(target) <= rsize:
            return await one(cred, fh, offset, target)
        counts: dict[int, int] = {}

        async def piece(start: int) -> None:
            counts[start] = await one(cred, fh, offset + start, target[start : start + rsize])

        async with open_nursery() as nursery:
            for start in range(0, len(target), rsize):
                nursery.start_soon(piece, start)
        # A short piece is the end of file, whatever a race with a writer put after it.
        total = 0
        for start in range(0, len(target), rsize):
            total += counts[start]
            if counts[start] < min(rsize, len(target) - start):
                break
        return total

    return fetch


class Reader:
    """All reads of one mount. Tasks of readahead run in `nursery`."""

    def __init__(self, fetch: Fetch, nursery: trio.Nursery) -> None:
        self._fetch = fetch
        self._nursery = nursery
        self._idle_rings: list[memoryview] = []
        self._rings = 0

    async def read(self, handle: Handle, offset: int, size_bytes: int, file_bytes: int) -> memoryview | bytes:
        """Up to `size_bytes` at `offset` of a file of `file_bytes` (its size as the server has it).

        The memory of the answer belongs to the reader: use it before the next await.
        Raises what a READ raises.
        """
        size_bytes = min(size_bytes, file_bytes - offset)
        if size_bytes <= 0:
            return b""
        window = self._window(handle, offset, size_bytes) if file_bytes > BLOCK_BYTES else None
        if window is None or window.ring is None:
            return await self.exactly(handle, offset, size_bytes)
        return await self._through(window, handle, offset, size_bytes, file_bytes)

    def close(self, handle: Handle) -> None:
        """The handle reads no more; its ring goes to the next one."""
        window, handle.window = handle.window, None
        if window is not None:
            self._retire(window)

    async def exactly(self, handle: Handle, offset: int, size_bytes: int) -> memoryview:
        """The bytes as the server has them now, past all readahead."""
        target = memoryview(bytearray(max(0, size_bytes)))
        count = await self._fetch(handle.cred, handle.file.fh, offset, target)
        return target[:count]

    def _window(self, handle: Handle, offset: int, size_bytes: int) -> Window | None:
        """The handle's window after this read was noted in it; None when readahead has nothing to offer."""
        window = handle.window
        generation = handle.file.generation
        if window is None or window.generation != generation:
            self.close(handle)
            window = handle.window = Window(generation)
        if abs(offset - window.next_offset) <= (DISORDER_BYTES if window.ring is not None else 0):
            window.hits += 1
        else:
            window.hits = 0
            window.ahead_bytes = 0
        window.next_offset = max(window.next_offset, offset + size_bytes) if window.hits else offset + size_bytes
        if window.hits < (1 if size_bytes >= BLOCK_BYTES // 2 else SEQUENTIAL_HITS):
            return None
        if window.ring is None:
            window.ring = self._take_ring()
        window.ahead_bytes = min(max(2 * BLOCK_BYTES, window.ahead_bytes * 2), RING_BYTES - DISORDER_BYTES)
        return window

    async def _through(
        self, window: Window, handle: Handle, offset: int, size_bytes: int, file_bytes: int
    ) -> memoryview | bytes:
        ring = window.ring
        assert ring is not None
        first = offset // BLOCK_BYTES
        last = (offset + size_bytes - 1) // BLOCK_BYTES
        ahead_end = min(window.next_offset + window.ahead_bytes, file_bytes)
        for number in range(first, (ahead_end - 1) // BLOCK_BYTES + 1):
            self._want(window, handle, number, first, file_bytes)
        needed = [window.blocks.get(number) for number in range(first, last + 1)]
        for block in needed:
            # A block may have lost its place to a reader further on in the file; then there is no hurry.
            if block is None:
                return await self.exactly(handle, offset, size_bytes)
            await block.done.wait()
        end = offset
        for block in needed:
            assert block is not None
            if block.error is not None or window.blocks.get(block.number) is not block:
                return await self.exactly(handle, offset, size_bytes)
            end = block.number * BLOCK_BYTES + block.length_bytes
            if block.length_bytes < BLOCK_BYTES and end < min(offset + size_bytes, file_bytes):
                return await self.exactly(handle, offset, size_bytes)  # the file was shorter when it was fetched
        end = min(end, offset + size_bytes)
        if end <= offset:
            return b""
        start, stop = offset % RING_BYTES, (end - 1) % RING_BYTES + 1
        if start < stop:
            return ring[start:stop]
        return bytes(ring[start:]) + bytes(ring[:stop])  # once in sixteen blocks

    def _want(self, window: Window, handle: Handle, number: int, first: int, file_bytes: int) -> None:
        """Start fetching a block unless it is there, on its way, or its place in the ring is needed."""
        if number in window.blocks:
            return
        place = number % RING_BLOCKS
        for other in list(window.blocks.values()):
            if other.number % RING_BLOCKS == place:
                near = first - DISORDER_BYTES // BLOCK_BYTES <= other.number
                if not other.done.is_set() or (near and other.number < number):
                    return
                del window.blocks[other.number]
        block = window.blocks[number] = Block(number)
        window.fetching += 1
        self._nursery.start_soon(self._fill, window, block, handle, file_bytes)

    async def _fill(self, window: Window, block: Block, handle: Handle, file_bytes: int) -> None:
        assert window.ring is not None
        start = block.number * BLOCK_BYTES
        place = (block.number % RING_BLOCKS) * BLOCK_BYTES
        target = window.ring[place : place + min(BLOCK_BYTES, file_bytes - start)]
        try:
            block.length_bytes = await self._fetch(handle.cred, handle.file.fh, start, target)
        except SERVER_ERRORS as error:
            # Nobody may have asked for this block; who does, asks the server again and gets the error.
            log.debug("readahead: %s", error)
            block.error = error
            window.blocks.pop(block.number, None)
        finally:
            window.fetching -= 1
            block.done.set()
            if window.generation < 0:
                self._retire(window)

    def _take_ring(self) -> memoryview | None:
        if self._idle_rings:
            return self._idle_rings.pop()
        if self._rings == MAX_RINGS:
            return None
        self._rings += 1
        return memoryview(bytearray(RING_BYTES))

    def _retire(self, window: Window) -> None:
        """Give the ring back once nothing is received into it any more."""
        window.generation = -1
        if window.ring is not None and not window.fetching:
            if len(self._idle_rings) < MAX_IDLE_RINGS:
                self._idle_rings.append(window.ring)
            else:
                self._rings -= 1
            window.ring = None
            window.blocks.clear()
