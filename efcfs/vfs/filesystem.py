"""The file system: its parts, and every operation in terms of node ids, knowing neither pyfuse3 nor RPC.

Each operation takes the caller's credential and asks the server in its name. What may be answered without
the server is decided in `attributes.py`; this module orders what several parts have a share in: writes before
truncation, checks before open, what is written over what is read. Operations on names are `FileSystem.names`.

Operations raise OSError, KeyError for a node id or handle that does not exist, and `errors.SERVER_ERRORS`.
"""

import contextlib
import errno
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from efcfs.cache.store import Store
from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, own_credential
from efcfs.nfs.light import in_task
from efcfs.nfs.link import ServerAway
from efcfs.nfs.nfs3 import Fattr, Sattr
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.rpc import Credential
from efcfs.vfs.absent import Absent
from efcfs.vfs.attributes import Attributes, Kernel, Timeouts
from efcfs.vfs.consistency import Consistency, Mode
from efcfs.vfs.directories import Directories
from efcfs.vfs.dirtylog import DirtyLog
from efcfs.vfs.entries import Entries, Entry, ListedEntry
from efcfs.vfs.handles import Handles, Request
from efcfs.vfs.hiding import Hiding
from efcfs.vfs.inodes import ROOT_INO, Inode, Inodes
from efcfs.vfs.names import Names
from efcfs.vfs.openfile import Extent, Handle
from efcfs.vfs.opening import Opened, Opening
from efcfs.vfs.prefetch import Prefetch
from efcfs.vfs.reader import Reader, fetch_from
from efcfs.vfs.warmup import Warmup
from efcfs.vfs.writer import Taken, Writer

log = logging.getLogger(__name__)

# After a takeover, what nobody waits for waits so long.
RUSH_S = 0.25


@dataclass(frozen=True, slots=True)
class FilesystemOptions:
    read_only: bool = False
    timeouts: Timeouts = field(default_factory=Timeouts)
    lookupcache: str = "all"  # or "positive", "none", as in nfs(5)
    cto: bool = True
    consistency: Consistency = field(default_factory=Consistency)
    # Tells this server's file handles from those of others in a shared cache.
    server_identity: bytes = b""
    # So much may be written and not yet safe on the server.
    most_dirty_bytes: int = 128 * 1024**2


