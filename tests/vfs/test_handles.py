"""The table of open handles by itself."""

import struct
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from efcfs.nfs.rpc import Credential
from efcfs.vfs.handles import SLOTS_AT_ONCE, Handles, OtherVersion, Slot

creds = st.builds(
    Credential, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**32 - 1), max_size=16).map(tuple),
)  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(1, 2**64 - 1), st.booleans(), creds), max_size=40),
)
@settings(deadline=None, max_examples=50)
def test_the_next_daemon_knows_every_handle_and_gives_no_number_twice(
    opened: list[tuple[int, int, bool, Credential]],
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        table, expected, given_numbers = Handles(Path(directory)), {}, set[int]()
        for i, (unique, ino, is_directory, cred) in enumerate(opened):
            number = table.add(unique, ino, i, cred, is_directory=is_directory)
            assert number not in given_numbers
            given_numbers.add(number)
            expected[number] = Slot(number, unique, ino, i, 0, is_directory, cred)
            if i % 3 == 2:
                gone = sorted(expected)[i % len(expected)]
                table.remove(gone)
                del expected[gone]
            elif i % 3 == 1:
                table.set_error(number, 28)
                expected[number] = expected[number]._replace(error=28)
            if i % 5 == 4:
                table = Handles(Path(directory))  # the last daemon was killed
            assert {slot.number: slot for slot in table} == expected
            assert len(table) == len(expected)


def test_there_is_room_for_more_handles_than_at_first(tmp_path: Path) -> None:
    table, cred = Handles(tmp_path), Credential(1, 2, (3,))
    numbers = [table.add(i, i + 1, 0, cred) for i in range(3 * SLOTS_AT_ONCE)]
    assert sorted(slot.number for slot in Handles(tmp_path)) == numbers


def test_state_of_another_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    Handles(tmp_path).close()
    path = tmp_path / "handles"
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 8, 99)
    path.write_bytes(data)
    with pytest.raises(OtherVersion, match="version 99"):
        Handles(tmp_path)
    assert path.read_bytes() == data
