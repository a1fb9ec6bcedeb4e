"""The file system: every operation in terms of node ids, knowing neither pyfuse3 nor RPC.

Each operation takes the caller's credential and asks the server in its name. What may be answered without
the server is decided in `attributes.py`; this module orders things: writes before truncation, revalidation
before open, hiding before the removal of a file that is open.

Operations raise OSError, KeyError for a node id or handle that does not exist, and `errors.SERVER_ERRORS`.
"""

import contextlib
import errno
import os
import stat
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import trio

from efcfs.cache.store import Store
from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError, own_credential
from efcfs.nfs.link import ServerAway
from efcfs.nfs.nfs3 import DirEntryPlus, Fattr, Sattr
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.rpc import Credential
from efcfs.vfs.attributes import Attributes, Kernel, Timeouts, version
from efcfs.vfs.consistency import Consistency, Mode
from efcfs.vfs.directories import Directories, Listing
from efcfs.vfs.errors import SERVER_ERRORS, errno_of
from efcfs.vfs.inodes import ROOT_INO, Found, Inode, Inodes
from efcfs.vfs.openfile import Handle, OpenFile
from efcfs.vfs.prefetch import Prefetch
from efcfs.vfs.reader import Reader, fetch_from
from efcfs.vfs.warmup import Warmup
from efcfs.vfs.writer import Writer, log

# Set by the kernel in open flags when a file is opened to be executed.
FMODE_EXEC = 0o40
# The kernel turns utimensat(UTIME_NOW) into its own time, and pyfuse3 does not tell; so recent it may have been that.
MAYBE_NOW_NS = 1_000_000_000
RENAME_NOREPLACE = 1
# Files that are read without having been opened, of which the streams of reads are remembered.
MAX_STANDING = 1024


@dataclass(frozen=True, slots=True)
class FilesystemOptions:
    read_only: bool = False
    timeouts: Timeouts = field(default_factory=Timeouts)
    lookupcache: str = "all"  # or "positive", "none", as in nfs(5)
    cto: bool = True
    consistency: Consistency = field(default_factory=Consistency)
    # Tells this server's file handles from those of others in a shared cache.
    server_identity: bytes = b""


class Entry(NamedTuple):
    """What the kernel is told of a file. `ino` 0: there is no such name, and that holds for entry_timeout_s."""

    ino: int
    generation: int
    attr: Fattr | None
    entry_timeout_s: float
    attr_timeout_s: float


class Opened(NamedTuple):
    """direct_io: the kernel keeps no pages and asks for every read."""

    handle: int
    keep_cache: bool
    direct_io: bool


class ListedEntry(NamedTuple):
    """A directory entry; without `entry` only its name is known."""

    name: bytes
    cookie: int
    fileid: int
    entry: Entry | None


