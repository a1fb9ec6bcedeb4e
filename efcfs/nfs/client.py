"""Typed NFSv3 calls to one export: what the file system sees of the server.

`connect` finds the ports, asks mountd for the root file handle and starts the links. `Client` has a method
for each procedure of RFC 1813; a method returns the procedure's result when its status is NFS3_OK and
raises NfsError otherwise. NFS3ERR_JUKEBOX is waited out here, and so is the doubt after a
retransmission: a call that may have been executed before is judged by its effect.

This module knows no file names beyond one call and caches nothing.
"""

import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import trio

from efcfs.nfs import mount3, nfs3, portmap2
from efcfs.nfs.light import in_task
from efcfs.nfs.link import Buffer, Call, CallFailed, Decoder, Link, LinkClosed, call_once, open_link
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.pool import Pool
from efcfs.nfs.rpc import Credential, RpcRefusal, RpcRefused, call_header
from efcfs.nfs.xdr import ProtocolError

log = logging.getLogger(__name__)

NFS_PORT = 2049
JUKEBOX_MIN_S = 0.1
JUKEBOX_MAX_S = 5.0
# What one READ or WRITE may carry at most: FUSE requests end at 1 MiB.
MAX_TRANSFER_BYTES = 1024 * 1024


class ConnectError(Exception):
    """The export cannot be mounted; str() is the line for the user."""


