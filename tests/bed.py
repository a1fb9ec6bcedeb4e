"""The test bed: a real NFS server, a proxy that spoils links, and mounts of the command under test.

`python -m tests.bed serve DIRECTORY` runs a server until it is killed and prints its ports as JSON; the demo
and the benchmarks use that.
"""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from pathlib import Path
from types import TracebackType

READY_S = 30.0
MOST_PAUSE_S = 60.0
PR_SET_PDEATHSIG = 1
CLONE_NEWNS, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x4000, 1 << 18, 2
_libc = ctypes.CDLL(None, use_errno=True)

NFS, NFS4, PORTMAP = (100003, 3), (100003, 4), (100000, 2)


def free_port() -> int:
    """Below the ephemeral ports, or a client's connection may sit on it when the server restarts."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def answers_null(port: int, program: tuple[int, int], timeout_s: float = 1.0) -> bool:
    """Does an RPC program answer its NULL procedure (RFC 5531 §9)?"""
    call = struct.pack(">11I", 0x80000000 | 40, 7, 0, 2, *program, 0, 0, 0, 0, 0)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
            sock.settimeout(timeout_s)
            sock.sendall(call)
            reply = sock.recv(28)
    except OSError:
        return False
    return len(reply) == 28 and struct.unpack(">7I", reply)[1:4] == (7, 1, 0) and reply[-4:] == bytes(4)


def become(command: list[str]) -> None:
    """Become a server that dies with its parent, in a mount namespace without efcfs mounts.

    Ganesha looks at every mounted file system when it starts; one that waits for Ganesha would wait for ever.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if _libc.unshare(CLONE_NEWNS) != 0 or _libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        raise OSError(ctypes.get_errno(), "no mount namespace of its own for the server")
    with open("/proc/self/mounts", "rb") as mounts:
        for line in mounts.read().splitlines():
            if b" fuse.efcfs " in line:
                _libc.umount2(line.split()[1], MNT_DETACH)
    os.execvp(command[0], command)


def start_on_request(command: list[str]) -> None:
    """Start `command` for each line of stdin and print its pid, until stdin ends; the children end with us.

    Tests start servers through such a process: a child of one that has files of a hanging mount open closes
    them before it can exec, and so would wait for the very server that it is to become.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in sys.stdin:
        child = os.fork()
        if child == 0:
            become(command)
        print(child, flush=True)


def state(process: Path) -> str:
    """R, S, D, T … of a process or thread, from its directory in /proc."""
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def start_rpcbind() -> None:
    """One for the machine; left running, as a system's own would be."""
    if answers_null(111, PORTMAP):
        return
    with open(os.devnull, "w") as nowhere:
        subprocess.Popen(["rpcbind", "-w", "-f"], stdout=nowhere, stderr=nowhere, start_new_session=True)
    ends = time.monotonic() + READY_S
    while not answers_null(111, PORTMAP):
        assert time.monotonic() < ends, "rpcbind does not answer"
        time.sleep(0.05)


