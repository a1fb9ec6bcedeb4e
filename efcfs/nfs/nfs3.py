"""NFS version 3 (RFC 1813): the client's half of its 22 procedures.

For each procedure an encoder of its arguments, and a decoder of its results from the place in a reply
record where they begin to its end. Rules of this room: no I/O; bytes in and values out; names and file
handles are bytes. A decoder raises ProtocolError for whatever is not exactly one well-formed result, and
nothing else. A failure status is a result like any other: what it means is for the caller.
Times are nanoseconds since 1970, sizes bytes. The decoders of the frequent procedures read whole
structures at once instead of value after value, which is what a listing of 100,000 names spends its time on.
"""

import functools
import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from efcfs.nfs.xdr import ProtocolError, opaque, u32, u64

PROGRAM = 100003
VERSION = 3

# -- constants (RFC 1813 §2.4 to §2.6, §3) -----------------------------------------------------------

FHSIZE = 64
COOKIEVERFSIZE = 8
CREATEVERFSIZE = 8
WRITEVERFSIZE = 8

NFSPROC3_NULL = 0
NFSPROC3_GETATTR = 1
NFSPROC3_SETATTR = 2
NFSPROC3_LOOKUP = 3
NFSPROC3_ACCESS = 4
NFSPROC3_READLINK = 5
NFSPROC3_READ = 6
NFSPROC3_WRITE = 7
NFSPROC3_CREATE = 8
NFSPROC3_MKDIR = 9
NFSPROC3_SYMLINK = 10
NFSPROC3_MKNOD = 11
NFSPROC3_REMOVE = 12
NFSPROC3_RMDIR = 13
NFSPROC3_RENAME = 14
NFSPROC3_LINK = 15
NFSPROC3_READDIR = 16
NFSPROC3_READDIRPLUS = 17
NFSPROC3_FSSTAT = 18
NFSPROC3_FSINFO = 19
NFSPROC3_PATHCONF = 20
NFSPROC3_COMMIT = 21

PROCEDURE_NAMES = (
    "NULL", "GETATTR", "SETATTR", "LOOKUP", "ACCESS", "READLINK", "READ", "WRITE", "CREATE", "MKDIR",
    "SYMLINK", "MKNOD", "REMOVE", "RMDIR", "RENAME", "LINK", "READDIR", "READDIRPLUS", "FSSTAT", "FSINFO",
    "PATHCONF", "COMMIT",
)  # fmt: skip

NFS3_OK = 0
NFS3ERR_PERM = 1
NFS3ERR_NOENT = 2
NFS3ERR_IO = 5
NFS3ERR_NXIO = 6
NFS3ERR_ACCES = 13
NFS3ERR_EXIST = 17
NFS3ERR_XDEV = 18
NFS3ERR_NODEV = 19
NFS3ERR_NOTDIR = 20
NFS3ERR_ISDIR = 21
NFS3ERR_INVAL = 22
NFS3ERR_FBIG = 27
NFS3ERR_NOSPC = 28
NFS3ERR_ROFS = 30
NFS3ERR_MLINK = 31
NFS3ERR_NAMETOOLONG = 63
NFS3ERR_NOTEMPTY = 66
NFS3ERR_DQUOT = 69
NFS3ERR_STALE = 70
NFS3ERR_REMOTE = 71
NFS3ERR_BADHANDLE = 10001
NFS3ERR_NOT_SYNC = 10002
NFS3ERR_BAD_COOKIE = 10003
NFS3ERR_NOTSUPP = 10004
NFS3ERR_TOOSMALL = 10005
NFS3ERR_SERVERFAULT = 10006
NFS3ERR_BADTYPE = 10007
NFS3ERR_JUKEBOX = 10008

STATUS_NAMES = {
    value: name for name, value in list(globals().items()) if name.startswith(("NFS3_OK", "NFS3ERR_"))
}

NF3REG = 1
NF3DIR = 2
NF3BLK = 3
NF3CHR = 4
NF3LNK = 5
NF3SOCK = 6
NF3FIFO = 7

