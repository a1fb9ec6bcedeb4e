"""Only what nobody else can have made is believed."""

import os
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest

from efcfs.cache.index import Index, Unusable
from efcfs.cache.tier import Tier

MIB = 1024 * 1024
BOB = 1234

Spoil = Callable[[Path], None]
SPOILS: dict[str, Spoil] = {
    "directory of bob": lambda ssd: os.chown(ssd, BOB, BOB),
    "scratch": lambda ssd: ssd.chmod(0o1777),
    "group writes": lambda ssd: ssd.chmod(0o770),
    "index of bob": lambda ssd: os.chown(ssd / "index.lmdb", BOB, BOB),
    "index's file of bob": lambda ssd: os.chown(ssd / "index.lmdb" / "data.mdb", BOB, BOB),
    "data of bob": lambda ssd: os.chown(data(ssd), BOB, BOB),
    "data elsewhere": lambda ssd: data(ssd).rename(ssd / "there") and data_link(ssd),
}


def data(ssd: Path) -> Path:
    index = Index(ssd, durable=False)
    try:
        return ssd / index.data
    finally:
        index.close()


def data_link(ssd: Path) -> None:
    data(ssd).symlink_to(ssd / "there")


@pytest.fixture
def ssd(tmp_path: Path) -> Path:
    tier = Tier("ssd0", tmp_path, 16 * MIB, in_memory=False)
    os.close(tier.open(bytes(16), 1))
    tier.close()
    return tmp_path


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_directory_that_others_can_write_to_is_not_used(ssd: Path, spoil: str) -> None:
    SPOILS[spoil](ssd)
    for in_memory in (False, True):
        try:
            tier = Tier("ssd0", ssd, 16 * MIB, in_memory=in_memory)
        except Unusable:
            assert in_memory
        else:
            assert not in_memory and not tier.usable()


def test_a_directory_of_ours_is_used_again(ssd: Path) -> None:
    ssd.chmod(0o755)
    tier = Tier("ssd0", ssd, 16 * MIB, in_memory=False)
    assert tier.usable()
    tier.close()


def test_damage_that_only_a_write_finds_costs_nothing_but_the_cache(
    ssd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the list of free pages, of which the try-out takes others than who writes next."""
    real, met = Tier.set_capacity, []

    def set_capacity(self: Tier, capacity_bytes: int) -> None:
        if not met:
            met.append(True)
            raise lmdb.CorruptedError("mdb_put: MDB_CORRUPTED: Located page was wrong type")
        real(self, capacity_bytes)

    monkeypatch.setattr(Tier, "set_capacity", set_capacity)
    tier = Tier("mem", ssd, 16 * MIB, in_memory=True)
    assert tier.usable() and len(list(ssd.glob("index.bad-*"))) == 1
    tier.close()
