"""What a server says is judged in the decoders: what comes out of them a file system can have, keep and be told."""

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efcfs.fuse import direct, operations
from efcfs.nfs import nfs3, nfs3_replies
from efcfs.nfs.nfs3 import NS, Fattr, WccAttr
from efcfs.nfs.xdr import ProtocolError
from efcfs.vfs.entries import Entry
from tests.nfs import server_half as server
from tests.nfs.test_codecs import RESULTS, damaged, few, sample

HUGE = 2**63
FH = b"handle"


def listed(*entries: nfs3.DirEntryPlus) -> nfs3.ReaddirplusResult:
    page = nfs3.ReaddirplusResult(0, None, bytes(8), list(entries), True)
    return nfs3_replies.decode_readdirplus(memoryview(server.encode_readdirplus(page)), 0)


def names_of(*names: bytes) -> list[bytes]:
    """What of these names READDIR and READDIRPLUS tell."""
    plain = nfs3.ReaddirResult(0, None, bytes(8), [nfs3.DirEntry(i, n, i) for i, n in enumerate(names, 1)], True)
    told = nfs3_replies.decode_readdir(memoryview(server.encode_readdir(plain)), 0)
    plus = listed(*(nfs3.DirEntryPlus(i, n, i, sample(), FH) for i, n in enumerate(names, 1)))
    assert [e.name for e in told.entries] == [e.name for e in plus.entries]
    assert told.left_out == plus.left_out == len(names) - len(plus.entries)
    assert told.last == plus.last == len(names)
    return [e.name for e in plus.entries]


@pytest.mark.parametrize("bad", [b"", b"/", b"a/b", b"../up", b"nul\0", b"n" * 256, b"n" * 4000])
def test_a_name_that_cannot_be_costs_its_entry(bad: bytes) -> None:
    assert names_of(b".", b"..", b"first", bad, b"n" * 255, b"\xff\n") == [b".", b"..", b"first", b"n" * 255, b"\xff\n"]
    assert names_of(bad) == []


@pytest.mark.parametrize(
    "bad",
    [
        nfs3.DirEntryPlus(2, b"bad", 2, sample(), b""),
        nfs3.DirEntryPlus(2, b"bad", 2, sample(), bytes(65)),
        nfs3.DirEntryPlus(2, b"bad", 2, None, b""),
        nfs3.DirEntryPlus(2, b"bad", 2, sample(type=0), FH),
        nfs3.DirEntryPlus(2, b"bad", 2, sample(type=8), FH),
        nfs3.DirEntryPlus(2, b"bad", 0, sample(), FH),  # who goes on after it begins anew
    ],
)
def test_an_entry_that_cannot_be_is_left_out_of_its_page(bad: nfs3.DirEntryPlus) -> None:
    before, after = nfs3.DirEntryPlus(1, b"a", 1, sample(), FH), nfs3.DirEntryPlus(3, b"c", 3, None, None)
    page = listed(before, bad, after)
    assert (page.entries, page.left_out, page.last) == ([before, after], 1, 3)


def fattr_of(*values: int) -> bytes:
    """Sizes and the parts of times as given; the rest is ordinary."""
    size, a_s, a_ns, m_s, m_ns, c_s, c_ns = values
    return struct.pack(">5I2Q2I2Q6I", 1, 0o644, 1, 0, 0, size, 2**64 - 1, 0, 0, 1, 42, a_s, a_ns, m_s, m_ns, c_s, c_ns)