class FileSystem:
    """One mounted export."""

    def __init__(
        self, client: Client, options: FilesystemOptions, inodes: Inodes, nursery: trio.Nursery, store: Store | None
    ) -> None:
        self.read_only = options.read_only
        self.attributes = Attributes(client, options.timeouts, self._mode_of)
        self.writer = Writer(client, self.attributes, inodes, nursery)
        self.reader = Reader(fetch_from(client), store, options.server_identity, self._learn, nursery)
        self._directories = Directories(client, self.attributes, inodes.listings, nursery)
        self.warmup = Warmup(client, self._directories, self.reader, store, nursery)
        self.prefetch = Prefetch(self._directories, self.reader, inodes, nursery) if store is not None else None
        self._client = client
        self._options = options
        self._inodes = inodes
        self._open: dict[int, Inode] = {}
        self._handles: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        # Handles of files that the kernel opens by itself, by node id; the last used last.
        self._standing: OrderedDict[int, int] = OrderedDict()
        self._next_handle = 1
        self._hidden = 0

    # -- names -------------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes, cred: Credential) -> Entry:
        directory = self._inodes.get(parent)
        asked_at = time.monotonic()
        if name == b".":
            await self.attributes.get(directory, cred)
            return self._enter(directory.parent, directory.name, directory.fh, directory.attr, asked_at)
        seen = self._directories.find(directory, name) if self._options.lookupcache == "all" else None
        if seen is not None:
            entry, seen_at = seen
            if entry is None:
                return Entry(0, 0, None, self._entry_timeout_s(directory, positive=False), 0.0)
            return self._recalled(directory, entry, seen_at)
        known = self._inodes.at(parent, name)
        usable = known is not None and self.attributes.may_be_old(known)
        try:
            if usable and self._client.away:
                raise ServerAway
            found = await self._client.lookup(cred, directory.fh, name, impatient=usable)
        except NfsError as error:
            if error.status != nfs3.NFS3ERR_NOENT:
                raise
            return Entry(0, 0, None, self._entry_timeout_s(directory, positive=False), 0.0)
        except ServerAway:
            assert known is not None and known.attr is not None
            (known,) = self._inodes.enter((Found(parent, name, known.fh, known.attr.fileid, known.attr.fsid),))
            return self._entry(known, self._entry_timeout_s(directory, positive=True))
        self.attributes.update(directory, found.dir_attr, asked_at)
        return await self._entered(directory, name, found.fh, found.attr, asked_at, cred)

    async def readlink(self, ino: int, cred: Credential) -> bytes:
        inode = self._inodes.get(ino)
        asked_at = time.monotonic()
        result = await self._client.readlink(cred, inode.fh)
        self.attributes.update(inode, result.attr, asked_at)
        return result.target

    async def mkdir(self, parent: int, name: bytes, mode: int, cred: Credential) -> Entry:
        directory = self._inodes.get(parent)
        self._refuse_immutable(directory)
        asked_at = time.monotonic()
        made = await self._client.mkdir(cred, directory.fh, name, Sattr(mode=stat.S_IMODE(mode)))
        return await self._made(directory, name, made, asked_at, cred)

    async def symlink(self, parent: int, name: bytes, target: bytes, cred: Credential) -> Entry:
        directory = self._inodes.get(parent)
        self._refuse_immutable(directory)
        asked_at = time.monotonic()
        made = await self._client.symlink(cred, directory.fh, name, Sattr(mode=0o777), target)
        return await self._made(directory, name, made, asked_at, cred)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, cred: Credential) -> Entry:
        directory = self._inodes.get(parent)
        self._refuse_immutable(directory)
        sattr = Sattr(mode=stat.S_IMODE(mode))
        asked_at = time.monotonic()
        if stat.S_ISREG(mode):
            made = await self._create_exclusive(directory, name, sattr, cred)
        else:
            file_type = _TYPE_OF_MODE.get(stat.S_IFMT(mode))
            if file_type is None:
                raise OSError(errno.EINVAL, "mknod of this type")
            made = await self._client.mknod(
                cred, directory.fh, name, file_type, sattr, os.major(rdev), os.minor(rdev)
            )
        return await self._made(directory, name, made, asked_at, cred)

    async def link(self, ino: int, new_parent: int, new_name: bytes, cred: Credential) -> Entry:
        inode, directory = self._inodes.get(ino), self._inodes.get(new_parent)
        self._refuse_immutable(inode, directory)
        asked_at = time.monotonic()
        result = await self._client.link(cred, inode.fh, directory.fh, new_name)
        self.attributes.update_wcc(directory, result.wcc, asked_at)
        # A new name changes ctime and nothing that the kernel's pages hold.
        self.attributes.update(inode, result.attr, asked_at, own=True)
        return await self._entered(directory, new_name, inode.fh, result.attr, asked_at, cred)

    async def unlink(self, parent: int, name: bytes, cred: Credential) -> None:
        directory = self._inodes.get(parent)
        self._refuse_immutable(directory)
        target = self._inodes.at(parent, name)
        if target is not None and _must_hide(target):
            await self._hide(directory, name, target, cred)
            return
        asked_at = time.monotonic()
        result = await self._client.remove(cred, directory.fh, name)
        self._inodes.removed(parent, name)
        self.attributes.update_wcc(directory, result.wcc, asked_at)
        if target is not None:
            self.attributes.expire(target)  # it may live on under other names, with a link less

    async def rmdir(self, parent: int, name: bytes, cred: Credential) -> None:
        directory = self._inodes.get(parent)
        self._refuse_immutable(directory)
        asked_at = time.monotonic()
        result = await self._client.rmdir(cred, directory.fh, name)
        self._inodes.removed(parent, name)
        self.attributes.update_wcc(directory, result.wcc, asked_at)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, cred: Credential
    ) -> None:
        if flags & ~RENAME_NOREPLACE:
            raise OSError(errno.EINVAL, "NFSv3 cannot exchange names")
        old, new = self._inodes.get(parent), self._inodes.get(new_parent)
        self._refuse_immutable(old, new)
        hidden: Inode | None = None
        if flags & RENAME_NOREPLACE:
            if await self._rename_to_free_name(old, name, new, new_name, cred):
                return
        else:
            hidden = self._inodes.at(new_parent, new_name)
            if hidden is not None:
                self.attributes.expire(hidden)
            if hidden is not None and _must_hide(hidden):
                if (await self._client.lookup(cred, old.fh, name)).fh == hidden.fh:
                    return  # both names are the same file: POSIX says do nothing
                await self._hide(new, new_name, hidden, cred)
            else:
                hidden = None
        asked_at = time.monotonic()
        try:
            result = await self._client.rename(cred, old.fh, name, new.fh, new_name)
        except SERVER_ERRORS:
            if hidden is not None:
                await self._unhide(new, hidden, new_name, cred)
            raise
        self.attributes.update_wcc(old, result.from_wcc, asked_at)
        if new is not old:
            self.attributes.update_wcc(new, result.to_wcc, asked_at)
        self._renamed(old, name, new, new_name)

    def attach(self, kernel: Kernel) -> None:
        """From now on the kernel may be told things."""
        self.attributes.kernel = kernel
        if self.prefetch is not None and self.is_immutable:
            self.prefetch.store_pages = kernel.store_pages

    def forget(self, forgotten: Sequence[tuple[int, int]]) -> None:
        self._inodes.forget(forgotten)

    # -- attributes --------------------------------------------------------------------------------

    async def getattr(self, ino: int, cred: Credential) -> Entry:
        inode = self._inodes.get(ino)
        if inode.open_file is not None and inode.open_file.extents:
            # stat(2) tells the times that the server gave; so the writes must be there first.
            await self.writer.flush(inode.open_file)
        await self.attributes.get(inode, cred)
        return self._entry(inode)

    async def setattr(
        self, ino: int, cred: Credential, *, mode: int | None = None, uid: int | None = None,
        gid: int | None = None, size_bytes: int | None = None, atime_ns: int | None = None,
        mtime_ns: int | None = None, handle: int | None = None,
    ) -> Entry:  # fmt: skip
        """Change what is not None. With a handle the size is changed in the name of who opened it."""
        inode = self._inodes.get(ino)
        self._refuse_immutable(inode)
        file = inode.open_file
        if file is not None and file.extents:
            if size_bytes is not None:
                await self.writer.sync(file)  # or an old extent sent again would undo the truncation
            else:
                await self.writer.flush(file)
        if size_bytes is not None:
            self._check_end(size_bytes)
        # NFSv3 has no times before 1970.
        times = (None if t is None else max(0, t) for t in (atime_ns, mtime_ns))
        sattr = Sattr(None if mode is None else stat.S_IMODE(mode), uid, gid, size_bytes, *times)
        if handle is not None and size_bytes is not None and mode is None and uid is None and gid is None:
            cred = self._handles[handle].cred
        asked_at = time.monotonic()
        try:
            result = await self._client.setattr(cred, inode.fh, sattr)
        except NfsError as error:
            # Who may write a file but does not own it may set its times to now, and only by the server's clock.
            by_server = _by_servers_clock(sattr)
            if error.status not in (nfs3.NFS3ERR_PERM, nfs3.NFS3ERR_ACCES) or by_server is None:
                raise
            result = await self._client.setattr(cred, inode.fh, by_server)
        inode = self._inodes.get(ino)
        self.attributes.update_wcc(inode, result.wcc, asked_at)
        if result.wcc.after is None:
            await self.attributes.revalidate(inode, cred)
        return self._entry(inode)

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
        return await self._may(inode, wanted, cred)

    async def statfs(self, cred: Credential) -> tuple[nfs3.FsstatResult, int]:
        """FSSTAT of the export and the longest name it takes."""
        root = self._inodes.get(ROOT_INO)
        result = await self._client.fsstat(cred, root.fh)
        name_max = (await self._client.pathconf(cred, root.fh)).name_max
        return result, name_max

    # -- files -------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int, cred: Credential) -> Opened:
        inode = self._inodes.get(ino)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._refuse_immutable(inode)
        cto = self._options.cto and self._mode_of(inode) is not Mode.IMMUTABLE
        if cto or not self.attributes.remaining_s(inode):
            if not await self._may(inode, _wanted_by(flags), cred):
                raise OSError(errno.EACCES, "the server does not allow it")
            inode = self._inodes.get(ino)
            self._check_kernel_size(inode)
        if flags & os.O_TRUNC:
            await self.setattr(ino, cred, size_bytes=0)
            inode = self._inodes.get(ino)
            inode.kernel_size_bytes = 0
        if self.prefetch is not None and flags & os.O_ACCMODE == os.O_RDONLY:
            self._prefetch_beside(inode, cred)
        return self._opened(inode, flags, cred)

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, cred: Credential
    ) -> tuple[Opened, Entry]:
        directory = self._inodes.get(parent)
        self._refuse_immutable(directory)
        asked_at = time.monotonic()
        sattr = Sattr(mode=stat.S_IMODE(mode), size=0 if flags & os.O_TRUNC else None)
        if flags & os.O_EXCL:
            made = await self._create_exclusive(directory, name, sattr, cred)
        else:
            made = await self._client.create(cred, directory.fh, name, sattr)
        entry = await self._made(directory, name, made, asked_at, cred)
        return self._opened(self._inodes.get(entry.ino), flags, cred), entry

    def read_at_once(self, handle_id: int, ino: int, offset: int, size_bytes: int) -> memoryview | bytes | None:
        """What `read` would answer, if memory has it. Handle 0: of a file that was not opened, by its node id."""
        if not handle_id:
            if ino not in self._standing:
                return None
            self._standing.move_to_end(ino)
        handle = self._handles[handle_id or self._standing[ino]]
        file = handle.file
        inode = self._open[file.ino]
        attr = inode.attr
        if attr is None or file.extents or self._mode_of(inode) is Mode.STRICT:
            return None
        if not handle_id:
            size_bytes = min(size_bytes, attr.size - offset)
            if size_bytes <= 0:
                return b""
        return self.reader.at_once(handle, offset, size_bytes, attr)

    async def read(self, handle_id: int, offset: int, size_bytes: int) -> memoryview | bytes:
        """Up to `size_bytes`, less only at the end of the file; good until the next await."""
        handle = self._handles[handle_id]
        file = handle.file
        inode = self._open[file.ino]
        strict = self._mode_of(inode) is Mode.STRICT
        attr = inode.attr if inode.attr is not None else await self.attributes.revalidate(inode, handle.cred)
        # What gets committed while we ask may not be in the answer: it is laid over all the same.
        extents = list(file.extents)
        if strict or (offset + size_bytes > attr.size and not self.attributes.remaining_s(inode)):
            attr = await self.attributes.revalidate(inode, handle.cred)
        if not extents:
            there = await self.reader.read(handle, offset, size_bytes, attr)
            if len(there) < min(size_bytes, attr.size - offset):
                # The kernel takes a short answer for the end of the file, so that must be true.
                attr = await self.attributes.revalidate(inode, handle.cred)
                there = await self.reader.exactly(handle, offset, min(size_bytes, attr.size - offset))
            return there
        size_bytes = min(size_bytes, max(attr.size, *(e.end for e in extents)) - offset)
        if size_bytes <= 0:
            return b""
        target = memoryview(bytearray(size_bytes))
        there = await self.reader.exactly(handle, offset, min(size_bytes, attr.size - offset))
        target[: len(there)] = there
        earlier = set(map(id, extents))
        self.writer.overlay([*extents, *(e for e in file.extents if id(e) not in earlier)], offset, target)
        return target

    @property
    def is_immutable(self) -> bool:
        """Whether that holds for every file: then nobody needs to be told of an open or a close."""
        consistency = self._options.consistency
        return consistency.default is Mode.IMMUTABLE and not consistency.by_path

    def write_at_once(self, handle_id: int, offset: int, data: memoryview) -> bool:
        """`write`, if it needs not wait. The memory of `data` is kept."""
        handle = self._handles[handle_id]
        if handle.flags & os.O_SYNC or not self.writer.has_room(len(data)):  # O_DSYNC is a part of O_SYNC
            return False
        self._check_end(offset + len(data))
        self.writer.take(handle, offset, data)
        self._grow(handle.file.ino, offset + len(data))
        return True

    async def write(self, handle_id: int, offset: int, data: memoryview) -> None:
        handle = self._handles[handle_id]
        self._check_end(offset + len(data))
        await self.writer.room(len(data))
        self.writer.take(handle, offset, data)
        self._grow(handle.file.ino, offset + len(data))
        if handle.flags & os.O_SYNC:
            await self._sync(handle)

    async def flush(self, handle_id: int) -> None:
        """close(2): what was written is committed, or its error reported."""
        await self._sync(self._handles[handle_id])

    async def fsync(self, handle_id: int) -> None:
        await self._sync(self._handles[handle_id])

    async def release(self, handle_id: int) -> None:
        handle = self._handles[handle_id]
        file = handle.file
        if file.extents:
            await self.writer.sync(file)  # written through a mapping after close(2)
        handle.closed = True
        del self._handles[handle_id]
        file.handles -= 1
        if file.handles:
            return
        if file.sillyname is not None:
            # Still open until the hidden name is gone, since until then it counts as a link.
            parent, name = file.sillyname
            await self._remove_hidden(self._inodes.get(parent), name, handle.cred)
            file.sillyname = None
            self._forget_attributes(self._inodes.get(file.ino))
            if file.handles:
                return  # opened again meanwhile, by another link
        self._open.pop(file.ino).open_file = None

    # -- directories -------------------------------------------------------------------------------

    async def opendir(self, ino: int, cred: Credential) -> int:
        inode = self._inodes.get(ino)
        if not await self._may(inode, nfs3.ACCESS3_READ, cred):
            raise OSError(errno.EACCES, "the server does not allow it")
        number = self._number()
        self._listings[number] = self._directories.listing(self._inodes.get(ino), cred)
        return number

    async def readdir(self, handle_id: int, cookie: int, most: int) -> list[ListedEntry]:
        """Up to `most` entries after `cookie`, each with one lookup counted; empty at the end.

        The caller gives back by `forget` the lookups of entries that the kernel is not shown.
        """
        listing = self._listings[handle_id]
        entries, start = await listing.after(cookie)
        chosen = entries[start : start + most]
        directory = listing.inode
        known = [e for e in chosen if e.fh is not None and e.attr is not None and e.name not in (b".", b"..")]
        inodes = self._inodes.enter(
            Found(directory.ino, e.name, e.fh, e.fileid, e.attr.fsid)
            for e in known
            if e.fh is not None and e.attr is not None
        )
        shown: dict[bytes, Entry] = {}
        for entry, inode in zip(known, inodes, strict=True):
            assert entry.attr is not None
            if listing.fresh:
                self.attributes.update(inode, entry.attr, listing.seen_at)
            else:
                self.attributes.recall(inode, entry.attr, listing.seen_at)
            shown[entry.name] = self._entry(inode, self._entry_timeout_s(directory, positive=True))
        return [ListedEntry(e.name, e.cookie, e.fileid, shown.get(e.name)) for e in chosen]

    def releasedir(self, handle_id: int) -> None:
        self._listings.pop(handle_id).close()

    # -- ending ------------------------------------------------------------------------------------

    async def sync_all(self) -> None:
        """Commit all that is dirty, as umount does."""
        async with trio.open_nursery() as nursery:
            for inode in list(self._open.values()):
                if inode.open_file is not None and inode.open_file.extents:
                    nursery.start_soon(self.writer.sync, inode.open_file)

    # -- parts -------------------------------------------------------------------------------------

    def _check_end(self, end: int) -> None:
        if end > self._client.max_file_bytes:
            raise OSError(errno.EFBIG, "beyond the server's largest file")

    def _grow(self, ino: int, end: int) -> None:
        """The kernel's own idea of the size after a write."""
        inode = self._inodes.get(ino)
        if inode.kernel_size_bytes is not None:
            inode.kernel_size_bytes = max(inode.kernel_size_bytes, end)

    def _number(self) -> int:
        self._next_handle += 1
        return self._next_handle

    def _mode_of(self, inode: Inode) -> Mode:
        consistency = self._options.consistency
        if not consistency.by_path:
            return consistency.default
        if inode.mode is None:
            inode.mode = consistency.of(self._inodes.path(inode))
        return inode.mode

    def _refuse_immutable(self, *inodes: Inode) -> None:
        if any(self._mode_of(inode) is Mode.IMMUTABLE for inode in inodes):
            raise OSError(errno.EROFS, "immutable by the mount's rules")

    def _entry_timeout_s(self, directory: Inode, *, positive: bool) -> float:
        kind = self._options.lookupcache
        if kind == "none" or (kind == "positive" and not positive):
            return 0.0
        return self.attributes.remaining_s(directory)

    def _entry(self, inode: Inode, entry_timeout_s: float = 0.0) -> Entry:
        """The inode as the kernel shall see it now."""
        attr = inode.attr
        assert attr is not None
        file = inode.open_file
        if file is not None and file.dirty_end > attr.size:
            attr = attr._replace(size=file.dirty_end)
        if file is not None and file.sillyname is not None:
            attr = attr._replace(nlink=attr.nlink - 1)  # the hidden name does not count
        inode.kernel_size_bytes = attr.size
        return Entry(inode.ino, inode.generation, attr, entry_timeout_s, self.attributes.remaining_s(inode))

    def _enter(self, parent: int, name: bytes, fh: bytes, attr: Fattr | None, asked_at: float) -> Entry:
        assert attr is not None
        (inode,) = self._inodes.enter((Found(parent, name, fh, attr.fileid, attr.fsid),))
        self.attributes.update(inode, attr, asked_at)
        return self._entry(inode, self._entry_timeout_s(self._inodes.get(parent), positive=True))

    def _recalled(self, directory: Inode, entry: DirEntryPlus, seen_at: float) -> Entry:
        """Enter a name from a kept listing."""
        assert entry.fh is not None and entry.attr is not None
        (inode,) = self._inodes.enter((Found(directory.ino, entry.name, entry.fh, entry.fileid, entry.attr.fsid),))
        self.attributes.recall(inode, entry.attr, seen_at)
        return self._entry(inode, self._entry_timeout_s(directory, positive=True))

    async def _entered(
        self, directory: Inode, name: bytes, fh: bytes | None, attr: Fattr | None, asked_at: float, cred: Credential
    ) -> Entry:
        """Enter a name; the server may have left out its handle or attributes (RFC 1813 §3.3.8)."""
        if fh is None:
            found = await self._client.lookup(cred, directory.fh, name)
            fh, attr = found.fh, found.attr
        if fh is None:
            raise OSError(errno.EIO, "LOOKUP without a file handle")
        if attr is None:
            attr = await self._client.getattr(cred, fh)
        return self._enter(directory.ino, name, fh, attr, asked_at)

    async def _made(
        self, directory: Inode, name: bytes, made: nfs3.CreateResult, asked_at: float, cred: Credential
    ) -> Entry:
        self.attributes.update_wcc(directory, made.wcc, asked_at)
        return await self._entered(directory, name, made.fh, made.attr, asked_at, cred)

    async def _create_exclusive(
        self, directory: Inode, name: bytes, sattr: Sattr, cred: Credential
    ) -> nfs3.CreateResult:
        """CREATE EXCLUSIVE, then the attributes: servers keep the verifier in the times (RFC 1813 §3.3.8)."""
        made = await self._client.create_exclusive(cred, directory.fh, name, os.urandom(nfs3.CREATEVERFSIZE))
        fh = made.fh if made.fh is not None else (await self._client.lookup(cred, directory.fh, name)).fh
        if fh is None:
            raise OSError(errno.EIO, "CREATE without a file handle")
        times = sattr._replace(size=None, atime_ns=nfs3.SERVER_TIME, mtime_ns=nfs3.SERVER_TIME)
        done = await self._client.setattr(cred, fh, times)
        return made._replace(fh=fh, attr=done.wcc.after)

    async def _may(self, inode: Inode, wanted: int, cred: Credential) -> bool:
        """Ask the server for rights; its answer revalidates the attributes at the same time."""
        asked_at = time.monotonic()
        ino = inode.ino
        # Reading what is cached goes on without the server; the kernel has checked the mode.
        reading = not wanted & (nfs3.ACCESS3_MODIFY | nfs3.ACCESS3_EXTEND) and self.attributes.may_be_old(inode)
        if reading and self._client.away:
            return True
        try:
            result = await self._client.access(cred, inode.fh, wanted, impatient=reading)
        except ServerAway:
            return True
        inode = self._inodes.get(ino)
        if result.attr is None:
            await self.attributes.revalidate(inode, cred)
        else:
            self.attributes.update(inode, result.attr, asked_at)
        return result.access & wanted == wanted

    def _learn(self, ino: int, attr: Fattr, asked_at: float) -> None:
        """Attributes that came with a READ. While we write ourselves, they tell nothing new."""
        try:
            inode = self._inodes.get(ino)
        except KeyError:
            return  # forgotten meanwhile
        if inode.open_file is None or not inode.open_file.extents:
            self.attributes.update(inode, attr, asked_at)

    def _forget_attributes(self, inode: Inode) -> None:
        """They changed by a call of ours that returned no new ones."""
        self.attributes.expire(inode)
        if self.attributes.kernel is not None:
            self.attributes.kernel.drop_attributes(inode.ino)

    def _prefetch_beside(self, inode: Inode, cred: Credential) -> None:
        assert self.prefetch is not None
        try:
            directory = self._inodes.get(inode.parent)
        except KeyError:
            return  # the kernel has forgotten it
        self.prefetch.opened(directory, inode.name, cred)

    def _check_kernel_size(self, inode: Inode) -> None:
        """Make the kernel learn a size that changed elsewhere, before it uses its own for O_APPEND or a read.

        An OPEN reply carries no attributes. ESTALE makes the kernel walk the path again with LOOKUPs, whose
        replies do, and then open again; the program does not see it.
        """
        attr, file = inode.attr, inode.open_file
        if attr is None or attr.type != nfs3.NF3REG or (file is not None and file.extents):
            return
        known, inode.kernel_size_bytes = inode.kernel_size_bytes, attr.size
        if known is not None and known != attr.size:
            if self.attributes.kernel is not None:
                self.attributes.kernel.drop_attributes(inode.ino)
            raise OSError(errno.ESTALE, "size changed on the server")

    def _opened(self, inode: Inode, flags: int, cred: Credential) -> Opened:
        attr, file = inode.attr, inode.open_file
        if file is None:
            file = inode.open_file = OpenFile(inode.ino, inode.fh)
            self._open[inode.ino] = inode
        file.handles += 1
        number = self._number()
        self._handles[number] = Handle(file, cred, flags)
        now = version(attr) if attr is not None else None
        keep = inode.pages_version == now or bool(file.extents)
        inode.pages_version = now
        return Opened(number, keep, self._mode_of(inode) is Mode.STRICT)

    def handle_of(self, ino: int, cred: Credential) -> int:
        """A handle for all readers of a file that the kernel opens by itself, kept for a while."""
        number = self._standing.get(ino)
        if number is not None:
            self._standing.move_to_end(ino)
            return number
        inode = self._inodes.get(ino)
        if self.prefetch is not None:
            self._prefetch_beside(inode, cred)
        number = self._standing[ino] = self._opened(inode, os.O_RDONLY, cred).handle
        if len(self._standing) > MAX_STANDING:
            _, oldest = self._standing.popitem(last=False)
            handle = self._handles.pop(oldest)
            handle.closed = True
            self._open.pop(handle.file.ino).open_file = None
        return number

    async def _sync(self, handle: Handle) -> None:
        if handle.file.extents:
            await self.writer.sync(handle.file)
        number = self.writer.new_error(handle)
        if number is not None:
            raise OSError(number, os.strerror(number))

    async def _hide(self, directory: Inode, old_name: bytes, target: Inode, cred: Credential) -> None:
        """Silly rename: an open file that loses its name gets one to be removed at last close."""
        file = target.open_file
        assert file is not None
        self._hidden += 1
        name = b".nfs%016x%08x" % (target.attr.fileid if target.attr else target.ino, self._hidden)
        asked_at = time.monotonic()
        result = await self._client.rename(cred, directory.fh, old_name, directory.fh, name)
        self.attributes.update_wcc(directory, result.from_wcc, asked_at)
        self._inodes.moved(directory.ino, old_name, directory.ino, name)
        if target.open_file is file:
            file.sillyname = (directory.ino, name)
        else:
            await self._remove_hidden(directory, name, cred)  # closed meanwhile

    async def _unhide(self, directory: Inode, target: Inode, name: bytes, cred: Credential) -> None:
        file = target.open_file
        if file is None or file.sillyname is None:
            return
        try:
            await self._client.rename(cred, directory.fh, file.sillyname[1], directory.fh, name)
        except SERVER_ERRORS as error:
            log.error("file stays hidden as %r: errno %d", file.sillyname[1], errno_of(error))
            return
        self._inodes.moved(directory.ino, file.sillyname[1], directory.ino, name)
        file.sillyname = None

    async def _remove_hidden(self, directory: Inode, name: bytes, cred: Credential) -> None:
        asked_at = time.monotonic()
        try:
            result = await self._client.remove(cred, directory.fh, name)
        except SERVER_ERRORS as error:
            log.error("hidden file %r stays: errno %d", name, errno_of(error))
            return
        self.attributes.update_wcc(directory, result.wcc, asked_at)

    async def _rename_to_free_name(
        self, old: Inode, name: bytes, new: Inode, new_name: bytes, cred: Credential
    ) -> bool:
        """RENAME_NOREPLACE of a file as LINK and REMOVE, since NFSv3's RENAME replaces and LINK does not.

        False: not done, but the name is free (a directory, or a server without links): a plain RENAME may
        follow, with the small race that leaves. Raises EEXIST when the name is taken.
        """
        try:
            await self._client.lookup(cred, new.fh, new_name)
        except NfsError as error:
            if error.status != nfs3.NFS3ERR_NOENT:
                raise
        else:
            raise OSError(errno.EEXIST, "name is taken")
        source = await self._client.lookup(cred, old.fh, name)
        if source.fh is None or source.attr is None or source.attr.type == nfs3.NF3DIR:
            return False
        asked_at = time.monotonic()
        try:
            linked = await self._client.link(cred, source.fh, new.fh, new_name)
        except NfsError as error:
            if error.status in (nfs3.NFS3ERR_NOTSUPP, nfs3.NFS3ERR_MLINK, nfs3.NFS3ERR_PERM, nfs3.NFS3ERR_ACCES):
                return False
            raise
        self.attributes.update_wcc(new, linked.wcc, asked_at)
        removed = await self._client.remove(cred, old.fh, name)
        self.attributes.update_wcc(old, removed.wcc, asked_at)
        self._renamed(old, name, new, new_name)
        return True

    def _renamed(self, old: Inode, name: bytes, new: Inode, new_name: bytes) -> None:
        moved = self._inodes.at(old.ino, name)
        if moved is not None:
            self._inodes.moved(old.ino, name, new.ino, new_name)
            self.attributes.expire(moved)  # its ctime changed


