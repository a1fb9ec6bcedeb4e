"""Which extents of which files a tier holds: LMDB, the only map there is.

An extent is 1 MiB of one version of one file; its record says which of its 16 chunks are there, with a
checksum each. Extents wait for eviction in two queues (S3-FIFO, SOSP 2023): new ones in `small`, those that
were used again in `main`, so one pass over a huge file pushes out only what is as new as itself. `ghosts`
remembers what left `small` lately: who comes back from there goes to `main` at once.

All processes that share a tier share its index. A write transaction is a lock between them, which
`tier.py` uses for the files too. This module knows LMDB keys and no files. The methods that change something
belong to one transaction (`with index.change() as txn`); reading goes through `mask` and `look`.
"""

import contextlib
import os
import re
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import lmdb

CHUNK_BYTES = 64 * 1024
EXTENT_BYTES = 1024 * 1024
CHUNKS = EXTENT_BYTES // CHUNK_BYTES
FULL_MASK = (1 << CHUNKS) - 1
SUM_BYTES = 8

FORMAT = b"efcfs cache 3, chunks of %d, extents of %d" % (CHUNK_BYTES, EXTENT_BYTES)
# Sparse: room for some 40 million extents, of which only what is used takes space.
MAP_BYTES = 8 * 1024**3
# Uses within so short a time are one use: the kernel reads an extent in several requests.
ONE_USE_S = 2
MAX_USES = 3
# In one transaction, for victims: some 5 ms.
MOST_LOOKED_AT = 512
SMALL_SHARE = 0.1

_HEAD = struct.Struct(">HBBQI")  # mask, uses, queue, place in the queue, used at (unix time, s)
_MASK = struct.Struct(">H")
_NO_SUMS = bytes(CHUNKS * SUM_BYTES)
RECORD_BYTES = _HEAD.size + len(_NO_SUMS)
# Bytes in small and in main, the place last given.
_TOTALS = struct.Struct(">QQQ")
_U64 = struct.Struct(">Q")
_NUMBER = struct.Struct(">I")
KEY_BYTES = 16
SMALL, MAIN = 0, 1


class Unusable(Exception):
    """The index cannot be used; str() says why."""


class Record(NamedTuple):
    """One extent. mask 0: somebody is filling it."""

    mask: int
    uses: int
    queue: int
    place: int
    used_at_s: int
    sums: bytes

    def sum_of(self, chunk: int) -> bytes:
        return self.sums[chunk * SUM_BYTES : (chunk + 1) * SUM_BYTES]


class Victim(NamedTuple):
    """An extent that may be evicted as long as its record is still this one."""

    key: bytes
    number: int
    record: Record


@contextlib.contextmanager
def _no_nonsense() -> Iterator[None]:
    """What no record can say is damage like that which LMDB finds itself: bits flip in records as well."""
    try:
        yield
    except struct.error as error:
        raise lmdb.CorruptedError(f"a record of the index is damaged ({error})") from None


def extent_key(key: bytes, number: int) -> bytes:
    return key + _NUMBER.pack(number)


