"""The MOUNT protocol, version 3 (RFC 1813 appendix I): from an export's path to its root's file handle.

Rules of this room: no I/O; arguments to bytes, results to values or ProtocolError. Paths and names are bytes.
"""

from typing import NamedTuple

from efcfs.nfs.xdr import Decoder, ProtocolError, opaque

PROGRAM = 100005
VERSION = 3

MOUNTPROC3_NULL = 0
MOUNTPROC3_MNT = 1
MOUNTPROC3_DUMP = 2
MOUNTPROC3_UMNT = 3
MOUNTPROC3_UMNTALL = 4
MOUNTPROC3_EXPORT = 5

MNTPATHLEN = 1024
MNTNAMLEN = 255
FHSIZE3 = 64

MNT3_OK = 0
MNT3ERR_PERM = 1
MNT3ERR_NOENT = 2
MNT3ERR_IO = 5
MNT3ERR_ACCES = 13
MNT3ERR_NOTDIR = 20
MNT3ERR_INVAL = 22
MNT3ERR_NAMETOOLONG = 63
MNT3ERR_NOTSUPP = 10004
MNT3ERR_SERVERFAULT = 10006


class MntResult(NamedTuple):
    """`fh` is None unless the status is MNT3_OK. `auth_flavors`: the RPC flavors that the export takes."""

    status: int
    fh: bytes | None
    auth_flavors: tuple[int, ...]


class Export(NamedTuple):
    """An exported directory and to whom; no groups means to everyone."""

    directory: bytes
    groups: tuple[bytes, ...]


class MountEntry(NamedTuple):
    """A client that, as far as the server remembers, has mounted a directory."""

    host: bytes
    directory: bytes


def mnt_args(dirpath: bytes) -> bytes:
    return opaque(dirpath)


def umnt_args(dirpath: bytes) -> bytes:
    return opaque(dirpath)


def decode_mnt(view: memoryview, offset: int) -> MntResult:
    """Raises ProtocolError."""
    results = Decoder(view, offset)
    status = results.u32()
    fh = None
    flavors: list[int] = []
    if status == MNT3_OK:
        fh = results.opaque(FHSIZE3)
        if not fh:
            raise ProtocolError("file handle of 0 bytes")
        for _ in range(results.u32()):
            flavors.append(results.u32())
    results.done()
    return MntResult(status, fh, tuple(flavors))


def decode_dump(view: memoryview, offset: int) -> list[MountEntry]:
    """Who has mounted what. Raises ProtocolError."""
    results = Decoder(view, offset)
    entries = []
    while results.boolean():
        entries.append(MountEntry(results.string(MNTNAMLEN), results.string(MNTPATHLEN)))
    results.done()
    return entries


def decode_export(view: memoryview, offset: int) -> list[Export]:
    """What the server exports. Raises ProtocolError."""
    results = Decoder(view, offset)
    exports = []
    while results.boolean():
        directory = results.string(MNTPATHLEN)
        groups = []
        while results.boolean():
            groups.append(results.string(MNTNAMLEN))
        exports.append(Export(directory, tuple(groups)))
    results.done()
    return exports
