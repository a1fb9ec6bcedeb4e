"""Names that are not there: how often the server is asked for them, and that what is there is found all the same."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from efcfs.nfs import nfs3
from tests.bed import Ganesha, Mount, Proxy
from tests.place import wait_until


@dataclass(frozen=True, slots=True)
class Watched:
    """A directory through a mount whose calls are counted (`here`), and as it lies on the server (`there`)."""

    mount: Mount
    proxy: Proxy
    here: Path
    there: Path

    def calls(self, *procedures: int) -> int:
        """How many of these have been sent so far."""
        return sum(self.proxy.calls[procedure] for procedure in procedures)

    def lookups(self) -> int:
        return self.calls(nfs3.NFSPROC3_LOOKUP)


WatchedFactory = Callable[..., Watched]


@pytest.fixture
def watched_factory(server: Ganesha, export: Path, tmp_path: Path) -> Iterator[WatchedFactory]:
    with ExitStack() as stack:

        def make(options: str = "") -> Watched:
            proxy = stack.enter_context(Proxy(server.port))
            mount = stack.enter_context(Mount(server, tmp_path / "mnt", options, port=proxy.port))
            return Watched(mount, proxy, mount.path / export.name, export)

        yield make


@pytest.fixture
def watched(watched_factory: WatchedFactory) -> Watched:
    return watched_factory()


def forget_names() -> None:
    """Make the kernel ask for every name again."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def change_there(directory: Path, name: str) -> None:
    """Make a file on the server, in another tick of its clock than the changes before."""
    before = directory.stat().st_mtime_ns
    (directory / name).write_bytes(b"theirs")

    def told() -> bool:
        os.utime(directory)
        return directory.stat().st_mtime_ns != before

    wait_until(told)


def test_files_are_made_in_a_directory_of_ours_without_a_lookup(watched: Watched) -> None:
    (watched.here / "made").mkdir()
    before = watched.lookups()
    for i in range(100):
        (watched.here / "made" / f"{i}").write_bytes(b"%d" % i)
    assert watched.lookups() == before
    assert sorted(os.listdir(watched.there / "made")) == sorted(f"{i}" for i in range(100))


def test_a_tree_is_made_with_a_lookup_of_its_root_alone(watched: Watched) -> None:
    before = watched.lookups()
    for i in range(10):
        for j in range(10):
            (watched.here / f"tree/{i}/{j}").mkdir(parents=True)
            os.symlink("target", watched.here / f"tree/{i}/{j}/link")
            os.mkfifo(watched.here / f"tree/{i}/{j}/fifo")
    assert watched.lookups() - before <= 4
    assert sum(len(names) + len(files) for _, names, files in os.walk(watched.there)) == 1 + 10 + 100 + 200


def test_in_a_directory_of_others_a_few_lookups_bring_a_listing_that_saves_the_rest(watched: Watched) -> None:
    for i in range(1000):
        (watched.there / f"theirs-{i}").touch()
    before = watched.lookups(), watched.calls(nfs3.NFSPROC3_READDIR, nfs3.NFSPROC3_READDIRPLUS)
    for i in range(100):
        (watched.here / f"ours-{i}").touch()
    assert watched.lookups() - before[0] < 20
    assert 0 < watched.calls(nfs3.NFSPROC3_READDIR, nfs3.NFSPROC3_READDIRPLUS) - before[1] <= 3
    before_stat = watched.lookups()
    assert all((watched.here / f"theirs-{i}").exists() for i in range(100))
    assert watched.lookups() - before_stat == 100  # of names that are there nothing is known


def test_a_directory_of_too_many_names_is_not_listed_again_and_again(watched: Watched) -> None:
    for i in range(12_000):
        os.close(os.open(watched.there / f"theirs-{i}", os.O_CREAT | os.O_WRONLY))
    for i in range(100):
        (watched.here / f"ours-{i}").touch()
    assert watched.lookups() >= 100
    assert watched.calls(nfs3.NFSPROC3_READDIR) <= 10


@pytest.mark.parametrize("options", ["lookupcache=positive", "lookupcache=none", "consistency=strict", "noac"])
def test_where_missing_names_may_not_be_believed_each_is_asked_for(
    watched_factory: WatchedFactory, options: str
) -> None:
    watched = watched_factory(options)
    (watched.here / "made").mkdir()
    before = watched.lookups()
    for i in range(20):
        (watched.here / "made" / f"{i}").touch()
        (watched.there / "made" / f"theirs-{i}").touch()
        assert (watched.here / "made" / f"theirs-{i}").exists()
    assert watched.lookups() - before >= 40


