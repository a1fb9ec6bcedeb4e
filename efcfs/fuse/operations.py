"""The kernel's requests, translated: pyfuse3's types in, `vfs` calls, pyfuse3's types out.

No decision is made here. Every error becomes an errno in `_answered`, but those that end the daemon:
pyfuse3 ends its main loop on any other exception.
"""

import errno
import functools
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FUSEError,
    ReaddirToken,
    RequestContext,
)

from efcfs.fuse.callers import Callers
from efcfs.fuse.direct import BLKSIZE, MODE_OF_TYPE, Asked, Served, requests, told
from efcfs.fuse.interrupts import Unwanted
from efcfs.nfs import nfs3
from efcfs.nfs.nfs3 import Fattr
from efcfs.nfs.rpc import Credential
from efcfs.vfs.entries import Entry
from efcfs.vfs.filesystem import FileSystem
from efcfs.vfs.handles import Request
from efcfs.vfs.writer import Taken

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Above every node id that `inodes.py` gives.
NO_NODE = 1 << 63
# Entries entered in the index at once while listing; those that do not fit the reply are taken back.
READDIR_BATCH = 64


def _answered(
    operation: Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, T]]:
    @functools.wraps(operation)
    async def answered(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await operation(self, *args, **kwargs)
        except Exception as error:
            raise told(operation.__name__, error) from None

    return answered


class Operations(pyfuse3.Operations):
    """pyfuse3's request handlers, over one file system from `begin` on."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    _fs: FileSystem
    served: dict[int, Served]
    asked: Callable[[int], Asked]
    """What is behind a context's pid, which is a token of the wire's (`session.py` sets it)."""

    def begin(self, fs: FileSystem) -> None:
        self._fs = fs
        self.callers = Callers()
        self.served = requests(fs, self.callers)

    # -- names -------------------------------------------------------------------------------------

    @_answered
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._fs.names.readlink(inode, self._who(ctx)[0])

    @_answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        return _entry(await self._fs.names.mkdir(parent_inode, name, mode, *self._who(ctx)))

    @_answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return _entry(await self._fs.names.symlink(parent_inode, name, target, *self._who(ctx)))

    @_answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        return _entry(await self._fs.names.mknod(parent_inode, name, mode, rdev, *self._who(ctx)))

    @_answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        return _entry(await self._fs.names.link(inode, new_parent_inode, new_name, *self._who(ctx)))

    @_answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._fs.names.unlink(parent_inode, name, *self._who(ctx))

    @_answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._fs.names.rmdir(parent_inode, name, *self._who(ctx))

    @_answered
    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int,
        ctx: RequestContext,
    ) -> None:  # fmt: skip
        await self._fs.names.rename(
            parent_inode_old, name_old, parent_inode_new, name_new, flags, *self._who(ctx)
        )

    # -- attributes --------------------------------------------------------------------------------

    @_answered
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        return await self._fs.access(inode, mode, self._who(ctx)[0])

    # NFSv3 has no extended attributes. After ENOSYS the kernel says EOPNOTSUPP by itself and asks no more.

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        raise FUSEError(errno.ENOSYS)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.ENOSYS)

    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        raise FUSEError(errno.ENOSYS)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        raise FUSEError(errno.ENOSYS)

    # -- directories -------------------------------------------------------------------------------

    @_answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return await self._fs.opendir(inode, *self._who(ctx))

    @_answered
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        cookie = start_id & 0xFFFFFFFFFFFFFFFF
        given = 0
        while True:
            batch = await self._fs.readdir(fh, cookie, READDIR_BATCH)
            for i, listed in enumerate(batch):
                if listed.entry is not None:
                    attributes = _entry(listed.entry)
                else:
                    # No valid mode: the kernel shows the name, makes no inode of it, and sends a FORGET all the same:
                    # for a number that no file has.
                    attributes = EntryAttributes()
                    attributes.st_ino = listed.fileid | NO_NODE
                    attributes.st_mode = 0
                    attributes.entry_timeout = attributes.attr_timeout = 0
                if not pyfuse3.readdir_reply(token, listed.name, attributes, _signed(listed.cookie)):
                    self._fs.forget([(e.entry.ino, 1) for e in batch[i:] if e.entry is not None])
                    return
                given += 1
                cookie = listed.cookie
            if not batch or given >= READDIR_BATCH * 8:
                return

    @_answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Nothing to do: a server answers changes of directories when they are stable (RFC 1813 §4.8)."""

    @_answered
    async def releasedir(self, fh: int) -> None:
        self._fs.releasedir(fh)

    # -- past libfuse (`wire.Files`) ---------------------------------------------------------------

    def attend(self) -> int:
        return self._fs.client.attend()

    def arrived(self) -> None:
        self._fs.client.arrived()

    def leave(self) -> None:
        self._fs.client.leave()

    def buffer(self) -> memoryview:
        return self._fs.dirty.buffer()

    def read_at_once(self, fh: int, ino: int, offset: int, size_bytes: int) -> memoryview | bytes | None:
        try:
            return self._fs.read_at_once(fh, ino, offset, size_bytes)
        except Exception as error:
            raise told("read", error) from None

    @_answered
    async def read_later(
        self, asked: Asked, fh: int, offset: int, size_bytes: int
    ) -> memoryview | bytes:
        if not fh:
            fh = self._fs.handle_of(asked.ino, self.callers.credential(*asked[3:]))
        return await self._fs.read(fh, offset, size_bytes)

    def write_at_once(self, fh: int, offset: int, data: memoryview) -> Taken | None:
        try:
            return self._fs.write_at_once(fh, offset, data)
        except Exception as error:
            raise told("write", error) from None

    @_answered
    async def taken(self, fh: int) -> None:
        await self._fs.taken(fh)

    @_answered
    async def write_later(self, fh: int, offset: int, data: memoryview) -> None:
        await self._fs.write(fh, offset, data)

    def forgotten(self, inodes: list[tuple[int, int]]) -> None:
        self._fs.forget(inodes)

    async def take_back(self, what: Unwanted) -> None:
        kernel = self._fs.attributes.kernel
        try:
            if what.directory:
                self._fs.releasedir(what.directory)
            if what.handle:
                await self._fs.release(what.handle)
            self._fs.forget(what.lookups)
            if kernel is not None:
                for directory, name in what.names:
                    kernel.expire_name(directory, name)
                if what.attributes_of:
                    kernel.drop_attributes(what.attributes_of)
        except Exception as error:
            told("taking back", error)

    # -- parts -------------------------------------------------------------------------------------

    def _who(self, ctx: RequestContext) -> tuple[Credential, Request]:
        """Who asks, and what the kernel says of the request."""
        asked = self.asked(ctx.pid)
        return self.callers.credential(ctx.uid, ctx.gid, asked.pid), asked.request


def _entry(entry: Entry) -> EntryAttributes:
    attributes = EntryAttributes()
    attributes.st_ino = entry.ino
    attributes.generation = entry.generation
    attributes.entry_timeout = entry.entry_timeout_s
    attributes.attr_timeout = entry.attr_timeout_s
    if entry.attr is not None:
        _fill(attributes, entry.attr)
    return attributes


def _fill(attributes: EntryAttributes, attr: Fattr) -> None:
    attributes.st_mode = MODE_OF_TYPE.get(attr.type, 0) | (attr.mode & 0o7777)
    attributes.st_nlink = attr.nlink
    attributes.st_uid = attr.uid
    attributes.st_gid = attr.gid
    if attr.type in (nfs3.NF3CHR, nfs3.NF3BLK):
        attributes.st_rdev = os.makedev(attr.rdev_major, attr.rdev_minor)
    attributes.st_size = attr.size
    attributes.st_blocks = (attr.used + 511) // 512
    attributes.st_blksize = BLKSIZE
    attributes.st_atime_ns = attr.atime_ns
    attributes.st_mtime_ns = attr.mtime_ns
    attributes.st_ctime_ns = attr.ctime_ns


def _signed(cookie: int) -> int:
    """A 64-bit NFS cookie as the signed offset that readdir has."""
    return cookie - (1 << 64) if cookie >> 63 else cookie
