"""A server that lies costs the call that it lies to, and never the mount, its daemon or what others do in it.

One mount for all; each test has names of its own. `Mount` sees at its end that the daemon is still the first one.
"""

import contextlib
import errno
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from efcfs.nfs import nfs3
from tests.bed import Mount
from tests.nfs import server_half as half
from tests.place import wait_until
from tests.rogue import NONE, Node, Rogue
from tests.waiting import Waiting

GOOD = [b"first", b"last"]


class Bed:
    def __init__(self, rogue: Rogue, mount: Mount) -> None:
        self.rogue, self.mount, self.here = rogue, mount, os.fsencode(mount.path)
        self.numbers = itertools.count()

    def make(self, kind: int = nfs3.NF3REG, data: bytes = b"", **claims: int) -> tuple[Node, bytes]:
        """A file, and its path in the mount."""
        name = b"file%d" % next(self.numbers)
        return self.rogue.make(name, kind, data, None, **claims), os.path.join(self.here, name)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with Rogue() as rogue:
        path = tmp_path_factory.mktemp("rogue") / "mnt"
        with Mount(rogue, path, "nconnect=2,timeo=50") as mount:  # type: ignore[arg-type]
            yield Bed(rogue, mount)


def only(node: Node, then: Callable[[tuple[Any, ...], bytes], bytes | None]) -> Callable[..., bytes | None]:
    """Misbehave for this file, be honest for the others."""
    return lambda args, honest: then(args, honest) if args[0] == node.fh else honest


