"""Names, directories, links, special files and attributes through a mount."""

import ctypes
import errno
import os
import socket
import stat
import subprocess
import time

import pytest

from tests.place import Place, daemon_rss_bytes, wait_until

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: os.PathLike[str], new: os.PathLike[str], flags: int) -> int:
    """0 or the errno."""
    if _libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags) == 0:
        return 0
    return ctypes.get_errno()


def test_names_of_any_byte_but_slash_and_nul_come_back_the_same(place: Place) -> None:
    names = [bytes([b]) * 3 for b in range(1, 256) if b != ord("/")]
    names = [n for n in names if n not in (b"...",)] + ["päth ✓".encode(), b"\xff\xfe", b" ", b"...", b"-rf"]
    here = os.fsencode(place.here)
    for name in names:
        with open(here + b"/" + name, "wb") as file:
            file.write(name)
    assert sorted(os.listdir(here)) == sorted(set(names))
    for name in names:
        with open(os.fsencode(place.there) + b"/" + name, "rb") as file:
            assert file.read() == name


def test_a_name_may_have_255_bytes_and_not_256(place: Place) -> None:
    (place.here / ("n" * 255)).write_bytes(b"x")
    assert os.listdir(place.there) == ["n" * 255]
    with pytest.raises(OSError) as caught:
        (place.here / ("n" * 256)).write_bytes(b"x")
    assert caught.value.errno == errno.ENAMETOOLONG


def test_directories_are_made_listed_and_removed(place: Place) -> None:
    os.makedirs(place.here / "a/b/c")
    assert os.listdir(place.here / "a/b") == ["c"]
    with pytest.raises(OSError) as caught:
        os.rmdir(place.here / "a")
    assert caught.value.errno == errno.ENOTEMPTY
    os.removedirs(place.here / "a/b/c")
    assert not (place.there / "a").exists()


def test_a_listing_shows_dot_and_dot_dot(place: Place) -> None:
    (place.here / "x").touch()
    out = subprocess.run(["ls", "-ai", place.here], capture_output=True, text=True, check=True).stdout
    assert sorted(line.split()[1] for line in out.splitlines()) == [".", "..", "x"]


def test_a_directory_of_100000_entries_is_listed_whole(place: Place) -> None:
    (place.there / "big").mkdir()
    for i in range(100_000):
        os.close(os.open(place.there / "big" / f"{i:06d}", os.O_CREAT | os.O_WRONLY))
    names = os.listdir(place.here / "big")
    assert len(names) == len(set(names)) == 100_000
    assert daemon_rss_bytes(place.mount) < 150 * 1024 * 1024


def test_names_removed_while_listing_neither_hide_nor_repeat_others(place: Place) -> None:
    for i in range(3000):
        (place.there / f"{i:04d}").touch()
    seen = []
    with os.scandir(place.here) as listing:
        for i, entry in enumerate(listing):
            seen.append(entry.name)
            if i % 2 == 0:
                os.unlink(entry.path)
    assert sorted(seen) == [f"{i:04d}" for i in range(3000)]
    assert len(os.listdir(place.there)) == 1500


def test_rm_rf_empties_a_tree(place: Place) -> None:
    for d in range(20):
        (place.there / f"tree/{d}").mkdir(parents=True)
        for f in range(100):
            (place.there / f"tree/{d}/{f}").touch()
    subprocess.run(["rm", "-rf", place.here / "tree"], check=True)
    assert os.listdir(place.there) == []


def test_seekdir_goes_back_to_where_telldir_was(place: Place) -> None:
    for i in range(1000):
        (place.there / f"{i:04d}").touch()
    fd = os.open(place.here, os.O_RDONLY)
    try:
        first = os.listdir(fd)
        os.lseek(fd, 0, os.SEEK_SET)
        assert os.listdir(fd) == first
    finally:
        os.close(fd)


def test_symlinks_keep_any_target(place: Place) -> None:
    for i, target in enumerate(("file", "/absolute/path", "../" * 100 + "x", "y" * 1023)):
        os.symlink(target, place.here / f"link{i}")
        assert os.readlink(place.here / f"link{i}") == target
        assert os.readlink(place.there / f"link{i}") == target
    assert stat.S_ISLNK(os.lstat(place.here / "link0").st_mode)


def test_hard_links_are_the_same_file(place: Place) -> None:
    (place.here / "one").write_bytes(b"shared")
    os.link(place.here / "one", place.here / "two")
    one, two = os.stat(place.here / "one"), os.stat(place.here / "two")
    assert (one.st_ino, one.st_nlink) == (two.st_ino, 2)
    (place.here / "two").write_bytes(b"changed")
    assert (place.here / "one").read_bytes() == b"changed"
    os.unlink(place.here / "one")
    assert os.stat(place.here / "two").st_nlink == 1
    with pytest.raises(FileExistsError):
        os.link(place.here / "two", place.here / "two")


def test_removing_both_names_of_an_open_file_leaves_nothing_behind(place: Place) -> None:
    (place.here / "one").write_bytes(b"shared")
    os.link(place.here / "one", place.here / "two")
    with open(place.here / "one", "rb", buffering=0) as file:
        os.unlink(place.here / "one")
        os.unlink(place.here / "two")
        assert file.read() == b"shared"
    wait_until(lambda: os.listdir(place.there) == [])


