"""What the mount knows of names, in LMDB: node ids of file handles, and whole directories.

Identities live in LMDB under /dev/shm and are written before the kernel can see them (DESIGN 3.1), so a
daemon that starts over an existing index can serve every node id that the kernel still holds. In memory
there is a bounded set of `Inode` objects, the recently used; the others are read back when asked for.

The node id is the server's fileid where that is free, so st_ino is what other clients see; a fileid that
is taken (two file systems below one export, or a reused fileid whose old file is still known) gets a
number of our own.

`Listings` keeps directories that were read to their end, of one version each: a daemon that starts later, or a
kernel that forgot them, need not read them again. This module knows LMDB keys and no policy: freshness is
`attributes.py`'s.
"""

import contextlib
import errno
import itertools
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import lmdb

from efcfs.nfs import nfs3
from efcfs.nfs.nfs3 import DirEntryPlus, Fattr
from efcfs.vfs.consistency import Mode
from efcfs.vfs.openfile import OpenFile

log = logging.getLogger(__name__)

ROOT_INO = 1
# Some 20,000 identities.
RESERVED_BYTES = 8 * 1024**2
# Sparse in /dev/shm: room for some 20 million identities, no memory until used.
MAP_BYTES = 4 * 1024**3
# 100,000 inodes in memory took 80 MB; reading one back from LMDB takes 2 µs.
MAX_IN_MEMORY = 16_384
OWN_NUMBERS = 1 << 62

# nlookup, parent, generation, attributes fetched at, attribute timeout, length of fh, attributes known, what wrote the
# record, size in the kernel, whether the version of its pages is known, that version
_RECORD = struct.Struct(">QQIddBBQq?Qqq")
_SIZE_UNKNOWN = -1
_FATTR_BYTES = 84
_KEY = struct.Struct(">Q")
# A directory: number of its listing, size, mtime and ctime as `attributes.version` has them, seen at (monotonic s).
_DIRECTORY = struct.Struct(">QQqqd")
# A name in it: place, cookie, fileid, length of fh, attributes known.
_NAME = struct.Struct(">IQQBB")
_PLACE = struct.Struct(">QI")


class Inode:
    """A file that the kernel knows. `parent` and `name` are where it was last looked up or moved to."""

    __slots__ = (
        "attr", "attr_at", "fh", "generation", "ino", "kernel_size_bytes", "mode", "name", "name_doubtful", "nlookup",
        "open_file", "opened_at", "pages_version", "parent", "taught_at", "timeout_s",
    )  # fmt: skip

    def __init__(self, ino: int, fh: bytes, parent: int, name: bytes) -> None:
        self.ino = ino
        self.fh = fh
        self.parent = parent
        self.name = name
        # Tells the files apart that had this node id one after the other.
        self.generation = 0
        self.nlookup = 0
        self.attr: Fattr | None = None
        # Monotonic seconds, the same clock for every daemon since boot.
        self.attr_at = 0.0
        self.timeout_s = 0.0
        # Of which version the kernel's pages are, and what size it believes in; None: not known.
        self.pages_version: tuple[int, int, int] | None = None
        self.kernel_size_bytes: int | None = None
        # Somebody else changed it since its name was looked up; that may have been a rename.
        self.name_doubtful = False
        # When the kernel was last made to look it up again (monotonic seconds).
        self.taught_at = 0.0
        self.open_file: OpenFile | None = None
        # When it was last opened (monotonic seconds).
        self.opened_at = float("-inf")
        # By which rule it is kept consistent, where rules go by path; None: not looked up since it got its name.
        self.mode: Mode | None = None


class Found(NamedTuple):
    """A name that the server has just told us about."""

    parent: int
    name: bytes
    fh: bytes
    attr: Fattr


