"""What the programs of the soak know and find: files as they must be, stamped blocks, findings.

A block's stamp says program, file, offset and sequence, over and over, so bytes in the wrong place tell whose they are.
"""

import struct
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple

BLOCK_BYTES = 4096
# program, file, offset, sequence
STAMP = struct.Struct("<4sIQQQ")


class Call(NamedTuple):
    """A system call that took long."""

    what: str
    begun_s: float
    ended_s: float


@dataclass(slots=True)
class Findings:
    """What one program did and saw."""

    actions: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    slow: list[Call] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Board:
    """What the programs tell each other and the soak while they run: shared memory, a place for each program."""

    def __init__(self, programs: int) -> None:
        self.published, self.calls, self.failures = (RawArray("q", programs) for _ in range(3))


@dataclass(slots=True, eq=False)
class File:
    """A file as it must be."""

    number: int
    content: bytearray = field(default_factory=bytearray)
    mode: int = 0o644

    def put(self, offset: int, data: bytes) -> None:
        self.content.extend(bytes(max(0, offset - len(self.content))))
        self.content[offset : offset + len(data)] = data

    def resize(self, length: int) -> None:
        del self.content[length:]
        self.content.extend(bytes(length - len(self.content)))


class Handle(NamedTuple):
    fd: int
    path: str
    file: File
    flags: int


def stamped(program: int, file: int, offset: int, sequence: int, length: int) -> bytes:
    return b"".join(
        STAMP.pack(b"soak", program, file, offset + at, sequence) * (BLOCK_BYTES // STAMP.size)
        for at in range(0, length, BLOCK_BYTES)
    )


def difference(found: bytes, expected: bytes | bytearray) -> str:
    """Where and how bytes differ; what stands there tells whose it is."""
    wrong = sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))
    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
    return f"{wrong} of {len(expected)} bytes wrong, first at {at}: {told(found, at)} and not {told(expected, at)}"


def told(data: bytes | bytearray, at: int) -> str:
    piece = bytes(data[at : at + 2 * STAMP.size])
    start = piece.find(b"soak")
    if start < 0 or len(piece) < start + STAMP.size:
        return f"{len(piece)} bytes {piece[:8].hex()}…" if piece else "nothing"
    _, program, file, offset, sequence = STAMP.unpack_from(piece, start)
    return f"program {program} file {file} offset {offset} sequence {sequence}"
