"""Names change while others list and open them: what one program did, every other sees at once."""

import os
import threading
from pathlib import Path

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
