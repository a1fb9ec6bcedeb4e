"""Promises of docs/semantics.md that no other test is about."""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount, Proxy
from tests.faults.test_failover import kill_daemon
from tests.place import Place, wait_until

LIBC = ctypes.CDLL(None, use_errno=True)
TRY_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def can_lock(path: Path) -> bool:
    """Whether another process gets the lock of this file."""
    tried = subprocess.run([sys.executable, "-c", TRY_LOCK, path], stderr=subprocess.DEVNULL, check=False)
    return tried.returncode == 0


def test_bytes_of_an_open_file_are_sent_and_committed_in_the_background(place: Place) -> None:
    fd = os.open(place.here / "file", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(fd, b"x" * 300_000)
        wait_until(lambda: (place.there / "file").stat().st_size == 300_000, 30)
        wait_until(lambda: place.mount.status()["dirty_bytes"] == 0, 30)
    finally:
        os.close(fd)


def test_syncfs_returns_though_bytes_are_not_on_the_server(place: Place, server: Ganesha) -> None:
    fd = os.open(place.here / "file", os.O_WRONLY | os.O_CREAT)
    server.pause()
    try:
        os.write(fd, b"x")
        assert LIBC.syncfs(fd) == 0
        assert (place.there / "file").stat().st_size == 0
    finally:
        server.resume()
        os.close(fd)


def test_locks_stay_when_the_daemon_dies(server: Ganesha, export: Path, tmp_path: Path) -> None:
    mount = Mount(server, tmp_path / "mnt")
    mount.daemon_may_die = True
    with mount:
        here = Place.of(mount, export).here
        with open(here / "lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            kill_daemon(mount)
            assert not can_lock(here / "lock")
        assert can_lock(here / "lock")


def test_locks_hold_within_one_mount_only(place: Place, server: Ganesha, tmp_path: Path) -> None:
    with Mount(server, tmp_path / "mnt") as other, open(place.here / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not can_lock(place.here / "lock")
        assert can_lock(place.through(other) / "lock")


def test_with_nocto_an_open_asks_nothing(server: Ganesha, export: Path, tmp_path: Path) -> None:
    (export / "file").write_bytes(b"data")
    with Proxy(server.port) as proxy:

        def bytes_of_an_open(here: Path) -> int:
            """What the server answers to an open(2) of a file whose name and attributes are known."""
            assert (here / "file").read_bytes() == b"data"
            before = proxy.bytes_to_client
            os.close(os.open(here / "file", os.O_RDONLY))
            return proxy.bytes_to_client - before

        with Mount(server, tmp_path / "asks", "actimeo=600", port=proxy.port) as asks:
            assert bytes_of_an_open(Place.of(asks, export).here) > 0
        with Mount(server, tmp_path / "nocto", "nocto,actimeo=600", port=proxy.port) as nocto:
            assert bytes_of_an_open(Place.of(nocto, export).here) == 0


def test_stat_tells_the_servers_size_and_times_while_a_file_is_written(place: Place) -> None:
    fd = os.open(place.here / "file", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(fd, b"x" * 1000)
        told, true = os.stat(place.here / "file"), os.stat(place.there / "file")
        assert (told.st_size, told.st_mtime_ns, told.st_ctime_ns) == (1000, true.st_mtime_ns, true.st_ctime_ns)
    finally:
        os.close(fd)


def test_fallocate_is_not_supported(place: Place) -> None:
    fd = os.open(place.here / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError) as caught:
            if LIBC.fallocate64(fd, 0, ctypes.c_int64(0), ctypes.c_int64(4096)) != 0:
                raise OSError(ctypes.get_errno(), "fallocate")
        assert caught.value.errno == errno.EOPNOTSUPP
    finally:
        os.close(fd)
