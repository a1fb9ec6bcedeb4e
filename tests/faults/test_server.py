"""The server stops, dies and comes back while programs work."""

import hashlib
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event as EventType
from pathlib import Path

import pytest

from tests.bed import Ganesha, Mount
from tests.place import wait_until

FILE_BYTES = 8 * 1024 * 1024


class Worker:
    """Writes files, syncs some of them, reads them back; keeps what went wrong and the longest step.

    It runs in a process of its own, so that the test's process has no file of the mount open.
    """

    def __init__(self, directory: Path, seed: int, until: EventType) -> None:
        self.directory, self.until, self.rng = directory, until, random.Random(seed)
        self.seed = seed
        self.wrong: list[str] = []
        self.written: dict[str, str] = {}
        self.longest_s = 0.0

    def run(self, results: Connection) -> None:
        number = 0
        while not self.until.is_set():
            name = f"{self.seed}-{number}"
            number += 1
            started = time.monotonic()
            try:
                self.one(name)
            except OSError as error:
                self.wrong.append(f"{name}: {error}")
            self.longest_s = max(self.longest_s, time.monotonic() - started)
        results.send((self.wrong, self.written, self.longest_s))

    def one(self, name: str) -> None:
        data = self.rng.randbytes(self.rng.randrange(1, FILE_BYTES))
        path = self.directory / name
        with open(path, "wb", buffering=0) as file:
            for start in range(0, len(data), 300_000):
                file.write(data[start : start + 300_000])
            if self.rng.random() < 0.3:
                os.fsync(file.fileno())
        os.rename(path, final := path.with_suffix(".done"))
        os.mkdir(self.directory / f"{name}.d")
        os.rmdir(self.directory / f"{name}.d")
        with open(final, "rb") as reread:
            if reread.read() != data:
                self.wrong.append(f"{name}: read something else")
        self.written[final.name] = hashlib.sha256(data).hexdigest()


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ganesha]:
    with Ganesha(tmp_path_factory.mktemp("own-server")) as server:
        yield server


def under_load(directory: Path, there: Path, disturb: Callable[[], None], *, workers: int = 3) -> float:
    """Run `disturb` while workers work; all they wrote must be on the server. Returns the longest step."""
    fork = multiprocessing.get_context("fork")
    until = fork.Event()
    running = []
    for seed in range(workers):
        ours, theirs = fork.Pipe()
        process = fork.Process(target=Worker(directory, seed, until).run, args=(theirs,))
        process.start()
        theirs.close()
        running.append((process, ours))
    try:
        disturb()
    finally:
        until.set()
        results = [pipe.recv() if pipe.poll(60) else (["a worker hangs"], {}, 0.0) for _, pipe in running]
        for process, _ in running:
            process.join(5)
            process.kill()
    assert [w for wrong, _, _ in results for w in wrong] == []
    written = {name: digest for _, files, _ in results for name, digest in files.items()}
    assert len(written) >= workers
    for name, digest in written.items():
        assert hashlib.sha256((there / name).read_bytes()).hexdigest() == digest
    assert sorted(os.listdir(there)) == sorted(written)
    return float(max(longest_s for _, _, longest_s in results))


def test_a_server_stopped_for_five_seconds_costs_time_and_nothing_else(own_server: Ganesha, tmp_path: Path) -> None:
    def disturb() -> None:
        time.sleep(1)
        own_server.pause()
        try:
            time.sleep(5)
            assert mount.status()["server"] == {"state": "away"}
        finally:
            own_server.resume()
        time.sleep(2)
        wait_until(lambda: mount.status()["server"] == {"state": "up"})

    with Mount(own_server, tmp_path / "mnt") as mount:
        assert under_load(mount.path, own_server.directory, disturb) > 4


def test_a_server_killed_and_restarted_twice_under_load_loses_nothing(own_server: Ganesha, tmp_path: Path) -> None:
    def disturb() -> None:
        for _ in range(2):
            time.sleep(1.5)
            own_server.kill()
            time.sleep(1)
            own_server.start()
        time.sleep(2)

    with Mount(own_server, tmp_path / "mnt") as mount:
        under_load(mount.path, own_server.directory, disturb)


def test_bytes_that_a_dead_server_had_not_committed_are_written_again(own_server: Ganesha, tmp_path: Path) -> None:
    with Mount(own_server, tmp_path / "mnt") as mount:
        data = os.urandom(20 * 1024 * 1024)
        with open(mount.path / "file", "w+b", buffering=0) as file:
            file.write(data)
            os.stat(mount.path / "file")  # the WRITEs are done after this, and no COMMIT
            own_server.kill()
            # What a server that had not written its cache to disk would have lost:
            os.truncate(own_server.directory / "file", 1000)
            own_server.start()
            assert os.pread(file.fileno(), len(data), 0) == data
            os.fsync(file.fileno())
            assert (own_server.directory / "file").read_bytes() == data


def test_a_soft_mount_gives_up_after_timeo_times_retrans(own_server: Ganesha, tmp_path: Path) -> None:
    with Mount(own_server, tmp_path / "mnt", "soft,timeo=10,retrans=2,noac") as mount:
        own_server.pause()
        try:
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                os.stat(mount.path / "file")
            assert 1.5 < time.monotonic() - started < 6
        finally:
            own_server.resume()
        wait_until(lambda: os.listdir(mount.path) == [])


def test_umount_f_returns_in_five_seconds_with_the_server_away(own_server: Ganesha, tmp_path: Path) -> None:
    mount = Mount(own_server, tmp_path / "mnt", "noac")
    with mount:
        own_server.pause()
        try:
            stuck = threading.Thread(target=lambda: _ignoring_errors(mount.path / "file"))
            stuck.start()
            started = time.monotonic()
            mount.umount("-f")
            assert time.monotonic() - started < 5
            stuck.join(5)
            assert not stuck.is_alive()
            assert not os.path.ismount(mount.path)
        finally:
            own_server.resume()


def _ignoring_errors(path: Path) -> None:
    try:
        os.stat(path)
    except OSError:
        pass
