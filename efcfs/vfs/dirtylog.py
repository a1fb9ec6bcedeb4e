"""Bytes that were written and are not yet safe on the server, in files under /dev/shm: they outlive the daemon.

The kernel's WRITE request is read straight into the log, so that keeping its bytes takes no copy: the wire asks
for a `buffer`, and `keep` makes a record of what lies in it. Small writes that continue the last record are moved
up to it and become a part of it. A record is *done* when the server has committed all of it, or refused it; a segment
whose records are all done is used again. Whatever is not done is found by the next daemon (`left`), in
the order in which it was written.

A segment's records carry its generation, a random number that is drawn anew each time the segment is used again, so
nothing that lay there before is taken for a record. A record counts once its state says so, which is written last: a
daemon may be killed between any two stores.

This module knows no files and no server: a record has the number of the handle that it was written through.
"""

import contextlib
import itertools
import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger(__name__)

SEGMENT_BYTES = 16 * 1024 * 1024
# struct fuse_in_header and struct fuse_write_in, which come before the bytes of a WRITE in the buffer.
REQUEST_HEAD_BYTES = 80
# The largest request of the kernel.
REQUEST_BYTES = 1024 * 1024 + REQUEST_HEAD_BYTES
# Moving less is cheaper than a record of its own, an iovec in each WRITE, and another store when it is done.
MOVED_BYTES = 64 * 1024
ALIGN = 64
RETRY_S = 1.0

_GENERATION = struct.Struct("<Q")
# Behind the generation: how many records are not done. The keeper reads it, when no daemon is there any more.
_UNDONE = struct.Struct("<I")
_UNDONE_AT = _GENERATION.size
# generation, sequence number, handle, offset in the file, length, where its bytes begin in the segment, state
_RECORD = struct.Struct("<QQQQII")
_LENGTH = struct.Struct("<I")
_LENGTH_AT = 32
_STATE_AT = _RECORD.size
HEAD_BYTES = 64
# <sys/mman.h>, Linux 5.14; `mmap` has no name for it.
MADV_POPULATE_WRITE = 23
NONE, KEPT, DONE = range(3)


class Segment:
    """One file of the log, mapped."""

    __slots__ = ("_has_pages", "_map", "end", "generation", "live", "path", "undone", "view")

    def __init__(self, path: Path) -> None:
        """Raises OSError (ENOSPC); a file that was there before stays then, with what it has."""
        self.path = path
        fresh = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Memory that is not there when it is written to would end the daemon with SIGBUS. What was left has it,
            # and is mapped without its pages until it is used again: 2 ms less for each before it is served.
            if fresh:
                os.posix_fallocate(fd, 0, SEGMENT_BYTES)
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if fresh else 0)
            self._map = mmap.mmap(fd, SEGMENT_BYTES, flags=flags)
        except OSError:
            if fresh:
                path.unlink()
            raise
        finally:
            os.close(fd)
        self._has_pages = fresh
        self.view = memoryview(self._map)
        (self.generation,) = _GENERATION.unpack_from(self.view)
        self.end = HEAD_BYTES
        self.undone = 0
        # Records that are not done, and holds.
        self.live = 0

    def map_pages(self) -> None:
        """Requests are going to be read into it. The kernel then must not need this process to map a page: if it is
        killed in that moment the program is told EIO, and the request is not there for the next daemon.
        (4 times in 278 kills of the soak.)
        """
        if not self._has_pages:
            self._has_pages = True
            with contextlib.suppress(OSError):  # before 5.14, where a death costs the requests anyway
                self._map.madvise(MADV_POPULATE_WRITE)

    def start_over(self) -> None:
        self.generation = int.from_bytes(os.urandom(8), "little")
        _GENERATION.pack_into(self.view, 0, self.generation)
        self.end = HEAD_BYTES
        self.live = 0
        self.count(-self.undone)

    def count(self, more: int) -> None:
        self.undone += more
        _UNDONE.pack_into(self.view, _UNDONE_AT, self.undone)


class Record:
    """One run of written bytes. `left_bytes` of them are not done."""

    __slots__ = ("at", "data_at", "left_bytes", "length_bytes", "segment")

    def __init__(self, segment: Segment, at: int, data_at: int, length_bytes: int) -> None:
        self.segment = segment
        self.at = at
        self.data_at = data_at
        self.length_bytes = self.left_bytes = length_bytes

    @property
    def end(self) -> int:
        """Where its bytes end in the segment."""
        return self.data_at + self.length_bytes

    def bytes(self, start: int, end: int) -> memoryview:
        return self.segment.view[self.data_at + start : self.data_at + end]


class Left(NamedTuple):
    """A record that a daemon before us kept and that is not done."""

    sequence: int
    handle: int
    offset: int
    record: Record


