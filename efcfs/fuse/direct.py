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
from efcfs.nfs.nfs3 import Fattr
from efcfs.vfs.entries import Entry
from efcfs.vfs.errors import SERVER_ERRORS, errno_of, is_of_the_daemon
from efcfs.vfs.filesystem import FileSystem
from efcfs.vfs.handles import Request
from efcfs.vfs.opening import Opened

log = logging.getLogger(__name__)

FUSE_LOOKUP, FUSE_GETATTR, FUSE_OPEN, FUSE_RELEASE, FUSE_FSYNC, FUSE_FLUSH, FUSE_CREATE = 1, 3, 14, 18, 20, 25, 35
FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE = 1, 2
# In the number of a request that another daemon had taken and not answered.
FUSE_UNIQUE_RESEND = 1 << 63

# fuse_flush_in, fuse_release_in and fuse_fsync_in begin with it.
_FH = struct.Struct("<Q")
# fuse_open_in: flags; fuse_create_in: flags, mode, umask, open_flags, and the name
_OPEN_IN = struct.Struct("<I")
_CREATE_IN = struct.Struct("<II8x")
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
DEVICES = (nfs3.NF3CHR, nfs3.NF3BLK)
# Programs size their buffers by it; 1 MiB for each open file of a small-file reader would be too much.
BLKSIZE = 128 * 1024


class Asked(NamedTuple):
    """A request's head, as the kernel has it."""

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
        return _entry(await fs.names.lookup(asked.ino, _name(body), credential(*asked[2:])))

    def getattr_at_once(asked: Asked, body: memoryview) -> bytes | None:
        entry = fs.getattr_at_once(asked.ino)
        return _attributes(entry) if entry is not None else None

    async def getattr_(asked: Asked, body: bytes) -> bytes:
        return _attributes(await fs.getattr(asked.ino, credential(*asked[2:])))

    async def open_(asked: Asked, body: bytes) -> bytes:
        if fs.is_immutable:
            raise FUSEError(errno.ENOSYS)  # the kernel asks no more, and READs come by node id
        (flags,) = _OPEN_IN.unpack_from(body)
        return _opened(await fs.open(asked.ino, flags, credential(*asked[2:]), asked.request))

    async def create(asked: Asked, body: bytes) -> bytes:
        flags, mode = _CREATE_IN.unpack_from(body)
        opened, entry = await fs.names.create(
            asked.ino, _name(body[_CREATE_IN.size :]), mode, flags, credential(*asked[2:]),
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
        FUSE_OPEN: Served(None, open_),
        FUSE_CREATE: Served(None, create),
        FUSE_FLUSH: Served(flush_at_once, flush),
        FUSE_FSYNC: Served(None, flush),
        FUSE_RELEASE: Served(release_at_once, release),
    }


def _name(body: bytes | memoryview) -> bytes:
    """It ends with a NUL."""
    return bytes(body).partition(b"\0")[0]


def _split(timeout_s: float) -> tuple[int, int]:
    seconds = int(timeout_s)
    return seconds, int((timeout_s - seconds) * 1e9)


def rdev(attr: Fattr) -> int:
    """The number of a device; 0 for one that Linux cannot have, as its own NFS client says."""
    major, minor = attr.rdev_major, attr.rdev_minor
    return os.makedev(major, minor) if major < 1 << 12 and minor < 1 << 20 else 0


def _packed(ino: int, attr: Fattr) -> bytes:
    atime_s, atime_ns = divmod(attr.atime_ns, 1_000_000_000)
    mtime_s, mtime_ns = divmod(attr.mtime_ns, 1_000_000_000)
    ctime_s, ctime_ns = divmod(attr.ctime_ns, 1_000_000_000)
    return _ATTR.pack(
        ino, attr.size, (attr.used + 511) // 512, atime_s, mtime_s, ctime_s, atime_ns, mtime_ns, ctime_ns,
        MODE_OF_TYPE.get(attr.type, 0) | (attr.mode & 0o7777), attr.nlink, attr.uid, attr.gid,
        rdev(attr) if attr.type in DEVICES else 0, BLKSIZE,
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
