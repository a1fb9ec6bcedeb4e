"""`efcfs upgrade`: another daemon, of another version or with other options, while the mount is used."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest

import efcfs
from tests.bed import Ganesha, Mount
from tests.bed import efcfs as command
from tests.place import Place, nice_values, wait_until
from tests.versions import other_version, upgrade
from tests.waiting import Waiting

MIB = 1024 * 1024


@pytest.fixture
def own(server: Ganesha, tmp_path: Path) -> Mount:
    mount = Mount(server, tmp_path / "mnt")
    mount.daemon_may_die = True
    return mount


def test_another_version_takes_over_with_files_open_and_bytes_unwritten(
    own: Mount, export: Path, tmp_path: Path
) -> None:
    newer = other_version(tmp_path / "newer", version=("__init__.py", efcfs.__version__, "99.0"))
    with own:
        here, before = Place.of(own, export).here, own.status()
        assert before["version"] == efcfs.__version__
        fds = [os.open(here / f"f{i}", os.O_RDWR | os.O_CREAT) for i in range(20)]
        for fd in fds:
            os.write(fd, b"before ")
        assert upgrade(own, "--python", str(newer)) == ""
        for fd in fds:
            os.write(fd, b"after")
        after = own.status()
        assert (after["version"], after["upgrades"], after["failovers"]) == ("99.0", 1, 0)
        assert after["daemon_pid"] != before["daemon_pid"] and after["keeper_pid"] == before["keeper_pid"]
        assert not Path(f"/proc/{before['daemon_pid']}").exists()
        assert upgrade(own) == ""  # and back
        assert own.status()["version"] == efcfs.__version__ and own.status()["upgrades"] == 2
        for fd in fds:
            assert os.pread(fd, 100, 0) == b"before after"
            os.close(fd)
        assert {path.read_bytes() for path in export.iterdir()} == {b"before after"}
        assert own.status()["open_handles"] == 0


@pytest.mark.parametrize("when", ["before serve", "after serve"])
def test_a_keeper_and_a_daemon_of_different_versions_ignore_what_the_other_does_not_know(
    server: Ganesha, export: Path, tmp_path: Path, when: str
) -> None:
    """The keeper that mounted stays, whatever comes after it, and its files may be gone by then."""
    serve = 'daemon.say({"serve": True, "init": init, "first": self.first}, self.fd)'
    omen = 'daemon.say({"omen": "a comet"})'
    words = [omen, serve] if when == "before serve" else [serve, omen]
    theirs = other_version(
        tmp_path / "theirs", version=("__init__.py", efcfs.__version__, "0.0.1"),
        key=("keeper/keep.py", '"last_exit": self.last_exit,\n', '"last_exit": self.last_exit, "omen": "a comet",\n'),
        words=("keeper/keep.py", serve, f"{words[0]}\n        {words[1]}"),
    )  # fmt: skip
    ready = "say(self._keeper, ready=True)"
    news = f'say(self._keeper, news="none")\n        {ready}'
    ours = other_version(tmp_path / "ours", words=("daemon.py", ready, news))
    mount = Mount(server, tmp_path / "mnt", python=theirs)
    mount.daemon_may_die = True
    with mount:
        here, before = Place.of(mount, export).here, mount.status()
        assert before["version"] == "0.0.1"
        fd = os.open(here / "file", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"theirs ")
        assert upgrade(mount, "--python", str(ours)) == ""
        (tmp_path / "theirs").rename(tmp_path / "gone")
        os.write(fd, b"ours ")
        os.kill(int(str(mount.status()["daemon_pid"])), signal.SIGKILL)
        os.write(fd, b"the next one's")
        after = mount.status()
        assert (after["version"], after["upgrades"], after["failovers"]) == (efcfs.__version__, 1, 1)
        assert after["keeper_pid"] == before["keeper_pid"] and after["last_exit"] == "signal SIGKILL"
        (tmp_path / "gone").rename(tmp_path / "theirs")
        assert upgrade(mount, "--python", str(theirs)) == ""  # and back
        assert mount.status()["version"] == "0.0.1"
        assert os.pread(fd, 100, 0) == b"theirs ours the next one's"
        os.close(fd)
        assert (export / "file").read_bytes() == b"theirs ours the next one's"


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
print("opened", flush=True)
sys.stdin.readline()
os.write(fd, b"-" * (48 << 20))
os.fsync(fd)
sys.stdin.readline()
os.pwrite(fd, b"only in the log", 0)
os.kill(int(open(sys.argv[2]).read().split()[0]), 9)
sys.stdin.readline()
"""


