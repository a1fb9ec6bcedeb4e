"""READ without OPEN: how an immutable mount is served.

Once an open(2) was answered ENOSYS the kernel opens and closes files by itself, and its READs carry a node id and no
handle. pyfuse3 passes `read` the handle and nothing else, so here READs are taken off the wire before libfuse and
answered by node id. All other requests go on to libfuse through the socketpair that it takes for
/dev/fuse, and what it writes there comes back and goes to the kernel.

Open, read, close of 10,000 files of 100 KB in the page cache: 5.5 x tmpfs with OPEN and RELEASE, 0.9 x without.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

import pyfuse3
import trio

from efcfs.nfs.nursery import open_nursery

# <linux/fuse.h>
FUSE_READ, FUSE_READDIR, FUSE_READDIRPLUS = 15, 28, 44
# struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid
_IN = struct.Struct("<IIQQIII4x")
# struct fuse_read_in, of which offset and size
_READ = struct.Struct("<8xQI")
_READ_SIZE = struct.Struct("<I")
_OUT = struct.Struct("<IiQ")

# struct fuse_notify_store_out: nodeid, offset, size
_STORE = struct.Struct("<QQI4x")
FUSE_NOTIFY_STORE = 4

REQUEST_BYTES = 1024 * 1024 + 4096
# The kernel may ask for a megabyte of names; libfuse's answers must fit into the socketpair, all at once.
LISTED_BYTES = 32 * 1024
SOCKET_BYTES = 32 * 1024 * 1024
SO_SNDBUFFORCE = 32
# Who reads what is in memory must not keep everybody else waiting.
READS_IN_A_ROW = 16


class Caller(NamedTuple):
    """Who asks, as in a pyfuse3.RequestContext."""

    pid: int
    uid: int
    gid: int


# Puts the bytes of a whole file into the kernel's page cache. May block; raises OSError.
StorePages = Callable[[int, bytes], None]


class Reads(Protocol):
    """Reads by node id. They may raise FUSEError."""

    def serve_unopened(self, store_pages: StorePages) -> None:
        """From now on; `store_pages` saves READs that will come."""

    def read_at_once(self, ino: int, offset: int, size_bytes: int, caller: Caller) -> memoryview | bytes | None:
        """The bytes if memory has them."""

    async def read_unopened(self, ino: int, offset: int, size_bytes: int, caller: Caller) -> memoryview | bytes:
        """The bytes; good until the next await."""


def widen(ours: socket.socket, libfuse: socket.socket) -> int:
    """Make room between us and libfuse; returns how many requests it may have at once.

    libfuse writes its answers from our own thread: were they more than the socketpair takes, nobody could empty it.
    """
    for end in (ours, libfuse):
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)  # as much as net.core.wmem_max allows
    return max(1, libfuse.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // (2 * LISTED_BYTES))


async def serve_reads(fuse_fd: int, session: socket.socket, reads: Reads) -> None:
    """Answer READs and carry everything else to libfuse and back, until the mount ends; then ends pyfuse3's loop."""
    os.set_blocking(fuse_fd, False)
    libfuse = trio.socket.from_stdlib_socket(session)
    reads.serve_unopened(lambda ino, data: _store(fuse_fd, ino, data))

    async def answers() -> None:
        while True:
            reply = await libfuse.recv(REQUEST_BYTES)
            _write(fuse_fd, [reply])

    async with open_nursery() as nursery:
        nursery.start_soon(answers)
        buffer = memoryview(bytearray(REQUEST_BYTES))
        in_a_row = 0
        while True:
            if (in_a_row := in_a_row + 1) > READS_IN_A_ROW:
                await trio.lowlevel.checkpoint()
                in_a_row = 0
            try:
                length = os.readv(fuse_fd, [buffer])
            except BlockingIOError:
                await trio.lowlevel.wait_readable(fuse_fd)
                in_a_row = 0
                continue
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue  # the request was interrupted before we had it
                if error.errno != errno.ENODEV:
                    raise
                break  # unmounted
            _, opcode, unique, ino, uid, gid, pid = _IN.unpack_from(buffer)
            if opcode == FUSE_READ:
                offset, size_bytes = _READ.unpack_from(buffer, _IN.size)
                caller = Caller(pid, uid, gid)
                try:
                    there = reads.read_at_once(ino, offset, size_bytes, caller)
                except pyfuse3.FUSEError as error:
                    _write(fuse_fd, [_OUT.pack(_OUT.size, -error.errno, unique)])
                    continue
                if there is not None:
                    _write(fuse_fd, [_OUT.pack(_OUT.size + len(there), 0, unique), there])
                else:
                    nursery.start_soon(_read, fuse_fd, reads, unique, ino, offset, size_bytes, caller)
                continue
            if opcode in (FUSE_READDIR, FUSE_READDIRPLUS):
                offset, size_bytes = _READ.unpack_from(buffer, _IN.size)
                _READ_SIZE.pack_into(buffer, _IN.size + 16, min(size_bytes, LISTED_BYTES))
            await libfuse.send(buffer[:length])
        pyfuse3.terminate()
        nursery.cancel_scope.cancel()


async def _read(
    fuse_fd: int, reads: Reads, unique: int, ino: int, offset: int, size_bytes: int, caller: Caller
) -> None:
    try:
        data = await reads.read_unopened(ino, offset, size_bytes, caller)
    except pyfuse3.FUSEError as error:
        _write(fuse_fd, [_OUT.pack(_OUT.size, -error.errno, unique)])
    else:
        _write(fuse_fd, [_OUT.pack(_OUT.size + len(data), 0, unique), data])


def _store(fuse_fd: int, ino: int, data: bytes) -> None:
    head = _OUT.pack(_OUT.size + _STORE.size + len(data), FUSE_NOTIFY_STORE, 0) + _STORE.pack(ino, 0, len(data))
    os.writev(fuse_fd, [head, data])


def _write(fuse_fd: int, pieces: list[bytes | memoryview]) -> None:
    try:
        os.writev(fuse_fd, pieces)
    except FileNotFoundError:
        pass  # who asked was killed meanwhile
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
