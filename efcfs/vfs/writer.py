"""The write path: write-behind, COMMIT, and what happens when the server restarts in between.

A write is an extent: appended to the one before it where it continues that, otherwise a new one. Extents
go out as pipelined UNSTABLE WRITEs over all links and are kept until a COMMIT returns the verifier that
their WRITEs returned (RFC 1813 §3.3.7, §3.3.21); another verifier means that the server may have lost them:
they are sent again. Extents may overlap; they keep the order in which they were written, and an extent is
sent only when no earlier one below it is still under way. Failed writes are reported by the next fsync or
close of each handle, once, as the kernel client does.
"""

import ctypes
import logging
import time
from collections.abc import Iterable

import trio

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client
from efcfs.nfs.link import Buffer
from efcfs.nfs.nfs3 import Fattr
from efcfs.vfs.attributes import Attributes
from efcfs.vfs.errors import SERVER_ERRORS, errno_of
from efcfs.vfs.inodes import Inodes
from efcfs.vfs.openfile import Extent, ExtentState, Handle, OpenFile

log = logging.getLogger(__name__)

DIRTY, SENDING, UNSTABLE, DONE = ExtentState
_libc = ctypes.CDLL(None)

# Bytes that are not safe on the server, all files together; more makes write(2) wait.
MAX_DIRTY_BYTES = 128 * 1024 * 1024
# So much of one file unstable starts a COMMIT beside the writing.
COMMIT_BYTES = 32 * 1024 * 1024
# More extents than this in one file are sent and committed, so that looking for overlaps stays short.
MAX_EXTENTS = 256
MAX_WRITES_IN_FLIGHT = 32
# A small tail waits so long for more bytes.
TAIL_S = 1.0


