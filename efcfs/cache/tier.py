"""One tier of the cache: a directory of sparse files, their index, a quota.

`data-…/ab/cdef…` holds the bytes of one version of one file at their own offsets; each index has a `data-…` of its
own, so that one which was deleted or put aside while somebody uses it does no harm to the next. Files are punched and
removed inside transactions of the index, so processes that share the tier agree on them; and only in one that comes
after that which took their records out, for that one may fail: a full file system has no room for a commit either.

A tier in memory is read through mappings (`store.py`), so an evicted extent is punched only when no
process still looks at a state of the index that has it. A tier on a disk is read with `read_chunks`, which
checks every chunk's sum: there, punching at once does no harm. A disk that fails is taken out, probed, and taken back.

What a tier on a disk does may block: call it from a thread.
"""

import contextlib
import ctypes
import errno
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lmdb
import xxhash

from efcfs.cache.damage import DAMAGE, TRY_S, open_index, put_aside
from efcfs.cache.index import (
    CHUNK_BYTES,
    CHUNKS,
    EXTENT_BYTES,
    MAX_USES,
    MOST_LOOKED_AT,
    Index,
    Record,
    Unusable,
    Victim,
)  # fmt: skip
from efcfs.cache.trust import distrust

log = logging.getLogger(__name__)

# Eviction begins above the one and ends below the other, so that a reader always finds room.
HIGH_WATER, LOW_WATER = 0.95, 0.90
# Of the file system below, so much stays free for others.
MIN_FREE_SHARE = 0.02
MAX_ITEMS = 16_000_000
VICTIMS_AT_ONCE = 16
# A transaction keeps readers from changing the index; 5 µs for each.
TOUCHES_AT_ONCE = 128
STALE_RESERVATION_S = 120
PROBE_S = 10.0
# How many indexes that were put aside are kept, for who wants to know what happened.
MAX_ASIDE = 3
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


class Leaving(NamedTuple):
    """An extent that a tier evicts: its bytes, which match their sums, and the length of its file."""

    victim: Victim
    data: memoryview
    file_bytes: int


# Given a victim, and what gets its bytes; must not wait.
Demote = Callable[[Victim, Callable[[Victim], Leaving | None]], None]


def checksum(data: memoryview) -> bytes:
    return xxhash.xxh3_64_digest(data)


