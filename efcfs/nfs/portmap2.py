"""The port mapper, version 2 (RFC 1833 §3): which port of a server has which program.

Rules of this room: no I/O; arguments to bytes, results to values or ProtocolError.
"""

from typing import NamedTuple

from efcfs.nfs.xdr import Decoder, u32

PORT = 111
PROGRAM = 100000
VERSION = 2

PMAPPROC_NULL = 0
PMAPPROC_SET = 1
PMAPPROC_UNSET = 2
PMAPPROC_GETPORT = 3
PMAPPROC_DUMP = 4
PMAPPROC_CALLIT = 5

IPPROTO_TCP = 6
IPPROTO_UDP = 17


class Mapping(NamedTuple):
    """Version `vers` of program `prog` is at `port` of protocol `prot`."""

    prog: int
    vers: int
    prot: int
    port: int


def getport_args(mapping: Mapping) -> bytes:
    """Its port is not looked at: it is what is asked for."""
    return b"".join(map(u32, mapping))


def decode_getport(view: memoryview, offset: int) -> int:
    """The port as sent, 0 if the server does not have the program. Raises ProtocolError."""
    results = Decoder(view, offset)
    port = results.u32()
    results.done()
    return port


def decode_dump(view: memoryview, offset: int) -> list[Mapping]:
    """All that the port mapper knows. Raises ProtocolError."""
    results = Decoder(view, offset)
    mappings = []
    while results.boolean():
        mappings.append(Mapping(results.u32(), results.u32(), results.u32(), results.u32()))
    results.done()
    return mappings