class NfsError(Exception):
    """The server answered with a status other than NFS3_OK (RFC 1813 §2.6)."""

    def __init__(self, status: int, procedure: str) -> None:
        super().__init__(f"{procedure}: {nfs3.STATUS_NAMES.get(status, status)}")
        self.status = status
        self.procedure = procedure


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to reach the server; the names are those of nfs(5)."""

    host: str
    addresses: tuple[str, ...] = ()
    port: int | None = None
    mountport: int | None = None
    nconnect: int = 4
    timeo_s: float = 60.0
    retrans: int = 2
    soft: bool = False
    rsize: int | None = None
    wsize: int | None = None
    resvport: bool = False


class Known(NamedTuple):
    """What `connect` finds out about an export; who has it connects without a question."""

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


@dataclass(frozen=True, slots=True)
class _Procedure(Generic[R]):
    number: int
    decode: Callable[[memoryview, int], R]

    @property
    def name(self) -> str:
        return nfs3.PROCEDURE_NAMES[self.number]


GETATTR = _Procedure(nfs3.NFSPROC3_GETATTR, nfs3.decode_getattr)
SETATTR = _Procedure(nfs3.NFSPROC3_SETATTR, nfs3.decode_setattr)
LOOKUP = _Procedure(nfs3.NFSPROC3_LOOKUP, nfs3.decode_lookup)
ACCESS = _Procedure(nfs3.NFSPROC3_ACCESS, nfs3.decode_access)
READLINK = _Procedure(nfs3.NFSPROC3_READLINK, nfs3.decode_readlink)
READ = _Procedure(nfs3.NFSPROC3_READ, nfs3.decode_read)
WRITE = _Procedure(nfs3.NFSPROC3_WRITE, nfs3.decode_write)
CREATE = _Procedure(nfs3.NFSPROC3_CREATE, nfs3.decode_create)
MKDIR = _Procedure(nfs3.NFSPROC3_MKDIR, nfs3.decode_create)
SYMLINK = _Procedure(nfs3.NFSPROC3_SYMLINK, nfs3.decode_create)
MKNOD = _Procedure(nfs3.NFSPROC3_MKNOD, nfs3.decode_create)
REMOVE = _Procedure(nfs3.NFSPROC3_REMOVE, nfs3.decode_remove)
RMDIR = _Procedure(nfs3.NFSPROC3_RMDIR, nfs3.decode_remove)
RENAME = _Procedure(nfs3.NFSPROC3_RENAME, nfs3.decode_rename)
LINK = _Procedure(nfs3.NFSPROC3_LINK, nfs3.decode_link)
READDIR = _Procedure(nfs3.NFSPROC3_READDIR, nfs3.decode_readdir)
READDIRPLUS = _Procedure(nfs3.NFSPROC3_READDIRPLUS, nfs3.decode_readdirplus)
FSSTAT = _Procedure(nfs3.NFSPROC3_FSSTAT, nfs3.decode_fsstat)
PATHCONF = _Procedure(nfs3.NFSPROC3_PATHCONF, nfs3.decode_pathconf)
COMMIT = _Procedure(nfs3.NFSPROC3_COMMIT, nfs3.decode_commit)


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
        attr = (await self._ask(GETATTR, cred, nfs3.getattr_args(fh), impatient=impatient)).attr
        if attr is None:
            raise CallFailed("GETATTR without attributes")
        return attr

    async def setattr(self, cred: Credential, fh: bytes, sattr: nfs3.Sattr) -> nfs3.SetattrResult:
        return await self._ask(SETATTR, cred, nfs3.setattr_args(fh, sattr, None))

    async def lookup(
        self, cred: Credential, dir_fh: bytes, name: bytes, *, impatient: bool = False
    ) -> nfs3.LookupResult:
        return await self._ask(LOOKUP, cred, nfs3.lookup_args(dir_fh, name), impatient=impatient)

    async def access(
        self, cred: Credential, fh: bytes, wanted: int, *, impatient: bool = False
    ) -> nfs3.AccessResult:
        return await self._ask(ACCESS, cred, nfs3.access_args(fh, wanted), impatient=impatient)

    async def readlink(self, cred: Credential, fh: bytes) -> nfs3.ReadlinkResult:
        return await self._ask(READLINK, cred, nfs3.readlink_args(fh))

    async def read(
        self, cred: Credential, fh: bytes, offset: int, target: memoryview
    ) -> nfs3.ReadResult:
        """Read up to len(target) (≤ rsize) bytes straight into `target`; count and eof tell the rest.

        When the wait is cancelled, `target` may still be written to: do not use it again.
        """
        result = await self._ask(
            READ, cred, nfs3.read_args(fh, offset, len(target)), bulk=True, sink=target
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
        head = nfs3.write_head(fh, offset, length_bytes, stable)
        result = await self._ask(
            WRITE, cred, head, bulk=True, payload=payload, payload_bytes=length_bytes
        )
        if not 0 < result.count <= length_bytes:
            raise CallFailed(f"WRITE of {length_bytes} bytes wrote {result.count}")
        return result

    async def commit(self, cred: Credential, fh: bytes) -> nfs3.CommitResult:
        return await self._ask(COMMIT, cred, nfs3.commit_args(fh, 0, 0))

    async def create(
        self, cred: Credential, dir_fh: bytes, name: bytes, sattr: nfs3.Sattr
    ) -> nfs3.CreateResult:
        """CREATE UNCHECKED: an existing file is opened (and truncated when sattr.size is 0)."""
        return await self._ask(CREATE, cred, nfs3.create_args(dir_fh, name, nfs3.UNCHECKED, sattr))

    async def create_exclusive(
        self, cred: Credential, dir_fh: bytes, name: bytes, verifier: bytes
    ) -> nfs3.CreateResult:
        """CREATE EXCLUSIVE: safe to repeat with the same verifier; the caller sets the attributes after."""
        return await self._ask(CREATE, cred, nfs3.create_args(dir_fh, name, nfs3.EXCLUSIVE, verifier))

    async def mkdir(
        self, cred: Credential, dir_fh: bytes, name: bytes, sattr: nfs3.Sattr, *, again: bool = False
    ) -> nfs3.CreateResult:
        result, sent_again = await self._try(MKDIR, cred, nfs3.mkdir_args(dir_fh, name, sattr), again=again)
        if sent_again and result.status == nfs3.NFS3ERR_EXIST:
            found = await self.lookup(cred, dir_fh, name)
            if found.attr is not None and found.attr.type == nfs3.NF3DIR:
                return _created(found)
        return _checked(result, MKDIR)

    async def symlink(
        self, cred: Credential, dir_fh: bytes, name: bytes, sattr: nfs3.Sattr, target: bytes, *, again: bool = False
    ) -> nfs3.CreateResult:
        args = nfs3.symlink_args(dir_fh, name, sattr, target)
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
        args = nfs3.mknod_args(dir_fh, name, file_type, sattr, rdev_major, rdev_minor)
        result, sent_again = await self._try(MKNOD, cred, args, again=again)
        if sent_again and result.status == nfs3.NFS3ERR_EXIST:
            found = await self.lookup(cred, dir_fh, name)
            if found.attr is not None and found.attr.type == file_type:
                return _created(found)
        return _checked(result, MKNOD)

    async def remove(
        self, cred: Credential, dir_fh: bytes, name: bytes, *, again: bool = False
    ) -> nfs3.RemoveResult:
        return await self._remove(REMOVE, cred, nfs3.remove_args(dir_fh, name), again)

    async def rmdir(
        self, cred: Credential, dir_fh: bytes, name: bytes, *, again: bool = False
    ) -> nfs3.RemoveResult:
        return await self._remove(RMDIR, cred, nfs3.rmdir_args(dir_fh, name), again)

    async def rename(
        self, cred: Credential, from_fh: bytes, from_name: bytes, to_fh: bytes, to_name: bytes, *, again: bool = False
    ) -> nfs3.RenameResult:
        args = nfs3.rename_args(from_fh, from_name, to_fh, to_name)
        result, sent_again = await self._try(RENAME, cred, args, again=again)
        if sent_again and result.status == nfs3.NFS3ERR_NOENT:
            await self.lookup(cred, to_fh, to_name)  # raises NOENT if the first try did not do it either
            return result
        return _checked(result, RENAME)

    async def link(
        self, cred: Credential, fh: bytes, dir_fh: bytes, name: bytes, *, again: bool = False
    ) -> nfs3.LinkResult:
        result, sent_again = await self._try(LINK, cred, nfs3.link_args(fh, dir_fh, name), again=again)
        if sent_again and result.status == nfs3.NFS3ERR_EXIST:
            found = await self.lookup(cred, dir_fh, name)
            if found.fh == fh:
                return nfs3.LinkResult(nfs3.NFS3_OK, found.attr, result.wcc)
        return _checked(result, LINK)

    async def readdir(
        self, cred: Credential, fh: bytes, cookie: int, verifier: bytes
    ) -> nfs3.ReaddirResult:
        return await self._ask(READDIR, cred, nfs3.readdir_args(fh, cookie, verifier, self.readdir_bytes))

    async def readdirplus(
        self, cred: Credential, fh: bytes, cookie: int, verifier: bytes
    ) -> nfs3.ReaddirplusResult:
        size = self.readdir_bytes
        return await self._ask(
            READDIRPLUS, cred, nfs3.readdirplus_args(fh, cookie, verifier, size, size)
        )

    async def fsstat(self, cred: Credential, fh: bytes, *, impatient: bool = False) -> nfs3.FsstatResult:
        return await self._ask(FSSTAT, cred, nfs3.fsstat_args(fh), impatient=impatient)

    async def pathconf(self, cred: Credential, fh: bytes) -> nfs3.PathconfResult:
        return await self._ask(PATHCONF, cred, nfs3.pathconf_args(fh))

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


# -- connecting ------------------------------------------------------------------------------------


def own_credential() -> Credential:
    """The daemon's own uid, gid and groups."""
    return Credential(os.geteuid(), os.getegid(), tuple(os.getgroups()[:16]))


