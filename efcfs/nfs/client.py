"""Typed NFSv3 calls to one export: what the file system sees of the server.

`Client` has a method for each procedure of RFC 1813; a method returns the procedure's result when its status is
NFS3_OK and raises NfsError otherwise. NFS3ERR_JUKEBOX is waited out here, and so is the doubt after a
retransmission: a call that may have been executed before is judged by its effect. `connect.py` makes one.

This module knows no file names beyond one call and caches nothing.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import trio

from efcfs.nfs import nfs3, nfs3_calls, nfs3_replies
from efcfs.nfs.apart import Apart
from efcfs.nfs.light import in_task
from efcfs.nfs.link import Buffer, CallFailed
from efcfs.nfs.pool import Pool
from efcfs.nfs.rpc import Credential, call_header

log = logging.getLogger(__name__)

JUKEBOX_MIN_S = 0.1
JUKEBOX_MAX_S = 5.0
# What one READ or WRITE may carry at most: FUSE requests end at 1 MiB.
MAX_TRANSFER_BYTES = 1024 * 1024
# So many pages in a row of entries that no file system can have are skipped.
MAX_BAD_PAGES = 100
# Such entries are worth a line so often.
LEFT_OUT_LINE_S = 60.0


class NfsError(Exception):
    """The server answered with a status other than NFS3_OK (RFC 1813 §2.6)."""

    def __init__(self, status: int, procedure: str) -> None:
        super().__init__(f"{procedure}: {nfs3.STATUS_NAMES.get(status, status)}")
        self.status = status
        self.procedure = procedure


class Known(NamedTuple):
    """What connecting finds out about an export; who has it connects without a question."""

    addresses: tuple[str, ...]
    port: int
    root_fh: bytes
    # FSINFO's (RFC 1813 §3.3.19)
    rtmax: int
    wtmax: int
    maxfilesize: int


class _Result(Protocol):
    @property
    def status(self) -> int: ...


R = TypeVar("R", bound=_Result)
L = TypeVar("L", nfs3.ReaddirResult, nfs3.ReaddirplusResult)


@dataclass(frozen=True, slots=True)
class _Procedure(Generic[R]):
    number: int
    decode: Callable[[memoryview, int], R]

    @property
    def name(self) -> str:
        return nfs3.PROCEDURE_NAMES[self.number]


GETATTR = _Procedure(nfs3.NFSPROC3_GETATTR, nfs3_replies.decode_getattr)
SETATTR = _Procedure(nfs3.NFSPROC3_SETATTR, nfs3_replies.decode_setattr)
LOOKUP = _Procedure(nfs3.NFSPROC3_LOOKUP, nfs3_replies.decode_lookup)
ACCESS = _Procedure(nfs3.NFSPROC3_ACCESS, nfs3_replies.decode_access)
READLINK = _Procedure(nfs3.NFSPROC3_READLINK, nfs3_replies.decode_readlink)
READ = _Procedure(nfs3.NFSPROC3_READ, nfs3_replies.decode_read)
WRITE = _Procedure(nfs3.NFSPROC3_WRITE, nfs3_replies.decode_write)
CREATE = _Procedure(nfs3.NFSPROC3_CREATE, nfs3_replies.decode_create)
MKDIR = _Procedure(nfs3.NFSPROC3_MKDIR, nfs3_replies.decode_create)
SYMLINK = _Procedure(nfs3.NFSPROC3_SYMLINK, nfs3_replies.decode_create)
MKNOD = _Procedure(nfs3.NFSPROC3_MKNOD, nfs3_replies.decode_create)
REMOVE = _Procedure(nfs3.NFSPROC3_REMOVE, nfs3_replies.decode_remove)
RMDIR = _Procedure(nfs3.NFSPROC3_RMDIR, nfs3_replies.decode_remove)
RENAME = _Procedure(nfs3.NFSPROC3_RENAME, nfs3_replies.decode_rename)
LINK = _Procedure(nfs3.NFSPROC3_LINK, nfs3_replies.decode_link)
READDIR = _Procedure(nfs3.NFSPROC3_READDIR, nfs3_replies.decode_readdir)
READDIRPLUS = _Procedure(nfs3.NFSPROC3_READDIRPLUS, nfs3_replies.decode_readdirplus)
FSSTAT = _Procedure(nfs3.NFSPROC3_FSSTAT, nfs3_replies.decode_fsstat)
PATHCONF = _Procedure(nfs3.NFSPROC3_PATHCONF, nfs3_replies.decode_pathconf)
COMMIT = _Procedure(nfs3.NFSPROC3_COMMIT, nfs3_replies.decode_commit)


class Client:
    """One export. Every method may raise NfsError, TimedOut (soft mounts), CallFailed or RpcRefused.

    Those that take `impatient` then raise ServerAway instead of waiting for a server that is away. Those that take
    `again` are told by it that somebody who died may have made the same call before.
    """

    def __init__(self, pool: Pool, known: Known, rsize: int | None = None, wsize: int | None = None) -> None:
        def transfer(asked: int | None, server_max: int) -> int:
            return max(4096, min(asked or MAX_TRANSFER_BYTES, server_max or 8192, MAX_TRANSFER_BYTES) & ~4095)

        self.known = known
        self.root_fh = known.root_fh
        self.rsize = transfer(rsize, known.rtmax)
        self.wsize = transfer(wsize, known.wtmax)
        # Few large pages: with 1 ms of delay a listing of 100,000 entries takes 100 round trips less.
        self.readdir_bytes = max(4096, min(known.rtmax or 65536, 131072))
        self.max_file_bytes = known.maxfilesize or 2**63 - 1
        self._pool = pool
        self._apart = Apart()
        self._left_out_at = float("-inf")

    # -- state, for `efcfs status` -----------------------------------------------------------------

    def server_state(self) -> str:
        """"up" or "away"."""
        return "away" if self._pool.away else "up"

    @property
    def away(self) -> bool:
        return self._pool.away

    def links(self) -> list[dict[str, str | int]]:
        """One object a link: address, state, in_flight_bytes, reconnects."""
        return [
            {
                "address": place.address,
                "state": "connecting" if place.link is None else "up",
                "in_flight_bytes": place.link.in_flight_bytes if place.link is not None else 0,
                "reconnects": place.reconnects,
            }
            for place in self._pool.places
        ]

    # -- who waits for the answers -------------------------------------------------------------------

    def attend(self) -> int:
        """As in `Pool`, with `arrived` for `receive`."""
        return self._pool.attend()

    def arrived(self) -> None:
        self._pool.receive()

    def leave(self) -> None:
        self._pool.leave()

    # -- the procedures ----------------------------------------------------------------------------

    async def getattr(self, cred: Credential, fh: bytes, *, impatient: bool = False) -> nfs3.Fattr:
        attr = (await self._ask(GETATTR, cred, nfs3_calls.getattr_args(fh), impatient=impatient)).attr
        if attr is None:
            raise CallFailed("GETATTR without attributes")
        return attr

    async def setattr(self, cred: Credential, fh: bytes, sattr: nfs3.Sattr) -> nfs3.SetattrResult:
        return await self._ask(SETATTR, cred, nfs3_calls.setattr_args(fh, sattr, None))

    async def lookup(
        self, cred: Credential, dir_fh: bytes, name: bytes, *, impatient: bool = False
    ) -> nfs3.LookupResult:
        await self._apart.enter(dir_fh)
        try:
            return await self._ask(LOOKUP, cred, nfs3_calls.lookup_args(dir_fh, name), impatient=impatient)
        finally:
            self._apart.leave(dir_fh)

    async def access(
        self, cred: Credential, fh: bytes, wanted: int, *, impatient: bool = False
    ) -> nfs3.AccessResult:
        return await self._ask(ACCESS, cred, nfs3_calls.access_args(fh, wanted), impatient=impatient)

    async def readlink(self, cred: Credential, fh: bytes) -> nfs3.ReadlinkResult:
        return await self._ask(READLINK, cred, nfs3_calls.readlink_args(fh))

    async def read(
        self, cred: Credential, fh: bytes, offset: int, target: memoryview
    ) -> nfs3.ReadResult:
        """Read up to len(target) (≤ rsize) bytes straight into `target`; count and eof tell the rest.

        When the wait is cancelled, `target` may still be written to: do not use it again.
        """
        result = await self._ask(
            READ, cred, nfs3_calls.read_args(fh, offset, len(target)), bulk=True, sink=target
        )
        if result.data:  # a reply without a fixed head came the ordinary way
            if len(result.data) > len(target):
                raise CallFailed("READ returned more than was asked for")
            target[: len(result.data)] = result.data
        return result

    async def write(
        self, cred: Credential, fh: bytes, offset: int, payload: Sequence[Buffer], length_bytes: int,
        stable: int = nfs3.UNSTABLE,
    ) -> nfs3.WriteResult:  # fmt: skip
        """Write `length_bytes` (≤ wsize), the buffers of `payload` one after the other."""
        head = nfs3_calls.write_head(fh, offset, length_bytes, stable)
        result = await self._ask(
            WRITE, cred, head, bulk=True, payload=payload, payload_bytes=length_bytes
        )
        if not 0 < result.count <= length_bytes:
            raise CallFailed(f"WRITE of {length_bytes} bytes wrote {result.count}")
        return result

    async def commit(self, cred: Credential, fh: bytes) -> nfs3.CommitResult:
        return await self._ask(COMMIT, cred, nfs3_calls.commit_args(fh, 0, 0))

    async def create(
        self, cred: Credential, dir_fh: bytes, name: bytes, sattr: nfs3.Sattr
    ) -> nfs3.CreateResult:
        """CREATE UNCHECKED: an existing file is opened (and truncated when sattr.size is 0)."""
        return await self._ask(CREATE, cred, nfs3_calls.create_args(dir_fh, name, nfs3.UNCHECKED, sattr))

    async def create_exclusive(
        self, cred: Credential, dir_fh: bytes, name: bytes, verifier: bytes
    ) -> nfs3.CreateResult:
        """CREATE EXCLUSIVE: safe to repeat with the same verifier; the caller sets the attributes after."""
        return await self._ask(CREATE, cred, nfs3_calls.create_args(dir_fh, name, nfs3.EXCLUSIVE, verifier))

    async def mkdir(
        self, cred: Credential, dir_fh: bytes, name: bytes, sattr: nfs3.Sattr, *, again: bool = False
    ) -> nfs3.CreateResult:
        result, sent_again = await self._try(MKDIR, cred, nfs3_calls.mkdir_args(dir_fh, name, sattr), again=again)
        if sent_again and result.status == nfs3.NFS3ERR_EXIST:
            found = await self.lookup(cred, dir_fh, name)
            if found.attr is not None and found.attr.type == nfs3.NF3DIR:
                return _created(found)
        return _checked(result, MKDIR)

    async def symlink(
        self, cred: Credential, dir_fh: bytes, name: bytes, sattr: nfs3.Sattr, target: bytes, *, again: bool = False
    ) -> nfs3.CreateResult:
        args = nfs3_calls.symlink_args(dir_fh, name, sattr, target)
        result, sent_again = await self._try(SYMLINK, cred, args, again=again)
        if sent_again and result.status == nfs3.NFS3ERR_EXIST:
            found = await self.lookup(cred, dir_fh, name)
            is_link = found.attr is not None and found.attr.type == nfs3.NF3LNK
            if is_link and found.fh is not None and (await self.readlink(cred, found.fh)).target == target:
                return _created(found)
        return _checked(result, SYMLINK)

    async def mknod(
        self, cred: Credential, dir_fh: bytes, name: bytes, file_type: int, sattr: nfs3.Sattr,
        rdev_major: int, rdev_minor: int, *, again: bool = False,
    ) -> nfs3.CreateResult:  # fmt: skip
        args = nfs3_calls.mknod_args(dir_fh, name, file_type, sattr, rdev_major, rdev_minor)
        result, sent_again = await self._try(MKNOD, cred, args, again=again)
        if sent_again and result.status == nfs3.NFS3ERR_EXIST:
            found = await self.lookup(cred, dir_fh, name)
            if found.attr is not None and found.attr.type == file_type:
                return _created(found)
        return _checked(result, MKNOD)

    async def remove(
        self, cred: Credential, dir_fh: bytes, name: bytes, *, again: bool = False
    ) -> nfs3.RemoveResult:
        await self._apart.enter(dir_fh)
        try:
            return await self._remove(REMOVE, cred, nfs3_calls.remove_args(dir_fh, name), again)
        finally:
            self._apart.leave(dir_fh)

    async def rmdir(
        self, cred: Credential, dir_fh: bytes, name: bytes, *, again: bool = False
    ) -> nfs3.RemoveResult:
        return await self._remove(RMDIR, cred, nfs3_calls.rmdir_args(dir_fh, name), again)

    async def rename(
        self, cred: Credential, from_fh: bytes, from_name: bytes, to_fh: bytes, to_name: bytes, *, again: bool = False
    ) -> nfs3.RenameResult:
        args = nfs3_calls.rename_args(from_fh, from_name, to_fh, to_name)
        async with self._apart.between(from_fh, to_fh) if from_fh != to_fh else contextlib.nullcontext():
            result, sent_again = await self._try(RENAME, cred, args, again=again)
        if sent_again and result.status == nfs3.NFS3ERR_NOENT:
            await self.lookup(cred, to_fh, to_name)  # raises NOENT if the first try did not do it either
            return result
        return _checked(result, RENAME)

    async def link(
        self, cred: Credential, fh: bytes, dir_fh: bytes, name: bytes, *, again: bool = False
    ) -> nfs3.LinkResult:
        result, sent_again = await self._try(LINK, cred, nfs3_calls.link_args(fh, dir_fh, name), again=again)
        if sent_again and result.status == nfs3.NFS3ERR_EXIST:
            found = await self.lookup(cred, dir_fh, name)
            if found.fh == fh:
                return nfs3.LinkResult(nfs3.NFS3_OK, found.attr, result.wcc)
        return _checked(result, LINK)

    async def readdir(
        self, cred: Credential, fh: bytes, cookie: int, verifier: bytes
    ) -> nfs3.ReaddirResult:
        def args(cookie: int, verifier: bytes) -> bytes:
            return nfs3_calls.readdir_args(fh, cookie, verifier, self.readdir_bytes)

        return await self._list(READDIR, cred, fh, args, cookie, verifier)

    async def readdirplus(
        self, cred: Credential, fh: bytes, cookie: int, verifier: bytes
    ) -> nfs3.ReaddirplusResult:
        def args(cookie: int, verifier: bytes) -> bytes:
            return nfs3_calls.readdirplus_args(fh, cookie, verifier, self.readdir_bytes, self.readdir_bytes)

        return await self._list(READDIRPLUS, cred, fh, args, cookie, verifier)

    async def fsstat(self, cred: Credential, fh: bytes, *, impatient: bool = False) -> nfs3.FsstatResult:
        return await self._ask(FSSTAT, cred, nfs3_calls.fsstat_args(fh), impatient=impatient)

    async def pathconf(self, cred: Credential, fh: bytes) -> nfs3.PathconfResult:
        return await self._ask(PATHCONF, cred, nfs3_calls.pathconf_args(fh))

    # -- the one way out ---------------------------------------------------------------------------

    async def _try(
        self, procedure: _Procedure[R], cred: Credential, args: bytes, *, bulk: bool = False,
        payload: Sequence[Buffer] = (), payload_bytes: int = 0, sink: memoryview | None = None,
        impatient: bool = False, again: bool = False,
    ) -> tuple[R, bool]:  # fmt: skip
        """The result, whatever its status, and whether the call may have been done before."""
        head = call_header(nfs3.PROGRAM, nfs3.VERSION, procedure.number, cred) + args
        delay_s = JUKEBOX_MIN_S
        while True:
            call = self._pool.call(
                head, procedure.decode, procedure.name, bulk=bulk, payload=payload,
                payload_bytes=payload_bytes, sink=sink, impatient=impatient,
            )  # fmt: skip
            result: R = await self._pool.wait(call)  # type: ignore[assignment]  # what procedure.decode returns
            if result.status != nfs3.NFS3ERR_JUKEBOX:
                return result, again or call.transmissions > 1
            await in_task()
            await trio.sleep(delay_s)
            delay_s = min(delay_s * 2, JUKEBOX_MAX_S)

    async def _ask(
        self, procedure: _Procedure[R], cred: Credential, args: bytes, *, bulk: bool = False,
        payload: Sequence[Buffer] = (), payload_bytes: int = 0, sink: memoryview | None = None,
        impatient: bool = False,
    ) -> R:  # fmt: skip
        result, _ = await self._try(
            procedure, cred, args, bulk=bulk, payload=payload, payload_bytes=payload_bytes, sink=sink,
            impatient=impatient,
        )  # fmt: skip
        return _checked(result, procedure)

    async def _list(
        self, procedure: _Procedure[L], cred: Credential, fh: bytes, args: Callable[[int, bytes], bytes],
        cookie: int, verifier: bytes,
    ) -> L:  # fmt: skip
        """A page that has entries, if there are any after `cookie`: pages of entries that are left out are skipped."""
        for _ in range(MAX_BAD_PAGES):
            await self._apart.enter(fh)
            try:
                page = await self._ask(procedure, cred, args(cookie, verifier))
            finally:
                self._apart.leave(fh)
            if not page.left_out:
                return page
            if time.monotonic() > self._left_out_at + LEFT_OUT_LINE_S:
                self._left_out_at = time.monotonic()
                log.error("server: %s told %d entries that no file system can have", procedure.name, page.left_out)
            if page.entries or page.eof:
                return page
            cookie, verifier = page.last, page.verifier
        raise CallFailed(f"{procedure.name}: nothing but entries that no file system can have")

    async def _remove(
        self, procedure: _Procedure[nfs3.RemoveResult], cred: Credential, args: bytes, again: bool
    ) -> nfs3.RemoveResult:
        result, sent_again = await self._try(procedure, cred, args, again=again)
        if sent_again and result.status == nfs3.NFS3ERR_NOENT:
            return result
        return _checked(result, procedure)


def _checked(result: R, procedure: _Procedure[R]) -> R:
    if result.status != nfs3.NFS3_OK:
        raise NfsError(result.status, procedure.name)
    return result


def _created(found: nfs3.LookupResult) -> nfs3.CreateResult:
    """Found when the call was sent again: by its effect it was done before, and its status stays EXIST."""
    return nfs3.CreateResult(nfs3.NFS3ERR_EXIST, found.fh, found.attr, nfs3.Wcc(None, found.dir_attr))


def own_credential() -> Credential:
    """The daemon's own uid, gid and groups."""
    return Credential(os.geteuid(), os.getegid(), tuple(os.getgroups()[:16]))
