"""Bytes that cannot be written: bounded, waited for, and kept when the mount ends without the server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount, Proxy, efcfs, is_mounted
from tests.place import wait_until
from tests.waiting import Waiting

MIB = 1024 * 1024

WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print("opened", flush=True)
sys.stdin.readline()
for i in range(40):
    os.write(fd, bytes([i]) * (1 << 20))
"""


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[None]:
    """Removes what the test leaves unwritten."""
    before = set(unwritten())
    yield
    for name in set(unwritten()) - before:
        efcfs("recover", "--discard", name)


def unwritten() -> list[str]:
    told = efcfs("recover")
    assert told.returncode == 0, told.stderr
    return [line.split()[0] for line in told.stdout.splitlines() if line != "nothing is unwritten"]


def test_more_than_the_option_allows_waits_for_the_server(server: Ganesha, export: Path, tmp_path: Path) -> None:
    with Mount(server, tmp_path / "mnt", "dirty=16m") as mount:
        with Waiting(WRITER, mount.path / export.name / "file") as writer:
            assert writer.told() == "opened"
            server.pause()
            try:
                writer.go_on()
                wait_until(lambda: mount.status()["dirty_bytes"] == 17 * MIB)  # the last one waits for its answer
                assert writer.process.poll() is None
            finally:
                server.resume()
            writer.end()
        assert (export / "file").read_bytes() == b"".join(bytes([i]) * MIB for i in range(40))


SCATTERING = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
print("opened", flush=True)
sys.stdin.readline()
for i in range(5000):
    os.pwrite(fd, bytes([i % 251]) * 4096, i * 8192)
"""


def test_thousands_of_scattered_writes_wait_for_the_server_and_do_not_hold_up_a_failover(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    mount = Mount(server, tmp_path / "mnt")
    mount.daemon_may_die = True
    with mount:
        with Waiting(SCATTERING, mount.path / export.name / "file") as writer:
            assert writer.told() == "opened"
            server.pause()
            try:
                writer.go_on()
                wait_until(lambda: mount.status()["dirty_bytes"] == 4096 * 4096, 30)
                pid = int(str(mount.status()["daemon_pid"]))
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda: mount.status().get("daemon_pid", pid) != pid)
            finally:
                server.resume()
            writer.end()
        assert mount.status()["failovers"] == 1
        data = (export / "file").read_bytes()
        assert all(data[i * 8192 : i * 8192 + 4096] == bytes([i % 251]) * 4096 for i in range(5000))


def test_many_small_writes_become_few_large_ones(server: Ganesha, export: Path, tmp_path: Path) -> None:
    with Proxy(server.port) as proxy, Mount(server, tmp_path / "mnt", port=proxy.port) as mount:
        fd = os.open(mount.path / export.name / "file", os.O_WRONLY | os.O_CREAT)
        before = proxy.bytes_to_client
        for i in range(64 * 256):
            os.write(fd, i.to_bytes(4, "big") * 1024)
        os.close(fd)
        # A WRITE's answer has 164 bytes: 64 of a MiB, and what is in flight when the bytes come slowly.
        assert proxy.bytes_to_client - before < 500 * 164
        assert (export / "file").read_bytes() == b"".join(i.to_bytes(4, "big") * 1024 for i in range(64 * 256))


PATIENT_WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
print("opened", flush=True)
sys.stdin.readline()
for i in range(5):
    os.pwrite(fd, bytes([i + 1]) * 300_000, i * 200_000)
print("written", flush=True)
sys.stdin.readline()
"""
WRITTEN = b"".join(bytes([i + 1]) * 200_000 for i in range(5)) + bytes([5]) * 100_000


def left_unwritten(server: Ganesha, mount: Mount, export: Path, names: tuple[str, ...]) -> str:
    """Files are written while the server is away, and the mount is ended by force. Returns the name of what is kept."""
    here = mount.path / export.name
    (here / "directory").mkdir()
    before = set(unwritten())
    writers = [Waiting(PATIENT_WRITER, here / name) for name in names]
    try:
        for writer in writers:
            assert writer.told() == "opened"
        server.pause()
        for writer in writers:
            assert writer.ask() == "written"
        started = time.monotonic()
        done = efcfs("umount", "-f", str(mount.path))
        assert time.monotonic() - started < 5
        assert not is_mounted(mount.path)
    finally:
        server.resume()
        for writer in writers:
            writer.end()
    (name,) = set(unwritten()) - before
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and f"efcfs recover {name}" in done.stderr
    return name


