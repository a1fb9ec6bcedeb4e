"""The server's half of the codecs: it decodes calls and arguments, and encodes replies and results.

For tests that check the client's half against it, and for scripted servers. It is written from the RFCs value
after value and shares with `efcfs.nfs` only the plain types, XDR's primitives and the constants, so that a
mistake in one half shows. What it decodes comes from our own client: a mistake there raises ProtocolError.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from efcfs.nfs import mount3, nfs3, portmap2, rpc
from efcfs.nfs.nfs3 import Fattr, Sattr, Wcc
from efcfs.nfs.xdr import Decoder, ProtocolError, opaque, u32, u64

MAX_BYTES = 2**32 - 1
NS = 10**9

# -- RPC (RFC 5531) ----------------------------------------------------------------------------------


class CallMessage(NamedTuple):
    """A call; its arguments are for one of the functions below."""

    xid: int
    program: int
    version: int
    procedure: int
    credential: rpc.Credential | None
    machine_name: bytes
    args: memoryview


def decode_call(record: bytes | bytearray | memoryview) -> CallMessage:
    """A call from its record without the mark."""
    call = Decoder(memoryview(record))
    xid, message_type, rpc_version = call.u32(), call.u32(), call.u32()
    if (message_type, rpc_version) != (0, 2):
        raise ProtocolError(f"not a call of RPC 2: {message_type}, {rpc_version}")
    program, version, procedure = call.u32(), call.u32(), call.u32()
    flavor, body = call.u32(), Decoder(memoryview(call.opaque(400)))
    credential, machine_name = None, b""
    if flavor == 1:
        body.u32()
        machine_name = body.string(255)
        uid, gid = body.u32(), body.u32()
        groups = tuple(body.u32() for _ in range(body.u32()))
        if len(groups) > 16:
            raise ProtocolError(f"{len(groups)} groups")
        credential = rpc.Credential(uid, gid, groups)
    elif flavor:
        raise ProtocolError(f"credential of flavor {flavor}")
    body.done()
    if (call.u32(), call.opaque(400)) != (0, b""):
        raise ProtocolError("a verifier where none belongs")
    return CallMessage(xid, program, version, procedure, credential, machine_name, call.buf[call.pos :])


def accepted(xid: int, results: bytes, verifier: bytes = b"") -> bytes:
    """The reply record with `results` of a call that succeeded."""
    return u32(xid) + u32(1) + u32(0) + u32(0) + opaque(verifier) + u32(0) + results


def refused(xid: int, kind: rpc.RpcRefusal, low: int = 0, high: int = 0, auth_stat: int = 1) -> bytes:
    """The reply record to a call that was not carried out."""
    versions = u32(low) + u32(high)
    if kind is rpc.RpcRefusal.RPC_MISMATCH:
        return u32(xid) + u32(1) + u32(1) + u32(0) + versions
    if kind is rpc.RpcRefusal.AUTH_ERROR:
        return u32(xid) + u32(1) + u32(1) + u32(1) + u32(auth_stat)
    names = ("SUCCESS", "PROG_UNAVAIL", "PROG_MISMATCH", "PROC_UNAVAIL", "GARBAGE_ARGS", "SYSTEM_ERR")
    reply = u32(xid) + u32(1) + u32(0) + u32(0) + u32(0) + u32(names.index(kind.name))
    return reply + versions if kind is rpc.RpcRefusal.PROG_MISMATCH else reply


def framed(record: bytes, fragment_bytes: Sequence[int] = ()) -> bytes:
    """The record with its marks: fragments of these lengths as far as it lasts, then the rest."""
    stream = b""
    for length in fragment_bytes:
        if length >= len(record):
            break
        stream += u32(length) + record[:length]
        record = record[length:]
    return stream + u32(0x80000000 | len(record)) + record


# -- arguments of NFS (RFC 1813 §3.3): the values that nfs3_calls.*_args was called with -------------------


def _fh(args: Decoder) -> bytes:
    return args.opaque(64)


def _name(args: Decoder) -> bytes:
    return args.string(MAX_BYTES)


def _time(args: Decoder) -> int:
    return args.u32() * NS + args.u32()


def _sattr(args: Decoder) -> Sattr:
    mode, uid, gid = (args.u32() if args.boolean() else None for _ in range(3))
    size = args.u64() if args.boolean() else None
    times: list[int | None] = []
    for _ in range(2):
        how = args.u32()
        if how > 2:
            raise ProtocolError(f"time_how {how}")
        times.append(_time(args) if how == 2 else nfs3.SERVER_TIME if how == 1 else None)
    return Sattr(mode, uid, gid, size, *times)


def _create(args: Decoder) -> tuple[object, ...]:
    dir_fh, name, mode = _fh(args), _name(args), args.u32()
    if mode > 2:
        raise ProtocolError(f"createmode3 {mode}")
    return dir_fh, name, mode, args.fixed(8) if mode == 2 else _sattr(args)


def _mknod(args: Decoder) -> tuple[object, ...]:
    dir_fh, name, kind = _fh(args), _name(args), args.u32()
    if kind not in (nfs3.NF3CHR, nfs3.NF3BLK, nfs3.NF3SOCK, nfs3.NF3FIFO):
        raise ProtocolError(f"MKNOD of type {kind}")
    sattr = _sattr(args)
    device = (args.u32(), args.u32()) if kind in (nfs3.NF3CHR, nfs3.NF3BLK) else (0, 0)
    return dir_fh, name, kind, sattr, *device


def _setattr(args: Decoder) -> tuple[object, ...]:
    return _fh(args), _sattr(args), _time(args) if args.boolean() else None


def _write(args: Decoder) -> tuple[object, ...]:
    fh, offset, count, stable = _fh(args), args.u64(), args.u32(), args.u32()
    data = args.opaque(MAX_BYTES)
    if stable > 2 or len(data) != count:
        raise ProtocolError(f"WRITE of {count} bytes with {len(data)} of data, stable_how {stable}")
    return fh, offset, count, stable, data


# By procedure. The values of WRITE end with its data.
_ARGS: tuple[Callable[[Decoder], tuple[object, ...]], ...] = (
    lambda args: (),
    lambda args: (_fh(args),),
    _setattr,
    lambda args: (_fh(args), _name(args)),
    lambda args: (_fh(args), args.u32()),
    lambda args: (_fh(args),),
    lambda args: (_fh(args), args.u64(), args.u32()),
    _write,
    _create,
    lambda args: (_fh(args), _name(args), _sattr(args)),
    lambda args: (_fh(args), _name(args), _sattr(args), _name(args)),
    _mknod,
    lambda args: (_fh(args), _name(args)),
    lambda args: (_fh(args), _name(args)),
    lambda args: (_fh(args), _name(args), _fh(args), _name(args)),
    lambda args: (_fh(args), _fh(args), _name(args)),
    lambda args: (_fh(args), args.u64(), args.fixed(8), args.u32()),
    lambda args: (_fh(args), args.u64(), args.fixed(8), args.u32(), args.u32()),
    lambda args: (_fh(args),),
    lambda args: (_fh(args),),
    lambda args: (_fh(args),),
    lambda args: (_fh(args), args.u64(), args.u32()),
)


def decode_args(procedure: int, args: bytes | memoryview) -> tuple[object, ...]:
    """The values that the client gave to the procedure's encoder in `nfs3_calls`."""
    decoder = Decoder(memoryview(args))
    values = _ARGS[procedure](decoder)
    decoder.done()
    return values