def failing(call: Callable[[], object]) -> int | None:
    """The errno that it raises."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def read(path: bytes, offset: int = 0) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, 4096, offset)
    finally:
        os.close(fd)


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [b"", b"/", b"../../etc/passwd", b"a/b", b"nul\0", b"n" * 256, b"n" * 504, b"n" * 4000],
    ids=["empty", "slash", "climbing", "path", "NUL", "256", "504", "4000"],
)  # fmt: skip
def test_a_bad_name_costs_itself_and_not_its_directory(bed: Bed, bad: bytes) -> None:
    node, path = bed.make(nfs3.NF3DIR)
    for name in (GOOD[0], bad, GOOD[1]):
        bed.rogue.make(name, at=node)
    assert sorted(os.listdir(path)) == GOOD
    assert [os.stat(os.path.join(path, name)).st_size for name in GOOD] == [0, 0]


def test_a_page_of_nothing_but_bad_names_is_skipped(bed: Bed) -> None:
    node, path = bed.make(nfs3.NF3DIR)

    def pages(args: tuple[Any, ...], _: bytes) -> bytes:
        cookie = args[1]
        name = b"bad/name" if cookie < 5 else b"good"
        entries = [nfs3.DirEntryPlus(7, name, cookie + 1, None, None)] if cookie < 6 else []
        return half.encode_readdirplus(nfs3.ReaddirplusResult(0, node.attr, bytes(8), entries, cookie >= 6))

    bed.rogue.make(b"good", at=node)
    with bed.rogue.misbehaving(nfs3.NFSPROC3_READDIRPLUS, only(node, pages)):
        assert os.listdir(path) == [b"good"]


@pytest.mark.parametrize("entry", ["bad", "good"])
def test_a_directory_without_end_or_in_a_circle_fails(bed: Bed, entry: str) -> None:
    node, path = bed.make(nfs3.NF3DIR)
    name = b"bad/name" if entry == "bad" else b"good"

    def circle(args: tuple[Any, ...], _: bytes) -> bytes:
        entries = [nfs3.DirEntryPlus(7, name, 9, None, None)]
        return half.encode_readdirplus(nfs3.ReaddirplusResult(0, node.attr, bytes(8), entries, False))

    bed.rogue.make(b"good", at=node)
    with bed.rogue.misbehaving(nfs3.NFSPROC3_READDIRPLUS, only(node, circle)):
        assert failing(lambda: os.listdir(path)) == errno.EIO


# -- attributes and handles --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, 2**64 - 1])
def test_an_impossible_size_is_the_largest_that_there_is(bed: Bed, size: int) -> None:
    node, path = bed.make(nfs3.NF3DIR)
    child = bed.rogue.make(b"huge", at=node, size=size, used=2**64 - 1)
    assert os.listdir(path) == [b"huge"]
    assert os.stat(os.path.join(path, b"huge")).st_size == 2**63 - 1
    assert child.attr.size == size


def test_impossible_times_and_devices_are_told_as_the_nearest(bed: Bed) -> None:
    node, path = bed.make(nfs3.NF3BLK, rdev_major=2**32 - 1, rdev_minor=2**32 - 1)
    late = struct.pack(">6I", *[2**32 - 1] * 6)

    def lie(args: tuple[Any, ...], honest: bytes) -> bytes:
        at = honest.index(half.fattr(node.attr)) if half.fattr(node.attr) in honest else None
        return honest if at is None else honest[: at + 60] + late + honest[at + 84 :]

    with bed.rogue.misbehaving(nfs3.NFSPROC3_LOOKUP, lie):
        told = os.stat(path)
    assert (told.st_mtime_ns, told.st_rdev) == ((2**32 - 1) * 10**9 + 10**9 - 1, 0)


@pytest.mark.parametrize("fileid", [0, 1, 2**63, 2**64 - 1])
def test_any_fileid_will_do(bed: Bed, fileid: int) -> None:
    node, path = bed.make(nfs3.NF3DIR)
    bed.rogue.make(b"child", data=b"its bytes", at=node, fileid=fileid)
    assert os.listdir(path) == [b"child"]
    assert read(os.path.join(path, b"child")) == b"its bytes"


@pytest.mark.parametrize("fh", [b"", bytes(65)], ids=["empty", "65 bytes"])
def test_a_bad_handle_fails_its_lookup(bed: Bed, fh: bytes) -> None:
    node, path = bed.make()

    def lie(args: tuple[Any, ...], honest: bytes) -> bytes:
        mine = os.path.basename(path) == args[1]
        return half.encode_lookup(nfs3.LookupResult(0, fh, node.attr, None)) if mine else honest

    with bed.rogue.misbehaving(nfs3.NFSPROC3_LOOKUP, lie):
        assert failing(lambda: os.stat(path)) == errno.EIO
    assert os.stat(path).st_size == 0


def test_the_roots_handle_as_a_child_ends_nothing(bed: Bed) -> None:
    node, path = bed.make(nfs3.NF3DIR)
    node.names[b"loop"] = bed.rogue.root
    failing(lambda: os.stat(os.path.join(path, b"loop", b"loop")))
    failing(lambda: os.listdir(path))
    assert os.stat(bed.here).st_ino


def test_a_file_that_is_a_directory_at_each_second_call_ends_nothing(bed: Bed) -> None:
    node, path = bed.make(data=b"bytes")
    kinds = itertools.cycle([nfs3.NF3DIR, nfs3.NF3REG])

    def lie(args: tuple[Any, ...], honest: bytes) -> bytes:
        node.claims["type"] = next(kinds)
        return half.encode_getattr(nfs3.GetattrResult(0, node.attr))

    with bed.rogue.misbehaving(nfs3.NFSPROC3_GETATTR, only(node, lie)):
        for call in (os.stat, os.listdir, read, os.stat, read):
            failing(lambda call=call: call(path))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (b"t" * 4095, None), (b"t" * 4096, errno.ENAMETOOLONG), (b"t" * 1_000_000, errno.ENAMETOOLONG),
        (b"nul\0nul", errno.EIO), (b"", errno.EIO),
    ],
    ids=["4095", "4096", "a megabyte", "NUL", "empty"],
)  # fmt: skip
def test_a_target_that_linux_cannot_have_fails_its_readlink(bed: Bed, target: bytes, told: int | None) -> None:
    _, path = bed.make(nfs3.NF3LNK, target)
    assert failing(lambda: os.readlink(path)) == told


# -- reading and writing -----------------------------------------------------------------------------


def test_a_read_longer_than_asked_fails_at_once(bed: Bed) -> None:
    node, path = bed.make(data=b"b" * 4096)
    asked = bed.rogue.calls[nfs3.NFSPROC3_READ]

    def more(args: tuple[Any, ...], _: bytes) -> bytes:
        return half.encode_read(nfs3.ReadResult(0, node.attr, args[2] + 4096, True, bytes(args[2] + 4096)))

    with bed.rogue.misbehaving(nfs3.NFSPROC3_READ, only(node, more)):
        assert failing(lambda: read(path)) == errno.EIO
    assert bed.rogue.calls[nfs3.NFSPROC3_READ] - asked < 10


def test_a_read_of_nothing_that_is_not_the_end_ends(bed: Bed) -> None:
    node, path = bed.make(data=b"b" * 4096)
    nothing = half.encode_read(nfs3.ReadResult(0, node.attr, 0, False, b""))
    with bed.rogue.misbehaving(nfs3.NFSPROC3_READ, only(node, lambda *_: nothing)):
        failing(lambda: read(path))


@pytest.mark.parametrize("count", [0, 5000, 2**32 - 1])
def test_a_write_of_nothing_or_of_more_than_sent_is_an_error(bed: Bed, count: int) -> None:
    node, path = bed.make()
    lie = half.encode_write(nfs3.WriteResult(0, NONE, count, nfs3.FILE_SYNC, bytes(8)))
    fd = os.open(path, os.O_WRONLY)
    with bed.rogue.misbehaving(nfs3.NFSPROC3_WRITE, only(node, lambda *_: lie)):
        os.pwrite(fd, b"w" * 4096, 0)
        assert failing(lambda: os.fsync(fd)) == errno.EIO
    os.close(fd)


def test_verifiers_that_change_all_the_time_end_in_stable_writes(bed: Bed) -> None:
    node, path = bed.make()
    numbers = itertools.count(1)
    asked = bed.rogue.calls[nfs3.NFSPROC3_WRITE]

    def write(args: tuple[Any, ...], _: bytes) -> bytes:
        return half.encode_write(nfs3.WriteResult(0, NONE, args[2], args[3], next(numbers).to_bytes(8, "big")))

    def commit(args: tuple[Any, ...], _: bytes) -> bytes:
        return half.encode_commit(nfs3.CommitResult(0, NONE, next(numbers).to_bytes(8, "big")))

    fd = os.open(path, os.O_WRONLY)
    with (
        bed.rogue.misbehaving(nfs3.NFSPROC3_WRITE, only(node, write)),
        bed.rogue.misbehaving(nfs3.NFSPROC3_COMMIT, only(node, commit)),
    ):
        os.pwrite(fd, bytes(3 << 20), 0)
        os.fsync(fd)
    os.close(fd)
    assert node.data == bytes(3 << 20)
    assert bed.rogue.calls[nfs3.NFSPROC3_WRITE] - asked < 60


# -- replies, links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length_bytes", [2**31 - 4, 3 << 20])
def test_a_record_without_measure_fails_its_call_and_no_other(bed: Bed, length_bytes: int) -> None:
    _, path = bed.make()

    def huge(answer: bytes) -> bytes:
        return struct.pack(">I", 0x80000000 | length_bytes) + answer[4:]

    bed.rogue.record[nfs3.NFSPROC3_LOOKUP] = huge
    try:
        assert failing(lambda: os.stat(path)) == errno.EIO
    finally:
        del bed.rogue.record[nfs3.NFSPROC3_LOOKUP]
    assert os.stat(path).st_size == 0


def test_fragments_of_a_byte_are_put_together(bed: Bed) -> None:
    _, path = bed.make(data=b"bytes")
    bed.rogue.record[nfs3.NFSPROC3_LOOKUP] = lambda answer: half.framed(answer[4:], [1] * 1000)
    try:
        assert os.stat(path).st_size == 5
    finally:
        del bed.rogue.record[nfs3.NFSPROC3_LOOKUP]


def test_a_server_that_is_busy_for_a_while_is_asked_again(bed: Bed) -> None:
    node, path = bed.make(data=b"bytes")
    busy = iter([half.encode_read(nfs3.ReadResult(nfs3.NFS3ERR_JUKEBOX, None, 0, False, b""))] * 2)
    with bed.rogue.misbehaving(nfs3.NFSPROC3_READ, only(node, lambda _, honest: next(busy, honest))):
        assert read(path) == b"bytes"


def test_a_server_that_refuses_null_to_new_links_is_away_until_it_does_not(bed: Bed) -> None:
    _, path = bed.make(data=b"bytes")
    asked = bed.rogue.calls[nfs3.NFSPROC3_NULL]

    def unavailable(answer: bytes) -> bytes:
        return half.framed(answer[4:24] + struct.pack(">I", 1))  # PROG_UNAVAIL in place of SUCCESS

    bed.rogue.record[nfs3.NFSPROC3_NULL] = unavailable
    try:
        bed.rogue.cut()
        wait_until(lambda: bed.rogue.calls[nfs3.NFSPROC3_NULL] > asked + 5, 30)
    finally:
        del bed.rogue.record[nfs3.NFSPROC3_NULL]
    assert read(path) == b"bytes"


STAT = "import os, sys; print(os.stat(sys.argv[1]).st_size)"


def test_a_call_that_the_server_drops_is_sent_again_while_its_link_is_busy(bed: Bed) -> None:
    _, path = bed.make(data=b"bytes")
    dropped: list[bytes] = []

    def drop(args: tuple[Any, ...], honest: bytes) -> bytes | None:
        if args[1] == os.path.basename(path) and not dropped:
            dropped.append(args[1])
            return None
        return honest

    with bed.rogue.misbehaving(nfs3.NFSPROC3_LOOKUP, drop), Waiting(STAT, os.fsdecode(path)) as program:
        others = itertools.count()

        def answered() -> bool:
            with contextlib.suppress(FileNotFoundError):  # the link is never quiet
                os.stat(os.path.join(bed.here, b"other%d" % next(others)))
            return program.process.poll() is not None

        wait_until(answered, 60)
        assert program.told() == "5"


def test_the_mount_has_lived_through_it(bed: Bed) -> None:
    (bed.mount.path / "new").write_bytes(b"fine")
    assert Path(bed.mount.path / "new").read_bytes() == b"fine"
    assert bed.mount.status()["failovers"] == 0
