"""Close-to-open: two mounts of one export, and changes made on the server itself."""

import os
from pathlib import Path

import pytest

from tests.place import Place


@pytest.fixture
def two(place: Place, mount_factory) -> tuple[Path, Path]:  # type: ignore[no-untyped-def]
    """The same directory through two mounts."""
    return place.here, place.through(mount_factory())


def test_what_one_mount_wrote_and_closed_the_other_reads_after_open(two: tuple[Path, Path]) -> None:
    a, b = two
    for i in range(20):
        contents = f"version {i}".encode() * (i + 1)
        (a / "file").write_bytes(contents)
        assert (b / "file").read_bytes() == contents
        contents = contents[: len(contents) // 2] + b"!"
        (b / "file").write_bytes(contents)
        assert (a / "file").read_bytes() == contents


def test_an_overwrite_of_equal_length_is_seen_after_open(two: tuple[Path, Path]) -> None:
    a, b = two
    (a / "file").write_bytes(b"a" * 300_000)
    assert (b / "file").read_bytes() == b"a" * 300_000
    with open(a / "file", "r+b") as file:
        file.seek(100_000)
        file.write(b"b" * 1000)
    assert (b / "file").read_bytes()[100_000:101_000] == b"b" * 1000


def test_both_mounts_append_in_turn_and_nothing_is_lost(two: tuple[Path, Path]) -> None:
    expected = b""
    for i in range(30):
        line = b"%d\n" % i
        with open(two[i % 2] / "log", "ab") as log:
            log.write(line)
        expected += line
    assert (two[0] / "log").read_bytes() == expected


def test_truncation_by_one_is_seen_by_the_other(two: tuple[Path, Path]) -> None:
    a, b = two
    (a / "file").write_bytes(b"x" * 1_000_000)
    assert len((b / "file").read_bytes()) == 1_000_000
    os.truncate(a / "file", 10)
    assert (b / "file").read_bytes() == b"x" * 10


def test_new_removed_and_renamed_names_are_seen_in_a_listing(two: tuple[Path, Path]) -> None:
    a, b = two
    (a / "one").touch()
    assert os.listdir(b) == ["one"]
    (a / "two").touch()
    os.rename(a / "one", a / "three")
    assert sorted(os.listdir(b)) == ["three", "two"]
    (b / "two").unlink()
    assert os.listdir(a) == ["three"]


def test_a_file_replaced_by_rename_is_read_anew(two: tuple[Path, Path]) -> None:
    a, b = two
    (a / "config").write_bytes(b"old")
    assert (b / "config").read_bytes() == b"old"
    (a / "config.new").write_bytes(b"new and longer")
    os.rename(a / "config.new", a / "config")
    assert (b / "config").read_bytes() == b"new and longer"


def test_a_file_replaced_while_it_is_open_is_read_anew_by_the_other(two: tuple[Path, Path]) -> None:
    a, b = two
    for look in (lambda: None, (b / "config").stat):
        (a / "config").write_bytes(b"old")
        assert (b / "config").read_bytes() == b"old"
        with open(a / "config", "rb") as held, open(b / "config", "rb") as other:
            (a / "config.new").write_bytes(b"new")
            os.rename(a / "config.new", a / "config")
            look()  # the attributes that it is told are those of the old file
            assert (b / "config").read_bytes() == b"new"
            assert held.read() == other.read() == b"old"
            Path(f"/proc/self/fd/{other.fileno()}").read_bytes()  # can be opened without its name


def test_a_file_removed_and_made_again_by_the_other_is_read_anew(two: tuple[Path, Path]) -> None:
    a, b = two
    (a / "file").write_bytes(b"old")
    assert (b / "file").read_bytes() == b"old"
    (a / "file").unlink()
    (a / "file").write_bytes(b"a new one")
    assert (b / "file").read_bytes() == b"a new one"


def test_a_change_on_the_server_is_read_after_open(place: Place) -> None:
    (place.there / "file").write_bytes(b"first")
    assert (place.here / "file").read_bytes() == b"first"
    (place.there / "file").write_bytes(b"second, longer")
    assert (place.here / "file").read_bytes() == b"second, longer"


def test_with_noac_a_change_is_seen_by_stat_at_once(place: Place, mount_factory) -> None:  # type: ignore[no-untyped-def]
    here = place.through(mount_factory("noac"))
    (place.there / "file").write_bytes(b"1")
    assert (here / "file").stat().st_size == 1
    (place.there / "file").write_bytes(b"22")
    assert (here / "file").stat().st_size == 2


def test_a_read_only_mount_refuses_writes_and_reads(place: Place, mount_factory) -> None:  # type: ignore[no-untyped-def]
    here = place.through(mount_factory("ro"))
    (place.there / "file").write_bytes(b"data")
    assert (here / "file").read_bytes() == b"data"
    with pytest.raises(OSError, match="Read-only"):
        (here / "other").write_bytes(b"x")
