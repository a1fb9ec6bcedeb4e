"""What is open: the handles of files and directories, and the checks that come before a new one.

Close-to-open lives in `check`: the server is asked for the caller's rights, and its answer shows whether the file is
still the one, and the size still that, which the kernel knows. A handle that must outlive the daemon is noted in the
table (`handles.py`) before the kernel is told its number. The state of a file that is open (`openfile.py`) is made with
its first handle or open(2), and ends with the last. Bytes are the affair of `reader.py` and `writer.py`.
"""

import contextlib
import errno
import logging
import os
import time
from collections import OrderedDict
from typing import NamedTuple

import trio

from efcfs.nfs import nfs3
from efcfs.nfs.client import Client, NfsError
from efcfs.nfs.light import in_task
from efcfs.nfs.link import ServerAway
from efcfs.nfs.rpc import Credential
from efcfs.vfs.attributes import Attributes, version
from efcfs.vfs.consistency import Mode
from efcfs.vfs.directories import Directories, Listing
from efcfs.vfs.handles import Handles, Request
from efcfs.vfs.hiding import Hiding
from efcfs.vfs.inodes import Inode, Inodes
from efcfs.vfs.openfile import Handle, OpenFile

log = logging.getLogger(__name__)

# Set by the kernel in open flags when a file is opened to be executed.
FMODE_EXEC = 0o40
# Files that are read without having been opened, of which the streams of reads are remembered.
MAX_STANDING = 1024
# A file that was opened so lately is likely to be opened again, and hidden instead of removed when it is replaced.
LATELY_S = 1.0
# How long removing a hidden name may take when the program that opened it is gone.
CLOSE_S = 5.0


class Opened(NamedTuple):
    """direct_io: the kernel keeps no pages and asks for every read."""

    handle: int
    keep_cache: bool
    direct_io: bool