def _must_hide(inode: Inode) -> bool:
    """Open here, and this may be the last name that keeps it alive on the server."""
    return inode.open_file is not None and inode.open_file.sillyname is None


_TYPE_OF_MODE = {
    stat.S_IFIFO: nfs3.NF3FIFO,
    stat.S_IFSOCK: nfs3.NF3SOCK,
    stat.S_IFCHR: nfs3.NF3CHR,
    stat.S_IFBLK: nfs3.NF3BLK,
}


def _wanted_by(flags: int) -> int:
    accmode = flags & os.O_ACCMODE
    wanted = 0
    if accmode in (os.O_RDONLY, os.O_RDWR):
        # Servers let who may execute a file read it (RFC 1813 §3.3.4).
        wanted |= nfs3.ACCESS3_EXECUTE if flags & FMODE_EXEC else nfs3.ACCESS3_READ
    if accmode in (os.O_WRONLY, os.O_RDWR):
        wanted |= nfs3.ACCESS3_MODIFY | nfs3.ACCESS3_EXTEND
    return wanted


def _by_servers_clock(sattr: Sattr) -> Sattr | None:
    """The same with times that may have been meant as now left to the server; None when they were not."""
    now_ns = time.time_ns()
    given = [t for t in (sattr.atime_ns, sattr.mtime_ns) if t is not None]
    if not given or any(not 0 <= now_ns - t < MAYBE_NOW_NS for t in given):
        return None
    return sattr._replace(
        atime_ns=None if sattr.atime_ns is None else nfs3.SERVER_TIME,
        mtime_ns=None if sattr.mtime_ns is None else nfs3.SERVER_TIME,
    )


@contextlib.asynccontextmanager
async def open_filesystem(
    client: Client, options: FilesystemOptions, state_dir: Path, store: Store | None
) -> AsyncIterator[FileSystem]:
    """The file system over `client`, its identities in `state_dir`, its blocks in `store`.

    Raises `errors.SERVER_ERRORS`.
    """
    inodes = Inodes(state_dir, client.root_fh)
    try:
        async with open_nursery() as nursery:
            fs = FileSystem(client, options, inodes, nursery, store)
            await fs.attributes.revalidate(inodes.get(ROOT_INO), own_credential())
            nursery.start_soon(fs.writer.run)
            if store is not None:
                nursery.start_soon(store.run)
            yield fs
            nursery.cancel_scope.cancel()
    finally:
        inodes.close()