class Ganesha:
    """NFS-Ganesha exporting `directory` (made in `root`) as /export, on ports of its own."""

    export = "/export"

    def __init__(self, root: Path, squash: str = "No_Root_Squash", protocols: str = "3,4") -> None:
        self.root = root
        self.directory = root / "exported"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o777)
        self.port, self.mount_port = free_port(), free_port()
        self.config = root / "ganesha.conf"
        # Attr_Expiration_Time: tests also change files behind the server's back.
        self.config.write_text(
            f"""
            NFS_CORE_PARAM {{
                NFS_Port = {self.port}; MNT_Port = {self.mount_port}; NLM_Port = {free_port()};
                Bind_addr = 127.0.0.1; NFS_Protocols = {protocols}; Enable_RQUOTA = false; mount_path_pseudo = true;
            }}
            NFSv4 {{ Graceless = true; }}
            EXPORT {{
                Export_Id = 1; Path = {self.directory}; Pseudo = {self.export}; Access_Type = RW;
                Squash = {squash}; Anonymous_uid = 65534; Anonymous_gid = 65534; SecType = sys;
                Transports = TCP; Protocols = {protocols}; Attr_Expiration_Time = 0; FSAL {{ Name = VFS; }}
            }}
            EXPORT {{
                Export_Id = 2; Path = {root}; Pseudo = /denied; Access_Type = None; Transports = TCP;
                Protocols = {protocols}; FSAL {{ Name = VFS; }}
            }}
            """
        )
        self._started_s = 0
        self._starter: subprocess.Popen[str] | None = None
        self._pid = 0
        self._alarm: threading.Timer | None = None

    def __enter__(self) -> "Ganesha":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        start_rpcbind()
        if self._starter is None:
            files = ("-f", self.config, "-L", self.root / "ganesha.log", "-p", self.root / "pid")
            self._starter = subprocess.Popen(
                [sys.executable, "-S", __file__, "start", "ganesha.nfsd", "-F", *map(str, files)], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        assert self._starter.stdin is not None and self._starter.stdout is not None
        # Ganesha's write verifier is the second of its start: two lives within one second look like one.
        while int(time.time()) == self._started_s:
            time.sleep(0.01)
        self._started_s = int(time.time())
        self._starter.stdin.write("\n")
        self._starter.stdin.flush()
        self._pid = int(self._starter.stdout.readline())
        ends = time.monotonic() + READY_S
        while not (answers_null(self.port, NFS) or answers_null(self.port, NFS4)):
            assert time.monotonic() < ends, f"ganesha does not answer: see {self.root}/ganesha.log"
            time.sleep(0.05)

    def stop(self) -> None:
        if self._starter is None:
            return
        self._end(signal.SIGTERM)
        self._starter.communicate(timeout=10)
        self._starter = None

    def pause(self) -> None:
        """SIGSTOP: the machine's kernel still takes connections and bytes; nobody answers when this returns.

        Should the test wait for what only the server can give, it goes on after a minute, and `resume` fails.
        """
        os.kill(self._pid, signal.SIGSTOP)
        self._alarm = threading.Timer(MOST_PAUSE_S, os.kill, (self._pid, signal.SIGCONT))
        self._alarm.daemon = True
        self._alarm.start()
        ends = time.monotonic() + 10
        # A thread that runs on another processor goes on until the signal reaches it.
        while not all(state(task) == "T" for task in Path(f"/proc/{self._pid}/task").iterdir()):
            assert time.monotonic() < ends, "the server does not stop"
            time.sleep(0.001)

    def resume(self) -> None:
        """Does nothing to a server that is not paused."""
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            in_time = alarm.is_alive()
            alarm.cancel()
            os.kill(self._pid, signal.SIGCONT)
            assert in_time, f"something waited for the paused server for {MOST_PAUSE_S} s"

    def kill(self) -> None:
        """SIGKILL: the next `start` is another server life, with another write verifier."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """The server dies and comes back on the same ports."""
        self.kill()
        self.start()

    def _end(self, number: signal.Signals) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        ends = time.monotonic() + 10
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)
            os.kill(self._pid, number)
            while True:
                os.kill(self._pid, 0 if time.monotonic() < ends else signal.SIGKILL)
                time.sleep(0.01)


class Proxy:
    """A TCP proxy to one port of this machine, run by a thread a direction.

    delay_s is added to each round trip, half in each direction, without limiting what is under way;
    cap_bytes_per_s limits each connection towards the client.
    """

    def __init__(self, port: int, delay_s: float = 0.0, cap_bytes_per_s: float | None = None) -> None:
        self.target = port
        self.delay_s = delay_s
        self.cap_bytes_per_s = cap_bytes_per_s
        self.bytes_to_client = 0
        # How many calls passed, by procedure of NFSv3; those sent again count again.
        self.calls: Counter[int] = Counter()
        self.counting = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._frozen: set[socket.socket] = set()
        self._freeze_new = False
        self._thawed = threading.Event()

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refuse()
        self.cut()
        self.thaw()

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def cut(self) -> None:
        """Close all connections at once."""
        pairs, self._pairs = self._pairs, []
        for sock in (s for pair in pairs for s in pair):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def freeze(self, first: int | None = None) -> None:
        """Half-open: connections stay, carry nothing more: all and new ones, or the first so many that exist."""
        self._thawed.clear()
        self._freeze_new = first is None
        for pair in self._pairs[:first]:
            self._frozen.update(pair)

    def hold_answers(self) -> None:
        """What clients send still arrives; what comes back is held."""
        self._thawed.clear()
        self._frozen.update(server for _, server in self._pairs)

    def thaw(self) -> None:
        """What was held goes on its way."""
        self._freeze_new = False
        self._frozen.clear()
        self._thawed.set()

    def refuse(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._freeze_new:
                self._frozen.update((client, server))
            self._pairs.append((client, server))
            Pipe(self, client, server, to_client=False).start()
            Pipe(self, server, client, to_client=True).start()


class Pipe:
    """One direction of one connection: a thread that reads and one that writes when the time has come."""

    def __init__(self, proxy: Proxy, source: socket.socket, target: socket.socket, *, to_client: bool) -> None:
        self.proxy, self.source, self.target, self.to_client = proxy, source, target, to_client
        self.due: deque[tuple[float, bytes]] = deque()
        self.more = threading.Condition()
        self._head = b""
        self._rest_bytes = 0

    def start(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._write, daemon=True).start()

    def _read(self) -> None:
        while True:
            try:
                data = self.source.recv(262144)
            except OSError:
                data = b""
            if not self.to_client:
                self._count(data)
            if self.source in self.proxy._frozen:
                self.proxy._thawed.wait()
            with self.more:
                while len(self.due) > 64 and data:  # bounded memory; TCP pushes back
                    self.more.wait()
                self.due.append((time.monotonic() + self.proxy.delay_s / 2, data))
                self.more.notify_all()
            if not data:
                return

    def _count(self, data: bytes) -> None:
        """Calls, each in one fragment (RFC 5531 §11): mark, xid, CALL, RPC version, program, version, procedure."""
        while data:
            if self._rest_bytes:
                skipped = min(self._rest_bytes, len(data))
                self._rest_bytes -= skipped
                data = data[skipped:]
                continue
            missing = 28 - len(self._head)
            self._head, data = self._head + data[:missing], data[missing:]
            if len(self._head) == 28:
                mark, *_, procedure = struct.unpack(">7I", self._head)
                self._head, self._rest_bytes = b"", (mark & 0x7FFFFFFF) - 24
                with self.proxy.counting:
                    self.proxy.calls[procedure] += 1

    def _write(self) -> None:
        free_at = 0.0
        while True:
            with self.more:
                while not self.due:
                    self.more.wait()
                at, data = self.due.popleft()
                self.more.notify_all()
            cap = self.proxy.cap_bytes_per_s if self.to_client else None
            at = max(at, free_at)
            if (wait_s := at - time.monotonic()) > 0:
                time.sleep(wait_s)
            if cap:
                free_at = max(time.monotonic(), at) + len(data) / cap
            if self.to_client:
                self.proxy.bytes_to_client += len(data)
            try:
                if not data:
                    self.target.shutdown(socket.SHUT_WR)
                    return
                self.target.sendall(data)
            except OSError:
                with contextlib.suppress(OSError):
                    self.source.shutdown(socket.SHUT_RDWR)
                return


class Mount:
    """`efcfs mount` of a server's export at `path`, until the context ends."""

    def __init__(
        self, server: Ganesha, path: Path, options: str = "", *, port: int | None = None, python: Path | None = None
    ) -> None:
        """python: of another version of efcfs, which mounts."""
        self.path = path
        self.python = python
        ports = f"port={port or server.port},mountport={server.mount_port}"
        self.options = f"{ports},{options}" if options else ports
        self.source = f"127.0.0.1:{server.export}"
        # A test that kills the daemon says so; in any other it must not die, however well that is hidden.
        self.daemon_may_die = False
        self._daemon_pid: object = None

    def __enter__(self) -> "Mount":
        self.path.mkdir(parents=True, exist_ok=True)
        done = efcfs("mount", "-o", self.options, self.source, str(self.path), python=self.python)
        assert done.returncode == 0, done.stderr
        self._daemon_pid = self.status()["daemon_pid"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                efcfs("umount", "-f", str(self.path))
            elif is_mounted(self.path):
                status = self.status()
                self.umount()
                same = status.get("daemon_pid") == self._daemon_pid
                assert same or self.daemon_may_die, f"the daemon died or hung: {status}"
        finally:
            if is_mounted(self.path):  # the command failed: no later test may hang in what it left
                subprocess.run(["umount", "-l", self.path], check=False)

    def umount(self, *flags: str) -> None:
        done = efcfs("umount", *flags, str(self.path))
        assert done.returncode == 0, done.stderr

    def status(self) -> dict[str, object]:
        done = efcfs("status", "--json", str(self.path))
        assert done.returncode == 0, done.stderr
        (status,) = json.loads(done.stdout)
        assert isinstance(status, dict)
        return status


def is_mounted(path: Path) -> bool:
    """Without touching the mount, which may hang."""
    name = str(path.parent.resolve() / path.name).replace(" ", "\\040")
    return any(line.split()[1] == name for line in Path("/proc/self/mounts").read_text().splitlines())


def efcfs(*arguments: str, python: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command under test."""
    command = [str(python or sys.executable), "-m", "efcfs.cli.main", *arguments]
    directory = "/" if python is not None else None  # or -m finds the version that lies here
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=120)


def serve(directory: Path) -> None:
    """Run a server in `directory` until killed."""
    server = Ganesha(directory)
    with server:
        ports = {"port": server.port, "mountport": server.mount_port, "directory": str(server.directory)}
        print(json.dumps(ports), flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    if sys.argv[1:2] == ["start"]:
        start_on_request(sys.argv[2:])
        sys.exit()
    if len(sys.argv) != 3 or sys.argv[1] != "serve" or shutil.which("ganesha.nfsd") is None:
        sys.exit("usage: python -m tests.bed serve DIRECTORY   (needs nfs-ganesha: scripts/setup installs it)")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    serve(Path(sys.argv[2]).resolve())