class FileSystem:
    """One mounted export."""

    def __init__(
        self, client: Client, options: FilesystemOptions, inodes: Inodes, handles: Handles, dirty: DirtyLog,
        nursery: trio.Nursery, store: Store | None,
    ) -> None:  # fmt: skip
        self.read_only = options.read_only
        self.dirty = dirty
        absent = Absent()
        self.attributes = attributes = Attributes(client, options.timeouts, options.consistency, inodes, absent)
        self._entries = Entries(client, inodes, attributes, options.lookupcache)
        self._directories = directories = Directories(client, attributes, inodes.listings, absent, nursery)
        self._hiding = Hiding(client, inodes, attributes, directories)
        self._opening = Opening(
            client, inodes, attributes, directories, handles, self._hiding, nursery, cto=options.cto
        )
        self.names = Names(
            client, inodes, attributes, directories, self._entries, self._hiding, self._opening, handles.nonce
        )
        self.reader = Reader(
            fetch_from(client), store, options.server_identity, attributes.learn, self._opening.written, nursery
        )
        self.writer = Writer(
            client, attributes, inodes, handles, dirty, options.most_dirty_bytes, self.reader.forget, nursery
        )
        self.warmup = Warmup(client, directories, self.reader, store, nursery)
        self.prefetch = Prefetch(directories, self.reader, inodes, nursery) if store is not None else None
        self._statfs: tuple[nfs3.FsstatResult, int] | None = None
        self.client = client
        self._nursery = nursery
        self._options = options
        self._inodes = inodes
        self._table = handles

    def attach(self, kernel: Kernel) -> None:
        """From now on the kernel may be told things."""
        self.attributes.kernel = kernel
        if self.prefetch is not None and self.is_immutable:
            self.prefetch.store_pages = kernel.store_pages

    def adopt(self) -> None:
        """Go on with what a daemon before us left: open handles, hidden names, bytes that are not safe yet."""
        self._opening.adopt()
        self._hiding.found_left(set(self._inodes.all_hidden()) - set(self._opening.open))
        for left in self.dirty.left():
            handle = self._opening.handles.get(left.handle)
            if handle is None:
                log.error("%d bytes belong to no open file and stay in the log", left.record.length_bytes)
            else:
                self.writer.take_left(handle, left.offset, left.record)
        self._nursery.start_soon(self._go_on_with_what_was_left)

    async def _go_on_with_what_was_left(self) -> None:
        """Not before those are served who waited for a daemon: it took half of the first 40 ms."""
        await trio.sleep(RUSH_S)
        self.writer.send_dirty()
        await self._hiding.take_left()

    def leave(self) -> None:
        """Another daemon has adopted all that: end at once, whatever is under way."""
        self.dirty.leave()
        self._nursery.cancel_scope.cancel()

    def rejoin(self) -> None:
        """Go on: the other daemon has failed. Raises OSError."""
        self._inodes.rejoin()

    @property
    def open_handles(self) -> int:
        return len(self._table)

    def forget(self, forgotten: Sequence[tuple[int, int]]) -> None:
        self._inodes.forget(forgotten)

    # -- attributes --------------------------------------------------------------------------------

    def getattr_at_once(self, ino: int) -> Entry | None:
        """What is cached, if it may be believed."""
        inode = self._inodes.get(ino)
        if inode.open_file is not None and inode.open_file.extents:
            return None
        return self._entries.of(inode) if inode.attr is not None and self.attributes.remaining_s(inode) else None

    async def getattr(self, ino: int, cred: Credential) -> Entry:
        inode = self._inodes.get(ino)
        if inode.open_file is not None and inode.open_file.extents:
            # stat(2) tells the times that the server gave; so the writes must be there first.
            await self.writer.flush(inode.open_file)
        await self.attributes.get(inode, cred)
        return self._entries.of(inode)

    async def setattr(self, ino: int, cred: Credential, sattr: Sattr, handle: int | None = None) -> Entry:
        """Change what is not None. With a handle the size is changed in the name of who opened it."""
        inode = self._inodes.get(ino)
        self.attributes.refuse_immutable(inode)
        if handle is not None and sattr.size is not None and sattr.mode is sattr.uid is sattr.gid is None:
            cred = self._opening.handles[handle].cred
        file = inode.open_file
        if file is not None and file.extents:
            # Or an extent that is sent again, by the next daemon or to the next server, would undo the truncation or
            # the times.
            await self.writer.sync(file)
        if sattr.size is not None:
            self._check_end(sattr.size)
        self._touched(inode)
        asked_at = time.monotonic()
        result = await self.client.setattr(cred, inode.fh, sattr)
        inode = self._inodes.get(ino)
        self.attributes.update_wcc(inode, result.wcc, asked_at)
        if result.wcc.after is None:
            await self.attributes.revalidate(inode, cred)
        if sattr.size is not None:
            self._inodes.note(inode)  # as after a write (`writer.py`)
        return self._entries.of(inode)

    async def access(self, ino: int, mask: int, cred: Credential) -> bool:
        inode = self._inodes.get(ino)
        wanted = 0
        if mask & os.R_OK:
            wanted |= nfs3.ACCESS3_READ
        if mask & os.W_OK:
            wanted |= nfs3.ACCESS3_MODIFY | nfs3.ACCESS3_EXTEND
        is_dir = inode.attr is not None and inode.attr.type == nfs3.NF3DIR
        if mask & os.X_OK:
            wanted |= nfs3.ACCESS3_LOOKUP if is_dir else nfs3.ACCESS3_EXECUTE
        return await self.attributes.may(inode, wanted, cred)

    async def statfs(self, cred: Credential) -> tuple[nfs3.FsstatResult, int]:
        """FSSTAT of the export and the longest name it takes; as last seen while the server is away: find(1) asks."""
        root = self._inodes.get(ROOT_INO)
        known = self._statfs if self.attributes.may_be_old(root) else None
        try:
            if known is not None and self.client.away:
                raise ServerAway
            result = await self.client.fsstat(cred, root.fh, impatient=known is not None)
        except ServerAway:
            assert known is not None
            return known
        name_max = known[1] if known is not None else (await self.client.pathconf(cred, root.fh)).name_max
        self._statfs = (result, name_max)
        return self._statfs

    # -- files -------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int, cred: Credential, request: Request) -> Opened:
        inode, opening = self._inodes.get(ino), self._opening
        if request.again and (before := opening.again(request)) is not None:
            return before[1]
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self.attributes.refuse_immutable(inode)
        if ino in self._hiding.removals:
            await in_task()
        while ino in self._hiding.removals:
            await self._hiding.removals[ino].wait()
        file = opening.begin(inode)
        try:
            await opening.check(inode, flags, cred)
            if flags & os.O_TRUNC:
                await self.setattr(ino, cred, Sattr(size=0))
                inode.kernel_size_bytes = 0
            if self.prefetch is not None and flags & os.O_ACCMODE == os.O_RDONLY:
                self.prefetch.opened(inode, cred)
            return opening.opened(inode, flags, cred, request)
        finally:
            file.opening -= 1
            if not file.handles and not file.opening:
                await opening.came_to_nothing(file, cred)

    def handle_of(self, ino: int, cred: Credential) -> int:
        """A handle for all readers of a file that the kernel opens by itself, kept for a while."""
        standing = self._opening.standing
        if ino in standing:
            standing.move_to_end(ino)
            return standing[ino]
        inode = self._inodes.get(ino)
        if self.prefetch is not None:
            self.prefetch.opened(inode, cred)
        return self._opening.stand(inode, cred)

    def read_at_once(self, handle_id: int, ino: int, offset: int, size_bytes: int) -> memoryview | bytes | None:
        """What `read` would answer, if memory has it. Handle 0: of a file that was not opened, by its node id."""
        opening = self._opening
        if not handle_id:
            if ino not in opening.standing:
                return None
            opening.standing.move_to_end(ino)
        handle = opening.handles[handle_id or opening.standing[ino]]
        file = handle.file
        inode = opening.open[file.ino]
        attr = inode.attr
        strict = self.attributes.mode_of(inode) is Mode.STRICT
        if attr is None or file.extents or strict or not self.attributes.tell_version(inode):
            return None
        if not handle_id:
            size_bytes = min(size_bytes, attr.size - offset)
            if size_bytes <= 0:
                return b""
        return self.reader.at_once(handle, offset, size_bytes, attr)

    async def read(self, handle_id: int, offset: int, size_bytes: int) -> memoryview | bytes:
        """Up to `size_bytes`, less only at the end of the file; good until the next await."""
        handle = self._opening.handles[handle_id]
        file = handle.file
        inode = self._opening.open[file.ino]
        strict = self.attributes.mode_of(inode) is Mode.STRICT
        attr = inode.attr if inode.attr is not None else await self.attributes.revalidate(inode, handle.cred)
        # What gets committed while we ask may not be in the answer: it is laid over all the same.
        extents = list(file.extents)
        with self.writer.holding(extents):
            beyond = offset + size_bytes > attr.size and not self.attributes.remaining_s(inode)
            if strict or beyond or not self.attributes.tell_version(inode):
                attr = await self.attributes.revalidate(inode, handle.cred)
            if extents:
                return await self._read_dirty(handle, offset, size_bytes, attr, extents)
        there = await self.reader.read(handle, offset, size_bytes, attr)
        if len(there) < min(size_bytes, attr.size - offset):
            # The kernel takes a short answer for the end of the file, so that must be true.
            attr = await self.attributes.revalidate(inode, handle.cred)
            there = await self.reader.exactly(handle, offset, min(size_bytes, attr.size - offset))
        return there

    async def _read_dirty(
        self, handle: Handle, offset: int, size_bytes: int, attr: Fattr, extents: list[Extent]
    ) -> memoryview | bytes:
        """What the server has, with what is written and not there yet laid over it."""
        size_bytes = min(size_bytes, max(attr.size, *(e.end for e in extents)) - offset)
        if size_bytes <= 0:
            return b""
        target = memoryview(bytearray(size_bytes))
        there = await self.reader.exactly(handle, offset, min(size_bytes, attr.size - offset))
        target[: len(there)] = there
        earlier = set(map(id, extents))
        newer = (e for e in handle.file.extents if id(e) not in earlier)
        self.writer.overlay([*extents, *newer], offset, target)
        return target

    @property
    def is_immutable(self) -> bool:
        """Whether that holds for every file: then nobody needs to be told of an open or a close."""
        consistency = self._options.consistency
        return consistency.default is Mode.IMMUTABLE and not consistency.by_path

    def write_at_once(self, handle_id: int, offset: int, data: memoryview) -> Taken | None:
        """Keep the bytes; None: there is no room, `write` waits for it."""
        handle, writer = self._opening.handles[handle_id], self.writer
        self._check_end(offset + len(data))
        had_room = writer.has_room(len(data))
        if not writer.take(handle, offset, data):
            return None
        self._grow(handle.file.ino, offset + len(data))
        if handle.flags & os.O_SYNC or not had_room:  # O_DSYNC is a part of O_SYNC
            return Taken.ANSWER_LATER
        return Taken.ANSWER

    async def taken(self, handle_id: int) -> None:
        """Wait until what `write_at_once` has kept may be answered."""
        handle = self._opening.handles[handle_id]
        if handle.flags & os.O_SYNC:
            await self._sync(handle)
        else:
            await self.writer.room(0)

    async def write(self, handle_id: int, offset: int, data: memoryview) -> None:
        """As `write_at_once` and `taken`, after waiting for room in the log."""
        handle = self._opening.handles[handle_id]
        self._check_end(offset + len(data))
        await self.writer.take_later(handle, offset, data)
        self._grow(handle.file.ino, offset + len(data))
        await self.taken(handle_id)

    async def flush(self, handle_id: int) -> None:
        """close(2) and fsync(2): what was written is committed, or its error reported."""
        await self._sync(self._opening.handles[handle_id])

    def has_unwritten(self, handle_id: int) -> bool:
        """Whether `flush` has anything to do, or to report."""
        handle = self._opening.handles[handle_id]
        return bool(handle.file.extents or handle.error)

    def release_at_once(self, handle_id: int) -> bool:
        """`release`, if it needs not wait."""
        handle = self._opening.handles[handle_id]
        file = handle.file
        if file.extents or (file.sillyname is not None and len(file.handles) == 1):
            return False
        if self._opening.let_go(handle):
            self._opening.forget(file)
        self._table.remove(handle_id)
        return True

    async def release(self, handle_id: int) -> None:
        handle = self._opening.handles[handle_id]
        file = handle.file
        if file.extents:
            await self.writer.sync(file)  # written through a mapping after close(2)
        if self._opening.let_go(handle):
            await self._opening.closed(file, handle.cred)
        # Last, so that a daemon that dies before leaves the handle, and what is to be done, to the next.
        self._table.remove(handle_id)

    # -- directories -------------------------------------------------------------------------------

    async def opendir(self, ino: int, cred: Credential, request: Request) -> int:
        return await self._opening.opendir(self._inodes.get(ino), cred, request)

    async def readdir(self, handle_id: int, cookie: int, most: int) -> list[ListedEntry]:
        """Up to `most` entries after `cookie`, each with one lookup counted; empty at the end.

        The caller gives back by `forget` the lookups of entries that the kernel is not shown.
        """
        listing = self._opening.listings[handle_id]
        entries, start = await listing.after(cookie)
        return self._entries.enter_listed(listing, entries[start : start + most])

    def releasedir(self, handle_id: int) -> None:
        self._opening.releasedir(handle_id)

    # -- ending ------------------------------------------------------------------------------------

    async def remove_hidden(self) -> None:
        """Nobody has anything open any more: what is hidden can go."""
        for ino in self._inodes.all_hidden():
            await self._hiding.remove_left(ino)

    async def sync_all(self) -> None:
        """Commit all that is dirty, as umount does."""
        async with trio.open_nursery() as nursery:
            for inode in list(self._opening.open.values()):
                if inode.open_file is not None and inode.open_file.extents:
                    nursery.start_soon(self.writer.sync, inode.open_file)

    # -- parts -------------------------------------------------------------------------------------

    def _check_end(self, end: int) -> None:
        if end > self.client.max_file_bytes:
            raise OSError(errno.EFBIG, "beyond the server's largest file")

    def _grow(self, ino: int, end: int) -> None:
        """The kernel's own idea of the size after a write."""
        inode = self._inodes.get(ino)
        if inode.open_file is not None and inode.open_file.written == 1:
            self._touched(inode)
        if inode.kernel_size_bytes is not None:
            inode.kernel_size_bytes = max(inode.kernel_size_bytes, end)

    def _touched(self, inode: Inode) -> None:
        """We change the file itself."""
        with contextlib.suppress(KeyError):  # its directory was forgotten
            self._directories.touched(self._inodes.get(inode.parent), inode.name)

    async def _sync(self, handle: Handle) -> None:
        if handle.file.extents:
            await self.writer.sync(handle.file)
        number = self.writer.new_error(handle)
        if number is not None:
            raise OSError(number, os.strerror(number))


