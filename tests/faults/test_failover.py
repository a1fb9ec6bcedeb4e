"""A daemon that is killed is replaced, and what programs had open, had written and had asked for is still so."""

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount, Proxy, is_mounted
from tests.place import Place, small_tmpfs, wait_until
from tests.waiting import Waiting

MIB = 1024 * 1024


@pytest.fixture
def own(server: Ganesha, tmp_path: Path) -> Iterator[Mount]:
    mount = Mount(server, tmp_path / "mnt")
    mount.daemon_may_die = True
    with mount:
        yield mount


def kill_daemon(mount: Mount) -> None:
    """Returns when another one serves."""
    before = mount.status()
    pid = before["daemon_pid"]
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: mount.status().get("daemon_pid", pid) != pid, 20)
    after = mount.status()
    assert after["failovers"] == int(str(before["failovers"])) + 1 and after["last_exit"] == "signal SIGKILL"


def test_status_waits_for_the_daemon_that_replaces_a_dead_one(own: Mount) -> None:
    for failovers in range(1, 6):
        os.kill(int(str(own.status()["daemon_pid"])), signal.SIGKILL)
        assert own.status().get("failovers") == failovers


def test_open_files_and_directories_go_on(own: Mount, export: Path) -> None:
    here = Place.of(own, export).here
    (here / "old").write_bytes(b"0123456789")
    for i in range(500):
        (export / f"f{i:03}").touch()
    old = os.open(here / "old", os.O_RDWR)
    fresh = os.open(here / "fresh", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    log = os.open(here / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(log, b"one\n")
    with os.scandir(here) as listing:
        names = {next(listing).name}
        kill_daemon(own)
        names |= {entry.name for entry in listing}
    assert names == {"old", "fresh", "log", *(f"f{i:03}" for i in range(500))}
    assert os.pread(old, 4, 3) == b"3456"
    os.pwrite(old, b"xy", 3)
    os.write(fresh, b"new")
    os.write(log, b"two\n")
    kill_daemon(own)
    os.write(log, b"three\n")
    for fd in (old, fresh, log):
        os.close(fd)
    assert (export / "old").read_bytes() == b"012xy56789"
    assert (export / "fresh").read_bytes() == b"new"
    assert (export / "log").read_bytes() == b"one\ntwo\nthree\n"
    assert own.status()["open_handles"] == 0


def test_a_directory_that_was_opened_before_is_listed_as_it_was_then(own: Mount, export: Path) -> None:
    here = Place.of(own, export).here
    (export / "old").touch()
    assert os.listdir(here) == ["old"]  # and that is kept
    (export / "new").touch()
    fd = os.open(here, os.O_RDONLY | os.O_DIRECTORY)
    kill_daemon(own)
    assert sorted(os.listdir(fd)) == ["new", "old"]
    os.close(fd)


def test_a_directory_that_is_emptied_while_it_is_listed_is_listed_to_its_end_by_the_next_daemon(
    own: Mount, export: Path
) -> None:
    here = Place.of(own, export).here
    names = {f"{number:05}-{'x' * 40}" for number in range(4000)}
    for name in names:
        (export / name).touch()
    told: list[str] = []
    with os.scandir(here) as listing:
        for entry in listing:
            told.append(entry.name)
            os.unlink(here / entry.name)
            if len(told) % 900 == 0:
                kill_daemon(own)
    assert set(told) == names and len(told) == len(names)
    assert os.listdir(here) == [] and list(export.iterdir()) == []


def test_a_removed_file_stays_readable_and_its_hidden_name_goes_at_last_close(own: Mount, export: Path) -> None:
    here = Place.of(own, export).here
    (here / "file").write_bytes(b"still here")
    (here / "target").write_bytes(b"replaced")
    fds = [os.open(here / "file", os.O_RDONLY), os.open(here / "target", os.O_RDONLY)]
    os.unlink(here / "file")
    (here / "draft").write_bytes(b"new")
    os.rename(here / "draft", here / "target")
    kill_daemon(own)
    os.posix_fadvise(fds[0], 0, 0, os.POSIX_FADV_DONTNEED)
    assert [os.pread(fd, 100, 0) for fd in fds] == [b"still here", b"replaced"]
    assert [os.fstat(fd).st_nlink for fd in fds] == [0, 0]
    for fd in fds:
        os.close(fd)
    wait_until(lambda: [path.name for path in export.iterdir()] == ["target"])
    assert (export / "target").read_bytes() == b"new"


def test_a_hidden_name_goes_though_the_daemon_died_while_it_was_closed(
    server: Ganesha, own: Mount, export: Path
) -> None:
    here = Place.of(own, export).here
    (here / "file").write_bytes(b"x")
    fd = os.open(here / "file", os.O_RDONLY)
    os.unlink(here / "file")
    server.pause()
    try:
        os.close(fd)  # the kernel forgets the file, while the server cannot be told
        kill_daemon(own)
    finally:
        server.resume()
    wait_until(lambda: list(export.iterdir()) == [])
    assert own.status()["open_handles"] == 0


def test_an_open_file_outlives_its_last_name_though_a_dead_daemon_removed_the_hidden_one(
    own: Mount, export: Path
) -> None:
    here = Place.of(own, export).here
    (here / "file").write_bytes(b"still here")
    os.link(here / "file", here / "second")
    (here / "draft").write_bytes(b"new")
    os.rename(here / "draft", here / "file")  # a file that was open a moment ago is kept for a second
    os.rename(here / "second", here / "other")
    (hidden,) = export.glob(".nfs*")
    program = "import os, sys\n" \
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n" \
        "os.unlink(sys.argv[1])\n" \
        "print(os.fstat(fd).st_size, os.pread(fd, 100, 0), flush=True); sys.stdin.readline()\n"  # fmt: skip
    daemon = int(str(own.status()["daemon_pid"]))
    os.kill(daemon, signal.SIGSTOP)
    with Waiting(program, here / "other") as process:
        stack = Path(f"/proc/{process.process.pid}/stack")
        wait_until(lambda: "fuse_" in stack.read_text())
        hidden.unlink()  # as its REMOVE does that was on its way
        os.kill(daemon, signal.SIGKILL)
        assert process.told() == "10 b'still here'"
        (again,) = export.glob(".nfs*")
        assert again != hidden
        process.end()
    wait_until(lambda: [path.name for path in export.iterdir()] == ["file"])


def test_bytes_that_were_acknowledged_arrive_without_a_call_more(own: Mount, export: Path) -> None:
    here = Place.of(own, export).here
    # Not the test's own handles: nothing flushes or closes them.
    program = "import os, sys\n" \
        "fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n" \
        "for i in range(300): os.pwrite(fd, bytes([i % 251]) * 5000, i * 4000)\n" \
        "print('written', flush=True); sys.stdin.readline()\n"  # fmt: skip
    with Waiting(program, here / "file") as process:
        assert process.told() == "written"
        kill_daemon(own)
        expected = bytearray()
        for i in range(300):
            expected[i * 4000 :] = bytes([i % 251]) * 5000
        wait_until(lambda: (export / "file").read_bytes() == expected)
        process.end()


def test_what_was_fsynced_is_on_the_server_when_daemon_keeper_and_mount_are_gone(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    mount = Mount(server, tmp_path / "mnt")
    mount.daemon_may_die = True
    with mount:
        status, data = mount.status(), os.urandom(3 * MIB + 17)
        fd = os.open(mount.path / export.name / "file", os.O_WRONLY | os.O_CREAT)
        os.write(fd, data)
        os.fsync(fd)
        os.kill(int(str(status["keeper_pid"])), signal.SIGKILL)
        os.kill(int(str(status["daemon_pid"])), signal.SIGKILL)
        subprocess.run(["umount", "-l", mount.path], check=True)
        server.kill()
        assert (export / "file").read_bytes() == data
        with pytest.raises(OSError):
            os.close(fd)
        server.start()


FAILING_WRITER = """
import os, sys
def errno_of(call):
    try:
        call(fd)
    except OSError as error:
        return error.errno
    return 0
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, os.urandom(8 << 20))
print("written", *(errno_of(os.fsync) for _ in range(int(sys.argv[2]))), flush=True)
sys.stdin.readline()
print(*map(errno_of, (os.fsync, os.fsync, os.close)))
"""


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Mount]:
    """A mount whose server has room for 4 MiB."""
    small = tmp_path / "exported"
    small_tmpfs(small, 4 * MIB)
    try:
        with Ganesha(tmp_path) as server:
            mount = Mount(server, tmp_path / "mnt")
            mount.daemon_may_die = True
            with mount:
                yield mount
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_failed_write_is_reported_once_by_the_next_daemon(full: Mount) -> None:
    with Waiting(FAILING_WRITER, full.path / "file", 0) as process:
        assert process.told() == "written"
        wait_until(lambda: full.status()["dirty_bytes"] == 0)
        kill_daemon(full)
        assert process.end().split() == [str(errno.ENOSPC), "0", "0"]


def test_an_error_that_a_dead_daemon_may_have_told_or_not_is_told_again(full: Mount) -> None:
    with Waiting(FAILING_WRITER, full.path / "file", 1) as process:
        assert process.told() == f"written {errno.ENOSPC}"
        kill_daemon(full)
        assert process.end().split() == [str(errno.ENOSPC), "0", "0"]


def test_an_error_that_was_told_and_passed_is_not_told_by_the_next_daemon(full: Mount) -> None:
    with Waiting(FAILING_WRITER, full.path / "file", 2) as process:
        assert process.told() == f"written {errno.ENOSPC} 0"
        kill_daemon(full)
        assert process.end().split() == ["0", "0", "0"]


def names_changed_by(here: Path) -> list[Callable[[], object]]:
    """Calls that must not be done twice, nor fail because they were."""
    return [
        lambda: os.mkdir(here / "made"), lambda: os.rmdir(here / "gone.d"), lambda: os.unlink(here / "gone"),
        lambda: os.rename(here / "from", here / "to"), lambda: os.symlink("target", here / "symlink"),
        lambda: os.link(here / "linked", here / "link"), lambda: os.mkfifo(here / "fifo"),
        lambda: os.close(os.open(here / "created", os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
        lambda: os.truncate(here / "cut", 3), lambda: os.chmod(here / "linked", 0o600),
    ]  # fmt: skip


def test_calls_whose_answer_died_with_the_daemon_succeed(server: Ganesha, export: Path, tmp_path: Path) -> None:
    """The server executes them, its answers are held back, the daemon dies, the kernel asks the next one again."""
    (export / "gone.d").mkdir()
    for name in ("gone", "from", "linked", "cut"):
        (export / name).write_bytes(b"12345")
    with Proxy(server.port) as proxy:
        mount = Mount(server, tmp_path / "mnt", "nconnect=1", port=proxy.port)
        mount.daemon_may_die = True
        with mount:
            here = mount.path / export.name
            for path in export.iterdir():
                os.stat(here / path.name)
            errors: list[OSError] = []

            def run(call: Callable[[], object]) -> None:
                try:
                    call()
                except OSError as error:
                    errors.append(error)

            threads = [threading.Thread(target=run, args=(call,)) for call in names_changed_by(here)]
            proxy.hold_answers()
            for thread in threads:
                thread.start()
            wait_until(lambda: (export / "made").is_dir() or (export / "to").exists() or not (export / "gone").exists())
            pid = int(str(mount.status()["daemon_pid"]))
            os.kill(pid, signal.SIGKILL)
            proxy.cut()
            proxy.thaw()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive()
            assert errors == []
            there = {path.name for path in export.iterdir()}
            assert there == {"made", "to", "symlink", "linked", "link", "fifo", "created", "cut"}
            assert (export / "to").read_bytes() == b"12345" and (export / "cut").read_bytes() == b"123"
            assert os.stat(export / "link").st_nlink == 2
            wait_until(lambda: mount.status().get("failovers") == 1)
            assert mount.status()["open_handles"] == 0


def test_a_daemon_that_dies_while_the_server_is_away_serves_what_is_cached(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    (export / "file").write_bytes(b"cached")
    mount = Mount(server, tmp_path / "mnt")
    mount.daemon_may_die = True
    with mount:
        here = mount.path / export.name / "file"
        assert here.read_bytes() == b"cached"
        server.pause()
        try:
            kill_daemon(mount)
            assert here.read_bytes() == b"cached"
        finally:
            server.resume()


def read_anew(fd: int, length_bytes: int) -> bytes:
    """Past the kernel's pages."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, length_bytes, 0)


@pytest.mark.parametrize("away", [False, True], ids=["server up", "server away"])
def test_what_was_written_is_read_by_the_next_daemon_though_older_bytes_are_cached(
    server: Ganesha, own: Mount, export: Path, away: bool
) -> None:
    (export / "file").write_bytes(b"old!" * 65_536)
    fd = os.open(Place.of(own, export).here / "file", os.O_RDWR)
    assert read_anew(fd, 262_144) == b"old!" * 65_536
    os.pwrite(fd, b"new!" * 65_536, 0)
    os.fsync(fd)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(read_anew(fd, 262_144)))
    if away:
        server.pause()
    try:
        kill_daemon(own)
        reader.start()
        wait_until(lambda: not reader.is_alive() or own.status()["server"] == {"state": "away"})
    finally:
        server.resume()
    reader.join(30)
    assert read == [b"new!" * 65_536]
    os.close(fd)


def test_times_that_were_set_after_a_write_stay_when_the_daemon_dies(own: Mount, export: Path) -> None:
    path, day_ns = Place.of(own, export).here / "file", 86_400 * 10**9
    pid = int(str(own.status()["daemon_pid"]))
    with open(path, "wb", buffering=0) as file:
        for offset in range(0, 40_000_000, 10_000_000):
            os.pwrite(file.fileno(), b"x" * 100_000, offset)
        os.utime(path, ns=(day_ns, day_ns))
        os.kill(pid, signal.SIGKILL)
        os.fsync(file.fileno())
        assert (export / "file").stat().st_mtime_ns == path.stat().st_mtime_ns == day_ns


def test_an_open_file_is_read_by_the_next_daemon_as_it_was_when_it_was_opened(own: Mount, export: Path) -> None:
    here = Place.of(own, export).here
    (export / "file").write_bytes(b"old!" * 65_536)
    with open(here / "file", "rb") as before:
        assert before.read() == b"old!" * 65_536
    (export / "file").write_bytes(b"new!" * 65_536)
    fd = os.open(here / "file", os.O_RDONLY)
    kill_daemon(own)
    assert read_anew(fd, 262_144) == b"new!" * 65_536
    os.close(fd)


def test_other_clients_appends_are_not_overwritten_after_a_failover(own: Mount, export: Path) -> None:
    here = Place.of(own, export).here
    (here / "log").write_bytes(b"mine\n")
    kill_daemon(own)
    with open(export / "log", "ab") as theirs:
        theirs.write(b"theirs\n")
    with open(here / "log", "ab") as again:
        again.write(b"mine too\n")
    assert (export / "log").read_bytes() == b"mine\ntheirs\nmine too\n"


def test_the_mount_stays_though_its_daemon_dies_in_start_up(own: Mount, export: Path) -> None:
    here = Place.of(own, export).here
    (here / "file").write_bytes(b"x")
    keeper = int(str(own.status()["keeper_pid"]))
    for _ in range(5):
        pids = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        wait_until(lambda pids=pids: set(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split())
                   .isdisjoint(pids) and Path(f"/proc/{keeper}/task/{keeper}/children").read_text() != "")  # type: ignore[misc]  # fmt: skip
    assert (here / "file").read_bytes() == b"x"
    assert is_mounted(own.path)
