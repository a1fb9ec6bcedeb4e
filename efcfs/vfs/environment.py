"""An LMDB environment in /dev/shm that stores straight into its file (MDB_WRITEMAP), in memory that it has.

That saves a system call for each page: a small transaction takes 5 µs, without it 10. But where /dev/shm has no room,
such a store is SIGBUS, which ends the daemon, and not an error. So the file is allocated before, and LMDB's map
ends where the allocated part ends: what does not fit raises MapFullError, and more is allocated or the caller told so.

Killed between any two stores a daemon leaves the last state that it committed: a transaction stores into pages that no
state has, then into the older of two meta pages, and there the number that makes it the newer one last. One that has no
WRITEMAP, of an earlier version or for want of memory, may go on with the file and leave it again: on tmpfs both see the
same pages. They do not write at the same time, and who goes on while another was at it says so (`rejoin`).
"""

import logging
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import lmdb

log = logging.getLogger(__name__)

T = TypeVar("T")

# Some 20,000 identities; taken at once, so that others who fill /dev/shm do not stop lookups.
RESERVED_BYTES = 8 * 1024**2
# It grows by an eighth: each time all its pages are mapped anew.
GROWTH = 8


class Environment:
    """LMDB's environment in a directory of its own, made if it is not there. Raises lmdb.Error."""

    def __init__(self, path: Path, databases: int) -> None:
        # LMDB would make its directory with the mode of its files, which only root can enter.
        path.mkdir(mode=0o700, exist_ok=True)
        self._file = path / "data.mdb"
        if not self._file.exists() or not self._file.stat().st_size:
            lmdb.open(str(path), mode=0o600).close()  # its first pages, without which LMDB takes no longer file
        status = self._file.stat()
        self._map_bytes = max(status.st_size, RESERVED_BYTES)
        has_memory = status.st_blocks * 512 >= self._map_bytes
        if not has_memory:
            try:
                self._allocate(0, self._map_bytes)
                has_memory = True
            except OSError as error:
                log.warning("no room for identities in /dev/shm: %s", error.strerror)
        self._lmdb = lmdb.open(
            str(path), map_size=self._map_bytes, max_dbs=databases, sync=False, metasync=False, mode=0o600,
            writemap=has_memory,
        )  # fmt: skip

    def close(self) -> None:
        self._lmdb.close()

    def database(self, name: bytes) -> lmdb._Database:
        return self._lmdb.open_db(name)

    def read(self, database: lmdb._Database | None = None) -> lmdb.Transaction:
        return self._lmdb.begin(db=database)

    def get(self, key: bytes, database: lmdb._Database) -> bytes | None:
        with self._lmdb.begin(db=database) as txn:
            return txn.get(key)

    def change(self, work: Callable[[lmdb.Transaction], T], undo: Callable[[], None] | None = None) -> T:
        """What `work` returns, when what it did is committed. Raises lmdb.Error when there is no room.

        It may be called again, in a longer file; `undo` takes back what it did elsewhere, if it is not committed.
        """
        while True:
            try:
                with self._lmdb.begin(write=True) as txn:
                    return work(txn)
            except Exception as error:
                if undo is not None:
                    undo()
                if not isinstance(error, lmdb.MapFullError):
                    raise
                try:
                    self._lengthen(self._map_bytes + self._map_bytes // GROWTH, allocated_bytes=self._map_bytes)
                except OSError:
                    raise error from None

    def rejoin(self) -> None:
        """Another process was at it, and may have made the file longer. Raises OSError."""
        self._lengthen(max(self._file.stat().st_size, self._map_bytes), allocated_bytes=0)

    def _lengthen(self, size_bytes: int, *, allocated_bytes: int) -> None:
        size_bytes -= size_bytes % mmap.PAGESIZE
        self._allocate(allocated_bytes, size_bytes)
        self._lmdb.set_mapsize(size_bytes)
        self._map_bytes = size_bytes

    def _allocate(self, start: int, end: int) -> None:
        fd = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, start, end - start)
        finally:
            os.close(fd)
