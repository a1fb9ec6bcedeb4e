"""A listing that another daemon goes on with, of a server that begins anew: the test is the server."""

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
        entries = [
            nfs3.DirEntryPlus(i, name, here, attributes(nfs3.NF3REG, i), name)
            for i, (name, here) in enumerate(zip(NAMES, cookies, strict=True), 10)
        ]
        if cookie == LAST_COOKIE:
            page, eof = entries[2:-1], True
        else:
            at = cookies.index(cookie) + 1 if cookie else 0
            page, eof = entries[at : at + 4], at + 4 >= len(entries)
        return nfs3.ReaddirplusResult(nfs3.NFS3_OK, attributes(nfs3.NF3DIR, 1), bytes(8), page, eof)


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


def attributes(kind: int, fileid: int) -> nfs3.Fattr:
    return nfs3.Fattr(kind, 0o755, 1, 0, 0, 10, 10, 0, 0, 1, fileid, 1, 1, 1)


@pytest.mark.parametrize("place", range(len(NAMES)))
def test_what_follows_a_place_in_a_directory_is_told_once(tmp_path: Path, place: int) -> None:
    async def run() -> list[bytes]:
        inodes, handles, dirty = Inodes(tmp_path, b"root"), Handles(tmp_path), DirtyLog(tmp_path / "dirty", 0)
        async with trio.open_nursery() as nursery:
            fs = FileSystem(Server(), FilesystemOptions(), inodes, handles, dirty, nursery, None)
            number = await fs.opendir(ROOT_INO, CRED, Request(2, True))
            found, cookie = [], LAST_COOKIE if place == len(NAMES) - 1 else place + 1
            while entries := await fs.readdir(number, cookie, 100):
                found += [entry.name for entry in entries]
                cookie = entries[-1].cookie
            nursery.cancel_scope.cancel()
        handles.close()
        inodes.close()
        return found

    assert trio.run(run) == NAMES[place + 1 :]


@pytest.mark.parametrize("forgets", [False, True])
def test_a_listing_whose_place_the_server_forgot_is_not_kept(tmp_path: Path, forgets: bool) -> None:
    """It may lack names, which would then be told not to be there."""

    async def run() -> bool:
        inodes, handles, dirty = Inodes(tmp_path, b"root"), Handles(tmp_path), DirtyLog(tmp_path / "dirty", 0)
        async with trio.open_nursery() as nursery:
            fs = FileSystem(Forgetful(forgets=forgets), FilesystemOptions(), inodes, handles, dirty, nursery, None)
            number = await fs.opendir(ROOT_INO, CRED, Request(2, False))
            cookie = 0
            while entries := await fs.readdir(number, cookie, 100):
                cookie = entries[-1].cookie
            nursery.cancel_scope.cancel()
        kept = inodes.listings.directory(b"root") is not None
        handles.close()
        inodes.close()
        return kept

    assert trio.run(run) is not forgets