def test_what_umount_by_force_cannot_write_is_kept_and_recovered(
    server: Ganesha, export: Path, tmp_path: Path, kept: None
) -> None:
    with Mount(server, tmp_path / "mnt") as mount:
        name = left_unwritten(server, mount, export, ("one", "directory/two"))
    done = efcfs("recover", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(line.split()[1] for line in done.stdout.splitlines()) == [
        f"/{export.name}/directory/two,", f"/{export.name}/one,"
    ]  # fmt: skip
    assert (export / "one").read_bytes() == (export / "directory/two").read_bytes() == WRITTEN
    assert name not in unwritten()


def test_what_the_server_refuses_stays_and_can_be_saved_elsewhere(
    server: Ganesha, export: Path, tmp_path: Path, kept: None
) -> None:
    with Mount(server, tmp_path / "mnt") as mount:
        name = left_unwritten(server, mount, export, ("gone", "there"))
    (export / "gone").unlink()
    server.restart()  # or it would still have the file open
    done = efcfs("recover", name)
    assert done.returncode == 2 and f"/{export.name}/there" in done.stdout
    refused, hint = done.stderr.splitlines()
    assert refused == f"/{export.name}/gone: Stale file handle" and "1 of 2 files" in hint and "--into" in hint
    assert (export / "there").read_bytes() == WRITTEN
    done = efcfs("recover", name, "--into", str(tmp_path / "saved"))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "saved" / export.name / "gone").read_bytes() == WRITTEN
    assert name not in unwritten()


def test_recover_of_a_name_that_is_not_there_is_one_line() -> None:
    done = efcfs("recover", "nothing-of-that-name")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "efcfs: there is no nothing-of-that-name: `efcfs recover` lists what there is\n"


def test_without_memory_for_the_log_the_server_has_each_write_before_it_returns(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    efcfs_ = f"{sys.executable} -m efcfs.cli.main"
    options = f"port={server.port},mountport={server.mount_port},mem=0"
    file = f"{tmp_path}/mnt/{export.name}/file"
    # In a mount namespace of its own: nobody else's /dev/shm gets full. The file is compared while it is open.
    script = f"""
        set -e
        mount -t tmpfs -o size=12m small /dev/shm
        {efcfs_} mount -o {options} 127.0.0.1:{server.export} {tmp_path}/mnt
        exec 3> {file}
        dd if=/dev/zero of=/dev/shm/rest bs=4k 2>/dev/null || true
        head -c 3000000 {sys.executable} >&3
        cmp -n 3000000 {sys.executable} {export}/file
        {efcfs_} status --json {tmp_path}/mnt | grep dirty_bytes
        exec 3>&-
        {efcfs_} umount {tmp_path}/mnt
    """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.split() == ['"dirty_bytes":', "0,"]


MANY_HANDLES = """
import os, subprocess, sys
files = [open(sys.argv[1], "wb", buffering=0)]
files[0].write(b"so that there is a log")
os.fsync(files[0])
with open("/dev/shm/rest", "wb", buffering=0) as rest:
    try:
        while True:
            rest.write(bytes(4096))
    except OSError:
        pass
for _ in range(600):
    files.append(open(sys.argv[1], "r+b", buffering=0))
files[-1].write(b"with no room for its handle")
print(open(sys.argv[2], "rb").read().decode())
"""


def test_what_is_written_through_a_handle_that_the_next_daemon_cannot_know_is_on_the_server(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    efcfs_ = f"{sys.executable} -m efcfs.cli.main"
    options = f"port={server.port},mountport={server.mount_port},mem=0"
    (tmp_path / "program").write_text(MANY_HANDLES)
    script = f"""
        set -e
        mount -t tmpfs -o size=64m small /dev/shm
        {efcfs_} mount -o {options} 127.0.0.1:{server.export} {tmp_path}/mnt
        {sys.executable} {tmp_path}/program {tmp_path}/mnt/{export.name}/file {export}/file
        {efcfs_} umount {tmp_path}/mnt
    """
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "with no room for its handle\n"), done
