"""Names change while others list and open them: what one program did, every other sees at once."""

import os
import threading
from pathlib import Path

import pytest

from tests.place import Place

NAMES = 3000  # more than one getdents(2) returns


def test_a_name_removed_or_replaced_while_others_list_stays_so(place: Place) -> None:
    for number in range(NAMES):
        (place.there / f"{number}").touch()
    (place.here / "new").write_bytes(b"new")
    with os.scandir(place.here) as listing:
        seen = {next(listing).name}
        for entry in listing:
            seen.add(entry.name)
            if len(seen) > NAMES // 10:
                break
        left = sorted(set(map(str, range(NAMES))) - seen)
        # Some of them are in what the daemon has read from the server, and not in what the kernel has.
        for name in left[::2]:
            os.unlink(place.here / name)
        replaced = left[1]
        os.rename(place.here / "new", place.here / replaced)
        list(listing)
    assert [name for name in left[::2] if (place.here / name).exists()] == []
    assert (place.here / replaced).read_bytes() == b"new"


def test_readers_of_a_file_that_is_replaced_by_rename_find_one_of_the_two(place: Place) -> None:
    published, wrong = place.here / "published", []
    published.write_bytes(b"0" * 1000)
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                data = published.read_bytes()
            except OSError as error:
                wrong.append(str(error))
                continue
            if len(data) != 1000 or len(set(data)) != 1:
                wrong.append(f"{len(data)} bytes {set(data)}")

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    try:
        for number in range(300):
            draft = Path(f"{published}.draft")
            draft.write_bytes(b"%d" % (number % 10) * 1000)
            try:
                os.rename(draft, published)
            except OSError as error:
                wrong.append(str(error))
    finally:
        over.set()
        for reader in readers:
            reader.join(60)
    assert wrong == []


def test_a_file_that_is_replaced_while_it_is_open_has_a_name_all_the_time(place: Place) -> None:
    published, missing = place.there / "published", []
    published.write_bytes(b"0")
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            if not published.exists():
                missing.append(1)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for number in range(100):
            with open(place.here / "published", "rb") as held:
                (place.here / "draft").write_bytes(b"%d" % (number + 1))
                os.rename(place.here / "draft", place.here / "published")
                assert held.read() == b"%d" % number
                assert os.fstat(held.fileno()).st_nlink == 0
    finally:
        over.set()
        looking.join()
    assert missing == []


def test_a_rename_that_is_refused_leaves_the_open_file_its_name_and_no_other(place: Place) -> None:
    (place.here / "file").write_bytes(b"file")
    (place.here / "directory").mkdir()
    with open(place.here / "file", "rb") as held:
        with pytest.raises(NotADirectoryError):
            os.rename(place.here / "directory", place.here / "file")
        with pytest.raises(FileNotFoundError):
            os.rename(place.here / "gone", place.here / "file")
        place.there.joinpath("moved").write_bytes(b"moved")
        assert (place.here / "moved").exists()
        place.there.joinpath("moved").rename(place.there / "elsewhere")  # by another client: the server refuses
        with pytest.raises(FileNotFoundError):
            os.rename(place.here / "moved", place.here / "file")
        assert sorted(os.listdir(place.there)) == ["directory", "elsewhere", "file"]
        assert held.read() == b"file" and os.fstat(held.fileno()).st_nlink == 1
    assert (place.here / "file").read_bytes() == b"file"
