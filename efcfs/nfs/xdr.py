"""XDR (RFC 4506), the representation of everything that ONC RPC carries.

Rules of this room: no I/O, bytes in and values out. Whatever the input, a decoder returns a value or
raises ProtocolError, and takes no more memory than the input has bytes. It must not know any program:
what the values mean is for `rpc.py`, `portmap2.py`, `mount3.py` and the `nfs3` modules.
"""

import struct

# Zero bytes after opaque data up to a multiple of 4: PAD[-length & 3].
PAD = (b"", b"\0", b"\0\0", b"\0\0\0")

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class ProtocolError(Exception):
    """The other side sent something malformed, truncated or oversized."""


def u32(value: int) -> bytes:
    """Encode an unsigned int (RFC 4506 §4.2)."""
    return _U32.pack(value)


def u64(value: int) -> bytes:
    """Encode an unsigned hyper (RFC 4506 §4.5)."""
    return _U64.pack(value)


def opaque(data: bytes) -> bytes:
    """Encode variable-length opaque data or a string (RFC 4506 §4.10, §4.11)."""
    length_bytes = len(data)
    return _U32.pack(length_bytes) + data + PAD[-length_bytes & 3]


class Decoder:
    """Reads values off `buf` one after the other, from `pos` to `end`. Every method raises ProtocolError."""

    __slots__ = ("buf", "end", "pos")

    def __init__(self, buf: memoryview, pos: int = 0) -> None:
        self.buf = buf
        self.pos = pos
        self.end = len(buf)

    def u32(self) -> int:
        try:
            value: int = _U32.unpack_from(self.buf, self.pos)[0]
        except struct.error:
            raise ProtocolError("message truncated") from None
        self.pos += 4
        return value

    def u64(self) -> int:
        try:
            value: int = _U64.unpack_from(self.buf, self.pos)[0]
        except struct.error:
            raise ProtocolError("message truncated") from None
        self.pos += 8
        return value

    def boolean(self) -> bool:
        value = self.u32()
        if value > 1:
            raise ProtocolError(f"boolean with value {value}")
        return value == 1

    def fixed(self, length_bytes: int) -> bytes:
        """Fixed-length opaque data (RFC 4506 §4.9)."""
        pos = self.pos
        after = pos + length_bytes + (-length_bytes & 3)
        if after > self.end:
            raise ProtocolError("message truncated")
        self.pos = after
        return bytes(self.buf[pos : pos + length_bytes])

    def opaque(self, max_bytes: int) -> bytes:
        """Variable-length opaque data of at most `max_bytes`."""
        length_bytes = self.u32()
        if length_bytes > max_bytes:
            raise ProtocolError(f"opaque data of {length_bytes} bytes where {max_bytes} are allowed")
        return self.fixed(length_bytes)

    def string(self, max_bytes: int) -> bytes:
        """A string of at most `max_bytes`. It is bytes: the protocols here do not say which characters."""
        return self.opaque(max_bytes)

    def done(self) -> None:
        if self.pos != self.end:
            raise ProtocolError(f"{self.end - self.pos} bytes too many in a message")
