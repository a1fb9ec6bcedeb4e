"""One program of the soak: works with files as if nothing could happen to them, and knows what it must find.

It keeps a model of all that it made (bytes, names, modes), compares whatever it reads with it, keeps every error that
a correct file system would not give, and goes on. It uses plain os calls and knows nothing of kills and servers.
"""

import contextlib
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from tests.faults.model import BLOCK_BYTES, STAMP, Board, Call, File, Findings, Handle, difference, stamped

P = ParamSpec("P")
R = TypeVar("R")

LARGE_BYTES = 1 << 20
MOST_FILE_BYTES = 3 << 20
MOST_FILES, MOST_HANDLES, MOST_OTHERS = 16, 8, 5
EMPTY_FILES = 150  # so that a listing takes several requests
PUBLISHED_BYTES = 16 * BLOCK_BYTES
SHARED = "shared"
# Calls that are faster are counted and not kept.
SLOW_S = 0.005
AFTER_ERROR_S = 0.02
FLAGS = (os.O_RDWR, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_SYNC, os.O_RDONLY)


class Spoiled(Exception):
    """An action ended with an error or wrong bytes, which are recorded; what it touched is in doubt."""


class Program:
    def __init__(self, number: int, here: Path, seed: int, board: Board) -> None:
        self.number, self.here, self.board = number, here, board
        self.own = f"program{number}"
        self.rng = random.Random(f"{seed} {number}")
        self.found = Findings()
        self.names: dict[str, File] = {}
        self.links: dict[str, str] = {}
        self.directories: set[str] = set()
        self.empty: set[str] = set()
        self.handles: list[Handle] = []
        self.in_doubt: set[str] = set()
        self.made = self.sequence = 0
        self.paths: set[str] = set()  # of the action under way
        self.files: set[File] = set()

    # How anything is done

    def work(self, until: Callable[[], bool]) -> None:
        self.attempt(self.set_up)
        actions, weights = zip(*ACTIONS.items(), strict=True)
        while not until():
            (action,) = self.rng.choices(actions, weights)
            if self.attempt(partial(action, self)):
                self.found.actions[action.__name__] += 1
            self.board.calls[self.number] = self.found.calls
        for handle in list(self.handles):
            self.attempt(partial(self.close, handle, sync=True))

    def attempt(self, action: Callable[[], None]) -> bool:
        self.paths, self.files = set(), set()
        try:
            action()
        except Spoiled:
            self.board.failures[self.number] += 1
            self.abandon()
            time.sleep(AFTER_ERROR_S)
            return False
        return True

    def abandon(self) -> None:
        """What a failed action touched is not looked at again: one fault is told once."""
        self.files.update(self.names[path] for path in self.paths if path in self.names)
        self.in_doubt |= self.paths | {path for path, file in self.names.items() if file in self.files}
        for path in self.in_doubt:
            self.names.pop(path, None)
            self.links.pop(path, None)
            self.directories.discard(path)
            self.empty.discard(path)
        for handle in [h for h in self.handles if h.file in self.files]:
            self.handles.remove(handle)
            with contextlib.suppress(OSError):
                os.close(handle.fd)

    def do(self, what: str, path: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """One system call, timed."""
        self.paths.add(path)
        begun_s = time.monotonic()
        try:
            return call(*args, **kwargs)
        except OSError as error:
            self.fault(self.found.errors, f"{what} {path}: {error.strerror} ({error.errno})")
            raise Spoiled from None
        finally:
            ended_s = time.monotonic()
            self.found.calls += 1
            if ended_s - begun_s >= SLOW_S:
                self.found.slow.append(Call(f"{what} {path}", begun_s, ended_s))

    def refused(self, why: type[OSError], what: str, path: str, call: Callable[[], object]) -> None:
        """One system call that must fail with `why`."""

        def inverted() -> bool:
            try:
                call()
            except why:
                return True
            return False

        self.check(f"{what} did not raise {why.__name__}", path, self.do(what, path, inverted), True)

    def check(self, what: str, path: str, found: object, expected: object) -> None:
        if found == expected:
            return
        self.paths.add(path)
        if isinstance(found, bytes) and isinstance(expected, (bytes, bytearray)):
            told = difference(found, expected)
        else:
            told = f"{found} and not {expected}"
        self.fault(self.found.wrong, f"{what} {path}: {told}")
        raise Spoiled

    def fault(self, kind: list[str], line: str) -> None:
        kind.append(f"{time.monotonic():.3f} program {self.number}: {line}")
        print(kind[-1], file=sys.stderr, flush=True)

    # What the actions choose from

    def at(self, path: str) -> str:
        return os.path.join(self.here, path)

    def new(self) -> str:
        self.made += 1
        return f"{self.own if self.rng.random() < 0.75 else SHARED}/{self.number}-{self.made}"

    def pick(self) -> tuple[str, File]:
        if not self.names:
            self.create()
        path = self.rng.choice(list(self.names))
        self.files.add(self.names[path])
        return path, self.names[path]

    def handle(self, *, to_write: bool = False) -> Handle:
        fitting = [h for h in self.handles if not to_write or h.flags & os.O_RDWR]
        if not fitting:
            fitting = [self.hold(os.O_RDWR)]
        handle = self.rng.choice(fitting)
        self.files.add(handle.file)
        return handle

    def hold(self, flags: int) -> Handle:
        """Open a file and keep it open."""
        path, file = self.pick()
        fd = self.do("open", path, os.open, self.at(path), flags)
        self.handles.append(Handle(fd, path, file, flags))
        if len(self.handles) > MOST_HANDLES:
            self.close(self.handles[0])
        return self.handles[-1]

    def close(self, handle: Handle, *, sync: bool = False) -> None:
        self.files.add(handle.file)
        if sync:
            self.do("fsync", handle.path, os.fsync, handle.fd)
        self.handles.remove(handle)
        self.do("close", handle.path, os.close, handle.fd)

    # The actions

    def set_up(self) -> None:
        self.do("mkdir", self.own, os.mkdir, self.at(self.own))
        for number in range(EMPTY_FILES):
            path = f"{self.own}/empty{number}"
            os.close(self.do("create", path, os.open, self.at(path), os.O_CREAT | os.O_WRONLY, 0o644))
            self.empty.add(path)
        self.publish()

    def hold_open(self) -> None:
        self.hold(self.rng.choice(FLAGS))

    def close_one(self) -> None:
        if self.handles:
            self.close(self.rng.choice(self.handles), sync=self.rng.random() < 0.3)

    def write_block(self) -> None:
        self.write(self.handle(to_write=True), BLOCK_BYTES)

    def write_large(self) -> None:
        self.write(self.handle(to_write=True), LARGE_BYTES)

    def append(self) -> None:
        appending = [h for h in self.handles if h.flags & os.O_APPEND] or [self.hold(os.O_RDWR | os.O_APPEND)]
        self.write(self.rng.choice(appending), BLOCK_BYTES)

    def write(self, handle: Handle, length: int) -> None:
        fd, path, file, flags = handle
        self.files.add(file)
        if len(file.content) > MOST_FILE_BYTES - length and flags & os.O_APPEND:
            self.do("ftruncate", path, os.ftruncate, fd, 0)
            file.resize(0)
        offset = len(file.content)
        if not flags & os.O_APPEND:
            offset = self.rng.randrange(min(offset, MOST_FILE_BYTES - length) + 1)
            offset -= offset % BLOCK_BYTES if self.rng.random() < 0.75 else 0
        self.sequence += 1
        data = stamped(self.number, file.number, offset, self.sequence, length)
        if flags & os.O_APPEND:
            written = self.do("append", path, os.write, fd, data)
        else:
            written = self.do("pwrite", path, os.pwrite, fd, data, offset)
        self.check("bytes taken by write to", path, written, length)
        file.put(offset, data)

    def sync(self) -> None:
        handle = self.handle()
        self.do("fsync", handle.path, self.rng.choice((os.fsync, os.fdatasync)), handle.fd)

    def read_held(self) -> None:
        fd, path, file, _ = self.handle()
        offset, length = self.rng.randrange(len(file.content) + 1), self.rng.choice((4096, 131072, 1 << 20))
        if self.rng.random() < 0.5:  # from the daemon and not from the kernel's pages
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found = self.do("pread", path, os.pread, fd, length, offset)
        self.check(f"read of {length} at {offset} of", path, found, file.content[offset : offset + length])

    def read_anew(self) -> None:
        path, file = self.pick()
        found = self.read_all(path)
        self.check("read through a new handle of", path, found, file.content)

    def read_all(self, path: str) -> bytes:
        fd = self.do("open", path, os.open, self.at(path), os.O_RDONLY)
        try:
            return self.do("pread", path, os.pread, fd, MOST_FILE_BYTES + 1, 0)
        finally:
            self.do("close", path, os.close, fd)

    def truncate(self) -> None:
        length = self.rng.randrange(MOST_FILE_BYTES)
        if self.rng.random() < 0.5:
            path, file = self.pick()
            length = min(length, len(file.content) + 10_000)
            self.do("truncate", path, os.truncate, self.at(path), length)
        else:
            fd, path, file, _ = self.handle(to_write=True)
            length = min(length, len(file.content) + 10_000)
            self.do("ftruncate", path, os.ftruncate, fd, length)
        file.resize(length)

    def create(self) -> None:
        if len(self.names) > MOST_FILES:
            self.unlink()
        path, file = self.new(), File(self.made)
        flags = os.O_RDWR | os.O_CREAT | self.rng.choice((0, os.O_EXCL))
        fd = self.do("create", path, os.open, self.at(path), flags, file.mode)
        self.names[path] = file
        self.handles.append(Handle(fd, path, file, os.O_RDWR))
        if self.rng.random() < 0.5 or len(self.handles) > MOST_HANDLES:
            self.write(self.handles[-1], self.rng.choice((BLOCK_BYTES, 8 * BLOCK_BYTES)))
            self.close(self.handles[-1])

    def create_again(self) -> None:
        path, file = self.pick()
        flags = os.O_RDWR | os.O_CREAT
        self.refused(FileExistsError, "create exclusively", path, lambda: os.open(self.at(path), flags | os.O_EXCL))
        fd = self.do("create and truncate", path, os.open, self.at(path), flags | os.O_TRUNC)
        file.resize(0)
        self.do("close", path, os.close, fd)

    def make_directory(self) -> None:
        path, new = self.new(), self.new()
        self.do("mkdir", path, os.mkdir, self.at(path))
        self.refused(FileExistsError, "mkdir", path, lambda: os.mkdir(self.at(path)))
        self.paths.add(new)
        self.do("rename", path, os.rename, self.at(path), self.at(new))
        self.directories.add(new)
        self.check("listing of", new, self.do("listdir", new, os.listdir, self.at(new)), [])
        if len(self.directories) > MOST_OTHERS:
            self.remove_directory()

    def remove_directory(self) -> None:
        if self.directories:
            path = self.rng.choice(sorted(self.directories))
            self.do("rmdir", path, os.rmdir, self.at(path))
            self.directories.remove(path)
            self.refused(FileNotFoundError, "rmdir", path, lambda: os.rmdir(self.at(path)))

    def symlink(self) -> None:
        path, target = self.new(), f"to-{self.rng.random()}"
        self.do("symlink", path, os.symlink, target, self.at(path))
        self.links[path] = target
        old = self.rng.choice(list(self.links))
        self.check("target of", old, self.do("readlink", old, os.readlink, self.at(old)), self.links[old])
        if len(self.links) > MOST_OTHERS:
            self.do("unlink", old, os.unlink, self.at(old))
            del self.links[old]

    def link(self) -> None:
        if len(self.names) > MOST_FILES:
            self.unlink()
        path, file = self.pick()
        new = self.new()
        self.do("link", path, os.link, self.at(path), self.at(new))
        self.paths.add(new)
        self.names[new] = file

    def rename(self) -> None:
        path, _ = self.pick()
        self.move(path, self.new())

    def rename_over(self) -> None:
        """Over a file that exists, more often than not over one that is open."""
        path, file = self.pick()
        held = [h.path for h in self.handles if self.names.get(h.path) not in (None, file)]
        other = [p for p, f in self.names.items() if f is not file]
        if held or other:
            self.move(path, self.rng.choice(held if held and self.rng.random() < 0.6 else other))

    def move(self, path: str, target: str) -> None:
        self.paths.add(target)
        self.do("rename", path, os.rename, self.at(path), self.at(target))
        self.names[target] = self.names.pop(path)
        self.refused(FileNotFoundError, "stat", path, lambda: os.stat(self.at(path)))

    def unlink(self) -> None:
        path, _ = self.pick()
        self.do("unlink", path, os.unlink, self.at(path))
        del self.names[path]
        self.refused(FileNotFoundError, "stat", path, lambda: os.stat(self.at(path)))

    def attributes(self) -> None:
        path, file = self.pick()
        mode, mtime_ns = self.rng.choice((0o600, 0o640, 0o644)), self.rng.randrange(10**18)
        self.do("chmod", path, os.chmod, self.at(path), mode)
        file.mode = mode
        self.do("utime", path, os.utime, self.at(path), ns=(mtime_ns, mtime_ns))
        status = self.do("stat", path, os.stat, self.at(path))
        self.check("mode and mtime of", path, (status.st_mode & 0o7777, status.st_mtime_ns), (mode, mtime_ns))

    def size(self) -> None:
        path, file = self.pick()
        status = self.do("stat", path, os.stat, self.at(path))
        self.check("size of", path, status.st_size, len(file.content))
        fd, path, file, _ = self.handle()
        self.check("size by handle of", path, self.do("fstat", path, os.fstat, fd).st_size, len(file.content))

    def listing(self) -> None:
        for directory in (self.own, SHARED):
            found = self.do("listdir", directory, os.listdir, self.at(directory))
            self.compare_listing(directory, found)

    def compare_listing(self, directory: str, found: list[str]) -> None:
        everything = {*self.names, *self.links, *self.directories, *self.empty}
        mine = {f"{directory}/{name}" for name in found if directory == self.own or name.startswith(f"{self.number}-")}
        silly = {path for path in mine if os.path.basename(path).startswith(".nfs")}
        expected = {path for path in everything if os.path.dirname(path) == directory} - self.in_doubt
        missing, extra = sorted(expected - mine), sorted(mine - expected - silly - self.in_doubt)
        self.paths.update(missing, extra)
        self.check("missing and extra names in", directory, (missing, extra, len(found)), ([], [], len(set(found))))

    def publish(self) -> None:
        """Replace a file that all read, by rename: a reader finds the old one or the new one, whole."""
        draft, sequence = f"{self.own}/draft", self.board.published[self.number] + 1
        fd = self.do("create", draft, os.open, self.at(draft), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        data = stamped(self.number, 0, 0, sequence, PUBLISHED_BYTES)
        try:
            self.check("bytes taken by write to", draft, self.do("write", draft, os.write, fd, data), len(data))
        finally:
            self.do("close", draft, os.close, fd)
        self.do("rename", draft, os.rename, self.at(draft), self.at(self.publication(self.number)))
        self.board.published[self.number] = sequence

    def publication(self, program: int) -> str:
        return f"{SHARED}/published{program}"

    def read_published(self) -> None:
        program = self.rng.randrange(len(self.board.published))
        at_least = self.board.published[program]
        if at_least:
            path = self.publication(program)
            self.check_published(path, program, self.read_all(path), at_least)

    def check_published(self, path: str, program: int, found: bytes, at_least: int) -> None:
        sequence = STAMP.unpack_from(found)[-1] if len(found) >= STAMP.size else 0
        self.check("read of", path, found, stamped(program, 0, 0, max(sequence, at_least), PUBLISHED_BYTES))

    # The end

    def compare(self, there: Path) -> None:
        """All that was made, as it lies on the server's disk after the mount has ended."""
        self.here = there
        for path in list(self.names):
            if path in self.names:  # or another name of the same file was wrong
                self.attempt(partial(self.compare_file, path))
        for path, target in list(self.links.items()):
            self.attempt(partial(self.compare_link, path, target))
        self.attempt(self.listing)
        self.attempt(partial(self.compare_publication, self.board.published[self.number]))

    def compare_publication(self, at_least: int) -> None:
        path = self.publication(self.number)
        self.check_published(path, self.number, self.read_all(path), at_least)

    def compare_link(self, path: str, target: str) -> None:
        self.check("target on the server of", path, self.do("readlink", path, os.readlink, self.at(path)), target)

    def compare_file(self, path: str) -> None:
        file = self.names[path]
        self.files.add(file)
        self.check("bytes on the server of", path, self.read_all(path), file.content)
        status = self.do("stat", path, os.stat, self.at(path))
        names = sum(other is file for other in self.names.values())
        found = (status.st_mode & 0o7777, status.st_nlink)
        self.check("mode and links on the server of", path, found, (file.mode, names))


ACTIONS: dict[Callable[[Program], None], int] = {
    Program.hold_open: 6, Program.close_one: 6, Program.write_block: 20, Program.write_large: 4, Program.append: 12,
    Program.sync: 5, Program.read_held: 20, Program.read_anew: 10, Program.size: 8, Program.truncate: 3,
    Program.create: 8, Program.create_again: 2, Program.link: 3, Program.rename: 4, Program.rename_over: 4,
    Program.unlink: 5, Program.make_directory: 3, Program.remove_directory: 2, Program.symlink: 3,
    Program.attributes: 4, Program.listing: 3, Program.publish: 3, Program.read_published: 5,
}  # fmt: skip
