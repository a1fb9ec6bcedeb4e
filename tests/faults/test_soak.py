"""Programs notice nothing but time when the daemon dies, is replaced, or the server restarts: the short soak.

bench/soak.py runs the same with a thousand kills and holds the times to reach.
"""

import errno
import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from efcfs.fuse.direct import told
from efcfs.keeper.child import born
from tests.bed import Ganesha, Mount
from tests.faults.model import Board
from tests.faults.program import ACTIONS, SHARED, Program
from tests.faults.soak import Outcome, Pause, Plan, soak
from tests.place import wait_until
from tests.versions import other_version, upgrade

QUICK_S = (0.5, 1.5)


@pytest.fixture
def own_server() -> Iterator[Ganesha]:
    """With its files in memory: what is measured is not a disk."""
    with tempfile.TemporaryDirectory(prefix="efcfs-test-", dir="/dev/shm") as root, Ganesha(Path(root)) as server:
        yield server


def undisturbed(outcome: Outcome) -> bool:
    """Nothing was noticed, and everything was done."""
    assert outcome.errors[:20] == []
    assert outcome.wrong[:20] == []
    assert outcome.leaked_handles == "0"
    assert set(outcome.actions) == {action.__name__ for action in ACTIONS}
    return True


def longest(pauses: list[Pause]) -> Pause:
    return max(pauses, default=Pause(0.0, ""))


def test_a_daemon_killed_twenty_times_costs_time_and_nothing_else(own_server: Ganesha, tmp_path: Path) -> None:
    with Mount(own_server, tmp_path / "mnt") as mount:
        outcome = soak(own_server, mount, Plan(kills=20, between_kills_s=QUICK_S))
    assert undisturbed(outcome)
    assert len(set(outcome.daemon_pids)) == 21
    pauses, _ = outcome.pauses(outcome.kills)
    assert len(pauses) == 20 and longest(pauses) < Pause(5, "")


def segmentation_fault(pid: int) -> None:
    os.kill(pid, signal.SIGSEGV)


def want_of_memory(pid: int) -> None:
    """It gets no more than it has."""
    has_bytes = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (has_bytes, has_bytes))
    wait_until(lambda: not born(pid), 20)


NO_MEMORY = ("Cannot allocate memory", "MemoryError", "can't start new thread")


@pytest.mark.parametrize(
    ("death", "why"),
    [(segmentation_fault, ("signal SIGSEGV",)), (want_of_memory, NO_MEMORY)],
    ids=["segmentation fault", "want of memory"],
)
def test_a_daemon_that_dies_by_itself_costs_time_and_nothing_else(
    own_server: Ganesha, tmp_path: Path, death: Callable[[int], None], why: tuple[str, ...]
) -> None:
    with Mount(own_server, tmp_path / "mnt") as mount:
        assert_deaths_cost_nothing(own_server, mount, death, why)


FAILING = """            await trio.sleep(0.01)
            if __import__("os").path.exists({0!r}):
                __import__("os").unlink({0!r})
                raise ValueError("it is Tuesday")
"""


@pytest.mark.parametrize(
    ("file", "sleep"),
    [("vfs/writer.py", "await trio.sleep(TAIL_S)"), ("nfs/pool.py", "await trio.sleep(TICK_S)")],
    ids=["that writes", "that watches the links"],
)
def test_a_part_of_the_daemon_that_fails_costs_time_and_nothing_else(
    own_server: Ganesha, tmp_path: Path, file: str, sleep: str
) -> None:
    """What the rest of it is asked, while it ends, is answered by the next one."""
    tuesday = tmp_path / "tuesday"
    part = (file, f"            {sleep}\n", FAILING.format(str(tuesday)))
    failing = other_version(tmp_path / "failing", part=part)

    def death(pid: int) -> None:
        tuesday.touch()
        wait_until(lambda: not born(pid), 20)

    with Mount(own_server, tmp_path / "mnt") as mount:
        assert upgrade(mount, "--python", str(failing)) == ""
        assert_deaths_cost_nothing(own_server, mount, death, ("internal error (it is Tuesday): see the log",))


