"""Opening files, by daemons that follow each other over the state of one mount, with the real server."""

import errno
import os
from pathlib import Path

import pytest
import trio

from efcfs.nfs.client import own_credential
from efcfs.nfs.connect import ServerOptions, connect
from efcfs.vfs.filesystem import FilesystemOptions, open_filesystem
from efcfs.vfs.handles import Request
from efcfs.vfs.inodes import ROOT_INO
from tests.bed import Ganesha


def test_an_open_that_one_daemon_has_sent_to_look_its_file_up_again_is_let_through_by_the_next(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    """The kernel walks a path again only once: the second ESTALE would be the program's."""
    (export / "file").write_bytes(b"12345")
    cred, state_dir = own_credential(), tmp_path / "state"
    state_dir.mkdir()

    async def looked_up() -> int:
        async with connect(options, server.export) as client:
            async with open_filesystem(client, FilesystemOptions(), state_dir, None) as fs:
                directory = await fs.names.lookup(ROOT_INO, export.name.encode(), cred)
                return (await fs.names.lookup(directory.ino, b"file", cred)).ino

    async def opened(ino: int, unique: int) -> None:
        async with connect(options, server.export) as client:
            async with open_filesystem(client, FilesystemOptions(), state_dir, None) as fs:
                await fs.open(ino, os.O_WRONLY | os.O_APPEND, cred, Request(unique, False))

    options = ServerOptions("127.0.0.1", port=server.port, mountport=server.mount_port)
    ino = trio.run(looked_up)
    with pytest.raises(OSError) as told:
        trio.run(opened, ino, 2)
    assert told.value.errno == errno.ESTALE
    trio.run(opened, ino, 4)
