"""The keeper: what becomes of a mount when its daemon dies, hangs, is replaced, or cannot be."""

import contextlib
import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from efcfs.cli.mount import KEEPER
from efcfs.keeper import directories, kernel
from tests.bed import Ganesha, Mount, efcfs
from tests.faults.fake_daemon import HELD_OFFSET
from tests.faults.keepers import Kept, fake
from tests.place import nice_values, wait_until

ROOT = Path(__file__).parents[2]

# -- with the real daemon ----------------------------------------------------------------------------


def test_a_hung_daemon_is_replaced_and_status_says_so(server: Ganesha, tmp_path: Path) -> None:
    with Mount(server, tmp_path / "mnt", "noac") as mount:
        mount.daemon_may_die = True
        before = mount.status()
        assert (before["failovers"], before["upgrades"], before["last_exit"]) == (0, 0, "")
        os.kill(int(str(before["daemon_pid"])), signal.SIGSTOP)
        began = time.monotonic()
        os.stat(mount.path)
        assert 8 < time.monotonic() - began < 20
        after = mount.status()
        assert after["daemon_pid"] != before["daemon_pid"]
        assert (after["failovers"], after["last_exit"]) == (1, "hung for 10 s")
        os.kill(int(str(after["daemon_pid"])), signal.SIGKILL)
        os.stat(mount.path)
        again = mount.status()
        assert (again["failovers"], again["last_exit"]) == (2, "signal SIGKILL")


def test_a_daemon_that_waits_for_its_server_is_not_taken_for_hung(own_server: Ganesha, tmp_path: Path) -> None:
    with Mount(own_server, tmp_path / "mnt", "noac") as mount:
        mount.daemon_may_die = True
        serving = mount.status()["daemon_pid"]
        own_server.kill()
        try:
            wait_through_ticks(14)
            assert mount.status()["daemon_pid"] == serving
            os.kill(int(str(serving)), signal.SIGKILL)
            wait_through_ticks(14)
        finally:
            own_server.start()
        os.stat(mount.path)
        assert mount.status()["failovers"] == 1


def test_a_machine_that_was_paused_has_no_hung_daemon(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept:
        daemon = kept.daemon_pid
        for pid in daemon, kept.keeper_pid:
            os.kill(pid, signal.SIGSTOP)
        wait_through_ticks(12)
        os.kill(kept.keeper_pid, signal.SIGCONT)
        wait_through_ticks(2)  # it looks first
        os.kill(daemon, signal.SIGCONT)
        assert kept.file.read_bytes() == b"first"
        assert kept.daemon_pid == daemon and kept.requests()[-1]["failovers"] == 0


def wait_through_ticks(ticks: int) -> None:
    """More seconds than a hung daemon is given: what must not happen has had its time."""
    time.sleep(ticks)


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ganesha]:
    with Ganesha(tmp_path_factory.mktemp("own-server")) as server:
        yield server


# -- deaths ------------------------------------------------------------------------------------------


