"""The kernel's frequent requests, served past libfuse: their bytes, and what the file system says to them.

A turn through libfuse takes two more system calls each way, pyfuse3's workers and two turns of trio's loop: some
80 µs, of which a file that is created, written and closed has four. What needs no waiting is answered at once, within
the call that read the request; what waits for a call to the server, without a task. The structs are those of
<linux/fuse.h>, protocol 7.36 and later.

Nothing is decided here; errors become errnos in `told`, here and in `operations.py`.
"""

import errno
import logging
import os
import stat
import struct
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from pyfuse3 import FUSEError

from efcfs.fuse.callers import Callers
from efcfs.nfs import nfs3
from efcfs.nfs.nfs3 import Fattr, Sattr
from efcfs.vfs.entries import Entry
from efcfs.vfs.errors import SERVER_ERRORS, errno_of, is_of_the_daemon
from efcfs.vfs.filesystem import FileSystem
from efcfs.vfs.handles import Request
from efcfs.vfs.opening import Opened

log = logging.getLogger(__name__)

FUSE_LOOKUP, FUSE_GETATTR, FUSE_SETATTR, FUSE_OPEN, FUSE_STATFS, FUSE_RELEASE = 1, 3, 4, 14, 17, 18
FUSE_FSYNC, FUSE_FLUSH, FUSE_CREATE = 20, 25, 35
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE = 1, 2
# In the number of a request that another daemon had taken and not answered.
FUSE_UNIQUE_RESEND = 1 << 63

# fuse_flush_in, fuse_release_in and fuse_fsync_in begin with it.
_FH = struct.Struct("<Q")
# fuse_open_in: flags; fuse_create_in: flags, mode, umask, open_flags, and the name
_OPEN_IN = struct.Struct("<I")
_CREATE_IN = struct.Struct("<II8x")
# fuse_setattr_in: valid, fh, size, seconds and then nanoseconds of atime and mtime, mode, uid, gid
_SETATTR_IN = struct.Struct("<I4xQQ8xqq8xII4xI4xII")
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE, FATTR_ATIME, FATTR_MTIME, FATTR_FH = (1 << bit for bit in range(7))
FATTR_ATIME_NOW, FATTR_MTIME_NOW = 1 << 7, 1 << 8
# fuse_kstatfs: blocks, free, free for users, files, free files, block size, longest name, fragment size
_STATFS_OUT = struct.Struct("<QQQQQIII28x")
STATFS_BLOCK_BYTES = 4096
# struct fuse_attr: ino, size, blocks, seconds and then nanoseconds of three times, mode, nlink, uid, gid, rdev, blksize
_ATTR = struct.Struct("<QQQqqqIIIIIIIII4x")
# fuse_attr_out up to its attr: how long it is valid, s and ns
_ATTR_OUT = struct.Struct("<QI4x")
# fuse_entry_out up to its attr: nodeid, generation, the same of the name and of the attributes
_ENTRY_OUT = struct.Struct("<QQQQII")
_NO_ATTR = bytes(_ATTR.size)
# fuse_open_out: fh, open_flags
_OPEN_OUT = struct.Struct("<QI4x")
_DONE = b""

MODE_OF_TYPE = {
    nfs3.NF3REG: stat.S_IFREG,
    nfs3.NF3DIR: stat.S_IFDIR,
    nfs3.NF3BLK: stat.S_IFBLK,
    nfs3.NF3CHR: stat.S_IFCHR,
    nfs3.NF3LNK: stat.S_IFLNK,
    nfs3.NF3SOCK: stat.S_IFSOCK,
    nfs3.NF3FIFO: stat.S_IFIFO,
}
# Programs size their buffers by it; 1 MiB for each open file of a small-file reader would be too much.
BLKSIZE = 128 * 1024


class Asked(NamedTuple):
    """A request's head, as the kernel has it."""

    opcode: int
    unique: int
    ino: int
    uid: int
    gid: int
    pid: int

    @property
    def request(self) -> Request:
        return Request(self.unique & ~FUSE_UNIQUE_RESEND, self.unique >= FUSE_UNIQUE_RESEND)