@contextlib.asynccontextmanager
async def connect(options: ServerOptions, export: str, known: Known | None = None) -> AsyncIterator[Client]:
    """Mount `export` (RFC 1813 appendix I) and keep the links to the server up inside the context.

    Raises ConnectError. Bounded by timeo: a silent server costs that long, whatever hard or soft say. With `known` from
    an earlier connection it returns at once, also while the server is away.
    """
    if known is None:
        known = await _learn(options, export)

    async def resolve() -> Sequence[str]:
        try:
            return await _resolve(options)
        except ConnectError as error:
            log.info("%s", error)
            return ()

    pool = Pool(
        options.host, known.addresses, known.port, options.nconnect, resolve, _null,
        reserved_port=options.resvport, timeo_s=options.timeo_s,
        soft_s=options.timeo_s * max(1, options.retrans) if options.soft else None,
    )  # fmt: skip
    async with open_nursery() as nursery:
        await nursery.start(pool.run)
        yield Client(pool, known, options.rsize, options.wsize)
        nursery.cancel_scope.cancel()


async def _learn(options: ServerOptions, export: str) -> Known:
    try:
        with trio.fail_after(options.timeo_s):
            addresses = await _resolve(options)
            address, port, root_fh = await _mount(options, addresses, export)
            head = call_header(nfs3.PROGRAM, nfs3.VERSION, nfs3.NFSPROC3_FSINFO, own_credential())
            info = await _ask_once(options, address, port, head + nfs3.fsinfo_args(root_fh), nfs3.decode_fsinfo)
    except trio.TooSlowError:
        raise ConnectError(
            f"server {options.host} did not answer in {options.timeo_s:g} s:"
            " check that it runs and that no firewall drops its packets (timeo= sets the limit)"
        ) from None
    except (LinkClosed, RpcRefused, ProtocolError, OSError) as error:
        raise ConnectError(f"server {options.host} refuses the export: {error}") from None
    assert isinstance(info, nfs3.FsinfoResult)
    if info.status != nfs3.NFS3_OK:
        raise ConnectError(f"server {options.host} refuses the export: {NfsError(info.status, 'FSINFO')}")
    # The address that answered goes first; the others join when their links come up.
    first = (address, *(a for a in addresses if a != address))
    return Known(first, port, root_fh, info.rtmax, info.wtmax, info.maxfilesize)


async def _resolve(options: ServerOptions) -> list[str]:
    """All numeric addresses of the server, in the resolver's order."""
    found: list[str] = []
    for host in options.addresses or (options.host,):
        try:
            answers = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConnectError(
                f"cannot resolve server name '{host}' ({error.strerror}): check the spelling and DNS"
            ) from None
        for answer in answers:
            address = str(answer[4][0])
            if address not in found:
                found.append(address)
    return found


