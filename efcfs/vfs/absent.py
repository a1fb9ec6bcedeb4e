"""Names that are not there: a directory of which all names are known answers LOOKUPs of others without the server.

The kernel looks a name up before it creates it. Asked of the server that is 140 of the 660 µs that a small file costs
the daemon, and on a network one of its round trips.

Of a directory that we made, or that was listed after some names were missed in it, the names that may be there are
kept. One that is none of them is absent, for as long as the kernel would believe a LOOKUP of that time. Calls of ours
put their names in before they are sent, and take none out, so the set is right about them at any moment, however late
the server does them. What others change ends it as soon as the directory's attributes tell. Where calls of ours
overlap they tell nothing, and the set ends with its time.

In memory only, and bounded. This module asks nobody.
"""

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from efcfs.nfs.link import TimedOut

# Names in all sets, some 100 bytes each; a directory counts as so many itself.
MOST_NAMES = 200_000
DIRECTORY_COUNTS = 8
# So many names missed within this time are worth a listing, which may take this share of the time.
MISSES = 4
MISSES_WITHIN_S = 10.0
LISTING_SHARE = 0.01

Version = tuple[int, int, int]


class Known:
    """What is known of one directory."""

    __slots__ = ("ended_at", "list_from", "listing", "missed_at", "misses", "names", "seen_at", "version")

    def __init__(self) -> None:
        # Those that may be there, as of `seen_at` (monotonic seconds); None: not known.
        self.names: set[bytes] | None = None
        self.seen_at = 0.0
        # Names that may have come since the listing under way began.
        self.listing: set[bytes] | None = None
        # The directory's, as a call saw it that no other one of ours overlapped; and when the last of ours ended.
        self.version: Version | None = None
        self.ended_at = float("-inf")
        # Names missed lately, the first of them when; and from when on a listing may begin.
        self.misses = 0
        self.missed_at = float("-inf")
        self.list_from = float("-inf")


class Absent:
    """The directories of one mount, by file handle. `believe_s`: how long a name may be believed not to be there."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # The last used last.
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._count = 0
        # The names of each call of ours that is under way. One that was given up stays: the server may do it yet.
        self._under_way: dict[bytes, dict[object, Collection[bytes]]] = {}

    def left_s(self, fh: bytes, name: bytes, believe_s: float) -> float:
        """How long the name may be believed not to be there; 0: the server must be asked."""
        known = self._known.get(fh)
        if known is None or known.names is None or not _is_listed(name) or _key(name) in known.names:
            return 0.0
        self._known.move_to_end(fh)
        return max(0.0, known.seen_at + believe_s - self._clock())

    # -- what we do ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def changing(self, names: Mapping[bytes, Collection[bytes]]) -> Iterator[None]:
        """A call of ours, which may make these names, by directory. What it tells of them is `seen` within."""
        call = object()
        for fh in names:
            self._under_way.setdefault(fh, {})[call] = names[fh]
            self.may_be(fh, names[fh])
        try:
            yield
        except Exception as error:
            if not isinstance(error, TimedOut):
                self._ended(call, names)
            raise
        self._ended(call, names)

    def _ended(self, call: object, directories: Iterable[bytes]) -> None:
        for fh in directories:
            calls = self._under_way[fh]
            del calls[call]
            if not calls:
                del self._under_way[fh]
            if fh in self._known:
                self._known[fh].ended_at = self._clock()

    def made(self, fh: bytes, version: Version | None, asked_at: float) -> None:
        """We made the directory; it was empty when we asked for it."""
        known = self._at(fh)
        known.version = version
        self._know(known, set(), asked_at)

    # -- what we see -----------------------------------------------------------------------------------

    def may_be(self, fh: bytes, names: Iterable[bytes]) -> None:
        """These names are there, or may come to be."""
        known = self._known.get(fh)
        if known is None:
            return
        keys = {_key(name) for name in names}
        if known.listing is not None:
            known.listing |= keys
        if known.names is not None:
            before = len(known.names)
            known.names |= keys
            self._count += len(known.names) - before
            self._make_room()

    def seen(
        self, fh: bytes, after: Version | None, asked_at: float, *, ours: bool = False, before: Version | None = None
    ) -> None:
        """The directory's version in the reply to a call; `ours`: that changed it, from `before`. None: not told.

        Only a call that no other one of ours overlapped tells whether somebody else has changed the directory: servers
        take what was before and after from wherever others are just then.
        """
        known = self._known.get(fh)
        if known is None:
            return
        if len(self._under_way.get(fh, ())) > ours or known.ended_at >= asked_at:
            if ours:
                known.version = None
            return
        if known.version is not None and (before if ours else after) not in (None, known.version):
            self._forget(known)
        known.version = after

    # -- listing ---------------------------------------------------------------------------------------

    def missed(self, fh: bytes, name: bytes, believe_s: float) -> set[bytes] | None:
        """The server has no such name. If the directory should be listed, what `listed` or `given_up` must be told."""
        if not believe_s or not _is_listed(name):
            return None
        known, now = self._at(fh), self._clock()
        if known.names is not None:
            if now < known.seen_at + believe_s:
                return None
            self._forget(known)
        if now - known.missed_at > MISSES_WITHIN_S:
            known.misses, known.missed_at = 0, now
        known.misses += 1
        if known.misses < MISSES or now < known.list_from:
            return None
        known.list_from = float("inf")
        known.listing = {_key(name) for names in self._under_way.get(fh, {}).values() for name in names}
        return known.listing

    def listed(self, fh: bytes, listing: set[bytes], names: Iterable[bytes], began_at: float) -> None:
        """All names that a listing has, which counts if nobody else was seen to change the directory meanwhile."""
        now, known = self._clock(), self._at(fh)
        known.list_from = now + (now - began_at) / LISTING_SHARE
        if known.listing is listing:
            self._know(known, listing.union(map(_key, names)), began_at)

    def given_up(self, fh: bytes, listing: set[bytes], for_s: float) -> None:
        """It could not be listed, and shall not be for a while."""
        known = self._at(fh)
        known.list_from = self._clock() + for_s
        if known.listing is listing:
            known.listing = None

    # -- memory ----------------------------------------------------------------------------------------

    def doubt(self, fh: bytes) -> None:
        """What was listed of it, or is being listed, may lack names."""
        known = self._known.get(fh)
        if known is not None:
            self._forget(known)

    def _at(self, fh: bytes) -> Known:
        known = self._known.get(fh)
        if known is None:
            known = self._known[fh] = Known()
            self._count += DIRECTORY_COUNTS
            self._make_room()
        self._known.move_to_end(fh)
        return known

    def _know(self, known: Known, names: set[bytes], seen_at: float) -> None:
        self._forget(known)
        known.names, known.seen_at, known.misses = names, seen_at, 0
        self._count += len(names)
        self._make_room()

    def _forget(self, known: Known) -> None:
        if known.names is not None:
            self._count -= len(known.names)
        known.names = known.listing = None

    def _make_room(self) -> None:
        while self._count > MOST_NAMES:
            _, oldest = self._known.popitem(last=False)
            self._forget(oldest)
            self._count -= DIRECTORY_COUNTS


def _is_listed(name: bytes) -> bool:
    """Some servers have names that they do not list, such as .snapshot."""
    return not name.startswith(b".")


def _key(name: bytes) -> bytes:
    """To some servers the names that differ in case are one."""
    return name.lower()
