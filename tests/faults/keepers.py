"""Real keepers over scripted daemons (`fake_daemon.py`), for the tests of the keeper."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from efcfs import control
from efcfs.cli.mount import KEEPER
from efcfs.keeper import directories
from tests.bed import is_mounted
from tests.place import wait_until
from tests.waiting import Waiting

FAKE = str(Path(__file__).with_name("fake_daemon.py"))


def fake(*faults: str) -> list[str]:
    """The argv of a scripted daemon."""
    return [sys.executable, "-S", "-E", FAKE, *faults]


class Kept:
    """A mount at `directory`/mnt that a keeper keeps."""

    def __init__(self, directory: Path, daemon: list[str], keeper: list[str] = KEEPER) -> None:
        self.path = directory / "mnt"
        self.path.mkdir(exist_ok=True)
        self.file = self.path / "file"
        self.log = directory / "log"
        self.diary = directory / "diary"
        self.daemon, self.keeper = daemon, keeper
        self.config = {"content": "first", "diary": str(self.diary)}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def request(self) -> dict[str, object]:
        return {
            "daemon": self.daemon, "config": self.config, "source": "nowhere:/at all", "mountpoint": str(self.path),
            "mount_flags": 0, "allow_other": True, "log": str(self.log), "verbose": True,
            "runtime_dir": str(control.runtime_dir(str(self.path), 0)),
            "state_dir": str(control.state_dir(str(self.path), 0)),
        }  # fmt: skip

    def start(self) -> dict[str, object]:
        """Start the keeper; returns what it tells the command."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            self.process = subprocess.Popen([*self.keeper, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd="/")
            theirs.close()
            ours.send(json.dumps(self.request).encode())
            ours.settimeout(30)
            answer: dict[str, object] = json.loads(ours.recv(65536))
        return answer

    def __enter__(self) -> "Kept":
        assert "ready" in self.start(), self.log.read_text()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGUSR1)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                for pid in (self.process.pid, *self.children()):
                    os.kill(pid, signal.SIGKILL)
                self.process.wait(5)
        while is_mounted(self.path):
            subprocess.run(["umount", "-l", self.path], check=True)
        for name in self.request["runtime_dir"], self.request["state_dir"]:
            directories.clear(str(name))

    @property
    def keeper_pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def daemons(self) -> list[int]:
        """The keeper's children that are at work."""
        at_work = {note["pid"] for note in self.notes("request")}
        return [pid for pid in self.children() if pid in at_work]

    def children(self) -> list[int]:
        """Those and the spare one."""
        path = Path(f"/proc/{self.keeper_pid}/task/{self.keeper_pid}/children")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return [int(pid) for pid in path.read_text().split()]
        return []

    @property
    def daemon_pid(self) -> int:
        (pid,) = self.daemons()
        return pid

    def notes(self, key: str) -> Iterator[dict[str, object]]:
        """What the daemons wrote down, oldest first."""
        for line in self.diary.read_text().splitlines():
            note = json.loads(line)
            if key in note:
                yield note

    def heard(self, word: str) -> list[dict[str, object]]:
        """The keeper's messages with that word."""
        said = [note["heard"] for note in self.notes("heard")]
        return [message for message in said if isinstance(message, dict) and word in message]

    def requests(self) -> list[dict[str, object]]:
        """What the keeper told each daemon that it started."""
        return [request for note in self.notes("request") if isinstance(request := note["request"], dict)]

    def ask_for_upgrade(self, daemon: Sequence[object], **config: str) -> None:
        """Have the daemon ask for it, as `efcfs upgrade` does."""
        asked = {"daemon": daemon, "config": {**self.config, **config} if config else None}
        path = control.runtime_dir(str(self.path), 0)
        (path / "ask.new").write_text(json.dumps(asked))
        (path / "ask.new").rename(path / "ask")

    def umount(self) -> None:
        subprocess.run(["umount", self.path], check=True)

    def assert_nothing_is_left(self) -> None:
        assert self.process is not None
        self.process.wait(10)
        assert not is_mounted(self.path)
        for name in control.runtime_dir(str(self.path), 0), control.state_dir(str(self.path), 0):
            wait_until(lambda name=name: not list(name.parent.glob(f"{name.name}*")))  # type: ignore[misc]


# Becomes the command with the fds as 3, 4, …, as a service manager starts it.
LAUNCHER = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(word), fcntl.F_DUPFD, 100) for word in sys.argv[1].split(",") if word]
for number, fd in enumerate(fds, 3):
    os.dup2(fd, number)
    os.close(fd)
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


# Opens a file, and prints what it reads at each offset that it is told.
READER = """
import os, sys
file = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
for line in sys.stdin:
    print(os.pread(file, 100, int(line)).decode(), flush=True)
"""


def reading(path: Path) -> Waiting:
    """A program with an open file in a mount; it reads at the offset that it is given. A program of its own: whoever
    keeps a mount's fd for a keeper that was killed must not wait for that mount, nor have its files open when it
    starts the next keeper."""
    reader = Waiting(READER, path)
    assert reader.told() == "open"
    return reader


class Manager:
    """What systemd does for a service with Type=notify and a store for fds."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)
        self.lines: list[str] = []
        self.store: dict[str, int] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self.socket, 4096, 8)
            lines = data.decode().split("\n")
            if lines == ["END"]:
                return
            name = next((line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")), "")
            if "FDSTORE=1" in lines:
                (self.store[name],) = fds
            if "FDSTOREREMOVE=1" in lines and name in self.store:
                os.close(self.store.pop(name))
            self.lines += lines

    def start(self, command: list[str], *more_fds: int, **options: Any) -> "subprocess.Popen[bytes]":
        """Start the service's process with what the store holds."""
        self.lines = []
        names, fds = ":".join(self.store), list(self.store.values())
        launcher = [sys.executable, "-S", "-c", LAUNCHER, ",".join(map(str, fds)), names]
        return subprocess.Popen(
            [*launcher, *command], pass_fds=[*fds, *more_fds],
            env={**os.environ, "NOTIFY_SOCKET": self.address}, **options,
        )  # fmt: skip

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"END", self.address)
        for fd in self.store.values():
            os.close(fd)
        self.socket.close()


class Managed(Kept):
    """A mount whose keeper is a service's process."""

    def __init__(self, directory: Path, daemon: list[str], manager: Manager) -> None:
        super().__init__(directory, daemon)
        self.manager = manager

    def start(self) -> dict[str, object]:
        request = os.memfd_create("request", 0)
        # Beyond the numbers that the launcher gives to the store's fds.
        memory = fcntl.fcntl(request, fcntl.F_DUPFD, 50)
        os.close(request)
        os.write(memory, json.dumps(self.request).encode())
        os.lseek(memory, 0, os.SEEK_SET)
        self.process = self.manager.start([*self.keeper, str(memory)], memory, cwd="/")
        os.close(memory)
        wait_until(lambda: "READY=1" in self.manager.lines)
        return {"ready": True}