class Opening:
    """All that is open on one mount."""

    def __init__(
        self, client: Client, inodes: Inodes, attributes: Attributes, directories: Directories, table: Handles,
        hiding: Hiding, nursery: trio.Nursery, *, cto: bool,
    ) -> None:  # fmt: skip
        # Files that are open, or about to be, by node id.
        self.open: dict[int, Inode] = {}
        self.handles: dict[int, Handle] = {}
        self.listings: dict[int, Listing] = {}
        # Handles of files that the kernel opens by itself, by node id; the last used last.
        self.standing: OrderedDict[int, int] = OrderedDict()
        # Handles of requests that came again, by their number, which a daemon before us had opened.
        self._opened_before: dict[int, int] = {}
        self._client = client
        self._inodes = inodes
        self._attributes = attributes
        self._directories = directories
        self._table = table
        self._hiding = hiding
        self._nursery = nursery
        self._cto = cto

    def adopt(self) -> None:
        """Open again what a daemon before us had open."""
        for slot in self._table:
            try:
                inode = self._inodes.get(slot.ino)
            except KeyError:
                log.error("inode %d is open and not known", slot.ino)
                self._table.remove(slot.number)
                continue
            self._opened_before[slot.unique] = slot.number
            if slot.is_directory:
                self.listings[slot.number] = self._directories.listing(inode, slot.cred, revalidated=False)
                continue
            file = self._file(inode)
            self._found(file, self._inodes.hidden_name(slot.ino))
            self._add(Handle(slot.number, file, slot.cred, slot.flags, slot.error))

    # -- open(2), in this order ----------------------------------------------------------------------

    def again(self, request: Request) -> tuple[Inode, Opened] | None:
        """What the request, which came again, had opened, if the daemon before us got so far."""
        number = self._opened_before.pop(request.unique, None)
        if number is None or number not in self.handles:
            return None
        inode = self.open[self.handles[number].file.ino]
        return inode, Opened(number, False, self._attributes.mode_of(inode) is Mode.STRICT)

    def begin(self, inode: Inode) -> OpenFile:
        """From now on, until `opening` is taken back, it counts as open: who takes its name away must hide it."""
        inode.opened_at = time.monotonic()
        file = self._file(inode)
        file.opening += 1
        return file

    async def check(self, inode: Inode, flags: int, cred: Credential, thread: int) -> None:
        """Whether the server allows it, and whether the kernel knows what it opens."""
        cto = self._cto and self._attributes.mode_of(inode) is not Mode.IMMUTABLE
        if cto or not self._attributes.remaining_s(inode):
            if not await self._attributes.may(inode, _wanted_by(flags), cred):
                raise OSError(errno.EACCES, "the server does not allow it")
            if inode.name_doubtful:
                await self._check_name(inode, cred, thread)
            if self._attributes.view.dropping and not flags & os.O_TRUNC:
                # The kernel drops all pages when it truncates, and until then it may hold back what this waits for.
                await self._attributes.view.agreed(inode.ino)
            self._check_kernel_size(inode, flags, thread)

    def opened(self, inode: Inode, flags: int, cred: Credential, request: Request | None) -> Opened:
        """A new handle; without a request it is one that no other daemon needs to know."""
        attr, file = inode.attr, self._file(inode)
        number = self._table.add(request.unique, inode.ino, flags, cred) if request else self._table.number()
        if request is not None and number not in self._table:
            flags |= os.O_SYNC  # the next daemon would not know whose its bytes are
        self._add(Handle(number, file, cred, flags))
        inode.opened_at = time.monotonic()
        now = version(attr) if attr is not None else None
        keep = inode.pages_version == now or bool(file.extents)
        inode.pages_version = now
        return Opened(number, keep, self._attributes.mode_of(inode) is Mode.STRICT)

    async def came_to_nothing(self, file: OpenFile, cred: Credential) -> None:
        """An open(2) that failed or was given up, and nobody else has the file open."""
        await in_task()
        if file.handles or file.opening:
            return  # opened again meanwhile
        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
            await self.closed(file, cred)

    # -- handles -------------------------------------------------------------------------------------

    def stand(self, inode: Inode, cred: Credential) -> int:
        """A new handle for all readers of a file that the kernel opens by itself, kept for a while."""
        number = self.standing[inode.ino] = self.opened(inode, os.O_RDONLY, cred, None).handle
        if len(self.standing) > MAX_STANDING:
            _, oldest = self.standing.popitem(last=False)
            handle = self.handles.pop(oldest)
            handle.closed = True
            self.forget(handle.file)
        return number

    def keep_open(self, inode: Inode, cred: Credential) -> None:
        """Count a file that was opened lately as open for a while: who opens it all the time may be about to.

        It would find the file gone, and the kernel walks a path only twice. (The kernel's NFS client knows who is
        about to open; nobody tells us.)
        """
        if time.monotonic() - inode.opened_at >= LATELY_S:
            return
        file = self._file(inode)
        file.opening += 1

        async def let_go() -> None:
            await trio.sleep(LATELY_S)
            file.opening -= 1
            if not file.handles and not file.opening:
                # Nobody is there to be told that its directory was forgotten; the hidden name goes at the mount's end.
                with contextlib.suppress(KeyError):
                    await self.closed(file, cred)

        self._nursery.start_soon(let_go)

    def let_go(self, handle: Handle) -> bool:
        """The handle is no more. Whether it was the last, so that `closed` must follow."""
        file = handle.file
        handle.closed = True
        del self.handles[handle.number]
        file.handles.remove(handle)
        return not file.handles and not file.opening

    async def closed(self, file: OpenFile, cred: Credential) -> None:
        """Nobody has the file open any more."""
        if file.sillyname is not None:
            await self._hiding.remove(file, cred)
            if file.handles or file.opening:
                return  # opened again meanwhile, by another link
        self.forget(file)

    def written(self, ino: int) -> int | None:
        """As in `reader.Written`."""
        file = self.open[ino].open_file if ino in self.open else None
        if file is None:
            return 0
        return None if file.extents else file.written

    def forget(self, file: OpenFile) -> None:
        inode = self.open.get(file.ino)
        if inode is not None and inode.open_file is file:  # not forgotten while another one that closed it waited
            del self.open[file.ino]
            inode.open_file = None

    def _file(self, inode: Inode) -> OpenFile:
        if inode.open_file is None:
            inode.open_file = file = OpenFile(inode.ino, inode.fh)
            self._found(file, self._hiding.reopened(inode.ino))
            self.open[inode.ino] = inode
        return inode.open_file

    @staticmethod
    def _found(file: OpenFile, hidden_name: tuple[int, bytes] | None) -> None:
        """What a daemon before us noted."""
        file.sillyname, file.doubtful = hidden_name, hidden_name is not None

    def _add(self, handle: Handle) -> None:
        self.handles[handle.number] = handle
        handle.file.handles.append(handle)

    # -- directories ---------------------------------------------------------------------------------

    async def opendir(self, inode: Inode, cred: Credential, request: Request) -> int:
        number = self._opened_before.pop(request.unique, None) if request.again else None
        if number is not None and number in self.listings:
            return number
        if not await self._attributes.may(inode, nfs3.ACCESS3_READ, cred):
            raise OSError(errno.EACCES, "the server does not allow it")
        number = self._table.add(request.unique, inode.ino, 0, cred, is_directory=True)
        self.listings[number] = self._directories.listing(self._inodes.get(inode.ino), cred)
        return number

    def releasedir(self, number: int) -> None:
        self.listings.pop(number).close()
        self._table.remove(number)

    # -- does the kernel know what it opens? ---------------------------------------------------------

    async def _check_name(self, inode: Inode, cred: Credential, thread: int) -> None:
        """Make the kernel look the name up again if it is another file's now.

        A file that was replaced lives on while another client has it open, under a hidden name: its handle alone
        does not tell that it is the wrong one. As in `_check_kernel_size`, the program does not see the ESTALE.
        """
        try:
            found = await self._client.lookup(cred, self._inodes.get(inode.parent).fh, inode.name, impatient=True)
            same = found.fh == inode.fh
        except NfsError as error:
            if error.status != nfs3.NFS3ERR_NOENT:
                raise
            same = False
        except (ServerAway, KeyError):  # its directory was forgotten
            return
        inode.name_doubtful = not same
        if not same and not self._inodes.walked(inode, thread):
            self._walk_again(inode, thread, "name is another file's now")

    def _check_kernel_size(self, inode: Inode, flags: int, thread: int) -> None:
        """Make the kernel learn a size that changed elsewhere, before it uses its own for O_APPEND or a read.

        An OPEN reply carries no attributes. Who reads asks for them when they were dropped. Who appends does not: there
        ESTALE makes the kernel walk the path again with LOOKUPs, whose replies have them, and then open again; the
        program does not see it. The kernel does so once, so the second open of that thread is let through.
        """
        attr, file, view = inode.attr, inode.open_file, self._attributes.view
        if attr is None or attr.type != nfs3.NF3REG or (file is not None and file.extents):
            return
        known = inode.kernel_size_bytes == attr.size
        if not flags & os.O_APPEND:
            if not known and not inode.kernel_size_asked:
                view.forget_size(inode)
        elif inode.walkers != {} and self._inodes.walked(inode, thread):
            view.end_teaching(inode)
        elif not known or not inode.kernel_size_sure:
            view.begin_teaching(inode)
            self._walk_again(inode, thread, "size changed on the server, or is not surely known to the kernel")

    def _walk_again(self, inode: Inode, thread: int, why: str) -> None:
        self._inodes.walks(inode, thread)
        raise OSError(errno.ESTALE, why)


def _wanted_by(flags: int) -> int:
    accmode = flags & os.O_ACCMODE
    wanted = 0
    if accmode in (os.O_RDONLY, os.O_RDWR):
        # Servers let who may execute a file read it (RFC 1813 §3.3.4).
        wanted |= nfs3.ACCESS3_EXECUTE if flags & FMODE_EXEC else nfs3.ACCESS3_READ
    if accmode in (os.O_WRONLY, os.O_RDWR):
        wanted |= nfs3.ACCESS3_MODIFY | nfs3.ACCESS3_EXTEND
    return wanted
