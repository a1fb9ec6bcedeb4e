"""NFS version 3 (RFC 1813): its constants, and the values that its calls and replies carry.

`nfs3_calls.py` encodes the arguments of the procedures, `nfs3_replies.py` decodes their results. Rules of these
three rooms: no I/O; bytes in and values out; names and file handles are bytes; times are nanoseconds since 1970,
sizes bytes. A failure status is a result like any other: what it means is for the caller.
"""

import struct
from typing import NamedTuple

from efcfs.nfs.xdr import ProtocolError

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
# The largest file that Linux has (loff_t). What servers say beyond it is taken for it, as Linux' own client does.
MAX_SIZE = 2**63 - 1
# The longest name that Linux has, and how long the target of a symbolic link must not be: a page, with its NUL.
NAME_MAX = 255
PATH_MAX = 4096

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
_FATTR = struct.Struct(">5I2Q2I2Q6I")


def pack_fattr(attr: Fattr) -> bytes:
    """The 84 bytes of fattr3. Whatever was decoded fits."""
    return _FATTR.pack(
        *attr[:11], *divmod(attr.atime_ns, NS), *divmod(attr.mtime_ns, NS), *divmod(attr.ctime_ns, NS)
    )


def unpack_fattr(buf: bytes | memoryview, offset: int = 0) -> Fattr:
    """Decode fattr3 at `offset`. Raises ProtocolError."""
    try:
        return fattr_at(buf, offset)
    except struct.error:
        raise ProtocolError("attributes truncated") from None


def clamped(size: int, *parts_ns: int) -> tuple[int, ...]:
    """A size and the nanosecond parts of times, as near as a file can have them."""
    return min(size, MAX_SIZE), *(min(part, NS - 1) for part in parts_ns)


def fattr_at(buf: bytes | memoryview, offset: int) -> Fattr:
    """The same for a decoder, which catches the struct.error of what is truncated itself."""
    kind, mode, nlink, uid, gid, size, used, major, minor, fsid, fileid, a_s, a_ns, m_s, m_ns, c_s, c_ns = (
        _FATTR.unpack_from(buf, offset)
    )
    if not NF3REG <= kind <= NF3FIFO:
        raise ProtocolError(f"file type {kind}")
    if size > MAX_SIZE or a_ns >= NS or m_ns >= NS or c_ns >= NS:
        size, a_ns, m_ns, c_ns = clamped(size, a_ns, m_ns, c_ns)
    return tuple.__new__(
        Fattr,
        (
            kind, mode, nlink, uid, gid, size, used, major, minor, fsid, fileid,
            a_s * NS + a_ns, m_s * NS + m_ns, c_s * NS + c_ns,
        ),
    )  # fmt: skip


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
    """`left_out`: how many entries came that no file system can have; `last`: the cookie of the last one that came."""

    status: int
    attr: Fattr | None
    verifier: bytes
    entries: list[DirEntry]
    eof: bool
    left_out: int = 0
    last: int = 0


class DirEntryPlus(NamedTuple):
    fileid: int
    name: bytes
    cookie: int
    attr: Fattr | None
    fh: bytes | None


class ReaddirplusResult(NamedTuple):
    """As of READDIR."""

    status: int
    attr: Fattr | None
    verifier: bytes
    entries: list[DirEntryPlus]
    eof: bool
    left_out: int = 0
    last: int = 0


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
