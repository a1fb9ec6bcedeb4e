"""The kernel's requests before libfuse sees them: one reader of /dev/fuse, outside trio's turns.

READ, WRITE, FORGET and what `direct.py` has are served here; all else goes on to libfuse through the socketpair that
it takes for /dev/fuse, and its answers come back that way. There are four reasons:

* Speed. A turn of trio's loop and pyfuse3's workers take some 25 µs, a third of a 64 KiB read. So requests are read in
  `before_io_wait`, where trio is about to sleep: we sleep in its place, waiting for the kernel, for the server's
  answers and for trio's own epoll at once. What memory can answer, and what takes a call to the server or two
  (`nfs/light.py`), is answered without waking trio at all.
* No copy. What a program writes stays in the buffer into which the kernel put it, which is the dirty log's.
* Node ids. Once an open(2) was answered ENOSYS, as on immutable mounts, READs carry no handle, and pyfuse3 passes
  `read` nothing else. (Open, read, close of 10,000 files in the page cache: 5.5 x tmpfs with OPEN and RELEASE, 0.9 x
  without.)
* Failover. A request's number, and whether the kernel sends it again because a daemon died over it, is nothing that
  libfuse passes on. So the pid in a request's header is replaced by a token for all three (`Wire.asked`).

Nothing here may wait but `_serve`, and what raises ends the daemon: trio takes out an instrument that does.
"""

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, Protocol

import trio
from pyfuse3 import FUSEError

from efcfs.fuse.direct import FUSE_FLUSH, Asked, Later, Served, told
from efcfs.fuse.interrupts import Interrupts, Unwanted, unwanted
from efcfs.nfs.light import Light
from efcfs.nfs.nursery import open_nursery
from efcfs.vfs.writer import Taken

# <linux/fuse.h>
FUSE_FORGET, FUSE_READ, FUSE_WRITE, FUSE_READDIR, FUSE_INTERRUPT = 2, 15, 16, 28, 36
FUSE_BATCH_FORGET, FUSE_READDIRPLUS = 42, 44
# struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid
_IN = struct.Struct("<IIQQIII4x")
# The same begin of fuse_read_in and fuse_write_in: fh, offset, size
_RANGE = struct.Struct("<QQI")
_WRITTEN_AT = _IN.size + 40
_LISTED_AT = _IN.size + 16
_LISTED = struct.Struct("<I")
_TOKEN = struct.Struct("<I")
_LOOKUPS = struct.Struct("<Q")
_INTERRUPTED = struct.Struct("<Q")
_FORGOTTEN = struct.Struct("<QQ")
_FORGOTTEN_AT = _IN.size + 8
# struct fuse_out_header: len, error, unique; with a fuse_write_out: size
_OUT = struct.Struct("<IiQ")
_WROTE = struct.Struct("<IiQI4x")

# No answer of libfuse is longer than this.
ANSWER_BYTES = 64 * 1024
_PID_AT = 32
# Requests under way at once are far fewer than tokens; uniques come in steps of two, with a bit for what comes again.
_TOKENS = 1 << 30
SOCKET_BYTES = 32 * 1024 * 1024
SO_SNDBUFFORCE = 32
# Tasks that are ready to run, and the server's answers, wait for no more requests than these.
IN_A_ROW = 16


class Files(Protocol):
    """Who serves READ, WRITE and FORGET. All may raise FUSEError. `fh` is 0 for files that were not opened."""

    def attend(self) -> int:
        """From now on `arrived` is called whenever this file is readable, until `leave` is."""

    def arrived(self) -> None:
        """Take the server's answers."""

    def leave(self) -> None: ...

    served: dict[int, Served]
    """Other kinds of requests, by opcode."""

    def buffer(self) -> memoryview:
        """Where the next request goes, good until the next await: if it is a WRITE, its bytes may stay there."""

    def read_at_once(self, fh: int, ino: int, offset: int, size_bytes: int) -> memoryview | bytes | None:
        """The bytes if memory has them."""

    async def read_later(
        self, asked: Asked, fh: int, offset: int, size_bytes: int
    ) -> memoryview | bytes:
        """The bytes; good until the next await."""

    def write_at_once(self, fh: int, offset: int, data: memoryview) -> Taken | None:
        """Keep the bytes, which lie in the buffer; None: there is no room for them."""

    async def taken(self, fh: int) -> None:
        """Wait until bytes that were kept may be answered."""

    async def write_later(self, fh: int, offset: int, data: memoryview) -> None: ...

    def forgotten(self, inodes: list[tuple[int, int]]) -> None:
        """Node ids and how many lookups of each the kernel takes back."""

    async def take_back(self, what: Unwanted) -> None:
        """What an answer gave that the kernel did not want any more. Raises nothing that is not the daemon's end."""


