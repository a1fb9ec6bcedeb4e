"""Names: looking them up, and making, removing and moving them.

What a change of a name means for the index, for kept listings and for attributes is here, in one place for each
operation. A file that is open is hidden before its name goes (`hiding.py`). A request that comes again, since a daemon
died over it, gets the answer of the first time: the client judges most calls by their effect (`again=`), RENAME and the
exclusive CREATE are judged here.
"""

import errno
import os
import stat
import time
from collections.abc import Awaitable, Callable
from hashlib import blake2b

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError
from efcfs.nfs.link import ServerAway
from efcfs.nfs.nfs3 import Sattr
from efcfs.nfs.rpc import Credential
from efcfs.vfs.attributes import Attributes
from efcfs.vfs.directories import Directories
from efcfs.vfs.entries import Entries, Entry
from efcfs.vfs.errors import SERVER_ERRORS
from efcfs.vfs.handles import Request
from efcfs.vfs.hiding import NO_LINKS, Hiding, must_hide
from efcfs.vfs.inodes import Inode, Inodes
from efcfs.vfs.opening import Opened, Opening

RENAME_NOREPLACE = 1

_TYPE_OF_MODE = {
    stat.S_IFIFO: nfs3.NF3FIFO,
    stat.S_IFSOCK: nfs3.NF3SOCK,
    stat.S_IFCHR: nfs3.NF3CHR,
    stat.S_IFBLK: nfs3.NF3BLK,
}


