"""What a mount could not write before it ended: read from the state it left, and written to the server later.

The state is a directory as a daemon leaves it: open handles, identities, dirty log. Each piece that the server has
taken is marked in the log, so that an interrupted recovery goes on where it ended.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client
from efcfs.nfs.rpc import Credential
from efcfs.vfs.dirtylog import DirtyLog, Left
from efcfs.vfs.errors import SERVER_ERRORS, errno_of
from efcfs.vfs.handles import Handles
from efcfs.vfs.inodes import Inodes


class File(NamedTuple):
    """A file with unwritten bytes, each piece in the name of who wrote it. `path`: where it was last seen."""

    path: str
    fh: bytes
    pieces: list[tuple[Left, Credential]]

    @property
    def length_bytes(self) -> int:
        return sum(left.record.length_bytes for left, _ in self.pieces)


class Unwritten:
    """All that one mount left."""

    def __init__(self, log: DirtyLog, files: list[File]) -> None:
        self.files = files
        self._log = log

    async def write(self, client: Client, file: File) -> str | None:
        """Write a file's bytes in the order in which they were written. Returns what went wrong."""
        for left, cred in file.pieces:
            offset, data = left.offset, left.record.bytes(0, left.record.length_bytes)
            try:
                while data:
                    piece = data[: client.wsize]
                    result = await client.write(cred, file.fh, offset, [piece], len(piece), nfs3.FILE_SYNC)
                    offset += result.count
                    data = data[result.count :]
            except SERVER_ERRORS as error:
                return os.strerror(errno_of(error))
            self._log.done(left.record, left.record.length_bytes)
        return None

    def save(self, file: File, directory: Path) -> Path:
        """Write a file's bytes to a local file, at their own offsets. Raises OSError."""
        path = directory / file.path.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "r+b" if path.exists() else "w+b") as target:
            for left, _ in file.pieces:
                target.seek(left.offset)
                target.write(left.record.bytes(0, left.record.length_bytes))
            target.flush()
            os.fsync(target.fileno())
        for left, _ in file.pieces:
            self._log.done(left.record, left.record.length_bytes)
        return path


@contextmanager
def open_unwritten(state_dir: Path, root_fh: bytes) -> Iterator[Unwritten]:
    """Raises OSError, `handles.OtherVersion`."""
    handles, inodes = Handles(state_dir), Inodes(state_dir, root_fh)
    log = DirtyLog(state_dir / "dirty", 0)
    try:
        slots = {slot.number: slot for slot in handles}
        files: dict[int, File] = {}
        for left in log.left():
            slot = slots.get(left.handle)
            try:
                if slot is None:
                    raise KeyError(left.handle)
                inode = inodes.get(slot.ino)
            except KeyError:
                # Of a file that nobody knows any more: it can only be saved.
                key, path, fh, cred = -left.handle, f"unknown-{left.handle}", b"", Credential(0, 0, ())
            else:
                key, path, fh, cred = slot.ino, os.fsdecode(inodes.path(inode)), inode.fh, slot.cred
            files.setdefault(key, File(path, fh, [])).pieces.append((left, cred))
        yield Unwritten(log, list(files.values()))
    finally:
        inodes.close()
        handles.close()
