"""Serving an open /dev/fuse: the first start, a restart and an upgrade are the same thing.

libfuse insists on opening a session with FUSE_INIT. The keeper has read the kernel's INIT request once and
keeps it, so every daemon plays it to libfuse over a socketpair, over which libfuse gets all other requests
too (`wire.py`). The reply that libfuse writes is improved on its way to the kernel, which sees only the
first one.
"""

import os
import socket
import struct
from collections.abc import Callable

import pyfuse3
import trio

from efcfs.fuse.notify import resend
from efcfs.fuse.operations import Operations
from efcfs.fuse.wire import Wire, widen
from efcfs.nfs.nursery import open_nursery
from efcfs.vfs.filesystem import FileSystem

# <linux/fuse.h>, protocol 7.36 and later
FUSE_AUTO_INVAL_DATA = 1 << 12
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_CACHE_SYMLINKS = 1 << 23
FUSE_EXPLICIT_INVAL_DATA = 1 << 25
FUSE_HANDLE_KILLPRIV_V2 = 1 << 28
FUSE_INIT_EXT = 1 << 30
# In flags2, which counts with INIT_EXT: bit 36 of all flags.
FUSE_DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32)

# Requests of one mount that the kernel may have waiting here: enough for readahead over 64 links.
MAX_BACKGROUND = 256
CONGESTION_THRESHOLD = 192
# A hard mount whose server is away parks each caller in a task; beyond these, cached answers wait too.
MAX_TASKS = 512
MIN_TASKS = 8
# How long changes may take to end whose callers were killed, when the mount has ended.
ENDING_S = 2.0

_IN_FLAGS = struct.Struct("<II")  # flags, flags2
_IN_FLAGS_AT = 40 + 12
_OUT_FLAGS = struct.Struct("<IHH")  # flags, max_background, congestion_threshold
_OUT_FLAGS_AT = 16 + 12
_OUT_FLAGS2 = struct.Struct("<I")
_OUT_FLAGS2_AT = 16 + 32


def amend_init_reply(request: bytes, reply: bytes) -> bytes:
    """libfuse's INIT reply with what the kernel offered, efcfs can serve and libfuse does not ask for.

    PARALLEL_DIROPS: or lookups in one directory go one at a time. CACHE_SYMLINKS: targets do not change.
    No AUTO_INVAL_DATA: it would drop the pages that we wrote ourselves whenever their mtime comes back from
    the server; the file system invalidates by itself. HANDLE_KILLPRIV_V2: the server clears set-id bits, as the
    kernel's NFS client has it; without, the kernel does so by a SETATTR(mode) in the name of who writes, which the
    server refuses to all but the owner. DIRECT_IO_ALLOW_MMAP: or `strict` has no shared mappings.
    """
    offered, offered2 = _IN_FLAGS.unpack_from(request, _IN_FLAGS_AT)
    flags, _, _ = _OUT_FLAGS.unpack_from(reply, _OUT_FLAGS_AT)
    (flags2,) = _OUT_FLAGS2.unpack_from(reply, _OUT_FLAGS2_AT)
    flags |= offered & (
        FUSE_PARALLEL_DIROPS | FUSE_CACHE_SYMLINKS | FUSE_EXPLICIT_INVAL_DATA | FUSE_HANDLE_KILLPRIV_V2 | FUSE_INIT_EXT
    )
    flags &= ~FUSE_AUTO_INVAL_DATA
    if flags & FUSE_INIT_EXT:
        flags2 |= offered2 & FUSE_DIRECT_IO_ALLOW_MMAP
    amended = bytearray(reply)
    _OUT_FLAGS.pack_into(amended, _OUT_FLAGS_AT, flags, MAX_BACKGROUND, CONGESTION_THRESHOLD)
    _OUT_FLAGS2.pack_into(amended, _OUT_FLAGS2_AT, flags2)
    return bytes(amended)


class Session:
    """libfuse's session. It can greet libfuse before there is a mount or a file system: that takes some 20 ms."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._room = widen(self._ours, theirs, MAX_TASKS)
        self._number = theirs.detach()
        self._operations = Operations()
        self._reply = b""
        pyfuse3.init(self._operations, f"/dev/fd/{self._number}", set())

    def close(self) -> None:
        self._ours.close()
        pyfuse3.close(unmount=False)

    async def greet(self, init_request: bytes) -> None:
        """Have libfuse answer the INIT request. To be called once, before `serve` or by it."""
        async with trio.open_nursery() as nursery:
            ended = trio.Event()

            async def first_main() -> None:
                await pyfuse3.main(1, 1)
                ended.set()

            nursery.start_soon(first_main)
            self._ours.send(init_request)
            await trio.lowlevel.wait_readable(self._ours)
            self._reply = amend_init_reply(init_request, self._ours.recv(65536))
            while not ended.is_set():
                # main's tasks wait for the socket one after the other; each is told to stop.
                trio.lowlevel.notify_closing(self._number)
                await trio.lowlevel.checkpoint()

    async def serve(
        self, fs: FileSystem, fuse_fd: int, init_request: bytes, *, first: bool, on_ready: Callable[[Wire], None]
    ) -> None:
        """Serve the mount behind `fuse_fd` until it is unmounted, or until cancelled, and leave it then to others.

        first: nobody served it before, so the kernel waits for the INIT reply; otherwise requests that died
        with the daemon before are asked for again (kernel 6.9 or later).
        """
        try:
            self._operations.begin(fs)
            if not self._reply:
                await self.greet(init_request)
            if first:
                os.write(fuse_fd, self._reply)
            else:
                resend(fuse_fd)
            async with open_nursery() as nursery:
                wire = Wire(fuse_fd, self._ours, self._room.listed_bytes, self._operations, nursery.cancel_scope)
                self._operations.asked = wire.asked
                on_ready(wire)
                nursery.start_soon(pyfuse3.main, min(MIN_TASKS, self._room.requests), self._room.requests)
                await wire.run()
                pyfuse3.terminate()  # it ends when what libfuse has is done
                nursery.cancel_scope.deadline = trio.current_time() + ENDING_S  # nobody waits for that any more
        finally:
            os.close(fuse_fd)
