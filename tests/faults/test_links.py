"""Links that are cut, frozen, slow or talk rubbish, by way of a proxy."""

import hashlib
import os
import random
import threading
import time
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount, Proxy
from tests.place import Place, links, wait_until


@pytest.fixture
def proxied(server: Ganesha, export: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A mount whose links to the NFS port go through a proxy."""
    with Proxy(server.port) as proxy, Mount(server, tmp_path / "mnt", "nconnect=4", port=proxy.port) as mount:
        yield proxy, Place.of(mount, export)


def read_and_write(place: Place, seconds: float, disturb) -> None:  # type: ignore[no-untyped-def]
    """Write and read while disturbing; every byte is compared by hash."""
    data = random.Random(1).randbytes(64 * 1024 * 1024)
    (place.there / "data").write_bytes(data)
    digest = hashlib.sha256(data).digest()
    wrong: list[str] = []
    stop = threading.Event()

    def reader() -> None:
        while not stop.is_set():
            with open(place.here / "data", "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if hashlib.sha256(file.read()).digest() != digest:
                    wrong.append("read")

    def writer() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            (place.here / f"copy{number}").write_bytes(data[:20_000_000])
            if (place.there / f"copy{number}").read_bytes() != data[:20_000_000]:
                wrong.append("write")
            os.unlink(place.here / f"copy{number}")

    threads = [threading.Thread(target=reader), threading.Thread(target=writer)]
    for thread in threads:
        thread.start()
    try:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            disturb()
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_cut_links_are_replaced_and_no_byte_is_wrong(proxied: tuple[Proxy, Place]) -> None:
    proxy, place = proxied

    def disturb() -> None:
        time.sleep(0.7)
        proxy.cut()

    read_and_write(place, 6, disturb)
    assert sum(int(link["reconnects"]) for link in links(place.mount)) >= 5


def test_a_frozen_link_is_drained_and_replaced(proxied: tuple[Proxy, Place]) -> None:
    proxy, place = proxied
    data = os.urandom(30 * 1024 * 1024)
    (place.there / "data").write_bytes(data)
    proxy.freeze(first=3)  # the connections that exist; new ones pass
    started = time.monotonic()
    assert (place.here / "data").read_bytes() == data
    assert time.monotonic() - started < 20
    assert any(link["reconnects"] for link in links(place.mount))


def is_quiet(proxy: Proxy) -> bool:
    before = proxy.bytes_to_client
    time.sleep(0.3)
    return proxy.bytes_to_client == before


def test_a_write_that_arrives_late_has_its_own_bytes(proxied: tuple[Proxy, Place]) -> None:
    """A link was given up with it, and what it was sent from was used for others since."""
    proxy, place = proxied
    fd = os.open(place.here / "late", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"0" * 1024 * 1024, 0)
    os.fsync(fd)
    proxy.freeze(first=proxy.connections)
    for offset in range(0, 16 * 131072, 131072):
        os.pwrite(fd, b"A" * 65536, offset)
    os.fsync(fd)  # by new links
    with open(place.here / "other", "wb", buffering=0) as other:
        for _ in range(64):
            other.write(b"B" * 1024 * 1024)
    answers = proxy.bytes_to_client
    proxy.thaw()
    wait_until(lambda: proxy.bytes_to_client > answers and is_quiet(proxy))  # the server has written it again
    late = (place.there / "late").read_bytes()
    assert {late[offset : offset + 65536] for offset in range(0, 16 * 131072, 131072)} == {b"A" * 65536}
    os.close(fd)


def test_a_mount_works_with_the_links_that_come_up(server: Ganesha, export: Path, tmp_path: Path) -> None:
    # Nobody listens at the second address.
    options = "nconnect=4,addr=127.0.0.1:127.0.0.9"
    with Mount(server, tmp_path / "mnt", options) as mount:
        place = Place.of(mount, export)
        data = os.urandom(5 * 1024 * 1024)
        (place.here / "file").write_bytes(data)
        assert (place.there / "file").read_bytes() == data
        states = {str(link["address"]): link["state"] for link in links(mount)}
        assert states["127.0.0.1"] == "up" and states["127.0.0.9"] == "connecting"


def test_reads_use_all_links_when_each_is_capped(proxied: tuple[Proxy, Place]) -> None:
    proxy, place = proxied
    data = os.urandom(48 * 1024 * 1024)
    (place.there / "data").write_bytes(data)
    proxy.cap_bytes_per_s = 8 * 1024 * 1024
    started = time.monotonic()
    assert (place.here / "data").read_bytes() == data
    elapsed_s = time.monotonic() - started
    # One link would take 6 s, four 1.5 s.
    assert elapsed_s < 3
