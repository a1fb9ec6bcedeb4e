"""NFS version 3 (RFC 1813 §3.3): a decoder of the results of each procedure.

From the place in a reply record where they begin to its end. Rules of this room: those of `nfs3.py`; a decoder
raises ProtocolError for whatever is not exactly one well-formed result, and nothing else. Here alone it is judged
what a server says: what comes out of a decoder Linux can have. Of a listing, an entry that it cannot have is left
out; a size or time that it cannot have becomes the nearest one. Those of the frequent procedures read whole
structures at once instead of value after value, which is what a listing of 100,000 names spends its time on.
"""

import functools
import struct
from collections.abc import Callable
from typing import TypeVar

from efcfs.nfs.nfs3 import (
    FATTR_BYTES,
    FHSIZE,
    FILE_SYNC,
    MAX_SIZE,
    NAME_MAX,
    NF3FIFO,
    NF3REG,
    NFS3_OK,
    NFS3ERR_IO,
    NFS3ERR_NAMETOOLONG,
    NS,
    PATH_MAX,
    UNSTABLE,
    WRITEVERFSIZE,
    AccessResult,
    CommitResult,
    CreateResult,
    DirEntry,
    DirEntryPlus,
    Fattr,
    FsinfoResult,
    FsstatResult,
    GetattrResult,
    LinkResult,
    LookupResult,
    PathconfResult,
    ReaddirplusResult,
    ReaddirResult,
    ReadlinkResult,
    ReadResult,
    RemoveResult,
    RenameResult,
    SetattrResult,
    Wcc,
    WccAttr,
    WriteResult,
    clamped,
    fattr_at,
)  # fmt: skip
from efcfs.nfs.xdr import ProtocolError

_U32 = struct.Struct(">I")
_TWO = struct.Struct(">II")
_THREE = struct.Struct(">III")
_WCC_ATTR = struct.Struct(">Q4I")
_WRITTEN = struct.Struct(">II8s")
_ENTRY = struct.Struct(">QI")
_ENTRY_COOKIE = struct.Struct(">QI")
_ENTRY_FATTR = struct.Struct(">5I2Q2I2Q6III")
_FSSTAT = struct.Struct(">6QI")
_FSINFO = struct.Struct(">7IQIII")
_PATHCONF = struct.Struct(">6I")
# As numbers they are found in bytes without a detour.
_NUL, _SLASH = 0, ord("/")
# A NamedTuple from a tuple in half the time of calling its class.
_new = tuple.__new__

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
        return fattr_at(view, pos + 4), pos + 4 + FATTR_BYTES
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
        if size > MAX_SIZE or m_ns >= NS or c_ns >= NS:
            size, m_ns, c_ns = clamped(size, m_ns, c_ns)
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


def _fh(view: memoryview, pos: int) -> tuple[bytes, int]:
    fh, pos = _opaque(view, pos, FHSIZE)
    if not fh:
        raise ProtocolError("file handle of 0 bytes")
    return fh, pos


def _post_op_fh(view: memoryview, pos: int) -> tuple[bytes | None, int]:
    (follows,) = _U32.unpack_from(view, pos)
    return _fh(view, pos + 4) if _boolean(follows) else (None, pos + 4)


@_exactly
def decode_getattr(view: memoryview, pos: int) -> tuple[GetattrResult, int]:
    status = _status(view, pos)
    if status:
        return GetattrResult(status, None), pos + 4
    return GetattrResult(status, fattr_at(view, pos + 4)), pos + 4 + FATTR_BYTES


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
        fh, pos = _fh(view, pos)
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
    """A target that Linux cannot have is a failure: it would end the READLINK of the kernel with one, too."""
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    target = b""
    if status == NFS3_OK:
        target, pos = _opaque(view, pos, len(view))
        if len(target) >= PATH_MAX:
            return ReadlinkResult(NFS3ERR_NAMETOOLONG, attr, b""), pos
        if not target or _NUL in target:
            return ReadlinkResult(NFS3ERR_IO, attr, b""), pos
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
    left_out = cookie = 0
    while _boolean(follows):
        fileid, name_bytes = _ENTRY.unpack_from(view, pos)
        pos += 12
        name = bytes(view[pos : pos + name_bytes])
        pos += name_bytes + 3 & ~3
        cookie, follows = _ENTRY_COOKIE.unpack_from(view, pos)
        pos += 12
        if 0 < name_bytes <= NAME_MAX and _SLASH not in name and _NUL not in name and cookie:
            entries.append(DirEntry(fileid, name, cookie))
        else:
            left_out += 1
    (eof,) = _U32.unpack_from(view, pos)
    return ReaddirResult(status, attr, verifier, entries, _boolean(eof), left_out, cookie), pos + 4


@_exactly
def decode_readdirplus(view: memoryview, pos: int) -> tuple[ReaddirplusResult, int]:
    status = _status(view, pos)
    attr, pos = _attr(view, pos + 4)
    entries: list[DirEntryPlus] = []
    if status:
        return ReaddirplusResult(status, attr, b"", entries, False), pos
    verifier, follows = struct.unpack_from(">8sI", view, pos)
    pos += 12
    left_out = cookie = 0
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
        good = 0 < name_bytes <= NAME_MAX and _SLASH not in name and _NUL not in name and cookie
        if follows == 1:
            # In one go with what is behind the attributes: handle_follows, and the handle's length or,
            # as there is more after every entry, something else.
            (
                kind, mode, nlink, uid, gid, size, used, major, minor, fsid, inode,
                a_s, a_ns, m_s, m_ns, c_s, c_ns, follows, fh_bytes,
            ) = fattr_at(buf, pos)  # fmt: skip
            if not NF3REG <= kind <= NF3FIFO:
                good = False
            if size > MAX_SIZE or a_ns >= NS or m_ns >= NS or c_ns >= NS:
                size, a_ns, m_ns, c_ns = clamped(size, a_ns, m_ns, c_ns)
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
            if not 0 < fh_bytes <= FHSIZE:
                good = False
            pos += 4
            fh = buf[pos : pos + fh_bytes]
            pos += fh_bytes + 3 & ~3
        elif follows:
            break
        else:
            fh = None
        (follows,) = u32_at(buf, pos)
        pos += 4
        if good:
            entries.append(_new(DirEntryPlus, (fileid, name, cookie, entry_attr, fh)))
        else:
            left_out += 1
    _boolean(follows)
    (eof,) = u32_at(buf, pos)
    return ReaddirplusResult(status, attr, verifier, entries, _boolean(eof), left_out, cookie), pos + 4


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
