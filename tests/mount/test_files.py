"""Reading and writing files through a mount, compared with what lies on the server."""

import errno
import hashlib
import mmap
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount
from tests.place import Place, small_tmpfs, wait_until


def test_bytes_written_are_on_the_server_after_close(place: Place) -> None:
    data = os.urandom(3_000_001)
    (place.here / "file").write_bytes(data)
    assert (place.there / "file").read_bytes() == data


def test_bytes_on_the_server_are_read(place: Place) -> None:
    data = os.urandom(5_000_003)
    (place.there / "file").write_bytes(data)
    assert (place.here / "file").read_bytes() == data


def test_fsynced_bytes_are_on_the_server_before_close(place: Place) -> None:
    with open(place.here / "file", "wb", buffering=0) as file:
        file.write(b"x" * 100_000)
        os.fsync(file.fileno())
        assert (place.there / "file").stat().st_size == 100_000


def test_o_sync_writes_are_on_the_server_when_write_returns(place: Place) -> None:
    fd = os.open(place.here / "file", os.O_WRONLY | os.O_CREAT | os.O_SYNC)
    try:
        os.write(fd, b"now")
        assert (place.there / "file").read_bytes() == b"now"
    finally:
        os.close(fd)


def test_a_reader_sees_bytes_that_are_not_on_the_server_yet(place: Place) -> None:
    with open(place.here / "file", "w+b", buffering=0) as file:
        file.write(b"a" * 10)
        file.seek(5)
        file.write(b"b" * 10)
        assert os.pread(file.fileno(), 100, 0) == b"a" * 5 + b"b" * 10
        assert os.fstat(file.fileno()).st_size == 15


def test_many_open_files_with_unsynced_bytes_do_not_wait_for_each_other(place: Place) -> None:
    # 240 MiB, more than the daemon keeps, with no file large enough to be committed for itself.
    data = os.urandom(1024 * 1024)
    fds = [os.open(place.here / f"{i}", os.O_CREAT | os.O_WRONLY) for i in range(12)]
    for _ in range(20):
        for fd in fds:
            os.write(fd, data)
    for fd in fds:
        os.close(fd)
    assert all((place.there / f"{i}").read_bytes() == data * 20 for i in range(12))


def test_random_overwrites_arrive_in_the_order_in_which_they_were_made(place: Place) -> None:
    rng = random.Random(7)
    expected = bytearray(2_000_000)
    with open(place.here / "file", "w+b", buffering=0) as file:
        file.truncate(len(expected))
        for i in range(3000):
            offset, length = rng.randrange(len(expected) - 9000), rng.randrange(1, 9000)
            data = bytes([i % 251]) * length
            os.pwrite(file.fileno(), data, offset)
            expected[offset : offset + length] = data
        assert os.pread(file.fileno(), len(expected), 0) == bytes(expected)
    assert (place.there / "file").read_bytes() == bytes(expected)


def test_appends_from_two_handles_do_not_overwrite_each_other(place: Place) -> None:
    with open(place.here / "log", "ab", buffering=0) as one, open(place.here / "log", "ab", buffering=0) as two:
        for _ in range(50):
            one.write(b"one\n")
            two.write(b"two\n")
    assert (place.there / "log").read_bytes() == b"one\ntwo\n" * 50


def test_append_after_the_file_grew_on_the_server_goes_to_its_end(place: Place) -> None:
    (place.here / "log").write_bytes(b"first\n")
    with open(place.there / "log", "ab") as server_side:
        server_side.write(b"second, by somebody else\n")
    with open(place.here / "log", "ab") as log:
        log.write(b"third\n")
    assert (place.there / "log").read_bytes() == b"first\nsecond, by somebody else\nthird\n"


def test_truncation_cuts_and_extends_with_zeros(place: Place) -> None:
    path = place.here / "file"
    path.write_bytes(b"0123456789")
    os.truncate(path, 4)
    assert path.read_bytes() == b"0123"
    os.truncate(path, 8)
    assert path.read_bytes() == b"0123\0\0\0\0"
    assert (place.there / "file").read_bytes() == b"0123\0\0\0\0"


def test_ftruncate_after_a_write_through_the_same_handle_wins(place: Place) -> None:
    with open(place.here / "file", "wb", buffering=0) as file:
        file.write(b"x" * 1_500_000)
        file.truncate(10)
        os.pwrite(file.fileno(), b"end", 20)
    assert (place.there / "file").read_bytes() == b"x" * 10 + b"\0" * 10 + b"end"


def test_open_with_o_trunc_empties_the_file(place: Place) -> None:
    (place.here / "file").write_bytes(b"long contents")
    with open(place.here / "file", "wb") as file:
        assert os.fstat(file.fileno()).st_size == 0
        file.write(b"short")
    assert (place.there / "file").read_bytes() == b"short"


def test_holes_read_as_zeros(place: Place) -> None:
    with open(place.here / "file", "wb", buffering=0) as file:
        os.pwrite(file.fileno(), b"end", 10_000_000)
    contents = (place.here / "file").read_bytes()
    assert len(contents) == 10_000_003
    assert contents[:10_000_000].count(0) == 10_000_000


