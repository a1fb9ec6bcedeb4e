"""What the mount knows of files, in LMDB: node ids, and the file handles behind them.

Identities live in LMDB under /dev/shm and are written before the kernel can see them (DESIGN 3.1), so a
daemon that starts over an existing index can serve every node id that the kernel still holds. In memory
there is a bounded set of `Inode` objects, the recently used; the others are read back when asked for.

The node id is the server's fileid where that is free, so st_ino is what other clients see; a fileid that
is taken (two file systems below one export, or a reused fileid whose old file is still known) gets a
number of our own.

This module knows LMDB keys and no policy: freshness is `attributes.py`'s.
"""

import errno
import itertools
import logging
import os
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import lmdb

from efcfs.nfs import nfs3
from efcfs.nfs.nfs3 import Fattr
from efcfs.vfs.consistency import Mode
from efcfs.vfs.environment import Environment
from efcfs.vfs.listings import Listings
from efcfs.vfs.openfile import OpenFile

log = logging.getLogger(__name__)

T = TypeVar("T")

ROOT_INO = 1
# 100,000 inodes in memory took 80 MB; reading one back from LMDB takes 2 µs.
MAX_IN_MEMORY = 16_384
OWN_NUMBERS = 1 << 62

# nlookup, parent, generation, attributes fetched at, attribute timeout, length of fh, attributes known, what wrote the
# record, size in the kernel, whether the version of its pages is known, that version
_RECORD = struct.Struct(">QQIddBBQq?Qqq")
SIZE_UNKNOWN = -1
_FATTR_BYTES = 84
_KEY = struct.Struct(">Q")
# thread, monotonic seconds
_WALKER = struct.Struct(">Qd")
# Who is walking a path again; nobody takes longer.
WALK_S = 1.0