def test_an_open_file_outlives_its_daemon(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept, open(kept.file, "rb", buffering=0) as file:
        assert file.read() == b"first"
        for number in range(1, 4):
            os.kill(kept.daemon_pid, signal.SIGKILL)
            assert os.pread(file.fileno(), 5, 0) == b"first"
            last = kept.requests()[-1]
            assert (last["failovers"], last["last_exit"], last["patient"]) == (number, "signal SIGKILL", True)
            assert last["init"] is not None


def test_a_request_that_the_dead_daemon_had_taken_is_asked_again(tmp_path: Path) -> None:
    with Kept(tmp_path, fake("hold", "once")) as kept, open(kept.file, "rb", buffering=0) as file:
        answers: list[bytes] = []
        reader = threading.Thread(target=lambda: answers.append(os.pread(file.fileno(), 5, HELD_OFFSET)))
        reader.start()
        wait_until(lambda: bool(list(kept.notes("held"))))
        os.kill(kept.daemon_pid, signal.SIGKILL)
        reader.join(10)
        assert answers == [b""]


def test_a_killed_daemon_that_sleeps_in_its_own_mount_does_not_hold_up_the_next(tmp_path: Path) -> None:
    with Kept(tmp_path, fake("hold", "deadlock", "once")) as kept:
        wait_until(lambda: bool(list(kept.notes("held"))))
        killed = kept.daemon_pid
        began = time.monotonic()
        os.kill(killed, signal.SIGKILL)
        assert kept.file.read_bytes() == b"first"
        assert time.monotonic() - began < 1
        assert kept.requests()[-1]["last_exit"] == "signal SIGKILL"
        wait_until(lambda: not Path(f"/proc/{killed}").exists())


def dying_when(condition: Path) -> list[str]:
    """A daemon that dies at once when this file is there."""
    return ["sh", "-c", f'test -e "{condition}" && exit 5; exec "$@"', "sh", *fake()]


def test_daemons_that_die_at_once_end_in_a_clear_error_and_no_loop(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with Kept(tmp_path, dying_when(broken)) as kept:
        file = os.open(kept.file, os.O_RDONLY)
        broken.touch()
        os.kill(kept.daemon_pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(OSError) as failure:  # it waits, until the keeper gives up
            os.pread(file, 5, 0)
        assert failure.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        with contextlib.suppress(OSError):  # there is no mount any more
            os.close(file)
        assert 3 < time.monotonic() - began < 15  # with back-off: 0.1 + 0.2 + … + 1.6 s
        assert kept.process is not None and kept.process.wait(10) == 2
        (line,) = [line for line in kept.log.read_text().splitlines() if "CRITICAL" in line]
        assert str(kept.path) in line and "exit code 5" in line and str(kept.log) in line
        kept.assert_nothing_is_left()


def test_a_daemon_that_lived_for_a_second_clears_the_count_of_young_deaths(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    with Kept(tmp_path, dying_when(broken)) as kept:
        for _ in range(3):
            deaths = kept.log.read_text().count("exit code 5")
            broken.touch()
            for pid in kept.children():
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda d=deaths: kept.log.read_text().count("exit code 5") >= d + 4)  # type: ignore[misc]
            broken.unlink()
            assert kept.file.read_bytes() == b"first"
            wait_until(lambda: len(kept.children()) == 2)  # it has served for longer than a young one
        kept.umount()
        kept.assert_nothing_is_left()


# -- the spare daemon --------------------------------------------------------------------------------


def spare(kept: Kept) -> int:
    """Its pid, when it is there beside one daemon at work: after an upgrade the old daemon may still be ending."""
    keeper = Path(f"/proc/{kept.keeper_pid}/cmdline").read_bytes()
    idle: set[int] = set()

    def is_there() -> bool:
        nonlocal idle
        at_work = set(kept.daemons())
        idle = set(kept.children()) - at_work
        # A child that has not called exec yet is still called as the keeper is.
        return len(at_work) == 1 and len(idle) == 1 and all(cmdline(pid) not in (b"", keeper) for pid in idle)

    wait_until(is_there, 30)
    (pid,) = idle
    return pid


def cmdline(pid: int) -> bytes:
    """Empty when the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_a_dead_daemon_is_followed_by_one_that_was_kept_ready(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept, open(kept.file, "rb", buffering=0) as file:
        for _ in range(3):
            next_pid = spare(kept)
            wait_until(lambda pid=next_pid: nice_values(pid) == {15})  # type: ignore[misc]  # it does not hold up the other
            os.kill(kept.daemon_pid, signal.SIGKILL)
            assert os.pread(file.fileno(), 5, 0) == b"first"
            assert kept.daemon_pid == next_pid
            assert nice_values(next_pid) == {0}
        file.close()
        kept.umount()
        kept.assert_nothing_is_left()


@pytest.mark.parametrize("together", [False, True])
def test_a_spare_daemon_that_is_gone_costs_nothing(tmp_path: Path, together: bool) -> None:
    with Kept(tmp_path, fake()) as kept:
        gone = spare(kept)
        os.kill(gone, signal.SIGKILL)
        if not together:
            wait_until(lambda: gone not in kept.children())
        os.kill(kept.daemon_pid, signal.SIGKILL)
        assert kept.file.read_bytes() == b"first"
        assert kept.daemon_pid != gone
        assert spare(kept) != gone


def test_an_upgrade_is_not_undone_by_the_spare_daemon_of_before(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept:
        before = spare(kept)
        kept.ask_for_upgrade(fake("any"), content="second")
        wait_until(lambda: kept.file.read_bytes() == b"second")
        wait_until(lambda: before not in kept.children())
        after = spare(kept)
        assert b"any" in cmdline(after).split(b"\0")


def test_a_spare_daemon_ends_with_its_keeper(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept:
        pid = spare(kept)
        os.kill(kept.keeper_pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_daemon_may_wait_for_its_server_before_it_is_ready(tmp_path: Path) -> None:
    away = tmp_path / "away"
    choose = f'd="$1"; shift; test -e "{away}" && exec $d no-ready "$@"; exec $d "$@"'
    with Kept(tmp_path, ["sh", "-c", choose, "sh", " ".join(fake())]) as kept:
        away.touch()
        os.kill(kept.daemon_pid, signal.SIGKILL)
        wait_until(lambda: len(kept.heard("serve")) == 2)
        waiting = kept.daemon_pid
        wait_through_ticks(12)
        assert kept.daemon_pid == waiting
        away.unlink()
        os.kill(waiting, signal.SIGSTOP)  # it hangs before it is ready: that is noticed too
        wait_until(lambda: len(kept.heard("serve")) == 3, 20)
        assert kept.file.read_bytes() == b"first"
        assert kept.requests()[-1]["last_exit"] == "hung for 10 s"


@pytest.mark.parametrize("how", ["SIGTERM", "unmounted"])
def test_a_mount_that_no_daemon_serves_can_be_ended(tmp_path: Path, how: str) -> None:
    away = tmp_path / "away"
    choose = f'd="$1"; shift; test -e "{away}" && exec $d silent "$@"; exec $d "$@"'
    with Kept(tmp_path, ["sh", "-c", choose, "sh", " ".join(fake())]) as kept:
        away.touch()
        os.kill(kept.daemon_pid, signal.SIGKILL)
        wait_until(lambda: len(kept.requests()) == 2)
        if how == "SIGTERM":
            os.kill(kept.keeper_pid, signal.SIGTERM)
        else:
            kernel.unmount(str(kept.path), kernel.device_at(str(kept.path)))  # umount(8) would wait for it
        assert kept.process is not None and kept.process.wait(20) == 0
        kept.assert_nothing_is_left()


# -- upgrades ----------------------------------------------------------------------------------------


def test_an_upgrade_replaces_the_daemon_and_its_config_under_an_open_file(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept, open(kept.file, "rb", buffering=0) as file:
        old = kept.daemon_pid
        kept.ask_for_upgrade(fake("any"), content="second")
        wait_until(lambda: os.pread(file.fileno(), 6, 0) == b"second")
        # The new daemon serves before the old one reads that it is done.
        wait_until(lambda: bool(kept.heard("drain") and kept.heard("upgraded")))
        assert not kept.heard("upgrade_failed")
        wait_until(lambda: kept.daemons() != [] and old not in kept.daemons())
        last = kept.requests()[-1]
        assert (last["upgrades"], last["failovers"], last["last_exit"]) == (1, 0, "")
        os.kill(kept.daemon_pid, signal.SIGKILL)  # and it is what is started again
        assert os.pread(file.fileno(), 6, 0) == b"second"
        last = kept.requests()[-1]
        assert (last["upgrades"], last["failovers"], last["daemon"]) == (1, 1, fake("any"))
        file.close()
        kept.umount()
        kept.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("daemon", "reason"),
    [
        (["/no/such/program"], "No such file"),
        (fake("die"), "exit code 3"),
        (fake("error"), "made of straw"),
        (fake("die-serving"), "exit code 4"),
        (fake("no-ready"), "too long"),
        (["", 7], "names no program"),
    ],
)
def test_an_upgrade_that_fails_leaves_the_old_daemon_serving(tmp_path: Path, daemon: list[object], reason: str) -> None:
    with Kept(tmp_path, fake()) as kept, open(kept.file, "rb", buffering=0) as file:
        old = kept.daemon_pid
        kept.ask_for_upgrade(daemon, content="second")
        wait_until(lambda: bool(kept.heard("upgrade_failed")))
        (told,) = kept.heard("upgrade_failed")
        assert reason in str(told["upgrade_failed"])
        assert os.pread(file.fileno(), 6, 0) == b"first"
        assert kept.daemons() == [old]
        os.kill(old, signal.SIGKILL)
        assert os.pread(file.fileno(), 6, 0) == b"first"
        assert kept.requests()[-1]["upgrades"] == 0
        file.close()
        kept.umount()
        kept.assert_nothing_is_left()


def test_a_request_that_a_failing_new_daemon_had_taken_is_asked_again_of_the_old_one(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept, open(kept.file, "rb", buffering=0) as file:
        kept.ask_for_upgrade(fake("no-ready", "hold"), content="second")
        wait_until(lambda: len(kept.heard("serve")) == 2)
        assert os.pread(file.fileno(), 6, HELD_OFFSET) == b""
        assert any(note["content"] == "second" for note in kept.notes("held"))
        (told,) = kept.heard("upgrade_failed")
        assert told["served"] is True


def test_an_old_daemon_that_does_not_come_to_an_end_is_killed_and_its_requests_are_asked_again(tmp_path: Path) -> None:
    with Kept(tmp_path, fake("no-drain", "hold")) as kept, open(kept.file, "rb", buffering=0) as file:
        answers: list[bytes] = []
        reader = threading.Thread(target=lambda: answers.append(os.pread(file.fileno(), 5, HELD_OFFSET)))
        reader.start()
        wait_until(lambda: bool(list(kept.notes("held"))))
        kept.ask_for_upgrade(fake(), content="second")
        reader.join(20)
        assert answers == [b""]
        assert os.pread(file.fileno(), 6, 0) == b"second"
        wait_until(lambda: len(kept.daemons()) == 1)
        assert kept.requests()[-1]["upgrades"] == 1


def test_a_daemon_that_dies_while_it_is_upgraded_is_replaced(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept, open(kept.file, "rb", buffering=0) as file:
        old = kept.daemon_pid
        kept.ask_for_upgrade(fake("silent"), content="second")
        wait_until(lambda: len(kept.daemons()) == 2)
        os.kill(old, signal.SIGKILL)
        assert os.pread(file.fileno(), 6, 0) == b"first"
        last = kept.requests()[-1]
        assert (last["upgrades"], last["failovers"]) == (0, 1)
        wait_until(lambda: len(kept.daemons()) == 1)


def test_deaths_between_upgrades_are_not_those_of_young_daemons(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept:
        for number in range(9):
            served_since = time.monotonic()
            wait_until(lambda t=served_since: time.monotonic() > t + 1.1)  # type: ignore[misc]
            kept.ask_for_upgrade(fake(), content=str(number))
            wait_until(lambda n=number: kept.file.read_bytes() == str(n).encode())  # type: ignore[misc]
            wait_until(lambda: len(kept.daemons()) == 1)
            os.kill(kept.daemon_pid, signal.SIGKILL)
            assert kept.file.read_bytes() == str(number).encode()
        last = kept.requests()[-1]
        assert (last["upgrades"], last["failovers"]) == (9, 9)


def test_a_mount_that_is_unmounted_while_it_is_upgraded_ends(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept:
        kept.ask_for_upgrade(fake("silent"), content="second")
        wait_until(lambda: len(kept.daemons()) == 2)
        kept.umount()
        kept.assert_nothing_is_left()


# -- kernels before 6.9 ------------------------------------------------------------------------------


def old_kernel(directory: Path) -> list[str]:
    """The keeper's argv, as it is on a kernel that cannot resend."""
    script = directory / "keeper_on_an_old_kernel.py"
    script.write_text(
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from efcfs.keeper import kernel, start\n"
        "kernel.can_resend = lambda init: False\n"
        "sys.exit(start.main())\n"
    )
    return [sys.executable, "-S", "-E", str(script)]


def test_before_6_9_the_mount_says_what_is_lost(tmp_path: Path) -> None:
    kept = Kept(tmp_path, fake(), old_kernel(tmp_path))
    try:
        warning = str(kept.start()["warning"])
        assert "6.9" in warning and str(kept.path) in warning and warning in kept.log.read_text()
    finally:
        kept.__exit__()


def test_before_6_9_a_crash_fails_what_was_in_flight_and_the_mount_is_made_anew(tmp_path: Path) -> None:
    with Kept(tmp_path, fake("hold", "once"), old_kernel(tmp_path)) as kept:
        file = os.open(kept.file, os.O_RDONLY)
        errors: list[OSError] = []
        reader = threading.Thread(target=lambda: errors.append(error_of(lambda: os.pread(file, 5, HELD_OFFSET))))
        reader.start()
        wait_until(lambda: bool(list(kept.notes("held"))))
        os.kill(kept.daemon_pid, signal.SIGKILL)
        reader.join(10)
        assert [error.errno for error in errors] == [errno.ECONNABORTED]
        with contextlib.suppress(OSError):
            os.close(file)
        wait_until(lambda: len(kept.heard("serve")) == 2 and kept.heard("serve")[1]["first"] is True)
        assert kept.file.read_bytes() == b"first"
        mounts = Path("/proc/self/mounts").read_text().split()
        assert mounts.count(str(kept.path)) == 1
        kept.umount()
        kept.assert_nothing_is_left()


def error_of(call: Callable[[], object]) -> OSError:
    with pytest.raises(OSError) as failure:
        call()
    return failure.value


@pytest.mark.parametrize(("version", "can"), [((7, 39), False), ((7, 40), True), ((7, 45), True), ((8, 0), True)])
def test_which_kernels_can_resend_is_told_by_their_protocol(version: tuple[int, int], can: bool) -> None:
    assert kernel.can_resend(bytes(40) + struct.pack("=II", *version) + bytes(56)) is can


# -- what could not be written -----------------------------------------------------------------------


@pytest.fixture
def unwritten() -> Iterator[Path]:
    """The places that appear in the directory for unwritten data during this test, removed after it."""
    place = Path(directories.unwritten_dir())
    before = set(place.glob("*"))
    yield place
    for new in set(place.glob("*")) - before:
        shutil.rmtree(new)


def leave_dirty(kept: Kept) -> bytes:
    """A segment as the daemon would leave it: bytes, among them how many records are not done, a hole, bytes."""
    state = Path(str(kept.requests()[-1]["state_dir"]))
    (state / "dirty").mkdir()
    with open(state / "dirty" / "segment", "wb") as file:
        file.write(bytes(8) + (1).to_bytes(4, "little") + b"begin")
        file.seek(64 << 20)
        file.write(b"end")
    (state / "data.mdb").write_bytes(b"index")
    return (state / "dirty" / "segment").read_bytes()


def places_of(kept: Kept, base: Path) -> list[Path]:
    found = [path.parent for path in base.glob("[!.]*/mount.json")]
    return [path for path in found if json.loads((path / "mount.json").read_text())["mountpoint"] == str(kept.path)]


def assert_kept(kept: Kept, place: Path, data: bytes) -> None:
    assert (place / "dirty" / "segment").read_bytes() == data
    assert (place / "dirty" / "segment").stat().st_blocks * 512 < 1 << 20  # the hole is a hole
    assert (place / "data.mdb").read_bytes() == b"index"
    assert json.loads((place / "mount.json").read_text())["config"] == kept.config
    assert place.name.startswith("nowhere-at-all-")
    assert place.stat().st_mode & 0o777 == place.parent.stat().st_mode & 0o777 == 0o700
    (line,) = [line for line in kept.log.read_text().splitlines() if "could not be written" in line]
    assert "ERROR" in line and f"`efcfs recover {place.name}`" in line and str(place) in line


@pytest.mark.parametrize("how", ["umount", "SIGTERM", "umount -f", "daemons die"])
def test_what_could_not_be_written_is_kept_in_a_named_place(tmp_path: Path, unwritten: Path, how: str) -> None:
    broken = tmp_path / "broken"
    with Kept(tmp_path, dying_when(broken)) as kept:
        data = leave_dirty(kept)
        if how == "umount":
            kept.umount()
        elif how == "SIGTERM":
            os.kill(kept.keeper_pid, signal.SIGTERM)
        elif how == "umount -f":
            began = time.monotonic()
            done = efcfs("umount", "-f", str(kept.path))
            assert time.monotonic() - began < 5
            assert done.returncode == 0
            (line,) = done.stderr.splitlines()
            (place,) = places_of(kept, unwritten)
            assert str(place) in line and f"`efcfs recover {place.name}`" in line
        else:
            broken.touch()
            os.kill(kept.daemon_pid, signal.SIGKILL)
        kept.assert_nothing_is_left()
        (place,) = places_of(kept, unwritten)
        assert_kept(kept, place, data)


def test_umount_says_that_data_could_not_be_written(tmp_path: Path, unwritten: Path) -> None:
    with Kept(tmp_path, fake()) as kept:
        leave_dirty(kept)
        done = efcfs("umount", str(kept.path))
        assert done.returncode == 32
        (line,) = done.stderr.splitlines()
        (place,) = places_of(kept, unwritten)
        assert str(place) in line and f"`efcfs recover {place.name}`" in line


def test_umount_f_of_a_keeper_that_hangs_keeps_the_data_itself(tmp_path: Path, unwritten: Path) -> None:
    with Kept(tmp_path, fake()) as kept:
        data = leave_dirty(kept)
        os.kill(kept.keeper_pid, signal.SIGSTOP)
        began = time.monotonic()
        done = efcfs("umount", "-f", str(kept.path))
        assert time.monotonic() - began < 5
        (place,) = places_of(kept, unwritten)
        assert f"`efcfs recover {place.name}`" in done.stderr
        assert (place / "dirty" / "segment").read_bytes() == data
        kept.assert_nothing_is_left()


def test_unwritten_data_of_a_mount_whose_processes_were_killed_is_kept_by_the_next_mount(
    tmp_path: Path, unwritten: Path
) -> None:
    with Kept(tmp_path, fake()) as kept:
        data = leave_dirty(kept)
        daemon = kept.daemon_pid
        for pid in kept.keeper_pid, daemon:
            os.kill(pid, signal.SIGKILL)
        assert kept.process is not None
        kept.process.wait(5)
        wait_until(lambda: not Path(f"/proc/{daemon}").exists())
        subprocess.run(["umount", "-l", kept.path], check=True)
        assert "ready" in kept.start()
        (place,) = places_of(kept, unwritten)
        assert_kept(kept, place, data)
        kept.umount()
        kept.assert_nothing_is_left()


def test_unwritten_data_that_no_disk_takes_stays_in_memory_under_a_name(tmp_path: Path) -> None:
    # In a mount namespace where /var/lib is a file system that is read-only.
    hide = 'mount -t tmpfs -o ro none /var/lib && exec "$@"'
    keeper = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", hide, "sh", *KEEPER]
    kept = Kept(tmp_path, fake(), keeper)
    memory = Path(directories.unwritten_in_memory("/dev/shm/efcfs-0"))
    try:
        assert "ready" in kept.start()
        data = leave_dirty(kept)
        os.kill(kept.keeper_pid, signal.SIGTERM)
        kept.assert_nothing_is_left()
        (place,) = places_of(kept, memory)
        assert_kept(kept, place, data)
        assert "until a reboot" in kept.log.read_text()
        shutil.rmtree(place)
    finally:
        kept.__exit__()


# -- size --------------------------------------------------------------------------------------------


def test_the_keeper_stays_under_25_mb_over_failovers_and_upgrades(tmp_path: Path) -> None:
    with Kept(tmp_path, fake()) as kept:
        for number in range(5):
            os.kill(kept.daemon_pid, signal.SIGKILL)
            assert kept.file.read_bytes()
            kept.ask_for_upgrade(fake(), content=str(number))
            wait_until(lambda n=number: kept.file.read_bytes() == str(n).encode())  # type: ignore[misc]
            wait_until(lambda: len(kept.daemons()) == 1)
        status = Path(f"/proc/{kept.keeper_pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 25_000
