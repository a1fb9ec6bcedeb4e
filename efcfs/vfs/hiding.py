"""Files that lose their last name while they are open here live on as .nfs…, until last close (silly rename).

A file that is removed is renamed to that. One that is replaced gets it as a second name first: so its own is never
missing, and a RENAME of a daemon that died, should the server do it late, cannot make us hide the file that came
in its place, since a LINK names the file by its handle.

A hidden name is noted in the index (`inodes.py`) before the RENAME is sent, so a daemon that starts later removes
what this one could not; it is made of the request's number, so a request that comes again finds it. Who opens a file
and who takes its name away meet here: an open(2) under way counts as open, and one that comes during a removal waits
for it. What is open is for `opening.py` to know.
"""

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

import trio

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError, own_credential
from efcfs.nfs.rpc import Credential
from efcfs.vfs.attributes import Attributes
from efcfs.vfs.directories import Directories
from efcfs.vfs.errors import SERVER_ERRORS, errno_of
from efcfs.vfs.handles import Request
from efcfs.vfs.inodes import Inode, Inodes
from efcfs.vfs.openfile import OpenFile

log = logging.getLogger(__name__)

# Why a server makes no second name.
NO_LINKS = {nfs3.NFS3ERR_NOTSUPP, nfs3.NFS3ERR_MLINK, nfs3.NFS3ERR_PERM, nfs3.NFS3ERR_ACCES}


