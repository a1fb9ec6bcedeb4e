"""Listing directories: READDIRPLUS page by page.

The offsets that the kernel sees are the server's own cookies, so a listing goes on at the right place when
names before it are removed meanwhile, and a directory of any size takes the memory of one page.
"""

import itertools
import logging

import trio

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError
from efcfs.nfs.nfs3 import DirEntryPlus
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.rpc import Credential
from efcfs.vfs.inodes import Inode

log = logging.getLogger(__name__)

# At so many lookups at once for the names that came without attributes.
MAX_LOOKUPS = 32


class Listing:
    """One opendir(3)."""

    __slots__ = ("_at", "_client", "_cred", "_next", "_page", "_verifier", "inode")

    def __init__(self, client: Client, inode: Inode, cred: Credential) -> None:
        self.inode = inode
        self._client = client
        self._cred = cred
        self._verifier = bytes(nfs3.COOKIEVERFSIZE)
        self._page: nfs3.ReaddirplusResult | None = None
        self._at = 0  # the cookie that the page follows
        self._next = 0  # where in the page the last call pointed

    async def after(self, cookie: int) -> tuple[list[DirEntryPlus], int]:
        """A page and the index in it of the entry that follows `cookie` (0: the first entry).

        At the end of the directory the index is the page's length. Raises what READDIRPLUS raises.
        """
        page = self._page
        if page is not None and cookie:
            if cookie == self._at and page.entries:
                return page.entries, 0
            # The kernel goes on where the reply before ended, a little after `_next`.
            i = self._find(cookie)
            if i is not None and (i + 1 < len(page.entries) or page.eof):
                self._next = i + 1
                return page.entries, i + 1
        if not cookie:
            self._verifier = bytes(nfs3.COOKIEVERFSIZE)
        page = await self._fetch(cookie)
        self._page, self._at, self._next, self._verifier = page, cookie, 0, page.verifier
        return page.entries, 0

    def _find(self, cookie: int) -> int | None:
        assert self._page is not None
        entries = self._page.entries
        for i in itertools.chain(range(self._next, len(entries)), range(self._next)):
            if entries[i].cookie == cookie:
                return i
        return None

    async def _fetch(self, cookie: int) -> nfs3.ReaddirplusResult:
        client, fh = self._client, self.inode.fh
        try:
            page = await client.readdirplus(self._cred, fh, cookie, self._verifier)
        except NfsError as error:
            if error.status == nfs3.NFS3ERR_BAD_COOKIE and cookie:
                # The directory changed and this server then refuses its verifier; its cookies mostly still hold.
                page = await client.readdirplus(self._cred, fh, cookie, bytes(nfs3.COOKIEVERFSIZE))
            elif error.status == nfs3.NFS3ERR_NOTSUPP:
                plain = await client.readdir(self._cred, fh, cookie, self._verifier)
                entries = [DirEntryPlus(e.fileid, e.name, e.cookie, None, None) for e in plain.entries]
                page = nfs3.ReaddirplusResult(plain.status, plain.attr, plain.verifier, entries, plain.eof)
            else:
                raise
        return page._replace(entries=await self._completed(page.entries))

    async def _completed(self, entries: list[DirEntryPlus]) -> list[DirEntryPlus]:
        """Look up the names that came without handle or attributes.

        One that is gone meanwhile, or may not be looked up (a directory with r but without x), stays a bare name.
        """
        bare = [
            i for i, e in enumerate(entries)
            if (e.fh is None or e.attr is None) and e.name not in (b".", b"..")
        ]  # fmt: skip
        if not bare:
            return entries
        completed = list(entries)
        limit = trio.CapacityLimiter(MAX_LOOKUPS)

        async def look_up(i: int) -> None:
            entry = entries[i]
            async with limit:
                try:
                    found = await self._client.lookup(self._cred, self.inode.fh, entry.name)
                except NfsError as error:
                    log.debug("listing: %s", error)
                    return
                attr = found.attr
                if attr is None and found.fh is not None:
                    attr = await self._client.getattr(self._cred, found.fh)
                completed[i] = entry._replace(fh=found.fh, attr=attr)

        async with open_nursery() as nursery:
            for i in bare:
                nursery.start_soon(look_up, i)
        return completed
