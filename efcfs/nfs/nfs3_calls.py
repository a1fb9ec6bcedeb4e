"""NFS version 3 (RFC 1813 §3.3): an encoder of the arguments of each procedure.

Rules of this room: those of `nfs3.py`.
"""

import struct

from efcfs.nfs.nfs3 import (
    DONT_CHANGE,
    MAX_TIME_NS,
    NF3BLK,
    NF3CHR,
    NS,
    SERVER_TIME,
    SET_TO_CLIENT_TIME,
    SET_TO_SERVER_TIME,
    Sattr,
)
from efcfs.nfs.xdr import opaque, u32, u64

_U32 = struct.Struct(">I")
_TWO = struct.Struct(">II")
_THREE = struct.Struct(">III")


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
    return _TWO.pack(*divmod(min(max(time_ns, 0), MAX_TIME_NS), NS))


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