class DirtyLog:
    """The log of one mount, of at most `most_bytes` and a little more."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self._directory = directory
        self._most_segments = -(-most_bytes // SEGMENT_BYTES) + 2
        self._segments: list[Segment] = []
        self._free: list[Segment] = []
        self._current: Segment | None = None
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE  # as in `Segment.map_pages`
        self._heap = memoryview(mmap.mmap(-1, REQUEST_BYTES, flags=flags))
        self._sequence = 0
        self._numbers = itertools.count(1)
        # After a failure to make a segment no other try before this (monotonic s).
        self._not_before = 0.0
        self._left = False

    def leave(self) -> None:
        """Another daemon has it now: nothing here changes it any more."""
        self._left = True

    def left(self) -> list[Left]:
        """What daemons before us kept, in the order of writing. To be called once, before anything is kept."""
        found: list[Left] = []
        numbers = sorted(int(path.name.partition("-")[2]) for path in self._directory.glob("segment-*"))
        self._numbers = itertools.count(numbers[-1] + 1 if numbers else 1)
        for number in numbers:
            path = self._directory / f"segment-{number}"
            if path.stat().st_size < SEGMENT_BYTES:
                path.unlink()  # a daemon was killed while it made it
                continue
            segment = Segment(path)
            self._segments.append(segment)
            found += _walk(segment)
            segment.live = sum(1 for left in found if left.record.segment is segment)
            segment.count(segment.live)
            if not segment.live:
                self._free.append(segment)
        found.sort()
        self._sequence = found[-1].sequence if found else 0
        return found

    def buffer(self) -> memoryview:
        """Where the next request of the kernel goes: into the log if it has room, so that `keep` need not copy."""
        segment = self._room()
        if segment is None:
            return self._heap
        at = -(-segment.end // ALIGN) * ALIGN + HEAD_BYTES
        return segment.view[at : at + REQUEST_BYTES]

    def keep(self, handle: int, offset: int, data: memoryview, last: Record | None) -> Record | None:
        """Keep bytes, which lie in the buffer (as the payload of a request) or elsewhere.

        `last`: the record that they continue, if any. Returns their record, or `last`, which has grown by them; None
        when there is no room.
        """
        segment = self._room()
        if segment is None:
            return None
        length, end = len(data), segment.end
        if last is not None and last.segment is segment and last.end == end and length <= MOVED_BYTES:
            segment.view[end : end + length] = data  # they may overlap: memoryview moves them as memmove does
            last.length_bytes += length
            last.left_bytes += length
            _LENGTH.pack_into(segment.view, last.at + _LENGTH_AT, last.length_bytes)
            segment.end = end + length
            return last
        at = -(-end // ALIGN) * ALIGN
        if data.obj is segment.view.obj:
            data_at = at + HEAD_BYTES + REQUEST_HEAD_BYTES
        else:
            data_at = at + HEAD_BYTES
            segment.view[data_at : data_at + length] = data
        self._sequence += 1
        segment.view[at + _STATE_AT] = NONE  # whatever lay there
        _RECORD.pack_into(segment.view, at, segment.generation, self._sequence, handle, offset, length, data_at)
        segment.count(1)
        segment.view[at + _STATE_AT] = KEPT
        segment.end = data_at + length
        segment.live += 1
        return Record(segment, at, data_at, length)

    def done(self, record: Record, length_bytes: int) -> None:
        """So many more bytes of the record need not be kept."""
        record.left_bytes -= length_bytes
        if record.left_bytes or self._left:
            return
        record.segment.view[record.at + _STATE_AT] = DONE
        record.segment.count(-1)
        self.release(record)

    def hold(self, record: Record) -> None:
        """Its bytes stay readable, done or not, until it is released."""
        record.segment.live += 1

    def release(self, record: Record) -> None:
        segment = record.segment
        segment.live -= 1
        if segment.live or self._left:
            return
        if segment is self._current:
            segment.start_over()  # hot in every cache
        else:
            self._free.append(segment)

    def shrink(self) -> None:
        """Nothing is dirty, nor was for a while: give the memory back."""
        for segment in self._free:
            self._segments.remove(segment)
            segment.path.unlink()
        self._free.clear()

    def remove(self) -> None:
        """The mount has ended. What is not done stays in its files."""
        for segment in self._segments:
            if not segment.live:
                segment.path.unlink()

    @property
    def runs_low(self) -> bool:
        """Whether `prepare` should make another segment: taking 16 MiB of new memory blocks for 8 ms."""
        half_full = self._current is None or self._current.end > SEGMENT_BYTES // 2
        return half_full and not self._free and len(self._segments) < self._most_segments

    def prepare(self) -> None:
        """Make another segment. Blocks: for a thread."""
        segment = self._new()
        if segment is not None:
            self._free.append(segment)

    def _new(self) -> Segment | None:
        if time.monotonic() < self._not_before:
            return None
        try:
            segment = Segment(self._directory / f"segment-{next(self._numbers)}")
        except OSError as error:
            log.warning("no room in /dev/shm for written bytes: %s", error.strerror)
            self._not_before = time.monotonic() + RETRY_S
            return None
        self._segments.append(segment)
        return segment

    def _room(self) -> Segment | None:
        """A segment in which the largest request has room."""
        old = self._current
        if old is not None and old.end + ALIGN + HEAD_BYTES + REQUEST_BYTES <= SEGMENT_BYTES:
            return old
        if self._free:
            segment: Segment | None = self._free.pop()
        else:
            segment = self._new() if len(self._segments) < self._most_segments else None
        if segment is not None:
            segment.map_pages()
            segment.start_over()
            self._current = segment
            if old is not None and not old.live:
                self._free.append(old)
        return segment


def _walk(segment: Segment) -> Iterator[Left]:
    at = HEAD_BYTES
    while at + HEAD_BYTES <= SEGMENT_BYTES:
        generation, sequence, handle, offset, length, data_at = _RECORD.unpack_from(segment.view, at)
        state = segment.view[at + _STATE_AT]
        if generation != segment.generation or state == NONE or data_at + length > SEGMENT_BYTES:
            return
        if state == KEPT:
            yield Left(sequence, handle, offset, Record(segment, at, data_at, length))
        at = -(-(data_at + length) // ALIGN) * ALIGN
