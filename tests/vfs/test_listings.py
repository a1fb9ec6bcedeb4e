"""Kept listings of directories."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from efcfs.nfs.nfs3 import DirEntryPlus
from efcfs.vfs.inodes import Inodes
from efcfs.vfs.listings import Listings

ENTRIES = [DirEntryPlus(i, b"name-%d" % i, i + 1, None, None) for i in range(600)]


@pytest.fixture
def listings(tmp_path: Path) -> Iterator[Listings]:
    inodes = Inodes(tmp_path, b"root")
    yield inodes.listings
    inodes.close()


def test_a_listing_is_read_in_the_order_in_which_the_server_told_it(listings: Listings) -> None:
    number = listings.begin()
    listings.add(number, 0, ENTRIES[:400])
    listings.add(number, 400, ENTRIES[400:])
    found = listings.after(number, None, 250)
    while more := listings.after(number, found[-1].name, 250):
        found += more
    assert found == ENTRIES


def test_a_listing_that_is_being_dropped_is_read_as_none_and_not_without_its_first_names(listings: Listings) -> None:
    number = listings.begin()
    listings.add(number, 0, ENTRIES)
    assert listings.drop(number, most=256)
    assert listings.after(number, None, 100) == []
    assert listings.after(number, ENTRIES[255].name, 100) == []