def test_the_old_daemon_changes_nothing_while_the_new_one_takes_over(
    server: Ganesha, own: Mount, export: Path, tmp_path: Path
) -> None:
    """What it would give back, the new one uses."""
    slowly = "await trio.sleep(3); on_ready(wire)\n"
    slow = other_version(tmp_path / "slow", ready=("fuse/session.py", "on_ready(wire)\n", slowly))
    with own:
        keeper = own.status()["keeper_pid"]
        daemons = Path(f"/proc/{keeper}/task/{keeper}/children")
        with Waiting(WRITER, Place.of(own, export).here / "file", daemons) as writer:
            assert writer.told() == "opened"
            server.pause()
            try:
                writer.go_on()
                told: list[str] = []
                upgrading = threading.Thread(target=lambda: told.append(upgrade(own, "--python", str(slow))))
                upgrading.start()
                wait_until(lambda: len(daemons.read_text().split()) == 2)
            finally:
                server.resume()
            upgrading.join(30)
            assert told == [""]
            writer.go_on()  # it kills the daemon before a WRITE can go out
            wait_until(lambda: (export / "file").read_bytes()[:15] == b"only in the log")
            writer.end()


def test_a_new_daemon_that_is_killed_before_it_serves_leaves_the_old_one(
    own: Mount, export: Path, tmp_path: Path
) -> None:
    slowly = "await trio.sleep(3); on_ready(wire)\n"
    slow = other_version(tmp_path / "slow", ready=("fuse/session.py", "on_ready(wire)\n", slowly))
    with own:
        here, before = Place.of(own, export).here, own.status()
        keeper = before["keeper_pid"]
        daemons = Path(f"/proc/{keeper}/task/{keeper}/children")
        fd = os.open(here / "file", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"before ")
        told: list[str] = []
        upgrading = threading.Thread(target=lambda: told.append(upgrade(own, "--python", str(slow))))
        upgrading.start()

        def new() -> list[int]:
            """It has been given the mount when it has the dirty log's files open."""
            found = []
            for pid in daemons.read_text().split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    if int(pid) != before["daemon_pid"] and "/dirty/seg" in Path(f"/proc/{pid}/maps").read_text():
                        found.append(int(pid))
            return found

        wait_until(lambda: len(new()) == 1)
        os.kill(new()[0], signal.SIGKILL)
        upgrading.join(30)
        assert "signal SIGKILL" in told[0]
        os.write(fd, b"after")
        os.close(fd)
        assert (export / "file").read_bytes() == b"before after"
        assert own.status()["daemon_pid"] == before["daemon_pid"] and own.status()["upgrades"] == 0


def test_a_version_that_keeps_its_state_otherwise_is_refused_and_the_old_one_goes_on(
    own: Mount, export: Path, tmp_path: Path
) -> None:
    other = other_version(tmp_path / "other", state=("vfs/handles.py", "STATE_VERSION = 1", "STATE_VERSION = 2"))
    with own:
        here, before = Place.of(own, export).here, own.status()
        fd = os.open(here / "file", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"one ")
        told = upgrade(own, "--python", str(other))
        assert "is not upgraded" in told and "state is of version 1, this efcfs has 2" in told
        os.write(fd, b"two")
        os.close(fd)
        assert (export / "file").read_bytes() == b"one two"
        assert own.status()["daemon_pid"] == before["daemon_pid"] and own.status()["upgrades"] == 0


