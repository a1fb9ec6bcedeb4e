"""Listing directories, and knowing them: READDIRPLUS page by page, kept when it went to the end.

The offsets that the kernel sees are the server's own cookies, so a listing goes on at the right place when
names before it are removed meanwhile. What a listing has told it does not tell again: NFS-Ganesha that has
forgotten a directory, as after a STALE to somebody else, answers what follows a cookie with all but the entry
of that cookie, over and over again (CI's soak: 51 names told 74 times). A directory whose version has not
changed since it was read to its end is not read again, and while its attributes are fresh it answers lookups,
of names that are not there too.
"""

import contextlib
import errno
import itertools
import logging
import time
from collections.abc import Iterator

import trio

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError
from efcfs.nfs.nfs3 import DirEntryPlus
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.rpc import Credential
from efcfs.vfs.absent import Absent
from efcfs.vfs.attributes import Attributes, version
from efcfs.vfs.errors import SERVER_ERRORS
from efcfs.vfs.inodes import Inode
from efcfs.vfs.listings import Directory, Listings, NoRoom

log = logging.getLogger(__name__)

# At so many lookups at once for the names that came without attributes.
MAX_LOOKUPS = 32

# A server that says of a directory that it is gone, which it is not, is asked so often.
GONE_TRIES = 3

# So many names of a listing are remembered, in some 10 MB; what comes after them could be told twice.
MOST_TOLD = 100_000

# Entries taken from a kept listing at once.
PAGE_ENTRIES = 256

# Longer directories are not listed for the names that they do not have.
MOST_LISTED = 10_000


