"""Mounting an export (RFC 1813 appendix I): from its name to a `Client` whose links are up.

`connect` resolves the server's name, finds the ports, asks mountd for the root file handle and the server for its
limits, and starts the links. Every failure is a ConnectError, whose text is for the user.
"""

import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from efcfs.nfs import mount3, nfs3, portmap2
from efcfs.nfs.client import Client, Known, NfsError, own_credential
from efcfs.nfs.link import LINK_ERRORS, Call, Decoder, Link, LinkClosed, call_once, open_link
from efcfs.nfs.nfs3_calls import fsinfo_args
from efcfs.nfs.nfs3_replies import decode_fsinfo
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.pool import Pool
from efcfs.nfs.rpc import RpcRefusal, RpcRefused, call_header

log = logging.getLogger(__name__)

NFS_PORT = 2049
# Threads that wait for DNS. Not among those of the others, one of which DNS may be waiting for.
RESOLVING = trio.CapacityLimiter(4)


class ConnectError(Exception):
    """The export cannot be mounted; str() is the line for the user."""


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
            info = await _ask_once(options, address, port, head + fsinfo_args(root_fh), decode_fsinfo)
    except trio.TooSlowError:
        raise ConnectError(
            f"server {options.host} did not answer in {options.timeo_s:g} s:"
            " check that it runs and that no firewall drops its packets (timeo= sets the limit)"
        ) from None
    except LINK_ERRORS as error:
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
        find = partial(socket.getaddrinfo, host, None, type=socket.SOCK_STREAM)
        try:
            try:
                answers = find(flags=socket.AI_NUMERICHOST)  # asks nobody
            except socket.gaierror:
                answers = await trio.to_thread.run_sync(find, abandon_on_cancel=True, limiter=RESOLVING)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConnectError(
                f"cannot resolve server name '{host}' ({why}): check the spelling and DNS"
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
        except LINK_ERRORS as error:
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
