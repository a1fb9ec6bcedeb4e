"""The write path: write-behind, COMMIT, and what happens when the server restarts in between.

What programs write is kept in the dirty log (`dirtylog.py`) before write(2) returns, so it outlives this daemon. A
write is an extent: appended to the one before it where it continues that, otherwise a new one. Extents
go out as pipelined UNSTABLE WRITEs over all links and are kept until a COMMIT returns the verifier that
their WRITEs returned (RFC 1813 §3.3.7, §3.3.21); another verifier means that the server may have lost them:
they are sent again. Extents may overlap; they keep the order in which they were written, and an extent is
sent only when no earlier one below it is still under way. Failed writes are reported by the next fsync or
close of each handle, once, as the kernel client does.
"""

import contextlib
import ctypes
import enum
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import trio

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client
from efcfs.nfs.light import in_task
from efcfs.nfs.link import Buffer
from efcfs.nfs.nfs3 import Fattr
from efcfs.nfs.rpc import Credential
from efcfs.vfs.attributes import Attributes, version
from efcfs.vfs.dirtylog import DirtyLog, Record
from efcfs.vfs.errors import SERVER_ERRORS, errno_of
from efcfs.vfs.handles import Handles
from efcfs.vfs.inodes import Inodes
from efcfs.vfs.openfile import Extent, ExtentState, Handle, OpenFile, Piece

log = logging.getLogger(__name__)

DIRTY, SENDING, UNSTABLE, DONE = ExtentState
_libc = ctypes.CDLL(None)

# So much of one file unstable starts a COMMIT beside the writing.
COMMIT_BYTES = 32 * 1024 * 1024
# More extents than this in one file are sent and committed, so that looking for overlaps stays short.
MAX_EXTENTS = 256
# More of one file wait: writes here and there, of a few bytes each, to a server that is slow or away.
MOST_EXTENTS = 4096
MAX_WRITES_IN_FLIGHT = 32
# A small tail waits so long for more bytes, and a COMMIT for more WRITEs when nobody asks for it.
TAIL_S = 1.0
COMMIT_S = 5.0


class Taken(enum.Enum):
    """What the kernel is told of bytes that are kept."""

    ANSWER = enum.auto()
    # Not before they are on the server's disk (O_SYNC), or not so much is dirty any more.
    ANSWER_LATER = enum.auto()


class ForgetCached(Protocol):
    """Drop what is cached of this version of the file."""

    async def __call__(self, fh: bytes, attr: Fattr) -> None: ...