def test_fifos_sockets_and_devices_are_made(place: Place) -> None:
    os.mkfifo(place.here / "fifo", 0o640)
    assert stat.S_ISFIFO(os.lstat(place.there / "fifo").st_mode)
    with socket.socket(socket.AF_UNIX) as sock:
        cwd = os.getcwd()
        os.chdir(place.here)
        try:
            sock.bind("sock")
        finally:
            os.chdir(cwd)
    assert stat.S_ISSOCK(os.lstat(place.there / "sock").st_mode)
    os.mknod(place.here / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    made = os.lstat(place.here / "null")
    assert stat.S_ISCHR(made.st_mode) and made.st_rdev == os.makedev(1, 3)
    os.mknod(place.here / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 300))
    assert os.lstat(place.there / "disk").st_rdev == os.makedev(7, 300)
    os.mknod(place.here / "plain", stat.S_IFREG | 0o604)
    assert os.lstat(place.there / "plain").st_mode == stat.S_IFREG | 0o604


def test_rename_moves_replaces_and_refuses_as_posix_says(place: Place) -> None:
    (place.here / "a").write_bytes(b"a")
    (place.here / "b").write_bytes(b"b")
    (place.here / "dir/full").mkdir(parents=True)
    os.rename(place.here / "a", place.here / "b")
    assert (place.here / "b").read_bytes() == b"a" and not (place.here / "a").exists()
    os.rename(place.here / "b", place.here / "dir/c")
    assert (place.there / "dir/c").read_bytes() == b"a"
    (place.here / "other").mkdir()
    with pytest.raises(OSError) as caught:
        os.rename(place.here / "other", place.here / "dir")
    assert caught.value.errno == errno.ENOTEMPTY
    with pytest.raises(NotADirectoryError):
        os.rename(place.here / "other", place.here / "dir/c")
    with pytest.raises(FileNotFoundError):
        os.rename(place.here / "gone", place.here / "x")


def test_rename_noreplace_refuses_a_taken_name_and_exchange_is_invalid(place: Place) -> None:
    (place.here / "a").write_bytes(b"a")
    (place.here / "b").write_bytes(b"b")
    (place.here / "d").mkdir()
    assert renameat2(place.here / "a", place.here / "b", RENAME_NOREPLACE) == errno.EEXIST
    assert renameat2(place.here / "a", place.here / "c", RENAME_NOREPLACE) == 0
    assert (place.there / "c").read_bytes() == b"a" and not (place.there / "a").exists()
    assert renameat2(place.here / "d", place.here / "e", RENAME_NOREPLACE) == 0
    assert (place.there / "e").is_dir()
    # A name that this client does not know of yet is not replaced either.
    assert not (place.here / "foreign").exists()
    (place.there / "foreign").write_bytes(b"theirs")
    assert renameat2(place.here / "c", place.here / "foreign", RENAME_NOREPLACE) == errno.EEXIST
    assert renameat2(place.here / "b", place.here / "c", RENAME_EXCHANGE) == errno.EINVAL


def test_o_excl_creates_once(place: Place) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    before = time.time()
    os.close(os.open(place.here / "lock", flags, 0o640))
    made = os.stat(place.there / "lock")
    assert stat.S_IMODE(made.st_mode) == 0o640
    assert abs(made.st_mtime - before) < 60
    with pytest.raises(FileExistsError):
        os.open(place.here / "lock", flags)
    # Also when only the server knows the name.
    (place.there / "theirs").touch()
    with pytest.raises(FileExistsError):
        os.open(place.here / "theirs", flags)


def test_a_file_opened_for_writing_with_mode_0444_can_be_written(place: Place) -> None:
    fd = os.open(place.here / "readonly", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444)
    os.write(fd, b"git does this")
    os.close(fd)
    assert (place.there / "readonly").read_bytes() == b"git does this"


def test_mode_owner_and_times_with_nanoseconds_are_set(place: Place) -> None:
    path = place.here / "file"
    path.write_bytes(b"x")
    os.chmod(path, 0o4751)
    os.chown(path, 1234, 5678)
    os.utime(path, ns=(1_111_111_111_123_456_789, 1_222_222_222_987_654_321))
    for at in (path, place.there / "file"):
        st = os.stat(at)
        assert (st.st_uid, st.st_gid) == (1234, 5678)
        assert st.st_mtime_ns == 1_222_222_222_987_654_321
        assert st.st_atime_ns == 1_111_111_111_123_456_789
    os.chmod(path, 0o600)
    assert stat.S_IMODE(os.stat(place.there / "file").st_mode) == 0o600


def test_times_set_before_close_survive_it(place: Place) -> None:
    with open(place.here / "file", "wb", buffering=0) as file:
        file.write(b"x" * 100_000)
        os.utime(file.fileno(), ns=(10**18, 10**18))
    assert os.stat(place.there / "file").st_mtime_ns == 10**18
    assert os.stat(place.here / "file").st_mtime_ns == 10**18


def test_touch_sets_the_time_of_now(place: Place) -> None:
    (place.here / "file").touch()
    os.utime(place.here / "file", (0, 0))
    os.utime(place.here / "file")
    assert abs(os.stat(place.there / "file").st_mtime - time.time()) < 5


def test_umask_applies_to_what_is_created(place: Place) -> None:
    old = os.umask(0o027)
    try:
        os.close(os.open(place.here / "file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(place.here / "dir", 0o777)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(place.there / "file").st_mode) == 0o640
    assert stat.S_IMODE(os.stat(place.there / "dir").st_mode) == 0o750


def test_inode_numbers_are_the_servers(place: Place) -> None:
    (place.here / "file").touch()
    assert os.stat(place.here / "file").st_ino == os.stat(place.there / "file").st_ino


def test_a_handle_to_a_file_that_the_server_removed_is_stale(place: Place) -> None:
    (place.there / "file").write_bytes(b"x" * 100)
    with open(place.here / "file", "rb", buffering=0) as file:
        (place.there / "file").unlink()
        with pytest.raises(OSError) as caught:
            os.fsync(file.fileno())
            file.read()
        assert caught.value.errno == errno.ESTALE
