"""The keeper: a small process that owns /dev/fuse and survives everything else.

It starts the daemon, which connects to the server first; then it mounts, reads the kernel's INIT request
and hands both to the daemon. When the daemon dies it starts another one over the same fd. It parses
nothing else, and imports nothing outside the standard library, not even of efcfs: it is run as a script
(`python -S keeper.py FD`), so there is never a reason to restart it.

Messages are JSON objects over SOCK_SEQPACKET sockets, one to the command that mounts, one to the daemon.
"""

import base64
import contextlib
import ctypes
import json
import logging
import logging.handlers
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

log = logging.getLogger("efcfs.keeper")

MESSAGE_BYTES = 65536
# Larger than any FUSE request: the kernel refuses to write one into less.
FUSE_BUFFER_BYTES = 1024 * 1024 + 4096
MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0
# Keep freed megabytes: the daemon's next WRITE then has no page faults, 15 % faster in sequential writing.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
MNT_DETACH = 2
EX_SYSTEM, EX_MOUNT = 2, 32
# Mount flags that fusermount3 takes besides nosuid and nodev, which it always sets.
USER_FLAGS = {1: "ro", 8: "noexec", 16: "sync", 128: "dirsync", 1024: "noatime"}

_libc = ctypes.CDLL(None, use_errno=True)


class MountFailed(Exception):
    """str() is the line for the user; `code` the command's exit code, as in mount(8)."""

    def __init__(self, message: str, code: int = EX_MOUNT) -> None:
        super().__init__(message)
        self.code = code


class Daemon:
    """A running daemon process and the socket to it."""

    def __init__(self, request: dict[str, object], started_at: float, *, patient: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = request["daemon"]
        assert isinstance(command, list)
        self.process = subprocess.Popen(
            [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], process_group=0,
            env={**os.environ, **MALLOC},
        )  # fmt: skip
        theirs.close()
        self.socket = ours
        self.send({**request, "keeper_pid": os.getpid(), "started_at": started_at, "patient": patient})

    def send(self, message: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.socket, [json.dumps(message).encode()], list(fds))

    def receive(self) -> dict[str, object]:
        """Its next message; {} when it is gone."""
        try:
            data = self.socket.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            return {}
        answer: dict[str, object] = json.loads(data) if data else {}
        return answer

    def expect(self, key: str) -> None:
        """Wait for the message that says `key`. Raises MountFailed with what the daemon says instead."""
        message = self.receive()
        if key in message:
            return
        if "error" in message:
            self.kill()
            raise MountFailed(str(message["error"]), int(str(message.get("code", EX_MOUNT))))
        raise MountFailed(f"the daemon ended too early ({self.how_it_ended()}): see the log", EX_SYSTEM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()

    def how_it_ended(self) -> str:
        status = self.process.wait()
        return f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"


def open_fuse() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MountFailed("/dev/fuse does not exist: load the module with `modprobe fuse`", EX_SYSTEM) from None
    except PermissionError:
        raise MountFailed("no permission to open /dev/fuse: check its mode, or give the container the device",
                          EX_SYSTEM) from None  # fmt: skip


def mount(source: str, mountpoint: str, flags: int, allow_other: bool) -> int:
    """Mount and return the fd of /dev/fuse. Raises MountFailed."""
    options = "default_permissions,max_read=1048576" + (",allow_other" if allow_other else "")
    if os.geteuid() != 0:
        return mount_without_root(source, mountpoint, flags, options)
    fd = open_fuse()
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,{options}"
    if _libc.mount(source.encode(), mountpoint.encode(), b"fuse.efcfs", ctypes.c_ulong(flags), data.encode()) != 0:
        error = ctypes.get_errno()
        os.close(fd)
        hint = ": mounting needs CAP_SYS_ADMIN" if error in (1, 13) else ""
        raise MountFailed(f"cannot mount at {mountpoint}: {os.strerror(error)}{hint}", EX_SYSTEM)
    return fd


def mount_without_root(source: str, mountpoint: str, flags: int, options: str) -> int:
    """fusermount3 opens and mounts, and hands the fd over a socket."""
    helper = shutil.which("fusermount3")
    if helper is None:
        raise MountFailed("fusermount3 is missing: install the package fuse3, or mount as root", EX_SYSTEM)
    ours, theirs = socket.socketpair()
    # A comma ends an option of fusermount3, unless a backslash is before it.
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    options = ",".join([options, f"fsname={name}", "subtype=efcfs", *(w for f, w in USER_FLAGS.items() if flags & f)])
    done = subprocess.run(
        [helper, "-o", options, "--", mountpoint], pass_fds=[theirs.fileno()],
        env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())}, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    theirs.close()
    if done.returncode != 0:
        raise MountFailed(f"cannot mount at {mountpoint}: {done.stderr.strip() or 'fusermount3 failed'}", EX_SYSTEM)
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(mountpoint: str) -> None:
    """Take the mount out of sight; it ends when nobody uses it any more."""
    if os.geteuid() == 0:
        _libc.umount2(mountpoint.encode(), MNT_DETACH)
    else:
        subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=False, stderr=subprocess.DEVNULL)


