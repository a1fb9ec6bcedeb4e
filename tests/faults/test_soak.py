"""Programs notice nothing but time when the daemon dies, is replaced, or the server restarts: the short soak.

bench/soak.py runs the same with a thousand kills and holds the times to reach.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount
from tests.faults.model import Board
from tests.faults.program import ACTIONS, SHARED, Program
from tests.faults.soak import Outcome, Pause, Plan, soak

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