class Directories:
    """The directories of one mount. Listings that nobody needs any more are removed in `nursery`."""

    def __init__(
        self, client: Client, attributes: Attributes, listings: Listings, absent: Absent, nursery: trio.Nursery
    ) -> None:
        self.listings = listings
        self.absent = absent
        self._client = client
        self._attributes = attributes
        self._nursery = nursery
        # Those that somebody reads now, by node id.
        self._open: dict[int, list[Listing]] = {}

    @contextlib.contextmanager
    def changing(self, *places: tuple[Inode, bytes]) -> Iterator[None]:
        """A call that makes, removes or moves these names: what it tells of the directories is taken over within."""
        names: dict[bytes, list[bytes]] = {}
        for directory, name in places:
            names.setdefault(directory.fh, []).append(name)
        with self.absent.changing(names):
            yield
        for directory, name in places:
            self.changed(directory, name)

    def changed(self, inode: Inode, name: bytes) -> None:
        """We made, removed or moved a name: what listings have of it is old.

        The kept one may still seem to be of the directory's version: that stays the same within one tick of a
        server's clock.
        """
        for listing in self._open.get(inode.ino, ()):
            listing.stale.add(name)
            listing.spoil()
        try:
            number = self.listings.forget(inode.fh)
        except NoRoom as error:
            log.info("an old listing stays: %s", error)
            return
        if number is not None:
            self.drop(number)

    def touched(self, directory: Inode, name: bytes) -> None:
        """We change a file: what the kept listing says of it is old, and could be told to the kernel later."""
        found = self.listings.directory(directory.fh)
        if found is not None:
            try:
                self.listings.blur(found.number, name)
            except NoRoom:
                self.changed(directory, name)
        for listing in self._open.get(directory.ino, ()):
            listing.stale.add(name)

    def made(self, directory: Inode, asked_at: float) -> None:
        """A directory that we have just made, and asked for then."""
        self.absent.made(directory.fh, version(directory.attr) if directory.attr is not None else None, asked_at)

    def absent_s(self, directory: Inode, name: bytes) -> float:
        """How long the name may be believed not to be there; 0: not known."""
        return self.absent.left_s(directory.fh, name, self._attributes.believe_absent_s(directory))

    def missed(self, directory: Inode, name: bytes, cred: Credential) -> None:
        """The server does not have a name: where many are missed, a listing saves asking for the others."""
        believe_s = self._attributes.believe_absent_s(directory)
        if (listing := self.absent.missed(directory.fh, name, believe_s)) is not None:
            self._nursery.start_soon(self._list_names, directory.fh, listing, cred, believe_s)

    async def _list_names(self, fh: bytes, listing: set[bytes], cred: Credential, believe_s: float) -> None:
        names: list[bytes] = []
        cookie, verifier = 0, bytes(nfs3.COOKIEVERFSIZE)
        began_at = time.monotonic()
        try:
            while len(names) < MOST_LISTED:
                asked_at = time.monotonic()
                page = await self._client.readdir(cred, fh, cookie, verifier)
                if page.attr is not None:
                    self.absent.seen(fh, version(page.attr), asked_at)
                names += [entry.name for entry in page.entries]
                if page.eof:
                    self.absent.listed(fh, listing, names, began_at)
                    return
                if not page.entries:
                    break
                cookie, verifier = page.entries[-1].cookie, page.verifier
        except SERVER_ERRORS as error:
            log.debug("names that are not there: %s", error)
        self.absent.given_up(fh, listing, believe_s)

    def known(self, inode: Inode) -> Directory | None:
        """The kept listing, if the directory is still of that version as far as we know."""
        found = self.listings.directory(inode.fh)
        return found if found is not None and inode.attr is not None and found.version == version(inode.attr) else None

    def find(self, inode: Inode, name: bytes) -> tuple[DirEntryPlus | None, float] | None:
        """The entry of that name (None: there is none) and when it was seen; None: the server must be asked."""
        if not self._attributes.remaining_s(inode):
            return None
        directory = self.known(inode)
        if directory is None:
            return None
        entry = self.listings.find(directory.number, name)
        if entry is None:
            # Some servers have names that they do not list, such as .snapshot.
            return None if name.startswith(b".") else (None, directory.seen_at)
        return (entry, directory.seen_at) if entry.fh is not None else None

    def listing(self, inode: Inode, cred: Credential, *, revalidated: bool = True) -> "Listing":
        """For an opendir(3); the kept one is used only if the directory's attributes were just revalidated."""
        listing = Listing(self, self._client, inode, cred, self.known(inode) if revalidated else None)
        self._open.setdefault(inode.ino, []).append(listing)
        return listing

    def closed(self, listing: "Listing") -> None:
        others = self._open[listing.inode.ino]
        others.remove(listing)
        if not others:
            del self._open[listing.inode.ino]

    def keep(self, inode: Inode, number: int, of: tuple[int, int, int], seen_at: float) -> None:
        replaced = self.listings.complete(inode.fh, number, of, seen_at)
        if replaced is not None:
            self.drop(replaced)

    def doubt(self, inode: Inode) -> None:
        """The server has lost the places of those who list it: what they get may lack names, so it is not kept."""
        for listing in self._open.get(inode.ino, ()):
            listing.spoil()
        self.absent.doubt(inode.fh)

    def drop(self, number: int) -> None:
        self._nursery.start_soon(self._drop, number)

    async def _drop(self, number: int) -> None:
        try:
            while self.listings.drop(number):
                await trio.lowlevel.checkpoint()
        except NoRoom as error:
            log.info("an old listing stays: %s", error)


