"""ONC RPC version 2 (RFC 5531): call headers, reply headers, and records in a TCP stream.

Rules of this room: no I/O. `Receiver` says where a socket should receive into and is told how many
bytes came; it never sees the socket. Nothing here knows a program's procedures or results: whether a
reply carries a payload that belongs somewhere else is asked of `sink_for`.
"""

import enum
import functools
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from efcfs.nfs.xdr import Decoder, ProtocolError, opaque

CALL = 0
REPLY = 1
RPC_VERSION = 2
MSG_ACCEPTED = 0
MSG_DENIED = 1
SUCCESS = 0
REJECT_RPC_MISMATCH = 0
REJECT_AUTH_ERROR = 1
AUTH_NONE = 0
AUTH_SYS = 1
# RFC 5531: an AUTH_SYS credential names at most 16 groups; any credential or verifier is at most 400 bytes.
MAX_GROUPS = 16
MAX_AUTH_BYTES = 400
MAX_MACHINE_NAME_BYTES = 255

# Record marking (RFC 5531 §11): the top bit of a fragment's length marks the record's last fragment.
LAST_FRAGMENT = 0x80000000
MARK_BYTES = 4
# Reply header and READ results up to the payload, with the empty verifier and the attributes that are usual.
HEAD_BYTES = 128
BUFFER_BYTES = 64 * 1024

_U32 = struct.Struct(">I")
_TWO = struct.Struct(">II")
# After the xid: accepted, no verifier, success.
_USUAL_REPLY = struct.pack(">IIIII", REPLY, MSG_ACCEPTED, AUTH_NONE, 0, SUCCESS)


# -- calls -------------------------------------------------------------------------------------------