async def _until_cancelled(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """A nursery that ends before those that wait for it do."""
    async with open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()


@contextlib.asynccontextmanager
async def open_filesystem(
    client: Client, options: FilesystemOptions, state_dir: Path, store: Store | None
) -> AsyncIterator[FileSystem]:
    """The file system over `client`, what it must not forget in `state_dir`, its blocks in `store`.

    What a daemon before us left there is taken over. Raises `errors.SERVER_ERRORS`, `handles.OtherVersion`.
    """
    handles = Handles(state_dir)
    inodes = Inodes(state_dir, client.root_fh)
    dirty = DirtyLog(state_dir / "dirty", options.most_dirty_bytes)
    try:
        async with open_nursery() as nursery:
            workers: trio.Nursery = await nursery.start(_until_cancelled)
            fs = FileSystem(client, options, inodes, handles, dirty, workers, store)
            fs.adopt()
            if inodes.get(ROOT_INO).attr is None:
                await fs.attributes.revalidate(inodes.get(ROOT_INO), own_credential())
                inodes.note(inodes.get(ROOT_INO))
            workers.start_soon(fs.writer.run)
            if store is not None:
                workers.start_soon(store.run)
            yield fs
            nursery.cancel_scope.cancel()
    finally:
        inodes.close()
        handles.close()
