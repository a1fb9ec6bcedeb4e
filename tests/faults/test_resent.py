"""A request that daemons die over is given up, and the mount lives; an answer that the kernel refuses is EIO."""

import errno
import os
import signal
import socket
import struct
from pathlib import Path

import pytest

from efcfs import control
from efcfs.fuse.resent import BLAMED_S, Resent
from efcfs.fuse.wire import Wire
from tests.bed import Ganesha, Mount
from tests.place import Place, wait_until
from tests.waiting import Waiting

SEGV, KILL = "signal SIGSEGV", "signal SIGKILL"
LOOKUP = 1


def ask_again(path: Path, failovers: int, last_exit: str, *uniques: int) -> list[bool]:
    """A daemon begins, and is asked these again."""
    resent = Resent(path, failovers, last_exit)
    answers = [resent.is_last(unique, LOOKUP) for unique in uniques]
    resent.close()
    return answers


def test_the_third_death_over_a_request_is_its_last(tmp_path: Path) -> None:
    state = tmp_path / "resent"
    assert ask_again(state, 0, "") == []
    assert ask_again(state, 1, SEGV, 7, 8) == [False, False]
    assert ask_again(state, 2, "internal error (x)", 7) == [False]
    assert ask_again(state, 3, "hung for 10 s", 7, 8) == [True, False]


@pytest.mark.parametrize("why", [KILL, "its keeper was killed", "killed, and its end is not in sight"])
def test_kills_from_outside_are_not_counted(why: str, tmp_path: Path) -> None:
    state = tmp_path / "resent"
    assert ask_again(state, 0, "") == []
    for failovers in range(1, 20):
        assert ask_again(state, failovers, why, 7) == [False]
    assert ask_again(state, 20, SEGV, 7) == [False]


def test_upgrades_are_not_counted(tmp_path: Path) -> None:
    state = tmp_path / "resent"
    assert ask_again(state, 1, SEGV, 7) == [False]
    for _ in range(10):
        assert ask_again(state, 1, SEGV, 7) == [False]  # as the keeper still tells of the one before
    resent = Resent(state, 2, SEGV)
    resent.nobody_died()
    assert [resent.is_last(7, LOOKUP) for _ in range(10)] == [False] * 10  # an upgrade failed


def test_a_death_long_after_the_request_was_begun_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, now = tmp_path / "resent", 1000.0
    monkeypatch.setattr("efcfs.fuse.resent.time.monotonic", lambda: now)
    for failovers in range(1, 10):
        assert ask_again(state, failovers, SEGV, 7) == [False]
        now += BLAMED_S + 1
    now -= BLAMED_S
    assert ask_again(state, 10, SEGV, 7) == [False]
    assert ask_again(state, 11, SEGV, 7) == [True]


def test_a_file_that_is_too_long_or_cut_is_begun_anew(tmp_path: Path) -> None:
    state = tmp_path / "resent"
    for failovers in range(1, 40):
        assert not any(ask_again(state, failovers, KILL, *range(1, 1000)))
    assert state.stat().st_size < 512 * 1024
    with open(state, "ab") as file:
        file.write(b"half a record")
    assert ask_again(state, 41, SEGV, 1) == [False]
    assert ask_again(state, 42, SEGV, 1) == [False]
    assert ask_again(state, 43, SEGV, 1) == [True]


def begun(mount: Mount) -> int:
    """How many requests have been begun again in the mount's life."""
    name = control.state_dir(str(mount.path), os.geteuid())
    (state,) = name.parent.glob(f"{name.name}*/resent")
    return sum(unique > 0 for unique, _, _ in struct.iter_unpack("<QQd", state.read_bytes()))


STAT = """import os, sys
print("asking", flush=True)
try:
    os.stat(sys.argv[1])
except OSError as error:
    print(error.errno, flush=True)"""


def test_a_request_that_three_daemons_died_over_is_eio_and_the_mount_lives(
    server: Ganesha, export: Path, tmp_path: Path
) -> None:
    mount = Mount(server, tmp_path / "mnt-poison")
    mount.daemon_may_die = True
    with mount:
        here = Place.of(mount, export).here
        os.stat(here)
        server.pause()
        try:
            with Waiting(STAT, here / "poison") as program:
                assert program.told() == "asking"
                wait_until(lambda: waits_for_fuse(program.process.pid), 30)
                for number in (signal.SIGKILL, *[signal.SIGSEGV] * 3):
                    before, pid = begun(mount), int(str(mount.status()["daemon_pid"]))
                    os.kill(pid, number)
                    wait_until(lambda before=before: begun(mount) > before, 30)  # type: ignore[misc]
                assert program.told(60) == str(errno.EIO)
        finally:
            server.resume()
        (export / "fine").touch()
        assert os.stat(here / "fine").st_size == 0
        assert mount.status()["failovers"] == 4


def waits_for_fuse(pid: int) -> bool:
    return "request_wait_answer" in Path(f"/proc/{pid}/stack").read_text()


def test_an_answer_that_the_kernel_refuses_is_eio() -> None:
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernel:
        wire = Wire.__new__(Wire)
        wire._fuse_fd = ours.fileno()
        wire._tell((struct.pack("<IiQ", 16 + 2**24, 0, 77), bytes(2**24)))  # EMSGSIZE
        assert struct.unpack("<IiQ", kernel.recv(100)) == (16, -errno.EIO, 77)