class Inode:
    """A file that the kernel knows. `parent` and `name` are where it was last looked up or moved to."""

    __slots__ = (
        "attr", "attr_at", "fh", "generation", "ino", "kernel_size_asked", "kernel_size_bytes", "kernel_size_sure",
        "kernel_size_taught", "mode", "name", "name_doubtful", "nlookup", "open_file", "opened_at", "pages_version",
        "parent", "timeout_s", "walkers",
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
        # Of which version the kernel's pages are; None: not known.
        self.pages_version: tuple[int, int, int] | None = None
        # The size that the kernel was told last, and the rest of `kernelview.py`'s: whether it surely believes it;
        # whether it was told nothing else since it was made to look; whether it asks before it reads beyond the end.
        self.kernel_size_bytes = SIZE_UNKNOWN
        self.kernel_size_sure = self.kernel_size_taught = self.kernel_size_asked = False
        # Somebody else changed it since its name was looked up; that may have been a rename.
        self.name_doubtful = False
        # Threads that were made to walk the path again, and when; None: as a daemon before us noted.
        self.walkers: dict[int, float] | None = None
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
        self._env = Environment(directory / "inodes.lmdb", databases=8)
        self._by_ino = self._env.database(b"ino")
        self._by_fh = self._env.database(b"fh")
        self._by_name = self._env.database(b"name")
        self._hidden = self._env.database(b"hidden")
        self._walkers = self._env.database(b"walkers")
        self.listings = Listings(self._env)
        # Tells what this daemon wrote from what is older than what the kernel was told since.
        self._writer = int.from_bytes(os.urandom(8), "big")
        self._inodes: dict[int, Inode] = {}
        with self._env.read(self._by_ino) as txn, txn.cursor() as cursor:
            last = _KEY.unpack(cursor.key())[0] if cursor.last() else 0
        self._next_own = max(OWN_NUMBERS, last + 1)
        root = self._load(ROOT_INO, None) or Inode(ROOT_INO, root_fh, ROOT_INO, b"")
        root.fh = root_fh
        root.nlookup = 1
        self._inodes[ROOT_INO] = root

        def write(txn: lmdb.Transaction) -> None:
            self._put(txn, root)
            txn.put(root_fh, _KEY.pack(ROOT_INO), db=self._by_fh)

        self._env.change(write)

    def close(self) -> None:
        self._env.close()

    def rejoin(self) -> None:
        """Another daemon was at it, and has failed. Raises OSError."""
        self._env.rejoin()

    def get(self, ino: int) -> Inode:
        """The inode of a node id that the kernel uses. Raises KeyError when it was never shown or is gone."""
        inode = self._inodes.get(ino)
        if inode is None:
            inode = self._recall(ino)
            self._keep_recent()
        return inode

    def enter(self, found: Iterable[Found]) -> list[Inode]:
        """The inodes of these names, each with one lookup more, and safely in the index. Raises OSError (ENOSPC)."""
        found = tuple(found)
        entered: list[Inode] = []
        new: list[Inode] = []

        def write(txn: lmdb.Transaction) -> None:
            for parent, name, fh, attr in found:
                known = txn.get(fh, db=self._by_fh)
                if known is not None:
                    inode = self._recall(_KEY.unpack(known)[0], txn)
                    if inode.ino != ROOT_INO:
                        inode.parent, inode.name = parent, name
                else:
                    inode = self._new(txn, fh, parent, name, attr.fileid, attr.fsid)
                    inode.kernel_size_sure = True  # it will be new to the kernel, which takes the first answer
                    txn.put(fh, _KEY.pack(inode.ino), db=self._by_fh)
                    self._inodes[inode.ino] = inode
                    new.append(inode)
                inode.nlookup += 1
                entered.append(inode)
                self._put(txn, inode, attr)
                txn.put(_KEY.pack(parent) + name, _KEY.pack(inode.ino), db=self._by_name)

        def undo() -> None:
            for inode in entered:
                inode.nlookup -= 1
            for inode in new:
                self._inodes.pop(inode.ino, None)
            entered.clear()
            new.clear()

        try:
            self._env.change(write, undo)
        except lmdb.Error:  # half a write, when the last page was free, is not DiskError to LMDB
            raise OSError(errno.ENOSPC, "no room for identities: /dev/shm is full") from None
        self._keep_recent()
        return entered

    def at(self, parent: int, name: bytes) -> Inode | None:
        """The inode that the kernel last saw at this name."""
        known = self._env.get(_KEY.pack(parent) + name, self._by_name)
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

        def write(txn: lmdb.Transaction) -> None:
            txn.delete(_KEY.pack(parent) + name, db=self._by_name)
            txn.put(_KEY.pack(new_parent) + new_name, _KEY.pack(inode.ino), db=self._by_name)
            self._put(txn, inode)

        self._done_already(write)

    def hidden(self, ino: int, parent: int, name: bytes) -> None:
        """The file gets this name until its last close. Raises OSError (ENOSPC)."""
        try:
            self._env.change(lambda txn: txn.put(_KEY.pack(ino), _KEY.pack(parent) + name, db=self._hidden))
        except lmdb.Error:
            raise OSError(errno.ENOSPC, "no room for a hidden name: /dev/shm is full") from None

    def unhidden(self, ino: int) -> None:
        self._done_already(lambda txn: txn.delete(_KEY.pack(ino), db=self._hidden))

    def hidden_name(self, ino: int) -> tuple[int, bytes] | None:
        """Directory and name under which the file is hidden."""
        found = self._env.get(_KEY.pack(ino), self._hidden)
        return (_KEY.unpack_from(found)[0], bytes(found[_KEY.size :])) if found is not None else None

    def all_hidden(self) -> list[int]:
        """The files that are hidden."""
        with self._env.read(self._hidden) as txn, txn.cursor() as cursor:
            return [int(_KEY.unpack(key)[0]) for key in cursor.iternext(values=False)]

    def removed(self, parent: int, name: bytes) -> None:
        """The name is gone; its file may live on under other names or handles."""
        self._done_already(lambda txn: txn.delete(_KEY.pack(parent) + name, db=self._by_name))

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """The kernel dropped so many lookups of each node id; at none left the identity goes."""
        inodes: list[Inode] = []
        for ino, nlookup in forgotten:
            try:
                inode = self._recall(ino)
            except KeyError:
                continue  # a name of a listing that had no file handle was never entered
            inode.nlookup -= nlookup
            inodes.append(inode)

        def write(txn: lmdb.Transaction) -> None:
            for inode in inodes:
                if inode.nlookup > 0 or inode.ino == ROOT_INO:
                    self._put(txn, inode)
                else:
                    self._delete(txn, inode)

        self._done_already(write)
        for inode in inodes:
            if inode.nlookup <= 0 and inode.ino != ROOT_INO and inode.open_file is None:
                self._inodes.pop(inode.ino, None)
        self._keep_recent()

    def __len__(self) -> int:
        with self._env.read() as txn:
            return int(txn.stat(self._by_ino)["entries"])

    def _done_already(self, write: Callable[[lmdb.Transaction], object]) -> bool:
        """Note what is done already: without room for it the index keeps old names. Returns whether it was noted."""
        try:
            self._env.change(write)
        except lmdb.Error as error:
            log.warning("identities are not brought up to date: %s", error)
            return False
        return True

    def _new(self, txn: lmdb.Transaction, fh: bytes, parent: int, name: bytes, fileid: int, fsid: int) -> Inode:
        if not ROOT_INO < fileid < OWN_NUMBERS:
            return Inode(self._own_number(), fh, parent, name)
        try:
            old = self._recall(fileid, txn)
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

    def _recall(self, ino: int, txn: lmdb.Transaction | None = None) -> Inode:
        """As `get`, within a transaction or before one."""
        inode = self._inodes.get(ino) or self._load(ino, txn)
        if inode is None:
            raise KeyError(ino)
        self._inodes[ino] = inode
        return inode

    def _keep_recent(self) -> None:
        if len(self._inodes) < MAX_IN_MEMORY:
            return
        # The oldest eighth goes at once: a walk over them for every new one would be quadratic.
        oldest = list(itertools.islice(self._inodes.values(), MAX_IN_MEMORY // 8))
        staying = [inode for inode in oldest if inode.open_file is not None or inode.ino == ROOT_INO]

        def write(txn: lmdb.Transaction) -> None:
            for inode in oldest:
                if inode.nlookup > 0:
                    self._put(txn, inode)

        if self._done_already(write):
            for inode in oldest:
                del self._inodes[inode.ino]
            self._inodes.update((inode.ino, inode) for inode in staying)

    def walks(self, inode: Inode, thread: int) -> None:
        """The kernel was made to walk the path again in this thread, which then comes back, to whichever daemon."""
        walkers, now = self._walking(inode), time.monotonic()
        walkers[thread] = now
        inode.walkers = walkers = {who: at for who, at in walkers.items() if now - at <= WALK_S}
        packed = b"".join(_WALKER.pack(*walker) for walker in walkers.items())
        self._done_already(lambda txn: txn.put(_KEY.pack(inode.ino), packed, db=self._walkers))

    def walked(self, inode: Inode, thread: int) -> bool:
        """Whether the thread comes back from such a walk. It is said once."""
        return time.monotonic() - self._walking(inode).pop(thread, float("-inf")) <= WALK_S

    def _walking(self, inode: Inode) -> dict[int, float]:
        if inode.walkers is None:
            found = self._env.get(_KEY.pack(inode.ino), self._walkers)
            inode.walkers = dict(_WALKER.iter_unpack(found)) if found is not None else {}
        return inode.walkers

    def note(self, inode: Inode) -> None:
        """Write down what is known of it, for a daemon that starts while the server is away."""
        self._done_already(lambda txn: self._put(txn, inode))

    def _delete(self, txn: lmdb.Transaction, inode: Inode) -> None:
        key = _KEY.pack(inode.ino)
        txn.delete(key, db=self._by_ino)
        txn.delete(key, db=self._walkers)
        if txn.get(inode.fh, db=self._by_fh) == key:
            txn.delete(inode.fh, db=self._by_fh)
        name_key = _KEY.pack(inode.parent) + inode.name
        if txn.get(name_key, db=self._by_name) == key:
            txn.delete(name_key, db=self._by_name)

    def _put(self, txn: lmdb.Transaction, inode: Inode, newer: Fattr | None = None) -> None:
        """`newer`: attributes that came just now, and that the inode will take over."""
        attr = newer if newer is not None else inode.attr
        size = inode.kernel_size_bytes if inode.kernel_size_sure else SIZE_UNKNOWN
        head = _RECORD.pack(
            inode.nlookup, inode.parent, inode.generation, inode.attr_at, inode.timeout_s, len(inode.fh),
            attr is not None,
            self._writer, size, inode.pages_version is not None, *(inode.pages_version or (0, 0, 0)),
        )  # fmt: skip
        packed = nfs3.pack_fattr(attr) if attr is not None else b""
        txn.put(_KEY.pack(inode.ino), head + inode.fh + packed + inode.name, db=self._by_ino)

    def _load(self, ino: int, txn: lmdb.Transaction | None) -> Inode | None:
        key = _KEY.pack(ino)
        record = txn.get(key, db=self._by_ino) if txn is not None else self._env.get(key, self._by_ino)
        if record is None:
            return None
        nlookup, parent, generation, attr_at, timeout_s, fh_bytes, known, writer, size, has_pages, *pages = (
            _RECORD.unpack_from(record)
        )
        fh_end = _RECORD.size + fh_bytes
        name_at = fh_end + (_FATTR_BYTES if known else 0)
        inode = Inode(ino, bytes(record[_RECORD.size : fh_end]), parent, bytes(record[name_at:]))
        inode.nlookup = nlookup
        inode.generation = generation
        if writer == self._writer and size != SIZE_UNKNOWN:
            inode.kernel_size_bytes, inode.kernel_size_sure = size, True
        if has_pages:
            inode.pages_version = (pages[0], pages[1], pages[2])
        if known:
            inode.attr = nfs3.unpack_fattr(record, fh_end)
            inode.attr_at = attr_at
            # Another daemon may have learned more since it wrote this: they are asked for before they are believed.
            inode.timeout_s = timeout_s if writer == self._writer else 0.0
        return inode