def test_offsets_beyond_four_gibibytes_work(place: Place) -> None:
    offset = 5 * 1024**3 + 12345
    with open(place.here / "big", "w+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"far away", offset)
        assert os.pread(file.fileno(), 100, offset) == b"far away"
    with open(place.there / "big", "rb") as server_side:
        assert os.pread(server_side.fileno(), 100, offset) == b"far away"
    assert (place.here / "big").stat().st_size == offset + 8


def test_a_shared_mapping_writes_and_reads(place: Place) -> None:
    path = place.here / "mapped"
    path.write_bytes(bytes(3_000_000))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        assert mapping[1_234_567] == 0
        mapping[1_234_567:1_234_572] = b"hello"
        mapping.flush()
        assert (place.there / "mapped").read_bytes()[1_234_567:1_234_572] == b"hello"
        mapping[0:3] = b"end"
    assert (place.there / "mapped").read_bytes()[:3] == b"end"


def test_a_mapping_that_outlives_its_file_descriptor_is_written_at_last_unmap(place: Place) -> None:
    path = place.here / "mapped"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(fd, 8192)
    os.close(fd)
    mapping[4096:4100] = b"late"
    mapping.close()
    wait_until(lambda: (place.there / "mapped").read_bytes()[4096:4100] == b"late")


def test_a_private_mapping_does_not_change_the_file(place: Place) -> None:
    path = place.here / "mapped"
    path.write_bytes(b"original" * 1000)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        mapping[0:8] = b"changed!"
        assert mapping[0:8] == b"changed!"
    assert path.read_bytes() == b"original" * 1000


def test_sequential_strided_and_backward_reads_give_the_same_bytes(place: Place) -> None:
    data = random.Random(3).randbytes(40 * 1024 * 1024)
    (place.there / "data").write_bytes(data)
    with open(place.here / "data", "rb", buffering=0) as file:
        digest = hashlib.sha256()
        while piece := file.read(700_001):
            digest.update(piece)
        assert digest.digest() == hashlib.sha256(data).digest()
    for step in (3_000_000, -1_700_000):
        os.posix_fadvise(fd := os.open(place.here / "data", os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            offsets = range(0, len(data), step) if step > 0 else range(len(data) - 1, 0, step)
            for offset in offsets:
                assert os.pread(fd, 150_000, offset) == data[offset : offset + 150_000]
        finally:
            os.close(fd)


def test_eight_threads_reading_one_file_get_its_bytes(place: Place) -> None:
    data = random.Random(4).randbytes(24 * 1024 * 1024)
    (place.there / "data").write_bytes(data)
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        with open(place.here / "data", "rb", buffering=0) as file:
            for _ in range(60):
                offset, length = rng.randrange(len(data)), rng.randrange(1, 2_000_000)
                if os.pread(file.fileno(), length, offset) != data[offset : offset + length]:
                    wrong.append(offset)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_unlinked_open_file_can_still_be_read_and_written_and_leaves_nothing(place: Place) -> None:
    path = place.here / "doomed"
    path.write_bytes(b"still here")
    with open(path, "r+b", buffering=0) as file:
        path.unlink()
        assert not path.exists()
        assert file.read() == b"still here"
        file.write(b", and more")
        assert os.pread(file.fileno(), 100, 0) == b"still here, and more"
    wait_until(lambda: os.listdir(place.there) == [])


def test_a_file_that_is_renamed_and_then_removed_while_open_can_still_be_read(place: Place) -> None:
    (place.here / "tmp").write_bytes(b"contents")
    os.rename(place.here / "tmp", place.here / "final")
    with open(place.here / "final", "rb", buffering=0) as file:
        os.unlink(place.here / "final")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == b"contents"
    wait_until(lambda: os.listdir(place.there) == [])


def test_renaming_over_an_open_file_leaves_its_reader_the_old_contents(place: Place) -> None:
    (place.here / "target").write_bytes(b"old")
    (place.here / "source").write_bytes(b"new")
    with open(place.here / "target", "rb", buffering=0) as file:
        os.rename(place.here / "source", place.here / "target")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == b"old"
    assert (place.here / "target").read_bytes() == b"new"
    wait_until(lambda: os.listdir(place.there) == ["target"])


def test_reading_a_directory_and_opening_what_does_not_exist_fail_as_posix_says(place: Place) -> None:
    fd = os.open(place.here, os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        os.read(fd, 10)
    os.close(fd)
    with pytest.raises(FileNotFoundError):
        os.open(place.here / "nothing", os.O_RDONLY)


def test_extended_attributes_are_not_supported(place: Place) -> None:
    path = place.here / "file"
    path.touch()
    for call in (
        lambda: os.setxattr(path, "user.a", b"b"),
        lambda: os.getxattr(path, "user.a"),
        lambda: os.removexattr(path, "user.a"),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENOTSUP


def test_statfs_tells_of_the_servers_file_system(place: Place) -> None:
    here, there = os.statvfs(place.here), os.statvfs(place.there)
    assert here.f_namemax >= 255
    assert here.f_blocks * here.f_frsize == pytest.approx(there.f_blocks * there.f_frsize, rel=0.01)


def test_a_full_server_is_reported_once_by_fsync_or_close(tmp_path: Path) -> None:
    small = tmp_path / "exported"
    small_tmpfs(small, 8 * 1024 * 1024)
    try:
        with Ganesha(tmp_path) as server, Mount(server, tmp_path / "mnt") as mount:
            fd = os.open(mount.path / "file", os.O_WRONLY | os.O_CREAT)
            reported = []
            for _ in range(24):
                os.write(fd, os.urandom(1024 * 1024))
            for call in (os.fsync, os.fsync, os.close):
                try:
                    call(fd)
                except OSError as error:
                    reported.append(error.errno)
            assert reported == [errno.ENOSPC]
    finally:
        subprocess.run(["umount", "-l", small], check=True)