class Credential(NamedTuple):
    """On whose behalf a call is made. Only the first 16 groups are sent (RFC 5531 appendix A)."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def call_header(program: int, version: int, procedure: int, credential: Credential | None) -> bytes:
    """All of a call between its xid and its arguments (RFC 5531 §9). No credential means AUTH_NONE."""
    if credential is None:
        auth = _TWO.pack(AUTH_NONE, 0)
    else:
        groups = credential.groups[:MAX_GROUPS]
        body = _U32.pack(0) + opaque(os.fsencode(os.uname().nodename)[:MAX_MACHINE_NAME_BYTES])
        body += struct.pack(f">III{len(groups)}I", credential.uid, credential.gid, len(groups), *groups)
        auth = _U32.pack(AUTH_SYS) + opaque(body)
    verifier = _TWO.pack(AUTH_NONE, 0)
    return struct.pack(">IIIII", CALL, RPC_VERSION, program, version, procedure) + auth + verifier


# -- replies -----------------------------------------------------------------------------------------


class RpcRefusal(enum.Enum):
    """Why a server did not carry out a call (accept_stat and reject_stat of RFC 5531 §9)."""

    PROG_UNAVAIL = "the server does not have the program"
    PROG_MISMATCH = "the server does not have this version of the program"
    PROC_UNAVAIL = "the server does not have the procedure"
    GARBAGE_ARGS = "the server cannot decode the arguments"
    SYSTEM_ERR = "the server has a problem of its own"
    RPC_MISMATCH = "the server does not speak RPC version 2"
    AUTH_ERROR = "the server rejects the credential"


class RpcRefused(Exception):
    """The server rejected the call. `low` and `high`: its versions for the two mismatches, else 0."""

    def __init__(self, kind: RpcRefusal, reason: str, low: int = 0, high: int = 0) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.low = low
        self.high = high


_ACCEPT_STAT = {
    1: RpcRefusal.PROG_UNAVAIL,
    2: RpcRefusal.PROG_MISMATCH,
    3: RpcRefusal.PROC_UNAVAIL,
    4: RpcRefusal.GARBAGE_ARGS,
    5: RpcRefusal.SYSTEM_ERR,
}
_AUTH_STAT = {
    1: "AUTH_BADCRED",
    2: "AUTH_REJECTEDCRED",
    3: "AUTH_BADVERF",
    4: "AUTH_REJECTEDVERF",
    5: "AUTH_TOOWEAK",
    6: "AUTH_INVALIDRESP",
    7: "AUTH_FAILED",
}


def reply_xid(view: memoryview) -> int:
    """The xid of a reply, of which the first 8 bytes are enough. Raises ProtocolError if it is no reply."""
    try:
        xid, message_type = _TWO.unpack_from(view)
    except struct.error:
        raise ProtocolError("reply truncated") from None
    if message_type != REPLY:
        raise ProtocolError(f"message of type {message_type} where a reply belongs")
    return int(xid)


def decode_reply(view: memoryview) -> int:
    """Where results begin in the reply record `view`. Raises ProtocolError; RpcRefused if it has none."""
    if view[4:24] == _USUAL_REPLY:
        return 24
    reply_xid(view)
    reply = Decoder(view, 8)
    reply_stat = reply.u32()
    if reply_stat == MSG_DENIED:
        raise _denial(reply)
    if reply_stat != MSG_ACCEPTED:
        raise ProtocolError(f"reply_stat {reply_stat}")
    reply.u32()
    reply.opaque(MAX_AUTH_BYTES)
    accept_stat = reply.u32()
    if accept_stat == SUCCESS:
        return reply.pos
    kind = _ACCEPT_STAT.get(accept_stat)
    if kind is None:
        raise ProtocolError(f"accept_stat {accept_stat}")
    if kind is RpcRefusal.PROG_MISMATCH:
        raise _mismatch(kind, reply)
    reply.done()
    raise RpcRefused(kind, kind.value)


def _denial(reply: Decoder) -> RpcRefused:
    reject_stat = reply.u32()
    if reject_stat == REJECT_RPC_MISMATCH:
        return _mismatch(RpcRefusal.RPC_MISMATCH, reply)
    if reject_stat != REJECT_AUTH_ERROR:
        raise ProtocolError(f"reject_stat {reject_stat}")
    auth_stat = reply.u32()
    reply.done()
    why = _AUTH_STAT.get(auth_stat, f"auth_stat {auth_stat}")
    return RpcRefused(RpcRefusal.AUTH_ERROR, f"{RpcRefusal.AUTH_ERROR.value}: {why}")


def _mismatch(kind: RpcRefusal, reply: Decoder) -> RpcRefused:
    low, high = reply.u32(), reply.u32()
    reply.done()
    return RpcRefused(kind, f"{kind.value}, only {low} to {high}", low, high)


# -- records in a stream -----------------------------------------------------------------------------


class Sink(NamedTuple):
    """Where a record's payload belongs: all of the record after `head_bytes`, but for XDR's padding."""

    head_bytes: int
    target: memoryview


class Record(NamedTuple):
    """A whole record without its mark, or its head if `payload_bytes` went into a sink's target.

    `body` is valid until the next call of `Receiver.buffer`.
    """

    body: memoryview
    payload_bytes: int


class Receiver:
    """Finds the records in a stream, and sends the payloads to where they belong without copying.

    For each record `sink_for` is asked once, with as much of the record as has arrived, which is all of it
    or at least HEAD_BYTES. What it raises comes out of `received`. After any error the stream is lost.
    """

    __slots__ = (
        "_asked", "_assembly", "_direct", "_end", "_expected_bytes", "_fragment_bytes", "_last_fragment",
        "_max_record_bytes", "_padding_bytes", "_pending", "_sink_for", "_start", "_store", "first_bytes",
    )  # fmt: skip

    def __init__(self, max_record_bytes: int, sink_for: Callable[[memoryview], Sink | None]) -> None:
        # How much may be received before anything of a record is known. Small keeps payloads out of _store.
        self.first_bytes = BUFFER_BYTES
        self._max_record_bytes = max_record_bytes
        self._sink_for = sink_for
        # What was received and not yet parsed is _store[_start:_end].
        self._store = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0
        # The bytes from _start that belong to what has been begun: a record in _store, a fragment.
        self._expected_bytes = 0
        # Whether sink_for has been asked about the record at _start.
        self._asked = False
        # Where the socket receives into instead of _store; _pending is the record that this completes,
        # once the padding behind it has come too.
        self._direct = memoryview(b"")
        self._pending: Record | None = None
        self._padding_bytes = 0
        # A record of several fragments: what has been put together and what is missing of this fragment.
        self._assembly = bytearray()
        self._fragment_bytes = 0
        self._last_fragment = False

    @property
    def certain_bytes(self) -> int:
        """How many bytes of a payload are still to come."""
        return len(self._direct)

    def buffer(self) -> memoryview:
        """Where to receive next; never empty. Ends the life of the records returned so far."""
        if self._direct:
            return self._direct
        have = self._end - self._start
        if not have:
            self._start = self._end = 0
        if self._expected_bytes:
            limit = self._expected_bytes + self.first_bytes
        elif have:
            limit = max(self.first_bytes, MARK_BYTES + HEAD_BYTES)
        else:
            limit = self.first_bytes
        if self._start + limit > BUFFER_BYTES:
            self._store[:have] = self._store[self._start : self._end]
            self._start, self._end = 0, have
        return self._store[self._end : self._start + limit]

    def received(self, n: int) -> list[Record]:
        """The records completed by `n` bytes received into `buffer()`. Raises ProtocolError."""
        if self._direct:
            self._direct = self._direct[n:]
            if self._direct:
                return []
        else:
            self._end += n
        records: list[Record] = []
        while not self._direct and self._parse(records):
            pass
        return records

    def _parse(self, records: list[Record]) -> bool:
        """Take the next thing out of _store. False if more bytes are needed for it."""
        if self._pending is not None:
            return self._parse_padding(records)
        if self._fragment_bytes:
            return self._parse_fragment(records)
        start = self._start + MARK_BYTES
        have = self._end - start
        if have < 0:
            return False
        mark: int = _U32.unpack_from(self._store, self._start)[0]
        length_bytes = mark & ~LAST_FRAGMENT
        if not length_bytes:
            raise ProtocolError("empty fragment")
        if len(self._assembly) + length_bytes > self._max_record_bytes:
            if have < 8 and not self._assembly:
                return False
            # Whoever is asked learns so whose reply it is.
            self._sink_for(memoryview(self._assembly) or self._store[start : self._end])
            raise ProtocolError(
                f"record of {len(self._assembly) + length_bytes} bytes, {self._max_record_bytes} allowed"
            )
        if self._assembly or mark < LAST_FRAGMENT:
            self._start = start
            self._fragment_bytes = self._expected_bytes = length_bytes
            self._last_fragment = mark >= LAST_FRAGMENT
            return True
        if have >= length_bytes:
            body = self._store[start : start + length_bytes]
            self._start = start + length_bytes
            self._expected_bytes = 0
            records.append(Record(body, 0) if self._asked else self._whole(body))
            self._asked = False
            return True
        if have < HEAD_BYTES or self._asked:
            return False
        self._begin(start, have, length_bytes)
        return self._pending is not None

    def _begin(self, start: int, have: int, length_bytes: int) -> None:
        """Decide where the rest of a record goes whose head has arrived."""
        head = self._store[start : self._end]
        sink = self._sink_for(head)
        if sink is not None:
            self._padding_bytes = _padding_of(length_bytes, sink)
            payload = head[sink.head_bytes :]
            self._pending = Record(memoryview(bytes(head[: sink.head_bytes])), len(sink.target))
            received_bytes = min(len(payload), len(sink.target))
            sink.target[:received_bytes] = payload[:received_bytes]
            self._direct = sink.target[received_bytes:]
            self._start = start + sink.head_bytes + received_bytes
        elif MARK_BYTES + length_bytes > BUFFER_BYTES:
            own = memoryview(bytearray(length_bytes))
            own[:have] = head
            self._pending = Record(own, 0)
            self._direct = own[have:]
            self._padding_bytes = 0
            self._start = self._end
        else:
            self._asked = True
            self._expected_bytes = MARK_BYTES + length_bytes

    def _parse_padding(self, records: list[Record]) -> bool:
        if self._end - self._start < self._padding_bytes:
            return False
        assert self._pending is not None
        records.append(self._pending)
        self._pending = None
        self._start += self._padding_bytes
        return True

    def _parse_fragment(self, records: list[Record]) -> bool:
        arrived = self._store[self._start : min(self._end, self._start + self._fragment_bytes)]
        self._assembly += arrived
        self._start += len(arrived)
        self._fragment_bytes -= len(arrived)
        self._expected_bytes = self._fragment_bytes
        if self._fragment_bytes:
            return False
        if self._last_fragment:
            body = memoryview(self._assembly)
            self._assembly = bytearray()
            records.append(self._whole(body))
        return True

    def _whole(self, body: memoryview) -> Record:
        """A record that arrived whole: only its payload, if it belongs elsewhere, is copied."""
        sink = self._sink_for(body)
        if sink is None:
            return Record(body, 0)
        payload_bytes = len(sink.target)
        _padding_of(len(body), sink)
        sink.target[:] = body[sink.head_bytes : sink.head_bytes + payload_bytes]
        return Record(body[: sink.head_bytes], payload_bytes)


def _padding_of(record_bytes: int, sink: Sink) -> int:
    """How many bytes follow the payload. Raises ProtocolError if XDR does not have so many there."""
    padding_bytes = record_bytes - sink.head_bytes - len(sink.target)
    if padding_bytes != -len(sink.target) & 3:
        raise ProtocolError(f"{padding_bytes} bytes after a payload of {len(sink.target)}")
    return padding_bytes
