"""One TCP link to the server, from connect to close.

This is the only file of efcfs that touches a TCP socket. A link carries calls of any RPC program; it
matches replies to calls by xid, receives READ payloads straight into the caller's buffer and sends WRITE
payloads from where they lie. It knows nothing of other links, reconnecting or retrying: when anything
goes wrong `Link.run` raises, and whoever runs the link (`pool.py`) takes its unanswered calls elsewhere.
"""

import errno
import os
import random
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

import outcome
import trio

from efcfs.nfs import nfs3_replies
from efcfs.nfs.light import Light, is_light, wait_for
from efcfs.nfs.nursery import open_nursery
from efcfs.nfs.rpc import LAST_FRAGMENT, Receiver, Record, RpcRefused, Sink, decode_reply, reply_xid
from efcfs.nfs.xdr import ProtocolError

Buffer = bytes | bytearray | memoryview
Decoder = Callable[[memoryview, int], object]

# A reply larger than any that this client asks for is a broken or hostile server.
MAX_RECORD_BYTES = 2 * 1024 * 1024
# sendmsg takes at most IOV_MAX (1024) buffers.
MAX_IOVECS = 512
# Record mark + head of a READ reply with post-op attributes: the payload after it goes into its target.
READ_HEAD_BYTES = 132
ORDINARY_BYTES = 64 * 1024
MAX_LOW_WATER_BYTES = 512 * 1024
# A reply that does not decode costs the link; the third one for the same call is the call's own fault.
MAX_BAD_REPLIES = 3

_MARK_AND_XID = struct.Struct(">II")
# struct linger: on, 0 s
_LINGER_NOT = struct.pack("ii", 1, 0)
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


class LinkClosed(Exception):
    """The server ended the connection."""


class CallFailed(Exception):
    """The call can have no result: the server refused it, or it kept answering rubbish."""


class TimedOut(Exception):
    """A soft mount gave up waiting."""


class ServerAway(Exception):
    """The server does not answer, and the call was not worth waiting for."""


# What a link may raise, and a call on one that nobody else uses.
LINK_ERRORS = (OSError, LinkClosed, ProtocolError, RpcRefused, CallFailed)


class Call:
    """One RPC call and, later, its result. It keeps its xid when it is sent again (RFC 5531 §9)."""

    __slots__ = (
        "bad_replies",
        "decode",
        "description",
        "forget",
        "impatient",
        "sent_at",
        "sink",
        "size_bytes",
        "started_at",
        "task",
        "transmissions",
        "waiter",
        "wire",
        "xid",
    )  # fmt: skip

    def __init__(
        self, xid: int, head: bytes, payload: Sequence[Buffer], payload_bytes: int, decode: Decoder,
        sink: memoryview | None, description: str,
    ) -> None:  # fmt: skip
        length_bytes = 4 + len(head) + payload_bytes + (-payload_bytes & 3)
        self.xid = xid
        self.wire: list[Buffer] = [_MARK_AND_XID.pack(LAST_FRAGMENT | length_bytes, xid) + head]
        if payload_bytes:
            self.wire += payload
            if payload_bytes & 3:
                self.wire.append(_PADDING[payload_bytes & 3])
        self.decode = decode
        self.sink = sink
        self.description = description
        # Fails with ServerAway instead of waiting for a server that is away.
        self.impatient = False
        # What the call moves in either direction; the pool balances by this.
        self.size_bytes = payload_bytes + (len(sink) if sink is not None else 0)
        # Who waits for the result, if somebody does; `forget` is called when the wait is cancelled.
        self.task: trio.lowlevel.Task | None = None
        self.waiter: Light | None = None
        self.forget: Callable[[Call], None] = _ignore
        self.started_at = self.sent_at = trio.current_time()
        self.transmissions = 0
        self.bad_replies = 0

    async def result(self, forget: Callable[["Call"], None]) -> object:
        """Wait for the result; `forget` is called when the wait is cancelled."""
        self.forget = forget
        return await (wait_for(self) if is_light() else self.in_task())

    async def in_task(self) -> object:
        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            self.task = None
            self.forget(self)
            return trio.lowlevel.Abort.SUCCEEDED

        self.task = trio.lowlevel.current_task()
        return await trio.lowlevel.wait_task_rescheduled(abort)

    def finish(self, result: object) -> None:
        if self.task is not None:
            task, self.task = self.task, None
            trio.lowlevel.reschedule(task, outcome.Value(result))
        elif self.waiter is not None:
            waiter, self.waiter = self.waiter, None
            waiter.finish(result)

    def fail(self, error: Exception) -> None:
        if self.task is not None:
            task, self.task = self.task, None
            trio.lowlevel.reschedule(task, outcome.Error(error))
        elif self.waiter is not None:
            waiter, self.waiter = self.waiter, None
            waiter.fail(error)