def test_sizes_and_times_that_cannot_be_are_the_nearest_that_can() -> None:
    most = 2**32 - 1
    raw = fattr_of(HUGE, most, most, most, NS, 7, NS - 1)
    got = nfs3_replies.decode_getattr(memoryview(bytes(4) + raw), 0).attr
    assert got is not None
    assert (got.size, got.atime_ns, got.mtime_ns, got.ctime_ns) == (
        HUGE - 1, most * NS + NS - 1, most * NS + NS - 1, 7 * NS + NS - 1
    )  # fmt: skip
    entry = bytes(4) + bytes(4) + bytes(8) + struct.pack(">IQI4sQI", 1, 42, 4, b"name", 9, 1) + raw
    page = nfs3_replies.decode_readdirplus(memoryview(entry + struct.pack(">III", 0, 0, 1)), 0)
    assert page.entries == [nfs3.DirEntryPlus(42, b"name", 9, got, None)]
    before = struct.pack(">IIQ4II", 0, 1, HUGE, most, most, 7, NS - 1, 0)
    wcc = nfs3_replies.decode_setattr(memoryview(before), 0).wcc
    assert wcc.before == WccAttr(got.size, got.mtime_ns, got.ctime_ns)  # or no version would follow another


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"t" * 4095, nfs3.NFS3_OK), (b"t" * 4096, nfs3.NFS3ERR_NAMETOOLONG),
        (bytes(1_000_000), nfs3.NFS3ERR_NAMETOOLONG), (b"nul\0", nfs3.NFS3ERR_IO), (b"", nfs3.NFS3ERR_IO),
    ],
    ids=["longest", "a page", "a megabyte", "NUL", "empty"],
)  # fmt: skip
def test_a_target_that_linux_cannot_have_is_a_failure(target: bytes, status: int) -> None:
    message = server.encode_readlink(nfs3.ReadlinkResult(0, sample(), target))
    result = nfs3_replies.decode_readlink(memoryview(message), 0)
    assert result == nfs3.ReadlinkResult(status, sample(), b"" if status else target)


def test_an_empty_handle_is_malformed() -> None:
    with pytest.raises(ProtocolError):
        nfs3_replies.decode_lookup(memoryview(server.encode_lookup(nfs3.LookupResult(0, b"", None, None))), 0)
    made = nfs3.CreateResult(0, b"", None, nfs3.Wcc(None, None))
    with pytest.raises(ProtocolError):
        nfs3_replies.decode_create(memoryview(server.encode_create(made)), 0)


# -- whatever comes, the kernel can be told of it ----------------------------------------------------


def attributes_in(value: object) -> list[Fattr]:
    """All that a decoded result has of files."""
    if isinstance(value, Fattr):
        return [value]
    return [attr for part in value for attr in attributes_in(part)] if isinstance(value, (tuple, list)) else []


def tell(result: Any) -> None:
    """Keep and tell a decoded result in all forms that there are for it."""
    for attr in attributes_in(result):
        assert nfs3.unpack_fattr(nfs3.pack_fattr(attr)) == attr
        entry = Entry(7, 0, attr, 1.0, 1.0)
        direct._entry(entry)
        direct._attributes(entry)
        operations._entry(entry)
    for entry in getattr(result, "entries", ()):
        assert 0 < len(entry.name) < 256
        assert not set(b"/\0") & set(entry.name)
        assert entry.cookie
        assert -HUGE <= operations._signed(entry.cookie) < HUGE
    for fh in (getattr(part, "fh", None) for part in (result, *getattr(result, "entries", ()))):
        assert fh is None or 0 < len(fh) <= nfs3.FHSIZE


@pytest.mark.parametrize("name", RESULTS)
def test_a_damaged_result_is_the_protocol_error_or_can_be_kept_and_told(name: str) -> None:
    values, encode, decode = RESULTS[name]

    @settings(few, max_examples=25)
    @given(values.map(encode).flatmap(damaged))
    def check(message: bytes) -> None:
        with contextlib.suppress(ProtocolError):
            tell(decode(memoryview(message), 0))

    check()


@few
@given(st.binary(min_size=84, max_size=84))
def test_any_attributes_can_be_kept_and_told(raw: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        tell(nfs3.unpack_fattr(b"\0\0\0\3" + raw[4:]))  # a block device: the one kind with all its numbers
