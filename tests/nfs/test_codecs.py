"""The codecs against the server's half, against bytes written by hand, and against arbitrary bytes."""

import contextlib
import itertools
import os
import random
import struct
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from efcfs.nfs import mount3, nfs3, nfs3_calls, nfs3_replies, portmap2, rpc, xdr
from efcfs.nfs.nfs3 import NS, Fattr, Sattr, Wcc, WccAttr
from efcfs.nfs.rpc import Receiver, Record, RpcRefusal, RpcRefused, Sink
from efcfs.nfs.xdr import ProtocolError
from tests.nfs import server_half as server

few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
more = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# -- values ------------------------------------------------------------------------------------------

u32s = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31, 2**32 - 1]))
u64s = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63, 2**64 - 1]))
sizes = st.integers(0, nfs3.MAX_SIZE)
cookies = st.integers(1, 2**64 - 1)
times = st.builds(lambda s, ns: s * NS + ns, u32s, st.integers(0, NS - 1))
handles = st.binary(min_size=1, max_size=64)
names = st.binary(max_size=260)
file_names = st.binary(min_size=1, max_size=255).map(lambda name: name.replace(b"/", b"1").replace(b"\0", b"0"))
targets = st.binary(min_size=1, max_size=300).map(lambda target: target.replace(b"\0", b"0"))
verifiers = st.binary(min_size=8, max_size=8)
fattrs = st.builds(
    Fattr, st.integers(1, 7), u32s, u32s, u32s, u32s, sizes, u64s, u32s, u32s, u64s, u64s, times, times, times
)
attrs = st.none() | fattrs
wccs = st.builds(Wcc, st.none() | st.builds(WccAttr, sizes, times, times), attrs)
new_times = st.none() | st.just(nfs3.SERVER_TIME) | st.integers(0, nfs3.MAX_TIME_NS)
sattrs = st.builds(
    Sattr, st.none() | u32s, st.none() | u32s, st.none() | u32s, st.none() | u64s, new_times, new_times
)
ok = st.just(nfs3.NFS3_OK)
failures = st.sampled_from(sorted(nfs3.STATUS_NAMES.keys() - {nfs3.NFS3_OK})) | st.integers(1, 2**32 - 1)
statuses = ok | failures
booleans = st.booleans()
nothing = st.just(b"")
absent = st.none()
zero = st.just(0)
false = st.just(False)


Values = st.SearchStrategy[Any]


def _either(result: Any, good: Iterable[Values], bad: Iterable[Values]) -> Values:
    return st.builds(result, ok, *good) | st.builds(result, failures, *bad)


reads = st.builds(
    lambda attr, data, eof: nfs3.ReadResult(0, attr, len(data), eof, data),
    attrs,
    st.binary(max_size=300),
    booleans,
) | st.builds(nfs3.ReadResult, failures, attrs, zero, false, nothing)
entries = st.lists(st.builds(nfs3.DirEntry, u64s, file_names, cookies), max_size=4)
entries_plus = st.lists(
    st.builds(nfs3.DirEntryPlus, u64s, file_names, cookies, attrs, st.none() | handles), max_size=4
)


def _listed(page: Any) -> Any:
    """With the cookie of its last entry, which no server sends a second time."""
    return page._replace(left_out=0, last=page.entries[-1].cookie if page.entries else 0)



