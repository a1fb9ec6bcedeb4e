"""A file is not opened while its hidden name is being removed: the server answers when the test lets it."""

import os
from functools import partial
from pathlib import Path

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError
from efcfs.nfs.rpc import Credential
from efcfs.vfs.dirtylog import DirtyLog
from efcfs.vfs.filesystem import RUSH_S, FileSystem, FilesystemOptions
from efcfs.vfs.handles import Handles, Request
from efcfs.vfs.inodes import ROOT_INO, Found, Inodes

CRED = Credential(0, 0, ())
HIDDEN = b".nfs1"


class Server(Client):
    """One file, whose only name is hidden. `asked` has what it was asked; an answer comes after `answer`."""

    def __init__(self) -> None:
        self.root_fh, self.max_file_bytes = b"root", 2**40
        self.asked: list[str] = []
        self.answer = trio.Event()
        self.gone = False

    @property
    def away(self) -> bool:
        return False

    async def access(
        self, cred: Credential, fh: bytes, access: int, *, impatient: bool = False
    ) -> nfs3.AccessResult:
        return nfs3.AccessResult(nfs3.NFS3_OK, await self._served("ACCESS"), access)

    async def remove(
        self, cred: Credential, dir_fh: bytes, name: bytes, *, again: bool = False
    ) -> nfs3.RemoveResult:
        await self._served("REMOVE")
        self.gone = True
        return nfs3.RemoveResult(nfs3.NFS3_OK, nfs3.Wcc(None, None))

    async def _served(self, procedure: str) -> nfs3.Fattr:
        self.asked.append(procedure)
        await self.answer.wait()
        if self.gone:
            raise NfsError(nfs3.NFS3ERR_STALE, procedure)
        return attributes(1234)


def attributes(fileid: int) -> nfs3.Fattr:
    return nfs3.Fattr(nfs3.NF3REG, 0o644, 1, 0, 0, 10, 10, 0, 0, 1, fileid, 1, 1, 1)


async def opened_by_the_next_daemon(directory: Path, clock: MockClock, *, opens_first: bool) -> str:
    """What becomes of an open(2) that the next daemon gets again, before it removes what was left or meanwhile."""
    server = Server()
    inodes, handles, dirty = Inodes(directory, b"root"), Handles(directory), DirtyLog(directory / "dirty", 0)
    (inode,) = inodes.enter([Found(ROOT_INO, b"file", b"file", attributes(1234))])
    inodes.hidden(inode.ino, ROOT_INO, HIDDEN)
    told: list[str] = []
    async with trio.open_nursery() as nursery:
        fs = FileSystem(server, FilesystemOptions(), inodes, handles, dirty, nursery, None)

        async def open_it() -> None:
            try:
                await fs.open(inode.ino, os.O_RDONLY, CRED, Request(2, True))
                told.append("opened")
            except NfsError as error:
                told.append(nfs3.STATUS_NAMES[error.status])

        fs.adopt()
        if opens_first:
            nursery.start_soon(open_it)
        await wait_all_tasks_blocked()
        clock.jump(RUSH_S)
        await wait_all_tasks_blocked()
        if not opens_first:
            nursery.start_soon(open_it)
            await wait_all_tasks_blocked()
        assert len(server.asked) == 1, "REMOVE and ACCESS are under way at the same time"
        server.answer.set()
        await wait_all_tasks_blocked()
        file = inodes.get(inode.ino).open_file
        if file is not None:  # the name goes at last close
            assert told == ["opened"] and file.sillyname == inodes.hidden_name(inode.ino) == (ROOT_INO, HIDDEN)
        else:
            assert server.gone and inodes.hidden_name(inode.ino) is None
        nursery.cancel_scope.cancel()
    handles.close()
    inodes.close()
    return told[0]


def run(directory: Path, *, opens_first: bool) -> str:
    clock = MockClock()
    return trio.run(partial(opened_by_the_next_daemon, directory, clock, opens_first=opens_first), clock=clock)


def test_who_opens_a_file_while_a_left_name_is_removed_learns_that_it_is_gone(tmp_path: Path) -> None:
    assert run(tmp_path, opens_first=False) == "NFS3ERR_STALE"


def test_a_left_name_of_a_file_that_is_opened_first_stays_until_last_close(tmp_path: Path) -> None:
    assert run(tmp_path, opens_first=True) == "opened"