@dataclass(slots=True)
class Counters:
    """Since this process opened the tier."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    bad_checksums: int = 0


class Tier:
    """A tier. One in memory raises OSError or Unusable when its directory cannot be used; a disk is out then."""

    index: Index

    def __init__(
        self, name: str, directory: Path, capacity_bytes: int, *, in_memory: bool, keep_capacity: bool = False,
        try_s: float = 0.0,
    ) -> None:  # fmt: skip
        """keep_capacity: the one that was last set holds. try_s: how long the index is tried out first."""
        self.name = name
        self.directory = directory
        self.in_memory = in_memory
        self.counters = Counters()
        self.failed_at: float | None = None
        # How many threads read from the disk now: its index is not opened anew under them.
        self._reading = 0
        self._touched: set[tuple[bytes, int]] = set()
        self._to_punch: deque[tuple[int, bytes, int]] = deque()
        # One thread evicts and punches at a time: the one that keeps house, or one that looks for room.
        self._evicting = threading.RLock()
        self._damaged = False
        self.capacity_bytes = capacity_bytes
        try:
            try:
                self._open(try_s, keep_capacity=keep_capacity)
            except DAMAGE as error:  # only a write finds some of it, after the index was tried out
                self.close()
                put_aside(self.directory, str(error))
                self._open(0.0, keep_capacity=keep_capacity)
        except (OSError, lmdb.Error, Unusable) as error:
            if in_memory:
                raise
            self.fail(error)

    def _open(self, try_s: float, *, keep_capacity: bool) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        why = distrust(self.directory)
        if why is not None:
            raise Unusable(why)
        self.index = open_index(self.directory, durable=not self.in_memory, try_s=try_s)
        set_bytes = self.index.totals()[2]
        if keep_capacity and set_bytes:
            self.capacity_bytes = set_bytes
        else:
            self.set_capacity(self.capacity_bytes)

    def close(self) -> None:
        if hasattr(self, "index"):  # a disk that was out from the beginning has none
            self.index.close()

    # -- how much ----------------------------------------------------------------------------------

    def set_capacity(self, capacity_bytes: int) -> None:
        """For all who share the tier; eviction brings it down to that."""
        self.capacity_bytes = capacity_bytes
        with self.index.change() as txn:
            txn.set_capacity(capacity_bytes)

    def totals(self) -> tuple[int, int, int]:
        """Bytes, items and capacity in bytes; of a disk that fails only the last is known."""
        try:
            return self.index.totals() if self.usable() else (0, 0, self.capacity_bytes)
        except lmdb.Error:  # who uses it next takes the tier out
            return 0, 0, self.capacity_bytes

    def pressure(self) -> float:
        """How full the tier is by the tightest of its quotas: bytes, items, free space; 1.0 is full."""
        used_bytes, items, capacity_bytes = self.index.totals()
        self.capacity_bytes = capacity_bytes or self.capacity_bytes
        try:
            status = os.statvfs(self.directory)
        except FileNotFoundError:  # somebody removed it; the index goes on without a name
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            status = os.statvfs(self.directory)
        taken = 1 - status.f_bavail / max(1, status.f_blocks)
        return max(
            used_bytes / max(1, self.capacity_bytes), items / MAX_ITEMS,
            taken / (1 - MIN_FREE_SHARE) if used_bytes else 0.0,
        )  # fmt: skip

    # -- files -------------------------------------------------------------------------------------

    def path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self.directory}/{self.index.data}/{name[:2]}/{name[2:]}"

    def open(self, key: bytes, size_bytes: int) -> int:
        """The file's fd, for reading and writing; the file is made when it is not there. Raises OSError."""
        path = self.path(key)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            # Should somebody else have removed the file, the index still tells of bytes that a new one does not have.
            if self.index.has_file(key):
                self.drop_file(key)
            for directory in (str(self.directory), f"{self.directory}/{self.index.data}", os.path.dirname(path)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(directory, mode=0o700)
            fd = os.open(path, flags | os.O_CREAT, 0o600)
        if os.fstat(fd).st_size < size_bytes:
            os.ftruncate(fd, size_bytes)
        return fd

    def drop_file(self, key: bytes) -> None:
        """Forget all that is cached of the file. Mappings of it go on showing its old bytes."""
        with self.index.change() as txn:
            txn.remove_file(key)
        self._unlink_empty((key,))

    def verified(self, key: bytes, size_bytes: int) -> dict[int, int]:
        """The chunks of the file that are here and as their sums say: a mask for each extent. Blocks."""
        found: dict[int, int] = {}
        buffer = memoryview(bytearray(CHUNK_BYTES))
        try:
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                for number in range(-(-size_bytes // EXTENT_BYTES)):
                    record = self.index.look(key, number)
                    for chunk in range(CHUNKS) if record is not None else ():
                        assert record is not None
                        if record.mask >> chunk & 1:
                            start = number * EXTENT_BYTES + chunk * CHUNK_BYTES
                            n = os.preadv(fd, [buffer[: max(0, min(CHUNK_BYTES, size_bytes - start))]], start)
                            if checksum(buffer[:n]) == record.sum_of(chunk):
                                found[number] = found.get(number, 0) | 1 << chunk
                            else:
                                self.found_bad(key, number, chunk, record)
            finally:
                os.close(fd)
        except FileNotFoundError:
            self._forget_lost(key)
        except (OSError, lmdb.Error) as error:
            self.trouble(error)
        return found

    def clear(self) -> None:
        with self.index.change() as txn:
            txn.forget_all()
        paths = (self.directory / self.index.data).glob("*/*")
        self._unlink_empty(bytes.fromhex(path.parent.name + path.name) for path in paths)

    def has_its_index(self) -> bool:
        """False, and out, when the directory has another index now: those who share the one must share the other."""
        if self.index.is_current():
            return True
        self.fail(Unusable("its index was deleted or replaced"))
        return False

    def remove_strangers(self) -> None:
        """Remove files of which no index tells, and old indexes that were put aside. Blocks."""
        try:
            if not self.has_its_index():
                return  # the strangers would be all that the present one tells of
            aside = sorted(self.directory.glob("index.bad-[0-9]*"))
            names = self.directory.glob("data-" + "[0-9a-f]" * 8)  # never what a user may have there
            strangers = [path for path in names if path.name != self.index.data]
        except OSError as error:
            self.trouble(error)
            return
        for path in [*aside[:-MAX_ASIDE], *strangers]:
            shutil.rmtree(path, ignore_errors=True)

    def usable(self) -> bool:
        """False while a failing disk is out."""
        return self.failed_at is None

    # -- chunks of a tier on a disk ----------------------------------------------------------------

    def read_chunks(self, key: bytes, number: int, first: int, target: memoryview) -> int:
        """Fill `target` with chunks from `first` on, checked; returns the mask of those that came.

        Blocks: for a thread. A disk that fails is taken out, which is a miss.
        """
        self._reading += 1
        try:
            record = self.index.look(key, number)
            wanted = range(first, first + -(-len(target) // CHUNK_BYTES))
            if record is None or not any(record.mask >> chunk & 1 for chunk in wanted):
                self.counters.misses += 1
                return 0
            fd = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return self._read(fd, key, number, record, first, target)
            finally:
                os.close(fd)
        except FileNotFoundError:
            self._forget_lost(key)
            return 0
        except (OSError, lmdb.Error) as error:
            self.trouble(error)
            return 0
        finally:
            self._reading -= 1

    def _forget_lost(self, key: bytes) -> None:
        """The file is not there: evicted since, or removed by somebody, and then the index does not know it."""
        try:
            if self.index.has_file(key):
                self.drop_file(key)
        except (OSError, lmdb.Error) as error:
            self.trouble(error)

    def _read(self, fd: int, key: bytes, number: int, record: Record, first: int, target: memoryview) -> int:
        os.preadv(fd, [target], number * EXTENT_BYTES + first * CHUNK_BYTES)
        mask = 0
        for start in range(0, len(target), CHUNK_BYTES):
            chunk = first + start // CHUNK_BYTES
            if not record.mask >> chunk & 1:
                continue
            if checksum(target[start : start + CHUNK_BYTES]) == record.sum_of(chunk):
                mask |= 1 << chunk
            else:
                self.found_bad(key, number, chunk, record)
        self.counters.hits += 1
        self.touch(key, number)
        return mask

    def found_bad(self, key: bytes, number: int, chunk: int, record: Record) -> None:
        """A chunk does not match its sum: if it was not just evicted, it is counted and dropped."""
        now = self.index.look(key, number)
        if now is None or not now.mask >> chunk & 1 or now.sum_of(chunk) != record.sum_of(chunk):
            return
        self.counters.bad_checksums += 1
        log.warning("%s cache: wrong bytes in %s at %d, dropped", self.name, self.path(key),
                    number * EXTENT_BYTES + chunk * CHUNK_BYTES)  # fmt: skip
        with self.index.change() as txn:
            txn.drop_chunk(key, number, chunk)

    def write_extents(self, leaving: Sequence[Leaving]) -> None:
        """Take extents that a faster tier evicts. Blocks. A disk that fails or is full does not take them.

        In two transactions for all of them: each waits for the disk.
        """
        try:
            if self.pressure() > HIGH_WATER and not self.evict():
                return
            new = [e for e in leaving if self.lacks(e.victim)]
            if not new:
                return  # they came from here
            with self.index.change() as txn:
                for extent in new:
                    record = extent.victim.record
                    txn.reserve(extent.victim.key, extent.victim.number, queue=record.queue, uses=record.uses)
            inodes = [self._write(extent) for extent in new]
            with self.index.change() as txn:
                for (victim, _, _), inode in zip(new, inodes, strict=True):
                    with contextlib.suppress(FileNotFoundError):  # evicted at once
                        if os.stat(self.path(victim.key)).st_ino != inode:
                            continue
                        record = victim.record
                        sums = [(c, record.sum_of(c)) for c in range(CHUNKS) if record.mask >> c & 1]
                        txn.add(victim.key, victim.number, sums)
        except (OSError, lmdb.Error) as error:
            self.trouble(error)

    def mask(self, key: bytes, number: int) -> int:
        """The chunks of the extent that are here. Blocks."""
        try:
            here = self.index.look(key, number)
        except lmdb.Error as error:
            self.trouble(error)
            return 0
        return here.mask if here is not None else 0

    def lacks(self, victim: Victim) -> bool:
        """Whether the extent has chunks that are not here. Blocks."""
        return bool(victim.record.mask & ~self.mask(victim.key, victim.number))

    def _write(self, leaving: Leaving) -> int:
        """Write the extent's chunks to their file; returns the file's inode number."""
        victim, data, file_bytes = leaving
        fd = self.open(victim.key, file_bytes)
        try:
            for chunk in range(CHUNKS):
                if victim.record.mask >> chunk & 1:
                    start = chunk * CHUNK_BYTES
                    piece = data[start : start + CHUNK_BYTES]
                    if os.pwrite(fd, piece, victim.number * EXTENT_BYTES + start) != len(piece):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)

    # -- use and eviction --------------------------------------------------------------------------

    def touch(self, key: bytes, number: int) -> None:
        """The extent was used; the index learns of it in a while."""
        if len(self._touched) < 65536:
            self._touched.add((key, number))

    def note_touches(self) -> None:
        """Tell the index what was used since the last time."""
        touched, self._touched = list(self._touched), set()
        now_s = int(time.time())
        for start in range(0, len(touched), TOUCHES_AT_ONCE):
            with self.index.change() as txn:
                for key, number in touched[start : start + TOUCHES_AT_ONCE]:
                    txn.touch(key, number, now_s)

    def evict(self, demote: Demote | None = None, *, at_least: int = 0) -> bool:
        """Bring the tier below its low water; `demote` is given what leaves. False: there was nothing to evict."""
        with self._evicting:
            return self._evict(demote, at_least)

    def _evict(self, demote: Demote | None, at_least: int) -> bool:
        evicted = passed_over = 0
        while (over := self.pressure() - LOW_WATER) > 0 or evicted < at_least:
            # No more than there must be: a small tier would be empty after it.
            most = max(at_least - evicted, 1 + int(over * self.capacity_bytes / EXTENT_BYTES))
            with self.index.change() as txn:
                victims = txn.victims(min(VICTIMS_AT_ONCE, most), int(time.time()) - STALE_RESERVATION_S)
            if not victims:
                passed_over += MOST_LOOKED_AT
                if passed_over > (MAX_USES + 2) * self.index.totals()[1]:
                    break  # all of it is being filled
                continue
            passed_over = 0
            if demote is not None:
                for victim in victims:
                    demote(victim, self.take_out)
            self._remove(victims)
            evicted += len(victims)
            # The space of a tier in memory comes back only with the next punch.
            self.punch_due()
        self.counters.evictions += evicted
        return evicted > 0

    def take_out(self, victim: Victim) -> Leaving | None:
        """The victim's bytes, if they are still what their sums say."""
        try:
            fd = os.open(self.path(victim.key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            data = memoryview(bytearray(EXTENT_BYTES))
            n = os.preadv(fd, [data], victim.number * EXTENT_BYTES)
            file_bytes = os.fstat(fd).st_size
        finally:
            os.close(fd)
        for chunk in range(CHUNKS):
            piece = data[chunk * CHUNK_BYTES : min((chunk + 1) * CHUNK_BYTES, n)]
            if victim.record.mask >> chunk & 1 and checksum(piece) != victim.record.sum_of(chunk):
                return None
        return Leaving(victim, data[:n], file_bytes)

    def _remove(self, victims: Sequence[Victim]) -> None:
        with self.index.change() as txn:
            for victim in victims:
                txn.evict(victim)
        at = self.index.last_change()
        self._to_punch.extend((at, v.key, v.number) for v in victims)
        self._unlink_empty({v.key for v in victims})
        if not self.in_memory:
            self._punch(len(self._to_punch))

    def _unlink_empty(self, keys: Iterable[bytes]) -> None:
        """Remove the files of which the index has no extent."""
        with self.index.change() as txn:
            for key in keys:
                if not txn.numbers(key):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self.path(key))

    def punch_due(self) -> None:
        """Free the memory of evicted extents at which nobody looks any more."""
        with self._evicting:
            if self._to_punch:
                oldest = self.index.oldest_reader()
                self._punch(sum(1 for at, _, _ in self._to_punch if at <= oldest))

    def _punch(self, count: int) -> None:
        with self.index.change() as txn:
            for _ in range(count):
                _, key, number = self._to_punch.popleft()
                if txn.has(key, number):
                    continue  # somebody fills it again
                try:
                    fd = os.open(self.path(key), os.O_WRONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
                _libc.fallocate(fd, mode, number * EXTENT_BYTES, EXTENT_BYTES)
                os.close(fd)

    # -- a failing disk ----------------------------------------------------------------------------

    def trouble(self, error: Exception) -> None:
        """A full disk needs room, any other trouble means that it fails. Blocks.

        The index itself cannot change on a full disk, so files go first; should their records have to
        stay, then they lead nowhere, which is a miss.
        """
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and not isinstance(error, lmdb.DiskError):
            self.fail(error)
            return
        freed_bytes, gone = 0, []
        for path in (self.directory / self.index.data).glob("*/*"):
            with contextlib.suppress(OSError):
                freed_bytes += path.stat().st_blocks * 512
                path.unlink()
                gone.append(bytes.fromhex(path.parent.name + path.name))
            if freed_bytes >= VICTIMS_AT_ONCE * EXTENT_BYTES:
                break
        if freed_bytes:
            log.info("%s cache: %s is full, %d bytes freed", self.name, self.directory, freed_bytes)
            with contextlib.suppress(lmdb.Error):
                for key in gone:
                    self.drop_file(key)
        else:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Take the tier out."""
        if self.failed_at is None:
            log.error("%s cache: %s is taken out: %s", self.name, self.directory, error)
        self.failed_at = time.monotonic()
        self._damaged = self._damaged or isinstance(error, DAMAGE)

    def probe(self) -> None:
        """Take a failed tier back if its disk works again. Blocks."""
        if self.failed_at is None or time.monotonic() - self.failed_at < PROBE_S or self._reading:
            return
        path = self.directory / "probe"
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(b"x" * 4096)
            fd = os.open(path, os.O_RDWR)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            path.unlink()
            # What the old one has mapped may be gone: the disk may have been mounted again, or replaced.
            self.close()
            if self._damaged:
                put_aside(self.directory, "index is damaged")
                self._damaged = False
            self._open(TRY_S, keep_capacity=False)
        except (OSError, lmdb.Error, Unusable) as error:
            log.debug("%s cache: still out: %s", self.name, error)
            self.failed_at = time.monotonic()
            return
        self.failed_at = None
        log.warning("%s cache: %s is taken back", self.name, self.directory)