ACCESS3_READ = 0x0001
ACCESS3_LOOKUP = 0x0002
ACCESS3_MODIFY = 0x0004
ACCESS3_EXTEND = 0x0008
ACCESS3_DELETE = 0x0010
ACCESS3_EXECUTE = 0x0020

# stable_how of WRITE
UNSTABLE = 0
DATA_SYNC = 1
FILE_SYNC = 2

# createmode3 of CREATE
UNCHECKED = 0
GUARDED = 1
EXCLUSIVE = 2

# properties of FSINFO
FSF3_LINK = 0x0001
FSF3_SYMLINK = 0x0002
FSF3_HOMOGENEOUS = 0x0008
FSF3_CANSETTIME = 0x0010

# time_how of sattr3
DONT_CHANGE = 0
SET_TO_SERVER_TIME = 1
SET_TO_CLIENT_TIME = 2

# As a time in Sattr: whatever the server's clock says.
SERVER_TIME = -1

NS = 10**9
# The latest time that nfstime3 can hold, in 2106; later ones are set to it.
MAX_TIME_NS = (2**32 - 1) * NS

# -- attributes (RFC 1813 §2.5, §2.6) ----------------------------------------------------------------


class Fattr(NamedTuple):
    """fattr3. `size` and `used` in bytes, `mode` without the file type."""

    type: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    used: int
    rdev_major: int
    rdev_minor: int
    fsid: int
    fileid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class WccAttr(NamedTuple):
    """wcc_attr: what the server had before the operation."""

    size: int
    mtime_ns: int
    ctime_ns: int


class Wcc(NamedTuple):
    """wcc_data: a file before and after the operation, as far as the server says."""

    before: WccAttr | None
    after: Fattr | None


