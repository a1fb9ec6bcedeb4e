"""The control socket: how commands talk to a mount's daemon, and where they find it.

Newline-delimited JSON over a Unix socket (0600): one request, one answer. The client side is synchronous
and imports no trio; it must answer within five seconds even when the daemon does not.
"""

import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import trio

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
AGAIN_S = 0.02
QUESTIONS = ("status", "config")  # they change nothing: asked again when the daemon dies before it answers
MAX_REQUEST_BYTES = 1024 * 1024

Answer = dict[str, object]
Command = Callable[[Answer], Coroutine[object, object, Answer]]


class NoAnswer(Exception):
    """The daemon cannot be asked; str() says why."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """One efcfs mount of this machine, from /proc/self/mountinfo; the mount itself was not touched."""

    mountpoint: str
    source: str
    uid: int

    @property
    def runtime_dir(self) -> Path:
        return runtime_dir(self.mountpoint, self.uid)

    @property
    def keeper_pid(self) -> int | None:
        try:
            return int((self.runtime_dir / "keeper.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def has_keeper(self) -> bool:
        return Path(f"/proc/{self.keeper_pid}").exists()


def mount_id(mountpoint: str) -> str:
    return blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()


def runtime_dir(mountpoint: str, uid: int) -> Path:
    """Where the mount's control socket and pid are."""
    if uid == 0:
        base = Path("/run/efcfs")
    elif Path(f"/run/user/{uid}").is_dir():
        base = Path(f"/run/user/{uid}/efcfs")
    else:
        base = Path(f"/tmp/efcfs-{uid}")
    return base / mount_id(mountpoint)


def state_dir(mountpoint: str, uid: int) -> Path:
    """Where the mount keeps what a new daemon must know: in memory, gone at reboot."""
    return Path(f"/dev/shm/efcfs-{uid}") / mount_id(mountpoint)


def cache_dir(uid: int) -> Path:
    """The memory tier of all mounts of a user: gone at reboot, not at umount."""
    return Path(f"/dev/shm/efcfs-{uid}/cache")


def mounts() -> list[Mounted]:
    """All efcfs mounts of this machine, in the order in which they were mounted."""
    found = []
    with open("/proc/self/mountinfo", "rb") as mountinfo:
        for line in mountinfo:
            before, _, after = line.partition(b" - ")
            fstype, source, options = after.split()
            if fstype != b"fuse.efcfs":
                continue
            uid = next((o[8:] for o in options.split(b",") if o.startswith(b"user_id=")), b"0")
            found.append(Mounted(_unescaped(before.split()[4]), _unescaped(source), int(uid)))
    return found


def find(path: str) -> Mounted | None:
    """The efcfs mount at `path`. Only the parent is resolved: the mount itself may hang."""
    parent, name = os.path.split(os.path.abspath(path))
    mountpoint = os.path.join(os.path.realpath(parent), name)
    return next((m for m in reversed(mounts()) if m.mountpoint == mountpoint), None)


def ask(mounted: Mounted, request: Answer, timeout_s: float = TIMEOUT_S) -> Answer:
    """Send one request to the mount's daemon; one that is being replaced is waited for. Raises NoAnswer."""
    ends = time.monotonic() + timeout_s
    while True:
        asked = False
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(max(ends - time.monotonic(), 0.001))
                sock.connect(str(mounted.runtime_dir / "control"))
                asked = True
                return _asked(sock, request)
        except TimeoutError:
            raise NoAnswer(f"the daemon did not answer in {timeout_s:g} s") from None
        except (OSError, ValueError) as error:
            again = (not asked or request["cmd"] in QUESTIONS) and time.monotonic() < ends
            if not (again and mounted.has_keeper()):
                raise NoAnswer(f"the daemon cannot be reached ({error})") from None
        time.sleep(AGAIN_S)


def _asked(sock: socket.socket, request: Answer) -> Answer:
    """Raises OSError, ValueError."""
    sock.sendall(json.dumps(request).encode() + b"\n")
    with sock.makefile("rb") as lines:
        line = lines.readline()
    if not line:
        raise ConnectionResetError("it ended before it answered")
    answer: Answer = json.loads(line)
    return answer


async def serve(path: Path, commands: Mapping[str, Command], connections: "trio.Nursery") -> None:
    """Answer requests at `path` until cancelled; only root and the daemon's own user are heard.

    Those that came are answered in `connections`, which may live longer.
    """
    import trio  # noqa: PLC0415  # the commands that only ask start without it

    path.unlink(missing_ok=True)
    # Not with trio's socket, which starts a thread to bind: 3 ms, for which programs wait in an upgrade.
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    path.chmod(0o600)
    listening.listen()
    sock = trio.socket.from_stdlib_socket(listening)

    async def answer_one(stream: trio.SocketStream) -> None:
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        _, uid, _ = struct.unpack("iII", credentials)
        line = b""
        async with stream:
            with trio.move_on_after(TIMEOUT_S):
                while not line.endswith(b"\n") and len(line) < MAX_REQUEST_BYTES:
                    piece = await stream.receive_some()
                    if not piece:
                        return
                    line += piece
            if line.endswith(b"\n"):
                answer = json.dumps(await _answer(line, uid, commands)).encode() + b"\n"
                with trio.move_on_after(TIMEOUT_S):
                    await stream.send_all(answer)

    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await answer_one(stream)
        except trio.BrokenResourceError:
            pass  # the command went away

    await trio.serve_listeners(guarded, [trio.SocketListener(sock)], handler_nursery=connections)


async def _answer(line: bytes, uid: int, commands: Mapping[str, Command]) -> Answer:
    if uid not in (0, os.geteuid()):
        return {"error": "this mount belongs to another user"}
    try:
        request = json.loads(line)
        command = commands[request["cmd"]]
    except (ValueError, KeyError, TypeError):
        return {"error": f"unknown request; there is {', '.join(commands)}"}
    try:
        return await command(request)
    except Exception as error:
        log.exception("bug: the command %s failed", request["cmd"])
        return {"error": f"internal error ({error}): see the log"}


def _unescaped(field: bytes) -> str:
    for character in b" \t\n\\":
        field = field.replace(b"\\%03o" % character, bytes([character]))
    return os.fsdecode(field)
