"""What we tell the kernel unasked: bytes and attributes that it shall drop, or keep.

Written to /dev/fuse itself, not through libfuse: what waits for a page that somebody reads must do so in a thread, for
the answer to that READ is ours.
"""

import errno
import logging
import os
import struct

import trio

log = logging.getLogger(__name__)

# <linux/fuse.h>: struct fuse_out_header with the code in place of the error, then each message's own
FUSE_NOTIFY_INVAL_INODE, FUSE_NOTIFY_INVAL_ENTRY, FUSE_NOTIFY_STORE, FUSE_NOTIFY_RESEND = 2, 3, 4, 7
FUSE_EXPIRE_ONLY = 1
_OUT = struct.Struct("<IiQ")
# nodeid, offset, length; an offset below 0: attributes only; length 0: to the end
_INVAL_INODE = struct.Struct("<IiQQqq")
# nodeid of the directory, length of the name, which follows with a NUL, flags
_INVAL_ENTRY = struct.Struct("<IiQQII")
# nodeid, offset, size
_STORE = struct.Struct("<IiQQQI4x")


def resend(fuse_fd: int) -> None:
    """Ask for the requests that a daemon before us took and did not answer (kernel 6.9 or later)."""
    os.write(fuse_fd, _OUT.pack(_OUT.size, FUSE_NOTIFY_RESEND, 0))


class KernelCaches:
    """The kernel's caches of one mount (`vfs.attributes.Kernel`)."""

    def __init__(self, fuse_fd: int, nursery: trio.Nursery) -> None:
        # Its own, open as long as this process: a thread may still be at it when the session has closed the other,
        # whose number may be another file's by then.
        self._fuse_fd = os.dup(fuse_fd)
        self._nursery = nursery

    def drop_attributes(self, ino: int) -> None:
        self._tell(_INVAL_INODE.pack(_INVAL_INODE.size, FUSE_NOTIFY_INVAL_INODE, 0, ino, -1, 0))

    def drop_pages(self, ino: int) -> None:
        message = _INVAL_INODE.pack(_INVAL_INODE.size, FUSE_NOTIFY_INVAL_INODE, 0, ino, 0, 0)
        self._nursery.start_soon(self._in_thread, message)

    def expire_name(self, directory: int, name: bytes) -> None:
        size = _INVAL_ENTRY.size + len(name) + 1
        head = _INVAL_ENTRY.pack(size, FUSE_NOTIFY_INVAL_ENTRY, 0, directory, len(name), FUSE_EXPIRE_ONLY)
        # It waits for the directory's lock, which somebody may hold whom we have to answer.
        self._nursery.start_soon(self._in_thread, head + name + b"\0")

    def store_pages(self, ino: int, data: bytes) -> None:
        """Put the bytes of a whole file into the page cache. Blocks: for a thread."""
        head = _STORE.pack(_STORE.size + len(data), FUSE_NOTIFY_STORE, 0, ino, 0, len(data))
        self._tell(head, data)

    async def _in_thread(self, message: bytes) -> None:
        await trio.to_thread.run_sync(self._tell, message, abandon_on_cancel=True)

    def _tell(self, *pieces: bytes) -> None:
        try:
            os.writev(self._fuse_fd, pieces)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # forgotten meanwhile, or the mount has ended
                log.warning("notification: %s", error)
