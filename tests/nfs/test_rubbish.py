"""A server that answers rubbish costs a link or a call, never the client.

The rubbish comes from a small server of our own, since no real one sends it: it answers through the real
codecs' other half and spoils its replies as told.
"""

import functools
import itertools
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from efcfs.nfs import mount3, nfs3
from efcfs.nfs.client import Client, own_credential
from efcfs.nfs.connect import ConnectError, ServerOptions, connect
from efcfs.nfs.link import CallFailed, TimedOut

FH = b"root handle"
ATTR = nfs3.Fattr(nfs3.NF3DIR, 0o755, 2, 0, 0, 4096, 4096, 0, 0, 1, 2, 0, 0, 0)
Spoil = Callable[[bytes, int], bytes]


def results(program: int, procedure: int) -> bytes:
    """What a healthy server answers."""
    if procedure == 0:
        return b""
    if program == mount3.PROGRAM:
        return struct.pack(">II", 0, len(FH)) + FH + b"\0" * (-len(FH) % 4) + struct.pack(">II", 1, 1)
    if procedure == nfs3.NFSPROC3_FSINFO:
        return struct.pack(">II7IQII I", 0, 0, 65536, 65536, 1, 65536, 65536, 1, 65536, 2**40, 0, 1, 27)
    assert procedure == nfs3.NFSPROC3_GETATTR
    return struct.pack(">I", 0) + nfs3.pack_fattr(ATTR)


@asynccontextmanager
async def rubbish_server(spoil: Spoil) -> AsyncIterator[int]:
    """A server whose NFS replies other than NULL and FSINFO go through `spoil(record, number)`."""
    numbers = itertools.count()

    async def talk(stream: trio.SocketStream) -> None:
        data = b""
        async with stream:
            async for piece in stream:
                data += piece
                while len(data) >= 4 and len(data) >= 4 + (length := struct.unpack(">I", data[:4])[0] & 0x7FFFFFFF):
                    xid, _, _, program, _, procedure = struct.unpack_from(">6I", data, 4)
                    data = data[4 + length :]
                    body = struct.pack(">6I", xid, 1, 0, 0, 0, 0) + results(program, procedure)
                    record = struct.pack(">I", 0x80000000 | len(body)) + body
                    if program == nfs3.PROGRAM and procedure == nfs3.NFSPROC3_GETATTR:
                        record = spoil(record, next(numbers))
                    await stream.send_all(record)

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await talk(stream)
        except trio.BrokenResourceError:
            pass  # the client dropped the link, as it should

    async with trio.open_nursery() as nursery:
        serve = functools.partial(trio.serve_tcp, guarded, 0, host="127.0.0.1")
        listeners = await nursery.start(serve)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def client_of(port: int, *, soft: bool = False) -> AsyncIterator[Client]:
    options = ServerOptions("127.0.0.1", port=port, mountport=port, nconnect=1, soft=soft, timeo_s=1, retrans=2)
    async with connect(options, "/export") as client:
        yield client


def bad_status(record: bytes) -> bytes:
    """An attribute status that is neither 0 nor an error, with a body that is too short."""
    return struct.pack(">I", 0x80000000 | 32) + record[4:28] + struct.pack(">II", 0, 5)


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda r: struct.pack(">I", 0x80000000 | (len(r) - 4 - 40)) + r[4:-40],
    "oversized": lambda r: struct.pack(">I", 0x80000000 | 0x7FFFFFF0) + r[4:],
    "trailing bytes": lambda r: struct.pack(">I", 0x80000000 | (len(r) - 4 + 8)) + r[4:] + b"trailing",
    "not a reply": lambda r: r[:8] + struct.pack(">I", 0) + r[12:],
    "no fattr": bad_status,
    "empty record": lambda r: struct.pack(">I", 0x80000000),
    "noise": lambda r: bytes(range(256)) * 4,
}


@pytest.mark.parametrize("kind", SPOILED)
async def test_one_spoiled_reply_costs_the_link_and_not_the_call(kind: str) -> None:
    def spoil(record: bytes, number: int) -> bytes:
        return SPOILED[kind](record) if number == 0 else record

    with trio.fail_after(10):
        async with rubbish_server(spoil) as port, client_of(port) as client:
            assert await client.getattr(own_credential(), FH) == ATTR
            while not any(link["reconnects"] for link in client.links()):  # noqa: ASYNC110  # no event tells
                await trio.sleep(0.01)


async def test_a_server_that_only_spoils_fails_the_call_and_not_the_client() -> None:
    with trio.fail_after(20):
        async with rubbish_server(lambda record, _: SPOILED["no fattr"](record)) as port, client_of(port) as client:
            with pytest.raises(CallFailed):
                await client.getattr(own_credential(), FH)


async def test_replies_to_unknown_calls_are_ignored() -> None:
    def spoil(record: bytes, number: int) -> bytes:
        stranger = record[:4] + struct.pack(">I", 12345) + record[8:]
        return stranger + record + stranger

    with trio.fail_after(10):
        async with rubbish_server(spoil) as port, client_of(port) as client:
            for _ in range(20):
                assert await client.getattr(own_credential(), FH) == ATTR
            assert all(link["reconnects"] == 0 for link in client.links())


async def test_a_reply_in_many_fragments_is_put_together() -> None:
    def spoil(record: bytes, number: int) -> bytes:
        body = record[4:]
        pieces = [body[i : i + 7] for i in range(0, len(body), 7)]
        marks = [len(p) | (0x80000000 if p is pieces[-1] else 0) for p in pieces]
        return b"".join(struct.pack(">I", m) + p for m, p in zip(marks, pieces, strict=True))

    with trio.fail_after(10):
        async with rubbish_server(spoil) as port, client_of(port) as client:
            assert await client.getattr(own_credential(), FH) == ATTR


async def test_a_silent_server_fails_soft_calls_in_time() -> None:
    with trio.fail_after(10):
        async with rubbish_server(lambda record, _: b"") as port, client_of(port, soft=True) as client:
            started = trio.current_time()
            with pytest.raises(TimedOut):
                await client.getattr(own_credential(), FH)
            assert 1.5 < trio.current_time() - started < 4


async def test_a_server_without_a_listener_is_a_connect_error() -> None:
    async with rubbish_server(lambda record, _: record) as port:
        pass
    with pytest.raises(ConnectError, match="Connection refused"):
        async with client_of(port):
            pass