def test_another_clients_file_is_seen_after_acdirmin(watched_factory: WatchedFactory) -> None:
    watched = watched_factory("acdirmin=2,acdirmax=60")
    here, there = watched.here / "made", watched.there / "made"
    began = time.monotonic()
    here.mkdir()
    (there / "first").write_bytes(b"theirs")
    # They would hide it for ever, were it not for the set's age.
    while time.monotonic() < began + 3:
        (here / "ours").write_bytes(b"x")
        (here / "ours").unlink()
    assert (here / "first").read_bytes() == b"theirs"
    # Now a listing has been taken.
    for i in range(50):
        assert not (here / f"missing-{i}").exists()
    (there / "second").write_bytes(b"theirs")
    wait_until((here / "second").exists, timeout_s=4)


def test_another_clients_change_is_noticed_when_we_make_a_file(watched: Watched) -> None:
    here, there = watched.here / "made", watched.there / "made"
    here.mkdir()
    (here / "ours").touch()
    for i in range(10):
        change_there(there, f"theirs-{i}")
        (here / f"ours-{i}").touch()
        assert (here / f"theirs-{i}").read_bytes() == b"theirs"


def test_another_clients_file_that_was_listed_is_there(watched: Watched) -> None:
    here, there = watched.here / "made", watched.there / "made"
    here.mkdir()
    for i in range(10):
        (there / f"theirs-{i}").touch()
        (here / f"ours-{i}").touch()
        names = os.listdir(here)
        assert f"theirs-{i}" in names
        forget_names()
        assert all((here / name).exists() for name in names)


def test_a_name_that_another_client_has_taken_is_opened_or_refused(watched: Watched) -> None:
    (watched.here / "made").mkdir()
    for name in ("opened", "refused"):
        (watched.there / "made" / name).write_bytes(b"theirs")
    with open(watched.here / "made" / "opened", "a+b") as file:
        file.write(b" and ours")
    assert (watched.there / "made" / "opened").read_bytes() == b"theirs and ours"
    with pytest.raises(FileExistsError):
        (watched.here / "made" / "refused").touch(exist_ok=False)
    with pytest.raises(FileExistsError):
        (watched.here / "made" / "refused").mkdir()


def test_eight_threads_make_files_at_once_and_all_are_found(watched: Watched) -> None:
    (watched.here / "made").mkdir()
    before = watched.lookups()

    def make(thread: int) -> None:
        for i in range(100):
            (watched.here / "made" / f"{thread}-{i}").write_bytes(b"%d" % i)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(8)))
    assert watched.lookups() == before
    forget_names()
    for thread in range(8):
        for i in range(100):
            assert (watched.here / "made" / f"{thread}-{i}").read_bytes() == b"%d" % i


def test_names_that_were_linked_renamed_and_removed_are_found_where_they_are(watched: Watched) -> None:
    here, there = watched.here / "made", watched.there / "made"
    here.mkdir()
    (here / "in").mkdir()
    for i in range(20):
        (here / f"a{i}").write_bytes(b"%d" % i)
        os.link(here / f"a{i}", here / f"in/b{i}")
        os.rename(here / f"in/b{i}", here / f"c{i}")
        os.rename(here / f"a{i}", here / f"in/d{i}")
        with open(here / f"in/d{i}", "rb"):
            (here / f"in/d{i}").unlink()  # hidden until it is closed
        (here / f"e{i}").touch()
        os.rename(here / f"c{i}", here / f"e{i}")
        (here / f"A{i}").touch()
    (here / "in").rename(here / "out")
    (here / "f").mkdir()
    (here / "f").rmdir()
    for _ in range(2):
        for directory in ("", "in", "out"):
            names = os.listdir(there / directory) if (there / directory).exists() else []
            for name in {f"{letter}{i}" for i in range(20) for letter in "aAbcde"} | {"in", "out", "f"}:
                assert (here / directory / name).exists() == (name in names), name
        forget_names()
    assert all((here / f"e{i}").read_bytes() == b"%d" % i for i in range(20))


def test_the_next_daemon_asks_and_finds_what_others_made(watched: Watched) -> None:
    here, there = watched.here / "made", watched.there / "made"
    here.mkdir()
    (here / "ours").touch()
    (there / "theirs").touch()
    watched.mount.daemon_may_die = True
    os.kill(int(str(watched.mount.status()["daemon_pid"])), signal.SIGKILL)
    assert (here / "theirs").exists() and (here / "ours").exists()
    for i in range(100):
        (here / f"{i}").touch()
    assert len(os.listdir(there)) == 102