class Writer:
    """All writes of one mount; `run` must be running."""

    def __init__(self, client: Client, attributes: Attributes, inodes: Inodes, nursery: trio.Nursery) -> None:
        self.dirty_bytes = 0
        self._client = client
        self._attributes = attributes
        self._inodes = inodes
        self._nursery = nursery
        self._writes = trio.CapacityLimiter(MAX_WRITES_IN_FLIGHT)
        self._room = trio.lowlevel.ParkingLot()
        self._dirty_files: dict[int, OpenFile] = {}

    async def run(self) -> None:
        """Send tails that nobody continues and give memory back after work, until cancelled."""
        trimmed = True
        while True:
            await trio.sleep(TAIL_S)
            if self.dirty_bytes:
                trimmed = False
            elif not trimmed:
                await trio.to_thread.run_sync(_libc.malloc_trim, 0)  # the keeper tells malloc to keep what is freed
                trimmed = True
            before = time.monotonic() - TAIL_S
            for file in list(self._dirty_files.values()):
                self._send_ready(file, written_before=before)

    def has_room(self, length_bytes: int) -> bool:
        return not self.dirty_bytes or self.dirty_bytes + length_bytes <= MAX_DIRTY_BYTES

    async def room(self, length_bytes: int) -> None:
        """Wait until so much more may be dirty."""
        while not self.has_room(length_bytes):
            for file in list(self._dirty_files.values()):
                self._send_ready(file)
                self._commit_soon(file)
            await self._room.park()

    def take(self, handle: Handle, offset: int, data: memoryview) -> None:
        """Keep the bytes; they are on their way to the server afterwards, not there."""
        file = handle.file
        self.dirty_bytes += len(data)
        self._dirty_files[file.ino] = file
        tail = file.extents[-1] if file.extents else None
        if (
            tail is not None and tail.state is DIRTY and tail.end == offset and tail.cred == handle.cred
            and tail.length_bytes + len(data) <= self._client.wsize
        ):  # fmt: skip
            tail.buffers.append(data)
            tail.length_bytes += len(data)
            if tail.length_bytes == self._client.wsize:
                self._send_ready(file)
            return
        for start in range(0, len(data), self._client.wsize):
            piece = data if len(data) <= self._client.wsize else data[start : start + self._client.wsize]
            file.extents.append(Extent(offset + start, piece, handle.cred, time.monotonic()))
        self._send_ready(file, but_tail=file.extents[-1].length_bytes < self._client.wsize)
        if len(file.extents) > MAX_EXTENTS:
            self._commit_soon(file)

    async def flush(self, file: OpenFile) -> None:
        """Wait until the server has all that was written before this call (unstably). Never raises."""
        waiting = [e for e in file.extents if e.state in (DIRTY, SENDING)]
        while any(e.state in (DIRTY, SENDING) for e in waiting):
            self._send_ready(file)
            await file.changed.park()

    async def sync(self, file: OpenFile) -> None:
        """Wait until all that was written before this call is committed, or has failed. Never raises."""
        waiting = list(file.extents)
        while waiting:
            await self.flush(file)
            await self._commit(file)
            waiting = [e for e in waiting if e.state is not DONE]

    def new_error(self, handle: Handle) -> int | None:
        """The errno of a write that failed since this handle last asked."""
        errors, seen = handle.file.write_errors, handle.errors_seen
        handle.errors_seen = len(errors)
        return errors[seen] if seen < len(errors) else None

    @staticmethod
    def overlay(extents: Iterable[Extent], offset: int, target: memoryview) -> None:
        """Put written bytes over what the server said, in the order in which they were written."""
        end = offset + len(target)
        for extent in extents:
            if not extent.overlaps(offset, end):
                continue
            at = extent.offset
            for buffer in extent.buffers:
                low, high = max(at, offset), min(at + len(buffer), end)
                if low < high:
                    target[low - offset : high - offset] = memoryview(buffer)[low - at : high - at]
                at += len(buffer)

    # -- sending -----------------------------------------------------------------------------------

    def _send_ready(
        self, file: OpenFile, *, but_tail: bool = False, written_before: float = float("inf")
    ) -> None:
        """Start a WRITE for each dirty extent, unless one that it overlaps must go first or is in flight."""
        sending = [e for e in file.extents if e.state is SENDING]
        held: list[Extent] = []
        for extent in file.extents[:-1] if but_tail else file.extents:
            if extent.state is not DIRTY:
                continue
            blocked = any(e.overlaps(extent.offset, extent.end) for e in (*sending, *held))
            if blocked or extent.written_at > written_before:
                held.append(extent)
                continue
            extent.state = SENDING
            sending.append(extent)
            self._nursery.start_soon(self._send, file, extent)

    async def _send(self, file: OpenFile, extent: Extent) -> None:
        async with self._writes:
            buffers, offset, left = extent.buffers, extent.offset, extent.length_bytes
            try:
                while left:
                    asked_at = time.monotonic()
                    result = await self._client.write(extent.cred, file.fh, offset, buffers, left)
                    buffers = _after(buffers, result.count)
                    offset += result.count
                    left -= result.count
                    self._take_over(file, result.wcc.after, asked_at, offset)
            except SERVER_ERRORS as error:
                self._failed(file, [extent], error)
                return
            finally:
                if extent.state is SENDING and left:  # cancelled: the mount ends
                    extent.state = DIRTY
        if result.committed == nfs3.UNSTABLE:
            # A write that another server life took may be lost already; do not wait for COMMIT to say so.
            if any(e.state is UNSTABLE and e.verifier != result.verifier for e in file.extents):
                self._lost(file)
            earlier = file.extents[: file.extents.index(extent)]
            overtaken = any(e.state in (DIRTY, SENDING) and e.overlaps(extent.offset, extent.end) for e in earlier)
            extent.state = DIRTY if overtaken else UNSTABLE
            extent.verifier = result.verifier
        else:
            self._done(file, [extent])
        if any(e.state is DIRTY for e in file.extents[:-1]):
            self._send_ready(file, but_tail=True)
        file.changed.unpark_all()
        # Short of room even little is worth a COMMIT: many files, each below the limit, would wait for each other.
        unstable_bytes = sum(e.length_bytes for e in file.extents if e.state is UNSTABLE)
        if unstable_bytes >= COMMIT_BYTES or self.dirty_bytes > MAX_DIRTY_BYTES // 2:
            self._commit_soon(file)

    def _commit_soon(self, file: OpenFile) -> None:
        if not file.committing and any(e.state is UNSTABLE for e in file.extents):
            self._nursery.start_soon(self._commit, file)

    async def _commit(self, file: OpenFile) -> None:
        """Commit what is unstable now; what the server lost becomes dirty again."""
        while file.committing:
            await file.changed.park()
        unstable = [(e, e.verifier) for e in file.extents if e.state is UNSTABLE]
        if not unstable:
            return
        file.committing = True
        try:
            asked_at = time.monotonic()
            result = await self._client.commit(unstable[-1][0].cred, file.fh)
        except SERVER_ERRORS as error:
            self._failed(file, [e for e, _ in unstable], error)
            return
        finally:
            file.committing = False
            file.changed.unpark_all()
        if any(verifier != result.verifier for _, verifier in unstable):
            self._lost(file)
        # An extent that was sent again meanwhile has another verifier and waits for the next COMMIT.
        self._done(
            file, [e for e, verifier in unstable if e.state is UNSTABLE and e.verifier == verifier == result.verifier]
        )
        self._take_over(file, result.wcc.after, asked_at)

    def _lost(self, file: OpenFile) -> None:
        """The server restarted: all that it had not committed goes again, in the old order."""
        unstable = [e for e in file.extents if e.state is UNSTABLE]
        for extent in unstable:
            extent.state = DIRTY
        log.warning("server restarted: writing %d bytes again", sum(e.length_bytes for e in unstable))

    def _done(self, file: OpenFile, extents: list[Extent]) -> None:
        for extent in extents:
            extent.state = DONE
            self.dirty_bytes -= extent.length_bytes
        file.extents = [e for e in file.extents if e.state is not DONE]
        if not file.extents:
            self._dirty_files.pop(file.ino, None)
        file.changed.unpark_all()
        self._room.unpark_all()

    def _failed(self, file: OpenFile, extents: list[Extent], error: Exception) -> None:
        number = errno_of(error)
        log.error("write of inode %d failed: %s", file.ino, error)
        file.write_errors.append(number)
        self._done(file, extents)

    def _take_over(self, file: OpenFile, attr: Fattr | None, asked_at: float, written_end: int = 0) -> None:
        # Replies of pipelined WRITEs arrive in any order, so their pre-op attributes tell nothing.
        inode = self._inodes.get(file.ino)
        if attr is not None and attr.size < written_end:
            self._attributes.expire(inode)  # from before this very WRITE, out of a cache of the server's
        else:
            self._attributes.update(inode, attr, asked_at, own=True)


def _after(buffers: list[Buffer], skip_bytes: int) -> list[Buffer]:
    """What remains of `buffers` when the first `skip_bytes` are written."""
    rest: list[Buffer] = []
    for buffer in buffers:
        if skip_bytes >= len(buffer):
            skip_bytes -= len(buffer)
        else:
            rest.append(memoryview(buffer)[skip_bytes:])
            skip_bytes = 0
    return rest
