"""How long attributes may be believed, what a change of them means, and what a caller may do.

Adaptive timeouts as in nfs(5): a file's attributes are fresh for acregmin seconds, longer each time they
turn out unchanged, up to acregmax; directories likewise. Every reply that carries attributes updates the
cache. A version (size, mtime, ctime) that changed without a call of ours having changed it means that
somebody else wrote: then the kernel's pages and our readahead of the file are void. How a file is kept consistent
(`consistency.py`) is asked for here, as it decides all that.
"""

import errno
import logging
import time
from dataclasses import dataclass
from typing import Protocol

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client
from efcfs.nfs.link import ServerAway
from efcfs.nfs.nfs3 import Fattr, Wcc
from efcfs.nfs.rpc import Credential
from efcfs.vfs.absent import Absent
from efcfs.vfs.consistency import Consistency, Mode
from efcfs.vfs.inodes import Inode, Inodes

log = logging.getLogger(__name__)

FOR_EVER_S = 1e9
# While the server is away: soon enough to notice that it is back.
AWAY_S = 1.0
SET_ID_BITS = 0o6000


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; names and meaning as in nfs(5)."""

    acregmin_s: float = 3.0
    acregmax_s: float = 60.0
    acdirmin_s: float = 30.0
    acdirmax_s: float = 60.0


class Kernel(Protocol):
    """What the file system asks of the kernel's caches."""

    def drop_attributes(self, ino: int) -> None: ...

    def drop_pages(self, ino: int) -> None: ...

    def expire_name(self, directory: int, name: bytes) -> None:
        """The name is to be looked up again."""

    def store_pages(self, ino: int, data: bytes) -> None:
        """Put the bytes of a whole file into the page cache. Blocks: for a thread."""


def version(attr: Fattr) -> tuple[int, int, int]:
    """What tells one state of a file from another in NFSv3, which has no change counter."""
    return (attr.size, attr.mtime_ns, attr.ctime_ns)


