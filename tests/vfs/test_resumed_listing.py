"""Listings of a server that begins anew in their middle: the test is the server."""

import random
from collections import Counter
from pathlib import Path

import pytest
import trio

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError
from efcfs.nfs.rpc import Credential
from efcfs.vfs.dirtylog import DirtyLog
from efcfs.vfs.filesystem import FileSystem, FilesystemOptions
from efcfs.vfs.handles import Handles, Request
from efcfs.vfs.inodes import ROOT_INO, Inodes

CRED = Credential(0, 0, ())
LAST_COOKIE = 2**31 - 1
MOVING = b"name-4"
NAMES = [b".", b"..", *(b"name-%d" % i for i in range(6))]


class Server(Client):
    """Pages of four entries. After the last cookie it begins anew, without the dots and the entry of that cookie."""

    def __init__(self) -> None:
        self.root_fh, self.max_file_bytes = b"root", 2**40

    @property
    def away(self) -> bool:
        return False

    async def access(
        self, cred: Credential, fh: bytes, access: int, *, impatient: bool = False
    ) -> nfs3.AccessResult:
        return nfs3.AccessResult(nfs3.NFS3_OK, attributes(nfs3.NF3DIR, 1), access)

    async def readdirplus(
        self, cred: Credential, fh: bytes, cookie: int, cookieverf: bytes
    ) -> nfs3.ReaddirplusResult:
        cookies = [*range(1, len(NAMES)), LAST_COOKIE]
        entries = [entry(name, here) for name, here in zip(NAMES, cookies, strict=True)]
        if cookie == LAST_COOKIE:
            page, eof = entries[2:-1], True
        else:
            at = cookies.index(cookie) + 1 if cookie else 0
            page, eof = entries[at : at + 4], at + 4 >= len(entries)
        return nfs3.ReaddirplusResult(nfs3.NFS3_OK, attributes(nfs3.NF3DIR, 1), bytes(8), page, eof)

    async def readdir(self, cred: Credential, fh: bytes, cookie: int, verifier: bytes) -> nfs3.ReaddirResult:
        page = await self.readdirplus(cred, fh, cookie, verifier)
        entries = [nfs3.DirEntry(entry.fileid, entry.name, entry.cookie) for entry in page.entries]
        return nfs3.ReaddirResult(page.status, page.attr, page.verifier, entries, page.eof)


class Lively(Server):
    """A name is replaced all the time, by RENAME, and comes first then.

    Now and then it forgets the directory, and begins anew until it is asked for the beginning.
    """

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng, self.knows = rng, True
        self.cookies = {name: cookie for cookie, name in enumerate(NAMES, 1)}

    async def readdirplus(
        self, cred: Credential, fh: bytes, cookie: int, cookieverf: bytes
    ) -> nfs3.ReaddirplusResult:
        entries = [entry(name, here) for name, here in self.cookies.items()]
        self.knows = not cookie or (self.knows and self.rng.random() < 0.9)
        if self.knows and cookie in self.cookies.values():
            rest = entries[[entry.cookie for entry in entries].index(cookie) + 1 :]
        else:
            rest = [entry for entry in entries if entry.cookie != cookie]
        page = rest[: self.rng.randrange(1, 5)]
        del self.cookies[MOVING]
        self.cookies = {MOVING: max(self.cookies.values()) + self.rng.randrange(1, 3), **self.cookies}
        return nfs3.ReaddirplusResult(
            nfs3.NFS3_OK, attributes(nfs3.NF3DIR, 1), bytes(8), page, len(page) == len(rest)
        )


class Forgetful(Server):
    """Says once, in the middle, that the directory is stale."""

    def __init__(self, *, forgets: bool) -> None:
        super().__init__()
        self.forgets = forgets

    async def getattr(self, cred: Credential, fh: bytes, *, impatient: bool = False) -> nfs3.Fattr:
        return attributes(nfs3.NF3DIR, 1)

    async def readdirplus(
        self, cred: Credential, fh: bytes, cookie: int, cookieverf: bytes
    ) -> nfs3.ReaddirplusResult:
        if self.forgets and cookie:
            self.forgets = False
            raise NfsError(nfs3.NFS3ERR_STALE, "READDIRPLUS")
        return await super().readdirplus(cred, fh, cookie, cookieverf)


def entry(name: bytes, cookie: int) -> nfs3.DirEntryPlus:
    fileid = 10 + NAMES.index(name)
    return nfs3.DirEntryPlus(fileid, name, cookie, attributes(nfs3.NF3REG, fileid), name)


def attributes(kind: int, fileid: int) -> nfs3.Fattr:
    return nfs3.Fattr(kind, 0o755, 1, 0, 0, 10, 10, 0, 0, 1, fileid, 1, 1, 1)


async def listed(server: Server, state: Path, cookie: int) -> tuple[list[bytes], bool]:
    """What follows `cookie`, and whether it was kept."""
    inodes, handles, dirty = Inodes(state, b"root"), Handles(state), DirtyLog(state / "dirty", 0)
    try:
        async with trio.open_nursery() as nursery:
            fs = FileSystem(server, FilesystemOptions(), inodes, handles, dirty, nursery, None)
            number = await fs.opendir(ROOT_INO, CRED, Request(2, True))
            found = []
            while entries := await fs.readdir(number, cookie, 100):
                found += [entry.name for entry in entries]
                assert len(found) < 1000
                cookie = entries[-1].cookie
            nursery.cancel_scope.cancel()
        return found, inodes.listings.directory(b"root") is not None
    finally:
        handles.close()
        inodes.close()


@pytest.mark.parametrize("place", range(len(NAMES)))
def test_what_follows_a_place_in_a_directory_is_told_once(tmp_path: Path, place: int) -> None:
    cookie = LAST_COOKIE if place == len(NAMES) - 1 else place + 1
    found, _ = trio.run(listed, Server(), tmp_path, cookie)
    assert found == NAMES[place + 1 :]


@pytest.mark.parametrize("seed", range(100))
def test_each_name_is_told_once_by_a_server_that_begins_anew_while_names_move(tmp_path: Path, seed: int) -> None:
    """The one that moves may be missed, as by any file system."""
    found, _ = trio.run(listed, Lively(random.Random(seed)), tmp_path, 0)
    assert Counter(found) | Counter([MOVING]) == Counter(NAMES)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_listing_whose_place_the_server_forgot_is_not_kept(tmp_path: Path, forgets: bool) -> None:
    """It may lack names, which would then be told not to be there."""
    _, kept = trio.run(listed, Forgetful(forgets=forgets), tmp_path, 0)
    assert kept is not forgets