async def _mount(options: ServerOptions, addresses: Sequence[str], export: str) -> tuple[str, int, bytes]:
    """Ask the first address that answers for the export's root: (address, NFS port, file handle)."""
    refusals: list[str] = []
    for address in addresses:
        try:
            port = options.port
            if port is None:
                port = await _port(options, address, nfs3.PROGRAM, nfs3.VERSION, "NFSv3") or NFS_PORT
            mountport = options.mountport
            if mountport is None:
                mountport = await _port(options, address, mount3.PROGRAM, mount3.VERSION, "the MOUNT protocol")
            if mountport is None:
                raise ConnectError(
                    f"no portmapper at {address}:111 tells mountd's port: give mountport=N (and port=N)"
                )
            await _check_nfs(options, address, port)
            return address, port, await _root(options, address, mountport, export)
        except (OSError, LinkClosed, ProtocolError) as error:
            what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            refusals.append(f"{address}: {what}")
    raise ConnectError(
        f"cannot reach NFS server {options.host} ({'; '.join(refusals)}):"
        " check that the server runs, and port= and mountport= if you gave them"
    )


async def _ask_once(
    options: ServerOptions, address: str, port: int, head: bytes, decode: Decoder
) -> object:
    try:
        link = await open_link(
            address, port, reserved_port=options.resvport, timeout_s=options.timeo_s
        )
    except OSError as error:
        raise OSError(error.errno, f"port {port}: {error.strerror}") from None
    try:
        return await call_once(link, Call(1, head, (), 0, decode, None, f"call to port {port}"))
    finally:
        link.close()


async def _port(options: ServerOptions, address: str, program: int, version: int, what: str) -> int | None:
    """The program's TCP port from the portmapper; None when there is no portmapper."""
    args = portmap2.getport_args(portmap2.Mapping(program, version, portmap2.IPPROTO_TCP, 0))
    head = call_header(portmap2.PROGRAM, portmap2.VERSION, portmap2.PMAPPROC_GETPORT, None) + args
    try:
        port = await _ask_once(options, address, portmap2.PORT, head, portmap2.decode_getport)
    except (OSError, LinkClosed, RpcRefused):
        return None
    if not isinstance(port, int) or not 0 < port < 65536:
        raise ConnectError(f"server {options.host} does not serve {what} over TCP: enable it on the server")
    return port


async def _check_nfs(options: ServerOptions, address: str, port: int) -> None:
    head = call_header(nfs3.PROGRAM, nfs3.VERSION, nfs3.NFSPROC3_NULL, None)
    try:
        await _ask_once(options, address, port, head, _nothing)
    except RpcRefused as refused:
        if refused.kind is RpcRefusal.PROG_MISMATCH:
            versions = f"versions {refused.low} to {refused.high}"
            raise ConnectError(
                f"server {options.host} does not serve NFSv3 (it serves {versions}): enable NFSv3 on the server"
            ) from None
        raise ConnectError(
            f"server {options.host} does not serve NFSv3 at port {port} ({refused}): check port="
        ) from None


async def _root(options: ServerOptions, address: str, mountport: int, export: str) -> bytes:
    head = call_header(mount3.PROGRAM, mount3.VERSION, mount3.MOUNTPROC3_MNT, own_credential())
    try:
        result = await _ask_once(
            options, address, mountport, head + mount3.mnt_args(os.fsencode(export)), mount3.decode_mnt
        )
    except RpcRefused as refused:
        raise ConnectError(
            f"server {options.host} does not serve MOUNT version 3 at port {mountport} ({refused}):"
            " enable NFSv3 on the server"
        ) from None
    assert isinstance(result, mount3.MntResult)
    what = f"{options.host}:{export}"
    if result.status in (mount3.MNT3ERR_NOENT, mount3.MNT3ERR_NOTDIR):
        raise ConnectError(f"export {what} does not exist: `showmount -e {options.host}` lists what there is")
    if result.status in (mount3.MNT3ERR_ACCES, mount3.MNT3ERR_PERM):
        raise ConnectError(
            f"export {what} is denied to this client (or does not exist):"
            " check the server's export list and resvport"
        )
    if result.status or result.fh is None:
        raise ConnectError(f"mountd refuses {what} with status {result.status}: see the server's log")
    if result.auth_flavors and AUTH_SYS not in result.auth_flavors:
        raise ConnectError(f"export {what} does not accept sec=sys, the only flavor of efcfs: allow sys there")
    return result.fh


AUTH_SYS = 1


def _nothing(view: memoryview, offset: int) -> None:
    """The result of a NULL procedure."""


async def _null(link: Link) -> None:
    head = call_header(nfs3.PROGRAM, nfs3.VERSION, nfs3.NFSPROC3_NULL, None)
    await call_once(link, Call(0, head, (), 0, _nothing, None, "NULL"))
