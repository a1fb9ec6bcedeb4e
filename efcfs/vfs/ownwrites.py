"""Whether nobody but us changed a file while we wrote to it.

Each reply says what the server had before the call and after it (wcc_data). Replies of pipelined calls arrive in any
order, but the server did the calls one after the other, so the version after one is the version before the next. If all
replies form one chain from the version that was known before, nobody else wrote in between. A server may leave out what
was before (RFC 1813 §2.6); then nothing is proved.
"""

Version = tuple[int, int, int]
"""Size, mtime and ctime."""


class OwnWrites:
    """The replies to one time of writing: from the first byte that is not on the server until none is left."""

    __slots__ = ("_links", "_proven", "_seen", "_start")

    def __init__(self, start: Version | None) -> None:
        """`start`: the version that was known before; None: not known, so nothing can be proved."""
        self._start = start
        self._links: dict[Version, Version] = {}
        # Versions that a call found and left as they were.
        self._seen: set[Version] = set()
        self._proven = start is not None

    def replied(self, before: Version | None, after: Version | None) -> None:
        if before is None or after is None or before in self._links:
            self._proven = False
        elif before == after:  # a COMMIT, or two WRITEs within a tick of the server's clock
            self._seen.add(before)
        else:
            self._links[before] = after

    def final(self) -> Version | None:
        """The version now, if nobody else wrote meanwhile. Only once all replies are there."""
        version, links = self._start, dict(self._links)
        if version is None or not self._proven:
            return None
        unseen = self._seen - {version}
        while version in links:
            version = links.pop(version)
            unseen.discard(version)
        return None if links or unseen else version
