"""An NFSv3 server of our own, of files in memory, that is honest until it is told to misbehave.

By procedure: `results` changes what it answers (None: it does not answer), `record` the bytes of the whole answer. Who
changes them at run time shares one mount over many faults. Its honest half is `nfs/server_half.py`.
"""

import contextlib
import itertools
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from efcfs.nfs import mount3, nfs3
from efcfs.nfs.nfs3 import Fattr, Wcc
from tests.nfs import server_half as half

NONE = Wcc(None, None)
# Of the honest results of a call with these arguments, what is answered.
Results = Callable[[tuple[Any, ...], bytes], bytes | None]
Record = Callable[[bytes], bytes]


@dataclass
class Node:
    """A file. `claims`: attributes of which it lies."""

    fh: bytes
    type: int
    fileid: int
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, "Node"] = field(default_factory=dict)
    claims: dict[str, int] = field(default_factory=dict)

    @property
    def attr(self) -> Fattr:
        size = len(self.data)
        honest = Fattr(self.type, 0o755, 1, 0, 0, size, size, 0, 0, 1, self.fileid, 0, 10**18 + size, 10**18 + size)
        return honest._replace(**self.claims)


class Rogue:
    """Listens from `with` on, at one port for MOUNT and NFS."""

    export = "/export"

    def __init__(self) -> None:
        self._numbers = itertools.count(100)
        self._nodes: dict[bytes, Node] = {}
        self.root = self._node(nfs3.NF3DIR)
        self.calls: Counter[int] = Counter()
        self.results: dict[int, Results] = {}
        self.record: dict[int, Record] = {}
        self.verifier = bytes(8)
        self._connections: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.mount_port = self.port

    def __enter__(self) -> "Rogue":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    @contextlib.contextmanager
    def misbehaving(self, procedure: int, results: Results) -> Iterator[None]:
        self.results[procedure] = results
        try:
            yield
        finally:
            del self.results[procedure]

    def cut(self) -> None:
        """End all connections."""
        for sock in list(self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def make(
        self, name: bytes, kind: int = nfs3.NF3REG, data: bytes = b"", at: Node | None = None, **claims: int
    ) -> Node:
        """A file with that name in a directory (None: the root)."""
        node = self._node(kind, data, claims)
        (at or self.root).names[name] = node
        return node

    def _node(self, kind: int, data: bytes = b"", claims: dict[str, int] | None = None) -> Node:
        number = next(self._numbers)
        node = Node(b"handle %d" % number, kind, number, bytearray(data), claims=claims or {})
        self._nodes[node.fh] = node
        return node

    # -- the server ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, struct.error):
            stream = sock.makefile("rb")
            while True:
                (mark,) = struct.unpack(">I", stream.read(4))
                answer = self._answer(half.decode_call(stream.read(mark & 0x7FFFFFFF)))
                if answer:
                    sock.sendall(answer)
        self._connections.discard(sock)

    def _answer(self, call: half.CallMessage) -> bytes | None:
        if call.program == mount3.PROGRAM:
            mounted = half.encode_mnt(mount3.MntResult(0, self.root.fh, (1,)))
            return half.framed(half.accepted(call.xid, mounted if call.procedure else b""))
        self.calls[call.procedure] += 1
        args = half.decode_args(call.procedure, call.args)
        told: bytes | None = self._honest(call.procedure, args)
        if change := self.results.get(call.procedure):
            told = change(args, told or b"")
        if told is None:
            return None
        answer = half.framed(half.accepted(call.xid, told))
        spoil = self.record.get(call.procedure)
        return spoil(answer) if spoil else answer

    def _honest(self, procedure: int, args: tuple[Any, ...]) -> bytes:
        if procedure == nfs3.NFSPROC3_NULL:
            return b""
        node = self._nodes.get(args[0])
        stale = node is None
        node = node or self.root
        status = nfs3.NFS3ERR_STALE if stale else nfs3.NFS3_OK
        attr = node.attr
        match procedure:
            case nfs3.NFSPROC3_GETATTR:
                return half.encode_getattr(nfs3.GetattrResult(status, None if stale else attr))
            case nfs3.NFSPROC3_SETATTR:
                if args[1].size is not None:
                    node.data = node.data[: args[1].size].ljust(args[1].size, b"\0")
                return half.encode_setattr(nfs3.SetattrResult(0, Wcc(None, node.attr)))
            case nfs3.NFSPROC3_LOOKUP:
                found = node.names.get(args[1])
                if found is None:
                    return half.encode_lookup(nfs3.LookupResult(nfs3.NFS3ERR_NOENT, None, None, attr))
                return half.encode_lookup(nfs3.LookupResult(0, found.fh, found.attr, attr))
            case nfs3.NFSPROC3_ACCESS:
                return half.encode_access(nfs3.AccessResult(0, attr, args[1]))
            case nfs3.NFSPROC3_READLINK:
                return half.encode_readlink(nfs3.ReadlinkResult(0, attr, bytes(node.data)))
            case nfs3.NFSPROC3_READ:
                data = bytes(node.data[args[1] : args[1] + args[2]])
                eof = args[1] + args[2] >= len(node.data)
                return half.encode_read(nfs3.ReadResult(0, attr, len(data), eof, data))
            case nfs3.NFSPROC3_WRITE:
                _, offset, count, stable, data = args
                node.data[len(node.data) :] = bytes(max(0, offset - len(node.data)))
                node.data[offset : offset + count] = data
                return half.encode_write(nfs3.WriteResult(0, Wcc(None, node.attr), count, stable, self.verifier))
            case nfs3.NFSPROC3_CREATE:
                made = node.names.get(args[1]) or self.make(args[1], at=node)
                return half.encode_create(nfs3.CreateResult(0, made.fh, made.attr, NONE))
            case nfs3.NFSPROC3_REMOVE:
                removed = node.names.pop(args[1], None)
                gone = nfs3.NFS3_OK if removed else nfs3.NFS3ERR_NOENT
                return half.encode_remove(nfs3.RemoveResult(gone, NONE))
            case nfs3.NFSPROC3_READDIR | nfs3.NFSPROC3_READDIRPLUS:
                listed = list(enumerate(node.names.items(), 1))[args[1] :]
                if procedure == nfs3.NFSPROC3_READDIR:
                    plain = [nfs3.DirEntry(n.fileid, name, i) for i, (name, n) in listed]
                    return half.encode_readdir(nfs3.ReaddirResult(0, attr, bytes(8), plain, True))
                entries = [nfs3.DirEntryPlus(n.fileid, name, i, n.attr, n.fh) for i, (name, n) in listed]
                return half.encode_readdirplus(nfs3.ReaddirplusResult(0, attr, bytes(8), entries, True))
            case nfs3.NFSPROC3_FSSTAT:
                return half.encode_fsstat(nfs3.FsstatResult(0, attr, 2**40, 2**40, 2**40, 10**6, 10**6, 10**6, 0))
            case nfs3.NFSPROC3_FSINFO:
                sizes = (1 << 20, 1 << 20, 1, 1 << 20, 1 << 20, 1, 65536)
                return half.encode_fsinfo(nfs3.FsinfoResult(0, attr, *sizes, 2**63 - 1, 1, 27))
            case nfs3.NFSPROC3_PATHCONF:
                return half.encode_pathconf(nfs3.PathconfResult(0, attr, 1000, 255, True, True, False, True))
            case nfs3.NFSPROC3_COMMIT:
                return half.encode_commit(nfs3.CommitResult(0, Wcc(None, attr), self.verifier))
        return struct.pack(">II", nfs3.NFS3ERR_NOTSUPP, 0) + bytes(8)
