"""Jobs over whole trees: warm the cache, check what it has, take things out of it.

A job runs in the daemon and goes on when the command that started it has gone. It walks with the daemon's
own credential, keeps the listings that it reads, and does not touch what the kernel knows. Failures are
counted and named; they do not end it.
"""

import fnmatch
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from efcfs.cache.file import file_key
from efcfs.cache.index import CHUNK_BYTES, EXTENT_BYTES
from efcfs.cache.store import Store
from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError, own_credential
from efcfs.nfs.nfs3 import Fattr
from efcfs.nfs.rpc import Credential
from efcfs.vfs.attributes import version
from efcfs.vfs.directories import Directories
from efcfs.vfs.errors import SERVER_ERRORS, errno_of
from efcfs.vfs.inodes import Inode
from efcfs.vfs.reader import Reader

log = logging.getLogger(__name__)

MAX_FAILURES_NAMED = 100
MAX_JOBS_KEPT = 16
WAITING_FILES = 256
# As many as the kernel follows in one path.
MAX_LINKS = 40
# For the next of a long list's paths.
MORE_S = 30.0
# How often, and how long in between, a job looks for room in a full cache.
ROOM_TRIES = 100
ROOM_S = 0.05


class NoJob(Exception):
    """There is no such job, or it cannot be started; str() says why."""


class File(NamedTuple):
    """A regular file that a walk found; `path` starts at the mount point."""

    path: bytes
    fh: bytes
    attr: Fattr


@dataclass(slots=True)
class Job:
    """What a job shall do, and how far it is."""

    number: int
    kind: str  # "warm", "check" or "evict"
    # Those that the walk has yet to see; a long list comes piece by piece, as long as there are `more`.
    paths: deque[bytes]
    more: bool = False
    match: str | None = None
    metadata_only: bool = False
    rate_bytes_per_s: int | None = None
    workers: int = 8
    state: str = "running"
    found_files: int = 0
    found_bytes: int = 0
    walked: bool = False
    files: int = 0
    done_bytes: int = 0
    # Of the cache, which counts in chunks.
    taken_bytes: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    # For "check": bytes that are there and as their sums say.
    cached_bytes: dict[str, int] = field(default_factory=dict)
    started_at: float = field(default_factory=time.monotonic)
    ended_at: float | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    next_at: float = 0.0
    came: trio.Event = field(default_factory=trio.Event)

    def fail(self, path: bytes, error: Exception) -> None:
        self.failed += 1
        if len(self.failures) < MAX_FAILURES_NAMED:
            why = str(error) if isinstance(error, (NoRoom, NoFile)) else os.strerror(errno_of(error))
            self.failures.append(f"{os.fsdecode(path)}: {why}")

    def told(self) -> dict[str, object]:
        """For the command."""
        names = ("number", "kind", "state", "found_files", "found_bytes", "walked", "files", "failed", "failures",
                 "cached_bytes")  # fmt: skip
        ended_at = self.ended_at if self.ended_at is not None else time.monotonic()
        return {**{name: getattr(self, name) for name in names}, "bytes": self.done_bytes,
                "elapsed_s": round(ended_at - self.started_at, 3)}  # fmt: skip


class NoRoom(Exception):
    """The cache does not take the file; str() says why."""


class NoFile(Exception):
    """A path leads to no file of the mount; str() says why."""


