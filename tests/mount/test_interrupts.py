"""Who waits for a server that does not answer can be killed, and what was under way for him leaves nothing behind."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from efcfs import control
from tests.bed import Ganesha, Mount, state
from tests.place import Place, wait_until
from tests.waiting import Waiting

LONG_S = 40.0
DIRTY_MIB = 16

# Waits in a request, tells of it before, and handles SIGUSR1.
STAT = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: None)
print("waits", flush=True)
try:
    os.stat(sys.argv[1])
except FileNotFoundError:
    print("not there", flush=True)
"""
WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | int(sys.argv[2]))
print("open", flush=True)
input()
for _ in range(int(sys.argv[3])):
    os.write(fd, b"x" * 1048576)
print("written", flush=True)
input()
"""


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ganesha, Mount]]:
    """A server of its own, to be stopped."""
    root = tmp_path_factory.mktemp("stopped")
    with Ganesha(root) as server, Mount(server, root / "mnt", f"dirty={DIRTY_MIB}m") as mount:
        yield server, mount


@pytest.fixture
def place(away: tuple[Ganesha, Mount], request: pytest.FixtureRequest) -> Iterator[Place]:
    server, mount = away
    there = server.directory / f"{random.getrandbits(48):x}"
    there.mkdir()
    os.stat(mount.path / there.name)  # or who looks up its name waits first, and others for him
    yield Place.of(mount, there)
    server.resume()
    # Nothing that was killed has anything open.
    wait_until(lambda: mount.status()["open_handles"] == 0, LONG_S)
    shutil.rmtree(there, ignore_errors=True)


@contextlib.contextmanager
def stopped(server: Ganesha) -> Iterator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


def waits_in_a_request(pid: int) -> bool:
    return Path(f"/proc/{pid}/wchan").read_text() == "request_wait_answer"


def waits_in_the_kernel(pid: int) -> bool:
    """In a request, or for a lock or a page of one who is in one."""
    with contextlib.suppress(OSError):
        return state(Path(f"/proc/{pid}")) == "D" or waits_in_a_request(pid)
    return False


def started(line: str, directory: Path) -> subprocess.Popen[bytes]:
    """A program that waits for the server, or for one who does, when this returns."""
    program = subprocess.Popen(line.split(), cwd=directory, stdout=subprocess.DEVNULL)
    wait_until(lambda: waits_in_the_kernel(program.pid), LONG_S)
    return program


def test_sigkill_ends_who_waits(away: tuple[Ganesha, Mount], place: Place) -> None:
    server, _ = away
    here, there = place.here, place.there
    for name in ("d", "unlisted", "gone"):
        (there / name).mkdir()
    for name in ("d/a", "d/large", "unlisted/x", "d/old", "removed", "mode"):
        (there / name).write_bytes(b"x" * 300_000)
    for name in ("", "d", "gone"):
        os.listdir(here / name)  # so no LOOKUP waits, but the change itself
    os.stat(here / "unlisted")
    lines = (
        "stat unlisted/nothere", "mkdir d/n", "mv d/a d/b", "ln -s target d/link", "ls -l unlisted", "cat d/large",
        "df .", "ln d/old gone/hard", "mkfifo gone/fifo", "touch new", "rm -f removed", "chmod 600 mode",
        "truncate -s 5 mode",
    )  # fmt: skip
    with stopped(server):
        programs = [started(line, here) for line in lines]
        programs[0].send_signal(signal.SIGINT)  # which stat(1) does not handle
        programs[0].wait(LONG_S)
        for program in programs:
            program.kill()
        for program in programs:
            program.wait(LONG_S)
    # The server did what it had been asked for, and this client knows it.
    wait_until((there / "d/n").is_dir, LONG_S)
    wait_until((here / "d/n").is_dir, LONG_S)
    assert os.stat(here / "d/n").st_ino == os.stat(there / "d/n").st_ino
    os.mkdir(here / "d/after")
    assert sorted(os.listdir(here / "d")) == sorted(os.listdir(there / "d"))


def test_a_signal_that_the_program_handles_ends_no_wait(away: tuple[Ganesha, Mount], place: Place) -> None:
    server, mount = away
    with contextlib.ExitStack() as stack:
        with stopped(server):
            goes_on, killed = (stack.enter_context(Waiting(STAT, place.here / name)) for name in ("one", "two"))
            for program in (goes_on, killed):
                assert program.told() == "waits"
                pid = program.process.pid
                wait_until(lambda pid=pid: waits_in_a_request(pid), LONG_S)  # type: ignore[misc]
                program.process.send_signal(signal.SIGUSR1)
                # The kernel has told the daemon, and waits for SIGKILL only from here on.
                wait_until(lambda pid=pid: state(Path(f"/proc/{pid}")) == "D", LONG_S)  # type: ignore[misc]
            os.stat(mount.path)  # so the daemon has read that
            killed.process.kill()
            killed.process.wait(LONG_S)
        assert goes_on.told() == "not there"


@pytest.mark.parametrize(("flags", "mib"), [(0, 1), (os.O_SYNC, 1), (0, 64)], ids=["flush", "sync", "no-room"])
def test_a_writer_that_is_killed_ends_and_what_it_wrote_is_sent(
    away: tuple[Ganesha, Mount], place: Place, flags: int, mib: int
) -> None:
    server, _ = away
    with Waiting(WRITER, place.here / "file", flags, mib) as writer:
        assert writer.told() == "open"
        with stopped(server):
            writer.go_on()
            if flags or mib > 1:
                wait_until(lambda: waits_in_a_request(writer.process.pid), LONG_S)
            else:
                assert writer.told() == "written"
            writer.process.kill()
            writer.process.wait(LONG_S)
    if mib == 1:
        wait_until(lambda: (place.there / "file").read_bytes() == b"x" * 1048576, LONG_S)
    else:  # whole write(2)s, as many as there was room for
        wait_until(lambda: place.mount.status()["dirty_bytes"] == 0, LONG_S)
        size = os.stat(place.there / "file").st_size
        assert 1048576 <= size < 64 * 1048576 and (place.there / "file").read_bytes() == b"x" * size
    with open(place.here / "file", "ab") as file:  # nobody waits for what the killed one left
        file.write(b"y")


def test_what_an_answer_gave_that_nobody_wanted_is_taken_back(away: tuple[Ganesha, Mount], place: Place) -> None:
    """Its names are as unknown afterwards as before: the index has no identity that no FORGET will ever end."""
    server, mount = away
    for name in ("d", "unlisted"):
        (place.there / name).mkdir()
    (place.there / "unlisted/looked-up").touch()
    for name in ("", "d"):
        os.listdir(place.here / name)
    os.stat(place.here / "unlisted")
    with stopped(server):
        programs = [started(line, place.here) for line in ("stat unlisted/looked-up", "mkdir d/made", "touch created")]
        for program in programs:
            program.kill()
        for program in programs:
            program.wait(LONG_S)
    wait_until(lambda: (place.there / "d/made").is_dir() and (place.there / "created").exists(), LONG_S)
    wait_until(lambda: not {b"looked-up", b"made", b"created"} & known_names(mount), LONG_S)


def known_names(mount: Mount) -> set[bytes]:
    """Those that the index has, by a reader of its own."""
    code = """
import sys, lmdb
env = lmdb.open(sys.argv[1], readonly=True, max_dbs=8)
with env.begin() as txn, txn.cursor(env.open_db(b"name", txn, create=False)) as names:
    sys.stdout.buffer.write(b"/".join(key[8:] for key in names.iternext(values=False)))
"""
    state_dir = control.state_dir(str(mount.path), os.geteuid())
    path = state_dir.with_name(f"{state_dir.name}.{mount.status()['keeper_pid']}") / "inodes.lmdb"
    done = subprocess.run([sys.executable, "-c", code, path], stdout=subprocess.PIPE, check=True)
    return set(done.stdout.split(b"/"))
