"""The index and eviction, without files or mounts."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efcfs.cache.index import CHUNK_BYTES, CHUNKS, FULL_MASK, RECORD_BYTES, Index, Unusable, extent_key
from efcfs.cache.tier import HIGH_WATER, Tier

KEYS = [bytes([i]) * 16 for i in range(3)]
FULL = [(chunk, bytes(8)) for chunk in range(CHUNKS)]


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path, durable=False)
    yield opened
    opened.close()


def test_a_chunk_is_there_only_after_a_reservation_and_an_addition(index: Index) -> None:
    with index.change() as txn:
        assert not txn.add(KEYS[0], 7, FULL)
        txn.reserve(KEYS[0], 7)
        assert txn.add(KEYS[0], 7, [(3, b"12345678")])
    index.renew()
    assert index.mask(KEYS[0], 7) == 1 << 3
    record = index.look(KEYS[0], 7)
    assert record is not None and record.sum_of(3) == b"12345678"


def test_a_change_that_fails_leaves_everything_as_it_was(index: Index) -> None:
    with pytest.raises(RuntimeError), index.change() as txn:
        txn.reserve(KEYS[0], 0)
        txn.add(KEYS[0], 0, FULL)
        raise RuntimeError
    assert index.look(KEYS[0], 0) is None and index.totals()[:2] == (0, 0)


steps = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "add", "remove", "drop", "touch", "evict", "file"]),
        st.sampled_from(KEYS), st.integers(0, 5), st.integers(0, CHUNKS - 1),
    ), max_size=60,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(steps)
def test_the_totals_are_the_sum_of_the_records_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, done: list[tuple[str, bytes, int, int]]
) -> None:
    index = Index(tmp_path_factory.mktemp("index"), durable=False)
    try:
        now_s = 10
        for what, key, number, chunk in done:
            now_s += 5
            with index.change() as txn:
                if what == "reserve":
                    txn.reserve(key, number)
                elif what == "add":
                    txn.add(key, number, [(chunk, bytes(8))])
                elif what == "remove":
                    txn.remove(key, number)
                elif what == "drop":
                    txn.drop_chunk(key, number, chunk)
                elif what == "touch":
                    txn.touch(key, number, 2**31 + now_s)
                elif what == "evict":
                    for victim in txn.victims(2, 2**32 - 1):
                        txn.evict(victim)
                else:
                    txn.remove_file(key)
        records = [record for _, _, record in index.walk()]
        used_bytes, items, _ = index.totals()
        assert used_bytes == sum(r.mask.bit_count() for r in records) * CHUNK_BYTES
        assert items == len(records)
        assert len({(r.queue, r.place) for r in records}) == len(records)
    finally:
        index.close()


def fill(tier: Tier, key: bytes, numbers: range) -> None:
    for number in numbers:
        with tier.index.change() as txn:
            txn.reserve(key, number)
            txn.add(key, number, FULL)


def test_one_pass_over_a_huge_file_does_not_empty_the_cache(tmp_path: Path) -> None:
    tier = Tier("mem", tmp_path, 100 * 1024 * 1024, in_memory=True)
    try:
        fill(tier, KEYS[0], range(60))
        with tier.index.change() as txn:  # read again, a while later
            for number in range(60):
                txn.touch(KEYS[0], number, 2**31)
        for start in range(0, 2000, 10):
            fill(tier, KEYS[1], range(start, start + 10))
            tier.evict()
        tier.index.renew()
        kept = sum(tier.index.mask(KEYS[0], number) == FULL_MASK for number in range(60))
        assert kept >= 55
        assert tier.index.totals()[0] <= 100 * 1024 * 1024
    finally:
        tier.close()


def test_a_tier_holds_no_more_items_than_its_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efcfs.cache.tier.MAX_ITEMS", 100)
    tier = Tier("mem", tmp_path, 1 << 40, in_memory=True)
    try:
        fill(tier, b"k" * 16, range(99))
        assert tier.pressure() > HIGH_WATER
        assert tier.evict()
        _, items, _ = tier.index.totals()
        assert 50 < items <= 90
    finally:
        tier.close()


def test_a_new_data_set_that_is_used_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    tier = Tier("mem", tmp_path, 100 * 1024 * 1024, in_memory=True)
    rng = random.Random(1)
    try:
        fill(tier, KEYS[0], range(90))
        with tier.index.change() as txn:
            for number in range(90):
                txn.touch(KEYS[0], number, 2**31)
        for epoch in range(6):
            for number in rng.sample(range(80), 80):
                tier.index.renew()
                if tier.index.mask(KEYS[1], number) == FULL_MASK:
                    with tier.index.change() as txn:
                        txn.touch(KEYS[1], number, 2**31 + 100 * (epoch + 1))
                else:
                    fill(tier, KEYS[1], range(number, number + 1))
                tier.evict()
        tier.index.renew()
        assert sum(tier.index.mask(KEYS[1], number) == FULL_MASK for number in range(80)) >= 60
    finally:
        tier.close()


def test_reservations_of_the_living_are_spared_and_those_of_the_dead_are_not(index: Index) -> None:
    with index.change() as txn:
        txn.reserve(KEYS[0], 0)
        assert txn.victims(4, stale_before_s=0) == []
        (victim,) = txn.victims(4, stale_before_s=2**32 - 1)
        txn.evict(victim)
        assert not txn.has(KEYS[0], 0)


def test_a_victim_that_was_used_meanwhile_stays(index: Index) -> None:
    with index.change() as txn:
        txn.reserve(KEYS[0], 0)
        txn.add(KEYS[0], 0, FULL)
        (victim,) = txn.victims(1, 0)
    with index.change() as txn:
        txn.touch(KEYS[0], 0, 2**31)
    with index.change() as txn:
        txn.evict(victim)
        assert txn.has(KEYS[0], 0)


def test_an_evicted_extent_is_punched_only_when_no_reader_looks_at_it(tmp_path: Path) -> None:
    tier = Tier("mem", tmp_path, 2 * 1024 * 1024, in_memory=True)
    try:
        fd = tier.open(KEYS[0], 4 * 1024 * 1024)
        os.pwrite(fd, b"x" * (4 * 1024 * 1024), 0)
        fill(tier, KEYS[0], range(4))
        tier.index.renew()  # somebody reads
        tier.evict(at_least=2)
        evicted = [n for n in range(4) if tier.index.look(KEYS[0], n) is None]
        assert evicted and all(os.pread(fd, 1, n * 1024 * 1024) == b"x" for n in evicted)
        tier.index.rest()
        tier.punch_due()
        left = [n for n in range(4) if n not in evicted]
        if left:  # a file without extents lost its name instead
            assert all(os.pread(fd, 1, n * 1024 * 1024) == b"\0" for n in evicted)
            assert all(os.pread(fd, 1, n * 1024 * 1024) == b"x" for n in left)
        os.close(fd)
    finally:
        tier.close()


@pytest.mark.parametrize(
    ("key", "value", "why"), [(b"format", b"efcfs cache 99", "another kind"), (b"data", b"../elsewhere", "damaged")]
)
def test_an_index_of_another_version_or_with_files_elsewhere_is_unusable(
    tmp_path: Path, key: bytes, value: bytes, why: str
) -> None:
    index = Index(tmp_path, durable=True)
    with index.env.begin(write=True, db=index.meta) as txn:
        txn.put(key, value)
    index.close()
    with pytest.raises(Unusable, match=why):
        Index(tmp_path, durable=True)


def damage_key(index: Index, txn: lmdb.Transaction) -> None:
    txn.put(KEYS[0] + b"\0\0", bytes(RECORD_BYTES), db=index.extents)


def damage_length(index: Index, txn: lmdb.Transaction) -> None:
    txn.put(extent_key(KEYS[0], 0), b"\1", db=index.extents)


def damage_queue(index: Index, txn: lmdb.Transaction) -> None:
    txn.put(extent_key(KEYS[0], 0), b"\xff" * RECORD_BYTES, db=index.extents)


def damage_totals(index: Index, txn: lmdb.Transaction) -> None:
    txn.put(b"totals", b"\1\2\3", db=index.meta)


def damage_counts(index: Index, txn: lmdb.Transaction) -> None:
    txn.put(b"totals", b"\xff" * 24, db=index.meta)


@pytest.mark.parametrize("damage", [damage_key, damage_length, damage_queue, damage_totals, damage_counts])
def test_records_that_cannot_be_are_damage_as_lmdb_would_find_it(
    index: Index, damage: Callable[[Index, lmdb.Transaction], None]
) -> None:
    with index.change() as txn:
        txn.reserve(KEYS[0], 0)
        txn.add(KEYS[0], 0, FULL)
        txn.reserve(KEYS[0], 1)
    with index.env.begin(write=True) as raw:
        damage(index, raw)
    with pytest.raises(lmdb.CorruptedError), index.change() as change:
        change.remove_file(KEYS[0])
        change.reserve(KEYS[1], 0)
    with index.env.begin(write=True):  # no transaction is left open
        pass