# Given the head and what follows it, the body of the answer; None: not without waiting. Both raise FUSEError.
AtOnce = Callable[[Asked, memoryview], bytes | None]
Later = Callable[[Asked, bytes], Awaitable[bytes]]


class Served(NamedTuple):
    """How one kind of request is served; `later` in a light coroutine (`nfs/light.py`)."""

    at_once: AtOnce | None
    later: Later


def told(operation: str, error: Exception) -> FUSEError:
    """What the kernel is told of the failure of an operation.

    Nothing, when it is the daemon's own: raised again it ends this one, and the next is asked.
    """
    if isinstance(error, FUSEError):
        return error
    if is_of_the_daemon(error):
        raise error
    if isinstance(error, (OSError, *SERVER_ERRORS)):
        return FUSEError(errno_of(error))
    if isinstance(error, KeyError):
        log.info("%s: node or handle %s is not known", operation, error)
        return FUSEError(errno.ESTALE)
    log.error("bug: %s failed", operation, exc_info=error)
    return FUSEError(errno.EIO)


def requests(fs: FileSystem, callers: Callers) -> dict[int, Served]:
    """What is served past libfuse, by opcode."""
    credential = callers.credential

    def lookup_at_once(asked: Asked, body: memoryview) -> bytes | None:
        entry = fs.names.lookup_at_once(asked.ino, _name(body))
        return _entry(entry) if entry is not None else None

    async def lookup(asked: Asked, body: bytes) -> bytes:
        return _entry(await fs.names.lookup(asked.ino, _name(body), credential(*asked[3:])))

    def getattr_at_once(asked: Asked, body: memoryview) -> bytes | None:
        entry = fs.getattr_at_once(asked.ino)
        return _attributes(entry) if entry is not None else None

    async def getattr_(asked: Asked, body: bytes) -> bytes:
        return _attributes(await fs.getattr(asked.ino, credential(*asked[3:])))

    async def setattr_(asked: Asked, body: bytes) -> bytes:
        sattr, handle = _wanted(body)
        return _attributes(await fs.setattr(asked.ino, credential(*asked[3:]), sattr, handle))

    async def statfs(asked: Asked, body: bytes) -> bytes:
        result, name_max = await fs.statfs(credential(*asked[3:]))
        size = STATFS_BLOCK_BYTES
        return _STATFS_OUT.pack(
            result.tbytes // size, result.fbytes // size, result.abytes // size, result.tfiles, result.ffiles,
            size, name_max, size,
        )  # fmt: skip

    async def open_(asked: Asked, body: bytes) -> bytes:
        if fs.is_immutable:
            raise FUSEError(errno.ENOSYS)  # the kernel asks no more, and READs come by node id
        (flags,) = _OPEN_IN.unpack_from(body)
        return _opened(await fs.open(asked.ino, flags, credential(*asked[3:]), asked.request))

    async def create(asked: Asked, body: bytes) -> bytes:
        flags, mode = _CREATE_IN.unpack_from(body)
        opened, entry = await fs.names.create(
            asked.ino, _name(body[_CREATE_IN.size :]), mode, flags, credential(*asked[3:]),
            asked.request,
        )  # fmt: skip
        return _entry(entry) + _opened(opened)

    def flush_at_once(asked: Asked, body: memoryview) -> bytes | None:
        if fs.read_only:
            raise FUSEError(errno.ENOSYS)  # nothing to do at close(2): the kernel asks no more
        (fh,) = _FH.unpack_from(body)
        return None if fs.has_unwritten(fh) else _DONE

    async def flush(asked: Asked, body: bytes) -> bytes:
        (fh,) = _FH.unpack_from(body)
        await fs.flush(fh)
        return _DONE

    def release_at_once(asked: Asked, body: memoryview) -> bytes | None:
        (fh,) = _FH.unpack_from(body)
        return _DONE if fs.release_at_once(fh) else None

    async def release(asked: Asked, body: bytes) -> bytes:
        (fh,) = _FH.unpack_from(body)
        await fs.release(fh)
        return _DONE

    return {
        FUSE_LOOKUP: Served(lookup_at_once, lookup),
        FUSE_GETATTR: Served(getattr_at_once, getattr_),
        FUSE_SETATTR: Served(None, setattr_),
        FUSE_STATFS: Served(None, statfs),
        FUSE_OPEN: Served(None, open_),
        FUSE_CREATE: Served(None, create),
        FUSE_FLUSH: Served(flush_at_once, flush),
        FUSE_FSYNC: Served(None, flush),
        FUSE_RELEASE: Served(release_at_once, release),
    }