class Room(NamedTuple):
    """What the socketpair takes of libfuse: requests under way at once, and bytes of names in one answer."""

    requests: int
    listed_bytes: int


def widen(ours: socket.socket, libfuse: socket.socket, most_requests: int) -> Room:
    """Make room for answers: libfuse writes them from our own thread, so nobody could empty a socket that is full."""
    listed_bytes = 32 * 1024
    for end in (ours, libfuse):
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BYTES)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)  # as much as net.core.wmem_max allows
            listed_bytes = 4096
    # An answer takes up to twice its size; no other one is longer than a path.
    there_bytes = libfuse.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return Room(min(most_requests, there_bytes // (2 * listed_bytes)), listed_bytes)


class Wire(trio.abc.Instrument):
    """Between /dev/fuse and libfuse; `run` must be running."""

    def __init__(
        self, fuse_fd: int, libfuse: socket.socket, listed_bytes: int, files: Files, serving: trio.CancelScope
    ) -> None:
        """`serving`: all that serves the mount."""
        os.set_blocking(fuse_fd, False)
        libfuse.setblocking(False)
        self._fuse_fd = fuse_fd
        self._libfuse = libfuse
        self._libfuse_fd = libfuse.fileno()
        self._listed_bytes = listed_bytes
        self._files = files
        self._token = trio.lowlevel.current_trio_token()
        self._ended = trio.Event()
        self._error: BaseException | None = None
        # A request for which libfuse's socket has no room yet; no other one is read until it has.
        self._held: bytes | None = None
        # Requests passed on and not yet answered, by their tokens: with what follows their heads.
        self._with_libfuse: dict[int, tuple[Asked, bytes]] = {}
        # Served here and not yet answered, by their numbers: with the light coroutine that does so, or what cancels it.
        self._waiting: dict[int, tuple[Asked, Light | trio.CancelScope | None]] = {}
        self._interrupts = Interrupts(self._unanswered, self._give_up, self._flushing)
        self._taking = True
        self._drained = trio.Event()
        self.replaced = False
        self._serving = serving
        self._tasks_are_ready = False
        self._arrivals_fd = files.attend()
        self._loop_fd = _epoll_fd(self._arrivals_fd)
        # Not poll(2), which asks all three before and after it sleeps: 4 KiB writes go 10 % faster.
        self._poll = select.epoll()
        self._poll.register(self._loop_fd, select.EPOLLIN)
        self._poll.register(self._arrivals_fd, select.EPOLLIN)
        self._poll.register(libfuse, select.EPOLLIN)
        self._poll.register(fuse_fd, select.EPOLLIN)

    async def run(self) -> None:
        """Until the mount has ended. Raises OSError when /dev/fuse fails, and what is a bug in `files`."""
        async with open_nursery() as self._nursery:
            trio.lowlevel.add_instrument(self)
            self._nursery.start_soon(self._interrupts.run)
            try:
                await self._ended.wait()
            finally:
                if self._error is None:
                    trio.lowlevel.remove_instrument(self)
                self._poll.close()
                self._files.leave()
                for _, waiting in self._waiting.values():
                    if isinstance(waiting, Light):
                        waiting.become_task()  # and be cancelled as one
                self._nursery.cancel_scope.cancel()
            if self._error is not None:
                raise self._error

    def asked(self, token: int) -> Asked:
        """What is behind the pid that libfuse was told."""
        return self._with_libfuse[token][0]

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and let those under way end. False: some have not; another daemon gets them again."""
        if self._taking and self._held is None:
            self._poll.unregister(self._fuse_fd)
        self._taking = False
        self._drained = trio.Event()
        self._note_drained()
        with trio.move_on_after(timeout_s) as scope:
            await self._drained.wait()
        return not scope.cancelled_caught

    def _note_drained(self) -> None:
        if not self._taking and not self._with_libfuse and not self._waiting:
            self._drained.set()

    def resume(self) -> None:
        """Go on after `drain`, if there was one."""
        if self._taking:
            return
        self._taking = True
        if self._held is None:
            self._poll.register(self._fuse_fd, select.EPOLLIN)

    def end(self) -> None:
        """Another daemon serves now; what is still under way here is its."""
        self.replaced = True
        self._serving.cancel()

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        """Called by trio when a task becomes ready to run."""
        self._tasks_are_ready = True

    def before_io_wait(self, timeout: float) -> None:
        """Called by trio when it has run all tasks that were ready; 0 seconds: others are ready by now."""
        self._tasks_are_ready = timeout <= 0
        try:
            if not self._ended.is_set() and not self._serve(timeout) and timeout > 0:
                self._wake()
        except BaseException as error:
            self._error = error
            self._ended.set()
            self._wake()
            raise  # trio logs it and calls us no more

    def _wake(self) -> None:
        """Make trio's sleep end at once: it has decided for how long before it called us."""
        self._token.run_sync_soon(_nothing)

    def _serve(self, timeout: float) -> bool:
        """Serve requests while trio has nothing to do. True: its epoll has events, so that it will not sleep."""
        ends = time.monotonic() + timeout
        turns = 0
        while not self._ended.is_set():
            timeout = 0.0 if self._tasks_are_ready else max(0.0, ends - time.monotonic())
            ready = dict(self._poll.poll(timeout))
            turns += 1
            # The kernel's requests first: most are short, and another one may wait for each (for the lock of a
            # directory, say). 8 clients create files 20 % faster than with whatever comes first.
            if self._fuse_fd in ready:
                self._take()
                if turns % IN_A_ROW:
                    continue
            if self._arrivals_fd in ready:
                self._files.arrived()
            if self._libfuse_fd in ready:
                self._answers(ready[self._libfuse_fd])
            if self._loop_fd in ready:
                return True
            if not ready or (not timeout and turns >= IN_A_ROW):
                return False  # for tasks that are ready, or whose time has come
        return False

    def _take(self) -> None:
        """Read a request and serve it or pass it on."""
        try:
            buffer = self._files.buffer()
            request = buffer[: os.readv(self._fuse_fd, (buffer,))]
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.ENOENT, errno.EINTR):
                return  # who asked was interrupted before we had it
            if error.errno != errno.ENODEV:
                raise
            self._ended.set()
            return
        _, opcode, unique, ino, uid, gid, pid = _IN.unpack_from(request)
        if opcode == FUSE_READ:
            fh, offset, size_bytes = _RANGE.unpack_from(request, _IN.size)
            try:
                there = self._files.read_at_once(fh, ino, offset, size_bytes)
            except FUSEError as error:
                self._refuse(unique, error)
                return
            if there is not None:
                self._tell((_OUT.pack(_OUT.size + len(there), 0, unique), there))
                return
            asked = Asked(opcode, unique, ino, uid, gid, pid)
            self._waiting[unique] = asked, None
            self._nursery.start_soon(self._read, asked, fh, offset, size_bytes)
        elif opcode == FUSE_WRITE:
            fh, offset, size_bytes = _RANGE.unpack_from(request, _IN.size)
            data = request[_WRITTEN_AT:]
            try:
                taken = self._files.write_at_once(fh, offset, data)
            except FUSEError as error:
                self._refuse(unique, error)
                return
            if taken is Taken.ANSWER:
                self._tell((_WROTE.pack(_WROTE.size, 0, unique, size_bytes),))
                return
            scope: trio.CancelScope | None = None
            wait = partial(self._files.taken, fh)
            if taken is None:
                # Who is interrupted may have closed the file when there is room, so nothing is to be kept then.
                scope = trio.CancelScope()
                wait = partial(_unless, scope, partial(self._files.write_later, fh, offset, memoryview(bytes(data))))
            self._waiting[unique] = Asked(opcode, unique, ino, uid, gid, pid), scope
            self._nursery.start_soon(self._write, unique, size_bytes, wait)
        elif opcode in self._files.served:
            asked = Asked(opcode, unique, ino, uid, gid, pid)
            self._serve_one(self._files.served[opcode], asked, request[_IN.size :])
        elif opcode == FUSE_FORGET:
            self._files.forgotten([(ino, _LOOKUPS.unpack_from(request, _IN.size)[0])])
        elif opcode == FUSE_BATCH_FORGET:
            self._files.forgotten(list(_FORGOTTEN.iter_unpack(request[_FORGOTTEN_AT:])))
        elif opcode == FUSE_INTERRUPT:
            self._interrupts.interrupt(*_INTERRUPTED.unpack_from(request, _IN.size))
        else:
            if opcode in (FUSE_READDIR, FUSE_READDIRPLUS):
                (size_bytes,) = _LISTED.unpack_from(request, _LISTED_AT)
                _LISTED.pack_into(request, _LISTED_AT, min(size_bytes, self._listed_bytes))
            token = _token(unique)
            self._with_libfuse[token] = Asked(opcode, unique, ino, uid, gid, pid), bytes(request[_IN.size :])
            _TOKEN.pack_into(request, _PID_AT, token)
            self._pass_on(request)

    def _serve_one(self, served: Served, asked: Asked, body: memoryview) -> None:
        try:
            answer = served.at_once(asked, body) if served.at_once is not None else None
        except Exception as error:
            self._refuse(asked.unique, told("request", error))
            return
        if answer is not None:
            self._tell((_OUT.pack(_OUT.size + len(answer), 0, asked.unique), answer))
            return
        light = Light(self._nursery)
        self._waiting[asked.unique] = asked, light
        light.run(self._later(served.later, asked, bytes(body)))

    async def _later(self, later: Later, asked: Asked, body: bytes) -> None:
        try:
            answer = await later(asked, body)
        except Exception as error:
            self._refuse(asked.unique, told(later.__name__, error))
        else:
            if not self._tell((_OUT.pack(_OUT.size + len(answer), 0, asked.unique), answer)):
                self._take_back(asked, body, answer)
        finally:
            self._answered(asked.unique)

    def _answered(self, unique: int) -> None:
        del self._waiting[unique]
        self._note_drained()

    def _pass_on(self, request: bytes | memoryview) -> None:
        try:
            self._libfuse.send(request)
        except BlockingIOError:
            if self._held is None:
                self._poll.unregister(self._fuse_fd)
                self._poll.modify(self._libfuse, select.EPOLLIN | select.EPOLLOUT)
                self._held = bytes(request)
            return
        if self._held is not None:
            self._held = None
            if self._taking:
                self._poll.register(self._fuse_fd, select.EPOLLIN)
            self._poll.modify(self._libfuse, select.EPOLLIN)

    def _answers(self, event: int) -> None:
        """Carry libfuse's answers to the kernel: all that are there, so that none is older than a turn of the loop."""
        if event & select.EPOLLIN:
            while self._with_libfuse:
                try:
                    answer = self._libfuse.recv(ANSWER_BYTES)
                except BlockingIOError:
                    break
                wanted = self._tell((answer,))
                _, error, unique = _OUT.unpack_from(answer)
                asked = self._with_libfuse.pop(_token(unique), None)
                if not wanted and not error and asked is not None:
                    self._take_back(*asked, answer[_OUT.size :])
            self._note_drained()
        if event & select.EPOLLOUT and self._held is not None:
            self._pass_on(self._held)

    async def _read(self, asked: Asked, fh: int, offset: int, size_bytes: int) -> None:
        try:
            data = await self._files.read_later(asked, fh, offset, size_bytes)
        except FUSEError as error:
            self._refuse(asked.unique, error)
        else:
            self._tell((_OUT.pack(_OUT.size + len(data), 0, asked.unique), data))
        finally:
            self._answered(asked.unique)

    async def _write(self, unique: int, size_bytes: int, wait: Callable[[], Awaitable[None]]) -> None:
        try:
            await wait()
        except FUSEError as error:
            self._refuse(unique, error)
        else:
            self._tell((_WROTE.pack(_WROTE.size, 0, unique, size_bytes),))
        finally:
            self._answered(unique)

    # -- who does not wait any more ------------------------------------------------------------------

    def _flushing(self) -> set[int]:
        return {unique for unique, (asked, _) in self._waiting.items() if asked.opcode == FUSE_FLUSH}

    def _unanswered(self, unique: int) -> Asked | None:
        if unique in self._waiting:
            return self._waiting[unique][0]
        asked, _ = self._with_libfuse.get(_token(unique), (None, b""))
        return asked if asked is not None and asked.unique == unique else None

    def _give_up(self, asked: Asked) -> None:
        """Its caller is to wait no more. What has begun goes on, and the kernel refuses its late answer."""
        _, waiting = self._waiting.get(asked.unique, (asked, None))
        if isinstance(waiting, trio.CancelScope):
            waiting.cancel()
        else:
            self._refuse(asked.unique, FUSEError(errno.EINTR))

    def _take_back(self, asked: Asked, request: bytes, answer: bytes) -> None:
        if not self.replaced:
            self._nursery.start_soon(self._files.take_back, unwanted(asked, request, answer))

    # -- answers -------------------------------------------------------------------------------------

    def _refuse(self, unique: int, error: FUSEError) -> None:
        self._tell((_OUT.pack(_OUT.size, -error.errno, unique),))

    def _tell(self, pieces: tuple[bytes | memoryview, ...]) -> bool:
        """Whether the kernel took the answer: somebody waits for it."""
        try:
            os.writev(self._fuse_fd, pieces)
        except OSError as error:
            # Answered before (`_give_up`), or the mount has ended, which the next read will tell.
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            return False
        return True


async def _unless(scope: trio.CancelScope, work: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await work()
    if scope.cancelled_caught:
        raise FUSEError(errno.EINTR)


def _token(unique: int) -> int:
    return unique // 2 % _TOKENS


def _epoll_fd(other: int) -> int:
    """What trio sleeps in: the only other epoll of this process. It has no public name, but the kernel tells."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                found.append(int(name))
        except FileNotFoundError:
            continue  # listdir's own
    (fd,) = set(found) - {other}
    return fd


def _nothing() -> None:
    pass