def set_read_ahead(mountpoint: str) -> None:
    """Let the kernel read ahead more than 128 KiB, whatever INIT says; only root can."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        devices = [line.split()[2] for line in mounts if line.split()[4] == escape(mountpoint)]
    path = f"/sys/class/bdi/{devices[-1]}/read_ahead_kb" if devices else ""
    try:
        with open(path, "w") as file:
            file.write("4096")
    except OSError as error:
        log.debug("read-ahead stays as it is: %s", error)


def escape(path: str) -> str:
    """As /proc/self/mountinfo writes it."""
    for character in "\\ \t\n":
        path = path.replace(character, f"\\{ord(character):03o}")
    return path


def run(request: dict[str, object], command: socket.socket) -> int:
    """Bring the mount up, tell the command, and keep it served until it is unmounted."""
    started_at = time.time()
    mountpoint, source = str(request["mountpoint"]), str(request["source"])
    daemon = Daemon(request, started_at, patient=False)
    stop = watch_signals()
    fd = -1
    try:
        ready, _, _ = select.select([daemon.socket, command, stop], [], [])
        if daemon.socket not in ready:
            daemon.kill()
            raise MountFailed("interrupted", EX_SYSTEM)
        daemon.expect("connected")
        fd = mount(source, mountpoint, int(str(request["mount_flags"])), bool(request["allow_other"]))
        init = base64.b64encode(os.read(fd, FUSE_BUFFER_BYTES)).decode()
        daemon.send({"serve": True, "init": init, "first": True}, (fd,))
        daemon.expect("ready")
        set_read_ahead(mountpoint)
        command.send(json.dumps({"ready": True, "keeper_pid": os.getpid()}).encode())
    except (MountFailed, OSError) as error:
        daemon.kill()
        if fd >= 0:
            unmount(mountpoint)
        code = error.code if isinstance(error, MountFailed) else EX_SYSTEM
        with contextlib.suppress(OSError):  # the command may have been interrupted
            command.send(json.dumps({"error": str(error), "code": code}).encode())
        return code
    command.close()
    log.info("%s mounted at %s", source, mountpoint)
    return keep(request, daemon, fd, init, stop, started_at)


def keep(
    request: dict[str, object], daemon: Daemon, fd: int, init: str, stop: socket.socket, started_at: float
) -> int:
    """Restart the daemon whenever it dies, until the mount ends."""
    mountpoint = str(request["mountpoint"])
    restarts: list[float] = []
    while True:
        ready, _, _ = select.select([daemon.socket, stop], [], [])
        if stop in ready:
            stop.recv(64)
            log.info("told to stop, unmounting %s", mountpoint)
            unmount(mountpoint)
            continue
        if "unmounted" in daemon.receive():
            daemon.process.wait()
            log.info("%s unmounted", mountpoint)
            return 0
        how = daemon.how_it_ended()
        if connection_ended(fd):
            log.info("%s unmounted, its daemon ended with %s", mountpoint, how)
            return 0
        log.error("the daemon of %s died (%s)", mountpoint, how)
        restarts = [t for t in restarts if t > time.monotonic() - RESTART_WINDOW_S]
        restarts.append(time.monotonic())
        if len(restarts) > MAX_RESTARTS:
            log.critical("%d daemons died in %.0f s: giving up, %s is unmounted", len(restarts), RESTART_WINDOW_S,
                         mountpoint)  # fmt: skip
            unmount(mountpoint)
            return 1
        daemon = Daemon(request, started_at, patient=True)
        # The server may be away for long, and the mount may be ended meanwhile.
        while not (ready := select.select([daemon.socket, stop], [], [], 1.0)[0]) and not connection_ended(fd):
            pass
        if daemon.socket not in ready:
            log.info("ending %s while no daemon serves it", mountpoint)
            unmount(mountpoint)
            daemon.kill()
            return 0
        try:
            daemon.expect("connected")
            daemon.send({"serve": True, "init": init, "first": False}, (fd,))
            daemon.expect("ready")
        except (MountFailed, BrokenPipeError) as error:
            log.error("no new daemon for %s: %s", mountpoint, error)


def is_keeper(pid: int) -> bool:
    """Whether a keeper lives under this pid: neither a zombie nor another program that got the number."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
            return b"keeper.py" in cmdline.read()
    except (FileNotFoundError, ProcessLookupError):
        return False


