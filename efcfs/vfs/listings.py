"""Whole directories, in the LMDB environment of the identities.

Those that were read to their end, of one version each: a daemon that starts later, or a kernel that forgot them, need
not read them again. This module knows LMDB keys and no policy: freshness is `attributes.py`'s.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import lmdb

from efcfs.nfs import nfs3
from efcfs.nfs.nfs3 import DirEntryPlus
from efcfs.vfs.environment import Environment

T = TypeVar("T")

_KEY = struct.Struct(">Q")
# A directory: number of its listing, size, mtime and ctime as `attributes.version` has them, seen at (monotonic s).
_DIRECTORY = struct.Struct(">QQqqd")
# A name in it: place, cookie, fileid, length of fh, attributes known.
_NAME = struct.Struct(">IQQBB")
_PLACE = struct.Struct(">QI")


class NoRoom(Exception):
    """A listing cannot be kept."""


class Directory(NamedTuple):
    """A directory that was listed to its end: its version then, and when that was (monotonic seconds)."""

    number: int
    version: tuple[int, int, int]
    seen_at: float


class Listings:
    """All that are kept."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._directories = env.database(b"directory")
        self._names = env.database(b"entry")
        self._order = env.database(b"order")

    def begin(self) -> int:
        """The number of a new listing; it counts only when it is complete. Raises NoRoom, as the others do."""

        def write(txn: lmdb.Transaction) -> int:
            number = _KEY.unpack(txn.get(b"next", db=self._directories) or bytes(8))[0] + 1
            txn.put(b"next", _KEY.pack(number), db=self._directories)
            return int(number)

        return self._change(write)

    def add(self, number: int, place: int, entries: Sequence[DirEntryPlus]) -> None:
        """Names of the listing, the first at `place`; 3 µs each."""

        def write(txn: lmdb.Transaction) -> None:
            for i, e in enumerate(entries, place):
                known = e.fh is not None and e.attr is not None
                head = _NAME.pack(i, e.cookie, e.fileid, len(e.fh) if known and e.fh is not None else 0, known)
                tail = e.fh + nfs3.pack_fattr(e.attr) if e.fh is not None and e.attr is not None else b""
                txn.put(_KEY.pack(number) + e.name, head + tail, db=self._names)
                txn.put(_PLACE.pack(number, i), e.name, db=self._order)

        self._change(write)

    def complete(self, fh: bytes, number: int, version: tuple[int, int, int], seen_at: float) -> int | None:
        """The listing is whole, and of this version. Returns the number of the one that it replaces."""
        old = self.directory(fh)
        record = _DIRECTORY.pack(number, *version, seen_at)
        self._change(lambda txn: txn.put(b"d" + fh, record, db=self._directories))
        return old.number if old is not None else None

    def forget(self, fh: bytes) -> int | None:
        """The listing of this directory counts no more. Returns its number, if there was one."""
        old = self.directory(fh)
        if old is None:
            return None
        self._change(lambda txn: txn.delete(b"d" + fh, db=self._directories))
        return old.number

    def directory(self, fh: bytes) -> Directory | None:
        found = self._env.get(b"d" + fh, self._directories)
        if found is None:
            return None
        number, size, mtime_ns, ctime_ns, seen_at = _DIRECTORY.unpack(found)
        return Directory(number, (size, mtime_ns, ctime_ns), seen_at)

    def blur(self, number: int, name: bytes) -> None:
        """Of this name only that it is there holds still."""
        key = _KEY.pack(number) + name

        def write(txn: lmdb.Transaction) -> None:
            found = txn.get(key, db=self._names)
            if found is not None:
                place, cookie, fileid, _, _ = _NAME.unpack_from(found)
                txn.put(key, _NAME.pack(place, cookie, fileid, 0, False), db=self._names)

        self._change(write)

    def find(self, number: int, name: bytes) -> DirEntryPlus | None:
        found = self._env.get(_KEY.pack(number) + name, self._names)
        return _entry(name, found) if found is not None else None

    def place(self, number: int, name: bytes) -> int | None:
        """Where in the listing the name is."""
        found = self._env.get(_KEY.pack(number) + name, self._names)
        return int(_NAME.unpack_from(found)[0]) if found is not None else None

    def count(self, number: int) -> int:
        """How many names the listing has."""
        with self._env.read() as txn, txn.cursor(db=self._order) as order:
            there = order.prev() if order.set_range(_KEY.pack(number + 1)) else order.last()
            last = bytes(order.key()) if there else b""
        return _PLACE.unpack(last)[1] + 1 if last[:8] == _KEY.pack(number) else 0

    def after(self, number: int, name: bytes | None, most: int) -> list[DirEntryPlus]:
        """Up to `most` entries that follow `name` (None: from the first)."""
        place = self.place(number, name) if name is not None else -1
        return self.at(number, place + 1, most) if place is not None else []

    def at(self, number: int, place: int, most: int) -> list[DirEntryPlus]:
        """Up to `most` entries from a place on; none when that one is gone, for then the listing is being dropped."""
        entries: list[DirEntryPlus] = []
        with self._env.read() as txn, txn.cursor(db=self._order) as order:
            more = order.set_key(_PLACE.pack(number, place))
            while more and len(entries) < most and bytes(order.key()[:8]) == _KEY.pack(number):
                name = bytes(order.value())
                found = txn.get(_KEY.pack(number) + name, db=self._names)
                if found is not None:
                    entries.append(_entry(name, found))
                more = order.next()
        return entries

    def drop(self, number: int, most: int = 256) -> bool:
        """Remove names of a listing that was replaced or not completed; False when none is left."""

        def write(txn: lmdb.Transaction) -> bool:
            with txn.cursor(db=self._order) as order:
                for _ in range(most):
                    if not order.set_range(_PLACE.pack(number, 0)) or bytes(order.key()[:8]) != _KEY.pack(number):
                        return False
                    txn.delete(_KEY.pack(number) + bytes(order.value()), db=self._names)
                    order.delete()
            return True

        return self._change(write)

    def _change(self, write: Callable[[lmdb.Transaction], T]) -> T:
        try:
            return self._env.change(write)
        except lmdb.Error as error:
            raise NoRoom(str(error)) from None


def _entry(name: bytes, record: bytes | memoryview) -> DirEntryPlus:
    _, cookie, fileid, fh_bytes, known = _NAME.unpack_from(record)
    if not known:
        return DirEntryPlus(fileid, name, cookie, None, None)
    fh_end = _NAME.size + fh_bytes
    attr = nfs3.unpack_fattr(record, fh_end)
    return DirEntryPlus(fileid, name, cookie, attr, bytes(record[_NAME.size : fh_end]))