class Warmup:
    """The jobs of one mount; they run in `nursery`."""

    def __init__(
        self, client: Client, directories: Directories, reader: Reader, store: Store | None, nursery: trio.Nursery
    ) -> None:
        self._client = client
        self._directories = directories
        self._reader = reader
        self._store = store
        self._nursery = nursery
        self._jobs: dict[int, Job] = {}
        self._last = 0

    def start(
        self, kind: str, paths: list[bytes], *, match: str | None = None, metadata_only: bool = False,
        rate_bytes_per_s: int | None = None, workers: int = 8, more: bool = False,
    ) -> Job:  # fmt: skip
        """Begin a job over these paths (from the mount point on). Raises NoJob when there is no cache to work on.

        more: others follow (`add`).
        """
        if self._store is None and (kind != "warm" or not metadata_only):
            raise NoJob("this mount has no cache: mount it with mem= or ssd=")
        self._last += 1
        job = Job(self._last, kind, deque(paths), more, match, metadata_only, rate_bytes_per_s, workers)
        self._jobs[job.number] = job
        while len(self._jobs) > MAX_JOBS_KEPT:
            ended = next((n for n, j in self._jobs.items() if j.state != "running"), None)
            if ended is None:
                break
            del self._jobs[ended]
        self._nursery.start_soon(self._run, job)
        return job

    def job(self, number: int) -> Job:
        if number not in self._jobs:
            raise NoJob(f"there is no job {number}: it ended with the daemon that ran it, or was forgotten")
        return self._jobs[number]

    def add(self, number: int, paths: list[bytes], *, more: bool) -> None:
        """More paths for a job that was started with `more`. Raises NoJob."""
        job = self.job(number)
        job.paths.extend(paths)
        job.more = more
        job.came.set()

    def cancel(self) -> int:
        """Cancel all that run; returns how many."""
        running = [job for job in self._jobs.values() if job.state == "running"]
        for job in running:
            job.scope.cancel()
        return len(running)

    async def _run(self, job: Job) -> None:
        work = {"warm": self._warm, "check": self._check, "evict": self._evict}[job.kind]
        with job.scope:
            files_in, files_out = trio.open_memory_channel[File](WAITING_FILES)
            async with trio.open_nursery() as nursery:
                for _ in range(job.workers):
                    nursery.start_soon(self._work, job, files_out.clone(), work)
                files_out.close()
                async with files_in:
                    async for file in self._walk(job):
                        job.found_files += 1
                        job.found_bytes += file.attr.size
                        await files_in.send(file)
                job.walked = True
            if job.kind == "warm" and self._store is not None:
                await self._store.saved()
        job.state = "cancelled" if job.scope.cancelled_caught else "done"
        job.ended_at = time.monotonic()
        for failure in job.failures:
            log.warning("%s job %d: failed: %s", job.kind, job.number, failure)
        log.info("%s job %d %s: %d files, %d bytes, %d failed",
                 job.kind, job.number, job.state, job.files, job.done_bytes, job.failed)  # fmt: skip

    async def _work(
        self, job: Job, files: trio.MemoryReceiveChannel[File], work: Callable[[Job, File], Awaitable[None]]
    ) -> None:
        async with files:
            async for file in files:
                try:
                    await work(job, file)
                except (NoRoom, OSError, *SERVER_ERRORS) as error:
                    job.fail(file.path, error)
                else:
                    job.files += 1

    async def _warm(self, job: Job, file: File) -> None:
        if job.metadata_only:
            return
        assert self._store is not None
        cred = own_credential()
        key = file_key(self._reader.identity(file.fh), *version(file.attr))
        for offset in range(0, file.attr.size, EXTENT_BYTES):
            number, length_bytes = offset // EXTENT_BYTES, min(EXTENT_BYTES, file.attr.size - offset)
            job.taken_bytes += -(-length_bytes // CHUNK_BYTES) * CHUNK_BYTES
            if job.taken_bytes > self._store.room_bytes:
                has = f"{self._store.room_bytes / 1e6:,.1f} MB"
                raise NoRoom(f"all {has} of the cache are in use by this job: `efcfs cache resize` gives it more room")
            # What a disk has is not brought into a memory that is full.
            if not (self._store.crowded and await self._store.on_disk(key, number, file.attr.size)):
                await self._in_turn(job, length_bytes)
                await self._load(cred, file, key, offset, length_bytes)
            job.done_bytes += length_bytes

    async def _load(self, cred: Credential, file: File, key: bytes, offset: int, length_bytes: int) -> None:
        assert self._store is not None
        for _ in range(ROOM_TRIES):
            if await self._reader.load(cred, file.fh, 0, file.attr, offset, length_bytes) is not None:
                if await self._store.save(key, offset // EXTENT_BYTES):
                    return
            elif version(await self._client.getattr(cred, file.fh)) != version(file.attr):
                raise NoRoom("changed while it was read")
            await trio.sleep(ROOM_S)  # eviction is under way
        raise NoRoom("the cache is full and nothing can be evicted")

    async def _check(self, job: Job, file: File) -> None:
        assert self._store is not None
        there = await trio.to_thread.run_sync(self._store.cached_bytes, self._reader.identity(file.fh),
                                              *version(file.attr))  # fmt: skip
        for name, cached_bytes in there.items():
            job.cached_bytes[name] = job.cached_bytes.get(name, 0) + cached_bytes
        job.done_bytes += file.attr.size

    async def _evict(self, job: Job, file: File) -> None:
        assert self._store is not None
        await trio.to_thread.run_sync(self._store.evict_file, self._reader.identity(file.fh), *version(file.attr))
        job.done_bytes += file.attr.size

    async def _in_turn(self, job: Job, length_bytes: int) -> None:
        """Wait until the job's rate allows so much more."""
        if job.rate_bytes_per_s:
            now = time.monotonic()
            job.next_at = max(job.next_at, now) + length_bytes / job.rate_bytes_per_s
            await trio.sleep(job.next_at - length_bytes / job.rate_bytes_per_s - now)

    # -- walking -----------------------------------------------------------------------------------

    async def _walk(self, job: Job) -> AsyncIterator[File]:
        """The regular files under the job's paths that match; directories are kept on the way."""
        async for path in self._paths(job):
            try:
                fh, attr = await self._resolve(path)
            except (NoFile, *SERVER_ERRORS) as error:
                job.fail(path, error)
                continue
            waiting = [(path.rstrip(b"/"), fh, attr)]
            while waiting:
                at, fh, attr = waiting.pop()
                if attr.type == nfs3.NF3REG and self._matches(job, at):
                    yield File(at, fh, attr)
                elif attr.type == nfs3.NF3DIR:
                    try:
                        waiting += await self._list(at, fh, attr)
                    except SERVER_ERRORS as error:
                        job.fail(at, error)

    async def _paths(self, job: Job) -> AsyncIterator[bytes]:
        while True:
            while job.paths:
                yield job.paths.popleft()
            if not job.more:
                return
            job.came = trio.Event()
            with trio.move_on_after(MORE_S) as waiting:
                await job.came.wait()
            if waiting.cancelled_caught:  # who had the rest of the list is gone
                job.scope.cancel()

    async def _resolve(self, path: bytes) -> tuple[bytes, Fattr]:
        """What a path leads to. Follows symbolic links, as who names one expects; a walk does not."""
        cred = own_credential()
        names = path.split(b"/")
        at = [self._client.root_fh]  # the directories on the way, for ..
        links = 0
        while names:
            name = names.pop(0)
            if name == b"..":
                at = at[:-1] or at
            if name in (b"", b".", b".."):
                continue
            found = await self._client.lookup(cred, at[-1], name)
            if found.fh is None:
                raise NfsError(nfs3.NFS3ERR_NOENT, "LOOKUP")
            attr = found.attr if found.attr is not None else await self._client.getattr(cred, found.fh)
            if attr.type == nfs3.NF3LNK:
                target = (await self._client.readlink(cred, found.fh)).target
                links += 1
                if target.startswith(b"/") or links > MAX_LINKS:
                    raise NoFile(f"{os.fsdecode(name)} is a symbolic link to {os.fsdecode(target)}: name that")
                names = [*target.split(b"/"), *names]
            else:
                at.append(found.fh)
        return at[-1], await self._client.getattr(cred, at[-1])

    async def _list(self, path: bytes, fh: bytes, attr: Fattr) -> list[tuple[bytes, bytes, Fattr]]:
        inode = Inode(0, fh, 0, b"")
        inode.attr = attr
        listing = self._directories.listing(inode, own_credential())
        found: list[tuple[bytes, bytes, Fattr]] = []
        cookie = 0
        try:
            while True:
                entries, start = await listing.after(cookie)
                if start == len(entries):
                    return found
                for entry in entries[start:]:
                    cookie = entry.cookie
                    if entry.fh is not None and entry.attr is not None and entry.name not in (b".", b".."):
                        found.append((path + b"/" + entry.name, entry.fh, entry.attr))
        finally:
            listing.close()

    @staticmethod
    def _matches(job: Job, path: bytes) -> bool:
        """A pattern with a / is held against the whole path, another one against the name."""
        if job.match is None:
            return True
        text = os.fsdecode(path)
        return fnmatch.fnmatchcase(text if "/" in job.match else text.rpartition("/")[2], job.match)