# What results there are: values, the server's encoder, the client's decoder.
RESULTS: dict[str, tuple[Values, Callable[[Any], bytes], Callable[[memoryview, int], object]]] = {
    "GETATTR": (_either(nfs3.GetattrResult, [fattrs], [absent]), server.encode_getattr, nfs3_replies.decode_getattr),
    "SETATTR": (st.builds(nfs3.SetattrResult, statuses, wccs), server.encode_setattr, nfs3_replies.decode_setattr),
    "LOOKUP": (
        _either(nfs3.LookupResult, [handles, attrs, attrs], [absent, absent, attrs]),
        server.encode_lookup, nfs3_replies.decode_lookup,
    ),
    "ACCESS": (
        _either(nfs3.AccessResult, [attrs, u32s], [attrs, zero]), server.encode_access, nfs3_replies.decode_access
    ),
    "READLINK": (
        _either(nfs3.ReadlinkResult, [attrs, targets], [attrs, nothing]),
        server.encode_readlink, nfs3_replies.decode_readlink,
    ),
    "READ": (reads, server.encode_read, nfs3_replies.decode_read),
    "WRITE": (
        _either(
            nfs3.WriteResult, [wccs, u32s, st.integers(0, 2), verifiers], [wccs, zero, zero, nothing]
        ),
        server.encode_write, nfs3_replies.decode_write,
    ),
    "CREATE": (
        _either(nfs3.CreateResult, [st.none() | handles, attrs, wccs], [absent, absent, wccs]),
        server.encode_create, nfs3_replies.decode_create,
    ),
    "REMOVE": (st.builds(nfs3.RemoveResult, statuses, wccs), server.encode_remove, nfs3_replies.decode_remove),
    "RENAME": (st.builds(nfs3.RenameResult, statuses, wccs, wccs), server.encode_rename, nfs3_replies.decode_rename),
    "LINK": (st.builds(nfs3.LinkResult, statuses, attrs, wccs), server.encode_link, nfs3_replies.decode_link),
    "READDIR": (
        _either(
            nfs3.ReaddirResult, [attrs, verifiers, entries, booleans], [attrs, nothing, st.just([]), false]
        ).map(_listed),
        server.encode_readdir, nfs3_replies.decode_readdir,
    ),
    "READDIRPLUS": (
        _either(
            nfs3.ReaddirplusResult,
            [attrs, verifiers, entries_plus, booleans], [attrs, nothing, st.just([]), false],
        ).map(_listed),
        server.encode_readdirplus, nfs3_replies.decode_readdirplus,
    ),
    "FSSTAT": (
        _either(nfs3.FsstatResult, [attrs, *[u64s] * 6, u32s], [attrs, *[zero] * 7]),
        server.encode_fsstat, nfs3_replies.decode_fsstat,
    ),
    "FSINFO": (
        _either(nfs3.FsinfoResult, [attrs, *[u32s] * 7, u64s, times, u32s], [attrs, *[zero] * 10]),
        server.encode_fsinfo, nfs3_replies.decode_fsinfo,
    ),
    "PATHCONF": (
        _either(nfs3.PathconfResult, [attrs, u32s, u32s, *[booleans] * 4], [attrs, zero, zero, *[false] * 4]),
        server.encode_pathconf, nfs3_replies.decode_pathconf,
    ),
    "COMMIT": (
        _either(nfs3.CommitResult, [wccs, verifiers], [wccs, nothing]),
        server.encode_commit, nfs3_replies.decode_commit,
    ),
    "MNT": (
        _either(mount3.MntResult, [handles, st.lists(u32s, max_size=4).map(tuple)], [absent, st.just(())]),
        server.encode_mnt, mount3.decode_mnt,
    ),
    "mount DUMP": (
        st.lists(st.builds(mount3.MountEntry, st.binary(max_size=255), st.binary(max_size=1024)), max_size=3),
        server.encode_mounts, mount3.decode_dump,
    ),
    "EXPORT": (
        st.lists(
            st.builds(
                mount3.Export,
                st.binary(max_size=1024),
                st.lists(st.binary(max_size=255), max_size=3).map(tuple),
            ),
            max_size=3,
        ),
        server.encode_exports, mount3.decode_export,
    ),
    "GETPORT": (u32s, server.encode_port, portmap2.decode_getport),
    "portmap DUMP": (
        st.lists(st.builds(portmap2.Mapping, u32s, u32s, u32s, u32s), max_size=4),
        server.encode_mappings, portmap2.decode_dump,
    ),
}  # fmt: skip

devices = st.tuples(
    handles, names, st.sampled_from([nfs3.NF3CHR, nfs3.NF3BLK]), sattrs, u32s, u32s
) | st.tuples(handles, names, st.sampled_from([nfs3.NF3SOCK, nfs3.NF3FIFO]), sattrs, zero, zero)
creations = st.tuples(handles, names, st.sampled_from([nfs3.UNCHECKED, nfs3.GUARDED]), sattrs) | st.tuples(
    handles, names, st.just(nfs3.EXCLUSIVE), verifiers
)


def write_args(fh: bytes, offset: int, count: int, stable: int, data: bytes) -> bytes:
    return nfs3_calls.write_head(fh, offset, count, stable) + data + xdr.PAD[-count & 3]


writes = st.builds(
    lambda fh, offset, stable, data: (fh, offset, len(data), stable, data),
    handles, u64s, st.integers(0, 2), st.binary(max_size=300),
)  # fmt: skip

