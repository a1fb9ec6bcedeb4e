"""Who waits here and is to wait no more: FUSE_INTERRUPT (Documentation/filesystems/fuse/fuse.rst in the kernel).

As with the kernel's NFS client only what ends the program ends a wait: a signal that it handles must not make stat(2)
fail with EINTR (Go's runtime sends some every few milliseconds). The kernel says once that there is a signal, and not
which one, so we look: SIGKILL waits for each thread of a program that is to end, whichever signal ended it. If there is
none, we look again, for one may follow.

A request that is given up is answered EINTR; the work goes on, for what has been sent cannot be undone. The kernel
refuses its late answer. What that gave, lookups and handles, is taken back then: no FORGET or RELEASE will come. And
the kernel has to ask again for the names that were changed. Nothing is noted of a request before its INTERRUPT comes.

The files of a program that was killed are closed, and for that FLUSH no signal is left to be told of. So those that
wait are looked at by themselves. A program that ends by itself waits: what it wrote is to be there when it has ended.
"""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import trio

from efcfs.fuse.direct import FUSE_CREATE, FUSE_LOOKUP, FUSE_OPEN, FUSE_SETATTR, Asked

LOOK_AGAIN_S = 0.5

# <linux/fuse.h>
FUSE_SYMLINK, FUSE_MKNOD, FUSE_MKDIR, FUSE_UNLINK, FUSE_RMDIR, FUSE_RENAME, FUSE_LINK = 6, 8, 9, 10, 11, 12, 13
FUSE_OPENDIR, FUSE_READDIRPLUS, FUSE_RENAME2 = 27, 44, 45
# How many bytes of a request come before its names. Those of a RENAME begin with the node id of the new directory.
_NAMES_AT = {
    FUSE_SYMLINK: 0, FUSE_MKNOD: 16, FUSE_MKDIR: 8, FUSE_UNLINK: 0, FUSE_RMDIR: 0, FUSE_LINK: 8, FUSE_CREATE: 16,
    FUSE_RENAME: 8, FUSE_RENAME2: 16,
}  # fmt: skip
_NODEID = _FH = struct.Struct("<Q")
_ENTRY_OUT_BYTES = 128
# The length of the name in struct fuse_dirent, which follows fuse_entry_out and ends with the name.
_NAME_LENGTH = struct.Struct("<I")
_NAME_LENGTH_AT = _ENTRY_OUT_BYTES + 16
_NAME_AT = _ENTRY_OUT_BYTES + 24

_SIGKILL_BIT = 1 << (9 - 1)
# Of /proc/PID/stat (proc(5): 31 and 52), counted from the state, the third, on: signals that wait for this thread, and
# what it exits with, which is the number of the signal that ended it.
_SIGNALS, _EXIT_CODE = 31 - 3, 52 - 3


class Unwanted(NamedTuple):
    """What must be taken back, and told, when the kernel refuses the answer to a request that is done."""

    # Node ids, and how many lookups of each the answer would have given.
    lookups: Sequence[tuple[int, int]] = ()
    # A handle of a file, one of a directory; 0: none.
    handle: int = 0
    directory: int = 0
    # Names that were changed, by the node ids of their directories; the kernel may have asked for them meanwhile.
    names: Sequence[tuple[int, bytes]] = ()
    # Whose attributes were changed; 0: nobody's.
    attributes_of: int = 0


def unwanted(asked: Asked, request: bytes, answer: bytes) -> Unwanted:
    """`request` and `answer`: without their heads. The answer is not one of an error."""
    opcode = asked.opcode
    names = _names(asked, request) if opcode in _NAMES_AT else ()
    if opcode in (FUSE_LOOKUP, FUSE_SYMLINK, FUSE_MKNOD, FUSE_MKDIR, FUSE_LINK):
        return Unwanted(_lookup(answer), names=names)
    if opcode == FUSE_CREATE:
        return Unwanted(_lookup(answer), handle=_handle(answer, _ENTRY_OUT_BYTES), names=names)
    if opcode == FUSE_OPEN:
        return Unwanted(handle=_handle(answer))
    if opcode == FUSE_OPENDIR:
        return Unwanted(directory=_handle(answer))
    if opcode == FUSE_READDIRPLUS:
        return Unwanted(_listed(answer))
    return Unwanted(names=names, attributes_of=asked.ino if opcode == FUSE_SETATTR else 0)


def _lookup(answer: bytes, at: int = 0) -> list[tuple[int, int]]:
    return [(*_NODEID.unpack_from(answer, at), 1)]


def _handle(answer: bytes, at: int = 0) -> int:
    (number,) = _FH.unpack_from(answer, at)
    return int(number)


def _listed(answer: bytes) -> list[tuple[int, int]]:
    lookups: list[tuple[int, int]] = []
    at = 0
    while at < len(answer):
        lookups += _lookup(answer, at)
        (length,) = _NAME_LENGTH.unpack_from(answer, at + _NAME_LENGTH_AT)
        at += (_NAME_AT + length + 7) & ~7
    return lookups


def _names(asked: Asked, request: bytes) -> list[tuple[int, bytes]]:
    first, _, rest = request[_NAMES_AT[asked.opcode] :].partition(b"\0")
    names = [(asked.ino, first)]
    if asked.opcode in (FUSE_RENAME, FUSE_RENAME2):
        names.append((*_NODEID.unpack_from(request), rest.partition(b"\0")[0]))
    return names


def is_killed(pid: int) -> bool:
    """Whether a signal is about to end the thread, or has done so. 25 µs."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False  # not ours to see: of another pid namespace, or hidden
    return bool(int(fields[_SIGNALS]) & _SIGKILL_BIT or int(fields[_EXIT_CODE]) & 0x7F)


class Interrupts:
    """Ends waits. `find`: the request of that number, if it is not answered; `flushing`: the numbers of FLUSHes."""

    def __init__(
        self, find: Callable[[int], Asked | None], give_up: Callable[[Asked], None], flushing: Callable[[], set[int]]
    ) -> None:
        self._find = find
        self._give_up = give_up
        self._flushing = flushing
        # Interrupted, but by nothing that ends a program.
        self._interrupted: set[int] = set()

    def interrupt(self, unique: int) -> None:
        """The kernel says that a signal came for who waits for this request."""
        self._interrupted.add(unique)
        self._look(unique)

    async def run(self) -> None:
        """Look again, until cancelled."""
        before: set[int] = set()
        while True:
            await trio.sleep(LOOK_AGAIN_S)
            flushing = self._flushing()
            for unique in self._interrupted | (flushing & before):
                self._look(unique)
                await trio.lowlevel.checkpoint()  # hundreds of them must not stop the loop
            before = flushing

    def _look(self, unique: int) -> None:
        asked = self._find(unique)
        if asked is not None and is_killed(asked.pid):
            self._give_up(asked)
            asked = None
        if asked is None:
            self._interrupted.discard(unique)