def connection_ended(fd: int) -> bool:
    """Whether the kernel has ended the connection. Only while no daemon serves: a poll costs it a wake-up a request."""
    poll = select.poll()
    poll.register(fd, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def watch_signals() -> socket.socket:
    """A socket that becomes readable at SIGTERM and SIGINT."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return ours


def main() -> int:
    command = socket.socket(fileno=int(sys.argv[1]))
    request = json.loads(command.recv(MESSAGE_BYTES))
    log_to(request["log"], bool(request["verbose"]))
    runtime = str(request["runtime_dir"])
    try:
        for kind in ("runtime_dir", "state_dir"):
            request[kind] = own_directory(str(request[kind]))
    except MountFailed as error:
        command.send(json.dumps({"error": str(error), "code": error.code}).encode())
        return error.code
    with open(os.path.join(request["runtime_dir"], "keeper.pid"), "w") as file:
        file.write(str(os.getpid()))
    link = f"{runtime}.{os.getpid()}.link"
    os.symlink(os.path.basename(request["runtime_dir"]), link)
    os.rename(link, runtime)
    try:
        return run(request, command)
    finally:
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(runtime) == os.path.basename(request["runtime_dir"]):
                os.unlink(runtime)
        for kind in ("runtime_dir", "state_dir"):
            shutil.rmtree(request[kind], ignore_errors=True)


def own_directory(name: str) -> str:
    """Make `name.PID`: a mount that was lazily unmounted may still live under the same name. Raises MountFailed.

    Directories of keepers that ended without cleaning up are removed.
    """
    base = os.path.dirname(name)
    os.makedirs(base, mode=0o700, exist_ok=True)
    status = os.lstat(base)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise MountFailed(f"{base} must be a directory of uid {os.geteuid()} that nobody else can write: remove it",
                          EX_SYSTEM)  # fmt: skip
    for entry in os.listdir(base):
        left, _, pid = entry.rpartition(".")
        if left == os.path.basename(name) and pid.isdecimal() and not is_keeper(int(pid)):
            shutil.rmtree(os.path.join(base, entry), ignore_errors=True)
    os.mkdir(f"{name}.{os.getpid()}", 0o700)
    return f"{name}.{os.getpid()}"


def log_to(target: str, verbose: bool) -> None:
    """To stderr, syslog, or a file of that name."""
    handler: logging.Handler = logging.StreamHandler()
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    if target == "syslog":
        handler = logging.handlers.SysLogHandler("/dev/log")
        line = "efcfs[%(process)d]: %(levelname)s %(name)s: %(message)s"
    elif target != "stderr":
        handler = logging.FileHandler(target)
    handler.setFormatter(logging.Formatter(line))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
