"""What there is of a file only while it is open here: handles, dirty extents, streams of reads.

Plain state, no behaviour: `writer.py` and `reader.py` act on it, `filesystem.py` makes and ends it.
"""

import enum

import trio

from efcfs.cache.store import CachedFile
from efcfs.nfs.link import Buffer
from efcfs.nfs.nfs3 import Fattr
from efcfs.nfs.rpc import Credential


class ExtentState(enum.Enum):
    DIRTY = enum.auto()  # only here
    SENDING = enum.auto()  # in a WRITE in flight
    UNSTABLE = enum.auto()  # written, but a server restart before COMMIT loses it (RFC 1813 §4.8)
    DONE = enum.auto()  # committed, or given up with an error


class Extent:
    """Bytes written by programs that are not yet safe on the server. Never changes place or order."""

    __slots__ = ("buffers", "cred", "length_bytes", "offset", "state", "verifier", "written_at")

    def __init__(self, offset: int, data: memoryview, cred: Credential, written_at: float) -> None:
        self.offset = offset
        self.buffers: list[Buffer] = [data]
        self.length_bytes = len(data)
        self.cred = cred
        self.written_at = written_at
        self.state = ExtentState.DIRTY
        self.verifier = b""

    @property
    def end(self) -> int:
        return self.offset + self.length_bytes

    def overlaps(self, offset: int, end: int) -> bool:
        return self.offset < end and offset < self.end


class OpenFile:
    """An inode with at least one handle. `extents` are in the order in which they were written."""

    __slots__ = (
        "cached", "changed", "committing", "extents", "fh", "handles", "ino", "sillyname", "write_errors",
    )  # fmt: skip

    def __init__(self, ino: int, fh: bytes) -> None:
        self.ino = ino
        self.fh = fh
        self.handles = 0
        self.extents: list[Extent] = []
        # Woken whenever an extent changes its state.
        self.changed = trio.lowlevel.ParkingLot()
        self.committing = False
        # The cache's file of the version that these attributes tell.
        self.cached: tuple[Fattr, CachedFile | None] | None = None
        # Failed writes, oldest first; each handle reports those that came after it looked last.
        self.write_errors: list[int] = []
        # (parent's node id, name) to remove at last close.
        self.sillyname: tuple[int, bytes] | None = None

    @property
    def dirty_end(self) -> int:
        """Where the bytes end that the server may not have yet; 0 without any."""
        return max((e.end for e in self.extents), default=0)


class Stream:
    """Reads of one handle that follow each other."""

    __slots__ = ("ahead_to", "next_offset", "slack_bytes", "start_offset", "window_bytes")

    def __init__(self, start_offset: int, next_offset: int) -> None:
        self.start_offset = start_offset
        self.next_offset = next_offset
        # How far beyond next_offset a read may begin and still belong to it.
        self.slack_bytes = 0
        self.window_bytes = 0
        # The first extent that is not yet read ahead.
        self.ahead_to = 0


class Handle:
    """One open(2). Remembers who opened it: readahead and write-behind act in that name."""

    __slots__ = ("closed", "cred", "errors_seen", "file", "flags", "last_offset", "streams", "stride", "stride_hits")

    def __init__(self, file: OpenFile, cred: Credential, flags: int) -> None:
        self.file = file
        self.cred = cred
        self.flags = flags
        self.errors_seen = len(file.write_errors)
        self.closed = False
        # The streams of its reads, the last used first.
        self.streams: list[Stream] = []
        self.last_offset = 0
        self.stride = 0
        self.stride_hits = 0