# By procedure: values for its arguments, and the client's encoder.
ARGS: tuple[tuple[Values, Callable[..., bytes]], ...] = (
    (st.just(()), nfs3_calls.null_args),
    (st.tuples(handles), nfs3_calls.getattr_args),
    (st.tuples(handles, sattrs, st.none() | st.integers(0, nfs3.MAX_TIME_NS)), nfs3_calls.setattr_args),
    (st.tuples(handles, names), nfs3_calls.lookup_args),
    (st.tuples(handles, u32s), nfs3_calls.access_args),
    (st.tuples(handles), nfs3_calls.readlink_args),
    (st.tuples(handles, u64s, u32s), nfs3_calls.read_args),
    (writes, write_args),
    (creations, nfs3_calls.create_args),
    (st.tuples(handles, names, sattrs), nfs3_calls.mkdir_args),
    (st.tuples(handles, names, sattrs, names), nfs3_calls.symlink_args),
    (devices, nfs3_calls.mknod_args),
    (st.tuples(handles, names), nfs3_calls.remove_args),
    (st.tuples(handles, names), nfs3_calls.rmdir_args),
    (st.tuples(handles, names, handles, names), nfs3_calls.rename_args),
    (st.tuples(handles, handles, names), nfs3_calls.link_args),
    (st.tuples(handles, u64s, verifiers, u32s), nfs3_calls.readdir_args),
    (st.tuples(handles, u64s, verifiers, u32s, u32s), nfs3_calls.readdirplus_args),
    (st.tuples(handles), nfs3_calls.fsstat_args),
    (st.tuples(handles), nfs3_calls.fsinfo_args),
    (st.tuples(handles), nfs3_calls.pathconf_args),
    (st.tuples(handles, u64s, u32s), nfs3_calls.commit_args),
)


def sample(**changes: int) -> Fattr:
    attr = Fattr(nfs3.NF3REG, 0o644, 1, 1000, 100, 5, 4096, 0, 0, 7, 42, 1 * NS + 2, 3 * NS + 4, 5 * NS + 6)
    return attr._replace(**changes)


@st.composite
def damaged(draw: st.DrawFn, message: bytes) -> bytes:
    """A message cut, lengthened, or with other bytes in it."""
    data = bytearray(message)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        how = draw(st.sampled_from(["cut", "byte", "word", "insert"]))
        if how == "cut":
            del data[at:]
        elif how == "byte" and data:
            data[at] = draw(st.integers(0, 255))
        elif how == "word":
            word = at & ~3
            data[word : word + 4] = struct.pack(">I", draw(u32s))
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


# -- results and arguments ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_decodes_to_what_the_server_encoded_wherever_it_begins(name: str) -> None:
    values, encode, decode = RESULTS[name]

    @few
    @given(values, st.integers(0, 9))
    def check(value: object, offset: int) -> None:
        assert decode(memoryview(bytes(offset) + encode(value)), offset) == value

    check()