class Link:
    """A connected TCP link. `calls` are those sent (or queued to be sent) and not yet answered.

    While it runs, somebody must call `receive` whenever the socket is readable.
    """

    __slots__ = ("_broken", "_low_water_bytes", "_outgoing", "_receiver", "_receiving", "_sinks", "_wake", "address",
                 "calls", "error", "in_flight_bytes", "received_at", "sock")  # fmt: skip

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.sock = sock
        self.address = address
        self.calls: dict[int, Call] = {}
        self.in_flight_bytes = 0
        self.received_at = trio.current_time()
        self._receiver = Receiver(MAX_RECORD_BYTES, self._sink_for)
        # Whose reply has begun to come last.
        self._receiving: Call | None = None
        self._outgoing: deque[memoryview] = deque()
        self._wake = trio.Event()
        self._sinks = 0
        self._low_water_bytes = 1
        # What ended it.
        self.error: Exception | None = None
        self._broken = trio.Event()

    def send(self, call: Call) -> None:
        """Send now what the socket takes; the rest follows from `run`. Never blocks, never raises."""
        self.calls[call.xid] = call
        self.in_flight_bytes += call.size_bytes
        call.transmissions += 1
        call.sent_at = trio.current_time()
        if call.sink is not None:
            self._sinks += 1
            self._receiver.first_bytes = READ_HEAD_BYTES
        if self._outgoing or len(call.wire) > MAX_IOVECS:
            self._queue(call.wire, 0)
            return
        try:
            # Not sendfile(2) from the dirty log: both ends take 0.7 ms for a MiB in 4 KiB pages, 0.33 for a copy of it.
            sent = self.sock.sendmsg(call.wire)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = 0  # `run` meets the same error and ends the link; the call goes on elsewhere
        self._queue(call.wire, sent)

    def forget(self, call: Call) -> None:
        """Stop waiting for `call`; a late reply to it is dropped."""
        if self.calls.pop(call.xid, None) is not None:
            self._discount(call)

    def abandon(self, call: Call) -> None:
        """As `forget`, for a call that may not be sent yet: its payload's memory is the caller's again."""
        if call.xid in self.calls and self._outgoing:
            self._outgoing = deque(memoryview(bytes(buffer)) for buffer in self._outgoing)
        self.forget(call)

    async def run(self) -> None:
        """Send until the link breaks. Raises OSError, LinkClosed or ProtocolError."""
        async with open_nursery() as nursery:
            nursery.start_soon(self._transmit)
            await self._broken.wait()
            assert self.error is not None
            raise self.error

    async def listen(self) -> None:
        """Receive, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            self.receive()

    def close(self) -> None:
        trio.lowlevel.notify_closing(self.sock)
        self.sock.close()

    def _discount(self, call: Call) -> None:
        self.in_flight_bytes -= call.size_bytes
        if call.sink is not None:
            self._sinks -= 1
            if not self._sinks:
                self._receiver.first_bytes = ORDINARY_BYTES

    def _queue(self, buffers: Sequence[Buffer], skip_bytes: int) -> None:
        for buffer in buffers:
            if skip_bytes >= len(buffer):
                skip_bytes -= len(buffer)
                continue
            self._outgoing.append(memoryview(buffer)[skip_bytes:])
            skip_bytes = 0
        if self._outgoing:
            self._wake.set()

    async def _transmit(self) -> None:
        while True:
            await self._wake.wait()
            while self._outgoing:
                await trio.lowlevel.wait_writable(self.sock)
                outgoing = self._outgoing
                try:
                    sent = self.sock.sendmsg([outgoing[i] for i in range(min(len(outgoing), MAX_IOVECS))])
                except BlockingIOError:
                    continue
                while sent:
                    first = outgoing.popleft()
                    if sent < len(first):
                        outgoing.appendleft(first[sent:])
                        break
                    sent -= len(first)
            self._wake = trio.Event()

    def receive(self) -> None:
        """Take what has come, and give the replies to who waits for them. What breaks the link is `error` then."""
        receiver = self._receiver
        # A few at a time: other links get their turn.
        for _ in range(8):
            if self.error is not None:
                return
            try:
                target = receiver.buffer()
                n = self.sock.recv_into(target)
                if n == 0:
                    raise LinkClosed("connection closed by the server")
                records = receiver.received(n)
            except BlockingIOError:
                break
            except ProtocolError as error:
                self._spoiled(error)
                return
            except (OSError, LinkClosed) as error:
                self._break(error)
                return
            self.received_at = trio.current_time()
            for record in records:
                self._deliver(record)
            if n < len(target):
                break  # that was all
        # Be woken for half a payload rather than for each segment of it.
        wanted_bytes = min(max(1, receiver.certain_bytes), MAX_LOW_WATER_BYTES)
        if wanted_bytes != self._low_water_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted_bytes)
            self._low_water_bytes = wanted_bytes
        if receiver.certain_bytes:
            # A server with a full socket buffer goes on when we acknowledge, which the kernel puts off by 40 ms for one
            # segment (64 KiB on the loopback): on fresh links 7 READs in 180 upgrades took 36 to 86 ms, now none.
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _break(self, error: Exception) -> None:
        self.error = error
        self._broken.set()

    def _spoiled(self, error: ProtocolError) -> None:
        """What came is no reply. It costs the link, and counts against the call that it would have been of."""
        self._break(error)
        call = self._receiving
        if call is None or call.xid not in self.calls:
            call = next(iter(self.calls.values()), None)  # nothing tells: the one that has waited longest
        if call is not None:
            call.bad_replies += 1
            if call.bad_replies >= MAX_BAD_REPLIES:
                self.forget(call)
                call.fail(CallFailed(f"{call.description}: {error}"))

    def _sink_for(self, head: memoryview) -> Sink | None:
        call = self._receiving = self.calls.get(reply_xid(head))
        if call is None or call.sink is None:
            return None
        try:
            payload = nfs3_replies.read_payload(head, decode_reply(head))
        except RpcRefused:
            return None
        if payload is None:
            return None
        offset, length_bytes = payload
        # More than was asked for comes the ordinary way, and fails the call (`Client.read`).
        return Sink(offset, call.sink[:length_bytes]) if 0 < length_bytes <= len(call.sink) else None

    def _deliver(self, record: Record) -> None:
        body = memoryview(record.body)
        # `_sink_for` has seen that it is a reply.
        call = self.calls.get(reply_xid(body))
        if call is None:
            return  # a duplicate: the call was answered elsewhere or given up
        try:
            offset = decode_reply(body)
            if record.payload_bytes:
                result: object = nfs3_replies.decode_read_head(body, offset)
            else:
                result = call.decode(body, offset)
        except RpcRefused as refused:
            self.forget(call)
            call.fail(refused)
        except ProtocolError as error:
            self._receiving = call
            self._spoiled(error)
        else:
            self.forget(call)
            call.finish(result)


def _ignore(_: Call) -> None:
    pass


async def call_once(link: Link, call: Call) -> object:
    """Make one call on a link that nobody else runs. Raises OSError, LinkClosed, ProtocolError, RpcRefused."""
    result: object = None
    async with open_nursery() as nursery:
        nursery.start_soon(link.run)
        nursery.start_soon(link.listen)
        link.send(call)
        result = await call.result(link.forget)
        nursery.cancel_scope.cancel()
    return result


async def open_link(address: str, port: int, *, reserved_port: bool, timeout_s: float) -> Link:
    """Connect to `address` (a numeric IPv4 or IPv6 address). Raises OSError; TimeoutError when silent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Closed means gone: what a link has not sent yet must not arrive after another one, or another daemon, has sent
        # the same call and newer ones; and its payload's memory may have other bytes by then.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        if reserved_port:
            _bind_reserved_port(sock, "::" if family == socket.AF_INET6 else "0.0.0.0")
        status = sock.connect_ex((address, port))
        if status == errno.EINPROGRESS:
            with trio.move_on_after(timeout_s) as scope:
                await trio.lowlevel.wait_writable(sock)
            if scope.cancelled_caught:
                raise TimeoutError(errno.ETIMEDOUT, f"no answer in {timeout_s:g} s")
            status = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if status:
            raise OSError(status, os.strerror(status))
    except BaseException:
        sock.close()
        raise
    return Link(sock, address)


def _bind_reserved_port(sock: socket.socket, any_address: str) -> None:
    """Bind below 1024, as servers with the `secure` export option want. Needs root; without, no bind."""
    # 665…1023 as the kernel client takes them; in random order, since other mounts take them too.
    for port in random.sample(range(665, 1024), 1024 - 665):
        try:
            sock.bind((any_address, port))
            return
        except PermissionError:
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
