"""What there is of a file only while it is open here: handles, dirty extents, streams of reads.

Plain state, no behaviour: `writer.py` and `reader.py` act on it, `opening.py` makes and ends it.
"""

import enum

import trio

from efcfs.cache.file import CachedFile
from efcfs.nfs.nfs3 import Fattr
from efcfs.nfs.rpc import Credential
from efcfs.vfs.dirtylog import Record


class ExtentState(enum.Enum):
    DIRTY = enum.auto()  # only here
    SENDING = enum.auto()  # in a WRITE in flight
    UNSTABLE = enum.auto()  # written, but a server restart before COMMIT loses it (RFC 1813 §4.8)
    DONE = enum.auto()  # committed, or given up with an error


class Piece:
    """A part of a record of the dirty log."""

    __slots__ = ("end", "record", "start")

    def __init__(self, record: Record, start: int, end: int) -> None:
        self.record = record
        self.start = start
        self.end = end

    @property
    def bytes(self) -> memoryview:
        return self.record.bytes(self.start, self.end)


class Extent:
    """Bytes written by programs that are not yet safe on the server. Never changes place or order."""

    __slots__ = ("cred", "length_bytes", "offset", "pieces", "stable", "state", "verifier", "written_at")

    def __init__(self, offset: int, piece: Piece, cred: Credential, written_at: float) -> None:
        self.offset = offset
        self.pieces = [piece]
        self.length_bytes = piece.end - piece.start
        self.cred = cred
        self.written_at = written_at
        self.state = ExtentState.DIRTY
        self.verifier = b""
        # Whether its WRITE shall be committed by the server before it answers.
        self.stable = False

    @property
    def end(self) -> int:
        return self.offset + self.length_bytes

    def overlaps(self, offset: int, end: int) -> bool:
        return self.offset < end and offset < self.end


class OpenFile:
    """An inode that has handles, or is about to. `extents` are in the order in which they were written."""

    __slots__ = (
        "cached", "changed", "committing", "doubtful", "extents", "fh", "handles", "ino", "losses", "opening",
        "send_again_at", "sending", "sillyname", "written",
    )  # fmt: skip

    def __init__(self, ino: int, fh: bytes) -> None:
        self.ino = ino
        self.fh = fh
        self.handles: list[Handle] = []
        # How many open(2) are under way.
        self.opening = 0
        self.extents: list[Extent] = []
        # Woken whenever an extent changes its state.
        self.changed = trio.lowlevel.ParkingLot()
        self.committing = False
        # How often in a row the server lost what was not committed, and when it is sent again (monotonic seconds).
        self.losses = 0
        self.send_again_at = 0.0
        # How many WRITEs are in flight, or wait for their turn.
        self.sending = 0
        # How many writes there were: bytes that were fetched while it changed may be of before or after.
        self.written = 0
        # The cache's file of the version that these attributes tell.
        self.cached: tuple[Fattr, CachedFile | None] | None = None
        # (parent's node id, name) to remove at last close.
        self.sillyname: tuple[int, bytes] | None = None
        # Whether that was noted by a daemon before us, which may not have got so far, or may have removed it already.
        self.doubtful = False

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

    __slots__ = (
        "closed", "cred", "error", "file", "flags", "last_offset", "number", "streams", "stride", "stride_hits",
    )  # fmt: skip

    def __init__(self, number: int, file: OpenFile, cred: Credential, flags: int, error: int = 0) -> None:
        self.number = number
        self.file = file
        self.cred = cred
        self.flags = flags
        # The errno of a write that failed since this handle last told one.
        self.error = error
        self.closed = False
        # The streams of its reads, the last used first.
        self.streams: list[Stream] = []
        self.last_offset = 0
        self.stride = 0
        self.stride_hits = 0