# -- results of NFS (RFC 1813 §3.3) ------------------------------------------------------------------


def _wire_time(time_ns: int) -> bytes:
    return u32(time_ns // NS) + u32(time_ns % NS)


def fattr(attr: Fattr) -> bytes:
    """fattr3"""
    return b"".join(
        (
            u32(attr.type), u32(attr.mode), u32(attr.nlink), u32(attr.uid), u32(attr.gid),
            u64(attr.size), u64(attr.used), u32(attr.rdev_major), u32(attr.rdev_minor),
            u64(attr.fsid), u64(attr.fileid),
            _wire_time(attr.atime_ns), _wire_time(attr.mtime_ns), _wire_time(attr.ctime_ns),
        )
    )  # fmt: skip


def _post_op_attr(attr: Fattr | None) -> bytes:
    return u32(0) if attr is None else u32(1) + fattr(attr)


def _post_op_fh(fh: bytes | None) -> bytes:
    return u32(0) if fh is None else u32(1) + opaque(fh)


def _wcc(wcc: Wcc) -> bytes:
    before = wcc.before
    if before is None:
        return u32(0) + _post_op_attr(wcc.after)
    times = _wire_time(before.mtime_ns) + _wire_time(before.ctime_ns)
    return u32(1) + u64(before.size) + times + _post_op_attr(wcc.after)


def encode_getattr(result: nfs3.GetattrResult) -> bytes:
    return u32(result.status) + (b"" if result.attr is None else fattr(result.attr))


def encode_setattr(result: nfs3.SetattrResult) -> bytes:
    return u32(result.status) + _wcc(result.wcc)


def encode_lookup(result: nfs3.LookupResult) -> bytes:
    found = b"" if result.fh is None else opaque(result.fh) + _post_op_attr(result.attr)
    return u32(result.status) + found + _post_op_attr(result.dir_attr)


def encode_access(result: nfs3.AccessResult) -> bytes:
    return u32(result.status) + _post_op_attr(result.attr) + (b"" if result.status else u32(result.access))


def encode_readlink(result: nfs3.ReadlinkResult) -> bytes:
    return u32(result.status) + _post_op_attr(result.attr) + (b"" if result.status else opaque(result.target))


def encode_read(result: nfs3.ReadResult) -> bytes:
    read = b"" if result.status else u32(result.count) + u32(result.eof) + opaque(result.data)
    return u32(result.status) + _post_op_attr(result.attr) + read


def encode_write(result: nfs3.WriteResult) -> bytes:
    written = b"" if result.status else u32(result.count) + u32(result.committed) + result.verifier
    return u32(result.status) + _wcc(result.wcc) + written


def encode_create(result: nfs3.CreateResult) -> bytes:
    created = b"" if result.status else _post_op_fh(result.fh) + _post_op_attr(result.attr)
    return u32(result.status) + created + _wcc(result.wcc)


def encode_remove(result: nfs3.RemoveResult) -> bytes:
    return u32(result.status) + _wcc(result.wcc)


def encode_rename(result: nfs3.RenameResult) -> bytes:
    return u32(result.status) + _wcc(result.from_wcc) + _wcc(result.to_wcc)


def encode_link(result: nfs3.LinkResult) -> bytes:
    return u32(result.status) + _post_op_attr(result.attr) + _wcc(result.wcc)


def encode_readdir(result: nfs3.ReaddirResult) -> bytes:
    if result.status:
        return u32(result.status) + _post_op_attr(result.attr)
    listed = [u32(1) + u64(e.fileid) + opaque(e.name) + u64(e.cookie) for e in result.entries]
    head = u32(result.status) + _post_op_attr(result.attr) + result.verifier
    return head + b"".join(listed) + u32(0) + u32(result.eof)


def encode_readdirplus(result: nfs3.ReaddirplusResult) -> bytes:
    if result.status:
        return u32(result.status) + _post_op_attr(result.attr)
    listed = [
        u32(1) + u64(e.fileid) + opaque(e.name) + u64(e.cookie) + _post_op_attr(e.attr) + _post_op_fh(e.fh)
        for e in result.entries
    ]
    head = u32(result.status) + _post_op_attr(result.attr) + result.verifier
    return head + b"".join(listed) + u32(0) + u32(result.eof)


def encode_fsstat(result: nfs3.FsstatResult) -> bytes:
    head = u32(result.status) + _post_op_attr(result.attr)
    if result.status:
        return head
    sizes = (result.tbytes, result.fbytes, result.abytes, result.tfiles, result.ffiles, result.afiles)
    return head + b"".join(map(u64, sizes)) + u32(result.invarsec)


def encode_fsinfo(result: nfs3.FsinfoResult) -> bytes:
    head = u32(result.status) + _post_op_attr(result.attr)
    if result.status:
        return head
    sizes = (
        result.rtmax, result.rtpref, result.rtmult, result.wtmax, result.wtpref, result.wtmult, result.dtpref,
    )  # fmt: skip
    tail = u64(result.maxfilesize) + _wire_time(result.time_delta_ns) + u32(result.properties)
    return head + b"".join(map(u32, sizes)) + tail


def encode_pathconf(result: nfs3.PathconfResult) -> bytes:
    head = u32(result.status) + _post_op_attr(result.attr)
    if result.status:
        return head
    flags = (result.no_trunc, result.chown_restricted, result.case_insensitive, result.case_preserving)
    return head + u32(result.linkmax) + u32(result.name_max) + b"".join(map(u32, flags))


def encode_commit(result: nfs3.CommitResult) -> bytes:
    return u32(result.status) + _wcc(result.wcc) + (b"" if result.status else result.verifier)


# -- MOUNT (RFC 1813 appendix I) and the port mapper (RFC 1833 §3) -----------------------------------


def decode_path(args: bytes | memoryview) -> bytes:
    """The directory of MNT and UMNT."""
    decoder = Decoder(memoryview(args))
    path = decoder.string(1024)
    decoder.done()
    return path


def encode_mnt(result: mount3.MntResult) -> bytes:
    if result.fh is None:
        return u32(result.status)
    flavors = u32(len(result.auth_flavors)) + b"".join(map(u32, result.auth_flavors))
    return u32(result.status) + opaque(result.fh) + flavors


def encode_mounts(entries: Sequence[mount3.MountEntry]) -> bytes:
    return b"".join(u32(1) + opaque(e.host) + opaque(e.directory) for e in entries) + u32(0)


def encode_exports(exports: Sequence[mount3.Export]) -> bytes:
    listed = b""
    for export in exports:
        groups = b"".join(u32(1) + opaque(group) for group in export.groups)
        listed += u32(1) + opaque(export.directory) + groups + u32(0)
    return listed + u32(0)


def decode_mapping(args: bytes | memoryview) -> portmap2.Mapping:
    """What GETPORT asks for."""
    decoder = Decoder(memoryview(args))
    mapping = portmap2.Mapping(decoder.u32(), decoder.u32(), decoder.u32(), decoder.u32())
    decoder.done()
    return mapping


def encode_port(port: int) -> bytes:
    return u32(port)


def encode_mappings(mappings: Sequence[portmap2.Mapping]) -> bytes:
    return b"".join(u32(1) + b"".join(map(u32, m)) for m in mappings) + u32(0)
