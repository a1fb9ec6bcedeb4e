"""One daemon's process, as its keeper sees it: started, listened to, killed, reaped.

Nothing here waits: a killed daemon may sleep in the kernel until the next one answers the request it sleeps for.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import time

from efcfs.keeper import MESSAGE_BYTES

# A request that ends each daemon that reads it does so within milliseconds.
YOUNG_S = 0.25

log = logging.getLogger(__name__)

Message = dict[str, object]

# Ticks of the keeper without a beat. Not the clock: a machine that was paused has no hung daemon.
HANG_TICKS = 10
# Before its first word it has modules to load, perhaps from a cold disk.
START_TICKS = 60
# Keep freed megabytes: the daemon's next WRITE then has no page faults, 15 % faster in sequential writing.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
# Linux 6.9: a pidfd that tells of a thread, here the first one, whose end SIGKILL brings at once. The process has not
# ended before all of its threads have, and one may sleep in the kernel.
PIDFD_THREAD = os.O_EXCL
# The nice value of a daemon that nobody waits for: the one that serves has the processors before it.
BESIDE = 15
CAP_SYS_NICE = 23
# The service manager's, for the keeper alone.
OF_THE_KEEPER = {"NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}


class Daemon:
    """What it has said so far is in `said`; `gone` when it will say nothing more."""

    def __init__(self, argv: object) -> None:
        """Start it: it loads its modules and waits for a request. Raises OSError."""
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise OSError(f"{argv!r} names no program")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.set_inheritable(True)
        environment = {name: value for name, value in os.environ.items() if name not in OF_THE_KEEPER}
        try:
            self.pid = os.posix_spawnp(
                argv[0], [*argv, str(theirs.fileno())], {**environment, **MALLOC}, setpgroup=0,
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )  # fmt: skip
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self.born = born(self.pid)
        self.socket = ours
        # Readable when its first thread has ended, or before 6.9 all of them.
        try:
            self.end = os.pidfd_open(self.pid, PIDFD_THREAD)
        except OSError:
            self.end = os.pidfd_open(self.pid)
        self.said: Message = {}
        self.gone = False
        self.status: int | None = None
        self.silent_ticks = 0
        self.ready_at: float | None = None

    def say(self, message: Message, *fds: int) -> None:
        """What it does not take, since it is dead or stopped, is noticed elsewhere."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, BlockingIOError):
            socket.send_fds(self.socket, [json.dumps(message).encode()], fds)

    def hear(self) -> None:
        """Take in what it has said."""
        while not self.gone:
            try:
                data = self.socket.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                self.gone = True
                return
            self.silent_ticks = 0
            try:
                self.said.update(json.loads(data))
            except (ValueError, TypeError):
                log.warning("the daemon %d says what is no message: %r", self.pid, data[:100])
            if "ready" in self.said and self.ready_at is None:
                self.ready_at = time.monotonic()

    def ended(self, status: int) -> None:
        """The process is reaped."""
        self.hear()  # its last words
        self.status = status
        self.gone = True

    def look(self) -> None:
        """Is it killed, but keeps its socket, since a thread of it sleeps in the kernel? Then nothing more comes."""
        if not self.gone and dying(self.pid):
            self.hear()
            self.gone = True

    @property
    def hung(self) -> bool:
        return not self.gone and self.silent_ticks >= (HANG_TICKS if self.said else START_TICKS)

    @property
    def lost(self) -> bool:
        """Nothing is to be expected of it."""
        return self.gone or self.hung or "error" in self.said

    @property
    def young(self) -> bool:
        """Did it serve for too short a time to have died of anything but what it found?"""
        return self.ready_at is None or time.monotonic() - self.ready_at < YOUNG_S

    def stay_beside(self) -> None:
        """Work at a low priority until `come_forward`, if that can be taken back."""
        if may_raise_priority():
            set_nice(self.pid, BESIDE)

    def come_forward(self) -> None:
        """All threads get our own priority."""
        with contextlib.suppress(FileNotFoundError):
            for thread in os.listdir(f"/proc/{self.pid}/task"):
                set_nice(int(thread), os.getpriority(os.PRIO_PROCESS, 0))

    def close(self) -> None:
        self.socket.close()
        os.close(self.end)

    def kill(self) -> None:
        """With its children. Not once it is reaped: another process may have its number."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def how_it_ended(self) -> str:
        if "error" in self.said:
            return str(self.said["error"])
        status = self.status if self.status is not None else exit_status(self.pid)
        if status is None:
            return "killed, and its end is not in sight"
        code = os.waitstatus_to_exitcode(status)
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def may_raise_priority() -> bool:
    """By the capability, which counts in the first user namespace only."""
    with open("/proc/self/uid_map") as file:
        first = file.read().split() == ["0", "0", str(2**32 - 1)]
    with open("/proc/self/status") as file:
        (effective,) = (int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return first and bool(effective & 1 << CAP_SYS_NICE)


def set_nice(thread: int, nice: int) -> None:
    try:
        if os.getpriority(os.PRIO_PROCESS, thread) != nice:
            os.setpriority(os.PRIO_PROCESS, thread, nice)
    except ProcessLookupError:  # it has ended
        pass
    except PermissionError as error:
        log.warning("the priority of the daemon's thread %d stays as it is: %s", thread, error)


def reap() -> dict[int, int]:
    """The children that have ended, with their status; as process 1 of a container also those of others."""
    statuses: dict[int, int] = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            statuses[pid] = status
    return statuses


def born(pid: int) -> int:
    """When the process started, in ticks since boot: with its number it names a process. 0: it does not live."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    zombie = state in (b"Z", b"X") and int(fields[16]) <= 1  # one with threads left still holds its fds
    return 0 if zombie else int(fields[18])


def exit_status(pid: int) -> int | None:
    """What `waitpid` will tell of a zombie that has threads left; None when that is not known."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[48]) if state == b"Z" else None


def dying(pid: int) -> bool:
    """Whether it is a zombie, or SIGKILL is on its way to it."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file)
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = int(fields[b"SigPnd"], 16) | int(fields[b"ShdPnd"], 16)
    return fields[b"State"].split()[0] in (b"Z", b"X") or bool(pending & 1 << signal.SIGKILL - 1)