class Change:
    """A write transaction, and what may be done in it. It is undone when an exception leaves its context."""

    __slots__ = ("_index", "_next_place", "_txn", "main_bytes", "small_bytes")

    def __init__(self, index: "Index") -> None:
        self._index = index

    def __enter__(self) -> "Change":
        self._txn = self._index.env.begin(write=True)
        try:
            self.small_bytes, self.main_bytes, self._next_place = self._index.counts(self._txn)
        except lmdb.Error:
            self._txn.abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _no_nonsense():
            try:
                if error is not None:
                    raise error
                totals = _TOTALS.pack(self.small_bytes, self.main_bytes, self._next_place)
                self._txn.put(b"totals", totals, db=self._index.meta)
                self._txn.commit()
            except BaseException:
                self._txn.abort()
                raise

    def reserve(self, key: bytes, number: int, *, queue: int = SMALL, uses: int = 0) -> None:
        """Announce that the extent is about to be filled; nobody then takes its space away."""
        at = extent_key(key, number)
        if self._txn.get(at, db=self._index.extents) is not None:
            return
        ghost = self._txn.pop(at, db=self._index.ghosts)
        self._enter(at, Record(0, uses, queue if ghost is None else MAIN, 0, int(time.time()), _NO_SUMS))

    def add(self, key: bytes, number: int, chunks: Iterable[tuple[int, bytes]]) -> bool:
        """Chunks (their index in the extent, checksum) are there now. False: the reservation is gone."""
        at = extent_key(key, number)
        old = _record(self._txn.get(at, db=self._index.extents))
        if old is None:
            return False
        mask, sums = old.mask, bytearray(old.sums)
        for chunk, digest in chunks:
            mask |= 1 << chunk
            sums[chunk * SUM_BYTES : (chunk + 1) * SUM_BYTES] = digest
        self._count(old.queue, (mask.bit_count() - old.mask.bit_count()) * CHUNK_BYTES)
        self._put(at, old._replace(mask=mask, sums=bytes(sums), used_at_s=int(time.time())))
        return True

    def drop_chunk(self, key: bytes, number: int, chunk: int) -> None:
        """The chunk's bytes are not what they were."""
        at = extent_key(key, number)
        old = _record(self._txn.get(at, db=self._index.extents))
        if old is not None and old.mask & 1 << chunk:
            self._count(old.queue, -CHUNK_BYTES)
            self._put(at, old._replace(mask=old.mask & ~(1 << chunk)))

    def touch(self, key: bytes, number: int, used_at_s: int) -> None:
        """The extent was read."""
        at = extent_key(key, number)
        old = _record(self._txn.get(at, db=self._index.extents))
        if old is not None and used_at_s - old.used_at_s >= ONE_USE_S:
            self._put(at, old._replace(uses=min(MAX_USES, old.uses + 1), used_at_s=used_at_s))

    def promote(self, key: bytes, number: int) -> None:
        """The extent is wanted, though nobody has read it yet: more than any that was read before."""
        at = extent_key(key, number)
        old = _record(self._txn.get(at, db=self._index.extents))
        if old is not None:
            self._enter(at, self._leave(at, old)._replace(queue=MAIN, uses=MAX_USES))

    def remove(self, key: bytes, number: int) -> Record | None:
        at = extent_key(key, number)
        old = _record(self._txn.pop(at, db=self._index.extents))
        if old is not None:
            self._txn.delete(_U64.pack(old.place), db=self._index.queues[old.queue])
            self._count(old.queue, -old.mask.bit_count() * CHUNK_BYTES)
        return old

    def remove_file(self, key: bytes) -> None:
        for number in self.numbers(key):
            self.remove(key, number)

    def numbers(self, key: bytes) -> list[int]:
        """The file's extents."""
        found = []
        with self._txn.cursor(db=self._index.extents) as cursor:
            more = cursor.set_range(key)
            while more and cursor.key()[:KEY_BYTES] == key:
                found.append(_NUMBER.unpack(cursor.key()[KEY_BYTES:])[0])
                more = cursor.next()
        return found

    def victims(self, most: int, stale_before_s: int) -> list[Victim]:
        """Choose extents to evict. They go to the end of their queues, should the caller change its mind.

        Reservations are spared unless they are older than `stale_before_s`: then who made them is dead. None found:
        the next MOST_LOOKED_AT may have some, for an extent that was used is passed over up to MAX_USES + 1 times.
        """
        found: dict[bytes, Victim] = {}
        for _ in range(MOST_LOOKED_AT):
            small = self.small_bytes > SMALL_SHARE * (self.small_bytes + self.main_bytes)
            head = self._head(SMALL if small else MAIN) or self._head(MAIN if small else SMALL)
            if head is None or head[0] in found or len(found) == most:
                break
            at, record = head
            if record.mask == 0 and record.used_at_s > stale_before_s:
                self._enter(at, self._leave(at, record))
            elif record.uses and record.queue == SMALL:
                self._enter(at, self._leave(at, record)._replace(queue=MAIN, uses=0))
            elif record.uses:
                self._enter(at, self._leave(at, record)._replace(uses=record.uses - 1))
            else:
                kept = self._enter(at, self._leave(at, record))
                found[at] = Victim(at[:KEY_BYTES], _NUMBER.unpack(at[KEY_BYTES:])[0], kept)
        return list(found.values())

    def has(self, key: bytes, number: int) -> bool:
        return self._txn.get(extent_key(key, number), db=self._index.extents) is not None

    def evict(self, victim: Victim) -> None:
        """Remove the victim, unless it was used or changed since it was chosen."""
        at = extent_key(victim.key, victim.number)
        if self._txn.get(at, db=self._index.extents) != _packed(victim.record):
            return
        self.remove(victim.key, victim.number)
        if victim.record.queue == SMALL and victim.record.mask:
            self._remember(at)

    def set_version(self, identity: bytes, key: bytes) -> None:
        """`key` is the present version of the file."""
        self._txn.put(identity, key, db=self._index.files)

    def forget_all(self) -> None:
        for db in (self._index.extents, self._index.files, self._index.ghosts, *self._index.queues):
            self._txn.drop(db, delete=False)
        self.small_bytes = self.main_bytes = 0

    def set_capacity(self, capacity_bytes: int) -> None:
        self._txn.put(b"capacity", _U64.pack(capacity_bytes), db=self._index.meta)

    # -- parts -------------------------------------------------------------------------------------

    def _head(self, queue: int) -> tuple[bytes, Record] | None:
        with self._txn.cursor(db=self._index.queues[queue]) as cursor:
            while cursor.first():
                at = bytes(cursor.value())
                record = _record(self._txn.get(at, db=self._index.extents))
                if record is not None and _U64.pack(record.place) == cursor.key():
                    return at, record
                cursor.delete()
        return None

    def _leave(self, at: bytes, record: Record) -> Record:
        self._txn.delete(_U64.pack(record.place), db=self._index.queues[record.queue])
        self._count(record.queue, -record.mask.bit_count() * CHUNK_BYTES)
        return record

    def _enter(self, at: bytes, record: Record) -> Record:
        self._next_place += 1
        record = record._replace(place=self._next_place)
        self._txn.put(_U64.pack(self._next_place), at, db=self._index.queues[record.queue])
        self._count(record.queue, record.mask.bit_count() * CHUNK_BYTES)
        self._put(at, record)
        return record

    def _put(self, at: bytes, record: Record) -> None:
        self._txn.put(at, _packed(record), db=self._index.extents)

    def _count(self, queue: int, more_bytes: int) -> None:
        if queue == SMALL:
            self.small_bytes = max(0, self.small_bytes + more_bytes)
        else:
            self.main_bytes = max(0, self.main_bytes + more_bytes)

    def _remember(self, at: bytes) -> None:
        """As many ghosts as there are extents, the oldest forgotten first (roughly: they lie in key order)."""
        self._txn.put(at, b"", db=self._index.ghosts)
        most = max(1024, self._txn.stat(self._index.extents)["entries"])
        if self._txn.stat(self._index.ghosts)["entries"] > most:
            with self._txn.cursor(db=self._index.ghosts) as cursor:
                if cursor.set_range(os.urandom(KEY_BYTES)) or cursor.first():
                    cursor.delete()


