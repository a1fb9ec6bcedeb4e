"""A daemon by the keeper's contract, of the standard library only: it serves one file, and misbehaves as it is told.

Its config: `content` (bytes of /file, as text), `diary` (to this file it appends what the keeper says, as JSON lines).
Its arguments before the socket's number are its faults, see `Fake`. It asks for an upgrade when a file `ask` appears
in its runtime_dir, with what is in it.
"""

import contextlib
import errno
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from base64 import b64decode
from pathlib import Path

IN_HEADER, OUT_HEADER = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ")
ATTR = struct.Struct("=6Q10I")
LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, STATFS, FLUSH, INIT, INTERRUPT, BATCH_FORGET, OPENDIR = (
    1, 2, 3, 14, 15, 18, 17, 25, 26, 36, 42, 27
)  # fmt: skip
ROOT, FILE = 1, 2
DIRECT_IO = 1
RESEND = 7
# A READ from here on is taken, and never answered by a daemon that is told to `hold`.
HELD_OFFSET = 1 << 20


class Fake:
    """Faults: die, die-serving, error, silent (never connected), no-ready, no-drain, hold, no-beat, and
    deadlock (a thread of its own waits for a READ that is held). `once`: only in the first daemon."""

    def __init__(self, faults: set[str], keeper: socket.socket) -> None:
        self.keeper = keeper
        self.say(loaded=True)
        self.request = json.loads(keeper.recv(65536) or sys.exit(0))
        config = self.request["config"]
        self.content, self.diary = config["content"].encode(), config["diary"]
        again = self.request["failovers"] > 0
        self.faults = set() if "once" in faults and again else faults
        self.fuse = -1
        self.drained = self.orphaned = False
        self.beat_at = 0.0

    def note(self, message: dict[str, object]) -> None:
        line = json.dumps({"pid": os.getpid(), "content": self.content.decode(), **message}) + "\n"
        with open(self.diary, "a") as file:
            file.write(line)

    def say(self, **message: object) -> None:
        with contextlib.suppress(OSError):
            self.keeper.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)

    def run(self) -> int:
        self.note({"request": self.request})
        if "die" in self.faults:
            return 3
        if "error" in self.faults:
            self.say(error="the server is made of straw", code=32)
            return 1
        if "silent" not in self.faults:
            self.say(connected=True)
        asked = Path(self.request["runtime_dir"]) / "ask"
        while True:
            if time.monotonic() > self.beat_at + 1.0 and "no-beat" not in self.faults:
                self.say(beat=True)
                self.beat_at = time.monotonic()
            if asked.exists() and self.fuse >= 0:
                question = json.loads(asked.read_text())
                asked.unlink()
                self.say(upgrade=question)
            fds = [] if self.orphaned else [self.keeper.fileno()]
            fds += [self.fuse] if self.fuse >= 0 and not self.drained else []
            ready, _, _ = select.select(fds, [], [], 0.02)
            if self.fuse in ready and not self.serve():
                self.say(unmounted=True, dirty_bytes=0)
                return 0
            if self.keeper.fileno() in ready and (code := self.hear()) is not None:
                return code

    def hear(self) -> int | None:
        data, fds, _, _ = socket.recv_fds(self.keeper, 65536, 1)
        message = json.loads(data) if data else {}
        self.note({"heard": message})
        if not message:
            self.orphaned = True
            return None if self.fuse >= 0 else 0
        if "serve" in message:
            if "die-serving" in self.faults:
                return 4
            self.fuse = fds[0]
            if message["first"]:
                self.answer_init(b64decode(message["init"]))
            else:
                os.write(self.fuse, OUT_HEADER.pack(16, RESEND, 0))
            if "no-ready" not in self.faults:
                self.say(ready=True)
            if "deadlock" in self.faults:
                threading.Thread(target=self.wait_for_oneself, daemon=True).start()
        if "drain" in message and "no-drain" not in self.faults:
            self.drained = True
            self.say(drained=True)
        if "upgrade_failed" in message:
            self.drained = False
            if message["served"]:
                os.write(self.fuse, OUT_HEADER.pack(16, RESEND, 0))
        return 0 if "upgraded" in message else None

    def wait_for_oneself(self) -> None:
        fd = os.open(os.path.join(self.request["mountpoint"], "file"), os.O_RDONLY)
        os.pread(fd, 1, HELD_OFFSET)

    # -- the kernel ----------------------------------------------------------------------------------

    def answer_init(self, request: bytes) -> None:
        _, _, unique, *_ = IN_HEADER.unpack_from(request)
        body = struct.pack("=IIIIHHIIHHI28x", 7, 31, 131072, 0, 16, 12, 131072, 1, 32, 0, 0)
        os.write(self.fuse, OUT_HEADER.pack(16 + len(body), 0, unique) + body)

    def attributes(self, node: int) -> bytes:
        mode, size = (0o040755, 0) if node == ROOT else (0o100644, len(self.content))
        return ATTR.pack(node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def serve(self) -> bool:
        """Answer one request. False: there is no mount any more."""
        try:
            data = os.read(self.fuse, 1 << 21)
        except OSError as error:
            return error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN)
        _, opcode, unique, node, *_ = IN_HEADER.unpack_from(data)
        body, failure = b"", 0
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return True
        if opcode == GETATTR:
            body = struct.pack("=QII", 0, 0, 0) + self.attributes(node)
        elif opcode == LOOKUP and data[40:] == b"file\0":
            body = struct.pack("=QQQQII", FILE, 0, 0, 0, 0, 0) + self.attributes(FILE)
        elif opcode == LOOKUP:
            failure = errno.ENOENT
        elif opcode in (OPEN, OPENDIR):
            body = struct.pack("=QII", 0, DIRECT_IO, 0)
        elif opcode == READ:
            (offset,) = struct.unpack_from("=Q", data, 48)
            if offset >= HELD_OFFSET and "hold" in self.faults:
                self.note({"held": unique & ~(1 << 63)})
                return True
            body = self.content[offset:]
        elif opcode not in (RELEASE, FLUSH):
            failure = errno.ENOSYS
        with contextlib.suppress(FileNotFoundError):  # the program was killed
            os.write(self.fuse, OUT_HEADER.pack(16 + len(body), -failure, unique) + body)
        return True


if __name__ == "__main__":
    sys.exit(Fake(set(sys.argv[1:-1]), socket.socket(fileno=int(sys.argv[-1]))).run())