class Inodes:
    """All identities of one mount."""

    def __init__(self, directory: Path, root_fh: bytes) -> None:
        # LMDB would make its directory with the mode of its files, which only root can enter.
        path = directory / "inodes.lmdb"
        path.mkdir(mode=0o700, exist_ok=True)
        self._env = lmdb.open(
            str(path), map_size=MAP_BYTES, max_dbs=7, sync=False, metasync=False, mode=0o600,
        )  # fmt: skip  # no writemap: when /dev/shm is full it ends in SIGBUS instead of an error
        _reserve(path / "data.mdb")
        self._by_ino = self._env.open_db(b"ino")
        self._by_fh = self._env.open_db(b"fh")
        self._by_name = self._env.open_db(b"name")
        self._hidden = self._env.open_db(b"hidden")
        self.listings = Listings(self._env)
        # Tells what this daemon wrote from what is older than what the kernel was told since.
        self._writer = int.from_bytes(os.urandom(8), "big")
        self._inodes: dict[int, Inode] = {}
        with self._env.begin(db=self._by_ino) as txn:
            cursor = txn.cursor()
            last = _KEY.unpack(cursor.key())[0] if cursor.last() else 0
        self._next_own = max(OWN_NUMBERS, last + 1)
        root = self._load(ROOT_INO) or Inode(ROOT_INO, root_fh, ROOT_INO, b"")
        root.fh = root_fh
        root.nlookup = 1
        self._inodes[ROOT_INO] = root
        with self._env.begin(write=True) as txn:
            self._put(txn, root)
            txn.put(root_fh, _KEY.pack(ROOT_INO), db=self._by_fh)

    def close(self) -> None:
        self._env.close()

    def get(self, ino: int, txn: lmdb.Transaction | None = None) -> Inode:
        """The inode of a node id that the kernel uses. Raises KeyError when it was never shown or is gone."""
        inode = self._inodes.get(ino)
        if inode is None:
            inode = self._load(ino)
            if inode is None:
                raise KeyError(ino)
            self._remember(inode, txn)
        return inode

    def enter(self, found: Iterable[Found]) -> list[Inode]:
        """The inodes of these names, each with one lookup more, and safely in the index. Raises OSError (ENOSPC)."""
        try:
            return self._enter(found)
        except lmdb.Error:  # half a write, when the last page was free, is not DiskError to LMDB
            raise OSError(errno.ENOSPC, "no room for identities: /dev/shm is full") from None

    def _enter(self, found: Iterable[Found]) -> list[Inode]:
        inodes = []
        with self._env.begin(write=True) as txn:
            for parent, name, fh, attr in found:
                known = txn.get(fh, db=self._by_fh)
                if known is not None:
                    inode = self.get(_KEY.unpack(known)[0], txn)
                    if inode.ino != ROOT_INO:
                        inode.parent, inode.name = parent, name
                else:
                    inode = self._new(txn, fh, parent, name, attr.fileid, attr.fsid)
                    txn.put(fh, _KEY.pack(inode.ino), db=self._by_fh)
                    self._remember(inode, txn)
                inode.nlookup += 1
                self._put(txn, inode, attr)
                txn.put(_KEY.pack(parent) + name, _KEY.pack(inode.ino), db=self._by_name)
                inodes.append(inode)
        return inodes

    def at(self, parent: int, name: bytes) -> Inode | None:
        """The inode that the kernel last saw at this name."""
        with self._env.begin(db=self._by_name) as txn:
            known = txn.get(_KEY.pack(parent) + name)
        try:
            return self.get(_KEY.unpack(known)[0]) if known is not None else None
        except KeyError:
            return None

    def path(self, inode: Inode) -> bytes:
        """Where the inode was last seen, from the mount point on."""
        names: list[bytes] = []
        while inode.ino != ROOT_INO:
            names.append(inode.name)
            try:
                inode = self.get(inode.parent)
            except KeyError:
                break  # its directory was forgotten: as far as is known
        return b"/" + b"/".join(reversed(names))

    def moved(self, parent: int, name: bytes, new_parent: int, new_name: bytes) -> None:
        """The name is another one now: renamed, or hidden until last close."""
        inode = self.at(parent, name)
        if inode is None:
            return
        inode.parent, inode.name, inode.mode = new_parent, new_name, None
        with self._done_already() as txn:
            txn.delete(_KEY.pack(parent) + name, db=self._by_name)
            txn.put(_KEY.pack(new_parent) + new_name, _KEY.pack(inode.ino), db=self._by_name)
            self._put(txn, inode)

    def hidden(self, ino: int, parent: int, name: bytes) -> None:
        """The file gets this name until its last close. Raises OSError (ENOSPC)."""
        try:
            with self._env.begin(write=True, db=self._hidden) as txn:
                txn.put(_KEY.pack(ino), _KEY.pack(parent) + name)
        except lmdb.Error:
            raise OSError(errno.ENOSPC, "no room for a hidden name: /dev/shm is full") from None

    def unhidden(self, ino: int) -> None:
        with self._done_already() as txn:
            txn.delete(_KEY.pack(ino), db=self._hidden)

    def hidden_name(self, ino: int) -> tuple[int, bytes] | None:
        """Directory and name under which the file is hidden."""
        with self._env.begin(db=self._hidden) as txn:
            found = txn.get(_KEY.pack(ino))
        return (_KEY.unpack_from(found)[0], bytes(found[_KEY.size :])) if found is not None else None

    def all_hidden(self) -> list[int]:
        """The files that are hidden."""
        with self._env.begin(db=self._hidden) as txn, txn.cursor() as cursor:
            return [int(_KEY.unpack(key)[0]) for key in cursor.iternext(values=False)]

    def removed(self, parent: int, name: bytes) -> None:
        """The name is gone; its file may live on under other names or handles."""
        with self._done_already() as txn:
            txn.delete(_KEY.pack(parent) + name, db=self._by_name)

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """The kernel dropped so many lookups of each node id; at none left the identity goes."""
        with self._done_already() as txn:
            for ino, nlookup in forgotten:
                try:
                    inode = self.get(ino, txn)
                except KeyError:
                    continue  # a name of a listing that had no file handle was never entered
                inode.nlookup -= nlookup
                if inode.nlookup > 0 or ino == ROOT_INO:
                    self._put(txn, inode)
                    continue
                txn.delete(_KEY.pack(ino), db=self._by_ino)
                if txn.get(inode.fh, db=self._by_fh) == _KEY.pack(ino):
                    txn.delete(inode.fh, db=self._by_fh)
                name_key = _KEY.pack(inode.parent) + inode.name
                if txn.get(name_key, db=self._by_name) == _KEY.pack(ino):
                    txn.delete(name_key, db=self._by_name)
                if inode.open_file is None:
                    self._inodes.pop(ino, None)

    def __len__(self) -> int:
        with self._env.begin() as txn:
            return int(txn.stat(self._by_ino)["entries"])

    @contextlib.contextmanager
    def _done_already(self) -> Iterator[lmdb.Transaction]:
        """A transaction that notes what is done already: without room for it the index keeps old names."""
        try:
            with self._env.begin(write=True) as txn:
                yield txn
        except lmdb.Error as error:
            log.warning("identities are not brought up to date: %s", error)

    def _new(self, txn: lmdb.Transaction, fh: bytes, parent: int, name: bytes, fileid: int, fsid: int) -> Inode:
        if not ROOT_INO < fileid < OWN_NUMBERS:
            return Inode(self._own_number(), fh, parent, name)
        try:
            old = self.get(fileid, txn)
        except KeyError:
            return Inode(fileid, fh, parent, name)
        if old.open_file is not None or old.attr is None or old.attr.fsid != fsid:
            return Inode(self._own_number(), fh, parent, name)
        # The server gave a removed file's number to a new file. The generation tells the kernel; the
        # lookups that it counted for the old one will still be forgotten under this number.
        inode = Inode(fileid, fh, parent, name)
        inode.generation = old.generation + 1
        inode.nlookup = old.nlookup
        txn.delete(old.fh, db=self._by_fh)
        return inode

    def _own_number(self) -> int:
        self._next_own += 1
        return self._next_own

    def _remember(self, inode: Inode, txn: lmdb.Transaction | None) -> None:
        if len(self._inodes) >= MAX_IN_MEMORY:
            # The oldest eighth goes at once: a walk over them for every new one would be quadratic.
            oldest = list(itertools.islice(self._inodes.values(), MAX_IN_MEMORY // 8))
            with contextlib.ExitStack() as stack:
                if txn is None:
                    txn = stack.enter_context(self._env.begin(write=True))
                for old in oldest:
                    del self._inodes[old.ino]
                    if old.open_file is not None or old.ino == ROOT_INO:
                        self._inodes[old.ino] = old
                    elif old.nlookup > 0:
                        self._put(txn, old)
        self._inodes[inode.ino] = inode

    def note(self, inode: Inode) -> None:
        """Write down what is known of it, for a daemon that starts while the server is away."""
        with self._done_already() as txn:
            self._put(txn, inode)

    def _put(self, txn: lmdb.Transaction, inode: Inode, newer: Fattr | None = None) -> None:
        """`newer`: attributes that came just now, and that the inode will take over."""
        attr = newer if newer is not None else inode.attr
        size = inode.kernel_size_bytes if inode.kernel_size_bytes is not None else _SIZE_UNKNOWN
        head = _RECORD.pack(
            inode.nlookup, inode.parent, inode.generation, inode.attr_at, inode.timeout_s, len(inode.fh),
            attr is not None,
            self._writer, size, inode.pages_version is not None, *(inode.pages_version or (0, 0, 0)),
        )  # fmt: skip
        packed = nfs3.pack_fattr(attr) if attr is not None else b""
        txn.put(_KEY.pack(inode.ino), head + inode.fh + packed + inode.name, db=self._by_ino)

    def _load(self, ino: int) -> Inode | None:
        with self._env.begin(db=self._by_ino) as txn:
            record = txn.get(_KEY.pack(ino))
        if record is None:
            return None
        nlookup, parent, generation, attr_at, timeout_s, fh_bytes, known, writer, size, has_pages, *pages = (
            _RECORD.unpack_from(record)
        )
        fh_end = _RECORD.size + fh_bytes
        name_at = fh_end + (_FATTR_BYTES if known else 0)
        inode = Inode(ino, record[_RECORD.size : fh_end], parent, record[name_at:])
        inode.nlookup = nlookup
        inode.generation = generation
        if writer == self._writer and size != _SIZE_UNKNOWN:
            inode.kernel_size_bytes = size
        if has_pages:
            inode.pages_version = (pages[0], pages[1], pages[2])
        if known:
            inode.attr = nfs3.unpack_fattr(record, fh_end)
            inode.attr_at = attr_at
            # Another daemon may have learned more since it wrote this: they are asked for before they are believed.
            inode.timeout_s = timeout_s if writer == self._writer else 0.0
        return inode


def _reserve(path: Path) -> None:
    """Take the memory of the first identities at once, so that others who fill /dev/shm do not stop lookups."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, RESERVED_BYTES)
    except OSError as error:
        log.warning("no room for identities in /dev/shm: %s", error.strerror)
    finally:
        os.close(fd)


class NoRoom(Exception):
    """A listing cannot be kept."""


class Directory(NamedTuple):
    """A directory that was listed to its end: its version then, and when that was (monotonic seconds)."""

    number: int
    version: tuple[int, int, int]
    seen_at: float


class Listings:
    """Whole directories, in the same environment as the identities."""

    def __init__(self, env: lmdb.Environment) -> None:
        self._env = env
        self._directories = env.open_db(b"directory")
        self._names = env.open_db(b"entry")
        self._order = env.open_db(b"order")

    def begin(self) -> int:
        """The number of a new listing; it counts only when it is complete. Raises NoRoom, as the others do."""
        with _room(), self._env.begin(write=True, db=self._directories) as txn:
            number = _KEY.unpack(txn.get(b"next") or bytes(8))[0] + 1
            txn.put(b"next", _KEY.pack(number))
        return int(number)

    def add(self, number: int, place: int, entries: Iterable[DirEntryPlus]) -> None:
        """Names of the listing, the first at `place`; 3 µs each."""
        with _room(), self._env.begin(write=True) as txn:
            for i, e in enumerate(entries, place):
                known = e.fh is not None and e.attr is not None
                head = _NAME.pack(i, e.cookie, e.fileid, len(e.fh) if known and e.fh is not None else 0, known)
                tail = e.fh + nfs3.pack_fattr(e.attr) if e.fh is not None and e.attr is not None else b""
                txn.put(_KEY.pack(number) + e.name, head + tail, db=self._names)
                txn.put(_PLACE.pack(number, i), e.name, db=self._order)

    def complete(self, fh: bytes, number: int, version: tuple[int, int, int], seen_at: float) -> int | None:
        """The listing is whole, and of this version. Returns the number of the one that it replaces."""
        with _room(), self._env.begin(write=True, db=self._directories) as txn:
            old = txn.get(b"d" + fh)
            txn.put(b"d" + fh, _DIRECTORY.pack(number, *version, seen_at))
        return _DIRECTORY.unpack(old)[0] if old is not None else None

    def forget(self, fh: bytes) -> int | None:
        """The listing of this directory counts no more. Returns its number, if there was one."""
        if self.directory(fh) is None:
            return None
        with _room(), self._env.begin(write=True, db=self._directories) as txn:
            old = txn.pop(b"d" + fh)
        return int(_DIRECTORY.unpack(old)[0]) if old is not None else None

    def directory(self, fh: bytes) -> Directory | None:
        with self._env.begin(db=self._directories) as txn:
            found = txn.get(b"d" + fh)
        if found is None:
            return None
        number, size, mtime_ns, ctime_ns, seen_at = _DIRECTORY.unpack(found)
        return Directory(number, (size, mtime_ns, ctime_ns), seen_at)

    def blur(self, number: int, name: bytes) -> None:
        """Of this name only that it is there holds still."""
        with _room(), self._env.begin(write=True, db=self._names) as txn:
            found = txn.get(_KEY.pack(number) + name)
            if found is not None:
                place, cookie, fileid, _, _ = _NAME.unpack_from(found)
                txn.put(_KEY.pack(number) + name, _NAME.pack(place, cookie, fileid, 0, False))

    def find(self, number: int, name: bytes) -> DirEntryPlus | None:
        with self._env.begin(db=self._names) as txn:
            found = txn.get(_KEY.pack(number) + name)
        return _entry(name, found) if found is not None else None

    def place(self, number: int, name: bytes) -> int | None:
        """Where in the listing the name is."""
        with self._env.begin(db=self._names) as txn:
            found = txn.get(_KEY.pack(number) + name)
        return int(_NAME.unpack_from(found)[0]) if found is not None else None

    def count(self, number: int) -> int:
        """How many names the listing has."""
        with self._env.begin() as txn, txn.cursor(db=self._order) as order:
            there = order.prev() if order.set_range(_KEY.pack(number + 1)) else order.last()
            last = bytes(order.key()) if there else b""
        return _PLACE.unpack(last)[1] + 1 if last[:8] == _KEY.pack(number) else 0

    def after(self, number: int, name: bytes | None, most: int) -> list[DirEntryPlus]:
        """Up to `most` entries that follow `name` (None: from the first)."""
        place = self.place(number, name) if name is not None else -1
        return self.at(number, place + 1, most) if place is not None else []

    def at(self, number: int, place: int, most: int) -> list[DirEntryPlus]:
        """Up to `most` entries from a place on."""
        entries: list[DirEntryPlus] = []
        with self._env.begin() as txn, txn.cursor(db=self._order) as order:
            more = order.set_range(_PLACE.pack(number, place))
            while more and len(entries) < most and bytes(order.key()[:8]) == _KEY.pack(number):
                name = bytes(order.value())
                found = txn.get(_KEY.pack(number) + name, db=self._names)
                if found is not None:
                    entries.append(_entry(name, found))
                more = order.next()
        return entries

    def drop(self, number: int, most: int = 256) -> bool:
        """Remove names of a listing that was replaced or not completed; False when none is left."""
        with _room(), self._env.begin(write=True) as txn, txn.cursor(db=self._order) as order:
            for _ in range(most):
                if not order.set_range(_PLACE.pack(number, 0)) or bytes(order.key()[:8]) != _KEY.pack(number):
                    return False
                txn.delete(_KEY.pack(number) + bytes(order.value()), db=self._names)
                order.delete()
        return True


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except lmdb.Error as error:
        raise NoRoom(str(error)) from None


def _entry(name: bytes, record: bytes | memoryview) -> DirEntryPlus:
    _, cookie, fileid, fh_bytes, known = _NAME.unpack_from(record)
    if not known:
        return DirEntryPlus(fileid, name, cookie, None, None)
    fh_end = _NAME.size + fh_bytes
    attr = nfs3.unpack_fattr(record, fh_end)
    return DirEntryPlus(fileid, name, cookie, attr, bytes(record[_NAME.size : fh_end]))
