"""A version of a file in the memory tier, as readers hold it: its descriptor, and its bytes as a mapping.

This module knows nothing of tiers, quotas or eviction; which bytes are there, the index tells (`store.py` asks it).
"""

import contextlib
import mmap
import os
import struct
from hashlib import blake2b

import trio

from efcfs.cache.index import CHUNK_BYTES, EXTENT_BYTES, KEY_BYTES, Index

# <sys/mman.h>, Linux 5.14; `mmap` has no name for it.
MADV_POPULATE_READ = 22
_VERSION = struct.Struct(">QQQ")


class CachedFile:
    """A version of a file. `filling` has an event for each extent that somebody fetches now.

    `index` tells of its bytes, and no other does: memory has another one after a failure.
    `unset`: the identity for which the index does not yet say that this is the present version.
    """

    __slots__ = ("_has_pages", "_map", "_mapped", "fd", "filling", "index", "key", "size_bytes", "unset")

    def __init__(self, key: bytes, index: Index, size_bytes: int, fd: int, unset: bytes | None) -> None:
        self.key = key
        self.index = index
        self.unset = unset
        self.size_bytes = size_bytes
        self.fd = fd
        self._map: mmap.mmap | None = None
        self._mapped: memoryview | None = None
        # The chunks of each extent whose pages are mapped.
        self._has_pages: dict[int, int] = {}
        self.filling: dict[int, trio.Event] = {}

    @property
    def view(self) -> memoryview:
        """All of it, as it is in memory."""
        if self._mapped is None:
            self._map = mmap.mmap(self.fd, self.size_bytes, prot=mmap.PROT_READ)
            self._mapped = memoryview(self._map)
        return self._mapped

    def map_pages(self, number: int, wanted: int) -> None:
        """Map the pages of these chunks, which are in memory and follow each other.

        An answer must not need this process to map a page: if it is killed while the kernel copies, the program is told
        EIO, and the request is not there for the next daemon (13 times in 60 kills of four readers of 1 MiB).
        """
        known = self._has_pages.get(number, 0)
        missing = wanted & ~known
        if not missing:
            return
        self._has_pages[number] = known | missing
        first = (missing & -missing).bit_length() - 1
        start = number * EXTENT_BYTES + first * CHUNK_BYTES
        end = min(number * EXTENT_BYTES + missing.bit_length() * CHUNK_BYTES, self.size_bytes)
        assert self.view.obj is self._map and self._map is not None
        with contextlib.suppress(OSError):  # before 5.14, where a death costs the requests anyway
            self._map.madvise(MADV_POPULATE_READ, start, end - start)

    def filled(self, number: int) -> None:
        """The extent has other pages than before."""
        self._has_pages.pop(number, None)

    def __del__(self) -> None:
        os.close(self.fd)


def file_key(identity: bytes, size_bytes: int, mtime_ns: int, ctime_ns: int) -> bytes:
    """The name of one version of a file; `identity` tells which file of which server.

    A cryptographic digest: a server chooses handles, sizes and times, and must not be able to choose the name of
    another server's file. Only `identity` varies in length, so no two versions are the same bytes.
    """
    return blake2b(identity + _VERSION.pack(size_bytes, mtime_ns, ctime_ns), digest_size=KEY_BYTES).digest()


def file_digest(identity: bytes) -> bytes:
    """The name of the file itself, whatever its version."""
    return blake2b(identity, digest_size=KEY_BYTES).digest()