class Names:
    """The names of one mount. `nonce`: a random number of it, the same for every daemon."""

    def __init__(
        self, client: Client, inodes: Inodes, attributes: Attributes, directories: Directories, entries: Entries,
        hiding: Hiding, opening: Opening, nonce: int,
    ) -> None:  # fmt: skip
        self._client = client
        self._inodes = inodes
        self._attributes = attributes
        self._directories = directories
        self._entries = entries
        self._hiding = hiding
        self._opening = opening
        self._nonce = nonce

    def lookup_at_once(self, parent: int, name: bytes) -> Entry | None:
        """What is known of all names of the directory tells, if it may be believed."""
        directory = self._inodes.get(parent)
        if self._entries.lookupcache != "all" or name in (b".", b".."):
            return None
        if self._attributes.view.dropping:
            return None  # it may be of this file, and then has to wait
        left_s = self._directories.absent_s(directory, name)
        if left_s:
            return self._entries.missing(directory, left_s)
        seen = self._directories.find(directory, name)
        if seen is None:
            return None
        entry, seen_at = seen
        if entry is None:
            return self._entries.missing(directory)
        return self._entries.enter_kept(directory, entry, seen_at)

    async def lookup(self, parent: int, name: bytes, cred: Credential) -> Entry:
        directory = self._inodes.get(parent)
        asked_at = time.monotonic()
        if name == b".":
            await self._attributes.get(directory, cred)
            return self._entries.enter(directory.parent, directory.name, directory.fh, directory.attr, asked_at)
        known = self._inodes.at(parent, name)
        usable = known is not None and self._attributes.may_be_old(known)
        try:
            if usable and self._client.away:
                raise ServerAway
            found = await self._client.lookup(cred, directory.fh, name, impatient=usable)
        except NfsError as error:
            if error.status != nfs3.NFS3ERR_NOENT:
                raise
            if self._entries.lookupcache == "all":
                self._directories.missed(directory, name, cred)
            return self._entries.missing(directory)
        except ServerAway:
            assert known is not None
            return self._entries.enter_known(directory, name, known)
        self._attributes.update(directory, found.dir_attr, asked_at)
        self._directories.absent.may_be(directory.fh, (name,))
        return await self._entries.enter_completed(directory, name, found.fh, found.attr, asked_at, cred)

    async def readlink(self, ino: int, cred: Credential) -> bytes:
        inode = self._inodes.get(ino)
        asked_at = time.monotonic()
        result = await self._client.readlink(cred, inode.fh)
        self._attributes.update(inode, result.attr, asked_at)
        return result.target

    # -- making ---------------------------------------------------------------------------------------

    async def mkdir(self, parent: int, name: bytes, mode: int, cred: Credential, request: Request) -> Entry:
        directory = self._inodes.get(parent)
        self._attributes.refuse_immutable(directory)
        asked_at = time.monotonic()
        sattr = Sattr(mode=stat.S_IMODE(mode))
        with self._directories.changing((directory, name)):
            made = await self._client.mkdir(cred, directory.fh, name, sattr, again=request.again)
            entry = await self._entries.enter_made(directory, name, made, asked_at, cred)
        if made.status == nfs3.NFS3_OK:  # what was there already may be another client's, and not empty
            self._directories.made(self._inodes.get(entry.ino), asked_at)
        return entry

    async def symlink(self, parent: int, name: bytes, target: bytes, cred: Credential, request: Request) -> Entry:
        directory = self._inodes.get(parent)
        self._attributes.refuse_immutable(directory)
        asked_at = time.monotonic()
        with self._directories.changing((directory, name)):
            made = await self._client.symlink(cred, directory.fh, name, Sattr(mode=0o777), target, again=request.again)
            return await self._entries.enter_made(directory, name, made, asked_at, cred)

    async def mknod(self, parent: int, name: bytes, mode: int, rdev: int, cred: Credential, request: Request) -> Entry:
        directory = self._inodes.get(parent)
        self._attributes.refuse_immutable(directory)
        sattr = Sattr(mode=stat.S_IMODE(mode))
        file_type = _TYPE_OF_MODE.get(stat.S_IFMT(mode))
        if file_type is None and not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "mknod of this type")
        asked_at = time.monotonic()
        with self._directories.changing((directory, name)):
            if file_type is None:
                made = await self._create_exclusive(directory, name, sattr, cred, request)
            else:
                made = await self._client.mknod(
                    cred, directory.fh, name, file_type, sattr, os.major(rdev), os.minor(rdev), again=request.again
                )
            return await self._entries.enter_made(directory, name, made, asked_at, cred)

    async def link(self, ino: int, new_parent: int, new_name: bytes, cred: Credential, request: Request) -> Entry:
        inode, directory = self._inodes.get(ino), self._inodes.get(new_parent)
        self._attributes.refuse_immutable(inode, directory)
        asked_at = time.monotonic()
        with self._directories.changing((directory, new_name)):
            result = await self._client.link(cred, inode.fh, directory.fh, new_name, again=request.again)
            self._attributes.update_wcc(directory, result.wcc, asked_at)
        # A new name changes ctime and nothing that the kernel's pages hold.
        self._attributes.update(inode, result.attr, asked_at, own=True)
        return await self._entries.enter_completed(directory, new_name, inode.fh, result.attr, asked_at, cred)

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, cred: Credential, request: Request
    ) -> tuple[Opened, Entry]:
        directory = self._inodes.get(parent)
        self._attributes.refuse_immutable(directory)
        if request.again and (before := self._opening.again(request)) is not None:
            inode, opened = before
            await self._attributes.get(inode, cred)  # its lookup was counted by who opened it
            return opened, self._entries.of(inode)
        asked_at = time.monotonic()
        sattr = Sattr(mode=stat.S_IMODE(mode), size=0 if flags & os.O_TRUNC else None)
        with self._directories.changing((directory, name)):
            if flags & os.O_EXCL:
                made = await self._create_exclusive(directory, name, sattr, cred, request)
            else:
                made = await self._client.create(cred, directory.fh, name, sattr)
            entry = await self._entries.enter_made(directory, name, made, asked_at, cred)
        return self._opening.opened(self._inodes.get(entry.ino), flags, cred, request), entry

    async def _create_exclusive(
        self, directory: Inode, name: bytes, sattr: Sattr, cred: Credential, request: Request
    ) -> nfs3.CreateResult:
        """CREATE EXCLUSIVE, then the attributes: servers keep the verifier in the times (RFC 1813 §3.3.8).

        The verifier is the same when the request comes again. Where the attributes had been set by then, it is gone:
        then an empty file of that name is ours, for in between nobody was told that it is there.
        """
        verifier = blake2b(b"%d %d" % (self._nonce, request.unique), digest_size=nfs3.CREATEVERFSIZE).digest()
        try:
            made = await self._client.create_exclusive(cred, directory.fh, name, verifier)
        except NfsError as error:
            if error.status != nfs3.NFS3ERR_EXIST or not request.again:
                raise
            found = await self._client.lookup(cred, directory.fh, name)
            if found.attr is None or found.attr.type != nfs3.NF3REG or found.attr.size:
                raise
            made = nfs3.CreateResult(nfs3.NFS3_OK, found.fh, found.attr, nfs3.Wcc(None, found.dir_attr))
        fh = made.fh if made.fh is not None else (await self._client.lookup(cred, directory.fh, name)).fh
        if fh is None:
            raise OSError(errno.EIO, "CREATE without a file handle")
        times = sattr._replace(size=None, atime_ns=nfs3.SERVER_TIME, mtime_ns=nfs3.SERVER_TIME)
        done = await self._client.setattr(cred, fh, times)
        return made._replace(fh=fh, attr=done.wcc.after)

    # -- removing and moving --------------------------------------------------------------------------

    async def unlink(self, parent: int, name: bytes, cred: Credential, request: Request) -> None:
        directory = self._inodes.get(parent)
        self._attributes.refuse_immutable(directory)
        target = self._inodes.at(parent, name)
        if target is not None and must_hide(target):
            try:
                await self._hiding.hide(directory, name, target, cred, request)
            except NfsError as error:
                # The name is gone, and so it was to be: done late, for a daemon that died.
                if not request.again or error.status != nfs3.NFS3ERR_NOENT:
                    raise
                self._inodes.removed(parent, name)
                self._directories.changed(directory, name)
            return
        asked_at = time.monotonic()
        with self._hiding.removal(target), self._directories.changing((directory, name)):
            result = await self._client.remove(cred, directory.fh, name, again=request.again)
            self._attributes.update_wcc(directory, result.wcc, asked_at)
        self._inodes.removed(parent, name)
        if target is not None:
            self._attributes.expire(target)  # it may live on under other names, with a link less

    async def rmdir(self, parent: int, name: bytes, cred: Credential, request: Request) -> None:
        directory = self._inodes.get(parent)
        self._attributes.refuse_immutable(directory)
        if (gone := self._inodes.at(parent, name)) is not None:
            await self._hiding.take_left(gone.ino)
        asked_at = time.monotonic()
        with self._directories.changing((directory, name)):
            result = await self._client.rmdir(cred, directory.fh, name, again=request.again)
            self._attributes.update_wcc(directory, result.wcc, asked_at)
        self._inodes.removed(parent, name)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, cred: Credential,
        request: Request,
    ) -> None:  # fmt: skip
        if flags & ~RENAME_NOREPLACE:
            raise OSError(errno.EINVAL, "NFSv3 cannot exchange names")
        old, new = self._inodes.get(parent), self._inodes.get(new_parent)
        self._attributes.refuse_immutable(old, new)
        if request.again and await self._was_renamed(old, name, new, new_name, cred):
            return
        take_back: Callable[[], Awaitable[None]] | None = None
        replaced: Inode | None = None
        if flags & RENAME_NOREPLACE:
            if await self._rename_to_free_name(old, name, new, new_name, cred, request):
                return
        else:
            replaced = self._inodes.at(new_parent, new_name)
            if replaced is not None:
                self._opening.keep_open(replaced, cred)
            if replaced is not None and must_hide(replaced):
                if (await self._client.lookup(cred, old.fh, name)).fh == replaced.fh:
                    return  # both names are the same file: POSIX says do nothing
                take_back = await self._hiding.link(new, new_name, replaced, cred, request)
        asked_at = time.monotonic()
        try:
            with self._hiding.removal(replaced), self._directories.changing((old, name), (new, new_name)):
                result = await self._client.rename(cred, old.fh, name, new.fh, new_name, again=request.again)
                self._attributes.update_wcc(old, result.from_wcc, asked_at)
                if new is not old:
                    self._attributes.update_wcc(new, result.to_wcc, asked_at)
        except SERVER_ERRORS:
            if take_back is not None:
                await take_back()
            raise
        if replaced is not None:
            self._attributes.expire(replaced)
        self._renamed(old, name, new, new_name)

    async def _rename_to_free_name(
        self, old: Inode, name: bytes, new: Inode, new_name: bytes, cred: Credential, request: Request
    ) -> bool:
        """RENAME_NOREPLACE of a file as LINK and REMOVE, since NFSv3's RENAME replaces and LINK does not.

        False: not done, but the name is free (a directory, or a server without links): a plain RENAME may
        follow, with the small race that leaves. Raises EEXIST when the name is taken.
        """
        source = await self._client.lookup(cred, old.fh, name)
        try:
            taken = await self._client.lookup(cred, new.fh, new_name)
        except NfsError as error:
            if error.status != nfs3.NFS3ERR_NOENT:
                raise
        else:
            if not request.again or taken.fh != source.fh:
                raise OSError(errno.EEXIST, "name is taken")
        if source.fh is None or source.attr is None or source.attr.type == nfs3.NF3DIR:
            return False
        asked_at = time.monotonic()
        try:
            with self._directories.changing((new, new_name)):
                linked = await self._client.link(cred, source.fh, new.fh, new_name, again=request.again)
                self._attributes.update_wcc(new, linked.wcc, asked_at)
        except NfsError as error:
            if error.status in NO_LINKS:
                return False
            raise
        asked_at = time.monotonic()
        with self._directories.changing((old, name)):
            removed = await self._client.remove(cred, old.fh, name)
            self._attributes.update_wcc(old, removed.wcc, asked_at)
        self._renamed(old, name, new, new_name)
        return True

    async def _was_renamed(self, old: Inode, name: bytes, new: Inode, new_name: bytes, cred: Credential) -> bool:
        """Whether a RENAME that came again was done before: the old name is gone, and the new one there."""
        try:
            await self._client.lookup(cred, old.fh, name)
        except NfsError as error:
            if error.status != nfs3.NFS3ERR_NOENT:
                raise
        else:
            return False
        await self._client.lookup(cred, new.fh, new_name)  # NOENT: it was never there to be renamed
        for directory, changed in ((old, name), (new, new_name)):
            self._attributes.expire(directory)
            self._directories.changed(directory, changed)
        self._renamed(old, name, new, new_name)
        return True

    def _renamed(self, old: Inode, name: bytes, new: Inode, new_name: bytes) -> None:
        moved = self._inodes.at(old.ino, name)
        if moved is not None:
            self._inodes.moved(old.ino, name, new.ino, new_name)
            self._attributes.expire(moved)  # its ctime changed
