"""One tier by itself, on a file system of its own that gets full."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb
import pytest

from efcfs.cache.index import CHUNK_BYTES, EXTENT_BYTES, MAX_USES, ONE_USE_S, Victim
from efcfs.cache.tier import HIGH_WATER, Tier, checksum
from tests.place import small_tmpfs

MIB = 1024 * 1024


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    small_tmpfs(directory, 24 * MIB)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def fill(tier: Tier, key: bytes, data: bytes) -> None:
    """One file of one extent."""
    fd = tier.open(key, len(data))
    os.pwrite(fd, data, 0)
    os.close(fd)
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    with tier.index.change() as txn:
        txn.reserve(key, 0)
        txn.add(key, 0, [(i, checksum(memoryview(chunk))) for i, chunk in enumerate(chunks)])


@pytest.mark.parametrize("free_pages", range(0, 18))
def test_what_cannot_be_evicted_because_the_file_system_is_full_still_has_its_bytes(
    small: Path, free_pages: int
) -> None:
    data = os.urandom(EXTENT_BYTES)
    keys = [bytes([number]) * 16 for number in range(8)]
    tier = Tier("mem", small / "cache", 64 * MIB, in_memory=True)
    for key in keys:
        fill(tier, key, data)
    held = [tier.open(key, EXTENT_BYTES) for key in keys]  # as readers do: unlinking gives no room
    # No page of the index can be used again while a reader holds its state, so each transaction needs new ones.
    with tier.index.env.begin(), open(small / "rest", "wb", buffering=0) as rest:
        with contextlib.suppress(OSError):
            while True:
                rest.write(bytes(4096))
        rest.truncate(max(0, rest.tell() - free_pages * 4096))
        with contextlib.suppress(lmdb.Error):
            tier.evict(at_least=len(keys))
        rest.truncate(0)
    for key in keys:
        if tier.index.look(key, 0) is not None:
            fd = tier.open(key, EXTENT_BYTES)
            assert os.pread(fd, EXTENT_BYTES, 0) == data
            os.close(fd)
    for fd in held:
        os.close(fd)
    tier.close()


def test_a_file_that_somebody_removed_is_not_believed_to_have_its_bytes(tmp_path: Path) -> None:
    tier = Tier("mem", tmp_path, 64 * MIB, in_memory=True)
    key = b"k" * 16
    fill(tier, key, os.urandom(EXTENT_BYTES))
    os.unlink(tier.path(key))
    os.close(tier.open(key, EXTENT_BYTES))
    assert tier.index.look(key, 0) is None
    tier.close()


def test_what_one_tier_evicts_the_next_one_has_though_its_file_is_new_there(tmp_path: Path) -> None:
    memory = Tier("mem", tmp_path / "mem", 64 * MIB, in_memory=True)
    disk = Tier("ssd0", tmp_path / "ssd", 64 * MIB, in_memory=False)
    files = {bytes([number]) * 16: os.urandom(100_000 + number) for number in range(8)}
    leaving = []
    for key, data in files.items():
        fill(memory, key, data)
        record = memory.index.look(key, 0)
        assert record is not None
        taken = memory.take_out(Victim(key, 0, record))
        assert taken is not None
        leaving.append(taken)
    disk.write_extents(leaving)
    for key, data in files.items():
        target = memoryview(bytearray(len(data)))
        assert disk.read_chunks(key, 0, 0, target) == 0b11
        assert target == data
    memory.close()
    disk.close()


def test_a_small_tier_is_not_emptied_when_it_evicts(tmp_path: Path) -> None:
    tier = Tier("mem", tmp_path, 16 * MIB, in_memory=True)
    for number in range(16):
        fill(tier, bytes([number]) * 16, bytes(EXTENT_BYTES))
    assert tier.evict()
    assert 13 * MIB <= tier.index.totals()[0] <= 15 * MIB
    tier.close()


def chunks_of(tier: Tier, keys: Iterable[bytes], *, uses: int) -> None:
    """Files of one chunk, each used so often."""
    for key in keys:
        fill(tier, key, bytes(CHUNK_BYTES))
        with tier.index.change() as txn:
            for n in range(uses):
                txn.touch(key, 0, int(time.time()) + ONE_USE_S * (n + 1))


def test_a_tier_of_which_everything_was_used_finds_what_to_evict(tmp_path: Path) -> None:
    tier = Tier("mem", tmp_path, 700 * CHUNK_BYTES, in_memory=True)
    chunks_of(tier, (b"%016d" % n for n in range(700)), uses=MAX_USES)
    assert tier.evict()
    assert 600 <= tier.index.totals()[1] <= 630
    tier.close()


def test_what_was_warmed_up_outlives_what_was_read_often_before(tmp_path: Path) -> None:
    tier = Tier("mem", tmp_path, 100 * CHUNK_BYTES, in_memory=True)
    chunks_of(tier, (b"read%012d" % n for n in range(60)), uses=MAX_USES)
    warmed = [b"warm%012d" % n for n in range(60)]
    for key in warmed:
        chunks_of(tier, [key], uses=0)
        with tier.index.change() as txn:
            txn.promote(key, 0)
        if tier.pressure() > HIGH_WATER:
            assert tier.evict()
    assert all(tier.index.has_file(key) for key in warmed)
    tier.close()


def test_a_disk_that_cannot_be_used_at_first_is_taken_in_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("efcfs.cache.tier.PROBE_S", 0.0)
    (tmp_path / "ssd").write_bytes(b"not a directory")
    tier = Tier("ssd0", tmp_path / "ssd", 16 * MIB, in_memory=False)
    tier.probe()
    assert not tier.usable() and tier.totals() == (0, 0, 16 * MIB)
    tier.close()
    (tmp_path / "ssd").unlink()
    tier.probe()
    assert tier.usable() and tier.totals() == (0, 0, 16 * MIB)
    fill(tier, bytes(16), bytes(EXTENT_BYTES))
    assert tier.totals()[0] == EXTENT_BYTES
    tier.close()


def test_who_has_an_index_that_was_replaced_takes_the_present_one_and_leaves_its_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("efcfs.cache.tier.PROBE_S", 0.0)
    old = Tier("mem", tmp_path, 16 * MIB, in_memory=True)
    os.rename(tmp_path / "index.lmdb", tmp_path / "index.bad-1")
    new = Tier("mem", tmp_path, 16 * MIB, in_memory=True)
    fill(new, bytes(16), b"x" * CHUNK_BYTES)
    old.remove_strangers()
    assert not old.usable() and new.verified(bytes(16), CHUNK_BYTES) == {0: 1}
    new.close()  # LMDB opens no index twice in one process
    old.probe()
    assert old.usable() and old.verified(bytes(16), CHUNK_BYTES) == {0: 1}
    old.close()


def test_a_disk_that_fails_while_strangers_are_looked_for_is_taken_out(tmp_path: Path) -> None:
    tier = Tier("ssd0", tmp_path / "ssd", 16 * MIB, in_memory=False)
    os.rename(tmp_path / "ssd", tmp_path / "away")
    (tmp_path / "ssd").write_bytes(b"not a directory")
    tier.remove_strangers()
    assert not tier.usable()
    tier.close()