@pytest.mark.parametrize("name", RESULTS)
def test_a_damaged_result_decodes_or_raises_the_protocol_error(name: str) -> None:
    values, encode, decode = RESULTS[name]

    @few
    @given(values.map(encode).flatmap(damaged) | st.binary(max_size=200))
    def check(message: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            decode(memoryview(message), 0)

    check()


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_cut_anywhere_or_followed_by_anything_raises_the_protocol_error(name: str) -> None:
    values, encode, decode = RESULTS[name]

    @settings(few, max_examples=8)
    @given(values)
    def check(value: object) -> None:
        message = encode(value)
        for length in range(0, len(message), max(1, len(message) // 100)):
            with pytest.raises(ProtocolError):
                decode(memoryview(message[:length]), 0)
        for rest in (b"\0", b"\0\0\0\0", b"\0\0\0\1"):
            with pytest.raises(ProtocolError):
                decode(memoryview(message + rest), 0)

    check()


@pytest.mark.parametrize("procedure", range(22), ids=nfs3.PROCEDURE_NAMES)
def test_the_server_decodes_the_arguments_that_the_client_encoded(procedure: int) -> None:
    values, encode = ARGS[procedure]

    @few
    @given(values)
    def check(args: tuple[object, ...]) -> None:
        assert server.decode_args(procedure, encode(*args)) == args

    check()


@few
@given(st.binary(max_size=1024), st.builds(portmap2.Mapping, u32s, u32s, u32s, u32s))
def test_the_server_decodes_the_arguments_of_mount_and_portmap(
    path: bytes, mapping: portmap2.Mapping
) -> None:
    assert server.decode_path(mount3.mnt_args(path)) == path
    assert server.decode_path(mount3.umnt_args(path)) == path
    assert server.decode_mapping(portmap2.getport_args(mapping)) == mapping


@few
@given(fattrs, st.integers(0, 9))
def test_attributes_survive_packing_and_have_the_servers_form(attr: Fattr, offset: int) -> None:
    packed = nfs3.pack_fattr(attr)
    assert packed == server.fattr(attr)
    assert nfs3.unpack_fattr(bytes(offset) + packed, offset) == attr
    with pytest.raises(ProtocolError):
        nfs3.unpack_fattr(packed[:-1])


@pytest.mark.parametrize(
    ("asked_ns", "sent_ns"),
    [(-5 * NS, 0), (2**32 * NS, nfs3.MAX_TIME_NS), (10**30, nfs3.MAX_TIME_NS), (7 * NS + 1, 7 * NS + 1)],
)
def test_a_time_that_nfs_cannot_hold_becomes_the_nearest_that_it_can(asked_ns: int, sent_ns: int) -> None:
    args = nfs3_calls.setattr_args(b"fh", Sattr(atime_ns=asked_ns, mtime_ns=asked_ns), None)
    _, sattr, _ = server.decode_args(nfs3.NFSPROC3_SETATTR, args)
    assert sattr == Sattr(atime_ns=sent_ns, mtime_ns=sent_ns)


@pytest.mark.parametrize("file_type", [0, 8, 2**32 - 1])
def test_attributes_of_an_unknown_file_type_are_malformed(file_type: int) -> None:
    message = server.encode_getattr(nfs3.GetattrResult(0, sample(type=file_type)))
    with pytest.raises(ProtocolError):
        nfs3_replies.decode_getattr(memoryview(message), 0)


@pytest.mark.parametrize("entry_attr", [None, sample()])
def test_a_file_handle_of_more_than_64_bytes_is_malformed(entry_attr: Fattr | None) -> None:
    entry = nfs3.DirEntryPlus(1, b"name", 2, entry_attr, bytes(65))
    found = nfs3.LookupResult(0, bytes(65), None, None)
    created = nfs3.CreateResult(0, bytes(65), None, Wcc(None, None))
    with pytest.raises(ProtocolError):
        nfs3_replies.decode_lookup(memoryview(server.encode_lookup(found)), 0)
    with pytest.raises(ProtocolError):
        nfs3_replies.decode_create(memoryview(server.encode_create(created)), 0)
    listing = nfs3.ReaddirplusResult(0, None, bytes(8), [entry], True)
    listed = nfs3_replies.decode_readdirplus(memoryview(server.encode_readdirplus(listing)), 0)
    assert (listed.entries, listed.left_out) == ([], 1)
    with pytest.raises(ProtocolError):
        mount3.decode_mnt(memoryview(server.encode_mnt(mount3.MntResult(0, bytes(65), ()))), 0)


def words(*values: int) -> memoryview:
    return memoryview(b"".join(map(xdr.u32, values)))


@pytest.mark.parametrize(
    ("decode", "results", "why"),
    [
        (nfs3_replies.decode_access, words(0, 2, 0), "value 2"),  # attributes_follow
        (nfs3_replies.decode_setattr, words(0, 2, 0), "value 2"),  # of wcc_data
        (nfs3_replies.decode_create, words(0, 2, 0, 0, 0), "value 2"),  # handle_follows
        (nfs3_replies.decode_read, words(0, 0, 0, 2, 0), "value 2"),  # eof
        (nfs3_replies.decode_write, words(0, 0, 0, 1, 3, 0, 0), "stable_how 3"),
        (nfs3_replies.decode_pathconf, words(0, 0, 1, 255, 1, 1, 2, 1), "value 2"),
        (nfs3_replies.decode_readdir, words(0, 0, 0, 0, 2, 0, 7, 0, 0, 1, 0, 1), "value 2"),  # an entry follows
        (nfs3_replies.decode_readdir, words(0, 0, 0, 0, 0, 2), "value 2"),  # eof
        (nfs3_replies.decode_readdirplus, words(0, 0, 0, 0, 2, 1), "value 2"),  # an entry follows
        (nfs3_replies.decode_readdirplus, words(0, 0, 0, 0, 1, 0, 7, 0, 0, 1, 2, 0, 0, 1), "value 2"),  # attributes
        (nfs3_replies.decode_readdirplus, words(0, 0, 0, 0, 1, 0, 7, 0, 0, 1, 0, 2, 0, 1), "value 2"),  # handle
        (nfs3_replies.decode_readdirplus, words(0, 0, 0, 0, 1, 0, 7, 0, 0, 1, 0, 0, 2, 1), "value 2"),  # next entry
        (nfs3_replies.decode_readdirplus, words(0, 0, 0, 0, 0, 2), "value 2"),  # eof
        (mount3.decode_dump, words(2), "value 2"),
        (portmap2.decode_dump, words(2), "value 2"),
    ],
)
def test_a_value_that_its_type_does_not_have_is_malformed(
    decode: Callable[[memoryview, int], object], results: memoryview, why: str
) -> None:
    with pytest.raises(ProtocolError, match=why):
        decode(results, 0)


def test_the_tables_name_every_procedure_and_status() -> None:
    assert len(nfs3.PROCEDURE_NAMES) == 22
    for number, name in enumerate(nfs3.PROCEDURE_NAMES):
        assert getattr(nfs3, f"NFSPROC3_{name}") == number
    assert nfs3.STATUS_NAMES[10008] == "NFS3ERR_JUKEBOX"
    assert len(nfs3.STATUS_NAMES) == 29


# -- READ's payload ----------------------------------------------------------------------------------


@few
@given(reads, st.integers(0, 40), st.integers(0, 9))
def test_the_place_of_a_payload_is_known_once_the_head_of_the_read_is_there(
    read: nfs3.ReadResult, more_bytes: int, offset: int
) -> None:
    message = bytes(offset) + server.encode_read(read)
    if read.status:
        assert nfs3_replies.read_payload(memoryview(message), offset) is None
        return
    head_bytes = offset + (20 if read.attr is None else 104)
    for length in range(offset, head_bytes):
        assert nfs3_replies.read_payload(memoryview(message[:length]), offset) is None
    seen = memoryview(message[: head_bytes + more_bytes])
    assert nfs3_replies.read_payload(seen, offset) == (head_bytes, len(read.data))
    head = nfs3_replies.decode_read_head(seen[:head_bytes], offset)
    assert head == read._replace(data=b"")


@few
@given(reads.map(server.encode_read).flatmap(damaged) | st.binary(max_size=150))
def test_a_damaged_head_of_a_read_has_a_place_or_none_or_raises_the_protocol_error(message: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        nfs3_replies.read_payload(memoryview(message), 0)
    with contextlib.suppress(ProtocolError):
        nfs3_replies.decode_read_head(memoryview(message), 0)


def test_a_read_whose_count_is_not_the_length_of_its_data_is_malformed() -> None:
    message = memoryview(server.encode_read(nfs3.ReadResult(0, sample(), 4, False, b"12345")))
    for decode in (nfs3_replies.decode_read, nfs3_replies.read_payload, nfs3_replies.decode_read_head):
        with pytest.raises(ProtocolError):
            decode(message, 0)


def test_read_data_outlive_the_record_that_they_came_in() -> None:
    record = bytearray(server.encode_read(nfs3.ReadResult(0, None, 4, True, b"data")))
    read = nfs3_replies.decode_read(memoryview(record), 0)
    record[:] = bytes(len(record))
    assert read.data == b"data"


# -- bytes by hand (RFC 5531 §8, §9, appendix A; RFC 1813 §3.3.1) ------------------------------------


def test_a_getattr_call_with_auth_sys_has_the_bytes_of_the_rfcs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(nodename="client"))
    rpc.call_header.cache_clear()
    credential = rpc.Credential(1000, 100, (4, 24))
    header = rpc.call_header(nfs3.PROGRAM, nfs3.VERSION, nfs3.NFSPROC3_GETATTR, credential)
    rpc.call_header.cache_clear()
    assert header + nfs3_calls.getattr_args(b"\xaa\xbb\xcc\xdd\xee") == bytes.fromhex(
        "00000000 00000002"  # CALL, RPC version 2
        "000186a3 00000003 00000001"  # program 100003, version 3, procedure 1
        "00000001 00000024"  # AUTH_SYS, 36 bytes of it
        "00000000 00000006 636c69656e74 0000"  # stamp, machine name, padding
        "000003e8 00000064 00000002 00000004 00000018"  # uid, gid, two groups
        "00000000 00000000"  # verifier: AUTH_NONE, empty
        "00000005 aabbccddee 000000"  # the file handle, padding
    )


def test_a_call_without_credential_has_auth_none() -> None:
    assert rpc.call_header(100000, 2, 3, None) == bytes.fromhex(
        "00000000 00000002 000186a0 00000002 00000003 00000000 00000000 00000000 00000000"
    )


def test_a_getattr_reply_written_by_hand_decodes() -> None:
    reply = memoryview(
        bytes.fromhex(
            "12345678 00000001 00000000 00000000 00000000 00000000"  # xid, REPLY, accepted, no verifier
            "00000000"  # NFS3_OK
            "00000001 000001a4 00000001 000003e8 00000064"  # regular file, 0644, one link, uid, gid
            "0000000000000005 0000000000001000"  # size, used
            "00000000 00000000 0000000000000007 000000000000002a"  # rdev, fsid, fileid
            "00000001 00000002 00000003 00000004 00000005 00000006"  # atime, mtime, ctime
        )
    )
    assert rpc.reply_xid(reply) == 0x12345678
    assert nfs3_replies.decode_getattr(reply, rpc.decode_reply(reply)) == nfs3.GetattrResult(nfs3.NFS3_OK, sample())


def test_a_listing_written_by_hand_decodes() -> None:
    results = memoryview(
        bytes.fromhex(
            "00000000 00000000 0102030405060708"  # NFS3_OK, no attributes, cookie verifier
            "00000001 000000000000002a 00000003 616263 00"  # an entry: 42, "abc"
            "0000000000000009 00000000"  # cookie 9, no attributes
            "00000001 00000002 ffee 0000"  # file handle
            "00000000 00000001"  # no more entries, end of the directory
        )
    )
    entry = nfs3.DirEntryPlus(42, b"abc", 9, None, b"\xff\xee")
    expected = nfs3.ReaddirplusResult(0, None, b"\1\2\3\4\5\6\7\x08", [entry], True, last=9)
    assert nfs3_replies.decode_readdirplus(results, 0) == expected


# -- RPC ---------------------------------------------------------------------------------------------

credentials = st.none() | st.builds(rpc.Credential, u32s, u32s, st.lists(u32s, max_size=20).map(tuple))


@few
@given(u32s, u32s, u32s, u32s, credentials, st.binary(max_size=40))
def test_the_server_decodes_the_call_that_the_client_encoded(
    xid: int, program: int, version: int, procedure: int, credential: rpc.Credential | None, args: bytes
) -> None:
    call = server.decode_call(xdr.u32(xid) + rpc.call_header(program, version, procedure, credential) + args)
    assert call[:4] == (xid, program, version, procedure)
    assert bytes(call.args) == args
    if credential is None:
        assert call.credential is None
    else:
        assert call.credential == credential._replace(groups=credential.groups[:16])
        assert call.machine_name == os.fsencode(os.uname().nodename)


@few
@given(u32s, st.binary(max_size=400), st.binary(max_size=40))
def test_the_results_of_a_reply_begin_after_its_verifier(xid: int, verifier: bytes, results: bytes) -> None:
    reply = memoryview(server.accepted(xid, results, verifier))
    assert rpc.reply_xid(reply) == xid
    assert bytes(reply[rpc.decode_reply(reply) :]) == results


def test_a_verifier_of_more_than_400_bytes_is_malformed() -> None:
    with pytest.raises(ProtocolError):
        rpc.decode_reply(memoryview(server.accepted(1, b"", bytes(401))))


@pytest.mark.parametrize("kind", RpcRefusal)
def test_a_refused_call_says_why(kind: RpcRefusal) -> None:
    mismatch = kind in (RpcRefusal.PROG_MISMATCH, RpcRefusal.RPC_MISMATCH)
    with pytest.raises(RpcRefused) as caught:
        rpc.decode_reply(memoryview(server.refused(1, kind, 2, 4, auth_stat=5)))
    assert caught.value.kind is kind
    assert (caught.value.low, caught.value.high) == ((2, 4) if mismatch else (0, 0))
    assert str(caught.value) == caught.value.reason
    if kind is RpcRefusal.AUTH_ERROR:
        assert "AUTH_TOOWEAK" in caught.value.reason


valid_replies = st.builds(server.accepted, u32s, st.binary(max_size=40), st.binary(max_size=40)) | st.builds(
    server.refused, u32s, st.sampled_from(RpcRefusal), u32s, u32s, u32s
)


@more
@given(valid_replies.flatmap(damaged) | st.binary(max_size=60))
def test_a_damaged_reply_has_results_or_is_a_refusal_or_raises_the_protocol_error(reply: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        rpc.reply_xid(memoryview(reply))
    with contextlib.suppress(ProtocolError, RpcRefused):
        assert rpc.decode_reply(memoryview(reply)) <= len(reply)


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (words(1, 0, 0, 0, 0, 0), "type 0"),  # a call
        (words(1, 1, 2, 0, 0, 0), "reply_stat 2"),
        (words(1, 1, 0, 0, 0, 6), "accept_stat 6"),
        (words(1, 1, 1, 2, 0, 0), "reject_stat 2"),
        (words(1, 1, 0, 0, 0, 1, 9), "too many"),  # after PROG_UNAVAIL nothing may come
        (words(1, 1, 0, 0, 0, 2, 2, 4, 9), "too many"),
        (words(1, 1, 1, 1, 5, 9), "too many"),
    ],
)
def test_a_reply_with_a_value_that_rpc_does_not_have_is_malformed(reply: memoryview, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        rpc.decode_reply(reply)


@pytest.mark.parametrize("kind", RpcRefusal)
def test_a_refusal_cut_anywhere_raises_the_protocol_error(kind: RpcRefusal) -> None:
    reply = server.refused(1, kind, 2, 4)
    for length in range(len(reply)):
        with pytest.raises(ProtocolError):
            rpc.decode_reply(memoryview(reply[:length]))


# -- XDR ---------------------------------------------------------------------------------------------


@more
@given(
    st.binary(max_size=80), st.lists(st.sampled_from(["u32", "u64", "boolean", "opaque", "fixed", "string"]))
)
def test_a_decoder_reads_any_bytes_or_raises_the_protocol_error(message: bytes, reads: list[str]) -> None:
    decoder = xdr.Decoder(memoryview(message))
    with contextlib.suppress(ProtocolError):
        for read in reads:
            args = (16,) if read in ("opaque", "fixed", "string") else ()
            getattr(decoder, read)(*args)
            assert decoder.pos <= decoder.end
        decoder.done()
        assert decoder.pos == len(message)


@few
@given(u32s, u64s, booleans, st.binary(max_size=40), st.binary(min_size=5, max_size=5))
def test_a_decoder_reads_what_was_encoded(a: int, b: int, c: bool, data: bytes, fixed: bytes) -> None:
    message = xdr.u32(a) + xdr.u64(b) + xdr.u32(c) + xdr.opaque(data) + fixed + xdr.PAD[3]
    decoder = xdr.Decoder(memoryview(message))
    assert (decoder.u32(), decoder.u64(), decoder.boolean()) == (a, b, c)
    assert (decoder.opaque(40), decoder.fixed(5)) == (data, fixed)
    decoder.done()


def test_a_length_beyond_the_limit_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ProtocolError, match="4294967295"):
        xdr.Decoder(memoryview(b"\xff\xff\xff\xff")).opaque(64)


# -- records in a stream -----------------------------------------------------------------------------

MAX_RECORD_BYTES = 300_000


class Expected:
    """A record as sent. `head_bytes`: its payload, from there on, belongs elsewhere."""

    def __init__(self, number: int, length_bytes: int, head_bytes: int | None) -> None:
        self.head_bytes = head_bytes
        self.payload_bytes = 0
        body = xdr.u32(number) + random.Random(number).randbytes(max(length_bytes - 4, 0))
        if head_bytes is not None:
            self.payload_bytes = length_bytes
            body = body[:4].ljust(head_bytes, b"h") + random.Random(number).randbytes(length_bytes)
            body += bytes(-length_bytes & 3)
        self.record = body
        self.target = bytearray(self.payload_bytes)


def receive(
    expected: list[Expected], stream: bytes, chunks: Iterator[int], first_bytes: int, sinks: bool = True
) -> list[bytes]:
    """All records of the stream, those in two parts put together again, as it comes in such chunks."""
    asked: list[int] = []

    def sink_for(head: memoryview) -> Sink | None:
        number = int.from_bytes(head[:4])
        asked.append(number)
        wanted = expected[number]
        assert len(head) >= min(len(wanted.record), 128)
        assert wanted.record.startswith(head)
        if wanted.head_bytes is None or not sinks:
            return None
        return Sink(wanted.head_bytes, memoryview(wanted.target))

    receiver = Receiver(MAX_RECORD_BYTES, sink_for)
    receiver.first_bytes = first_bytes
    came: list[bytes] = []
    pos = 0
    while pos < len(stream):
        buffer = receiver.buffer()
        assert len(buffer) > 0
        n = min(next(chunks), len(buffer), len(stream) - pos)
        buffer[:n] = stream[pos : pos + n]
        pos += n
        for record in receiver.received(n):
            came.append(joined(expected[len(came)], record))
    assert asked == list(range(len(expected)))
    return came


def joined(wanted: Expected, record: Record) -> bytes:
    if not record.payload_bytes:
        return bytes(record.body)
    assert (len(record.body), record.payload_bytes) == (wanted.head_bytes, wanted.payload_bytes)
    return bytes(record.body) + bytes(wanted.target) + bytes(-wanted.payload_bytes & 3)


head_sizes = st.none() | st.sampled_from([28, 44, 128])
small_records = st.lists(st.tuples(st.integers(4, 600), head_sizes), min_size=1, max_size=6)
edges = st.sampled_from([4, 127, 128, 129, 65403, 65404, 65405, 65531, 65532, 65533, 65536, 70001, 200_003])
large_records = st.lists(st.tuples(edges, head_sizes), min_size=2, max_size=5)
fragmentations = st.lists(st.integers(1, 400), max_size=3)
first_sizes = st.sampled_from([1, 4, 131, 132, 133, 1000, 65536])


def check_stream(
    sizes: list[tuple[int, int | None]], cuts: list[int], chunks: list[int], first_bytes: int
) -> None:
    records = [Expected(number, *size) for number, size in enumerate(sizes)]
    stream = b"".join(server.framed(r.record, cuts if i % 2 else ()) for i, r in enumerate(records))
    whole = [r.record for r in records]
    assert receive(records, stream, itertools.cycle(chunks), first_bytes) == whole
    assert receive(records, stream, itertools.cycle(chunks), first_bytes, sinks=False) == whole


@more
@given(small_records, fragmentations, st.lists(st.integers(1, 700), min_size=1, max_size=8), first_sizes)
def test_records_and_payloads_are_the_same_however_the_stream_is_cut(
    sizes: list[tuple[int, int | None]], cuts: list[int], chunks: list[int], first_bytes: int
) -> None:
    check_stream(sizes, cuts, chunks, first_bytes)


@settings(more, max_examples=80)
@given(
    large_records,
    st.lists(st.sampled_from([1, 3000, 65535, 65536, 70000]), max_size=4),
    st.lists(st.sampled_from([1, 4, 132, 5000, 65536, 10**6]), max_size=4).map(
        lambda chunks: [*chunks, 8192]
    ),
    first_sizes,
)
@example([(65403, 44), (70001, None), (4, None)], [], [8192], 132)
@example([(200_003, None), (65402, 128), (70001, None), (65532, None)], [], [65536], 65536)
def test_records_around_and_beyond_the_size_of_the_buffer_are_the_same_too(
    sizes: list[tuple[int, int | None]], cuts: list[int], chunks: list[int], first_bytes: int
) -> None:
    check_stream(sizes, cuts, chunks, first_bytes)


def test_a_payload_is_received_into_its_target_without_a_stop_elsewhere() -> None:
    target = bytearray(100_001)
    payload = random.Random(0).randbytes(100_001)
    read = nfs3.ReadResult(0, sample(), len(payload), True, payload)
    record = server.accepted(1, server.encode_read(read))
    stream = server.framed(record) + server.framed(b"next record!")
    sink = Sink(128, memoryview(target))
    receiver = Receiver(MAX_RECORD_BYTES, lambda head: sink if len(head) > 12 else None)
    receiver.first_bytes = 132
    first = receiver.buffer()
    assert len(first) == 132
    first[:] = stream[:132]
    assert receiver.received(132) == []
    direct = receiver.buffer()
    assert direct.obj is target
    assert len(direct) == len(target)
    direct[:] = payload
    assert receiver.received(len(target)) == []  # the padding is still missing
    rest = stream[132 + len(target) :]
    receiver.buffer()[: len(rest)] = rest
    (head, payload_bytes), after = receiver.received(len(rest))
    assert (bytes(head), payload_bytes) == (record[:128], len(payload))
    assert nfs3_replies.decode_read_head(head, rpc.decode_reply(head)) == read._replace(data=b"")
    assert target == payload
    assert (bytes(after.body), after.payload_bytes) == (b"next record!", 0)


def test_no_more_than_the_first_bytes_are_received_before_a_record_has_begun() -> None:
    receiver = Receiver(MAX_RECORD_BYTES, lambda head: None)
    for first_bytes in (132, 65536, 7):
        receiver.first_bytes = first_bytes
        assert len(receiver.buffer()) == first_bytes
        whole = server.framed(b"1234")
        for byte in whole:
            receiver.buffer()[:1] = bytes([byte])
            records = receiver.received(1)
        assert [bytes(r.body) for r in records] == [b"1234"]


def feed(receiver: Receiver, stream: bytes) -> list[bytes]:
    bodies = []
    while stream:
        buffer = receiver.buffer()
        n = min(len(buffer), len(stream))
        buffer[:n] = stream[:n]
        stream = stream[n:]
        bodies += [bytes(record.body) for record in receiver.received(n)]
    return bodies


@pytest.mark.parametrize(
    "stream",
    [
        xdr.u32(0x80000000),
        xdr.u32(0),
        xdr.u32(4) + b"1234" + xdr.u32(0x80000000),
        xdr.u32(0x80000000 | 1001),
        xdr.u32(1001),
        xdr.u32(0xFFFFFFFF),
        xdr.u32(600) + bytes(600) + xdr.u32(0x80000000 | 401),
    ],
)
def test_an_empty_fragment_and_a_record_over_the_limit_raise_the_protocol_error(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        feed(Receiver(1000, lambda head: None), stream + bytes(8))
    assert feed(Receiver(1000, lambda head: None), server.framed(bytes(1000))) == [bytes(1000)]


@pytest.mark.parametrize("length_bytes", [128, 80_000])
@pytest.mark.parametrize("wrong", [-5, -1, 1, 4])
@pytest.mark.parametrize("fragments", [(), (100,)])
def test_a_record_that_is_not_as_long_as_its_payload_needs_raises_the_protocol_error(
    length_bytes: int, wrong: int, fragments: tuple[int, ...]
) -> None:
    target = memoryview(bytearray(length_bytes))
    receiver = Receiver(MAX_RECORD_BYTES, lambda head: Sink(100, target))
    with pytest.raises(ProtocolError):
        feed(receiver, server.framed(bytes(100 + length_bytes + wrong), fragments))


marks = st.builds(lambda last, length: xdr.u32(last << 31 | length), booleans, st.integers(0, 300))


@more
@given(st.lists(marks | st.binary(max_size=200), max_size=8).map(b"".join), first_sizes)
def test_any_stream_is_records_or_raises_the_protocol_error(stream: bytes, first_bytes: int) -> None:
    receiver = Receiver(1000, lambda head: Sink(28, memoryview(bytearray(100))) if head[0] & 1 else None)
    receiver.first_bytes = first_bytes
    with contextlib.suppress(ProtocolError):
        assert sum(map(len, feed(receiver, stream))) <= len(stream)