def test_a_daemon_that_cannot_start_leaves_the_old_one(own: Mount, export: Path, tmp_path: Path) -> None:
    broken = other_version(tmp_path / "broken", store=("daemon.py", "store = open_store(config, request)", "1 / 0"))
    with own:
        before = own.status()
        assert "internal error (division by zero)" in upgrade(own, "--python", str(broken))
        (Place.of(own, export).here / "file").write_bytes(b"x")
        assert own.status()["daemon_pid"] == before["daemon_pid"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--python", "/nowhere/python"), "does not run"),
        (("--python", "/bin/false"), "cannot run efcfs"),
        (("-o", "ro"), "ro or rw cannot change while it is mounted"),
        (("-o", "consistency=immutable"), "cannot change while it is mounted"),
        (("-o", "noallow_other"), "allow_other cannot change"),
        (("-o", "noexec"), "cannot change while it is mounted"),
        (("-o", "nconect=8"), "did you mean nconnect?"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(
    mount: Mount, arguments: tuple[str, ...], told: str
) -> None:
    before = mount.status()["daemon_pid"]
    done = command("upgrade", *arguments, str(mount.path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and told in done.stderr
    assert mount.status()["daemon_pid"] == before


def test_a_place_that_is_no_mount_is_told(tmp_path: Path) -> None:
    done = command("upgrade", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "is not an efcfs mount" in done.stderr


def test_options_change_with_the_upgrade_and_stay_after_a_failover(own: Mount) -> None:
    with own:
        assert upgrade(own, "-o", "nconnect=7,mem=64m") == ""

        def links_and_memory() -> tuple[int, int]:
            links, tiers = own.status()["links"], own.status()["tiers"]
            assert isinstance(links, list) and isinstance(tiers, list)
            return len(links), tiers[0]["capacity_bytes"]

        assert links_and_memory() == (7 + 1, 64 * MIB)
        assert upgrade(own) == ""
        assert links_and_memory() == (7 + 1, 64 * MIB)
        # It was loaded beside the old one, which had the processors before it.
        assert nice_values(int(str(own.status()["daemon_pid"]))) == {0}


def test_versions_with_and_without_writemap_go_on_with_the_same_index_in_turn(
    own: Mount, export: Path, tmp_path: Path
) -> None:
    plain = other_version(
        tmp_path / "plain",
        writemap=("vfs/environment.py", "writemap=has_memory", "writemap=False"),
        map=("vfs/environment.py", "map_size=self._map_bytes", "map_size=4 << 30"),
    )
    with own:
        here = Place.of(own, export).here
        inodes: dict[str, int] = {}
        for turn in range(4):
            for i in range(300):
                (here / f"{turn}-{i}").write_bytes(b"%d" % i)
            inodes |= {entry.name: entry.inode() for entry in os.scandir(here)}
            assert upgrade(own, *([] if turn % 2 else ["--python", str(plain)])) == ""
            assert {name: (here / name).stat().st_ino for name in inodes} == inodes
        assert own.status()["upgrades"] == 4 and own.status()["failovers"] == 0


def test_a_new_daemon_that_fails_after_it_wrote_much_into_the_index_leaves_the_old_one(
    own: Mount, export: Path, tmp_path: Path
) -> None:
    much = """fs.adopt()
            from efcfs.nfs.nfs3 import Fattr
            from efcfs.vfs.inodes import Found
            inodes.enter(
                Found(ROOT_INO, b"%d" % i, b"handle %d" % i, Fattr(1, 0, 1, 0, 0, 0, 0, 0, 0, 1, i, 0, 0, 0))
                for i in range(10**9, 10**9 + 60_000)
            )
            1 / 0
"""
    failing = other_version(tmp_path / "failing", adopt=("vfs/filesystem.py", "fs.adopt()\n", much))
    with own:
        here, before = Place.of(own, export).here, own.status()
        assert "internal error (division by zero)" in upgrade(own, "--python", str(failing))
        for i in range(300):
            (here / f"{i}").write_bytes(b"%d" % i)
        assert own.status()["daemon_pid"] == before["daemon_pid"]
