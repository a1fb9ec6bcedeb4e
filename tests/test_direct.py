"""What is served past libfuse: the structs of <linux/fuse.h>."""

import errno
import os
import struct
from types import SimpleNamespace
from typing import NoReturn, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from efcfs.fuse.callers import Callers
from efcfs.fuse.direct import Asked, requests
from efcfs.fuse.interrupts import FUSE_READDIRPLUS, FUSE_RENAME2, unwanted
from efcfs.nfs import nfs3
from efcfs.nfs.nfs3 import Fattr, Sattr
from efcfs.nfs.rpc import Credential
from efcfs.vfs.entries import Entry
from efcfs.vfs.filesystem import FileSystem

FUSE_SETATTR = 4
# struct fuse_setattr_in: valid, fh, size, lock_owner, atime, mtime, ctime, their nanoseconds, mode, uid, gid
SETATTR_IN = struct.Struct("<I4xQQQqqqIIII4xII4x")
MODE, UID, GID, SIZE, ATIME, MTIME, FH, ATIME_NOW, MTIME_NOW = (1 << bit for bit in range(9))
U32 = st.integers(0, 2**32 - 1)
U63 = st.integers(0, 2**63 - 1)
SECONDS = st.integers(-(2**31), 2**34)
NANOSECONDS = st.integers(0, 999_999_999)


def asked_of_the_file_system(body: bytes) -> tuple[Sattr, int | None]:
    """What SETATTR asks it for."""
    seen: list[tuple[Sattr, int | None]] = []

    async def setattr_(ino: int, cred: Credential, sattr: Sattr, handle: int | None) -> Entry:
        seen.append((sattr, handle))
        return Entry(ino, 0, Fattr(1, 0, 1, 0, 0, 0, 0, 0, 0, 0, ino, 0, 0, 0), 0.0, 0.0)

    served = requests(cast(FileSystem, SimpleNamespace(setattr=setattr_)), Callers())[FUSE_SETATTR]
    trio.run(served.later, Asked(FUSE_SETATTR, 2, 5, 0, 0, 0), body)
    return seen[0]


@given(st.integers(0, 2**9 - 1), U63, U63, SECONDS, SECONDS, NANOSECONDS, NANOSECONDS, U32, U32, U32)
def test_setattr_asks_for_what_the_kernel_says_and_for_no_more(
    valid: int, fh: int, size: int, atime_s: int, mtime_s: int, atime_ns: int, mtime_ns: int, mode: int, uid: int,
    gid: int,
) -> None:  # fmt: skip
    body = SETATTR_IN.pack(valid, fh, size, 7, atime_s, mtime_s, 8, atime_ns, mtime_ns, 9, mode, uid, gid)
    sattr, handle = asked_of_the_file_system(body)
    assert handle == (fh if valid & FH else None)
    assert sattr[:4] == (
        mode & 0o7777 if valid & MODE else None, uid if valid & UID else None, gid if valid & GID else None,
        size if valid & SIZE else None,
    )  # fmt: skip
    for told, given_, now, at_ns in (
        (sattr.atime_ns, ATIME, ATIME_NOW, atime_s * 10**9 + atime_ns),
        (sattr.mtime_ns, MTIME, MTIME_NOW, mtime_s * 10**9 + mtime_ns),
    ):
        assert told == (nfs3.SERVER_TIME if valid & now else max(0, at_ns) if valid & given_ else None)


def test_a_caller_whom_proc_hides_is_one_without_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(*_: object) -> NoReturn:
        raise PermissionError(errno.EPERM, "hidepid=1")

    monkeypatch.setattr("builtins.open", hidden)
    assert Callers().credential(5, 6, os.getpid()) == Credential(5, 6, ())


def test_now_is_now_by_the_servers_clock() -> None:
    body = SETATTR_IN.pack(ATIME | ATIME_NOW | MTIME | MTIME_NOW, 0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0)
    assert asked_of_the_file_system(body) == (Sattr(atime_ns=nfs3.SERVER_TIME, mtime_ns=nfs3.SERVER_TIME), None)


@given(st.lists(st.tuples(st.integers(1, 2**64 - 1), st.binary(min_size=1, max_size=255))))
def test_a_page_of_a_listing_gives_a_lookup_for_each_of_its_names(names: list[tuple[int, bytes]]) -> None:
    page = b""
    for ino, name in names:
        entry = struct.pack("<Q", ino) + bytes(120) + struct.pack("<QQII", ino, 1, len(name), 4) + name
        page += entry + bytes(-len(entry) % 8)
    assert unwanted(Asked(FUSE_READDIRPLUS, 2, 5, 0, 0, 0), b"", page).lookups == [(ino, 1) for ino, _ in names]


@given(st.binary(max_size=255), st.binary(max_size=255), st.integers(0, 2**64 - 1))
def test_the_kernel_asks_again_for_both_names_of_a_rename(old: bytes, new: bytes, directory: int) -> None:
    old, new = old.replace(b"\0", b""), new.replace(b"\0", b"")
    request = struct.pack("<QII", directory, 0, 0) + old + b"\0" + new + b"\0"
    assert unwanted(Asked(FUSE_RENAME2, 2, 5, 0, 0, 0), request, b"").names == [(5, old), (directory, new)]