class Writer:
    """All writes of one mount; `run` must be running."""

    def __init__(
        self, client: Client, attributes: Attributes, inodes: Inodes, handles: Handles, dirty: DirtyLog,
        most_bytes: int, forget_cached: ForgetCached, nursery: trio.Nursery,
    ) -> None:  # fmt: skip
        self.dirty_bytes = 0
        self._client = client
        self._attributes = attributes
        self._inodes = inodes
        self._handles = handles
        self._log = dirty
        # Bytes that are not safe on the server, all files together; more makes write(2) wait.
        self._most_bytes = most_bytes
        self._forget_cached = forget_cached
        self._log_runs_low = trio.Event()
        # While another daemon takes over, nothing new is sent.
        self._paused = False
        self._nursery = nursery
        self._writes = trio.CapacityLimiter(MAX_WRITES_IN_FLIGHT)
        self._room = trio.lowlevel.ParkingLot()
        self._dirty_files: dict[int, OpenFile] = {}

    async def run(self) -> None:
        """Send tails that nobody continues and give memory back after work, until cancelled."""
        self._nursery.start_soon(self._prepare_log)
        trimmed = True
        while True:
            await trio.sleep(TAIL_S)
            if self.dirty_bytes:
                trimmed = False
            elif not trimmed:
                self._log.shrink()
                await trio.to_thread.run_sync(_libc.malloc_trim, 0)  # the keeper tells malloc to keep what is freed
                trimmed = True
            now = time.monotonic()
            for file in list(self._dirty_files.values()):
                self._send_ready(file, written_before=now - TAIL_S)
                if file.extents[-1].written_at < now - COMMIT_S:
                    self._commit_soon(file)

    async def _prepare_log(self) -> None:
        while True:
            await self._log_runs_low.wait()
            self._log_runs_low = trio.Event()
            if self._log.runs_low:
                await trio.to_thread.run_sync(self._log.prepare)

    async def pause(self) -> None:
        """Send nothing more; returns when nothing is in flight. What is dirty stays in the log."""
        self._paused = True
        for file in list(self._dirty_files.values()):
            while file.committing or any(e.state is SENDING for e in file.extents):
                await file.changed.park()

    def resume(self) -> None:
        self._paused = False
        self.send_dirty()

    def send_dirty(self) -> None:
        """Start to send what is dirty, unless paused."""
        for file in list(self._dirty_files.values()):
            self._send_ready(file)

    def has_room(self, length_bytes: int) -> bool:
        return not self.dirty_bytes or self.dirty_bytes + length_bytes <= self._most_bytes

    async def room(self, length_bytes: int) -> None:
        """Wait until so much more may be dirty."""
        while not self.has_room(length_bytes):
            self._hurry()
            await self._room.park()

    def _hurry(self) -> None:
        for file in list(self._dirty_files.values()):
            self._send_ready(file)
            self._commit_soon(file)

    def take(self, handle: Handle, offset: int, data: memoryview) -> bool:
        """Keep the bytes; they are on their way to the server afterwards, not there. False: there is no room."""
        file = handle.file
        wsize = self._client.wsize
        tail = file.extents[-1] if file.extents else None
        if (
            tail is not None and (tail.state is not DIRTY or tail.end != offset or tail.cred != handle.cred
            or tail.length_bytes + len(data) > wsize)
        ):  # fmt: skip
            tail = None
        if tail is None and len(file.extents) >= MOST_EXTENTS:
            return False
        last = tail.pieces[-1] if tail is not None else None
        record = self._log.keep(handle.number, offset, data, last.record if last is not None else None)
        if record is None:
            return False
        if self._log.runs_low:
            self._log_runs_low.set()
        self.dirty_bytes += len(data)
        file.written += 1
        self._dirty_files[file.ino] = file
        if tail is not None and last is not None:
            if last.record is record:
                last.end += len(data)
            else:
                tail.pieces.append(Piece(record, 0, len(data)))
            tail.length_bytes += len(data)
            if tail.length_bytes == wsize:
                self._send_ready(file)
            return True
        self._add(file, record, offset, handle.cred)
        self._send_ready(file, but_tail=file.extents[-1].length_bytes < wsize)
        if len(file.extents) > MAX_EXTENTS:
            self._commit_soon(file)
        return True

    async def take_later(self, handle: Handle, offset: int, data: memoryview) -> None:
        """As `take`, after waiting for room. Without memory for the log, the server has the bytes afterwards.

        Raises then what a WRITE raises.
        """
        while not self.take(handle, offset, data):
            if not self.dirty_bytes:
                await self._write_through(handle, offset, data)
                return
            self._hurry()
            await self._room.park()

    async def _write_through(self, handle: Handle, offset: int, data: memoryview) -> None:
        file = handle.file
        await self.sync(file)
        for start in range(0, len(data), self._client.wsize):
            piece = data[start : start + self._client.wsize]
            while piece:
                asked_at = time.monotonic()
                result = await self._client.write(
                    handle.cred, file.fh, offset, [piece], len(piece), nfs3.FILE_SYNC
                )
                offset += result.count
                piece = piece[result.count :]
                self._take_over(file, result.wcc.after, asked_at, offset)

    def take_left(self, handle: Handle, offset: int, record: Record) -> None:
        """What a daemon before us kept and did not bring to the server's disk."""
        self.dirty_bytes += record.length_bytes
        self._dirty_files[handle.file.ino] = handle.file
        self._add(handle.file, record, offset, handle.cred)

    def _add(self, file: OpenFile, record: Record, offset: int, cred: Credential) -> None:
        now = time.monotonic()
        for start in range(0, record.length_bytes, self._client.wsize):
            piece = Piece(record, start, min(start + self._client.wsize, record.length_bytes))
            file.extents.append(Extent(offset + start, piece, cred, now))

    async def flush(self, file: OpenFile) -> None:
        """Wait until the server has all that was written before this call (unstably). Never raises."""
        waiting = [e for e in file.extents if e.state in (DIRTY, SENDING)]
        if waiting:
            await in_task()  # before looking again: what is waited for may come meanwhile
        while any(e.state in (DIRTY, SENDING) for e in waiting):
            self._send_ready(file)
            await file.changed.park()

    async def sync(self, file: OpenFile) -> None:
        """Wait until all that was written before this call is committed, or has failed. Never raises."""
        waiting = list(file.extents)
        if len(waiting) == 1 and waiting[0].state is DIRTY:
            (extent,) = waiting
            extent.stable = True  # one WRITE that is stable at once, instead of a WRITE and a COMMIT
            if not self._paused and self._writes.available_tokens:
                await self._send_here(file, extent)
        while waiting:
            await self.flush(file)
            await self._commit(file)
            waiting = [e for e in waiting if e.state is not DONE]

    def new_error(self, handle: Handle) -> int | None:
        """The errno of a write that failed since this handle last asked."""
        error, handle.error = handle.error, 0
        # Noted until the next call: a daemon that dies before its answer is out leaves the error to the one after it.
        self._handles.set_error(handle.number, error)
        return error or None

    @contextlib.contextmanager
    def holding(self, extents: Iterable[Extent]) -> Iterator[None]:
        """Meanwhile their bytes stay what they are, even when they are done."""
        records = [piece.record for extent in extents for piece in extent.pieces]
        for record in records:
            self._log.hold(record)
        try:
            yield
        finally:
            for record in records:
                self._log.release(record)

    @staticmethod
    def overlay(extents: Iterable[Extent], offset: int, target: memoryview) -> None:
        """Put written bytes over what the server said, in the order in which they were written."""
        end = offset + len(target)
        for extent in extents:
            if not extent.overlaps(offset, end):
                continue
            at = extent.offset
            for piece in extent.pieces:
                length = piece.end - piece.start
                low, high = max(at, offset), min(at + length, end)
                if low < high:
                    target[low - offset : high - offset] = piece.bytes[low - at : high - at]
                at += length

    # -- sending -----------------------------------------------------------------------------------

    def _send_ready(
        self, file: OpenFile, *, but_tail: bool = False, written_before: float = float("inf")
    ) -> None:
        """Start WRITEs for dirty extents, unless one that it overlaps must go first or is in flight.

        The first extents only, as many as may be in flight: a file may have thousands. `_send` goes on with the next.
        """
        if self._paused or file.sending >= MAX_WRITES_IN_FLIGHT:
            return
        sending = [e for e in file.extents if e.state is SENDING]
        held: list[Extent] = []
        for extent in file.extents[:-1] if but_tail else file.extents:
            if extent.state is not DIRTY:
                continue
            blocked = any(e.overlaps(extent.offset, extent.end) for e in (*sending, *held))
            if blocked or extent.written_at > written_before:
                held.append(extent)
                continue
            self._begin(file, extent)
            sending.append(extent)
            self._nursery.start_soon(self._send, file, extent)
            if file.sending >= MAX_WRITES_IN_FLIGHT:
                return

    @staticmethod
    def _begin(file: OpenFile, extent: Extent) -> None:
        extent.state = SENDING
        file.sending += 1

    async def _send(self, file: OpenFile, extent: Extent) -> None:
        async with self._writes:
            await self._write(file, extent)

    async def _send_here(self, file: OpenFile, extent: Extent) -> None:
        """Send it without another task: what a small file is closed with (20 µs less)."""
        self._begin(file, extent)
        self._writes.acquire_on_behalf_of_nowait(extent)
        try:
            await self._write(file, extent)
        finally:
            self._writes.release_on_behalf_of(extent)

    async def _write(self, file: OpenFile, extent: Extent) -> None:
        buffers: list[Buffer] = [piece.bytes for piece in extent.pieces]
        offset, left = extent.offset, extent.length_bytes
        stable = nfs3.FILE_SYNC if extent.stable else nfs3.UNSTABLE
        try:
            while left:
                before, asked_at = self._inodes.get(file.ino).attr, time.monotonic()
                result = await self._client.write(extent.cred, file.fh, offset, buffers, left, stable)
                buffers = _after(buffers, result.count)
                offset += result.count
                left -= result.count
                after = result.wcc.after
                if before is not None and after is not None and version(after) == version(before):
                    # Other bytes, the same version: the server's clock is coarse, or these attributes are old.
                    await in_task()
                    await self._forget_cached(file.fh, after)
                    self._attributes.doubt(self._inodes.get(file.ino))
                else:
                    self._take_over(file, after, asked_at, offset)
        except SERVER_ERRORS as error:
            file.sending -= 1
            self._failed(file, [extent], error)
            self._send_next(file)
            return
        except BaseException:  # cancelled: the mount ends, or the writer was killed
            file.sending -= 1
            extent.state = DIRTY
            file.changed.unpark_all()
            raise
        file.sending -= 1
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
        self._send_next(file)
        file.changed.unpark_all()
        # Short of room even little is worth a COMMIT: somebody may wait for it, here or with another file.
        unstable_bytes = sum(e.length_bytes for e in file.extents if e.state is UNSTABLE)
        short = self.dirty_bytes > self._most_bytes // 2 or len(file.extents) > MAX_EXTENTS
        if unstable_bytes >= COMMIT_BYTES or short:
            self._commit_soon(file)

    def _send_next(self, file: OpenFile) -> None:
        if file.extents:
            self._send_ready(file, but_tail=file.extents[-1].length_bytes < self._client.wsize)

    def _commit_soon(self, file: OpenFile) -> None:
        if not self._paused and not file.committing and any(e.state is UNSTABLE for e in file.extents):
            self._nursery.start_soon(self._commit, file)

    async def _commit(self, file: OpenFile) -> None:
        """Commit what is unstable now; what the server lost becomes dirty again."""
        if file.committing:
            await in_task()
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
            # Not those that are being sent again, since the server restarted meanwhile.
            self._failed(file, [e for e, verifier in unstable if e.state is UNSTABLE and e.verifier == verifier], error)
            return
        finally:
            file.committing = False
            file.changed.unpark_all()
        if any(verifier != result.verifier for _, verifier in unstable):
            self._lost(file)
        self._take_over(file, result.wcc.after, asked_at)
        # An extent that was sent again meanwhile has another verifier and waits for the next COMMIT.
        self._done(
            file, [e for e, verifier in unstable if e.state is UNSTABLE and e.verifier == verifier == result.verifier]
        )

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
            # Before the log forgets them: the next daemon must not find the version of before these writes, whose bytes
            # may still be cached, while the server is away.
            self._inodes.note(self._inodes.get(file.ino))
        for extent in extents:
            for piece in extent.pieces:
                self._log.done(piece.record, piece.end - piece.start)
        file.changed.unpark_all()
        self._room.unpark_all()

    def _failed(self, file: OpenFile, extents: list[Extent], error: Exception) -> None:
        number = errno_of(error)
        log.error("write of inode %d failed: %s", file.ino, error)
        for handle in file.handles:
            if not handle.error:
                handle.error = number
                self._handles.set_error(handle.number, number)
        self._done(file, extents)

    def _take_over(self, file: OpenFile, attr: Fattr | None, asked_at: float, written_end: int = 0) -> None:
        # Replies of pipelined WRITEs arrive in any order, so their pre-op attributes tell nothing.
        inode = self._inodes.get(file.ino)
        if attr is None or attr.size < written_end:
            self._attributes.doubt(inode)  # from before this very WRITE, out of a cache of the server's
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