def test_no_call_of_eight_programs_takes_seconds_while_nothing_happens(own_server: Ganesha, tmp_path: Path) -> None:
    """An fsync that misses its answer would wait for the next COMMIT, five seconds."""
    with Mount(own_server, tmp_path / "mnt") as mount:
        outcome = soak(own_server, mount, Plan(quiet_s=8.0))
    assert outcome.errors == [] and outcome.wrong == []
    pauses, _ = outcome.pauses(outcome.quiet)
    assert longest(pauses) < Pause(2, "")


def assert_deaths_cost_nothing(
    server: Ganesha, mount: Mount, death: Callable[[int], None], why: tuple[str, ...]
) -> None:
    exits: list[str] = []

    def noted(pid: int) -> None:
        exits.append(str(mount.status()["last_exit"]))
        death(pid)

    outcome = soak(server, mount, Plan(kills=12, death=noted, between_kills_s=QUICK_S))
    assert outcome.errors[:20] == []
    assert outcome.wrong[:20] == []
    assert outcome.leaked_handles == "0"
    assert exits[0] == "" and [exit for exit in exits[1:] if not any(words in exit for words in why)] == []
    pauses, _ = outcome.pauses(outcome.kills)
    assert len(pauses) == 12 and longest(pauses) < Pause(5, "")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.ENOMEM, "mmap"), RuntimeError("can't start new thread")],
    ids=["memory", "mapping", "thread"],
)
def test_what_is_of_the_daemon_is_told_to_no_program(error: Exception) -> None:
    with pytest.raises(type(error)):
        told("read", error)
    assert told("read", AssertionError()).errno == errno.EIO  # what is asked again would fail again


def test_twenty_upgrades_cost_nothing(own_server: Ganesha, tmp_path: Path) -> None:
    with Mount(own_server, tmp_path / "mnt") as mount:
        outcome = soak(own_server, mount, Plan(upgrades=20))
    assert undisturbed(outcome)
    assert len(set(outcome.daemon_pids)) == 21
    pauses, _ = outcome.pauses(outcome.upgrades)
    assert len(pauses) == 20 and longest(pauses) < Pause(5, "")


def test_a_server_that_restarts_between_kills_of_the_daemon_costs_time_and_nothing_else(
    own_server: Ganesha, tmp_path: Path
) -> None:
    with Mount(own_server, tmp_path / "mnt") as mount:
        outcome = soak(own_server, mount, Plan(kills=15, restart_server=True, between_kills_s=QUICK_S))
    assert undisturbed(outcome)
    assert len(set(outcome.daemon_pids)) == 16
    assert len(outcome.server_away) >= 2
    pauses, _ = outcome.pauses(outcome.kills)
    assert longest(pauses) < Pause(5, "")


def test_a_program_finds_every_byte_and_name_that_is_not_as_it_should_be(tmp_path: Path) -> None:
    (tmp_path / SHARED).mkdir()
    program = Program(0, tmp_path, 1, Board(1))
    left = iter(range(2000))
    program.work(lambda: next(left, None) is None)
    assert program.found.errors == [] and program.found.wrong == []
    by_file = {file: path for path, file in reversed(program.names.items()) if file.content}  # the first of its names
    changed, shorter, gone = list(by_file.values())[:3]
    data = bytearray((tmp_path / changed).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / changed).write_bytes(data)
    os.truncate(tmp_path / shorter, len(program.names[shorter].content) - 1)
    (tmp_path / gone).unlink()
    (tmp_path / program.own / "0-extra").touch()
    program.compare(tmp_path)
    assert len(program.found.errors) == 1 and f"open {gone}: No such file" in program.found.errors[0]
    told = [line.partition("program 0: ")[2] for line in program.found.wrong]
    assert len(told) == 3
    assert any(line.startswith(f"bytes on the server of {changed}: 1 of {len(data)} bytes wrong") for line in told)
    assert any(line.startswith(f"bytes on the server of {shorter}: 1 of ") for line in told)
    assert any(line.startswith("missing and extra names") and "0-extra" in line for line in told)