class Sattr(NamedTuple):
    """sattr3: what to set. None leaves a value as it is. Times: SERVER_TIME, or nanoseconds from 0 on."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


FATTR_BYTES = 84
_U32 = struct.Struct(">I")
_TWO = struct.Struct(">II")
_THREE = struct.Struct(">III")
_TIME = _TWO
_FATTR = struct.Struct(">5I2Q2I2Q6I")
_WCC_ATTR = struct.Struct(">Q4I")
_WRITTEN = struct.Struct(">II8s")
_ENTRY = struct.Struct(">QI")
_ENTRY_COOKIE = struct.Struct(">QI")
_ENTRY_FATTR = struct.Struct(">5I2Q2I2Q6III")
_FSSTAT = struct.Struct(">6QI")
_FSINFO = struct.Struct(">7IQIII")
_PATHCONF = struct.Struct(">6I")
# A NamedTuple from a tuple in half the time of calling its class.
_new = tuple.__new__


def pack_fattr(attr: Fattr) -> bytes:
    """The 84 bytes of fattr3. Raises struct.error if a value does not fit."""
    return _FATTR.pack(
        *attr[:11], *divmod(attr.atime_ns, NS), *divmod(attr.mtime_ns, NS), *divmod(attr.ctime_ns, NS)
    )


def unpack_fattr(buf: bytes | memoryview, offset: int = 0) -> Fattr:
    """Decode fattr3 at `offset`. Raises ProtocolError."""
    try:
        return _fattr(buf, offset)
    except struct.error:
        raise ProtocolError("attributes truncated") from None


def _fattr(buf: bytes | memoryview, offset: int) -> Fattr:
    kind, mode, nlink, uid, gid, size, used, major, minor, fsid, fileid, a_s, a_ns, m_s, m_ns, c_s, c_ns = (
        _FATTR.unpack_from(buf, offset)
    )
    if not NF3REG <= kind <= NF3FIFO:
        raise ProtocolError(f"file type {kind}")
    return _new(
        Fattr,
        (
            kind, mode, nlink, uid, gid, size, used, major, minor, fsid, fileid,
            a_s * NS + a_ns, m_s * NS + m_ns, c_s * NS + c_ns,
        ),
    )  # fmt: skip


# -- arguments (RFC 1813 §3.3) -----------------------------------------------------------------------


def _sattr(sattr: Sattr) -> bytes:
    parts = [
        _U32.pack(0) if value is None else _TWO.pack(1, value) for value in (sattr.mode, sattr.uid, sattr.gid)
    ]
    parts.append(_U32.pack(0) if sattr.size is None else _U32.pack(1) + u64(sattr.size))
    for time_ns in (sattr.atime_ns, sattr.mtime_ns):
        if time_ns is None:
            parts.append(_U32.pack(DONT_CHANGE))
        elif time_ns == SERVER_TIME:
            parts.append(_U32.pack(SET_TO_SERVER_TIME))
        else:
            parts.append(_U32.pack(SET_TO_CLIENT_TIME) + _time(time_ns))
    return b"".join(parts)


def _time(time_ns: int) -> bytes:
    return _TIME.pack(*divmod(min(max(time_ns, 0), MAX_TIME_NS), NS))


def null_args() -> bytes:
    return b""


def getattr_args(fh: bytes) -> bytes:
    return opaque(fh)


def setattr_args(fh: bytes, sattr: Sattr, guard_ctime_ns: int | None) -> bytes:
    """With a guard the server refuses (NFS3ERR_NOT_SYNC) unless the file has this ctime."""
    guard = u32(0) if guard_ctime_ns is None else u32(1) + _time(guard_ctime_ns)
    return opaque(fh) + _sattr(sattr) + guard


def lookup_args(dir_fh: bytes, name: bytes) -> bytes:
    return opaque(dir_fh) + opaque(name)


def access_args(fh: bytes, access: int) -> bytes:
    return opaque(fh) + u32(access)


def readlink_args(fh: bytes) -> bytes:
    return opaque(fh)


def read_args(fh: bytes, offset: int, count: int) -> bytes:
    return opaque(fh) + u64(offset) + u32(count)


def write_head(fh: bytes, offset: int, count: int, stable: int) -> bytes:
    """The arguments of WRITE up to the `count` bytes of data, which follow with their padding."""
    return opaque(fh) + u64(offset) + _THREE.pack(count, stable, count)


def create_args(dir_fh: bytes, name: bytes, mode_of_create: int, how: Sattr | bytes) -> bytes:
    """`how`: the 8 bytes of a verifier for EXCLUSIVE, for UNCHECKED and GUARDED the attributes."""
    return lookup_args(dir_fh, name) + u32(mode_of_create) + (how if isinstance(how, bytes) else _sattr(how))


def mkdir_args(dir_fh: bytes, name: bytes, sattr: Sattr) -> bytes:
    return lookup_args(dir_fh, name) + _sattr(sattr)


def symlink_args(dir_fh: bytes, name: bytes, sattr: Sattr, target: bytes) -> bytes:
    return lookup_args(dir_fh, name) + _sattr(sattr) + opaque(target)


def mknod_args(
    dir_fh: bytes, name: bytes, file_type: int, sattr: Sattr, rdev_major: int, rdev_minor: int
) -> bytes:
    """`file_type`: NF3SOCK, NF3FIFO, or NF3CHR and NF3BLK, of which alone the device numbers are sent."""
    args = lookup_args(dir_fh, name) + u32(file_type) + _sattr(sattr)
    return args + _TWO.pack(rdev_major, rdev_minor) if file_type in (NF3CHR, NF3BLK) else args


def remove_args(dir_fh: bytes, name: bytes) -> bytes:
    return lookup_args(dir_fh, name)


def rmdir_args(dir_fh: bytes, name: bytes) -> bytes:
    return lookup_args(dir_fh, name)


def rename_args(from_fh: bytes, from_name: bytes, to_fh: bytes, to_name: bytes) -> bytes:
    return lookup_args(from_fh, from_name) + lookup_args(to_fh, to_name)


def link_args(fh: bytes, dir_fh: bytes, name: bytes) -> bytes:
    return opaque(fh) + lookup_args(dir_fh, name)


def readdir_args(fh: bytes, cookie: int, cookieverf: bytes, count: int) -> bytes:
    """`count`: bytes of the whole result at most."""
    return opaque(fh) + u64(cookie) + cookieverf + u32(count)


def readdirplus_args(fh: bytes, cookie: int, cookieverf: bytes, dircount: int, maxcount: int) -> bytes:
    """`dircount`: bytes of names, fileids and cookies at most; `maxcount`: of the whole result."""
    return opaque(fh) + u64(cookie) + cookieverf + _TWO.pack(dircount, maxcount)


def fsstat_args(fh: bytes) -> bytes:
    return opaque(fh)


def fsinfo_args(fh: bytes) -> bytes:
    return opaque(fh)


def pathconf_args(fh: bytes) -> bytes:
    return opaque(fh)


def commit_args(fh: bytes, offset: int, count: int) -> bytes:
    """`count` 0: from `offset` to the end of the file."""
    return opaque(fh) + u64(offset) + u32(count)


# -- results (RFC 1813 §3.3) -------------------------------------------------------------------------
# On a failure status a result has the attributes that the RFC gives for failure, else None, 0 or nothing.


class GetattrResult(NamedTuple):
    status: int
    attr: Fattr | None


class SetattrResult(NamedTuple):
    status: int
    wcc: Wcc


class LookupResult(NamedTuple):
    status: int
    fh: bytes | None
    attr: Fattr | None
    dir_attr: Fattr | None


class AccessResult(NamedTuple):
    status: int
    attr: Fattr | None
    access: int


class ReadlinkResult(NamedTuple):
    status: int
    attr: Fattr | None
    target: bytes


class ReadResult(NamedTuple):
    """`data` is empty when the payload went to a place of its own; `count` bytes of it are there."""

    status: int
    attr: Fattr | None
    count: int  # type: ignore[assignment]  # hides tuple.count, as the RFC's name for it
    eof: bool
    data: bytes


class WriteResult(NamedTuple):
    status: int
    wcc: Wcc
    count: int  # type: ignore[assignment]  # hides tuple.count, as the RFC's name for it
    committed: int
    verifier: bytes


class CreateResult(NamedTuple):
    """Of CREATE, MKDIR, SYMLINK and MKNOD."""

    status: int
    fh: bytes | None
    attr: Fattr | None
    wcc: Wcc


class RemoveResult(NamedTuple):
    """Of REMOVE and RMDIR."""

    status: int
    wcc: Wcc


class RenameResult(NamedTuple):
    status: int
    from_wcc: Wcc
    to_wcc: Wcc


class LinkResult(NamedTuple):
    status: int
    attr: Fattr | None
    wcc: Wcc


class DirEntry(NamedTuple):
    fileid: int
    name: bytes
    cookie: int


class ReaddirResult(NamedTuple):
    status: int
    attr: Fattr | None
    verifier: bytes
    entries: list[DirEntry]
    eof: bool


class DirEntryPlus(NamedTuple):
    fileid: int
    name: bytes
    cookie: int
    attr: Fattr | None
    fh: bytes | None


class ReaddirplusResult(NamedTuple):
    status: int
    attr: Fattr | None
    verifier: bytes
    entries: list[DirEntryPlus]
    eof: bool


class FsstatResult(NamedTuple):
    """Total, free and available (to the caller) bytes and files; `invarsec`: seconds that they hold for."""

    status: int
    attr: Fattr | None
    tbytes: int
    fbytes: int
    abytes: int
    tfiles: int
    ffiles: int
    afiles: int
    invarsec: int


class FsinfoResult(NamedTuple):
    """Maximum, preferred and multiple of the sizes of READ and WRITE, preferred of READDIR, all in bytes."""

    status: int
    attr: Fattr | None
    rtmax: int
    rtpref: int
    rtmult: int
    wtmax: int
    wtpref: int
    wtmult: int
    dtpref: int
    maxfilesize: int
    time_delta_ns: int
    properties: int


class PathconfResult(NamedTuple):
    status: int
    attr: Fattr | None
    linkmax: int
    name_max: int
    no_trunc: bool
    chown_restricted: bool
    case_insensitive: bool
    case_preserving: bool


class CommitResult(NamedTuple):
    status: int
    wcc: Wcc
    verifier: bytes


R = TypeVar("R")


def _exactly(parse: Callable[[memoryview, int], tuple[R, int]]) -> Callable[[memoryview, int], R]:
    """The decoder made of `parse`, which returns where it stopped and leaves truncation to struct.error.

    A slice beyond the end is short without an error, yet then `parse` stops beyond the end as well.
    """
    what = parse.__name__.removeprefix("decode_").upper()

    @functools.wraps(parse)
    def decode(view: memoryview, offset: int) -> R:
        try:
            result, end = parse(view, offset)
        except struct.error:
            raise ProtocolError(f"{what} result truncated") from None
        if end != len(view):
            raise ProtocolError(f"{what} result is {end - offset} bytes long, {len(view) - offset} came")
        return result

    return decode


def _status(view: memoryview, pos: int) -> int:
    status: int = _U32.unpack_from(view, pos)[0]
    return status


def _boolean(value: int) -> bool:
    if value > 1:
        raise ProtocolError(f"boolean with value {value}")
    return value == 1


def _attr(view: memoryview, pos: int) -> tuple[Fattr | None, int]:
    """post_op_attr"""
    (follows,) = _U32.unpack_from(view, pos)
    if follows == 1:
        return _fattr(view, pos + 4), pos + 4 + FATTR_BYTES
    if follows:
        raise ProtocolError(f"boolean with value {follows}")
    return None, pos + 4


def _wcc(view: memoryview, pos: int) -> tuple[Wcc, int]:
    """wcc_data"""
    (follows,) = _U32.unpack_from(view, pos)
    pos += 4
    before = None
    if _boolean(follows):
        size, m_s, m_ns, c_s, c_ns = _WCC_ATTR.unpack_from(view, pos)
        before = WccAttr(size, m_s * NS + m_ns, c_s * NS + c_ns)
        pos += 24
    after, pos = _attr(view, pos)
    return Wcc(before, after), pos


def _opaque(view: memoryview, pos: int, max_bytes: int) -> tuple[bytes, int]:
    (length_bytes,) = _U32.unpack_from(view, pos)
    if length_bytes > max_bytes:
        raise ProtocolError(f"opaque data of {length_bytes} bytes where {max_bytes} are allowed")
    pos += 4
    return bytes(view[pos : pos + length_bytes]), pos + (length_bytes + 3 & ~3)


def _post_op_fh(view: memoryview, pos: int) -> tuple[bytes | None, int]:
    (follows,) = _U32.unpack_from(view, pos)
    return _opaque(view, pos + 4, FHSIZE) if _boolean(follows) else (None, pos + 4)


@_exactly
def decode_getattr(view: memoryview, pos: int) -> tuple[GetattrResult, int]:
    status = _status(view, pos)
    if status:
        return GetattrResult(status, None), pos + 4
    return GetattrResult(status, _fattr(view, pos + 4)), pos + 4 + FATTR_BYTES


@_exactly
def decode_setattr(view: memoryview, pos: int) -> tuple[SetattrResult, int]:
    status = _status(view, pos)
    wcc, pos = _wcc(view, pos + 4)
    return SetattrResult(status, wcc), pos


@_exactly
def decode_lookup(view: memoryview, pos: int) -> tuple[LookupResult, int]:
    status = _status(view, pos)
    fh = attr = None
    pos += 4
    if status == NFS3_OK:
        fh, pos = _opaque(view, pos, FHSIZE)
        attr, pos = _attr(view, pos)
    dir_attr, pos = _attr(view, pos)
    return LookupResult(status, fh, attr, dir_attr), pos


@_exactly
def decode_access(view: memoryview, pos: int) -> tuple[AccessResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    if status:
        return AccessResult(status, attr, 0), pos
    return AccessResult(status, attr, *_U32.unpack_from(view, pos)), pos + 4


@_exactly
def decode_readlink(view: memoryview, pos: int) -> tuple[ReadlinkResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    target = b""
    if status == NFS3_OK:
        target, pos = _opaque(view, pos, len(view))
    return ReadlinkResult(status, attr, target), pos


def _read_head(view: memoryview, pos: int) -> tuple[ReadResult, int]:
    """The results of READ up to the data."""
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    if status:
        return ReadResult(status, attr, 0, False, b""), pos
    count, eof, length_bytes = _THREE.unpack_from(view, pos)
    if count != length_bytes:
        raise ProtocolError(f"READ of {count} bytes with {length_bytes} bytes of data")
    return ReadResult(status, attr, count, _boolean(eof), b""), pos + 12


@_exactly
def decode_read(view: memoryview, pos: int) -> tuple[ReadResult, int]:
    head, pos = _read_head(view, pos)
    # A copy, as the record that `view` shows is gone when the next one is received.
    return head._replace(data=bytes(view[pos : pos + head.count])), pos + (head.count + 3 & ~3)


@_exactly
def decode_read_head(view: memoryview, pos: int) -> tuple[ReadResult, int]:
    """The result of a READ whose payload went elsewhere; `view` ends where the payload began."""
    return _read_head(view, pos)


def read_payload(view: memoryview, offset: int) -> tuple[int, int] | None:
    """Where in `view`, which may end anywhere, the payload of a READ begins, and its length in bytes.

    None if the READ failed, or `view` ends before the payload begins. Raises ProtocolError.
    """
    try:
        head, pos = _read_head(view, offset)
    except struct.error:
        return None
    return None if head.status else (pos, head.count)


@_exactly
def decode_write(view: memoryview, pos: int) -> tuple[WriteResult, int]:
    status = _status(view, pos)
    wcc, pos = _wcc(view, pos + 4)
    if status:
        return WriteResult(status, wcc, 0, UNSTABLE, b""), pos
    count, committed, verifier = _WRITTEN.unpack_from(view, pos)
    if committed > FILE_SYNC:
        raise ProtocolError(f"stable_how {committed}")
    return WriteResult(status, wcc, count, committed, verifier), pos + 16


@_exactly
def decode_create(view: memoryview, pos: int) -> tuple[CreateResult, int]:
    """Of CREATE, MKDIR, SYMLINK and MKNOD."""
    status = _status(view, pos)
    fh = attr = None
    pos += 4
    if status == NFS3_OK:
        fh, pos = _post_op_fh(view, pos)
        attr, pos = _attr(view, pos)
    wcc, pos = _wcc(view, pos)
    return CreateResult(status, fh, attr, wcc), pos


@_exactly
def decode_remove(view: memoryview, pos: int) -> tuple[RemoveResult, int]:
    """Of REMOVE and RMDIR."""
    status = _status(view, pos)
    wcc, pos = _wcc(view, pos + 4)
    return RemoveResult(status, wcc), pos


@_exactly
def decode_rename(view: memoryview, pos: int) -> tuple[RenameResult, int]:
    status = _status(view, pos)
    from_wcc, pos = _wcc(view, pos + 4)
    to_wcc, pos = _wcc(view, pos)
    return RenameResult(status, from_wcc, to_wcc), pos


@_exactly
def decode_link(view: memoryview, pos: int) -> tuple[LinkResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    wcc, pos = _wcc(view, pos)
    return LinkResult(status, attr, wcc), pos


@_exactly
def decode_readdir(view: memoryview, pos: int) -> tuple[ReaddirResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    entries: list[DirEntry] = []
    if status:
        return ReaddirResult(status, attr, b"", entries, False), pos
    verifier, follows = struct.unpack_from(">8sI", view, pos)
    pos += 12
    while _boolean(follows):
        fileid, name_bytes = _ENTRY.unpack_from(view, pos)
        pos += 12
        name = bytes(view[pos : pos + name_bytes])
        pos += name_bytes + 3 & ~3
        cookie, follows = _ENTRY_COOKIE.unpack_from(view, pos)
        pos += 12
        entries.append(DirEntry(fileid, name, cookie))
    (eof,) = _U32.unpack_from(view, pos)
    return ReaddirResult(status, attr, verifier, entries, _boolean(eof)), pos + 4


@_exactly
def decode_readdirplus(view: memoryview, pos: int) -> tuple[ReaddirplusResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    entries: list[DirEntryPlus] = []
    if status:
        return ReaddirplusResult(status, attr, b"", entries, False), pos
    verifier, follows = struct.unpack_from(">8sI", view, pos)
    pos += 12
    buf = bytes(view)  # slices of bytes are cheaper than of a view, and there are two an entry
    u32_at, entry_at, cookie_at, fattr_at = (
        _U32.unpack_from, _ENTRY.unpack_from, _ENTRY_COOKIE.unpack_from, _ENTRY_FATTR.unpack_from,
    )  # fmt: skip
    while follows == 1:
        fileid, name_bytes = entry_at(buf, pos)
        pos += 12
        name = buf[pos : pos + name_bytes]
        pos += name_bytes + 3 & ~3
        cookie, follows = cookie_at(buf, pos)
        pos += 12
        if follows == 1:
            # In one go with what is behind the attributes: handle_follows, and the handle's length or,
            # as there is more after every entry, something else.
            (
                kind, mode, nlink, uid, gid, size, used, major, minor, fsid, inode,
                a_s, a_ns, m_s, m_ns, c_s, c_ns, follows, fh_bytes,
            ) = fattr_at(buf, pos)  # fmt: skip
            if not NF3REG <= kind <= NF3FIFO:
                raise ProtocolError(f"file type {kind}")
            entry_attr = _new(
                Fattr,
                (
                    kind, mode, nlink, uid, gid, size, used, major, minor, fsid, inode,
                    a_s * NS + a_ns, m_s * NS + m_ns, c_s * NS + c_ns,
                ),
            )  # fmt: skip
            pos += FATTR_BYTES
        elif follows:
            break
        else:
            entry_attr = None
            follows, fh_bytes = _TWO.unpack_from(buf, pos)
        pos += 4
        if follows == 1:
            if fh_bytes > FHSIZE:
                raise ProtocolError(f"file handle of {fh_bytes} bytes")
            pos += 4
            fh = buf[pos : pos + fh_bytes]
            pos += fh_bytes + 3 & ~3
        elif follows:
            break
        else:
            fh = None
        (follows,) = u32_at(buf, pos)
        pos += 4
        entries.append(_new(DirEntryPlus, (fileid, name, cookie, entry_attr, fh)))
    _boolean(follows)
    (eof,) = u32_at(buf, pos)
    return ReaddirplusResult(status, attr, verifier, entries, _boolean(eof)), pos + 4


@_exactly
def decode_fsstat(view: memoryview, pos: int) -> tuple[FsstatResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    if status:
        return FsstatResult(status, attr, 0, 0, 0, 0, 0, 0, 0), pos
    return FsstatResult(status, attr, *_FSSTAT.unpack_from(view, pos)), pos + _FSSTAT.size


@_exactly
def decode_fsinfo(view: memoryview, pos: int) -> tuple[FsinfoResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    if status:
        return FsinfoResult(status, attr, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), pos
    *sizes, delta_s, delta_ns, properties = _FSINFO.unpack_from(view, pos)
    result = FsinfoResult._make((status, attr, *sizes, delta_s * NS + delta_ns, properties))
    return result, pos + _FSINFO.size


@_exactly
def decode_pathconf(view: memoryview, pos: int) -> tuple[PathconfResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    if status:
        return PathconfResult(status, attr, 0, 0, False, False, False, False), pos
    linkmax, name_max, *flags = _PATHCONF.unpack_from(view, pos)
    return PathconfResult(status, attr, linkmax, name_max, *map(_boolean, flags)), pos + _PATHCONF.size


@_exactly
def decode_commit(view: memoryview, pos: int) -> tuple[CommitResult, int]:
    status = _status(view, pos)
    wcc, pos = _wcc(view, pos + 4)
    verifier = b""
    if status == NFS3_OK:
        (verifier,) = struct.unpack_from(">8s", view, pos)
        pos += WRITEVERFSIZE
    return CommitResult(status, wcc, verifier), pos
