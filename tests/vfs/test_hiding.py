"""A file is not opened while its hidden name is being removed: the server answers when the test lets it."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import NamedTuple

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

    async def rmdir(
        self, cred: Credential, dir_fh: bytes, name: bytes, *, again: bool = False
    ) -> nfs3.RemoveResult:
        self.asked.append("RMDIR")
        return nfs3.RemoveResult(nfs3.NFS3_OK, nfs3.Wcc(None, None))

    async def _served(self, procedure: str) -> nfs3.Fattr:
        self.asked.append(procedure)
        await self.answer.wait()
        if self.gone:
            raise NfsError(nfs3.NFS3ERR_STALE, procedure)
        return attributes(nfs3.NF3REG, 1234)


def attributes(kind: int, fileid: int) -> nfs3.Fattr:
    return nfs3.Fattr(kind, 0o644, 1, 0, 0, 10, 10, 0, 0, 1, fileid, 1, 1, 1)


class Left(NamedTuple):
    """What a daemon finds that adopts: the hidden name, the last in its directory, of a file that nobody has open."""

    server: Server
    fs: FileSystem
    inodes: Inodes
    directory: int
    file: int


@contextlib.asynccontextmanager
async def left(directory: Path) -> AsyncIterator[Left]:
    server = Server()
    inodes, handles, dirty = Inodes(directory, b"root"), Handles(directory), DirtyLog(directory / "dirty", 0)
    (parent,) = inodes.enter([Found(ROOT_INO, b"directory", b"directory", attributes(nfs3.NF3DIR, 1233))])
    (file,) = inodes.enter([Found(parent.ino, b"file", b"file", attributes(nfs3.NF3REG, 1234))])
    inodes.hidden(file.ino, parent.ino, HIDDEN)
    async with trio.open_nursery() as nursery:
        fs = FileSystem(server, FilesystemOptions(), inodes, handles, dirty, nursery, None)
        fs.adopt()
        await wait_all_tasks_blocked()
        yield Left(server, fs, inodes, parent.ino, file.ino)
        nursery.cancel_scope.cancel()
    handles.close()
    inodes.close()


async def opened(found: Left) -> str:
    """What becomes of an open(2) that died with the daemon before and comes again."""
    try:
        await found.fs.open(found.file, os.O_RDONLY, CRED, Request(2, True))
    except NfsError as error:
        return nfs3.STATUS_NAMES[error.status]
    return "opened"


def test_who_opens_a_file_while_a_left_name_is_removed_learns_that_it_is_gone(tmp_path: Path) -> None:
    clock, told = MockClock(), list[str]()

    async def run() -> None:
        async with left(tmp_path) as found, trio.open_nursery() as nursery:
            clock.jump(RUSH_S)
            await wait_all_tasks_blocked()
            nursery.start_soon(lambda: into(told, opened(found)))
            await wait_all_tasks_blocked()
            assert found.server.asked == ["REMOVE"], "it is asked for while it is being removed"
            found.server.answer.set()
            await wait_all_tasks_blocked()
            assert found.inodes.hidden_name(found.file) is None

    trio.run(run, clock=clock)
    assert told == ["NFS3ERR_STALE"]


def test_a_left_name_of_a_file_that_is_opened_first_stays_until_last_close(tmp_path: Path) -> None:
    clock, told = MockClock(), list[str]()

    async def run() -> None:
        async with left(tmp_path) as found, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: into(told, opened(found)))
            await wait_all_tasks_blocked()
            clock.jump(RUSH_S)
            await wait_all_tasks_blocked()
            assert found.server.asked == ["ACCESS"], "it is removed while it is asked for"
            found.server.answer.set()
            await wait_all_tasks_blocked()
            file = found.inodes.get(found.file).open_file
            assert file is not None and file.sillyname == (found.directory, HIDDEN)

    trio.run(run, clock=clock)
    assert told == ["opened"]


def test_a_left_name_does_not_keep_its_directory_from_being_removed(tmp_path: Path) -> None:
    async def run() -> None:
        async with left(tmp_path) as found:
            found.server.answer.set()
            await found.fs.names.rmdir(ROOT_INO, b"directory", CRED, Request(4, True))
            assert found.server.asked == ["REMOVE", "RMDIR"]

    trio.run(run, clock=MockClock())


async def into(told: list[str], end: Awaitable[str]) -> None:
    told.append(await end)