class Hiding:
    """The hidden files of one mount."""

    def __init__(self, client: Client, inodes: Inodes, attributes: Attributes, directories: Directories) -> None:
        # Files whose name is being taken away, and which were not open when that began: who opens one waits.
        self.removals: dict[int, trio.Event] = {}
        # Node ids of hidden files that a daemon before us left, and that nobody has open.
        self._left: set[int] = set()
        self._taking = trio.Lock()
        self._client = client
        self._inodes = inodes
        self._attributes = attributes
        self._directories = directories

    @contextlib.contextmanager
    def removal(self, target: Inode | None) -> Iterator[None]:
        """Meanwhile nobody opens the file that loses its name: it may be gone when the answer comes."""
        if target is None or target.open_file is not None:
            yield
            return
        with self._unopened(target.ino):
            yield

    @contextlib.contextmanager
    def _unopened(self, ino: int) -> Iterator[None]:
        """Who opens the file waits."""
        done = self.removals[ino] = trio.Event()
        try:
            yield
        finally:
            if self.removals.get(ino) is done:
                del self.removals[ino]
            done.set()

    async def hide(self, directory: Inode, old_name: bytes, target: Inode, cred: Credential, request: Request) -> None:
        """An open file that loses its name gets one to be removed at last close."""
        file = target.open_file
        if file is None:
            return  # closed while the caller asked the server
        name = _hidden_name(target, request)
        before = self._note(target, file, directory, name)
        asked_at = time.monotonic()
        try:
            with self._directories.changing((directory, old_name), (directory, name)):
                result = await self._client.rename(
                    cred, directory.fh, old_name, directory.fh, name, again=request.again
                )
                self._attributes.update_wcc(directory, result.from_wcc, asked_at)
        except SERVER_ERRORS:
            if before is None:
                self._inodes.unhidden(target.ino)
            raise
        await self._hidden(target, file, directory, old_name, name, before, cred)

    def _note(self, target: Inode, file: OpenFile, directory: Inode, name: bytes) -> tuple[int, bytes] | None:
        """Before it gets the name: a daemon that dies after that must leave the name to be removed.

        One that a daemon before us noted, and may have removed, stays noted until this one is there; it is returned.
        """
        if file.sillyname in (None, (directory.ino, name)):
            self._inodes.hidden(target.ino, directory.ino, name)
            return None
        return file.sillyname

    async def _hidden(
        self, target: Inode, file: OpenFile, directory: Inode, old_name: bytes, name: bytes,
        before: tuple[int, bytes] | None, cred: Credential,
    ) -> bool:  # fmt: skip
        """It has the name. False: it was closed meanwhile, so the name is gone again."""
        if before is not None:
            with contextlib.suppress(KeyError):  # its directory is gone
                await self._remove(self._inodes.get(before[0]), before[1], own_credential())
        if target.open_file is file:
            file.sillyname, file.doubtful = (directory.ino, name), False
            if before is not None:
                self._inodes.hidden(target.ino, directory.ino, name)
            # Not before: a daemon that dies in between leaves the request to the next, which finds the file by this.
            self._inodes.moved(directory.ino, old_name, directory.ino, name)
            return True
        self._inodes.moved(directory.ino, old_name, directory.ino, name)
        await self._remove(directory, name, cred)
        self._inodes.unhidden(target.ino)
        return False

    async def link(
        self, directory: Inode, old_name: bytes, target: Inode, cred: Credential, request: Request
    ) -> Callable[[], Awaitable[None]] | None:
        """An open file whose name another one is about to take gets a second one. Returns what takes that back."""
        file = target.open_file
        if file is None:
            return None  # closed while the caller asked the server
        name = _hidden_name(target, request)
        before = self._note(target, file, directory, name)
        asked_at = time.monotonic()
        try:
            with self._directories.changing((directory, name)):
                result = await self._client.link(cred, target.fh, directory.fh, name, again=request.again)
                self._attributes.update_wcc(directory, result.wcc, asked_at)
        except SERVER_ERRORS as error:
            if before is None:
                self._inodes.unhidden(target.ino)
            if isinstance(error, NfsError) and error.status == nfs3.NFS3ERR_STALE:
                return None  # it is gone already
            if isinstance(error, NfsError) and error.status in NO_LINKS | {nfs3.NFS3ERR_EXIST}:
                await self.hide(directory, old_name, target, cred, request)
                return partial(self._rename_back, directory, target, old_name, cred)
            raise
        self._attributes.update(target, result.attr, asked_at, own=True)
        if await self._hidden(target, file, directory, old_name, name, before, cred):
            return partial(self._unlink, directory, target, old_name, cred)
        return None

    async def _unlink(self, directory: Inode, target: Inode, name: bytes, cred: Credential) -> None:
        """What should have taken its name was refused: the second one goes."""
        file = target.open_file
        if file is None or file.sillyname is None:
            return
        hidden, file.sillyname = file.sillyname[1], None
        self._inodes.moved(directory.ino, hidden, directory.ino, name)
        await self._remove(directory, hidden, cred)
        self._inodes.unhidden(target.ino)
        self._attributes.expire(target)

    async def _rename_back(self, directory: Inode, target: Inode, name: bytes, cred: Credential) -> None:
        """The same where it has no other name."""
        file = target.open_file
        if file is None or file.sillyname is None:
            return
        try:
            with self._directories.changing((directory, name), (directory, file.sillyname[1])):
                await self._client.rename(cred, directory.fh, file.sillyname[1], directory.fh, name)
        except SERVER_ERRORS as error:
            log.error("file stays hidden as %r: errno %d", file.sillyname[1], errno_of(error))
            return
        self._inodes.moved(directory.ino, file.sillyname[1], directory.ino, name)
        self._inodes.unhidden(target.ino)
        file.sillyname = None

    async def remove(self, file: OpenFile, cred: Credential) -> None:
        """Nobody has it open any more. It counts as open until its hidden name, which counts as a link, is gone."""
        assert file.sillyname is not None
        parent, name = file.sillyname
        with self._unopened(file.ino):
            await self._remove(self._inodes.get(parent), name, cred)
        file.sillyname = None
        self._inodes.unhidden(file.ino)
        self._attributes.lose(self._inodes.get(file.ino))

    def found_left(self, left: set[int]) -> None:
        """Files that nobody had open when a daemon before us died, before it could remove their hidden names."""
        self._left = left

    def reopened(self, ino: int) -> tuple[int, bytes] | None:
        """The hidden name of a file that somebody opens, by a request that died with that daemon and came again.

        If it was left, it goes at last close.
        """
        if ino not in self._left:
            return None
        self._left.remove(ino)
        return self._inodes.hidden_name(ino)

    async def take_left(self, directory: int | None = None) -> None:
        """Remove the names that were left, one after the other: all, or those in a directory of that node id."""
        for ino in list(self._left):
            if directory is None or (self._inodes.hidden_name(ino) or (0,))[0] == directory:
                async with self._taking:
                    if ino in self._left:
                        await self.remove_left(ino)
                        self._left.discard(ino)

    async def remove_left(self, ino: int) -> None:
        """The file's hidden name goes, if it has one."""
        hidden = self._inodes.hidden_name(ino)
        if hidden is None:
            return
        with self._unopened(ino):
            with contextlib.suppress(KeyError):  # its directory is gone
                await self._remove(self._inodes.get(hidden[0]), hidden[1], own_credential())
            self._inodes.unhidden(ino)

    async def _remove(self, directory: Inode, name: bytes, cred: Credential) -> None:
        asked_at = time.monotonic()
        try:
            with self._directories.changing((directory, name)):
                result = await self._client.remove(cred, directory.fh, name)
                self._attributes.update_wcc(directory, result.wcc, asked_at)
        except SERVER_ERRORS as error:
            # NOENT: done by a daemon that died before it could say so.
            if not isinstance(error, NfsError) or error.status != nfs3.NFS3ERR_NOENT:
                log.error("hidden file %r stays: errno %d", name, errno_of(error))


def must_hide(inode: Inode) -> bool:
    """Open here, and this may be the last name that keeps it alive on the server."""
    file = inode.open_file
    return file is not None and (file.sillyname is None or file.doubtful)


def _hidden_name(inode: Inode, request: Request) -> bytes:
    """The same when the request comes again."""
    return b".nfs%016x%08x" % (inode.attr.fileid if inode.attr else inode.ino, request.unique >> 1 & 0xFFFFFFFF)
