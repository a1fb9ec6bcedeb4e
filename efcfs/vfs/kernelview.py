"""What the kernel believes of a file: its size, and the pages that it keeps. Only this module changes that unasked.

An answer that carries attributes leaves after the pages that it makes wrong are gone (`agreed`). Until then the kernel
keeps the old bytes and the old size. docs/design.md, "Sizes and pages in the kernel", says why that order matters.

The kernel ignores an answer when anything else has changed the inode since the request, and it does not tell. So a size
that was told is not yet a size that is believed. `Inode.kernel_size_sure` says that the kernel believes exactly
`kernel_size_bytes`; whoever appends needs that.
"""

from typing import Protocol

import trio

from efcfs.nfs.light import in_task
from efcfs.vfs.inodes import SIZE_UNKNOWN, Inode


class Kernel(Protocol):
    """What the file system asks of the kernel's caches."""

    def drop_attributes(self, ino: int) -> None:
        """The kernel asks for attributes before it uses them, and ignores answers to requests that it sent before."""

    async def drop_pages(self, ino: int) -> None:
        """As `drop_attributes`, and the pages are gone afterwards. Waits for pages that are being read."""

    def store_pages(self, ino: int, data: bytes) -> None:
        """Put the bytes of a whole file into the page cache. Blocks: for a thread."""


class KernelView:
    """What the kernel believes of the files of one mount."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.kernel: Kernel | None = None
        # Files whose pages are being dropped, by node id.
        self.dropping: dict[int, trio.Event] = {}
        # Those of them that changed once more meanwhile.
        self._changed_again: set[int] = set()
        self._nursery = nursery

    # -- pages ---------------------------------------------------------------------------------------

    def drop_pages(self, inode: Inode) -> None:
        """Begin to drop them; `agreed` waits for the end."""
        if self.kernel is None:
            return
        inode.kernel_size_taught = False
        if inode.ino in self.dropping:
            self._changed_again.add(inode.ino)  # pages that were dropped already may be back
            return
        self.dropping[inode.ino] = trio.Event()
        self._nursery.start_soon(self._drop, self.kernel, inode.ino)

    async def _drop(self, kernel: Kernel, ino: int) -> None:
        try:
            await kernel.drop_pages(ino)
            while ino in self._changed_again:
                self._changed_again.remove(ino)
                await kernel.drop_pages(ino)
        finally:
            self.dropping.pop(ino).set()

    async def agreed(self, ino: int) -> None:
        """Wait until the kernel has no pages that its next attributes would make wrong."""
        if ino in self.dropping:
            await in_task()
        while ino in self.dropping:
            await self.dropping[ino].wait()

    # -- sizes ---------------------------------------------------------------------------------------

    def told(self, inode: Inode, size_bytes: int) -> None:
        """An answer carries this size, which is not the one that was told last."""
        if inode.kernel_size_bytes != SIZE_UNKNOWN:
            # Answers that are under way may arrive in any order.
            inode.kernel_size_sure = inode.kernel_size_taught = False
        inode.kernel_size_bytes, inode.kernel_size_asked = size_bytes, False

    @staticmethod
    def settled(inode: Inode, size_bytes: int) -> None:
        """The kernel sets this size itself, whatever is under way: a truncation, or another SETATTR."""
        inode.kernel_size_bytes, inode.kernel_size_sure = size_bytes, True

    def drop_attributes(self, inode: Inode) -> None:
        """The kernel asks for the size before it reads beyond the one that it knows."""
        if self.kernel is not None:
            self.kernel.drop_attributes(inode.ino)
        inode.kernel_size_taught = False

    def forget_size(self, inode: Inode) -> None:
        """As `drop_attributes`; and from now on only what is told next counts."""
        self.drop_attributes(inode)
        inode.kernel_size_bytes, inode.kernel_size_sure = SIZE_UNKNOWN, False
        inode.kernel_size_asked = True

    def begin_teaching(self, inode: Inode) -> None:
        """The caller makes the kernel ask for attributes, and calls `end_teaching` when the answer was taken."""
        if not inode.kernel_size_taught:
            self.forget_size(inode)
            inode.kernel_size_taught = True

    @staticmethod
    def end_teaching(inode: Inode) -> None:
        """Sure now, if the kernel was told only one size since `begin_teaching`: an ignored answer told the same."""
        if inode.kernel_size_taught and inode.kernel_size_bytes != SIZE_UNKNOWN:
            inode.kernel_size_sure = True