def _name(body: bytes | memoryview) -> bytes:
    """It ends with a NUL."""
    return bytes(body).partition(b"\0")[0]


def _wanted(body: bytes) -> tuple[Sattr, int | None]:
    """What fuse_setattr_in wants changed, and through which handle.

    Only here one sees that a time is to be now: that is by the server's clock, as of all other changes.
    """
    valid, fh, size, atime_s, mtime_s, atime_ns, mtime_ns, mode, uid, gid = _SETATTR_IN.unpack_from(body)

    def time_ns(given: int, now: int, seconds: int, nanoseconds: int) -> int | None:
        if valid & now:
            return nfs3.SERVER_TIME
        # NFSv3 has no times before 1970.
        return max(0, seconds * 1_000_000_000 + nanoseconds) if valid & given else None

    sattr = Sattr(
        stat.S_IMODE(mode) if valid & FATTR_MODE else None,
        uid if valid & FATTR_UID else None,
        gid if valid & FATTR_GID else None,
        size if valid & FATTR_SIZE else None,
        time_ns(FATTR_ATIME, FATTR_ATIME_NOW, atime_s, atime_ns),
        time_ns(FATTR_MTIME, FATTR_MTIME_NOW, mtime_s, mtime_ns),
    )
    return sattr, fh if valid & FATTR_FH else None


def _split(timeout_s: float) -> tuple[int, int]:
    seconds = int(timeout_s)
    return seconds, int((timeout_s - seconds) * 1e9)


def _packed(ino: int, attr: Fattr) -> bytes:
    special = attr.type in (nfs3.NF3CHR, nfs3.NF3BLK)
    atime_s, atime_ns = divmod(attr.atime_ns, 1_000_000_000)
    mtime_s, mtime_ns = divmod(attr.mtime_ns, 1_000_000_000)
    ctime_s, ctime_ns = divmod(attr.ctime_ns, 1_000_000_000)
    return _ATTR.pack(
        ino, attr.size, (attr.used + 511) // 512, atime_s, mtime_s, ctime_s, atime_ns, mtime_ns, ctime_ns,
        MODE_OF_TYPE.get(attr.type, 0) | (attr.mode & 0o7777), attr.nlink, attr.uid, attr.gid,
        os.makedev(attr.rdev_major, attr.rdev_minor) & 0xFFFFFFFF if special else 0, BLKSIZE,
    )  # fmt: skip


def _entry(entry: Entry) -> bytes:
    name_s, name_ns = _split(entry.entry_timeout_s)
    attr_s, attr_ns = _split(entry.attr_timeout_s)
    head = _ENTRY_OUT.pack(entry.ino, entry.generation, name_s, attr_s, name_ns, attr_ns)
    return head + (_packed(entry.ino, entry.attr) if entry.attr is not None else _NO_ATTR)


def _attributes(entry: Entry) -> bytes:
    assert entry.attr is not None
    return _ATTR_OUT.pack(*_split(entry.attr_timeout_s)) + _packed(entry.ino, entry.attr)


def _opened(opened: Opened) -> bytes:
    flags = (FOPEN_DIRECT_IO if opened.direct_io else 0) | (FOPEN_KEEP_CACHE if opened.keep_cache else 0)
    return _OPEN_OUT.pack(opened.handle, flags)