class Attributes:
    """The attribute cache of one mount."""

    def __init__(
        self, client: Client, timeouts: Timeouts, consistency: Consistency, inodes: Inodes, absent: Absent
    ) -> None:
        self.kernel: Kernel | None = None
        self._client = client
        self._timeouts = timeouts
        self._consistency = consistency
        self._inodes = inodes
        self._absent = absent
        self._since = time.monotonic()

    def mode_of(self, inode: Inode) -> Mode:
        """By which rule it is kept consistent."""
        consistency = self._consistency
        if not consistency.by_path:
            return consistency.default
        if inode.mode is None:
            inode.mode = consistency.of(self._inodes.path(inode))
        return inode.mode

    def refuse_immutable(self, *inodes: Inode) -> None:
        if any(self.mode_of(inode) is Mode.IMMUTABLE for inode in inodes):
            raise OSError(errno.EROFS, "immutable by the mount's rules")

    def remaining_s(self, inode: Inode) -> float:
        """How long the cached attributes are still fresh; while the server is away, old ones must do."""
        if inode.attr is None:
            return 0.0
        left_s = inode.attr_at + inode.timeout_s - time.monotonic()
        if left_s > 0:
            return left_s
        return AWAY_S if self._client.away and self.may_be_old(inode) else 0.0

    def may_be_old(self, inode: Inode) -> bool:
        """Whether what is known of the inode may be told when the server does not answer."""
        return inode.attr is not None and self.mode_of(inode) is not Mode.STRICT

    def tell_version(self, inode: Inode) -> bool:
        """Whether its attributes tell which bytes it has: unless they are of before a write of ours, or of what a
        daemon before us knew. While the server is away they must do.
        """
        return inode.attr_at >= self._since or self._client.away or self.mode_of(inode) is Mode.IMMUTABLE

    async def get(self, inode: Inode, cred: Credential) -> Fattr:
        """Fresh attributes: cached ones, or from the server."""
        if inode.attr is not None and self.remaining_s(inode):
            return inode.attr
        return await self.revalidate(inode, cred)

    async def revalidate(self, inode: Inode, cred: Credential) -> Fattr:
        asked_at = time.monotonic()
        try:
            attr = await self._client.getattr(cred, inode.fh, impatient=self.may_be_old(inode))
        except ServerAway:
            assert inode.attr is not None
            return inode.attr
        self.update(inode, attr, asked_at)
        return attr

    async def may(self, inode: Inode, wanted: int, cred: Credential) -> bool:
        """Ask the server for rights; its answer revalidates the attributes at the same time."""
        asked_at = time.monotonic()
        ino = inode.ino
        # Reading what is cached goes on without the server; the kernel has checked the mode.
        reading = not wanted & (nfs3.ACCESS3_MODIFY | nfs3.ACCESS3_EXTEND) and self.may_be_old(inode)
        if reading and self._client.away:
            return True
        try:
            result = await self._client.access(cred, inode.fh, wanted, impatient=reading)
        except ServerAway:
            return True
        inode = self._inodes.get(ino)
        if result.attr is None:
            await self.revalidate(inode, cred)
        else:
            self.update(inode, result.attr, asked_at)
        return result.access & wanted == wanted

    def learn(self, ino: int, attr: Fattr, asked_at: float) -> None:
        """Attributes that came with a READ. While we write ourselves, they tell nothing new."""
        try:
            inode = self._inodes.get(ino)
        except KeyError:
            return  # forgotten meanwhile
        if inode.open_file is None or not inode.open_file.extents:
            self.update(inode, attr, asked_at)

    def update(self, inode: Inode, attr: Fattr | None, asked_at: float, *, own: bool = False) -> None:
        """Take over the attributes of a reply whose call was sent at `asked_at` (monotonic).

        own: nobody but us changed the file since the attributes known before.
        """
        if attr is None:
            return
        if attr.type == nfs3.NF3DIR:
            self._absent.seen(inode.fh, version(attr), asked_at)
        now = time.monotonic()
        old = inode.attr
        low, high = self._bounds(inode, attr)
        if old is None:
            inode.timeout_s = low
        elif version(attr) == version(old):
            if now >= inode.attr_at + inode.timeout_s:
                inode.timeout_s = min(max(inode.timeout_s * 2, low), high)
        else:
            if attr.ctime_ns <= old.ctime_ns and asked_at < inode.attr_at:
                # Overtaken on another link by the reply to a later call; or, in the same tick of a server's
                # coarse clock, nobody can tell which is the later one: then the next use asks.
                if attr.ctime_ns == old.ctime_ns:
                    self.expire(inode)
                return
            inode.timeout_s = low
            if old.mode & ~attr.mode & SET_ID_BITS and self.kernel is not None:
                self.kernel.drop_attributes(inode.ino)  # or execve(2) goes on by the mode that it has
            if own:
                if inode.pages_version == version(old):
                    inode.pages_version = version(attr)
            else:
                self._changed_by_others(inode)
        inode.attr = attr
        inode.attr_at = now

    def recall(self, inode: Inode, attr: Fattr, seen_at: float) -> None:
        """Attributes seen earlier (monotonic seconds), for an inode of which nothing newer is known."""
        if inode.attr is None or (inode.attr_at < seen_at and version(inode.attr) == version(attr)):
            inode.attr, inode.attr_at = attr, seen_at
            # A daemon before us may have changed the file after it saw them.
            inode.timeout_s = self._bounds(inode, attr)[0] if seen_at >= self._since else 0.0

    def update_wcc(self, inode: Inode, wcc: Wcc, asked_at: float) -> None:
        """Take over weak cache consistency data (RFC 1813 §2.6): ours, if nobody wrote before us."""
        before, old = wcc.before, inode.attr
        after = version(wcc.after) if wcc.after is not None else None
        self._absent.seen(inode.fh, after, asked_at, ours=True, before=before)
        own = before is not None and old is not None and tuple(before) == version(old)
        if wcc.after is None:
            inode.timeout_s = 0.0  # something changed and we do not know what to
        else:
            self.update(inode, wcc.after, asked_at, own=own)

    def believe_absent_s(self, directory: Inode) -> float:
        """How long the server's word that a name is not there may be believed."""
        return self._bounds(directory, directory.attr)[0] if directory.attr is not None else 0.0

    def expire(self, inode: Inode) -> None:
        inode.timeout_s = 0.0

    def lose(self, inode: Inode) -> None:
        """They changed by a call of ours that returned no new ones."""
        self.expire(inode)
        if self.kernel is not None:
            self.kernel.drop_attributes(inode.ino)

    def doubt(self, inode: Inode) -> None:
        """Bytes of it were changed, and no attributes came that tell so: the next read asks for them."""
        inode.attr_at = inode.timeout_s = 0.0

    def _bounds(self, inode: Inode, attr: Fattr) -> tuple[float, float]:
        t = self._timeouts
        mode = self.mode_of(inode)
        if mode is Mode.STRICT:
            return (0.0, 0.0)
        if mode is Mode.IMMUTABLE:
            return (FOR_EVER_S, FOR_EVER_S)
        return (t.acdirmin_s, t.acdirmax_s) if attr.type == nfs3.NF3DIR else (t.acregmin_s, t.acregmax_s)

    def _changed_by_others(self, inode: Inode) -> None:
        inode.name_doubtful = True
        if inode.open_file is not None and self.kernel is not None:
            self.kernel.drop_pages(inode.ino)
