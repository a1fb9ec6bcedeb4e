"""The handles that programs hold open, in a file under /dev/shm: a daemon that starts later goes on with them.

One slot a handle, of fixed size, written through a mapping (1 µs) before the kernel is told the handle's
number. A slot counts once its number is in it, and that is written last, so a daemon may be killed at any
moment. Numbers are never given twice: a RELEASE that is repeated after a crash must not hit another file.

The file begins with the version of all state that one daemon leaves to the next: this file's, the identities' and
the dirty log's. A daemon of another version does not touch them. This module knows slots and no files.
"""

import logging
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from efcfs.nfs.rpc import MAX_GROUPS, Credential

log = logging.getLogger(__name__)

STATE_VERSION = 1
MAGIC = b"efcfs\0st"

SLOT_BYTES = 128
SLOTS_AT_ONCE = 512
# Magic, version, number last given, a random number of this mount.
_HEAD = struct.Struct("<8sQQQ")
_LAST = struct.Struct("<Q")
_LAST_AT = 16
# After the handle's number: unique, ino, flags, error, is a directory, uid, gid, count of groups, the groups.
_SLOT = struct.Struct(f"<QQII?IIB{MAX_GROUPS}I")
_NUMBER = struct.Struct("<Q")
_ERROR = struct.Struct("<I")
_ERROR_AT = _NUMBER.size + 20
FREE = 0


class OtherVersion(Exception):
    """The state was left by a daemon that keeps it in another way; str() says which."""


class Request(NamedTuple):
    """What of the kernel's request matters when a daemon may have died over it.

    `unique`: its number. `again`: a daemon before this one took it, and may have done it before it died.
    `thread`: who waits for it, as the kernel numbers threads.
    """

    unique: int
    again: bool
    thread: int = 0


class Slot(NamedTuple):
    """An open handle. `unique` is the request that opened it, `error` the errno that it has yet to report."""

    number: int
    unique: int
    ino: int
    flags: int
    error: int
    is_directory: bool
    cred: Credential


def check_version(directory: Path) -> None:
    """Raises OtherVersion when the state there cannot be gone on with."""
    try:
        with open(directory / "handles", "rb") as file:
            magic, version, _, _ = _HEAD.unpack(file.read(_HEAD.size))
    except FileNotFoundError:
        return
    except struct.error:
        raise OtherVersion("the mount's state is damaged") from None
    if magic != MAGIC or version != STATE_VERSION:
        raise OtherVersion(f"the mount's state is of version {version}, this efcfs has {STATE_VERSION}")


class Handles:
    """The table of one mount. Raises OtherVersion, OSError."""

    def __init__(self, directory: Path) -> None:
        check_version(directory)
        path = directory / "handles"
        if not path.exists():
            fresh = directory / "handles.new"
            fresh.write_bytes(_HEAD.pack(MAGIC, STATE_VERSION, 0, int.from_bytes(os.urandom(8), "little")))
            fresh.rename(path)
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._map = self._mapped(max(os.fstat(self._fd).st_size, SLOT_BYTES * SLOTS_AT_ONCE))
        self._last: int
        self.nonce: int  # a random number of this mount
        _, _, self._last, self.nonce = _HEAD.unpack_from(self._map)
        self._at: dict[int, int] = {}
        self._free: list[int] = []
        for at in range(SLOT_BYTES, len(self._map), SLOT_BYTES):
            (number,) = _NUMBER.unpack_from(self._map, at)
            if number == FREE:
                self._free.append(at)
            else:
                self._at[number] = at

    def close(self) -> None:
        self._map.close()
        os.close(self._fd)

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, number: int) -> bool:
        return number in self._at

    def __iter__(self) -> Iterator[Slot]:
        for number, at in list(self._at.items()):
            unique, ino, flags, error, is_directory, uid, gid, count, *groups = _SLOT.unpack_from(
                self._map, at + _NUMBER.size
            )
            yield Slot(number, unique, ino, flags, error, is_directory, Credential(uid, gid, tuple(groups[:count])))

    def number(self) -> int:
        """A new number, for a handle that need not outlive the daemon too."""
        self._last += 1
        _LAST.pack_into(self._map, _LAST_AT, self._last)
        return self._last

    def add(self, unique: int, ino: int, flags: int, cred: Credential, *, is_directory: bool = False) -> int:
        """Note a new handle and return its number. Without room for it the next daemon will not know it."""
        number = self.number()
        if not self._free and not self._grow():
            return number
        at = self._free.pop()
        groups = cred.groups[:MAX_GROUPS]
        _SLOT.pack_into(
            self._map, at + _NUMBER.size, unique, ino, flags, 0, is_directory, cred.uid, cred.gid, len(groups),
            *groups, *(0,) * (MAX_GROUPS - len(groups)),
        )  # fmt: skip
        _NUMBER.pack_into(self._map, at, number)
        self._at[number] = at
        return number

    def remove(self, number: int) -> None:
        at = self._at.pop(number, None)
        if at is not None:
            _NUMBER.pack_into(self._map, at, FREE)
            self._free.append(at)

    def set_error(self, number: int, error: int) -> None:
        """What the next fsync or close has to report, should it come to another daemon; 0: nothing."""
        at = self._at.get(number)
        if at is not None:
            _ERROR.pack_into(self._map, at + _ERROR_AT, error)

    def _grow(self) -> bool:
        size = len(self._map)
        try:
            bigger = self._mapped(size + SLOT_BYTES * SLOTS_AT_ONCE)
        except OSError as error:
            log.warning("no room in /dev/shm for open handles, a new daemon will not know them: %s", error.strerror)
            return False
        self._map.close()
        self._map = bigger
        self._free.extend(range(size, len(bigger), SLOT_BYTES))
        return True

    def _mapped(self, size_bytes: int) -> mmap.mmap:
        # Memory that is not there when it is written to would end the daemon with SIGBUS.
        os.posix_fallocate(self._fd, 0, size_bytes)
        return mmap.mmap(self._fd, size_bytes)