class Listing:
    """One opendir(3)."""

    __slots__ = (
        "_at", "_client", "_cred", "_directories", "_known", "_next", "_number", "_page", "_place",
        "_started", "_told", "_verifier", "fresh", "inode", "seen_at", "stale",
    )  # fmt: skip

    def __init__(
        self, directories: Directories, client: Client, inode: Inode, cred: Credential, known: Directory | None
    ) -> None:
        self.inode = inode
        # When the last page was seen (monotonic seconds), and whether the server told it just now.
        self.seen_at = 0.0
        self.fresh = False
        # Names that changed since it was opened.
        self.stale: set[bytes] = set()
        self._directories = directories
        self._client = client
        self._cred = cred
        self._known = known
        self._verifier = bytes(nfs3.COOKIEVERFSIZE)
        self._page: nfs3.ReaddirplusResult | None = None
        # The names before the page.
        self._told: set[bytes] = set()
        self._at = 0  # the cookie that the page follows
        self._next = 0  # where in the page the last call pointed
        # The listing that is being kept, its next place, and the directory's version when it began.
        self._number: int | None = None
        self._place = 0
        self._started: tuple[int, int, int] | None = None

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
            self._told = set()
        elif page is None:  # another daemon began
            self._told = await self._names_until(cookie)
        elif page.entries and page.entries[-1].cookie == cookie:
            if len(self._told) < MOST_TOLD:
                self._told.update(entry.name for entry in page.entries)
        else:  # seekdir(3)
            self._told = set()
        page = self._kept(cookie) or await self._fetch(cookie)
        self._page, self._at, self._next, self._verifier = page, cookie, 0, page.verifier
        self._directories.absent.may_be(self.inode.fh, (entry.name for entry in page.entries))
        return page.entries, 0

    def close(self) -> None:
        self.spoil()  # whoever was killed as he read it may still have a page on its way
        self._give_up()
        self._directories.closed(self)

    def spoil(self) -> None:
        """The directory changed: what is read of it is not kept as a whole."""
        self._started = None

    def _give_up(self) -> None:
        """What was kept so far is not a whole listing."""
        if self._number is not None:
            self._directories.drop(self._number)
            self._number = None

    def _kept(self, cookie: int) -> nfs3.ReaddirplusResult | None:
        """The page from the kept listing; None when there is none, or `cookie` is not from the page before."""
        if self._known is None:
            return None
        last = self._page.entries[-1] if cookie and self._page is not None and self._page.entries else None
        if cookie and (last is None or last.cookie != cookie):
            return None
        listings = self._directories.listings
        entries = listings.after(self._known.number, last.name if last is not None else None, PAGE_ENTRIES)
        if not entries:
            return None  # it was replaced meanwhile
        self.seen_at, self.fresh = self._known.seen_at, False
        more = listings.after(self._known.number, entries[-1].name, 1)
        return nfs3.ReaddirplusResult(nfs3.NFS3_OK, None, self._verifier, entries, not more)

    def _keep(self, cookie: int, page: nfs3.ReaddirplusResult) -> None:
        """Keep what is read in one go from the first to the last page, all of one version."""
        listings = self._directories.listings
        if not cookie:
            self._give_up()
            self._number, self._place = listings.begin(), 0
        if self._number is None:
            return
        in_order = not cookie or (self._page is not None and self._page.entries[-1].cookie == cookie)
        if not in_order or page.attr is None or version(page.attr) != self._started or self._started is None:
            self._give_up()
            return
        listings.add(self._number, self._place, page.entries)
        self._place += len(page.entries)
        if page.eof:
            for name in self.stale:
                listings.blur(self._number, name)
            self._directories.keep(self.inode, self._number, self._started, self.seen_at)
            self._number = None

    def _find(self, cookie: int) -> int | None:
        assert self._page is not None
        entries = self._page.entries
        for i in itertools.chain(range(self._next, len(entries)), range(self._next)):
            if entries[i].cookie == cookie:
                return i
        return None

    async def _fetch(self, cookie: int) -> nfs3.ReaddirplusResult:
        client, fh = self._client, self.inode.fh
        self.seen_at, self.fresh = time.monotonic(), True
        if not cookie:
            # Of before the first page: attributes that come with it may be of after a change that it does not have.
            self._started = version(self.inode.attr) if self.inode.attr is not None else None
        try:
            page = await self._untold(cookie)
        except NfsError as error:
            if error.status == nfs3.NFS3ERR_BAD_COOKIE and cookie:
                # The directory changed and this server then refuses its verifier; its cookies mostly still hold.
                self._verifier = bytes(nfs3.COOKIEVERFSIZE)
                page = await self._untold(cookie)
            elif error.status == nfs3.NFS3ERR_NOTSUPP:
                plain = await client.readdir(self._cred, fh, cookie, self._verifier)
                entries = [DirEntryPlus(e.fileid, e.name, e.cookie, None, None) for e in plain.entries]
                page = nfs3.ReaddirplusResult(plain.status, plain.attr, plain.verifier, entries, plain.eof)
            else:
                raise
        page = page._replace(entries=await self._completed(page.entries))
        try:
            self._keep(cookie, page)
        except NoRoom as error:
            log.info("a listing is not kept: %s", error)
            self._number = None
        return page

    async def _ask(self, cookie: int, verifier: bytes) -> nfs3.ReaddirplusResult:
        """A page. NFS-Ganesha may say that the directory is stale, or not there, when one of its names goes meanwhile.

        (It looks each name up, and says of the directory what it finds: 5 times in 11 million calls of 8 programs.)
        GETATTR tells whether it is so. NOENT must not be passed on: the C library takes it for the end of a directory.
        """
        for _ in range(GONE_TRIES):
            try:
                return await self._client.readdirplus(self._cred, self.inode.fh, cookie, verifier)
            except NfsError as error:
                if error.status not in (nfs3.NFS3ERR_STALE, nfs3.NFS3ERR_NOENT):
                    raise
                log.info("listing: the server answered %s", error)
                self._directories.doubt(self.inode)
            await self._client.getattr(self._cred, self.inode.fh)
        raise OSError(errno.EIO, "the server says of a directory that it is gone, and that it is not")

    async def _untold(self, cookie: int) -> nfs3.ReaddirplusResult:
        """The page after `cookie` without the names that were told before.

        A page of such names only is of a server that began anew: then the whole directory is asked for what is left.
        """
        at, verifier, times_begun, asked = cookie, self._verifier, 0, {cookie}
        while True:
            page = await self._ask(at, verifier)
            entries = [entry for entry in page.entries if entry.name not in self._told]
            if len(entries) == len(page.entries):
                return page
            self._directories.doubt(self.inode)
            if entries or page.eof:
                return page._replace(entries=entries)
            at, verifier = page.entries[-1].cookie, page.verifier
            if not times_begun or at in asked:
                if times_begun == GONE_TRIES:
                    raise OSError(errno.EIO, "the server lists a directory in a circle")
                at, verifier, times_begun, asked = 0, bytes(nfs3.COOKIEVERFSIZE), times_begun + 1, set()
            asked.add(at)

    async def _names_until(self, cookie: int) -> set[bytes]:
        """The names that a listing told until then.

        Empty when the entry is gone: then all before it may be gone too, as `rm -r` has it.
        """
        names: set[bytes] = set()
        at, verifier = 0, bytes(nfs3.COOKIEVERFSIZE)
        try:
            while len(names) < MOST_TOLD:
                page = await self._client.readdir(self._cred, self.inode.fh, at, verifier)
                for entry in page.entries:
                    names.add(entry.name)
                    if entry.cookie == cookie:
                        return names
                if page.eof or not page.entries:
                    break
                at, verifier = page.entries[-1].cookie, page.verifier
        except NfsError as error:
            log.info("listing: what was told before is not known: %s", error)
        return set()

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
                    attr = found.attr
                    if attr is None and found.fh is not None:
                        attr = await self._client.getattr(self._cred, found.fh)
                except NfsError as error:
                    log.debug("listing: %s", error)
                    return
                completed[i] = entry._replace(fh=found.fh, attr=attr)

        async with open_nursery() as nursery:
            for i in bare:
                nursery.start_soon(look_up, i)
        return completed