class Index:
    """An open index. `mask` belongs to one thread (the event loop's); `change` and `look` to any."""

    def __init__(self, directory: Path, *, durable: bool) -> None:
        """Open or make it. durable: it must survive a crash of the machine in one piece. Raises Unusable, OSError."""
        path = directory / "index.lmdb"
        path.mkdir(mode=0o700, exist_ok=True)
        self._file = path / "data.mdb"
        try:
            self.env = lmdb.open(
                str(path), map_size=MAP_BYTES, max_dbs=8, mode=0o600, max_readers=1024,
                sync=durable, metasync=False,
            )  # fmt: skip  # no writemap: on a full file system it ends in SIGBUS instead of an error
            status = os.stat(self._file)
            self._identity = (status.st_dev, status.st_ino)
            info = self.env.info()
            if (info["last_pgno"] + 1) * self.env.stat()["psize"] > os.path.getsize(path / "data.mdb"):
                raise Unusable("index is truncated")
            self.meta = self.env.open_db(b"meta")
            self.extents = self.env.open_db(b"extents")
            self.files = self.env.open_db(b"files")
            self.queues = (self.env.open_db(b"small"), self.env.open_db(b"main"))
            self.ghosts = self.env.open_db(b"ghosts")
            with self.env.begin(write=True, db=self.meta) as txn:
                found = txn.get(b"format")
                if found is None:
                    txn.put(b"format", FORMAT)
                    # Its own: one that was deleted while it is in use must not share files with the next one.
                    txn.put(b"data", b"data-" + os.urandom(4).hex().encode())
                elif found != FORMAT:
                    raise Unusable(f"index is of another kind ({found.decode(errors='replace')})")
                # The directory of the files that it tells of.
                self.data = txn.get(b"data", b"data").decode(errors="replace")
                if not re.fullmatch("data(-[0-9a-f]{8})?", self.data):
                    raise Unusable("index is damaged (where its files are is not to be read)")
            self.env.reader_check()
            self._reading = self.env.begin(db=self.extents)
        except lmdb.Error as error:
            raise Unusable(f"index is damaged ({error})") from None

    def renew(self) -> None:
        """See the index as it is now (0.8 µs). What `mask` then tells stays readable until the next renew or rest."""
        self._reading.abort()
        self._reading = self.env.begin(db=self.extents)

    def rest(self) -> None:
        """Nothing that was read is in use any more."""
        self._reading.abort()

    def mask(self, key: bytes, number: int) -> int:
        """The chunks of the extent that are there, as of the last `renew`; 1 µs."""
        value = self._reading.get(key + _NUMBER.pack(number))
        if value is None:
            return 0
        if len(value) != RECORD_BYTES:
            raise lmdb.CorruptedError("a record of the index is damaged")
        found: int = _MASK.unpack_from(value)[0]
        return found

    def look(self, key: bytes, number: int) -> Record | None:
        """The extent now, for any thread."""
        with self.env.begin(db=self.extents) as txn:
            return _record(txn.get(extent_key(key, number)))

    def has_file(self, key: bytes) -> bool:
        """Whether any bytes of the file are there, reservations do not count; 3 µs."""
        with self.env.begin(db=self.extents) as txn, txn.cursor() as cursor, _no_nonsense():
            more = cursor.set_range(key)
            while more and cursor.key()[:KEY_BYTES] == key:
                if _MASK.unpack_from(cursor.value())[0]:
                    return True
                more = cursor.next()
        return False

    def change(self) -> Change:
        return Change(self)

    def present_version(self, identity: bytes) -> bytes | None:
        """The key of the version of a file that was last set."""
        with self.env.begin(db=self.files) as txn:
            found = txn.get(identity)
        return bytes(found) if found is not None else None

    def counts(self, txn: lmdb.Transaction) -> tuple[int, int, int]:
        """Bytes in small and in main, and the place last given."""
        with _no_nonsense():
            small, main, place = _TOTALS.unpack(txn.get(b"totals", db=self.meta) or bytes(_TOTALS.size))
        return small, main, place

    def totals(self) -> tuple[int, int, int]:
        """Bytes, extents, and the capacity in bytes that was last set (0: never)."""
        with self.env.begin() as txn, _no_nonsense():
            small, main, _ = self.counts(txn)
            capacity = txn.get(b"capacity", db=self.meta)
            items = txn.stat(self.extents)["entries"]
            return small + main, items, _U64.unpack(capacity)[0] if capacity else 0

    def walk(self) -> Iterator[tuple[bytes, int, Record]]:
        """All extents, as of now."""
        with self.env.begin(db=self.extents) as txn, txn.cursor() as cursor:
            for at, value in cursor:
                record = _record(value)
                assert record is not None
                yield at[:KEY_BYTES], _NUMBER.unpack(at[KEY_BYTES:])[0], record

    def try_out(self, most_s: float) -> None:
        """Read all of it, for so long at most, and write: what is damaged fails here, or ends the process."""
        ends = time.monotonic() + most_s
        for db in (self.files, *self.queues, self.ghosts, self.extents):
            with self.env.begin(db=db) as txn, txn.cursor() as cursor:
                for _, value in cursor:
                    if db is self.extents:
                        _record(value)
                    if time.monotonic() > ends:
                        break
        with self.env.begin(write=True, db=self.meta) as txn:
            txn.put(b"tried", _U64.pack(int(time.time())))

    def is_current(self) -> bool:
        """Whether it is still the one in its directory: it may have been deleted, or put aside by another process."""
        try:
            status = os.stat(self._file)
        except FileNotFoundError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def last_change(self) -> int:
        return int(self.env.info()["last_txnid"])

    def oldest_reader(self) -> int:
        """The oldest state of the index that any process may still be looking at."""
        self.env.reader_check()
        # A table of pid, thread and transaction; "-" where none is open.
        states = [line.split()[2] for line in self.env.readers().splitlines()[1:] if line.strip()]
        return min((int(state) for state in states if state != "-"), default=self.last_change())

    def close(self) -> None:
        self._reading.abort()
        self.env.close()


def _record(value: bytes | memoryview | None) -> Record | None:
    if value is None:
        return None
    if len(value) != RECORD_BYTES:
        raise lmdb.CorruptedError("a record of the index is damaged")
    mask, uses, queue, place, used_at_s = _HEAD.unpack_from(value)
    if queue > MAIN:
        raise lmdb.CorruptedError(f"a record of the index is damaged (queue {queue})")
    return Record(mask, uses, queue, place, used_at_s, bytes(value[_HEAD.size :]))


def _packed(record: Record) -> bytes:
    return _HEAD.pack(*record[:5]) + record.sums
