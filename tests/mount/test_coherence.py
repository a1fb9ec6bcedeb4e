"""Bytes between two clients, by system calls as C programs make them.

Python's open() calls fstat(2), which teaches the kernel a size that other programs never ask for; so nothing here
uses it on the reading client. "Another client" is a second mount of the export.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount
from tests.place import Place, wait_until

Two = tuple[Path, Path]


@pytest.fixture(scope="module")
def other(server: Ganesha, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with Mount(server, tmp_path_factory.mktemp("other") / "mnt") as mounted:
        yield mounted


@pytest.fixture
def two(place: Place, other: Mount) -> Two:
    """The same directory through two mounts."""
    return place.here, place.through(other)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def put(path: Path, contents: bytes) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        assert os.write(fd, contents) == len(contents)


def append(path: Path, contents: bytes) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        assert os.write(fd, contents) == len(contents)


def first_read(path: Path) -> bytes:
    """One read(2) with a buffer larger than the file."""
    with opened(path, os.O_RDONLY) as fd:
        return os.read(fd, 65536)


# -- appends ------------------------------------------------------------------------------------------


def test_appends_in_turn_are_all_kept(two: Two) -> None:
    put(two[0] / "log", b"")
    expected = b""
    for i in range(40):
        line = b"line %d\n" % i
        append(two[i % 2] / "log", line)
        expected += line
    assert first_read(two[0] / "log") == first_read(two[1] / "log") == expected


def test_appends_after_another_client_cut_the_file_leave_no_hole(two: Two) -> None:
    a, b = two
    put(a / "log", b"x" * 5000)
    expected = b"x" * 10
    for _ in range(5):
        append(b / "log", b"b" * 300)
        os.truncate(a / "log", len(expected))
        append(b / "log", b"end")
        expected += b"end"
        assert first_read(a / "log") == expected


def test_threads_that_append_after_another_client_keep_its_lines(two: Two) -> None:
    """Each thread walks the path by itself: that one was made to look again must not let another pass."""
    a, b = two
    lock = threading.Lock()

    def in_turn(number: int) -> None:
        with lock:
            append(b / "log", b"thread %d\n" % number)

    put(a / "log", b"")
    for i in range(8):
        append(b / "log", b"here %d\n" % i)  # this kernel knows a size
        append(a / "log", b"there %d\n" % i)
        threads = [threading.Thread(target=in_turn, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        lines = first_read(a / "log").splitlines()
        assert len(lines) == 5 * (i + 1)
        assert not any(b"\0" in line for line in lines)


# -- the first read after an open ---------------------------------------------------------------------


def test_the_first_read_sees_all_that_was_closed_before_the_open(two: Two) -> None:
    a, b = two
    for i in range(60):
        contents = b"%d" % i + b"x" * (50 + 3 * i)
        put(a / "status", contents)
        assert first_read(b / "status") == contents


def test_the_first_read_sees_it_also_while_the_file_is_open_here(two: Two) -> None:
    a, b = two
    put(a / "status", b"first")
    with opened(b / "status", os.O_RDONLY) as held:
        assert os.pread(held, 65536, 0) == b"first"
        for i in range(60):
            contents = b"%d" % i + b"x" * (50 + 3 * i)
            put(a / "status", contents)
            assert first_read(b / "status") == contents


def test_a_file_that_became_shorter_is_read_to_its_new_end(two: Two) -> None:
    a, b = two
    for size in (20_000, 9_000, 4_096, 100, 1):
        put(a / "file", bytes([size % 251]) * size)
        assert first_read(b / "file") == bytes([size % 251]) * size
    os.truncate(a / "file", 0)
    assert first_read(b / "file") == b""


def test_an_overwrite_of_the_same_size_is_seen(two: Two) -> None:
    a, b = two
    put(a / "file", b"0" * 40_000)
    for i in range(10):
        assert len(first_read(b / "file")) == 40_000
        with opened(a / "file", os.O_WRONLY) as fd:
            os.pwrite(fd, b"%d" % i, 32_768)
        assert first_read(b / "file")[32_768:32_769] == b"%d" % i


# -- what a reader is told of a file that grows -----------------------------------------------------------


def test_who_follows_a_file_with_stat_is_told_no_zeros(place: Place, other: Mount) -> None:
    """tail -f: fstat(2), and what is new is read. The last page is in the kernel's cache each time."""
    a, b = place.here, place.through(other)
    put(a / "log", b"first\n")
    told = b""
    expected = b"first\n"
    with opened(b / "log", os.O_RDONLY) as fd:
        for i in range(30):
            wait_until(partial(_told_size, b / "log", fd, len(expected)), 60)
            told += os.pread(fd, 65536, len(told))
            assert told == expected
            append(a / "log", b"line %d\n" % i)
            expected += b"line %d\n" % i


def _told_size(path: Path, fd: int, size_bytes: int) -> bool:
    """Another open asks the server, so that fstat(2) need not wait until attributes are old."""
    os.close(os.open(path, os.O_RDONLY))
    return os.fstat(fd).st_size == size_bytes


# -- own writes beside those of others ----------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_what_another_client_wrote_is_seen_after_a_write_of_our_own(two: Two, again: bool) -> None:
    a, b = two
    put(a / "file", b"0" * 65536)
    with opened(a / "file", os.O_RDWR) as fd:
        assert os.pread(fd, 4, 32768) == b"0000"
        with opened(b / "file", os.O_WRONLY) as theirs:
            os.pwrite(theirs, b"BBBB", 32768)
        os.pwrite(fd, b"AA", 0)
        os.fsync(fd)
        if again:
            os.pwrite(fd, b"aa", 8)
    with opened(a / "file", os.O_RDONLY) as fd:
        assert os.pread(fd, 4, 32768) == b"BBBB"
        assert os.pread(fd, 2, 0) == b"AA"
