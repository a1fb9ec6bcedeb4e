"""What the kernel is told of a file: its node id, its attributes, and how long it may believe them and the name.

Every name goes into the index (`inodes.py`) before it is told, and each time it is told counts one lookup, which the
kernel forgets some day. This module knows no operations, and of a file that is open here only its size and links.
"""

import errno
from collections.abc import Sequence
from typing import NamedTuple

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client
from efcfs.nfs.nfs3 import DirEntryPlus, Fattr
from efcfs.nfs.rpc import Credential
from efcfs.vfs.attributes import Attributes
from efcfs.vfs.directories import Listing
from efcfs.vfs.inodes import Found, Inode, Inodes


class Entry(NamedTuple):
    """What the kernel is told of a file. `ino` 0: there is no such name, and that holds for entry_timeout_s."""

    ino: int
    generation: int
    attr: Fattr | None
    entry_timeout_s: float
    attr_timeout_s: float


class ListedEntry(NamedTuple):
    """A directory entry; without `entry` only its name is known."""

    name: bytes
    cookie: int
    fileid: int
    entry: Entry | None


class Entries:
    """What the kernel is told of one mount. `lookupcache`: "all", "positive" or "none", as in nfs(5)."""

    def __init__(self, client: Client, inodes: Inodes, attributes: Attributes, lookupcache: str) -> None:
        self.lookupcache = lookupcache
        self._client = client
        self._inodes = inodes
        self._attributes = attributes

    def of(self, inode: Inode, entry_timeout_s: float = 0.0) -> Entry:
        """The inode as the kernel shall see it now; counts no lookup."""
        attr = inode.attr
        assert attr is not None
        file = inode.open_file
        if file is not None and file.dirty_end > attr.size:
            attr = attr._replace(size=file.dirty_end)
        if file is not None and file.sillyname is not None:
            attr = attr._replace(nlink=max(attr.nlink, 1) - 1)  # the hidden name does not count
        inode.kernel_size_bytes = attr.size
        return Entry(inode.ino, inode.generation, attr, entry_timeout_s, self._attributes.remaining_s(inode))

    def missing(self, directory: Inode, for_s: float | None = None) -> Entry:
        """There is no such name; `for_s`: how long that may be believed, if it was not seen just now."""
        return Entry(0, 0, None, self._timeout_s(directory, positive=False) if for_s is None else for_s, 0.0)

    def enter(self, parent: int, name: bytes, fh: bytes, attr: Fattr | None, asked_at: float) -> Entry:
        """A name that the server told just now."""
        assert attr is not None
        (inode,) = self._inodes.enter((Found(parent, name, fh, attr),))
        self._attributes.update(inode, attr, asked_at)
        inode.name_doubtful = False
        return self.of(inode, self._timeout_s(self._inodes.get(parent), positive=True))

    async def enter_completed(
        self, directory: Inode, name: bytes, fh: bytes | None, attr: Fattr | None, asked_at: float, cred: Credential
    ) -> Entry:
        """As `enter`; the server may have left out its handle or attributes (RFC 1813 §3.3.8)."""
        if fh is None:
            found = await self._client.lookup(cred, directory.fh, name)
            fh, attr = found.fh, found.attr
        if fh is None:
            raise OSError(errno.EIO, "LOOKUP without a file handle")
        if attr is None:
            attr = await self._client.getattr(cred, fh)
        return self.enter(directory.ino, name, fh, attr, asked_at)

    async def enter_made(
        self, directory: Inode, name: bytes, made: nfs3.CreateResult, asked_at: float, cred: Credential
    ) -> Entry:
        """A name that the server made for us."""
        self._attributes.update_wcc(directory, made.wcc, asked_at)
        return await self.enter_completed(directory, name, made.fh, made.attr, asked_at, cred)

    def enter_known(self, directory: Inode, name: bytes, inode: Inode) -> Entry:
        """A name as it was last seen, since the server does not answer."""
        assert inode.attr is not None
        (inode,) = self._inodes.enter((Found(directory.ino, name, inode.fh, inode.attr),))
        return self.of(inode, self._timeout_s(directory, positive=True))

    def enter_kept(self, directory: Inode, entry: DirEntryPlus, seen_at: float) -> Entry:
        """A name from a kept listing."""
        assert entry.fh is not None and entry.attr is not None
        (inode,) = self._inodes.enter((Found(directory.ino, entry.name, entry.fh, entry.attr),))
        self._attributes.recall(inode, entry.attr, seen_at)
        return self.of(inode, self._timeout_s(directory, positive=True))

    def enter_listed(self, listing: Listing, chosen: Sequence[DirEntryPlus]) -> list[ListedEntry]:
        """Names of a page of a listing, in one transaction."""
        directory = listing.inode
        bare = {b".", b"..", *listing.stale}
        known = [e for e in chosen if e.fh is not None and e.attr is not None and e.name not in bare]
        inodes = self._inodes.enter(
            Found(directory.ino, e.name, e.fh, e.attr) for e in known if e.fh is not None and e.attr is not None
        )
        shown: dict[bytes, Entry] = {}
        for entry, inode in zip(known, inodes, strict=True):
            assert entry.attr is not None
            if listing.fresh:
                self._attributes.update(inode, entry.attr, listing.seen_at)
                inode.name_doubtful = False
            else:
                self._attributes.recall(inode, entry.attr, listing.seen_at)
            shown[entry.name] = self.of(inode, self._timeout_s(directory, positive=True))
        return [ListedEntry(e.name, e.cookie, e.fileid, shown.get(e.name)) for e in chosen]

    def _timeout_s(self, directory: Inode, *, positive: bool) -> float:
        """How long a name of the directory may be believed, or that it is not there."""
        if self.lookupcache == "none" or (self.lookupcache == "positive" and not positive):
            return 0.0
        return self._attributes.remaining_s(directory)
