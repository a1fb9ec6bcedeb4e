"""What the kernel is told, and when, with the real server and a kernel that takes its time."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from efcfs.nfs.client import own_credential
from efcfs.nfs.connect import ServerOptions, connect
from efcfs.vfs.filesystem import FileSystem, FilesystemOptions, open_filesystem
from efcfs.vfs.handles import Request
from efcfs.vfs.inodes import ROOT_INO
from tests.bed import Ganesha

CRED = own_credential()


class SlowKernel:
    """Drops pages when it is allowed to."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.may = trio.Event()

    def drop_attributes(self, ino: int) -> None: ...

    async def drop_pages(self, ino: int) -> None:
        self.asked.set()
        await self.may.wait()

    def store_pages(self, ino: int, data: bytes) -> None: ...


@asynccontextmanager
async def two_clients(server: Ganesha, tmp_path: Path) -> AsyncIterator[list[FileSystem]]:
    options = ServerOptions("127.0.0.1", port=server.port, mountport=server.mount_port)
    for name in "ab":
        (tmp_path / name).mkdir()
    async with connect(options, server.export) as one, connect(options, server.export) as two:
        async with open_filesystem(one, FilesystemOptions(), tmp_path / "a", None) as a:
            async with open_filesystem(two, FilesystemOptions(), tmp_path / "b", None) as b:
                yield [a, b]


async def found(fs: FileSystem, export: Path) -> int:
    directory = await fs.names.lookup(ROOT_INO, export.name.encode(), CRED)
    return (await fs.names.lookup(directory.ino, b"file", CRED)).ino


@pytest.mark.parametrize("operation", ["getattr", "lookup", "open", "readdir"])
def test_an_answer_with_changed_attributes_waits_for_the_pages_that_it_makes_wrong(
    server: Ganesha, export: Path, tmp_path: Path, operation: str
) -> None:
    (export / "file").write_bytes(b"12345")

    async def asked(fs: FileSystem, ino: int, answered: trio.Event) -> None:
        directory = (await fs.names.lookup(ROOT_INO, export.name.encode(), CRED)).ino
        if operation == "getattr":
            fs.attributes.expire(fs._inodes.get(ino))
            assert (await fs.getattr(ino, CRED)).attr.size == 9  # type: ignore[union-attr]
        elif operation == "lookup":
            entry = await fs.names.lookup(directory, b"file", CRED)
            assert entry.attr is not None and entry.attr.size == 9
        elif operation == "open":
            await fs.open(ino, os.O_RDONLY, CRED, Request(4, False, 7))
        else:
            listing = await fs.opendir(directory, CRED, Request(6, False, 7))
            (listed,) = [e for e in await fs.readdir(listing, 0, 10) if e.name == b"file"]
            assert listed.entry is not None and listed.entry.attr is not None and listed.entry.attr.size == 9
        answered.set()

    async def run() -> None:
        async with two_clients(server, tmp_path) as (a, b):
            kernel = SlowKernel()
            a.attach(kernel)
            ino = await found(a, export)
            await a.open(ino, os.O_RDONLY, CRED, Request(2, False, 7))
            theirs = await found(b, export)
            handle = (await b.open(theirs, os.O_WRONLY, CRED, Request(2, False, 7))).handle
            await b.write(handle, 5, memoryview(b"6789"))
            await b.flush(handle)
            answered = trio.Event()
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(asked, a, ino, answered)
                    await kernel.asked.wait()
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    assert a.getattr_at_once(ino) is None
                    assert not answered.is_set()
                    kernel.may.set()
                    await answered.wait()

    trio.run(run)
